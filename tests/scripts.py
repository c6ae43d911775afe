# SPDX-License-Identifier: MIT-0
"""Whole scripts in processes of their own, which never outlive the test that started them: started
by `run`, or forked, which saves the seconds in which each process imports torch. And what a script
does on ranks that are there already.
"""

import contextlib
import functools
import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import ranks
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler


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


def forked(script: Path | str, *flags: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """As `run`, but the process is a fork of a server that has imported torch, and torchrun forks
    the ranks from it."""
    command = [str(script), *map(str, flags)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        args = command, outputs, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        process = ranks.context().Process(target=_launcher, args=args, daemon=False)
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(command, timeout)
        finally:
            if process.exitcode is None:
                process.terminate()
                process.join(30)
                process.kill()
        texts = [path.read_text("utf-8") for path in outputs]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _launcher(command: list[str], outputs: list[Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    subprocess_handler.Popen = _Fork
    _execute(command, environment)


def _execute(command: list[str], environment: dict[str, str]) -> None:
    """The script as __main__. PYTHONOPTIMIZE and PYTHONIOENCODING are taken as at a start, but the
    first one by the script alone: other modules keep docstrings and assertions."""
    gc.freeze()  # what the server has imported stays: looking for garbage in it would copy it
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING", "utf-8"))
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    level = int(environment.get("PYTHONOPTIMIZE", -1))
    code = compile(Path(command[0]).read_bytes(), command[0], "exec", optimize=level)
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = command[0]
    exec(code, vars(module))


class _Fork:
    """What torchrun needs of subprocess.Popen, for a rank: a fork that executes a script."""

    def __init__(self, args: tuple, env: dict[str, str], stdout, stderr, start_new_session: bool):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun handles them
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _execute([*args[2:]], env)  # behind python -u
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)


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
