# SPDX-License-Identifier: MIT-0
"""One layer, forward and backward, compared with torch.distributed.tensor.parallel.

    make bench CHAPTER=02                        gloo, one thread a rank
    make bench CHAPTER=02 ARGS="--device cuda"   NCCL at every tp of the machine, with TFLOP/s

Both run alternately, on the same ranks and weights. A ratio is of two neighbouring rounds, and the
median of the ratios is printed. On a GPU a third round leaves the all-reduces out: the time that it
saves is the share of communication.
"""

import argparse
import statistics
import time
from pathlib import Path

import megatron_tp as tp
import ranks
import torch
import torch.distributed as dist
from proof import plant
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

ROOT = Path(__file__).resolve().parents[2]
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the vendor
STEPS = 3  # of a round


def layer_flops(batch: int, seq: int, hidden: int) -> int:
    """24·B·S·H² in the four matrices, 4·B·S²·H in attention; backward has twice as many."""
    return 3 * (24 * batch * seq * hidden**2 + 4 * batch * seq**2 * hidden)


class Done:
    """A collective that was left out."""

    def wait(self) -> bool:
        return True


def silent(*args, async_op: bool = False, **keywords) -> Done | None:
    return Done() if async_op else None


def layers(hidden: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our sharded layer and PyTorch's, with the same weights, both compared with the plain one."""
    config = tp.GPTConfig(hidden_size=hidden, num_heads=hidden // 64, num_layers=1)
    torch.manual_seed(0)
    plain = tp.Block(config).to(device, dtype)
    torch.manual_seed(0)  # the sharded layers draw the plain layer's weights
    ours = tp.Block(config, tp.ColumnParallelLinear, tp.RowParallelLinear).to(device, dtype)
    x_BSH = torch.randn(2, 16, hidden, device=device, dtype=dtype)
    expected = plain(x_BSH).detach()
    plan = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    theirs = parallelize_module(plain, mesh, plan)
    for module in (ours, theirs):  # bf16 results differ by the order of their sums
        torch.testing.assert_close(module(x_BSH), expected, rtol=2e-2, atol=2e-2)
    return ours, theirs


def timed(module: nn.Module, x_BSH: Tensor) -> float:
    """Seconds of a step, the mean of a round."""
    dist.barrier()
    synchronize = torch.cuda.synchronize if x_BSH.is_cuda else lambda: None
    synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        module.zero_grad()
        x_BSH.grad = None
        module(x_BSH).sum().backward()
    synchronize()
    return (time.perf_counter() - begin) / STEPS


def measure(batch: int, seq: int, hidden: int, rounds: int, dtype: str) -> dict[str, list[float]]:
    """On every rank: seconds of each round, of ours, of PyTorch's, and of ours in silence."""
    width = getattr(torch, dtype)
    ours, theirs = layers(hidden, ranks.device, width)
    x_BSH = torch.randn(batch, seq, hidden, device=ranks.device, dtype=width, requires_grad=True)
    seconds = {"ours": [], "theirs": [], "silent": []}
    for _ in range(rounds + 1):
        seconds["ours"].append(timed(ours, x_BSH))
        seconds["theirs"].append(timed(theirs, x_BSH))
        with plant(dist, "all_reduce", silent):
            seconds["silent"].append(timed(ours, x_BSH))
    return {name: found[1:] for name, found in seconds.items()}  # the first round warms up


def row(sizes: tuple[int, int, int], world: int, seconds: dict, card: str) -> str:
    """One line of the table; card: the GPU's name, "" on the CPU."""
    ours, theirs, silent = (statistics.median(seconds[name]) for name in seconds)
    ratios = [t / o for t, o in zip(seconds["theirs"], seconds["ours"])]
    ratio = statistics.median(ratios)
    times = f"{ours * 1e3:6.1f} ms {theirs * 1e3:8.1f} ms"
    line = f"{sizes[2]:6} {world:4} {times} {ratio:18.2f}"
    if not card:
        return line
    flops = layer_flops(*sizes) / world / ours
    peak = next((flops / PEAK[name] for name in PEAK if name in card), float("nan"))
    return f"{line} {flops / 1e12:9.0f} {peak:9.0%} {1 - silent / ours:15.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    folders = ("tests", "tests/bench", "02_megatron_tp")
    ranks.PATHS[:] = [str(ROOT / folder) for folder in folders]
    cuda = args.device == "cuda"
    gpus = torch.cuda.device_count()
    card = torch.cuda.get_device_name() if cuda else ""
    worlds = [n for n in (1, 2, 4, 8) if n <= gpus] if cuda else [2, 4]
    shapes = [(8, 2048, 4096)] if cuda else [(4, 128, 256), (4, 128, 512)]
    where = card or "CPU, one thread a rank"
    print(f"one layer, forward + backward, {where}, torch {torch.__version__}")
    print(f"medians of {args.rounds} rounds\n")
    more = "   TFLOP/s   of peak   communication" if cuda else ""
    print("hidden   tp      ours   PyTorch's   PyTorch's / ours" + more)
    for world in worlds:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        for sizes in shapes:
            options = dict(zip(("batch", "seq", "hidden"), sizes), rounds=args.rounds)
            options["dtype"] = "bfloat16" if cuda else "float32"
            found = pool.run(Path(__file__).stem, "measure", options, timeout=600)
            print(row(sizes, world, found[0], card), flush=True)
        pool.close()


if __name__ == "__main__":
    main()
