# SPDX-License-Identifier: MIT-0
"""Chapter 3's timelines: a schedule as text, and one more schedule, which splits backward in two.

    python 03_pipeline/timeline.py                              the four schedules, 4 ranks
    python 03_pipeline/timeline.py 1f1b zb-h1 --pp 3 --microbatches 6

ZB-H1 (Zero Bubble Pipeline Parallelism, Qi et al., arXiv 2401.10241, section 2) is planned and
timed here, not executed: a backward in two parts needs the weights' GEMMs apart from the inputs',
and autograd computes them together.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from fractions import Fraction

from pipeline import Op, Schedule, Timeline, runs_ahead, schedule, simulate, stages_of

# ── 1 ZB-H1 ─────────────────────────────────────────────────────────────────────────────────────
#
# Backward is two GEMMs per matrix: B, the gradient of the input, for which the previous stage
# waits, and W, the gradient of the weight, for which no rank waits. ZB-H1 is 1F1B with a third
# stream, W, `rank` places to the right of the second. It fills the bubble. On rank 2 of 4:
#
#     forwards      F0  │  F1   F2   F3   F4   F5   F6   F7  │
#     backwards         │  B0   B1   B2   B3   B4   B5   B6  │  B7
#     weights           │            W0   W1   W2   W3   W4  │  W5   W6   W7
#
# Only B is on the way from rank to rank, so the bubble is (p − 1)(F + B − W). An activation is kept
# until its W, so every rank holds p of them.


def zb_h1(p: int, m: int) -> Schedule:
    """The table of ZB-H1, with operations F, B and W. Source: ZB-H1's section 2."""
    table = []
    for rank in range(p):
        ahead = [None] * runs_ahead("1f1b", p, m, 1, rank)
        forwards = [Op("F", i, rank) for i in range(m)]
        backwards = [Op("B", i, rank) for i in range(m)]
        weights = [Op("W", i, rank) for i in range(m)]
        columns = itertools.zip_longest(
            forwards, ahead + backwards, ahead + [None] * rank + weights
        )
        table.append([op for op in itertools.chain(*columns) if op is not None])
    return table


def most_held(ops: list[Op]) -> int:
    """The most activations at once: F adds one, the last operation that needs it removes it."""
    last = "W" if any(op.kind == "W" for op in ops) else "B"
    changes = [(op.kind == "F") - (op.kind == last) for op in ops]
    return max(itertools.accumulate(changes))


def timed(table: Schedule) -> Timeline:
    """A schedule's timeline where forward takes 1 and backward 2; a chunk takes 1/v of it."""
    whole = {"F": 1, "B": 2}
    if any(op.kind == "W" for op in table[0]):
        whole = {"F": 1, "B": 1, "W": 1}
    v = stages_of(table) // len(table)
    return simulate(table, {kind: Fraction(time, v) for kind, time in whole.items()})


# ── 2 Drawing ───────────────────────────────────────────────────────────────────────────────────

STROKE = {"F": "─", "B": "═", "W": "┄"}


def draw(timeline: Timeline, width: int = 84) -> str:
    """A timeline as text, a line per rank: a micro-batch's index, then ─ for F, ═ for B, ┄ for W.

    Where ranks have several chunks, a letter names the chunk. A label that does not fit is cut.
    Source: ours, after the paper's figures 3 and 4.
    """
    bars = list(itertools.chain(*timeline.ranks))
    first = min(bar.start for bar in bars)
    scale = width / float(timeline.length)
    p = len(timeline.ranks)
    several = any(bar.op.stage >= p for bar in bars)
    lines = []
    for rank, own in enumerate(timeline.ranks):
        line = [" "] * width
        for op, start, end in own:
            begin = round(float(start - first) * scale)
            stop = round(float(end - first) * scale)
            letter = "abcdefghij"[op.stage // p % 10] if several else ""
            label = f"{op.microbatch}{letter}".ljust(stop - begin, STROKE[op.kind])
            line[begin:stop] = label[: stop - begin]
        lines.append(f"rank {rank:<2} {''.join(line).rstrip()}")
    return "\n".join(lines)


# ── 3 The command ───────────────────────────────────────────────────────────────────────────────


def tables(kinds: list[str], p: int, m: int, v: int) -> dict[str, Schedule]:
    """Name to table. Raises: ValueError for what cannot be scheduled."""
    found = {}
    for kind in kinds:
        if kind == "zb-h1":
            found[kind] = zb_h1(p, m)
        else:
            chunks = v if kind == "interleaved" else 1
            found[kind] = schedule(kind, p, m, chunks)
    return found


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    every = ["gpipe", "1f1b", "interleaved", "zb-h1"]
    parser = argparse.ArgumentParser(
        description="Draws schedules, with their bubbles and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("schedules", nargs="*", default=every, help=f"of {', '.join(every)}")
    parser.add_argument("--pp", type=int, default=4, help="ranks, p")
    parser.add_argument("--microbatches", type=int, default=8, help="m")
    parser.add_argument("--chunks", type=int, default=2, help="v, of interleaved")
    parser.add_argument("--width", type=int, default=84, help="columns")
    args = parser.parse_args()
    try:
        found = tables(args.schedules, args.pp, args.microbatches, args.chunks)
    except ValueError as error:
        parser.error(str(error))
    try:
        for kind, table in found.items():
            timeline = timed(table)
            held = ", ".join(str(most_held(ops)) for ops in table)
            print(f"{kind}: bubble {timeline.bubble}, activations held {held}")
            print(f"{draw(timeline, args.width)}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
