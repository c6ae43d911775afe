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


def pytest_collection_modifyitems(items):
    for item in items:
        if marker := item.get_closest_marker("planted_bug"):
            item.user_properties.append(("planted bug", marker.kwargs))


def pytest_terminal_summary(terminalreporter, config):
    """`make bugs` ends in a table: what was planted, what a user sees of it, whether the tests catch it, who had it."""
    if config.option.markexpr != "planted_bug":
        return
    rows = {}  # one for each bug, however many worlds it ran in
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        file, name = report.nodeid.split("[")[0].split("::")
        bug = dict(report.user_properties)["planted bug"]
        caught = rows.get((file, name), (True,))[0] and report.passed
        rows[file, name] = caught, bug["symptom"], bug["seen_in"]
    for (file, name), (caught, symptom, seen_in) in sorted(rows.items()):
        where = f"   {seen_in.removeprefix('https://github.com/')}" if seen_in else ""
        title = f"{Path(file).stem[5:7]} {name.removeprefix('test_').replace('_', ' ')}"
        terminalreporter.write_line(f"{title:62} {'caught' if caught else 'MISSED'}{where}")
        terminalreporter.write_line(f"   {symptom}")


def pytest_sessionfinish():
    for pool in POOLS.values():
        pool.close()
