# SPDX-License-Identifier: MIT-0
"""Chapter 10's tables: shapes and parameters of the compressed models, budgets, layers removed.

Sources: 12B to 9B: Nemotron Nano 2, 2025, arXiv 2508.14444. 56B to 47B: Nemotron-H, 2025, arXiv
         2504.03624. 8B to 4B: Group-Aware SSM Pruning, 2025, arXiv 2504.11409. Patterns and sizes:
         the published configurations.

    python 10_compress/compress_tables.py        a few seconds on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
counts. The exit code is 1 where figures that should agree do not.

Nothing here says how well a compressed model answers: that took 63 to 136 billion tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from compress import (
    WIDTHS,
    HybridConfig,
    HybridLM,
    best_in_groups,
    parameter_shapes,
    slice_state_dict,
)

GIB = 2**30

# ── 1 The models ────────────────────────────────────────────────────────────────────────────────

PATTERN_8B = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
PATTERN_47B += "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_12B = "M-M-M-M*-" + 5 * "M-M-M-M*-" + "M-M-M-M-"
PATTERN_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


def published(
    pattern: str, hidden: int, ffn: int, queries: int, heads: int, head_dim: int, state: int = 128
) -> HybridConfig:
    """A published model: 8 groups of either kind, attention heads of 128, 131,072 entries."""
    return HybridConfig(
        vocab_size=131_072,
        hidden_size=hidden,
        pattern=pattern,
        ffn_hidden_size=ffn,
        num_attention_heads=queries,
        num_query_groups=8,
        attention_head_dim=128,
        mamba_num_heads=heads,
        mamba_head_dim=head_dim,
        mamba_num_groups=8,
        mamba_state_dim=state,
    )


MODELS = {
    "Nano-12B-v2": published(PATTERN_12B, 5120, 20_480, 40, 128, 80),
    "Nano-9B-v2": published(PATTERN_9B, 4480, 15_680, 40, 128, 80),
    "Nemotron-H-56B": published(PATTERN_56B, 8192, 32_768, 64, 256, 64, 256),
    "Nemotron-H-47B": published(PATTERN_47B, 8192, 30_720, 64, 256, 64, 256),
    "Nemotron-H-8B": published(PATTERN_8B, 4096, 21_504, 32, 128, 64),
    "Nemotron-H-4B": published(PATTERN_8B, 3072, 12_288, 32, 112, 64),
}


def parameters(config: HybridConfig) -> int:
    """Parameters of a hybrid, by a formula for each kind of layer. Source: ours."""
    D = config.hidden_size
    H = config.mamba_num_heads
    inner = H * config.mamba_head_dim
    channels = inner + 2 * config.mamba_num_groups * config.mamba_state_dim
    mamba = D * (inner + channels + H) + channels * (config.conv_kernel + 1)
    mamba += 3 * H + inner + inner * D
    heads = config.num_attention_heads + config.num_query_groups
    attention = 2 * D * config.attention_head_dim * heads
    kinds = {"M": mamba, "*": attention, "-": 2 * D * config.ffn_hidden_size}
    layers = sum(kinds[letter] + D for letter in config.pattern)
    return layers + 2 * config.vocab_size * D + D


def counted(config: HybridConfig) -> int:
    """The same from the chapter's table of axes."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def sliced_shapes(large: HybridConfig, small: HybridConfig) -> dict[str, torch.Size]:
    """Shapes of every tensor after the layers and units that `small` lacks are cut out of `large`,
    by the chapter's slices, on tensors without memory."""
    kept = {axis: torch.arange(getattr(small, axis)) for axis in WIDTHS}
    score_H = torch.arange(large.mamba_num_heads)
    kept["mamba_num_heads"] = best_in_groups(score_H, large.mamba_num_groups, small.mamba_num_heads)
    shorter = replace(large, pattern=small.pattern)
    weights = {}
    for name, shape in parameter_shapes(shorter).items():
        weights[name] = torch.empty(shape, device="meta")
    sliced = slice_state_dict(weights, shorter, kept)
    return {name: x.shape for name, x in sliced.items()}


def gibibytes(
    config: HybridConfig, tokens: int, weight_bytes: float, cache_bytes: float
) -> tuple[float, float]:
    """GiB of weights, and of keys and values at `tokens` tokens. (States: search.py.)"""
    weights = counted(config) * weight_bytes
    elements = 2 * config.num_query_groups * config.attention_head_dim * tokens
    cache = config.pattern.count("*") * elements * cache_bytes
    return weights / GIB, cache / GIB


def removed(large: HybridConfig, small: HybridConfig) -> str:
    """Layers of each kind that are gone: Mamba / attention / feed-forward."""
    gone = [large.pattern.count(kind) - small.pattern.count(kind) for kind in "M*-"]
    return " / ".join(map(str, gone))


# ── 2 Permutations of heads ─────────────────────────────────────────────────────────────────────


def moved_by_exchange(other: int) -> float:
    """‖Δ logits‖ / ‖logits‖ where head 0 of a Mamba layer with 8 heads in 2 groups changes places
    with another one; float64. Source: arXiv 2504.11409, section 3."""
    config = HybridConfig(61, 16, "M", mamba_head_dim=4, mamba_state_dim=4, init_std=0.2)
    model = HybridLM(config).double()
    order = torch.arange(8)
    order[0] = other
    order[other] = 0
    weights = slice_state_dict(model.state_dict(), config, {"mamba_num_heads": order})
    tokens_BT = torch.arange(60).view(4, 15)
    with torch.no_grad():
        right_BTV = model(tokens_BT)
        gap_BTV = HybridLM(config, weights=weights)(tokens_BT) - right_BTV
    return (gap_BTV.norm() / right_BTV.norm()).item()


# ── 3 The tables ────────────────────────────────────────────────────────────────────────────────


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


def sizes() -> Iterator[Row]:
    printed = {"Nano-12B-v2": "12.31B", "Nano-9B-v2": "8.89B", "Nemotron-H-56B": "56B"}
    printed |= {"Nemotron-H-47B": "47B", "Nemotron-H-8B": "8.1B", "Nemotron-H-4B": "4B"}
    notes = {"Nemotron-H-4B": "a name: 0.81B of it are embeddings"}
    for name, figure in printed.items():
        digits = len(figure.partition(".")[2].rstrip("B"))
        config = MODELS[name]
        figures = [f"{n / 1e9:.{digits}f}B" for n in (parameters(config), counted(config))]
        if name in notes:
            figures = [f"{n / 1e9:.2f}B" for n in (parameters(config), counted(config))]
        yield Row(f"parameters of {name}", figure, *figures, notes.get(name, ""))
    large, small = (MODELS[f"Nano-{size}-v2"] for size in ("12B", "9B"))
    formula = 1 - parameters(small) / parameters(large)
    here = 1 - counted(small) / counted(large)
    yield Row("removed, 12B to 9B", "–", f"{formula:.0%}", f"{here:.0%}")


def shapes() -> Iterator[Row]:
    pairs = {"Nano-12B-v2": "Nano-9B-v2", "Nemotron-H-56B": "Nemotron-H-47B"}
    pairs["Nemotron-H-8B"] = "Nemotron-H-4B"
    for name, other in pairs.items():
        large = MODELS[name]
        small = MODELS[other]
        cuts = []
        for axis, text in (("hidden_size", "hidden"), ("ffn_hidden_size", "features")):
            cuts.append(f"{text} {getattr(large, axis):,} to {getattr(small, axis):,}")
        cuts.append(f"Mamba heads {large.mamba_num_heads} to {small.mamba_num_heads}")
        fits = sliced_shapes(large, small) == parameter_shapes(small)
        here = f"{other}'s" if fits else "others"
        yield Row(f"shapes of {name}, {', '.join(cuts)}", f"{other}'s", here=here)


def depth() -> Iterator[Row]:
    pairs = {"Nano-12B-v2": ("Nano-9B-v2", "62 to 56", "1 / 2 / 3")}
    pairs["Nemotron-H-56B"] = ("Nemotron-H-47B", "118 to 98", "9 / 5 / 6")
    pairs["Nemotron-H-8B"] = ("Nemotron-H-4B", "52 to 52", "0 / 0 / 0")
    for name, (small, layers, gone) in pairs.items():
        found = f"{len(MODELS[name].pattern)} to {len(MODELS[small].pattern)}"
        yield Row(f"layers, {name} to {small}", layers, here=found)
        claim = f"removed, {name}: Mamba / attention / feed-forward"
        yield Row(claim, gone, here=removed(MODELS[name], MODELS[small]))


def budgets() -> Iterator[Row]:
    claim = "Nano 2's budget: 95 % of 22.06 GiB, less 1.3 for a vision encoder"
    yield Row(claim, "19.66 GiB", f"{22.06 * 0.95 - 1.3:.2f} GiB")
    for name, verdict in (("Nano-9B-v2", "fits"), ("Nano-12B-v2", "does not fit")):
        weights, cache = gibibytes(MODELS[name], 131_072, 2, 2)
        fits = "fits" if weights + cache < 19.66 else "does not fit"
        claim = f"{name} at 128k, bf16: {weights:.2f} + {cache:.2f} GiB without states"
        yield Row(claim, verdict, here=fits)
    for name, paper in (("Nemotron-H-47B", "under 31.7 GiB"), ("Nemotron-H-56B", "over")):
        weights, cache = gibibytes(MODELS[name], 1_000_000, 0.5, 1)
        claim = f"{name}: weights + cache at 1M tokens"
        here = f"{weights:.2f} + {cache:.2f} = {weights + cache:.1f} GiB"
        yield Row(claim, paper, here, note="inferred: 4-bit weights, 8-bit cache")
    steps = [24_576 + 1024 * i for i in range(9)]
    found = "6" if steps[6] == MODELS["Nemotron-H-47B"].ffn_hidden_size else "not in the grid"
    yield Row("47B's features: steps of 1,024 above 24,576", "6", here=found)


def tokens() -> Iterator[Row]:
    yield Row(
        "47B: tokens of distillation, of the 20T of 56B",
        "63B",
        f"{63 / 20_000:.1%}",
        note="a share",
    )
    nano = 60 + 50 + 25 + 1
    yield Row(
        "9B: depth and width, of the 20T of 12B", f"{nano}B", f"{nano / 20_000:.1%}", note="a share"
    )


def symmetry() -> Iterator[Row]:
    inside = moved_by_exchange(1)
    here = "0" if inside < 1e-12 else f"{inside:.0e}"
    yield Row("two heads of a group change places: change of the logits", "0", "0", here)
    across = moved_by_exchange(4)
    here = "not 0" if across > 1e-3 else f"{across:.0e}"
    yield Row("two heads of two groups change places", "not 0", here=here)


TABLES = {
    "Parameters": sizes,
    "Widths": shapes,
    "Depth": depth,
    "Budgets": budgets,
    "Tokens": tokens,
    "Heads and groups": symmetry,
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
