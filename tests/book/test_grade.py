# SPDX-License-Identifier: MIT-0
"""Exercises: right answers are taken in other forms too, wrong ones are not; and copies are graded.

tests/book/answers holds, for each notebook, answers that its checks must take or refuse.
"""

import importlib.util
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import exercises
import grade
import handout
import hunt
import nbclient
import nbformat
import psutil
import pytest
import torch

import notebooks

NOTEBOOKS = {path.stem: path for path in notebooks.notebooks()}


def answers_of(name: str) -> ModuleType:
    path = Path(__file__).parent / "answers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"answers_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_can_be_read_on_a_page(name):
    """No code line is over 100 columns, and each exercise has its heading."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    long = [line for source in code for line in source.splitlines() if len(line) > 100]
    assert not long
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for number in notebooks.exercises(notebook):
        assert re.search(rf"^### Exercise {number}\b", text, re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_exercise_has_answers_of_both_kinds(name):
    """At least two wrong ones and, besides the solution, another right one; none twice."""
    answers = answers_of(name)
    for number in notebooks.exercises(nbformat.read(NOTEBOOKS[name], as_version=4)):
        right = [code for exercise, _, code in answers.RIGHT if exercise == number]
        wrong = [code for exercise, _, code in answers.WRONG if exercise == number]
        assert len(right) >= 1 and len(set(right + wrong)) == len(right) + len(wrong)
        assert len(wrong) >= (1 if name == "00_find_the_bug" else 2), f"exercise {number}"


def to_try(name: str) -> tuple[nbformat.NotebookNode, list[dict], list]:
    """A notebook with its solutions; the cells that its exercises need, and then every answer
    followed by its check; and the answers: exercise, what it is, whether it is right, the cell of
    its check."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    notebooks.solve(notebook)
    cells = notebooks.needed(notebook)
    tasks, checks = notebooks.exercises(notebook), notebooks.checks(notebook)
    answers = answers_of(name)
    added, tries = [], []
    for right, cases in ((True, answers.RIGHT), (False, answers.WRONG)):
        for number, what, code in cases:
            magic = notebooks.magic_of(tasks[number].source)
            check = nbformat.v4.new_code_cell(checks[number].source)
            added += [nbformat.v4.new_code_cell(magic + code), check]
            tries.append((number, what, right, check))
    if "stop_cluster" in cells[-1].source:
        added.append(cells.pop())
    return notebook, [*cells, *added], tries


# A reset looks for garbage: not among all that has been imported.
RESET = "import gc\ngc.freeze()\n%reset -f"

# Starting ranks takes longer than all answers of a notebook. So notebooks share them: one cluster
# of each size, whose names are taken away before the next notebook.
SHARE = """
import ipyparallel as ipp

class Shared:
    start, running, reset = ipp.Cluster, {}, RESET

    def __init__(self, n, **options):
        if n not in self.running:
            self.running[n] = self.start(n=n, **options)
            self.running[n].client = self.running[n].start_and_connect_sync()
        self.client = self.running[n].client

    def start_and_connect_sync(self, activate):
        self.client[:].execute(self.reset, block=True)
        view = self.client[:]
        view.block = True
        view.activate()
        return self.client

    def stop_cluster_sync(self):
        pass

ipp.Cluster = Shared
"""
STOP = """
import ipyparallel as ipp

for cluster in ipp.Cluster.running.values():
    cluster.stop_cluster_sync()
"""


def tried(names: list[str]) -> dict[str, tuple[nbformat.NotebookNode, list]]:
    """These notebooks, executed one after the other in one kernel and on shared ranks; and the
    answers that were tried in each."""
    found = {name: to_try(name) for name in names}
    new_cell = nbformat.v4.new_code_cell
    cells = [new_cell(f"RESET = {RESET!r}\n{SHARE}")]
    for name in names:
        cells += [new_cell(RESET), *found[name][1]]
    cells.append(new_cell(STOP))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # two notebooks may have the same
    together = nbformat.v4.new_notebook(cells=cells)
    together.metadata = nbformat.read(NOTEBOOKS[names[0]], as_version=4).metadata
    folder = {"metadata": {"path": str(notebooks.ROOT / "notebooks")}}
    client = nbclient.NotebookClient(
        together,
        timeout=300,
        iopub_timeout=60,
        coalesce_streams=True,
        resources=folder,
        allow_errors=True,
    )
    client.execute()
    return {name: (notebook, tries) for name, (notebook, _, tries) in found.items()}


def graded(path: Path, limit: float) -> tuple[dict[str, grade.Verdict], str, list[str]]:
    """The verdicts on a copy, what a kernel wrote to the terminal, and what is left afterwards of
    the processes that graded it."""
    errors = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            verdicts = grade.grade(path, limit)
        finally:
            os.dup2(errors, 2)
        file.seek(0)
        written = file.read()
    marks = {process: grade.mark_of(process) for process in psutil.process_iter()}
    left = [str(p) for p, mark in marks.items() if mark.startswith(f"{os.getpid()} ")]
    return verdicts, written, left


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Name of each notebook and copy that is to be tested to its execution. One process executes
    the notebooks and another the copies, since much of what each does is to wait for ranks."""
    asked_for = {
        test: [x.callspec.params["name"] for x in request.session.items if x.function is test]
        for test in (test_each_answer_gets_its_verdict, test_a_copy_is_graded)
    }
    names = asked_for[test_each_answer_gets_its_verdict]
    folder, found = tmp_path_factory.mktemp("copies"), {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        if names:
            found |= dict.fromkeys(names, pool.submit(tried, names))
        for name in asked_for[test_a_copy_is_graded]:
            number, code, reason = COPIES[name]
            limit = 8 if "not over" in reason else 60
            found[name] = pool.submit(graded, a_copy(folder, name, number, code), limit)
        yield found


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one waits for all notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_answer_gets_its_verdict(name, runs):
    """The solutions, the other right answers, and the wrong ones, on one set of ranks."""
    notebook, tries = runs[name].result()[name]
    checks = notebooks.checks(notebook)
    assert len(checks) >= 3
    for number, check in checks.items():
        verdict = grade.judged(check, number, grade.ranks_of(notebook, check), "", 0)
        assert verdict.solved, f"solution {number}: {verdict.reason}"
    for number, what, right, check in tries:
        verdict = grade.judged(check, number, grade.ranks_of(notebook, check), "", 0)
        assert verdict.solved == right, f"exercise {number}, {what}: {verdict.reason}"


# ── Copies ────────────────────────────────────────────────────────────────────────────────────────

COPIES = {  # exercise, answer, what the reason must say
    "prints that it is right": (
        "3",
        'print("exercise 3: ok")\n'
        "print = lambda *words: __builtins__.print('exercise 3: ok')\n"
        "def log_probs(logits_Tv, targets_T):\n"
        '    print("exercise 3: ok")\n'
        "    raise SystemExit",
        "SystemExit",
    ),
    "takes the check away": (
        "3",
        "import exercises\n"
        "exercises.equal = lambda *words: None\n"
        "torch.as_tensor = lambda *words, **more: torch.zeros(())\n"
        "def log_probs(logits_Tv, targets_T):\n    return logits_Tv[:, 0]",
        "logits times 1: got",
    ),
    "ranks wait for each other": (
        "3",
        "def log_probs(logits_Tv, targets_T):\n"
        "    if rank:\n        dist.barrier()\n"
        "    else:\n        import time\n        time.sleep(1000)",
        "not over after 8 seconds",
    ),
    "ends its process": (
        "3",
        "def log_probs(logits_Tv, targets_T):\n    import os\n    os._exit(0)",
        "",
    ),
}


def a_copy(folder: Path, name: str, number: str = "", code: str = "") -> Path:
    """Chapter 11's notebook, which has the fewest ranks, with one answer."""
    notebook = nbformat.read(NOTEBOOKS["11_preference"], as_version=4)
    if number:
        notebooks.answer(notebook, number, f"# exercise {number}\n{code}")
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_graded(name, runs):
    """Also where an answer would be taken for right by its output, or does not end."""
    number, _, reason = COPIES[name]
    verdicts, written, left = runs[name].result()
    assert list(verdicts) == ["1", "2", "3"]
    assert verdicts["1"].reason == "not attempted"
    assert not verdicts[number].solved
    assert reason in verdicts[number].reason
    assert not written and not left


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_check_of_an_exercise_is_executed_last(name):
    """Between an answer and its check there may be other cells; the verdict is the check's."""
    original = nbformat.read(NOTEBOOKS[name], as_version=4)
    for number, check in notebooks.checks(original).items():
        code = notebooks.without_magic(notebooks.exercises(original)[number].source)
        cells = grade.notebook_of(original, number, code).cells
        roles = [cell.metadata.get("role") for cell in cells]
        assert roles.index("answer") < roles.index("check")
        assert not any(cell.outputs for cell in cells if cell.cell_type == "code")
        assert cells[roles.index("check")].source == check.source


def test_ranks_are_started_where_an_exercise_needs_them():
    original = nbformat.read(NOTEBOOKS["03_pipeline"], as_version=4)
    starts = {
        number: any("ipp.Cluster(" in cell.source for cell in notebooks.needed(original, number))
        for number in notebooks.exercises(original)
    }
    assert starts == {"1": False, "2": True, "3": False}


def test_the_reason_is_the_error_of_the_answer_itself():
    """A missing import, not the name that is missing after it; from ranks it comes as text."""
    new_output = nbformat.v4.new_output
    header = "\x1b[31mNameError\x1b[39m         Traceback (most recent call last)\n"
    on_ranks = [
        new_output("stream", text=f"[1:execute]\n{header}\x1b[31mNameError\x1b[39m: name 'np'\n"),
        new_output("error", ename="AlreadyDisplayedError", evalue="4 errors"),
    ]
    answer = nbformat.v4.new_code_cell(outputs=on_ranks)
    assert grade.error_of(answer) == "NameError: name 'np'"
    answer.outputs = [new_output("error", ename="SystemExit", evalue="")]
    assert grade.error_of(answer) == "SystemExit"
    answer.outputs = [
        new_output("stream", text="NameError: hm\n")
    ]  # only printed: a reason at most
    check = nbformat.v4.new_code_cell(outputs=[new_output("stream", text="exercise 1: ok\n")])
    assert grade.judged(check, "1", 1, "", 0, grade.error_of(answer)).solved
    check.outputs = [new_output("stream", text="exercise 1: not solved yet: NameError: name 'f'\n")]
    assert grade.judged(check, "1", 1, "", 0, "NameError: name 'np'").reason.endswith("'np'")


def test_a_verdict_is_printed_in_one_piece(monkeypatch):
    """Whenever a kernel sends what has been printed so far, the verdict's line is whole."""

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    pieces = []
    monkeypatch.setattr(sys, "stdout", Pieces())
    exercises.check(1, lambda: None)
    exercises.check(2, lambda: exercises.true("it should be", False))
    assert pieces == ["exercise 1: ok", "\n", "exercise 2: not solved yet: it should be", "\n"]


def test_what_is_not_run_is_told(tmp_path):
    """Nothing is executed for an answer that is missing, untouched or no Python."""
    path = a_copy(tmp_path, "größe – x", "2", "def backward_kl(g, h)\n    return 0")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.remove(notebooks.exercises(notebook)["3"])
    nbformat.write(notebook, path)
    verdicts = grade.grade(path)
    assert not any(verdict.solved for verdict in verdicts.values())
    assert verdicts["1"].reason == "not attempted"
    assert verdicts["2"].reason == "SyntaxError: expected ':' (line 2)"
    assert verdicts["3"].reason == 'no cell begins with "# exercise 3"'


def test_what_is_no_copy_is_told(tmp_path, capsys):
    (tmp_path / "empty.ipynb").write_text("")
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# My own")])
    nbformat.write(other, tmp_path / "other.ipynb")
    assert not grade.table(sorted(tmp_path.glob("*.ipynb")), limit=60)
    text = capsys.readouterr().out
    assert "empty.ipynb  is not a notebook: NotJSONError" in text
    assert "other.ipynb  its title '# My own' is none of this book's" in text


def test_the_exit_code_and_the_table(tmp_path):
    """A folder, through the command: one line for each copy, the reasons, and 1."""
    for name in ("first", "second copy"):
        a_copy(tmp_path, name)
    command = [sys.executable, Path(grade.__file__), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"^second copy.ipynb  1 –   2 –   3 –   0 of 3", done.stdout, re.M)
    assert "first.ipynb, exercise 2: not attempted" in done.stdout
    empty = subprocess.run([*command[:2], tmp_path / "none"], capture_output=True, text=True)
    assert empty.returncode == 2 and "no such file" in empty.stderr


# ── What the checks call ──────────────────────────────────────────────────────────────────────────


def verdict_of(solved, capsys) -> str:
    exercises.check(1, solved)
    return capsys.readouterr().out


def test_a_check_says_why(capsys):
    def fails(what):
        def solved():
            raise what

        return solved

    assert verdict_of(lambda: None, capsys) == "exercise 1: ok\n"
    assert verdict_of(fails(exercises.Wrong("no")), capsys) == "exercise 1: not solved yet: no\n"
    expected = "exercise 1: not solved yet: NameError: name 'x' is not defined\n"
    assert verdict_of(lambda: eval("x"), capsys) == expected
    assert verdict_of(fails(SystemExit()), capsys) == "exercise 1: not solved yet: SystemExit\n"
    with pytest.raises(KeyboardInterrupt):
        exercises.check(1, fails(KeyboardInterrupt()))


def test_what_an_answer_prints_is_not_a_verdict(capsys):
    text = verdict_of(lambda: print("exercise 1: ok"), capsys).splitlines()
    assert text == ["    your code printed: exercise 1: ok", "exercise 1: ok"]
    text = verdict_of(lambda: print("exercise 1: ok") or eval("x"), capsys).splitlines()
    assert text[0].startswith("    ") and text[1].startswith("exercise 1: not solved yet")


@pytest.mark.parametrize(
    "got, expected, within",
    [
        (1.0, 2.0, 0.0),
        (None, 2.0, 0.0),
        ("2", 3.0, 0.0),
        (torch.ones(2), torch.ones(3), 0.0),
        (torch.ones(2), [1.0, 1.1], 0.05),
        (float("nan"), 1.0, 1.0),
        (torch.tensor(2.0), [2.0], 0.0),
    ],
)
def test_values_that_differ_are_told(got, expected, within):
    with pytest.raises(exercises.Wrong, match=r"^a value: got .*, expected "):
        exercises.equal("a value", got, expected, within)


def test_of_many_values_the_first_wrong_one_is_told():
    with pytest.raises(exercises.Wrong, match=r"^a value: element 7: got 9, expected 7$"):
        exercises.equal("a value", [*range(7), 9.0, *range(8, 40)], torch.arange(40.0))


def test_values_that_are_equal_pass():
    exercises.equal("a value", 1, 1.0)
    exercises.equal("a value", torch.ones(2, requires_grad=True), [1.0, 1.0])
    exercises.equal("a value", [1e6 + 1], [1e6], 1e-5)
    exercises.equal("nothing", [], [])


def test_redefined_names_are_put_back():
    import math

    namespace = {"math": math, "asked_for": 1, "kept": 2}
    cosine = math.cos
    exercises.remember(namespace)
    namespace.update(asked_for=10, kept=20, print=30, new=40)
    math.cos = None
    exercises.restore(namespace, {"asked_for"})
    assert namespace == {"math": math, "asked_for": 10, "kept": 2, "new": 40}
    assert math.cos is cosine


def test_names_of_the_hunt():
    """A method of a guilty class counts; part of a name does not."""
    assert hunt.right(3, "RowParallelLinear.forward")
    assert not hunt.right(3, "Linear") and not hunt.right(5, "train")


# ── Handouts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_handout_has_no_answers(name):
    """No solution, no check, no output; the exercises are all there, and the text around them."""
    original = nbformat.read(NOTEBOOKS[name], as_version=4)
    written = handout.handout(NOTEBOOKS[name])
    assert notebooks.exercises(written).keys() == notebooks.exercises(original).keys()
    assert not notebooks.solutions(written) and not notebooks.checks(written)
    text = "\n".join(cell.source for cell in written.cells)
    assert "<details><summary>Solution" not in text
    assert not any(cell.get("outputs") for cell in written.cells)
    for number, check in notebooks.checks(original).items():
        assert check.source not in text
        assert f'exercises.check_of("{name}", {number})' in text
    for number, code in notebooks.solutions(original).items():
        assert code.strip() not in text, f"solution {number}"
    headings = [line for cell in original.cells for line in re.findall(r"^#+ .*", cell.source)]
    assert all(line in text for line in headings if cell_is_text(original, line))


def cell_is_text(notebook: nbformat.NotebookNode, line: str) -> bool:
    return any(line in cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_a_handout_does_not_overwrite(tmp_path):
    command = [sys.executable, Path(handout.__file__), "--chapter", "02", "--to", tmp_path]
    assert subprocess.run(command, capture_output=True).returncode == 0
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "may hold somebody's answers" in again.stderr
