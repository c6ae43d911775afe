# SPDX-License-Identifier: MIT-0
"""`make lift`: every public function and class of every chapter works alone, in an empty file.

Ruff finds no name that the lifted file lacks, also on paths that only many ranks take, and no
import that it does not use. What depends on something else computes there what it computes in its
chapter, by its use in examples.py.
"""

import importlib
import json
import subprocess
import sys
import types

import lift
import pytest
import shared_blocks
import torch
from examples import DEMONSTRATION, EXAMPLES, WITHOUT_EXAMPLE
from torch.utils._pytree import tree_leaves

CHAPTERS = shared_blocks.chapters()
CASES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in CHAPTERS
    for name in lift.public(path)
]
SCRIPTS = [*CHAPTERS, *shared_blocks.tools(), *shared_blocks.tables()]


def faults(folder) -> dict[str, list[str]]:
    """File name to what ruff's rules F say of it: unknown names, unused imports."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F",
        "--output-format",
        "json",
    ]
    found = json.loads(
        subprocess.run([*command, str(folder)], capture_output=True, text=True).stdout
    )
    result: dict[str, list[str]] = {}
    for fault in found:
        name = fault["filename"].replace("\\", "/").split("/")[-1]
        result.setdefault(name, []).append(f"{fault['code']} {fault['message']}")
    return result


@pytest.fixture(scope="module")
def lifted(tmp_path_factory):
    """Every public name of every script in a file of its own, and what ruff says of each."""
    folder = tmp_path_factory.mktemp("lifted")
    for path in SCRIPTS:
        for name in lift.public(path):
            (folder / f"{path.stem}-{name}.py").write_text(lift.lift(path, name), "utf-8")
    return folder, faults(folder)


def loaded(text: str, name: str) -> types.ModuleType:
    """The lifted text as a module; dataclasses look for theirs in sys.modules."""
    module = sys.modules["copied"] = types.ModuleType("copied")
    exec(compile(text, f"<{name}, lifted>", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("path, name", CASES)
def test_it_works_in_an_empty_file(path, name, lifted, tmp_path, monkeypatch):
    folder, found = lifted
    monkeypatch.chdir(tmp_path)  # nothing of ours is there
    file = folder / f"{path.stem}-{name}.py"
    assert not found.get(file.name), found[file.name]
    text = file.read_text("utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT-0\n# " + name)
    assert "\n\n\n\n" not in text
    copied, chapter, results = loaded(text, name), importlib.import_module(path.stem), []
    use = EXAMPLES.get(path.stem, {}).get(name)
    if lift.home(path, name) != path or not use:
        return  # used at its home; or the next test asks whether it needs an example
    for module in (copied, chapter):
        torch.manual_seed(0)
        results.append(tree_leaves(use(module, tmp_path)))
    assert len(results[0]) == len(results[1]) > 0
    for here, there in zip(*results):
        assert torch.equal(here, there) if isinstance(there, torch.Tensor) else here == there


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_needs_something_has_an_example(path):
    """Or a reason why it has none. A reason that nothing needs is taken out."""
    own = [name for name in lift.public(path) if lift.home(path, name) == path]
    depends = {name for name in own if lift.dependencies(path, name)} - DEMONSTRATION
    examples = EXAMPLES.get(path.stem, {}).keys()
    excused = WITHOUT_EXAMPLE.get(path.stem, {}).keys()
    assert depends - examples - excused == set(), (
        "show a use of it in examples.py, or say there why not"
    )
    assert excused <= depends - examples, (
        f"no reason is needed: {sorted(excused - (depends - examples))}"
    )
    assert examples <= set(own), (
        f"examples of what {path.stem} is not the home of: {sorted(examples - set(own))}"
    )


@pytest.mark.parametrize("path", SCRIPTS[len(CHAPTERS) :], ids=lambda path: path.stem)
def test_tools_and_tables_can_be_lifted(path, lifted):
    names = lift.public(path)
    assert names
    for name in names:
        assert not lifted[1].get(f"{path.stem}-{name}.py"), lifted[1]


# ── What is taken, and how it is written ──────────────────────────────────────────────────────────

SCRIPT = '''# SPDX-License-Identifier: MIT-0
"""Chapter 1. One.

Paper: A Title,
       Somebody et al., 2019, arXiv 1909.08053
"""

from __future__ import annotations

import os
import sys
from collections import deque, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# ── 1 A part ──────────────────────────────────────────────────────────────────────────────────────
#
# Its lecture.
LIMIT = 3  # a constant
Pair = namedtuple("Pair", "a b")


class Base(nn.Module):
    pass


Base.size = LIMIT


def doubled(f):
    return f


@dataclass
class Config:
    """Sizes."""

    pair: Pair | None = None


# A comment that belongs to it.
@doubled
def target(x: Any, config: "Config" = Config(), limit=LIMIT) -> Base:
    dist = 3  # a name of its own
    return Base(x, dist)


def other():
    return [sys for sys in os.environ], deque(), torch


def switch() -> "Pair":
    global STATE
    STATE = 1


STATE = 0
'''


def one(tmp_path, text=SCRIPT, **more: str):
    """01_one/one.py and more files of that folder."""
    folder = tmp_path / "01_one"
    folder.mkdir(exist_ok=True)
    for name, content in dict(one=text, **more).items():
        (folder / f"{name}.py").write_text(content, "utf-8")
    lift.read.cache_clear()
    return folder / "one.py"


def test_all_that_the_code_uses_and_nothing_more(tmp_path):
    text = lift.lift(one(tmp_path), "target")
    expected = SCRIPT[SCRIPT.index("LIMIT = 3") : SCRIPT.index("def other")].rstrip() + "\n"
    top, _, body = text.partition("LIMIT = 3")
    assert "LIMIT = 3" + body == expected
    assert top == (
        "# SPDX-License-Identifier: MIT-0\n# target and what it needs, from 01_one/one.py\n"
        "# A Title,\n"
        "# Somebody et al., 2019, arXiv 1909.08053\n\nfrom __future__ import annotations\n\n"
        "from collections import namedtuple\nfrom dataclasses import dataclass\n"
        "from typing import Any\n\n"
        "from torch import nn\n\n"
    )
    assert loaded(text, "target").Config().pair is None


@pytest.mark.parametrize(
    "name, names",
    [
        ("other", {"os", "deque", "torch", "other"}),
        ("switch", {"annotations", "namedtuple", "Pair", "STATE", "switch"}),
        ("Pair", {"namedtuple", "Pair"}),
        ("Base", {"nn", "Base", "LIMIT"}),
    ],
)
def test_names(tmp_path, name, names):
    module = loaded(lift.lift(one(tmp_path), name), name)
    assert {made for made in vars(module) if not made.startswith("__")} == names


def test_without_one_of_them_ruff_finds_it(tmp_path):
    """The check that all lifted files pass can fail."""
    text = lift.lift(one(tmp_path), "target")
    (tmp_path / "bad.py").write_text(text.replace("LIMIT = 3", "pass") + "\n\nimport os\n")
    (bad,) = [found for name, found in faults(tmp_path).items() if name == "bad.py"]
    assert [fault[:4] for fault in sorted(bad)] == ["F401", "F821", "F821"]


@pytest.mark.parametrize("style", ["import one", "import one as o", "from one import Base, Config"])
def test_a_tool_brings_what_it_takes_from_its_chapter(tmp_path, style):
    prefix = {"import one": "one.", "import one as o": "o."}.get(style, "")
    tool = f"""import json

import torch
{style}


def save():
    return json.dumps([{prefix}Base.size, "one.Base"]), {prefix}Config().pair, torch
"""
    one(tmp_path, tool=tool)
    text = lift.lift(tmp_path / "01_one/tool.py", "save")
    assert style not in text and "\n\n\n\n" not in text
    (tmp_path / "lifted.py").write_text(text)
    assert not faults(tmp_path).get("lifted.py")
    assert loaded(text, "save").save()[:2] == ('[3, "one.Base"]', None)


# ── The command ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `make lift` in a book of one chapter with a tool; returns what it printed."""
    one(tmp_path, tool="def save():\n    pass\n")
    for listed in (shared_blocks.chapters, shared_blocks.tools, shared_blocks.tables):
        monkeypatch.setattr(listed, "__defaults__", (tmp_path,))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lift.py", *words])
        try:
            lift.main()
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("source", ["1", "01", "01_one", "01_one/", "01_one/one.py", "one"])
def test_spellings_of_a_chapter(command, source):
    assert "def switch" in command(source, "switch")


@pytest.mark.parametrize("source", ["1/tool", "01/tool", "01_one/tool", "01_one/tool.py", "tool"])
def test_spellings_of_a_tool(command, source):
    assert "def save" in command(source, "save")


@pytest.mark.parametrize(
    "words, answer",
    [
        (("01", "targt"), "NAME=targt: 01_one/one.py does not define it; near: target"),
        (
            ("tool", "switch"),
            "NAME=switch: 01_one/tool.py does not define it; near: switch of 01_one",
        ),
        (("01_oen", "target"), "FROM=01_oen: no such chapter or tool; there is 01_one"),
        (("7", "target"), "FROM=7: no such chapter or tool; there is 01_one"),
        (("", ""), "what from where? make lift FROM=02 NAME=vocab_parallel_cross_entropy"),
    ],
)
def test_a_wrong_word_is_one_line_with_near_misses(command, words, answer):
    assert command(*words) == answer


def test_a_file_is_written_once(command, tmp_path):
    there = tmp_path / "mine.py"
    assert command("01", "switch", "--to", str(there)) == ""
    before = there.read_text()
    assert "def switch" in before
    assert (
        command("01", "target", "--to", str(there))
        == f"TO={there}: there is such a file; nothing is written"
    )
    assert there.read_text() == before
    assert "No such file" in command("01", "target", "--to", str(tmp_path / "none/mine.py"))
