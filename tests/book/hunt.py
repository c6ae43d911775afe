# SPDX-License-Identifier: MIT-0
"""The bugs of notebooks/00_find_the_bug.ipynb, each in a chapter's own model, by number and without
a name.

Students: what is below spoils the hunt. `on_ranks`, `report` and `right` are all that you need, and
the notebook calls them.
"""

import contextlib
from collections import namedtuple

import exercises
import measure_differences as differences
import torch
import torch.distributed as dist
import torch.nn.functional as F
from proof import plant
from torch import Tensor

RANKS, WIDTH, SAME = 4, "fp64", 1e-10  # float64: whatever is off by more than SAME is no rounding


def planted(number: int | None):
    """`with planted(3): ...` has bug 3 in the chapter, for experiments of your own; None is no
    bug."""
    return BUGS[number].plant()


def on_ranks(number: int | None) -> dict:
    """Trains a model with bug `number` in it for five steps; every rank calls it. None: no bug,
    tensor parallelism.

    Returns: this rank's share of losses, first gradients and last weights; `report` takes all
    ranks' shares.
    """
    torch.set_num_threads(1)
    with planted(number):
        return differences.on_ranks(BUGS[number].technique, 0, WIDTH, optimizers=("SGD",))


def report(number: int | None, shares: list[dict]) -> dict[str, float]:
    """Prints what `shares`, of all ranks in order, show beside the single device; returns every
    number's error.

    Errors are max|Δ| / max|reference| of a tensor; of what every rank has whole, the first rank's
    is looked at.
    """
    technique = BUGS[number].technique
    here, alone = (
        differences.join(technique, shares, True),
        differences.alone(technique, 0, WIDTH, optimizers=("SGD",)),
    )
    errors = {
        f"loss {step}": differences.error(here["losses"][step], x)
        for step, x in alone["losses"].items()
    }
    errors["norm"] = differences.error(here["norm"]["norm"], alone["norm"]["norm"])
    for kind, quantity in (("gradient", "gradient"), ("weight", "SGD")):
        errors |= {
            f"{kind} {n}": differences.error(here[quantity][n], x)
            for n, x in alone[quantity].items()
        }

    title = "no bug" if number is None else f"bug {number}"
    print(f"{title}: {differences.TECHNIQUES[technique].title}, {len(shares)} ranks, {WIDTH}\n")
    print("step   loss on the ranks   on a single device   relative difference")
    for step, loss in alone["losses"].items():
        values = f"{here['losses'][step].item():17.12f}   {loss.item():18.12f}"
        print(f"{step:4}   {values}   {errors[f'loss {step}']:.0e}")
    norms = [found["norm"]["norm"].item() for found in (here, alone)]
    text = f"{norms[0]:.9f} on the ranks, {norms[1]:.9f} on a single device"
    print(f"\nnorm of the first gradient: {text}")
    for kind, title in (
        ("gradient", "gradients of the first step"),
        ("weight", "weights after five steps of SGD"),
    ):
        found = {name.split(" ", 1)[1]: x for name, x in errors.items() if name.startswith(kind)}
        right = [name for name, x in found.items() if x < SAME]
        print(f"\n{title}: {len(right)} of {len(found)} tensors are right")
        if len(right) < len(found):
            print("\n".join(_borders(found)))
    return errors


def _borders(found: dict[str, float]) -> list[str]:
    """A line for each run of tensors, in the model's order, that are all right or all wrong."""
    runs: list[list[str]] = []
    for name in found:
        if runs and (found[runs[-1][-1]] < SAME) == (found[name] < SAME):
            runs[-1].append(name)
        else:
            runs.append([name])
    lines = []
    for names in runs:
        errors = [found[name] for name in names]
        off = f"off by {min(errors):.0e} to {max(errors):.0e}"
        if len(names) == 1:
            off = f"off by {errors[0]:.0e}"
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"   {'right' if errors[0] < SAME else off:23} {span}")
    return lines


def right(number: int, answer: object) -> bool:
    """Does bug `number` sit in `answer`: a function, class or method of the chapter, or its name?

    A name may have its module or class before it and () after it; a method of a guilty class
    counts.
    """
    parts = name_of(answer).split(".")
    for guilty in BUGS[number].guilty:
        words = guilty.split(".")
        places = range(len(parts) - len(words) + 1)
        if any(parts[i : i + len(words)] == words for i in places):
            return True
    return False


def name_of(answer: object) -> str:
    if not isinstance(answer, str):
        answer = getattr(answer, "__qualname__", "")
    return answer.strip().removesuffix("()")


def check(number: int, answer: object) -> None:
    """Prints whether `answer` is where bug `number` sits, as exercises.check does."""

    def solved() -> None:
        name = name_of(answer)
        exercises.true("answer is empty", name)
        exercises.true(f"not {name}: believe the table of tensors", right(number, answer))

    exercises.check(number, solved)


# ── Spoilers ──────────────────────────────────────────────────────────────────────────────────────


def bug_0():
    import megatron_tp as tp

    return plant(tp, "copy_to_tp", lambda x, group=None: x.view_as(x))


def bug_1():
    import megatron_tp as tp

    correct = tp.vocab_parallel_cross_entropy

    def loss(logits_BSv: Tensor, targets_BS: Tensor, group=None, vocab_size=None) -> Tensor:
        return correct(logits_BSv, targets_BS, group)

    return plant(tp, "vocab_parallel_cross_entropy", loss)


def bug_2():
    import megatron_tp as tp

    correct = tp.clip_grad_norm_

    def norm(parameters, max_norm, sharded=(), group=None):
        parameters = list(parameters)
        return correct(parameters, max_norm, sharded=parameters, group=group)

    return plant(tp, "clip_grad_norm_", norm)


def bug_3():
    import megatron_tp as tp

    def forward(self, x: Tensor) -> Tensor:
        return tp.reduce_from_tp(F.linear(x, self.weight, self.bias), self.group)

    return plant(tp.RowParallelLinear, "forward", forward)


def bug_4():
    import deepspeech as ds

    return plant(ds._SumOverRanks, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def bug_5():
    import pipeline as pl

    return plant(pl.PipelineStage, "tied_copies", lambda self: [])


def bug_6():
    import seq_parallel as sp

    correct = sp.reduce_sequence_parallel_grads

    def mean(module, group=None):
        correct(module, group)
        for p in module.parameters():
            if p.sequence_parallel:
                p.grad /= sp.group_size(group)

    return plant(sp, "reduce_sequence_parallel_grads", mean)


def bug_7():
    import context_parallel as cp

    def zeros(u, width, group=None):
        return torch.zeros_like(u[:, :width])

    return plant(cp, "halo", zeros)


def bug_8():
    import moe_fp8 as mf

    def everywhere(model, mesh):
        for p in model.parameters():
            dist.all_reduce(p.grad)

    return plant(mf, "reduce_gradients", everywhere)


Bug = namedtuple("Bug", "technique plant guilty")
BUGS = {
    None: Bug("tensor", contextlib.nullcontext, set()),
    0: Bug("tensor", bug_0, {"copy_to_tp"}),
    1: Bug("tensor", bug_1, {"vocab_parallel_cross_entropy"}),
    2: Bug("tensor", bug_2, {"clip_grad_norm_"}),
    3: Bug("tensor", bug_3, {"RowParallelLinear"}),
    4: Bug("data", bug_4, {"sum_over_ranks", "_SumOverRanks", "SequenceBatchNorm"}),
    5: Bug("pipeline", bug_5, {"tied_copies", "run_step"}),
    6: Bug("sequence", bug_6, {"reduce_sequence_parallel_grads"}),
    7: Bug("tokens", bug_7, {"halo"}),
    8: Bug("experts", bug_8, {"reduce_gradients"}),
}
