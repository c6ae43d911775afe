# SPDX-License-Identifier: MIT-0
"""Writes the notebooks for students: without solutions, outputs, and answers in the checks.

    make handout TO=folder                 all notebooks
    make handout TO=folder CHAPTER=02      one

Where a notebook had a folded solution, nothing is left. Where it had the code of a check, one line
runs the check of this repository's notebook. A handout works in any folder, with the interpreter
in which this project is installed (`make lab`), and `make grade` marks it.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat

import notebooks

SOLUTION = re.compile(r"<details><summary>Solution \d+</summary>.*?</details>\n*", re.DOTALL)


def handout(path: Path) -> nbformat.NotebookNode:
    """A notebook without solutions, checks and outputs."""
    notebook = nbformat.read(path, as_version=4)
    for number, cell in notebooks.checks(notebook).items():
        call = f'exercises.check_of("{path.stem}", {number})'
        cell.source = f"import exercises\n\n{call}"
    kept = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = SOLUTION.sub("", cell.source)
        if cell.source.strip():
            kept.append(cell)
    notebook.cells = kept
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chapter", default="")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    found = notebooks.notebooks(args.chapter)
    if not found:
        parser.error(f"no notebook of chapter {args.chapter}")
    taken = [args.to / path.name for path in found if (args.to / path.name).exists()]
    if taken:
        parser.error(f"{taken[0]} exists, and may hold somebody's answers: name another folder")
    args.to.mkdir(parents=True, exist_ok=True)
    for path in found:
        written = handout(path)
        nbformat.write(written, args.to / path.name)
        print(f"{args.to / path.name}: {len(notebooks.exercises(written))} exercises")


if __name__ == "__main__":
    sys.exit(main())
