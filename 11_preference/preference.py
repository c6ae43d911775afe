# SPDX-License-Identifier: MIT-0
"""Chapter 11. Learning from preferences: Nemotron-4, DPO and reward-aware RPO.

Papers: Nemotron-4 15B Technical Report, Parmar et al., 2024, arXiv 2402.16819;
        Nemotron-4 340B Technical Report, NVIDIA, 2024, arXiv 2406.11704;
        Direct Preference Optimization, Rafailov et al., 2023, arXiv 2305.18290;
        Reward-aware Preference Optimization, NVIDIA, 2025, arXiv 2502.00203

The problem. A pretrained model continues text, and no corpus says which of two answers is better.
That is learned from pairs of answers, and 98 % of Nemotron-4 340B's data for this are synthetic.

The idea. Sample several answers, score them (a reward), and move the model that learns, the policy
π, towards the better of two, compared with a fixed copy of itself, the reference ref:

      prompts ──► policy samples K answers ──► verifier, or reward model
                    ▲                                    │  best and worst of K
                    │                                    ▼
        next policy and reference ◄── DPO, RPO ◄── pairs (chosen, rejected)

    Δ = [log π(chosen) − log ref(chosen)] − [log π(rejected) − log ref(rejected)]
    DPO    −log σ(β Δ)                     push Δ up, without end           σ(x) = 1 / (1 + e^−x)
    RPO    distance of β Δ from η Δr       until it matches the difference of rewards, Δr

All of it is made of one number per answer: the sum of its tokens' log-probabilities, here from
logits whose vocabulary is sharded over tensor-parallel ranks.

Run it (no flag is needed; --help lists them):

    python 11_preference/preference.py              2 local ranks: two replicas
    python 11_preference/preference.py --tp 2       one model on both
    python 11_preference/preference.py --ranks 1    one process, for a debugger
    python 11_preference/preference.py --check      equivalence alone, the error of each tensor
    python 11_preference/rounds.py                  the reward model, and rounds of the loop above
    torchrun --nproc-per-node=8 11_preference/preference.py --tp 4 --num-heads 8

Left out: generation with a key-value cache; judging by another language model; published weights;
GRPO (chapter 12); the papers' tables (preference_tables.py).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension,
# replicated on the ranks of the group; a small letter is this rank's shard of it. partial_ marks a
# partial sum.
#
#     B  rows of a batch              N  attention heads                  n = N / tp
#     S  tokens of a row              G  groups of heads that share       g = G / tp, at least 1
#     T  tokens of a batch, B · S        keys and values                  U  tokens of a chunk
#     H  hidden size                  D  size of a head; C of its channels are rotated
#     F  feed-forward size            V  vocabulary entries               v = V, padded, / tp
#     R  responses of a batch         P  pairs of them, R = 2 · P         f = F / tp
#
# A response is an answer with its end token. tp is the number of ranks that share one copy of the
# model; dp is the number of copies, the replicas. "region carried" marks code that is copied from
# its home chapter, nearly all at the end of the file. Editors fold it.

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer

Group = dist.ProcessGroup | None  # None: all ranks
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class GPTConfig:
    """Sizes of a Nemotron-4 model. Raises ValueError for impossible sizes."""

    vocab_size: int = 13
    num_layers: int = flag(2, "layers, L", least=1)
    hidden_size: int = flag(64, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    num_query_groups: int = flag(2, "groups of them that share keys and values, G", least=1)
    rotary_percent: float = 0.5  # of each head's channels; the name is Megatron-LM's
    ffn_hidden_size: int | None = None  # F; None: 4·H
    rope_theta: float = 10_000.0
    init_std: float = 0.05
    seed: int = 0  # the initial weights are a function of this configuration alone
    vocab_multiple: int = 1  # v is padded to a multiple of this (Megatron-LM: 128)

    def __post_init__(self):
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        for large, small in (("hidden_size", "num_heads"), ("num_heads", "num_query_groups")):
            if getattr(self, large) % getattr(self, small):
                raise ValueError(f"{large} must be a multiple of {small}, but this is {self}")
        self.head_size = self.hidden_size // self.num_heads  # D
        self.rotary_size = int(self.head_size * self.rotary_percent)  # C
        if self.rotary_size not in range(2, self.head_size + 1, 2):
            found = f"rotary_percent={self.rotary_percent} of {self.head_size} channels"
            raise ValueError(f"{found} is {self.rotary_size}: it must be even, and at least 2")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 The log-probability of a token, from sharded logits ─────────────────────────────────────
#
# Every loss of this chapter reads log π(token), of the tokens that were chosen and of no others:
#
#     log π(t) = x_t − m − log Σ_j exp(x_j − m)          m = max_j x_j
#
# 256,000 vocabulary entries and 4,096 tokens make 4.2 GB of fp32 logits. They need not exist. The
# output layer leaves each rank with its vocabulary shard (chapter 2), and three scalars per token
# are all-reduced:
#
#     m                      all-reduce(max)
#     x_t − m, on its owner  all-reduce(sum)  ┐ one collective: the two are stacked; the other
#     Σ_j exp(x_j − m)       all-reduce(sum)  ┘ ranks contribute 0 to the first
#
# With V = 4 on two ranks, logits (1, 3 | 0, 2) and token 3: m = 3 comes from rank 0, x_t − m = −1
# from rank 1. The sums are e^−2 + e^0 = 1.135 and e^−3 + e^−1 = 0.418, together 1.553, and the
# result is −1 − log 1.553 = −1.440.
#
# The gradient needs no communication: dlog π(t)/dx_j = 1[j = t] − softmax_j.
#
# Logits are bf16 under autocast, and exp needs fp32. Upcasting all of them would make the 4.2 GB
# again, so they are upcast in chunks of tokens. Only two scalars per token leave a chunk, and the
# collectives stay outside the loop. Backward needs no softmax from forward: it keeps the logits as
# they are, with log Σ exp per token, and computes the softmax again, chunk by chunk.
#
# Forward takes two passes over the logits, for the maximum and for the sum, and backward a third
# one. A gather of all logits to each rank would send V values per token, where this sends three.
# The chunk changes no bit of the result: each token's sum is computed by itself. It bounds what is
# upcast at once: with tp = 8, 256 tokens × 32,000 columns take 33 MB, and 4,096 would take 524 MB.
#
# Policy and reference both need these values, the policy with a gradient. Cross entropy is the same
# function with another sign, and chapter 2 has it. There the softmax is kept for backward, in fp32:
# that is the faster choice where memory allows it.
#
# Two mistakes. log(softmax(x)) is −inf once a token's probability is below 1e-45, which rejected
# answers reach, and the gradient is NaN. And a token on another rank must contribute 0 before the
# all-reduce: masked after it, each rank has multiplied away what its neighbours contributed.

# region shared: log-probabilities
IGNORED = -100  # a target that does not count


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Tv, targets_T, vocab_size, group, chunk):
        T, v = logits_Tv.shape
        columns = min(max(0, vocab_size - group_rank(group) * v), v)  # the others are padding
        row_T, is_local_T = _local_rows(targets_T, v, group)
        row_T1 = row_T[:, None]
        max_T = at_least_fp32(logits_Tv.new_full((T,), -torch.inf))
        if columns:
            max_T = at_least_fp32(logits_Tv[:, :columns].amax(dim=-1))
        _all_reduce(max_T, group, dist.ReduceOp.MAX)
        logit_T = at_least_fp32(logits_Tv.gather(-1, row_T1)[:, 0])
        # torch.where, and not (x − m) · mask: 0 · (−inf) is NaN.
        partial_logit_T = torch.where(is_local_T, logit_T - max_T, 0)
        partial_2T = torch.stack([partial_logit_T, torch.zeros_like(max_T)])
        for first in range(0, T, chunk):
            span = slice(first, first + chunk)
            x_Uv = _upcast(logits_Tv[span, :columns])
            x_Uv -= max_T[span, None]
            partial_2T[1, span] = x_Uv.exp_().sum(dim=-1)
        logit_T, sum_T = _all_reduce(partial_2T, group)
        ctx.save_for_backward(logits_Tv, row_T1, is_local_T, max_T + sum_T.log())
        ctx.columns = columns
        ctx.chunk = chunk
        return logit_T - sum_T.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        logits_Tv, row_T1, is_local_T, log_sum_T = ctx.saved_tensors
        grad_Tv = torch.empty_like(logits_Tv)
        for first in range(0, len(grad_T), ctx.chunk):
            span = slice(first, first + ctx.chunk)
            x_Uv = _upcast(logits_Tv[span])
            x_Uv -= log_sum_T[span, None]
            x_Uv.exp_().mul_(-grad_T[span, None])
            x_Uv.masked_fill_(grad_T[span, None] == 0, 0)  # 0 · NaN is NaN
            x_Uv[:, ctx.columns :] = 0
            x_Uv.scatter_add_(-1, row_T1[span], (grad_T[span] * is_local_T[span])[:, None])
            grad_Tv[span] = x_Uv
        return grad_Tv, None, None, None, None


def _upcast(x: Tensor) -> Tensor:
    """A copy of x (...) in at least fp32, to work on in place."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def vocab_parallel_log_probs(
    logits_BSv: Tensor,
    targets_BS: Tensor,
    group: Group = None,
    vocab_size: int | None = None,
    chunk: int = 256,
) -> Tensor:
    """log π of each target, from logits whose vocabulary is sharded over `group`.

    Args:
        logits_BSv: this rank's shard; rank r holds token ids [r·v, (r + 1)·v). Not modified.
        targets_BS: int64 token ids in [0, vocab_size), or −100; replicated. Or both without B.
        group: the ranks that share the vocabulary; None: all ranks. Collective in forward.
        vocab_size: columns from there on are padding. None: no column is.
        chunk: so many tokens are upcast to fp32 at once. It changes no bit of the result.

    Returns: log_prob_BS, replicated, at least fp32; 0 where the target is −100.
    Memory: backward keeps the logits as they are, and makes their gradient in the same dtype.
    Raises: ValueError where shapes disagree, sizes do not fit, a target is out of range (on a GPU
        its result is NaN), or this rank is not in the group.
    Source: Megatron-LM's cross entropy; NeMo-Aligner's DistributedLogprob.
    """
    columns = logits_BSv.shape[-1] * group_size(group)
    vocab_size = columns if vocab_size is None else vocab_size
    if logits_BSv.shape[:-1] != targets_BS.shape:
        shapes = f"logits {tuple(logits_BSv.shape)} and targets {tuple(targets_BS.shape)}"
        raise ValueError(f"{shapes}: all dimensions but the last must agree")
    if not 0 < vocab_size <= columns or chunk < 1:
        found = f"vocab_size={vocab_size}, chunk={chunk}"
        raise ValueError(f"{found}: from 1 to the group's {columns} columns, and at least 1")
    is_id_BS = _is_id(targets_BS, vocab_size, IGNORED)
    logits_Tv = logits_BSv.flatten(0, -2)
    targets_T = targets_BS.flatten()
    log_prob_T = _VocabParallelLogProbs.apply(logits_Tv, targets_T, vocab_size, group, chunk)
    log_prob_BS = torch.where(targets_BS != IGNORED, log_prob_T.view_as(targets_BS), 0)
    return torch.where(is_id_BS, log_prob_BS, torch.nan)


# endregion
# ── 1.2 Prompts and responses ───────────────────────────────────────────────────────────────────
#
# Position j predicts token j + 1. So the targets are the tokens shifted by one, once, when a batch
# is made, and a target that is not part of a response is −100. There is no mask next to them that
# could be shifted a second time, or forgotten for the rejected answer.
#
#     token       7  3  =  3  7  end  pad        prompt 7 3 =, response 3 7 end
#     target      ·  ·  3  7  end  ·   ·         · is −100: the prompt does not count
#     sequence    0  0  0  0  0    0   R         which response a token belongs to; R: none
#     position    0  1  2  3  4    5   0
#
# One shift is right, and two are not. With the mask of responses shifted once more than the tokens,
# the last prompt token counts and the end token does not. The loss falls all the same.
#
# The end token counts: without it no policy learns to stop. (Padding with the end token, and then
# masking whatever equals the padding, is how it gets lost.) The place of the end token is kept:
# there the reward model (rounds.py) reads its input.
#
# The prompt's tokens are read and predict nothing. Count them, and the policy learns to write
# prompts as well; in a pair they cancel from Δ only as long as both rows share one prompt.
#
# Responses have unequal lengths. Padded, each has its own row, as long as the longest. Packed,
# several follow each other in one row, and attention must not cross from one to the next: a token
# sees the tokens before it in its own sequence. Positions start anew in each.


# region shared: batches of responses
class Sequences(NamedTuple):
    """R prompts with their responses: padded, or packed. Source: ours."""

    tokens_BS: Tensor
    targets_BS: Tensor  # the next token, where it is part of a response; −100 elsewhere
    sequence_BS: Tensor  # which of the R sequences a token belongs to; R: padding
    position_BS: Tensor  # in its sequence
    end_R: Tensor  # index of each response's last token in the B · S tokens

    def to(self, device: torch.device) -> Sequences:
        return Sequences(*(x.to(device) for x in self))


# Token ids of a prompt, and of its response.
Example = tuple[list[int], list[int]]


def collate(examples: list[Example], row_length: int | None = None, pad: int = 0) -> Sequences:
    """Examples to a batch: one a row, or packed into rows of row_length in their order.

    Raises: ValueError for an empty prompt or response, or one that is longer than a row.
    Source: ours.
    """
    length = row_length or max(len(prompt) + len(response) for prompt, response in examples)
    rows = []  # of four lists each
    ends = []
    for index, (prompt, response) in enumerate(examples):
        size = len(prompt) + len(response)
        if not prompt or not response or size > length:
            found = f"example {index} is {prompt}, {response}"
            raise ValueError(f"{found}: neither may be empty, nor both longer than {length}")
        is_packed = row_length is not None and rows
        if not is_packed or len(rows[-1][0]) + size > length:
            rows.append(([], [], [], []))
        tokens, targets, sequence, position = rows[-1]
        tokens += prompt + response
        targets += [IGNORED] * (len(prompt) - 1) + response + [IGNORED]
        sequence += [index] * size
        position += range(size)
        ends.append((len(rows) - 1) * length + len(tokens) - 1)
    columns = []
    fills = (pad, IGNORED, len(examples), 0)
    for column, fill in zip(zip(*rows), fills):
        filled = [values + [fill] * (length - len(values)) for values in column]
        columns.append(torch.tensor(filled))
    return Sequences(*columns, torch.tensor(ends))


# endregion
def sequence_log_probs(model: GPT, batch: Sequences) -> Tensor:
    """log π of each response: the sum over its tokens, log_prob_R. Source: DPO, equation 7.

    The sum, and not the mean: π(response) is a product. With means a token of a long response
    would weigh less than one of a short response, and β would be another one for each length.
    """
    log_prob_BS = model.log_probs(batch)  # 0 where a target does not count
    sums = log_prob_BS.new_zeros(len(batch.end_R) + 1)
    sums = sums.index_add(0, batch.sequence_BS.flatten(), log_prob_BS.flatten())
    return sums[:-1]


# ── 1.3 DPO ─────────────────────────────────────────────────────────────────────────────────────
#
# Suppose answers are preferred with probability σ(r(chosen) − r(rejected)), r being their rewards.
# Suppose too that a policy maximizes r minus β times its KL divergence from the reference. Then it
# is ref · exp(r/β), normalised for each prompt, and r = β log(π/ref) + a term of the prompt alone,
# which a difference cancels. So the policy is its own reward model, h is the difference of its
# rewards, and the loss of a pair is the negative log-likelihood of the preference:
#
#     h = β Δ            loss = −log σ(h)            dloss/dh = −(1 − σ(h))
#
# At the start the policy is the reference, so h = 0, the loss is log 2 = 0.693, and the gradient is
# −β/2 · (∇log π(chosen) − ∇log π(rejected)). That is a sharp test of everything before it: another
# dtype, dropout or mask in one of the two models, and the first loss is not log 2.
#
# β says how far the policy may go. The gradient fades once h is about 3, so Δ ends near 3/β: with
# β = 0.1 the odds of chosen to rejected have changed by e^30. The 340B report took β from 3e-4 to
# 3e-3, since its responses have hundreds of tokens, and Δ is a sum over all of them.
#
# Only Δ counts, and two falling likelihoods have a growing Δ as well. Chosen and rejected share
# most of their tokens, and what pushes the rejected answer down takes the chosen one along. Both
# fall in most runs, the chosen answer more slowly. The 340B report adds −log π(chosen), the loss of
# supervised fine-tuning (SFT), with a weight of 1e-5 to 1e-3. It is a sum over tokens as well.
#
# ── 1.4 RPO, reward-aware ───────────────────────────────────────────────────────────────────────
#
# DPO pushes each Δ without end, however close the two answers are. A rejected answer may be nearly
# as good as the chosen one, and DPO unlearns it all the same. If rewards are known, so is the right
# margin g = η (r(chosen) − r(rejected)), and h should match it. Bern p has two outcomes, with
# probabilities p and 1 − p; KL( P ‖ Q ) = Σ P log(P/Q) is 0 where P and Q are equal:
#
#     distance        loss                                dloss/dh
#     backward_kl     KL( Bern σ(g) ‖ Bern σ(h) )         σ(h) − σ(g)             the 340B report's
#     forward_kl      KL( Bern σ(h) ‖ Bern σ(g) )         σ(h) σ(−h) (h − g)
#     squared         (h − g)²                            2 (h − g)
#
# All three are 0 at h = g and nowhere else. For g → ∞ the first becomes DPO. Swap its arguments,
# and it is the second: the same minimum, with another gradient, which vanishes for large |h|. A
# pair that is badly wrong then learns nothing.
#
# η multiplies the difference of rewards, not the rewards: a constant that all responses to a prompt
# gain changes nothing. It must suit their scale, as with scores from 0 to 4 or from 0 to 1.
#
# g = 0 asks for h = 0: two equally good answers, and the policy should not change its mind. With
# rewards that differ by 1 and η = 1, σ(g) = 0.73: the gradient at h = 0 is −0.23, DPO's is −0.5.


def dpo_loss(delta_P: Tensor, beta: float = 0.1) -> Tensor:
    """−log σ(β Δ) of each pair, loss_P.

    Args: delta_P: how far log π(chosen) has moved from the reference's, minus how far that of the
        rejected response has; sums over tokens, at least fp32. loss_P has its dtype; P may be 0.
    Raises: ValueError for β ≤ 0: the loss would stay at log 2 for ever.
    Source: Direct Preference Optimization (Rafailov et al., 2023), equation 7.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: it must be above 0")
    return -F.logsigmoid(beta * delta_P)


def rpo_loss(
    delta_P: Tensor,
    reward_gap_P: Tensor,
    beta: float = 0.1,
    eta: float = 1.0,
    distance: str = "backward_kl",
) -> Tensor:
    """Reward-aware RPO, loss_P. (Another method is called RPO as well: iterative *reasoning*
    preference optimization, trl's rpo_alpha, which is DPO with an SFT term.)

    Args: delta_P: as in `dpo_loss`. reward_gap_P: r(chosen) − r(rejected), finite; constants, so
        it gets no gradient. distance: "backward_kl", "forward_kl" or "squared", section 1.4.
    Raises: ValueError for β ≤ 0, another distance, or unequal shapes.
    Source: Nemotron-4 340B, section 3.3; 2502.00203, equation 3; NeMo-Aligner's names.
    """
    if not beta > 0 or distance not in ("backward_kl", "forward_kl", "squared"):
        known = "backward_kl, forward_kl or squared"
        raise ValueError(f"beta={beta}, distance={distance!r}: above 0, and {known}")
    if delta_P.shape != reward_gap_P.shape:
        shapes = f"delta_P {tuple(delta_P.shape)} and reward_gap_P {tuple(reward_gap_P.shape)}"
        raise ValueError(f"{shapes}: give one number per pair")
    h_P = beta * delta_P
    g_P = eta * reward_gap_P.detach()
    if distance == "squared":
        return (h_P - g_P).square()
    if distance == "backward_kl":
        return _bernoulli_kl(g_P, h_P)
    return _bernoulli_kl(h_P, g_P)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL( Bern σ(a) ‖ Bern σ(b) ) from logits: log(1 − σ(x)) would be −inf for x = 40."""
    p = a.sigmoid()
    cross_entropy = partial(F.binary_cross_entropy_with_logits, reduction="none")
    return cross_entropy(b, p) - cross_entropy(a, p)


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# Nemotron-4, for a single device. Compared with chapter 2's GPT:
#
# · LayerNorm stores its weight minus 1 and starts at zero: y = (1 + w) · x̂ + b. Weight decay then
#   pulls the scale towards 1, and not towards 0. Load such weights into a plain LayerNorm, and a
#   fresh model is zero everywhere.
# · Rotary position embedding, of half of each head. Channels j and j + C/2 are rotated by the angle
#   position · θ^(−2j/C), C = D/2, and the other half of the channels passes unchanged. A product of
#   a query and a key then depends on the distance of their positions alone.
# · Grouped-query attention: N heads of queries share G heads of keys and values, so that a token
#   takes 2 · G · D elements of a server's cache in each layer, and not 2 · H.
# · A squared ReLU in the feed-forward layer, relu(x)², and F = 4H; no biases, no dropout.
# · The output layer has weights of its own (untied).
#
# For D = 192 and C = 96, as in the 340B model, the fastest pair of channels turns by one radian per
# token, and the slowest by 1e4^(−94/96) = 0.00012. The half that is not rotated compares contents
# at any distance.
#
# Training repeats each group's keys for its heads. What is saved is the cache of a server: the 15B
# model keeps 2 · 8 · 128 elements per token and layer, where heads of their own would make it
# 2 · 6144. (48 heads share 8 groups there.)
#
# The rows of the fused key-value matrix are ordered (group, {k, v}, D): a shard of rows holds
# complete groups. (Megatron-LM puts the queries into the same matrix: one GEMM in place of two.) On
# a single device n = N, g = G and f = F.


class LayerNorm1p(nn.Module):
    """LayerNorm whose stored weight is its scale minus 1, x (..., H) to (..., H), in at least fp32.

    Source: Nemotron-4 15B, section 2; the name is Megatron-LM's.
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)


def rotary_cos_sin(position_BS: Tensor, config: GPTConfig, dtype: torch.dtype) -> Tensor:
    """cos and sin of the angles of C rotated channels, (2, B, S, C), at least fp32.

    Source: RoFormer (Su et al., 2021); Nemotron-4 15B, section 2.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    C = config.rotary_size
    channel = torch.arange(0, C, 2, device=position_BS.device, dtype=dtype)
    frequency = config.rope_theta ** (-channel / C)
    half_angle = position_BS[..., None].to(dtype) * frequency
    angle_BSC = torch.cat([half_angle, half_angle], dim=-1)
    return torch.stack([angle_BSC.cos(), angle_BSC.sin()])


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) of the last dimension to (−b, a); x (..., C). Source: RoFormer, equation 34."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rotary(x_BnSD: Tensor, cos_sin_2BSC: Tensor) -> Tensor:
    """Rotates the first C of D channels of each head, y_BnSD. Source: as `rotary_cos_sin`."""
    cos_B1SC, sin_B1SC = cos_sin_2BSC[:, :, None]
    C = cos_B1SC.shape[-1]
    rotated_BnSC = x_BnSD[..., :C]
    passed = x_BnSD[..., C:]
    y_BnSC = rotated_BnSC * cos_B1SC + rotate_half(rotated_BnSC) * sin_B1SC
    return torch.cat([y_BnSC.to(x_BnSD.dtype), passed], dim=-1)


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H): two sublayers with residual connections.

    The parallel model redefines enter, leave and own_groups, of kv (B, S, 2·G·D) to (B, S, 2·g·D).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        H = config.hidden_size
        linear = partial(nn.Linear, bias=False)
        self.config = config
        self.norm1 = LayerNorm1p(H)
        self.q = linear(H, H)
        self.kv = linear(H, 2 * config.num_query_groups * config.head_size)
        self.out = linear(H, H)
        self.norm2 = LayerNorm1p(H)
        self.up = linear(H, config.ffn_hidden_size)
        self.down = linear(config.ffn_hidden_size, H)

    def enter(self, x_BSH: Tensor) -> Tensor:
        return x_BSH

    def leave(self, partial_y_BSH: Tensor) -> Tensor:
        return partial_y_BSH

    def own_groups(self, kv: Tensor) -> Tensor:
        return kv

    def forward(self, x_BSH: Tensor, cos_sin_2BSC: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        """mask_B1SS: which token sees which; None: each sees all before it."""
        normed_BSH = self.enter(self.norm1(x_BSH))
        partial_y_BSH = self.attend(normed_BSH, cos_sin_2BSC, mask_B1SS)
        x_BSH = x_BSH + self.leave(partial_y_BSH)
        y_BSf = self.up(self.enter(self.norm2(x_BSH))).relu().square()
        return x_BSH + self.leave(self.down(y_BSf))

    def attend(self, x_BSH: Tensor, cos_sin_2BSC: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        D = self.config.head_size
        q_BnSD = rearrange(self.q(x_BSH), "B S (n D) -> B n S D", D=D)
        kv = self.own_groups(self.kv(x_BSH))
        k_BgSD, v_BgSD = rearrange(kv, "B S (g two D) -> two B g S D", two=2, D=D)
        q_BnSD = apply_rotary(q_BnSD, cos_sin_2BSC)
        k_BgSD = apply_rotary(k_BgSD, cos_sin_2BSC)
        heads = q_BnSD.shape[1] // k_BgSD.shape[1]  # of a group; head i is in group i // heads
        k_BnSD = k_BgSD.repeat_interleave(heads, dim=1)
        v_BnSD = v_BgSD.repeat_interleave(heads, dim=1)
        causal = mask_B1SS is None
        y_BnSD = F.scaled_dot_product_attention(q_BnSD, k_BnSD, v_BnSD, mask_B1SS, is_causal=causal)
        return self.out(rearrange(y_BnSD, "B n S D -> B S (n D)"))


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_BSV. Args: block makes a layer."""

    def __init__(self, config: GPTConfig, block: Callable = Block):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm1p(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.final_norm.weight.is_meta:  # on "meta" there are shapes without memory
            self.load_state_dict(dict(initial_weights(config)))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.embedding(tokens_BS)

    def hidden(self, tokens_BS: Tensor, *sequences: Tensor) -> Tensor:
        """x_BSH after the last norm. Args: as `forward`'s."""
        position_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        mask_B1SS = None
        if sequences:
            # Production passes lengths to a kernel for packed sequences, and makes no S × S mask.
            is_past_1SS = position_BS.mT >= position_BS
            sequence_BS, position_BS = sequences
            is_same_BSS = sequence_BS[:, :, None] == sequence_BS[:, None, :]
            mask_B1SS = (is_same_BSS & is_past_1SS)[:, None]
        x_BSH = self.embed(tokens_BS)
        cos_sin_2BSC = rotary_cos_sin(position_BS, self.config, x_BSH.dtype)
        for layer in self.layers:
            x_BSH = layer(x_BSH, cos_sin_2BSC, mask_B1SS)
        return self.final_norm(x_BSH)

    def forward(self, tokens_BS: Tensor, *sequences: Tensor) -> Tensor:
        """Args: sequences: sequence_BS and position_BS, or none: then each row is one sequence."""
        return self.output(self.hidden(tokens_BS, *sequences))

    def log_probs(self, batch: Sequences) -> Tensor:
        """log π of each target, log_prob_BS, at least fp32; 0 where it is −100."""
        logits_BSV = self(batch.tokens_BS, batch.sequence_BS, batch.position_BS)
        log_p_BSV = at_least_fp32(logits_BSV).log_softmax(dim=-1)
        target_BS1 = batch.targets_BS.clamp(min=0)[..., None]
        log_prob_BS = log_p_BSV.gather(-1, target_BS1)[..., 0]
        return torch.where(batch.targets_BS != IGNORED, log_prob_BS, 0)


def initial_weights(config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and full initial weights (...), a function of `config` alone, one by one, on the CPU.

    Source: chapter 2; the papers name no initialization.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.device("meta"):  # shapes without memory
        shapes = GPT(config)
    for name, p in shapes.named_parameters():
        if p.ndim == 1:  # LayerNorm: its scale is 1 + weight
            yield name, torch.zeros(p.shape, device="cpu")
            continue
        std = config.init_std
        if name.endswith(("out.weight", "down.weight")):
            std /= math.sqrt(2 * config.num_layers)
        yield name, torch.randn(p.shape, generator=generator, device="cpu") * std


# ── 2.2 The parallel model ──────────────────────────────────────────────────────────────────────
#
# The same model with chapter 2's operators at its boundaries, and shards for weights: q, kv and up
# have this rank's rows, out and down its columns. copy_to_tp stands once before q and kv, so that
# attention costs one all-reduce in backward. (Chapter 2's linear layers contain it, and overlap the
# all-reduce with a GEMM.) The embedding is sharded by vocabulary entries, and so is the output
# layer, whose logits stay sharded.
#
# Keys and values need care. Nemotron-4 has G = 8 and is trained with tp = 8, one group a rank. With
# more ranks than groups, several ranks need the same keys. Copies of a weight would need a process
# group of their own for their gradients. So the rows stay sharded, and the result is gathered: with
# G = 2, D = 4 and tp = 4, each rank computes 4 of the 16 columns.
#
#     rank            0          1          2          3
#     its columns     k of 0     v of 0     k of 1     v of 1
#     its heads       group 0    group 0    group 1    group 1      of the gathered 16 columns
#
# Each rank uses another part of what was gathered, so in backward gradients are summed over ranks
# before each takes its columns. Chapter 2's `gather_from_tp` takes them without a sum: it is for
# results that every rank uses in the same way, and here it would lose the gradients of all heads
# but this rank's. At tp ≤ G nothing is gathered: a rank has the keys of complete groups.


def _sum_and_take(x: Tensor, group: Group) -> Tensor:
    # A reduce-scatter along the last dimension; the collective works along the first.
    return _take_shard(_sum(x, group), group)


class ParallelBlock(Block):
    """`Block` on this rank's heads, groups and features; x_BSH is replicated, kv as in `Block`.

    Source: Megatron-LM (Shoeybi et al., 2019), section 3; its grouped-query attention.
    """

    def __init__(self, config: GPTConfig, group: Group = None):
        super().__init__(config)
        self.group = group

    def enter(self, x_BSH: Tensor) -> Tensor:
        return copy_to_tp(x_BSH, self.group)

    def leave(self, partial_y_BSH: Tensor) -> Tensor:
        return reduce_from_tp(partial_y_BSH, self.group)

    def own_groups(self, kv: Tensor) -> Tensor:
        tp = group_size(self.group)
        G = self.config.num_query_groups
        if tp <= G:
            return kv  # complete groups, and no others
        kv = _Conjugate.apply(kv, self.group, _all_gather, _sum_and_take)
        return kv.chunk(G, dim=-1)[group_rank(self.group) * G // tp]


class ParallelGPT(GPT):
    """`GPT` sharded over `group`: tokens_BS, replicated, to logits_BSv.

    Its weights are those of GPT(config), for every tp; it holds one full tensor at a time.
    Raises: ValueError where sizes do not divide over the ranks, or a token id is out of range.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3; Nemotron-4 15B, section 2.
    """

    def __init__(self, config: GPTConfig, group: Group = None):
        tp = group_size(group)
        check_tp(config, tp)
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(config, partial(ParallelBlock, group=group))
        self.group = group
        for name, full in initial_weights(config):
            shard = shard_tensor(name, full, config, group_rank(group), tp)
            module, _, kind = name.rpartition(".")
            setattr(self.get_submodule(module), kind, nn.Parameter(shard))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        weight_vH = self.embedding.weight
        row_BS, is_local_BS = _local_rows(tokens_BS, len(weight_vH), self.group)
        partial_x_BSH = torch.where(is_local_BS[..., None], F.embedding(row_BS, weight_vH), 0)
        x_BSH = reduce_from_tp(partial_x_BSH, self.group)
        is_id_BS = _is_id(tokens_BS, self.config.vocab_size)
        return torch.where(is_id_BS[..., None], x_BSH, torch.nan)

    def forward(self, tokens_BS: Tensor, *sequences: Tensor) -> Tensor:
        x_BSH = self.hidden(tokens_BS, *sequences)
        return self.output(copy_to_tp(x_BSH, self.group))

    def log_probs(self, batch: Sequences) -> Tensor:
        logits_BSv = self(batch.tokens_BS, batch.sequence_BS, batch.position_BS)
        V = self.config.vocab_size
        return vocab_parallel_log_probs(logits_BSv, batch.targets_BS, self.group, V)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# Weights keep their names and full shapes from pretraining to the last round, so each stage loads
# what the one before it has saved.
#
# One table says along which dimension each parameter is sharded. LayerNorm is not in it: its
# weights are replicated. A checkpoint has full tensors: the next stage may have other ranks.

SHARD_DIM = {
    "embedding.weight": 0,  # by vocabulary entries
    "output.weight": 0,
    "q.weight": 0,  # by heads: the outputs of a column-parallel matrix
    "kv.weight": 0,  # by groups; with more ranks than groups, by parts of them
    "out.weight": 1,  # by heads: the inputs of a row-parallel matrix
    "up.weight": 0,  # by features
    "down.weight": 1,
}
VOCABULARY = ("embedding.weight", "output.weight")  # padded where V does not divide over the ranks


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is sharded, or None."""
    module_and_kind = name.split(".")[-2:]  # of "layers.0.q.weight" the last two
    return SHARD_DIM.get(".".join(module_and_kind))


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of a parallel model of which this rank holds a shard; all others are replicated."""
    return [p for name, p in model.named_parameters() if shard_dim(name) is not None]


def check_tp(config: GPTConfig, tp: int) -> None:
    """Raises ValueError where heads, groups or features do not divide over `tp` ranks."""
    G = config.num_query_groups
    sizes = (config.num_heads, config.ffn_hidden_size, 2 * G * config.head_size)
    groups_fit = G % tp == 0 or tp % G == 0
    if not groups_fit or any(size % tp for size in sizes):
        rule = "it must divide heads, features and keys, and divide the groups or be their multiple"
        raise ValueError(f"tp={tp}: {rule}, but this is {config}")


def shard_tensor(name: str, full: Tensor, config: GPTConfig, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of `full`, the plain model's parameter `name` (...); a copy."""
    dim = shard_dim(name)
    if dim is None:
        return full.clone()
    if name.endswith(VOCABULARY):
        rows = padded_vocab_size(config.vocab_size, tp, config.vocab_multiple)
        full = F.pad(full, (0, 0, 0, rows - config.vocab_size))
    return full.chunk(tp, dim)[rank].clone(memory_format=torch.contiguous_format)


def shard_state_dict(full: StateDict, config: GPTConfig, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of tensor-parallel rank `rank`; copies.

    Raises: ValueError where sizes do not divide over the ranks.
    """
    check_tp(config, tp)
    return {name: shard_tensor(name, x, config, rank, tp) for name, x in full.items()}


def merge_state_dicts(shards: list[StateDict], config: GPTConfig) -> StateDict:
    """All ranks' state dicts, in order of rank, to the plain model's: undoes `shard_state_dict`.

    Args: gradients by name work as well.
    Raises: ValueError where replicated tensors differ between ranks.
    """
    full = {}
    for name, first in shards[0].items():
        tensors = [shard[name] for shard in shards]
        dim = shard_dim(name)
        full[name] = first.clone() if dim is None else torch.cat(tensors, dim)
        for rank, x in enumerate(tensors):
            if dim is None and not torch.allclose(x, first, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"{name} should be replicated, but rank {rank} differs from rank 0"
                )
        if name.endswith(VOCABULARY):
            full[name] = full[name][: config.vocab_size].clone()
    return full


def gather_state_dict(tensors: StateDict, config: GPTConfig, group: Group = None) -> StateDict:
    """Every rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    mine = {name: x.cpu() for name, x in tensors.items()}
    shards = [mine] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, mine, group)
    return merge_state_dicts(shards, config)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────


# region shared: replicas
@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups."""

    tp: int = 1  # ranks that share one copy of the model
    dp: int = 1  # copies of the model
    dp_rank: int = 0
    tp_group: Group = None
    dp_group: Group = None


def make_mesh(tp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, tp), with neighbours in a tp group. Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where tp does not divide the ranks.
    """
    world = group_size()
    if tp < 1 or world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    ranks = torch.arange(world).view(-1, tp)  # a row is a replica
    groups = [make_group(lists.tolist(), device, timeout) for lists in (ranks, ranks.T)]
    return Mesh(tp, world // tp, group_rank() // tp, *groups)


# endregion
# ── 4.1 Sums first, one division ────────────────────────────────────────────────────────────────
#
# Micro-batches and replicas have unequally many tokens, labels and pairs. A mean of means weighs
# them wrongly: losses 1, 1, 1 in one micro-batch and 5 in another are 2 on average, and not 3. So
# an objective returns a sum and a count. Backward runs on sums, gradients add up over micro-batches
# and replicas, and everything is divided once, by the global count, which travels in the same
# buffer as the gradients. The result does not depend on how pairs were packed or distributed.
#
# With pairs 3 and 1 on two replicas, whose losses sum to 3.0 and 2.0, the mean is 5/4 = 1.25, and a
# mean of means would be (1.0 + 2.0)/2 = 1.5: the single pair would weigh as much as three.
#
# SFT counts tokens, the reward model counts labels, DPO and RPO count pairs.


def sft_objective(model: nn.Module, batch: Sequences) -> tuple[Tensor, Tensor]:
    """−log π of all response tokens, summed, and how many they are: two scalars."""
    return -model.log_probs(batch).sum(), (batch.targets_BS != IGNORED).sum()


class Pairs(NamedTuple):
    """P pairs of responses, with what does not change while the policy learns from them."""

    sequences: Sequences  # R = 2·P: first the chosen responses, then the rejected ones
    reference_R: Tensor  # log-probabilities under the reference
    reward_gap_P: Tensor  # r(chosen) − r(rejected)


@dataclass(frozen=True)
class PreferenceObjective:
    """DPO or RPO, and `sft_weight` times the chosen responses' −log π: (policy, pairs) to the sum
    over pairs, and their count, scalars. Raises ValueError for another method, and for an odd R."""

    method: str = "dpo"  # or "rpo"
    beta: float = 0.1
    eta: float = 1.0
    sft_weight: float = 0.0
    distance: str = "backward_kl"  # of RPO

    def __post_init__(self):
        if self.method not in ("dpo", "rpo"):
            raise ValueError(f"method={self.method!r}: dpo or rpo")

    def __call__(self, policy: GPT, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if len(pairs.reference_R) % 2:
            raise ValueError(f"{len(pairs.reference_R)} responses are no pairs")
        policy_R = sequence_log_probs(policy, pairs.sequences)
        moved_chosen_P, moved_rejected_P = (policy_R - pairs.reference_R).chunk(2)
        delta_P = moved_chosen_P - moved_rejected_P
        if self.method == "dpo":
            loss_P = dpo_loss(delta_P, self.beta)
        else:
            gap_P = pairs.reward_gap_P
            loss_P = rpo_loss(delta_P, gap_P, self.beta, self.eta, self.distance)
        chosen_P, _ = policy_R.chunk(2)
        loss_P = loss_P - self.sft_weight * chosen_P
        return loss_P.sum(), torch.ones_like(loss_P).sum()


# Each replica has pairs of its own, and not equally many: where all responses to a prompt are
# equally good, there is no pair. A replica without any pair has no micro-batch: it adds zeros to
# sums and counts, and takes part in each collective.


# region shared: sums and counts
def make_optimizer(model: nn.Module, lr: float) -> AdamW:
    """AdamW without weight decay: alignment takes few steps, from weights that are good already."""
    return AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)


@torch.no_grad()
def average_gradients(
    parameters: Parameters, loss: Tensor, count: Tensor, group: Group = None
) -> Tensor:
    """Sums gradients, loss and count over `group`, and divides by the sum of counts.

    One all-reduce. A missing gradient counts as zero: a replica without pairs takes part, too.
    Returns: the mean loss, a scalar. Source: ours; NeMo-RL divides by global counts, too.
    """
    parameters = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    scalars = at_least_fp32(torch.stack([loss, count]))
    flat = torch.cat([*(grad.flatten() for grad in grads), scalars])
    _all_reduce(flat, group)
    count = flat[-1].clamp(min=1)
    flat = flat / count
    sizes = [p.numel() for p in parameters]
    for p, mean in zip(parameters, flat.split([*sizes, 2])):
        p.grad = mean.view_as(p).to(p.dtype)
    return flat[-2]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[list],
    objective: Callable,
    mesh: Mesh = Mesh(),
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains on a mesh; yields two scalars, the mean loss and the norm before clipping.

    Args: batches: for each step this replica's micro-batches, equal on its tp ranks; the list may
        be empty on some replicas. objective: (model, micro-batch) to a sum and a count.
    Every rank must iterate it, equally often.
    """
    device = next(model.parameters()).device
    for micro_batches in batches:
        optimizer.zero_grad()
        totals_2 = at_least_fp32(next(model.parameters()).new_zeros(2))
        for batch in micro_batches:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss, count = objective(model, batch)
            loss.backward()
            totals_2 += torch.stack([loss.detach(), count])
        loss = average_gradients(model.parameters(), *totals_2, mesh.dp_group)
        sharded = sharded_parameters(model)
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=mesh.tp_group)
        optimizer.step()
        yield loss, norm


# endregion
# ── 4.2 The reference ───────────────────────────────────────────────────────────────────────────
#
# Two models are in memory. The reference's log-probabilities do not change while the policy learns,
# so they are computed once per pair, without gradient, and kept. The reference runs the same
# function on the same batches as the policy. Computed in other micro-batches, with another tp, or
# without the policy's autocast, its sums would be rounded differently, and the first Δ would be
# noise. (NeMo-Aligner's repair of such a difference raised MT-Bench from 7.12 to 7.23.)
#
# Where do pairs come from? From the policy itself: `rounds.py` samples several responses to a
# prompt, scores them with a verifier or with a reward model, and pairs the best with the worst.
Judged = tuple[Example, Example, float]  # the chosen one, the rejected one, difference of rewards


@torch.no_grad()
def pair_batch(
    judged: list[Judged],
    reference: GPT,
    device: torch.device,
    autocast: Autocast = None,
    row_length: int | None = None,
) -> Pairs:
    """One pair or more as tensors, with the reference's log-probs. Args: row_length: `collate`'s.

    Source: Nemotron-4 340B, section 3.3.
    """
    chosen, rejected, gaps = zip(*judged)
    sequences = collate([*chosen, *rejected], row_length).to(device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        reference_R = sequence_log_probs(reference, sequences)
    gap_P = torch.tensor(gaps, dtype=reference_R.dtype, device=device)
    return Pairs(sequences, reference_R, gap_P)


# ── What remains ──────────────────────────────────────────────────────────────────────────────────
#
# Pairs are made before training: after a few steps the policy no longer writes what it learns from.
# The next step is to sample in every step, and to reinforce all of several answers by how much
# better than their mean they are: GRPO, chapter 12.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────
#
# A model of 100,000 parameters learns to sort five digits, and then prefers right answers.
#
#     prompt  7 3 5 1 2 =      chosen  1 2 3 5 7 end      rejected  1 2 3 7 end      Δr = 0.4
#
# SFT on right responses makes the reference. A rejected response lacks one digit, and its reward is
# the share of digits before it: here 3 of 5. Most tokens are common to both, and the responses have
# unequal lengths.
#
# Generated pairs make the methods comparable: each learns from the same pairs, and each reward is
# exact. The policy's own responses depend on what it has learned so far, so two methods would see
# different pairs after one step. `rounds.py` has the loop with own responses, by RPO.

STEPS = 200  # of SFT
DIGITS = 5  # of a problem
EQUALS = 10
END = 11
PAD = 12
# fp64 is the proof. fp32 and bf16 show how rounding affects correct code.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 3e-1}
FIRST = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 1e-2}  # of DPO's first loss


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of RPO on this mesh, padded and in unequal micro-batches, and on a single
    device, packed in one batch: name to error."""
    tp = mesh.tp
    groups = 2 if tp % 2 == 0 else tp  # from tp = 4 on there are more ranks than groups
    config = GPTConfig(num_heads=2 * tp, num_query_groups=groups, hidden_size=16 * tp)
    judged = problems(2 * mesh.dp + 1, "equivalence")
    mine = judged[mesh.dp_rank :: mesh.dp]
    plain = GPT(config).to(device, dtype)
    parallel = ParallelGPT(config, mesh.tp_group).to(device, dtype)
    config = replace(config, seed=1)  # another model is the reference
    reference = GPT(config).to(device, dtype)
    pairs = pair_batch(judged, reference, device, autocast, row_length=30)
    reference = ParallelGPT(config, mesh.tp_group).to(device, dtype)
    parts = [pair_batch(part, reference, device, autocast) for part in (mine[:1], mine[1:])]
    objective = PreferenceObjective("rpo", beta=0.3, sft_weight=0.1)
    optimizer = make_optimizer(plain, 1e-3)
    own_optimizer = make_optimizer(parallel, 1e-3)
    steps = train(parallel, own_optimizer, [parts] * 5, objective, mesh, 0.1, autocast)
    errors = {}
    for step, (loss, norm) in enumerate(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            total, count = objective(plain, pairs)
        loss_alone = total / count
        loss_alone.backward()
        norm_alone = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        errors[f"loss {step}"] = abs(loss / loss_alone - 1).item()
        errors[f"norm before clipping {step}"] = abs(norm / norm_alone - 1).item()
        if step == 0:
            shards = {name: p.grad for name, p in parallel.named_parameters()}
            full = gather_state_dict(shards, config, mesh.tp_group)
            right = {name: p.grad for name, p in plain.named_parameters()}
            errors |= relative_errors("gradient", full, right)
    if dtype == torch.float64:
        full = gather_state_dict(parallel.state_dict(), config, mesh.tp_group)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), 5e-3)
    return over_all_ranks({f"{name}, tp {tp}": error for name, error in errors.items()})


def problems(count: int, *place: Any) -> list[Judged]:
    """Pairs, a function of `place`: seed, replica, what they are for."""
    rng = random.Random(repr(place))
    judged = []
    for _ in range(count):
        digits = rng.choices(range(10), k=DIGITS)
        prompt = [*digits, EQUALS]
        right = [*sorted(digits), END]
        missing = rng.randrange(DIGITS)
        wrong = right[:missing] + right[missing + 1 :]
        judged.append(((prompt, right), (prompt, wrong), 1 - missing / DIGITS))
    return judged


@dataclass
class Learned:
    """What an objective has made of pairs; means over those of all replicas."""

    first_loss: float
    chosen: float  # how far log π has moved from the reference's
    rejected: float
    gap: float  # difference of rewards
    h: float  # β Δ

    @property
    def moved(self) -> str:
        return f"{self.chosen:+.2f}, {self.rejected:+.2f}"


def learn(
    policy: ParallelGPT,
    pairs: Pairs | None,
    objective: PreferenceObjective,
    args: argparse.Namespace,
    mesh: Mesh,
) -> Learned:
    """Trains on all pairs in each step. Args: pairs: this replica's; None: it has none."""
    optimizer = make_optimizer(policy, args.pair_lr)
    batches = [[pairs] if pairs else []] * args.pair_steps
    steps = train(policy, optimizer, batches, objective, mesh, autocast=dtypes(args)[1])
    losses = [read_step(step, loss, norm)[0] for step, (loss, norm) in enumerate(steps)]
    totals_4 = at_least_fp32(policy.final_norm.weight.new_zeros(4))
    if pairs:
        with torch.no_grad():
            moved_R = sequence_log_probs(policy, pairs.sequences) - pairs.reference_R
        gap_P = pairs.reward_gap_P
        values_4P = torch.stack([*moved_R.chunk(2), gap_P, torch.ones_like(gap_P)])
        totals_4 += values_4P.sum(dim=1)
    *totals, count = _all_reduce(totals_4, mesh.dp_group).tolist()
    chosen, rejected, gap = (total / count for total in totals)
    h = objective.beta * (chosen - rejected)
    return Learned(losses[0], chosen, rejected, gap, h)


def sft(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> ParallelGPT:
    """A model that has learned from solved problems."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    model = ParallelGPT(config, mesh.tp_group).to(device, dtype)

    def batches():
        for step in range(args.steps):
            judged = problems(args.batch, args.seed, mesh.dp_rank, step)
            yield [collate([right for right, _, _ in judged], pad=PAD).to(device)]

    optimizer = make_optimizer(model, args.lr)
    steps = train(model, optimizer, batches(), sft_objective, mesh, autocast=autocast)
    say("step  SFT loss    norm")
    for step, (loss, norm) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        if step < 5 or step % 20 == 19:
            say(f"{step:4}  {loss:8.4f}  {norm:6.3f}")
    return model


def demonstrate(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[Learned]:
    """SFT, then three objectives that learn from the same pairs, from the same reference."""
    reference = sft(args, mesh, device)
    judged = problems(args.pairs, args.seed, mesh.dp_rank, "pairs")
    pairs = pair_batch(judged, reference, device, dtypes(args)[1])
    dpo = PreferenceObjective("dpo", args.beta)
    with_sft = replace(dpo, sft_weight=args.sft_weight)
    rpo = PreferenceObjective("rpo", args.beta, args.eta)
    say("\nlearned by       first loss  log π, chosen, rejected   h = β Δ        Δr")
    results = []
    for name, objective in {"DPO": dpo, "DPO + SFT term": with_sft, "RPO": rpo}.items():
        policy = ParallelGPT(reference.config, mesh.tp_group).to(device, dtypes(args)[0])
        policy.load_state_dict(reference.state_dict())
        x = learn(policy, pairs, objective, args, mesh)
        say(f"{name:16}{x.first_loss:11.4f}{x.moved:>26}{x.h:11.2f}{x.gap:10.2f}")
        results.append(x)
    say()
    return results


def claims(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """What the demonstration has measured: (claim, paper, here, verdict)."""
    dpo, both, rpo = demonstrate(args, mesh, device)
    off = abs(dpo.first_loss - math.log(2))
    target = args.eta * rpo.gap
    margin = f"{rpo.h:.2f} for {target:.2f}"
    near = abs(rpo.h - target) < min(0.3 * target, abs(dpo.h - target))
    lower = 0 > dpo.chosen > dpo.rejected
    higher = both.chosen > dpo.chosen
    short = None if args.steps >= STEPS else "a short run"
    return [
        ("DPO's first loss is log 2", "exact", f"within {off:.0e}", off <= FIRST[args.dtype]),
        ("log π of chosen and rejected, DPO", "both fall", dpo.moved, short or lower),
        ("the same with the SFT term", "chosen falls less", both.moved, short or higher),
        ("margin h, RPO, for a target g = η Δr", "h = g", margin, short or near),
    ]


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f", tp {args.tp}")
    precision = dtypes(args) if args.check else [torch.float64]
    errors = {}
    for tp in range(1, args.world_size + 1):
        if args.world_size % tp == 0:
            errors |= equivalence(make_mesh(tp, device, args.timeout), device, *precision)
    if args.check:
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        error = worst(errors)
        claim = "gradients, norms, weights equal the single device's, float64"
        proof = (claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"])
        mesh = make_mesh(args.tp, device, args.timeout)
        good = print_claims([proof, *claims(args, mesh, device)])
    if not good:
        sys.exit(1)


@dataclass
class Options(GPTConfig):  # the chapter's own flags
    tp: int = flag(1, "ranks that share one copy of the model", least=1)
    batch: int = flag(32, "problems of an SFT step, per replica", least=1)
    pairs: int = flag(64, "problems that pairs are made of, per replica", least=1)
    pair_steps: int = flag(40, "steps of DPO and RPO, each over all pairs", least=1)
    lr: float = flag(3e-3, "learning rate of SFT", least=1e-9)
    pair_lr: float = flag(3e-4, "learning rate of DPO and RPO", least=1e-9)
    beta: float = flag(0.1, "β of DPO and RPO", least=1e-9)
    eta: float = flag(1.0, "η of RPO")
    sft_weight: float = flag(0.05, "weight of the SFT term")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where flags and ranks do not fit."""
    if args.world_size % args.tp:
        raise ValueError(f"--tp {args.tp} does not divide the {args.world_size} ranks")
    check_tp(config_from(args, GPTConfig), args.tp)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=2, steps=STEPS)


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
