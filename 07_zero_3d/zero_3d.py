# SPDX-License-Identifier: MIT-0
"""Chapter 7. All kinds of parallelism in one run, and an optimizer that is sharded.

Papers: Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B, Smith et al., 2022,
        arXiv 2201.11990; BLOOM: A 176B-Parameter Open-Access Multilingual Language Model,
        BigScience, 2022, arXiv 2211.05100
        Their optimizer is ZeRO's stage 1: Rajbhandari et al., 2020, arXiv 1910.02054

The problem. Chapters 2 to 4 shard one model over tp · pp ranks. Replicas then repeat it dp times,
and most of what they repeat is optimizer state. In bf16 training a parameter takes 2 bytes, its
fp32 gradient 4, and its fp32 copy with Adam's two moments 12.

The idea. A replica needs all of its parameters in every forward, but it needs the optimizer state
once a step. So each of the dp ranks keeps and updates the state of one part only:

       dp rank 0                          dp rank 1
    gradients g0 g0                    gradients g1 g1         fp32, of each replica's own batch
          └────────── reduce-scatter ──────────┘
    g0 + g1, first half                g0 + g1, second half    fp32
    AdamW on this half                 AdamW on this half      its state: 12/dp bytes a parameter
          └──────────── all-gather ────────────┘
    parameters, all                    parameters, all         bf16

A ring all-reduce is a reduce-scatter and an all-gather, so this sends no more than an all-reduce of
the gradients. What is hard is the rest of the step: some gradients are partial sums over tp, one
parameter lives on two stages, and a norm must count each element once: sections 1.1 to 1.4.

Run it (no flag is needed; --help lists them):

    python 07_zero_3d/zero_3d.py                     4 local ranks: three meshes, one after another
    python 07_zero_3d/zero_3d.py --ranks 8           2 × 2 × 2
    python 07_zero_3d/zero_3d.py --ranks 1           one process, for a debugger
    python 07_zero_3d/zero_3d.py --check             equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 07_zero_3d/zero_3d.py --tp 4 --pp 2 --dp 1
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        07_zero_3d/zero_3d.py --tp 4 --pp 2 --dp 2

It checks in float64 that every gradient and every weight equal the single device's. It trains a
small BLOOM on its own text next to the plain model, then in bf16, where the plain model has no
fp32 masters. It prints the bytes of the optimizer's state, and the claims that it measured.

Left out: the papers' tables (zero_3d_tables.py); interleaved schedules and messages in flight
(chapter 3); GEMMs that overlap with collectives, and selective recomputation (chapters 2 and 4);
dropout; evaluation; a check of token ids; an all-gather that overlaps with the next forward; the
batch ramp, and checkpoints that another mesh loads (resume.py).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension; the
# small letter is this rank's shard of it over tp. partial_ marks a partial sum, still to be reduced
# (Partial in PyTorch's DTensor). With sequence parallelism (sp) s = S / tp, without it s = S.
#
#     S  sequence length, in tokens    B  batch of one micro-batch
#     H  hidden size                   F  feed-forward size, f = F / tp
#     N  attention heads, n = N / tp   D  size of a head
#     V  vocabulary entries            v = V, padded, / tp
#
# Plain numbers: tp ranks share a layer, pp ranks share the stack of layers (stages), dp ranks are
# replicas. m micro-batches make one step of a replica. Flat tensors (buckets, and the pieces of
# parameters in them) have one dimension and no suffix.

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
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

Group = dist.ProcessGroup | None  # None: all ranks
Named = Iterable[tuple[str, nn.Parameter]]
Params = dict[str, nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 does not count
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class GPTConfig:
    """Sizes of a BLOOM; `flag` makes a field a flag too. `check_heads` refuses impossible ones."""

    vocab_size: int = 256
    num_layers: int = flag(2, "layers, L", least=1)
    hidden_size: int = flag(64, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    untied: bool = flag(False, "an output layer with a weight of its own")
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 The mesh ────────────────────────────────────────────────────────────────────────────────
#
# One mesh has all three axes, and a rank has a place on each. It is in one group of each axis, with
# the ranks that have the same place on the two others.
#
# The ranks are a box of pp × dp × tp. Which axis varies fastest decides which links carry which
# messages, because consecutive ranks share a server:
#
#     rank = (pp_rank · dp + dp_rank) · tp + tp_rank
#
# With tp = 2, pp = 2, dp = 2, and servers of four GPUs:
#
#                    dp rank 0              dp rank 1
#     stage 0     rank 0   rank 1        rank 2   rank 3      server 0
#     stage 1     rank 4   rank 5        rank 6   rank 7      server 1
#                 └─ tp group ─┘   ranks 0 and 2: a dp group   ranks 0 and 4: a pp group
#
#     tp    communicates in every layer of every micro-batch: neighbours, inside a server
#     dp    once a step, but all gradients: as near as is left
#     pp    one activation and its gradient per micro-batch: furthest apart
#
# What one rank sends in a step (zero_3d_tables.py; with recomputation, without sp):
#
#                              mesh tp × pp × dp     tp          dp         pp
#     BLOOM 176B                  4 × 12 × 8         812 GB      19.3 GB    7.5 GB
#     MT-NLG 530B                 8 × 35 × 8         634 GB      9.9 GB     5.0 GB
#
# A trap for readers of both production systems: DeepSpeed lists the axes as (pipe, data, model),
# the fastest last. Megatron-LM's order "tp-cp-ep-dp-pp" has the fastest first. Both mean the mesh
# above.
#
# The tied group is a fourth kind: the first and the last stage both have the embedding, and add its
# gradients (section 1.4).
#
# `make_group` is collective over all ranks, also for ranks that are not in the group. So every rank
# makes the groups in the same order. In another order one rank waits in a group of dp for ranks
# that wait in a group of pp, and all of them wait until the timeout.


@dataclass(frozen=True)
class ParallelMesh:
    """The sizes of the mesh, and this rank's place in it. ParallelMesh() is one process.

    Source: section 2.3 of MT-NLG's paper.
    """

    tp: int = 1  # ranks that share each layer
    pp: int = 1  # stages
    dp: int = 1  # replicas
    sp: bool = False  # sequence parallelism on the ranks of a tp group
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    pp_group: Group = None
    dp_group: Group = None
    tied_group: Group = None  # the first and the last stage; ranks between them are alone


def rank_of(mesh: ParallelMesh, tp_rank: int, pp_rank: int, dp_rank: int) -> int:
    """The rank at a place of the mesh, of which only the sizes are used.

    Source: DeepSpeed's PipeModelDataParallelTopology, and Megatron-LM's default order.
    """
    return (pp_rank * mesh.dp + dp_rank) * mesh.tp + tp_rank


def make_mesh(
    tp: int, pp: int, dp: int, device: torch.device, timeout: float = 60.0, sp: bool = True
) -> ParallelMesh:
    """Lays all ranks out as (pp, dp, tp). Collective over all ranks.

    Args: timeout in seconds. sp: sequence parallelism, where tp > 1.
    Raises: ValueError where tp · pp · dp is not the number of ranks.
    Source: section 2.3 of MT-NLG's paper.
    """
    world = group_size()
    if tp * pp * dp != world:
        raise ValueError(f"tp={tp}, pp={pp}, dp={dp} do not multiply to the {world} ranks")
    ranks = torch.arange(world).view(pp, dp, tp)
    tp_lists = rearrange(ranks, "pp dp tp -> (pp dp) tp").tolist()
    pp_lists = rearrange(ranks, "pp dp tp -> (dp tp) pp").tolist()
    dp_lists = rearrange(ranks, "pp dp tp -> (pp tp) dp").tolist()
    tied_lists = [[rank] for rank in ranks[1:-1].flatten().tolist()]
    tied_lists += [sorted({line[0], line[-1]}) for line in pp_lists]
    groups = []
    for lists in (tp_lists, pp_lists, dp_lists, tied_lists):  # one order, on every rank
        groups.append(make_group(lists, device, timeout))
    pp_rank, dp_rank, tp_rank = (ranks == group_rank()).nonzero()[0].tolist()
    return ParallelMesh(tp, pp, dp, sp and tp > 1, tp_rank, pp_rank, dp_rank, *groups)


# ── 1.2 Buckets: flat buffers of parameters and gradients ───────────────────────────────────────
#
# A reduce-scatter needs one flat tensor whose length is a multiple of dp. So parameters are laid
# out in buckets, one after another, and each bucket is padded at its end. With dp = 2:
#
#     bucket 0:  b (3)  W (4)  pad (1)        rank 0 updates  b b b W     rank 1 updates  W W W ·
#     bucket 1:  c (2)  E (4)                 rank 0 updates  c c E       rank 1 updates  E E E
#
# The shard boundary falls wherever it falls, inside W and inside E: an elementwise optimizer does
# not see the difference. The parameters become views of their bucket, so an all-gather into the
# bucket needs no copy. Four decisions:
#
# · Reverse order. Backward reaches the last layer first, so its bucket is complete first, and is
#   reduce-scattered while backward goes on. Buckets start in order on every rank: a rank whose
#   buckets complete in another order would meet other ranks in another bucket's collective.
# · Padding in each bucket. Padding once, after the last one, leaves buckets that do not divide.
# · The tied embedding has a bucket of its own. It lives on the first stage and on the last, among
#   other neighbours, and section 1.4 adds the shards of the two. Both must be the same elements.
# · Gradients are fp32, whatever the parameters are. Autograd makes a bf16 gradient per micro-batch.
#   A hook adds it to `main_grad`, a view of the bucket, and frees it. bf16 has 8 bits: a sum of 128
#   micro-batches in bf16 is off by 1 %, because the sum outgrows what is added to it. In fp32 it is
#   off by 1e-8.
#
# An example with a sum that is right and one that is not. Three micro-batches have the gradients
# 256, 1 and 1. In fp32 their sum is 258. In bf16 the values after 256 are 258, 260, ...: 256 + 1
# rounds back to 256, twice.
#
# Memory: a bucket's `data` takes 2 bytes a parameter and its `grad` 4, on every rank. Both are
# allocated once, so a step allocates nothing as large as the model.
#
# A gradient is complete after the last micro-batch. `is_last_microbatch` says so, and only then do
# buckets start. DDP calls the same thing no_sync, DeepSpeed the gradient accumulation boundary.


def padded_length(elements: int, dp: int) -> int:
    """`elements`, rounded up to a multiple of dp. Source: Megatron-LM's distributed optimizer."""
    return math.ceil(elements / dp) * dp


def start_reduce_scatter(shard: Tensor, full: Tensor, group: Group) -> dist.Work:
    """Sums `full` over `group`; this rank's part of the sum goes to `shard`, once it is waited for.

    Args: full: (S, ...), of which each rank gets S / ranks. shard: may be a view of it.
    Source: torch.distributed.
    """
    # torch 2.13 has a new name for reduce_scatter_tensor, and one for all_gather_into_tensor.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce_scatter(shard, full, group=group, async_op=True)


def start_all_gather(full: Tensor, shard: Tensor, group: Group) -> dist.Work:
    """Puts all ranks' shards into `full`, once it is waited for. Args: full, shard: as above.

    Source: torch.distributed.
    """
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return all_gather(full, shard, group=group, async_op=True)


class Bucket:
    """Parameters in one flat tensor, padded to a multiple of dp, and their gradients in another.

    Each parameter becomes a view of `data`, and its p.main_grad a view of `grad`, at least fp32.
    Args: params: by name, of one dtype. group: the replicas.
    Raises: ValueError for a parameter that is in a bucket already.
    Source: Megatron-LM's param_and_grad_buffer; ZeRO, section 5.
    """

    def __init__(self, params: Params, group: Group = None):
        self.params = params
        self.group = group
        self.starts: dict[str, int] = {}  # of each parameter in the flat tensor
        self.work: dist.Work | None = None  # in flight
        elements = sum(p.numel() for p in params.values())
        first = next(iter(params.values()))
        self.data = first.new_zeros(padded_length(elements, group_size(group)))
        self.grad = torch.zeros_like(at_least_fp32(self.data))
        end = 0
        for name, p in params.items():
            if hasattr(p, "main_grad"):
                raise ValueError(f"{name} is in a bucket already: a parameter is in one alone")
            self.starts[name] = end
            span = slice(end, end + p.numel())
            self.data[span].copy_(p.detach().flatten())
            p.data = self.data[span].view_as(p)
            p.main_grad = self.grad[span].view_as(p)
            p.grad = None  # of a backward before: it is of no step
            end = span.stop

    def shard(self, flat: Tensor) -> Tensor:
        """This rank's part of flat (n,), which is `data` or `grad`: a view."""
        return flat.chunk(group_size(self.group))[group_rank(self.group)]

    # Of `grad`, in place: only this rank's shard of it is valid afterwards.
    def start_reduce_scatter(self) -> None:
        if group_size(self.group) > 1:
            self.work = start_reduce_scatter(self.shard(self.grad), self.grad, self.group)

    # Of `data` or `grad`, in place.
    def start_all_gather(self, flat: Tensor) -> None:
        if group_size(self.group) > 1:
            self.work = start_all_gather(flat, self.shard(flat), self.group)

    def wait(self) -> None:
        """For the last collective that was started, if there was one."""
        if self.work is not None:
            self.work.wait()
        self.work = None


def split_into_buckets(params: Params, elements: int, alone: tuple = ()) -> list[Params]:
    """`params` in reverse order, in buckets of at least `elements`; `alone` get one each.

    Source: Megatron-LM's param_layout.
    """
    buckets = []
    room = 0  # for so many elements in the last bucket
    for name, p in reversed(params.items()):
        if room <= 0 or name in alone:
            buckets.append({})
            room = elements
        buckets[-1][name] = p
        room = 0 if name in alone else room - p.numel()
    return buckets


class ParamAndGradBuffer:
    """All parameters of a rank in buckets. From here on gradients are in p.main_grad, not p.grad.

    Use: zero_grad(); backward of each micro-batch, with `is_last_microbatch` set before the last;
    finish_reduce_scatter(). After it only this rank's shard of each bucket's `grad` is valid.
    Reentrant checkpoints make several gradients of a parameter in one backward: do not use them.

    Args: named: named_parameters(), of one dtype, to which others would be cast; frozen ones are
        left out. group: the replicas. elements: the least size of a bucket. alone: names that get a
        bucket of their own.
    Raises: ValueError for a name or a parameter that is there twice, also in another buffer. While
        backward runs, RuntimeError for a gradient that comes after its reduce-scatter has started.
    Source: Megatron-LM's param_and_grad_buffer.
    """

    def __init__(self, named: Named, group: Group = None, elements: int = 2**25, alone: tuple = ()):
        trained = {}
        for name, p in named:
            if name in trained:
                raise ValueError(f"two parameters have the name {name}: give each model a prefix")
            if p.requires_grad:
                trained[name] = p
        self.zero = at_least_fp32(p.new_zeros(()))  # where all are frozen, there is no bucket
        self.group = group
        self.alone = set(alone)
        parts = split_into_buckets(trained, elements, alone)
        self.buckets = [Bucket(params, group) for params in parts]
        for bucket in self.buckets:
            for name, p in bucket.params.items():
                p.register_post_accumulate_grad_hook(partial(self._accumulate, bucket, name))
        self.zero_grad()

    # Before the first micro-batch of a step.
    def zero_grad(self) -> None:
        self.is_last_microbatch = False
        self.waiting = deque(self.buckets)  # those whose reduce-scatter has not started
        for bucket in self.buckets:
            bucket.grad.zero_()
            bucket.missing = set(bucket.params)

    def _accumulate(self, bucket: Bucket, name: str, p: nn.Parameter) -> None:
        grad = p.grad
        p.grad = None
        if bucket not in self.waiting:
            late = f"{name} got another gradient after its reduce-scatter had started"
            raise RuntimeError(f"{late}: set is_last_microbatch before the last backward alone")
        p.main_grad.add_(grad)  # upcasts
        if self.is_last_microbatch:
            bucket.missing.discard(name)
            while self.waiting and not self.waiting[0].missing:
                self.waiting.popleft().start_reduce_scatter()

    def finish_reduce_scatter(self) -> None:
        """Starts the buckets with parameters that got no gradient, and waits for all."""
        while self.waiting:
            self.waiting.popleft().start_reduce_scatter()
        for bucket in self.buckets:
            bucket.wait()


# ── 1.3 The sharded optimizer ───────────────────────────────────────────────────────────────────
#
# Each rank makes fp32 masters of its shard of every bucket, and a plain torch optimizer for them.
# Weight decay and checkpoints ask which parameter an element belongs to, so a shard is cut into
# pieces, one for each parameter that it touches. The optimizer's parameters are those pieces, and
# its gradients are views of `main_grad`: nothing is copied before the step.
#
# Why masters, when parameters are bf16? Next to 1.0 bf16 has 1 − 2⁻⁸ and 1 + 2⁻⁷. AdamW's step is
# about the learning rate, 1e-3, and 1 − 1e-3 rounds back to 1. So without masters the weights of
# every LayerNorm stay exactly 1.0 while the loss falls: matrices, whose weights are small, still
# learn. Part 5 measures it. In the master such steps add up until bf16 shows them.
#
# The same holds for any weight that has grown: near 0.5 bf16 values are 0.002 to 0.004 apart. Some
# systems round at random, so that small steps count on average (stochastic rounding); masters
# need no such care, and cost 4 bytes a parameter, divided by dp.
#
# For fp32 and float64 parameters the master is the parameter's own memory: `at_least_fp32` copies
# nothing. The state is then 8 bytes a parameter, and not 12.
#
# `step` runs on every rank, also where a shard is all padding: the all-gather needs them all. The
# result equals the unsharded optimizer to the bit, given equal gradients: AdamW and SGD compute
# each element by itself. (The gradients of equal batches are equal up to rounding, since sums over
# ranks are added in another order.)


@dataclass
class Piece:
    """The part of one parameter that this rank updates. Source: Megatron-LM's Range."""

    name: str
    p: nn.Parameter
    start: int  # its first element in the flattened parameter
    master: Tensor  # (n,), at least fp32; its .grad is a view of the bucket's

    def part(self, x: Tensor) -> Tensor:
        """This piece, (n,), of x (...), a tensor of the parameter's shape."""
        return x.flatten()[self.start : self.start + len(self.master)]


class DistributedOptimizer:
    """A torch optimizer whose state is sharded over the replicas: ZeRO stage 1.

    Use: load the weights before, or the masters are those of other weights. step() returns with
    all parameters updated on every rank. Learning rates are in `param_groups`.

    Args: buffer: of all trained parameters. make: called with two parameter groups, matrices and
        vectors, of which the second has no weight decay; returns the optimizer. It must be
        elementwise: not one that uses a parameter's shape or norm.
    Source: ZeRO, section 5.1; Megatron-LM's distributed optimizer.
    """

    def __init__(self, buffer: ParamAndGradBuffer, make: Callable[[list[dict]], Optimizer]):
        self.buffer = buffer
        self.pieces: list[Piece] = []
        for bucket in buffer.buckets:
            bucket.master = at_least_fp32(bucket.shard(bucket.data))
            self.pieces += pieces_of(bucket)
        groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for piece in self.pieces:
            is_vector = piece.p.ndim < 2
            groups[is_vector]["params"].append(piece.master)
        self.optimizer = make(groups)
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        """Updates this rank's pieces, and gets the others'. Collective over the replicas."""
        self.optimizer.step()
        self.gather_parameters()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Masters, downcast, to the parameters of every rank. Collective over the replicas."""
        for bucket in self.buffer.buckets:
            bucket.shard(bucket.data).copy_(bucket.master)
            bucket.start_all_gather(bucket.data)
        for bucket in self.buffer.buckets:
            bucket.wait()


def pieces_of(bucket: Bucket) -> list[Piece]:
    """This rank's part of each parameter of a bucket; none where a parameter lies elsewhere.

    Source: Megatron-LM's distributed optimizer.
    """
    length = len(bucket.master)
    first = group_rank(bucket.group) * length  # the shard's first element, in the bucket
    grad = bucket.shard(bucket.grad)
    pieces = []
    for name, p in bucket.params.items():
        offset = bucket.starts[name] - first  # of the parameter, in the shard
        begin = max(offset, 0)
        end = min(offset + p.numel(), length)
        if begin < end:
            master = bucket.master[begin:end]
            master.grad = grad[begin:end]
            pieces.append(Piece(name, p, begin - offset, master))
    return pieces


# ── 1.4 The end of a step ───────────────────────────────────────────────────────────────────────
#
# After the last backward, `main_grad` of a rank is the gradient of the *sum* of its own losses. It
# is a partial sum in up to three ways. Each line completes one; the columns say what the gradient
# is over each axis before the line:
#
#                                            over dp     over tp, of        on first and
#                                                        replicated ones    last stage, tied
#     1  reduce-scatter over dp              partial     partial (sp)       partial
#     2  all-reduce over tp, with sp         sharded     partial (sp)       partial
#     3  all-reduce over the tied pair       sharded     replicated         partial
#     4  divide by the global token count    sharded     replicated         replicated
#     5  norm, each element once             sharded     replicated         replicated
#     6  clip
#     7  AdamW on the shard; all-gather      the parameters are replicated again
#
# Line 2: with sequence parallelism LayerNorm weights and row-parallel biases have seen this rank's
# tokens only (chapter 4). Ranks of a tp group have equal layouts, so equal pieces meet. Without sp
# these gradients are complete, and another sum would make them tp times too large.
# Line 3: the first stage has the embedding's part and the last the output layer's. Both sum the
# same shard, because the bucket is the same on both.
# Line 4: replicas rarely have equally many targets that count, so only the sum of losses adds up.
# It is divided once, here, by the count of all replicas. (bf16 has the range of fp32: gradients of
# a sum do not overflow. In fp16 they would.)
#
# An example of line 3 on dp = 2, where E has the elements e0 e1 e2 e3. The first stage has the
# bucket [E], and its rank 0 owns e0 e1. If the last stage had the bucket [n0 n1 E], its rank 0
# would own n0 n1 e0, and its rank 1 e1 e2 e3. The sum over the pair would then add an e1 that is
# reduced to one that is not. The loss falls all the same. In a bucket of its own E is cut alike.
#
# Lines 1 to 3 are sums, which are linear, and 4 is a factor: their order does not matter for the
# result. The order of 5 and 6 does. The norm of partial sums is not the norm of the sum, and a
# norm clipped before line 4 is as many times too large as there are tokens.
#
# Line 5: a shard of dp has each element once. Replicated parameters count on tp rank 0 alone, the
# tied weight on the first stage alone, and padding belongs to no piece. Counted on every tp rank,
# replicated ones would enlarge the norm, and training would be slower, silently.


@torch.no_grad()
def finalize_model_grads(
    optimizer: DistributedOptimizer, mesh: ParallelMesh, partial_count: Tensor
) -> Tensor:
    """Lines 1 to 4: makes each piece's gradient that of the mean loss per token of all replicas.

    Args: partial_count: targets that count in this replica's batch, a scalar; not modified.
    Returns: the global count, at least 1, a scalar. Source: Megatron-LM's function of this name.
    """
    buffer = optimizer.buffer
    buffer.finish_reduce_scatter()
    grads = [piece.master.grad for piece in optimizer.pieces if shard_dim(piece.name) is None]
    if mesh.sp and grads:  # of replicated parameters
        total = _all_reduce(torch.cat(grads), mesh.tp_group)
        torch._foreach_copy_(grads, total.split([len(grad) for grad in grads]))
    count = _all_reduce(partial_count.clone(), mesh.dp_group).clamp(min=1)
    for bucket in buffer.buckets:
        grad = bucket.shard(bucket.grad)
        if not buffer.alone.isdisjoint(bucket.params):
            _all_reduce(grad, mesh.tied_group)
        grad.div_(count)
    return count


@torch.no_grad()
def clip_grad_norm_(optimizer: DistributedOptimizer, max_norm: float, mesh: ParallelMesh) -> Tensor:
    """Lines 5 and 6: scales all gradients so that their norm is at most max_norm.

    Returns: the norm before clipping over all ranks, a scalar tensor, the same on each: that of
    torch.nn.utils.clip_grad_norm_ for the plain model. Source: Megatron-LM's clip_grads.
    """
    total = optimizer.buffer.zero.clone()  # all of it where a shard is all padding
    for piece in optimizer.pieces:
        # Each element counts on one rank of all.
        is_replica = mesh.tp_rank > 0 and shard_dim(piece.name) is None
        is_tied_copy = mesh.pp_rank > 0 and piece.name in optimizer.buffer.alone
        if not (is_replica or is_tied_copy):
            total += torch.linalg.vector_norm(piece.master.grad).square()
    norm = _all_reduce(total).sqrt()
    nn.utils.clip_grads_with_norm_([piece.master for piece in optimizer.pieces], max_norm, norm)
    return norm


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# BLOOM has no positions. ALiBi adds to the score of query i and key j a bias that falls with their
# distance, slope · (j − i), with one slope per head: 2^-1 to 2^-8 for 8 heads. [arXiv 2108.12409]
# Where the number of heads is no power of two, as BLOOM's 112, the slopes are those of the next
# lower power, 64, and then every other one of twice that, 128:
#
#     64 slopes 2^(−i/8), i = 1, 2, ... 64, then 48 slopes 2^(−i/16), i = 1, 3, ... 95
#
# They are not monotone, and 2^(−8i/112) is another model. BLOOM adds slope · j: equal after
# softmax, which ignores a constant per row. Here it is slope · (j − i): bf16 keeps small values
# exactly, and the keys that matter are near. A slope that is itself bf16 would be off by up to
# 0.2 %, and 2,000 tokens away its bias by several units: so slopes are computed in float64.
#
# LayerNorm after the embedding keeps the start of training stable. The output layer is tied.


def alibi_slopes(heads: int, device: Any = None) -> Tensor:
    """ALiBi's slopes, slope_N in float64. Source: Press et al., 2022, section 3, and their code."""
    power = 2 ** int(math.log2(heads))
    index = torch.arange(1, 2 * power + 1, device=device, dtype=torch.float64)
    first = torch.exp2(index[:power] * (-8 / power))
    second = torch.exp2(index[::2] * (-4 / power))
    return torch.cat([first, second])[:heads]


def alibi_bias(config: GPTConfig, mesh: ParallelMesh, S: int, like: Tensor) -> Tensor:
    """The additive mask of this rank's heads, bias_nSS: −∞ for later keys.

    tp rank r has heads [r·n, (r + 1)·n), as in chapter 2. Args: like: a tensor (...) of the dtype
        and device.
    """
    # All slopes first, then this rank's: those of n heads alone would be other slopes.
    slope_n = alibi_slopes(config.num_heads, like.device).chunk(mesh.tp)[mesh.tp_rank]
    index_S = torch.arange(S, device=like.device)
    distance_SS = index_S - index_S[:, None]  # j − i
    bias_nSS = slope_n[:, None, None] * distance_SS
    bias_nSS = bias_nSS.masked_fill(distance_SS > 0, -torch.inf)
    return bias_nSS.to(like.dtype)


class Block(nn.Module):
    """One layer, x_sBH to (s, B, H). On a single device s = S, n = N, f = F, and `enter_tp` and
    `leave_tp` do nothing (section 2.2). Source: BLOOM's paper, section 3.2."""

    def __init__(self, config: GPTConfig, mesh: ParallelMesh):
        super().__init__()
        H = config.hidden_size
        self.head_size = H // config.num_heads
        self.mesh = mesh
        self.norm1 = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)
        self.norm2 = nn.LayerNorm(H)
        self.up = nn.Linear(H, 4 * H)
        self.down = nn.Linear(4 * H, H)

    def forward(self, x_sBH: Tensor, bias_nSS: Tensor) -> Tensor:
        x_SBH = enter_tp(self.norm1(x_sBH), self.mesh)
        # Rows of qkv are ordered (head, {q, k, v}, D): a shard has some heads, complete.
        D = self.head_size
        qkv_3BnSD = rearrange(self.qkv(x_SBH), "S B (n k D) -> k B n S D", k=3, D=D)
        y_BnSD = F.scaled_dot_product_attention(*qkv_3BnSD, attn_mask=bias_nSS)
        y_SBh = rearrange(y_BnSD, "B n S D -> S B (n D)")
        x_sBH = x_sBH + self.row_parallel(y_SBh, self.out)
        x_SBH = enter_tp(self.norm2(x_sBH), self.mesh)
        y_SBf = F.gelu(self.up(x_SBH), approximate="tanh")
        return x_sBH + self.row_parallel(y_SBf, self.down)

    # The second matrix of a sublayer: y (S, B, f) to (s, B, H).
    def row_parallel(self, y_SBf: Tensor, linear: nn.Linear) -> Tensor:
        partial_z_SBH = F.linear(y_SBf, linear.weight)
        return leave_tp(partial_z_SBH, self.mesh) + linear.bias  # once, after the sum


class GPT(nn.Module):
    """BLOOM on a single device: tokens_BS (int64) to logits_SBV.

    Args: mesh is for `Stage`. Source: BLOOM's paper, section 3.2.
    """

    def __init__(self, config: GPTConfig, mesh: ParallelMesh = ParallelMesh()):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.mesh = mesh
        self.embedding = nn.Embedding(config.vocab_size, H)
        self.embedding_norm = nn.LayerNorm(H)
        self.layers = nn.ModuleList(Block(config, mesh) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(H)
        if config.untied:
            self.head = nn.Linear(H, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if not p.is_meta:  # on "meta" there are shapes without memory
                p.data.copy_(initial_weight(name, p.shape, config))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_SBH = self.embedding_norm(self.embedding(tokens_BS.T))
        bias_NSS = alibi_bias(self.config, self.mesh, len(x_SBH), x_SBH)
        for layer in self.layers:
            x_SBH = layer(x_SBH, bias_NSS)
        return F.linear(self.final_norm(x_SBH), self.output_weight())

    # The output layer's, (V, H), or on a rank (v, H).
    def output_weight(self) -> Tensor:
        return self.head.weight if self.config.untied else self.embedding.weight

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(at_least_fp32(self(tokens_BS)), "S B V -> B V S")
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")


def initial_weight(name: str, shape: torch.Size, config: GPTConfig) -> Tensor:
    """A parameter's full initial value (...): a function of config.seed and its name.

    Drawn on the CPU: a GPU's generator gives other values. Source: ours.
    """
    if len(shape) == 1:  # LayerNorm's weights are 1, and all biases 0
        return torch.full(shape, float(name.endswith("weight")), device="cpu")
    key = zlib.crc32(f"{config.seed} {name}".encode())  # Python's hash() differs between processes
    generator = torch.Generator().manual_seed(key)
    return config.init_std * torch.randn(shape, generator=generator, device="cpu")


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name to shape of every parameter of the plain model, without memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


# ── 2.2 Tensor and sequence parallelism, as small as chapters 2 and 4 allow ─────────────────────
#
# A column-parallel matrix (qkv, up), plain computation on n heads or f features, a row-parallel
# matrix (out, down). One operator enters this tensor-parallel region and one leaves it:
#
#              with sp (chapter 4)                    without (chapter 2)
#              forward           backward             forward        backward
#     enter    all-gather        reduce-scatter       identity       all-reduce
#     leave    reduce-scatter    all-gather           all-reduce     identity
#
# The two are a conjugate pair: forward of one is backward of the other. Outside the region each
# rank has s = S / tp tokens with sp, and all S without.


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mesh, enters):
        ctx.mesh = mesh
        ctx.enters = enters
        return _cross(x, mesh, enters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _cross(grad, ctx.mesh, not ctx.enters), None, None


def enter_tp(x_sBH: Tensor, mesh: ParallelMesh) -> Tensor:
    """(s, B, H) to (S, B, H), replicated, before a column-parallel matrix.

    Source: f of Megatron-LM, section 3; g of Korthikanti et al., 2022, section 4.2.2.
    """
    return x_sBH if mesh.tp == 1 else _Operator.apply(x_sBH, mesh, True)


def leave_tp(partial_x_SBH: Tensor, mesh: ParallelMesh) -> Tensor:
    """(S, B, H), a partial sum, to (s, B, H), after a row-parallel matrix. Source: as above."""
    return partial_x_SBH if mesh.tp == 1 else _Operator.apply(partial_x_SBH, mesh, False)


def _cross(x: Tensor, mesh: ParallelMesh, enters: bool) -> Tensor:
    if mesh.sp:
        return _gather(x, mesh) if enters else _reduce_scatter(x, mesh)
    x = x.clone(memory_format=torch.contiguous_format)  # a sum is in place
    return x if enters else _all_reduce(x, mesh.tp_group)


def _gather(x_sBH: Tensor, mesh: ParallelMesh) -> Tensor:
    s, *others = x_sBH.shape
    x_SBH = x_sBH.new_empty(s * mesh.tp, *others)
    start_all_gather(x_SBH, x_sBH.contiguous(), mesh.tp_group).wait()
    return x_SBH


def _reduce_scatter(partial_x_SBH: Tensor, mesh: ParallelMesh) -> Tensor:
    S, *others = partial_x_SBH.shape
    x_sBH = partial_x_SBH.new_empty(S // mesh.tp, *others)
    start_reduce_scatter(x_sBH, partial_x_SBH.contiguous(), mesh.tp_group).wait()
    return x_sBH


def local_rows(ids_SB: Tensor, v: int, mesh: ParallelMesh) -> tuple[Tensor, Tensor]:
    """Rows (S, B) of token ids in this rank's vocabulary shard, and which ids are local."""
    row_SB = ids_SB - mesh.tp_rank * v
    return row_SB.clamp(0, v - 1), (row_SB >= 0) & (row_SB < v)


def vocab_parallel_loss(
    logits_SBv: Tensor, targets_SB: Tensor, vocab_size: int, mesh: ParallelMesh
) -> Tensor:
    """Cross entropy per token, loss_SB, from logits with a sharded vocabulary; 0 for target −100.

    Chapter 2's, written with operators that autograd knows: it keeps one more tensor SBv. The loss
    is replicated, so its sum over tp is identity in backward.
    """
    v = logits_SBv.shape[-1]
    x_SBv = at_least_fp32(logits_SBv)
    index_v = torch.arange(v, device=x_SBv.device)
    is_padding_v = index_v >= vocab_size - mesh.tp_rank * v
    x_SBv = x_SBv.masked_fill(is_padding_v, -torch.inf)
    max_SB = _all_reduce(x_SBv.detach().amax(-1), mesh.tp_group, dist.ReduceOp.MAX)
    x_SBv = x_SBv - max_SB[..., None]
    row_SB, is_local_SB = local_rows(targets_SB, v, mesh)
    target_SB = x_SBv.gather(-1, row_SB[..., None])[..., 0]
    partial_target_SB = torch.where(is_local_SB, target_SB, 0)
    partial_sum_SB = x_SBv.exp().sum(-1)
    partial_2SB = torch.stack([partial_target_SB, partial_sum_SB])
    target_SB, sum_SB = leave_tp(partial_2SB, replace(mesh, sp=False))
    return torch.where(targets_SB != -100, sum_SB.log() - target_SB, 0)


# ── 2.3 A stage ─────────────────────────────────────────────────────────────────────────────────
#
# BLOOM's embedding has 3.6 billion parameters and a layer 2.5: a split by layers alone would make
# the first and the last stage the largest. So embedding and output layer count as one unit each:
# 72 units on 12 stages are 5 layers, 10 times 6 layers, and 5 layers.
#
# With a tied output layer the first and the last stage each have a copy of the embedding. LayerNorm
# after the embedding belongs to the first stage alone, and follows the sum over tp. Before the sum
# it would normalise rows that are zero on all ranks but one.
#
# A stage is the plain model without the parameters of other stages, and with this tp rank's shards.
# Recomputation keeps a layer's input only and runs the layer again in backward, as both papers'
# runs did. There is no dropout, so nothing random must be repeated.


def place_layers(layers: int, stages: int) -> list[list[int]]:
    """The layers of each stage; embedding and output layer count as a unit each.

    Raises: ValueError for more stages than units. Source: BLOOM's training scripts.
    """
    if layers + 2 < stages:
        raise ValueError(f"pp={stages}, but {layers} layers, embedding and head are fewer units")
    placement = []
    for units in np.array_split(range(-1, layers + 1), stages):  # −1 is the embedding
        placement.append([unit for unit in units.tolist() if 0 <= unit < layers])
    return placement


def stages_of(name: str, config: GPTConfig, pp: int) -> list[int]:
    """The stages that hold parameter `name`: one, or for a tied embedding the two ends."""
    module, _, rest = name.partition(".")
    if module == "layers":
        layer = int(rest.partition(".")[0])
        placement = place_layers(config.num_layers, pp)
        return [stage for stage, layers in enumerate(placement) if layer in layers]
    if module == "embedding" and not config.untied:
        return sorted({0, pp - 1})
    return [0] if module in ("embedding", "embedding_norm") else [pp - 1]


class Stage(GPT):
    """This rank's part of GPT(config): its stage's layers, sharded over tp.

    Its parameters have the plain model's names and initial weights, for every mesh.
    Args: recompute: keep each layer's input only.
    Raises: ValueError where the sizes do not fit the mesh. Source: both papers.
    """

    def __init__(self, config: GPTConfig, mesh: ParallelMesh, recompute: bool = False):
        check_heads(config, mesh.tp)
        with torch.device("meta"):  # all shapes, without memory
            super().__init__(config, mesh)
        self.recompute = recompute
        self.is_first = mesh.pp_rank == 0
        self.is_last = mesh.pp_rank == mesh.pp - 1
        self.mine = place_layers(config.num_layers, mesh.pp)[mesh.pp_rank]
        for name, p in list(self.named_parameters()):
            module, _, kind = name.rpartition(".")
            shard = None
            if mesh.pp_rank in stages_of(name, config, mesh.pp):
                full = initial_weight(name, p.shape, config)
                shard = nn.Parameter(shard_tensor(name, full, config, mesh))
            setattr(self.get_submodule(module), kind, shard)

    def embed(self, tokens_SB: Tensor) -> Tensor:
        weight_vH = self.embedding.weight
        row_SB, is_local_SB = local_rows(tokens_SB, len(weight_vH), self.mesh)
        partial_x_SBH = F.embedding(row_SB, weight_vH) * is_local_SB[..., None]
        return self.embedding_norm(leave_tp(partial_x_SBH, self.mesh))

    def forward(self, x: Tensor, targets_BS: Tensor) -> Tensor:
        """x: tokens_BS on the first stage, x_sBH on others. To (s, B, H); on the last stage to the
        sum of the targets' losses, a scalar, replicated over tp, at least fp32."""
        x_sBH = self.embed(x.T) if self.is_first else x
        bias_nSS = alibi_bias(self.config, self.mesh, targets_BS.shape[1], x_sBH)
        for i in self.mine:
            run = partial(checkpoint, use_reentrant=False) if self.recompute else nn.Module.__call__
            x_sBH = run(self.layers[i], x_sBH, bias_nSS)
        if not self.is_last:
            return x_sBH
        x_SBH = enter_tp(self.final_norm(x_sBH), self.mesh)
        logits_SBv = F.linear(x_SBH, self.output_weight())
        V = self.config.vocab_size
        return vocab_parallel_loss(logits_SBv, targets_BS.T, V, self.mesh).sum()


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# A parameter is sharded over tp along one dimension, or replicated; it is on one stage or, tied, on
# two; and it is the same on all replicas. Merging undoes all three, and copies must be equal to the
# bit: a forgotten sum shows here.

SHARD_DIM = {
    "embedding.weight": 0,  # by vocabulary entries, as the head
    "head.weight": 0,
    "qkv.weight": 0,  # by heads: the outputs of the column-parallel matrix
    "qkv.bias": 0,
    "out.weight": 1,  # by heads: the inputs of the row-parallel matrix
    "up.weight": 0,  # by features
    "up.bias": 0,
    "down.weight": 1,
}


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is sharded over tp; None: it is replicated."""
    return SHARD_DIM.get(".".join(name.split(".")[-2:]))


def check_heads(config: GPTConfig, tp: int) -> None:
    """Raises ValueError where hidden size, heads and `tp` ranks do not divide."""
    H = config.hidden_size
    N = config.num_heads
    if H % N or N % tp:
        raise ValueError(f"hidden_size={H}, num_heads={N}, tp={tp}: each divides the one before")


def shard_tensor(name: str, full: Tensor, config: GPTConfig, mesh: ParallelMesh) -> Tensor:
    """This tp rank's shard of full (...), the plain model's parameter `name`; a copy."""
    dim = shard_dim(name)
    if dim is None:
        return full.clone()
    if name in ("embedding.weight", "head.weight"):
        rows = padded_length(config.vocab_size, mesh.tp)
        full = F.pad(full, (0, 0, 0, rows - config.vocab_size))
    shard = full.chunk(mesh.tp, dim)[mesh.tp_rank]
    return shard.clone(memory_format=torch.contiguous_format)


def shard_state_dict(full: StateDict, config: GPTConfig, mesh: ParallelMesh) -> StateDict:
    """The plain model's state dict to this rank's; copies.

    Raises: ValueError that names what is missing, unknown or of another shape.
    """
    shapes = {name: x.shape for name, x in full.items()}
    wrong = shapes.items() ^ parameter_shapes(config).items()
    if wrong:
        raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")
    shards = {}
    for name, x in full.items():
        if mesh.pp_rank in stages_of(name, config, mesh.pp):
            shards[name] = shard_tensor(name, x, config, mesh)
    return shards


def merge_state_dicts(shards: list[StateDict], config: GPTConfig, mesh: ParallelMesh) -> StateDict:
    """All ranks' state dicts, in order of rank, to the plain model's; gradients work as well.

    Raises: ValueError for a missing rank, and where copies differ.
    """
    ranks = mesh.tp * mesh.pp * mesh.dp
    if len(shards) != ranks:
        raise ValueError(f"{len(shards)} state dicts, but the mesh has {ranks} ranks")
    full = {}
    for name, shape in parameter_shapes(config).items():
        copies = []
        stages = stages_of(name, config, mesh.pp)
        for pp_rank, dp_rank in itertools.product(stages, range(mesh.dp)):
            first = rank_of(mesh, 0, pp_rank, dp_rank)  # the ranks of a tp group are neighbours
            x = [shard[name] for shard in shards[first : first + mesh.tp]]
            if shard_dim(name) is not None:
                x = [torch.cat(x, shard_dim(name))]
            copies += x
        for x in copies[1:]:
            if not torch.equal(x, copies[0]):
                raise ValueError(f"the copies of {name} differ between ranks: is a sum missing?")
        full[name] = copies[0][: shape[0]].clone()  # without the padding of the vocabulary
    return full


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# ── 4.1 Stages: 1F1B, and the messages between them ─────────────────────────────────────────────
#
# Autograd sees one stage at a time. What arrives from the stage before becomes a leaf of the graph,
# and its gradient is sent back. For each micro-batch in flight a stage holds that leaf, and the
# edge at which backward enters its graph. Both are dropped after the micro-batch's backward.
#
# Chapter 3 derives the schedule: pp − pp_rank − 1 forwards run ahead, then forwards and backwards
# alternate. One column below is the forward of micro-batch `column` and the backward of micro-batch
# `column − ahead`. What two neighbours have for each other at the same time is one batch of
# messages (`batch_isend_irecv`): if both sent first, both could wait for ever.
#
#     stage 0 of 2, m = 3      column 0   column 1   column 2   column 3
#         forward                 F0         F1         F2
#         with stage 1         ─► y0      ─► y1 ◄ dy0 ─► y2 ◄ dy1   ◄ dy2
#         backward                           B0         B1         B2
#
# Without sequence parallelism all tp ranks of a stage have the same output. Sent by each of them,
# it would pass tp times over the network between servers. So each sends its tokens of it, 1/tp, and
# the receivers all-gather inside their server: PTD-P's scatter/gather, section 4.1 of its paper.
#
#     tp rank 0   x ─► first half   ═══ network ═══►  tp rank 0  ─┐
#     tp rank 1   x ─► second half  ═══ network ═══►  tp rank 1  ─┴─ all-gather ─►  x on both
#
# With sequence parallelism each rank has its own tokens already: they are sent as they are. Cut
# again, half of them would be lost and the other half received twice.


def exchange(
    mesh: ParallelMesh, like: Tensor, direction: int, send: Tensor | None, receives: bool
) -> Tensor | None:
    """Sends to the next stage (+1) or the one before (−1) and receives from it, as one batch.

    Args: like: an empty tensor of the messages' shape (S / tp, B, H), dtype and device. send: the
        stage's output or its input's gradient (s, B, H). receives: whether the other one sends.
    Returns: what was received; None where there is no such stage, or nothing to receive.
    """
    peer = mesh.pp_rank + direction
    if not 0 <= peer < mesh.pp:
        return None
    cuts = mesh.tp > 1 and not mesh.sp
    # gloo sends no GPU memory from rank to rank: the message goes through the CPU's.
    wire = "cpu" if dist.get_backend(mesh.pp_group) == "gloo" else like.device
    received = torch.empty_like(like, device=wire)
    message = partial(dist.P2POp, group=mesh.pp_group, group_peer=peer)
    calls = []
    if send is not None:
        part = send.chunk(mesh.tp)[mesh.tp_rank] if cuts else send
        calls.append(message(dist.isend, part.detach().to(wire).contiguous()))
    if receives:
        calls.append(message(dist.irecv, received))
    for work in dist.batch_isend_irecv(calls):
        work.wait()  # on a GPU the stream waits, not the CPU
    if not receives:
        return None
    received = received.to(like.device)
    return _gather(received, mesh) if cuts else received


def run_1f1b(
    stage: Stage, buffer: ParamAndGradBuffer, tokens_BS: Tensor, targets_BS: Tensor, rows: int
) -> Tensor:
    """Forward and backward of this replica's batch. Every rank of the mesh must call it.

    Afterwards main_grad is the gradient of the sum of this replica's losses, and the buckets'
    reduce-scatters are in flight.
    Args: tokens_BS, targets_BS: int64, the same on every rank of a replica; target −100 does not
        count. rows: of a micro-batch.
    Returns: the sum of losses, a scalar; 0 on all stages but the last. Source: chapter 3.
    """
    mesh = stage.mesh
    tokens = tokens_BS.split(rows)
    targets = targets_BS.split(rows)
    m = len(tokens)
    ahead = min(mesh.pp - mesh.pp_rank - 1, m)
    s = tokens_BS.shape[1] // mesh.tp
    like = next(stage.parameters()).new_empty(s, rows, stage.config.hidden_size)
    messages = partial(exchange, mesh, like)
    loss = buffer.zero.clone()
    held: deque = deque()  # of each micro-batch in flight: its input, and where its graph ends
    x_sBH = None
    for column in range(m + ahead):
        y = None
        if column < m:
            if column <= ahead:  # later inputs arrive with the exchange after backward
                x_sBH = messages(-1, None, receives=True)
            x = tokens[column] if x_sBH is None else x_sBH.requires_grad_()
            y = stage(x, targets[column])
            # An edge keeps no output alive. The output of a frozen first stage has none.
            held.append((x, get_gradient_edge(y.requires_grad_())))
            if stage.is_last:
                loss += y.detach()
        dy_sBH = messages(+1, y, receives=column >= ahead)
        if column >= ahead:
            buffer.is_last_microbatch = column == m + ahead - 1
            x, edge = held.popleft()
            torch.autograd.backward(edge, dy_sBH)  # at the loss it starts from 1 (None)
            x_sBH = messages(-1, x.grad, receives=column + 1 < m)
    return loss


# ── 4.2 The loop ────────────────────────────────────────────────────────────────────────────────


def check_batch(shape: tuple[int, int], micro_batch: int, mesh: ParallelMesh) -> None:
    """Raises ValueError where a global batch (B, S) does not divide over the mesh."""
    B, S = shape
    rows = micro_batch * mesh.dp
    if B % rows:
        raise ValueError(f"a batch of {B}: choose a multiple of micro_batch · dp = {rows}")
    if S % mesh.tp:
        raise ValueError(f"{S} tokens do not divide over tp={mesh.tp}: pad them")


def make_training(stage: Stage, lr: float, elements: int = 2**25) -> DistributedOptimizer:
    """A stage's buffer and AdamW, with the settings of `make_optimizer`. Args: as the buffer's."""
    alone = () if stage.config.untied else ("embedding.weight",)
    buffer = ParamAndGradBuffer(stage.named_parameters(), stage.mesh.dp_group, elements, alone)
    return DistributedOptimizer(buffer, partial(AdamW, lr=lr, betas=(0.9, 0.95)))


def train(
    stage: Stage,
    optimizer: DistributedOptimizer,
    batches: Batches,
    micro_batch: int = 1,
    max_norm: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on a mesh: yields the same two scalars. Every rank must iterate it.

    Args: batches are global. micro_batch: rows that pass through the stages together. For a
        schedule, set the learning rate in optimizer.param_groups between two steps.
    Raises: ValueError for a batch that does not divide, before any message. Token ids are not
        checked: one outside the vocabulary becomes a row of zeros.
    """
    mesh = stage.mesh
    for tokens_BS, targets_BS in batches:
        check_batch(tokens_BS.shape, micro_batch, mesh)
        optimizer.buffer.zero_grad()
        tokens_BS = tokens_BS.chunk(mesh.dp)[mesh.dp_rank]
        targets_BS = targets_BS.chunk(mesh.dp)[mesh.dp_rank]
        loss = run_1f1b(stage, optimizer.buffer, tokens_BS, targets_BS, micro_batch)
        partial_count = (targets_BS != -100).sum()
        count = finalize_model_grads(optimizer, mesh, partial_count)
        norm = clip_grad_norm_(optimizer, max_norm, mesh)
        optimizer.step()
        loss = _all_reduce(_all_reduce(loss, mesh.pp_group), mesh.dp_group)
        yield loss / count, norm


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

# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# Of the 18 bytes a parameter, ZeRO-1 shards 12. Sharding the gradients too (stage 2) would need a
# reduce-scatter per micro-batch, since no rank could accumulate a full gradient: with a pipeline of
# many micro-batches that costs more messages than it saves memory. Sharding the parameters (stage
# 3, PyTorch's FSDP) gathers each layer before it is used. That needs no tensor parallelism and no
# pipeline, but it sends half as many elements again, in each micro-batch. fsdp.py does it, on top
# of this script.
#
# And all GEMMs of this chapter are in 16 bits. Chapter 6 has them in 8, and chapter 8 in 4.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show how rounding affects correct code (bf16: 0.4 % per GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def equivalence(mesh: ParallelMesh, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Five AdamW steps of a small model on this mesh and on a single device: name to error."""
    # The vocabulary does not divide over the ranks; replicas have unequal token counts.
    heads = 2 * mesh.tp
    layers = mesh.pp + 1
    config = GPTConfig(61, layers, hidden_size=8 * heads, num_heads=heads)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4 * mesh.dp, 4 * mesh.tp)
    ids_2BS = torch.randint(61, shape, generator=generator)
    tokens_BS, targets_BS = ids_2BS.to(device)
    targets_BS[0, 3:] = -100
    batches = [(tokens_BS, targets_BS)] * 5
    plain = GPT(config).to(device, dtype)
    alone = train_alone(plain, make_optimizer(plain, 1e-3), batches, max_norm=0.1)
    stage = Stage(config, mesh).to(device, dtype)
    optimizer = make_training(stage, 1e-3, elements=1000)
    steps = train(stage, optimizer, batches, micro_batch=2, max_norm=0.1)
    errors = {}
    for step, (expected, found) in enumerate(zip(alone, steps)):
        loss, norm = torch.stack(found) / torch.stack(expected) - 1
        errors[f"loss {step}"] = abs(loss.item())
        errors[f"norm before clipping {step}"] = abs(norm.item())
        if step == 0:
            full = {name: p.grad for name, p in plain.named_parameters()}
            shards = shard_state_dict(full, config, mesh)
            here = {piece.name: piece.master.grad for piece in optimizer.pieces}
            parts = {piece.name: piece.part(shards[piece.name]) for piece in optimizer.pieces}
            errors |= relative_errors("gradient", here, parts, floor=1e-6)
    if dtype == torch.float64:
        # Where a gradient is zero, Adam divides rounding errors by each other: in fp32 the weights
        # of a right program differ too.
        shards = shard_state_dict(plain.state_dict(), config, mesh)
        errors |= relative_errors("weight after AdamW", stage.state_dict(), shards, floor=5e-3)
    return over_all_ranks(errors)


def state_bytes(optimizer: DistributedOptimizer) -> int:
    """Bytes of this rank's masters and moments; fp32 masters are the parameters' own memory."""
    total = 0
    for piece in optimizer.pieces:
        moments = optimizer.optimizer.state[piece.master]
        total += piece.master.nbytes
        total += sum(x.nbytes for x in moments.values() if x.ndim)
    return total


def ones(model: GPT) -> int:
    """How many elements of this rank's parameters are exactly 1: LayerNorm weights at the start."""
    return sum(int((p == 1).sum()) for p in model.parameters())


def text_batches(args: argparse.Namespace, device: torch.device) -> Batches:
    """Global batches of this file's own text, one byte per token."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, args.seq_length + 1, 1)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(windows), generator=generator)
    for rows in order.split(args.batch)[: args.steps]:
        window_BS = windows[rows].to(device)
        yield window_BS[:, :-1], window_BS[:, 1:]


def demonstrate(
    args: argparse.Namespace, mesh: ParallelMesh, device: torch.device, dtype: str
) -> dict[str, float]:
    """Trains on text, next to the plain model; returns this rank's measurements by name."""
    dtype = DTYPES[dtype]
    config = config_from(args, GPTConfig, seed=args.seed)
    stage = Stage(config, mesh, args.recompute).to(device, dtype)
    optimizer = make_training(stage, args.lr, elements=20_000)
    plain = GPT(config).to(device, dtype)  # on every rank, so that none waits; without masters
    alone = train_alone(plain, make_optimizer(plain, args.lr), text_batches(args, device))
    steps = train(stage, optimizer, text_batches(args, device), args.micro_batch)
    begin = ones(stage)
    begin_plain = ones(plain)
    found = {}
    say("step      loss  single device    norm")
    for step, ((loss, norm), (loss_alone, _)) in enumerate(zip(steps, alone)):
        loss, norm = read_step(step, loss, norm)
        if step < 5 or step % 10 == 9:
            expected = loss_alone.item()
            say(f"{step:4}  {loss:.6f}  {expected:13.6f}  {norm:6.3f}")
        if step < 5:
            found[f"difference {step}"] = abs(loss - expected)
    found["with masters"] = ones(stage) / begin
    found["without"] = ones(plain) / begin_plain
    unsharded = 12 * sum(p.numel() for p in stage.parameters())
    found["state"] = mesh.dp * state_bytes(optimizer) / unsharded
    say()
    return found


# What this run has measured: (claim, paper, here, verdict).
def claims(args: argparse.Namespace, found: dict[str, float]) -> list[tuple]:
    rows = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = worst(found, kind)
        claim = f"every {kind} equals the single device's, float64"
        rows.append((claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"]))
    within = worst(found, f"{args.dtype} difference")
    claim = f"the first losses equal the single device's, {args.dtype}"
    rows.append((claim, "equal", f"within {within:.0e}", within <= BOUNDS[args.dtype]))
    state = worst(found, "bf16 state")
    claim = "optimizer bytes of a rank / (12·P/dp)"
    rows.append((claim, "1", f"{state:.3f}", state <= 1.02))
    masters = worst(found, "bf16 with masters")
    without = worst(found, "bf16 without")
    here = f"{masters:.0%}, {without:.0%}"
    claim = "norm weights exactly 1.0 in bf16, with masters, without"
    is_default = args.steps >= 20 and args.lr == 1e-3
    verdict = masters < 0.9 < without if is_default else "needs the default run"
    rows.append((claim, "–", here, verdict))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args)
    found = {}
    for layout in args.layouts:
        name = f"(tp, pp, dp) = {layout}"
        mesh = make_mesh(*layout, device, args.timeout, not args.no_sp)
        dtype = args.dtype if args.check else "fp64"
        here = equivalence(mesh, device, DTYPES[dtype])
        if not args.check:
            for how in (args.dtype, "bf16"):
                say(f"{how}, {name}")
                for kind, value in demonstrate(args, mesh, device, how).items():
                    here[f"{how} {kind}"] = value
        found |= {f"{kind}, {name}": value for kind, value in here.items()}
    if args.check:
        good = print_errors(found, BOUNDS[args.dtype])
    else:
        good = print_claims(claims(args, over_all_ranks(found)))
    sys.exit(not good)


@dataclass
class Options:  # the chapter's own flags
    tp: int | None = flag(None, "ranks that share each layer; None: see --dp", least=1)
    pp: int | None = flag(None, "stages; None: see --dp", least=1)
    dp: int | None = flag(None, "replicas; where all are None: several meshes", least=1)
    no_sp: bool = flag(False, "without sequence parallelism: stages send 1/tp of a tensor")
    recompute: bool = flag(False, "keep each layer's input only, recompute the rest")
    batch: int | None = flag(None, "sequences per step; None: two micro-batches per rank", least=1)
    micro_batch: int = flag(2, "sequences that pass through the stages together", least=1)
    seq_length: int = flag(64, "tokens of a sequence, S", least=1)
    lr: float = flag(1e-3, "learning rate")


def flags() -> argparse.Namespace:
    def check_args(args: argparse.Namespace):
        several = {4: [(2, 1, 2), (1, 2, 2), (2, 2, 1)], 8: [(2, 2, 2)]}
        args.layouts = several.get(args.world_size, [(1, 1, args.world_size)])
        if args.tp or args.pp or args.dp:
            args.layouts = [(args.tp or 1, args.pp or 1, args.dp or 1)]
        config = config_from(args, GPTConfig)
        # dp divides the ranks.
        args.batch = args.batch or 2 * args.micro_batch * args.world_size
        for layout in args.layouts:
            if math.prod(layout) != args.world_size:
                sizes = f"(tp, pp, dp) = {layout}"
                raise ValueError(f"{sizes}: the product is not {args.world_size} ranks")
            mesh = ParallelMesh(*layout)
            check_heads(config, mesh.tp)
            place_layers(config.num_layers, mesh.pp)
            check_batch((args.batch, args.seq_length), args.micro_batch, mesh)

    return parse_flags(__doc__, [Options, GPTConfig], check_args, ranks=4, steps=20)


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
