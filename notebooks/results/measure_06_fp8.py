# SPDX-License-Identifier: MIT-0
"""Training in FP8, right and wrong. `python notebooks/results/measure_06_fp8.py`, five minutes.

Writes 06_fp8.json next to this file: the loss at each step in fp32, with the chapter's two recipes,
and with two in which one thing is broken. GEMMs are emulated: operands are rounded to FP8, and
multiplied in fp32. A change in the last digits sends a token to another expert, and the curve goes
another way. So there is a control: fp32 from initial weights that differ by a millionth.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "06_moe_fp8"))
import fp8
import moe_fp8 as mf

UNSCALED = fp8.Operand("e4m3, unscaled")  # a format that `Broken` knows and the chapter does not
STALE = fp8.Operand("e4m3, stale")
STALE_GRADIENT = fp8.Operand("e5m2, stale")
RECIPES = {
    "fp32": None,
    "fp32, weights moved by 1e-6": None,
    "one scale a tensor": fp8.HYBRID,
    "blockwise": fp8.BLOCKWISE,
    "broken: gradients in E4M3, not scaled": fp8.FP8Recipe(
        dgrad=(UNSCALED, fp8.E4M3), wgrad=(UNSCALED, fp8.E4M3)
    ),
    "broken: the first step's scales for ever": fp8.FP8Recipe(
        (STALE, STALE), (STALE_GRADIENT, STALE), (STALE_GRADIENT, STALE)
    ),
}
SEEDS, STEPS, SEQUENCES, LENGTH = (0, 1, 2), 200, 16, 64


def rate(step: int) -> float:
    return 3e-3 * min(1, (step + 1) / 10)


def train(model: mf.MoELM, batches, **options):
    """`train_alone` with a warm-up: the rate is set when a batch is drawn."""
    optimizer = mf.make_optimizer(model, 0.0)

    def scheduled():
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            yield batch

    return mf.train_alone(model, optimizer, scheduled(), **options)


class Broken:
    """In place of `quantize_fp8`: "…, unscaled" has a scale of 1, "…, stale" that of step 0."""

    def __init__(self):
        self.scales, self.call, self.right = {}, 0, fp8.quantize_fp8

    def __call__(self, x, format="e4m3", *args, **options):
        format, _, broken = format.partition(", ")
        if not broken:
            return self.right(x, format, *args, **options)
        self.call += 1  # every step makes the same calls in the same order
        if broken == "stale" and self.call not in self.scales:
            found = self.right(x, format)
            self.scales[self.call] = 1 / found.inverse_scale
            return found
        dtype = fp8.FP8_FORMATS[format]
        most, scale = torch.finfo(dtype).max, self.scales.get(self.call, torch.ones(()))
        return fp8.Quantized((x * scale).clamp(-most, most).to(dtype), 1 / scale, None)


@contextlib.contextmanager
def breakable():
    fp8.quantize_fp8 = broken = Broken()
    try:
        yield broken
    finally:
        fp8.quantize_fp8 = broken.right


def run(recipe: fp8.FP8Recipe | None, seed: int, nudge: float = 0.0) -> list[float]:
    config = mf.MoEConfig(
        pattern="*E*E*E", num_experts=4, seed=seed
    )  # the recipes leave first and last layer in fp32
    data, model, losses = mf.TextData("", LENGTH), mf.MoELM(config), []
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + nudge * torch.randn_like(p)
    if recipe is not None:
        fp8.to_fp8(model, recipe)
    batches = (data.batch(step, SEQUENCES, seed) for step in range(STEPS))
    with breakable() as broken:
        for step in train(model, batches, gamma=0.01):
            losses.append(round(step.loss.item(), 4))
            broken.call = 0
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin, curves = time.time(), {name: [] for name in RECIPES}
    for seed in SEEDS:
        for name, recipe in RECIPES.items():
            torch.manual_seed(seed)
            curves[name].append(run(recipe, seed, nudge=1e-6 if "moved" in name else 0.0))
            ours, wide = (sum(curves[which][-1][-40:]) for which in (name, "fp32"))
            print(
                f"seed {seed}  {name:42} the last 40 steps' loss {ours / wide - 1:+.2%}", flush=True
            )
    result = dict(
        command="python notebooks/results/measure_06_fp8.py", torch=torch.__version__, curves=curves
    )
    lines = ",\n".join(
        f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in result.items()
    )
    (HERE / "06_fp8.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")
    print(f"{time.time() - begin:.0f} s")
