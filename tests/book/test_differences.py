# SPDX-License-Identifier: MIT-0
"""Is this difference normal? The kept measurement is whole, says what the notebook says of it, and
can be repeated."""

import json
import math
import re

import measure_differences as measure
import nbformat
import pytest
import ranks
import torch
import torch.distributed as dist

TEXT = measure.RESULTS.read_text("utf-8")
RESULTS = json.loads(TEXT)
CELLS = [
    (name, width) for name, technique in measure.TECHNIQUES.items() for width in technique.widths
]
NARROW = [(name, width) for name, width in CELLS if width != "fp64"]
NOTEBOOK = measure.ROOT / "notebooks" / "00_is_this_difference_normal.ipynb"

# How much further from float64 than one device the ranks may be, each the largest of its seeds.
FACTOR = 3


def test_the_file_is_what_the_command_writes():
    assert RESULTS["command"] == "make differences" and RESULTS["seeds"] >= 3
    assert measure.dump(RESULTS) == TEXT
    assert re.search(
        r"^differences:.*\n\t.*measure_differences\.py$",
        (measure.ROOT / "Makefile").read_text(),
        re.M,
    )


@pytest.mark.parametrize("name, width", CELLS)
def test_every_cell_is_there(name, width):
    cell = RESULTS["cells"][name][width]
    places = [cell["single"], cell["reordered"]]
    places += [cell[str(n)][what] for n in measure.RANKS for what in ("apart", "float64")]
    assert len(cell) == 2 + len(measure.RANKS)
    for place in places:
        assert list(place) == list(measure.QUANTITIES)
        for errors in place.values():
            assert len(errors) == RESULTS["seeds"] and all(
                0 <= error < math.inf for error in errors
            )


@pytest.mark.parametrize("name, width", [cell for cell in CELLS if cell[1] == "fp64"])
def test_float64_has_nothing_to_interpret(name, width):
    assert all(
        measure.largest(RESULTS, name, width, quantity) < 1e-10 for quantity in measure.QUANTITIES
    )


@pytest.mark.parametrize("quantity", ["loss", "norm", "gradient", "SGD"])
@pytest.mark.parametrize("name, width", NARROW)
def test_ranks_are_as_good_as_the_single_device(name, width, quantity):
    """A loss and a norm are single numbers, right by chance at times: their own last digit is
    allowed."""
    single = measure.largest(RESULTS, name, width, quantity, "single")
    if quantity in ("loss", "norm"):
        single = max(
            single,
            measure.WIDTHS["bf16" if (quantity, width) == ("norm", "bf16") else "fp32"].roundoff,
        )
    assert measure.largest(RESULTS, name, width, quantity, "float64") <= FACTOR * single


@pytest.mark.parametrize("bug", measure.BUGS)
def test_a_planted_bug_is_as_large_in_every_width(bug):
    """In float64 and fp32 the bound on gradients finds all of them; and what is found is no
    rounding: it stays."""
    found = {width: cell["apart"]["gradient"] for width, cell in RESULTS["bugs"][bug].items()}
    assert min(found["fp64"]) > 1e-10 * 1e5
    assert min(found["fp32"]) > measure.threshold(RESULTS, measure.RESIDUAL, "fp32", "gradient")
    for wide, narrow in zip(found["fp64"], found["fp32"]):
        assert narrow == pytest.approx(wide, rel=0.1)


def test_thresholds_of_the_notebook():
    """The table in its text is what the measurement gives; so is what its picture of the margin
    says."""
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    rows = {
        row[0]: row[1:]
        for row in re.findall(r"^\| \*\*(.+?)\*\* \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.M)
    }
    assert list(rows) == ["fp64", "fp32", "bf16 autocast", "bf16"]
    assert rows.pop("fp64") == ("1e-10",) * 3
    for width, bounds in rows.items():
        names = [name for name in measure.RESIDUAL if width in RESULTS["cells"][name]]
        here = [
            measure.threshold(RESULTS, names, width, quantity)
            for quantity in ("loss", "norm", "gradient")
        ]
        assert bounds == tuple(measure.short(bound) for bound in here)
    assert (
        f"times {['zero', 'one', 'two', 'three', 'four', 'five'][measure.MARGIN]}, rounded up"
        in text
    )


def test_the_readmes_table():
    lines = measure.markdown(RESULTS).splitlines()
    assert len(lines) <= 2 + 22 and {line.count("|") for line in lines} == {10}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("width", ["fp64", "fp32"])
def test_a_cell_measured_anew(width):
    """Tensor parallelism on two ranks: each error is within a power of ten of the kept ones."""
    if ranks.device.type != "cpu":
        pytest.skip("the kept numbers are a CPU's")
    shares = [None, None]
    dist.all_gather_object(shares, measure.on_ranks("tensor", 0, width, optimizers=("SGD",)))
    found = measure.compare(
        measure.join("tensor", shares), measure.alone("tensor", 0, width, optimizers=("SGD",))
    )
    for quantity in ("gradient", "SGD"):
        kept = RESULTS["cells"]["tensor"][width]["2"]["apart"][quantity]
        assert min(kept) / 10 < found[quantity] < 10 * max(kept)


@pytest.mark.ranks(1, 2, 4)
def test_every_adapter_in_float64():
    """All techniques, first step, on the ranks that there are: what is measured is a right
    program."""
    if ranks.device.type != "cpu":
        pytest.skip("the measurement runs on CPUs")
    for name, technique in measure.TECHNIQUES.items():
        if "fp64" in technique.widths:
            options, shares = dict(optimizers=("SGD",), steps=1), [None] * dist.get_world_size()
            dist.all_gather_object(shares, measure.on_ranks(name, 3, "fp64", **options))
            if dist.get_rank() == 0:
                found = measure.compare(
                    measure.join(name, shares), measure.alone(name, 3, "fp64", **options)
                )
                assert max(found.values()) < 1e-12, f"{name}: {found}"


def test_errors_are_never_lost():
    x, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert measure.error(x, x) == 0 and measure.error(x + 0.5, x) == 0.5
    assert (
        measure.error(nan, x) == measure.error(x, 0 * x) == math.inf
        and measure.error(0 * x, 0 * x) == 0
    )
