# SPDX-License-Identifier: MIT-0
"""Draws 05_mamba_hybrid/mask.png: the masked matrix of a head, how it is computed, and what a cache
holds.

`make pictures CHAPTER=05`, a few seconds. The mask is the chapter's, of decays drawn at random:
mostly near 1, now and then far from it. The bytes are the chapter's formula.
"""

import dataclasses
from pathlib import Path

import mamba_hybrid as mh
import mamba_hybrid_tables as tables
import torch

ROOT = Path(__file__).resolve().parents[2]
TOKENS, CHUNK = 48, 12


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    torch.manual_seed(3)
    a_S = -0.5 * torch.rand(TOKENS) ** 4  # a head that keeps most, and now and then forgets
    L_SS = mh.segsum(a_S).exp()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.1), layout="constrained")
    image = left.imshow(L_SS, cmap="Blues", vmin=0, vmax=1)
    left.set(title="The mask L of one head", xlabel="written at token j", ylabel="read at token i")
    figure.colorbar(image, ax=left, shrink=0.75, label="what is left of j at i")

    middle.imshow(torch.zeros(TOKENS, TOKENS), cmap="Greys", vmin=0, vmax=1)
    count = TOKENS // CHUNK
    for row in range(count):
        for column in range(row + 1):
            inside = row == column
            color = "#2b6cb0" if inside else "#f0b429"
            corner = (column * CHUNK - 0.5, row * CHUNK - 0.5)
            middle.add_patch(
                Rectangle(corner, CHUNK, CHUNK, facecolor=color, edgecolor="white", alpha=0.85)
            )
            text = "masked\nmatrix" if inside else "through\nthe state"
            center = (column + 0.5) * CHUNK - 0.5, (row + 0.5) * CHUNK - 0.5
            middle.text(
                *center,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if inside else "black",
            )
    half = TOKENS / 2 - 0.5
    middle.axhline(half, color="#c53030", linewidth=2)
    middle.text(
        TOKENS - 1.5,
        half - 1,
        "tokens of rank 0",
        ha="right",
        va="bottom",
        color="#c53030",
        fontsize=8,
    )
    middle.set(title="How it is computed: 4 chunks, 2 ranks", xlabel="written at token j")
    middle.text(TOKENS - 1.5, half + 1, "rank 1", ha="right", va="top", color="#c53030", fontsize=8)

    tokens = [2**k for k in range(10, 21)]
    hybrid = tables.PUBLISHED["Nemotron-H-8B"]
    curves = {
        "32 layers of attention": (dataclasses.replace(hybrid, pattern=32 * "*-"), "#c53030"),
        "Nemotron-H-8B: 4 of attention, 24 Mamba-2": (hybrid, "#2b6cb0"),
        "its Mamba-2 layers alone": (dataclasses.replace(hybrid, pattern=24 * "M-"), "#f0b429"),
    }
    for label, (config, color) in curves.items():
        bytes_ = [tables.decode_memory(config, n).total for n in tokens]
        right.loglog(tokens, [b / 2**30 for b in bytes_], color=color, label=label, linewidth=2)
    right.set(title="A sequence's cache", xlabel="tokens", ylabel="GiB, 16 bits")
    right.set_xticks([2**10, 2**13, 2**16, 2**20], ["1K", "8K", "64K", "1M"])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8)
    right.grid(alpha=0.25)
    figure.savefig(ROOT / "05_mamba_hybrid" / "mask.png", dpi=110)


if __name__ == "__main__":
    main()
