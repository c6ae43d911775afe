# SPDX-License-Identifier: MIT-0
"""Runs every test marked `ranks` on the ranks of a pool: its body is what each rank executes.

@pytest.mark.ranks(1, 2, 4)
def test_something(...): ...        runs three times, in worlds of 1, 2 and 4 ranks; dist is ready there

pytest --device cuda --backend nccl --ranks 8        the same tests on GPUs; tests that need more ranks are skipped
"""

from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).resolve().parent.parent
POOLS: dict[int, ranks.Pool] = {}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the ranks of tests compute")
    parser.addoption("--backend", choices=("gloo", "nccl"), default="gloo", help="what the ranks of tests talk through")
    parser.addoption("--ranks", type=int, default=4, help="the largest world; tests that need more ranks are skipped")


def pytest_configure(config):
    if not __debug__:
        raise pytest.UsageError("PYTHONOPTIMIZE takes the assertions out of the tests: unset it")
    ranks.PATHS[:] = [str(ROOT / path) for path in config.getini("pythonpath")]


def pytest_generate_tests(metafunc):
    if marker := metafunc.definition.get_closest_marker("ranks"):
        metafunc.fixturenames.append("world")
        metafunc.parametrize("world", marker.args, ids=lambda size: f"{size}ranks")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not (marker := pyfuncitem.get_closest_marker("ranks")):
        return None
    world, option = pyfuncitem.callspec.params["world"], pyfuncitem.config.getoption
    if world > option("--ranks"):
        pytest.skip(f"needs {world} ranks; --ranks is {option('--ranks')}")
    pool = POOLS.setdefault(world, ranks.Pool(world, option("--device"), option("--backend")))
    kwargs = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    try:
        pool.run(pyfuncitem.module.__name__, pyfuncitem.originalname, kwargs, marker.kwargs.get("timeout", 60.0))
    except ranks.RankSkipped as skipped:
        pytest.skip(str(skipped))
    except (ranks.RankFailed, TimeoutError) as error:
        pytest.fail(str(error), pytrace=False)
    return True


def pytest_sessionfinish():
    for pool in POOLS.values():
        pool.close()
