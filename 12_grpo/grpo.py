# SPDX-License-Identifier: MIT-0
"""Chapter 12. Reinforcement learning with verifiers: GRPO, and a thinking budget.

Papers: DeepSeekMath (GRPO), Shao et al., 2024, arXiv 2402.03300;
        DAPO, Yu et al., 2025, arXiv 2503.14476;
        Nemotron 3 Nano, NVIDIA, 2025, arXiv 2512.20848, and its white paper, 2512.20856;
        Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444

The problem. For mathematics, code and tools a program can check an answer, but no corpus has the
reasoning that leads to it. The model has to find it by trying.

The idea. Sample a group of answers to each prompt, score them exactly, and make each more likely by
how much better it is than the others of its group. No second model estimates what is good.

      prompt ──► G responses ──► verifier ──► rewards r ──► A = (r − mean of others) / their std
        ▲        of the policy                                       │
        │                                                            ▼
      next step ◄──── one update ◄──── Σ over tokens of  −A · π(token) / π_old(token), clipped
                                       divided once, by the tokens of all ranks

Thinking is limited by a counter: at the budget it forces the end tag, and the answer follows.

Run it (no flag is needed; --help lists them):

    python 12_grpo/grpo.py                  2 local ranks, two replicas: it learns to sort
    python 12_grpo/grpo.py --tp 2           one policy on both
    python 12_grpo/grpo.py --age 1          each update from rollouts of the policy before it
    python 12_grpo/grpo.py --check          equivalence alone, the error of each tensor
    python 12_grpo/thinking.py              budgets, and what truncated traces teach
    torchrun --nproc-per-node=8 12_grpo/grpo.py --tp 4

Left out: an inference engine with a key-value cache; judging by another language model; ranks that
only sample; the papers' tables and the enumerated gradients (grpo_tables.py).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension,
# replicated on the ranks of the group; a small letter is this rank's shard of it. partial_ marks a
# partial sum.
#
#     B  rows of a batch              H  hidden size                      N  heads, n = N / tp
#     S  tokens of a row              F  feed-forward size, f = F / tp    D  size of a head
#     R  responses, R = P · G         V  vocabulary entries               v = V, padded, / tp
#     P  prompts                      O  responses that one is compared with
#     G  responses of a group         K  recent tokens                    Q  tokens of a prompt
#
# π is the policy that learns. Three policies have probabilities of one token: π, the trainer's π at
# the start of the step (old), and the sampler, which may compute in another precision or have older
# weights. tp is the number of ranks that share one copy of the policy; dp is the number of copies.
# "region carried" marks code that is copied from its home chapter. Editors fold it.

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
import zlib
from collections import deque
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
    """Sizes of the policy. Raises ValueError for impossible sizes."""

    vocab_size: int = 16
    max_length: int = 64  # positions
    num_layers: int = flag(2, "layers", least=1)
    hidden_size: int = flag(64, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    init_std: float = 0.05
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, but this is {self}")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 The policy gradient, and what a group is for ────────────────────────────────────────────
#
# The aim is the expected reward, a sum over all responses y of π(y) r(y). Its gradient is again an
# expectation, so it can be sampled:
#
#     ∇E[r] = Σ_y ∇π(y) r(y) = E[ r ∇log π(y) ]             REINFORCE
#
# Any b that does not depend on y itself may be subtracted from r, since E[∇log π] = ∇Σ π = ∇1 = 0.
# A good b changes nothing but the noise. PPO learns b with a second model as large as the policy.
# GRPO samples G responses to each prompt and takes the mean reward of the group. Of G = 16 with one
# success that response gets more likely and fifteen get less likely, a little each.
#
# ── 1.2 Advantages, and five conventions for them ───────────────────────────────────────────────
#
# The mean of the group contains r itself, so it does depend on y: it shrinks every gradient by
# (G − 1)/G. The mean of the *others* does not. That is the leave-one-out baseline,
#
#     r − mean of the others = G/(G − 1) · (r − mean of all)
#
# a constant factor, and no more. The deviation that r − b is divided by is another matter. That of
# the others does not depend on y, so each prompt's expected gradient is c · ∇E[r] with
# c = E[1/std]. With G = 16 and rewards 0 and 1, c is 2.0 for a pass rate of 1/2, 2.5 for 1/16 or
# 15/16, and 1.4 for 1/100 or 99/100: no prompt counts for much more than another. The deviation of
# the group depends on y, and the expected gradient has another direction. grpo_tables.py enumerates
# both. One success of 16, by convention:
#
#     baseline       divided by                     the success    each failure
#     group          nothing                         0.9375        -0.0625
#     leave-one-out  nothing                         1.0           -0.0667
#     group          population std (GRPO)           3.873         -0.258
#     group          sample std (trl)                3.75          -0.25
#     leave-one-out  std of the others (NeMo-RL)     1.0           -0.258       the sum is not 0
#
# In the last line all others of the success are equal: their std is 0, and then r − b is divided by
# nothing. Which line a paper means is seldom said, and a factor of four is not small.
#
# Groups without variance teach nothing, and must give exactly 0. Sixteen times 0.1, added up and
# divided by 16, need not be 0.1. A remainder divided by a std of remainders is an advantage of 1,
# and eps hides that of small rewards only. So the code branches on max = min.

DEVIATIONS = ("none", "leave_one_out", "sample", "population")


def grpo_advantages(
    rewards_R: Tensor,
    group_size: int,
    leave_one_out: bool = True,
    deviation: str = "leave_one_out",
    eps: float = 1e-6,
    clip: float = math.inf,
) -> Tensor:
    """How much better each response is than its group, advantage_R.

    Args:
        rewards_R: of complete groups, group_size neighbours each; one number a response.
        leave_one_out: the baseline is the mean of the others; False: of the group.
        deviation: what r − b is divided by, one of DEVIATIONS. A std of 0 divides nothing.
        eps: is added to the std. clip: advantages stay in ± clip.
    Raises: ValueError for a torn group, a group of one, or another deviation.
    Source: GRPO (Shao et al., 2024), section 4.1; leave-one-out as NeMo-RL releases it.
    """
    G = group_size
    if G < 2 or len(rewards_R) % G or deviation not in DEVIATIONS:
        found = f"{len(rewards_R)} rewards, group_size={G}, deviation={deviation!r}"
        raise ValueError(f"{found}: complete groups of 2 or more, and one of {DEVIATIONS}")
    rewards_PG = rearrange(at_least_fp32(rewards_R), "(P G) -> P G", G=G)  # P may be 0
    place = torch.arange(G, device=rewards_R.device)
    other_GO = (place[:, None] + place[1:]) % G  # of response i: i + 1, i + 2, ... in a circle
    others_PGO = rewards_PG[:, other_GO]
    group_PGO = rewards_PG[:, None].expand(-1, G, -1)
    baseline_PG = (others_PGO if leave_one_out else group_PGO).mean(dim=-1)
    advantage_PG = rewards_PG - baseline_PG
    if deviation != "none":
        compared_PGO = others_PGO if deviation == "leave_one_out" else group_PGO
        std_PG = _deviation(compared_PGO, correction=int(deviation != "population"))
        scaled_PG = advantage_PG / (std_PG + eps)
        advantage_PG = torch.where(_is_flat(compared_PGO), advantage_PG, scaled_PG)
    advantage_PG = torch.where(_is_flat(group_PGO), 0, advantage_PG)
    return advantage_PG.clamp(-clip, clip).flatten()


def _deviation(x_PGO: Tensor, correction: int) -> Tensor:
    """Standard deviation of the last dimension. (torch's own is NaN for a single value.)"""
    gap_PGO = x_PGO - x_PGO.mean(dim=-1, keepdim=True)
    count = max(1, x_PGO.shape[-1] - correction)
    return (gap_PGO.square().sum(dim=-1) / count).sqrt()


def _is_flat(x_PGO: Tensor) -> Tensor:
    """Whether all values of the last dimension are equal."""
    return x_PGO.amax(dim=-1) == x_PGO.amin(dim=-1)


# ── 1.3 The ratio, and two clips ────────────────────────────────────────────────────────────────
#
# All tokens of a response have its advantage. The loss of a token has the ratio of the new policy
# to the old one, not log π:
#
#     ratio = π / π_old          loss = −min( ratio · A, clamp(ratio, 1 − 0.2, 1 + 0.28) · A )
#
# At the first update π is π_old: the ratio is 1, and its gradient is ∇log π. So the loss is −A for
# every token, its sum says nothing, and its gradient is that of REINFORCE: the test of everything
# here. (The ratio has the value 1, but it is no constant: detached, nothing learns.)
#
# More updates on the same responses move the ratio. The clip stops a token that has moved far
# enough in the direction of its advantage: for A > 0 no gradient above 1.28, for A < 0 none below
# 0.8. A token that moved the wrong way is never clipped. DAPO's upper clip is the larger one: 0.2
# stops a token of probability 0.01 at 0.012, and one of 0.9 never. Exploration needs the rare ones.
#
# One update per batch needs no clip. Nemotron 3's two recipes have 0.2 and 0.28 in their files, and
# neither uses them: Nano takes 2,048 responses for one update, and Super sets
# force_on_policy_ratio, which puts π itself in the place of π_old.


def grpo_loss(
    log_prob_BS: Tensor,
    old_log_prob_BS: Tensor,
    advantage_BS: Tensor,
    mask_BS: Tensor,
    weight_BS: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """The clipped loss, summed over the tokens of mask_BS, a scalar.

    Divide it by the count of tokens of all micro-batches and ranks.
    Args:
        old_log_prob_BS: without gradient; log_prob_BS.detach() for a ratio of 1.
        advantage_BS: one value per response, at each of its tokens.
        weight_BS: `importance_weights`; None: 1.
        clip_low, clip_high: the ratio counts in [1 − clip_low, 1 + clip_high]; infinite: no clip.
    Source: GRPO (Shao et al., 2024), equation 3; the two clips are DAPO's (2025), equation 10.
    """
    # Masked before exp and after the products: 0 · inf and 0 · NaN are NaN, in gradients as well.
    ratio_BS = torch.where(mask_BS, log_prob_BS - old_log_prob_BS, 0).exp()
    clipped_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high)
    gain_BS = torch.minimum(ratio_BS * advantage_BS, clipped_BS * advantage_BS)
    weight_BS = 1 if weight_BS is None else weight_BS
    return -torch.where(mask_BS, gain_BS * weight_BS, 0).sum()


# ── 1.4 The sampler is another policy ───────────────────────────────────────────────────────────
#
# Responses come from an inference engine with other kernels, in lower precision, or with weights of
# the step before. Then a token was drawn from μ and not from π_old, and the expectation is wrong by
# the factor π_old / μ. The sampler's log-probabilities are kept with the tokens, and never computed
# again, since no policy in memory has them any more:
#
#     weight = π_old(token) / μ(token)          a constant: no gradient flows through it
#
# Exact is the product of these weights over all tokens of a response. For thousands of tokens its
# variance is hopeless. All recipes weigh single tokens: a token is corrected, and that its prefix
# was drawn by μ is not. For answers of two tokens, enumerated, the expected gradient is then 1.2 %
# off where the policies' log-probabilities differ by 0.05, and 8 % where they differ by 0.5.
#
# Two guards. The weight is capped (Super: 5). And a response whose tokens differ by too much on
# average, mean exp|log π_old − log μ| > 2, is dropped with all its tokens: there something is
# broken, in an MoE mostly the routing. It leaves the count as well: sum and count have one mask.


def importance_weights(
    log_prob_BS: Tensor,
    sampler_log_prob_BS: Tensor,
    sequences: Sequences,
    level: str = "token",
    cap: float = math.inf,
) -> Tensor:
    """π / μ of each token ("token"), or the product over its response ("sequence"), weight_BS.

    Args: log_prob_BS: the trainer's; both are 0 where no token counts. cap: a larger weight becomes
        this.
    Raises: ValueError for another level. Source: NeMo-RL's loss; truncated as in Super.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level={level!r}: token or sequence")
    log_weight_BS = (log_prob_BS - sampler_log_prob_BS).detach()
    if level == "sequence":
        log_weight_BS = _response_sums(log_weight_BS, sequences)
    return log_weight_BS.exp().clamp(max=cap)


def trusted_responses(
    log_prob_BS: Tensor, sampler_log_prob_BS: Tensor, sequences: Sequences, limit: float = 2.0
) -> Tensor:
    """Whether a token's response has a mean exp|log π − log μ| of at most `limit`, bool (B, S).

    Args: as of `importance_weights`; the mean is over the tokens that have a target. limit: with
        inf every response is trusted, so that a NaN of the sampler reaches the loss.
    Source: NeMo-RL's seq_logprob_error_threshold; the limit of Nemotron 3 Nano and Super.
    """
    mask_BS = sequences.targets_BS != IGNORED
    error_BS = (log_prob_BS - sampler_log_prob_BS).detach().abs().exp()
    excess_BS = torch.where(mask_BS, error_BS - limit, 0)
    no_limit = limit == math.inf
    return (_response_sums(excess_BS, sequences) <= 0) | no_limit


def _response_sums(x_BS: Tensor, sequences: Sequences) -> Tensor:
    """At each token the sum over all tokens of its response."""
    sums = x_BS.new_zeros(len(sequences.end_R) + 1)  # the last one is of padding
    sums = sums.index_add(0, sequences.sequence_BS.flatten(), x_BS.flatten())
    return sums[sequences.sequence_BS]


# ── 1.5 The distance from a reference ───────────────────────────────────────────────────────────
#
# KL(π ‖ ref) = E[log π − log ref] keeps the policy near its start, and needs one sample per token.
# With d = log ref − log π, GRPO takes
#
#     k3 = exp(d) − d − 1 ≥ 0                    E[k3] = KL(π ‖ ref), with less noise than −d
#
# The value is right and the gradient is not. The expectation is over tokens of π, which changes,
# too, and a loss that averages k3 over given tokens does not see that. E[∇k3] is the gradient of
# the *other* divergence, KL(ref ‖ π). (For −d alone it is 0: such a penalty does nothing.) What is
# missing is the score term, k3 · ∇log π. It comes with a factor that has the value 1:
#
#     exp(log π − log π, detached) · k3          E[∇(...)] = ∇KL(π ‖ ref)
#
# For tokens of a sampler μ the factor is π / μ. All this is for single tokens: in a response, a
# token also changes what follows it, which no recipe counts.


def kl_penalty(
    log_prob_BS: Tensor,
    reference_log_prob_BS: Tensor,
    sampler_log_prob_BS: Tensor | None = None,
    score_term: bool = True,
) -> Tensor:
    """k3, an estimate of KL(π ‖ ref) at each token, kl_BS.

    Args: reference_log_prob_BS: without gradient. sampler_log_prob_BS: of the policy that drew the
        tokens; None: π itself. score_term: False leaves the factor without gradient, as GRPO did.
    Source: Approximating KL Divergence (Schulman, 2020); NeMo-RL's loss, for the factor.
    """
    if sampler_log_prob_BS is None:
        sampler_log_prob_BS = log_prob_BS.detach()
    gap_BS = reference_log_prob_BS - log_prob_BS
    k3_BS = gap_BS.exp() - gap_BS - 1
    weight_BS = (log_prob_BS - sampler_log_prob_BS).exp()
    return k3_BS * (weight_BS if score_term else weight_BS.detach())


# ── 1.6 What the sum is divided by ──────────────────────────────────────────────────────────────
#
# The sum over tokens is divided once, by the count of all tokens that have a loss: of all
# responses, micro-batches and ranks. Then each token has one weight. GRPO's first form divides by
# the length of each response, so that a wrong answer costs less per token the longer it is:
#
#     two responses, lengths 10 and 1,000      a token of the short one      of the long one
#     mean over tokens                         1 / 1010                      1 / 1010
#     mean of the responses' means             1 / 20                        1 / 2000
#
# Means per micro-batch or per rank, averaged again, are such weights by accident: they depend on
# how responses were packed. So the objective below returns a sum and a count, as in chapter 11.
#
# A count of tokens is random, too: it is large where long answers were drawn. Enumerated, with
# lengths 1 and 2, the expected gradient of a single group is 2 % off with G = 3, and less with each
# further response. A constant in its place would be exact.
#
# Which tokens count? Those that the policy sampled. Not the prompt, not what a controller forced,
# not a response that was dropped. Overlong responses are those that reached the longest length
# without an end token. Their reward (mostly 0) says little of their tokens, so Nano filters them:
# no loss, but their reward stays in the group's baseline. The end token counts. A mask of the kind
# "token ≠ pad", with the end token as padding, takes it away, and the policy never learns to stop.


@dataclass
class RolloutBatch:
    """Responses as tensors, with what does not change while the policy learns. Source: ours."""

    sequences: Sequences  # targets are −100 where a token has no loss
    advantage_BS: Tensor
    sampler_log_prob_BS: Tensor
    old_log_prob_BS: Tensor | None = None  # None: the policy's own, so the ratio is 1
    reference_log_prob_BS: Tensor | None = None


@dataclass(frozen=True)
class GRPOObjective:
    """(policy, rollout batch) to the sum over tokens, and their count: scalars.

    The penalty takes all tokens as samples of the policy itself, as Super's recipe does.
    Raises: ValueError for a negative option, or without a reference where one is needed.
    Source: NeMo-RL's loss, whose options these are.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    weight_level: str = "token"  # of `importance_weights`
    weight_cap: float = math.inf
    error_limit: float = math.inf  # of `trusted_responses`
    kl_weight: float = 0.0

    def __post_init__(self):
        least = min(self.clip_low, self.clip_high, self.weight_cap, self.kl_weight)
        if least < 0 or self.error_limit < 1:
            raise ValueError(f"{self}: from 0 on, and error_limit from 1 on")

    def __call__(self, policy: GPT, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        sequences = batch.sequences
        log_prob_BS = policy.log_probs(sequences)
        old_BS = batch.old_log_prob_BS
        if old_BS is None:
            old_BS = log_prob_BS.detach()
        both = (old_BS, batch.sampler_log_prob_BS, sequences)
        is_trusted_BS = trusted_responses(*both, self.error_limit)
        mask_BS = (sequences.targets_BS != IGNORED) & is_trusted_BS
        weight_BS = importance_weights(*both, self.weight_level, self.weight_cap)
        clips = (self.clip_low, self.clip_high)
        loss = grpo_loss(log_prob_BS, old_BS, batch.advantage_BS, mask_BS, weight_BS, *clips)
        if self.kl_weight:
            if batch.reference_log_prob_BS is None:
                raise ValueError(f"kl_weight={self.kl_weight} needs a reference in each batch")
            # Where no token counts, the policy is its own reference: its penalty is 0.
            reference_BS = torch.where(mask_BS, batch.reference_log_prob_BS, log_prob_BS)
            loss = loss + self.kl_weight * kl_penalty(log_prob_BS, reference_BS).sum()
        return loss, mask_BS.sum()


# ── 1.7 A thinking budget ───────────────────────────────────────────────────────────────────────
#
# A server limits a thought by a counter: at the budget it puts the end tag there, and the answer
# follows. The tag was not sampled, so it has no loss; what follows it was. thinking.py has the
# controller, and shows that a policy must have seen a few thoughts that were cut.
#
# ── 1.8 Environments ────────────────────────────────────────────────────────────────────────────
#
# An environment makes prompts and scores responses. Nano has mathematics, code, JSON, instructions
# and tools in each batch, at a fixed ratio, and moves from easy prompts to hard ones
# (environments.py). Some prompts are always solved and some never: both give groups without
# variance, and cost as much as all others.


class Environment:
    """A task with an exact verifier. Raises: NotImplementedError without the two methods.

    Source: Nemotron 3 Nano, post-training; the name is NeMo-Gym's.
    """

    def prompt(self, rng: random.Random) -> list[int]:
        """Token ids of a new problem."""
        raise NotImplementedError

    def reward(self, prompt: list[int], response: list[int]) -> float:
        """From 0 to 1, and 1 for a right response alone."""
        raise NotImplementedError


# ── 2 The policy ────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 A small GPT, on one device or sharded ───────────────────────────────────────────────────
#
# A pre-norm transformer with learned positions. Heads and features are sharded as in chapter 2:
# copy_to_tp before a column-parallel matrix, reduce_from_tp after a row-parallel one. The output
# layer is sharded by vocabulary entries, and log-probabilities are chapter 11's, from sharded
# logits. The two embedding tables are small, and replicated. In a group of one rank the operators
# do nothing, and this is the plain model.


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H), on this rank's heads and features; x_BSH is replicated.

    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(self, config: GPTConfig, group: Group = None):
        super().__init__()
        H = config.hidden_size
        self.group = group
        self.head_size = H // config.num_heads
        self.norm1 = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H, bias=False)
        self.out = nn.Linear(H, H, bias=False)
        self.norm2 = nn.LayerNorm(H)
        self.up = nn.Linear(H, 4 * H, bias=False)
        self.down = nn.Linear(4 * H, H, bias=False)

    def forward(self, x_BSH: Tensor, mask_B1SS: Tensor) -> Tensor:
        """mask_B1SS: which token sees which."""
        qkv = self.qkv(copy_to_tp(self.norm1(x_BSH), self.group))
        q_BnSD, k_BnSD, v_BnSD = rearrange(
            qkv, "B S (n three D) -> three B n S D", three=3, D=self.head_size
        )
        y_BnSD = F.scaled_dot_product_attention(q_BnSD, k_BnSD, v_BnSD, mask_B1SS)
        partial_y_BSH = self.out(rearrange(y_BnSD, "B n S D -> B S (n D)"))
        x_BSH = x_BSH + reduce_from_tp(partial_y_BSH, self.group)
        y_BSf = F.gelu(self.up(copy_to_tp(self.norm2(x_BSH), self.group)))
        return x_BSH + reduce_from_tp(self.down(y_BSf), self.group)


class GPT(nn.Module):
    """The policy: tokens_BS (int64) to log-probabilities, sharded over `group`.

    Its weights are the same for every tp.
    Raises: ValueError where heads do not divide over the ranks.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(self, config: GPTConfig, group: Group = None):
        super().__init__()
        H = config.hidden_size
        tp = group_size(group)
        check_tp(config, tp)
        self.config = config
        self.group = group
        self.embedding = nn.Embedding(config.vocab_size, H)
        self.positions = nn.Embedding(config.max_length, H)
        self.layers = nn.ModuleList(Block(config, group) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(H)
        self.output = nn.Linear(H, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # LayerNorm has 1 and 0
                # The full tensor is drawn, so that weights do not depend on tp.
                full = torch.randn(p.shape, generator=generator) * config.init_std
                p.data = shard_tensor(name, full, config, group_rank(group), tp)

    def hidden(self, tokens_BS: Tensor, sequence_BS: Tensor, position_BS: Tensor) -> Tensor:
        """x_BSH after the last norm. A token sees those before it in its own sequence."""
        place_1S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        is_past_1SS = place_1S.mT >= place_1S
        is_same_BSS = sequence_BS[:, :, None] == sequence_BS[:, None, :]
        mask_B1SS = (is_same_BSS & is_past_1SS)[:, None]
        x_BSH = self.embedding(tokens_BS) + self.positions(position_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH, mask_B1SS)
        return self.final_norm(x_BSH)

    def log_probs(self, batch: Sequences) -> Tensor:
        """log π of each target, log_prob_BS, at least fp32; 0 where it is −100."""
        x_BSH = self.hidden(batch.tokens_BS, batch.sequence_BS, batch.position_BS)
        logits_BSv = self.output(copy_to_tp(x_BSH, self.group))
        V = self.config.vocab_size
        return vocab_parallel_log_probs(logits_BSv, batch.targets_BS, self.group, V)

    def next_log_probs(self, tokens_BS: Tensor, sequence_BS: Tensor, position_BS: Tensor) -> Tensor:
        """log π of every vocabulary entry after each row, replicated: (B, V), at least fp32."""
        x_BSH = self.hidden(tokens_BS, sequence_BS, position_BS)
        logits_BV = self.output(x_BSH[:, -1])
        if group_size(self.group) > 1:
            logits_BV = _all_gather(logits_BV, self.group)[:, : self.config.vocab_size]
        return at_least_fp32(logits_BV).log_softmax(dim=-1)


# ── 2.2 Rollouts ────────────────────────────────────────────────────────────────────────────────
#
# A rollout continues each prompt G times. Prompts of unequal lengths are padded on the left, as
# another sequence, so that all rows go on at one place. Each replica takes prompts of its own with
# all G responses: a group is never torn, so advantages need no communication. The tp ranks of a
# replica must draw the same tokens: their log-probabilities and generators are equal.
#
# Nothing is read until all tokens are there: one host synchronisation for a batch. What follows an
# end token is cut off on the host. An inference engine stops there, keeps keys and values of
# earlier tokens, and refills the row with another prompt; the responses are the same.


@dataclass
class Response:
    """One response, and what is known of it only while it is sampled."""

    prompt: list[int]
    tokens: list[int]  # its end token included, where it has one
    log_probs: list[float]  # the sampler's, of each token
    is_forced: list[bool]  # by a controller
    is_complete: bool  # False: cut at the longest length


@torch.no_grad()
def rollout(
    policy: GPT,
    prompts: list[list[int]],
    group_size: int,
    max_tokens: int,
    end_id: int,
    generator: torch.Generator | None,
    controller: Any = None,
) -> list[Response]:
    """Samples group_size responses to each prompt, at temperature 1, a prompt's next to each other.

    Args:
        max_tokens: of a response.
        generator: in one state on the tp ranks of a replica; None: the most likely token each time.
        controller: a fresh `BudgetController` of all rows (thinking.py); it reads the prompts.
    Raises: ValueError without prompts, for an empty one, a negative id, or too few positions.
    Source: ours.
    """
    shortest = min(map(len, prompts), default=0)
    longest = max(map(len, prompts), default=0)
    positions = policy.config.max_length
    if not shortest or min(map(min, prompts)) < 0 or longest + max_tokens > positions:
        found = f"{len(prompts)} prompts of {shortest} to {longest} tokens, and {max_tokens} more"
        raise ValueError(f"{found}: the policy has {positions} positions, and ids from 0 on")
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    device = policy.output.weight.device
    padding = [longest - len(prompt) for prompt in prompts]
    padding_B1 = torch.tensor(padding, device=device)[:, None]
    rows = [[-1] * count + prompt for count, prompt in zip(padding, prompts)]
    tokens_BS = torch.tensor(rows, device=device)
    place_1S = torch.arange(longest + max_tokens, device=device)[None]
    sequence_BS = (place_1S >= padding_B1).long()
    position_BS = (place_1S - padding_B1).clamp(min=0)
    if controller:
        controller.read(tokens_BS)
    tokens_BS = tokens_BS.clamp(min=0)  # the controller takes padding, -1, for no part of a tag
    columns = []
    for size in range(longest, longest + max_tokens):
        log_p_BV = policy.next_log_probs(tokens_BS, sequence_BS[:, :size], position_BS[:, :size])
        next_B = log_p_BV.argmax(dim=-1)
        if generator:
            next_B = torch.multinomial(log_p_BV.exp(), 1, generator=generator)[:, 0]
        is_forced_B = torch.zeros_like(next_B, dtype=torch.bool)
        if controller:
            next_B, is_forced_B = controller(next_B)
        next_B1 = next_B[:, None]
        tokens_BS = torch.cat([tokens_BS, next_B1], dim=1)
        log_prob_B = log_p_BV.gather(-1, next_B1)[:, 0]
        columns.append(torch.stack([next_B.double(), is_forced_B, log_prob_B]))
    values_3BS = torch.stack(columns, dim=-1).tolist()  # the one time that values are read
    return [_cut(end_id, *row) for row in zip(prompts, *values_3BS)]


def _cut(end_id: int, prompt: list[int], ids: list, forced: list, log_probs: list) -> Response:
    """A response without what follows its end token; the lists are floats."""
    is_complete = end_id in ids
    size = ids.index(end_id) + 1 if is_complete else len(ids)
    tokens = list(map(int, ids[:size]))
    is_forced = list(map(bool, forced[:size]))
    return Response(prompt, tokens, log_probs[:size], is_forced, is_complete)


@torch.no_grad()
def rollout_batch(
    responses: list[Response],
    advantage_R: Tensor,
    device: torch.device,
    old_policy: GPT | None = None,
    reference: GPT | None = None,
    overlong_filter: bool = False,
    row_length: int | None = None,
) -> RolloutBatch:
    """Responses as tensors; log-probabilities of other policies are computed here, once.

    Args:
        advantage_R: its dtype is that of the sampler's log-probabilities here.
        old_policy: for several updates per batch; None: the ratio is 1.
        overlong_filter: a response that was cut has no loss.
        row_length: packs responses into rows, as `collate` does.
    Raises: ValueError where advantages and responses are not equally many. Source: ours.
    """
    if len(responses) != len(advantage_R):
        raise ValueError(f"{len(advantage_R)} advantages for {len(responses)} responses")
    sequences = collate([(x.prompt, x.tokens) for x in responses], row_length)
    is_response_BS = sequences.targets_BS != IGNORED
    log_probs = []
    has_no_loss = []
    for x in responses:
        log_probs += x.log_probs
        is_filtered = overlong_filter and not x.is_complete
        has_no_loss += [is_filtered or forced for forced in x.is_forced]
    # The places of response tokens, row by row, are in the order of the responses.
    has_no_loss_BS = torch.zeros_like(is_response_BS)
    has_no_loss_BS[is_response_BS] = torch.tensor(has_no_loss)
    targets_BS = torch.where(has_no_loss_BS, IGNORED, sequences.targets_BS)
    dtype = at_least_fp32(advantage_R).dtype
    sampler_BS = torch.zeros(targets_BS.shape, dtype=dtype)
    sampler_BS[is_response_BS] = torch.tensor(log_probs, dtype=dtype)
    sampler_BS[has_no_loss_BS] = 0  # as log π is where there is no target
    advantage_BS = F.pad(advantage_R.cpu(), (0, 1))[sequences.sequence_BS]
    sequences = sequences._replace(targets_BS=targets_BS).to(device)
    batch = RolloutBatch(sequences, advantage_BS.to(device), sampler_BS.to(device))
    if old_policy is not None:
        batch.old_log_prob_BS = old_policy.log_probs(sequences)
    if reference is not None:
        batch.reference_log_prob_BS = reference.log_probs(sequences)
    return batch


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# A table says along which dimension each parameter is sharded; what is not in it is replicated. The
# rows of qkv are ordered (head, {q, k, v}, D), so a shard of rows has complete heads. Chapter 11
# merges such shards to a checkpoint again.

SHARD_DIM = {"qkv.weight": 0, "out.weight": 1, "up.weight": 0, "down.weight": 1, "output.weight": 0}


def shard_dim(name: str) -> int | None:
    """The dimension along which parameter `name` is sharded, or None."""
    return SHARD_DIM.get(".".join(name.split(".")[-2:]))


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of which this rank holds a shard; all others are replicated."""
    return [p for name, p in model.named_parameters() if shard_dim(name) is not None]


def check_tp(config: GPTConfig, tp: int) -> None:
    """Raises ValueError where heads do not divide over `tp` ranks."""
    if config.num_heads % tp:
        raise ValueError(f"tp={tp} must divide num_heads={config.num_heads}")


def shard_tensor(name: str, full: Tensor, config: GPTConfig, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s shard of `full`, the parameter `name` (...); a copy."""
    dim = shard_dim(name)
    if dim is None:
        return full.clone()
    if name == "output.weight":
        rows = padded_vocab_size(config.vocab_size, tp)
        full = F.pad(full, (0, 0, 0, rows - config.vocab_size))
    return full.chunk(tp, dim)[rank].clone()


def shard_state_dict(full: StateDict, config: GPTConfig, rank: int, tp: int) -> StateDict:
    """A single device's state dict to that of tensor-parallel rank `rank`; copies.

    Raises: ValueError where heads do not divide over the ranks.
    """
    check_tp(config, tp)
    return {name: shard_tensor(name, x, config, rank, tp) for name, x in full.items()}


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Ranks form a mesh (dp, tp). `train` is chapter 11's: backward on sums, one all-reduce over dp that
# carries gradients, loss and count, one division. Replicas may have unequally many tokens, or none.
# A mean over replicas on top of that would divide twice.
#
# All ranks of a mesh take the same steps at the same time. Where a response takes long, all wait
# for it: that is what asynchronous sampling is for.


# region carried: replicas (home: 11_preference)
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


# endregion copy 6543e0
# region carried: sums and counts (home: 11_preference)
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


# endregion copy 3075ca
# ── 4.1 On-policy, and one step off ─────────────────────────────────────────────────────────────
#
# Sampling and training alternate, and each waits for the other. Nano does so. Super samples the
# next batch with weights of the step before, on other GPUs, while it trains:
#
#     age 0     sample 0 │ update 0 │ sample 1 │ update 1 │ sample 2 │ ...
#     age 1     sample 0 │ sample 1 │ sample 2 │ sample 3 │               the sampler's ranks
#                        │ update 0 │ update 1 │ update 2 │               the trainer's
#
# Batch 2 is sampled with the weights after update 0, and used after update 1. Its weights π/μ are
# those of section 1.4. Here both run on the same ranks, in that order.


def batches_of_age(sample: Callable[[int], Any], steps: int, age: int) -> Iterator[list]:
    """For each step a list of one batch, sample(step), made `age` updates earlier.

    To be iterated by `train`, which updates the weights that `sample` uses.
    Source: Nemotron 3 Super, post-training: asynchronous, one step off-policy.
    """
    waiting = deque()
    for step in range(steps + age):
        if step < steps:
            waiting.append(sample(step))
        if step >= age:
            yield [waiting.popleft()]


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# The next step is size: engines and trainers on ranks of their own, weights that are pushed while
# responses are in flight, and rewards from programs that run for minutes.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────
#
# A policy of 100,000 parameters learns to sort four digits, from random weights: no response is
# given to it.
#
#     prompt  7 3 5 1 =      right  1 3 5 7 end      reward: the share of right places
#
# At the start one token of sixteen is right by chance, and so a group of 8 has some variance: that
# is all it takes. With a reward of 1 for exact responses alone, no group would have any, and
# nothing would be learned. At a learning rate of 4e-3 the reward stays at one half: most responses
# of a group become equal, and without variance nothing is learned.

STEPS = 200
DIGITS = 4
EQUALS = 10
END = 11

# fp64 is the proof. fp32 and bf16 show how rounding affects correct code.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 3e-1}
AGREE = {"fp64": 1e-12, "fp32": 1e-4, "bf16": 5e-1}  # log π of sampler and trainer


class SortDigits(Environment):
    """Digits, to be sorted. Source: ours.

    The reward is dense: half of an answer is worth something, so that a policy that has never seen
    a right one has a slope to follow.
    """

    def prompt(self, rng: random.Random) -> list[int]:
        return [*rng.choices(range(10), k=DIGITS), EQUALS]

    def reward(self, prompt: list[int], response: list[int]) -> float:
        right = [*sorted(prompt[:-1]), END]
        hits = sum(a == b for a, b in zip(right, response))
        return hits / max(len(right), len(response))


def made_up_responses(count: int) -> tuple[list[Response], Tensor]:
    """Responses of unequal lengths with advantages, advantage_R; some tokens are forced, and some
    responses are cut."""
    rng = random.Random(count)
    responses = []
    for size in range(1, count + 1):
        tokens = rng.choices(range(16), k=1 + size % 7)
        is_forced = [token > 12 for token in tokens]
        log_probs = [-2.5] * len(tokens)
        responses.append(Response(tokens[:3], tokens, log_probs, is_forced, size % 4 > 0))
    return responses, torch.linspace(-2, 1, count, dtype=torch.float64)


def equivalence(
    mesh: Mesh, alone: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps with every option of the loss, on this mesh, padded and in unequal
    micro-batches, and on this rank alone, packed in one batch: name to error."""
    config = GPTConfig(vocab_size=17, num_heads=2 * mesh.tp, hidden_size=16 * mesh.tp)
    objective = GRPOObjective(weight_cap=1.2, error_limit=1.5, kl_weight=0.1)
    responses, advantage_R = made_up_responses(2 * mesh.dp + 5)
    advantage_R = advantage_R.to(dtype)
    first = slice(mesh.dp_rank, mesh.dp_rank + 1)
    others = slice(mesh.dp_rank + mesh.dp, None, mesh.dp)
    policies = []
    results = []
    for place, parts, length in ((mesh, [first, others], None), (alone, [slice(None)], 30)):
        configs = [replace(config, seed=seed) for seed in range(3)]
        models = [GPT(each, place.tp_group).to(device, dtype) for each in configs]
        policy, old_policy, reference = models
        batches = []
        for part in parts:
            args = (responses[part], advantage_R[part], device, old_policy, reference, True, length)
            batches.append(rollout_batch(*args))
        optimizer = make_optimizer(policy, 1e-3)
        policies.append(policy)
        results.append(train(policy, optimizer, [batches] * 5, objective, place, 0.1, autocast))
    policy, plain = policies
    shard = partial(shard_state_dict, config=config, rank=group_rank(mesh.tp_group), tp=mesh.tp)
    errors = {}
    for step, (here, there) in enumerate(zip(*results)):
        ratio_2 = torch.stack(here) / torch.stack(there)  # of loss and norm
        loss, norm = (ratio_2 - 1).abs().tolist()
        errors |= {f"loss {step}": loss, f"norm before clipping {step}": norm}
        if step == 0:
            grads = {name: p.grad for name, p in policy.named_parameters()}
            right = shard({name: p.grad for name, p in plain.named_parameters()})
            errors |= relative_errors("gradient", grads, right)
    if dtype == torch.float64:
        right = shard(plain.state_dict())
        errors |= relative_errors("weight after AdamW", policy.state_dict(), right, 5e-3)
    return over_all_ranks({f"{name}, tp {mesh.tp}": error for name, error in errors.items()})


@dataclass
class Learner:
    """A policy that learns in one environment, on this rank's replica."""

    args: argparse.Namespace
    mesh: Mesh
    device: torch.device
    policy: GPT
    environment: Environment
    rewards: list[float] = field(default_factory=list)  # of the last responses

    def respond(self, prompts: int, group_size: int, greedy: bool, place: Any) -> list[Response]:
        """New prompts, responses and rewards: a function of the policy, the replica, the place."""
        name = repr((self.args.seed, self.mesh.dp_rank, place))  # equal on its tp ranks
        rng = random.Random(name)
        rows = [self.environment.prompt(rng) for _ in range(prompts)]
        generator = None
        if not greedy:  # crc32: Python's hash() differs between processes
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        responses = rollout(self.policy, rows, group_size, DIGITS + 1, END, generator)
        self.rewards = [self.environment.reward(x.prompt, x.tokens) for x in responses]
        return responses

    def batch(self, step: int) -> RolloutBatch:
        """Sampled, scored, and compared within groups.

        The policy of this moment samples; when the batch is used, is the caller's choice.
        """
        responses = self.respond(self.args.prompts, self.args.group_size, False, step)
        advantage_R = grpo_advantages(torch.tensor(self.rewards), self.args.group_size)
        dtype, _ = dtypes(self.args)  # of the policy's parameters
        return rollout_batch(responses, advantage_R.to(dtype), self.device)

    def means(self) -> tuple[float, float]:
        """Reward, and share of exact responses, of the last ones of all replicas. Collective."""
        exact = self.rewards.count(1)
        totals = [sum(self.rewards), exact, len(self.rewards)]
        totals_3 = torch.tensor(totals, device=self.device)  # of this replica
        reward, exact, count = _all_reduce(totals_3, self.mesh.dp_group).tolist()
        return reward / count, exact / count

    def evaluate(self) -> tuple[float, float]:
        """Of the most likely responses to new prompts. Collective."""
        self.respond(256, 1, True, "evaluation")
        return self.means()

    def learn(self) -> None:
        """GRPO; prints every tenth step."""
        optimizer = make_optimizer(self.policy, self.args.lr)
        batches = batches_of_age(self.batch, self.args.steps, self.args.age)
        objective = GRPOObjective(weight_cap=5.0, error_limit=2.0)
        autocast = dtypes(self.args)[1]
        results = train(self.policy, optimizer, batches, objective, self.mesh, autocast=autocast)
        say("step  reward   exact    norm")
        for step, (loss, norm) in enumerate(results):
            loss, norm = read_step(step, loss, norm)
            if step < 3 or step % 10 == 9:
                reward, exact = self.means()
                say(f"{step:4}  {reward:6.3f}  {exact:6.1%}  {norm:6.3f}")


@torch.no_grad()
def disagreement(policy: GPT, batch: RolloutBatch, autocast: Autocast) -> float:
    """The largest |log π − log μ| of all ranks' batches; inf for NaN. Collective."""
    with torch.autocast(batch.advantage_BS.device.type, autocast, enabled=autocast is not None):
        log_prob_BS = policy.log_probs(batch.sequences)
    gap = (log_prob_BS - batch.sampler_log_prob_BS).abs().nan_to_num(math.inf).max()
    return _all_reduce(gap, op=dist.ReduceOp.MAX).item()


def demonstrate(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """GRPO from random weights; what was measured: (claim, paper, here, verdict)."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    policy = GPT(config, mesh.tp_group).to(device, dtype)
    learner = Learner(args, mesh, device, policy, SortDigits())
    apart = disagreement(policy, learner.batch(0), autocast)
    _, before = learner.evaluate()
    learner.learn()
    _, after = learner.evaluate()
    say()
    short = None if args.steps >= STEPS else "a short run"
    exact = f"{before:.0%} to {after:.0%}"
    return [
        ("log π of sampler and trainer", "equal", f"within {apart:.0e}", apart < AGREE[args.dtype]),
        ("exact, most likely responses", "rises", exact, short or after > 0.2),
    ]


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f", tp {args.tp}")
    precision = dtypes(args) if args.check else [torch.float64]
    errors = {}
    group = make_mesh(1, device, args.timeout).tp_group  # of this rank alone
    alone = Mesh(tp_group=group, dp_group=group)
    for tp in range(1, args.world_size + 1):
        if args.world_size % tp == 0:
            mesh = make_mesh(tp, device, args.timeout)
            errors |= equivalence(mesh, alone, device, *precision)
    if args.check:
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        error = worst(errors)
        claim = "gradients, norms, weights equal the single device's, float64"
        proof = (claim, "exact", f"worst {error:.1e} relative", error <= BOUNDS["fp64"])
        mesh = make_mesh(args.tp, device, args.timeout)
        good = print_claims([proof, *demonstrate(args, mesh, device)])
    if not good:
        sys.exit(1)


@dataclass
class Options(GPTConfig):  # the chapter's own flags
    tp: int = flag(1, "ranks that share one copy of the policy", least=1)
    prompts: int = flag(16, "prompts of a step, per replica", least=1)
    group_size: int = flag(8, "responses to each prompt, G", least=2)
    age: int = flag(0, "updates between sampling and training")
    lr: float = flag(1e-3, "learning rate", least=1e-9)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where flags and ranks do not fit."""
    if args.world_size % args.tp:
        raise ValueError(f"--tp {args.tp} does not divide the {args.world_size} ranks")
    check_tp(config_from(args, GPTConfig), args.tp)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=2, steps=STEPS)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: log-probabilities (home: 11_preference)
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


# endregion copy 40ff80
# region carried: batches of responses (home: 11_preference)
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


# endregion copy 21402b
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
