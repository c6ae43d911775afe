# SPDX-License-Identifier: MIT-0
"""Chapter 8's notebook: wrong answers to its exercises are not accepted, and its table is kept."""

import json

import nbformat
import pytest

import notebooks

ROOT = notebooks.ROOT


def rounding(body: str) -> str:
    return f"def to_e2m1(x):\n    m = x.abs()\n    {body}"


STEP = "step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0)); "


def scales(amax: str = "x.abs().max()", block: str = "abs().amax(-1)", last: str = "") -> str:
    last = last or "(b * (s * (1 / 6))).clamp(max=448)"
    return (
        f"def block_scales(x):\n    amax = {amax}\n"
        "    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)\n"
        f"    b = x.view(len(x), -1, 16).{block}\n    return {last}.to(torch.float8_e4m3fn)"
    )


def shard(draw: str, group: str = "dist.group.WORLD") -> str:
    return (
        "def round_shard(x, seed):\n    n = len(x)\n    g = torch.Generator().manual_seed(seed)\n"
        f"    u = {draw}\n    return nf.nvfp4_quantize(x, uniforms=u, amax_group={group})"
    )


FULL = "torch.rand(4 * n, 32, generator=g)"
WRONG_ANSWERS = [
    ("1", "half steps everywhere", rounding("return (2 * m).round() / 2 * x.sign()")),
    ("1", "no sign", rounding(STEP + "return (m / step).round() * step")),
    ("1", "down", rounding(STEP + "return (m / step).floor() * step * x.sign()")),
    ("1", "ties away", rounding(STEP + "return (m / step + 0.5).floor() * step * x.sign()")),
    ("2", "amax without abs", scales(amax="x.max()")),
    ("2", "block without abs", scales(block="amax(-1)")),
    ("2", "a mean", scales(block="abs().mean(-1)")),
    ("2", "not folded by 6", scales(last="(b * s).clamp(max=448)")),
    ("2", "all blocks alike", scales(block="abs().amax(-1) * 0 + amax")),
    ("3", "its own amax", shard(f"{FULL}[rank * n : rank * n + n]", "None")),
    ("3", "the same draw on each rank", shard("torch.rand(n, 32, generator=g)")),
    ("3", "the first rank's rows", shard(f"{FULL}[:n]")),
    ("3", "nearest", shard("None")),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(tmp_path):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = nbformat.read(ROOT / "notebooks/08_nvfp4.ipynb", as_version=4)
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


def test_the_kept_table():
    """It names its command, and its losses are those of a run that learned."""
    kept = json.loads((ROOT / "notebooks/results/08_ingredients.json").read_text("utf-8"))
    script = ROOT / kept["command"].split()[-1]
    assert script.exists() and kept["steps"] == 100
    losses = kept["losses"]
    for name in losses:
        assert f'"{name}"' in script.read_text("utf-8")
        assert len(losses[name]) == 2 and all(1.5 < loss < 4 for loss in losses[name])
    gaps = [a / b - 1 for a, b in zip(losses["full recipe"], losses["fp32"])]
    noise = [abs(a / b - 1) for a, b in zip(losses["fp32, weights moved by 1e-6"], losses["fp32"])]
    assert all(abs(gap) < 0.03 for gap in gaps) and max(noise) < 0.02
