# SPDX-License-Identifier: MIT-0
"""Marks students' copies of the notebooks.

    make grade NOTEBOOK=mine.ipynb         which exercises are solved, and why others are not
    make grade NOTEBOOK="copies of monday" a table of marks for the notebooks in a folder

This executes the students' code, with your rights and without a sandbox: grade what you would run.

Of a copy, only the cells are taken that begin with "# exercise 1", "# exercise 2" and so on. All
else, the checks above all, comes from this repository's notebook of the same title. Each exercise
is run by itself: ranks of its own, a time limit, and afterwards every process is ended.
An answer must stand in its one cell; only the names that the exercise asks for are taken from it.
An exercise counts as solved where its check says so on every rank.
"""

import argparse
import copy
import os
import re
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import nbclient
import nbformat
import psutil

import notebooks

MARK = "TRAINING_AT_SCALE_GRADES"  # in the environment of all processes of one exercise
START_LIMIT = 180  # seconds for a cell of the notebook itself
SUMMARY = {True: "solved", False: "not solved"}


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one exercise."""

    solved: bool
    reason: str = ""  # why not; one line
    seconds: float = 0.0


class NotACopy(Exception):
    """A file is no copy of a notebook of this book; the message says why."""


def grade(path: Path, limit: float = 60) -> dict[str, Verdict]:
    """Number of each exercise to its verdict.

    Args:
        path: a copy of a notebook of this book, with answers in it.
        limit: seconds for an answer's cell, and for its check.

    Raises:
        NotACopy: the file is not a notebook, or none of this book's.
    """
    handed_in = read(path)
    original = nbformat.read(original_of(path, handed_in), as_version=4)
    answers = notebooks.exercises(handed_in)
    return {
        number: grade_exercise(original, number, answers.get(number), limit)
        for number in notebooks.exercises(original)
    }


def read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise NotACopy(f"cannot be read: {error.strerror}") from None
    except Exception as error:  # nbformat's, json's and more
        reason = str(error).strip().splitlines() or [""]
        raise NotACopy(f"is not a notebook: {type(error).__name__}: {reason[0]}") from None


def original_of(path: Path, handed_in: nbformat.NotebookNode) -> Path:
    """The notebook of this book with the same title, which is its first line."""
    title = title_of(handed_in)
    for original in notebooks.notebooks():
        if title_of(nbformat.read(original, as_version=4)) == title:
            return original
    raise NotACopy(f"its title {title!r} is none of this book's: keep the first cell as it was")


def title_of(notebook: nbformat.NotebookNode) -> str:
    text = notebook.cells[0].source if notebook.cells else ""
    return (text.splitlines() or [""])[0].strip()


def grade_exercise(
    original: nbformat.NotebookNode, number: str, answer: dict | None, limit: float
) -> Verdict:
    """Runs one answer between the cells of the original notebook that it needs."""
    if answer is None:
        return Verdict(False, f'no cell begins with "# exercise {number}"')
    stub = notebooks.exercises(original)[number].source
    code = notebooks.without_magic(answer.source)
    if code.strip() == notebooks.without_magic(stub).strip():
        return Verdict(False, "not attempted")
    try:
        compile(code, "answer", "exec")
    except SyntaxError as error:
        return Verdict(False, f"SyntaxError: {error.msg} (line {error.lineno})")

    notebook = notebook_of(original, number, code)
    cells = {cell.metadata.get("role"): cell for cell in notebook.cells}
    check = cells["check"]
    began = time.monotonic()
    broken = execute(notebook, limit)
    seconds = time.monotonic() - began
    ranks = ranks_of(original, check)
    return judged(check, number, ranks, broken, seconds, error_of(cells["answer"]))


def notebook_of(original: nbformat.NotebookNode, number: str, code: str) -> nbformat.NotebookNode:
    """The original with this answer, only the cells that it needs, and its other names kept."""
    notebook = copy.deepcopy(original)
    cell, check = notebooks.exercises(notebook)[number], notebooks.checks(notebook)[number]
    magic = notebooks.magic_of(cell.source)
    asked_for = notebooks.made(cell.source) | notebooks.made(notebooks.solutions(original)[number])
    cell.source = magic + code
    cell.metadata["role"], check.metadata["role"] = "answer", "check"
    notebook.cells = notebooks.needed(notebook, only=number)
    for kept in notebook.cells:
        kept.outputs = []  # what is printed here says nothing of this answer
    place = notebook.cells.index(cell)
    path = f"import sys; sys.path.append({str(notebooks.ROOT / 'tests/book')!r})\n"
    before = f"{magic}{path}import exercises\nexercises.remember(globals())"
    after = f"{magic}import exercises\nexercises.restore(globals(), {asked_for!r})"
    new_cell = nbformat.v4.new_code_cell
    notebook.cells[place : place + 1] = [new_cell(before), cell, new_cell(after)]
    return notebook


def execute(notebook: nbformat.NotebookNode, limit: float) -> str:
    """Executes all cells and ends every process that this started; returns what went wrong."""
    mark = f"{os.getpid()} {uuid.uuid4().hex}"  # of this grader, and of this exercise
    os.environ[MARK] = mark
    folder = {"metadata": {"path": str(notebooks.ROOT / "notebooks")}}

    def seconds(cell: dict) -> float:
        return limit if cell.metadata.get("role") else START_LIMIT

    client = nbclient.NotebookClient(
        notebook,
        timeout_func=seconds,
        iopub_timeout=60,
        coalesce_streams=True,
        resources=folder,
        allow_errors=True,
        extra_arguments=[*notebooks.QUIET],
    )
    try:
        client.execute()
    except nbclient.exceptions.CellTimeoutError:
        return f"not over after {limit:g} seconds: an endless loop, or ranks wait for each other"
    except Exception as error:  # a kernel that has ended breaks nbclient in several ways
        return f"it ended the notebook's process ({type(error).__name__})"
    finally:
        os.environ.pop(MARK)
        end_processes(mark)
    return ""


def end_processes(mark: str) -> None:
    """The kernel, the ranks and what they started: a process keeps its environment for life."""
    for _ in range(100):
        left = [process for process in psutil.process_iter() if mark_of(process) == mark]
        if not left:
            return
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=0.1)


def mark_of(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""


def ranks_of(notebook: nbformat.NotebookNode, cell: dict) -> int:
    """How many processes execute a cell, and say each its own verdict."""
    if not notebooks.magic_of(cell.source):
        return 1
    text = "".join(cell.source for cell in notebook.cells)
    return int(re.search(r"ipp\.Cluster\(n=(\d+)", text)[1])


def error_of(cell: dict) -> str:
    """The last line of the error with which a cell ended, of one rank on ranks; or ""."""
    for output in cell.outputs:
        if output.output_type == "error" and output.ename != "AlreadyDisplayedError":
            return f"{output.ename}: {output.evalue}".removesuffix(": ")
    text = "\n".join(notebooks.text_of(output) for output in cell.outputs)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # ranks print their errors in colour
    found = re.findall(r"^\w+(?:Error|Exception|Exit): .*", plain, re.MULTILINE)
    return found[-1] if found else ""


def judged(
    check: dict, number: str, ranks: int, broken: str, seconds: float, error: str = ""
) -> Verdict:
    """The verdict from what the check's cell printed, and from nothing else.

    `error` is the answer's own: where the check fails it is the reason.
    """
    oks, reasons, errors = 0, [], []
    for output in check.get("outputs", []):
        for line in notebooks.text_of(output).splitlines():
            verdict = line.partition(f"exercise {number}: ")[2]
            if verdict == "ok":
                oks += 1
            elif verdict.startswith("not solved yet"):
                reasons.append(verdict.removeprefix("not solved yet").removeprefix(": "))
        if output.output_type == "error":
            errors.append(f"{output.ename}: {output.evalue}")
    if broken or errors or reasons or oks != ranks:
        why = [error, *reasons, broken, *errors, f"{oks} of {ranks} ranks said ok"]
        return Verdict(False, next(filter(None, why)), seconds)
    return Verdict(True, "", seconds)


# ── The table of marks ────────────────────────────────────────────────────────────────────────────


def table(copies: list[Path], limit: float) -> bool:
    """Prints a row for each copy, then why exercises are not solved; True where all are."""
    reasons = []
    all_solved = True
    width = max(len(path.name) for path in copies)
    for path in copies:
        try:
            verdicts = grade(path, limit)
        except NotACopy as error:
            print(f"{path.name:{width}}  {error}", flush=True)
            all_solved = False
            continue
        solved = [number for number, verdict in verdicts.items() if verdict.solved]
        all_solved = all_solved and len(solved) == len(verdicts)
        marks = "  ".join(f"{n} {'ok' if n in solved else '–':2}" for n in verdicts)
        seconds = sum(verdict.seconds for verdict in verdicts.values())
        row = f"{path.name:{width}}  {marks}  {len(solved)} of {len(verdicts)}  {seconds:4.0f} s"
        print(row, flush=True)
        for number, verdict in verdicts.items():
            if not verdict.solved:
                reasons.append(f"{path.name}, exercise {number}: {verdict.reason}")
    print("", *reasons, sep="\n")
    return all_solved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copies", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--limit", type=float, default=60, help="seconds for an answer")
    args = parser.parse_args()
    found = []
    for path in args.copies:
        found += sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
    if not found:
        parser.error(f"no notebook (.ipynb) in {', '.join(map(str, args.copies))}")
    if missing := [str(path) for path in found if not path.exists()]:
        parser.error(f"no such file: {', '.join(missing)}")
    print("executing the code of these copies; each exercise has ranks of its own\n")
    sys.exit(0 if table(found, args.limit) else 1)


if __name__ == "__main__":
    main()
