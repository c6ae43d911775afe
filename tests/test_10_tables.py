# SPDX-License-Identifier: MIT-0
"""Chapter 10's tables: parameters, layers removed, budgets, permutations, verdicts."""

from dataclasses import replace

import compress_tables as tables
import pytest
import search
from proof import plant


def test_parameters_are_those_of_the_table_of_axes():
    for config in tables.MODELS.values():
        assert tables.parameters(config) == tables.counted(config)
    found = [round(tables.counted(config) / 1e9, 3) for config in tables.MODELS.values()]
    assert found == [12.31, 8.888, 56.324, 46.792, 8.101, 4.489]


def test_patterns_and_what_is_removed():
    lengths = [len(config.pattern) for config in tables.MODELS.values()]
    assert lengths == [62, 56, 118, 98, 52, 52]
    models = list(tables.MODELS.values())
    assert tables.removed(models[0], models[1]) == "1 / 2 / 3"
    assert tables.removed(models[2], models[3]) == "9 / 5 / 6"
    assert tables.MODELS["Nano-9B-v2"] == search.NANO_9B


def test_slices_of_the_large_models_have_the_small_ones_shapes():
    """And a model that keeps one channel more has not."""
    large, small = (tables.MODELS[f"Nemotron-H-{size}"] for size in ("8B", "4B"))
    assert tables.sliced_shapes(large, small) == tables.parameter_shapes(small)
    other = replace(small, hidden_size=small.hidden_size + 1)
    assert tables.sliced_shapes(large, other) != tables.parameter_shapes(small)
    assert [row.verdict for row in tables.shapes()] == ["ok"] * 3


def test_budgets_are_those_of_the_search():
    for name, bits in (("Nano-9B-v2", (16, 16)), ("Nemotron-H-47B", (4, 8))):
        config = tables.MODELS[name]
        weights, cache = tables.gibibytes(config, 1_000_000, bits[0] / 8, bits[1] / 8)
        found = search.memory(config, 1_000_000, *bits)
        assert found.weights / tables.GIB == pytest.approx(weights, rel=1e-9)
        assert found.cache / tables.GIB == pytest.approx(cache, rel=1e-9)


def test_the_verdict_needs_agreement_or_a_note():
    row = tables.Row
    assert row("c", "1", "1").verdict == "ok" and row("c", "1", "2").verdict == "FAILED"
    assert row("c", "1", "1", note="why").verdict == "FAILED"
    assert row("c", "1", "2", note="why").verdict == "why" and row("c", "1").verdict == "FAILED"


def test_the_page_and_its_exit_code(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compress_tables.py"])
    tables.main()
    page = capsys.readouterr().out
    assert page.count(" ok\n") == 21 and "FAILED" not in page
    accounting = [line for line in page.splitlines() if "at 1M tokens" in line]
    assert len(accounting) == 2 and not any(line.endswith("ok") for line in accounting)
    with plant(tables, "TABLES", {"x": lambda: [tables.Row("c", "1", "2")]}):
        with pytest.raises(SystemExit) as end:
            tables.main()
    assert end.value.code == 1
