# SPDX-License-Identifier: MIT-0
"""Every public function and class of a chapter's parts 0 to 5 works alone, in an empty file.

What is lifted: the chapter's imports, the definition, and what its docstring names after `Needs:`, in backticks, as the
name of a shared block, or as sections ("sections 2.2 to 2.5", "part 1"); then what *their* docstrings name. No more.
The lifted copy must define every name that its code mentions anywhere, also on paths that only many ranks take. And
what says that it needs something must compute there what it computes in its chapter.
"""

import ast
import builtins
import dis
import importlib
import re
import sys
import types
from functools import lru_cache
from pathlib import Path

import pytest
import shared_blocks
import torch
from examples import EXAMPLES
from torch.utils._pytree import tree_leaves

CHAPTERS = shared_blocks.chapters()


@lru_cache
def parse(path: Path) -> tuple[list[str], dict[str, ast.stmt], dict[str, set[str]], dict[tuple, set[str]]]:
    """A chapter's imports as source, its definitions by name, and the names that each shared block and each section
    defines; (2, 1) is section 2.1, (2, 0) what stands in part 2 before it."""
    text = path.read_text("utf-8")
    tree, imports, definitions = ast.parse(text), [], {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions |= {name.id: node for target in node.targets for name in ast.walk(target) if name_of(name)}
    blocks = {}
    for region in shared_blocks.parse(path)[0]:
        lines = range(region.line, region.line + region.body.count("\n") + 1)
        blocks[region.name] = {name for name, node in definitions.items() if node.lineno in lines}
    headings = {text[: m.start()].count("\n") + 1: (int(m[1]), int(m[2] or 0)) for m in HEADING.finditer(text)}
    sections = {section: set() for section in headings.values()}
    for name, node in definitions.items():
        sections[headings[max(line for line in headings if line <= node.lineno)]].add(name)
    return imports, definitions, blocks, sections


HEADING = re.compile(r"^# ── (\d)(?:\.(\d+))? ", re.MULTILINE)
SPAN = re.compile(r"(?:section|part)s? (\d)(?:\.(\d+))?(?: (?:to|and) (\d)(?:\.(\d+))?)?")


def name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def needs(path: Path, name: str) -> set[str]:
    """What the docstring of `name` says that it needs."""
    _, definitions, blocks, sections = parse(path)
    node = definitions[name]
    doc = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
    match = re.search(r"Needs:\s(.*?)(?:\n\n|\Z)", doc, re.DOTALL)
    text = " ".join(match[1].split()) if match else ""
    named = set(re.findall(r"`(\w+)`", text))
    assert named <= definitions.keys(), f"{name} needs {named - definitions.keys()}, which the chapter does not define"
    for part, section, last_part, last_section in SPAN.findall(text):
        first = int(part), int(section or 0)
        last = (int(last_part), int(last_section or 99)) if last_part else (first[0], int(section or 99))
        named = named.union(*(names for place, names in sections.items() if first <= place <= last))
    return named.union(*(names for block, names in blocks.items() if block in text))


def lift(path: Path, name: str) -> types.ModuleType:
    """The empty file into which a copier has put `name` and what it needs, in the chapter's order."""
    imports, definitions, *_ = parse(path)
    taken, open_ = set(), {name}
    while open_:
        taken.add(current := open_.pop())
        open_ |= needs(path, current) - taken
    nodes = sorted({id(definitions[n]): definitions[n] for n in taken}.values(), key=lambda node: node.lineno)
    module = sys.modules["copied"] = types.ModuleType("copied")  # dataclasses look for their module there
    exec(compile("\n".join([*imports, *map(ast.unparse, nodes)]), f"<{name}, copied>", "exec"), module.__dict__)
    unknown = set().union(*(mentioned(node) for node in nodes)) - vars(module).keys() - vars(builtins).keys()
    assert not unknown, f"{name} copied with what its docstring names lacks {sorted(unknown)}"
    return module


def mentioned(node: ast.stmt) -> set[str]:
    """The global names that the code of a definition loads, wherever in it."""
    source = "from __future__ import annotations\n" + ast.unparse(node)  # as in the chapters: annotations are words
    found, open_ = set(), [compile(source, "<definition>", "exec")]
    while open_:
        code = open_.pop()
        open_ += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = list(dis.get_instructions(code))
        stored = {step.argval for step in steps if step.opname == "STORE_NAME"} | {"__name__", "__annotations__"}
        found |= {step.argval for step in steps if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")} - stored
    return found


def home(path: Path, name: str) -> Path:
    """The chapter that explains `name`: the first one that has its shared block, or this one."""
    block = next((block for block, names in parse(path)[2].items() if name in names), None)
    return next(chapter for chapter in CHAPTERS if block in parse(chapter)[2] or chapter == path)


def public(path: Path) -> list[str]:
    """What one would copy: no underscore in front, and before part 6, or with a docstring that says what it needs."""
    _, definitions, _, sections = parse(path)
    defined = (node for node in definitions.values() if isinstance(node, ast.FunctionDef | ast.ClassDef))
    end = set().union(*(names for (part, _), names in sections.items() if part == 6))
    wanted = (node for node in defined if node.name not in end or "Needs:" in (ast.get_docstring(node) or ""))
    return [node.name for node in wanted if not node.name.startswith("_")]


CASES = [pytest.param(path, name, id=f"{path.stem}-{name}") for path in CHAPTERS for name in public(path)]


@pytest.mark.parametrize("path, name", CASES)
def test_it_works_in_an_empty_file(path, name, tmp_path):
    copied, chapter = lift(path, name), importlib.import_module(path.stem)
    use, results = EXAMPLES[home(path, name).stem].get(name), []
    if home(path, name) != path or not (needs(path, name) or use):
        return  # used at its home already; or it is nothing but itself, and that it mentions nothing else is the proof
    assert use, f"{name} needs something: show a use of it in examples.py"
    for module in (copied, chapter):
        torch.manual_seed(0)
        results.append(tree_leaves(use(module, tmp_path)))
    assert len(results[0]) == len(results[1]) > 0
    for here, there in zip(*results):
        assert torch.equal(here, there) if isinstance(there, torch.Tensor) else here == there
