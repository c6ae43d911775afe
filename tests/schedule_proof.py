# SPDX-License-Identifier: MIT-0
"""Proof that programs cannot deadlock, on a network as strict as one can be: batches rendezvous.

Three things must hold:

    order     sender and receiver list the same messages in the same order: order alone matches them
    cause     no rank uses, or sends, what it has not yet made or received
    progress  a batch ends only when, for each of its messages, the other end has posted it too;
              until then its rank does nothing
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from pipeline import Program, Step, needs, stages_of


def take_turns(lists: list[list], go: Callable[[int, Any], bool]) -> list[tuple[int, Any]]:
    """Each rank goes through its list, an item whenever go(rank, item) is true.

    Returns: (rank, item) of all ranks that are stuck; empty when all have come to their end.
    """
    at, moved = [0] * len(lists), True  # at: of each rank, its next item
    while moved:
        moved = False
        for rank, items in enumerate(lists):
            while at[rank] < len(items) and go(rank, items[at[rank]]):
                at[rank], moved = at[rank] + 1, True
    return [(rank, items[k]) for rank, (items, k) in enumerate(zip(lists, at)) if k < len(items)]


def verify_programs(all_programs: list[Program]) -> None:
    """Proves that the ranks' programs match and end, under rendezvous of whole batches.

    Raises: ValueError where two ends list messages in different orders, a rank uses or sends what
        it does not have, or some wait for each other.
    """
    stages = stages_of([[step.op for step in program if step.op] for program in all_programs])
    # source and target to what the sender lists, and what the receiver
    channels = defaultdict(lambda: ([], []))
    for rank, program in enumerate(all_programs):
        for hop in (hop for step in program for hop in step.batch):
            channels[hop.source, hop.target][rank == hop.target].append(hop)
    for (source, target), ends in channels.items():
        for sent, received in zip_longest(*ends):
            if sent != received:
                both = f"one end lists {sent} where the other has {received}"
                raise ValueError(f"rank {source} to {target}: {both}")

    has, posted = defaultdict(set), defaultdict(set)  # of each rank: made or received; posted

    def go(rank: int, step: Step) -> bool:
        op, batch = step
        if op and op not in has[rank]:
            if lacking := [earlier for earlier in needs(op, stages) if earlier not in has[rank]]:
                raise ValueError(f"rank {rank} does {op} without {lacking}")
            has[rank].add(op)
        if unmade := [hop for hop in batch if hop.source == rank and hop.op not in has[rank]]:
            raise ValueError(f"rank {rank} sends {unmade[0]} before it is made")
        posted[rank].update(batch)
        if any(hop not in posted[hop.peer(rank)] for hop in batch):
            return False  # the other end is not there yet
        has[rank].update(hop.op for hop in batch)
        return True

    if stuck := take_turns(all_programs, go):
        batches = "; ".join(f"rank {rank} in {step.batch}" for rank, step in stuck)
        raise ValueError(f"deadlock: all wait for each other's batches: {batches}")


def halves(program: Program, rank: int) -> Program:
    """Each batch cut in two: what is sent first, and only then what is received."""
    steps = []
    for op, batch in program:
        sends = [hop for hop in batch if hop.source == rank]
        receives = [hop for hop in batch if hop.source != rank]
        steps.append(Step(op, sends))
        if receives:
            steps.append(Step(None, receives))
    return steps
