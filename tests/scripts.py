# SPDX-License-Identifier: MIT-0
"""Whole scripts in processes of their own, which never outlive the test that started them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path


@contextlib.contextmanager
def started(*command: str, program: str = sys.executable, **options):
    """`python *command` (or another program's) with pipes for its output, and without GPUs, so that a test means the
    same on every machine.

    However the with statement is left, the process is asked to stop, which makes torchrun stop its ranks; then killed.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
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
    """Runs a script to its end, as subprocess.run does; `launcher` stands in front: ("-m", "torch.distributed.run")."""
    with started(*launcher, str(script), *flags, **options) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
