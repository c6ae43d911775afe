# SPDX-License-Identifier: MIT-0
"""What all chapters keep: budgets, anatomy, licence; the pool of ranks; the comparison."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import scripts
import shared_blocks
import style
import torch
import torch.distributed as dist
from proof import assert_differs, assert_equal, plant

ROOT = shared_blocks.ROOT
CHAPTERS = shared_blocks.chapters()
TOOLS = [*shared_blocks.tools(), *shared_blocks.tables()]
BOOK = [ROOT / "tests/book" / name for name in ("lift.py", "shared_blocks.py", "style.py")]
BOOK += sorted((ROOT / "tests/book/web").glob("*.py"))


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


# ── Budgets ───────────────────────────────────────────────────────────────────────────────────────


@each(CHAPTERS)
def test_a_chapter_keeps_its_budgets(path):
    found = style.faults(path, chapter=True)
    assert not found, "\n".join(found)


@each([*TOOLS, *BOOK])
def test_a_tool_keeps_its_budgets(path):
    """So does each table file, and what the book itself is kept with."""
    found = style.faults(path, chapter=False)
    assert not found, "\n".join(found)


# ── What all chapters' functions must do ──────────────────────────────────────────────────────────


class Scaled(torch.nn.Linear):
    """A layer with a parameter of no dimension, as a learned temperature is."""

    def __init__(self):
        super().__init__(3, 3)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x_BD)


@each_chapter
def test_an_optimizer_trains_every_parameter(chapter):
    """A scalar too, like a vector without decay: of zero gradients only decay moves a weight."""
    model = Scaled()
    optimizer = importlib.import_module(chapter.stem).make_optimizer(model, 0.1)
    (model(torch.ones(1, 3)).sum() * 0).backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name in ("scale", "bias"):
        assert torch.equal(getattr(model, name), before[name])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, trained)} == {*map(id, model.parameters())} and len(trained) == 3


def test_a_sharded_optimizer_decays_no_scalar():
    """Chapter 7 groups the pieces of parameters itself."""
    z = importlib.import_module("zero_3d")
    model = Scaled()
    buffer = z.ParamAndGradBuffer(model.named_parameters())
    matrices, vectors = z.DistributedOptimizer(buffer, torch.optim.AdamW).param_groups
    assert [x.numel() for x in matrices["params"]] == [9]
    assert sorted(x.numel() for x in vectors["params"]) == [1, 3]


# ── Scripts that no test runs ─────────────────────────────────────────────────────────────────────

PARTS = {path.stem: path for path in [*CHAPTERS, *TOOLS]}
BESIDE = [
    *(ROOT / "tests/bench").glob("*.py"),
    *(ROOT / "tests/pictures").glob("*.py"),
    *(ROOT / "notebooks/results").glob("*.py"),
]


def missing_names(text: str) -> list[str]:
    """Each `module.name` of a chapter or tool that a script uses and the module does not have."""
    tree = ast.parse(text)
    aliases = {}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {x.asname or x.name: x.name for x in node.names if x.name in PARTS}
        elif isinstance(node, ast.ImportFrom) and node.module in PARTS:
            module = importlib.import_module(node.module)
            missing += [x.name for x in node.names if not hasattr(module, x.name)]
        elif isinstance(node, ast.Assign) and "import_module" in ast.unparse(node.value):
            name = getattr(node.value.args[0], "value", None)
            if name in PARTS:
                aliases[ast.unparse(node.targets[0])] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id)
            if module and not hasattr(importlib.import_module(module), node.attr):
                missing.append(f"{module}.{node.attr}")
    return missing


@each(sorted(BESIDE))
def test_a_benchmark_uses_what_its_chapter_has(path):
    """So do pictures and measurements: a name that a chapter has given up would show there only
    when somebody runs them."""
    assert not missing_names(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "import preference as pf\npf.gather_from_nobody(x)",
        "from preference import gather_from_nobody",
        "pf = importlib.import_module('preference')\npf.gather_from_nobody(x)",
    ],
)
def test_a_missing_name_is_found(text):
    assert len(missing_names(text)) == 1


# ── Chapters ──────────────────────────────────────────────────────────────────────────────────────


@each_chapter
def test_the_order_of_parts(chapter):
    """0 to 5; a part 6 may hold the command line."""
    parts = re.findall(r"^# ── (\d) ", chapter.read_text("utf-8"), re.M)
    assert parts in (list("012345"), list("0123456"))


@each_chapter
def test_a_chapter_has_all_its_places(chapter):
    """Those that CONTRIBUTING.md lists and that no other test would miss."""
    assert not missing_places(chapter)


def missing_places(chapter: Path) -> list[str]:
    folder = chapter.parent.name
    files = [f"{folder}/README.md", f"notebooks/{folder}.ipynb", f"tests/test_{folder}.py"]
    files += [f"tests/bench/{folder}.py", f"tests/pictures/{folder}.py"]
    mentioned = {
        "README.md": f"| [{folder}]({folder}/)",
        "CLAIMS.md": f"<!-- claims of {folder} -->",
        "notebooks/README.md": f"](../{folder}/{chapter.name})",
        "tests/book/rehearsal.py": f'"{folder}": ',
        "pyproject.toml": f'"{folder}"',
    }
    missing = [name for name in files if not (ROOT / name).exists()]
    for name, words in mentioned.items():
        if words not in (ROOT / name).read_text("utf-8"):
            missing.append(f"{name} without {words!r}")
    return missing


def test_a_chapter_without_its_places_is_told():
    missing = missing_places(ROOT / "99_dummy/dummy.py")
    assert len(missing) == 10 and missing[0] == "99_dummy/README.md"
    assert "README.md without '| [99_dummy](99_dummy/)'" in missing


@each_chapter
def test_a_chapter_imports_nothing_of_another(chapter):
    """At its top torch, numpy, einops, tiktoken and the standard library; no chapter anywhere."""
    tree = ast.parse(chapter.read_text("utf-8"))
    allowed = {"torch", "numpy", "einops", "tiktoken"} | set(sys.stdlib_module_names)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.split(".")[0]
            assert root not in {path.stem for path in CHAPTERS}, (
                f"line {node.lineno} imports a chapter"
            )
            assert node not in tree.body or root in allowed, (
                f"line {node.lineno} imports {root} at the top"
            )


@each(TOOLS)
def test_a_tool_imports_its_own_chapter_alone(path):
    """Of the scripts of this book."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            others = {script.stem for script in [*CHAPTERS, *TOOLS]} - {path.parent.name[3:]}
            assert name not in others, f"line {node.lineno} imports {name}"


@pytest.mark.parametrize("chapter", [*CHAPTERS, *TOOLS], ids=lambda path: path.stem)
def test_no_bare_float_in_a_model(chapter):
    """`.float()` would destroy a float64 check: at least fp32 is torch.promote_types."""
    for number, line in enumerate(chapter.read_text("utf-8").splitlines(), 1):
        assert ".float()" not in line.split("#")[0], f"line {number}"


def test_every_python_file_names_its_licence():
    for path in [*ROOT.glob("[0-9n]*/**/*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert path.read_text("utf-8").startswith("# SPDX-License-Identifier: MIT-0\n"), path


def test_planted_bugs_say_what_a_user_sees(request):
    """Each planted bug has a symptom, and an address or None for where it happened."""
    for item in request.session.items:
        for marker in item.iter_markers("planted_bug"):
            assert marker.kwargs.keys() == {"symptom", "seen_in"} and marker.kwargs["symptom"], (
                item.nodeid
            )
            assert marker.kwargs["seen_in"] is None or marker.kwargs["seen_in"].startswith(
                "https://"
            ), item.nodeid


# ── The comparison can fail ───────────────────────────────────────────────────────────────────────


def test_the_comparison():
    reference = {
        "a": torch.tensor([1.0, -4.0], dtype=torch.float64),
        "b": torch.ones(2, dtype=torch.float64),
    }
    near = {name: x + 1e-13 for name, x in reference.items()}
    assert 0 < assert_equal(near, reference) < 1e-12
    cases = {
        "a: off by": {**reference, "a": reference["a"] + 1e-9},
        "names differ": {"a": reference["a"]},
        r"b: \(3,\)": {**reference, "b": torch.ones(3, dtype=torch.float64)},
        "float32": {**reference, "b": torch.ones(2)},
        "a: off by nan": {**reference, "a": reference["a"] * torch.nan},
    }
    for message, here in cases.items():
        with pytest.raises(AssertionError, match=message):
            assert_equal(here, reference)
    zero = {"z": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_equal(zero, zero)
    assert_equal(zero, zero, zeros={"z": 1e-12})
    with pytest.raises(AssertionError, match="both should be below"):
        assert_equal({"z": zero["z"] + 1e-9}, zero, zeros={"z": 1e-12})
    with pytest.raises(AssertionError, match="the bug does not show"):
        assert_differs(near, reference)
    assert assert_differs({"a": -reference["a"], "b": reference["b"]}, reference) == ["a"]


def test_a_plant_never_outlives_its_block():
    class Target:
        value = 1

    with pytest.raises(RuntimeError), plant(Target, "value", 2):
        assert Target.value == 2
        raise RuntimeError
    assert Target.value == 1


@pytest.mark.parametrize("strips", [True, False])
def test_processes_without_docstrings_share_their_bytecode(strips, tmp_path, monkeypatch):
    """Where this process keeps none: else each of them would compile all of torch."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.pycache_prefix, sys.dont_write_bytecode)")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    if strips:
        monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    expected = [scripts.bytecode().name, "False"] if strips else ["None", "True"]
    assert scripts.run(script).stdout.split() == expected


@pytest.mark.parametrize("start", [scripts.run, scripts.forked])
@pytest.mark.parametrize("strips", [True, False])
def test_a_fork_does_what_a_start_does(start, strips, tmp_path, monkeypatch):
    if strips:
        monkeypatch.setenv("PYTHONOPTIMIZE", "2")
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    script = tmp_path / "script.py"
    lines = '"""Doc."""', "import sys, beside", "print(sys.argv, __name__, __file__, beside.x)"
    more = "print(sys.modules[__name__].__doc__, sys.stdout.encoding, __debug__)", "sys.exit(3)"
    script.write_text("\n".join(lines + more))
    (tmp_path / "beside.py").write_text("x = 1")
    done = start(script, "--flag", "value")
    expected = f"{[str(script), '--flag', 'value']} __main__ {script} 1\n"
    expected += "None ascii False\n" if strips else "Doc. utf-8 True\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, expected, "")
    script.write_text("1 / 0")
    done = start(script)
    assert done.returncode == 1 and done.stderr.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("start", [scripts.run, scripts.forked])
def test_a_script_that_takes_too_long_is_ended(start, tmp_path):
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    lines = "import os, time", f"open({str(pid)!r}, 'w').write(str(os.getpid()))", "time.sleep(600)"
    script.write_text("\n".join(lines))
    with pytest.raises(subprocess.TimeoutExpired):
        start(script, timeout=2)
    assert not _running(pid.read_text())


# ── The pool of ranks ─────────────────────────────────────────────────────────────────────────────


def ready() -> int:
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total)


def raises_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like this")
    ready()


def hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    ready()


def dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ready()


def makes_a_group() -> None:
    dist.new_group([0, 1])


def test_ranks_with_many_groups_start_anew():
    """Each group holds connections, and lives as long as its rank."""
    pool, here = ranks.Pool(2), __name__
    try:
        pool.run(here, "ready")
        pids = [process.pid for process in pool.processes]
        for _ in range(ranks.MOST_GROUPS - 1):  # the group of all ranks is one, too
            pool.run(here, "makes_a_group")
        assert [process.pid for process in pool.processes] == pids
        pool.run(here, "makes_a_group")
        assert not any(_running(str(pid)) for pid in pids)
        assert pool.run(here, "ready") == [2, 2]
    finally:
        pool.close()


def test_the_pool_survives_what_tests_do():
    """A rank that raises, hangs or dies fails that call alone; the next one finds new ranks."""
    pool, here = ranks.Pool(2), __name__
    try:
        assert pool.run(here, "ready") == [2, 2]
        for function, error, message in (
            ("raises_on_one", ranks.RankFailed, "rank 1 does not like this"),
            ("hangs", TimeoutError, r"test_house.hangs: ranks \[0, 1\] silent after 2 s"),
            ("dies", ranks.RankFailed, "."),
        ):
            pids = [process.pid for process in pool.processes]
            with pytest.raises(error, match=message):
                pool.run(here, function, timeout=2)
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
            assert pool.run(here, "ready") == [2, 2]
    finally:
        pool.close()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_pytest_leaves_no_rank_behind():
    program = (
        "import ranks, time\n"
        "if __name__ == '__main__':\n"
        "    pool = ranks.Pool(2); pool.run('test_house', 'ready')\n"
        "    print('ranks', *[process.pid for process in pool.processes], flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = next(line for line in process.stdout if line.startswith("ranks ")).split()[
        1:
    ]  # torch 2.9's Gloo prints too
    assert len(pids) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlive the process that started them"
        time.sleep(0.1)


def _running(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("value", [3, 5])
def test_the_ranks_marker(value):
    """The body runs on ranks, with its parameters; each time it starts from the same seed."""
    assert ready() == dist.get_world_size() and value in (3, 5)
    assert torch.initial_seed() == 0
