# SPDX-License-Identifier: MIT-0
"""Vocab-parallel log-probabilities compared with gathered logits, on two ranks; and with trl's.

    make bench CHAPTER=11           two ranks of one thread each; trl is an extra

Forward and backward of 512 tokens with a vocabulary of 32,768, in fp32. The candidates run in turn
on the same values. A ratio is of two neighbouring rounds, and the median of the ratios is printed.
Peak memory is that of a rank, above what it held before the round, each way in a process of its
own. Without trl its row is left out.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable

import preference as pf
import torch
import torch.distributed as dist

TOKENS = 512
VOCAB = 32_768


def gathered(logits_Tv: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """All logits on each rank, then log_softmax."""
    logits_TV = pf._Conjugate.apply(logits_Tv, None, pf._all_gather, pf._take_shard)
    return logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]


def of_trl() -> Callable | None:
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        return None
    return selective_log_softmax


def inputs(world: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(TOKENS, VOCAB, generator=generator)
    targets_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return logits_TV.chunk(world, -1)[rank].clone().requires_grad_(), targets_T


def peak(way: Callable, arguments: tuple) -> float:
    """MB above what the process held."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    way(*arguments).sum().backward()
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def timed(ways: dict, arguments: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways in turn; the first round warms up."""
    found = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            arguments[0].grad = None
            begin = time.perf_counter()
            way(*arguments).sum().backward()
            if turn:
                found[name].append(time.perf_counter() - begin)
    return found


def serve(rank: int, world: int, store: str, names: list[str], rounds: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    known = {"this chapter's": pf.vocab_parallel_log_probs, "gathered logits": gathered}
    ways = {name: known.get(name) or of_trl() for name in names}
    arguments = inputs(world, rank)
    found = timed(ways, arguments, rounds) if rounds else None
    memory = peak(ways[names[0]], arguments)
    if rank == 0:
        queue.put((found, memory))
    dist.barrier()


def on_ranks(world: int, names: list[str], rounds: int):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", names, rounds, queue)
        ranks = [context.Process(target=serve, args=(r, *arguments)) for r in range(world)]
        for process in ranks:
            process.start()
        found = queue.get(timeout=300)
        for process in ranks:
            process.join()
    return found


def report(world: int, names: list[str], rounds: int) -> None:
    found, _ = on_ranks(world, names, rounds)
    print(f"{world} ranks, {TOKENS} tokens, {VOCAB} entries, forward and backward")
    print(f"{'':24}{'time':>10}   over this chapter's   peak memory of a rank")
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, found[names[0]]))
        _, memory = on_ranks(world, [name], 0)
        middle = 1e3 * statistics.median(times)
        print(f"{name:24}{middle:7.1f} ms{ratio:17.2f} ×{memory:17.0f} MB", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, one thread a rank\n")
    report(2, ["this chapter's", "gathered logits"], args.rounds)
    names = ["this chapter's", "gathered logits"]
    if of_trl() is not None:
        names.append("trl")
    report(1, names, args.rounds)


if __name__ == "__main__":
    main()
