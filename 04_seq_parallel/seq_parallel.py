# SPDX-License-Identifier: MIT-0
"""Chapter 4. Sequence parallelism and selective recomputation: a fifth of the activations.

Paper: Reducing Activation Recomputation in Large Transformer Models,
       Korthikanti et al., 2022, arXiv 2205.05198

The problem. Each layer keeps activations for backward, and in a pipeline (chapter 3) many
micro-batches are in flight: they outgrow the weights. Tensor parallelism (chapter 2) shards them
only inside its regions. To recompute all of them takes a third more time.

The idea. LayerNorm, dropout and residual sums work on each token alone, so shard them by tokens.
One sublayer on two ranks, with the tokens a b c d:

        tensor parallelism (chapter 2)             and sequence parallelism
          rank 0         rank 1                      rank 0         rank 1
          x: abcd        x: abcd                     x: ab          x: cd
          LayerNorm      LayerNorm                   LayerNorm      LayerNorm      own tokens only
        f ───────────────────────  identity        g ───────────────────────      all-gather
          · W1[left]     · W1[right]                 · W1[left]     · W1[right]
          · W2[top]      · W2[bottom]                · W2[top]      · W2[bottom]
        f̄ ───────────────────────  all-reduce      ḡ ───────────────────────      reduce-scatter
          dropout, + x   dropout, + x                dropout, + x   dropout, + x   own tokens only
          z: abcd        z: abcd                     z: ab          z: cd

A ring all-reduce is a reduce-scatter and an all-gather, so the bytes sent are the same, and every
activation is sharded. The largest ones left are attention weights. They are cheap to compute, so
backward computes them again, and nothing else: selective recomputation.

Run it (no flag is needed; --help lists them):

    python 04_seq_parallel/seq_parallel.py                            4 local ranks
    python 04_seq_parallel/seq_parallel.py --ranks 1                  one process, for a debugger
    python 04_seq_parallel/seq_parallel.py --check                    equivalence alone, three modes
    python 04_seq_parallel/seq_parallel.py --recompute full --dropout 0.1
    torchrun --nproc-per-node=8 04_seq_parallel/seq_parallel.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        04_seq_parallel/seq_parallel.py

It proves in float64 that every gradient equals the single device's, with no, selective and full
recomputation, trains a small GPT on text, and prints the claims that it has measured.

Left out: the paper's tables, and a published layer on simulated ranks (seq_parallel_tables.py);
data and pipeline parallelism; recomputation of some micro-batches only (appendix C); attention
sharded along the sequence (context parallelism: ring attention, Ulysses).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension,
# replicated on the ranks of the group. The small letter is this rank's shard of that dimension.
# partial_ marks a partial sum, still to be reduced (Partial in PyTorch's DTensor).
#
#     S  sequence length, in tokens    s = S / tp: this rank's tokens
#     B  batch                         N  attention heads, n = N / tp    D  size of a head
#     H  hidden size                   F  feed-forward size, f = F / tp  L  layers
#     V  vocabulary entries            v = V, padded, / tp
#     P  B·N pairs of a sequence and a head, p = B·n
#
# Activations are x_SBH, and not x_BSH as in chapter 2. Collectives then split and join dimension 0,
# whose shards are contiguous. Byte counts use the paper's letters: s = S, b = B, h = H, a = N and
# t = tp.

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
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 does not count
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


# region carried: GPT config (home: 02_megatron_tp)
@dataclass
class GPTConfig:
    """Sizes of a GPT; `flag` makes a field a flag too. Raises ValueError for impossible sizes."""

    vocab_size: int = 256
    num_layers: int = flag(4, "layers, L", least=1)
    hidden_size: int = flag(128, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    seq_length: int = flag(128, "tokens of a sequence, S", least=1)
    dropout: float = flag(0.0, "dropout probability; the paper has 0.1")
    ffn_hidden_size: int | None = None  # F; None: 4·H
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone
    vocab_multiple: int = 1  # v is padded to a multiple of this (Megatron-LM: 128)

    def __post_init__(self):
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        for name, value in vars(self).items():
            if name not in ("dropout", "init_std", "seed") and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        if self.hidden_size % self.num_heads:
            sizes = f"hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: it must be at least 0 and less than 1")


# endregion copy 4ffc04

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# For backward an operator keeps what its gradient mentions: a GEMM its input, LayerNorm its input,
# softmax its output, dropout its mask, a sum nothing. This is one layer, in units of s·b·h bytes. A
# bf16 element takes 2 bytes, an element of a mask 1, and 5·a·s²·b bytes are 5·a·s/h units. TP is
# tensor parallelism, SP sequence parallelism:
#
#                                 one device    t ranks, TP    TP and SP
#     LayerNorm 1     its input           2             2            2/t     each rank its tokens
#     attention       qkv's input         2             2            2/t     1.2: keep the shard
#                     q, k, v             6             6/t          6/t
#                     core           5·a·s/h   5·a·s/(h·t)   5·a·s/(h·t)     1.4, 1.5: recompute
#                     out's input         2             2/t          2/t
#     dropout         its mask            1             1            1/t     each rank its tokens
#     LayerNorm 2     its input           2             2            2/t     each rank its tokens
#     feed-forward    up's input          2             2            2/t     1.2: keep the shard
#                     gelu's input        8             8/t          8/t
#                     down's input        8             8/t          8/t
#     dropout         its mask            1             1            1/t     each rank its tokens
#                                        ──      ────────           ────
#     sum without core attention         34     10 + 24/t           34/t
#
# Two collectives split chapter 2's all-reduce into two halves:
#
#     all-gather        rank 0: a        rank 1: b         →    both: [a, b]
#     reduce-scatter    rank 0: [a, c]   rank 1: [b, d]    →    rank 0: a + b     rank 1: c + d
#
# ── 1.1 Entering and leaving a tensor-parallel region: the operators g and ḡ ────────────────────
#
#                            forward           backward
#     f   copy_to_tp         identity          all-reduce         tensor parallelism alone:
#     f̄   reduce_from_tp     all-reduce        identity           chapter 2 (there called f and g)
#     g   gather_from_sp     all-gather        reduce-scatter     with sequence parallelism:
#     ḡ   reduce_scatter_to_sp                                    the same bytes in two halves
#                            reduce-scatter    all-gather
#         scatter_to_sp      take a shard      all-gather         to shard a replicated tensor
#
# After g each rank multiplies all tokens with its own columns of the weight. So each rank has a
# partial sum of every token's gradient, and backward reduce-scatters them.
#
# An example with one token on each of two ranks, 3 and 4, and the weights 2 and 5. After g rank 0
# computes 2 · 3 + 2 · 4 and rank 1 computes 5 · 3 + 5 · 4. With dL/dy = 1 the gradient of both
# tokens is (2, 2) on rank 0 and (5, 5) on rank 1: partial sums of (7, 7). The reduce-scatter gives
# each rank the 7 of its own token. With a slice in its place, rank 0 would go on with 2 and rank 1
# with 5, and all layers below would learn from one rank's columns.
#
# But where every rank computes the same after the gather (a classifier that is not sharded), each
# rank has the full gradient already, and a sum would count it t times. There backward takes this
# rank's tokens, and sends nothing. Only the caller knows which work follows, so it is an argument.
# Both mistakes run, and the loss of the first steps even falls.
#
# `_Conjugate`, chapter 2's, applies a function in forward, and its conjugate in backward.


def _tokens_per_rank(S: int, group: Group) -> int:
    tp = group_size(group)
    if S % tp:
        remedy = f"pad it to {multiple_above(S, tp)}, and its targets with -100"
        raise ValueError(f"a sequence of {S} tokens does not divide over {tp} ranks: {remedy}")
    return S // tp


def _start_all_gather(x_sBH: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """x_SBH, which is complete after work.wait()."""
    # torch 2.13 has a new name for all_gather_into_tensor, and one for reduce_scatter_tensor.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    S = x_sBH.shape[0] * group_size(group)
    x_SBH = x_sBH.new_empty(S, *x_sBH.shape[1:])
    work = all_gather(x_SBH, x_sBH.contiguous(), group=group, async_op=True)
    return x_SBH, work


def _start_reduce_scatter(partial_x_SBH: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """x_sBH, which is complete after work.wait()."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    s = _tokens_per_rank(partial_x_SBH.shape[0], group)
    x_sBH = partial_x_SBH.new_empty(s, *partial_x_SBH.shape[1:])
    work = reduce_scatter(x_sBH, partial_x_SBH.contiguous(), group=group, async_op=True)
    return x_sBH, work


def _gather_tokens(x_sBH: Tensor, group: Group) -> Tensor:
    x_SBH, work = _start_all_gather(x_sBH, group)
    work.wait()
    return x_SBH


def _reduce_scatter_tokens(partial_x_SBH: Tensor, group: Group) -> Tensor:
    x_sBH, work = _start_reduce_scatter(partial_x_SBH, group)
    work.wait()
    return x_sBH


def _take_tokens(x_SBH: Tensor, group: Group) -> Tensor:
    s = _tokens_per_rank(x_SBH.shape[0], group)
    # A copy: a view would keep the memory of the full tensor alive.
    return x_SBH.split(s)[group_rank(group)].clone(memory_format=torch.contiguous_format)


def gather_from_sp(x_sBH: Tensor, group: Group = None, backward: str = "reduce_scatter") -> Tensor:
    """g: all-gathers the tokens in order of rank, (s, B, H) to (S, B, H).

    Args: x_sBH: any shape whose first dimension is sharded, of one size on every rank. backward:
        "reduce_scatter" before work that is sharded over the ranks, "split" before work that every
        rank repeats.
    Raises: ValueError for another `backward`.
    Source: section 4.2.2 of the paper.
    """
    conjugates = {"reduce_scatter": _reduce_scatter_tokens, "split": _take_tokens}
    if backward not in conjugates:
        raise ValueError(f"backward={backward!r}: choose from {', '.join(conjugates)}")
    if group_size(group) == 1:
        return x_sBH
    return _Conjugate.apply(x_sBH, group, _gather_tokens, conjugates[backward])


def reduce_scatter_to_sp(partial_x_SBH: Tensor, group: Group = None) -> Tensor:
    """ḡ: sums over `group` and keeps this rank's tokens, (S, B, H) to (s, B, H).

    Args: partial_x_SBH: any shape, the same on every rank, tokens first; not modified.
    Raises: ValueError where S does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """
    if group_size(group) == 1:
        return partial_x_SBH
    return _Conjugate.apply(partial_x_SBH, group, _reduce_scatter_tokens, _gather_tokens)


def scatter_to_sp(x_SBH: Tensor, group: Group = None) -> Tensor:
    """This rank's tokens, (S, B, H) to (s, B, H); the gradient is all-gathered.

    Args: x_SBH: any shape, replicated, tokens first.
    Raises: ValueError where S does not divide over the ranks.
    Source: ours; Megatron-LM's code has it.
    """
    if group_size(group) == 1:
        return x_SBH
    return _Conjugate.apply(x_SBH, group, _take_tokens, _gather_tokens)


# ── 1.2 Linear layers: keep the shard, and gather it again in backward ──────────────────────────
#
# g followed by a GEMM would keep x_SBH for the weight's gradient. Then every rank has all tokens in
# memory again: 34/t becomes 34/t + 4·(1 − 1/t). So one Function does both. It keeps x_sBH only,
# and gathers it again in backward. That is one more all-gather, and both collectives of backward
# overlap with a GEMM:
#
#     network          all-gather x ────────►   reduce-scatter dx ──────────►
#     tensor cores     dx = dy W                dW = dyᵀ x,  db = Σ dy         wait
#
# So this Function contains g: calling gather_from_sp before it would be a mistake.
#
# The column-parallel bias is sharded as its outputs are. The row-parallel bias is replicated, and
# added after the reduce-scatter: before it, each token would get the bias t times.


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sBH, weight_fH, bias_f, group):
        # The shard is kept, and not x_SBH: see the sum above. A frozen weight keeps no activation,
        # and where the input needs no gradient, the weight is not kept either.
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_sBH if needs_dweight else None, weight_fH if needs_dx else None)
        ctx.group = group
        return F.linear(_gather_tokens(x_sBH, group), weight_fH, bias_f)

    @staticmethod
    @once_differentiable  # autograd cannot see the collectives: a second derivative would be wrong
    def backward(ctx, dy_SBf):
        x_sBH, weight_fH = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx_sBH = dweight_fH = dbias_f = None
        # Both collectives return at once. On a GPU they must be enqueued before the GEMM after them
        # can occupy the device: Megatron-LM sets CUDA_DEVICE_MAX_CONNECTIONS=1 for that reason.
        if needs_dweight:
            x_SBH, gathering = _start_all_gather(x_sBH, ctx.group)
        if needs_dx:
            partial_dx_SBH = dy_SBf @ weight_fH
            dx_sBH, scattering = _start_reduce_scatter(partial_dx_SBH, ctx.group)
        if needs_dweight:
            gathering.wait()
            dweight_fH = einsum(dy_SBf, x_SBH, "S B f, S B H -> f H")
        if needs_dbias:
            dbias_f = reduce(dy_SBf, "S B f -> f", "sum")
        if needs_dx:
            scattering.wait()
        return dx_sBH, dweight_fH, dbias_f, None


def column_parallel(
    x_sBH: Tensor, weight_fH: Tensor, bias_f: Tensor | None = None, group: Group = None
) -> Tensor:
    """g and a column-parallel GEMM: x_sBH to y_SBf. For backward it keeps the shard, x_sBH.

    Args: weight_fH, bias_f: this rank's rows of F.linear's.
    Source: section 4.2.2 of the paper.
    """
    if group_size(group) == 1:
        return F.linear(x_sBH, weight_fH, bias_f)
    device = x_sBH.device.type
    if torch.is_autocast_enabled(device) and x_sBH.dtype != torch.float64:
        # Here, because autocast is off in backward, and a bf16 message is half as long.
        dtype = torch.get_autocast_dtype(device)
        x_sBH = x_sBH.to(dtype)
        weight_fH = weight_fH.to(dtype)
        bias_f = None if bias_f is None else bias_f.to(dtype)
    return _ColumnParallel.apply(x_sBH, weight_fH, bias_f, group)


class SPColumnParallelLinear(nn.Module):
    """nn.Linear with sharded outputs, after g: x_sBH to y_SBf, f = out_features / tp.

    Args: in_features, out_features: as in nn.Linear, over all ranks. group: the tensor-parallel
        group; None is all ranks.
    The full weight is drawn as nn.Linear draws it, and this rank keeps its shard: the default
    generator must be in the same state on every rank (torch.manual_seed).
    Raises: ValueError where out_features does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """

    def __init__(self, in_features: int, out_features: int, group: Group = None):
        super().__init__()
        full = nn.Linear(in_features, out_features)
        self.group = group
        self.weight = nn.Parameter(_take_shard(full.weight.detach(), group, 0, "out_features"))
        self.bias = nn.Parameter(_take_shard(full.bias.detach(), group, 0))
        mark([self.weight, self.bias], False)  # section 1.3

    def forward(self, x_sBH: Tensor) -> Tensor:
        return column_parallel(x_sBH, self.weight, self.bias, self.group)


class SPRowParallelLinear(nn.Module):
    """nn.Linear with sharded inputs, before ḡ: y_SBf, f = in_features / tp, to z_sBH.

    Args and initial weights: as `SPColumnParallelLinear`'s. The bias is replicated.
    Raises: ValueError where in_features or S does not divide over the ranks.
    Source: section 4.2.2 of the paper.
    """

    def __init__(self, in_features: int, out_features: int, group: Group = None):
        super().__init__()
        full = nn.Linear(in_features, out_features)
        self.group = group
        self.weight = nn.Parameter(_take_shard(full.weight.detach(), group, 1, "in_features"))
        self.bias = full.bias
        mark([self.weight], False)
        mark([self.bias], True)

    def forward(self, y_SBf: Tensor) -> Tensor:
        partial_z_SBH = F.linear(y_SBf, self.weight)
        z_sBH = reduce_scatter_to_sp(partial_z_SBH, self.group)
        return z_sBH + self.bias.to(z_sBH.dtype)


# ── 1.3 Replicated parameters have partial gradients ────────────────────────────────────────────
#
# LayerNorm, the positions and the row-parallel biases are replicated, and each rank applies them to
# its own tokens. So each rank's gradient is a partial sum: it must be summed over the group, once a
# step, before the norm is computed and anything is clipped. A sharded parameter has seen all tokens
# after g, and its gradient is complete. Three mistakes, and training runs with all of them:
#
#     no sum                   the copies of a parameter drift apart from the first step on
#     a mean                   gradients are t times too small, which Adam hides
#     a sum of complete ones   they come out t times too large, which Adam hides as well
#
# With the two tokens 3 and 4 on two ranks and a replicated bias of 0, y = x + bias and L = Σ y²:
# rank 0 finds dL/dbias = 2 · 3 and rank 1 finds 2 · 4. The single device's gradient is 14.
#
# Names cannot decide this in a layer of your own, so each parameter has a mark. Megatron-LM sets
# `sequence_parallel` on those with partial gradients. Here it is True or False, and a parameter
# without it is refused: copy.deepcopy and load_state_dict(assign=True) lose such attributes.


def mark(parameters: Parameters, sequence_parallel: bool) -> None:
    """Marks parameters for `reduce_sequence_parallel_grads`.

    Args: parameters (...) of any shape. sequence_parallel: True where a parameter is replicated
        and ranks apply it to different tokens; False where its gradient is complete after backward.
    Source: Megatron-LM, which has an attribute of this name.
    """
    for p in parameters:
        p.sequence_parallel = sequence_parallel


def reduce_sequence_parallel_grads(module: nn.Module, group: Group = None) -> None:
    """Sums the partial gradients of the module over `group`, in one flat all-reduce.

    Call it on every rank, once after the backward passes of a step, before clipping.
    A missing gradient becomes zero: ranks must all-reduce buffers of one size.
    Raises: ValueError that names a trained parameter which `mark` has not marked.
    Source: Megatron-LM's allreduce of layernorm gradients.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, p in trained:
        if not hasattr(p, "sequence_parallel"):
            remedy = "mark([p], True) if ranks apply it to different tokens, else mark([p], False)"
            raise ValueError(f"is the gradient of {name} a partial sum? Call {remedy}")
    partial_ones = [p for _, p in trained if p.sequence_parallel]
    if group_size(group) == 1 or not partial_ones:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in partial_ones]
    flat = _all_reduce(torch.cat([grad.flatten() for grad in grads]), group)
    for p, total in zip(partial_ones, flat.split([p.numel() for p in partial_ones])):
        p.grad = total.view_as(p).to(p.dtype)


# ── 1.4 Core attention: where 5·a·s²·b bytes come from ──────────────────────────────────────────
#
# Core attention is what stands between the two matrices: q kᵀ, softmax, dropout, and the GEMM with
# v. Each pair of a sequence and a head is computed alone. In the layout S B n D, B and n lie next
# to each other in memory, so both are joined to one dimension p without a copy. Backward needs,
# of S × S elements for each pair,
#
#     softmax's output     2 bytes    for its own backward
#     dropout's mask       1 byte
#     dropout's output     2 bytes    for the GEMM with v
#
# Three details keep it at 5 bytes. The causal mask is added, as −∞: masked_fill would keep a
# boolean mask. baddbmm adds and scales, so no scaled copy of q is kept. Softmax returns bf16: it
# computes in fp32 all the same. (Under autocast PyTorch returns fp32, and 2 bytes become 4.)
#
# FlashAttention came later (arXiv 2205.14135): one kernel that keeps its output and one value per
# query, and computes the weights again in backward. Recomputation around it would do that twice.
# Selective recomputation still pays where no such kernel exists (masks of one's own), and for other
# tensors that are large and cheap: LayerNorm's, gelu's, an expert router's.


def unfused_attention(q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, dropout: Dropout) -> Tensor:
    """Causal attention in single operators, as the paper counts its bytes: (p, S, D) to y_pSD.

    Args: dropout is applied to the attention weights. Source: section 4.1 of the paper.
    """
    S, D = q_pSD.shape[-2:]
    is_future_SS = torch.full((S, S), -torch.inf, dtype=q_pSD.dtype, device=q_pSD.device).triu(1)
    scores_pSS = torch.baddbmm(is_future_SS, q_pSD, k_pSD.mT, alpha=1 / math.sqrt(D))
    weights_pSS = scores_pSS.softmax(dim=-1)
    return dropout(weights_pSS) @ v_pSD


def fused_attention(q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, dropout: Dropout) -> Tensor:
    """The same in one kernel that keeps no S × S tensor: (p, S, D) to y_pSD.

    Raises: ValueError for dropout: the kernel accepts no generator.
    Source: FlashAttention, arXiv 2205.14135.
    """
    if dropout.p and dropout.training:
        raise ValueError(f"dropout={dropout.p}: fused_attention has none; use unfused_attention")
    # One sequence of p heads: to (S, B, H) its output is a view, and no copy.
    y_1pSD = F.scaled_dot_product_attention(q_pSD[None], k_pSD[None], v_pSD[None], is_causal=True)
    return y_1pSD[0]


# ── 1.5 Recomputation ───────────────────────────────────────────────────────────────────────────
#
# PyTorch's `checkpoint` keeps a function's inputs and drops what its operators keep. When backward
# asks for the first dropped tensor, the function runs again. It stops early, as soon as the last
# dropped tensor exists again. The last GEMM of core attention keeps only its inputs, so it does not
# run again. Hence
#
#     selective    runs again: q kᵀ, softmax, dropout
#     full         runs again: the whole layer with its collectives. Without dropout nothing is kept
#                  at the layer's end: it stops before the last GEMM and the last reduce-scatter.
#
# Both runs must draw the same dropout masks. Otherwise the gradient belongs to another function
# than the loss does, and no error says so. A mask is a function of its module's `mask_seed` (see
# `Dropout`). That may have changed in between: in a pipeline the next micro-batch's forward comes
# before this one's backward. So the seeds of forward are kept, and set again while the function
# runs again. Afterwards they are restored, or the next forward would repeat this one's masks.


class _MasksOfForward:
    """Inside, each `Dropout` draws the masks that it drew when this object was made."""

    def __init__(self, dropouts: Iterable[Dropout]):
        self.stored = {dropout: dropout.mask_seed for dropout in dropouts}

    def _swap(self) -> None:
        for dropout, mask_seed in self.stored.items():
            self.stored[dropout] = dropout.mask_seed
            dropout.mask_seed = mask_seed

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: Any) -> None:  # an early stop is an exception
        self._swap()


@torch.compiler.disable  # a compiler would trace the seeds as constants
def recompute(function: Callable, *args: Any, dropouts: Iterable[Dropout] = ()) -> Any:
    """function(*args); autograd keeps the arguments, and backward computes the rest again.

    Args: function: computes the same again; with collectives it is called on all ranks or on none.
        dropouts: all that it calls.
    Source: section 5 of the paper.
    """

    def contexts() -> tuple:
        return contextlib.nullcontext(), _MasksOfForward(dropouts)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def recomputed_core(
    core: Callable, q_pSD: Tensor, k_pSD: Tensor, v_pSD: Tensor, dropout: Dropout
) -> Tensor:
    """core(q, k, v, dropout) to y_pSD, computed again in backward. Source: the paper, section 5."""
    return recompute(core, q_pSD, k_pSD, v_pSD, dropout, dropouts=[dropout])


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# A GPT for a single device, as chapter 2's, with the same initial weights, in the layout S B H.
# `Attention` and `MLP` get their two matrices from the caller. On a single device n = N and f = F.
# With sharded matrices the same code works inside a region, on all S tokens of n heads or f
# features. Outside are s tokens with all H features.
#
# Each Dropout is `sharded`: inside a region each rank has its own heads, and outside its own
# tokens. Without sequence parallelism the ranks' outer masks must be equal. With it they must
# differ: equal masks would repeat after s tokens, and no loss shows that.


class Attention(nn.Module):
    """Causal multi-head self-attention: x_SBH to (S, B, H).

    Args: column and row are called with (inputs, outputs) and make the two matrices. core:
        `unfused_attention`, `fused_attention`, or a function with their arguments.
    """

    def __init__(self, config: GPTConfig, column: Callable, row: Callable, core: Callable):
        super().__init__()
        self.head_size = config.hidden_size // config.num_heads
        self.qkv = column(config.hidden_size, 3 * config.hidden_size)
        self.out = row(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.dropout, sharded=True)
        self.core = core

    def forward(self, x_SBH: Tensor) -> Tensor:
        qkv_3pSD = rearrange(
            self.qkv(x_SBH), "S B (n three D) -> three (B n) S D", three=3, D=self.head_size
        )
        y_pSD = self.core(*qkv_3pSD, self.dropout)
        return self.out(rearrange(y_pSD, "(B n) S D -> S B (n D)", B=x_SBH.shape[1]))


class MLP(nn.Module):
    """The feed-forward sublayer, x_SBH to (S, B, H). Args: as `Attention`'s."""

    def __init__(self, config: GPTConfig, column: Callable, row: Callable):
        super().__init__()
        self.up = column(config.hidden_size, config.ffn_hidden_size)
        self.down = row(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_SBH: Tensor) -> Tensor:
        y_SBf = F.gelu(self.up(x_SBH), approximate="tanh")
        return self.down(y_SBf)


class Layer(nn.Module):
    """Two sublayers with LayerNorm, dropout and residual connection: x_SBH to (S, B, H).

    Args: as `Attention`'s.
    """

    def __init__(
        self,
        config: GPTConfig,
        column: Callable = nn.Linear,
        row: Callable = nn.Linear,
        core: Callable = unfused_attention,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, column, row, core)
        self.dropout1 = Dropout(config.dropout, sharded=True)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config, column, row)
        self.dropout2 = Dropout(config.dropout, sharded=True)

    def forward(self, x_SBH: Tensor) -> Tensor:
        x_SBH = x_SBH + self.dropout1(self.attention(self.norm1(x_SBH)))
        return x_SBH + self.dropout2(self.mlp(self.norm2(x_SBH)))


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_SBV.

    Its initial weights are a function of `config` alone, drawn on the CPU.
    Raises: ValueError for a sequence longer than seq_length.
    Source: Megatron-LM (Shoeybi et al., 2019), section 4.2.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        self.dropout = Dropout(config.dropout, sharded=True)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size)
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                # Matrices that add to the residual sum, 2L of them, start smaller.
                adds = name.endswith(("out.weight", "down.weight"))
                scale = math.sqrt(2 * config.num_layers) if adds else 1
                nn.init.normal_(p, std=config.init_std / scale, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        S = tokens_BS.shape[1]
        if S > self.config.seq_length:
            raise ValueError(f"{S} tokens, but the model has {self.config.seq_length} positions")
        x_SBH = self.dropout(self.embed(tokens_BS.T))
        for layer in self.layers:
            x_SBH = layer(x_SBH)
        return self.output(self.final_norm(x_SBH))

    def embed(self, tokens_SB: Tensor) -> Tensor:
        return self.embedding(tokens_SB) + self.positions.weight[: len(tokens_SB), None]

    def output(self, x_SBH: Tensor) -> Tensor:
        return F.linear(x_SBH, self.embedding.weight)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(at_least_fp32(self(tokens_BS)), "S B V -> B V S")
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")


# ── 2.2 The parallel layer ──────────────────────────────────────────────────────────────────────
#
# The plain layer with other matrices. Outside its two regions no line communicates, and no tensor
# has more than s tokens.

RECOMPUTE = ("none", "selective", "full")


class SequenceParallelLayer(Layer):
    """`Layer` with tensor and sequence parallelism: x_sBH to (s, B, H).

    Args: recompute: "none", "selective" (core attention) or "full" (the layer). core: see
        `Attention`. group: the tensor-parallel group; None is all ranks.
    Parameters have `Layer`'s names and initial weights; the default generator must be in the same
    state on every rank. Call `reduce_sequence_parallel_grads` after backward.
    Raises: ValueError where heads, features or tokens do not divide over the ranks, for another
        `recompute`, and for dropout on several ranks without `seed_dropout`.
    Source: sections 4.2.2 and 5 of the paper.
    """

    def __init__(
        self,
        config: GPTConfig,
        group: Group = None,
        recompute: str = "none",
        core: Callable = unfused_attention,
    ):
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r}: choose from {', '.join(RECOMPUTE)}")
        check_tp(config, group_size(group))
        if recompute == "selective":
            core = partial(recomputed_core, core)
        column = partial(SPColumnParallelLinear, group=group)
        row = partial(SPRowParallelLinear, group=group)
        super().__init__(config, column, row, core)
        self.group = group
        self.recompute = recompute
        mark([*self.norm1.parameters(), *self.norm2.parameters()], True)

    def forward(self, x_sBH: Tensor) -> Tensor:
        draws_masks = self.training and self.dropout1.p > 0
        if draws_masks and self.dropout1.mask_seed is None and group_size(self.group) > 1:
            raise ValueError("dropout on several ranks: call seed_dropout before each step")
        if self.recompute == "full":
            dropouts = [self.attention.dropout, self.dropout1, self.dropout2]
            return recompute(super().forward, x_sBH, dropouts=dropouts)
        return super().forward(x_sBH)


# ── 2.3 Embedding, output layer and the model ───────────────────────────────────────────────────
#
# The embedding is a partial sum (each rank has its own vocabulary entries, and zeros for all other
# tokens), so ḡ follows it directly: an all-reduce and a shard of it would send twice the bytes.
# Then each rank adds the positions of its own tokens.
#
# The output layer is a column-parallel GEMM as any other: LayerNorm on s tokens, then g. After g
# every rank has the logits of all tokens, for its vocabulary shard. So the loss is chapter 2's,
# over all S tokens, replicated. It must not be divided by t.


def vocab_parallel_embedding(
    tokens_SB: Tensor, weight_vH: Tensor, vocab_size: int, group: Group = None
) -> Tensor:
    """Looks up tokens (int64, replicated) in a table sharded by rows, and reduce-scatters: x_sBH.

    Args: weight_vH: the rows of token ids [rank·v, (rank + 1)·v). vocab_size: without padding.
    Raises: ValueError for a token id outside the vocabulary; on a GPU its embedding is NaN.
    Source: section 4.3 of the paper.
    """
    row_SB, is_local_SB = _local_rows(tokens_SB, weight_vH.shape[0], group)
    x_SBH = F.embedding(row_SB, weight_vH)
    partial_x_SBH = torch.where(is_local_SB[..., None], x_SBH, 0)
    is_id_SB = _is_id(tokens_SB, vocab_size)
    partial_x_SBH = torch.where(is_id_SB[..., None], partial_x_SBH, torch.nan)
    return reduce_scatter_to_sp(partial_x_SBH, group)


class SequenceParallelGPT(GPT):
    """`GPT` with tensor and sequence parallelism: tokens_BS, replicated, to logits_SBv.

    Args: as `SequenceParallelLayer`'s. Its weights are those of GPT(config), for every tp.
    Raises: ValueError as `SequenceParallelLayer`, and for a sequence longer than seq_length.
    Source: section 4.3 of the paper.
    """

    def __init__(
        self,
        config: GPTConfig,
        group: Group = None,
        recompute: str = "none",
        core: Callable = unfused_attention,
    ):
        # The plain model first, for its weights. (Chapter 2 has one full tensor at a time.)
        super().__init__(config)
        shards = shard_state_dict(self.state_dict(), config, group)
        self.group = group
        self.embedding = nn.Embedding(*shards["embedding.weight"].shape)
        layers = [SequenceParallelLayer(config, group, recompute, core) for _ in self.layers]
        self.layers = nn.ModuleList(layers)
        mark(self.embedding.parameters(), False)
        mark([*self.positions.parameters(), *self.final_norm.parameters()], True)
        self.load_state_dict(shards)  # copies: the marks stay

    def embed(self, tokens_SB: Tensor) -> Tensor:
        V = self.config.vocab_size
        x_sBH = vocab_parallel_embedding(tokens_SB, self.embedding.weight, V, self.group)
        s = x_sBH.shape[0]
        first = group_rank(self.group) * s
        return x_sBH + self.positions.weight[first : first + s, None]

    def output(self, x_sBH: Tensor) -> Tensor:
        return column_parallel(x_sBH, self.embedding.weight, group=self.group)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, replicated; 0 where the target is −100."""
        V = self.config.vocab_size
        is_id_BS = _is_id(targets_BS, V, ignore_index=-100)
        logits_SBv = self(tokens_BS)
        loss_SB = _VocabParallelCrossEntropy.apply(logits_SBv, targets_BS.T, V, self.group)
        loss_BS = torch.where(targets_BS != -100, loss_SB.T, 0)
        return torch.where(is_id_BS, loss_BS, torch.nan)

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parameters of which this rank holds a shard; all others are replicated."""
        return [p for name, p in self.named_parameters() if shard_dim(name) is not None]


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# Sequence parallelism shards activations and no weight. So the shards are chapter 2's: `SHARD_DIM`
# (among the carried blocks) says along which dimension, and its `merge_state_dicts` joins them.


def shard_state_dict(full: StateDict, config: GPTConfig, group: Group = None) -> StateDict:
    """The plain model's weights or gradients, by name, to this rank's shards; copies.

    Raises: ValueError where heads or features do not divide over the ranks.
    """
    tp = group_size(group)
    check_tp(config, tp)
    rank = group_rank(group)
    return {name: shard_tensor(name, x, config, rank, tp) for name, x in full.items()}


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# The ranks of the group share each sequence, so all of them get the same batch, and every rank has
# the loss of all tokens. (Replicas with other batches are chapter 2's.)
#
# Next to `train_alone` three lines are new: the seeds of dropout, the sum of partial gradients,
# and the norm of shards. The sum comes before the norm. Clipped first, the norm would be that of
# partial sums, and every gradient would be scaled by another factor than the single device's.


def train(
    model: SequenceParallelGPT,
    optimizer: Optimizer,
    batches: Batches,
    max_norm: float = 1.0,
    autocast: Autocast = None,
    seed: int = 0,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on the ranks of the model's group: yields the same two scalars on each.

    Every rank must iterate it, with the same batches. seed and first_step are for dropout:
    replicas of the model need different seeds.
    """
    for step, (tokens_BS, targets_BS) in enumerate(batches, first_step):
        optimizer.zero_grad()
        seed_dropout(model, seed, step, group_rank(model.group))
        count = (targets_BS != -100).sum().clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(tokens_BS, targets_BS).sum() / count
        loss.backward()
        reduce_sequence_parallel_grads(model, model.group)
        sharded = model.sharded_parameters()
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=model.group)
        optimizer.step()
        yield loss.detach(), norm


# ── What remains ──────────────────────────────────────────────────────────────────────────────────
#
# A layer's memory now grows with s and not with s², and all of it is sharded. Its arithmetic still
# has 4·s²·h operations per sequence, each token with every other, and a model that generates text
# keeps the keys and values of all tokens. For long sequences both outgrow everything else. Chapter
# 5 replaces most attention layers by a state of fixed size.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────
#
# ── 5.1 What autograd keeps, counted ────────────────────────────────────────────────────────────
#
# A hook sees every tensor that an operator keeps for backward. Several may be views of one storage
# (q, k and v lie in one), so storages count, not tensors. Parameters are kept as well, but were
# there before. Parameters must be bf16 themselves: autocast would keep bf16 copies of them.


def saved_tensors(run: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> list[Tensor]:
    """Calls run(); of each storage that autograd keeps for backward, the first tensor that is kept.

    Args: parameters (...) do not count. What a Function stores on ctx itself is not seen. Works
        with fake tensors.
    Returns: tensors (...) that share memory with those of autograd. Source: ours.
    """
    known = {p.untyped_storage()._cdata for p in parameters}  # a fake tensor has no data_ptr()
    kept = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(x.detach())  # keeps the storage, so that its address is not used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return kept


def saved_bytes(run: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages of `saved_tensors`(run, parameters), a scalar. Source: ours."""
    return sum(x.untyped_storage().nbytes() for x in saved_tensors(run, parameters))


def activation_bytes(config: GPTConfig, tp: int, recompute: str, batch: int = 1) -> float:
    """Bytes that one of `tp` ranks keeps of a layer: bf16, masks of 1 byte, F = 4·H, dropout.

    Source: table 2 of the paper, rows with sequence parallelism. Full recomputation keeps the
    layer's input, which sequence parallelism shards too.
    """
    sbh = config.seq_length * batch * config.hidden_size
    core = 5 * config.num_heads * config.seq_length / config.hidden_size
    units = {"none": 34 + core, "selective": 34, "full": 2}
    return units[recompute] * sbh / tp


def layer_cost(recompute: str, device: torch.device, batch: int = 2) -> tuple[float, float, str]:
    """A small layer in bf16, with dropout, on all ranks.

    Returns: kept bytes, and the same by table 2, in units of s·b·h/t; how many all-gathers and
        reduce-scatters it takes, forward and backward.
    """
    tp = group_size()
    S = multiple_above(64, tp)
    H = multiple_above(128, 2 * tp)
    config = GPTConfig(seq_length=S, hidden_size=H, num_heads=2 * tp, dropout=0.1)
    layer = SequenceParallelLayer(config, recompute=recompute).to(device, torch.bfloat16)
    seed_dropout(layer, seed=0, step=0, tp_rank=group_rank())
    x_sBH = torch.randn(S // tp, batch, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    kept = saved_bytes(partial(layer, x_sBH), layer.parameters())
    with Counter() as counter:
        layer(x_sBH).sum().backward()
    gathers = sum(message.op.startswith("all_gather") for message in counter.messages)
    scatters = sum(message.op.startswith("reduce_scatter") for message in counter.messages)
    unit = S * batch * H / tp
    formula = activation_bytes(config, tp, recompute, batch)
    return kept / unit, formula / unit, f"{gathers}, {scatters}"


# ── 5.2 Equivalence ─────────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show what rounding does to right code (bf16: 0.4 % in each GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def equivalence(
    device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model in each mode of recomputation, and on a single device.

    Returns: the relative error of every tensor by name, the largest of all ranks.
    """
    tp = group_size()
    # Vocabulary and batch do not divide over the ranks; the sequence is shorter than seq_length.
    config = GPTConfig(
        vocab_size=61, seq_length=4 * tp, num_layers=2, num_heads=2 * tp, hidden_size=16 * tp
    )
    generator = torch.Generator().manual_seed(1)
    ids_2BS = torch.randint(61, (2, 3, 3 * tp), generator=generator)
    tokens_BS, targets_BS = ids_2BS.to(device)
    targets_BS[0, tp:] = -100
    batches = [(tokens_BS, targets_BS)] * 5
    errors = {}
    for mode in RECOMPUTE:
        plain = GPT(config).to(device, dtype)
        parallel = SequenceParallelGPT(config, recompute=mode).to(device, dtype)
        alone = train_alone(plain, make_optimizer(plain, 1e-3), batches, 0.1, autocast)
        steps = train(parallel, make_optimizer(parallel, 1e-3), batches, 0.1, autocast)
        for step, ((loss_alone, norm_alone), (loss, norm)) in enumerate(zip(alone, steps)):
            errors[f"loss {step}, {mode}"] = abs(loss / loss_alone - 1).item()
            errors[f"norm before clipping {step}, {mode}"] = abs(norm / norm_alone - 1).item()
            if step == 0:
                grads = {name: p.grad for name, p in parallel.named_parameters()}
                full = {name: p.grad for name, p in plain.named_parameters()}
                reference = shard_state_dict(full, config)
                errors |= relative_errors(f"gradient, {mode}:", grads, reference, floor=1e-9)
        if dtype == torch.float64:
            # Where a gradient is zero, Adam divides rounding errors by each other: in fp32 the
            # weights of a right program differ too.
            kind = f"weight after AdamW, {mode}:"
            reference = shard_state_dict(plain.state_dict(), config)
            errors |= relative_errors(kind, parallel.state_dict(), reference, floor=5 * 1e-3)
    return over_all_ranks(errors)


# ── 5.3 What `main` runs ────────────────────────────────────────────────────────────────────────


def text_batches(args: argparse.Namespace, device: torch.device, steps: int) -> Batches:
    """Windows of the text of this file, one token per byte; the same batches on every rank."""
    ids = torch.tensor(list(Path(__file__).read_bytes()))
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(steps):
        start_B1 = torch.randint(len(ids), (args.batch, 1), generator=generator)
        place_BS = start_B1 + torch.arange(args.seq_length + 1)
        window_BS = ids[place_BS % len(ids)]  # after the last byte comes the first
        yield window_BS[:, :-1].to(device), window_BS[:, 1:].to(device)


def demonstrate(args: argparse.Namespace, device: torch.device) -> list[float]:
    """Trains on text; returns how far the first losses are from the single device's."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    batches = partial(text_batches, args, device)
    # Every rank trains the plain model for some steps, so that no rank waits for another. With
    # dropout a single device draws other masks, and there is nothing to compare.
    alone = []
    if config.dropout == 0:
        plain = GPT(config).to(device, dtype)
        optimizer = make_optimizer(plain, args.lr)
        steps = train_alone(plain, optimizer, batches(min(5, args.steps)), autocast=autocast)
        alone = [loss.item() for loss, _ in steps]
    model = SequenceParallelGPT(config, recompute=args.recompute).to(device, dtype)
    say(f"training on this file, recompute {args.recompute}\n")
    say("step      loss  single device    norm  tokens/s  peak GB")
    differences = []
    optimizer = make_optimizer(model, args.lr)
    steps = train(model, optimizer, batches(args.steps), autocast=autocast, seed=args.seed)
    begin = time.perf_counter()
    for step, (loss, norm) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        reference = ""
        if step < len(alone):
            reference = f"{alone[step]:.6f}"
            differences.append(abs(loss - alone[step]))
        if step < 5 or step % 20 == 19:
            speed = (step + 1) * args.batch * config.seq_length / (time.perf_counter() - begin)
            memory = peak_memory(device)
            say(f"{step:4}  {loss:.6f}  {reference:>13}  {norm:6.3f}  {speed:8,.0f}  {memory:7.2f}")
    say()
    return differences


def measure(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = equivalence(device, torch.float64)
    claims = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, three modes, float64"
        claims.append((claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"]))
    costs = {recompute: layer_cost(recompute, device) for recompute in RECOMPUTE}
    differences = demonstrate(args, device)
    claim = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    if differences:
        within = max(differences)
        claims.append((claim, "equal", f"within {within:.0e}", within <= BOUNDS[args.dtype]))
    for recompute, (kept, formula, _) in costs.items():
        claim = f"kept of a layer, recompute {recompute}, in s·b·h/t bytes"
        good = abs(kept / formula - 1) < 0.01  # LayerNorm keeps mean and deviation of each token
        claims.append((claim, f"{formula:g}", f"{kept:.2f}", good))
    if group_size() > 1:
        here = costs["none"][2]
        claim = "all-gathers, reduce-scatters of a layer, forward and backward"
        claims.append((claim, "6, 4", here, here == "6, 4"))
    return claims


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f": tp {group_size()}")
    if args.check:
        good = print_errors(equivalence(device, *dtypes(args)), BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, device))
    if not good:
        sys.exit(1)


@dataclass
class Options(GPTConfig):  # the chapter's own flags; None: what fits the ranks
    num_layers: int = flag(2, "layers, L", least=1)
    hidden_size: int | None = flag(None, "hidden size, H; None: 128 or a few more", least=1)
    num_heads: int | None = flag(None, "attention heads, N; None: 4 or a few more", least=1)
    seq_length: int | None = flag(None, "tokens of a sequence, S; None: 128 or more", least=1)
    recompute: str = flag("selective", "what backward computes again", choices=list(RECOMPUTE))
    batch: int = flag(8, "sequences per step", least=1)
    lr: float = flag(1e-3, "learning rate", least=1e-9)


def multiple_above(least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `least`."""
    return math.ceil(least / divisor) * divisor


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError where flags and ranks do not fit."""
    tp = args.world_size
    args.num_heads = args.num_heads or multiple_above(4, tp)
    args.hidden_size = args.hidden_size or multiple_above(128, args.num_heads)
    args.seq_length = args.seq_length or multiple_above(128, tp)
    check_tp(config_from(args, GPTConfig), tp)
    if args.seq_length % tp:
        remedy = f"over {tp} ranks: try {multiple_above(args.seq_length, tp)}"
        raise ValueError(f"--seq-length {args.seq_length} does not divide {remedy}")


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=4, steps=40)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: conjugate operators (home: 02_megatron_tp)
class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, op, conjugate_op):
        ctx.reversed = (group, conjugate_op, op)
        return op(x, group)

    @staticmethod
    def backward(ctx, grad):
        # apply(), not a plain call: backward must be differentiable too.
        return _Conjugate.apply(grad, *ctx.reversed), None, None, None


def _take_shard(x: Tensor, group: Group, dim: int = -1, name: str = "the last dimension") -> Tensor:
    tp = group_size(group)
    if x.shape[dim] % tp:
        size = f"{name}={x.shape[dim]} does not divide over {tp} ranks"
        raise ValueError(f"{size}: choose a multiple of {tp}, or fewer ranks")
    # A copy: a view would keep the memory of the full tensor alive.
    return x.chunk(tp, dim)[group_rank(group)].clone(memory_format=torch.contiguous_format)


# endregion copy 7a6c69
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
# region carried: vocabulary loss (home: 02_megatron_tp)
class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BSv, targets_BS, vocab_size, group):
        v = logits_BSv.shape[-1]
        x_BSv = logits_BSv.to(torch.promote_types(logits_BSv.dtype, torch.float32), copy=True)
        x_BSv[..., max(0, vocab_size - group_rank(group) * v) :] = -torch.inf  # padding
        max_BS = _all_reduce(x_BSv.amax(dim=-1), group, dist.ReduceOp.MAX)
        x_BSv -= max_BS[..., None]
        # A target on another rank contributes 0. torch.where, and not x · mask:
        # 0 · (−inf) is NaN.
        row_BS, is_local_BS = _local_rows(targets_BS, v, group)
        row_BS1 = row_BS[..., None]
        partial_logit_BS = torch.where(is_local_BS, x_BSv.gather(-1, row_BS1)[..., 0], 0)
        exp_BSv = x_BSv.exp_()
        partial_2BS = torch.stack([partial_logit_BS, exp_BSv.sum(dim=-1)])
        logit_BS, sum_BS = _all_reduce(partial_2BS, group)
        if ctx.needs_input_grad[0]:
            softmax_BSv = exp_BSv.div_(sum_BS[..., None])
            ctx.save_for_backward(softmax_BSv, row_BS1, is_local_BS)
        return sum_BS.log() - logit_BS

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BS):
        softmax_BSv, row_BS1, is_local_BS = ctx.saved_tensors
        grad_BSv = softmax_BSv * grad_BS[..., None]
        grad_BSv.scatter_add_(-1, row_BS1, -(grad_BS * is_local_BS)[..., None])
        return grad_BSv, None, None, None


# endregion copy c5b7c6
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
# region carried: tensor-parallel shards (home: 02_megatron_tp)
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
    if math.gcd(config.num_heads, config.ffn_hidden_size) % tp:
        sizes = f"num_heads={config.num_heads} and ffn_hidden_size={config.ffn_hidden_size}"
        raise ValueError(f"{sizes} do not divide over tp={tp} ranks: tp must divide both")


def shard_tensor(name: str, full: Tensor, config: GPTConfig, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of `full`, the plain model's parameter `name` (...); a copy."""
    dim = shard_dim(name)
    if dim is None:
        return full.clone()
    if name.endswith("embedding.weight"):
        rows = padded_vocab_size(config.vocab_size, tp, config.vocab_multiple)
        full = F.pad(full, (0, 0, 0, rows - config.vocab_size))
    return full.chunk(tp, dim)[rank].clone(memory_format=torch.contiguous_format)


# endregion copy 6283a8
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
    copies = group_size(group) if sharded_ids else 1
    squares = [torch.zeros((), device=device)]
    for p in parameters:
        # In at least fp32: PyTorch's own norm has the precision of the gradients.
        dtype = torch.promote_types(p.grad.dtype, torch.float32)
        square = torch.linalg.vector_norm(p.grad, dtype=dtype).square()
        squares.append(square if id(p) in sharded_ids else square / copies)
    total = torch.stack(squares).sum()
    if sharded_ids:
        _all_reduce(total, group)
    norm = total.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# endregion copy b536bc
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
