# SPDX-License-Identifier: MIT-0
"""Docs that hold: what a public docstring must say, links that lead somewhere, commands that
run."""

import ast
import contextlib
import functools
import importlib
import inspect
import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import front_door
import lift
import numpy as np
import pytest
import scripts
import shared_blocks
import soundfile
import test_02_megatron_tp
import tiktoken
import torch
import torch.distributed as dist
from examples import EXAMPLES
from torch.distributed import run

CHAPTERS = shared_blocks.chapters()
INFRASTRUCTURE = ("config fields", "process groups", "reports", "counter", "flags", "launcher")
HEADING = re.compile(r"^# ── (\d)(?:\.(\d+))? ")


@functools.cache
def sections(path: Path) -> dict[int, tuple[int, int]]:
    """Line to heading: (2, 1) is section 2.1, (2, 0) the heading of part 2."""
    matches = (
        (n, HEADING.match(line)) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1)
    )
    return {number: (int(match[1]), int(match[2] or 0)) for number, match in matches if match}


def part_of(path: Path, name: str) -> int:
    """The part of a chapter in which a name is defined."""
    (definition, *_) = lift.read(path).named(name)
    return max(
        (line, part) for line, (part, _) in sections(path).items() if line < definition.node.lineno
    )[1]


def demonstrated(path: Path) -> int:
    """The part that shows the chapter at work, from which on nothing needs documentation."""
    match = re.search(r"^# ── (\d) The demonstration ", path.read_text("utf-8"), re.MULTILINE)
    return int(match[1]) if match else 6


def documented(path: Path) -> list[str]:
    """What one would take from a chapter: all that is public before the demonstration, and what has
    an example."""
    own = [name for name in lift.public(path) if lift.home(path, name) == path]
    last = demonstrated(path)
    return [
        name for name in own if part_of(path, name) < last or name in EXAMPLES.get(path.stem, {})
    ]


CASES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in CHAPTERS
    for name in documented(path)
]

SHAPE = re.compile(
    r"_(?:[a-z]|[A-Za-z0-9]*[A-Z][A-Za-z0-9]*)$"
)  # x_BSH, logits_v, but not target_lengths
RETURNED = re.compile(
    r"\((?:\.\.\.|[A-Za-z0-9]{1,2}),? ?[^()]*\)|\w_[a-z0-9]*[A-Z]\w*|scalar|shape|Returns?:"
)


def functions_of(node: ast.FunctionDef | ast.ClassDef) -> list[ast.FunctionDef]:
    """What a user calls: the function itself, or a class's own public methods with its __init__ and
    forward."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    own = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [
        item
        for item in own
        if not item.name.startswith("_") or item.name in ("__init__", "__post_init__")
    ]


def raises(node: ast.AST) -> set[str]:
    """The names of the exceptions that a definition raises by itself; a bare `raise` only passes
    one on."""
    found = [
        item.exc for item in ast.walk(node) if isinstance(item, ast.Raise) and item.exc is not None
    ]
    return {(exc.func if isinstance(exc, ast.Call) else exc).id for exc in found}


@pytest.mark.parametrize("path, name", CASES)
def test_a_public_docstring_says_what_a_copier_must_know(path, name):
    """A sentence; each tensor's shape, by the suffix of its name or in words; every error; of the
    technique the source.

    A parameter whose name carries its shape (`x_BSH`) has said it. One without a suffix is
    mentioned in the docstring.
    """
    node = lift.read(path).named(name)[0].node
    doc = ast.get_docstring(node) or ""
    assert doc, f"{name} has no docstring"
    for function in functions_of(node):
        own = f"{doc}\n{ast.get_docstring(function) or ''}"
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            if "Tensor" in ast.unparse(
                argument.annotation or ast.Constant(None)
            ) and not SHAPE.search(argument.arg):
                assert re.search(rf"\b{argument.arg}\b", own), (
                    f"{name}: what shape has the tensor {argument.arg}?"
                )
        if "Tensor" in ast.unparse(function.returns or ast.Constant(None)):
            assert RETURNED.search(own), f"{name}: what shape does {function.name} return?"
        for error in raises(function):
            assert error in own, f"{name}: {function.name} raises {error}, which no docstring says"
    technique = (2, 5) if demonstrated(path) == 6 else (1,)
    part = part_of(path, name)
    assert part not in technique or "Source:" in doc or lift.block(path, name) in INFRASTRUCTURE, (
        f"{name} stands in part {part} and names no source"
    )


# ── Links and references ──────────────────────────────────────────────────────────────────────────

ROOT = shared_blocks.ROOT
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[0-9n]*/*.md"), *ROOT.glob("notebooks/*.ipynb")])
SOURCES = sorted(
    [
        *ROOT.glob("[0-9][0-9]_*/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("notebooks/results/*.py"),
    ]
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page's Markdown; of a notebook that of its cells."""
    text = page.read_text("utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(cell["source"])
        for cell in json.loads(text)["cells"]
        if cell["cell_type"] == "markdown"
    )


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@each_page
def test_links_lead_somewhere(page):
    """Every relative link names a file that is there, and a heading that it has; every arXiv link a
    number like one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://arxiv.org/abs/"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", target), target
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        assert there.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(there), f"{there.name} has no heading {anchor}"


def test_what_the_text_refers_to_exists():
    """Files, tests and sections that comments, docstrings and pages name."""
    there = {int(path.parent.name[:2]): set(sections(path).values()) for path in CHAPTERS}
    for page in [*PAGES, *SOURCES]:
        text = re.sub(
            r"\n# *", " ", page.read_text("utf-8")
        )  # a reference may go on in the next line of a comment
        for name, test in re.findall(r"\b(tests/(?:\w+/)?\w+\.py)(?:::(\w+))?", text):
            if "NN" in name:  # any chapter's
                continue
            assert (ROOT / name).exists(), f"{page.name} names {name}"
            assert not test or f"def {test}(" in (ROOT / name).read_text("utf-8"), (
                f"{page.name} names {name}::{test}"
            )
        for name in re.findall(r"\bresults/(\w+\.\w+)", text):
            assert (ROOT / "notebooks/results" / name).exists(), f"{page.name} names results/{name}"
        for chapter, part, section in re.findall(
            r"[Cc]hapter (\d),? (?:section|part)s? (\d)(?:\.(\d+))?", text
        ):
            known = there.get(int(chapter))
            missing = f"{page.name}: chapter {chapter} has no {part}.{section}"
            assert known is None or (int(part), int(section or 0)) in known, missing


# ── Commands ──────────────────────────────────────────────────────────────────────────────────────

COMMAND = re.compile(r"^ *((?:python|torchrun|make|srun) .*?)(?: {2,}.*|  *#.*)?$", re.MULTILINE)
STAND_INS = {
    "HOST:29500": "127.0.0.1:29500",
    "path/to/copy.ipynb": "notebooks/02_megatron_tp.ipynb",
    "/shared/": "",  # a folder of a cluster
}


def commands(path: Path) -> list[str]:
    """The commands that a page or a chapter's docstring shows, without what is said of them; lines
    continued joined."""
    text = (
        prose(path)
        if path.suffix != ".py"
        else ast.get_docstring(ast.parse(path.read_text("utf-8")))
    )
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return [command.strip() for command in COMMAND.findall(re.sub(r"\\+\n\s*", "", text))]


SHOWN = [(path, command) for path in [*PAGES, *CHAPTERS] for command in commands(path)]


@pytest.fixture(scope="module")
def readers_files(tmp_path_factory) -> Path:
    """A folder with what the commands speak of as the reader's own: a text, recordings, a trained
    model."""
    import speech

    folder = tmp_path_factory.mktemp("readers")
    (folder / "my.txt").write_text("It was a bright cold day in April. " * 500, "utf-8")
    soundfile.write(folder / "me.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    line = json.dumps(dict(audio_filepath="me.wav", duration=1.0, text="one"))
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text(line, "utf-8")
    model = speech.build(speech.SpeechConfig())
    speech.save_model(str(folder / "model.safetensors"), model, ["one"])
    return folder


@pytest.fixture
def one_source(tmp_path_factory, monkeypatch) -> None:
    """The chapters' default text, Python's own sources, is one of them: whether flags and servers
    fit does not depend on the others."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copy(inspect.__file__, folder)
    paths = sysconfig.get_paths() | {"stdlib": str(folder)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: paths)


def put_published_weights(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=4)).save_pretrained(folder)


def pretend_gpus(monkeypatch, gpus: int, world_size: int | None) -> None:
    """A server of so many GPUs; with a world size, one of several on which torchrun has started a
    rank for each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    if world_size:
        started = dict(RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=gpus, WORLD_SIZE=world_size)
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))


def published_encoding(name: str) -> tiktoken.Encoding:
    """In the place of one that would be downloaded: as many words, but only those of one byte are
    ever used."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        name, pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


@pytest.mark.usefixtures("one_source")
@pytest.mark.parametrize("path, command", SHOWN, ids=lambda x: x if isinstance(x, str) else x.stem)
def test_a_command_is_one(path, command, readers_files, tmp_path, monkeypatch, capsys):
    """make knows the target, torchrun its own flags, and the chapter the files and flags that are
    left."""
    for word, stand_in in STAND_INS.items():
        command = command.replace(word, stand_in)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        subprocess.run(
            ["make", "-n", "PY=python", *words[1:]],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=60,
        )
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).exists()
    if "torchrun" in words[0] or words[0] == "srun":
        launcher = words[words.index("srun") + 1 : script] if words[0] == "srun" else words[:script]
        launcher = [
            "8" if word.startswith("$SLURM") else re.sub(r"\$\w+", "8", word)
            for word in launcher[1:]
        ]
        options = run.get_args_parser().parse_args([*launcher, words[script]])
        pretend_gpus(monkeypatch, 8, 8 * int(options.nnodes.split(":")[-1]))
    chapter = importlib.import_module(Path(words[script]).stem)
    shutil.copytree(readers_files, tmp_path, dirs_exist_ok=True)
    if "FOLDER" in words:
        put_published_weights(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", published_encoding)
    monkeypatch.setattr(sys, "argv", [Path(words[script]).name, *words[script + 1 :]])
    if not hasattr(chapter, "flags"):  # a tool or a table file, whose tests run its command
        chapter.main()
        return
    try:
        chapter.flags()
    except SystemExit as end:
        pytest.fail(f"{command}: {capsys.readouterr().err.splitlines()[-1:]}, exit {end.code}")


@pytest.mark.usefixtures("one_source")
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("gpus", [*range(1, 10), 12])
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_flag_is_needed_on_any_server(path, gpus, nodes, monkeypatch, capsys):
    """Started plainly, or by torchrun on two servers, a chapter finds sizes that fit all of the
    GPUs."""
    pretend_gpus(monkeypatch, gpus, gpus * nodes if nodes > 1 else None)
    monkeypatch.setattr(sys, "argv", [path.name])
    try:
        args = importlib.import_module(path.stem).flags()
    except SystemExit as end:
        pytest.fail(f"{capsys.readouterr().err.splitlines()[-1:]}, exit {end.code}")
    assert args.world_size % gpus == 0


def test_the_number_of_lessons_is_named():
    """On the front page, and twice on the course's own."""
    course = (ROOT / "notebooks" / "README.md").read_text("utf-8")
    lessons = [int(number) for number in re.findall(r"^\| (\d+) \|", course, re.M)]
    assert lessons == list(range(1, len(lessons) + 1))
    words = {18: "eighteen", 20: "twenty", 22: "twenty-two", 24: "twenty-four", 26: "twenty-six"}
    word = words[len(lessons)]
    assert f"# A course of {word} lessons" in course and f"{word.capitalize()} lessons of" in course
    assert f"A course of {word} lessons" in (ROOT / "README.md").read_text("utf-8")


FRONT = commands(ROOT / "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("command", FRONT)
def test_the_front_doors_commands_run(command, tmp_path):
    """Each one, as a reader would type it, with few steps; servers are this machine, with a rank
    each."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["make", "test"]:
        pytest.skip("that is this")
    if "--check" in words:
        assert words[1:] == ["02_megatron_tp/megatron_tp.py", *test_02_megatron_tp.CHECK[:-2]]
        pytest.skip("test_02_megatron_tp.py starts that, with --ranks 2")
    if words[:2] == ["make", "lift"]:
        lifted = tmp_path / words.pop().removeprefix("TO=")
        subprocess.run([*words, f"TO={lifted}", f"PY={sys.executable}"], cwd=ROOT, check=True)
        subprocess.run([sys.executable, lifted], cwd=tmp_path, check=True)
        assert "def vocab_parallel_cross_entropy(" in lifted.read_text("utf-8")
        return
    if words[0] == "make":
        words = [*words, "CHAPTER=02", "ARGS=--steps 3", f"PY={sys.executable}"]
    elif words[1:] == ["02_megatron_tp/megatron_tp.py"]:
        printed = subprocess.check_output(
            ["make", "-n", "run", "CHAPTER=02", "PY=python"], cwd=ROOT, text=True
        )
        assert (
            f"script in {words[1]}" in printed and "python $script" in printed
        )  # it is what make run runs
        return
    else:
        words += ["--steps", "2"]
    servers, program = 1, words[0]
    if program == "torchrun":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours = {
            "--nproc-per-node=8": "--nproc-per-node=1",
            "--rdzv-endpoint=HOST:29500": f"--rdzv-endpoint=127.0.0.1:{port}",
        }
        assert ours.keys() <= set(words)
        words, servers = (
            ["-m", "torch.distributed.run", *(ours.get(word, word) for word in words[1:])],
            2,
        )
    else:
        words = words[1:]
    start = functools.partial(
        scripts.started, *words, program=program if program == "make" else sys.executable, cwd=ROOT
    )
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start()) for _ in range(servers)]
        outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * servers, outputs
    text = "".join(out for out, _ in outputs)
    assert "verdict" in text and "FAILED" not in text
    if program == "make":
        check_a_whole_run(text)


def check_a_whole_run(text: str) -> None:
    """The setting, a row a step with its six columns, and the claims, all of them ok."""
    lines = text[text.index("torch ") :].splitlines()
    assert "4 ranks: tp 2 × dp 2, fp32, seed 0" in lines[0]
    header = next(line for line in lines if line.startswith("step"))
    assert header.split() == "step loss single device norm tokens/s peak GB".split()
    rows = test_02_megatron_tp.table_rows(text)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for _, loss, reference, norm, speed, memory in rows:
        assert abs(float(loss) - float(reference)) < 1e-4
        values = float(norm), float(speed.replace(",", "")), float(memory)
        assert all(0 < value < math.inf for value in values)
    begin = next(i for i, line in enumerate(lines) if line.startswith("claim"))
    claims = [line for line in lines[begin + 1 :] if line]
    assert len(claims) == 5
    assert all(line.endswith(" ok") for line in claims), claims


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", front_door.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_print_the_numbers_that_are_kept(page):
    """What `make numbers` measured last is what the page says; and it says something."""
    kept = json.loads(front_door.KEPT.read_text("utf-8"))
    assert page.read_text("utf-8") == front_door.rendered(page, kept), (
        "run make numbers ARGS=--render"
    )
    changed = json.loads(json.dumps(kept))
    for chapter in changed["chapters"].values():
        chapter["seconds"] += 100
        chapter["claims"][0][2] = "another number"
    shows_differences = "<!-- differences -->" in page.read_text(
        "utf-8"
    )  # which `make differences` keeps
    assert shows_differences or page.read_text("utf-8") != front_door.rendered(page, changed)


def test_the_kept_numbers_are_of_this_book():
    kept = json.loads(front_door.KEPT.read_text("utf-8"))
    assert list(kept["chapters"]) == [path.parent.name for path in CHAPTERS]
    for name, chapter in kept["chapters"].items():
        assert chapter["seconds"] < 60, f"{name} takes a minute"
        verdicts = [verdict for *_, verdict in chapter["claims"]]
        assert "FAILED" not in verdicts and verdicts.count("ok") >= 5
