# SPDX-License-Identifier: MIT-0
"""Shared blocks: code that several chapters carry word for word, between markers that editors fold.

    # region shared: flags                             at its home
    # region carried: flags (home: 01_deepspeech)      in every other chapter that needs it
    ...
    # endregion copy 5f3a91                            with the checksum of the copied text
    # endregion                                        at the home

`make shared` copies every block from its home to the chapters that carry it. A chapter takes a
block in by writing the two markers with nothing between them. A copy whose text no longer has its
checksum was edited where it stands: `make shared` then names the place and writes nothing at all,
because the edit would be lost. The remedy is to make the edit at the home and to empty the copy.
The checksum stands at the copy, not in a file of its own, so that it stays with its copy through
every merge. The history of git would not do: a home may be edited twice before a commit.
"""

import ast
import hashlib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = re.compile(r"# region (shared|carried): ([^()]+?)(?: \(home: ([\w/]+)\))?$")
END = re.compile(r"# endregion(?: copy (\w+))?$")
ANY_MARKER = re.compile(r"\s*#\s*(region|endregion)\b")


def chapters(root: Path = ROOT) -> list[Path]:
    """The chapters' scripts, in the order of the book: 03_pipeline/pipeline.py."""
    scripts = [folder / f"{folder.name[3:]}.py" for folder in root.glob("[0-9][0-9]_*")]
    return sorted(script for script in scripts if script.is_file())


def tables(root: Path = ROOT) -> list[Path]:
    """The scripts that print a paper's formulas and tables: 03_pipeline/pipeline_tables.py."""
    return sorted(root.glob("[0-9][0-9]_*/*_tables.py"))


def tools(root: Path = ROOT) -> list[Path]:
    """The other scripts in the folders of chapters: 03_pipeline/plan.py."""
    others = {*chapters(root), *tables(root)}
    return sorted(path for path in root.glob("[0-9][0-9]_*/*.py") if path not in others)


def carriers(root: Path = ROOT) -> list[Path]:
    """The scripts that may carry blocks: chapters and their tools."""
    return [*chapters(root), *tools(root)]


def script_of(home: str, root: Path = ROOT) -> Path:
    """The script that a home names: 05_mamba_hybrid, or its tool 05_mamba_hybrid/fast_scan."""
    folder, _, tool = home.partition("/")
    return root / folder / f"{tool or folder[3:]}.py"


@dataclass
class Region:
    """One block in one chapter."""

    path: Path
    line: int  # of its first marker, counted from 1
    kind: str  # "shared" at its home, "carried" elsewhere
    name: str
    home: str  # the folder of its home
    body: str = ""  # the lines between its markers
    checksum: str | None = None  # what the last marker says of the copied text
    closed: bool = False

    @property
    def place(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}:{self.line}: block {self.name!r}"

    @property
    def edited(self) -> bool:
        """A carried block with text of its own: what stands there is not what was copied there."""
        return (
            self.kind == "carried"
            and bool(self.body.strip())
            and self.checksum != checksum(self.body)
        )


def checksum(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8")).hexdigest()[:6]


def parse(path: Path) -> tuple[list[Region], list[str]]:
    """A chapter's blocks in order, and what is wrong with its markers."""
    found, wrong = parse_text(path, path.read_text("utf-8"))
    return list(found), list(wrong)


@lru_cache(maxsize=128)  # whoever asks for the home of every name reads each script many times
def parse_text(path: Path, text: str) -> tuple[list[Region], list[str]]:
    """The same of a text that the file has."""
    found = []
    wrong = []
    inside = None  # the region that is being read
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        start = START.match(line.rstrip("\n"))
        end = END.match(line.rstrip("\n"))
        here = f"{path.parent.name}/{path.name}:{number}"
        if start and (start[1] == "carried") == bool(start[3]):
            if inside:
                wrong.append(f"{here}: a block inside block {inside.name!r}")
            inside = Region(path, number, start[1], start[2], start[3] or path.parent.name)
            found.append(inside)
        elif end and inside:
            inside.checksum = end[1]
            inside.closed = True
            inside = None
        elif ANY_MARKER.match(line):
            wrong.append(f"{here}: not a marker of a block: {line.strip()!r}")
        elif inside:
            inside.body += line
    wrong += [f"{region.place} has no # endregion" for region in found if not region.closed]
    return found, wrong


def blocks(path: Path) -> dict[str, Region]:
    """Name to each block of a chapter, shared or carried."""
    return {region.name: region for region in parse(path)[0]}


def homes(root: Path = ROOT) -> dict[str, Region]:
    """Name to each block, as its home has it: a chapter's script, or a tool in its folder."""
    found: dict[str, Region] = {}
    for path in [*chapters(root), *tools(root)]:
        for region in parse(path)[0]:
            if region.kind == "shared":
                found.setdefault(region.name, region)
    return found


def definitions(path: Path, names: list[str]) -> str | None:
    """The text of these functions, classes and constants of a script; None where one is not there.

    Two blank lines stand around functions and classes, as ruff formats them.
    """
    if not path.is_file():
        return None
    text = path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    body = ""
    missing = set(names)
    is_block = False  # the last one is a function or a class
    for node in ast.parse(text).body:
        named = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        named.append(getattr(node, "name", None))
        found = missing.intersection(named)
        if not found:
            continue
        missing -= found
        was_block = is_block
        is_block = hasattr(node, "name")
        if body and (was_block or is_block):
            body += "\n\n"
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        body += "".join(lines[first - 1 : node.end_lineno])
    if is_block:
        body += "\n\n"
    return None if missing else body


def home_text(region: Region, home: dict[str, Region], root: Path = ROOT) -> str | None:
    """What the home of a region says: its marked block, or its definitions; None: it has neither.

    Args: home: `homes`.
    """
    marked = home.get(region.name)
    if marked and marked.home == region.home:
        return marked.body
    names = re.split(r",\s*", region.name)
    return definitions(script_of(region.home, root), names) if region.kind == "carried" else None


def complaints(root: Path = ROOT) -> list[str]:
    """What is wrong with markers: no end, or a home that does not have the block."""
    wrong = []
    home = homes(root)
    for path in carriers(root):
        regions, broken = parse(path)
        wrong += broken
        names = [region.name for region in regions]
        wrong += [
            f"{r.place} stands there twice" for n, r in enumerate(regions) if r.name in names[:n]
        ]
        for region in regions:
            if home_text(region, home, root) is not None:
                continue
            known = home.get(region.name)
            if region.kind == "shared":
                wrong.append(f"{region.place} has a home already, {known.home}")
                continue
            folder = f"; its home is {known.home}" if known else ""
            wrong.append(
                f"{region.place}: {region.home} has no '# region shared: {region.name}'{folder}"
            )
    return wrong


def refusals(root: Path = ROOT) -> list[str]:
    """Each copy that was edited where it stands, and is not what its home says."""
    home = homes(root)
    copies = [region for path in carriers(root) for region in parse(path)[0] if region.edited]
    return [
        f"{region.place} was edited here and would be lost: edit {region.home}, and empty this copy"
        for region in copies
        if region.body != home_text(region, home, root)
    ]


def copied(path: Path, home: dict[str, Region], root: Path = ROOT) -> str:
    """The text of a script with every carried block as its home has it."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for region in reversed(parse(path)[0]):
        if region.kind == "carried":
            last = region.line + region.body.count("\n")
            body = home_text(region, home, root)
            lines[region.line : last + 1] = [body, f"# endregion copy {checksum(body)}\n"]
    return "".join(lines)


def update(root: Path = ROOT) -> list[Path]:
    """Copies all blocks and returns the files that it wrote.

    Raises: ValueError where markers are wrong or a copy was edited; nothing is written then.
    """
    if wrong := complaints(root) or refusals(root):
        raise ValueError("\n".join(wrong))
    home = homes(root)
    texts = {path: copied(path, home, root) for path in carriers(root)}
    changed = [path for path, text in texts.items() if path.read_text("utf-8") != text]
    for path in changed:
        path.write_text(texts[path], "utf-8")
    return changed


def main() -> None:
    try:
        changed = update()
    except ValueError as error:
        sys.exit(str(error))
    for path in changed:
        print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
