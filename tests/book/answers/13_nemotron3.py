# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 13: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "by cutting a list",
        """
def rows(tokens, tp, rank):
    r = (tokens + tp - 1) // tp
    return r, len(range(tokens)[rank * r : (rank + 1) * r])
""",
    ),
    (
        "2",
        "a range with a step",
        """
def ranks_to_sum(place, rank, tp, ep, world):
    step = 1
    if place == "tp":
        step = tp
    if place == "ep":
        step = ep
    return range(rank % step, world, step)
""",
    ),
    (
        "3",
        "the first copy of each shard",
        """
def full_norm(squares, tp, ep):
    total = squares[0][""]
    total += sum(of_rank["tp"] for of_rank in squares[:tp])
    total += sum(of_rank["ep"] for of_rank in squares[:ep])
    return total**0.5
""",
    ),
]

WRONG = [
    (
        "1",
        "the last rank has what is left over",
        """
def rows(tokens, tp, rank):
    r = tokens // tp
    return r, r + (tokens % tp if rank == tp - 1 else 0)
""",
    ),
    (
        "1",
        "all rows are tokens",
        """
def rows(tokens, tp, rank):
    r = -(-tokens // tp)
    return r, r
""",
    ),
    (
        "2",
        "everything but experts over dp",
        """
def ranks_to_sum(place, rank, tp, ep, world):
    step = ep if place == "ep" else tp
    return list(range(rank % step, world, step))
""",
    ),
    (
        "2",
        "the group that shards it",
        """
def ranks_to_sum(place, rank, tp, ep, world):
    size = {"": world, "tp": tp, "ep": ep}[place]
    first = rank // size * size
    return list(range(first, first + size))
""",
    ),
    (
        "3",
        "experts are counted as heads",
        """
def full_norm(squares, tp, ep):
    world = len(squares)
    total = 0.0
    for of_rank in squares:
        total += of_rank[""] / world + (of_rank["tp"] + of_rank["ep"]) * tp / world
    return total**0.5
""",
    ),
    (
        "3",
        "one rank's squares",
        """
def full_norm(squares, tp, ep):
    return sum(squares[0].values()) ** 0.5
""",
    ),
]
