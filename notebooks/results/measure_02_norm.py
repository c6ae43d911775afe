# SPDX-License-Identifier: MIT-0
"""Where LayerNorm stands: a deep narrow stack in both orders. `python notebooks/results/measure_02_norm.py`, 3 minutes.

Writes 02_norm.json beside this file: the held-out loss of each order, at a setting in which only one of them trains,
and, as a control, at one in which both do.
"""

import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "02_megatron_tp"))
import megatron_tp as tp  # noqa: E402

SETTINGS = {"lr 3e-3, std 1/√64": (3e-3, 64**-0.5), "control: lr 1e-3, std 0.07": (1e-3, 0.07)}
STEPS, EVERY = 200, 20


def run(norm: str, lr: float, std: float, seed: int) -> list[float]:
    """Held-out loss after 0, EVERY, ... steps of a 12-layer model, without warm-up."""
    config = tp.GPTConfig(
        num_layers=12, hidden_size=64, seq_length=64, norm=norm, init_std=std, seed=seed
    )
    data, model = tp.TextData("", "bytes", 64), tp.GPT(config)
    held_out = data.batch(0, 32, seed=0, held_out=True)
    losses, steps = (
        [],
        tp.train_alone(
            model, (data.batch(step, 8, seed) for step in range(STEPS)), lambda step: lr
        ),
    )
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(round(model.loss(*held_out).mean().item(), 4))
        next(steps, None)
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin, curves = time.time(), {}
    for name, (lr, std) in SETTINGS.items():
        for norm in ("pre", "post"):
            curves[f"{norm}-norm, {name}"] = [run(norm, lr, std, seed) for seed in (0, 1)]
            print(name, norm, [curve[-1] for curve in curves[f"{norm}-norm, {name}"]], flush=True)
    result = dict(
        command="python notebooks/results/measure_02_norm.py",
        torch=torch.__version__,
        every=EVERY,
        curves=curves,
    )
    (HERE / "02_norm.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    print(f"{time.time() - begin:.0f} s")
