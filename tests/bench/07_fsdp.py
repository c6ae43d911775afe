# SPDX-License-Identifier: MIT-0
"""A step with sharded parameters next to torch.distributed.fsdp.fully_shard.

    make bench CHAPTER=07                        gloo on 2 and on 4 ranks, one thread each
    make bench CHAPTER=07 ARGS="--device cuda"   2 and 4 GPUs, as many as the machine has

The same feed-forward model in fp32, sharded layer by layer, the same batches, clipping at 1.0,
fused AdamW in both. The two alternate; a ratio is of neighbouring steps, and the median is printed.
`apart` is the largest difference of a gradient in the first step, relative to its parameter's
largest gradient.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import fsdp
import ranks
import torch
import torch.distributed as dist
import zero_3d as z
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


def network(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = []
    for _ in range(layers):
        up, down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        blocks.append(nn.Sequential(nn.LayerNorm(hidden), up, nn.GELU(), down))
    return nn.Sequential(*blocks).to(ranks.device)


def ours(hidden: int, layers: int) -> tuple[Callable, Callable]:
    """A step, and what gathers the gradients of the last one."""
    model = network(hidden, layers)
    sharded = fsdp.FullySharded(model, list(model), dist.group.WORLD)

    def adamw(groups: list[dict]) -> torch.optim.Optimizer:  # all parameters decay
        pieces = [piece for group in groups for piece in group["params"]]
        return torch.optim.AdamW(pieces, **SETTINGS)

    optimizer = fsdp.FSDPOptimizer(sharded, adamw)
    mesh = z.ParallelMesh(dp=dist.get_world_size(), dp_group=dist.group.WORLD)

    def step(x: Tensor) -> None:
        sharded.zero_grad()
        model(x).square().mean().backward()
        z.finalize_model_grads(optimizer, mesh, torch.ones((), device=x.device))
        z.clip_grad_norm_(optimizer, 1.0, mesh)
        optimizer.step()

    def gradients() -> list[Tensor]:
        found = []
        for unit in sharded.units:
            full = torch.empty(len(unit.full), device=ranks.device)
            z.start_all_gather(full, unit.grad, unit.group).wait()
            for name, start in unit.starts.items():
                shape = unit.views[name].shape
                found.append(full[start : start + shape.numel()].view(shape))
        return found

    return step, gradients


def torchs(hidden: int, layers: int) -> tuple[Callable, Callable]:
    model = network(hidden, layers)
    mesh = init_device_mesh(ranks.device.type, (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def gradients() -> list[Tensor]:
        return [p.grad.full_tensor() for p in model.parameters()]

    return step, gradients


def measure(hidden: int, layers: int, rows: int, rounds: int) -> dict:
    """On every rank: seconds of each step, and the largest difference of a gradient."""
    warnings.filterwarnings("ignore")
    made = {"ours": ours(hidden, layers), "fully_shard": torchs(hidden, layers)}
    generator = torch.Generator().manual_seed(dist.get_rank())
    seconds = {name: [] for name in made}
    apart = None
    for turn in range(rounds + 3):
        x = torch.randn(rows, hidden, generator=generator).to(ranks.device)
        order = list(made) if turn % 2 else list(reversed(made))
        for name in order:
            dist.barrier()
            begin = time.perf_counter()
            made[name][0](x)
            dist.barrier()
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - begin)
        if turn == 0:
            pairs = zip(made["ours"][1](), made["fully_shard"][1]())
            apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return dict(seconds=seconds, apart=apart)


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
    print("ranks                    step   ours / it   apart")
    for world in worlds:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        try:
            kwargs = dict(rounds=args.rounds, **sizes)
            result = pool.run(Path(__file__).stem, "measure", kwargs, timeout=600)[0]
        finally:
            pool.close()
        times = result["seconds"]
        for kind, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["ours"], found))
            gap = f"{result['apart']:.0e}" if kind == "ours" else ""
            step = f"{statistics.median(found) * 1e3:8.1f} ms"
            print(f"{world:5}  {kind:11}{step} {ratio:11.2f} {gap:>7}")


if __name__ == "__main__":
    main()
