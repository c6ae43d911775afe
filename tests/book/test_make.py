# SPDX-License-Identifier: MIT-0
"""The Makefile's targets that depend on what the interpreter has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_blocks

TESTS = sorted((shared_blocks.ROOT / "tests").glob("test_*.py"))


def interpreter(folder: Path, lacks: str) -> Path:
    """A python that works like this one, but without one module for `-m`."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\n[ "$2" = {lacks} ] && exit 1\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def lint(folder: Path, *variables: str) -> subprocess.CompletedProcess:
    """`make lint` of the Makefile, on the files of a folder."""
    makefile = shared_blocks.ROOT / "Makefile"
    command = ["make", "--file", makefile, "lint", *variables]
    outside_ci = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(command, cwd=folder, env=outside_ci, capture_output=True, text=True)


@pytest.mark.parametrize("has_xdist", [True, False])
def test_processes_share_the_tests(has_xdist, tmp_path):
    """A file at a time, the book's first; without pytest-xdist one process runs them all."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = "import xdist" ] && exit {0 if has_xdist else 1}\n')
    python.chmod(0o755)
    command = ["make", "--dry-run", "test", f"PY={python}", "PROCESSES=3", "ARGS=-x"]
    done = subprocess.run(
        command, cwd=shared_blocks.ROOT, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()[-1].split()
    shared = ["--numprocesses", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    tests = [str(path.relative_to(shared_blocks.ROOT)) for path in TESTS]
    expected = [*(shared if has_xdist else []), "tests/book", *tests, "-x"]
    assert words == [str(python), "-m", "pytest", *expected]


def test_without_ruff_lint_is_one_line(tmp_path):
    done = lint(tmp_path, f"PY={interpreter(tmp_path, lacks='ruff')}")
    assert done.returncode == 0
    assert "has no ruff" in done.stdout
    assert len(done.stdout.splitlines()) == 1 and not done.stderr


@pytest.mark.parametrize("where", ["CI=true", "DEV=python"])
def test_in_ci_and_in_the_venv_ruff_must_be_there(where, tmp_path):
    """DEV names the stamp of .venv's installation; here a file that exists stands for it."""
    assert lint(tmp_path, f"PY={interpreter(tmp_path, lacks='ruff')}", where).returncode != 0


@pytest.mark.parametrize("source", ["import os\n", "x=1\n"], ids=["check", "format"])
def test_with_ruff_lint_still_fails_on_style(source, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    assert lint(tmp_path, f"PY={sys.executable}").returncode != 0


def test_lab_opens_the_notebooks_with_what_it_installs():
    command = ["make", "--dry-run", "lab", "PY=python"]
    done = subprocess.run(
        command, cwd=shared_blocks.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "python -m jupyterlab notebooks \n"
    command = [sys.executable, "-m", "jupyterlab", "--version"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    own = subprocess.run(
        ["make", "-pn", "lab"], cwd=shared_blocks.ROOT, capture_output=True, text=True
    )
    assert "\nlab: .venv/.installed-dev\n" in own.stdout
