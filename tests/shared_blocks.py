# SPDX-License-Identifier: MIT-0
"""Shared blocks: what several chapters carry word for word, between two marker comments.

    # ── shared: launcher ──
    ...
    # ── end of launcher ──

A block's home is the first chapter, in reading order, in which it stands. `make shared` copies every block from its
home to the other chapters; a chapter takes a block in by writing the two markers with nothing between them.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^# ── shared: (?P<name>.+?) ──\n(?P<body>.*?)^# ── end of (?P=name) ──\n", re.MULTILINE | re.DOTALL
)


def chapters() -> list[Path]:
    return sorted(ROOT.glob("[0-9][0-9]_*/[a-z]*.py"))


def blocks(path: Path) -> dict[str, str]:
    """Name to text of each shared block of a chapter."""
    return {match["name"]: match["body"] for match in BLOCK.finditer(path.read_text("utf-8"))}


def homes() -> dict[str, str]:
    """Name to text of each block, as its home has it."""
    found: dict[str, str] = {}
    for path in chapters():
        for name, body in blocks(path).items():
            if body.strip():  # two markers with nothing between them ask for the block, they are not its home
                found.setdefault(name, body)
    return found


def own_code(path: Path) -> list[str]:
    """The lines of parts 0 to 5 that are code; a block that is carried counts in its home alone."""
    text, earlier = path.read_text("utf-8"), [blocks(other) for other in chapters() if other < path]
    for name, body in blocks(path).items():
        if any(name in other for other in earlier):
            text = text.replace(body, "")
    text = text[: text.index("\n# ── 6 ")]
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            for number in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[number] = ""
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def main() -> None:
    home = homes()
    for path in chapters():
        text = path.read_text("utf-8")
        copied = BLOCK.sub(
            lambda m: f"# ── shared: {m['name']} ──\n{home[m['name']]}# ── end of {m['name']} ──\n", text
        )
        if copied != text:
            path.write_text(copied, "utf-8")
            print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
