# SPDX-License-Identifier: MIT-0
"""The numbers on the front door: `make numbers` runs every chapter, keeps what it saw in a file of results, and writes
it into README.md, INSTALL.md, CLAIMS.md and the chapters' READMEs. A test holds that they say what is kept.
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
    """The rows of the claims table with which a chapter's output ends: claim, paper, here, verdict."""
    lines = output[output.rindex("\nclaim ") + 1 :].splitlines()
    starts = [lines[0].index(word) for word in ("claim", "paper", "here", "verdict")]
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends)] for line in lines[1:] if line.strip()]


def measure() -> dict:
    """Runs every chapter and every notebook once, by itself, as a reader would."""
    chapters = {}
    for path in shared_blocks.chapters():
        print(f"── {path.relative_to(ROOT)}", flush=True)
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds = round(time.monotonic() - begin)
        chapters[path.parent.name] = dict(seconds=seconds, claims=claims(done.stdout))
    seconds = {}
    for path in notebooks.notebooks():
        print(f"── {path.relative_to(ROOT)}", flush=True)
        begin = time.monotonic()
        notebooks.execute(path)
        seconds[path.stem] = round(time.monotonic() - begin)
    print("── tests", flush=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT, check=True)
    return dict(
        test_minutes=round((time.monotonic() - begin) / 60, 1),
        command="make numbers",
        machine=f"{os.cpu_count()} cores, gloo, torch {torch.__version__}, Python {platform.python_version()}",
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


def columns(rows: list[list[str]]) -> str:
    """The claims table as a chapter prints it."""
    rows = [["claim", "paper", "here", "verdict"], *rows]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(4)]
    lines = ("".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def rendered(page: Path, kept: dict) -> str:
    """A page with the kept numbers in it: claims, seconds, and what stands between <!-- name --> and <!-- -->."""
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
        table = "".join(f"| {' | '.join(row)} |\n" for row in chapter["claims"])
        facts[f"claims of {name}"] = (
            f"\n\n| claim | paper | here | verdict |\n|---|---|---|---|\n{table}\n"
        )
    for name, value in facts.items():
        text = re.sub(rf"(<!-- {name} -->).*?(<!-- -->)", rf"\g<1>{value}\g<2>", text, flags=re.S)
    if chapter := chapters.get(page.parent.name):
        table = columns(chapter["claims"])
        text = re.sub(r"^claim +paper .*?(?=^```)", lambda _: table, text, flags=re.M | re.S)
        text = re.sub(r"\d+ s on two cores", f"{chapter['seconds']} s on two cores", text)
    return text


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
    if not parser.parse_args().render:
        KEPT.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    kept = json.loads(KEPT.read_text("utf-8"))
    for page in pages():
        page.write_text(rendered(page, kept), "utf-8")


if __name__ == "__main__":
    main()
