# SPDX-License-Identifier: MIT-0
"""Chapter 11's tables: parameters, MFU, days, memory, verdicts."""

import preference as pf
import preference_tables as tables
import pytest
from proof import plant


def test_parameters_written_out():
    """48 layers of numbers by hand, and the model's own count."""
    H = 6144
    attention = H * 48 * 128 + 2 * H * 8 * 128 + 48 * 128 * H
    layer = attention + 2 * H * 4 * H + 4 * H
    assert tables.other_parameters(tables.NEMOTRON_15B) == 32 * layer + 2 * H
    for config in (tables.NEMOTRON_15B, tables.NEMOTRON_340B):
        expected = (tables.embedding_parameters(config), tables.other_parameters(config))
        assert tables.counted(config) == expected
    assert tables.NEMOTRON_340B.head_size == 192 and tables.NEMOTRON_340B.rotary_size == 96
    assert round(tables.other_parameters(tables.NEMOTRON_340B) / 1e9, 3) == 331.592


def test_speed_and_memory():
    _, first, _, last = tables.STAGES["15B"]
    assert tables.mfu(tables.NEMOTRON_15B, first) == pytest.approx(34.15, abs=0.01)
    assert tables.days(last) == pytest.approx(11.93, abs=0.01)
    _, *stages = tables.STAGES["340B"]
    assert sum(map(tables.days, stages)) == pytest.approx(86.0, abs=0.5)
    assert tables.cache_bytes(tables.NEMOTRON_15B) == 128 * 1024
    assert tables.cache_bytes(tables.NEMOTRON_340B) == 576 * 1024


def test_verdicts():
    row = tables.Row
    assert row("", "1", "1", "1").verdict == "ok" and row("", "1", "2").verdict == "FAILED"
    assert row("", "1", "2", note="why").verdict == "why"
    assert row("", "1", "1", note="why").verdict == "FAILED"
    assert row("", "–", "1", note="why").verdict == "why"


def test_all_tables(capsys):
    with plant(tables.sys, "argv", ["preference_tables.py"]):
        tables.main()
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and printed.count(" ok\n") >= 10


def test_a_wrong_loss_fails_the_table(capsys):
    with plant(tables, "rpo_loss", lambda delta, *args: pf.dpo_loss(delta, 1.0) * 1.01):
        assert not tables.print_table("Losses", list(tables.losses()))
