# SPDX-License-Identifier: MIT-0
"""Chapter 4's tables: formulas against the printed figures, dry runs, verdicts and the command."""

import dataclasses
import math
import re

import front_door
import megatron_tp as tp
import pytest
import ranks
import scripts
import seq_parallel as sp
import seq_parallel_tables as tables
import torch
import torch.distributed as dist
from proof import assert_equal, plant

SCRIPT = tables.__file__
MODELS = {model.name: model for model in tables.PAPER_MODELS}
SMALL = dataclasses.replace(MODELS["22B"], name="small", a=4, h=64, L=2, t=4)


@pytest.fixture(scope="module")
def runs():
    return {model.name: tables.paper_scale(model) for model in tables.PAPER_MODELS}


# ── Formulas ────────────────────────────────────────────────────────────────────────────────────


def test_table_2_in_units_of_sbh():
    """All six rows of the four published models."""
    for name, units in {
        "22B": (26.33, 13, 2, 17.58, 4.25, 0.25),
        "175B": (23, 13, 2, 14.25, 4.25, 0.25),
        "530B": (21, 13, 2, 12.25, 4.25, 0.25),
        "1T": (21, 13, 2, 12.25, 4.25, 0.25),
    }.items():
        model = MODELS[name]
        here = [tables.kept_bytes(model.config, model.t, mode) for mode in tables.MODES]
        assert [round(x / (2048 * model.h), 2) for x in here] == list(units)
        alone = [tables.tensor_parallel_bytes(model.config, 1, r) for r in sp.RECOMPUTE]
        core = 5 * model.a * 2048 / model.h
        assert [x / (2048 * model.h) for x in alone] == [34 + core, 34, 2]


def test_memory_of_the_published_models():
    """Of the first stage, and what the paper says about it, where it holds and where not."""
    both, tp_only = tables.BOTH, tables.TP_ONLY
    full = tables.Mode(False, "full")
    gigabytes = {}
    for name, model in MODELS.items():
        kept = [tables.first_stage_bytes(model, mode) / 1e9 for mode in (both, tp_only)]
        gigabytes[name] = tuple(round(x, 1) for x in kept)
    assert gigabytes == {
        "22B": (10.3, 63.6),
        "175B": (13.3, 71.8),
        "530B": (24.8, 122.4),
        "1T": (28.5, 140.9),
    }
    factors = []
    for model in MODELS.values():
        saved = tables.first_stage_bytes(model, tp_only) / tables.first_stage_bytes(model, both)
        factors.append(round(saved, 1))
    assert factors == [6.2, 5.4, 4.9, 4.9]  # "about five times"
    ranges = {
        tables.Mode(True, "none"): (58, 67),
        tables.Mode(False, "selective"): (49, 62),
        both: (16, 20),
        full: (8, 10),
    }
    for mode, (least, most) in ranges.items():  # of tensor parallelism's, in percent
        shares = []
        for model in MODELS.values():
            kept = tables.first_stage_bytes(model, mode)
            shares.append(round(100 * kept / tables.first_stage_bytes(model, tp_only)))
        assert (min(shares), max(shares)) == (least, most)
    core = [5 * MODELS[name].a * 2048 / MODELS[name].h for name in ("175B", "530B")]
    assert [round(100 * x / (34 + x)) for x in core] == [70, 65]
    small = MODELS["22B"]
    added = tables.extra_bytes(small)
    added /= tables.first_stage_bytes(small, tables.Mode(True, "none"))
    assert round(100 * added, 2) == 0.57  # not 0.01
    assert round(tables.stage_output_bytes(MODELS["530B"]) / 2**30, 2) == 2.73  # GiB


def test_utilization_of_the_published_models():
    """All eight cells of table 5; 22B's 1.10 s are rounded to half a percent, so its two are."""
    for name, model in MODELS.items():
        sizes = *model.sizes, tables.VOCAB
        end = model.seconds, model.gpus
        mfu = 100 * tables.utilization(tables.model_flops(*sizes), *end)
        hfu = 100 * tables.utilization(tables.hardware_flops(*sizes), *end)
        bound = 0.005 / 1.10 if name == "22B" else 0.001
        assert abs(mfu / model.mfu - 1) < bound + 0.05 / model.mfu, name
        assert abs(hfu / model.hfu - 1) < bound + 0.05 / model.hfu, name
    gains = [round(100 * (m.seconds_full / m.seconds - 1)) for m in MODELS.values()]
    assert gains == [29, 32, 30, 32]


def test_the_papers_hardware_flops_count_attention_twice():
    """Its equation adds what core attention costs forward and backward; computed once more is a
    third of that. (PyTorch counts what runs again: test_the_operations_that_run_again.)"""
    corrected, found = [42.4, 51.8, 56.4, 56.5], []
    for model, hfu in zip(MODELS.values(), corrected):
        added = tables.recomputed_flops(*model.sizes)
        right = tables.model_flops(*model.sizes, tables.VOCAB) + added
        factor = 1 + 2 * 2048 / (9 * model.h) + 51_200 / (12 * model.h * model.L)
        two_ninths = 72 * model.batch * model.L * 2048 * model.h**2 * factor
        assert math.isclose(right, two_ninths, rel_tol=1e-12)
        assert round(100 * tables.utilization(right, model.seconds, model.gpus), 1) == hfu
    for model in MODELS.values():
        flops = tables.model_flops(*model.sizes, tables.VOCAB)
        added = tables.hardware_flops(*model.sizes, tables.VOCAB) - flops
        once_more = tables.recomputed_flops(*model.sizes)
        assert math.isclose(added, 3 * once_more, rel_tol=1e-12)
        found.append([round(100 * x / flops, 1) for x in (added, once_more)])
    assert found[1:3] == [[2.7, 0.9], [1.6, 0.5]]  # 175B and 530B: the paper says 2.7 and 1.6
    assert found[0] == [5.2, 1.7]  # 22B, whose layer takes 7 % more time


def test_wire_bytes():
    """In a ring an all-reduce of t ranks sends 2·(t − 1)/t of its size, the others half of it."""
    message = sp.Message("all_reduce", 64, "")
    assert tables.wire_bytes([message], 4) == 96
    assert tables.wire_bytes([message._replace(op="all_gather_base")] * 2, 4) == 96


# ── The comparison ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2, 4)
def test_the_layer_of_tensor_parallelism_is_chapter_2s():
    """The same output, gradients and messages as chapter 2's own layer, with its weights."""
    cfg = sp.GPTConfig(hidden_size=32, num_heads=4, seq_length=16)
    group = dist.group.WORLD
    ours = tables.TensorParallelLayer(cfg).to(ranks.device, torch.float64)
    theirs = tp.Block(cfg, tp.ColumnParallelLinear, tp.RowParallelLinear)
    theirs = theirs.to(ranks.device, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    x_BSH = torch.randn(3, 16, 32, dtype=torch.float64, generator=generator).to(ranks.device)
    found, sizes = [], []
    for layer, x in ((ours, x_BSH.transpose(0, 1)), (theirs, x_BSH)):
        x = x.clone().requires_grad_()
        with sp.Counter() as counter:
            y = layer(x)
            y.square().sum().backward()
        grads = {f"grad {name}": p.grad for name, p in layer.named_parameters()}
        found.append({"y": y, "x": x.grad, **grads})
        sizes.append([(m.op, m.bytes) for m in counter.messages])
    for name in ("y", "x"):
        found[1][name] = found[1][name].transpose(0, 1)
    assert_equal(*found)
    assert sizes[0] == sizes[1] == [("all_reduce", 16 * 3 * 32 * 8)] * 4
    assert dist.get_world_size(group) > 1


# ── Dry runs ────────────────────────────────────────────────────────────────────────────────────


def test_published_layers_on_simulated_ranks(runs):
    """Full size, through the chapter's code: bytes within 0.02 %, messages, volume, operations."""
    for name, model in MODELS.items():
        costs = runs[name]
        size = 2 * tables.SEQUENCE * model.micro_batch * model.h
        forward = tables.model_flops(model.micro_batch, tables.SEQUENCE, model.h, 1, 0) / 3
        assert all(0 <= cost.kept / cost.formula - 1 < 2e-4 for cost in costs)
        assert [cost.wire / size * 8 / 7 for cost in costs] == [8, 8, 12, 10, 10, 14]
        assert [len(cost.messages) for cost in costs] == [4, 4, 6, 10, 10, 14]
        layer = model.micro_batch, tables.SEQUENCE, model.h, 1
        again = tables.recomputed_flops(*layer, gemms=1)
        flops = [3 * forward, 3 * forward + again, 4 * forward] * 2
        assert [cost.flops * 8 for cost in costs] == pytest.approx(flops, rel=1e-12)


def test_a_dry_run_counts_what_this_chapter_does():
    """A gather too many, and an input that is kept twice, show in the counts."""
    right = tables.paper_scale(SMALL)
    assert len(right) == 6
    once = sp.reduce_scatter_to_sp
    again = sp.gather_from_sp
    with plant(sp, "reduce_scatter_to_sp", lambda x, group=None: once(again(once(x, group)))):
        wrong = tables.paper_scale(SMALL)
    gathers = [len(cost.messages) for cost in wrong]
    assert gathers[:3] == [4, 4, 6]
    assert gathers[3:] > [len(cost.messages) for cost in right][3:]


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_a_dry_run_leaves_nothing(level):
    """No process group, and torch's debug level as it was; also after one that failed."""
    before = dist.get_debug_level()
    wanted = getattr(dist.DebugLevel, level)
    dist.set_debug_level(wanted)
    try:
        first = [cost.kept for cost in tables.paper_scale(SMALL)]
        with pytest.raises(ValueError, match="num_heads=4"):
            tables.paper_scale(dataclasses.replace(SMALL, t=3))
        assert not dist.is_initialized()
        assert dist.get_debug_level() == wanted
        assert [cost.kept for cost in tables.paper_scale(SMALL)] == first
    finally:
        dist.set_debug_level(before)


@pytest.mark.ranks(2)
def test_a_dry_run_refuses_a_process_with_a_group():
    """A process has one world: the error says so, and the world still works."""
    with pytest.raises(RuntimeError, match="a process group of 2 ranks.*a process of its own"):
        tables.paper_scale(SMALL)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2


# ── Verdicts ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row, verdict",
    [
        (tables.Row("agrees", "1", "1", "1"), "ok"),
        (tables.Row("the formula is wrong", "1", "2", "1"), "FAILED"),
        (tables.Row("the code is wrong", "–", "1", "2"), "FAILED"),
        (tables.Row("disagrees, and says why", "1", "2", note="because"), "because"),
        (tables.Row("agrees, and says why not", "1", "1", note="because"), "FAILED"),
        (tables.Row("nothing to compare", "1"), "FAILED"),
        (tables.Row("needs a machine", "1", note="needs 8 GPUs"), "needs 8 GPUs"),
        (tables.rounded("equal", 50.0, 50.04, 0.0), "ok"),
        (tables.rounded("near", 50.0, 50.3, 0.3), "within the rounding of the printed seconds"),
        (tables.rounded("far", 50.0, 50.4, 0.3), "FAILED"),
    ],
    ids=lambda value: value.claim if isinstance(value, tables.Row) else "",
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict


def test_a_wrong_formula_or_layer_fails(runs):
    def verdicts(runs):
        rows = [*tables.ledger_table(runs), *tables.table_2(runs), *tables.memory_saved()]
        rows += [*tables.messages(runs), *tables.table_5(), *tables.operations(runs)]
        return [row.verdict for row in rows]

    assert "FAILED" not in verdicts(runs)
    for name in ("model_flops", "hardware_flops", "recomputed_flops"):
        right = getattr(tables, name)
        wrong = plant(
            tables, name, lambda *args, right=right, **keywords: 1.1 * right(*args, **keywords)
        )
        with wrong:
            assert "FAILED" in verdicts(runs), name
    right = tables.stage_output_bytes
    with plant(tables, "stage_output_bytes", lambda model: right(model) / 2):
        assert "FAILED" in verdicts(runs)
    for field in ("kept", "formula", "wire", "flops"):
        costs = []
        for cost in runs["22B"]:
            scale = 1.1 if cost.mode.recompute == "none" else 1
            costs.append(dataclasses.replace(cost, **{field: getattr(cost, field) * scale}))
        assert "FAILED" in verdicts(runs | {"22B": costs}), field
    costs = list(runs["22B"])
    saved = {name: 1.1 * size for name, size in costs[3].saved.items()}
    costs[3] = dataclasses.replace(costs[3], saved=saved)
    assert verdicts(runs | {"22B": costs}).count("FAILED") >= 14


def test_a_failed_row_is_the_exit_code(capsys):
    rows = {"A table": [tables.Row("right", "1", "1")], "Another": [tables.Row("wrong", "1", "2")]}
    with plant(tables, "tables", lambda: rows), pytest.raises(SystemExit) as end:
        tables.main()
    assert end.value.code == 1
    assert re.search(r"^wrong +1 +2 +– +FAILED$", capsys.readouterr().out, re.MULTILINE)
    del rows["Another"]
    with plant(tables, "tables", lambda: rows):
        assert tables.main() is None


@pytest.mark.slow
def test_the_whole_script(monkeypatch):
    """As a reader runs it, with the variable that people set when something hangs; ASCII output."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = scripts.forked(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    found = front_door.tables(done.stdout)
    assert len(found) == 6
    rows = [row for table in found for row in table["rows"]]
    assert len(rows) == 75
    assert sum(row[-1] == "ok" for row in rows) >= 55


def test_a_wrong_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [SCRIPT, "--paper-scale", "1T"])
    with pytest.raises(SystemExit, match="2"):
        tables.flags()
    assert "unrecognized arguments" in capsys.readouterr().err.splitlines()[-1]
