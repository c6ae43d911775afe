# SPDX-License-Identifier: MIT-0
"""Chapter 3. Pipeline parallelism: one model split between its layers, and the schedule as data.

Paper: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM (PTD-P:
       pipeline, tensor and data parallelism), Narayanan et al., 2021, arXiv 2104.04473

The problem. Tensor parallelism (chapter 2) communicates four times in every layer, so it stays
inside one server, whose GPUs are eight. A model of a trillion parameters needs 64 such servers.
Split *between* layers, a rank sends one tensor per piece of the batch (a micro-batch), but it must
wait for the tensor that it receives.

The idea. Split the stack of layers into p stages and the batch into m micro-batches, which pass
through the stages one after another. With p = 4 and m = 8 the schedule 1F1B (one forward, one
backward) runs like this. A digit is a micro-batch, ─ its forward, ═ its backward:

    rank 0  0──1─2──3─               0═════4─1════5──2════6─3════7──4════   5════  6════   7════
    rank 1     0─1──2─          0════3──1════4──2════5─3════6──4════7──5════  6════   7════
    rank 2       0──1─     0════2──1════3──2════4─3════5──4════6─5═════7─6════   7════
    rank 3          0─0════1──1════2─2═════3─3════4──4════5─5════6──6════7──7════

The gaps are idle time: the bubble, (p − 1)/m of the work. The paper makes it v times smaller by
giving each rank v short pieces of the model, not one long piece. Which rank does what, in which
order, is a table: a list of operations for each rank. Once the schedule is data, the same few
functions prove that it cannot deadlock, time it, and execute it; timeline.py draws it.

Run it (no flag is needed; --help lists them):

    python 03_pipeline/pipeline.py                  4 local ranks, 4 stages
    python 03_pipeline/pipeline.py --ranks 1        one process, for a debugger
    python 03_pipeline/pipeline.py --check          equivalence alone, the error of each tensor
    python 03_pipeline/pipeline.py --pp 2 --schedule interleaved --chunks 2 --recompute
    torchrun --nproc-per-node=8 03_pipeline/pipeline.py --pp 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        03_pipeline/pipeline.py --pp 8

It proves in float64 that every gradient equals the single device's under each schedule, trains a
small GPT on the text of this file next to the plain model, and prints the claims that it has
measured.

Left out: the paper's tables (pipeline_tables.py); the plan for a cluster (plan.py); drawings, and
the schedule that splits backward in two, planned and not executed (timeline.py); scatter/gather
over the tensor-parallel group (wire_cut.py; chapter 7 trains with it); recomputation layer by
layer.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. This chapter shards no dimension, so all
# are capitals. Inside a stage B is the batch of one micro-batch.
#
#     B  batch                         N  attention heads
#     S  sequence length, in tokens    D  size of a head
#     H  hidden size                   V  vocabulary entries
#
# Plain numbers, named as in the paper:
#
#     p   ranks of one pipeline             stage   one piece of the model: stage 0 has the
#     v   chunks: stages of each rank               embedding, stage p·v − 1 the output layer
#     m   micro-batches of one step         chunk   index of a stage on its rank:
#                                                   stage = chunk · p + rank
#
# An operation is F, the forward of one micro-batch through one stage, or B, its backward. Its
# stage says which rank does it, stage % p, so an operation has the same name on all ranks. pp is p,
# and dp is the number of replicas of the pipeline: world size = pp · dp.

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 does not count
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast
Time = Fraction | float  # in any unit; a fraction is exact


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class GPTConfig:
    """Sizes of a GPT; `flag` makes a field a flag too. Raises ValueError for impossible heads."""

    vocab_size: int = 256
    num_layers: int = flag(8, "layers, L", least=1)
    hidden_size: int = flag(64, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    seq_length: int = flag(64, "tokens of a sequence, S", least=1)
    dropout: float = flag(0.0, "dropout probability, after each sublayer")
    untied: bool = flag(False, "an output layer with a weight of its own")
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            sizes = f"hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: it must be at least 0 and less than 1")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# Sections 1.1 to 1.3 have no tensor and no process: they make, time and prove tables. Sections 1.4
# and 1.5 execute them.
#
#     schedule ─► a list of operations for each rank ─┬─► verify              can it run?
#          1.1                                        ├─► simulate            how long, and where
#                                                     │        1.2            is time lost?
#                                                     └─► programs ─► run_step
#                                                            1.3        1.4 and 1.5
#
# ── 1.1 A schedule is how far forward may run ahead ─────────────────────────────────────────────
#
# Each rank has its forwards in one fixed order and its backwards in another. All that a schedule
# still decides is how the two are interleaved. For all of the paper's schedules that is one number:
# how many forwards run ahead of the first backward. Write the two streams one below the other, the
# backwards so many places to the right, and read the columns from left to right. This is rank 2 of
# 4 under 1F1B, where one forward runs ahead:
#
#     forwards      F0  │  F1   F2   F3   F4   F5   F6   F7  │
#     backwards         │  B0   B1   B2   B3   B4   B5   B6  │  B7
#                warm-up│            steady state            │cool-down    F0, F1 B0, F2 B1, ... B7
#
# How many run ahead:
#
#     gpipe          all m                      simple; memory holds every micro-batch's activations
#     1f1b           p − rank − 1               as few as keep every rank busy: memory holds at most
#                                               p micro-batches, whatever m is
#     interleaved    2(p − rank − 1) + (v−1)p   1f1b for v chunks. Micro-batches go in groups of p,
#                                               each group through chunk 0, then chunk 1, ...;
#                                               backward goes through the last chunk first
#
# Why p − rank − 1: while this rank waits for a gradient, each of the p − rank − 1 ranks after it
# must have a micro-batch to work on. With one less, ranks wait for each other at every micro-batch
# (p = 4, m = 8: the bubble is 5/4, not 3/8). With more, activations pile up and no rank is faster.
#
# Why interleaved has twice as many: with messages that take no time, p − rank − 1 would do, with
# less memory and the same bubble. The second p − rank − 1 keep a message in flight between any two
# ranks while both compute. Where a message takes a tenth of a rank's forward, the bubble is 0.25
# and not 0.31 (p = 4, m = 8, v = 2). The (v − 1)p bring the first group to its last chunk.
#
# Why groups of p: the first micro-batch leaves chunk 0 of the last rank just when the first rank
# has finished the p-th, and may enter chunk 1. A group of fewer than p leaves ranks idle: with
# p = 4, m = 6, v = 2 and groups of 4 and 2 the bubble is 19/36, more than 1f1b's 18/36. Larger
# groups are left out here: one group of 6 has the bubble 1/4 and holds 12 activations.
# Megatron-LM has them as microbatch_group_size_per_vp_stage.
#
# [the paper's section 2.2; gpipe: Huang et al., arXiv 1811.06965; 1f1b: PipeDream-Flush, arXiv
# 2006.09503]

KINDS = ["gpipe", "1f1b", "interleaved"]


class Op(NamedTuple):
    """An operation: kind "F" or "B", of one micro-batch, in one stage, which is on rank stage % p.

    Source: ours.
    """

    kind: str
    microbatch: int
    stage: int


Schedule = list[list[Op]]  # the operations of each rank, in order


def schedule(kind: str, p: int, m: int, v: int = 1) -> Schedule:
    """The table of a published schedule.

    Args: p: ranks. m: micro-batches. v: chunks on each rank; only "interleaved" takes more than 1.
    Raises: ValueError with the reason for what cannot be scheduled. Source: section 2.2.
    """
    check_schedule(kind, p, m, v)
    table = []
    for rank in range(p):
        stages = range(rank, p * v, p)  # one for each chunk
        forwards = []
        backwards = [None] * runs_ahead(kind, p, m, v, rank)
        for first in range(0, m, p):
            group = range(first, min(first + p, m))
            for stage in stages:
                forwards += [Op("F", i, stage) for i in group]
            for stage in reversed(stages):
                backwards += [Op("B", i, stage) for i in group]
        # The two streams of the drawing above, read column by column.
        columns = itertools.zip_longest(forwards, backwards)
        table.append([op for op in itertools.chain(*columns) if op is not None])
    return table


def runs_ahead(kind: str, p: int, m: int, v: int, rank: int) -> int:
    """How many forwards run ahead of the first backward. Source: section 2.2."""
    if kind == "gpipe":
        return m
    if kind == "interleaved":
        return 2 * (p - rank - 1) + (v - 1) * p
    return p - rank - 1


def check_schedule(kind: str, p: int, m: int, v: int) -> None:
    """Raises ValueError for what cannot be scheduled; arguments as in `schedule`. Source: ours."""
    if kind not in KINDS:
        raise ValueError(f"schedule {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if min(p, m, v) < 1:
        raise ValueError(f"pp={p}, microbatches={m}, chunks={v}: each must be at least 1")
    if kind != "interleaved" and v > 1:
        raise ValueError(f"chunks={v}: {kind} has one chunk per rank; interleaved takes more")
    if kind == "interleaved" and m % p:
        nearest = max(p, m // p * p)
        raise ValueError(f"microbatches={m} is no multiple of pp={p}: choose {nearest}")


# ── 1.2 Time: which operation waits for which ───────────────────────────────────────────────────
#
# All of pipeline parallelism is in two rules, for stage s:
#
#     forward  needs  the forward of stage s − 1
#     backward needs  its own forward, and the backward of stage s + 1
#
# With them a table can be played through on paper: an operation starts when its rank is free and
# its inputs are there. `simulate` lets one rank after another go on as far as it can. When a full
# round has moved no rank, either all are done, and every operation has its time, or some wait for
# each other: a deadlock. The order in which ranks are asked does not matter: an operation that can
# start now can still start when its rank is asked later.
#
# Times are exact, so a bubble equals its formula exactly. For every schedule here that is
# (p − 1)/(v·m). The last rank can start when p − 1 others have done a forward, and the first can
# end when p − 1 others have done a backward after it. So every rank idles for p − 1 of each, and
# does m of each. A chunk has 1/v of a rank's layers, so it is passed on v times sooner, paid for
# with v times as many messages. pipeline_tables.py holds the formulas against `simulate`.
#
# Mind the convention: the paper divides the bubble by the *ideal* time. (p − 1)/(m + p − 1) divides
# it by the total time.


def input_of(op: Op, stages: int) -> Op | None:
    """The operation of a neighbouring stage whose result `op` takes; None at the model's two ends.

    Args: stages: p·v. Source: ours.
    """
    # W, the weights' part of a backward that is split in two (timeline.py), takes nothing.
    source = {"F": op.stage - 1, "B": op.stage + 1, "W": -1}[op.kind]
    return op._replace(stage=source) if source in range(stages) else None


def needs(op: Op, stages: int) -> list[Op]:
    """All that must be done before `op`; stages: p·v. Source: ours."""
    source = input_of(op, stages)
    found = [] if source is None else [source]
    if op.kind != "F":
        earlier = {"B": "F", "W": "B"}[op.kind]
        found.append(op._replace(kind=earlier))
    return found


def stages_of(schedule: Schedule) -> int:
    """p·v, the stages of the model. Source: ours."""
    return 1 + max((op.stage for op in itertools.chain(*schedule)), default=0)


class Bar(NamedTuple):
    """One operation on a timeline. Source: ours."""

    op: Op
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """When each rank does what, planned or measured. Source: ours."""

    ranks: list[list[Bar]]

    @property
    def length(self) -> Time:
        bars = list(itertools.chain(*self.ranks))
        return max(bar.end for bar in bars) - min(bar.start for bar in bars)

    @property
    def bubble(self) -> Time:
        """Time lost over the ideal time, in which the busiest rank never waits."""
        work = [sum(bar.end - bar.start for bar in bars) for bars in self.ranks]
        return Fraction(self.length) / max(work) - 1


def simulate(
    schedule: Schedule, durations: dict[str, Time] | None = None, t_send: Time = 0
) -> Timeline:
    """Plays a schedule through; exact where the arguments are.

    Args: durations: kind of operation to the time that it takes in one chunk. None: 1 for F, 2 for
        B. t_send: how long a message takes.
    Raises: ValueError, naming which operations wait, in a deadlock. Source: ours.
    """
    durations = durations or {"F": 1, "B": 2}
    p = len(schedule)
    stages = stages_of(schedule)
    ends = {}  # operation to when it ends
    timeline: list[list[Bar]] = [[] for _ in schedule]
    waiting = [deque(ops) for ops in schedule]
    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(waiting):
            while ops and all(earlier in ends for earlier in needs(ops[0], stages)):
                op = ops.popleft()
                start = timeline[rank][-1].end if timeline[rank] else 0
                for earlier in needs(op, stages):
                    is_sent = earlier.stage % p != rank
                    start = max(start, ends[earlier] + (t_send if is_sent else 0))
                ends[op] = start + durations[op.kind]
                timeline[rank].append(Bar(op, start, ends[op]))
                moved = True
    if any(waiting):
        raise ValueError(f"deadlock: the ranks wait at {[list(ops)[:1] for ops in waiting]}")
    return Timeline(timeline)


# ── 1.3 Messages: one clock for all ranks ───────────────────────────────────────────────────────
#
# Where an operation needs one of another rank, a tensor must be sent, so the table implies the
# messages. In a collective all ranks of a group meet. A point-to-point message, as in chapter 1's
# ring, has two ends: one rank calls `isend` with a tensor, the other `irecv` with an empty tensor
# of the same shape and dtype. Both return at once, with something to wait for.
#
# Their *order* is the hard part. A receive waits for its send, a send may wait for its receive, and
# between two ranks the k-th send meets the k-th receive, whatever the tensors mean. In the steady
# state of 1F1B two neighbours have something for each other at the same time. If both send first,
# both wait for ever:
#
#     rank 1   send activation ──► ?       rank 2   send gradient ──► ?       neither receives
#
# The cure is to post the two as one batch (`batch_isend_irecv`), which completes as a unit. Which
# messages form a batch? Play the table on a clock on which every operation takes one tick. All that
# is made in a tick is sent at its end, and both ends know the tick. So each rank posts what it
# sends and receives at the end of a tick as one batch:
#
#     tick 7   rank 1: forward of 3, rank 2: backward of 1, then both post the batch
#              [1 ─► 2 activation 3,  2 ─► 1 gradient 1]          (1F1B, p = 4, m = 8, ticks from 0)
#
# The batches of every rank are in the order of ticks, so they cannot wait for each other in a
# circle. The tests prove that of every schedule here, on a network that is as strict as one can be.


class Hop(NamedTuple):
    """A message to `target`: what `op` of rank `source` makes. Source: ours."""

    source: int
    target: int
    op: Op

    def peer(self, rank: int) -> int:
        """The other end."""
        return self.source + self.target - rank


class Step(NamedTuple):
    """One tick of one rank: an operation or None, then one batch of messages. Source: ours."""

    op: Op | None
    batch: list[Hop]


Program = list[Step]  # of one rank


def programs(schedule: Schedule) -> list[Program]:
    """Each rank's program: the schedule's operations with the messages between them.

    Raises: ValueError where the schedule deadlocks. Source: ours.
    """
    p = len(schedule)
    clock = simulate(schedule, dict.fromkeys("FBW", 1))
    found = [[Step(None, []) for _ in range(clock.length)] for _ in schedule]
    ticks = {}  # operation to the tick in which it is done
    for program, bars in zip(found, clock.ranks):
        for op, tick, _ in bars:
            ticks[op] = tick
            program[tick] = Step(op, [])
    for op in ticks:
        made = input_of(op, stages_of(schedule))
        # On one rank the next stage is its own next chunk, and nothing is sent.
        if made is not None and p > 1:
            # Both ends post it in the tick in which it is made, whenever it is used.
            hop = Hop(made.stage % p, op.stage % p, made)
            found[hop.source][ticks[made]].batch.append(hop)
            found[hop.target][ticks[made]].batch.append(hop)
    for step in itertools.chain(*found):
        step.batch.sort()  # so that both ends list the messages between them in the same order
    return found


def verify(schedule: Schedule) -> list[int]:
    """Proves a schedule, also one of your own: each operation is there once, and none deadlocks.

    Returns: for each rank the most activations that it holds at once, in chunks. Raises: ValueError
    that says what is missing, done twice, or waits for ever. Source: ours.
    """
    if not schedule or not all(schedule):
        raise ValueError("a schedule has at least one rank, and each rank at least one operation")
    microbatches = range(1 + max(op.microbatch for op in schedule[0]))
    held = []
    for rank, ops in enumerate(schedule):
        stages = range(rank, stages_of(schedule), len(schedule))
        every = {Op(*parts) for parts in itertools.product("FB", microbatches, stages)}
        if set(ops) != every:
            raise ValueError(f"rank {rank}: missing or unknown are {sorted(every ^ set(ops))[:4]}")
        if len(ops) > len(every):
            raise ValueError(f"rank {rank} does {max(ops, key=ops.count)} twice")
        changes = [1 if op.kind == "F" else -1 for op in ops]
        held.append(max(itertools.accumulate(changes)))
    simulate(schedule)
    return held


# ── 1.4 Messages on the network ─────────────────────────────────────────────────────────────────
#
# A mailbox runs the batches of a program. They are in flight while the rank computes: an operation
# waits for the one message that it needs. (To wait for the batch would be to wait for a peer to
# take what it was sent, and ranks would run in lockstep.) Up to four batches are in flight before
# the next one waits for the oldest. A test simulates that, and finds that with four no bubble grows
# up to p = 8. A tensor that has been sent is held until its batch has completed, and no longer.
#
# No shape is sent: an activation has its micro-batch's shape and H, in the dtype of the parameters,
# and so has its gradient. Both ends compute it, and the sender checks what it sends.


class Mailbox:
    """Tensors by the operation that made them; `post` sends and receives a batch.

    Args: shapes: of the boundary tensor of each micro-batch. dtype and device: of those tensors.
    Raises: ValueError for a tensor that is not what the receiver waits for; RuntimeError that names
        a peer that is lost. Source: ours.
    """

    IN_FLIGHT = 4  # batches at once

    def __init__(self, mesh: Mesh, shapes: list[tuple], dtype: torch.dtype, device: torch.device):
        self.rank = mesh.pp_rank
        self.ranks = mesh.pp
        self.group = mesh.pp_group
        self.shapes = shapes
        self.dtype = dtype
        self.device = device
        self.values: dict[Op, Tensor] = {}  # made here, or received
        self.messages: dict[Hop, tuple[dist.P2POp, dist.Work]] = {}  # in flight
        self.batches: deque[list[Hop]] = deque()  # in flight, oldest first
        # gloo sends no GPU memory from rank to rank: the message goes through the CPU's.
        through_cpu = mesh.pp > 1 and dist.get_backend(mesh.pp_group) == "gloo"
        self.wire = "cpu" if through_cpu else device

    def put(self, op: Op, x: Tensor) -> None:
        """Keeps x (B, S, H) until it is sent or taken."""
        self.values[op] = x

    def take(self, op: Op) -> Tensor:
        """What `op` made; waits for its message. Afterwards the mailbox does not have it."""
        self.wait(Hop(op.stage % self.ranks, self.rank, op))
        return self.values.pop(op)

    def pack(self, x: Tensor) -> Tensor:
        """What is sent for x (B, S, H), or an empty tensor to receive that."""
        return x.detach().to(self.wire).contiguous()

    def unpack(self, received: Tensor, shape: tuple) -> Tensor:
        """The tensor of `shape` from what was received for it."""
        return received.to(self.device)

    def post(self, batch: list[Hop]) -> None:
        """Starts all messages of a batch, and returns at once."""
        if not batch:
            return
        if len(self.batches) == self.IN_FLIGHT:
            self.wait(*self.batches.popleft())
        calls = [self.message(hop) for hop in batch]
        with self.named_errors(*batch):
            works = dist.batch_isend_irecv(calls)
        if len(works) == 1:  # NCCL makes one operation of a batch
            works = works * len(batch)
        self.messages |= zip(batch, zip(calls, works))
        self.batches.append(batch)

    def message(self, hop: Hop) -> dist.P2POp:
        shape = self.shapes[hop.op.microbatch]
        if hop.source == self.rank:
            call = dist.isend
            # The tensor leaves the mailbox: from here on the message alone holds it.
            x = self.values.pop(hop.op)
            if x.shape != shape or x.dtype != self.dtype:
                found = f"{hop} is {tuple(x.shape)} {x.dtype}"
                raise ValueError(f"{found}, the receiver waits for {tuple(shape)} {self.dtype}")
        else:
            call = dist.irecv
            x = torch.empty(shape, dtype=self.dtype, device=self.wire)
        return dist.P2POp(call, self.pack(x), group=self.group, group_peer=hop.peer(self.rank))

    def wait(self, *hops: Hop) -> None:
        """Waits for those of `hops` that are in flight, and keeps what they bring."""
        for hop in hops:
            if hop not in self.messages:
                continue
            message, work = self.messages.pop(hop)
            with self.named_errors(hop):
                work.wait()  # on a GPU the stream waits, not the CPU
            if hop.target == self.rank:
                x = self.unpack(message.tensor, self.shapes[hop.op.microbatch])
                self.put(hop.op, x)

    @contextlib.contextmanager
    def named_errors(self, *hops: Hop) -> Iterator[None]:
        """A lost peer shows where a message is posted or waited for: the error names the peer."""
        try:
            yield
        except RuntimeError as error:
            peers = sorted({str(hop.peer(self.rank)) for hop in hops})
            where = f"pipeline rank {self.rank} lost rank {' or '.join(peers)}"
            raise RuntimeError(f"{where} in {list(hops)}: {error}") from error


# ── 1.5 One executor for all schedules ──────────────────────────────────────────────────────────
#
# The executor goes through its rank's program. A forward takes its input from the mailbox, makes it
# a leaf of a small graph (requires_grad, or there is no gradient to send back), and puts its output
# into the mailbox. A backward takes the gradient of that output, runs autograd through this piece
# alone, and puts the input's gradient into the mailbox. Between them the rank holds the input and
# the graph, but not the output: the next stage has that. Backward needs only the edge at which
# autograd enters the graph, and `get_gradient_edge` returns it. An edge keeps no tensor alive.
#
# A micro-batch's loss is the sum over its tokens, divided by the number of tokens that count in the
# *global* batch, over all micro-batches and replicas. So gradients add up to the batch's, whatever
# the sizes of micro-batches. Divided by the micro-batch's own count, the loss looks right once it
# is averaged for the screen, but its gradient is m times too large. AdamW hides that, since it
# divides the gradient by its own size; clipping and SGD do not.
#
# Recomputation keeps only the input, and runs the forward again right before the backward: the
# activations of p micro-batches become p inputs and the activations of one. The second forward must
# draw the masks of the first. Chapter 2's `Dropout` draws a mask from a seed, so the executor
# seeds before each pass. The seed contains the micro-batch: m equal masks would be no dropout.


@dataclass
class Executor:
    """Executes the operations of one rank in one step.

    Args: tokens and targets: (B, S) of each micro-batch. count: targets that count in the global
        batch, a scalar. recompute: keep inputs only. seed, step, replica: of dropout masks. x: the
        input of a stage, (B, S) or (B, S, H).
    Source: ours.
    """

    stage: PipelineStage
    mailbox: Mailbox
    tokens: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    count: Tensor
    recompute: bool = False
    autocast: Autocast = None
    seed: int = 0
    step: int = 0
    replica: int = 0
    inputs: dict[Op, Tensor] = field(default_factory=dict)  # F to its input
    edges: dict[Op, GradientEdge | None] = field(default_factory=dict)  # F to its output's edge
    loss: Tensor | float = 0.0  # the sum of the micro-batches; 0 without the output layer
    bars: list[Bar] = field(default_factory=list)  # what was done, with its times in seconds
    held: list[int] = field(default_factory=list)  # after each forward, the activations held here

    def run(self, op: Op) -> None:
        """Waits for what `op` takes, does it, and notes when."""
        received_BSH = self.receive(op)
        begin = time.perf_counter()
        if op.kind == "F":
            self.forward(op, received_BSH)
        else:
            self.backward(op, received_BSH)
        self.bars.append(Bar(op, begin, time.perf_counter()))

    def receive(self, op: Op) -> Tensor | None:
        """The activation or gradient that `op` takes (B, S, H); None at the model's two ends."""
        source = input_of(op, self.stage.last + 1)
        return None if source is None else self.mailbox.take(source)

    def compute(self, op: Op, x: Tensor) -> Tensor:
        """A stage's output: x_BSH, or a micro-batch's part of the loss at the model's end."""
        if self.stage.training and self.stage.config.dropout:
            passes = self.step * len(self.tokens) + op.microbatch
            seed_dropout(self.stage, self.seed, passes, dp_rank=self.replica)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            y = self.stage(op.stage, x)
            if op.stage < self.stage.last:
                return y
            return token_losses(y, self.targets[op.microbatch]).sum() / self.count

    def forward(self, op: Op, received_BSH: Tensor | None) -> None:
        # A leaf that does not require a gradient would leave none to send back.
        x = self.tokens[op.microbatch] if received_BSH is None else received_BSH.requires_grad_()
        learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and not self.recompute):
            y = self.compute(op, x)
        if learns:
            self.inputs[op] = x
            self.edges[op] = edge_of(y)
            self.held.append(len(self.inputs))
        if op.stage == self.stage.last:
            self.loss += y.detach()
        else:
            self.mailbox.put(op, y.detach())  # its graph stays here

    def backward(self, op: Op, dy_BSH: Tensor | None) -> None:
        forward = op._replace(kind="F")
        x = self.inputs.pop(forward)
        edge = self.edges.pop(forward)
        if self.recompute:
            edge = edge_of(self.compute(op, x))
        if edge is not None:
            # Adds to every p.grad, and leaves the input's in x.grad. The loss's own is 1 (None).
            torch.autograd.backward(edge, dy_BSH)
        if op.stage > 0:  # tokens have no gradient
            self.mailbox.put(op, x.grad)


def edge_of(y: Tensor) -> GradientEdge | None:
    """Where autograd enters the graph of y (B, S, H) or (); None where y has no graph: all
    parameters are frozen, or it will be recomputed. Source: ours."""
    return get_gradient_edge(y) if y.requires_grad else None


def run_step(
    stage: PipelineStage,
    program: Program,
    tokens_BS: Tensor,
    targets_BS: Tensor,
    mesh: Mesh,
    make_mailbox: Callable[..., Mailbox] = Mailbox,
    **options: Any,
) -> Tensor:
    """Executes a program on this replica's batch. Every rank of the mesh must call it.

    Afterwards p.grad of every parameter is the gradient of the mean loss per token, over all
    micro-batches and replicas. A program of forwards alone, under torch.no_grad(), evaluates.

    Args:
        program: programs(schedule)[pp rank]; its m micro-batches are the rows in order.
        tokens_BS, targets_BS: int64, of one shape, the same on every rank of a pipeline; target
            −100 does not count. The middle ranks use their shapes only.
        make_mailbox: called with mesh, shapes, dtype and device.
        options: `Executor`'s recompute, autocast, seed, step, and two lists to extend: bars, held.

    Returns: the mean loss per token, a scalar, replicated.
    Raises: ValueError for a batch, program or stage that do not fit (`check_step`); RuntimeError
        that names a lost peer. An error on one rank is, on the others, a message that never comes.
    Source: ours; the paper's section 2.2 has the schedules.
    """
    check_step(stage, program, tokens_BS, mesh)
    if targets_BS.shape != tokens_BS.shape:  # only the last rank reads the targets' values
        raise ValueError(f"targets are {targets_BS.shape}, but tokens {tokens_BS.shape}")
    m = microbatches_of(program)
    tokens = tokens_BS.tensor_split(m)  # every rank cuts alike, and so knows every shape
    targets = targets_BS.tensor_split(m)
    shapes = [(*x_BS.shape, stage.config.hidden_size) for x_BS in tokens]
    dtype = next(stage.parameters()).dtype
    mailbox = make_mailbox(mesh, shapes, dtype, tokens_BS.device)
    count = count_targets(targets_BS, mesh.dp_group)
    executor = Executor(stage, mailbox, tokens, targets, count, replica=mesh.dp_rank, **options)
    executor.loss = at_least_fp32(torch.zeros((), dtype=dtype, device=tokens_BS.device))
    for op, batch in program:
        if op is not None:
            executor.run(op)
        mailbox.post(batch)
    mailbox.wait(*list(mailbox.messages))  # a sent tensor must live until its peer has it
    if torch.is_grad_enabled():
        # After the last backward, once: summed at each micro-batch, earlier sums would be summed
        # again. Replicas first, so that each of the tied weight's two parts is the global batch's.
        sum_gradients(stage.parameters(), mesh.dp_group)
        sum_gradients(stage.tied_copies(), mesh.tied_group)
    return _all_reduce(_all_reduce(executor.loss, mesh.pp_group), mesh.dp_group)


def microbatches_of(program: Program) -> int:
    """m, the micro-batches of a program. Source: ours."""
    return 1 + max(step.op.microbatch for step in program if step.op is not None)


def check_step(stage: PipelineStage, program: Program, tokens_BS: Tensor, mesh: Mesh) -> None:
    """Raises ValueError where the arguments of `run_step` do not fit each other.

    Args: tokens_BS as there. Source: ours.
    """
    m = microbatches_of(program)
    # A program of another rank, or for other chunks, would wait for messages that never come.
    stages = {step.op.stage for step in program if step.op is not None}
    here = (mesh.pp, mesh.pp_rank, sorted(stages))
    built = (stage.ranks, stage.rank, sorted(stage.layers_of))
    if tokens_BS.is_floating_point():
        raise ValueError(f"tokens are {tokens_BS.dtype}: the first stage takes token ids, int64")
    if len(tokens_BS) < m:
        raise ValueError(f"a batch of {len(tokens_BS)} rows is too small for {m} micro-batches")
    if here != built:
        raise ValueError(f"(ranks, rank, stages) are {here}, but the stage was built for {built}")
    if torch.is_grad_enabled() and any(p.grad is not None for p in stage.parameters()):
        raise ValueError("gradients of an earlier step are still there: call zero_grad() before")


def count_targets(targets_BS: Tensor, group: Group = None) -> Tensor:
    """How many targets count, over all replicas of `group`, at least 1: a scalar tensor.

    Source: ours.
    """
    return _all_reduce((targets_BS != -100).sum(), group).clamp(min=1)


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# A pipeline needs a stack of layers, so this GPT is as small as one can be. Two details matter:
#
# · By default the output layer multiplies with the embedding table (tied): the first stage and the
#   last need the same weight.
# · A parameter's initial values are a function of its name. Layer 5 is "layers.5" on whatever rank
#   it lives, so a stage draws its own weights and no others, and they equal the plain model's.


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H): attention and feed-forward, each on a residual connection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)
        self.dropout1 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(H)
        self.up = nn.Linear(H, 4 * H)
        self.down = nn.Linear(4 * H, H)
        self.dropout2 = Dropout(config.dropout)

    def forward(self, x_BSH: Tensor) -> Tensor:
        qkv_BSH3 = self.qkv(self.norm1(x_BSH))
        qkv_3BNSD = rearrange(qkv_BSH3, "B S (k N D) -> k B N S D", k=3, N=self.num_heads)
        y_BNSD = F.scaled_dot_product_attention(*qkv_3BNSD, is_causal=True)
        x_BSH = x_BSH + self.dropout1(self.out(rearrange(y_BNSD, "B N S D -> B S (N D)")))
        return x_BSH + self.dropout2(self.down(F.gelu(self.up(self.norm2(x_BSH)))))


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_BSV.

    Args: layers: those to build, None is all. The embedding is built with the first layer and the
        output layer with the last, so a pipeline stage has only its own parts.
    Raises: ValueError for a sequence longer than seq_length. `embed` returns (B, S, H), `logits`
        (B, S, V).
    """

    def __init__(self, config: GPTConfig, layers: Iterable[int] | None = None):
        super().__init__()
        self.config = config
        layers = range(config.num_layers) if layers is None else layers
        # A dictionary: its keys, and so the parameters' names, are indices in the full model.
        self.layers = nn.ModuleDict({str(layer): Block(config) for layer in layers})
        is_first = "0" in self.layers
        is_last = str(config.num_layers - 1) in self.layers
        self.dropout = Dropout(config.dropout)
        if is_first or (is_last and not config.untied):
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if is_first:
            self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        if is_last:
            self.final_norm = nn.LayerNorm(config.hidden_size)
        if is_last and config.untied:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        S = tokens_BS.shape[1]
        if S > self.config.seq_length:
            raise ValueError(f"{S} tokens, but the model has {self.config.seq_length} positions")
        return self.dropout(self.embedding(tokens_BS) + self.positions.weight[:S])

    def logits(self, x_BSH: Tensor) -> Tensor:
        weight_VH = self.head.weight if self.config.untied else self.embedding.weight
        return F.linear(self.final_norm(x_BSH), weight_VH)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embed(tokens_BS)
        for layer in self.layers.values():
            x_BSH = layer(x_BSH)
        return self.logits(x_BSH)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
        return token_losses(self(tokens_BS), targets_BS)


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
    logits_BVS = rearrange(at_least_fp32(logits_BSV), "B S V -> B V S")
    return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig) -> None:
    """Sets the initial weights: a function of config.seed and each parameter's name.

    They are drawn on the CPU: a GPU's generator gives other values.
    """
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim > 1 and not p.is_meta:  # the weights of LayerNorm stay 1
            # crc32: Python's hash() differs between processes.
            key = zlib.crc32(f"{config.seed} {name}".encode())
            generator = torch.Generator().manual_seed(key)
            p.copy_(config.init_std * torch.randn(p.shape, generator=generator, device="cpu"))


# region carried: dropout (home: 02_megatron_tp)
class Dropout(nn.Module):
    """Zeroes elements with probability p and scales the others by 1 / (1 − p); x (...) to (...).

    Args: p in [0, 1). sharded: x is sharded over the tensor-parallel group, not replicated.
    Until `seed_dropout` sets `mask_seed`, masks come from PyTorch's default generator: on several
    ranks they are then right only by accident.
    Source: appendix B.2 of Megatron-LM (Shoeybi et al., 2019).
    """

    def __init__(self, p: float, sharded: bool = False):
        super().__init__()
        self.p = p
        self.sharded = sharded
        self.mask_seed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.p or not self.training:
            return x
        return (x * self.keep_mask(x)).mul_(1 / (1 - self.p))

    @torch.compiler.disable  # a new seed would compile again in every step
    def keep_mask(self, x: Tensor) -> Tensor:
        """True where an element of x (...) is kept; a boolean tensor of its shape."""
        generator = None
        if self.mask_seed is not None:
            generator = torch.Generator(x.device).manual_seed(self.mask_seed)
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return keep.bernoulli_(1 - self.p, generator=generator)


def seed_dropout(
    model: nn.Module, seed: int, step: int, tp_rank: int = 0, dp_rank: int = 0
) -> None:
    """Seeds every `Dropout` of the model; equal arguments give equal masks.

    Call it before every forward pass, with another `step`: until then each pass draws the same
    masks. So count micro-batches as steps. Source: appendix B.2, which keeps states instead.
    """
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            place = (seed, step, dp_rank, name, tp_rank if module.sharded else None)
            # crc32: Python's hash() differs between processes, and CPU generators use 32 bits.
            module.mask_seed = zlib.crc32(repr(place).encode())


# endregion copy a6c3f0

# ── 2.2 A stage ─────────────────────────────────────────────────────────────────────────────────
#
# A rank's part of the model: the plain model's own layers under the plain model's own names. So a
# checkpoint does not depend on the number of stages.
#
# Where p·v divides the layers, every stage gets equally many. Where it does not, stages in the
# middle get one more, the first only where at least half of the stages do, since it has the
# embedding. The last never does, since its output layer and loss cost most.
#
# With a tied output layer the first rank and the last each have a copy of the embedding table. The
# copies start equal and get the same gradient: the sum of both parts. With p = 1 it is one tensor.


def place_layers(layers: int, stages: int) -> list[range]:
    """The layers of each of `stages` stages (p·v of them). Raises: ValueError for too few layers.

    Source: ours; the paper's layers always divide.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers on {stages} stages: choose at most {layers} stages")
    # Stage s ends where stage s + 1 begins, at (s + 1) · layers / stages, rounded down. With the
    # remainder as an offset before it is rounded, the last stage has none of the longer pieces.
    bounds = [(layers * stage + layers % stages) // stages for stage in range(stages + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


class PipelineStage(GPT):
    """Rank `rank`'s stages of GPT(config), split into ranks · chunks stages.

    Its weights are those of GPT(config), and so are their names. Call it with a stage.
    Raises: ValueError where layers are fewer than stages, or rank is not one of them.
    Source: the paper's section 2.2.
    """

    def __init__(self, config: GPTConfig, rank: int = 0, ranks: int = 1, chunks: int = 1):
        if not 0 <= rank < ranks or chunks < 1:
            raise ValueError(f"rank={rank}, ranks={ranks}, chunks={chunks}: no such stage")
        placement = place_layers(config.num_layers, ranks * chunks)
        super().__init__(config, itertools.chain(*placement[rank::ranks]))
        self.rank = rank
        self.ranks = ranks
        self.last = ranks * chunks - 1  # the model's last stage
        self.layers_of = {s: placement[s] for s in range(rank, ranks * chunks, ranks)}

    def forward(self, stage: int, x: Tensor) -> Tensor:
        """x: tokens_BS for stage 0, x_BSH for others. To (B, S, H); the last returns logits_BSV."""
        if stage == 0:
            x = self.embed(x)
        for layer in self.layers_of[stage]:
            x = self.layers[str(layer)](x)
        return self.logits(x) if stage == self.last else x

    def tied_copies(self) -> list[nn.Parameter]:
        """The tied weight, where another rank has a copy of it."""
        if self.config.untied or self.ranks == 1 or self.rank not in (0, self.ranks - 1):
            return []
        return [self.embedding.weight]


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# No tensor is sharded and a layer keeps its name, so a rank's state dict is some entries of the
# plain model's. Only the tied weight has two copies. They must be equal to the bit, since both got
# the same gradient in every step. Where they are not, that sum was left out, and merging says so.


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name to shape of every parameter of the plain model, without memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def shard_state_dict(
    full: StateDict, config: GPTConfig, rank: int, ranks: int, chunks: int = 1
) -> StateDict:
    """The plain model's state dict to that of pipeline rank `rank`; copies.

    Raises: ValueError that names what is missing, unknown or of another shape.
    """
    found = {name: x.shape for name, x in full.items()}
    wrong = found.items() ^ parameter_shapes(config).items()
    if wrong:
        raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")
    with torch.device("meta"):
        names = PipelineStage(config, rank, ranks, chunks).state_dict()
    return {name: full[name].clone() for name in names}


def merge_state_dicts(shards: list[StateDict], config: GPTConfig) -> StateDict:
    """All ranks' state dicts to the plain model's: undoes `shard_state_dict`; gradients as well.

    Raises: ValueError where a parameter is on no rank, or copies of the tied weight differ.
    """
    full = {}
    for shard in shards:
        for name, x in shard.items():
            first = full.setdefault(name, x.clone())
            if not torch.allclose(x, first, rtol=0, atol=0, equal_nan=True):
                gap = (first - x).abs().max()
                raise ValueError(f"the copies of {name} differ by {gap:.1e}: they must be equal")
    names = parameter_shapes(config)
    missing = names.keys() - full.keys()
    if missing:
        raise ValueError(f"no rank has {sorted(missing)}")
    return {name: full[name] for name in names}


def gather_state_dict(tensors: StateDict, config: GPTConfig, group: Group = None) -> StateDict:
    """Every stage's tensors (by parameter name) to the plain model's, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    shards = [{name: x.detach().cpu() for name, x in tensors.items()}] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, shards[0], group)
    return merge_state_dicts(shards, config)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Pipeline and data parallelism are the two dimensions of a device mesh. With --pp 2 on 4 ranks:
#
#                      replica 0    replica 1
#        stage 0        rank 0       rank 1       ← a dp group: the same layers, different rows
#        stage 1        rank 2       rank 3
#                         ↑ a pp group: the same rows, different layers
#
# The stages of a pipeline are far apart, unlike the tensor-parallel ranks of chapter 2. A stage
# sends one tensor per micro-batch, which may go from server to server. Replicas sum full gradients.


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups.

    Raises: ValueError on a rank that is not in one of the groups.
    """

    pp: int = 1  # ranks of a pipeline
    dp: int = 1  # replicas
    pp_rank: int = 0
    dp_rank: int = 0
    pp_group: Group = None
    dp_group: Group = None
    tied_group: Group = None  # the first and the last rank of a pipeline; others are alone

    def __post_init__(self):
        for group in (self.pp_group, self.dp_group, self.tied_group):
            group_size(group)  # refuses a group of other ranks


def make_mesh(pp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (pp, dp). Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where pp does not divide the ranks.
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    if world % pp:
        raise ValueError(f"pp={pp} does not divide the {world} ranks")
    dp = world // pp
    ranks = torch.arange(world).view(pp, dp)
    pp_lists = ranks.T.tolist()
    dp_lists = ranks.tolist()
    tied_lists = []  # all ranks make a group together, so those in the middle are in a list, alone
    for pipeline in pp_lists:
        tied_lists.append(sorted({pipeline[0], pipeline[-1]}))
        tied_lists += [[middle] for middle in pipeline[1:-1]]
    groups = [make_group(lists, device, timeout) for lists in (pp_lists, dp_lists, tied_lists)]
    return Mesh(pp, dp, rank // dp, rank % dp, *groups)


# ── 4.1 Sums over the mesh ──────────────────────────────────────────────────────────────────────
#
# Three sums complete the gradient: over replicas; of the tied weight, whose first copy has the
# embedding's part and whose last copy has the output layer's; and of squares for the global norm,
# over stages. In the norm the tied weight counts once: the copy on the last rank is left out.


def sum_gradients(parameters: Parameters, group: Group = None) -> None:
    """All-reduces every gradient over `group`, in place; frozen parameters have none.

    (DistributedDataParallel sends buckets of several gradients: chapter 1.)
    """
    for p in parameters:
        if p.grad is not None:
            _all_reduce(p.grad, group)


@torch.no_grad()
def clip_grad_norm_(stage: PipelineStage, max_norm: float, group: Group = None) -> Tensor:
    """Scales all gradients so that their norm over the stages of `group` is at most max_norm.

    Returns: the norm before clipping, a scalar tensor, at least fp32, the same on every rank:
        torch.nn.utils.clip_grad_norm_'s of the plain model.
    """
    copies = stage.tied_copies() if stage.rank > 0 else []
    counted_elsewhere = {id(p) for p in copies}  # by identity: == compares values
    first = next(stage.parameters())
    squares = [at_least_fp32(first.new_zeros(()))]  # where all is frozen
    for p in stage.parameters():
        if p.grad is not None and id(p) not in counted_elsewhere:
            # In at least fp32: a sum of squares in bf16 would have three digits.
            squares.append(torch.linalg.vector_norm(at_least_fp32(p.grad)).square())
    norm = _all_reduce(torch.stack(squares).sum(), group).sqrt()
    nn.utils.clip_grads_with_norm_(stage.parameters(), max_norm, norm)
    return norm


# ── 4.2 The loop ────────────────────────────────────────────────────────────────────────────────


# region carried: plain training (home: 02_megatron_tp)
def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.01) -> AdamW:
    """AdamW that decays matrices, not biases and LayerNorm weights."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def train_alone(
    model: GPT,
    optimizer: Optimizer,
    batches: Batches,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the plain model; yields two scalars, the mean loss per token and the norm before
    clipping. For a schedule, set the optimizer's learning rate between two steps."""
    for tokens_BS, targets_BS in batches:
        optimizer.zero_grad()
        count = (targets_BS != -100).sum().clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(tokens_BS, targets_BS).sum() / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        yield loss.detach(), norm


# endregion copy af54db


def train(
    stage: PipelineStage,
    optimizer: Optimizer,
    schedule: Schedule,
    batches: Batches,
    mesh: Mesh,
    max_norm: float = 1.0,
    **options: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on a mesh: yields the same two scalars. Every rank must iterate it.

    Args: batches are global; where dp does not divide their rows, replicas get unequal parts.
        options: `run_step`'s.
    Raises: ValueError for a schedule that cannot run, or too few rows; RuntimeError for two shapes.
    """
    verify(schedule)  # before the first message, since it may be the reader's own
    program = programs(schedule)[mesh.pp_rank]
    m = microbatches_of(program)
    for step, (tokens_BS, targets_BS) in enumerate(batches):
        if len(tokens_BS) < m * mesh.dp:  # before any message: replicas would not fail together
            pieces = f"{m} micro-batches on {mesh.dp} replicas"
            raise ValueError(f"a batch of {len(tokens_BS)} rows is too small for {pieces}")
        optimizer.zero_grad()
        # Stacked, since tensors of two shapes are then an error on every rank.
        rows_2BS = torch.stack([tokens_BS, targets_BS]).tensor_split(mesh.dp, dim=1)[mesh.dp_rank]
        loss = run_step(stage, program, *rows_2BS, mesh, step=step, **options)
        norm = clip_grad_norm_(stage, max_norm, mesh.pp_group)
        optimizer.step()
        yield loss, norm


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# Memory, in two places. The first rank holds the activations of p micro-batches, and inside a stage
# every tensor-parallel rank keeps the full input of each LayerNorm and each dropout, replicated.
# The cure here is to recompute everything, which costs a third more arithmetic. Chapter 4 counts
# what autograd keeps, byte by byte, and recomputes only a little. And the bubble remains:
# (p − 1)/m asks for many micro-batches, and a batch is only so large.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show what rounding does to right code (bf16: 0.4 % in each GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}
SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)]  # schedules with their chunks


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model under each schedule and on a single device: name to error.

    Layers and rows do not divide over stages, replicas and micro-batches; token counts differ.
    """
    m = 2 * mesh.pp
    config = GPTConfig(61, m + 1, hidden_size=16, num_heads=2, seq_length=16)
    generator = torch.Generator().manual_seed(1)
    ids_2BS = torch.randint(61, (2, m * mesh.dp + 1, 13), generator=generator)
    tokens_BS, targets_BS = ids_2BS.to(device)
    targets_BS[0, 3:] = -100
    batches = [(tokens_BS, targets_BS)] * 5
    lr = 1e-3
    max_norm = 0.1
    errors = {}
    for kind, chunks in SHAPES:
        plain = GPT(config).to(device, dtype)
        stage = PipelineStage(config, mesh.pp_rank, mesh.pp, chunks).to(device, dtype)
        alone = train_alone(plain, make_optimizer(plain, lr), batches, max_norm, autocast)
        table = schedule(kind, mesh.pp, m, chunks)
        optimizer = make_optimizer(stage, lr)
        steps = train(
            stage,
            optimizer,
            table,
            batches,
            mesh,
            max_norm,
            recompute=chunks > 1,
            autocast=autocast,
        )
        for step, (here, there) in enumerate(zip(steps, alone)):
            for name, x, y in zip(("loss", "norm before clipping"), here, there):
                errors[f"{name} {step}, {kind}"] = abs(x / y - 1).item()
            if step == 0:
                grads = {name: p.grad for name, p in stage.named_parameters()}
                reference = {name: p.grad for name, p in plain.named_parameters()}
                # By name, so both copies of a tied weight are compared, each on its own rank.
                errors |= relative_errors(f"gradient, {kind},", grads, reference)
        if dtype == torch.float64:
            # Where a gradient is zero, Adam divides rounding errors by each other: in fp32 the
            # weights of a right program differ too.
            full = gather_state_dict(stage.state_dict(), config, mesh.pp_group)
            name = f"weight after AdamW, {kind},"
            errors |= relative_errors(name, full, plain.state_dict(), floor=5 * lr)
    return over_all_ranks(errors)


def demonstrate(
    args: argparse.Namespace, mesh: Mesh, device: torch.device
) -> tuple[list[float], list[int]]:
    """Trains a pipeline and the plain model on text.

    Returns: how far the first losses are from the plain model's; the most activations that each
        rank of a pipeline held, each of one micro-batch in one stage.
    """
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    plain = GPT(config).to(device, dtype)
    stage = PipelineStage(config, mesh.pp_rank, mesh.pp, args.chunks).to(device, dtype)
    # Every rank trains the plain model too, on the same batches, so that no rank waits for another.
    batches, same_batches = itertools.tee(text_batches(args, device))
    optimizer = make_optimizer(plain, args.lr)
    alone = train_alone(plain, optimizer, same_batches, autocast=autocast)
    optimizer = make_optimizer(stage, args.lr)
    options = {"recompute": args.recompute, "autocast": autocast, "seed": args.seed}
    held = []  # the executor of each step appends to it
    steps = train(stage, optimizer, args.table, batches, mesh, held=held, **options)
    say("step      loss  single device    norm")
    differences = []
    for step, ((loss, norm), (loss_alone, _)) in enumerate(zip(steps, alone)):
        loss, norm = read_step(step, loss, norm)
        if step < 5 or step % 20 == 19:
            expected = loss_alone.item()
            differences.append(abs(loss - expected))
            say(f"{step:4}  {loss:.6f}  {expected:13.6f}  {norm:6.3f}")
    say()
    most = over_all_ranks({str(mesh.pp_rank): max(held, default=0)})
    return differences[:5], list(most.values())


def text_batches(args: argparse.Namespace, device: torch.device) -> Batches:
    """Global batches of this file's own text, one byte per token: a function of the seed."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, args.seq_length + 1, 1)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        rows = torch.randint(len(windows), (args.batch,), generator=generator)
        window_BS = windows[rows]
        yield window_BS[:, :-1].to(device), window_BS[:, 1:].to(device)


def claims(
    args: argparse.Namespace, errors: dict[str, float], differences: list[float], held: list[int]
) -> list[tuple]:
    """What this run has measured: (claim, paper, here, verdict)."""
    rows = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, float64"
        rows.append((claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"]))
    # With dropout a single device draws one mask for a batch, not one for each micro-batch.
    if differences and not args.dropout:
        within = max(differences)
        claim = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
        rows.append((claim, "equal", f"within {within:.0e}", within <= BOUNDS[args.dtype]))
    if differences:
        planned = verify(args.table)
        claim = f"activations that each rank holds at once, {args.schedule}"
        rows.append((claim, str(planned), str(held), held == planned))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = make_mesh(args.pp, device, args.timeout)
    work = f"{args.schedule}, {args.microbatches} micro-batches, {args.chunks} chunks"
    say_setting(args, f": pp {mesh.pp} × dp {mesh.dp}, {work}")
    if args.check:
        good = print_errors(equivalence(mesh, device, *dtypes(args)), BOUNDS[args.dtype])
    else:
        errors = equivalence(mesh, device, torch.float64)
        good = print_claims(claims(args, errors, *demonstrate(args, mesh, device)))
    if not good:
        sys.exit(1)


@dataclass
class Options:  # the chapter's own flags
    pp: int | None = flag(None, "ranks of a pipeline; None: 4, or the most that fit", least=1)
    schedule: str = flag("1f1b", "the order of operations", choices=KINDS)
    chunks: int = flag(1, "pieces of the model per rank, for interleaved", least=1)
    microbatches: int | None = flag(None, "of a replica; None: 2 per stage", least=1)
    recompute: bool = flag(False, "keep each stage's input only, recompute the rest")
    batch: int | None = flag(None, "sequences per step; None: 16, or more if needed", least=1)
    lr: float = flag(1e-3, "learning rate", least=1e-9)


def flags() -> argparse.Namespace:
    """Replaces every None, and refuses what does not fit."""

    def check_args(args: argparse.Namespace) -> None:
        most = max(1, args.num_layers // args.chunks)  # a stage needs a layer for each chunk
        fits = [pp for pp in range(1, most + 1) if args.world_size % pp == 0]
        args.pp = args.pp or (4 if 4 in fits else fits[-1])
        args.microbatches = args.microbatches or 2 * args.pp
        if args.world_size % args.pp:
            raise ValueError(f"--pp {args.pp} must divide the {args.world_size} ranks")
        args.table = schedule(args.schedule, args.pp, args.microbatches, args.chunks)
        config_from(args, GPTConfig)
        place_layers(args.num_layers, args.pp * args.chunks)
        least = args.microbatches * args.world_size // args.pp
        args.batch = args.batch or max(16, least)
        if args.batch < least:
            raise ValueError(f"--batch {args.batch}: all micro-batches need at least {least} rows")

    return parse_flags(__doc__, [Options, GPTConfig], check_args, ranks=4, steps=40)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: process groups (home: 01_deepspeech)
def group_size(group: Group = None) -> int:
    """Number of ranks in `group` (None: all ranks); 1 without process groups.

    Raises: ValueError on a rank outside the group, which would take its own values for the sum.
    """
    if not dist.is_initialized():
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the process group that it was given")
    return size


def group_rank(group: Group = None) -> int:
    """Index of this rank in `group` (None: all); 0 without process groups. Raises: ValueError."""
    return dist.get_rank(group) if dist.is_initialized() and group_size(group) else 0


def _all_reduce(x: Tensor, group: Group = None, op=dist.ReduceOp.SUM) -> Tensor:
    """In place; returns x. A group of one rank communicates nothing."""
    if group_size(group) > 1:
        dist.all_reduce(x, op, group)
    return x


def at_least_fp32(x: Tensor) -> Tensor:
    """x (...) upcast to fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _has_values(x: Tensor) -> bool:
    """Whether reading x's values costs nothing: on a GPU the CPU would wait for them, and fake
    tensors and torch.compile's have none."""
    on_cpu = x.device.type == "cpu" and type(x) is Tensor
    return on_cpu and not torch.compiler.is_compiling()


def make_group(rank_lists: list[list[int]], device: torch.device, timeout: float) -> Group:
    """This rank's group among `rank_lists`. Collective: every rank passes the same lists.

    A subgroup does not inherit the timeout (seconds). Its first collective runs here: NCCL connects
    in it, and would hang in a first send that only two ranks take part in. Raises: ValueError for a
    rank in no list: torch would give it None, which means all ranks.
    """
    if sorted(itertools.chain(*rank_lists)) != list(range(group_size())):
        raise ValueError(f"{rank_lists} must name each of the {group_size()} ranks once")
    group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=timedelta(seconds=timeout))
    dist.all_reduce(torch.ones(1, device=device), group=group)
    return group


def wait_for_all() -> None:
    """A barrier with a day's limit, for work of one rank alone: a slow disk is no lost message."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    dist.barrier(group)
    dist.destroy_process_group(group)


# endregion copy 3197a3
# region carried: reports (home: 01_deepspeech)
def say(text: str = "") -> None:
    """Rank 0 prints."""
    if group_rank() == 0:
        print(text, flush=True)


def say_setting(args: argparse.Namespace, layout: str = "") -> None:
    """The first line of a run: everything that it depends on."""
    setting = f"torch {torch.__version__}, {args.device}, {args.backend}, {group_size()} ranks"
    idle = torch.cuda.device_count() - (args.ranks if args.device == "cuda" else 0)
    note = f", {idle} GPUs not used" if idle > 0 else ""
    say(f"{setting}{layout}, {args.dtype}, seed {args.seed}{note}\n")


def read_step(step: int, loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Loss and gradient norm of a step as floats, in one host synchronisation.

    Args: loss, norm: scalar tensors on one device, equal on every rank: all stop in the same step.
    Raises: FloatingPointError where one of them is not finite. Do not save the weights then.
    """
    loss_value, norm_value = torch.stack([loss, norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        found = f"step {step}: loss {loss_value}, gradient norm {norm_value}"
        raise FloatingPointError(f"{found}. Lower the learning rate, or look at this step's batch")
    return loss_value, norm_value


def peak_memory(device: torch.device) -> float:
    """Peak memory of this rank in GB: of its GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype | None]:
    """--dtype as the dtype of the parameters, and that of autocast's GEMMs or None."""
    parameters = torch.float64 if args.dtype == "fp64" else torch.float32
    return parameters, torch.bfloat16 if args.dtype == "bf16" else None


def worst(errors: dict[str, float], kind: str = "") -> float:
    """The largest error of a `kind`; NaN is infinite. Raises: ValueError where there is none."""
    found = [error for name, error in errors.items() if name.startswith(kind)]
    return max(math.inf if math.isnan(error) else error for error in found)


def relative_errors(
    kind: str, tensors: dict[str, Tensor], reference: dict[str, Tensor], floor: float = 0.0
) -> dict[str, float]:
    """max|Δ| / max(max|reference|, floor) of every tensor (...), by "kind name"."""
    errors = {}
    for name, x in tensors.items():
        y = reference[name].detach().to(x.device)
        scale = y.abs().max().clamp(min=floor)
        errors[f"{kind} {name}"] = ((x - y).abs().max() / scale).item()
    return errors


def over_all_ranks(errors: dict[str, float]) -> dict[str, float]:
    """The largest error of all ranks by name; NaN counts as infinite. Collective."""
    everyone = [None] * group_size()
    dist.all_gather_object(everyone, errors)
    largest = {}
    for name, error in itertools.chain(*(errors.items() for errors in everyone)):
        error = math.inf if math.isnan(error) else error
        largest[name] = max(error, largest.get(name, 0.0))
    return largest


def print_errors(errors: dict[str, float], bound: float) -> bool:
    """--check: rank 0 prints every error and the worst. Returns: whether all are within `bound`."""
    for name, error in errors.items():
        say(f"{name:60} {error:.1e}")
    say(f"\nworst {worst(errors):.1e} relative, bound {bound:.0e}")
    return worst(errors) <= bound


def print_claims(claims: list[tuple[str, str, str, bool | str]]) -> bool:
    """Rank 0 prints (claim, paper, here, verdict) as a table.

    A verdict is True, False, or what a test of the claim needs. Returns: False where one is False.
    """
    rows = [("claim", "paper", "here", "verdict")]
    for claim, paper, here, verdict in claims:
        rows.append((claim, paper, here, {True: "ok", False: "FAILED"}.get(verdict, verdict)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for row in rows:
        say("".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return all(verdict is not False for *_, verdict in claims)


# endregion copy 7f35e3
# region carried: flags (home: 01_deepspeech)
@dataclass
class RunConfig:
    """The flags of every chapter."""

    ranks: int | None = flag(None, "processes here; None: one per GPU, or a few", least=1)
    device: str = flag("auto", "auto: cuda if each rank has a GPU", choices=["auto", "cpu", "cuda"])
    backend: str = flag("auto", "auto: nccl on GPUs", choices=["auto", "nccl", "gloo"])
    dtype: str = flag("auto", "bf16: autocast", choices=["auto", "fp64", "fp32", "bf16"])
    steps: int = flag(0, "optimizer steps", least=1)
    seed: int = flag(0, "of weights, batches and dropout")
    timeout: float = flag(60.0, "seconds that a collective may wait", least=0.001)
    check: bool = flag(False, "prove the equivalence, and stop")


def parse_flags(
    doc: str | None, configs: list[type], check_args: Callable, ranks: int, steps: int
) -> argparse.Namespace:
    """Reads the flags that the fields of RunConfig and of the dataclasses `configs` describe.

    Args: doc: the script's docstring, for --help. check_args(args): resolves the chapter's flags,
        raises ValueError or OSError. ranks: processes without GPUs. steps: the default of --steps.
    A wrong flag is one line, before any rank starts.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help lists them",
        description=(doc or "").partition("\n")[0],  # python -OO strips docstrings
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in itertools.chain(*map(fields, [RunConfig, *configs])):
        if f.metadata:
            _add_flag(parser, f)
    parser.set_defaults(steps=steps)
    args = parser.parse_args()
    try:
        _resolve_auto(args, ranks)
        check_args(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def _add_flag(parser: argparse.ArgumentParser, f: Field) -> None:
    keywords = dict(f.metadata)
    kind = f.type.partition(" ")[0]  # "int" of "int | None"
    if kind == "bool":
        keywords.setdefault("action", "store_true")
    elif kind != "str":
        number = int if kind == "int" else float
        keywords["type"] = partial(_number, number, keywords.pop("least", 0))
    parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **keywords)


def _number(kind: type, least: float, text: str) -> int | float:
    most = 2**63 - 1 if kind is int else 1e9
    value = math.nan
    with contextlib.suppress(ValueError):
        value = kind(text)
    if not least <= value <= most:  # NaN is in no range
        span = f"from {least} to {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r} must be of type {kind.__name__}, {span}")
    return value


def _torchrun_world() -> tuple[int, int]:
    """Ranks here and in all, as torchrun says; (0, 0) for a plain start. Raises: ValueError where
    another launcher has started tasks: each would train alone."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    tasks = {"SLURM_PROCID": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}
    tasks["PMI_RANK"] = "PMI_SIZE"  # mpiexec of MPICH and Intel
    several = any(os.environ.get(tasks[name], "1") != "1" for name in tasks if name in os.environ)
    if several or len(missing) < len(names):
        raise ValueError(f"{', '.join(missing)} not set: start it with torchrun (CLUSTER.md)")
    return 0, 0


def _resolve_auto(args: argparse.Namespace, ranks: int) -> None:
    """Replaces every "auto" and None. Raises ValueError for what this machine does not have."""
    gpus = torch.cuda.device_count()
    local_size, args.world_size = _torchrun_world()
    if local_size and args.ranks not in (None, local_size):
        raise ValueError(f"--ranks {args.ranks}, but torchrun has started {local_size}")
    needs_gpu = args.device == "cuda" or args.backend == "nccl"
    may_use_gpu = needs_gpu or args.device == args.backend == "auto"
    if gpus and may_use_gpu and args.backend != "gloo":
        ranks = gpus  # with gloo, ranks may share a GPU
    args.ranks = local_size or args.ranks or ranks
    args.world_size = args.world_size or args.ranks
    if args.device == "auto":
        args.device = "cuda" if needs_gpu or (may_use_gpu and gpus >= args.ranks) else "cpu"
    if args.backend == "auto":
        args.backend = "nccl" if args.device == "cuda" and gpus >= args.ranks else "gloo"
    if args.dtype == "auto":
        default = "bf16" if args.device == "cuda" else "fp32"
        args.dtype = "fp64" if args.check else default
    if args.device == "cuda" and not gpus:
        raise ValueError("a GPU was asked for, but torch sees none: use --device cpu")
    if args.backend == "nccl" and args.device == "cpu":
        raise ValueError("--backend nccl has no --device cpu: use gloo")
    may_share = "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ  # NCCL 2.30 and newer
    if args.backend == "nccl" and gpus < args.ranks and not may_share:
        raise ValueError(f"--backend nccl needs {args.ranks} GPUs, here are {gpus}: use gloo")


def config_from(args: argparse.Namespace, config: type, **others: Any) -> Any:
    """The dataclass `config` with the values of its flags, and others."""
    values = {f.name: getattr(args, f.name) for f in fields(config) if f.metadata}
    return config(**values, **others)


# endregion copy 596bce
# region carried: launcher (home: 01_deepspeech)
def launch(main: Callable, args: argparse.Namespace) -> None:
    """Runs main(args, device) on every rank: joins torchrun's world, or starts torchrun."""
    try:
        if "LOCAL_RANK" in os.environ or args.ranks == 1:
            record(run_rank)(main, args)  # keeps this rank's error for torchrun
            return
        logging.disable(logging.WARNING)  # torchrun's, about each signal that it passes on
        # An explicit address works also where the host's name does not resolve.
        options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={args.ranks}"]
        torchrun.main([*options, *sys.argv])
    except ChildFailedError as error:
        print(error, file=sys.stderr)  # names the rank that failed first, with its traceback
        sys.exit(1)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except KeyboardInterrupt as stop:
        if group_rank() == 0:
            print(f"\ninterrupted {stop}", file=sys.stderr, flush=True)
        if "LOCAL_RANK" not in os.environ:
            sys.exit(130)  # a notebook's kernel lives on
        os._exit(130)  # no traceback from each rank, and no waiting for the others
    finally:
        if args.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()  # so that a notebook can run it again


def run_rank(main: Callable, args: argparse.Namespace) -> None:
    """One rank: its device, the process group of all ranks, then main."""
    device = torch.device("cpu")
    if args.device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks with two threads each are several times slower
    world = {"timeout": timedelta(seconds=args.timeout)}
    if args.backend == "nccl":
        world["device_id"] = device
    if "LOCAL_RANK" not in os.environ:
        world |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    code = 0
    try:
        dist.init_process_group(args.backend, **world)
        dist.all_reduce(torch.ones(1, device=device))
        try:
            main(args, device)
        except SystemExit as end:  # a failed claim: the ranks end together all the same
            code = end.code
        wait_for_all()
    except RuntimeError as error:
        if "by peer" in str(error) or "Broken pipe" in str(error):
            time.sleep(5)  # another rank died: torchrun should find that one first
        raise
    dist.destroy_process_group()
    sys.exit(code)


def _end_with_parent(parent: int) -> None:
    """A launcher that was killed cannot stop its ranks, so each rank watches it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# endregion copy 754ba2


if __name__ == "__main__":
    launch(main, flags())
