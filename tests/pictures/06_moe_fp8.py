# SPDX-License-Identifier: MIT-0
"""Draws 06_moe_fp8/load.png: each expert's load, step by step, and the rounding error of FP8.

`make pictures CHAPTER=06`, half a minute. Left and middle are two training runs of the default
model on one device. The right panel shows the error of `quantize_fp8` for values of each size.
"""

from pathlib import Path

import fp8
import moe_fp8 as moe
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80


def shares(gamma: float) -> torch.Tensor:
    """Each expert's rows over the mean, in the first MoE layer, (E, STEPS), from a bad start."""
    data = moe.TextData("", 64)
    batches = (data.batch(step, 16, 0) for step in range(STEPS))
    model = moe.overload(moe.MoELM(moe.MoEConfig(init_std=0.06)))
    steps = moe.train_alone(model, moe.make_optimizer(model, 3e-3), batches, gamma=gamma)
    counts_SE = torch.stack([step.counts_LE[0] for step in steps]).double()
    return (counts_SE / counts_SE.mean(1, keepdim=True)).T


def rounding_error(format: str, sizes: torch.Tensor) -> list[float]:
    """The mean relative error of values of each size, in a tensor whose largest value is 1."""
    found = []
    for size in sizes.tolist():
        x = torch.cat([torch.ones(1), size * torch.linspace(1, 2, 1001)[:-1]])
        back = fp8.dequantize_fp8(fp8.quantize_fp8(x, format))
        found.append(((back - x).abs() / x)[1:].mean().item())
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 1.15), layout="constrained"
    )
    for axis, gamma, title in (
        (axes[0], 0.0, "no balancing (γ = 0, α = 0.0001)"),
        (axes[1], 0.01, "with the bias, γ = 0.01"),
    ):
        image = axis.imshow(
            shares(gamma), aspect="auto", cmap="magma_r", vmin=0, vmax=4, interpolation="nearest"
        )
        axis.set(title=title, xlabel="step", ylabel="expert", yticks=range(8))
    bar = figure.colorbar(image, ax=axes[1])
    bar.set_label("rows, over the mean")
    sizes = 2.0 ** torch.arange(-34, -0.5)
    for format, color in (("e4m3", "#2b6cb0"), ("e5m2", "#c53030")):
        axes[2].plot(sizes, rounding_error(format, sizes), color=color, label=format.upper())
    axes[2].set(xscale="log", yscale="log", ylim=(5e-3, 2), title="rounding to FP8")
    axes[2].set(
        xlabel="size of a value, over the tensor's largest", ylabel="its mean relative error"
    )
    axes[2].axhline(1, color="0.5", linestyle=":", linewidth=1)
    axes[2].annotate(
        "lost: rounded to zero", (sizes[-1], 1), ha="right", va="bottom", fontsize=8, color="0.3"
    )
    axes[2].legend(frameon=False, loc="lower left")
    figure.savefig(ROOT / "06_moe_fp8" / "load.png", dpi=110)


if __name__ == "__main__":
    main()
