# SPDX-License-Identifier: MIT-0
"""The scan and the mixer beside transformers' pure-torch Mamba-2, and beside attention, on the same tensors.

    make bench CHAPTER=05                        one CPU thread, fp32
    make bench CHAPTER=05 ARGS="--device cuda"   to 128K tokens, also under torch.compile

Both run in turn; a ratio is of two neighbouring rounds, and the median of the ratios is printed. Peak memory is what a
forward and backward pass needs beyond its inputs: on a GPU the allocator's, on the CPU counted by a dispatch mode.
"""

import argparse
import statistics
import time
import weakref

import mamba_hybrid as mh
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """`with Peak() as peak:` keeps in peak.bytes the most that storages made inside hold at one time."""

    def __enter__(self):
        self.now, self.bytes, self.seen = 0, 0, {}
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


def beside(name: str, ours, theirs, inputs: list[torch.Tensor], device, rounds: int) -> None:
    times, ratios = {"ours": [], "theirs": []}, []
    for turn in range(rounds + 1):
        here, there = once(ours, inputs, device), once(theirs, inputs, device)
        if turn:  # the first round warms up
            times["ours"].append(sum(here))
            times["theirs"].append(sum(there))
            ratios.append(sum(there) / sum(here))
    memory = [peak(f, inputs, device) / 2**20 for f in (ours, theirs)]
    middle = {who: 1e3 * statistics.median(found) for who, found in times.items()}
    print(f"{name:34}{middle['ours']:9.0f} ms{middle['theirs']:11.0f} ms{statistics.median(ratios):9.2f}×"
          f"{memory[0]:11.0f} MiB{memory[1]:9.0f} MiB{memory[0] / memory[1]:8.2f}", flush=True)  # fmt: skip


def scan_inputs(S, N, D, G, Z, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    x, dt, A = (
        random(1, S, N, D),
        0.05 * random(1, S, N).sigmoid() + 0.002,
        -1 - 15 * random(N).sigmoid(),
    )
    return [x, dt, A, random(1, S, G, Z), random(1, S, G, Z), random(N)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, cuda = torch.device(args.device), args.device == "cuda"
    import transformers
    from transformers.models.nemotron_h import modeling_nemotron_h as published

    transformers.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if cuda else "CPU, one thread"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; forward + backward, fp32, "
          f"medians of {args.rounds} rounds; B 1, S 4,096\n")  # fmt: skip
    print(
        "                                         ours     theirs   theirs/ours       peak      theirs   ratio"
    )
    for N, D, G, Z, chunk in ((8, 64, 1, 128, 256), (8, 64, 1, 128, 128), (16, 32, 2, 64, 128)):
        their_scan = published.mamba2_chunk_scan
        theirs = lambda x, dt, A, B, C, skip, Q=chunk: their_scan(x, dt, A, B, C, Q, D=skip)  # noqa: B023, E731
        ours = lambda x, dt, A, B, C, skip, Q=chunk: mh.ssd(x, dt, A, B, C, Q, skip)[0]  # noqa: E731
        inputs = scan_inputs(4096, N, D, G, Z, device)
        beside(
            f"scan, N {N} D {D} G {G} Z {Z} chunk {chunk}",
            ours,
            theirs,
            inputs,
            device,
            args.rounds,
        )
    config = mh.HybridConfig(
        hidden_size=256,
        mamba_heads=8,
        mamba_head_size=64,
        mamba_groups=1,
        state_size=128,
        chunk=256,
    )
    theirs_config = transformers.NemotronHConfig(
        hidden_size=256, mamba_num_heads=8, mamba_head_dim=64, n_groups=1, ssm_state_size=128, chunk_size=256,
        layers_block_type=["linear_attention"], time_step_min=0.0,
    )  # fmt: skip
    ours = mh.Mamba2Mixer(config).to(device)
    theirs = published.NemotronHMamba2Mixer(theirs_config, layer_idx=0).to(device)
    theirs.train()
    x = torch.randn(1, 4096, 256, device=device)
    beside("whole mixer, H 256, the first scan", ours, theirs, [x], device, args.rounds)

    print(
        "\nN 8, D 64, Z 64, chunk 256, beside causal attention of 8 heads of 64, forward + backward"
    )
    print(
        "tokens        scan   attention   attention/scan   scan's peak, MiB"
        + ("   compiled" if cuda else "")
    )
    compiled = torch.compile(lambda *t: mh.ssd(*t[:5], 256, t[5])[0]) if cuda else None
    for S in [2**k for k in range(10, 18 if cuda else 15)]:
        inputs = scan_inputs(S, 8, 64, 1, 64, device)
        scan = lambda x, dt, A, B, C, skip: mh.ssd(x, dt, A, B, C, 256, skip)[0]  # noqa: E731
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        qkv = list(torch.randn(3, 1, 8, S, 64, device=device))
        rounds, found = max(3, args.rounds // (1 if S < 8192 else 2)), []
        for turn in range(rounds + 1):
            pair = sum(once(scan, inputs, device)), sum(once(attend, qkv, device))
            found += [pair] if turn else []
        scans, attentions = (1e3 * statistics.median(column) for column in zip(*found))
        ratio = statistics.median(b / a for a, b in found)
        line = f"{S:6,}{scans:9.0f} ms{attentions:9.0f} ms{ratio:16.2f}{peak(scan, inputs, device) / 2**20:19.0f}"
        if cuda:
            again = statistics.median(
                sum(once(compiled, inputs, device)) for _ in range(rounds + 1)
            )
            line += f"{1e3 * again:9.0f} ms"
        print(line, flush=True)


if __name__ == "__main__":
    main()
