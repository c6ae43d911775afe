# SPDX-License-Identifier: MIT-0
"""Each rule of style.py finds what it is for, says where, and leaves good code alone."""

import pytest
import shared_blocks
import style

GOOD = '''# SPDX-License-Identifier: MIT-0
"""Chapter 1. One."""

# ── 1 The idea ──
#
# What it is, in one comment, and why.


# It adds.
def add(x: int, y: int) -> int:
    """The sum."""
    x, y = y, x  # an exchange is no assignment of unrelated values
    head, tail = divmod(x, y)
    total = head
    total += tail
    total += 1
    total -= 1
    return total
'''


@pytest.fixture
def faults(tmp_path):
    """Writes a chapter 01_one/one.py and returns its faults."""

    def found(text: str, chapter: bool = True) -> list[str]:
        path = tmp_path / "01_one/one.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        return style.faults(path, chapter)

    return found


def test_good_code_has_no_fault(faults):
    assert faults(GOOD) == []


LONG = 'x = "' + 100 * "x" + '"\n'
DENSE = "y = [a * b + c * d - e for a in b for c in d if a + b * c > d - e]\n"


@pytest.mark.parametrize(
    "added, fault",
    [
        ("a, b = 1, 2\n", "one.py:19: several values in one assignment: (a, b)"),
        ("a = b, c = 1, 2\n", "one.py:19: several values in one assignment: (b, c)"),
        ("f = lambda: 1\n", "one.py:19: a lambda with a name, f: write a function"),
        ("f: object = lambda: 1\n", "one.py:19: a lambda with a name, f: write a function"),
        ("import os  # noqa\n", "one.py:19: switches a check off: # noqa"),
        ("import os  # noqa: F401\n", "one.py:19: switches a check off: # noqa: F401"),
        ("# ruff: noqa\n", "one.py:19: switches a check off: # ruff: noqa"),
        ("x = [1,  2]  # fmt: skip\n", "one.py:19: switches a check off: # fmt: skip"),
        ("# fmt: off\n", "one.py:19: switches a check off: # fmt: off"),
        (LONG, "one.py:19: 11.1 % of code lines over 100 columns, allowed 5.0: 19"),
        (10 * DENSE, "one.py:1: 31.4 syntax nodes a code line, allowed 12.0; most in lines 19, "),
        ("def long():\n" + 45 * "    pass\n", "one.py:19: long has 46 code lines, allowed 45"),
    ],
)
@pytest.mark.parametrize("chapter", [True, False])
def test_form_of_every_script(faults, added, fault, chapter):
    comments = "# why\n" * added.count("\n")  # the ratio of comments stays good
    assert any(fault in found for found in faults(GOOD + added + comments, chapter))


@pytest.mark.parametrize(
    "text, fault",
    [
        (GOOD + 641 * "x = 1  # why\n", "one.py:1: 649 code lines to read, allowed 640"),
        (
            GOOD + "# region shared: flags\n" + 201 * "x = 1  # why\n" + "# endregion\n",
            "one.py:1: 201 code lines to skip, allowed 200",
        ),
        (
            GOOD + "def main():\n" + 200 * "    x = 1  # why\n",
            "one.py:1: 201 code lines to skip, allowed 200",
        ),
        (GOOD + 1700 * "\n", "one.py:1718: 1718 lines, allowed 1700"),
        (GOOD + 30 * "x = 1\n", "one.py:1: 0.21 lines of comment for one of code"),
        (GOOD + 30 * "# why\n", "one.py:1: 4.75 lines of comment for one of code"),
        (160 * "\n" + GOOD, "one.py:164: the technique (# ── 1 ...) begins before line 160"),
        (GOOD.replace("# ── 1 ", "# "), "one.py:1: the technique (# ── 1 ...) begins before"),
        (GOOD.replace("It adds", "It adds summands"), "one.py:9: 'summands': write partial sum"),
        (GOOD.replace("The sum", "Nobody's sum"), "one.py:11: 'Nobody': write name the rank"),
    ],
)
def test_anatomy_of_chapters_alone(faults, text, fault):
    assert any(fault in found for found in faults(text))
    alone = faults(text, chapter=False)
    assert not any(fault in found for found in alone)


def test_carried_code_is_read_at_its_home(faults, tmp_path):
    block = "# region {}\n" + 500 * "x = 1  # why\n" + "# endregion\n"
    home = block.format("shared: model")
    assert not faults(GOOD + home)
    assert any(
        "649 code lines to read" in found for found in faults(GOOD + home + 141 * "x = 1  # y\n")
    )
    carried = block.format("carried: model (home: 02_two)")
    assert not any("to read" in found for found in faults(GOOD + carried + 141 * "x = 1  # y\n"))


def test_what_every_chapter_has_counts_for_none(faults):
    block = "# region shared: reports\n" + 641 * "x = 1  # why\n" + "# endregion\n"
    assert not faults(GOOD + block)


def test_words_in_pages_and_notebooks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("fine\nthe doors of a region\n", "utf-8")
    assert list(style.words(page)) == [(2, "'doors': write operator, conjugate operators f and g")]
    notebook = tmp_path / "a.ipynb"
    cells = '{"cells": [{"cell_type": "code", "source": ["door"]},'
    cells += ' {"cell_type": "markdown", "source": ["a journey"]}]}'
    notebook.write_text(cells, "utf-8")
    assert [where for where, _ in style.words(notebook)] == [1]


def test_speech_has_words(tmp_path):
    for name, count in (("01_deepspeech/deepspeech.py", 0), ("02_one/one.py", 1)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text("# a word here\n", "utf-8")
        assert len(list(style.words(path))) == count


def test_every_script_is_in_the_table():
    for path in shared_blocks.chapters():
        assert path.name in style.row(path)
