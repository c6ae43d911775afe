# SPDX-License-Identifier: MIT-0
"""Chapter 1. Deep Speech: data parallelism, and a loss that needs no alignment.

Papers: Deep Speech: Scaling up end-to-end speech recognition, Hannun et al., 2014, arXiv 1412.5567
        Deep Speech 2: End-to-End Speech Recognition in English and Mandarin,
        Amodei et al., 2015, arXiv 1512.02595

The problem. One network that writes letters directly replaces a speech recogniser's chain of
hand-made parts. But it needs thousands of hours of transcribed speech, weeks on one GPU, and the
transcripts do not say when each letter is spoken.

The idea. Two sums. The gradient of a large batch is the sum of the gradients of its parts, so each
GPU's process, a rank, takes some of the utterances, and a ring of messages adds the gradients up
while backward still runs. And the probability of a text is the sum over all ways in which its
letters can lie on the frames: the CTC loss needs no alignment.

    utterances      rank 0: "two one"          rank 1: "six"          each rank has the full model
                          │                          │
    convolutions, recurrent layers  ◄─ BatchNorm ─►  the same         statistics over all ranks
                          │                          │
    symbols     _ t t w _ o o _ _ o n e    _ s _ i x x _              one per frame, _ is the blank
                          │                          │
    CTC loss     all paths of "two one"     all paths of "six"
                          │                          │
    gradient              └──► ring all-reduce ◄─────┘                equal to a single device's

Run it (no flag is needed; --help lists them):

    python 01_deepspeech/deepspeech.py               2 local ranks
    python 01_deepspeech/deepspeech.py --ranks 1     one process, for a debugger
    python 01_deepspeech/deepspeech.py --check       equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 01_deepspeech/deepspeech.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        01_deepspeech/deepspeech.py

It proves in float64 that every gradient equals the single device's, trains on texts in which each
letter is a tone, and prints the claims that it has measured.

Left out: recordings, features, noise, GRU, row convolution, language model, beam search and saved
models (speech.py); the papers' tables (deepspeech_tables.py); Deep Speech 1's feed-forward layers,
bigram outputs, Mandarin, GPU kernels.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension. The
# small letter is this rank's shard of it. partial_ marks a partial sum, still to be all-reduced.
#
#     B  utterances of this rank       T  frames              t  this rank's frames (section 1.6)
#     F  frequency bins                U  labels              S  states of the CTC lattice, 2U + 1
#     C  channels of a convolution     V  symbols             P  CTC problems solved together, 2B
#     H  hidden size                   D  directions, 2
#
# A digit is a literal size. N is the number of ranks, r the index of this rank. In formulas W and U
# are weights, as in the papers: of a layer's input and of its last state. (F with a dot after it is
# torch.nn.functional.) "region shared" marks code that later chapters copy; editors fold it.

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
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
Messages = list[tuple[Tensor, int]]  # tensors, and the other rank's index in the group
Steps = Iterator[tuple[Tensor, Tensor]]  # loss and norm before clipping, scalars
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region shared: config fields
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion

ALPHABET = "_ 'abcdefghijklmnopqrstuvwxyz"  # symbol 0, written _, is the blank of CTC


@dataclass
class DeepSpeechConfig:
    """Sizes of a Deep Speech 2 network. Raises ValueError for impossible sizes."""

    num_layers: int = flag(1, "recurrent layers", least=1)
    hidden_size: int = flag(64, "hidden size, H", least=1)
    num_bins: int = 32  # F: frequency bins of a spectrogram
    # Channels, kernel (frames, bins) and stride (frames, bins) of each convolution.
    convolutions: tuple = ((8, (5, 5), (2, 2)),)
    dropout: float = 0.0  # before each layer, never on a recurrent connection
    alphabet: str = ALPHABET  # its first symbol is the blank
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        sizes = [self.num_layers, self.hidden_size, self.num_bins, len(self.convolutions)]
        for channels, kernel, stride in self.convolutions:
            sizes += [channels, *kernel, *stride]
            if not all(size % 2 for size in kernel):
                raise ValueError(f"kernel {kernel}: frames and bins must be odd")
        if min(sizes) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{self}: sizes must be at least 1, and dropout in [0, 1)")

    def after(self, size: Any, axis: int, convolutions: int | None = None) -> Any:
        """`size` frames (axis 0) or bins (axis 1) after that many convolutions, None: after all.

        Takes an int or a tensor of lengths. Masks, loss and decoder must agree to the frame. With
        an odd kernel k and k // 2 zeros on both sides, size becomes ceil(size / stride).
        """
        for _, _, stride in self.convolutions[:convolutions]:
            size = (size - 1) // stride[axis] + 1
        return size


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 Ranks, process groups and the five collectives ──────────────────────────────────────────
#
# The same program runs in several processes, which torchrun starts. A rank is one of them, and also
# its index; usually it has one GPU of its own. The world size is the number of ranks. A process
# group is some of the ranks, and a collective is a function that all ranks of a group call
# together. The backend carries the messages: NCCL between GPUs, gloo between CPUs.
#
# There are five common collectives. On two ranks, which hold a and b, or their halves [a₀ a₁] and
# [b₀ b₁]:
#
#                      before                       after
#                      rank 0      rank 1           rank 0      rank 1
#     broadcast        a           –           →    a           a
#     all-reduce       a           b           →    a + b       a + b
#     reduce-scatter   [a₀ a₁]     [b₀ b₁]     →    a₀ + b₀     a₁ + b₁      a shard of the sum each
#     all-gather       a           b           →    [a b]       [a b]
#     all-to-all       [a₀ a₁]     [b₀ b₁]     →    [a₀ b₀]     [a₁ b₁]      part i goes to rank i
#
# An all-reduce is a reduce-scatter and then an all-gather: section 1.2 builds it so. (No weight is
# broadcast in this book: ranks draw equal ones from one seed.) Point-to-point messages are the
# other kind: a send on one rank, a receive on another.
#
# If one rank does not call a collective, the others wait for it until the timeout, and fail. So
# whether a rank calls one may depend only on what is the same on all ranks, never on its own data.
#
# Every function takes a group, and None is all ranks. Without process groups there is one rank and
# no communication, so each piece also works in a plain program.


# region shared: process groups
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


# endregion

# ── 1.2 The ring all-reduce ─────────────────────────────────────────────────────────────────────
#
# N ranks hold a vector of K elements each, and all need the sum. If all sent their vectors to one
# rank, its link would carry (N − 1)·K elements. In a ring each rank sends to its right neighbour
# only, and all links work at the same time. The vector is cut into N segments. In step i rank r
# sends segment r − i to the right, and segment r − i − 1 arrives from the left (modulo N; in the
# second lap i goes on counting):
#
#     first lap, N − 1 steps     what arrives is added: a reduce-scatter. At its end rank r holds
#                                the full sum of segment r + 1
#     second lap, N − 1 steps    what arrives replaces: an all-gather
#
#        segment 0    1    2             after 2 steps      0    1    2       after 2 more
#     rank 0    a0 → a1   a2                          .    Σ1    .            Σ0  Σ1  Σ2
#     rank 1    b0   b1 → b2                          .     .   Σ2            Σ0  Σ1  Σ2
#     rank 2    c0   c1   c2 →                       Σ0     .    .            Σ0  Σ1  Σ2
#
# (→ marks what a rank sends in step 0.) Each rank sends 2·K·(N − 1)/N elements: K on two ranks, and
# never 2K, however many ranks there are. Segment s is summed in the order x_s + x_{s+1} + … and
# then copied. So the result is equal on all ranks to the bit, although floating-point sums depend
# on their order.
#
# Receives are posted before sends. If every rank began with a blocking send, each would wait for
# its right neighbour, which itself waits: a deadlock. While messages are small, a transport with
# buffers hides it.


def _exchange(receives: Messages, sends: Messages, group: Group) -> None:
    """All messages at once; empty tensors are left out. gloo has no point-to-point messages for
    CUDA tensors: those go through the CPU."""
    through_cpu = dist.is_initialized() and dist.get_backend(group) == "gloo"
    operations = []
    arrivals = []
    for function, messages in ((dist.irecv, receives), (dist.isend, sends)):
        for x, peer in messages:
            if x.numel() == 0:
                continue
            buffer = x.cpu() if through_cpu else x  # a CPU tensor is its own buffer
            operations.append(dist.P2POp(function, buffer, group=group, group_peer=peer))
            if function is dist.irecv and buffer is not x:
                arrivals.append((x, buffer))
    works = dist.batch_isend_irecv(operations) if operations else []
    for work in works:
        work.wait()
    for x, buffer in arrivals:
        x.copy_(buffer)


def ring_all_reduce(tensor: Tensor, group: Group = None) -> Tensor:
    """Sums `tensor` over the ranks of `group`, in place, by messages between neighbours.

    Args: tensor (...), of one shape on every rank; it may have fewer elements than ranks, or none.
    Returns: tensor, equal on all ranks to the bit.
    Source: Deep Speech 2 (Amodei et al., 2015), section 4.1.
    """
    N = group_size(group)
    r = group_rank(group)
    if N == 1:
        return tensor
    right = (r + 1) % N
    left = (r - 1) % N
    flat = tensor.detach().contiguous().view(-1)
    segments = flat.tensor_split(N)  # the first K mod N have one element more
    inbox = torch.empty_like(segments[0])
    for step in range(N - 1):
        total = segments[(r - step - 1) % N]
        arrived = inbox[: total.numel()]
        outgoing = segments[(r - step) % N]
        _exchange([(arrived, left)], [(outgoing, right)], group)
        total += arrived
    for step in range(N - 1):
        arrived = segments[(r - step) % N]
        outgoing = segments[(r - step + 1) % N]
        _exchange([(arrived, left)], [(outgoing, right)], group)
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view_as(tensor))
    return tensor


# ── 1.3 Data parallelism ────────────────────────────────────────────────────────────────────────
#
# Each rank has a replica of the model and some of the utterances of a batch. The sum of the ranks'
# gradients is the single device's gradient if the sum of their losses is its loss. That loss is a
# mean over the batch:
#
#     loss = 1 / utterances · Σ over utterances of  CTC loss / labels of that utterance
#
# So each rank divides by the number of utterances of all ranks, and gradients are summed. To divide
# by the rank's own number and average the gradients is the same only while all ranks have equally
# many: the last batch of an epoch is different. With losses 1, 1, 1 on one rank and 5 on the other,
# the mean of means is 3 and the mean is 2.
#
# Backward starts at the output, so the gradients of the last layers are complete long before those
# of the first. They are put into buckets in that order. A bucket is sent as soon as all of its
# gradients are there, while backward goes on:
#
#     main thread     backward:  out  full │ layer 1 │ layer 0 │ convolutions │ wait
#     ring's thread                        │ bucket 0 ──► │ bucket 1 ──► │ bucket 2 ──► │
#
# Three rules keep the ranks in step. One thread sends, so buckets never overtake each other. They
# are sent in a fixed order, since gradients may be complete in another order on another rank. And
# the ring has a process group of its own: BatchNorm's messages (1.4) are in flight at the same
# time, and must not mix with the ring's. Break a rule, and the loss is still right, but gradients
# of different parameters are added up, or the ranks wait for each other until the timeout.


class GradientRing:
    """Sums the gradients of `parameters` over `group` while backward runs.

    Args: parameters: the same on every rank, in the same order; frozen ones are left out. group:
        for this ring alone (`make_group`); None: a single rank. bucket_bytes: a bucket is closed
        when it holds that much.
    Call finish() on every rank after each backward, also after one that raised, and not two
    backwards before it: the first sum would be in flight already. Gradients must be None or zero
    before a backward: a sum of earlier ones would be summed over the ranks again. Make a new ring
    after freezing or unfreezing parameters: this one gives a frozen one a gradient of zero, and
    leaves the gradient of an unfrozen one unsummed. close() removes the hooks.
    Raises: ValueError for several ranks without a group.
    Source: Deep Speech 2 (Amodei et al., 2015), section 4.1; buckets as in PyTorch's
    DistributedDataParallel.
    """

    def __init__(self, parameters: Parameters, group: Group = None, bucket_bytes: int = 1 << 20):
        if group is None and group_size() > 1:
            raise ValueError("several ranks: give the ring a group of its own (make_group)")
        self.group = group
        self.buckets = [[]]
        trained = dict.fromkeys(p for p in parameters if p.requires_grad)  # shared ones once
        for p in reversed(trained):
            if sum(q.nbytes for q in self.buckets[-1]) >= bucket_bytes:
                self.buckets.append([])
            self.buckets[-1].append(p)
        self.parameters = trained if group_size(group) > 1 else {}
        self.thread = ThreadPoolExecutor(1, "ring")
        self.jobs = []  # one for each bucket that was sent
        self.ready = set()
        mark_ready = self._mark_ready
        self.hooks = [p.register_post_accumulate_grad_hook(mark_ready) for p in self.parameters]

    def _mark_ready(self, p: nn.Parameter) -> None:
        """Sends every bucket that is next in order and complete."""
        self.ready.add(p)
        for bucket in self.buckets[len(self.jobs) :]:
            if not self.ready.issuperset(bucket):
                return
            self.jobs.append(self.thread.submit(self._sum, bucket))

    def _sum(self, bucket: list[nn.Parameter]) -> None:
        if bucket[0].is_cuda:
            torch.cuda.set_device(bucket[0].device)  # each thread has its own setting
        flat = torch.cat([p.grad.flatten() for p in bucket])
        totals = ring_all_reduce(flat, self.group).split([p.numel() for p in bucket])
        for p, total in zip(bucket, totals):
            p.grad.copy_(total.view_as(p))

    def finish(self) -> None:
        """Waits until all gradients are summed. A missing one counts as zero: a rank without an
        utterance has none, and must take part."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self._mark_ready(p)
        jobs = self.jobs
        self.jobs = []  # also where a sum has failed
        self.ready = set()
        for job in jobs:
            job.result()  # raises what the thread has raised

    def close(self) -> None:
        """Removes the hooks and ends the thread."""
        for hook in self.hooks:
            hook.remove()
        self.thread.shutdown()


# ── 1.4 BatchNorm over the frames of all ranks ──────────────────────────────────────────────────
#
# Deep Speech 2 takes one mean and one variance per feature over all frames of all utterances, and
# normalises W x alone, not the recurrent term:
#
#     h_t = clip(BN(W x_t) + U h_{t−1})          BN(x) = γ (x − E[x]) / √(Var[x] + ε) + β
#
# Two things must be right. Padding frames do not count: they would pull mean and variance towards
# zero, and the more so the more the lengths differ. And "all utterances" are those of all ranks, or
# each rank would compute another function. Ranks hold unequal numbers of frames, so sums and counts
# are all-reduced, never means:
#
#     Σ x, count       ─ all-reduce ─►   E
#     Σ (x − E)²       ─ all-reduce ─►   Var
#
# E and Var depend on the frames of every rank, and each rank's loss depends on them. So backward
# sums over the ranks as well: the gradient of this all-reduce is an all-reduce. Leave that out, and
# the loss is right to the last digit while every gradient below a BatchNorm is wrong.


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x, group):
        ctx.group = group
        return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, grad):
        # apply(), and not a plain call: so that the second derivative is right too.
        return _SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(partial_x: Tensor, group: Group = None) -> Tensor:
    """The sum over `group`, on every rank; its gradient is summed over `group` as well.

    Right where each rank computes a loss of its own, and the total loss is the sum of these.
    Args: partial_x (...), of one shape on every rank; not modified. Returns: (...), replicated.
    Source: ours; PyTorch's SyncBatchNorm does the same.
    """
    return _SumOverRanks.apply(partial_x, group) if group_size(group) > 1 else partial_x


class SequenceBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all valid frames of all ranks of `group`; nn.BatchNorm1d's state dict.

    forward: x (..., H); valid (...), bool, or broadcastable to it. Returns: (..., H) in the
    weight's dtype, zero where not valid; the arithmetic is in at least fp32.
    In training every rank must call it, with frames or without.
    Raises: ValueError in training for fewer than two valid frames on all ranks together (on the
    CPU only: on a GPU the CPU would have to wait for the count).
    Source: Deep Speech 2 (Amodei et al., 2015), section 3.2.
    """

    def __init__(
        self, num_features: int, group: Group = None, eps: float = 1e-5, momentum: float = 0.1
    ):
        super().__init__(num_features, eps, momentum)
        self.group = group

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        valid = valid.expand(x.shape[:-1])[..., None]
        # 8 bits of a bf16 sum would be off by a percent. A NaN of padding would reach the weight's
        # gradient: 0 · NaN is NaN.
        x = torch.where(valid, at_least_fp32(x), 0)
        mean = self.running_mean
        var = self.running_var
        if self.training:
            mean, var = self._statistics(x, valid)
        scale = self.weight * (var + self.eps).rsqrt()
        y = (x - mean) * scale + self.bias
        return torch.where(valid, y, 0).to(self.weight.dtype)

    def _statistics(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (H,) over all ranks; updates the running averages. x: 0 in padding."""
        frames = tuple(range(x.ndim - 1))
        partial_sum = x.sum(frames)
        partial_count = valid.sum().to(x.dtype)[None]
        total = sum_over_ranks(torch.cat([partial_sum, partial_count]), self.group)
        count = total[-1].detach()
        if _has_values(x) and count < 2:
            raise ValueError(f"{count:.0f} valid frames on all ranks: a variance needs two")
        mean = total[:-1] / count
        partial_squares = torch.where(valid, x - mean, 0).square().sum(frames)
        var = sum_over_ranks(partial_squares, self.group) / count
        unbiased = var.detach() * count / (count - 1)  # as nn.BatchNorm1d keeps it
        dtype = self.running_var.dtype
        self.running_mean.lerp_(mean.detach().to(dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(dtype), self.momentum)
        self.num_batches_tracked += 1
        return mean, var


# ── 1.5 The CTC loss ────────────────────────────────────────────────────────────────────────────
#
# CTC is connectionist temporal classification. The network writes one symbol per frame, and there
# are more frames than letters. A path is one symbol for each frame. It says the text that is left
# when repeats are merged and then blanks are dropped: "_hhe_ll_lo" says "hello". (Two equal letters
# in a row need a blank between them.) Frames are independent given the input, so the probability of
# a path is a product. The probability of a text is the sum over all of its paths, and the loss is
# −log of it.
#
# There are too many paths to list them. So put the labels in a row with blanks around them. These
# are S = 2U + 1 states, and a path moves through them from left to right:
#
#     state      0     1     2     3     4      in each frame a path stays, steps to the next state,
#     symbol     _     c     _     a     _      or skips a blank between two different labels
#
# The network gives symbol k the probability y_t(k) in frame t. Let alpha_t(s) be the probability of
# being in state s after frame t, over all ways to get there:
#
#     alpha_t(s) = y_t(symbol of s) · [ alpha_{t−1}(s) + alpha_{t−1}(s−1) + alpha_{t−1}(s−2) ]
#                                        stay            step               skip, where allowed
#
# The text has the probability alpha of the last two states after the last frame. beta is the same
# from the end to the start. alpha · beta / y tells how much of the text's probability p passes
# through state s in frame t, and that is the gradient:
#
#     −∂ log p / ∂ log y_t(k) = − Σ over the states s of symbol k of  alpha_t(s) beta_t(s) / (y_t p)
#
# An example with V = 3, T = 2 and the text "a", y = 1/3 everywhere. Its paths are "_a", "a_" and
# "aa", so p = 3/9. alpha after frame 1 is (1, 1, 0)/3 for the states _, a, _, and after frame 2 it
# is (1, 2, 1)/9. The last two states add up to 3/9.
#
# All of it is in logarithms: (1/29)^T is zero in float64 from T = 222 on. Impossible is −1e30, not
# −∞, because ∞ − ∞ is NaN where alpha and beta are put together.
#
# beta needs no code of its own. Read frames and states in reverse, and beta is alpha. So the
# reversed problems are concatenated with the batch, P = 2B, and one loop over time serves both.

IMPOSSIBLE = -1e30


def _alpha(log_y_TSP: Tensor, skip_cost_UP: Tensor, start_P: Tensor) -> Tensor:
    """log alpha before any frame and after each: (T + 1, S, P).

    Args: skip_cost_UP: a row for each label but the last; 0 where the next label may be reached by
        a skip, else IMPOSSIBLE. start_P: the state in which a path is before its first frame.
    """
    T, S, P = log_y_TSP.shape
    alpha = log_y_TSP.new_full((T + 1, S, P), IMPOSSIBLE)
    alpha[0].scatter_(0, start_P[None], 0)
    for t in range(T):
        before_SP = alpha[t]
        after_SP = alpha[t + 1]
        after_SP[0] = before_SP[0]
        torch.logaddexp(before_SP[1:], before_SP[:-1], out=after_SP[1:])
        labels_UP = after_SP[3::2]  # only a label is ever reached by a skip
        torch.logaddexp(labels_UP, before_SP[1:-2:2] + skip_cost_UP, out=labels_UP)
        after_SP += log_y_TSP[t]
    return alpha


class _CTC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs_TBV, labels_BU, frames_B, sizes_B, blank):
        T, B, _ = log_probs_TBV.shape
        U = labels_BU.shape[1]
        symbols_BS = labels_BU.new_full((B, 2 * U + 1), blank)
        symbols_BS[:, 1::2] = labels_BU
        symbols_TBS = symbols_BS.expand(T, B, -1)
        log_y_TBS = log_probs_TBV.gather(2, symbols_TBS).clamp(min=IMPOSSIBLE)
        # After its end an utterance waits: a blank costs nothing there, and a label is impossible.
        # In reverse that comes first, and the path waits in the last blank of its own labels.
        is_padding_TB1 = ~valid_frames(frames_B, T)[..., None]
        log_y_TBS[..., 0::2].masked_fill_(is_padding_TB1, 0)
        log_y_TBS[..., 1::2].masked_fill_(is_padding_TB1, IMPOSSIBLE)
        log_y_TSB = log_y_TBS.mT.contiguous()
        is_repeat_UB = (labels_BU[:, 1:] == labels_BU[:, :-1]).T
        skip_cost_UB = log_y_TSB.new_zeros(is_repeat_UB.shape).masked_fill(is_repeat_UB, IMPOSSIBLE)

        needs_beta = ctx.needs_input_grad[0]
        problems = [(log_y_TSB, skip_cost_UB, torch.zeros_like(sizes_B))]
        if needs_beta:
            problems.append((log_y_TSB.flip(0, 1), skip_cost_UB.flip(0), 2 * (U - sizes_B)))
        alpha_TSP = _alpha(*(torch.cat(both, -1) for both in zip(*problems)))

        utterance_B = torch.arange(B, device=frames_B.device)
        ends_B = alpha_TSP[frames_B, 2 * sizes_B, utterance_B]
        ends_in_label_B = alpha_TSP[frames_B, (2 * sizes_B - 1).clamp(min=0), utterance_B]
        ends_in_label_B = torch.where(sizes_B > 0, ends_in_label_B, IMPOSSIBLE)
        log_p_B = torch.logaddexp(ends_B, ends_in_label_B)
        is_impossible_B = log_p_B < IMPOSSIBLE / 2
        if needs_beta:
            beta_TSB = alpha_TSP[1:, :, B:].flip(0, 1)
            # Both contain y of their frame: it is subtracted once. Below e⁻⁸⁰ a path counts for
            # nothing, and exp(−1e30) would be slow on a CPU.
            through_TSB = beta_TSB.add_(alpha_TSP[1:, :, :B])
            through_TSB.sub_(log_y_TSB).sub_(log_p_B).clamp_(min=-80).exp_()
            grad_TBV = torch.zeros_like(log_probs_TBV)
            grad_TBV.scatter_add_(2, symbols_TBS, through_TSB.neg_().mT)
            grad_TBV.masked_fill_(is_padding_TB1, 0)
            ctx.save_for_backward(grad_TBV.masked_fill_(is_impossible_B[:, None], torch.nan))
        return torch.where(is_impossible_B, torch.inf, -log_p_B)

    @staticmethod
    @once_differentiable  # forward has computed the gradient: it cannot be differentiated again
    def backward(ctx, grad_B):
        (grad_TBV,) = ctx.saved_tensors
        grad_B1 = grad_B[:, None]
        # where(), and not a product alone: 0 · NaN would be NaN.
        grad_TBV = torch.where(grad_B1 == 0, 0, grad_TBV * grad_B1)
        return grad_TBV, None, None, None, None


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """−log of the probability of a text, in nats; the interface of torch.nn.functional.ctc_loss.

    Args:
        log_probs: (T, B, V) or, of one utterance, (T, V); log_softmax of the logits.
        targets: (B, U), padded with any symbol, or the labels of all utterances in one row.
        input_lengths, target_lengths: integers (B,), frames and labels; 0 is allowed for both.
        reduction: "none": (B,); "sum"; "mean": of each loss divided by its labels, at least 1.
        zero_infinity: an impossible text (fewer frames than labels and repeats) costs 0 and has no
            gradient. Without it, it costs ∞ and its gradient is NaN.

    Returns: at least fp32; a scalar, or shape (B,). The gradient at log_probs is the true one; the
        native function's contains the softmax's term already. At the logits both are equal.
    Raises: ValueError for shapes and lengths that disagree, and a target that is the blank or no
        symbol (values are looked at on the CPU only).
    Source: Graves et al., 2006; in log space as in Deep Speech 2, section 4.2.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: none, sum or mean")
    is_batch = log_probs.ndim == 3
    log_probs_TBV = at_least_fp32(log_probs if is_batch else log_probs[:, None])
    frames_B = _as_integers("input_lengths", input_lengths, log_probs).reshape(-1)
    sizes_B = _as_integers("target_lengths", target_lengths, log_probs).reshape(-1)
    labels_BU = _as_integers("targets", targets, log_probs)
    if labels_BU.ndim == 1:  # all in one row
        labels_BU = _as_table(labels_BU, sizes_B)
    _check_ctc(log_probs_TBV, labels_BU, frames_B, sizes_B, blank)
    # Padding is replaced: it may be anything, and it is looked up like a label.
    labels_BU = labels_BU.where(valid_frames(sizes_B, labels_BU.shape[1]).T, blank)
    loss_B = _CTC.apply(log_probs_TBV, labels_BU, frames_B, sizes_B, blank)
    if zero_infinity:
        loss_B = torch.where(loss_B == torch.inf, 0, loss_B)
    if reduction == "none":
        return loss_B if is_batch else loss_B[0]
    if reduction == "sum":
        return loss_B.sum()
    return (loss_B / sizes_B.clamp(min=1)).mean()


def _as_integers(name: str, values: Any, like: Tensor) -> Tensor:
    x = torch.as_tensor(values, device=like.device)
    if x.numel() and x.is_floating_point():
        raise ValueError(f"{name} must be integers, not {x.dtype}")
    return x.to(torch.int64)


def _as_table(labels: Tensor, sizes_B: Tensor) -> Tensor:
    """The labels of all utterances in one row to labels_BU."""
    sizes = sizes_B.tolist()
    if sum(sizes) != len(labels) or min(sizes, default=0) < 0:
        raise ValueError(f"{len(labels)} targets in one row, but target_lengths {sizes}")
    return pad_sequence(labels.split(sizes), True) if sizes else labels[None][:0]


def _check_ctc(
    log_probs_TBV: Tensor, labels: Tensor, frames_B: Tensor, sizes_B: Tensor, blank: int
) -> None:
    T, B, V = log_probs_TBV.shape
    utterances = {B, len(labels), len(frames_B), len(sizes_B)}
    if len(utterances) > 1 or labels.ndim != 2:
        raise ValueError(f"targets or lengths do not fit log_probs of {B} utterances")
    if not 0 <= blank < V:
        raise ValueError(f"blank={blank} is not one of {V} symbols")
    if B == 0 or not _has_values(frames_B):
        return
    limits = (("input_lengths", frames_B, T), ("target_lengths", sizes_B, labels.shape[1]))
    for name, lengths_B, most in limits:
        if lengths_B.min() < 0 or lengths_B.max() > most:
            raise ValueError(f"{name} {lengths_B.tolist()}: they must be from 0 to {most}")
    used = labels[valid_frames(sizes_B, labels.shape[1]).T]
    bad = used[(used < 0) | (used >= V) | (used == blank)]
    if bad.numel():
        raise ValueError(f"target {bad[0]} is the blank {blank} or none of {V} symbols")


def valid_frames(lengths_B: Tensor, T: int) -> Tensor:
    """valid_TB: True where a frame is before its utterance's end. Source: ours."""
    return torch.arange(T, device=lengths_B.device)[:, None] < lengths_B


# ── 1.6 A recurrent layer, cut in time ──────────────────────────────────────────────────────────
#
# h_t = clip(x_t + h_{t−1} U) is a loop over frames that cannot be shortened, so each step should
# be cheap. Autograd would record four operators per step. Written out, backward is one GEMM (a
# matmul) per step, from the end to the start:
#
#     a_t  = (dL/dh_t + a_{t+1} Uᵀ) · [0 < h_t < 20]         the gradient at the input of the clip
#     dL/dx_t = a_t            dL/dU = Σ_t h_{t−1}ᵀ a_t      one GEMM over all steps, after the loop
#
# On one rank both directions run in the same loop, as a batch of D = 2 matrices.
#
# Deep Speech 1 put a second GPU to work inside one utterance: it sharded the recordings along time.
# Layers without recurrence need no other rank for that. A recurrent direction is a chain: a rank
# cannot begin before its neighbour's last state arrives. But a bidirectional layer has two chains,
# which start at opposite ends:
#
#     slot          0              1              2              3          forward ─►, backward ◄─
#     rank 0      forward                                     backward
#     rank 1                     forward       backward                    in the middle two ranks
#     rank 2                     backward      forward                     exchange boundary states,
#     rank 3      backward                                    forward      and swap directions
#
# An even N takes N slots of T/N frames, T in all, where one rank computes 2T: the speed-up is 2 for
# every even N. With an odd N the middle rank computes both directions in the same slot, so N + 1
# slots' time is needed. With more ranks each holds fewer frames, and is idle for longer.
#
# The gradient goes back the same way: dL/dh of a rank's first state belongs to the neighbour that
# has sent it. With plain send and receive autograd would see a constant there, and every gradient
# that should cross the cut would be missing. Here forward and backward of the full chain are one
# node of the graph. On one rank or on many, a node computes directions from the states that arrive
# and returns the states to send on; only the order of these computations differs.

Compute = Callable[[slice, Tensor], Tensor]  # directions, and the states that arrive, to new states


def _waves(compute: Compute, state_DBH: Tensor, upward: int, group: Group) -> None:
    """Direction `upward` (0 or 1) runs from rank 0 to the last rank, the other one back."""
    N = group_size(group)
    r = group_rank(group)
    # Direction, this rank's place in its chain, the way to the next rank.
    chains = [(upward, r, 1), (1 - upward, N - 1 - r, -1)]
    for slot in range(N):
        receives = []
        sends = []
        for direction, place, way in chains:
            state_1BH = state_DBH[direction : direction + 1]
            if place == slot:
                state_1BH.copy_(compute(slice(direction, direction + 1), state_1BH))
                if slot + 1 < N:
                    sends.append((state_1BH, r + way))
            elif place == slot + 1:
                receives.append((state_1BH, r - way))
        _exchange(receives, sends, group)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tDBH, weight_DHH, is_cut, group):
        h_tDBH = torch.empty_like(x_tDBH)
        start_DBH = x_tDBH.new_zeros(x_tDBH.shape[1:])

        def compute(own: slice, state_DBH: Tensor) -> Tensor:
            start_DBH[own] = state_DBH
            weight = weight_DHH[own]
            for x_DBH, h_DBH in zip(x_tDBH[:, own], h_tDBH[:, own]):
                state_DBH = torch.baddbmm(x_DBH, state_DBH, weight, out=h_DBH).clamp_(0, 20)
            return state_DBH

        _run(compute, torch.zeros_like(start_DBH), 0, is_cut, group)
        ctx.save_for_backward(h_tDBH, start_DBH, weight_DHH)
        ctx.cut = (is_cut, group)
        return h_tDBH

    @staticmethod
    @once_differentiable  # a formula that works in place, which autograd cannot see
    def backward(ctx, grad_tDBH):
        h_tDBH, start_DBH, weight_DHH = ctx.saved_tensors
        a_tDBH = torch.empty_like(h_tDBH)
        is_open_tDBH = ((h_tDBH > 0) & (h_tDBH < 20)).to(h_tDBH.dtype)

        def compute(own: slice, carry_DBH: Tensor) -> Tensor:
            weight = weight_DHH[own].mT
            tensors = (grad_tDBH, is_open_tDBH, a_tDBH)
            steps = list(zip(*(x_tDBH[:, own] for x_tDBH in tensors)))
            for grad_DBH, is_open_DBH, a_DBH in reversed(steps):
                torch.add(grad_DBH, carry_DBH, out=a_DBH).mul_(is_open_DBH)
                carry_DBH = torch.bmm(a_DBH, weight)
            return carry_DBH

        # Direction 0 ended on the last rank, so its backward runs down from there.
        _run(compute, torch.zeros_like(start_DBH), 1, *ctx.cut)
        before_tDBH = torch.cat([start_DBH[None], h_tDBH])[:-1]
        partial_DHH = einsum(before_tDBH, a_tDBH, "t D B H, t D B J -> D H J").contiguous()
        is_cut, group = ctx.cut
        if is_cut:
            _all_reduce(partial_DHH, group)
        return a_tDBH, partial_DHH, None, None


def _run(compute: Compute, state_DBH: Tensor, upward: int, is_cut: bool, group: Group) -> None:
    if is_cut:
        _waves(compute, state_DBH, upward, group)
    else:
        compute(slice(None), state_DBH)  # all directions at once


def clipped_recurrence(x_TDBH: Tensor, weight_DHH: Tensor) -> Tensor:
    """`plain_recurrence` with backward by formula: all states h_TDBH, in the weight's dtype.

    Twice differentiated it raises RuntimeError. Source: ours.
    """
    return _Recurrence.apply(x_TDBH.to(weight_DHH.dtype), weight_DHH, False, None)


def bidirectional(x_TBH: Tensor, weight_DHH: Tensor, recurrence: Callable) -> Tensor:
    """Both directions of a recurrence such as `plain_recurrence`, added: y_TBH.

    Source: Deep Speech (Hannun et al., 2014), section 2.
    """
    h_TDBH = recurrence(torch.stack([x_TBH, x_TBH.flip(0)], 1), weight_DHH)
    return h_TDBH[:, 0] + h_TDBH[:, 1].flip(0)


def time_parallel_birnn(x_tBH: Tensor, weight_DHH: Tensor, group: Group = None) -> Tensor:
    """`bidirectional` over frames that are sharded over `group`: y_tBH. Collective, also backward.

    Args: x_tBH: this rank's frames, which follow those of the rank before; ranks may hold unequal
        numbers of frames, or none. Zero after the end of each utterance. weight_DHH: U of both
        directions, replicated; its gradient is summed over `group` here.
    Source: Deep Speech (Hannun et al., 2014), section 3.2.
    """

    def recurrence(x_tDBH: Tensor, weight_DHH: Tensor) -> Tensor:
        return _Recurrence.apply(x_tDBH.to(weight_DHH.dtype), weight_DHH, True, group)

    return bidirectional(x_tBH, weight_DHH, recurrence)


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# Deep Speech 2 for a single device, in ordinary PyTorch: the reference. Its input is a spectrogram,
# the strength of F frequencies in each frame, a hundred frames per second. Then come convolutions
# over time and frequency, recurrent layers, a fully connected layer, and the log-probabilities of V
# symbols in each frame that is left: with a stride of 2 half of them.
#
# Utterances of a batch have unequal lengths and are padded with zeros at the end. Each must get the
# result that it would get alone. One rule does it: after every layer, frames after an utterance's
# end are zero. A convolution pads with zeros anyway, so it cannot tell padding from its own. And a
# backward direction, which starts at the far end of the padding, stays at h = clip(0 + 0·U) = 0
# until the last true frame, because no layer has a bias after its BatchNorm's mask. Break the rule,
# and an utterance's text depends on which others are in the batch.
#
# The model gets norm and recurrence as arguments: section 2.2 passes the parallel ones.


def clip(x: Tensor) -> Tensor:
    """min(max(x, 0), 20), the activation of both papers, x (...) to its shape."""
    return F.hardtanh(x, 0, 20)


class PlainBatchNorm(nn.BatchNorm1d):
    """PyTorch's own on the valid frames: x (..., H), valid broadcastable to (...); 0 elsewhere.

    Returns: (..., H).
    """

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))  # autocast has made it bf16
        valid = valid.expand(x.shape[:-1])
        y = torch.zeros_like(x)
        y[valid] = super().forward(x[valid])
        return y


def plain_recurrence(x_TDBH: Tensor, weight_DHH: Tensor) -> Tensor:
    """h_t = clip(x_t + h_{t−1} U) for each direction, from a state of zero: all states h_TDBH."""
    x_TDBH = x_TDBH.to(weight_DHH.dtype)
    h_DBH = torch.zeros_like(x_TDBH[0])
    states = []
    for x_DBH in x_TDBH:
        h_DBH = clip(x_DBH + h_DBH @ weight_DHH)
        states.append(h_DBH)
    return torch.stack(states)


class RecurrentLayer(nn.Module):
    """h = recurrence(norm(W x)) in both directions, added; x_TBH to (T, B, H).

    W is shared by the directions, U is not. Zero after the end of each utterance.
    Args: inputs: features of x. norm: called with a number of features, makes a norm that is called
        with (x, valid). recurrence: `plain_recurrence`, or what computes the same.
    Source: Deep Speech 2 (Amodei et al., 2015), section 3.
    """

    def __init__(self, inputs: int, hidden_size: int, norm: Callable, recurrence: Callable):
        super().__init__()
        H = hidden_size
        self.recurrence = recurrence
        self.input = nn.Linear(inputs, H, bias=False)
        self.norm = norm(H)
        # A state that fades slowly, so that gradients reach far back.
        weight_DHH = torch.randn(2, H, H) * 0.3 / math.sqrt(H)
        self.weight = nn.Parameter(weight_DHH + 0.5 * torch.eye(H))

    def forward(self, x_TBH: Tensor, valid_TB: Tensor) -> Tensor:
        x_TBH = self.norm(self.input(x_TBH), valid_TB)
        y_TBH = bidirectional(x_TBH, self.weight, self.recurrence)
        return torch.where(valid_TB[..., None], y_TBH, 0)


class DeepSpeech2(nn.Module):
    """Spectrograms to log-probabilities of symbols.

    Args: norm, recurrence: as `RecurrentLayer`'s. layer: makes a recurrent layer, called with
        (inputs, hidden_size, norm, recurrence).
    forward: x_BTF, zero after each end, and lengths_B (int64) to log_probs_TBV, at least fp32, and
    their lengths (B,). Raises: ValueError for another number of bins than the configuration's.
    Source: Deep Speech 2 (Amodei et al., 2015), section 3.
    """

    def __init__(
        self,
        config: DeepSpeechConfig,
        norm: Callable = PlainBatchNorm,
        recurrence: Callable = plain_recurrence,
        layer: Callable = RecurrentLayer,
    ):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        H = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            C = 1
            for channels, kernel, stride in config.convolutions:
                padding = [size // 2 for size in kernel]
                conv = nn.Conv2d(C, channels, kernel, stride, padding, bias=False)
                self.convolutions.append(conv)
                self.norms.append(norm(channels))
                C = channels
            inputs = C * config.after(config.num_bins, axis=1)
            for _ in range(config.num_layers):
                self.layers.append(layer(inputs, H, norm, recurrence))
                inputs = H
            self.full = nn.Linear(H, H, bias=False)
            self.full_norm = norm(H)
            self.out = nn.Linear(H, len(config.alphabet))

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        if x_BTF.shape[-1] != self.config.num_bins:
            here = f"spectrograms of {x_BTF.shape[-1]} bins"
            raise ValueError(f"{here} for a network of {self.config.num_bins}")
        x_BCTF = x_BTF[:, None]
        for number, (conv, norm) in enumerate(zip(self.convolutions, self.norms), 1):
            x_TBFC = rearrange(conv(x_BCTF), "B C T F -> T B F C")
            valid_TB = valid_frames(self.config.after(lengths_B, 0, number), len(x_TBFC))
            x_TBFC = clip(norm(x_TBFC, valid_TB[..., None]))
            x_BCTF = rearrange(x_TBFC, "T B F C -> B C T F")
        x_TBH = rearrange(x_BCTF, "B C T F -> T B (C F)")
        for layer in self.layers:
            x_TBH = layer(self.dropout(x_TBH), valid_TB)
        x_TBH = clip(self.full_norm(self.full(self.dropout(x_TBH)), valid_TB))
        log_probs_TBV = at_least_fp32(self.out(x_TBH)).log_softmax(-1)
        return log_probs_TBV, self.config.after(lengths_B, 0)


# ── 2.2 The parallel model ──────────────────────────────────────────────────────────────────────
#
# The same network and the same initial weights, with BatchNorm over all ranks and the recurrence
# with backward by formula. All other layers treat each utterance by itself.


def parallel_model(config: DeepSpeechConfig, group: Group = None) -> DeepSpeech2:
    """`DeepSpeech2` for data parallelism over `group`, with the plain model's initial weights.

    Source: ours.
    """
    return DeepSpeech2(config, partial(SequenceBatchNorm, group=group), clipped_recurrence)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# With data parallelism each rank's weights are the single device's: nothing is sharded, and a file
# that one rank writes can be read by any number of ranks. But replicas can drift apart, through one
# gradient that was not summed, without any error. Call `check_replicas` before every checkpoint.


def check_replicas(model: nn.Module, group: Group = None) -> None:
    """Raises ValueError, on every rank, where the model's state differs between ranks of `group`.

    Compares the lowest with the highest value of each byte. Of the elements themselves they would
    hide a NaN on one rank: a collective may drop it from a minimum, and from a maximum.
    """
    for name, x in model.state_dict().items():
        octets = x.flatten().view(torch.uint8)
        low = _all_reduce(octets.clone(), group, dist.ReduceOp.MIN)
        high = _all_reduce(octets.clone(), group, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            found = f"{(low != high).sum()} of its bytes differ"
            raise ValueError(f"{name} should be the same on every rank, but {found}")


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# ── 4.1 The gradient on one rank and on many ────────────────────────────────────────────────────


@dataclass
class Batch:
    """Utterances and their labels, padded at the end."""

    features_BTF: Tensor
    frames_B: Tensor  # of each utterance; int64, as all that follow
    labels_BU: Tensor
    sizes_B: Tensor  # labels of each utterance

    def rows(self, index: Iterable[int]) -> Batch:
        """Some of the utterances, padded no further than they need; it may be none."""
        index = torch.tensor(list(index), dtype=torch.int64, device=self.frames_B.device)
        frames_B = self.frames_B[index]
        sizes_B = self.sizes_B[index]
        T = max(frames_B.tolist(), default=1)
        U = max(sizes_B.tolist(), default=1)
        return Batch(self.features_BTF[index, :T], frames_B, self.labels_BU[index, :U], sizes_B)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On another device; dtype is that of the features."""
        integers = (self.frames_B, self.labels_BU, self.sizes_B)
        return Batch(self.features_BTF.to(device, dtype), *(x.to(device) for x in integers))


def padded_batch(features: list[Tensor], labels: list[Tensor]) -> Batch:
    """Utterances of unequal length as a Batch. Args: features (T, F) and labels (U,) of each."""
    frames_B = torch.tensor([len(x_TF) for x_TF in features], dtype=torch.int64)
    sizes_B = torch.tensor([len(labels_U) for labels_U in labels], dtype=torch.int64)
    return Batch(pad_sequence(features, True), frames_B, pad_sequence(labels, True), sizes_B)


def plain_gradients(model: DeepSpeech2, batch: Batch, autocast: Autocast = None) -> Tensor:
    """Adds the gradient of the mean loss, PyTorch's own CTC loss; returns the loss, a scalar."""
    with torch.autocast(batch.frames_B.device.type, autocast, enabled=autocast is not None):
        log_probs_TBV, frames_B = model(batch.features_BTF, batch.frames_B)
    loss = F.ctc_loss(log_probs_TBV, batch.labels_BU, frames_B, batch.sizes_B)
    loss.backward()
    return loss.detach()


def parallel_gradients(
    model: DeepSpeech2,
    batch: Batch,
    ring: GradientRing,
    group: Group = None,
    autocast: Autocast = None,
) -> Tensor:
    """`plain_gradients` for the utterances of all ranks, the same on every rank. Collective.

    Args: batch: this rank's utterances, which may be none; one rank of `group` must have one.
        ring: of the model's parameters, whose gradients are None or zero before. group: the
        data-parallel ranks.
    Returns: the loss, a scalar.
    """
    # torch.full is computed on the device. torch.tensor would be copied there, and the CPU waits.
    count = torch.full((), len(batch.frames_B), device=batch.frames_B.device)
    utterances = _all_reduce(count, group)
    with torch.autocast(batch.frames_B.device.type, autocast, enabled=autocast is not None):
        log_probs_TBV, frames_B = model(batch.features_BTF, batch.frames_B)
    loss_B = ctc_loss(log_probs_TBV, batch.labels_BU, frames_B, batch.sizes_B, reduction="none")
    partial_loss = (loss_B / batch.sizes_B.clamp(min=1)).sum() / utterances
    partial_loss.backward()
    ring.finish()
    return _all_reduce(partial_loss.detach(), group)


# ── 4.2 The loop ────────────────────────────────────────────────────────────────────────────────
#
# Long utterances make gradients explode, in a network that multiplies by U hundreds of times, and a
# momentum of 0.99 remembers an explosion for hundreds of steps. So Deep Speech 2 clips: where the
# norm of the gradient is above 400, the gradient is scaled down to it. It must be the norm of the
# summed gradient, after the ring. Every rank then computes the same norm by itself. Clipped before
# the sum, each rank would scale its partial sum by another factor, and the total would point
# elsewhere. (From chapter 2 on no rank holds the full gradient, and the norm needs a sum too.)


def make_optimizer(model: nn.Module, lr: float, momentum: float = 0.9) -> Optimizer:
    """The papers' accelerated gradient: SGD with Nesterov momentum. Theirs is 0.99."""
    return SGD(model.parameters(), lr, momentum=momentum, nesterov=True)


def train_alone(
    model: DeepSpeech2,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    max_norm: float = 400.0,
    autocast: Autocast = None,
    gradients: Callable = plain_gradients,
) -> Steps:
    """Trains the plain model; yields two scalars, the loss and the norm before clipping. For a
    schedule, set the optimizer's learning rate between two steps."""
    for batch in batches:
        optimizer.zero_grad()
        loss = gradients(model, batch, autocast=autocast)
        norm = clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        yield loss, norm


def train(
    model: DeepSpeech2,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    group: Group = None,
    ring_group: Group = None,
    max_norm: float = 400.0,
    autocast: Autocast = None,
) -> Steps:
    """`train_alone` on many ranks: yields the same two scalars. Every rank must iterate it.

    Args: batches: this rank's utterances of each step. group: the data-parallel ranks. ring_group:
        the same ranks once more, for the gradients alone.
    """
    ring = GradientRing(model.parameters(), ring_group)
    gradients = partial(parallel_gradients, ring=ring, group=group)
    try:
        yield from train_alone(model, optimizer, batches, max_norm, autocast, gradients)
    finally:
        ring.close()


# ── 4.3 Data ────────────────────────────────────────────────────────────────────────────────────
#
# A synthetic task that is learned in seconds: each symbol is a tone, in the bin of its index, of
# random length and loudness, in noise. Tones swell and fade, so that repeats can be told apart.
# (speech.py trains the same network on recordings.)


def tones(utterances: int, config: DeepSpeechConfig, seed: int, letters: int = 8) -> Batch:
    """Random texts of 1 to `letters` symbols; num_bins must be at least the number of symbols."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, generator=generator)
    features = []
    labels = []
    for size in draw(1, letters + 1, (utterances,)).tolist():
        labels_U = draw(1, len(config.alphabet), (size,))
        spans_U = draw(5, 10, (size,))
        swell_T = torch.cat([torch.hann_window(span, False) for span in spans_U.tolist()])
        symbols_T = labels_U.repeat_interleave(spans_U)
        tone_TF = F.one_hot(symbols_T, config.num_bins)
        noise_TF = torch.randn(tone_TF.shape, generator=generator)
        features.append(4 * swell_T[:, None] * tone_TF + 0.3 * noise_TF)
        labels.append(labels_U)
    return padded_batch(features, labels)


def greedy(log_probs_TV: Tensor, alphabet: str = ALPHABET) -> str:
    """The text of the most probable path: repeats merged, blanks dropped.

    The most probable text may be another one (beam search: speech.py). Source: Graves et al., 2006.
    """
    path = torch.unique_consecutive(log_probs_TV.argmax(-1)) if len(log_probs_TV) else []
    return "".join(alphabet[symbol] for symbol in path if symbol > 0)


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# More speech is now a matter of more GPUs. A larger model is not: every rank keeps all weights, all
# gradients and the optimizer's state, 12 to 16 bytes per parameter. A model that does not fit on
# one device does not fit on a thousand. The cut in time does not help: it shards activations, not
# weights, and a chain has only two ends to start from. Chapter 2 shards the layers themselves. (All
# ranks repeat the same optimizer step on the same state: later chapters shard that as well.)

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show what rounding does to right code (bf16: 0.4 % in each GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 2e-1}


def equivalence(
    device: torch.device, ring_group: Group, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five Nesterov steps of a small model on these ranks and on a single device, and the layer
    that is cut in time: name to relative error."""
    config = DeepSpeechConfig(2, 16, 12, alphabet="_abcdef")
    count = 2 * group_size() + 1  # does not divide over the ranks
    batches = [tones(count, config, seed).to(device, dtype) for seed in range(5)]
    own = range(group_rank(), count, group_size())
    mine = [batch.rows(own) for batch in batches]
    plain = DeepSpeech2(config).to(device, dtype)
    parallel = parallel_model(config).to(device, dtype)
    options = {"max_norm": 0.5, "autocast": autocast}
    alone = train_alone(plain, make_optimizer(plain, 0.01), batches, **options)
    optimizer = make_optimizer(parallel, 0.01)
    together = train(parallel, optimizer, mine, None, ring_group, **options)
    found = []
    for model, steps in ((parallel, together), (plain, alone)):
        tensors = {}
        for step, (loss, norm) in enumerate(steps):
            tensors |= {f"loss {step}": loss, f"norm before clipping {step}": norm}
            if step == 0:
                for name, p in model.named_parameters():
                    tensors[f"gradient of {name}"] = p.grad.clone()
        if dtype == torch.float64:  # in fp32 rounding has grown after five steps
            for name, x in model.state_dict().items():
                tensors[f"weight after Nesterov, {name}"] = x
        found.append(tensors)
    errors = relative_errors("every", *found)
    return over_all_ranks(errors | time_equivalence(device, dtype))


def time_equivalence(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The layer that is cut in time: output and gradients, compared with the plain recurrence."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, dtype=dtype, generator=generator)
    x_TBH = draw(10 * group_size() + 3, 3, 8).to(device)
    weight_DHH = draw(2, 8, 8).to(device).requires_grad_()

    def shard(x_TBH: Tensor) -> Tensor:
        return x_TBH.tensor_split(group_size())[group_rank()]

    full = x_TBH.clone().requires_grad_()
    y_TBH = bidirectional(full, weight_DHH, plain_recurrence)
    dx_TBH, dw_DHH = torch.autograd.grad(y_TBH.square().sum(), (full, weight_DHH))
    there = {"output": shard(y_TBH), "dx": shard(dx_TBH), "dU": dw_DHH}
    own = shard(x_TBH).clone().requires_grad_()
    y_tBH = time_parallel_birnn(own, weight_DHH)
    dx_tBH, dw_DHH = torch.autograd.grad(y_tBH.square().sum(), (own, weight_DHH))
    here = {"output": y_tBH.detach(), "dx": dx_tBH, "dU": dw_DHH}
    return relative_errors("every value of the layer cut in time,", here, there)


@torch.no_grad()
def right_texts(model: DeepSpeech2, batch: Batch) -> float:
    """Fraction of utterances whose greedy text is right; rank 0 prints the first three."""
    log_probs_TBV, frames_B = model.eval()(batch.features_BTF, batch.frames_B)
    right = 0
    say("\nspoken      written")
    for b, frames in enumerate(frames_B):
        labels = batch.labels_BU[b, : batch.sizes_B[b]]
        text = "".join(model.config.alphabet[symbol] for symbol in labels)
        written = greedy(log_probs_TBV[:frames, b], model.config.alphabet)
        right += text == written
        if b < 3:
            say(f"{text:10}  {written}")
    say()
    return right / len(frames_B)


def demonstrate(
    args: argparse.Namespace, device: torch.device, ring_group: Group
) -> tuple[list[float], float]:
    """Trains on tones; returns the losses, and the fraction of right texts on the eval split."""
    dtype, autocast = dtypes(args)
    config = config_from(args, DeepSpeechConfig, seed=args.seed)
    model = parallel_model(config).to(device, dtype)

    def batches() -> Iterator[Batch]:
        for step in range(args.steps):
            batch = tones(args.batch, config, 1_000_000 * args.seed + step)
            own = range(group_rank(), args.batch, group_size())
            yield batch.rows(own).to(device, dtype)

    say("step     loss    norm")
    optimizer = make_optimizer(model, args.lr)
    losses = []
    steps = train(model, optimizer, batches(), None, ring_group, args.max_norm, autocast)
    for step, results in enumerate(steps):
        loss, norm = read_step(step, *results)
        losses.append(loss)
        if step < 5 or step % 20 == 19:
            say(f"{step:4}  {loss:7.4f}  {norm:6.3f}")
    check_replicas(model)
    eval_split = tones(100, config, 1_000_000 * args.seed + 999_999)
    return losses, right_texts(model, eval_split.to(device, dtype))


def ring_elements(device: torch.device, ring_group: Group) -> int:
    """Elements that all ranks send together to sum 1,001."""
    with Counter() as counter:
        ring_all_reduce(torch.ones(1001, device=device), ring_group)
    sent = sum(message.bytes // 4 for message in counter.messages if message.op == "send")
    return int(_all_reduce(torch.tensor(sent, device=device)))


def claims(args: argparse.Namespace, device: torch.device, ring_group: Group) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = equivalence(device, ring_group, torch.float64)
    rows = []
    kinds = ["gradient", "norm before clipping", "weight after Nesterov"]
    for kind in [*kinds, "value of the layer cut in time"]:
        error = worst(errors, f"every {kind}")
        claim = f"every {kind} equals the single device's, float64"
        here = f"worst {error:.1e} relative"
        rows.append((claim, "exact", here, error <= BOUNDS["fp64"]))
    N = group_size()
    sent = ring_elements(device, ring_group)
    expected = 2 * 1001 * (N - 1)
    claim = f"elements sent to sum 1,001 on {N} ranks, 2·K·(N − 1)"
    rows.append((claim, str(expected), str(sent), sent == expected))
    losses, right = demonstrate(args, device, ring_group)
    # What to expect is known of the default run alone.
    configs = [config_from(args, config) for config in (Options, DeepSpeechConfig)]
    judge = args.steps == STEPS and configs == [Options(), DeepSpeechConfig()]
    if losses:
        here = f"{losses[0]:.2f} to {losses[-1]:.2f}"
        falls = losses[-1] < losses[0] / 10 if judge else "needs the default run"
        rows.append(("the loss falls", "falls", here, falls))
    verdict = right > 0.9 if judge else "needs the default run"
    claim = "texts of the eval split that are right"
    here = f"{right:.0%}"
    rows.append((claim, "above 90%", here, verdict))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    torch.set_flush_denormal(True)
    ring_group = make_group([list(range(group_size()))], device, args.timeout)
    say_setting(args)
    if args.check:
        errors = equivalence(device, ring_group, *dtypes(args))
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        good = print_claims(claims(args, device, ring_group))
    if not good:
        sys.exit(1)


STEPS = 120


@dataclass
class Options:  # the chapter's own flags
    batch: int = flag(16, "utterances per step, over all ranks", least=1)
    lr: float = flag(0.05, "learning rate", least=1e-9)
    max_norm: float = flag(3.0, "of the gradient; Deep Speech 2 has 400", least=1e-9)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, DeepSpeechConfig], lambda _: None, 2, STEPS)


# ── What every chapter carries ──────────────────────────────────────────────────────────────────
#
# The counter listens to a program's communication. PyTorch shows every operator that is called to a
# "dispatch mode", and a collective is an operator of the namespace c10d. So messages and bytes are
# counted, not estimated.


# region shared: counter
Message = namedtuple("Message", "op bytes group")  # bytes: of the input or the output, the larger


class Counter(TorchDispatchMode):
    """`with Counter() as counter:` lists this rank's collectives and sends in counter.messages."""

    def __enter__(self) -> Counter:
        self.messages: list[Message] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::").strip("_")  # allreduce, or allgather_base
        if function.namespace == "c10d" and name != "barrier":
            op = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
            tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
            size = max(sum(x.nbytes for x in xs) for xs in tensors)
            boxed = [x for x in args if isinstance(x, torch.ScriptObject)]
            group = next(x for x in boxed if "ProcessGroup" in str(x._type()))
            self.messages.append(Message(op, size, dist.ProcessGroup.unbox(group).group_name))
        return function(*args, **(kwargs or {}))


# endregion


# The claims table is the last thing that a chapter prints. `here` is measured in this run. A claim
# that fails sets the exit code; one that this run cannot test says what it needs, and is never
# "ok". A value that is read from a GPU is a host synchronisation: the CPU waits until the GPU has
# caught up, and then the GPU waits for the CPU. So loss and norm are read together, once a step.


# region shared: reports
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


# endregion


# Flags come from the fields of dataclasses. They are read, and every "auto" is resolved, in one
# process before any rank starts: a wrong flag is one line, not one line from each rank. No flag
# falls back silently to something else.


# region shared: flags
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


# endregion


# A script that is started plainly runs torchrun in its own process, with itself as the program of
# every rank. A script that torchrun has started (LOCAL_RANK is set) joins. A single rank stays in
# the process, with a process group of one rank, so that a debugger works. A collective that waits
# longer than --timeout fails instead of hanging; torchrun then ends the other ranks, and prints the
# error of the rank that failed first.


# region shared: launcher
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


# endregion


if __name__ == "__main__":
    launch(main, flags())
