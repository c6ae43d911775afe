# SPDX-License-Identifier: MIT-0
"""Chapter 4's tables: what the paper printed, its formulas, and this chapter's own code.

Paper: Reducing Activation Recomputation in Large Transformer Models,
       Korthikanti et al., 2022, arXiv 2205.05198

    python 04_seq_parallel/seq_parallel_tables.py        7 s on two CPU cores

Column "paper" has the printed figure, "formula" a computed one. "here" is counted in forward and
backward of one layer of a published model on 8 ranks. That needs neither GPUs nor memory: the
other ranks are simulated (PyTorch's fake process group), and tensors have shapes but no values
(fake tensors). The exit code is 1 where figures that should agree do not.

Six modes are compared: tensor parallelism alone (TP) and with sequence parallelism (TP + SP), each
with no, selective and full recomputation. `TensorParallelLayer` is the comparison.

Left out: what needs 8 A100s, the times of table 4 (`make bench CHAPTER=04` measures yours).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from seq_parallel import (
    RECOMPUTE,
    Counter,
    GPTConfig,
    Group,
    Message,
    SequenceParallelLayer,
    SPColumnParallelLinear,
    SPRowParallelLinear,
    _all_reduce,
    _Conjugate,
    activation_bytes,
    group_rank,
    group_size,
    mark,
    saved_tensors,
    seed_dropout,
    unfused_attention,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

# ── 1 Formulas ──────────────────────────────────────────────────────────────────────────────────
#
# Letters are the paper's: s tokens, b sequences, h hidden size, a heads, L layers, v vocabulary
# entries, t tensor-parallel ranks, p pipeline stages of m interleaved pieces each.
#
# ── 1.1 Memory ──────────────────────────────────────────────────────────────────────────────────
#
# The paper's text is rounder than its formulas. Sequence parallelism and selective recomputation
# are said to halve the memory each, nearly: for its four models they leave 58 to 67 % and 49 to
# 62 %. Both together should leave under 20 %: they leave 16 to 20.2 %.

SEQUENCE = 2048
VOCAB = 51_200


def tensor_parallel_bytes(config: GPTConfig, tp: int, recompute: str, batch: int = 1) -> float:
    """Bytes that one of `tp` ranks keeps of a layer without sequence parallelism.

    Masks of 1 byte, all else bf16, with dropout, F = 4·H.
    Source: table 2 of the paper, rows without sequence parallelism.
    """
    sbh = config.seq_length * batch * config.hidden_size
    core = 5 * config.num_heads * config.seq_length / config.hidden_size
    units = {"none": 10 + (24 + core) / tp, "selective": 10 + 24 / tp, "full": 2}
    return units[recompute] * sbh


def kept_bytes(config: GPTConfig, tp: int, mode: Mode, batch: int = 1) -> float:
    """Bytes that one of `tp` ranks keeps of a layer in a mode. Source: table 2 of the paper."""
    formula = activation_bytes if mode.sequence_parallel else tensor_parallel_bytes
    return formula(config, tp, mode.recompute, batch)


def first_stage_bytes(model: PaperModel, mode: Mode) -> float:
    """Bytes of layers' activations on a GPU of the first pipeline stage, which holds the most.

    It has L/p layers with p micro-batches in flight: as much as all L layers of one micro-batch.
    Interleaving starts some more, a factor of 1 + (p − 1)/(p·m). Source: section 4.2.3.
    """
    layer = kept_bytes(model.config, model.t, mode, model.micro_batch)
    interleaving = 1 + (model.p - 1) / (model.p * model.m) if model.m > 1 else 1
    return layer * model.L * interleaving


def extra_bytes(model: PaperModel) -> float:
    """What embedding and output layer add, with sequence parallelism.

    That is the masks after the embedding, and, where one stage is first and last, the inputs of the
    final LayerNorm and of the output layer, and fp32 logits. Source: section 4.3 of the paper.
    """
    sbh = SEQUENCE * model.micro_batch * model.h
    last = 4 * (1 + VOCAB / model.h) if model.p == 1 else 0
    return sbh / model.t * (model.p + last)


def stage_output_bytes(model: PaperModel) -> float:
    """Freed on the first stage where an output is dropped once it is sent: 2·s·b·h·p.

    Source: the paper's appendix, which writes s·b·h·p but counts 2 bytes.
    """
    return 2 * SEQUENCE * model.micro_batch * model.h * model.p


# ── 1.2 Operations ──────────────────────────────────────────────────────────────────────────────
#
# A layer's GEMMs are 24·s·h² + 4·s²·h operations for a sequence in forward, and twice that in
# backward. Model FLOPs are those that the mathematics needs. Hardware FLOPs are all that ran,
# recomputation included. Divided by what the GPUs could do in that time they are MFU and HFU, the
# model and the hardware FLOPs utilization.
#
# One figure of the paper does not add up. Core attention's two GEMMs, run once more, are 4·s²·h. So
# where model FLOPs have s/(6h), hardware FLOPs should have s/(6h) + s/(18h) = 2s/(9h). Equation 8
# has s/(3h): core attention once more with its backward, three times too much. (An author confirms
# it: https://github.com/NVIDIA/Megatron-LM/issues/523.) The paper's HFU are therefore 0.5 to 1.4
# points too high: 175B has 51.8 % and not 52.8 %. And the 7 % of time that selective recomputation
# adds to a layer of 22B are not its 1.7 % of operations: softmax and dropout run again as well,
# and they are limited by memory bandwidth.


def model_flops(batch: int, s: int, h: int, layers: int, vocab: int) -> float:
    """FLOPs of a step over `batch` sequences. Source: equation 7 of the paper."""
    return 72 * batch * layers * s * h**2 * (1 + s / (6 * h) + vocab / (12 * h * layers))


def hardware_flops(batch: int, s: int, h: int, layers: int, vocab: int) -> float:
    """The same with selective recomputation, as equation 8 of the paper is printed: see above."""
    return 72 * batch * layers * s * h**2 * (1 + s / (3 * h) + vocab / (12 * h * layers))


def recomputed_flops(batch: int, s: int, h: int, layers: int, gemms: int = 2) -> float:
    """FLOPs that selective recomputation adds. Source: ours.

    Args: gemms: how many of core attention's two run again; 1 where checkpoint stops early.
    """
    return gemms * 2 * batch * layers * s**2 * h


def utilization(flops: float, seconds: float, gpus: int, peak: float = 312e12) -> float:
    """The fraction of what `gpus` GPUs can do in that time. Source: section 6 of the paper."""
    return flops / (seconds * gpus * peak)


# ── 2 The paper's models and modes ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PaperModel:
    """A row of tables 3 and 5. All have 2,048 tokens, 51,200 vocabulary entries, no replicas."""

    name: str
    a: int
    h: int
    L: int
    t: int
    p: int
    m: int  # interleaved pieces per pipeline stage
    gpus: int
    batch: int  # sequences per step
    micro_batch: int
    seconds_full: float  # of a step with full recomputation
    seconds: float  # of a step with sequence parallelism and selective recomputation
    gain: float  # percent; seconds_full compared with seconds
    mfu: float  # percent
    hfu: float  # percent

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=VOCAB,
            seq_length=SEQUENCE,
            hidden_size=self.h,
            num_layers=self.L,
            num_heads=self.a,
            dropout=0.1,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of `recomputed_flops`; with VOCAB those of `model_flops`."""
        return self.batch, SEQUENCE, self.h, self.L


PAPER_MODELS = [
    PaperModel("22B", 64, 6144, 48, 8, 1, 1, 8, 4, 4, 1.42, 1.10, 29.0, 41.5, 43.7),
    PaperModel("175B", 96, 12288, 96, 8, 8, 3, 64, 64, 1, 18.13, 13.75, 31.8, 51.4, 52.8),
    PaperModel("530B", 128, 20480, 105, 8, 35, 3, 280, 280, 1, 49.05, 37.83, 29.7, 56.0, 57.0),
    PaperModel("1T", 160, 25600, 128, 8, 64, 1, 512, 512, 1, 94.42, 71.49, 32.1, 56.3, 57.0),
]


@dataclass(frozen=True)
class Mode:
    """What of tensor parallelism's activations is sharded by tokens, and recomputed."""

    sequence_parallel: bool
    recompute: str  # none, selective, full

    def __str__(self) -> str:
        sp = "TP + SP" if self.sequence_parallel else "TP"
        return sp if self.recompute == "none" else f"{sp} + {self.recompute}"


MODES = [Mode(sp, recompute) for sp in (False, True) for recompute in RECOMPUTE]
TP_ONLY = Mode(False, "none")
BOTH = Mode(True, "selective")

# ── 3 Tensor parallelism alone, the comparison ──────────────────────────────────────────────────
#
# Chapter 2's layer, with the core attention and the layout of chapter 4: f, `copy_to_tp`, before a
# column-parallel GEMM and f̄, `reduce_from_tp`, after a row-parallel one, in place of g and ḡ.


def _identity(x: Tensor, group: Group) -> Tensor:
    return x


def _sum(partial_x: Tensor, group: Group) -> Tensor:
    return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)


def copy_to_tp(x: Tensor, group: Group = None) -> Tensor:
    """f: identity in forward, all-reduce of the gradient.

    Args: x (...), replicated. Source: Megatron-LM (Shoeybi et al., 2019), figure 3.
    """
    return x if group_size(group) == 1 else _Conjugate.apply(x, group, _identity, _sum)


def reduce_from_tp(partial_x: Tensor, group: Group = None) -> Tensor:
    """f̄: all-reduce in forward, identity for the gradient.

    Args: partial_x (...), of one shape on every rank. Source: as `copy_to_tp`'s.
    """
    if group_size(group) == 1:
        return partial_x
    return _Conjugate.apply(partial_x, group, _sum, _identity)


class TPColumnParallelLinear(SPColumnParallelLinear):
    """x_SBH, replicated, to y_SBf. Source: Megatron-LM (Shoeybi et al., 2019), section 3."""

    def forward(self, x_SBH: Tensor) -> Tensor:
        return F.linear(copy_to_tp(x_SBH, self.group), self.weight, self.bias)


class TPRowParallelLinear(SPRowParallelLinear):
    """y_SBf to z_SBH, replicated. Source: Megatron-LM (Shoeybi et al., 2019), section 3."""

    def forward(self, y_SBf: Tensor) -> Tensor:
        z_SBH = reduce_from_tp(F.linear(y_SBf, self.weight), self.group)
        return z_SBH + self.bias.to(z_SBH.dtype)


class TensorParallelLayer(SequenceParallelLayer):
    """`SequenceParallelLayer` without sequence parallelism: x_SBH, replicated, to (S, B, H).

    Args: as its. Gradients of replicated parameters are complete on every rank.
    Source: Megatron-LM (Shoeybi et al., 2019), section 3.
    """

    def __init__(
        self,
        config: GPTConfig,
        group: Group = None,
        recompute: str = "none",
        core: Callable = unfused_attention,
    ):
        super().__init__(config, group, recompute, core)
        H = config.hidden_size
        ffn = config.ffn_hidden_size
        self.attention.qkv = TPColumnParallelLinear(H, 3 * H, group)
        self.attention.out = TPRowParallelLinear(H, H, group)
        self.mlp.up = TPColumnParallelLinear(H, ffn, group)
        self.mlp.down = TPRowParallelLinear(ffn, H, group)
        self.dropout1.sharded = False  # every rank holds all tokens: one mask for all
        self.dropout2.sharded = False
        mark(self.parameters(), False)


# ── 4 One layer, counted ────────────────────────────────────────────────────────────────────────

# What a layer keeps, in order of time, and its formula in units of s·b·h/t; "core": of 5·a·s/h.
LEDGER = [
    ("LayerNorm 1: its input", 2),
    ("qkv: the shard of its input", 2),
    ("q, k, v", 6),
    ("core attention: softmax's output", "2/5 core"),
    ("core attention: dropout's mask", "1/5 core"),
    ("core attention: dropout's output", "2/5 core"),
    ("out: its input", 2),
    ("dropout 1: its mask", 1),
    ("LayerNorm 2: its input", 2),
    ("up: the shard of its input", 2),
    ("gelu: its input", 8),
    ("down: its input", 8),
    ("dropout 2: its mask", 1),
]


def ledger(recompute: str) -> list[str]:
    """The names of the tensors that a layer keeps; two statistics of each LayerNorm apart."""
    names = [name for name, _ in LEDGER]
    if recompute == "selective":
        return [name for name in names if not name.startswith("core attention")]
    return names if recompute == "none" else ["the layer's input"]


@dataclass
class LayerCost:
    """What one rank keeps, sends and computes of a layer, forward and backward, in bf16."""

    mode: Mode
    formula: float  # bytes, by table 2
    kept: int  # bytes, measured
    saved: dict[str, int]  # name in LEDGER to bytes
    messages: list[Message]
    wire: float  # bytes that a ring sends
    flops: int


def wire_bytes(messages: Iterable[Message], t: int) -> float:
    """Bytes that a rank sends in a ring: (t − 1)/t of a message, and twice that of an all-reduce.

    Source: ours.
    """
    total = 0.0
    for message in messages:
        passes = 2 if message.op == "all_reduce" else 1
        total += message.bytes * passes * (t - 1) / t
    return total


def layer_cost(
    config: GPTConfig,
    mode: Mode,
    batch: int,
    group: Group = None,
    device: torch.device | str = "cpu",
) -> LayerCost:
    """One layer in bf16 in a mode. Collective over `group`; works with fake tensors.

    Source: ours.
    """
    t = group_size(group)
    kind = SequenceParallelLayer if mode.sequence_parallel else TensorParallelLayer
    layer = kind(config, group, mode.recompute)
    weights = {name: x.to(device, torch.bfloat16) for name, x in layer.state_dict().items()}
    layer.load_state_dict(weights, assign=True)  # layer.to() does not work with fake tensors
    seed_dropout(layer, config.seed, step=0, tp_rank=group_rank(group))
    tokens = config.seq_length // (t if mode.sequence_parallel else 1)
    shape = (tokens, batch, config.hidden_size)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    tensors = saved_tensors(partial(layer, x), layer.parameters())
    sizes = [kept.untyped_storage().nbytes() for kept in tensors]
    large = [size for kept, size in zip(tensors, sizes) if kept.shape[-1] != 1]
    with Counter() as counter, FlopCounterMode(display=False) as flops:
        layer(x).sum().backward()
    return LayerCost(
        mode,
        formula=kept_bytes(config, t, mode, batch),
        kept=sum(sizes),
        saved=dict(zip(ledger(mode.recompute), large, strict=True)),
        messages=counter.messages,
        wire=wire_bytes(counter.messages, t),
        flops=flops.get_total_flops(),
    )


def layer_costs(
    config: GPTConfig, batch: int, group: Group = None, device: torch.device | str = "cpu"
) -> list[LayerCost]:
    """`layer_cost` in all six modes."""
    return [layer_cost(config, mode, batch, group, device) for mode in MODES]


@contextlib.contextmanager
def simulated_ranks(world_size: int) -> Iterator[None]:
    """This process as rank 0 of `world_size`; a collective returns at once and sends nothing.

    Raises: RuntimeError where the process has a process group already: a process has one world.
    """
    if dist.is_initialized():
        here = f"this process has a process group of {dist.get_world_size()} ranks"
        raise RuntimeError(f"{here}: a dry run needs a process of its own, or destroy the group")
    # torch 2.9 learns here what collectives return on fake tensors.
    importlib.import_module("torch.distributed._tools.fake_collectives")
    # With TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares collectives across ranks, and for that it
    # needs an operation which the fake group does not have.
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.set_debug_level(level)


def paper_scale(model: PaperModel) -> list[LayerCost]:
    """`layer_costs` of a published model at full size, without memory or other ranks.

    It makes a process group and destroys it. Raises: RuntimeError where the process has one.
    Source: ours, on table 3's sizes.
    """
    with simulated_ranks(model.t), FakeTensorMode():
        return layer_costs(model.config, model.micro_batch)


# ── 5 The tables ────────────────────────────────────────────────────────────────────────────────


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


Runs = dict[str, list[LayerCost]]  # by model


def ledger_table(runs: Runs) -> Iterator[Row]:
    """Tensor by tensor, 22B with sequence parallelism: the sum is 34 + 5·a·s/h."""
    model = PAPER_MODELS[0]
    cost = runs[model.name][MODES.index(Mode(True, "none"))]
    unit = SEQUENCE * model.micro_batch * model.h / model.t
    core = 5 * model.a * SEQUENCE / model.h
    parts = {"2/5 core": 2 * core / 5, "1/5 core": core / 5}
    for name, formula in LEDGER:
        units = parts.get(formula, formula)
        yield Row(name, "–", f"{units:.2f}", f"{cost.saved[name] / unit:.2f}")
    here = f"{sum(cost.saved.values()) / unit:.2f}"
    yield Row("sum: 34 + 5·a·s/h", "–", f"{34 + core:.2f}", here)
    statistics = cost.kept - sum(cost.saved.values())
    here = f"{statistics / (SEQUENCE * model.micro_batch / model.t):g}"
    yield Row("LayerNorm's statistics, bytes per token", "–", "8", here)


def table_2(runs: Runs) -> Iterator[Row]:
    """The paper prints formulas; this is their value for its models, in units of s·b·h."""
    for model in PAPER_MODELS:
        sbh = SEQUENCE * model.micro_batch * model.h
        for cost in runs[model.name]:
            claim = f"{model.name} on {model.t} ranks, {cost.mode}"
            yield Row(claim, "–", f"{cost.formula / sbh:.2f}", f"{cost.kept / sbh:.2f}")


def memory_saved() -> Iterator[Row]:
    """What the paper says about its own formulas."""
    shares = []
    for model in PAPER_MODELS[1:3]:
        core = 5 * model.a * SEQUENCE / model.h
        shares.append(f"{core / (34 + core):.0%}")
    claim = "saved by selective recomputation, one device, 175B, 530B"
    yield Row(claim, "70% / 65%", " / ".join(shares))
    shares = [first_stage_bytes(m, BOTH) / first_stage_bytes(m, TP_ONLY) for m in PAPER_MODELS]
    formula = " / ".join(f"{share:.1%}" for share in shares)
    note = "530B and 1T are a little above" if max(shares) > 0.2 else ""
    yield Row("left of tensor parallelism's, both techniques", "under 20%", formula, note=note)
    gigabytes = [first_stage_bytes(m, BOTH) / 1e9 for m in PAPER_MODELS]
    formula = " / ".join(f"{value:.1f}" for value in gigabytes)
    note = "an A100 has 80 GB" if max(gigabytes) < 80 else ""
    yield Row("GB of activations, first stage, both", "–", formula, note=note)
    small = PAPER_MODELS[0]
    share = extra_bytes(small) / first_stage_bytes(small, Mode(True, "none"))
    claim = "added by embedding and output layer, 22B"
    note = "the paper's formula disagrees with its text"
    yield Row(claim, "under 0.01%", f"{share:.2%}", note=note)
    gibibytes = stage_output_bytes(PAPER_MODELS[2]) / 2**30
    yield Row("freed by dropping sent outputs, 530B, GiB", "2.73", f"{gibibytes:.2f}")


def messages(runs: Runs) -> Iterator[Row]:
    """Bytes sent by one rank, in units of 2·s·b·h·(t − 1)/t."""
    for model in PAPER_MODELS:
        unit = 2 * SEQUENCE * model.micro_batch * model.h * (model.t - 1) / model.t
        for mode, formula, note in [
            (TP_ONLY, "8", ""),
            (Mode(True, "none"), "10", "2 are the second gathers, overlapped"),
        ]:
            cost = runs[model.name][MODES.index(mode)]
            claim = f"sent in a layer, forward and backward, {model.name}, {mode}"
            yield Row(claim, "8", formula, f"{cost.wire / unit:g}", note)


def table_5() -> Iterator[Row]:
    """Speedup, MFU and HFU, computed from the printed seconds."""
    for model in PAPER_MODELS:
        flops = model_flops(*model.sizes, VOCAB)
        mfu = 100 * utilization(flops, model.seconds, model.gpus)
        flops = hardware_flops(*model.sizes, VOCAB)
        hfu = 100 * utilization(flops, model.seconds, model.gpus)
        gain = 100 * (model.seconds_full / model.seconds - 1)
        # Seconds are printed with two digits after the point.
        error = 0.005 / model.seconds
        of_gain = 2 * error * (100 + gain)
        yield rounded(f"faster than full recomputation, {model.name}", model.gain, gain, of_gain)
        yield rounded(f"MFU, {model.name}", model.mfu, mfu, error * mfu)
        yield rounded(f"HFU, {model.name}", model.hfu, hfu, error * hfu)
    need = "needs 8 A100s; see make bench"
    claim = "time added by full, selective, sequence parallelism, 22B"
    yield Row(claim, "39 / 7 / −3%", note=need)


def rounded(claim: str, printed: float, formula: float, error: float) -> Row:
    """A row of two percentages that agree, or differ by less than the rounding of the seconds.

    Args: error: in percentage points.
    """
    row = Row(claim, f"{printed:.1f}%", f"{formula:.1f}%")
    if row.paper != row.formula and abs(formula - printed) <= error + 0.05:
        row.note = "within the rounding of the printed seconds"
    return row


def operations(runs: Runs) -> Iterator[Row]:
    """FLOPs that selective recomputation adds. The paper counts core attention's backward too."""
    printed = {"175B": "2.7%", "530B": "1.6%"}
    for model in PAPER_MODELS:
        flops = model_flops(*model.sizes, VOCAB)
        equation_8 = f"{hardware_flops(*model.sizes, VOCAB) / flops - 1:.1%}"
        claim = f"FLOPs added by selective recomputation, {model.name}"
        if model.name in printed:
            yield Row(f"{claim}, equation 8", printed[model.name], equation_8)
        twice = f"{recomputed_flops(*model.sizes) / flops:.1%}"
        yield Row(f"{claim}, both GEMMs", "–", twice, note=f"equation 8 has {equation_8}")
        # One layer, without the output layer: the second GEMM does not run again.
        none, selective = runs[model.name][:2]
        layer = (model.micro_batch, SEQUENCE, model.h, 1)
        once = recomputed_flops(*layer, gemms=1) / model_flops(*layer, vocab=0)
        here = f"{selective.flops / none.flops - 1:.2%}"
        yield Row(f"{claim}, of a layer as run", "–", f"{once:.2%}", here)


def tables() -> dict[str, list[Row]]:
    """Title to rows. Raises: what `paper_scale` does."""
    runs = {model.name: paper_scale(model) for model in PAPER_MODELS}
    return {
        "What one layer keeps: 22B, TP + SP, in s·b·h/t bytes": list(ledger_table(runs)),
        "Table 2: bytes kept of a layer, in s·b·h": list(table_2(runs)),
        "Sections 4 and 5: memory": list(memory_saved()),
        "Section 4.2.2: bytes sent, in b·s·h·(t − 1)/t elements": list(messages(runs)),
        "Tables 4 and 5: speed": list(table_5()),
        "Equations 7 and 8: operations": list(operations(runs)),
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
