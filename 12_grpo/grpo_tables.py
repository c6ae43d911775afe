# SPDX-License-Identifier: MIT-0
"""Chapter 12's tables: released settings, advantage conventions, length weights, exact gradients.

Sources: configuration files of NeMo-RL for Nemotron 3 Nano (2512.20848) and Super (2604.12374);
         GRPO, Shao et al., 2024, arXiv 2402.03300; DAPO, Yu et al., 2025, arXiv 2503.14476

    python 12_grpo/grpo_tables.py        a second on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
makes. Expected gradients are enumerated: every group of responses of a tiny vocabulary, with its
probability, through this chapter's loss. The exit code is 1 where figures that should agree do not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from grpo import (
    IGNORED,
    GRPOObjective,
    Sequences,
    grpo_advantages,
    grpo_loss,
    importance_weights,
    kl_penalty,
)
from torch import Tensor

# ── 1 Released settings ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recipe:
    """A released configuration of GRPO, with what has no effect in it."""

    source: str  # the file in NeMo-RL
    prompts: int  # of a step
    group_size: int
    objective: GRPOObjective
    advantage_clip: float
    overlong_filter: bool
    max_length: int
    learning_rate: float
    age: str  # updates between sampling and training
    inert: str  # what has no effect, and why


NANO = Recipe(
    source="grpo_nanov3.yaml",
    prompts=128,
    group_size=16,
    objective=GRPOObjective(error_limit=2.0),
    advantage_clip=math.inf,
    overlong_filter=True,
    max_length=49_152,
    learning_rate=3e-6,
    age="0",
    inert="both clips: 2,048 responses make one update, at a ratio of 1",
)
SUPER_RLVR = Recipe(
    source="stage1_rlvr.yaml",
    prompts=256,
    group_size=16,
    objective=GRPOObjective(weight_cap=5.0, error_limit=2.0),
    advantage_clip=50.0,
    overlong_filter=False,
    max_length=65_536,
    learning_rate=3e-6,
    age="1",
    inert="both clips: force_on_policy_ratio makes the ratio 1",
)
SUPER_RLHF = replace(
    SUPER_RLVR,
    source="stage3_rlhf.yaml",
    prompts=128,
    objective=replace(SUPER_RLVR.objective, kl_weight=1e-4),
    learning_rate=1e-6,
)
RECIPES = {"Nano": NANO, "Super RLVR": SUPER_RLVR, "Super RLHF": SUPER_RLHF}


def settings(recipe: Recipe) -> dict[str, str]:
    """Name to value, as the table prints them."""
    objective = recipe.objective
    return {
        "file": recipe.source,
        "prompts × responses": f"{recipe.prompts} × {recipe.group_size}",
        "baseline, deviation": "leave-one-out, both",
        "advantage clip": limited(recipe.advantage_clip),
        "clip of the ratio": f"-{objective.clip_low} / +{objective.clip_high}",
        "importance weight": f"{objective.weight_level}, cap {limited(objective.weight_cap)}",
        "response dropped above": limited(objective.error_limit),
        "overlong filter": "on" if recipe.overlong_filter else "off",
        "KL": f"{objective.kl_weight:g}",
        "longest response": f"{recipe.max_length:,}",
        "learning rate": f"{recipe.learning_rate:g}",
        "age of rollouts": recipe.age,
    }


def limited(value: float) -> str:
    return "none" if value == math.inf else f"{value:g}"


# ── 2 Expected gradients, enumerated ────────────────────────────────────────────────────────────
#
# A policy is a table: logits for the first token, and for the second one after each first. All its
# answers can be listed, and all groups of them. The expected gradient is the gradient of the losses
# of all groups, each times its probability under the sampler. Suffixes here: Y answers, T tokens of
# an answer, V vocabulary entries, M groups, G answers of a group, R = M · G.


@dataclass
class Answers:
    """All answers of a tabular policy; with `end`, an answer may be one token, the end token 0."""

    vocabulary: int = 3
    end: bool = False

    def __post_init__(self):
        V = self.vocabulary
        self.ids = [(a,) if self.end and a == 0 else (a, b) for a in range(V) for b in range(V)]
        self.ids = sorted(set(self.ids))
        self.mask_YT = torch.tensor([[True, len(answer) > 1] for answer in self.ids])
        self.lengths_Y = self.mask_YT.sum(dim=1)

    def logits(self, seed: int, scale: float = 1.0) -> Tensor:
        """A random policy, logits (1 + V, V): row 0 of the first token."""
        generator = torch.Generator().manual_seed(seed)
        V = self.vocabulary
        return scale * torch.randn(1 + V, V, generator=generator, dtype=torch.float64)

    def log_probs(self, logits: Tensor) -> Tensor:
        """log π of each token of each answer, log_prob_YT; 0 after its end. logits: (1 + V, V)."""
        log_p = logits.log_softmax(dim=-1)
        first = torch.tensor([answer[0] for answer in self.ids])
        second = torch.tensor([answer[-1] for answer in self.ids])
        log_prob_YT = torch.stack([log_p[0, first], log_p[1 + first, second]], dim=1)
        return torch.where(self.mask_YT, log_prob_YT, 0)


def true_gradient(answers: Answers, logits: Tensor, reward_Y: Tensor) -> Tensor:
    """∇E[r] of a tabular policy, of the shape of logits, (1 + V, V)."""
    leaf = logits.clone().requires_grad_()
    probability_Y = answers.log_probs(leaf).sum(dim=1).exp()
    (probability_Y * reward_Y).sum().backward()
    return leaf.grad


def expected_gradient(
    answers: Answers,
    logits: Tensor,
    reward_Y: Tensor,
    group_size: int = 3,
    sampler: Tensor | None = None,
    level: str = "token",
    normalizer: str = "token",
    **conventions,
) -> Tensor:
    """The expected gradient of GRPO's loss, times −1 and the mean length: (1 + V, V) as logits.

    Args: sampler: logits (1 + V, V) of the policy that draws; None: π. level: of the importance
        weights. normalizer: "token" divides by the tokens of the group, "answers" by G times the
        mean length. conventions: of `grpo_advantages`.
    """
    leaf = logits.clone().requires_grad_()
    groups = itertools.product(range(len(answers.ids)), repeat=group_size)
    group_MG = torch.tensor(list(groups))
    drawn_YT = answers.log_probs(logits if sampler is None else sampler)
    answer_Y = drawn_YT.sum(dim=1)
    chance_M = answer_Y[group_MG].sum(dim=1).exp()
    mean_length = (answer_Y.exp() * answers.lengths_Y).sum()
    advantage_R = grpo_advantages(reward_Y[group_MG].flatten(), group_size, **conventions)
    count_M = answers.lengths_Y[group_MG].sum(dim=1)
    if normalizer == "answers":
        count_M = torch.full_like(chance_M, group_size) * mean_length
    scale_M = chance_M / count_M * mean_length
    advantage_R = advantage_R * scale_M.repeat_interleave(group_size)
    row_R = group_MG.flatten()
    mask_RT = answers.mask_YT[row_R]
    log_prob_RT = answers.log_probs(leaf)[row_R]
    sequence_RT = torch.arange(len(row_R))[:, None].expand_as(mask_RT)
    targets_RT = torch.where(mask_RT, 0, IGNORED)
    sequences = Sequences(sequence_RT, targets_RT, sequence_RT, sequence_RT, row_R)
    weight_RT = importance_weights(log_prob_RT.detach(), drawn_YT[row_R], sequences, level)
    no_clip = (math.inf, math.inf)
    old_RT = log_prob_RT.detach()
    advantage_RT = advantage_R[:, None].expand_as(mask_RT)
    grpo_loss(log_prob_RT, old_RT, advantage_RT, mask_RT, weight_RT, *no_clip).backward()
    return -leaf.grad


def factor(
    answers: Answers, logits: Tensor, reward_Y: Tensor, group_size: int, eps: float = 1e-6
) -> float:
    """c = E[1/std of the others], enumerated; 1 where they are equal. logits: (1 + V, V)."""
    chance_Y = answers.log_probs(logits).sum(dim=1).exp().tolist()
    total = 0.0
    for others in itertools.product(range(len(chance_Y)), repeat=group_size - 1):
        chance = math.prod(chance_Y[i] for i in others)
        rewards = torch.stack([reward_Y[i] for i in others])
        is_flat = rewards.max() == rewards.min()
        total += chance * (1.0 if is_flat else 1 / (rewards.std().item() + eps))
    return total


def bias(found: Tensor, right: Tensor) -> float:
    """How far `found` (...) is from any multiple of `right`, relative to its length."""
    scale = (found * right).sum() / right.square().sum()
    return ((found - scale * right).norm() / found.norm()).item()


def prompt_weight(pass_rate: float, group_size: int = 16) -> float:
    """c for rewards 0 and 1: how much a prompt with that pass rate counts. Source: section 1.2."""
    n = group_size - 1
    total = 0.0
    for k in range(n + 1):
        chance = math.comb(n, k) * pass_rate**k * (1 - pass_rate) ** (n - k)
        std = math.sqrt(k * (n - k) / (n * (n - 1)))
        total += chance / (std if std else 1.0)
    return total


def kl_gradients(vocabulary: int = 7) -> dict[str, Tensor]:
    """Expected gradients of k1, k2 and k3 for one token, and of both divergences, all (V)."""
    generator = torch.Generator().manual_seed(3)
    logits_V, reference_V, sampler_V = torch.randn(
        3, vocabulary, generator=generator, dtype=torch.float64
    )
    leaf_V = logits_V.clone().requires_grad_()
    log_p_V = leaf_V.log_softmax(dim=-1)
    p_V = log_p_V.exp()
    ref_V = reference_V.log_softmax(dim=-1)
    drawn_V = sampler_V.log_softmax(dim=-1)
    gap_V = log_p_V - ref_V
    sums = {
        "KL(π ‖ ref)": (p_V * gap_V).sum(),
        "KL(ref ‖ π)": -(ref_V.exp() * gap_V).sum(),
        "k1": (p_V.detach() * gap_V).sum(),
        "k2": (p_V.detach() * gap_V.square() / 2).sum(),
        "k3": (p_V.detach() * kl_penalty(log_p_V, ref_V, score_term=False)).sum(),
        "k3 with its score term": (p_V.detach() * kl_penalty(log_p_V, ref_V)).sum(),
        "the same, off-policy": (drawn_V.exp() * kl_penalty(log_p_V, ref_V, drawn_V)).sum(),
    }
    found = {}
    for name, value in sums.items():
        (found[name],) = torch.autograd.grad(value, leaf_V, retain_graph=True)
    return found


# ── 3 The tables ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A claim and the figures that should agree; "–" where there is none.

    note: why figures disagree, or what a comparison needs. A note on figures that agree is a
    failure, and so are figures that disagree without a note.
    """

    claim: str
    paper: str
    formula: str = "–"
    here: str = "–"
    note: str = ""

    @property
    def verdict(self) -> str:
        figures = [x for x in (self.paper, self.formula, self.here) if x != "–"]
        agree = len(figures) > 1 and len(set(figures)) == 1
        if agree:
            return "FAILED" if self.note else "ok"
        return self.note or "FAILED"


CONVENTIONS = {
    "group mean, nothing": dict(leave_one_out=False, deviation="none"),
    "leave-one-out, nothing": dict(deviation="none"),
    "group mean, population std (GRPO)": dict(leave_one_out=False, deviation="population"),
    "group mean, sample std (trl)": dict(leave_one_out=False, deviation="sample"),
    "leave-one-out, std of the others (NeMo-RL)": dict(),
}


def by_hand(leave_one_out: bool = True, deviation: str = "leave_one_out") -> tuple[float, float]:
    """Advantages of one success and of a failure among 16, from sums written out."""
    n = 15 if leave_one_out else 16
    success = 1 - (0 if leave_one_out else 1 / 16)
    failure = -1 / n
    divisor = {"none": (1.0, 1.0), "leave_one_out": (1.0, math.sqrt(1 / 15))}
    divisor["population"] = (math.sqrt(15) / 16,) * 2
    divisor["sample"] = (0.25,) * 2
    return success / divisor[deviation][0], failure / divisor[deviation][1]


def conventions() -> Iterator[Row]:
    rewards_R = torch.zeros(16, dtype=torch.float64)
    rewards_R[0] = 1
    for name, options in CONVENTIONS.items():
        found = grpo_advantages(rewards_R, 16, eps=0.0, **options)
        success, failure = by_hand(**options)
        here = f"{found[0]:.4f}, {found[1]:.4f}"
        yield Row(f"1 of 16: {name}", "–", f"{success:.4f}, {failure:.4f}", here)
    half_R = torch.arange(16, dtype=torch.float64) % 2
    found = grpo_advantages(half_R, 16, eps=0.0)
    yield Row("8 of 16: the last of these", "–", f"{-math.sqrt(16 / 15):.4f}", f"{found[0]:.4f}")
    flat = grpo_advantages(torch.full((16,), 0.1), 16)
    yield Row("16 equal rewards of 0.1", "–", "0.0", f"{flat.abs().max():.1f}")


def lengths() -> Iterator[Row]:
    note = "a long response counts 100 times as much"
    by_token = f"{10 / 1010:.4f}, {1000 / 1010:.4f}"
    yield Row("weights of 10 and 1,000 tokens, token mean", "–", by_token, note=note)
    note = "a token of it counts 1/100 of one of the short response"
    yield Row("the same, mean of the responses' means", "–", "0.5000, 0.5000", note=note)


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def exactly(found: Tensor, right: Tensor) -> str:
    return "0" if (found - right).abs().max() < 1e-12 * right.abs().max() else "not 0"


def gradients() -> Iterator[Row]:
    """What is exact, and how large each bias is. Distances are from the best multiple of ∇E[r]."""
    answers = Answers()
    logits = answers.logits(1)
    reward_Y = torch.linspace(0, 1, len(answers.ids), dtype=torch.float64).square()
    right = true_gradient(answers, logits, reward_Y)
    plain = expected_gradient(answers, logits, reward_Y, deviation="none")
    yield Row("leave-one-out, minus ∇E[r]", "–", "0", exactly(plain, right))
    mean = dict(leave_one_out=False, deviation="none")
    found = expected_gradient(answers, logits, reward_Y, **mean)
    yield Row("group mean, minus (G − 1)/G ∇E[r]", "–", "0", exactly(found, right * 2 / 3))
    found = expected_gradient(answers, logits, reward_Y)
    c = factor(answers, logits, reward_Y, 3)
    claim = f"leave-one-out std, minus c ∇E[r], c = {c:.3f}"
    yield Row(claim, "–", "0", exactly(found, right * c))
    for deviation in ("population", "sample"):
        options = dict(leave_one_out=False, deviation=deviation)
        found = expected_gradient(answers, logits, reward_Y, **options)
        claim = f"group mean and {deviation} std: distance"
        yield Row(claim, "–", "–", percent(bias(found, right)), "measured, G = 3")
    for scale in (0.1, 0.5, 1.0):
        sampler = logits + scale * answers.logits(2)
        options = dict(sampler=sampler, deviation="none")
        found = expected_gradient(answers, logits, reward_Y, level="sequence", **options)
        distance = (answers.log_probs(sampler) - answers.log_probs(logits)).abs().mean()
        claim = f"sampler {distance:.2f} apart, product of weights, minus ∇E[r]"
        yield Row(claim, "–", "0", exactly(found, right))
        found = expected_gradient(answers, logits, reward_Y, **options)
        claim = f"sampler {distance:.2f} apart, weights of tokens: distance"
        yield Row(claim, "–", "–", percent(bias(found, right)), "measured")
    yield from unequal()
    for rate in (0.5, 0.25, 1 / 16, 1 / 100):
        claim = f"c of a prompt with pass rate {rate:.3f}, G = 16"
        yield Row(claim, "–", f"{prompt_weight(rate):.3f}", note="at most 2.5")


def unequal() -> Iterator[Row]:
    """Answers of one token or two."""
    answers = Answers(end=True)
    logits = answers.logits(4)
    reward_Y = torch.linspace(0, 1, len(answers.ids), dtype=torch.float64).square()
    right = true_gradient(answers, logits, reward_Y)
    for group_size in (2, 3, 4):
        options = dict(group_size=group_size, deviation="none")
        found = expected_gradient(answers, logits, reward_Y, **options)
        claim = f"unequal lengths, tokens of the batch, G = {group_size}: distance"
        yield Row(claim, "–", "–", percent(bias(found, right)), "measured: it falls with the batch")
    options = dict(normalizer="answers", deviation="none")
    found = expected_gradient(answers, logits, reward_Y, **options)
    yield Row("unequal lengths, a constant, minus ∇E[r]", "–", "0", exactly(found, right))


def divergences() -> Iterator[Row]:
    found = kl_gradients()
    right = found["KL(π ‖ ref)"]
    other = found["KL(ref ‖ π)"]
    for name in ("k3 with its score term", "the same, off-policy", "k2"):
        yield Row(f"E[∇({name})] minus ∇KL(π ‖ ref)", "–", "0", exactly(found[name], right))
    yield Row("E[∇k3] minus ∇KL(ref ‖ π)", "–", "0", exactly(found["k3"], other))
    apart = (found["k3"] - right).norm() / right.norm()
    note = "the other divergence"
    yield Row("E[∇k3] from ∇KL(π ‖ ref)", "–", "–", percent(apart.item()), note)
    largest = found["k1"].abs().max().item()
    yield Row("E[∇k1]", "–", "0", "0" if largest < 1e-15 else f"{largest:.0e}")


TABLES = {
    "Advantages": conventions,
    "Lengths": lengths,
    "Expected gradients": gradients,
    "Distance from a reference": divergences,
}


def print_table(title: str, rows: list[Row]) -> bool:
    """Prints a table; returns whether no row failed."""
    print(f"{title}\n")
    cells = [["claim", "paper", "formula", "here", "verdict"]]
    cells += [[row.claim, row.paper, row.formula, row.here, row.verdict] for row in rows]
    print_cells(cells)
    return all(row.verdict != "FAILED" for row in rows)


def print_cells(cells: list[list[str]]) -> None:
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    for line in cells:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()


def print_recipes() -> None:
    """The released settings side by side, and what has no effect in them."""
    print("Released settings of Nemotron 3\n")
    columns = [settings(recipe) for recipe in RECIPES.values()]
    cells = [["setting", *RECIPES]]
    for name in columns[0]:
        cells.append([name, *(column[name] for column in columns)])
    print_cells(cells)
    for name, recipe in RECIPES.items():
        print(f"without effect in {name}: {recipe.inert}")
    print()


def flags() -> argparse.Namespace:
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    flags()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    print_recipes()
    good = [print_table(title, list(rows())) for title, rows in TABLES.items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
