# SPDX-License-Identifier: MIT-0
"""The MoE layer compared with what a person would use instead; on a GPU, FP8 GEMMs with bf16.

    make bench CHAPTER=06                        CPU, one thread, 64 experts, 2,048 tokens, fp32
    make bench CHAPTER=06 ARGS="--device cuda"   bf16; and FP8Linear, compiled, at 1K to 16K

The candidates run in turn, forward and backward, with the same weights. A ratio is of two
neighbouring rounds, and the median of the ratios is printed. transformers' module has two
implementations of its experts, and the slow one is its default: both are chosen here by name. The
loop is a plain one over experts: select, multiply, add.
"""

import argparse
import statistics
import time
from dataclasses import replace

import fp8
import moe_fp8 as moe
import torch
import torch.nn.functional as F
from torch import nn


class LoopLayer(moe.MoELayer):
    """The obvious way: for each expert its tokens, one expert after the other."""

    def mix(self, x_TH, routing):
        y_TH = self.shared(x_TH)
        for i in range(self.config.num_experts):
            token, place = (routing.experts_TK == i).nonzero(as_tuple=True)
            hidden = F.linear(x_TH[token], self.experts.up[i]).relu().square()
            rows = F.linear(hidden, self.experts.down[i]) * routing.weights_TK[token, place, None]
            y_TH = y_TH.index_add(0, token, rows.to(y_TH.dtype))
        return y_TH


def transformers_layer(layer: moe.MoELayer, experts: str) -> nn.Module:
    """transformers' module with the same weights; experts: "eager" or "grouped_mm"."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    c = layer.config
    config = NemotronHConfig(
        hidden_size=c.hidden_size,
        n_routed_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
        moe_intermediate_size=c.expert_size,
        moe_shared_expert_intermediate_size=c.shared_size,
        routed_scaling_factor=c.gate_scale,
        layers_block_type=["moe"],
    )
    config._experts_implementation = experts
    module = NemotronHMoE(config)
    with torch.no_grad():
        module.gate.weight.copy_(layer.router.weight)
        module.experts.up_proj.copy_(layer.experts.up)
        module.experts.down_proj.copy_(layer.experts.down)
        module.shared_experts.up_proj.weight.copy_(layer.shared.up.weight)
        module.shared_experts.down_proj.weight.copy_(layer.shared.down.weight)
    return module


def timed(ways: dict, rounds: int, wait=lambda: None) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways in turn; the first round warms up."""
    found = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            wait()
            begin = time.perf_counter()
            way()
            wait()
            if turn:
                found[name].append(time.perf_counter() - begin)
    return found


def bench_layer(args) -> None:
    cuda = args.device == "cuda"
    config = moe.MoEConfig(
        hidden_size=256,
        num_experts=64,
        top_k=6,
        expert_size=512,
        shared_size=512,
        num_heads=4,
        init_std=0.05,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    ours = moe.ExpertParallelMoELayer(config)
    loop = LoopLayer(config)
    loop.load_state_dict(ours.state_dict())
    layers = {"this chapter's": ours, "loop over experts": loop}
    layers |= {
        f"transformers, {how}": transformers_layer(ours, how) for how in ("eager", "grouped_mm")
    }
    layers = {name: layer.to(args.device, dtype) for name, layer in layers.items()}
    x = torch.randn(8, 256, config.hidden_size, device=args.device, dtype=dtype)
    outputs = {}

    def way(name):
        leaf = x.clone().requires_grad_()
        y = layers[name](leaf)
        y = y[0] if isinstance(y, tuple) else y
        y.square().mean().backward()
        outputs[name] = y.detach()

    wait = torch.cuda.synchronize if cuda else lambda: None
    found = timed({name: lambda name=name: way(name) for name in layers}, args.rounds, wait)
    expected = outputs["this chapter's"]
    print(f"64 experts, 6 per token, 2,048 tokens, H 256, F 512, {dtype}, {args.device}")
    print(f"torch {torch.__version__}; forward and backward, medians of {args.rounds} rounds\n")
    print("                              time   over this chapter's   largest difference")
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, found["this chapter's"]))
        gap = ((outputs[name] - expected).abs().max() / expected.abs().max()).item()
        print(
            f"{name:24}{1e3 * statistics.median(times):8.1f} ms{ratio:18.2f} ×{gap:20.0e}",
            flush=True,
        )


def bench_fp8(args) -> None:
    """Forward, forward + backward, and quantisation apart, of an n × n layer on n rows."""
    device = torch.device("cuda")
    recipe = replace(fp8.HYBRID, hardware=fp8.fp8_hardware("auto", device, fp8.HYBRID))
    where = "tensor cores" if recipe.hardware else "emulated"
    print(
        f"\nFP8Linear, compiled, {where}, and nn.Linear in bf16, {torch.cuda.get_device_name()}\n"
    )
    print(
        "n        bf16 forward   FP8 forward   speed-up   forward + backward   "
        "quantization of one operand"
    )
    for n in (1024, 2048, 4096, 8192, 16384):
        bf16 = nn.Linear(n, n, bias=False, device=device, dtype=torch.bfloat16)
        linear = nn.Linear(n, n, bias=False, device=device, dtype=torch.bfloat16)
        compiled = torch.compile(fp8.FP8Linear(linear, recipe))
        quantise = torch.compile(lambda x: tuple(fp8.quantize_fp8(x)[:2]))
        x = torch.randn(n, n, device=device, dtype=torch.bfloat16, requires_grad=True)
        upstream = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        layers = {"bf16": bf16, "fp8": compiled}
        ways = {name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}
        ways |= {
            f"{name} both": lambda layer=layer, x=x, dy=upstream: layer(x).backward(dy)
            for name, layer in layers.items()
        }
        ways["quantise"] = lambda quantise=quantise, x=x: quantise(x.detach())
        found = timed(ways, args.rounds, torch.cuda.synchronize)
        forward = statistics.median(a / b for a, b in zip(found["bf16"], found["fp8"]))
        both = statistics.median(a / b for a, b in zip(found["bf16 both"], found["fp8 both"]))
        ms = {name: 1e3 * statistics.median(times) for name, times in found.items()}
        row = f"{n:<9}{ms['bf16']:9.3f} ms{ms['fp8']:11.3f} ms{forward:9.2f} ×{both:19.2f} ×"
        print(f"{row}{ms['quantise']:25.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    bench_layer(args)
    if args.device == "cuda":
        bench_fp8(args)


if __name__ == "__main__":
    main()
