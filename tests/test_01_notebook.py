# SPDX-License-Identifier: MIT-0
"""Chapter 1's notebook: wrong answers to its exercises are not accepted."""

import nbformat
import pytest

import notebooks

STATISTICS = """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    {sums}
    mean = sums[0] / sums[1]
    {variance}
"""
SUMMED = "dist.all_reduce(sums)"
PATHS = """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = {start} + [0] * (len(symbols) - 2)
    for _ in range({steps}):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and ({skip})
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return {end}
"""
GATHER = """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range({steps}):
        receive = dist.irecv(pieces[{arriving}], {source})
        send = dist.isend(pieces[{leaving}], {target})
        receive.wait()
        send.wait()
    return pieces
"""


def statistics(sums: str = SUMMED, variance: str = "pass") -> str:
    return STATISTICS.format(sums=sums, variance=variance)


def paths(**changes: str) -> str:
    right = {
        "start": "[1, 1]",
        "steps": "T - 1",
        "skip": "symbols[s] != '_' and symbols[s] != symbols[s - 2]",
        "end": "ways[-1] + ways[-2]",
    }
    return PATHS.format(**(right | changes))


def gather(**changes: str) -> str:
    right = {
        "steps": "3",
        "arriving": "(rank - step - 1) % 4",
        "source": "left",
        "leaving": "(rank - step) % 4",
        "target": "right",
    }
    return GATHER.format(**(right | changes))


SQUARES = "squares = (frames - mean).square().sum(); dist.all_reduce(squares); "
WRONG_ANSWERS = [
    (
        "1",
        "means of means, without the empty rank",
        """
def statistics(frames):
    mean = frames.mean() if len(frames) else torch.zeros((), dtype=frames.dtype)
    variance = (frames - mean).square().mean() if len(frames) else torch.zeros_like(mean)
    dist.all_reduce(mean)
    dist.all_reduce(variance)
    return mean / 3, variance / 3
""",
    ),
    (
        "1",
        "the variance around the rank's own mean",
        statistics(
            variance="squares = (frames - frames.mean()).square().sum() if len(frames) else "
            "torch.zeros_like(mean); dist.all_reduce(squares); return mean, squares / sums[1]"
        ),
    ),
    (
        "1",
        "the mean of squares less the square of the mean",
        statistics(
            variance="squares = frames.square().sum(); dist.all_reduce(squares); "
            "return mean, squares / sums[1] - mean**2"
        ),
    ),
    ("1", "the unbiased variance", statistics(variance=SQUARES + "return mean, squares / 13")),
    (
        "1",
        "the squares of one rank",
        statistics(variance="return mean, (frames - mean).square().sum() / sums[1]"),
    ),
    ("1", "no sum", statistics("pass", "return mean, (frames - mean).square().mean()")),
    ("2", "no start in a letter", paths(start="[1, 0]")),
    ("2", "blanks between all letters", paths(skip="False")),
    ("2", "a skip between equal letters", paths(skip="symbols[s] != '_'")),
    ("2", "a skip of letters", paths(skip="symbols[s] != symbols[s - 2] or symbols[s] == '_'")),
    ("2", "no end in a letter", paths(end="ways[-1]")),
    ("2", "one frame more", paths(steps="T")),
    ("2", "a choice of frames", "import math\ndef paths(text, T): return math.comb(T, len(text))"),
    ("3", "two steps", gather(steps="2")),
    ("3", "the other way", gather(source="right", target="left")),
    ("3", "always its own", gather(leaving="rank")),
    ("3", "stored one place further", gather(arriving="(rank - step - 2) % 4")),
    (
        "3",
        "to each rank directly",
        gather(
            arriving="(rank - step - 1) % 4",
            source="(rank - step - 1) % 4",
            leaving="rank",
            target="(rank + step + 1) % 4",
        ),
    ),
    (
        "3",
        "another collective",
        """
def ring_all_gather(mine):
    pieces = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(pieces, mine)
    return pieces
""",
    ),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(tmp_path):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = nbformat.read(notebooks.ROOT / "notebooks/01_deepspeech.ipynb", as_version=4)
    notebooks.solve(notebook)
    cells = notebooks.needed(notebook)
    tasks = notebooks.exercises(notebook)
    place = {number: cells.index(task) for number, task in tasks.items()}
    check = {number: cells[place[number] + 1] for number in tasks}
    # What the wrong answers change is right apart from the change.
    right = [("2", paths()), ("3", gather())]
    right.append(("1", statistics(variance=SQUARES + "return mean, squares / sums[1]")))
    tried = []
    for number, answer in [*right, *((number, answer) for number, _, answer in WRONG_ANSWERS)]:
        magic = "%%px\n" if check[number].source.startswith("%%px") else ""
        tried.append(nbformat.v4.new_code_cell(f"print('── {len(tried) // 3}')"))
        tried.append(nbformat.v4.new_code_cell(magic + answer))
        tried.append(nbformat.v4.new_code_cell(check[number].source))
    notebook.cells = [*cells[:-1], *tried, cells[-1]]  # the last cell stops the ranks
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    text = notebooks.printed(notebooks.execute(tmp_path / "wrong.ipynb"))
    solved, *answers = text.split("── ")
    assert len(tasks) == 3 and all(f"exercise {number}: ok" in solved for number in tasks)
    assert all(": ok" in answer for answer in answers[:3])
    for (number, name, _), answer in zip(WRONG_ANSWERS, answers[3:], strict=True):
        assert f"exercise {number}: not solved yet" in answer, name
