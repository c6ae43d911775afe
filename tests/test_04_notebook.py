# SPDX-License-Identifier: MIT-0
"""Chapter 4's notebook: wrong answers to its exercises are not accepted."""

import nbformat
import pytest

import notebooks

REDUCE_SCATTER = """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        {forward}

    @staticmethod
    def backward(ctx, grad):
        {backward}
"""
SUM = "total = partial_x.clone(); dist.all_reduce(total); "
GATHER = "pieces = [torch.empty_like(grad) for _ in range(4)]; dist.all_gather(pieces, grad); "
SHARD = "return total.chunk(4)[rank].clone()"


def reduce_scatter(forward: str, backward: str) -> str:
    return REDUCE_SCATTER.format(forward=forward, backward=backward)


def sum_gradients(line: str) -> str:
    lines = ["def sum_partial_gradients(model):", "    for name, p in model.named_parameters():"]
    return "\n".join([*lines, f"        {line}"])


def count(formula: str) -> str:
    return f"def bytes_without_dropout(s, b, h, a, t): return {formula}"


WRONG_ANSWERS = [
    (
        "1",
        "no sum",
        reduce_scatter(
            "return partial_x.chunk(4)[rank].clone()", GATHER + "return torch.cat(pieces)"
        ),
    ),
    ("1", "no gather", reduce_scatter(SUM + SHARD, "return grad.repeat(4)")),
    (
        "1",
        "the input is modified",
        reduce_scatter(
            "total = partial_x; dist.all_reduce(total); " + SHARD,
            GATHER + "return torch.cat(pieces)",
        ),
    ),
    (
        "1",
        "the first rank's tokens",
        reduce_scatter(
            SUM + "return total.chunk(4)[0].clone()", GATHER + "return torch.cat(pieces)"
        ),
    ),
    (
        "1",
        "the mean in backward",
        reduce_scatter(SUM + SHARD, GATHER + "return torch.cat(pieces) / 4"),
    ),
    ("2", "all gradients", sum_gradients("dist.all_reduce(p.grad)")),
    ("2", "none", sum_gradients("pass")),
    ("2", "the others", sum_gradients("if not p.sequence_parallel: dist.all_reduce(p.grad)")),
    ("2", "a mean", sum_gradients("if p.sequence_parallel: dist.all_reduce(p.grad); p.grad /= 4")),
    ("2", "biases alone", sum_gradients("if name.endswith('bias'): dist.all_reduce(p.grad)")),
    ("3", "with dropout", count("s * b * h * (34 + 5 * a * s / h) / t")),
    ("3", "two masks less", count("s * b * h * (32 + 5 * a * s / h) / t")),
    ("3", "softmax twice", count("s * b * h * (32 + 4 * a * s / h) / t")),
    ("3", "on one rank", count("s * b * h * (32 + 2 * a * s / h)")),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(notebook_session):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = notebooks.solved(notebooks.ROOT / "notebooks/04_seq_parallel.ipynb")
    cells = notebook.cells
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
    text = notebook_session.run([*cells[:-1], *wrong, cells[-1]])  # the last cell stops the ranks
    solved, *answers = text.split(WRONG_ANSWERS[0][1] + "\n", 1)
    assert all(f"exercise {number}: ok" in solved for number in tasks)
    assert ": ok" not in answers[0], answers[0]
    assert answers[0].count("not solved yet") == len(WRONG_ANSWERS)
