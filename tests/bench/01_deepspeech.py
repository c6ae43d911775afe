# SPDX-License-Identifier: MIT-0
"""The CTC loss, the ring and the recurrence, each next to what a person would use instead:
PyTorch's native loss, dist.all_reduce, and autograd through the plain loop.

    make bench CHAPTER=01                        gloo, one thread a rank
    make bench CHAPTER=01 ARGS="--device cuda"   CTC on the GPU; NCCL with two GPUs or more

The two run in turn; a ratio is of two neighbouring rounds, and the median of the ratios is
printed.
"""

import argparse
import statistics
import time
from pathlib import Path

import deepspeech as ds
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]


def alternate(ours, theirs, rounds: int, cuda: bool = False) -> tuple[float, float, float]:
    """Milliseconds of each, and ours over theirs: medians of the rounds after the first."""

    def timed(function) -> float:
        begin = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds + 1)][1:]
    return *(statistics.median(times) for times in zip(*pairs)), statistics.median(
        a / b for a, b in pairs
    )


def bench_ctc(device: torch.device, rounds: int) -> None:
    T, B, V, U = 150, 64, 28, 40
    logits_TBV = torch.randn(T, B, V, generator=torch.Generator().manual_seed(0)).to(device)
    labels_BU = torch.randint(1, V, (B, U), generator=torch.Generator().manual_seed(1)).to(device)
    full = torch.full((B,), T), torch.full((B,), U)
    generator = torch.Generator().manual_seed(2)
    ragged = (
        torch.randint(100, T + 1, (B,), generator=generator),
        torch.randint(5, U + 1, (B,), generator=generator),
    )
    for name, lengths in (("full lengths", full), ("ragged lengths", ragged)):

        def run(loss, lengths=lengths):
            x_TBV = logits_TBV.clone().requires_grad_()
            loss(x_TBV.log_softmax(-1), labels_BU, *(n.to(device) for n in lengths)).backward()
            return x_TBV.grad

        torch.testing.assert_close(run(ds.ctc_loss), run(F.ctc_loss), rtol=1e-3, atol=1e-6)  # fp32
        show(
            f"CTC, {name}",
            *alternate(
                lambda: run(ds.ctc_loss), lambda: run(F.ctc_loss), rounds, device.type == "cuda"
            ),
        )


def bench_recurrence(device: torch.device, rounds: int) -> None:
    x_T2BH, weight_2HH = (
        torch.randn(105, 2, 16, 128, device=device),
        torch.randn(2, 128, 128, device=device) * 0.03,
    )

    def run(recurrence):
        leaves = x_T2BH.clone().requires_grad_(), weight_2HH.clone().requires_grad_()
        recurrence(*leaves).sum().backward()

    pair = (lambda: run(ds.clipped_recurrence)), (lambda: run(ds.plain_recurrence))
    show("recurrence, T = 105, B = 16, H = 128", *alternate(*pair, rounds, device.type == "cuda"))


def measure_ring(size: int, rounds: int) -> tuple[float, float, float]:
    """On every rank: milliseconds of the ring and of dist.all_reduce, and their ratio."""
    x = torch.ones(size // 4, device=ranks.device)

    def both(function):
        dist.barrier()
        function(x)
        x.fill_(1)

    return alternate(
        lambda: both(ds.ring_all_reduce), lambda: both(dist.all_reduce), rounds, x.is_cuda
    )


def show(name: str, ours: float, theirs: float, ratio: float) -> None:
    print(f"{name:40} {ours:10.2f} ms {theirs:10.2f} ms {ratio:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ranks.PATHS[:] = [str(ROOT / folder) for folder in ("tests", "tests/bench", "01_deepspeech")]
    torch.set_num_threads(1)
    cuda, device = args.device == "cuda", torch.device(args.device)
    name = torch.cuda.get_device_name() if cuda else "CPU, one thread a rank"
    print(
        f"forward + backward, {name}, torch {torch.__version__}; medians of {args.rounds} rounds\n"
    )
    print(f"{'':40} {'ours':>13} {'PyTorch’s':>13} {'ours / PyTorch’s':>8}")
    bench_ctc(device, args.rounds)
    bench_recurrence(device, args.rounds)
    for world in [n for n in (2, 4, 8) if n <= torch.cuda.device_count()] if cuda else [2, 4]:
        pool = ranks.Pool(world, args.device, "nccl" if cuda else "gloo")
        for power in (10, 14, 18, 22, 26):
            kwargs = dict(size=1 << power, rounds=args.rounds)
            result = pool.run(Path(__file__).stem, "measure_ring", kwargs, timeout=600)[0]
            show(f"sum of {(1 << power) // 1024:,} KB on {world} ranks", *result)
        pool.close()


if __name__ == "__main__":
    main()
