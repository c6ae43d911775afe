# SPDX-License-Identifier: MIT-0
"""Chapter 2. Tensor parallelism: one model, cut inside every layer.

Paper: Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism,
       Shoeybi et al., 2019, arXiv 1909.08053

The problem. Chapter 1 keeps the whole model on every rank. But a parameter takes 16 bytes in fp32 (itself, its
gradient, Adam's two moments), so 8.3 billion take 133 GB, and a GPU of 2019 has 32. More ranks with a whole copy each
do not help: the model itself must be cut.

The idea. Cut every layer so that each GPU computes on its own until one sum is left to do. The feed-forward layer
z = gelu(x W1) W2, on two ranks, W1 cut by columns and W2 by rows:

                    x                            every rank holds all of x
            ┌───────┴───────┐     copy_to_tp     forward: nothing       backward: all-reduce
        rank 0            rank 1
     x · W1[:, left]   x · W1[:, right]          gelu acts on each number by itself: no rank needs another's columns
          gelu              gelu
       · W2[top]         · W2[bottom]            each rank ends with a summand of z, as large as z
            └───────┬───────┘     reduce_from_tp forward: all-reduce    backward: nothing
                    z                            every rank holds all of z

Attention is cut the same way, by heads. That is one all-reduce forward and one backward for each half of a layer, and
nothing else: the layers themselves stay as they are, and only their matrices know that there are other ranks.

Run it (no flag is needed; --help lists them):

    python 02_megatron_tp/megatron_tp.py                             4 ranks on this machine, as 2 tensor × 2 data
    python 02_megatron_tp/megatron_tp.py --ranks 1                   one process, for a debugger
    python 02_megatron_tp/megatron_tp.py --check                     equivalence alone, each tensor's error
    python 02_megatron_tp/megatron_tp.py --data my.txt --tokenizer gpt2 --hidden-size 768 --num-heads 12
    python 02_megatron_tp/megatron_tp.py --paper-scale 8.3B          a published model on 8 pretended ranks, in seconds
    torchrun --nproc-per-node=8 02_megatron_tp/megatron_tp.py --tp 8 --num-heads 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 02_megatron_tp/megatron_tp.py

It proves in float64 that every gradient equals the single device's, trains a small GPT on real text beside the
single-device model, writes a line of text, and ends in a table of the paper's claims.

Left out: fp16 with loss scaling (bf16 autocast instead), sending replicas' gradients while backward still runs, the
paper's BERT heads and its evaluations, a cache for generation, fused kernels.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension. A CAPITAL is the whole dimension, the small letter
# this rank's share of it, and partial_ marks a summand that is still to be reduced:
#
#     B  batch (of this replica)        N  attention heads        n = N / tp    this rank's heads
#     S  sequence, in tokens            D  size of a head
#     H  hidden size (the paper's h)    F  feed-forward size      f = F / tp    this rank's feed-forward features
#     L  layers (the paper's N)         V  words in vocabulary    v: V, padded, over tp   this rank's words
#
# A digit is a literal size, as in index_BS1. tp is the number of ranks that share one copy of the model, dp the
# number of copies, the *replicas*: world size = tp · dp. (F with a dot behind it is torch.nn.functional.)

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
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


# region shared: GPT config
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


# endregion

# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# A GPT on a single device, in ordinary PyTorch: the thing to equal. Three details matter later:
#
# · The rows of the fused matrix for queries, keys and values are ordered (head, {q, k, v}, D). So the first half of its
#   rows is the first half of the heads, complete: a cut by rows is a cut by heads. (The order (q, k, v) would give the
#   first of two ranks all queries and half of the keys.)
# · The last layer has no weight of its own: it multiplies with the embedding table ("tied head").
# · Each layer adds two outputs to x, attention's and the feed-forward layer's, 2L in all. The weight that makes such an
#   output starts smaller by 1/√(2L), so that the sum starts no larger than in a shallow one. [the paper's section 4.2]
#
# What will be cut is handed in: the table of words, and the two matrices of attention and of the feed-forward layer.
# So part 2 can hand in parallel ones; where it does, N and F in these lines are this rank's n and f.
#
# Dropout takes its generator as an argument, because in section 2.6 two of them will be needed; PyTorch's own takes
# none, and on the CPU its mask is as wide as x. Ours is a product with a mask of one byte an element, which is all that
# autograd keeps of it.


# region shared: plain GPT
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


# endregion

# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────
#
# Rank, group and collective are explained in chapter 1, at the beginning of its part 2; so are the four functions that
# follow here. Two collectives are enough for this chapter:
#
#     all-reduce    rank 0: a    rank 1: b     →    rank 0: a + b     rank 1: a + b
#     all-gather    rank 0: a    rank 1: b     →    rank 0: [a, b]    rank 1: [a, b]


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
# Between two doors each rank works alone on its share. A door is a function with a gradient of its own:
#
#                       forward                backward
#     copy_to_tp        nothing                all-reduce       every rank used x: their gradients add up
#     reduce_from_tp    all-reduce             nothing          y is a sum: dL/dy goes to each summand
#     scatter_to_tp     keep my share          all-gather       each rank knows the gradient of its share alone
#     gather_from_tp    all-gather             keep my share    what follows is the same on every rank
#
# Each line turned around is another line: two doors are each other's gradient. The first pair is the Megatron-LM
# paper's f and g. So a door is two small functions, one for the way there and one for the way back, in one Function.
# (A plain dist.all_reduce has no backward: autograd passes the gradient on as it is, which is right for g by
# accident, and there is no f.)
#
# Leave out copy_to_tp, and training still runs: the loss falls, but every weight below gets one rank's summand for its
# gradient. It is the commonest bug of home-made tensor parallelism, and only a look at gradients shows it.


# region shared: tensor-parallel operators
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


# endregion

# ── 2.2 Linear layers ───────────────────────────────────────────────────────────────────────────────────
#
# The product y = x Wᵀ + b can be cut in two ways (PyTorch keeps W as out × in, so the paper's columns are our rows):
#
#     column-parallel    each rank has some outputs:    y_BSf = x_BSH W_fHᵀ + b_f          x whole, y a share
#     row-parallel       each rank has some inputs:     partial_z_BSH = y_BSf W_Hfᵀ        y a share, z a summand
#
# The bias of the second is added once, after the sum: added before, it would count tp times.
#
# The backward of the first has two products. The input's gradient is a summand, so it needs an all-reduce; the weight's
# gradient needs nobody. So the first is computed, sent on its way, and the second computed while it travels:
#
#     partial_dx = dy W      ──► all-reduce ─────────────────────►  dx         on the wire
#                               dW = dyᵀ x, db = Σ dy               wait       in the arithmetic units
#
# That is copy_to_tp and the product in one function, and the reason that such a layer does not call copy_to_tp as
# well: the gradient would be summed twice, and come out tp times too large. On a GPU the overlap asks that the
# all-reduce really starts first: set CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment for that, as Megatron-LM demands.
#
# A layer is PyTorch's own, whose weight is cut when it has been drawn, whole, on every rank, from the same state of the
# random generator: so it is equal to the bit to the plain one whatever tp is. Drawn share by share from the same seed,
# all shares would be equal. And doors fit layers: a share that is wanted whole goes through gather_from_tp behind a
# column-parallel layer, and a whole input through scatter_to_tp in front of a row-parallel one. Two arguments, with
# Megatron-LM's names, do that.


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSH, weight_fH, bias_f, group):
        ctx.save_for_backward(x_BSH, weight_fH)
        ctx.group = group
        return F.linear(x_BSH, weight_fH, bias_f)

    @staticmethod
    @once_differentiable  # autograd does not see the all-reduce, and a second derivative would be wrong
    def backward(ctx, grad_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        partial_grad_BSH = reduction = None
        if ctx.needs_input_grad[0]:
            partial_grad_BSH = grad_BSf @ weight_fH
            if group_size(ctx.group) > 1:  # async: it returns at once, and works in place until it has been waited for
                reduction = dist.all_reduce(partial_grad_BSH, group=ctx.group, async_op=True)
        grad_fH = einsum(grad_BSf, x_BSH, "... f, ... H -> f H") if ctx.needs_input_grad[1] else None
        grad_f = reduce(grad_BSf, "... f -> f", "sum") if ctx.needs_input_grad[2] else None
        if reduction is not None:
            reduction.wait()
        return partial_grad_BSH, grad_fH, grad_f, None  # the first is whole now


def _as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Autocast narrows F.linear's arguments, but is off in backward, where the tensors that we saved would still be
    wide and meet narrow gradients. So they are narrowed before, once."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [t if t is None or t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(kind)) for t in tensors]


class ColumnParallelLinear(nn.Linear):
    """nn.Linear with its outputs divided over `group`: x_BSH, (..., in_features) to (..., out_features / tp).

    in_features, out_features, bias: as nn.Linear's, over all ranks. gather_output: return (..., out_features) on every
    rank instead of this rank's share. group: the tensor-parallel one; None is all ranks.

    The input is whole and equal on every rank, and so is its gradient, which the layer sums over `group` by itself: do
    not call `copy_to_tp` in front of it. Parameters start as rows of nn.Linear's, drawn whole from the default
    generator, which must be in the same state on every rank (torch.manual_seed).

    Raises: ValueError where out_features does not divide over the ranks. Source: section 3 of the paper.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gather_output: bool = False, group=None):
        super().__init__(in_features, out_features, bias)
        self.gather_output, self.group = gather_output, group
        self.weight = nn.Parameter(_slice(self.weight.detach(), group, 0, "out_features"))
        self.bias = nn.Parameter(_slice(self.bias.detach(), group, 0)) if bias else None

    def forward(self, x_BSH: Tensor) -> Tensor:
        y_BSf = _ColumnParallelLinear.apply(*_as_autocast(x_BSH, self.weight, self.bias), self.group)
        return gather_from_tp(y_BSf, self.group) if self.gather_output else y_BSf


class RowParallelLinear(nn.Linear):
    """nn.Linear with its inputs divided over `group`: x, (..., in_features / tp) to (..., out_features), whole.

    Arguments as `ColumnParallelLinear`'s; in_features is the number over all ranks, and the bias is whole.
    input_is_parallel: x is this rank's share; if not, it is whole, and the layer takes its share. Parameters start as
    there: as columns of nn.Linear's weight, drawn whole.

    Raises: ValueError where in_features does not divide over the ranks. Source: section 3 of the paper.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, input_is_parallel: bool = True, group=None
    ):
        super().__init__(in_features, out_features, bias)
        self.input_is_parallel, self.group = input_is_parallel, group
        self.weight = nn.Parameter(_slice(self.weight.detach(), group, 1, "in_features"))

    def forward(self, x: Tensor) -> Tensor:
        y_BSf = x if self.input_is_parallel else scatter_to_tp(x, self.group)
        partial_z_BSH = F.linear(y_BSf, self.weight)
        z_BSH = reduce_from_tp(partial_z_BSH, self.group)
        return z_BSH if self.bias is None else z_BSH + self.bias.to(z_BSH.dtype)


# ── 2.3 Attention and the feed-forward layer ────────────────────────────────────────────────────────────
#
# A column-parallel matrix in, a row-parallel one out, and between them what the plain model does, on fewer heads and
# fewer features: no line of it knows that there are other ranks, so it *is* the plain model's. `Attention` and `MLP` of
# part 1 get other matrices, and that is all. Norms, residual connections and outer dropout stand outside the region,
# where every rank holds everything and computes the same: that is `Block`, as it is.
#
# Why columns first? Rows first would end in summands before the gelu, and gelu(a + b) is not gelu(a) + gelu(b): one
# more all-reduce in each direction. The same holds of softmax, and a head is all that a softmax needs: so a cut may run
# between heads, but not through one.


def parallel_matrices(group=None) -> list[Callable]:
    """What `Attention` and `MLP` of part 1 take behind their configuration to be divided over `group`: column and row.

    Attention's heads must divide over the ranks (`check_tp`). Source: section 3 of the paper.
    """
    return [partial(layer, group=group) for layer in (ColumnParallelLinear, RowParallelLinear)]


# ── 2.4 The embedding ───────────────────────────────────────────────────────────────────────────────────
#
# The table of words is the largest tensor of a small model, and the last layer uses it a second time. It is cut by
# words: each rank looks up its own and leaves zeros for the others, and the sum over ranks has every word once.
#
# 50,257 words do not divide by 8, so the table is padded. The paper pads to a multiple of 128·tp, 51,200 words: that
# suits the matrix units of the GPU. Every rank has as many rows; the last ones may hold some padding, or nothing
# else.


# region shared: padded vocabulary
def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """vocab_size, rounded up to a multiple of multiple·tp. Source: section 5.1 of the Megatron-LM paper."""
    return math.ceil(vocab_size / (multiple * tp)) * multiple * tp


def _local_words(words_BS: Tensor, v: int, group=None) -> tuple[Tensor, Tensor]:
    """Of each word its row on this rank, which holds words [r·v, (r + 1)·v), and whether it has one; else any row."""
    row_BS = words_BS - group_rank(group) * v
    return row_BS.clamp(0, v - 1), (row_BS >= 0) & (row_BS < v)


# endregion


class VocabParallelEmbedding(nn.Embedding):
    """nn.Embedding with its rows divided over `group`: tokens_BS (int64, equal on every rank) to (B, S, H).

    Args: num_embeddings: words that exist; they are padded to a multiple of multiple·tp. embedding_dim: H.
    Rank r holds words [r·v, (r + 1)·v). Rows of padding are zero, and stay so as long as the loss masks them.
    Raises: ValueError for a token outside the vocabulary (looked at on the CPU only).
    Source: section 3 of the paper.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, group=None, multiple: int = 1):
        super().__init__(num_embeddings, embedding_dim)
        padding = padded_vocab_size(num_embeddings, group_size(group), multiple) - num_embeddings
        whole = F.pad(self.weight.detach(), (0, 0, 0, padding))
        self.group = group
        self.weight = nn.Parameter(_slice(whole, group, 0))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        if _readable(tokens_BS) and ((tokens_BS < 0) | (tokens_BS >= self.num_embeddings)).any():
            raise ValueError(f"token {tokens_BS.max()} or {tokens_BS.min()} is no word in [0, {self.num_embeddings})")
        row_BS, mine_BS = _local_words(tokens_BS, self.weight.shape[0], self.group)
        x_BSH = F.embedding(row_BS, self.weight)  # not mine: any row, which the next line drops
        partial_x_BSH = torch.where(mine_BS[..., None], x_BSH, 0)
        return reduce_from_tp(partial_x_BSH, self.group)


# ── 2.5 Cross entropy over a vocabulary that no rank holds ──────────────────────────────────────────────
#
# The last layer is the widest: with 51,200 words and a batch of 8 × 1,024 tokens the logits are 1.7 GB in fp32, twice
# that with their gradient. Column-parallel, each rank holds its own words' columns, logits_BSv. To gather them for a
# softmax would undo the saving, and the loss needs so little of them:
#
#     loss = log Σ_j exp(x_j) − x_target
#
# one sum and one picked number for each token. Both are sums over words, so each rank does its own words' part, and
# three numbers a token finish the job: 3·B·S numbers are reduced instead of B·S·V gathered.
#
#     max over my words            ─ all-reduce(max) ─►  m               so that exp cannot overflow
#     Σ of exp(x_j − m), my words  ─ all-reduce(sum) ─►  Σ               these two travel
#     x_target − m, if mine        ─ all-reduce(sum) ─►  x_target − m    in one message; every other rank adds 0
#
# and the loss is log Σ − (x_target − m).
#
# Backward needs no communication at all: d loss / d x_j = softmax_j − [j is the target], and each rank knows both for
# its own words.
#
# Three mistakes stay silent here. Columns that only pad the vocabulary are words to a softmax unless they are masked:
# the loss comes out too large by a little. (Megatron-LM leaves them in, and lets training push them down: its first
# loss is log 51,200 = 10.84, not log 50,257 = 10.82. Ours equals the unpadded model's.) Logits that somebody has
# gathered already look like tp times as many words: the loss is too large by log tp, or, where vocab_size masks what
# is too much, it is even right, and no rank but the first gets a gradient. And bf16 logits must be widened before the
# exponentials.


# region shared: vocabulary loss
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


# endregion

# ── 2.6 One mask outside the region, another inside on each rank ────────────────────────────────────────
#
# Outside the region all ranks hold the same tensor, and must drop the same elements: with different masks the copies
# of one replica drift apart, and no error ever says so. Inside, each rank holds other heads, and must drop others:
# with the same mask head 0 and head n, the first of the next rank, always lose the same attention weights. So each rank
# draws from two generators. Replicas see different data and get different masks, on either side.
#
# A generator has a state, and a state would have to be saved with every checkpoint, and put back wherever something is
# computed again. So we make masks a function of where they stand: a fresh pair of generators for each step and layer,
# seeded with its place.


Streams = Callable[[int], RandomStreams]  # the layer's number (−1: the embedding) to its pair of generators


def random_streams(seed: int, step: int = 0, tp_rank: int = 0, dp_rank: int = 0, device="cpu") -> Streams:
    """Dropout's generators for one step on one rank.

    `outside` is equal on all ranks of a replica, `inside` on no two ranks; the same arguments give the same masks.
    Source: appendix B.2 of the paper, which keeps two states instead.
    """

    def stream(*place):  # a 32-bit seed from all of the place: PyTorch's CPU generator looks at 32 bits and no more
        key = repr((seed, step, dp_rank, *place))
        return torch.Generator(device).manual_seed(zlib.crc32(key.encode()))

    return lambda layer: RandomStreams(outside=stream(layer), inside=stream(layer, tp_rank))


# ── 2.7 The model ───────────────────────────────────────────────────────────────────────────────────────
#
# The plain model again, with a table of words and halves of layers that are divided. The tied head multiplies x with
# this rank's words: a column-parallel product, with x coming in through the door, which is the plain way to write what
# ColumnParallelLinear does in one function. Its weight is the embedding's shard, so lookup and head add their gradients
# into the same rows, and nothing remains to be summed between ranks.
#
# `shard_tensor`, which cuts a whole tensor, and `check_tp` are the subject of part 3.
#
# A model that is large for its GPUs keeps only the input of each layer, and computes the layer once more in backward:
# a third more arithmetic, and two all-reduces more a layer. [the paper's section 4.2] The second time must draw the
# same masks; it does, because it asks for the generators of the same place.


class ParallelGPT(GPT):
    """The plain `GPT` with every layer divided over `group`: tokens_BS to this rank's logits (B, S, v).

    recompute: keep no layer's activations, at the price of a second forward pass. Changes no number.

    Its weights are those that GPT(config) has, whatever the number of ranks; no more than one whole tensor is in memory
    at a time. Its parameters have the plain model's names.

    Raises: ValueError where heads or feed-forward features do not divide over the ranks, for a sequence longer than the
    positions, for dropout on several ranks without streams, and for tied_head=False.
    Source: section 3 of the paper.
    """

    def __init__(self, config: GPTConfig, group=None, recompute: bool = False):
        if not config.tied_head:
            raise ValueError("tied_head=False: the head of this model is its embedding table")
        rank, tp = group_rank(group), group_size(group)
        check_tp(config, tp)
        words = partial(VocabParallelEmbedding, group=group, multiple=config.vocab_multiple)
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(config, words, *parallel_matrices(group))
        self.group, self.recompute = group, recompute
        shares = {name: shard_tensor(name, whole, config, rank, tp) for name, whole in initial_weights(config)}
        self.load_state_dict(shares, assign=True)  # puts them in the place of the shapes

    def forward(self, tokens_BS: Tensor, streams: Streams | None = None) -> Tensor:
        p = self.config.dropout if self.training else 0.0
        if p and group_size(self.group) > 1 and streams is None:
            raise ValueError(f"dropout={p} on {group_size(self.group)} ranks needs streams=random_streams(seed, ...)")
        streams = streams or (lambda layer: RandomStreams())
        x_BSH = dropout(embed(self.embedding, self.positions, tokens_BS), p, streams(-1).outside)
        twice = self.recompute and self.training
        run = partial(checkpoint, self._layer, use_reentrant=False) if twice else self._layer
        for number in range(len(self.layers)):
            x_BSH = run(number, x_BSH, streams)
        return F.linear(copy_to_tp(self.final_norm(x_BSH), self.group), self.embedding.weight)

    def _layer(self, number: int, x_BSH: Tensor, streams: Streams) -> Tensor:
        return self.layers[number](x_BSH, streams(number))  # asks for its generators each time that it runs

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor, streams: Streams | None = None) -> Tensor:
        """Cross entropy of each token in nats, (B, S), the same on every rank; 0 where the target is −100."""
        logits_BSv = self(tokens_BS, streams)
        return vocab_parallel_cross_entropy(logits_BSv, targets_BS, self.group, self.config.vocab_size)

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parameters of which this rank holds a share; all others are whole, and equal on every rank."""
        return [p for name, p in self.named_parameters() if shard_dim(name) is not None]


@torch.no_grad()
def generate(model: ParallelGPT, tokens_S: Tensor, new_tokens: int, temperature: float = 0.0, generator=None) -> Tensor:
    """`tokens_S` and `new_tokens` more: the most probable ones, or at a temperature drawn by `generator`.

    The text is the same on every rank, whatever their number, as long as the generators are in the same state. The
    model sees the last seq_length tokens; it computes them all again for each new one. Call model.eval() before.
    Source: ours.
    """
    for _ in range(new_tokens):
        logits_v = model(tokens_S[None, -model.config.seq_length :])[0, -1]
        logits_V = gather_from_tp(logits_v, model.group)[: model.config.vocab_size]  # one row: here a gather is cheap
        word = logits_V.argmax(-1, keepdim=True)
        if temperature:
            word = torch.multinomial((logits_V.double() / temperature).softmax(-1), 1, generator=generator)
        tokens_S = torch.cat([tokens_S, word])
    return tokens_S


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# One table says how each parameter is cut. What is not in it is whole on every rank: norms, positions, and the biases
# of row-parallel layers.

# region shared: tensor-parallel weights
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


# endregion


def gather_state_dict(tensors: dict[str, Tensor], config: GPTConfig, group=None) -> dict[str, Tensor]:
    """Every rank's shares to whole tensors, one at a time, on the CPU of the group's first rank; the others get {}.

    tensors: this rank's, by parameters' names and of their shapes: weights, gradients or moments. Every rank of the
    group must call it. Returns: the same names, of the plain model's shapes.
    Raises: what `merge_state_dicts` does.
    """
    full = {}
    for name, x in tensors.items():
        mine = {name: x.detach().cpu()}
        shards = [mine] * group_size(group) if group_rank(group) == 0 else None
        if dist.is_initialized():
            dist.gather_object(mine, shards, group=group, group_dst=0)
        full |= merge_state_dicts(shards, config) if shards else {}
    return full


# ── 3.1 Checkpoints ─────────────────────────────────────────────────────────────────────────────────────
#
# A checkpoint is one safetensors file of whole tensors, so it knows nothing of tp and can be read at any; its weights
# have the plain model's names, so that others can read it, too. Besides weights a run needs Adam's two moments and the
# number of steps done, which is also its place in the data, in the learning rate's schedule and in the random streams:
# all three are functions of the step. On the same grid a run that was interrupted goes on to the same bits as one that
# was not. On another, dropout's masks are others; all else is equal.
#
# A run is killed at the worst moment. So the file is written under another name and renamed when it is complete,
# which is one step for the file system: under its name stands either the old checkpoint or the new one. And disks
# lie: every tensor has a checksum, and is refused by name when it is not what was written.


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy())


def run_state(model: ParallelGPT, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The live tensors of a run on this rank: each parameter by NAME, its moments as exp_avg.NAME and exp_avg_sq.NAME.

    Returns: all in the shapes of the parameters. One that has made no step yet gets moments of zero.
    """
    state = {}
    for name, p in model.named_parameters():
        if not optimizer.state[p]:
            zeros = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            optimizer.state[p].update(step=torch.tensor(0.0), **zeros)
        state[name] = p.detach()
        state |= {f"{moment}.{name}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return state


def save_checkpoint(file: Path | str, step: int, model: ParallelGPT, optimizer: torch.optim.AdamW, grid: Grid) -> None:
    """Writes the run's state after `step` steps; every rank must call it. Rank 0 holds all of it in host memory.

    The other ranks return before the file is there. Raises: OSError, on rank 0, where it cannot be written; the file
    that stood there before is untouched.
    """
    from safetensors.torch import save_file

    if grid.dp_rank > 0:  # the first replica has it all
        return
    tensors = gather_state_dict(run_state(model, optimizer), model.config, grid.tp_group)
    if grid.tp_rank == 0:
        run = dict(step=step, config=asdict(model.config), checksums={n: _checksum(x) for n, x in tensors.items()})
        aside = Path(f"{file}.unfinished")
        try:
            save_file(tensors, aside, {"run": json.dumps(run)})
            with open(aside, "rb+") as written:
                os.fsync(written.fileno())  # the data before the name: a power cut must not swap them
        except Exception as error:  # safetensors has errors of its own
            aside.unlink(missing_ok=True)
            raise OSError(f"cannot write {file} after step {step}: {error}; an older one there is untouched") from error
        os.replace(aside, file)


def load_checkpoint(file: Path | str, model: ParallelGPT, optimizer: torch.optim.AdamW, grid: Grid) -> int:
    """Reads what `save_checkpoint` wrote, at any tp and dp, each rank for itself; returns the number of steps done.

    Raises: ValueError for a file that is damaged or of another configuration; model and optimizer are as they were.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as data:
            run, ours = json.loads((data.metadata() or {})["run"]), asdict(model.config)
            if other := {k: v for k, v in run["config"].items() if ours[k] != v and k != "vocab_multiple"}:
                raise ValueError(f"{file} is of another configuration: it has {other}")
            for name, checksum in run["checksums"].items():  # all of them, before anything is changed
                if _checksum(data.get_tensor(name)) != checksum:
                    raise ValueError(f"{file} is damaged: {name} is not what was written")
            for name, x in run_state(model, optimizer).items():
                x.copy_(shard_tensor(name, data.get_tensor(name), model.config, grid.tp_rank, grid.tp))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged, or no checkpoint: {error}") from error
    for state in optimizer.state.values():
        state["step"].fill_(run["step"])
    return run["step"]


# ── 3.2 Published weights ───────────────────────────────────────────────────────────────────────────────
#
# GPT-2's published files have the plain model under other names, with two differences: its matrices are stored in × out
# (their "Conv1D"), and the fused one's outputs are ordered ({q, k, v}, head, D).


def load_gpt2(folder: Path | str) -> tuple[GPTConfig, dict[str, Tensor]]:
    """A GPT-2 folder (config.json, and model.safetensors or several with an index) to a configuration and weights.

    Returns: the weights as the plain model's state dict, of the shapes that `parameter_shapes` says.
    Raises: FileNotFoundError; ValueError that names a missing tensor, a shape, or a setting that this model has not.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    theirs = json.loads((folder / "config.json").read_text("utf-8"))
    ours = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)  # fmt: skip
    if other := {key: theirs[key] for key, value in ours.items() if theirs.get(key, value) != value}:
        raise ValueError(f"{folder}/config.json has {other}, which this model cannot be")
    sizes = [theirs.get(key, 0) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")]
    config = GPTConfig(*sizes, ffn_hidden_size=theirs.get("n_inner"), dropout=theirs.get("resid_pdrop", 0.1))
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.exists() else ["model.safetensors"]
    try:
        found = {n.removeprefix("transformer."): x for name in set(files) for n, x in load_file(folder / name).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder}: a file of weights is damaged: {error}") from error

    names = dict(embedding="wte", positions="wpe", layers="h", norm1="ln_1", norm2="ln_2", final_norm="ln_f")
    names |= dict(attention="attn", qkv="c_attn", out="c_proj", up="c_fc", down="c_proj")
    shapes = parameter_shapes(config)
    published = {name: ".".join(names.get(part, part) for part in name.split(".")) for name in shapes}
    turned = {name for name, shape in shapes.items() if "layers" in name and len(shape) == 2}
    expected = {published[name]: shape[::-1] if name in turned else shape for name, shape in shapes.items()}
    check_shapes(f"{folder}", {n: x for n, x in found.items() if n in expected}, expected)
    full = {name: found[published[name]].mT if name in turned else found[published[name]] for name in shapes}
    cut, order = dict(three=3, N=config.num_heads), "(three N D) ... -> (N three D) ..."
    full |= {name: rearrange(x, order, **cut) for name, x in full.items() if "qkv" in name}
    return config, {name: x.contiguous() for name, x in full.items()}


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# Tensor and data parallelism are two directions of one grid. With --tp 2 on 4 ranks:
#
#                      tp rank 0    tp rank 1
#        replica 0      rank 0       rank 1       ← a tp group: the same tokens, other columns of the weights
#        replica 1      rank 2       rank 3
#                         ↑ a dp group: the same columns, other tokens
#
# The ranks of a tp group are neighbours, because they talk in every layer: they belong inside one server.


# A rank's place in the grid. Grid() is for a process without process groups: where there are some, None is all ranks.
Grid = namedtuple("Grid", "tp dp tp_rank dp_rank tp_group dp_group", defaults=(1, 1, 0, 0, None, None))


def make_grid(tp: int, device: torch.device, timeout: float = 60.0) -> Grid:
    """Lays all ranks out as (dp, tp), neighbours in a tp group; every rank must call it.

    timeout: seconds. Raises: ValueError where tp does not divide the ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    replicas = [list(range(first, first + tp)) for first in range(0, world, tp)]
    columns = [list(range(first, world, tp)) for first in range(tp)]
    groups = dict(tp_group=make_group(replicas, device, timeout), dp_group=make_group(columns, device, timeout))
    return Grid(tp=tp, dp=world // tp, tp_rank=rank % tp, dp_rank=rank // tp, **groups)


# ── 4.1 Gradients over replicas ─────────────────────────────────────────────────────────────────────────
#
# The loss of a batch is the mean over its tokens, all tokens of all replicas. Replicas rarely have equally many that
# count (padding and prompts are not learned), so the mean of their means is another number, and another gradient.
# Right is: each replica's sum, divided by the count over all, and gradients then *summed*.
#
# Nothing is summed over the tp group: a shard's gradient is whole as it is, and what is whole on every rank has got the
# same gradient on every rank, since the doors have seen to it.


def sum_gradients(parameters: Iterable[nn.Parameter], group=None) -> None:
    """Sums every gradient over `group`, in one message, for which their memory is needed once more.

    Which parameters take part must not depend on this rank's data, or two ranks send messages of unequal size. So all
    do that require a gradient, and one that has none here counts as zero, for another rank may have one.
    (DistributedDataParallel sends them in buckets while backward still runs.)
    """
    learned = [p for p in parameters if p.requires_grad]
    if not learned or group_size(group) == 1:
        return
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in learned])
    for p, total in zip(learned, _all_reduce(flat, group).split([p.numel() for p in learned])):
        p.grad = total.view_as(p)


# ── 4.2 One norm for a gradient that no rank holds ──────────────────────────────────────────────────────
#
# Why the norm must be that of the summed gradient: chapter 1, section 4.1. New here are shards. They are different
# elements on each rank: their squares are summed over the group. What is whole on every rank is the same elements tp
# times, and counts once. Counted with the shards, it enlarges the norm by up to √tp: training clips too much, and shows
# nothing.


# region shared: clipping
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


# endregion


# ── 4.3 The loop ────────────────────────────────────────────────────────────────────────────────────────
#
# `train_alone` of part 1 once more, line by line. New are a replica's rows, the count over all replicas, the sum of
# their gradients, the norm of shards and the sum of losses: a line each.


def learning_rate(step: int, steps: int, peak: float = 1e-3, warmup: int = 10, floor: float = 1e-5) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to `floor` at step `steps`; step counts from 0.

    Source: section 4.2 of the paper (GPT-2: peak 1.5e-4, 3,000 of 300,000 steps, floor 1e-5).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: ParallelGPT, batches: Batches, lr: Callable[[int], float], grid: Grid,
    streams: Callable[[int], Streams] | None = None, max_norm: float = 1.0, autocast: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None, first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """`train_alone` on a grid: the same arguments, and it yields the same scalars. Every rank must iterate it.

    batches: the global ones. Each replica takes its rows; where dp does not divide them, replicas get unequal shares,
    and the gradient is exact all the same. streams: step to what `random_streams` returns for it. first: the number
    of the first step, in a run that goes on, for which `optimizer` is its optimiser.
    """
    optimizer = optimizer or make_optimizer(model)
    for step, batch in enumerate(batches, first):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        optimizer.zero_grad()
        tokens_BS, targets_BS = (whole.tensor_split(grid.dp)[grid.dp_rank] for whole in batch)
        count = _all_reduce((targets_BS != -100).sum(), grid.dp_group).clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(tokens_BS, targets_BS, streams and streams(step)).sum() / count  # a part of the mean
        loss.backward()
        sum_gradients(model.parameters(), grid.dp_group)
        norm = clip_grad_norm_(model.parameters(), max_norm, model.sharded_parameters(), grid.tp_group)
        optimizer.step()
        yield _all_reduce(loss.detach(), grid.dp_group), norm


# ── 5 The paper's arithmetic ────────────────────────────────────────────────────────────────────────────
#
# What can be recomputed on a laptop: how many parameters the published models have, which share of linear the published
# speed is, and how much one rank of them holds and says. The first is a formula, and the test counts the plain model to
# hold it. The last is this chapter's own code, run on tensors that have shapes and no values, in a world whose other
# ranks are pretended: 8.3 billion parameters in some seconds.


def parameter_count(layers: int, hidden: int, vocab: int = 51_200, seq: int = 1024) -> int:
    """Parameters of a GPT with a tied head.

    A layer has 3H² + 3H for queries, keys and values, H² + H behind attention, 4H² + 4H up, 4H² + H down, and 4H in two
    norms: 12H² + 13H. Around the layers stand the tables of words and positions, and the final norm.
    Source: ours, from section 3 of the paper; it gives table 1's numbers.
    """
    return layers * (12 * hidden**2 + 13 * hidden) + (vocab + seq) * hidden + 2 * hidden


# Table 1: heads of 96 numbers each, a batch of 8 on tp GPUs.
PAPER_MODELS = {  # hidden, heads, layers, tp
    "1.2B": (1536, 16, 40, 1), "2.5B": (1920, 20, 54, 2), "4.2B": (2304, 24, 64, 4), "8.3B": (3072, 32, 72, 8),
}  # fmt: skip


def share_of_linear(flops: float, gpus: int, one_gpu: float = 39e12) -> float:
    """The share of gpus times one GPU's FLOP/s that is reached (39 TFLOP/s, the 1.2 B model on one V100).

    The paper gives two for 8.3 B parameters on 512 GPUs, 76 % in its abstract and 74 % in section 5.1, and one speed,
    15.1 PFLOP/s. That is 75.6 %, so the second share is not of the same measurement.
    Source: the paper's abstract and section 5.1.
    """
    return flops / (gpus * one_gpu)


def paper_scale(name: str) -> dict:
    """One rank's step of a published model, built and run by this same code with no memory and no other rank.

    torch's fake process group answers every collective at once; its fake tensors have shapes and no values. Makes a
    process group, so it wants a process of its own. Returns: parameters of the whole model and of this rank; the
    all-reduces of one B·S·H tensor, forward (two a layer, and one behind the embedding) and backward (one in front of
    the tied head). Source: ours, on table 1's sizes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  torch 2.9 learns there what collectives return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hidden, heads, layers, tp = PAPER_MODELS[name]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    config = GPTConfig(padded_vocab_size(50_257, 8, 128), 1024, hidden, layers, heads)
    with FakeTensorMode():
        model, tokens_BS = ParallelGPT(config), torch.zeros(8, 1024, dtype=torch.int64)
        with Counter() as forward:
            loss = model.loss(tokens_BS, tokens_BS).mean()
        with Counter() as backward:
            loss.backward()
        held, shares = (sum(p.numel() for p in ps) for ps in (model.parameters(), model.sharded_parameters()))
    dist.destroy_process_group()
    size = tokens_BS.numel() * hidden * 4  # bytes of one B·S·H tensor; the loss and its ends send others
    forward, backward = (sum(m.bytes == size for m in counter.messages) for counter in (forward, backward))
    whole = held + (tp - 1) * shares
    return dict(layers=layers, tp=tp, parameters=whole, held=held, forward=forward, backward=backward)


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# Every half of a layer ends in an all-reduce that nobody can do without, and the next half waits for it. For 8.3
# billion parameters and a batch of 8 it carries 8 · 1024 · 3072 numbers, 50 MB in bf16; four in each of 72 layers are
# 14.5 GB a step, and a ring of 8 sends 25 GB through every GPU. At the 150 GB/s within a server of 2019 that is 0.2 s
# beside 1.3 s of arithmetic; at the 12.5 GB/s between servers it is 2 s. So tp is at most 8, the GPUs of one server,
# and a model that does not fit into those needs another cut: chapter 3 cuts between layers, where one such message for
# many layers is enough. And what norm, dropout and residual connections keep for backward is still whole on every rank:
# chapter 4 divides it. (That each replica repeats the optimiser's moments is left to a later chapter.)


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────


def equivalence(grid: Grid, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None = None) -> dict:
    """A small odd model on this grid beside the same on a single device: name to relative error, of every tensor.

    The vocabulary and the batch do not divide over the ranks, and replicas have unequal numbers of tokens that count.
    Errors are per tensor: max|Δ| / max|reference|; after AdamW over max(max|reference|, steps · lr).
    """
    config = GPTConfig(vocab_size=61, seq_length=16, hidden_size=16 * grid.tp, num_layers=2, num_heads=2 * grid.tp)
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 2 * grid.dp + 1, 13), generator=generator).to(device)
    targets_BS[0, 3:] = -100
    plain, parallel = (model.to(device, dtype) for model in (GPT(config), ParallelGPT(config, grid.tp_group)))
    batches, options = [(tokens_BS, targets_BS)] * 5, dict(lr=lambda step: 1e-3, max_norm=0.1, autocast=autocast)
    errors = {}

    def compare(kind: str, what: Callable[[nn.Module], dict], floor: float = 0.0) -> None:
        for name, x in gather_state_dict(what(parallel), config, grid.tp_group).items():  # on first ranks of replicas
            y = what(plain)[name].detach().cpu()
            errors[f"{kind} {name}"] = ((x - y).abs().max() / max(y.abs().max(), floor)).item()

    runs = zip(train_alone(plain, batches, **options), train(parallel, batches, grid=grid, **options))
    for step, ((loss, norm), (loss_here, norm_here)) in enumerate(runs):
        errors |= {f"loss {step}": abs(loss_here / loss - 1).item(), f"norm {step}": abs(norm_here / norm - 1).item()}
        if step == 0:
            compare("gradient of", lambda model: {name: p.grad for name, p in model.named_parameters()})
    if dtype == torch.float64:  # where a gradient is zero Adam divides rounding noise by itself: others cannot tell
        compare("after AdamW", nn.Module.state_dict, floor=5 * 1e-3)
    return errors


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


def check(args, grid: Grid, device: torch.device) -> bool:
    """--check: every tensor's error on the ranks, backend and dtype that are there; True where all are within bound."""
    errors = equivalence(grid, device, *precision(args))
    worst, good = within(errors.values(), BOUNDS[args.dtype])
    say("\n".join(f"{name:60} {error:.1e}" for name, error in errors.items()))
    say(f"\nworst {worst:.1e} relative, bound {BOUNDS[args.dtype]:.0e}; tp {grid.tp} × dp {grid.dp}, {args.dtype}")
    return good


BESIDE = 100_000_000  # parameters of the largest plain model that rank 0 trains beside the parallel one: 1.6 GB


def demonstrate(args, grid: Grid, device: torch.device) -> list[float]:
    """Trains on real text and writes; returns the differences in loss of the first steps from the single device."""
    from tqdm import tqdm

    config, (dtype, autocast) = config_of(args), precision(args)
    data = TextData(args.data, args.tokenizer, config.seq_length)

    def batches(first: int = 0) -> Batches:
        steps = range(first, args.steps)
        return ([x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)] for step in steps)

    options = dict(lr=lambda step: learning_rate(step, args.steps, args.lr), autocast=autocast)
    model = ParallelGPT(config, grid.tp_group, args.recompute).to(device, dtype)
    if args.gpt2:
        model.load_state_dict(shard_state_dict(load_gpt2(args.gpt2)[1], config, grid.tp_rank, grid.tp))
    optimizer, saved = make_optimizer(model), args.checkpoint and Path(args.checkpoint).exists()
    first = load_checkpoint(args.checkpoint, model, optimizer, grid) if saved else 0
    least, most = _all_reduce(torch.tensor([first, -first], device=device), None, dist.ReduceOp.MIN).tolist()
    if least != -most:
        raise ValueError(f"{args.checkpoint} stands at step {first} here, at {least} to {-most} on all: share one disk")
    held = sum(p.numel() for p in model.parameters())
    whole = sum(shape.numel() for shape in parameter_shapes(config).values())
    say(f"{whole:,} parameters, {held:,} on this rank; {data.tokens.numel():,} tokens of {data.source}")
    reasons = {"it would draw other masks": config.dropout, "this run goes on from a checkpoint": first,
               "this run has published weights": args.gpt2, f"too large, above {BESIDE:,}": whole > BESIDE}  # fmt: skip
    alone, why, differences = iter(()), [reason for reason, holds in reasons.items() if holds], []
    if why:
        say(f"no single-device model is trained beside it: {why[0]}")
    elif group_rank() == 0:
        alone = train_alone(GPT(config).to(device, dtype), itertools.islice(batches(), 5), **options)

    say("\nstep      loss    single device      norm")
    quiet = group_rank() > 0 or not sys.stderr.isatty()
    options |= dict(streams=lambda step: random_streams(args.seed, step, grid.tp_rank, grid.dp_rank, device))
    steps = train(model, batches(first), grid=grid, optimizer=optimizer, first=first, **options)
    for step, (loss, norm) in enumerate(tqdm(steps, total=args.steps - first, disable=quiet), first):
        beside = [loss_alone.item() for loss_alone, _ in itertools.islice(alone, 1)]
        differences += [abs(loss.item() - other) for other in beside]
        if step < 5 or step % 20 == 19:
            text = f"{beside[0]:.6f}" if beside else ""
            say(f"{step:4}  {loss.item():.6f}  {text:>15}  {norm.item():8.3f}")
        if args.checkpoint and (step % args.save_every == args.save_every - 1 or step == args.steps - 1):
            save_checkpoint(args.checkpoint, step + 1, model, optimizer, grid)

    model.eval()
    tokens_BS, targets_BS = (x_BS.to(device) for x_BS in data.batch(0, args.batch, args.seed, held_out=True))
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss = model.loss(tokens_BS, targets_BS).mean().item()
        text_S = generate(model, tokens_BS[0, :32], 64, 0.7, torch.Generator(device).manual_seed(args.seed))
    say(f"\nheld-out loss {loss:.4f} nats a token; after {data.decode(text_S[:32])!r} it writes")
    say(f"{data.decode(text_S[32:])!r}\n")
    return differences


def main(args, device: torch.device) -> None:
    grid = make_grid(args.tp, device, args.timeout)
    say(f"torch {torch.__version__}, {args.device}, {args.backend}, {group_size()} ranks: tp {grid.tp} × dp {grid.dp}, "
        f"{args.dtype}, seed {args.seed}\n")  # fmt: skip
    if args.check:
        sys.exit(0 if check(args, grid, device) else 1)
    errors, differences = equivalence(grid, device, torch.float64), demonstrate(args, grid, device)
    if group_rank() > 0:
        return

    rows = []

    def row(claim: str, paper: str, here: str, verdict: bool | str | None = None) -> None:
        rows.append((claim, paper, here, here == paper if verdict is None else verdict))

    kinds = {"gradient": "gradient", "norm": "norm before clipping", "after": "weight after AdamW"}
    for kind, claim in kinds.items():
        worst, good = within((error for name, error in errors.items() if name.startswith(kind)), BOUNDS["fp64"])
        row(f"every {claim} equals the single device's, float64", "exact", f"worst {worst:.1e} relative", good)
    worst, good = within(differences or [math.nan], BOUNDS[args.dtype])
    text = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    row(text, "equal", f"within {worst:.0e}", good if differences else "needs a single device beside")
    for name, (hidden, _, layers, _) in PAPER_MODELS.items():
        row(f"parameters of {layers} layers of {hidden}", name, f"{parameter_count(layers, hidden) / 1e9:.1f}B")
    big = dry_run("8.3B")
    same = big["parameters"] == parameter_count(big["layers"], 3072)
    row("the last, counted in this code on 8 pretended ranks", "8.3B", f"{big['parameters'] / 1e9:.1f}B", same)
    here = " + ".join(f"{(big[way] - 1) / big['layers']:g}" for way in ("forward", "backward"))
    row("its all-reduces in a layer, forward + backward", "2 + 2", here)
    row("50,257 words padded for 8 ranks", "51,200", f"{padded_vocab_size(50_257, 8, 128):,}")
    here = f"15.1 PFLOP/s is {share_of_linear(15.1e15, 512):.1%}"
    row("8.3B on 512 GPUs, share of linear: abstract, section 5.1", "76 %, 74 %", here, "only the abstract adds up")
    row("8.3B on 8 GPUs, share of 8 times one GPU on 1.2B", "77 %", "–", "needs 8 GPUs")
    if not print_claims(rows):
        sys.exit(1)


def dry_run(name: str) -> dict:
    """`paper_scale` in a process of its own: a process has one world, and this one's is real."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, __file__, "--ranks", "1", "--device", "cpu", "--paper-scale", name]
    return json.loads(subprocess.run(command, env=clean, check=True, stdout=subprocess.PIPE).stdout)


SIZES = dict(num_layers="layers, L", hidden_size="hidden size, H", num_heads="attention heads, N; tp must divide them",
             seq_length="tokens of a sequence, S", dropout="probability; the paper trains with 0.1")  # fmt: skip


def config_of(args) -> GPTConfig:
    sizes = {name: getattr(args, name) for name in SIZES}
    if args.gpt2:
        return load_gpt2(args.gpt2)[0]
    return GPTConfig(vocab_size=tokenizer(args.tokenizer).n_vocab, seed=args.seed, **sizes)


def flags() -> argparse.Namespace:
    parser = common_flags(__doc__.splitlines()[0], steps=80)
    flag = parser.add_argument
    text = "ranks that share one copy of the model; must divide all ranks (default: 2, on a single rank 1)"
    flag("--tp", type=int, default=argparse.SUPPRESS, help=text)
    for name, text in SIZES.items():
        default = getattr(GPTConfig, name)
        flag("--" + name.replace("_", "-"), type=type(default), default=default, help=text)
    flag("--batch", type=int, default=16, help="sequences of a step, over all replicas")
    flag("--lr", type=float, default=3e-3, help="peak learning rate")
    flag("--tokenizer", default="bytes", help="bytes, or any name that tiktoken knows")
    flag("--recompute", action="store_true", help="keep each layer's input alone, compute the rest again")
    flag("--checkpoint", metavar="FILE", help="save the run there; where it exists, go on from it")
    flag("--save-every", type=int, default=20, metavar="STEPS", help="steps between two checkpoints")
    flag("--gpt2", metavar="FOLDER", help="start from published GPT-2 weights; use --tokenizer gpt2")
    flag("--paper-scale", choices=PAPER_MODELS, help="dry-run one rank of a published model, and stop")
    args = parse_flags(parser, ranks=4)
    args.tp = getattr(args, "tp", min(2, args.world_size))
    changed = [f"--{name.replace('_', '-')}" for name in SIZES if getattr(args, name) != getattr(GPTConfig, name)]
    try:
        if args.tp < 1 or args.world_size % args.tp:
            raise ValueError(f"--tp {args.tp} must divide the {args.world_size} ranks")
        if min(args.batch, args.save_every) < 1 or not 0 < args.lr < math.inf:
            text = f"--batch {args.batch} and --save-every {args.save_every} must be at least 1"
            raise ValueError(f"{text}, --lr {args.lr} above zero")
        if args.gpt2 and changed:
            raise ValueError(f"--gpt2 takes its sizes from {args.gpt2}/config.json: leave out {' '.join(changed)}")
        config = config_of(args)
        check_tp(config, args.tp)
        if config.vocab_size < (words := TextData(args.data, args.tokenizer, config.seq_length).encoding.n_vocab):
            raise ValueError(f"{args.gpt2} knows {config.vocab_size} words, --tokenizer {args.tokenizer} has {words}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


# region shared: text data
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


# endregion


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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
        print(json.dumps(paper_scale(arguments.paper_scale)))
    else:
        launch(main, arguments)
