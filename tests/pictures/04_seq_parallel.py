# SPDX-License-Identifier: MIT-0
"""Draws 04_seq_parallel/memory.png: what a layer of 22B keeps, tensor by tensor, and four models beside 80 GB.

`make pictures CHAPTER=04`, ten seconds. The bars on the left are measured: one rank's layer in full size, on pretended
ranks. Those on the right are the paper's formula.
"""

from pathlib import Path

import seq_parallel as sp

ROOT = Path(__file__).resolve().parents[2]
#        what                             color      a piece of the line that keeps it
KINDS = [
    ("gelu's and row layers' inputs", "#2b6cb0", ("gelu", "F.linear")),
    ("queries, keys, values", "#63a4e0", ("baddbmm",)),
    (
        "core attention: softmax, mask, dropped",
        "#f0b429",
        ("softmax", "dropout(weights", "dropped_pSS @"),
    ),
    ("norms' inputs", "#c53030", ("norm(",)),
    ("column layers' inputs", "#e57373", ("column_parallel",)),
    ("masks outside the regions", "#7b1e1e", ()),
]


def kind_of(kept: sp.Kept, cost: sp.LayerCost) -> int:
    """Which of KINDS a tensor is; the one that `checkpoint` keeps is its region's input."""
    if "checkpoint(" in kept.line:
        return 3 if cost.recompute == "full" else 1
    if kept.dtype == sp.torch.bool and "norm(" in kept.line:
        return 5
    return next(
        i for i, (*_, marks) in enumerate(KINDS) if any(mark in kept.line for mark in marks)
    )


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, costs = sp.PAPER_MODELS["22B"], sp.paper_scale("22B")
    sbh = sp.SEQUENCE * model.micro_batch * model.h
    names = [
        sp.mode_name(cost.sequence_parallel, cost.recompute).replace(" + ", "\n+ ")
        for cost in costs
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4.4), width_ratios=(1.25, 1), layout="constrained"
    )
    bottom = [0.0] * len(costs)
    for kind, (label, color, _) in enumerate(KINDS):
        heights = [sum(k.bytes for k in c.saved if kind_of(k, c) == kind) / sbh for c in costs]
        left.bar(names, heights, bottom=bottom, color=color, label=label, width=0.7)
        bottom = [a + b for a, b in zip(bottom, heights)]
    for i, (cost, top) in enumerate(zip(costs, bottom)):
        left.plot([i - 0.42, i + 0.42], [cost.formula / sbh] * 2, color="black", linewidth=1.2)
        left.annotate(
            f"{top:.2f}",
            (i, top),
            ha="center",
            va="bottom",
            xytext=(0, 2),
            textcoords="offset points",
        )
    left.plot([], [], color="black", linewidth=1.2, label="the paper's formula")
    left.set(
        title="A layer of 22B on one of 8 ranks, measured",
        ylabel="kept for backward, in s·b·h bytes",
        ylim=(0, 30),
    )
    left.tick_params(axis="x", labelsize=8)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper right")

    shown = [(False, "none"), (True, "none"), (True, "selective"), (True, "full")]
    colors = ["#c53030", "#e5a0a0", "#2b6cb0", "0.6"]
    for i, (mode, color) in enumerate(zip(shown, colors)):
        gigabytes = [sp.first_stage_bytes(m, *mode) / 1e9 for m in sp.PAPER_MODELS.values()]
        places = [x + 0.2 * (i - 1.5) for x in range(len(gigabytes))]
        right.bar(places, gigabytes, 0.19, color=color, label=sp.mode_name(*mode))
    right.axhline(80, color="black", linewidth=1, linestyle=":")
    right.annotate("all of an 80 GB GPU", (-0.45, 80), va="bottom", fontsize=8)
    right.set_xticks(range(len(sp.PAPER_MODELS)), sp.PAPER_MODELS)
    right.set(title="Activations of the fullest GPU, by the formula", ylabel="GB")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "04_seq_parallel" / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
