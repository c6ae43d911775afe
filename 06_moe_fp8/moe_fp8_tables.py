# SPDX-License-Identifier: MIT-0
"""Chapter 6's tables: published parameter counts, bytes on the network, learning rate.

Sources: Nano: Nemotron 3 Nano, 2025, arXiv 2512.20848. Super: Nemotron 3 Super, 2026, arXiv
         2604.12374. Ultra: its published configuration and its name, 550B-A55B; no report is cited.
         The latent width: the Nemotron 3 white paper, 2025, arXiv 2512.20856.

    python 06_moe_fp8/moe_fp8_tables.py        a few seconds on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
counts or measures. The exit code is 1 where figures that should agree do not.

Super's report prints 120.6B. Its configuration has 120.67B parameters; without the router matrices
and their biases it has 120.585B, and the active counts then round to the printed pair as well. That
the report leaves the routers out is our inference. So Super's rows have a note, and no verdict.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from moe_fp8 import MoEConfig, MoELayer, state_shapes

# ── 1 Parameters ────────────────────────────────────────────────────────────────────────────────
#
# Nano by hand:
#
#     an expert                        2 · 2688 · 1856                10.0 million parameters
#     128 of them, in 23 layers        23 · 128 · 10.0 million        29.4 billion of 31.6
#     6 of them, in 23 layers          23 · 6 · 10.0 million           1.4 billion of 3.6 active
#     rows on the network, at ep 8     4 · 6 · 2688 · 2 bytes · 7/8   113 thousand bytes per token
#
# A token uses all parameters but the experts that were not chosen, and one row of the embedding
# table: so active counts are published with the table and without.


@dataclass(frozen=True)
class Published:
    """A published model. Mamba layers are counted here and built in chapter 5."""

    vocab: int
    hidden: int
    pattern: str  # M Mamba, * attention, E experts
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    mamba_heads: int  # of 64; 8 groups, a state of 128, a convolution of 4 taps
    latent: int | None  # the width of the rows that are sent; None: hidden


NANO = Published(
    vocab=131_072,
    hidden=2688,
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    heads=32,
    kv_heads=2,
    head_size=128,
    experts=128,
    top_k=6,
    expert_size=1856,
    shared_size=3712,
    mamba_heads=64,
    latent=None,
)
SUPER = Published(
    vocab=131_072,
    hidden=4096,
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    heads=32,
    kv_heads=2,
    head_size=128,
    experts=512,
    top_k=22,
    expert_size=2688,
    shared_size=5376,
    mamba_heads=128,
    latent=1024,
)
ULTRA = Published(
    vocab=131_072,
    hidden=8192,
    pattern="MEM*EMEME" * 12,  # 48, 12 and 48 layers; their order here is not the real one
    heads=64,
    kv_heads=2,
    head_size=128,
    experts=512,
    top_k=22,
    expert_size=5120,
    shared_size=10_240,
    mamba_heads=256,
    latent=2048,
)
MODELS = {"Nano": NANO, "Super": SUPER, "Ultra": ULTRA}


@dataclass(frozen=True)
class Count:
    """Parameters of a model."""

    total: int
    active: int  # used by one token, the embedding table included
    active_without_table: int
    routers: int  # in total: matrices and biases


def mamba_parameters(model: Published) -> int:
    inner = 64 * model.mamba_heads
    groups = 2 * 8 * 128
    into = model.hidden * (2 * inner + groups + model.mamba_heads)
    convolution = 5 * (inner + groups)
    return into + convolution + 3 * model.mamba_heads + inner + inner * model.hidden


def parameter_count(model: Published) -> Count:
    """Total, active and router parameters. Source: the published configurations."""
    H = model.hidden
    expert = 2 * (model.latent or H) * model.expert_size
    router = model.experts * (H + 1)
    latent = 2 * H * model.latent if model.latent else 0
    sizes = {
        "M": mamba_parameters(model),
        "*": H * model.head_size * (2 * model.heads + 2 * model.kv_heads),
        "E": model.experts * expert + 2 * H * model.shared_size + router + latent,
    }
    table = model.vocab * H
    total = 2 * table + H
    for kind in model.pattern:
        total += sizes[kind] + H  # each layer has a norm
    moe_layers = model.pattern.count("E")
    active = total - moe_layers * (model.experts - model.top_k) * expert
    return Count(total, active, active - table, moe_layers * router)


def published_of(config: MoEConfig) -> Published:
    """A model of this chapter, as the formula takes it."""
    return Published(
        config.vocab_size,
        config.hidden_size,
        config.pattern,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        config.num_experts,
        config.top_k,
        config.expert_size,
        config.shared_size,
        mamba_heads=0,
        latent=config.moe_latent_size or None,
    )


def all_to_all_bytes(model: Published, ep: int, itemsize: int = 2) -> float:
    """Bytes between ranks for one token in one layer, forward and backward, with a balanced load.

    Each of its K rows goes to its expert and back, and so do the gradients: four times. One in ep
    stays on its rank. Source: ours; the white paper's argument for latent experts.
    """
    width = model.latent or model.hidden
    return 4 * model.top_k * width * itemsize * (1 - 1 / ep)


# ── 2 The schedule ──────────────────────────────────────────────────────────────────────────────


def learning_rate(
    step: int, steps: int, peak: float = 1e-3, floor: float = 1e-5, warmup: int = 10
) -> float:
    """Warm-up, constant, and over the last fifth down to `floor` by minus the square root.

    Args: step counts from 0. A peak below the floor is its own floor. Source: Nemotron 3's shape,
    8.4 billion tokens of warm-up, 20 trillion constant, 5 trillion of decay.
    """
    done = max(0.0, (step - 0.8 * steps) / max(1, 0.2 * steps))
    floor = min(floor, peak)
    return min(peak * (step + 1) / warmup, floor + (peak - floor) * (1 - math.sqrt(done)))


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


def billions(*counts: int, digits: int = 1) -> str:
    return " / ".join(f"{count / 1e9:.{digits}f}B" for count in counts)


def parameters() -> Iterator[Row]:
    nano = parameter_count(NANO)
    claim = "Nano: total / active / active without the embedding table"
    figures = billions(nano.total, nano.active, nano.active_without_table)
    yield Row(claim, "31.6B / 3.6B / 3.2B", figures)
    large = parameter_count(SUPER)
    claim = "Super: the same"
    figures = billions(large.total, large.active, large.active_without_table)
    yield Row(claim, "120.6B / 12.7B / 12.1B", figures, note="the report may leave routers out")
    less = large.routers
    counts = [x - less for x in (large.total, large.active, large.active_without_table)]
    yield Row("Super without its routers", "–", billions(*counts), note="our inference")
    ultra = parameter_count(ULTRA)
    claim = "Ultra: total / active without the embedding table"
    figures = billions(ultra.total, ultra.active_without_table, digits=0)
    yield Row(claim, "550B / 55B", figures, note="in its name, rounded; state size assumed")
    for latent, claim in {0: "this chapter's model", 24: "the same with LatentMoE"}.items():
        config = MoEConfig(head_size=5, top_k=3, shared_size=20, moe_latent_size=latent)
        counted = sum(shape.numel() for shape in state_shapes(config).values())
        formula = parameter_count(published_of(config)).total
        yield Row(claim, "–", f"{formula:,}", f"{counted:,}")


def elements_sent(config: MoEConfig) -> int:
    """Elements that this chapter's layer sends to experts for one token: those that its experts
    read, K times. Source: ours.
    """
    with torch.device("meta"):  # shapes without memory
        layer = MoELayer(config)
    return config.top_k * layer.experts.up.shape[-1]


def network() -> Iterator[Row]:
    for name, model in MODELS.items():
        claim = f"{name}: kB per token and MoE layer, ep 8, bf16"
        yield Row(claim, "–", f"{all_to_all_bytes(model, 8) / 1e3:.0f}", note="not published")
    # The white paper's pair: K, hidden size and latent width of the layer without and with one.
    pair = {"without a latent": (6, 4096, 0), "LatentMoE": (22, 4096, 1024)}
    for name, (top_k, hidden, latent) in pair.items():
        config = MoEConfig(
            hidden_size=hidden, moe_latent_size=latent, num_experts=32, top_k=top_k, expert_size=1
        )
        formula = top_k * (latent or hidden)
        claim = f"{name}: elements sent per token, {top_k} rows of {latent or hidden}"
        yield Row(claim, "–", f"{formula:,}", f"{elements_sent(config):,}")
    ratio = SUPER.top_k * SUPER.latent / (6 * 4096)
    claim = "LatentMoE: elements sent, over those without"
    yield Row(claim, "equal cost", f"{ratio:.2f}", note="K is 22, and 24 by the paper's rule")


def schedule() -> Iterator[Row]:
    steps = 25_000  # a step for each billion tokens
    rates = [learning_rate(step, steps, warmup=8) for step in (7, 19_999, 25_000)]
    here = " / ".join(f"{rate:g}" for rate in rates)
    yield Row("Nano: rate after warm-up / at 20T / at 25T tokens", "0.001 / 0.001 / 1e-05", here)


TABLES = {"Parameters": parameters, "All-to-all": network, "Learning rate": schedule}


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
