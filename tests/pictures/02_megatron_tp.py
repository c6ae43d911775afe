# SPDX-License-Identifier: MIT-0
"""Draws 02_megatron_tp/gradients.png: a bug, its loss curve and its gradients.

make pictures CHAPTER=02

PYTHONPATH=tests:02_megatron_tp python tests/pictures/02_megatron_tp.py --steps 5 --to x.png
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron_tp as tp
import ranks
import torch
import torch.distributed as dist
from proof import plant

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "02_megatron_tp" / "gradients.png"
PEAK, FLOOR = 3e-3, 1e-5  # of the learning rate


@contextlib.contextmanager
def without_the_backward_all_reduces() -> Iterator[None]:
    """Leaves out both all-reduces of the gradient of a region's input."""

    def column_backward(ctx, grad_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        grad = grad_BSf.flatten(0, -2)
        return grad_BSf @ weight_fH, grad.mT @ x_BSH.flatten(0, -2), grad.sum(0), None

    with plant(tp, "copy_to_tp", lambda x, group=None: x):
        with plant(tp._ColumnParallelLinear, "backward", staticmethod(column_backward)):
            yield


def rate(step: int, steps: int) -> float:
    """A linear rise to PEAK in a tenth of the steps, then half a cosine to FLOOR."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return PEAK * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def losses(trainer, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The caller sets the learning rate before each step."""
    found = []
    trainer = iter(trainer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss, _ = next(trainer)
        found.append(loss.item())
    return found


def gradient_errors(cfg: tp.GPTConfig, batch: tuple) -> dict[str, float]:
    """Of the first step in float64: the largest error of any rank, by parameter."""
    plain, parallel = tp.GPT(cfg).double(), tp.ParallelGPT(cfg).double()
    for model in (plain, parallel):
        model.loss(*batch).mean().backward()
    errors = {}
    for name, p in plain.named_parameters():
        shard = tp.shard_tensor(name, p.grad, cfg, dist.get_rank(), dist.get_world_size())
        gap = (parallel.get_parameter(name).grad - shard).abs().max()
        errors[name] = (gap / p.grad.abs().max()).item()
    return tp.over_all_ranks(errors)


@dataclass
class Measured:
    """What one run shows."""

    alone: list[float]  # losses of one device
    together: list[float]  # losses of two ranks
    errors: dict[str, float]  # of the first step's gradients, by parameter


def measure(broken: bool, steps: int) -> Measured:
    """On each of two ranks."""
    cfg = tp.GPTConfig(num_layers=2, hidden_size=64, seq_length=64)
    data = tp.TextData("", cfg.seq_length)
    batches = [data.batch(step, 16, seed=0) for step in range(steps)]
    alone = []
    if not broken:
        plain = tp.GPT(cfg)
        optimizer = tp.make_optimizer(plain, PEAK)
        alone = losses(tp.train_alone(plain, optimizer, batches), optimizer, steps)
    with without_the_backward_all_reduces() if broken else contextlib.nullcontext():
        mesh = tp.make_mesh(2, ranks.device)
        parallel = tp.ParallelGPT(cfg)
        optimizer = tp.make_optimizer(parallel, PEAK)
        together = losses(tp.train(parallel, optimizer, batches, mesh), optimizer, steps)
        return Measured(alone, together, gradient_errors(cfg, batches[0]))


RIGHT = {"color": "tab:blue", "label": "two ranks"}
WRONG = {"color": "tab:red", "label": "two ranks, no all-reduce in backward"}


def draw_losses(axes, right: Measured, wrong: Measured) -> None:
    axes.plot(right.alone, color="0.75", linewidth=6, label="one device")
    axes.plot(right.together, linewidth=1.5, **RIGHT)
    axes.plot(wrong.together, linewidth=1.5, linestyle="--", **WRONG)
    axes.set(title="The loss falls, also with the bug", xlabel="step", ylabel="nats per byte")
    axes.legend(frameon=False)


def draw_errors(axes, right: Measured, wrong: Measured) -> None:
    names = list(right.errors)
    for measured, style in ((right, RIGHT), (wrong, WRONG)):
        values = [max(measured.errors[name], 1e-17) for name in names]
        axes.plot(values, "o", markersize=5, **style)
    axes.axhline(1e-10, color="0.6", linewidth=1, linestyle=":")
    place = len(names) - 1, 1e-10
    axes.annotate("the tests' bound", place, ha="right", va="bottom", color="0.4")
    marks = {"embeddings": [0, 1], "final norm": [len(names) - 2, len(names) - 1]}
    for index, name in enumerate(names):
        if name.startswith("layers"):
            marks.setdefault("layer " + name.split(".")[1], []).append(index)
    axes.set_xticks([sum(places) / len(places) for places in marks.values()], marks.keys())
    for places in marks.values():
        axes.axvspan(places[0] - 0.4, places[-1] + 0.4, color="0.95", zorder=0)
    title = "The gradient of every parameter shows it, float64"
    axes.set(yscale="log", ylim=(1e-18, 1e2), title=title, ylabel="max|Δ| / max|reference|")
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.62))


def draw(right: Measured, wrong: Measured, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = {"figsize": (10.5, 3.8), "width_ratios": (1, 1.25), "layout": "constrained"}
    figure, (first, second) = plt.subplots(1, 2, **shape)
    draw_losses(first, right, wrong)
    draw_errors(second, right, wrong)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--to", type=Path, default=PICTURE)
    args = parser.parse_args()
    folders = ("tests", "tests/pictures", "02_megatron_tp")
    ranks.PATHS[:] = [str(ROOT / folder) for folder in folders]
    pool = ranks.Pool(2)
    found = []
    for broken in (False, True):
        options = {"broken": broken, "steps": args.steps}
        first, _ = pool.run(Path(__file__).stem, "measure", options, timeout=300)
        found.append(first)
    draw(*found, args.to)
    pool.close()
    last = slice(args.steps // 2, None)
    costs = [b - a for a, b in zip(found[0].together[last], found[1].together[last])]
    print(f"the bug costs {sum(costs) / len(costs):.2f} nats in the second half")


if __name__ == "__main__":
    main()
