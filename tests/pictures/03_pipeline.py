# SPDX-License-Identifier: MIT-0
"""Draws 03_pipeline/schedules.png: the four schedules on one clock. `make pictures CHAPTER=03`."""

from pathlib import Path

import timeline

ROOT = Path(__file__).resolve().parents[2]
KINDS = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1))
COLORS = {
    "F": ("#4c8fc9", "#a9cbe8"),
    "B": ("#e08a3c", "#f3c79f"),
    "W": ("#6aa56a", "#6aa56a"),
}  # by chunk


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(10.5, 7.6), sharex=True, layout="constrained")
    tables = timeline.tables([kind for kind, _ in KINDS], 4, 8, 2)
    longest = max(timeline.timed(table).length for table in tables.values())
    for axis, (kind, v) in zip(axes, KINDS):
        table = tables[kind]
        planned = timeline.timed(table)
        for rank, bars in enumerate(planned.ranks):
            for op, start, end in bars:
                begin, width = float(start), float(end - start)
                axis.barh(
                    rank,
                    width,
                    0.9,
                    begin,
                    color=COLORS[op.kind][op.stage // 4],
                    edgecolor="white",
                    linewidth=0.8,
                )
                axis.text(
                    begin + width / 2,
                    rank,
                    op.microbatch,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="0.15",
                )
        held = ", ".join(str(timeline.most_held(ops)) for ops in table)
        pieces = ", 2 chunks a rank" if v > 1 else ""
        axis.set_title(
            f"{kind}{pieces}: bubble {planned.bubble}, activations held {held}",
            loc="left",
            fontsize=10,
        )
        axis.set(
            yticks=range(4), yticklabels=[f"rank {r}" for r in range(4)], xlim=(0, float(longest))
        )
        axis.invert_yaxis()
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLORS[kind][0]) for kind in "FBW"]
    names = ["forward", "backward (zb-h1: of the input)", "backward of the weights"]
    figure.legend(marks, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(ROOT / "03_pipeline" / "schedules.png", dpi=110)


if __name__ == "__main__":
    draw()
