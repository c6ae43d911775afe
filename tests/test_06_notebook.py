# SPDX-License-Identifier: MIT-0
"""Chapter 6's notebook: wrong answers to its exercises are not accepted."""

import nbformat
import pytest

import notebooks

MOVE_BIAS = """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    {lines}
"""
ALL_TO_ALL = """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
        grad_RH = grad_rH.new_empty(sum(ctx.send), grad_rH.shape[1])
        {lines}
        return grad_RH, None, None
"""
SCALING = """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        {before}
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = {codes}
        {after}
        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
"""
CLIPPED = "(x * scale).clamp(-self.most, self.most)"
KEEP = "self.history = [*self.history, new][-self.length :]"
KEEP_FINITE = "if new < float('inf'): " + KEEP


def move_bias(*lines: str) -> str:
    return MOVE_BIAS.format(lines="\n    ".join(lines))


def backward(*lines: str) -> str:
    return ALL_TO_ALL.format(lines="\n        ".join(lines))


def scaling(before: str = "", codes: str = CLIPPED, after: str = KEEP_FINITE) -> str:
    return SCALING.format(before=before or "pass", codes=codes, after=after)


SUM = "dist.all_reduce(counts_E)"
GAP = "(counts_E * len(counts_E) - counts_E.sum())"
WRONG_ANSWERS = [
    ("1", "local counts", move_bias(f"return bias_E - gamma * {GAP}.sign()")),
    ("1", "the wrong direction", move_bias(SUM, f"return bias_E + gamma * {GAP}.sign()")),
    ("1", "no sign", move_bias(SUM, f"return bias_E - gamma * {GAP}")),
    (
        "1",
        "the mean of the ranks' steps",
        move_bias(f"step_E = {GAP}.sign().double()", "dist.all_reduce(step_E)")
        + "    return bias_E - gamma * step_E / 4",
    ),
    (
        "1",
        "the mean counts as overloaded",
        move_bias(SUM, f"return bias_E - gamma * (2 * ({GAP} >= 0) - 1)"),
    ),
    ("2", "gradients stay", backward("grad_RH.zero_()")),
    (
        "2",
        "splits not exchanged",
        backward("dist.all_to_all_single(grad_RH, grad_rH.contiguous(), ctx.receive, ctx.send)"),
    ),
    ("2", "equal pieces", backward("dist.all_to_all_single(grad_RH, grad_rH.contiguous())")),
    (
        "2",
        "the mean over the ranks",
        backward(
            "dist.all_to_all_single(grad_RH, grad_rH.contiguous(), ctx.send, ctx.receive)"
        ).replace("return grad_RH,", "return grad_RH / 4,"),
    ),
    ("3", "current scaling", scaling(before=KEEP_FINITE, after="")),
    ("3", "the scale and its inverse exchanged", scaling(codes=CLIPPED.replace("*", "/", 1))),
    ("3", "infinity enters the history", scaling(after=KEEP)),
    ("3", "the history never ends", scaling(after="if new < float('inf'): self.history += [new]")),
    ("3", "the last amax alone", scaling(after="if new < float('inf'): self.history = [new]")),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(tmp_path):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = nbformat.read(notebooks.ROOT / "notebooks/06_moe_fp8.ipynb", as_version=4)
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
