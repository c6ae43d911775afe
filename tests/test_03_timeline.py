# SPDX-License-Identifier: MIT-0
"""Drawings, and the schedule that splits backward in two: ZB-H1 is proven and timed."""

import subprocess
import sys
from fractions import Fraction

import pipeline as pl
import pytest
import timeline
from hypothesis import given, settings
from hypothesis import strategies as st


def proven(table: pl.Schedule) -> list[int]:
    """Each operation once, no deadlock; the activations that each rank holds."""
    m = len(table[0]) // 3
    for rank, ops in enumerate(table):
        assert set(ops) == {pl.Op(kind, i, rank) for kind in "FBW" for i in range(m)}
        assert len(ops) == 3 * m
    pl.programs(table)
    return [timeline.most_held(ops) for ops in table]


def check_zb_h1(p: int, m: int) -> None:
    table = timeline.zb_h1(p, m)
    assert proven(table) == [min(p, m)] * p
    if m >= p:
        assert timeline.timed(table).bubble == Fraction(p - 1, 3 * m)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_small_zb_h1_is_proven(stages):
    for m in range(1, 9):
        check_zb_h1(stages, m)


@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 8), m=st.integers(1, 32))
def test_larger_zb_h1_is_proven(p, m):
    check_zb_h1(p, m)


def test_zb_h1_outside_its_rule():
    """With fewer micro-batches than stages, or long weights' parts, it is slower."""
    few = timeline.zb_h1(4, 2)
    assert proven(few) == [2, 2, 2, 2]
    assert timeline.timed(few).bubble > Fraction(3, 6)
    many = timeline.zb_h1(4, 8)
    assert pl.simulate(many, {"F": 1, "B": 1, "W": 2}).length > 8 * 4 + 3 * (1 + 1 - 2)
    third = timeline.timed(pl.schedule("1f1b", 4, 8)).bubble / 3
    assert timeline.timed(many).bubble == Fraction(1, 8) == third


def test_a_chunk_takes_its_part_of_the_time():
    for kind, v in (("1f1b", 1), ("interleaved", 2), ("interleaved", 4)):
        table = pl.schedule(kind, 4, 8, v)
        assert timeline.timed(table).length == 24 * (1 + Fraction(3, 8 * v))


def test_a_drawing():
    drawn = timeline.draw(timeline.timed(pl.schedule("1f1b", 2, 2)), 18).splitlines()
    assert drawn == ["rank 0  0─1─    0═══  1═══", "rank 1    0─0═══1─1═══"]
    assert "b═" in timeline.draw(timeline.timed(pl.schedule("interleaved", 2, 2, 2)), 60)
    assert "┄" in timeline.draw(timeline.timed(timeline.zb_h1(2, 2)), 60)


def test_a_drawing_that_is_too_small_for_its_labels():
    """Every bar stays in its place: 12 micro-batches on 20 columns."""
    drawn = timeline.draw(timeline.timed(pl.schedule("gpipe", 2, 12)), 20).splitlines()
    assert all(len(line) <= len("rank 0  ") + 20 for line in drawn)
    full = timeline.draw(timeline.timed(pl.schedule("gpipe", 2, 12)), 39 * 2).splitlines()
    assert full[1].startswith("rank 1    0─1─2─3─")


def test_the_docstrings_picture_is_the_drawing():
    """The picture at the top of the chapter is real output."""
    drawn = timeline.draw(timeline.timed(pl.schedule("1f1b", 4, 8)))
    for line in drawn.splitlines():
        assert line in pl.__doc__


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, timeline.__file__, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timeline.py"])
    timeline.main()
    printed = capsys.readouterr().out
    for line in (
        "gpipe: bubble 3/8, activations held 8, 8, 8, 8",
        "1f1b: bubble 3/8, activations held 4, 3, 2, 1",
        "interleaved: bubble 3/16, activations held 11, 9, 7, 5",
        "zb-h1: bubble 1/8, activations held 4, 4, 4, 4",
    ):
        assert line in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["fastest"], "schedule 'fastest' is unknown"),
        (["interleaved", "--microbatches", "6"], "choose 4"),
        (["1f1b", "--pp", "0"], "each must be at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timeline.py", *flags])
    with pytest.raises(SystemExit) as end:
        timeline.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
