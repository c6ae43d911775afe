# SPDX-License-Identifier: MIT-0
"""Chapter 5's notebook: the study's rotary attention, and wrong answers to the exercises."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
import torch
from proof import assert_equal
from test_05_mamba_hybrid import config, random

import notebooks

RESULTS = Path(__file__).resolve().parents[1] / "notebooks/results"


def measurement(name: str):
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ── The study's measurements ────────────────────────────────────────────────────────────────────


def test_rotation_depends_on_distance_alone():
    rotate = measurement("measure_05_recall").rotate
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=2)
    scores = [rotate(q, first + 3) @ rotate(k, first).mT for first in (0, 5, 1000)]
    assert_equal({"5": scores[1], "1000": scores[2]}, {"5": scores[0], "1000": scores[0]})
    assert (rotate(q, 3) - rotate(q, 4)).abs().max() > 1e-3


@pytest.mark.parametrize("groups", [1, 4])
def test_rotary_attention_written_out(groups):
    """Pairs (i, i + P/2), each by its own frequency, as complex numbers."""
    cfg, T = config(attention_groups=groups), 7
    layer, x = measurement("measure_05_recall").RotaryAttention(cfg).double(), random(2, T, 24)
    heads = [proj(x).view(2, T, -1, 4) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)]
    for i, t in enumerate(heads[:2]):
        angle = torch.arange(T)[:, None] * torch.tensor([1.0, 1e-2], dtype=torch.float64)
        turned = torch.complex(t[..., :2], t[..., 2:]) * torch.polar(angle * 0 + 1, angle)[:, None]
        heads[i] = torch.cat([turned.real, turned.imag], -1)
    q, k, v = (t.repeat_interleave(4 // t.shape[2], 2).transpose(1, 2) for t in heads)
    weights = (q @ k.mT / 2 + torch.full((T, T), -torch.inf).triu(1)).softmax(-1)
    expected = layer.o_proj((weights @ v).transpose(1, 2).reshape(2, T, -1))
    assert_equal({"y": layer(x)}, {"y": expected})


def test_decode_times_are_milliseconds_of_each_context():
    times = measurement("measure_05_decode").decode_times(config(), [4, 64], repeats=3)
    assert len(times) == 2 and all(0 < t < 1000 for t in times)


def test_a_run_of_the_study():
    """Two steps: what it keeps is what a cache would, and every accuracy is a fraction."""
    found = measurement("measure_05_recall").train("hybrid", 2, 0, "slow", 2)
    # A state of 2 · 64 · 2, the convolution's 4 inputs of 132 channels, keys and values of 64.
    assert found["kept_numbers"] == 2 * 64 * 2 + 4 * 132 + 2 * 64 * 64
    assert all(0 <= x <= 1 for x in found["accuracy"].values())
    assert abs(found["parameters"] - 120_000) < 200


# ── Exercises ───────────────────────────────────────────────────────────────────────────────────

MASKED = "future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)"
GATHER = """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range({ranks}):
        entering = {step}
    return entering
"""


def segsum(sums: str, result: str) -> str:
    lines = ["def my_segsum(a):", f"    sums = {sums}", f"    {MASKED}", f"    {result}"]
    return "\n".join(lines)


def entering(step: str, ranks: str = "rank") -> str:
    return GATHER.format(step=step, ranks=ranks)


def count(formula: str) -> str:
    lines = ["def break_even(config):", "    inner = config.mamba_heads * config.mamba_head_size"]
    lines += ["    channels = inner + 2 * config.mamba_groups * config.state_size"]
    lines += ["    key = config.attention_groups * config.attention_head_size"]
    lines += ["    ratio = config.pattern.count('M') / config.pattern.count('*')"]
    return "\n".join([*lines, f"    return ratio * {formula}"])


DIFFERENCE = "sums[..., :, None] - sums[..., None, :]"
WRONG_ANSWERS = [
    (
        "1",
        "sums in fp32",
        segsum("a.cumsum(-1)", f"return ({DIFFERENCE}).masked_fill(future, -torch.inf)"),
    ),
    (
        "1",
        "zeros above the diagonal",
        segsum("a.double().cumsum(-1)", f"return ({DIFFERENCE}).to(a.dtype).tril()"),
    ),
    ("1", "no mask", segsum("a.double().cumsum(-1)", f"return ({DIFFERENCE}).to(a.dtype)")),
    (
        "1",
        "the mask by multiplication",
        segsum("a.double().cumsum(-1)", f"return ({DIFFERENCE}).to(a.dtype) - torch.inf * future"),
    ),
    (
        "1",
        "token j counts as well",
        segsum(
            "a.double().cumsum(-1)",
            f"return ({DIFFERENCE} + a[..., None, :]).to(a.dtype).masked_fill(future, -torch.inf)",
        ),
    ),
    ("2", "no decay", entering("entering + states[earlier]")),
    ("2", "this rank's decay", entering("decay[:, None, None] * entering + states[earlier]")),
    (
        "2",
        "the older state does not fade",
        entering("entering + decays[earlier][:, None, None] * states[earlier]"),
    ),
    (
        "2",
        "this rank counts as well",
        entering("decays[earlier][:, None, None] * entering + states[earlier]", "rank + 1"),
    ),
    ("2", "the rank before alone", entering("states[earlier]")),
    ("3", "without the convolution", count("inner * config.state_size / (2 * key)")),
    (
        "3",
        "keys without values",
        count("(inner * config.state_size + config.conv_kernel * channels) / key"),
    ),
    (
        "3",
        "x alone is convolved",
        count("(inner * config.state_size + config.conv_kernel * inner) / (2 * key)"),
    ),
    (
        "3",
        "one input less",
        count("(inner * config.state_size + (config.conv_kernel - 1) * channels) / (2 * key)"),
    ),
]


@pytest.mark.slow
def test_wrong_answers_are_not_accepted(tmp_path):
    """Each in turn on one set of ranks: its check says so; the solutions, before, are ok."""
    notebook = nbformat.read(notebooks.ROOT / "notebooks/05_mamba_hybrid.ipynb", as_version=4)
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
