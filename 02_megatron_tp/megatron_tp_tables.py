# SPDX-License-Identifier: MIT-0
"""Chapter 2's tables: what Megatron-LM's paper printed, its formulas, and this chapter's own code.

Paper: Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism,
       Shoeybi et al., 2019, arXiv 1909.08053

    python 02_megatron_tp/megatron_tp_tables.py        10 s on two CPU cores

Column "paper" has the printed figure, "formula" a computed one. "here" is counted in forward and
backward of `ParallelGPT` on the paper's number of ranks. That needs neither GPUs nor memory: the
other ranks are simulated (PyTorch's fake process group), and tensors have shapes but no values
(fake tensors). The exit code is 1 where figures that should agree do not.

Left out: what needs GPUs (efficiency, speedup) or weeks of training (perplexity, accuracy).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron_tp import Counter, GPTConfig, Message, ParallelGPT, padded_vocab_size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

# ── 1 Formulas ──────────────────────────────────────────────────────────────────────────────────
#
# A layer has 3H² + 3H parameters for queries, keys and values, H² + H for attention's output,
# 4H² + 4H and 4H² + H for the feed-forward layer, and 4H in two LayerNorms: 12H² + 13H. Outside
# the layers are the embedding table, the positions and the final LayerNorm. The output layer is
# tied to the embedding table and has no parameters of its own.


def parameter_count(layers: int, hidden: int, vocab: int = 51_200, seq: int = 1024) -> int:
    """Parameters of a GPT with a tied output layer; a test holds it against the plain model.

    Source: ours, from section 3 of the paper.
    """
    layer = 12 * hidden**2 + 13 * hidden
    return layers * layer + (vocab + seq) * hidden + 2 * hidden


def bert_parameter_count(layers: int, hidden: int, vocab: int = 30_522, seq: int = 512) -> int:
    """Parameters of a BERT with its heads, which this chapter does not build.

    Two token types, a LayerNorm, a pooler, the masked-token head and the sentence-order head are
    added to the layers. 512 positions are those of BERT's own paper.
    """
    layer = 12 * hidden**2 + 13 * hidden
    embeddings = (vocab + seq + 2) * hidden + 2 * hidden
    pooler = hidden**2 + hidden
    token_head = hidden**2 + 3 * hidden + vocab
    order_head = 2 * hidden + 2
    return layers * layer + embeddings + pooler + token_head + order_head


def rank_parameter_count(
    layers: int, hidden: int, tp: int, vocab: int = 51_200, seq: int = 1024
) -> int:
    """Parameters on one of `tp` ranks.

    Replicated are 6H of a layer (two LayerNorms and the biases of the row-parallel matrices), the
    positions and the final LayerNorm. The rest is sharded. Source: ours, from section 3.
    """
    sharded = layers * (12 * hidden**2 + 7 * hidden) + vocab * hidden
    replicated = layers * 6 * hidden + (seq + 2) * hidden
    return sharded // tp + replicated


def state_gigabytes(parameters: int) -> float:
    """Parameter, gradient and Adam's two moments in fp32: 16 bytes per parameter."""
    return 16 * parameters / 1e9


def share_of_linear(flops: float, gpus: int, one_gpu: float = 39e12) -> float:
    """The fraction of gpus times one GPU's FLOP/s that was reached.

    Args: one_gpu: the paper's baseline, 1.2 billion parameters on one V100.
    Source: section 5.1.
    """
    return flops / (gpus * one_gpu)


def step_flops(layers: int, hidden: int, batch: int, vocab: int = 51_200, seq: int = 1024) -> float:
    """FLOPs of a step with recomputed layers. Source: Narayanan et al., 2021 (chapter 3)."""
    attention = seq / (6 * hidden)
    output_layer = vocab / (16 * layers * hidden)
    return 96 * batch * seq * layers * hidden**2 * (1 + attention + output_layer)


# ── 2 The paper's models ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PaperModel:
    """A row of table 1. All have 1,024 tokens per sequence and a vocabulary of 51,200."""

    name: str  # parameters, as printed
    hidden: int
    heads: int
    layers: int
    tp: int  # GPUs of one replica
    gpus: int  # GPUs with 64 replicas


TABLE_1 = [
    PaperModel("1.2B", hidden=1536, heads=16, layers=40, tp=1, gpus=64),
    PaperModel("2.5B", hidden=1920, heads=20, layers=54, tp=2, gpus=128),
    PaperModel("4.2B", hidden=2304, heads=24, layers=64, tp=4, gpus=256),
    PaperModel("8.3B", hidden=3072, heads=32, layers=72, tp=8, gpus=512),
]
VOCAB = 50_257  # GPT-2's, without padding
BATCH = 8  # sequences per replica, section 5.1
SEQ = 1024


@dataclass(frozen=True)
class LaterModel:
    """A row of the weak-scaling table of the same code's version 2.0, on V100 GPUs."""

    billions: float
    hidden: int
    layers: int
    tp: int
    milliseconds: int  # per step, the same batch for all
    efficiency: float  # percent


LATER_MODELS = [
    LaterModel(1.16, hidden=1920, layers=24, tp=1, milliseconds=1121, efficiency=100.0),
    LaterModel(2.03, hidden=2304, layers=30, tp=2, milliseconds=1093, efficiency=89.6),
    LaterModel(4.24, hidden=3072, layers=36, tp=4, milliseconds=1238, efficiency=82.5),
    LaterModel(8.67, hidden=4096, layers=42, tp=8, milliseconds=1407, efficiency=74.3),
]

# ── 3 A dry run of a published model ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DryRun:
    """What one rank's training step holds and sends."""

    parameters: int  # of the full model, its vocabulary padded
    held: int  # of them on this rank
    forward: int  # all-reduces of B·S·H elements in forward
    backward: int  # the same in backward
    loss_values: float  # values per token that the loss all-reduces


@contextlib.contextmanager
def simulated_ranks(world_size: int) -> Iterator[None]:
    """This process as rank 0 of `world_size`; a collective returns at once and sends nothing.

    Raises: RuntimeError where the process has a process group already: a process has one world.
    """
    if dist.is_initialized():
        ranks = dist.get_world_size()
        here = f"this process has a process group of {ranks} ranks"
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


def paper_scale(model: PaperModel) -> DryRun:
    """One rank's forward and backward of a published model, without memory or other ranks.

    It makes a process group and destroys it. Raises: RuntimeError where the process has one.
    Source: ours, on table 1's sizes.
    """
    config = GPTConfig(
        vocab_size=padded_vocab_size(VOCAB, 8, 128),
        seq_length=SEQ,
        hidden_size=model.hidden,
        num_layers=model.layers,
        num_heads=model.heads,
    )
    with simulated_ranks(model.tp), FakeTensorMode():
        gpt = ParallelGPT(config)
        tokens_BS = torch.zeros(BATCH, SEQ, dtype=torch.int64)
        with Counter() as forward:
            loss = gpt.loss(tokens_BS, tokens_BS).mean()
        with Counter() as backward:
            loss.backward()
        held = sum(p.numel() for p in gpt.parameters())
        shards = sum(p.numel() for p in gpt.sharded_parameters())
    token_bytes = 4 * tokens_BS.numel()  # one fp32 value per token
    size = model.hidden * token_bytes
    loss_bytes = sum(message.bytes for message in forward.messages if message.bytes != size)
    return DryRun(
        parameters=held + (model.tp - 1) * shards,
        held=held,
        forward=count(forward.messages, size),
        backward=count(backward.messages, size),
        loss_values=loss_bytes / token_bytes,
    )


def count(messages: list[Message], size: int) -> int:
    """All-reduces of `size` bytes."""
    return sum(message.op == "all_reduce" and message.bytes == size for message in messages)


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


def listed(values: list[float]) -> str:
    return " / ".join(f"{value:g}" for value in values)


def table_1(runs: dict[str, DryRun]) -> Iterator[Row]:
    for model in TABLE_1:
        claim = f"parameters, {model.layers} layers, H = {model.hidden}"
        formula = parameter_count(model.layers, model.hidden) / 1e9
        here = runs[model.name].parameters / 1e9
        yield Row(claim, model.name, f"{formula:.1f}B", f"{here:.1f}B")
    head_sizes = listed([model.hidden / model.heads for model in TABLE_1])
    yield Row("size of a head, the four models", "96 / 96 / 96 / 96", head_sizes)
    gpus = listed([model.gpus for model in TABLE_1])
    yield Row("GPUs with 64 replicas", gpus, listed([64 * model.tp for model in TABLE_1]))
    head_sizes = listed([3072 / heads for heads in (16, 24, 32)])
    yield Row("size of a head, 8.3B with 16, 24, 32 heads", "192 / 128 / 96", head_sizes)
    entries = f"{padded_vocab_size(VOCAB, 8, 128):,}"
    yield Row("50,257 vocabulary entries, padded for 8 ranks", "51,200", entries)


def one_rank(runs: dict[str, DryRun]) -> Iterator[Row]:
    """Collectives and memory."""
    for model in TABLE_1:
        if model.tp > 1:
            # One belongs to no layer: in forward the embedding's, in backward the output layer's.
            forward = (runs[model.name].forward - 1) / model.layers
            backward = (runs[model.name].backward - 1) / model.layers
            claim = f"all-reduces per layer, forward + backward, {model.name} on {model.tp}"
            yield Row(claim, "2 + 2", "2 + 2", f"{forward:g} + {backward:g}")
    loss_values = f"{runs['8.3B'].loss_values:g}"
    yield Row("values per token that the loss all-reduces", "–", "3", loss_values)
    for model in TABLE_1:
        formula = rank_parameter_count(model.layers, model.hidden, model.tp)
        held = runs[model.name].held
        claim = f"parameters per GPU, {model.name} on {model.tp}"
        yield Row(claim, "–", f"{formula:,}", f"{held:,}")
    memory = [state_gigabytes(runs[model.name].held) for model in TABLE_1]
    here = " / ".join(f"{gigabytes:.1f}" for gigabytes in memory)
    note = "a V100 has 32 GB" if max(memory) < 32 else ""
    yield Row("GB per GPU for weights, gradients and Adam", "–", here=here, note=note)


def trained_models() -> Iterator[Row]:
    """Sizes in tables 2 and 4. Their scores need training."""
    vocab = padded_vocab_size(VOCAB, 1, 128)
    small = parameter_count(24, 1024, vocab) / 1e6
    yield Row("parameters, GPT-2, 24 layers, H = 1024", "355M", f"{small:.0f}M")
    head_sizes = listed([1024 / 16, 1920 / 20, 3072 / 24])
    yield Row("size of a head, GPT-2 of 355M, 2.5B, 8.3B", "64 / 96 / 128", head_sizes)
    base = bert_parameter_count(24, 1024) / 1e6
    yield Row("parameters, BERT, 24 layers, H = 1024", "336M", f"{base:.0f}M")
    for printed, layers, hidden in [("1.3B", 24, 2048), ("3.9B", 48, 2560)]:
        formula = bert_parameter_count(layers, hidden) / 1e9
        claim = f"parameters, BERT, {layers} layers, H = {hidden}"
        yield Row(claim, printed, f"{formula:.1f}B")


def speed() -> Iterator[Row]:
    """Printed figures that one formula connects, and those that need GPUs.

    The abstract has 15.1 PFLOP/s and 76 % of linear scaling, section 5.1 has 74 %. 15.1 PFLOP/s are
    75.6 % of 512 times 39 TFLOP/s, so the 74 % come from another measurement.
    """
    share = f"{share_of_linear(15.1e15, 512):.0%}"
    claim = "15.1 PFLOP/s on 512 GPUs, share of linear"
    yield Row(f"{claim}, abstract", "76%", share)
    yield Row(f"{claim}, section 5.1", "74%", share, note="the paper disagrees with itself")
    # Table 2: an epoch has 68,507 steps of 512 sequences, and takes 2.10 days on 512 GPUs.
    flops = 68_507 * step_flops(72, 3072, batch=512)
    petaflops = f"{flops / (2.10 * 86_400) / 1e15:.1f}"
    note = "differs: a training run, with 24 heads"
    yield Row("8.3B, PFLOP/s from 2.10 days per epoch", "15.1", petaflops, note=note)
    yield Row("8.3B on 8 GPUs, share of linear", "77%", note="needs 8 GPUs")
    yield Row("1.2B on 2, 4, 8 GPUs, speedup", "1.64 / 2.34 / 2.98", note="needs 8 GPUs")


def later_models() -> Iterator[Row]:
    """Efficiency is parameters per GPU and second, relative to the first model's."""
    rates = []
    for model in LATER_MODELS:
        billions = parameter_count(model.layers, model.hidden) / 1e9
        rates.append(billions / (model.tp * model.milliseconds))
        claim = f"parameters, {model.layers} layers, H = {model.hidden}"
        yield Row(claim, f"{model.billions}B", f"{billions:.2f}B")
    printed = " / ".join(f"{model.efficiency}%" for model in LATER_MODELS)
    computed = " / ".join(f"{rate / rates[0]:.1%}" for rate in rates)
    yield Row("efficiency, from the printed milliseconds", printed, computed)


def tables() -> dict[str, list[Row]]:
    """Title to rows. Raises: what `paper_scale` does."""
    runs = {model.name: paper_scale(model) for model in TABLE_1}
    return {
        "Table 1 and section 5.1: models": list(table_1(runs)),
        "Section 3: one rank": list(one_rank(runs)),
        "Tables 2 and 4: trained models": list(trained_models()),
        "Abstract, section 5.1 and table 2: speed": list(speed()),
        "Version 2.0 of the same code, on V100 GPUs": list(later_models()),
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
