# SPDX-License-Identifier: MIT-0
"""Chapter 8's tables: bits, layers and parameters in NVFP4, flushed blocks, each trick by itself.

Sources: Format and the 12B study: Pretraining Large Language Models with NVFP4, 2025, arXiv
         2509.25149. Super: Nemotron 3 Super, 2026, arXiv 2604.12374. Ultra: its published
         configuration and its name, 550B-A55B. LatentMoE and the share of layers: the Nemotron 3
         white paper, 2025, arXiv 2512.20856.

    python 08_nvfp4/nvfp4_tables.py        a few seconds on one CPU core

Column "paper" has the published figure, "formula" a computed one, "here" what this chapter's code
counts or measures. The exit code is 1 where figures that should agree do not.

Nothing here says how well a model learns in four bits: that took 10 and 25 trillion tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from nvfp4 import (
    BLOCK,
    STUDY_12B,
    SUPER,
    NVFP4Recipe,
    nvfp4_dequantize,
    nvfp4_quantize,
    random_hadamard,
    relative_error,
)
from torch import Tensor

# ── 1 Bits and bytes ────────────────────────────────────────────────────────────────────────────


def bits_per_value(x: Tensor, two_d: bool = False) -> float:
    """Of x (R, C) in storage, the amax apart: it is one for the tensor. Source: ours."""
    codes, scales, _ = nvfp4_quantize(x, two_d)
    return 8 * (codes.nbytes + scales.nbytes) / x.numel()


def format_bits(value_bits: float, scale_bits: float, block: int) -> float:
    """Bits per value of a format with one scale per block. Source: 2509.25149, table 1."""
    return value_bits + scale_bits / block


# ── 2 Parameters ────────────────────────────────────────────────────────────────────────────────
#
# Super and Ultra have a block for multi-token prediction, "*E": attention and a LatentMoE layer,
# with a matrix that takes the embedding and the hidden state, 2·H to H. It is used once per depth
# with the same weights. Their published counts leave it out, and it stays out of NVFP4.


@dataclass(frozen=True)
class Published:
    """A published model: 128 per head, 8 groups and a state of 128 in Mamba layers."""

    hidden: int
    layers: tuple[int, int, int]  # Mamba, attention, experts
    heads: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    latent: int
    mamba_heads: int
    vocab: int = 131_072
    kv_heads: int = 2


SUPER_120B = Published(4096, (40, 8, 40), 32, 512, 22, 2688, 5376, 1024, 128)
ULTRA_550B = Published(8192, (48, 12, 48), 64, 512, 22, 5120, 10_240, 2048, 256)


def mamba_parameters(model: Published) -> int:
    inner = 64 * model.mamba_heads
    groups = 2 * 8 * 128
    into = model.hidden * (2 * inner + groups + model.mamba_heads)
    convolution = 5 * (inner + groups)
    return into + convolution + 3 * model.mamba_heads + inner + inner * model.hidden


def attention_parameters(model: Published) -> int:
    return model.hidden * 128 * (2 * model.heads + 2 * model.kv_heads)


def moe_parameters(model: Published, experts: int) -> int:
    """A LatentMoE layer, of which so many experts count."""
    routed = experts * 2 * model.latent * model.expert_size
    router = model.experts * (model.hidden + 1)
    return routed + 2 * model.hidden * (model.shared_size + model.latent) + router


def trunk_parameters(model: Published) -> int:
    """All but the block for multi-token prediction."""
    mamba, attention, experts = model.layers
    norms = (sum(model.layers) + 1) * model.hidden
    found = 2 * model.vocab * model.hidden + norms
    found += mamba * mamba_parameters(model) + attention * attention_parameters(model)
    return found + experts * moe_parameters(model, model.experts)


def mtp_parameters(model: Published, experts: int) -> int:
    """The shared block, of which so many experts count. Source: the published configuration."""
    combine = 2 * model.hidden * model.hidden
    return combine + attention_parameters(model) + moe_parameters(model, experts)


def share_kept(recipe: NVFP4Recipe, layers: int) -> float:
    """The fraction of layers that keep their precision."""
    return 1 - len(recipe.covered(layers)) / layers


# ── 3 Errors, and flushed blocks ────────────────────────────────────────────────────────────────


def distributions() -> dict[str, Tensor]:
    """Matrices of 512 × 512, fp32."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(512, 512, generator=generator)
    three = torch.randn(3, 512, 512, generator=generator)
    spread = torch.randn(512, 512, generator=generator)
    heavy = gauss / three.square().mean(0).sqrt()  # Student's t with three degrees of freedom
    return {"Gaussian": gauss, "Student t3": heavy, "log-normal, σ 4": gauss * (4 * spread).exp()}


def error(x: Tensor, two_d: bool = False, stochastic: bool = False) -> float:
    """‖x in NVFP4 − x‖ / ‖x‖, of x (R, C). Source: ours."""
    uniforms = None
    if stochastic:
        uniforms = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    return relative_error(nvfp4_dequantize(nvfp4_quantize(x, two_d, uniforms)), x)


def zeroed(x: Tensor, two_d: bool = False) -> float:
    """The fraction of x (R, C) that becomes zero. Source: ours."""
    return (nvfp4_dequantize(nvfp4_quantize(x, two_d)) == 0).double().mean().item()


def flushed(x: Tensor) -> float:
    """The fraction of blocks of x (R, C) whose scale underflows. Source: ours."""
    scales = nvfp4_quantize(x).scales.to(torch.float32)
    blocks = x.view(len(x), -1, BLOCK).abs().amax(-1)
    return ((scales == 0) & (blocks > 0)).double().mean().item()


def ladder() -> Tensor:
    """1,024 blocks with amax 1, 2^(−1/32), 2^(−2/32) ..., (1024, 16)."""
    return 2 ** (-torch.arange(1024.0)[:, None] / 32).expand(-1, BLOCK)


def flushed_of_ladder() -> float:
    """A block is flushed where amax_b / amax · 448 rounds to 0 in E4M3: below 2^−10."""
    last = math.floor(32 * (10 + math.log2(448)))  # the last one that is kept
    return 1 - (last + 1) / 1024


# ── 4 Each trick by itself ──────────────────────────────────────────────────────────────────────


def error_of_hadamard(one_operand: bool) -> float:
    """Of (dy M)(x M)ᵀ, or of (dy M) xᵀ, in float64, relative to dy · xᵀ. Source: ours."""
    generator = torch.Generator().manual_seed(0)
    dy_FR, x_HR = torch.randn(2, 64, 256, generator=generator, dtype=torch.float64)
    right_FH = dy_FR @ x_HR.mT
    if not one_operand:
        x_HR = random_hadamard(x_HR)
    return relative_error(random_hadamard(dy_FR) @ x_HR.mT, right_FH)


def error_of_mean(stochastic: bool) -> float:
    """The mean over 256 evenly spaced uniforms, of values from 0 to 6: its largest distance from
    the value, in units of the gap between the two codes next to it. Source: ours."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.linspace(0, 6, 1500).view(100, 15)
    upper = torch.searchsorted(grid, x).clamp(min=1)
    gap = grid[upper] - grid[upper - 1]
    blocks = torch.cat([torch.full((100, 1), 6.0), x], dim=1)  # scales of 1: x stays as it is
    blocks = torch.cat([blocks, torch.full((1, BLOCK), 2688.0)])
    total = torch.zeros(100, 15, dtype=torch.float64)
    for draw in range(256):
        uniforms = torch.full(blocks.shape, draw / 256) if stochastic else None
        found = nvfp4_dequantize(nvfp4_quantize(blocks, uniforms=uniforms))[:-1, 1:]
        assert ((found - x).abs() <= gap).all()
        total += found / 256
    return ((total - x).abs() / gap).max().item()


# ── 5 The tables ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """A claim and the figures that should agree; "–" where there is none.

    note: why figures disagree, or what a comparison needs. A note on figures that agree is a
    failure, and so are figures that disagree without a note.
    """

    claim: str
    paper: str
    formula: str = "–"
    here: str = "–"
    note: str = ""

    @property
    def verdict(self) -> str:
        figures = [x for x in (self.paper, self.formula, self.here) if x != "–"]
        agree = len(figures) > 1 and len(set(figures)) == 1
        if agree:
            return "FAILED" if self.note else "ok"
        return self.note or "FAILED"


def storage() -> Iterator[Row]:
    x = distributions()["Gaussian"]
    flat = f"{format_bits(4, 8, BLOCK):g}"
    yield Row("NVFP4: bits per value", "4.5", flat, f"{bits_per_value(x):g}")
    square = f"{format_bits(4, 8, BLOCK * BLOCK):g}"
    here = f"{bits_per_value(x, two_d=True):g}"
    yield Row("with 16 × 16 tiles", "–", square, here)
    yield Row("MXFP4, 32 values per scale: bits per value", "4.25", f"{format_bits(4, 8, 32):g}")
    sent = f"{4096 * format_bits(4, 8, BLOCK) / 8:g} / {4096 * 2}"
    yield Row("bytes of a token's gather, H 4096: NVFP4 / bf16", "–", sent, note="not published")
    rows = f"{6 * 4096} / {SUPER_120B.top_k * SUPER_120B.latent}"
    claim = "elements sent per token: 6 of 4096, and 22 of 1024"
    yield Row(claim, "equal cost", rows, note="24 by the paper's rule")


def layers() -> Iterator[Row]:
    claim = "12B study: layers in high precision, first 2 and last 8 of 62"
    yield Row(claim, "16%", f"{10 / 62:.0%}", f"{share_kept(STUDY_12B, 62):.0%}")
    claim = "Super: the last 14 of 88"
    note = "rounded in the paper; 14 of 88 in its configuration"
    yield Row(claim, "15%", f"{14 / 88:.0%}", f"{share_kept(SUPER, 88):.0%}", note)


def billions(count: int, digits: int = 1) -> str:
    return f"{count / 1e9:.{digits}f}B"


def parameters() -> Iterator[Row]:
    found = billions(trunk_parameters(SUPER_120B))
    yield Row("Super: total", "120.6B", found, note="the report may leave routers out")
    block = mtp_parameters(SUPER_120B, SUPER_120B.experts)
    active = mtp_parameters(SUPER_120B, SUPER_120B.top_k)
    figures = f"{billions(block, 2)} / {billions(active, 3)}"
    yield Row("Super: MTP block, total / active", "–", figures, note="not published")
    total = billions(trunk_parameters(SUPER_120B) + block)
    yield Row("Super with its MTP block", "–", total, note="not published")
    found = billions(trunk_parameters(ULTRA_550B), 0)
    yield Row("Ultra: total", "550B", found, note="in its name, rounded; state size assumed")
    block = mtp_parameters(ULTRA_550B, ULTRA_550B.experts)
    total = billions(trunk_parameters(ULTRA_550B) + block)
    figures = f"{billions(block, 2)} / {total}"
    yield Row("Ultra: MTP block / total with it", "–", figures, note="not published")


def errors() -> Iterator[Row]:
    for name, x in distributions().items():
        here = f"{error(x):.1%} / {error(x, two_d=True):.1%} / {error(x, stochastic=True):.1%}"
        yield Row(f"{name}: error of 1 × 16 / 16 × 16 / stochastic", "–", here=here, note="ours")
        here = f"{zeroed(x):.1%} / {zeroed(x, two_d=True):.1%} / {flushed(x):.1%}"
        claim = f"{name}: values that become 0, 1 × 16 / 16 × 16; blocks flushed"
        yield Row(claim, "–", here=here, note="ours")
    claim = "blocks flushed, of 1,024 whose amax falls by 2^(−1/32) each"
    yield Row(claim, "–", f"{flushed_of_ladder():.2%}", f"{flushed(ladder()):.2%}")


def tricks() -> Iterator[Row]:
    both = error_of_hadamard(one_operand=False)
    here = "0" if both < 1e-14 else f"{both:.0e}"
    yield Row(
        "Hadamard on both operands of wgrad: error, float64", "exact", "0", here, "below 1e-14"
    )
    one = error_of_hadamard(one_operand=True)
    yield Row("Hadamard on one operand", "–", here=f"{one:.2f}", note="wrong")
    draws = error_of_mean(stochastic=True)
    within = "1 / 256" if draws <= 1 / 256 else f"{draws:.3f}"
    claim = "stochastic rounding: error of the mean of 256 draws, of the gap"
    yield Row(claim, "–", "1 / 256", within)
    nearest = error_of_mean(stochastic=False)
    yield Row("nearest: the same", "–", "0.50", f"{nearest:.2f}")


TABLES = {
    "Bits": storage,
    "Layers that stay": layers,
    "Parameters": parameters,
    "Errors": errors,
    "Tricks": tricks,
}


def print_table(title: str, rows: list[Row]) -> bool:
    """Prints a table; returns whether no row failed."""
    print(f"{title}\n")
    cells = [["claim", "paper", "formula", "here", "verdict"]]
    cells += [[row.claim, row.paper, row.formula, row.here, row.verdict] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    for line in cells:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    return all(row.verdict != "FAILED" for row in rows)


def flags() -> argparse.Namespace:
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    flags()
    torch.set_num_threads(1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    good = [print_table(title, list(rows())) for title, rows in TABLES.items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
