# SPDX-License-Identifier: MIT-0
"""Chapter 6, second half. GEMMs in FP8: linear layers and experts.

Papers: Nemotron-H, NVIDIA, 2025, arXiv 2504.03624, one scale per tensor;
        Nemotron Nano 2, NVIDIA, 2025, arXiv 2508.14444, a scale for each tile

The problem. A GEMM in bf16 reads 16 bits for each element of its operands, and the time of training
is mostly that of such GEMMs.

The idea. An FP8 value has 8 bits, of which 2 or 3 are the mantissa, and tensor cores multiply twice
as many of them per second as values in bf16. The range of the format is small, so each tensor is
scaled to fill it before it is rounded. Weights, activations and gradients are rounded for the GEMMs
alone. Norms, the router, sums and the optimizer keep their precision:

    x_RH, bf16 ──► amax ──► scale ──► round ─┐
                                             ├─ GEMM in FP8, sums in fp32 ──► · 1/(s·z) ──► y_RF
    w_FH, fp32 ──► amax ──► scale ──► round ─┘

Run it (no flag is needed; --help lists them):

    python 06_moe_fp8/fp8.py                        4 local ranks, ep 2 × dp 2
    python 06_moe_fp8/fp8.py --recipe blockwise     E4M3 everywhere, a scale for each tile
    python 06_moe_fp8/fp8.py --check                equality with the single device, alone
    torchrun --nproc-per-node=8 06_moe_fp8/fp8.py --ep 8 --fp8 hardware

It proves that ranks which hold shards of a tensor round it as a single device does. It trains the
model of moe_fp8.py without FP8, then its copy in FP8, and prints the claims that it has measured.

Left out: delayed scaling (the notebook); FP8 messages; tiles on tensor cores.
"""

# The suffixes of tensors are those of moe_fp8.py, section 0. (F before a dot is
# torch.nn.functional.)

from __future__ import annotations

import argparse
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial

import moe_fp8 as moe
import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_fp8 import Experts, Group, Mesh, MoELM, _all_reduce, gemm_dtype
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ── 1 FP8 and scaling ───────────────────────────────────────────────────────────────────────────
#
# A floating-point value is sign · 2^exponent · 1.mantissa. FP8 has two ways to spend its bits:
#
#     E4M3   4 bits exponent, 3 mantissa   ±448     relative error ≤ 1/17   weights, activations
#     E5M2   5 bits exponent, 2 mantissa   ±57344   relative error ≤ 1/9    gradients: more range
#
# The value 20 in both, and its neighbours:
#
#     E4M3   0 1011 010     + 2^(11 − 7) · (1 + 2/8)
#            16 · 18 · 20 · 22 · 24 · 26 · 28 · 30 · 32 · · · 36 · · · 40      8 steps per octave
#     E5M2   0 10011 01     + 2^(19 − 15) · (1 + 1/4)
#            16 · · · 20 · · · 24 · · · 28 · · · 32 · · · · · · · 40           4 steps
#
# The step grows with the value, so the relative error is the same at 20 and at 0.02. Below 2^−6
# (E5M2: 2^−14) the exponent has its smallest value, and the step stays as large as it is there:
#
#     E4M3   0 · 2^−9 · 2·2^−9 · … · 7·2^−9 · 2^−6 · …        less than half a step becomes zero:
#     E5M2   0 · 2^−16 · 2·2^−16 · 3·2^−16 · 2^−14 · …        0.0009, or any gradient of 1e-6
#
# So a tensor is scaled to the format's range before it is rounded. Current scaling takes the amax,
# the largest |x|, of this very tensor:
#
#     scale = largest value of the format / amax
#     codes = round(clip(x · scale))               8 bits each
#     x ≈ codes · (1 / scale)                      GEMMs take the inverse: easily confused
#
#     x              0.02       −0.5      0.00035         amax 0.5, so scale = 448 / 0.5 = 896
#     x · scale     17.92     −448.0      0.3136
#     codes         18        −448        0.3125          steps here: 2, 32 and 1/32
#     codes / scale  0.0201     −0.5      0.000349        without a scale the last would be 0
#
# Three cases need care. amax = 0 would give an infinite scale, and then 0 · ∞ = NaN. x · scale may
# round above the largest value, and E4M3 has no infinity, so it is clipped. And for a tiny amax the
# scale would overflow. A value that is not finite is left visible: everything with the same scale
# becomes NaN, and the gradient norm shows it. Scaling is computed in fp32, whatever x is.
#
# One outlier makes all other values relatively small. Blockwise scaling gives each tile its own
# scale: 1 × 128 elements of an activation or gradient, 128 × 128 of a weight [Nano 2, after
# DeepSeek-V3]. Then E4M3 has enough range for gradients too. Scales may be powers of two, which
# change the exponent alone and round nothing.

FP8_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# x ≈ codes · inverse_scale. codes: FP8, of x's shape. inverse_scale: fp32, one, or one per tile of
# the last two dimensions. block: rows and columns of a tile, or None.
Quantized = namedtuple("Quantized", "codes inverse_scale block")


def _amax(x: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest |x|, or one per tile, of which the last ones may be smaller."""
    if block is None:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    height, width = block
    rows, columns = x.shape[-2:]
    size = x.abs()
    right = -columns % width
    below = -rows % height
    size = F.pad(size, (0, right, 0, below))
    tiles = size.unfold(-2, height, height)
    tiles = tiles.unfold(-2, width, width)
    return tiles.amax((-2, -1))


def _per_element(scale: Tensor, block: tuple[int, int] | None, shape: torch.Size) -> Tensor:
    """Each tile's scale, at each of its elements."""
    if scale.ndim == 0:
        return scale
    rows, columns = shape[-2:]
    scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    return scale.repeat_interleave(block[1], -1)[..., :columns]


@torch.no_grad()
def quantize_fp8(
    x: Tensor,
    format: str = "e4m3",
    block: tuple[int, int] | None = None,
    power_of_two: bool = False,
    amax_group: Group = None,
) -> Quantized:
    """x rounded to FP8, to nearest, ties to even, with one scale or one per tile.

    Args:
        x: any shape; with tiles two or three dimensions.
        format: "e4m3" or "e5m2".
        block: rows and columns of a tile of the last two dimensions; None: one scale.
        power_of_two: round the scale down to a power of two.
        amax_group: ranks that hold shards of one tensor, which then has one scale on all of them.
            Collective, also with an empty shard. None: x is not sharded. Ignored with tiles, which
            must not cross ranks.

    A finite value has a finite code. Raises: ValueError for an unknown format.
    Source: current scaling, Nemotron-H; tiles, Nemotron Nano 2.
    """
    if format not in FP8_FORMATS:
        raise ValueError(f"format {format!r}: one of {list(FP8_FORMATS)}")
    dtype = FP8_FORMATS[format]
    largest = torch.finfo(dtype).max
    x = x.to(torch.float32)
    shared = amax_group is not None and block is None  # also where this rank's shard is empty
    block = block if x.numel() else None
    if block:
        x = x.contiguous()  # the tiles of a transposed tensor would be read across its rows
    amax = _amax(x, block)
    amax = amax.nan_to_num(torch.inf, torch.inf)  # a maximum over ranks may drop NaN
    if shared:
        _all_reduce(amax, amax_group, dist.ReduceOp.MAX)
    # largest / amax would be computed as largest · (1 / amax), which rounds twice.
    scale = torch.full_like(amax, largest) / amax
    # The limit keeps the inverse a normal number.
    scale = torch.where(amax == 0, 1.0, scale).clamp(max=2.0**126)
    if power_of_two:
        # sign() is 0 where x is not finite, and there the scale stays 0.
        exponent = torch.frexp(scale).exponent - 1
        scale = torch.ldexp(scale.sign(), exponent)
    scaled = x * _per_element(scale, block, x.shape)
    codes = scaled.clamp(-largest, largest).to(dtype)
    return Quantized(codes.contiguous(), 1 / scale, block)


def dequantize_fp8(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes · inverse scale, (...), in `dtype`, fp32 or higher. Source: Nemotron-H."""
    codes, inverse_scale, block = quantized
    inverse_scale = _per_element(inverse_scale, block, codes.shape)
    return codes.to(dtype) * inverse_scale.to(dtype)


# ── 2 FP8 GEMMs ─────────────────────────────────────────────────────────────────────────────────
#
# A linear layer is three GEMMs. Each is a · bᵀ of two matrices with the reduction dimension last,
# the only layout that the FP8 tensor cores of Hopper (H100) take:
#
#     fprop    y_RF  =  x_RH · w_FH            sum over H        E4M3 · E4M3
#     dgrad    dx_RH =  dy_RF · w_HF           sum over F        E5M2 · E4M3       w transposed
#     wgrad    dw_FH =  dy_FR · x_HR           sum over rows     E5M2 · E4M3       both transposed
#
# So x, w and dy are each needed twice, as they are and transposed: six operands. With one scale
# per tensor the transposed copy has the same codes. Tiles lie along the reduction dimension, so a
# transposed operand has other tiles and is rounded anew, from the unrounded tensor. For wgrad x is
# kept as codes: 1 byte per element and not 4.
#
# A scale may be taken out of a GEMM where it is the same for all terms of the sum. With codes q and
# scale s of x, and p and z of w: Σ_h (q_rh / s) (p_fh / z) = (Σ_h q_rh · p_fh) / (s · z). Tensor
# cores add products of codes, and each sum is multiplied once.
#
# A recipe is data: the format of each operand of each GEMM, and the number of layers at both ends
# that keep their precision. The router, norms, embedding and output layer always do.
#
# torch._scaled_mm is that GEMM on FP8 tensor cores. Elsewhere it is emulated: the same codes,
# upcast, in an ordinary GEMM. The rounding is the same to the bit. Sums differ, since Hopper adds
# with fewer bits than fp32 (`use_fast_accum=False` promotes partial sums to fp32 regularly). Tensor
# cores need multiples of 16, so each GEMM is padded with zero rows, which do not count.

Operand = namedtuple("Operand", "format block power_of_two", defaults=[None, False])
E4M3 = Operand("e4m3")
E5M2 = Operand("e5m2")
TILE = Operand("e4m3", (1, 128), True)
SQUARE = Operand("e4m3", (128, 128), True)


@dataclass(frozen=True)
class FP8Recipe:
    """How each operand of each GEMM is rounded, and where. Source: Nemotron-H, section 2.4."""

    fprop: tuple[Operand, Operand] = (E4M3, E4M3)  # x, w
    dgrad: tuple[Operand, Operand] = (E5M2, E4M3)  # dy, w transposed
    wgrad: tuple[Operand, Operand] = (E5M2, E4M3)  # dy and x, both transposed
    first: int = 1  # layers at the beginning that keep their precision; Nemotron-H 56B: 4
    last: int = 1  # layers at the end
    hardware: bool = False  # on FP8 tensor cores, or emulated

    def covered(self, num_layers: int) -> range:
        """The layers in FP8. Raises: ValueError where there is none, or a count is negative."""
        covered = range(self.first, num_layers - self.last)
        if not covered or min(self.first, self.last) < 0:
            outside = f"the first {self.first} and the last {self.last} of {num_layers} layers"
            raise ValueError(f"the FP8 recipe leaves out {outside}: it covers none; add layers")
        return covered


HYBRID = FP8Recipe()
BLOCKWISE = FP8Recipe((TILE, SQUARE), (TILE, SQUARE), (TILE, TILE))  # Nemotron Nano 2


def fp8_hardware(mode: str, device: torch.device, recipe: FP8Recipe) -> bool:
    """Whether GEMMs run on FP8 tensor cores. Args: mode: "hardware", "emulate", or "auto".

    Raises: ValueError with the reason where "hardware" is not possible. Source: ours.
    """
    operands = recipe.fprop + recipe.dgrad + recipe.wgrad
    tiles = any(operand.block for operand in operands)
    able = False
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 9)
    if mode == "hardware" and (tiles or not able):
        reason = "none for a recipe with tiles here" if able else f"this {device.type} has none"
        raise ValueError(f"FP8 tensor cores: {reason}; use --fp8 emulate or auto")
    return mode != "emulate" and able and not tiles


def fp8_gemm(a: Quantized, b: Quantized, dtype: torch.dtype, hardware: bool = False) -> Tensor:
    """a · bᵀ, (m, k) and (n, k) to (m, n) in `dtype`, on FP8 tensor cores or emulated.

    Emulated sums are in at least fp32. On Hopper an error of 2^−13 · Σ|a_i b_i| is to be expected
    on top of dtype's own rounding. Raises: ValueError on hardware where k or n is no multiple of
    16. Source: Nemotron-H.
    """
    if hardware and a.codes.numel():
        n, k = b.codes.shape
        if n % 16 or k % 16:
            raise ValueError(f"FP8 tensor cores need multiples of 16, not {n} × {k}")
        options = {"scale_a": a.inverse_scale, "scale_b": b.inverse_scale}
        options |= {"out_dtype": dtype, "use_fast_accum": False}
        return torch._scaled_mm(a.codes, b.codes.mT, **options)
    with torch.autocast(a.codes.device.type, enabled=False):
        precision = torch.promote_types(dtype, torch.float32)
        a_mk = dequantize_fp8(a, precision)
        b_nk = dequantize_fp8(b, precision)
        return (a_mk @ b_nk.mT).to(dtype)


def _quantize_both(
    x_RH: Tensor, operand: Operand, transposed: Operand, amax_group: Group
) -> tuple[Quantized, Quantized]:
    """x_RH and its transpose, padded to 16 rows. With one scale, one rounding serves both."""
    x_RH = F.pad(x_RH, (0, 0, 0, -len(x_RH) % 16))
    x = quantize_fp8(x_RH, *operand, amax_group=amax_group)
    if operand == transposed and operand.block is None:
        codes = x.codes.mT.contiguous()
        return x, x._replace(codes=codes)
    return x, quantize_fp8(x_RH.mT, *transposed, amax_group=amax_group)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, weight_FH, recipe, amax_group, dtype):
        x_fprop, x_wgrad = _quantize_both(x_RH, recipe.fprop[0], recipe.wgrad[1], amax_group)
        w_fprop = quantize_fp8(weight_FH, *recipe.fprop[1])
        kept = x_wgrad[:2] if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(weight_FH, *kept)
        ctx.settings = recipe, amax_group, x_RH.dtype
        y_RF = fp8_gemm(x_fprop, w_fprop, dtype, recipe.hardware)
        return y_RF[: len(x_RH)]  # without the padding

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RF):
        weight_FH, x_codes, x_inverse_scale = ctx.saved_tensors
        recipe, amax_group, x_dtype = ctx.settings
        dx_RH = dweight_FH = None
        dy_dgrad, dy_wgrad = _quantize_both(dy_RF, recipe.dgrad[0], recipe.wgrad[0], amax_group)
        if ctx.needs_input_grad[0]:
            w_dgrad = quantize_fp8(weight_FH.mT, *recipe.dgrad[1])
            dx_RH = fp8_gemm(dy_dgrad, w_dgrad, x_dtype, recipe.hardware)
            dx_RH = dx_RH[: len(dy_RF)]
        if ctx.needs_input_grad[1]:
            x_wgrad = Quantized(x_codes, x_inverse_scale, recipe.wgrad[1].block)
            dweight_FH = fp8_gemm(dy_wgrad, x_wgrad, weight_FH.dtype, recipe.hardware)
        return dx_RH, dweight_FH, None, None, None


def fp8_linear(x: Tensor, weight_FH: Tensor, recipe: FP8Recipe, amax_group: Group = None) -> Tensor:
    """x · weightᵀ with all three GEMMs in FP8, (..., H) to (..., F). Differentiable once.

    Args: amax_group: ranks that hold shards of the rows: collective then; see `quantize_fp8`.
    Returns: x's dtype, or autocast's. Raises: ValueError on hardware for sizes that are no
    multiples of 16. Source: Nemotron-H; with tiles, Nemotron Nano 2.
    """
    *leading, H = x.shape
    x_RH = x.reshape(-1, H)
    y_RF = _FP8Linear.apply(x_RH, weight_FH, recipe, amax_group, gemm_dtype(x))
    return y_RF.view(*leading, len(weight_FH))


class FP8Linear(nn.Module):
    """Replaces an nn.Linear without bias: x (..., H) to (..., F), with three GEMMs in FP8.

    It shares the weight of `linear`, which keeps its precision: each GEMM rounds it anew, and the
    optimizer never sees that. Args: linear: an nn.Linear, or another FP8Linear. Others: as
    `fp8_linear`'s. Raises: ValueError for a layer with a bias. Source: Nemotron-H.
    """

    def __init__(self, linear: nn.Module, recipe: FP8Recipe = HYBRID, amax_group: Group = None):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("FP8Linear has no bias: build the layer with bias=False")
        self.weight = linear.weight
        self.bias = None
        self.recipe = recipe
        self.amax_group = amax_group

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.recipe, self.amax_group)


# ── 3 FP8 experts, and one scale for a sharded tensor ───────────────────────────────────────────
#
# An expert's rows have a scale of their own, and so has its weight. Its GEMMs are those of a linear
# layer, called for one expert after the other.
#
# The shards of a tensor have another amax on each rank, so other scales and other roundings than
# on a single device: the result would depend on the mesh. So the ranks that hold shards of one
# tensor agree on one amax, by an all-reduce of one value. Activations of replicated layers: all
# ranks. An expert's rows: the edp group, the ranks that hold this expert. (The other ranks of its
# ep group have sent all their rows of it.) Weights: none. The codes then equal the single device's
# to the bit. An empty shard has amax 0 and takes part.


def fp8_grouped_gemm(
    x_RH: Tensor, weight_EFH: Tensor, counts: list[int], recipe: FP8Recipe, amax_group: Group = None
) -> Tensor:
    """`moe_fp8.grouped_gemm` in FP8, (R, F): each expert's rows and weight with their own scales.

    Args: amax_group: the ranks that hold the same experts; collective.
    Raises: ValueError where counts do not fit. Source: ours.
    """
    if sum(counts) != len(x_RH) or len(counts) != len(weight_EFH):
        raise ValueError(f"counts {counts} are not {len(x_RH)} rows for {len(weight_EFH)} experts")
    found = []
    for rows, weight_FH in zip(x_RH.split(counts), weight_EFH):
        y_RF = fp8_linear(rows, weight_FH, recipe, amax_group)
        found.append(y_RF)
    return torch.cat(found)


def to_fp8(model: MoELM, recipe: FP8Recipe, mesh: Mesh | None = None) -> MoELM:
    """Replaces the linear layers that `recipe` covers, in place, and returns the model.

    Parameters stay the same objects. A second call replaces the first one's recipe everywhere.
    Args: mesh: its ranks share the amax of sharded tensors; None: each rank scales what it has.
    Raises: ValueError where the recipe covers no layer, or leaves out one that is in FP8 already;
    the model is then as it was. Source: Nemotron-H, section 2.4.
    """
    covered = recipe.covered(len(model.layers))
    for i, layer in enumerate(model.layers):
        if i not in covered and any(map(_in_fp8, layer.modules())):
            raise ValueError(f"layer {i} is in FP8, and the recipe leaves it out: build it again")
    tokens_group = None
    experts_group = None
    if mesh is not None and dist.is_initialized():
        tokens_group = dist.group.WORLD
        experts_group = mesh.edp_group
    for i in covered:
        for module in list(model.layers[i].modules()):
            if isinstance(module, Experts):
                settings = {"recipe": recipe, "amax_group": experts_group}
                module.gemm = partial(fp8_grouped_gemm, **settings)
            for name, child in module.named_children():
                if isinstance(child, (nn.Linear, FP8Linear)):
                    setattr(module, name, FP8Linear(child, recipe, tokens_group))
    return model


def _in_fp8(module: nn.Module) -> bool:
    """Whether this is a linear layer or are experts that `to_fp8` has converted. Source: ours."""
    if isinstance(module, Experts):
        return module.gemm is not moe.grouped_gemm
    return isinstance(module, FP8Linear)


# ── 4 The demonstration ─────────────────────────────────────────────────────────────────────────

RECIPES = {"hybrid": HYBRID, "blockwise": BLOCKWISE}


@dataclass
class FP8Options:  # the flags that moe_fp8.py does not have
    fp8: str = moe.flag(
        "auto", "auto: tensor cores if any", choices=["auto", "hardware", "emulate"]
    )
    recipe: str = moe.flag("hybrid", "one scale per tensor, or tiles", choices=list(RECIPES))


def recipe_of(args: argparse.Namespace, device: torch.device) -> FP8Recipe:
    recipe = RECIPES[args.recipe]
    return replace(recipe, hardware=fp8_hardware(args.fp8, device, recipe))


def equivalence(mesh: Mesh, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """An FP8 model's logits on this mesh, next to a single device's: name to error.

    Two experts get no token; the last rank has none where there are several.
    """
    config = moe.MoEConfig(61, 16, "*E*E*E", num_experts=4 * mesh.ep, init_std=0.05)
    plain = MoELM(config).to(device, dtype)
    to_fp8(plain, HYBRID)
    parallel = moe.ParallelMoELM(config, mesh.ep_group).to(device, dtype)
    to_fp8(parallel, HYBRID, mesh)
    for model in (plain, parallel):
        for router in model.routers():
            router.bias[:2] = -10
    errors = {}
    for step, (tokens_BS, _) in enumerate(moe.uneven_batches(61, device)):
        there_BSV, _ = plain(tokens_BS)
        here_BSV, _ = parallel(moe.rank_rows(tokens_BS))
        gap_BSV = here_BSV - moe.rank_rows(there_BSV)
        if len(gap_BSV):
            largest = there_BSV.abs().max()
            gap = gap_BSV.abs().max() / largest
            errors[f"logits {step}"] = gap.item()
    return moe.over_all_ranks(errors)


def quantization_error(x: Tensor, operand: Operand) -> float:
    """‖x in FP8 − x‖ / ‖x‖, of x of any shape. Source: ours."""
    rounded = dequantize_fp8(quantize_fp8(x, *operand))
    error = rounded - x
    return (error.norm() / x.norm()).item()


def lost_to_zero(x: Tensor, operand: Operand) -> float:
    """The fraction of x that FP8 rounds to zero. Source: ours."""
    rounded = dequantize_fp8(quantize_fp8(x, *operand))
    lost = rounded == 0
    return lost.double().mean().item()


def formats() -> list[tuple]:
    """Rows of the claims: what each operand loses, and the formats' largest values."""
    generator = torch.Generator().manual_seed(0)
    x, spread = torch.randn(2, 512, 512, generator=generator)
    heavy = x * torch.exp(2 * spread)
    operands = {"E4M3": E4M3, "E5M2": E5M2, "1 × 128": TILE, "128 × 128": SQUARE}
    rows = []
    for name, operand in operands.items():
        gaussian = quantization_error(x, operand)
        tails = quantization_error(heavy, operand)
        lost = lost_to_zero(heavy, operand)
        here = f"{gaussian:.1%} / {tails:.1%} / {lost:.1%}"
        claim = f"{name}: error Gaussian / heavy tails / lost to 0"
        rows.append((claim, "–", here, "ours"))
    for name, largest in {"e4m3": "448", "e5m2": "57344"}.items():
        found = quantize_fp8(torch.ones(1), name)
        here = str(round(1 / found.inverse_scale.item()))
        claim = f"{name.upper()}: largest value"
        rows.append((claim, largest, here, here == largest))
    return rows


def measure(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = equivalence(mesh, device, torch.float64)
    error = moe.worst(errors)
    claim = "logits in FP8 equal the single device's, float64"
    here = f"worst {error:.1e} relative"
    verdict = error <= moe.BOUNDS["fp64"]
    claims = [*formats(), (claim, "exact", here, verdict)]
    model = moe.parallel_model(args, mesh, device)
    steps = moe.training(args, model, device, mesh)
    losses, _ = moe.demonstrate(steps, title="")
    recipe = recipe_of(args, device)
    where = "on tensor cores" if recipe.hardware else "emulated"
    moe.say(f"In FP8, {where}: all but the first {recipe.first} and the last {recipe.last} layers")
    model = moe.parallel_model(args, mesh, device)
    to_fp8(model, recipe, mesh)
    steps = moe.training(args, model, device, mesh)
    losses_fp8, _ = moe.demonstrate(steps, "without FP8", losses)
    last = sum(losses[-10:])
    gap = sum(losses_fp8[-10:]) / last - 1
    claim = "loss in FP8 over the loss without, last 10 steps"
    here = f"{gap:+.2%}"
    claims.append((claim, "< 0.1 %, 56B", here, "a small model, a short run"))
    return claims


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = moe.make_mesh(args.ep, device, args.timeout)
    moe.say_setting(args, f": ep {mesh.ep} × dp {mesh.dp}")
    if args.check:
        dtype, _ = moe.dtypes(args)
        errors = equivalence(mesh, device, dtype)
        good = moe.print_errors(errors, moe.BOUNDS[args.dtype])
    else:
        good = moe.print_claims(measure(args, mesh, device))
    if not good:
        raise SystemExit(1)


def check_fp8_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the file that they name, do not fit."""
    moe.check_args(args)
    recipe = recipe_of(args, torch.device(args.device))
    if not args.check:
        recipe.covered(len(args.pattern))


def flags() -> argparse.Namespace:
    configs = [FP8Options, moe.Options, moe.MoEConfig]
    return moe.parse_flags(__doc__, configs, check_fp8_args, ranks=4, steps=80)


if __name__ == "__main__":
    moe.launch(main, flags())
