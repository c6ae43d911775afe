# SPDX-License-Identifier: MIT-0
"""Chapter 5's notebook: the study's rotary attention and its measurements."""

import importlib.util
from pathlib import Path

import pytest
import torch
from proof import assert_equal
from test_05_mamba_hybrid import config, random

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
