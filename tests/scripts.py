# SPDX-License-Identifier: MIT-0
"""Whole scripts in processes of their own, which never outlive the test that started them; and what
a script does on ranks that are there already, which saves the seconds of a start.
"""

import contextlib
import functools
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import ranks
import torch.distributed as dist


@functools.cache
def bytecode() -> tempfile.TemporaryDirectory:
    """Where processes without docstrings keep their bytecode, which differs from the others'."""
    return tempfile.TemporaryDirectory()


@contextlib.contextmanager
def started(*command: str, program: str = sys.executable, **options):
    """`python *command` (or another program's) with pipes for its output, and without GPUs, so that
    a test means the same on every machine.

    However the with statement is left, the process is asked to stop, which makes torchrun stop its
    ranks; then killed.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if sys.dont_write_bytecode and "PYTHONOPTIMIZE" in environment:
        # Each process would compile all of torch.
        environment |= {"PYTHONPYCACHEPREFIX": bytecode().name, "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen([program, *command], **pipes, env=environment, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def run(script: Path, *flags: str, launcher: tuple[str, ...] = (), timeout: float = 120, **options):
    """Runs a script to its end, as subprocess.run does; `launcher` stands in front:
    ("-m", "torch.distributed.run")."""
    with started(*launcher, str(script), *flags, **options) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def on_ranks(chapter: ModuleType, *flags: str, main: Callable | None = None) -> tuple[int, str]:
    """What a script does with these flags, on every rank of a test that is marked so.

    In fp32 where they do not say otherwise. main: the one that the script launches, by default its
    function main. Returns: exit code here; what rank 0 printed.
    """
    setting = ["--ranks", str(dist.get_world_size()), "--backend", ranks.backend]
    setting += ["--device", ranks.device.type, "--dtype", "fp32"]
    code, printed = 0, io.StringIO()
    with mock.patch.object(sys, "argv", [chapter.__file__, *setting, *map(str, flags)]):
        args = chapter.flags()
        try:
            with contextlib.redirect_stdout(printed):
                (main or chapter.main)(args, ranks.device)
        except SystemExit as end:
            code = end.code
    of_rank_0 = [printed.getvalue()]
    dist.broadcast_object_list(of_rank_0)
    return code, of_rank_0[0]
