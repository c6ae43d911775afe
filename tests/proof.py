# SPDX-License-Identifier: MIT-0
"""What every chapter proves with: one comparison, two recorders, and a way to plant a bug."""

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_equal(
    here: dict[str, Tensor],
    reference: dict[str, Tensor],
    bound: float = 1e-10,
    floor: float = 0.0,
    zeros: dict[str, float] | None = None,
) -> float:
    """Every tensor of `reference` is in `here`, with max|Δ| ≤ bound · max(max|reference|, floor);
    returns the worst.

    Tensors are compared as wholes and not element by element, because rounding is relative to the
    largest summand.

    Args:
        bound: 1e-10 for float64, whose correct results lie near 1e-15. A looser one needs a comment
            that says why.
        floor: after AdamW, steps · lr: where a gradient is zero Adam divides rounding noise by
            itself.
        zeros: tensors that are zero in truth, each with its absolute bound.

    A reference that is hardly larger than the bound proves nothing: that fails too.
    """
    zeros = zeros or {}
    assert here.keys() == reference.keys(), (
        f"names differ: {sorted(here.keys() ^ reference.keys())}"
    )
    worst, complaints = 0.0, []
    for name, expected in reference.items():
        x, y = here[name].detach().cpu(), expected.detach().cpu()
        if x.shape != y.shape or x.dtype != y.dtype:
            complaints.append(
                f"{name}: {tuple(x.shape)} {x.dtype}, expected {tuple(y.shape)} {y.dtype}"
            )
            continue
        gap, size = (x - y).abs().max().item(), y.abs().max().item()
        if name in zeros:
            if not (gap <= zeros[name] and size <= zeros[name]):
                complaints.append(
                    f"{name}: {gap:.1e} from a reference of {size:.1e}"
                    f", both should be below {zeros[name]:.0e}"
                )
            continue
        if not size > 1e-6:
            complaints.append(f"{name}: the reference is {size:.1e}, which proves nothing")
        error = gap / max(size, floor) if size else torch.inf
        worst = max(worst, error)
        if not error <= bound:
            complaints.append(
                f"{name}: off by {error:.1e} of its maximum {size:.1e}, allowed {bound:.0e}"
            )
    assert not complaints, "\n".join(complaints)
    return worst


def assert_differs(
    here: dict[str, Tensor], reference: dict[str, Tensor], at_least: float = 1e-3
) -> list[str]:
    """For planted bugs: the tensors that are off by at least that share of their maximum; there
    must be one."""
    gaps = {
        name: ((here[name] - y).abs().max() / y.abs().max()).item() for name, y in reference.items()
    }
    wrong = [name for name, gap in gaps.items() if not gap < at_least]
    assert wrong, f"the bug does not show: the largest error is {max(gaps.values()):.1e}"
    return wrong


@contextlib.contextmanager
def plant(target, name: str, replacement):
    """Replaces target.name for the length of a with statement, and puts it back whatever
    happens."""
    original = target.__dict__[name]
    setattr(target, name, replacement)
    try:
        yield original
    finally:
        setattr(target, name, original)


@dataclass
class Shows:
    """What a planted bug's test returns: what a user sees of the bug in the loss, and in a check of
    gradients.

    Each is a relative error measured in that test (max|Δ| over max|reference|; `assert_differs` and
    `worst_of` give it), or a few words where a number would say less ("never comes: hangs"); None:
    it is not asked there.
    """

    loss: float | str | None
    gradients: float | str | None

    def words(self) -> list[str]:
        """The two columns of `make bugs`."""
        return [self._word(seen) for seen in (self.loss, self.gradients)]

    @staticmethod
    def _word(seen: float | str | None) -> str:
        if seen is None or isinstance(seen, str):
            return seen or "–"
        if abs(seen) < 1e-9:
            return f"right ({seen:.0e})" if seen else "right to the bit"
        return f"off by {100 * seen:.3g} %" if abs(seen) < 10 else f"off {seen:.2g} times"


def worst_of(here: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest max|Δ| / max|reference| of all tensors; infinite where the reference is zero and
    `here` is not."""
    pairs = [
        ((here[name] - y).abs().max().item(), y.abs().max().item()) for name, y in reference.items()
    ]
    return max((gap / size if size else torch.inf) if gap else 0.0 for gap, size in pairs)


class SavedStorages:
    """`with SavedStorages(model) as saved:` adds up in saved.bytes what autograd keeps for
    backward, but parameters.

    Every storage counts once, however many views of it are kept.
    """

    def __init__(self, *modules: torch.nn.Module):
        self.known = {
            p.untyped_storage().data_ptr() for module in modules for p in module.parameters()
        }

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.kept.append(x)  # held, so that its address is not used again
            self.bytes += storage.nbytes()
        return x

    def __enter__(self):
        self.bytes, self.kept = 0, []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Events(TorchDispatchMode):
    """`with Events() as events:` lists in events.order what happens in time: "product", "wait",
    "all_reduce" ..."""

    COLLECTIVES = {  # torch 2.13 renamed two of them
        "all_reduce": "all_reduce",
        "all_gather_single": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_single": "reduce_scatter",
        "reduce_scatter_tensor": "reduce_scatter",
    }
    PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_mm")

    def __enter__(self):
        self.order = []
        self.undo = contextlib.ExitStack()
        for name in self.COLLECTIVES:
            if name in dist.__dict__:
                self.undo.enter_context(plant(dist, name, self._watched(dist.__dict__[name])))
        return super().__enter__()

    def __exit__(self, *error):
        self.undo.close()
        return super().__exit__(*error)

    def _watched(self, collective):
        order = self.order

        class Work:
            def __init__(self, work):
                self.work = work

            def wait(self):
                order.append("wait")
                return self.work.wait()

        def call(*args, **kwargs):
            order.append(Events.COLLECTIVES[collective.__name__])
            work = collective(*args, **kwargs)
            return Work(work) if work is not None else None

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in self.PRODUCTS:
            self.order.append("product")
        return function(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """`with Shapes() as shapes:` collects in shapes.seen the shape of every tensor that an operator
    makes."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {
            tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)
        }
        return out
