# SPDX-License-Identifier: MIT-0
"""Chapter 9's tables: formulas against sums, counts against formulas, verdicts."""

import math
from fractions import Fraction

import mtp_tables as tables
import pytest
import speculate as sp
import torch
from proof import plant


def test_expected_tokens():
    """Against the sum over outcomes, in fractions; both ends; the figure of speculate.py."""
    for n in range(8):
        for a in (Fraction(0), Fraction(1, 3), Fraction(9, 10)):
            assert tables.expected_tokens(a, n) == tables.enumerated_tokens(a, n)
        assert tables.expected_tokens(1, n) == n + 1
    assert round(tables.expected_tokens(0.7, 6), 2) == 3.06


def test_acceptance_for():
    for n in (1, 7):
        for a in (0.1, 0.735, 0.99):
            assert tables.acceptance_for(tables.expected_tokens(a, n), n) == pytest.approx(a)
    assert 0.73 < tables.acceptance_for(3.45, 7) < 0.74


def test_published_figures():
    assert round(tables.super_block(512) / 1e9, 2) == 2.94
    assert round(tables.super_block(22) / 1e9, 3) == 0.245
    assert round(tables.super_states(7) / 1e9, 1) == 1.3
    assert math.isclose(tables.mean_gain(), 0.0242, abs_tol=5e-5)


def test_counts():
    config = tables.HybridConfig()
    assert tables.small_block(config) == tables.counted_block(2) == tables.counted_block(1)
    model = sp.Decoder(config)
    for drafts in (0, 5):
        cache = sp.new_cache(model.layers)
        tokens = torch.zeros(1, drafts + 1, dtype=torch.int64)
        with torch.no_grad():
            model.trunk(tokens, cache.admit(drafts + 1, drafts))
        kept = sum(x.nbytes for state in cache.layers for x in state.ssm)
        assert tables.kept_states(config, drafts) == kept
    lengths = [1, 4, 2]
    for depth in range(5):
        expected = sum(tables.targets_left(length, depth) for length in lengths)
        assert tables.counted_targets(lengths, depth) == expected


def test_verdicts():
    assert tables.Row("", "1", "1").verdict == "ok"
    assert tables.Row("", "1", "2").verdict == "FAILED"
    assert tables.Row("", "1", "2", note="rounded").verdict == "rounded"
    assert tables.Row("", "1", "1", note="rounded").verdict == "FAILED"
    assert tables.Row("", "1").verdict == "FAILED"


def test_the_script(capsys):
    with plant(tables, "flags", lambda: None):
        tables.main()
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and "0.735" in printed and printed.count(" ok") > 10
