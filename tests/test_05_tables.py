# SPDX-License-Identifier: MIT-0
"""Chapter 5's tables: the papers' patterns, parameters and bytes, verdicts and the printed page."""

import dataclasses

import front_door
import mamba_hybrid as mh
import mamba_hybrid_tables as tables
import pytest
import scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import plant
from test_05_mamba_hybrid import config

SCRIPT = tables.__file__

STUDY_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
STUDY_800M = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"


def test_allocation_gives_the_studys_patterns():
    assert tables.allocate_layers(56, 0.08, 0.5) == STUDY_8B
    assert tables.allocate_layers(48, 0.08, 0.5) == STUDY_800M
    assert tables.allocate_layers(5, 0, 0) == "MMMMM" and tables.allocate_layers(4, 0, 1) == "----"
    with pytest.raises(
        ValueError, match="5 attention and 6 feed-forward layers do not fit into 10"
    ):
        tables.allocate_layers(10, 0.5, 0.6)


@given(st.integers(1, 120), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_allocation_keeps_its_shares(n, attention, mlp):
    if round(n * attention) + round(n * mlp) <= n:
        pattern = tables.allocate_layers(n, attention, mlp)
        assert len(pattern) == n
        assert pattern.count("*") == round(n * attention) and pattern.count("-") == round(n * mlp)


def test_published_models():
    """Layers of each kind; attention in Nemotron-H-8B stands at 7, 18, 29 and 40; parameters."""
    counts = {
        name: tuple(c.pattern.count(kind) for kind in "M*-") for name, c in tables.PUBLISHED.items()
    }
    assert counts == {
        "study hybrid": (24, 4, 28),
        "Nemotron-H-8B": (24, 4, 24),
        "Nemotron-H-47B": (45, 5, 48),
        "Nemotron-H-56B": (54, 10, 54),
        "Nano-12B-v2": (28, 6, 28),
        "Nano-9B-v2": (27, 4, 25),
    }
    at = [i for i, kind in enumerate(tables.PUBLISHED["Nemotron-H-8B"].pattern) if kind == "*"]
    assert at == [7, 18, 29, 40]
    assert [
        i for i, kind in enumerate(tables.PUBLISHED["Nemotron-H-56B"].pattern) if kind == "*"
    ] == list(range(7, 107, 11))
    assert tables.PUBLISHED["Nemotron-H-47B"].pattern == (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
    )
    billions = {name: tables.parameters(c) / 1e9 for name, c in tables.PUBLISHED.items()}
    assert tables.parameters(tables.PUBLISHED["Nemotron-H-8B"]) == 8_100_852_736
    assert [round(billions[name], 3) for name in ("Nemotron-H-56B", "Nemotron-H-47B")] == [
        56.324,
        46.792,
    ]
    assert [round(billions[n], 3) for n in ("Nano-12B-v2", "Nano-9B-v2")] == [12.310, 8.888]
    assert round(billions["study hybrid"], 2) == 8.65


def test_parameters_are_the_models():
    for cfg in (
        config(),
        config(pattern="MM-", mamba_groups=4, conv_kernel=3),
        tables.PUBLISHED["Nemotron-H-8B"],
    ):
        assert tables.parameters(cfg) == sum(
            shape.numel() for shape in mh.parameter_shapes(cfg).values()
        )


def test_memory_of_the_published_models():
    """States in MiB with 16 and 32 bits, keys and values in GiB at 64K, 128K, 1M tokens, and the
    length at which both are equal."""
    for name, states, kv, equal in (
        ("Nemotron-H-8B", (49.9, 97.9), (1, 2, 16), 3192),
        ("study hybrid", (49.9, 97.9), (1, 2, 16), 3192),
        ("Nemotron-H-56B", (440, 872), (2.5, 5, 40), 11275),
        ("Nano-12B-v2", (72.6, 142.6), (1.5, 3, 24), 3099),
        ("Nano-9B-v2", (70.0, 137.5), (1, 2, 16), 4482),
    ):
        cfg = tables.PUBLISHED[name]
        here = [tables.decode_memory(cfg, 0, 2, width).state / 2**20 for width in (2, 4)]
        assert all(
            round(x, 0 if isinstance(given, int) else 1) == given for x, given in zip(here, states)
        ), name
        assert tuple(tables.decode_memory(cfg, n).kv / 2**30 for n in (2**16, 2**17, 2**20)) == kv
        assert round(tables.decode_memory(cfg, 1).state / tables.decode_memory(cfg, 1).kv) == equal
    attention = dataclasses.replace(tables.PUBLISHED["Nemotron-H-8B"], pattern=32 * "*-")
    assert tables.decode_memory(attention, 2**16) == tables.DecodeMemory(0, 8 * 2**30)


# ── Verdicts and the page ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "figures, verdict",
    [
        (dict(paper="1", formula="1", here="1"), "ok"),
        (dict(paper="1", here="1"), "ok"),
        (dict(paper="1", formula="2"), "FAILED"),
        (dict(paper="1", formula="2", note="why"), "why"),
        (dict(paper="1", note="needs 8 GPUs"), "needs 8 GPUs"),
        (dict(paper="1", here="1", note="why"), "FAILED"),
        (dict(here="1"), "FAILED"),
    ],
)
def test_verdicts(figures, verdict):
    assert tables.Row("a claim", **figures).verdict == verdict


def test_no_row_fails():
    found = tables.tables()
    verdicts = [row.verdict for rows in found.values() for row in rows]
    assert "FAILED" not in verdicts and verdicts.count("ok") == 8


@pytest.mark.parametrize(
    "name, wrong", [("STUDY", 56 * "M"), ("parameters", lambda config: 8_000_000_000)]
)
def test_a_wrong_figure_ends_the_run(name, wrong, capsys):
    with plant(tables, name, wrong), pytest.raises(SystemExit) as left:
        tables.main()
    assert left.value.code == 1 and "FAILED" in capsys.readouterr().out


def test_the_page_is_read_again(capsys):
    """What the front door reads of the printed page are the rows."""
    tables.main()
    printed = front_door.tables(capsys.readouterr().out)
    for table, (title, rows) in zip(printed, tables.tables().items(), strict=True):
        assert table["title"] == title
        assert [row[0] for row in table["rows"]] == [row.claim for row in rows]
        assert [row[-1] for row in table["rows"]] == [row.verdict for row in rows]


@pytest.mark.slow
def test_the_script():
    result = scripts.forked(SCRIPT, timeout=120)
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stderr


def test_a_wrong_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [SCRIPT, "--what"])
    with pytest.raises(SystemExit, match="2"):
        tables.flags()
    assert "unrecognized arguments" in capsys.readouterr().err.splitlines()[-1]
