# SPDX-License-Identifier: MIT-0
"""The launcher of every chapter, when something goes wrong around it; `make robustness` does that to whole runs."""

import argparse
import contextlib

import deepspeech as ds
import pytest
import torch
from proof import plant


def test_a_trace_is_written_as_a_whole_or_not_at_all(tmp_path):
    """The disk's limit is the process's own, RLIMIT_FSIZE. The profiler raises nothing then, and leaves half a file."""
    resource = pytest.importorskip("resource")
    trace, limits = tmp_path / "trace.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    ds.write_trace(profiled(), str(trace))
    good, later = trace.read_bytes(), profiled()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"trace.json cannot be written; is the disk full\?"):
            ds.write_trace(later, str(trace))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trace.read_bytes() == good and [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def profiled() -> torch.profiler.profile:
    with torch.profiler.profile() as profile:
        for _ in range(100):
            torch.rand(100) @ torch.rand(100)
    return profile


@pytest.mark.parametrize("words", ["Connection closed by peer [127.0.0.1]:1", "writev [127.0.0.1]:1: Broken pipe"])
@pytest.mark.parametrize("where", ["init_process_group", "all_reduce", "barrier"])
def test_a_rank_that_merely_notices_lets_the_other_be_named(where, words):
    """From the first message to the last: it waits before it fails, so that torchrun finds the dead one first."""

    def lost(*args, **kwargs):
        raise RuntimeError(words)

    args, slept = argparse.Namespace(device="cpu", backend="gloo", timeout=9.0, trace=None), []
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match=words.replace("[", r"\[")):
        stack.enter_context(plant(ds.time, "sleep", slept.append))
        for name in ("init_process_group", "all_reduce", "barrier", "destroy_process_group"):
            stack.enter_context(plant(ds.dist, name, lost if name == where else lambda *args, **kwargs: None))
        ds.run_rank(lambda args, device: None, args)
    assert slept == [5]


@pytest.mark.parametrize("code", [0, 1])
def test_a_rank_that_leaves_by_exit_still_meets_the_others(code):
    """--check, and claims that failed: the last barrier and the end of the group come first, then the exit code."""

    def leaves(args, device):
        raise SystemExit(code)

    args, called = argparse.Namespace(device="cpu", backend="gloo", timeout=9.0, trace=None), []
    with contextlib.ExitStack() as stack, pytest.raises(SystemExit) as left:
        for name in ("init_process_group", "all_reduce", "barrier", "destroy_process_group"):
            stack.enter_context(plant(ds.dist, name, lambda *args, name=name, **kwargs: called.append(name)))
        ds.run_rank(leaves, args)
    assert left.value.code == code and called[-2:] == ["barrier", "destroy_process_group"]
