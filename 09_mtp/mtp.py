# SPDX-License-Identifier: MIT-0
"""Chapter 9. Several tokens at once: multi-token prediction and speculative decoding of a hybrid.

Papers: NVIDIA Nemotron 3: Efficient and Open Intelligence, NVIDIA, 2025, arXiv 2512.20856;
        Nemotron 3 Super, NVIDIA, 2026, arXiv 2604.12374;
        DeepSeek-V3 Technical Report, DeepSeek-AI, 2024, arXiv 2412.19437;
        Fast Inference from Transformers via Speculative Decoding, Leviathan et al., 2023,
        arXiv 2211.17192

The problem. A model writes one token per forward pass, and each pass reads all weights. A pass over
eight tokens costs nearly the same, but seven of the eight are not known yet.

The idea. A small block is trained with the model, the trunk, to predict the tokens after the next
one. Each application of the block is a depth. In training it reads true tokens. At position i:

                 reads                            computes     predicts
    trunk        t_0 … t_i                   ──►  h_i     ──►  t_{i+1}
    depth 1      embedding of t_{i+1}, h_i   ──►  g¹_i    ──►  t_{i+2}
    depth 2      embedding of t_{i+2}, g¹_i  ──►  g²_i    ──►  t_{i+3}

In decoding (speculate.py) it proposes tokens, the drafts. One pass of the trunk verifies them all.

Run it (no flag is needed; --help lists them):

    python 09_mtp/mtp.py                            2 local ranks: replicas
    python 09_mtp/mtp.py --ranks 4 --tp 2 --cp 2    vocabulary and sequence sharded
    python 09_mtp/mtp.py --ranks 1                  one process, for a debugger
    python 09_mtp/mtp.py --check                    equivalence alone, the error of each tensor
    torchrun --nproc-per-node=8 09_mtp/mtp.py --tp 2

It proves in float64 that every gradient equals the single device's, trains a small hybrid with two
depths on text, and prints the claims that it measured. `speculate.py` trains it and then writes.

Left out: the experts of Super's block (chapter 6); shards of the layers (chapters 2 and 5); depths
with pipeline stages of their own; the paper's tables (mtp_tables.py).
"""

# ── 0 Notation ──────────────────────────────────────────────────────────────────────────────────
#
# A tensor's suffix is its shape, one letter per dimension. A CAPITAL is the full dimension; the
# small letter is this rank's shard of it. partial_ marks a partial sum. Letters as in chapter 5:
#
#     B  sequences of a batch              H  heads               b: this replica's sequences
#     T  tokens of a sequence              P  size of a head      t = T / cp: this rank's tokens
#     D  model width                       N  size of a state     v = V, padded, / tp
#     V  vocabulary entries                C  channels            S  tokens that T queries see
#     F  feed-forward size                 K  taps of the convolution
#
# The papers' D, the number of depths, is here `mtp_num_layers`, its name in Megatron-LM.
# tp ranks share the vocabulary, cp ranks share a sequence: world size = dp · cp · tp.
#
# A target of −100 does not count. So targets carry their loss mask with them.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

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
from torch.optim.lr_scheduler import CosineAnnealingLR

Group = dist.ProcessGroup | None
Parameters = Iterable[nn.Parameter]
StateDict = dict[str, Tensor]
Documents = Tensor | None  # of each token, an index that never comes back; None: one document
Batch = tuple[Tensor, ...]  # tokens_BT, targets_BT (−100 does not count), and maybe document_BT
Autocast = torch.dtype | None  # the dtype of GEMMs under autocast; None: no autocast
IGNORED = -100  # a target that does not count


# region carried: config fields (home: 01_deepspeech)
def flag(default: Any, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a flag, too. keywords: argparse's, and `least` for numbers (0)."""
    return field(default=default, metadata={"help": text, **keywords})


# endregion copy 36d020


@dataclass
class HybridConfig:
    """Sizes of the model; `flag` makes a field a flag too. Raises ValueError for impossible ones.

    Settings of multi-token prediction have Megatron-LM's names.
    """

    vocab_size: int = 256
    hidden_size: int = flag(128, "model width, D", least=1)
    pattern: str = flag("M-M*-", "the trunk, one letter per layer: M Mamba-2, * attention, - MLP")
    mtp_pattern: str = flag("*-", "the layers of the block for multi-token prediction")
    mtp_num_layers: int = flag(2, "depths of multi-token prediction; 0: none")
    mtp_use_repeated_layer: bool = True  # one block for all depths, as in Super
    mtp_loss_scaling_factor: float = flag(0.3, "weight of the mean loss of all depths")
    mtp_detach_heads: bool = flag(False, "depths train their block alone")
    ffn_hidden_size: int = flag(384, "feed-forward size, F", least=1)
    mamba_heads: int = flag(4, "heads of a Mamba layer; they share B and C", least=1)
    mamba_head_size: int = 32  # P
    state_size: int = flag(16, "size of a state, N", least=1)
    conv_kernel: int = 4  # K
    attention_heads: int = flag(4, "attention heads", least=1)
    attention_head_size: int = 32
    init_std: float = 0.02
    seed: int = 0  # the initial weights are a function of this configuration alone

    def __post_init__(self):
        for name in ("pattern", "mtp_pattern"):
            letters = getattr(self, name)
            if not letters or set(letters) - set(LAYERS):
                raise ValueError(f"{name}={letters!r}: the letters are {list(LAYERS)}")
        for name, value in vars(self).items():
            least = LEAST.get(name, 1)
            if type(value) in (int, float) and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")


LEAST = {"mtp_num_layers": 0, "mtp_loss_scaling_factor": 0, "conv_kernel": 2}
LEAST |= {"init_std": 0, "seed": 0}

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 Which token a depth reads, and which it predicts ────────────────────────────────────────
#
# The trunk at position i has read t_0 … t_i and predicts t_{i+1}. Depth 1 reads one token more,
# t_{i+1}, which is known in training, and predicts t_{i+2}; depth k reads t_{i+k} and predicts
# t_{i+k+1}. So from depth to depth the tokens and the targets move to the left by one. For two
# documents packed into one sequence, "abcd" and "ef":
#
#     position              0   1   2   3 │ 4   5
#     token                 a   b   c   d │ e   f
#     trunk predicts        b   c   d   – │ f   –        – is −100: no target
#     depth 1   reads       b   c   d   0 │ f   0        0 is any token: nothing that counts sees it
#               predicts    c   d   –   – │ –   –
#     depth 2   reads       c   d   0   0 │ 0   0
#               predicts    d   –   –   – │ –   –
#
# Each depth loses a target in each document. The mistakes here are silent, and the loss falls:
#
# · A roll over the whole sequence gives depth 1 at position 3 the token e and the target f: both
#   are of another document.
# · A target that is not moved makes depth 1 predict t_{i+1}, the token that it has just read. It
#   learns to copy within some steps, its loss is nearly 0, and its drafts are useless.
# · A mask that is not moved with the targets counts others than it should: a prompt's last token,
#   or the 0 that was moved in. Here −100 is the mask, so the two cannot get out of step.
#
# The trunk's targets are data: tokens one place to the left, −100 at the end of a document and in
# prompts that are not trained on. Depths take theirs from these, and never from the tokens: what
# the trunk does not learn to predict, depths do not either.
#
# A document of length ℓ has ℓ − 1 targets of the trunk (its last token predicts nothing here), and
# ℓ − 1 − k of depth k. In a batch of short documents depths have far fewer targets than the trunk.
#
# Where the sequence is sharded over ranks, the last token of a rank needs the first of the next
# one. The table above on two ranks, three tokens each:
#
#     rank 0                      rank 1
#     token       a   b   c       d │ e   f
#     sent to the rank before     d                  one id per sequence for each roll
#     depth 1     b   c   d       0 │ f   0
#     sent to the rank before     0                  what depth 1 has there, not the token e
#     depth 2     c   d   0       0 │ 0   0
#
# A batch needs 1 + 2 · depths such messages: the documents once, then tokens and targets for each
# depth. With 2 depths, and 8 sequences on each of 4 ranks, a rank gathers 5 · 8 · 4 ids of 8 bytes,
# 1280 in all. The last rank has no next one. It is given what ends a sequence: the token 0, the
# target −100, and for documents −1, which is no document.
#
# The message of depth 2 depends on the roll of depth 1: the neighbour's first token may be the last
# of its document, and then depth 2 gets the fill, and not the neighbour's second token.
#
# Leave the exchange out (roll each rank's part by itself), and only the last tokens of each rank
# are wrong: with two depths two of its thousands. No loss curve shows that.


def from_next_rank(first_B1: Tensor, end: int, group: Group = None) -> Tensor:
    """The next rank's first token ids (B, 1) of a sharded sequence; `end` on the last rank.

    Args: group: the ranks that share the sequence; None: it is not sharded. Collective.
    Gathers an id per sequence from each rank; a send to the neighbour would do. Source: ours.
    """
    if group is None or group_size(group) == 1:
        return torch.full_like(first_B1, end)
    ranks = group_size(group)
    firsts = [torch.empty_like(first_B1) for _ in range(ranks)]
    dist.all_gather(firsts, first_B1.contiguous(), group)
    firsts.append(torch.full_like(first_B1, end))
    return firsts[group_rank(group) + 1]


def last_of_documents(document_Bt: Tensor, group: Group = None) -> Tensor:
    """Where the next token is of another document, or there is none: bool (B, t).

    Args: document_Bt: the document index of each token, at least 0. group: as `roll_tensor`'s.
    Source: Megatron-LM's code, from lengths of documents.
    """
    next_B1 = from_next_rank(document_Bt[:, :1], -1, group)
    rolled_Bt = torch.cat([document_Bt[:, 1:], next_B1], dim=1)
    return document_Bt != rolled_Bt


# By hand, tokens "abcd│ef" as ids 1 2 3 4 │ 5 6:
#
#     is_last           0  0  0  1    0  1
#     rolled by one     2  3  4  5    6  –        the plain roll brings in 5, of the other document
#     with fill 0       2  3  4  0    6  0
#     rolled again      3  4  0  0    0  0        is_last is the same at all depths
#
# One shift by two, masked by is_last once, would leave 5 in the third place: is_last says where the
# next token is missing, so it is applied after each shift by one.
def roll_tensor(x_Bt: Tensor, is_last_Bt: Tensor, fill: int = 0, group: Group = None) -> Tensor:
    """Moves token ids to the left by one inside each document, (B, t); its last place gets `fill`.

    Args: x_Bt: int64, as large on each rank. is_last_Bt: `last_of_documents`. group: the ranks that
        share the sequence, in order; None: it is not sharded. Collective.
    Raises: ValueError on a rank outside the group. Source: Megatron-LM's code.
    """
    next_B1 = from_next_rank(x_Bt[:, :1], fill, group)
    rolled_Bt = torch.cat([x_Bt[:, 1:], next_B1], dim=1)
    return torch.where(is_last_Bt, fill, rolled_Bt)


# ── 1.2 The block ───────────────────────────────────────────────────────────────────────────────
#
# Depth k has two inputs at each position: the embedding of the token that it reads, and what the
# depth before it computed, g^{k−1}. Both are normalised, because their sizes have nothing to do
# with each other, and one matrix brings them to the model's width:
#
#     x^k = W [ norm(embedding of t_{i+k}) ; norm(g^{k−1}) ]        g^0: the trunk's hidden state
#     g^k = final_norm(layers(x^k))       ──►  the output layer of the trunk, and the next depth
#
# Embedding and output layer are the trunk's own. (Megatron-LM has the embedding first in W,
# DeepSeek the hidden state: another order of columns.)
#
# g^0 is the hidden state *after* the trunk's final norm, as each g^k is after its own. The block's
# norm of it undoes the size of a state, not a norm's weights: before and after are unequal inputs.
# While these weights are near 1, as they are early in training, no loss shows which was taken.
#
# Nor does a curve show a block that is given the wrong token. With t_i in place of t_{i+1} the
# block has nothing that the trunk did not have, and depth 1 must guess t_{i+2} two tokens ahead:
# its loss is higher, and stays plausible.
#
# What it costs: Super's block is one layer of attention and one of experts, 2.9 of 124 billion
# parameters and 2 % of those that a token uses. Its output layer is the trunk's, but it is used
# once more for each depth, and with 131,072 vocabulary entries that is the larger part of the cost
# in a small model.
#
# What it brings in training: each hidden state must be of use for the token after next, too. The
# white paper reports 2.4 % on average of seven tests, for a model with 8 billion active parameters.
# (It is no claim about a small model on a short run.)
#
# DeepSeek-V3 has one depth. Super trains two with *one* block, applied twice. Such a block has
# learned to go on from its own output, so it can be applied a third time, and a seventh. With one
# block for each depth, the third has no weights.
# The causal layers inside see earlier positions of the same depth.


class MultiTokenPredictionLayer(nn.Module):
    """One depth: the embedding of the next token and a hidden state to the next hidden state.

    embedded and hidden (B, t, D) to (B, t, D), normalised. Parameters have the published names.

    Args: block: builds a layer from its letter and the config. span: what its layers may look back
        at, section 2.1. Source: DeepSeek-V3, section 2.2; Nemotron 3 Super.
    """

    def __init__(self, config: HybridConfig, block: Callable):
        super().__init__()
        D = config.hidden_size
        self.enorm = RMSNorm(D)
        self.hnorm = RMSNorm(D)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.layers = nn.ModuleList(block(letter, config) for letter in config.mtp_pattern)
        self.final_layernorm = RMSNorm(D)

    def forward(self, embedded: Tensor, hidden: Tensor, span: Span) -> Tensor:
        embedded = self.enorm(embedded)
        hidden = self.hnorm(hidden)
        both = torch.cat([embedded, hidden], dim=-1)
        x = self.eh_proj(both)
        x = run_layers(self.layers, x, span)
        return self.final_layernorm(x)


# ── 1.3 The loss ────────────────────────────────────────────────────────────────────────────────
#
# A depth's loss is a cross entropy of its own: on logits from the shared output layer, with the
# targets of section 1.1. What is left to decide is what each is divided by, and how much it weighs.
#
# Each depth has fewer targets than the one before. Its loss is the mean over its own, and all
# depths together have the weight λ:
#
#     L = mean over trunk's targets  +  λ / depths · Σ_k  mean over depth k's targets
#
# Divided by the trunk's count, a depth would count less the shorter the documents are. And a count
# is that of all ranks: replicas have unequally many targets, and so have parts of a sequence. Each
# rank divides its sum by the global count; such partial sums add up, and so do their gradients.
# (Megatron-LM divides by its local count.)
#
# λ is 0.3 in Super. Divided by the number of depths it is the weight of their mean, so that a third
# depth does not take weight from the trunk.
#
# A depth may have no target at all, in a batch of documents of two tokens. Its sum is 0 and its
# count is 0; without the clamp the loss, and then every weight, would be NaN.
#
# Two ranks, one depth: rank 0 has 3 targets with loss 1, rank 1 has 1 target with loss 5. The mean
# over targets is (3 + 5) / 4 = 2, the mean of the ranks' means 3.


def process_mtp_loss(
    losses: list[Tensor], targets: list[Tensor], scaling_factor: float, group: Group = None
) -> Tensor:
    """The total loss, then the mean loss of the trunk and of each depth: (2 + depths).

    Args:
        losses: of the trunk, then of each depth, per token (B, t), 0 where a target is −100.
        targets: theirs (B, t). scaling_factor: λ.
        group: the ranks that hold other tokens (not tp). Each gets partial sums, at least fp32: add
            them and their gradients over `group` (DDP takes means). None: no such rank. Collective.

    A depth without any target has loss 0. Raises: ValueError where shapes of losses and targets
    differ, and on a rank outside the group. Source: Nemotron 3 Super; Megatron-LM's code.
    """
    if [x.shape for x in losses] != [x.shape for x in targets]:
        raise ValueError(f"{len(losses)} losses: give each its targets, of equal shape")
    counts = torch.stack([(targets_Bt != IGNORED).sum() for targets_Bt in targets])
    if group is not None:
        _all_reduce(counts, group)
    sums = torch.stack([at_least_fp32(loss_Bt).sum() for loss_Bt in losses])
    means = sums / counts.clamp(min=1)
    weight = scaling_factor / max(1, len(losses) - 1)
    total = means[0] + weight * means[1:].sum()
    return torch.cat([total[None], means])


# With `mtp_detach_heads` the depths train their block alone. A gradient could leave it in three
# places, and all three are detached:
#
#     from the loss of a depth      to                     without detaching it
#     the trunk's hidden state      every trunk layer      the trunk is trained for both losses
#     the embedding of t_{i+k}      the embedding table    it moves although the trunk is frozen
#     the output weight             the output layer       the same, and the trunk's logits with it
#
# So the block can be trained on, or anew, after the trunk is finished: Super does so during and
# after reinforcement learning, on the model's own text. Then the trunk's loss is no part of the
# sum, or its parameters are no part of the optimizer. The depths stay connected with each other:
# depth 2 trains what depth 1 hands to it.
#
# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────
#
# ── 2.1 Layers ──────────────────────────────────────────────────────────────────────────────────
#
# Chapter 5's layers, as short as they can be: all heads of a Mamba layer share B and C, the whole
# sequence is one chunk, and attention has a key for each query head. There is no position
# embedding; the Mamba layers are sensitive to order.
#
# In packed documents nothing may pass from one to the next, in the trunk and in the block: the
# recurrence forgets, and convolution and attention are masked. A block without these masks sees
# another document's tokens at its first positions, and the trunk's loss alone is right.
#
# Layers look back at earlier tokens, each in one method: `earlier_inputs` of the convolution,
# `scan` and `attend`. Here these tokens are in x. In decoding they have passed the model before;
# speculate.py overrides the three. A `Span` says what a layer may look back at.


@dataclass(frozen=True)
class Span:
    """What a layer may look back at: earlier tokens of the same document. Source: ours."""

    document_BT: Documents = None  # of the full sequence

    def layer(self, index: int) -> Span:
        """For the layer with this index: here all have the same."""
        return self


class RMSNorm(nn.Module):
    """x / √(mean of x² + 1e-5) · weight, x (..., C) to (..., C), in fp32. Source: chapter 5."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = at_least_fp32(x)
        y = y * (y.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
        return (y * at_least_fp32(self.weight)).to(x.dtype)


# The recurrence of chapter 5: state ← exp(a)·state + X ⊗ B, then y = state · C. For all tokens at
# once it is a masked matrix, y = (L ∘ C Bᵀ) X, and what the state before them contributes. With one
# token it is a step of the recurrence, so no other form is needed here.
def ssd(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence over T > 0 tokens: y (B, T, H, P) and the last state (B, H, P, N).

    Args: X: dt · x, (B, T, H, P). a: dt · A, (B, T, H), at most 0. B, C: (B, T, N), of all heads.
        All are at least fp32. initial_state: None is zeros. Work and memory grow with T².
    Source: Mamba-2, arXiv 2405.21060, section 6; chapter 5 derives it.
    """
    X_BHTP = X.transpose(1, 2)
    B_B1TN = B[:, None]
    C_B1TN = C[:, None]
    sums_BHT1 = a.mT[..., None].to(torch.float64).cumsum(dim=2)
    gaps_BHTT = sums_BHT1 - sums_BHT1.mT
    # −∞ before exp: above the diagonal exp of a gap may be infinite, and its gradient NaN.
    is_past_TT = torch.ones_like(gaps_BHTT[0, 0], dtype=torch.bool).tril()
    L_BHTT = torch.where(is_past_TT, gaps_BHTT, -torch.inf).exp().to(X.dtype)
    scores_B1TT = C_B1TN @ B_B1TN.mT
    y_BHTP = (L_BHTT * scores_B1TT) @ X_BHTP
    left_BHT1 = L_BHTT[:, :, -1:].mT  # of each token's write, after the last token
    state_BHPN = (left_BHT1 * X_BHTP).mT @ B_B1TN
    if initial_state is not None:
        kept_BHT1 = sums_BHT1.exp().to(X.dtype)
        y_BHTP = y_BHTP + kept_BHT1 * (C_B1TN @ initial_state.mT)
        state_BHPN = state_BHPN + kept_BHT1[:, :, -1:] * initial_state
    return y_BHTP.transpose(1, 2), state_BHPN


# One projection makes all that a Mamba layer needs of a token, and one brings the result back:
#
#     x_BTD ──· in_proj ──► z │ x  B  C │ dt
#                           │ └─ conv ─┘  │         a token mixes with the K − 1 before it
#                           │    silu   softplus
#                           │      └─ ssd ─┘        X = dt · x, a = −dt · exp(A_log)
#                       silu(z) ─────·
#                                  norm ─· out_proj ──► y_BTD
#
# A Mamba layer computes in at least fp32 between its two projections, and autocast is off there: a
# state is a sum over thousands of tokens, and bf16 has 8 bits.
class Mamba2Mixer(nn.Module):
    """A Mamba-2 layer without its norm and residual connection, x_BTD to (B, T, D).

    Args of `scan`: X, a, B and C as `ssd`'s. projected: in_proj's output (B, T, sum of sizes).
    span: what the layer may look back at. Source: chapter 5.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        H = config.mamba_heads
        N = config.state_size
        inner = H * config.mamba_head_size
        channels = inner + 2 * N
        self.taps = config.conv_kernel
        self.sizes = [inner, inner, N, N, H]  # z, x, B, C, dt; the convolution is of x, B and C
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, self.taps))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        projected = at_least_fp32(self.in_proj(x_BTD))
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BTC = self.inner(projected, span)
        return self.out_proj(y_BTC.to(x_BTD.dtype))

    def inner(self, projected: Tensor, span: Span) -> Tensor:
        """Convolution, recurrence, gate and norm, to (B, T, H · P)."""
        inner, _, N, _, H = self.sizes
        z_BTC, u_BTC, dt_BTH = projected.split([inner, inner + 2 * N, H], dim=-1)
        v_BTC = F.silu(self.convolve(u_BTC, span))
        x_BTC, B_BTN, C_BTN = v_BTC.split([inner, N, N], dim=-1)
        x_BTHP = x_BTC.unflatten(-1, (H, -1))
        dt_BTH = F.softplus(dt_BTH + self.dt_bias)
        a_BTH = -dt_BTH * self.A_log.exp()
        document_BT = span.document_BT
        if document_BT is not None:  # where a document begins, the state is forgotten
            starts_BT = F.pad(document_BT.diff() != 0, (1, 0))
            a_BTH = a_BTH - 1000.0 * starts_BT[..., None]
        X_BTHP = dt_BTH[..., None] * x_BTHP
        y_BTHP = self.scan(X_BTHP, a_BTH, B_BTN, C_BTN, span)
        y_BTHP = y_BTHP + self.D[:, None] * x_BTHP
        y_BTC = y_BTHP.flatten(2)
        return self.norm(y_BTC * F.silu(z_BTC))

    def convolve(self, u_BTC: Tensor, span: Span) -> Tensor:
        """Each channel's weighted sum of its last K inputs, in its own document: (B, T, C)."""
        T = u_BTC.shape[1]
        earlier_BTC = self.earlier_inputs(u_BTC, span)
        inputs_BTC = torch.cat([earlier_BTC, u_BTC], dim=1)
        document_BT = span.document_BT
        y_BTC = self.conv_bias
        for tap in range(self.taps):
            input_BTC = inputs_BTC[:, tap : tap + T]
            if document_BT is not None:
                gap = self.taps - 1 - tap
                earlier_BT = F.pad(document_BT, (gap, 0))[:, :T]
                is_same_BT = earlier_BT == document_BT
                input_BTC = input_BTC * is_same_BT[..., None]
            y_BTC = torch.addcmul(y_BTC, input_BTC, self.conv_weight[:, tap])
        return y_BTC

    def earlier_inputs(self, u_BTC: Tensor, span: Span) -> Tensor:
        """The K − 1 inputs of the convolution before u_BTC, (B, K − 1, C): here zeros."""
        B, _, C = u_BTC.shape
        return u_BTC.new_zeros(B, self.taps - 1, C)

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: Span) -> Tensor:
        """y of `ssd`, (B, T, H, P): here from a zero state."""
        y_BTHP, _ = ssd(X, a, B, C)
        return y_BTHP


# Attention compares each token with all earlier ones of its document. The mask serves decoding as
# well, where the T queries are the last of S tokens.
class Attention(nn.Module):
    """Causal multi-head attention, x_BTD to (B, T, D). Args: as `Mamba2Mixer`'s."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        inner = config.attention_heads * config.attention_head_size
        self.head_size = config.attention_head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        pattern = "B T (three H P) -> three B H T P"
        qkv_3BHTP = rearrange(self.qkv(x_BTD), pattern, three=3, P=self.head_size)
        y_BHTP = self.attend(qkv_3BHTP[0], qkv_3BHTP[1:], span)
        return self.o_proj(rearrange(y_BHTP, "B H T P -> B T (H P)"))

    def attend(self, q_BHTP: Tensor, kv_2BHSP: Tensor, span: Span) -> Tensor:
        """The heads' outputs (B, H, T, P): T queries see S keys, S ≥ T, here those of x."""
        k_BHSP, v_BHSP = kv_2BHSP
        T = q_BHTP.shape[2]
        S = k_BHSP.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTP.device).tril(S - T)
        if span.document_BT is not None:
            query_BT1 = span.document_BT[:, :, None]
            key_B1T = span.document_BT[:, None]
            mask = mask & (query_BT1 == key_B1T)
            mask = mask[:, None]  # for all heads
        return F.scaled_dot_product_attention(q_BHTP, k_BHSP, v_BHSP, mask)


class SquaredReLUMLP(nn.Module):
    """The feed-forward layer relu(x W1)² W2, x_BTD to (B, T, D)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        y_BTF = self.up_proj(x_BTD).relu()
        return self.down_proj(y_BTF.square())


# A layer that looks back is one of the first two kinds. The third works on each token by itself.
LAYERS = {"M": Mamba2Mixer, "*": Attention, "-": SquaredReLUMLP}


class Block(nn.Module):
    """A layer with its norm and residual connection, x_BTD to (B, T, D).

    Args: letter: of the pattern. layers: what to build for each. span: as `Mamba2Mixer`'s.
    """

    def __init__(self, letter: str, config: HybridConfig, layers: dict[str, Callable] = LAYERS):
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size)
        self.mixer = layers[letter](config)

    def mix(self, x_BTD: Tensor, span: Span) -> Tensor:
        return self.mixer(x_BTD, span)

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        return x_BTD + self.mix(self.norm(x_BTD), span)


def run_layers(layers: nn.ModuleList, x: Tensor, span: Span) -> Tensor:
    """The layers one after the other, x (B, t, D) to (B, t, D)."""
    for index, layer in enumerate(layers):
        x = layer(x, span.layer(index))
    return x


# ── 2.2 The plain model ─────────────────────────────────────────────────────────────────────────
#
# The model has one embedding, one output layer, and one block or one for each depth.
# All depths read the same `span`: a depth has other tokens at a position, but the position, its
# document and what it may look back at stay.
#
# The garbage in the last places of each document (embeddings of the token 0) is computed with all
# else. It reaches nothing: layers look back only, and these places have no target.
#
# The parallel model overrides `embed`, `logits`, `cross_entropy` and `span`, and sets the two
# groups. With none, no tensor is sharded and nothing is communicated.


class HybridLM(nn.Module):
    """The single-device model, a trunk and a block for the depths: tokens_BT to logits_BTV.

    Args: block: builds a layer from its letter and the config.
    Source: Nemotron 3 white paper; Nemotron 3 Super.
    """

    def __init__(self, config: HybridConfig, block: Callable = Block, mesh: Mesh | None = None):
        super().__init__()
        self.config = config
        self.mesh = mesh or Mesh()  # one rank
        V = config.vocab_size
        D = config.hidden_size
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(block(letter, config) for letter in config.pattern)
        self.final_norm = RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        depths = config.mtp_num_layers
        if config.mtp_use_repeated_layer:
            depths = min(1, depths)
        blocks = (MultiTokenPredictionLayer(config, block) for _ in range(depths))
        self.mtp = nn.ModuleList(blocks)
        initialize(self)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, D)."""
        return self.embedding(tokens_BT)

    def logits(self, hidden_BTD: Tensor, detach: bool = False) -> Tensor:
        """(B, T, V). detach: the output weight gets no gradient."""
        weight_VD = self.head.weight
        if detach:
            weight_VD = weight_VD.detach()
        return F.linear(hidden_BTD, weight_VD)

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Per token in nats, (B, T), at least fp32; 0 where the target is −100."""
        logits_BVT = at_least_fp32(logits_BTV).mT
        return F.cross_entropy(logits_BVT, targets_BT, ignore_index=IGNORED, reduction="none")

    def span(self, tokens_BT: Tensor, document_BT: Documents) -> Span:
        """What the layers may look back at."""
        return Span(document_BT)

    def trunk(self, tokens_BT: Tensor, span: Span) -> Tensor:
        """The hidden state after the final norm, (B, T, D)."""
        x_BTD = self.embed(tokens_BT)
        x_BTD = run_layers(self.layers, x_BTD, span)
        return self.final_norm(x_BTD)

    def forward(self, tokens_BT: Tensor, document_BT: Documents = None) -> Tensor:
        span = self.span(tokens_BT, document_BT)
        hidden_BTD = self.trunk(tokens_BT, span)
        return self.logits(hidden_BTD)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, document_BT: Documents = None) -> Tensor:
        """The total loss, then the mean of the trunk and of each depth, (2 + depths).

        Where tokens are sharded, these are partial sums.
        """
        detach = self.config.mtp_detach_heads
        group = self.mesh.cp_group
        documents = document_BT
        if documents is None:
            documents = torch.zeros_like(tokens_BT)
        is_last_BT = last_of_documents(documents, group)
        span = self.span(tokens_BT, document_BT)
        hidden_BTD = self.trunk(tokens_BT, span)
        logits_BTV = self.logits(hidden_BTD)
        losses = [self.cross_entropy(logits_BTV, targets_BT)]
        targets = [targets_BT]
        if detach:
            hidden_BTD = hidden_BTD.detach()
        for depth in range(self.config.mtp_num_layers):
            tokens_BT = roll_tensor(tokens_BT, is_last_BT, 0, group)
            targets_BT = roll_tensor(targets_BT, is_last_BT, IGNORED, group)
            embedded_BTD = self.embed(tokens_BT)
            if detach:
                embedded_BTD = embedded_BTD.detach()
            block = self.mtp[depth % len(self.mtp)]
            hidden_BTD = block(embedded_BTD, hidden_BTD, span)
            logits_BTV = self.logits(hidden_BTD, detach)
            losses.append(self.cross_entropy(logits_BTV, targets_BT))
            targets.append(targets_BT)
        scaling_factor = self.config.mtp_loss_scaling_factor
        return process_mtp_loss(losses, targets, scaling_factor, self.mesh.data_group)


# The initial weights do not depend on the mesh: they are drawn in full on the CPU, in the order of
# the parameters. Matrices that write to the residual stream are not scaled down here, because the
# trunk has a few layers only. On each rank they are drawn in full, and then cut; chapter 2 keeps
# one full tensor at a time.
def initial_value(name: str, p: Tensor, config: HybridConfig, rng: torch.Generator) -> Tensor:
    """The initial value of parameter `name`, as large as p (...), fp32, drawn on the CPU.

    Over the heads −A goes from 1 to 16 and dt from 0.001 to 0.1: some forget within a token, some
    keep for a thousand. Source: Mamba-2; chapter 5 draws them.
    """
    kind = name.split(".")[-1]
    if kind == "A_log":
        return torch.linspace(1, 16, len(p)).log()
    if kind == "dt_bias":
        dt = torch.logspace(-3, -1, len(p))
        return dt.expm1().log()  # softplus of it is dt
    if p.ndim == 1 and kind != "conv_bias":  # D, and the norms' weights
        return torch.ones(p.shape)
    std = config.init_std
    if kind in ("conv_weight", "conv_bias"):
        std = 0.3
    return torch.randn(p.shape, generator=rng) * std


@torch.no_grad()
def initialize(model: HybridLM) -> None:
    """Sets every parameter; a function of the config alone."""
    rng = torch.Generator().manual_seed(model.config.seed)
    for name, p in model.named_parameters():
        value = initial_value(name, p, model.config, rng)
        p.copy_(value)


# ── 2.3 The parallel model ──────────────────────────────────────────────────────────────────────
#
# Multi-token prediction makes the vocabulary expensive: 1 + depths passes through embedding and
# output layer. So these two are sharded, by vocabulary entries as in chapter 2. The other axis is
# the sequence, and the third are replicas:
#
#                           tp rank 0    tp rank 1
#     tokens 0 … T/2 − 1     rank 0       rank 1       ← a tp group: half of the vocabulary each
#     tokens T/2 … T − 1     rank 2       rank 3
#                              ↑ a cp group: half of each sequence
#
# For 131,072 vocabulary entries and 8,192 tokens the logits of one pass take 4.3 GB in fp32, with
# two depths three times that. On tp ranks each holds its part of the columns, and three scalars
# per token are all-reduced in place of gathering logits (chapter 2 derives that loss).
#
# All else is replicated. Rolls, embeddings, norms, feed-forward layers, the block's projection and
# all losses work on this rank's tokens. A layer that looks back gathers the normalised tokens of
# the cp group, computes on all of them, and keeps its own. (That is short, and repeats the layer's
# arithmetic on each rank; chapter 5 passes on states and keys instead, chapter 4 shards heads.)
#
#     a layer that looks back    forward: all-gather    backward: reduce-scatter
#     after a lookup             forward: all-reduce    backward: identity        (chapter 2's g)
#     before the output layer    forward: identity      backward: all-reduce      (chapter 2's f)


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh; Mesh() is a process without process groups."""

    tp: int = 1  # ranks that share the vocabulary
    cp: int = 1  # ranks that share a sequence
    dp: int = 1  # replicas
    tp_rank: int = 0
    cp_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    cp_group: Group = None
    data_group: Group = None  # cp · dp ranks: all tokens


def make_mesh(tp: int, cp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (dp, cp, tp), with neighbours in a tp group. Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where tp · cp does not divide the ranks.
    """
    world = dist.get_world_size()
    if min(tp, cp) < 1 or world % (tp * cp):
        raise ValueError(f"tp={tp} times cp={cp} does not divide the {world} ranks")
    dp = world // (tp * cp)
    ranks = torch.arange(world, device="cpu")
    by_place = ranks.view(dp, cp, tp)
    tp_lists = ranks.view(-1, tp)
    cp_lists = by_place.transpose(1, 2).reshape(-1, cp)
    data_lists = tp_lists.T
    groups = []
    for lists in (tp_lists, cp_lists, data_lists):
        groups.append(make_group(lists.tolist(), device, timeout))
    dp_rank, cp_rank, tp_rank = (by_place == dist.get_rank()).nonzero()[0].tolist()
    return Mesh(tp, cp, dp, tp_rank, cp_rank, dp_rank, *groups)


# One operator, `_Conjugate`, applies a pair of functions, one in forward and one in backward. Swap
# the two of a pair, and you get the other direction. The first pair belongs together because every
# rank has computed on all tokens: the gradient of a token comes from all ranks of the cp group, as
# partial sums, and each rank needs the sum for its own tokens.
class _Conjugate(torch.autograd.Function):
    """op(x, group) in forward, conjugate_op(gradient, group) in backward."""

    @staticmethod
    def forward(ctx, x, group, op, conjugate_op):
        ctx.group = group
        ctx.op = conjugate_op
        return op(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.op(grad, ctx.group), None, None, None


def _identity(x: Tensor, group: Group) -> Tensor:
    return x


def _sum(partial_x: Tensor, group: Group) -> Tensor:
    x = partial_x.clone(memory_format=torch.contiguous_format)
    return _all_reduce(x, group)


def _all_gather_tokens(x_BtD: Tensor, group: Group) -> Tensor:
    x_BtD = x_BtD.contiguous()
    parts = [torch.empty_like(x_BtD) for _ in range(group_size(group))]
    dist.all_gather(parts, x_BtD, group)
    return torch.cat(parts, dim=1)


def _reduce_scatter_tokens(partial_x_BTD: Tensor, group: Group) -> Tensor:
    parts = partial_x_BTD.chunk(group_size(group), dim=1)
    parts = [part.contiguous() for part in parts]
    total_BtD = torch.empty_like(parts[0])
    dist.reduce_scatter(total_BtD, parts, group=group)
    return total_BtD


class ParallelBlock(Block):
    """`Block` on this rank's tokens, x_BtD to (B, t, D). Args: as `Block`'s, and the mesh."""

    def __init__(self, letter: str, config: HybridConfig, mesh: Mesh):
        super().__init__(letter, config)
        self.mesh = mesh

    def mix(self, x_BtD: Tensor, span: Span) -> Tensor:
        if self.mesh.cp == 1 or self.letter == "-":
            return super().mix(x_BtD, span)
        pair = (_all_gather_tokens, _reduce_scatter_tokens)
        x_BTD = _Conjugate.apply(x_BtD, self.mesh.cp_group, *pair)
        y_BTD = super().mix(x_BTD, span)
        parts = y_BTD.chunk(self.mesh.cp, dim=1)
        return parts[self.mesh.cp_rank]


class ParallelHybridLM(HybridLM):
    """`HybridLM` on a mesh: this rank's tokens_bt to logits_btv; `loss` has partial sums.

    Its weights are those of HybridLM(config), for every mesh. Where process groups exist, it comes
    from `make_mesh`. Raises: ValueError for a token id outside the vocabulary (on a GPU: NaN).
    Source: Megatron-LM (Shoeybi et al., 2019) for the vocabulary; for the sequence ours.
    """

    def __init__(self, config: HybridConfig, mesh: Mesh = Mesh()):
        super().__init__(config, partial(ParallelBlock, mesh=mesh), mesh)
        for module in (self.embedding, self.head):
            full_VD = module.weight.detach()
            shard_vD = shard_vocabulary(full_VD, mesh.tp_rank, mesh.tp)
            module.weight = nn.Parameter(shard_vD)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        group = self.mesh.tp_group
        weight_vD = self.embedding.weight
        row_BT, is_local_BT = _local_rows(tokens_BT, len(weight_vD), group)
        found_BTD = F.embedding(row_BT, weight_vD)
        partial_x_BTD = torch.where(is_local_BT[..., None], found_BTD, 0)
        x_BTD = _Conjugate.apply(partial_x_BTD, group, _sum, _identity)
        is_id_BT = _is_id(tokens_BT, self.config.vocab_size)
        return torch.where(is_id_BT[..., None], x_BTD, torch.nan)

    def logits(self, hidden_BTD: Tensor, detach: bool = False) -> Tensor:
        entered_BTD = _Conjugate.apply(hidden_BTD, self.mesh.tp_group, _identity, _sum)
        return super().logits(entered_BTD, detach)

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        V = self.config.vocab_size
        group = self.mesh.tp_group
        loss_BT = _VocabParallelCrossEntropy.apply(logits_BTV, targets_BT, V, group)
        loss_BT = torch.where(targets_BT != IGNORED, loss_BT, 0)
        is_id_BT = _is_id(targets_BT, V, IGNORED)
        return torch.where(is_id_BT, loss_BT, torch.nan)

    def span(self, tokens_BT: Tensor, document_BT: Documents) -> Span:
        if document_BT is not None and self.mesh.cp > 1:
            document_BT = _all_gather_tokens(document_BT, self.mesh.cp_group)
        return Span(document_BT)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────
#
# Embedding and output layer are sharded by rows, padded to a multiple of tp. All else is
# replicated. A checkpoint has full tensors without padding, so the mesh may change. The block is
# saved with the trunk: published checkpoints have it as `mtp.layers`, one for all depths, and a
# loader that does not know it must leave it out by name.

VOCABULARY = ("embedding.weight", "head.weight")


def shard_vocabulary(full_VD: Tensor, rank: int, tp: int) -> Tensor:
    """Rank `rank`'s rows (v, D), the last ones padding; a copy."""
    V = len(full_VD)
    padding = padded_vocab_size(V, tp) - V
    padded_VD = F.pad(full_VD, (0, 0, 0, padding))
    return padded_VD.chunk(tp)[rank].clone()


def shard_state_dict(full: StateDict, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of tensor-parallel rank `rank`; copies."""
    shards = {}
    for name, x in full.items():
        shards[name] = x.clone()
        if name in VOCABULARY:
            shards[name] = shard_vocabulary(x, rank, tp)
    return shards


def merge_state_dicts(shards: list[StateDict], vocab_size: int) -> StateDict:
    """All tp ranks' state dicts, in order of rank, to the plain model's; gradients work as well.

    Raises: ValueError where replicated tensors differ between ranks.
    """
    full = {}
    for name, first in shards[0].items():
        tensors = [shard[name] for shard in shards]
        if name in VOCABULARY:
            full[name] = torch.cat(tensors)[:vocab_size].clone()
            continue
        full[name] = first.clone()
        for rank, x in enumerate(tensors):
            if not torch.allclose(x, first, 0, 0, equal_nan=True):
                raise ValueError(f"{name} should be replicated, but rank {rank}'s differs")
    return full


def gather_state_dict(tensors: StateDict, vocab_size: int, group: Group = None) -> StateDict:
    """Every tp rank's shards (by parameter name) to full tensors, on the CPU of every rank.

    Collective over `group`, the tp group. Raises: what `merge_state_dicts` does.
    """
    mine = {name: x.detach().cpu() for name, x in tensors.items()}
    shards = [mine] * group_size(group)
    if len(shards) > 1:
        dist.all_gather_object(shards, mine, group)
    return merge_state_dicts(shards, vocab_size)


# ── 4 Training ──────────────────────────────────────────────────────────────────────────────────
#
# Shards of the vocabulary have complete gradients, and so have replicated parameters within a tp
# group: f sums the gradient of each hidden state that enters the output layer. Over the
# cp · dp ranks of the data group every gradient is a partial sum, because each loss was divided by
# the global count.
#
# The hidden state of a depth has two users, the output layer and the next depth. Autograd adds the
# two gradients; over tp only the first is a partial sum, and f stands on that branch alone. An
# all-reduce of the sum would count the other branch tp times.
#
# A parameter that is shared by all depths gets its gradient from each, once. (In a model with
# experts the balancing loss of a shared block is divided by the number of depths, too.)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1) -> AdamW:
    """AdamW that decays matrices; not A_log, dt_bias and D, for which 0 is no neutral value."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay)


# The order of a step: the rolls and the counts are messages of forward, the output layer's f is one
# of backward, and then come the sums of gradients, the norm over tp, and the optimizer.
#
# Each rank takes its part of a global batch. (A loader for long sequences would read that part
# alone; what follows never looks at another rank's tokens.)
def local_part(batch: Batch, mesh: Mesh) -> list[Tensor]:
    """This rank's rows and tokens of each tensor (B, T), (b, t).

    Raises: ValueError where rows do not divide over dp, or tokens over cp, before anything is sent.
    """
    B, T = batch[0].shape
    if B % mesh.dp or T % mesh.cp:
        raise ValueError(f"{B} × {T} tokens do not divide over dp={mesh.dp} and cp={mesh.cp}")
    parts = []
    for x_BT in batch:
        x_bT = x_BT.chunk(mesh.dp)[mesh.dp_rank]
        parts.append(x_bT.chunk(mesh.cp, dim=1)[mesh.cp_rank])
    return parts


def sum_gradients(parameters: Parameters, group: Group) -> None:
    """All-reduces the gradient of each parameter over `group`. (Chapter 2: one buffer.)"""
    for p in parameters:
        if p.grad is not None:
            p.grad = _all_reduce(p.grad.contiguous(), group)


def train(
    model: HybridLM,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    max_norm: float = 1.0,
    autocast: Autocast = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains the model, on its mesh or alone; yields the losses of `HybridLM.loss`, of all ranks,
    and the norm before clipping, a scalar.

    Every rank of a mesh must iterate it, with the same global batches. Raises: as `local_part`, and
    ValueError for an id outside the vocabulary, on every rank (on a GPU: NaN).
    """
    mesh = model.mesh
    device = model.head.weight.device.type
    sharded = [model.embedding.weight, model.head.weight] if mesh.tp > 1 else []
    for batch in batches:
        _is_id(batch[0], model.config.vocab_size)  # of all ranks: none raises alone
        _is_id(batch[1], model.config.vocab_size, IGNORED)
        optimizer.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            losses = model.loss(*local_part(batch, mesh))
        losses[0].backward()
        losses = losses.detach()
        if mesh.data_group is not None:
            sum_gradients(model.parameters(), mesh.data_group)
            losses = _all_reduce(losses.clone(), mesh.data_group)
        norm = clip_grad_norm_(model.parameters(), max_norm, sharded=sharded, group=mesh.tp_group)
        optimizer.step()
        yield losses, norm


# ── What remains ────────────────────────────────────────────────────────────────────────────────
#
# The depths are trained, and nothing has used them: speculate.py does. There the hidden states of
# one pass of the trunk are the input of the block, as they are here.
#
# Drafts are wasted where many sequences decode at once, because the pass is then no longer limited
# by reading weights. Each Mamba layer's states take memory, one for each draft and one more. And
# fewer drafts pass when the trunk is trained on without the block: after reinforcement learning
# Super trains the block again, alone, on the model's own text (`mtp_detach_heads`).

# ── 5 The demonstration ─────────────────────────────────────────────────────────────────────────

# fp64 is the proof; fp32 and bf16 show what rounding does to right code.
# The proof trains a small odd model for five steps on every layout of the ranks and on a single
# device. It compares each tensor: losses of all depths, gradients after the first step, the norm
# before clipping of each step, weights at the end. The model has what breaks wrong code: documents
# that end inside a rank's part, targets that do not count and are unequally many, a vocabulary that
# does not divide, a Mamba layer in the block.
BOUNDS = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 1e-1}


def layouts_of(ranks: int) -> list[tuple[int, int]]:
    """Every (tp, cp) whose product divides `ranks`."""
    pairs = itertools.product(range(1, ranks + 1), repeat=2)
    return [pair for pair in pairs if ranks % math.prod(pair) == 0]


def check_case(ranks: int, device: torch.device) -> tuple[HybridConfig, Batch]:
    """A small odd model and a batch, with what breaks wrong code."""
    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "state_size": 6}
    sizes |= {"mamba_heads": 2, "mamba_head_size": 4}
    sizes |= {"attention_heads": 2, "attention_head_size": 4}
    config = HybridConfig(61, pattern="M*-M", mtp_pattern="M*-", init_std=0.1, **sizes)
    rng = torch.Generator().manual_seed(1)
    B = 2 * ranks
    T = 6 * ranks
    tokens_BT, targets_BT = torch.randint(61, (2, B, T), generator=rng).to(device)
    targets_BT[0, :3] = IGNORED
    targets_BT[-1, -2:] = IGNORED
    document_BT = torch.zeros_like(tokens_BT)
    document_BT[::2, T // 2 - 1 :] = 1
    return config, (tokens_BT, targets_BT, document_BT)


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Five AdamW steps of a small model on this mesh and on a single device: name to error."""
    config, batch = check_case(group_size(), device)
    plain = HybridLM(config).to(device, dtype)
    parallel = ParallelHybridLM(config, mesh).to(device, dtype)
    lr = 1e-3
    batches = [batch] * 5
    optimizer = make_optimizer(plain, lr)
    alone = train(plain, optimizer, batches, 0.1, autocast)
    optimizer = make_optimizer(parallel, lr)
    steps = train(parallel, optimizer, batches, 0.1, autocast)
    place = f"tp {mesh.tp} cp {mesh.cp}"
    errors = {}
    # The ranks' step comes first: where it raises, no rank waits for another.
    for step, (here, there) in enumerate(zip(steps, alone)):
        losses, norm = here
        losses_alone, norm_alone = there
        gaps = losses / losses_alone - 1
        errors[f"loss {step}, {place}"] = gaps.abs().max().item()
        gap = norm / norm_alone - 1
        errors[f"norm before clipping {step}, {place}"] = gap.abs().item()
        if step == 0:
            grads = {name: p.grad for name, p in parallel.named_parameters()}
            full = gather_state_dict(grads, config.vocab_size, mesh.tp_group)
            reference = {name: p.grad for name, p in plain.named_parameters()}
            errors |= relative_errors(f"gradient, {place},", full, reference)
    if dtype == torch.float64:
        weights = parallel.state_dict()
        full = gather_state_dict(weights, config.vocab_size, mesh.tp_group)
        kind = f"weight after AdamW, {place},"
        errors |= relative_errors(kind, full, plain.state_dict(), 5 * lr)
    return over_all_ranks(errors)


def check(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """`equivalence` on every layout of the ranks."""
    errors = {}
    for layout in layouts_of(group_size()):
        mesh = make_mesh(*layout, device, args.timeout)
        errors |= equivalence(mesh, device, dtype, autocast)
    return errors


# The text is read as bytes, one token each: no tokenizer, and V is 256.
def read_text(path: str, window: int) -> tuple[Tensor, Tensor]:
    """The bytes of a text, a token each: nine tenths to train on, one to evaluate on.

    Args: path: "" is Python's own sources. Raises: OSError; ValueError for an unusable file, or a
        tenth that is not longer than `window` tokens.
    """
    paths = [Path(path)]
    if not path:
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(folder.glob("*.py"))[:40]
    if not paths[0].is_file():
        raise ValueError(f"{path}: No such file, or not a regular one, which every rank reads")
    text = b"".join(path.read_bytes() for path in paths)
    cut = len(text) * 9 // 10
    if len(text) - cut <= window:
        need = f"a tenth of it must be longer than {window}"
        raise ValueError(f"{path} has {len(text)} bytes: {need}")
    tokens = torch.tensor(list(text))
    return tokens[:cut], tokens[cut:]


def text_batches(args: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Windows of the first nine tenths; a batch is a function of seed and step."""
    length = args.seq_length + 1
    tokens, _ = read_text(args.data, length)
    windows = tokens.unfold(0, length, 1)
    for step in range(args.steps):
        rng = torch.Generator().manual_seed(1000 * args.seed + step)
        start_B = torch.randint(len(windows), (args.batch,), generator=rng)
        window_BT = windows[start_B].to(device)
        yield window_BT[:, :-1], window_BT[:, 1:]


# The learning rate falls as a cosine. Total loss and norm are read once a step, together; the other
# losses stay on the device until they are printed. What is printed is the mean over all targets of
# a depth, of all ranks. A depth's loss can be lower than that of the depth before it: it has read
# one true token more, while the trunk's state stays as old as it is.
def demonstrate(
    args: argparse.Namespace, mesh: Mesh, device: torch.device
) -> tuple[ParallelHybridLM, list[float]]:
    """Trains on this mesh, and prints losses; returns the model and the mean of the last 20."""
    dtype, autocast = dtypes(args)
    config = config_from(args, HybridConfig, seed=args.seed)
    model = ParallelHybridLM(config, mesh).to(device, dtype)
    say("step     total     trunk   depth 1, 2 …   norm")
    optimizer = make_optimizer(model, args.lr)
    schedule = CosineAnnealingLR(optimizer, args.steps + 1)
    found = []
    batches = text_batches(args, device)
    steps = train(model, optimizer, batches, autocast=autocast)
    for step, (losses, norm) in enumerate(steps):
        found.append(losses)
        total, norm = read_step(step, losses[0], norm)
        schedule.step()
        if step < 5 or step % 20 == 19:
            values = losses[1:].tolist()
            means = "".join(f"{loss:10.4f}" for loss in values)
            say(f"{step:4}{total:10.4f}{means}{norm:7.3f}")
    say()
    last = torch.stack(found[-20:])
    return model, last.mean(dim=0).tolist()


def measure(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    claims = []
    errors = check(args, device, torch.float64)
    bound = BOUNDS["fp64"]
    for kind in ("loss", "gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"every {kind} equals the single device's, all layouts, float64"
        here = f"worst {error:.1e} relative"
        claims.append((claim, "exact", here, error <= bound))
    mesh = make_mesh(args.tp, args.cp, device, args.timeout)
    _, means = demonstrate(args, mesh, device)
    here = ", ".join(f"{loss:.2f}" for loss in means[1:])
    claim = "loss of the trunk and of each depth, last 20 steps"
    claims.append((claim, "–", here, "a small model, a short run"))
    return claims


def main(args: argparse.Namespace, device: torch.device) -> None:
    layout = f": tp {args.tp} × cp {args.cp}"
    say_setting(args, layout)
    if args.check:
        precision = dtypes(args)
        errors = check(args, device, *precision)
        bound = BOUNDS[args.dtype]
        good = print_errors(errors, bound)
    else:
        good = print_claims(measure(args, device))
    if not good:
        sys.exit(1)


@dataclass
class Options:  # the chapter's own flags
    tp: int = flag(1, "ranks that share the vocabulary", least=1)
    cp: int = flag(1, "ranks that share a sequence", least=1)
    seq_length: int = flag(128, "tokens of a sequence, T", least=1)
    batch: int | None = flag(None, "sequences per step; None: 16 or a few more", least=1)
    lr: float = flag(3e-3, "learning rate", least=1e-9)
    data: str = flag("", "a text; by default Python's own sources", metavar="FILE")


def check_args(args: argparse.Namespace) -> None:
    """Replaces every None. Raises ValueError or OSError where flags, ranks and text do not fit."""
    config_from(args, HybridConfig)  # for what it raises
    world = args.world_size
    shared = args.tp * args.cp
    if world % shared:
        layout = f"--tp {args.tp} times --cp {args.cp}"
        raise ValueError(f"{layout} does not divide the {world} ranks")
    dp = world // shared
    args.batch = args.batch or math.ceil(16 / dp) * dp
    if args.batch % dp or args.seq_length % args.cp:
        sizes = f"--batch {args.batch}, --seq-length {args.seq_length}"
        raise ValueError(f"{sizes}: they must be multiples of {dp} and of --cp {args.cp}")
    read_text(args.data, args.seq_length + 1)


def flags() -> argparse.Namespace:
    return parse_flags(__doc__, [Options, HybridConfig], check_args, ranks=2, steps=120)


# ── Carried blocks ──────────────────────────────────────────────────────────────────────────────


# region carried: vocabulary shards (home: 02_megatron_tp)
def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """vocab_size rounded up to a multiple of multiple · tp. Source: the paper, section 5.1."""
    return math.ceil(vocab_size / (multiple * tp)) * multiple * tp


def _local_rows(ids_BS: Tensor, v: int, group: Group) -> tuple[Tensor, Tensor]:
    """Rows of token ids in this rank's shard, and which ids are local."""
    row_BS = ids_BS - group_rank(group) * v
    return row_BS.clamp(0, v - 1), (row_BS >= 0) & (row_BS < v)


def _is_id(ids_BS: Tensor, vocab_size: int, ignore_index: int | None = None) -> Tensor:
    """Which ids are in range. Others are local to no rank, and would silently become zeros.

    On the CPU they raise ValueError. On a GPU that would stall the CPU: the caller puts NaN.
    """
    is_id_BS = (ids_BS >= 0) & (ids_BS < vocab_size)
    if ignore_index is not None:
        is_id_BS |= ids_BS == ignore_index
    if _has_values(ids_BS) and not is_id_BS.all():
        allowed = "" if ignore_index is None else f", and not ignore_index={ignore_index}"
        raise ValueError(f"token id {ids_BS[~is_id_BS][0]} is not in [0, {vocab_size}){allowed}")
    return is_id_BS


# endregion copy 6bca7f
# region carried: vocabulary loss (home: 02_megatron_tp)
class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BSv, targets_BS, vocab_size, group):
        v = logits_BSv.shape[-1]
        x_BSv = logits_BSv.to(torch.promote_types(logits_BSv.dtype, torch.float32), copy=True)
        x_BSv[..., max(0, vocab_size - group_rank(group) * v) :] = -torch.inf  # padding
        max_BS = _all_reduce(x_BSv.amax(dim=-1), group, dist.ReduceOp.MAX)
        x_BSv -= max_BS[..., None]
        # A target on another rank contributes 0. torch.where, and not x · mask:
        # 0 · (−inf) is NaN.
        row_BS, is_local_BS = _local_rows(targets_BS, v, group)
        row_BS1 = row_BS[..., None]
        partial_logit_BS = torch.where(is_local_BS, x_BSv.gather(-1, row_BS1)[..., 0], 0)
        exp_BSv = x_BSv.exp_()
        partial_2BS = torch.stack([partial_logit_BS, exp_BSv.sum(dim=-1)])
        logit_BS, sum_BS = _all_reduce(partial_2BS, group)
        if ctx.needs_input_grad[0]:
            softmax_BSv = exp_BSv.div_(sum_BS[..., None])
            ctx.save_for_backward(softmax_BSv, row_BS1, is_local_BS)
        return sum_BS.log() - logit_BS

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BS):
        softmax_BSv, row_BS1, is_local_BS = ctx.saved_tensors
        grad_BSv = softmax_BSv * grad_BS[..., None]
        grad_BSv.scatter_add_(-1, row_BS1, -(grad_BS * is_local_BS)[..., None])
        return grad_BSv, None, None, None


# endregion copy c5b7c6
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
