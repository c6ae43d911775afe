# SPDX-License-Identifier: MIT-0
"""Chapter 6. Mixture of experts on many ranks, and products of eight-bit numbers.

Papers: Nemotron 3 Nano and the Nemotron 3 white paper, NVIDIA, 2025, arXiv 2512.20848 and 2512.20856;
        the FP8 recipes of Nemotron-H and Nemotron Nano 2, NVIDIA, 2025, arXiv 2504.03624 and 2508.14444;
        the balancing bias: Wang et al., 2024, arXiv 2408.15664

The problem. In all chapters so far every token multiplies with every parameter, so a model that knows more costs more
for each word. And each of these products costs as many bits as its numbers have.

The idea. First, parameters without arithmetic: 128 small feed-forward layers, the *experts*, of which a *router* picks
6 for each token. The model has 31.6 billion parameters, and a token meets 3.6 billion of them. No GPU needs all
experts: give each rank some, and let the tokens travel. Two ranks, four experts, two experts a token:

        rank 0: tokens a b            rank 1: tokens c d
        router: a→0,2  b→0,1          router: c→2,3  d→0,3
              │                             │
        sort  a0 b0 b1 │ a2           d0 │ c2 c3 d3              a row for each token and chosen expert, by expert
              └────┐  ╲╱  ┌─────────────┘
        all-to-all │  ╱╲  │                                      each row to the rank that has its expert
        experts 0: a b d · 1: b       experts 2: a c · 3: c d    uneven: what the router wants, nobody knows before
        all-to-all and back, un-sort, weighted sum               y_a = w_a0·E0(a) + w_a2·E2(a)

Second, arithmetic with fewer bits. An FP8 number has 8 bits, two or three of them for the fraction: a GPU multiplies
twice as many in the same time. Its range is small, so each tensor is stretched to fill it before it is rounded, and the
product is shrunk back. Weights, activations and gradients are rounded for the products alone; sums, norms, the router
and the optimiser stay wide.

Run it (no flag is needed; --help lists them):

    python 06_moe_fp8/moe_fp8.py                              4 ranks on this machine, as 2 expert × 2 data
    python 06_moe_fp8/moe_fp8.py --ranks 1                    one process, for a debugger
    python 06_moe_fp8/moe_fp8.py --check                      equivalence alone, each tensor's error
    python 06_moe_fp8/moe_fp8.py --num-experts 64 --top-k 6 --ep 4
    torchrun --nproc-per-node=8 06_moe_fp8/moe_fp8.py --ep 8 --fp8 hardware
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 06_moe_fp8/moe_fp8.py --ep 8

It proves in float64 that every gradient equals the single device's, also where ranks and experts get no token, trains a
small model on real text from a start that overloads two experts, trains it in FP8, and ends in a table of claims.

Left out: Mamba layers (chapter 5), LatentMoE, NVFP4 and multi-token prediction (the next chapter), places that are
limited (capacity: no token is dropped here), delayed scaling (the notebook), fused kernels.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension. A CAPITAL is the whole dimension, the small letter
# this rank's share of it, and partial_ marks a summand that is still to be reduced:
#
#     B  sequences of this rank    E  experts         e = E / ep   this rank's experts
#     S  sequence, in tokens       K  experts chosen for a token
#     T  tokens of this rank, B·S  R  rows to send, T·K: one for each token and chosen expert
#     H  hidden size                                  r   rows that arrive at this rank's experts
#     F  width of an expert        N  query heads     D  size of a head
#     V  words in vocabulary       G  query groups: heads of keys and values
#     L  layers                    P  ranks that share the experts, one by one: wanted_Pe has a line for each
#
# ep is the number of ranks that share one set of experts, dp the number of such sets: world size = ep · dp. Every rank
# has its own tokens, and all of the model but the other ranks' experts. (F with a dot behind it is
# torch.nn.functional.)

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
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
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class MoEConfig:
    """The sizes of a model of attention and experts. Raises ValueError where they contradict each other."""

    vocab_size: int = 256
    hidden_size: int = flag(64, "hidden size, H", least=1)
    pattern: str = flag(
        "*E*E", "layers: * attention, E experts"
    )  # M, Mamba, can only be counted (part 5)
    num_heads: int = flag(4, "query heads, N", least=1)
    num_kv_heads: int = flag(
        2, "heads of keys and values, G, each shared by N / G query heads", least=1
    )
    head_size: int | None = None  # D; None: H / N
    num_experts: int = flag(8, "experts, E; ep must divide them", least=1)
    top_k: int = flag(2, "experts of a token, K", least=1)
    expert_size: int = flag(64, "width of an expert, F", least=1)
    shared_size: int = flag(128, "width of the expert that every token visits; 0: there is none")
    gate: str = flag(
        "sigmoid", "how a router turns logits into scores", choices=["sigmoid", "softmax"]
    )
    gate_scale: float = 2.5  # the chosen experts' weights add up to this
    norm_eps: float = 1e-5
    init_std: float = 0.02
    seed: int = 0  # the weights are a function of this configuration alone
    mamba_heads: int = 0  # of published models, to count them
    latent_size: int | None = None  # the same: the width of the rows that travel there

    def __post_init__(self):
        self.head_size = self.head_size or self.hidden_size // max(1, self.num_heads)  # D
        for name in "vocab_size hidden_size num_heads num_kv_heads head_size num_experts top_k expert_size".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k}, but there are {self.num_experts} experts: choose at most as many"
            )
        if self.num_heads % self.num_kv_heads:
            heads = f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads} groups"
            raise ValueError(f"{heads}: choose num_heads a multiple of num_kv_heads")
        if "E" not in self.pattern or set(self.pattern) - set("M*E"):
            raise ValueError(
                f"pattern={self.pattern!r}: one letter a layer, of 'M*E', at least one E"
            )
        if self.gate not in ("sigmoid", "softmax") or self.shared_size < 0:
            raise ValueError(
                f"gate={self.gate!r}, shared_size={self.shared_size}: 'sigmoid' or 'softmax', at least 0"
            )


# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# A single device, ordinary PyTorch: the thing to equal.

# ── 1.1 The router ──────────────────────────────────────────────────────────────────────────────────────
#
# A router is one small matrix. It gives each token a score for each expert; the K best are chosen, and their scores
# become the weights of a sum:
#
#     s = sigmoid(x Wᵀ)               a score between 0 and 1 for each expert, each by itself
#     chosen = top-K of s + β         β, a number for each expert, is there to balance the load: section 1.2
#     w_i = λ · s_i / Σ_chosen s      the weights: from s alone, so that β decides who works and not what they say
#
# One token, four experts, K = 2, λ = 2.5, and an expert 0 that was overloaded lately, so that β has moved against it:
#
#     expert                   0       1       2       3
#     x Wᵀ                   2.00    1.00    0.50   −1.00
#     s                      0.88    0.73    0.62    0.27      expert 0 fits best,
#     β                     −0.30    0       0       0
#     s + β                  0.58    0.73    0.62    0.27      and is not chosen: 1 and 2 are
#     w                       –      1.35    1.15     –        2.5 · 0.73 / (0.73 + 0.62) = 1.35: no β in it
#
# Why not a softmax? Its scores compete already, before anything is chosen; with sigmoids only the chosen compete, in
# the sum of the last line. (Both are here.)
#
# The choice has no gradient: a place in a list does not change with a small step. The router learns through w, the
# weights of those that were chosen. With one expert a token w would be λ · s / s, a constant, and the router would
# never learn: so it is not divided by the sum then.
#
# Two experts can be nearly equal, and rounding decides between them; so all this is done in fp32 at least, whatever
# the model's precision. Counting is done here too: who was chosen, and how often, since the last optimiser step.

Routing = namedtuple("Routing", "experts_TK weights_TK scores_TE")


def count_rows(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many rows each expert gets, (E,) int64, on experts_TK's device. (torch.bincount makes the host wait.)"""
    chosen_R = experts_TK.flatten()
    return chosen_R.new_zeros(num_experts).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))


class Router(nn.Module):
    """Chooses K of E experts for each token: x_TH to `Routing` (experts_TK, weights_TK, scores_TE).

    Experts are int64; weights and scores are at least fp32, whatever x_TH is. `bias` is a buffer, moved by
    `update_expert_bias` and by nothing else, and must stay fp32. `counts` gathers how often each expert was chosen, in
    training mode only: where nobody resets it, it grows.

    Source: Nemotron 3 Nano; the bias: Wang et al., 2024.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.randn(config.num_experts, config.hidden_size) * config.init_std
        )
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer(
            "counts", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False
        )

    def forward(self, x_TH: Tensor) -> Routing:
        x_TH = at_least_fp32(x_TH)
        with torch.autocast(
            x_TH.device.type, enabled=False
        ):  # which would make these products bf16
            logits_TE = F.linear(x_TH, self.weight.to(x_TH.dtype))
        scores_TE = logits_TE.sigmoid() if self.config.gate == "sigmoid" else logits_TE.softmax(-1)
        experts_TK = (scores_TE.detach() + self.bias).topk(self.config.top_k, -1).indices
        weights_TK = scores_TE.gather(-1, experts_TK)
        if self.config.top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.counts += count_rows(experts_TK, self.config.num_experts)
        return Routing(experts_TK, weights_TK * self.config.gate_scale, scores_TE)


# ── 1.2 An even load ────────────────────────────────────────────────────────────────────────────────────
#
# Nothing keeps a router from sending every token to the same two experts. It even likes to: who is chosen learns, and
# who learns is chosen. The others are dead weight, and the ranks that hold them wait. Two remedies, used together:
#
# The bias. After each optimiser step, look who was overloaded, and lower that expert's β a little:
#
#     β_i ← β_i + γ · sign(mean of counts − count_i)         γ = 0.001
#
#     counts 6 3 0 3, mean 3     →     β moves by  −γ  0  +γ  0          by how much an expert is off does not matter
#
# No gradient, so nothing pulls at the loss. The counts are those of the whole step: all ranks, all micro-batches. With
# its own counts alone each rank would move β elsewhere, and the copies of one router would drift apart; a move for each
# micro-batch would be γ several times. (A layer that is recomputed in backward counts twice; so do all its experts, and
# the sign stays.)
#
# How long does it take? In the example above β had to move by 0.26 before expert 0 lost a token to expert 2: 260 steps.
# So γ = 0.001 is a remedy for runs of a million steps. This chapter's run of sixty takes a γ ten times as large.
#
# A loss, small (α = 0.0001), which holds each single sequence near balance. For a sequence of t tokens,
#
#     f_i = share of its choices that fell on i, times E      a count: no gradient
#     P_i = mean over its tokens of s_i / Σ s                 over all E experts: the gradient goes through here
#     loss = Σ_i f_i · P_i                                    1 if balanced, up to E / K if all go to the same K
#
# Where f is large the gradient lowers P: the scores of the overloaded shrink, those of the others grow. (Were f not a
# constant, it would pull as well, in a direction that means nothing: a count does not follow its scores smoothly.)
#
# β evens out whole batches, this loss each sequence. f counts the choice *without* β: the loss teaches the scores to
# be balanced by themselves. It is a mean over sequences, and a mean is over all of them, wherever they are: each rank
# divides its own sum by the global number.


def load_balancing_loss(scores_BSE: Tensor, top_k: int) -> Tensor:
    """How uneven each sequence's load is, (B,): 1 where the scores are balanced; α times its mean joins the loss.

    scores_BSE: the router's scores, positive; each sequence must be whole, and without padding, which would be counted.
    Differentiable in the scores. Source: Nemotron 3 Nano; the formula is the Switch Transformer's (Fedus et al., 2021),
    for a sequence.
    """
    chosen_BSK = scores_BSE.detach().topk(top_k, -1).indices
    f_BE = (
        torch.zeros_like(scores_BSE).scatter_(-1, chosen_BSK, 1.0).mean(1)
        * scores_BSE.shape[-1]
        / top_k
    )
    p_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1)


@torch.no_grad()
def update_expert_bias(routers: Iterable[Router], counts_LE: Tensor, gamma: float = 1e-3) -> None:
    """Moves every router's bias against its load, once per optimiser step, and starts counting anew.

    counts_LE: the rows of each router's experts in the whole step: `router.counts`, summed over all ranks that have
    tokens. gamma: the step of β. Raises: ValueError for a bias narrower than fp32, in which steps of γ vanish.
    Source: Wang et al., 2024.
    """
    for router, counts_E in zip(routers, counts_LE, strict=True):
        if router.bias.dtype.itemsize < 4:
            raise ValueError(
                f"a router's bias is {router.bias.dtype}, where steps of {gamma} vanish: keep it in fp32"
            )
        # In whole numbers, sign(E · count − sum): a mean would be rounded, and an even load would move.
        router.bias -= gamma * (counts_E * len(counts_E) - counts_E.sum()).sign()
        router.counts.zero_()


# ── 1.3 Experts ─────────────────────────────────────────────────────────────────────────────────────────
#
# An expert is a feed-forward layer without biases: W2 · relu(W1 x)². (Squared ReLU keeps zeros zero, as the ReLU does,
# and is smooth at 0.) All experts of a rank are two tensors with E in front.
#
# Each expert has another number of tokens. Make a *row* of each token and each expert that it chose: R = T · K of
# them. Once the rows are sorted by expert, one expert's rows are neighbours, and the layer is E products of different
# heights, one below the other: a *grouped* product.
#
#     rows_RH, sorted      one matrix an expert
#       a0 ┐
#       b0 ├───────────── · W_0ᵀ ─────► 3 rows          counts = [3, 1, 0, …]: expert 2 has no row, and that is
#       d0 ┘                                            a product of nothing with a matrix: nothing
#       b1 ────────────── · W_1ᵀ ─────► 1 row
#
# PyTorch has it as one kernel for some dtypes, and where it has not it is one product for each expert. No loop over
# tokens, in either case. The way back from rows to tokens is a sum over each token's K rows with the weights w.


def _has_grouped_mm(x_RH: Tensor, weight_EFH: Tensor) -> bool:
    dtypes = (torch.bfloat16,) if x_RH.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    aligned = all(
        size * x_RH.element_size() % 16 == 0 for size in weight_EFH.shape[1:]
    )  # in memory, as it wants rows
    known = (
        torch.cuda.get_device_capability(x_RH.device) >= (8, 0)
        if x_RH.is_cuda
        else x_RH.device.type == "cpu"
    )
    return (
        hasattr(F, "grouped_mm") and x_RH.dtype in dtypes and aligned and known
    )  # from PyTorch 2.10 on


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's where it is on, which leaves float64 alone, else x's own."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def grouped_product(x_RH: Tensor, weight_EFH: Tensor, counts: list[int]) -> Tensor:
    """x_RH, sorted by expert, times each expert's own matrix: (R, F). counts: rows of each expert; they add up to R.

    One kernel, or a loop over experts where there is none (`_has_grouped_mm`). Differentiable; under autocast in its
    dtype. Raises: ValueError where the counts do not fit.
    """
    if sum(counts) != len(x_RH) or len(counts) != len(weight_EFH):
        raise ValueError(f"counts {counts} are not {len(x_RH)} rows for {len(weight_EFH)} experts")
    x_RH, weight_EFH = (x.to(product_dtype(x)) for x in (x_RH, weight_EFH))
    if _has_grouped_mm(x_RH, weight_EFH):
        ends_E = torch.tensor(
            list(itertools.accumulate(counts)), dtype=torch.int32
        )  # where each expert's rows end
        # A copy that blocked would wait for all that the GPU has still to do, the rows' journey among it.
        return F.grouped_mm(x_RH, weight_EFH.mT, offs=ends_E.to(x_RH.device, non_blocking=True))
    return torch.cat(
        [rows @ weight_FH.mT for rows, weight_FH in zip(x_RH.split(counts), weight_EFH.unbind())]
    )


class Experts(nn.Module):
    """E feed-forward layers: rows_RH, sorted by expert, and each expert's count to (R, H).

    Args: num_experts: E, or this rank's e. width: H, or any other. expert_size: F. init_std: of the first weights.
    counts: a list on the host, since torch's products want their sizes there.
    """

    def __init__(self, num_experts: int, width: int, expert_size: int, init_std: float = 0.02):
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, expert_size, width) * init_std)  # E F H
        self.down = nn.Parameter(torch.randn(num_experts, width, expert_size) * init_std)  # E H F
        self.product = grouped_product  # `to_fp8` puts another one here

    def forward(self, rows_RH: Tensor, counts: list[int]) -> Tensor:
        hidden_RF = self.product(rows_RH, self.up, counts).relu().square()
        return self.product(hidden_RF, self.down, counts)


class MLP(nn.Module):
    """The same feed-forward layer, one for all tokens: x, (..., H), to (..., H). The shared expert."""

    def __init__(self, width: int, ffn_size: int):
        super().__init__()
        self.up, self.down = (
            nn.Linear(width, ffn_size, bias=False),
            nn.Linear(ffn_size, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class MoELayer(nn.Module):
    """Router, experts, shared expert, undivided: x_BSH to (B, S, H) and each sequence's balancing loss, (B,).

    Source: Nemotron 3 Nano.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config, H = config, config.hidden_size
        self.router = Router(config)
        self.experts = Experts(config.num_experts, H, config.expert_size, config.init_std)
        self.shared = MLP(H, config.shared_size) if config.shared_size else None

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = rearrange(x_BSH, "B S H -> (B S) H")
        routing = self.router(x_TH)
        scores_BSE = routing.scores_TE.unflatten(0, x_BSH.shape[:2])
        return self.mix(x_TH, routing).view_as(x_BSH), load_balancing_loss(
            scores_BSE, self.config.top_k
        )

    def mix(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """The weighted sum over each token's experts, and its shared expert."""
        # Row i is choice i % K of token i // K; sorted by expert, those of one expert are neighbours.
        order_R = routing.experts_TK.flatten().argsort(stable=True)
        token_R = order_R // self.config.top_k
        rows_RH = self.experts(
            x_TH[token_R], count_rows(routing.experts_TK, self.config.num_experts).tolist()
        )
        weighted_RH = rows_RH * routing.weights_TK.flatten()[order_R, None]
        y_TH = (
            weighted_RH.new_zeros(x_TH.shape).index_add(0, token_R, weighted_RH).to(rows_RH.dtype)
        )
        return y_TH if self.shared is None else y_TH + self.shared(x_TH)


# ── 1.4 The model ───────────────────────────────────────────────────────────────────────────────────────
#
# A pattern of letters says what each layer is; each has its norm in front and adds to x. Nano's is
#
#     MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME          M Mamba, chapter 5; * attention; E experts
#
# Attention has few heads of keys and values (2 for 32 of queries): they are what has to be kept when the model
# writes. It has no position embedding: the Mamba layers know the order, and here the causal mask alone tells it.


class Attention(nn.Module):
    """Causal attention with grouped queries, x_BSH to (B, S, H); and no load to balance."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config, H, D = config, config.hidden_size, config.head_size
        self.qkv = nn.Linear(
            H, (config.num_heads + 2 * config.num_kv_heads) * D, bias=False
        )  # all q, all k, all v
        self.out = nn.Linear(config.num_heads * D, H, bias=False)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        N, G = self.config.num_heads, self.config.num_kv_heads
        heads = rearrange(self.qkv(x_BSH), "B S (heads D) -> B heads S D", heads=N + 2 * G)
        q_BNSD, k_BGSD, v_BGSD = heads.split([N, G, G], dim=1)
        y_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True
        )
        return self.out(rearrange(y_BNSD, "B N S D -> B S (N D)")), x_BSH.new_zeros(len(x_BSH))


class Layer(nn.Module):
    """x_BSH + mixer(norm(x_BSH)), (B, S, H), and the balancing loss so far, (B,), with the mixer's own added."""

    def __init__(self, config: MoEConfig, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(config.hidden_size, eps=config.norm_eps), mixer

    def forward(self, x_BSH: Tensor, balance_B: Tensor) -> tuple[Tensor, Tensor]:
        y_BSH, own_B = self.mixer(self.norm(x_BSH))
        return x_BSH + y_BSH, balance_B + own_B


class MoELM(nn.Module):
    """The single-device model: tokens_BS (int64) to logits (B, S, V) and each sequence's balancing loss, (B,).

    The balancing loss is the sum over layers. The model's first weights are `initial_weights(config)`. moe_layer makes
    the layers of experts, which may be parallel ones. Raises: ValueError for Mamba layers and latent experts, which are
    other chapters'.
    """

    def __init__(self, config: MoEConfig, moe_layer: Callable[[MoEConfig], nn.Module] = MoELayer):
        super().__init__()
        self.config = config
        if "M" in config.pattern or config.latent_size:
            sizes = f"pattern={config.pattern}, latent_size={config.latent_size}"
            raise ValueError(
                f"{sizes}: Mamba is chapter 5's (mamba_hybrid), latent experts are the next chapter's"
            )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        mixers = (
            Attention(config) if kind == "*" else moe_layer(config) for kind in config.pattern
        )
        self.layers = nn.ModuleList(Layer(config, mixer) for mixer in mixers)
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if (
            not self.head.weight.is_meta
        ):  # on "meta" are shapes without memory: `state_shapes` asks for those
            self.load_state_dict(dict(initial_weights(config)))

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        x_BSH, balance_B = self.embedding(tokens_BS), 0
        for layer in self.layers:
            x_BSH, balance_B = layer(x_BSH, balance_B)
        return self.head(self.final_norm(x_BSH)), balance_B

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of each token in nats, (B, S), at least fp32, 0 where the target is −100; and balance_B."""
        logits_BSV, balance_B = self(tokens_BS)
        logits_BVS = rearrange(at_least_fp32(logits_BSV), "B S V -> B V S")
        return F.cross_entropy(
            logits_BVS, targets_BS, ignore_index=-100, reduction="none"
        ), balance_B

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def counts(self) -> Tensor:
        """How often this rank's tokens chose each expert since the last `update_expert_bias`, (L, E), a copy."""
        return torch.stack([router.counts for router in self.routers()])


def state_shapes(config: MoEConfig) -> dict[str, torch.Size]:
    """Name and shape of the plain model's state (parameters, routers' biases), with no memory."""
    with torch.device("meta"):
        return {name: x.shape for name, x in MoELM(config).state_dict().items()}


def initial_weights(config: MoEConfig) -> Iterator[tuple[str, Tensor]]:
    """The initial weights, a function of `config` alone: each name and its unsharded tensor, in the model's shape.

    Matrices are normal with init_std, those that write onto the residual stream smaller by 1/√L; norms start at 1, and
    the routers' biases at 0.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in state_shapes(config).items():
        writes = name.endswith(("out.weight", "down", "down.weight"))
        std = config.init_std / math.sqrt(len(config.pattern) if writes else 1)
        constant = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")
        yield (
            name,
            constant
            if len(shape) == 1
            else torch.randn(shape, generator=generator, device="cpu") * std,
        )


Batches = Iterable[
    tuple[Tensor, Tensor]
]  # tokens_BS and targets_BS of each step; a target of −100 does not count
Step = namedtuple(
    "Step", "loss norm counts_LE"
)  # mean loss per token, norm before clipping, rows of each expert


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with Nemotron 3's settings; decays matrices, not norms. The caller sets "lr" before each step."""
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def plain_gradients(
    model: MoELM, tokens_BS: Tensor, targets_BS: Tensor, alpha: float = 1e-4, max_norm: float = 1.0,
    autocast: torch.dtype | None = None) -> Step:  # fmt: skip
    """Adds to every parameter's gradient that of one step's loss, clips, and returns what a `Step` says of it.

    tokens_BS, targets_BS: int64; −100 marks a target that does not count. alpha: weight of the balancing loss.
    max_norm: of all gradients together. autocast: the dtype of products (bf16 on GPUs), None for the parameters' own.
    """
    with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
        loss_BS, balance_B = model.loss(tokens_BS, targets_BS)
    loss = loss_BS.sum() / (targets_BS != -100).sum().clamp(min=1)
    (loss + alpha * balance_B.mean()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return Step(loss.detach(), norm, model.counts())


def train_alone(
    model: MoELM, batches: Batches, lr: Callable[[int], float], gamma: float = 1e-3,
    gradients: Callable[..., Step] = plain_gradients, **options) -> Iterator[Step]:  # fmt: skip
    """Trains, a step for each batch, and yields a `Step` of each. What it knows of other ranks it has from `gradients`.

    lr: the learning rate of step 0, 1, ... gamma: step of the routers' biases. gradients: `plain_gradients`, which
    looks at this process alone, or what part 4 puts in its place; options are its own.
    """
    optimizer = make_optimizer(model)
    for number, batch in enumerate(batches):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(number)
        optimizer.zero_grad()
        step = gradients(model, *batch, **options)
        optimizer.step()
        update_expert_bias(model.routers(), step.counts_LE, gamma)
        yield step


# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────


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

# ── 2.1 Rows that change ranks ──────────────────────────────────────────────────────────────────────────
#
# Rank, group and collective are explained in chapter 1, at the beginning of its part 2; so are the functions above. One
# collective is new to the book's code. In an *all-to-all* each rank has a piece for each rank:
#
#     rank 0: a0 a1    rank 1: b0 b1     →     rank 0: a0 b0    rank 1: a1 b1          piece i goes to rank i
#
# The pieces here are rows, as many as the router wants, and a piece may be empty. So a call has two lists: how many
# rows I send to each rank, and how many I receive from each. A rank that has nothing to send and nothing to receive
# calls it all the same: the others wait for it.
#
# The gradient of a row travels the way back: backward is an all-to-all with the two lists exchanged.
#
#     forward    rows that I send, by destination: [2, 5]    rows that I receive, by sender: [4, 1]
#     backward   gradients that I send:            [4, 1]    gradients that I receive:       [2, 5]
#
# torch's all_to_all_single has no gradient, so we write it: as two Functions, to have time in between. `_Depart` sends,
# `_Arrive` waits, and what is computed between them costs no extra time. Backward runs through the same stations from
# behind, and there each does the other's work: autograd comes to `_Arrive` first, which sends the gradients off, then
# to what was computed in between, then to `_Depart`, which waits for them.
#
#     forward     _Depart: sends      shared expert              _Arrive: waits
#     backward    _Depart: waits      shared expert's backward   _Arrive: sends, with the lists exchanged
#
# Leave the exchange out and the sizes do not fit; unless every rank receives as many rows as it sends, and then
# gradients go to other tokens in silence (test_splits_not_swapped_in_backward plants it).


class _Trip:
    """One all-to-all there and its gradient's back: the two lists, and what is on its way."""

    def __init__(self, send: list[int], receive: list[int], group: Group):
        self.send, self.receive, self.group = send, receive, group

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Returns at once; what it returns is filled when `work.wait()` has returned."""
        self.there = rows.new_empty(sum(receive), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.there, rows.contiguous(), receive, send, self.group, async_op=True
        )
        return self.there

    def end(self) -> Tensor:
        self.work.wait()
        there, self.there = self.there, None  # kept here no longer than they travel
        return there


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, trip):
        ctx.trip = trip
        return trip.start(rows_RH, trip.send, trip.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_rH, trip):
        ctx.trip = trip
        trip.end()
        return rows_rH.view_as(rows_rH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rH):
        ctx.trip.start(grad_rH, ctx.trip.receive, ctx.trip.send)
        return (
            grad_rH,
            None,
        )  # autograd wants this shape here; `_Depart` takes the gradient from the trip


def all_to_all(
    rows_RH: Tensor, send: list[int], receive: list[int], group: Group = None, wait: bool = True
):
    """Rows to other ranks: the first send[0] to rank 0, the next send[1] to rank 1, ...; (r, H), sorted by sender.

    Every rank of the group must call it, with no rows too. Differentiable, once.

    Args:
        rows_RH: rows of any shape and dtype, the same on all ranks (but gloo takes no FP8: send codes as uint8).
        send, receive: rows for and from each rank of `group`; rank i's send[j] must be rank j's receive[i].
        group: None is all ranks.
        wait: False returns at once, and not the rows but a function that waits for them; call it once.

    Raises: ValueError where this rank's lists do not fit; what other ranks' lists say, nobody looks at.
    Source: ours.
    """
    ranks = group_size(group)
    if len(send) != ranks or len(receive) != ranks or sum(send) != len(rows_RH):
        sizes = f"send {send}, receive {receive}, {len(rows_RH)} rows, {ranks} ranks"
        raise ValueError(
            f"{sizes}: both lists need a number for each rank, and all rows must be sent"
        )
    if ranks == 1:
        return rows_RH if wait else lambda: rows_RH
    trip = _Trip(send, receive, group)
    rows_rH = _Depart.apply(rows_RH, trip)
    return _Arrive.apply(rows_rH, trip) if wait else lambda: _Arrive.apply(rows_rH, trip)


# ── 2.2 Dispatch and combine ────────────────────────────────────────────────────────────────────────────
#
# A plan says once, for both ways, where each row goes. Rows leave sorted by expert, so those for one rank are
# neighbours. They arrive sorted by sender, and within a sender by expert; the grouped product wants them by expert, so
# they are sorted a second time. With the tokens at the top of this file, experts 0 and 1 on rank 0, 2 and 3 on rank 1:
#
#     rank 0                                            rank 1
#     experts_TK    a: 0 2   b: 0 1                     c: 2 3   d: 0 3        what the routers want
#     rows          a0 a2 b0 b1                         c2 c3 d0 d3            choice i % K of token i // K
#     order_R        0  2  3  1                          2  0  1  3            sorts these by expert:
#                   a0 b0 b1 │ a2                       d0 │ c2 c3 d3
#     wanted_Pe     [[2, 1], [1, 0]]                    [[1, 0], [1, 2]]       line j: my rows for rank j's experts
#     send          [3, 1]                              [1, 3]                 its sums
#         ── all-to-all of wanted_Pe, a few numbers ──
#     arrive_Pe     [[2, 1], [1, 0]]                    [[1, 0], [1, 2]]       line j: rank j's rows for my experts
#     receive       [3, 1]                              [1, 3]                 its sums
#         ── all-to-all of the rows ──
#                   a0 b0 b1 │ d0                       a2 │ c2 c3 d3          by sender
#     order_r        0  1  3  2                          0  1  2  3            sorts these by expert:
#                   a0 b0 d0 · b1                       a2 c2 · c3 d3          counts [3, 1] and [2, 2]
#
# (That a rank receives what it sends is chance here.) Sorts are stable, so an expert finds its rows in the order of
# ranks and tokens: the order of the whole batch, whatever ep is. Numbers of rows must be known on the host (the CPU),
# because buffers have sizes: the one moment where the host waits for the GPU. All that it needs comes in one copy.
#
# A permutation is a gather, y_i = x_order(i), and its gradient is usually written as a scatter: add dy_i to
# dx_order(i). On a GPU a scatter adds in any order, and no run repeats another to the bit. But the inverse of a
# permutation is a permutation: the gradient is a gather as well, and where a token has K rows, a sum over these K.
#
# The weights do not travel. They wait at home until the rows come back; the last step is a sum over K.


class _Permute(torch.autograd.Function):
    """Row i is x[order[i] // copies]; inverse is order's inverse."""

    @staticmethod
    def forward(ctx, x_TH, order_R, inverse_R, copies):
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        return x_TH.index_select(0, order_R // copies if copies > 1 else order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH):
        (inverse_R,) = ctx.saved_tensors
        grad_RH = grad_RH.index_select(0, inverse_R)
        if ctx.copies > 1:
            grad_RH = grad_RH.unflatten(0, (len(grad_RH) // ctx.copies, ctx.copies)).sum(1)
        return grad_RH, None, None, None


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).scatter_(
        0, order_R, torch.arange(len(order_R), device=order_R.device)
    )


# Where rows go and how they come back; `plan_dispatch` makes it.
#     order_R    this rank's rows by expert; row i is choice i % K of token i // K. inverse_R undoes it
#     order_r    rows that arrived, by expert; inverse_r undoes it
#     send       rows for each rank; receive: rows from each rank; counts: rows of each of my experts. On the host
Plan = namedtuple("Plan", "order_R inverse_R order_r inverse_r send receive counts top_k group")


def plan_dispatch(experts_TK: Tensor, num_experts: int, group: Group = None) -> Plan:
    """The plan for tokens that chose experts_TK (int64, in [0, num_experts)).

    Rank i of `group` has experts i·e to i·e + e − 1. Every rank of the group must call it; tokens may be none. group:
    None is all ranks. The host waits once. A plan may be used many times. Raises: ValueError where the experts do not
    divide over the ranks. Source: ours.
    """
    ep = group_size(group)
    check_ep(num_experts, ep)
    order_R = experts_TK.flatten().argsort(stable=True)
    wanted_Pe = count_rows(experts_TK, num_experts).view(ep, -1)
    arrive_Pe = wanted_Pe.clone()
    if ep > 1:
        dist.all_to_all_single(arrive_Pe, wanted_Pe, group=group)
    host = torch.cat([wanted_Pe.sum(1), arrive_Pe.sum(1), arrive_Pe.sum(0)]).tolist()
    send, receive, counts = host[:ep], host[ep : 2 * ep], host[2 * ep :]
    expert_Pe = torch.arange(len(counts), device=order_R.device).repeat(ep)
    order_r = expert_Pe.repeat_interleave(arrive_Pe.flatten(), output_size=sum(receive)).argsort(
        stable=True
    )
    orders = order_R, _inverse(order_R), order_r, _inverse(order_r)
    return Plan(*orders, send, receive, counts, experts_TK.shape[1], group)


def dispatch(x_TH: Tensor, plan: Plan) -> Callable[[], Tensor]:
    """Sends a copy of each token to each expert that it chose; rows of any width. Returns a function that waits.

    That function returns the rows of this rank's experts, (r, H), sorted by expert: plan.counts of each. What is
    computed before it is called overlaps with the journey, in backward too. Every rank of the plan's group must call
    both, once. Source: ours.
    """
    rows_RH = _Permute.apply(x_TH, plan.order_R, plan.inverse_R, plan.top_k)
    arrive = all_to_all(rows_RH, plan.send, plan.receive, plan.group, wait=False)
    if group_size(plan.group) == 1:  # all senders' rows are one sender's: sorted already
        return arrive
    return lambda: _Permute.apply(arrive(), plan.order_r, plan.inverse_r, 1)


def combine(rows_rH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Brings rows back to their tokens and adds them up with their weights: (T, H), in the rows' dtype.

    rows_rH: in the order of `dispatch`. weights_TK: at least fp32; the sum is as wide. Every rank must call it.
    Source: ours.
    """
    if group_size(plan.group) > 1:
        rows_rH = _Permute.apply(rows_rH, plan.inverse_r, plan.order_r, 1)
    rows_RH = all_to_all(rows_rH, plan.receive, plan.send, plan.group)
    rows_TKH = _Permute.apply(rows_RH, plan.inverse_R, plan.order_R, 1).unflatten(
        0, weights_TK.shape
    )
    with torch.autocast(rows_rH.device.type, enabled=False):
        y_TH = einsum(weights_TK, rows_TKH.to(weights_TK.dtype), "T K, T K H -> T H")
    return y_TH.to(rows_rH.dtype)


# ── 2.3 The layer ───────────────────────────────────────────────────────────────────────────────────────
#
# The router and the shared expert are whole on every rank, and each rank asks them about its own tokens. Only the
# experts are divided: rank i of the group has experts i·e to i·e + e − 1.
#
# What about gradients? An expert gets rows from every rank of its group, so its gradient is already summed over the
# group's tokens. What is whole on every rank has seen one rank's tokens. So sums are still needed, over different
# ranks:
#
#     router, shared expert, attention, norms ...     over all ranks
#     experts                                          over the ranks that hold the same experts (dp of them)
#
# And then what is divided by what? Here nothing: each rank's loss is its sum over the *global* number of tokens, and
# gradients are only ever added. A library that takes means has to divide twice, and by the same number. With ep · dp =
# 4 ranks, and g_i what rank i's own mean loss says of a parameter:
#
#                                  a whole parameter                   an expert, ep 2 × dp 2
#     a rank's gradient            g_i, of its own tokens              g_0 + g_1 or g_2 + g_3: of its group's tokens
#     sum over whom                all 4 ranks                         the 2 that hold it
#     divide by                    4                                   4 too: by the 2 of them it is ep times too large
#
# Losses are equal, Adam hides the factor, and clipping does not.


class ExpertParallelMoELayer(MoELayer):
    """`MoELayer` with its experts divided over `group`: this rank's x_BSH to (B, S, H) and the balancing loss, (B,).

    Parameters start as `MoELayer`'s do, drawn whole from the default generator, which must be in the same state on
    every rank. Every rank must call it, forward and backward, also with B = 0; group: None is all ranks. Gradients of
    experts are sums over the group's tokens, all others are this rank's: `reduce_gradients` adds the rest.
    Raises: ValueError where the experts do not divide over the ranks. Source: Nemotron 3 Nano; how it is divided: ours.
    """

    def __init__(self, config: MoEConfig, group: Group = None):
        check_ep(config.num_experts, group_size(group))
        super().__init__(config)
        self.group = group
        for p in (
            self.experts.parameters()
        ):  # a copy of this rank's share: a view would hold the whole in memory
            p.data = p.data.chunk(group_size(group))[group_rank(group)].clone()

    def mix(self, x_TH: Tensor, routing: Routing) -> Tensor:
        plan = plan_dispatch(routing.experts_TK, self.config.num_experts, self.group)
        arrive = dispatch(
            x_TH.to(product_dtype(x_TH)), plan
        )  # under autocast half the bytes, and the same products
        shared_TH = self.shared(x_TH) if self.shared is not None else 0  # while rows travel
        rows_rH = self.experts(arrive(), plan.counts)
        return combine(rows_rH, routing.weights_TK, plan) + shared_TH


class ParallelMoELM(MoELM):
    """`MoELM` with the experts of every layer divided over `group`; all else is whole on every rank.

    Its weights are those that MoELM(config) has, whatever the number of ranks, and its parameters have the same names;
    no more than one whole tensor is in memory at a time. Each rank calls it with its own tokens. group: the ranks that
    share one set of experts; None is all ranks. Raises: ValueError where the experts do not divide over the ranks.
    Source: Nemotron 3 Nano; how it is divided: ours.
    """

    def __init__(self, config: MoEConfig, group: Group = None):
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(config, lambda config: ExpertParallelMoELayer(config, group))
        rank, ep = group_rank(group), group_size(group)
        shares = {
            name: shard_tensor(name, whole, rank, ep) for name, whole in initial_weights(config)
        }
        self.load_state_dict(shares, assign=True)  # puts them in the place of the shapes
        for router in self.routers():
            router.counts = torch.zeros_like(router.counts, device="cpu")  # not part of the state

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of which this rank holds a share; all others are whole, and equal on every rank."""
        return [p for name, p in self.named_parameters() if shard_dim(name) is not None]


# ── 2.4 Numbers of eight bits ───────────────────────────────────────────────────────────────────────────
#
# A floating-point number is sign · 2^exponent · 1.fraction. FP8 has two ways to spend its bits:
#
#     E4M3   4 bits exponent, 3 fraction    ±448      rounds by 1/16 at most    for weights and activations
#     E5M2   5 bits exponent, 2 fraction    ±57344    rounds by 1/8 at most     for gradients: a wide range
#
# The number 20 in both, and all that there is around it:
#
#     E4M3   0 1011 010     + 2^(11 − 7) · (1 + 2/8)
#            16 · 18 · 20 · 22 · 24 · 26 · 28 · 30 · 32 · · · 36 · · · 40        8 steps to the next power of two
#     E5M2   0 10011 01     + 2^(19 − 15) · (1 + 1/4)
#            16 · · · 20 · · · 24 · · · 28 · · · 32 · · · · · · · 40             4 steps
#
# So the step grows with the number, and the *relative* error is the same at 20 and at 0.02. Down to an end: below 2^−6
# (E5M2: 2^−14) the exponent has reached its smallest value, and steps stay as large as they are there:
#
#     E4M3   0 · 2^−9 · 2·2^−9 · … · 7·2^−9 · 2^−6 · …           less than half a step is zero: 0.0009, and any
#     E5M2   0 · 2^−16 · 2·2^−16 · 3·2^−16 · 2^−14 · …           gradient of 1e-6, in either
#
# So a tensor is scaled to the format's range before it is rounded: *current scaling* looks at this very tensor,
#
#     scale = largest number of the format / amax        amax: the largest |x| of the tensor
#     q = round(clip(x · scale))                         8 bits each: the *codes*
#     x ≈ q · (1 / scale)                                the inverse is what a product is given: easily confused
#
#     x              0.02       −0.5      0.00035         amax 0.5, so scale = 448 / 0.5 = 896
#     x · scale     17.92     −448.0      0.3136
#     q             18        −448        0.3125          its step here: 2, 32 and 1/32
#     q / scale      0.0201     −0.5      0.000349        without the scale the last one would have become 0
#
# What can go wrong: amax = 0 (a scale of infinity, then 0 · ∞ is NaN); x · scale rounds up past the largest number
# (E4M3 has no infinity: it may become NaN, so it is clipped); an amax so small that its scale is no number any more.
# One thing is left as it is: if x is not finite, all that shares its scale becomes NaN, so that the norm of the
# gradients sees it. And the arithmetic of scaling is fp32, whatever x is: that is part of the definition.
#
# One outlier makes everything else small: *blockwise* scaling gives each tile its own scale, 1 × 128 numbers of an
# activation or gradient, 128 × 128 of a weight [Nano 2, after DeepSeek-V3]. Then E4M3's range is enough for gradients
# too. The scales may be powers of two: then scaling changes the exponent alone, and rounds nothing.

FP8_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

# x ≈ codes · inverse_scale, tile by tile. codes: x's shape, an FP8 dtype; inverse_scale: fp32, one number, or one for
# each tile of the last two dimensions; block: rows and columns of a tile, or None.
Quantized = namedtuple("Quantized", "codes inverse_scale block")


def _amax(x: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest |x|: one number, or (..., r, c) for tiles, of which the last ones may be smaller."""
    if block is None:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    rows, columns = x.shape[-2:]
    padded = x.new_zeros(*x.shape[:-2], rows + -rows % block[0], columns + -columns % block[1])
    padded[..., :rows, :columns] = x  # as F.pad, which torch 2.9 refuses to do to no rows
    return (
        rearrange(padded, "... (r a) (c b) -> ... r c a b", a=block[0], b=block[1])
        .abs()
        .amax((-2, -1))
    )


def _spread(scale: Tensor, block: tuple[int, int] | None, shape: torch.Size) -> Tensor:
    """Each tile's number at each of its elements."""
    if block is None:
        return scale
    whole = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., : shape[-2], : shape[-1]]


@torch.no_grad()
def quantize_fp8(
    x: Tensor,
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_group: Group = None,
) -> Quantized:
    """x rounded to FP8, to nearest, ties to even, with one scale for all of it or for each tile.

    Args:
        x: any shape; with tiles at least two dimensions.
        format: "e4m3" or "e5m2".
        block: rows and columns of a tile of the last two dimensions; None: one scale for all.
        power_of_two: round the scale down to one.
        amax_group: ranks that hold shares of one tensor, which then has one scale on all of them; every one must call
            it, also with an empty share. None: x is whole. Tiles need none: no tile may lie on two ranks.

    The code of a finite number is finite; where x is not finite its whole tile is NaN, on all ranks that share an amax.
    Raises: ValueError for an unknown format. Source: current scaling, Nemotron-H; tiles, Nemotron Nano 2.
    """
    if format not in FP8_FORMATS:
        raise ValueError(f"format {format!r}: one of {list(FP8_FORMATS)}")
    dtype = FP8_FORMATS[format]
    most = torch.finfo(dtype).max
    x = x.to(torch.float32)
    amax = _amax(x, block).nan_to_num(
        torch.inf, torch.inf
    )  # a maximum over ranks may drop a NaN, and never an ∞
    if amax_group is not None and block is None:
        _all_reduce(amax, amax_group, dist.ReduceOp.MAX)
    quotient = (
        torch.full_like(amax, most) / amax
    )  # most / amax would be computed as most · (1 / amax): rounded twice
    scale = torch.where(amax == 0, 1.0, quotient).clamp(
        max=2.0**126
    )  # so that its inverse is still a normal number
    if power_of_two:
        scale = torch.ldexp(
            scale.sign(), torch.frexp(scale).exponent - 1
        )  # 0 stays 0: there x is not finite
    codes = (x * _spread(scale, block, x.shape)).clamp(-most, most).to(dtype).contiguous()
    return Quantized(codes, 1 / scale, block)


def dequantize_fp8(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes · inverse scale: a tensor of the codes' shape in `dtype`, which should be fp32 or wider.

    Source: current scaling, Nemotron-H.
    """
    codes, inverse_scale, block = quantized
    return codes.to(dtype) * _spread(inverse_scale, block, codes.shape).to(dtype)


# ── 2.5 Products of eight-bit numbers ───────────────────────────────────────────────────────────────────
#
# A linear layer is three products, one forward and two backward. Each is a · bᵀ of two matrices that have the axis of
# summation last, because that is how the hardware wants them (Hopper, the H100's kind, knows no other layout):
#
#     fprop    y_RF  =  x_RH · w_FH            sum over H        E4M3 · E4M3
#     dgrad    dx_RH =  dy_RF · w_HF           sum over F        E5M2 · E4M3       w turned
#     wgrad    dw_FH =  dy_FR · x_HR           sum over rows     E5M2 · E4M3       both turned
#
# So x, w and dy are each needed twice, as they are and *turned*, that is, transposed: six operands. With one scale a
# tensor the turned copy has the same codes. Tiles lie along the axis of summation, so a turned operand has other tiles
# and other scales, and is rounded anew, from the wide numbers. For wgrad x is kept as codes: a byte a number and not
# four.
#
# Why can a scale be taken out of a product? Because it is the same for all summands: Σ_h (q_rh / s)(p_fh / z) =
# (Σ_h q_rh · p_fh) / (s · z). The FP8 units sum codes, and multiply the sum with both inverse scales once.
#
# A *recipe* names the format of each operand of each product; it is data, not code. It also says what stays wide:
# first and last layers, and always the router, norms, embedding and head.
#
# Where a GPU has FP8 units, torch._scaled_mm is that product. Elsewhere we emulate: the same codes, made wide again, in
# an ordinary product. The rounding is the same to the bit; sums differ, since Hopper's units add with fewer bits than
# fp32 (`use_fast_accum=False` adds up in fp32 now and then). Which of the two runs is decided once and printed.
# Hardware wants multiples of 16 rows, so each product is padded with zero rows, which nobody counts.


# How one operand of one product is rounded: arguments of `quantize_fp8`.
Operand = namedtuple("Operand", "format block power_of_two", defaults=("e4m3", None, False))
E4M3, E5M2 = Operand("e4m3"), Operand("e5m2")
TILE, SQUARE = Operand("e4m3", (1, 128), True), Operand("e4m3", (128, 128), True)


# A recipe: how each operand of each product is rounded; how many layers stay wide, at the beginning and at the end; and
# whether products run on the GPU's FP8 units, which `fp8_hardware` says, or are emulated.
#     fprop: x, w     dgrad: dy, w     wgrad: dy, x     first, last: 1 here; 4 in Nemotron-H 56B
_HYBRID = ((E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3), 1, 1, False)
FP8Recipe = namedtuple("FP8Recipe", "fprop dgrad wgrad first last hardware", defaults=_HYBRID)
HYBRID = FP8Recipe()  # one scale a tensor; gradients in E5M2
BLOCKWISE = FP8Recipe((TILE, SQUARE), (TILE, SQUARE), (TILE, TILE))  # Nemotron Nano 2


def fp8_hardware(mode: str, device: torch.device, recipe: FP8Recipe) -> bool:
    """Whether products can run on the GPU's FP8 units; mode is "hardware", "emulate", or "auto": hardware if it can.

    Raises: ValueError that says why, where "hardware" cannot be had. Source: ours.
    """
    if device.type != "cuda":
        why = f"a {device.type} has none"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        why = f"{torch.cuda.get_device_name(device)} has none (from compute capability 8.9 on)"
    else:
        tiles = any(operand.block for product in recipe[:3] for operand in product)
        why = "this code gives them one scale a tensor, and the recipe has tiles" if tiles else ""
    if mode == "hardware" and why:
        raise ValueError(f"FP8 units are asked for, but {why}: use emulate, or auto")
    return mode != "emulate" and not why


def fp8_product(a: Quantized, b: Quantized, dtype: torch.dtype, hardware: bool = False) -> Tensor:
    """a · bᵀ, (m, k) and (n, k) to (m, n) in `dtype`, on FP8 units or emulated; k and n multiples of 16 on hardware.

    Emulated sums are as wide as dtype, at least fp32. On Hopper's units allow an error of 2^−13 · Σ|a_i b_i| beyond
    dtype's own rounding: stated here, and not measured on one yet. Raises: ValueError for other sizes on hardware,
    which also wants one scale for each tensor. Source: Nemotron-H.
    """
    if hardware and a.codes.numel():
        if a.codes.shape[1] % 16 or b.codes.shape[0] % 16:
            sizes = tuple(a.codes.shape), tuple(b.codes.shape)
            raise ValueError(f"FP8 units want multiples of 16, not {sizes}: choose other sizes")
        scales = dict(scale_a=a.inverse_scale, scale_b=b.inverse_scale)
        return torch._scaled_mm(
            a.codes, b.codes.mT, **scales, out_dtype=dtype, use_fast_accum=False
        )
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(a.codes.device.type, enabled=False):
        return (dequantize_fp8(a, wide) @ dequantize_fp8(b, wide).mT).to(dtype)


def _both_ways(
    x_RH: Tensor, way: Operand, turned: Operand, amax_group
) -> tuple[Quantized, Quantized]:
    """x_RH and its transpose, each rounded as an operand, padded to 16 rows. One scale: one rounding serves both."""
    x_RH = F.pad(x_RH, (0, 0, 0, -len(x_RH) % 16))
    x = quantize_fp8(x_RH, *way, amax_group=amax_group)
    if way == turned and way.block is None:
        return x, x._replace(codes=x.codes.mT.contiguous())
    return x, quantize_fp8(x_RH.mT, *turned, amax_group=amax_group)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, weight_FH, recipe, amax_group, dtype):
        x, x_turned = _both_ways(x_RH, recipe.fprop[0], recipe.wgrad[1], amax_group)
        w = quantize_fp8(weight_FH, *recipe.fprop[1])
        ctx.save_for_backward(weight_FH, x_turned.codes, x_turned.inverse_scale)
        ctx.settings = recipe, amax_group, x_RH.dtype
        return fp8_product(x, w, dtype, recipe.hardware)[: len(x_RH)]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RF):
        weight_FH, *x_turned = ctx.saved_tensors
        recipe, amax_group, x_dtype = ctx.settings
        dy, dy_turned = _both_ways(grad_RF, recipe.dgrad[0], recipe.wgrad[0], amax_group)
        w_turned = quantize_fp8(weight_FH.mT, *recipe.dgrad[1])
        x_turned = Quantized(*x_turned, recipe.wgrad[1].block)
        grad_RH = fp8_product(dy, w_turned, x_dtype, recipe.hardware)[: len(grad_RF)]
        grad_FH = fp8_product(dy_turned, x_turned, weight_FH.dtype, recipe.hardware)
        return grad_RH, grad_FH, None, None, None


def fp8_linear(x: Tensor, weight_FH: Tensor, recipe: FP8Recipe, amax_group: Group = None) -> Tensor:
    """x · weightᵀ with all three products in FP8: x, (..., H), to (..., F); differentiable once.

    Args: amax_group: ranks that hold shares of the rows, all of which must call it; see `quantize_fp8`.
    Returns: x's dtype, or autocast's. Raises: ValueError on hardware where H or F are no multiples of 16.
    Source: Nemotron-H; with tiles, Nemotron Nano 2.
    """
    rows_RH = x.reshape(-1, x.shape[-1])
    y_RF = _FP8Linear.apply(rows_RH, weight_FH, recipe, amax_group, product_dtype(x))
    return y_RF.view(*x.shape[:-1], len(weight_FH))


class FP8Linear(nn.Linear):
    """nn.Linear without bias whose three products are in FP8: x, (..., in_features), to (..., out_features).

    Args: in_features, out_features: as nn.Linear's. recipe, amax_group: as `fp8_linear`'s.
    The weight itself stays wide: it is rounded for each product anew, and the optimiser never sees the rounding.
    Source: Nemotron-H.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        recipe: FP8Recipe = HYBRID,
        amax_group: Group = None,
    ):
        super().__init__(in_features, out_features, bias=False)
        self.recipe, self.amax_group = recipe, amax_group

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.recipe, self.amax_group)


# ── 2.6 Experts in FP8, and one scale for all shares ────────────────────────────────────────────────────
#
# An expert's rows are a tensor of their own, with a scale of its own, and so are its weights: its products are those
# of a linear layer, and we call them one expert after the other.
#
# A tensor that is divided over ranks has another amax on each of them, so other scales, and other roundings than on a
# single device: the result depends on the grid. Where that matters the ranks agree on one amax: an all-reduce of one
# number. Which ranks? Those that hold shares of the same tensor. Activations of whole layers: all ranks, each has some
# tokens. An expert's rows: the ranks that hold this expert. (Those of its group have no other rows of it: they have
# been sent.) Weights: none, they are whole. Given the same tensor the codes are then equal to the single device's, to
# the bit. An empty share has an amax of 0, and takes part like all others.


def fp8_grouped_product(
    x_RH: Tensor, weight_EFH: Tensor, counts: list[int], recipe: FP8Recipe, amax_group: Group = None
) -> Tensor:
    """`grouped_product` in FP8, (R, F): each expert's rows and weights with their own scales.

    amax_group: the ranks that hold the same experts, all of which must call it.
    Source: Nemotron-H's recipe, for each expert by itself: ours.
    """
    parts = zip(x_RH.split(counts), weight_EFH.unbind())
    return torch.cat(
        [fp8_linear(rows_RH, weight_FH, recipe, amax_group) for rows_RH, weight_FH in parts]
    )


def to_fp8(model: MoELM, recipe: FP8Recipe, grid: Grid | None = None) -> MoELM:
    """Puts the products of the recipe's layers into FP8, in place, and returns the model; parameters stay as they are.

    grid: share each amax among the ranks that hold shares of one tensor; None: each rank scales what it has.
    Source: Nemotron-H, section 2.4.
    """
    tokens, experts = (
        (dist.group.WORLD, grid.edp_group) if grid and dist.is_initialized() else (None, None)
    )
    for module in model.layers[recipe.first : len(model.layers) - recipe.last].modules():
        if isinstance(module, Experts):
            module.product = partial(fp8_grouped_product, recipe=recipe, amax_group=experts)
        elif (
            type(module) is nn.Linear
        ):  # the same object, weight and hooks and all, gets another forward
            module.__class__, module.recipe, module.amax_group = FP8Linear, recipe, tokens
    return model


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# Two tensors of each layer of experts are divided, by experts. All else is whole on every rank.


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is cut; None where each rank holds all of it."""
    return 0 if name.endswith(("experts.up", "experts.down")) else None


def check_ep(num_experts: int, ep: int) -> None:
    """Raises ValueError, with the remedy, where the experts do not divide over `ep` ranks."""
    if num_experts % ep:
        fits = [n for n in range(1, min(ep, num_experts) + 1) if num_experts % n == 0]
        raise ValueError(
            f"num_experts={num_experts} does not divide over {ep} ranks: choose ep from {fits}"
        )


def shard_tensor(name: str, whole: Tensor, rank: int, world_size: int) -> Tensor:
    """Rank `rank`'s share of `whole`, the plain model's tensor `name`, as a copy: (e, ...) or whole's shape."""
    return (
        whole if shard_dim(name) is None else whole.chunk(world_size, shard_dim(name))[rank]
    ).clone()


def check_state(full: dict[str, Tensor], config: MoEConfig) -> None:
    """Raises RuntimeError that names what is missing in `full`, unknown or of another shape."""
    with torch.device("meta"):
        MoELM(config).load_state_dict(full, assign=True)


def shard_state_dict(
    full: dict[str, Tensor], config: MoEConfig, rank: int, world_size: int
) -> dict[str, Tensor]:
    """The plain model's state dict to the one of rank `rank` among `world_size` that share the experts.

    full: the plain state, each tensor of `state_shapes`' shape; the shares are copies. Raises: RuntimeError where the
    state dict does not fit the configuration; ValueError where experts do not divide.
    """
    check_ep(config.num_experts, world_size)
    check_state(full, config)
    return {name: shard_tensor(name, whole, rank, world_size) for name, whole in full.items()}


def merge_state_dicts(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state dicts of all ranks of one group, in their order, to the plain model's, to the bit; gradients too.

    shards: what `shard_state_dict` makes, of ranks 0, 1, … Returns: name to whole tensor, a copy. Raises:
    ValueError where ranks hold different values of what should be whole on each: they have drifted apart.
    """
    full = {}
    for name in shards[0]:
        pieces, dim = [shard[name] for shard in shards], shard_dim(name)
        if dim is None and not all(torch.equal(piece, pieces[0]) for piece in pieces):
            raise ValueError(
                f"{name} should be the same on every rank, and is not: the ranks have drifted apart"
            )
        full[name] = pieces[0].clone() if dim is None else torch.cat(pieces, dim)
    return full


# ── 3.1 Published weights ───────────────────────────────────────────────────────────────────────────────
#
# Nemotron 3's files have this model under other names, with queries, keys and values apart, and each expert apart.
# What they have more is refused: Mamba layers are chapter 5's, latent experts the next chapter's.

LAYER_KINDS = {
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
}
NEMOTRON3_SIZES = dict(
    vocab_size="vocab_size", hidden_size="hidden_size", num_heads="num_attention_heads", head_size="head_dim",
    num_kv_heads="num_key_value_heads", num_experts="n_routed_experts", top_k="num_experts_per_tok",
    expert_size="moe_intermediate_size", shared_size="moe_shared_expert_intermediate_size",
    gate_scale="routed_scaling_factor", norm_eps="layer_norm_epsilon")  # fmt: skip
NEMOTRON3_FIXED = dict(
    model_type="nemotron_h", mlp_hidden_act="relu2", n_group=1, topk_group=1, norm_topk_prob=True, n_shared_experts=1,
    attention_bias=False, mlp_bias=False, use_bias=False, tie_word_embeddings=False, sliding_window=None,
    moe_latent_size=None, num_nextn_predict_layers=0)  # fmt: skip
NEMOTRON3_NAMES = dict(
    embedding="embeddings", final_norm="norm_f", head="lm_head", out="o_proj", up="up_proj", down="down_proj",
    shared="shared_experts", router="gate", bias="e_score_correction_bias")  # fmt: skip


def _nemotron3_config(theirs: dict, where: str) -> MoEConfig:
    kinds = theirs.get("layers_block_type") or theirs.get("layer_types") or ()
    pattern = theirs.get("hybrid_override_pattern") or "".join(
        LAYER_KINDS.get(kind, "?") for kind in kinds
    )
    if "M" in pattern:
        raise ValueError(
            f"{where} has Mamba layers ({pattern}): this chapter has none, see chapter 5, mamba_hybrid"
        )
    other = {
        key: theirs[key]
        for key, value in NEMOTRON3_FIXED.items()
        if theirs.get(key, value) != value
    }
    if other or theirs["num_experts_per_tok"] == 1:
        raise ValueError(
            f"{where} has {other or 'one expert a token, normalised'}, which this model cannot be"
        )
    return MoEConfig(
        pattern=pattern, **{name: theirs[published] for name, published in NEMOTRON3_SIZES.items()}
    )


def _nemotron3_sources(name: str, num_experts: int) -> list[str]:
    """The published tensors that our tensor `name` is made of, in their order."""
    theirs = ".".join(NEMOTRON3_NAMES.get(part, part) for part in name.split("."))
    theirs = theirs if name == "head.weight" else f"backbone.{theirs}"
    if shard_dim(name) is not None:
        return [
            theirs.replace(".experts.", f".experts.{i}.") + ".weight" for i in range(num_experts)
        ]
    return [theirs.replace("qkv", f"{which}_proj") for which in ("qkv" if "qkv" in theirs else "-")]


def load_nemotron3(folder: Path | str) -> tuple[MoEConfig, dict[str, Tensor]]:
    """Configuration and plain state dict (name to tensor, on the CPU) of a folder with config.json and *.safetensors.

    Raises: FileNotFoundError; ValueError that names Mamba layers, a missing tensor, an unknown one, or a setting that
    this model has not; RuntimeError for a shape.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _nemotron3_config(
        json.loads((folder / "config.json").read_text("utf-8")), f"{folder}/config.json"
    )
    found = {
        name: x
        for file in sorted(folder.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }
    sources = {name: _nemotron3_sources(name, config.num_experts) for name in state_shapes(config)}
    wanted = list(itertools.chain(*sources.values()))
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}")
    if unknown := sorted(found.keys() - set(wanted)):
        raise ValueError(f"{folder} has {unknown[:4]}, which this model does not know")
    full = {}
    for name, names in sources.items():
        pieces = [
            found.pop(source) for source in names
        ]  # taken out, so that no tensor is in memory twice for long
        full[name] = torch.cat(pieces) if shard_dim(name) is None else torch.stack(pieces)
    check_state(full, config)
    return config, full


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# Experts are divided in one direction of a grid, and repeated in the other. With --ep 2 on 4 ranks:
#
#                      ep rank 0          ep rank 1
#        set 0       rank 0: e 0 to 3   rank 1: e 4 to 7      ← an ep group: tokens travel within it
#        set 1       rank 2: e 0 to 3   rank 3: e 4 to 7
#                         ↑ an edp group ("expert data parallel"): the same experts
#
# Each of the four has its own tokens. The ranks of an ep group are neighbours, because they talk in every layer.
#
# The loop of section 1.4 stays as it is: `parallel_gradients` takes the place of `plain_gradients`, and what it returns
# (loss, norm, rows of each expert) is of all ranks' tokens, and so equal on all of them.


# A rank's place in the grid. Grid() is for a process without process groups.
Grid = namedtuple("Grid", "ep dp ep_rank ep_group edp_group", defaults=(1, 1, 0, None, None))


def make_grid(ep: int, device: torch.device, timeout: float = 60.0) -> Grid:
    """Lays all ranks out as (dp, ep), neighbours in an ep group; every rank must call it.

    timeout: seconds. Raises: ValueError where ep does not divide the ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if ep < 1 or world % ep:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(f"ep={ep} does not divide the {world} ranks: choose ep from {fits}")
    ranks = torch.arange(world).view(-1, ep)  # as drawn above: a line for each set
    ep_group, edp_group = (
        make_group(lists.tolist(), device, timeout) for lists in (ranks, ranks.T)
    )
    return Grid(ep, world // ep, rank % ep, ep_group, edp_group)


def reduce_gradients(model: ParallelMoELM, grid: Grid) -> None:
    """Sums gradients where section 2.3 says, in two messages; the same parameters must have gradients on every rank."""
    experts = {id(p) for p in model.expert_parameters()}  # by identity: == compares elements
    for of_experts, group in ((True, grid.edp_group), (False, None)):
        grads = [
            p.grad
            for p in model.parameters()
            if (id(p) in experts) == of_experts and p.grad is not None
        ]
        if grads and group_size(group) > 1:
            flat = _all_reduce(torch.cat([grad.flatten() for grad in grads]), group)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(total.view_as(grad))


# Explained in chapter 1, section 4.1, and for shares of a tensor in chapter 2, section 4.2: experts are such shares.
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


def parallel_gradients(
    model: ParallelMoELM, tokens_BS: Tensor, targets_BS: Tensor, grid: Grid, alpha: float = 1e-4, max_norm: float = 1.0,
    autocast: torch.dtype | None = None, micro_batches: int = 1) -> Step:  # fmt: skip
    """`plain_gradients` of all ranks' tokens: the same gradients, and the same `Step` on every rank.

    tokens_BS, targets_BS: this rank's. Every rank must call it, also one without any. micro_batches: pieces in which
    the tokens are computed one after the other, to save memory; changes no number, but in FP8, where each piece has
    scales of its own. All else: as `plain_gradients`'.
    """
    # (torch.full is made on the device; torch.tensor would be copied there, and the host would wait for it.)
    sizes = torch.stack(
        [(targets_BS != -100).sum(), torch.full((), len(tokens_BS), device=tokens_BS.device)]
    )
    tokens, sequences = _all_reduce(sizes).clamp(
        min=1
    )  # what the means divide by: all ranks', all micro-batches'
    total = 0
    for part in zip(tokens_BS.tensor_split(micro_batches), targets_BS.tensor_split(micro_batches)):
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss_BS, balance_B = model.loss(*part)
        loss = loss_BS.sum() / tokens  # this rank's part of the mean
        (loss + alpha * balance_B.sum() / sequences).backward()
        total = total + loss.detach()
    reduce_gradients(model, grid)
    norm = clip_grad_norm_(
        model.parameters(), max_norm, sharded=model.expert_parameters(), group=grid.ep_group
    )
    return Step(_all_reduce(total), norm, _all_reduce(model.counts()))


def train(
    model: ParallelMoELM, batches: Batches, lr: Callable[[int], float], grid: Grid, **options
) -> Iterator[Step]:
    """`train_alone` on a grid: the same arguments, and the same losses and norms. Every rank must iterate it.

    batches: the global ones. Each rank takes its rows; where the ranks do not divide them, shares are unequal or empty,
    and the gradient is exact all the same. options: `train_alone`'s and `parallel_gradients`'.
    """
    mine = (
        [whole.tensor_split(group_size())[group_rank()] for whole in batch] for batch in batches
    )
    return train_alone(model, mine, lr, gradients=partial(parallel_gradients, grid=grid), **options)


# ── 5 The papers' arithmetic ────────────────────────────────────────────────────────────────────────────
#
# Parameters of the published models, layer by layer. Their Mamba layers are chapter 5's, here they are only counted;
# the latent width of Super and Ultra (experts work on vectors of that width, with a matrix in and one out for all of
# them) is the next chapter's. Nano by hand:
#
#     an expert                        2 · 2688 · 1856                  10.0 million parameters
#     128 of them, in 23 layers        23 · 128 · 10.0 million          29.4 billion of the model's 31.6
#     6 of them, in 23 layers          23 · 6 · 10.0 million             1.4 billion of the 3.6 that a token meets
#     rows that travel, at ep 8        4 · 6 · 2688 · 2 bytes · 7/8     113 thousand bytes a token and layer
#
# The last line is the price, and the reason why the ranks of an ep group are neighbours.


_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
PUBLISHED = {
    name: MoEConfig(131_072, *sizes, gate_scale=scale, mamba_heads=mamba_heads, latent_size=latent)
    for name, sizes, scale, mamba_heads, latent in (
        #         H     layers  N   G  D    E    K   F     shared (Ultra's order of layers is not its real one)
        ("Nano", (2688, _NANO, 32, 2, 128, 128, 6, 1856, 3712), 2.5, 64, None),
        ("Super", (4096, _SUPER, 32, 2, 128, 512, 22, 2688, 5376), 5.0, 128, 1024),
        ("Ultra", (8192, "MEM*EMEME" * 12, 64, 2, 128, 512, 22, 5120, 10_240), 5.0, 256, 2048),
    )
}
Parameters = namedtuple("Parameters", "total active active_without_input_table")


def parameters(config: MoEConfig) -> Parameters:
    """Parameters of a model, and those that one token meets: all but the experts that it has not chosen.

    Routers' biases count. A token meets one row of the input table, so publications also count without it.
    Source: the published configurations.
    """
    H, D, E, latent = config.hidden_size, config.head_size, config.num_experts, config.latent_size
    expert = 2 * (latent or H) * config.expert_size
    sizes = {
        "*": H * D * (2 * config.num_heads + 2 * config.num_kv_heads),
        "E": E * expert
        + 2 * H * config.shared_size
        + E * H
        + E
        + (2 * H * latent if latent else 0),
    }
    # Mamba: heads of 64, 8 groups with states of 128; a convolution of 4 taps and a bias, A, D and dt's bias for each
    # head, and a norm before the way out.
    inner, groups = 64 * config.mamba_heads, 2 * 8 * 128
    into = H * (2 * inner + groups + config.mamba_heads)
    sizes["M"] = into + 5 * (inner + groups) + 3 * config.mamba_heads + inner + inner * H
    table = config.vocab_size * H
    total = 2 * table + H + sum(sizes[kind] + H for kind in config.pattern)
    active = total - config.pattern.count("E") * (E - config.top_k) * expert
    return Parameters(total, active, active - table)


def all_to_all_bytes(config: MoEConfig, ep: int, itemsize: int = 2) -> float:
    """Bytes that travel between ranks for one token in one layer, forward and backward, if the load is even.

    Each of its K rows travels there and back, and so do the gradients: four times; one in ep stays at home.
    Source: ours, of section 2.2; the white paper's argument for latent experts, which are narrower rows.
    """
    return 4 * config.top_k * (config.latent_size or config.hidden_size) * itemsize * (1 - 1 / ep)


def quantisation_error(x: Tensor, *operand) -> float:
    """‖x − its eight-bit version‖ / ‖x‖, of x of any shape. operand: arguments of `quantize_fp8`.

    Source: ours.
    """
    return ((dequantize_fp8(quantize_fp8(x, *operand)) - x).norm() / x.norm()).item()


# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# Here experts are divided, and the rest of the model is whole on every rank and must fit there: no expert is cut
# (chapter 2's tensor parallelism), no layers go to other servers (chapter 3's pipeline). A large run does all of it at
# once, tensor × pipeline × expert × data, and each rank belongs to several groups. And every replica repeats the
# optimiser's states, eight bytes a parameter, the same numbers on all of them. Later chapters do both. The rows that
# travel still have two bytes a number and the model's full width, K times: narrower rows, and numbers of four bits,
# come next.


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────


def learning_rate(
    step: int, steps: int, peak: float = 1e-3, floor: float = 1e-5, warmup: int = 10
) -> float:
    """Warm-up, flat, and over the last fifth down to `floor`, by minus the square root; step counts from 0.

    A peak below the floor is its own floor. The shape is Nemotron 3's: some billion tokens of warm-up, 20 trillion
    flat, 5 trillion down.
    """
    done = max(0.0, (step - 0.8 * steps) / max(1, 0.2 * steps))
    floor = min(floor, peak)
    return min(peak * (step + 1) / warmup, floor + (peak - floor) * (1 - math.sqrt(done)))


def largest_load(counts_LE: Tensor) -> float:
    """Rows of the busiest expert over the mean, in the worst layer: 1 is even."""
    return (counts_LE.amax(1) / counts_LE.to(torch.float64).mean(1)).max().item()


@torch.no_grad()
def overload(model: MoELM, lean: float = 0.5) -> MoELM:
    """A bad start: all embeddings share a direction, and every router turns it into a liking for experts 0 and 1."""
    model.embedding.weight[:, 0] += 0.3
    for router in model.routers():
        router.weight[:2, 0] += lean
    return model


def equivalence(
    grid: Grid, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> dict:
    """A small model on this grid beside the same on a single device: name to relative error, of every tensor.

    Two experts get no token; in every second step the last rank has none, in the others ranks have unequally many.
    Errors are per tensor, the largest of all ranks: max|Δ| / max|reference|; after AdamW over max(max|reference|,
    steps · lr).
    """
    config = MoEConfig(
        61,
        16,
        "*E*E",
        num_experts=4 * grid.ep,
        top_k=2,
        expert_size=12,
        shared_size=20,
        init_std=0.05,
    )
    plain, parallel = (
        model.to(device, dtype) for model in (MoELM(config), ParallelMoELM(config, grid.ep_group))
    )
    for router in (*plain.routers(), *parallel.routers()):
        router.bias[:2] = -10
    batches = []
    for step in range(5):
        rows = group_size() + 1 if step % 2 == 0 else max(1, group_size() - 1)
        generator = torch.Generator().manual_seed(step)
        tokens_BS, targets_BS = torch.randint(61, (2, rows, 13), generator=generator).to(device)
        targets_BS[0, 3:] = -100
        batches.append((tokens_BS, targets_BS))

    def gaps(kind: str, here: dict, reference: dict, floor: float = 0.0) -> dict[str, float]:
        shards = [{name: x.detach().cpu() for name, x in here.items()}]
        if dist.is_initialized():
            shards, mine = [None] * grid.ep, shards[0]
            dist.all_gather_object(shards, mine, grid.ep_group)
        return relative_errors(kind, merge_state_dicts(shards), reference, floor)

    errors, options = (
        {},
        dict(lr=lambda step: 1e-3, alpha=0.01, gamma=0.01, max_norm=0.1, autocast=autocast),
    )
    runs = zip(
        train_alone(plain, batches, **options), train(parallel, batches, grid=grid, **options)
    )
    for step, (there, here) in enumerate(runs):
        errors[f"loss {step}"] = abs(here.loss / there.loss - 1).item()
        errors[f"norm {step}"] = abs(here.norm / there.norm - 1).item()
        if (
            dtype == torch.float64
        ):  # a choice between two nearly equal experts may be rounded otherwise
            errors[f"counts {step}"] = float((here.counts_LE - there.counts_LE).abs().max())
        if step == 0:
            errors |= gaps(
                "gradient of",
                *({n: p.grad for n, p in m.named_parameters()} for m in (parallel, plain)),
            )
    if (
        dtype == torch.float64
    ):  # where a gradient is zero Adam divides rounding noise by itself: only float64 can tell
        errors |= gaps("after AdamW", parallel.state_dict(), plain.state_dict(), floor=5 * 1e-3)
    return over_all_ranks(errors)


# fp64 is the proof. The others are what rounding does to a right program: bf16's 8 bits are 0.4 % in each product.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def check(args: argparse.Namespace, grid: Grid, device: torch.device) -> bool:
    """--check: every tensor's error on the ranks, backend and dtype that are there; True where all are within bound."""
    return print_errors(equivalence(grid, device, *dtypes(args)), BOUNDS[args.dtype])


def codes_agree(device: torch.device) -> bool:
    """Whether every rank's share of a tensor has the codes of the whole, with an outlier on the last rank alone."""
    x_RH = torch.randn(4 * group_size() + 1, 32, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    x_RH[-1, 5] = 1000.0
    whole = quantize_fp8(x_RH).codes.view(torch.uint8).tensor_split(group_size())[group_rank()]
    share = quantize_fp8(x_RH.tensor_split(group_size())[group_rank()], amax_group=dist.group.WORLD)
    same = torch.tensor(
        torch.equal(share.codes.view(torch.uint8), whole), dtype=torch.int64, device=device
    )
    return bool(_all_reduce(same, None, dist.ReduceOp.MIN))


def print_formats(recipe: FP8Recipe) -> None:
    """The recipe, product by product, and what each format does to two kinds of numbers."""
    where = "on FP8 units" if recipe.hardware else "emulated"
    say(
        f"products in FP8, {where}, all but the first {recipe.first} and the last {recipe.last} layers:"
    )
    operands = {
        E4M3: "e4m3",
        E5M2: "e5m2",
        TILE: "e4m3, tiles of 1 × 128",
        SQUARE: "e4m3, tiles of 128 × 128",
    }
    lines = (
        "fprop  y_RF  =  x_RH {} · w_FH {}",
        "dgrad  dx_RH = dy_RF {} · w_HF {}",
        "wgrad  dw_FH = dy_FR {} · x_HR {}",
    )
    for line, pair in zip(lines, recipe):
        say("  " + line.format(*(operands[operand] for operand in pair)))
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    heavy = x * torch.exp(2 * torch.randn(512, 512, generator=torch.Generator().manual_seed(1)))
    say("\nformat                     error, Gaussian   error, heavy tails   of these lost to zero")
    for operand, name in operands.items():
        lost = (dequantize_fp8(quantize_fp8(heavy, *operand)) == 0).sum().item() / heavy.numel()
        say(
            f"{name:25}{quantisation_error(x, *operand):15.2%}{quantisation_error(heavy, *operand):21.2%}{lost:22.2%}"
        )
    say()


def demonstrate(
    args: argparse.Namespace, grid: Grid, device: torch.device
) -> tuple[dict[str, float], list[tuple[float, float]], list[float]]:
    """Trains a model from a bad start, on real text, beside a single device, its copy in FP8 and one of the paper's γ.

    Returns: how far the first losses are from the single device's; of each step the largest load, with --gamma and with
    the paper's; the held-out losses of the first two.
    """
    from tqdm import tqdm

    config, (dtype, autocast) = config_of(args), dtypes(args)
    data = TextData(args.data, args.seq_length)
    source = args.data or "Python's sources"

    def batches(steps: int = args.steps) -> Batches:
        return (
            [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]
            for step in range(steps)
        )

    options = dict(
        lr=lambda step: learning_rate(step, args.steps, args.lr),
        alpha=args.alpha,
        autocast=autocast,
    )
    models = [overload(ParallelMoELM(config, grid.ep_group)).to(device, dtype) for _ in range(3)]
    to_fp8(models[1], recipe_of(args, device), grid)
    gammas = args.gamma, args.gamma, 1e-3
    runs = [
        train(model, batches(), grid=grid, gamma=gamma, **options)
        for model, gamma in zip(models, gammas)
    ]
    # The single device, on every rank: while one rank computed alone, the others' collectives would time out.
    plain = overload(MoELM(config)).to(device, dtype)
    alone = train_alone(plain, batches(min(5, args.steps)), gamma=args.gamma, **options)
    held = sum(p.numel() for p in models[0].parameters())
    say(f"{parameters(config).total:,} parameters, a token meets {parameters(config).active:,}; {held:,} on this rank; "
        f"{len(data.tokens):,} tokens of {source}\n")  # fmt: skip
    say(
        "step      loss    single device      norm   largest load   with γ = 0.001      in FP8: loss   largest load"
    )
    quiet = group_rank() > 0 or not sys.stderr.isatty()
    differences, counts = {}, []
    for step, (wide, fp8, slow) in enumerate(tqdm(zip(*runs), total=args.steps, disable=quiet)):
        loss, norm = read_step(step, wide.loss, wide.norm)
        loss_fp8, _ = read_step(step, fp8.loss, fp8.norm)
        read_step(step, slow.loss, slow.norm)
        text = ""
        for beside in itertools.islice(alone, 1):  # nothing once its steps are done
            loss_alone, _ = read_step(step, beside.loss, beside.norm)
            differences[f"loss {step}"] = abs(loss - loss_alone)
            text = f"{loss_alone:.6f}"
        counts.append(
            (wide.counts_LE, slow.counts_LE)
        )  # stay on the device: to read them is to wait for it
        if step < 5 or step % 10 == 9:
            load, load_slow, load_fp8 = (largest_load(run.counts_LE) for run in (wide, slow, fp8))
            say(f"{step:4}  {loss:.6f}  {text:>15}  {norm:8.3f}{load:13.2f} ×"
                f"{load_slow:15.2f} ×{loss_fp8:18.6f}{load_fp8:13.2f} ×")  # fmt: skip
    loads = [(largest_load(wide_LE), largest_load(slow_LE)) for wide_LE, slow_LE in counts]

    tokens_BS, targets_BS = (
        x_BS.to(device) for x_BS in data.batch(0, 4 * args.batch, args.seed, evaluation=True)
    )
    share, losses = (
        [x_BS.tensor_split(group_size())[group_rank()] for x_BS in (tokens_BS, targets_BS)],
        [],
    )
    for model in models[:2]:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            losses.append(
                _all_reduce(model.eval().loss(*share)[0].sum() / targets_BS.numel()).item()
            )
    say(f"\nheld-out loss {losses[0]:.4f} nats a token; in FP8 {losses[1]:.4f}\n")
    return differences, loads, losses


PUBLISHED_COUNTS = {
    "Nano": (31.6, 3.6, 3.2),
    "Super": (120.6, 12.7, 12.1),
    "Ultra": (550, None, 55),
}


def claims(
    args: argparse.Namespace,
    errors: dict[str, float],
    agree: bool,
    differences: dict[str, float],
    loads: list,
    losses: list[float],
) -> list[tuple[str, str, str, bool | str]]:
    """The claims table: (claim, paper, here, verdict) of what `main` has measured, and of part 5."""
    rows = []
    for claim, kind in (
        ("gradient", "grad"),
        ("norm before clipping", "norm"),
        ("weight after AdamW", "after"),
    ):
        off, text = worst(errors, kind), f"every {claim} equals the single device's, float64"
        rows.append((text, "exact", f"worst {off:.1e} relative", off <= BOUNDS["fp64"]))
    same = worst(errors, "counts") == 0
    rows.append(
        ("every expert's rows, in every step", "exact", "exact" if same else "others", same)
    )
    text = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    off = worst(differences) if differences else math.nan
    verdict = off <= BOUNDS[args.dtype] if differences else "needs steps"
    rows.append((text, "equal", f"within {off:.0e}", verdict))
    code = "FP8 codes of a tensor on all ranks equal the single device's"
    rows.append((code, "to the bit", "to the bit" if agree else "others", agree))
    verdicts = {f"γ = {args.gamma:g}": None, "the paper's γ = 0.001": "made for a million steps"}
    for (name, verdict), of_steps in zip(verdicts.items(), zip(*loads)):
        first, last = of_steps[0], statistics.median(of_steps[-10:])
        good = last < 1.5 if is_default(args) and args.steps >= 60 else "needs the default run"
        here = f"{first:.2f} × the mean, then {last:.2f} ×"
        rows.append(
            (f"largest load with {name}, {args.steps} steps", "even", here, verdict or good)
        )
    gap = f"{losses[1] / losses[0] - 1:+.2%}"
    rows.append(
        (
            "loss of FP8 over high precision, held out",
            "under 0.1 %, 56B",
            gap,
            "a tiny model, a short run",
        )
    )
    for name, paper in PUBLISHED_COUNTS.items():
        config = PUBLISHED[name]
        routers = (
            config.pattern.count("E") * config.num_experts * (config.hidden_size + 1)
            if name == "Super"
            else 0
        )
        counts = [(count - routers) / 1e9 for count in parameters(config)]
        text = f"parameters of {name}: total, active, without input table" + (
            ", without routers" if routers else ""
        )
        digits = 0 if name == "Ultra" else 1  # Ultra's are published as 550 and 55
        good = all(
            abs(count - value) <= 0.01 * value for count, value in zip(counts, paper) if value
        )
        rows.append(
            (
                text,
                *(
                    ", ".join(f"{x:.{digits}f}B" if x else "–" for x in xs)
                    for xs in (paper, counts)
                ),
                good,
            )
        )
    return [
        *rows,
        ("FP8 products faster than bf16 ones", "up to 2 ×", "–", "needs FP8 units; see make bench"),
    ]


def main(args: argparse.Namespace, device: torch.device) -> None:
    grid = make_grid(args.ep, device, args.timeout)
    say_setting(args, f": ep {grid.ep} × dp {grid.dp}")
    if args.check:
        sys.exit(0 if check(args, grid, device) else 1)
    print_formats(recipe_of(args, device))
    errors, agree = equivalence(grid, device, torch.float64), codes_agree(device)
    found = demonstrate(args, grid, device)
    if not print_claims(claims(args, errors, agree, *found)):
        sys.exit(1)


RECIPES = {"hybrid": HYBRID, "blockwise": BLOCKWISE}


@dataclass
class Options:
    """This chapter's own flags."""

    data: str = flag(
        "", "a text to train on; by default the sources of Python's library", metavar="FILE"
    )
    ep: int | None = flag(
        None, "ranks that share one set of experts; None: 2, or 1 where 2 does not fit", least=1
    )
    seq_length: int = flag(64, "tokens of a sequence, S", least=1)
    batch: int = flag(16, "sequences of a step, over all ranks", least=1)
    lr: float = flag(3e-3, "peak learning rate", least=1e-9)
    alpha: float = flag(1e-4, "weight of the balancing loss")
    gamma: float = flag(0.01, "step of the routers' biases; the paper's is 0.001")
    fp8: str = flag("auto", "auto: FP8 units if any", choices=["auto", "hardware", "emulate"])
    recipe: str = flag("hybrid", "one scale a tensor, or tiles", choices=list(RECIPES))


def is_default(args: argparse.Namespace) -> bool:
    """Whether the model and its training are those of the default run, on whatever ranks."""
    layout = ("ep", "fp8", "recipe")  # of which the wide model's losses and loads do not depend
    wanted = [
        f for f in (*fields(MoEConfig), *fields(Options)) if f.metadata and f.name not in layout
    ]
    return all(getattr(args, f.name) == f.default for f in wanted)


def config_of(args: argparse.Namespace) -> MoEConfig:
    # A small model wants larger first weights: with 0.02 all scores are nearly equal, and steps of γ jump over them.
    vocab_size = byte_encoding().n_vocab
    return config_from(args, MoEConfig, vocab_size=vocab_size, seed=args.seed, init_std=0.06)


def recipe_of(args: argparse.Namespace, device: torch.device) -> FP8Recipe:
    recipe = RECIPES[args.recipe]
    return recipe._replace(hardware=fp8_hardware(args.fp8, device, recipe))


def check_args(args: argparse.Namespace) -> None:
    """Resolves --ep. Raises ValueError or OSError where the flags, or the text, do not fit."""
    config = config_of(args)
    if args.ep is None:
        args.ep = math.gcd(2, args.world_size, config.num_experts)
    if args.world_size % args.ep:
        raise ValueError(f"--ep {args.ep} must divide the {args.world_size} ranks")
    check_ep(config.num_experts, args.ep)
    state_shapes(config)  # raises for layers that this model has not
    recipe_of(args, torch.device(args.device))
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, MoEConfig], check_args, ranks=4, steps=60)


# Explained in chapter 2, at its end.
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


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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


# Explained in chapter 1, at its end.
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
