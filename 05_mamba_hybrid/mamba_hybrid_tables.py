# SPDX-License-Identifier: MIT-0
"""Chapter 5's tables: the papers' models, and what decoding keeps of a sequence.

Papers: An Empirical Study of Mamba-based Language Models, Waleffe et al., 2024, arXiv 2406.07887
        Nemotron-H, NVIDIA, 2025, arXiv 2504.03624;  Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444

    python 05_mamba_hybrid/mamba_hybrid_tables.py        a few seconds

Column "paper" has the printed figure (or the published configuration's), "formula" a computed one,
and "here" is counted: parameters of `HybridLM` on tensors without memory. The exit code is 1 where
figures that should agree do not.

Left out: what needs GPUs (throughput) or weeks of training (accuracy).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from mamba_hybrid import HybridConfig, parameter_shapes

# ── 1 Which layer is which ──────────────────────────────────────────────────────────────────────
#
# The study gives two fractions, of attention and of feed-forward layers, and spreads them evenly.
# First attention: the other layers between fall into equal sections. The walk begins with a
# section's length as credit. Each other layer costs 1. Where less than half a layer of credit is
# left, an attention layer is placed and a section's length is added. Then the feed-forward layers,
# in the same way, over what is left. Two attention layers of ten leave three sections of 8/3:
#
#     credit   2.7  1.7  0.7  −0.3  2.3  1.3  0.3  3.0  2.0  1.0
#     layer     M    M    M    *     M    M    *    M    M    M


def allocate_layers(n: int, attention_ratio: float, mlp_ratio: float) -> str:
    """The pattern of n layers with these fractions of attention and feed-forward layers.

    Raises: ValueError where they do not fit. Source: the study; Megatron-LM's rule.
    """
    attention = round(n * attention_ratio)
    mlp = round(n * mlp_ratio)
    if min(attention, mlp) < 0 or attention + mlp > n:
        raise ValueError(f"{attention} attention and {mlp} feed-forward layers do not fit into {n}")
    layers = ["M"] * n
    for letter, count, sections in (("*", attention, attention + 1), ("-", mlp, mlp)):
        if not count:
            continue
        section = (layers.count("M") - count) / sections
        credit = section
        for i, kind in enumerate(layers):
            if kind != "M":
                continue
            if credit < 0.5:
                layers[i] = letter
                credit += section
            else:
                credit -= 1
    return "".join(layers)


# ── 2 Parameters and memory ─────────────────────────────────────────────────────────────────────
#
# A Mamba layer, with I = H·P: in_proj D·(2·I + 2·G·N + H); the convolution, K weights and a bias
# for each of I + 2·G·N channels; three scalars per head; the norm I; out_proj I·D. Attention has
# matrices for queries and outputs, and smaller ones for keys and values; a feed-forward layer has
# two. Each layer has a norm of D, and embedding and output layer are not tied.
#
# Decoding keeps I·N elements of state and K inputs of each channel per Mamba layer, for any length;
# and 2·G·P per token and attention layer.


def parameters(config: HybridConfig) -> int:
    """Parameters of a `HybridLM`. Source: ours."""
    D = config.hidden_size
    H = config.mamba_heads
    inner = H * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    mamba = D * (inner + channels + H) + channels * (config.conv_kernel + 1) + 3 * H
    mamba += inner + inner * D
    heads = config.attention_heads + config.attention_groups
    attention = 2 * D * config.attention_head_size * heads
    kinds = {"M": mamba, "*": attention, "-": 2 * D * config.ffn_hidden_size}
    layers = sum(kinds[kind] + D for kind in config.pattern)
    return layers + 2 * config.vocab_size * D + D


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes that decoding keeps of one sequence."""

    state: int  # of all Mamba layers: states, and the convolutions' inputs
    kv: int  # of all attention layers

    @property
    def total(self) -> int:
        return self.state + self.kv


def decode_memory(
    config: HybridConfig, tokens: int, element_bytes: int = 2, state_bytes: int = 2
) -> DecodeMemory:
    """Bytes that a sequence of `tokens` takes in the `Cache` of load_nemotron_h.py.

    Args: element_bytes: of keys, values and the convolution's inputs. state_bytes: of the states
        (that cache has at least 4). Source: ours.
    """
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    state = inner * config.state_size * state_bytes
    state += channels * config.conv_kernel * element_bytes
    kv = 2 * config.attention_groups * config.attention_head_size * tokens * element_bytes
    return DecodeMemory(config.pattern.count("M") * state, config.pattern.count("*") * kv)


# ── 3 The papers' models ────────────────────────────────────────────────────────────────────────


def published(
    pattern: str, hidden: int, ffn: int, heads: int, queries: int, vocab: int, **others: int
) -> HybridConfig:
    """A published size: 8 groups and a convolution of 4 taps; others: where sizes differ."""
    sizes = {"mamba_head_size": 64, "state_size": 128, **others}
    return HybridConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        pattern=pattern,
        ffn_hidden_size=ffn,
        mamba_heads=heads,
        mamba_groups=8,
        chunk=128,
        attention_heads=queries,
        attention_groups=8,
        attention_head_size=128,
        **sizes,
    )


H_8B = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
H_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
H_47B += "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
NANO_12B = "M-M-M-M*-" + 5 * "M-M-M-M*-" + "M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
STUDY = allocate_layers(56, 0.08, 0.5)
PUBLISHED = {
    "study hybrid": published(STUDY, 4096, 16384, 128, 32, 256_000),
    "Nemotron-H-8B": published(H_8B, 4096, 21504, 128, 32, 131_072),
    "Nemotron-H-47B": published(H_47B, 8192, 30720, 256, 64, 131_072, state_size=256),
    "Nemotron-H-56B": published(H_56B, 8192, 32768, 256, 64, 131_072, state_size=256),
    "Nano-12B-v2": published(NANO_12B, 5120, 20480, 128, 40, 131_072, mamba_head_size=80),
    "Nano-9B-v2": published(NANO_9B, 4480, 15680, 128, 40, 131_072, mamba_head_size=80),
}
# The study's 8B hybrid, printed in its section 3.
STUDY_PRINTED = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"

# ── 4 The tables ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A claim and the figures that should agree; "–" where there is none.

    note: why figures disagree, or what a comparison needs. A note on figures that agree is a
    failure, and so are figures that disagree without a note.
    """

    claim: str
    paper: str = "–"
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


def layers() -> Iterator[Row]:
    yield Row("the study's 56 layers, from 8 % and 50 %", STUDY_PRINTED, STUDY)
    counts = " / ".join(f"{STUDY.count(kind) / 56:.0%}" for kind in "M*-")
    yield Row("Mamba / attention / feed-forward layers of it", "43% / 7% / 50%", counts)
    for name, count in (("8B", 4), ("47B", 5), ("56B", 10)):
        pattern = PUBLISHED[f"Nemotron-H-{name}"].pattern
        yield Row(f"attention layers of Nemotron-H-{name}", str(count), str(pattern.count("*")))


def sizes() -> Iterator[Row]:
    for name, printed in (("8B", "8,100,852,736"), ("47B", "47B"), ("56B", "56B")):
        config = PUBLISHED[f"Nemotron-H-{name}"]
        counted = sum(shape.numel() for shape in parameter_shapes(config).values())
        figures = [parameters(config), counted]
        words = [f"{n:,}" if "," in printed else f"{n / 1e9:.0f}B" for n in figures]
        yield Row(f"parameters of Nemotron-H-{name}", printed, *words)


def memory() -> Iterator[Row]:
    """What follows from the bytes, and what does not.

    The study predicts "up to 8×" faster generation. 32 / 4 attention layers are 8 as well, but that
    is no derivation: its baseline shares no keys, which would give 32, and a latency has weights,
    GEMMs and batch in it. Nemotron-H's "up to 3×" is a throughput of 56B compared with 70B-class
    models, 65,536 tokens in and 1,024 out, on H100s.
    """
    hybrid = PUBLISHED["Nemotron-H-8B"]
    attention = replace(hybrid, pattern=32 * "*-")
    bytes_ = [decode_memory(c, 2**16).total for c in (hybrid, attention)]
    words = " / ".join(f"{n / 2**30:.2f}" for n in bytes_)
    claim = "GiB at 64K tokens, Nemotron-H-8B / 32 attention layers"
    yield Row(claim, formula=words, note="no such figure")
    ratio = f"{bytes_[1] / bytes_[0]:.1f}× fewer bytes"
    yield Row("generation, the study predicts", "up to 8×", ratio, note="bytes are not a latency")
    claim = "throughput of 56B and 70B models, 64K tokens in"
    yield Row(claim, "up to 3×", note="needs 8 H100s")


def tables() -> dict[str, list[Row]]:
    """Title to rows."""
    return {
        "Layers": list(layers()),
        "Parameters": list(sizes()),
        "What decoding keeps of a sequence": list(memory()),
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


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    torch.set_num_threads(1)
    good = [print_table(title, rows) for title, rows in tables().items()]
    if not all(good):
        sys.exit(1)


def flags() -> argparse.Namespace:
    """There are none but --help; any other is refused."""
    description = (__doc__ or "").partition("\n")[0]  # python -OO strips docstrings
    return argparse.ArgumentParser(description=description).parse_args()


if __name__ == "__main__":
    flags()
    main()
