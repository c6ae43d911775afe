# SPDX-License-Identifier: MIT-0
"""Chapter 8's notebook: the table that it shows is kept with its command."""

import json

import notebooks

ROOT = notebooks.ROOT


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
