# SPDX-License-Identifier: MIT-0
"""NVFP4 compared with torchao's on the CPU, and the emulated linear layer with nn.Linear in fp32.

    make bench CHAPTER=08           one thread; torchao is an extra: pip install -e '.[torchao]'

The candidates run in turn on the same values. A ratio is of two neighbouring rounds, and the median
of the ratios is printed. A round trip is packed codes and scales, and back to fp32. torchao's
quantizer never lets a block's scale underflow: in tensors with flushed blocks it has other values.
Without torchao its row is left out.
"""

import argparse
import statistics
import time

import nvfp4 as nf
import torch
from torch import nn


def timed(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways in turn; the first round warms up."""
    found = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn:
                found[name].append(time.perf_counter() - begin)
    return found


def report(found: dict[str, list[float]], base: str) -> None:
    print(f"{'':34}{'time':>10}   over {base}")
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, found[base]))
        print(f"{name:34}{1e3 * statistics.median(times):7.1f} ms{ratio:10.2f} ×", flush=True)
    print()


def torchao_round_trip(x: torch.Tensor):
    """A function that quantizes x and dequantizes it, or None without torchao."""
    try:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    except ImportError:
        return None

    def way() -> torch.Tensor:
        scale = per_tensor_amax_to_scale(x.abs().max())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return way


def bench_round_trip(rounds: int) -> None:
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(x.shape)

    def ours(*options) -> torch.Tensor:
        return nf.nvfp4_dequantize(nf.nvfp4_quantize(x, *options))

    ways = {"this chapter's, 1 × 16": ours, "16 × 16": lambda: ours(True)}
    ways["stochastic"] = lambda: ours(False, uniforms)
    theirs = torchao_round_trip(x)
    if theirs is not None:
        ways["torchao, 1 × 16"] = theirs
        gap = nf.relative_error(theirs(), ours())
        print(f"torchao's values are {gap:.0e} from this chapter's\n")
    print("quantize and dequantize 2048 × 1024, packed")
    report(timed(ways, rounds), "this chapter's, 1 × 16")


def bench_layer(rounds: int) -> None:
    x = torch.randn(2048, 512)
    plain = nn.Linear(512, 512, bias=False)

    def run(layer: nn.Module):
        def way() -> None:
            leaf = x.clone().requires_grad_()
            layer(leaf).sum().backward()

        return way

    ways = {"nn.Linear, fp32": run(plain), "NVFP4Linear, emulated": run(nf.NVFP4Linear(plain))}
    ways["without stochastic rounding"] = run(nf.NVFP4Linear(plain, nf.NEAREST))
    print("forward and backward, 2,048 tokens, 512 to 512")
    report(timed(ways, rounds), "nn.Linear, fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread\n")
    bench_round_trip(args.rounds)
    bench_layer(args.rounds)


if __name__ == "__main__":
    main()
