# SPDX-License-Identifier: MIT-0
"""Chapter 8. NVFP4: linear layers whose three GEMMs read values of four bits.

Papers: NVIDIA Nemotron 3: Efficient and Open Intelligence, NVIDIA, 2025, arXiv 2512.20856;
        Nemotron 3 Super, NVIDIA, 2026, arXiv 2604.12374;
        Pretraining Large Language Models with NVFP4, NVIDIA, 2025, arXiv 2509.25149

The problem. GEMMs of 4 bits run at twice the speed of chapter 6's 8 bits, or more. But eight
magnitudes from 0 to 6 cannot follow a tensor whose values span many powers of two.

The idea. Two levels of scales, one per 16 values and one per tensor. And each operand is rounded
for the GEMM that reads it, so that its blocks of 16 lie along the dimension which is summed:

    fprop    y  = x · wᵀ      16 inputs of a token,   16 × 16 tiles of w      nearest
    dgrad    dx = dy · w      16 outputs of a token,  the same tiles of w     dy: stochastic
    wgrad    dw = dyᵀ · x     16 tokens of a feature, Hadamard transform      dy: stochastic

          x_RH ──► blocks along H ─────────────────────────► fprop
            └────► transposed, Hadamard, blocks along R ───► wgrad      kept at 4.5 bits per value
          w_FH ──► 16 × 16 tiles ──────────────────────────► fprop, and transposed for dgrad
         dy_RF ──► stochastic, blocks along F ─────────────► dgrad
            └────► transposed, Hadamard, stochastic ───────► wgrad

Run it (no flag is needed; --help lists them):

    python 08_nvfp4/nvfp4.py                4 local ranks that share every layer
    python 08_nvfp4/nvfp4.py --ranks 1      one process, for a debugger
    python 08_nvfp4/nvfp4.py --check        equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 08_nvfp4/nvfp4.py

FP4 GEMMs are emulated. CPUs, H100 and H200 have no FP4 tensor cores, so operands are rounded to
four bits exactly as on hardware, and multiplied in higher precision. No speed is claimed.

Left out: FP4 GEMMs on Blackwell GPUs; MXFP4; the experts of chapter 6 in NVFP4; the paper's tables
(nvfp4_tables.py).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension,
# replicated on the ranks of the group; a small letter is this rank's shard of it. partial_ marks a
# partial sum.
#
#     B  sequences of a batch      R  rows: tokens, B · S            r = R / tp
#     S  tokens of a sequence      H  inputs of a linear layer       h = H / tp
#     V  vocabulary entries        F  its outputs                    f = F / tp
#     L  layers                    N  attention heads                n = N / tp
#
# tp is the number of ranks. They share each linear layer that is in NVFP4, and between those
# layers each has its own rows of the batch (b = B / tp). Operators that take a tensor of any shape
# have no suffix.
#
# "region carried" marks code that is copied from its home chapter. Editors fold it.

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
import sysconfig
import threading
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = dist.ProcessGroup | None
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens_BS and targets_BS; target −100 is ignored
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class GPTConfig:
    """Sizes of the model. Raises ValueError for impossible ones."""

    vocab_size: int = 256
    num_layers: int = flag(4, "layers, L; the last is not in NVFP4", least=2)
    hidden_size: int = flag(128, "hidden size, H", least=1)
    num_heads: int = flag(4, "attention heads, N", least=1)
    seq_length: int = flag(64, "tokens of a sequence, S", least=1)
    ffn_hidden_size: int | None = None  # None: 4 · hidden_size
    init_std: float = 0.04
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        if self.hidden_size % self.num_heads:
            sizes = f"hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 E2M1: four bits ─────────────────────────────────────────────────────────────────────────
#
# A code has one bit of sign, two of exponent and one of mantissa: the value is 2^(e − 1) · 1.m, and
# m / 2 for e = 0. The code 0 11 0 is 2² · 1.0 = 4, and 1 00 1 is −0.5. The eight magnitudes:
#
#     code          0     1     2     3     4           5           6                       7
#     magnitude     0    0.5    1    1.5    2           3           4                       6
#                   ├──┬──┼──┬──┼──┬──┼──┬──┼─────┬─────┼─────┬─────┼───────────┬───────────┤
#     tie             0.25  0.75  1.25  1.75     2.5         3.5                5
#     goes to          0     1     1     2        2           4                 4
#
# The step is 1/2 up to 2, then 1 up to 4, then 2. A tie goes to the even code, as everywhere in
# floating point: 2.5 becomes 2 (code 4), and 3.5 becomes 4 (code 6).
#
# (The format is that of the OCP standard for four bits, and it has neither infinity nor NaN.) The
# relative error is up to 1/3 at 0.75, and 1/5 between two codes above 1. FP8's E4M3 has 1/17.
#
# So rounding is arithmetic in codes. In the octave [1, 2) a value y lies at 2·y, in [2, 4) at
# y + 2, in [4, 8) at y/2 + 4, and torch.round takes ties to even. For y = 4.7: 4.7/2 + 4 = 6.35,
# code 6, magnitude 4. The octave is the exponent of the fp32 value, and below 1 the step is that
# of [1, 2). Decoding is the largest of three lines, code/2, code − 2 and 2·code − 8.
#
# Stochastic rounding goes up with the probability of the distance: 4.7 lies 0.35 of the gap above
# 4, so it becomes 6 in 35 % of all draws, and the mean is 4 + 0.35 · 2 = 4.7. Nearest would give 4
# every time. A value that has a code keeps it in every draw. A random value u in [0, 1) decides:
#
#     4.7 at u = 0.2   6.35 is code 6, and 0.2 < 0.35: up, to code 7      6
#     4.7 at u = 0.8   6.35 is code 6, and 0.8 ≥ 0.35: down, to code 6    4
#
# The comparison with the remainder is exact. A sum, floor(6 + u), would be rounded: with u near 1
# it reaches 7, and a value that has a code leaves it.

FP32_LARGEST = torch.finfo(torch.float32).max
FP32_EXPONENT = 127  # the exponent bits of an fp32 value in [1, 2)
LARGEST = 6.0  # of E2M1
E4M3_LARGEST = 448.0
BLOCK = 16  # values that share a scale


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


# ── 1.2 Two levels of scales ────────────────────────────────────────────────────────────────────
#
# A block of 16 values has a scale s_b in E4M3, chapter 6's format, and the tensor has one in fp32.
# E4M3 reaches from 2^−9 to 448, too little by itself, so the tensor's scale moves the largest block
# to 448. (MXFP4 has blocks of 32 and powers of two for scales: no second level, 4.25 bits, and up
# to half of the range of its codes is not used.) A value is
#
#     x ≈ code · s_b / s_enc           s_enc = 6 · 448 / amax of the tensor
#                                      s_b   = E4M3(amax of the block · s_enc / 6)
#
# In a tensor with amax 3, s_enc = 896. A block with amax 0.1 then has 0.1 · 896 / 6 = 14.93, which
# E4M3 rounds to 15. Its values are multiplied by s_enc / 15 = 59.7, so that the largest is 5.97:
#
#     x                        0.1      0.05     −0.031     0.004
#     x · s_enc / s_b          5.97     2.99     −1.85      0.239
#     E2M1                     6        3        −2         0
#     code · s_b / s_enc       0.1004   0.0502   −0.0335    0
#
# The rounded s_b is used to encode, so what E4M3 rounds away is hardly an error of x. Only where it
# rounds down does the largest value lie above 6, by up to 1/16, and is clipped. Every block has a
# value near 6, so one in 16 is about as precise as in FP8, and the others less so.
#
# The order of operations is that of the production kernels, to the bit:
#
#     s_b    = E4M3(min(amax_b · (s_enc · (1/6)), 448))     (amax_b/6) · s_enc would round once more
#     scaled = x · min(1 / (s_b · (1/s_enc)), fp32 max)     not a division by s_b/s_enc: it changes
#                                                           up to one code in a thousand
#
# Four cases need care:
#
# · A zero tensor: 2688/0 is infinite, and 0 · ∞ is NaN. So s_enc is 1, and all codes are 0. Padding
#   rows, frozen experts and masked losses make such tensors in every long run.
# · A zero block: s_b is 0, the reciprocal is capped, and 0 · fp32 max is 0.
# · A block whose s_b underflows, amax_b below 2.2e-6 of the tensor's: it is flushed to zero, on
#   purpose. Its codes are ±6 (x · fp32 max, clamped) and its scale is 0.
# · A value that is not finite: all values of the tensor become NaN or infinite, on all ranks, and
#   the gradient norm shows it. A NaN that became a code would be a number like any other.
#
# Storage: 4 bits per code and 8 per 16 for the scale, 4.5 bits per value. One fp32 is for all.
# A byte holds two codes, so that the saving is real: 1024 × 1024 values take 590 KB, in bf16 2 MB.
#
# Without the tensor's scale the format still works for a while. A block with amax above 2688 is
# clipped, one with amax below 6 · 2^−10 vanishes, and the loss shows it late.


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


# ── 1.3 Three GEMMs, and the axis of the blocks ─────────────────────────────────────────────────
#
# Each GEMM is a · bᵀ of two matrices with the summed dimension last. A scale can be taken out of a
# sum of 16 terms only where it is the same for all 16, so blocks lie along that dimension. With
# blocks b, scales s of x and scales z of w, an FP4 tensor core computes an element of y as
#
#     y[r, f] = 1 / (s_enc · z_enc) · Σ_b  s_b · z_b · Σ_{h in b} code[r, h] · code[f, h]
#
# The inner sum has products of two codes, the outer one two E4M3 scales, and the first factor is
# one fp32 for all. So each GEMM has its own copies:
#
#     fprop    y_RF  =  x_RH · w_FH            sum over H      x: 16 inputs of one token
#     dgrad    dx_RH =  dy_RF · w_HF           sum over F      dy: 16 outputs of one token
#     wgrad    dw_FH =  dy_FR · x_HR           sum over R      16 tokens of one feature
#
# The same eight values of x, in blocks of two for the sake of the drawing:
#
#     fprop, along H    [x00 x01] [x02 x03]         wgrad, along R    [x00  [x01  [x02  [x03
#                       [x10 x11] [x12 x13]                            x10]  x11]  x12]  x13]
#
# So x is rounded twice, along H and along R, into different values. That is harmless: each is an
# estimate of x. A weight is different. Backward must differentiate the function that forward
# computed, and that function contains the rounded weight. With 1 × 16 blocks w_FH has blocks along
# H and w_HF along F, and dgrad multiplies with another matrix than fprop did: its error is 13 % for
# Gaussian weights, and it is no rounding noise but the derivative of another function. One scale
# per 16 × 16 tile is the same read in both directions: Q(wᵀ) = Q(w)ᵀ, to the bit. Its
# price is that 256 values share a scale: 11 % error and not 9.5 % for Gaussian weights.
#
# Reuse forward's 1 × 16 codes for dgrad, transposed, and its blocks lie along the wrong dimension:
# a tensor core would apply one scale to 16 values that have 16. So the two copies of each operand
# are made from high precision, each for its GEMM.
#
# ── 1.4 The Hadamard transform, for wgrad ───────────────────────────────────────────────────────
#
# wgrad sums over tokens, and tokens differ in size. In a block of 16 tokens one of amax 40 sets the
# scale, and E2M1's smallest step is then 40/12 = 3.3: nearest rounding takes what is below 1.7 to
# zero in the 15 others, in each step, always. With an orthogonal 16 × 16 matrix M on both operands
#
#     (dy_FR M)(x_HR M)ᵀ = dy_FR M Mᵀ x_HRᵀ = dy_FR · x_RH
#
# the GEMM is the same, and each transformed value is a mixture of 16 tokens. M = diag(σ) H₁₆ / 4,
# H₁₆ of ±1 and σ one fixed sequence of signs, the same in all layers. Two mistakes are silent. M
# cancels only where both operands have it, with the same tiles of 16 tokens: on one operand alone
# the gradient is wrong by more than its size, and the loss still falls. And the amax is taken after
# the transform: sixteen values whose signs are those of a column of M become one that is four times
# as large, and with the amax of before it would be clipped. (Activations often have one sign. That
# is what σ is for: H₁₆ alone has a column of ones.)
#
# A block of four tokens, with H₄ / 2 and one loud token, shows both sides:
#
#     dy       40     0.5    0.5    0.5        scale 40/6 = 6.7:  0.5 is 0.075 of it, and becomes 0
#     dy M     20.75  19.75  19.75  19.75      scale 20.75/6:     all are near 6, and none vanishes
#
# The 0.5 of the others is now in the difference between 20.75 and 19.75, and rounding may lose it
# there too. What is gained is that the error no longer has a direction: it is no systematic zero.
# Noise, not bias: a test that a single transformed GEMM is more precise fails.
#
# fprop and dgrad have no transform: their blocks lie along features, and a weight's 16 × 16 tile
# would need one along both dimensions.  [2509.25149, section 4]

SIGNS = 0xD7E8  # bit k is set where σ_k = −1


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


# ── 1.5 Stochastic rounding, for gradients ──────────────────────────────────────────────────────
#
# Nearest rounding has a bias: the same small gradients vanish in each step. Stochastic rounding is
# right on average, so what one step loses another one brings. Its price is noise, twice the mean
# square error of nearest for values evenly spread between two codes. So gradients are rounded
# stochastically, and weights and activations to nearest: in the forward pass the noise would be no
# estimate of anything, since the loss is not linear in it.
#
#     0.2 next to 6 in a block    nearest: 0 in each step         stochastic: 0.5 in 40 % of them
#
# Its random values are a function of their place: seed, step, rank and the module's name, as
# chapter 2's dropout masks are. They never come from the generator that draws dropout or weights.
# Each rank has its own: with the same values everywhere, shards of one tensor would be rounded
# alike. And each step has its own: equal values in each step are no longer right on average.
# (Hardware rounds with 8 random bits per value; here they are fp32 values. Both copies of dy have
# their own, and each is drawn for the shape that it rounds.)
#
# Leave out any of these tricks and training still runs, and the loss falls. At ten trillion tokens
# the paper sees the difference, after 100 small steps nothing does. So this chapter shows each
# trick where it is exact, or in a problem that is made for it.
#
# ── 1.6 Which layers ────────────────────────────────────────────────────────────────────────────
#
# Embeddings, norms, softmax, the output layer and the optimizer keep their precision: they are a
# few per cent of the arithmetic. So do some layers as a whole, those whose rounding costs most. In
# the study of 2509.25149 these are the last layers of a model, and the first two. Super keeps only
# the last 14 of 88, 16 %, and in all layers the projections of attention and of latent experts,
# Mamba's output (in 8 bits) and multi-token prediction (chapter 9). The choice is data: a recipe.


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


STUDY_12B = NVFP4Recipe(first=2, last=8)  # of 62 layers  [2509.25149]
SUPER = NVFP4Recipe(first=0, last=14)  # of 88 layers  [2604.12374]

# ── 1.7 The linear layer, sharded ───────────────────────────────────────────────────────────────
#
# Chapter 2 shards a linear layer by outputs or by inputs, and chapter 4 the tokens between them.
# In four bits the all-gather comes after the rounding, and sends 4.5 bits per value:
#
#     by outputs    x_rH ─► round ─► all-gather ─► x_RH · w_fH ─────────────────────────► y_Rf
#     by inputs     x_Rh ─► round ─► x_Rh · w_Fh = partial_y_RF ─► reduce-scatter ───────► y_rF
#
# Backward mirrors it: by outputs dx is reduce-scattered, by inputs dy is rounded and all-gathered.
# wgrad's copies are gathered along tokens, their last dimension. Rounding after the gather would
# give the same values, send 3.6 times as many bytes, and round each value on every rank.
#
# For H = 4096 the values of a token take 4096 · 4.5 bits, which are 2304 bytes, and in bf16 8192.
#
# A rank rounds its shard as the single device rounds the full tensor, to the bit, if two things
# hold. The amax is that of all shards: an all-reduce(max) of one value. A maximum rounds nothing,
# so it is the same for any number of ranks. And no block crosses ranks: r, h and f are multiples of
# 16. For r that is the Hadamard tile too: with 24 tokens on each of two ranks, the second tile of
# 16 would have 8 on either side, and no rank could transform it. With its own amax, each rank would
# have its own scale, and after the gather one tensor would have two.
#
# Ranks draw their own random values, so codes are those of one device only where a test hands each
# rank its part of one global draw: `uniforms` is an argument.
#
# Of x only wgrad's copy is kept for backward. It is made in forward, at 4.5 bits per value, where
# fp32 would keep 32. The weight of the optimizer never sees the rounding: each GEMM rounds it anew.


def gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would give a GEMM of x (...). Source: ours."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


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


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 The plain model ─────────────────────────────────────────────────────────────────────────
#
# A small GPT in ordinary PyTorch, with what Nemotron has and chapter 2 has not: no biases, and a
# squared ReLU in the feed-forward layer. The four linear layers of a layer have 12 · H² parameters,
# nearly all of the weights and of the arithmetic.


class Block(nn.Module):
    """One layer, x_BSH to (B, S, H): two sublayers with LayerNorm and residual connection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        H = config.hidden_size
        linear = partial(nn.Linear, bias=False)
        self.head_size = H // config.num_heads
        self.norm1 = nn.LayerNorm(H, bias=False)
        self.qkv = linear(H, 3 * H)
        self.out = linear(H, H)
        self.norm2 = nn.LayerNorm(H, bias=False)
        self.up = linear(H, config.ffn_hidden_size)
        self.down = linear(config.ffn_hidden_size, H)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attend(self.norm1(x_BSH))
        y_BSf = self.up(self.norm2(x_BSH)).relu().square()
        return x_BSH + self.down(y_BSf)

    def attend(self, x_BSH: Tensor) -> Tensor:
        # The rows of qkv are ordered (head, {q, k, v}, D): a shard of rows holds complete heads.
        pattern = "B S (n three D) -> three B n S D"
        q_BnSD, k_BnSD, v_BnSD = rearrange(self.qkv(x_BSH), pattern, three=3, D=self.head_size)
        y_BnSD = F.scaled_dot_product_attention(q_BnSD, k_BnSD, v_BnSD, is_causal=True)
        return self.out(rearrange(y_BnSD, "B n S D -> B S (n D)"))


class GPT(nn.Module):
    """The single-device model: tokens_BS (int64) to logits_BSV; S is at most seq_length."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, bias=False)
        generator = torch.Generator().manual_seed(config.seed)
        for p in self.parameters():
            if p.ndim > 1:  # norms start at 1
                nn.init.normal_(p, std=config.init_std, generator=generator)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        S = tokens_BS.shape[1]
        x_BSH = self.embedding(tokens_BS) + self.positions.weight[:S]
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return F.linear(self.final_norm(x_BSH), self.embedding.weight)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross entropy per token in nats, loss_BS, at least fp32; 0 where the target is −100."""
        logits_BVS = at_least_fp32(self(tokens_BS)).mT
        return F.cross_entropy(logits_BVS, targets_BS, ignore_index=-100, reduction="none")


# ── 2.2 In NVFP4, on one device or on several ───────────────────────────────────────────────────
#
# `to_nvfp4` replaces the linear layers of each layer that the recipe covers. On one device that is
# all.
#
# On several ranks it shards them, and the rest of the GPT needs no change. Each rank has its own
# rows of the batch, and norms, residual connections and the loss work on each row by itself. The
# first linear layer of a sublayer gathers all rows, attention runs on all rows with this rank's
# heads, and the second linear layer hands each rank its rows back:
#
#     x_bSH ─ norm ─ qkv: gather ─► B rows, n heads ─ attention ─ out: reduce-scatter ─► + ─► x_bSH
#     x_bSH ─ norm ─ up: gather ──► B rows, f features ─ relu² ── down: reduce-scatter ► + ─► x_bSH
#
# It is chapter 4's sequence parallelism, cut between sequences. All other layers are replicated,
# and compute this rank's rows. (A large model shards those too, with chapter 4's layers. Here they
# would hide the technique.)

SHARDING = {"qkv": "outputs", "up": "outputs", "out": "inputs", "down": "inputs"}


def to_nvfp4(
    model: nn.Module, recipe: NVFP4Recipe = NVFP4Recipe(), group: Group = None
) -> nn.Module:
    """Puts the linear layers that `recipe` covers in NVFP4, in place, and returns the model.

    Args: model has `layers`; with a group their linear layers are named as in `SHARDING`. group:
        the ranks that shard them; None: they are not sharded, whatever the number of ranks.
    Raises: ValueError where the recipe covers no layer, sizes do not fit, or a layer is in NVFP4
    already; the model is then as it was. Source: Pretraining LLMs with NVFP4, section 4.
    """
    covered = recipe.covered(len(model.layers))
    if any(isinstance(module, NVFP4Linear) for module in model.modules()):
        raise ValueError("the model is in NVFP4 already: build it again")
    if group is not None:
        check_tp(model.config, group_size(group))
    replacements = []
    for module in list(model.layers[covered.start : covered.stop].modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                if group is not None and name not in SHARDING:
                    raise ValueError(f"{name} is not in SHARDING: how is it sharded?")
                sharding = None if group is None else SHARDING[name]
                replacements.append((module, name, NVFP4Linear(child, recipe, sharding, group)))
    for module, name, linear in replacements:  # after all checks
        setattr(module, name, linear)
    return model


def check_tp(config: GPTConfig, tp: int) -> None:
    """Raises ValueError where heads or blocks of 16 features do not divide over `tp` ranks."""
    needs = {"num_heads": tp, "hidden_size": BLOCK * tp, "ffn_hidden_size": BLOCK * tp}
    for name, need in needs.items():
        size = getattr(config, name)
        if size % need:
            raise ValueError(f"{name}={size} on {tp} ranks: take a multiple of {need}")


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of which this rank holds a shard; all others are replicated."""
    layers = [module for module in model.modules() if isinstance(module, NVFP4Linear)]
    return [layer.weight for layer in layers if layer.sharding is not None]


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# The weights that are saved are those of the optimizer, in high precision. Four-bit copies are made
# from them, and never the other way round: an update of 0.1 % would be lost between two codes.
#
# A weight is sharded if its layer is covered: qkv and up by rows, out and down by columns. Nothing
# else is. A checkpoint has full tensors, so the number of ranks and the recipe may change.


def shard_dim(name: str, covered: range) -> int | None:
    """The dimension along which parameter `name` is sharded, or None."""
    parts = name.split(".")  # layers.0.qkv.weight
    if parts[0] != "layers" or int(parts[1]) not in covered:
        return None
    return SHARD_DIM[SHARDING.get(parts[2])]


def shard_state_dict(full: StateDict, covered: range, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of rank `rank`; copies.

    Args: covered: the layers in NVFP4, `NVFP4Recipe.covered`.
    Raises: ValueError where blocks of 16 do not divide over the ranks.
    """
    shards = {}
    for name, x in full.items():
        dim = shard_dim(name, covered)
        if dim is None:
            shards[name] = x.clone()
            continue
        if x.shape[dim] % (BLOCK * tp):
            need = f"{tp} ranks need a multiple of {BLOCK * tp}"
            raise ValueError(f"{name} has {x.shape[dim]} rows or columns: {need}")
        shards[name] = _shard(x, dim, rank, tp)
    return shards


def merge_state_dicts(shards: list[StateDict], covered: range) -> StateDict:
    """All ranks' state dicts, in order of rank, to the plain model's: undoes `shard_state_dict`.

    Raises: ValueError where replicated tensors differ between ranks.
    """
    full = {}
    for name, first in shards[0].items():
        tensors = [shard[name] for shard in shards]
        dim = shard_dim(name, covered)
        if dim is not None:
            full[name] = torch.cat(tensors, dim)
            continue
        full[name] = first.clone()
        for rank, x in enumerate(tensors):
            if not torch.allclose(x, first, rtol=0, atol=0, equal_nan=True):
                gap = f"rank {rank} differs from rank 0 by {(x - first).abs().max():.1e}"
                raise ValueError(f"{name} should be replicated, but {gap}")
    return full


def gather_state_dict(tensors: StateDict, covered: range, group: Group = None) -> StateDict:
    """Every rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`. Raises: what `merge_state_dicts` does.
    """
    mine = {name: x.cpu() for name, x in tensors.items()}
    shards = [mine] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(shards, mine, group)
    return merge_state_dicts(shards, covered)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# One device: `train_alone`, carried from chapter 2, with `seeded` batches, which seed the rounding
# of each step. Several ranks: `train`.
#
# The loss is the mean over all tokens that count, of all ranks' rows. A sharded weight has its full
# gradient at once, because its wgrad has summed over all rows. A replicated parameter has seen this
# rank's rows only, so its gradient is a partial sum. The norm counts each element once.


def seeded(model: nn.Module, batches: Batches, seed: int = 0, first_step: int = 0) -> Batches:
    """Yields `batches`, and seeds the model's rounding before each: for `train_alone`."""
    for step, batch in enumerate(batches, first_step):
        seed_rounding(model, seed, step)
        yield batch


def sum_gradients(parameters: Parameters, group: Group = None) -> None:
    """All-reduces the gradient of each parameter over `group`. (Chapter 2: one buffer.)"""
    for p in parameters:
        if p.grad is not None:
            p.grad = _all_reduce(p.grad.contiguous(), group)  # NCCL refuses other layouts


def train(
    model: GPT,
    optimizer: Optimizer,
    batches: Batches,
    group: Group = None,
    max_norm: float = 1.0,
    autocast: Autocast = None,
    seed: int = 0,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`train_alone` on the ranks of `group`: yields the same two scalars. Every rank iterates it.

    Args: model: `to_nvfp4` with this group; None is all ranks. batches are global. seed and
        first_step are for stochastic rounding.
    Raises: ValueError where the rows of a batch do not divide over the ranks.
    """
    tp = group_size(group)
    rank = group_rank(group)
    sharded = sharded_parameters(model)
    sharded_ids = {id(p) for p in sharded}
    replicated = [p for p in model.parameters() if id(p) not in sharded_ids]
    for step, (tokens_BS, targets_BS) in enumerate(batches, first_step):
        if len(tokens_BS) % tp:
            raise ValueError(f"{len(tokens_BS)} sequences on {tp} ranks: take a multiple of {tp}")
        optimizer.zero_grad()
        seed_rounding(model, seed, step, rank)
        count = (targets_BS != -100).sum().clamp(min=1)
        tokens_bS = tokens_BS.chunk(tp)[rank]
        targets_bS = targets_BS.chunk(tp)[rank]
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss_bS = model.loss(tokens_bS, targets_bS)
            partial_loss = loss_bS.sum() / count
        partial_loss.backward()
        sum_gradients(replicated, group)
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=group)
        optimizer.step()
        yield _all_reduce(partial_loss.detach(), group), norm


# ── What remains ──────────────────────────────────────────────────────────────────────────────────
#
# Weights, gradients and moments are still in fp32, 16 bytes per parameter; chapter 7 shards them.
# Each all-reduce of an amax is waited for here, six in a linear layer; production stacks them. FP4
# GEMMs are limited by memory where few tokens pass through them: in generation, one per sequence.
# The next chapter predicts several tokens in one forward pass.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof. Codes are computed in fp32 there too, and inputs that differ by 1e-16 have
# equal codes unless one of them lies on a tie. In fp32 and bf16 sums of another order do cross
# ties, and the step between two codes is large. Such a difference is right, and it is as large as
# a bug's: prove the program in fp64, and compare nothing in fp32.
BOUNDS = {"fp64": 1e-10, "fp32": 5e-2, "bf16": 5e-1}
NEAREST = NVFP4Recipe(stochastic=False)  # ranks draw other random values than one device


def equivalence(
    device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model on all ranks and on a single device: name to error."""
    tp = group_size()
    config = GPTConfig(
        vocab_size=61, num_layers=3, num_heads=tp, hidden_size=32 * tp, ffn_hidden_size=48 * tp
    )
    covered = NEAREST.covered(config.num_layers)
    rng = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(61, (2, 2 * tp, 24), generator=rng).to(device)
    targets_BS[0] = -100
    plain = to_nvfp4(GPT(config).to(device, dtype), NEAREST)
    parallel = to_nvfp4(GPT(config).to(device, dtype), NEAREST, dist.group.WORLD)
    batches = [(tokens_BS, targets_BS)] * 5
    alone = train_alone(plain, make_optimizer(plain, 1e-3), batches, 0.1, autocast)
    steps = train(parallel, make_optimizer(parallel, 1e-3), batches, None, 0.1, autocast)
    errors = {}
    for step, ((loss_alone, norm_alone), (loss, norm)) in enumerate(zip(alone, steps)):
        errors[f"loss {step}"] = abs(loss / loss_alone - 1).item()
        errors[f"norm before clipping {step}"] = abs(norm / norm_alone - 1).item()
        if step == 0:
            grads = {name: p.grad for name, p in parallel.named_parameters()}
            full = gather_state_dict(grads, covered)
            reference = {name: p.grad for name, p in plain.named_parameters()}
            errors |= relative_errors("gradient", full, reference)
    if dtype == torch.float64:
        full = gather_state_dict(parallel.state_dict(), covered)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), 5e-3)
    return over_all_ranks(errors)


def differing_values(device: torch.device) -> int:
    """Each rank's rows of a matrix, rounded stochastically, next to the same rows of the single
    device's: the number of values that differ, on all ranks. Both read one global draw."""
    tp = group_size()
    rank = group_rank()
    rng = torch.Generator().manual_seed(1)
    x_RH = torch.randn(64 * tp, 64, generator=rng).to(device)
    uniforms_RH = torch.rand(x_RH.shape, generator=rng).to(device)
    full_RH = nvfp4_dequantize(nvfp4_quantize(x_RH, uniforms=uniforms_RH))
    x_rH = x_RH.chunk(tp)[rank]
    uniforms_rH = uniforms_RH.chunk(tp)[rank]
    shard = nvfp4_quantize(x_rH, uniforms=uniforms_rH, amax_group=dist.group.WORLD)
    differs_rH = nvfp4_dequantize(shard) != full_RH.chunk(tp)[rank]
    return int(_all_reduce(differs_rH.sum()))


def error_of_dgrad(two_d: bool) -> float:
    """‖dy · Q(wᵀ)ᵀ − dy · Q(w)‖ / ‖dy · Q(w)‖: how far dgrad is from forward's derivative.

    dy is not rounded here, so that nothing else is measured. w is Gaussian, 256 × 256.
    """
    rng = torch.Generator().manual_seed(0)
    w_FH, dy_RF = torch.randn(2, 256, 256, generator=rng)
    read_by_fprop_FH = nvfp4_dequantize(nvfp4_quantize(w_FH, two_d))
    read_by_dgrad_HF = nvfp4_dequantize(nvfp4_quantize(w_FH.mT, two_d))
    right_RH = dy_RF @ read_by_fprop_FH
    used_RH = dy_RF @ read_by_dgrad_HF.mT.contiguous()
    return relative_error(used_RH, right_RH)


def relative_error(x: Tensor, right: Tensor) -> float:
    """‖x − right‖ / ‖right‖, of x and right (...)."""
    return ((x - right).norm() / right.norm()).item()


def regression(recipe: NVFP4Recipe | None, loud: float = 40.0, steps: int = 300) -> float:
    """y = x wᵀ is learned from rows of which one in 16 has noise of size `loud`; only wgrad is in
    NVFP4, or nothing. Returns: the distance of w at the end, relative to w.

    Each loud row shares its block with fifteen quiet ones, whose gradient says what w is. The noise
    averages out over the steps. What nearest rounding takes from the quiet rows does not.
    """
    rng = torch.Generator().manual_seed(0)
    true_FH = torch.randn(64, 64, generator=rng) / 8
    w_FH = torch.zeros(64, 64)
    for _ in range(steps):
        x_RH = torch.randn(256, 64, generator=rng)
        dy_RF = x_RH @ (w_FH - true_FH).mT
        dy_RF[::16] += loud * torch.randn(16, 64, generator=rng)
        if recipe is None:
            dw_FH = dy_RF.mT @ x_RH
        else:
            dy_FR = _tokens_last(dy_RF, recipe)
            uniforms_FR = _uniforms(dy_FR, recipe, rng)
            dy_wgrad = nvfp4_quantize(dy_FR, uniforms=uniforms_FR)
            x_wgrad = nvfp4_quantize(_tokens_last(x_RH, recipe))
            dw_FH = nvfp4_gemm(dy_wgrad, x_wgrad, torch.float32)
        w_FH -= 0.05 / 256 * dw_FH
    return relative_error(w_FH, true_FH)


def _fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (...) rounded, with one scale."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().clamp(min=1e-30)
    codes = (x * scale).to(dtype)
    return codes.to(x.dtype) / scale


def _straight_through(x: Tensor) -> Tensor:
    """Rounded to E4M3 in forward, the identity in backward."""
    return x + (_fp8(x, torch.float8_e4m3fn) - x).detach()


class FP8Linear(nn.Module):
    """Chapter 6's recipe in short: one scale per tensor, E4M3, and E5M2 for the gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(_straight_through(x), _straight_through(self.weight))
        if y.requires_grad:
            y.register_hook(partial(_fp8, dtype=torch.float8_e5m2))
        return y


def to_fp8(model: GPT) -> GPT:
    """All layers but the last, as NVFP4Recipe() does."""
    for layer in model.layers[:-1]:
        for name in SHARDING:
            setattr(layer, name, FP8Linear(getattr(layer, name)))
    return model


def spread(function: Callable, variants: dict[str, Any]) -> dict[str, Any]:
    """function(variant) of each; every rank computes some of them. Collective."""
    ranks = group_size()
    names = list(variants)
    mine = {name: function(variants[name]) for name in names[group_rank() :: ranks]}
    everyone = [None] * ranks
    dist.all_gather_object(everyone, mine)
    return {name: everyone[i % ranks][name] for i, name in enumerate(names)}


def text_batches(args: argparse.Namespace, device: torch.device) -> Batches:
    data = TextData(args.data, args.seq_length)
    for step in range(args.steps):
        yield [x_BS.to(device) for x_BS in data.batch(step, args.batch, args.seed)]


def single_device(args: argparse.Namespace, device: torch.device, convert: Callable) -> list[float]:
    """Losses of a run on this rank alone; convert(model) puts its layers in lower precision."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    model = convert(GPT(config).to(device, dtype))
    batches = seeded(model, text_batches(args, device), args.seed)
    optimizer = make_optimizer(model, args.lr)
    steps = train_alone(model, optimizer, batches, autocast=autocast)
    return [loss.item() for loss, _ in steps]


def demonstrate(
    args: argparse.Namespace, device: torch.device, curves: dict[str, list[float]] | None = None
) -> None:
    """Trains on all ranks, and prints its losses next to `curves`."""
    dtype, autocast = dtypes(args)
    config = config_from(args, GPTConfig, seed=args.seed)
    model = GPT(config).to(device, dtype)
    to_nvfp4(model, NVFP4Recipe(), dist.group.WORLD)
    curves = curves or {}
    say("step   all ranks    norm        fp32         FP8       NVFP4")
    batches = text_batches(args, device)
    optimizer = make_optimizer(model, args.lr)
    steps = train(model, optimizer, batches, autocast=autocast, seed=args.seed)
    for step, (loss, norm) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        if step < 5 or step % 10 == 9:
            others = [f"{curve[step]:12.4f}" for curve in curves.values()]
            say(f"{step:4}  {loss:10.4f}  {norm:6.3f}{''.join(others)}")
    say()


def measure(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    claims = []
    errors = equivalence(device, torch.float64)
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, float64"
        here = f"worst {error:.1e} relative"
        claims.append((claim, "exact", here, error <= BOUNDS["fp64"]))
    differ = differing_values(device)
    claim = "four-bit values of shards are the full tensor's"
    claims.append((claim, "exact", f"{differ} differ", not differ))
    claims += statements()
    curves = spread(partial(single_device, args, device), CONVERSIONS)
    demonstrate(args, device, curves)
    fp32, fp8, nvfp4 = (sum(losses[-10:]) for losses in curves.values())
    claim = "loss in FP8 and NVFP4 over fp32's, last 10 steps"
    here = f"{fp8 / fp32 - 1:+.2%} and {nvfp4 / fp32 - 1:+.2%}"
    verdict = "a small model, a short run"
    return [*claims, (claim, "NVFP4 < 1 %", here, verdict)]


def statements() -> list[tuple]:
    """Claims about single tricks: 16 × 16 tiles, and what each of the other two cures."""
    square = error_of_dgrad(two_d=True)
    flat = error_of_dgrad(two_d=False)
    here = f"{square:.2g}, and {flat:.0%} with 1 × 16"
    claims = [("dgrad is the derivative of forward, 16 × 16", "exact", here, not square)]
    neither = replace(NEAREST, hadamard=False)
    recipes = {"neither": neither, "Hadamard": NEAREST}
    recipes["stochastic"] = replace(neither, stochastic=True)
    nearest, hadamard, stochastic = spread(regression, recipes).values()
    here = f"{nearest:.2f}; {hadamard:.2f}, {stochastic:.2f}"
    good = nearest > 1.1 * max(hadamard, stochastic)
    claim = "error, one loud token in 16: nearest; Hadamard, stochastic"
    claims.append((claim, "lower with each", here, good))
    return claims


CONVERSIONS = {"fp32": nn.Identity(), "FP8": to_fp8, "NVFP4": to_nvfp4}


def main(args: argparse.Namespace, device: torch.device) -> None:
    say_setting(args)
    if args.check:
        errors = equivalence(device, *dtypes(args))
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, device))
    if not good:
        sys.exit(1)


@dataclass
class Options(GPTConfig):  # the chapter's own flags; None: what fits the ranks
    hidden_size: int | None = flag(None, "hidden size, H; None: 128 or a few more", least=1)
    num_heads: int | None = flag(None, "attention heads, N; None: 4 or a few more", least=1)
    batch: int | None = flag(None, "sequences per step; None: 8 or a few more", least=1)
    lr: float = flag(2e-3, "learning rate", least=1e-9)
    data: str = flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")


def multiple_above(least: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `least`."""
    return math.ceil(least / divisor) * divisor


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError or OSError where flags, ranks and text do not fit."""
    tp = args.world_size
    args.num_heads = args.num_heads or multiple_above(4, tp)
    args.hidden_size = args.hidden_size or multiple_above(128, BLOCK * args.num_heads)
    args.batch = args.batch or multiple_above(8, tp)
    check_tp(config_from(args, GPTConfig), tp)
    tokens = args.batch // tp * args.seq_length  # of a rank
    if args.batch % tp or tokens % BLOCK:
        sizes = f"--batch {args.batch} × --seq-length {args.seq_length}"
        need = "each must have full sequences, and a multiple of 16 tokens"
        raise ValueError(f"{sizes} on {tp} ranks: {need}")
    TextData(args.data, args.seq_length)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options], check_args, ranks=4, steps=40)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: clipping (home: 02_megatron_tp)
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, *, sharded: Parameters = (), group: Group = None
) -> Tensor:
    """Scales all gradients so that their norm over `group` is at most max_norm.

    Args: parameters: all of this rank's. sharded: those of which each rank of `group` holds other
        elements; all others are replicated. Empty on every rank or on none: without `sharded`
        nothing is communicated.
    Returns: the norm before clipping, a scalar tensor, at least fp32, the same on every rank; not
        finite where a gradient is not.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    device = parameters[0].device if parameters else None
    parameters = [p for p in parameters if p.grad is not None]
    sharded_ids = {id(p) for p in sharded}  # by identity: == compares elements
    copies = group_size(group) if sharded_ids else 1
    squares = [torch.zeros((), device=device)]
    for p in parameters:
        # In at least fp32: PyTorch's own norm has the precision of the gradients.
        dtype = torch.promote_types(p.grad.dtype, torch.float32)
        square = torch.linalg.vector_norm(p.grad, dtype=dtype).square()
        squares.append(square if id(p) in sharded_ids else square / copies)
    total = torch.stack(squares).sum()
    if sharded_ids:
        _all_reduce(total, group)
    norm = total.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# endregion copy b536bc
# region carried: plain training (home: 02_megatron_tp)
def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.01) -> AdamW:
    """AdamW that decays matrices, not biases and LayerNorm weights."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def train_alone(
    model: GPT,
    optimizer: Optimizer,
    batches: Batches,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the plain model; yields two scalars, the mean loss per token and the norm before
    clipping. For a schedule, set the optimizer's learning rate between two steps."""
    for tokens_BS, targets_BS in batches:
        optimizer.zero_grad()
        count = (targets_BS != -100).sum().clamp(min=1)
        with torch.autocast(tokens_BS.device.type, autocast, enabled=autocast is not None):
            loss = model.loss(tokens_BS, targets_BS).sum() / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        yield loss.detach(), norm


# endregion copy af54db
# region carried: text data (home: 02_megatron_tp)
class TextData:
    """A UTF-8 text as tokens, 9/10 to train on and 1/10 to evaluate on. path "": Python's sources.

    encoding: by default one token per byte. Raises: OSError; ValueError for an unusable file.
    """

    def __init__(self, path: str, seq_length: int, encoding: tiktoken.Encoding | None = None):
        self.seq_length = seq_length
        self.encoding = encoding or byte_encoding()
        paths = [Path(path)] if path else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        if not paths[0].is_file():
            raise ValueError(f"{path}: No such file, or not a regular one, which every rank reads")
        try:
            text = "".join(path.read_text("utf-8") for path in paths[:40])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
        self.tokens = torch.tensor(self.encoding.encode_ordinary(text), dtype=torch.int64)
        cut = len(self.tokens) * 9 // 10
        self.train_split = self.tokens[:cut]
        self.eval_split = self.tokens[cut:]
        if len(self.eval_split) <= seq_length:
            need = f"a tenth of it must be longer than {seq_length}"
            raise ValueError(f"{path} has {len(self.tokens)} tokens: {need}")

    def batch(
        self, step: int, rows: int, seed: int, evaluation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The global batch of a step, tokens_BS and targets_BS: a function of seed and step."""
        split = self.eval_split if evaluation else self.train_split
        key = f"{seed} {step} {evaluation}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        start_B1 = torch.randint(len(split) - self.seq_length, (rows, 1), generator=generator)
        window_BS = split[start_B1 + torch.arange(self.seq_length + 1)]
        return window_BS[:, :-1], window_BS[:, 1:]


def byte_encoding() -> tiktoken.Encoding:
    """A tokenizer of 256 tokens, one for each byte, that needs no download."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


# endregion copy aaa995
# region carried: process groups (home: 01_deepspeech)
def group_size(group: Group = None) -> int:
    """Number of ranks in `group` (None: all ranks); 1 without process groups.

    Raises: ValueError on a rank outside the group, which would take its own values for the sum.
    """
    if not dist.is_initialized():
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the process group that it was given")
    return size


def group_rank(group: Group = None) -> int:
    """Index of this rank in `group` (None: all); 0 without process groups. Raises: ValueError."""
    return dist.get_rank(group) if dist.is_initialized() and group_size(group) else 0


def _all_reduce(x: Tensor, group: Group = None, op=dist.ReduceOp.SUM) -> Tensor:
    """In place; returns x. A group of one rank communicates nothing."""
    if group_size(group) > 1:
        dist.all_reduce(x, op, group)
    return x


def at_least_fp32(x: Tensor) -> Tensor:
    """x (...) upcast to fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _has_values(x: Tensor) -> bool:
    """Whether reading x's values costs nothing: on a GPU the CPU would wait for them, and fake
    tensors and torch.compile's have none."""
    on_cpu = x.device.type == "cpu" and type(x) is Tensor
    return on_cpu and not torch.compiler.is_compiling()


def make_group(rank_lists: list[list[int]], device: torch.device, timeout: float) -> Group:
    """This rank's group among `rank_lists`. Collective: every rank passes the same lists.

    A subgroup does not inherit the timeout (seconds). Its first collective runs here: NCCL connects
    in it, and would hang in a first send that only two ranks take part in. Raises: ValueError for a
    rank in no list: torch would give it None, which means all ranks.
    """
    if sorted(itertools.chain(*rank_lists)) != list(range(group_size())):
        raise ValueError(f"{rank_lists} must name each of the {group_size()} ranks once")
    group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=timedelta(seconds=timeout))
    dist.all_reduce(torch.ones(1, device=device), group=group)
    return group


def wait_for_all() -> None:
    """A barrier with a day's limit, for work of one rank alone: a slow disk is no lost message."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    dist.barrier(group)
    dist.destroy_process_group(group)


# endregion copy 3197a3
# region carried: reports (home: 01_deepspeech)
def say(text: str = "") -> None:
    """Rank 0 prints."""
    if group_rank() == 0:
        print(text, flush=True)


def say_setting(args: argparse.Namespace, layout: str = "") -> None:
    """The first line of a run: everything that it depends on."""
    setting = f"torch {torch.__version__}, {args.device}, {args.backend}, {group_size()} ranks"
    idle = torch.cuda.device_count() - (args.ranks if args.device == "cuda" else 0)
    note = f", {idle} GPUs not used" if idle > 0 else ""
    say(f"{setting}{layout}, {args.dtype}, seed {args.seed}{note}\n")


def read_step(step: int, loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Loss and gradient norm of a step as floats, in one host synchronisation.

    Args: loss, norm: scalar tensors on one device, equal on every rank: all stop in the same step.
    Raises: FloatingPointError where one of them is not finite. Do not save the weights then.
    """
    loss_value, norm_value = torch.stack([loss, norm]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        found = f"step {step}: loss {loss_value}, gradient norm {norm_value}"
        raise FloatingPointError(f"{found}. Lower the learning rate, or look at this step's batch")
    return loss_value, norm_value


def peak_memory(device: torch.device) -> float:
    """Peak memory of this rank in GB: of its GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype | None]:
    """--dtype as the dtype of the parameters, and that of autocast's GEMMs or None."""
    parameters = torch.float64 if args.dtype == "fp64" else torch.float32
    return parameters, torch.bfloat16 if args.dtype == "bf16" else None


def worst(errors: dict[str, float], kind: str = "") -> float:
    """The largest error of a `kind`; NaN is infinite. Raises: ValueError where there is none."""
    found = [error for name, error in errors.items() if name.startswith(kind)]
    return max(math.inf if math.isnan(error) else error for error in found)


def relative_errors(
    kind: str, tensors: dict[str, Tensor], reference: dict[str, Tensor], floor: float = 0.0
) -> dict[str, float]:
    """max|Δ| / max(max|reference|, floor) of every tensor (...), by "kind name"."""
    errors = {}
    for name, x in tensors.items():
        y = reference[name].detach().to(x.device)
        scale = y.abs().max().clamp(min=floor)
        errors[f"{kind} {name}"] = ((x - y).abs().max() / scale).item()
    return errors


def over_all_ranks(errors: dict[str, float]) -> dict[str, float]:
    """The largest error of all ranks by name; NaN counts as infinite. Collective."""
    everyone = [None] * group_size()
    dist.all_gather_object(everyone, errors)
    largest = {}
    for name, error in itertools.chain(*(errors.items() for errors in everyone)):
        error = math.inf if math.isnan(error) else error
        largest[name] = max(error, largest.get(name, 0.0))
    return largest


def print_errors(errors: dict[str, float], bound: float) -> bool:
    """--check: rank 0 prints every error and the worst. Returns: whether all are within `bound`."""
    for name, error in errors.items():
        say(f"{name:60} {error:.1e}")
    say(f"\nworst {worst(errors):.1e} relative, bound {bound:.0e}")
    return worst(errors) <= bound


def print_claims(claims: list[tuple[str, str, str, bool | str]]) -> bool:
    """Rank 0 prints (claim, paper, here, verdict) as a table.

    A verdict is True, False, or what a test of the claim needs. Returns: False where one is False.
    """
    rows = [("claim", "paper", "here", "verdict")]
    for claim, paper, here, verdict in claims:
        rows.append((claim, paper, here, {True: "ok", False: "FAILED"}.get(verdict, verdict)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for row in rows:
        say("".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return all(verdict is not False for *_, verdict in claims)


# endregion copy 7f35e3
# region carried: counter (home: 01_deepspeech)
Message = namedtuple("Message", "op bytes group")  # bytes: of the input or the output, the larger


class Counter(TorchDispatchMode):
    """`with Counter() as counter:` lists this rank's collectives and sends in counter.messages."""

    def __enter__(self) -> Counter:
        self.messages: list[Message] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::").strip("_")  # allreduce, or allgather_base
        if function.namespace == "c10d" and name != "barrier":
            op = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
            tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
            size = max(sum(x.nbytes for x in xs) for xs in tensors)
            boxed = [x for x in args if isinstance(x, torch.ScriptObject)]
            group = next(x for x in boxed if "ProcessGroup" in str(x._type()))
            self.messages.append(Message(op, size, dist.ProcessGroup.unbox(group).group_name))
        return function(*args, **(kwargs or {}))


# endregion copy a5766d
# region carried: flags (home: 01_deepspeech)
@dataclass
class RunConfig:
    """The flags of every chapter."""

    ranks: int | None = flag(None, "processes here; None: one per GPU, or a few", least=1)
    device: str = flag("auto", "auto: cuda if each rank has a GPU", choices=["auto", "cpu", "cuda"])
    backend: str = flag("auto", "auto: nccl on GPUs", choices=["auto", "nccl", "gloo"])
    dtype: str = flag("auto", "bf16: autocast", choices=["auto", "fp64", "fp32", "bf16"])
    steps: int = flag(0, "optimizer steps", least=1)
    seed: int = flag(0, "of weights, batches and dropout")
    timeout: float = flag(60.0, "seconds that a collective may wait", least=0.001)
    check: bool = flag(False, "prove the equivalence, and stop")


def parse_flags(
    doc: str | None, configs: list[type], check_args: Callable, ranks: int, steps: int
) -> argparse.Namespace:
    """Reads the flags that the fields of RunConfig and of the dataclasses `configs` describe.

    Args: doc: the script's docstring, for --help. check_args(args): resolves the chapter's flags,
        raises ValueError or OSError. ranks: processes without GPUs. steps: the default of --steps.
    A wrong flag is one line, before any rank starts.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help lists them",
        description=(doc or "").partition("\n")[0],  # python -OO strips docstrings
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in itertools.chain(*map(fields, [RunConfig, *configs])):
        if f.metadata:
            _add_flag(parser, f)
    parser.set_defaults(steps=steps)
    args = parser.parse_args()
    try:
        _resolve_auto(args, ranks)
        check_args(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def _add_flag(parser: argparse.ArgumentParser, f: Field) -> None:
    keywords = dict(f.metadata)
    kind = f.type.partition(" ")[0]  # "int" of "int | None"
    if kind == "bool":
        keywords.setdefault("action", "store_true")
    elif kind != "str":
        number = int if kind == "int" else float
        keywords["type"] = partial(_number, number, keywords.pop("least", 0))
    parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **keywords)


def _number(kind: type, least: float, text: str) -> int | float:
    most = 2**63 - 1 if kind is int else 1e9
    value = math.nan
    with contextlib.suppress(ValueError):
        value = kind(text)
    if not least <= value <= most:  # NaN is in no range
        span = f"from {least} to {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r} must be of type {kind.__name__}, {span}")
    return value


def _torchrun_world() -> tuple[int, int]:
    """Ranks here and in all, as torchrun says; (0, 0) for a plain start. Raises: ValueError where
    another launcher has started tasks: each would train alone."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    missing = [name for name in names if name not in os.environ]
    if not missing:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    tasks = {"SLURM_PROCID": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}
    tasks["PMI_RANK"] = "PMI_SIZE"  # mpiexec of MPICH and Intel
    several = any(os.environ.get(tasks[name], "1") != "1" for name in tasks if name in os.environ)
    if several or len(missing) < len(names):
        raise ValueError(f"{', '.join(missing)} not set: start it with torchrun (CLUSTER.md)")
    return 0, 0


def _resolve_auto(args: argparse.Namespace, ranks: int) -> None:
    """Replaces every "auto" and None. Raises ValueError for what this machine does not have."""
    gpus = torch.cuda.device_count()
    local_size, args.world_size = _torchrun_world()
    if local_size and args.ranks not in (None, local_size):
        raise ValueError(f"--ranks {args.ranks}, but torchrun has started {local_size}")
    needs_gpu = args.device == "cuda" or args.backend == "nccl"
    may_use_gpu = needs_gpu or args.device == args.backend == "auto"
    if gpus and may_use_gpu and args.backend != "gloo":
        ranks = gpus  # with gloo, ranks may share a GPU
    args.ranks = local_size or args.ranks or ranks
    args.world_size = args.world_size or args.ranks
    if args.device == "auto":
        args.device = "cuda" if needs_gpu or (may_use_gpu and gpus >= args.ranks) else "cpu"
    if args.backend == "auto":
        args.backend = "nccl" if args.device == "cuda" and gpus >= args.ranks else "gloo"
    if args.dtype == "auto":
        default = "bf16" if args.device == "cuda" else "fp32"
        args.dtype = "fp64" if args.check else default
    if args.device == "cuda" and not gpus:
        raise ValueError("a GPU was asked for, but torch sees none: use --device cpu")
    if args.backend == "nccl" and args.device == "cpu":
        raise ValueError("--backend nccl has no --device cpu: use gloo")
    may_share = "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ  # NCCL 2.30 and newer
    if args.backend == "nccl" and gpus < args.ranks and not may_share:
        raise ValueError(f"--backend nccl needs {args.ranks} GPUs, here are {gpus}: use gloo")


def config_from(args: argparse.Namespace, config: type, **others: Any) -> Any:
    """The dataclass `config` with the values of its flags, and others."""
    values = {f.name: getattr(args, f.name) for f in fields(config) if f.metadata}
    return config(**values, **others)


# endregion copy 596bce
# region carried: launcher (home: 01_deepspeech)
def launch(main: Callable, args: argparse.Namespace) -> None:
    """Runs main(args, device) on every rank: joins torchrun's world, or starts torchrun."""
    try:
        if "LOCAL_RANK" in os.environ or args.ranks == 1:
            record(run_rank)(main, args)  # keeps this rank's error for torchrun
            return
        logging.disable(logging.WARNING)  # torchrun's, about each signal that it passes on
        # An explicit address works also where the host's name does not resolve.
        options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={args.ranks}"]
        torchrun.main([*options, *sys.argv])
    except ChildFailedError as error:
        print(error, file=sys.stderr)  # names the rank that failed first, with its traceback
        sys.exit(1)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except KeyboardInterrupt as stop:
        if group_rank() == 0:
            print(f"\ninterrupted {stop}", file=sys.stderr, flush=True)
        if "LOCAL_RANK" not in os.environ:
            sys.exit(130)  # a notebook's kernel lives on
        os._exit(130)  # no traceback from each rank, and no waiting for the others
    finally:
        if args.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()  # so that a notebook can run it again


def run_rank(main: Callable, args: argparse.Namespace) -> None:
    """One rank: its device, the process group of all ranks, then main."""
    device = torch.device("cpu")
    if args.device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks with two threads each are several times slower
    world = {"timeout": timedelta(seconds=args.timeout)}
    if args.backend == "nccl":
        world["device_id"] = device
    if "LOCAL_RANK" not in os.environ:
        world |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    code = 0
    try:
        dist.init_process_group(args.backend, **world)
        dist.all_reduce(torch.ones(1, device=device))
        try:
            main(args, device)
        except SystemExit as end:  # a failed claim: the ranks end together all the same
            code = end.code
        wait_for_all()
    except RuntimeError as error:
        if "by peer" in str(error) or "Broken pipe" in str(error):
            time.sleep(5)  # another rank died: torchrun should find that one first
        raise
    dist.destroy_process_group()
    sys.exit(code)


def _end_with_parent(parent: int) -> None:
    """A launcher that was killed cannot stop its ranks, so each rank watches it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# endregion copy 754ba2


if __name__ == "__main__":
    launch(main, flags())
