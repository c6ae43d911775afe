# SPDX-License-Identifier: MIT-0
"""Chapter 5. Mamba-2 hybrids: a memory of fixed size, trained in parallel, and a little attention.

Papers: An Empirical Study of Mamba-based Language Models, Waleffe et al., 2024, arXiv 2406.07887
        Nemotron-H, NVIDIA, 2025, arXiv 2504.03624;  Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444
        and what they rest on: Transformers are SSMs (Mamba-2), Dao and Gu, 2024, arXiv 2405.21060

The problem. Chapter 4 divided everything around attention, and left attention as it is: its work grows with the square
of the sequence, and writing one more token reads every key and value so far. At 64 thousand tokens these are 8 GiB a
sequence for an 8B model (32 layers, 8 heads of keys, 16 bits). A recurrence with a state of fixed size needs none of
that; but a loop over tokens cannot use the hardware, and what a state has forgotten is gone.

The idea. One recurrence, state ← exp(dt·A)·state + dt·x⊗B, y = state·C, seen three ways: as a loop it decodes with
constant memory; written out it is attention without softmax under a mask of decays; in chunks it is both, four matrix
products a chunk and a state from chunk to chunk. Heads are independent, so ranks can divide them; and a stretch of
tokens does to a state what one number and one matrix say, so ranks can divide the *sequence* and pass the state on:

        rank 0: tokens a b c d           rank 1: tokens e f g h           rank 2: tokens i j k l
        ┌────────┐ state                 ┌────────┐ state                 ┌────────┐
        │ ◣      │───────── decay, own ──│ ◣      │───────── decay, own ──│ ◣      │     ◣ masked matrix of a chunk
        │    ◣   │      all-gathered     │    ◣   │      all-gathered     │    ◣   │     the same bytes for 4 tokens
        └────────┘                       └────────┘                       └────────┘     and for 4 million

Then mix: 24 such layers, 4 of attention for what must be recalled exactly, 28 feed-forward, and the first paper (from
here on "the study") finds the whole better than the Transformer of its size.

Run it (no flag is needed; --help lists them):

    python 05_mamba_hybrid/mamba_hybrid.py                           2 ranks on this machine, tp 2
    python 05_mamba_hybrid/mamba_hybrid.py --ranks 4 --tp 2          tp 2 × cp 2: heads and tokens divided
    python 05_mamba_hybrid/mamba_hybrid.py --ranks 1                 one process, for a debugger
    python 05_mamba_hybrid/mamba_hybrid.py --ranks 3 --check         equivalence alone, each tensor's error
    torchrun --nproc-per-node=8 05_mamba_hybrid/mamba_hybrid.py --tp 4 --cp 2
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        05_mamba_hybrid/mamba_hybrid.py

It proves in float64 that every gradient equals the single device's however the ranks are laid out, trains a small
hybrid on real text, writes a line, times a token behind 1 to 32 thousand others, and ends in a table of the papers'
claims.

Left out: fused kernels; replicas of the whole (data parallelism: chapters 1 and 2); dividing the vocabulary (chapter 2)
and norms (chapter 4); balancing attention over cp; prompts of unequal length in one batch; mixture-of-experts layers
and FP8 (chapter 6); what Nano 2 does after training.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────────────
#
# The suffix of a tensor's name is its shape, one letter a dimension. A CAPITAL is the whole dimension, the small letter
# this rank's share of it, and partial_ marks a summand that is still to be reduced:
#
#     B  batch                          N  heads (the papers' H)           n = N / tp   this rank's heads
#     S  sequence, in tokens            D  size of a head (their P)        s            this rank's tokens
#     H  hidden size (their d_model)    Z  size of a state (their N)       K  taps of the convolution
#     F  feed-forward size, f = F / tp  G  groups, J = N / G heads each    C  channels of the convolution
#     V  words                          Q  length of a chunk               L  layers
#
# Where letters meet. B and C are also the two projections that the papers call so (tensors B_BSGZ and C_BSGZ); D is
# also the papers' vector of the way around the state. X is dt·x, a is dt·A, s_i the running sum a_0 + … + a_i, and L
# the mask of decays. The K − 1 tokens before are written _BKC as well, and T counts the tokens that attention sees. A
# digit is a literal size. tp is the number of ranks that share one copy of the model's weights, cp the number that
# share one sequence: world size = tp · cp.

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
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
from dataclasses import Field, dataclass, field, fields, replace
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
class HybridConfig:
    """The sizes of a hybrid model. Raises ValueError where they contradict each other."""

    vocab_size: int = 256
    hidden_size: int = flag(128, "hidden size, H", least=1)
    pattern: str = flag("M-M*-M-", "a letter a layer: M Mamba-2, * attention, - feed-forward")
    ffn_hidden_size: int = flag(512, "feed-forward size, F; tp must divide it", least=1)
    mamba_heads: int = flag(8, "heads of a Mamba layer, N; tp must divide them", least=1)
    mamba_head_size: int = 32  # D
    mamba_groups: int = flag(2, "groups of them that share B and C, G", least=1)
    state_size: int = flag(32, "size of a state, Z", least=1)
    conv_kernel: int = 4  # K
    chunk: int = flag(64, "tokens of a chunk, Q", least=1)
    attention_heads: int = flag(4, "query heads; tp must divide them", least=1)
    attention_groups: int = flag(2, "groups of them that share keys and values", least=1)
    attention_head_size: int = 32
    rope: float = 0.0  # the share of each head that is rotated by its position; the papers' hybrids rotate nothing
    norm_eps: float = 1e-5
    init_std: float = 0.02
    A_init: tuple[float, float] = (1.0, 16.0)  # −A of a head is drawn between these
    dt_init: tuple[float, float] = (
        1e-3,
        0.1,
    )  # and its step dt, on a logarithmic scale, between these
    seed: int = 0  # the weights are a function of this configuration alone

    def __post_init__(self):
        if not self.pattern or set(self.pattern) - set("M*-"):
            raise ValueError(
                f"pattern={self.pattern!r}: write M, * or - for each layer, and nothing else"
            )
        for name, value in vars(self).items():
            least = {"seed": value, "rope": value, "conv_kernel": 2}.get(name, 1)
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")
        for kind in ("mamba", "attention"):
            heads, groups = getattr(self, f"{kind}_heads"), getattr(self, f"{kind}_groups")
            if heads % groups:
                raise ValueError(
                    f"{kind}_heads={heads} do not divide into {kind}_groups={groups}: choose a multiple"
                )
        if not 0 <= self.rope <= 1 or round(self.rope * self.attention_head_size) % 2:
            raise ValueError(
                f"rope={self.rope} of {self.attention_head_size}: an even number of each head is rotated"
            )


# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 One recurrence, seen three ways ─────────────────────────────────────────────────────────────────
#
# A head of Mamba-2 has a memory of fixed size, a matrix state_DZ. At each token it forgets a little, writes once, and
# reads once:
#
#     state ← exp(dt·A) · state  +  dt · x_D ⊗ B_Z          forget, then write the value x under the key B
#     y_D   = state_DZ · C_Z  (+ D · x_D)                   read with the query C; D is a way around the memory
#
# dt > 0 and the vectors x, B, C come from the token itself; A < 0 is one learned number a head. So a = dt·A ≤ 0 is the
# logarithm of what is kept: with a large dt the head forgets what was and writes this token; with dt near 0 it lets the
# token pass.
#
# Follow what three tokens write, with X for dt·x. When token 2 reads, what token 1 wrote has faded once, what token 0
# wrote twice, and its own not at all:
#
#     state = X_2 ⊗ B_2  +  exp(a_2) X_1 ⊗ B_1  +  exp(a_1 + a_2) X_0 ⊗ B_0
#     y_2   = (C_2·B_2) X_2  +  exp(a_2) (C_2·B_1) X_1  +  exp(a_1 + a_2) (C_2·B_0) X_0
#
# From the first line to the second the matrix is gone: (X ⊗ B)·C is the vector X times the number C·B, query times key.
# That is attention, without a softmax, and with a mask L of decays in the place of ones:
#
#     y_i = Σ_{j ≤ i}  L_ij · (C_i·B_j) · X_j           L_ij = exp(a_{j+1} + … + a_i): all a behind j, up to i
#     y   = (L ∘ C Bᵀ) X
#
# And the two can be mixed. Let e be the last token of some chunk with j in it, and i a token of a later one. Then the
# way from j to i is a way to e and a way from e, and the exponential of their sum is a product:
#
#     L_ij · (C_i·B_j) · X_j   =   exp(a_{e+1} + … + a_i) C_i  ·  [ exp(a_{j+1} + … + a_e) X_j ⊗ B_j ]
#
# The bracket knows nothing of i. Added up over the j of a chunk, once, it is the state that leaves the chunk, and
# serves all later tokens. So the same numbers can be had as (ssd: state space duality, Mamba-2's word for it)
#
#     a loop           ssd_recurrent    S small steps, one after the other; constant memory: for decoding
#     a masked matrix  ssd_quadratic    four products, all tokens at once, S² work: for what is short
#     chunks of both   ssd              the matrix inside chunks of Q tokens, the state from chunk to chunk:
#                                       four products each, S·Q work: for training
#
#     ┌───────┐                          L of 3 chunks. On the diagonal ◣, the masked matrix of each chunk. Everything
#     │ ◣     │                          below it, ■, has low rank: what a later chunk can know of an earlier one went
#     │ ■ ◣   │                          through the state between them, D·Z numbers.
#     │ ■ ■ ◣ │
#     └───────┘


# L first. Decays, states and means are too delicate for less than fp32 (`at_least_fp32`, in part 2). Decays multiply
# over thousands of tokens, so all is done with their logarithms, and exp comes last. Traps:
#
# · Above the diagonal the sums run backwards and are positive: exp of them is inf, and a mask that is multiplied on
#   afterwards makes NaN of it, at the latest in backward, where the gradient 0 meets inf. So −inf goes in *before* exp.
# · A sum over a stretch is a difference of two sums from the start. In fp32 both may be −5,000 and good to 3e-4, and so
#   is their difference, however short the stretch. In float64 it is exact enough, and S numbers a head cost nothing.


def segsum(a: Tensor) -> Tensor:
    """log L: sums over stretches, [i, j] is a_{j+1} + … + a_i where j ≤ i, and −inf where j > i.

    a: logarithms of decays, (..., S). The diagonal is 0: a token does not decay on the way to itself.
    Returns: (..., S, S), in a's dtype. Source: Mamba-2, section 6 of arXiv 2405.21060.
    """
    sums = a.to(torch.float64).cumsum(-1)
    later = torch.ones(2 * a.shape[-1:], dtype=torch.bool, device=a.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).to(a.dtype).masked_fill(later, -torch.inf)


# Documents that are packed into one sequence need no mask of their own. Where one begins, the state must be forgotten,
# and to forget is what decays are for: exp(−1000) is 0, in every dtype and to the bit, so 1000 is taken from that
# token's a. (Not inf: the difference of two sums behind it would be inf − inf.)


def log_decay(dt: Tensor, A: Tensor, starts: Tensor | None = None) -> Tensor:
    """a = dt·A: the logarithm of what each token lets live of the state before it; (B, S, N), in at least fp32.

    starts: (B, S), True where a document begins; others as `ssd`'s. Source: Mamba-2; documents: ours.
    """
    a_BSN = at_least_fp32(dt) * at_least_fp32(A)
    return a_BSN if starts is None else a_BSN - 1000.0 * starts[..., None]


# Heads come in groups that share B and C, as query heads share keys in grouped attention: heads 0 … J−1 are group 0,
# the next J group 1. So C Bᵀ is computed once a group, and J masks are laid on it. All three forms work on one layout,
# (B, G, J, S, ·), in at least fp32; dt goes into X = dt·x and a = dt·A here, once each. (Not into B as well: then the
# write would be scaled by dt².) Each takes the state that enters and gives the one that leaves.


def _scan(form, x, dt, A, B, C, D, state, starts):
    # Autocast is off, here and in backward: it would make the products of wide numbers narrow again.
    with torch.autocast(x.device.type, enabled=False):
        G, split = B.shape[2], "B S (G J) D -> B G J S D"
        X_BGJSD = rearrange(at_least_fp32(x) * at_least_fp32(dt)[..., None], split, G=G)
        a_BGJS1 = rearrange(log_decay(dt, A, starts)[..., None], split, G=G)
        B_BG1SZ, C_BG1SZ = (rearrange(at_least_fp32(t), "B S G Z -> B G 1 S Z") for t in (B, C))
        zeros_BNDZ = X_BGJSD.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
        state_BGJDZ = rearrange(
            zeros_BNDZ if state is None else at_least_fp32(state), "B (G J) D Z -> B G J D Z", G=G
        )
        y_BGJSD, state_BGJDZ = form(state_BGJDZ, X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ)
        y_BSND = rearrange(y_BGJSD, "B G J S D -> B S (G J) D")
        y_BSND = y_BSND if D is None else y_BSND + at_least_fp32(D)[:, None] * x
        return y_BSND.to(x.dtype), rearrange(state_BGJDZ, "B G J D Z -> B (G J) D Z")


# The loop is the recurrence as it stands above, a line for the state and one for what is read.


def _steps(state_BGJDZ, *tensors):
    y = []
    for X_BGJD, a_BGJ1, B_BG1Z, C_BG1Z in zip(*(t.unbind(-2) for t in tensors)):
        state_BGJDZ = (
            a_BGJ1.exp()[..., None] * state_BGJDZ + X_BGJD[..., None] * B_BG1Z[..., None, :]
        )
        y.append((state_BGJDZ * C_BG1Z[..., None, :]).sum(-1))
    return torch.stack(y, -2) if y else tensors[0], state_BGJDZ


def ssd_recurrent(x, dt, A, B, C, D=None, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The loop: S steps, one after the other. One token, with the state so far, is a step of decoding.

    Arguments and results as `ssd`'s, without a chunk: y (B, S, N, D) and the state behind the last token.
    Source: Mamba-2.
    """
    return _scan(_steps, x, dt, A, B, C, D, initial_state, starts)


# The masked matrix. To serve as a chunk it needs two things more: what the state that enters adds to each y, which
# fades by all a from the first token on; and what each token leaves in the state that goes out. For the second nothing
# new is needed: the last row of L says how much of token j is left behind the last one.


def _kept(a_BSN: Tensor) -> Tensor:
    """What is left at each token of the state before the first: exp(a_0 + … + a_i)."""
    return a_BSN.to(torch.float64).cumsum(-2).to(a_BSN.dtype).exp()


def _chunk(state_BGJDZ, X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ):
    L_BGJSS, kept_BGJS1 = segsum(a_BGJS1[..., 0]).exp(), _kept(a_BGJS1)
    y_BGJSD = (L_BGJSS * (C_BG1SZ @ B_BG1SZ.mT)) @ X_BGJSD + kept_BGJS1 * (C_BG1SZ @ state_BGJDZ.mT)
    left_BGJSD = L_BGJSS[..., -1, :, None] * X_BGJSD
    return y_BGJSD, kept_BGJS1[..., -1:, :] * state_BGJDZ + left_BGJSD.mT @ B_BG1SZ


def ssd_quadratic(x, dt, A, B, C, D=None, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The masked matrix; work and memory grow with S².

    Arguments and results as `ssd`'s, without a chunk: y (B, S, N, D) and the state behind the last token.
    Source: Mamba-2.
    """
    return _scan(_chunk, x, dt, A, B, C, D, initial_state, starts)


# Chunks of both: `_chunk` for one chunk after the other, the state handed on. The last chunk may be short: there is
# nothing to pad. Autograd could differentiate that loop, but it would keep several S × Q matrices a head. We keep the
# states between chunks, and in backward compute each chunk's matrices again. Backward walks the chunks from the last to
# the first, and hands on the *gradient* of the state as forward hands on the state.
#
# In a chunk forward made four products, C Bᵀ, its product with X, C stateᵀ and Xᵀ B. Each has two factors, and the
# gradient of each factor is one more product: of what arrives, with the other factor.
#
# The decays are worth a closer look. Every one of them is the exponential of a difference of running sums: L_ij =
# exp(s_i − s_j), with s_i = a_0 + … + a_i. Raise s_i by a little, and L_ij grows by L_ij times that; raise s_j, and it
# shrinks by as much. So of the gradient dL_ij the number M_ij = dL_ij · L_ij goes to s_i with plus and to s_j with
# minus, and altogether
#
#     ds_i = Σ_j M_ij − Σ_j M_ji                  row sums minus column sums
#     da_t = ds_t + ds_{t+1} + …                  a_t is a part of every s_i from t on: a running sum from the end
#
# The diagonal of M cancels in the first line, and much of the rest nearly: hence float64 for these sums. What fades on
# the way in (kept_i = exp(s_i)) adds to s_i; what fades on the way out (end_j = exp(s_last − s_j)) adds to s_last, and
# takes from s_j. (Known from linear attention is a shortcut, ds_i = dy_i·y_i − X_i·dX_i. It is the same sum, but the
# diagonal is rounded before it cancels: of a head that forgets within a token it leaves noise in the place of dA.)


def _chunk_backward(
    state_BGJDZ, X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ, grad_y_BGJSD, grad_state_BGJDZ
):
    L_BGJSS, kept_BGJS1 = segsum(a_BGJS1[..., 0]).exp(), _kept(a_BGJS1)
    end_BGJS1, whole_BGJ11, exact = (
        L_BGJSS[..., -1, :, None],
        kept_BGJS1[..., -1:, :],
        dict(dtype=torch.float64),
    )
    # Forward was y = (L ∘ C Bᵀ) X + kept ∘ (C stateᵀ) and new state = whole · state + (end ∘ X)ᵀ B. Now
    # each factor in turn: X first, through y and through the new state.
    scores_BG1SS, read_BGJSD = C_BG1SZ @ B_BG1SZ.mT, kept_BGJS1 * grad_y_BGJSD
    grad_X_BGJSD = (L_BGJSS * scores_BG1SS).mT @ grad_y_BGJSD + end_BGJS1 * (
        B_BG1SZ @ grad_state_BGJDZ.mT
    )
    # Then B and C, which all heads of a group share: so their gradients are sums over heads.
    by_head_BGJSS = (grad_y_BGJSD @ X_BGJSD.mT) * L_BGJSS
    grad_scores_BG1SS = by_head_BGJSS.sum(2, keepdim=True)
    by_read_BGJSZ, by_left_BGJSZ = (
        read_BGJSD @ state_BGJDZ,
        (end_BGJS1 * X_BGJSD) @ grad_state_BGJDZ,
    )
    grad_B_BG1SZ = grad_scores_BG1SS.mT @ C_BG1SZ + by_left_BGJSZ.sum(2, keepdim=True)
    grad_C_BG1SZ = grad_scores_BG1SS @ B_BG1SZ + by_read_BGJSZ.sum(2, keepdim=True)

    # At last the decays, by way of s: what L, the reading of the state and the writing into it tell.
    M_BGJSS, left_BGJS = (
        by_head_BGJSS.mul_(scores_BG1SS),
        (by_left_BGJSZ * B_BG1SZ).sum(-1, **exact),
    )
    grad_s_BGJS = M_BGJSS.sum(-1, **exact) - M_BGJSS.sum(-2, **exact) - left_BGJS
    grad_s_BGJS += (by_read_BGJSZ * C_BG1SZ).sum(-1, **exact)
    grad_s_BGJS[..., -1] += left_BGJS.sum(-1) + (whole_BGJ11 * state_BGJDZ * grad_state_BGJDZ).sum(
        (-1, -2), **exact
    )
    grad_a_BGJS1 = grad_s_BGJS.flip(-1).cumsum(-1).flip(-1)[..., None]
    grad_state_BGJDZ = whole_BGJ11 * grad_state_BGJDZ + read_BGJSD.mT @ C_BG1SZ
    return grad_state_BGJDZ, grad_X_BGJSD, grad_a_BGJS1, grad_B_BG1SZ, grad_C_BG1SZ


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, chunk, state_BGJDZ, *tensors
    ):  # X, a, B and C; tokens are the last dimension but one
        # What backward will need: the inputs, and the state in front of each chunk. No mask, no scores.
        y_BGJSD, states = torch.empty_like(tensors[0]), []
        ctx.chunks = [slice(t, t + chunk) for t in range(0, y_BGJSD.shape[3], chunk)]
        for at in ctx.chunks:
            states.append(state_BGJDZ)
            y_BGJSD[..., at, :], state_BGJDZ = _chunk(
                state_BGJDZ, *(t[..., at, :] for t in tensors)
            )
        ctx.save_for_backward(*tensors, *states)
        return y_BGJSD, state_BGJDZ if states else state_BGJDZ.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_BGJSD, grad_state_BGJDZ):
        tensors, states = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads = [torch.empty_like(t) for t in tensors]
        with torch.autocast(grad_y_BGJSD.device.type, enabled=False):
            for at, state_BGJDZ in zip(reversed(ctx.chunks), reversed(states)):
                of_chunk = (t[..., at, :] for t in (*tensors, grad_y_BGJSD))
                grad_state_BGJDZ, *parts = _chunk_backward(state_BGJDZ, *of_chunk, grad_state_BGJDZ)
                for grad, part in zip(grads, parts):
                    grad[..., at, :] = part
        return None, grad_state_BGJDZ, *grads


def ssd(x, dt, A, B, C, chunk, D=None, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 over a sequence, in chunks: y_i = C_i·state_i + D x_i.

    Args:
        x: values, (B, S, N, D), any S. dt: step sizes, (B, S, N), positive. A: (N,), negative.
        B, C: (B, S, G, Z); heads [g·J, (g + 1)·J) with J = N / G read and write with those of group g.
        chunk: Q; changes no number beyond rounding. Work is S·(Q·(D + Z) + D·Z) a head; the inputs and S / Q
            states are kept.
        D: (N,), the way around the state, or None. initial_state: (B, N, D, Z); None is zeros.
        starts: bool, (B, S), True where a document begins: there the state is forgotten.

    Returns: y as x, and the state behind the last token, (B, N, D, Z). Computed in at least fp32, which the state stays
    in. Differentiable once, in all of its tensors.
    Raises: ValueError where heads do not divide into groups, or chunk < 1.
    Source: Mamba-2, section 6 of arXiv 2405.21060; backward: ours.
    """
    if x.shape[2] % B.shape[2] or chunk < 1:
        raise ValueError(
            f"{x.shape[2]} heads in {B.shape[2]} groups, chunk={chunk}: groups divide heads, chunk > 0"
        )
    return _scan(
        lambda *laid_out: _ChunkedSSD.apply(chunk, *laid_out),
        x,
        dt,
        A,
        B,
        C,
        D,
        initial_state,
        starts,
    )


# ── 1.2 The convolution ─────────────────────────────────────────────────────────────────────────────────
#
# Before the recurrence each channel of x, B and C takes a weighted sum of its last K = 4 tokens, its own and K − 1
# earlier ones: it costs little, and lets a token know what stood right before it. The *last* tap belongs to the
# newest token. What a later token needs of the past is the K − 1 inputs before it, and inputs they are: what went into
# the convolution, not what came out of it.


def causal_conv1d(u_BSC, weight_CK, bias_C, previous_BKC=None, document=None) -> Tensor:
    """Each channel's weighted sum over its last K tokens, as long as u, with bias and no activation.

    previous_BKC: the tokens before u, of which the last K − 1 count; where there are fewer, or it is None, zeros.
    document: (B, K − 1 + S) numbers of the documents of the K − 1 tokens before and of u; what belongs to another
    document is not looked at.
    Source: Mamba.
    """
    S, K = u_BSC.shape[1], weight_CK.shape[1]
    zeros_BKC, y_BSC = u_BSC.new_zeros(u_BSC.shape[0], K - 1, u_BSC.shape[2]), bias_C
    padded_BSC = torch.cat([t for t in (zeros_BKC, previous_BKC, u_BSC) if t is not None], 1)[
        :, 1 - K - S :
    ]
    for tap in range(K):
        of_tap_BSC = padded_BSC[:, tap : tap + S]
        if document is not None:
            of_tap_BSC = (
                of_tap_BSC * (document[:, tap : tap + S] == document[:, K - 1 :])[..., None]
            )
        y_BSC = torch.addcmul(y_BSC, of_tap_BSC, weight_CK[:, tap])
    return y_BSC.to(u_BSC.dtype)


# ── 1.3 The Mamba-2 layer ───────────────────────────────────────────────────────────────────────────────
#
#     x_BSH ──· in_proj ──► z │ x  B  C │ dt            one projection, in this order, N·D + (N·D + 2·G·Z) + N wide
#                           │ └─ conv ─┘  │
#                           │    silu   softplus(dt + dt_bias)
#                           │      └─ ssd ─┘            A = −exp(A_log), so that no step of training makes it positive
#                       silu(z) ─────·                  the gate, and then the norm: they cannot be swapped
#                              grouped norm             a mean square for each group of heads, not one over all channels
#                                out_proj ──► y_BSH
#
# The groups of the norm look like a detail. They are what lets tensor parallelism cut the layer by heads without one
# word between ranks.


@dataclass
class Past:
    """Where tokens stand in their sequence, and what the layers see of those before: here nothing, x is the beginning.

    Two others answer the same questions: `CachedPast` (section 1.6), where the past has gone through the model before,
    and `RankPast` (section 2.5), where it is on other ranks. No layer knows which one it has. x (B, S, N, D) and its
    companions are those of `ssd`. Source: ours.
    """

    first: int = 0  # the number of tokens before
    document_BS: Tensor | None = (
        None  # of all tokens of the sequence, the number of the document; None: there is one
    )

    def documents(self, before: int, S: int) -> Tensor | None:
        """The document's number for `before` tokens in front of `first`, and for S from there on."""
        if self.document_BS is None:
            return None
        index = torch.arange(self.first - before, self.first + S, device=self.document_BS.device)
        return self.document_BS[
            :, index.clamp(min=0)
        ]  # in front of the first token of all there are only zeros

    def starts(self, S: int) -> Tensor | None:
        """True where a document begins, for S tokens from `first` on."""
        document = self.documents(1, S)
        return None if document is None else document[:, 1:] != document[:, :-1]

    def inputs(self, u_BSC: Tensor, K: int) -> Tensor | None:
        """The convolution's inputs in front of u, the last K − 1 or more; None are zeros."""
        return None

    def scan(self, x, dt, A, B, C, chunk: int, D: Tensor) -> Tensor:
        """`ssd`'s y, (B, S, N, D)."""
        return ssd(x, dt, A, B, C, chunk, D, None, self.starts(x.shape[1]))[0]

    def keys(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from the first token of the sequence to the last of x, (B, G, T, D) each."""
        return k_BGSD, v_BGSD


class RMSNorm(nn.Module):
    """x / √(mean of x² + eps), each of `groups` slices of the last dimension by itself, times a weight; in fp32."""

    def __init__(self, size: int, eps: float = 1e-5, groups: int = 1):
        super().__init__()
        self.eps, self.groups, self.weight = eps, groups, nn.Parameter(torch.ones(size))

    def mean_square(self, x_BSGC: Tensor) -> Tensor:
        return x_BSGC.square().mean(-1, keepdim=True)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSGC = at_least_fp32(x_BSH).unflatten(-1, (self.groups, -1))
        y_BSGC = x_BSGC * (self.mean_square(x_BSGC) + self.eps).rsqrt()
        return (y_BSGC.flatten(-2) * at_least_fp32(self.weight)).to(x_BSH.dtype)


class Mamba2Mixer(nn.Module):
    """A Mamba-2 layer without its norm and residual connection: x_BSH to (B, S, H), as the published models have it.

    Source: Mamba-2; Megatron-LM's layer.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, N, inner = (
            config,
            config.mamba_heads,
            config.mamba_heads * config.mamba_head_size,
        )
        self.convolved = [inner, *2 * [config.mamba_groups * config.state_size]]  # x, B, C
        self.projected = [inner, sum(self.convolved), N]  # z, those three, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projected), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.projected[1], config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(self.projected[1]))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(N)) for _ in range(3))
        self.norm = RMSNorm(inner, config.norm_eps, config.mamba_groups)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        for name, p in self.named_parameters():
            if not p.is_meta:
                p.data.copy_(initial_value(name, p.shape, config))

    def forward(self, x_BSH: Tensor, past: Past | None = None) -> Tensor:
        # The order of the rows of in_proj is the published one; z and dt do not go through the convolution.
        config, past, S = self.config, past or Past(), x_BSH.shape[1]
        z_BSC, u_BSC, dt_BSN = self.in_proj(x_BSH).split(self.projected, -1)
        before, documents = (
            past.inputs(u_BSC, config.conv_kernel),
            past.documents(config.conv_kernel - 1, S),
        )
        u_BSC = F.silu(causal_conv1d(u_BSC, self.conv_weight, self.conv_bias, before, documents))
        x_BSC, *BC_BSC = u_BSC.split(self.convolved, -1)
        x_BSND = rearrange(x_BSC, "B S (N D) -> B S N D", D=config.mamba_head_size)
        B_BSGZ, C_BSGZ = (rearrange(t, "B S (G Z) -> B S G Z", Z=config.state_size) for t in BC_BSC)
        dt_BSN, A_N = (
            F.softplus(at_least_fp32(dt_BSN) + at_least_fp32(self.dt_bias)),
            -at_least_fp32(self.A_log).exp(),
        )
        y_BSND = past.scan(x_BSND, dt_BSN, A_N, B_BSGZ, C_BSGZ, config.chunk, self.D)
        # The gate first: norm(y · silu(z)). The norm of y, gated afterwards, is another function.
        y_BSC = at_least_fp32(rearrange(y_BSND, "B S N D -> B S (N D)")) * F.silu(
            at_least_fp32(z_BSC)
        )
        return self.out_proj(self.norm(y_BSC).to(x_BSH.dtype))


# ── 1.4 Attention, feed-forward, and the model ──────────────────────────────────────────────────────────
#
# A state of fixed size must choose what it remembers. Attention forgets nothing, and pays for it with the keys and
# values of every token. A hybrid takes many layers of the first kind and a few of the second. Query heads share keys
# and values in groups. There is no position embedding: the Mamba layers know the order already. (`rope` is for the
# Transformer that one wants to compare with.)
#
# Each letter of the pattern is one residual layer of its own, x ← x + f(norm(x)): attention and its feed-forward layer
# are two. No bias anywhere but in the convolution, and a head of its own, not tied to the embedding.


def rotate(x_BNSD: Tensor, first: int, share: float, base: float = 10_000.0) -> Tensor:
    """Rotary embedding on the first `share` of each head, R numbers, for tokens first, first + 1, …

    Element i turns with element i + R/2. Returns: the shape and dtype of x_BNSD.
    Source: RoFormer, arXiv 2104.09864.
    """
    S, R, exact = (
        x_BNSD.shape[-2],
        round(share * x_BNSD.shape[-1]),
        dict(dtype=torch.float64, device=x_BNSD.device),
    )
    if not R:
        return x_BNSD
    angle_SR = torch.arange(first, first + S, **exact)[:, None] * base ** (
        -torch.arange(0, R, 2, **exact) / R
    )
    turn_SR = torch.polar(torch.ones_like(angle_SR), angle_SR).to(
        at_least_fp32(x_BNSD).dtype.to_complex()
    )
    turned_BNSR = torch.complex(*at_least_fp32(x_BNSD[..., :R]).chunk(2, -1)) * turn_SR
    return torch.cat(
        [turned_BNSR.real.to(x_BNSD.dtype), turned_BNSR.imag.to(x_BNSD.dtype), x_BNSD[..., R:]], -1
    )


class Attention(nn.Module):
    """Causal grouped-query attention, x_BSH to (B, S, H)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, H, D = config, config.hidden_size, config.attention_head_size
        self.q_proj = nn.Linear(H, config.attention_heads * D, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(H, config.attention_groups * D, bias=False) for _ in range(2)
        )
        self.o_proj = nn.Linear(config.attention_heads * D, H, bias=False)

    def forward(self, x_BSH: Tensor, past: Past | None = None) -> Tensor:
        past, S, D = past or Past(), x_BSH.shape[1], self.config.attention_head_size
        projections, split = (self.q_proj, self.k_proj, self.v_proj), "B S (N D) -> B N S D"
        q_BNSD, k_BGSD, v_BGSD = (rearrange(linear(x_BSH), split, D=D) for linear in projections)
        k_BGTD, v_BGTD = past.keys(
            rotate(k_BGSD, past.first, self.config.rope), v_BGSD
        )  # T: up to the last of x
        q_BNSD, T = rotate(q_BNSD, past.first, self.config.rope), k_BGTD.shape[2]
        if (
            S == 1 and past.document_BS is None
        ):  # one token sees all: the heads of a group are queries of one head
            q_BGJD = rearrange(q_BNSD, "B (G J) 1 D -> B G J D", G=k_BGTD.shape[1])
            y_BNSD = F.scaled_dot_product_attention(q_BGJD, k_BGTD, v_BGTD).flatten(1, 2)[
                :, :, None
            ]
        else:
            mask = torch.ones(S, T, dtype=torch.bool, device=x_BSH.device).tril(T - S)
            if (document := past.document_BS) is not None:
                mask = (mask & (document[:, T - S : T, None] == document[:, None, :T]))[:, None]
            elif T == S:
                mask = None  # plainly causal, for which the kernels need no mask
            causal = dict(attn_mask=mask, is_causal=mask is None)
            y_BNSD = F.scaled_dot_product_attention(
                q_BNSD, k_BGTD, v_BGTD, enable_gqa=True, **causal
            )
        return self.o_proj(rearrange(y_BNSD, "B N S D -> B S (N D)"))


class SquaredReLUMLP(nn.Module):
    """The feed-forward layer relu(x W1)² W2, x_BSH to (B, S, H)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, past: Past | None = None) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_BSH)).square())


KINDS = {"M": Mamba2Mixer, "*": Attention, "-": SquaredReLUMLP}


class HybridLM(nn.Module):
    """The single-device model: tokens_BS (int64) to logits (B, S, V).

    starts_BS: bool, True where a document begins, for documents packed into one sequence: nothing passes from one to
    the next, in no kind of layer. cache: a `Cache`, for decoding; its sequence goes on with these tokens. last: logits
    of the last token alone, (B, 1, V).

    Raises: ValueError for documents and a cache. Source: the study; Nemotron-H.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, H, eps = config, config.hidden_size, config.norm_eps
        self.embedding = nn.Embedding(config.vocab_size, H)
        layers = [dict(norm=RMSNorm(H, eps), mixer=KINDS[kind](config)) for kind in config.pattern]
        self.layers, self.final_norm = nn.ModuleList(map(nn.ModuleDict, layers)), RMSNorm(H, eps)
        self.head = nn.Linear(H, config.vocab_size, bias=False)
        if (
            not self.head.weight.is_meta
        ):  # on "meta" are shapes without memory: `parameter_shapes` asks for those
            self.load_state_dict(dict(initial_weights(config)))

    def mine(self, x_BS: Tensor) -> Tensor:
        """Of what is given for a whole sequence, the part of the tokens that this model works on: here all."""
        return x_BS

    def past(self, tokens_BS: Tensor, starts_BS: Tensor | None) -> Past:
        """Where these tokens stand."""
        return Past(0, None if starts_BS is None else starts_BS.cumsum(1))

    def run(self, layer: nn.ModuleDict, x_BSH: Tensor, past: Past) -> Tensor:
        """One layer of any kind, with its norm and its residual connection."""
        return x_BSH + layer["mixer"](layer["norm"](x_BSH), past)

    def forward(
        self,
        tokens_BS: Tensor,
        starts_BS: Tensor | None = None,
        cache: Cache | None = None,
        last=False,
    ):
        if cache and starts_BS is not None:
            raise ValueError("starts_BS and a cache: decode one document a sequence")
        pasts = (
            cache.admit(tokens_BS)
            if cache
            else [self.past(tokens_BS, starts_BS)] * len(self.layers)
        )
        x_BSH = self.embedding(self.mine(tokens_BS))
        for layer, past in zip(self.layers, pasts):
            x_BSH = self.run(layer, x_BSH, past)
        return self.head(self.final_norm(x_BSH[:, -1:] if last else x_BSH))

    def loss(
        self, tokens_BS: Tensor, targets_BS: Tensor, starts_BS: Tensor | None = None
    ) -> Tensor:
        """Cross entropy of each token in nats, (B, S), at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(at_least_fp32(self(tokens_BS, starts_BS)), "B S V -> B V S")
        return F.cross_entropy(
            logits_BVS, self.mine(targets_BS), ignore_index=-100, reduction="none"
        )

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for sequences of up to `capacity` tokens."""
        return Cache(len(self.layers), capacity)


# ── 1.5 First weights ───────────────────────────────────────────────────────────────────────────────────
#
# Where a Mamba layer starts decides what it can learn: over the heads, exp(dt·A) must reach from "forget at once" to
# "keep for a thousand tokens". So −A is drawn between 1 and 16, dt between 0.001 and 0.1 on a logarithmic scale, and
# dt_bias is what softplus makes that dt of. What writes onto the residual stream starts smaller by 1/√L, so that the
# sum over L layers starts no larger than one.


def initial_value(name: str, shape: torch.Size, config: HybridConfig, generator=None) -> Tensor:
    """A parameter's first value by its name, of that shape, fp32, on the CPU.

    Source: Mamba-2.
    """
    # On the CPU, because a GPU's generator gives other numbers; whole, so that tp does not change them.
    kind, drawn = name.split(".")[-1], dict(size=shape, generator=generator, device="cpu")
    if kind == "A_log":
        return torch.lerp(*torch.tensor(config.A_init), torch.rand(**drawn)).log()
    if kind == "dt_bias":
        dt_N = (
            torch.lerp(*torch.tensor(config.dt_init).log(), torch.rand(**drawn))
            .exp()
            .clamp(min=1e-4)
        )
        return dt_N + torch.log(-torch.expm1(-dt_N))
    if kind in ("conv_weight", "conv_bias"):
        return (2 * torch.rand(**drawn) - 1) / math.sqrt(config.conv_kernel)
    if len(shape) < 2:  # D, and the norms' weights
        return torch.ones(shape, device="cpu")
    writes = name.split(".")[-2] in ("out_proj", "o_proj", "down_proj")
    std = config.init_std / math.sqrt(len(config.pattern)) if writes else config.init_std
    return torch.randn(**drawn) * std


def parameter_shapes(config: HybridConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the plain model, without allocating any."""
    with torch.device("meta"):
        return {name: p.shape for name, p in HybridLM(config).named_parameters()}


def initial_weights(config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """The initial weights, a function of `config` alone: each name and its unsharded tensor, in the model's shape."""
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in parameter_shapes(config).items():
        yield name, initial_value(name, shape, config, generator)


# ── 1.6 Decoding ────────────────────────────────────────────────────────────────────────────────────────
#
# To write one more token the model needs of all earlier ones: from a Mamba layer the state and the convolution's last
# inputs, as large after a million tokens as after one; from an attention layer every key and value; from a
# feed-forward layer nothing. A cache is a box for each layer, empty at first, into which the layer puts that. The
# prompt goes through the chunked form and fills the boxes ("prefill"); each further token is one step of the
# recurrence.


@dataclass
class CachedPast(Past):
    """The past of one layer out of `kept`, its box in a cache; what is asked with goes into it.

    inputs: (B, K, C), those before u_BSC. scan, keys: shapes as `Past`'s; D is the (N,) of `ssd`. capacity: tokens that
    keys and values get room for. Source: ours.
    """

    kept: dict[str, Tensor] | None = None
    capacity: int = 0

    def inputs(self, u_BSC: Tensor, K: int) -> Tensor:
        before_BKC = self.kept.get("conv", u_BSC[:, :0])
        self.kept["conv"] = torch.cat([before_BKC, u_BSC[:, -K:].detach()], 1)[:, -K:]
        return before_BKC

    def scan(self, x, dt, A, B, C, chunk: int, D: Tensor) -> Tensor:
        state, one = self.kept.get("state"), x.shape[1] == 1
        y, state = (
            ssd_recurrent(x, dt, A, B, C, D, state) if one else ssd(x, dt, A, B, C, chunk, D, state)
        )
        self.kept["state"] = state.detach()
        return y

    def keys(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        kv_2BGSD, last = torch.stack([k_BGSD, v_BGSD]), self.first + k_BGSD.shape[2]
        if "keys" not in self.kept:
            self.kept["keys"] = kv_2BGSD.new_zeros(
                *kv_2BGSD.shape[:3], self.capacity, k_BGSD.shape[3]
            )
        self.kept["keys"][..., self.first : last, :] = kv_2BGSD
        return self.kept["keys"][..., :last, :].unbind()


class Cache:
    """What decoding needs of the tokens so far, `tokens` of them: in `layers` a dict for each layer, which fills it.

    capacity: tokens that the keys and values get room for. States are at least fp32: they add up small amounts over
    thousands of steps. The convolution's are K inputs, as the published code keeps them; K − 1 would do.
    """

    def __init__(self, layers: int, capacity: int):
        self.layers, self.tokens, self.capacity = [{} for _ in range(layers)], 0, capacity

    def admit(self, tokens_BS: Tensor) -> list[CachedPast]:
        """Counts these tokens in; what each layer sees of those before. Raises: ValueError where they do not fit."""
        first, last = self.tokens, self.tokens + tokens_BS.shape[1]
        if last > self.capacity:
            raise ValueError(f"{last} tokens, but the cache has room for {self.capacity}")
        self.tokens = last
        return [CachedPast(first, None, kept, self.capacity) for kept in self.layers]


# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────
#
# The model is divided in two directions at once. tp ranks share the weights, by heads; cp ranks share the sequence, by
# tokens. With tp 2 and cp 2:
#
#                        tp rank 0     tp rank 1
#     tokens 0 … 4999     rank 0        rank 1        ← a tp group: the same tokens, other heads
#     tokens 5000 …       rank 2        rank 3
#                           ↑ a cp group: the same weights, other tokens
#
# The second is what chapter 4 did not do: there only what tensor parallelism leaves whole (norms, residual sums) was
# divided over the tokens, and attention saw all of them. Megatron-LM calls that one sequence parallelism and this one
# context parallelism (--cp); the Mamba papers call this one sequence parallelism.
#
# Rank, group and collective are explained in chapter 1, at the beginning of its part 2; so are these functions.


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


# The doors, explained in chapter 2, section 2.1.
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
        # apply(), not a plain call: backward must be differentiable too.
        return _Conjugate.apply(grad, *ctx.reversed), None, None, None


def _identity(x: Tensor, group: Group) -> Tensor:
    return x


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
    """All-gathers the last dimension, (..., f) to (..., F); the gradient is sharded again.

    Right only where every rank computes the same from the result: its gradient is then replicated,
    and a sum over the ranks would count it tp times.
    Args: x (..., f), of one shape on every rank. Source: ours; Megatron-LM's code has it.
    """
    return _Conjugate.apply(x, group, _all_gather, _take_shard) if group_size(group) > 1 else x


# endregion copy 0abe4e

# A rank's place among tp · cp. neighbours: for each number that divides tp, the group of that many ranks in a row, this
# one among them (section 2.2). Grid() is for one rank by itself: where there are groups, None is all ranks.
Grid = namedtuple(
    "Grid",
    "tp cp tp_rank cp_rank tp_group cp_group neighbours",
    defaults=(1, 1, 0, 0, None, None, {}),
)


# ── 2.2 A rank's layer is a layer of a smaller model ────────────────────────────────────────────────────
#
# All kinds of layers have the shape of chapter 2: a projection in, something that knows only its own heads or
# features, a projection out. So divide the heads and the features, and what a rank computes is the *plain* layer with
# smaller numbers in its configuration, between the two doors:
#
#     x_BSH ── norm ── copy_to_tp ── plain layer of n heads ── reduce_from_tp ── + x        1 + 1 all-reduces
#
# No line of the Mamba layer is about ranks: its convolution works on channels, its recurrence on heads, its norm on
# groups. Only the cut is not a plain one: the rows of in_proj are [z, x, B, C, dt], and the first half of them is z and
# not the first half of the heads. Each of the five is cut by itself (part 3).
#
# That is all while the groups divide over the ranks. With fewer groups than ranks, neighbours need the same B and C:
# each has a copy of their weights. (Megatron-LM refuses this.) Two things follow.
#
# · A group's channels lie on several ranks, and the norm wants one mean square for all: one number a token is summed
#   over these neighbours. Its gradient comes from every rank's channels, so it is summed as well. The door out and the
#   door in, one behind the other, are exactly that.
# · Each copy gets the gradient of its own heads, a summand. They are summed at the *weights*, once a step (part 4). Not
#   at the activations: x_BSH would then get the whole gradient from each copy, and its door adds up copies. No copy
#   would drift, no loss would tell; tests/test_05_mamba_hybrid.py::test_copies_summed_at_the_activations does.


def held(units: int, rank: int, tp: int) -> range:
    """Which of so many heads, groups or features rank `rank` holds: its share, or the one that its share lies in.

    Source: ours.
    """
    return range(rank * units // tp, -(-(rank + 1) * units // tp))


def local_config(config: HybridConfig, tp: int) -> HybridConfig:
    """The sizes of what one of `tp` ranks holds.

    Raises: ValueError where heads or features do not divide, or groups neither divide nor repeat.
    Source: Megatron-LM's layer; copies of groups: ours.
    """
    names = {
        "M": "mamba_heads mamba_groups",
        "*": "attention_heads attention_groups",
        "-": "ffn_hidden_size",
    }
    sizes = {
        name: getattr(config, name) for kind in set(config.pattern) for name in names[kind].split()
    }
    for name, size in sizes.items():
        if size % tp and not (name.endswith("groups") and tp % size == 0):
            raise ValueError(
                f"{name}={size} does not divide over tp={tp} ranks: choose a multiple of {tp}"
            )
    return replace(config, **{name: len(held(size, 0, tp)) for name, size in sizes.items()})


class ParallelRMSNorm(RMSNorm):
    """`RMSNorm` over channels that are divided over `grid`'s tp ranks, of `groups` groups over all ranks.

    mean_square: of x_BSgC, the groups that this rank has a part of, to (B, S, g, 1). Source: ours.
    """

    def __init__(self, size: int, eps: float, groups: int, grid: Grid):
        super().__init__(size, eps, len(held(groups, 0, grid.tp)))
        self.holders = max(
            1, grid.tp // groups
        )  # ranks that a group's channels lie on, equal shares of them
        self.neighbours = grid.neighbours.get(self.holders)

    def mean_square(self, x_BSgC: Tensor) -> Tensor:
        partial_BSg1 = (
            super().mean_square(x_BSgC) / self.holders
        )  # the mean of the group is the mean of their means
        if self.holders == 1:
            return partial_BSg1
        return copy_to_tp(reduce_from_tp(partial_BSg1, self.neighbours), self.neighbours)


# ── 2.3 What the ranks before have ──────────────────────────────────────────────────────────────────────
#
# Now the tokens. Whatever a layer does with tokens that other ranks hold, it looks back: a convolution at the last K −
# 1 inputs, a recurrence at a state, attention at all keys. So one function is enough, and the layers differ in what
# they give it:
#
#     forward     every rank sends its x to all;           what came from ranks behind it, and its own, counts as zero
#     backward    the gradients travel the other way, and add up: all ranks behind me have used my x
#
# The first is an all-gather, the second a reduce-scatter, with the same half put to zero in both. (Half of it is sent
# for nothing. Sends to each later rank would save that, and would be as many messages as there are ranks.)
#
# Why zeros, and not just a shorter list? On rank 0 a shorter list would be empty, and nothing would depend on it: then
# autograd has nothing to do there, rank 0 never comes to the reduce-scatter, and all others wait for it. A collective
# in backward is safe only where every rank's graph leads to it.


def _from_earlier(x: Tensor, group) -> Tensor:
    x_of_ranks = torch.stack(_all_gather(x, group).chunk(group_size(group), -1))
    x_of_ranks[group_rank(group) :] = 0
    return x_of_ranks


def _to_earlier(partial_of_ranks: Tensor, group) -> Tensor:
    rank, partial = group_rank(group), list(partial_of_ranks.contiguous())
    partial[rank:] = [torch.zeros_like(x) for x in partial[rank:]]
    dist.reduce_scatter(mine := torch.empty_like(partial[0]), partial, group=group)
    return mine


def from_earlier_ranks(x: Tensor, group: Group = None) -> Tensor:
    """x of the ranks before this one, (ranks, *x.shape), with zeros in the places of this rank and of those behind it.

    x: of one shape on all ranks. Its gradient is the sum of what the ranks behind it find. Every rank must call it, and
    go back through it where one does. Source: ours.
    """
    return (
        _Conjugate.apply(x, group, _from_earlier, _to_earlier)
        if group_size(group) > 1
        else x.new_zeros(1, *x.shape)
    )


# The convolution first: each rank but the first needs the last K − 1 inputs of the one before, a *halo*. Two neighbours
# could send it to each other; it is small beside the state, which travels the same way.


def halo(u_BsC: Tensor, width: int, group: Group = None) -> Tensor:
    """The last `width` tokens of the rank before, (B, width, C); zeros on the first rank. Every rank must call it.

    Raises: ValueError where this rank has fewer tokens (the others would wait for it: look at all lengths before).
    Source: ours.
    """
    if u_BsC.shape[1] < width:
        raise ValueError(
            f"{u_BsC.shape[1]} tokens on this rank; the next one needs the last {width} of them"
        )
    last_BKC = u_BsC[:, u_BsC.shape[1] - width :]
    return from_earlier_ranks(last_BKC, group)[
        group_rank(group) - 1
    ]  # rank 0 takes [-1]: the last rank's place, zeros


# ── 2.4 The recurrence over ranks: pass the state on ────────────────────────────────────────────────────
#
# What does a stretch of tokens do to the state that enters it? One token makes exp(a)·state + X ⊗ B of it: a number
# times the state, plus a matrix. Two tokens do so twice,
#
#     a₂·(a₁·state + b₁) + b₂   =   a₂a₁·state + (a₂b₁ + b₂)           a for exp(a), b for X ⊗ B
#
# which is a number times the state, plus a matrix, again. So a million tokens are summed up by one number and one
# matrix:
#
#     state ← decay · state + own            decay_BN: exp of all its a;  own_BNDZ: the state at its end, from zero
#
# Each rank finds both alone, by a scan from zero. Then all ranks hear of all, N·D·(Z + 1) numbers a sequence however
# many tokens there are, and each composes those before it: an *exclusive scan* over ranks. What the state that enters
# adds to the outputs is then added at once, for all tokens:
#
#       rank 0                  rank 1                  rank 2
#       scan from zero          scan from zero          scan from zero         alone
#       decay, own ────────────────────────────────────────────── to all
#       in = 0                  in = own₀               in = decay₁·own₀ + own₁
#       y += exp(a_0+…+a_i) · C_i·in                                            alone
#
# The decay is the one of the whole stretch and not of its last chunk: a mistake that two ranks cannot show, for nothing
# enters rank 0 that could decay there. And nothing need be said about backward: autograd goes through the composition.


def ssd_sequence_parallel(
    x, dt, A, B, C, chunk, D=None, group=None, starts=None
) -> tuple[Tensor, Tensor]:
    """`ssd` over a sequence whose tokens are divided over `group`, rank after rank, in any lengths but 0.

    Arguments and results are `ssd`'s, of this rank's tokens: y (B, s, N, D), and the state (B, N, D, Z) behind its last
    token, so the last rank has the whole sequence's. Every rank must call it, and differentiate it if one does.
    Messages, whatever the length: N·D·(Z + 1) numbers a sequence and rank, forward and backward.
    Source: derived above; the operator is the one of Mamba's parallel scan.
    """
    if group_size(group) == 1:
        return ssd(x, dt, A, B, C, chunk, D, None, starts)
    # In fp32, so that y is rounded once, when it is complete.
    y_BsND, own_BNDZ = ssd(at_least_fp32(x), dt, A, B, C, chunk, D, None, starts)
    kept_BsN = _kept(log_decay(dt, A, starts))
    decay_BND1 = kept_BsN[:, -1, :, None, None].expand(
        *own_BNDZ.shape[:3], 1
    )  # travels as one column more
    messages = from_earlier_ranks(torch.cat([own_BNDZ, decay_BND1], -1), group)
    in_BNDZ = messages[0, ..., :-1]  # on rank 0 these are zeros; rank 1 is done
    for message in messages[1 : group_rank(group)]:
        in_BNDZ = message[..., -1:] * in_BNDZ + message[..., :-1]
    with torch.autocast(x.device.type, enabled=False):
        in_BGJDZ = rearrange(in_BNDZ, "B (G J) D Z -> B G J D Z", G=B.shape[2])
        read_BsND = einsum(at_least_fp32(C), in_BGJDZ, "B s G Z, B G J D Z -> B s G J D").flatten(
            2, 3
        )
    return (y_BsND + kept_BsN[..., None] * read_BsND).to(x.dtype), own_BNDZ + decay_BND1 * in_BNDZ


# ── 2.5 Attention over ranks: gather keys and values ────────────────────────────────────────────────────
#
# Attention has no small summary of the past: each query needs every earlier key. So keys and values are what the ranks
# before have to send, two tensors of a few groups; and backward brings each token what all ranks found for its key.
# Ranks may hold unequal numbers of tokens, and the collectives want equal sizes: so each pads to the longest, and what
# pads is cut off again before anybody sees it. This message does grow with the sequence: it is a few layers' price for
# exact recall. (Later ranks have more to attend to. Balancing that means to give each rank an early and a late piece,
# and to undo it around each recurrence; ring attention would hide the messages behind the products.)
#
# Megatron-LM takes another way for Mamba as well: before the convolution an all-to-all exchanges (tokens of mine, all
# heads) for (all tokens, heads of mine), the plain layer runs on whole sequences, and another all-to-all exchanges
# back. It is simple, and needs heads that divide over tp·cp and messages as large as the activations. Passing the
# state needs neither: 1M numbers a sequence in a layer of 128 heads of 64 × 128, as much as 57 tokens of that layer's
# in_proj.


@dataclass
class RankPast(Past):
    """The past of this rank's tokens, which is on the ranks before it; lengths: how many tokens each has.

    Arguments and shapes as `Past`'s, with s tokens in place of S; D is the (N,) of `ssd`. Source: ours.
    """

    lengths: list[int] | None = None
    group: Group = None

    def inputs(self, u_BsC: Tensor, K: int) -> Tensor:
        return halo(u_BsC, K - 1, self.group)

    def scan(self, x, dt, A, B, C, chunk: int, D: Tensor) -> Tensor:
        return ssd_sequence_parallel(x, dt, A, B, C, chunk, D, self.group, self.starts(x.shape[1]))[
            0
        ]

    def keys(self, k_BGsD: Tensor, v_BGsD: Tensor) -> tuple[Tensor, Tensor]:
        mine = torch.cat([k_BGsD, v_BGsD], -1)  # one message for both
        padded = F.pad(mine, (0, 0, 0, max(self.lengths) - mine.shape[2]))
        of_ranks = zip(from_earlier_ranks(padded, self.group), self.lengths)
        before = torch.cat([x[:, :, :length] for x, length in of_ranks], 2)[:, :, : self.first]
        return torch.cat([before, mine], 2).chunk(2, -1)


# ── 2.6 The model ───────────────────────────────────────────────────────────────────────────────────────
#
# Every rank is given the whole sequence of token numbers, which is small, and works on its own. The embedding and the
# head are whole on each rank, and so are the logits of its tokens: to divide them by words is chapter 2's sections 2.4
# and 2.5, and nothing about it is new here.


class ParallelHybridLM(HybridLM):
    """`HybridLM` divided over a grid: tokens_BS, whole, to the logits (B, s, V) of this rank's tokens.

    Its weights are those of HybridLM(config), whatever the grid, under the same names; one whole tensor at a time is in
    memory. `loss` is of this rank's tokens as well, (B, s). Decoding works where cp is 1. grid: of `make_grid`;
    Grid() is for a process by itself.

    Raises: ValueError where sizes do not divide, where a rank would get fewer than K − 1 tokens, or for a cache where
    cp > 1. Source: Megatron-LM's layers under tp; under cp: ours.
    """

    def __init__(self, config: HybridConfig, grid: Grid = Grid()):  # noqa: B008
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(local_config(config, grid.tp))
            for mixer in (
                layer["mixer"] for layer, kind in zip(self.layers, config.pattern) if kind == "M"
            ):
                mixer.norm = ParallelRMSNorm(
                    len(mixer.norm.weight), config.norm_eps, config.mamba_groups, grid
                )
        self.config, self.grid = config, grid
        shares = {
            n: shard_tensor(n, whole, config, grid.tp_rank, grid.tp)
            for n, whole in initial_weights(config)
        }
        self.load_state_dict(shares, assign=True)  # puts them in the place of the shapes

    def run(self, layer: nn.ModuleDict, x_BsH: Tensor, past: Past) -> Tensor:
        partial_y_BsH = layer["mixer"](copy_to_tp(layer["norm"](x_BsH), self.grid.tp_group), past)
        return x_BsH + reduce_from_tp(partial_y_BsH, self.grid.tp_group)

    def mine(self, x_BS: Tensor) -> Tensor:
        return x_BS.tensor_split(self.grid.cp, 1)[
            self.grid.cp_rank
        ]  # the first get one more where they do not divide

    def past(self, tokens_BS: Tensor, starts_BS: Tensor | None) -> Past:
        cp, K, past = self.grid.cp, self.config.conv_kernel, super().past(tokens_BS, starts_BS)
        if cp == 1:
            return past
        lengths = [x.shape[1] for x in tokens_BS.tensor_split(cp, 1)]
        if lengths[-1] < K - 1:
            text = f"{tokens_BS.shape[1]} tokens over cp={cp} leave {lengths[-1]} to the last rank: use fewer"
            raise ValueError(f"{text}, for a convolution of {K} taps needs {K - 1} on each")
        return RankPast(
            sum(lengths[: self.grid.cp_rank]), past.document_BS, lengths, self.grid.cp_group
        )

    def new_cache(self, capacity: int) -> Cache:
        if self.grid.cp > 1:
            raise ValueError(
                f"cp={self.grid.cp}: a cache holds the past of one rank; decode with tp alone"
            )
        return super().new_cache(capacity)


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
#
# One table says how each parameter is cut: into which components its rows fall, and each component into how many
# units, of how many rows. A rank gets its units of each component. A cut of in_proj into equal halves would run just as
# well, with z where x should be. What every rank holds whole (embedding, head, the norms in front of layers) is one
# unit, of which each rank has a copy.
#
#     in_proj.weight of 4 heads, 2 groups:   z z z z │ x x x x │ B B │ C C │ dt×4
#     rank 0 of 2                            z z     │ x x     │ B   │ C   │ dt×2
#     rank 0 of 4                            z       │ x       │ B   │ C   │ dt         ranks 0 and 1: the same B and C

Piece = namedtuple(
    "Piece", "first size copies"
)  # first row in the whole; rows; ranks that hold them


def pieces_of(name: str, config: HybridConfig, rank: int, tp: int) -> tuple[int, list[Piece]]:
    """The dimension along which parameter `name` is cut, and rank `rank`'s pieces of it."""
    N, D, Z = config.mamba_heads, config.attention_head_size, config.state_size
    inner, BC, heads = (
        (N, config.mamba_head_size),
        (config.mamba_groups, Z),
        (N, 1),
    )  # units, and rows of each
    queries, keys, features = (
        (config.attention_heads, D),
        (config.attention_groups, D),
        (config.ffn_hidden_size, 1),
    )
    rows = {
        "in_proj.weight": [inner, inner, BC, BC, heads], "conv_weight": [inner, BC, BC], "conv_bias": [inner, BC, BC],
        "dt_bias": [heads], "A_log": [heads], "D": [heads], "norm.weight": [inner], "up_proj.weight": [features],
        "q_proj.weight": [queries], "k_proj.weight": [keys], "v_proj.weight": [keys],
        "embedding.weight": [(1, config.vocab_size)], "head.weight": [(1, config.vocab_size)],
    }  # fmt: skip
    columns = {
        "out_proj.weight": [inner],
        "o_proj.weight": [queries],
        "down_proj.weight": [features],
    }
    kind, first, pieces = name.split("mixer.")[-1], 0, []
    for units, width in (rows | columns).get(
        kind, [(1, config.hidden_size)]
    ):  # the norms in front of layers, the last
        mine = held(units, rank, tp)
        pieces.append(Piece(first + mine.start * width, len(mine) * width, max(1, tp // units)))
        first += units * width
    return int(kind in columns), pieces


def shard_tensor(name: str, whole: Tensor, config: HybridConfig, rank: int, tp: int) -> Tensor:
    """Tensor-parallel rank `rank`'s share of the plain model's parameter `name`, a copy.

    whole: the plain model's, of any dtype. Returns: the shape of that rank's parameter.
    """
    dim, pieces = pieces_of(name, config, rank, tp)
    return torch.cat([whole.narrow(dim, p.first, p.size) for p in pieces], dim)


def shard_state_dict(
    full: dict[str, Tensor], config: HybridConfig, rank: int, tp: int
) -> dict[str, Tensor]:
    """The plain model's state dict to the one of tensor-parallel rank `rank` of `tp`.

    full: every parameter by its name, of the shapes of `parameter_shapes`. Returns: copies, of this rank's shapes.
    Raises: ValueError that names what is missing, unknown or of another shape, or that does not divide.
    """
    found, expected = {name: whole.shape for name, whole in full.items()}, parameter_shapes(config)
    local_config(config, tp)  # for what it raises
    if wrong := sorted(name for name in found | expected if found.get(name) != expected.get(name)):
        raise ValueError(
            f"missing, unknown, or of another shape than this configuration's: {wrong}"
        )
    return {name: shard_tensor(name, whole, config, rank, tp) for name, whole in full.items()}


def merge_state_dicts(shards: list[dict[str, Tensor]], config: HybridConfig) -> dict[str, Tensor]:
    """All tp ranks' state dicts, in the order of ranks, to the plain model's: `shard_state_dict` undone, to the bit.

    shards: of each rank, by name, the shapes of `shard_state_dict`. Works for gradients as well. Returns: the shapes of
    `parameter_shapes`. Raises: ValueError where ranks hold different values of what should be the same on each, such as
    the copies of a group: they have drifted apart.
    """
    full, tp = {}, len(shards)
    for name, shape in parameter_shapes(config).items():
        full[name] = shards[0][name].new_empty(shape)
        for rank, shard in enumerate(shards):
            dim, pieces = pieces_of(name, config, rank, tp)
            for piece, mine in zip(
                pieces, shard[name].split([piece.size for piece in pieces], dim)
            ):
                place = full[name].narrow(dim, piece.first, piece.size)
                if rank % piece.copies and not torch.equal(
                    place, mine
                ):  # the first who holds it has written it
                    raise ValueError(
                        f"{name} should be the same on all ranks that hold it, but rank {rank}'s is not"
                    )
                place.copy_(mine)
    return full


# ── 3.1 Published weights ───────────────────────────────────────────────────────────────────────────────
#
# A published Nemotron-H is a folder: config.json, and one safetensors file or several with an index. Its tensors are
# those of the plain model under other names; the convolution's has one dimension more. Each rank reads what is its
# own, a tensor at a time.
#
# One thing to know when you compare with the `transformers` library: it clamps dt at 0.001 from below ("time_step_min",
# a setting for the first weights), in the forward pass over a prompt but not in one-token decoding. The model as
# published, Megatron-LM's, does not clamp, and nor do we.


def load_nemotron_h(
    folder: Path | str, rank: int = 0, tp: int = 1
) -> tuple[HybridConfig, dict[str, Tensor]]:
    """Configuration and state dict of a Nemotron-H folder: the plain model's, or tensor-parallel rank `rank`'s of `tp`.

    Raises: FileNotFoundError; ValueError that names a missing tensor, a shape, or a setting that this model has not.
    """
    from safetensors import safe_open

    folder = Path(folder)
    theirs = json.loads((folder / "config.json").read_text("utf-8"))
    ours = dict(model_type="nemotron_h", mamba_hidden_act="silu", mlp_hidden_act="relu2", use_conv_bias=True,
                use_bias=False, mlp_bias=False, attention_bias=False, tie_word_embeddings=False)  # fmt: skip
    if other := {
        key: theirs[key] for key, value in ours.items() if theirs.get(key, value) != value
    }:
        raise ValueError(f"{folder}/config.json has {other}, which this model cannot be")
    # Two ages of the format have two names for each kind of layer, and for the size of a head.
    letters = dict(mamba="M", linear_attention="M", attention="*", full_attention="*", mlp="-")
    kinds = theirs.get("layers_block_type") or theirs.get("layer_types") or []
    names = dict(vocab_size="vocab_size", hidden_size="hidden_size", ffn_hidden_size="intermediate_size",
                 mamba_heads="mamba_num_heads", mamba_head_size="mamba_head_dim", mamba_groups="n_groups",
                 state_size="ssm_state_size", conv_kernel="conv_kernel", chunk="chunk_size",
                 attention_heads="num_attention_heads", attention_groups="num_key_value_heads",
                 attention_head_size="head_dim" if theirs.get("head_dim") else "attention_head_dim",
                 norm_eps="layer_norm_epsilon")  # fmt: skip
    pattern = theirs.get("hybrid_override_pattern") or "".join(
        letters.get(kind, "?") for kind in kinds
    )
    config = HybridConfig(
        pattern=pattern, **{name: theirs[published] for name, published in names.items()}
    )
    local_config(config, tp)  # for what it raises
    index = folder / "model.safetensors.index.json"
    files = (
        json.loads(index.read_text("utf-8"))["weight_map"].values()
        if index.exists()
        else ["model.safetensors"]
    )
    opened = [safe_open(folder / file, "pt") for file in sorted(set(files))]
    found = {
        n.removeprefix("backbone.").removeprefix("model."): (file, n)
        for file in opened
        for n in file.keys()
    }
    full, renamed = (
        {},
        {
            "conv_": "conv1d.",
            "head.": "lm_head.",
            "final_norm": "norm_f",
            "embedding": "embeddings",
        },
    )
    for name, shape in parameter_shapes(config).items():
        published = name
        for here, there in renamed.items():
            published = published.replace(here, there)
        if published not in found:
            raise ValueError(f"{folder} lacks the tensor {published}")
        x = found[published][0].get_tensor(found[published][1])
        x = x.squeeze(1) if name.endswith("conv_weight") else x
        if x.shape != shape:
            raise ValueError(
                f"{folder}: {published} has shape {tuple(x.shape)}; config.json implies {tuple(shape)}"
            )
        full[name] = shard_tensor(name, x, config, rank, tp)
    return config, full


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
#
# Three kinds of gradients meet at the end of a backward pass, and each wants something else:
#
#     all parameters                 every cp rank has seen its own tokens alone: summed over cp, one message
#     copies of a group's weights    each neighbour has its own heads' part: summed over those with a copy, one message
#     everything else                complete, thanks to the doors
#
# Then the norm before clipping, in which the shares' squares are summed over tp, and of p copies each counts 1/p. Left
# out, the second sum trains B and C with a part of their gradient, the copies drift apart, and the loss falls all the
# same.


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not A_log, dt_bias and D, whose zero is no rest, nor norms' weights."""
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)
    )
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def _sum_over(parts: list[Tensor], group: Group) -> None:
    """Sums each tensor over the group, in place, all in one message."""
    if parts and group_size(group) > 1:
        flat = _all_reduce(torch.cat([part.flatten() for part in parts]), group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(total.view_as(part))


def gradient_pieces(model: HybridLM) -> list[tuple[str, Tensor, int]]:
    """The gradients cut as `pieces_of` says: parameter, its rows, and the number of tp ranks that hold these rows.

    Returns: the rows as views of the gradients, so that what is written into them is written there. Source: ours.
    """
    grid, found = getattr(model, "grid", Grid()), []
    for name, p in model.named_parameters():
        if p.grad is not None:  # frozen ones have none
            dim, pieces = pieces_of(name, model.config, grid.tp_rank, grid.tp)
            parts = p.grad.split([piece.size for piece in pieces], dim)
            found += [(name, part, piece.copies) for part, piece in zip(parts, pieces)]
    return found


def reduce_gradients(model: ParallelHybridLM) -> None:
    """The two sums above; every rank must call it, once after all backward passes of a step, before clipping."""
    found = gradient_pieces(model)
    _sum_over([part for _, part, _ in found], model.grid.cp_group)
    for size, group in model.grid.neighbours.items():
        _sum_over(
            [part for name, part, copies in found if copies == size and "mixer" in name], group
        )


def grad_norm(model: HybridLM) -> Tensor:
    """The norm of the whole gradient before clipping, a scalar, the same on every rank."""
    squares = [
        at_least_fp32(part).square().sum() / copies for _, part, copies in gradient_pieces(model)
    ]
    total = torch.stack(squares).sum()
    grid = getattr(model, "grid", Grid())
    return (_all_reduce(total, grid.tp_group) if grid.tp > 1 else total).sqrt()


def train_step(
    model, optimizer, tokens_BS, targets_BS, starts_BS=None, max_norm: float = 1.0, autocast=None
):
    """One optimiser step of the plain or the parallel model; every rank of its grid must call it with the same tokens.

    Args: model: `HybridLM` or `ParallelHybridLM`. tokens_BS, targets_BS: int64, whole; −100 marks a target that does
    not count. starts_BS: bool, True where a document begins. autocast: the dtype of products, None: the parameters'.
    Returns: the mean loss per token and the gradient's norm before clipping, the same on every rank.
    """
    # The mean is over all tokens that count, of all ranks: each rank's sum over the whole count, and gradients summed.
    optimizer.zero_grad()
    with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
        loss = model.loss(tokens_BS, targets_BS, starts_BS).sum() / (
            targets_BS != -100
        ).sum().clamp(min=1)
    loss.backward()
    if isinstance(model, ParallelHybridLM):
        reduce_gradients(model)
        loss = _all_reduce(loss.detach().clone(), model.grid.cp_group)
    norm = grad_norm(model)
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    optimizer.step()
    return loss.detach(), norm


def train(
    model: HybridLM, batches: Iterable[tuple[Tensor, Tensor]], lr: Callable[[int], float], **options
):
    """A step for each batch of tokens and targets, at the learning rate of its number; yields `train_step`'s results.

    batches: pairs of tokens_BS and targets_BS. lr: from the step's number, 0 first.
    """
    optimizer = make_optimizer(model)
    for step, (tokens_BS, targets_BS) in enumerate(batches):
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr(step)
        yield train_step(model, optimizer, tokens_BS, targets_BS, **options)


# ── 5 The papers' arithmetic ────────────────────────────────────────────────────────────────────────────

# ── 5.1 Which layer is which ────────────────────────────────────────────────────────────────────────────
#
# The study gives two shares, of attention and of feed-forward layers, and spreads them: attention so that the layers
# between fall into equal sections, beginning and ending with another kind; then feed-forward layers over what is left.
# Its rule, for a share of n layers: with a section's length as credit, walk along; place one when less than half a
# layer of credit is left, and take a section's length on; otherwise pay one. Two attention layers among ten leave three
# sections of 8/3:
#
#     credit   2.7  1.7  0.7  −0.3  2.3  1.3  0.3  3.0  2.0  1.0
#     layer     M    M    M    *     M    M    *    M    M    M


def allocate_layers(n: int, attention_ratio: float, mlp_ratio: float) -> str:
    """The pattern of n layers with these shares of attention and feed-forward layers, spread evenly.

    Raises: ValueError where the shares do not fit. Source: the study, arXiv 2406.07887; Megatron-LM's rule.
    """
    layers, attention, mlp = ["M"] * n, round(n * attention_ratio), round(n * mlp_ratio)
    if min(attention, mlp) < 0 or attention + mlp > n:
        raise ValueError(f"{attention} attention and {mlp} feed-forward layers do not fit into {n}")
    for letter, count, sections in (("*", attention, attention + 1), ("-", mlp, mlp)):
        section = credit = (layers.count("M") - count) / max(sections, 1)
        for i in (i for i, kind in enumerate(layers) if kind == "M" and count):
            layers[i] = letter if credit < 0.5 else "M"
            credit += section if credit < 0.5 else -1
    return "".join(layers)


# ── 5.2 Parameters and memory of the published models ───────────────────────────────────────────────────
#
# A Mamba layer, with I = N·D its inner width and 2·G·Z what B and C take: in_proj H·(2·I + 2·G·Z + N); the convolution,
# K taps and a bias for each of I + 2·G·Z channels; three numbers a head; the norm I; out_proj I·H. Attention has two
# matrices for queries and outputs and two narrower ones for keys and values; the feed-forward layer two. Each layer has
# a norm of H in front, and the ends of the model are not tied.
#
# While it writes, a sequence keeps I·Z numbers of state and K inputs of each channel in a Mamba layer, however long it
# is; and 2·G·D a token in an attention layer.


def parameters(config: HybridConfig) -> int:
    """Parameters of a `HybridLM`, by a formula for each kind of layer. Source: ours."""
    H, N, Z, K = config.hidden_size, config.mamba_heads, config.state_size, config.conv_kernel
    inner, keys, D = (
        N * config.mamba_head_size,
        2 * config.mamba_groups * Z,
        config.attention_head_size,
    )
    mamba = H * (2 * inner + keys + N) + (inner + keys) * (K + 1) + 3 * N + inner + inner * H
    attention = 2 * H * D * (config.attention_heads + config.attention_groups)
    kinds = {"M": mamba, "*": attention, "-": 2 * H * config.ffn_hidden_size}
    return sum(kinds[kind] + H for kind in config.pattern) + 2 * config.vocab_size * H + H


DecodeMemory = namedtuple(
    "DecodeMemory", "state kv"
)  # bytes of a sequence: of all Mamba layers, of all attention


def decode_memory(
    config: HybridConfig, tokens: int, number_bytes: int = 2, state_bytes: int = 2
) -> DecodeMemory:
    """Bytes that a sequence of `tokens` needs in a `Cache`, from a formula.

    number_bytes: of keys, values and the convolution's inputs; state_bytes: of the states (ours are at least 4).
    Source: ours.
    """
    inner, keys = (
        config.mamba_heads * config.mamba_head_size,
        2 * config.mamba_groups * config.state_size,
    )
    state = (
        inner * config.state_size * state_bytes + (inner + keys) * config.conv_kernel * number_bytes
    )
    kv = 2 * config.attention_groups * config.attention_head_size * tokens * number_bytes
    return DecodeMemory(config.pattern.count("M") * state, config.pattern.count("*") * kv)


# What follows from these bytes, and what does not. Nemotron-H-8B keeps 50 MiB of states and 16 KiB of keys and values
# a token: at 3,192 tokens the few attention layers hold as much as all states, and from there on more. Against a
# Transformer of 32 layers with as many shared keys it keeps an eighth of the keys: at 64K tokens 1.05 GiB in place of
# 8.
#
# The study *predicts* "up to 8×" faster generation, and 32 / 4 layers is 8 as well. That is no derivation: the study's
# own baseline shares no keys (32 heads with keys each), which would make it 32×; the prediction is a latency, in which
# weights, products and batch count; and the paper says "up to". Nemotron-H's "up to 3×" is a throughput of 56B against
# 70B-class models with 65,536 tokens in and 1,024 out, measured on H100s. Bytes alone explain neither, and say only
# which way it goes: how many sequences fit on a GPU, and how much is read for a token.

# ── What is left ────────────────────────────────────────────────────────────────────────────────────────
#
# With a state in the place of most keys and values, the past has become cheap: to keep, to read, to hand to the next
# rank. The token itself has not. Each is still multiplied with every parameter, two operations for each of 8 or 56
# billion, most of them in layers that no chapter has touched so far: the feed-forward ones. And each operation is one
# on numbers of 16 bits. Chapter 6 takes up both: many feed-forward networks in a layer, of which a token takes a few,
# and products of eight-bit numbers.


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────

#               hidden    FFN  heads    N   D    Z    vocabulary   layers
PUBLISHED = {
    name: HybridConfig(vocab, H, pattern, F, N, D, 8, Z, 4, 128, heads, 8, 128)
    for name, (H, F, heads, N, D, Z, vocab, pattern) in {
        "study hybrid": (4096, 16384, 32, 128, 64, 128, 256_000, allocate_layers(56, 0.08, 0.5)),
        "Nemotron-H-8B": (4096, 21504, 32, 128, 64, 128, 131_072, "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"),
        "Nemotron-H-47B": (8192, 30720, 64, 256, 64, 256, 131_072,
                           "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
                           "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"),
        "Nemotron-H-56B": (8192, 32768, 64, 256, 64, 256, 131_072, "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"),
        "Nano-12B-v2": (5120, 20480, 40, 128, 80, 128, 131_072, "M-M-M-M*-" + 5 * "M-M-M-M*-" + "M-M-M-M-"),
        "Nano-9B-v2": (4480, 15680, 40, 128, 80, 128, 131_072,
                       "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"),
    }.items()
}  # fmt: skip


@torch.no_grad()
def generate(
    model: HybridLM, tokens_BS: Tensor, new_tokens: int, temperature: float = 0.0, generator=None
) -> Tensor:
    """`tokens_BS` and `new_tokens` more: the most probable ones, or at a temperature drawn by `generator`.

    model: plain, or tensor-parallel: then every rank must call it, and gets the same text as long as the generators
    are in the same state. Raises: ValueError for an empty prompt.
    """
    if not tokens_BS.shape[1]:
        raise ValueError(
            f"an empty prompt, {tuple(tokens_BS.shape)}: begin with at least one token"
        )
    cache, new_BS = model.new_cache(tokens_BS.shape[1] + new_tokens), tokens_BS
    for _ in range(new_tokens):
        logits_BV = model(new_BS, cache=cache, last=True)[:, 0]
        new_BS = logits_BV.argmax(-1, keepdim=True)
        if temperature:
            new_BS = torch.multinomial(
                (logits_BV.double() / temperature).softmax(-1), 1, generator=generator
            )
        tokens_BS = torch.cat([tokens_BS, new_BS], 1)
    return tokens_BS


def make_grid(tp: int, device: torch.device, timeout: float = 60.0) -> Grid:
    """Lays all ranks out as (cp, tp), neighbours in a tp group; every rank must call it.

    timeout: seconds. Raises: ValueError where tp does not divide the ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if tp < 1 or world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    columns = [list(range(first, world, tp)) for first in range(tp)]
    neighbours = {}
    for size in (size for size in range(1, tp + 1) if tp % size == 0):
        rows = [list(range(first, first + size)) for first in range(0, world, size)]
        neighbours[size] = make_group(rows, device, timeout)
    cp_group = make_group(columns, device, timeout)
    return Grid(tp, world // tp, rank % tp, rank // tp, neighbours[tp], cp_group, neighbours)


def grids(device: torch.device, timeout: float) -> list[Grid]:
    """Every way to lay all ranks out: tp alone, both, cp alone."""
    world = group_size()
    return [make_grid(tp, device, timeout) for tp in range(world, 0, -1) if world % tp == 0]


def equivalence(
    grid: Grid, groups: int, device, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> dict:
    """A small odd model on this grid beside the same on a single device: name to relative error, the worst of all.

    Tokens that do not divide over cp, two documents, targets that do not count; groups may be fewer than tp. Errors
    are per tensor: max|Δ| / max|reference|; after AdamW over max(max|reference|, steps · lr).
    """
    tp = grid.tp
    sizes = dict(mamba_heads=2 * tp, mamba_head_size=4, state_size=6, mamba_groups=groups, chunk=4)
    sizes |= dict(
        attention_heads=2 * tp,
        attention_groups=groups,
        attention_head_size=4,
        ffn_hidden_size=8 * tp,
    )
    # Larger weights and steps than a real model begins with, so that the states and their gradients are not tiny.
    config = HybridConfig(61, 16, "M*-M", init_std=0.05, dt_init=(0.05, 0.5), **sizes)
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 2, 6 * grid.cp + 1), generator=generator).to(
        device
    )
    starts_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    starts_BS[0, 4], targets_BS[1, :3] = True, -100
    plain, parallel = (
        model.to(device, dtype) for model in (HybridLM(config), ParallelHybridLM(config, grid))
    )
    batches, options = (
        [(tokens_BS, targets_BS)] * 5,
        dict(starts_BS=starts_BS, max_norm=0.1, autocast=autocast),
    )

    def everyones(x, group=None) -> list:
        found = [x] * group_size(group)
        if dist.is_initialized():
            dist.all_gather_object(found, x, group)
        return found

    def gaps(kind: str, here: dict, reference: dict, floor: float = 0.0) -> dict[str, float]:
        shards = everyones({name: x.detach().cpu() for name, x in here.items()}, grid.tp_group)[:tp]
        return relative_errors(kind, merge_state_dicts(shards, config), reference, floor)

    errors = {}
    runs = zip(
        *(train(model, batches, lambda step: 1e-3, **options) for model in (plain, parallel))
    )
    for step, ((loss, norm), (loss_here, norm_here)) in enumerate(runs):
        errors |= {
            f"loss {step}": abs(loss_here / loss - 1).item(),
            f"norm {step}": abs(norm_here / norm - 1).item(),
        }
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


def check(
    device: torch.device,
    timeout: float,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    show: bool = False,
) -> dict[str, float]:
    """Every grid of the ranks, a group for each tp rank and one for all: name to the worst relative error."""
    found = {}
    for grid in grids(device, timeout):
        for groups in sorted({grid.tp, 1}, reverse=True):
            errors = equivalence(grid, groups, device, dtype, autocast)
            text = f"tp {grid.tp} × cp {grid.cp}, G {groups}"
            if show:
                say("\n".join(f"{text:20} {name:48} {error:.1e}" for name, error in errors.items()))
            say(f"{text}: worst of {len(errors)} {worst(errors):.1e}")
            for name, error in errors.items():
                found[name] = max(found.get(name, 0.0), error)
    return found


def count_messages(device: torch.device, timeout: float) -> dict[str, str]:
    """Of one Mamba layer: all-reduces under tp, and what state passing sends under cp, at two lengths."""
    world, found = group_size(), {}
    config = HybridConfig(pattern="M", mamba_heads=4 * world, mamba_groups=world)
    tp, cp = make_grid(world, device, timeout), make_grid(1, device, timeout)
    for name, grid, length in (
        ("tp", tp, 64),
        ("short", cp, 128 * world),
        ("long", cp, 512 * world),
    ):
        model = ParallelHybridLM(config, grid).to(device)
        x_BsH = torch.randn(
            1, length // grid.cp, config.hidden_size, device=device, requires_grad=True
        )
        past = Past() if grid.cp == 1 else RankPast(0, None, None, grid.cp_group)
        with Counter() as forward:
            y_BsH = model.run(model.layers[0], x_BsH, past)
        with Counter() as backward:
            y_BsH.sum().backward()
        found[name] = [
            [(m.op, m.bytes) for m in counter.messages] for counter in (forward, backward)
        ]
    return found


@torch.no_grad()
def decode_times(
    config: HybridConfig, contexts: list[int], device: torch.device, repeats: int = 15
) -> list[float]:
    """Milliseconds for one token on a single device, behind so many tokens: states and caches hold random numbers."""
    model, times = HybridLM(config).to(device).eval(), []
    for context in contexts:
        cache, token_BS = (
            model.new_cache(context + repeats + 3),
            torch.zeros(1, 1, dtype=torch.int64, device=device),
        )
        model(token_BS, cache=cache)  # makes what the layers keep
        for x in (x for layer in cache.layers for x in layer.values()):
            x.normal_()
        cache.tokens, of_token = context, []
        for _ in range(repeats + 3):
            begin = time.perf_counter()
            model(token_BS, cache=cache).argmax().item()  # the last word waits for a GPU to finish
            of_token.append(1e3 * (time.perf_counter() - begin))
        times.append(sorted(of_token[3:])[repeats // 2])
    return times


def demonstrate(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Trains on real text and generates some; returns how far the first losses are from the single device's."""
    from tqdm import tqdm

    config, (dtype, autocast), grid = (
        config_of(args),
        dtypes(args),
        make_grid(args.tp, device, args.timeout),
    )
    data = TextData(args.data, args.seq_length)
    source = args.data or "Python's sources"

    def batches(steps: int):
        return (
            [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]
            for step in range(steps)
        )

    options = dict(lr=lambda step: args.lr * min(1.0, (step + 1) / 10), autocast=autocast)
    model = ParallelHybridLM(config, grid).to(device, dtype)
    # The single device, on every rank: while one rank computed alone, the others' collectives would time out.
    alone = train(HybridLM(config).to(device, dtype), batches(min(5, args.steps)), **options)
    say(
        f"\n{config.pattern}, {parameters(config):,} parameters, on tp {grid.tp} × cp {grid.cp}, of {source}"
    )
    say("step      loss    single device      norm")
    differences, quiet = {}, group_rank() > 0 or not sys.stderr.isatty()
    steps = tqdm(train(model, batches(args.steps), **options), total=args.steps, disable=quiet)
    for step, results in enumerate(steps):
        loss, norm = read_step(step, *results)
        text = ""
        for results_alone in itertools.islice(alone, 1):  # nothing once its steps are done
            loss_alone, _ = read_step(step, *results_alone)
            differences[f"loss {step}"] = abs(loss - loss_alone)
            text = f"{loss_alone:.6f}"
        if step < 5 or step % 20 == 19:
            say(f"{step:4}  {loss:.6f}  {text:>15}  {norm:8.3f}")
    if grid.cp == 1:
        prompt = "import os\n\n\ndef "
        prompt_BS = torch.tensor([data.encoding.encode_ordinary(prompt)], device=device)
        text_S = generate(
            model, prompt_BS, 64, 0.7, torch.Generator(device).manual_seed(args.seed)
        )[0]
        say(
            f"\nafter {prompt!r} it writes\n{data.encoding.decode(text_S[prompt_BS.shape[1] :].tolist())!r}"
        )
    return differences


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args)
    if args.check:
        error = worst(check(device, args.timeout, *dtypes(args), show=True))
        say(f"bound {BOUNDS[args.dtype]:.0e}, {args.dtype}")
        sys.exit(0 if error <= BOUNDS[args.dtype] else 1)
    errors = check(device, args.timeout, torch.float64)
    messages, differences = count_messages(device, args.timeout), demonstrate(args, device)
    if (
        group_rank() == 0
    ):  # no collective comes after this, so no other rank waits for the measurement
        rows = claims(args, errors, messages, differences, time_decoding(args, device))
        if not print_claims(rows):
            sys.exit(1)


def time_decoding(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Prints a token's time after 1 to 32 thousand others, for three models; returns the milliseconds of each."""
    config, contexts = config_of(args), [2**10, 2**12, 2**14, 2**15]
    models = {
        "Mamba alone": replace(config, pattern=config.pattern.replace("*", "M")),
        "hybrid": config,
        "Transformer": replace(config, pattern=config.pattern.replace("M", "*"), rope=0.5),
    }
    times = {name: decode_times(of_model, contexts, device) for name, of_model in models.items()}
    say(
        "\nmilliseconds for a token, on one rank, behind    "
        + "".join(f"{context:>10,}" for context in contexts)
    )
    for name, of_model in times.items():
        say(
            f"{name:14}{models[name].pattern:35}"
            + "".join(f"{milliseconds:10.2f}" for milliseconds in of_model)
        )
    say()
    return times


def claims(
    args: argparse.Namespace,
    errors: dict[str, float],
    messages: dict,
    differences: dict[str, float],
    times: dict,
) -> list[tuple[str, str, str, bool | str]]:
    """The claims table: (claim, paper, here, verdict) of what `main` has measured, and of part 5."""
    rows, alone = [], group_size() == 1 and "needs ranks"

    def row(claim: str, paper: str, here: str, verdict: bool | str | None = None) -> None:
        rows.append((claim, paper, here, here == paper if verdict is None else verdict))

    for claim, kind in (
        ("gradient", "grad"),
        ("norm before clipping", "norm"),
        ("weight after AdamW", "after"),
    ):
        off = worst(errors, kind)
        text = f"every {claim} equals the single device's, all grids, float64"
        row(text, "exact", f"worst {off:.1e} relative", off <= BOUNDS["fp64"])
    text = f"the first {len(differences)} losses equal the single device's, {args.dtype}"
    off = worst(differences) if differences else math.nan
    row(
        text,
        "equal",
        f"within {off:.0e}",
        off <= BOUNDS[args.dtype] if differences else "needs steps",
    )
    reduces = " + ".join(str(sum(op == "all_reduce" for op, _ in way)) for way in messages["tp"])
    row("all-reduces of a Mamba layer, forward + backward", "1 + 1", reduces, alone or None)
    short, long = (
        sum(size for way in messages[name] for _, size in way) for name in ("short", "long")
    )
    text = "bytes that state passing sends, at 1 and 4 times the tokens"
    row(text, "equal", f"{short:,}, {long:,}", alone or short == long)
    study, eight = PUBLISHED["study hybrid"].pattern, PUBLISHED["Nemotron-H-8B"]
    same = study == "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    row(
        "the study's 56 layers, from 8 % and 50 %",
        "its string",
        "the same" if same else study,
        same,
    )
    shares = ", ".join(f"{study.count(kind) / 56:.0%}" for kind in "M*-")
    row("Mamba, attention, feed-forward layers of it", "43%, 7%, 50%", shares)
    row("parameters of Nemotron-H-8B", "8,100,852,736", f"{parameters(eight):,}")
    for paper in ("47B", "56B"):
        billions = parameters(PUBLISHED[f"Nemotron-H-{paper}"]) / 1e9
        row(f"parameters of Nemotron-H-{paper}", paper, f"{billions:.0f}B")
    here, there = (
        sum(decode_memory(c, 2**16)) / 2**30 for c in (eight, replace(eight, pattern=32 * "*-"))
    )
    row(
        "cache at 64K tokens, Nemotron-H-8B and 32 layers of attention",
        "–",
        f"{here:.2f}, {there:.2f} GiB",
        "–",
    )
    row(
        "generation, study: predicted",
        "up to 8×",
        f"{there / here:.1f}× fewer bytes",
        "another thing: section 5.2",
    )
    row("throughput of 56B against 70B models, 64K tokens in", "up to 3×", "–", "needs 8 H100s")
    growth = ", ".join(f"{of_model[-1] / of_model[0]:.1f}" for of_model in times.values())
    row(
        "a token behind 32K, of one behind 1K: Mamba, hybrid, attention",
        "1 for Mamba",
        growth,
        "a time, not judged",
    )
    return rows


def config_of(args: argparse.Namespace) -> HybridConfig:
    return config_from(args, HybridConfig, vocab_size=byte_encoding().n_vocab, seed=args.seed)


@dataclass
class Options:
    """This chapter's own flags."""

    data: str = flag(
        "", "a text to train on; by default the sources of Python's library", metavar="FILE"
    )
    tp: int | None = flag(
        None, "ranks that share the weights, by heads; None: as many as fit", least=1
    )
    cp: int | None = flag(None, "ranks that share a sequence, by tokens; None: all others", least=1)
    seq_length: int = flag(128, "tokens of a sequence, S", least=1)
    batch: int = flag(8, "sequences of a step", least=1)
    lr: float = flag(3e-3, "learning rate, after ten steps of warm-up", least=1e-9)


def largest_tp(config: HybridConfig, ranks: int) -> int:
    """The most ranks that can share these heads and features, among the divisors of `ranks`."""
    for tp in range(ranks, 1, -1):
        with contextlib.suppress(ValueError):
            local_config(config, tp)
            if ranks % tp == 0:
                return tp
    return 1


def check_args(args: argparse.Namespace) -> None:
    """Resolves --tp and --cp. Raises ValueError or OSError where the flags, or the text, do not fit."""
    config, ranks = config_of(args), args.world_size
    for name in ("tp", "cp"):
        size = getattr(args, name)
        if size and ranks % size:
            raise ValueError(f"--{name} {size} must divide the {ranks} ranks")
    if args.tp is None:
        args.tp = ranks // args.cp if args.cp else largest_tp(config, ranks)
    if args.cp not in (None, ranks // args.tp):
        raise ValueError(f"--tp {args.tp} times --cp {args.cp} must be the {ranks} ranks")
    args.cp = ranks // args.tp
    tokens, before = args.seq_length // args.cp, config.conv_kernel - 1
    if args.cp > 1 and tokens < before:
        text = f"--seq-length {args.seq_length} leaves {tokens} tokens to a rank, the convolution needs {before}"
        raise ValueError(f"{text}: choose at least {args.cp * before}, or a smaller cp")
    if not args.check:
        local_config(config, args.tp)  # for what it raises
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, HybridConfig], check_args, ranks=2, steps=120)


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
