# SPDX-License-Identifier: MIT-0
"""Executes notebooks from top to bottom: `make notebooks` on copies, `make notebooks SAVE=1`
rewrites the kept outputs.

An exercise is a heading and three cells: one to fill in, which begins with "# exercise 1" (after
its %%px line, if it has one); one that checks it by exercises.check(1, ...); and a folded solution,
a Markdown cell with "Solution 1" and one block of Python.
"""

import argparse
import ast
import re
import symtable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = re.compile(r"^%%px|^cluster = ", re.MULTILINE)  # in the cells that start the ranks
QUIET = ["--log-level=CRITICAL"]  # of a kernel: no remark on its transport, nor on being ended
CHECK = r"(?:exercises|hunt)\.check\((\d+),"  # in the cell that checks an exercise


def notebooks(chapter: str = "") -> list[Path]:
    return sorted((ROOT / "notebooks").glob(f"{chapter or '[0-9][0-9]'}_*.ipynb"))


def execute(path: Path) -> dict:
    """The executed notebook, in memory. Raises where a cell fails."""
    import nbclient  # a second of CPU, which ranks that import front_door do not spend
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, coalesce_streams=True, resources=folder, extra_arguments=[*QUIET]
    )
    client.execute()
    return notebook


def exercises(notebook) -> dict[str, dict]:
    """Number to the cell that is to be filled in."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            match = re.match(r"# exercise (\d+)", without_magic(cell.source))
            if match:
                found[match[1]] = cell
    return found


def checks(notebook) -> dict[str, dict]:
    """Number to the cell that checks the answer."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (match := re.search(CHECK, cell.source)):
            found.setdefault(match[1], cell)
    return found


def solutions(notebook) -> dict[str, str]:
    """Number to the code of the folded solution."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"Solution (\d+)", cell.source)):
            found[match[1]] = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]
    return found


def magic_of(source: str) -> str:
    """The line that sends a cell to the ranks, if it begins with one."""
    return source.partition("\n")[0] + "\n" if source.startswith("%%px") else ""


def without_magic(source: str) -> str:
    return source.removeprefix(magic_of(source))


def answer(notebook, number: str, code: str) -> None:
    """Puts an answer into the cell of its exercise."""
    cell = exercises(notebook)[number]
    cell.source = magic_of(cell.source) + code


def solve(notebook) -> None:
    """Puts every folded solution into its cell."""
    for number, code in solutions(notebook).items():
        answer(notebook, number, code)


def needed(notebook, only: str = "") -> list[dict]:
    """The cells that exercises need, or that one of them does: themselves and their checks; the
    cells before the first heading; for each name that one of these mentions the cell that made it
    last; and those that start and stop the ranks, where something is executed on ranks."""
    cells, wanted = notebook.cells, set()
    code = [number for number, cell in enumerate(cells) if cell.cell_type == "code"]
    first = next(
        n
        for n, cell in enumerate(cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    )
    tasks = set()  # to fill in, and to check
    for found in (exercises(notebook), checks(notebook)):
        tasks |= {cells.index(cell) for number, cell in found.items() if only in ("", number)}
    others = {cells.index(cell) for cell in exercises(notebook).values()} - tasks
    code = [number for number in code if number not in others]
    of_ranks = {n for n in code if n < first and RANKS.search(cells[n].source)} | {code[-1]}
    open_ = {n for n in code if n < first} - of_ranks | tasks
    on_ranks = {n: cells[n].source.startswith("%%px") for n in code}
    while open_:
        wanted.add(cell := open_.pop())
        if on_ranks[cell] or "engines" in cells[cell].source:
            open_ |= of_ranks - wanted
        mentioned, fetched = _mentioned(cells[cell].source)
        for name, side in [(n, on_ranks[cell]) for n in mentioned] + [
            (n, True) for n in fetched if not on_ranks[cell]
        ]:
            makers = [
                n
                for n in code
                if n < cell and on_ranks[n] == side and name in made(cells[n].source)
            ]
            open_ |= set(makers[-1:]) - wanted
    return [cells[n] for n in sorted(wanted)]


def _statements(source: str) -> list[tuple[ast.stmt, symtable.SymbolTable]]:
    """Each statement of a cell, and what Python's own compiler knows of its names."""
    statements = ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE)).body
    return [
        (statement, symtable.symtable(ast.unparse(statement), "cell", "exec"))
        for statement in statements
    ]


def _assigned(table: symtable.SymbolTable) -> set[str]:
    return {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported()
    }


def made(source: str) -> set[str]:
    """The names that a cell makes."""
    return set().union(*(_assigned(table) for _, table in _statements(source)))


def _mentioned(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell needs from before, and the words in it, some of which may be fetched
    from the ranks: engines[0]["losses"]."""
    mentioned, made = set(), set()
    for statement, table in _statements(source):
        if isinstance(statement, ast.For | ast.With):  # what they assign comes before what they use
            made |= _assigned(table)
        scopes = [table]
        for scope in scopes:
            scopes += scope.get_children()
            used = (
                s
                for s in scope.get_symbols()
                if s.is_referenced() and (scope is table or s.is_global())
            )
            mentioned |= {s.get_name() for s in used} - made
        made |= _assigned(table)
    return mentioned, set(re.findall(r"""["'](\w+)["']""", source))


def text_of(output) -> str:
    """What an output printed; what ranks print comes as data, one output a rank."""
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def printed(notebook) -> str:
    """All text that the cells printed."""
    return "".join(text_of(output) for cell in notebook.cells for output in cell.get("outputs", []))


def tidy(notebook) -> None:
    """Takes out what differs from one execution to the next: versions, times, progress bars, the
    order of ranks."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata.pop("widgets", None)  # the state of progress bars
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            shown = [
                output
                for output in cell.outputs
                if "widget" not in " ".join(output.get("data", {}))
            ]
            cell.outputs = sorted(
                shown, key=lambda output: text_of(output) if "[std" in text_of(output) else ""
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", default="")
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebooks")
    args = parser.parse_args()
    import nbformat

    if not notebooks(args.chapter):
        raise SystemExit(f"no notebook of chapter {args.chapter}")
    for path in notebooks(args.chapter):
        print(f"── {path.relative_to(ROOT)}", flush=True)
        notebook = execute(path)
        for number in exercises(notebook):
            if f"exercise {number}: not solved yet" not in printed(notebook):
                raise SystemExit(f"{path.name}: exercise {number} passes before it is solved")
        if args.save:
            tidy(notebook)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
