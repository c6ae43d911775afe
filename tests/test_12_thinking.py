# SPDX-License-Identifier: MIT-0
"""A thinking budget: tags, traps, forced tokens; the bonus for short responses."""

import itertools
import random

import grpo as gr
import pytest
import ranks
import scripts
import thinking as th
import torch
import torch.distributed as dist
from proof import Shows, plant
from thinking import BudgetController


def by_loops(start, end, budget, prompt, sampled):
    """One row, token by token, with lists: what it goes on with, and what was forced."""
    tokens, forced = [], []
    thought = None  # None: not thinking; else the tokens since the start tag
    recent = []

    def observe(token):
        nonlocal thought, recent
        recent.append(token)
        if thought is None:
            if recent[-len(start) :] == list(start):
                thought, recent = [], []
        else:
            thought.append(token)
            if recent[-len(end) :] == list(end):
                thought, recent = None, []

    for token in prompt:
        observe(token)
    for token in sampled:
        is_over = thought is not None and budget is not None and len(thought) >= budget
        if is_over:
            begun = max(n for n in range(len(end)) if thought[len(thought) - n :] == list(end[:n]))
            token = end[begun]
        observe(token)
        tokens.append(token)
        forced.append(is_over)
    return tokens, forced


@pytest.mark.parametrize(
    "start, end", [((1,), (2,)), ((1, 2), (3, 4)), ((1,), (2, 2, 3)), ((1, 1), (1, 2))]
)
def test_every_row_is_that_of_a_loop(start, end):
    """Random tokens of a small vocabulary, so that tags, parts of tags and both occur."""
    rng = random.Random(0)
    rows, length = 60, 14
    budgets = [rng.randrange(6) for _ in range(rows)]
    prompts = [rng.choices(range(5), k=4) for _ in range(rows)]
    sampled = [rng.choices(range(5), k=length) for _ in range(rows)]
    limit = torch.tensor(budgets, device=ranks.device)
    controller = BudgetController(start, end, limit, rows, ranks.device)
    controller.read(torch.tensor(prompts, device=ranks.device))
    columns = []
    for column in zip(*sampled):
        columns.append(controller(torch.tensor(column, device=ranks.device)))
    tokens_BS, is_forced_BS = (torch.stack(x, dim=1).tolist() for x in zip(*columns))
    for row in range(rows):
        expected = by_loops(start, end, budgets[row], prompts[row], sampled[row])
        assert (tokens_BS[row], is_forced_BS[row]) == expected
    assert sum(map(sum, is_forced_BS)) > 30


def run_of(prompt, sampled, budget, start=(1, 2), end=(3, 4)):
    controller = BudgetController(start, end, budget, 1)
    controller.read(torch.tensor([prompt]))
    steps = [controller(torch.tensor([token])) for token in sampled]
    return [t.item() for t, _ in steps], [f.item() for _, f in steps]


def test_traps():
    """Each of the cases that servers got wrong."""
    # The prompt opens the thought; the tag has two ids, both forced.
    assert run_of([9, 1, 2], [7, 7, 7, 7, 7], 2) == (
        [7, 7, 3, 4, 7],
        [False, False, True, True, False],
    )
    # The model has begun the tag at the budget: it is completed, and not begun a second time.
    assert run_of([1, 2], [7, 3, 7, 7], 2) == ([7, 3, 4, 7], [False, False, True, False])
    # It closed the thought by itself, in time.
    assert run_of([1, 2], [3, 4, 7, 7], 3) == ([3, 4, 7, 7], [False] * 4)
    # Thinking is switched off by the prompt.
    assert run_of([1, 2, 3, 4], [7, 7, 7], 0) == ([7, 7, 7], [False] * 3)
    # Ids of the tags elsewhere: no thought, nothing forced.
    assert run_of([4, 3, 2], [3, 4, 2, 1, 7], 0) == ([3, 4, 2, 1, 7], [False] * 5)
    # A second thought has a count of its own; no budget is no limit; a budget of 0.
    assert run_of([1, 2], [7, 7, 7, 1, 2, 7, 7], 1)[0] == [7, 3, 4, 1, 2, 7, 3]
    assert run_of([1, 2], [7] * 9, None) == ([7] * 9, [False] * 9)
    assert run_of([1, 2], [7, 7, 7], 0)[0] == [3, 4, 7]


def test_state_and_shapes():
    controller = BudgetController((1,), (2,), torch.tensor([0, 3]), 2)
    controller.observe(torch.tensor([1, 1]))
    assert controller.is_thinking_B.tolist() == [True, True]
    assert controller.forced().tolist() == controller.forced().tolist() == [2, -1]
    controller.observe(torch.tensor([2, 5]))
    assert controller.is_thinking_B.tolist() == [False, True]
    assert controller.thought_B.tolist() == [0, 1]
    cases = ((), (1,), 3, 2), ((1,), (), 3, 2), ((1,), (-1,), 3, 2), ((1,), (2,), -1, 2)
    budgets = [torch.tensor(x) for x in ([1, 2, 3], [-1, 3], [2.5, 3.0], [True, False])]
    for case in (*cases, *(((1,), (2,), budget, 2) for budget in (*budgets, 2.5))):
        with pytest.raises(ValueError, match="tags need ids >= 0, a budget is >= 0"):
            BudgetController(*case)
    with pytest.raises(ValueError, match=r"\(3,\) tokens for 2 rows"):
        controller.observe(torch.tensor([1, 2, 3]))


@pytest.mark.planted_bug(
    symptom="the end tag is begun again where the model had begun it: half a tag stays in the text",
    seen_in="https://github.com/NVIDIA/TensorRT-LLM/issues/18616",
)
def test_a_doubled_end_tag():
    class Doubled(BudgetController):
        """Counts the ids that it has forced, and not those that stand there."""

        sent = 0

        def forced(self):
            is_over_B = self.is_thinking_B & (self.thought_B >= self.budget)
            next_id = self.end[min(self.sent, len(self.end) - 1)]
            self.sent += int(is_over_B)
            return torch.where(is_over_B, next_id, -1)

    found = []
    for kind in (BudgetController, Doubled):
        controller = kind((1, 2), (3, 4), 2, 1)
        controller.read(torch.tensor([[1, 2]]))
        found.append([controller(torch.tensor([token]))[0].item() for token in (7, 3, 7, 7)])
    assert found == [[7, 3, 4, 7], [7, 3, 3, 4]]
    return Shows("right: no loss sees it", "right; the text has 3 3 4")


@pytest.mark.planted_bug(
    symptom="the prompt is not read: a thought that it opens has no limit", seen_in=None
)
def test_a_prompt_that_is_not_read():
    with plant(BudgetController, "read", lambda self, tokens_BS: None):
        tokens, forced = run_of([1, 2], [7] * 6, 2)
    assert tokens == [7] * 6 and not any(forced)
    assert run_of([1, 2], [7] * 6, 2)[0] == [7, 7, 3, 4, 7, 7]
    return Shows("right: no loss sees it", "right; thoughts have no end")


@pytest.mark.ranks(1, 2)
def test_rollouts_with_a_budget():
    """Forced ids are in the responses and carry no loss; every tp draws the same."""
    config = gr.GPTConfig(hidden_size=32)
    found = []
    for group in (gr.make_mesh(1, ranks.device).tp_group, None):
        net = gr.GPT(config, group).to(ranks.device, torch.float64)
        prompts = [[5, 3, gr.EQUALS, th.THINK], [7, gr.EQUALS, th.THINK]]
        controller = BudgetController((th.THINK,), (th.ANSWER, 15), 3, 4, ranks.device)
        generator = torch.Generator(ranks.device).manual_seed(1)
        found.append(gr.rollout(net, prompts, 2, 8, gr.END, generator, controller))
    assert [x.tokens for x in found[0]] == [x.tokens for x in found[1]]
    cut = [x for x in found[0] if len(x.tokens) >= 5]
    assert cut
    for x in cut:
        if th.ANSWER not in x.tokens[:3]:
            assert x.tokens[3:5] == [th.ANSWER, 15] and x.is_forced[:5] == [False] * 3 + [True] * 2
    batch = gr.rollout_batch(found[0], torch.ones(4).double(), ranks.device)
    forced = sum(sum(x.is_forced) for x in found[0])
    total = sum(len(x.tokens) for x in found[0])
    assert (batch.sequences.targets_BS != -100).sum() == total - forced and forced > 0


def test_padding_is_no_part_of_a_tag():
    """Token id 0 opens a thought; the padding of shorter prompts does not."""
    net = gr.GPT(gr.GPTConfig(hidden_size=32))
    controller = BudgetController((0,), (th.ANSWER,), 1, 3)
    prompts = [[5, 3, gr.EQUALS], [7], [4, 0]]
    found = gr.rollout(net, prompts, 1, 4, 99, torch.Generator().manual_seed(1), controller)
    assert not any(found[0].is_forced[:2]) and not any(found[1].is_forced[:2])
    assert found[2].is_forced[:2] == [False, True] and found[2].tokens[1] == th.ANSWER


def test_length_bonus():
    """By hand; zero-sum; exactly 0 for equal lengths; groups by themselves."""
    found = th.length_bonus(torch.tensor([100, 300, 500, 900, 5, 5, 5, 5]), 4)
    assert found.tolist() == [0.4375, 0.1875, -0.0625, -0.5625, 0, 0, 0, 0]
    found = th.length_bonus(torch.tensor([0.1, 0.3, 0.5, 0.9]), 4)  # in thousands
    assert (found - torch.tensor([0.4375, 0.1875, -0.0625, -0.5625])).abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (24,), generator=generator).double()
    sums = th.length_bonus(lengths, 6).view(4, 6).sum(dim=1)
    assert sums.abs().max() < 1e-12
    with pytest.raises(ValueError, match="5 lengths are no complete groups of 2"):
        th.length_bonus(torch.ones(5), 2)


@pytest.mark.planted_bug(
    symptom="the bonus is not centred: groups of equal rewards are rewarded for being short at all",
    seen_in=None,
)
def test_a_bonus_that_is_not_centred():
    lengths = torch.tensor([100.0, 300, 500, 900])
    right = th.length_bonus(lengths, 4)
    wrong = 1 - (lengths - 100) / 800
    found = [gr.grpo_advantages(x, 4, deviation="none") for x in (right, wrong)]
    assert (found[0] - found[1]).abs().max() < 1e-6  # the baseline hides it
    assert wrong.mean() == 0.5625 and right.sum() == 0
    return Shows("mean reward off by 0.56", "right: the baseline takes it away again")


def test_traces():
    """Full and cut ones, and answers read back."""
    rng = random.Random(0)
    prompt, response = th.trace(th.largest, 0.0, rng)
    digits = prompt[:-2]
    assert prompt[-2:] == [gr.EQUALS, th.THINK] and len(digits) == 8
    thoughts = list(itertools.accumulate(digits, max))
    assert response == [*thoughts, th.ANSWER, max(digits), gr.END]
    cut = [th.trace(th.sums, 1.0, rng) for _ in range(50)]
    assert {len(tokens) for _, tokens in cut} == set(range(3, 11))
    for prompt, tokens in cut:
        assert tokens[-2] == sum(prompt[:-2]) % 10
    for tokens, answer in (
        ([1, 2, th.ANSWER, 7, gr.END], 7),
        ([th.ANSWER, 0, gr.END], 0),
        ([1, 2, 7, gr.END], None),
        ([1, th.ANSWER, 7], None),
        ([th.ANSWER, 3, th.ANSWER, 7, gr.END], None),
        ([th.ANSWER, th.ANSWER, gr.END], None),
        ([gr.END], None),
    ):
        x = gr.Response([1], tokens, [0.0] * len(tokens), [False] * len(tokens), True)
        assert th.answer_of(x) == answer


@pytest.mark.ranks(2)
def test_a_short_run_on_two_ranks():
    for tp in (1, 2):
        code, printed = scripts.on_ranks(th, "--tp", tp, "--steps", 2, "--batch", 2)
        assert code == 0 and "FAILED" not in printed
        assert printed.count("a short run") == 5
    assert dist.get_world_size() == 2
