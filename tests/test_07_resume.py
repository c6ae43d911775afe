# SPDX-License-Identifier: MIT-0
"""Optimizer state by name and offset: on another mesh, after a kill; wrong files are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import resume
import scripts
import torch
import torch.distributed as dist
import zero_3d as z
import zero_3d_tables as tables
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Shows
from test_07_zero_3d import everyone, mesh_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

CONFIG = z.GPTConfig(61, 3, 32, 4)
FOUR = [
    ((2, 1, 2), (1, 4, 1)),
    ((1, 2, 2), (4, 1, 1)),
    ((1, 1, 4), (2, 2, 1)),
    ((2, 2, 1), (1, 1, 4)),
]
EIGHT = [((2, 2, 2), (1, 4, 2)), ((2, 2, 2), (4, 1, 2)), ((2, 1, 4), (1, 2, 4))]


def batch_of(seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(61, (2, 8, 8), generator=generator)
    return tokens_BS.to(ranks.device), targets_BS.to(ranks.device)


def build(layout, dtype=torch.bfloat16, seed: int = 0):
    """A stage and its optimizer, which has several buckets."""
    mesh = mesh_of(*layout)
    stage = z.Stage(replace(CONFIG, seed=seed), mesh).to(ranks.device, dtype)
    return stage, z.make_training(stage, 1e-2, elements=500), mesh


def arrays(state: dict) -> dict:
    """Tensors as numpy's arrays, which are pickled faster."""
    return tree_map_only(Tensor, lambda x: x.cpu().numpy(), state)


def tensors(state: dict) -> dict:
    return tree_map_only(np.ndarray, torch.from_numpy, state)


def full_state(optimizer, mesh) -> resume.FullState:
    """Merged on rank 0, for every rank."""
    is_first = dist.get_rank() == 0
    found = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(arrays(resume.optimizer_state_dict(optimizer)), found)
    merged = [None]
    if is_first:
        states = [tensors(state) for state in found]
        merged = [arrays(resume.merge_optimizer_states(states, CONFIG, mesh))]
    dist.broadcast_object_list(merged)
    return tensors(merged[0])


def assert_same(here: resume.FullState, there: resume.FullState) -> None:
    """To the bit."""
    assert here.keys() == there.keys() == {"master", "exp_avg", "exp_avg_sq", "step"}
    for key, tensors in there.items():
        assert here[key].keys() == tensors.keys()
        for name, x in tensors.items():
            assert torch.equal(here[key][name], x), (key, name)


def reshard(first, second) -> None:
    """Saved on one mesh, loaded on another and back: equal to the bit, and both train on alike."""
    stage, optimizer, mesh = build(first)
    list(z.train(stage, optimizer, [batch_of(0), batch_of(1)], 2))
    state = full_state(optimizer, mesh)
    assert all(x.abs().max() > 0 for x in state["exp_avg"].values())
    other, theirs, other_mesh = build(second, seed=5)
    resume.load_optimizer_state(theirs, state, CONFIG, other_mesh)
    there = full_state(theirs, other_mesh)
    assert_same(there, state)
    again, back, _ = build(first, seed=6)
    resume.load_optimizer_state(back, there, CONFIG, mesh)
    for name, p in stage.named_parameters():
        assert torch.equal(again.get_parameter(name), p)
    ((loss, norm),) = z.train(stage, optimizer, [batch_of(2)], 2)
    ((other_loss, other_norm),) = z.train(other, theirs, [batch_of(2)], 2)
    assert abs(loss / other_loss - 1) < 1e-2 and abs(norm / other_norm - 1) < 3e-2  # bf16 GEMMs


@pytest.mark.ranks(4)
@pytest.mark.parametrize("first, second", FOUR, ids=str)
def test_another_mesh_of_four(first, second):
    reshard(first, second)


@pytest.mark.slow
@pytest.mark.ranks(8, timeout=240)
@pytest.mark.parametrize("first, second", EIGHT, ids=str)
def test_another_mesh_of_eight(first, second):
    reshard(first, second)


@pytest.mark.ranks(4)
def test_the_merged_state_is_that_of_one_device():
    """Names, shapes and, in float64, values of torch.optim.AdamW for the plain model."""
    stage, optimizer, mesh = build((2, 1, 2), torch.float64)
    batches = [batch_of(0), batch_of(1)]
    list(z.train(stage, optimizer, batches, 2))
    plain = z.GPT(CONFIG).double()
    alone = z.make_optimizer(plain, 1e-2)
    list(z.train_alone(plain, alone, batches))
    state = full_state(optimizer, mesh)
    for name, p in plain.named_parameters():
        expected = alone.state[p]
        assert state["step"][name] == expected["step"]
        torch.testing.assert_close(state["master"][name], p.detach(), rtol=1e-9, atol=1e-11)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key][name], expected[key], rtol=1e-9, atol=1e-14)


def test_a_state_of_step_0_clears_the_moments():
    """A used optimizer then trains as a new one does."""
    one = z.ParallelMesh()
    found = []
    for steps in (0, 2):
        stage = z.Stage(CONFIG, one)
        optimizer = z.make_training(stage, 1e-2)
        state = [resume.optimizer_state_dict(optimizer)]
        full = resume.merge_optimizer_states(state, CONFIG, one)
        assert full.keys() == {"master"}
        batches = [tuple(x.cpu() for x in batch_of(seed)) for seed in (0, 1)]
        list(z.train(stage, optimizer, batches[:steps], 2))
        resume.load_optimizer_state(optimizer, full, CONFIG, one)
        assert not any(optimizer.optimizer.state.values())
        list(z.train(stage, optimizer, batches, 2))
        found.append(stage.state_dict())
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())


# ── Kill and resume ─────────────────────────────────────────────────────────────────────────────


def run_and_save(folder: str, steps: int) -> list[float]:
    """Trains from what the folder has; saves its last step. Returns its losses."""
    stage, optimizer, mesh = build((2, 1, 2), seed=0)
    first = resume.newest(Path(folder)) or 0
    if first:
        state, _ = resume.load(Path(folder), first, CONFIG)
        resume.load_optimizer_state(optimizer, state, CONFIG, mesh)
    batches = [batch_of(seed) for seed in range(first, first + steps)]
    losses = [loss.item() for loss, _ in z.train(stage, optimizer, batches, 2)]
    keep = {"mesh": [2, 1, 2], "config": vars(CONFIG), "consumed": 0}
    resume.save(Path(folder), first + steps, optimizer, keep)
    masters = full_state(optimizer, mesh)["master"]
    return losses, {name: x.clone() for name, x in masters.items()}


def test_kill_and_resume_is_equal_to_the_bit(tmp_path):
    """The ranks are killed (SIGKILL) after three steps; new ones go on. Masters included."""
    pool = ranks.Pool(4)
    try:
        whole = pool.run(__name__, "run_and_save", dict(folder=str(tmp_path / "a"), steps=6))[0]
        begin = pool.run(__name__, "run_and_save", dict(folder=str(tmp_path / "b"), steps=3))[0]
        pool.close()
        rest = pool.run(__name__, "run_and_save", dict(folder=str(tmp_path / "b"), steps=3))[0]
    finally:
        pool.close()
    assert begin[0] + rest[0] == whole[0]
    for name, x in whole[1].items():
        assert torch.equal(rest[1][name], x), name


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="masters rebuilt from bf16 at resume: 16 bits are lost, the next losses look the same",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1359",
)
def test_masters_rebuilt_from_bf16():
    layout = (1, 1, 2)
    losses = {}
    masters = {}
    for rebuilt in (False, True):
        stage, optimizer, mesh = build(layout)
        list(z.train(stage, optimizer, [batch_of(0)] * 3, 2))
        state = full_state(optimizer, mesh)
        if rebuilt:
            for name, x in state["master"].items():
                state["master"][name] = x.bfloat16().float()
        stage, optimizer, mesh = build(layout, seed=3)
        resume.load_optimizer_state(optimizer, state, CONFIG, mesh)
        losses[rebuilt] = torch.stack(
            [loss for loss, _ in z.train(stage, optimizer, [batch_of(1)], 2)]
        )
        masters[rebuilt] = full_state(optimizer, mesh)["master"]
    assert torch.equal(losses[True], losses[False])  # the step after the resume sees nothing
    gap = max(
        (masters[True][name] - x).abs().max() / x.abs().max() for name, x in masters[False].items()
    )
    assert gap > 1e-4
    return Shows(loss=0.0, gradients=f"masters off by {100 * gap.item():.2g} %")


@pytest.mark.planted_bug(
    symptom="flat shards saved with their padding: at another dp elements move to their neighbours",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/5898",
)
def test_padding_in_the_checkpoint():
    """Two buckets of 7 and 5 elements, saved at dp = 2 and read at dp = 1."""
    buckets = [torch.arange(1.0, 8.0), torch.arange(8.0, 13.0)]
    file = []
    for x in buckets:
        padding = z.padded_length(len(x), 2) - len(x)
        file += [x, torch.zeros(padding)]
    lengths = [z.padded_length(len(x), 1) for x in buckets]
    first, second = torch.cat(file)[: sum(lengths)].split(lengths)
    assert torch.equal(first, buckets[0]) and not torch.equal(second, buckets[1])
    assert second[0] == 0  # the padding became a weight
    pieces = [{"start": 4, "master": buckets[0][4:]}, {"start": 0, "master": buckets[0][:4]}]
    joined = resume.join_pieces("a", pieces, torch.Size([7]))
    assert torch.equal(joined["master"], buckets[0])
    return Shows(loss=None, gradients="padding becomes weights")


# ── Refused ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2)
def test_a_missing_shard_is_refused():
    _, optimizer, mesh = build((1, 1, 2))
    states = everyone(resume.optimizer_state_dict(optimizer))
    with pytest.raises(ValueError, match="1 states of ranks, but the mesh is 1 × 1 × 2"):
        resume.merge_optimizer_states(states[:1], CONFIG, mesh)
    with pytest.raises(ValueError, match="is in no piece: lost a shard"):
        resume.merge_optimizer_states([states[0], {}], CONFIG, mesh)
    with pytest.raises(ValueError, match="is in two pieces: one shard twice"):
        resume.merge_optimizer_states([states[0], states[0]], CONFIG, mesh)


@pytest.mark.parametrize("starts", [(0, 0), (0, 2), (0, 3, 3)])
def test_an_element_in_two_pieces_is_refused(starts):
    """Also where every element is in some piece."""
    pieces = [{"start": start, "master": torch.zeros(4 - start)} for start in starts]
    with pytest.raises(ValueError, match="w: element [023] is in two pieces"):
        resume.join_pieces("w", pieces, torch.Size([4]))


@pytest.mark.ranks(2)
def test_another_model_is_refused_and_nothing_is_changed():
    _, optimizer, mesh = build((1, 1, 2))
    optimizer.step()
    state = full_state(optimizer, mesh)
    wrong = {key: dict(tensors) for key, tensors in state.items()}
    wrong["exp_avg"]["final_norm.bias"] = torch.ones(3)
    before = full_state(optimizer, mesh)
    with pytest.raises(ValueError, match="missing, unknown or of another shape"):
        resume.load_optimizer_state(optimizer, wrong, CONFIG, mesh)
    assert_same(full_state(optimizer, mesh), before)


def saved(folder: Path) -> z.DistributedOptimizer:
    stage = z.Stage(CONFIG, z.ParallelMesh())
    optimizer = z.make_training(stage, 1e-2)
    optimizer.step()
    keep = {"mesh": [1, 1, 1], "config": vars(CONFIG), "consumed": 7}
    resume.save(folder, 4, optimizer, keep)
    return optimizer


def test_files(tmp_path):
    """What is saved is loaded; unfinished folders, missing files and other models are not."""
    optimizer = saved(tmp_path)
    (tmp_path / "unfinished-9").mkdir()
    assert resume.newest(tmp_path) == 4 and resume.newest(tmp_path / "none") is None
    state, run = resume.load(tmp_path, 4, CONFIG)
    assert run["consumed"] == 7
    for piece in optimizer.pieces:
        assert torch.equal(state["master"][piece.name].flatten(), piece.master)
    with pytest.raises(ValueError, match="is of another model"):
        resume.load(tmp_path, 4, replace(CONFIG, num_layers=2))
    file = tmp_path / "step-4/rank-0.pt"
    kept = torch.load(file)
    torch.save(kept | {"mesh": [1, 1, 2]}, file)
    with pytest.raises(ValueError, match="rank-1.pt is missing"):
        resume.load(tmp_path, 4, CONFIG)


@pytest.mark.ranks(2)
def test_a_step_that_exists_and_frozen_parameters_are_refused_on_every_rank(tmp_path):
    """Before anything is written."""
    folder = Path(everyone(str(tmp_path))[0])
    keep = {"mesh": [1, 1, 2], "config": vars(CONFIG)}
    _, optimizer, mesh = build((1, 1, 2))
    resume.save(folder, 4, optimizer, keep)
    with pytest.raises(ValueError, match="step-4 exists: move it away, or save in another folder"):
        resume.save(folder, 4, optimizer, keep)
    stage = z.Stage(CONFIG, mesh).to(ranks.device)
    stage.embedding.requires_grad_(False)
    optimizer = z.make_training(stage, 1e-2)
    with pytest.raises(
        ValueError, match=r"trained parameters only, frozen: \['embedding.weight'\]"
    ):
        resume.save(folder, 5, optimizer, keep)
    assert [path.name for path in folder.iterdir()] == ["step-4"]
    with pytest.raises(OSError):
        resume.save(folder / "step-4/rank-0.pt", 5, build((1, 1, 2))[1], keep)  # in a file
    assert resume.load(folder, 4, CONFIG)[1]["mesh"] == [1, 1, 2]
    dist.barrier()  # the folder is rank 0's


def test_names_that_are_no_step_do_not_count(tmp_path):
    for name in ("step-1-old", "step-", "step-007", "step-+8", "step-٩", "step-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-10").write_text("a file")
    assert resume.newest(tmp_path) == 2


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_cut_file_is_named(size, tmp_path, monkeypatch, capsys):
    """And the command prints one line."""
    saved(tmp_path)
    first = tmp_path / "step-4/rank-0.pt"
    second = tmp_path / "step-4/rank-1.pt"
    torch.save(torch.load(first) | {"mesh": [1, 1, 2]}, first)
    whole = first.read_bytes()
    for file in (second, first):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file} is cut or damaged"):
            resume.load(tmp_path, 4, CONFIG)
    flags = ["--ranks", "1", "--checkpoint", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["resume.py", *flags])
    with pytest.raises(SystemExit) as stop:
        resume.flags()
    assert stop.value.code == 2
    assert f"error: {first} is cut or damaged" in capsys.readouterr().err.splitlines()[-1]


# ── Samples ─────────────────────────────────────────────────────────────────────────────────────


def test_the_papers_ramps():
    bloom = resume.RampupBatchSize(192, 16, 9_765_625, 2048)
    assert [bloom(0), bloom(9_765_624), bloom(9_765_625), bloom(10**9)] == [192, 2032, 2048, 2048]
    mt_nlg = resume.RampupBatchSize(32, 32, 5_859_375, 1920)
    assert [mt_nlg(0), mt_nlg(5_859_374), mt_nlg(5_859_375)] == [32, 1888, 1920]
    bloom.check(2, 8)
    mt_nlg.check(1, 8)


@settings(deadline=None, max_examples=100)
@given(consumed=st.integers(0, 2 * 10**7))
def test_ramp_and_rate_are_the_formulas(consumed):
    bloom = resume.RampupBatchSize(192, 16, 9_765_625, 2048)
    if consumed < 9_765_625:
        assert bloom(consumed) == tables.ramp(consumed, 192, 16, 9_765_625, 2048)
    assert bloom(consumed) <= bloom(consumed + 1000) and bloom(consumed) % 16 == 0
    bounds = (6e-5, 6e-6, 183_105, 200_000_000)
    rate = resume.learning_rate(consumed, *bounds)
    if consumed >= 183_105:
        assert rate == pytest.approx(tables.cosine(consumed, *bounds), rel=1e-12)
    else:
        assert rate == pytest.approx(6e-5 * consumed / 183_105, rel=1e-12)


def test_the_rate_stays_at_its_least():
    assert resume.learning_rate(10**9, 6e-5, 6e-6, 183_105, 200_000_000) == 6e-6
    found = resume.learning_rate(158_692_272, 6e-5, 6e-6, 183_105, 200_000_000)
    assert f"{found:.3e}" == "1.150e-05"  # as BLOOM's log says


@pytest.mark.planted_bug(
    symptom="a ramp counted in steps of full batches: it ends too early, and so does the schedule",
    seen_in="https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/2609",
)
def test_a_ramp_counted_in_steps():
    """BLOOM's ramp: as many steps as its samples make at the full batch."""
    ramp = resume.RampupBatchSize(192, 16, 9_765_625, 2048)
    steps = consumed = 0
    while ramp(consumed) < 2048:
        consumed += ramp(consumed)
        steps += 1
    wrong = 9_765_625 // 2048
    assert consumed >= 9_765_625 - 2048 and steps / wrong > 1.5
    return Shows(loss=f"ramp ends after {wrong:,} steps, not {steps:,}", gradients=None)


def test_a_ramp_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="the last step must reach the final size"):
        resume.RampupBatchSize(192, 16, 100, 2050)
    ramp = resume.RampupBatchSize(192, 16, 100, 2048)
    with pytest.raises(ValueError, match="increment=16 with micro_batch=4 on dp=8 replicas"):
        ramp.check(4, 8)
    with pytest.raises(ValueError, match="start=36 with micro_batch=4 on dp=8 replicas"):
        resume.RampupBatchSize(36, 32, 100, 100).check(4, 8)


# ── The command ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=120)
def test_the_command(tmp_path):
    """Ten steps at once, and five, and five on another mesh: the same losses within rounding."""
    folders = [everyone(str(tmp_path / name))[0] for name in ("a", "b")]
    whole = scripts.on_ranks(resume, "--checkpoint", folders[0])
    first = scripts.on_ranks(resume, "--checkpoint", folders[1], "--steps", 5)
    second = scripts.on_ranks(resume, "--checkpoint", folders[1], "--pp", 4)
    assert whole[0] == first[0] == second[0] == 0
    assert "goes on from step 5, saved on the mesh [2, 1, 2]" in second[1]

    def losses(text: str) -> list[float]:
        lines = [line.split() for line in text.splitlines()]
        return [float(line[4]) for line in lines if len(line) == 6 and line[0].isdigit()]

    found = losses(first[1]) + losses(second[1])
    assert len(found) == len(losses(whole[1])) == 10
    for here, there in zip(found, losses(whole[1])):
        assert here == pytest.approx(there, abs=1e-4)


@pytest.mark.slow
def test_the_command_starts_its_ranks(tmp_path):
    """Two processes; the file that they leave is found and loaded by the next start's flags."""
    flags = ["--ranks", "2", "--checkpoint", str(tmp_path), "--steps", "1", "--num-layers", "1"]
    done = scripts.forked(Path(resume.__file__), *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("step-1/*")) == ["rank-0.pt", "rank-1.pt"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--checkpoint DIR"),
        (["--checkpoint", "x", "--tp", "3"], "the product must be equal"),
        (["--checkpoint", "x", "--ramp-increment", "3"], "increment=3"),
        (["--checkpoint", "x", "--decay", "10"], "--decay 10 must be more"),
        (["--checkpoint", "x", "--num-heads", "3"], "num_heads=3"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["resume.py", "--ranks", "4", *flags])
    with pytest.raises(SystemExit) as stop:
        resume.flags()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
