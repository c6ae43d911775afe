# SPDX-License-Identifier: MIT-0
"""What `make book` makes of scripts, tests and Markdown files, before Sphinx sees it."""

import importlib.util
import json
import sys

import lift
import pytest
import shared_blocks
from web import build, other_pages, places, proofs, prose, script_pages, sources


def no_link(found: str) -> None:
    return None


def written(comment: str, link=no_link) -> str:
    return prose.markdown(comment.splitlines(), link)


# ── Comments ──────────────────────────────────────────────────────────────────────────────────────


def test_a_paragraph_is_one_line_and_a_sketch_stays():
    text = written("Two ranks\nadd up:\n\n    a ──► b\n\n      c   d\n\nDone.")
    head = "```{code-block} text\n:class: sketch boxes\n\n"
    assert text == f"Two ranks add up:\n\n{head}a ──► b\n\n  c   d\n```\n\nDone.\n"


def test_a_sketch_may_follow_its_paragraph_directly():
    text = written("By hand:\n    x = 1\nand no more.")
    assert text.startswith("By hand:\n\n```{code-block} text\n:class: sketch\n\nx = 1\n```")
    assert text.endswith("\n\nand no more.\n")


def test_papers_stand_one_below_the_other():
    """What cites them is indented, and no sketch; each goes on to its number."""
    papers = ["Papers: One, A et al., 2014, 1412.5567;", "Two, of two lines, B, 1512.02595"]
    one, two, more = papers[0], "        Two, of two lines,", "        B, 1512.02595"
    assert written("\n".join([one, two, more])) == "\\\n".join(papers) + "\n"
    assert (
        written("Sources: Three, 2019,\n         1912.0001.")
        == "Sources: Three, 2019, 1912.0001.\n"
    )


def test_a_list_has_items_of_several_lines():
    assert written("· one\n  goes on\n· two") == "- one goes on\n- two\n"


@pytest.mark.parametrize(
    "comment, markdown",
    [
        ("x · W[a] * b < c and $5", r"x · W\[a\] \* b \< c and \$5"),
        ("`reduce` of y_i by dist.all_reduce(x)", "`reduce` of `y_i` by `dist.all_reduce`(x)"),
        ("with --tp 2, in PyTorch", "with `--tp` 2, in PyTorch"),
        ("the *global* batch", "the *global* batch"),
        ("1. first", "1\\. first"),
        ("h_{t-1}", r"h\_\{t-1\}"),
        ("arXiv 1909.08053", "[arXiv 1909.08053](https://arxiv.org/abs/1909.08053)"),
        ("see https://a.org/x_y.", "see <https://a.org/x_y>."),
    ],
)
def test_what_has_a_meaning_in_markdown_has_none_here(comment, markdown):
    assert written(comment) == f"{markdown}\n"


def test_names_and_chapters_are_links():
    links = {"copy_to_tp": "[f]", "chapter 2, section 1.5": "[2]", "Chapter 3": "[3]"}
    text = written("Chapter 3: `copy_to_tp` (chapter 2, section 1.5) and chapter 4.", links.get)
    assert text == "[3]: [f] ([2]) and chapter 4.\n"


# ── Scripts ───────────────────────────────────────────────────────────────────────────────────────

SCRIPT = '''# SPDX-License-Identifier: MIT-0
"""Chapter 99. Nothing.

The idea. None.
"""

# ── 0 Notation ─────
#
# Two letters.

import math

_half = 0.5

# ── 1 The idea ─────
#
# ── 1.1 A step ─────
#
# It has a step.


# One remark.
def step(x):
    """Adds a half. And more."""
    return x + _half


# A lecture
# of three
# lines.
class Walk:
    pass


def _private():
    return math.pi


other = _private()
'''
TESTS_OF = "tests/test_99_dummy"


@pytest.fixture
def root(tmp_path):
    """A book of one chapter, which nothing lists."""
    files = {
        "README.md": "# A book\n\n[99](99_dummy/), [its step](99_dummy/dummy.py), [no](no.py)\n",
        "GLOSSARY.md": "# Glossary\n\n- **a**, **b c**: one **d**.\n",
        "Makefile": "run:\n",
        "CLUSTER.md": "# Cluster\n\n[make](Makefile)\n",
        "notebooks/README.md": "# Course\n",
        "99_dummy/README.md": "# 99 · Nothing\n",
        "99_dummy/dummy.py": SCRIPT,
        "99_dummy/tool.py": '"""A tool."""\n\nimport dummy\n\n\ndef use():\n    dummy.step(1)\n',
        "notebooks/99_dummy.ipynb": json.dumps(NOTEBOOK),
        f"{TESTS_OF}.py": TESTS,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return tmp_path


NOTEBOOK = {
    "cells": [{"cell_type": "markdown", "source": ["[it](../99_dummy/dummy.py)\n", "more"]}],
    "metadata": {"language_info": {}},
}
TESTS = '''"""Tests of nothing."""

import dummy as d
import pytest
from dummy import Walk

URL = "https://github.com/a/b"


def helper():
    return Walk()


def test_step():
    assert d.step(1) == 1.5


def test_walk():
    assert helper()


@pytest.mark.planted_bug(symptom="x is wrong", seen_in=f"{URL}/1")
def test_without_a_half():
    plant(d, "step", None)
'''


def test_a_script_in_pieces(root):
    source = sources.read(root / "99_dummy/dummy.py")
    kinds = [type(piece).__name__ for piece in source.pieces]
    assert kinds == "Heading Prose Code Heading Heading Prose Code Prose Code Code".split()
    code = [piece for piece in source.pieces if isinstance(piece, sources.Code)]
    assert [piece.name for piece in code] == ["", "step", "Walk", ""]
    assert source.text(code[1]).startswith("# One remark.\ndef step")
    assert source.text(code[2]) == "class Walk:\n    pass"
    assert source.pieces[-3].lines == ["A lecture", "of three", "lines."]


def test_a_new_chapter_is_found_with_all_its_pages(root):
    texts = build.sources(places.Places(root))
    folder = [page for page in texts if page.startswith("99_dummy")]
    assert sorted(folder) == [
        "99_dummy/1_the_idea.md",
        "99_dummy/dummy.md",
        "99_dummy/index.md",
        "99_dummy/tool.md",
    ]
    assert "notebooks/99_dummy.ipynb" in texts and f"{TESTS_OF}.md" in texts
    assert "\n/99_dummy/index\n" in texts["index.md"]
    chapter = texts["99_dummy/index.md"]
    assert "1 The idea </99_dummy/1_the_idea>" in chapter
    assert "Notebook </notebooks/99_dummy>" in chapter
    assert f"Tests of dummy </{TESTS_OF}>" in chapter
    assert "[its step](99_dummy/dummy.md), [no](no.py)" in texts["index.md"]
    assert texts["files/Makefile.md"].endswith("run:\n````\n")
    assert json.loads(texts["notebooks/99_dummy.ipynb"])["cells"][0]["source"] == [
        "[it](../99_dummy/dummy.md)\n",
        "more",
    ]


def test_a_function_has_its_anchor_its_tests_and_its_button(root):
    page = build.sources(places.Places(root))["99_dummy/1_the_idea.md"]
    assert "```{py:function} dummy.step\n" in page and 'id="dummy.step"' in page
    assert 'data-lifted="../lifted/99_dummy/dummy/step.py"' in page
    assert "1 test<" in page and "[step](#test_99_dummy-test_step)" in page
    link = "[a/b/1](https://github.com/a/b/1)"
    assert f"(#test_99_dummy-test_without_a_half): X is wrong. Seen in {link}." in page
    assert "[walk](#test_99_dummy-test_walk)" in page  # through a helper
    lifted = other_pages.lifted_files(places.Places(root))
    there = "lifted/99_dummy/dummy/step.py"
    assert lifted[there] == lift.lift(root / "99_dummy/dummy.py", "step")


def test_a_function_without_a_test_says_through_which_it_is_tested(root):
    path = root / "99_dummy/dummy.py"
    tested = {("dummy", "step"): []}
    assert proofs.users(path, "_half", tested) == ["step"]
    tool = build.sources(places.Places(root))["99_dummy/tool.md"]
    assert "Tested with the whole script" in tool


def test_terms_of_the_glossary_have_anchors(root):
    text = other_pages.markdown_page(root / "GLOSSARY.md", places.Places(root))
    assert "- [**a**]{#term-a}, [**b c**]{#term-b-c}: one **d**." in text


def test_planted_bugs_are_listed(root):
    page = other_pages.bugs_page(places.Places(root))
    assert "## [99 · Nothing](99_dummy/index.md)" in page
    assert "| [without a half](#test_99_dummy-test_without_a_half) | X is wrong. Seen in" in page


# ── This book ─────────────────────────────────────────────────────────────────────────────────────

PAGES = script_pages.ScriptPages(places.Places())


@pytest.mark.parametrize("path", proofs.scripts(), ids=lambda path: path.stem)
def test_nothing_of_a_script_is_lost_and_carried_code_stands_at_home(path):
    text = "\n".join(PAGES.pages(path).values())
    source = sources.read(path)
    for piece in source.pieces:
        if isinstance(piece, sources.Code):
            assert text.count(f"\n{source.text(piece)}\n```") == 1
    carried = [region for region in shared_blocks.parse(path)[0] if region.kind == "carried"]
    assert text.count("\n{.carried}\n") == len(carried)
    for region in carried:
        assert "\n".join(region.body.splitlines()[:4]) not in text
        assert f", {region.body.count(chr(10))} lines: word for word as in [chapter" in text


def test_without_sphinx_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["build", "--to", str(tmp_path / "site")])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "myst_nb" else find(name)
    )
    monkeypatch.setattr(build, "NEEDED", ("json", "myst_nb"))
    with pytest.raises(SystemExit, match=r"the site needs myst_nb: pip install -e '\.\[book\]'"):
        build.main()
    assert not (tmp_path / "site").exists()
