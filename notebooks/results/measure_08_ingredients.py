# SPDX-License-Identifier: MIT-0
"""What each ingredient of the NVFP4 recipe costs in loss. Four minutes on one core:

    python notebooks/results/measure_08_ingredients.py

Writes 08_ingredients.json next to this file: the loss on the eval split after 100 steps of a small
GPT, all layers but the last in NVFP4, for two seeds. Runs of one seed have the same weights and
batches. A control, fp32 from weights that differ by a millionth, says what a difference means.
"""

import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "08_nvfp4"))
import nvfp4 as nf

FULL = nf.NVFP4Recipe()
RECIPES = {
    "fp32": None,
    "fp32, weights moved by 1e-6": None,
    "FP8": None,
    "full recipe": FULL,
    "without stochastic rounding": replace(FULL, stochastic=False),
    "without Hadamard": replace(FULL, hadamard=False),
    "1 × 16 weights": replace(FULL, two_d_weights=False),
    "none of the three": nf.NVFP4Recipe(False, False, False),
    "all layers": replace(FULL, last=0),
    "stochastic in forward, too": FULL,
    "forward alone": FULL,
    "backward alone": FULL,
}
SEEDS = (0, 1)
STEPS = 100
SEQUENCES = 16
CONFIG = dict(num_layers=3, hidden_size=64, num_heads=4, ffn_hidden_size=256, seq_length=64)


RIGHT = nf._NVFP4Linear


class ForwardAlone(torch.autograd.Function):
    """fprop in NVFP4; dgrad and wgrad in fp32, with the weight and input of high precision."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x, weight)
        x = nf.nvfp4_quantize(x)
        return nf.nvfp4_gemm(x, nf.nvfp4_quantize(weight, layer.recipe.two_d_weights), weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.mT @ x, None


class BackwardAlone(torch.autograd.Function):
    """fprop in fp32; dgrad and wgrad as in the chapter."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        RIGHT.forward(ctx, x, weight, layer)  # keeps what backward reads
        return F.linear(x, weight)

    backward = RIGHT.backward


def noisy(x, two_d=False, uniforms=None, amax_group=None, right=nf.nvfp4_quantize):
    """`nvfp4_quantize` that rounds everything stochastically."""
    return right(x, two_d, torch.rand(x.shape), amax_group)


PLANTED = {  # in the place of what, in the chapter
    "stochastic in forward, too": ("nvfp4_quantize", noisy),
    "forward alone": ("_NVFP4Linear", ForwardAlone),
    "backward alone": ("_NVFP4Linear", BackwardAlone),
}


def run(name: str, recipe: nf.NVFP4Recipe | None, seed: int) -> float:
    """The loss on the eval split."""
    torch.manual_seed(seed)
    model = nf.GPT(nf.GPTConfig(seed=seed, **CONFIG))
    if "moved" in name:
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-6 * torch.randn_like(p)
    if recipe is not None:
        nf.to_nvfp4(model, recipe)
    if name == "FP8":
        nf.to_fp8(model)
    data = nf.TextData("", CONFIG["seq_length"])
    optimizer = nf.make_optimizer(model, 0.0)

    def batches():
        for step in range(STEPS):
            for group in optimizer.param_groups:  # warm-up, then down to a tenth
                group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / STEPS)
            yield data.batch(step, SEQUENCES, seed)

    target = PLANTED.get(name)
    with mock.patch.object(nf, *target) if target else contextlib.nullcontext():
        for _ in nf.train_alone(model, optimizer, nf.seeded(model, batches(), seed)):
            pass
        with torch.no_grad():
            found = [model.loss(*data.batch(i, 32, 0, evaluation=True)).mean() for i in range(8)]
    return torch.stack(found).mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin = time.process_time()
    losses = {name: [] for name in RECIPES}
    for seed in SEEDS:
        for name, recipe in RECIPES.items():
            losses[name].append(round(run(name, recipe, seed), 4))
            gap = losses[name][-1] / losses["fp32"][-1] - 1
            print(f"seed {seed}  {name:30} {losses[name][-1]:.4f}  {gap:+.2%}", flush=True)
    result = dict(command="python notebooks/results/measure_08_ingredients.py")
    result |= dict(torch=torch.__version__, steps=STEPS, losses=losses)
    lines = [f'"{key}": {json.dumps(x, ensure_ascii=False)}' for key, x in result.items()]
    (HERE / "08_ingredients.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"{time.process_time() - begin:.0f} CPU seconds")
