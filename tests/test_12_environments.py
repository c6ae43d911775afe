# SPDX-License-Identifier: MIT-0
"""Several environments at a fixed ratio, and the curriculum."""

import random

import environments as en
import pytest
import ranks
import scripts
import torch


def test_a_fixed_ratio():
    assert en.counts_at_ratio({"a": 3, "b": 1}, 16) == {"a": 12, "b": 4}
    assert en.counts_at_ratio({"a": 1, "b": 0}, 5) == {"a": 5, "b": 0}
    for ratio, prompts in (({"a": 3, "b": 1}, 10), ({"a": 0}, 4), ({"a": 2, "b": -1}, 4)):
        with pytest.raises(ValueError, match=f"{prompts} prompts at"):
            en.counts_at_ratio(ratio, prompts)


def test_curriculum():
    """A Gaussian in the pass rate, written out; solved prompts are never drawn."""
    rate_P = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.8], dtype=torch.float64)
    for progress, mean in ((0.0, 0.8), (0.5, 0.5), (1.0, 0.2)):
        found = en.curriculum_weights(rate_P, progress)
        right = torch.exp(-((rate_P - mean) ** 2) / (2 * 0.15**2))
        right[4] = 0
        assert (found - right / right.sum()).abs().max() < 1e-12
        assert found[4] == 0 and abs(found.sum() - 1) < 1e-12
    assert en.curriculum_weights(rate_P, 0.0).argmax() == 5
    assert en.curriculum_weights(rate_P, 1.0).argmax() == 1
    far = en.curriculum_weights(torch.zeros(3, dtype=torch.float64), 0.0, width=0.001)
    assert torch.allclose(far, torch.full((3,), 1 / 3, dtype=torch.float64))
    for progress in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"progress={progress}, 6 prompts"):
            en.curriculum_weights(rate_P, progress)
    for wrong in ([1.0, 1.0], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="pass rates not NaN, and not all solved"):
            en.curriculum_weights(torch.tensor(wrong), 0.5)


def test_environments():
    rng = random.Random(0)
    for name, right in (("sort", sorted), ("reverse", lambda digits: digits[::-1])):
        environment = en.ENVIRONMENTS[name]
        lengths = set()
        for _ in range(40):
            prompt = environment.prompt(rng)
            solution = [*right(prompt[:-1]), en.END]
            lengths.add(len(prompt) - 1)
            assert environment.reward(prompt, solution) == 1
            assert environment.reward(prompt, [*solution, 1]) < 1
            assert environment.reward(prompt, [12] * 3) == 0
        assert lengths == {2, 3, 4}
    assert en.Sort.sign != en.Reverse.sign


@pytest.mark.ranks(2)
def test_a_short_run_on_two_ranks():
    """Both layouts; each batch has the ratio, and prompts are drawn by their weights."""
    for tp in (1, 2):
        code, printed = scripts.on_ranks(en, "--tp", tp, "--steps", 5, "--prompts", 4)
        assert code == 0 and "FAILED" not in printed
        assert "sort 3, reverse 1" in printed and printed.count("a short run") == 2
    assert ranks.device.type in ("cpu", "cuda")
