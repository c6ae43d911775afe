# SPDX-License-Identifier: MIT-0
"""Chapter 9: every depth's loss equals the one on arrays shifted by hand, and ranks equal one.

A test marked `ranks` is what every rank of that world executes. References: each document by
itself, with arrays that get shorter from depth to depth; a loop over tokens for the Mamba layer,
and chapter 5's scan; plain PyTorch for the training loop.
"""

import inspect
import textwrap
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import mamba_hybrid as mh
import megatron_tp
import mtp as mt
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from torch import nn

SCRIPT = Path(mt.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)

# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def edited(function, *changes: tuple[str, str]):
    """A function of the chapter with some of its text changed, for planted bugs."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in it"
        source = source.replace(old, new)
    namespace = dict(vars(mt))
    exec(compile(source, f"<{function.__name__}, edited>", "exec"), namespace)
    return namespace[function.__name__]


def config(**changes) -> mt.HybridConfig:
    return replace(mt.check_case(1, ranks.device)[0], **changes)


def model_of(**changes) -> mt.HybridLM:
    """In float64, with norms whose weights are far from 1, and larger dt."""
    model = mt.HybridLM(config(**changes)).to(ranks.device, torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.3 + 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype))
            if name.endswith("dt_bias"):
                p.add_(5)  # larger steps: states and their gradients are not tiny
            if name.endswith("A_log"):
                p.sub_(3)
    return model


def documents(lengths=(5, 1, 7, 2, 3), seed=1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and targets of each; the last target of each does not count, nor do some others."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        tokens_L = torch.randint(61, (length,), generator=generator)
        targets_L = torch.cat([tokens_L[1:], torch.tensor([-100])])
        targets_L[:-1][torch.rand(length - 1, generator=generator) < 0.2] = -100
        found.append((tokens_L.to(ranks.device), targets_L.to(ranks.device)))
    return found


def packed(found: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Documents as one sequence (1, T), with their indices."""
    index = [torch.full_like(tokens_L, i) for i, (tokens_L, _) in enumerate(found)]
    tokens, targets = zip(*found)
    return tuple(torch.cat(x)[None] for x in (tokens, targets, index))


def by_hand(model: mt.HybridLM, found: list) -> torch.Tensor:
    """`HybridLM.loss` of each document alone; arrays get shorter by one token a depth."""
    depths = model.config.mtp_num_layers
    sums = [0.0] * (1 + depths)
    counts = [0] * (1 + depths)
    for tokens_L, targets_L in found:
        hidden = model.trunk(tokens_L[None], mt.Span())
        for k in range(1 + depths):
            if k:
                if len(tokens_L) <= k:
                    break
                block = model.mtp[0 if len(model.mtp) == 1 else k - 1]
                hidden = block(model.embedding(tokens_L[None, k:]), hidden[:, :-1], mt.Span())
            logits_LV = hidden[0] @ model.head.weight.T
            shifted = targets_L[k:]
            sums[k] = sums[k] + F.cross_entropy(
                logits_LV, shifted, reduction="sum", ignore_index=-100
            )
            counts[k] += int((shifted != -100).sum())
    means = [total / max(1, count) for total, count in zip(sums, counts)]
    total = means[0]
    if depths:
        total = total + model.config.mtp_loss_scaling_factor * sum(means[1:]) / depths
    return torch.stack([total, *means])


def loss_and_gradients(model: nn.Module, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses[0].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **grads}


@lru_cache
def reference() -> dict[str, torch.Tensor]:
    """By hand, of `documents()`."""
    model = model_of()
    return loss_and_gradients(model, by_hand(model, documents()))


def seen(**options) -> dict[str, torch.Tensor]:
    """By the chapter, of the same documents packed."""
    model = model_of(**options)
    return loss_and_gradients(model, model.loss(*packed(documents())))


def shows(here: dict, there: dict) -> Shows:
    """What the total loss and the gradients show of a bug."""
    gap = (here["losses"][0] / there["losses"][0] - 1).item()
    return Shows(gap, worst_of({n: here[n] for n in there if n != "losses"}, without(there)))


def without(found: dict) -> dict:
    return {name: x for name, x in found.items() if name != "losses"}


# ── Rolls ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_tables_of_section_1_1():
    tokens_1T = torch.tensor([[1, 2, 3, 4, 5, 6]])
    document_1T = torch.tensor([[0, 0, 0, 0, 1, 1]])
    is_last_1T = mt.last_of_documents(document_1T)
    assert is_last_1T.int().tolist() == [[0, 0, 0, 1, 0, 1]]
    once_1T = mt.roll_tensor(tokens_1T, is_last_1T)
    assert once_1T.tolist() == [[2, 3, 4, 0, 6, 0]]
    assert mt.roll_tensor(once_1T, is_last_1T).tolist() == [[3, 4, 0, 0, 0, 0]]
    assert mt.roll_tensor(tokens_1T, is_last_1T, -100).tolist() == [[2, 3, 4, -100, 6, -100]]


@EVERY_WORLD
def test_rolls_of_a_sharded_sequence():
    """Documents that end at a rank's last token, at its first, and that cover three ranks."""
    world = dist.get_world_size()
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    x_BT = torch.randint(1, 99, (5, 3 * world), generator=generator).to(ranks.device)
    starts_BT = torch.rand(x_BT.shape, generator=generator) < 0.3
    starts_BT[0] = False
    starts_BT[1, 2::3] = True
    starts_BT[2, ::3] = True
    document_BT = starts_BT.long().cumsum(1).to(ranks.device)
    is_last_BT = mt.last_of_documents(document_BT)
    is_last_Bt = mt.last_of_documents(document_BT.chunk(world, 1)[rank], dist.group.WORLD)
    assert torch.equal(is_last_Bt, is_last_BT.chunk(world, 1)[rank])
    x_Bt = x_BT.chunk(world, 1)[rank]
    for _ in range(3):
        x_BT = mt.roll_tensor(x_BT, is_last_BT, -100)
        x_Bt = mt.roll_tensor(x_Bt, is_last_Bt, -100, dist.group.WORLD)
        assert torch.equal(x_Bt, x_BT.chunk(world, 1)[rank])


@pytest.mark.ranks(2, 4)
def test_messages_of_the_rolls():
    """1 + 2 · depths all-gathers of an id per sequence and rank; the figure of section 1.1."""
    world = dist.get_world_size()
    x_Bt = torch.ones(8, 4, dtype=torch.int64, device=ranks.device)
    with megatron_tp.Counter() as counter:
        is_last_Bt = mt.last_of_documents(x_Bt, dist.group.WORLD)
        for _ in range(2):
            for _ in ("tokens", "targets"):
                mt.roll_tensor(x_Bt, is_last_Bt, 0, dist.group.WORLD)
    assert [message.op for message in counter.messages] == ["all_gather"] * 5
    total = sum(message.bytes for message in counter.messages)
    assert total == 5 * 8 * world * 8 and (world != 4 or total == 1280)


# ── The loss ──────────────────────────────────────────────────────────────────────────────────────


def test_packed_documents_equal_the_documents_one_by_one():
    """Losses and every gradient; documents shorter than the depths are among them."""
    assert_equal(seen(), reference(), 1e-12)


@pytest.mark.parametrize("changes", [{"mtp_use_repeated_layer": False}, {"mtp_num_layers": 4}])
def test_other_depths(changes):
    """A block for each depth, and more depths than the longest document but one has tokens."""
    model = model_of(**changes)
    assert len(model.mtp) == (2 if "mtp_use_repeated_layer" in changes else 1)
    expected = loss_and_gradients(model, by_hand(model, documents()))
    assert_equal(seen(**changes), expected, 1e-12)


def test_no_depth_is_the_base_loss():
    model = model_of(mtp_num_layers=0)
    tokens_BT, targets_BT, _ = packed(documents())
    logits_BVT = model(tokens_BT).mT
    base = F.cross_entropy(logits_BVT, targets_BT, ignore_index=-100)
    losses = model.loss(tokens_BT, targets_BT)
    assert len(model.mtp) == 0 and losses.shape == (2,)
    assert_equal({"loss": losses}, {"loss": base.expand(2)}, 1e-14)


def test_a_depth_without_targets_has_loss_zero():
    losses = model_of().loss(*packed(documents((2, 2, 1))))
    assert losses.isfinite().all() and losses[2] == losses[3] == 0 and losses[1] > 0
    nothing = model_of().loss(*packed(documents((1, 1))))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_the_weight_of_the_depths():
    """λ / depths of their sum; the example of section 1.3 for the counts is in another test."""
    losses = [torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 0.0]]), torch.tensor([[8.0, 0.0]])]
    targets = [torch.tensor([[5, 5]]), torch.tensor([[5, -100]]), torch.tensor([[5, -100]])]
    found = mt.process_mtp_loss(losses, targets, 0.3)
    assert torch.allclose(found, torch.tensor([2 + 0.3 / 2 * 12, 2.0, 4.0, 8.0]))


def test_bad_losses():
    """With fewer targets than losses one count would divide all of them."""
    losses = [torch.ones(2, 4)] * 3
    targets = [torch.zeros(2, 4, dtype=torch.long)] * 3
    for bad in (targets[:1], [x[:1] for x in targets]):
        with pytest.raises(ValueError, match="give each its targets"):
            mt.process_mtp_loss(losses, bad, 0.3)


def test_losses_in_bf16_are_summed_in_fp32():
    """2.09375 is the bf16 value of 2.1; a sum of 5000 in bf16 has 8 bits."""
    losses = [torch.full((1, 4999), 2.1, dtype=torch.bfloat16)]
    found = mt.process_mtp_loss(losses, [torch.zeros(1, 4999).long()], 0.3)
    assert found.dtype == torch.float32
    assert (found - losses[0][0, 0].item()).abs().max() < 1e-5


@pytest.mark.ranks(2)
def test_the_counts_of_section_1_3():
    """Rank 0 has 3 targets with loss 1, rank 1 one with loss 5: their mean is 2, and not 3."""
    rank = dist.get_rank()
    targets = [torch.full((1, 3), 7, device=ranks.device)]
    losses = [torch.ones(1, 3, device=ranks.device)]
    if rank:
        targets[0][0, 1:] = -100
        losses[0] = torch.tensor([[5.0, 0, 0]], device=ranks.device)
    partial = mt.process_mtp_loss(losses, targets, 0.3, dist.group.WORLD)
    dist.all_reduce(partial)
    assert partial.tolist() == [2.0, 2.0]


@EVERY_WORLD
def test_detached_heads():
    """The block's gradient stays, all others are those of λ = 0; on tp ranks as well."""
    world = dist.get_world_size()
    mesh = mt.make_mesh(world, 1, ranks.device)
    cases = {"free": {}, "detached": {"mtp_detach_heads": True}}
    cases["alone"] = {"mtp_loss_scaling_factor": 0.0}
    grads = {}
    for name, changes in cases.items():
        model = mt.ParallelHybridLM(config(**changes), mesh).to(ranks.device, torch.float64)
        grads[name] = without(loss_and_gradients(model, model.loss(*packed(documents((9, 5, 4))))))
    block = [name for name in grads["free"] if name.startswith("mtp")]
    rest = [name for name in grads["free"] if not name.startswith("mtp")]
    detached = grads["detached"]
    assert_equal({n: detached[n] for n in block}, {n: grads["free"][n] for n in block}, 1e-12)
    assert_equal({n: detached[n] for n in rest}, {n: grads["alone"][n] for n in rest}, 1e-12)
    for name in rest:
        assert not torch.allclose(grads["free"][name], grads["alone"][name], rtol=1e-3)


# ── Layers ────────────────────────────────────────────────────────────────────────────────────────


def test_the_scan_is_chapter_5s():
    generator = torch.Generator().manual_seed(2)
    X, B, C, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 7, 3, 4), (2, 7, 5), (2, 7, 5), (2, 3, 4, 5))
    )
    a = -torch.rand(2, 7, 3, generator=generator, dtype=torch.float64)
    a[:, 3] = -1000  # a document begins
    for initial in (None, state):
        y, last = mt.ssd(X, a, B, C, initial)
        expected = mh.ssd(X, a, B[:, :, None], C[:, :, None], 3, initial)
        assert_equal({"y": y, "state": last}, {"y": expected[0], "state": expected[1]}, 1e-13)
    one = mt.ssd(X[:, :1], a[:, :1], B[:, :1], C[:, :1], state)[1]
    step = a[:, :1].exp()[:, 0, :, None, None] * state
    step = step + X[:, 0, :, :, None] * B[:, 0, None, None]
    assert torch.allclose(one, step, rtol=1e-14)
    steep = a.clone().requires_grad_()
    mt.ssd(X, 900 * steep, B, C)[0].sum().backward()
    assert steep.grad.isfinite().all()


def test_a_mamba_layer_is_a_loop_over_tokens():
    """Two documents; each begins with a state and inputs of zero."""
    layer = mt.Mamba2Mixer(config(pattern="M")).double()
    for name, p in layer.named_parameters():
        draw = torch.Generator().manual_seed(len(name))
        p.data = torch.randn(p.shape, generator=draw, dtype=p.dtype) / 3
    x_BTD = torch.randn(1, 9, 16, dtype=torch.float64)
    document_BT = torch.tensor([[0] * 4 + [1] * 5])
    rows = []
    for x_TD in x_BTD[0].split([4, 5]):
        state = torch.zeros(2, 4, 6, dtype=torch.float64)
        inputs = [torch.zeros(20, dtype=torch.float64)] * 3
        for x_D in x_TD:
            z, u, dt = layer.in_proj(x_D).split([8, 20, 2])
            inputs = [*inputs[-3:], u]
            v = F.silu((torch.stack(inputs, 1) * layer.conv_weight).sum(1) + layer.conv_bias)
            x, B, C = v.split([8, 6, 6])
            dt = F.softplus(dt + layer.dt_bias)
            decay = (-dt * layer.A_log.exp()).exp()[:, None, None]
            state = decay * state + (dt[:, None] * x.view(2, 4))[..., None] * B
            y = (state @ C + layer.D[:, None] * x.view(2, 4)).flatten() * F.silu(z)
            y = y / (y.square().mean() + 1e-5).sqrt() * layer.norm.weight
            rows.append(layer.out_proj(y))
    found = layer(x_BTD, mt.Span(document_BT))
    assert_equal({"y": found[0]}, {"y": torch.stack(rows)}, 1e-12)


def test_attention_is_pytorchs():
    cfg = config(pattern="*")
    layer = mt.Attention(cfg).double()
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    q, k, v = layer.qkv.weight.chunk(3)
    x_BTD = torch.randn(1, 6, 16, dtype=torch.float64)
    document_BT = torch.tensor([[0, 0, 1, 1, 1, 2]])
    eye = torch.eye(8, dtype=torch.float64)
    theirs.in_proj_weight.data = torch.cat([eye, eye, eye])
    theirs.out_proj.weight.data = eye
    mask = torch.ones(6, 6).triu(1).bool() | (document_BT[0, :, None] != document_BT[0])
    expected, _ = theirs(x_BTD @ q.T, x_BTD @ k.T, x_BTD @ v.T, attn_mask=mask)
    found = layer(x_BTD, mt.Span(document_BT))
    assert_equal({"y": found}, {"y": expected @ layer.o_proj.weight.T}, 1e-12)


# ── Ranks equal one ───────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_every_layout_equals_the_single_device():
    """Losses, gradients, norms and weights, in five AdamW steps, as --check does."""
    layouts = {1: [(1, 1)], 2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 2), (4, 1), (1, 2), (1, 4)]}
    for layout in layouts[dist.get_world_size()]:
        mesh = mt.make_mesh(*layout, ranks.device)
        errors = mt.equivalence(mesh, ranks.device, torch.float64)
        assert mt.worst(errors) <= 1e-10, max(errors, key=errors.get)
        kinds = ("loss", "gradient", "norm", "weight")
        assert all(any(name.startswith(kind) for name in errors) for kind in kinds)


@pytest.mark.ranks(1, 4)
def test_training_against_plain_pytorch():
    """SGD with momentum and AdamW, each five steps with clipping; the loss by hand."""
    world = dist.get_world_size()
    mesh = mt.make_mesh(min(2, world), min(2, world), ranks.device)
    found = documents((5, 7, 8), seed=4)
    batch = packed(found)
    makes = {
        "AdamW": lambda ps: torch.optim.AdamW(ps, 1e-3, weight_decay=0.0),
        "SGD": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9),
    }
    for name, make in makes.items():
        plain = mt.HybridLM(config()).to(ranks.device, torch.float64)
        optimizer = make(plain.parameters())
        expected = []
        for _ in range(5):
            optimizer.zero_grad()
            losses = by_hand(plain, found)
            losses[0].backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            expected.append(torch.cat([losses.detach(), norm[None]]))
        model = mt.ParallelHybridLM(config(), mesh).to(ranks.device, torch.float64)
        steps = list(mt.train(model, make(model.parameters()), [batch] * 5, 0.5))
        seen = torch.stack([torch.cat([losses, norm[None]]) for losses, norm in steps])
        assert_equal({name: seen}, {name: torch.stack(expected)}, 1e-10)
        full = mt.gather_state_dict(model.state_dict(), 61, mesh.tp_group)
        assert_equal(full, {n: x.cpu() for n, x in plain.state_dict().items()}, 1e-10, 5e-3)


def test_weights_to_the_bit_over_any_number_of_ranks():
    full = model_of().state_dict()
    for tp in (1, 2, 3, 4):
        shards = [mt.shard_state_dict(full, rank, tp) for rank in range(tp)]
        assert {len(shard["head.weight"]) for shard in shards} == {-(-61 // tp)}
        merged = mt.merge_state_dicts(shards, 61)
        assert all(torch.equal(merged[name], full[name]) for name in full)
    shards[2]["mtp.0.eh_proj.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="mtp.0.eh_proj.weight should be replicated, but rank 2"):
        mt.merge_state_dicts(shards, 61)


def test_nan_on_one_rank_alone_is_a_difference():
    """On all ranks it is none: a model that has diverged can be gathered."""
    x, nan = torch.zeros(2), torch.full((2,), torch.nan)
    with pytest.raises(ValueError, match="norm.weight should be replicated, but rank 1"):
        mt.merge_state_dicts([{"norm.weight": x}, {"norm.weight": nan}], 61)
    assert mt.merge_state_dicts([{"norm.weight": nan}] * 2, 61)["norm.weight"].isnan().all()


@pytest.mark.ranks(2)
def test_a_run_is_reproducible_and_learns():
    """The script's demonstration, on ranks that are there: losses of all depths fall."""
    code, text = scripts.on_ranks(mt, "--steps", "12", "--seq-length", "32", "--batch", "4")
    assert code == 0
    if dist.get_rank() == 0:
        rows = [line.split() for line in text.splitlines() if line[:4].strip().isdigit()]
        assert len(rows) == 5
        assert all(float(a) > float(b) for a, b in zip(rows[0][1:5], rows[4][1:5]))
        assert "every gradient equals the single device's" in text and "FAILED" not in text


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_impossible_settings():
    cases = {
        "pattern='MX'": {"pattern": "MX"},
        "mtp_pattern=''": {"mtp_pattern": ""},
        "mtp_num_layers=-1: it must be at least 0": {"mtp_num_layers": -1},
        "conv_kernel=1: it must be at least 2": {"conv_kernel": 1},
        "state_size=0": {"state_size": 0},
        "mtp_loss_scaling_factor=-0.5": {"mtp_loss_scaling_factor": -0.5},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            config(**changes)


@pytest.mark.ranks(2)
def test_what_does_not_fit_raises_on_every_rank():
    with pytest.raises(ValueError, match="tp=3 times cp=1 does not divide the 2 ranks"):
        mt.make_mesh(3, 1, ranks.device)
    wide = mt.make_mesh(2, 1, ranks.device)
    long = mt.make_mesh(1, 2, ranks.device)
    tokens_BT = torch.zeros(3, 5, dtype=torch.int64, device=ranks.device)
    model = mt.ParallelHybridLM(config(), long).to(ranks.device)
    optimizer = mt.make_optimizer(model, 1e-3)
    with pytest.raises(ValueError, match="3 × 5 tokens do not divide over dp=1 and cp=2"):
        next(mt.train(model, optimizer, [(tokens_BT, tokens_BT)]))
    if ranks.device.type == "cpu":
        model = mt.ParallelHybridLM(config(), wide)
        with pytest.raises(ValueError, match=r"token id 61 is not in \[0, 61\)"):
            model.loss(tokens_BT + 61, tokens_BT)
        with pytest.raises(ValueError, match=r"token id 99 is not in \[0, 61\)"):
            model.loss(tokens_BT, tokens_BT + 99)
        # In a batch of all ranks, in the part of one: no rank may wait for the one that raises.
        tokens_BT = torch.zeros(2, 6, dtype=torch.int64)
        wrong_BT = tokens_BT.clone()
        wrong_BT[-1, -1] = 61
        model = mt.ParallelHybridLM(config(), mt.make_mesh(1, 1, ranks.device))
        for pair in ((wrong_BT, tokens_BT), (tokens_BT, wrong_BT)):
            with pytest.raises(ValueError, match=r"token id 61 is not in \[0, 61\)"):
                next(mt.train(model, optimizer, [pair]))


def test_an_unusable_text(tmp_path):
    short = tmp_path / "short.txt"
    short.write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="has 50 bytes: a tenth of it must be longer than 9"):
        mt.read_text(str(short), 9)
    with pytest.raises(ValueError, match="No such file, or not a regular one"):
        mt.read_text(str(tmp_path), 9)
    train, evaluation = mt.read_text("", 100)
    assert len(train) > 9 * len(evaluation) - 10 > 10_000 and int(train.max()) < 256


def test_the_script(monkeypatch, capsys):
    """A process of its own: the check. And a wrong flag in one line, before any rank starts."""
    run = scripts.forked(SCRIPT, "--ranks", "1", "--check")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1].startswith("worst ")
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--ranks", "2", "--tp", "4"])
    with pytest.raises(SystemExit) as stop:
        mt.flags()
    assert stop.value.code == 2
    message = "--tp 4 times --cp 1 does not divide the 2 ranks"
    assert message in capsys.readouterr().err.splitlines()[-1]


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.planted_bug(
    symptom="the last tokens of a document learn to predict another document's beginning",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1661",
)
def test_a_roll_over_the_whole_sequence():
    def last_of_sequence(document_Bt, group=None):
        return mt_last(torch.zeros_like(document_Bt), group)

    with plant(mt, "last_of_documents", last_of_sequence) as mt_last:
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="positions whose target was moved in from outside count",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/2417",
)
def test_a_mask_that_is_not_rolled_with_the_targets():
    """The targets move, but which of them count stays as it is for the trunk."""
    changed = edited(
        mt.HybridLM.loss,
        (
            "targets_BT = roll_tensor(targets_BT, is_last_BT, IGNORED, group)",
            "targets_BT = torch.where(targets[0] != IGNORED, "
            "roll_tensor(targets_BT.clamp(min=0), is_last_BT, 0, group), IGNORED)",
        ),
    )
    with plant(mt.HybridLM, "loss", changed):
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="depths weigh less, the shorter the documents are",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1532",
)
def test_all_depths_divided_by_the_trunks_count():
    changed = edited(mt.process_mtp_loss, ("counts.clamp(min=1)", "counts[0].clamp(min=1)"))
    with plant(mt, "process_mtp_loss", changed):
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="the loss of depth 1 falls to nearly 0: it copies the token that it reads", seen_in=None
)
def test_targets_that_are_not_rolled_make_a_copy_task():
    changed = edited(
        mt.HybridLM.loss,
        ("targets_BT = roll_tensor(targets_BT, is_last_BT, IGNORED, group)", "pass"),
    )
    last = {}
    for name, loss in {"right": mt.HybridLM.loss, "copies": changed}.items():
        model = model_of()
        batches = []
        for step in range(40):  # other random tokens in each step: only copying can be learned
            tokens_BT = torch.randint(
                61, (8, 33), generator=torch.Generator().manual_seed(step)
            ).to(ranks.device)
            batches.append((tokens_BT[:, :-1], tokens_BT[:, 1:]))
        with plant(mt.HybridLM, "loss", loss):
            *_, (losses, _) = mt.train(model, torch.optim.AdamW(model.parameters(), 0.03), batches)
        last[name] = losses[2].item()
    assert last["right"] > 3.9 and last["copies"] < 0.7 * last["right"], last
    with plant(mt.HybridLM, "loss", changed):
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="the same loss while the norm's weights are near 1, lower acceptance later",
    seen_in=None,
)
def test_the_state_before_the_final_norm():
    """`model_of` has norms with other weights: hnorm undoes a size, not these."""
    changed = edited(
        mt.HybridLM.loss,
        (
            "logits_BTV = self.logits(hidden_BTD)\n",
            "logits_BTV = self.logits(hidden_BTD)\n"
            "    hidden_BTD = hidden_BTD / self.final_norm.weight\n",
        ),
    )
    with plant(mt.HybridLM, "loss", changed):
        here = seen()
        fresh = mt.HybridLM(config()).to(ranks.device, torch.float64)
        same = fresh.loss(*packed(documents()))
    expected = by_hand(fresh, documents())
    assert torch.allclose(same, expected, rtol=1e-6)  # at the start nothing shows
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="the block's first tokens of a document see another document", seen_in=None
)
def test_a_block_that_does_not_know_the_documents():
    changed = edited(
        mt.HybridLM.loss,
        ("block(embedded_BTD, hidden_BTD, span)", "block(embedded_BTD, hidden_BTD, Span())"),
    )
    with plant(mt.HybridLM, "loss", changed):
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="depth 1 has nothing new to read; its loss is higher and plausible", seen_in=None
)
def test_the_token_of_the_trunk_in_place_of_the_next():
    changed = edited(
        mt.HybridLM.loss, ("tokens_BT = roll_tensor(tokens_BT, is_last_BT, 0, group)", "pass")
    )
    with plant(mt.HybridLM, "loss", changed):
        here = seen()
    assert_differs(here, reference())
    return shows(here, reference())


@pytest.mark.planted_bug(
    symptom="the output layer of a frozen trunk moves",
    seen_in="https://github.com/verl-project/verl/issues/6432",
)
def test_an_output_weight_that_is_not_detached():
    def forgotten(self, hidden_BTD, detach=False):
        return logits(self, hidden_BTD)

    expected = seen(mtp_detach_heads=True)
    with plant(mt.HybridLM, "logits", forgotten) as logits:
        here = seen(mtp_detach_heads=True)
    assert_differs({"w": here["head.weight"]}, {"w": expected["head.weight"]})
    return shows(here, expected)


def of_ranks(layout: tuple[int, int]) -> tuple[dict, dict]:
    """Losses and gradients of `check_case` on a layout, and on a single device."""
    mesh = mt.make_mesh(*layout, ranks.device)
    cfg, batch = mt.check_case(mesh.dp * mesh.cp * mesh.tp, ranks.device)
    found = []
    for model in (mt.ParallelHybridLM(cfg, mesh), mt.HybridLM(cfg)):
        model = model.to(ranks.device, torch.float64)
        steps = mt.train(model, torch.optim.SGD(model.parameters(), 0.0), [batch], 1e9)
        losses, _ = next(steps)
        grads = {n: p.grad for n, p in model.named_parameters()}
        if isinstance(model, mt.ParallelHybridLM):
            grads = mt.gather_state_dict(grads, cfg.vocab_size, mesh.tp_group)
        found.append({"losses": losses.cpu(), **{n: x.cpu() for n, x in grads.items()}})
    return tuple(found)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(symptom="the last token of each rank has a wrong target", seen_in=None)
def test_a_roll_without_the_next_ranks_token():
    def alone(first_B1, end, group=None):
        return torch.full_like(first_B1, end)

    with plant(mt, "from_next_rank", alone):
        here, there = of_ranks((1, 2))
    assert_differs(here, there)
    return shows(here, there)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="tokens of a replica with few targets count more than others",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/2417",
)
def test_counts_of_one_rank():
    def local(losses, targets, scaling_factor, group=None):
        return process(losses, targets, scaling_factor) / dist.get_world_size()

    with plant(mt, "process_mtp_loss", local) as process:
        mesh = mt.make_mesh(1, 1, ranks.device)
        cfg, batch = mt.check_case(2, ranks.device)
        batch[1][:2, 4:] = -100  # the first replica has few targets, the second many
        model = mt.ParallelHybridLM(cfg, mesh).to(ranks.device, torch.float64)
        part = mt.local_part(batch, mesh)
        partial = model.loss(*part).detach()
        dist.all_reduce(partial)
    plain = mt.HybridLM(cfg).to(ranks.device, torch.float64)
    expected = plain.loss(*batch).detach()
    assert_differs({"losses": partial}, {"losses": expected})
    return Shows((partial[0] / expected[0] - 1).item(), None)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="every weight below the output layer gets the gradient of one vocabulary shard",
    seen_in=None,
)
def test_no_operator_before_the_output_layer():
    def unsummed(self, hidden_BTD, detach=False):
        return mt.HybridLM.logits(self, hidden_BTD, detach)

    with plant(mt.ParallelHybridLM, "logits", unsummed):
        mesh = mt.make_mesh(2, 1, ranks.device)
        cfg, batch = mt.check_case(2, ranks.device)
        model = mt.ParallelHybridLM(cfg, mesh).to(ranks.device, torch.float64)
        here = loss_and_gradients(model, model.loss(*batch))
    plain = mt.HybridLM(cfg).to(ranks.device, torch.float64)
    there = loss_and_gradients(plain, plain.loss(*batch))
    names = [name for name in there if name not in mt.VOCABULARY]
    here = {name: here[name] for name in names}
    there = {name: there[name] for name in names}
    assert_equal({"losses": here["losses"]}, {"losses": there["losses"]})
    assert_differs(here, there)
    return shows(here, there)
