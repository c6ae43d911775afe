# SPDX-License-Identifier: MIT-0
"""Lifts a function or class out of a chapter, with all that it needs, into a file of its own.

    make lift FROM=02 NAME=vocab_parallel_cross_entropy               prints it
    make lift FROM=02 NAME=vocab_parallel_cross_entropy TO=loss.py    writes a new file
    make lift FROM=02/pretrain NAME=save_checkpoint                   from a tool of the chapter

What is needed is read from the code: the global names that it uses, in bodies, base classes,
decorators, default values and annotations, and what the definitions of those names use in turn.
Definitions keep the chapter's order and their comments. A tool's imports from its own chapter are
replaced by the definitions themselves.
"""

import argparse
import ast
import difflib
import re
import symtable
import sys
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import shared_blocks

ROOT = shared_blocks.ROOT
Definable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Definition:
    """One statement at the top of a script that makes names."""

    node: ast.stmt
    names: set[str]
    first: int  # lines, counted from 1; with the comment directly above it
    last: int
    uses: set[str] = field(default_factory=set)


@dataclass
class Imported:
    """One name that an import at the top of a script makes."""

    node: ast.Import | ast.ImportFrom
    alias: ast.alias
    name: str


@dataclass
class Script:
    """A chapter, a tool or a table file, taken apart."""

    path: Path
    lines: list[str]
    docstring: str
    imports: list[Imported]
    definitions: list[Definition]  # in the script's order

    def named(self, name: str) -> list[Definition]:
        return [definition for definition in self.definitions if name in definition.names]

    def names(self) -> set[str]:
        return set().union(*(definition.names for definition in self.definitions))


# ── Reading a script ──────────────────────────────────────────────────────────────────────────────


@lru_cache
def read(path: Path) -> Script:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    script = Script(path, text.splitlines(), ast.get_docstring(tree) or "", [], [])
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                script.imports.append(Imported(node, alias, name))
        elif names := names_made(node):
            first = first_line(node, script.lines)
            definition = Definition(node, names, first, node.end_lineno, names_used(node))
            script.definitions.append(definition)
    return script


def first_line(node: ast.stmt, lines: list[str]) -> int:
    """Where a definition begins: at its decorators, or at the comment directly above."""
    decorators = getattr(node, "decorator_list", [])
    line = first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    while lines[line - 2].startswith("#") and not re.match(
        r"# (region|endregion|──|SPDX)", lines[line - 2]
    ):
        line -= 1
    above = lines[line - 2]
    return first if above.startswith("# ──") else line  # the text of a section stays in its chapter


def names_made(node: ast.stmt) -> set[str]:
    """The names that a statement makes, or changes: Layer.forward = ... belongs to Layer."""
    if isinstance(node, Definable):
        return {node.name}
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return set()
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    changed = [target for target in targets if isinstance(target, ast.Attribute | ast.Subscript)]
    roots = {ast.unparse(target).split(".")[0].split("[")[0] for target in changed}
    table = symtable.symtable(ast.unparse(node), "statement", "exec")
    made = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    return roots | made


def names_used(node: ast.stmt) -> set[str]:
    """The global names that a statement uses, wherever in it; annotations count."""
    scopes = [symtable.symtable(ast.unparse(node), "statement", "exec")]
    used = names_in_annotations(node)
    for scope in scopes:  # grows while it is read
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            is_global = scope is scopes[0] or symbol.is_global()
            if is_global and (symbol.is_referenced() or symbol.is_declared_global()):
                used.add(symbol.get_name())
    return used


def names_in_annotations(node: ast.stmt) -> set[str]:
    """Names that only annotations use, also in quotes: type checkers read them."""
    found = set()
    for item in ast.walk(node):
        for annotation in (getattr(item, "annotation", None), getattr(item, "returns", None)):
            if annotation is not None:
                found |= names_in(annotation)
    return found


def names_in(annotation: ast.expr) -> set[str]:
    names = set()
    for item in ast.walk(annotation):
        if isinstance(item, ast.Name):
            names.add(item.id)
        elif (
            isinstance(item, ast.Constant)
            and isinstance(item.value, str)
            and item.value.isidentifier()
        ):
            names.add(item.value)
    return names


# ── What a name needs ─────────────────────────────────────────────────────────────────────────────


def needed(script: Script, names: set[str]) -> list[Definition]:
    """The definitions of `names` and of all that they use, in the script's order."""
    taken: list[Definition] = []
    known = script.names()
    missing = set(names)
    while missing:
        for definition in script.named(missing.pop()):
            if definition not in taken:
                taken.append(definition)
                missing |= definition.uses & known
    return sorted(taken, key=lambda definition: definition.first)


def dependencies(path: Path, name: str) -> set[str]:
    """The other names of its script that `name` uses by itself."""
    script = read(path)
    return set().union(*(definition.uses for definition in script.named(name))) & script.names() - {
        name
    }


def public(path: Path) -> list[str]:
    """The functions and classes of a script without an underscore in front."""
    defined = [
        item.node.name for item in read(path).definitions if isinstance(item.node, Definable)
    ]
    return [name for name in defined if not name.startswith("_")]


def region_of(path: Path, name: str) -> shared_blocks.Region | None:
    (definition, *_) = read(path).named(name)
    for region in shared_blocks.parse(path)[0]:
        if region.line < definition.first <= region.line + region.body.count("\n"):
            return region
    return None


def block(path: Path, name: str) -> str | None:
    """The shared block in which `name` is defined."""
    region = region_of(path, name)
    return region and region.name


def home(path: Path, name: str) -> Path:
    """The script where `name` is explained: the home of its shared block, or this one."""
    region = region_of(path, name)
    if not region or region.kind == "shared":
        return path
    return home_of_block(region)


@lru_cache
def homes() -> dict[str, shared_blocks.Region]:
    """Every block of the book at its home; read once, as `read` reads each script once."""
    return shared_blocks.homes()


def home_of_block(region: shared_blocks.Region) -> Path:
    """The script from which a block is carried; it may be a tool."""
    marked = homes().get(region.name)
    if marked and marked.home == region.home:
        return marked.path
    return shared_blocks.script_of(region.home)


# ── Writing a file ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Piece:
    """A definition as it stands in the new file."""

    text: str
    is_block: bool  # a function or a class, which stands between two blank lines
    follows: bool = False  # it stood in the next line after the one before


def pieces(
    script: Script, definitions: list[Definition], modules: set[str] = frozenset()
) -> list[Piece]:
    """The text of the definitions.

    Attributes of `modules` stand in the new file itself and lose their prefix.
    """
    made = []
    last = None
    for definition in definitions:
        text = "\n".join(script.lines[definition.first - 1 : definition.last])
        for module in modules:
            text = without_prefix(text, module)
        made.append(Piece(text, isinstance(definition.node, Definable), definition.first == last))
        last = definition.last + 1
    return made


def without_prefix(text: str, module: str) -> str:
    """`tp.GPT` to `GPT`, in code and nowhere else."""
    lines = [line.encode("utf-8") for line in text.split("\n")]
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    found = [node for node in found if isinstance(node.value, ast.Name) and node.value.id == module]
    for node in sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line[: node.col_offset] + line[node.col_offset + len(module) + 1 :]
    return b"\n".join(lines).decode("utf-8")


def attributes(definitions: list[Definition], module: str) -> set[str]:
    """The names that code takes from a module: GPT of tp.GPT."""
    found = [
        node
        for item in definitions
        for node in ast.walk(item.node)
        if isinstance(node, ast.Attribute)
    ]
    return {
        node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == module
    }


def import_lines(imports: list[Imported], uses: set[str], text: str) -> list[str]:
    """The imports that the code uses, with the used names only; the standard library's first."""
    found = []
    others = False  # than the standard library's
    for node in {id(item.node): item.node for item in imports}.values():
        used = [item.alias for item in imports if item.node is node and item.name in uses]
        if isinstance(node, ast.Import):  # import torch.distributed makes the name torch
            used = [
                alias
                for alias in used
                if alias.asname or "." not in alias.name or alias.name in text
            ]
            line = f"import {', '.join(ast.unparse(alias) for alias in used)}"
        else:
            names = [ast.unparse(alias) for alias in used]
            line = f"from {'.' * node.level}{node.module or ''} import {', '.join(names)}"
            if len(line) > 100:
                listed = "".join(f"    {name},\n" for name in names)
                line = f"from {node.module} import (\n{listed})"
        if used and not others and found and not is_standard(node):
            found.append("")
        others = others or (bool(used) and not is_standard(node))
        if used:
            found.append(line)
    return found


def module_of(item: Imported) -> str | None:
    return item.node.module if isinstance(item.node, ast.ImportFrom) else None


def identity(item: Imported) -> tuple:
    """What is imported, from where and under which name: a file imports it once."""
    return module_of(item), item.alias.name, item.name


def is_standard(node: ast.Import | ast.ImportFrom) -> bool:
    module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
    return (module or "").split(".")[0] in sys.stdlib_module_names


def header(script: Script, name: str) -> str:
    """The licence, and where the code is from."""
    where = f"{name} and what it needs, from {script.path.parent.name}/{script.path.name}"
    paper = re.search(
        r"^Papers?: *(.*?)(?:\n\n|\Z)", read(chapter_of(script.path)).docstring, re.M | re.S
    )
    lines = [where, *(" ".join(line.split()) for line in (paper[1].splitlines() if paper else []))]
    comment = [part for line in lines for part in textwrap.wrap(line, 97)]
    return "\n".join(["# SPDX-License-Identifier: MIT-0", *(f"# {line}" for line in comment)])


def lift(path: Path, name: str) -> str:
    """The text of a file that works alone.

    Raises: ValueError for a name that the script does not define.
    """
    script = read(path)
    check_name(script, name)
    own = needed(script, {name})
    chapter = read(chapter_of(path))
    wanted, modules = taken_from_chapter(script, own, chapter.path.stem)
    others = needed(chapter, wanted) if wanted else []
    if both := set().union(*(item.names for item in own)) & set().union(
        *(item.names for item in others)
    ):
        raise ValueError(
            f"{path.name} and {chapter.path.name} both define {sorted(both)}: rename one of the two"
        )
    body = pieces(chapter, others) + pieces(script, own, modules)
    return assembled(script, chapter, name, own + others, body)


def taken_from_chapter(
    script: Script, own: list[Definition], chapter: str
) -> tuple[set[str], set[str]]:
    """What a tool's definitions use of its chapter, and their names for the chapter's module."""
    uses = set().union(*(definition.uses for definition in own))
    imports = [item for item in script.imports if item.name in uses]
    modules = {
        item.name
        for item in imports
        if isinstance(item.node, ast.Import) and item.alias.name == chapter
    }
    direct = [item for item in imports if module_of(item) == chapter]
    if renamed := [item.alias.name for item in direct if item.alias.asname]:
        raise ValueError(
            f"{script.path.name} imports {renamed} under other names: a lifted file cannot"
        )
    wanted = {item.name for item in direct}
    return wanted.union(*(attributes(own, module) for module in modules)), modules


def assembled(
    script: Script, chapter: Script, name: str, taken: list[Definition], body: list[Piece]
) -> str:
    """Licence, imports and pieces as one text."""
    uses = set().union(*(definition.uses for definition in taken))
    text = "\n".join(piece.text for piece in body)
    chapter_name = chapter.path.stem
    imports = [
        item
        for item in script.imports
        if item.alias.name != chapter_name and module_of(item) != chapter_name
    ]
    names = {item.name for item in imports}
    more = [item for item in chapter.imports if item.name not in names]  # a tool may have them too
    sources = [imports] if script is chapter else [imports, more]
    top = [header(script, name)]
    if "__doc__" in uses:
        top.append(f'"""{script.docstring.splitlines()[0]}"""')
    if any(item.alias.name == "annotations" for item in script.imports) and has_annotations(taken):
        top.append("\nfrom __future__ import annotations")
    imported: set[tuple] = set()
    for imports in sources:
        left = [item for item in imports if identity(item) not in imported]
        lines = import_lines(left, uses, text)
        if lines:
            top.append("")
        top += lines
        imported |= {identity(item) for item in imports}
    return "\n".join(top).rstrip() + joined(body)


def has_annotations(taken: list[Definition]) -> bool:
    return any(
        getattr(node, "annotation", None) or getattr(node, "returns", None)
        for definition in taken
        for node in ast.walk(definition.node)
    )


def joined(body: list[Piece]) -> str:
    text = ""
    before = None
    for piece in body:
        if piece.is_block or before is None or before.is_block:
            text += "\n\n\n" if piece.is_block or before is not None else "\n\n"
        else:
            text += "\n" if piece.follows else "\n\n"
        text += piece.text
        before = piece
    return text + "\n"


# ── The command ───────────────────────────────────────────────────────────────────────────────────


def chapter_of(path: Path) -> Path:
    return path.parent / f"{path.parent.name[3:]}.py"


def spellings() -> dict[str, Path]:
    """All that FROM may be: 2, 02, 02_megatron_tp, megatron_tp, 02/pretrain, pretrain ..."""
    found = {}
    for path in [*shared_blocks.chapters(), *shared_blocks.tools(), *shared_blocks.tables()]:
        number = path.parent.name[:2]
        folders = (number.lstrip("0"), number, path.parent.name)
        found |= {f"{folder}/{path.stem}": path for folder in folders}
        found[path.stem] = path
        if path == chapter_of(path):
            found |= dict.fromkeys(folders, path)
    return found


def find(source: str) -> Path:
    """The script that FROM means. Raises ValueError with the near misses."""
    known = spellings()
    plain = source.strip().rstrip("/").removesuffix(".py")
    if plain in known:
        return known[plain]
    near = {label(known[match]): None for match in difflib.get_close_matches(plain, known, n=3)}
    near = near or [path.parent.name for path in shared_blocks.chapters()]
    raise ValueError(f"FROM={source}: no such chapter or tool; there is {', '.join(near)}")


def label(path: Path) -> str:
    """What FROM is for a script: 02_megatron_tp, 02_megatron_tp/pretrain."""
    return path.parent.name if path == chapter_of(path) else f"{path.parent.name}/{path.stem}"


def check_name(script: Script, name: str) -> None:
    if name in script.names():
        return
    near = difflib.get_close_matches(name, script.names(), n=3, cutoff=0.5)
    others = [path for path in shared_blocks.chapters() if name in read(path).names()]
    near += [f"{name} of {path.parent.name}" for path in others]
    hint = f"; near: {', '.join(near)}" if near else ""
    raise ValueError(
        f"NAME={name}: {script.path.parent.name}/{script.path.name} does not define it{hint}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", metavar="FROM", help="2, 02, 02_megatron_tp, or a tool: 02/pretrain"
    )
    parser.add_argument("name", metavar="NAME", help="a function, a class or a constant")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="a new file; without it the text is printed"
    )
    args = parser.parse_args()
    try:
        if not args.source or not args.name:
            raise ValueError("what from where? make lift FROM=02 NAME=vocab_parallel_cross_entropy")
        text = lift(find(args.source), args.name)
        if args.to is None:
            print(text, end="")
            return
        with args.to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        sys.exit(f"TO={args.to}: there is such a file; nothing is written")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
