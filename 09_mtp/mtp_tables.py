# SPDX-License-Identifier: MIT-0
"""Chapter 9's tables: tokens of a pass, published acceptance, parameters, states, messages.

Sources: Expected tokens: Fast Inference from Transformers via Speculative Decoding, Leviathan et
         al., 2023, arXiv 2211.17192. Accepted lengths: Nemotron 3 Super, 2026, arXiv 2604.12374.
         Accuracy with and without: the Nemotron 3 white paper, 2025, arXiv 2512.20856. Sizes of
         Super: its published configuration.

    python 09_mtp/mtp_tables.py        a few seconds on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
counts. The exit code is 1 where figures that should agree do not.

Acceptance depends on the text. The formula assumes that each draft passes with one probability,
independently of the others; it says what an accepted length means, and predicts none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from mtp import IGNORED, HybridConfig, HybridLM, last_of_documents, roll_tensor

# ── 1 Tokens of a pass ──────────────────────────────────────────────────────────────────────────


def expected_tokens(a: float, n: int) -> float:
    """Tokens of a pass with n drafts, each of which passes with probability a.

    Source: Leviathan et al., equation 1: (1 − a^{n+1}) / (1 − a).
    """
    if a == 1:
        return n + 1
    return (1 - a ** (n + 1)) / (1 - a)


def enumerated_tokens(a: float, n: int) -> float:
    """The same, as a sum over how many drafts pass before the first that does not. Source: ours."""
    total = (n + 1) * a**n
    for passed in range(n):
        total += (passed + 1) * a**passed * (1 - a)
    return total


def acceptance_for(tokens: float, n: int) -> float:
    """The probability a with which n drafts give so many tokens a pass: bisection. Source: ours."""
    low = 0.0
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_tokens(middle, n) < tokens:
            low = middle
        else:
            high = middle
    return low


# ── 2 Parameters and states ─────────────────────────────────────────────────────────────────────
#
# Super's block is "*E": attention with 32 heads of 128 and 2 groups of keys and values, and a layer
# of 512 experts of width 2,688 in a latent space of 1,024. It is counted once, however many depths
# there are. Chapter 8's tables count the rest of the model.

HIDDEN = 4096
LATENT = 1024


def super_block(experts: int) -> int:
    """Parameters of Super's block, of which so many experts count; norms are left out."""
    combine = 2 * HIDDEN * HIDDEN
    attention = HIDDEN * 128 * (2 * 32 + 2 * 2)
    routed = experts * 2 * LATENT * 2688
    router = 512 * (HIDDEN + 1)
    shared = 2 * HIDDEN * (5376 + LATENT)
    return combine + attention + routed + router + shared


def small_block(config: HybridConfig) -> int:
    """Parameters of this chapter's block "*-", by hand."""
    D = config.hidden_size
    inner = config.attention_heads * config.attention_head_size
    norms = 5 * D  # enorm, hnorm, one of each layer, the last
    return 2 * D * D + 4 * D * inner + 2 * D * config.ffn_hidden_size + norms


def counted_block(depths: int) -> int:
    """Parameters by which `mtp_num_layers` makes a model larger."""
    sizes = []
    for count in (0, depths):
        model = HybridLM(HybridConfig(mtp_num_layers=count))
        sizes.append(sum(p.numel() for p in model.parameters()))
    return sizes[1] - sizes[0]


def super_states(drafts: int) -> int:
    """Bytes of the states that a pass keeps for one sequence, fp32: 40 Mamba layers of 128 heads,
    64 × 128 values each. Source: its configuration."""
    return (drafts + 1) * 40 * 128 * 64 * 128 * 4


def kept_states(config: HybridConfig, drafts: int) -> int:
    """The same for this chapter's trunk, in fp32, by hand."""
    layers = config.pattern.count("M")
    values = config.mamba_heads * config.mamba_head_size * config.state_size
    return (drafts + 1) * layers * values * 4


# ── 3 Targets ───────────────────────────────────────────────────────────────────────────────────


def targets_left(length: int, depth: int) -> int:
    """Targets of a depth in a document of so many tokens, whose last one has none."""
    return max(0, length - 1 - depth)


def counted_targets(lengths: list[int], depth: int) -> int:
    """In documents of these lengths, packed into one sequence."""
    indices = [torch.full((length,), i) for i, length in enumerate(lengths)]
    is_last = last_of_documents(torch.cat(indices)[None])
    targets = torch.where(is_last, IGNORED, 1)
    for _ in range(depth):
        targets = roll_tensor(targets, is_last, IGNORED)
    return int((targets != IGNORED).sum())


# Accuracy without and with multi-token prediction, of a model with 8 billion active parameters
# after a trillion tokens.
ACCURACY = {
    "MMLU": (70.06, 71.26),
    "MMLU-Pro": (45.05, 47.84),
    "MBPP": (65.58, 66.89),
    "ARC-C": (86.43, 88.05),
    "WinoGrande": (74.59, 75.45),
    "RACE": (84.02, 85.36),
    "GSM8K": (82.49, 84.46),
}


def mean_gain() -> float:
    """The mean of the relative gains."""
    gains = [after / before - 1 for before, after in ACCURACY.values()]
    return sum(gains) / len(gains)


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


def tokens_of_a_pass() -> Iterator[Row]:
    for a, n in ((0.5, 1), (0.7, 6), (0.8, 5), (0.9, 7)):
        formula = f"{expected_tokens(a, n):.2f}"
        here = f"{enumerated_tokens(a, n):.2f}"
        yield Row(f"drafts: {n}, each passes with {a}: tokens of a pass", "–", formula, here)
    exact = expected_tokens(Fraction(3, 4), 7)
    here = enumerated_tokens(Fraction(3, 4), 7)
    yield Row("in fractions: 7 drafts, 3/4", "–", str(exact), str(here))


def published() -> Iterator[Row]:
    lengths = {"Nemotron 3 Super": "3.45", "DeepSeek-R1": "2.70", "Qwen3-Next": "3.33"}
    for model, length in lengths.items():
        a = acceptance_for(float(length), 7)
        claim = f"{model}: accepted length with 7 drafts, and the acceptance it needs"
        yield Row(claim, length, f"{a:.3f}", note="by the formula")
    yield Row("mean gain in accuracy, 8B active", "2.4%", f"{mean_gain():.1%}")
    both = expected_tokens(0.97, 2)
    yield Row("97 % on the first two: tokens a pass", "–", f"{both:.2f}", note="not published")


def parameters() -> Iterator[Row]:
    total = super_block(512)
    active = super_block(22)
    figures = f"{total / 1e9:.2f}B / {active / 1e9:.3f}B"
    yield Row("Super: the block, total / active", "–", figures, note="not published")
    config = HybridConfig()
    for depths in (1, 2, 7):
        claim = f"this chapter's block, depths: {depths}, parameters"
        yield Row(claim, "–", f"{small_block(config):,}", f"{counted_block(depths):,}")


def states() -> Iterator[Row]:
    figure = f"{super_states(7) / 1e9:.2f} GB"
    yield Row("Super: states of a pass with 7 drafts, a sequence", "–", figure, note="ours")
    for drafts in (0, 5):
        formula = f"{kept_states(HybridConfig(), drafts):,}"
        claim = f"this chapter's trunk, drafts: {drafts}, bytes"
        yield Row(claim, "–", formula, note="a test counts them")


def targets() -> Iterator[Row]:
    lengths = [1, 2, 3, 10]
    for depth in range(3):
        formula = sum(targets_left(length, depth) for length in lengths)
        here = counted_targets(lengths, depth)
        claim = f"documents of 1, 2, 3 and 10 tokens: targets of depth {depth}"
        yield Row(claim, "–", str(formula), str(here))


TABLES = {
    "Tokens of a pass": tokens_of_a_pass,
    "Published": published,
    "Parameters": parameters,
    "States": states,
    "Targets": targets,
}


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
    torch.set_num_threads(1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    good = [print_table(title, list(rows())) for title, rows in TABLES.items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
