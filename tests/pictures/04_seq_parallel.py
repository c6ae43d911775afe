# SPDX-License-Identifier: MIT-0
"""Draws 04_seq_parallel/memory.png: what a layer of 22B keeps, and four models next to 80 GB.

`make pictures CHAPTER=04`, ten seconds. The bars on the left are measured: one rank's layer in full
size, the other ranks simulated. Those on the right are the paper's formula.
"""

from pathlib import Path

import seq_parallel_tables as tables

ROOT = Path(__file__).resolve().parents[2]
#        what                                    color      the beginnings of names in the ledger
KINDS = [
    ("inputs of gelu and row-parallel layers", "#2b6cb0", ("gelu", "out", "down")),
    ("q, k, v", "#63a4e0", ("q, k, v",)),
    ("core attention: softmax, mask, dropout", "#f0b429", ("core attention",)),
    ("inputs of LayerNorm", "#c53030", ("LayerNorm", "the layer's input")),
    ("inputs of column-parallel layers", "#e57373", ("qkv", "up")),
    ("dropout masks outside the regions", "#7b1e1e", ("dropout",)),
]


def draw_layer(axis, costs: list[tables.LayerCost], sbh: int) -> None:
    """Stacked bars of the six modes, with the formula on top of each."""
    names = [str(cost.mode).replace(" + ", "\n+ ") for cost in costs]
    bottom = [0.0] * len(costs)
    for label, color, starts in KINDS:
        heights = []
        for cost in costs:
            sizes = [size for name, size in cost.saved.items() if name.startswith(starts)]
            heights.append(sum(sizes) / sbh)
        axis.bar(names, heights, bottom=bottom, color=color, label=label, width=0.7)
        bottom = [a + b for a, b in zip(bottom, heights)]
    for i, (cost, top) in enumerate(zip(costs, bottom)):
        axis.plot([i - 0.42, i + 0.42], [cost.formula / sbh] * 2, color="black", linewidth=1.2)
        axis.annotate(f"{top:.2f}", (i, top + 0.3), ha="center", va="bottom")
    axis.plot([], [], color="black", linewidth=1.2, label="the paper's formula")
    title = "A layer of 22B on one of 8 ranks, measured"
    axis.set(title=title, ylabel="kept for backward, in s·b·h bytes", ylim=(0, 30))
    axis.tick_params(axis="x", labelsize=8)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper right")


def draw_models(axis) -> None:
    """The first pipeline stage of the four models."""
    modes = [tables.TP_ONLY, tables.Mode(True, "none"), tables.BOTH, tables.Mode(True, "full")]
    models = tables.PAPER_MODELS
    for i, (mode, color) in enumerate(zip(modes, ["#c53030", "#e5a0a0", "#2b6cb0", "0.6"])):
        gigabytes = [tables.first_stage_bytes(model, mode) / 1e9 for model in models]
        places = [x + 0.2 * (i - 1.5) for x in range(len(models))]
        axis.bar(places, gigabytes, 0.19, color=color, label=str(mode))
    axis.axhline(80, color="black", linewidth=1, linestyle=":")
    axis.annotate("all of an 80 GB GPU", (-0.45, 80), va="bottom", fontsize=8)
    axis.set_xticks(range(len(models)), [model.name for model in models])
    axis.set(title="Activations of the fullest GPU, by the formula", ylabel="GB")
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model = tables.PAPER_MODELS[0]
    costs = tables.paper_scale(model)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4.4), width_ratios=(1.25, 1), layout="constrained"
    )
    draw_layer(left, costs, tables.SEQUENCE * model.micro_batch * model.h)
    draw_models(right)
    figure.savefig(ROOT / "04_seq_parallel" / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
