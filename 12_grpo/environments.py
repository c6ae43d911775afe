# SPDX-License-Identifier: MIT-0
"""Several environments in each batch at a fixed ratio, and a curriculum by pass rate.

Paper: Nemotron 3 Nano, NVIDIA, 2025, arXiv 2512.20848, post-training

    python 12_grpo/environments.py              2 local ranks
    python 12_grpo/environments.py --tp 2       one policy on both

A policy learns to sort two to four digits, and to reverse them, in the same batches. The problems
are fixed. Their pass rates are measured before each stage; solved ones are dropped, and the others
are drawn around a target that moves from easy to hard. All pass rates are of these problems.
"""

from __future__ import annotations

import argparse
import random
import sys
import zlib
from dataclasses import dataclass

import torch
from grpo import (
    END,
    EQUALS,
    GPT,
    Environment,
    GPTConfig,
    GRPOObjective,
    Mesh,
    Options,
    Response,
    RolloutBatch,
    _all_reduce,
    _has_values,
    at_least_fp32,
    check_args,
    config_from,
    dtypes,
    flag,
    grpo_advantages,
    launch,
    make_mesh,
    make_optimizer,
    parse_flags,
    print_claims,
    read_step,
    rollout,
    rollout_batch,
    say,
    say_setting,
    train,
)
from torch import Tensor

# ── 1 A fixed ratio ─────────────────────────────────────────────────────────────────────────────
#
# Nano trains on mathematics, code, JSON, instructions and tools at once: trained one after another,
# each would undo the one before. The ratio is exact in each batch, and not on average, so no step
# has a gradient of one task alone.


def counts_at_ratio(ratio: dict[str, int], prompts: int) -> dict[str, int]:
    """How many of the prompts each environment gets.

    Raises: ValueError where the ratio does not divide them. Source: Nemotron 3 Nano, post-training.
    """
    parts = sum(ratio.values())
    if parts < 1 or min(ratio.values()) < 0 or prompts % parts:
        raise ValueError(f"{prompts} prompts at {ratio}: take a multiple of {parts}")
    return {name: prompts * part // parts for name, part in ratio.items()}


# ── 2 A curriculum ──────────────────────────────────────────────────────────────────────────────
#
# Prompts that are always solved give groups without variance, and so do hopeless ones. The policy
# measures a pass rate for each prompt. Those with 1 are dropped. The others are drawn by a Gaussian
# in the pass rate, whose mean moves from easy to hard over the run.


def curriculum_weights(
    pass_rates_P: Tensor, progress: float, easy: float = 0.8, hard: float = 0.2, width: float = 0.15
) -> Tensor:
    """How likely each prompt is drawn, probability_P; 0 where the pass rate is 1.

    Args: progress: from 0 to 1 over the run; the mean pass rate moves from `easy` to `hard`.
    Raises: ValueError for another progress, for a pass rate of NaN (on a GPU it counts as solved),
        or where each prompt is solved already (on a GPU all weights are NaN then).
    Source: Nemotron 3 Nano, post-training; the width is ours.
    """
    is_open_P = pass_rates_P < 1
    is_wrong = False
    if _has_values(is_open_P):
        is_wrong = pass_rates_P.isnan().any() or not is_open_P.any()
    if not 0 <= progress <= 1 or is_wrong:
        found = f"progress={progress}, {len(pass_rates_P)} prompts"
        raise ValueError(f"{found}: from 0 to 1, pass rates not NaN, and not all solved")
    mean = easy + (hard - easy) * progress
    distance_P = (at_least_fp32(pass_rates_P) - mean) / width
    # A softmax, and not exp: prompts far from the mean must not all underflow to 0.
    logit_P = torch.where(is_open_P, -distance_P.square() / 2, -torch.inf)
    return logit_P.softmax(dim=0)


# ── 3 Two environments ──────────────────────────────────────────────────────────────────────────

REVERSE = 14  # in the place of EQUALS
STEPS = 200
STAGES = 4
POOL = 64  # problems of each environment, per replica
RATIO = {"sort": 3, "reverse": 1}


class Sort(Environment):
    """Two to four digits, to be sorted; the reward is the share of right places."""

    sign = EQUALS

    def prompt(self, rng: random.Random) -> list[int]:
        return [*rng.choices(range(10), k=rng.randint(2, 4)), self.sign]

    def solution(self, digits: list[int]) -> list[int]:
        return sorted(digits)

    def reward(self, prompt: list[int], response: list[int]) -> float:
        right = [*self.solution(prompt[:-1]), END]
        hits = sum(a == b for a, b in zip(right, response))
        return hits / max(len(right), len(response))


class Reverse(Sort):
    """The same digits in reverse order."""

    sign = REVERSE

    def solution(self, digits: list[int]) -> list[int]:
        return digits[::-1]


ENVIRONMENTS = {"sort": Sort(), "reverse": Reverse()}


@dataclass
class Course:
    """A policy that learns in several environments, on this rank's replica."""

    args: argparse.Namespace
    mesh: Mesh
    device: torch.device
    policy: GPT

    def __post_init__(self):
        rng = random.Random(repr((self.args.seed, self.mesh.dp_rank, "pool")))
        self.pools = {}
        self.weights = {}
        for name, environment in ENVIRONMENTS.items():
            self.pools[name] = [environment.prompt(rng) for _ in range(POOL)]

    def respond(self, prompts: list[list[int]], group_size: int, place: str) -> list[Response]:
        name = repr((self.args.seed, self.mesh.dp_rank, place))  # equal on a replica's tp ranks
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return rollout(self.policy, prompts, group_size, 6, END, generator)

    def pass_rates(self, name: str, place: str) -> Tensor:
        """Of each problem of a pool: the share of exact responses, rate_P."""
        G = self.args.group_size
        responses = self.respond(self.pools[name], G, f"{name} {place}")
        verify = ENVIRONMENTS[name].reward
        exact = [verify(x.prompt, x.tokens) == 1 for x in responses]
        return torch.tensor(exact).double().view(POOL, G).mean(dim=1)

    def begin(self, stage: int) -> dict[str, float]:
        """Measures pass rates, and weighs the problems by them. Returns their means. Collective."""
        means = {}
        for name in ENVIRONMENTS:
            rate_P = self.pass_rates(name, f"stage {stage}")
            self.weights[name] = torch.ones(POOL, dtype=torch.float64)
            if (rate_P < 1).any():
                self.weights[name] = curriculum_weights(rate_P, stage / (STAGES - 1))
            total = _all_reduce(rate_P.mean().to(self.device), self.mesh.dp_group)
            means[name] = total.item() / self.mesh.dp
        return means

    def batch(self, step: int) -> RolloutBatch:
        """Prompts of all environments at their ratio, sampled, scored, and compared in groups."""
        rng = random.Random(repr((self.args.seed, self.mesh.dp_rank, step)))
        chosen = []
        for name, count in counts_at_ratio(RATIO, self.args.prompts).items():
            drawn = rng.choices(self.pools[name], self.weights[name].tolist(), k=count)
            chosen += [(name, prompt) for prompt in drawn]
        rng.shuffle(chosen)
        G = self.args.group_size
        responses = self.respond([prompt for _, prompt in chosen], G, f"step {step}")
        rewards = []
        for index, x in enumerate(responses):
            name, _ = chosen[index // G]
            rewards.append(ENVIRONMENTS[name].reward(x.prompt, x.tokens))
        advantage_R = grpo_advantages(torch.tensor(rewards), G)
        return rollout_batch(responses, advantage_R.to(dtypes(self.args)[0]), self.device)

    def batches(self):
        """For each step a list of one batch; pass rates are measured where a stage begins."""
        length = max(1, self.args.steps // STAGES)
        for step in range(self.args.steps):
            if step % length == 0 and step // length < STAGES:
                means = self.begin(step // length)
                rates = "".join(f"{means[name]:10.0%}" for name in ENVIRONMENTS)
                say(f"{step:4}{rates}")
            yield [self.batch(step)]


def claims(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """What the course has measured: (claim, paper, here, verdict)."""
    dtype, autocast = dtypes(args)
    policy = GPT(config_from(args, GPTConfig, seed=args.seed), mesh.tp_group).to(device, dtype)
    course = Course(args, mesh, device, policy)
    say("step" + "".join(f"{name:>10}" for name in ENVIRONMENTS) + "    exact, sampled")
    optimizer = make_optimizer(policy, args.lr)
    objective = GRPOObjective(weight_cap=5.0, error_limit=2.0)
    results = train(policy, optimizer, course.batches(), objective, mesh, autocast=autocast)
    for step, (loss, norm) in enumerate(results):
        read_step(step, loss, norm)
    after = course.begin(STAGES - 1)
    say("end " + "".join(f"{rate:10.0%}" for rate in after.values()) + "\n")
    short = None if args.steps >= STEPS else "a short run"
    counts = counts_at_ratio(RATIO, args.prompts)
    here = ", ".join(f"{name} {count}" for name, count in counts.items())
    found = [("prompts of a step, per replica", "a fixed ratio", here, True)]
    for name, rate in after.items():
        found.append((f"{name}: exact responses", "rises", f"{rate:.0%}", short or rate > 0.05))
    return found


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f", tp {args.tp}")
    if not print_claims(claims(args, make_mesh(args.tp, device, args.timeout), device)):
        sys.exit(1)


@dataclass
class CourseOptions(Options):
    """The flags of this script."""

    prompts: int = flag(16, "prompts of a step, per replica: a multiple of 4", least=4)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where flags and ranks do not fit."""
    if args.check or args.age:
        raise ValueError("--check and --age belong to grpo.py: use them there")
    counts_at_ratio(RATIO, args.prompts)
    check_args(args)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [CourseOptions], check_flags, ranks=2, steps=STEPS)


if __name__ == "__main__":
    launch(main, flags())
