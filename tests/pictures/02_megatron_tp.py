# SPDX-License-Identifier: MIT-0
"""Draws 02_megatron_tp/gradients.png: what a loss curve hides. `make pictures CHAPTER=02`."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import megatron_tp as tp
import ranks
import torch.distributed as dist
from proof import plant

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100
LEFT_OUT = "two ranks, all-reduce left out in backward"


@dataclass
class Measured:
    """What rank 0 has seen."""

    alone: list[float] = field(default_factory=list)  # losses of a single device
    together: list[float] = field(default_factory=list)  # losses of two ranks
    errors: dict[str, float] = field(default_factory=dict)  # of gradients, first step, float64


@contextlib.contextmanager
def without_the_backward_all_reduces():
    """Leaves out both places that sum the gradient of a region's input."""

    def column_backward(ctx, grad_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        flat_grad = grad_BSf.flatten(0, -2)
        return grad_BSf @ weight_fH, flat_grad.mT @ x_BSH.flatten(0, -2), flat_grad.sum(0), None

    with (
        plant(tp, "copy_to_tp", lambda x, group=None: x),
        plant(tp._ColumnParallelLinear, "backward", staticmethod(column_backward)),
    ):
        yield


def measure(broken: bool) -> Measured:
    """Trains on two ranks, and on a single device where nothing is broken."""
    config = tp.GPTConfig(num_layers=2, hidden_size=64, seq_length=64)
    data = tp.TextData("", config.seq_length)
    batches = [data.batch(step, 16, seed=0) for step in range(STEPS)]

    def losses_of(model, train, *mesh) -> list[float]:
        optimizer = tp.make_optimizer(model, lr=3e-3)
        return [loss.item() for loss, _ in train(model, optimizer, batches, *mesh)]

    found = Measured()
    if not broken:
        found.alone = losses_of(tp.GPT(config), tp.train_alone)
    with without_the_backward_all_reduces() if broken else contextlib.nullcontext():
        mesh = tp.make_mesh(2, ranks.device)
        found.together = losses_of(tp.ParallelGPT(config), tp.train, mesh)
        plain = tp.GPT(config).double()
        parallel = tp.ParallelGPT(config).double()
        plain.loss(*batches[0]).mean().backward()
        parallel.loss(*batches[0]).mean().backward()
    for name, p in plain.named_parameters():
        shard = tp.shard_tensor(name, p.grad, config, dist.get_rank(), 2)
        error = (parallel.get_parameter(name).grad - shard).abs().max() / p.grad.abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        found.errors[name] = error.item()
    return found


def draw_losses(axis, right: Measured, wrong: Measured) -> None:
    axis.plot(right.alone, color="0.75", linewidth=6, label="one device")
    axis.plot(right.together, color="tab:blue", linewidth=1.5, label="two ranks")
    axis.plot(wrong.together, color="tab:red", linewidth=1.5, linestyle="--", label=LEFT_OUT)
    axis.set(
        title="The loss falls, also with the bug", xlabel="step", ylabel="nats per byte"
    )
    axis.legend(frameon=False)


def draw_errors(axis, right: Measured, wrong: Measured) -> None:
    names = list(right.errors)
    for measured, color, label in ((right, "tab:blue", "two ranks"), (wrong, "tab:red", LEFT_OUT)):
        errors = [max(measured.errors[name], 1e-17) for name in names]
        axis.plot(errors, "o", color=color, markersize=5, label=label)
    axis.axhline(1e-10, color="0.6", linewidth=1, linestyle=":")
    axis.annotate("the tests' bound", (len(names) - 1, 1e-10), ha="right", va="bottom", color="0.4")
    groups = {"embeddings": [0, 1]}
    for i, name in enumerate(names):
        if name.startswith("layers"):
            groups.setdefault(f"layer {name.split('.')[1]}", []).append(i)
    groups["final norm"] = [len(names) - 2, len(names) - 1]
    centres = [sum(places) / len(places) for places in groups.values()]
    axis.set_xticks(centres, groups.keys())
    for places in groups.values():
        axis.axvspan(places[0] - 0.4, places[-1] + 0.4, color="0.95", zorder=0)
    axis.set(yscale="log", ylim=(1e-18, 1e2), ylabel="max|Δ| / max|reference|")
    axis.set_title("The gradient of every tensor in step 0, float64")
    axis.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.62))


def draw(right: Measured, wrong: Measured) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = {"figsize": (10.5, 3.8), "width_ratios": (1, 1.25)}
    figure, axes = plt.subplots(1, 2, layout="constrained", **size)
    draw_losses(axes[0], right, wrong)
    draw_errors(axes[1], right, wrong)
    figure.savefig(ROOT / "02_megatron_tp" / "gradients.png", dpi=110)
    last = slice(STEPS // 2, None)
    cost = sum(wrong.together[last]) - sum(right.together[last])
    print(f"the bug costs {cost / len(right.together[last]):.2f} nats in the second half")


def main() -> None:
    folders = ("tests", "tests/pictures", "02_megatron_tp")
    ranks.PATHS[:] = [str(ROOT / folder) for folder in folders]
    pool = ranks.Pool(2)
    found = []
    for broken in (False, True):
        kwargs = {"broken": broken}
        found.append(pool.run(Path(__file__).stem, "measure", kwargs, timeout=300)[0])
    pool.close()
    draw(*found)


if __name__ == "__main__":
    main()
