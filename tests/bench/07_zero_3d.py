# SPDX-License-Identifier: MIT-0
"""A step of the sharded optimizer next to torch's: ZeroRedundancyOptimizer, and DDP with AdamW.

    make bench CHAPTER=07                        gloo on 2 and on 4 ranks, one thread each
    make bench CHAPTER=07 ARGS="--device cuda"   2 and 4 GPUs, as many as the machine has

The same feed-forward model in fp32 on replicas, the same batches, clipping at 1.0, fused AdamW in
each. The three alternate; a ratio is of neighbouring steps, and the median is printed, with the
bytes of optimizer state on the rank that has the most.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import zero_3d as z
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


def network(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = []
    for _ in range(layers):
        up, down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        blocks.append(nn.Sequential(nn.LayerNorm(hidden), up, nn.GELU(), down))
    return nn.Sequential(*blocks).to(ranks.device)


def ours(hidden: int, layers: int) -> tuple[nn.Module, Callable, Callable]:
    """The model, a step, and the bytes of its state."""
    model = network(hidden, layers)
    buffer = z.ParamAndGradBuffer(model.named_parameters(), dist.group.WORLD, 2_000_000)

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:  # as the others: all parameters decay
        pieces = [piece for group in groups for piece in group["params"]]
        return torch.optim.AdamW(pieces, **SETTINGS)

    optimizer = z.DistributedOptimizer(buffer, adamw)
    # A mesh of replicas alone: no parameter is sharded over tp, and none is tied.
    mesh = z.ParallelMesh(dp=dist.get_world_size(), dp_group=dist.group.WORLD)

    def step(x: Tensor) -> None:
        buffer.zero_grad()
        buffer.is_last_microbatch = True
        model(x).square().mean().backward()
        z.finalize_model_grads(optimizer, mesh, torch.ones((), device=x.device))
        z.clip_grad_norm_(optimizer, 1.0, mesh)
        optimizer.step()

    def state() -> int:
        moments = [optimizer.optimizer.state[piece.master] for piece in optimizer.pieces]
        return sum(x.nbytes for found in moments for x in found.values() if x.ndim)

    return model, step, state


def torchs(hidden: int, layers: int, sharded: bool) -> tuple[nn.Module, Callable, Callable]:
    model = network(hidden, layers)
    replica = DistributedDataParallel(model)
    if sharded:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **SETTINGS)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        replica(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def state() -> int:
        local = optimizer.optim if sharded else optimizer
        return sum(x.nbytes for found in local.state.values() for x in found.values() if x.ndim)

    return model, step, state


def measure(hidden: int, layers: int, rows: int, rounds: int) -> dict:
    """On every rank: seconds of each step, the bytes of state, the number of parameters."""
    warnings.filterwarnings("ignore")
    made = {
        "ours": ours(hidden, layers),
        "ZeroRedundancyOptimizer": torchs(hidden, layers, sharded=True),
        "DDP and AdamW": torchs(hidden, layers, sharded=False),
    }
    generator = torch.Generator().manual_seed(dist.get_rank())
    seconds = {name: [] for name in made}
    for turn in range(rounds + 3):
        x = torch.randn(rows, hidden, generator=generator).to(ranks.device)
        order = list(made) if turn % 2 else list(reversed(made))
        for name in order:
            dist.barrier()
            begin = time.perf_counter()
            made[name][1](x)
            dist.barrier()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - begin)
    parameters = sum(p.numel() for p in made["ours"][0].parameters())
    reference = list(made["DDP and AdamW"][0].parameters())
    pairs = zip(made["ours"][0].parameters(), reference)
    gap = max((a - b).abs().max().item() for a, b in pairs)
    bytes_of = {name: state() for name, (_, _, state) in made.items()}
    return dict(seconds=seconds, bytes=bytes_of, parameters=parameters, gap=gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/bench", "07_zero_3d")]
    cuda = args.device == "cuda"
    sizes = dict(hidden=2048, layers=12, rows=4096) if cuda else dict(hidden=384, layers=4, rows=32)
    worlds = [n for n in (2, 4) if not cuda or n <= torch.cuda.device_count()]
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    print(f"{sizes}, {name}, torch {torch.__version__}; medians of {args.rounds} rounds\n")
    print("ranks                             step   ours / it   state, MB   of 8·P/ranks   apart")
    for world in worlds:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        try:
            kwargs = dict(rounds=args.rounds, **sizes)
            results = pool.run(Path(__file__).stem, "measure", kwargs, timeout=600)
        finally:
            pool.close()
        times = results[0]["seconds"]
        ideal = 8 * results[0]["parameters"] / world  # the masters are the fp32 parameters
        for kind, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["ours"], found))
            most = max(result["bytes"][kind] for result in results)
            gap = f"{results[0]['gap']:.0e}" if kind == "ours" else ""
            step = f"{statistics.median(found) * 1e3:8.1f} ms"
            state = f"{most / 1e6:11.2f} {most / ideal:14.3f}"
            print(f"{world:5}  {kind:24}{step} {ratio:11.2f} {state} {gap:>7}")


if __name__ == "__main__":
    main()
