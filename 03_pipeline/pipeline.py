# SPDX-License-Identifier: MIT-0
"""Chapter 3. Pipeline parallelism: one model, cut between its layers, and the schedule as data.

Paper: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
       Narayanan et al., 2021, arXiv 2104.04473 (its schedules: GPipe, arXiv 1811.06965; PipeDream-Flush, 2006.09503)

The problem. Tensor parallelism (chapter 2) cuts every layer, and so its ranks talk in every layer, four times: that
ends at the walls of one server, whose GPUs are eight. A model of a trillion parameters needs sixty-four such servers.
Cut *between* layers, a rank sends one tensor for each piece of the batch (a *micro-batch*) and no more, but must wait
for the one that it gets.

The idea. Cut the stack of layers into p stages and the batch into m micro-batches, which follow each other through the
stages like cars through a factory. Here p = 4, m = 8; a digit is a micro-batch, ─ its forward, ═ its backward:

    rank 0  0──1──2──3──                  0═════4──1═════5──2═════6──3═════7──4═════   5═════   6═════   7═════
    rank 1     0──1──2──            0═════3──1═════4──2═════5──3═════6──4═════7──5═════   6═════   7═════
    rank 2        0──1──      0═════2──1═════3──2═════4──3═════5──4═════6──5═════7──6═════   7═════
    rank 3           0──0═════1──1═════2──2═════3──3═════4──4═════5──5═════6──6═════7──7═════

What is white is lost: the bubble, (p − 1)/m of the work. The paper makes it v times smaller by giving each rank v short
pieces of the model instead of a long one. Which rank does what, in which order, is a table and nothing more: a list of
operations for each rank. Once it is data it can be proven free of deadlock, timed, drawn, planned for 3,072 GPUs on a
laptop, and executed, all by the same few functions.

Run it (no flag is needed; --help lists them):

    python 03_pipeline/pipeline.py                                   4 ranks on this machine, 4 stages
    python 03_pipeline/pipeline.py --ranks 1                         one process, for a debugger
    python 03_pipeline/pipeline.py --check                           equivalence alone, each tensor's error
    python 03_pipeline/pipeline.py --pp 2 --schedule interleaved --chunks 2 --recompute      2 stages × 2 replicas
    python 03_pipeline/pipeline.py plan --layers 128 --hidden 25600 --heads 160 --gpus 3072 --batch 3072 --gpu-memory 80
    torchrun --nproc-per-node=8 03_pipeline/pipeline.py --pp 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 03_pipeline/pipeline.py --pp 8

It proves in float64 that every gradient equals the single device's under each schedule, trains a small GPT on real
text, draws the step as it ran below the step as it was planned, and ends in a table of the paper's claims.

Left out: executing the zero-bubble schedule (it is generated, proven and timed here), overlap of a message with the
operation that waits for it, recomputation layer by layer (here: a stage at a time). Tensor, pipeline and data
parallelism at once are executed in a later chapter; here boundaries are ready for it (section 2.6).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension. This chapter divides no dimension: every tensor is
# whole, and B is the batch of one micro-batch inside a stage.
#
#     B  batch        S  sequence, in tokens        H  hidden size (the paper's h)        V  words in vocabulary
#
# Plain numbers, named as in the paper:
#
#     p   ranks of one pipeline            stage   one piece of the model: 0 has the embedding, p·v − 1 the loss
#     v   chunks: pieces that a rank has   chunk   the number of a piece within its rank: stage = chunk · p + rank
#     m   micro-batches of one step        op      F (forward), B (backward), W (its weights' part) of one of them
#
# dp is the number of copies of the pipeline, the replicas, so world size = p · dp. Where the paper's letters are better
# (2.6, 5.3), t is chapter 2's tp and d is dp. (F with a dot behind it is torch.nn.functional.)

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
import sysconfig
import threading
import time
import zlib
from collections import defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from fractions import Fraction
from functools import partial
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = dist.ProcessGroup | None  # None: all ranks; in this chapter's Grid: this rank alone


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020

# The configuration is explained in chapter 2.


# region shared: layered GPT config
@dataclass
class GPTConfig:
    """The sizes of a GPT. Raises ValueError where they contradict each other."""

    vocab_size: int = 256
    seq_length: int = flag(
        64, "S, tokens of a sequence; the model has this many positions", least=1
    )
    hidden_size: int = flag(64, "H", least=1)
    num_layers: int = flag(8, "L", least=1)
    num_heads: int = flag(4, "N, attention heads", least=1)
    ffn_hidden_size: int | None = None  # F; None: 4·H, Megatron-LM's choice
    dropout: float = flag(0.0, "probability; Megatron-LM trains with 0.1")
    norm: str = (
        "pre"  # where LayerNorm stands: "pre" as in GPT-2, "post" as in the first Transformer
    )
    init_std: float = 0.02
    seed: int = 0  # the weights are a function of this configuration alone
    vocab_multiple: int = 1  # each rank's words are padded to a multiple of this (Megatron-LM: 128)
    tied_head: bool = (
        True  # the last layer multiplies with the embedding table; False: with a weight of its own
    )

    def __post_init__(self):
        self.head_size = self.hidden_size // max(1, self.num_heads)  # D
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        for name in (
            "vocab_size",
            "seq_length",
            "hidden_size",
            "num_layers",
            "num_heads",
            "ffn_hidden_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if rest := self.hidden_size % self.num_heads:
            sizes = (
                f"hidden_size={self.hidden_size} does not divide into num_heads={self.num_heads}"
            )
            raise ValueError(
                f"{sizes}: choose a multiple, such as {self.hidden_size - rest + self.num_heads}"
            )
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r}: 'pre' or 'post'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: at least 0 and less than 1")


# endregion

# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# The GPT on a single device that the pipeline must equal; chapter 2 explains it. One detail matters here: the last
# layer multiplies with the embedding table (tied_head), so the first stage and the last one need the same weight.


# region shared: layered GPT
# The generators that dropout draws from; None is PyTorch's default one. `outside` serves tensors that every
# tensor-parallel rank holds whole, `inside` those of which each holds a share; a single device draws from either.
RandomStreams = namedtuple("RandomStreams", "outside inside", defaults=(None, None))


def keep_mask(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """True where dropout keeps an element of x, with probability 1 − p: as many dimensions as x (...) has."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
        1 - p, generator=generator
    )


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 − p); saves one byte an element.

    Args: x (...), any shape; p in [0, 1); generator on x's device, None for PyTorch's default one.
    Raises: ValueError where p is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability {p}: it must be at least 0 and less than 1")
    return (x * keep_mask(x, p, generator)).mul_(1 / (1 - p)) if p else x


def core_attention(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, p: float = 0.0, generator=None
) -> Tensor:
    """Causal attention of any number of heads, each by itself: (B, N, S, D) three times to (B, N, S, D).

    p is the dropout on the attention weights.
    """
    if not p:  # the same sum in one kernel, which never stores the S × S weights; its dropout takes no generator
        return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
    S, D = q_BNSD.shape[-2:]
    scores_BNSS = q_BNSD @ k_BNSD.mT / math.sqrt(D)
    future_SS = torch.full(
        (S, S), -torch.inf, dtype=scores_BNSS.dtype, device=scores_BNSS.device
    ).triu(1)
    wide = torch.promote_types(
        scores_BNSS.dtype, torch.float32
    )  # said openly; PyTorch's kernels widen too
    weights_BNSS = (scores_BNSS + future_SS).softmax(-1, dtype=wide).to(v_BNSD.dtype)
    return dropout(weights_BNSS, p, generator) @ v_BNSD


class Attention(nn.Module):
    """Multi-head self-attention, x_BSH to (B, S, H).

    column and row make its two matrices: classes such as nn.Linear, called with the numbers of inputs and outputs.
    """

    def __init__(self, config: GPTConfig, column=nn.Linear, row=nn.Linear):
        super().__init__()
        self.config = config
        self.qkv = column(config.hidden_size, 3 * config.hidden_size)
        self.out = row(config.hidden_size, config.hidden_size)

    def forward(self, x_BSH: Tensor, streams: RandomStreams) -> Tensor:
        heads = dict(three=3, D=self.config.head_size)  # einops finds out N
        q_BNSD, k_BNSD, v_BNSD = rearrange(
            self.qkv(x_BSH), "B S (N three D) -> three B N S D", **heads
        )
        p = self.config.dropout if self.training else 0.0
        y_BNSD = core_attention(q_BNSD, k_BNSD, v_BNSD, p, streams.inside)
        return self.out(rearrange(y_BNSD, "B N S D -> B S (N D)"))


class MLP(nn.Module):
    """The feed-forward layer, x_BSH to (B, S, H); column and row make its two matrices, as `Attention`'s do."""

    def __init__(self, config: GPTConfig, column=nn.Linear, row=nn.Linear):
        super().__init__()
        self.up = column(config.hidden_size, config.ffn_hidden_size)
        self.down = row(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_BSH: Tensor, streams: RandomStreams) -> Tensor:
        return self.down(F.gelu(self.up(x_BSH), approximate="tanh"))


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H): attention and feed-forward, each with its norm, dropout and residual connection.

    Both are handed in, so that they may be parallel ones.
    """

    def __init__(self, config: GPTConfig, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.config = config
        self.norm1, self.attention = nn.LayerNorm(config.hidden_size), attention
        self.norm2, self.mlp = nn.LayerNorm(config.hidden_size), mlp

    def forward(self, x_BSH: Tensor, streams: RandomStreams) -> Tensor:
        p = self.config.dropout if self.training else 0.0
        for norm, sublayer in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            if self.config.norm == "pre":
                x_BSH = x_BSH + dropout(sublayer(norm(x_BSH), streams), p, streams.outside)
            else:
                x_BSH = norm(x_BSH + dropout(sublayer(x_BSH, streams), p, streams.outside))
        return x_BSH


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits (B, S, V).

    words makes the table of words, column and row the two matrices of each half of a layer: classes such as these.
    Raises: ValueError for a sequence longer than the positions.
    """

    def __init__(self, config: GPTConfig, words=nn.Embedding, column=nn.Linear, row=nn.Linear):
        super().__init__()
        self.config = config
        self.embedding = words(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        halves = (
            (Attention(config, column, row), MLP(config, column, row))
            for _ in range(config.num_layers)
        )
        self.layers = nn.ModuleList(Block(config, attention, mlp) for attention, mlp in halves)
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.head = (
            None
            if config.tied_head
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        if (
            not self.final_norm.weight.is_meta
        ):  # on "meta" are shapes without memory: `parameter_shapes` asks for those
            self.load_state_dict(dict(initial_weights(config)))

    def forward(self, tokens_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        streams, p = streams or RandomStreams(), self.config.dropout if self.training else 0.0
        x_BSH = dropout(embed(self.embedding, self.positions, tokens_BS), p, streams.outside)
        for layer in self.layers:
            x_BSH = layer(x_BSH, streams)
        return F.linear(self.final_norm(x_BSH), (self.head or self.embedding).weight)

    def loss(
        self, tokens_BS: Tensor, targets_BS: Tensor, streams: RandomStreams | None = None
    ) -> Tensor:
        """Cross entropy of each token in nats, (B, S), at least fp32; 0 where the target is −100."""
        logits_BSV = self(tokens_BS, streams)
        logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
        return F.cross_entropy(
            rearrange(logits_BSV, "B S V -> B V S"), targets_BS, ignore_index=-100, reduction="none"
        )


def embed(words: nn.Module, positions: nn.Embedding, tokens_BS: Tensor) -> Tensor:
    """Word and position embedding, (B, S, H). Raises ValueError for a sequence longer than the table of positions."""
    S = tokens_BS.shape[1]
    if S > positions.num_embeddings:
        raise ValueError(
            f"a sequence of {S} tokens, but the model has {positions.num_embeddings} positions"
        )
    return words(tokens_BS) + positions.weight[:S]


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the plain model, without allocating any."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def initial_weights(config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """The initial weights, a function of `config` alone: each name with its unsharded tensor, on the CPU.

    One tensor at a time, in the shapes that the plain model has. Drawn on the CPU because a GPU's generator gives
    other values. Source: section 4.2 of the Megatron-LM paper.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            onto_residual = name.endswith(
                ("out.weight", "down.weight")
            )  # what writes onto the residual stream
            std = config.init_std / (math.sqrt(2 * config.num_layers) if onto_residual else 1)
            yield name, torch.randn(shape, generator=generator, device="cpu") * std
        else:  # biases 0, LayerNorm's weights 1
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")


def make_optimizer(model: nn.Module, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases and LayerNorm weights; the caller sets "lr" before each step."""
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


Batches = Iterable[
    tuple[Tensor, Tensor]
]  # tokens_BS and targets_BS of each step; a target of −100 does not count


def train_alone(
    model: GPT,
    batches: Batches,
    lr: Callable[[int], float],
    max_norm: float = 1.0,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the plain model, a step for each batch; yields two scalars, the mean loss per token and the norm before
    clipping.

    lr: the learning rate of step 0, 1, ...; autocast: the dtype of products, None for the parameters' own.
    """
    optimizer = make_optimizer(model)
    for step, (tokens_BS, targets_BS) in enumerate(batches):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        optimizer.zero_grad()
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(tokens_BS, targets_BS).sum() / (targets_BS != -100).sum().clamp(min=1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        yield loss.detach(), norm


# endregion

# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────
#
# Sections 2.1 to 2.4 have no tensor and no process in them: they make, time and prove tables. 2.5 to 2.7 execute them.
#
#     schedule ─► a list of operations for each rank ─┬─► simulate ─► draw       how long, and where time is lost
#          2.1                                        │        2.2
#                                                     ├─► verify                 that it can run, and in what memory
#                                                     │        2.4
#                                                     └─► programs ─► run_step   loss and gradients, on real ranks
#                                                              2.3         2.5 to 2.7


# ── 2.1 A schedule is how far forward may run ahead ─────────────────────────────────────────────────────
#
# Each rank has its forwards in one fixed order and its backwards in another. All that a schedule still decides is how
# the two are shuffled, and for all of the paper's that is one number: how many forwards go ahead before the first
# backward. Write the two streams below each other, the backwards so many places to the right, and read the columns from
# left to right. Rank 2 of 4 under 1f1b, where one forward goes ahead:
#
#     forwards      F0  │  F1   F2   F3   F4   F5   F6   F7  │
#     backwards         │  B0   B1   B2   B3   B4   B5   B6  │  B7
#                warm-up│            steady state            │cool-down       F0, F1 B0, F2 B1, ... F7 B6, B7
#
# How many go ahead:
#
#     gpipe          all m                      simple; the activations of all micro-batches wait in memory
#     1f1b           p − rank − 1               as few as keep everybody busy: p of them wait at most, whatever m is
#     interleaved    2(p − rank − 1) + (v−1)p   1f1b for v chunks: micro-batches go in groups of p, each group through
#                                               chunk 0, then through chunk 1, ...; backward through the last one first
#     zb-h1          p − rank − 1               1f1b with backward cut in two: B, the gradient of the input, for which
#                                               the next rank waits, and W, of the weights, for which nobody waits:
#                                               a third stream, `rank` places right of the second, fills the bubble
#
# Why p − rank − 1: in the steady state every rank below must have a micro-batch to work on, while this one waits for a
# gradient; below rank r are p − r − 1. With one less the ranks wait for each other at every micro-batch (p = 4, m = 8:
# a bubble of 5/4 instead of 3/8); with more, activations pile up and nobody is faster.
#
# Why interleaving's is twice that: by the same count p − rank − 1 would do, with less memory and the same bubble, if
# messages took no time. The second p − rank − 1 put a micro-batch on the way between any two ranks, so that a message
# flies while both work: where it takes a tenth of a rank's forward, the bubble is 0.25 instead of 0.31 (p = 4, m = 8,
# v = 2). The (v − 1)p before them take the first group through all chunks but the last.
#
# Why groups of p: the first p micro-batches come out of chunk 0 of the last rank just as the first rank is done with
# the p-th, and may enter chunk 1. So m must be a multiple of p. With a shorter last group every rank would wait in it
# for what the missing micro-batches no longer hide: at p = 4, m = 6, v = 2 the bubble would be 19/36, and 1f1b's is
# 18/36 without any chunks. (Megatron-LM's formulas would even have ranks wait for micro-batches that are not there.)
#
# Megatron-LM runs all forwards first where m = p. The rule without exception takes as long, and keeps less in memory.
#
# [the paper's section 2.2; ZB-H1: Zero Bubble Pipeline Parallelism, Qi et al., arXiv 2401.10241, section 2]

KINDS = ("gpipe", "1f1b", "interleaved", "zb-h1")


class Op(NamedTuple):
    """One operation of one rank: kind "F", "B" or "W" on one micro-batch, in one of its chunks. Source: ours."""

    kind: str
    microbatch: int
    chunk: int = 0


Schedule = list[list[Op]]  # of each rank, what it does, in order


def schedule(kind: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The table of a published schedule.

    Args: stages: p, ranks of the pipeline. microbatches: m; fewer than stages work, except interleaved. chunks: v,
    pieces of the model for each rank; only "interleaved" takes more than one.
    Raises: ValueError with the reason for what cannot be scheduled. Source: the paper's section 2.2; zb-h1: ZB-H1.
    """
    p, m, v = stages, microbatches, chunks
    if kind not in KINDS:
        raise ValueError(f"schedule {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if min(p, m, v) < 1:
        raise ValueError(f"stages={p}, microbatches={m}, chunks={v}: each must be at least 1")
    if v > 1 and kind != "interleaved":
        raise ValueError(f"chunks={v}: {kind} has one chunk a rank; interleaved takes more")
    if kind == "interleaved" and m % p:
        fits = " or ".join(str(n) for n in (m // p * p, m // p * p + p) if n)
        why = f"interleaving sends groups of {p}, and a shorter one costs more than chunks gain"
        raise ValueError(f"microbatches={m} is no multiple of stages={p}: {why}; choose {fits}")

    # The streams: the same on every rank. With one chunk they are 0, 1, 2, ... (a slice of range(m) ends at m.)
    def order(kind: str, chunk_order: range) -> list[Op]:
        return [
            Op(kind, i, c)
            for first in range(0, m, p)
            for c in chunk_order
            for i in range(m)[first : first + p]
        ]

    forwards, backwards = order("F", range(v)), order("B", range(v)[::-1])
    weights = [op._replace(kind="W") for op in backwards] if kind == "zb-h1" else []
    table = []
    for rank in range(p):
        ahead = {"gpipe": m, "interleaved": 2 * (p - rank - 1) + (v - 1) * p}.get(
            kind, p - rank - 1
        )
        columns = zip_longest(
            forwards, [None] * ahead + backwards, [None] * (ahead + rank) + weights
        )
        table.append([op for column in columns for op in column if op])
    return table


# ── 2.2 Time: what waits for what ───────────────────────────────────────────────────────────────────────
#
# The whole of pipeline parallelism is in three rules, for stage s:
#
#     forward  needs  the forward of stage s − 1
#     backward needs  its own forward, and the backward of stage s + 1
#     weights  need   their own backward
#
# With them a table can be played through on paper: an operation starts when its rank is free and what it needs is
# there. We ask one rank after the other to go on as far as it can (`take_turns`). When a whole round has moved nobody,
# either all are done, and every operation has its time, or some wait for each other, and that is a deadlock. The order
# in which ranks are asked does not matter: what a rank can do now it can still do when it is asked later.
#
# Times are fractions, so that a bubble can be held against a formula exactly: (p − 1)/m, (p − 1)/(v·m). Mind the
# convention: the paper divides the bubble by the *ideal* time, not by the whole; (p − 1)/(m + p − 1) is the other.


def input_of(op: Op, rank: int, stages: int, chunks: int) -> tuple[int, Op] | None:
    """(rank, op) of the neighbouring stage whose result `op` takes; None at the model's two ends, and for W.

    Source: ours.
    """
    stage = op.chunk * stages + rank + (1 if op.kind == "B" else -1)
    if op.kind == "W" or not 0 <= stage < stages * chunks:
        return None
    return stage % stages, Op(op.kind, op.microbatch, stage // stages)


def needs(op: Op, rank: int, stages: int, chunks: int) -> list[tuple[int, Op]]:
    """(rank, op) of all that must be done before `op` of `rank`. Source: ours."""
    earlier, source = {"B": "F", "W": "B"}.get(op.kind), input_of(op, rank, stages, chunks)
    own = [(rank, Op(earlier, op.microbatch, op.chunk))] if earlier else []
    return [*own, source] if source else own


def chunks_of(schedule: Schedule) -> int:
    """How many chunks a rank has: v, on every rank the same. Source: ours."""
    return 1 + max((op.chunk for ops in schedule for op in ops), default=0)


def take_turns(lists: list[list], go: Callable[[int, Any], bool]) -> list[tuple[int, Any]]:
    """Each rank goes through its own list, an item whenever go(rank, item) is true, until nobody can go on.

    Returns: (rank, item) of all ranks that are stuck; an empty list when all have come to their end. Source: ours.
    """
    at, moved = [0] * len(lists), True  # at: of each rank, its next item
    while moved:
        moved = False
        for rank, items in enumerate(lists):
            while at[rank] < len(items) and go(rank, items[at[rank]]):
                at[rank], moved = at[rank] + 1, True
    return [(rank, items[k]) for rank, (items, k) in enumerate(zip(lists, at)) if k < len(items)]


def play(
    schedule: Schedule, duration: dict[str, Fraction | int], t_send: Fraction | int = 0
) -> dict:
    """(rank, op) to the time at which it ends, for ops of the given durations.

    t_send: how long a message takes. Raises: ValueError, naming who waits for what, where nobody can go on.
    Source: ours.
    """
    p, v = len(schedule), chunks_of(schedule)
    done, free = (
        {},
        [0] * p,
    )  # when each operation ended; since when each rank has had nothing to do

    def go(rank: int, op: Op) -> bool:
        needed = needs(op, rank, p, v)
        if any(key not in done for key in needed):
            return False
        arrivals = [done[key] + (t_send if key[0] != rank else 0) for key in needed]
        done[rank, op] = free[rank] = max([free[rank], *arrivals]) + duration[op.kind]
        return True

    if waiting := take_turns(schedule, go):
        lacking = [
            (rank, op, [key for key in needs(op, rank, p, v) if key not in done])
            for rank, op in waiting
        ]
        raise ValueError(
            "deadlock: "
            + "; ".join(f"rank {r} cannot do {op} without {keys}" for r, op, keys in lacking)
        )
    return done


class Bar(NamedTuple):
    """One operation on a timeline, in any unit of time. Source: ours."""

    op: Op
    start: float | Fraction
    end: float | Fraction


class Timeline(NamedTuple):
    """When each rank does what: simulated, or measured. Source: ours; the bubble: the paper's section 2.2."""

    ranks: list[list[Bar]]

    @property
    def length(self):
        bars = [bar for own in self.ranks for bar in own]
        return max(bar.end for bar in bars) - min(bar.start for bar in bars)

    @property
    def bubble(self):
        """Time lost, over the ideal time, in which the busiest rank does nothing but its work."""
        ideal = max(sum(bar.end - bar.start for bar in bars) for bars in self.ranks)
        return self.length / ideal - 1


def simulate(schedule: Schedule, t_forward=1, t_backward=2, t_weight=1, t_send=0) -> Timeline:
    """A schedule's timeline, in exact fractions.

    Args: t_forward, t_backward: of one micro-batch through all layers of a rank (so a chunk takes 1/v of it), any unit.
    t_backward is the whole backward and t_weight its part for the weights, which matters where the schedule has W's.
    t_send: of a message between ranks.
    Raises: ValueError where the schedule deadlocks.
    Source: ours.
    """
    # Where backward is cut in two, B and W share its time. A chunk has 1/v of a rank's layers, and takes 1/v of it.
    v, cut = chunks_of(schedule), any(op.kind == "W" for op in schedule[0])
    times = {"F": t_forward, "B": t_backward - t_weight if cut else t_backward, "W": t_weight}
    duration = {kind: Fraction(t) / v for kind, t in times.items()}
    done = play(schedule, duration, Fraction(t_send))
    ends = [[(op, done[rank, op]) for op in ops] for rank, ops in enumerate(schedule)]
    return Timeline([[Bar(op, end - duration[op.kind], end) for op, end in ops] for ops in ends])


def draw(timeline: Timeline, width: int = 100) -> str:
    """A timeline as text, a line for each rank: a micro-batch's number, then ─ for F, ═ for B, ┄ for W.

    Where ranks have several chunks the first is lettered a, the second b; a number that does not fit is cut.
    Source: ours, after the paper's figures 3 and 4.
    """
    first = min(bars[0].start for bars in timeline.ranks)
    several = any(bar.op.chunk for bars in timeline.ranks for bar in bars)
    lines = []
    for rank, bars in enumerate(timeline.ranks):
        line = [" "] * width
        for op, *span in bars:
            begin, end = (round(float((t - first) / timeline.length) * width) for t in span)
            label = f"{op.microbatch}" + ("abcdefghij"[op.chunk % 10] if several else "")
            line[begin:end] = label.ljust(end - begin, {"F": "─", "B": "═", "W": "┄"}[op.kind])[
                : end - begin
            ]
        lines.append(f"rank {rank:<2} " + "".join(line).rstrip())
    return "\n".join(lines)


# ── 2.3 Messages: one clock for all ranks ───────────────────────────────────────────────────────────────
#
# Where an operation needs one of another rank, a tensor must travel; so the table implies the messages. In chapters 1
# and 2 all ranks of a group met in each collective. A message has two ends only: one rank calls `isend` with a tensor,
# the other `irecv` with an empty one of the same shape and dtype. Both return at once, with something to wait for.
#
# Their *order* is the hard part. A receive waits for its send, a send may wait for its receive (on GPUs, and for gloo's
# blocking `send`), and between two ranks the k-th send meets the k-th receive, whatever the two mean by it. In the
# steady state of 1f1b two neighbours have something for each other at the same time, and if both send first, both wait
# forever:
#
#     rank 1   send activation ──► ?         rank 2   send gradient ──► ?         each waits for the other's receive
#
# The cure is to post the two as one batch (`batch_isend_irecv`), which completes as a whole. Which messages form a
# batch? Play the table on a clock on which every operation takes one tick. All that is made in a tick is sent at its
# end, and both ends know the tick: so let each rank post what it sends and receives at the end of a tick as one batch.
#
#     tick 5    rank 1: forward of 3   rank 2: backward of 0      then both:  [1 ─► 2 activation 3,  2 ─► 1 gradient 0]
#
# Batches stand in the order of ticks on every rank, so they cannot wait for each other in a circle. It is a proof, and
# section 2.4 checks it on the result all the same, for whoever writes a schedule of their own.


class Hop(NamedTuple):
    """A message between two ranks: the activation (or gradient) that `op` of rank `source` makes. Source: ours."""

    source: int
    target: int
    op: Op


class Step(NamedTuple):
    """A tick of one rank: an operation (or a pause, None), then one batch of messages. Source: ours."""

    op: Op | None
    batch: tuple[Hop, ...]


Program = list[Step]  # of one rank


def programs(schedule: Schedule) -> list[Program]:
    """Each rank's program: the schedule's operations with the messages between them.

    Raises: ValueError where the schedule deadlocks.
    Source: ours.
    """
    p, v = len(schedule), chunks_of(schedule)
    ticks = play(schedule, dict(F=1, B=1, W=1))
    op_at, hops_at = [{} for _ in schedule], [defaultdict(list) for _ in schedule]
    for (rank, op), tick in ticks.items():
        op_at[rank][tick] = op
        made = input_of(op, rank, p, v)
        if (
            made and made[0] != rank
        ):  # with one rank the next stage is its own next chunk, and nothing travels
            hop = Hop(made[0], rank, made[1])
            for end in (
                hop.source,
                hop.target,
            ):  # both post it in the tick in which it is made, whenever it is used
                hops_at[end][ticks[made]].append(hop)
    return [  # sorted, so that both ends list the messages between them in the same order
        [Step(ops.get(t), tuple(sorted(hops[t]))) for t in sorted(ops.keys() | hops.keys())]
        for ops, hops in zip(op_at, hops_at)
    ]


# ── 2.4 Proof without a process ─────────────────────────────────────────────────────────────────────────
#
# `verify` looks at the table: each operation once, forward before backward, nothing that waits in a circle. Then
# `verify_programs` looks at the messages, in the strictest way that a network could have. Three things must hold:
#
#     order     sender and receiver list the same messages in the same order, since they are matched by order alone
#     cause     nobody uses, or sends, what it has not yet made or received
#     progress  a batch ends only when, of each of its messages, the other end stands at its own batch; until then its
#               rank does nothing. Nobody may wait in a circle even so.
#
# What passes here cannot deadlock on any network that is kinder, as gloo and NCCL are.


def verify(schedule: Schedule) -> list[int]:
    """Proves a schedule; returns, of each rank, the most activations that it holds at once (in chunks of its model).

    Raises: ValueError that says what is wrong: an operation missing or done twice, an order that cannot be, a deadlock.
    Source: ours.
    """
    if not schedule or not all(schedule):
        raise ValueError("a schedule has at least one rank, and each rank at least one operation")
    m, v = 1 + max(op.microbatch for ops in schedule for op in ops), chunks_of(schedule)
    kinds = {"F", "B"} | {op.kind for ops in schedule for op in ops}
    if unknown := kinds - set("FBW"):
        raise ValueError(f"operations are F, B or W, not {sorted(unknown)}")
    every = {Op(kind, i, chunk) for kind in kinds for i in range(m) for chunk in range(v)}
    for rank, ops in enumerate(
        schedule
    ):  # each once: nothing is missing, and there are no more than that
        if missing := every - set(ops):
            raise ValueError(f"rank {rank} never does {min(missing)}")
        if len(ops) > len(every):
            raise ValueError(
                f"rank {rank} does {max(ops, key=ops.count)} twice, or what no schedule has"
            )
    verify_programs(programs(schedule))
    # A forward adds an activation, and the last operation that needs it takes it away: its W, or else its B.
    last = max(kinds - {"F"})
    return [max(accumulate((op.kind == "F") - (op.kind == last) for op in ops)) for ops in schedule]


def verify_programs(all_programs: list[Program]) -> None:
    """Proves that the ranks' programs match and end, under rendezvous of whole batches.

    Raises: ValueError where two ends list messages in different orders, a rank uses or sends what it does not have, or
    some wait for each other. Source: ours.
    """
    p = len(all_programs)
    v = chunks_of([[step.op for step in program if step.op] for program in all_programs])
    channels = defaultdict(
        lambda: ([], [])
    )  # source and target to what the sender lists, and what the receiver
    for rank, program in enumerate(all_programs):
        for hop in (hop for step in program for hop in step.batch):
            channels[hop.source, hop.target][rank == hop.target].append(hop)
    for (source, target), ends in channels.items():
        for sent, received in zip_longest(*ends):
            if sent != received:
                raise ValueError(
                    f"rank {source} to {target}: one end lists {sent} where the other has {received}"
                )

    has, posted = defaultdict(set), defaultdict(set)  # of each rank: made or received; posted

    def go(rank: int, step: Step) -> bool:
        op, batch = step
        if op and (rank, op) not in has[rank]:
            if lacking := [key for key in needs(op, rank, p, v) if key not in has[rank]]:
                raise ValueError(f"rank {rank} does {op} without {lacking}")
            has[rank].add((rank, op))
        if unmade := [
            hop for hop in batch if hop.source == rank and (rank, hop.op) not in has[rank]
        ]:
            raise ValueError(f"rank {rank} sends {unmade[0]} before it is made")
        posted[rank].update(batch)
        if any(hop not in posted[hop.source + hop.target - rank] for hop in batch):
            return False  # the other end, source + target − rank, is not there yet
        has[rank].update((hop.source, hop.op) for hop in batch)
        return True

    if stuck := take_turns(all_programs, go):
        batches = "; ".join(f"rank {rank} in {step.batch}" for rank, step in stuck)
        raise ValueError(f"deadlock: all wait for each other's batches: {batches}")


# ── 2.5 A stage ─────────────────────────────────────────────────────────────────────────────────────────
#
# A rank's part of the model is the plain model's own layers, some of them, under the plain model's own names: layer 5
# is "layers.5" wherever it lives, so a checkpoint does not know how many stages there were.
#
# Where p·v divides the layers, every stage gets as many. Where it does not, the rest goes one by one to the stages
# 1, 2, ..., then to the first, whose embedding weighs in, and never to the last, whose head and loss weigh most.
#
# With a tied head the first rank and the last have the same weight, each its own copy, which start equal and get the
# same gradient: the sum of both parts (4.1 below). With p = 1 it is one tensor, and nothing has to be summed.


def place_layers(layers: int, stages: int) -> list[range]:
    """The layers of each of `stages` stages (p·v of them). Raises: ValueError for fewer layers than stages.

    Source: ours; the paper's layers always divide.
    """
    if layers < stages:
        raise ValueError(
            f"{layers} layers on {stages} stages: a stage needs a layer, choose at most {layers} stages"
        )
    rest = [*range(1, stages - 1), 0][: layers % stages]
    sizes = [layers // stages + (stage in rest) for stage in range(stages)]
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(stages)]


class PipelineStage(nn.Module):
    """Rank `rank`'s chunks of GPT(config), cut into stages · chunks pieces; a chunk is called by its number.

    Its weights are those that GPT(config) has, and so are their names. They are made on the CPU in fp32 (.to moves
    them), the whole model's numbers on every rank, but no more than one tensor of another rank is in memory at a time.
    Raises: ValueError where layers are fewer than stages, or rank is not one of them.
    Source: the paper's section 2.2.
    """

    def __init__(self, config: GPTConfig, rank: int = 0, stages: int = 1, chunks: int = 1):
        super().__init__()
        if not 0 <= rank < stages or chunks < 1:
            sizes = f"rank={rank}, stages={stages}, chunks={chunks}"
            raise ValueError(f"{sizes}: ranks are 0 to stages - 1, chunks at least 1")
        self.config, self.rank, self.stages, self.chunks = config, rank, stages, chunks
        self.layers_of = place_layers(config.num_layers, stages * chunks)
        with torch.device(
            "meta"
        ):  # the plain model as shapes without memory; this rank takes its parts of it
            whole = GPT(config)
        first, last = rank == 0, rank == stages - 1
        self.embedding = whole.embedding if first or (last and config.tied_head) else None
        self.positions = whole.positions if first else None
        # A dictionary and no list: its keys, and so the weights' names, are the layers' numbers in the whole model.
        mine = [layer for chunk in range(chunks) for layer in self.layers_of[self.stage(chunk)]]
        self.layers = nn.ModuleDict({str(layer): whole.layers[layer] for layer in mine})
        self.final_norm = whole.final_norm if last else None
        self.head = whole.head if last else None
        if torch.get_default_device().type != "meta":  # there nobody asks for more than shapes
            names = self.state_dict().keys()
            weights = {name: x for name, x in initial_weights(config) if name in names}
            self.load_state_dict(
                weights, assign=True
            )  # in the place of the shapes; a copy into them would go nowhere

    def stage(self, chunk: int) -> int:
        return chunk * self.stages + self.rank

    def is_last(self, chunk: int) -> bool:
        return self.stage(chunk) == self.stages * self.chunks - 1

    def forward(self, chunk: int, x: Tensor, streams: RandomStreams) -> Tensor:
        """x is tokens_BS for the first stage, else x_BSH; to (B, S, H), for the last stage to logits (B, S, V)."""
        if self.stage(chunk) == 0:
            x = embed(self.embedding, self.positions, x)
            x = dropout(x, self.config.dropout if self.training else 0.0, streams.outside)
        for layer in self.layers_of[self.stage(chunk)]:
            x = self.layers[str(layer)](x, streams)
        if self.is_last(chunk):
            x = F.linear(self.final_norm(x), (self.head or self.embedding).weight)
        return x

    def loss(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy of each token in nats, (B, S), at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(at_least_fp32(logits_BSV), "B S V -> B V S")
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")

    def tied_copies(self) -> list[nn.Parameter]:
        """The tied weight, where another rank has a copy of it."""
        copied = self.stages > 1 and self.config.tied_head and self.embedding is not None
        return [self.embedding.weight] if copied else []


def random_streams(
    seed: int, pp_rank: int = 0, dp_rank: int = 0, device: torch.device | str = "cpu"
) -> RandomStreams:
    """Dropout's generator for one rank; equal on no two, since no two hold the same tensor.

    Source: ours.
    """
    generator = torch.Generator(device).manual_seed(
        zlib.crc32(repr((seed, pp_rank, dp_rank)).encode())
    )
    return RandomStreams(outside=generator, inside=generator)


# ── 2.6 Messages on the wire ────────────────────────────────────────────────────────────────────────────
#
# With tensor parallelism inside the stages, all t ranks of a stage hold the same x_BSH at its boundary. Sent as it is,
# each of them would send the same tensor to its peer in the next server, t times over the slow network. So each sends
# its t-th part, and the receivers put the parts together inside their server, where the network is fast. The paper
# calls it scatter/gather; it makes schedules with much communication, such as interleaving, worth their bubble.
#
#     rank 0 of 2   x ─► first half   ═══ network ═══►  rank 0  ─┐
#     rank 1 of 2   x ─► second half  ═══ network ═══►  rank 1  ─┴─ all-gather ─►  x on both
#
# It is right only where the tensor is the same on all t ranks; chapter 4's sequence parallelism cuts it beforehand.
# [the paper's section 4.1]


def cut_for_wire(x: Tensor, group: Group = None) -> Tensor:
    """This rank's part of x, flat, for its peer: (n,) with n = x.numel() / t, rounded up; the last parts are padded.

    Args: x of any shape, the same on every rank of `group`. group: the t ranks; None: there is one, and n is all of x.
    Raises: ValueError on a rank that is not in `group`. Source: the paper's section 4.1.
    """
    flat = x.detach().reshape(-1)
    if group is None:
        return flat
    t = group_size(group)
    padded = F.pad(flat, (0, -flat.numel() % t))
    return padded.chunk(t)[group_rank(group)].contiguous()


def join_from_wire(part: Tensor, shape: tuple[int, ...], group: Group = None) -> Tensor:
    """The whole tensor of `shape`, from the parts that the ranks of `group` have received. Undoes `cut_for_wire`.

    Args: part: (n,), as `cut_for_wire` returns it. Every rank of `group` must call it.
    Raises: ValueError on a rank that is not in `group`. Source: the paper's section 4.1.
    """
    if group is None:
        return part.view(shape)
    parts = [torch.empty_like(part) for _ in range(group_size(group))]
    dist.all_gather(parts, part, group)
    return torch.cat(parts)[: math.prod(shape)].view(shape)


# A mailbox runs the batches of a program. They fly while the rank computes: an operation waits for the one message that
# it needs and for nothing else. (To wait for the whole batch would be to wait for a peer to take what it was sent, and
# ranks would go in lockstep.) Up to four batches may be in the air before the next one waits for the oldest: a test
# simulates that, and finds that with four no bubble grows up to p = 8. A tensor that has been sent is held until its
# batch has landed, and no longer.
#
# Nobody guesses shapes: an activation has its micro-batch's shape and H, in the dtype of the parameters, and so has its
# gradient. Both ends work it out for each micro-batch, a shorter last one too, and the sender checks what it sends.


class Mailbox:
    """Tensors by the (pipeline rank, op) that made them; `post` sends and receives those that a batch names.

    Args: shape_of: from a hop to the shape of its tensor, the same on both ends. Raises: ValueError for a tensor that
    is not what the receiver waits for, RuntimeError that names a peer that is lost.
    Source: ours.
    """

    AIRBORNE = 4  # batches at once

    def __init__(self, grid: Grid, dtype: torch.dtype, device: torch.device, shape_of: Callable):
        self.grid, self.dtype, self.device, self.shape_of = grid, dtype, device, shape_of
        self.values = {}  # (pipeline rank, op) to what is here: made, or received
        self.flying, self.batches = (
            {},
            deque(),
        )  # a hop to its message and what to wait for; the batches, oldest first
        # gloo sends no GPU memory from rank to rank: there the message goes through the CPU's.
        through_cpu = grid.pp_group is not None and dist.get_backend(grid.pp_group) == "gloo"
        self.wire = torch.device("cpu") if through_cpu else device

    def put(self, rank: int, op: Op, value: Tensor) -> None:
        """Keeps `value`, of any shape, until it is sent or taken."""
        self.values[rank, op] = value

    def take(self, rank: int, op: Op) -> Tensor:
        """What `op` of `rank` made, in shape_of's shape; waits where it is still on its way. The mailbox forgets it."""
        self.land(Hop(rank, self.grid.pp_rank, op))
        return self.values.pop((rank, op))

    def post(self, batch: tuple[Hop, ...]) -> None:
        """Starts all messages of a batch, and returns at once."""
        if not batch:
            return
        if len(self.batches) == self.AIRBORNE:
            self.land(*self.batches.popleft())
        messages = []
        for hop in batch:
            sends, shape = hop.source == self.grid.pp_rank, self.shape_of(hop)
            buffer = dict(size=shape, dtype=self.dtype, device=self.wire)
            # What is sent leaves the mailbox: from here on the message alone holds it.
            x = self.values.pop((hop.source, hop.op)) if sends else torch.empty(**buffer)
            if x.shape != shape or x.dtype != self.dtype:
                found = f"{tuple(x.shape)} {x.dtype}"
                raise ValueError(f"{hop} is {found}, the receiver waits for {shape} {self.dtype}")
            part = cut_for_wire(x, self.grid.tp_group).to(
                self.wire
            )  # a receiver's buffer is cut as the tensor is
            kind, peer = (dist.isend, hop.target) if sends else (dist.irecv, hop.source)
            messages.append(dist.P2POp(kind, part, group=self.grid.pp_group, group_peer=peer))
        with self.named_errors(*batch):
            works = dist.batch_isend_irecv(messages)
        works = (
            works * len(batch) if len(works) == 1 else works
        )  # NCCL makes one operation of the batch
        self.flying |= zip(batch, zip(messages, works))
        self.batches.append(batch)

    def land(self, *hops: Hop) -> None:
        """Waits for those of `hops` that fly, and keeps what they bring."""
        for hop in [hop for hop in hops if hop in self.flying]:
            message, work = self.flying.pop(hop)
            with self.named_errors(hop):
                work.wait()  # on a GPU this stops the stream and not the CPU
            if hop.target == self.grid.pp_rank:
                x = join_from_wire(message.tensor, self.shape_of(hop), self.grid.tp_group)
                self.put(hop.source, hop.op, x.to(self.device))

    @contextlib.contextmanager
    def named_errors(self, *hops: Hop):
        """A peer that is lost shows in the message that was posted, or at once in the next one: says who it was."""
        try:
            yield
        except RuntimeError as error:
            rank, what = self.grid.pp_rank, ", ".join(map(str, hops))
            peers = " or ".join(sorted({str(hop.source + hop.target - rank) for hop in hops}))
            raise RuntimeError(
                f"pipeline rank {rank} lost rank {peers} in {what}: {error}"
            ) from error


# ── 2.7 One executor for all schedules ──────────────────────────────────────────────────────────────────
#
# The executor goes through its rank's program. A forward takes its input from the mailbox, makes it a leaf of its own
# little graph (requires_grad, or there will be no gradient to send back), and puts its output into the mailbox. A
# backward takes the gradient of that output, runs autograd through this piece alone, and puts the input's gradient
# into the mailbox. Between them the rank holds the input and the graph, but not the output: the next stage has that.
# What backward needs of it is the edge at which autograd enters the graph, and an edge keeps no tensor alive.
#
# Why not simply y.backward()? The output would have to live until then. A tensor knows the node of the graph that made
# it; `get_gradient_edge` asks for that node, and the tensor may go.
#
# A micro-batch's loss is the sum over its tokens, divided by the number of tokens that count in the *whole* batch, over
# all replicas. So gradients add up to the batch's, whatever the sizes of micro-batches, and nothing is divided by m
# ever again. Divided by the micro-batch's own count, the loss looks the same once it is averaged for the screen, but
# its gradient is m times too large. AdamW does not notice, since it divides the gradient by its own size; clipping and
# SGD do.
#
# Recomputation keeps the input alone, and runs the forward a second time right before the backward: p micro-batches'
# activations become p inputs and one micro-batch's activations. With dropout the second forward must see the mask of
# the first one, so the generator's state is kept with the input, of every micro-batch that is under way.
#
# Sums over replicas come after the last backward, once. At each micro-batch they would be m times the bytes, and wrong
# as well: what has been summed already would be summed again.


def count_targets(targets_BS: Tensor, group: Group = None) -> Tensor:
    """How many targets count, over all replicas of `group`: a scalar tensor, so that nobody waits for a GPU.

    Source: ours.
    """
    count = (targets_BS != -100).sum()
    sum_over(group, [count])
    return count


@contextlib.contextmanager
def replayed(generator: torch.Generator, state: Tensor):
    """Inside, the generator draws once more what it drew after `state` (of its get_state); afterwards it is as before.

    Source: ours.
    """
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


def run_step(
    stage: PipelineStage, program: Program, tokens_BS: Tensor, targets_BS: Tensor, grid: Grid | None = None,
    streams: RandomStreams | None = None, recompute: bool = False, autocast: torch.dtype | None = None,
    bars: list[Bar] | None = None,
) -> Tensor:  # fmt: skip
    """Runs a program on this replica's batch, forward and backward; every rank of the grid must call it.

    Afterwards p.grad of every parameter is the gradient of the mean loss per token, over all micro-batches and
    replicas; before, it must be None. A program without backwards, under torch.no_grad(), evaluates. Parameters have
    one dtype and are where the tokens are. An error on one rank reaches the others as a message that never comes.

    Args:
        program: programs(schedule)[pp rank]; its m micro-batches are the rows in order, sizes differ by one at most.
        tokens_BS, targets_BS: int64, the same on every rank of a pipeline (the middle ones look at the shape alone);
            −100 marks a target that does not count.
        streams: `random_streams`, needed where the model has dropout.
        recompute: keep a micro-batch's input and not its activations. autocast: dtype of products, or None.
        bars: a list that gets each operation with its times in seconds, as the CPU saw them.

    Returns: the mean loss per token, a scalar, the same on every rank.
    Raises: ValueError for fewer rows than micro-batches, a program that is another model's, dropout without streams,
    gradients of an earlier step (the sums over the grid would count them again); RuntimeError that names a lost peer.
    Source: ours; the paper's section 2.2 has the schedules that it runs.
    """
    grid, streams = grid or Grid(), streams or RandomStreams()
    p, v, rank, H = stage.stages, stage.chunks, stage.rank, stage.config.hidden_size
    ops = [step.op for step in program if step.op]
    m, chunks, rate = 1 + max(op.microbatch for op in ops), chunks_of([ops]), stage.config.dropout
    if len(tokens_BS) < m:
        raise ValueError(
            f"a batch of {len(tokens_BS)} rows has too few for {m} micro-batches: a row each at least"
        )
    if any(op.kind == "W" for op in ops):
        raise ValueError(
            "zb-h1 is planned here and not executed: choose gpipe, 1f1b or interleaved"
        )
    if (v, p, rank) != (chunks, grid.pp, grid.pp_rank):
        built = f"the stage was built with {v} chunks for rank {rank} of {p}"
        raise ValueError(
            f"a program of {chunks} chunks on rank {grid.pp_rank} of {grid.pp}, but {built}"
        )
    if torch.is_grad_enabled() and any(p.grad is not None for p in stage.parameters()):
        raise ValueError(
            "gradients of an earlier step are still there: call zero_grad(set_to_none=True) before"
        )
    if stage.training and rate and streams.outside is None:
        raise ValueError(f"dropout={rate} needs streams=random_streams(seed, pp_rank, dp_rank)")

    # Every rank cuts the same batch in the same way: so it knows the shape of whatever a neighbour will send.
    tokens, targets = tokens_BS.tensor_split(m), targets_BS.tensor_split(m)
    count, dtype = count_targets(targets_BS, grid.dp_group), next(stage.parameters()).dtype
    mailbox = Mailbox(
        grid, dtype, tokens_BS.device, lambda hop: (*tokens[hop.op.microbatch].shape, H)
    )
    learning, generator = torch.is_grad_enabled(), streams.outside or torch.default_generator
    saved = {}  # (micro-batch, chunk) to the input, the generator's state before it, and the edge of the output

    def compute(op: Op, x: Tensor) -> Tensor:
        """This piece's output: an activation, or of the last stage the micro-batch's part of the loss."""
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            y = stage(op.chunk, x, streams)
            return (
                stage.loss(y, targets[op.microbatch]).sum() / count
                if stage.is_last(op.chunk)
                else y
            )

    for op, batch in program:
        if op is not None:
            # An activation for F, a gradient for B; at the model's two ends there is none.
            key, source = (op.microbatch, op.chunk), input_of(op, rank, p, v)
            received = mailbox.take(*source) if source else None
            begin = time.perf_counter()
            if op.kind == "F":
                x = tokens[op.microbatch] if received is None else received.requires_grad_()
                state = generator.get_state() if recompute else None
                with torch.set_grad_enabled(
                    learning and not recompute
                ):  # what is to be recomputed keeps no graph now
                    y = compute(op, x)
                if learning:
                    saved[key] = x, state, None if recompute else get_gradient_edge(y)
                mailbox.put(rank, op, y.detach())  # without its graph, which stays here
                del y  # or this frame would hold the output until the next forward
            else:
                x, state, edge = saved.pop(key)
                if recompute:
                    with replayed(generator, state):
                        edge = get_gradient_edge(compute(op, x))
                # Adds to every parameter's grad, and leaves the input's in x.grad. At the loss it starts from 1 (None).
                torch.autograd.backward(edge, received)
                if x.is_floating_point():  # tokens have no gradient, and nobody waits for one
                    mailbox.put(rank, op, x.grad)
                del x, edge  # the last holders of this micro-batch's activations
            if bars is not None:
                bars.append(Bar(op, begin, time.perf_counter()))
        mailbox.post(batch)
    mailbox.land(*mailbox.flying)  # the last sends: their tensors must live until the peer has them

    # Replicas first: then each of the tied weight's two parts is the whole batch's, and their sum is the gradient.
    if learning:
        sum_over(grid.dp_group, [p.grad for p in stage.parameters()])
        sum_over(grid.tied_group, [p.grad for p in stage.tied_copies()])
    # All that nobody took is the last stage's output: the parts of the loss. Elsewhere there are none.
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(mailbox.values.values(), torch.zeros((), dtype=wide, device=tokens_BS.device))
    for group in (grid.pp_group, grid.dp_group):
        sum_over(group, [total])
    return total


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# No tensor is cut, and a layer keeps its name, so a rank's state dict is some entries of the plain model's. To go from
# four stages to two, or to other chunks, is to deal the same entries out again. Only the tied weight has two copies.
# They must be equal to the bit, since both have had the same gradient at every step: where they are not, its sum was
# left out, and merging says so. The same two functions deal out gradients, or an optimiser's moments.


def shard_state_dict(
    full: dict[str, Tensor], config: GPTConfig, rank: int, world_size: int, chunks: int = 1
) -> dict[str, Tensor]:
    """The plain model's state dict, `full`, to that of pipeline rank `rank` of `world_size`, copies.

    Raises: ValueError that names all that is missing, unknown or of another shape.
    """
    found = {name: tuple(x.shape) for name, x in full.items()}
    expected = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    if wrong := sorted({name for name, _ in found.items() ^ expected.items()}):
        lines = (
            f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'known')}"
            for name in wrong
        )
        raise ValueError("the state dict does not fit this configuration: " + "; ".join(lines))
    with torch.device("meta"):
        names = PipelineStage(config, rank, world_size, chunks).state_dict()
    return {name: full[name].clone() for name in names}


def merge_state_dicts(shards: list[dict[str, Tensor]], config: GPTConfig) -> dict[str, Tensor]:
    """All ranks' state dicts, `shards`, to the plain model's: `shard_state_dict` undone to the bit; gradients as well.

    Returns: each name with its tensor, in the plain model's shape.
    Raises: ValueError where something is missing, or the copies of a tied weight have drifted apart.
    """
    full = {}
    for shard in shards:
        for name, x in shard.items():
            if not torch.equal(full.setdefault(name, x.clone()), x):
                gap = (full[name] - x).abs().max()
                raise ValueError(
                    f"the copies of {name} differ by {gap:.1e}: they have drifted apart"
                )
    names = parameter_shapes(config)
    if missing := names.keys() - full.keys():
        raise ValueError(f"no rank has {sorted(missing)}")
    return {name: full[name] for name in names}


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# Pipeline and data parallelism are two directions of one grid. With --pp 2 on 4 ranks:
#
#                      replica 0    replica 1
#        stage 0         rank 0       rank 1       ← a dp group: the same layers, other rows of the batch
#        stage 1         rank 2       rank 3
#                          ↑ a pp group: the same rows, other layers
#
# Here stages are the far neighbours, the reverse of chapter 2: a stage sends one tensor a micro-batch and can do that
# from server to server, while replicas sum whole gradients and tensor ranks talk in every layer.


@dataclass(frozen=True)
class Grid:
    """This rank's place in the pipeline × data grid. In each group None is for a direction with this rank alone.

    tied_group: the first and the last rank of a pipeline. tp_group: ranks that hold the same boundary tensors; who has
    tensor parallelism inside the stages sets it, `make_grid` does not.
    Raises: ValueError on a rank that is not in one of the groups.
    """

    pp: int = 1
    dp: int = 1
    pp_rank: int = 0
    dp_rank: int = 0
    pp_group: Group = None
    dp_group: Group = None
    tied_group: Group = None
    tp_group: Group = None

    def __post_init__(self):
        for group in (self.pp_group, self.dp_group, self.tied_group, self.tp_group):
            group_size(group)  # refuses a group of other ranks


def make_grid(pp: int, device: torch.device, timeout: float = 60.0) -> Grid:
    """Lays all ranks out as (pp, dp); every rank must call it.

    timeout: seconds. Raises: ValueError where pp does not divide the ranks.
    """
    world, rank = group_size(), group_rank()
    if world % pp:
        raise ValueError(f"pp={pp} does not divide the {world} ranks")
    dp = world // pp
    ranks = torch.arange(world).view(pp, dp)  # ranks[stage, replica]
    pipelines, replicas = ranks.T.tolist(), ranks.tolist()
    # Who holds the tied weight: first and last of each pipeline. All ranks must make a group together, so each of those
    # between is in a list as well, alone.
    ends = [ranks[:1] + ranks[1:][-1:] for ranks in pipelines] + [
        [r] for ranks in pipelines for r in ranks[1:-1]
    ]
    groups = (make_group(lists, device, timeout) for lists in (pipelines, replicas, ends))
    pp_group, dp_group, tied_group = (group if group_size(group) > 1 else None for group in groups)
    return Grid(pp, dp, rank // dp, rank % dp, pp_group, dp_group, tied_group)


# ── 4.1 Sums over the grid ──────────────────────────────────────────────────────────────────────────────
#
# Three sums make the gradient whole: over replicas; of the tied weight, whose first copy has the embedding's part and
# whose last copy the head's, over the two ranks that have them; and of the squares for the global norm, over stages.
# In the last the tied weight counts once, though two ranks have it: its first copy counts, and the second is scaled by
# the same factor, so the copies stay equal. Replicas need no such sum: their gradients are equal by then.


def sum_over(group: Group, tensors: list[Tensor]) -> None:
    """Sums each of `tensors`, of any shapes and one dtype, over `group`, in place. group None: this rank is alone.

    One large message is faster than many small ones, and costs a copy of them.
    Raises: ValueError on a rank that is not in `group`.
    """
    if group is not None and group_size(group) > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat, group=group)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def clip_grad_norm_(stage: PipelineStage, max_norm: float, group: Group = None) -> Tensor:
    """Scales all gradients so that their norm over the stages of `group` is at most max_norm.

    Gradients are whole, as `run_step` leaves them: summed over replicas, and of no tensor-parallel share.
    Returns: the norm before clipping, a scalar, at least fp32, the same on every rank: torch.nn.utils.clip_grad_norm_'s
    of the plain model.
    """
    copies = (
        {id(p) for p in stage.tied_copies()} if stage.rank else set()
    )  # by identity: == compares elements
    grads = [p.grad for p in stage.parameters() if id(p) not in copies]
    wide = torch.promote_types(
        grads[0].dtype, torch.float32
    )  # a sum of squares in bf16 would have three digits
    square = (
        torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in grads]).square().sum()
    )
    sum_over(group, [square])
    nn.utils.clip_grads_with_norm_(stage.parameters(), max_norm, square.sqrt())
    return square.sqrt()


def train(
    stage: PipelineStage, schedule: Schedule, batches: Batches, lr: Callable[[int], float], grid: Grid | None = None,
    max_norm: float = 1.0, bars: list[Bar] | None = None, **options,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """`train_alone` on a grid: the same losses and norms before clipping, scalars. Every rank must iterate it.

    batches: the global ones. Each replica takes its rows, where dp does not divide them an unequal number.
    bars: gets the operations of the latest step alone. options: `run_step`'s streams, recompute and autocast.
    Raises: ValueError for a schedule that is none, or a batch with too few rows.
    """
    grid, optimizer = grid or Grid(), make_optimizer(stage)
    verify(schedule)  # before the first message, since a reader may have written it
    program, m = programs(schedule)[grid.pp_rank], 1 + max(op.microbatch for op in schedule[0])
    for step, batch in enumerate(batches):
        if (
            rows := len(batch[0])
        ) < m * grid.dp:  # before any message: the replicas would not fail together
            raise ValueError(
                f"a batch of {rows} rows is too small for {m} micro-batches on {grid.dp} replicas"
            )
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        optimizer.zero_grad()
        if bars is not None:
            bars.clear()
        tokens_BS, targets_BS = (whole.tensor_split(grid.dp)[grid.dp_rank] for whole in batch)
        loss = run_step(stage, program, tokens_BS, targets_BS, grid, bars=bars, **options)
        norm = clip_grad_norm_(stage, max_norm, grid.pp_group)
        optimizer.step()
        yield loss, norm


# ── 5 The paper's arithmetic ────────────────────────────────────────────────────────────────────────────
#
# ── 5.1 Bubbles and memory, exactly ─────────────────────────────────────────────────────────────────────
#
# The last rank can start when p − 1 others have done a forward, and the first can end when p − 1 others have done a
# backward after it: every rank idles for p − 1 of each, whatever happens between. Over the m of each that it does, that
# is (p − 1)/m. A chunk is 1/v of a rank's layers, so its forward and backward pass along v times faster: (p − 1)/(v·m),
# paid with v times as many messages. With backward cut in two, only its first part is on the way from rank to rank, and
# the second fills what remains: (p − 1)(F + B − W).
#
# What is in memory on a rank are the micro-batches that it has seen forward and not yet backward: those that went
# ahead, and the one it works on.


def bubble(kind: str, stages: int, microbatches: int, chunks: int = 1) -> Fraction:
    """Time lost over ideal time, as the paper gives it; for zb-h1 where F, B and W take as long and m ≥ p.

    zb-h1 in general: (p − 1)(F + B − W), with B and W the two parts of backward. Source: the paper's section 2.2.
    """
    return Fraction(stages - 1, microbatches * (3 if kind == "zb-h1" else chunks))


def in_flight(kind: str, stages: int, microbatches: int, chunks: int = 1, rank: int = 0) -> int:
    """The most activations that `rank` holds at once, in chunks of its model (each 1/v of its layers).

    1f1b: p on the first rank and 1 on the last. interleaved: p·v + p − 1 on the first, so 1 + (p − 1)/(p·v) times
    1f1b's memory. zb-h1: p on every rank, since an activation is kept until its W. Source: the paper's section 2.2.
    """
    p, m, v = stages, microbatches, chunks
    most = {
        "gpipe": m,
        "1f1b": p - rank,
        "interleaved": 2 * (p - rank - 1) + (v - 1) * p + 1,
        "zb-h1": p,
    }[kind]
    return min(most, m * v)


# ── 5.2 Parameters, operations, days ────────────────────────────────────────────────────────────────────
#
# A layer's four matrices have 12·H² weights: 3 in qkv, 1 in out, 4 in up, 4 in down; its biases and norms 13·H. The
# embedding tables have V·H and S·H.
#
# A product of (a × b) and (b × c) is 2abc operations. So forward, a layer has 2·12·B·S·H² of them in its matrices, and
# 4·B·S²·H in attention: each of S tokens meets S others, once for the scores and once for the values. Backward has
# twice as many, a product for the input's gradient and one for the weight's, and recomputation the forward's once more.
# The head has 2·B·S·H·V, and three times that with backward: it is not recomputed.
#
# The rule of thumb 8·T·P/(n·X) (T tokens, P parameters, n GPUs of X FLOP/s) takes 2 operations for each weight and
# token, times 1 forward, 1 recomputed and 2 backward, and drops attention's and the head's. The paper's 34 and 84 days
# are the rule's; its table 2 comes from the exact count, 1 to 3 % more.


def parameter_count(layers: int, hidden: int, vocab: int = 51_200, seq: int = 2048) -> int:
    """Parameters of a GPT with a tied head, without the final norm's 2H. Source: the paper's section 5.1."""
    return layers * (12 * hidden**2 + 13 * hidden) + (vocab + seq) * hidden


def flops(
    layers: int,
    hidden: int,
    batch: int,
    vocab: int = 51_200,
    seq: int = 2048,
    recompute: bool = True,
) -> int:
    """Floating-point operations of one step of `batch` sequences. Source: the paper's section 5.1 (recomputed)."""
    per_layer = 24 * batch * seq * hidden**2 + 4 * batch * seq**2 * hidden
    return (4 if recompute else 3) * layers * per_layer + 6 * batch * seq * hidden * vocab


def training_days(
    tokens: float, gpus: int, flops_per_gpu: float, layers: int, hidden: int, vocab: int = 51_200, seq: int = 2048
) -> float:  # fmt: skip
    """Days to train on `tokens`, from the exact count of operations, recomputation included.

    Source: the paper's section 5.1.
    """
    return flops(layers, hidden, 1, vocab, seq) / seq * tokens / (gpus * flops_per_gpu) / 86_400


def training_days_rule(tokens: float, gpus: int, flops_per_gpu: float, parameters: float) -> float:
    """Days to train on `tokens` by the rule 8·T·P/(n·X). Source: the paper's section 5.1."""
    return 8 * tokens * parameters / (gpus * flops_per_gpu) / 86_400


# A row of the paper's table 1: parameters in billions, its (t, p), micro-batch b and chunks v (from its published
# scripts), TFLOP/s per GPU, share of the 312 peak in percent, PFLOP/s of all GPUs.
Published = namedtuple(
    "Published", "billions heads hidden layers tp pp gpus batch b v tflops percent petaflops"
)

TABLE_1 = [
    Published(1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137, 44, 4.4),
    Published(3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138, 44, 8.8),
    Published(7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142, 46, 18.2),
    Published(18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135, 43, 34.6),
    Published(39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138, 44, 70.8),
    Published(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140, 45, 143.8),
    Published(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148, 47, 227.1),
    Published(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155, 50, 297.4),
    Published(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163, 52, 410.2),
    Published(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163, 52, 502.0),
]

# ── 5.3 A plan for a cluster ────────────────────────────────────────────────────────────────────────────
#
# With t-way tensor, p-way pipeline and d-way data parallelism, n = t·p·d, a step of B sequences takes
#
#     (m + (p − 1)/v) · (time of one micro-batch on one rank)  +  (sum of gradients over d replicas)
#
# and the micro-batch's time is made of its operations, of the all-reduces inside its layers, and of the messages to the
# neighbours. Each is a volume over a speed, with the volumes of the paper's section 3 (in elements, for one micro-batch
# of b sequences; recomputation repeats the forward's):
#
#     all-reduces of one layer   6 of b·S·H over t ranks: 12·b·S·H·(t − 1)/t                     inside a server
#     messages of one chunk      forward and backward, each b·S·H/t                              between servers
#                                and what the receivers gather (2.6), each b·S·H·(t − 1)/t       inside a server
#     gradients, once a step     2·(d − 1)/d of this rank's parameters                           between servers
#
# The speeds are the reader's to state. Those of `Machine` are an A100's: 312 TFLOP/s of which large products reach some
# 60 %, 300 GB/s between the GPUs of a server, 25 GB/s a GPU between servers. One more constant decides over b: what a
# layer costs however small the micro-batch is. With backward and recomputation it has over a hundred kernels, each with
# some ten microseconds in which little or nothing is computed. We take two milliseconds. (On one GPU the paper gains up
# to 1.3 times the throughput by a larger b, which allows for five and more.) Leave it out, and a great many
# micro-batches of one sequence, through chunks of one layer, look free.
#
# Held against table 1, the paper's own (t, p) is among the best three in each of the ten rows, and stays there for
# anything from 1 to 8 ms; with a tenth of a millisecond it is fifth for 18 B. In five rows another is predicted to be
# faster, by 3 % at most: for 18, 39 and 146 B a smaller t with more stages, which saves all-reduces (of 18 B's step
# they are 13 % at t = 8 and 6 % at t = 4), and for 310 and 530 B fewer stages. The constants cannot tell 3 %, and the
# paper did not search: it filled the server with t first, by its first rule. The throughput of its own layouts comes
# out between 10 % too low and 22 % too high. This makes a ranking, and no forecast.
#
# Memory: 18 bytes a parameter (bf16 weight and gradient, fp32 gradient, weight and two moments), of the fullest stage;
# a layer's input for each layer and each micro-batch in flight; one layer's activations while it is recomputed
# (chapter 4 counts them: S·b·H·(10 + 24/t + 5·heads·S/(H·t)) bytes); and the last stage's logits. A tenth stays free.


class Machine(NamedTuple):
    """What a cluster's GPUs and networks can do. Source: an A100's data sheet; efficiency and overhead: ours."""

    gpu_memory: float = 80.0  # GB of one GPU
    gpus_per_node: int = 8  # GPUs of one server
    peak: float = 312e12  # FLOP/s of one GPU
    efficiency: float = 0.6  # the part of peak that large products reach
    nvlink: float = 300e9  # bytes/s of one GPU inside a server
    network: float = 25e9  # bytes/s of one GPU between servers
    overhead: float = 2e-3  # seconds a layer and micro-batch, whatever its size


A100 = Machine()

# One way to lay a model out: its seconds a step, of which `tensor` in all-reduces inside layers and `network` in
# messages between stages and sums over replicas; bubble over ideal time; GB on the fullest GPU; TFLOP/s per GPU.
Layout = namedtuple("Layout", "t p d v b m seconds bubble tensor network memory tflops")


def predict(
    layers: int, hidden: int, heads: int, batch: int, t: int, p: int, d: int, v: int, b: int,
    vocab: int = 51_200, seq: int = 2048, machine: Machine = A100,
) -> Layout:  # fmt: skip
    """One layout's step, as this section's head has it; what must divide, does.

    Source: volumes: the paper's section 3; their sum: ours.
    """
    m, kind = batch // d // b, "interleaved" if v > 1 else "1f1b"
    micro = b * seq * hidden  # elements of one boundary tensor

    # The fullest rank holds its layers and an embedding table: the first rank its own, the last the head.
    held = (layers // p * (12 * hidden**2 + 13 * hidden) + (vocab + seq) * hidden) / t
    inputs = in_flight(kind, p, m, v) * (layers // p // v) * 2 * micro
    working = micro * (10 + 24 / t + 5 * heads * seq / (hidden * t)) + 6 * b * seq * vocab / t

    # A pipeline is as fast as its slowest stage, the one with the head.
    head = 6 * b * seq * hidden * vocab
    slowest = (flops(layers, hidden, b, vocab, seq) - head) / p + head
    compute = slowest / t / (machine.peak * machine.efficiency) + machine.overhead * layers / p
    tensor = (
        12 * micro * (t - 1) / t * 2 / machine.nvlink * layers / p
    )  # 2 bytes an element, here and below
    hop = micro / t * 2 / machine.network + micro * (t - 1) / t * 2 / machine.nvlink
    messages = 2 * v * hop if p > 1 else 0.0
    lost, sums = float(bubble(kind, p, m, v)), 2 * (d - 1) / d * held * 2 / machine.network
    rounds = m * (1 + lost)
    seconds = rounds * (compute + tensor + messages) + sums
    speed = flops(layers, hidden, batch, vocab, seq) / (t * p * d * seconds) / 1e12
    memory = (18 * held + inputs + working) / 1e9
    return Layout(
        t, p, d, v, b, m, seconds, lost, rounds * tensor, rounds * messages + sums, memory, speed
    )


def plan(
    layers: int, hidden: int, heads: int, gpus: int, batch: int, vocab: int = 51_200, seq: int = 2048,
    machine: Machine = A100,
) -> list[Layout]:  # fmt: skip
    """The layouts that fit, fastest first, for each (t, p) the best (v, b).

    t stays inside a server. All must divide: t the heads and the hidden size, p·v the layers, b·d the batch, and m by
    p where v > 1. b is at most 16, the paper's largest.
    Raises: ValueError where nothing fits. Source: ours.
    """
    divisors = lambda n, most=math.inf: [i for i in range(1, n + 1) if n % i == 0 and i <= most]  # noqa: E731
    layouts = [
        predict(layers, hidden, heads, batch, t, p, d, v, b, vocab, seq, machine)
        for t in divisors(math.gcd(gpus, machine.gpus_per_node, heads, hidden))
        for p in divisors(math.gcd(gpus // t, layers))
        for d in divisors(math.gcd(gpus // (t * p), batch)) if t * p * d == gpus
        for b in divisors(batch // d, most=16)
        for v in (divisors(layers // p) if p > 1 and batch // d // b % p == 0 else [1])
    ]  # fmt: skip
    best: dict[tuple[int, int], Layout] = {}
    for x in sorted(layouts, key=lambda x: x.seconds):
        if x.memory <= 0.9 * machine.gpu_memory:
            best.setdefault((x.t, x.p), x)  # the first that fits is the fastest
    if not best:
        what = f"{layers} layers of {hidden} with a batch of {batch} fit no layout of {gpus} GPUs"
        raise ValueError(
            f"{what} of {machine.gpu_memory:g} GB: take more GPUs, or a batch with more divisors"
        )
    return list(best.values())


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# Memory, in two places. p micro-batches are under way on the first rank, each with all its activations; and inside a
# stage every tensor-parallel rank keeps the whole input of each norm and each dropout, the same on all t of them. Here
# the cure is to recompute everything, which costs a third more time. Chapter 4 finds out what is kept, byte by byte,
# and hardly recomputes at all. The bubble stays: (p − 1)/m wants many micro-batches, and the batch is only so large.

# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────


def equivalence(
    grid: Grid, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> dict:
    """A small odd model on this grid beside the same on a single device, under each schedule: name to relative error.

    Rows divide neither over replicas nor over micro-batches, which have unequal numbers of tokens that count. Errors
    are per tensor: max|Δ| / max|reference|; after AdamW over max(max|reference|, steps · lr).
    """
    config = GPTConfig(61, 16, hidden_size=16, num_layers=2 * grid.pp + 1, num_heads=2)
    m = 2 * grid.pp
    rows = m * grid.dp + 1
    tokens_BS, targets_BS = torch.randint(
        61, (2, rows, 13), generator=torch.Generator().manual_seed(1)
    ).to(device)
    targets_BS[0, 3:] = -100
    batches, options = (
        [(tokens_BS, targets_BS)] * 5,
        dict(lr=lambda step: 1e-3, max_norm=0.1, autocast=autocast),
    )
    errors = {}

    def gaps(kind: str, here: dict, reference: dict, floor: float = 0.0) -> dict[str, float]:
        shards = [{name: x.detach().cpu() for name, x in here.items()}] * grid.pp
        if grid.pp_group is not None:
            dist.all_gather_object(shards, shards[0], grid.pp_group)
        return relative_errors(kind, merge_state_dicts(shards, config), reference, floor)

    for kind, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2)):
        plain = GPT(config).to(device, dtype)
        stage = PipelineStage(config, grid.pp_rank, grid.pp, chunks).to(device, dtype)
        here = train(
            stage,
            schedule(kind, grid.pp, m, chunks),
            batches,
            grid=grid,
            recompute=chunks > 1,
            **options,
        )
        runs = zip(train_alone(plain, batches, **options), here)
        for step, ((loss, norm), (loss_here, norm_here)) in enumerate(runs):
            errors[f"loss {step}, {kind}"] = abs(loss_here / loss - 1).item()
            errors[f"norm {step}, {kind}"] = abs(norm_here / norm - 1).item()
            if step == 0:
                grads = (
                    {n: p.grad for n, p in module.named_parameters()} for module in (stage, plain)
                )
                errors |= gaps(f"gradient, {kind},", *grads)
        if dtype == torch.float64:  # where a gradient is zero Adam divides rounding noise by itself
            errors |= gaps(
                f"after AdamW, {kind},", stage.state_dict(), plain.state_dict(), floor=5 * 1e-3
            )
    return errors


# fp64 is the proof. The others are what rounding does to a right program: bf16's 8 bits are 0.4 % in each product.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def losses_alone(
    config: GPTConfig, batches: Batches, device: torch.device, **options
) -> list[float]:
    """The single device's losses, trained by rank 0; an empty list on the other ranks, which wait.

    options: `train_alone`'s lr and autocast, and dtype, the parameters'.
    """
    losses = []
    if group_rank() == 0:
        plain = GPT(config).to(device, options.pop("dtype"))
        losses = [loss.item() for loss, _ in train_alone(plain, batches, **options)]
    wait_for_all()  # this takes rank 0 longer, perhaps, than a message may take
    return losses


def demonstrate(args: argparse.Namespace, grid: Grid, device: torch.device) -> dict[str, float]:
    """Trains on real text, draws a step; returns each first step's difference in loss from the single device."""
    from tqdm import tqdm

    config, data = config_of(args), TextData(args.data, args.seq_length)
    source = args.data or "Python's sources"
    dtype, autocast = dtypes(args)

    def batches(steps: int) -> Batches:
        return (
            [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]
            for step in range(steps)
        )

    options = dict(lr=lambda step: args.lr * min(1.0, (step + 1) / 10), autocast=autocast)
    stage = PipelineStage(config, grid.pp_rank, grid.pp, args.chunks).to(device, dtype)
    streams = random_streams(args.seed, grid.pp_rank, grid.dp_rank, device)
    table, bars, differences = (
        schedule(args.schedule, grid.pp, args.microbatches, args.chunks),
        [],
        {},
    )
    held = sum(p.numel() for p in stage.parameters())
    whole = sum(shape.numel() for shape in parameter_shapes(config).values())
    say(f"{whole:,} parameters, {held:,} on this rank; {len(data.tokens):,} tokens of {source}\n")
    compared = (
        0 if args.dropout else min(5, args.steps)
    )  # with dropout the masks differ, and so must the losses
    alone = losses_alone(config, batches(compared), device, dtype=dtype, **options)
    say("step      loss    single device      norm")
    quiet = group_rank() > 0 or not sys.stderr.isatty()
    options |= dict(streams=streams, recompute=args.recompute, bars=bars)
    training = train(stage, table, batches(args.steps), grid=grid, **options)
    for step, numbers in enumerate(tqdm(training, total=args.steps, disable=quiet)):
        loss, norm = read_step(step, *numbers)
        other = ""
        if step < len(alone):
            other = f"{alone[step]:.6f}"
            differences[f"loss {step}"] = abs(loss - alone[step])
        if step < 5 or step % 10 == 9:
            say(f"{step:4}  {loss:.6f}  {other:>15}  {norm:8.3f}")

    stage.eval()
    forward_only = programs([[op for op in ops if op.kind == "F"] for ops in table])[grid.pp_rank]
    rows = (
        x_BS.to(device).tensor_split(grid.dp)[grid.dp_rank]
        for x_BS in data.batch(0, args.batch, args.seed, True)
    )
    with torch.no_grad():
        loss = run_step(stage, forward_only, *rows, grid, autocast=autocast)
    say(f"\nheld-out loss {loss.item():.4f} nats a token\n")
    draw_step(args, grid, table, bars)
    return differences


def draw_step(args: argparse.Namespace, grid: Grid, table: Schedule, bars: list[Bar]) -> None:
    """Prints a step as it was planned, and below it the last one as it ran."""
    planned = simulate(table, t_backward=3 if args.recompute else 2)
    say(f"{args.schedule} as planned: bubble {planned.bubble} of the ideal time\n{draw(planned)}\n")
    every = [None] * group_size()
    dist.all_gather_object(every, (grid.dp_rank, bars))
    measured = Timeline([bars for replica, bars in every if replica == 0 and bars])
    if measured.ranks:
        cores = f"{1e3 * measured.length:.0f} ms on {os.cpu_count()} CPU cores"
        say(f"the last step as it ran, {cores}\n{draw(measured)}\n")


def main(args: argparse.Namespace, device: torch.device) -> None:
    grid = make_grid(args.pp, device, args.timeout)
    work = f"{args.schedule}, {args.microbatches} micro-batches, {args.chunks} chunks"
    say_setting(args, f": pp {grid.pp} × dp {grid.dp}, {work}")
    if args.check:
        good = print_errors(equivalence(grid, device, *dtypes(args)), BOUNDS[args.dtype])
        sys.exit(0 if good else 1)
    errors = equivalence(grid, device, torch.float64)
    differences = demonstrate(args, grid, device)
    # The other ranks wait at the end of `run_rank` until rank 0 has computed the paper's numbers.
    if group_rank() == 0 and not print_claims(claims(args, errors, differences)):
        sys.exit(1)


def claims(
    args: argparse.Namespace, errors: dict[str, float], differences: dict[str, float]
) -> list[tuple]:
    """The rows of the claims table."""
    rows = []

    def row(claim: str, paper: str, here: str, verdict: bool | str | None = None) -> None:
        rows.append((claim, paper, here, here == paper if verdict is None else verdict))

    for claim, kind in (
        ("gradient", "gradient"),
        ("norm before clipping", "norm"),
        ("weight after AdamW", "after"),
    ):
        error = worst(errors, kind)
        text = f"every {claim} equals the single device's, float64"
        row(text, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"])
    text = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    if differences:
        row(
            text,
            "equal",
            f"within {worst(differences):.0e}",
            worst(differences) <= BOUNDS[args.dtype],
        )
    else:
        row(text, "equal", "–", "needs steps and --dropout 0")
    for kind, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2)):
        table = schedule(kind, 4, 8, v)
        row(
            f"bubble of {kind}, p = 4, m = 8, v = {v}",
            str(bubble(kind, 4, 8, v)),
            str(simulate(table).bubble),
        )
        formula = [in_flight(kind, 4, 8, v, rank) for rank in range(4)]
        row("   activations held, rank by rank", str(formula), str(verify(table)))
    big = schedule("1f1b", 64, 512)
    verify(big)
    row("bubble of the 1T model's step, 64 stages, proven", "63/512", str(simulate(big).bubble))
    same = sum(
        f"{parameter_count(r.layers, r.hidden) / 1e9:.1f}" == f"{r.billions:.1f}" for r in TABLE_1
    )
    row("parameters of table 1 as printed", "10 rows", f"{same} rows")
    days = [
        training_days_rule(300e9, 1024, 140e12, 175e9),
        training_days_rule(450e9, 3072, 163e12, 1008e9),
    ]
    row("days to train 175B and 1T", "34, 84", ", ".join(f"{x:.0f}" for x in days))
    first = plan(128, 25_600, 160, 3072, 3072)[0]
    row("the plan for 1T on 3,072 GPUs", "t 8, p 64, d 6", f"t {first.t}, p {first.p}, d {first.d}")
    best = (
        [x[:2] for x in plan(r.layers, r.hidden, r.heads, r.gpus, r.batch)[:3]] for r in TABLE_1
    )
    among = sum((r.tp, r.pp) in three for r, three in zip(TABLE_1, best))
    row("table 1's (t, p) among the plan's best three", "10 rows", f"{among} rows")
    row("throughput gained by interleaving", "up to 10 %", "–", "needs a GPU a rank")
    row("throughput gained by scatter/gather, 96 GPUs", "up to 11 %", "–", "needs 12 servers")
    return rows


@dataclass
class Options:
    """This chapter's own flags."""

    data: str = flag(
        "", "a UTF-8 text to train on, in place of Python's own sources", metavar="FILE"
    )
    pp: int | None = flag(None, "ranks of one pipeline; None: 4, or the most that fit", least=1)
    schedule: str = flag("1f1b", "the order of forwards and backwards", choices=list(KINDS[:3]))
    chunks: int = flag(1, "pieces of the model on each rank, for interleaved", least=1)
    microbatches: int | None = flag(None, "of a replica; None: two for each stage", least=1)
    recompute: bool = flag(False, "keep each stage's input alone, compute the rest again")
    untied: bool = flag(False, "a head with a weight of its own")
    batch: int | None = flag(None, "sequences of a step; None: 16, or more if need be", least=1)
    lr: float = flag(3e-3, "learning rate, after ten steps of warm-up", least=1e-9)


def config_of(args: argparse.Namespace) -> GPTConfig:
    words = byte_encoding().n_vocab
    return config_from(args, GPTConfig, vocab_size=words, seed=args.seed, tied_head=not args.untied)


def default_pp(args: argparse.Namespace) -> int:
    """4 stages, or else as many as divide the ranks and have a layer for each chunk."""
    most = max(1, args.num_layers // args.chunks)
    fits = [pp for pp in range(1, most + 1) if args.world_size % pp == 0]
    return 4 if 4 in fits else fits[-1]


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError or OSError where the flags, or the text, do not fit."""
    args.pp = args.pp or default_pp(args)
    args.microbatches = args.microbatches or 2 * args.pp
    if args.world_size % args.pp:
        raise ValueError(f"--pp {args.pp} must divide the {args.world_size} ranks")
    verify(schedule(args.schedule, args.pp, args.microbatches, args.chunks))
    place_layers(config_of(args).num_layers, args.pp * args.chunks)
    least = args.microbatches * args.world_size // args.pp
    args.batch = args.batch or max(16, least)
    if args.batch < least:
        need = f"the micro-batches of all replicas need at least {least} rows"
        raise ValueError(f"--batch {args.batch}: {need}")
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [GPTConfig, Options], check_args, ranks=4, steps=40)


def plan_command(arguments: list[str]) -> None:
    """`pipeline.py plan ...`: the table of layouts, why the first is the first, and its schedule, proven and timed."""
    parser = argparse.ArgumentParser(
        prog="pipeline.py plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name in ("layers", "hidden", "heads", "gpus", "batch"):
        parser.add_argument("--" + name, type=int, required=True)
    speeds = dict(gpu_memory="GB of one GPU", gpus_per_node="GPUs of one server", peak="FLOP/s of one GPU",
                  efficiency="part of peak that large products reach", nvlink="bytes/s of a GPU inside a server",
                  network="bytes/s of a GPU between servers", overhead="seconds a layer and micro-batch")  # fmt: skip
    for name, text in speeds.items():
        default = Machine._field_defaults[name]
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=text
        )
    parser.add_argument("--rows", type=int, default=10, help="layouts to show")
    args = vars(parser.parse_args(arguments))
    rows, machine = args.pop("rows"), Machine(**{name: args.pop(name) for name in speeds})
    try:
        numbers = [*args.values(), *machine]
        if not all(0 < x < math.inf for x in numbers) or args["hidden"] % args["heads"]:
            why = "all must be finite and above 0, and the heads must divide the hidden size"
            raise ValueError(f"{args} on {machine}: {why}")
        layouts = plan(**args, machine=machine)
    except ValueError as error:
        parser.error(str(error))
    size = f"{parameter_count(args['layers'], args['hidden']) / 1e9:.1f} B parameters"
    print(f"{size}, {args['gpus']} GPUs, the best (v, b) of each (t, p)\n")
    print("  t    p    d   v   b    m    s/step   bubble   tensor  network      GB   TFLOP/s")
    for x in layouts[:rows]:
        shares = f"{x.bubble:8.1%} {x.tensor / x.seconds:8.1%} {x.network / x.seconds:8.1%}"
        sizes = f"{x.t:3} {x.p:4} {x.d:4} {x.v:3} {x.b:3} {x.m:4}"
        print(f"{sizes} {x.seconds:9.2f} {shares} {x.memory:7.0f} {x.tflops:9.0f}")
    x, room = layouts[0], machine.gpu_memory
    table = schedule("interleaved" if x.v > 1 else "1f1b", x.p, x.m, x.v)
    peaks, timeline, count = verify(table), simulate(table), sum(map(len, table))
    print(f"""
The first row by the paper's three rules:
1. tensor parallelism inside a server, pipelines across: t = {x.t} of {machine.gpus_per_node} GPUs, p = {x.p}
2. no more of both than the model needs: {x.t * x.p} GPUs hold it in {x.memory:.0f} of {room:g} GB; d = {x.d}
3. the micro-batch trades fast kernels against the bubble: b = {x.b}, m = {x.m}, bubble {x.bubble:.1%}

Its schedule, {count:,} operations: no deadlock, bubble {timeline.bubble}, {max(peaks)} activations of a chunk held""")


# The rest is carried: text data, at home in chapter 2; all other blocks, at home in chapter 1.


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


# region carried: text data (home: 02_megatron_tp)
class TextData:
    """A UTF-8 text as tokens, 9/10 to train on and 1/10 to evaluate on. path "": Python's sources.

    encoding: by default one token per byte. Raises: OSError; ValueError for an unusable file.
    """

    def __init__(self, path: str, seq_length: int, encoding: tiktoken.Encoding | None = None):
        self.seq_length = seq_length
        self.encoding = encoding or byte_encoding()
        paths = [Path(path)] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        if not paths[0].is_file():
            raise ValueError(f"{path}: No such file, or not a regular one, which every rank reads")
        try:
            text = "".join(path.read_text("utf-8") for path in paths[:40])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
        self.tokens = torch.tensor(self.encoding.encode_ordinary(text), dtype=torch.int64)
        cut = len(self.tokens) * 9 // 10
        self.train_split = self.tokens[:cut]
        self.eval_split = self.tokens[cut:]
        if len(self.eval_split) <= seq_length:
            need = f"a tenth of it must be longer than {seq_length}"
            raise ValueError(f"{path} has {len(self.tokens)} tokens: {need}")

    def batch(
        self, step: int, rows: int, seed: int, evaluation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The global batch of a step, tokens_BS and targets_BS: a function of seed and step."""
        split = self.eval_split if evaluation else self.train_split
        key = f"{seed} {step} {evaluation}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        start_B1 = torch.randint(len(split) - self.seq_length, (rows, 1), generator=generator)
        window_BS = split[start_B1 + torch.arange(self.seq_length + 1)]
        return window_BS[:, :-1], window_BS[:, 1:]


def byte_encoding() -> tiktoken.Encoding:
    """A tokenizer of 256 tokens, one for each byte, that needs no download."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


# endregion copy aaa995


# region carried: counter (home: 01_deepspeech)
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


# endregion copy a5766d


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


# endregion copy 82e4fd


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
    if sys.argv[1:2] == ["plan"]:
        plan_command(sys.argv[2:])
    else:
        launch(main, flags())
