# SPDX-License-Identifier: MIT-0
"""Chapter 3's tables: what the PTD-P paper printed, its formulas, and this chapter's own code.

Paper: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
       Narayanan et al., 2021, arXiv 2104.04473

    python 03_pipeline/pipeline_tables.py        5 s on two CPU cores

Column "paper" has the printed figure, "formula" a computed one. "here" comes from this chapter's
code: a schedule that `simulate` has played, or the plain model's parameters, counted without
memory. The exit code is 1 where figures that should agree do not.

Left out: what needs GPUs. plan.py chooses the layouts of table 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from pipeline import GPTConfig, parameter_shapes, runs_ahead, schedule, simulate, verify

# ── 1 Bubbles and memory ────────────────────────────────────────────────────────────────────────
#
# The last rank can start when p − 1 others have done a forward, and the first can end when p − 1
# others have done a backward after it. So every rank idles for p − 1 of each, and does m of each.
# A chunk has 1/v of a rank's layers, so it is passed on v times sooner.
#
# A rank holds the activations of each micro-batch that has done its forward and not its backward:
# those that ran ahead, and the one in work.


def bubble(p: int, m: int, v: int = 1) -> Fraction:
    """Time lost over ideal time, of each schedule. Source: the paper's section 2.2."""
    return Fraction(p - 1, m * v)


def in_flight(kind: str, p: int, m: int, v: int = 1, rank: int = 0) -> int:
    """The most activations that `rank` holds at once, each of one chunk (1/v of its layers).

    1f1b: p on the first rank, 1 on the last. interleaved: p·v + p − 1 on the first rank, so
    1 + (p − 1)/(p·v) times 1f1b's memory. Source: the paper's section 2.2.
    """
    return min(runs_ahead(kind, p, m, v, rank) + 1, m * v)


# ── 2 Parameters, operations, days ──────────────────────────────────────────────────────────────
#
# A layer's four matrices have 12·H² weights: 3 in qkv, 1 in out, 4 in up, 4 in down. Its biases and
# LayerNorms have 13·H. The embedding tables have V·H and S·H.
#
# A GEMM of (a × b) and (b × c) takes 2abc operations. So forward takes 2·12·B·S·H² in a layer's
# matrices and 4·B·S²·H in attention: each of S tokens meets S others, once for the scores and once
# for the values. Backward takes twice as many, and recomputation repeats the forward. The output
# layer takes 2·B·S·H·V, three times with backward: it is not recomputed.
#
# The rule 8·T·P/(n·X) (T tokens, P parameters, n GPUs of X FLOP/s) takes 2 operations per weight
# and token, times 1 forward, 1 recomputed and 2 backward. It drops attention and the output layer.
# The paper's 34 and 84 days are the rule's. Its table 2 comes from the exact count.


def parameter_count(layers: int, hidden: int, vocab: int = 51_200, seq: int = 2048) -> int:
    """Parameters of a GPT with a tied output layer, without the final LayerNorm's 2H.

    Source: the paper's section 5.1.
    """
    return layers * (12 * hidden**2 + 13 * hidden) + (vocab + seq) * hidden


def flops(
    layers: int,
    hidden: int,
    batch: int,
    vocab: int = 51_200,
    seq: int = 2048,
    recompute: bool = True,
) -> int:
    """Floating-point operations of a step of `batch` sequences. Source: the paper's section 5.1."""
    per_layer = 24 * batch * seq * hidden**2 + 4 * batch * seq**2 * hidden
    passes = 4 if recompute else 3
    return passes * layers * per_layer + 6 * batch * seq * hidden * vocab


SECONDS_PER_DAY = 86_400


def training_days(
    tokens: float, gpus: int, flops_per_gpu: float, layers: int, hidden: int
) -> float:
    """Days to train on `tokens`, from the exact count, recomputation included.

    Source: the paper's section 5.1.
    """
    per_token = flops(layers, hidden, 1) / 2048
    return per_token * tokens / (gpus * flops_per_gpu) / SECONDS_PER_DAY


def training_days_rule(tokens: float, gpus: int, flops_per_gpu: float, parameters: float) -> float:
    """Days to train on `tokens` by the rule 8·T·P/(n·X). Source: the paper's section 5.1."""
    return 8 * tokens * parameters / (gpus * flops_per_gpu) / SECONDS_PER_DAY


# ── 3 What the paper printed ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Published:
    """A row of table 1. All have 2,048 tokens per sequence and a vocabulary of 51,200."""

    billions: float  # of parameters
    heads: int
    hidden: int
    layers: int
    tp: int  # t
    pp: int  # p
    gpus: int
    batch: int  # sequences
    b: int  # sequences of a micro-batch; this and v are from the published scripts
    v: int  # chunks
    tflops: int  # per GPU
    percent: int  # of an A100's 312 TFLOP/s
    petaflops: float  # of all GPUs


TABLE_1 = [
    Published(1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137, 44, 4.4),
    Published(3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138, 44, 8.8),
    Published(7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142, 46, 18.2),
    Published(18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135, 43, 34.6),
    Published(39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138, 44, 70.8),
    Published(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140, 45, 143.8),
    Published(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148, 47, 227.1),
    Published(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155, 50, 297.4),
    Published(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163, 52, 410.2),
    Published(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163, 52, 502.0),
]


@dataclass(frozen=True)
class Training:
    """A figure of table 2: days for 300 billion tokens."""

    scheme: str
    layers: int
    hidden: int
    gpus: int
    tflops: int  # per GPU
    days: int


TABLE_2 = [
    Training("ZeRO-3, 175B", 96, 12288, 384, 144, 90),
    Training("ZeRO-3, 175B", 96, 12288, 768, 88, 74),
    Training("ZeRO-3, 175B", 96, 12288, 1536, 44, 74),
    Training("ZeRO-3, 530B", 105, 20480, 640, 138, 169),
    Training("ZeRO-3, 530B", 105, 20480, 1120, 98, 137),
    Training("ZeRO-3, 530B", 105, 20480, 2240, 48, 140),
    Training("PTD-P, 175B", 96, 12288, 384, 153, 84),
    Training("PTD-P, 175B", 96, 12288, 768, 149, 43),
    Training("PTD-P, 175B", 96, 12288, 1536, 141, 23),
    Training("PTD-P, 530B", 105, 20480, 560, 171, 156),
    Training("PTD-P, 530B", 105, 20480, 1120, 167, 80),
    Training("PTD-P, 530B", 105, 20480, 2240, 159, 42),
]

# ── 4 The tables ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A claim and the figures that should agree; "–" where there is none.

    note: why figures disagree, or what a comparison needs. A note on figures that agree is a
    failure, and so are figures that disagree without a note.
    """

    claim: str
    paper: str
    formula: str = "–"
    here: str = "–"
    note: str = ""

    @property
    def verdict(self) -> str:
        figures = [x for x in (self.paper, self.formula, self.here) if x != "–"]
        agree = len(figures) > 1 and len(set(figures)) == 1
        if agree:
            return "FAILED" if self.note else "ok"
        return self.note or "FAILED"


def listed(values: list[int]) -> str:
    return " / ".join(map(str, values))


def schedules() -> Iterator[Row]:
    """The paper gives a formula for bubbles, and for memory m and p."""
    shapes = [("gpipe", 1, "3/8"), ("1f1b", 1, "3/8"), ("interleaved", 2, "3/16")]
    for kind, v, printed in shapes:
        table = schedule(kind, 4, 8, v)
        name = f"{kind}, p = 4, m = 8, v = {v}"
        here = str(simulate(table).bubble)
        yield Row(f"bubble of {name}", printed, str(bubble(4, 8, v)), here)
        held = [in_flight(kind, 4, 8, v, rank) for rank in range(4)]
        yield Row("activations held, rank by rank", "–", listed(held), listed(verify(table)))
    table = schedule("1f1b", 64, 512)
    here = str(simulate(table).bubble)
    yield Row(
        "bubble of the 1T model's step, p = 64, m = 512", "63/512", str(bubble(64, 512)), here
    )


def table_1() -> Iterator[Row]:
    for model in TABLE_1:
        config = GPTConfig(51_200, model.layers, model.hidden, model.heads, seq_length=2048)
        shapes = parameter_shapes(config).values()
        counted = sum(shape.numel() for shape in shapes) - 2 * model.hidden  # the final LayerNorm
        formula = parameter_count(model.layers, model.hidden)
        claim = f"parameters, {model.layers} layers, H = {model.hidden}"
        printed = f"{model.billions}B"
        yield Row(claim, printed, f"{formula / 1e9:.1f}B", f"{counted / 1e9:.1f}B")
    divide = [model.gpus % (model.tp * model.pp) == 0 for model in TABLE_1]
    yield Row("rows in which t·p divides the GPUs", "10", str(sum(divide)))


def days() -> Iterator[Row]:
    """Table 2's days come from TFLOP/s that were rounded: within that rounding, they agree."""
    rule = f"{training_days_rule(300e9, 1024, 140e12, 175e9):.0f}"
    yield Row("days for 175B, 300 billion tokens, 1,024 GPUs", "34", rule)
    rule = f"{training_days_rule(450e9, 3072, 163e12, 1008e9):.0f}"
    yield Row("days for 1T, 450 billion tokens, 3,072 GPUs", "84", rule)
    for row in TABLE_2:
        fewest = training_days(300e9, row.gpus, (row.tflops + 0.5) * 1e12, row.layers, row.hidden)
        most = training_days(300e9, row.gpus, (row.tflops - 0.5) * 1e12, row.layers, row.hidden)
        nearest = min(max(row.days, round(fewest)), round(most))
        yield Row(f"days, {row.scheme} on {row.gpus} GPUs", str(row.days), str(nearest))


def speed() -> Iterator[Row]:
    yield Row("throughput gained by interleaving", "up to 10 %", note="needs a GPU per rank")
    yield Row("throughput gained by scatter/gather", "up to 11 %", note="needs 12 servers")


def tables() -> dict[str, list[Row]]:
    """Title to rows."""
    return {
        "Section 2.2: bubbles and activations": list(schedules()),
        "Table 1: models": list(table_1()),
        "Section 5.1 and table 2: days of training": list(days()),
        "Sections 5.3 and 5.7: speed": list(speed()),
    }


def print_table(title: str, rows: list[Row]) -> bool:
    """Prints a table. Returns: False where a verdict is FAILED."""
    cells = [("claim", "paper", "formula", "here", "verdict")]
    for row in rows:
        cells.append((row.claim, row.paper, row.formula, row.here, row.verdict))
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    print(f"{title}\n")
    for line in cells:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    return all(row.verdict != "FAILED" for row in rows)


def flags() -> argparse.Namespace:
    """There are none but --help; any other is refused."""
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    good = [print_table(title, rows) for title, rows in tables().items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    flags()
    main()
