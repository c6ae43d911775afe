# SPDX-License-Identifier: MIT-0
"""The five experiments of the paper's table 4: one layer's time forward and backward, and what it keeps.

    make bench CHAPTER=04                        gloo on 2 ranks, one thread each, a small layer
    make bench CHAPTER=04 ARGS="--device cuda"   every number of GPUs up to 8 that the machine has; on 8 the 22B layer

The experiments run in turn; a ratio is of two neighbouring rounds, and the median of the ratios is printed, beside the
paper's for 22B on 8 A100s. A sixth row is what came later: the fused kernel, which the paper's layers did not have; it
runs without dropout, because it draws its own. On a GPU the layer runs in bf16, and memory is the allocator's peak over
what was there before; on the CPU it runs in fp32, and memory is what autograd keeps, at 4 bytes a number and not 2.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import ranks
import seq_parallel as sp
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
#              name                       SP, recomputation, core,          the paper's overhead
EXPERIMENTS = {
    "tensor parallelism": (False, "none", "unfused", None),
    "sequence parallelism": (True, "none", "unfused", -0.03),
    "full recomputation": (False, "full", "unfused", 0.39),
    "selective": (False, "selective", "unfused", 0.07),
    "selective + sequence": (True, "selective", "unfused", 0.04),
    "fused kernel + sequence": (True, "none", "fused", None),
}


def measure(hidden: int, heads: int, seq: int, batch: int, rounds: int, dtype: str) -> dict:
    """On every rank, by experiment: seconds forward and backward of each round, and bytes of memory."""
    device, dtype, t, found = ranks.device, getattr(torch, dtype), dist.get_world_size(), {}
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else dist.barrier
    layers = {}
    for name, (sequence_parallel, recompute, core, _) in EXPERIMENTS.items():
        sizes = dict(
            seq_length=seq,
            hidden_size=hidden,
            num_heads=heads,
            dropout=0.0 if core == "fused" else 0.1,
        )
        core = getattr(sp, core + "_attention")
        with device:
            layer = sp.SequenceParallelLayer(
                sp.GPTConfig(**sizes), None, sequence_parallel, recompute, core
            ).to(dtype)
        tokens = seq // t if sequence_parallel else seq
        x = torch.randn(tokens, batch, hidden, device=device, dtype=dtype, requires_grad=True)
        layers[name] = layer, x, sp.random_streams(0, dist.get_rank(), sequence_parallel, device)
        found[name] = dict(forward=[], backward=[], memory=0)

    for turn in range(rounds + 1):
        for name, (layer, x, streams) in layers.items():
            layer.zero_grad()
            x.grad = None
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            wait()
            begin = time.perf_counter()
            y = layer(x, streams)
            wait()
            middle = time.perf_counter()
            y.backward(torch.ones_like(y))
            wait()
            if turn:  # the first round warms up
                found[name]["forward"].append(middle - begin)
                found[name]["backward"].append(time.perf_counter() - middle)
                found[name]["memory"] = torch.cuda.max_memory_allocated() - before if cuda else 0
    if not cuda:
        for name, (layer, x, streams) in layers.items():
            saved = sp.saved_bytes(partial(layer, x, streams), layer.parameters())
            found[name]["memory"] = sum(kept.bytes for kept in saved)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/bench", "04_seq_parallel")]
    cuda = args.device == "cuda"
    worlds = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if cuda else [2]
    device = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    for world in worlds:
        sizes = (
            dict(hidden=6144, heads=64, seq=2048, batch=4)
            if cuda
            else dict(hidden=384, heads=4, seq=256, batch=2)
        )
        kwargs = sizes | dict(rounds=args.rounds, dtype="bfloat16" if cuda else "float32")
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        found = pool.run(Path(__file__).stem, "measure", kwargs, timeout=600)[0]
        pool.close()
        base = found["tensor parallelism"]
        print(
            f"one layer, {sizes}, t = {world}, {device}, torch {torch.__version__}; medians of {args.rounds} rounds\n"
        )
        print(
            "experiment                   forward   backward      total   overhead   22B, paper     memory"
        )
        for name, (*_, paper) in EXPERIMENTS.items():
            here = found[name]
            total, of_base = (
                [a + b for a, b in zip(run["forward"], run["backward"])] for run in (here, base)
            )
            overhead = statistics.median(a / b for a, b in zip(total, of_base)) - 1
            times = "".join(
                f"{1e3 * statistics.median(x):8.1f} ms"
                for x in (here["forward"], here["backward"], total)
            )
            beside = f"{paper:+.0%}" if paper is not None else "–"
            print(
                f"{name:25}{times}{overhead:+11.1%}{beside:>13}{here['memory'] / 2**20:7.0f} MiB",
                flush=True,
            )
        print()


if __name__ == "__main__":
    main()
