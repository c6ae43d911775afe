# SPDX-License-Identifier: MIT-0
"""Shared blocks: every copy is its home's text, and `make shared` never loses an edit."""

import re
import subprocess
import sys

import pytest
import shared_blocks

CHAPTERS = shared_blocks.carriers()
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@each_chapter
def test_shared_blocks_are_equal_to_the_letter(chapter):
    home = shared_blocks.homes()
    for region in shared_blocks.blocks(chapter).values():
        assert region.body.strip(), f"{region.place} is empty: run make shared"
        assert region.body == shared_blocks.home_text(region, home), (
            f"{region.place} is not its home's text: run make shared"
        )
        assert not region.edited, f"{region.place} lacks its checksum: run make shared"


def test_every_marker_has_its_end_and_a_home():
    assert not shared_blocks.complaints()


@each_chapter
def test_a_block_holds_code_alone(chapter):
    """No heading: it would have a number of another chapter, and an editor would fold it away."""
    for region in shared_blocks.blocks(chapter).values():
        assert not re.search(r"^# ── ", region.body, re.M), f"{region.place} contains a heading"


# ── What make shared does ─────────────────────────────────────────────────────────────────────────

HOME = "# region shared: two\ndef two():\n    return 2\n\n\n# endregion\n"
EMPTY = "# region carried: two (home: 01_one)\n# endregion\n"


def book(folder, *chapters: str):
    """Chapters 01_one, 02_two ... with these texts."""
    paths = []
    for number, text in enumerate(chapters, 1):
        name = ("one", "two", "three")[number - 1]
        paths.append(folder / f"{number:02}_{name}" / f"{name}.py")
        paths[-1].parent.mkdir()
        paths[-1].write_text(text, "utf-8")
    return paths


def test_a_chapter_is_the_script_with_its_folders_name(tmp_path):
    (script,) = book(tmp_path, "")
    tool, table = script.parent / "tool.py", script.parent / "one_tables.py"
    tool.touch(), table.touch()
    found = (
        shared_blocks.chapters(tmp_path),
        shared_blocks.tools(tmp_path),
        shared_blocks.tables(tmp_path),
    )
    assert found == ([script], [tool], [table])


def test_an_empty_block_is_filled_and_follows_its_home(tmp_path):
    home, carrier = book(
        tmp_path, f"before = 1\n{HOME}after = 1\n", f"mine = 0\n{EMPTY}other = 0\n"
    )
    assert shared_blocks.update(tmp_path) == [carrier]
    begin, body, end = carrier.read_text().partition("def two():\n    return 2\n\n\n")
    assert begin == "mine = 0\n# region carried: two (home: 01_one)\n" and body
    assert re.fullmatch(r"# endregion copy \w{6}\nother = 0\n", end)
    assert shared_blocks.update(tmp_path) == []
    for text in ("return 3", "return 4"):  # twice without a commit
        home.write_text(re.sub("return .", text, home.read_text()))
        assert shared_blocks.update(tmp_path) == [carrier]
        assert text in carrier.read_text() and carrier.read_text().endswith("other = 0\n")


def test_a_tool_may_be_the_home(tmp_path):
    _, carrier = book(tmp_path, "x = 1\n", EMPTY)
    tool = tmp_path / "01_one/tool.py"
    tool.write_text(HOME, "utf-8")
    assert shared_blocks.homes(tmp_path)["two"].path == tool
    assert shared_blocks.update(tmp_path) == [carrier]
    assert "return 2" in carrier.read_text()


def test_an_edited_copy_is_never_overwritten(tmp_path):
    """Neither by itself nor where its home has changed too; then nothing at all is written."""
    home, edited, untouched = paths = book(tmp_path, HOME, EMPTY, EMPTY)
    shared_blocks.update(tmp_path)
    edited.write_text("\n\n" + edited.read_text().replace("return 2", "return 20"))
    for text in (HOME, HOME.replace("return 2", "return 3")):
        home.write_text(text)
        before = [path.read_text() for path in paths]
        with pytest.raises(ValueError, match=r"02_two/two.py:3: block 'two' was edited here"):
            shared_blocks.update(tmp_path)
        assert [path.read_text() for path in paths] == before
    edited.write_text(edited.read_text().replace("    return 20\n", "").replace("def two():\n", ""))
    assert shared_blocks.update(tmp_path) == [edited, untouched]


def test_a_copy_without_a_checksum(tmp_path):
    """It is a copy where it says what its home says; anything else may be somebody's work."""
    book(tmp_path, HOME, HOME.replace("shared: two", "carried: two (home: 01_one)"))
    (changed,) = shared_blocks.update(tmp_path)
    assert "# endregion copy" in changed.read_text()
    changed.write_text(re.sub(" copy .*", "", changed.read_text().replace("return 2", "return 5")))
    with pytest.raises(ValueError, match="was edited here"):
        shared_blocks.update(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "# region carried: two (home: 01_one)\nx = 1\n",
            "02_two/two.py:1: block 'two' has no # endregion",
        ),
        (
            EMPTY.replace("01_one", "03_none"),
            "03_none has no '# region shared: two'; its home is 01_one",
        ),
        (
            EMPTY.replace("two", "to"),
            "02_two/two.py:1: block 'to': 01_one has no '# region shared: to'",
        ),
        (EMPTY + EMPTY, "02_two/two.py:3: block 'two' stands there twice"),
        (HOME, "02_two/two.py:1: block 'two' has a home already, 01_one"),
        ("# region carried: two\n# endregion\n", "02_two/two.py:1: not a marker of a block"),
        ("# end region\n# endregion: two\n", "02_two/two.py:2: not a marker of a block"),
        (EMPTY.replace("\n", f"\n{EMPTY}", 1), "a block inside block 'two'"),
    ],
)
def test_a_wrong_marker_is_named(tmp_path, text, message):
    book(tmp_path, HOME, text)
    with pytest.raises(ValueError, match=re.escape(message)):
        shared_blocks.update(tmp_path)


DEFINITIONS = """import os

# A lecture.
LIMIT = 2
Pair = tuple[int, int]


# A comment above.
@staticmethod
def two():
    return LIMIT


OTHER = 3


class Three:
    pass
"""
LISTED = "# region carried: Three, two, LIMIT, Pair (home: 01_one)\n# endregion\n"


def test_definitions_need_no_marker_at_home(tmp_path):
    """They stand in the home's order, with decorators, without comments and what is not listed."""
    home, carrier = book(tmp_path, DEFINITIONS, LISTED)
    assert shared_blocks.update(tmp_path) == [carrier]
    body = shared_blocks.blocks(carrier)["Three, two, LIMIT, Pair"].body
    assert body == (
        "LIMIT = 2\nPair = tuple[int, int]\n\n\n@staticmethod\ndef two():\n    return LIMIT\n\n\n"
        "class Three:\n    pass\n\n\n"
    )
    home.write_text(DEFINITIONS.replace("LIMIT = 2", "LIMIT = 5"))
    assert shared_blocks.update(tmp_path) == [carrier] and "LIMIT = 5" in carrier.read_text()
    carrier.write_text(carrier.read_text().replace("LIMIT = 5", "LIMIT = 6"))
    with pytest.raises(ValueError, match="was edited here"):
        shared_blocks.update(tmp_path)
    carrier.write_text(LISTED.replace("Pair", "Pear"))
    with pytest.raises(ValueError, match="01_one has no '# region shared: Three, two, LIMIT, Pear"):
        shared_blocks.update(tmp_path)


def test_a_tool_may_be_home_and_may_carry(tmp_path):
    """Its home is named by folder and file."""
    _, second = book(tmp_path, "", "")
    tool = tmp_path / "01_one/tool.py"
    tool.write_text(DEFINITIONS)
    carrier = second.parent / "other.py"
    carrier.write_text("# region carried: two (home: 01_one/tool)\n# endregion\n")
    assert shared_blocks.update(tmp_path) == [carrier] and "def two" in carrier.read_text()
    assert shared_blocks.script_of("01_one/tool", tmp_path) == tool


def test_the_command_refuses_with_one_line(tmp_path):
    """Exit code 1 and the place, nothing else."""
    book(tmp_path, HOME, EMPTY.replace("\n", "\nx = 1\n", 1))
    program = "import shared_blocks as s, pathlib as p; s.update.__defaults__ = (p.Path.cwd(),)"
    program += "; s.main()"
    command = [sys.executable, "-c", program]
    folder = {"PYTHONPATH": str(shared_blocks.ROOT / "tests/book")}
    done = subprocess.run(command, cwd=tmp_path, env=folder, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.startswith("02_two/two.py:1: block 'two' was edited here")
        and done.stderr.count("\n") == 1
    )
