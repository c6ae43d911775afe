# SPDX-License-Identifier: MIT-0
"""Chapter 4. Sequence parallelism and selective recomputation: count every byte that backward needs, then keep few.

Paper: Reducing Activation Recomputation in Large Transformer Models,
       Korthikanti et al., 2022, arXiv 2205.05198

The problem. A pipeline (chapter 3) has many micro-batches in flight, and each keeps what its forward computed until its
backward has run: for large models more than the weights. Tensor parallelism (chapter 2) divides that over its ranks,
but for what stands between its regions, which every rank keeps whole. Keeping nothing and computing everything a second
time takes a third more time.

The idea. Count what one layer keeps: 34·s·b·h + 5·a·s²·b bytes (s tokens, b sequences, h wide, a heads). Tensor
parallelism divides most of it, but not the 10·s·b·h that stand between its regions, where every rank computes the same
norm, dropout and residual sum. These work on each token by itself, so let each rank do its own tokens. Half a layer, on
two ranks, with the tokens a b c d:

        tensor parallelism (chapter 2)                     and sequence parallelism
          rank 0         rank 1                              rank 0         rank 1
          x: abcd        x: abcd                             x: ab          x: cd
          norm           norm         the same twice         norm           norm           each its own tokens
        f ───────────────────────     nothing              g ───────────────────────       all-gather of the tokens
          · W1[left]     · W1[right]                         · W1[left]     · W1[right]
          · W2[top]      · W2[bottom]                        · W2[top]      · W2[bottom]
        f̄ ───────────────────────     all-reduce           ḡ ───────────────────────       reduce-scatter
          dropout, + x   dropout, + x the same twice         dropout, + x   dropout, + x   each its own tokens
          z: abcd        z: abcd                             z: ab          z: cd

A ring's all-reduce is a reduce-scatter and then an all-gather: the doors send the same bytes, and nothing is kept
twice. Then the 5·a·s²·b: attention weights, the largest part, and the cheapest to compute again. So recompute them and
nothing else. Together that is a fifth of the memory for a few percent of the time.

Run it (no flag is needed; --help lists them):

    python 04_seq_parallel/seq_parallel.py                           4 ranks on this machine
    python 04_seq_parallel/seq_parallel.py --ranks 1                 one process, for a debugger
    python 04_seq_parallel/seq_parallel.py --check                   equivalence alone, each tensor's error, all modes
    python 04_seq_parallel/seq_parallel.py --paper-scale 1T          one layer of 1T on 8 pretended ranks, in seconds
    python 04_seq_parallel/seq_parallel.py --no-sequence-parallel --recompute full --dropout 0.1
    torchrun --nproc-per-node=8 04_seq_parallel/seq_parallel.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        04_seq_parallel/seq_parallel.py

It proves in float64 that every gradient equals the single device's in all six modes (with and without sequence
parallelism; no, selective or full recomputation), shows tensor by tensor what a layer keeps, holds the measured bytes
against the paper's formula, trains a small GPT on real text, and ends in a table of the paper's claims.

Left out: data and pipeline parallelism (their stages appear in part 5's arithmetic only), recomputation of some
micro-batches and not of others (the paper's appendix C), writing fused kernels (PyTorch's is used), and dividing
attention itself over the sequence (ring attention, Ulysses: often called context parallelism, and another thing).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension. A CAPITAL is the whole dimension, the small letter
# this rank's share of it, and partial_ marks a summand that is still to be reduced:
#
#     S  sequence, in tokens      s = S / t    this rank's tokens         L  layers
#     B  batch                    F  feed-forward size, or any            V  words in vocabulary
#     H  hidden size                 other features; f: this rank's       v: V, padded, over t: this rank's words
#     N  attention heads          n = N / t    this rank's heads          D  size of a head
#     P  pairs of a sequence and a head, B·N;  p = B·n                    t  ranks that share the model (tp)
#
# An x without a suffix is x_sBH under sequence parallelism, and x_SBH without it. A bare p is dropout's probability.
#
# The paper's own letters, in formulas: s = S, b = B, h = H, a = N, L, v = V, t, and for pipelines p stages, m
# interleaved pieces of a stage. Tensors are laid out x_SBH and not x_BSH as in chapter 2: our collectives cut and join
# dimension 0, which is contiguous, so that no copy is needed before or after.

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


# The sizes of a GPT, at home in chapter 3.
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
# A GPT on a single device, in ordinary PyTorch and in the usual layout x_BSH: the thing to equal. It is explained in
# chapter 2. Look at `Block`: it takes a layer's two halves as arguments, and what it does itself (norm, dropout,
# residual sum) it does to each token alone. So it serves x_BSH and x_SBH, and a rank's share of the tokens, x_sBH, as
# it is.


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


class TransformerLayer(Block):
    """One layer of the plain model, x_BSH to (B, S, H): what `SequenceParallelLayer` must equal."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, Attention(config), MLP(config))


# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────
#
# An operator keeps for backward what the formula of its gradient mentions: a product both its factors, a norm its
# input, softmax its output, dropout its mask, a sum nothing. Go through a layer with that in mind, in units of s·b·h
# bytes (a number in bf16 is 2, a mask's 1; 5·a·s²·b bytes are 5·a·s/h units), and this chapter's plan lies before you
# (TP is tensor parallelism, SP sequence parallelism):
#
#                                     single device    t ranks, TP      TP and SP
#     norm 1             its input             2               2              2/t       ← 2.2: each rank its own tokens
#     attention          qkv's input           2               2              2/t       ← 2.3: keep the share
#                        q, k, v               6               6/t            6/t
#                        core             5·a·s/h         5·a·s/(h·t)    5·a·s/(h·t)    ← 2.5, 2.6: forget, recompute
#                        out's input           2               2/t            2/t
#     dropout            its mask              1               1              1/t       ← 2.4: each rank another one
#     norm 2             its input             2               2              2/t       ← 2.2
#     feed-forward       up's input            2               2              2/t       ← 2.3
#                        gelu's input          8               8/t            8/t
#                        down's input          8               8/t            8/t
#     dropout            its mask              1               1              1/t       ← 2.4
#                                             ──            ────────         ────
#     besides the core                        34            10 + 24/t        34/t
#
# Section 2.7 puts the layer together, 2.8 counts what it really keeps, 2.9 adds the ends of the network.
#
# Two collectives join chapter 2's all-reduce. With two ranks, each holding two halves:
#
#     all-gather        rank 0: a         rank 1: b          →    both: [a, b]
#     reduce-scatter    rank 0: [a, c]    rank 1: [b, d]     →    rank 0: a + b     rank 1: c + d
#     all-reduce        rank 0: [a, c]    rank 1: [b, d]     →    both: [a + b, c + d]
#
# A reduce-scatter and then an all-gather are an all-reduce. The doors that chapter 2 built on it come first. Letters
# have moved since: what chapter 2's paper calls f and g, `copy_to_tp` and `reduce_from_tp`, are f and f̄ in this one,
# and g and ḡ are the two doors that section 2.2 adds.


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


# ── 2.1 The doors of a tensor-parallel region ───────────────────────────────────────────────────────────
#
# Explained in chapter 2, section 2.1.


# region carried: tensor-parallel operators (home: 02_megatron_tp)
class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, op, conjugate_op):
        ctx.reversed = (group, conjugate_op, op)
        return op(x, group)

    @staticmethod
    def backward(ctx, grad):
        # apply(), and not a plain call: so that the second derivative is right too.
        return _Conjugate.apply(grad, *ctx.reversed), None, None, None


def _identity(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)  # not x itself, which autograd would take for modified in place


def _sum(partial_x: Tensor, group: Group) -> Tensor:
    # all_reduce works in place, and the caller may still need its partial sum.
    return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    shards = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group_size(group))
    ]
    dist.all_gather(shards, x.contiguous(), group)
    return torch.cat(shards, dim=-1)


def _take_shard(x: Tensor, group: Group, dim: int = -1, name: str = "the last dimension") -> Tensor:
    tp = group_size(group)
    if x.shape[dim] % tp:
        size = f"{name}={x.shape[dim]} does not divide over {tp} ranks"
        raise ValueError(f"{size}: choose a multiple of {tp}, or fewer ranks")
    # A copy: a view would keep the memory of the full tensor alive.
    return x.chunk(tp, dim)[group_rank(group)].clone(memory_format=torch.contiguous_format)


def copy_to_tp(x: Tensor, group: Group = None) -> Tensor:
    """Enters a tensor-parallel region: identity in forward, all-reduce of the gradient.

    Args: x (...), replicated. group: the tensor-parallel group; None is all ranks.
    Source: f of Megatron-LM (Shoeybi et al., 2019), figure 3.
    """
    return _Conjugate.apply(x, group, _identity, _sum) if group_size(group) > 1 else x


def reduce_from_tp(partial_x: Tensor, group: Group = None) -> Tensor:
    """Leaves a tensor-parallel region: all-reduce in forward, identity for the gradient.

    Args: partial_x (...), of one shape on every rank; not modified.
    Returns: the sum over `group` (...), replicated.
    Source: g of Megatron-LM (Shoeybi et al., 2019), figure 3.
    """
    return (
        _Conjugate.apply(partial_x, group, _sum, _identity) if group_size(group) > 1 else partial_x
    )


def scatter_to_tp(x: Tensor, group: Group = None) -> Tensor:
    """This rank's shard of the last dimension, (..., F) to (..., f); the gradient is all-gathered.

    Args: x (..., F), replicated. Raises: ValueError where F does not divide over the ranks.
    Source: ours; Megatron-LM's code has it.
    """
    return _Conjugate.apply(x, group, _take_shard, _all_gather) if group_size(group) > 1 else x


def gather_from_tp(x: Tensor, group: Group = None) -> Tensor:
    """All-gathers the last dimension, (..., f) to (..., F); the gradient's shard stays on its rank.

    Right only where every rank computes the same from the result: its gradient is then replicated,
    and a sum over the ranks would count it tp times.
    Args: x (..., f), of one shape on every rank. Source: ours; Megatron-LM's code has it.
    """
    return _Conjugate.apply(x, group, _all_gather, _take_shard) if group_size(group) > 1 else x


# endregion copy f6acd3
def _share(size: int, group: Group, what: str) -> int:
    tp = group_size(group)
    if size % tp:
        raise ValueError(
            f"{what}={size} does not divide over {tp} ranks: choose a multiple of {tp}, or fewer ranks"
        )
    return size // tp


# ── 2.2 The doors, when each rank has its own tokens ────────────────────────────────────────────────────
#
#                              forward           backward
#     f   copy_to_tp           nothing           all-reduce         tensor parallelism alone
#     f̄   reduce_from_tp       all-reduce        nothing
#     g   gather_from_sp       all-gather        reduce-scatter     and sequence parallelism
#     ḡ   reduce_scatter_to_sp reduce-scatter    all-gather
#         scatter_to_sp        keep my tokens    all-gather         to begin with a tensor that every rank has
#
# Behind g each rank multiplies all tokens with its own columns of the weight, so each has a *summand* of every token's
# gradient: backward adds them up and gives each rank its own tokens'. That is the reduce-scatter. But where every rank
# does the *same* with what was gathered (a classifier that is not divided, say), each has the whole gradient, and a sum
# would count it t times: there backward keeps this rank's tokens and sends nothing. Only the caller knows which of the
# two follows, so it is an argument. Both mistakes run, and the loss of the first steps even falls.
#
# `_start_...` returns at once, with a work to wait for, so that a caller can compute meanwhile: the next section does.


def _start_gather(x_sBH: Tensor, group) -> tuple[Tensor, dist.Work]:
    """x_SBH, complete once the work has been waited for."""
    gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # its name before torch 2.13
    x_SBH = x_sBH.new_empty(x_sBH.shape[0] * group_size(group), *x_sBH.shape[1:])
    return x_SBH, gather(x_SBH, x_sBH.contiguous(), group=group, async_op=True)


def _start_reduce_scatter(partial_x_SBH: Tensor, group) -> tuple[Tensor, dist.Work]:
    """x_sBH, this rank's tokens of the sum, complete once the work has been waited for."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    x_sBH = partial_x_SBH.new_empty(
        _tokens_each(partial_x_SBH.shape[0], group), *partial_x_SBH.shape[1:]
    )
    return x_sBH, reduce_scatter(x_sBH, partial_x_SBH.contiguous(), group=group, async_op=True)


def _gather_tokens(x_sBH: Tensor, group) -> Tensor:
    x_SBH, work = _start_gather(x_sBH, group)
    work.wait()
    return x_SBH


def _reduce_scatter_tokens(partial_x_SBH: Tensor, group) -> Tensor:
    x_sBH, work = _start_reduce_scatter(partial_x_SBH, group)
    work.wait()
    return x_sBH


def _own_tokens(x_SBH: Tensor, group) -> Tensor:
    return x_SBH.split(_tokens_each(x_SBH.shape[0], group))[group_rank(group)].contiguous()


def _tokens_each(S: int, group: Group = None) -> int:
    t = group_size(group)
    if S % t:
        more = -(-S // t) * t
        raise ValueError(
            f"a sequence of {S} tokens does not divide over {t} ranks: pad it to {more}, targets with −100"
        )
    return S // t


def gather_from_sp(x_sBH: Tensor, group: Group = None, backward: str = "reduce_scatter") -> Tensor:
    """g: all ranks' tokens in the order of ranks, (s, B, H) to (S, B, H).

    x_sBH: any shape whose first dimension is divided over `group` (None: all ranks), of the same size on each.
    backward: "reduce_scatter" in front of work that is divided over the ranks, "split" in front of work that every rank
    repeats.

    Raises: ValueError for another `backward`.
    Source: section 4.2.2 of the paper.
    """
    ways = {"reduce_scatter": _reduce_scatter_tokens, "split": _own_tokens}
    if backward not in ways:
        raise ValueError(
            f"backward={backward!r}: 'reduce_scatter' in front of divided work, 'split' of repeated work"
        )
    return (
        _Conjugate.apply(x_sBH, group, _gather_tokens, ways[backward])
        if group_size(group) > 1
        else x_sBH
    )


def reduce_scatter_to_sp(partial_x_SBH: Tensor, group: Group = None) -> Tensor:
    """ḡ: the sum over `group`, of which each rank gets its own tokens, (S, B, H) to (s, B, H).

    partial_x_SBH: any shape, the same on each rank, whose first dimension is tokens; not modified.

    Raises: ValueError where S does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """
    if group_size(group) == 1:
        return partial_x_SBH
    return _Conjugate.apply(partial_x_SBH, group, _reduce_scatter_tokens, _gather_tokens)


def scatter_to_sp(x_SBH: Tensor, group: Group = None) -> Tensor:
    """This rank's tokens of a tensor that every rank has, (S, B, H) to (s, B, H); the gradient is gathered.

    x_SBH: any shape whose first dimension is tokens, equal on every rank.

    Raises: ValueError where S does not divide over the ranks.
    Source: Megatron-LM.
    """
    return (
        _Conjugate.apply(x_SBH, group, _own_tokens, _gather_tokens)
        if group_size(group) > 1
        else x_SBH
    )


# ── 2.3 Keep the share, and gather it twice ─────────────────────────────────────────────────────────────
#
# g and then a product would keep the gathered x_SBH, for the gradient of the weight: every rank holds all tokens
# again, and what was saved is lost. So the two become one function, which keeps x_sBH and gathers it once more in
# backward. That is one more all-gather, but it has something to hide behind; and so has the reduce-scatter of the
# input's gradient:
#
#     on the wire           all-gather x ─────►   reduce-scatter dx ─────►
#     arithmetic units      dx = dy W             dW = dyᵀ x, db = Σ dy        wait
#
# Without sequence parallelism the same function stands behind f: there is nothing to gather, and dx is all-reduced. One
# flag, then, chooses between two pairs of doors, here and in `sum_over_tp`. Apart from these two it is asked for in
# three places, which must know whose tokens are here: the random streams (2.4), the positions (2.9), and the gradients
# of what every rank holds whole (part 4).
#
# The column-parallel layer's bias is divided as its columns are, and needs no care. The row-parallel layer's is whole,
# and is added *after* the reduce-scatter, once to each token; added before, it would count t times.


class _Sent:
    """The work of a message that need not be sent."""

    def wait(self):
        pass


def _start_nothing(x: Tensor, group) -> tuple[Tensor, _Sent]:
    return x, _Sent()


def _start_all_reduce(partial_x: Tensor, group) -> tuple[Tensor, dist.Work]:
    """In place."""
    return partial_x, dist.all_reduce(partial_x, group=group, async_op=True)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_fH, bias_f, group, sequence_parallel):
        door = (
            (_start_gather, _start_reduce_scatter)
            if sequence_parallel
            else (_start_nothing, _start_all_reduce)
        )
        ctx.group, (ctx.start_gather, ctx.start_sum) = group, door  # g or f, there and back
        ctx.save_for_backward(x, weight_fH)  # the share, and not what is gathered here
        x_SBH, gathering = ctx.start_gather(x, group)
        gathering.wait()
        return F.linear(x_SBH, weight_fH, bias_f)

    @staticmethod
    @once_differentiable  # a gradient of the gradient would miss what comes from other ranks: refuse it
    def backward(ctx, grad_SBf):
        x, weight_fH = ctx.saved_tensors
        x_wants, weight_wants, bias_wants, *_ = ctx.needs_input_grad
        grad_x = grad_fH = grad_f = None
        if weight_wants:
            x_SBH, gathering = ctx.start_gather(x, ctx.group)
        if x_wants:
            partial_grad_SBH = grad_SBf @ weight_fH
            grad_x, reduction = ctx.start_sum(partial_grad_SBH, ctx.group)
        if weight_wants:
            gathering.wait()
            grad_fH = einsum(grad_SBf, x_SBH, "S B f, S B H -> f H")
        if bias_wants:
            grad_f = reduce(grad_SBf, "S B f -> f", "sum")
        if x_wants:
            reduction.wait()
        return grad_x, grad_fH, grad_f, None, None


def column_parallel(
    x: Tensor, weight_fH: Tensor, bias_f: Tensor | None, group: Group, sequence_parallel: bool
) -> Tensor:
    """The door into a region and the product behind it: x to (S, B, f).

    Args:
        x: (s, B, H), this rank's tokens, as many on each; without sequence parallelism (S, B, H), equal on every rank.
        weight_fH, bias_f: this rank's rows of F.linear's; no bias is None.
        group: the tensor-parallel group; None is all ranks.

    Source: section 4.2.2 of the paper.
    """
    if group_size(group) == 1:
        return F.linear(x, weight_fH, bias_f)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(
            x.device.type
        )  # before, because backward has no autocast, and to send less
        x, weight_fH, bias_f = (y if y is None else y.to(narrow) for y in (x, weight_fH, bias_f))
    return _ColumnParallel.apply(x, weight_fH, bias_f, group, sequence_parallel)


def sum_over_tp(partial_x_SBH: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """The door out of a region, ḡ or f̄: the sum over `group`, (s, B, H); without sequence parallelism (S, B, H).

    Raises: ValueError where S does not divide over the ranks, under sequence parallelism.
    Source: section 4.2.2 of the paper.
    """
    return (reduce_scatter_to_sp if sequence_parallel else reduce_from_tp)(partial_x_SBH, group)


class SPColumnParallelLinear(nn.Module):
    """nn.Linear with its outputs divided over `group`, behind g: x to (S, B, out_features / t).

    Args:
        in_features, out_features: as nn.Linear's, out_features over all ranks.
        group: the tensor-parallel group; None is all ranks.
        sequence_parallel: x is (s, B, in_features), as many tokens on each rank; if not, the layer stands behind f,
            and x is (S, B, in_features), equal on every rank.

    Parameters start as rows of nn.Linear's, drawn whole from the default generator, which must be in the same state on
    every rank (torch.manual_seed). Their gradients are complete after backward.

    Raises: ValueError where out_features does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group = None,
        sequence_parallel: bool = True,
    ):
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        f, whole = _share(out_features, group, "out_features"), nn.Linear(in_features, out_features)
        self.weight = nn.Parameter(whole.weight.detach().split(f)[group_rank(group)].clone())
        self.bias = nn.Parameter(whole.bias.detach().split(f)[group_rank(group)].clone())

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, self.bias, self.group, self.sequence_parallel)


class SPRowParallelLinear(nn.Module):
    """nn.Linear with its inputs divided over `group`, before ḡ: y_SBf to (s, B, out_features), without sequence
    parallelism before f̄, to (S, B, out_features) on every rank.

    Arguments, first weights and errors are `SPColumnParallelLinear`'s, with in_features in place of out_features. The
    bias is whole on every rank; under sequence parallelism it gets a partial gradient, which
    `reduce_sequence_parallel_grads` sums.

    Raises: ValueError where in_features or S does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group = None,
        sequence_parallel: bool = True,
    ):
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        f, whole = _share(in_features, group, "in_features"), nn.Linear(in_features, out_features)
        self.weight = nn.Parameter(whole.weight.detach().split(f, dim=1)[group_rank(group)].clone())
        self.bias = whole.bias

    def forward(self, y_SBf: Tensor) -> Tensor:
        partial_z_SBH = F.linear(y_SBf, self.weight)
        z = sum_over_tp(partial_z_SBH, self.group, self.sequence_parallel)
        return z + self.bias.to(z.dtype)


# ── 2.4 Random streams: the flag turns one around ───────────────────────────────────────────────────────
#
# In tensor parallelism alone all ranks hold the same tensor between the regions, and must drop the same elements.
# Under sequence parallelism they hold different tokens there, and must drop different ones: with a common stream the
# mask would repeat every s tokens, on and on, and no number would look wrong. So the flag that divides the tokens
# changes the stream as well. Inside a region each rank has its own heads, and its own stream, either way.


def random_streams(
    seed: int, rank: int = 0, sequence_parallel: bool = True, device: torch.device | str = "cpu"
) -> RandomStreams:
    """Dropout's generators for rank `rank` of a tensor-parallel group, at the start of a run.

    seed: any integer, the same on all ranks of the group; replicas take different ones. device: where dropout works.
    Source: Megatron-LM.
    """

    def stream(
        *key,
    ):  # a 32-bit seed from all of the key: PyTorch's CPU generator looks at 32 bits and no more
        return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))

    inside = stream(seed, rank)
    return RandomStreams(outside=inside if sequence_parallel else stream(seed), inside=inside)


# ── 2.5 Core attention: where 5·a·s²·b bytes come from, and how they go ─────────────────────────────────
#
# "Core" is what stands between the two linear layers: products of queries and keys, softmax, dropout, product with the
# values. It is local to a pair of a sequence and a head, so pairs are one dimension, p = B·n: in the layout S B n D the
# two lie side by side in memory, and their joining is a view; from B S n D it would be a copy. Backward needs, of s × s
# numbers for each pair,
#
#     the softmax' output        2 bytes     for its own backward
#     the dropout's mask         1 byte
#     the dropout's output       2 bytes     for the product with the values
#
# 5 bytes in all, a·s² times for each sequence. Three details keep it at that. The causal mask is *added*, as −∞:
# masked_fill would keep a boolean mask. Mask and scaling are done by the product itself (baddbmm), so there is no
# scaled copy of the queries. And the softmax is asked for narrow numbers: inside, it computes in fp32 all the same,
# and would only hand out twice the bytes. (Under autocast PyTorch widens it, and 2 bytes become 4.) What each detail is
# worth: tests/test_04_seq_parallel.py::test_core_attention_written_carelessly.
#
# What came later: FlashAttention's kernel never stores an s × s tensor. It keeps its output and one number for each
# query, the logarithm of the softmax' denominator, and computes the weights again in backward, block by block. That
# *is* selective recomputation, moved into the kernel: with it the term 5·a·s²·b disappears by itself, and recomputing
# core attention around it would only do the work twice. Selective recomputation still pays where such a kernel is not
# to be had (biases and masks of one's own, scores that are looked at), and the same question, which tensors are large
# and cheap to compute again, is asked today of norms, gelu and the routers of experts.


def unfused_attention(
    q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, p: float = 0.0, generator=None
) -> Tensor:
    """Causal attention of each pair by itself, written out as the paper counts it: (p, S, D) three times to (p, S, D).

    p: dropout on the attention weights, drawn from `generator`, which is on their device.
    Source: section 4.1 of the paper.
    """
    S, D = q_pSD.shape[-2:]
    future_SS = torch.full((S, S), -torch.inf, dtype=q_pSD.dtype, device=q_pSD.device).triu(1)
    scores_pSS = torch.baddbmm(future_SS, q_pSD, k_pSD.mT, alpha=1 / math.sqrt(D))
    weights_pSS = scores_pSS.softmax(-1)
    dropped_pSS = dropout(weights_pSS, p, generator)
    return dropped_pSS @ v_pSD


def fused_attention(
    q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, p: float = 0.0, generator=None
) -> Tensor:
    """The same in one kernel that keeps no S × S tensor: (p, S, D) three times to (p, S, D).

    Raises: ValueError for dropout, which the kernel draws its own way. Source: FlashAttention, arXiv 2205.14135.
    """
    if p:
        raise ValueError(
            f"dropout={p}: the fused kernel takes no generator of ours; use unfused_attention or dropout=0"
        )
    pairs = (
        x_pSD[None] for x_pSD in (q_pSD, k_pSD, v_pSD)
    )  # as one sequence of p heads: its output is then a view
    return F.scaled_dot_product_attention(*pairs, is_causal=True)[0]


# ── 2.6 Recomputation ───────────────────────────────────────────────────────────────────────────────────
#
# PyTorch's `checkpoint` keeps a function's inputs, forgets what the function kept, and runs it again when backward asks
# for the first forgotten tensor. It stops early: once the last forgotten tensor has been made again there is no reason
# to go on. (A forgotten tensor is one that an operator asked to keep. Core attention's last operator is the product
# with the values, which keeps its two inputs: they are there before it runs, so it does not run again.) Hence
#
#     selective   runs again: queries · keys, softmax, dropout     not again: · values
#     full        runs again: the whole layer, its collectives included, if dropout keeps a mask at its very end;
#                 without dropout it stops before the last product, and so before the last reduce-scatter
#
# Random numbers must be the same again, or the gradient belongs to another function than the loss does: and no error
# says so. `checkpoint` takes care of PyTorch's default generator and of no other. Ours are put back to where they
# were for the second run, and afterwards to where they are by then: left where the second run ends, the next forward
# would draw this one's masks once more.


class _Replay:
    """`with` this, generators stand where they stood when it was made; after it, where they stood before."""

    def __init__(self, generators):
        self.generators = [generator for generator in generators if generator is not None]
        self.then = [generator.get_state() for generator in self.generators]

    def __enter__(self):
        self.now = [generator.get_state() for generator in self.generators]
        self._set(self.then)

    def __exit__(self, *error):  # also when the second run stops early, which it does by raising
        self._set(self.now)

    def _set(self, states):
        for generator, state in zip(self.generators, states):
            generator.set_state(state)


@torch.compiler.disable  # it could not be compiled with generators of our own: what runs twice stays as it is
def recompute(function: Callable, *args, generators=()):
    """function(*args), whatever it returns; autograd keeps the arguments alone and computes the rest again in backward.

    function: must compute the same when called again, and is called again on all ranks or on none if it communicates.
    generators: all that it draws from, besides PyTorch's default one; None among them is skipped.
    Source: section 5 of the paper.
    """

    def contexts():
        return contextlib.nullcontext(), _Replay(generators)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


# ── 2.7 The layer ───────────────────────────────────────────────────────────────────────────────────────
#
# Attention, feed-forward and `Block` are chapter 2's, with the doors of this one. Inside a region are all S tokens, of
# n heads or f features; between regions s tokens, of all H features.


class ParallelAttention(nn.Module):
    """Self-attention with its heads divided over `group`: x_sBH to (s, B, H), without sequence parallelism S for s.

    core: `unfused_attention`, `fused_attention`, or another function of their arguments. recompute_core: compute it
    again in backward.

    Raises: ValueError where the heads do not divide over the ranks.
    Source: sections 4.2.2 and 5 of the paper.
    """

    def __init__(
        self,
        config: GPTConfig,
        group: Group,
        sequence_parallel: bool,
        recompute_core: bool,
        core: Callable,
    ):
        super().__init__()
        _share(config.num_heads, group, "num_heads")
        self.config, self.core, self.recompute_core = config, core, recompute_core
        self.qkv = SPColumnParallelLinear(
            config.hidden_size, 3 * config.hidden_size, group, sequence_parallel
        )
        self.out = SPRowParallelLinear(
            config.hidden_size, config.hidden_size, group, sequence_parallel
        )

    def forward(self, x_sBH: Tensor, streams: RandomStreams) -> Tensor:
        heads, B = dict(three=3, D=self.config.head_size), x_sBH.shape[1]
        q_pSD, k_pSD, v_pSD = rearrange(
            self.qkv(x_sBH), "S B (n three D) -> three (B n) S D", **heads
        )
        args = q_pSD, k_pSD, v_pSD, self.config.dropout if self.training else 0.0, streams.inside
        if self.recompute_core:
            y_pSD = recompute(self.core, *args, generators=[streams.inside])
        else:
            y_pSD = self.core(*args)
        return self.out(rearrange(y_pSD, "(B n) S D -> S B (n D)", B=B))


class ParallelMLP(nn.Module):
    """The feed-forward layer with its features divided over `group`: x_sBH to (s, B, H), or S for s.

    Source: section 4.2.2 of the paper.
    """

    def __init__(self, config: GPTConfig, group: Group, sequence_parallel: bool):
        super().__init__()
        self.up = SPColumnParallelLinear(
            config.hidden_size, config.ffn_hidden_size, group, sequence_parallel
        )
        self.down = SPRowParallelLinear(
            config.ffn_hidden_size, config.hidden_size, group, sequence_parallel
        )

    def forward(self, x_sBH: Tensor, streams: RandomStreams) -> Tensor:
        y_SBf = F.gelu(self.up(x_sBH), approximate="tanh")
        return self.down(y_SBf)


RECOMPUTE = ("none", "selective", "full")


class SequenceParallelLayer(Block):
    """The plain `TransformerLayer` under tensor and sequence parallelism: x_sBH to (s, B, H).

    Args:
        sequence_parallel: False is tensor parallelism alone, and x_SBH to (S, B, H), the same on every rank.
        recompute: "none", "selective" (core attention alone) or "full" (the whole layer).
        core: the function between the attention layer's two products, see `ParallelAttention`.
        group: the tensor-parallel group; None is all ranks.

    Streams are `random_streams(..., sequence_parallel)`. After backward, and only under sequence parallelism, call
    `reduce_sequence_parallel_grads`. Parameters have the plain layer's names, and start from the default generator,
    which must be in the same state on every rank. Dropout is on in train mode, as everywhere.

    Raises: ValueError where heads, features or tokens do not divide over the ranks, for another `recompute`, and for
    dropout on several ranks without streams.
    Source: sections 4.2.2 and 5 of the paper.
    """

    def __init__(
        self, config: GPTConfig, group: Group = None, sequence_parallel: bool = True, recompute: str = "none",
        core: Callable = unfused_attention,
    ):  # fmt: skip
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r}: choose from {', '.join(RECOMPUTE)}")
        attention = ParallelAttention(
            config, group, sequence_parallel, recompute == "selective", core
        )
        super().__init__(config, attention, ParallelMLP(config, group, sequence_parallel))
        self.group, self.recompute = group, recompute

    def forward(self, x_sBH: Tensor, streams: RandomStreams | None = None) -> Tensor:
        streams, t = streams or RandomStreams(), group_size(self.group)
        p = self.config.dropout if self.training else 0.0
        if p and t > 1 and None in (streams.inside, streams.outside):
            raise ValueError(
                f"dropout={p} on {t} ranks needs streams=random_streams(seed, rank, sequence_parallel)"
            )
        if self.recompute == "full":
            return recompute(
                super().forward, x_sBH, streams, generators=[streams.outside, streams.inside]
            )
        return super().forward(x_sBH, streams)


# ── 2.8 What autograd keeps, counted ────────────────────────────────────────────────────────────────────
#
# Is it 34/t? Every tensor that an operator keeps for backward passes through a hook, if one is set. Several operators
# keep views of the same memory (queries, keys and values lie in one tensor), so memory is counted and not tensors; and
# weights are kept too, but were there anyway. With each goes the line of this file that made it be kept: the table at
# the head of this part, measured.
#
# To compare with the paper the weights themselves are bf16. Under autocast the hook would see the narrow copies of the
# weights as well, which are no weights to it.

Kept = namedtuple("Kept", "bytes shape dtype line")


def saved_bytes(run: Callable, parameters: Iterable[Tensor] = ()) -> list[Kept]:
    """Calls run() and lists what autograd keeps of it for backward, each piece of memory once, in order.

    parameters: tensors of any shape, not to be counted. Kept.bytes is of the whole memory, also where a part of it is
    kept; Kept.line the line of this file that caused it. What a Function stores on its ctx itself is not seen. Works
    with fake tensors. Source: ours.
    """
    here, wrappers = (
        saved_bytes.__code__.co_filename,
        ("pack", "dropout", "column_parallel"),
    )  # their callers say more
    known, kept, held = (
        {p.untyped_storage()._cdata for p in parameters},
        [],
        [],
    )  # a fake tensor has no data_ptr()

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in known:
            known.add(x.untyped_storage()._cdata)
            held.append(x)  # so that its address is not used again
            frames = [
                f
                for f in traceback.extract_stack()
                if f.filename == here and f.name not in wrappers
            ]
            kept.append(
                Kept(x.untyped_storage().nbytes(), tuple(x.shape), x.dtype, frames[-1].line)
            )
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return kept


# ── 2.9 The ends of the network, and the model ──────────────────────────────────────────────────────────
#
# Embedding: each rank looks up its own words, for all tokens, and leaves zeros for the others; the sum over ranks goes
# straight into ḡ, and each rank has its own tokens. (All-reduce and then a cut would send twice as much.) Positions are
# added behind it, each rank its own tokens'.
#
# Head: the final norm still on s tokens, and then g and a product with this rank's words, which is column-parallel
# like any other. The loss sees all tokens, and this rank's words: it is chapter 2's, whole on every rank, and nobody
# divides it by t.


# region carried: vocabulary loss (home: 02_megatron_tp)
class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BSv, targets_BS, vocab_size, group):
        v = logits_BSv.shape[-1]
        first_padding = max(0, vocab_size - group_rank(group) * v)
        upcast = torch.promote_types(logits_BSv.dtype, torch.float32)
        x_BSv = logits_BSv.to(upcast, copy=True)  # the caller's logits are not modified
        x_BSv[..., first_padding:] = -torch.inf
        max_BS = _all_reduce(x_BSv.amax(dim=-1), group, dist.ReduceOp.MAX)
        x_BSv -= max_BS[..., None]
        # A target on another rank contributes 0. torch.where, and not x · mask:
        # 0 · (−inf) is NaN.
        row_BS, is_local_BS = _local_rows(targets_BS, v, group)
        row_BS1 = row_BS[..., None]
        partial_target_BS = torch.where(is_local_BS, x_BSv.gather(-1, row_BS1)[..., 0], 0)
        exp_BSv = x_BSv.exp_()
        partial_2BS = torch.stack([partial_target_BS, exp_BSv.sum(dim=-1)])
        target_BS, sum_BS = _all_reduce(partial_2BS, group)
        if ctx.needs_input_grad[0]:
            softmax_BSv = exp_BSv.div_(sum_BS[..., None])
            ctx.save_for_backward(softmax_BSv, row_BS1, is_local_BS)
        return sum_BS.log() - target_BS

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BS):
        softmax_BSv, row_BS1, is_local_BS = ctx.saved_tensors
        grad_BSv = softmax_BSv * grad_BS[..., None]
        grad_BSv.scatter_add_(-1, row_BS1, -(grad_BS * is_local_BS)[..., None])
        return grad_BSv, None, None, None


def vocab_parallel_cross_entropy(
    logits_BSv: Tensor,
    targets_BS: Tensor,
    group: Group = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Per-token cross entropy from logits whose vocabulary is sharded over `group`.

    Args:
        logits_BSv: this rank's shard; rank r holds token ids [r·v, (r + 1)·v). Not modified.
        targets_BS: int64 token ids in [0, vocab_size), or `ignore_index`; replicated.
        group: the tensor-parallel group; None is all ranks.
        vocab_size: number of vocabulary entries; columns from there on are padding. None: no
            column is padding.

    Returns: loss_BS in nats, replicated, at least fp32; 0 where the target is `ignore_index`.
    Memory: backward keeps the softmax, 4 bytes per logit, also for bf16 logits.
    Raises: ValueError where the shapes disagree, vocab_size does not fit, or a target is out of
        range; on a GPU the loss of such a target is NaN.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """
    columns = logits_BSv.shape[-1] * group_size(group)
    if vocab_size is None:
        vocab_size = columns
    if logits_BSv.shape[:-1] != targets_BS.shape:
        shapes = f"logits {tuple(logits_BSv.shape)} and targets {tuple(targets_BS.shape)}"
        raise ValueError(f"{shapes}: all dimensions but the last must agree")
    if not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size}, but the group holds {columns} columns")
    is_id_BS = _is_id(targets_BS, vocab_size, ignore_index)
    loss_BS = _VocabParallelCrossEntropy.apply(logits_BSv, targets_BS, vocab_size, group)
    # where(), and not a product: 0 · ∞ would be NaN at an ignored position.
    loss_BS = torch.where(targets_BS != ignore_index, loss_BS, 0)
    return torch.where(is_id_BS, loss_BS, torch.nan)


# endregion copy 11a94b
# region carried: vocabulary shards (home: 02_megatron_tp)
def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """vocab_size rounded up to a multiple of multiple · tp. Source: the paper, section 5.1."""
    return math.ceil(vocab_size / (multiple * tp)) * multiple * tp


def _local_rows(ids_BS: Tensor, v: int, group: Group) -> tuple[Tensor, Tensor]:
    """Rows of token ids in this rank's shard, and which ids are local."""
    row_BS = ids_BS - group_rank(group) * v
    return row_BS.clamp(0, v - 1), (row_BS >= 0) & (row_BS < v)


def _is_id(ids_BS: Tensor, vocab_size: int, ignore_index: int | None = None) -> Tensor:
    """Which ids are in range. Others are local to no rank, and would silently become zeros.

    On the CPU they raise ValueError. On a GPU that would stall the CPU: the caller puts NaN.
    """
    is_id_BS = (ids_BS >= 0) & (ids_BS < vocab_size)
    if ignore_index is not None:
        is_id_BS |= ids_BS == ignore_index
    if _has_values(ids_BS) and not is_id_BS.all():
        allowed = "" if ignore_index is None else f", and not ignore_index={ignore_index}"
        raise ValueError(f"token id {ids_BS[~is_id_BS][0]} is not in [0, {vocab_size}){allowed}")
    return is_id_BS


# endregion copy 6bca7f


def look_up(tokens_SB: Tensor, weight_vH: Tensor, vocab_size: int, group: Group = None) -> Tensor:
    """This rank's words' rows and zeros for the others: a summand of the embedding, (S, B, H).

    tokens_SB: int64, the same on every rank. weight_vH: the rows of words [rank·v, (rank + 1)·v).

    Raises: ValueError for a token outside the vocabulary (looked at on the CPU only).
    Source: Megatron-LM.
    """
    if _has_values(tokens_SB) and ((tokens_SB < 0) | (tokens_SB >= vocab_size)).any():
        found = f"tokens from {tokens_SB.min()} to {tokens_SB.max()}"
        raise ValueError(f"{found}, but words are numbered 0 to {vocab_size - 1}")
    v = weight_vH.shape[0]
    index_SB = tokens_SB - group_rank(group) * v
    mine_SB = (index_SB >= 0) & (index_SB < v)
    return torch.where(mine_SB[..., None], F.embedding(index_SB.clamp(0, v - 1), weight_vH), 0)


class SequenceParallelGPT(nn.Module):
    """The plain `GPT` under tensor and sequence parallelism: tokens_BS to this rank's logits (S, B, v).

    Arguments as `SequenceParallelLayer`'s. Its weights are those that GPT(config) has, whatever the number of ranks;
    the head is tied. tokens_BS: int64, the same on every rank, of a length that the ranks divide.

    Raises: ValueError where heads, features or tokens do not divide over the ranks, for a head of its own, for a
    sequence longer than the positions, and for dropout on several ranks without streams.
    Source: section 4.3 of the paper.
    """

    def __init__(
        self, config: GPTConfig, group: Group = None, sequence_parallel: bool = True, recompute: str = "none",
        core: Callable = unfused_attention,
    ):  # fmt: skip
        super().__init__()
        self.config, self.group, self.sequence_parallel = config, group, sequence_parallel
        rank, t = group_rank(group), group_size(group)
        check_tp(config, t)
        if not config.tied_head:
            raise ValueError(
                "tied_head=False: this model's last layer multiplies with the embedding table"
            )
        options = group, sequence_parallel, recompute, core
        with torch.device("meta"):  # shapes first, without memory
            words = padded_vocab_size(config.vocab_size, t, config.vocab_multiple) // t
            self.embedding = nn.Embedding(words, config.hidden_size)
            self.positions = nn.Embedding(config.seq_length, config.hidden_size)
            self.layers = nn.ModuleList(
                SequenceParallelLayer(config, *options) for _ in range(config.num_layers)
            )
            self.final_norm = nn.LayerNorm(config.hidden_size)
        shares = {
            name: shard_tensor(name, whole, config, rank, t)
            for name, whole in initial_weights(config)
        }
        self.load_state_dict(shares, assign=True)  # puts them in the place of the shapes

    def forward(self, tokens_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        S, p, streams = (
            tokens_BS.shape[1],
            self.config.dropout if self.training else 0.0,
            streams or RandomStreams(),
        )
        if S > self.config.seq_length:
            raise ValueError(
                f"a sequence of {S} tokens, but the model has {self.config.seq_length} positions"
            )
        partial_x_SBH = look_up(
            tokens_BS.T, self.embedding.weight, self.config.vocab_size, self.group
        )
        x_sBH = sum_over_tp(partial_x_SBH, self.group, self.sequence_parallel)
        first = group_rank(self.group) * x_sBH.shape[0] if self.sequence_parallel else 0
        positions_sH = self.positions.weight[first : first + x_sBH.shape[0]]
        x_sBH = dropout(x_sBH + positions_sH[:, None], p, streams.outside)
        for layer in self.layers:
            x_sBH = layer(x_sBH, streams)
        x_sBH = self.final_norm(x_sBH)
        return column_parallel(
            x_sBH, self.embedding.weight, None, self.group, self.sequence_parallel
        )

    def loss(
        self, tokens_BS: Tensor, targets_BS: Tensor, streams: RandomStreams | None = None
    ) -> Tensor:
        """Cross entropy of each token in nats, (B, S), the same on every rank; 0 where the target is −100."""
        logits_SBv = self(tokens_BS, streams)
        return vocab_parallel_cross_entropy(
            logits_SBv, targets_BS.T, self.group, self.config.vocab_size
        ).T


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# Sequence parallelism divides activations and no weight, so this is chapter 2's part 3: one table says how each
# parameter is cut. What is not in it is whole on every rank: norms, positions, biases of row-parallel layers.

# region carried: tensor-parallel weights (home: 02_megatron_tp)
SHARD_DIM = {
    "embedding.weight": 0,  # by vocabulary entries
    "qkv.weight": 0,  # by heads: the outputs of the column-parallel matrix
    "qkv.bias": 0,
    "out.weight": 1,  # by heads: the inputs of the row-parallel matrix
    "up.weight": 0,  # by features
    "up.bias": 0,
    "down.weight": 1,
}


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is sharded, or None."""
    module_and_kind = name.split(".")[-2:]  # of "layers.0.attention.qkv.weight" the last two
    return SHARD_DIM.get(".".join(module_and_kind))


def check_tp(config: GPTConfig, tp: int) -> None:
    """Raises ValueError where heads or feed-forward features do not divide over `tp` ranks."""
    largest = math.gcd(config.num_heads, config.ffn_hidden_size)
    if largest % tp:
        possible = [n for n in range(1, largest + 1) if largest % n == 0]
        have = f"num_heads={config.num_heads} and ffn_hidden_size={config.ffn_hidden_size}"
        raise ValueError(f"{have} do not divide over tp={tp} ranks: choose tp from {possible}")


def shard_tensor(name: str, full: Tensor, config: GPTConfig, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of the plain model's parameter `name`, a copy."""
    dim = shard_dim(name)
    if dim is None:
        return full.clone()
    if name.endswith("embedding.weight"):
        rows = padded_vocab_size(config.vocab_size, tp, config.vocab_multiple)
        full = F.pad(full, (0, 0, 0, rows - config.vocab_size))
    return full.chunk(tp, dim)[rank].clone(memory_format=torch.contiguous_format)


def shard_state_dict(full: StateDict, config: GPTConfig, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of tensor-parallel rank `rank`; copies.

    Raises: ValueError that names what is missing, unknown, of another shape, or does not divide.
    """
    check_tp(config, tp)
    expected = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    wrong = expected.items() ^ {name: tuple(x.shape) for name, x in full.items()}.items()
    if wrong:
        raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")
    return {name: shard_tensor(name, x, config, rank, tp) for name, x in full.items()}


def merge_state_dicts(shards: list[StateDict], config: GPTConfig) -> StateDict:
    """All ranks' state dicts, in order of rank, to the plain model's: undoes `shard_state_dict`.

    Args: shards have the same names; some of the model's are enough; gradients work as well.
    Raises: ValueError where replicated tensors differ between ranks.
    """
    full = {}
    for name, first in shards[0].items():
        tensors = [shard[name] for shard in shards]
        if shard_dim(name) is None:
            full[name] = first.clone()
            for rank, x in enumerate(tensors):
                if not torch.allclose(x, first, rtol=0, atol=0, equal_nan=True):
                    gap = f"rank {rank} differs from rank 0 by {(x - first).abs().max():.1e}"
                    raise ValueError(f"{name} should be replicated, but {gap}")
        else:
            full[name] = torch.cat(tensors, shard_dim(name))
        if name.endswith("embedding.weight"):
            full[name] = full[name][: config.vocab_size].clone()
    return full


# endregion copy b78d30

# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# A parameter that every rank holds whole meets, under sequence parallelism, only this rank's tokens. So its gradient
# is a summand: norms, positions and the biases of row-parallel layers must be summed over the group, once a step,
# before the norm is taken and anything is clipped. Three ways to get it wrong, all of which train:
#
#     no sum at all          the copies of one parameter drift apart from the first step on
#     a mean                 Adam hardly shows it, because it divides a constant factor out again
#     a sum without the flag every rank has the whole gradient already: it comes out t times too large
#
# (A fourth, to clip first, makes each rank find another norm and scale by another number.) A parameter that is divided
# needs nothing: behind g its rank has seen all tokens.


def reduce_sequence_parallel_grads(module: nn.Module, group: Group = None) -> None:
    """Sums over `group` the gradients of what each rank holds whole, in one message; for sequence parallelism only.

    module: a `SequenceParallelLayer`, a `SequenceParallelGPT`, or another whose divided parameters `SHARD_DIM` names: a
    name that is not there counts as whole. group: the tensor-parallel group that `module` has; None is all ranks.
    Every rank must call it, once after all backward passes of a step, before clipping, and must have gradients of the
    same parameters. Source: Megatron-LM.
    """
    whole = [p for name, p in module.named_parameters() if shard_dim(name) is None]
    grads = [p.grad for p in whole if p.grad is not None]
    if group_size(group) > 1 and grads:
        flat = _all_reduce(torch.cat([grad.flatten() for grad in grads]), group)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad))


# Clipping, from chapter 2: shares' squares are summed over the group, what is whole counts once.
# region carried: clipping (home: 02_megatron_tp)
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, *, sharded: Parameters = (), group: Group = None
) -> Tensor:
    """Scales all gradients so that their norm over `group` is at most max_norm.

    Args: parameters: all of this rank's. sharded: those of which each rank of `group` holds other
        elements; all others are replicated. Empty on every rank or on none: without `sharded`
        nothing is communicated.
    Returns: the norm before clipping, a scalar tensor, at least fp32, the same on every rank; not
        finite where a gradient is not.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    device = parameters[0].device if parameters else None
    parameters = [p for p in parameters if p.grad is not None]
    sharded_ids = {id(p) for p in sharded}  # by identity: == compares elements
    squares = {True: [torch.zeros((), device=device)], False: [torch.zeros((), device=device)]}
    for p in parameters:
        # In at least fp32: PyTorch's own norm has the precision of the gradients.
        dtype = torch.promote_types(p.grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(p.grad, dtype=dtype)
        squares[id(p) in sharded_ids].append(norm.square())
    square = torch.stack(squares[True]).sum()
    if sharded_ids:
        _all_reduce(square, group)
    norm = (square + torch.stack(squares[False]).sum()).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# endregion copy bb8e72


def train_step(
    model: SequenceParallelGPT, optimizer: torch.optim.Optimizer, tokens_BS: Tensor, targets_BS: Tensor,
    streams: RandomStreams | None = None, max_norm: float = 1.0, autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One optimiser step; every rank of the group must call it with the same tokens.

    Args: tokens_BS, targets_BS: int64; −100 marks a target that does not count. autocast: the dtype of products (bf16
    on GPUs), None for the parameters' own.
    Returns: two scalars, the mean loss per token and the gradient's norm before clipping, the same on every rank.
    """
    optimizer.zero_grad()
    with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
        loss = model.loss(tokens_BS, targets_BS, streams).sum() / (targets_BS != -100).sum().clamp(
            min=1
        )
    loss.backward()
    if model.sequence_parallel:
        reduce_sequence_parallel_grads(model, model.group)
    sharded = [p for name, p in model.named_parameters() if shard_dim(name) is not None]
    norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=model.group)
    optimizer.step()
    return loss.detach(), norm


def train(
    model: SequenceParallelGPT, batches: Batches, lr: Callable[[int], float],
    streams: RandomStreams | None = None, max_norm: float = 1.0, autocast: torch.dtype | None = None,
):  # fmt: skip
    """`train_alone` on all ranks of the model's group: the same arguments, losses and norms."""
    optimizer = make_optimizer(model)
    for step, (tokens_BS, targets_BS) in enumerate(batches):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        yield train_step(model, optimizer, tokens_BS, targets_BS, streams, max_norm, autocast)


# ── 5 The paper's arithmetic ────────────────────────────────────────────────────────────────────────────
#
# ── 5.1 Memory ──────────────────────────────────────────────────────────────────────────────────────────
#
# The last line of part 2's table, and its row "core", are the paper's table 2. A whole model is more than layers times
# that: a pipeline's first stage has several micro-batches on their way, and the ends of the network keep something too.
#
# The paper's text is rounder than its formulas. Sequence parallelism and selective recomputation are each said to halve
# what tensor parallelism keeps, nearly: for its four models the first leaves 58 to 67 %, the second 49 to 62 %. Both
# together are said to leave under 20 %, and full recomputation 10 %: it is 16 to 20.2 %, and 7.6 to 9.5 %.


def activation_bytes(
    config: GPTConfig, tp: int, sequence_parallel: bool, recompute: str, batch: int = 1
) -> float:
    """Bytes that one of `tp` ranks keeps of a layer for `batch` sequences: bf16, 1-byte masks, F = 4·H, with dropout.

    Full recomputation keeps the layer's input: 2·s·b·h, which is a share of it under sequence parallelism.
    Source: table 2 of the paper.
    """
    s, h, a, divided = (
        config.seq_length,
        config.hidden_size,
        config.num_heads,
        tp if sequence_parallel else 1,
    )
    if recompute == "full":
        return 2 * s * batch * h / divided
    core = 5 * a * s / h if recompute == "none" else 0
    return s * batch * h * (10 / divided + (24 + core) / tp)


# Table 3 and table 5: sequences of 2,048 tokens, 51,200 words, no data parallelism; t tensor-parallel ranks, p pipeline
# stages in m interleaved pieces each; seconds of an iteration with full recomputation, and with what this chapter does.
Published = namedtuple(
    "Published", "a h L t p m gpus batch micro_batch seconds_full seconds mfu hfu"
)
PAPER_MODELS = {
    "22B": Published(64, 6144, 48, 8, 1, 1, 8, 4, 4, 1.42, 1.10, 41.5, 43.7),
    "175B": Published(96, 12288, 96, 8, 8, 3, 64, 64, 1, 18.13, 13.75, 51.4, 52.8),
    "530B": Published(128, 20480, 105, 8, 35, 3, 280, 280, 1, 49.05, 37.83, 56.0, 57.0),
    "1T": Published(160, 25600, 128, 8, 64, 1, 512, 512, 1, 94.42, 71.49, 56.3, 57.0),
}
SEQUENCE, WORDS = 2048, 51_200


def published_config(model: Published) -> GPTConfig:
    """A published model's sizes. Source: table 3 of the paper."""
    return GPTConfig(WORDS, SEQUENCE, model.h, model.L, model.a, dropout=0.1)


def first_stage_bytes(model: Published, sequence_parallel: bool, recompute: str) -> float:
    """Layers' activations on a GPU of the first pipeline stage, which holds the most.

    It has L/p layers, and p micro-batches on their way: as much as all L layers of one micro-batch. Interleaving starts
    some more, a factor 1 + (p − 1)/(p·m). Source: section 4.2.3 of the paper.
    """
    one = activation_bytes(
        published_config(model), model.t, sequence_parallel, recompute, model.micro_batch
    )
    return one * model.L * (1 + (model.p - 1) / (model.p * model.m) if model.m > 1 else 1)


def extra_bytes(model: Published) -> float:
    """What the ends of the network add under sequence parallelism: the masks behind the embedding, and, where one stage
    is both first and last, the final norm's and the head's inputs and fp32 logits. Source: section 4.3 of the paper.

    The paper says that for 22B they are less than 0.01 % of the whole; its formula gives 0.57 %.
    """
    sbh = SEQUENCE * model.micro_batch * model.h
    return sbh / model.t * (model.p + (4 * (1 + WORDS / model.h) if model.p == 1 else 0))


def stage_output_bytes(model: Published) -> float:
    """Freed on the first stage, if each micro-batch's output is dropped once it was sent: 2·s·b·h·p.

    The paper's 2.73 GB for 530B are this in GiB (and its text writes s·b·h·p). Source: the paper's appendix.
    """
    return 2 * SEQUENCE * model.micro_batch * model.h * model.p


# ── 5.2 Arithmetic operations ───────────────────────────────────────────────────────────────────────────
#
# A layer's products are 24·s·h² + 4·s²·h operations for a sequence, forward, and twice that backward. *Model* FLOPs are
# those that the mathematics asks for; *hardware* FLOPs are all that were done, recomputation included; divided by what
# the GPUs could have done in the time (312 TFLOP/s each), they are MFU and HFU.
#
# One thing does not add up. Of a layer's 72·s·h² + 12·s²·h, core attention's two products, once more, are 4·s²·h: so
# where model FLOPs have the term s/(6h), hardware FLOPs should have s/(6h) + s/(18h) = 2s/(9h). The paper's equation 8
# has s/(3h), which is all of core attention once more, its backward included, and adds three times too much. (An author
# confirms it: https://github.com/NVIDIA/Megatron-LM/issues/523.) So the paper's HFU are 0.5 to 1.4 points too high:
# 175B has 51.8 % in place of 52.8 %. And the 7 % of time that selective recomputation adds to a layer of 22B cannot be
# its 1.7 % of operations: softmax and dropout are done again as well, which wait for memory. `hardware_flops` is the
# equation as printed, because its table is to be reproduced; `recomputed_flops` is what is done.


def model_flops(batch: int, s: int, h: int, layers: int, vocab: int) -> float:
    """Of one iteration over `batch` sequences. Source: equation 7 of the paper."""
    return 72 * batch * layers * s * h**2 * (1 + s / (6 * h) + vocab / (12 * h * layers))


def hardware_flops(batch: int, s: int, h: int, layers: int, vocab: int) -> float:
    """With selective recomputation, as the paper prints it: see above. Source: equation 8 of the paper."""
    return 72 * batch * layers * s * h**2 * (1 + s / (3 * h) + vocab / (12 * h * layers))


def recomputed_flops(batch: int, s: int, h: int, layers: int, products: int = 2) -> float:
    """What selective recomputation adds: `products` of core attention's two, 2·s²·h each; 1 if it stops early.

    Source: ours, see above.
    """
    return products * 2 * batch * layers * s**2 * h


def utilization(flops: float, seconds: float, gpus: int, peak: float = 312e12) -> float:
    """The share of what `gpus` GPUs could have done in the time. Source: section 6 of the paper."""
    return flops / (seconds * gpus * peak)


# ── 5.3 The paper's sizes, on a laptop ──────────────────────────────────────────────────────────────────
#
# PyTorch's fake process group answers every collective at once; its fake tensors have shapes and no values. So one
# rank's layer of a model for 512 GPUs runs through this same code in seconds, without memory, and can be counted: bytes
# kept, messages, bytes on the wire, operations. (Only numbers cannot be had, nor time.)

LayerCost = namedtuple(
    "LayerCost", "sequence_parallel recompute formula kept saved messages wire flops"
)


def wire_bytes(messages: Iterable[Message], t: int) -> float:
    """What a rank sends in a ring: (t − 1)/t of a message; an all-reduce is two of them. Source: ours."""
    return sum(m.bytes * (2 if m.op == "all_reduce" else 1) * (t - 1) / t for m in messages)


def layer_costs(
    config: GPTConfig, batch: int, group: Group = None, device: torch.device | str = "cpu"
) -> list[LayerCost]:
    """One layer in bf16, forward and backward, in all six modes, on every rank of `group`, which all must call it.

    formula and kept are bytes, the latter measured, and listed in saved as `Kept`; messages, wire (bytes) and flops are
    this rank's, forward and backward together. Source: ours.
    """
    costs, t = [], group_size(group)
    for sequence_parallel, kind in itertools.product((False, True), RECOMPUTE):
        layer = SequenceParallelLayer(config, group, sequence_parallel, kind)
        narrow = {name: x.to(device, torch.bfloat16) for name, x in layer.state_dict().items()}
        layer.load_state_dict(narrow, assign=True)  # layer.to(...) does not know fake tensors
        tokens = config.seq_length // (t if sequence_parallel else 1)
        x = torch.randn(
            tokens,
            batch,
            config.hidden_size,
            device=device,
            dtype=torch.bfloat16,
            requires_grad=True,
        )
        streams = random_streams(config.seed, group_rank(group), sequence_parallel, device)
        saved = saved_bytes(partial(layer, x, streams), layer.parameters())
        with Counter() as counter, FlopCounterMode(display=False) as flops:
            layer(x, streams).sum().backward()
        formula, kept = (
            activation_bytes(config, t, sequence_parallel, kind, batch),
            sum(k.bytes for k in saved),
        )
        sent = counter.messages, wire_bytes(counter.messages, t)
        costs.append(
            LayerCost(sequence_parallel, kind, formula, kept, saved, *sent, flops.get_total_flops())
        )
    return costs


def paper_scale(name: str) -> list[LayerCost]:
    """`layer_costs` of a published model. Makes a process group, so it wants a process of its own.

    Source: ours.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  torch 2.9 learns there what collectives return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = PAPER_MODELS[name]
    dist.set_debug_level(
        dist.DebugLevel.OFF
    )  # torch's checks of each message would want a real store
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=model.t)
    with FakeTensorMode():
        costs = layer_costs(published_config(model), model.micro_batch)
    dist.destroy_process_group()
    return costs


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# What a layer keeps now grows with s and no longer with s², and all of it is divided. The arithmetic is not: attention
# still multiplies every token with every token, 4·s²·h operations a layer and sequence, and a model that writes still
# holds the keys and values of all tokens that it has seen. At long sequences both outgrow everything else.
# Chapter 5 replaces most attention layers by a state of fixed size.


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────

MODES = list(itertools.product((False, True), RECOMPUTE))


def mode_name(sequence_parallel: bool, recompute: str) -> str:
    return ("TP + SP" if sequence_parallel else "TP") + (
        "" if recompute == "none" else f" + {recompute}"
    )


def equivalence(
    device, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> Iterator[tuple[tuple, dict]]:
    """A small odd model in each mode beside the same on a single device: the mode, and every tensor's relative error.

    Errors are per tensor: max|Δ| / max|reference|; after AdamW over max(max|reference|, steps · lr).
    """
    t = group_size()
    config = GPTConfig(
        vocab_size=61, seq_length=4 * t, hidden_size=16 * t, num_layers=2, num_heads=2 * t
    )
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 3, 3 * t), generator=generator).to(device)
    targets_BS[0, t:] = -100
    batches, options = (
        [(tokens_BS, targets_BS)] * 5,
        dict(lr=lambda step: 1e-3, max_norm=0.1, autocast=autocast),
    )

    def trained(model: nn.Module, training: Callable) -> tuple[dict, dict, dict]:
        """Losses and norms of five steps, the gradients of the first one, the weights after the last one."""
        numbers, grads = {}, {}
        for step, (loss, norm) in enumerate(training(model.to(device, dtype), batches, **options)):
            numbers |= {f"loss {step}": loss, f"norm {step}": norm}
            grads = grads or {name: p.grad for name, p in model.named_parameters()}
        return numbers, grads, model.state_dict()

    def gaps(kind: str, here: dict, reference: dict, floor: float = 0.0) -> dict[str, float]:
        shards = [None] * t
        dist.all_gather_object(shards, {name: x.detach().cpu() for name, x in here.items()})
        return relative_errors(kind, merge_state_dicts(shards, config), reference, floor)

    expected, first_grads, weights = trained(GPT(config), train_alone)
    for mode in MODES:
        numbers, grads, weights_here = trained(SequenceParallelGPT(config, None, *mode), train)
        errors = {name: abs(x / expected[name] - 1).item() for name, x in numbers.items()}
        errors |= gaps("gradient of", grads, first_grads)
        if dtype == torch.float64:  # where a gradient is zero Adam divides rounding noise by itself
            errors |= gaps("after AdamW", weights_here, weights, floor=5 * 1e-3)
        yield mode, errors


# fp64 is the proof. The others are what rounding does to a right program: bf16's 8 bits are 0.4 % in each product.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def check(args: argparse.Namespace, device: torch.device) -> bool:
    """--check: every tensor's error in all modes, on the ranks, backend and dtype that are there."""
    good = True
    for mode, errors in equivalence(device, *dtypes(args)):
        say(f"{mode_name(*mode)}; tp {group_size()}, {args.dtype}\n")
        good = print_errors(errors, BOUNDS[args.dtype]) and good
        say()
    return good


def print_costs(costs: list[LayerCost], sbh: int) -> None:
    """The six modes beside each other; sbh is the number of elements of a whole x_SBH."""
    say(
        "mode                  kept, in s·b·h    formula  messages, forward + backward    sent by a rank    operations"
    )
    for cost in costs:
        names = [m.op.removesuffix("_base").replace("_", "-") for m in cost.messages]
        sent = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "none"
        say(f"{mode_name(cost.sequence_parallel, cost.recompute):24}{cost.kept / sbh:12.3f}"
            f"{cost.formula / sbh:11.3f}  {sent:31}{cost.wire / 2**20:9.2f} MiB"
            f"{cost.flops / costs[0].flops - 1:+14.1%}")  # fmt: skip


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


def demonstrate(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Trains on real text; returns each first step's difference in loss from the single device."""
    from tqdm import tqdm

    config, (dtype, autocast) = config_of(args), dtypes(args)
    data = TextData(args.data, args.seq_length)
    source = args.data or "Python's sources"

    def batches(steps: int) -> Batches:
        return (
            [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]
            for step in range(steps)
        )

    options = dict(lr=lambda step: args.lr * min(1.0, (step + 1) / 10), autocast=autocast)
    model = SequenceParallelGPT(config, None, args.sequence_parallel, args.recompute).to(
        device, dtype
    )
    streams = random_streams(args.seed, group_rank(), args.sequence_parallel, device)
    say(f"\ntraining with {mode_name(args.sequence_parallel, args.recompute)} on {source}")
    compared = (
        0 if args.dropout else min(5, args.steps)
    )  # with dropout the masks differ, and so must the losses
    alone = losses_alone(config, batches(compared), device, dtype=dtype, **options)
    say("step      loss    single device      norm")
    quiet = group_rank() > 0 or not sys.stderr.isatty()
    training = train(model, batches(args.steps), streams=streams, **options)
    differences = {}
    for step, results in enumerate(tqdm(training, total=args.steps, disable=quiet)):
        loss, norm = read_step(step, *results)
        other = ""
        if step < len(alone):
            other = f"{alone[step]:.6f}"
            differences[f"loss {step}"] = abs(loss - alone[step])
        if step < 5 or step % 20 == 19:
            say(f"{step:4}  {loss:.6f}  {other:>15}  {norm:8.3f}")
    return differences


def show_layer(t: int, device: torch.device) -> tuple[list[LayerCost], int]:
    """Prints what a small layer keeps and what the six modes cost; returns the costs, and the elements of its x_SBH."""
    S, H = multiple_above(64, t), multiple_above(128, 2 * t)
    config = GPTConfig(seq_length=S, hidden_size=H, num_heads=2 * t, dropout=0.1)
    costs, sbh = layer_costs(config, 2, None, device), 2 * S * H
    core = 5 * config.num_heads * S / H
    say(
        f"One layer, TP + SP on {t} ranks: what is kept, in units of s·b·h/t bytes, and the line that keeps it\n"
    )
    for kept in costs[3].saved:
        shape = " × ".join(map(str, kept.shape))
        say(f"{t * kept.bytes / sbh:8.3f}  {str(kept.dtype)[6:]:9} {shape:14}  {kept.line:.80}")
    terms = f"= 34 + 5·a·s/h, which is {core:g} here, and mean and deviation of each token (those ending in × 1)"
    say(f"{t * costs[3].kept / sbh:8.3f}  {terms}")
    fused = SequenceParallelLayer(dataclasses.replace(config, dropout=0.0), core=fused_attention)
    for layer, ranks, shape, what in (
        (
            fused,
            t,
            (S // t, 2, H),
            "with the fused kernel, which takes no dropout: 5·a·s/h is gone, and two masks",
        ),
        (
            TransformerLayer(config),
            1,
            (2, S, H),
            "by the plain layer on a single device: its softmax is wide",
        ),
    ):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        layer, streams = layer.to(device, torch.bfloat16), random_streams(0, device=device)
        kept = saved_bytes(partial(layer, x, streams), layer.parameters())
        say(f"{ranks * sum(k.bytes for k in kept) / sbh:8.3f}  {what}")
    say()
    print_costs(costs, sbh)
    return costs, sbh


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f": tp {group_size()}")
    if args.check:
        sys.exit(0 if check(args, device) else 1)
    errors = {}
    for mode, found in equivalence(device, torch.float64):
        errors |= {f"{name}, {mode_name(*mode)}": error for name, error in found.items()}
    layer, differences = show_layer(group_size(), device), demonstrate(args, device)
    # The other ranks wait at the end of `run_rank` until rank 0 has counted the paper's models.
    if group_rank() == 0 and not print_claims(claims(args, errors, differences, *layer)):
        sys.exit(1)


def claims(
    args: argparse.Namespace, errors: dict[str, float], differences: dict[str, float],
    costs: list[LayerCost], sbh: int,
) -> list[tuple]:  # fmt: skip
    """The rows of the claims table."""
    rows, t = [], args.world_size

    def row(claim: str, paper: str, here: str, verdict: bool | str | None = None) -> None:
        rows.append((claim, paper, here, here == paper if verdict is None else verdict))

    for claim, kind in (
        ("gradient", "grad"),
        ("norm before clipping", "norm"),
        ("weight after AdamW", "after"),
    ):
        error = worst(errors, kind)
        text = f"every {claim} equals the single device's, six modes, float64"
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
    published = dry_run()
    modes = {f"this run, t = {t},": [(cost.kept, cost.formula) for cost in costs]}
    modes["22B to 1T on pretended ranks,"] = [
        mode[:2] for model in published.values() for mode in model
    ]
    for what, pairs in modes.items():
        error = max(abs(kept / formula - 1) for kept, formula in pairs)
        row(
            f"bytes kept of a layer, {what} six modes",
            "table 2",
            f"within {100 * error:.3f} %",
            error <= 0.01,
        )
    unit = 2 * sbh * (t - 1) / t
    sent = ", ".join(f"{costs[mode].wire / unit:g}" for mode in (0, 3)) if unit else "–"
    why = "2 are the second gathers: 2.3" if unit else "needs ranks"
    row("sent in a layer, TP and TP + SP, in b·s·h·(t − 1)/t", "8, 8", sent, why)

    for name, m in PAPER_MODELS.items():
        sizes, end = (m.batch, SEQUENCE, m.h, m.L, WORDS), (m.seconds, m.gpus)
        share = [100 * utilization(count(*sizes), *end) for count in (model_flops, hardware_flops)]
        good = all(
            abs(x - y) < 0.25 for x, y in zip(share, (m.mfu, m.hfu))
        )  # 22B's 1.10 s are good to 0.2 points
        row(
            f"MFU and HFU of {name}",
            f"{m.mfu} %, {m.hfu} %",
            "{:.1f} %, {:.1f} %".format(*share),
            good,
        )
    none, selective = (published["175B"][mode][2] for mode in (0, 1))
    m = PAPER_MODELS["175B"]
    twice = recomputed_flops(m.batch, SEQUENCE, m.h, m.L) / model_flops(
        m.batch, SEQUENCE, m.h, m.L, WORDS
    )
    here = f"{100 * twice:.1f} %; {100 * (selective / none - 1):.1f} % as done"
    row(
        "operations that selective recomputation adds, 175B",
        "2.7 %",
        here,
        "equation 8 errs: 5.2; stops early: 2.6",
    )
    core = [5 * m.a * SEQUENCE / m.h for m in (PAPER_MODELS["175B"], PAPER_MODELS["530B"])]
    here = ", ".join(f"{100 * x / (34 + x):.0f} %" for x in core)
    row("memory that it saves on a single device, 175B, 530B", "70 %, 65 %", here)
    models = PAPER_MODELS.values()
    shares = [
        first_stage_bytes(m, True, "selective") / first_stage_bytes(m, False, "none")
        for m in models
    ]
    here = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"
    verdict = max(shares) < 0.2 or "530B and 1T miss it by a little"
    row("memory with both, of tensor parallelism's", "under 20 %", here, verdict)
    extra = extra_bytes(PAPER_MODELS["22B"]) / first_stage_bytes(PAPER_MODELS["22B"], True, "none")
    verdict = extra < 1e-4 or "its own formula says so"
    row("what the ends of the network add, 22B", "under 0.01 %", f"{100 * extra:.2f} %", verdict)
    row(
        "time added by full, selective, sequence parallelism",
        "39, 7, −3 %",
        "–",
        "needs 8 A100s; see make bench",
    )
    return rows


def dry_run() -> dict[str, list[tuple[int, float, int]]]:
    """Of each published model's layer, in each mode, bytes kept, formula and operations. A process has one world, and
    this one's is real: so it runs in another, which runs this file by its path, whatever its name is."""
    script = Path(__file__).resolve()
    numbers = "{name: [[c.kept, c.formula, c.flops] for c in paper_scale(name)] for name in names}"
    program = f"""import json, runpy
script = runpy.run_path({str(script)!r})
names, paper_scale = script["PAPER_MODELS"], script["paper_scale"]
print(json.dumps({numbers}))"""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    options = dict(env=clean, cwd=script.parent, check=True, stdout=subprocess.PIPE)
    return json.loads(subprocess.run([sys.executable, "-c", program], **options).stdout)


def print_paper_scale(name: str) -> None:
    """--paper-scale: one layer of a published model on pretended ranks."""
    model = PAPER_MODELS[name]
    sizes = f"s {SEQUENCE}, b {model.micro_batch}, h {model.h}, a {model.a}, t {model.t}"
    say(f"one layer of {name}: {sizes}, pretended\n")
    print_costs(paper_scale(name), SEQUENCE * model.micro_batch * model.h)
    say("\nkept by a GPU of the first pipeline stage, all layers and micro-batches, in GB:")
    kept = (f"{mode_name(*mode)} {first_stage_bytes(model, *mode) / 1e9:.1f}" for mode in MODES)
    say(", ".join(kept))


@dataclass
class Options(GPTConfig):
    """The flags: the config's, of which those that are None fit the ranks, and this chapter's own."""

    seq_length: int | None = flag(None, "S, tokens of a sequence; None: 128 or a few more", least=1)
    hidden_size: int | None = flag(None, "H; None: 128 or a few more", least=1)
    num_layers: int = flag(2, "L", least=1)
    num_heads: int | None = flag(None, "N; None: 4 or more, as many for each rank", least=1)
    data: str = flag("", "a UTF-8 text in place of Python's own sources", metavar="FILE")
    no_sequence_parallel: bool = flag(False, "tensor parallelism alone")
    recompute: str = flag("selective", "what backward computes again", choices=list(RECOMPUTE))
    batch: int = flag(8, "sequences of a step", least=1)
    lr: float = flag(1e-3, "learning rate, after ten steps of warm-up", least=1e-9)
    paper_scale: str = flag("", "count a layer of that model, and stop", choices=list(PAPER_MODELS))


def config_of(args: argparse.Namespace) -> GPTConfig:
    return config_from(args, GPTConfig, vocab_size=byte_encoding().n_vocab, seed=args.seed)


def multiple_above(least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `least`."""
    return math.ceil(least / divisor) * divisor


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError or OSError where flags, ranks and text do not fit."""
    t = args.world_size
    args.sequence_parallel = not args.no_sequence_parallel
    args.num_heads = args.num_heads or multiple_above(4, t)
    args.hidden_size = args.hidden_size or multiple_above(128, args.num_heads)
    args.seq_length = args.seq_length or multiple_above(128, t)
    check_tp(config_of(args), t)
    if args.seq_length % t:
        remedy = f"try {multiple_above(args.seq_length, t)}"
        raise ValueError(f"--seq-length {args.seq_length} does not divide over {t} ranks: {remedy}")
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=4, steps=40)


# The rest is carried: text data, at home in chapter 2; all other blocks, at home in chapter 1.
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
    arguments = flags()
    if arguments.paper_scale:
        print_paper_scale(arguments.paper_scale)
    else:
        launch(main, arguments)
