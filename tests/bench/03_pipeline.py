# SPDX-License-Identifier: MIT-0
"""A pipeline step next to PyTorch's own (torch.distributed.pipelining), and the bubble in time.

    make bench CHAPTER=03                        gloo, one thread a rank
    make bench CHAPTER=03 ARGS="--device cuda"   NCCL, on as many stages as there are GPUs

The two run in turn, in the same ranks and on the same weights; a ratio is of two neighbouring
rounds, and the median of the ratios is printed. For the bubble every operation sleeps, so that two
cores are enough for four ranks.
"""

import argparse
import statistics
import time
from pathlib import Path

import pipeline as pl
import ranks
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
}


class Chunk(torch.nn.Module):
    """One stage as PyTorch wants it: a module that is called with a tensor alone."""

    def __init__(self, stage: pl.PipelineStage, index: int):
        super().__init__()
        self.stage = stage
        self.index = index

    def forward(self, x):
        return self.stage(self.index, x)


def measure(kind: str, rounds: int, hidden: int, seq: int, layers: int, batch: int, m: int) -> dict:
    """On every rank: seconds of each round, ours and PyTorch's; the gap of their gradients."""
    from torch.distributed import pipelining

    world, rank, device = dist.get_world_size(), dist.get_rank(), ranks.device
    name, chunks = KINDS[kind]
    config = pl.GPTConfig(
        hidden_size=hidden, num_heads=4, seq_length=seq, num_layers=layers, untied=True
    )
    mesh = pl.make_mesh(world, device)
    ours, theirs = (pl.PipelineStage(config, rank, world, chunks).to(device) for _ in range(2))
    program = pl.programs(pl.schedule(kind, world, m, chunks))[rank]
    generator = torch.Generator().manual_seed(0)
    tokens_BS, targets_BS = torch.randint(256, (2, batch, seq), generator=generator).to(device)
    indices = range(rank, world * chunks, world)
    stages = [
        pipelining.PipelineStage(Chunk(theirs, index), index, world * chunks, device)
        for index in indices
    ]

    def loss_of(logits_BSV, targets_BS):
        return pl.token_losses(logits_BSV, targets_BS).sum() / (batch * seq)

    schedule = getattr(pipelining, name)(
        stages if chunks > 1 else stages[0], m, loss_fn=loss_of, scale_grads=False
    )

    def step(own: bool) -> None:
        if own:
            ours.zero_grad()
            pl.run_step(ours, program, tokens_BS, targets_BS, mesh)
        else:
            theirs.zero_grad()
            inputs = (tokens_BS,) if rank == 0 else ()
            outputs = dict(target=targets_BS, losses=[]) if rank == world - 1 else {}
            schedule.step(*inputs, **outputs)

    def timed(own: bool) -> float:
        dist.barrier()
        begin = time.perf_counter()
        step(own)
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = {"ours": [], "theirs": []}
    for turn in range(rounds + 2):
        order = (True, False) if turn % 2 else (False, True)
        found = {("ours" if own else "theirs"): timed(own) for own in order}
        for key in seconds if turn > 1 else ():  # the first rounds warm up
            seconds[key].append(found[key])
    pairs = zip(ours.parameters(), theirs.parameters())
    gap = max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in pairs)
    return dict(seconds, gap=gap)


class Sleeper(torch.autograd.Function):
    """Forward sleeps, and backward twice as long."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


def sleep_through(kind: str, m: int, chunks: int, seconds: float) -> float:
    """On every rank: the bubble of a step whose operations sleep, from the time of the step."""
    mesh = pl.make_mesh(dist.get_world_size(), ranks.device)
    config = pl.GPTConfig(hidden_size=8, num_heads=1, seq_length=4, num_layers=mesh.pp * chunks)
    stage = pl.PipelineStage(config, mesh.pp_rank, mesh.pp, chunks)
    plain = pl.PipelineStage.forward
    stage.forward = lambda index, x: Sleeper.apply(plain(stage, index, x), seconds / chunks)
    program = pl.programs(pl.schedule(kind, mesh.pp, m, chunks))[mesh.pp_rank]
    tokens_BS = torch.zeros(m, 4, dtype=torch.int64)
    bubbles = []
    for _ in range(3):
        stage.zero_grad()
        dist.barrier()
        begin = time.perf_counter()
        pl.run_step(stage, program, tokens_BS, tokens_BS, mesh)
        dist.barrier()
        bubbles.append((time.perf_counter() - begin) / (m * 3 * seconds) - 1)
    return min(bubbles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/bench", "03_pipeline")]
    cuda = args.device == "cuda"
    world = min(4, torch.cuda.device_count()) if cuda else 4
    sizes = (
        dict(hidden=2048, seq=1024, layers=16, batch=16, m=8)
        if cuda
        else dict(hidden=128, seq=64, layers=8, batch=16, m=8)
    )
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    print(
        f"a step of {world} stages, {sizes}, {name}, torch {torch.__version__}; "
        f"medians of {args.rounds} rounds\n"
    )
    print("schedule          ours   PyTorch's   ours / PyTorch's   gradients apart")
    pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
    for kind in KINDS:
        results = pool.run(
            Path(__file__).stem,
            "measure",
            dict(kind=kind, rounds=args.rounds, **sizes),
            timeout=600,
        )
        ours, theirs = results[0]["ours"], results[0]["theirs"]
        ratio, gap = (
            statistics.median(o / t for o, t in zip(ours, theirs)),
            max(r["gap"] for r in results),
        )
        times = f"{statistics.median(ours) * 1e3:8.1f} ms {statistics.median(theirs) * 1e3:8.1f} ms"
        print(f"{kind:12} {times} {ratio:18.2f} {gap:17.0e}", flush=True)
    pool.close()

    print(
        "\nbubble of 4 stages whose operations sleep 60 and 120 ms\n"
        "schedule       m   v   measured   formula"
    )
    pool = ranks.Pool(4)
    for kind, m, chunks in (
        ("gpipe", 8, 1),
        ("1f1b", 8, 1),
        ("1f1b", 16, 1),
        ("interleaved", 8, 2),
    ):
        kwargs = dict(kind=kind, m=m, chunks=chunks, seconds=0.06)
        found = max(pool.run(Path(__file__).stem, "sleep_through", kwargs, timeout=120))
        print(f"{kind:12} {m:3} {chunks:3} {found:10.3f} {3 / (m * chunks):9.4f}", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
