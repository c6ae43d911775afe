# SPDX-License-Identifier: MIT-0
"""Draws 08_nvfp4/four_bits.png: the codes, two copies of a weight, a regression with a loud token.

`make pictures CHAPTER=08`, some ten seconds on one core.
"""

from dataclasses import replace
from pathlib import Path

import nvfp4 as nf
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = (10, 20, 40, 70, 100, 140, 200, 250, 300)


def rounded(x: torch.Tensor, two_d: bool = False) -> torch.Tensor:
    return nf.nvfp4_dequantize(nf.nvfp4_quantize(x, two_d))


def staircase() -> tuple[torch.Tensor, torch.Tensor]:
    """Values from 0 to 6 in a tensor whose scales are 1, and what they become."""
    x = torch.linspace(0, 6, 1500).view(100, 15)
    blocks = torch.cat([torch.full((100, 1), 6.0), x], dim=1)
    blocks = torch.cat([blocks, torch.full((1, 16), 2688.0)])
    return x.flatten(), rounded(blocks)[:-1, 1:].flatten()


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.4), width_ratios=(1.1, 0.9, 0.9, 1.2), layout="constrained"
    )
    x, y = staircase()
    axes[0].plot(x, x, color="0.8", linewidth=1)
    axes[0].plot(x, y, color="#2b6cb0")
    codes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    axes[0].set(title="E2M1", xlabel="x", ylabel="rounded to nearest", xticks=codes, yticks=codes)
    axes[0].set_xticklabels([f"{code:g}" for code in codes], size=7)
    axes[0].set_yticklabels([f"{code:g}" for code in codes], size=7)
    axes[0].grid(color="0.9")
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for axis, two_d, title in ((axes[1], False, "1 × 16"), (axes[2], True, "16 × 16")):
        gap = rounded(w, two_d) - rounded(w.mT, two_d).mT
        image = axis.imshow(gap, cmap="RdBu", vmin=-0.6, vmax=0.6, interpolation="nearest")
        axis.set(title=f"Q(w) − Q(wᵀ)ᵀ, {title}", xlabel="input", ylabel="output")
        axis.set(xticks=range(0, 65, 16), yticks=range(0, 65, 16))
    figure.colorbar(image, ax=axes[2])
    neither = replace(nf.NEAREST, hadamard=False)
    lines = {
        "exact wgrad": (None, "0.2", "-"),
        "nearest": (neither, "#c53030", "-"),
        "Hadamard": (nf.NEAREST, "#2b6cb0", "--"),
        "stochastic": (replace(neither, stochastic=True), "#2f855a", ":"),
    }
    for name, (recipe, color, style) in lines.items():
        errors = [nf.regression(recipe, steps=steps) for steps in STEPS]
        axes[3].plot(STEPS, errors, color=color, linestyle=style, label=name)
    axes[3].set(title="one loud token in 16", xlabel="step", ylabel="error of w, over w")
    axes[3].legend(frameon=False)
    figure.savefig(ROOT / "08_nvfp4" / "four_bits.png", dpi=110)


if __name__ == "__main__":
    main()
