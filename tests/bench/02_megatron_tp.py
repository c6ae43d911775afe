# SPDX-License-Identifier: MIT-0
"""One layer, forward and backward, beside PyTorch's own tensor parallelism (torch.distributed.tensor.parallel).

    make bench CHAPTER=02                        gloo, one thread a rank
    make bench CHAPTER=02 ARGS="--device cuda"   NCCL at every tp that the machine has, with TFLOP/s and share of peak

The two run in turn, in the same ranks and on the same weights; a ratio is of two neighbouring rounds, and the median of
the ratios is printed. On a GPU a third round leaves the all-reduces out: what it saves is the share of communication.
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

ROOT = Path(__file__).resolve().parents[2]
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, as the vendor states them


def layer_flops(batch: int, seq: int, hidden: int) -> int:
    """Of a layer, both ways: 24·B·S·H² in its four matrices and 4·B·S²·H in attention, and twice that back."""
    return 3 * (24 * batch * seq * hidden**2 + 4 * batch * seq**2 * hidden)


def measure(batch: int, seq: int, hidden: int, rounds: int, dtype: str) -> dict[str, list[float]]:
    """On every rank: seconds of each round, of ours, of PyTorch's, and of ours without communication."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world, rank, device, dtype = dist.get_world_size(), dist.get_rank(), ranks.device, getattr(torch, dtype)
    config = tp.GPTConfig(hidden_size=hidden, num_heads=hidden // 64, num_layers=1)
    torch.manual_seed(0)
    plain = tp.Block(config, tp.Attention(config), tp.MLP(config)).to(device, dtype)
    matrices = tp.parallel_matrices()
    ours = tp.Block(config, tp.Attention(config, *matrices), tp.MLP(config, *matrices)).to(device, dtype)
    shares = {}
    for name, whole in plain.state_dict().items():
        dim = tp.shard_dim("x." + name)
        shares[name] = whole if dim is None else whole.chunk(world, dim)[rank]
    ours.load_state_dict(shares)
    x_BSH = torch.randn(batch, seq, hidden, device=device, dtype=dtype, requires_grad=True)
    expected = plain(x_BSH, tp.RandomStreams()).detach()
    plan = {"attention.qkv": ColwiseParallel(), "attention.out": RowwiseParallel()}
    plan |= {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    theirs = parallelize_module(plain, init_device_mesh(device.type, (world,)), plan)
    for module in (ours, theirs):  # both compute the same; narrow types differ by the order of their sums
        torch.testing.assert_close(module(x_BSH, tp.RandomStreams()), expected, rtol=2e-2, atol=2e-2)

    def step(module) -> None:
        module.zero_grad()
        x_BSH.grad = None
        module(x_BSH, tp.RandomStreams()).sum().backward()

    def timed(module) -> float:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(3):
            step(module)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / 3

    def silent(*args, async_op=False, **kwargs):
        class Done:
            def wait(self):
                return True

        return Done() if async_op else None

    seconds = {"ours": [], "theirs": [], "silent": []}
    for turn in range(rounds + 1):
        found = {"ours": timed(ours), "theirs": timed(theirs)}
        with plant(dist, "all_reduce", silent):
            found["silent"] = timed(ours)
        for name in seconds if turn else ():  # the first round warms up
            seconds[name].append(found[name])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/bench", "02_megatron_tp")]
    cuda = args.device == "cuda"
    worlds = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if cuda else [2, 4]
    sizes = [(8, 2048, 4096)] if cuda else [(4, 128, 256), (4, 128, 512)]
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    print(f"one layer, forward + backward, {name}, torch {torch.__version__}; medians of {args.rounds} rounds\n")
    print(
        "hidden   tp      ours   PyTorch's   PyTorch's / ours"
        + ("   TFLOP/s   of peak   communication" if cuda else "")
    )
    for world in worlds:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        for batch, seq, hidden in sizes:
            kwargs = dict(
                batch=batch, seq=seq, hidden=hidden, rounds=args.rounds, dtype="bfloat16" if cuda else "float32"
            )
            seconds = pool.run(Path(__file__).stem, "measure", kwargs, timeout=600)[0]
            ours, theirs, silent = (statistics.median(seconds[name]) for name in ("ours", "theirs", "silent"))
            ratio = statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"]))
            line = f"{hidden:6} {world:4} {ours * 1e3:6.1f} ms {theirs * 1e3:8.1f} ms {ratio:18.2f}"
            if cuda:
                flops = layer_flops(batch, seq, hidden) / world / ours
                peak = next((flops / PEAK[card] for card in PEAK if card in name), float("nan"))
                line += f"{flops / 1e12:10.0f} {peak:9.0%} {1 - silent / ours:15.0%}"
            print(line, flush=True)
        pool.close()


if __name__ == "__main__":
    main()
