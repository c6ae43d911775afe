# SPDX-License-Identifier: MIT-0
"""Chapter 12's tables: settings, conventions, exact gradients, verdicts."""

import grpo as gr
import grpo_tables as tables
import pytest
import torch
from proof import plant


def test_released_settings():
    """What the tables print is what the objective has; one of Super's stages has a penalty."""
    nano, rlvr, rlhf = (tables.settings(recipe) for recipe in tables.RECIPES.values())
    assert nano["prompts × responses"] == "128 × 16" and rlvr["importance weight"] == "token, cap 5"
    assert [x["KL"] for x in (nano, rlvr, rlhf)] == ["0", "0", "0.0001"]
    assert [x["overlong filter"] for x in (nano, rlvr, rlhf)] == ["on", "off", "off"]
    assert all("clip" in recipe.inert for recipe in tables.RECIPES.values())


def test_a_clip_without_effect():
    """On-policy the ratio is 1: no clip changes loss or gradient, as the recipes' notes say."""
    results = []
    for low, high in ((0.2, 0.28), (0.0, 0.0)):
        log_prob_BS = torch.linspace(-3, -1, 6, dtype=torch.float64)[None].requires_grad_()
        mask_BS = torch.ones(1, 6, dtype=torch.bool)
        A_BS = torch.tensor([[1.0, -1.0, 2.0, 0.5, -3.0, 1.0]]).double()
        old_BS = log_prob_BS.detach()
        loss = gr.grpo_loss(log_prob_BS, old_BS, A_BS, mask_BS, None, low, high)
        loss.backward()
        results.append((loss.item(), log_prob_BS.grad))
    assert results[0][0] == results[1][0]
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-14)


def test_the_factor_of_a_prompt():
    """E[1/std] by a binomial law equals the enumeration of answers with rewards 0 and 1."""
    answers = tables.Answers()
    logits = answers.logits(3)
    reward_Y = (torch.arange(9) % 3 == 0).double()
    chance_Y = answers.log_probs(logits).sum(dim=1).exp()
    rate = (chance_Y * reward_Y).sum().item()
    found = tables.factor(answers, logits, reward_Y, 4, eps=0.0)
    assert abs(found / tables.prompt_weight(rate, 4) - 1) < 1e-12
    assert round(tables.prompt_weight(0.5), 1) == 2.0
    assert round(tables.prompt_weight(1 / 16), 1) == 2.5


def test_probabilities_of_all_answers():
    for end in (False, True):
        answers = tables.Answers(end=end)
        assert len(answers.ids) == (7 if end else 9)
        chance_Y = answers.log_probs(answers.logits(5)).sum(dim=1).exp()
        assert abs(chance_Y.sum() - 1) < 1e-14


def test_verdicts():
    row = tables.Row
    assert row("", "1", "1", "1").verdict == "ok" and row("", "1", "2").verdict == "FAILED"
    assert row("", "1", "2", note="why").verdict == "why"
    assert row("", "1", "1", note="why").verdict == "FAILED"
    assert row("", "–", "1", note="why").verdict == "why"


def test_all_tables(capsys):
    with plant(tables.sys, "argv", ["grpo_tables.py"]):
        tables.main()
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and printed.count(" ok\n") >= 18


@pytest.mark.parametrize("name", ["grpo_loss", "grpo_advantages", "kl_penalty"])
def test_a_wrong_function_fails_the_tables(name):
    right = getattr(tables, name)

    def wrong(*args, **options):
        return 1.01 * right(*args, **options)

    with plant(tables, name, wrong):
        rows = [row for table in tables.TABLES.values() for row in table()]
    assert any(row.verdict == "FAILED" for row in rows)
