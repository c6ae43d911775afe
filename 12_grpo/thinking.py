# SPDX-License-Identifier: MIT-0
"""A thinking budget, what truncated traces teach, and a bonus for short responses.

Papers: Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444; Nemotron 3 Nano, 2025, arXiv 2512.20848

    python 12_grpo/thinking.py              2 local ranks
    python 12_grpo/thinking.py --tp 2       one policy on both

A model learns to think before it answers: of eight digits it writes the largest one so far, eight
times, and then the answer. It is then cut at budgets that it never saw, or has seen in 3 % of its
traces. A second task, the last digit of a sum, cannot be answered without all of its thoughts.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from grpo import (
    END,
    EQUALS,
    GPT,
    IGNORED,
    GPTConfig,
    Mesh,
    Response,
    Sequences,
    _all_reduce,
    _has_values,
    at_least_fp32,
    check_args,
    collate,
    config_from,
    dtypes,
    flag,
    launch,
    make_mesh,
    make_optimizer,
    parse_flags,
    print_claims,
    read_step,
    rollout,
    say,
    say_setting,
    train,
)
from torch import Tensor, nn

# ── 1 A budget ──────────────────────────────────────────────────────────────────────────────────
#
# A reasoning model thinks between two tags. To limit it, a server counts tokens after the start
# tag, and at the budget puts the end tag there. The answer follows from what has been thought so
# far.
#
#     prompt  <think>  t t t t t t t t │ </think>  answer                 │ the budget
#                                        forced: not sampled, no loss
#
# What goes wrong: a tag of several ids of which the model has just written the first (completed,
# and not begun again); the same ids elsewhere in the text; a prompt that opens the thought already,
# or opens and closes it, which switches thinking off; a grammar that forbids the forced id.
#
# Forced tokens were not sampled. With a loss they would teach the policy to stop at the budget, by
# whatever reward followed. The tokens after them are samples like all others.
#
# A model that has never seen a thought cut short does not know how to go on. Nano's fine-tuning
# cuts 3 % of the traces at a random place, and keeps the answer.


# region shared: thinking budget
class BudgetController:
    """Ends thinking at a budget: forces the ids of the end tag, one after another, in B rows.

        controller = BudgetController(start=(20,), end=(21,), budget=8, rows=B, device=device)
        controller.read(prompts_BQ)                  the prompts may open a thought, or close it
        for each new token:
            sampled_B = ... from the logits
            tokens_B, is_forced_B = controller(sampled_B)

    Args:
        start, end: token ids of the two tags, one or several each. They count as no thought. The
            first ids of an end tag do until it is complete, since they may be another word.
        budget: so many tokens of thought in each row, or one number a row, int64 (B,). None: no
            limit. A thought begins anew, with a new count, after each start tag outside a thought.
        rows: B. device: of all tensors here; None: the CPU.

    Methods: `read`, `observe`, `forced`, and the call. State: is_thinking_B, thought_B (tokens
        since the start tag). A forced token is no sample: give it no loss. It is forced whatever
        the logits say, so call the controller after every other mask.
    No value is read on the host. Each row is by itself; on tensor-parallel ranks all rows agree.
    Raises: ValueError for an empty tag, a negative id, a negative budget (in a tensor on a GPU it
        counts as 0), another shape or dtype.
    Source: Nemotron Nano 2 (2025), budget control; as a logits processor in vLLM and TensorRT-LLM.
    """

    def __init__(
        self,
        start: Sequence[int],
        end: Sequence[int],
        budget: int | Tensor | None,
        rows: int,
        device: torch.device | None = None,
    ):
        is_tag = bool(start) and bool(end) and min(*start, *end) >= 0
        is_number = isinstance(budget, int) and budget >= 0
        is_row_each = False
        if isinstance(budget, Tensor):
            is_row_each = budget.shape == (rows,) and budget.dtype == torch.int64
            if _has_values(budget):
                is_row_each &= not (budget < 0).any()
        if not is_tag or not (budget is None or is_number or is_row_each):
            found = f"start={start}, end={end}, budget={budget}, rows={rows}"
            raise ValueError(f"{found}: tags need ids >= 0, a budget is >= 0, or one int64 a row")
        self.start = torch.tensor(start, device=device)
        self.end = torch.tensor(end, device=device)
        self.budget = budget
        kept = max(len(start), len(end))
        self.recent_BK = torch.full((rows, kept), -1, device=device)  # the last K ids; -1: none
        self.is_thinking_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.thought_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def __call__(self, sampled_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled ids to the ids that the rows go on with, and which of them were forced."""
        forced_B = self.forced()
        is_forced_B = forced_B >= 0
        tokens_B = torch.where(is_forced_B, forced_B, sampled_B)
        self.observe(tokens_B)
        return tokens_B, is_forced_B

    def forced(self) -> Tensor:
        """The id that each row must go on with, int64 (B,); -1: any id. It changes no state."""
        if self.budget is None:
            return torch.full_like(self.thought_B, -1)
        is_over_B = self.is_thinking_B & (self.thought_B >= self.budget)
        next_B = self._matched(self.end).clamp(max=len(self.end) - 1)
        return torch.where(is_over_B, self.end[next_B], -1)

    def read(self, tokens_BS: Tensor) -> None:
        """Tokens that stand there already: a prompt. Padding belongs on its left."""
        for tokens_B in tokens_BS.unbind(dim=1):
            self.observe(tokens_B)

    def observe(self, tokens_B: Tensor) -> None:
        """One more token of each row, sampled or forced."""
        if tokens_B.shape != self.thought_B.shape:
            raise ValueError(f"{tuple(tokens_B.shape)} tokens for {len(self.thought_B)} rows")
        self.recent_BK = torch.cat([self.recent_BK[:, 1:], tokens_B[:, None]], dim=1)
        was_thinking_B = self.is_thinking_B
        closes_B = was_thinking_B & (self._matched(self.end) == len(self.end))
        opens_B = ~was_thinking_B & (self._matched(self.start) == len(self.start))
        self.is_thinking_B = (was_thinking_B | opens_B) & ~closes_B
        self.thought_B = torch.where(was_thinking_B & ~closes_B, self.thought_B + 1, 0)
        # Ids of one tag must not be taken for the beginning of the next one.
        self.recent_BK = torch.where((opens_B | closes_B)[:, None], -1, self.recent_BK)

    def _matched(self, tag: Tensor) -> Tensor:
        # With how many ids of the tag's beginning a row ends: the others are still to come, so a
        # tag that the model has begun is completed, and not begun a second time.
        size_B = torch.zeros_like(self.thought_B)
        for size in range(1, len(tag) + 1):
            is_equal_B = (self.recent_BK[:, -size:] == tag[:size]).all(dim=1)
            size_B = torch.where(is_equal_B, size, size_B)
        return size_B


# endregion


# ── 2 Length control ────────────────────────────────────────────────────────────────────────────
#
# Where rewards are equal, the shorter response is the better one. A bonus for it must sum to zero
# in each group: otherwise it is a reward for the mere number of tokens. Super adds half of it for
# the thought and half for the answer to the reward, before advantages are taken:
#
#     lengths    100     300     500      900
#     bonus      0.4375  0.1875  -0.0625  -0.5625


def length_bonus(lengths_R: Tensor, group_size: int) -> Tensor:
    """1 for the shortest of a group, 0 for the longest, minus the group's mean: bonus_R.

    Equal lengths give exactly 0. Raises: ValueError for a torn group.
    Source: Nemotron 3 Super, length control; the formula as others have implemented it.
    """
    if len(lengths_R) % group_size:
        raise ValueError(f"{len(lengths_R)} lengths are no complete groups of {group_size}")
    lengths_PG = at_least_fp32(lengths_R).view(-1, group_size)
    least_P1 = lengths_PG.amin(dim=-1, keepdim=True)
    span_P1 = lengths_PG.amax(dim=-1, keepdim=True) - least_P1
    bonus_PG = 1 - (lengths_PG - least_P1) / span_P1  # 0 / 0, NaN, where all are equal
    centred_PG = bonus_PG - bonus_PG.mean(dim=-1, keepdim=True)
    return torch.where(span_P1 > 0, centred_PG, 0).flatten()


# ── 3 Traces ────────────────────────────────────────────────────────────────────────────────────

THINK = 12  # opens a thought
ANSWER = 13  # closes it
STEPS = 300
THOUGHTS = 8  # of a trace: one for each digit
BUDGETS = (0, 2, 4, 6, None)  # tokens of thought; None: no limit
FIRST = "largest digit"  # can be answered without its thoughts
SECOND = "last digit of the sum"  # cannot


def largest(digits: list[int]) -> list[int]:
    """Running maxima. The last one is the answer."""
    return [max(digits[:size]) for size in range(1, len(digits) + 1)]


def sums(digits: list[int]) -> list[int]:
    """Last digits of running sums. The last one is the answer."""
    return [sum(digits[:size]) % 10 for size in range(1, len(digits) + 1)]


TASKS = {FIRST: largest, SECOND: sums}
RUNS = ((FIRST, 0.0), (FIRST, 0.03), (SECOND, 0.03))  # tasks, and the share of cut traces


def problem(task: Callable, rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt that opens the thought, and all thoughts."""
    digits = rng.choices(range(10), k=THOUGHTS)
    return [*digits, EQUALS, THINK], task(digits)


def trace(task: Callable, share: float, rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt and its response; a `share` of the thoughts is cut, with the answer kept.

    Source: Nemotron 3 Nano, post-training.
    """
    prompt, thoughts = problem(task, rng)
    answer = thoughts[-1]
    if rng.random() < share:
        thoughts = thoughts[: rng.randrange(len(thoughts))]
    return prompt, [*thoughts, ANSWER, answer, END]


def answer_of(response: Response) -> int | None:
    """The digit between the end tag and the end token; None where the response has another form."""
    tokens = response.tokens
    if len(tokens) < 3 or tokens[-1] != END or tokens[-3] != ANSWER:
        return None
    answer = tokens[-2]
    is_formed = all(token < 10 for token in [*tokens[:-3], answer])
    return answer if is_formed else None


def sft_objective(model: nn.Module, batch: Sequences) -> tuple[Tensor, Tensor]:
    """−log π of all response tokens, summed, and their count: two scalars. As in chapter 11."""
    return -model.log_probs(batch).sum(), (batch.targets_BS != IGNORED).sum()


def learn(
    task: Callable, share: float, args: argparse.Namespace, mesh: Mesh, device: torch.device
) -> GPT:
    """A policy that has learned from traces."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    policy = GPT(config, mesh.tp_group).to(device, dtype)

    def batches():
        for step in range(args.steps):
            rng = random.Random(repr((args.seed, mesh.dp_rank, share, step)))
            examples = [trace(task, share, rng) for _ in range(args.batch)]
            yield [collate(examples).to(device)]

    optimizer = make_optimizer(policy, args.lr)
    results = train(policy, optimizer, batches(), sft_objective, mesh, autocast=autocast)
    for step, (loss, norm) in enumerate(results):
        read_step(step, loss, norm)
    return policy


def measure(
    policy: GPT, task: Callable, budget: int | None, mesh: Mesh, device: torch.device
) -> tuple[float, float]:
    """Shares of responses with an answer, and with the right one. Collective."""
    rng = random.Random(repr((mesh.dp_rank, "evaluation")))
    problems = [problem(task, rng) for _ in range(128)]
    prompts = [prompt for prompt, _ in problems]
    controller = BudgetController((THINK,), (ANSWER,), budget, len(prompts), device)
    responses = rollout(policy, prompts, 1, THOUGHTS + 4, END, None, controller)
    answers = [answer_of(response) for response in responses]
    formed = sum(answer is not None for answer in answers)
    right = sum(answer == thoughts[-1] for answer, (_, thoughts) in zip(answers, problems))
    totals_3 = torch.tensor([float(formed), right, len(answers)]).to(device)
    formed, right, count = _all_reduce(totals_3, mesh.dp_group).tolist()
    return formed / count, right / count


def claims(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """The table, and what it shows: (claim, paper, here, verdict)."""
    say("task                    cut traces  budget  with an answer   right")
    found = {}
    for name, share in RUNS:
        policy = learn(TASKS[name], share, args, mesh, device)
        for budget in BUDGETS:
            formed, right = measure(policy, TASKS[name], budget, mesh, device)
            limit = "none" if budget is None else budget
            say(f"{name:24}{share:10.0%}{limit:>8}{formed:16.0%}{right:8.0%}")
            found[name, share, budget] = (formed, right)
    say()
    short = None if args.steps >= STEPS else "a short run"
    cut = BUDGETS[:-1]
    never = max(found[FIRST, 0.0, budget][0] for budget in cut)
    few = min(found[FIRST, 0.03, budget][0] for budget in cut)
    right = found[FIRST, 0.03, 2][1]
    chance = found[SECOND, 0.03, 2][1]
    uncut = found[SECOND, 0.03, None][1]
    rows = [
        ("without a budget, sum: right", "–", uncut, uncut > 0.9),
        ("cut, no cut trace seen: with an answer", "–", never, never < 0.2),
        ("cut, 3 % of traces cut: with an answer", "works", few, few > 0.8),
        ("the same, largest digit, 2 thoughts: right", "–", right, right > 0.5),
        ("the same, sum, 2 thoughts: right", "–", chance, chance < 0.3),
    ]
    return [(claim, paper, f"{x:.0%}", short or good) for claim, paper, x, good in rows]


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args, f", tp {args.tp}")
    if not print_claims(claims(args, make_mesh(args.tp, device, args.timeout), device)):
        sys.exit(1)


@dataclass
class ThinkingOptions(GPTConfig):
    """The flags of this script."""

    tp: int = flag(1, "ranks that share one copy of the policy", least=1)
    batch: int = flag(32, "traces of a step, per replica", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where flags and ranks do not fit."""
    if args.check:
        raise ValueError("--check belongs to grpo.py: run it there")
    check_args(args)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [ThinkingOptions], check_flags, ranks=2, steps=STEPS)


if __name__ == "__main__":
    launch(main, flags())
