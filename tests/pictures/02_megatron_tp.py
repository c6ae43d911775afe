# SPDX-License-Identifier: MIT-0
"""Draws 02_megatron_tp/gradients.png: what a loss curve hides. `make pictures CHAPTER=02`, a minute."""

import contextlib
from pathlib import Path

import megatron_tp as tp
import ranks
import torch.distributed as dist
from proof import plant

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100


@contextlib.contextmanager
def without_the_backward_all_reduces():
    """The two places that sum the gradient of a region's input, left out."""

    def column_backward(ctx, grad_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        flat_grad, flat_x = grad_BSf.flatten(0, -2), x_BSH.flatten(0, -2)
        return grad_BSf @ weight_fH, flat_grad.mT @ flat_x, flat_grad.sum(0), None

    with (
        plant(tp, "copy_to_tp", lambda x, group=None: x),
        plant(tp._ColumnParallelLinear, "backward", staticmethod(column_backward)),
    ):
        yield


def measure(broken: bool) -> tuple[list[float], list[float], dict[str, float]]:
    """On each of two ranks: losses of one device, of two ranks, and the first step's gradient errors in float64."""
    cfg = tp.GPTConfig(num_layers=2, hidden_size=64, seq_length=64)
    data, rate = tp.TextData("", "bytes", 64), lambda step: tp.learning_rate(step, STEPS, 3e-3)
    batches = [data.batch(step, 16, seed=0) for step in range(STEPS)]
    alone = [] if broken else [loss.item() for loss, _ in tp.train_alone(tp.GPT(cfg), batches, rate)]
    with without_the_backward_all_reduces() if broken else contextlib.nullcontext():
        grid = tp.make_grid(2, ranks.device)
        together = [loss.item() for loss, _ in tp.train(tp.ParallelGPT(cfg), batches, rate, grid)]
        plain, parallel = tp.GPT(cfg).double(), tp.ParallelGPT(cfg).double()
        plain.loss(*batches[0]).mean().backward()
        parallel.loss(*batches[0]).mean().backward()
    errors = {}
    for name, p in plain.named_parameters():
        share = tp.shard_tensor(name, p.grad, cfg, dist.get_rank(), 2)
        error = (parallel.get_parameter(name).grad - share).abs().max() / p.grad.abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        errors[name] = error.item()
    return alone, together, errors


def draw(right: tuple, wrong: tuple) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=(1, 1.25), layout="constrained")
    left.plot(right[0], color="0.75", linewidth=6, label="one device")
    left.plot(right[1], color="tab:blue", linewidth=1.5, label="two ranks")
    left.plot(wrong[1], color="tab:red", linewidth=1.5, linestyle="--", label="two ranks, no all-reduce in backward")
    left.set(title="What one looks at: the loss", xlabel="step", ylabel="nats a byte")
    left.legend(frameon=False)

    names = list(right[2])
    kinds = (right, "tab:blue", "two ranks"), (wrong, "tab:red", "two ranks, no all-reduce in backward")
    for (_, _, errors), color, label in kinds:
        middle.plot([max(errors[name], 1e-17) for name in names], "o", color=color, markersize=5, label=label)
    middle.axhline(1e-10, color="0.6", linewidth=1, linestyle=":")
    middle.annotate("the tests' bound", (len(names) - 1, 1e-10), ha="right", va="bottom", color="0.4")
    parts = ["layer " + name.split(".")[1] if name.startswith("layers") else "ends" for name in names]
    marks = {part: [i for i, own in enumerate(parts) if own == part] for part in parts if part != "ends"}
    marks |= {"embeddings": [0, 1], "final norm": [len(names) - 2, len(names) - 1]}
    middle.set_xticks([sum(places) / len(places) for places in marks.values()], marks.keys())
    for places in marks.values():
        middle.axvspan(places[0] - 0.4, places[-1] + 0.4, color="0.95", zorder=0)
    middle.set(yscale="log", ylim=(1e-18, 1e2), title="What shows it: the gradient of every tensor, float64")
    middle.set(ylabel="max|Δ| / max|reference|")
    middle.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.62))
    figure.savefig(ROOT / "02_megatron_tp" / "gradients.png", dpi=110)


if __name__ == "__main__":
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/pictures", "02_megatron_tp")]
    pool = ranks.Pool(2)
    draw(*(pool.run(Path(__file__).stem, "measure", dict(broken=broken), timeout=300)[0] for broken in (False, True)))
    pool.close()
