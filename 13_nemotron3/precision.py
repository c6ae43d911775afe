# SPDX-License-Identifier: MIT-0
"""Chapter 13 in FP8 and in NVFP4: chapters 6 and 8's layers where Nemotron 3's recipes name them.

    model = to_fp8(ParallelNemotronLM(config, mesh), FP8Recipe(first=1, last=1))
    model = to_nvfp4(NemotronLM(config), NVFP4Recipe(last=1))

Papers: the Nemotron 3 white paper, 2025, arXiv 2512.20856; Nemotron 3 Super, 2026, arXiv 2604.12374

                                         FP8                      NVFP4 (Super, table 3)
    Mamba      in_proj                   FP8                      NVFP4
               out_proj                  FP8                      MXFP8
    attention  q, k, v and output        FP8                      –
    experts    routed, shared            FP8                      NVFP4
               latent projections        FP8                      –
    feed-forward                         FP8                      NVFP4
    MTP, embedding, output layer, router, norms, first and last layers    –

"–" keeps its precision. Experts may be sharded over ranks in FP8: codes are then the single
device's to the bit, because ranks agree on each amax. In NVFP4 each rank rounds its own tokens, so
several ranks differ from the single device.
With tp > 1 both are refused: chapter 6 has no tensor parallelism, and chapter 8 proved NVFP4 on
layers of its own. All GEMMs are emulated.
"""

from __future__ import annotations

import zlib
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nemotron3 import (
    Experts,
    Group,
    MoELayer,
    NemotronLM,
    _all_reduce,
    gemm_dtype,
    group_rank,
    group_size,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ── 1 FP8 ─────────────────────────────────────────────────────────────────────────────────────────

# region carried: FP8_FORMATS, Quantized, _amax, _per_element, quantize_fp8 (home: 06_moe_fp8/fp8)
FP8_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
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


# endregion copy 1d8ba8
# region carried: dequantize_fp8, fp8_gemm, _quantize_both, _FP8Linear (home: 06_moe_fp8/fp8)
def dequantize_fp8(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes · inverse scale, (...), in `dtype`, fp32 or higher. Source: Nemotron-H."""
    codes, inverse_scale, block = quantized
    inverse_scale = _per_element(inverse_scale, block, codes.shape)
    return codes.to(dtype) * inverse_scale.to(dtype)


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


# endregion copy e709e3
# region carried: Operand, E4M3, E5M2, FP8Recipe, HYBRID (home: 06_moe_fp8/fp8)
Operand = namedtuple("Operand", "format block power_of_two", defaults=[None, False])
E4M3 = Operand("e4m3")
E5M2 = Operand("e5m2")


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
# endregion copy 53ee69


# region carried: fp8_linear, FP8Linear (home: 06_moe_fp8/fp8)
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


# endregion copy 05b946
# region carried: fp8_grouped_gemm (home: 06_moe_fp8/fp8)
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


# endregion copy c75614


def check_no_tp(model: NemotronLM, name: str) -> None:
    """Raises ValueError for a model whose heads are sharded."""
    if model.mesh.tp > 1:
        raise ValueError(f"{name} with tp={model.mesh.tp}: not written; use tp=1 and more ep")


def to_fp8(model: NemotronLM, recipe: FP8Recipe) -> NemotronLM:
    """Puts the trunk's linear layers that `recipe` covers in FP8, in place, and returns the model.

    On a mesh all ranks share the amax of activations, and edp ranks that of an expert's rows.
    Raises: ValueError where the recipe covers no layer, and with tp > 1; nothing is changed then.
    Source: Nemotron-H, section 2.4; chapter 6.
    """
    check_no_tp(model, "FP8")
    covered = recipe.covered(len(model.layers))
    parallel = model.mesh.data_group is not None
    tokens_group = dist.group.WORLD if parallel else None
    experts_group = model.mesh.edp_group if parallel else None
    for layer in model.layers[covered.start : covered.stop]:
        for module in list(layer.modules()):
            if isinstance(module, Experts):
                settings = {"recipe": recipe, "amax_group": experts_group}
                module.gemm = partial(fp8_grouped_gemm, **settings)
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, FP8Linear(child, recipe, tokens_group))
    return model


# ── 2 NVFP4 ───────────────────────────────────────────────────────────────────────────────────────

# region carried: FP32_LARGEST, FP32_EXPONENT, LARGEST, E4M3_LARGEST, BLOCK, SIGNS (home: 08_nvfp4)
FP32_LARGEST = torch.finfo(torch.float32).max
FP32_EXPONENT = 127  # the exponent bits of an fp32 value in [1, 2)
LARGEST = 6.0  # of E2M1
E4M3_LARGEST = 448.0
BLOCK = 16  # values that share a scale
SIGNS = 0xD7E8  # bit k is set where σ_k = −1
# endregion copy 9ec216


# region carried: _encode_e2m1, _decode_e2m1, _pack, _unpack, _decode_packed (home: 08_nvfp4)
def _encode_e2m1(scaled: Tensor, uniforms: Tensor | None) -> Tensor:
    """fp32 values (...) to E2M1 codes, uint8 (...). uniforms in [0, 1): stochastic rounding."""
    magnitude = scaled.abs().clamp_(max=LARGEST)
    octave = (magnitude.view(torch.int32) >> 23).clamp_(min=FP32_EXPONENT)
    # 2, 1 or 1/2 in the octaves 127, 128 and 129: powers of two with exponent bits 128, 127, 126.
    # The GPU's own conversion instruction does all of this in one step.
    steps_per_unit = 255 - octave
    steps_per_unit <<= 23
    steps = magnitude.mul_(steps_per_unit.view(torch.float32))  # exact
    whole = steps.round() if uniforms is None else steps.floor()
    if uniforms is not None:
        whole += uniforms < steps - whole
    octave -= FP32_EXPONENT
    code = whole.to(torch.uint8) + 2 * octave.to(torch.uint8)
    sign = torch.signbit(scaled).to(torch.uint8)
    return code | sign << 3


def _decode_e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """E2M1 codes (...) to their values (...)."""
    code = (codes & 7).to(dtype)
    magnitude = torch.maximum(code / 2, code - 2)
    magnitude = torch.maximum(magnitude, 2 * code - 8)
    return torch.where(codes >= 8, -magnitude, magnitude)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, (R, C) to (R, C/2): the even column in the lower four bits."""
    even = codes[:, 0::2]
    odd = codes[:, 1::2]
    return even | odd << 4


def _unpack(packed: Tensor) -> Tensor:
    """(R, C/2) bytes to (R, C) codes."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _decode_packed(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, C/2) bytes to (R, C) values, from a table of the pair that each of 256 bytes holds."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    pairs = _decode_e2m1(_unpack(every_byte[:, None]), dtype)
    return F.embedding(packed.int(), pairs).flatten(1)


# endregion copy fbe4e2
# region carried: NVFP4Tensor, _global_scale, nvfp4_quantize, nvfp4_dequantize (home: 08_nvfp4)
class NVFP4Tensor(NamedTuple):
    """A matrix of R × C values in 4.5 bits each. Source: as `nvfp4_quantize`."""

    codes: Tensor  # (R, C/2) uint8, two E2M1 codes a byte
    scales: Tensor  # float8_e4m3fn: (R, C/16), or (R/16, C/16) with 16 × 16 tiles
    amax: Tensor  # fp32, one value: the largest |x| of the tensor, on all ranks


def _global_scale(amax: Tensor) -> Tensor:
    """s_enc; 1 for a zero tensor."""
    # 6 · 448 / amax would be computed as 2688 · (1 / amax), which rounds twice.
    scale = torch.full_like(amax, 2688) / amax
    return torch.where(amax == 0, 1.0, scale.clamp(max=FP32_LARGEST))


@torch.no_grad()
def nvfp4_quantize(
    x: Tensor, two_d: bool = False, uniforms: Tensor | None = None, amax_group: Group = None
) -> NVFP4Tensor:
    """x (R, C) rounded to NVFP4, with a scale per 16 values of a row, or per 16 × 16 tile.

    Args:
        x: a matrix; its last dimension is the one that the GEMM sums over. Computed in fp32.
        two_d: 16 × 16 tiles, so that x and its transpose have the same values. For weights.
        uniforms: (R, C) in [0, 1): rounded up where it is less than the distance from the lower
            neighbour, over the gap. None: to nearest, ties to even.
        amax_group: ranks that hold shards of one tensor, which has one amax. Collective. None: x is
            not sharded.

    Raises: ValueError for a size that is no multiple of 16, or for uniforms of another shape.
    Source: Pretraining LLMs with NVFP4, section 2 and appendix B.
    """
    tile_rows = BLOCK if two_d else 1
    R, C = x.shape
    if not x.numel() or R % tile_rows or C % BLOCK:
        need = f"multiples of {tile_rows} and {BLOCK}"
        raise ValueError(f"x is ({R}, {C}), and its sizes must be {need}: pad it with zeros")
    if uniforms is not None and uniforms.shape != x.shape:
        raise ValueError(f"uniforms are {tuple(uniforms.shape)}, but x is ({R}, {C})")
    x = x.to(torch.float32).contiguous()
    tiles = x.reshape(R // tile_rows, tile_rows, C // BLOCK, BLOCK)
    tile_amax = tiles.abs().amax(dim=(1, 3))
    amax = tile_amax.amax().nan_to_num(torch.inf, torch.inf)  # a maximum over ranks may drop NaN
    if amax_group is not None:
        _all_reduce(amax, amax_group, dist.ReduceOp.MAX)
    s_enc = _global_scale(amax)
    unrounded = tile_amax * (s_enc * (1 / LARGEST))
    scales = unrounded.clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn)
    decode = scales.to(torch.float32) * s_enc.reciprocal()
    encode = decode.reciprocal().clamp(max=FP32_LARGEST)
    scaled = tiles * encode[:, None, :, None]
    codes = _encode_e2m1(scaled.view(R, C), uniforms)
    return NVFP4Tensor(_pack(codes), scales, amax)


def nvfp4_dequantize(quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `quantized`, (R, C), in `dtype`, fp32 or higher. Source: `nvfp4_quantize`'s."""
    codes, scales, amax = quantized
    values = _decode_packed(codes, dtype)
    s_enc = _global_scale(amax).to(dtype)
    decode = scales.to(dtype) * s_enc.reciprocal()
    rows, columns = scales.shape
    tiles = values.view(rows, len(values) // rows, columns, BLOCK)
    return tiles.mul_(decode[:, None, :, None]).view_as(values)


# endregion copy d6bd32
# region carried: random_hadamard, NVFP4Recipe, nvfp4_gemm, _tokens_last (home: 08_nvfp4)
def random_hadamard(x: Tensor) -> Tensor:
    """Each 16 values of the last dimension times diag(σ) H₁₆ / 4; x (..., C) to (..., C).

    Orthogonal: applied to both operands of a GEMM, along the dimension that it sums over, it
    changes nothing but rounding. Raises: ValueError where C is no multiple of 16.
    Source: Pretraining LLMs with NVFP4, section 4.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"{x.shape[-1]} values: the Hadamard transform needs multiples of {BLOCK}")
    # Made on x's device: a copy from the CPU would stall it. H_ij is −1 where i and j have an odd
    # number of bits in common. Two foldings bring the parity of four bits into the lowest one.
    i = torch.arange(BLOCK, device=x.device)
    parity = i[:, None] & i
    parity = parity ^ parity >> 2
    parity = parity ^ parity >> 1
    sign = SIGNS >> i
    is_negative = (parity ^ sign[:, None]) & 1
    matrix = (1 - 2 * is_negative).to(x.dtype) / 4
    tiles = x.reshape(-1, BLOCK) @ matrix
    return tiles.view(x.shape)


@dataclass(frozen=True)
class NVFP4Recipe:
    """How operands are rounded, and in which layers.

    Source: Pretraining LLMs with NVFP4, section 4.
    """

    two_d_weights: bool = True  # 16 × 16 tiles, and not 1 × 16 blocks
    hadamard: bool = True  # on both operands of wgrad
    stochastic: bool = True  # rounding of gradients
    first: int = 0  # layers at the beginning that keep their precision
    last: int = 1  # layers at the end

    def covered(self, num_layers: int) -> range:
        """The layers in NVFP4. Raises: ValueError where there is none, or a count is negative."""
        covered = range(self.first, num_layers - self.last)
        if not covered or min(self.first, self.last) < 0:
            outside = f"the first {self.first} and the last {self.last} of {num_layers} layers"
            raise ValueError(f"the recipe leaves out {outside}: it covers none; add layers")
        return covered


def nvfp4_gemm(a: NVFP4Tensor, b: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ of a (M, K) and b (N, K), (M, N) in `dtype`. Emulated: sums are in at least fp32.

    Source: as `nvfp4_quantize`.
    """
    precision = torch.promote_types(dtype, torch.float32)
    a_MK = nvfp4_dequantize(a, precision)
    b_NK = nvfp4_dequantize(b, precision)
    with torch.autocast(a_MK.device.type, enabled=False):
        return (a_MK @ b_NK.mT).to(dtype)


def _tokens_last(x: Tensor, recipe: NVFP4Recipe) -> Tensor:
    """wgrad's copy of x before rounding: tokens × features to features × tokens, transformed."""
    return random_hadamard(x.mT) if recipe.hadamard else x.mT


# endregion copy 46c4bc
# region carried: _generator, _uniforms, _all_gather, _gather, _reduce_scatter (home: 08_nvfp4)
def _generator(device: torch.device, seed: int | None) -> torch.Generator | None:
    """Of this layer, rank and step alone; None, for PyTorch's default generator, without a seed."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def _uniforms(x: Tensor, recipe: NVFP4Recipe, generator: torch.Generator | None) -> Tensor | None:
    """Random values for the gradient x (...); None: round it to nearest."""
    if not recipe.stochastic:
        return None
    return torch.rand(x.shape, generator=generator, device=x.device)


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' shards of x, in order of rank, along `dim`."""
    shards = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(shards, x.contiguous(), group)
    return torch.cat(shards, dim)


def _gather(x: NVFP4Tensor, group: Group, dim: int) -> NVFP4Tensor:
    """The full tensor from shards along `dim`: nine bytes per 16 values travel."""
    if group_size(group) == 1:
        return x
    codes = _all_gather(x.codes, group, dim)
    scales = _all_gather(x.scales.view(torch.uint8), group, dim)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), x.amax)


def _reduce_scatter(partial_y_RF: Tensor, group: Group) -> Tensor:
    """The sum over ranks; each takes its rows, y_rF."""
    if group_size(group) == 1:
        return partial_y_RF
    # torch 2.13 has a new name for reduce_scatter_tensor.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    R, F = partial_y_RF.shape
    y_rF = partial_y_RF.new_empty(R // group_size(group), F)
    reduce_scatter(y_rF, partial_y_RF.contiguous(), group=group)
    return y_rF


# endregion copy 6c229b
# region carried: _NVFP4Linear, NVFP4Linear, SHARD_DIM, _shard, seed_rounding (home: 08_nvfp4)
class _NVFP4Linear(torch.autograd.Function):
    """x (R, H) and weight (F, H) to y (R, F), or shards of them, as the layer is sharded."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        recipe = layer.recipe
        group = layer.group
        # A copy is named after the GEMM that reads it.
        x_fprop = nvfp4_quantize(x, amax_group=group)
        w_fprop = nvfp4_quantize(weight, recipe.two_d_weights, amax_group=group)
        kept = ()  # a frozen weight keeps no activation
        if ctx.needs_input_grad[1]:
            kept = nvfp4_quantize(_tokens_last(x, recipe), amax_group=group)
        ctx.save_for_backward(weight, *kept)
        ctx.layer = layer
        ctx.seed = layer.rounding_seed  # another forward pass may change it before backward
        ctx.x_dtype = x.dtype
        if layer.sharding == "outputs":
            x_fprop = _gather(x_fprop, group, dim=0)
        y = nvfp4_gemm(x_fprop, w_fprop, gemm_dtype(x))
        return _reduce_scatter(y, group) if layer.sharding == "inputs" else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, *kept = ctx.saved_tensors
        layer = ctx.layer
        generator = _generator(dy.device, ctx.seed)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            uniforms = _uniforms(dy, layer.recipe, generator)
            dy_dgrad = nvfp4_quantize(dy, False, uniforms, layer.group)
            # With 16 × 16 tiles these are forward's codes, transposed; with 1 × 16 they are not.
            two_d = layer.recipe.two_d_weights
            w_dgrad = nvfp4_quantize(weight.mT, two_d, amax_group=layer.group)
            if layer.sharding == "inputs":
                dy_dgrad = _gather(dy_dgrad, layer.group, dim=0)
            dx = nvfp4_gemm(dy_dgrad, w_dgrad, ctx.x_dtype)
            if layer.sharding == "outputs":
                dx = _reduce_scatter(dx, layer.group)
        if ctx.needs_input_grad[1]:
            dy_last = _tokens_last(dy, layer.recipe)
            uniforms = _uniforms(dy_last, layer.recipe, generator)
            dy_wgrad = nvfp4_quantize(dy_last, False, uniforms, layer.group)
            x_wgrad = NVFP4Tensor(*kept)
            if layer.sharding == "inputs":
                dy_wgrad = _gather(dy_wgrad, layer.group, dim=1)
            if layer.sharding == "outputs":
                x_wgrad = _gather(x_wgrad, layer.group, dim=1)
            dweight = nvfp4_gemm(dy_wgrad, x_wgrad, weight.dtype)
        return dx, dweight, None


class NVFP4Linear(nn.Module):
    """Replaces an nn.Linear without bias: x (..., H) to (..., F), three emulated GEMMs in NVFP4.

    Unsharded it shares the weight of `linear`, which keeps its precision: each GEMM rounds it anew.
    Sharded over `group`, the first dimension of x is sharded before a layer with sharding
    "outputs" and after one with sharding "inputs", and full between the two.

    Args: linear: an nn.Linear, full. sharding: "outputs", "inputs" or None. group: the ranks that
        share the layer; needed with a sharding alone.
    Until `seed_rounding` is called, random values come from PyTorch's default generator.
    Raises: ValueError for a bias, and where a size per rank is no multiple of 16: features here,
        tokens in forward.
    Source: Pretraining LLMs with NVFP4, section 4.
    """

    def __init__(
        self,
        linear: nn.Linear,
        recipe: NVFP4Recipe = NVFP4Recipe(),
        sharding: str | None = None,
        group: Group = None,
    ):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("NVFP4Linear has no bias: build the layer with bias=False")
        if sharding not in SHARD_DIM or (sharding is None) != (group is None):
            raise ValueError(f"sharding={sharding!r}, group={group}: both, or None and None")
        self.recipe = recipe
        self.sharding = sharding
        self.group = group
        self.tp = 1 if group is None else group_size(group)
        self.rounding_seed: int | None = None
        self.weight = linear.weight
        for dim, size in enumerate(linear.weight.shape):
            ranks = self.tp if dim == SHARD_DIM[sharding] else 1
            if size % (BLOCK * ranks):
                need = f"a multiple of {BLOCK} on each of {ranks} ranks"
                raise ValueError(f"a weight of {tuple(linear.weight.shape)}: NVFP4 needs {need}")
        if sharding is not None:
            full = linear.weight
            shard = _shard(full.detach(), SHARD_DIM[sharding], group_rank(group), self.tp)
            self.weight = nn.Parameter(shard, requires_grad=full.requires_grad)

    @torch.compiler.disable  # random values are seeded anew in each step
    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        tokens = len(rows)
        if self.sharding == "inputs":
            tokens /= self.tp  # not //: any remainder is refused
        if not tokens or tokens % BLOCK:
            remedy = "choose another batch or sequence length, or pad"
            raise ValueError(f"{tokens:g} tokens on a rank, no multiple of {BLOCK}: {remedy}")
        y = _NVFP4Linear.apply(rows, self.weight, self)
        return y.unflatten(0, (-1, *x.shape[1:-1]))


SHARD_DIM = {None: None, "outputs": 0, "inputs": 1}  # of a weight (outputs, inputs)


def _shard(full: Tensor, dim: int, rank: int, tp: int) -> Tensor:
    # A copy: a view would keep the memory of the full tensor alive.
    return full.chunk(tp, dim)[rank].clone(memory_format=torch.contiguous_format)


def seed_rounding(model: nn.Module, seed: int, step: int, rank: int = 0) -> None:
    """Seeds the stochastic rounding of every `NVFP4Linear`; equal arguments give equal values.

    Call it before every forward pass, with another `step`: until then each pass rounds alike.
    Args: rank: of this process in all. Source: ours; production keeps a generator's state.
    """
    for name, module in model.named_modules():
        if isinstance(module, NVFP4Linear):
            place = (seed, step, rank, name)
            module.rounding_seed = zlib.crc32(repr(place).encode())


# endregion copy 0d5b87

# MXFP8 has blocks of 32 values and powers of two for scales: chapter 6's blockwise recipe with
# other tiles.
MX = Operand("e4m3", (1, 32), True)
MXFP8 = FP8Recipe((MX, MX), (MX, MX), (MX, MX))
IN_NVFP4 = ("in_proj", "up_proj", "down_proj", "up", "down")


@dataclass
class ExpertRounding:
    """What `_NVFP4Linear` asks of a layer, for the GEMMs of experts. Source: ours."""

    recipe: NVFP4Recipe
    group: Group = None
    sharding: str | None = None
    rounding_seed: int | None = None


def nvfp4_grouped_gemm(
    x_RH: Tensor, weight_EFH: Tensor, counts: list[int], rounding: ExpertRounding
) -> Tensor:
    """Chapter 6's `grouped_gemm` in NVFP4, (R, F): each expert's rows have scales of their own.

    An expert's rows are padded to a multiple of 16 with zeros, which change no amax.
    Raises: ValueError where counts do not fit. Source: ours.
    """
    if sum(counts) != len(x_RH) or len(counts) != len(weight_EFH):
        raise ValueError(f"counts {counts} are not {len(x_RH)} rows for {len(weight_EFH)} experts")
    found = []
    for rows, weight_FH in zip(x_RH.split(counts), weight_EFH.unbind()):
        if not len(rows):
            found.append(rows @ weight_FH.mT)
            continue
        padded = F.pad(rows, (0, 0, 0, -len(rows) % BLOCK))
        y_RF = _NVFP4Linear.apply(padded, weight_FH, rounding)
        found.append(y_RF[: len(rows)])
    return torch.cat(found)


def to_nvfp4(model: NemotronLM, recipe: NVFP4Recipe) -> NemotronLM:
    """Puts the trunk's layers that Super's recipe names in NVFP4, in place, and returns the model.

    Tokens of a rank must be a multiple of 16. `seed_rounding` does not reach experts: their random
    values are of PyTorch's default generator. Raises: ValueError where the recipe covers no layer,
    sizes are no multiples of 16, and with tp > 1; nothing is changed then.
    Source: Nemotron 3 Super, table 3.
    """
    check_no_tp(model, "NVFP4")
    covered = recipe.covered(len(model.layers))
    replacements = []
    for layer in model.layers[covered.start : covered.stop]:
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if not isinstance(child, nn.Linear):
                    continue
                if name in IN_NVFP4:
                    replacements.append((module, name, NVFP4Linear(child, recipe)))
                elif name == "out_proj":
                    replacements.append((module, name, FP8Linear(child, MXFP8)))
            if isinstance(module, MoELayer):
                for weight in module.experts.parameters():
                    check_multiples(weight)
                gemm = partial(nvfp4_grouped_gemm, rounding=ExpertRounding(recipe))
                replacements.append((module.experts, "gemm", gemm))
    for module, name, replacement in replacements:  # after all checks
        setattr(module, name, replacement)
    return model


def check_multiples(weight_EFH: Tensor) -> None:
    """Raises ValueError where an expert's sizes are no multiples of 16."""
    if any(size % BLOCK for size in weight_EFH.shape[1:]):
        sizes = tuple(weight_EFH.shape)
        raise ValueError(f"experts of {sizes}: NVFP4 needs multiples of {BLOCK} but for the first")
