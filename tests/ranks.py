# SPDX-License-Identifier: MIT-0
"""A pool of ranks that tests run on, so that a distributed test costs milliseconds.

The ranks are forked from a server that has imported torch already, make their process group once,
and then take one test after the other. After a failure, or a test that takes too long, they are
killed and started anew: a test fails alone. So are ranks that hold many process groups. A rank ends
by itself when the process that started it is gone.
"""

import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from unittest import mock

import torch
import torch.distributed as dist

PRELOADED = ["pytest", "hypothesis", "torch", "torch.distributed.run", "torch._dynamo", "ranks"]
PATHS = []  # where tests and chapters are imported from
MOST_GROUPS = 64  # each holds a connection to every other rank
device = torch.device("cpu")  # in a rank: the one that it owns
backend = "gloo"  # what its tensors on that device travel through


class RankFailed(AssertionError):
    """A rank raised; the message is that rank's traceback."""


class RankSkipped(Exception):
    """A rank called pytest.skip; the message is its reason."""


def context() -> multiprocessing.context.BaseContext:
    """Starts processes as forks of a server that has imported torch."""
    paths = [*PATHS, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))  # the server's
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ):
        os.environ.pop("PYTHONOPTIMIZE", None)  # where a test has set it, for its own processes
        forkserver.ensure_running()
    return forks


def _serve(
    rank: int, world: int, store: str, device_type: str, through: str, detail: bool, connection
) -> None:
    """What a rank does: wait for a function, run it, send back what it returned or raised."""
    global device, backend
    backend = through
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    gc.freeze()  # what the server has imported stays: looking for garbage in it would copy it
    torch.set_num_threads(1)
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    _stay_on_a_core(rank, world)
    _share_a_device()
    device_id = device if backend == "nccl" else None
    # Some tests make their tensors on the CPU.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    options = dict(rank=rank, world_size=world, timeout=timedelta(seconds=60), device_id=device_id)
    if detail:  # what TORCH_DISTRIBUTED_DEBUG=DETAIL sets
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    dist.init_process_group(backends, init_method=f"file://{store}", **options)
    while True:
        try:
            module, name, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            torch.manual_seed(0)
            reply = "ok", getattr(importlib.import_module(module), name)(**kwargs)
        except BaseException as error:
            skipped = type(error).__name__ == "Skipped"
            reply = ("skipped", str(error)) if skipped else ("failed", traceback.format_exc())
        groups = len(dist.distributed_c10d._world.pg_map)
        connection.send_bytes(pickle.dumps((*reply, groups)))


def _share_a_device() -> None:
    """Process groups of this rank, however many, send and receive by one thread: gloo starts one
    for each of its devices, which wakes a hundred times a second."""
    shared = dist.ProcessGroupGloo.create_default_device()
    make = dist.ProcessGroupGloo.__init__

    def init(group, store, rank, size, timeout) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [shared], 2, timeout
        make(group, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = init


def _stay_on_a_core(rank: int, world: int) -> None:
    """While gloo's thread on one core waits for a lock that another thread of the rank holds, it
    does not sleep: with more ranks than cores, that is most of a collective's time."""
    if world > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[rank % len(cores)]])


class Pool:
    """`world` ranks. run("module", "function", kwargs) calls the function on each and returns what
    each returned. detail: torch compares the ranks' calls of every collective, which is slow."""

    def __init__(
        self, world: int, device_type: str = "cpu", backend: str = "gloo", detail: bool = False
    ):
        self.world, self.settings, self.processes = world, (device_type, backend, detail), []

    def _start(self) -> None:
        forks = context()
        self.folder = tempfile.TemporaryDirectory()
        self.connections = []
        for rank in range(self.world):
            ours, theirs = forks.Pipe()
            args = rank, self.world, f"{self.folder.name}/store", *self.settings, theirs
            self.processes.append(forks.Process(target=_serve, args=args, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.connections.append(ours)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def run(
        self, module: str, name: str, kwargs: dict | None = None, timeout: float = 60.0
    ) -> list:
        """Raises RankFailed with the first failing rank's traceback, TimeoutError naming silent
        ranks, RankSkipped."""
        if not self.processes:
            self._start()
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        replies = [None] * self.world
        deadline = time.monotonic() + timeout
        try:
            for connection in self.connections:
                connection.send_bytes(pickle.dumps((module, name, kwargs or {})))
            while waiting:
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    silent = sorted(waiting.values())
                    message = f"{module}.{name}: ranks {silent} silent after {timeout:g} s"
                    raise TimeoutError(message)
                for connection in ready:
                    rank = waiting.pop(connection)
                    try:
                        outcome, value, groups = pickle.loads(connection.recv_bytes())
                    except (EOFError, ConnectionResetError):
                        raise RankFailed(
                            f"rank {rank} died without a word in {module}.{name}"
                        ) from None
                    if outcome == "failed":
                        raise RankFailed(f"rank {rank} of {self.world}:\n{value}")
                    replies[rank] = outcome, value
        except BaseException:
            self.close()
            raise
        if groups > MOST_GROUPS:
            self.close()
        if skips := [value for outcome, value in replies if outcome == "skipped"]:
            raise RankSkipped(skips[0])
        return [value for _, value in replies]
