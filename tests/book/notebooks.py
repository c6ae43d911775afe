# SPDX-License-Identifier: MIT-0
"""Executes notebooks from top to bottom: `make notebooks` on copies, `make notebooks SAVE=1`
rewrites the kept outputs, `make grade NOTEBOOK=mine.ipynb` says which exercises of a student's copy
are solved.

An exercise is three cells: one to fill in, which begins with "# exercise 1" (behind a %%px line, if
it has one); one that checks it and prints "exercise 1: ok" or "exercise 1: not solved yet"; and a
folded solution, a Markdown cell with "Solution 1" and one block of Python.
"""

import argparse
import ast
import re
import symtable
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[2]


def notebooks(chapter: str = "") -> list[Path]:
    return sorted((ROOT / "notebooks").glob(f"{chapter or '[0-9][0-9]'}_*.ipynb"))


def client(notebook: nbformat.NotebookNode, go_on: bool = False) -> nbclient.NotebookClient:
    """A copy elsewhere finds the chapters from the folder of the notebooks."""
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=folder, allow_errors=go_on)


def execute(path: Path, go_on: bool = False) -> nbformat.NotebookNode:
    """The executed notebook, in memory. Raises where a cell fails, or goes on with the next."""
    notebook = nbformat.read(path, as_version=4)
    client(notebook, go_on).execute()
    return notebook


def solved(path: Path) -> nbformat.NotebookNode:
    """The notebook with its exercises solved, without the cells that they can do without."""
    notebook = nbformat.read(path, as_version=4)
    solve(notebook)
    notebook.cells = needed(notebook)
    return notebook


# In the kernel of a Session: the second notebook that makes a cluster gets that of the first, with
# ranks that have imported torch. No name of one notebook is left for the next.
PRELUDE = """
import ipyparallel as ipp

def kept_cluster(Cluster):
    class KeptCluster:
        started = []  # the cluster and its client

        def __init__(self, **options):
            self.options = options

        def start_and_connect_sync(self, activate=True):
            if not self.started:
                cluster = Cluster(**self.options)
                self.started += cluster, cluster.start_and_connect_sync()
            client = self.started[1]
            client[:].clear(block=True)
            client.activate()
            return client

        def stop_cluster_sync(self):
            pass

        def stop_at_last(self):
            if self.started:
                self.started[0].stop_cluster_sync()

    return KeptCluster

ipp.Cluster = kept_cluster(ipp.Cluster)
"""
STOP = "import ipyparallel as ipp\nipp.Cluster().stop_at_last()"


class Session:
    """`with Session() as session:` executes one notebook after the other in one kernel, with one
    set of ranks, which saves the seconds that each start takes."""

    def __enter__(self) -> "Session":
        self.client = client(nbformat.v4.new_notebook())
        self.kernel = self.client.setup_kernel()
        self.kernel.__enter__()
        self.run([nbformat.v4.new_code_cell(PRELUDE)])
        return self

    def __exit__(self, *error) -> None:
        try:
            self.run([nbformat.v4.new_code_cell(STOP)])
        finally:
            self.kernel.__exit__(*error)

    def run(self, cells: list[nbformat.NotebookNode]) -> str:
        """What these cells print, as those of a notebook. Raises where one fails."""
        self.client.nb.cells = [nbformat.v4.new_code_cell("%reset -f"), *cells]
        for number, cell in enumerate(self.client.nb.cells):
            self.client.execute_cell(cell, number)
        return printed(self.client.nb)


def grade(path: Path) -> dict[str, bool]:
    """Number of each exercise of a notebook to whether its check, which runs here and now, finds it
    solved."""
    text = printed(notebook := execute(path, go_on=True))
    return {number: f"exercise {number}: ok" in text for number in exercises(notebook)}


def exercises(notebook) -> dict[str, dict]:
    """Number to the cell that is to be filled in."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (
            match := re.match(r"(?:%%px.*\n)?# exercise (\d+)", cell.source)
        ):
            found[match[1]] = cell
    return found


def solve(notebook) -> None:
    """Puts every folded solution into its cell."""
    cells = exercises(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"Solution (\d+)", cell.source)):
            code = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]
            magic = (
                cells[match[1]].source.split("\n")[0]
                if cells[match[1]].source.startswith("%%px")
                else ""
            )
            cells[match[1]].source = f"{magic}\n{code}" if magic else code


def needed(notebook) -> list[dict]:
    """The cells that exercises need: themselves and their checks; the cells before the first
    heading and the last one, which start and stop the ranks; and for each name that one of these
    mentions the cell that made it last."""
    cells, wanted = notebook.cells, set()
    code = [number for number, cell in enumerate(cells) if cell.cell_type == "code"]
    first = next(
        n
        for n, cell in enumerate(cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    )
    tasks = {
        n for n in code if re.search(r"# exercise \d|exercise \d+:", cells[n].source)
    }  # to fill in, and to check
    open_ = {n for n in code if n < first} | {code[-1]} | tasks
    on_ranks = {n: cells[n].source.startswith("%%px") for n in code}
    while open_:
        wanted.add(cell := open_.pop())
        mentioned, fetched = _mentioned(cells[cell].source)
        for name, side in [(n, on_ranks[cell]) for n in mentioned] + [
            (n, True) for n in fetched if not on_ranks[cell]
        ]:
            makers = [
                n
                for n in code
                if n < cell and on_ranks[n] == side and name in _made(cells[n].source)
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


def _made(source: str) -> set[str]:
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
    parser.add_argument(
        "--grade",
        type=Path,
        metavar="FILE",
        help="only say which exercises of this copy are solved",
    )
    args = parser.parse_args()
    if args.grade:
        for number, solved in grade(args.grade).items():
            print(f"exercise {number}: {'solved' if solved else 'not solved'}")
        return
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
