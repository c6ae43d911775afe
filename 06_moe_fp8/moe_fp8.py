# SPDX-License-Identifier: MIT-0
"""Chapter 6. Mixture of experts sharded over ranks; and, in fp8.py, GEMMs in FP8.

Papers: Nemotron 3 Nano and the Nemotron 3 white paper, NVIDIA, 2025, arXiv 2512.20848, 2512.20856;
        the balancing bias: Wang et al., 2024, arXiv 2408.15664

The problem. In chapters 1 to 5 every token is multiplied with every parameter, so a larger model
costs more for each token.

The idea. Parameters that most tokens do not use: 128 small feed-forward layers, the experts, of
which a router chooses 6 for each token. Nemotron 3 Nano has 31.6 billion parameters and uses 3.6
billion of them for a token. Each rank holds some experts, and the tokens are sent to them. Two
ranks, four experts, two experts per token:

        rank 0: tokens a b            rank 1: tokens c d
        router: a→0,2  b→0,1          router: c→2,3  d→0,3
              │                             │
        sort  a0 b0 b1 │ a2           d0 │ c2 c3 d3        a row per token and chosen expert
              └────┐  ╲╱  ┌─────────────┘
        all-to-all │  ╱╲  │                                each row to the rank of its expert
        experts 0: a b d · 1: b       experts 2: a c · 3: c d          uneven
        all-to-all back, un-sort, weighted sum             y_a = w_a0·E0(a) + w_a2·E2(a)

These GEMMs still cost as many bits as their operands have. The second half of the chapter rounds
the operands to 8 bits: fp8.py, next to this file, on top of this model.

Run it (no flag is needed; --help lists them):

    python 06_moe_fp8/moe_fp8.py               4 local ranks, expert parallel 2 × data parallel 2
    python 06_moe_fp8/moe_fp8.py --ranks 1     one process, for a debugger
    python 06_moe_fp8/moe_fp8.py --check       equivalence alone, the error of each tensor
    python 06_moe_fp8/fp8.py                   the same model in FP8
    torchrun --nproc-per-node=8 06_moe_fp8/moe_fp8.py --ep 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        06_moe_fp8/moe_fp8.py --ep 8

It proves in float64 that every gradient equals the single device's, also where ranks and experts
get no token. It trains a small model from a start that overloads two experts, and prints the
claims that it has measured.

Left out: published weights (load_nemotron3.py); the papers' figures (moe_fp8_tables.py); Mamba
layers (chapter 5); expert capacity (no token is dropped here).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape: a CAPITAL is a full dimension, a small letter this rank's shard.
#
#     B  sequences of this rank     E  experts              e = E / ep, this rank's experts
#     S  sequence length            K  experts per token
#     T  tokens of this rank, B·S   R  rows, T·K: one per token and chosen expert
#     H  hidden size                r  rows that this rank's experts receive
#     F  expert's hidden size       N  query heads          D  size of a head
#     V  vocabulary entries         G  key-value heads     W  elements of a row in latent width
#     L  layers with experts        P  ranks of an ep group
#
# ep ranks share one set of experts, and there are dp such sets: ep · dp ranks. Each has tokens of
# its own, and replicates everything but the experts. (F before a dot is torch.nn.functional.)
#
# "region carried" marks code that is copied from its home, nearly all at the end of the file.

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import statistics
import sys
import sysconfig
import threading
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 does not count
Splits = list[int]  # rows for each rank, or from each
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class MoEConfig:
    """Sizes of a model of attention and experts. Raises: ValueError for impossible sizes."""

    vocab_size: int = 256  # V
    hidden_size: int = flag(64, "hidden size, H", least=1)
    pattern: str = flag("*E*E", "layers: * attention, E experts")
    num_heads: int = flag(4, "query heads, N", least=1)
    num_kv_heads: int = flag(2, "key-value heads, G", least=1)
    head_size: int | None = None  # D; None: H / N
    num_experts: int = flag(8, "experts, E", least=1)
    top_k: int = flag(2, "experts per token, K", least=1)
    expert_size: int = flag(64, "hidden size of an expert, F", least=1)
    shared_size: int = flag(128, "hidden size of the expert for every token; 0: none")
    moe_latent_size: int = flag(0, "elements of a row that is sent, W; 0: the hidden size")
    gate: str = flag("sigmoid", "the router's scores", choices=["sigmoid", "softmax"])
    gate_scale: float = 2.5  # the weights of a token's experts add up to this
    norm_eps: float = 1e-5  # of each RMSNorm
    init_std: float = 0.02  # of the initial weights
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        if self.head_size is None:
            self.head_size = self.hidden_size // max(1, self.num_heads)
        for name, value in vars(self).items():
            least = 0 if name in ("shared_size", "moe_latent_size", "seed") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: choose at most num_experts={self.num_experts}")
        if self.num_heads % self.num_kv_heads:
            heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
            raise ValueError(f"{heads}: the first must be a multiple of the second")
        if "E" not in self.pattern or set(self.pattern) - set("*E"):
            remedy = "one letter of '*E' per layer, at least one E (Mamba is chapter 5's)"
            raise ValueError(f"pattern={self.pattern!r}: {remedy}")
        if self.gate not in ("sigmoid", "softmax"):
            raise ValueError(f"gate={self.gate!r}: sigmoid or softmax")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 The router ──────────────────────────────────────────────────────────────────────────────
#
# A router is one small matrix. It gives each token a score per expert. The K best are chosen, and
# their scores become the weights of a sum:
#
#     s = sigmoid(x Wᵀ)               a score between 0 and 1 for each expert, independently
#     chosen = top-K of s + β         β, one value per expert, balances the load: section 1.2
#     w_i = λ · s_i / Σ_chosen s      from s alone: β decides which experts compute, and leaves
#                                     their weights as they are
#
# One token, four experts, K = 2, λ = 2.5. Expert 0 was overloaded, so its β is negative:
#
#     expert                   0       1       2       3
#     x Wᵀ                   2.00    1.00    0.50   −1.00
#     s                      0.88    0.73    0.62    0.27      expert 0 fits best,
#     β                     −0.30    0       0       0
#     s + β                  0.58    0.73    0.62    0.27      but 1 and 2 are chosen
#     w                       –      1.35    1.15     –        2.5 · 0.73 / (0.73 + 0.62) = 1.35
#
# Why no softmax? Its scores compete before anything is chosen. Sigmoids compete among the chosen
# only, in the last line. (Both are here.)
#
# The choice has no gradient. The router learns through w, the weights of the chosen experts. With
# one expert per token λ · s / s would be a constant, and the router would not learn: w is λ · s.
#
# The division is a softmax of log s. Written as s / (Σ s + 1e-20), it fails where all scores are
# small: at logits near −50 the weights of fp32 add up to 0.05 and not to 2.5.
#
# Two experts can be nearly equal, and rounding decides between them. So all of this is in fp32 at
# least, whatever the model's dtype. The router also counts how often each expert was chosen.

Routing = namedtuple("Routing", "experts_TK weights_TK log_scores_TE")


def count_rows(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, (E,) int64; torch.bincount makes the host wait. Source: ours."""
    chosen_R = experts_TK.flatten()
    return chosen_R.new_zeros(num_experts).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))


class Router(nn.Module):
    """Chooses K of E experts for each token: x_TH to (experts_TK, weights_TK, log_scores_TE).

    experts_TK is int64, the others at least fp32. `bias` is a buffer that only
    `update_expert_bias` moves. `counts` adds up how often each expert was chosen in training mode.
    Source: Nemotron 3 Nano; the bias: Wang et al., 2024.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        E = config.num_experts
        weight_EH = torch.randn(E, config.hidden_size)
        self.weight = nn.Parameter(weight_EH * config.init_std)
        self.register_buffer("bias", torch.zeros(E))  # β
        self.register_buffer("counts", torch.zeros(E, dtype=torch.int64), persistent=False)

    def forward(self, x_TH: Tensor) -> Routing:
        x_TH = at_least_fp32(x_TH)
        with torch.autocast(x_TH.device.type, enabled=False):  # it would compute in bf16
            logits_TE = F.linear(x_TH, self.weight.to(x_TH.dtype))
            if self.config.gate == "sigmoid":
                log_scores_TE = F.logsigmoid(logits_TE)
            else:
                log_scores_TE = logits_TE.log_softmax(-1)
            scores_TE = log_scores_TE.detach().exp()  # the choice has no gradient
            experts_TK = (scores_TE + self.bias).topk(self.config.top_k, -1).indices
            chosen_TK = log_scores_TE.gather(-1, experts_TK)  # without β
            weights_TK = chosen_TK.softmax(-1) if self.config.top_k > 1 else chosen_TK.exp()
            weights_TK = weights_TK * self.config.gate_scale
        if self.training:
            self.counts += count_rows(experts_TK, self.config.num_experts)
        return Routing(experts_TK, weights_TK, log_scores_TE)


# ── 1.2 Load balancing ──────────────────────────────────────────────────────────────────────────
#
# Nothing keeps a router from sending every token to the same two experts. Chosen experts learn, and
# experts that have learned are chosen. The others are unused. Two remedies, used together:
#
# The bias. After each optimizer step, lower β of each overloaded expert a little:
#
#     β_i ← β_i + γ · sign(mean of counts − count_i)         γ = 0.001
#
#     counts 6 3 0 3, mean 3     →     β moves by  −γ  0  +γ  0          however large the gap is
#
# This has no gradient and so does not disturb the loss. The counts are those of the global batch,
# of all ranks. With local counts each rank would move β elsewhere, and the replicas of one router
# would drift apart. (A recomputed layer counts twice, for all experts alike: the sign stays.)
#
# In the example above β had to move by 0.26 before expert 0 lost a token to expert 2: 260 steps.
# So γ = 0.001 is for runs of a million steps, and this chapter's run of 80 takes ten times as much.
#
# An auxiliary loss, small (α = 0.0001), balances each sequence. For a sequence of S tokens,
#
#     f_i = fraction of its choices that fell on i, times E   a count: no gradient
#     p_i = mean over its tokens of s_i / Σ s                 over all E experts: has the gradient
#     loss = Σ_i f_i · p_i                                    1 if balanced, at most E / K
#
# Where f is large the gradient lowers p: the scores of overloaded experts shrink. f counts the
# choice without β, so that the scores become balanced by themselves. (As quoted in public, Nano
# has the loss over all tokens in pretraining and this one, without communication, in fine-tuning.)


def load_balancing_loss(log_scores_BSE: Tensor, top_k: int) -> Tensor:
    """How uneven each sequence's load is, (B,): 1 where it is balanced. α · mean joins the loss.

    Args: log_scores_BSE: the router's, of unsharded sequences; padding tokens would count.
    Source: the Switch Transformer's formula (Fedus et al., 2021), for each sequence.
    """
    E = log_scores_BSE.shape[-1]
    chosen_BSK = log_scores_BSE.detach().topk(top_k, -1).indices
    f_BSE = torch.zeros_like(log_scores_BSE).scatter_(-1, chosen_BSK, E / top_k)
    p_BE = log_scores_BSE.softmax(-1).mean(1)  # s / Σ s, in the log domain
    return (f_BSE.mean(1) * p_BE).sum(-1)


@torch.no_grad()
def update_expert_bias(routers: Iterable[Router], counts_LE: Tensor, gamma: float = 1e-3) -> None:
    """Moves every router's bias against its load, once per optimizer step, and resets its counts.

    Args: counts_LE: `router.counts` of each router, summed over all ranks that have tokens.
    Raises: ValueError for a bias below fp32, in which steps of gamma vanish.
    Source: Wang et al., 2024.
    """
    # In integers, sign(E · count − sum): a mean would be rounded, and an even load would move.
    excess_LE = counts_LE * counts_LE.shape[1] - counts_LE.sum(1, keepdim=True)
    for router, excess_E in zip(routers, excess_LE, strict=True):
        if router.bias.dtype.itemsize < 4:
            raise ValueError(f"{router.bias.dtype} bias: steps of {gamma} vanish; keep it in fp32")
        router.bias -= gamma * excess_E.sign()
        router.counts.zero_()


# ── 1.3 Experts ─────────────────────────────────────────────────────────────────────────────────
#
# An expert is a feed-forward layer without biases: W2 · relu(W1 x)². All experts of a rank are two
# tensors with a leading dimension E. Once the rows are sorted by expert, the layer is E GEMMs of
# different heights, one below the other: a grouped GEMM.
#
#     rows_RH, sorted      one matrix per expert
#       a0 ┐
#       b0 ├───────────── · W_0ᵀ ─────► 3 rows          counts = [3, 1, 0, …]: expert 2 has no row,
#       d0 ┘                                            and its GEMM has an empty result
#       b1 ────────────── · W_1ᵀ ─────► 1 row
#
# PyTorch has one kernel for it in some dtypes. Elsewhere it is one GEMM per expert.

CPU_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPED_MM_DTYPES = {"cuda": [torch.bfloat16], "cpu": CPU_DTYPES}


def _has_grouped_mm(x_RH: Tensor, weight_EFH: Tensor) -> bool:
    """Whether F.grouped_mm (PyTorch 2.10 and newer) takes these tensors."""
    if x_RH.is_cuda and torch.cuda.get_device_capability(x_RH.device) < (8, 0):
        return False
    row_bytes = math.gcd(*weight_EFH.shape[1:]) * x_RH.element_size()
    dtypes = GROUPED_MM_DTYPES.get(x_RH.device.type, [])
    if torch.compiler.is_compiling():  # which refuses the CPU's other dtypes
        dtypes = [torch.bfloat16]
    return row_bytes % 16 == 0 and x_RH.dtype in dtypes and hasattr(F, "grouped_mm")


def gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a GEMM with x (...): autocast's, except for float64. Source: ours."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def grouped_gemm(x_RH: Tensor, weight_EFH: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert times each expert's own matrix: (R, F).

    The gradient must be contiguous, not expanded as that of a bare sum().
    Args: counts: rows of each expert. Raises: ValueError where they do not fit. Source: ours.
    """
    if sum(counts) != len(x_RH) or len(counts) != len(weight_EFH):
        raise ValueError(f"counts {counts} are not {len(x_RH)} rows for {len(weight_EFH)} experts")
    dtype = gemm_dtype(x_RH)
    x_RH = x_RH.to(dtype).contiguous()
    weight_EFH = weight_EFH.to(dtype)
    if _has_grouped_mm(x_RH, weight_EFH):
        ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
        # A blocking copy would wait for all work in flight on the GPU, the all-to-all included.
        ends_E = ends_E.to(x_RH.device, non_blocking=True)
        return F.grouped_mm(x_RH, weight_EFH.mT, offs=ends_E)
    return torch.cat([x_rH @ w_FH.mT for x_rH, w_FH in zip(x_RH.split(counts), weight_EFH)])


class Experts(nn.Module):
    """E feed-forward layers: rows_RH, sorted by expert, and the rows of each, to (R, H).

    Args: counts: on the host, which GEMMs need their sizes on. Source: Nemotron 3 Nano.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        std = config.init_std
        width = config.moe_latent_size or config.hidden_size
        up_EFH = torch.randn(config.num_experts, config.expert_size, width)
        self.up = nn.Parameter(up_EFH * std)
        self.down = nn.Parameter(torch.randn(up_EFH.mT.shape) * std)  # E H F
        self.gemm = grouped_gemm  # fp8.py sets another one

    def forward(self, rows_RH: Tensor, counts: list[int]) -> Tensor:
        hidden_RF = self.gemm(rows_RH, self.up, counts).relu().square()
        return self.gemm(hidden_RF, self.down, counts)


class MLP(nn.Module):
    """The same feed-forward layer for all tokens, x (..., H) to (..., H): the shared expert.

    Source: Nemotron 3 Nano.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.shared_size, bias=False)
        self.down = nn.Linear(config.shared_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class MoELayer(nn.Module):
    """Router, experts and shared expert on a single device, the reference.

    x_BSH to (B, S, H) and each sequence's balancing loss, (B,). Source: Nemotron 3 Nano.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = MLP(config) if config.shared_size else None
        H = config.hidden_size
        W = config.moe_latent_size
        projection = nn.Linear if W else nn.Identity  # section 1.8; Identity takes any arguments
        self.into_latent = projection(H, W, bias=False)
        self.out_of_latent = projection(W, H, bias=False)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = rearrange(x_BSH, "B S H -> (B S) H")
        routing = self.router(x_TH)
        log_scores_BSE = routing.log_scores_TE.unflatten(0, x_BSH.shape[:2])
        y_TH = self.mix(x_TH, routing)
        return y_TH.view_as(x_BSH), load_balancing_loss(log_scores_BSE, self.config.top_k)

    def mix(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """The weighted sum over each token's experts, plus the shared expert."""
        # Row i is choice i % K of token i // K; sorted by expert, an expert's rows are contiguous.
        order_R = routing.experts_TK.flatten().argsort(stable=True)
        token_R = order_R // self.config.top_k
        counts = count_rows(routing.experts_TK, self.config.num_experts).tolist()
        z_TW = self.into_latent(x_TH)
        rows_RW = self.experts(z_TW[token_R], counts)
        weight_R1 = routing.weights_TK.flatten()[order_R, None]
        weighted_RW = rows_RW * weight_R1
        sum_TW = weighted_RW.new_zeros(z_TW.shape).index_add(0, token_R, weighted_RW)
        y_TH = self.out_of_latent(sum_TW.to(rows_RW.dtype))
        return y_TH + self.shared(x_TH) if self.shared else y_TH


# ── 1.4 All-to-all ──────────────────────────────────────────────────────────────────────────────
#
# The experts are sharded: rank i has experts i·e to i·e + e − 1. Rows reach them by an all-to-all,
# in which each rank has a piece for each rank:
#
#     rank 0: a0 a1    rank 1: b0 b1     →     rank 0: a0 b0    rank 1: a1 b1
#
# The pieces are rows, and the router decides how many. So a call has two lists, the splits: the
# rows that this rank sends to each rank, and those that it receives from each. A rank with nothing
# to send or receive calls it too, or the others wait for ever.
#
# torch's all_to_all_single has no gradient. The gradient of a row returns to the rank that sent
# it: backward is an all-to-all with the splits exchanged.
#
#     forward    sends rows        [2, 5]    receives rows        [4, 1]
#     backward   sends gradients   [4, 1]    receives gradients   [2, 5]
#
# Leave the exchange out and the sizes do not fit. Where every rank receives as many rows as it
# sends they do fit, and gradients go to the wrong tokens without an error.


def _exchange(rows, send, receive, group, async_op=False):
    """The received rows and, where async_op, what waits for them."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    work = dist.all_to_all_single(received, rows.contiguous(), receive, send, group, async_op)
    return received, work


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive, group):
        ctx.exchanged = (receive, send, group)
        rows_rH, _ = _exchange(rows_RH, send, receive, group)
        return rows_rH

    @staticmethod
    def backward(ctx, grad_rH):
        return _AllToAll.apply(grad_rH, *ctx.exchanged), None, None, None


def _check_splits(rows_RH: Tensor, send: Splits, receive: Splits, group: Group) -> None:
    ranks = group_size(group)
    if not (len(send) == len(receive) == ranks and sum(send) == len(rows_RH)):
        found = f"send {send}, receive {receive}, {len(rows_RH)} rows"
        raise ValueError(f"{found}: both lists need an entry per rank, and all rows must be sent")


def all_to_all(rows_RH: Tensor, send: Splits, receive: Splits, group: Group = None) -> Tensor:
    """Sends the first send[0] rows to rank 0, the next send[1] to rank 1, ...: (r, H), by sender.

    Collective over `group`, also without rows. Differentiable.
    Args: rows_RH: rows of any shape and dtype. send, receive: rows for and from each rank; rank i's
        send[j] must be rank j's receive[i], which is not checked.
    Raises: ValueError where this rank's lists do not fit. Source: ours.
    """
    _check_splits(rows_RH, send, receive, group)
    return _AllToAll.apply(rows_RH, send, receive, group) if group_size(group) > 1 else rows_RH


# ── 1.5 All-to-all, overlapped ──────────────────────────────────────────────────────────────────
#
# The shared expert needs no other rank, so it can compute while rows are in flight. That takes two
# Functions, one that starts the all-to-all and one that waits. Backward visits them in reverse and
# exchanges their roles: `_AllToAllWait` starts the gradients' all-to-all.
#
#     forward     Start: sends      shared expert              Wait: waits
#     backward    Start: waits      shared expert's backward   Wait: sends, splits exchanged


@dataclass
class _Transfer:
    """An all-to-all and its gradient's."""

    send: Splits  # in forward; in backward it receives so many
    receive: Splits
    group: Group
    received: Tensor | None = None  # the buffer of the message in flight
    work: dist.Work | None = None  # that message

    def start(self, rows: Tensor, send: Splits, receive: Splits) -> Tensor:
        self.received, self.work = _exchange(rows, send, receive, self.group, async_op=True)
        return self.received  # filled after wait()

    def wait(self) -> Tensor:
        self.work.wait()
        received = self.received
        self.received = None  # not kept alive until backward
        return received


class _AllToAllStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, transfer):
        ctx.transfer = transfer
        return transfer.start(rows_RH, transfer.send, transfer.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, unused):
        return ctx.transfer.wait(), None


class _AllToAllWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_rH, transfer):
        ctx.transfer = transfer
        transfer.wait()
        return rows_rH.view_as(rows_rH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rH):
        ctx.transfer.start(grad_rH, ctx.transfer.receive, ctx.transfer.send)
        return grad_rH, None  # of the right shape; `_AllToAllStart` takes the received gradient


def start_all_to_all(
    rows_RH: Tensor, send: Splits, receive: Splits, group: Group = None
) -> Callable[[], Tensor]:
    """`all_to_all` that returns at once: call what it returns, once, to wait for the rows (r, H).

    Args, errors: as `all_to_all`'s. Differentiable once. Source: ours.
    """
    _check_splits(rows_RH, send, receive, group)
    if group_size(group) == 1:
        return lambda: rows_RH
    transfer = _Transfer(send, receive, group)
    rows_rH = _AllToAllStart.apply(rows_RH, transfer)
    return lambda: _AllToAllWait.apply(rows_rH, transfer)


# ── 1.6 Dispatch and combine ────────────────────────────────────────────────────────────────────
#
# A plan says where each row goes, for both directions. Rows leave sorted by expert, so those for
# one rank are contiguous. They arrive sorted by sender, and the grouped GEMM needs them by expert,
# so they are sorted a second time. With the tokens and experts at the top of this file:
#
#     rank 0                                   rank 1
#     experts_TK    a: 0 2   b: 0 1            c: 2 3   d: 0 3      chosen by the router
#     rows          a0 a2 b0 b1                c2 c3 d0 d3          choice i % K of token i // K
#     order_R        0  2  3  1                 2  0  1  3          sorts these by expert:
#                   a0 b0 b1 │ a2              d0 │ c2 c3 d3
#     to_Pe         [[2, 1], [1, 0]]           [[1, 0], [1, 2]]     row j: for rank j's experts
#     send          [3, 1]                     [1, 3]               its sums
#         ── all-to-all of to_Pe, one count per expert ──
#     from_Pe       [[2, 1], [1, 0]]           [[1, 0], [1, 2]]     row j: from rank j
#     receive       [3, 1]                     [1, 3]               its sums
#         ── all-to-all of the rows ──
#                   a0 b0 b1 │ d0              a2 │ c2 c3 d3        by sender
#     order_r        0  1  3  2                 0  1  2  3          sorts these by expert:
#                   a0 b0 d0 · b1              a2 c2 · c3 d3        counts [3, 1] and [2, 2]
#
# (That a rank receives as many rows as it sends is a coincidence here.) Sorts are stable, so an
# expert finds its rows in the order of the global batch, whatever ep is. Buffers have sizes, so
# the counts must be on the host: here alone the host waits for the device, for one copy of them.
#
# Two details make a run repeatable to the bit on a GPU, where concurrent additions to one address
# happen in any order. A token is first copied K times (backward: a sum over K), so that the sort is
# a permutation, whose gradient adds no two rows. And the return writes rows, and adds nothing.


def _unsorted_by(order_R: Tensor, rows_RH: Tensor) -> Tensor:
    return torch.empty_like(rows_RH).index_copy(0, order_R, rows_RH)


@dataclass
class Plan:
    """Where rows go, and how they return; `plan_dispatch` makes it. Source: ours."""

    order_R: Tensor  # sorts this rank's rows by expert
    order_r: Tensor  # sorts the received rows by expert
    send: Splits  # rows for each rank
    receive: Splits  # rows from each rank
    counts: list[int]  # rows of each of this rank's experts
    top_k: int  # K
    group: Group  # the ranks that exchange rows


def plan_dispatch(experts_TK: Tensor, num_experts: int, group: Group = None) -> Plan:
    """The plan for tokens that chose experts_TK, int64 in [0, num_experts). Collective.

    Rank i of `group` has experts i·e to i·e + e − 1. The host waits for the device once.
    Raises: ValueError where the experts do not divide over the ranks. Source: ours.
    """
    ep = group_size(group)
    check_ep(num_experts, ep)
    order_R = experts_TK.flatten().argsort(stable=True)
    to_Pe = count_rows(experts_TK, num_experts).view(ep, -1)  # row j: for rank j's experts
    from_Pe = to_Pe.clone()  # row j: from rank j
    if ep > 1:
        dist.all_to_all_single(from_Pe, to_Pe, group=group)
    rows = [to_Pe.sum(1), from_Pe.sum(1), from_Pe.sum(0)]
    on_host = torch.cat(rows).tolist()
    receive = on_host[ep : 2 * ep]
    expert_e = torch.arange(num_experts // ep, device=order_R.device)
    expert_Pe = expert_e.repeat(ep)
    expert_r = expert_Pe.repeat_interleave(from_Pe.flatten(), output_size=sum(receive))
    order_r = expert_r.argsort(stable=True)
    send = on_host[:ep]
    counts = on_host[2 * ep :]
    return Plan(order_R, order_r, send, receive, counts, experts_TK.shape[1], group)


def dispatch(x_TH: Tensor, plan: Plan) -> Callable[[], Tensor]:
    """Sends a copy of each token to each of its experts; returns a function that waits.

    That function returns the rows of this rank's experts, (r, H), sorted by expert, plan.counts of
    each. What is computed before it is called overlaps with the all-to-all, in backward too.
    Collective. Args: x_TH: rows of any size. Source: ours.
    """
    copies_RH = repeat(x_TH, "T ... -> (T K) ...", K=plan.top_k)
    rows_RH = copies_RH.index_select(0, plan.order_R)
    wait = start_all_to_all(rows_RH, plan.send, plan.receive, plan.group)
    if group_size(plan.group) == 1:  # the rows of one sender are sorted already
        return wait
    return lambda: wait().index_select(0, plan.order_r)


def combine(rows_rH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Returns rows to their tokens and adds them up with their weights: (T, H), the rows' dtype.

    Collective. Args: rows_rH: in the order of `dispatch`. weights_TK: not sent; its dtype, at
    least fp32, is that of the sum. Source: ours.
    """
    if group_size(plan.group) > 1:
        rows_rH = _unsorted_by(plan.order_r, rows_rH)
    rows_RH = all_to_all(rows_rH, plan.receive, plan.send, plan.group)
    rows_TKH = _unsorted_by(plan.order_R, rows_RH).unflatten(0, weights_TK.shape)
    rows_TKH = rows_TKH.to(weights_TK.dtype)
    with torch.autocast(rows_rH.device.type, enabled=False):
        y_TH = einsum(weights_TK, rows_TKH, "T K, T K H -> T H")
    return y_TH.to(rows_rH.dtype)


# ── 1.7 The expert-parallel layer ───────────────────────────────────────────────────────────────
#
# Router and shared expert are replicated, and each rank applies them to its own tokens.
#
# Which gradients are complete? An expert gets rows from every rank of its ep group, so its gradient
# is already summed over the tokens of that group. A replicated parameter has seen one rank's
# tokens. So sums are still needed, over different ranks:
#
#     router, shared expert, attention, norms ...     over all ranks
#     experts                                         over the dp ranks that hold the same experts
#
# Each rank's loss is its sum divided by the global token count, so gradients are only added, and
# nothing is divided afterwards. A library that takes means has to divide twice, and by the same
# count. With 4 ranks, and g_i the gradient of rank i's own mean loss:
#
#                              a replicated parameter      an expert, ep 2 × dp 2
#     a rank's gradient        g_i, of its own tokens      g_0 + g_1 or g_2 + g_3
#     sum over                 all 4 ranks                 the 2 that hold it
#     divide by                4                           4 too: by 2 it is ep times too large
#
# With that mistake the loss of the step is right, Adam hides the factor, and clipping does not.


class ExpertParallelMoELayer(MoELayer):
    """`MoELayer` with experts sharded over `group`: this rank's x_BSH to (B, S, H), and (B,).

    Collective in forward and backward, also with B = 0. Parameters start as `MoELayer`'s do, drawn
    unsharded from the default generator, which must be in the same state on every rank. Gradients
    of experts are sums over the group's tokens, others are of this rank's: see `reduce_gradients`.
    Raises: ValueError where the experts do not divide over the ranks.
    Source: Nemotron 3 Nano; the sharding is ours.
    """

    def __init__(self, config: MoEConfig, group: Group = None):
        check_ep(config.num_experts, group_size(group))
        super().__init__(config)
        self.group = group
        for p in self.experts.parameters():
            shards = p.data.chunk(group_size(group))
            p.data = shards[group_rank(group)].clone()  # a view would keep the full tensor alive

    def mix(self, x_TH: Tensor, routing: Routing) -> Tensor:
        plan = plan_dispatch(routing.experts_TK, self.config.num_experts, self.group)
        dtype = gemm_dtype(x_TH)  # autocast's: half the bytes, and the same GEMMs
        z_TW = self.into_latent(x_TH)
        wait = dispatch(z_TW.to(dtype), plan)
        shared_TH = self.shared(x_TH) if self.shared else 0  # while rows are in flight
        rows_rW = self.experts(wait(), plan.counts)
        sum_TW = combine(rows_rW, routing.weights_TK, plan)
        return self.out_of_latent(sum_TW) + shared_TH


# ── 1.8 LatentMoE ───────────────────────────────────────────────────────────────────────────────
#
# Nemotron 3 Super and Ultra send shorter rows. A projection before dispatch shortens a token to W
# elements, experts and weighted sum compute in this latent width, and a second projection restores
# H. The router and the shared expert read all H elements of x:
#
#     x_TH ─┬─► into_latent ─► z_TW ─► experts, all-to-all twice ─► Σ w·y ─► out_of_latent ─┬─► +
#           └─► shared expert ──────────────────────────────────────────────────────────────┘
#
# Both are replicated. The second is linear, so it may come after the sum, once per token and not K
# times. Elements that are sent to experts for a token, by the white paper:
#
#     without   128 experts, K  6, rows of 4096     24,576
#     latent    512 experts, K 22, rows of 1024     22,528     and as many parameters

# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# One letter of the pattern per layer; each layer has a norm before it and adds to x. Nano's is
#
#     MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME    M Mamba, * attention, E experts
#
# Attention has few key-value heads (2 for 32 query heads): they are what generation has to cache.
# It has no position embedding. In Nano the Mamba layers provide the order, here the causal mask.


class Attention(nn.Module):
    """Causal grouped-query attention, x_BSH to (B, S, H), and no load to balance, (B,)."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]  # of q, k, v
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_size, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        heads = rearrange(self.qkv(x_BSH), "B S (heads D) -> B heads S D", heads=sum(self.heads))
        qkv = heads.split(self.heads, dim=1)  # (B, N, S, D) and twice (B, G, S, D)
        y_BNSD = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        y_BSH = self.out(rearrange(y_BNSD, "B N S D -> B S (N D)"))
        return y_BSH, x_BSH.new_zeros(len(x_BSH))


class Layer(nn.Module):
    """x_BSH + mixer(norm(x_BSH)), (B, S, H), and the balancing loss so far, (B,)."""

    def __init__(self, config: MoEConfig, mixer: nn.Module):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = mixer

    def forward(self, x_BSH: Tensor, balance_B: Tensor) -> tuple[Tensor, Tensor]:
        y_BSH, own_B = self.mixer(self.norm(x_BSH))
        return x_BSH + y_BSH, balance_B + own_B


class MoELM(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_BSV and the balancing loss, (B,).

    Args: moe_layer: makes the layers of experts, which may be parallel ones.
    """

    def __init__(self, config: MoEConfig, moe_layer: Callable = MoELayer):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = {"*": Attention, "E": moe_layer}
        self.layers = nn.ModuleList(Layer(config, kinds[kind](config)) for kind in config.pattern)
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:  # on "meta" there are shapes without memory
            self.load_state_dict(dict(initial_weights(config)))

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        x_BSH = self.embedding(tokens_BS)
        balance_B = 0
        for layer in self.layers:
            x_BSH, balance_B = layer(x_BSH, balance_B)
        return self.head(self.final_norm(x_BSH)), balance_B

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy per token in nats, loss_BS, at least fp32; and balance_B."""
        logits_BSV, balance_B = self(tokens_BS)
        logits_BVS = rearrange(at_least_fp32(logits_BSV), "B S V -> B V S")
        loss_BS = F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")
        return loss_BS, balance_B

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def counts(self) -> Tensor:
        """How often this rank's tokens chose each expert since the last bias update, (L, E)."""
        return torch.stack([router.counts for router in self.routers()])


def state_shapes(config: MoEConfig) -> dict[str, torch.Size]:
    """Name to shape of the plain model's parameters and router biases, without memory."""
    with torch.device("meta"):
        return {name: x.shape for name, x in MoELM(config).state_dict().items()}


def initial_weights(config: MoEConfig) -> Iterator[tuple[str, Tensor]]:
    """The full initial weights, a function of `config` alone, of the shapes of `state_shapes`.

    Matrices are normal; those that add to the residual stream are smaller by 1/√layers.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in state_shapes(config).items():
        if len(shape) == 1:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")
            continue
        std = config.init_std
        if name.endswith(("out.weight", "down", "down.weight")):
            std /= math.sqrt(len(config.pattern))
        yield name, torch.randn(shape, generator=generator, device="cpu") * std


class ParallelMoELM(MoELM):
    """`MoELM` with every layer's experts sharded over `group`; the rest is replicated.

    Its weights are those of MoELM(config), for every ep; one full tensor at a time is in memory.
    Each rank calls it with its own tokens. Raises: ValueError where experts do not divide.
    Source: Nemotron 3 Nano; the sharding is ours.
    """

    def __init__(self, config: MoEConfig, group: Group = None):
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(config, partial(ExpertParallelMoELayer, group=group))
        rank = group_rank(group)
        ep = group_size(group)
        shards = {name: shard_tensor(name, x, rank, ep) for name, x in initial_weights(config)}
        self.load_state_dict(shards, assign=True)  # puts them in place of the shapes
        for router in self.routers():
            router.counts = torch.zeros_like(router.counts, device="cpu")  # not in the state dict

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The experts' parameters, of which this rank holds a shard; others are replicated."""
        return [p for name, p in self.named_parameters() if shard_dim(name) is not None]


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# Two tensors of each layer of experts are sharded, by experts. All others are replicated.


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is sharded, or None."""
    return 0 if name.endswith(("experts.up", "experts.down")) else None


def check_ep(num_experts: int, ep: int) -> None:
    """Raises ValueError where the experts do not divide over `ep` ranks."""
    if num_experts % ep:
        found = f"num_experts={num_experts} does not divide over {ep} ranks"
        raise ValueError(f"{found}: ep must divide the number of experts")


def shard_tensor(name: str, full: Tensor, rank: int, ep: int) -> Tensor:
    """Rank `rank`'s shard of `full`, the plain model's tensor `name`: (e, ...) or (...); a copy."""
    dim = shard_dim(name)
    shard = full if dim is None else full.chunk(ep, dim)[rank]
    return shard.clone()


def shard_state_dict(full: StateDict, config: MoEConfig, rank: int, ep: int) -> StateDict:
    """The plain model's state dict to that of rank `rank` of an ep group; copies.

    Raises: ValueError that names what is missing, unknown, of another shape, or does not divide.
    """
    check_ep(config.num_experts, ep)
    check_state(full, config)
    return {name: shard_tensor(name, x, rank, ep) for name, x in full.items()}


def check_state(full: StateDict, config: MoEConfig) -> None:
    """Raises ValueError that names what is missing in `full`, unknown or of another shape."""
    shapes = {name: x.shape for name, x in full.items()}
    wrong = state_shapes(config).items() ^ shapes.items()
    if wrong:
        raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")


def merge_state_dicts(shards: list[StateDict]) -> StateDict:
    """The state dicts of an ep group, in order of rank, to the plain model's; gradients too.

    Raises: ValueError where replicated tensors differ between ranks.
    """
    full = {}
    for name, first in shards[0].items():
        tensors = [shard[name] for shard in shards]
        if shard_dim(name) is not None:
            full[name] = torch.cat(tensors, shard_dim(name))
            continue
        full[name] = first.clone()
        for rank, x in enumerate(tensors):
            if not torch.allclose(x, first, rtol=0, atol=0, equal_nan=True):
                found = f"rank {rank} differs from rank 0 by {(x - first).abs().max():.1e}"
                raise ValueError(f"{name} should be replicated, but {found}")
    return full


def gather_state_dict(tensors: StateDict, group: Group = None) -> StateDict:
    """Every rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    own = {name: x.detach().cpu() for name, x in tensors.items()}
    shards = [own] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, own, group)
    return merge_state_dicts(shards)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Experts are sharded in one dimension of a device mesh and replicated in the other. With --ep 2 on
# 4 ranks and 8 experts:
#
#                    ep rank 0              ep rank 1
#        set 0       rank 0: experts 0–3    rank 1: experts 4–7     ← an ep group: exchanges rows
#        set 1       rank 2: experts 0–3    rank 3: experts 4–7
#                      ↑ an edp group (expert data parallel): the same experts
#
# Each has its own tokens. An ep group exchanges rows in every layer, so its ranks are neighbours.


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups."""

    ep: int = 1  # ranks that share one set of experts
    dp: int = 1  # sets of experts
    ep_group: Group = None  # exchanges rows
    edp_group: Group = None  # holds the same experts


def make_mesh(ep: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, ep), with neighbours in an ep group. Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where ep does not divide the ranks.
    """
    world = dist.get_world_size()
    if ep < 1 or world % ep:
        raise ValueError(f"ep={ep} does not divide the {world} ranks")
    ranks = torch.arange(world).view(-1, ep)  # a row per set of experts
    ep_group = make_group(ranks.tolist(), device, timeout)
    edp_group = make_group(ranks.T.tolist(), device, timeout)
    return Mesh(ep, len(ranks), ep_group, edp_group)


def sum_gradients(parameters: Parameters, group: Group = None) -> None:
    """All-reduces every gradient over `group`, in one flat buffer; a missing one becomes zero."""
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters or group_size(group) == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    sizes = [p.numel() for p in parameters]
    for p, total in zip(parameters, _all_reduce(flat, group).split(sizes)):
        p.grad = total.view_as(p).to(p.dtype)


def reduce_gradients(model: ParallelMoELM, mesh: Mesh) -> None:
    """Sums gradients over the ranks that section 1.7 names, in two messages."""
    sum_gradients(model.sharded_parameters(), mesh.edp_group)  # of the same experts
    sum_gradients([p for name, p in model.named_parameters() if shard_dim(name) is None])


# The norm of sharded gradients is explained in chapter 2, section 4.2.
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
Step = namedtuple("Step", "loss norm counts_LE")  # mean loss per token, norm before clipping


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1) -> AdamW:
    """AdamW with Nemotron 3's settings; decays matrices, not norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def train_alone(
    model: MoELM,
    optimizer: Optimizer,
    batches: Batches,
    alpha: float = 1e-4,
    gamma: float = 1e-3,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[Step]:
    """Trains the plain model; yields (mean loss per token, norm before clipping, counts_LE).

    Args: alpha: weight of the balancing loss. gamma: step of the routers' biases.
    """
    for tokens_BS, targets_BS in batches:
        optimizer.zero_grad()
        count = (targets_BS != -100).sum().clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss_BS, balance_B = model.loss(tokens_BS, targets_BS)
        loss = loss_BS.sum() / count
        balance = balance_B.mean()
        (loss + alpha * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        counts_LE = model.counts()
        update_expert_bias(model.routers(), counts_LE, gamma)
        yield Step(loss.detach(), norm, counts_LE)


# `train` is `train_alone` on a mesh. New are the rank's rows, the two counts over all ranks, the
# sum of gradients, the norm of shards, and the sums of losses and of rows per expert.


def rank_rows(x_BS: Tensor) -> Tensor:
    """This rank's rows of a global batch x_BS; where B does not divide, unequally many."""
    return x_BS.tensor_split(group_size())[group_rank()]


def train(
    model: ParallelMoELM,
    optimizer: Optimizer,
    batches: Batches,
    mesh: Mesh,
    alpha: float = 1e-4,
    gamma: float = 1e-3,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[Step]:
    """`train_alone` on a mesh: yields the same three. Every rank must iterate it.

    Args: batches are global; a rank may have no rows, and the gradient is exact all the same.
    """
    for batch in batches:
        optimizer.zero_grad()
        tokens_BS, targets_BS = map(rank_rows, batch)
        # torch.full is filled on the device; torch.tensor would be copied there, and wait.
        sequences = torch.full((), len(tokens_BS), device=tokens_BS.device)
        count = (targets_BS != -100).sum()
        counts = _all_reduce(torch.stack([count, sequences]))
        count, sequences = counts.clamp(min=1)  # in a batch no target may count
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss_BS, balance_B = model.loss(tokens_BS, targets_BS)
        loss = loss_BS.sum() / count  # a partial sum of the mean
        balance = balance_B.sum() / sequences
        (loss + alpha * balance).backward()
        reduce_gradients(model, mesh)
        sharded = model.sharded_parameters()
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=mesh.ep_group)
        optimizer.step()
        counts_LE = _all_reduce(model.counts())  # else replicas of a router drift apart
        update_expert_bias(model.routers(), counts_LE, gamma)
        yield Step(_all_reduce(loss.detach()), norm, counts_LE)


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# Everything but the experts must fit on each rank, with 8 bytes of optimizer states per parameter.
# Chapter 7 shards all of it at once, as chapters 2 and 3 do; chapter 8 has 4 bits per value.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. fp32 and bf16 show what rounding does to right code (bf16: 0.4 % in each GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


@dataclass
class Options:  # the chapter's own flags
    ep: int | None = flag(None, "ranks per set of experts; None: 2 where that divides", least=1)
    seq_length: int = flag(64, "sequence length, S", least=1)
    batch: int = flag(16, "sequences per step, over all ranks", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)
    alpha: float = flag(1e-4, "weight of the balancing loss")
    gamma: float = flag(0.01, "step of the routers' biases; the paper's is 0.001")
    data: str = flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")


def model_config(args: argparse.Namespace) -> MoEConfig:
    # With a std of 0.02 all scores of so small a model are nearly equal, and γ steps over them.
    vocab_size = byte_encoding().n_vocab
    return config_from(args, MoEConfig, vocab_size=vocab_size, seed=args.seed, init_std=0.06)


def is_default(args: argparse.Namespace) -> bool:
    """Whether model and training are those of the default run, on whatever ranks."""
    options = replace(config_from(args, Options), ep=None)
    config = config_from(args, MoEConfig)
    return args.steps >= 80 and options == Options() and config == MoEConfig()


def largest_load(counts_LE: Tensor) -> float:
    """Rows of the busiest expert over the mean, in the worst layer: 1 is balanced."""
    mean_L = counts_LE.double().mean(1)
    return (counts_LE.amax(1) / mean_L).max().item()


@torch.no_grad()
def overload(model: MoELM) -> MoELM:
    """A bad start: all embeddings share a direction for which every router prefers experts 0, 1."""
    model.embedding.weight[:, 0] += 0.3
    for router in model.routers():
        router.weight[:2, 0] += 0.5
    return model


def uneven_batches(vocab_size: int, device: torch.device) -> Batches:
    """Five global batches. Ranks have unequally many rows, or the last rank has none."""
    for step in range(5):
        # Rank 0 has two rows and the others one; in odd steps the last rank has none.
        rows = group_size() + 1
        if step % 2:
            rows = max(1, rows - 2)
        generator = torch.Generator().manual_seed(step)
        ids_2BS = torch.randint(vocab_size, (2, rows, 13), generator=generator)
        tokens_BS, targets_BS = ids_2BS.to(device)
        targets_BS[0, 3:] = -100  # does not count
        yield tokens_BS, targets_BS


def gradients(model: nn.Module) -> StateDict:
    return {name: p.grad for name, p in model.named_parameters()}


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model on this mesh and on a single device: name to error.

    Two experts get no token, and in every second step the last rank has none.
    """
    config = MoEConfig(61, 16, num_experts=4 * mesh.ep, expert_size=12, init_std=0.05)
    plain = MoELM(config).to(device, dtype)
    parallel = ParallelMoELM(config, mesh.ep_group).to(device, dtype)
    for model in (plain, parallel):
        for router in model.routers():
            router.bias[:2] = -10
    batches = list(uneven_batches(61, device))
    lr = 1e-3
    options = {"alpha": 0.01, "gamma": 0.01, "max_norm": 0.1, "autocast": autocast}
    alone = train_alone(plain, make_optimizer(plain, lr), batches, **options)
    steps = train(parallel, make_optimizer(parallel, lr), batches, mesh, **options)
    errors = {}
    for step, (there, here) in enumerate(zip(alone, steps)):
        i = str(step)
        errors |= relative_errors("loss", {i: here.loss}, {i: there.loss})
        errors |= relative_errors("norm before clipping", {i: here.norm}, {i: there.norm})
        if dtype == torch.float64:  # elsewhere rounding may decide between nearly equal experts
            errors |= relative_errors("count of rows", {i: here.counts_LE}, {i: there.counts_LE})
        if step == 0:
            full = gather_state_dict(gradients(parallel), mesh.ep_group)
            errors |= relative_errors("gradient", full, gradients(plain))
    # In float64 alone: Adam divides rounding errors by each other where a gradient is zero.
    if dtype == torch.float64:
        full = gather_state_dict(parallel.state_dict(), mesh.ep_group)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), len(batches) * lr)
    return over_all_ranks(errors)


def text_batches(args: argparse.Namespace, device: torch.device) -> Batches:
    data = TextData(args.data, args.seq_length)
    for step in range(args.steps):
        yield tuple(x.to(device) for x in data.batch(step, args.batch, args.seed))


def parallel_model(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> ParallelMoELM:
    """The demonstration's model, from its bad start."""
    dtype, _ = dtypes(args)
    model = ParallelMoELM(model_config(args), mesh.ep_group)
    return overload(model).to(device, dtype)


def training(
    args: argparse.Namespace, model: MoELM, device: torch.device, mesh: Mesh | None = None
) -> Iterator[Step]:
    """Trains as the flags say: on a mesh, or the plain model."""
    _, autocast = dtypes(args)
    optimizer = make_optimizer(model, args.lr)
    batches = text_batches(args, device)
    options = {"alpha": args.alpha, "gamma": args.gamma, "autocast": autocast}
    if mesh is None:
        return train_alone(model, optimizer, batches, **options)
    return train(model, optimizer, batches, mesh, **options)


def demonstrate(
    steps: Iterable[Step], title: str = "single device", reference: Sequence[float] = ()
) -> tuple[list[float], list[float]]:
    """Prints four columns of a training, of which one has the losses of the `reference`.

    Returns: each step's loss and largest load.
    """
    say(f"step      loss  {title:>13}    norm  largest load")
    losses = []
    counts = []  # stay on the device: reading them would wait for it
    for step, (loss, norm, counts_LE) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        losses.append(loss)
        counts.append(counts_LE)
        if step < 5 or step % 10 == 9:
            text = ""
            if step < len(reference):
                text = f"{reference[step]:.6f}"
            load = largest_load(counts_LE)
            say(f"{step:4}  {loss:.6f}  {text:>13}  {norm:6.3f}  {load:10.2f} ×")
    say()
    return losses, [largest_load(counts_LE) for counts_LE in counts]


def single_device_losses(args: argparse.Namespace, device: torch.device) -> list[float]:
    """The plain model's first losses, on every rank: no rank waits for another."""
    dtype, _ = dtypes(args)
    plain = overload(MoELM(model_config(args))).to(device, dtype)
    first = itertools.islice(training(args, plain, device), 5)
    return [step.loss.item() for step in first]


def claims(
    args: argparse.Namespace, errors: dict[str, float], alone: list[float], losses: list[float]
) -> list[tuple]:
    """What this run has measured of equality: (claim, paper, here, verdict)."""
    rows = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW", "count of rows"):
        error = worst(errors, kind)
        here = f"worst {error:.1e} relative"
        claim = f"every {kind} equals the single device's, float64"
        rows.append((claim, "exact", here, error <= BOUNDS["fp64"]))
    if alone:
        within = max(abs(x - y) for x, y in zip(losses, alone))
        claim = f"the first {len(alone)} losses equal the single device's, {args.dtype}"
        rows.append((claim, "equal", f"within {within:.0e}", within <= BOUNDS[args.dtype]))
    return rows


def measure(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """Proves the equivalence, trains, and returns the claims that this run has measured."""
    errors = equivalence(mesh, device, torch.float64)
    alone = single_device_losses(args, device)
    model = parallel_model(args, mesh, device)
    losses, loads = demonstrate(training(args, model, device, mesh), reference=alone)
    rows = claims(args, errors, alone, losses)
    if loads:
        last = statistics.median(loads[-10:])
        here = f"{loads[0]:.2f} × the mean, then {last:.2f} ×"
        verdict = last < 1.5 if is_default(args) else "needs the default run"
        rows.append((f"largest load, γ = {args.gamma:g}", "balanced", here, verdict))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = make_mesh(args.ep, device, args.timeout)
    say_setting(args, f": ep {mesh.ep} × dp {mesh.dp}")
    if args.check:
        errors = equivalence(mesh, device, *dtypes(args))
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, mesh, device))
    if not good:
        sys.exit(1)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the file that they name, do not fit."""
    config = model_config(args)
    if args.ep is None:
        args.ep = math.gcd(2, args.world_size, config.num_experts)
    if args.world_size % args.ep:
        raise ValueError(f"--ep {args.ep} must divide the {args.world_size} ranks")
    check_ep(config.num_experts, args.ep)
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, MoEConfig], check_args, ranks=4, steps=80)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


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
