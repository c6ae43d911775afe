# SPDX-License-Identifier: MIT-0
"""The vocab-parallel divergence compared with gathered logits and F.kl_div: time, and peak memory.

    make bench CHAPTER=10           2 ranks, one thread each; 512 tokens, 32,768 vocabulary entries

Both run in turn, forward and backward, on the same logits. A ratio is of two neighbouring rounds,
and the median of the ratios is printed. Peak memory is what a rank's process grows by, each way in
ranks of its own.
"""

import argparse
import resource
import statistics
import sys
import time

import compress as c
import distill as d
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F

TOKENS, ENTRIES = 512, 32_768


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's shards of student and teacher."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, TOKENS, ENTRIES // dist.get_world_size())
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def gathered(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """All logits on every rank, then PyTorch's loss."""
    operators = (c._all_gather, c._take_shard)
    full = [c._Conjugate.apply(x, dist.group.WORLD, *operators) for x in (student, teacher)]
    q, p = (F.log_softmax(x, -1) for x in full)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def sharded(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return d.vocab_parallel_kl(student, teacher, dist.group.WORLD)


WAYS = {"gathered, F.kl_div": gathered, "vocab-parallel": sharded}


def once(name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    student, teacher = logits()
    dist.barrier()
    begin = time.perf_counter()
    loss = WAYS[name](student, teacher)
    loss.sum().backward()
    dist.barrier()
    return loss.detach(), student.grad, time.perf_counter() - begin


def times(rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first round warms up and compares the results."""
    found = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        results = {name: once(name) for name in WAYS}
        if turn == 0:
            (a, grad_a, _), (b, grad_b, _) = results.values()
            assert torch.allclose(a, b, rtol=1e-4) and torch.allclose(grad_a, grad_b, atol=1e-6)
            continue
        for name, (_, _, seconds) in results.items():
            found[name].append(seconds)
    return found


def peak(name: str) -> float:
    """MB that this process grows by, at its peak."""
    logits()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(name)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def on_ranks(function: str, **options) -> list:
    pool = ranks.Pool(2)
    try:
        return pool.run("10_compress", function, options, timeout=240.0)
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ranks.PATHS[:] = sys.path
    print(f"torch {torch.__version__}, 2 ranks, {TOKENS} tokens, {ENTRIES:,} entries\n")
    found = on_ranks("times", rounds=args.rounds)[0]
    base = found["vocab-parallel"]
    print(f"{'':22}{'time':>10}   over vocab-parallel   peak memory")
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base))
        grown = max(on_ranks("peak", name=name))
        time_ms = 1e3 * statistics.median(seconds)
        print(f"{name:22}{time_ms:7.1f} ms   {ratio:15.2f} ×   {grown:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
