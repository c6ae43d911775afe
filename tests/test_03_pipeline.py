# SPDX-License-Identifier: MIT-0
"""Chapter 3 equals the single device: schedules as data, and what they execute.

A test marked `ranks` is what every rank of that world executes. References are the chapter's plain
model, PyTorch's own pipelines (for the order of operations), and the paper's tables.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import time
import weakref
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace

import pipeline as pl
import pipeline_tables as tables
import pytest
import ranks
import scripts
import timeline
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_tp import Counter
from pipeline import Op
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from schedule_proof import halves, take_turns, verify_programs
from torch import nn

SCRIPT = Path(pl.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)
FIRST_WEIGHT = -0.027654200792312622


# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> pl.GPTConfig:
    sizes = dict(vocab_size=61, seq_length=16, hidden_size=16, num_layers=4, num_heads=2)
    return pl.GPTConfig(**(sizes | changes))


def batch_of(rows=9, length=13, seed=1):
    """Tokens and targets of which rows count unequally: the first row's targets are mostly −100."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(61, (2, rows, length), generator=generator).to(
        ranks.device
    )
    targets_BS[0, 3:] = -100
    return tokens_BS, targets_BS


@lru_cache
def mesh_of(pp: int) -> pl.Mesh:
    return pl.make_mesh(pp, ranks.device)


def joined(tensors: dict, cfg: pl.GPTConfig, mesh: pl.Mesh) -> dict:
    """All stages' tensors, under the plain model's names."""
    return pl.gather_state_dict(tensors, cfg, mesh.pp_group)


def on_first_stage(tensors: dict, cfg: pl.GPTConfig, mesh: pl.Mesh) -> dict | None:
    """As `joined`, on the first rank of the pipeline; None on the others."""
    mine = {name: x.detach().cpu().numpy() for name, x in tensors.items()}
    shards = [mine] * mesh.pp
    if mesh.pp > 1:
        first = mesh.pp_rank == 0
        dist.gather_object(mine, shards if first else None, group=mesh.pp_group, group_dst=0)
        if not first:
            return None
    shards = [{name: torch.from_numpy(x) for name, x in shard.items()} for shard in shards]
    return pl.merge_state_dicts(shards, cfg)


def check_joined(tensors: dict, reference: dict, cfg: pl.GPTConfig, mesh: pl.Mesh, **options):
    """All stages' tensors are the plain model's: compared on the first rank of the pipeline."""
    full = on_first_stage(tensors, cfg, mesh)
    if full is not None:
        assert_equal(full, reference, **options)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


def stage_in_float64(cfg: pl.GPTConfig, mesh: pl.Mesh, chunks: int = 1) -> pl.PipelineStage:
    stage = pl.PipelineStage(cfg, mesh.pp_rank, mesh.pp, chunks)
    return stage.to(ranks.device, torch.float64)


def models(cfg: pl.GPTConfig, mesh: pl.Mesh, chunks: int = 1):
    plain = pl.GPT(cfg).to(ranks.device, torch.float64)
    return plain, stage_in_float64(cfg, mesh, chunks)


def program_of(kind: str, mesh: pl.Mesh, m: int, chunks: int = 1):
    return pl.programs(pl.schedule(kind, mesh.pp, m, chunks))[mesh.pp_rank]


def plain_loss_and_grads(cfg: pl.GPTConfig, tokens, targets):
    plain = pl.GPT(cfg).to(ranks.device, torch.float64)
    loss = plain.loss(tokens, targets).sum() / (targets != -100).sum()
    loss.backward()
    return loss.detach(), grads_of(plain)


@lru_cache
def reference_of(changes: tuple):
    """The plain model on `batch_of()`, whatever the schedule and m: computed once a process."""
    return plain_loss_and_grads(config(**dict(changes)), *batch_of())


@lru_cache
def stage_of(mesh: pl.Mesh, chunks: int, changes: tuple) -> pl.PipelineStage:
    """This rank's chunks, built once in each process: no test that takes them changes a weight."""
    return stage_in_float64(config(**dict(changes)), mesh, chunks)


def step_of(mesh: pl.Mesh, kind="1f1b", m=4, chunks=1, batch=None, program=None, **changes):
    """One step here and of the plain model of config(**changes).

    Returns: config, loss and stage with its gradients; the plain model's loss and gradients.
    """
    changes = tuple((dict(num_layers=mesh.pp * chunks + 1) | changes).items())  # unevenly placed
    cfg, (tokens, targets) = config(**dict(changes)), batch or batch_of()
    stage = stage_of(mesh, chunks, changes)
    stage.zero_grad()
    expected = plain_loss_and_grads(cfg, *batch) if batch else reference_of(changes)
    mine = [x.tensor_split(mesh.dp)[mesh.dp_rank] for x in (tokens, targets)]
    loss = pl.run_step(stage, program or program_of(kind, mesh, m, chunks), *mine, mesh)
    return cfg, loss, stage, *expected


def loss_and_grads(mesh: pl.Mesh, *arguments, **changes):
    """Loss and merged gradients of one step here, and of the plain model of config(**changes)."""
    cfg, loss, stage, *expected = step_of(mesh, *arguments, **changes)
    return loss, joined(grads_of(stage), cfg, mesh), *expected


def check_step(mesh: pl.Mesh, *arguments, **changes) -> None:
    """Loss and gradients of one step are the plain model's."""
    cfg, loss, stage, expected, reference = step_of(mesh, *arguments, **changes)
    assert_equal({"loss": loss}, {"loss": expected})
    check_joined(grads_of(stage), reference, cfg, mesh)


SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2)]
each_shape = pytest.mark.parametrize("kind, chunks", SHAPES, ids=lambda x: str(x))


# ── 2.1 to 2.4 Schedules as data ──────────────────────────────────────────────────────────────────


def every_schedule(stages: int, microbatches: int, chunks: int):
    for kind in pl.KINDS:
        fits = kind == "interleaved" and microbatches % stages == 0
        if fits or (kind != "interleaved" and chunks == 1):
            yield kind, pl.schedule(kind, stages, microbatches, chunks)


def times(f, b, v: int = 1) -> dict:
    """What an operation of a chunk takes, where a rank's forward and backward take f and b."""
    return {"F": Fraction(f) / v, "B": Fraction(b) / v}


def check_schedule(p: int, m: int, v: int) -> None:
    """Proven, its messages too; memory as the formula has it; the bubble exact, for any times."""
    for kind, table in every_schedule(p, m, v):
        held = [tables.in_flight(kind, p, m, v, rank) for rank in range(p)]
        assert pl.verify(table) == held, kind
        verify_programs(pl.programs(table))
        for f, b in ((1, 2), (1, 1), (Fraction(3, 7), 1)):
            assert pl.simulate(table, times(f, b)).bubble == tables.bubble(p, m, v), (kind, f, b)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_small_schedule_is_proven(stages):
    """Exhaustive: up to 4 stages, 8 micro-batches, 2 chunks."""
    for m in range(1, 9):
        for v in (1, 2):
            check_schedule(stages, m, v)


@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 8), m=st.integers(1, 32), v=st.integers(1, 4))
def test_larger_schedules_are_proven(p, m, v):
    check_schedule(p, m, v)
    check_schedule(p, -(-m // p) * p, v)  # and one that interleaving takes


def test_the_sheet_of_simulated_bubbles():
    """Figures worked out beforehand, of other sizes."""
    for kind, p, m, v, bubble, peaks in (
        ("1f1b", 4, 8, 1, 0.375, [4, 3, 2, 1]),
        ("1f1b", 8, 64, 1, 0.109375, [8, 7, 6, 5, 4, 3, 2, 1]),
        ("1f1b", 4, 2, 1, 1.5, [2, 2, 2, 1]),
        ("interleaved", 4, 8, 2, 0.1875, [11, 9, 7, 5]),
        ("interleaved", 8, 16, 2, 0.21875, [23, 21, 19, 17, 15, 13, 11, 9]),
        ("interleaved", 4, 16, 4, 0.046875, [19, 17, 15, 13]),
        ("gpipe", 4, 8, 1, 0.375, [8, 8, 8, 8]),
    ):
        table = pl.schedule(kind, p, m, v)
        assert pl.simulate(table).bubble == Fraction(bubble) and pl.verify(table) == peaks


def grouped(sizes, p: int, v: int) -> list:
    """Interleaving with groups of these sizes; (v − 1) of the first group run ahead."""
    ends = list(accumulate(sizes))
    groups = [range(end - size, end) for end, size in zip(ends, sizes)]
    table = []
    for rank in range(p):
        stages = range(rank, p * v, p)
        forwards = [Op("F", i, s) for group in groups for s in stages for i in group]
        backwards = [Op("B", i, s) for group in groups for s in reversed(stages) for i in group]
        ahead = [None] * (2 * (p - rank - 1) + (v - 1) * sizes[0])
        columns = zip_longest(forwards, ahead + backwards)
        table.append([op for column in columns for op in column if op])
    return table


def test_groups_of_other_sizes_than_p():
    """What section 1.1 says of them: a shorter last one costs time, a larger one memory."""
    assert grouped([4, 4], 4, 2) == pl.schedule("interleaved", 4, 8, 2)
    shorter = grouped([4, 2], 4, 2)
    pl.verify(shorter)
    alone = pl.simulate(pl.schedule("1f1b", 4, 6)).bubble
    assert pl.simulate(shorter).bubble == Fraction(19, 36) > alone == Fraction(18, 36)
    larger = grouped([6], 4, 2)
    assert pl.verify(larger)[0] == 12
    assert pl.simulate(larger).bubble == Fraction(1, 4)


def ahead_of(ahead, p: int, m: int, v: int = 1) -> list:
    """The table in which rank r runs ahead(r) forwards ahead, in the order of interleaving."""
    table = []
    for rank in range(p):
        forwards, backwards = (
            [
                Op(kind, i, stage)
                for first in range(0, m, p)
                for stage in range(rank, p * v, p)[::step]
                for i in range(first, first + p)
            ]
            for kind, step in (("F", 1), ("B", -1))
        )
        ops = forwards[: ahead(rank)]
        for k, backward in enumerate(backwards):
            ops += [*forwards[ahead(rank) + k : ahead(rank) + k + 1], backward]
        table.append(ops)
    return table


def test_why_so_many_forwards_go_ahead():
    """One less, and ranks wait for each other; the second p − rank − 1 hides messages."""
    assert ahead_of(lambda r: 3 - r, 4, 8) == pl.schedule("1f1b", 4, 8)
    less = ahead_of(lambda r: max(0, 2 - r), 4, 8)
    assert (
        pl.simulate(less).bubble
        == Fraction(5, 4)
        > Fraction(3, 8)
        == pl.simulate(pl.schedule("1f1b", 4, 8)).bubble
    )
    once, twice = ahead_of(lambda r: 3 - r + 4, 4, 8, 2), pl.schedule("interleaved", 4, 8, 2)
    assert pl.simulate(once).bubble == pl.simulate(twice).bubble and pl.verify(once) < pl.verify(
        twice
    )
    assert round(pl.simulate(once, times(1, 2, 2), Fraction(1, 10)).bubble, 2) == Fraction("0.31")
    assert round(pl.simulate(twice, times(1, 2, 2), Fraction(1, 10)).bubble, 2) == Fraction("0.25")


def test_all_forwards_first_is_no_faster_where_m_is_p():
    """All forwards first, where m = p, would cost memory and save nothing."""
    for p in (2, 4, 8):
        table = pl.schedule("interleaved", p, p, 2)
        forwards_first = [sorted(ops, key=lambda op: op.kind != "F") for ops in table]
        assert pl.simulate(forwards_first).length == pl.simulate(table).length
        assert pl.verify(forwards_first) == [2 * p] * p and sum(pl.verify(table)) < 2 * p * p


def test_four_batches_in_the_air_cost_nothing():
    """The executor with a program, simulated; with one batch at a time interleaving is slower."""
    for kind, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)):
        for p, m in ((2, 8), (4, 4), (4, 8), (8, 16)):
            table = pl.schedule(kind, p, m, v)
            four, one = (
                executed_length(pl.programs(table), dict(F=1, B=2), n)
                for n in (pl.Mailbox.IN_FLIGHT, 1)
            )
            ideal = pl.simulate(table).length
            assert four == ideal and (
                one == ideal or (kind == "interleaved" and p == 8 and one <= ideal + 6)
            )


def executed_length(programs: list, duration: dict, airborne: int) -> int:
    p = len(programs)
    stages = pl.stages_of([[s.op for s in program if s.op] for program in programs])
    posted, free, place = [[] for _ in programs], [0] * p, {}
    for rank, program in enumerate(programs):
        place |= {(rank, hop): k for k, step in enumerate(program) for hop in step.batch}

    def landed(rank: int, hops: tuple):
        """When all of `hops` have landed; None where an end of one has not been posted yet."""
        ends = [(r, place[r, hop]) for hop in hops for r in (hop.source, hop.target)]
        return (
            max(posted[r][k] for r, k in ends) if all(k < len(posted[r]) for r, k in ends) else None
        )

    def go(rank: int, step: pl.Step) -> bool:
        op, batch = step
        needed = [o for o in pl.needs(op, stages) if o.stage % p != rank] if op else []
        waits = [landed(rank, [pl.Hop(o.stage % p, rank, o)]) for o in needed]
        earlier = (
            [s.batch for s in programs[rank][: len(posted[rank])] if s.batch][-airborne:][:1]
            if batch
            else []
        )
        before = [landed(rank, hops) for hops in earlier]
        if None in waits + before:
            return False
        end = max([free[rank], *waits]) + (duration[op.kind] if op else 0)
        free[rank] = max([end, *before])
        posted[rank].append(free[rank])
        return True

    assert not take_turns(programs, go)
    return max(free)


def test_the_tick_that_section_1_3_shows():
    """Two neighbours post the same two messages as one batch."""
    programs = pl.programs(pl.schedule("1f1b", 4, 8))
    batch = [pl.Hop(1, 2, Op("F", 3, 1)), pl.Hop(2, 1, Op("B", 1, 2))]
    ops = [programs[rank][7].op for rank in (1, 2)]
    assert ops == [Op("F", 3, 1), Op("B", 1, 2)]
    for rank in (1, 2):
        assert [hop for hop in programs[rank][7].batch if hop.peer(rank) in (1, 2)] == batch


def test_sending_time_is_seen():
    table = pl.schedule("1f1b", 2, 1)
    assert pl.simulate(table, t_send=Fraction(1, 2)).length == 2 * 3 + 2 * Fraction(1, 2)


@pytest.mark.parametrize("p, m", [(2, 2), (2, 4), (4, 4), (4, 8), (4, 12)])
def test_the_order_is_what_pytorch_executes(p, m):
    """Operations of each rank, in order, as torch.distributed.pipelining runs them."""
    from torch.distributed.pipelining import schedules as theirs

    def executed(ours: list) -> list:
        return [[(op.kind, op.microbatch, op.stage // p) for op in ops] for ops in ours]

    class Stage:
        """What PyTorch's schedules want of a stage before they run."""

        def __init__(self, rank, index):
            self.group_rank, self.group_size, self.num_stages = rank, p, p * chunks
            self.stage_index, self.is_first, self.is_last = (
                index,
                index == 0,
                index == p * chunks - 1,
            )
            self.has_backward, self.device, self.group = True, torch.device("cpu"), None

        def __getattr__(self, name):
            return lambda *args, **kwargs: []

    for kind, chunks in (("interleaved", 2), ("interleaved", 3)):
        ours = executed(pl.schedule(kind, p, m, chunks))
        for rank in range(p):
            stages = [Stage(rank, chunk * p + rank) for chunk in range(chunks)]
            schedule = theirs.ScheduleInterleaved1F1B(stages, m, loss_fn=lambda *a: None)
            names = {"FORWARD": "F", "FULL_BACKWARD": "B"}
            actions = [a for a in schedule.pipeline_order[rank] if a is not None]
            there = [
                (names[a.computation_type.name], a.microbatch_index, a.stage_index // p)
                for a in actions
            ]
            assert there == ours[rank], (kind, rank)
    chunks = 1
    for kind, name in (("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")):
        for rank, ops in enumerate(executed(pl.schedule(kind, p, m))):
            assert order_executed(getattr(theirs, name), Stage(rank, rank), m) == [
                op[:2] for op in ops
            ], (kind, rank)


def order_executed(kind, stage, m: int) -> list:
    """Runs a single-stage schedule of PyTorch's over a stage that only takes notes."""
    notes = []
    stage.forward_one_chunk = lambda i, *args, **kwargs: notes.append(("F", i))
    stage.backward_one_chunk = lambda i, *args, **kwargs: notes.append(("B", i))
    schedule = kind(stage, m, loss_fn=lambda *args: None)
    for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        setattr(schedule, name, lambda *args: None)
    schedule._step_microbatches([()] * m, [{}] * m)
    return notes


# ── verify can fail ───────────────────────────────────────────────────────────────────────────────


def test_verify_refuses_what_is_wrong():
    table = pl.schedule("1f1b", 2, 2)
    swapped = [list(reversed(table[0])), table[1]]
    cases = {
        "rank 0: missing or unknown": [table[0][:-1], table[1]],
        "twice": [table[0] + table[0][:1], table[1]],
        "deadlock": swapped,
        "unknown are .*'X'": [[*table[0], Op("X", 0, 0)], [*table[1], Op("X", 0, 1)]],
        "unknown are .*'W'": timeline.zb_h1(2, 2),
        "at least one rank": [],
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            pl.verify(wrong)
    # Odd, and possible: both ends agree on the order of messages.
    pl.verify(
        [
            [Op("F", 0, 0), Op("F", 1, 0), Op("B", 1, 0), Op("B", 0, 0)],
            [Op("F", 1, 1), Op("B", 1, 1), Op("F", 0, 1), Op("B", 0, 1)],
        ]
    )


def test_verify_programs_refuses_what_is_wrong():
    def wrong(change):
        programs = pl.programs(pl.schedule("1f1b", 4, 8))
        change(programs)
        with pytest.raises(ValueError) as error:
            verify_programs(programs)
        return str(error.value)

    def order(programs):  # two messages in the other order, on one end
        places = [
            k for k, step in enumerate(programs[1]) if any(h.source == 0 for h in step.batch)
        ][:2]
        hops = [next(h for h in programs[1][k].batch if h.source == 0) for k in places]
        for k, old, new in zip(places, hops, reversed(hops)):
            programs[1][k] = programs[1][k]._replace(
                batch=[new if h == old else h for h in programs[1][k].batch]
            )

    def lost(programs):  # a receive that nobody posts
        programs[1][0] = programs[1][0]._replace(batch=[])

    def early(programs):  # sent before it is made
        programs[0][0], programs[0][1] = (
            programs[0][k]._replace(op=programs[0][1 - k].op) for k in (0, 1)
        )

    assert "one end lists" in wrong(order)
    assert "one end lists" in wrong(lost)
    assert "before it is made" in wrong(early)
    assert "deadlock" in wrong(
        lambda programs: programs.__setitem__(
            slice(None), [halves(p, r) for r, p in enumerate(programs)]
        )
    )


# ── Equivalence ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(1, 2, 4, timeout=120)
@pytest.mark.parametrize("tied", [True, False])
@each_shape
def test_gradients(kind, chunks, tied):
    """m from 1 to 8; the nine rows do not divide into micro-batches, so the last ones are shorter.

    An untied head is one more weight of the last stage, whatever m is: two of them do.
    """
    mesh = mesh_of(dist.get_world_size())
    for m in range(1, 9) if tied else (3, 8):
        if kind != "interleaved" or m % mesh.pp == 0:
            check_step(mesh, kind, m, chunks, untied=not tied)


@pytest.mark.ranks(4, timeout=120)
@pytest.mark.parametrize("tied", [True, False])
@each_shape
def test_pipeline_and_data_parallel_gradients(kind, chunks, tied):
    """2 stages × 2 replicas, which get unequal rows and unequal numbers of tokens that count."""
    mesh = mesh_of(2)
    assert (mesh.pp, mesh.dp) == (2, 2)
    for m in (1, 2, 3, 4) if tied else (3, 4):
        if kind != "interleaved" or m % 2 == 0:
            check_step(mesh, kind, m, chunks, untied=not tied)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8)


MAX_NORM = {"sgd": 1e9, "adamw": 0.1}


@lru_cache
def five_steps_alone(layers: int, kind: str) -> tuple[list, dict]:
    """The plain model, whatever the schedule: results and gradients of each step, its weights.

    Computed once a process; no test changes them.
    """
    plain = pl.GPT(config(num_layers=layers)).to(ranks.device, torch.float64)
    optimizer, steps = optimizer_of(kind, plain), []
    for step in range(5):
        tokens, targets = batch_of(seed=step)
        optimizer.zero_grad()
        loss = plain.loss(tokens, targets).sum() / (targets != -100).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM[kind])
        assert kind == "sgd" or norm > MAX_NORM[kind], "nothing was clipped"
        optimizer.step()
        steps.append(({"loss": loss.detach(), "norm": norm}, grads_of(plain)))
    return steps, plain.state_dict()


@EVERY_WORLD
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@each_shape
def test_five_steps(kind, chunks, optimizer):
    """Weights after five steps, and the norm before clipping: AdamW and clipping would hide it."""
    mesh = mesh_of(dist.get_world_size())
    cfg = config(num_layers=mesh.pp * chunks)
    steps, expected_weights = five_steps_alone(cfg.num_layers, optimizer)
    stage = stage_in_float64(cfg, mesh, chunks)
    ours = optimizer_of(optimizer, stage)
    for step, (expected, expected_grads) in enumerate(steps):
        ours.zero_grad()
        program = program_of(kind, mesh, 4, chunks)
        loss = pl.run_step(stage, program, *batch_of(seed=step), mesh)
        norm = pl.clip_grad_norm_(stage, MAX_NORM[optimizer], mesh.pp_group)
        ours.step()
        assert_equal({"loss": loss, "norm": norm}, expected)
        check_joined(grads_of(stage), expected_grads, cfg, mesh)
    floor = 5e-3 if optimizer == "adamw" else 0.0
    check_joined(stage.state_dict(), expected_weights, cfg, mesh, floor=floor)


def with_falling_rates(steps, optimizer: torch.optim.Optimizer):
    """Sets another learning rate after each step."""
    for step, result in enumerate(steps):
        yield result
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (step + 2)


def batches_of_13_rows() -> list:
    return [batch_of(rows=13, seed=step) for step in range(5)]


@lru_cache
def trained_alone() -> tuple[list, dict]:
    """The plain model's losses and norms, whatever the grid, and its weights after five steps."""
    plain = pl.GPT(config()).to(ranks.device, torch.float64)
    optimizer = pl.make_optimizer(plain, 1e-3)
    steps = pl.train_alone(plain, optimizer, batches_of_13_rows(), max_norm=0.1)
    return list(with_falling_rates(steps, optimizer)), plain.state_dict()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_training_on_every_grid(pp, recompute):
    """`train` and `train_alone` on 1×4, 2×2 and 4×1; afterwards replicas are equal to the bit."""
    cfg, mesh = config(), mesh_of(pp)
    alone, expected_weights = trained_alone()
    stage = stage_in_float64(cfg, mesh)
    optimizer, table = pl.make_optimizer(stage, 1e-3), pl.schedule("1f1b", pp, 3)
    options = dict(max_norm=0.1, recompute=recompute)
    steps = pl.train(stage, optimizer, table, batches_of_13_rows(), mesh, **options)
    here = with_falling_rates(steps, optimizer)
    for (expected, norm), (loss, norm_here) in zip(alone, here, strict=True):
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    check_joined(stage.state_dict(), expected_weights, cfg, mesh, floor=5e-3)
    every = [None] * mesh.dp
    own = torch.cat([p.detach().flatten().cpu() for p in stage.parameters()])
    dist.all_gather_object(every, own, mesh.dp_group)
    assert all(torch.equal(own, other) for other in every)


def test_without_a_process_group_there_is_one_rank():
    assert not dist.is_initialized()
    for kind, chunks in SHAPES:
        check_step(pl.Mesh(), kind, 4, chunks)


@pytest.mark.ranks(1, 2)
@each_shape
def test_gradients_do_not_depend_on_the_schedule(kind, chunks):
    """A chunk has its micro-batches in one order: gradients and losses are equal to the bit."""
    mesh = mesh_of(dist.get_world_size())
    first, here = (
        loss_and_grads(mesh, k, 4, c, num_layers=5) for k, c in (("gpipe", 1), (kind, chunks))
    )
    assert torch.equal(first[0], here[0])
    tied = {
        "embedding.weight"
    }  # head and embedding add into one tensor in an order that is the schedule's
    assert all(torch.equal(first[1][name], here[1][name]) for name in first[1].keys() - tied)


@pytest.mark.ranks(2, 4)
@each_shape
def test_evaluation_runs_the_forwards_alone(kind, chunks):
    mesh, cfg = mesh_of(dist.get_world_size()), config(num_layers=4 * chunks)
    plain, stage = models(cfg, mesh, chunks)
    tokens, targets = batch_of()
    forwards = [
        [op for op in ops if op.kind == "F"] for ops in pl.schedule(kind, mesh.pp, 4, chunks)
    ]
    with torch.no_grad(), Counter() as counter:
        loss = pl.run_step(stage, pl.programs(forwards)[mesh.pp_rank], tokens, targets, mesh)
    assert_equal(
        {"loss": loss}, {"loss": plain.loss(tokens, targets).sum() / (targets != -100).sum()}
    )
    sent = [m for m in counter.messages if m.op == "send"]
    assert len(sent) == 4 * (
        chunks - (mesh.pp_rank == mesh.pp - 1)
    )  # the last rank's last chunk sends nothing


@pytest.mark.ranks(2)
def test_autocast():
    """bf16 GEMMs, fp32 weights: gradients stay fp32, and are the plain model's under autocast."""
    cfg, mesh = config(), mesh_of(2)
    plain, stage = (
        pl.GPT(cfg).to(ranks.device),
        pl.PipelineStage(cfg, mesh.pp_rank, 2).to(ranks.device),
    )
    tokens, targets = batch_of()
    with torch.autocast(ranks.device.type, torch.bfloat16):
        expected = plain.loss(tokens, targets).sum() / (targets != -100).sum()
    expected.backward()
    for recompute in (False, True):
        stage.zero_grad()
        pl.run_step(
            stage,
            program_of("1f1b", mesh, 4),
            tokens,
            targets,
            mesh,
            autocast=torch.bfloat16,
            recompute=recompute,
        )
        # bf16 keeps 8 bits: sums over micro-batches are of rounded gradients. The single device
        # has no such sums.
        assert_equal(joined(grads_of(stage), cfg, mesh), grads_of(plain), bound=0.05)


@pytest.mark.ranks(2, timeout=120)
def test_compiled_layers():
    """torch.compile of each layer must not change a number."""
    cfg, mesh = config(num_layers=2), mesh_of(2)
    plain, stage = models(cfg, mesh)
    tokens, targets = batch_of(rows=4)
    (plain.loss(tokens, targets).sum() / (targets != -100).sum()).backward()
    for layer in stage.layers.values():
        layer.compile(backend="aot_eager")
    pl.run_step(stage, program_of("1f1b", mesh, 2), tokens, targets, mesh)
    assert_equal(joined(grads_of(stage), cfg, mesh), grads_of(plain))


# ── Dropout and recomputation ─────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind, chunks", [("1f1b", 1), ("interleaved", 2)])
def test_dropout_equals_the_plain_model_under_the_same_masks(kind, chunks, recompute):
    """The plain model, micro-batch by micro-batch, seeded as the executor seeds the stages."""
    mesh = mesh_of(dist.get_world_size())
    cfg = config(dropout=0.3, num_layers=mesh.pp * chunks + 1)
    plain, stage = models(cfg, mesh, chunks)
    tokens, targets = batch_of()
    program = program_of(kind, mesh, 4, chunks)
    loss = pl.run_step(stage, program, tokens, targets, mesh, recompute=recompute, seed=7, step=3)
    total = 0
    for i, (x, y) in enumerate(zip(tokens.tensor_split(4), targets.tensor_split(4))):
        pl.seed_dropout(plain, 7, 3 * 4 + i)
        part = plain.loss(x, y).sum() / (targets != -100).sum()
        part.backward()
        total = total + part.detach()
    assert_equal({"loss": loss}, {"loss": total})
    check_joined(grads_of(stage), grads_of(plain), cfg, mesh)


@pytest.mark.ranks(4)
def test_no_two_places_share_a_mask():
    """Layers, micro-batches, steps and replicas: all of them draw other masks."""
    mesh = mesh_of(2)
    stage = pl.PipelineStage(config(dropout=0.5, num_layers=4), mesh.pp_rank, 2).to(ranks.device)
    masks = []
    original = pl.Dropout.keep_mask

    def recorded(self, x):
        mask = original(self, x)
        masks.append(mask.flatten()[:200].tolist())
        return mask

    with plant(pl.Dropout, "keep_mask", recorded):
        for step in range(2):
            stage.zero_grad()
            rows = [x[:4] for x in batch_of()]
            pl.run_step(stage, program_of("1f1b", mesh, 4), *rows, mesh, step=step)
    every = [None] * 4
    dist.all_gather_object(every, masks)
    drawn = [tuple(mask) for own in every for mask in own]
    # 2 steps × 2 replicas × 4 micro-batches × (2 masks in each of 4 layers, 1 of the embedding)
    assert len(drawn) == 2 * 2 * 4 * 9
    assert len(set(drawn)) == len(drawn)


@pytest.mark.ranks(2)
def test_evaluation_has_no_dropout():
    mesh, losses = mesh_of(2), []
    for p in (0.0, 0.5):
        stage = pl.PipelineStage(config(dropout=p), mesh.pp_rank, 2).to(ranks.device).eval()
        with torch.no_grad():
            forwards = [[op for op in ops if op.kind == "F"] for ops in pl.schedule("1f1b", 2, 4)]
            program = pl.programs(forwards)[mesh.pp_rank]
            losses.append(pl.run_step(stage, program, *batch_of(), mesh))
    assert torch.equal(*losses)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_shape
def test_recomputation_is_equal_to_the_bit(kind, chunks, dropout):
    mesh, cfg, found = mesh_of(2), config(dropout=dropout), []
    for recompute in (False, True):
        _, stage = models(cfg, mesh, chunks)
        program = program_of(kind, mesh, 4, chunks)
        loss = pl.run_step(stage, program, *batch_of(), mesh, recompute=recompute, seed=7)
        found.append((loss, grads_of(stage)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


# ── Frozen parameters, empty batches, precision ───────────────────────────────────────────────────

FROZEN = {
    "positions": ["positions"],
    "embedding": ["embedding"],
    "both tables": ["embedding", "positions"],
    "the first stage": ["embedding", "positions", "layers.0", "layers.1", "layers.2"],
    "the last stage": ["final_norm", "embedding", "layers.3", "layers.4"],
    "a bias": ["layers.1.qkv.bias"],
    "all but the last layer": ["embedding", "positions", "final_norm"]
    + [f"layers.{i}" for i in range(4)],
}


def freeze(model: nn.Module, frozen: str) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(FROZEN[frozen])))


@lru_cache
def frozen_alone(frozen: str) -> tuple[list, nn.Module]:
    """Losses and norms of three steps of the plain model, and the model; no test changes it."""
    plain = pl.GPT(config(num_layers=5)).to(ranks.device, torch.float64)
    freeze(plain, frozen)
    batches = [batch_of(seed=step) for step in range(3)]
    steps = pl.train_alone(plain, pl.make_optimizer(plain, 1e-3), batches, max_norm=0.1)
    return list(steps), plain


@EVERY_WORLD
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, recompute):
    """Equal to `train_alone` with the same parameters frozen, whatever they are."""
    mesh = mesh_of(dist.get_world_size())
    cfg = config(num_layers=5)
    alone, plain = frozen_alone(frozen)
    stage = stage_in_float64(cfg, mesh)
    freeze(stage, frozen)
    batches = [batch_of(seed=step) for step in range(3)]
    table = pl.schedule("1f1b", mesh.pp, 4)
    optimizer = pl.make_optimizer(stage, 1e-3)
    here = pl.train(stage, optimizer, table, batches, mesh, 0.1, recompute=recompute)
    for (expected, norm), (loss, norm_here) in zip(alone, here, strict=True):
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    here, there = on_first_stage(stage.state_dict(), cfg, mesh), plain.state_dict()
    if here is None:
        return
    learns = {name for name, p in plain.named_parameters() if p.requires_grad}
    learnt = [{name: weights[name] for name in learns} for weights in (here, there)]
    assert_equal(*learnt, floor=3e-3)
    assert all(torch.equal(here[name], there[name].cpu()) for name in there.keys() - learns)


@pytest.mark.ranks(2, 4, timeout=120)
@pytest.mark.parametrize("learns_alone", [False, True])
@pytest.mark.parametrize("kind, chunks", [("1f1b", 1), ("interleaved", 2)])
def test_each_parameter_in_turn_is_frozen_or_learns_alone(kind, chunks, learns_alone):
    """Of each kind, in the first layer and the last: the plain model's gradients and no others."""
    mesh = mesh_of(dist.get_world_size())
    last = mesh.pp * chunks - 1
    cfg, batch = config(num_layers=last + 1), batch_of(rows=4)
    _, reference = plain_loss_and_grads(cfg, *batch)
    stage, program = stage_in_float64(cfg, mesh, chunks), program_of(kind, mesh, 4, chunks)
    ends = ("layers.0.", f"layers.{last}.", "embedding", "positions", "final_norm")
    for chosen in [name for name in reference if name.startswith(ends)]:
        stage.zero_grad()
        for name, p in stage.named_parameters():
            p.requires_grad_((name == chosen) == learns_alone)
        pl.run_step(stage, program, *batch, mesh)
        here = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        assert here.keys() == {name for name, p in stage.named_parameters() if p.requires_grad}
        assert_equal(here, {name: reference[name] for name in here})


@pytest.mark.ranks(1, 2)
def test_a_batch_in_which_no_target_counts():
    """Loss and gradients are 0, as `train_alone`'s, and not NaN."""
    mesh = mesh_of(dist.get_world_size())
    _, stage = models(config(), mesh)
    tokens, targets = batch_of()
    loss = pl.run_step(stage, program_of("1f1b", mesh, 4), tokens, targets * 0 - 100, mesh)
    assert loss == 0
    assert all(not p.grad.any() for p in stage.parameters())


def test_the_norm_of_bf16_gradients_is_fp32():
    """float64's of the same gradients: each is upcast before its squares are added up."""
    stage = pl.PipelineStage(config(num_layers=1)).to(torch.bfloat16)
    for p in stage.parameters():
        p.grad = torch.randn_like(p)
    exact = sum(p.grad.double().square().sum() for p in stage.parameters()).sqrt()
    norm = pl.clip_grad_norm_(stage, 1e9)
    assert norm.dtype == torch.float32
    assert_equal({"norm": norm.double()}, {"norm": exact}, bound=1e-6)  # fp32 sums, not bf16


def test_the_loss_of_bf16_logits_is_fp32():
    logits_BSV = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    targets_BS = torch.randint(50, (2, 3))
    loss_BS = pl.token_losses(logits_BSV, targets_BS)
    exact_BS = pl.token_losses(logits_BSV.double(), targets_BS)
    assert loss_BS.dtype == torch.float32
    assert_equal({"loss": loss_BS.double()}, {"loss": exact_BS}, bound=1e-6)  # fp32's rounding


@pytest.mark.ranks(2)
def test_what_is_sent_is_contiguous():
    """NCCL demands it, and gloo forgives: here a stage's output and gradient are transposed."""
    mesh = mesh_of(2)

    def demanding(calls):
        assert all(call.tensor.is_contiguous() for call in calls)
        return original(calls)

    def forward(self, x_BSH):
        return forward_of(self, x_BSH).mT.contiguous().mT

    with plant(dist, "batch_isend_irecv", demanding) as original:
        with plant(pl.Block, "forward", forward) as forward_of:
            check_step(mesh)


@pytest.mark.ranks(2)
def test_one_work_for_a_batch():
    """As NCCL: one operation for the batch, which is waited for once for each message."""
    mesh = mesh_of(2)

    def coalesced(calls):
        works = original(calls)

        def wait():
            for work in works:
                work.wait()
            works.clear()

        return [SimpleNamespace(wait=wait)]

    with plant(dist, "batch_isend_irecv", coalesced) as original:
        for kind, chunks in SHAPES:
            check_step(mesh, kind, 4, chunks)


@pytest.mark.ranks(2)
def test_the_oldest_batch_is_waited_for():
    """Of five batches the last four are in flight."""
    mesh, waited = mesh_of(2), []

    def recorded(calls):
        number = len(posted)
        posted.append(number)
        return [SimpleNamespace(wait=lambda: waited.append(number))] * len(calls)

    posted = []
    mailbox = pl.Mailbox(mesh, [(1,)] * 9, torch.float32, ranks.device)
    with plant(dist, "batch_isend_irecv", recorded):
        for i in range(5):
            mailbox.post([pl.Hop(1 - mesh.pp_rank, mesh.pp_rank, Op("F", i, 1 - mesh.pp_rank))])
    assert waited == [0]


# ── Memory and messages ───────────────────────────────────────────────────────────────────────────


class Token:
    """Lives as long as what it hangs on."""


@pytest.mark.ranks(4)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_what_is_held_at_once(kind, chunks, recompute):
    """As many graphs as the formula says, recomputed just one; no output outlives its message."""
    mesh, cfg = mesh_of(4), config(num_layers=4 * chunks)
    _, stage = models(cfg, mesh, chunks)
    graphs, outputs, most_graphs, most_outputs = [], [], [], []

    def forward(self, index, x):
        y = forward_of(self, index, x)
        if y.grad_fn is not None:
            y.grad_fn.metadata["token"] = token = Token()
            graphs.append(weakref.ref(token))
        outputs.append(weakref.ref(y.untyped_storage()))
        most_graphs.append(sum(ref() is not None for ref in graphs))
        most_outputs.append(sum(ref() is not None for ref in outputs))
        return y

    counted = []
    options = {"recompute": recompute, "held": counted}
    with plant(pl.PipelineStage, "forward", forward) as forward_of:
        pl.run_step(stage, program_of(kind, mesh, 8, chunks), *batch_of(), mesh, **options)
    held = tables.in_flight(kind, 4, 8, chunks, mesh.pp_rank)
    assert max(counted) == held  # what the demonstration claims
    assert max(most_graphs) == (1 if recompute else held)
    assert max(most_outputs) <= pl.Mailbox.IN_FLIGHT + 1


@pytest.mark.ranks(2, 4)
@each_shape
def test_messages(kind, chunks):
    """B·S·H of a micro-batch, once each way over each boundary; interleaved v times as many."""
    mesh, cfg, m = mesh_of(dist.get_world_size()), config(num_layers=4 * chunks), 4
    _, stage = models(cfg, mesh, chunks)
    tokens, targets = batch_of()
    with Counter() as counter:
        pl.run_step(stage, program_of(kind, mesh, m, chunks), tokens, targets, mesh)
    sent = [message.bytes for message in counter.messages if message.op == "send"]
    first, last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
    boundaries = (chunks - last) + (
        chunks - first
    )  # forward over the one to the next rank, backward to the last
    sizes = [len(x) * 13 * 16 * 8 for x in tokens.tensor_split(m)]
    assert sorted(sent) == sorted(sizes * boundaries)
    reductions = [message for message in counter.messages if message.op == "all_reduce"]
    assert len(reductions) == (1 + (first or last))  # the loss; the tied weight


@pytest.mark.ranks(4)
def test_replicas_are_summed_once_and_after_the_last_backward():
    mesh, cfg = mesh_of(2), config()
    _, stage = models(cfg, mesh)
    with Counter() as counter:
        pl.run_step(
            stage,
            program_of("1f1b", mesh, 4),
            *(x.tensor_split(2)[mesh.dp_rank] for x in batch_of()),
            mesh,
        )
    over_dp = [
        (k, m.bytes) for k, m in enumerate(counter.messages) if m.group == mesh.dp_group.group_name
    ]
    last_message = max(
        k for k, m in enumerate(counter.messages) if m.op in ("send", "recv_any_source", "recv")
    )
    sizes = [8 * p.numel() for p in stage.parameters()]
    assert [b for _, b in over_dp] == [8, *sizes, 8] and over_dp[1][0] > last_message


def rendezvous(messages: list) -> list:
    """batch_isend_irecv whose sends block until they are received; receives are posted first."""
    done, works = SimpleNamespace(wait=lambda: None), []
    for message in messages:
        peer = dict(group=message.group, group_src=message.group_peer)
        works.append(dist.irecv(message.tensor, **peer) if message.op is dist.irecv else done)
    for message in messages:
        if message.op is dist.isend:
            dist.send(message.tensor, group=message.group, group_dst=message.group_peer)
    return works


@pytest.mark.ranks(2, 4, timeout=120)
@each_shape
def test_blocking_sends(kind, chunks):
    """gloo's blocking send waits for its receive: whatever could deadlock does."""
    mesh = mesh_of(dist.get_world_size())
    with plant(dist, "batch_isend_irecv", rendezvous):
        for m in (1, 4, 5, 8):
            if kind != "interleaved" or m % mesh.pp == 0:
                check_step(mesh, kind, m, chunks)


@pytest.mark.ranks(4)
@each_shape
def test_the_trace_is_the_schedule(kind, chunks):
    """What ran, in order, is what was planned; nothing ran before what it needs."""
    mesh, cfg = mesh_of(4), config(num_layers=4 * chunks)
    _, stage = models(cfg, mesh, chunks)
    bars = []
    pl.run_step(stage, program_of(kind, mesh, 4, chunks), *batch_of(), mesh, bars=bars)
    table = pl.schedule(kind, 4, 4, chunks)
    assert [bar.op for bar in bars] == table[mesh.pp_rank]
    assert all(a.start <= a.end <= b.start for a, b in pairwise(bars))
    every = [None] * 4
    dist.all_gather_object(every, bars)
    end = {bar.op: bar.end for own in every for bar in own}
    for own in every:
        for bar in own:
            assert all(end[earlier] <= bar.start for earlier in pl.needs(bar.op, 4 * chunks))


# ── 3 Moving weights ──────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 6),
    tied=st.booleans(),
    first=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 1)]),
    second=st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)]),
)
def test_weights_survive_any_resharding(layers, tied, first, second):
    """Plain → p × v → plain → another p × v → plain, to the bit."""
    cfg = config(num_layers=layers, untied=not tied, hidden_size=4)
    whole = {name: torch.randn(shape) for name, shape in pl.parameter_shapes(cfg).items()}
    state = whole
    for p, v in (first, second):
        if p * v <= layers:
            state = pl.merge_state_dicts(
                [pl.shard_state_dict(state, cfg, r, p, v) for r in range(p)], cfg
            )
    assert list(state) == list(whole) and all(
        torch.equal(state[name], x) for name, x in whole.items()
    )


def test_weights_are_the_plain_models_whatever_the_cut():
    for tied in (True, False):
        cfg = config(untied=not tied, num_layers=8)
        whole = pl.GPT(cfg).state_dict()
        for p, v in ((1, 1), (2, 1), (2, 2), (4, 2), (8, 1)):
            stages = [pl.PipelineStage(cfg, rank, p, v).state_dict() for rank in range(p)]
            assert all(torch.equal(x, whole[name]) for stage in stages for name, x in stage.items())
            assert set().union(*stages) == set(whole)
            assert sum("embedding.weight" in stage for stage in stages) == (
                2 if tied and p > 1 else 1
            )


@given(layers=st.integers(1, 60), stages=st.integers(1, 20))
def test_placement(layers, stages):
    """Every layer once, in order, sizes one apart; the last has the fewest.

    The first has no more than the middle.
    """
    if layers < stages:
        with pytest.raises(ValueError, match="choose at most"):
            pl.place_layers(layers, stages)
        return
    cuts = pl.place_layers(layers, stages)
    assert [layer for cut in cuts for layer in cut] == list(range(layers))
    sizes = [len(cut) for cut in cuts]
    assert max(sizes) - min(sizes) <= 1 and sizes[-1] == layers // stages
    assert stages < 3 or sizes[0] <= max(sizes[1:-1])


# ── Planted bugs: what a missing safeguard looks like ─────────────────────────────────────────────


@pytest.mark.ranks(1, 2)
@pytest.mark.planted_bug(
    symptom="the loss is right to all digits; gradients are m times too large, which AdamW hides",
    seen_in="https://github.com/pytorch/torchtitan/issues/2972",
)
def test_loss_not_divided_by_the_micro_batches():
    """Each micro-batch divides by its own count, and the mean over micro-batches is printed."""
    mesh, m = mesh_of(dist.get_world_size()), 4
    batch = batch_of(rows=8)
    batch[1].clamp_(min=0)  # every token counts
    with plant(pl, "count_targets", lambda targets, group=None: (targets != -100).sum() // m):
        loss, grads, expected, reference = loss_and_grads(mesh, m=m, batch=batch)
    assert_equal({name: grad / m for name, grad in grads.items()}, reference)
    on_screen = assert_equal({"loss": loss / m}, {"loss": expected})
    return Shows(loss=on_screen, gradients=worst_of(grads, reference))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="gradients are m times too small, so clipping never bites; AdamW hides it",
    seen_in="https://github.com/areal-project/AReaL/pull/1273",
)
def test_loss_divided_twice():
    """The printed loss is that before the second division."""
    mesh, m = mesh_of(2), 4
    with plant(pl, "count_targets", lambda targets, group=None: (targets != -100).sum() * m):
        loss, grads, expected, reference = loss_and_grads(mesh, m=m)
    assert_equal({name: grad * m for name, grad in grads.items()}, reference)
    on_screen = assert_equal({"loss": loss * m}, {"loss": expected})
    return Shows(loss=on_screen, gradients=worst_of(grads, reference))


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="a mean of means: tokens of the replica that has fewer of them weigh more",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_each_replica_divides_by_its_own_count():
    mesh = mesh_of(2)
    with plant(pl, "count_targets", lambda targets, group=None: (targets != -100).sum() * mesh.dp):
        loss, grads, expected, reference = loss_and_grads(mesh)
    assert_differs(grads, reference, at_least=0.01)
    return Shows(
        loss=worst_of({"loss": loss}, {"loss": expected}), gradients=worst_of(grads, reference)
    )


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss falls; the tied weight's copies get different gradients and drift apart",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/299",
)
def test_tied_gradient_not_summed():
    """The loss after five steps, and the gradient of the first copy in the first step."""
    mesh, cfg = mesh_of(dist.get_world_size()), config()
    plain, stage = models(cfg, mesh)
    tokens, targets = batch_of()
    batches = [(tokens, targets)] * 5
    table = pl.schedule("1f1b", mesh.pp, 4)
    with plant(pl.PipelineStage, "tied_copies", lambda self: []):
        pl.run_step(stage, pl.programs(table)[mesh.pp_rank], tokens, targets, mesh)
        wrong = {
            name: grad.clone()
            for name, grad in grads_of(stage).items()
            if name == "embedding.weight"
        }
        stage.zero_grad()
        optimizer = pl.make_optimizer(stage, 1e-2)
        losses = [loss for loss, _ in pl.train(stage, optimizer, table, batches, mesh)]
    assert losses[-1] < losses[0]  # looks well
    with pytest.raises(ValueError, match="the copies of embedding.weight differ by"):
        joined(stage.state_dict(), cfg, mesh)
    reference = {name: plain_loss_and_grads(cfg, tokens, targets)[1][name] for name in wrong}
    *_, (alone, _) = pl.train_alone(plain, pl.make_optimizer(plain, 1e-2), batches)
    seen = worst_of(wrong, reference) if wrong else None  # ranks between the ends have no copy
    assert seen is None or seen > 0.1
    return Shows(loss=worst_of({"loss": losses[-1]}, {"loss": alone}), gradients=seen)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the tied weight counts twice in the norm, and clipping bites too early", seen_in=None
)
def test_norm_that_counts_the_tied_weight_twice():
    mesh = mesh_of(2)
    loss, grads, expected, reference = loss_and_grads(mesh)
    norm = nn.utils.get_total_norm(list(reference.values()))
    stage = stage_of(mesh, 1, (("num_layers", 3),))  # which has these gradients now
    assert_equal({"norm": pl.clip_grad_norm_(stage, 1e9, mesh.pp_group)}, {"norm": norm})
    with plant(pl.PipelineStage, "tied_copies", lambda self: []):
        wrong = pl.clip_grad_norm_(stage, 1e9, mesh.pp_group)
    assert_equal(
        {"n": wrong.square()}, {"n": norm.square() + reference["embedding.weight"].square().sum()}
    )
    assert wrong > 1.01 * norm
    assert_equal(grads, reference)
    seen = f"right; the norm is {100 * (wrong / norm - 1):.0f} % off"
    return Shows(loss=assert_equal({"loss": loss}, {"loss": expected}), gradients=seen)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="what was summed over replicas once is summed again at each later micro-batch",
    seen_in=None,
)
def test_replicas_summed_at_every_micro_batch():
    mesh = mesh_of(2)

    def eager(edge, grad):
        original(edge, grad)
        stage = stage_of(mesh, 1, (("num_layers", 3),))
        pl.sum_gradients(stage.parameters(), mesh.dp_group)

    with plant(torch.autograd, "backward", eager) as original:
        loss, grads, expected, reference = loss_and_grads(mesh, m=2)
    assert_differs(grads, reference, at_least=0.1)
    return Shows(
        loss=assert_equal({"loss": loss}, {"loss": expected}), gradients=worst_of(grads, reference)
    )


@pytest.mark.planted_bug(
    symptom="no gradient to send back, an error; with zeros instead, earlier stages never learn",
    seen_in=None,
)
def test_received_activation_without_requires_grad():
    """The stage has parameters of its own, so its output has a graph; its input has no gradient."""

    def take(self, op):
        value = take_of(self, op)
        if value is not None:
            value.requires_grad_ = lambda: value
        return value

    def put(self, op, value):
        missing = torch.zeros(self.shapes[op.microbatch], dtype=self.dtype)
        put_of(self, op, missing if value is None else value)

    with plant(pl.Mailbox, "take", take) as take_of:
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
            loss_and_grads(pl.Mesh(), "interleaved", 2, 2)
        with plant(pl.Mailbox, "put", put) as put_of:
            loss, grads, expected, reference = loss_and_grads(pl.Mesh(), "interleaved", 2, 2)
    assert not grads["positions.weight"].any() and grads["final_norm.weight"].any()
    return Shows(
        loss=assert_equal({"loss": loss}, {"loss": expected}), gradients=worst_of(grads, reference)
    )


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="messages are matched by order alone: ranks that count differently mix them up",
    seen_in=None,
)
def test_two_ranks_disagree_about_the_order_of_micro_batches():
    """Rank 1 calls 0 what rank 0 calls 1. Nothing hangs, shapes fit, `verify_programs` says it."""

    def renamed(program: list) -> list:
        def other(op: Op) -> Op:
            return op._replace(microbatch=(1, 0, 2, 3)[op.microbatch])

        batches = (sorted(hop._replace(op=other(hop.op)) for hop in step.batch) for step in program)
        return [pl.Step(step.op and other(step.op), batch) for step, batch in zip(program, batches)]

    programs, mesh = pl.programs(pl.schedule("1f1b", 2, 4)), mesh_of(2)
    wrong = [programs[0], renamed(programs[1])]
    with pytest.raises(ValueError, match="rank 0 to 1: one end lists"):
        verify_programs(wrong)
    loss, grads, expected, reference = loss_and_grads(
        mesh, batch=batch_of(rows=8), program=wrong[mesh.pp_rank]
    )
    assert_differs(grads, reference, at_least=0.1)
    return Shows(
        loss=worst_of({"loss": loss}, {"loss": expected}), gradients=worst_of(grads, reference)
    )


@pytest.mark.planted_bug(symptom="a deadlock, which verify finds without a process", seen_in=None)
def test_backward_through_the_first_chunk_first():
    table = pl.schedule("interleaved", 2, 4, 2)
    wrong = [
        [op._replace(stage=(op.stage + 2) % 4) if op.kind == "B" else op for op in ops]
        for ops in table
    ]
    with pytest.raises(ValueError, match="deadlock: the ranks wait at"):
        pl.verify(wrong)
    return Shows(loss="never comes: all wait", gradients=None)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="gradients belong to another network than the one that made the loss",
    seen_in="https://github.com/allenai/OLMo-core/issues/828",
)
def test_recomputation_with_another_mask():
    """Seeded before the forward alone: the recomputed one has the latest micro-batch's mask."""
    mesh, cfg, found = mesh_of(2), config(dropout=0.3), []

    def only_forward(model, seed, step, **place):
        if torch.is_grad_enabled():
            return  # recomputed; with recompute the forward itself keeps no graph
        seed_dropout(model, seed, step, **place)

    seed_dropout = pl.seed_dropout
    for seeding in (seed_dropout, only_forward):
        _, stage = models(cfg, mesh)
        program = program_of("gpipe", mesh, 4)
        with plant(pl, "seed_dropout", seeding):
            loss = pl.run_step(stage, program, *batch_of(), mesh, recompute=True, seed=7)
        found.append((loss, joined(grads_of(stage), cfg, mesh)))
    assert torch.equal(found[0][0], found[1][0])
    assert_differs(found[1][1], found[0][1], at_least=0.1)
    return Shows(loss=0.0, gradients=worst_of(found[1][1], found[0][1]))


def sends_first(path: str) -> None:
    """On two ranks: 1f1b in which each batch sends, then receives; after a second the stacks."""
    with open(f"{path}/{dist.get_rank()}", "w") as file:
        faulthandler.dump_traceback_later(1, file=file)
        programs = pl.programs(pl.schedule("1f1b", 2, 4))
        program = halves(programs[dist.get_rank()], dist.get_rank())
        with plant(dist, "batch_isend_irecv", rendezvous):
            loss_and_grads(mesh_of(2), program=program)


@pytest.mark.planted_bug(
    symptom="two neighbours stand in send, each waiting for the other's receive",
    seen_in="https://github.com/pytorch/pytorch/issues/172668",
)
def test_each_send_before_the_receive_of_its_pair(tmp_path):
    """Verify says so without a process; real ranks hang until their time is up."""
    programs = pl.programs(pl.schedule("1f1b", 2, 4))
    with pytest.raises(
        ValueError, match="deadlock: all wait for each other's batches: rank 0 in .* rank 1 in"
    ):
        verify_programs([halves(program, rank) for rank, program in enumerate(programs)])
    pool = ranks.Pool(2)
    try:
        pool.run(
            __name__, "reference_of", dict(changes=())
        )  # the ranks are there, and have imported all they need
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] silent"):
            pool.run(__name__, "sends_first", dict(path=str(tmp_path)), timeout=2)
    finally:
        pool.close()
    for rank in (0, 1):
        assert "in send\n" in (tmp_path / str(rank)).read_text()
    return Shows(loss="never comes: hangs", gradients=None)


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_schedules_that_cannot_be_are_refused():
    for arguments, message in (
        (("interleaved", 4, 6, 2), "microbatches=6 is no multiple of pp=4: choose 4"),
        (("interleaved", 4, 2, 2), "choose 4$"),
        (("1f1b", 2, 4, 2), "chunks=2: 1f1b has one chunk per rank"),
        (("1f1b", 0, 4), "pp=0, microbatches=4, chunks=1: each must be at least 1"),
        (("gpipe", 2, 0), "each must be at least 1"),
        (("fastest", 2, 2), "unknown: choose one of gpipe, 1f1b"),
    ):
        with pytest.raises(ValueError, match=message):
            pl.schedule(*arguments)


@pytest.mark.ranks(1, 2)
def test_targets_that_lack_a_row_are_refused_on_every_replica():
    """After the split only the last replica would have seen it."""
    mesh = mesh_of(1)
    _, stage = models(config(), mesh)
    tokens, targets = batch_of()
    table = pl.schedule("1f1b", 1, 1)
    batches = [(tokens, targets[:-1])]
    with pytest.raises(RuntimeError, match="equal size"):
        next(pl.train(stage, pl.make_optimizer(stage, 1.0), table, batches, mesh))


@pytest.mark.ranks(1, 2)
def test_what_does_not_fit_is_refused_on_every_rank():
    mesh, cfg = mesh_of(dist.get_world_size()), config()
    _, stage = models(cfg, mesh)
    tokens, targets = batch_of(rows=3)
    program = program_of("1f1b", mesh, 4)
    with pytest.raises(ValueError, match="a batch of 3 rows is too small for 4 micro-batches$"):
        pl.run_step(stage, program, tokens, targets, mesh)
    table = pl.schedule("1f1b", mesh.pp, 4)
    steps = pl.train(stage, pl.make_optimizer(stage, 1.0), table, [(tokens, targets)], mesh)
    with pytest.raises(ValueError, match="3 rows is too small for 4 micro-batches on 1 replicas"):
        next(steps)
    with pytest.raises(
        ValueError, match=r"\(., ., \[., .\]\), but the stage was built for \(., ., \[.\]\)"
    ):
        pl.run_step(stage, program_of("interleaved", mesh, 4, 2), *batch_of(), mesh)
    split = timeline.zb_h1(mesh.pp, 4)
    with pytest.raises(ValueError, match="unknown are .*'W'"):
        next(pl.train(stage, pl.make_optimizer(stage, 1.0), split, [batch_of()], mesh))
    with pytest.raises(ValueError, match="float64: the first stage takes token ids, int64"):
        pl.run_step(stage, program, batch_of()[0].double(), batch_of()[1], mesh)
    for targets in (batch_of()[1][:, :-1], batch_of()[1][:-1]):
        with pytest.raises(ValueError, match=r"targets are torch.Size.*, but tokens torch.Size"):
            pl.run_step(stage, program, batch_of()[0], targets, mesh)
    pl.run_step(stage, program, *batch_of(), mesh)
    with pytest.raises(ValueError, match="gradients of an earlier step are still there"):
        pl.run_step(stage, program, *batch_of(), mesh)
    with pytest.raises(ValueError, match="4 layers on 5 stages: choose at most 4"):
        pl.PipelineStage(cfg, 0, 5)
    with pytest.raises(ValueError, match="rank=2, ranks=2, chunks=1: no such stage"):
        pl.PipelineStage(cfg, 2, 2)
    with pytest.raises(ValueError, match="dropout=1"):
        pl.PipelineStage(config(dropout=1.0), 0, 2)
    with pytest.raises(ValueError, match="num_heads=0"):
        config(num_heads=0)
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        pl.GPT(cfg)(batch_of(length=17)[0])


@pytest.mark.ranks(2)
def test_a_boundary_of_another_type_is_refused_by_the_sender():
    """The sender checks what it sends: another shape or dtype is named, with both."""
    mesh = mesh_of(2)
    mailbox = pl.Mailbox(mesh, [(2, 3)], torch.float32, ranks.device)
    op = Op("F", 0, mesh.pp_rank)
    for x in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)):
        mailbox.put(op, x)
        with pytest.raises(ValueError, match="the receiver waits for"):
            mailbox.post([pl.Hop(mesh.pp_rank, 1 - mesh.pp_rank, op)])


@pytest.mark.ranks(2)
def test_a_peer_that_is_lost_before_the_next_message_is_named():
    """gloo may notice it while a message is posted, and not where one is waited for."""
    mesh = mesh_of(2)
    mailbox = pl.Mailbox(mesh, [(2, 3)], torch.float32, ranks.device)

    def broken(messages):
        raise RuntimeError("Connection closed by peer")

    with plant(dist, "batch_isend_irecv", broken):
        with pytest.raises(
            RuntimeError, match=r"rank (0 lost rank 1|1 lost rank 0) in \[Hop.*Connection closed"
        ):
            mailbox.post([pl.Hop(1 - mesh.pp_rank, mesh.pp_rank, Op("F", 0, 1 - mesh.pp_rank))])


def test_state_dicts_that_do_not_fit_are_refused_by_name():
    cfg = config()
    full = pl.GPT(cfg).state_dict()
    cases = {
        "final_norm.weight": {k: x for k, x in full.items() if k != "final_norm.weight"},
        r"head.weight', torch.Size\(\[1\]\)": full | {"head.weight": torch.zeros(1)},
        r"positions.weight', torch.Size\(\[4, 16\]\)": full
        | {"positions.weight": torch.zeros(4, 16)},
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=f"missing, unknown or of another shape.*{message}"):
            pl.shard_state_dict(state, cfg, 0, 2)
    shards = [pl.shard_state_dict(full, cfg, rank, 2) for rank in range(2)]
    with pytest.raises(ValueError, match="no rank has .'final_norm.bias'"):
        pl.merge_state_dicts(shards[:1], cfg)
    shards[1]["embedding.weight"] += 1
    with pytest.raises(ValueError, match="the copies of embedding.weight differ by 1.0e"):
        pl.merge_state_dicts(shards, cfg)


def test_weights_are_not_a_matter_of_the_process():
    """A parameter's values depend on seed and name: a fixed value, also under another hash seed."""
    first = pl.GPT(config()).layers["2"].up.weight[0, 0].item()
    assert first == pytest.approx(FIRST_WEIGHT, rel=1e-6)
    assert pl.GPT(config(seed=1)).layers["2"].up.weight[0, 0].item() != first
    assert pl.GPT(config()).layers["1"].up.weight[0, 0].item() != first


TAKES_A_GROUP = {
    "count_targets": lambda group: pl.count_targets(torch.ones(1, 2, dtype=torch.int64), group),
    "gather_state_dict": lambda group: pl.gather_state_dict(
        pl.GPT(config()).state_dict(), config(), group
    ),
    "sum_gradients": lambda group: pl.sum_gradients(with_gradients().parameters(), group),
    "clip_grad_norm_": lambda group: pl.clip_grad_norm_(with_gradients(), 1.0, group),
    "Mesh, pp": lambda group: pl.Mesh(pp_group=group),
    "Mesh, dp": lambda group: pl.Mesh(dp_group=group),
    "Mesh, tied": lambda group: pl.Mesh(tied_group=group),
}


def with_gradients() -> pl.PipelineStage:
    stage = pl.PipelineStage(config(num_layers=1))
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    return stage


@lru_cache
def group_of_rank_0():
    return dist.new_group([0])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", TAKES_A_GROUP)
def test_a_group_of_other_ranks_is_refused(name):
    """torch says that it has -1 ranks. A local value would be returned as the group's sum."""
    group = group_of_rank_0()
    if dist.get_rank() == 0:
        TAKES_A_GROUP[name](group)
        return
    with pytest.raises(ValueError, match="rank 1 is not in the process group"):
        TAKES_A_GROUP[name](group)


def mortal(rank: int, folder: str) -> None:
    """One of three ranks; the second kills itself in its third operation, the others write what
    they see."""
    torch.set_num_threads(1)
    options = dict(rank=rank, world_size=3, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    count, compute = [], pl.PipelineStage.forward

    def forward(self, *args):
        count.append(1)
        if rank == 1 and len(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *args)

    with plant(pl.PipelineStage, "forward", forward):
        try:
            loss_and_grads(pl.make_mesh(3, torch.device("cpu"), timeout=20), "gpipe", 6)
        except RuntimeError as error:
            Path(folder, f"seen by {rank}").write_text(str(error))


def test_a_rank_that_dies_is_named_by_its_neighbours(tmp_path):
    context, begin = multiprocessing.get_context("forkserver"), time.monotonic()
    processes = [
        context.Process(target=mortal, args=(rank, str(tmp_path)), daemon=True) for rank in range(3)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(40)
            assert process.exitcode is not None, "a rank outlives its lost neighbour"
    finally:
        for process in processes:
            process.kill()
    assert processes[1].exitcode == -signal.SIGKILL and time.monotonic() - begin < 40
    for rank in (0, 2):
        assert (
            f"pipeline rank {rank} lost rank 1 in [Hop("
            in (tmp_path / f"seen by {rank}").read_text()
        )


# ── Whole scripts ─────────────────────────────────────────────────────────────────────────────────


def run(*flags, timeout=120):
    return scripts.forked(SCRIPT, *flags, timeout=timeout)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pp", "3"], "--pp 3 must divide the 4 ranks"),
        (["--pp", "0"], "argument --pp: '0' must be of type int, from 1"),
        (["--microbatches", "0"], "argument --microbatches: '0' must be of type int, from 1"),
        (["--batch", "0"], "argument --batch: '0' must be of type int, from 1"),
        (["--chunks", "0"], "argument --chunks: '0' must be of type int, from 1"),
        (["--lr", "nan"], "argument --lr: 'nan' must be of type float"),
        (["--lr", "-1"], "argument --lr: '-1' must be of type float"),
        (["--lr", "inf"], "argument --lr: 'inf' must be of type float"),
        (["--dropout", "1"], "dropout=1.0: it must be at least 0"),
        (["--dropout", "nan"], "argument --dropout: 'nan' must be of type float"),
        (["--hidden-size", "30"], "the first must be a multiple of the second"),
        (["--num-layers", "3", "--pp", "4"], "3 layers on 4 stages: choose at most 3"),
        (["--schedule", "interleaved", "--chunks", "2", "--microbatches", "6"], "choose 4"),
        (["--batch", "7"], "need at least 8 rows"),
        (["--chunks", "2"], "1f1b has one chunk per rank"),
    ],
)
def test_a_wrong_flag_is_one_line_before_any_rank_starts(flags, message, monkeypatch, capsys):
    """`flags` runs before `launch` does."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit) as error:
        pl.flags()
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags", [[], ["--schedule", "interleaved", "--chunks", "2"]], ids=" ".join
)
@pytest.mark.parametrize("world", [*range(1, 10), 11, 12, 14, 16])
def test_defaults_fit_any_number_of_ranks(world, flags, monkeypatch):
    """4 stages where they divide the ranks; else the most that divide them and have layers."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", str(world), *flags])
    args = pl.flags()
    most = 8 // args.chunks
    assert world % args.pp == 0 and args.pp <= most
    assert args.pp == 4 or (world % 4 and all(world % pp for pp in range(args.pp + 1, most + 1)))
    assert (
        args.batch >= max(16, args.microbatches * world // args.pp)
        and args.microbatches == 2 * args.pp
    )


def test_fewer_layers_make_fewer_stages(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", "4", "--num-layers", "3"])
    assert pl.flags().pp == 2


def test_a_terminal_that_is_not_utf8(monkeypatch):
    """What it cannot show is replaced; nothing raises after the training."""
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    pl.flags()
    pl.say("pp 4 × dp 1")
    assert shown.buffer.getvalue() == b"pp 4 ? dp 1\n"


def test_without_docstrings(monkeypatch):
    """python -OO leaves none."""
    monkeypatch.setattr(pl, "__doc__", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert pl.flags().steps == 40


def test_a_rank_that_holds_too_much_fails_its_claim(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", "4", "--device", "cpu"])
    args = pl.flags()
    errors = dict.fromkeys(["gradient a", "norm before clipping 0", "weight after AdamW a"], 1e-15)
    for held, good in (([4, 3, 2, 1], True), ([4, 3, 2, 2], False), ([8, 8, 8, 8], False)):
        *_, (claim, paper, here, verdict) = pl.claims(args, errors, [0.0], held)
        assert claim == "activations that each rank holds at once, 1f1b"
        assert (paper, here, verdict) == ("[4, 3, 2, 1]", str(held), good)


TINY = ["--steps", "3", "--hidden-size", "32", "--seq-length", "32"]


@pytest.mark.ranks(4)
def test_a_whole_run():
    """Two stages × two replicas, interleaved, recomputed, with dropout: every flag together."""
    flags = ["--pp", "2", "--schedule", "interleaved", "--chunks", "2"]
    flags += ["--recompute", "--untied", "--dropout", "0.1"]
    code, printed = scripts.on_ranks(pl, *TINY, *flags)
    assert code == 0 and "pp 2 × dp 2" in printed
    assert "FAILED" not in printed and "verdict" in printed


@pytest.mark.ranks(2, detail=True)
def test_a_whole_run_with_torchs_checks_of_every_collective():
    code, printed = scripts.on_ranks(pl, *TINY)
    assert code == 0 and "pp 2 × dp 1" in printed
    assert "FAILED" not in printed and "verdict" in printed


@pytest.mark.slow
def test_a_whole_script():
    result = run(*TINY, "--ranks", "2")
    assert result.returncode == 0, result.stderr
    assert "pp 2 × dp 1" in result.stdout
    assert "FAILED" not in result.stdout and "verdict" in result.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has taken stderr
def test_a_whole_run_on_one_rank_stays_in_its_process(monkeypatch, capsys):
    """As under a debugger: nothing is started, and no process group is left behind."""
    flags, threads = (
        [*TINY, "--ranks", "1", "--schedule", "interleaved", "--chunks", "2"],
        torch.get_num_threads(),
    )
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    try:
        pl.launch(pl.main, pl.flags())
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "1 ranks: pp 1 × dp 1" in printed and "verdict" in printed and "FAILED" not in printed
    assert not dist.is_initialized()
