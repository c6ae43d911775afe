# SPDX-License-Identifier: MIT-0
"""Chapter 10. Compression: a smaller hybrid out of a larger one, by pruning and distillation.

Papers: Compact Language Models via Pruning and Knowledge Distillation (Minitron),
        Muralidharan et al., 2024, arXiv 2407.14679
        Group-Aware SSM Pruning (8B to 4B), Taghibakhshi et al., 2025, arXiv 2504.11409
        Nemotron-H (56B to 47B), NVIDIA, 2025, arXiv 2504.03624
        Nemotron Nano 2 (12B to 9B), NVIDIA, 2025, arXiv 2508.14444

The problem. A family of models has several sizes, and each is trained on trillions of tokens. The
smaller ones start from random weights, although the weights of the largest one are trained already.

The idea. Run the large model on some text and measure how large each unit's activations are: each
channel, feature and head. Remove the smallest units, and train what is left to reproduce the large
model's logits. In the papers that takes a fortieth of the tokens, or less.

     1 importance                  2 prune                        3 distill (distill.py)
     forward passes only           one set of units is sliced     teacher ──► p ┐
     ▂ ▇ ▁ ▅ ▃ ▁ ▆ ▂               out of every tensor that              KL(p ‖ q)
       │     │     │               it passes through              student ──► q ┘

A slice keeps some units of each axis of a tensor. A shard is the same thing: it keeps the units of
one rank. So one table of axes is enough for both, and pruning works on tp · dp ranks.

Run it (no flag is needed; --help lists them):

    python 10_compress/compress.py                2 local ranks that share each layer
    python 10_compress/compress.py --ranks 4      tensor parallel 2 × 2 replicas
    python 10_compress/compress.py --ranks 1      one process, for a debugger
    python 10_compress/compress.py --check        equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 10_compress/compress.py
    python 10_compress/distill.py                 the second half: depth, and distillation

Left out: depth and distillation (distill.py); the search for a shape under a memory budget
(search.py); the papers' models and tables (compress_tables.py); experts; pipeline stages.
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension, and the letters are chapter 5's. A
# CAPITAL is the full dimension, replicated on the ranks of the group; a small letter is this rank's
# shard of it. partial_ marks a partial sum.
#
#     B  sequences of a batch          H  heads                      h = H / tp
#     T  tokens of a sequence, also S  P  size of a head             b = B / dp, rows of a replica
#     D  model width, hidden size      N  size of a Mamba state
#     F  feed-forward features         G  groups of R = H / G heads  C  channels of any kind
#     V  vocabulary entries            L  layers                     v = V / tp
#     U  units of any axis             K  taps of the convolution
#
# tp ranks share one copy of the model, dp is the number of copies (replicas): world = tp · dp. A
# unit is one channel, feature or head; an axis is all units of one kind. Axes have the names that
# NVIDIA's Model Optimizer gives them: ffn_hidden_size, mamba_num_heads, ...
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.optim import AdamW, Optimizer

Args = argparse.Namespace
Group = dist.ProcessGroup | None  # None: not sharded, whatever the number of ranks
StateDict = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]  # tokens_BT and targets_BT; what has target −100 does not count
Batches = Iterable[Batch]
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast
Axis = tuple[str, ...]  # fields of the config whose product is its size
Loss = Callable[..., Tensor]  # loss(model, tokens_bT, targets_bT), of a replica's rows: (b, T)
Probe = Callable[[str, Tensor], None]  # probe(axis, y) gets what scores the units of an axis
Sizes = dict[str, int]  # axis to its new size
Units = dict[str, Tensor]  # axis, or "layers.3." and an axis, to indices or to scores of its units


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class HybridConfig:
    """Sizes of a hybrid; `flag` makes a field a flag too. Raises ValueError where they clash."""

    vocab_size: int = 256
    hidden_size: int = flag(128, "model width, D", least=1)
    pattern: str = flag("M-M*-M-", "one letter per layer: M Mamba-2, * attention, - feed-forward")
    ffn_hidden_size: int = flag(512, "feed-forward features, F", least=1)
    num_attention_heads: int = flag(4, "query heads", least=1)
    num_query_groups: int = flag(2, "groups of them that share keys and values", least=1)
    attention_head_dim: int = 32
    mamba_num_heads: int = flag(8, "heads of a Mamba layer", least=1)
    mamba_head_dim: int = 32
    mamba_num_groups: int = flag(2, "groups of them that share B and C", least=1)
    mamba_state_dim: int = 32
    conv_kernel: int = 4
    norm_eps: float = 1e-5
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        if not self.pattern or set(self.pattern) - set("M*-"):
            raise ValueError(f"pattern={self.pattern!r}: write M, * or - for each layer")
        for name, value in vars(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        grouped = {"mamba_num_heads": "mamba_num_groups", "num_attention_heads": "num_query_groups"}
        size = vars(self)
        for heads, groups in grouped.items():
            if size[heads] % size[groups]:
                sizes = f"{heads}={size[heads]}, {groups}={size[groups]}"
                raise ValueError(f"{sizes}: the first must be a multiple of the second")


# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 One table of axes: what a slice must cut ────────────────────────────────────────────────
#
# A unit is not in one tensor. Channel 17 of the residual stream is a column of the embedding, a
# column of every matrix that reads the stream, a row of every matrix that writes to it, and an
# element of every norm on it. Remove it in all of them, or in none: another set in one layer, and
# the stream's channels no longer mean the same on both sides of it.
#
# A Mamba head is in ten places of eight tensors:
#
#     in_proj rows     z z z z │ x x x x │ B B │ C C │ dt dt dt dt       4 heads in 2 groups
#     without head 1   z   z z │ x   x x │ B B │ C C │ dt    dt dt       P rows of z and x, 1 of dt
#     conv             channels x, and their biases        dt_bias, A_log, D   one element each
#     gated norm       P elements                          out_proj            P columns
#
# Three mistakes are easy here, and all shapes are right with each of them:
#
# · dt_bias, A_log or D is cut to its first elements, and not to those of the heads that stay. A
#   head then has the time constant of another one. The model runs, and its loss looks like that of
#   a careless choice of heads.
# · z and x are sliced with different sets: each head is gated with another head's gate.
# · Query heads are removed without regard to their groups (section 1.3).
#
# So the slices are not written by hand. Each dimension of each parameter is described once, by its
# parts, and each part by an axis: fields of the config, whose product is its size. INNER is heads ×
# head size, so it follows both a set of heads and a set of head dimensions. All else is read from
# this table: shapes, initial weights, parameter counts, slices, shards (part 3), and the memory of
# a shape (search.py).

HIDDEN = ("hidden_size",)
FEATURES = ("ffn_hidden_size",)
VOCAB = ("vocab_size",)
TAPS = ("conv_kernel",)
HEADS = ("mamba_num_heads",)
INNER = ("mamba_num_heads", "mamba_head_dim")
STATE = ("mamba_num_groups", "mamba_state_dim")
QUERIES = ("num_attention_heads", "attention_head_dim")
KEYS = ("num_query_groups", "attention_head_dim")

MIXER_AXES = {  # a letter of the pattern to its parameters, and to the parts of each dimension
    "M": {
        "in_proj.weight": [[INNER, INNER, STATE, STATE, HEADS], [HIDDEN]],  # z, x, B, C, dt
        "conv_weight": [[INNER, STATE, STATE], [TAPS]],  # x, B, C
        "conv_bias": [[INNER, STATE, STATE]],
        "dt_bias": [[HEADS]],
        "A_log": [[HEADS]],
        "D": [[HEADS]],
        "norm.weight": [[INNER]],
        "out_proj.weight": [[HIDDEN], [INNER]],
    },
    "*": {
        "q_proj.weight": [[QUERIES], [HIDDEN]],
        "k_proj.weight": [[KEYS], [HIDDEN]],
        "v_proj.weight": [[KEYS], [HIDDEN]],
        "o_proj.weight": [[HIDDEN], [QUERIES]],
    },
    "-": {"up_proj.weight": [[FEATURES], [HIDDEN]], "down_proj.weight": [[HIDDEN], [FEATURES]]},
}


def parameter_axes(config: HybridConfig) -> dict[str, list[list[Axis]]]:
    """Name of each parameter to the parts of each of its dimensions. Source: ours."""
    found = {"embedding.weight": [[VOCAB], [HIDDEN]]}
    for i, letter in enumerate(config.pattern):
        found[f"layers.{i}.norm.weight"] = [[HIDDEN]]
        for name, dims in MIXER_AXES[letter].items():
            found[f"layers.{i}.mixer.{name}"] = dims
    found["final_norm.weight"] = [[HIDDEN]]
    found["head.weight"] = [[VOCAB], [HIDDEN]]
    return found


def axis_size(axis: Axis, config: HybridConfig) -> int:
    """The product of the fields of `config` that an axis names. Source: ours."""
    return math.prod(getattr(config, name) for name in axis)


def parameter_shapes(config: HybridConfig) -> dict[str, torch.Size]:
    """Name to shape of each parameter, without memory: what is counted and drawn. Source: ours."""
    shapes = {}
    for name, dims in parameter_axes(config).items():
        shape = []
        for parts in dims:
            sizes = [axis_size(axis, config) for axis in parts]
            shape.append(sum(sizes))
        shapes[name] = torch.Size(shape)
    return shapes


# A set of units is a list of indices. Along a part such as INNER they are combined as digits of a
# number: head 2 and head dimension 5 of 32 is row 2 · 32 + 5. Sets belong to a layer, "layers.3.",
# or to all, as that of the residual stream does. Where no axis of a dimension has a set, nothing is
# cut there.
#
#     in_proj of 4 heads with P = 2, no groups for brevity; heads 0 and 2 stay, dimension 1 of both
#     z rows 0 … 7     0·2 + 1, 2·2 + 1              rows 1 and 5
#     x rows 8 … 15    8 + 1, 8 + 5                  rows 9 and 13
#     dt rows 16 … 19  16 + 0, 16 + 2                rows 16 and 18: no head dimension here
#
# In a homogeneous model all layers have the same sizes. The sets still differ from layer to layer:
# feature 9 of layer 1 has nothing to do with feature 9 of layer 3. The residual stream alone has
# one set for all.


def place_of(name: str) -> str:
    """Where a parameter stands: "layers.3", "embedding", "final_norm" or "head". Source: ours."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "layers" else 1])


def rows_of(name: str, config: HybridConfig, kept: Units) -> dict[int, Tensor]:
    """Dimension of parameter `name` to the indices (C) that stay, where not all of them do.

    Args: kept: axis, or place and axis, to indices (C). Raises: ValueError for a boolean mask, for
        an index that the axis does not have, or that is given twice. Source: ours.
    """
    place = place_of(name)
    found = {}
    for dim, parts in enumerate(parameter_axes(config)[name]):
        rows = []
        begin = 0
        is_cut = False
        for axis in parts:
            index = torch.zeros(1, dtype=torch.int64)
            for factor in axis:
                size = getattr(config, factor)
                every = torch.arange(size)
                units = kept.get(f"{place}.{factor}", kept.get(factor, every))
                indices = units.tolist()
                are_units = Counter(indices) <= Counter(range(size))
                is_mask = units.dtype == torch.bool  # its True would be index 1
                if is_mask or (_has_values(units) and not are_units):
                    raise ValueError(f"{factor} keeps {indices}, but {size} are there, each once")
                is_cut |= units is not every
                index = index[:, None] * size + units
                index = index.flatten()
            rows.append(begin + index)
            begin += axis_size(axis, config)
        if is_cut:
            found[dim] = torch.cat(rows)
    return found


def slice_tensor(name: str, x: Tensor, config: HybridConfig, kept: Units) -> Tensor:
    """Parameter `name`, x (...), with the units `kept` alone; a copy, never a view.

    Args: kept: axis, or place and axis, to indices (C), in the order that they get. Raises:
        ValueError as `rows_of`. Source: ours.
    """
    for dim, rows in rows_of(name, config, kept).items():
        x = x.index_select(dim, rows.to(x.device))
    return x.clone(memory_format=torch.contiguous_format)


def slice_state_dict(full: StateDict, config: HybridConfig, kept: Units) -> StateDict:
    """A state dict of `config` with the units `kept` alone; copies.

    Args: kept: axis, or place and axis, to indices (C). An axis that is missing keeps all units.
    Raises: ValueError for names or shapes that are not the config's, a key of `kept` that is no
        axis, and as `rows_of`.
    Source: ours; which tensors an axis passes through: arXiv 2504.11409, section 3.
    """
    expected = parameter_shapes(config)
    found = {name: x.shape for name, x in full.items()}
    names = sorted(found | expected)
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(f"missing, unknown or of another shape for this config: {wrong[:6]}")
    places = {"", *map(place_of, full)}
    for key in kept:
        place, _, axis = key.rpartition(".")
        if axis not in vars(config) or place not in places:
            raise ValueError(f"{key!r} is neither an axis nor a place and an axis of this config")
    small = {}
    for name, x in full.items():
        small[name] = slice_tensor(name, x, config, kept)
    return small


# ── 1.2 Importance, from forward passes alone ───────────────────────────────────────────────────
#
# The large model reads some batches, the calibration text. A unit whose activations are small on
# all of it is missed least. For a channel c with activations y, over sequences b and tokens t:
#
#     score_c  =  √( Σ_b ( mean_t |y_btc| )² )        the mean over a sequence, L2 over sequences
#
# Two sequences and two channels, with the sizes |y| of their tokens:
#
#     channel 0    1 1 1 1 | 1 1 1 1     means 1 and 1     √(1 + 1)  = 1.41
#     channel 1    0 0 0 0 | 2 2 0 4     means 0 and 2     √(0 + 4)  = 2
#
# The mean over all tokens is 1 for both. The square between sequences prefers a unit that matters a
# lot in some texts to one that is always a little active. The mean within a sequence does the
# opposite for single tokens: one loud token among a thousand should not decide.
#
# No gradient is needed, so a model can be scored that could not be trained on these GPUs. (Scores
# are sums of many small terms: they are added in fp32 at least, also where the model runs in bf16.)
# What is watched, and what makes the score of a unit of its channels:
#
#     axis                   watched                               unit
#     ffn_hidden_size        input of down_proj, relu(x W1)²       a channel
#     num_attention_heads    input of o_proj                       L2 over the channels of a head
#     mamba_num_heads        part x of in_proj's output            L2 over the head's dimensions
#     mamba_head_dim         the same                              L2 over the heads
#     hidden_size            output of each layer's norm           sum over layers of the roots
#
# (z, B, C and dt would serve for Mamba heads too. The paper compared them, and x was best. The
# final norm is not watched: no layer reads it, only the output layer does.)
#
# Padding must not count. With three tokens of 6 and one of padding the mean is 6, not 4.5: a
# sequence that is mostly padding would hardly count, and which units it needs least of all.
#
# Several ranks change nothing but the order of sums:
#
#     dp     each replica has its own sequences: *squares* are all-reduced, the root comes after.
#            √9 + √16 = 7, and √(9 + 16) = 5. With roots the order of units depends on dp.
#     tp     channels between the two matrices are on one rank: the scores are gathered.
#            The residual stream is replicated, and so is its score.
#     pp     (not here) Stages hold other layers, and the stream's score is a sum over layers of
#            roots. So over stages the roots are summed, and over replicas the squares.
#
# A replica may have no sequence at all, and a sequence no token that counts: both add zeros.
#
# Two ranks of one tp group may compute the residual scores with different last bits, if their
# replicas' all-reduces run in another order. Then a tie could be broken in two ways, and the ranks
# would keep different channels. So all take those of the group's rank 0.
#
# Layers hand what is watched to `probe` (part 2). With a module of its own for each matrix, hooks
# do the same; production has those.


def _reduce_over(x: Tensor, group: Group, op=dist.ReduceOp.SUM) -> Tensor:
    """All-reduces x (...) in place, and returns it; without a group nothing is to be summed."""
    return x if group is None else _all_reduce(x, group, op)


def _add_squares(
    squares: StateDict, counted_BT1: Tensor, layer: int, axis: str, y_BTC: Tensor
) -> None:
    """Adds Σ_b (mean_t |y_btc|)² of each channel to what earlier batches have left in `squares`.

    Args: counted_BT1: True where a token counts. y_BTC: what is watched of this layer.
    """
    name = f"layers.{layer}.{axis}"
    size_BTC = at_least_fp32(y_BTC).abs()
    # where(), and not a product: a padding token may hold anything, and 0 · ∞ is NaN.
    total_BC = torch.where(counted_BT1, size_BTC, 0).sum(dim=1)
    count_B1 = counted_BT1.sum(dim=1).clamp(min=1)
    mean_BC = total_BC / count_B1
    square_C = mean_BC.square().sum(dim=0)
    squares[name] = squares.get(name, 0) + square_C


@torch.no_grad()
def importance(model: HybridLM, batches: Batches) -> Units:
    """The importance of every unit of a model, from forward passes; on the CPU of every rank.

    Args: batches: this replica's own; the number may differ between replicas. Tokens whose target
        is −100 do not count.
    Returns: axis, "layers.3." before those of a layer, to a score for each channel of each unit:
        hidden_size (D, 1), ffn_hidden_size (F, 1), num_attention_heads (H, P), mamba_num_heads
        (H, P). A unit's score is the L2 over its channels.
    Raises: FloatingPointError for scores that are not finite, ValueError where no token counts: on
        every rank. Collective over the model's mesh.
    Source: Minitron, section 2; arXiv 2504.11409 for Mamba; replicas: ours.
    """
    mesh = model.mesh
    # One token that does not count, so that a replica without batches has zeros to send.
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.head.weight.device)
    nothing = (token_11, token_11 - 100)
    squares: StateDict = {}
    for tokens_BT, targets_BT in itertools.chain([nothing], batches):
        counted_BT1 = (targets_BT != -100)[..., None]
        probe = partial(_add_squares, squares, counted_BT1)
        model.hidden(tokens_BT, probe=probe)
    # All axes in one tensor: one all-reduce over the replicas, and one all-gather over tp.
    flat = torch.cat(list(squares.values()))
    flat = _reduce_over(flat, mesh.dp_group)
    flat = flat.sqrt()
    if mesh.tp > 1:
        flat = _all_gather(flat, mesh.tp_group)
    sizes = [len(x) for x in squares.values()]
    flat_RC = flat.cpu().view(mesh.tp, -1)
    of_ranks = flat_RC.split(sizes, dim=1)
    hidden_D1 = torch.zeros(model.config.hidden_size, 1, dtype=flat.dtype)
    scores = {"hidden_size": hidden_D1}
    for name, score_RC in zip(squares, of_ranks):
        axis = name.rpartition(".")[2]
        if axis == "hidden_size":
            hidden_D1 += score_RC[0][:, None]
        else:
            units = getattr(model.config, axis)
            scores[name] = score_RC.reshape(units, -1)
    for name, score in scores.items():
        if not score.isfinite().all():
            raise FloatingPointError(f"activations are not finite in {name}: look at the weights")
    if not hidden_D1.any():
        raise ValueError("no token of the calibration batches counts: all targets are −100")
    return scores


# ── 1.3 Which units stay: heads only within their groups ────────────────────────────────────────
#
# Features and channels are ranked, and the first ones stay. Heads are not free like that. Head h of
# a Mamba layer reads B and C of its group, and which group that is follows from its place: with 8
# heads in 2 groups, the first four read group 0. The paper's observation: a permutation of heads
# leaves the layer's function as it was if, and only if, it maps groups onto groups.
#
#     scores     group 0: 9 8 7 6     group 1: 5 1 1 1         4 of 8 heads stay
#     globally   9 8 7 6              all are removed          heads 2 and 3 now read group 1's B
#     by group   9 8                  5 1                      each head reads its own group
#
# The global choice keeps more of the sum of scores, and its shapes are right: nothing fails. So
# each group keeps equally many heads. Query heads that share keys and values are the same case.
#
# It is the same number in each group, and not the same places: group 0 may keep its heads 0 and 1,
# and group 1 its heads 5 and 7.
#
# It also suits the ranks: groups are sharded over tp, so each rank loses equally many heads, and
# prune-then-shard is shard-then-prune, to the bit. Features have no groups, and are ranked over all
# ranks: of the best half most may be on one of them (section 3.2).
#
# The dimensions of a head are chosen first, the same ones for all heads, because P is one size. The
# heads are then ranked by what is left of them.


def best(score_C: Tensor, count: int) -> Tensor:
    """Indices (C) of the `count` largest scores, ascending; ties to the first. Source: ours."""
    order_C = score_C.argsort(descending=True, stable=True)
    return order_C[:count].sort().values


def best_in_groups(score_H: Tensor, groups: int, count: int) -> Tensor:
    """Indices (C) of the `count` heads that stay, a multiple of `groups`: equally many of each.

    Source: arXiv 2504.11409, section 3.
    """
    kept = []
    for i, score_R in enumerate(score_H.view(groups, -1)):
        first = i * len(score_R)
        kept.append(first + best(score_R, count // groups))
    return torch.cat(kept)


WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "mamba_num_heads")
WIDTHS += ("mamba_head_dim",)  # what can be pruned
UNITS = {  # a letter of the pattern to the axis of its units, and to that of their groups
    "M": ("mamba_num_heads", "mamba_num_groups"),
    "*": ("num_attention_heads", "num_query_groups"),
    "-": ("ffn_hidden_size",),
}


def choose(scores: Units, config: HybridConfig, sizes: Sizes) -> tuple[HybridConfig, Units]:
    """The smaller config, and the units that stay: of each layer the best by its scores.

    Args: scores: of `importance`. sizes: axis to its new size; a missing axis stays as it is.
    Returns: the config, and axis, or place and axis, to indices (C).
    Raises: ValueError for an unknown axis, a size that is not from 1 to the present one, scores
        that are missing or belong to other sizes, or heads that do not divide into their groups.
    Source: Minitron, section 2; arXiv 2504.11409, section 3.
    """
    for axis, size in sizes.items():
        if axis not in WIDTHS:
            raise ValueError(f"{axis!r} is not one of {', '.join(WIDTHS)}")
        if not 1 <= size <= getattr(config, axis):
            raise ValueError(f"{axis}={size}: it must be from 1 to {getattr(config, axis)}")
    small = replace(config, **sizes)
    hidden_D1 = _score_of("hidden_size", scores, config)
    kept = {"hidden_size": best(hidden_D1[:, 0], small.hidden_size)}
    for i, letter in enumerate(config.pattern):
        axis, *grouped = UNITS[letter]
        name = f"layers.{i}.{axis}"
        score_UC = _score_of(name, scores, config)
        if letter == "M":  # the dimensions first; heads are then ranked by those that stay
            dims = best(score_UC.norm(dim=0), small.mamba_head_dim)
            kept[f"layers.{i}.mamba_head_dim"] = dims
            score_UC = score_UC[:, dims]
        groups = getattr(small, grouped[0]) if grouped else 1
        score_U = score_UC.norm(dim=1)
        kept[name] = best_in_groups(score_U, groups, getattr(small, axis))
    return small, kept


def _score_of(name: str, scores: Units, config: HybridConfig) -> Tensor:
    """Scores (U, C) of one axis. Raises: ValueError where they are not of this config."""
    size = getattr(config, name.rpartition(".")[2])
    if name not in scores or len(scores[name]) != size:
        raise ValueError(f"scores of {name} are missing, or not {size}: score this model")
    return scores[name]


# Pruning changes the function even where the removed units are zero, because a norm divides by the
# mean square of its channels. Remove one channel of zeros from 128 and the sum of squares is the
# same, but it is divided by 127, so the output shrinks by √(127/128). A few training steps correct
# that. (Features and attention heads have no norm after them. There zeros are removed exactly.)
#
# How much at once? Model Optimizer's guide: up to a third of all parameters in one step; more than
# half in several, with training between them. At equal parameters a model that lost width is
# better, and one that lost depth is faster. Features stand pruning best, then heads, then channels
# of the residual stream. Nano 2 kept all its Mamba heads in the end: without 1/8 of them the loss
# was clearly worse, and generation hardly faster.
#
# What stays as it is in every case: the vocabulary, B and C with their groups and state size, the
# taps of the convolution, and the head size of attention.
#
# Depth needs no slice: a layer is x + f(norm(x)), so it can be left out. distill.py finds the one
# that is missed least, and trains what is left to reproduce the large model's logits.

# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 Layers ──────────────────────────────────────────────────────────────────────────────────
#
# Chapter 5's layers in their shortest form: one document, no cache, and the recurrence as a masked
# matrix, which is the best form for the short sequences here. Each is a function of its input and
# of the parameters that part 1.1 lists. A rank's layer is the same code with that rank's sizes, and
# no line of it depends on tp.
#
# Each hands the activations that score its units to `probe`.
#
#     x_BTD ─ in_proj ─► z │ x  B  C │ dt          z: the gate, after the recurrence
#                          │ └─ conv ─┘  │         x: what is written to the state, scored
#                          │    silu   softplus    B, C: key and query, shared by a group
#                          │      └─ ssd ─┘        dt: how long the state lasts
#                      silu(z) ─────·
#                             grouped norm ─ out_proj ─► y_BTD


def ssd(X: Tensor, a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence of Mamba-2 as attention without softmax, y (B, T, H, P).

    Args: X: dt · x, (B, T, H, P). a: dt · A, (B, T, H). B, C: (B, T, G, N); all at least fp32.
    Work and memory grow with T²; chapter 5 has the chunks. Source: Mamba-2 (Dao and Gu, 2024).
    """
    R = X.shape[2] // B.shape[2]
    with torch.autocast(X.device.type, enabled=False):
        sum_BHT1 = a.mT.cumsum(dim=-1, dtype=torch.float64)[..., None]
        decay_BHTS = (sum_BHT1 - sum_BHT1.mT).to(a.dtype)  # differences of long sums lose digits
        is_past_BHTS = torch.ones_like(decay_BHTS, dtype=torch.bool).tril()
        # Before exp: above the diagonal the sums are positive, and 0 · ∞ would be a NaN gradient.
        L_BHTS = decay_BHTS.masked_fill(~is_past_BHTS, -torch.inf).exp()
        score_BGTS = einsum(C, B, "B T G N, B S G N -> B G T S")
        score_BHTS = score_BGTS.repeat_interleave(R, dim=1)
        weight_BHTS = L_BHTS * score_BHTS
        return einsum(weight_BHTS, X, "B H T S, B S H P -> B T H P")


def rms_norm(x_BTC: Tensor, weight_C: Tensor, eps: float, groups: int = 1) -> Tensor:
    """x / √(mean of x² + eps) · weight, (B, T, C), in fp32; each group has a mean of its own."""
    x_BTGC = at_least_fp32(x_BTC).unflatten(-1, (groups, -1))
    square_BTG1 = x_BTGC.square().mean(dim=-1, keepdim=True)
    scale_BTG1 = (square_BTG1 + eps).rsqrt()
    y_BTC = (x_BTGC * scale_BTG1).flatten(-2)
    y_BTC = y_BTC * at_least_fp32(weight_C)
    return y_BTC.to(x_BTC.dtype)


def mamba(x_BTD: Tensor, w: nn.Module, config: HybridConfig, probe: Probe) -> Tensor:
    """A Mamba-2 layer without its norm and residual connection, x_BTD to (B, T, D)."""
    inner = axis_size(INNER, config)
    state = axis_size(STATE, config)
    channels = inner + 2 * state
    projected_BTC = F.linear(x_BTD, w.in_proj.weight)
    projected_BTC = at_least_fp32(projected_BTC)
    sizes = [inner, channels, config.mamba_num_heads]
    z_BTC, u_BTC, dt_BTH = projected_BTC.split(sizes, dim=-1)
    probe("mamba_num_heads", u_BTC[..., :inner])
    earlier = config.conv_kernel - 1
    u_BCT = F.pad(u_BTC.mT, (earlier, 0))
    weight_C1K = w.conv_weight[:, None]
    v_BCT = F.conv1d(u_BCT, weight_C1K, w.conv_bias, groups=channels)
    v_BCT = F.silu(at_least_fp32(v_BCT))
    x_BCT, B_BCT, C_BCT = v_BCT.split([inner, state, state], dim=1)
    x_BTHP = rearrange(x_BCT, "B (H P) T -> B T H P", P=config.mamba_head_dim)
    B_BTGN = rearrange(B_BCT, "B (G N) T -> B T G N", N=config.mamba_state_dim)
    C_BTGN = rearrange(C_BCT, "B (G N) T -> B T G N", N=config.mamba_state_dim)
    dt_BTH = F.softplus(dt_BTH + w.dt_bias)
    A_H = -w.A_log.exp()
    X_BTHP = dt_BTH[..., None] * x_BTHP
    y_BTHP = ssd(X_BTHP, dt_BTH * A_H, B_BTGN, C_BTGN)
    skip_H1 = w.D[:, None]
    y_BTHP = y_BTHP + skip_H1 * x_BTHP
    y_BTC = y_BTHP.flatten(-2) * F.silu(z_BTC)
    y_BTC = rms_norm(y_BTC, w.norm.weight, config.norm_eps, config.mamba_num_groups)
    y_BTC = y_BTC.to(x_BTD.dtype)
    return F.linear(y_BTC, w.out_proj.weight)


def attention(x_BTD: Tensor, w: nn.Module, config: HybridConfig, probe: Probe) -> Tensor:
    """Causal grouped-query attention without positions, x_BTD to (B, T, D)."""
    kv_weight = torch.cat([w.k_proj.weight, w.v_proj.weight])
    q_BTC = F.linear(x_BTD, w.q_proj.weight)
    kv_BTC = F.linear(x_BTD, kv_weight)
    P = config.attention_head_dim
    q_BHTP = rearrange(q_BTC, "B T (H P) -> B H T P", P=P)
    k_BGTP, v_BGTP = rearrange(kv_BTC, "B T (two G P) -> two B G T P", two=2, P=P)
    y_BHTP = F.scaled_dot_product_attention(q_BHTP, k_BGTP, v_BGTP, is_causal=True, enable_gqa=True)
    y_BTC = rearrange(y_BHTP, "B H T P -> B T (H P)")
    probe("num_attention_heads", y_BTC)
    return F.linear(y_BTC, w.o_proj.weight)


def feed_forward(x_BTD: Tensor, w: nn.Module, config: HybridConfig, probe: Probe) -> Tensor:
    """relu(x W1)² W2, x_BTD to (B, T, D)."""
    y_BTF = F.relu(F.linear(x_BTD, w.up_proj.weight)).square()
    probe("ffn_hidden_size", y_BTF)
    return F.linear(y_BTF, w.down_proj.weight)


# ── 2.2 The model, on one device and on a mesh ──────────────────────────────────────────────────
#
# The ranks are laid out as (dp, tp). With tp 2 and dp 2:
#
#                         tp rank 0    tp rank 1
#     rows 0, 1, 2          rank 0       rank 1       ← a tp group: the same tokens, other heads
#     rows 3, 4             rank 2       rank 3
#                             ↑ a dp group: the same weights, other rows
#
# tp shards the layers by heads and features, and the output layer by vocabulary entries. Embedding
# and norms are replicated. Groups of heads are never split between ranks: tp divides their number,
# so the norm inside a Mamba layer needs no message. Chapter 2's operators stand around each mixer:
#
#     x_BTD ─ norm ─ copy_to_tp ─ plain layer of h heads ─ reduce_from_tp ─ + x
#
# One all-reduce in forward and one in backward, as in chapter 2.
#
# On ALONE, the single device, there are no operators.
#
# The modules of the model only hold parameters, under the names of chapter 5's. They are made from
# the names of a state dict, so a pruned model needs no code of its own: another state dict, and the
# config that it belongs to. Every set of weights is copied: a student that shared a tensor with
# its teacher would train both.

LAYERS = {"M": mamba, "*": attention, "-": feed_forward}


@dataclass(frozen=True)
class Mesh:
    """This rank's place; Mesh() is a single device, whatever the number of ranks."""

    tp: int = 1  # ranks that share one copy of the model
    dp: int = 1  # copies, each with its own rows of a batch
    tp_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    dp_group: Group = None


ALONE = Mesh()


def make_mesh(tp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, tp). Collective over all ranks. timeout in seconds.

    Raises: ValueError where tp does not divide the ranks.
    """
    world = group_size()
    if tp < 1 or world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    ranks = torch.arange(world).view(-1, tp)
    tp_group = make_group(ranks.tolist(), device, timeout)
    dp_group = make_group(ranks.T.tolist(), device, timeout)
    rank = group_rank()
    return Mesh(tp, world // tp, rank % tp, rank // tp, tp_group, dp_group)


class HybridLM(nn.Module):
    """A hybrid on a mesh: tokens_BT (int64) to this rank's logits_BTv; all V of them on ALONE.

    Each letter of the pattern is a layer with norm and residual connection, x + f(norm(x)).
    Args: weights: this rank's shards (...), copied; None: its shards of the initial weights, a
        function of the config alone. without: layers to leave out. probe(layer, axis, y): see 2.1.
    Raises: ValueError where sizes do not divide over tp, or for weights of other names.
    """

    def __init__(self, config: HybridConfig, mesh: Mesh = ALONE, weights: StateDict | None = None):
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.local = local_config(config, mesh.tp)
        if weights is None:
            weights = shard_state_dict(initial_weights(config), config, mesh.tp_rank, mesh.tp)
        wrong = sorted(weights.keys() ^ parameter_shapes(config).keys())
        if wrong:
            raise ValueError(f"missing or unknown for this config: {wrong[:6]}")
        for name, x in weights.items():  # layers.0.mixer.in_proj.weight: a module for each part
            module = self
            *path, kind = name.split(".")
            for part in path:
                module = module._modules.setdefault(part, nn.Module())
            module.register_parameter(kind, nn.Parameter(x.detach().clone()))

    def hidden(
        self, tokens_BT: Tensor, without: Iterable[int] = (), probe: Callable = lambda *_: None
    ) -> Tensor:
        """The last hidden state, after the final norm, (B, T, D).

        The loop over layers is the same on a device and on a mesh, with or without some layers.
        """
        eps = self.config.norm_eps
        x_BTD = F.embedding(tokens_BT, self.embedding.weight)
        for i, letter in enumerate(self.config.pattern):
            if i in without:
                continue
            layer = self.get_submodule(f"layers.{i}")
            probe_layer = partial(probe, i)
            y_BTD = rms_norm(x_BTD, layer.norm.weight, eps)
            probe_layer("hidden_size", y_BTD)
            mixer = LAYERS[letter]
            y_BTD = self.enter(y_BTD)
            partial_y_BTD = mixer(y_BTD, layer.mixer, self.local, probe_layer)
            x_BTD = x_BTD + self.leave(partial_y_BTD)
        return rms_norm(x_BTD, self.final_norm.weight, eps)

    def forward(self, tokens_BT: Tensor, without: Iterable[int] = ()) -> Tensor:
        x_BTD = self.hidden(tokens_BT, without)
        return F.linear(self.enter(x_BTD), self.head.weight)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Into a tensor-parallel region: replicated (B, T, D), the same values."""
        return copy_to_tp(x_BTD, self.mesh.tp_group) if self.mesh.tp > 1 else x_BTD

    def leave(self, partial_x_BTD: Tensor) -> Tensor:
        """Out of it: partial sums to their sum, (B, T, D)."""
        if self.mesh.tp == 1:
            return partial_x_BTD
        return reduce_from_tp(partial_x_BTD, self.mesh.tp_group)


def initial_weights(config: HybridConfig) -> StateDict:
    """The full initial weights, fp32, drawn on the CPU, as chapter 5 draws them."""
    generator = torch.Generator().manual_seed(config.seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        weights[name] = _initial_value(name, shape, config, generator)
    return weights


def _initial_value(name: str, shape: torch.Size, config: HybridConfig, generator) -> Tensor:
    kind = name.split(".")[-1]
    if kind in ("D", "weight") and len(shape) == 1:  # "weight": a norm's
        return torch.ones(shape)
    if kind == "weight":
        writes = name.split(".")[-2] in ("out_proj", "o_proj", "down_proj")
        std = config.init_std / math.sqrt(len(config.pattern) if writes else 1)
        return torch.randn(shape, generator=generator) * std
    uniform = torch.rand(shape, generator=generator)
    if kind == "A_log":  # −A from 1 to 16
        return (1 + 15 * uniform).log()
    if kind == "dt_bias":  # softplus's inverse of a dt from 0.001 to 0.1
        dt = 1e-3 * 100**uniform
        return dt.expm1().log()
    return (2 * uniform - 1) / math.sqrt(config.conv_kernel)  # of the convolution


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# ── 3.1 A shard is a slice ──────────────────────────────────────────────────────────────────────
#
# Rank r of tp keeps the r-th part of each sharded axis. With that set of units, `slice_state_dict`
# shards: in_proj gets this rank's rows of each of its five parts, out_proj its columns, and so on.
# Merging writes each shard to the rows that it was sliced from.
#
#     in_proj.weight of 4 heads, 2 groups:   z z z z │ x x x x │ B B │ C C │ dt dt dt dt
#     rank 0 of 2                            z z     │ x x     │ B   │ C   │ dt dt
#     without heads 1 and 3                  z   z   │ x   x   │ B B │ C C │ dt    dt
#
# The two lines below the first are made by the same function. That is also why a checkpoint of the
# pruned model fits any number of ranks: it is a state dict like the large one's, and smaller.
#
# The embedding table is replicated here, and the output layer is sharded. Both have the axis
# vocab_size, so the set of the latter has its place in its name, "head.vocab_size".


def shard_units(config: HybridConfig, rank: int, tp: int) -> Units:
    """The units (C) of each sharded axis that rank `rank` holds.

    Raises: ValueError where heads, groups, features or vocabulary entries do not divide over tp.
    """
    kept = {}
    axes = [UNITS[letter] for letter in config.pattern]
    for axis in itertools.chain(VOCAB, *axes):
        size = getattr(config, axis)
        if size % tp:
            raise ValueError(f"{axis}={size} does not divide over tp={tp} ranks: take a multiple")
        kept[axis] = torch.arange(size).chunk(tp)[rank]
    kept["head.vocab_size"] = kept.pop("vocab_size")  # the embedding is replicated
    return kept


def local_config(config: HybridConfig, tp: int) -> HybridConfig:
    """The sizes of one rank's layers; the vocabulary stays. Raises: ValueError as `shard_units`."""
    kept = shard_units(config, 0, tp)
    kept.pop("head.vocab_size")
    sizes = {axis: len(units) for axis, units in kept.items()}
    return replace(config, **sizes)


def shard_state_dict(full: StateDict, config: HybridConfig, rank: int, tp: int) -> StateDict:
    """The single device's state dict to that of tensor-parallel rank `rank`; copies.

    Raises: ValueError as `slice_state_dict` and `shard_units`.
    """
    return slice_state_dict(full, config, shard_units(config, rank, tp))


def merge_tensor(name: str, shards: list[Tensor], config: HybridConfig) -> Tensor:
    """All ranks' shards (...) of parameter `name`, or of its gradient, to the full tensor.

    Raises: ValueError where a replicated tensor differs between ranks.
    """
    tp = len(shards)
    full = shards[0].new_empty(parameter_shapes(config)[name])
    for rank, shard in enumerate(shards):
        rows = rows_of(name, config, shard_units(config, rank, tp))
        for dim, index in rows.items():  # one at most
            full.index_copy_(dim, index.to(shard.device), shard)
        if not rows:
            if not torch.allclose(shard, shards[0], 0, 0, equal_nan=True):
                raise ValueError(f"{name} should be replicated, but rank {rank}'s differs")
            full.copy_(shard)
    return full


def merge_state_dicts(shards: list[StateDict], config: HybridConfig) -> StateDict:
    """All ranks' state dicts, in order of tp rank, to the single device's.

    Raises: ValueError as `merge_tensor`.
    """
    full = {}
    for name in shards[0]:
        full[name] = merge_tensor(name, [shard[name] for shard in shards], config)
    return full


def gather_tensor(name: str, x: Tensor, config: HybridConfig, mesh: Mesh) -> Tensor:
    """This rank's shard x (...) of parameter `name` to the full tensor, on every rank. Collective
    over tp where it is sharded. Raises: ValueError as `shard_units`."""
    units = shard_units(config, 0, mesh.tp)
    if mesh.tp == 1 or not rows_of(name, config, units):
        return x
    shards = [torch.empty_like(x) for _ in range(mesh.tp)]
    dist.all_gather(shards, x.contiguous(), mesh.tp_group)
    return merge_tensor(name, shards, config)


# ── 3.2 Pruning on a mesh ───────────────────────────────────────────────────────────────────────
#
# Heads stay balanced between ranks, features do not: the best ones may all be on rank 0. So each
# tensor is gathered, sliced, and sharded anew. No more than one full tensor is in memory at a time,
# on any rank. Nothing depends on how the large model was sharded: the result is that of one device.
#
# All ranks must choose the same units, or the shards of one tensor come from different slices and
# no shape tells. `importance` therefore returns the same scores everywhere, to the bit, and
# `choose` breaks ties by index.


@torch.no_grad()
def prune(model: HybridLM, config: Sizes, scores: Units) -> HybridLM:
    """A smaller model with the best units of `model`, on its mesh; the model stays as it is.

    Args: config: axis to its new size: {"hidden_size": 96, "mamba_num_heads": 6}. scores: of
        `importance`.
    Raises: ValueError as `choose`, and where the new sizes do not divide over tp, on every rank
        and before anything is sent. Collective over the model's mesh.
    Source: Minitron, section 2; arXiv 2504.11409, section 3; on ranks: ours.
    """
    mesh = model.mesh
    small, kept = choose(scores, model.config, config)
    units = shard_units(small, mesh.tp_rank, mesh.tp)
    shards = {}
    # From this rank's shard of the large tensor to its shard of the small one.
    for name, x in model.state_dict().items():
        full = gather_tensor(name, x, model.config, mesh)
        sliced = slice_tensor(name, full, model.config, kept)
        shards[name] = slice_tensor(name, sliced, small, units)
    return HybridLM(small, mesh, shards)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# A batch is global, and each replica takes its rows of it. The loss is the mean over all tokens of
# the batch that count. So a replica divides the sum over its tokens by the count of *all*: such
# partial sums add up to the mean, and so do their gradients. A mean of the replicas' means would
# count a token more where few of them count.
#
#     tokens that count     replica 0: 6, losses 1 each     replica 1: 2, losses 5 each
#     mean of all           (6 · 1 + 2 · 5) / 8 = 2
#     mean of means         (1 + 5) / 2 = 3                 its two tokens have 3/4 of the weight
#
# After backward a sharded parameter has its full gradient for this replica's rows, and so has a
# replicated one, thanks to copy_to_tp. What is left is one sum over the replicas. The norm before
# clipping sums squares over tp: of a replicated parameter each rank counts 1 / tp.
#
# Two learning rates are known to work for a pruned model: the large model's final one, or a fifth
# of its peak. The weights are already good, and the peak itself would undo them.
#
# The loss is an argument: cross entropy here, and in distill.py the divergence from a teacher.


def make_optimizer(model: nn.Module, lr: float) -> AdamW:
    """AdamW. Without weight decay: it would pull A_log, dt_bias and D to values of no meaning."""
    return AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)


def is_sharded(model: HybridLM) -> dict[str, bool]:
    """Name of each parameter to whether ranks of a tp group hold different parts of it."""
    units = shard_units(model.config, 0, model.mesh.tp)
    found = {}
    for name, _ in model.named_parameters():
        found[name] = model.mesh.tp > 1 and bool(rows_of(name, model.config, units))
    return found


def sum_gradients(model: HybridLM) -> None:
    """All-reduces every gradient over the replicas. (Chapter 2 does it in one buffer.)"""
    for p in model.parameters():
        if p.grad is not None:  # NCCL refuses other layouts than contiguous ones
            p.grad = _reduce_over(p.grad.contiguous(), model.mesh.dp_group)


def grad_norm(model: HybridLM, sharded: dict[str, bool]) -> Tensor:
    """The norm of the full gradient, a scalar; each element counts once. Collective over tp."""
    squares = []
    for name, p in model.named_parameters():
        if p.grad is not None:  # None: frozen
            copies = 1 if sharded[name] else model.mesh.tp
            squares.append(at_least_fp32(p.grad).square().sum() / copies)
    total = torch.stack(squares).sum()
    return _reduce_over(total, model.mesh.tp_group).sqrt()


def cross_entropy(model: HybridLM, tokens_bT: Tensor, targets_bT: Tensor) -> Tensor:
    """Loss per token in nats, (b, T), at least fp32; 0 where the target is −100."""
    logits_bTV = model(tokens_bT)
    if model.mesh.tp > 1:  # V is small here; chapter 2, and distill.py, gather nothing
        logits_bTV = _Conjugate.apply(logits_bTV, model.mesh.tp_group, _all_gather, _take_shard)
    logits_bVT = at_least_fp32(logits_bTV).mT
    return F.cross_entropy(logits_bVT, targets_bT, ignore_index=-100, reduction="none")


def partial_mean(model: HybridLM, batch: Batch, loss: Loss) -> Tensor:
    """This replica's partial sum of the mean loss of a global batch, a scalar."""
    is_counted_BT = batch[1] != -100
    count = is_counted_BT.sum().clamp(min=1)
    tokens_bT, targets_bT = of_replica(batch, model.mesh)
    loss_bT = loss(model, tokens_bT, targets_bT)
    # where(), and not a product: what does not count may be anything.
    loss_bT = torch.where(targets_bT != -100, loss_bT, 0)
    return loss_bT.sum() / count


def of_replica(batch: Batch, mesh: Mesh) -> Batch:
    """This replica's rows (b, T) of a global batch."""
    return tuple(x_BT.tensor_split(mesh.dp)[mesh.dp_rank] for x_BT in batch)


def train(
    model: HybridLM,
    optimizer: Optimizer,
    batches: Batches,
    loss: Loss = cross_entropy,
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields after each step two scalars, the mean loss per token and the norm before clipping.

    Args: batches: global ones; every rank iterates them. loss(model, tokens_bT, targets_bT): of
        this replica's rows, (b, T).
    """
    sharded = is_sharded(model)
    device_type = model.head.weight.device.type
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast(device_type, autocast, enabled=autocast is not None):
            partial_loss = partial_mean(model, batch, loss)
        partial_loss.backward()
        sum_gradients(model)
        norm = grad_norm(model, sharded)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
        mean_loss = _reduce_over(partial_loss.detach(), model.mesh.dp_group)
        yield mean_loss, norm


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# A pruned model is a start and no result. distill.py trains it with the large model's logits, and
# compares it with a model that was trained from new weights. And the shape itself was given here:
# how many heads, features, layers? search.py lists the shapes that fit into a memory budget.

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────
#
# A hybrid of 863 thousand parameters is trained on text, and pruned to about half of them in two
# ways: by its scores, and by random ones. Right after pruning the scores are clearly better. What
# is left of that after training is another question, and distill.py answers it.
#
# (The calibration text is four batches of the train split, 2,000 tokens. The papers take 1,024
# sequences. More text changes the order of units near the cut, and little else.)
#
# Do not read more into one run: another seed of the random units moves their loss by a few per
# cent, and the papers' models are ten thousand times as large.
#
# The equality is shown first, on every mesh of the ranks: scores, then pruning, then five steps of
# training of the pruned model. The small model of the proof has what breaks wrong code: rows that
# do not divide over the replicas, tokens that count on one replica only, features that are removed
# unevenly, heads that lose dimensions.
#
# fp64 is the proof. In fp32 and bf16 the errors are those of rounding, and the order of two units
# with nearly equal scores may differ: so both models are pruned by the single device's scores.

BOUNDS = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 2e-1}  # fp64 is the proof
STEPS = 300
SMALLER = {"hidden_size": 3 / 4, "ffn_hidden_size": 5 / 8, "mamba_num_heads": 3 / 4}


def check_case(mesh: Mesh, device: torch.device) -> tuple[HybridConfig, Sizes, list[Batch]]:
    """A small odd model, the sizes that it is pruned to, and two global batches: rows that do not
    divide over the replicas, and tokens that do not count, on one replica only."""
    units = 2 * mesh.tp
    sizes = {"hidden_size": 16, "mamba_head_dim": 6, "mamba_state_dim": 6, "attention_head_dim": 4}
    for axis in ("num_query_groups", "mamba_num_groups"):
        sizes[axis] = units
    for axis in ("num_attention_heads", "mamba_num_heads", "vocab_size"):
        sizes[axis] = 2 * units
    config = HybridConfig(pattern="M-*M-", ffn_hidden_size=6 * units, init_std=0.2, **sizes)
    smaller = {"hidden_size": 12, "ffn_hidden_size": 3 * units, "mamba_head_dim": 4}
    smaller |= {"num_attention_heads": units, "mamba_num_heads": units}
    generator = torch.Generator().manual_seed(1)
    shape = (2, 2, 2 * mesh.dp + 1, 7)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    ids[:, 1, 0, 2:] = -100
    batches = [tuple(pair_2BT) for pair_2BT in ids.to(device)]
    return config, smaller, batches


def scores_of(model: HybridLM, batches: Batches) -> Units:
    """The importance of all units, from global batches."""
    return importance(model, [of_replica(batch, model.mesh) for batch in batches])


def gathered(tensors: StateDict, model: HybridLM) -> StateDict:
    """A model's shards, or their gradients, to full tensors (...), on every rank."""
    place = (model.config, model.mesh)
    return {name: gather_tensor(name, x, *place) for name, x in tensors.items()}


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Scores, pruning, five steps of training on a mesh and on a single device: name to error."""
    config, smaller, batches = check_case(mesh, device)
    large = HybridLM(config).to(device, dtype)
    large_sharded = HybridLM(config, mesh).to(device, dtype)
    scores = scores_of(large, batches)
    found = scores_of(large_sharded, batches)
    errors = relative_errors("score", found, scores)
    plain = prune(large, smaller, scores)
    model = prune(large_sharded, smaller, scores)
    five = batches[:1] * 5
    alone = train(plain, make_optimizer(plain, 1e-3), five, max_norm=0.1, autocast=autocast)
    steps = train(model, make_optimizer(model, 1e-3), five, max_norm=0.1, autocast=autocast)
    for step, (expected, found) in enumerate(zip(alone, steps)):
        for name, x, y in zip(("loss", "norm before clipping"), found, expected):
            errors[f"{name} {step}"] = abs(x / y - 1).item()
        if step == 0:
            reference = gradients(plain)
            grads = gathered(gradients(model), model)
            errors |= relative_errors("gradient", grads, reference)
    if dtype == torch.float64:
        full = gathered(model.state_dict(), model)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), 5e-3)
    return over_all_ranks(errors)


def gradients(model: HybridLM) -> StateDict:
    """The gradient (...) of each parameter by name."""
    return {name: p.grad for name, p in model.named_parameters()}


def check(
    args: Args, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """`equivalence` on every mesh of the ranks."""
    errors = {}
    world = group_size()
    for tp in range(1, world + 1):
        if world % tp == 0:
            mesh = make_mesh(tp, device, args.timeout)
            found = equivalence(mesh, device, dtype, autocast)
            errors |= {f"{name}, tp {tp}": error for name, error in found.items()}
    return errors


@torch.no_grad()
def evaluate(model: HybridLM, batches: Batches) -> float:
    """Mean cross entropy per token of global batches of one size."""
    losses = [partial_mean(model, batch, cross_entropy) for batch in batches]
    loss = torch.stack(losses).mean()
    return _reduce_over(loss, model.mesh.dp_group).item()


def text_batches(
    args: Args, device: torch.device, steps: range, evaluation: bool = False
) -> Batches:
    """Global batches of these steps."""
    data = TextData(args.data, args.seq_length)
    for step in steps:
        batch = data.batch(step, args.batch, args.seed, evaluation)
        yield tuple(x_BT.to(device) for x_BT in batch)


def smaller_sizes(config: HybridConfig) -> Sizes:
    """What the demonstrations prune to: about half of all parameters."""
    return {axis: int(getattr(config, axis) * part) for axis, part in SMALLER.items()}


def demonstrate(args: Args, mesh: Mesh, device: torch.device) -> HybridLM:
    """Trains a large model with cross entropy, and returns it."""
    dtype, autocast = dtypes(args)
    config = config_from(args, HybridConfig, seed=args.seed)
    model = HybridLM(config, mesh).to(device, dtype)
    batches = text_batches(args, device, range(args.steps))
    optimizer = make_optimizer(model, args.lr)
    steps = train(model, optimizer, batches, autocast=autocast)
    say("step    loss    norm")
    for step, (loss, norm) in enumerate(steps):
        loss, norm = read_step(step, loss, norm)
        if step < 3 or step % 50 == 49:
            say(f"{step:4}  {loss:.4f}  {norm:6.3f}")
    say()
    return model


def measure(args: Args, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = check(args, device, torch.float64)
    claims = []
    for kind in ("score", "gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, float64"
        here = f"worst {error:.1e} relative"
        claims.append((claim, "exact", here, error <= BOUNDS["fp64"]))
    mesh = make_mesh(args.tp, device, args.timeout)
    model = demonstrate(args, mesh, device)
    calibration = text_batches(args, device, range(4))
    held_out = list(text_batches(args, device, range(4), evaluation=True))
    scores = scores_of(model, calibration)
    rng = torch.Generator().manual_seed(args.seed)
    chance = {name: torch.rand(score.shape, generator=rng) for name, score in scores.items()}
    sizes = smaller_sizes(model.config)
    large = evaluate(model, held_out)
    pruned = prune(model, sizes, scores)
    by_scores = evaluate(pruned, held_out)
    pruned = prune(model, sizes, chance)
    by_chance = evaluate(pruned, held_out)
    here = f"{large:.2f}; {by_scores:.2f}; {by_chance:.2f}"
    claim = "loss: large; pruned by scores; random units"
    return [*claims, (claim, "scores are better", here, "one draw, a small model")]


def main(args: Args, device: torch.device) -> None:
    dp = args.world_size // args.tp
    say_setting(args, f": tp {args.tp} × dp {dp}")
    if args.check:
        errors = check(args, device, *dtypes(args))
        good = print_errors(errors, BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, device))
    if not good:
        sys.exit(1)


@dataclass
class Options:  # the chapter's own flags
    data: str = flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")
    tp: int | None = flag(None, "ranks that share a copy of the model; None: 2 or 1", least=1)
    seq_length: int = flag(64, "tokens of a sequence, T", least=1)
    batch: int | None = flag(None, "sequences per step; None: 8 or a few more", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)


def check_args(args: Args) -> None:
    """Replaces every None. Raises ValueError or OSError where flags, ranks and text do not fit."""
    args.tp = args.tp or math.gcd(args.world_size, 2)
    if args.world_size % args.tp:
        raise ValueError(f"--tp {args.tp} does not divide the {args.world_size} ranks")
    dp = args.world_size // args.tp
    args.batch = args.batch or max(8, dp)
    if args.batch < dp:
        raise ValueError(f"--batch {args.batch} is less than one sequence for {dp} replicas")
    config = config_from(args, HybridConfig, seed=args.seed)
    local_config(config, args.tp)
    local_config(replace(config, **smaller_sizes(config)), args.tp)
    TextData(args.data, args.seq_length)


def flags() -> Args:
    return parse_flags(__doc__, [Options, HybridConfig], check_args, ranks=2, steps=STEPS)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: conjugate operators (home: 02_megatron_tp)
class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, op, conjugate_op):
        ctx.reversed = (group, conjugate_op, op)
        return op(x, group)

    @staticmethod
    def backward(ctx, grad):
        # apply(), not a plain call: backward must be differentiable too.
        return _Conjugate.apply(grad, *ctx.reversed), None, None, None


def _take_shard(x: Tensor, group: Group, dim: int = -1, name: str = "the last dimension") -> Tensor:
    tp = group_size(group)
    if x.shape[dim] % tp:
        size = f"{name}={x.shape[dim]} does not divide over {tp} ranks"
        raise ValueError(f"{size}: choose a multiple of {tp}, or fewer ranks")
    # A copy: a view would keep the memory of the full tensor alive.
    return x.chunk(tp, dim)[group_rank(group)].clone(memory_format=torch.contiguous_format)


# endregion copy 7a6c69
# region carried: tensor-parallel operators (home: 02_megatron_tp)
def _identity(x: Tensor, group: Group) -> Tensor:
    return x


def _sum(partial_x: Tensor, group: Group) -> Tensor:
    # all_reduce works in place, and the caller may still need its partial sum.
    return _all_reduce(partial_x.clone(memory_format=torch.contiguous_format), group)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    shards = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(shards, x, group)
    return torch.cat(shards, dim=-1)


def copy_to_tp(x: Tensor, group: Group = None) -> Tensor:
    """Enters a tensor-parallel region: identity in forward, all-reduce of the gradient.

    Args: x (...), replicated. group: the tensor-parallel group; None is all ranks.
    Source: f of Megatron-LM (Shoeybi et al., 2019), figure 3.
    """
    return _Conjugate.apply(x, group, _identity, _sum) if group_size(group) > 1 else x


def reduce_from_tp(partial_x: Tensor, group: Group = None) -> Tensor:
    """Leaves a tensor-parallel region: all-reduce in forward, identity for the gradient.

    Args: partial_x (...), of one shape on every rank; not modified.
    Returns: the sum over `group` (...), replicated.
    Source: g of Megatron-LM (Shoeybi et al., 2019), figure 3.
    """
    if group_size(group) == 1:
        return partial_x
    return _Conjugate.apply(partial_x, group, _sum, _identity)


# endregion copy 175230
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
