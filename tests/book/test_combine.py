# SPDX-License-Identifier: MIT-0
"""Which techniques combine: the kept matrix is whole, is what the page says, and is repeatable."""

import itertools
import json

import measure_combine as combine
import pytest
import ranks
import torch.distributed as dist

RESULTS = json.loads(combine.RESULTS.read_text("utf-8"))


def test_every_pair_is_there_once():
    """With an error, a refusal, or a sentence that says why not."""
    assert RESULTS["command"] == "make combine"
    assert list(RESULTS["pairs"]) == combine.pairs() and len(set(combine.pairs())) == 153
    for pair, entry in RESULTS["pairs"].items():
        kinds = [kind for kind in ("error", "refused", "apart") if kind in entry]
        assert len(kinds) == 1, pair
        if "error" in entry:
            assert set(pair.split(" × ")) <= set(combine.RUNS[entry["run"]].names)
        if "apart" in entry:
            assert entry["apart"] == combine.apart(*pair.split(" × "))


def test_what_was_run_is_equal_to_the_single_device():
    for pair, entry in RESULTS["pairs"].items():
        assert "error" not in entry or combine.is_good(pair, entry), pair


def test_runs_techniques_and_places_exist():
    """And no pair is called apart whose techniques have a script in common without a reason."""
    used = set()
    for name, run in combine.RUNS.items():
        kept = RESULTS["runs"][name]
        assert set(run.names) <= combine.TECHNIQUES.keys(), name
        assert (kept["ranks"], kept["techniques"]) == (run.ranks, run.names)
        assert kept["compared"] > 0
        used |= set(run.names)
    assert RESULTS["runs"].keys() == combine.RUNS.keys() and used == combine.TECHNIQUES.keys()
    for places in combine.TECHNIQUES.values():
        assert places and all((combine.ROOT / place).exists() for place in places)
    for pair, entry in RESULTS["pairs"].items():
        if "apart" in entry:
            here, there = (set(combine.TECHNIQUES[name]) for name in pair.split(" × "))
            assert not here & there, pair


def test_the_page_says_what_is_kept():
    text = combine.PAGE.read_text("utf-8")
    assert text == combine.rendered(text, RESULTS), "run make combine"
    changed = json.loads(json.dumps(RESULTS))
    changed["pairs"]["tensor × data"]["error"] = 1.0
    assert text != combine.rendered(text, changed)
    assert "**wrong: 1e+00**" in combine.markdown(changed)


@pytest.mark.parametrize("index", range(len(combine.ATTEMPTS)))
def test_refusals_are_those_of_the_code(index):
    one = combine.ATTEMPTS[index]
    if one.ranks > 1:
        pytest.skip("on several ranks; make combine repeats it")
    error = combine.attempt(index)
    assert error
    for pair in one.pairs:
        assert RESULTS["pairs"][combine.key(*pair)] == {"refused": error}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", ["chapter 13, FP8", "chapter 6"])
def test_a_run_measured_anew(name):
    if ranks.device.type != "cpu":
        pytest.skip("the kept numbers are a CPU's")
    errors = combine.prove(name)
    assert len(errors) == RESULTS["runs"][name]["compared"]
    assert max(errors.values()) <= combine.BOUND


@pytest.mark.ranks(4)
def test_nvfp4_over_ranks_is_not_the_single_devices():
    index = [one.ranks for one in combine.ATTEMPTS].index(4)
    error = combine.attempt(index)
    assert "each rank rounds its own tokens" in error
    assert dist.get_world_size() == combine.ATTEMPTS[index].ranks


def test_pairs_have_one_name():
    for a, b in itertools.permutations(combine.TECHNIQUES, 2):
        assert combine.key(a, b) == combine.key(b, a) and combine.key(a, b) in RESULTS["pairs"]
