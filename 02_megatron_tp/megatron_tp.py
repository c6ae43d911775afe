# SPDX-License-Identifier: MIT-0
"""Chapter 2. Tensor parallelism: every layer of one model sharded over several GPUs.

Paper: Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism,
       Shoeybi et al., 2019, arXiv 1909.08053

The problem. Data parallelism (chapter 1) replicates the model on every rank. In fp32 a parameter
takes 16 bytes (itself, its gradient, Adam's two moments), so 8.3 billion parameters take 133 GB,
and a GPU of 2019 has 32 GB.

The idea. Shard the weights so that each sublayer needs only one all-reduce in each direction. The
feed-forward layer z = gelu(x W1) W2 on two ranks, W1 sharded by columns and W2 by rows:

                   x                            replicated
           ┌───────┴───────┐    copy_to_tp      forward: identity      backward: all-reduce
       rank 0            rank 1
    x · W1[:, left]   x · W1[:, right]          gelu is elementwise: it needs no other columns
         gelu              gelu
      · W2[top]         · W2[bottom]            each rank has a partial sum of z
           └───────┬───────┘    reduce_from_tp  forward: all-reduce    backward: identity
                   z                            replicated

Attention is sharded in the same way, by heads. Each sublayer costs one all-reduce in forward and
one in backward.

Run it (no flag is needed; --help lists them):

    python 02_megatron_tp/megatron_tp.py               4 local ranks, tensor parallel 2 × replicas 2
    python 02_megatron_tp/megatron_tp.py --ranks 1     one process, for a debugger
    python 02_megatron_tp/megatron_tp.py --check       equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 02_megatron_tp/megatron_tp.py --tp 8 --num-heads 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        02_megatron_tp/megatron_tp.py

It checks in float64 that every gradient equals the single device's, trains a small GPT on text
next to the plain model, and prints the claims that it measured.

Left out: checkpoints, published weights and sampling (pretrain.py); the paper's tables
(megatron_tp_tables.py); fp16 loss scaling (bf16 autocast instead); fused kernels.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension,
# replicated on the ranks of the group; a small letter is this rank's shard of that dimension.
# partial_ marks a partial sum, still to be all-reduced (Partial in PyTorch's DTensor).
#
#     B  batch of this replica         N  attention heads          n = N / tp
#     S  sequence length, in tokens    D  size of a head
#     H  hidden size                   F  feed-forward size        f = F / tp
#     V  vocabulary entries            L  layers                   v = V, padded, / tp
#
# A digit is a literal size (row_BS1). tp is the number of ranks that share one copy of the model;
# dp is the number of copies, the replicas. World size = tp · dp.
#
# "region carried" marks code that is copied from its home chapter, nearly all at the end of the
# file, and "region shared" code that later chapters copy. Editors fold both.

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
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 is ignored
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


# region shared: GPT config
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


# endregion

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# Two collectives are enough for this chapter. (Chapter 1 explains them. `group_size`, `group_rank`
# and `_all_reduce`, which works in place, stand at the end of this file.)
#
#     all-reduce    rank 0: a    rank 1: b     →    rank 0: a + b     rank 1: a + b
#     all-gather    rank 0: a    rank 1: b     →    rank 0: [a, b]    rank 1: [a, b]
#
# ── 1.1 Entering and leaving a tensor-parallel region: the operators f and g ────────────────────
#
# Inside a tensor-parallel region each rank computes alone on its shard. An operator at each
# boundary keeps both passes correct:
#
#                       forward          backward
#     copy_to_tp        identity         all-reduce     x was used on every rank: gradients add up
#     reduce_from_tp    all-reduce       identity       y is a sum: dL/dy goes to each partial sum
#     scatter_to_tp     take a shard     all-gather     each rank has the gradient of its shard only
#     gather_from_tp    all-gather       take a shard   all ranks use the same full tensor
#
# The first two are f and g of the paper's figure 3. They are a conjugate pair, and so are the last
# two: swap forward and backward of one, and you get the other. So each operator is two small
# functions, and one autograd Function applies both. (A plain dist.all_reduce is invisible to
# autograd, as PyTorch warns. That is right for g by accident, and leaves no f.)
#
# An example with scalars: x = 3 on two ranks, with weights 2 and 5. In forward rank 0 has 3 · 2,
# rank 1 has 3 · 5, and g makes 21 on both. In backward dL/dz = 1 passes g unchanged, so rank 0
# computes dL/dx = 2 and rank 1 computes 5. Both are partial sums of 7, and f adds them.
#
# Leave out copy_to_tp and training still runs. The loss falls, but every weight below it gets one
# rank's partial gradient. This is the most common bug of home-made tensor parallelism. The loss
# curve alone does not show it; a comparison of gradients does, at the first step.


# region shared: conjugate operators
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


# endregion
# region shared: tensor-parallel operators
def _identity(x: Tensor, group: Group) -> Tensor:
    return x


def _sum(partial_x: Tensor, group: Group) -> Tensor:
    # all_reduce works in place, and the caller may still need its partial sum.
    return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    shards = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(shards, x, group)
    return torch.cat(shards, dim=-1)


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
    if group_size(group) == 1:
        return partial_x
    return _Conjugate.apply(partial_x, group, _sum, _identity)


# endregion
def scatter_to_tp(x: Tensor, group: Group = None) -> Tensor:
    """This rank's shard of the last dimension, (..., F) to (..., f); the gradient is all-gathered.

    Args: x (..., F), replicated. Raises: ValueError where F does not divide over the ranks.
    Source: ours; Megatron-LM's code has it.
    """
    return _Conjugate.apply(x, group, _take_shard, _all_gather) if group_size(group) > 1 else x


def gather_from_tp(x: Tensor, group: Group = None) -> Tensor:
    """All-gathers the last dimension, (..., f) to (..., F); the gradient is sharded again.

    Right only where every rank computes the same from the result: its gradient is then replicated,
    and a sum over the ranks would count it tp times.
    Args: x (..., f), of one shape on every rank. Source: ours; Megatron-LM's code has it.
    """
    return _Conjugate.apply(x, group, _all_gather, _take_shard) if group_size(group) > 1 else x


# ── 1.2 Linear layers ───────────────────────────────────────────────────────────────────────────
#
# y = x Wᵀ + b can be sharded in two ways. PyTorch stores W as (out, in), so the paper's columns
# are rows of W here:
#
#     column-parallel   shards the outputs:   y_BSf = x_BSH W_fHᵀ + b_f        x replicated
#     row-parallel      shards the inputs:    partial_z_BSH = y_BSf W_Hfᵀ      y sharded
#
# The row-parallel bias is added once, after the all-reduce. Added before, it would count tp times.
#
# The column-parallel backward has two GEMMs. The input's gradient is a partial sum and needs an
# all-reduce; the weight's gradient needs no communication. So the first is computed, its
# all-reduce is started, and the second GEMM runs while the collective is in flight:
#
#     partial_dx = dy W    ──► all-reduce, asynchronous ─────────►  dx       network
#                              dW = dyᵀ x,  db = Σ dy               wait     tensor cores
#
# This Function therefore contains copy_to_tp: calling it as well would make the gradient tp times
# too large. On a GPU the all-reduce must be enqueued before the second GEMM can occupy the device;
# Megatron-LM sets CUDA_DEVICE_MAX_CONNECTIONS=1 for that reason.
#
# Each layer draws nn.Linear's full weight from the default generator and keeps its own shard. The
# result equals the plain layer bit for bit, for every tp. Shards drawn one by one from equal seeds
# would all be equal to each other, so `reset_parameters` raises. (The model of part 2 draws
# its weights by name instead, and loads each rank's shard.)
#
# Under autocast GEMMs run in bf16 (fp32's range, 8 bits of precision); weights stay in fp32.
# Partial sums are bf16 too: so a correct parallel layer rounds differently from a single device. A
# column-parallel layer without a row-parallel one after it gathers its output (gather_output). A
# row-parallel layer with a replicated input scatters it first (input_is_parallel=False).


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSH, weight_fH, bias_f, group):
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]  # a frozen weight keeps no activation
        ctx.save_for_backward(x_BSH if needs_dweight else None, weight_fH if needs_dx else None)
        ctx.group = group
        return F.linear(x_BSH, weight_fH, bias_f)

    @staticmethod
    @once_differentiable  # autograd cannot see the all-reduce: a second derivative would be wrong
    def backward(ctx, dy_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        dx_BSH = dweight_fH = dbias_f = work = None
        if ctx.needs_input_grad[0]:
            dx_BSH = partial_dx_BSH = dy_BSf @ weight_fH  # the all-reduce works in place
            if group_size(ctx.group) > 1:
                overlaps = not torch.compiler.is_compiling()  # a compiler orders the calls itself
                work = dist.all_reduce(partial_dx_BSH, group=ctx.group, async_op=overlaps)
        if ctx.needs_input_grad[1]:
            dweight_fH = einsum(dy_BSf, x_BSH, "... f, ... H -> f H")
        if ctx.needs_input_grad[2]:
            dbias_f = reduce(dy_BSf, "... f -> f", "sum")
        if work is not None:
            work.wait()
        return dx_BSH, dweight_fH, dbias_f, None


def _cast_to_autocast(x: Tensor | None) -> Tensor | None:
    """Autocast downcasts F.linear's arguments, but it is off in backward, where the saved fp32
    tensors would meet bf16 gradients. So they are downcast once, before they are saved."""
    if x is None or x.dtype == torch.float64 or x.is_meta:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Sharded:
    def reset_parameters(self) -> None:  # nn.Linear.__init__ calls it before there is a group
        if hasattr(self, "group"):
            raise NotImplementedError("cannot initialize a shard alone: build the layer again")
        super().reset_parameters()


class ColumnParallelLinear(_Sharded, nn.Linear):
    """nn.Linear with sharded outputs: x_BSH, replicated, to y_BSf, f = out_features / tp.

    Args: in_features, out_features, bias: as in nn.Linear, over all ranks. gather_output: return
        (..., out_features), replicated. group: the tensor-parallel group; None is all ranks.
    The layer sums the gradient of its input over `group`: do not call `copy_to_tp` before it. The
    default generator must be in the same state on every rank (torch.manual_seed).
    Raises: ValueError where out_features does not divide over the ranks.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = False,
        group: Group = None,
    ):
        super().__init__(in_features, out_features, bias)
        self.gather_output = gather_output
        self.group = group
        self.weight = nn.Parameter(_take_shard(self.weight.detach(), group, 0, "out_features"))
        if bias:
            self.bias = nn.Parameter(_take_shard(self.bias.detach(), group, 0))

    def forward(self, x_BSH: Tensor) -> Tensor:
        operands = [_cast_to_autocast(x) for x in (x_BSH, self.weight, self.bias)]
        y_BSf = _ColumnParallelLinear.apply(*operands, self.group)
        return gather_from_tp(y_BSf, self.group) if self.gather_output else y_BSf


class RowParallelLinear(_Sharded, nn.Linear):
    """nn.Linear with sharded inputs: y, here y_BSf, f = in_features / tp, to z_BSH, replicated.

    Args: as `ColumnParallelLinear`'s; the bias is replicated. input_is_parallel: False where the
        input is (..., in_features), replicated, and the layer takes its shard.
    Raises: ValueError where in_features does not divide over the ranks.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        group: Group = None,
    ):
        super().__init__(in_features, out_features, bias)
        self.input_is_parallel = input_is_parallel
        self.group = group
        self.weight = nn.Parameter(_take_shard(self.weight.detach(), group, 1, "in_features"))

    def forward(self, y: Tensor) -> Tensor:
        y_BSf = y if self.input_is_parallel else scatter_to_tp(y, self.group)
        partial_z_BSH = F.linear(y_BSf, self.weight)
        z_BSH = reduce_from_tp(partial_z_BSH, self.group)
        return z_BSH if self.bias is None else z_BSH + self.bias.to(z_BSH.dtype)


# ── 1.3 Attention and the feed-forward layer ────────────────────────────────────────────────────
#
# A column-parallel matrix, then a row-parallel one; between them the plain computation on n heads
# or f features. No line of `Attention` and `MLP` in part 2 depends on tp: the parallel model
# passes them other classes for their two matrices. LayerNorm, residual connections and the
# dropout around sublayers work on replicated tensors, and compute the same on every rank.
#
# Why columns first? Rows first would leave partial sums before the gelu, and gelu(a + b) is not
# gelu(a) + gelu(b): more communication. Softmax has the same problem, but needs no more than one
# head. So attention is sharded between heads, and not inside one.
#
# ── 1.4 The embedding ───────────────────────────────────────────────────────────────────────────
#
# The embedding table is sharded by vocabulary entries: rank r holds the rows of token ids
# [r·v, (r + 1)·v). Each rank looks up the tokens that it holds and puts zeros for all others; the
# sum over ranks then has each token's embedding once.
#
# With V = 5 on two ranks, v = 3: rank 0 holds token ids 0, 1, 2, rank 1 holds 3, 4 and one padding
# row. For the tokens 4, 1, 3 rank 0 looks up (0, e1, 0) and rank 1 (e4, 0, e3).
#
# 50,257 is not divisible by 8. Megatron-LM pads the table to a multiple of 128 · tp, here to
# 51,200, which suits the tensor cores. The last ranks may hold some or only padding.


# region shared: vocabulary shards
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


# endregion


class VocabParallelEmbedding(_Sharded, nn.Embedding):
    """nn.Embedding with sharded rows: tokens_BS (int64, replicated) to x_BSH, replicated.

    Args: num_embeddings: vocabulary entries without padding. embedding_dim: H. multiple: v is
        padded to a multiple of it. Padding rows stay zero as long as the loss masks them.
    Raises: ValueError for a token id outside the vocabulary; on a GPU its embedding is NaN.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, group: Group = None, multiple: int = 1
    ):
        super().__init__(num_embeddings, embedding_dim)
        padded = padded_vocab_size(num_embeddings, group_size(group), multiple)
        full = F.pad(self.weight.detach(), (0, 0, 0, padded - num_embeddings))
        self.group = group
        self.weight = nn.Parameter(_take_shard(full, group, dim=0))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        row_BS, is_local_BS = _local_rows(tokens_BS, self.weight.shape[0], self.group)
        x_BSH = F.embedding(row_BS, self.weight)
        partial_x_BSH = torch.where(is_local_BS[..., None], x_BSH, 0)
        x_BSH = reduce_from_tp(partial_x_BSH, self.group)
        return torch.where(_is_id(tokens_BS, self.num_embeddings)[..., None], x_BSH, torch.nan)


# ── 1.5 Vocab-parallel cross entropy ────────────────────────────────────────────────────────────
#
# The output layer is the widest: with 51,200 vocabulary entries and 8 × 1,024 tokens, fp32 logits
# take 1.7 GB, and their gradient takes as much again. A column-parallel output layer leaves each
# rank with the logits of its own vocabulary shard, logits_BSv. An all-gather before the softmax
# would undo that saving, and the loss does not need it:
#
#     loss = log Σ_j exp(x_j) − x_target
#
# Both terms are reductions over the vocabulary. Each rank reduces its shard, and three scalars per
# token are all-reduced instead of V logits per token gathered:
#
#     max_j x_j                      all-reduce(max)   → m, so that exp cannot overflow
#     Σ_j exp(x_j − m)               all-reduce(sum)  ┐ one collective: the two are stacked
#     x_target − m, on its owner     all-reduce(sum)  ┘ every other rank contributes 0
#
# The gradient needs no communication: dL/dx_j = softmax_j − 1[j = target], and each rank has both
# for its own shard.  [paper, section 3]
#
# Three mistakes here are silent. Padding columns count as vocabulary entries unless they are
# masked: the loss is slightly too large. (Megatron-LM leaves them in: its initial loss is
# log 51,200 = 10.84, not log 50,257 = 10.82.) Logits that were gathered before the call: with
# vocab_size the loss is right, but every rank except the first gets a gradient of zero. And bf16
# logits must be upcast before exp, because autocast does not see inside an autograd Function.


# region shared: vocabulary loss
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


# endregion


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


# ── 1.6 Dropout: one mask for replicated tensors, one per rank for sharded ones ─────────────────
#
# A replicated activation must lose the same elements on every tensor-parallel rank. With different
# masks the ranks' copies silently drift apart. A sharded activation needs different masks: with
# equal ones, head 0 and head n lose the same weights. Replicas draw different masks for both.
#
# The paper keeps two generator states (appendix B.2). Here a mask is a function of its place:
# seed, step, replica, the module's name and, where the activation is sharded, the tensor-parallel
# rank. So a checkpoint needs no state but the step, and a recomputed layer draws its masks again.


# region shared: dropout
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


# endregion

# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# A GPT for a single device, in ordinary PyTorch: the reference. Three details matter for sharding:
#
# · The rows of the fused query-key-value matrix are ordered (head, {q, k, v}, D). So the first half
#   of the rows is the first half of the heads, complete. The order ({q, k, v}, head, D) would give
#   the first of two ranks all queries and half of the keys.
# · The output layer has no weight of its own: it multiplies with the embedding table (tied).
# · Each layer adds two sublayer outputs to x, 2L in all. The matrices that make them start smaller
#   by 1/√(2L), so that the sum starts no larger than in a shallow model.  [paper, section 4.2]
#
# The embedding and the two matrices of each sublayer are made by classes that the caller may
# replace. On a single device n = N and f = F.


# region shared: plain GPT
def core_attention(q_BnSD: Tensor, k_BnSD: Tensor, v_BnSD: Tensor, dropout: Dropout) -> Tensor:
    """Causal attention, each head by itself: q, k, v (B, n, S, D) to y_BnSD; drops weights."""
    if not dropout.p or not dropout.training:
        # One kernel that never stores the S × S weights. Its own dropout accepts no generator.
        return F.scaled_dot_product_attention(q_BnSD, k_BnSD, v_BnSD, is_causal=True)
    scores_BnSS = (q_BnSD / math.sqrt(q_BnSD.shape[-1])) @ k_BnSD.mT  # q kᵀ can overflow fp16
    is_future_SS = q_BnSD.new_ones(scores_BnSS.shape[-2:], dtype=torch.bool).triu(1)
    weights_BnSS = at_least_fp32(scores_BnSS.masked_fill(is_future_SS, -torch.inf)).softmax(dim=-1)
    return dropout(weights_BnSS.to(v_BnSD.dtype)) @ v_BnSD


class Attention(nn.Module):
    """Multi-head self-attention, x_BSH to (B, S, H).

    Args: column and row are called with (inputs, outputs) and make the two matrices.
    """

    def __init__(self, config: GPTConfig, column: Callable = nn.Linear, row: Callable = nn.Linear):
        super().__init__()
        self.head_size = config.hidden_size // config.num_heads
        self.qkv = column(config.hidden_size, 3 * config.hidden_size)
        self.out = row(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.dropout, sharded=True)

    def forward(self, x_BSH: Tensor) -> Tensor:
        qkv_3BnSD = rearrange(
            self.qkv(x_BSH), "B S (n three D) -> three B n S D", three=3, D=self.head_size
        )
        y_BnSD = core_attention(*qkv_3BnSD, self.dropout)
        return self.out(rearrange(y_BnSD, "B n S D -> B S (n D)"))


class MLP(nn.Module):
    """The feed-forward sublayer, x_BSH to (B, S, H). Args: as `Attention`'s."""

    def __init__(self, config: GPTConfig, column: Callable = nn.Linear, row: Callable = nn.Linear):
        super().__init__()
        self.up = column(config.hidden_size, config.ffn_hidden_size)
        self.down = row(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_BSH: Tensor) -> Tensor:
        y_BSf = F.gelu(self.up(x_BSH), approximate="tanh")
        return self.down(y_BSf)


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H): two sublayers with LayerNorm, dropout and residual connection.

    Args: as `Attention`'s.
    """

    def __init__(self, config: GPTConfig, column: Callable = nn.Linear, row: Callable = nn.Linear):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, column, row)
        self.dropout1 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config, column, row)
        self.dropout2 = Dropout(config.dropout)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.dropout1(self.attention(self.norm1(x_BSH)))
        return x_BSH + self.dropout2(self.mlp(self.norm2(x_BSH)))


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_BSV.

    Args: embedding is called with (V, H), column and row as in `Attention`.
    Raises: ValueError for a sequence longer than seq_length.
    """

    def __init__(
        self,
        config: GPTConfig,
        embedding: Callable = nn.Embedding,
        column: Callable = nn.Linear,
        row: Callable = nn.Linear,
    ):
        super().__init__()
        self.config = config
        self.embedding = embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        layers = [Block(config, column, row) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(config.hidden_size)
        if not self.final_norm.weight.is_meta:  # on "meta" there are shapes without memory
            self.load_state_dict(dict(initial_weights(config)))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        S = tokens_BS.shape[1]
        if S > self.config.seq_length:
            raise ValueError(f"{S} tokens, but the model has {self.config.seq_length} positions")
        return self.dropout(self.embedding(tokens_BS) + self.positions.weight[:S])

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embed(tokens_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return F.linear(self.final_norm(x_BSH), self.embedding.weight)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(at_least_fp32(self(tokens_BS)), "B S V -> B V S")
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name to shape of every parameter of the plain model, without memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def initial_weights(config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """The full initial weights, a function of `config` alone, one tensor at a time.

    They are drawn on the CPU: a GPU's generator gives other values.
    Source: Megatron-LM (Shoeybi et al., 2019), section 4.2.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in parameter_shapes(config).items():
        if name.endswith("bias"):
            yield name, torch.zeros(shape, device="cpu")
        elif len(shape) == 1:  # the weights of LayerNorm
            yield name, torch.ones(shape, device="cpu")
        else:
            std = config.init_std
            if name.endswith(("out.weight", "down.weight")):
                std /= math.sqrt(2 * config.num_layers)
            yield name, torch.randn(shape, generator=generator, device="cpu") * std


# endregion

# ── 2.2 The parallel model ──────────────────────────────────────────────────────────────────────
#
# The plain model with sharded matrices and a sharded embedding table. The tied output layer
# multiplies with the embedding's own shard: a column-parallel GEMM, with copy_to_tp before it. So
# lookup and output layer add their gradients into the same rows, and nothing is left to be summed
# over the tensor-parallel ranks.
#
# A model that is large for its GPUs keeps only the input of each layer, and recomputes the layer in
# backward: a third more arithmetic, and one or two more all-reduces per layer. (`checkpoint` stops
# at the last tensor that backward needs; the last all-reduce may come after it.) The recomputed
# layer draws the same dropout masks, since they are functions of place.  [paper, section 4.2]


class ParallelGPT(GPT):
    """`GPT` sharded over `group`: tokens_BS, replicated, to logits_BSv.

    Its weights are those of GPT(config), for every tp; it holds one full tensor at a time.
    Args: recompute: keep each layer's input only, and compute the layer again in backward.
    Raises: ValueError where heads or features do not divide over the ranks, for a sequence longer
        than seq_length, and for dropout on several ranks without `seed_dropout`.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(self, config: GPTConfig, group: Group = None, recompute: bool = False):
        tp = group_size(group)
        check_tp(config, tp)
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(
                config,
                partial(VocabParallelEmbedding, group=group, multiple=config.vocab_multiple),
                partial(ColumnParallelLinear, group=group),
                partial(RowParallelLinear, group=group),
            )
        self.group = group
        self.recompute = recompute
        shards = {}
        for name, full in initial_weights(config):
            shards[name] = shard_tensor(name, full, config, group_rank(group), tp)
        self.load_state_dict(shards, assign=True)  # puts them in place of the shapes

    def forward(self, tokens_BS: Tensor) -> Tensor:
        draws_masks = self.training and self.dropout.p > 0
        if draws_masks and self.dropout.mask_seed is None and group_size(self.group) > 1:
            raise ValueError("dropout on several ranks: call seed_dropout before each step")
        x_BSH = self.embed(tokens_BS)
        for layer in self.layers:
            recomputes = self.recompute and self.training
            x_BSH = _recomputed(layer, x_BSH) if recomputes else layer(x_BSH)
        x_BSH = copy_to_tp(_cast_to_autocast(self.final_norm(x_BSH)), self.group)
        return F.linear(x_BSH, self.embedding.weight)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, replicated; 0 where the target is −100."""
        V = self.config.vocab_size
        return vocab_parallel_cross_entropy(self(tokens_BS), targets_BS, self.group, V)

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parameters of which this rank holds a shard; all others are replicated."""
        return [p for name, p in self.named_parameters() if shard_dim(name) is not None]


def _recomputed(layer: nn.Module, x_BSH: Tensor) -> Tensor:
    # Another forward pass may seed the masks again before this one's backward.
    seeds = {m: m.mask_seed for m in layer.modules() if isinstance(m, Dropout)}

    def run(x_BSH: Tensor) -> Tensor:
        later_seeds = {m: m.mask_seed for m in seeds}
        try:
            for module, mask_seed in seeds.items():
                module.mask_seed = mask_seed
            return layer(x_BSH)
        finally:  # also where `checkpoint` stops it early, by an exception
            for module, mask_seed in later_seeds.items():
                module.mask_seed = mask_seed

    return checkpoint(run, x_BSH, use_reentrant=False)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# One table says along which dimension each parameter is sharded. Parameters that are not in it are
# replicated: LayerNorm, positions, and the biases of row-parallel layers.


# region shared: tensor-parallel shards
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


# endregion


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


def gather_state_dict(tensors: StateDict, config: GPTConfig, group: Group = None) -> StateDict:
    """Every rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    shards = [{name: x.cpu() for name, x in tensors.items()}] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, shards[0], group)
    return merge_state_dicts(shards, config)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Tensor and data parallelism are the two dimensions of a device mesh. With --tp 2 on 4 ranks:
#
#                      tp rank 0    tp rank 1
#        replica 0      rank 0       rank 1       ← a tp group: the same tokens, different shards
#        replica 1      rank 2       rank 3
#                         ↑ a dp group: the same shard, different tokens
#
# The ranks of a tp group communicate in every layer. They are neighbours, to share a server.


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups."""

    tp: int = 1  # ranks that share one copy of the model
    dp: int = 1  # copies of the model
    tp_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    dp_group: Group = None


def make_mesh(tp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, tp), with neighbours in a tp group. Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where tp does not divide the ranks.
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    if world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    ranks = torch.arange(world).view(world // tp, tp)  # a row is a replica
    groups = [make_group(lists.tolist(), device, timeout) for lists in (ranks, ranks.T)]
    return Mesh(tp, world // tp, rank % tp, rank // tp, *groups)


# ── 4.1 Gradients over replicas ─────────────────────────────────────────────────────────────────
#
# The loss of a batch is the mean over the tokens of all replicas. Replicas rarely have equally
# many tokens that count (padding and prompts do not), so the mean of their means is another
# value, with another gradient. With losses 1, 1, 1 on one replica and 5 on the other, the mean of
# means is 3 and the mean over tokens is 2. The correct recipe: divide each replica's loss sum by
# the global token count, then sum the gradients.
#
# No gradient is summed over the tp group. Shards have complete gradients; so have replicated
# parameters, since copy_to_tp sums the gradients of the activations.


def sum_gradients(parameters: Parameters, group: Group = None) -> None:
    """All-reduces every gradient over `group`, in one flat buffer as large as the gradients.

    A missing gradient becomes zero: were it left out, two ranks could all-reduce buffers of unequal
    size. Afterwards all gradients are views of one buffer. (DistributedDataParallel sends buckets
    while backward still runs.)
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters or group_size(group) == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = _all_reduce(torch.cat([grad.flatten() for grad in grads]), group)
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = total.view_as(p).to(p.dtype)


# ── 4.2 The norm of a sharded gradient ──────────────────────────────────────────────────────────
#
# Sharded parameters are different elements on each rank: their squares are summed over the group.
# Replicated parameters are the same elements on each rank, and count once: each rank adds 1/tp of
# their squares, and all ranks get one norm, even where a single copy is NaN. Counted like shards,
# they enlarge the norm by up to √tp: gradients are clipped too much, silently.


# region shared: clipping
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


# endregion

# ── 4.3 The loop ────────────────────────────────────────────────────────────────────────────────


# region shared: plain training
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


# endregion

# `train` is `train_alone` on a mesh. It adds the replica's rows, the seeds of dropout, the count
# over replicas, the sum of gradients, the norm of shards and the sum of losses.


def train(
    model: ParallelGPT,
    optimizer: Optimizer,
    batches: Batches,
    mesh: Mesh,
    max_norm: float = 1.0,
    autocast: Autocast = None,
    seed: int = 0,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on a mesh: yields the same two scalars. Every rank must iterate it.

    Args: batches are global; where dp does not divide their rows, replicas get unequal parts, and
        the gradient is exact all the same. seed and first_step are for dropout.
    """
    for step, batch in enumerate(batches, first_step):
        optimizer.zero_grad()
        tokens_BS, targets_BS = (x.tensor_split(mesh.dp)[mesh.dp_rank] for x in batch)
        seed_dropout(model, seed, step, mesh.tp_rank, mesh.dp_rank)
        count = _all_reduce((targets_BS != -100).sum(), mesh.dp_group).clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            partial_loss = model.loss(tokens_BS, targets_BS).sum() / count
        partial_loss.backward()
        sum_gradients(model.parameters(), mesh.dp_group)
        sharded = model.sharded_parameters()
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=mesh.tp_group)
        optimizer.step()
        yield _all_reduce(partial_loss.detach(), mesh.dp_group), norm


# ── What remains ──────────────────────────────────────────────────────────────────────────────────
#
# Each sublayer ends in an all-reduce that the next sublayer waits for. For 8.3 billion parameters
# and a batch of 8 it carries 8 · 1024 · 3072 elements of 2 bytes, 50 MB. Four in each of 72 layers
# are 14.5 GB per step, and a ring of 8 sends 25 GB through every GPU. At 150 GB/s inside a server
# of 2019 that is 0.2 s, and at 12.5 GB/s between servers 2 s. The arithmetic takes 1.3 s:
# 6 · 8.3e9 · 8192 operations on 8 GPUs of 39 TFLOP/s. So tp is at most 8, the GPUs of one server.
# Chapter 3 splits larger models between layers, with one small message for many layers. And the
# activations of LayerNorm, dropout and residual connections are replicated: chapter 4 shards them.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show how rounding affects correct code (bf16: 0.4 % per GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model on this mesh and on a single device: name to error."""
    # Vocabulary and batch do not divide over the ranks; replicas have unequal token counts.
    config = GPTConfig(
        vocab_size=61, seq_length=16, num_layers=2, num_heads=2 * mesh.tp, hidden_size=16 * mesh.tp
    )
    rng = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 2 * mesh.dp + 1, 13), generator=rng).to(device)
    targets_BS[0, 3:] = -100
    plain = GPT(config).to(device, dtype)
    parallel = ParallelGPT(config, mesh.tp_group).to(device, dtype)
    lr = 1e-3
    batches = [(tokens_BS, targets_BS)] * 5
    alone = train_alone(plain, make_optimizer(plain, lr), batches, 0.1, autocast)
    steps = train(parallel, make_optimizer(parallel, lr), batches, mesh, 0.1, autocast)
    errors = {}
    for step, ((loss_alone, norm_alone), (loss, norm)) in enumerate(zip(alone, steps)):
        errors[f"loss {step}"] = abs(loss / loss_alone - 1).item()
        errors[f"norm before clipping {step}"] = abs(norm / norm_alone - 1).item()
        if step == 0:
            grads = {name: p.grad for name, p in parallel.named_parameters()}
            full = gather_state_dict(grads, config, mesh.tp_group)
            reference = {name: p.grad for name, p in plain.named_parameters()}
            errors |= relative_errors("gradient", full, reference)
    if dtype == torch.float64:
        # Where a gradient is zero, Adam divides rounding errors: fp32 weights differ.
        full = gather_state_dict(parallel.state_dict(), config, mesh.tp_group)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), len(batches) * lr)
    return over_all_ranks(errors)


def count_all_reduces(model: ParallelGPT, tokens_BS: Tensor) -> list[float]:
    """All-reduces of B·S·H elements per layer, in forward and in backward."""
    with Counter() as forward:
        loss = model.loss(tokens_BS, tokens_BS).mean()
    with Counter() as backward:
        loss.backward()
    size = tokens_BS.numel() * model.config.hidden_size * loss.element_size()
    large = ("all_reduce", size, model.group.group_name)
    # One belongs to no layer: in forward the embedding's, in backward the output layer's.
    counts = [counter.messages.count(large) - 1 for counter in (forward, backward)]
    return [count / model.config.num_layers for count in counts]


def demonstrate(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[float]:
    """Trains on text; returns how far the first losses are from the single device's."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    data = TextData(args.data, config.seq_length)

    def batches(steps: int) -> Batches:
        for step in range(steps):
            yield [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]

    # On every rank, so that none waits. Not with dropout: a single device has other masks.
    alone = []
    if config.dropout == 0:
        plain = GPT(config).to(device, dtype)
        optimizer = make_optimizer(plain, args.lr)
        steps = train_alone(plain, optimizer, batches(min(5, args.steps)), autocast=autocast)
        alone = [loss.item() for loss, _ in steps]
    model = ParallelGPT(config, mesh.tp_group, args.recompute).to(device, dtype)
    held = sum(p.numel() for p in model.parameters())
    say(f"{held:,} parameters on this rank; {len(data.tokens):,} tokens of text\n")
    say("step      loss  single device    norm  tokens/s  peak GB")
    differences = []
    optimizer = make_optimizer(model, args.lr)
    steps = train(model, optimizer, batches(args.steps), mesh, autocast=autocast, seed=args.seed)
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
    tokens_BS, targets_BS = data.batch(0, args.batch, args.seed, evaluation=True)
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss_BS = model.eval().loss(tokens_BS.to(device), targets_BS.to(device))
    say(f"\nloss on the eval split: {loss_BS.mean():.4f} nats per token\n")
    return differences


def measure(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = equivalence(mesh, device, torch.float64)
    claims = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, float64"
        claims.append((claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"]))
    differences = demonstrate(args, mesh, device)
    claim = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    if differences:
        within = max(differences)
        here = f"within {within:.0e}" if within else "equal to the bit"
        claims.append((claim, "equal", here, within <= BOUNDS[args.dtype]))
    if mesh.tp > 1:
        model = ParallelGPT(config_from(args, GPTConfig), mesh.tp_group).to(device)
        tokens_BS = torch.zeros(1, args.seq_length, dtype=torch.int64, device=device)
        forward, backward = count_all_reduces(model.eval(), tokens_BS)
        here = f"{forward:g} + {backward:g}"
        claims.append(("all-reduces per layer, forward + backward", "2 + 2", here, here == "2 + 2"))
    return claims


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = make_mesh(args.tp, device, args.timeout)
    say_setting(args, f": tp {mesh.tp} × dp {mesh.dp}")
    if args.check:
        good = print_errors(equivalence(mesh, device, *dtypes(args)), BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, mesh, device))
    if not good:
        sys.exit(1)


@dataclass
class Options:  # the chapter's own flags
    tp: int | None = flag(None, "ranks per replica; None: 2 if even, else 1", least=1)
    batch: int = flag(16, "sequences per step, over all replicas", least=1)
    lr: float = flag(1e-3, "learning rate", least=1e-9)
    recompute: bool = flag(False, "keep each layer's input only, recompute the rest")
    data: str = flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the file that they name, do not fit."""
    if args.tp is None:
        args.tp = 1 if args.world_size % 2 else 2
    if args.world_size % args.tp:
        raise ValueError(f"--tp {args.tp} must divide the {args.world_size} ranks")
    check_tp(config_from(args, GPTConfig), args.tp)
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, GPTConfig], check_args, ranks=4, steps=80)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region shared: text data
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


# endregion
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
