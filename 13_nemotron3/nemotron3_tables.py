# SPDX-License-Identifier: MIT-0
"""Chapter 13's tables: Nano, Super and Ultra at full size on simulated groups, without memory.

Sources. Sizes: Nemotron 3 Nano, 2025, arXiv 2512.20848; the white paper, 2025, arXiv 2512.20856;
         Nemotron 3 Super, 2026, arXiv 2604.12374. Ultra: its published configuration and its name,
         550B-A55B; the order of its layers and its state size are assumed. Layouts: the public
         recipes of Megatron-Bridge.

    python 13_nemotron3/nemotron3_tables.py        some seconds on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's model
counts, built on the device "meta" and on a process group that sends nothing. The exit code is 1
where figures that should agree do not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from nemotron3 import (
    Counter,
    Mesh,
    NemotronConfig,
    ParallelBlock,
    ParallelNemotronLM,
    Span,
    make_mesh,
    state_shapes,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

# ── 1 The models ──────────────────────────────────────────────────────────────────────────────────

NANO = NemotronConfig(
    vocab_size=131_072,
    hidden_size=2688,
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mtp_num_layers=0,
    mamba_heads=64,
    mamba_head_size=64,
    mamba_groups=8,
    state_size=128,
    chunk=128,
    attention_heads=32,
    attention_groups=2,
    attention_head_size=128,
    num_experts=128,
    top_k=6,
    expert_size=1856,
    shared_size=3712,
    moe_latent_size=0,
    gate_scale=2.5,
)
SUPER = replace(
    NANO,
    hidden_size=4096,
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    mtp_num_layers=2,
    mamba_heads=128,
    num_experts=512,
    top_k=22,
    expert_size=2688,
    shared_size=5376,
    moe_latent_size=1024,
    gate_scale=5.0,
)
ULTRA = replace(
    SUPER,
    hidden_size=8192,
    pattern="MEM*EMEME" * 12,  # 48, 12 and 48 layers; their order here is not the real one
    mamba_heads=256,
    attention_heads=64,
    expert_size=5120,
    shared_size=10_240,
    moe_latent_size=2048,
)
MODELS = {"Nano": NANO, "Super": SUPER, "Ultra": ULTRA}


def counted(config: NemotronConfig) -> int:
    """Elements of the plain model's state, router biases too; built without memory."""
    return sum(shape.numel() for shape in state_shapes(config).values())


def active(config: NemotronConfig) -> int:
    """Parameters that a token uses, tables for input and output among them."""
    experts = 0
    for name, shape in state_shapes(config).items():
        if ".experts." in name:
            experts += shape.numel()
    unused = experts * (config.num_experts - config.top_k) // config.num_experts
    return counted(config) - unused


def block_parameters(config: NemotronConfig) -> int:
    """Parameters of the block for multi-token prediction."""
    return counted(config) - counted(replace(config, mtp_num_layers=0))


# ── 2 Layouts ─────────────────────────────────────────────────────────────────────────────────────
#
# Nano's recipe for pretraining on H100 has tp 4 and ep 8. Its 2 groups of keys and values are then
# replicated on all ranks.

LAYOUTS = [  # model, ranks, tp, ep, where from
    ("Nano", 8, 1, 8, "recipe, fine-tuning"),
    ("Nano", 8, 4, 8, "recipe, pretraining"),
    ("Super", 64, 1, 64, "recipe, GB300"),
    ("Super", 64, 2, 64, "recipe, GB200"),
    ("Ultra", 256, 2, 64, "ours"),
]


def simulated_mesh(ranks: int, tp: int, ep: int) -> Mesh:
    """A mesh of so many ranks whose messages go nowhere; this process is rank 0."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return make_mesh(tp, ep, torch.device("cpu"))


def held(config: NemotronConfig, mesh: Mesh) -> int:
    """Elements of rank 0's shards, built without memory."""
    with torch.device("meta"):
        model = ParallelNemotronLM(config, mesh)
    return sum(x.numel() for x in model.state_dict().values())


def held_by_formula(config: NemotronConfig, tp: int, ep: int) -> int:
    """The same from the table of part 3: each parameter divided by the ranks that shard it."""
    total = 0
    for name, shape in state_shapes(config).items():
        over = 1
        if ".experts." in name:
            over = ep
        elif tp > config.attention_groups and ("k_proj" in name or "v_proj" in name):
            over = 1
        elif "mixer." in name and "router" not in name and "_latent." not in name:
            over = tp
        elif name in ("embedding.weight", "head.weight"):
            over = tp
        total += shape.numel() // over
    return total


# ── 3 Messages of a layer ─────────────────────────────────────────────────────────────────────────


def layer_bytes(
    config: NemotronConfig, letter: str, tokens: int, tp: int, ep: int, itemsize: int = 4
) -> int:
    """Bytes of a rank's messages in forward: of each the input or the output, the larger.

    tokens: of a replica, a multiple of tp; each expert gets as many rows as another. itemsize: of
    an activation; scores are fp32. Source: ours.
    """
    width = tokens * config.hidden_size * itemsize
    around = 2 * width if tp > 1 else 0  # g and ḡ
    if letter != "E":
        return around
    row = (config.moe_latent_size or config.hidden_size) * itemsize
    rows = tokens // tp * config.top_k * row
    counts = config.num_experts * 8  # int64
    sent = 2 * rows + counts if ep > 1 else 0
    scores = tokens * config.num_experts * 4 if tp > 1 else 0
    return sent + scores + (around if config.shared_size else 0)


def counted_bytes(config: NemotronConfig, letter: str, tokens: int, mesh: Mesh) -> int:
    """The same, counted in the forward pass of one layer on a simulated mesh."""
    block = ParallelBlock(letter, config, mesh)
    x_rD = torch.randn(tokens // mesh.tp, config.hidden_size)
    with Counter() as counter, torch.no_grad():
        block(x_rD, Span(None, (1, tokens)))
    return sum(message.bytes for message in counter.messages)


# ── 4 The tables ──────────────────────────────────────────────────────────────────────────────────


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


def billions(count: int, digits: int = 1) -> str:
    return f"{count / 1e9:.{digits}f}B"


def parameters() -> Iterator[Row]:
    yield Row("Nano: total", "31.6B", here=billions(counted(NANO)))
    yield Row("Nano: active", "3.6B", here=billions(active(NANO)))
    trunk = replace(SUPER, mtp_num_layers=0)
    figure = billions(counted(trunk))
    yield Row("Super: total without MTP", "120.6B", here=figure, note="120.6 without routers")
    figure = billions(active(trunk))
    yield Row("Super: active", "12.7B", here=figure, note="12.7 without routers")
    figure = billions(block_parameters(SUPER), 2)
    yield Row("Super: the MTP block", "–", here=figure, note="not published")
    trunk = replace(ULTRA, mtp_num_layers=0)
    figure = billions(counted(trunk), 0)
    yield Row("Ultra: total without MTP", "550B", here=figure, note="in its name, rounded")


def layouts() -> Iterator[Row]:
    for name, ranks, tp, ep, source in LAYOUTS:
        config = MODELS[name]
        here = held(config, simulated_mesh(ranks, tp, ep))
        formula = held_by_formula(config, tp, ep)
        claim = f"{name}, {ranks} ranks, tp {tp}, ep {ep} ({source}): elements of a rank"
        yield Row(claim, "–", f"{formula:,}", f"{here:,}")
        # bf16 weights and gradients, fp32 master weights and two states of AdamW
        needs = f"{here * 16 / 1e9:.0f} GB, sharded over dp and edp {needed(config, ranks, tp, ep)}"
        yield Row("  with gradients and optimizer states", "–", needs, note="16 bytes each")


def needed(config: NemotronConfig, ranks: int, tp: int, ep: int) -> str:
    """Memory of a rank where 12 of 16 bytes are sharded over the ranks with the same shard."""
    experts = 0
    for name, shape in state_shapes(config).items():
        if ".experts." in name:
            experts += shape.numel() // ep
    rest = held_by_formula(config, tp, ep) - experts
    states = 12 * (experts / (ranks // ep) + rest / (ranks // tp))
    return f"{(4 * (experts + rest) + states) / 1e9:.0f} GB"


def messages() -> Iterator[Row]:
    small = {"hidden_size": 32, "mamba_heads": 8, "attention_heads": 8, "num_experts": 64}
    config = NemotronConfig(**small, top_k=4, moe_latent_size=16)
    kinds = {"M": "Mamba", "*": "attention", "-": "feed-forward", "E": "experts"}
    for tp, ep in ((1, 8), (2, 4), (2, 8)):
        mesh = simulated_mesh(8, tp, ep)
        for letter, kind in kinds.items():
            formula = layer_bytes(config, letter, 64, tp, ep)
            here = counted_bytes(config, letter, 64, mesh)
            claim = f"a small layer, tp {tp}, ep {ep}, 64 tokens: bytes, {kind}"
            yield Row(claim, "–", f"{formula:,}", f"{here:,}")
    for name, _, tp, ep, _ in LAYOUTS[1:4:2]:
        config = MODELS[name]
        for letter in "ME":
            size = layer_bytes(config, letter, 8192, tp, ep, 2)
            claim = f"{name}, tp {tp}, ep {ep}, 8,192 tokens in bf16: {kinds[letter]}"
            yield Row(claim, "–", f"{math.ceil(size / 1e6):,} MB", note="by the formula above")


TABLES = {"Parameters": parameters, "Layouts": layouts, "Messages of a layer": messages}


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
    dist.destroy_process_group()
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
