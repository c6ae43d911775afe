# SPDX-License-Identifier: MIT-0
"""Chapter 3's planner: how to lay a GPT out over a cluster, predicted from volumes and speeds.

Paper: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
       Narayanan et al., 2021, arXiv 2104.04473, section 3

    python 03_pipeline/plan.py --layers 128 --hidden 25600 --heads 160 --gpus 3072 --batch 3072
    python 03_pipeline/plan.py --layers 36 --hidden 4096 --heads 32 --gpus 8 --batch 64 --seq 4096

It prints the layouts that fit, fastest first, and proves and times the schedule of the first. A
ranking, not a forecast: on the paper's own layouts its throughput is 10 % too low to 22 % too high.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import astuple, dataclass, fields, replace

from pipeline import flag, runs_ahead, schedule, simulate, verify

# ── 1 The prediction ────────────────────────────────────────────────────────────────────────────
#
# With t-way tensor, p-way pipeline and d-way data parallelism, n = t·p·d, a step of B sequences
# takes
#
#     (m + (p − 1)/v) · (time of one micro-batch on one rank)  +  (sum of gradients over d replicas)
#
# The micro-batch's time has its operations, the all-reduces in its layers, and the messages to the
# neighbours. Each is a volume over a speed, with the volumes of the paper's section 3 (in elements,
# for one micro-batch of b sequences; recomputation repeats the forward's):
#
#     all-reduces of one layer   6 of b·S·H over t ranks: 12·b·S·H·(t − 1)/t         inside a server
#     messages of one chunk      forward and backward, each b·S·H/t                  between stages
#                                and what the receivers gather, b·S·H·(t − 1)/t      inside a server
#     gradients, once a step     2·(d − 1)/d of a rank's parameters                  between copies
#
# Where t·p·d GPUs fit into one server, stages and replicas communicate inside it too. In a larger
# cluster they are taken to be in different servers.
#
# The speeds are those of `Machine`, an A100's by default. One constant decides over b: the time
# that a layer costs however small the micro-batch is. With backward and recomputation a layer has
# more than a hundred kernels, each with some ten microseconds in which little is computed. We take
# two milliseconds. (On one GPU the paper gains up to 1.3 times the throughput by a larger b, which
# would allow for five milliseconds and more.) Without it, many micro-batches of one sequence look
# free.
#
# Compared with table 1, the paper's own (t, p) is among the best three in each of the ten rows, for
# anything from 1 to 8 ms. In five rows another is predicted to be faster, by 3 % at most.
#
# Memory: 18 bytes per parameter (bf16 weight and gradient; fp32 gradient, weight and two moments),
# on the fullest stage; the input of each layer for each micro-batch in flight; one layer's
# activations while it is recomputed (chapter 4 counts them); the last stage's logits. A tenth stays
# free.


LARGEST = 16  # sequences of a micro-batch, as in the paper


@dataclass(frozen=True)
class Model:
    """What is trained."""

    layers: int = flag(None, "layers, L", least=1, required=True)
    hidden: int = flag(None, "hidden size, H", least=1, required=True)
    heads: int = flag(None, "attention heads", least=1, required=True)
    batch: int = flag(None, "sequences per step", least=1, required=True)
    vocab: int = flag(51_200, "vocabulary entries, V", least=1)
    seq: int = flag(2048, "tokens of a sequence, S", least=1)

    def __post_init__(self):
        if self.heads < 1 or self.hidden % self.heads:
            sizes = f"hidden={self.hidden}, heads={self.heads}"
            raise ValueError(f"{sizes}: the heads must divide the hidden size")


@dataclass(frozen=True)
class Machine:
    """GPUs and networks. Source: an A100's data sheet; efficiency and overhead: ours."""

    gpu_memory: float = flag(80.0, "GB of one GPU")
    gpus_per_node: int = flag(8, "GPUs of one server")
    peak: float = flag(312e12, "FLOP/s of one GPU")
    efficiency: float = flag(0.6, "part of the peak that large GEMMs reach")
    nvlink: float = flag(300e9, "bytes/s of one GPU inside a server")
    network: float = flag(25e9, "bytes/s of one GPU between servers")
    overhead: float = flag(2e-3, "seconds per layer and micro-batch, whatever its size")

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: it must be finite and above 0")


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out, with its predicted step."""

    t: int
    p: int
    d: int
    v: int
    b: int
    m: int
    seconds: float = 0.0
    bubble: float = 0.0  # over ideal time
    tensor: float = 0.0  # of the seconds, in all-reduces inside layers
    network: float = 0.0  # of the seconds, in messages between stages and sums over replicas
    memory: float = 0.0  # GB on the fullest GPU
    tflops: float = 0.0  # per GPU

    @property
    def schedule(self) -> str:
        return "interleaved" if self.v > 1 else "1f1b"


def parameter_count(layers: int, hidden: int, vocab: int, seq: int) -> int:
    """Parameters of a GPT with a tied output layer. Source: the paper's section 5.1."""
    layer = 12 * hidden**2 + 13 * hidden
    tables = (vocab + seq) * hidden
    return layers * layer + tables


def step_flops(model: Model, batch: int, output_layer: bool = True) -> int:
    """Operations of a step of `batch` sequences, recomputed. Source: the paper's section 5.1."""
    H = model.hidden
    tokens = batch * model.seq
    layer = 24 * tokens * H**2 + 4 * tokens * model.seq * H
    total = 4 * model.layers * layer
    if output_layer:
        total += 6 * tokens * H * model.vocab
    return total


def compute_seconds(model: Model, x: Layout, machine: Machine) -> float:
    """Of one micro-batch on the slowest rank, which has the output layer."""
    layers = step_flops(model, x.b, output_layer=False)
    output = step_flops(model, x.b) - layers
    speed = x.t * machine.peak * machine.efficiency
    fixed = machine.overhead * model.layers
    return (layers / x.p + output) / speed + fixed / x.p


def memory(model: Model, x: Layout, held: float) -> float:
    """GB on the fullest GPU; held: its parameters."""
    ahead = runs_ahead(x.schedule, x.p, x.m, x.v, rank=0)
    in_flight = min(ahead + 1, x.m * x.v)
    layers = model.layers // x.p // x.v  # of a chunk
    tokens = x.b * model.seq
    boundary = tokens * model.hidden  # elements
    inputs = 2 * in_flight * layers * boundary
    scores = 5 * model.heads * model.seq / model.hidden
    working = boundary * (10 + (24 + scores) / x.t)
    logits = 6 * tokens * model.vocab / x.t
    parameters = 18 * held
    return (parameters + inputs + working + logits) / 1e9


def predict(model: Model, x: Layout, machine: Machine) -> Layout:
    """`x` with its predicted step. Source: volumes: the paper's section 3; their sum: ours."""
    t = x.t
    p = x.p
    gpus = t * p * x.d
    between = machine.network
    if gpus <= machine.gpus_per_node:
        between = machine.nvlink

    # The fullest rank holds its layers and an embedding table. Two bytes per element.
    layers = model.layers // p
    held = parameter_count(layers, model.hidden, model.vocab, model.seq) / t
    boundary = 2 * x.b * model.seq * model.hidden  # bytes of the tensor between two stages
    others = boundary * (t - 1) / t  # what a rank lacks that has 1/t of it

    compute = compute_seconds(model, x, machine)
    tensor = 12 * layers * others / machine.nvlink
    messages = 0.0
    if p > 1:
        message = boundary / t / between + others / machine.nvlink
        messages = 2 * x.v * message
    gradients = 2 * held
    sums = 2 * (x.d - 1) / x.d * gradients / between

    bubble = (p - 1) / (x.m * x.v)
    rounds = x.m * (1 + bubble)
    seconds = rounds * (compute + tensor + messages) + sums
    flops = step_flops(model, model.batch)
    return replace(
        x,
        seconds=seconds,
        bubble=bubble,
        tensor=rounds * tensor,
        network=rounds * messages + sums,
        memory=memory(model, x, held),
        tflops=flops / gpus / seconds / 1e12,
    )


# ── 2 The search ────────────────────────────────────────────────────────────────────────────────


def divisors(n: int, most: float = math.inf) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0 and i <= most]


def layouts(model: Model, gpus: int, machine: Machine) -> list[Layout]:
    """All (t, p, d, v, b) that divide.

    t stays inside a server and divides the heads, p·v the layers, b·d the batch, and p the m where
    v > 1. b is at most 16, the paper's largest.
    """
    found = []
    for t in divisors(math.gcd(gpus, machine.gpus_per_node, model.heads)):
        for p in divisors(math.gcd(gpus // t, model.layers)):
            d = gpus // t // p
            if model.batch % d:
                continue
            rows = model.batch // d
            for b in divisors(rows, LARGEST):
                m = rows // b
                chunks = [1]
                if p > 1 and m % p == 0:
                    chunks = divisors(model.layers // p)
                for v in chunks:
                    found.append(Layout(t, p, d, v, b, m))
    return found


def plan(model: Model, gpus: int, machine: Machine | None = None) -> list[Layout]:
    """The layouts that fit, fastest first, with the best (v, b) of each (t, p).

    Raises: ValueError where none fits, and for no GPU. Source: ours.
    """
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: it must be at least 1")
    machine = machine or Machine()
    room = 0.9 * machine.gpu_memory
    every = [predict(model, x, machine) for x in layouts(model, gpus, machine)]
    best = {}
    for x in sorted(every, key=lambda x: x.seconds):
        if x.memory <= room:
            best.setdefault((x.t, x.p), x)
    if not best:
        what = f"{model.layers} layers of {model.hidden} with a batch of {model.batch}"
        gpu = f"{gpus} GPUs of {machine.gpu_memory:g} GB"
        remedy = "take more GPUs, or a batch with more divisors"
        raise ValueError(f"{what} fit no layout of {gpu}: {remedy}")
    return list(best.values())


# ── 3 The command ───────────────────────────────────────────────────────────────────────────────


HEADER = "  t    p    d   v   b    m    s/step   bubble   tensor  network      GB   TFLOP/s"
FORMATS = "3 4 4 3 3 4 9.2f 8.1% 8.1% 8.1% 7.0f 9.0f"  # of a layout's fields


def row(x: Layout) -> str:
    """A layout, with its communication as shares of its step."""
    shares = replace(x, tensor=x.tensor / x.seconds, network=x.network / x.seconds)
    cells = []
    for value, form in zip(astuple(shares), FORMATS.split()):
        cells.append(format(value, form))
    return " ".join(cells)


def proof(x: Layout) -> str:
    """The layout's schedule, proven and timed: a chunk's forward takes 1, its backward 2."""
    table = schedule(x.schedule, x.p, x.m, x.v)
    held = max(verify(table))
    operations = sum(map(len, table))
    bubble = simulate(table).bubble
    found = f"no deadlock, bubble {bubble}, {held} activations of a chunk held"
    return f"{operations:,} operations: {found}"


def report(model: Model, gpus: int, machine: Machine, rows: int) -> str:
    """The table of layouts, the first by the paper's rules, and its schedule, proven and timed."""
    found = plan(model, gpus, machine)
    first = found[0]
    billions = parameter_count(model.layers, model.hidden, model.vocab, model.seq) / 1e9
    hold = first.t * first.p
    room = f"{first.memory:.0f} of {machine.gpu_memory:g} GB"
    trade = f"b = {first.b}, m = {first.m}, bubble {first.bubble:.1%}"
    lines = [
        f"{billions:.1f} B parameters, {gpus} GPUs, the best (v, b) of each (t, p)",
        "",
        HEADER,
        *map(row, found[:rows]),
        "",
        "The first row by the paper's three rules:",
        f"1. tensor parallelism inside a server: t = {first.t} of {machine.gpus_per_node} GPUs",
        f"2. no more model parallelism than memory needs: {hold} GPUs hold it in {room}",
        f"3. the micro-batch trades fast kernels against the bubble: {trade}",
        "",
        f"Its schedule, {proof(first)}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Lays a GPT out over a cluster.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in [*fields(Model), *fields(Machine)]:
        keywords = dict(f.metadata)
        keywords.pop("least", None)
        kind = int if f.type == "int" else float
        parser.add_argument(
            "--" + f.name.replace("_", "-"), type=kind, default=f.default, **keywords
        )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--rows", type=int, default=10, help="layouts to show")
    args = parser.parse_args()
    try:
        for name in ("layers", "hidden", "heads", "batch", "vocab", "seq", "gpus", "rows"):
            if getattr(args, name) < 1:
                raise ValueError(f"{name}={getattr(args, name)}: it must be at least 1")
        model = Model(**{f.name: getattr(args, f.name) for f in fields(Model)})
        machine = Machine(**{f.name: getattr(args, f.name) for f in fields(Machine)})
        text = report(model, args.gpus, machine, args.rows)
    except ValueError as error:
        parser.error(str(error))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
