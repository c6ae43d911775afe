# SPDX-License-Identifier: MIT-0
"""Chapter 13. Nemotron 3, assembled from the pieces of this book, and trained on a device mesh.

Papers: Nemotron 3 Nano, NVIDIA, 2025, arXiv 2512.20848;
        NVIDIA Nemotron 3: Efficient and Open Intelligence, NVIDIA, 2025, arXiv 2512.20856;
        Nemotron 3 Super, NVIDIA, 2026, arXiv 2604.12374

The problem. Chapters 2 to 9 prove one technique each. A model of today needs them all at once, and
each technique shards something else over the same ranks.

The idea. Every tensor has one table entry: over which ranks it is sharded, and over which ranks its
gradient is summed. Eight ranks, tp 2, ep 4:

    rank              0   1     2   3     4   5     6   7
    tp groups        └──┬──┘   └──┬──┘   └──┬──┘   └──┬──┘     one replica each: it shares heads,
                        │         │         │         │        features, vocabulary, and tokens
    ep groups        └──────┬──────┘     └──────┬──────┘       one set of experts each
    dp groups        0 2 4 6 and 1 3 5 7                       the same shard of heads
    edp groups       0 4, 1 5, 2 6 and 3 7                     the same experts

An expert group spans tp and dp: with sequence parallelism the ranks of a tp group have different
tokens, so each of them sends its own tokens to experts, as if it were a replica.

Run it (no flag is needed; --help lists them):

    python 13_nemotron3/nemotron3.py                  4 local ranks: tp 2, ep 4, dp 2
    python 13_nemotron3/nemotron3.py --ranks 1        one process, for a debugger
    python 13_nemotron3/nemotron3.py --check          equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 13_nemotron3/nemotron3.py --tp 2 --ep 8
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        13_nemotron3/nemotron3.py --tp 2 --ep 16

It proves in float64 that every gradient equals the single device's on four layouts, trains a small
Nano and a small Super next to the single device, and prints its claims. `load.py` does so too, and
then writes with drafts.

Left out: published weights and generation (load.py); FP8 and NVFP4 (precision.py); the papers'
sizes and layouts (nemotron3_tables.py); pipelines (chapter 7); context parallelism (chapter 5).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape: a CAPITAL is a full dimension, a small letter this rank's shard.
# partial_ marks a partial sum.
#
#     B  sequences of this replica   D  model width              V  vocabulary entries
#     T  tokens of a sequence        U  tokens of a replica, B·T     u: those of this rank
#     E  experts                     R  U, padded to a multiple of tp    r = R / tp
#     K  experts per token           W  elements of a row in latent width
#
# Carried layers keep the letters of their homes. Chapter 5 has these and H, P, N, G for heads; in
# chapter 6 S is this T, T this u, and H this D.
#
# tp ranks are a replica; world = tp · dp = ep · edp.
#
# "region carried" marks code that is copied from its home, nearly all of this file. What is not
# carried is new here: how the pieces are put together. Read a carried piece at its home, where its
# lecture stands.

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# region carried: Group, Parameters, StateDict, Documents, Batch, Autocast, IGNORED (home: 09_mtp)
Group = dist.ProcessGroup | None
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Documents = Tensor | None  # of each token, an index that never comes back; None: one document
Batch = tuple[Tensor, ...]  # tokens_BT, targets_BT (−100 does not count), and maybe document_BT
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast
IGNORED = -100  # a target that does not count
# endregion copy 7d59d5
# region carried: Splits (home: 06_moe_fp8)
Splits = list[int]  # rows for each rank, or from each
# endregion copy 94e7d5
# region carried: Scanned (home: 05_mamba_hybrid)
Scanned = tuple[Tensor, Tensor]  # y (B, T, H, P), and the state after the last token (B, H, P, N)
# endregion copy c002f4


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


# region carried: HybridConfig (home: 09_mtp)
@dataclass
class HybridConfig:
    """Sizes of the model; `flag` makes a field a flag too. Raises ValueError for impossible ones.

    Settings of multi-token prediction have Megatron-LM's names.
    """

    vocab_size: int = 256
    hidden_size: int = flag(128, "model width, D", least=1)
    pattern: str = flag("M-M*-", "the trunk, one letter per layer: M Mamba-2, * attention, - MLP")
    mtp_pattern: str = flag("*-", "the layers of the block for multi-token prediction")
    mtp_num_layers: int = flag(2, "depths of multi-token prediction; 0: none")
    mtp_use_repeated_layer: bool = True  # one block for all depths, as in Super
    mtp_loss_scaling_factor: float = flag(0.3, "weight of the mean loss of all depths")
    mtp_detach_heads: bool = flag(False, "depths train their block alone")
    ffn_hidden_size: int = flag(384, "feed-forward size, F", least=1)
    mamba_heads: int = flag(4, "heads of a Mamba layer; they share B and C", least=1)
    mamba_head_size: int = 32  # P
    state_size: int = flag(16, "size of a state, N", least=1)
    conv_kernel: int = 4  # K
    attention_heads: int = flag(4, "attention heads", least=1)
    attention_head_size: int = 32
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        for name in ("pattern", "mtp_pattern"):
            letters = getattr(self, name)
            if not letters or set(letters) - set(LAYERS):
                raise ValueError(f"{name}={letters!r}: the letters are {list(LAYERS)}")
        for name, value in vars(self).items():
            least = LEAST.get(name, 1)
            if type(value) in (int, float) and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")


# endregion copy 76a020


@dataclass
class NemotronConfig(HybridConfig):
    """Chapter 9's sizes, and what chapters 5 and 6 have more. Raises ValueError for impossible
    ones."""

    pattern: str = flag("MEM*EME", "layers: M Mamba-2, * attention, E experts, - feed-forward")
    mtp_pattern: str = flag("*E", "the layers of the block for multi-token prediction")
    mamba_groups: int = flag(2, "groups of Mamba's heads that share B and C", least=1)
    chunk: int = flag(64, "tokens of a chunk of Mamba's scan", least=1)
    attention_groups: int = flag(2, "groups of query heads that share keys and values", least=1)
    num_experts: int = flag(16, "experts, E", least=1)
    top_k: int = flag(4, "experts per token, K", least=1)
    expert_size: int = flag(64, "hidden size of an expert", least=1)
    shared_size: int = flag(128, "hidden size of the expert for every token; 0: none")
    moe_latent_size: int = flag(32, "elements of a row that is sent, W; 0: the model width")
    gate: str = "sigmoid"
    gate_scale: float = 2.5  # the weights of a token's experts add up to this
    norm_eps: float = 1e-5
    A_init: tuple[float, float] = (1.0, 16.0)  # initial −A of a head: uniform in this range
    dt_init: tuple[float, float] = (1e-3, 0.1)  # initial dt: log-uniform in this range

    def __post_init__(self):
        super().__post_init__()
        for kind in ("mamba", "attention"):
            heads = getattr(self, f"{kind}_heads")
            groups = getattr(self, f"{kind}_groups")
            if heads % groups:
                sizes = f"{kind}_heads={heads} do not divide into {kind}_groups={groups}"
                raise ValueError(f"{sizes}: choose a multiple")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: choose at most num_experts={self.num_experts}")


ZERO = ["mtp_num_layers", "mtp_loss_scaling_factor", "shared_size", "moe_latent_size"]
LEAST = dict.fromkeys([*ZERO, "norm_eps", "init_std", "seed"], 0) | {"conv_kernel": 2}
MoEConfig = NemotronConfig  # its name in chapter 6

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 Which rank has which tokens ─────────────────────────────────────────────────────────────
#
# Between layers the ranks of a tp group share the tokens of their replica (sequence parallelism,
# chapter 4): U = B·T tokens in a row, cut into tp equal parts. What comes next decides whether they
# are gathered:
#
#     norms, residual connections           this rank's tokens
#     M, *, -: g ─► heads or features of this rank ─► ḡ       all tokens of the replica
#     E: router ─► dispatch ─► experts ─► combine             this rank's tokens, no gather
#        shared expert: g ─► features of this rank ─► ḡ       all tokens, while rows are in flight
#     output layer: g ─► vocabulary entries of this rank      all tokens
#
# g is an all-gather and ḡ a reduce-scatter (chapter 4). Without sequence parallelism the tp ranks
# would have the same tokens, and each expert would receive every row tp times: the same gradient,
# tp times the work, and tp times the bytes.
#
# So for experts a tp group is nothing special. To the all-to-all its ranks are ranks with tokens of
# their own, and an expert group may be part of a tp group, equal to it, or several of them:
#
#     tp 4, ep 2        rank 0 1 2 3       tp group  ─ 0 1 2 3 ─      ep groups  ─ 0 1 ─ ─ 2 3 ─
#     tp 2, ep 2        rank 0 1 2 3       tp groups ─ 0 1 ─ ─ 2 3 ─  ep groups  ─ 0 1 ─ ─ 2 3 ─
#     tp 2, ep 4        rank 0 1 2 3       tp groups ─ 0 1 ─ ─ 2 3 ─  ep group   ─ 0 1 2 3 ─
#
# Experts themselves are not cut by tp. An expert of Nano has a hidden size of 1,856. Half of it on
# each of two ranks makes GEMMs half as large, with the same number of rows. The same two ranks may
# have half of the experts each, with GEMMs of full size.
#
# Five tokens on two ranks do not divide. The last rank has a row of padding:
#
#     U = 5, R = 6, r = 3          rank 0: t₀ t₁ t₂      u = 3
#                                  rank 1: t₃ t₄ –       u = 2
#
# Tokens of all sequences are in one row, so a rank's part may end inside a sequence: with B = 1 and
# T = 5 as here, the only sequence is on both ranks.
#
# Padding must end before anything that looks at all tokens. M, * and - take the first U rows after
# the gather, and a rank routes its first u rows. A row of padding that is routed has a loss of
# zero and a gradient of zero. But it is counted, and it moves the bias of its experts.


@dataclass(frozen=True)
class Span:
    """What the layers of one forward pass are told. Source: chapters 5 and 9; the rest is ours."""

    document_BS: Documents = None  # the document index of each token; None: one document
    shape: tuple[int, int] = (0, 0)  # B and T of this replica's tokens
    balance: list[Tensor] = field(default_factory=list)  # (B) of each layer of experts so far

    def layer(self, index: int) -> Span:
        """For the layer with this index: here all have the same."""
        return self


ALL = Span()  # one document


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups.

    Source: Megatron-LM's groups.
    """

    tp: int = 1  # ranks that share the heads and the tokens of a replica
    ep: int = 1  # ranks that share one set of experts
    dp: int = 1  # replicas
    tp_rank: int = 0
    ep_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    ep_group: Group = None  # exchanges rows
    data_group: Group = None  # the ranks of all replicas with this rank's shard of heads
    edp_group: Group = None  # the ranks with this rank's experts
    cp_group: Group = None  # no sequence is sharded over replicas


def make_mesh(tp: int, ep: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, tp) and as (edp, ep), neighbours in tp and ep groups. Collective.

    Args: timeout in seconds. Raises: ValueError where tp or ep does not divide the ranks.
    Source: Megatron-LM's layout.
    """
    world = dist.get_world_size()
    if min(tp, ep) < 1 or world % tp or world % ep:
        raise ValueError(f"tp={tp} and ep={ep} must both divide the {world} ranks")
    ranks = torch.arange(world, device="cpu")
    tp_lists = ranks.view(-1, tp)
    ep_lists = ranks.view(-1, ep)
    kinds = (tp_lists, ep_lists, tp_lists.T, ep_lists.T)
    groups = [make_group(lists.tolist(), device, timeout) for lists in kinds]
    rank = dist.get_rank()
    return Mesh(tp, ep, world // tp, rank % tp, rank % ep, rank // tp, *groups)


# region carried: _tokens_per_rank, _start_all_gather, _start_reduce_scatter (home: 04_seq_parallel)
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


# endregion copy 8a0e50
# region carried: _gather_tokens, _reduce_scatter_tokens, _take_tokens (home: 04_seq_parallel)
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


# endregion copy 6bf171
# region carried: gather_from_sp, reduce_scatter_to_sp, multiple_above (home: 04_seq_parallel)
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


def multiple_above(least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `least`."""
    return math.ceil(least / divisor) * divisor


# endregion copy fa1f04


def all_tokens(x_rD: Tensor, span: Span, group: Group = None) -> Tensor:
    """g: this rank's rows to all tokens of the replica, (B, T, D), without padding.

    Source: chapter 4's operator; the padding is ours.
    """
    x_RD = gather_from_sp(x_rD, group)
    return x_RD[: math.prod(span.shape)].unflatten(0, span.shape)


def own_rows(partial_x_BTD: Tensor, group: Group = None) -> Tensor:
    """ḡ: partial sums of all tokens to this rank's rows, (r, D), the last ones padding.

    Source: chapter 4's operator; the padding is ours.
    """
    return reduce_scatter_to_sp(padded_rows(partial_x_BTD.flatten(0, 1), group), group)


def padded_rows(x_U: Tensor, group: Group = None) -> Tensor:
    """Rows x_U (U, ...) and rows of zeros after them, (R, ...), R a multiple of the ranks.

    Source: ours.
    """
    padding = -len(x_U) % group_size(group)
    return torch.cat([x_U, x_U.new_zeros(padding, *x_U.shape[1:])])


def rows_of_rank(span: Span, mesh: Mesh) -> tuple[int, int]:
    """r, the rows of each rank of a replica, and u, how many of this rank's are tokens.

    Source: ours.
    """
    tokens = math.prod(span.shape)
    r = math.ceil(tokens / mesh.tp)
    return r, min(max(tokens - mesh.tp_rank * r, 0), r)


# ── 1.2 Layers ──────────────────────────────────────────────────────────────────────────────────
#
# The layers are those of chapters 5 and 6, and the block of chapter 9 is built of them. Two things
# did not fit, and were changed at home:
#
# · A layer of chapter 9 is told of its tokens by a span that knows documents alone. The parallel
#   layers need B and T as well, because rows do not say where a sequence ends: `span` gets tokens.
# · Chapter 9's configuration knew its own letters. It takes those of LAYERS now.
#
# And two things fit without a change, but only here: chapter 6 returns a balancing loss from each
# layer, and chapter 9 hands on hidden states alone. The span takes the losses along.


# region carried: segsum, log_decay, _scan, _kept, _chunk, _chunks, ssd (home: 05_mamba_hybrid)
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


def log_decay(dt: Tensor, A: Tensor, starts: Documents = None) -> Tensor:
    """a = dt · A, the log of each token's decay, (B, T, H), at least fp32.

    Args: dt (B, T, H); A (H); starts: bool (B, T), True where a document begins.
    Source: Mamba-2; documents: ours.
    """
    a_BTH = at_least_fp32(dt) * A
    if starts is None:
        return a_BTH
    return a_BTH - 1000.0 * starts[..., None]


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


# endregion copy e0adde
# region carried: last_documents, causal_conv1d, RMSNorm, Mamba2Mixer (home: 05_mamba_hybrid)
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


# endregion copy 281e75
# region carried: causal_mask, Attention, SquaredReLUMLP, initial_value (home: 05_mamba_hybrid)
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


# endregion copy a3d0b8
# region carried: Routing, count_rows, Router (home: 06_moe_fp8)
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


# endregion copy ef4fce
# region carried: load_balancing_loss, update_expert_bias (home: 06_moe_fp8)
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


# endregion copy f36644
# region carried: CPU_DTYPES, GROUPED_MM_DTYPES, _has_grouped_mm, gemm_dtype (home: 06_moe_fp8)
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


# endregion copy c71295
# region carried: grouped_gemm, Experts, MLP, MoELayer (home: 06_moe_fp8)
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


# endregion copy a6a590


class ExpertLayer(MoELayer):
    """Chapter 6's layer in a hybrid: x_BTD to (B, T, D); its balancing loss joins the span's.

    Source: Nemotron 3 Nano.
    """

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        y_BTD, balance_B = super().forward(x_BTD)
        span.balance.append(balance_B)
        return y_BTD


LAYERS = {"M": Mamba2Mixer, "*": Attention, "-": SquaredReLUMLP, "E": ExpertLayer}


# region carried: from_next_rank, last_of_documents, roll_tensor (home: 09_mtp)
def from_next_rank(first_B1: Tensor, end: int, group: Group = None) -> Tensor:
    """The next rank's first token ids (B, 1) of a sharded sequence; `end` on the last rank.

    Args: group: the ranks that share the sequence; None: it is not sharded. Collective.
    Gathers an id per sequence from each rank; a send to the neighbour would do. Source: ours.
    """
    if group is None or group_size(group) == 1:
        return torch.full_like(first_B1, end)
    ranks = group_size(group)
    firsts = [torch.empty_like(first_B1) for _ in range(ranks)]
    dist.all_gather(firsts, first_B1.contiguous(), group)
    firsts.append(torch.full_like(first_B1, end))
    return firsts[group_rank(group) + 1]


def last_of_documents(document_Bt: Tensor, group: Group = None) -> Tensor:
    """Where the next token is of another document, or there is none: bool (B, t).

    Args: document_Bt: the document index of each token, at least 0. group: as `roll_tensor`'s.
    Source: Megatron-LM's code, from lengths of documents.
    """
    next_B1 = from_next_rank(document_Bt[:, :1], -1, group)
    rolled_Bt = torch.cat([document_Bt[:, 1:], next_B1], dim=1)
    return document_Bt != rolled_Bt


def roll_tensor(x_Bt: Tensor, is_last_Bt: Tensor, fill: int = 0, group: Group = None) -> Tensor:
    """Moves token ids to the left by one inside each document, (B, t); its last place gets `fill`.

    Args: x_Bt: int64, as large on each rank. is_last_Bt: `last_of_documents`. group: the ranks that
        share the sequence, in order; None: it is not sharded. Collective.
    Raises: ValueError on a rank outside the group. Source: Megatron-LM's code.
    """
    next_B1 = from_next_rank(x_Bt[:, :1], fill, group)
    rolled_Bt = torch.cat([x_Bt[:, 1:], next_B1], dim=1)
    return torch.where(is_last_Bt, fill, rolled_Bt)


# endregion copy 2aeddc
# region carried: MultiTokenPredictionLayer, process_mtp_loss, Block, run_layers (home: 09_mtp)
class MultiTokenPredictionLayer(nn.Module):
    """One depth: the embedding of the next token and a hidden state to the next hidden state.

    embedded and hidden (B, t, D) to (B, t, D), normalised. Parameters have the published names.

    Args: block: builds a layer from its letter and the config. span: what its layers may look back
        at, section 2.1. Source: DeepSeek-V3, section 2.2; Nemotron 3 Super.
    """

    def __init__(self, config: HybridConfig, block: Callable):
        super().__init__()
        D = config.hidden_size
        self.enorm = RMSNorm(D)
        self.hnorm = RMSNorm(D)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.layers = nn.ModuleList(block(letter, config) for letter in config.mtp_pattern)
        self.final_layernorm = RMSNorm(D)

    def forward(self, embedded: Tensor, hidden: Tensor, span: Span) -> Tensor:
        embedded = self.enorm(embedded)
        hidden = self.hnorm(hidden)
        both = torch.cat([embedded, hidden], dim=-1)
        x = self.eh_proj(both)
        x = run_layers(self.layers, x, span)
        return self.final_layernorm(x)


def process_mtp_loss(
    losses: list[Tensor], targets: list[Tensor], scaling_factor: float, group: Group = None
) -> Tensor:
    """The total loss, then the mean loss of the trunk and of each depth: (2 + depths).

    Args:
        losses: of the trunk, then of each depth, per token (B, t), 0 where a target is −100.
        targets: theirs (B, t). scaling_factor: λ.
        group: the ranks that hold other tokens (not tp). Each gets partial sums, at least fp32: add
            them and their gradients over `group` (DDP takes means). None: no such rank. Collective.

    A depth without any target has loss 0. Raises: ValueError where shapes of losses and targets
    differ, and on a rank outside the group. Source: Nemotron 3 Super; Megatron-LM's code.
    """
    if [x.shape for x in losses] != [x.shape for x in targets]:
        raise ValueError(f"{len(losses)} losses: give each its targets, of equal shape")
    counts = torch.stack([(targets_Bt != IGNORED).sum() for targets_Bt in targets])
    if group is not None:
        _all_reduce(counts, group)
    sums = torch.stack([at_least_fp32(loss_Bt).sum() for loss_Bt in losses])
    means = sums / counts.clamp(min=1)
    weight = scaling_factor / max(1, len(losses) - 1)
    total = means[0] + weight * means[1:].sum()
    return torch.cat([total[None], means])


class Block(nn.Module):
    """A layer with its norm and residual connection, x_BTD to (B, T, D).

    Args: letter: of the pattern. layers: what to build for each. span: as `Mamba2Mixer`'s.
    """

    def __init__(self, letter: str, config: HybridConfig, layers: dict[str, Callable] = LAYERS):
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size)
        self.mixer = layers[letter](config)

    def mix(self, x_BTD: Tensor, span: Span) -> Tensor:
        return self.mixer(x_BTD, span)

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        return x_BTD + self.mix(self.norm(x_BTD), span)


def run_layers(layers: nn.ModuleList, x: Tensor, span: Span) -> Tensor:
    """The layers one after the other, x (B, t, D) to (B, t, D)."""
    for index, layer in enumerate(layers):
        x = layer(x, span.layer(index))
    return x


# endregion copy d3efdf

# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# Chapter 9's model with two more kinds of layers. Experts bring two things with them: a balancing
# loss, of every layer and every depth, and counts for the bias. A block that all depths share is
# balanced as one layer: its loss is divided by the depths. Its counts are those of all depths.


# region carried: HybridLM (home: 09_mtp)
class HybridLM(nn.Module):
    """The single-device model, a trunk and a block for the depths: tokens_BT to logits_BTV.

    Args: block: builds a layer from its letter and the config.
    Source: Nemotron 3 white paper; Nemotron 3 Super.
    """

    def __init__(self, config: HybridConfig, block: Callable = Block, mesh: Mesh | None = None):
        super().__init__()
        self.config = config
        self.mesh = mesh or Mesh()  # one rank
        V = config.vocab_size
        D = config.hidden_size
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(block(letter, config) for letter in config.pattern)
        self.final_norm = RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        depths = config.mtp_num_layers
        if config.mtp_use_repeated_layer:
            depths = min(1, depths)
        blocks = (MultiTokenPredictionLayer(config, block) for _ in range(depths))
        self.mtp = nn.ModuleList(blocks)
        initialize(self)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, D)."""
        return self.embedding(tokens_BT)

    def logits(self, hidden_BTD: Tensor, detach: bool = False) -> Tensor:
        """(B, T, V). detach: the output weight gets no gradient."""
        weight_VD = self.head.weight
        if detach:
            weight_VD = weight_VD.detach()
        return F.linear(hidden_BTD, weight_VD)

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Per token in nats, (B, T), at least fp32; 0 where the target is −100."""
        logits_BVT = at_least_fp32(logits_BTV).mT
        return F.cross_entropy(logits_BVT, targets_BT, ignore_index=IGNORED, reduction="none")

    def span(self, tokens_BT: Tensor, document_BT: Documents) -> Span:
        """What the layers may look back at."""
        return Span(document_BT)

    def trunk(self, tokens_BT: Tensor, span: Span) -> Tensor:
        """The hidden state after the final norm, (B, T, D)."""
        x_BTD = self.embed(tokens_BT)
        x_BTD = run_layers(self.layers, x_BTD, span)
        return self.final_norm(x_BTD)

    def forward(self, tokens_BT: Tensor, document_BT: Documents = None) -> Tensor:
        span = self.span(tokens_BT, document_BT)
        hidden_BTD = self.trunk(tokens_BT, span)
        return self.logits(hidden_BTD)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, document_BT: Documents = None) -> Tensor:
        """The total loss, then the mean of the trunk and of each depth, (2 + depths).

        Where tokens are sharded, these are partial sums.
        """
        detach = self.config.mtp_detach_heads
        group = self.mesh.cp_group
        documents = document_BT
        if documents is None:
            documents = torch.zeros_like(tokens_BT)
        is_last_BT = last_of_documents(documents, group)
        span = self.span(tokens_BT, document_BT)
        hidden_BTD = self.trunk(tokens_BT, span)
        logits_BTV = self.logits(hidden_BTD)
        losses = [self.cross_entropy(logits_BTV, targets_BT)]
        targets = [targets_BT]
        if detach:
            hidden_BTD = hidden_BTD.detach()
        for depth in range(self.config.mtp_num_layers):
            tokens_BT = roll_tensor(tokens_BT, is_last_BT, 0, group)
            targets_BT = roll_tensor(targets_BT, is_last_BT, IGNORED, group)
            embedded_BTD = self.embed(tokens_BT)
            if detach:
                embedded_BTD = embedded_BTD.detach()
            block = self.mtp[depth % len(self.mtp)]
            hidden_BTD = block(embedded_BTD, hidden_BTD, span)
            logits_BTV = self.logits(hidden_BTD, detach)
            losses.append(self.cross_entropy(logits_BTV, targets_BT))
            targets.append(targets_BT)
        scaling_factor = self.config.mtp_loss_scaling_factor
        return process_mtp_loss(losses, targets, scaling_factor, self.mesh.data_group)


# endregion copy 4278be


class NemotronLM(HybridLM):
    """The single-device model: tokens_BT to logits_BTV.

    Args: block: builds a layer from its letter and the config. Source: Nemotron 3 Super.
    """

    def __init__(self, config: NemotronConfig, block: Callable = Block, mesh: Mesh | None = None):
        super().__init__(config, block, mesh)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.eps = config.norm_eps  # chapter 9 has the default everywhere

    def span(self, tokens_BT: Tensor, document_BT: Documents) -> Span:
        self.balance = []  # of this pass
        return Span(document_BT, tuple(tokens_BT.shape), self.balance)

    def loss_and_balance(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """`loss`, and the balancing loss of each sequence, (B): the sum over layers of experts."""
        losses = self.loss(*batch)
        trunk = self.config.pattern.count("E")
        repeated = self.config.mtp_num_layers if self.config.mtp_use_repeated_layer else 1
        balance_B = losses.new_zeros(len(batch[0]))
        for index, of_layer_B in enumerate(self.balance):
            balance_B = balance_B + (of_layer_B if index < trunk else of_layer_B / repeated)
        return losses, balance_B

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def counts(self) -> Tensor:
        """How often this rank's tokens chose each expert since the last update, (layers, E)."""
        none_0E = self.head.weight.new_zeros(0, self.config.num_experts, dtype=torch.int64)
        return torch.cat([none_0E, *(router.counts[None] for router in self.routers())])

    def take(self, weights: StateDict) -> None:
        """Puts weights in place of shapes without memory: of a model built on the device "meta"."""
        self.load_state_dict(weights, assign=True)
        for router in self.routers():  # its counts are not in a state dict
            router.counts = torch.zeros_like(router.bias, dtype=torch.int64)


# The initial weights do not depend on the mesh: one full tensor at a time is drawn, and cut.
#
# A model of 120 billion parameters fits in no process, so it is built in two steps. On the device
# "meta" it has shapes alone. Then `take` puts shards in their place, drawn here or read by load.py.
# What is in no state dict, the counts of routers, must be made by hand: on "meta" there is no
# memory.


def state_shapes(config: NemotronConfig) -> dict[str, torch.Size]:
    """Name to shape of the plain model's parameters and router biases, without memory."""
    with torch.device("meta"):
        return {name: x.shape for name, x in NemotronLM(config).state_dict().items()}


def initial_weights(config: NemotronConfig) -> Iterator[tuple[str, Tensor]]:
    """The full initial weights, a function of `config` alone, of the shapes of `state_shapes`.

    As in chapters 5 and 6: what adds to the residual stream is smaller by 1/√layers.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for name, shape in state_shapes(config).items():
        value = initial_value(name, shape, config, generator)
        if name.endswith("router.bias"):
            value.zero_()
        if name.endswith(("experts.down", "shared.down.weight")):
            value /= math.sqrt(len(config.pattern))
        yield name, value


def initialize(model: NemotronLM) -> None:
    """Sets every parameter; nothing where the model has shapes alone."""
    if not model.head.weight.is_meta:
        model.load_state_dict(dict(initial_weights(model.config)))


# ── 2.2 The parallel model ──────────────────────────────────────────────────────────────────────
#
# M, *, - and the shared expert are plain layers with this rank's sizes, between g and ḡ. So tp must
# divide heads, groups and features. Nano and Super have 8 groups of Mamba heads. But they have 2
# groups of keys and values, and Nano's recipe has tp 4:
#
#     rank                 0          1          2           3
#     query heads          0 … 7      8 … 15     16 … 23     24 … 31
#     keys and values of   group 0    group 0    group 1     group 1
#
# Two ranks need the same keys. Then each rank has k_proj and v_proj in full, and its heads take
# their group. Its gradient is that of its own heads: a partial sum, as a norm's is. So keys move to
# the last line of the table in part 3, and nothing else is new. (Chapter 5's context_parallel.py
# has copies of one group alone: less memory and fewer FLOPs, and sums over more kinds of groups.)

# region carried: SHARDED_SIZES, local_config, components (home: 05_mamba_hybrid)
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


# endregion copy 2427a4
SHARDED_SIZES["E"] = ["shared_size"]  # chapter 5 has no experts, and `local_config` reads this


def keys_are_replicated(config: NemotronConfig, tp: int) -> bool:
    """Whether several of `tp` ranks share a group of keys and values. Source: ours."""
    groups = config.attention_groups
    return groups < tp and tp % groups == 0 and config.attention_heads % tp == 0


def sizes_of_rank(config: NemotronConfig, letters: str, tp: int) -> NemotronConfig:
    """`local_config` for layers of these letters; one group of keys where they are replicated."""
    groups = tp if keys_are_replicated(config, tp) else config.attention_groups
    return local_config(replace(config, pattern=letters, attention_groups=groups), tp)


class AttentionOfGroup(Attention):
    """`Attention` of this rank's heads, which share a group of keys and values: x_BTD to (B, T, D).

    Args: config: with the rank's sizes. groups: of the full model; k_proj and v_proj have them all.
    Source: ours.
    """

    def __init__(self, config: NemotronConfig, groups: int, mesh: Mesh):
        super().__init__(config)
        keys = groups * config.attention_head_size
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.group = mesh.tp_rank * groups // mesh.tp

    def attend(self, q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, span: Span) -> Tensor:
        own = slice(self.group, self.group + 1)
        return super().attend(q_BHTP, k_BGSP[:, own], v_BGSP[:, own], span)


# region carried: _exchange, _AllToAll, _check_splits, all_to_all, _Transfer (home: 06_moe_fp8)
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


# endregion copy 1b1033
# region carried: _AllToAllStart, _AllToAllWait, start_all_to_all, _unsorted_by (home: 06_moe_fp8)
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


def _unsorted_by(order_R: Tensor, rows_RH: Tensor) -> Tensor:
    return torch.empty_like(rows_RH).index_copy(0, order_R, rows_RH)


# endregion copy f18905
# region carried: Plan, plan_dispatch, dispatch, combine, check_ep (home: 06_moe_fp8)
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


def check_ep(num_experts: int, ep: int) -> None:
    """Raises ValueError where the experts do not divide over `ep` ranks."""
    if num_experts % ep:
        found = f"num_experts={num_experts} does not divide over {ep} ranks"
        raise ValueError(f"{found}: ep must divide the number of experts")


# endregion copy 6eeff1
# region carried: ExpertParallelMoELayer (home: 06_moe_fp8)
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


# endregion copy a58f57


# The balancing loss is a mean over the tokens of a sequence, which may lie on several ranks. Scores
# are all-gathered, E values per token, and every rank of the replica computes the same loss. So its
# gradient is not a partial sum: each rank takes its own tokens' (`backward="split"`).
#
# The shared expert needs all tokens and the routed ones do not. So a rank sends its rows, and then
# gathers and computes while they are in flight.


class ParallelExpertLayer(ExpertParallelMoELayer):
    """`ExpertLayer` on this rank's rows, x_rD to (r, D); experts over ep, the shared one over tp.

    Collective in both groups, also without tokens. Source: Nemotron 3; the sharding is ours.
    """

    def __init__(self, config: NemotronConfig, mesh: Mesh):
        super().__init__(config, mesh.ep_group)
        self.mesh = mesh

    def forward(self, x_rD: Tensor, span: Span) -> Tensor:
        r, u = rows_of_rank(span, self.mesh)
        routing = self.router(x_rD[:u])
        y_rD = self.mix(x_rD, routing)
        scores_rE = F.pad(routing.log_scores_TE, (0, 0, 0, r - u))
        scores_RE = gather_from_sp(scores_rE, self.mesh.tp_group, backward="split")
        scores_BTE = scores_RE[: math.prod(span.shape)].unflatten(0, span.shape)
        span.balance.append(load_balancing_loss(scores_BTE, self.config.top_k))
        return y_rD

    def mix(self, x_rD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum over each token's experts, plus the shared expert; without padding."""
        u = len(routing.experts_TK)
        plan = plan_dispatch(routing.experts_TK, self.config.num_experts, self.group)
        z_uW = self.into_latent(x_rD[:u])
        wait = dispatch(z_uW.to(gemm_dtype(x_rD)), plan)
        shared_rD = 0
        if self.shared:
            partial_y_RD = self.shared(gather_from_sp(x_rD, self.mesh.tp_group))
            shared_rD = reduce_scatter_to_sp(partial_y_RD, self.mesh.tp_group)
        rows_W = self.experts(wait(), plan.counts)
        sum_uW = combine(rows_W, routing.weights_TK, plan)
        y_uD = self.out_of_latent(sum_uW)
        return F.pad(y_uD, (0, 0, 0, len(x_rD) - u)) + shared_rD


class ParallelBlock(Block):
    """`Block` on this rank's rows, x_rD to (r, D). Args: as `Block`'s, and the mesh."""

    def __init__(self, letter: str, config: NemotronConfig, mesh: Mesh):
        layers = LAYERS | {"E": partial(ParallelExpertLayer, mesh=mesh)}
        if keys_are_replicated(config, mesh.tp):
            layers["*"] = partial(AttentionOfGroup, groups=config.attention_groups, mesh=mesh)
        super().__init__(letter, sizes_of_rank(config, letter, mesh.tp), layers)
        self.group = mesh.tp_group

    def mix(self, x_rD: Tensor, span: Span) -> Tensor:
        if self.letter == "E":
            return self.mixer(x_rD, span)
        x_BTD = all_tokens(x_rD, span, self.group)
        partial_y_BTD = self.mixer(x_BTD, span)
        return own_rows(partial_y_BTD, self.group)


# region carried: vocab_parallel_embedding (home: 04_seq_parallel)
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


# endregion copy 88b9f3


class ParallelNemotronLM(NemotronLM):
    """`NemotronLM` on a mesh: this replica's tokens_BT to logits_Rv, a row for each of its tokens.

    Rows from B · T on are padding, as are entries from vocab_size on. `loss` has the sums of this
    replica over the counts of all: the same on its tp ranks. Its weights are those of
    NemotronLM(config), for every mesh.
    Raises: ValueError where sizes do not divide, and for a token id outside the vocabulary (on a
    GPU: NaN). Source: Nemotron 3; Megatron-LM's layout.
    """

    def __init__(self, config: NemotronConfig, mesh: Mesh = Mesh()):
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(config, partial(ParallelBlock, mesh=mesh), mesh)
            for module in (self.embedding, self.head):
                V = padded_vocab_size(config.vocab_size, mesh.tp)
                module.weight = nn.Parameter(torch.empty(V // mesh.tp, config.hidden_size))
        if torch.get_default_device().type == "meta":
            return
        weights = initial_weights(config)
        self.take({name: shard_tensor(name, x, config, mesh) for name, x in weights})

    def embed(self, tokens_BT: Tensor) -> Tensor:
        tokens_R = padded_rows(tokens_BT.flatten(), self.mesh.tp_group)
        V = self.config.vocab_size
        return vocab_parallel_embedding(tokens_R, self.embedding.weight, V, self.mesh.tp_group)

    def logits(self, hidden_rD: Tensor, detach: bool = False) -> Tensor:
        return super().logits(gather_from_sp(hidden_rD, self.mesh.tp_group), detach)

    def cross_entropy(self, logits_Rv: Tensor, targets_BT: Tensor) -> Tensor:
        V = self.config.vocab_size
        is_id_BT = _is_id(targets_BT, V, IGNORED)
        logits_Uv = logits_Rv[: targets_BT.numel()]
        group = self.mesh.tp_group
        loss_U = _VocabParallelCrossEntropy.apply(logits_Uv, targets_BT.flatten(), V, group)
        loss_BT = torch.where(targets_BT != IGNORED, loss_U.view_as(targets_BT), 0)
        return torch.where(is_id_BT, loss_BT, torch.nan)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# One table decides all. Over which ranks is a parameter sharded, and over which ranks is its
# gradient a partial sum?
#
#     sharded   parameters                                  a rank's gradient     is summed
#     over                                                  has seen              over
#     ep        experts                                     all rows of ep        edp
#     tp        M, *, -, shared expert, vocabulary          its replica's tokens  dp
#     –         norms, router, latent and MTP projections   its own tokens        tp × dp
#               keys and values where tp > groups           its own heads         tp × dp
#
# In the first line ep may be larger than tp: an expert gets rows of several replicas, and what is
# left to sum is less than dp. In the last line sequence parallelism makes the difference: those
# parameters are replicated in a tp group, but their gradients there are partial sums.
#
# By hand, 4 ranks, tp 2, ep 4, so dp 2 and edp 1. Rank i has the tokens of one letter, a b on the
# first replica and c d on the second. A gradient is a sum over tokens, written as their letters:
#
#     after backward        rank 0     rank 1     rank 2     rank 3      to do
#     expert 0 (rank 0)     a+b+c+d    –          –          –           nothing: edp is 1
#     heads, half each      a+b        a+b        c+d        c+d         sum over ranks 0 2, and 1 3
#     a norm                a          b          c          d           sum over all four
#
# Three mistakes, and training runs with all of them. A norm summed over dp alone is a+c on ranks 0
# and 2, and b+d on 1 and 3: copies of one parameter drift apart. Heads summed over all ranks are tp
# times too large, and Adam hides that. Experts summed over dp add up gradients of other experts.


# Three names, and what the table says for tp 2 and ep 4:
#
#     layers.0.mixer.in_proj.weight     tp, rows, five components: z, x, B, C and dt, each in halves
#     layers.1.mixer.experts.up         ep, the first dimension: a quarter of the experts
#     layers.1.mixer.router.weight      replicated: each rank chooses among all experts

VOCABULARY = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Placement:
    """How a parameter is sharded. Source: ours."""

    over: str = ""  # "tp", "ep", or "" for replicated
    dim: int = 0
    sizes: tuple[int, ...] = ()  # of the components along dim, each sharded by itself


def placement(name: str, config: NemotronConfig, tp: int) -> Placement:
    """The place of the plain model's tensor `name` on a mesh. Source: ours."""
    if name.endswith(("experts.up", "experts.down")):
        return Placement("ep", 0, (config.num_experts,))
    if name in VOCABULARY:
        return Placement("tp", 0, (padded_vocab_size(config.vocab_size, tp),))
    if ".shared." in name:
        return Placement("tp", int("down" in name), (config.shared_size,))
    replicated = ["router.", "_latent."]
    if keys_are_replicated(config, tp):
        replicated += ["k_proj.", "v_proj."]
    if "mixer." in name and not any(part in name for part in replicated):
        dim, sizes = components(name, config)
        return Placement("tp", dim, tuple(sizes))
    return Placement()


def shard_tensor(name: str, full: Tensor, config: NemotronConfig, mesh: Mesh) -> Tensor:
    """This rank's shard of `full`, the plain model's tensor `name` (...); a copy.

    Raises: RuntimeError where a sharded dimension has not the configuration's size.
    """
    place = placement(name, config, mesh.tp)
    if not place.over:
        return full.clone()
    ranks = getattr(mesh, place.over)
    rank = getattr(mesh, f"{place.over}_rank")
    if name in VOCABULARY:
        padding = sum(place.sizes) - config.vocab_size
        full = F.pad(full, (0, 0, 0, padding))
    parts = [part.chunk(ranks, place.dim)[rank] for part in full.split(place.sizes, place.dim)]
    return torch.cat(parts, place.dim).clone()


def merge_tensor(name: str, shards: list[Tensor], config: NemotronConfig, mesh: Mesh) -> Tensor:
    """The plain model's tensor `name` (...) of the shards of all ranks, in order.

    Raises: ValueError where ranks that should hold the same shard differ.
    """
    place = placement(name, config, mesh.tp)
    ranks = getattr(mesh, place.over) if place.over else 1
    for rank, shard in enumerate(shards):
        if not torch.allclose(shard, shards[rank % ranks], 0, 0, equal_nan=True):
            raise ValueError(f"{name}: rank {rank}'s differs from rank {rank % ranks}'s")
    if not place.over:
        return shards[0].clone()
    sizes = [size // ranks for size in place.sizes]
    parts_of_ranks = [shard.split(sizes, place.dim) for shard in shards[:ranks]]
    merged = [torch.cat(parts, place.dim) for parts in zip(*parts_of_ranks)]
    full = torch.cat(merged, place.dim)
    return full[: config.vocab_size].clone() if name in VOCABULARY else full


def gather_state_dict(tensors: StateDict, model: NemotronLM) -> StateDict:
    """All ranks' shards (by parameter name) to full tensors, on the CPU of every rank. Collective.

    Each rank holds the shards of all ranks for a while. Raises: as `merge_tensor`.
    """
    mine = {name: x.detach().cpu() for name, x in tensors.items()}
    shards = [mine] * group_size()
    if len(shards) > 1:
        dist.all_gather_object(shards, mine)
    full = {}
    for name in mine:
        full[name] = merge_tensor(name, [x[name] for x in shards], model.config, model.mesh)
    return full


def check_layout(config: NemotronConfig, tp: int, ep: int) -> None:
    """Raises ValueError where heads, groups, features or experts do not divide over the ranks."""
    letters = config.pattern + (config.mtp_pattern if config.mtp_num_layers else "")
    sizes_of_rank(config, letters, tp)
    if "E" in letters:
        check_ep(config.num_experts, ep)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Each rank's loss is a sum divided by the count of all replicas. So gradients are added only, and
# never divided. With 3 targets on one replica and 1 on the other, a mean of means would count the
# single one three times.
#
# The ranks of a tp group compute the same loss, each from its vocabulary entries. That is no reason
# to divide: backward goes through g, and its reduce-scatter adds what each rank's entries have
# contributed. A replica may have no sequence at all. It still takes part in each message, in the
# order of the others, with empty tensors.
#
# The counts for the bias are those of all ranks: with sequence parallelism the ranks of a replica
# have routed different tokens. Summed over dp, each tp rank would move its copy of β by its own
# counts.
#
# The norm before clipping counts each element once. A rank adds its square divided by the number of
# ranks that hold the same shard: world for replicated parameters, dp for shards over tp, edp for
# experts. (Chapter 2's clip_grad_norm_ has one group of shards; here are two.)

Step = namedtuple("Step", "losses norm counts")  # as `loss`; before clipping; (layers, E)


# region carried: sum_gradients (home: 06_moe_fp8)
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


# endregion copy 48df9b
# region carried: make_optimizer, gradients (home: 05_mamba_hybrid)
def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1) -> AdamW:
    """AdamW that decays matrices; not A_log, dt_bias and D, for which 0 is no neutral value."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def gradients(model: nn.Module) -> StateDict:
    return {name: p.grad for name, p in model.named_parameters()}


# endregion copy db40aa


def parameters_by_place(model: NemotronLM) -> dict[str, list[nn.Parameter]]:
    """The parameters that are sharded over "tp", over "ep", and not (""). Source: ours."""
    found = {"": [], "tp": [], "ep": []}
    for name, p in model.named_parameters():
        found[placement(name, model.config, model.mesh.tp).over].append(p)
    return found


def reduce_gradients(model: NemotronLM) -> None:
    """Sums every gradient over the ranks of its line in the table, in three messages."""
    by_place = parameters_by_place(model)
    sum_gradients(by_place["ep"], model.mesh.edp_group)
    sum_gradients(by_place["tp"], model.mesh.data_group)
    sum_gradients(by_place[""])  # all ranks


@torch.no_grad()
def gradient_norm(model: NemotronLM) -> Tensor:
    """The norm of the full gradient, a scalar, at least fp32, the same on every rank. Collective
    where the model is on a mesh."""
    mesh = model.mesh
    world = mesh.tp * mesh.dp
    total = torch.zeros((), device=model.head.weight.device)
    for over, parameters in parameters_by_place(model).items():
        copies = world // {"": 1, "tp": mesh.tp, "ep": mesh.ep}[over]
        for p in parameters:
            if p.grad is not None:
                total = total + at_least_fp32(p.grad).square().sum() / copies
    if world > 1:
        _all_reduce(total)
    return total.sqrt()


def train(
    model: NemotronLM,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    alpha: float = 1e-4,
    gamma: float = 1e-3,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[Step]:
    """Trains the model, on its mesh or alone; yields the `Step` of all replicas after each.

    Every rank must iterate it, with the same batches. Args: batches: (B, T) tensors of all
    replicas, on the model's device; a replica may get more rows than another, or none. alpha:
    weight of the balancing loss. gamma: step of the routers' biases. Only tokens of the step count
    for them. Raises: ValueError for an id outside the vocabulary, on every rank (on a GPU: NaN).
    """
    mesh = model.mesh
    parallel = mesh.tp * mesh.dp > 1
    device = model.head.weight.device
    for batch in batches:
        # Ids of all replicas: a rank that raised alone would leave the others waiting.
        _is_id(batch[0], model.config.vocab_size)
        _is_id(batch[1], model.config.vocab_size, IGNORED)
        earlier = model.counts()  # of passes that were no step
        optimizer.zero_grad()
        sequences = len(batch[0])  # of all replicas
        batch = [x.tensor_split(mesh.dp)[mesh.dp_rank] for x in batch]
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            losses, balance_B = model.loss_and_balance(*batch)
        total = losses[0] + alpha * balance_B.sum() / sequences
        total.backward()
        losses = losses.detach()
        counts = model.counts() - earlier
        if parallel:
            reduce_gradients(model)
            losses = _all_reduce(losses.clone(), mesh.data_group)
            counts = _all_reduce(counts)  # of all ranks: those of a replica have different tokens
        norm = gradient_norm(model)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
        update_expert_bias(model.routers(), counts, gamma)
        yield Step(losses, norm, counts)


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# This is all of the model, and not all of its training. Optimizer states are replicated over dp and
# edp: chapter 7 shards them. Layers are not cut into stages: chapter 3 does so, and a stage of
# Nemotron 3 must count layers by their cost, because an M and an E take different times. Sequences
# are not sharded over replicas: chapter 5 does so for M and *, and an E needs nothing for it.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# The proof trains a small odd model for five steps on four layouts of the ranks and on the single
# device, and compares each tensor. The model has all four kinds of layers, latent experts and two
# depths of multi-token prediction. Its batches have what breaks wrong code: tokens that do not
# divide over tp, sequences that do not divide over dp (so one replica has none), documents that end
# inside a rank's rows, targets that do not count, and an expert that no token chooses.
#
# fp64 is the proof; fp32 and bf16 show what rounding does to right code. In bf16 it sends some
# tokens to other experts, whose gradients then differ by tens of percents.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 5e-1}


def check_case(ranks: int, device: torch.device) -> tuple[NemotronConfig, list[Batch]]:
    """A small odd model with all kinds of layers, and five batches: tokens, replicas and vocabulary
    do not divide, documents cross ranks, targets are unequally many, experts get no token."""
    sizes = {"hidden_size": 16, "ffn_hidden_size": 4 * ranks, "shared_size": 2 * ranks}
    sizes |= {"mamba_heads": 2 * ranks, "mamba_head_size": 4, "mamba_groups": ranks}
    sizes |= {"attention_heads": 2 * ranks, "attention_head_size": 4, "attention_groups": ranks}
    sizes |= {"num_experts": 4 * ranks, "top_k": 2, "expert_size": 12, "moe_latent_size": 8}
    more = {"state_size": 6, "chunk": 4, "init_std": 0.1, "dt_init": (0.05, 0.5)}
    config = NemotronConfig(61, pattern="ME*-E", **sizes, **more)
    rng = torch.Generator().manual_seed(1)
    batches = []
    for step in range(5):
        B = ranks + 1 if step % 2 else max(1, ranks - 1)  # some replicas have two rows, or none
        ids_2BT = torch.randint(61, (2, B, 7), generator=rng)
        tokens_BT, targets_BT = ids_2BT.to(device)
        targets_BT[0, :3] = IGNORED
        document_BT = torch.zeros_like(tokens_BT)
        document_BT[::2, 3:] = 1
        batches.append((tokens_BT, targets_BT, document_BT))
    return config, batches


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model on this mesh and on a single device: name to error."""
    config, batches = check_case(group_size(), device)
    plain = NemotronLM(config).to(device, dtype)
    parallel = ParallelNemotronLM(config, mesh).to(device, dtype)
    for router in plain.routers() + parallel.routers():
        router.bias[:1] = -10
    lr = 1e-3
    options = {"alpha": 0.01, "gamma": 0.01, "max_norm": 0.1, "autocast": autocast}
    alone = train(plain, make_optimizer(plain, lr), batches, **options)
    steps = train(parallel, make_optimizer(parallel, lr), batches, **options)
    place = f"tp {mesh.tp} ep {mesh.ep},"
    errors = {}
    for step, (here, there) in enumerate(zip(steps, alone)):
        kinds = {"loss": "losses", "norm before clipping": "norm"}
        if dtype == torch.float64:  # elsewhere rounding may decide between nearly equal experts
            kinds["count of rows"] = "counts"
        for kind, name in kinds.items():
            found = {f"{step}": getattr(here, name)}
            expected = {f"{step}": getattr(there, name)}
            errors |= relative_errors(f"{kind}, {place}", found, expected)
        if step == 0:
            full = gather_state_dict(gradients(parallel), parallel)
            errors |= relative_errors(f"gradient, {place}", full, gradients(plain))
    if dtype == torch.float64:
        full = gather_state_dict(parallel.state_dict(), parallel)
        moved = len(batches) * lr
        errors |= relative_errors(f"weight after AdamW, {place}", full, plain.state_dict(), moved)
    return over_all_ranks(errors)


def layouts_of(ranks: int) -> list[tuple[int, int]]:
    """(tp, ep): no groups, half of the ranks in both, tp within ep, and experts alone."""
    half = ranks // 2 if ranks % 2 == 0 else ranks
    layouts = [(1, 1), (half, half), (half, ranks), (1, ranks)]
    return list(dict.fromkeys(layouts))


def check(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """`equivalence` on four layouts of the ranks."""
    errors = {}
    for tp, ep in layouts_of(group_size()):
        mesh = make_mesh(tp, ep, device, args.timeout)
        errors |= equivalence(mesh, device, dtype, autocast)
    return errors


# The text is read as bytes, one token each. A small run says nothing about quality. It shows that
# ranks and single device have the same losses. load.py goes on from here, and writes with drafts.


@dataclass
class Options:  # the chapter's own flags
    tp: int | None = flag(None, "ranks that share a replica; None: 2 where that divides", least=1)
    ep: int | None = flag(None, "ranks that share experts; None: 4, or what divides", least=1)
    seq_length: int = flag(64, "tokens of a sequence, T", least=1)
    batch: int = flag(8, "sequences per step, over all replicas", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)
    alpha: float = flag(1e-4, "weight of the balancing loss")
    gamma: float = flag(0.01, "step of the routers' biases; the paper's is 0.001")
    data: str = flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")


def configs_of(args: argparse.Namespace) -> dict[str, NemotronConfig]:
    """Nano in small, without latent experts and MTP, and what the flags say: Super in small."""
    config = config_from(args, NemotronConfig, seed=args.seed, init_std=0.06)
    nano = replace(config, pattern="MEM*E", moe_latent_size=0, mtp_num_layers=0)
    return {"Nano in small": nano, "Super in small": config}


def text_batches(args: argparse.Namespace, device: torch.device, steps: int) -> Iterator[Batch]:
    data = TextData(args.data, args.seq_length)
    for step in range(steps):
        yield tuple(x.to(device) for x in data.batch(step, args.batch, args.seed))


def training(args: argparse.Namespace, model: NemotronLM, steps: int) -> Iterator[Step]:
    """Trains as the flags say."""
    _, autocast = dtypes(args)
    batches = text_batches(args, model.head.weight.device, steps)
    optimizer = make_optimizer(model, args.lr)
    return train(model, optimizer, batches, args.alpha, args.gamma, autocast=autocast)


def demonstrate(
    args: argparse.Namespace,
    mesh: Mesh,
    device: torch.device,
    config: NemotronConfig | None = None,
    alone: Sequence[float] = (),
) -> tuple[ParallelNemotronLM, list[float]]:
    """Trains a model on this mesh, and prints losses next to the single device's first ones."""
    config = config or configs_of(args)["Super in small"]
    dtype, _ = dtypes(args)
    model = ParallelNemotronLM(config, mesh).to(device, dtype)
    say("step      loss  single device    norm   trunk, depth 1, 2 …")
    losses = []
    for step, (of_step, norm, _) in enumerate(training(args, model, args.steps)):
        loss, norm = read_step(step, of_step[0], norm)
        losses.append(loss)
        if step < 5 or step % 10 == 9:
            text = f"{alone[step]:.6f}" if step < len(alone) else ""
            parts = " ".join(f"{part:.3f}" for part in of_step[1:].tolist())
            say(f"{step:4}  {loss:.6f}  {text:>13}  {norm:6.3f}   {parts}")
    say()
    return model, losses


def claims(errors: dict[str, float], trained: dict[str, tuple]) -> list[tuple]:
    """What this run has measured: (claim, paper, here, verdict)."""
    rows = []
    kinds = ("loss", "gradient", "norm before clipping", "weight after AdamW", "count of rows")
    for kind in kinds:
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, all layouts, float64"
        here = f"worst {error:.1e} relative"
        is_good = error <= BOUNDS["fp64"]
        rows.append((claim, "exact", here, is_good))
    for name, (losses, alone, bound) in trained.items():
        gaps = [abs(x - y) for x, y in zip(losses, alone)]
        within = max(gaps)
        claim = f"{name}: the first losses equal the single device's"
        here = f"within {within:.0e}"
        rows.append((claim, "equal", here, within <= bound))
        recent = losses[-5:]
        last = sum(recent) / len(recent)
        first = losses[0]
        here = f"{first:.2f}, then {last:.2f}"
        claim = f"{name}: loss"
        note = "a small model, a short run"
        rows.append((claim, "–", here, note))
    return rows


def measure(
    args: argparse.Namespace, mesh: Mesh, device: torch.device
) -> tuple[list[tuple], ParallelNemotronLM]:
    """Proves the equivalence and trains both models; returns the claims, and Super in small."""
    errors = check(args, device, torch.float64)
    dtype, _ = dtypes(args)
    trained = {}
    for name, config in configs_of(args).items():
        # Every rank trains the plain model for some steps, so that no rank waits for another.
        plain = NemotronLM(config).to(device, dtype)
        first = training(args, plain, min(3, args.steps))
        alone = [step.losses[0].item() for step in first]
        count = sum(p.numel() for p in plain.parameters())
        say(f"{name}: {config.pattern}, {config.mtp_num_layers} depths, {count:,} parameters\n")
        model, losses = demonstrate(args, mesh, device, config, alone)
        trained[name] = (losses, alone, BOUNDS[args.dtype])
    return claims(errors, trained), model


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = make_mesh(args.tp, args.ep, device, args.timeout)
    layout = f": tp {mesh.tp} × dp {mesh.dp}, ep {mesh.ep}"
    say_setting(args, layout)
    if args.check:
        precision = dtypes(args)
        errors = check(args, device, *precision)
        bound = BOUNDS[args.dtype]
        good = print_errors(errors, bound)
    else:
        rows, _ = measure(args, mesh, device)
        good = print_claims(rows)
    if not good:
        sys.exit(1)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the file that they name, do not fit."""
    world = args.world_size
    args.tp = args.tp or math.gcd(2, world)
    args.ep = args.ep or math.gcd(4, world, args.num_experts)
    if world % args.tp or world % args.ep:
        raise ValueError(f"--tp {args.tp} and --ep {args.ep} must both divide the {world} ranks")
    for config in configs_of(args).values():
        check_layout(config, args.tp, args.ep)
    args.layouts = [(args.tp, args.ep)]
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    configs = [Options, NemotronConfig]
    return parse_flags(__doc__, configs, check_args, ranks=4, steps=40)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


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
