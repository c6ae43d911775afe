# SPDX-License-Identifier: MIT-0
"""Draws 13_nemotron3/mesh.png: eight ranks and their groups, and the bytes that a layer sends.

`make pictures CHAPTER=13`, some seconds on one core.
"""

from pathlib import Path

import nemotron3_tables as tables

ROOT = Path(__file__).resolve().parents[2]
BLUE, ORANGE = "#2b6cb0", "#dd6b20"


def groups(tp: int, ep: int, world: int) -> dict[str, list[list[int]]]:
    """Each kind of group, as lists of ranks."""
    ranks = list(range(world))
    return {
        "tp: heads, vocabulary, tokens": [ranks[i : i + tp] for i in range(0, world, tp)],
        "ep: one set of experts": [ranks[i : i + ep] for i in range(0, world, ep)],
        "dp: sums of heads": [ranks[i::tp] for i in range(tp)],
        "edp: sums of experts": [ranks[i::ep] for i in range(ep)],
    }


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(13, 3.3), width_ratios=(1.4, 1), layout="constrained"
    )
    for y, (name, lists) in enumerate(groups(2, 4, 8).items()):
        axes[0].text(-0.7, -y, name, ha="right", va="center")
        for index, ranks in enumerate(lists):
            height = -y + 0.12 * (index - (len(lists) - 1) / 2) * (y > 1)
            color = (BLUE, ORANGE)[index % 2]
            axes[0].plot(ranks, [height] * len(ranks), "o-", color=color, lw=2, ms=6)
    for rank in range(8):
        axes[0].text(rank, 0.6, f"rank {rank}", ha="center")
    axes[0].set(xlim=(-4.6, 7.6), ylim=(-3.5, 0.9), title="8 ranks, tp 2, ep 4")
    axes[0].axis("off")
    names = []
    for model, tp, ep in (("Nano", 1, 8), ("Nano", 2, 8), ("Super", 1, 64), ("Super", 2, 64)):
        config = tables.MODELS[model]
        y = -len(names)
        left = 0.0
        for letter, color in (("M", BLUE), ("E", ORANGE)):
            size = tables.layer_bytes(config, letter, 8192, tp, ep, 2) / 1e6
            axes[1].barh(y, size, left=left, color=color, label=letter if not names else None)
            left += size
        names.append(f"{model}, tp {tp}, ep {ep}")
    axes[1].set(yticks=[0, -1, -2, -3], yticklabels=names, xlabel="MB of a rank in forward, bf16")
    axes[1].set_title("a Mamba layer and one of experts, 8,192 tokens of a replica", fontsize=10)
    axes[1].legend(frameon=False)
    figure.savefig(ROOT / "13_nemotron3" / "mesh.png", dpi=110)


if __name__ == "__main__":
    main()
