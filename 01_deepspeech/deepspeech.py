# SPDX-License-Identifier: MIT-0
"""Chapter 1. Deep Speech: one network that hears, and data parallelism that makes it trainable.

Papers: Deep Speech: Scaling up end-to-end speech recognition, Hannun et al., 2014, arXiv 1412.5567
        Deep Speech 2: End-to-End Speech Recognition in English and Mandarin, Amodei et al., 2015, arXiv 1512.02595

The problem. Speech recognisers were chains of hand-made parts: phonemes, alignments, decision trees. One network that
writes letters directly needs none of them, but it needs thousands of hours of speech, weeks on one GPU.

The idea. Two sums make it possible. The first is over alignments: nobody has to say when each letter is spoken, because
the CTC loss adds up the probabilities of all ways in which the letters can lie on the frames. The second is over GPUs:
each GPU's process, a *rank*, computes the gradient of its own utterances, and a ring adds the gradients up while
backward still runs.

     utterances     rank 0: "two one"           rank 1: "six"           each rank has the whole network
                         │                           │
     convolutions, recurrent layers  ◄─ BatchNorm ─► the same           statistics over the frames of all ranks
                         │                           │
     letters     _ t t w _ o o _ _ o n e     _ s _ i x x _              one symbol a frame, _ is "no letter"
                         │                           │
     CTC loss    all alignments of "two one"   all alignments of "six"  no human alignment
                         │                           │
     gradient            └──►  ring all-reduce  ◄────┘                  the single device's for the whole batch

Run it (no flag is needed; --help lists them):

    python 01_deepspeech/deepspeech.py                             2 ranks on this machine, synthetic number words
    python 01_deepspeech/deepspeech.py --ranks 1                   one process, for a debugger
    python 01_deepspeech/deepspeech.py --check                     equivalence alone, each tensor's error
    python 01_deepspeech/deepspeech.py --data train.jsonl --dev dev.jsonl --save model.safetensors     (recipe: README)
    python 01_deepspeech/deepspeech.py --load model.safetensors --evaluate dev.jsonl
    python 01_deepspeech/deepspeech.py --load model.safetensors --transcribe me.wav
    torchrun --nproc-per-node=8 01_deepspeech/deepspeech.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 01_deepspeech/deepspeech.py

It proves in float64 that every gradient equals the single device's, trains on speech that it synthesises, writes down
what it hears in speech that it has not heard before, and ends in a table of the papers' claims.

Left out: Deep Speech 1's feed-forward layers (its recurrence cut in time is section 2.5), bigram output, Mandarin, the
GPU kernels and the memory allocator.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension:
#
#     B  batch, in utterances           T  time, in frames       t: the frames of this rank (section 2.5)
#     F  frequency bins                 U  labels of an utterance
#     C  channels of a convolution      V  alphabet, the blank included
#     H  hidden size                    S  pairs of states in the CTC lattice, U + 1
#     D  directions: 1, or 2            P  problems that CTC solves at once, 2B
#     W  samples of a waveform
#
# A CAPITAL is the whole dimension, the small letter this rank's share of it, and partial_ marks a summand that is still
# to be reduced; a digit is a literal size. In data parallelism each rank has its own B: "whole" means within one
# rank's batch. (F with a dot behind it is torch.nn.functional.)

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import random
import sys
import threading
import time
from collections import defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = dist.ProcessGroup | None  # None: all ranks


# region shared: config fields
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion

ALPHABET = "_ 'abcdefghijklmnopqrstuvwxyz"  # 29 symbols; number 0, written _, is CTC's blank: "no letter here"


@dataclass
class SpeechConfig:
    """The sizes of a Deep Speech 2 network. Raises ValueError where they contradict each other."""

    sample_rate: int = 8000  # samples a second; other recordings are resampled to it
    bins: int = 40  # F: mel bands; 0 for all frequencies of the spectrogram, as in the paper (161 at 16 kHz)
    convolutions: tuple = (
        (8, (11, 11), (2, 2)),
    )  # channels, kernel, stride of each; the latter two frames × bins
    layers: int = 1  # recurrent ones
    hidden_size: int = 64  # H
    cell: str = "relu"  # "relu", clipped at 20, or "gru"
    bidirectional: bool = True  # if not, a row convolution looks ahead instead
    lookahead: int = 10  # of the row convolution: frames of the future that it sees (τ)
    batch_norm: bool = True
    dropout: float = 0.0  # between layers, never on a recurrent connection
    seed: int = 0  # the weights are a function of this configuration alone

    def __post_init__(self):
        for f in fields(
            self
        ):  # JSON has none of our types but these: 1.5 layers, or "no" for False, are refused
            value, allowed = (
                getattr(self, f.name),
                {"float": "float int", "tuple": "tuple list"}.get(f.type, f.type),
            )
            if type(value).__name__ not in allowed.split():
                raise ValueError(f"{f.name}={value!r} must be of type {f.type}")
        self.convolutions = tuple(map(_convolution, self.convolutions))
        sizes = [self.layers, self.hidden_size, len(self.convolutions)]
        sizes += itertools.chain(
            *((channels, *kernel, *stride) for channels, kernel, stride in self.convolutions)
        )
        rules = {
            "a sample rate of 1000 to 192000": 1000 <= self.sample_rate <= 192_000,
            "sizes of at least 1, and one convolution or more": min(sizes) > 0,
            "kernels of odd sizes": all(
                side % 2 for _, kernel, _ in self.convolutions for side in kernel
            ),
            "bins and lookahead not below 0": min(self.bins, self.lookahead) >= 0,
            "dropout at least 0 and less than 1": 0 <= self.dropout < 1,
            "cell 'relu' or 'gru'": self.cell in ("relu", "gru"),
            "a seed from 0 to 2**63 - 1": 0 <= self.seed < 2**63,
        }
        if broken := [rule for rule, kept in rules.items() if not kept]:
            raise ValueError(f"{self}: it must have {'; '.join(broken)}")

    @property
    def features(self) -> int:
        """F at the input."""
        return self.bins or round(0.020 * self.sample_rate) // 2 + 1

    def after(self, size, axis: int, convolutions: int | None = None):
        """What `size` frames (axis 0) or bins (axis 1) have become behind that many convolutions (None: all).

        Takes an int or a tensor of lengths. The one place for this arithmetic: masks, the CTC loss and the decoder must
        agree to the frame. With an odd kernel k and k // 2 zeros on either side, size becomes ⌈size / stride⌉.
        """
        for _, _, stride in self.convolutions[:convolutions]:
            size = (size - 1) // stride[axis] + 1
        return size


def _convolution(sizes: Any) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """A convolution of SpeechConfig, from what JSON makes of it. Raises: ValueError where it is none."""
    try:
        channels, (frames, bins), (frame_step, bin_step) = sizes
        if not all(type(size) is int for size in (channels, frames, bins, frame_step, bin_step)):
            raise TypeError("not whole numbers")
    except (TypeError, ValueError) as error:
        need = "channels, [frames, bins] of the kernel, [frames, bins] of the stride"
        raise ValueError(f"convolution {sizes!r}: it must be {need}") from error
    return channels, (frames, bins), (frame_step, bin_step)


# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# Deep Speech 2 on a single device, in ordinary PyTorch: the thing to equal. It hears a *spectrogram*, the strength of
# F frequencies in each frame, a hundred frames a second (how it is made stands behind part 6, under "Sound"). Then come
# convolutions over time and frequency, recurrent layers, one fully connected layer, and the probabilities of 29 symbols
# in each frame that is left: a stride of 2 makes one of two.
#
# Utterances of a batch are of unequal length, and padded with zeros at the end. Every result must be the one that the
# utterance would have alone, so one rule holds from layer to layer: *what lies behind the end of an utterance is
# zero.* A convolution pads with zeros anyway, so it cannot tell padding from its own. And the backward direction of a
# recurrent layer, which starts at the far end of the padding, stays at rest until the true last frame,
#
#     h = clip(0 + U·0) = 0
#
# because no layer here has a bias behind its BatchNorm that could wake it. Break the rule, and each utterance's text
# depends on who else is in the batch.
#
# Between the layers stands a BatchNorm: each feature is brought to mean 0 and variance 1, over all valid frames of the
# batch (section 2.4 says which, and why). Norm and recurrence are handed in, so that part 2 can hand in a parallel norm
# and a faster recurrence.


def valid_frames(lengths_B: Tensor, T: int) -> Tensor:
    """valid_TB: True where a frame lies before its utterance's end."""
    return torch.arange(T, device=lengths_B.device)[:, None] < lengths_B


def clip(x: Tensor) -> Tensor:
    """The activation of both papers, min(max(x, 0), 20), which cannot explode; its derivative is 0 at 0 and at 20."""
    return F.hardtanh(x, 0, 20)


class PlainBatchNorm(nn.BatchNorm1d):
    """PyTorch's own, on the valid frames put side by side: x (..., H), valid (...) or broadcastable; 0 elsewhere."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x.to(
            torch.promote_types(x.dtype, torch.float32)
        )  # statistics in bf16 would be off by a percent
        valid, y = valid.expand(x.shape[:-1]), torch.zeros_like(x)
        y[valid] = super().forward(x[valid])
        return y


class Bias(nn.Module):
    """What stands in place of a BatchNorm in a network without: x (..., H), valid (...); x's shape, zero elsewhere."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid[..., None], x + self.bias, 0)


def plain_recurrence(x_TDBH: Tensor, weight_DHH: Tensor) -> Tensor:
    """h_t = clip(x_t + h_{t−1} U), each direction by itself, from a state of zero: all states, (T, D, B, H)."""
    h_DBH, states = torch.zeros_like(x_TDBH[0]), []
    for x_DBH in x_TDBH:
        h_DBH = clip(x_DBH + h_DBH @ weight_DHH)
        states.append(h_DBH)
    return torch.stack(states)


def gru(x_TDB3H: Tensor, weight_DH3H: Tensor, activation: Callable = clip) -> Tensor:
    """A gated recurrence, (T, D, B, 3H) to all states (T, D, B, H), with the paper's clip where others have tanh.

    x holds the inputs of the gate z, of the gate r and of the candidate, side by side, and so does weight.
    Source: Deep Speech 2, section 3 (the equations of its gated unit).
    """
    H = weight_DH3H.shape[1]
    h_DBH, states = x_TDB3H.new_zeros(*x_TDB3H.shape[1:3], H), []
    for x_DB3H in x_TDB3H:
        (xz_DBH, xr_DBH, xn_DBH), (hz_DBH, hr_DBH, hn_DBH) = (
            y.chunk(3, -1) for y in (x_DB3H, h_DBH @ weight_DH3H)
        )
        z_DBH, r_DBH = torch.sigmoid(xz_DBH + hz_DBH), torch.sigmoid(xr_DBH + hr_DBH)
        h_DBH = (1 - z_DBH) * h_DBH + z_DBH * activation(xn_DBH + r_DBH * hn_DBH)
        states.append(h_DBH)
    return torch.stack(states)


class RecurrentLayer(nn.Module):
    """h = recurrence(norm(W x)), both directions added up; x_TBH to (T, B, H), zero behind the end.

    W is shared by the directions; only U is not. The norm acts on W x alone: the recurrent term passes as it is.
    Source: Deep Speech 2, section 3.
    """

    def __init__(self, config: SpeechConfig, inputs: int, norm: Callable, recurrence: Callable):
        super().__init__()
        H, self.recurrence = config.hidden_size, recurrence
        D, gates = 1 + config.bidirectional, 3 if config.cell == "gru" else 1
        self.input, self.norm = nn.Linear(inputs, gates * H, bias=False), norm(gates * H)
        weight = torch.randn(D, H, gates * H) * 0.3 / math.sqrt(H)
        weight[:, :, -H:] += 0.5 * torch.eye(
            H
        )  # a state that fades slowly, so that gradients reach far back
        self.weight = nn.Parameter(weight)

    def forward(self, x_TBH: Tensor, valid_TB: Tensor) -> Tensor:
        x_TBH = self.norm(self.input(x_TBH), valid_TB)
        ways = [x_TBH, x_TBH.flip(0)][: len(self.weight)]
        h_TDBH = self.recurrence(torch.stack(ways, 1), self.weight)
        y_TBH = h_TDBH[:, 0] + h_TDBH[:, 1].flip(0) if len(ways) == 2 else h_TDBH[:, 0]
        return torch.where(valid_TB[..., None], y_TBH, 0)


class RowConvolution(nn.Module):
    """Sees `lookahead` frames of the future, each feature by itself: y_t = Σ_j weight_j ∘ x_{t+j}, j = 0 … lookahead.

    x_TBH, zero behind each end, to (T, B, H), which is not zero there. A recogniser that must answer while somebody
    still speaks cannot have a backward direction; this on top of forward ones is nearly as good.
    Source: Deep Speech 2, section 3.7 (lookahead convolution).
    """

    def __init__(self, hidden_size: int, lookahead: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size, lookahead + 1), 1 / (lookahead + 1)))

    def forward(self, x_TBH: Tensor) -> Tensor:
        future = self.weight.shape[1] - 1
        x_BHT = F.pad(
            rearrange(x_TBH, "T B H -> B H T"), (0, future)
        )  # padded on the right: the future, not the past
        y_BHT = F.conv1d(x_BHT, self.weight[:, None], groups=self.weight.shape[0])
        return rearrange(y_BHT, "B H T -> T B H")


class DeepSpeech2(nn.Module):
    """Spectrograms to log-probabilities of symbols.

    Args:
        norm: a class or function that makes a norm for so many features, called as norm(x, valid).
        recurrence: what `plain_recurrence` computes; a GRU brings its own.

    forward: x_BTF, zero behind each end, and lengths_B (int64) to log_probs_TBV, at least fp32, and their lengths.
    Raises: ValueError for another number of bins than the configuration's.
    Source: Deep Speech 2, section 3.
    """

    def __init__(
        self,
        config: SpeechConfig,
        norm: Callable = PlainBatchNorm,
        recurrence: Callable = plain_recurrence,
    ):
        super().__init__()
        self.config, norm = config, norm if config.batch_norm else Bias
        self.dropout = nn.Dropout(config.dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.convolutions, self.norms, C = nn.ModuleList(), nn.ModuleList(), 1
            for channels, kernel, stride in config.convolutions:
                self.convolutions.append(
                    nn.Conv2d(C, channels, kernel, stride, [k // 2 for k in kernel], bias=False)
                )
                self.norms.append(norm(C := channels))
            H, cell = config.hidden_size, gru if config.cell == "gru" else recurrence
            inputs = [C * config.after(config.features, axis=1)] + [H] * (config.layers - 1)
            self.layers = nn.ModuleList(RecurrentLayer(config, size, norm, cell) for size in inputs)
            self.ahead = None if config.bidirectional else RowConvolution(H, config.lookahead)
            self.full, self.full_norm = nn.Linear(H, H, bias=False), norm(H)
            self.out = nn.Linear(H, len(ALPHABET))

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        if x_BTF.shape[-1] != self.config.features:
            raise ValueError(
                f"spectrograms of {x_BTF.shape[-1]} bins for a network of {self.config.features}"
            )
        x_BCTF = x_BTF[:, None]
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms), 1):
            x_TBFC = rearrange(convolution(x_BCTF), "B C T F -> T B F C")
            valid_TB = valid_frames(self.config.after(lengths_B, 0, number), x_TBFC.shape[0])
            x_BCTF = rearrange(clip(norm(x_TBFC, valid_TB[..., None])), "T B F C -> B C T F")
        x_TBH = rearrange(x_BCTF, "B C T F -> T B (C F)")
        for layer in self.layers:
            x_TBH = layer(self.dropout(x_TBH), valid_TB)
        if self.ahead is not None:
            x_TBH = clip(self.ahead(x_TBH))
        x_TBH = clip(self.full_norm(self.full(self.dropout(x_TBH)), valid_TB))
        logits_TBV = self.out(x_TBH)
        wide = torch.promote_types(logits_TBV.dtype, torch.float32)
        return logits_TBV.log_softmax(-1, dtype=wide), self.config.after(lengths_B, 0)


@dataclass
class Batch:
    """Utterances and what is said in them, padded with zeros at the end."""

    features_BTF: Tensor
    frames_B: Tensor  # of each utterance; int64, as all that follows
    labels_BU: Tensor
    sizes_B: Tensor  # labels of each utterance

    def rows(self, index: Iterable[int]) -> Batch:
        """Some of the utterances, padded no further than they need; it may be none."""
        index = torch.tensor(list(index), dtype=torch.int64, device=self.frames_B.device)
        frames_B, sizes_B = self.frames_B[index], self.sizes_B[index]
        T, U = (max(lengths.tolist(), default=1) for lengths in (frames_B, sizes_B))
        return Batch(self.features_BTF[index, :T], frames_B, self.labels_BU[index, :U], sizes_B)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        return Batch(
            *(
                x.to(device, dtype if x.is_floating_point() else x.dtype)
                for x in vars(self).values()
            )
        )


def make_optimizer(model: nn.Module, kind: str = "nesterov") -> torch.optim.Optimizer:
    """The papers' accelerated gradient (Nesterov, theirs with a momentum of 0.99), or "adamw"; the caller sets "lr"."""
    if kind == "nesterov":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)


def plain_gradients(
    model: DeepSpeech2, batch: Batch, autocast: torch.dtype | None = None
) -> Tensor:
    """Leaves the gradient of the batch's mean loss, PyTorch's own CTC loss, in the parameters; returns it, a scalar.

    autocast: the dtype of products, None for the parameters' own.
    """
    with torch.autocast(batch.frames_B.device.type, autocast, enabled=autocast is not None):
        log_probs_TBV, frames_B = model(batch.features_BTF, batch.frames_B)
    loss = F.ctc_loss(
        log_probs_TBV, batch.labels_BU, frames_B, batch.sizes_B
    )  # section 2.3 says what its mean is
    loss.backward()
    return loss.detach()


def train_alone(
    model: DeepSpeech2, batches: Iterable[Batch], lr: Callable[[int], float], max_norm: float = 400.0,
    kind: str = "nesterov", autocast: torch.dtype | None = None, gradients: Callable = plain_gradients,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Trains on one batch after the other; yields each step's loss and norm before clipping, scalars.

    lr: the learning rate of step 0, 1, ...; autocast: as in `plain_gradients`; gradients: that, or what section 4.1
    puts in its place.
    """
    optimizer = make_optimizer(model, kind)
    for step, batch in enumerate(batches):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        optimizer.zero_grad()
        loss = gradients(model, batch, autocast)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        yield loss, norm


# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────
#
# The same program runs in every process; torchrun starts them (the launcher at the end of this file calls it). A
# *rank* is one of these processes, by its number; it usually owns one GPU. How many there are is the *world size*. A
# *group* is some of the ranks (PyTorch's *process group*), and a *collective* is a function that all ranks of a group
# call together. What carries the messages is the *backend*: NCCL from GPU to GPU, gloo from CPU to CPU. There are five
# common collectives, and this book needs all but the first (its ranks draw equal weights from one seed). Drawn for two
# ranks, which hold a and b, and of which some cut them in halves, a = [a₀ a₁] and b = [b₀ b₁]:
#
#                       before                         after
#                       rank 0      rank 1             rank 0       rank 1
#     broadcast         a           –             →    a            a
#     all-reduce        a           b             →    a + b        a + b
#     reduce-scatter    [a₀ a₁]     [b₀ b₁]       →    a₀ + b₀      a₁ + b₁       each rank: its share of the sum
#     all-gather        a           b             →    [a b]        [a b]
#     all-to-all        [a₀ a₁]     [b₀ b₁]       →    [a₀ b₀]      [a₁ b₁]       part i of each goes to rank i
#
# An all-reduce is a reduce-scatter and then an all-gather: section 2.2 builds it that way. Beside collectives there are
# *point-to-point* messages, a send on one rank and a receive on another.
#
# If one rank stays away from a collective, the others wait until the timeout, and fail. So whether to call one may
# depend only on what is the same on all ranks, never on this rank's data.
#
# Every function here takes a group; None is all ranks. Where no process group exists there is one rank, and nothing to
# communicate: so each piece also works in a plain program.
#
# What follows says of many a line what breaks without it. `make bugs CHAPTER=01` takes such lines away, one by one, and
# prints what the loss shows of that, and what a comparison of gradients shows. The loss often shows nothing.


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

# ── 2.1 The CTC loss ────────────────────────────────────────────────────────────────────────────────────
#
# CTC is connectionist temporal classification. The network writes one symbol a frame, and there are more frames than
# letters. A *path* is one symbol for each frame; it says the text that is left when repeats are merged and then blanks
# dropped: "_hhe_ll_lo" says "hello". (Two equal letters in a row need a blank between them, so "hello" takes at least 6
# frames.) The probability of a text is the sum over all of its paths, and the loss its −log. Frames are independent, so
# a path's probability is a product.
#
# There are too many paths to list, and no need to: put the labels in a row with blanks around them, 2U + 1 states,
#
#     state      0     1     2     3     4                  a path moves through the states from left to right: in each
#     symbol     _     c     _     a     _                  frame it stays, steps to the next, or skips a blank that
#                                                           stands between two different letters
#
# and let alpha_t(s) be the probability of all ways to be in state s after frame t. A row needs only the row before:
#
#     alpha_t(s) = y_t(symbol of s) · [ alpha_{t−1}(s) + alpha_{t−1}(s−1) + alpha_{t−1}(s−2) if a skip is allowed ]
#
# The text's probability is alpha at the end, in the last state or the one before. beta is the same from the end to the
# start; the product of both tells how much of all probability passes through state s in frame t, and that is the
# gradient:  −∂ log p / ∂ log y_t(k) = − Σ over states s of symbol k of  alpha_t(s) beta_t(s) / (y_t(k) p).
#
# In logarithms, because (1/29)^T is zero in float64 from T = 222 on. "Impossible" is −1e30 there and not −∞, which
# would make ∞ − ∞ = NaN where alpha and beta are put together.
#
# One sum is made twice that way: to the blank behind c come c and that blank, and to a, where a skip is allowed, come
# the same two, and a. So write the states in S = U + 1 pairs, each blank below the label before it:
#
#     pair       0     1     2
#     label      ·     c     a        · is no label, and impossible
#     blank      _     _     _        blank 1 comes from c and blank 1; a from a and, where a skip is allowed, from that
#                                     very sum, else from blank 1 alone. Two sums a pair, and by the rule above four
#
# beta needs no code of its own. Read labels and frames backwards, and beta is alpha: the reversed problem is stacked
# on the batch, P = 2B problems, so one loop over time serves both, and it is the only loop.

IMPOSSIBLE = -1e30


def _lattice(log_y_T2SP: Tensor, skip_SP: Tensor, first_P: Tensor) -> Tensor:
    """alpha of P problems, before any frame and after each, of blanks and labels: (T + 1, 2, S, P).

    A problem begins in the blank of pair first_P; skip_SP: the label before this blank and the one behind it differ.
    """
    T, _, S, P = log_y_T2SP.shape
    alpha = log_y_T2SP.new_full((T + 1, 2, S, P), IMPOSSIBLE)
    alpha[0, 0].scatter_(0, first_P[None], 0)
    for t in range(T):
        (blank_SP, label_SP), (next_blank_SP, next_label_SP) = alpha[t], alpha[t + 1]
        torch.logaddexp(blank_SP, label_SP, out=next_blank_SP)
        come_SP = torch.where(skip_SP, next_blank_SP, blank_SP)
        torch.logaddexp(label_SP[1:], come_SP[:-1], out=next_label_SP[1:])
        alpha[t + 1] += log_y_T2SP[t]
    return alpha


def _turned(x_T2SB: Tensor) -> Tensor:
    """Frames and states backwards. The last blank becomes the first; the impossible label stays before it."""
    blank_TSB, label_TSB = x_T2SB.flip(0, 2).unbind(1)
    return torch.stack([blank_TSB, label_TSB.roll(1, 1)], 1)


class _CTC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs_TBV, labels_BU, frames_B, sizes_B, blank):
        (T, B, V), U = log_probs_TBV.shape, labels_BU.shape[1]
        over_T1B = ~valid_frames(frames_B, T)[:, None]
        log_y_T2SB = log_probs_TBV.new_full(
            (T, 2, U + 1, B), IMPOSSIBLE
        )  # [:, 0] of the blanks, [:, 1] of the labels
        # Behind its end an utterance waits: a blank costs nothing there, and no label can be reached. Backwards that
        # comes first, and so does the padding of the labels: a path waits in the last true blank.
        label_y_TUB = log_probs_TBV.gather(2, labels_BU.expand(T, -1, -1)).mT
        log_y_T2SB[:, 0] = log_probs_TBV[:, None, :, blank].masked_fill(over_T1B, 0)
        log_y_T2SB[:, 1, 1:] = label_y_TUB.masked_fill_(over_T1B, IMPOSSIBLE)
        skip_SB = torch.zeros(U + 1, B, dtype=torch.bool, device=frames_B.device)
        skip_SB[1:-1] = (labels_BU[:, 1:] != labels_BU[:, :-1]).T
        # Forwards a problem begins in blank 0. Backwards it begins in its last true blank, U − size pairs from there.
        problems = [(log_y_T2SB.clamp_(min=IMPOSSIBLE), skip_SB, torch.zeros_like(sizes_B))]
        if ctx.needs_input_grad[0]:
            problems.append((_turned(log_y_T2SB), skip_SB.flip(0), U - sizes_B))
        alpha = _lattice(*(torch.cat(both, -1) for both in zip(*problems)))
        log_p_B = torch.logaddexp(
            *alpha[frames_B, :, sizes_B, torch.arange(B, device=frames_B.device)].T
        )
        if ctx.needs_input_grad[0]:
            # Both alpha and beta contain y of their frame: it is taken off once. What is below e⁻⁸⁰ is nothing, and an
            # exponential of −1e30 takes a CPU far longer.
            through_T2SB = (
                _turned(alpha[1:, ..., B:]).add_(alpha[1:, ..., :B]).sub_(log_y_T2SB).sub_(log_p_B)
            )
            blank_TSB, label_TSB = through_T2SB.clamp_(min=-80).exp_().unbind(1)
            symbol_BUV = F.one_hot(labels_BU, V).to(label_TSB.dtype)
            share_TBV = einsum(label_TSB[:, 1:], symbol_BUV, "T U B, B U V -> T B V")
            share_TBV[..., blank] += blank_TSB.sum(1)
            grad_TBV = share_TBV.neg_().masked_fill_(over_T1B.mT, 0)
            ctx.save_for_backward(
                grad_TBV.masked_fill_(log_p_B[:, None] < IMPOSSIBLE / 2, torch.nan)
            )
        return torch.where(log_p_B < IMPOSSIBLE / 2, torch.inf, -log_p_B)

    @staticmethod
    @once_differentiable  # forward has computed the gradient: nothing here could be differentiated again
    def backward(ctx, grad_B):
        (grad_TBV,) = ctx.saved_tensors
        return (
            torch.where(grad_B[:, None] == 0, 0, grad_TBV * grad_B[:, None]),
            None,
            None,
            None,
            None,
        )


def ctc_loss(
    log_probs_TBV: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int = 0,
    reduction: str = "mean", zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """The CTC loss, −log of the probability of a text, of each utterance; torch.nn.functional.ctc_loss's interface.

    Args:
        log_probs_TBV: log_softmax of the logits.
        targets: (B, U), padded with anything that is a symbol, or all labels in one row; without blanks.
        input_lengths, target_lengths: (B,), frames and labels of each utterance; 0 is allowed for both.
        reduction: "none": (B,); "sum"; "mean": each utterance's loss divided by its labels (at least 1), then the mean.
        zero_infinity: an impossible text (fewer frames than labels and repeats) costs 0 and has no gradient. If not, it
            costs ∞, and its gradient is NaN, so that nobody trains on one by mistake.

    Returns: the loss in nats, at least fp32. Its gradient at log_probs is the true one, −(share of each symbol); the
    native function's contains the softmax's term already, exp(log_probs) − share. Through log_softmax both are equal.
    Raises: ValueError: shapes or lengths that contradict each other, a target that is blank or no symbol (values are
    looked at on the CPU only).
    Source: Graves et al., 2006; in log space as in Deep Speech 2, section 4.2.
    """
    (T, B, V), device = log_probs_TBV.shape, log_probs_TBV.device
    frames_B, sizes_B = (
        torch.as_tensor(x, device=device).to(torch.int64) for x in (input_lengths, target_lengths)
    )
    labels = targets.to(device, torch.int64)
    if reduction not in ("none", "sum", "mean") or not 0 <= blank < V:
        raise ValueError(
            f"reduction={reduction!r}: none, sum or mean; blank={blank}: one of the {V} symbols"
        )
    if (
        not frames_B.shape == sizes_B.shape == (B,)
        or labels.ndim == 0
        or labels.shape[:-1] not in ((), (B,))
    ):
        found = f"targets {tuple(labels.shape)}, lengths {tuple(frames_B.shape)} and {tuple(sizes_B.shape)}"
        raise ValueError(f"{found} do not fit log_probs of {B} utterances")
    if labels.ndim == 1:  # all in one row: into a table
        if labels.numel() != int(sizes_B.sum()):
            raise ValueError(
                f"{labels.numel()} targets in one row, but target_lengths sum to {int(sizes_B.sum())}"
            )
        labels = (
            nn.utils.rnn.pad_sequence(labels.split(sizes_B.tolist()), True) if B else labels[None]
        )
    valid_BU = valid_frames(sizes_B, labels.shape[1]).T
    if B and _has_values(frames_B):
        if (
            min(frames_B.min(), sizes_B.min()) < 0
            or frames_B.max() > T
            or sizes_B.max() > labels.shape[1]
        ):
            found = f"input_lengths {frames_B.tolist()}, target_lengths {sizes_B.tolist()}"
            raise ValueError(
                f"{found}: there are {T} frames, and targets have {labels.shape[1]} columns"
            )
        if (bad := labels[valid_BU & ((labels < 0) | (labels >= V) | (labels == blank))]).numel():
            raise ValueError(
                f"target {bad[0]} is the blank {blank} or no symbol: they are numbered 0 to {V - 1}"
            )
    labels_BU = torch.where(valid_BU, labels, blank)
    loss_B = _CTC.apply(at_least_fp32(log_probs_TBV), labels_BU, frames_B, sizes_B, blank)
    if zero_infinity:
        loss_B = torch.where(loss_B == torch.inf, 0, loss_B)
    return {"none": loss_B, "sum": loss_B.sum(), "mean": (loss_B / sizes_B.clamp_min(1)).mean()}[
        reduction
    ]


# ── 2.2 The ring ────────────────────────────────────────────────────────────────────────────────────────
#
# N ranks hold a vector of K numbers each, and all want the sum. If every rank sent its vector to one, that one's cable
# would carry N·K numbers. In a ring each rank talks to its two neighbours alone, and all cables work at the same time.
# The vector is cut in N segments, and each travels around twice. In step i rank r sends segment r − i to the right
# (all numbers modulo N), and from the left comes segment r − i − 1:
#
#     first lap, N − 1 steps      what comes is added. In the end rank r holds the whole sum of segment r + 1:
#                                 that was a reduce-scatter
#     second lap, N − 1 steps     what comes replaces: an all-gather
#
#          segment 0    1    2             after 2 steps     0    1    2            after 2 more
#     rank 0      a0 → a1   a2                         .    Σ1    .                   Σ0  Σ1  Σ2
#     rank 1      b0   b1 → b2                         .     .   Σ2                   Σ0  Σ1  Σ2
#     rank 2      c0   c1   c2 →                      Σ0     .    .                   Σ0  Σ1  Σ2
#
# (→ marks what a rank sends to the next one in step 0; rank 2 sends to rank 0.)
#
# Each rank sends 2·K·(N − 1)/N numbers: hardly more for a thousand ranks than for two. Segment s is summed as
# x_s + x_{s+1} + …, beginning at rank s, and then copied: so the result is the same on every rank, to the bit, although
# floating-point sums depend on their order.
#
# Receives are posted before sends, in one batch. If every rank began with a blocking send, each would wait for its
# right neighbour to receive, which itself waits: a deadlock, which a transport with buffers hides while messages are
# small.


def _exchange(messages: list[tuple[Callable, Tensor, int]], group) -> None:
    """Sends and receives at once: (dist.isend or dist.irecv, tensor, rank in the group) each. Empty ones are left out.

    gloo has no point-to-point messages for CUDA tensors: they go through the CPU.
    """
    messages = sorted(
        (m for m in messages if m[1].numel()), key=lambda m: m[0] is dist.isend
    )  # receives first
    staged = [
        x.cpu() if dist.get_backend(group) == "gloo" else x for _, x, _ in messages
    ]  # itself, on the CPU
    works = [
        dist.P2POp(way, x, group=group, group_peer=r) for (way, _, r), x in zip(messages, staged)
    ]
    for work in dist.batch_isend_irecv(works) if works else []:
        work.wait()
    for (way, x, _), copy in zip(messages, staged):
        if way is dist.irecv and copy is not x:
            x.copy_(copy)


def ring_all_reduce(tensor: Tensor, group=None) -> Tensor:
    """Sums `tensor` over the ranks of `group`, in place, by messages between neighbours; returns it.

    tensor: the same shape on every rank; any, also with fewer elements than ranks, or none. The result is equal on all
    ranks to the bit. Each rank sends about 2·K·(N − 1)/N elements, all ranks together exactly 2·K·(N − 1).
    Source: Deep Speech 2, section 4.1.
    """
    N, r = group_size(group), group_rank(group)
    if N == 1:
        return tensor
    flat = tensor.detach().contiguous().view(-1)
    segments = flat.tensor_split(N)  # the first K mod N get one element more
    left, right, inbox = (r - 1) % N, (r + 1) % N, torch.empty_like(segments[0])
    for step in range(2 * (N - 1)):
        sent, mine, first_lap = segments[(r - step) % N], segments[(r - step - 1) % N], step < N - 1
        arrived = inbox[: mine.numel()] if first_lap else mine
        _exchange([(dist.irecv, arrived, left), (dist.isend, sent, right)], group)
        if first_lap:
            mine += arrived
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view_as(tensor))
    return tensor


# ── 2.3 Data parallelism ────────────────────────────────────────────────────────────────────────────────
#
# Each rank has the whole network, a *replica* of it, and some of the batch's utterances. When is the sum of the ranks'
# gradients the one that a single device gets for the whole batch? When the sum of the ranks' losses is its loss. That
# loss is a mean:
#
#     loss = 1 / utterances · Σ over utterances of  CTC loss / labels of that utterance         ("mean" of CTC)
#
# so each rank divides by the number of utterances *on all ranks*, and gradients are summed. To divide by the rank's own
# number and average the gradients is the same only while all shares are equal: the last batch of an epoch is not.
#
# What is sent and when: the first gradients are ready long before the last, because backward starts at the output. They
# are put into buckets, in the order in which backward produces them, and a bucket leaves as soon as all of its
# gradients are there, while backward goes on:
#
#     main thread      backward:  out  full │ layer 1 │ layer 0 │ convolutions │ wait
#     ring's thread                         │ bucket 0 ──► │ bucket 1 ──► │ bucket 2 ──► │
#
# Three rules keep the ranks in step. One thread sends, so buckets never overtake each other. Buckets leave in a fixed
# order, since a rank could finish gradients in another order than its neighbour. And the ring has a group of its own:
# BatchNorm's messages (2.4) travel at the same time, and must not meet those of the ring. Break a rule, and the loss
# stays right while gradients of different parameters are added up, or the ranks wait for each other for ever.


class GradientRing:
    """Sums the gradients of `parameters` over `group` while backward runs; after each backward call finish().

    Args:
        group: for this ring alone, made by `make_group`; None: a single rank, and nothing to do.
        bucket_bytes: a bucket is closed when it holds that much.

    Every rank must list the same parameters in the same order, and call finish() once for every step; a rank without an
    utterance sends zeros. Gradients are complete when it returns. Do not call backward twice between two of them: the
    first sum would be on its way already. Its hooks stay on the parameters until close().
    Raises: ValueError where several ranks get no group. Source: Deep Speech 2, section 4.1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group=None, bucket_bytes: int = 1 << 20):
        if group is None and group_size() > 1:
            raise ValueError(
                "the ring needs a group of its own among several ranks: make_group makes one"
            )
        self.group, self.buckets = group, [[]]
        for p in reversed([p for p in parameters if p.requires_grad]):
            if sum(q.nbytes for q in self.buckets[-1]) >= bucket_bytes:
                self.buckets.append([])
            self.buckets[-1].append(p)
        self.thread, self.jobs, self.ready = ThreadPoolExecutor(1, "ring"), [], set()
        several = itertools.chain(*self.buckets) if group_size(group) > 1 else ()
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in several]

    def _arrived(self, p: nn.Parameter) -> None:
        self.ready.add(p)
        while len(self.jobs) < len(self.buckets) and self.ready.issuperset(
            self.buckets[len(self.jobs)]
        ):
            self.jobs.append(self.thread.submit(self._sum, self.buckets[len(self.jobs)]))

    def _sum(self, bucket: list[nn.Parameter]) -> None:
        if bucket[0].is_cuda:
            torch.cuda.set_device(bucket[0].device)  # a thread's own setting
        flat = ring_all_reduce(torch.cat([p.grad.flatten() for p in bucket]), self.group)
        for p, total in zip(bucket, flat.split([p.numel() for p in bucket])):
            p.grad.copy_(total.view_as(p))

    def finish(self) -> None:
        """Sends what has not left yet, and waits for all of it; zeros where this rank has no gradient."""
        for p in itertools.chain(*self.buckets) if self.hooks else ():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self._arrived(p)
        for job in self.jobs:
            job.result()  # raises here what has been raised there
        self.jobs, self.ready = [], set()

    def close(self) -> None:
        """Takes the hooks off and ends the thread."""
        for hook in self.hooks:
            hook.remove()
        self.thread.shutdown()


# ── 2.4 BatchNorm over all frames of all ranks ──────────────────────────────────────────────────────────
#
# A recurrent layer could be normalised in each time step by itself, over the batch; that gained nothing. The second
# paper takes one mean and one variance for each feature over all frames of all utterances, and it normalises W x alone:
#
#     h_t = clip(BN(W x_t) + U h_{t−1})         BN(x) = γ (x − E[x]) / √(Var[x] + ε) + β
#
# Two things have to be right. Padding is no frame: counted, it pulls mean and variance towards zero, the more the more
# unequal the batch is. And with data parallelism "all" means all ranks, or each rank would be another network:
#
#     count, Σ x         ─ all-reduce ─►  E         ranks hold unequal numbers of frames, so sums and counts travel,
#     Σ (x − E)²         ─ all-reduce ─►  Var       never means
#
# Backward needs the sums too. E and Var of every rank depend on every rank's x: what a rank's loss says about E must
# reach the frames of all others. The all-reduce's gradient is therefore an all-reduce. Left out, the loss is right to
# the last digit, and gradients are wrong.


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x, group):
        ctx.group = group
        return _all_reduce(partial_x.clone(), group)

    @staticmethod
    def backward(ctx, grad):  # by the same node, and so a second derivative is right too
        return _SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(partial_x: Tensor, group=None) -> Tensor:
    """The sum over `group`, on every rank; its gradient is summed as well, since each rank's loss depends on all x.

    partial_x: of any shape, the same on every rank; what is returned has it too. Right where each rank computes a loss
    of its own, and these add up. Source: ours.
    """
    return _SumOverRanks.apply(partial_x, group) if group_size(group) > 1 else partial_x


class SequenceBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all valid frames of all ranks of `group`; eps, momentum and the state dict are nn.BatchNorm1d's.

    forward: x (..., H); valid (...), bool, or broadcastable to it. Returns x's shape, zero where not valid, at least
    fp32. The running averages are the same on every rank. Every rank must call it in training, with frames or without.
    Raises: ValueError in training where fewer than two frames are valid on all ranks together (looked at on the CPU).
    Source: Deep Speech 2, section 3.2.
    """

    def __init__(self, num_features: int, group=None, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)
        self.group = group

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = at_least_fp32(x)
        valid, frames = valid.expand(x.shape[:-1])[..., None], tuple(range(x.ndim - 1))
        mean, var = self.running_mean, self.running_var
        if self.training:
            here = valid.sum().to(x.dtype)[None]
            total = sum_over_ranks(
                torch.cat([torch.where(valid, x, 0).sum(frames), here]), self.group
            )
            count = total[-1].detach()
            if _has_values(x) and count < 2:
                raise ValueError(f"{count:.0f} valid frames on all ranks: a variance needs two")
            mean = total[:-1] / count
            var = (
                sum_over_ranks(torch.where(valid, x - mean, 0).square().sum(frames), self.group)
                / count
            )
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(
                    (var * count / (count - 1)).to(self.running_var.dtype), self.momentum
                )
                self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return torch.where(valid, (x - mean) * scale + self.bias, 0)


# ── 2.5 Recurrence, on one rank and cut in time ─────────────────────────────────────────────────────────
#
# h_t = clip(x_t + h_{t−1} U) is a loop that nothing can shorten, so it should at least be a short one. Autograd would
# record four operators a step. Written out, backward is one product a step, from the end to the start,
#
#     a_t  = (dL/dh_t + a_{t+1} Uᵀ) · [0 < h_t < 20]          the gradient of what goes into the clip
#     dL/dx_t = a_t              dL/dU = Σ_t h_{t−1}ᵀ a_t      and the sum is one product over all steps, after the loop
#
# On one rank both directions go through the loop side by side, as a batch of D matrices.
#
# Deep Speech 1 put a second GPU to work inside one utterance: it cut the recordings in time. The layers without
# recurrence need no other rank for that. The recurrence is a chain, and a rank cannot begin before the state arrives
# from its neighbour. But there are two chains, and they start at opposite ends:
#
#     slot           0              1              2              3            forward wave  ─►, backward wave ◄─
#     rank 0       forward                                       backward
#     rank 1                      forward       backward                       in the middle two ranks exchange
#     rank 2                      backward      forward                        their boundary states and swap roles
#     rank 3      backward                                       forward
#
# So N ranks take N slots of T/N steps: T steps, where one rank has 2T to do. The speed-up is 2 at most, whatever N is:
# each direction is T steps one after the other, and there are only two of them. With more ranks each holds less, and
# rests longer.
#
# The gradient takes the same way back: what dL/dh of a rank's first state says belongs to the neighbour that has sent
# it. Make the exchange with plain send and receive, and autograd sees a constant there: every gradient is wrong that
# should have crossed the cut. Here forward and backward of the whole chain are one node of the graph, so no message can
# be left out of it. On one rank or on many, a node is two runs of "compute these directions from the state that has
# arrived, and return the state to hand on"; only the order differs in which the runs take place.


def _side_by_side(
    compute: Callable[[slice, Tensor], Tensor], state_DBH: Tensor, up: int, group
) -> None:
    """On one rank: all directions at once."""
    compute(slice(None), state_DBH)


def _wave(compute: Callable[[slice, Tensor], Tensor], state_2BH: Tensor, up: int, group) -> None:
    """Runs compute(direction, state that arrives) on one rank after the other, and hands on what it returns.

    Direction `up` (0 or 1) goes from rank 0 upwards, the other one from the last rank downwards.
    """
    N, r = group_size(group), group_rank(group)
    chains = (
        (up, r, 1),
        (1 - up, N - 1 - r, -1),
    )  # direction, this rank's place in its chain, way to the next rank
    for slot in range(N):
        messages = []
        for direction, place, way in chains:
            own = slice(direction, direction + 1)
            if place == slot:
                state_2BH[own] = compute(own, state_2BH[own])
                if slot + 1 < N:
                    messages.append((dist.isend, state_2BH[own], r + way))
            elif place == slot + 1:
                messages.append((dist.irecv, state_2BH[own], r - way))
        _exchange(messages, group)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tDBH, weight_DHH, cut, group):
        h_tDBH, start_DBH = torch.empty_like(x_tDBH), x_tDBH.new_zeros(x_tDBH.shape[1:])

        def compute(own: slice, state_DBH: Tensor) -> Tensor:
            start_DBH[own], forth_DHH = state_DBH, weight_DHH[own]
            for x_DBH, h_DBH in zip(x_tDBH[:, own], h_tDBH[:, own]):
                state_DBH = torch.baddbmm(x_DBH, state_DBH, forth_DHH, out=h_DBH).clamp_(0, 20)
            return state_DBH

        (_wave if cut else _side_by_side)(compute, torch.zeros_like(start_DBH), 0, group)
        ctx.save_for_backward(h_tDBH, start_DBH, weight_DHH)
        ctx.cut, ctx.group = cut, group
        return h_tDBH

    @staticmethod
    @once_differentiable  # a formula that works in place, out of autograd's sight
    def backward(ctx, grad_tDBH):
        h_tDBH, start_DBH, weight_DHH = ctx.saved_tensors
        a_tDBH, open_tDBH = (
            torch.empty_like(h_tDBH),
            ((h_tDBH > 0) & (h_tDBH < 20)).to(h_tDBH.dtype),
        )

        def compute(own: slice, carry_DBH: Tensor) -> Tensor:
            steps, back_DHH = (
                zip(grad_tDBH[:, own], open_tDBH[:, own], a_tDBH[:, own]),
                weight_DHH[own].mT,
            )
            for grad_DBH, open_DBH, a_DBH in reversed(list(steps)):
                torch.add(grad_DBH, carry_DBH, out=a_DBH).mul_(open_DBH)
                carry_DBH = torch.bmm(a_DBH, back_DHH)
            return carry_DBH

        # The waves run the other way round: direction 0 ended on the last rank.
        (_wave if ctx.cut else _side_by_side)(compute, torch.zeros_like(start_DBH), 1, ctx.group)
        before_tDBH = torch.cat([start_DBH[None], h_tDBH])[:-1]
        partial_DHH = einsum(before_tDBH, a_tDBH, "t D B H, t D B J -> D H J")
        return a_tDBH, _all_reduce(partial_DHH, ctx.group) if ctx.cut else partial_DHH, None, None


def clipped_recurrence(x_TDBH: Tensor, weight_DHH: Tensor) -> Tensor:
    """`plain_recurrence`, backward by formula: all states, (T, D, B, H) in the weight's dtype.

    Twice differentiated it raises RuntimeError. Source: ours.
    """
    return _Recurrence.apply(x_TDBH.to(weight_DHH.dtype), weight_DHH, False, None)


def time_parallel_birnn(x_tBH: Tensor, weight_2HH: Tensor, group=None) -> Tensor:
    """A bidirectional clipped recurrence over frames that are divided over `group`; both directions added, (t, B, H).

    Args:
        x_tBH: this rank's frames, which follow those of the rank before; ranks may hold unequal numbers, or none.
            Utterances of unequal length: zero behind each end, as everywhere in this chapter.
        weight_2HH: U of either direction, the same on every rank. Its gradient is summed over `group` here.

    Every rank of the group must call it, and its backward. Source: Deep Speech (2014), section 4.2.
    """
    x_t2BH = torch.stack([x_tBH, x_tBH.flip(0)], 1).to(
        weight_2HH.dtype
    )  # each direction in its own order
    h_t2BH = _Recurrence.apply(x_t2BH, weight_2HH, True, group)
    return h_t2BH[:, 0] + h_t2BH[:, 1].flip(0)


def parallel_model(config: SpeechConfig, group=None) -> DeepSpeech2:
    """`DeepSpeech2` for data parallelism over `group`: the same weights, the norm over all ranks, a fast recurrence.

    Source: ours.
    """
    return DeepSpeech2(config, partial(SequenceBatchNorm, group=group), clipped_recurrence)


# ── 2.6 From probabilities to words ─────────────────────────────────────────────────────────────────────
#
# The greedy way takes the most probable symbol of each frame, merges repeats and drops blanks: that is the text of the
# most probable *path*. But a text's probability is a sum over paths, and nobody has told the network which words exist.
# So the papers search for the text that maximises
#
#     Q = log P(text | speech) + α · log P(text | language model) + β · (number of words)
#
# (β, because every word costs probability: without it the language model likes texts of few words.)
#
# The search goes through the frames with a set of *prefixes*, the beam. Two numbers are kept for each: the probability
# of its paths that end in a blank and of those that do not. They must be apart, because the same symbol once more
#
#     after a blank         is a new letter      "l" + "_" + "l"   says "ll"
#     without a blank       is a repeat          "l" + "l"         says "l"
#
# The language model (`NGram`, beside the data, or any other) speaks when a space completes a word, and at the end. With
# a beam that is wide enough to hold every prefix, the sum over paths is exact. A narrow one may lose the best text,
# since it judges a prefix by the frames that it has seen.


def greedy(log_probs_TV: Tensor) -> str:
    """The text of the most probable path. Source: Graves et al., 2006, best path decoding."""
    path = torch.unique_consecutive(log_probs_TV.argmax(-1)).tolist() if len(log_probs_TV) else []
    return " ".join("".join(ALPHABET[symbol] for symbol in path if symbol).split())


def beam_search(
    log_probs_TV: Tensor, beam: int = 32, lm=None, alpha: float = 1.0, beta: float = 1.0, cutoff: float = 0.999,
    most: int = 40,
) -> list[tuple[str, float]]:  # fmt: skip
    """The best texts and their Q, the best first.

    Args:
        log_probs_TV: of one utterance.
        beam: prefixes that are kept after each frame (the papers: 500 to 8,000).
        lm: anything with score(history: tuple of words, word) in nats; None: no language model, and no bonus.
        alpha, beta: its weight, and the bonus for each word.
        cutoff, most: a frame's symbols are tried from the most probable on, until they add up to `cutoff`, and never
            more than `most` of them: section 7.2 of the second paper. 1.0 tries all.

    Raises: ValueError where beam < 1. Source: section 2.2 of the first paper.
    """
    if beam < 1:
        raise ValueError(f"beam={beam}: at least 1")

    @cache
    def last_word(prefix: str) -> float:
        """What the language model says of the last word, now that it is complete; 0 behind a space."""
        *history, word = prefix.split(" ")
        return (
            alpha * lm.score(tuple(filter(None, history)), word) + beta
            if lm is not None and word
            else 0.0
        )

    heard = {
        "": (0.0, -math.inf)
    }  # prefix to log-probabilities of its paths that end in a blank, and that do not
    spoken = {"": 0.0}  # prefix to α log P + β of its complete words: those that a space follows
    falling_TV, order_TV = log_probs_TV.to(torch.float64).sort(-1, descending=True)
    tried_T = (
        ((falling_TV.exp().cumsum(-1) - falling_TV.exp()) < cutoff).sum(-1).clamp(1, most).tolist()
    )
    for row, symbols, tried in zip(falling_TV.tolist(), order_TV.tolist(), tried_T):
        arrived = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (blank, letter) in heard.items():
            same, whole = arrived[prefix], _log_add(blank, letter)
            for log_p, symbol in zip(row[:tried], symbols):
                new = ALPHABET[symbol]
                if symbol == 0:
                    same[0] = _log_add(same[0], whole + log_p)
                    continue
                if repeat := prefix.endswith(
                    new
                ):  # without a blank between them: the same letter, still
                    same[1] = _log_add(same[1], letter + log_p)
                longer = arrived[prefix + new]
                longer[1] = _log_add(longer[1], (blank if repeat else whole) + log_p)
                spoken[prefix + new] = spoken[prefix] + (last_word(prefix) if new == " " else 0.0)
        reached = (item for item in arrived.items() if max(item[1]) > -math.inf)
        best = sorted(reached, key=lambda item: _log_add(*item[1]) + spoken[item[0]], reverse=True)
        heard = {prefix: tuple(pair) for prefix, pair in best[:beam]}
    texts: dict[str, float] = defaultdict(
        lambda: -math.inf
    )  # prefixes that differ in spaces alone are one text
    for prefix, pair in heard.items():
        text = " ".join(prefix.split())
        texts[text] = _log_add(texts[text], _log_add(*pair) + spoken[prefix] + last_word(prefix))
    return sorted(texts.items(), key=lambda item: item[1], reverse=True)


def _log_add(a: float, b: float) -> float:
    low, high = (a, b) if a < b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# With data parallelism each rank's weights are the single device's: nothing is cut, and a file written by one rank can
# be read by any number. What can go wrong is that ranks drift apart, by one gradient that was not summed, without any
# error. `check_replicas` finds that; it belongs in front of every checkpoint.


def check_replicas(model: nn.Module, group=None) -> None:
    """Raises ValueError, on every rank, where a parameter or running average is not the same on all ranks of `group`.

    Compares the lowest with the highest value of each element.
    """
    for name, x in model.state_dict().items():
        low, high = (
            _all_reduce(x.clone(), group, op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)
        )
        if not torch.equal(low, high):
            raise ValueError(
                f"{name} should be the same on every rank, but differs by {(high - low).abs().max():.1e}"
            )


def save_model(path: str, model: DeepSpeech2, texts: Iterable[str]) -> None:
    """Weights, configuration, and what the language model is counted from, in one safetensors file.

    Raises: OSError where it cannot be written as a whole; the file that stood there before is untouched.
    """
    from safetensors.torch import save_file

    kept = dict(config=json.dumps(asdict(model.config)), alphabet=ALPHABET, texts="\n".join(texts))
    aside = Path(f"{path}.unfinished")
    try:
        save_file({name: x.contiguous() for name, x in model.state_dict().items()}, aside, kept)
        os.replace(aside, path)  # one step for the file system
    except Exception as error:  # safetensors has errors of its own
        raise OSError(f"cannot write {path}: {error}; an older one there is untouched") from error
    finally:
        aside.unlink(missing_ok=True)  # also where Ctrl-C ends it


def load_model(path: str) -> tuple[DeepSpeech2, list[str]]:
    """What `save_model` has written, in eval mode. Raises ValueError for a file that is no such model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            kept, state = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},
            )
        if kept["alphabet"] != ALPHABET:  # the same weights would write other letters
            raise ValueError(f"its alphabet is {kept['alphabet']!r}, and here it is {ALPHABET!r}")
        model = parallel_model(SpeechConfig(**json.loads(kept["config"])))
        model.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = shorten(str(error), 300)  # one line of torch's many
        raise ValueError(f"{path} holds no model that --save has written: {reason}") from error
    return model.eval(), kept["texts"].splitlines()


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# What a step does, and in which order the utterances come. (Where they come from stands behind part 6: sound, words,
# files.)
#
# ── 4.1 The gradient on many ranks ──────────────────────────────────────────────────────────────────────
#
# The loop is part 1's, and one line of it changes: where the gradient comes from. All else is the same on each rank,
# because it is a function of things that are: the weights, which began alike, and the summed gradient.
#
# So is clipping. Long utterances make gradients explode, in a network that multiplies by U hundreds of times, and an
# accelerated gradient with a momentum of 0.99 remembers an explosion for hundreds of steps. Both papers clip: where the
# norm of the whole gradient is above a bound (400), the gradient is scaled down to it. The norm is that of the *summed*
# gradient, behind the ring; each rank finds the same norm by itself, and steps alike. Clipped before, each rank would
# scale its summand by another factor, and the sum would point elsewhere. (From chapter 2 on no rank holds the whole
# gradient, and its norm takes a sum of its own.)


def parallel_gradients(
    model: DeepSpeech2,
    batch: Batch,
    autocast: torch.dtype | None = None,
    *,
    ring: GradientRing,
    group=None,
) -> Tensor:
    """`plain_gradients` of the utterances of all ranks: the same gradients and the same loss, a scalar, on every rank.

    batch: this rank's utterances, which may be none; every rank must call it. ring: of the model's parameters; group:
    the data-parallel ranks, None for all. At least one of them has an utterance.
    """
    # torch.full is made on the device; torch.tensor would be copied there, and the host would wait for it.
    utterances = _all_reduce(
        torch.full((), len(batch.frames_B), device=batch.frames_B.device), group
    )
    with torch.autocast(batch.frames_B.device.type, autocast, enabled=autocast is not None):
        log_probs_TBV, frames_B = model(batch.features_BTF, batch.frames_B)
    loss_B = ctc_loss(log_probs_TBV, batch.labels_BU, frames_B, batch.sizes_B, reduction="none")
    partial_loss = (loss_B / batch.sizes_B.clamp_min(1)).sum() / utterances
    partial_loss.backward()
    ring.finish()
    return _all_reduce(partial_loss.detach(), group)


def train(
    model: DeepSpeech2,
    batches: Iterable[Batch],
    lr: Callable[[int], float],
    group=None,
    ring_group=None,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on many ranks: yields the same losses and norms, scalars. Every rank must iterate it.

    batches: this rank's share of each step's utterances. group: the data-parallel ranks, None for all; ring_group: the
    same ranks once more, for the gradients alone; options: of `train_alone`.
    """
    ring = GradientRing(model.parameters(), ring_group)
    try:
        gradients = partial(parallel_gradients, ring=ring, group=group)
        yield from train_alone(model, batches, lr, gradients=gradients, **options)
    finally:
        ring.close()


# ── 4.2 Which utterances when, and how fast ─────────────────────────────────────────────────────────────
#
# A batch is made of utterances of about the same length, since all are padded to the longest. SortaGrad: in the first
# epoch the batches come in order of length, short ones first. Long utterances have small probabilities and large
# gradients while the network knows nothing, and the short ones teach it the letters. Later epochs shuffle the batches.
#
# The ranks' shares of a batch are dealt out in turn, longest first: each gets long ones and short ones, and no rank
# waits for another that has all of the long ones.


def sortagrad_batches(
    lengths: list[int], batch: int, epoch: int, seed: int = 0, sort: bool = True
) -> list[list[int]]:
    """Epoch `epoch`'s batches, as lists of utterance numbers; each utterance is in exactly one.

    The batches of epoch 0 are sorted by length, later ones are in random order. sort=False: epoch 0 too.
    Source: Deep Speech 2, section 3.3.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    if epoch or not sort:
        random.Random(f"{seed} {epoch}").shuffle(batches)
    return batches


def share_of(utterances: list[int], lengths: list[int], rank: int, world_size: int) -> list[int]:
    """This rank's utterances of a batch: dealt out in turn, longest first."""
    return sorted(utterances, key=lambda i: -lengths[i])[rank::world_size]


def learning_rate(
    step: int, epoch_steps: int, epochs: int, peak: float, kind: str = "nesterov"
) -> float:
    """For "nesterov" divided by 1.2 after each epoch, as in Deep Speech 2; for "adamw" 100 steps up, a cosine down."""
    if kind == "nesterov":
        return peak / 1.2 ** (step // epoch_steps)
    done = step / max(1, epoch_steps * epochs)
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))


# ── 5 The papers' arithmetic ────────────────────────────────────────────────────────────────────────────


def ring_elements(K: int, N: int) -> int:
    """Elements that N ranks send together to sum K: each of N segments of K / N makes N − 1 steps in either lap.

    Source: Deep Speech 2, section 4.1 (the algorithm; the count is ours).
    """
    return 2 * K * (N - 1)


def parameter_count(layers: int, recurrent: int, hidden: int) -> int:
    """Weights of the nets in Deep Speech 2's comparison of depths: 1-D convolution, `recurrent` layers, full ones.

    161·11·H in the convolution; H² for W, which both directions share, and H² for each direction's U; H² for each full
    layer that is left; 29·H at the end. (With a W for each direction the four nets would have 45 to 51 million, and not
    the 38 that the paper gives to all.) Source: Deep Speech 2, section 3.2 (sizes of its table; the formula is ours).
    """
    return 161 * 11 * hidden + (3 * recurrent + layers - recurrent - 1) * hidden**2 + 29 * hidden


SAME_SIZE = (
    (5, 1, 2400),
    (5, 3, 1880),
    (7, 5, 1510),
    (9, 7, 1280),
)  # layers, recurrent ones, H: "38 million"
OWN_TEST_SET = (24.01, 13.59)  # error rates of Deep Speech and Deep Speech 2, in %
ENGLISH_HOURS = dict(
    WSJ=80, Switchboard=300, Fisher=2000, LibriSpeech=960, Baidu_read=5000, Baidu_mixed=3600
)
# Deep Speech on its own recordings, error rates in %: clean, noisy, both together.
NOISY_SPEECH = {
    "Apple": (14.24, 43.76, 26.73), "Bing": (11.73, 36.12, 22.05), "Google": (6.64, 30.47, 16.72),
    "wit.ai": (7.94, 35.06, 19.41), "Deep Speech": (6.56, 19.06, 11.85),
}  # fmt: skip


def noisy_share(clean: float, noisy: float, together: float) -> float:
    """The share of words that are in the noisy recordings, from three error rates: one number for all systems.

    Source: Deep Speech, section 5.2 (its table of five systems; the formula is ours).
    """
    return (together - clean) / (noisy - clean)


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# More speech is now a matter of more GPUs. A larger *network* is not: every rank keeps all weights, all gradients and
# the optimiser's moments, 12 to 16 bytes a parameter, and what does not fit on one device does not fit on a thousand.
# The cut in time does not help: it divides what a layer keeps of the utterance, not the weights, and a chain has only
# two ends to start from. Chapter 2 cuts the layers themselves. (That all ranks repeat the same optimiser step, on
# moments that all of them keep, is left to later chapters.)


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────


def small_batch(utterances: int, config: SpeechConfig, seed: int = 1) -> Batch:
    """Noise of very unequal lengths with random labels, one of them empty, one with repeats."""
    generator = torch.Generator().manual_seed(seed)
    frames_B = torch.randint(14, 40, (utterances,), generator=generator)
    sizes_B = torch.randint(1, 5, (utterances,), generator=generator)
    sizes_B[0] = 0
    labels_BU = torch.randint(1, len(ALPHABET), (utterances, 5), generator=generator)
    labels_BU[-1, 1] = labels_BU[-1, 0]
    features_BTF = torch.randn(utterances, 40, config.features, generator=generator)
    features_BTF *= valid_frames(frames_B, 40).T[..., None]
    return Batch(features_BTF, frames_B, labels_BU, sizes_B).rows(range(utterances))


def equivalence(
    device: torch.device, ring_group, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> dict:
    """A small network on these ranks beside the same on a single device: name to relative error, of every tensor.

    Utterances are of unequal length and the ranks' shares unequal in number. Errors are per tensor, max|Δ| over
    max|reference|. Then CTC beside PyTorch's, and the layer that is cut in time beside the whole one.
    """
    N, r, errors = group_size(), group_rank(), {}

    def compare(name: str, here: Tensor, reference: Tensor) -> None:
        errors[name] = ((here - reference).abs().max() / reference.abs().max()).item()

    convolutions = (3, (5, 5), (2, 2)), (4, (3, 3), (1, 2))
    config = SpeechConfig(bins=12, convolutions=convolutions, layers=2, hidden_size=16)
    plain, parallel = (
        DeepSpeech2(config).to(device, dtype),
        parallel_model(config).to(device, dtype),
    )
    batches = [small_batch(2 * N + 1, config, seed).to(device, dtype) for seed in range(5)]
    options = dict(lr=lambda step: 0.01, max_norm=0.5, autocast=autocast)
    mine = (batch.rows(range(r, 2 * N + 1, N)) for batch in batches)
    runs = zip(
        train_alone(plain, batches, **options),
        train(parallel, mine, ring_group=ring_group, **options),
    )
    for step, ((loss, norm), (loss_here, norm_here)) in enumerate(runs):
        compare(f"loss {step}", loss_here, loss)
        compare(f"norm {step}", norm_here, norm)
        for (name, p), q in (
            zip(parallel.named_parameters(), plain.parameters()) if step == 0 else ()
        ):
            compare(f"gradient of {name}", p.grad, q.grad)
    for (name, x), y in zip(parallel.state_dict().items(), plain.state_dict().values()):
        if x.dtype == torch.float64:  # in narrower types rounding has grown after five steps
            compare(f"after Nesterov {name}", x, y)

    batch = small_batch(9, config, 7)
    x_TBV = torch.randn(
        40, 9, len(ALPHABET), dtype=dtype, generator=torch.Generator().manual_seed(8)
    ).to(device)
    args = x_TBV.requires_grad_().log_softmax(-1), batch.labels_BU, batch.frames_B, batch.sizes_B
    losses = [loss(*args, zero_infinity=True) for loss in (ctc_loss, F.ctc_loss)]
    compare("CTC loss", *losses)
    compare(
        "CTC gradient", *(torch.autograd.grad(loss, x_TBV, retain_graph=True)[0] for loss in losses)
    )

    def own(x_TBH: Tensor) -> Tensor:
        return x_TBH.tensor_split(N)[r]

    x_TBH = (
        (x_TBV[..., :8] * valid_frames(batch.frames_B.to(device), 40)[..., None])
        .detach()
        .requires_grad_()
    )
    leaves, upstream_TBH = (x_TBH, plain.layers[0].weight[:, :8, :8]), x_TBV[..., 8:16].detach()
    h_T2BH = plain_recurrence(torch.stack([x_TBH, x_TBH.flip(0)], 1), leaves[1])
    whole_TBH, cut_tBH = (
        h_T2BH[:, 0] + h_T2BH[:, 1].flip(0),
        time_parallel_birnn(own(x_TBH), leaves[1]),
    )
    reference_TBH, reference_2HH = torch.autograd.grad(whole_TBH, leaves, upstream_TBH)
    grad_TBH, grad_2HH = torch.autograd.grad(cut_tBH, leaves, own(upstream_TBH))
    compare("cut in time: output", cut_tBH, own(whole_TBH))
    compare("cut in time: input's gradient", own(grad_TBH), own(reference_TBH))
    compare("cut in time: weight's gradient", grad_2HH, reference_2HH)
    largest = torch.tensor(list(errors.values()), dtype=torch.float64, device=device)
    return dict(zip(errors, _all_reduce(largest, None, dist.ReduceOp.MAX).tolist()))


# fp64 is the proof. The others are what rounding does to a right program: bf16's 8 bits are 0.4 % in each product.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 2e-1}


@torch.no_grad()
def transcribe(
    model: DeepSpeech2, speech: Speech, rows: Iterable[int], lm, args
) -> list[tuple[str, str, str]]:
    """(reference, greedy text, text by beam search) of some utterances, one by one. Call model.eval() before."""
    found, weight = [], next(model.parameters())
    for i in rows:
        batch = speech.batch([i], model.config).to(weight.device, weight.dtype)
        log_probs_TV = model(batch.features_BTF, batch.frames_B)[0][:, 0].cpu()
        best, *_ = beam_search(log_probs_TV, args.beam, lm, args.alpha, args.beta)
        found.append((speech.texts[i], greedy(log_probs_TV), best[0]))
    return found


def demonstrate(args, device: torch.device, ring_group) -> tuple[list[float], float, float]:
    """Trains; returns each epoch's mean loss, and the word error rates on speech not heard before: greedy, beam."""
    from tqdm import tqdm

    config, (dtype, autocast), (N, r) = config_of(args), dtypes(args), (group_size(), group_rank())
    if args.data:
        heard, unheard = (
            Speech.from_manifest(path, config, say) for path in (args.data, args.dev or args.data)
        )
    else:
        heard, unheard = (
            Speech.synthetic(320, config, args.seed),
            Speech.synthetic(60, config, args.seed + 1),
        )
    model, lengths = (
        parallel_model(config).to(device, dtype),
        [len(wave_W) for wave_W in heard.waves],
    )
    wait_for_all()  # one node's disk may be slower than the others'
    torch.manual_seed(args.seed + r)  # dropout: every rank has utterances, and masks, of its own
    epoch_steps = math.ceil(len(lengths) / args.batch)
    total = min(args.steps or math.inf, args.epochs * epoch_steps, sys.maxsize)

    def batches() -> Iterator[Batch]:
        for epoch in range(args.epochs):
            for utterances in sortagrad_batches(
                lengths, args.batch, epoch, args.seed, not args.no_sortagrad
            ):
                mine = share_of(utterances, lengths, r, N)
                yield heard.batch(mine, config, (args.seed, epoch) if args.distort else None).to(
                    device, dtype
                )

    say(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(lengths)} utterances to learn from, "
        f"{sum(lengths) / config.sample_rate / 60:.1f} minutes, {len(unheard.texts)} to try\n\n"
        "epoch   step     loss      norm")  # fmt: skip
    rate = partial(
        learning_rate,
        epoch_steps=epoch_steps,
        epochs=args.epochs,
        peak=args.lr,
        kind=args.optimizer,
    )
    options = dict(
        ring_group=ring_group, max_norm=args.max_norm, kind=args.optimizer, autocast=autocast
    )
    steps, losses, sums, step = (
        train(model, itertools.islice(batches(), total), rate, **options),
        [],
        [],
        0,
    )
    try:
        for step, results in enumerate(
            tqdm(steps, total=total, disable=r > 0 or not sys.stderr.isatty()), 1
        ):
            loss, norm = read_step(step, *results)
            sums.append(loss)
            if step % epoch_steps == 0 or step == total:
                losses.append(sum(sums) / len(sums))
                say(f"{len(losses):5} {step:6} {losses[-1]:8.4f} {norm:9.2f}")
                sums = []
        check_replicas(model)
        every: list = [None] * N
        mine = range(r, len(unheard.texts), N)
        found = transcribe(model.eval(), unheard, mine, NGram(heard.texts), args)
        wait_for_all()  # a wide beam takes minutes an utterance, and some ranks may have none
        dist.all_gather_object(every, found)
        if args.save and r == 0:
            save_model(args.save, model, heard.texts)
    except KeyboardInterrupt:
        unsaved = f"; nothing was saved in {args.save}" if args.save else ""
        raise KeyboardInterrupt(f"after step {step}{unsaved}") from None
    return losses, *report(list(itertools.chain(*every)))


def report(found: list[tuple]) -> tuple[float, float]:
    """Prints what was heard, and the word error rates: greedy, and with beam search."""
    references, *heard = zip(*found)
    say(
        "\nsaid                               heard, greedy                      with the language model"
    )
    for row in found[:6]:
        say("".join(f"{text[:33]:35}" for text in row).rstrip())
    rates = [word_error_rate(references, texts) for texts in heard]
    say(f"\nword error rate {rates[0]:.1%} greedy, {rates[1]:.1%} with beam search\n")
    return rates


def main(args, device: torch.device) -> None:
    torch.set_flush_denormal(True)
    N, dtype = group_size(), args.dtype
    ring_group = make_group([list(range(N))], device, args.timeout) if N > 1 else None
    say_setting(args)
    if args.check:
        errors = equivalence(device, ring_group, *dtypes(args))
        say("\n".join(f"{name:60} {error:.1e}" for name, error in errors.items()))
        say(f"\nworst {worst(errors):.1e} relative, bound {BOUNDS[dtype]:.0e}; {N} ranks, {dtype}")
        sys.exit(0 if worst(errors) <= BOUNDS[dtype] else 1)
    errors = equivalence(device, ring_group, torch.float64)
    with Counter() as counter:
        ring_all_reduce(torch.ones(1001, device=device), ring_group)
    sent = torch.tensor(
        sum(m.bytes // 4 for m in counter.messages if m.op == "send"), device=device
    )
    rows = claims(args, errors, int(_all_reduce(sent)), *demonstrate(args, device, ring_group))
    if not print_claims(rows):
        sys.exit(1)


def claims(
    args, errors: dict, sent: int, losses: list[float], plain: float, searched: float
) -> list[tuple]:
    """The rows of the claims table."""

    def exact(claim: str, start: str) -> tuple:
        error = worst(errors, start)
        return (
            f"every {claim}, float64",
            "exact",
            f"worst {error:.1e} relative",
            error <= BOUNDS["fp64"],
        )

    def same(claim: str, paper: str, here: str) -> tuple:
        return claim, paper, here, here == paper

    def rate(claim: str, here: float) -> tuple:
        usual = all(getattr(args, f.name) == f.default for f in fields(Options) if f.name != "save")
        known = usual and not args.steps  # of the default run we know what to expect
        return claim, "below 5 %" if known else "–", f"{here:.1%}", here < 0.05 if known else "–"

    N, shares, (first, second) = (
        group_size(),
        [noisy_share(*rates) for rates in NOISY_SPEECH.values()],
        OWN_TEST_SET,
    )
    sizes = {net: parameter_count(*net) / 1e6 for net in SAME_SIZE}
    return [
        exact("gradient equals the single device's", "gradient"),
        exact("norm before clipping equals the single device's", "norm"),
        exact("weight after 5 steps equals the single device's", "after"),
        exact("number of CTC equals PyTorch's", "CTC"),
        exact("number of the layer cut in time equals the single device's", "cut"),
        same(f"ring: elements sent to sum 1,001 on {N} ranks", f"{ring_elements(1001, N):,}", f"{sent:,}"),
        ("the CTC loss falls", "falls", f"{losses[0]:.2f} to {losses[-1]:.2f}",
         losses[-1] < losses[0] if losses[1:] else "needs two epochs"),
        rate("words wrong in speech not heard before, greedy", plain),
        rate("the same with beam search and language model", searched),
        *((f"parameters of {layers} layers, {recurrent} recurrent, of {hidden}", "38 M", f"{count:.1f} M",
           abs(count / 38 - 1) < 0.04) for (layers, recurrent, hidden), count in sizes.items()),
        same("hours of English speech, summed over its sources", "11,940", f"{sum(ENGLISH_HOURS.values()):,}"),
        ("share of noisy words, from each system's three rates", "one share",
         f"{min(shares):.3f} to {max(shares):.3f}", max(shares) - min(shares) < 0.001),
        same("words wrong of Deep Speech 2, fewer than Deep Speech's by", "43.4%", f"{1 - second / first:.1%}"),
        ("epoch time halves when the GPUs are doubled", "8 to 16 GPUs", "–", "needs 16 GPUs"),
    ]  # fmt: skip


# The recipe for half an hour of real speech, and the largest English network of the second paper.
SIZES = {
    "small": {},
    "digits": dict(convolutions=((16, (11, 11), (2, 2)), (24, (5, 7), (1, 2))), layers=2, hidden_size=128, dropout=0.1),
    "paper": dict(sample_rate=16_000, bins=0, layers=7, hidden_size=1280,
                  convolutions=((32, (11, 41), (2, 2)), (32, (11, 21), (1, 2)), (96, (11, 21), (1, 2)))),
}  # fmt: skip


def config_of(args) -> SpeechConfig:
    try:
        changes = json.loads(args.model)
        if not isinstance(changes, dict):
            raise ValueError(f'a JSON object is needed, such as {{"layers": 3}}, not {changes!r}')
        return SpeechConfig(**(SIZES[args.size] | dict(seed=args.seed) | changes))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--model {args.model}: {error}") from error


@dataclass
class Options:
    """This chapter's own flags."""

    data: str = flag("", "a manifest to train on", metavar="FILE")
    dev: str = flag("", "a manifest to evaluate on", metavar="FILE")
    size: str = flag("small", "of the network", choices=list(SIZES))
    model: str = flag(
        "{}", 'change SpeechConfig, as {"layers": 3, "bidirectional": false}', metavar="JSON"
    )
    no_sortagrad: bool = flag(False, "the first epoch in random order")
    distort: bool = flag(False, "another pitch, tempo and noise in each epoch")
    epochs: int = flag(8, "passes over the data; --steps above 0 ends earlier", least=1)
    batch: int = flag(8, "utterances per step, over all ranks", least=1)
    optimizer: str = flag(
        "nesterov", "the papers', or AdamW with a cosine", choices=["nesterov", "adamw"]
    )
    lr: float = flag(0.04, "peak learning rate", least=1e-9)
    max_norm: float = flag(3.0, "of the gradient; Deep Speech 2 has 400", least=1e-9)
    beam: int = flag(32, "prefixes that beam search keeps", least=1)
    alpha: float = flag(1.0, "weight of the language model", least=-1e9)
    beta: float = flag(1.0, "bonus for each word", least=-1e9)
    save: str = flag("", "keep the trained model", metavar="FILE")
    load: str = flag("", "a saved model, for --evaluate or --transcribe", metavar="FILE")
    evaluate: str = flag("", "print the word error rate on a manifest, and stop", metavar="FILE")
    transcribe: str = flag("", "print the text of an audio file, and stop", metavar="FILE")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the files that they name, do not fit."""
    if bool(args.load) != bool(args.evaluate or args.transcribe) or (args.dev and not args.data):
        raise ValueError("--load goes with --evaluate or --transcribe, and --dev with --data")
    if args.load and (args.data or args.save or args.check):
        raise ValueError("--load does not train: leave --data, --save and --check out")
    if args.save and (
        os.path.isdir(args.save) or not os.access(os.path.dirname(args.save) or ".", os.W_OK)
    ):
        raise ValueError(f"--save {args.save}: its folder does not exist or cannot be written")
    config = load_model(args.load)[0].config if args.load else config_of(args)
    for path in filter(None, (args.data, args.dev, args.evaluate)):
        Speech.from_manifest(
            path, config, lambda text: None
        )  # all of it, once, before any rank starts
    if args.transcribe:
        load_audio(args.transcribe, config.sample_rate)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=2, steps=0)


def use_model(args) -> None:
    """--evaluate and --transcribe: one process, no ranks."""
    torch.set_num_threads(1)
    model, texts = load_model(args.load)
    if args.evaluate:
        speech = Speech.from_manifest(args.evaluate, model.config, print)
        report(transcribe(model, speech, range(len(speech.texts)), NGram(texts), args))
    if args.transcribe:
        speech = Speech([load_audio(args.transcribe, model.config.sample_rate)], [""])
        ((_, plain, searched),) = transcribe(model, speech, [0], NGram(texts), args)
        print(f"greedy             {plain}\nwith beam search   {searched}")


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────
#
# Without --data the program makes its own speech: number words as rows of phones. A phone is three resonances of the
# vocal tract (formants), driven by the pulses of a voice, by noise, or by both. A filter that moves smoothly from phone
# to phone makes neighbours flow into each other, as in a mouth (coarticulation). Speakers differ in pitch, in the
# length of their vocal tract, in tempo, and in the noise around them.

# Phone to formants in Hz, share of voice (the rest is noise), loudness, seconds.
PHONES = {
    "iy": (270, 2290, 3010, 1, 1, 0.10), "ih": (390, 1990, 2550, 1, 1, 0.08), "eh": (530, 1840, 2480, 1, 1, 0.09),
    "ah": (640, 1190, 2390, 1, 1, 0.09), "ao": (570, 840, 2410, 1, 1, 0.10), "ow": (450, 800, 2300, 1, 1, 0.12),
    "uw": (300, 870, 2240, 1, 1, 0.12), "w": (300, 650, 2200, 1, 0.5, 0.06), "r": (350, 1100, 1500, 1, 0.6, 0.07),
    "n": (250, 1400, 2500, 1, 0.4, 0.08), "v": (250, 1200, 3000, 0.6, 0.3, 0.06), "f": (900, 1500, 3300, 0, 0.15, 0.09),
    "z": (250, 2500, 3600, 0.4, 0.4, 0.09), "k": (1500, 1900, 2400, 0, 0.3, 0.04), "s": (2800, 3400, 3900, 0, 0.5, 0.1),
    "th": (1400, 2400, 3500, 0, 0.12, 0.09), "t": (2000, 3000, 3700, 0, 0.4, 0.04), "_": (500, 1500, 2500, 0, 0, 0.05),
}  # fmt: skip
WORDS = {
    "zero": "z ih r ow", "one": "w ah n", "two": "_ t uw", "three": "th r iy", "four": "f ao r", "five": "f ah iy v",
    "six": "s ih _ k s", "seven": "s eh v ah n", "eight": "eh iy _ t", "nine": "n ah iy n",
}  # fmt: skip


def synthesize(words: list[str], rate: int, rng: np.random.Generator) -> np.ndarray:
    """A speaker whom `rng` invents says the words; floats, `rate` samples a second."""
    pitch, tract, tempo = rng.uniform(90, 220), rng.uniform(0.9, 1.12), rng.uniform(0.8, 1.2)
    phones = ["_", "_", *" _ ".join(WORDS[word] for word in words).split(), "_", "_"]
    hop = (
        rate // 200
    )  # 5 ms: every number below is one for each hop, and a straight line between the phones' middles
    seconds = np.array([PHONES[phone][5] * tempo * rng.uniform(0.85, 1.15) for phone in phones])
    middles, frames = np.cumsum(seconds) - seconds / 2, int(seconds.sum() * 200)
    at, table = np.arange(frames) / 200, np.array([PHONES[phone][:5] for phone in phones])
    shape = [
        np.interp(at, middles, column * rng.normal(1, 0.02, len(phones))) for column in table.T
    ]
    tone = (
        pitch
        * (1 + 0.15 * np.cumsum(rng.normal(0, 0.1, frames)) / np.sqrt(frames))
        * np.linspace(1.1, 0.9, frames)
    )
    cycles = np.cumsum(np.repeat(tone, hop)) / rate
    pulses, noise = 1 - 2 * (cycles % 1), rng.normal(0, 1, frames * hop)
    window, hertz = np.hanning(2 * hop + 1)[:-1], np.fft.rfftfreq(4 * hop, 1 / rate)
    formants = np.stack(shape[:3], 1)[..., None] / tract
    gain = (1 / (1 + ((hertz - formants) / (60 + formants * 0.04)) ** 2)).sum(1)
    wave = np.zeros((frames + 4) * hop)
    for i in range(frames - 1):  # filter a window of the source, and add it in its place
        source = (
            shape[3][i] * pulses[i * hop : (i + 2) * hop]
            + (1 - shape[3][i]) * noise[i * hop : (i + 2) * hop]
        )
        sound = np.fft.irfft(np.fft.rfft(source * window, 4 * hop) * gain[i]) * max(
            0.0, shape[4][i]
        )
        wave[i * hop : (i + 4) * hop] += sound
    return (
        wave / np.abs(wave).max()
        + rng.normal(0, 1, len(wave)) * 10 ** (-rng.uniform(25, 40) / 20) * 0.2
    )


# ── Sound ───────────────────────────────────────────────────────────────────────────────────────────────
#
# The network sees the strength of each frequency in windows of 20 ms, one every 10 ms, in logarithms, as ears hear. Two
# things are taken out that say nothing about words: how loud the recording is, and (bin by bin) the sound of the
# microphone. The papers give all frequencies to the network; with little data, bands that are wider at high
# frequencies, the mel scale, leave less to learn.


def log_spectrogram(wave_W: Tensor, sample_rate: int = 16_000, bins: int = 0) -> Tensor:
    """Log power of each frequency and frame, mean 0 in each bin: (T, F).

    wave_W: floats, any scale. bins: mel bands, or 0 for all frequencies from 0 to half the sample rate, 50 Hz apart.
    T = 1 + (W − window) // hop, with a window of 20 ms and a hop of 10 ms; a shorter recording is padded to one window.
    Source: Deep Speech 2, section 3 (power-normalised spectrograms).
    """
    window, hop = round(0.020 * sample_rate), round(0.010 * sample_rate)
    wave_W = F.pad(wave_W, (0, max(0, window - len(wave_W))))
    frames = wave_W.unfold(0, window, hop) * torch.hann_window(window, dtype=wave_W.dtype)
    size = (
        4 * window if bins else window
    )  # finer steps of frequency, so that no narrow band falls between two of them
    power_TF = torch.fft.rfft(frames, size).abs().square()
    if bins:
        top = 2595 * math.log10(1 + sample_rate / 2 / 700)
        edges = 700 * (10 ** (torch.linspace(0, top, bins + 2, dtype=wave_W.dtype) / 2595) - 1)
        hertz = torch.arange(power_TF.shape[1], dtype=wave_W.dtype)[:, None] * sample_rate / size
        rising, falling = (
            (hertz - edges[:-2]) / edges.diff()[:-1],
            (edges[2:] - hertz) / edges.diff()[1:],
        )
        power_TF = power_TF @ torch.minimum(rising, falling).clamp_min(0)  # triangles
    log_TF = (
        power_TF / power_TF.mean().clamp_min(1e-20) + 1e-4
    ).log()  # 40 dB below the mean is silence
    return (log_TF - log_TF.mean(0)) / 2


def mix_noise(wave_W: Tensor, noise_W: Tensor, snr_db: float) -> Tensor:
    """wave + noise, the noise scaled so that the wave has snr_db decibels more power; a short noise is repeated.

    Superposition is how the papers make noisy speech: x̂ = x + ξ. Raises: ValueError for noise of no power.
    Source: Deep Speech, section 3.2.
    """
    if not noise_W.numel() or not noise_W.square().mean() > 0:
        raise ValueError(f"noise of {noise_W.numel()} samples has no power to be scaled")
    noise_W = noise_W.repeat(-(-len(wave_W) // len(noise_W)))[: len(wave_W)]
    ratio = wave_W.square().mean() / noise_W.square().mean() / 10 ** (snr_db / 10)
    return wave_W + noise_W * ratio.sqrt()


def resample(wave_W: Tensor, rate: int, new_rate: int) -> Tensor:
    """The same sound at another sample rate, by its spectrum: what both rates can hold stays as it is."""
    if rate == new_rate or not len(wave_W):
        return wave_W
    size = max(1, round(len(wave_W) * new_rate / rate))
    spectrum = torch.fft.rfft(wave_W)[: size // 2 + 1]
    return torch.fft.irfft(spectrum, size) * (size / len(wave_W))


def distort(wave_W: Tensor, config: SpeechConfig, rng: np.random.Generator) -> Tensor:
    """A spectrogram of the recording as somebody else could have made it: (T, F) of another T.

    Another pitch and length of the vocal tract (played faster or slower), another tempo, coloured noise 5 to 35 dB
    below, a band and a moment that are missing. Half an hour of five speakers stands for more of them that way.
    """
    rate = config.sample_rate
    wave_W = resample(wave_W, rate, round(rate * rng.uniform(0.82, 1.18)))
    spectrum = torch.fft.rfft(torch.from_numpy(rng.standard_normal(len(wave_W))).to(wave_W.dtype))
    slope = torch.arange(1, len(spectrum) + 1, dtype=wave_W.dtype) ** -rng.uniform(0, 1)
    noise_W = torch.fft.irfft(spectrum * slope, len(wave_W))
    if wave_W.any():
        wave_W = mix_noise(wave_W, noise_W, rng.uniform(5, 35))
    x_TF = log_spectrogram(wave_W, rate, config.bins)
    T, bins = max(1, round(len(x_TF) * rng.uniform(0.85, 1.15))), x_TF.shape[1]
    x_TF = F.interpolate(x_TF.T[None], T, mode="linear", align_corners=False)[0].T.contiguous()
    first, moment = rng.integers(bins), rng.integers(T)
    x_TF[:, first : first + rng.integers(bins // 6 + 1)] = 0
    x_TF[moment : moment + rng.integers(12)] = 0
    return x_TF


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────
#
# The papers take their language model ready-made, counted in 250 million lines of text. This one is small enough to
# read, and is counted in what the network has learned from. The README shows how another one takes its place.


class NGram:
    """A language model of word n-grams, counted in texts: score(history, word) is log P(word | last words of history).

    Absolute discounting: every n-gram that was seen gives up 0.5 of its count, and what has been given up is shared out
    by the shorter history; at the end of that chain stand all words alike, the unknown one included.
    Anything with the same `score` can take its place. Raises: ValueError where the texts hold no word, or order < 1.
    """

    def __init__(self, texts: Iterable[str], order: int = 3):
        if order < 1:
            raise ValueError(f"order={order}: at least 1")
        self.order, self.counts = (
            order,
            defaultdict(lambda: defaultdict(int)),
        )  # history to how often each word follows
        for text in texts:
            words = ["<s>"] * (order - 1) + text.split()
            for end in range(order - 1, len(words)):
                for n in range(order):
                    self.counts[tuple(words[end - n : end])][words[end]] += 1
        self.totals = {history: sum(follow.values()) for history, follow in self.counts.items()}
        self.words = set(self.counts.get((), ()))
        if not self.words:
            raise ValueError("a language model needs text, but there is no word in it")

    def probability(self, history: tuple[str, ...], word: str) -> float:
        shorter = self.probability(history[1:], word) if history else 1 / (len(self.words) + 1)
        if not (total := self.totals.get(history)):
            return shorter
        follow = self.counts[history]
        return (max(follow.get(word, 0) - 0.5, 0.0) + 0.5 * len(follow) * shorter) / total

    def score(self, history: tuple[str, ...], word: str) -> float:
        """history: the words before, from the first one of the text on. In nats."""
        history = (
            (("<s>",) * (self.order - 1) + tuple(history))[-(self.order - 1) :]
            if self.order > 1
            else ()
        )
        return math.log(self.probability(history, word if word in self.words else "<unknown>"))


def word_error_rate(references: Iterable[str], texts: Iterable[str]) -> float:
    """Words to insert, delete and replace, over the words of the references; letters instead of words: put spaces in.

    Raises: ValueError for unequal numbers of texts, or references without a word.
    """
    edits = words = 0
    for reference, text in zip(references, texts, strict=True):
        reference, text = reference.split(), text.split()
        row = list(range(len(text) + 1))
        for i, word in enumerate(reference, 1):
            row, above = [i], row
            for j, other in enumerate(text, 1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
        edits, words = edits + row[-1], words + len(reference)
    if not words:
        raise ValueError("the references hold no word")
    return edits / words


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────


Utterance = namedtuple("Utterance", "path text line")  # of a manifest; line: its number, from 1


def read_manifest(path: str) -> list[Utterance]:
    """The utterances of a manifest: JSON lines with audio_filepath, text, and duration in seconds (not used).

    A relative audio_filepath is relative to the manifest's folder. Letters are made small. Raises: ValueError that
    names file and line for what is no JSON object, lacks a key, names no file, or has letters outside the alphabet;
    also for a manifest without utterances.
    """
    utterances = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            audio, text = (
                Path(path).parent / entry["audio_filepath"],
                " ".join(entry["text"].lower().split()),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            need = '{"audio_filepath": "a.wav", "duration": 1.9, "text": "three one four"}'
            raise ValueError(
                f"{path}, line {number}: {error!r}; a line looks like {need}"
            ) from error
        if strange := sorted(set(text) - set(ALPHABET[1:])):
            raise ValueError(
                f"{path}, line {number}: {strange} not in the alphabet {ALPHABET[1:]!r}; spell it out"
            )
        if not audio.is_file():
            raise ValueError(f"{path}, line {number}: there is no file {audio}")
        utterances.append(Utterance(str(audio), text, number))
    if not utterances:
        raise ValueError(f"{path} holds no utterance")
    return utterances


def load_audio(path: str, sample_rate: int) -> Tensor:
    """An audio file as wave_W at `sample_rate`, its channels averaged. Raises ValueError that names the file."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as audio: {error}") from error
    if not len(samples) or not np.isfinite(samples).all():
        strange = int((~np.isfinite(samples)).sum())
        raise ValueError(f"{path}: {len(samples)} samples, of which {strange} are not finite")
    return resample(torch.from_numpy(samples.mean(1)), rate, sample_rate)


@dataclass
class Speech:
    """Recordings and what is said in them; all in memory."""

    waves: list[Tensor]
    texts: list[str]

    @classmethod
    def synthetic(cls, count: int, config: SpeechConfig, seed: int) -> Speech:
        rng = np.random.default_rng((seed, 7))
        texts = [" ".join(rng.choice(list(WORDS), rng.integers(1, 5))) for _ in range(count)]
        waves = [
            torch.from_numpy(synthesize(text.split(), config.sample_rate, rng)) for text in texts
        ]
        return cls([wave_W.to(torch.float32) for wave_W in waves], texts)

    @classmethod
    def from_manifest(cls, path: str, config: SpeechConfig, tell: Callable[[str], None]) -> Speech:
        """Utterances with too few frames for their letters cannot be learned: they are left out, and counted aloud.

        Raises: ValueError that names manifest and line for audio that cannot be used, as `read_manifest` for the rest.
        """
        speech, short, utterances = cls([], []), [], read_manifest(path)
        for audio, text, line in utterances:
            try:
                wave_W = load_audio(audio, config.sample_rate)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            if config.after(len(log_spectrogram(wave_W, config.sample_rate)), 0) < frames_needed(
                text
            ):
                short.append(f"{audio}, line {line}")
                continue
            speech.waves.append(wave_W)
            speech.texts.append(text)
        if short:
            tell(f"{path}: left out {len(short)} of {len(utterances)} utterances, whose text has more letters than "
                 f"there are frames; the first is {short[0]}")  # fmt: skip
        if not speech.texts:
            raise ValueError(f"{path} holds no utterance that is long enough for its text")
        return speech

    def batch(
        self, rows: list[int], config: SpeechConfig, key: tuple[int, int] | None = None
    ) -> Batch:
        """Spectrograms and labels of some utterances, distorted as (seed, epoch) says or as they are (None)."""
        features, labels = [torch.zeros(1, config.features)], [torch.zeros(1, dtype=torch.int64)]
        for i in rows:
            x_TF = log_spectrogram(self.waves[i], config.sample_rate, config.bins)
            if key is not None:
                other_TF = distort(self.waves[i], config, np.random.default_rng((*key, i)))
                x_TF = (
                    other_TF
                    if config.after(len(other_TF), 0) >= frames_needed(self.texts[i])
                    else x_TF
                )
            features.append(x_TF)
            labels.append(
                torch.tensor(
                    [ALPHABET.index(letter) for letter in self.texts[i]], dtype=torch.int64
                )
            )
        frames_B, sizes_B = (torch.tensor([len(x) for x in xs]) for xs in (features, labels))
        features_BTF, labels_BU = (
            nn.utils.rnn.pad_sequence(xs, batch_first=True) for xs in (features, labels)
        )
        return Batch(features_BTF, frames_B, labels_BU, sizes_B).rows(range(1, len(rows) + 1))


def frames_needed(text: str) -> int:
    """A symbol for each letter, and a blank between equal ones."""
    return len(text) + sum(a == b for a, b in itertools.pairwise(text))


# ── What every chapter carries ──────────────────────────────────────────────────────────────────────────
#
# Every value that is read from a GPU is a host synchronisation: the CPU waits until the GPU has caught up, and the GPU
# then waits for the CPU. So a training loop reads loss and norm together, once a step.


# The counter listens to a program's communication: PyTorch shows every operator that is called to a "dispatch mode",
# and a collective is an operator of the namespace c10d. So messages and bytes are counted, not estimated.


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


# The claims table is the last thing that a chapter prints. `here` is measured in this run, or computed by part 5. A
# claim that fails sets the exit code; one that this machine cannot test says what it needs, and is never "ok".


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


# Flags come from the fields of dataclasses. They are read, and every "auto" is resolved, in one process before any rank
# starts: a wrong flag is one line, not one line from each rank. No flag falls back silently to something else.


# region shared: flags
@dataclass
class RunConfig:
    """The flags of every chapter."""

    ranks: int | None = flag(None, "processes here; None: one per GPU, or a few", least=1)
    device: str = flag("auto", "auto: cuda if each rank has a GPU", choices=["auto", "cpu", "cuda"])
    backend: str = flag("auto", "auto: nccl on GPUs", choices=["auto", "nccl", "gloo"])
    dtype: str = flag("auto", "bf16: autocast", choices=["auto", "fp64", "fp32", "bf16"])
    steps: int = flag(0, "optimizer steps")
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
        span = f"from {least:g} to {most:g}"
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


# A script that is started plainly runs torchrun in its own process, with itself as the program of every rank. A script
# that torchrun has started (LOCAL_RANK is set) joins. A single rank stays in the process, with a process group of one
# rank, so that a debugger works. A collective that waits longer than --timeout fails instead of hanging; torchrun then
# ends the other ranks, and the error of the rank that failed first is printed last.


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
    arguments = flags()
    if arguments.load:
        use_model(arguments)
    else:
        launch(main, arguments)
