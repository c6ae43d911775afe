# SPDX-License-Identifier: MIT-0
"""Runs every test marked `ranks` on the ranks of a pool: its body is what each rank executes.

@pytest.mark.ranks(1, 2, 4)
def test_something(...): ...
    runs three times, in worlds of 1, 2 and 4 ranks; dist is ready there

@pytest.mark.ranks(2, detail=True)
    as under TORCH_DISTRIBUTED_DEBUG=DETAIL: torch compares the ranks' calls of every collective

pytest --device cuda --backend nccl --ranks 8
    the same tests on GPUs; tests that need more ranks are skipped
"""

import gc
import os
from pathlib import Path

import pytest
import ranks
import torch
from proof import Shows

ROOT = Path(__file__).resolve().parent.parent
POOLS: dict[tuple[int, bool], ranks.Pool] = {}  # by world and detail
gc.disable()  # until all tests are collected


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the ranks of tests compute"
    )
    parser.addoption(
        "--backend",
        choices=("gloo", "nccl"),
        default="gloo",
        help="what the ranks of tests talk through",
    )
    parser.addoption(
        "--ranks",
        type=int,
        default=8,
        help="the largest world; tests that need more ranks are skipped",
    )


def pytest_configure(config):
    if not __debug__:
        raise pytest.UsageError("PYTHONOPTIMIZE takes the assertions out of the tests: unset it")
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PY", "CHAPTER", "ARGS", "PROCESSES"):
        os.environ.pop(name, None)  # what `make test PY=...` hands on is not for a test's own make
    torch.set_num_threads(1)  # as in the ranks: two threads on a busy machine are far slower
    ranks.PATHS[:] = [str(ROOT / path) for path in config.getini("pythonpath")]


def pytest_generate_tests(metafunc):
    if marker := metafunc.definition.get_closest_marker("ranks"):
        metafunc.fixturenames.append("world")
        metafunc.parametrize("world", marker.args, ids=lambda size: f"{size}ranks")


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay: no garbage is looked for among them
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)  # as in the ranks: a test draws the same values in every run


def pytest_runtest_teardown(item, nextitem):
    torch.set_flush_denormal(False)  # chapter 1's main sets it, for the whole process
    if nextitem is None or nextitem.path != item.path:
        close_pools()  # what this file's tests have made: models, groups and their threads


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    kwargs = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if not (marker := pyfuncitem.get_closest_marker("ranks")):
        if pyfuncitem.get_closest_marker("planted_bug"):
            keep(pyfuncitem, pyfuncitem.obj(**kwargs))
            return True
        return None
    world, option = pyfuncitem.callspec.params["world"], pyfuncitem.config.getoption
    if world > option("--ranks"):
        pytest.skip(f"needs {world} ranks; --ranks is {option('--ranks')}")
    key = world, marker.kwargs.get("detail", False)
    pool = POOLS.setdefault(key, ranks.Pool(world, option("--device"), option("--backend"), key[1]))
    names = pyfuncitem.module.__name__, pyfuncitem.originalname
    try:
        (seen, *_) = pool.run(*names, kwargs, marker.kwargs.get("timeout", 60.0))
    except ranks.RankSkipped as skipped:
        pytest.skip(str(skipped))
    except (ranks.RankFailed, TimeoutError) as error:
        pytest.fail(str(error), pytrace=False)
    if pyfuncitem.get_closest_marker("planted_bug"):
        keep(pyfuncitem, seen)
    return True


def keep(item, seen) -> None:
    """What a planted bug's test has seen, for the table of `make bugs`."""
    bug = item.get_closest_marker("planted_bug").kwargs
    if not isinstance(seen, Shows):
        pytest.fail(
            "a planted bug's test returns Shows(loss=..., gradients=...): what a user sees of it"
        )
    loss, gradients = seen.words()
    item.user_properties.append(("planted bug", {**bug, "loss": loss, "gradients": gradients}))


def pytest_terminal_summary(terminalreporter, config):
    """`make bugs` ends in a table: what was planted, what the loss and what a check of gradients
    shows, who had it."""
    if config.option.markexpr != "planted_bug":
        return
    rows = {}  # one for each bug, however many worlds it ran in: the largest speaks
    for report in [
        *terminalreporter.stats.get("passed", []),
        *terminalreporter.stats.get("failed", []),
    ]:
        file, name = report.nodeid.split("[")[0].split("::")
        bug = dict(report.user_properties).get(
            "planted bug", dict(loss="", gradients="", symptom="", seen_in=None)
        )
        caught = rows.get((file, name), (True,))[0] and report.passed
        rows[file, name] = caught, bug
    line = terminalreporter.write_line
    line(f"\n{'planted bug':58} {'the loss':28} {'a check of gradients':28} by our tests")
    for (file, name), (caught, bug) in sorted(rows.items()):
        title = f"{Path(file).stem[5:7]} {name.removeprefix('test_').replace('_', ' ')}"
        line(
            f"{title:58} {bug['loss']:28} {bug['gradients']:28} {'caught' if caught else 'MISSED'}"
        )
        where = f" [{bug['seen_in'].removeprefix('https://github.com/')}]" if bug["seen_in"] else ""
        line(f"     {bug['symptom']}{where}")
    line(f"{sum(caught for caught, _ in rows.values())} of {len(rows)} planted bugs caught")


def pytest_sessionfinish():
    close_pools()


def close_pools() -> None:
    for pool in POOLS.values():
        pool.close()
