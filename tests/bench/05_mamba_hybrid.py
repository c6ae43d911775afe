# SPDX-License-Identifier: MIT-0
"""The scan and the mixer next to transformers' Mamba-2 in plain PyTorch, and next to attention.

    make bench CHAPTER=05                        one CPU thread, fp32
    make bench CHAPTER=05 ARGS="--device cuda"   to 128K tokens, also under torch.compile

All work on the same tensors. Two run in turn; a ratio is of two neighbouring rounds, and the median
of the ratios is printed. Peak memory is what a forward and backward pass needs beyond its inputs:
on a GPU the allocator's, on the CPU counted by a dispatch mode.
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial

import fast_scan
import mamba_hybrid as mh
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """`with Peak() as peak:` keeps in peak.bytes the most that storages made inside hold."""

    def __enter__(self):
        self.now = 0
        self.bytes = 0
        self.seen = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                self.seen[storage._cdata] = weakref.finalize(
                    storage, self._free, storage._cdata, size
                )
                self.now += size
                self.bytes = max(self.bytes, self.now)
        return out

    def _free(self, key, size):
        self.now -= size
        self.seen.pop(key, None)


def once(function, inputs: list[torch.Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    y = function(*leaves)
    wait()
    middle = time.perf_counter()
    y.backward(torch.ones_like(y))
    wait()
    return middle - begin, time.perf_counter() - middle


def peak(function, inputs, device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(function, inputs, device)
        return torch.cuda.max_memory_allocated() - before
    with Peak() as found:
        once(function, inputs, device)
    return found.bytes


def compare(
    name: str,
    ours: Callable,
    theirs: Callable,
    inputs: list[torch.Tensor],
    device: torch.device,
    rounds: int,
) -> None:
    """Prints a row: times, theirs / ours, peaks, ours / theirs."""
    pairs = []
    for _ in range(rounds + 1):
        here = sum(once(ours, inputs, device))
        there = sum(once(theirs, inputs, device))
        pairs.append((1e3 * here, 1e3 * there))
    pairs = pairs[1:]  # the first round warms up
    here, there = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    memory = [peak(form, inputs, device) / 2**20 for form in (ours, theirs)]
    row = f"{name:38}{here:8.0f} ms{there:9.0f} ms{ratio:13.2f}×"
    row += f"{memory[0]:8.0f} MiB{memory[1]:8.0f} MiB{memory[0] / memory[1]:8.2f}"
    print(row, flush=True)


def scan_inputs(T: int, H: int, P: int, G: int, N: int, device: torch.device) -> list[torch.Tensor]:
    """x, dt, A, B, C and D of one sequence."""
    generator = torch.Generator().manual_seed(0)
    of_random = partial(torch.randn, generator=generator)
    x = of_random(1, T, H, P)
    dt = 0.05 * of_random(1, T, H).sigmoid() + 0.002
    A = -1 - 15 * of_random(H).sigmoid()
    B = of_random(1, T, G, N)
    C = of_random(1, T, G, N)
    D = of_random(H)
    return [tensor.to(device) for tensor in (x, dt, A, B, C, D)]


def of_tokens(
    scan: Callable,
    chunk: int,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """What `Mamba2Mixer` does around a scan."""
    y, _ = scan(dt[..., None] * x, mh.log_decay(dt, A), B, C, chunk)
    return y + D[:, None] * x


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def scans(their_scan: Callable, device: torch.device, rounds: int) -> None:
    """Rows of the scan: next to transformers', and next to the one with a backward by hand."""
    for H, P, G, N, chunk in ((8, 64, 1, 128, 256), (8, 64, 1, 128, 128), (16, 32, 2, 64, 128)):

        def theirs(x, dt, A, B, C, D, chunk=chunk):
            return their_scan(x, dt, A, B, C, chunk, D=D)

        name = f"H {H} P {P} G {G} N {N} Q {chunk}"
        inputs = scan_inputs(4096, H, P, G, N, device)
        ours = partial(of_tokens, mh.ssd, chunk)
        fast = partial(of_tokens, fast_scan.fast_ssd, chunk)
        compare(f"scan, {name}", ours, theirs, inputs, device, rounds)
        compare("      next to fast_scan.py", ours, fast, inputs, device, rounds)


def attention(device: torch.device, all_rounds: int) -> None:
    """Rows of lengths: the scan next to causal attention, on a GPU also compiled."""
    cuda = device.type == "cuda"
    scan = partial(of_tokens, mh.ssd, 256)
    compiled = torch.compile(scan) if cuda else None
    for T in [2**k for k in range(10, 18 if cuda else 15)]:
        inputs = scan_inputs(T, 8, 64, 1, 64, device)
        qkv = list(torch.randn(3, 1, 8, T, 64, device=device))
        rounds = max(3, all_rounds // (1 if T < 8192 else 2))
        pairs = []
        for _ in range(rounds + 1):
            pairs.append((sum(once(scan, inputs, device)), sum(once(attend, qkv, device))))
        pairs = pairs[1:]
        times = [1e3 * statistics.median(column) for column in zip(*pairs)]
        ratio = statistics.median(b / a for a, b in pairs)
        line = f"{T:6,}{times[0]:9.0f} ms{times[1]:9.0f} ms{ratio:16.2f}"
        line += f"{peak(scan, inputs, device) / 2**20:19.0f}"
        if cuda:
            again = [sum(once(compiled, inputs, device)) for _ in range(rounds + 1)]
            line += f"{1e3 * statistics.median(again):9.0f} ms"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    cuda = args.device == "cuda"
    import transformers
    from transformers.models.nemotron_h import modeling_nemotron_h as published

    transformers.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if cuda else "CPU, one thread"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"forward + backward, fp32, medians of {args.rounds} rounds; B 1, T 4,096\n")
    header = f"{'':38}{'ours':>11}{'theirs':>12}{'theirs/ours':>14}"
    print(f"{header}{'peak':>12}{'theirs':>12}{'ratio':>8}")
    scans(published.mamba2_chunk_scan, device, args.rounds)
    config = mh.HybridConfig(
        hidden_size=256,
        mamba_heads=8,
        mamba_head_size=64,
        mamba_groups=1,
        state_size=128,
        chunk=256,
    )
    theirs_config = transformers.NemotronHConfig(
        hidden_size=256,
        mamba_num_heads=8,
        mamba_head_dim=64,
        n_groups=1,
        ssm_state_size=128,
        chunk_size=256,
        layers_block_type=["linear_attention"],
        time_step_min=0.0,
    )
    ours = mh.Mamba2Mixer(config).to(device)
    theirs = published.NemotronHMamba2Mixer(theirs_config, layer_idx=0).to(device)
    theirs.train()
    x = torch.randn(1, 4096, 256, device=device)
    compare("mixer, D 256, the first scan", ours, theirs, [x], device, args.rounds)

    print("\nH 8, P 64, N 64, Q 256, next to causal attention of 8 heads of 64")
    header = "tokens        scan   attention   attention/scan   scan's peak, MiB"
    print(header + ("   compiled" if cuda else ""))
    attention(device, args.rounds)


if __name__ == "__main__":
    main()
