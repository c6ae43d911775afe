# SPDX-License-Identifier: MIT-0
"""The reward model, and rounds of RPO on a policy's own responses: the loop of chapter 11's sketch.

Papers: HelpSteer2, Wang et al., 2024, arXiv 2406.08673; Nemotron-4 340B Technical Report, NVIDIA,
        2024, arXiv 2406.11704

    python 11_preference/rounds.py              2 local ranks, each samples, scores and learns
    python 11_preference/rounds.py --tp 2       one model on both
    python 11_preference/rounds.py --judge model

A model learns to sort digits, a reward model learns to mark its responses, and then each round

    samples 4 responses to each prompt    from the policy, temperature 1
    scores them                           by a verifier, or by the reward model (--judge model)
    pairs the best with the worst         no pair where all are equally good
    learns by RPO                         from the reference's weights
    makes the policy the next reference

The 340B report starts with another model's responses, trains on them, and lets the result make the
next ones. Where there is a verifier (mathematics, Python code, checkable instructions), it says
which response is right; elsewhere the reward model does. A weak reward model is soon exploited:
75 % of the responses were right at first, 90 % after three rounds by the verifier, and 60 % after
three by the reward model.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from preference import (
    DIGITS,
    END,
    EQUALS,
    IGNORED,
    PAD,
    STEPS,
    Autocast,
    Example,
    Judged,
    Learned,
    Mesh,
    Options,
    ParallelGPT,
    PreferenceObjective,
    Sequences,
    _all_gather,
    _all_reduce,
    at_least_fp32,
    check_args,
    collate,
    dtypes,
    flag,
    launch,
    learn,
    make_mesh,
    make_optimizer,
    pair_batch,
    parse_flags,
    print_claims,
    read_step,
    say,
    say_setting,
    sft,
    train,
)
from torch import Tensor, nn

# ── 1 The reward model ──────────────────────────────────────────────────────────────────────────
#
# HelpSteer2's annotators gave five marks from 0 to 4 to each response. The reward model is the
# language model with a linear head in the place of the output layer. It reads the hidden state of
# the end token, the only one that has seen the complete response, and regresses the five marks. One
# scalar is made of them with published weights; that of verbosity is negative: longer is worse.
#
# Marks may be missing: a missing one is −100, and the mean is over those that are there. Each mark
# counts once, so the sum is divided by the global count, not by that of a micro-batch.
#
# Which token is the last? A row ends in padding, and x[:, -1] reads that. The first padding token
# is one too late. A search for the padding id finds an end token that is used as padding, or fails
# in a row without any. So the batch keeps the place.

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER_WEIGHTS = (0.30, 0.74, 0.46, 0.47, -0.33)  # of the released model, in that order
SAMPLES = 4  # responses to each prompt


class RewardModel(nn.Module):
    """Five marks for each response, batch to rewards_R5, at least fp32, replicated.

    Args: trunk: a `GPT` or `ParallelGPT`, which is taken over: it loses its output layer.
    The head is replicated and starts at zero, so rewards do. Source: HelpSteer2, section 3.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.trunk.output = None
        self.head = nn.Linear(trunk.config.hidden_size, len(ATTRIBUTES))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Sequences) -> Tensor:
        x_BSH = self.trunk.hidden(batch.tokens_BS, batch.sequence_BS, batch.position_BS)
        x_RH = x_BSH.flatten(0, 1)[batch.end_R]
        return at_least_fp32(self.head(x_RH))


def helpsteer_loss(
    rewards_R5: Tensor, labels_R5: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean squared error over the labels that are there, a scalar. A label of −100 is missing.

    Args: count: the number to divide by, that of all micro-batches and ranks; None: of this one.
    Raises: ValueError where shapes disagree. Source: HelpSteer2, section 3; NeMo-Aligner.
    """
    if rewards_R5.shape != labels_R5.shape:
        shapes = f"rewards {tuple(rewards_R5.shape)} and labels {tuple(labels_R5.shape)}"
        raise ValueError(f"{shapes}: give each response a label or −100 for each attribute")
    is_there_R5 = labels_R5 != IGNORED
    error_R5 = torch.where(is_there_R5, rewards_R5 - labels_R5, 0)
    if count is None:
        count = is_there_R5.sum().clamp(min=1)
    return error_R5.square().sum() / count


def scalar_reward(rewards_R5: Tensor) -> Tensor:
    """The published weights applied, reward_R. Source: Nemotron-4-340B-Reward's model card."""
    return rewards_R5 @ rewards_R5.new_tensor(HELPSTEER_WEIGHTS)


def reward_objective(model: RewardModel, batch: tuple[Sequences, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared errors of marks, summed, and how many labels there are. batch: with labels_R5."""
    sequences, labels_R5 = batch
    loss = helpsteer_loss(model(sequences), labels_R5, count=1)
    return loss, (labels_R5 != IGNORED).sum()


# ── 2 Sampling, and pairs ───────────────────────────────────────────────────────────────────────
#
# Replicas sample responses to prompts of their own. The tp ranks of a replica must draw the same
# tokens: their logits are equal, and so are their generators.


@torch.no_grad()
def sample(
    model: ParallelGPT, prompts_BQ: Tensor, new_tokens: int, generator: torch.Generator
) -> Tensor:
    """Continues prompts of Q tokens, at temperature 1: (B, new_tokens).

    Each token computes the complete row again: generation with a cache is left out.
    Args: generator: in the same state on the tp ranks of a replica. Source: ours.
    """
    tokens_BS = prompts_BQ
    for _ in range(new_tokens):
        logits_Bv = model(tokens_BS)[:, -1]
        logits_BV = _all_gather(logits_Bv, model.group)[:, : model.config.vocab_size]
        p_BV = at_least_fp32(logits_BV).softmax(dim=-1)
        next_B1 = torch.multinomial(p_BV, 1, generator=generator)
        tokens_BS = torch.cat([tokens_BS, next_B1], dim=1)
    return tokens_BS[:, prompts_BQ.shape[1] :]


def best_and_worst(examples: list[Example], rewards: list[float]) -> list[Judged]:
    """One pair of several examples with one prompt, or none where all rewards are equal.

    Source: Nemotron-4 340B, section 3.2.3.
    """
    best = rewards.index(max(rewards))
    worst = rewards.index(min(rewards))
    gap = rewards[best] - rewards[worst]
    return [(examples[best], examples[worst], gap)] if gap > 0 else []


def verify(prompt: list[int], response: list[int]) -> float:
    """The share of right places; 1 only for an exact response."""
    right = [*sorted(prompt[:-1]), END]
    hits = sum(a == b for a, b in zip(right, response))
    return hits / max(len(right), len(response))


def marks(prompt: list[int], response: list[int]) -> list[int]:
    """What an annotator would give, from 0 to 4. Complexity is marked by none."""
    share = verify(prompt, response)
    rises = sum(a <= b for a, b in itertools.pairwise(response))
    coherence = rises / max(1, len(response) - 1)
    verbosity = min(4, 2 * abs(len(response) - len(prompt)))
    return [round(4 * share), 4 * (share == 1), round(4 * coherence), IGNORED, verbosity]


# ── 3 The rounds ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Replica:
    """What one replica does in a round."""

    args: argparse.Namespace
    mesh: Mesh
    device: torch.device

    def sampled(self, policy: ParallelGPT, count: int, times: int, name: str) -> list[Example]:
        """`count` problems with `times` responses each, cut after their end token."""
        place = repr((self.args.seed, self.mesh.dp_rank, name))  # equal on a replica's tp ranks
        rng = random.Random(place)
        prompts = []
        for _ in range(count):
            prompts += [[*rng.choices(range(10), k=DIGITS), EQUALS]] * times
        # crc32: Python's hash() differs between processes.
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(place.encode()))
        prompts_BQ = torch.tensor(prompts, device=self.device)
        examples = []
        for prompt, response in zip(
            prompts, sample(policy, prompts_BQ, DIGITS + 2, generator).tolist()
        ):
            length = response.index(END) + 1 if END in response else len(response)
            examples.append((prompt, response[:length]))
        return examples

    def batch(self, examples: list[Example]) -> Sequences:
        return collate(examples, pad=PAD).to(self.device)

    def mean(self, values: list[float]) -> float:
        """Over the values of all replicas. Collective."""
        totals_2 = torch.tensor([sum(values), len(values)], dtype=torch.float32)
        totals_2 = totals_2.to(self.device)  # the dtype is fp32 on a replica without values, too
        total, count = _all_reduce(totals_2, self.mesh.dp_group).tolist()
        return total / max(1, count)

    def exact(self, policy: ParallelGPT) -> float:
        """The share of new problems that the policy solves, sampled."""
        examples = self.sampled(policy, 256, 1, "evaluation")
        return self.mean([float(verify(*example) == 1) for example in examples])

    def labelled(self, examples: list[Example]) -> Iterator[list]:
        """Batches for the reward model."""
        for step in range(self.args.reward_steps):
            rng = random.Random(repr((self.args.seed, self.mesh.dp_rank, "marks", step)))
            chosen = rng.choices(examples, k=self.args.batch)
            labels_R5 = torch.tensor([marks(*example) for example in chosen])
            yield [(self.batch(chosen), labels_R5.to(self.device))]

    def reward_model(self, policy: ParallelGPT, autocast: Autocast) -> RewardModel:
        """A reward model that has learned from marked responses of the policy."""
        trunk = copy_of(policy, self.device)
        model = RewardModel(trunk).to(self.device, policy.output.weight.dtype)
        batches = self.labelled(self.sampled(policy, self.args.pairs, SAMPLES, "to be marked"))
        optimizer = make_optimizer(model, self.args.lr)
        steps = train(model, optimizer, batches, reward_objective, self.mesh, autocast=autocast)
        for step, (loss, norm) in enumerate(steps):
            loss, norm = read_step(step, loss, norm)
        return model

    @torch.no_grad()
    def score(self, model: RewardModel, examples: list[Example]) -> list[float]:
        return scalar_reward(model(self.batch(examples))).tolist()


def copy_of(model: ParallelGPT, device: torch.device) -> ParallelGPT:
    """The next policy: a model of its own with the same weights."""
    twin = ParallelGPT(model.config, model.group).to(device, model.output.weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def paired(examples: list[Example], rewards: list[float]) -> list[Judged]:
    """The best and the worst of each SAMPLES examples."""
    judged = []
    for first in range(0, len(examples), SAMPLES):
        span = slice(first, first + SAMPLES)
        judged += best_and_worst(examples[span], rewards[span])
    return judged


def agreement(verified: list[float], scored: list[float]) -> list[float]:
    """For each prompt with unequal responses: is the one with the highest score among the best?"""
    found = []
    for first in range(0, len(verified), SAMPLES):
        right = verified[first : first + SAMPLES]
        score = scored[first : first + SAMPLES]
        if min(right) < max(right):
            found.append(float(right[score.index(max(score))] == max(right)))
    return found


def run(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """All rounds; returns what was measured: (claim, paper, here, verdict)."""
    replica = Replica(args, mesh, device)
    autocast = dtypes(args)[1]
    reference = sft(args, mesh, device)
    model = replica.reward_model(reference, autocast)
    start = replica.exact(reference)
    agrees = 0.0
    exact = start
    objective = PreferenceObjective("rpo", args.beta, args.eta, args.sft_weight)
    say("\nround    pairs   log π of chosen, rejected   h = β Δ       Δr     exact")
    say(f"SFT{start:70.1%}")
    for number in range(1, args.rounds + 1):
        examples = replica.sampled(reference, args.pairs, SAMPLES, f"round {number}")
        verified = [verify(*example) for example in examples]
        scored = replica.score(model, examples)
        if number == 1:
            agrees = replica.mean(agreement(verified, scored))
        judged = paired(examples, verified if args.judge == "verifier" else scored)
        policy = copy_of(reference, device)
        x = Learned(0.0, 0.0, 0.0, 0.0, 0.0)
        pairs = replica.mean([float(len(judged))])
        if pairs:
            batch = pair_batch(judged, reference, device, autocast) if judged else None
            x = learn(policy, batch, objective, args, mesh)
        exact = replica.exact(policy)
        say(f"{number:5}{pairs:9.0f}{x.moved:>28}{x.h:10.2f}{x.gap:9.2f}{exact:12.1%}")
        reference = policy  # it starts the next round
    say()
    short = None if args.steps >= STEPS else "a short run"
    claim = "the best of 4 by the reward model is the verifier's"
    found = [(claim, "–", f"{agrees:.0%} of prompts", short or agrees > 0.5)]
    here = f"{start:.0%} to {exact:.0%}"
    risen = exact > start if args.judge == "verifier" else "by the reward model"
    return [*found, ("exact responses, SFT to the last round", "more", here, short or risen)]


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f", tp {args.tp}")
    if not print_claims(run(args, make_mesh(args.tp, device, args.timeout), device)):
        sys.exit(1)


@dataclass
class RoundOptions(Options):  # the chapter's flags, and two more
    rounds: int = flag(3, "rounds of sampling and learning", least=1)
    reward_steps: int = flag(100, "optimizer steps of the reward model", least=1)
    judge: str = flag("verifier", "what scores responses", choices=["verifier", "model"])
    pairs: int = flag(128, "problems of a round, per replica", least=1)
    pair_steps: int = flag(20, "steps of RPO in a round, each over all pairs", least=1)
    pair_lr: float = flag(1e-4, "learning rate of RPO", least=1e-9)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where flags and ranks do not fit."""
    if args.check:
        raise ValueError("--check belongs to preference.py: run it there")
    check_args(args)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [RoundOptions], check_flags, ranks=2, steps=STEPS)


if __name__ == "__main__":
    launch(main, flags())
