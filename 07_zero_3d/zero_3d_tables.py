# SPDX-License-Identifier: MIT-0
"""Chapter 7's tables: what the papers and their logs printed, formulas, and this chapter's code.

Papers: Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B, Smith et al., 2022,
        arXiv 2201.11990; BLOOM: A 176B-Parameter Open-Access Multilingual Language Model,
        BigScience, 2022, arXiv 2211.05100, with its training repository's log and README

    python 07_zero_3d/zero_3d_tables.py        20 s on two CPU cores

Column "paper" has the printed figure, "formula" a computed one. "here" comes from this chapter's
code: the plain model's parameters, counted without memory, its schedules, or a rank of 384 and of
2,240 simulated ones with its real buckets and optimizer. The exit code is 1 where figures that
should agree do not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import zero_3d as z
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

# ── 1 Sizes and operations ──────────────────────────────────────────────────────────────────────
#
# A BLOOM layer has 12·H² weights and 13·H biases and norm weights. The embedding has V·H, and two
# LayerNorms outside the layers have 4·H: the final one, and the one after the embedding.
#
# Both projects count *hardware* operations, recomputation included: 4 forwards' worth of GEMMs in
# each layer (1 forward, 1 recomputed, 2 in backward). Model operations are 3/4 of them.


@dataclass(frozen=True)
class Bloom:
    """A row of the BLOOM family. Source: its paper, table 3, and the published configurations."""

    millions: int  # of parameters
    layers: int
    hidden: int
    heads: int


FAMILY = [
    Bloom(559, 24, 1024, 16),
    Bloom(1_065, 24, 1536, 16),
    Bloom(1_722, 24, 2048, 16),
    Bloom(3_003, 30, 2560, 32),
    Bloom(7_069, 30, 4096, 32),
    Bloom(176_247, 70, 14_336, 112),
]
VOCABULARY = 250_880  # 250,680 token ids, padded


def parameter_count(layers: int, hidden: int, vocab: int = VOCABULARY) -> int:
    """Parameters of a BLOOM with a tied output layer. Source: BLOOM's README."""
    return layers * (12 * hidden**2 + 13 * hidden) + vocab * hidden + 4 * hidden


def flops(layers: int, hidden: int, batch: int, vocab: int, seq: int = 2048) -> float:
    """Operations of a step with recomputation. Source: PTD-P, section 5.1, which both runs use."""
    gemms = 96 * batch * seq * layers * hidden**2
    return gemms * (1 + seq / (6 * hidden) + vocab / (16 * layers * hidden))


@dataclass(frozen=True)
class Throughput:
    """A row of MT-NLG's throughput: batch 1,920. Source: its section 2.3."""

    servers: int  # of 8 GPUs
    seconds: float  # of a step
    tflops: int  # of a GPU


MT_NLG = [Throughput(280, 60.1, 126), Throughput(350, 50.2, 121), Throughput(420, 44.4, 113)]


def tflops(row: Throughput, seconds: float | None = None) -> float:
    """TFLOP/s of a GPU of MT-NLG's run."""
    operations = flops(105, 20_480, 1920, 51_200)
    return operations / (seconds or row.seconds) / (row.servers * 8) / 1e12


# ── 2 Bytes of a rank, and what it sends ────────────────────────────────────────────────────────
#
# A rank is simulated: its process group has 384 or 2,240 ranks whose collectives return at once,
# and its tensors have shapes and no values. Stage, buckets and optimizer are the chapter's own.


@dataclass(frozen=True)
class Layout:
    """A run's mesh and model."""

    name: str
    tp: int
    pp: int
    dp: int
    config: z.GPTConfig
    micro_batch: int
    batch: int


BLOOM_176B = z.GPTConfig(VOCABULARY, 70, 14_336, 112)
# MT-NLG has learned positions in place of ALiBi: 42 million parameters of its first stage.
MT_NLG_530B = z.GPTConfig(51_200, 105, 20_480, 128)
RUNS = [
    Layout("BLOOM 176B", 4, 12, 8, BLOOM_176B, 2, 2048),
    Layout("MT-NLG 530B", 8, 35, 8, MT_NLG_530B, 1, 1920),
]


@dataclass(frozen=True)
class Bytes:
    """Of one rank: what it holds, and the same by formula."""

    parameters: int
    main_grad: int
    state: int
    ideal: float  # 12·P/dp


def bytes_of(layout: Layout, rank: int) -> Bytes:
    """Builds rank `rank` of a layout on a simulated process group. Ends with that group."""
    world = layout.tp * layout.pp * layout.dp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = z.make_mesh(layout.tp, layout.pp, layout.dp, torch.device("cpu"))
        torch.set_default_dtype(torch.bfloat16)
        with FakeTensorMode():
            stage = z.Stage(layout.config, mesh)
            elements = sum(p.numel() for p in stage.parameters())
            optimizer = z.make_training(stage, 1e-4, 40_000_000)
            optimizer.step()
            parameters = sum(bucket.data.nbytes for bucket in optimizer.buffer.buckets)
            main_grad = sum(bucket.grad.nbytes for bucket in optimizer.buffer.buckets)
            state = z.state_bytes(optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()
    return Bytes(parameters, main_grad, state, 12 * elements / layout.dp)


def sent(layout: Layout, seq: int = 2048) -> tuple[float, float, float]:
    """GB that a rank in the middle of the pipeline sends in a step: over tp, dp, pp.

    tp: 6 all-reduces per layer and micro-batch (2 forward, 2 recomputed, 2 backward), each a ring.
    dp: a reduce-scatter in fp32 and an all-gather in bf16. pp: an activation and a gradient per
    micro-batch, of which each tp rank sends 1/tp.
    """
    hidden = layout.config.hidden_size
    m = layout.batch // (layout.dp * layout.micro_batch)
    message = seq * layout.micro_batch * hidden * 2
    layers = (layout.config.num_layers + 2) / layout.pp
    if layout.config.num_layers % layout.pp == 0:
        layers = layout.config.num_layers // layout.pp
    ring = 2 * (layout.tp - 1) / layout.tp
    tp = 6 * layers * m * message * ring
    count = layout.config.num_layers * 12 * hidden**2 + layout.config.vocab_size * hidden
    dp = count / (layout.tp * layout.pp) * (4 + 2) * (layout.dp - 1) / layout.dp
    pp = 2 * m * message / layout.tp
    return tp / 1e9, dp / 1e9, pp / 1e9


# ── 3 Paper, formula, here ──────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A row of the printed tables; "–" where a column has nothing.

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
    for model in FAMILY:
        config = z.GPTConfig(VOCABULARY, model.layers, model.hidden, model.heads)
        counted = sum(shape.numel() for shape in z.parameter_shapes(config).values())
        formula = parameter_count(model.layers, model.hidden)
        name = f"parameters, {model.layers} layers, H = {model.hidden}"
        printed = f"{model.millions:,} million"
        yield Row(name, printed, f"{formula / 1e6:,.0f} million", f"{counted / 1e6:,.0f} million")
        yield Row("the same, to the last one", "–", f"{formula:,}", f"{counted:,}")
    shapes = z.parameter_shapes(BLOOM_176B)
    embedding = shapes["embedding.weight"].numel()
    formula = f"{VOCABULARY * 14_336:,}"
    yield Row(
        "parameters of the 176B model's embedding", "3,596,615,680", formula, f"{embedding:,}"
    )
    block = [shape.numel() for name, shape in shapes.items() if name.startswith("layers.0.")]
    formula = f"{12 * 14_336**2 + 13 * 14_336:,}"
    yield Row("parameters of a layer", "2,466,437,120", formula, f"{sum(block):,}")
    placed = [len(layers) for layers in z.place_layers(70, 12)]
    here = " ".join(map(str, placed))
    yield Row("layers of each of 12 stages", "5 6 6 6 6 6 6 6 6 6 6 5", here=here)


def throughput() -> Iterator[Row]:
    """MT-NLG printed whole TFLOP/s of rounded seconds; BLOOM logged both."""
    for row in MT_NLG:
        formula = f"{tflops(row):.0f}"
        note = ""
        if formula != str(row.tflops):
            highest = tflops(row, row.seconds - 0.05)  # of the seconds that round to the printed
            note = f"{row.seconds} s may be {row.seconds - 0.05:.2f} s: {highest:.2f}"
        name = f"TFLOP/s of a GPU, {row.servers} servers, {row.seconds} s a step"
        yield Row(name, str(row.tflops), formula, note=note)
    operations = flops(70, 14_336, 2048, VOCABULARY)
    formula = operations / 104.70 / 384 / 1e12
    note = f"{100 * (formula / 149.77 - 1):.3f} %: 104.70 s is rounded"
    yield Row("BLOOM's log, 104.70 s a step on 384 GPUs", "149.77", f"{formula:.3f}", note=note)
    lowest = operations / 104.705 / 384 / 1e12
    highest = operations / 104.695 / 384 / 1e12
    within = str(lowest <= 149.77 <= highest)
    yield Row("149.77 is in the range of 104.695 to 104.705 s", "True", within)


def schedules() -> Iterator[Row]:
    """resume.py runs such schedules; a test holds it against these formulas."""
    formula = f"{cosine(158_692_272, 6e-5, 6e-6, 183_105, 200_000_000):.3e}"
    yield Row("BLOOM's learning rate at sample 158,692,272", "1.150e-05", formula)
    sizes = f"{ramp(9_765_624, 192, 16, 9_765_625, 2048)}"
    yield Row("BLOOM's last batch before its ramp ends, of 2,048", "2032", sizes)
    sizes = f"{ramp(5_859_374, 32, 32, 5_859_375, 1920)}"
    yield Row("MT-NLG's last batch before its ramp ends, of 1,920", "1888", sizes)
    samples = f"{12e9 / 2048:,.0f}"
    yield Row("samples of MT-NLG's ramp: 12 billion tokens", "5,859,375", samples)
    warmup = f"{375e6 / 2048:,.0f}"
    yield Row("samples of BLOOM's warm-up: 375 million tokens", "183,105", warmup)
    stopped = cosine(131_835_938, 5e-5, 5e-6, 488_281, 166_015_625)
    note = "above the least: it stopped at 270 of 340 billion tokens"
    yield Row("MT-NLG's learning rate at the end", "–", f"{stopped:.2e}", note=note)


def cosine(samples: int, peak: float, least: float, warmup: int, decay: int) -> float:
    """A learning rate after warm-up. Source: both papers."""
    progress = (samples - warmup) / (decay - warmup)
    return least + (peak - least) * math.cos(math.pi * progress / 2) ** 2


def ramp(samples: int, start: int, increment: int, over: int, final: int) -> int:
    """The batch size within a ramp. Source: both papers."""
    increments = (final - start) // increment
    return start + increment * math.floor(samples * increments / over)


def memory() -> Iterator[Row]:
    """Of the first rank of a stage in the middle."""
    for layout in RUNS:
        middle = z.rank_of(z.ParallelMesh(layout.tp, layout.pp, layout.dp), 0, 5, 0)
        found = bytes_of(layout, middle)
        world = layout.tp * layout.pp * layout.dp
        name = f"{layout.name}, {world:,} ranks, a stage in the middle"
        unsharded = found.ideal * layout.dp / 1e9
        yield Row(f"{name}: parameters, GB", "–", here=gb(found.parameters), note="computed")
        yield Row("main_grad, GB", "–", here=gb(found.main_grad), note="computed")
        yield Row("optimizer state, GB: 12·P/dp", "–", gb(found.ideal), gb(found.state))
        yield Row("the same without ZeRO-1, GB", "–", f"{unsharded:.2f}", note="computed")
        for axis, amount in zip(("tp", "dp", "pp"), sent(layout)):
            yield Row(f"a rank sends over {axis}, GB a step", "–", f"{amount:.1f}", note="computed")


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def tables() -> dict[str, list[Row]]:
    """Title to rows."""
    return {
        "BLOOM: sizes": list(sizes()),
        "MT-NLG and BLOOM: throughput": list(throughput()),
        "MT-NLG and BLOOM: batch sizes and learning rates": list(schedules()),
        "Bytes of a rank, and what it sends": list(memory()),
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
