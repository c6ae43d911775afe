# SPDX-License-Identifier: MIT-0
"""A script taken apart, in its order: headings, prose, code, and regions that chapters share."""

import ast
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import lift
import shared_blocks

HEADING = re.compile(r"# ── (?:(\d(?:\.\d+)?) )?(.+?) ─+$")
LONGEST_REMARK = 2  # lines: a longer comment directly above a statement is prose


@dataclass
class Heading:
    """`# ── 1.2 Linear layers ───`: number is "1.2", or "" where it has none."""

    number: str
    title: str
    line: int

    @property
    def is_part(self) -> bool:
        return "." not in self.number


@dataclass
class Prose:
    """A comment of whole lines, without its number signs."""

    lines: list[str]
    line: int


@dataclass
class Code:
    """Statements, in lines of the script; `name` where it is one public function or class."""

    first: int
    last: int
    name: str = ""
    is_class: bool = False


@dataclass
class Block:
    """A region: at its home the marker before its code, elsewhere all of it."""

    region: shared_blocks.Region
    line: int


Piece = Heading | Prose | Code | Block


@dataclass
class Source:
    """A script in pieces."""

    path: Path
    lines: list[str]
    docstring: str
    pieces: list[Piece] = field(default_factory=list)

    def text(self, code: Code) -> str:
        return "\n".join(self.lines[code.first - 1 : code.last])


@lru_cache
def home_of(path: Path) -> dict[str, Path]:
    """Each name of a script to the script that explains it: a carried block's home, or itself."""
    homes = {}
    for definition in lift.read(path).definitions:
        homes |= dict.fromkeys(definition.names, path)
    for region in shared_blocks.parse(path)[0]:
        lines = range(region.line, region.line + region.body.count("\n") + 1)
        for definition in lift.read(path).definitions:
            if region.kind == "carried" and definition.first in lines:
                homes |= dict.fromkeys(definition.names, lift.home_of_block(region))
    return homes


def own(path: Path) -> list[str]:
    """The public functions and classes that a script itself explains."""
    return [name for name in lift.public(path) if home_of(path)[name] == path]


@lru_cache
def read(path: Path) -> Source:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    source = Source(path, text.splitlines(), ast.get_docstring(tree) or "")
    nodes = {start_of(node): node for node in tree.body}
    regions = {region.line: region for region in shared_blocks.parse(path)[0]}
    number = 1
    if source.docstring:
        number = tree.body[0].end_lineno + 1
    comment: list[str] = []
    while number <= len(source.lines):
        line = source.lines[number - 1]
        region = regions.get(number)
        if not line.startswith("#") or HEADING.match(line) or region or "# endregion" in line:
            add_comment(source, comment, number, nodes.get(number))
            comment = []
        if region:
            source.pieces.append(Block(region, number))
            carried = region.kind == "carried"
            number += region.body.count("\n") + 2 if carried else 1
        elif number in nodes:
            number = add_code(source, nodes[number], number)
        else:
            if heading := HEADING.match(line):
                source.pieces.append(Heading(heading[1] or "", heading[2], number))
            elif line.startswith("#") and not re.match("# (endregion|SPDX)", line):
                comment.append(line[1:].removeprefix(" "))
            number += 1
    add_comment(source, comment, number, None)
    return source


def start_of(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def add_comment(source: Source, comment: list[str], end: int, node: ast.stmt | None) -> None:
    """The comment whose last line is the one before `end`, where `node` begins or nothing does."""
    if not "".join(comment).strip():
        return
    first = end - len(comment)
    before = source.pieces[-1] if source.pieces else None
    is_lecture = isinstance(before, Heading) and before.line == first - 1
    if node is None or is_lecture or len(comment) > LONGEST_REMARK:
        source.pieces.append(Prose(comment, first))
    else:
        source.pieces.append(Code(first, end - 1))


def add_code(source: Source, node: ast.stmt, first: int) -> int:
    """Adds a statement, joined to private code before it. Returns the number of the next line."""
    code = Code(first, node.end_lineno)
    if isinstance(node, lift.Definable) and not node.name.startswith("_"):
        code.name = node.name
        code.is_class = isinstance(node, ast.ClassDef)
    while source.pieces and joins(source.pieces[-1], code):
        code.first = source.pieces.pop().first
    source.pieces.append(code)
    return node.end_lineno + 1


def joins(before: Piece, code: Code) -> bool:
    """Private code stands in one block; a public definition has only its own remark with it."""
    if not isinstance(before, Code) or before.name:
        return False
    return not code.name or before.last == code.first - 1
