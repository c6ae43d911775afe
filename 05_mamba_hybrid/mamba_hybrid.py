# SPDX-License-Identifier: MIT-0
"""Chapter 5. Mamba-2 hybrids: a state of fixed size, trained in parallel, and a little attention.

Papers: An Empirical Study of Mamba-based Language Models, Waleffe et al., 2024, arXiv 2406.07887
        Nemotron-H, NVIDIA, 2025, arXiv 2504.03624;  Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444
        on top of Transformers are SSMs (Mamba-2), Dao and Gu, 2024, arXiv 2405.21060

The problem. Attention compares each token with all earlier ones, and decoding reads their keys and
values: at 64 thousand tokens 8 GiB per sequence of an 8B model. A recurrence needs a state of fixed
size only. But a loop over tokens is slow on a GPU, and the state is too small to recall everything.

The idea. One recurrence, computed in three ways: as a loop it decodes in constant memory; as a
masked matrix it is attention without softmax; in chunks it is both, with GEMMs inside the chunks
and a state from chunk to chunk. What a segment of tokens does to the state is one scalar and one
matrix per head. So ranks can also shard the *sequence*, and exchange these alone:

      rank 0: tokens a b c d        rank 1: tokens e f g h        rank 2: tokens i j k l
      ┌────────┐                    ┌────────┐                    ┌────────┐
      │ ◣      │─── decay, state ───│ ◣      │─── decay, state ───│ ◣      │   ◣ masked matrix
      │    ◣   │    all-gathered    │    ◣   │    all-gathered    │    ◣   │   of a chunk
      └────────┘                    └────────┘                    └────────┘

The message has the same size for 4 tokens and for 4 million. A hybrid then has a few attention
layers for exact recall: 4 of 56 layers in the first paper, called "the study" from here on.

Run it (no flag is needed; --help lists them):

    python 05_mamba_hybrid/mamba_hybrid.py                      2 local ranks, which share the heads
    python 05_mamba_hybrid/mamba_hybrid.py --ranks 1            one process, for a debugger
    python 05_mamba_hybrid/mamba_hybrid.py --ranks 3 --check    each tensor's error, nothing else
    torchrun --nproc-per-node=8 05_mamba_hybrid/mamba_hybrid.py
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        05_mamba_hybrid/mamba_hybrid.py

It proves in float64 that a scan with its tokens over ranks and a model with its heads over ranks
have every gradient of the single device. It trains a small hybrid on text next to the plain model,
and prints the claims that it has measured.

Left out: all layers with their tokens over ranks, and more ranks than groups (context_parallel.py);
decoding and published weights (load_nemotron_h.py); a backward pass by hand (fast_scan.py); the
papers' models and tables (mamba_hybrid_tables.py); fused kernels; data parallelism and a sharded
vocabulary (chapters 1, 2); mixture-of-experts layers and FP8 (chapter 6).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension; a digit is a literal size. A CAPITAL is
# the full dimension. The small letter is this rank's shard of it. partial_ marks a partial sum. The
# letters are those of the Mamba-2 paper and its code:
#
#     B  batch                          H  heads                      tp  ranks that share the heads
#     T  sequence length, in tokens     P  size of a head             t  this rank's tokens, in 1.2
#     D  model width (d_model)          N  size of a state (d_state)  K  taps of the convolution
#     F  feed-forward size              G  groups of R = H / G heads  C  channels
#     V  vocabulary entries             Q  tokens of a chunk          S  tokens that attention sees
#
# Differences from the other chapters: D is their H, T their S, H their N, and P their D. Where the
# paper uses a letter twice, so do we: B_BTGN and C_BTGN are the projections B and C, D_H is the
# skip parameter D, and L_BGRQQ the mask L. X is dt · x, and a is dt · A. An attention layer has its
# own H, G and P.
#
# "region carried" marks code that is copied from its home, and stands at the end of the file.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

Group = dist.ProcessGroup | None  # None: all ranks
StateDict = dict[str, Tensor]
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast
Documents = Tensor | None  # an index for each token, or True where one begins; None: one document
Batch = tuple[Tensor, ...]  # tokens_BT, targets_BT (−100 does not count), and maybe starts_BT
Errors = dict[str, float]  # by the name of a tensor
Scanned = tuple[Tensor, Tensor]  # y (B, T, H, P), and the state after the last token (B, H, P, N)


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 One recurrence, computed in three ways ──────────────────────────────────────────────────
#
# A head of Mamba-2 has a state of fixed size, a P × N matrix. At each token the state decays, is
# written once and is read once:
#
#     state ← exp(dt·A) · state  +  dt · x ⊗ B          write the value x (P) under the key B (N)
#     y     = state · C  (+ D · x)                      read with the query C (N); D skips the state
#
# dt > 0, x, B and C are computed from the token; A < 0 is one learned scalar per head. So a = dt·A
# is the log of the decay. With a large dt the head forgets the past and stores this token; with dt
# near 0 it skips the token.
#
# Write out three tokens, with X = dt·x. When token 2 reads, the write of token 1 has decayed once,
# that of token 0 twice, and its own not at all:
#
#     state = X₂ ⊗ B₂  +  exp(a₂) X₁ ⊗ B₁  +  exp(a₁ + a₂) X₀ ⊗ B₀
#     y₂    = (C₂·B₂) X₂  +  exp(a₂) (C₂·B₁) X₁  +  exp(a₁ + a₂) (C₂·B₀) X₀
#
# The second line has no state: (X ⊗ B)·C is X times the scalar C·B, query times key. This is
# attention without softmax, with a mask L of decays in place of ones:
#
#     y = (L ∘ C Bᵀ) X          L_ij = exp(a_{j+1} + … + a_i) for j ≤ i, else 0
#
# Loop and matrix can be mixed. Let e be the last token of the chunk of j, and i a token of a later
# chunk. The exponential of a sum is a product:
#
#     L_ij (C_i·B_j) X_j   =   exp(a_{e+1} + … + a_i) C_i  ·  [ exp(a_{j+1} + … + a_e) X_j ⊗ B_j ]
#
# The bracket does not depend on i. Summed over the tokens j of a chunk, it is the state after that
# chunk, for all later tokens. So there are three ways (SSD, state space duality):
#
#     ssd_recurrent    a loop           T steps, constant memory                for decoding
#     ssd_quadratic    a masked matrix  four GEMMs, work ~ T²                   for short sequences
#     ssd              chunks of both   four GEMMs per chunk, work ~ T · Q      for training
#
#     ┌───────┐       L of three chunks. ◣ is the masked matrix of a chunk. Each block ■ below the
#     │ ◣     │       diagonal has rank N at most: what a later chunk reads of an earlier one passes
#     │ ■ ◣   │       through the state between them, P · N values.
#     │ ■ ■ ◣ │
#     └───────┘
#
# First L. Decays multiply over thousands of tokens, so we add logarithms, and exp comes last:
#
# · Above the diagonal the sums are positive, and exp of them overflows. A mask after exp gives the
#   right L and a NaN gradient, 0 · ∞. So −∞ is filled in *before* exp.
# · A sum over a segment is a difference of two running sums. In fp32 both may be near −5,000 and
#   exact to 3e-4 only, and so is the difference. In float64 they are exact enough, for T values.
# · The diagonal is the constant 0. As s_i − s_i it would have two gradients, which cancel up to
#   rounding. In a head that forgets within a token there is no other gradient: with dt·A = −50 that
#   of A would be off by 3 %, in float64 too.


def segsum(a: Tensor) -> Tensor:
    """log L, segment sums: [i, j] is a_{j+1} + … + a_i for j ≤ i (0 on the diagonal), else −∞.

    Args: a (..., T), logs of decays. Returns: (..., T, T) in a's dtype. Source: Mamba-2, section 6.
    """
    sums = a.to(torch.float64).cumsum(-1)
    after = sums[..., :, None]
    before = sums[..., None, :]
    segments = (after - before).to(a.dtype)
    future = segments.new_full(segments.shape[-2:], -torch.inf)  # (T, T)
    return segments.tril(-1) + future.triu(1)


# Documents that are packed into one sequence must not see each other. Where one begins, the state
# is forgotten, by a decay: exp(−1000) is 0 in every dtype. (Not −∞: later differences of running
# sums would be ∞ − ∞.)


def log_decay(dt: Tensor, A: Tensor, starts: Documents = None) -> Tensor:
    """a = dt · A, the log of each token's decay, (B, T, H), at least fp32.

    Args: dt (B, T, H); A (H); starts: bool (B, T), True where a document begins.
    Source: Mamba-2; documents: ours.
    """
    a_BTH = at_least_fp32(dt) * A
    if starts is None:
        return a_BTH
    return a_BTH - 1000.0 * starts[..., None]


# dt is in two places: X = dt·x and a = dt·A. (In B as well, the write would scale with dt².) So all
# forms have the arguments of the paper's listing: X, a, B and C.
#
# Heads come in groups that share B and C, as in grouped-query attention: heads 0 … R−1 are group 0.
# So C Bᵀ is computed once per group. `_scan` brings the arguments into the layout (B, G, R, T, ·),
# with T second to last in each, and into at least fp32.
#
# In training the weights are fp32, and autocast computes GEMMs in bf16. A projection allows that:
# its errors of 0.4 % are independent of each other. A state is a sum over thousands of tokens, and
# bf16 has 8 bits: 256 + 1 = 256. So autocast is off in here. No dtype would show it if it were on:
# results are fp32 all the same.


def _scan(
    form: Callable, X: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> Scanned:
    batch, T, H, P = X.shape
    G = B.shape[2]
    with torch.autocast(X.device.type, enabled=False):
        if state is None:
            state = X.new_zeros(batch, H, P, B.shape[3])
        state_BGRPN = rearrange(at_least_fp32(state), "B (G R) P N -> B G R P N", G=G)
        X_BGRTP = rearrange(at_least_fp32(X), "B T (G R) P -> B G R T P", G=G)
        a_BGRT1 = rearrange(at_least_fp32(a), "B T (G R) -> B G R T 1", G=G, T=T)
        B_BG1TN = rearrange(at_least_fp32(B), "B T G N -> B G 1 T N", T=T)
        C_BG1TN = rearrange(at_least_fp32(C), "B T G N -> B G 1 T N", T=T)
        y_BGRTP, state_BGRPN = form(state_BGRPN, X_BGRTP, a_BGRT1, B_BG1TN, C_BG1TN)
    y_BTHP = rearrange(y_BGRTP, "B G R T P -> B T (G R) P")
    return y_BTHP, rearrange(state_BGRPN, "B G R P N -> B (G R) P N")


# The loop is the recurrence as it stands above: a line for the state, and one for the output.


def _steps(state_BGRPN: Tensor, *inputs: Tensor) -> Scanned:
    y = []
    tokens = [x.unbind(-2) for x in inputs]
    for X_BGRP, a_BGR1, B_BG1N, C_BG1N in zip(*tokens):
        write_BGRPN = X_BGRP[..., None] * B_BG1N[..., None, :]
        state_BGRPN = a_BGR1[..., None].exp() * state_BGRPN + write_BGRPN
        read_BGRPN = state_BGRPN * C_BG1N[..., None, :]
        y.append(read_BGRPN.sum(-1))
    return torch.stack(y, -2) if y else inputs[0], state_BGRPN


def ssd_recurrent(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> Scanned:
    """The recurrence as a loop. With one token and a state it is one step of decoding.

    Args: X, a, B, C and initial_state as `ssd`'s. Returns: as `ssd`. Source: Mamba-2.
    """
    return _scan(_steps, X, a, B, C, initial_state)


# The masked matrix, for a chunk. A chunk needs two more terms. The state before it adds to each y,
# and has decayed by all a from the first token on (kept). And each token adds to the state after
# the chunk what is left of it at the end: the last row of L.


def _kept(a: Tensor) -> Tensor:
    """exp(a_0 + … + a_i): the part of the state before the first token that is left at token i.

    Args: a (..., T, H), or (..., T, 1). Returns: its shape and dtype.
    """
    sums = a.to(torch.float64).cumsum(-2)
    return sums.to(a.dtype).exp()


def _chunk(
    state_BGRPN: Tensor, X_BGRQP: Tensor, a_BGRQ1: Tensor, B_BG1QN: Tensor, C_BG1QN: Tensor
) -> Scanned:
    L_BGRQQ = segsum(a_BGRQ1[..., 0]).exp()
    kept_BGRQ1 = _kept(a_BGRQ1)
    end_BGRQ1 = L_BGRQQ[..., -1, :, None]
    within_BGRQP = (L_BGRQQ * (C_BG1QN @ B_BG1QN.mT)) @ X_BGRQP
    before_BGRQP = kept_BGRQ1 * (C_BG1QN @ state_BGRPN.mT)
    write_BGRPN = (end_BGRQ1 * X_BGRQP).mT @ B_BG1QN
    return within_BGRQP + before_BGRQP, kept_BGRQ1[..., -1:, :] * state_BGRPN + write_BGRPN


def ssd_quadratic(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> Scanned:
    """The masked matrix, T > 0 tokens at once: work and memory grow with T².

    Args: X, a, B, C and initial_state as `ssd`'s. Returns: as `ssd`. Source: Mamba-2.
    """
    return _scan(_chunk, X, a, B, C, initial_state)


# Chunks of both: `_chunk` for one chunk after the other, with the state handed on. The last chunk
# may be short; nothing is padded. Autograd alone would keep several Q × Q matrices per head and
# chunk until backward. So each chunk is checkpointed: only the inputs and the state before the
# chunk are kept, and backward computes the matrices again.
#
# That repeats GEMMs whose results backward does not need. fast_scan.py writes the chain rule out by
# hand: the same memory, and about 0.7 times the time of this scan.


def _chunks(chunk: int, state_BGRPN: Tensor, *inputs: Tensor) -> Scanned:
    if not inputs[0].shape[-2]:
        return inputs[0], state_BGRPN
    y = []
    # split, and not x[..., i : j, :]: the gradient of each such slice is a tensor of x's full size.
    for of_chunk in zip(*(x.split(chunk, -2) for x in inputs)):
        y_BGRQP, state_BGRPN = checkpoint(
            _chunk, state_BGRPN, *of_chunk, use_reentrant=False, preserve_rng_state=False
        )
        y.append(y_BGRQP)
    return torch.cat(y, -2), state_BGRPN


def ssd(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, chunk: int, initial_state: Tensor | None = None
) -> Scanned:
    """The recurrence of Mamba-2 in chunks: y_i = state_i C_i.

    Args:
        X: dt · x, (B, T, H, P), any T. a: dt · A, at most 0, (B, T, H).
        B, C: (B, T, G, N); heads g·R to (g + 1)·R − 1, R = H / G, use those of group g.
        chunk: Q; the results do not depend on it. Work is T · (Q · (P + N) + P · N) per head.
        initial_state: (B, H, P, N); None: zeros.

    Returns: y (B, T, H, P), and the state after the last token (B, H, P, N), both at least fp32, as
        is all arithmetic. Backward keeps the inputs and T / Q states.
    Raises: ValueError where groups do not divide heads, or chunk < 1; EinopsError for another T.
    Source: Mamba-2, section 6 and listing 1 of arXiv 2405.21060; the loop over chunks: ours.
    """
    if X.shape[2] % B.shape[2] or chunk < 1:
        found = f"{X.shape[2]} heads in {B.shape[2]} groups, chunk={chunk}"
        raise ValueError(f"{found}: groups must divide heads, and chunk be at least 1")
    return _scan(partial(_chunks, chunk), X, a, B, C, initial_state)


# ── 1.2 The sequence over ranks: pass the state on ──────────────────────────────────────────────
#
# What does a segment of tokens do to the state before it? One token makes exp(a)·state + X ⊗ B of
# it: a scalar times the state, plus a matrix. Two tokens do the same,
#
#     d₂ (d₁ · state + b₁) + b₂   =   d₂ d₁ · state  +  (d₂ b₁ + b₂)        d = exp(a), b = X ⊗ B
#
# and so do a million:
#
#     state ← decay · state + own        decay = exp of the sum of all a;  own: the scan from zero
#
# Each rank computes both alone. They are all-gathered, H·P·N values per sequence and rank, and one
# decay per head. Each rank composes those of the ranks before it (an exclusive scan over ranks),
# and adds what the incoming state contributes to its outputs:
#
#       rank 0                  rank 1                  rank 2
#       scan from zero          scan from zero          scan from zero            no communication
#       decay, own ─────────────────────────────────────────── all-gather
#       in = 0                  in = own₀               in = decay₁·own₀ + own₁
#                       y_i += exp(a_0 + … + a_i) · in · C_i                      no communication
#
# decay is that of the rank's whole segment, not of its last chunk. On two ranks only the last state
# shows this mistake, because what enters rank 1 needs no decay.
#
# With scalars: the ranks' tokens leave own = 8, 4 and 2 from zero, and their decays are 1/2, 1/4
# and 1/2. Then in = 0 on rank 0, 8 on rank 1, and 1/4 · 8 + 4 = 6 on rank 2. The last state is
# 1/2 · 6 + 2 = 5, as it is without ranks: (8 · 1/4 + 4) · 1/2 + 2.
#
# The gather is an operator of its own, with its conjugate:
#
#     forward     all-gather; what comes from this rank and later ones is replaced by zeros
#     backward    reduce-scatter: all later ranks have used this rank's x
#
# Zeros, and not a shorter list: on rank 0 that list would be empty, its graph would not lead to the
# reduce-scatter, and the other ranks would wait for it. (Half of the bytes are sent for nothing;
# sends to each later rank would save them.)


def _from_earlier(x: Tensor, group: Group) -> Tensor:
    x_of_ranks = torch.stack(_all_gather(x, group).chunk(group_size(group), -1))
    x_of_ranks[group_rank(group) :] = 0
    return x_of_ranks


def _to_earlier(partial_of_ranks: Tensor, group: Group) -> Tensor:
    # A copy, not a view of the incoming gradient, which may have other users.
    partial_of_ranks = partial_of_ranks.clone(memory_format=torch.contiguous_format)
    partial_of_ranks[group_rank(group) :] = 0
    total = torch.empty_like(partial_of_ranks[0])
    dist.reduce_scatter(total, list(partial_of_ranks), group=group)
    return total


def from_earlier_ranks(x: Tensor, group: Group = None) -> Tensor:
    """x of the earlier ranks, (ranks, *x.shape); zeros at this rank's index and the later ones.

    The gradient is the sum of the later ranks' gradients. Collective in forward and in backward.
    Args: x (...), of one shape on every rank. Source: ours.
    """
    if group_size(group) == 1:
        return x.new_zeros(1, *x.shape)
    return _Conjugate.apply(x, group, _from_earlier, _to_earlier)


def ssd_context_parallel(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, chunk: int, group: Group = None
) -> Scanned:
    """`ssd` over a sequence that is sharded over `group`, in any lengths but 0. Collective.

    Args: X, a, B, C and chunk as `ssd`'s, of this rank's tokens.
    Returns: y (B, t, H, P), and the state after its last token: the last rank has the sequence's.
    Sends H·P·(N + 1) values per sequence and rank, in forward and in backward, for any length.
    Source: derived above; the operator of Mamba's parallel scan (Gu and Dao, 2023).
    """
    y_BtHP, own_BHPN = ssd(X, a, B, C, chunk)
    if group_size(group) == 1:
        return y_BtHP, own_BHPN
    kept_BtH1 = _kept(at_least_fp32(a))[..., None]
    decay_BH11 = kept_BtH1[:, -1, :, None]
    decay_BHP1 = decay_BH11.expand_as(own_BHPN[..., :1])
    # One message: the decay is one more column of the state.
    of_ranks = from_earlier_ranks(torch.cat([own_BHPN, decay_BHP1], -1), group)
    own_of_ranks = of_ranks[..., :-1]
    decay_of_ranks = of_ranks[..., -1:]
    in_BHPN = own_of_ranks[0]  # right on rank 1; on rank 0 these are zeros
    for rank in range(1, group_rank(group)):
        in_BHPN = decay_of_ranks[rank] * in_BHPN + own_of_ranks[rank]
    heads_of_group = X.shape[2] // C.shape[2]  # R
    with torch.autocast(X.device.type, enabled=False):
        C_BtHN = at_least_fp32(C).repeat_interleave(heads_of_group, 2)
        read_BtHP = einsum(C_BtHN, in_BHPN, "B t H N, B H P N -> B t H P")
    y_BtHP = y_BtHP + kept_BtH1 * read_BtHP
    return y_BtHP, own_BHPN + decay_BH11 * in_BHPN


# Every layer only looks back, so the same operator gives the convolution the last K − 1 inputs of
# the rank before, and attention all earlier keys and values. The latter message grows with the
# sequence: the price of exact recall. context_parallel.py has these two, and the full model.
#
# Megatron-LM's context parallelism exchanges tokens for heads by an all-to-all (chapter 6) before
# the convolution, and back after the scan. Its messages are as large as the activations.

# ── 1.3 Heads over ranks ────────────────────────────────────────────────────────────────────────
#
# Tensor parallelism is chapter 2's: project to this rank's heads, compute, project back to a
# partial sum. The Mamba layer computes each channel of the convolution, each head of the recurrence
# and each group of the norm alone. So a rank's layer is the *plain* layer with smaller sizes,
# between the operators of chapter 2:
#
#     x_BTD ─ norm ─ copy_to_tp ─ plain layer of H / tp heads ─ reduce_from_tp ─ + x
#
# That is one all-reduce in forward and one in backward. tp must divide heads and groups. (More
# ranks than groups need copies of B and C, whose gradients are partial sums: context_parallel.py.)
#
# Only the split of in_proj is new: its rows are [z, x, B, C, dt], so the first half of the rows is
# not the first half of the heads. Each of the five is sharded separately (part 3).

# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class HybridConfig:
    """Sizes of a hybrid; `flag` makes a field a flag too. Raises ValueError where they clash."""

    vocab_size: int = 256
    hidden_size: int = flag(128, "model width, D", least=1)
    pattern: str = flag("M-M*-M-", "one letter per layer: M Mamba-2, * attention, - feed-forward")
    ffn_hidden_size: int = flag(512, "feed-forward size, F; tp must divide it", least=1)
    mamba_heads: int = flag(8, "heads of a Mamba layer, H; tp must divide them", least=1)
    mamba_head_size: int = 32  # P
    mamba_groups: int = flag(2, "groups of heads that share B and C, G", least=1)
    state_size: int = flag(32, "size of a state, N", least=1)
    conv_kernel: int = 4  # K
    chunk: int = flag(64, "tokens of a chunk, Q", least=1)
    attention_heads: int = flag(4, "query heads; tp must divide them", least=1)
    attention_groups: int = flag(2, "groups of them that share keys and values", least=1)
    attention_head_size: int = 32
    norm_eps: float = 1e-5
    init_std: float = 0.02
    A_init: tuple[float, float] = (1.0, 16.0)  # initial −A of a head: uniform in this range
    dt_init: tuple[float, float] = (1e-3, 0.1)  # initial dt: log-uniform in this range
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        if not self.pattern or set(self.pattern) - set("M*-"):
            text = f"pattern={self.pattern!r}: write M, * or - for each layer"
            raise ValueError(f"{text}, and nothing else")
        for name, value in vars(self).items():
            least = 2 if name == "conv_kernel" else 1
            if isinstance(value, int) and name != "seed" and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")
        for kind in ("mamba", "attention"):
            heads = getattr(self, f"{kind}_heads")
            groups = getattr(self, f"{kind}_groups")
            if heads % groups:
                sizes = f"{kind}_heads={heads} do not divide into {kind}_groups={groups}"
                raise ValueError(f"{sizes}: choose a multiple")


# ── 2.1 Layers ──────────────────────────────────────────────────────────────────────────────────
#
#     x_BTD ──· in_proj ──► z │ x  B  C │ dt      one GEMM, 2·H·P + 2·G·N + H outputs in this order
#                           │ └─ conv ─┘  │
#                           │    silu   softplus(dt + dt_bias)
#                           │      └─ ssd ─┘      A = −exp(A_log), which no optimizer step makes > 0
#                       silu(z) ─────·            the gate, then the norm: they do not commute
#                              grouped norm       one mean square for each group of heads
#                                out_proj ──► y_BTD
#
# The grouped norm is what makes tensor parallelism by heads possible without a message.
#
# Sizes of Nemotron-H-8B: D is 4,096, with 128 heads of 64 in 8 groups, and N is 128. So in_proj has
# 2 · 8,192 + 2 · 1,024 + 128 = 18,560 outputs. The states of a layer are 128 · 64 · 128 values,
# 4 MiB in fp32, for any number of tokens; each of its four attention layers keeps 4 KiB per token.
#
# Layers look back at earlier tokens. These are in x, or on other ranks, or have passed the model
# before. So each place that looks back is a method of its own: `with_earlier_inputs`, `scan` and
# `attend`. context_parallel.py overrides these three alone, and so does decoding
# (load_nemotron_h.py), which keeps a state for each layer.
#
# Where documents are packed into one sequence, nothing may pass from one to the next, in any kind
# of layer: the recurrence forgets, convolution and attention are masked. A `Span` is what a layer
# is told of its tokens.


@dataclass(frozen=True)
class Span:
    """Which tokens of their sequences a layer's input x_BTD is: the last T of document_BS."""

    document_BS: Documents = None  # document index of each token up to their last; None: one


ALL = Span()  # one document


def last_documents(document_BS: Documents, T: int, earlier: int) -> Documents:
    """Document indices of the last T tokens and of `earlier` tokens before; None stays None.

    Args: document_BS, of all S tokens. Returns: (B, earlier + T). Before the first token of all,
    its own index is repeated: layers have zeros there.
    """
    if document_BS is None:
        return None
    S = document_BS.shape[1]
    index = torch.arange(S - T - earlier, S, device=document_BS.device)
    return document_BS[:, index.clamp(min=0)]


# The convolution lets a token mix with the K − 1 before it, channel by channel, before B and C are
# made of it. It is a loop over taps, and not F.conv1d, which could not mask the documents.


def causal_conv1d(
    u: Tensor, weight_CK: Tensor, bias_C: Tensor, document: Documents = None
) -> Tensor:
    """Each channel's weighted sum of its last K inputs, (B, T, C); the last weight is the newest's.

    Args: u: (B, K − 1 + T, C), the inputs and the K − 1 before them (zeros where there are none).
        document: (B, K − 1 + T), document indices of u; inputs of another document count as zeros.
    Source: Mamba.
    """
    K = weight_CK.shape[1]
    T = u.shape[1] - K + 1
    y_BTC = bias_C
    for tap in range(K):
        input_BTC = u[:, tap : tap + T]
        if document is not None:
            own_BT = document[:, K - 1 :]
            is_same_BT = document[:, tap : tap + T] == own_BT
            input_BTC = input_BTC * is_same_BT[..., None]
        y_BTC = torch.addcmul(y_BTC, input_BTC, weight_CK[:, tap])
    return y_BTC.to(u.dtype)


class RMSNorm(nn.Module):
    """x / √(mean of x² + eps) · weight, x_BTC to (B, T, C), in fp32.

    Args: groups: slices of the last dimension with a mean of their own.
    """

    def __init__(self, size: int, eps: float = 1e-5, groups: int = 1):
        super().__init__()
        self.eps = eps
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(size))

    def mean_square(self, x_BTGC: Tensor) -> Tensor:
        return x_BTGC.square().mean(-1, keepdim=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTGC = at_least_fp32(x_BTC).unflatten(-1, (self.groups, -1))
        y_BTGC = x_BTGC * (self.mean_square(x_BTGC) + self.eps).rsqrt()
        y_BTC = y_BTGC.flatten(-2) * self.weight
        return y_BTC.to(x_BTC.dtype)


class Mamba2Mixer(nn.Module):
    """A Mamba-2 layer without its norm and residual connection, x_BTD to (B, T, D).

    Args of `scan`: X, a, B and C as `ssd`'s.
    Source: Mamba-2; the order of in_proj's rows is that of the published models.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        H = config.mamba_heads
        inner = H * config.mamba_head_size
        group = config.mamba_groups * config.state_size  # of B, or of C
        channels = inner + 2 * group
        self.convolved = [inner, group, group]  # x, B, C
        self.projected = [inner, channels, H]  # z, those three, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projected), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(inner, config.norm_eps, config.mamba_groups)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        for name, p in self.named_parameters():
            if not p.is_meta:
                p.data.copy_(initial_value(name, p.shape, config))

    def forward(self, x_BTD: Tensor, span: Span = ALL) -> Tensor:
        T = x_BTD.shape[1]
        P = self.config.mamba_head_size
        N = self.config.state_size
        K = self.config.conv_kernel  # taps
        projected = self.in_proj(x_BTD)
        z_BTC, u_BTC, dt_BTH = projected.split(self.projected, -1)
        document = last_documents(span.document_BS, T, K - 1)
        u = self.with_earlier_inputs(u_BTC, span)
        v_BTC = F.silu(causal_conv1d(u, self.conv_weight, self.conv_bias, document))
        x_BTC, B_BTC, C_BTC = v_BTC.split(self.convolved, -1)
        x_BTHP = rearrange(at_least_fp32(x_BTC), "B T (H P) -> B T H P", P=P)
        B_BTGN = rearrange(B_BTC, "B T (G N) -> B T G N", N=N)
        C_BTGN = rearrange(C_BTC, "B T (G N) -> B T G N", N=N)
        dt_BTH = F.softplus(at_least_fp32(dt_BTH) + self.dt_bias)
        X_BTHP = dt_BTH[..., None] * x_BTHP
        A_H = -at_least_fp32(self.A_log).exp()
        starts_BT = None
        if document is not None:
            starts_BT = document.diff()[:, K - 2 :] != 0
        a_BTH = log_decay(dt_BTH, A_H, starts_BT)
        y_BTHP = self.scan(X_BTHP, a_BTH, B_BTGN, C_BTGN, span)
        y_BTHP = y_BTHP + self.D[:, None] * x_BTHP
        y_BTC = rearrange(y_BTHP, "B T H P -> B T (H P)")
        # norm(y · silu(z)); norm(y) · silu(z) is another function.
        gated_BTC = y_BTC * F.silu(at_least_fp32(z_BTC))
        y_BTC = self.norm(gated_BTC).to(x_BTD.dtype)
        return self.out_proj(y_BTC)

    def with_earlier_inputs(self, u_BTC: Tensor, span: Span) -> Tensor:
        """u_BTC after the K − 1 inputs of the convolution before it: here zeros."""
        return F.pad(u_BTC, (0, 0, self.config.conv_kernel - 1, 0))

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: Span) -> Tensor:
        """y (B, T, H, P), of arguments as `ssd`'s: here from a zero state."""
        return ssd(X, a, B, C, self.config.chunk)[0]


# Query heads share keys and values in groups. There is no position embedding, because the Mamba
# layers are sensitive to order: attention alone would not notice two earlier tokens that are
# swapped. Without a mask `scaled_dot_product_attention` chooses a kernel that skips the future.


def causal_mask(T: int, S: int, document_BS: Documents, device: torch.device) -> Tensor | None:
    """Which of S tokens the last T see, (T, S) or (B, 1, T, S); None: plainly causal, T = S."""
    if document_BS is None and T == S:
        return None
    mask_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if document_BS is None:
        return mask_TS
    own_BT1 = document_BS[:, S - T :, None]
    is_same_BTS = own_BT1 == document_BS[:, None, :]
    return (mask_TS & is_same_BTS)[:, None]


class Attention(nn.Module):
    """Causal grouped-query attention, x_BTD to (B, T, D). Source: the study."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        P = config.attention_head_size
        self.q_proj = nn.Linear(D, config.attention_heads * P, bias=False)
        self.k_proj = nn.Linear(D, config.attention_groups * P, bias=False)
        self.v_proj = nn.Linear(D, config.attention_groups * P, bias=False)
        self.o_proj = nn.Linear(config.attention_heads * P, D, bias=False)

    def forward(self, x_BTD: Tensor, span: Span = ALL) -> Tensor:
        by_head = partial(
            rearrange, pattern="B T (H P) -> B H T P", P=self.config.attention_head_size
        )
        q_BHTP = by_head(self.q_proj(x_BTD))
        k_BGTP = by_head(self.k_proj(x_BTD))
        v_BGTP = by_head(self.v_proj(x_BTD))
        y_BHTP = self.attend(q_BHTP, k_BGTP, v_BGTP, span)
        return self.o_proj(rearrange(y_BHTP, "B H T P -> B T (H P)"))

    def attend(self, q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, span: Span) -> Tensor:
        """The heads' outputs (B, H, T, P): here all S keys are those of x."""
        T = q_BHTP.shape[2]
        S = k_BGSP.shape[2]
        mask = causal_mask(T, S, span.document_BS, q_BHTP.device)
        return F.scaled_dot_product_attention(
            q_BHTP, k_BGSP, v_BGSP, mask, is_causal=mask is None, enable_gqa=True
        )


class SquaredReLUMLP(nn.Module):
    """The feed-forward layer relu(x W1)² W2, x_BTD to (B, T, D). Source: Nemotron-H."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, span: Span = ALL) -> Tensor:
        y_BTF = F.relu(self.up_proj(x_BTD)).square()
        return self.down_proj(y_BTF)


# ── 2.2 The plain model ─────────────────────────────────────────────────────────────────────────
#
# Each letter of the pattern is one layer with norm and residual connection, x + f(norm(x)):
# attention and its feed-forward layer are two. There is no bias but in the convolution, and the
# output layer is not tied to the embedding. `run` and `after_backward` are what the parallel model
# overrides.

LAYERS = {"M": Mamba2Mixer, "*": Attention, "-": SquaredReLUMLP}


class HybridLM(nn.Module):
    """The single-device model: tokens_BT (int64) to logits_BTV.

    starts_BT: bool, True where a document begins, for documents packed into one sequence: nothing
    passes from one to the next. Raises: RuntimeError where it is not bool, or of another shape.

    Args: layers: what to build for each letter of the pattern.
    Source: the study; Nemotron-H.
    """

    def __init__(self, config: HybridConfig, layers: dict[str, Callable] = LAYERS):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList()
        for letter in config.pattern:
            norm = RMSNorm(D, config.norm_eps)
            mixer = layers[letter](config)
            self.layers.append(nn.ModuleDict({"norm": norm, "mixer": mixer}))
        self.final_norm = RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:  # on "meta" there are shapes without memory
            self.load_state_dict(dict(initial_weights(config)))

    def forward(self, tokens_BT: Tensor, starts_BT: Documents = None) -> Tensor:
        span = ALL
        if starts_BT is not None:
            span = Span(torch.zeros_like(tokens_BT).masked_fill_(starts_BT, 1).cumsum(1))
        return self.logits(tokens_BT, span)

    def logits(self, tokens_BT: Tensor, span: Span) -> Tensor:
        """(B, T, V), of tokens that `span` describes."""
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTD = self.run(layer, x_BTD, span)
        return self.head(self.final_norm(x_BTD))

    def run(self, layer: nn.ModuleDict, x_BTD: Tensor, span: Span) -> Tensor:
        """One layer with its norm and residual connection."""
        return x_BTD + layer["mixer"](layer["norm"](x_BTD), span)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Documents = None) -> Tensor:
        """Cross entropy per token in nats, (B, T), at least fp32; 0 where the target is −100."""
        logits_BTV = at_least_fp32(self(tokens_BT, starts_BT))
        logits_BVT = rearrange(logits_BTV, "B T V -> B V T")
        return F.cross_entropy(logits_BVT, targets_BT, ignore_index=-100, reduction="none")

    def after_backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's loss, and the norm of the gradient: two scalars."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        return loss.detach(), nn.utils.get_total_norm(grads)


# The initial dt and A decide what a Mamba layer can learn: over the heads, exp(dt·A) must range
# from "forget within a few tokens" to "keep for a thousand". dt_bias is softplus's inverse of the
# drawn dt. The matrices that write to the residual stream are smaller by 1/√L, for L layers.


def initial_value(
    name: str, shape: torch.Size, config: HybridConfig, generator: torch.Generator | None = None
) -> Tensor:
    """The initial value of parameter `name`, of that shape, fp32, drawn on the CPU: a GPU draws
    other values.

    Source: Mamba-2.
    """
    x = torch.empty(shape, device="cpu")
    kind = name.split(".")[-1]
    if kind == "A_log":
        return x.uniform_(*config.A_init, generator=generator).log()
    if kind == "dt_bias":
        low, high = config.dt_init
        log_dt = x.uniform_(math.log(low), math.log(high), generator=generator)
        dt = log_dt.exp().clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    if kind in ("conv_weight", "conv_bias"):
        bound = config.conv_kernel**-0.5
        return x.uniform_(-bound, bound, generator=generator)
    if len(shape) < 2:  # D, and the norms' weights
        return x.fill_(1)
    std = config.init_std
    if name.split(".")[-2] in ("out_proj", "o_proj", "down_proj"):
        std /= math.sqrt(len(config.pattern))
    return x.normal_(0, std, generator=generator)


def parameter_shapes(config: HybridConfig) -> dict[str, torch.Size]:
    """Name to shape of every parameter of the plain model, without memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in HybridLM(config).named_parameters()}


def initial_weights(config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """The full initial weights, a function of `config` alone, one tensor at a time, each in the
    shape of `parameter_shapes`."""
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in parameter_shapes(config).items():
        yield name, initial_value(name, shape, config, generator)


# ── 2.3 The parallel model ──────────────────────────────────────────────────────────────────────
#
# All layers are the plain model's, with the sizes of one rank. Every rank computes the same tokens.
# Embedding, output layer and norms of D channels are replicated: chapter 2 shards the first two.
#
# For example 8 heads in 2 groups, on two ranks: rank 1 builds a layer of 4 heads in one group, and
# its weights are those of heads 4 to 7. Group 1 has just these heads, so B and C of no other group
# are needed, and the norm's mean square is over these channels alone.

SHARDED_SIZES = {
    "M": ["mamba_heads", "mamba_groups"],
    "*": ["attention_heads", "attention_groups"],
    "-": ["ffn_hidden_size"],
}


def local_config(config: HybridConfig, tp: int) -> HybridConfig:
    """The sizes of what one of `tp` ranks holds.

    Raises: ValueError where heads, groups or features do not divide over tp. Source: Megatron-LM.
    """
    sizes = {}
    for kind in sorted(set(config.pattern)):
        for name in SHARDED_SIZES[kind]:
            size = getattr(config, name)
            if size % tp:
                text = f"{name}={size} does not divide over tp={tp} ranks"
                raise ValueError(f"{text}: choose a multiple of {tp}")
            sizes[name] = size // tp
    return replace(config, **sizes)


class ParallelHybridLM(HybridLM):
    """`HybridLM` with its heads and features over `group`: tokens_BT to logits_BTV, on each rank.

    Its weights are those of HybridLM(config), for every group; one full tensor at a time is in
    memory.
    Raises: ValueError where sizes do not divide. Source: Megatron-LM's layers.
    """

    def __init__(
        self, config: HybridConfig, group: Group = None, layers: dict[str, Callable] = LAYERS
    ):
        tp = group_size(group)
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(local_config(config, tp), layers)
        self.config = config
        self.group = group
        if torch.get_default_device().type == "meta":
            return
        shards = {}
        for name, full in initial_weights(config):
            shards[name] = shard_tensor(name, full, config, group_rank(group), tp)
        self.load_state_dict(shards, assign=True)  # puts them in place of the shapes

    def run(self, layer: nn.ModuleDict, x_BTD: Tensor, span: Span) -> Tensor:
        normed_BTD = copy_to_tp(layer["norm"](x_BTD), self.group)
        partial_y_BTD = layer["mixer"](normed_BTD, span)
        return x_BTD + reduce_from_tp(partial_y_BTD, self.group)

    def after_backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the norm of the full gradient, the same on every rank. Collective."""
        tp = group_size(self.group)
        total = torch.zeros_like(loss)
        for name, p in self.named_parameters():
            if p.grad is not None:
                square = at_least_fp32(p.grad).square().sum()
                total += square if is_sharded(name) else square / tp
        return loss.detach(), _all_reduce(total, self.group).sqrt()

    def gather(self, tensors: StateDict) -> StateDict:
        """`gather_state_dict` of this model's parameters or gradients, by name. Collective."""
        return gather_state_dict(tensors, self.config, self.group)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# The plain model's weights and the shards of any tp are the same numbers in other places, so a
# checkpoint of one is a checkpoint of all: shard → merge is exact to the bit.
#
# One table says how each parameter is sharded: its rows (or columns) are one or more components,
# and each component is sharded by itself. What the table does not have is replicated: embedding,
# output layer, norms of D channels.
#
#     in_proj.weight of 4 heads, 2 groups:   z z z z │ x x x x │ B B │ C C │ dt dt dt dt
#     rank 0 of 2                            z z     │ x x     │ B   │ C   │ dt dt


def components(name: str, config: HybridConfig) -> tuple[int, list[int]]:
    """The sharded dimension of a mixer's parameter, and the sizes of its components there."""
    H = config.mamba_heads
    inner = H * config.mamba_head_size
    group = config.mamba_groups * config.state_size  # of B, or of C
    queries = config.attention_heads * config.attention_head_size
    keys = config.attention_groups * config.attention_head_size
    features = config.ffn_hidden_size
    table = {
        "in_proj.weight": (0, [inner, inner, group, group, H]),  # z, x, B, C, dt
        "conv_weight": (0, [inner, group, group]),
        "conv_bias": (0, [inner, group, group]),
        "dt_bias": (0, [H]),
        "A_log": (0, [H]),
        "D": (0, [H]),
        "norm.weight": (0, [inner]),
        "out_proj.weight": (1, [inner]),
        "q_proj.weight": (0, [queries]),
        "k_proj.weight": (0, [keys]),
        "v_proj.weight": (0, [keys]),
        "o_proj.weight": (1, [queries]),
        "up_proj.weight": (0, [features]),
        "down_proj.weight": (1, [features]),
    }
    return table[name.partition("mixer.")[2]]


def is_sharded(name: str) -> bool:
    """Whether parameter `name` is a mixer's: each rank has other elements of these."""
    return "mixer." in name


def shard_tensor(name: str, full: Tensor, config: HybridConfig, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of `full`, the plain model's parameter `name` (...); a copy."""
    if not is_sharded(name):
        return full.clone()
    dim, sizes = components(name, config)  # of the full parameter
    shards = [part.chunk(tp, dim)[rank] for part in full.split(sizes, dim)]
    return torch.cat(shards, dim)


def merge_tensor(name: str, shards: list[Tensor], config: HybridConfig) -> Tensor:
    """The plain model's parameter `name` (...) of all tp ranks' shards, in order.

    Raises: ValueError where a replicated parameter differs between ranks.
    """
    if not is_sharded(name):
        for rank, shard in enumerate(shards):
            if not torch.allclose(shard, shards[0], 0, 0, equal_nan=True):
                same = "should be the same on all ranks that hold it"
                raise ValueError(f"{name} {same}, but rank {rank}'s differs")
        return shards[0].clone()
    dim, sizes = components(name, config)
    local_sizes = [size // len(shards) for size in sizes]
    parts_of_ranks = [shard.split(local_sizes, dim) for shard in shards]
    merged = [torch.cat(parts, dim) for parts in zip(*parts_of_ranks)]
    return torch.cat(merged, dim)


def check_shapes(full: StateDict, config: HybridConfig) -> None:
    """Raises: ValueError that names what is missing, unknown, or of another shape."""
    expected = parameter_shapes(config)
    found = {name: x.shape for name, x in full.items()}
    wrong = dict(found.items() ^ expected.items())
    if wrong:
        raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")


def shard_state_dict(full: StateDict, config: HybridConfig, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of tensor-parallel rank `rank`; copies.

    Raises: as `check_shapes`, and where sizes do not divide.
    """
    check_shapes(full, config)
    local_config(config, tp)  # for what it raises
    return {name: shard_tensor(name, x, config, rank, tp) for name, x in full.items()}


def merge_state_dicts(shards: list[StateDict], config: HybridConfig) -> StateDict:
    """All ranks' state dicts, in order of tp rank, to the plain model's: undoes `shard_state_dict`.

    Gradients work as well. Raises: ValueError where copies differ between ranks.
    """
    full = {}
    for name in parameter_shapes(config):
        full[name] = merge_tensor(name, [shard[name] for shard in shards], config)
    return full


def gather_state_dict(tensors: StateDict, config: HybridConfig, group: Group = None) -> StateDict:
    """Every rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    mine = {name: x.detach().cpu() for name, x in tensors.items()}
    shards = [mine] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, mine, group)
    return merge_state_dicts(shards, config)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# After backward the gradients are complete, thanks to copy_to_tp: sharded parameters are used on
# their own rank alone, and of replicated ones each rank has the same gradient. What is left is the
# norm before clipping. Squares of shards are summed over tp; a replicated parameter counts once, so
# each rank adds 1/tp of it. Counted on each rank, it would enlarge the norm: too much is clipped.


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1) -> AdamW:
    """AdamW that decays matrices; not A_log, dt_bias and D, for which 0 is no neutral value."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def train(
    model: HybridLM,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the plain model or a parallel one; yields two scalars, the mean loss per token and the
    norm before clipping. For a schedule, set the optimizer's learning rate between two steps.

    Every rank must iterate it, with the same batches.
    """
    for batch in batches:
        optimizer.zero_grad()
        targets_BT = batch[1]
        count = (targets_BT != -100).sum().clamp(min=1)
        with torch.autocast(targets_BT.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(*batch).sum() / count
        loss.backward()
        loss, norm = model.after_backward(loss)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
        yield loss, norm


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# The past has become cheap to keep, to read and to pass on. The new token has not: each is still
# multiplied with every parameter, two FLOPs for each of 8 or 56 billion, most of them in the
# feed-forward layers, and in 16 bits. Chapter 6 takes up both: feed-forward layers of many experts,
# of which a token uses a few, and GEMMs in FP8.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# The proof has two parts. One scans a sequence over all ranks, in segments of unequal lengths, and
# compares outputs, the last state and all gradients with the loop over tokens on one device.
#
# The loss is the sum of y², whose gradients contain y: an error in y is an error in them too.
#
# The other trains a small odd model for five steps on all ranks and on a single device. It compares
# each tensor: gradients after the first step, the norm before clipping of each step, weights at the
# end. The model has what breaks wrong code: a chunk that does not divide the tokens, a document
# that begins inside a sequence, targets that do not count.
#
# fp64 is the proof. fp32 and bf16 show what rounding does to right code (bf16: 0.4 % in each GEMM).
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def scan_inputs(T: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random X, a, B and C of two sequences, four heads in two groups, as leaves."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=dtype)
    X = draw(2, T, 4, 3)
    a = -draw(2, T, 4).exp()
    B, C = draw(2, 2, T, 2, 5)
    return [x.to(device).requires_grad_() for x in (X, a, B, C)]


def scan_equivalence(device: torch.device, dtype: torch.dtype) -> Errors:
    """The scan with its tokens over all ranks, and the loop on one device: name to error."""
    lengths = [5 + 2 * rank for rank in range(group_size())]
    inputs = scan_inputs(sum(lengths), device, dtype)
    mine = [x.split(lengths, 1)[group_rank()] for x in inputs]
    y, state = ssd_context_parallel(*mine, chunk=4)
    y_full, state_full = ssd_recurrent(*inputs)
    found = {"y": y}
    expected = {"y": y_full.split(lengths, 1)[group_rank()]}
    if group_rank() == group_size() - 1:
        found["last state"] = state
        expected["last state"] = state_full
    partial_grads = torch.autograd.grad(y.square().sum(), inputs)  # zeros at other ranks' tokens
    found |= zip("XaBC", map(_all_reduce, partial_grads))
    expected |= zip("XaBC", torch.autograd.grad(y_full.square().sum(), inputs))
    return over_all_ranks(relative_errors("tensor of the scan", found, expected))


def check_case(
    device: torch.device, tp: int, groups: int | None = None, T: int = 7
) -> tuple[HybridConfig, Batch]:
    """A small odd model and a batch: two documents in a sequence, targets that do not count."""
    # init_std is larger than usual, so that states and their gradients are not tiny.
    config = HybridConfig(
        vocab_size=61,
        hidden_size=16,
        pattern="M*-M",
        ffn_hidden_size=8 * tp,
        mamba_heads=2 * tp,
        mamba_head_size=4,
        mamba_groups=groups or tp,
        state_size=6,
        chunk=4,
        attention_heads=2 * tp,
        attention_head_size=4,
        attention_groups=groups or tp,
        init_std=0.05,
        dt_init=(0.05, 0.5),
    )
    generator = torch.Generator().manual_seed(1)
    ids_2BT = torch.randint(61, (2, 2, T), generator=generator)
    tokens_BT, targets_BT = ids_2BT.to(device)
    starts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    starts_BT[0, 4] = True
    targets_BT[1, :3] = -100
    return config, (tokens_BT, targets_BT, starts_BT)


def equivalence(parallel: ParallelHybridLM, batch: Batch, autocast: Autocast = None) -> Errors:
    """Five AdamW steps of a parallel model and of the plain one: name to error."""
    weight = parallel.head.weight
    plain = HybridLM(parallel.config).to(weight.device, weight.dtype)
    lr = 1e-3
    steps = []
    for model in (plain, parallel):
        optimizer = make_optimizer(model, lr)
        steps.append(train(model, optimizer, [batch] * 5, 0.1, autocast))
    errors = {}
    for step, ((loss_alone, norm_alone), (loss, norm)) in enumerate(zip(*steps)):
        errors[f"loss {step}"] = abs(loss / loss_alone - 1).item()
        errors[f"norm before clipping {step}"] = abs(norm / norm_alone - 1).item()
        if step == 0:
            full = parallel.gather(gradients(parallel))
            errors |= relative_errors("gradient", full, gradients(plain))
    if weight.dtype == torch.float64:
        # Where a gradient is zero, Adam divides rounding errors by each other: in fp32 the weights
        # of a right program differ too.
        full = parallel.gather(parallel.state_dict())
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), 5 * lr)
    return over_all_ranks(errors)


def gradients(model: nn.Module) -> StateDict:
    return {name: p.grad for name, p in model.named_parameters()}


def check(device: torch.device, dtype: torch.dtype, autocast: Autocast = None) -> Errors:
    """Both parts of the proof, on all ranks: name to error."""
    config, batch = check_case(device, group_size())
    parallel = ParallelHybridLM(config).to(device, dtype)
    return scan_equivalence(device, dtype) | equivalence(parallel, batch, autocast)


def text_batches(args: argparse.Namespace, device: torch.device, steps: int) -> Iterator[Batch]:
    """Batches of this file's own text, one byte per token; the same on every rank."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = text.unfold(0, args.seq_length + 1, 1)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(steps):
        rows = torch.randint(len(windows), (args.batch,), generator=generator)
        window_BT = windows[rows].to(device)
        yield window_BT[:, :-1], window_BT[:, 1:]


def demonstrate(
    args: argparse.Namespace, device: torch.device, build: Callable = ParallelHybridLM
) -> list[float]:
    """Trains build(config) on text; returns how far the first losses are from a single device's."""
    dtype, autocast = dtypes(args)
    config = config_from(args, HybridConfig, seed=args.seed)
    batches = partial(text_batches, args, device)
    # Every rank trains the plain model for some steps, so that no rank waits for another.
    plain = HybridLM(config).to(device, dtype)
    optimizer = make_optimizer(plain, args.lr)
    steps = train(plain, optimizer, batches(min(5, args.steps)), autocast=autocast)
    alone = [loss.item() for loss, _ in steps]
    say(f"\n{config.pattern}, {sum(p.numel() for p in plain.parameters()):,} parameters\n")
    say("step      loss  single device    norm")
    model = build(config).to(device, dtype)
    optimizer = make_optimizer(model, args.lr)
    differences = []
    steps = train(model, optimizer, batches(args.steps), autocast=autocast)
    for step, (loss, norm) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        reference = ""
        if step < len(alone):
            reference = f"{alone[step]:.6f}"
            differences.append(abs(loss - alone[step]))
        if step < 5 or step % 20 == 19:
            say(f"{step:4}  {loss:.6f}  {reference:>13}  {norm:6.3f}")
    say()
    return differences


def claims(
    args: argparse.Namespace, kinds: list[str], errors: Errors, differences: list[float]
) -> list[tuple]:
    """What this run has measured: (claim, paper, here, verdict)."""
    rows = []
    for kind in kinds:
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, float64"
        here = f"worst {error:.1e} relative"
        is_equal = error <= BOUNDS["fp64"]
        rows.append((claim, "exact", here, is_equal))
    if differences:
        within = max(differences)
        here = "equal to the bit"
        if within:
            here = f"within {within:.0e}"
        losses = f"the first {len(differences)} losses"
        claim = f"{losses} equal the single device's, {args.dtype}"
        is_equal = within <= BOUNDS[args.dtype]
        rows.append((claim, "equal", here, is_equal))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args)
    if args.check:
        errors = check(device, *dtypes(args))
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        errors = check(device, torch.float64)
        differences = demonstrate(args, device)
        kinds = ["tensor of the scan", "gradient", "norm before clipping", "weight after AdamW"]
        good = print_claims(claims(args, kinds, errors, differences))
    if not good:
        sys.exit(1)


@dataclass
class Options(HybridConfig):  # the chapter's own flags; None: what fits the ranks
    ffn_hidden_size: int | None = flag(None, "feed-forward size, F; None: 512 or more", least=1)
    mamba_heads: int | None = flag(None, "heads of a Mamba layer, H; None: 8 or more", least=1)
    mamba_groups: int | None = flag(None, "groups that share B and C; None: 2 or more", least=1)
    attention_heads: int | None = flag(None, "query heads; None: 4 or more", least=1)
    attention_groups: int | None = flag(None, "groups of them; None: 2 or more", least=1)
    seq_length: int = flag(128, "tokens of a sequence, T", least=1)
    batch: int = flag(8, "sequences per step", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)


def multiple_above(least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `least`."""
    return math.ceil(least / divisor) * divisor


def choose_sizes(args: argparse.Namespace, tp: int) -> HybridConfig:
    """Replaces every None by what tp ranks can share. Raises: ValueError where sizes clash."""
    args.ffn_hidden_size = args.ffn_hidden_size or multiple_above(512, tp)
    args.mamba_groups = args.mamba_groups or multiple_above(2, tp)
    args.mamba_heads = args.mamba_heads or multiple_above(8, args.mamba_groups)
    args.attention_groups = args.attention_groups or multiple_above(2, tp)
    args.attention_heads = args.attention_heads or multiple_above(4, args.attention_groups)
    return config_from(args, HybridConfig, seed=args.seed)


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError where flags and ranks do not fit."""
    tp = args.world_size
    config = choose_sizes(args, tp)
    if not args.check:  # whose model has sizes of its own
        local_config(config, tp)
    size = Path(__file__).stat().st_size
    if args.seq_length >= size:
        raise ValueError(f"--seq-length {args.seq_length}: the text has {size} tokens")


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=2, steps=120)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────
#
# Explained in chapter 1 (groups, reports, flags, launcher) and chapter 2 (operators).


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
# region carried: tensor-parallel operators (home: 02_megatron_tp)
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


# endregion copy 175230
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
