# SPDX-License-Identifier: MIT-0
"""Chapter 3's notebook: wrong answers to its exercises are not accepted."""

import nbformat
import pytest

import notebooks

ZB_H2 = """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = {numbers}
        ops, waiting = [pl.Op("F", i, {stage}) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, {stage}))
            ops.append(pl.Op("B", i, {stage}))
            waiting.append(pl.Op("W", i, {stage}))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops{last})
    return table
"""
BY_HAND = """
def one_micro_batch(stage, tokens, targets):
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        {arrives}
    else:
        x = tokens
    y = stage(rank, x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        {backward}
    else:
        {loss}.backward()
    if rank > 0:
        dist.send({sends}, rank - 1)
"""


def zb_h2(numbers: str, stage: str = "rank", last: str = " + waiting") -> str:
    return ZB_H2.format(numbers=numbers, stage=stage, last=last)


def by_hand(**changes: str) -> str:
    right = {
        "arrives": "x.requires_grad_()",
        "backward": "y.backward(grad)",
        "loss": "pl.token_losses(y, targets).mean()",
        "sends": "x.grad",
    }
    return BY_HAND.format(**(right | changes))


def best(formula: str) -> str:
    return f"def best_b(n, p, fixed, each): return {formula}"


WRONG_ANSWERS = [
    ("1", "more forwards alone", zb_h2("2 * (p - rank - 1), rank")),
    ("1", "more W's alone", zb_h2("p - rank - 1, 2 * rank")),
    ("1", "all forwards first", zb_h2("m, 2 * rank")),
    ("1", "W's are left out", zb_h2("2 * (p - rank - 1), 2 * rank", last="")),
    ("1", "all on the first stage", zb_h2("2 * (p - rank - 1), 2 * rank", stage="0")),
    ("2", "the sum of losses", by_hand(loss="pl.token_losses(y, targets).sum()")),
    ("2", "the gradient is not used", by_hand(backward="y.sum().backward()")),
    ("2", "zeros are sent back", by_hand(arrives="pass", sends="torch.zeros_like(x)")),
    ("2", "the gradient is passed on", by_hand(sends="grad if rank < 3 else x.grad")),
    ("3", "the root is left out", best("n * fixed / ((p - 1) * each)")),
    ("3", "p for p - 1", best("math.sqrt(n * fixed / (p * each))")),
    ("3", "upside down", best("math.sqrt((p - 1) * each / (n * fixed))")),
    ("3", "one micro-batch", best("n")),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(tmp_path):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = nbformat.read(notebooks.ROOT / "notebooks/03_pipeline.ipynb", as_version=4)
    notebooks.solve(notebook)
    cells = notebooks.needed(notebook)
    tasks = notebooks.exercises(notebook)
    place = {number: cells.index(task) for number, task in tasks.items()}
    check = {number: cells[place[number] + 1] for number in tasks}
    wrong = []
    for number, name, answer in WRONG_ANSWERS:
        magic = "%%px\n" if check[number].source.startswith("%%px") else ""
        wrong += [
            nbformat.v4.new_code_cell(f"print({name!r})"),
            nbformat.v4.new_code_cell(magic + answer),
            nbformat.v4.new_code_cell(check[number].source),
        ]
    notebook.cells = [*cells[:-1], *wrong, cells[-1]]  # the last cell stops the ranks
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    text = notebooks.printed(notebooks.execute(tmp_path / "wrong.ipynb"))
    solved, *answers = text.split(WRONG_ANSWERS[0][1] + "\n", 1)
    assert all(f"exercise {number}: ok" in solved for number in tasks)
    assert ": ok" not in answers[0], answers[0]
    assert answers[0].count("not solved yet") == len(WRONG_ANSWERS)
