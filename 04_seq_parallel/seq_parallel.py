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
import math
import os
import subprocess
import sys
import sysconfig
import time
import traceback
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


# The sizes of a GPT, at home in chapter 2.
# region carried: GPT config (home: 02_megatron_tp)
@dataclass
class GPTConfig:
    """The sizes of a GPT. Raises ValueError where they contradict each other."""

    vocab_size: int = 256
    seq_length: int = 128  # S: the model has this many positions
    hidden_size: int = 128  # H
    num_layers: int = 4  # L
    num_heads: int = 4  # N
    ffn_hidden_size: int | None = None  # F; None: 4·H, Megatron-LM's choice
    dropout: float = 0.0  # Megatron-LM trains with 0.1
    norm: str = "pre"  # where LayerNorm stands: "pre" as in GPT-2, "post" as in the first Transformer
    init_std: float = 0.02
    seed: int = 0  # the weights are a function of this configuration alone
    vocab_multiple: int = 1  # each rank's words are padded to a multiple of this (Megatron-LM: 128)
    tied_head: bool = True  # the last layer multiplies with the embedding table; False: with a weight of its own

    def __post_init__(self):
        self.head_size = self.hidden_size // max(1, self.num_heads)  # D
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        for name in ("vocab_size", "seq_length", "hidden_size", "num_layers", "num_heads", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if rest := self.hidden_size % self.num_heads:
            sizes = f"hidden_size={self.hidden_size} does not divide into num_heads={self.num_heads}"
            raise ValueError(f"{sizes}: choose a multiple, such as {self.hidden_size - rest + self.num_heads}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r}: 'pre' or 'post'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: at least 0 and less than 1")


# endregion copy 409b77

# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# A GPT on a single device, in ordinary PyTorch and in the usual layout x_BSH: the thing to equal. It is explained in
# chapter 2. Look at `Block`: it takes a layer's two halves as arguments, and what it does itself (norm, dropout,
# residual sum) it does to each token alone. So it serves x_BSH and x_SBH, and a rank's share of the tokens, x_sBH, as
# it is.


# region carried: plain GPT (home: 02_megatron_tp)
# The generators that dropout draws from; None is PyTorch's default one. `outside` serves tensors that every
# tensor-parallel rank holds whole, `inside` those of which each holds a share; a single device draws from either.
RandomStreams = namedtuple("RandomStreams", "outside inside", defaults=(None, None))


def keep_mask(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """True where dropout keeps an element of x, with probability 1 − p: as many dimensions as x (...) has."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Zeroes each element with probability p and scales the others by 1 / (1 − p); saves one byte an element.

    Args: x (...), any shape; p in [0, 1); generator on x's device, None for PyTorch's default one.
    Raises: ValueError where p is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability {p}: it must be at least 0 and less than 1")
    return (x * keep_mask(x, p, generator)).mul_(1 / (1 - p)) if p else x


def core_attention(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, p: float = 0.0, generator=None) -> Tensor:
    """Causal attention of any number of heads, each by itself: (B, N, S, D) three times to (B, N, S, D).

    p is the dropout on the attention weights.
    """
    if not p:  # the same sum in one kernel, which never stores the S × S weights; its dropout takes no generator
        return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
    S, D = q_BNSD.shape[-2:]
    scores_BNSS = q_BNSD @ k_BNSD.mT / math.sqrt(D)
    future_SS = torch.full((S, S), -torch.inf, dtype=scores_BNSS.dtype, device=scores_BNSS.device).triu(1)
    wide = torch.promote_types(scores_BNSS.dtype, torch.float32)  # said openly; PyTorch's kernels widen too
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
        q_BNSD, k_BNSD, v_BNSD = rearrange(self.qkv(x_BSH), "B S (N three D) -> three B N S D", **heads)
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
        halves = ((Attention(config, column, row), MLP(config, column, row)) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(Block(config, attention, mlp) for attention, mlp in halves)
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.final_norm.weight.is_meta:  # on "meta" are shapes without memory: `parameter_shapes` asks for those
            self.load_state_dict(dict(initial_weights(config)))

    def forward(self, tokens_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        streams, p = streams or RandomStreams(), self.config.dropout if self.training else 0.0
        x_BSH = dropout(embed(self.embedding, self.positions, tokens_BS), p, streams.outside)
        for layer in self.layers:
            x_BSH = layer(x_BSH, streams)
        return F.linear(self.final_norm(x_BSH), (self.head or self.embedding).weight)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        """Cross entropy of each token in nats, (B, S), at least fp32; 0 where the target is −100."""
        logits_BSV = self(tokens_BS, streams)
        logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
        return F.cross_entropy(rearrange(logits_BSV, "B S V -> B V S"), targets_BS, ignore_index=-100, reduction="none")


def embed(words: nn.Module, positions: nn.Embedding, tokens_BS: Tensor) -> Tensor:
    """Word and position embedding, (B, S, H). Raises ValueError for a sequence longer than the table of positions."""
    S = tokens_BS.shape[1]
    if S > positions.num_embeddings:
        raise ValueError(f"a sequence of {S} tokens, but the model has {positions.num_embeddings} positions")
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
            onto_residual = name.endswith(("out.weight", "down.weight"))  # what writes onto the residual stream
            std = config.init_std / (math.sqrt(2 * config.num_layers) if onto_residual else 1)
            yield name, torch.randn(shape, generator=generator, device="cpu") * std
        else:  # biases 0, LayerNorm's weights 1
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")


def make_optimizer(model: nn.Module, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases and LayerNorm weights; the caller sets "lr" before each step."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS of each step; a target of −100 does not count


def train_alone(
    model: GPT, batches: Batches, lr: Callable[[int], float], max_norm: float = 1.0, autocast: torch.dtype | None = None
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


# endregion copy 404407


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


# region carried: groups (home: 01_deepspeech)
def group_size(group=None) -> int:
    """How many ranks `group` has (None: all there are); 1 where no process group exists. Source: ours."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group=None) -> int:
    """This process's number within `group` (None: all ranks); 0 where no process group exists. Source: ours."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def _readable(x: Tensor) -> bool:
    """May x's values be looked at? Not on a GPU, where the CPU would wait for them; not while torch.compile traces, and
    not of fake tensors (chapter 2, part 5), which have none."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _all_reduce(x: Tensor, group=None, op=dist.ReduceOp.SUM) -> Tensor:
    """In place; with a single rank there is nothing to do."""
    if group_size(group) > 1:
        dist.all_reduce(x, op, group)
    return x


# endregion copy 552773


# ── 2.1 The doors of a tensor-parallel region ───────────────────────────────────────────────────────────
#
# Explained in chapter 2, section 2.1.


# region carried: tensor-parallel operators (home: 02_megatron_tp)
def _share(size: int, group, what: str) -> int:
    tp = group_size(group)
    if size % tp:
        raise ValueError(f"{what}={size} does not divide over {tp} ranks: choose a multiple of {tp}, or fewer ranks")
    return size // tp


def _keep(x: Tensor, group) -> Tensor:
    return x.view_as(x)  # a tensor object of its own: autograd treats an input that is returned specially


def _sum(partial_x: Tensor, group) -> Tensor:
    """Of a copy: the all-reduce works in place, and somebody else may still need the summand."""
    return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)


def _gather(x: Tensor, group) -> Tensor:
    """All ranks' x side by side along the last dimension."""
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group_size(group))]
    dist.all_gather(pieces, x.contiguous(), group)
    return torch.cat(pieces, -1)


def _slice(x: Tensor, group, dim: int = -1, what: str = "the last dimension") -> Tensor:
    """This rank's share of one dimension, a copy: a view would keep all of x in memory."""
    share = x.split(_share(x.shape[dim], group, what), dim)[group_rank(group)]
    return share.clone(memory_format=torch.contiguous_format)


class _Door(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, there, back):
        ctx.group, ctx.there, ctx.back = group, there, back
        return there(x, group)

    @staticmethod
    def backward(ctx, grad):  # the same door from the other side, and so a second derivative is right too
        return _Door.apply(grad, ctx.group, ctx.back, ctx.there), None, None, None


def copy_to_tp(x: Tensor, group=None) -> Tensor:
    """The way in: x as it is; its gradient is summed over `group`.

    x: any shape, equal on every rank. group: the tensor-parallel group; None is all ranks.
    Source: the Megatron-LM paper's f, figure 3.
    """
    return _Door.apply(x, group, _keep, _sum) if group_size(group) > 1 else x


def reduce_from_tp(partial_x: Tensor, group=None) -> Tensor:
    """The way out: the sum of `partial_x` over `group`, the same on every rank; the gradient passes as it is.

    partial_x: any shape, which must be the same on every rank; not modified.
    Source: the Megatron-LM paper's g, figure 3.
    """
    return _Door.apply(partial_x, group, _sum, _keep) if group_size(group) > 1 else partial_x


def scatter_to_tp(x: Tensor, group=None) -> Tensor:
    """This rank's share of the last dimension of x, (..., F) to (..., f); the gradient is gathered.

    x: any shape, equal on every rank. Raises: ValueError where the dimension does not divide over the ranks.
    Source: ours; Megatron-LM's code has it.
    """
    return _Door.apply(x, group, _slice, _gather) if group_size(group) > 1 else x


def gather_from_tp(x: Tensor, group=None) -> Tensor:
    """All ranks' x side by side, (..., f) to (..., F); of the gradient each rank keeps its share.

    x: any shape, which must be the same on every rank. Right only where every rank does the same with the result: then
    its gradient is whole on each, and a sum would count it tp times.
    Source: ours; Megatron-LM's code has it.
    """
    return _Door.apply(x, group, _gather, _slice) if group_size(group) > 1 else x


# endregion copy 4574e3
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
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    x_SBH = x_sBH.new_empty(x_sBH.shape[0] * group_size(group), *x_sBH.shape[1:])
    return x_SBH, gather(x_SBH, x_sBH.contiguous(), group=group, async_op=True)


def _start_reduce_scatter(partial_x_SBH: Tensor, group) -> tuple[Tensor, dist.Work]:
    """x_sBH, this rank's tokens of the sum, complete once the work has been waited for."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    x_sBH = partial_x_SBH.new_empty(_tokens_each(partial_x_SBH.shape[0], group), *partial_x_SBH.shape[1:])
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


def _tokens_each(S: int, group=None) -> int:
    t = group_size(group)
    if S % t:
        more = -(-S // t) * t
        raise ValueError(
            f"a sequence of {S} tokens does not divide over {t} ranks: pad it to {more}, targets with −100"
        )
    return S // t


def gather_from_sp(x_sBH: Tensor, group=None, backward: str = "reduce_scatter") -> Tensor:
    """g: all ranks' tokens in the order of ranks, (s, B, H) to (S, B, H).

    x_sBH: any shape whose first dimension is divided over `group` (None: all ranks), of the same size on each.
    backward: "reduce_scatter" in front of work that is divided over the ranks, "split" in front of work that every rank
    repeats.

    Raises: ValueError for another `backward`.
    Source: section 4.2.2 of the paper.
    """
    ways = {"reduce_scatter": _reduce_scatter_tokens, "split": _own_tokens}
    if backward not in ways:
        raise ValueError(f"backward={backward!r}: 'reduce_scatter' in front of divided work, 'split' of repeated work")
    return _Door.apply(x_sBH, group, _gather_tokens, ways[backward]) if group_size(group) > 1 else x_sBH


def reduce_scatter_to_sp(partial_x_SBH: Tensor, group=None) -> Tensor:
    """ḡ: the sum over `group`, of which each rank gets its own tokens, (S, B, H) to (s, B, H).

    partial_x_SBH: any shape, the same on each rank, whose first dimension is tokens; not modified.

    Raises: ValueError where S does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """
    if group_size(group) == 1:
        return partial_x_SBH
    return _Door.apply(partial_x_SBH, group, _reduce_scatter_tokens, _gather_tokens)


def scatter_to_sp(x_SBH: Tensor, group=None) -> Tensor:
    """This rank's tokens of a tensor that every rank has, (S, B, H) to (s, B, H); the gradient is gathered.

    x_SBH: any shape whose first dimension is tokens, equal on every rank.

    Raises: ValueError where S does not divide over the ranks.
    Source: Megatron-LM.
    """
    return _Door.apply(x_SBH, group, _own_tokens, _gather_tokens) if group_size(group) > 1 else x_SBH


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
        door = (_start_gather, _start_reduce_scatter) if sequence_parallel else (_start_nothing, _start_all_reduce)
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


def column_parallel(x: Tensor, weight_fH: Tensor, bias_f: Tensor | None, group, sequence_parallel: bool) -> Tensor:
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
        narrow = torch.get_autocast_dtype(x.device.type)  # before, because backward has no autocast, and to send less
        x, weight_fH, bias_f = (y if y is None else y.to(narrow) for y in (x, weight_fH, bias_f))
    return _ColumnParallel.apply(x, weight_fH, bias_f, group, sequence_parallel)


def sum_over_tp(partial_x_SBH: Tensor, group, sequence_parallel: bool) -> Tensor:
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

    def __init__(self, in_features: int, out_features: int, group=None, sequence_parallel: bool = True):
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

    def __init__(self, in_features: int, out_features: int, group=None, sequence_parallel: bool = True):
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

    def stream(*key):  # a 32-bit seed from all of the key: PyTorch's CPU generator looks at 32 bits and no more
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


def unfused_attention(q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, p: float = 0.0, generator=None) -> Tensor:
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


def fused_attention(q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, p: float = 0.0, generator=None) -> Tensor:
    """The same in one kernel that keeps no S × S tensor: (p, S, D) three times to (p, S, D).

    Raises: ValueError for dropout, which the kernel draws its own way. Source: FlashAttention, arXiv 2205.14135.
    """
    if p:
        raise ValueError(
            f"dropout={p}: the fused kernel takes no generator of ours; use unfused_attention or dropout=0"
        )
    pairs = (x_pSD[None] for x_pSD in (q_pSD, k_pSD, v_pSD))  # as one sequence of p heads: its output is then a view
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

    def __init__(self, config: GPTConfig, group, sequence_parallel: bool, recompute_core: bool, core: Callable):
        super().__init__()
        _share(config.num_heads, group, "num_heads")
        self.config, self.core, self.recompute_core = config, core, recompute_core
        self.qkv = SPColumnParallelLinear(config.hidden_size, 3 * config.hidden_size, group, sequence_parallel)
        self.out = SPRowParallelLinear(config.hidden_size, config.hidden_size, group, sequence_parallel)

    def forward(self, x_sBH: Tensor, streams: RandomStreams) -> Tensor:
        heads, B = dict(three=3, D=self.config.head_size), x_sBH.shape[1]
        q_pSD, k_pSD, v_pSD = rearrange(self.qkv(x_sBH), "S B (n three D) -> three (B n) S D", **heads)
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

    def __init__(self, config: GPTConfig, group, sequence_parallel: bool):
        super().__init__()
        self.up = SPColumnParallelLinear(config.hidden_size, config.ffn_hidden_size, group, sequence_parallel)
        self.down = SPRowParallelLinear(config.ffn_hidden_size, config.hidden_size, group, sequence_parallel)

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
        self, config: GPTConfig, group=None, sequence_parallel: bool = True, recompute: str = "none",
        core: Callable = unfused_attention,
    ):  # fmt: skip
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r}: choose from {', '.join(RECOMPUTE)}")
        attention = ParallelAttention(config, group, sequence_parallel, recompute == "selective", core)
        super().__init__(config, attention, ParallelMLP(config, group, sequence_parallel))
        self.group, self.recompute = group, recompute

    def forward(self, x_sBH: Tensor, streams: RandomStreams | None = None) -> Tensor:
        streams, t = streams or RandomStreams(), group_size(self.group)
        p = self.config.dropout if self.training else 0.0
        if p and t > 1 and None in (streams.inside, streams.outside):
            raise ValueError(f"dropout={p} on {t} ranks needs streams=random_streams(seed, rank, sequence_parallel)")
        if self.recompute == "full":
            return recompute(super().forward, x_sBH, streams, generators=[streams.outside, streams.inside])
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
    here, wrappers = saved_bytes.__code__.co_filename, ("pack", "dropout", "column_parallel")  # their callers say more
    known, kept, held = {p.untyped_storage()._cdata for p in parameters}, [], []  # a fake tensor has no data_ptr()

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in known:
            known.add(x.untyped_storage()._cdata)
            held.append(x)  # so that its address is not used again
            frames = [f for f in traceback.extract_stack() if f.filename == here and f.name not in wrappers]
            kept.append(Kept(x.untyped_storage().nbytes(), tuple(x.shape), x.dtype, frames[-1].line))
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
        wide = torch.promote_types(logits_BSv.dtype, torch.float32)  # at least fp32; float64 stays float64
        x_BSv = logits_BSv.to(wide, copy=True)  # the caller's stay as they were
        x_BSv[..., max(0, vocab_size - group_rank(group) * v) :] = -torch.inf  # what is no word

        x_BSv.sub_(_all_reduce(x_BSv.amax(-1), group, dist.ReduceOp.MAX)[..., None])
        row_BS, mine_BS = _local_words(targets_BS, v, group)
        # A product with mine_BS in place of where() would make NaN of 0 · −inf.
        partial_target_BS = torch.where(mine_BS, x_BSv.gather(-1, row_BS[..., None])[..., 0], 0)
        exp_BSv = x_BSv.exp_()

        # One message instead of two: both summands travel side by side.
        target_BS, sum_BS = _all_reduce(torch.stack([partial_target_BS, exp_BSv.sum(-1)]), group)

        ctx.save_for_backward(exp_BSv.div_(sum_BS[..., None]), row_BS, mine_BS)
        return sum_BS.log() - target_BS  # whole, and the same on every rank

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BS):
        softmax_BSv, row_BS, mine_BS = ctx.saved_tensors
        grad_BSv = softmax_BSv * grad_BS[..., None]
        grad_BSv.scatter_add_(-1, row_BS[..., None], -(grad_BS * mine_BS)[..., None])
        return grad_BSv, None, None, None  # autograd brings it to the logits' dtype


def vocab_parallel_cross_entropy(
    logits_BSv: Tensor, targets_BS: Tensor, group=None, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross entropy of each token, from logits whose vocabulary is divided over `group`.

    Args:
        logits_BSv: this rank's columns, as many on every rank; rank r holds words [r·v, (r + 1)·v). Not modified.
        targets_BS: word numbers in [0, vocab_size) or `ignore_index`; int64, the same on every rank.
        group: the tensor-parallel group; None is all ranks.
        vocab_size: words that exist; columns from there on are padding. None: all columns of all ranks are words.

    Returns: loss_BS in nats, not reduced, the same on every rank; 0 where the target is `ignore_index`. At least fp32.

    Raises:
        ValueError: shapes disagree, the vocabulary does not fit, or a target is no word (looked at on the CPU only; on
            a GPU check targets where the data is loaded).

    Source: section 3 of the Megatron-LM paper.
    """
    columns = logits_BSv.shape[-1] * group_size(group)
    vocab_size = columns if vocab_size is None else vocab_size
    if logits_BSv.shape[:-1] != targets_BS.shape:
        shapes = f"logits {tuple(logits_BSv.shape)} and targets {tuple(targets_BS.shape)}"
        raise ValueError(f"{shapes}: all dimensions but the last must agree")
    if not 0 < vocab_size <= columns:
        raise ValueError(f"a vocabulary of {vocab_size} words does not fit the {columns} columns that the group holds")
    if _readable(targets_BS):
        no_word_BS = ((targets_BS < 0) | (targets_BS >= vocab_size)) & (targets_BS != ignore_index)
        if no_word_BS.any():
            word = targets_BS[no_word_BS][0]
            raise ValueError(f"target {word} is neither a word in [0, {vocab_size}) nor ignore_index={ignore_index}")
    loss_BS = _VocabParallelCrossEntropy.apply(logits_BSv, targets_BS, vocab_size, group)
    return torch.where(targets_BS != ignore_index, loss_BS, 0)  # its backward lets nothing through, not even infinity


# endregion copy e6dfe4
# region carried: padded vocabulary (home: 02_megatron_tp)
def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """vocab_size, rounded up to a multiple of multiple·tp. Source: section 5.1 of the Megatron-LM paper."""
    return math.ceil(vocab_size / (multiple * tp)) * multiple * tp


def _local_words(words_BS: Tensor, v: int, group=None) -> tuple[Tensor, Tensor]:
    """Of each word its row on this rank, which holds words [r·v, (r + 1)·v), and whether it has one; else any row."""
    row_BS = words_BS - group_rank(group) * v
    return row_BS.clamp(0, v - 1), (row_BS >= 0) & (row_BS < v)


# endregion copy e72b18


def look_up(tokens_SB: Tensor, weight_vH: Tensor, vocab_size: int, group=None) -> Tensor:
    """This rank's words' rows and zeros for the others: a summand of the embedding, (S, B, H).

    tokens_SB: int64, the same on every rank. weight_vH: the rows of words [rank·v, (rank + 1)·v).

    Raises: ValueError for a token outside the vocabulary (looked at on the CPU only).
    Source: Megatron-LM.
    """
    if _readable(tokens_SB) and ((tokens_SB < 0) | (tokens_SB >= vocab_size)).any():
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
        self, config: GPTConfig, group=None, sequence_parallel: bool = True, recompute: str = "none",
        core: Callable = unfused_attention,
    ):  # fmt: skip
        super().__init__()
        self.config, self.group, self.sequence_parallel = config, group, sequence_parallel
        rank, t = group_rank(group), group_size(group)
        check_tp(config, t)
        if not config.tied_head:
            raise ValueError("tied_head=False: this model's last layer multiplies with the embedding table")
        options = group, sequence_parallel, recompute, core
        with torch.device("meta"):  # shapes first, without memory
            words = padded_vocab_size(config.vocab_size, t, config.vocab_multiple) // t
            self.embedding = nn.Embedding(words, config.hidden_size)
            self.positions = nn.Embedding(config.seq_length, config.hidden_size)
            self.layers = nn.ModuleList(SequenceParallelLayer(config, *options) for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.hidden_size)
        shares = {name: shard_tensor(name, whole, config, rank, t) for name, whole in initial_weights(config)}
        self.load_state_dict(shares, assign=True)  # puts them in the place of the shapes

    def forward(self, tokens_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        S, p, streams = tokens_BS.shape[1], self.config.dropout if self.training else 0.0, streams or RandomStreams()
        if S > self.config.seq_length:
            raise ValueError(f"a sequence of {S} tokens, but the model has {self.config.seq_length} positions")
        partial_x_SBH = look_up(tokens_BS.T, self.embedding.weight, self.config.vocab_size, self.group)
        x_sBH = sum_over_tp(partial_x_SBH, self.group, self.sequence_parallel)
        first = group_rank(self.group) * x_sBH.shape[0] if self.sequence_parallel else 0
        positions_sH = self.positions.weight[first : first + x_sBH.shape[0]]
        x_sBH = dropout(x_sBH + positions_sH[:, None], p, streams.outside)
        for layer in self.layers:
            x_sBH = layer(x_sBH, streams)
        x_sBH = self.final_norm(x_sBH)
        return column_parallel(x_sBH, self.embedding.weight, None, self.group, self.sequence_parallel)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor, streams: RandomStreams | None = None) -> Tensor:
        """Cross entropy of each token in nats, (B, S), the same on every rank; 0 where the target is −100."""
        logits_SBv = self(tokens_BS, streams)
        return vocab_parallel_cross_entropy(logits_SBv, targets_BS.T, self.group, self.config.vocab_size).T


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# Sequence parallelism divides activations and no weight, so this is chapter 2's part 3: one table says how each
# parameter is cut. What is not in it is whole on every rank: norms, positions, biases of row-parallel layers.

# region carried: tensor-parallel weights (home: 02_megatron_tp)
SHARD_DIM = {
    "embedding.weight": 0,  # by words
    "qkv.weight": 0, "qkv.bias": 0, "out.weight": 1,  # by heads: the outputs of the first, the inputs of the second
    "up.weight": 0, "up.bias": 0, "down.weight": 1,  # by features
}  # fmt: skip


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is cut; None where each rank holds all of it."""
    return SHARD_DIM.get(".".join(name.split(".")[-2:]))  # of "layers.0.attention.qkv.weight" the last two parts


def check_tp(config: GPTConfig, tp: int) -> None:
    """Raises ValueError, with the remedy, where heads or feed-forward features do not divide over `tp` ranks."""
    fits = [n for n in range(1, tp + 1) if config.num_heads % n == 0 == config.ffn_hidden_size % n]
    if tp not in fits:
        sizes = f"num_heads={config.num_heads} and ffn_hidden_size={config.ffn_hidden_size}"
        raise ValueError(f"{sizes} do not both divide over tp={tp} ranks: choose tp from {fits}, or other sizes")


def check_shapes(where: str, found: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Raises ValueError, with what is expected, where a tensor is missing, unknown or of another shape. found: by name,
    of any shapes."""
    has, wants = {n: tuple(x.shape) for n, x in found.items()}, {n: tuple(shape) for n, shape in expected.items()}
    wrong = [name for name in sorted({*has, *wants}) if has.get(name) != wants.get(name)]
    if wrong:
        each = (f"{name} is {has.get(name, 'missing')} and should be {wants.get(name, 'left out')}" for name in wrong)
        raise ValueError(f"{where}: " + "; ".join(itertools.islice(each, 5)))


def shard_tensor(name: str, whole: Tensor, config: GPTConfig, rank: int, world_size: int) -> Tensor:
    """Rank `rank`'s share of the plain model's parameter `name`, a copy; whole has that parameter's shape (...)."""
    if shard_dim(name) is None:
        return whole.clone()
    if name.endswith("embedding.weight"):
        rows = padded_vocab_size(config.vocab_size, world_size, config.vocab_multiple)
        whole = F.pad(whole, (0, 0, 0, rows - config.vocab_size))
    return whole.chunk(world_size, shard_dim(name))[rank].clone(memory_format=torch.contiguous_format)


def shard_state_dict(full: dict[str, Tensor], config: GPTConfig, rank: int, world_size: int) -> dict[str, Tensor]:
    """The plain model's state dict to the one of tensor-parallel rank `rank` of `world_size`.

    full: every parameter by name, of the shape that `parameter_shapes` says. Returns: the same names, copies of shares.
    Raises: ValueError that names what is missing, unknown or of another shape, or that heads or features do not divide.
    """
    check_tp(config, world_size)
    check_shapes("the state dict", full, parameter_shapes(config))
    return {name: shard_tensor(name, whole, config, rank, world_size) for name, whole in full.items()}


def merge_state_dicts(shards: list[dict[str, Tensor]], config: GPTConfig) -> dict[str, Tensor]:
    """All ranks' state dicts, in the order of ranks, to the plain model's: `shard_state_dict` undone, to the bit.

    shards: the same names in each; some of the model's are enough. Returns: whole tensors, copies. Works for gradients
    as well. Raises: ValueError where ranks hold different values of what should be whole on each: they have drifted
    apart.
    """
    full = {}
    for name in shards[0]:
        pieces, dim = [shard[name] for shard in shards], shard_dim(name)
        for rank, piece in enumerate(pieces):
            if dim is None and not torch.equal(piece, pieces[0]):
                gap = f"rank {rank}'s differs from rank 0's by {(piece - pieces[0]).abs().max():.1e}"
                raise ValueError(f"{name} should be the same on every rank, but {gap}")
        whole = pieces[0].clone() if dim is None else torch.cat(pieces, dim)
        full[name] = whole[: config.vocab_size].clone() if name.endswith("embedding.weight") else whole
    return full


# endregion copy fdd9cb

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


def reduce_sequence_parallel_grads(module: nn.Module, group=None) -> None:
    """Sums over `group` the gradients of what each rank holds whole, in one message; for sequence parallelism only.

    module: a `SequenceParallelLayer`, a `SequenceParallelGPT`, or another whose divided parameters `SHARD_DIM` names: a
    name that is not there counts as whole. group: the tensor-parallel group that `module` has; None is all ranks.
    Every rank must call it, once after all backward passes of a step, before clipping, and must have gradients of the
    same parameters. Source: Megatron-LM.
    """
    whole = [p for name, p in module.named_parameters() if shard_dim(name) is None]
    grads = [p.grad for p in whole if p.grad is not None]
    if grads and group_size(group) > 1:
        flat = _all_reduce(torch.cat([grad.flatten() for grad in grads]), group)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad))


# Clipping, from chapter 2: shares' squares are summed over the group, what is whole counts once.
# region carried: clipping (home: 02_megatron_tp)
@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter], max_norm: float, sharded: Iterable[nn.Parameter] = (), group=None
) -> Tensor:
    """Scales all gradients so that their norm over all ranks of `group` is at most max_norm; returns what it was.

    Args:
        parameters: all of this rank's.
        max_norm: as torch.nn.utils.clip_grad_norm_'s.
        sharded: those of `parameters` of which each rank of `group` holds other elements; the rest is whole on each.
        group: the group over which they are divided; None is all ranks. Without `sharded` nothing is communicated.

    Returns: a scalar tensor on the gradients' device, at least fp32, the same on every rank; not finite if a gradient
    is not (the gradients are then useless).
    """
    parameters = [p for p in parameters if p.grad is not None]
    shares = {id(p) for p in sharded}  # by identity: == compares elements
    device = parameters[0].grad.device if parameters else None

    def squares(of_shares: bool) -> Tensor:
        grads = [p.grad for p in parameters if (id(p) in shares) == of_shares]
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)

    total = squares(of_shares=True)
    if shares and dist.is_initialized():
        dist.all_reduce(total, group=group)
    norm = (total + squares(of_shares=False)).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)  # PyTorch's norm would be as narrow as the gradients are
    return norm


# endregion copy 6d1ced


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
        loss = model.loss(tokens_BS, targets_BS, streams).sum() / (targets_BS != -100).sum().clamp(min=1)
    loss.backward()
    if model.sequence_parallel:
        reduce_sequence_parallel_grads(model, model.group)
    sharded = [p for name, p in model.named_parameters() if shard_dim(name) is not None]
    norm = clip_grad_norm_(model.parameters(), max_norm, sharded, model.group)
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


def activation_bytes(config: GPTConfig, tp: int, sequence_parallel: bool, recompute: str, batch: int = 1) -> float:
    """Bytes that one of `tp` ranks keeps of a layer for `batch` sequences: bf16, 1-byte masks, F = 4·H, with dropout.

    Full recomputation keeps the layer's input: 2·s·b·h, which is a share of it under sequence parallelism.
    Source: table 2 of the paper.
    """
    s, h, a, divided = config.seq_length, config.hidden_size, config.num_heads, tp if sequence_parallel else 1
    if recompute == "full":
        return 2 * s * batch * h / divided
    core = 5 * a * s / h if recompute == "none" else 0
    return s * batch * h * (10 / divided + (24 + core) / tp)


# Table 3 and table 5: sequences of 2,048 tokens, 51,200 words, no data parallelism; t tensor-parallel ranks, p pipeline
# stages in m interleaved pieces each; seconds of an iteration with full recomputation, and with what this chapter does.
Published = namedtuple("Published", "a h L t p m gpus batch micro_batch seconds_full seconds mfu hfu")
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
    one = activation_bytes(published_config(model), model.t, sequence_parallel, recompute, model.micro_batch)
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

LayerCost = namedtuple("LayerCost", "sequence_parallel recompute formula kept saved messages wire flops")


def wire_bytes(messages: Iterable[Message], t: int) -> float:
    """What a rank sends in a ring: (t − 1)/t of a message; an all-reduce is two of them. Source: ours."""
    return sum(m.bytes * (2 if m.op == "all_reduce" else 1) * (t - 1) / t for m in messages)


def layer_costs(config: GPTConfig, batch: int, group=None, device: torch.device | str = "cpu") -> list[LayerCost]:
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
        x = torch.randn(tokens, batch, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        streams = random_streams(config.seed, group_rank(group), sequence_parallel, device)
        saved = saved_bytes(partial(layer, x, streams), layer.parameters())
        with Counter() as counter, FlopCounterMode(display=False) as flops:
            layer(x, streams).sum().backward()
        formula, kept = activation_bytes(config, t, sequence_parallel, kind, batch), sum(k.bytes for k in saved)
        sent = counter.messages, wire_bytes(counter.messages, t)
        costs.append(LayerCost(sequence_parallel, kind, formula, kept, saved, *sent, flops.get_total_flops()))
    return costs


def paper_scale(name: str) -> list[LayerCost]:
    """`layer_costs` of a published model. Makes a process group, so it wants a process of its own.

    Source: ours.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  torch 2.9 learns there what collectives return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = PAPER_MODELS[name]
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
    return ("TP + SP" if sequence_parallel else "TP") + ("" if recompute == "none" else f" + {recompute}")


def equivalence(device, dtype: torch.dtype, autocast: torch.dtype | None = None) -> Iterator[tuple[tuple, dict]]:
    """A small odd model in each mode beside the same on a single device: the mode, and every tensor's relative error.

    Errors are per tensor: max|Δ| / max|reference|; after AdamW over max(max|reference|, steps · lr).
    """
    t = group_size()
    config = GPTConfig(vocab_size=61, seq_length=4 * t, hidden_size=16 * t, num_layers=2, num_heads=2 * t)
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 3, 3 * t), generator=generator).to(device)
    targets_BS[0, t:] = -100
    batches, options = [(tokens_BS, targets_BS)] * 5, dict(lr=lambda step: 1e-3, max_norm=0.1, autocast=autocast)

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
        pairs = ((name, x, reference[name].detach().cpu()) for name, x in merge_state_dicts(shards, config).items())
        return {f"{kind} {name}": ((x - y).abs().max() / max(y.abs().max(), floor)).item() for name, x, y in pairs}

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


# region carried: precision (home: 01_deepspeech)
def precision(args) -> tuple[torch.dtype, torch.dtype | None]:
    """--dtype as the dtype of the parameters, and that of autocast's products or None."""
    return torch.float64 if args.dtype == "fp64" else torch.float32, torch.bfloat16 if args.dtype == "bf16" else None


def within(errors: Iterable[float], bound: float) -> tuple[float, bool]:
    """The worst of `errors`, and whether all are within the bound; NaN is worse than anything, and not."""
    errors = list(errors)
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error), all(e <= bound for e in errors)


# endregion copy 4a8517


def check(args, device: torch.device) -> bool:
    """--check: every tensor's error in all modes, on the ranks, backend and dtype that are there."""
    good = True
    for mode, errors in equivalence(device, *precision(args)):
        worst, here_good = within(errors.values(), BOUNDS[args.dtype])
        say("\n".join(f"{mode_name(*mode):20} {name:50} {error:.1e}" for name, error in errors.items()))
        say(f"{mode_name(*mode)}: worst {worst:.1e}, bound {BOUNDS[args.dtype]:.0e}; tp {group_size()}, {args.dtype}\n")
        good = good and here_good
    return good


def print_costs(costs: list[LayerCost], sbh: int) -> None:
    """The six modes beside each other; sbh is the number of elements of a whole x_SBH."""
    say("mode                  kept, in s·b·h    formula  messages, forward + backward    sent by a rank    operations")
    for cost in costs:
        names = [m.op.removesuffix("_base").replace("_", "-") for m in cost.messages]
        sent = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "none"
        say(f"{mode_name(cost.sequence_parallel, cost.recompute):24}{cost.kept / sbh:12.3f}"
            f"{cost.formula / sbh:11.3f}  {sent:31}{cost.wire / 2**20:9.2f} MiB"
            f"{cost.flops / costs[0].flops - 1:+14.1%}")  # fmt: skip


def demonstrate(args, device: torch.device) -> list[float]:
    """Trains on real text; returns the differences in loss of the first steps from the single device."""
    from tqdm import tqdm

    config, (dtype, autocast) = config_of(args), precision(args)
    data = TextData(args.data, args.tokenizer, args.seq_length)

    def batches() -> Batches:
        return ([x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)] for step in range(args.steps))

    options = dict(lr=lambda step: args.lr * min(1.0, (step + 1) / 10), autocast=autocast)
    model = SequenceParallelGPT(config, None, args.sequence_parallel, args.recompute).to(device, dtype)
    streams = random_streams(args.seed, group_rank(), args.sequence_parallel, device)
    alone, differences = iter(()), []
    if group_rank() == 0 and not args.dropout:  # with dropout the masks differ, and so must the losses
        alone = train_alone(GPT(config).to(device, dtype), itertools.islice(batches(), 5), **options)
    say(f"\ntraining with {mode_name(args.sequence_parallel, args.recompute)} on {data.source}")
    say("step      loss    single device      norm")
    quiet = group_rank() > 0 or not sys.stderr.isatty()
    steps = tqdm(train(model, batches(), streams=streams, **options), total=args.steps, disable=quiet)
    for step, results in enumerate(steps):
        loss, norm = read_step(step, *results)
        beside = [loss_alone.item() for loss_alone, _ in itertools.islice(alone, 1)]
        differences += [abs(loss - other) for other in beside]
        if step < 5 or step % 20 == 19:
            text = f"{beside[0]:.6f}" if beside else ""
            say(f"{step:4}  {loss:.6f}  {text:>15}  {norm:8.3f}")
    return differences


def show_layer(t: int, device: torch.device) -> tuple[list[LayerCost], int]:
    """Prints what a small layer keeps and what the six modes cost; returns the costs, and the elements of its x_SBH."""
    config = GPTConfig(seq_length=64, hidden_size=128, num_heads=2 * t, dropout=0.1)
    costs, sbh = layer_costs(config, 2, None, device), 2 * config.seq_length * config.hidden_size
    core = 5 * config.num_heads * config.seq_length / config.hidden_size
    say(f"One layer, TP + SP on {t} ranks: what is kept, in units of s·b·h/t bytes, and the line that keeps it\n")
    for kept in costs[3].saved:
        shape = " × ".join(map(str, kept.shape))
        say(f"{t * kept.bytes / sbh:8.3f}  {str(kept.dtype)[6:]:9} {shape:14}  {kept.line:.80}")
    terms = f"= 34 + 5·a·s/h, which is {core:g} here, and mean and deviation of each token (those ending in × 1)"
    say(f"{t * costs[3].kept / sbh:8.3f}  {terms}")
    fused = SequenceParallelLayer(dataclasses.replace(config, dropout=0.0), core=fused_attention)
    for layer, ranks, shape, what in (
        (fused, t, (64 // t, 2, 128), "with the fused kernel, which takes no dropout: 5·a·s/h is gone, and two masks"),
        (TransformerLayer(config), 1, (2, 64, 128), "by the plain layer on a single device: its softmax is wide"),
    ):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        layer, streams = layer.to(device, torch.bfloat16), random_streams(0, device=device)
        kept = saved_bytes(partial(layer, x, streams), layer.parameters())
        say(f"{ranks * sum(k.bytes for k in kept) / sbh:8.3f}  {what}")
    say()
    print_costs(costs, sbh)
    return costs, sbh


def main(args, device: torch.device) -> None:
    t = group_size()
    where = f"{args.device}, {args.backend}, {t} ranks: tp {t}"
    say(f"torch {torch.__version__}, {where}, {args.dtype}, seed {args.seed}\n")
    if args.check:
        sys.exit(0 if check(args, device) else 1)
    errors = [item for _, errors in equivalence(device, torch.float64) for item in errors.items()]
    layer, differences = show_layer(t, device), demonstrate(args, device)
    if group_rank() == 0 and not print_claims(claims(args, errors, differences, *layer)):
        sys.exit(1)


def claims(args, errors: list[tuple], differences: list[float], costs: list[LayerCost], sbh: int) -> list[tuple]:
    rows, t = [], args.world_size

    def row(claim: str, paper: str, here: str, verdict: bool | str | None = None) -> None:
        rows.append((claim, paper, here, here == paper if verdict is None else verdict))

    for claim, kind in (("gradient", "grad"), ("norm before clipping", "norm"), ("weight after AdamW", "after")):
        worst, good = within((error for name, error in errors if name.startswith(kind)), BOUNDS["fp64"])
        text = f"every {claim} equals the single device's, six modes, float64"
        row(text, "exact", f"worst {worst:.1e} relative", good)
    worst, good = within(differences or [math.nan], BOUNDS[args.dtype])
    text = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    row(text, "equal", f"within {worst:.0e}", good if differences else "needs steps and --dropout 0")
    published = dry_run()
    found = {f"this run, t = {t},": [(cost.kept, cost.formula) for cost in costs]}
    found["22B to 1T on pretended ranks,"] = [mode[:2] for modes in published.values() for mode in modes]
    for what, modes in found.items():
        worst, good = within((kept / formula - 1 for kept, formula in modes), 0.01)
        row(f"bytes kept of a layer, {what} six modes", "table 2", f"within {100 * worst:.3f} %", good)
    unit = 2 * sbh * (t - 1) / t
    sent = ", ".join(f"{costs[mode].wire / unit:g}" for mode in (0, 3)) if unit else "–"
    why = "2 are the second gathers: 2.3" if unit else "needs ranks"
    row("sent in a layer, TP and TP + SP, in b·s·h·(t − 1)/t", "8, 8", sent, why)

    for name, m in PAPER_MODELS.items():
        sizes, end = (m.batch, SEQUENCE, m.h, m.L, WORDS), (m.seconds, m.gpus)
        share = [100 * utilization(count(*sizes), *end) for count in (model_flops, hardware_flops)]
        good = all(abs(x - y) < 0.25 for x, y in zip(share, (m.mfu, m.hfu)))  # 22B's 1.10 s are good to 0.2 points
        row(f"MFU and HFU of {name}", f"{m.mfu} %, {m.hfu} %", "{:.1f} %, {:.1f} %".format(*share), good)
    none, selective = (published["175B"][mode][2] for mode in (0, 1))
    m = PAPER_MODELS["175B"]
    twice = recomputed_flops(m.batch, SEQUENCE, m.h, m.L) / model_flops(m.batch, SEQUENCE, m.h, m.L, WORDS)
    here = f"{100 * twice:.1f} %; {100 * (selective / none - 1):.1f} % as done"
    row("operations that selective recomputation adds, 175B", "2.7 %", here, "equation 8 errs: 5.2; stops early: 2.6")
    core = [5 * m.a * SEQUENCE / m.h for m in (PAPER_MODELS["175B"], PAPER_MODELS["530B"])]
    here = ", ".join(f"{100 * x / (34 + x):.0f} %" for x in core)
    row("memory that it saves on a single device, 175B, 530B", "70 %, 65 %", here)
    models = PAPER_MODELS.values()
    shares = [first_stage_bytes(m, True, "selective") / first_stage_bytes(m, False, "none") for m in models]
    here = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"
    verdict = max(shares) < 0.2 or "530B and 1T miss it by a little"
    row("memory with both, of tensor parallelism's", "under 20 %", here, verdict)
    extra = extra_bytes(PAPER_MODELS["22B"]) / first_stage_bytes(PAPER_MODELS["22B"], True, "none")
    verdict = extra < 1e-4 or "its own formula says so"
    row("what the ends of the network add, 22B", "under 0.01 %", f"{100 * extra:.2f} %", verdict)
    row("time added by full, selective, sequence parallelism", "39, 7, −3 %", "–", "needs 8 A100s; see make bench")
    return rows


def dry_run() -> dict[str, list[tuple[int, float, int]]]:
    """Of each published model's layer, in each mode, bytes kept, formula and operations. A process has one world, and
    this one's is real: so it runs in another."""
    numbers = "{name: [[c.kept, c.formula, c.flops] for c in s.paper_scale(name)] for name in s.PAPER_MODELS}"
    program = f"import json, seq_parallel as s; print(json.dumps({numbers}))"
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    options = dict(env=clean, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE)
    return json.loads(subprocess.run([sys.executable, "-c", program], **options).stdout)


SIZES = dict(
    num_layers="layers, L",
    hidden_size="hidden size, H",
    num_heads="attention heads, N; the ranks must divide them (default: 4, or one for each rank)",
    seq_length="tokens of a sequence, S; the ranks must divide them",
    dropout="probability; the paper trains with 0.1",
)


def config_of(args) -> GPTConfig:
    sizes = {name: getattr(args, name) for name in SIZES}
    return GPTConfig(vocab_size=tokenizer(args.tokenizer).n_vocab, seed=args.seed, **sizes)


def flags() -> argparse.Namespace:
    parser = common_flags(__doc__.splitlines()[0], steps=40)
    flag = parser.add_argument
    flag("--sequence-parallel", action=argparse.BooleanOptionalAction, default=True, help="or tensor parallelism alone")
    flag("--recompute", choices=RECOMPUTE, default="selective", help="what backward computes again")
    for name, text in SIZES.items():
        default = getattr(GPTConfig, name)
        shown = dict(num_layers=2, num_heads=argparse.SUPPRESS).get(name, default)
        flag("--" + name.replace("_", "-"), type=type(default), default=shown, help=text)
    flag("--batch", type=int, default=8, help="sequences of a step")
    flag("--lr", type=float, default=1e-3, help="learning rate, after ten steps of warm-up")
    flag("--tokenizer", default="bytes", help="bytes, or any name that tiktoken knows")
    flag("--paper-scale", choices=PAPER_MODELS, help="count a layer of that model on pretended ranks, and stop")
    args = parse_flags(parser, ranks=4)
    args.num_heads = getattr(args, "num_heads", max(GPTConfig.num_heads, args.world_size))
    try:
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch}: at least 1")
        check_tp(config_of(args), args.world_size)
        if args.seq_length % args.world_size:
            more = -(-args.seq_length // args.world_size) * args.world_size
            raise ValueError(f"--seq-length {args.seq_length} does not divide over {args.world_size} ranks: try {more}")
        TextData(args.data, args.tokenizer, args.seq_length)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


# The rest is carried: text data, at home in chapter 2; counter, claims table, flags and launcher, in chapter 1.
# region carried: text data (home: 02_megatron_tp)
def tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`: 256 tokens, a byte each, built here; any other name is asked of tiktoken, which may download it."""
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"tokenizer {name!r} is unknown; use bytes or one of {tiktoken.list_encoding_names()}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network library of the day raises
        why = f"is not on this machine and cannot be downloaded ({type(error).__name__})"
        raise ValueError(f"tokenizer {name!r} {why}; use bytes") from error


class TextData:
    """Tokens of a UTF-8 text, nine tenths to train on; without a path, of the sources of Python's own library.

    Raises: ValueError where the text is not UTF-8 or shorter than the sequences need.
    """

    def __init__(self, path: str, tokenizer_name: str, seq_length: int):
        self.encoding, self.seq_length, self.source = tokenizer(tokenizer_name), seq_length, path or "Python's library"
        sources = [Path(path)] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
        try:
            text = "".join(source.read_text("utf-8") for source in sources)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from error
        self.tokens = torch.tensor(self.encoding.encode_ordinary(text), dtype=torch.int64)
        cut = len(self.tokens) * 9 // 10
        self.parts = self.tokens[:cut], self.tokens[cut:]
        if len(self.parts[1]) <= seq_length:
            need = f"its last tenth must be longer than a sequence of {seq_length}"
            raise ValueError(f"{self.source} has {len(self.tokens)} tokens; {need}")

    def batch(self, step: int, batch: int, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """The global batch of a step, tokens and targets (batch, S): a function of the seed and the step alone."""
        part, key = self.parts[held_out], f"{seed} {step} {held_out}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        starts_B = torch.randint(len(part) - self.seq_length, (batch,), generator=generator)
        window_BS = part[starts_B[:, None] + torch.arange(self.seq_length + 1)]
        return window_BS[:, :-1], window_BS[:, 1:]

    def decode(self, tokens_S: Tensor) -> str:
        return self.encoding.decode(tokens_S.tolist(), errors="replace")


# endregion copy 316961
# region carried: training log (home: 01_deepspeech)
def read_step(step: int, loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Loss and gradient norm of a step as floats, in one host synchronisation.

    loss, norm: scalars on one device, the same on every rank: so all ranks stop in the same step.
    Raises: FloatingPointError where one of them is not finite. Do not save the weights then.
    """
    loss_value, norm_value = torch.stack([loss, norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        found = f"step {step}: loss {loss_value}, gradient norm {norm_value}"
        raise FloatingPointError(f"{found}. Lower the learning rate, or look at this step's batch")
    return loss_value, norm_value


# endregion
# region carried: counter (home: 01_deepspeech)
Message = namedtuple("Message", "op bytes group")  # bytes: the larger of what goes in and what comes out, on this rank


class Counter(TorchDispatchMode):
    """`with Counter() as counter:` lists in counter.messages every collective, send and receive of this rank."""

    def __enter__(self):
        self.messages = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "barrier" not in function.name():
            name = function.name().removeprefix("c10d::").strip("_")  # such as allreduce, or allgather_base
            sizes = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            op = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
            self.messages.append(Message(op, max(sizes), dist.ProcessGroup.unbox(group).group_name))
        return function(*args, **(kwargs or {}))


# endregion copy 0c0eaa
# region carried: claims table (home: 01_deepspeech)
def print_claims(rows: list[tuple[str, str, str, bool | str]]) -> bool:
    """Prints (claim, paper, here, verdict) as a table; a verdict is True, False, or what would be needed for one.

    Returns False where a claim fails.
    """
    words = [(*row[:3], {True: "ok", False: "FAILED"}.get(row[3], row[3])) for row in rows]
    table = [("claim", "paper", "here", "verdict"), *words]
    widths = [max(len(row[column]) for row in table) + 2 for column in range(4)]
    for row in table:
        print("".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return not any(row[3] is False for row in rows)


# endregion copy 6f0d29
# region carried: flags (home: 01_deepspeech)
def common_flags(description: str, steps: int) -> argparse.ArgumentParser:
    """The flags that every chapter has; `parse_flags` reads them."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):  # a default of None or "" says nothing
            return super()._get_help_string(action) if action.default not in (None, "") else action.help

    usage = "%(prog)s [flags]; --help lists them"
    parser = argparse.ArgumentParser(description=description, usage=usage, formatter_class=Help)
    flag = parser.add_argument
    flag("--ranks", type=int, help="processes on this machine (default: the chapter's; all GPUs where there are more)")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if each rank gets its own GPU")
    flag("--backend", choices=("auto", "nccl", "gloo"), default="auto", help="auto: nccl if each rank has its own GPU")
    flag("--dtype", choices=("auto", "fp64", "fp32", "bf16"), default="auto", help="auto: fp32, on GPUs bf16 autocast")
    flag("--steps", type=int, default=steps, help="optimiser steps")
    flag("--seed", type=int, default=0, help="of weights, batches and dropout")
    flag("--data", default="", metavar="FILE", help="what to train on; by default something that every machine has")
    flag("--check", action="store_true", help="only prove the equivalence on these ranks, backend and dtype")
    flag("--timeout", type=float, default=60.0, metavar="SECONDS", help="a collective that waits longer fails")
    flag("--trace", metavar="FILE", help="write rank 0's profiler trace, for chrome://tracing or Perfetto")
    return parser


def parse_flags(parser: argparse.ArgumentParser, ranks: int) -> argparse.Namespace:
    """Reads the flags and settles every auto; whatever cannot be had ends in one line, before any rank starts."""
    args, gpus, joined = parser.parse_args(), torch.cuda.device_count(), "LOCAL_RANK" in os.environ
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if joined else args.ranks or max(ranks, gpus)
    if local < 1 or args.ranks not in (None, local):
        parser.error(f"--ranks {args.ranks}: " + (f"torchrun has started {local}" if joined else "at least 1"))
    if args.device == "auto":
        args.device = "cuda" if args.backend == "nccl" or (args.backend == "auto" and gpus >= local) else "cpu"
    if args.backend == "auto":
        args.backend = "nccl" if args.device == "cuda" and gpus >= local and dist.is_nccl_available() else "gloo"
    if args.device == "cuda" and not gpus:
        parser.error("cuda is asked for, but torch sees no GPU here: use --device cpu")
    if args.backend == "nccl" and (args.device == "cpu" or not dist.is_nccl_available()):
        parser.error("--backend nccl needs GPUs and a torch with NCCL: use --backend gloo")
    if args.backend == "nccl" and local > gpus and torch.cuda.nccl.version() < (2, 30):
        parser.error(f"NCCL wants a GPU a rank: {local} ranks, {gpus} GPUs; use --backend gloo or --ranks {gpus}")
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", str(int(local > gpus)))  # newer ones let ranks share when told
    if args.steps < 0 or not 0 < args.timeout < 1e9 or not 0 <= args.seed < 2**63:
        numbers = f"--steps {args.steps}, --timeout {args.timeout}, --seed {args.seed}"
        parser.error(f"{numbers}: none below zero, the timeout above it and below 1e9, the seed below 2**63")
    for name in ("trace", "save", "checkpoint"):  # found out before hours of training, not behind them
        path = getattr(args, name, None)
        if path and (os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)):
            parser.error(f"--{name} {path}: is a folder, or its folder does not exist or cannot be written")
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    args.ranks, args.world_size = local, int(os.environ["WORLD_SIZE"]) if joined else local
    return args


# endregion copy b40150
# region carried: launcher (home: 01_deepspeech)
def say(text: str = "") -> None:
    """Rank 0 prints."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def make_group(rank_lists: list[list[int]], device: torch.device, timeout: float) -> dist.ProcessGroup:
    """The group of this rank among `rank_lists`. All ranks must call it, with the same lists in the same order.

    A subgroup does not inherit the timeout. Its first collective runs here: NCCL builds its connections then, and would
    hang in a first send that only two ranks know of.
    """
    group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=timedelta(seconds=timeout))
    dist.all_reduce(torch.ones(1, device=device), group=group)
    return group


def launch(main: Callable, args: argparse.Namespace) -> None:
    """Runs main(args, device) on every rank: joins the world that torchrun made, or becomes torchrun first."""
    if "LOCAL_RANK" not in os.environ and args.ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    record(run_rank)(main, args)  # keeps this rank's error for torchrun, which prints the first one last


def run_rank(main: Callable, args: argparse.Namespace) -> None:
    """One rank: its device, the process group of all ranks, then main."""
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks with two threads each are several times slower than with one
    alone = {} if "LOCAL_RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    device_id, profile, code = device if args.backend == "nccl" else None, contextlib.nullcontext(), 0
    try:
        dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout), device_id=device_id, **alone)
        dist.all_reduce(torch.ones(1, device=device))
        if args.trace and dist.get_rank() == 0:
            profile = torch.profiler.profile()
        with profile:
            try:
                main(args, device)
            except SystemExit as end:  # --check, and claims that failed: the ranks end together all the same
                code = end.code
        dist.barrier()
    except RuntimeError as error:
        if "by peer" in str(error) or "Broken pipe" in str(error):
            time.sleep(5)  # another rank died, and we merely noticed: let torchrun find that one first
        raise
    finally:  # also of a run that failed
        if isinstance(profile, torch.profiler.profile):
            write_trace(profile, args.trace)
    dist.destroy_process_group()
    sys.exit(code)


def write_trace(profile: torch.profiler.profile, path: str) -> None:
    """Writes a trace as a whole or not at all. Raises OSError: of a full disk the profiler tells nobody but its log."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f"unfinished.{name}")  # a name that ends in .gz asks for compression
    try:
        profile.export_chrome_trace(aside)
        os.replace(aside, path)
    except OSError as error:
        for left in (aside, f"{aside}.tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(left)
        raise OSError(f"--trace {path} cannot be written; is the disk full?") from error


# endregion copy 9537e9


if __name__ == "__main__":
    arguments = flags()
    if arguments.paper_scale:
        model = PAPER_MODELS[arguments.paper_scale]
        print(f"one layer of {arguments.paper_scale}: s {SEQUENCE}, b {model.micro_batch}, h {model.h}, a {model.a}, "
              f"t {model.t}, pretended\n")  # fmt: skip
        print_costs(paper_scale(arguments.paper_scale), SEQUENCE * model.micro_batch * model.h)
        print("\nkept by a GPU of the first pipeline stage, all layers and micro-batches, in GB:")
        print(", ".join(f"{mode_name(*mode)} {first_stage_bytes(model, *mode) / 1e9:.1f}" for mode in MODES))
    else:
        launch(main, arguments)
