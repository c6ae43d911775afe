# SPDX-License-Identifier: MIT-0
"""Draws 10_compress/units.png: scores of heads, errors without a layer, losses of students.

`make pictures CHAPTER=10`, about a minute on one core.
"""

from dataclasses import replace
from pathlib import Path

import compress as c
import distill as d
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, STUDENT_STEPS = 300, 75


def batches(data: c.TextData, first: int, count: int) -> list:
    return [data.batch(step, 8, 0) for step in range(first, first + count)]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    data = c.TextData("", 64)
    teacher = c.HybridLM(c.HybridConfig())
    for _ in c.train(teacher, c.make_optimizer(teacher, 3e-3), batches(data, 0, STEPS)):
        pass
    calibration = batches(data, 0, 4)
    scores = c.importance(teacher, calibration)
    sizes = c.smaller_sizes(teacher.config)
    _, kept = c.choose(scores, teacher.config, sizes)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    name = "layers.2.mamba_num_heads"
    score_H = scores[name].norm(dim=1)
    colors = ["#2b6cb0" if i in kept[name].tolist() else "0.8" for i in range(8)]
    axes[0].bar(range(8), score_H, color=colors)
    axes[0].axvline(3.5, color="black", linewidth=1)
    axes[0].set(title="a Mamba layer: 3 of 4 heads stay in each group", xlabel="head")
    axes[0].set(ylabel="score", xticks=range(8))
    errors = {by: d.removal_errors(teacher, calibration, by=by) for by in ("logits", "hidden")}
    for shift, (by, error_L) in zip((-0.2, 0.2), errors.items()):
        x = [i + shift for i in range(len(error_L))]
        axes[1].bar(x, error_L, width=0.4, label=by)
    axes[1].set(title="without a layer", ylabel="mean squared error", yscale="log")
    axes[1].set_xticks(range(7), list(teacher.config.pattern))
    axes[1].legend(frameon=False)
    rng = torch.Generator().manual_seed(0)
    chance = {k: torch.rand(x.shape, generator=rng) for k, x in scores.items()}
    pruned = c.prune(teacher, sizes, scores)
    kl = d.divergence_from(teacher)
    new = c.HybridLM(replace(pruned.config, seed=1))
    students = {
        "scores, KL": (pruned, kl, "#2b6cb0", "-"),
        "random units, KL": (c.prune(teacher, sizes, chance), kl, "#c53030", "--"),
        "new weights, cross entropy": (new, c.cross_entropy, "0.4", ":"),
    }
    held_out = [data.batch(step, 8, 0, True) for step in range(4)]
    for label, (student, loss, color, style) in students.items():
        losses = [c.evaluate(student, held_out)]
        optimizer = c.make_optimizer(student, 3e-3)
        text = batches(data, STEPS, STUDENT_STEPS)
        for step, _ in enumerate(c.train(student, optimizer, text, loss), 1):
            if step % 5 == 0:
                losses.append(c.evaluate(student, held_out))
        x = range(0, STUDENT_STEPS + 1, 5)
        axes[2].plot(x, losses, color=color, linestyle=style, label=label)
    axes[2].axhline(c.evaluate(teacher, held_out), color="black", linewidth=1, label="teacher")
    axes[2].set(title="students on the same tokens", xlabel="step", ylabel="loss, eval split")
    axes[2].set(ylim=(1.6, 3.5))
    axes[2].legend(frameon=False)
    figure.savefig(ROOT / "10_compress" / "units.png", dpi=110)


if __name__ == "__main__":
    main()
