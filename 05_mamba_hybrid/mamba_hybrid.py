# SPDX-License-Identifier: MIT-0
"""Chapter 5. Mamba-2 hybrids: a memory of fixed size, in parallel, and a little attention.

Papers: An Empirical Study of Mamba-based Language Models (2024), Nemotron-H (2025), Mamba-2 (2024).
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
#     V  words, v this rank's           Q  length of a chunk               L  layers
#
# B and C are also the two projections that the papers call so: as tensors they are B_BSGZ and C_BSGZ. Matrices L and W
# of a chunk, and vectors a, dt, A, are the papers' names as well. A digit is a literal size. tp is the number of ranks
# that share one copy of the model, cp the number that share one sequence: world size = tp · cp.

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import sysconfig
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class HybridConfig:
    """The sizes of a hybrid model. Raises ValueError where they contradict each other."""

    vocab_size: int = 256
    hidden_size: int = 128  # H
    pattern: str = "M-M*-M-"  # a layer each: M Mamba-2, * attention, - feed-forward
    ffn_hidden_size: int = 512  # F
    mamba_heads: int = 8  # N of Mamba-2
    mamba_head_size: int = 32  # D
    mamba_groups: int = 2  # G: heads of a group share B and C
    state_size: int = 32  # Z
    conv_kernel: int = 4  # K
    chunk: int = 64  # Q
    attention_heads: int = 4  # N of attention
    attention_groups: int = 2  # G: heads of a group share keys and values
    attention_head_size: int = 32
    rope: float = 0.0  # the share of each head that is rotated by its position; the papers' hybrids rotate nothing
    norm_eps: float = 1e-5
    init_std: float = 0.02
    A_init: tuple[float, float] = (1.0, 16.0)  # −A of a head is drawn between these
    dt_init: tuple[float, float] = (1e-3, 0.1)  # and its step dt, on a logarithmic scale, between these
    seed: int = 0  # the weights are a function of this configuration alone
    vocab_multiple: int = 1  # each rank's words are padded to a multiple of this

    def __post_init__(self):
        if not self.pattern or set(self.pattern) - set("M*-"):
            wrong = sorted(set(self.pattern) - set("M*-")) or "no layer"
            raise ValueError(f"pattern={self.pattern!r} has {wrong}: write M, * or - for each layer")
        for name, value in vars(self).items():
            if isinstance(value, int) and name not in ("seed", "rope") and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        for kind in ("mamba", "attention"):
            heads, groups = getattr(self, f"{kind}_heads"), getattr(self, f"{kind}_groups")
            if heads % groups:
                fits = math.ceil(heads / groups) * groups
                raise ValueError(f"{kind}_heads={heads} do not divide into {kind}_groups={groups}: such as {fits} do")
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel={self.conv_kernel}: at least 2 taps, or there is nothing to convolve")
        if not 0 <= self.rope <= 1 or round(self.rope * self.attention_head_size) % 2:
            raise ValueError(f"rope={self.rope} of {self.attention_head_size}: an even number of each head is rotated")


# ── 1 The plain model ───────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 One recurrence, seen three ways ─────────────────────────────────────────────────────────────────
#
# A head of Mamba-2 has a memory of fixed size, a matrix state_DZ. At each token it forgets a little, writes once, and
# reads once:
#
#     state ← exp(dt·A) · state  +  dt · x_D ⊗ B_Z          forget, write the value x under the key B
#     y_D   = state_DZ · C_Z  (+ D · x_D)                   read with the query C; D is a way around the memory
#
# dt > 0 and the vectors x, B, C come from the token itself, A < 0 is one learned number a head. So a = dt·A ≤ 0 is the
# logarithm of what is kept: with a large dt the head forgets what was and writes this token; with dt near 0 it lets the
# token pass. Write the sum out, and the state is gone:
#
#     y_i = Σ_{j ≤ i}  exp(a_{j+1} + … + a_i) · (C_i·B_j) · dt_j·x_j        that is   y = (L ∘ C Bᵀ) (dt·x)
#
# attention without a softmax, under a mask L whose entries are products of decays. So the same numbers can be had as
#
#     a loop           ssd_recurrent    S small steps, one after the other; constant memory: for decoding
#     a masked matrix  ssd_quadratic    three products, all tokens at once, S² work: for what is short
#     chunks of both   ssd              the matrix inside chunks of Q tokens, the state from chunk to chunk:
#                                       three products each, S·Q work: for training
#
#     ┌────┐                            L of 4 chunks. On the diagonal the masked matrix of each chunk. Everything
#     │ ◣  │                            below it has low rank: what a later chunk can know of an earlier one went
#     │ ■◣ │                            through the state between them, D·Z numbers.
#     │ ■■◣│
#     └────┘


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: decays, states and means are too delicate for less. float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Decays multiply over thousands of tokens, so all is done with their logarithms, and exp comes last. Two traps:
#
# · Above the diagonal the sums run backwards and are positive: exp of them is inf, and a mask that is multiplied on
#   afterwards makes NaN of it, at the latest in backward, where the gradient 0 meets inf. So −inf goes in *before* exp.
# · A sum over a stretch is a difference of two sums from the start. In fp32 both may be −5,000 and good to 3e-4, and so
#   is their difference, however short the stretch. In float64 it is exact enough, and S numbers a head cost nothing.


def segsum(a: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sums over stretches, (..., S) to (..., S, S): [i, j] is a_{j+1} + … + a_i where j ≤ i, and −inf where j > i.

    The diagonal is 0: a token does not decay on the way to itself. starts: True where a document begins, (..., S) or
    what broadcasts to it; a stretch that runs into another document is −inf as well. Source: Mamba-2, section 6 of
    arXiv 2405.21060. Needs: nothing else.
    """
    S, sums = a.shape[-1], a.to(torch.float64).cumsum(-1)
    cut = torch.ones(S, S, dtype=torch.bool, device=a.device).triu(1)
    if starts is not None:
        document = starts.cumsum(-1)
        cut = cut | (document[..., :, None] != document[..., None, :])
    return (sums[..., :, None] - sums[..., None, :]).to(a.dtype).masked_fill(cut, -torch.inf)


# Heads come in groups that share B and C, as query heads share keys in grouped attention: heads 0 … J−1 are group 0,
# the next J group 1. So C Bᵀ is computed once a group, and J masks are laid on it. All three forms work on one layout,
# (B, G, J, S, ·), in at least fp32; dt has gone into X = dt·x and a = dt·A there, once each.


def _lay_out(x, dt, A, B, C, state, starts=None):
    G, J = B.shape[2], x.shape[2] // B.shape[2]
    X_BGJSD = rearrange(wide(x) * wide(dt)[..., None], "B S (G J) D -> B G J S D", G=G)
    a_BGJS = rearrange(wide(dt) * wide(A), "B S (G J) -> B G J S", G=G)
    B_BG1SZ, C_BG1SZ = (rearrange(wide(t), "B S G Z -> B G 1 S Z") for t in (B, C))
    if state is None:
        state = X_BGJSD.new_zeros(x.shape[0], G * J, x.shape[3], B.shape[3])
    state_BGJDZ = rearrange(wide(state), "B (G J) D Z -> B G J D Z", G=G)
    starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if starts is None else starts
    return X_BGJSD, a_BGJS, B_BG1SZ, C_BG1SZ, state_BGJDZ, starts[:, None, None]


def _lay_back(y_BGJSD, state_BGJDZ, x, D):
    y_BSND = rearrange(y_BGJSD, "B G J S D -> B S (G J) D")
    y_BSND = y_BSND if D is None else y_BSND + wide(D)[:, None] * x
    return y_BSND.to(x.dtype), rearrange(state_BGJDZ, "B G J D Z -> B (G J) D Z")


def _exact(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)  # it would make the products narrow again


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence for one token: x (B, N, D), dt (B, N), A (N), B and C (B, G, Z), state (B, N, D, Z).

    Returns: y (B, N, D) in x's dtype, and the next state, a new tensor. Source: Mamba-2. Needs: `_lay_out`.
    """
    token = x[:, None], dt[:, None], A, B[:, None], C[:, None]
    X_BGJ1D, a_BGJ1, B_BG11Z, C_BG11Z, state_BGJDZ, _ = _lay_out(*token, state)
    state_BGJDZ = a_BGJ1[..., None].exp() * state_BGJDZ + X_BGJ1D.mT * B_BG11Z
    y_BGJD1 = (state_BGJDZ * C_BG11Z).sum(-1, keepdim=True)
    y_B1ND, state = _lay_back(y_BGJD1.mT, state_BGJDZ, x[:, None], D)
    return y_B1ND[:, 0], state


def ssd_recurrent(x, dt, A, B, C, D=None, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The loop. Arguments and results as `ssd`'s. Needs: `ssd_step`."""
    y, state = [], wide(x).new_zeros(*x[:, 0].shape, B.shape[-1]) if initial_state is None else initial_state
    for t in range(x.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        y_t, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D)
        y.append(y_t)
    return torch.stack(y, 1), state


# The masked matrix needs two more things to serve as a chunk: what the state that enters adds to each y, and what each
# token leaves in the state that goes out. Both are products with the same decays: the last row of L says how much of
# token j is left behind the last one.


def _decays(a: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The mask L, (..., S, S); and what is left at each token of the state before the first, (..., S, 1): the exp of
    a_0 + … + a_i, and nothing once a document has begun."""
    kept = a.to(torch.float64).cumsum(-1).to(a.dtype).exp().masked_fill(starts.cumsum(-1) > 0, 0)
    return segsum(a, starts).exp(), kept[..., None]


def _chunk(X_BGJSD, a_BGJS, B_BG1SZ, C_BG1SZ, state_BGJDZ, starts):
    L_BGJSS, kept_BGJS1 = _decays(a_BGJS, starts)
    y_BGJSD = (L_BGJSS * (C_BG1SZ @ B_BG1SZ.mT)) @ X_BGJSD + kept_BGJS1 * (C_BG1SZ @ state_BGJDZ.mT)
    left_BGJSD = L_BGJSS[..., -1, :, None] * X_BGJSD
    return y_BGJSD, kept_BGJS1[..., -1:, :] * state_BGJDZ + left_BGJSD.mT @ B_BG1SZ


def ssd_quadratic(x, dt, A, B, C, D=None, initial_state=None, starts=None) -> tuple[Tensor, Tensor]:
    """The masked matrix. Arguments and results as `ssd`'s; work and memory grow with S². Needs: `_chunk`."""
    with _exact(x):
        return _lay_back(*_chunk(*_lay_out(x, dt, A, B, C, initial_state, starts)), x, D)


# Chunks of both: `_chunk` for one chunk after the other, the state handed on. The last chunk may be short: there is
# nothing to pad. Autograd could differentiate that loop, but it would keep several S × Q matrices a head. We keep
# the states between chunks, and in backward compute each chunk's matrices again. Backward walks the chunks from the
# last to the first, and hands on the *gradient* of the state as forward hands on the state.
#
# Three products were made in a chunk, and each is turned around once for each of its factors. The gradient of the
# decays is worth a look. L_ij = exp(s_i − s_j), with s the running sum of a. So what arrives there, M_ij = dL_ij·L_ij,
# goes to s_i with plus and to s_j with minus: row sums minus column sums, and no chain of S × S matrices. The diagonal
# cancels, and much of the rest nearly: hence float64 for these sums.


def _chunk_backward(X_BGJSD, a_BGJS, B_BG1SZ, C_BG1SZ, state_BGJDZ, starts, grad_y_BGJSD, grad_state_BGJDZ):
    L_BGJSS, kept_BGJS1 = _decays(a_BGJS, starts)
    end_BGJS1, whole_BGJ11, exact = L_BGJSS[..., -1, :, None], kept_BGJS1[..., -1:, :], dict(dtype=torch.float64)
    scores_BG1SS, read_BGJSD = C_BG1SZ @ B_BG1SZ.mT, kept_BGJS1 * grad_y_BGJSD
    grad_X_BGJSD = (L_BGJSS * scores_BG1SS).mT @ grad_y_BGJSD + end_BGJS1 * (B_BG1SZ @ grad_state_BGJDZ.mT)
    by_head_BGJSS = (grad_y_BGJSD @ X_BGJSD.mT) * L_BGJSS
    grad_scores_BG1SS = by_head_BGJSS.sum(2, keepdim=True)
    by_read_BGJSZ, by_left_BGJSZ = read_BGJSD @ state_BGJDZ, (end_BGJS1 * X_BGJSD) @ grad_state_BGJDZ
    grad_B_BG1SZ = grad_scores_BG1SS.mT @ C_BG1SZ + by_left_BGJSZ.sum(2, keepdim=True)
    grad_C_BG1SZ = grad_scores_BG1SS @ B_BG1SZ + by_read_BGJSZ.sum(2, keepdim=True)

    M_BGJSS, left_BGJS = by_head_BGJSS.mul_(scores_BG1SS), (by_left_BGJSZ * B_BG1SZ).sum(-1, **exact)
    grad_s_BGJS = M_BGJSS.sum(-1, **exact) - M_BGJSS.sum(-2, **exact) - left_BGJS
    grad_s_BGJS += (by_read_BGJSZ * C_BG1SZ).sum(-1, **exact)
    grad_s_BGJS[..., -1] += left_BGJS.sum(-1) + (whole_BGJ11 * state_BGJDZ * grad_state_BGJDZ).sum((-1, -2), **exact)
    grad_a_BGJS = grad_s_BGJS.flip(-1).cumsum(-1).flip(-1)  # a_t is in every s_i from t on
    grad_state_BGJDZ = whole_BGJ11 * grad_state_BGJDZ + read_BGJSD.mT @ C_BG1SZ
    return grad_X_BGJSD, grad_a_BGJS[..., None], grad_B_BG1SZ, grad_C_BG1SZ, grad_state_BGJDZ


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk, X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ, state_BGJDZ, starts):
        ctx.pieces, states = [slice(t, t + chunk) for t in range(0, X_BGJSD.shape[3], chunk)], []
        y_BGJSD = torch.empty_like(X_BGJSD)
        for at in ctx.pieces:
            states.append(state_BGJDZ)
            X, a, B, C = (t[..., at, :] for t in (X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ))
            y_BGJSD[..., at, :], state_BGJDZ = _chunk(X, a[..., 0], B, C, state_BGJDZ, starts[..., at])
        ctx.save_for_backward(X_BGJSD, a_BGJS1, B_BG1SZ, C_BG1SZ, starts, *states)
        return y_BGJSD, state_BGJDZ if states else state_BGJDZ.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_BGJSD, grad_state_BGJDZ):
        *tensors, starts = ctx.saved_tensors[:5]
        grads = [torch.empty_like(t) for t in tensors]
        with _exact(grad_y_BGJSD):
            for at, state_BGJDZ in zip(reversed(ctx.pieces), reversed(ctx.saved_tensors[5:])):
                X, a, B, C, grad_y = (t[..., at, :] for t in (*tensors, grad_y_BGJSD))
                inputs = X, a[..., 0], B, C, state_BGJDZ, starts[..., at]
                *of_chunk, grad_state_BGJDZ = _chunk_backward(*inputs, grad_y, grad_state_BGJDZ)
                for grad, part in zip(grads, of_chunk):
                    grad[..., at, :] = part
        return None, *grads, grad_state_BGJDZ, None


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, D: Tensor | None = None,
    initial_state: Tensor | None = None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence of Mamba-2 over a sequence, in chunks: y_i = C_i·state_i + D x_i.

    Args:
        x: values, (B, S, N, D), any S. dt: step sizes, (B, S, N), positive. A: (N,), negative.
        B, C: (B, S, G, Z); heads [g·J, (g + 1)·J) with J = N / G read and write with those of group g.
        chunk: Q; changes no number beyond rounding. Work is S·Q; what is kept is the inputs and S / Q states.
        D: (N,), the way around the state, or None. initial_state: (B, N, D, Z); None is zeros.
        starts: bool, (B, S), True where a document begins: there the state is forgotten.

    Returns: y as x, and the state behind the last token, (B, N, D, Z). Computed in at least fp32, which the state stays
    in. Differentiable once, in all of its tensors.
    Raises: ValueError where shapes disagree or heads do not divide into groups.
    Source: Mamba-2, section 6 of arXiv 2405.21060. Needs: `_ChunkedSSD`, `_lay_out`, `_lay_back`.
    """
    (batch, S, N, head), (G, Z) = x.shape, B.shape[2:]
    shapes = dict(dt=(batch, S, N), A=(N,), B=(batch, S, G, Z), C=(batch, S, G, Z), D=(N,), starts=(batch, S))
    shapes |= dict(initial_state=(batch, N, head, Z))
    for (name, shape), tensor in zip(shapes.items(), (dt, A, B, C, D, starts, initial_state)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}")
    if N % G or chunk < 1:
        raise ValueError(f"{N} heads do not divide into {G} groups" if N % G else f"chunk={chunk}: at least 1")
    X_BGJSD, a_BGJS, *others = _lay_out(x, dt, A, B, C, initial_state, starts)
    with _exact(x):
        return _lay_back(*_ChunkedSSD.apply(chunk, X_BGJSD, a_BGJS[..., None], *others), x, D)


# ── 1.2 The convolution ─────────────────────────────────────────────────────────────────────────────────
#
# Before the recurrence each channel of x, B and C takes a weighted sum of its last K = 4 tokens, its own and K − 1
# earlier ones: it costs nothing, and lets a token know what stood right before it. The *last* tap belongs to the
# newest token. What a later token needs of the past is the K − 1 inputs before it, and inputs they are: what went into
# the convolution, not what came out of it.


def causal_conv1d(
    u_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, previous_BKC: Tensor | None = None, document: Tensor | None = None
) -> Tensor:
    """Each channel's weighted sum over its last K tokens, as long as u, with bias and no activation.

    previous_BKC: the tokens before u, K − 1 of them or more; None is zeros. document: (B, K − 1 + S) numbers of the
    documents of the K − 1 tokens before and of u; what belongs to another document is not looked at.
    Source: Mamba. Needs: nothing else.
    """
    S, K = u_BSC.shape[1], weight_CK.shape[1]
    if previous_BKC is None:
        previous_BKC = u_BSC.new_zeros(u_BSC.shape[0], K - 1, u_BSC.shape[2])
    padded_BSC = torch.cat([previous_BKC[:, previous_BKC.shape[1] - (K - 1) :], u_BSC], 1)
    y_BSC = torch.addcmul(bias_C, u_BSC, weight_CK[:, -1])
    for tap in range(K - 1):
        earlier_BSC = padded_BSC[:, tap : tap + S]
        if document is not None:
            earlier_BSC = earlier_BSC * (document[:, tap : tap + S] == document[:, K - 1 :])[..., None]
        y_BSC = torch.addcmul(y_BSC, earlier_BSC, weight_CK[:, tap])
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
class Place:
    """Which tokens of a sequence a layer is given, where they are not all, or not of one document."""

    first: int = 0  # the number of tokens before
    document_BS: Tensor | None = None  # of all tokens of the sequence, the number of the document; None: there is one
    lengths: list[int] | None = None  # section 2.3: how many tokens each rank has

    def documents(self, before: int, S: int) -> Tensor | None:
        """The document's number for `before` tokens in front of `first`, and for S from there on."""
        if self.document_BS is None:
            return None
        index = torch.arange(self.first - before, self.first + S, device=self.document_BS.device)
        return self.document_BS[:, index.clamp(min=0)]  # in front of the first token of all there are only zeros


class RMSNorm(nn.Module):
    """x / √(mean of x² + eps), each of `groups` slices of the last dimension by itself, times a weight; in fp32."""

    def __init__(self, size: int, eps: float = 1e-5, groups: int = 1):
        super().__init__()
        self.eps, self.groups, self.weight = eps, groups, nn.Parameter(torch.ones(size))

    def mean_square(self, x_BSGC: Tensor) -> Tensor:
        return x_BSGC.square().mean(-1, keepdim=True)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSGC = wide(x_BSH).unflatten(-1, (self.groups, -1))
        y_BSGC = x_BSGC * (self.mean_square(x_BSGC) + self.eps).rsqrt()
        return (y_BSGC.flatten(-2) * wide(self.weight)).to(x_BSH.dtype)


class Mamba2Mixer(nn.Module):
    """A Mamba-2 layer without its norm and residual connection: x_BSH to (B, S, H), as the published models have it.

    `place` is for packed documents, `cache` for decoding (section 1.6). Source: Mamba-2; Megatron-LM's layer.
    Needs: `ssd`, `ssd_step`, `causal_conv1d`, `RMSNorm`, `Place`, `initial_value`, `HybridConfig`.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, N, inner = config, config.mamba_heads, config.mamba_heads * config.mamba_head_size
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

    def forward(self, x_BSH: Tensor, place: Place | None = None, cache: dict | None = None) -> Tensor:
        place, heads, groups = place or Place(), dict(D=self.config.mamba_head_size), dict(Z=self.config.state_size)
        z_BSC, u_BSC, dt_BSN = self.in_proj(x_BSH).split(self.projected, -1)
        x_BSC, *BC_BSC = F.silu(self.convolve(u_BSC, place, cache)).split(self.convolved, -1)
        x_BSND = rearrange(x_BSC, "B S (N D) -> B S N D", **heads)
        B_BSGZ, C_BSGZ = (rearrange(t, "B S (G Z) -> B S G Z", **groups) for t in BC_BSC)
        dt_BSN, A_N = F.softplus(wide(dt_BSN) + wide(self.dt_bias)), -wide(self.A_log).exp()
        y_BSND = self.scan(x_BSND, dt_BSN, A_N, B_BSGZ, C_BSGZ, place, cache)
        y_BSC = wide(rearrange(y_BSND, "B S N D -> B S (N D)")) * F.silu(wide(z_BSC))
        return self.out_proj(self.norm(y_BSC).to(x_BSH.dtype))

    def convolve(self, u_BSC: Tensor, place: Place, cache: dict | None) -> Tensor:
        K, S = self.config.conv_kernel, u_BSC.shape[1]
        inputs = u_BSC, self.conv_weight, self.conv_bias, self.before(u_BSC, cache)
        y_BSC = causal_conv1d(*inputs, place.documents(K - 1, S))
        if cache is not None:
            cache["conv"].copy_(torch.cat([cache["conv"], u_BSC[:, -K:]], 1)[:, -K:])
        return y_BSC

    def before(self, u_BSC: Tensor, cache: dict | None) -> Tensor | None:
        """The convolution's inputs before u; None where u is the beginning."""
        return cache and cache["conv"]

    def scan(self, x, dt, A, B, C, place: Place, cache: dict | None) -> Tensor:
        if cache is not None and x.shape[1] == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], cache["state"], self.D)
            y = y[:, None]
        else:
            state, document = cache and cache["state"], place.documents(1, x.shape[1])
            starts = None if document is None else document[:, 1:] != document[:, :-1]
            y, state = ssd(x, dt, A, B, C, self.config.chunk, self.D, state, starts)
        if cache is not None:
            cache["state"].copy_(state)
        return y


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
    """Rotary embedding on the first `share` of each head, R numbers, for tokens first, first + 1, …; i turns with i + R/2.

    Source: RoFormer, arXiv 2104.09864. Needs: `wide`.
    """
    S, R, exact = x_BNSD.shape[-2], round(share * x_BNSD.shape[-1]), dict(dtype=torch.float64, device=x_BNSD.device)
    if not R:
        return x_BNSD
    angle_SR = torch.arange(first, first + S, **exact)[:, None] * base ** (-torch.arange(0, R, 2, **exact) / R)
    turn_SR = torch.polar(torch.ones_like(angle_SR), angle_SR).to(wide(x_BNSD).dtype.to_complex())
    turned_BNSR = torch.complex(*wide(x_BNSD[..., :R]).chunk(2, -1)) * turn_SR
    return torch.cat([turned_BNSR.real.to(x_BNSD.dtype), turned_BNSR.imag.to(x_BNSD.dtype), x_BNSD[..., R:]], -1)


class Attention(nn.Module):
    """Causal grouped-query attention, x_BSH to (B, S, H). Needs: `rotate`, `Place`, `HybridConfig`."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config, H, D = config, config.hidden_size, config.attention_head_size
        self.q_proj = nn.Linear(H, config.attention_heads * D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(H, config.attention_groups * D, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(config.attention_heads * D, H, bias=False)

    def forward(self, x_BSH: Tensor, place: Place | None = None, cache: dict | None = None) -> Tensor:
        place, S, D = place or Place(), x_BSH.shape[1], self.config.attention_head_size
        projections, split = (self.q_proj, self.k_proj, self.v_proj), "B S (N D) -> B N S D"
        q_BNSD, k_BGSD, v_BGSD = (rearrange(linear(x_BSH), split, D=D) for linear in projections)
        q_BNSD, k_BGSD = (rotate(x, place.first, self.config.rope) for x in (q_BNSD, k_BGSD))
        k_BGTD, v_BGTD = self.all_keys(k_BGSD, v_BGSD, place, cache)
        T, mask = k_BGTD.shape[2], None  # T: all tokens, up to the last of x
        if S == 1 and place.document_BS is None:  # one token sees all: the heads of a group are queries of one head
            q_BGJD = rearrange(q_BNSD, "B (G J) 1 D -> B G J D", G=k_BGTD.shape[1])
            y_BNSD = F.scaled_dot_product_attention(q_BGJD, k_BGTD, v_BGTD).flatten(1, 2)[:, :, None]
        else:
            if T > S or place.document_BS is not None:
                mask = torch.ones(S, T, dtype=torch.bool, device=x_BSH.device).tril(T - S)
            if place.document_BS is not None:
                document_BT = place.document_BS[:, :T]
                mask = (mask & (document_BT[:, T - S :, None] == document_BT[:, None]))[:, None]
            options = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            y_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BGTD, v_BGTD, **options)
        return self.o_proj(rearrange(y_BNSD, "B N S D -> B S (N D)"))

    def all_keys(self, k_BGSD: Tensor, v_BGSD: Tensor, place: Place, cache: dict | None) -> tuple[Tensor, Tensor]:
        """Keys and values from the first token to the last of x."""
        if cache is None:
            return k_BGSD, v_BGSD
        last = place.first + k_BGSD.shape[2]
        cache["keys"][:, :, place.first : last], cache["values"][:, :, place.first : last] = k_BGSD, v_BGSD
        return cache["keys"][:, :, :last], cache["values"][:, :, :last]


class SquaredReLUMLP(nn.Module):
    """The feed-forward layer relu(x W1)² W2, x_BSH to (B, S, H). Needs: `HybridConfig`."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, place: Place | None = None, cache: dict | None = None) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_BSH)).square())


KINDS = {"M": Mamba2Mixer, "*": Attention, "-": SquaredReLUMLP}


class Block(nn.Module):
    """One layer of any kind with its norm and its residual connection."""

    def __init__(self, config: HybridConfig, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.hidden_size, config.norm_eps), mixer

    def forward(self, x_BSH: Tensor, place: Place, cache: dict | None = None) -> Tensor:
        return x_BSH + self.mixer(self.norm(x_BSH), place, cache)


class HybridLM(nn.Module):
    """The single-device model: tokens_BS (int64) to logits (B, S, V).

    starts_BS: bool, True where a document begins, for documents packed into one sequence: nothing passes from one to
    the next, in no kind of layer. cache: a `Cache`, for decoding; its sequence goes on with these tokens.
    Needs: this part.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, KINDS[kind](config)) for kind in config.pattern)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:  # on "meta" are shapes without memory: `parameter_shapes` asks for those
            self.load_state_dict(dict(initial_weights(config)))

    def enter(self, tokens_BS: Tensor, starts_BS: Tensor | None, cache: Cache | None) -> tuple[Tensor, Place]:
        """The first layer's input, and which tokens it holds."""
        document_BS = None if starts_BS is None else starts_BS.cumsum(1)
        return self.embedding(tokens_BS), Place(cache.room_for(tokens_BS) if cache else 0, document_BS)

    def hidden(self, tokens_BS: Tensor, starts_BS: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head is given, (B, S, H)."""
        x_BSH, place = self.enter(tokens_BS, starts_BS, cache)
        for number, layer in enumerate(self.layers):
            x_BSH = layer(x_BSH, place, cache and cache.layers[number])
        return self.final_norm(x_BSH)

    def forward(self, tokens_BS: Tensor, starts_BS: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.head(self.hidden(tokens_BS, starts_BS, cache))

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor, starts_BS: Tensor | None = None) -> Tensor:
        """Cross entropy of each token in nats, (B, S), at least fp32; 0 where the target is −100."""
        logits_BVS = rearrange(wide(self(tokens_BS, starts_BS)), "B S V -> B V S")
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for `capacity` tokens of `batch` sequences, where the parameters are and of their dtype."""
        return Cache(self.config, batch, capacity, self.head.weight.dtype, self.head.weight.device)

    def next_logits(self, tokens_BS: Tensor, cache: Cache) -> Tensor:
        """Of the token that follows, (B, V)."""
        return self.head(self.hidden(tokens_BS, cache=cache)[:, -1])


# ── 1.5 First weights ───────────────────────────────────────────────────────────────────────────────────
#
# Where a Mamba layer starts decides what it can learn: over the heads, exp(dt·A) must reach from "forget at once" to
# "keep for a thousand tokens". So −A is drawn between 1 and 16, dt between 0.001 and 0.1 on a logarithmic scale, and
# dt_bias is what softplus makes that dt of. What writes onto the residual stream starts smaller by 1/√L, so that the
# sum over L layers starts no larger than one.


def initial_value(name: str, shape: torch.Size, config: HybridConfig, generator=None) -> Tensor:
    """A parameter's first value by its name, fp32, on the CPU. Source: Mamba-2. Needs: `HybridConfig`."""
    kind, uniform = name.split(".")[-1], torch.rand(shape, generator=generator, device="cpu")
    if kind == "A_log":
        return torch.lerp(*torch.tensor(config.A_init), uniform).log()
    if kind == "dt_bias":
        dt_N = torch.lerp(*torch.tensor(config.dt_init).log(), uniform).exp().clamp(min=1e-4)
        return dt_N + torch.log(-torch.expm1(-dt_N))
    if kind in ("conv_weight", "conv_bias"):
        return (2 * uniform - 1) / math.sqrt(config.conv_kernel)
    if len(shape) < 2:  # D, and the norms' weights
        return torch.ones(shape, device="cpu")
    writes = name.split(".")[-2] in ("out_proj", "o_proj", "down_proj")
    std = config.init_std / math.sqrt(len(config.pattern)) if writes else config.init_std
    return torch.randn(shape, generator=generator, device="cpu") * std


def parameter_shapes(config: HybridConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the plain model, without allocating any. Needs: `HybridLM`."""
    with torch.device("meta"):
        return {name: p.shape for name, p in HybridLM(config).named_parameters()}


def initial_weights(config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """The model's first weights, a function of `config` alone, whole, one tensor at a time.

    Needs: `parameter_shapes`, `initial_value`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in parameter_shapes(config).items():
        yield name, initial_value(name, shape, config, generator)


# ── 1.6 Decoding ────────────────────────────────────────────────────────────────────────────────────────
#
# To write one more token the model needs of all earlier ones: from a Mamba layer the state and the convolution's last
# inputs, as large after a million tokens as after one; from an attention layer every key and value; from a
# feed-forward layer nothing. A cache holds that. The prompt goes through the chunked form and leaves its cache
# behind ("prefill"); each further token is one step of the recurrence.


class Cache:
    """What decoding needs of the tokens so far, `tokens` of them: a dict for each layer.

    Args: config: of the model, or of a rank's share of it (`local_config`); batch: sequences, of equal length;
    capacity: tokens that the keys and values have room for. States are at least fp32: they add up small amounts over
    thousands of steps. The convolution's are K inputs, as the published code keeps them; K − 1 would do.
    """

    def __init__(self, config: HybridConfig, batch: int, capacity: int, dtype=torch.float32, device="cpu"):
        N, D, G, Z = config.mamba_heads, config.mamba_head_size, config.mamba_groups, config.state_size
        shape = batch, config.attention_groups, capacity, config.attention_head_size
        empty = lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        conv = lambda: empty(batch, config.conv_kernel, N * D + 2 * G * Z)  # noqa: E731
        state = lambda: empty(batch, N, D, Z, dtype=torch.promote_types(dtype, torch.float32))  # noqa: E731
        kinds = {"M": dict(conv=conv, state=state), "*": dict.fromkeys(("keys", "values"), lambda: empty(*shape))}
        self.tokens, self.capacity = 0, capacity
        self.layers = [{name: make() for name, make in kinds.get(kind, {}).items()} for kind in config.pattern]

    def room_for(self, tokens_BS: Tensor) -> int:
        """Counts these tokens in; returns how many there were before. Raises: ValueError where they do not fit."""
        before, self.tokens = self.tokens, self.tokens + tokens_BS.shape[1]
        if self.tokens > self.capacity:
            raise ValueError(f"{self.tokens} tokens, but the cache has room for {self.capacity}")
        return before


@torch.no_grad()
def generate(model: HybridLM, tokens_BS: Tensor, new_tokens: int, temperature: float = 0.0, generator=None) -> Tensor:
    """`tokens_BS` and `new_tokens` more: the most probable ones, or at a temperature drawn by `generator`.

    model: plain, or tensor-parallel: then every rank must call it, and gets the same text as long as the generators
    are in the same state. Raises: ValueError for an empty prompt. Needs: `Cache`.
    """
    if not tokens_BS.shape[1]:
        raise ValueError(f"an empty prompt, {tuple(tokens_BS.shape)}: begin with at least one token")
    cache, new_BS = model.new_cache(tokens_BS.shape[0], tokens_BS.shape[1] + new_tokens), tokens_BS
    for _ in range(new_tokens):
        logits_BV = model.next_logits(new_BS, cache)
        new_BS = logits_BV.argmax(-1, keepdim=True)
        if temperature:
            new_BS = torch.multinomial((logits_BV.double() / temperature).softmax(-1), 1, generator=generator)
        tokens_BS = torch.cat([tokens_BS, new_BS], 1)
    return tokens_BS


# ── 2 The idea ──────────────────────────────────────────────────────────────────────────────────────────


# ── shared: groups ──
def group_size(group=None) -> int:
    """How many ranks `group` has (None: all there are); 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group=None) -> int:
    """This process's number within `group` (None: all ranks); 0 where no process group exists."""
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


# ── end of groups ──


# ── shared: tensor-parallel operators ──
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
# Each line turned around is another line: two operators are each other's gradient. The first pair is the paper's f
# and g. So an operator is two small functions, one for the way there and one for the way back, put into one Function.
# (A plain dist.all_reduce has no backward: autograd passes the gradient on as it is, which is right for g by
# accident, and there is no f.)
#
# Leave out copy_to_tp, and training still runs: the loss falls, but every weight below gets one rank's summand for its
# gradient. It is the commonest bug of home-made tensor parallelism, and only a look at gradients shows it.


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


def _slice(x: Tensor, group) -> Tensor:
    """This rank's share of the last dimension."""
    return x.split(_share(x.shape[-1], group, "the last dimension"), -1)[group_rank(group)].contiguous()


class _Door(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, there, back):
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.group), None, None, None


def copy_to_tp(x: Tensor, group=None) -> Tensor:
    """The way in: x as it is; its gradient is summed over `group`.

    x: any shape, equal on every rank. group: the tensor-parallel group; None is all ranks.
    Source: the paper's f, figure 3. Needs: `_Door`, `_keep`, `_sum`, `_all_reduce`, `group_size`.
    """
    return _Door.apply(x, group, _keep, _sum) if group_size(group) > 1 else x


def reduce_from_tp(partial_x: Tensor, group=None) -> Tensor:
    """The way out: the sum of `partial_x` over `group`, the same on every rank; the gradient passes as it is.

    partial_x: any shape, which must be the same on every rank; not modified.
    Source: the paper's g, figure 3. Needs: `_Door`, `_keep`, `_sum`, `_all_reduce`, `group_size`.
    """
    return _Door.apply(partial_x, group, _sum, _keep) if group_size(group) > 1 else partial_x


def scatter_to_tp(x: Tensor, group=None) -> Tensor:
    """This rank's share of the last dimension of x, (..., F) to (..., f); the gradient is gathered.

    Raises: ValueError where the dimension does not divide over the ranks.
    Needs: `_Door`, `_slice`, `_gather`, `_share`, `group_size`, `group_rank`.
    """
    return _Door.apply(x, group, _slice, _gather) if group_size(group) > 1 else x


def gather_from_tp(x: Tensor, group=None) -> Tensor:
    """All ranks' x side by side, (..., f) to (..., F); of the gradient each rank keeps its share.

    Right only where every rank does the same with the result: then its gradient is whole on each, and a sum would count
    it tp times. Needs: `_Door`, `_slice`, `_gather`, `_share`, `group_size`, `group_rank`.
    """
    return _Door.apply(x, group, _gather, _slice) if group_size(group) > 1 else x


# ── end of tensor-parallel operators ──
# ── shared: padded vocabulary ──
def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """vocab_size, rounded up to a multiple of multiple·tp. Source: section 5.1 of the paper."""
    return math.ceil(vocab_size / (multiple * tp)) * multiple * tp


# ── end of padded vocabulary ──
# ── shared: vocabulary loss ──
class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BSv, targets_BS, vocab_size, ignore_index, group):
        v = logits_BSv.shape[-1]
        first_word = group_rank(group) * v
        wide = torch.promote_types(logits_BSv.dtype, torch.float32)  # at least fp32; float64 stays float64
        is_word_v = torch.arange(first_word, first_word + v, device=logits_BSv.device) < vocab_size
        x_BSv = logits_BSv.to(wide).masked_fill(~is_word_v, -torch.inf)  # a copy: the caller's stay as they were

        x_BSv.sub_(_all_reduce(x_BSv.amax(-1), group, dist.ReduceOp.MAX)[..., None])

        # Which targets are my words? For the others any index will do: what it picks is not used.
        mine_BS = (targets_BS >= first_word) & (targets_BS < first_word + v)
        index_BS1 = (targets_BS - first_word).clamp(0, v - 1)[..., None]
        # A product with mine_BS in place of where() would make NaN of 0 · −inf.
        partial_target_BS = torch.where(mine_BS, x_BSv.gather(-1, index_BS1)[..., 0], 0)
        exp_BSv = x_BSv.exp_()

        # One message instead of two: both summands travel side by side.
        target_BS, sum_BS = _all_reduce(torch.stack([partial_target_BS, exp_BSv.sum(-1)]), group)

        counts_BS = targets_BS != ignore_index
        ctx.save_for_backward(exp_BSv.div_(sum_BS[..., None]), index_BS1, mine_BS, counts_BS)
        ctx.dtype = logits_BSv.dtype
        return torch.where(counts_BS, sum_BS.log() - target_BS, 0)  # whole, and the same on every rank

    @staticmethod
    def backward(ctx, grad_BS):
        softmax_BSv, index_BS1, mine_BS, counts_BS = ctx.saved_tensors
        grad_BS = torch.where(counts_BS, grad_BS, 0)
        grad_BSv = softmax_BSv * grad_BS[..., None]
        grad_BSv.scatter_add_(-1, index_BS1, -(grad_BS * mine_BS)[..., None])
        return grad_BSv.to(ctx.dtype), None, None, None, None


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

    Source: section 3 of the paper. Needs: `_VocabParallelCrossEntropy`, `_all_reduce`, `_readable`, `group_size`,
    `group_rank`.
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
    return _VocabParallelCrossEntropy.apply(logits_BSv, targets_BS, vocab_size, ignore_index, group)


# ── end of vocabulary loss ──


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────
# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────────────
# ── 5 The paper's arithmetic ────────────────────────────────────────────────────────────────────────────
# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────────────


# ── shared: text data ──
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
    """Tokens of a UTF-8 text, nine tenths to train on; without a path, of the sources of Python's own library."""

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


# ── end of text data ──
# Explained in chapter 1, at its end.
# ── shared: counter ──
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


# ── end of counter ──
# ── shared: claims table ──
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


# ── end of claims table ──
# ── shared: flags ──
def common_flags(description: str, steps: int) -> argparse.ArgumentParser:
    """The flags that every chapter has; `parse_flags` reads them."""
    shown = dict(usage="%(prog)s [flags]; --help lists them", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser = argparse.ArgumentParser(description=description, **shown)
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
    if args.steps < 0 or args.timeout <= 0:
        parser.error(f"--steps {args.steps} and --timeout {args.timeout}: not below zero, and above zero")
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    args.ranks, args.world_size = local, int(os.environ["WORLD_SIZE"]) if joined else local
    return args


# ── end of flags ──
# ── shared: launcher ──
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
    device_id = device if args.backend == "nccl" else None
    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout), device_id=device_id, **alone)
    dist.all_reduce(torch.ones(1, device=device))
    profile = torch.profiler.profile() if args.trace and dist.get_rank() == 0 else contextlib.nullcontext()
    try:
        with profile:
            main(args, device)
        dist.barrier()
    except RuntimeError as error:
        if "by peer" in str(error):  # another rank died, and we merely noticed: let torchrun find that one first
            time.sleep(5)
        raise
    if args.trace and dist.get_rank() == 0:
        profile.export_chrome_trace(args.trace)
    dist.destroy_process_group()


# ── end of launcher ──
