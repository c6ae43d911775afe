# SPDX-License-Identifier: MIT-0
"""What the notebooks call: the chapters' folders and kept results, wherever a copy of one lies; and
a check of an exercise, which runs an answer and prints its verdict and the reason.

The cell that checks an exercise has one function, which compares the answer's results with what is
right, and then

    exercises.check(1, solved)        prints "exercise 1: ok" or "exercise 1: not solved yet: ..."

On the ranks (%%px) every rank prints its own verdict: no collective is needed to agree on it, so
an answer that leaves a rank behind cannot hang the verdict of the others.
"""

import builtins
import contextlib
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
_REMEMBERED: dict = {}


def use(*folders: str) -> None:
    """The scripts of these folders, "02_megatron_tp" for example, can be imported."""
    for folder in folders:
        path = ROOT / folder
        if not path.is_dir():
            raise ValueError(f"there is no folder {folder} in {ROOT}")
        sys.path.append(str(path))


def results(name: str) -> dict:
    """What a command measured and wrote to notebooks/results."""
    return json.loads((ROOT / "notebooks/results" / name).read_text("utf-8"))


class Wrong(Exception):
    """An answer's result is not the right one; the message is the reason that a student reads."""


def equal(what: str, got: object, expected: object, within: float = 0.0) -> None:
    """Compares numbers, lists or tensors: max|got − expected| ≤ within · max(1, max|expected|).

    Raises:
        Wrong: they differ, in type, shape or value. The message has both.
    """
    if not isinstance(expected, torch.Tensor | int | float | list | tuple):
        raise TypeError(f"{what}: {type(expected).__name__} cannot be compared")
    reason = Wrong(f"{what}: got {_short(got)}, expected {_short(expected)}")
    try:
        found = torch.as_tensor(got, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise reason from None
    right = torch.as_tensor(expected, dtype=torch.float64).detach()
    if found.shape != right.shape:
        raise reason
    limit = within * max(1.0, right.abs().max().item() if right.numel() else 0.0)
    close = (found - right).abs() <= limit
    if not bool(close.all()):
        if right.numel() <= 10:
            raise reason
        place = int((~close).flatten().nonzero()[0])
        values = f"got {found.flatten()[place]:g}, expected {right.flatten()[place]:g}"
        raise Wrong(f"{what}: element {place}: {values}")


def true(what: str, condition: object) -> None:
    """Raises Wrong with `what`, which says what should be so, where the condition is false."""
    if not bool(condition):
        raise Wrong(what)


def _short(value: object) -> str:
    """A value in at most 80 characters."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


class Sends(TorchDispatchMode):
    """`with Sends() as sends:` lists the ranks that this one sends to, and other collectives."""

    def __enter__(self) -> "Sends":
        self.destinations: list[int] = []
        self.others: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::").strip("_")
            if name == "send":
                self.destinations.append(args[2])
            elif name != "recv":
                self.others.append(name)
        return function(*args, **(kwargs or {}))


def check(number: int, solved: Callable[[], object]) -> None:
    """Runs `solved`, which raises where the answer is wrong, and prints the verdict in one line.

    What the answer itself prints is shown before it, indented, so that it cannot be the verdict.
    """
    said = io.StringIO()
    reason = ""
    try:
        with contextlib.redirect_stdout(said):
            solved()
    except KeyboardInterrupt:
        raise
    except Wrong as error:
        reason = str(error)
    except BaseException as error:  # SystemExit too: it would end the cell without a verdict
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[-1] if lines else ''}".rstrip(": ")
    for line in said.getvalue().splitlines():
        print(f"    your code printed: {line}")
    verdict = f"not solved yet: {reason}" if reason else "ok"
    # In one piece: between two, a kernel may send what is there as an output of its own.
    print(f"exercise {number}: {verdict}", flush=True)


def check_of(notebook: str, number: int) -> None:
    """Runs the check of an exercise from this repository: a handout has no check of its own."""
    import nbformat
    from IPython import get_ipython

    import notebooks

    original = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", as_version=4)
    get_ipython().run_cell(notebooks.checks(original)[str(number)].source)


# ── Before and after an answer is executed, when it is graded ─────────────────────────────────────


def remember(namespace: dict[str, object]) -> None:
    """Notes what the names of a notebook mean before an answer is executed, and its modules'."""
    modules = {x for x in namespace.values() if isinstance(x, types.ModuleType)}
    modules |= {builtins, torch, torch.distributed}
    _REMEMBERED["names"] = dict(namespace)
    _REMEMBERED["modules"] = [(module, dict(vars(module))) for module in modules]


def restore(namespace: dict[str, object], asked_for: set[str]) -> None:
    """Puts back all that an answer has redefined but the names that it was asked for."""
    for module, names in _REMEMBERED["modules"]:
        for name, value in names.items():
            if vars(module).get(name) is not value:
                setattr(module, name, value)
    for name in [*namespace]:
        if name in asked_for or name.startswith("_"):
            continue
        if name in _REMEMBERED["names"]:
            namespace[name] = _REMEMBERED["names"][name]
        elif hasattr(builtins, name):
            del namespace[name]
