# SPDX-License-Identifier: MIT-0
"""The five experiments of the paper's table 4: one layer's time, and the bytes that it keeps.

    make bench CHAPTER=04                        gloo on 2 ranks, one thread each, a small layer
    make bench CHAPTER=04 ARGS="--device cuda"   1, 2, 4 and 8 GPUs, as many as the machine has;
                                                 on 8 it is the 22B layer

The experiments alternate. A ratio is of two neighbouring rounds, and the median of the ratios is
printed, with the paper's for 22B on 8 A100s. A sixth row came later: the fused kernel, without
dropout, which it cannot draw from our seeds. On a GPU the layer is bf16, and memory is the
allocator's peak; on the CPU it is fp32, and memory is what autograd keeps, 4 bytes an element.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import megatron_tp as tp
import ranks
import seq_parallel as sp
import seq_parallel_tables as tables
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Experiment:
    mode: tables.Mode
    core: Callable = sp.unfused_attention
    paper: float | None = None  # the overhead over the first, for 22B


EXPERIMENTS = {
    "tensor parallelism": Experiment(tables.TP_ONLY),
    "sequence parallelism": Experiment(tables.Mode(True, "none"), paper=-0.03),
    "full recomputation": Experiment(tables.Mode(False, "full"), paper=0.39),
    "selective": Experiment(tables.Mode(False, "selective"), paper=0.07),
    "selective + sequence": Experiment(tables.BOTH, paper=0.04),
    "fused kernel + sequence": Experiment(tables.Mode(True, "none"), sp.fused_attention),
}


def layer_of(experiment: Experiment, config: sp.GPTConfig) -> torch.nn.Module:
    """Without sequence parallelism the matrices are chapter 2's, whose all-reduce overlaps."""
    mode = experiment.mode
    if mode.sequence_parallel:
        return sp.SequenceParallelLayer(config, None, mode.recompute, experiment.core)
    layer = tables.TensorParallelLayer(config, None, mode.recompute, experiment.core)
    H, F = config.hidden_size, config.ffn_hidden_size
    layer.attention.qkv = tp.ColumnParallelLinear(H, 3 * H)
    layer.attention.out = tp.RowParallelLinear(H, H)
    layer.mlp.up = tp.ColumnParallelLinear(H, F)
    layer.mlp.down = tp.RowParallelLinear(F, H)
    return layer


def measure(hidden: int, heads: int, seq: int, batch: int, rounds: int, dtype: str) -> dict:
    """By experiment: seconds forward and backward of each round, and bytes. On every rank."""
    device = ranks.device
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else dist.barrier
    layers, found = {}, {}
    for name, experiment in EXPERIMENTS.items():
        fused = experiment.core is sp.fused_attention
        sizes = {"seq_length": seq, "hidden_size": hidden, "num_heads": heads}
        with device:
            config = sp.GPTConfig(dropout=0.0 if fused else 0.1, **sizes)
            layer = layer_of(experiment, config).to(getattr(torch, dtype))
        sp.seed_dropout(layer, seed=0, step=0, tp_rank=dist.get_rank())
        tokens = seq // (dist.get_world_size() if experiment.mode.sequence_parallel else 1)
        x = torch.randn(tokens, batch, hidden, device=device, dtype=getattr(torch, dtype))
        layers[name] = layer, x.requires_grad_()
        found[name] = {"forward": [], "backward": [], "memory": 0}

    for turn in range(rounds + 1):
        for name, (layer, x) in layers.items():
            layer.zero_grad()
            x.grad = None
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            wait()
            begin = time.perf_counter()
            y = layer(x)
            wait()
            middle = time.perf_counter()
            y.backward(torch.ones_like(y))
            wait()
            if turn:  # the first round warms up
                found[name]["forward"].append(middle - begin)
                found[name]["backward"].append(time.perf_counter() - middle)
                found[name]["memory"] = torch.cuda.max_memory_allocated() - before if cuda else 0
    if not cuda:
        for name, (layer, x) in layers.items():
            found[name]["memory"] = sp.saved_bytes(partial(layer, x), layer.parameters())
    return found


def print_results(found: dict) -> None:
    print(
        "experiment                   forward   backward      total   overhead   22B, paper"
        "     memory"
    )
    totals = {}
    for name, here in found.items():
        totals[name] = [sum(pair) for pair in zip(here["forward"], here["backward"])]
    base = totals["tensor parallelism"]
    for name, here in found.items():
        overhead = statistics.median(a / b for a, b in zip(totals[name], base)) - 1
        times = ""
        for seconds in (here["forward"], here["backward"], totals[name]):
            times += f"{1e3 * statistics.median(seconds):8.1f} ms"
        paper = EXPERIMENTS[name].paper
        printed = "–" if paper is None else f"{paper:+.0%}"
        memory = f"{here['memory'] / 2**20:7.0f} MiB"
        print(f"{name:25}{times}{overhead:+11.1%}{printed:>13}{memory}", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    folders = ("tests", "tests/bench", "02_megatron_tp", "04_seq_parallel")
    ranks.PATHS[:] = [str(ROOT / folder) for folder in folders]
    cuda = args.device == "cuda"
    worlds = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if cuda else [2]
    device = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    sizes = {"hidden": 384, "heads": 4, "seq": 256, "batch": 2}
    if cuda:
        sizes = {"hidden": 6144, "heads": 64, "seq": 2048, "batch": 4}
    dtype = "bfloat16" if cuda else "float32"
    for world in worlds:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        options = {"rounds": args.rounds, "dtype": dtype}
        found = pool.run(Path(__file__).stem, "measure", sizes | options, timeout=600)[0]
        pool.close()
        print(f"one layer, {sizes}, t = {world}, {device}, torch {torch.__version__};")
        print(f"medians of {args.rounds} rounds\n")
        print_results(found)


if __name__ == "__main__":
    main()
