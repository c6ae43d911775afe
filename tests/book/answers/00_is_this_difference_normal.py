# SPDX-License-Identifier: MIT-0
"""Answers to the exercises on differences: other right ones than the solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "one error a tensor, NaN compared as a number that is not smaller",
        """
def worst(here, reference):
    errors = [0.0]
    for name, right in reference.items():
        if name not in here:
            return float("inf")
        gap = (here[name] - right).abs().max().item()
        if gap == 0:
            continue
        error = gap / max(right.abs().max().item(), 1e-300)
        errors.append(error if error < float("inf") else float("inf"))
    return max(errors)
""",
    ),
    (
        "2",
        "with norms over all tensors",
        """
def as_good(ranks, single, wide):
    def apart(here):
        return max(((here[n] - x).norm() / x.norm()).item() for n, x in wide.items())

    return apart(ranks) <= 3 * apart(single)
""",
    ),
    ("3", "its name", 'guilty = "layers.1.mlp.down"\n'),
    ("3", "a function", "def guilty(models):\n    return 'layers.1.mlp.' + 'down'\n"),
]

WRONG = [
    (
        "1",
        "an error an element",
        """
def worst(here, reference):
    return max(((here[n] - x) / x).abs().max().item() for n, x in reference.items())
""",
    ),
    (
        "1",
        "max drops a NaN",
        """
def worst(here, reference):
    found = 0.0
    for name, x in reference.items():
        gap = (here[name] - x).abs().max().item() / x.abs().max().item()
        found = max(found, gap)
    return found
""",
    ),
    (
        "2",
        "a fixed threshold",
        """
def as_good(ranks, single, wide):
    runs = {"gradient": ranks}, {"gradient": single}
    return measure.compare(*runs)["gradient"] < 1e-4
""",
    ),
    ("2", "always", "def as_good(ranks, single, wide):\n    return True\n"),
    ("3", "the embedding", 'guilty = "embedding"\n'),
    ("3", "the layer after it", 'guilty = "layers.2.norm1"\n'),
]
