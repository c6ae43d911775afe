# SPDX-License-Identifier: MIT-0
"""The numbers on the front door: `make numbers` runs every chapter, keeps what it saw in a file of
results, and writes it into README.md, INSTALL.md, CLAIMS.md and the chapters' READMEs. A test holds
that they say what is kept.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import measure_differences
import shared_blocks
import torch

import notebooks

ROOT = shared_blocks.ROOT
KEPT = ROOT / "notebooks/results/00_numbers.json"


def claims(output: str) -> list[list[str]]:
    """The rows of the claims table with which a chapter's output ends: claim, paper, here,
    verdict."""
    return cells(output[output.rindex("\nclaim ") + 1 :])


def cells(table: str) -> list[list[str]]:
    """The rows of a printed table, without its header. Columns begin where their names do."""
    header, *lines = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends)] for line in lines if line.strip()]


def tables(output: str) -> list[dict]:
    """What a table file printed: of each table the title and the rows, claim, paper, formula, here,
    verdict."""
    found = re.findall(
        r"^([^\n]+)\n\n(claim +paper +formula .+?)(?=\n\n|\Z)", output, flags=re.M | re.S
    )
    return [dict(title=title, rows=cells(table)) for title, table in found]


def run(path: Path) -> tuple[str, int]:
    """What a script prints, and its seconds; by itself, as a reader would run it."""
    print(f"── {path.relative_to(ROOT)}", flush=True)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout, round(time.monotonic() - begin)


# A chapter's second script, with claims of its own.
SECOND_SCRIPTS = {
    "05_mamba_hybrid": "context_parallel.py",
    "06_moe_fp8": "fp8.py",
    "07_zero_3d": "fsdp.py",
    "09_mtp": "speculate.py",
    "10_compress": "distill.py",
    "12_grpo": "thinking.py",
    "13_nemotron3": "load.py",
}


def measure_chapter(folder: Path) -> dict:
    """A chapter's claims, which its script measured, and the paper's tables, where the chapter has
    a file of them."""
    output, seconds = run(folder / f"{folder.name[3:]}.py")
    found = dict(seconds=seconds, claims=claims(output))
    if folder.name in SECOND_SCRIPTS:
        found["claims"] += claims(run(folder / SECOND_SCRIPTS[folder.name])[0])
    for path in shared_blocks.tables():
        if path.parent == folder:
            found["tables"] = tables(run(path)[0])
    return found


def measure_notebook(path: Path) -> int:
    """Its seconds."""
    print(f"── {path.relative_to(ROOT)}", flush=True)
    begin = time.monotonic()
    notebooks.execute(path)
    return round(time.monotonic() - begin)


def measure_one(kept: dict, chapter: str) -> None:
    """Runs one chapter anew, as "02", and puts what it saw in the place of what was kept of it."""
    for path in shared_blocks.chapters():
        if path.parent.name.startswith(f"{chapter}_"):
            kept["chapters"][path.parent.name] = measure_chapter(path.parent)
    for path in notebooks.notebooks(chapter):
        kept["notebooks"][path.stem] = measure_notebook(path)
    for kind in ("chapters", "notebooks"):
        kept[kind] = dict(sorted(kept[kind].items()))


def measure() -> dict:
    """Runs every chapter and every notebook once, and the tests."""
    chapters = {path.parent.name: measure_chapter(path.parent) for path in shared_blocks.chapters()}
    seconds = {path.stem: measure_notebook(path) for path in notebooks.notebooks()}
    print("── tests", flush=True)
    begin = time.monotonic()
    subprocess.run(["make", "test", f"PY={sys.executable}"], cwd=ROOT, check=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return dict(
        test_minutes=round((time.monotonic() - begin) / 60, 1),
        command="make numbers",
        machine=f"{os.cpu_count()} cores, gloo, {versions}",
        tests=f"{len(collected()):,}",
        bugs=len({name.split("[")[0] for name in collected("-m", "planted_bug")}),
        chapters=chapters,
        notebooks=seconds,
    )


def collected(*options: str) -> list[str]:
    """The tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", *options]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if "::" in line]


HEADER = ["claim", "paper", "here", "verdict"]
TABLE_HEADER = ["claim", "paper", "formula", "here", "verdict"]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *lines = (f"| {' | '.join(row)} |\n" for row in [header, *rows])
    return f"{head}|{'---|' * len(header)}\n{''.join(lines)}"


def columns(header: list[str], rows: list[list[str]]) -> str:
    """A table as a script prints it."""
    rows = [header, *rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    lines = ("".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def rendered(page: Path, kept: dict) -> str:
    """A page with the kept numbers in it: claims, seconds, and what stands between <!-- name -->
    and <!-- -->."""
    text, chapters = page.read_text("utf-8"), kept["chapters"]
    facts = {name: str(kept[name]) for name in ("command", "machine", "tests", "bugs")}
    measured = json.loads(measure_differences.RESULTS.read_text("utf-8"))
    facts["differences"] = f"\n\n{measure_differences.markdown(measured)}\n\n"
    facts["notebooks"] = ", ".join(
        f"{name} {seconds} s" for name, seconds in kept["notebooks"].items()
    )
    facts["runs"] = ", ".join(
        f"{name} {chapter['seconds']} s" for name, chapter in chapters.items()
    )
    facts["minutes"] = (
        f"{sum(chapter['seconds'] for chapter in chapters.values()) / 60:.1f} minutes"
    )
    if "test_minutes" in kept:
        facts["test minutes"] = f"{kept['test_minutes']} minutes"
    for name, chapter in chapters.items():
        text = re.sub(
            rf"^(\| \[{name}\].*\| )\d+ s \|$", rf"\g<1>{chapter['seconds']} s |", text, flags=re.M
        )
        facts[f"claims of {name}"] = f"\n\n{markdown(HEADER, chapter['claims'])}\n"
        papers = ""
        for table in chapter.get("tables", []):
            papers += f"{table['title']}:\n\n{markdown(TABLE_HEADER, table['rows'])}\n"
        facts[f"tables of {name}"] = f"\n\n{papers}"
    for name, value in facts.items():
        text = re.sub(rf"(<!-- {name} -->).*?(<!-- -->)", rf"\g<1>{value}\g<2>", text, flags=re.S)
    if chapter := chapters.get(page.parent.name):
        text = _printed(
            text, r"^claim +paper +here .*?(?=^```)", columns(HEADER, chapter["claims"])
        )
        for table in chapter.get("tables", []):
            title = re.escape(table["title"])
            text = _printed(
                text, rf"(?<={title}\n\n)claim .*?(?=^```)", columns(TABLE_HEADER, table["rows"])
            )
        text = re.sub(r"\d+ s on two cores", f"{chapter['seconds']} s on two cores", text)
    return text


def _printed(text: str, place: str, table: str) -> str:
    return re.sub(place, lambda _: table, text, flags=re.M | re.S)


def pages() -> list[Path]:
    shared = [
        ROOT / name
        for name in (
            "README.md",
            "INSTALL.md",
            "DIFFERENCES.md",
            "CLAIMS.md",
            "notebooks/README.md",
        )
    ]
    return [*shared, *sorted(ROOT.glob("[0-9][0-9]_*/README.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--render", action="store_true", help="only write the pages, from what is kept"
    )
    parser.add_argument(
        "--chapter", help="measure only this one, such as 02, and keep all else as it is"
    )
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text("utf-8"))
    if args.chapter:
        measure_one(kept, args.chapter)
    elif not args.render:
        kept = measure()
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for page in pages():
        page.write_text(rendered(page, kept), "utf-8")


if __name__ == "__main__":
    main()
