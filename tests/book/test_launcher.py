# SPDX-License-Identifier: MIT-0
"""The launcher and the flags of every chapter; `make robustness` does more of that to whole runs.

The regions "flags" and "launcher" are equal to the letter in all chapters. What one process can
show is tried in each chapter; what needs real ranks is tried with chapter 1, or with a small
program that has its launcher.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import deepspeech as ds
import pytest
import robustness
import shared_blocks
import torch
import torch.distributed as dist
from proof import plant

ROOT = shared_blocks.ROOT
CHAPTERS = shared_blocks.chapters()
EVERY_CHAPTER = pytest.mark.parametrize("chapter", [path.stem for path in CHAPTERS])
FIRST = Path(ds.__file__)
VARIABLES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "NCCL_MULTI_RANK_GPU_ENABLE",
]


ALL_MISSING = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE not set"


def test_every_chapter_has_the_launcher():
    for path in CHAPTERS:
        assert "def _end_with_parent(" in path.read_text("utf-8"), path.stem


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Nobody has started this process as a rank."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def planted(*replacements):
    with contextlib.ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(plant(*replacement))
        yield


def flags_of(chapter: str, monkeypatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [f"{chapter}.py", *words])
    return importlib.import_module(chapter).flags()


def refused(chapter: str, monkeypatch, capsys, *words: str) -> str:
    """The one line behind the usage with which a chapter refuses flags."""
    with pytest.raises(SystemExit) as end:
        flags_of(chapter, monkeypatch, *words)
    usage, line = capsys.readouterr().err.splitlines()
    assert (
        end.value.code == 2
        and usage.startswith("usage: ")
        and line.startswith(f"{chapter}.py: error: ")
    )
    return line


# ── Who has started this process ──────────────────────────────────────────────────────────────────


@EVERY_CHAPTER
@pytest.mark.parametrize(
    "variables, missing",
    [
        (
            dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29511),
            "LOCAL_RANK, LOCAL_WORLD_SIZE not set",
        ),
        (dict(RANK=1, WORLD_SIZE=2), "LOCAL_RANK, LOCAL_WORLD_SIZE not set"),
        (
            dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29511),
            "LOCAL_WORLD_SIZE not set",
        ),
        (dict(LOCAL_RANK=0), "RANK, WORLD_SIZE, LOCAL_WORLD_SIZE not set"),
        (dict(SLURM_PROCID=0, SLURM_NTASKS=2), ALL_MISSING),
        (dict(SLURM_PROCID=1, SLURM_NTASKS=2), ALL_MISSING),
        (dict(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2), ALL_MISSING),
        (dict(PMI_RANK=0, PMI_SIZE=2), ALL_MISSING),
    ],
    ids=str,
)
def test_another_launcher_is_refused(chapter, variables, missing, monkeypatch, capsys):
    """Each of its tasks would train alone, and write the same files."""
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    line = refused(chapter, monkeypatch, capsys)
    assert line.endswith(f"{missing}: start it with torchrun (CLUSTER.md)")


@EVERY_CHAPTER
@pytest.mark.parametrize(
    "variables",
    [
        dict(SLURM_PROCID=0, SLURM_NTASKS=1),
        dict(SLURM_NTASKS=4),
        dict(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=1),
    ],
    ids=str,
)
def test_a_single_task_starts_ranks_itself(chapter, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    args = flags_of(chapter, monkeypatch)
    assert args.ranks == args.world_size >= 2


@EVERY_CHAPTER
def test_torchruns_world_is_joined(chapter, monkeypatch, capsys):
    """Also inside a job of SLURM, which has started torchrun; --ranks may only say the same."""
    everything = dict(
        RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, SLURM_PROCID=1, SLURM_NTASKS=2
    )
    for name, value in everything.items():
        monkeypatch.setenv(name, str(value))
    for words in ((), ("--ranks", "4")):
        args = flags_of(chapter, monkeypatch, *words)
        assert (args.ranks, args.world_size) == (4, 8)
    line = refused(chapter, monkeypatch, capsys, "--ranks", "2")
    assert line.endswith("--ranks 2, but torchrun has started 4")


# ── What "auto" becomes ───────────────────────────────────────────────────────────────────────────

NO_GPU, NO_CPU = "a GPU was asked for, but torch sees none", "--backend nccl has no --device cpu"
TOO_FEW = "--backend nccl needs {} GPUs, here are {}: use gloo"
CHOICES = [  # GPUs, flags, what is chosen for a chapter of 2 ranks, or the error
    (0, "", "2 cpu gloo fp32"),
    (1, "", "1 cuda nccl bf16"),
    (2, "", "2 cuda nccl bf16"),
    (3, "", "3 cuda nccl bf16"),
    (5, "", "5 cuda nccl bf16"),
    (8, "", "8 cuda nccl bf16"),
    (0, "--ranks 4", "4 cpu gloo fp32"),
    (1, "--ranks 1", "1 cuda nccl bf16"),
    (1, "--ranks 2", "2 cpu gloo fp32"),
    (3, "--ranks 4", "4 cpu gloo fp32"),
    (8, "--ranks 2", "2 cuda nccl bf16"),
    (5, "--ranks 5", "5 cuda nccl bf16"),
    (0, "--device cpu", "2 cpu gloo fp32"),
    (8, "--device cpu", "2 cpu gloo fp32"),
    (8, "--device cpu --ranks 3", "3 cpu gloo fp32"),
    (0, "--device cuda", NO_GPU),
    (1, "--device cuda", "1 cuda nccl bf16"),
    (5, "--device cuda", "5 cuda nccl bf16"),
    (1, "--device cuda --ranks 2", "2 cuda gloo bf16"),
    (8, "--device cuda --ranks 3", "3 cuda nccl bf16"),
    (8, "--device cuda --dtype fp64", "8 cuda nccl fp64"),
    (0, "--backend gloo", "2 cpu gloo fp32"),
    (8, "--backend gloo", "2 cpu gloo fp32"),
    (1, "--backend gloo --device cuda", "2 cuda gloo bf16"),
    (3, "--backend gloo --device cuda", "2 cuda gloo bf16"),
    (0, "--backend gloo --device cuda", NO_GPU),
    (0, "--backend nccl", NO_GPU),
    (2, "--backend nccl", "2 cuda nccl bf16"),
    (3, "--backend nccl", "3 cuda nccl bf16"),
    (3, "--backend nccl --ranks 5", TOO_FEW.format(5, 3)),
    (8, "--backend nccl --device cpu", NO_CPU),
    (5, "--backend nccl --device cuda", "5 cuda nccl bf16"),
]


@EVERY_CHAPTER
@pytest.mark.parametrize("gpus, flags, expected", CHOICES, ids=str)
def test_what_is_chosen(chapter, gpus, flags, expected, monkeypatch, capsys):
    """All GPUs where nobody says otherwise, and never any idle without a word in the first line."""
    module, words = importlib.import_module(chapter), flags.split()
    args = argparse.Namespace(
        ranks=None, device="auto", backend="auto", dtype="auto", seed=0, check=False
    )
    vars(args).update(
        {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    )
    args.ranks = args.ranks and int(args.ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    if expected in (NO_GPU, NO_CPU) or "needs" in expected:
        with pytest.raises(ValueError, match=expected):
            module._resolve_auto(args, 2)
        return
    module._resolve_auto(args, 2)
    assert (
        f"{args.ranks} {args.device} {args.backend} {args.dtype}" == expected
        and args.world_size == args.ranks
    )
    module.say_setting(args)
    idle = gpus - (args.ranks if args.device == "cuda" else 0)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(f", seed 0, {idle} GPUs not used" if idle > 0 else ", seed 0")


@EVERY_CHAPTER
def test_ranks_that_share_a_gpu_by_nccls_leave(chapter, monkeypatch):
    module = importlib.import_module(chapter)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    args = argparse.Namespace(ranks=2, device="auto", backend="nccl", dtype="auto", check=False)
    module._resolve_auto(args, 2)
    assert (args.ranks, args.device, args.backend) == (2, "cuda", "nccl")


@EVERY_CHAPTER
@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("dtype, expected", [("auto", "fp64"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_the_check_is_exact_where_nobody_says_otherwise(
    chapter, gpus, dtype, expected, monkeypatch
):
    module = importlib.import_module(chapter)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = argparse.Namespace(ranks=None, device="auto", backend="auto", dtype=dtype, check=True)
    module._resolve_auto(args, 2)
    assert args.dtype == expected


# ── Flags ─────────────────────────────────────────────────────────────────────────────────────────


def numbers_of(chapter: str) -> list[dataclasses.Field]:
    """A chapter's flags that are numbers."""
    classes = [
        thing
        for thing in vars(importlib.import_module(chapter)).values()
        if dataclasses.is_dataclass(thing)
    ]
    every = [f for thing in classes for f in dataclasses.fields(thing) if f.metadata]
    return [f for f in every if f.type.partition(" ")[0] in ("int", "float")]


@EVERY_CHAPTER
def test_numbers_that_are_none_are_one_line(chapter, monkeypatch, capsys):
    """Not a number, infinite, too small, too large, text: flag and value are named."""
    flags = numbers_of(chapter)
    assert {"ranks", "steps", "seed", "timeout"} < {f.name for f in flags}
    for f in flags:
        least = f.metadata.get("least", 0)
        values = ["nan", "inf", "-inf", "1e400", "-1e400", "1" + 30 * "0", "many", "", "1,5"]
        values += [str(least - 1)] + ["0"] * (least > 0) + ["1.5"] * f.type.startswith("int")
        for value in values:
            line = refused(chapter, monkeypatch, capsys, f"--{f.name.replace('_', '-')}={value}")
            assert f"--{f.name.replace('_', '-')}: {value!r} must be of type" in line


@EVERY_CHAPTER
def test_zero_is_not_the_default(chapter, monkeypatch, capsys):
    """Where None stands for a number that depends on the ranks, an explicit 0 is a mistake."""
    flags = [f for f in numbers_of(chapter) if f.default is None]
    assert "ranks" in {f.name for f in flags}
    for f in flags:
        assert "'0' must be" in refused(
            chapter, monkeypatch, capsys, f"--{f.name.replace('_', '-')}", "0"
        )


@EVERY_CHAPTER
@pytest.mark.parametrize(
    "error", [ValueError("what is wrong"), FileNotFoundError(2, "No such file", "x")], ids=str
)
def test_what_a_chapter_refuses_is_one_line(chapter, error, monkeypatch, capsys):
    def check_args(args):
        raise error

    module = importlib.import_module(chapter)
    own = module.parse_flags

    def parse_flags(doc, configs, _, *rest, **more):
        return own(doc, configs, check_args, *rest, **more)

    monkeypatch.setattr(module, "parse_flags", parse_flags)
    assert refused(chapter, monkeypatch, capsys).endswith(str(error))


@EVERY_CHAPTER
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", [["--help"], []], ids=str)
def test_a_terminal_that_is_not_utf_8(chapter, encoding, words, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding, write_through=True))
    with pytest.raises(SystemExit, match="0") if words else contextlib.nullcontext():
        flags_of(chapter, monkeypatch, *words)
    print("– is replaced")
    assert printed.getvalue().endswith(b"? is replaced\n")
    assert not words or b"--steps" in printed.getvalue()


@EVERY_CHAPTER
def test_help_without_docstrings(chapter, monkeypatch, capsys):
    """python -OO takes them out."""
    monkeypatch.setattr(importlib.import_module(chapter), "__doc__", None)
    with pytest.raises(SystemExit, match="0"):
        flags_of(chapter, monkeypatch, "--help")
    assert "--steps" in capsys.readouterr().out


def test_the_defaults_that_depend_on_the_chapter(monkeypatch, capsys):
    """--help names them, and says so in the docstring's first line."""
    with pytest.raises(SystemExit, match="0"):
        flags_of("megatron_tp", monkeypatch, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    title = importlib.import_module("megatron_tp").__doc__.partition("\n")[0]
    assert title in printed and "optimizer steps (default: 80)" in printed


# ── One rank, from the first message to the last ──────────────────────────────────────────────────


def a_rank(**changes) -> argparse.Namespace:
    return argparse.Namespace(
        **(dict(device="cpu", backend="gloo", timeout=9.0, ranks=2, world_size=2) | changes)
    )


@EVERY_CHAPTER
@pytest.mark.parametrize(
    "words", ["Connection closed by peer [127.0.0.1]:1", "writev [127.0.0.1]:1: Broken pipe"]
)
@pytest.mark.parametrize("where", ["init_process_group", "all_reduce", "barrier"])
def test_a_rank_that_merely_notices_lets_the_other_be_named(chapter, where, words):
    """From the first message to the last it waits: torchrun should find the dead one first."""

    def lost(*args, **kwargs):
        raise RuntimeError(words)

    module, slept = importlib.import_module(chapter), []
    names = "init_process_group", "all_reduce", "new_group", "barrier", "destroy_process_group"
    nothing = [(dist, name, lambda *args, **kwargs: None) for name in names]
    with planted(*nothing, (dist, where, lost), (module.time, "sleep", slept.append)):
        with pytest.raises(RuntimeError, match=words.replace("[", r"\[")):
            module.run_rank(lambda args, device: None, a_rank())
    assert slept == [5]


@EVERY_CHAPTER
def test_a_rank_with_an_error_of_its_own_fails_at_once(chapter):
    def fails(args, device):
        raise RuntimeError("shapes do not fit")

    module, slept = importlib.import_module(chapter), []
    nothing = [
        (dist, name, lambda *args, **kwargs: None) for name in ("init_process_group", "all_reduce")
    ]
    with (
        planted(*nothing, (module.time, "sleep", slept.append)),
        pytest.raises(RuntimeError, match="do not fit"),
    ):
        module.run_rank(fails, a_rank())
    assert slept == []


@EVERY_CHAPTER
@pytest.mark.parametrize("end", [SystemExit(0), SystemExit(1), None], ids=str)
def test_a_rank_that_leaves_by_exit_still_meets_the_others(chapter, end):
    """--check, and claims that failed: all ranks wait, then comes the exit code."""

    def leaves(args, device):
        if end is not None:
            raise end

    module, called = importlib.import_module(chapter), []
    names = "init_process_group", "all_reduce", "destroy_process_group"
    recorders = [
        (dist, name, lambda *args, name=name, **kwargs: called.append(name)) for name in names
    ]
    with planted(*recorders, (module, "wait_for_all", lambda: called.append("wait_for_all"))):
        with pytest.raises(SystemExit) as left:
            module.run_rank(leaves, a_rank())
    assert left.value.code == getattr(end, "code", 0)
    assert called == ["init_process_group", "all_reduce", "wait_for_all", "destroy_process_group"]


@EVERY_CHAPTER
def test_the_last_wait_has_a_days_limit(chapter):
    module, groups = importlib.import_module(chapter), []

    def new_group(**options):
        groups.append(options)
        return "the group"

    barrier = dist, "barrier", lambda group: groups.append(("barrier", group))
    destroy = dist, "destroy_process_group", lambda group: groups.append(("destroy", group))
    with planted((dist, "new_group", new_group), barrier, destroy):
        module.wait_for_all()
    options, *rest = groups
    assert options["timeout"].days == 1 and options["backend"] == "gloo"
    assert rest == [("barrier", "the group"), ("destroy", "the group")]


@EVERY_CHAPTER
@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_process(chapter, world, capsys, monkeypatch):
    """One line of rank 0. A rank of several is gone at once; a notebook's kernel stays."""

    def interrupted(main, args):
        raise KeyboardInterrupt("after step 7")

    def gone(code):
        raise SystemExit(f"gone with {code}")

    module, args = importlib.import_module(chapter), a_rank(ranks=world, world_size=world)
    if world > 1:
        monkeypatch.setenv("LOCAL_RANK", "0")
    with planted(
        (module, "run_rank", interrupted), (module, "record", lambda f: f), (os, "_exit", gone)
    ):
        with pytest.raises(SystemExit) as end:
            module.launch(None, args)
    assert end.value.code == ("gone with 130" if world > 1 else 130)
    assert capsys.readouterr().err == "\ninterrupted after step 7\n"


@pytest.mark.ranks(2)
@pytest.mark.parametrize("lists", [[[0]], [[0], []], [[0], [1, 2]], [[0, 1], [1]], []], ids=str)
def test_lists_that_leave_a_rank_out_make_no_groups(lists):
    """torch would give it None, the group of all ranks: its all-reduce would hang."""
    with pytest.raises(ValueError, match="must name each of the 2 ranks once"):
        ds.make_group(lists, torch.device("cpu"), 60.0)


# ── Real starts ───────────────────────────────────────────────────────────────────────────────────

real = pytest.mark.slow
PROGRAM = """
import os, sys, time
sys.path.insert(0, {folder!r})
import deepspeech as ds

def main(args, device):
    r = ds.group_rank()
    {body}

if __name__ == "__main__":
    ds.launch(main, ds.parse_flags("A program.", [], lambda args: None, ranks=2, steps=0))
"""


@pytest.fixture
def program(tmp_path):
    """A small program with chapter 1's launcher: its lines of main."""

    def write(*body: str, name: str = "program.py") -> Path:
        path = tmp_path / name
        path.write_text(PROGRAM.format(folder=str(FIRST.parent), body="\n    ".join(body)), "utf-8")
        return path

    return write


def succeeded(run: robustness.Run) -> str:
    """All that a run has printed, which must have ended well."""
    assert (run.code, run.left) == (0, 0), "".join(run.out + run.err)
    return "".join(run.out)


@real
def test_a_complete_set_of_variables_joins(program, monkeypatch):
    """As other launchers set them, without torchrun."""
    path = program("x = ds.torch.ones(1)", "ds.dist.all_reduce(x)", "print(r, 'of', int(x))")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with contextlib.ExitStack() as stack:
        runs = []
        for rank in range(2):
            for name, value in (variables | dict(RANK=rank, LOCAL_RANK=rank)).items():
                monkeypatch.setenv(name, str(value))
            runs.append(stack.enter_context(robustness.started(path)))
        ends = [run.end(60)[1:] for run in runs]
    assert ends == [(0, 0)] * 2 and [run.out for run in runs] == [["0 of 2\n"], ["1 of 2\n"]]


@real
def test_work_of_one_rank_is_no_lost_message(program):
    """Longer than --timeout: at the end of main, and in front of wait_for_all."""
    work = "if r == 0: time.sleep(7)"
    meet = "ds.dist.all_reduce(ds.torch.ones(1))"
    paths = program(work, name="end.py"), program(work, "ds.wait_for_all()", meet, name="before.py")
    with (
        robustness.started(paths[0], "--timeout", 5) as one,
        robustness.started(paths[1], "--timeout", 5) as other,
    ):
        assert [run.end(60)[1:] for run in (one, other)] == [(0, 0)] * 2, "".join(
            one.err + other.err
        )


@real
def test_a_host_name_without_an_address(program):
    """A laptop away from its network, a container."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("unshare --uts is not permitted here")
    path = program("ds.say(f'{ds.group_size()} ranks')")
    command = ["--uts", "sh", "-c", f"hostname x.invalid && exec {sys.executable} {path}"]
    assert succeeded(robustness.whole(*command, program="unshare", seconds=60)) == "2 ranks\n"


@real
def test_files_of_the_working_directory_are_not_imported(tmp_path, monkeypatch):
    """The chapter under another name, without docstrings, beside files named as modules are."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")  # as -OO
    path = tmp_path / "odd" / "an other name.py"
    path.parent.mkdir()
    shutil.copy(FIRST, path)
    for name in ("random", "queue", "torch", "deepspeech", "numpy"):
        (tmp_path / f"{name}.py").write_text(
            "raise SystemExit('imported from the working directory')"
        )
    run = robustness.whole(path, "--check", "--ranks", 2, cwd=tmp_path)
    assert "2 ranks, fp" in succeeded(run)


@real
def test_a_safe_path_and_a_terminal_that_is_not_utf_8(program, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    assert succeeded(robustness.whole(program("ds.say('– ✓')"))) == "? ?\n"


@real
def test_a_notebooks_kernel_lives_on(program, monkeypatch):
    """%run of two ranks, and of one: in this process, interrupted, and then once more."""
    monkeypatch.delenv(
        "PYTEST_CURRENT_TEST"
    )  # where it is set, a kernel does not show what ranks print
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stopped = program("raise KeyboardInterrupt('after step 3')", name="stopped.py")
    again = program("ds.say(f'{ds.group_size()} rank')", name="again.py")
    lines = (
        f"%run {FIRST} --check --ranks 2",
        f"%run {stopped} --ranks 1",
        f"%run {again} --ranks 1",
        "print('alive')",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in lines])
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, resources=resources, allow_errors=True, timeout=100).execute()
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
    assert "2 ranks, fp" in printed[0]
    assert "interrupted after step 3" in printed[1] and printed[2:] == ["1 rank\n", "alive\n"]


@real
def test_ranks_end_when_their_launcher_does(program):
    """Killed, or ended by a signal that torchrun does not handle: it cannot stop them."""
    path = program("print('ready', flush=True)", "time.sleep(600)")
    with robustness.started(path) as one, robustness.started(path) as other:
        for run, number in ((one, signal.SIGKILL), (other, signal.SIGUSR1)):
            run.until(lambda run=run: "".join(run.out).count("ready") == 2, seconds=60)
            run.process.send_signal(number)
            run.process.wait(10)
        deadline = time.monotonic() + 10
        while (
            left := len(one.processes()) + len(other.processes())
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not left


@real
def test_a_run_that_is_asked_to_stop_leaves_no_rank_behind(program):
    """As `kill` does it, and the tests' own `scripts.started` where they leave a run early."""
    path = program("print('ready', flush=True)", "time.sleep(600)")
    with robustness.started(path) as run:
        run.until(lambda: "".join(run.out).count("ready") == 2, seconds=60)
        assert len(run.ranks()) == 2
        run.process.terminate()
        _, code, left = run.end(30)
    assert (code, left) == (128 + signal.SIGTERM, 0)


@real
def test_ctrl_c(tmp_path):
    """It reaches the process group: one line, no traceback, nobody left."""
    model = tmp_path / "model.safetensors"
    with robustness.started(
        robustness.SPEECH, "--ranks", 2, "--save", model, start_new_session=True
    ) as run:
        run.until(lambda: run.printed(r"^ +1 "))
        time.sleep(1)
        os.killpg(run.process.pid, signal.SIGINT)
        _, code, left = run.end(30)
    words = [line.strip() for line in run.err if line.strip()]
    assert (code, left) == (130, 0) and len(run.err) <= 3, run.err
    (line,) = words
    assert line.startswith("interrupted after step ") and line.endswith(
        f"; nothing was saved in {model}"
    )
    assert not list(tmp_path.iterdir())


@real
@pytest.mark.parametrize(
    "end, words",
    [
        ("raise ValueError('what is wrong')", "ValueError: what is wrong"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_the_rank_that_failed_first_is_named_last(program, end, words):
    """The other one waits for it in a collective, and only notices."""
    run = robustness.whole(
        program(f"if r == 1: {end}", "ds.dist.all_reduce(ds.torch.ones(1))"), seconds=60
    )
    last = "".join(run.err).rpartition("Root Cause")[2]
    assert (run.code, run.left) == (1, 0) and run.named().startswith("rank 1") and words in last, (
        "".join(run.err)
    )
