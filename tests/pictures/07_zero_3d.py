# SPDX-License-Identifier: MIT-0
"""Draws 07_zero_3d/placement.png: BLOOM's ranks on its servers, and the bytes of a rank.

`make pictures CHAPTER=07`, ten seconds. Left: the first two stages of 12, on 8 servers. Ranks of
one tp group have one colour, and a dp and a pp group are drawn. Right: a rank's bytes, counted on a
simulated group, with ZeRO-1 and without.
"""

from pathlib import Path

import zero_3d as z
import zero_3d_tables as tables

ROOT = Path(__file__).resolve().parents[2]
BLOOM = tables.RUNS[0]


def draw_placement(axis) -> None:
    """A server is a row of eight GPUs."""
    import matplotlib

    mesh = z.ParallelMesh(BLOOM.tp, BLOOM.pp, BLOOM.dp)
    colors = matplotlib.colormaps["tab10"]
    edges = {z.rank_of(mesh, 3, 0, d): "tab:blue" for d in range(BLOOM.dp)}  # a dp group
    edges |= {z.rank_of(mesh, 0, p, 0): "tab:red" for p in range(2)}  # a pp group
    for rank in range(2 * BLOOM.dp * BLOOM.tp):
        dp_rank = rank // BLOOM.tp % BLOOM.dp
        edge = edges.get(rank, "none")
        box = dict(boxstyle="round,pad=0.3", facecolor=colors(dp_rank, 0.5), edgecolor=edge)
        x, y = rank % 8, -(rank // 8) - 0.5 * (rank // 32)
        axis.text(x, y, rank, ha="center", va="center", size=8, bbox=box | {"linewidth": 1.8})
    note = "blue: a dp group,\ngradients and\nparameters, 19 GB"
    axis.text(7.75, -1.5, note, size=8, color="tab:blue", va="center")
    note = "red: two stages of\na pp group, activa-\ntions, 7.5 GB"
    axis.text(7.75, -4.0, note, size=8, color="tab:red", va="center")
    axis.text(-0.4, 0.75, "neighbours of one colour: a tp group, 812 GB inside a server", size=8)
    for server in range(8):
        y = -server - 0.5 * (server // 4)
        axis.text(-1.1, y, f"server {server}", ha="right", va="center", size=8)
    axis.set(xlim=(-2.6, 10.4), ylim=(-8.2, 1.2))
    axis.set_title(
        "BLOOM, tp 4 × pp 12 × dp 8: the first two stages; sent by a rank in a step", size=10
    )
    axis.axis("off")


def draw_bytes(axis) -> None:
    names = []
    for index, layout in enumerate(tables.RUNS):
        found = tables.bytes_of(layout, 5 * layout.tp * layout.dp)
        for place, sharded in ((2 * index, False), (2 * index + 1, True)):
            state = found.state if sharded else found.ideal * layout.dp
            left = 0.0
            parts = (("parameters, bf16", found.parameters, "#63a4e0"),)
            parts += (("gradients, fp32", found.main_grad, "#f0b429"),)
            parts += (("optimizer state, fp32", state, "#c53030"),)
            for label, size, color in parts:
                name = label if place == 0 else None
                axis.barh(-place, size / 1e9, 0.7, left, color=color, edgecolor="white", label=name)
                left += size / 1e9
            axis.text(left + 0.6, -place, f"{left:.1f}", va="center", size=8)
            names.append(f"{layout.name}\n{'ZeRO-1' if sharded else 'replicated'}")
    axis.set_yticks(range(0, -4, -1), names, size=8)
    axis.set(xlabel="GB of a rank, without activations", xlim=(0, 76))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 4.6), layout="constrained", width_ratios=(1.5, 1)
    )
    draw_placement(left)
    draw_bytes(right)
    figure.savefig(ROOT / "07_zero_3d" / "placement.png", dpi=100)


if __name__ == "__main__":
    draw()
