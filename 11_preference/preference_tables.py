# SPDX-License-Identifier: MIT-0
"""Chapter 11's tables: parameters, MFU and days of Nemotron-4 15B and 340B, memory, loss limits.

Sources: Nemotron-4 15B Technical Report, 2024, arXiv 2402.16819; Nemotron-4 340B Technical Report,
         2024, arXiv 2406.11704, with its published configuration (head size 192).

    python 11_preference/preference_tables.py        a second on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
counts or measures. The exit code is 1 where figures that should agree do not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from preference import GPT, GPTConfig, dpo_loss, rpo_loss

# ── 1 Parameters ────────────────────────────────────────────────────────────────────────────────


def published(layers: int, hidden: int, heads: int) -> GPTConfig:
    """A published model: 8 groups, a vocabulary of 256,000."""
    sizes = dict(num_layers=layers, hidden_size=hidden, num_heads=heads, num_query_groups=8)
    return GPTConfig(vocab_size=256_000, **sizes)


NEMOTRON_15B = published(32, 6144, 48)
NEMOTRON_340B = published(96, 18_432, 96)
SEQUENCE = 4096


def embedding_parameters(config: GPTConfig) -> int:
    """Two tables, untied. Source: Nemotron-4 15B, table 1."""
    return 2 * config.vocab_size * config.hidden_size


def other_parameters(config: GPTConfig) -> int:
    """Attention, feed-forward layers and LayerNorm with weight and bias; no biases elsewhere."""
    H = config.hidden_size
    key_values = 2 * config.num_query_groups * config.head_size
    attention = 2 * H * H + H * key_values
    layer = attention + 2 * H * config.ffn_hidden_size + 4 * H
    return config.num_layers * layer + 2 * H


def counted(config: GPTConfig) -> tuple[int, int]:
    """Embedding and other parameters of this chapter's model, without memory."""
    with torch.device("meta"):
        model = GPT(config)
    tables = sum(p.numel() for p in (model.embedding.weight, model.output.weight))
    return tables, sum(p.numel() for p in model.parameters()) - tables


# ── 2 Speed ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stage:
    """A stage of pretraining on H100 GPUs; the batch counts sequences of 4,096 tokens."""

    gpus: int
    batch: int
    tokens: float
    seconds: float  # per iteration
    mfu: str  # as printed
    days: str


STAGES = {
    "15B": (
        NEMOTRON_15B,
        Stage(768, 384, 200e9, 0.57, "34.3", "0.8"),
        Stage(1536, 768, 200e9, 0.58, "33.3", "0.4"),
        Stage(2304, 1152, 7600e9, 0.64, "30.5", "11.9"),
    ),
    "340B": (
        NEMOTRON_340B,
        Stage(1536, 768, 200e9, 10.3, "42.4", "–"),
        Stage(3072, 1536, 200e9, 10.3, "42.3", "–"),
        Stage(6144, 2304, 7600e9, 8.0, "41.0", "–"),
    ),
}
PEAK = 989e12  # bf16, of an H100


def mfu(config: GPTConfig, stage: Stage) -> float:
    """Per cent: 6 operations per parameter but the input table's; attention without its mask."""
    parameters = other_parameters(config) + embedding_parameters(config) // 2
    attention = 12 * config.num_layers * config.hidden_size * SEQUENCE
    tokens = stage.batch * SEQUENCE
    return 100 * tokens * (6 * parameters + attention) / (stage.seconds * stage.gpus * PEAK)


def days(stage: Stage) -> float:
    """The tokens of a stage, in days. Source: Nemotron-4 15B, table 2."""
    return stage.tokens / (stage.batch * SEQUENCE) * stage.seconds / 86_400


# ── 3 Memory ────────────────────────────────────────────────────────────────────────────────────


def cache_bytes(config: GPTConfig, value_bytes: int = 2) -> int:
    """Keys and values of one token in all layers. Source: ours."""
    elements = 2 * config.num_query_groups * config.head_size
    return config.num_layers * elements * value_bytes


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


def billions(count: float) -> str:
    return f"{count / 1e9:.1f}B"


def parameters() -> Iterator[Row]:
    papers = {"15B": ("12.5B", "3.2B"), "340B": ("331.6B", "9.4B")}
    for name, (others, tables) in papers.items():
        config = STAGES[name][0]
        here = counted(config)
        formula = billions(other_parameters(config))
        yield Row(f"{name}: without tables", others, formula, billions(here[1]))
        formula = billions(embedding_parameters(config))
        note = "" if name == "340B" else "256,000 rows make 3.1B; the paper gives no other figure"
        yield Row(f"{name}: two tables", tables, formula, billions(here[0]), note)


def speed() -> Iterator[Row]:
    for name, (config, *stages) in STAGES.items():
        for stage in stages:
            found = f"{mfu(config, stage):.1f}"
            note = "" if found == stage.mfu else "seconds have two digits"
            claim = f"{name} on {stage.gpus} GPUs: MFU in per cent"
            yield Row(claim, stage.mfu, found, note=note)
            note = "not published" if stage.days == "–" else ""
            claim = f"{name} on {stage.gpus} GPUs: days"
            yield Row(claim, stage.days, f"{days(stage):.1f}", note=note)
    total = sum(days(stage) for stage in STAGES["340B"][1:])
    yield Row("340B: days for 8T tokens", "–", f"{total:.0f}", note="not published")


def memory() -> Iterator[Row]:
    for name in STAGES:
        found = f"{cache_bytes(STAGES[name][0]) / 1024:.0f} KiB"
        yield Row(f"{name}: keys and values of a token, bf16", "–", found, note="not published")
    total = other_parameters(NEMOTRON_340B) + embedding_parameters(NEMOTRON_340B)
    found = f"{total / 2**30:.1f} GiB"
    note = "the report says that FP8 fits on 8 H100s"
    yield Row("340B: FP8 weights, of 596 GiB on 8 × 80 GB", "–", found, note=note)
    found = f"{2 * total / 2**30:.1f} GiB"
    yield Row("340B: bf16 weights, of 596 GiB", "–", found, note="they do not fit")


def losses() -> Iterator[Row]:
    zero = torch.zeros(1, dtype=torch.float64)
    start = dpo_loss(zero).item()
    yield Row("DPO: first loss", "log 2", f"{math.log(2):.6f}", f"{start:.6f}", "0.693147")
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    gap = torch.full_like(h, 30.0)
    distant = (rpo_loss(h, gap, 1.0) / dpo_loss(h, 1.0) - 1).abs().max().item()
    here = "0" if distant < 1e-9 else f"{distant:.0e}"
    yield Row("RPO with g = 30 over DPO, minus 1", "–", "0", here)
    for distance, slope in (("backward_kl", -0.231), ("forward_kl", -0.25), ("squared", -2.0)):
        leaf = zero.clone().requires_grad_()
        rpo_loss(leaf, torch.ones_like(zero), 1.0, 1.0, distance).backward()
        claim = f"RPO, {distance}: slope at h = 0 for g = 1"
        yield Row(claim, "–", f"{slope:.3f}", f"{leaf.grad.item():.3f}")


TABLES = {"Parameters": parameters, "Speed": speed, "Memory": memory, "Losses": losses}


def print_table(title: str, rows: list[Row]) -> bool:
    """Prints a table; returns whether no row failed."""
    print(f"{title}\n")
    cells = [["claim", "paper", "formula", "here", "verdict"]]
    cells += [[row.claim, row.paper, row.formula, row.here, row.verdict] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    for line in cells:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    return all(row.verdict != "FAILED" for row in rows)


def flags() -> argparse.Namespace:
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    flags()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    good = [print_table(title, list(rows())) for title, rows in TABLES.items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
