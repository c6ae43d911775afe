# SPDX-License-Identifier: MIT-0
"""Chapter 9, second half. Speculative decoding of a hybrid: drafts, one pass to verify, rollback.

Papers: Fast Inference from Transformers via Speculative Decoding, Leviathan et al., 2023,
        arXiv 2211.17192;
        Nemotron 3 Super, NVIDIA, 2026, arXiv 2604.12374

The problem. Decoding computes one token per pass, and the pass is limited by reading the weights.
A pass over eight tokens costs nearly the same, but seven of the eight are not known yet.

The idea. The block of mtp.py drafts the next tokens. One pass of the trunk computes at each of them
its own law, a probability distribution of the next token. The drafts are accepted up to one, and
the rule of section 1 gives the text exactly the law that the trunk alone gives it:

    trunk        t₀ t₁ t₂ t₃ ──► h₀ h₁ h₂ h₃ ──► t₄          one token for one pass
    block        embedding of t₄, h₃  ──► g¹ ──► t₅?         a draft
                 embedding of t₅?, g¹ ──► g² ──► t₆?         a draft: the block goes on by itself
    trunk        t₄ t₅? t₆? in one pass ──► accepts t₅, draws another t₆
    every cache  … t₄ t₅                    goes back to the last accepted token

Run it (no flag is needed; --help lists them):

    python 09_mtp/speculate.py                 2 local ranks: trains mtp.py's model, then writes
    python 09_mtp/speculate.py --steps 400     a better model; more drafts are accepted
    python 09_mtp/speculate.py --ranks 1       one process, for a debugger
    python 09_mtp/speculate.py --check         the law and the rollback alone, in float64

It proves the law by enumeration and the rollback against a fresh cache, trains, writes with and
without drafts on all ranks, and prints the claims that it measured.

Left out: batches (rows accept unequal numbers of drafts); trees of drafts; a sharded vocabulary in
decoding.
"""

# The suffixes of tensors are those of mtp.py, section 0. n is the number of drafts of a pass, N one
# more (after P it is the size of a state), M the number of pairs of a grid. g¹ is what the block
# makes of the trunk's h, g² what it makes of g¹. A token with a question mark is a draft.

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import mtp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mtp import Attention, Block, HybridConfig, HybridLM, Mamba2Mixer, Span, _has_values, flag, ssd
from torch import Tensor, nn

# ── 1 Speculative sampling ────────────────────────────────────────────────────────────────────
#
# A draft x was drawn from the block's law q. One pass of the model says what its own law p was at
# that place. Accept x with probability min(1, p(x)/q(x)). Otherwise draw from what p has and q has
# not, the residual max(0, p − q), divided by its sum:
#
#     token             a      b      c
#     p                1/2    1/4    1/4
#     q                1/4    1/4    1/2
#     accepted, of q   1/4    1/4    1/4       min(p, q): half of the drafts c are rejected
#     residual         1/4     0      0        so each rejection becomes an a
#     together         1/2    1/4    1/4       p
#
# For every token: min(p, q) + max(0, p − q) = p. The law is right whatever q is: a bad block costs
# speed, never quality. A draft passes with probability Σ min(p, q) = 1 − TV(p, q), where TV, the
# total variation distance, is ½ Σ |p − q|. After n drafts that all pass, the same pass of the trunk
# has one law more, and a token is drawn from it.
#
# Greedy decoding is the limit of temperature 0. Both laws are then 1 at their best token, and a
# draft passes where they agree.
#
# What breaks the law is silent, because the text still looks right:
#
# · q in the ratio is not the law that the draft was drawn from (another temperature, the best token
#   in place of a draw, a softmax in other precision).
# · After a rejection the token is drawn from p itself: tokens that q likes are too frequent.
# · The same uniform for the test and for the draw after it: the draw is not free anymore.
#
# (To accept where the draft equals a sample of p, and to keep that sample, has the right law, but
# passes with Σ p·q only: in the table above 5/16 and not 3/4.)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens at `uniforms` (...) of cumulated probs (..., V), which may have any positive sum.

    Cumulated in float64: in fp32 rounding hides unlikely tokens of a large vocabulary.
    A token of probability 0 is never drawn. Source: inversion of the distribution function.
    """
    cumulated = probs.to(torch.float64).cumsum(dim=-1)
    total = cumulated[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u · total may be rounded up to total
    threshold = uniforms[..., None] * total
    threshold = torch.minimum(threshold, below)
    tokens = torch.searchsorted(cumulated, threshold, right=True)
    return tokens[..., 0]


def speculative_sample(
    target_probs: Tensor, draft_probs: Tensor, drafts: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """How many of n ≥ 0 drafts are accepted, and the token after them: two int64 scalars.

    Pure: the outcome is a function of the arguments, and the law of the tokens is the target's.

    Args:
        target_probs: (n + 1, V), the model's laws at the drafts' places and at the next one.
        draft_probs: (n, V), the laws that the drafts were drawn from. drafts: (n), int64.
        uniforms: (n + 1), independent, in [0, 1): one for each test and one for the draw.

    Raises: ValueError where shapes disagree, or floats are not fp32 or float64. On a CPU also for a
        draft that its own law excludes, and for laws that do not sum to 1; on a GPU those pass.
    Source: Leviathan et al., 2023, algorithm 1.
    """
    n = len(drafts)
    V = target_probs.shape[-1]
    shapes = [tuple(x.shape) for x in (target_probs, draft_probs, drafts, uniforms)]
    if shapes != [(n + 1, V), (n, V), (n,), (n + 1,)]:
        raise ValueError(f"shapes {shapes}: they must be (n + 1, V), (n, V), (n), (n + 1)")
    for x in (target_probs, draft_probs, uniforms):  # bf16 would round each law to another one
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{x.dtype}: upcast logits before the softmax, to fp32 or float64")
    drafts_n1 = drafts[:, None]
    p_n1 = target_probs[:n].gather(1, drafts_n1)
    q_n1 = draft_probs.gather(1, drafts_n1)
    if _has_values(q_n1) and not (q_n1 > 0).all():
        raise ValueError(f"a draft of {drafts.tolist()} has probability 0 in draft_probs")
    for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
        sum_N = probs.sum(dim=-1)
        if _has_values(sum_N) and not ((sum_N - 1).abs() < 1e-3).all():
            raise ValueError(f"{name} sum to {sum_N.tolist()}: they must be probabilities")
    u_n1 = uniforms[:n, None]
    passes_n1 = u_n1 * q_n1 < p_n1
    accepted = passes_n1.long().cumprod(dim=0).sum()
    # After the last draft there is no q: with zeros the residual is p itself.
    q_NV = F.pad(draft_probs, (0, 0, 0, 1))
    row_1 = accepted[None]  # a read of its value would stall a GPU
    p_1V = target_probs.index_select(0, row_1)
    q_1V = q_NV.index_select(0, row_1)
    residual_1V = (p_1V - q_1V).clamp(min=0)
    # Where p = q up to rounding, the residual can be 0 everywhere.
    residual_1V = torch.where(residual_1V.sum() > 0, residual_1V, p_1V)
    token_1 = draw(residual_1V, uniforms[n:])
    return accepted, token_1[0]


# With drafts that pass independently with probability a, a pass of n drafts gives
#
#     1 + a + a² + … + a^n = (1 − a^{n+1}) / (1 − a)     tokens:  3.06 for a = 0.7, n = 6
#
# ── 2 Going back ──────────────────────────────────────────────────────────────────────────────
#
# The verifying pass has put all drafts into the caches, and the rejected ones must leave them. For
# attention that is easy: keys and values of a token stand at a place of their own, and the last
# ones are cut off. A Mamba layer has one state, into which every token has been summed, and no
# token can be taken out of a sum. So the pass keeps the state after each draft:
#
#     window      t₄    t₅?    t₆?    t₇?
#     states         s₄     s₅     s₆     s₇      keep(1): s₅ is the state now
#     conv        … u₂ u₃ u₄ u₅ u₆ u₇             keep(1): the last K − 1 inputs up to u₅
#     keys        k₀ … k₄ k₅ k₆ k₇                keep(1): k₀ … k₅
#
# A state is P · N values per head. Super has 128 heads of 64 · 128 in each of 40 Mamba layers: with
# 7 drafts 8 states, 1.3 GB per sequence in fp32, for any length of the text.
#
# Leave it out for one kind of cache and the text still reads well. The model continues as if it had
# written a token that it rejected, and the text is not that of plain decoding anymore.


@dataclass
class LayerState:
    """What decoding keeps of earlier tokens in one layer; each kind of layer fills its own fields.

    Source: ours.
    """

    conv_BTC: Tensor | None = None  # the last K − 1 inputs before the drafts, then the drafts'
    ssm: list[Tensor] = field(default_factory=list)  # the state before the drafts, after each
    kv_2BHSP: Tensor | None = None  # keys and values of all tokens

    def keep(self, n: int, drafts: int) -> None:
        """Keeps `n` of the last `drafts` tokens."""
        dropped = drafts - n
        if self.ssm:
            self.ssm = [self.ssm[n]]
            last = self.conv_BTC.shape[1] - dropped
            self.conv_BTC = self.conv_BTC[:, n:last]
        if self.kv_2BHSP is not None:
            last = self.kv_2BHSP.shape[3] - dropped
            self.kv_2BHSP = self.kv_2BHSP[..., :last, :]


@dataclass
class Cache:
    """The states of several layers, and how many tokens have passed them. Source: ours."""

    layers: list[LayerState]
    tokens: int = 0  # that have passed, drafts too
    drafts: int = 0  # the last of them, which `keep` has not decided on yet

    def admit(self, tokens: int, drafts: int) -> DecodingSpan:
        """Counts a pass of `tokens` tokens, the last `drafts` of them not certain, and returns what
        its layers may look back at.

        Raises: ValueError for a certain token after one that is not, and changes nothing.
        """
        certain = tokens - drafts
        if certain < 0 or drafts < 0 or (certain and self.drafts):
            found = f"{certain} certain tokens and {drafts} drafts, after {self.drafts}"
            raise ValueError(f"{found} drafts: call keep() first")
        self.tokens += tokens
        self.drafts += drafts
        return DecodingSpan(states=self.layers, drafts=drafts)

    def keep(self, n: int) -> None:
        """Keeps `n` drafts, and rolls every layer back to the last of them.

        Afterwards the cache is what a pass without the other drafts would have left.
        Raises: ValueError where there are fewer drafts.
        """
        if not 0 <= n <= self.drafts:
            raise ValueError(f"keep({n}), but {self.drafts} drafts have passed since the last one")
        for state in self.layers:
            state.keep(n, self.drafts)
        self.tokens -= self.drafts - n
        self.drafts = 0


def new_cache(layers: Iterable[nn.Module]) -> Cache:
    """An empty cache for these layers. Source: ours."""
    return Cache([LayerState() for _ in layers])


@dataclass(frozen=True)
class DecodingSpan(Span):
    """A `Span` of tokens that others came before."""

    states: list[LayerState] = field(default_factory=list)  # of all layers, which update them
    drafts: int = 0  # how many of the new tokens, the last ones, may be dropped
    index: int = 0  # of the layer

    def layer(self, index: int) -> DecodingSpan:
        return replace(self, index=index)

    @property
    def state(self) -> LayerState:
        return self.states[self.index]


# Two layers of mtp.py look back, and each goes on from its state. The certain tokens of a pass are
# one call of `ssd`, and each draft is a step of the recurrence, because its state is kept.


class DecodingMixer(Mamba2Mixer):
    """A Mamba-2 layer that goes on from `span.state`. Args of scan: as `ssd`'s. Source: ours."""

    def earlier_inputs(self, u_BTC: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        earlier_BTC = state.conv_BTC
        if earlier_BTC is None:
            earlier_BTC = super().earlier_inputs(u_BTC, span)
        inputs_BTC = torch.cat([earlier_BTC, u_BTC], dim=1)
        kept = earlier_BTC.shape[1] + span.drafts
        dropped = inputs_BTC.shape[1] - kept
        state.conv_BTC = inputs_BTC[:, dropped:]
        return earlier_BTC[:, 1 - self.taps :]

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        if not state.ssm:
            _, _, H, P = X.shape
            state.ssm = [X.new_zeros(len(X), H, P, B.shape[2])]
        drafts = span.drafts
        certain = X.shape[1] - drafts
        lengths = [1] * drafts
        if certain:
            lengths = [certain, *lengths]
        pieces = [x.split(lengths, dim=1) for x in (X, a, B, C)]
        outputs = []
        for piece in zip(*pieces):
            before_BHPN = state.ssm[-1]
            y_BTHP, after_BHPN = ssd(*piece, before_BHPN)
            if len(outputs) < len(lengths) - drafts:  # of certain tokens no state is kept
                state.ssm = []
            state.ssm.append(after_BHPN)
            outputs.append(y_BTHP)
        return torch.cat(outputs, dim=1)


class DecodingAttention(Attention):
    """An attention layer that sees the keys and values in `span.state`, and adds its own."""

    def attend(self, q_BHTP: Tensor, kv_2BHSP: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        if state.kv_2BHSP is not None:
            kv_2BHSP = torch.cat([state.kv_2BHSP, kv_2BHSP], dim=3)
        state.kv_2BHSP = kv_2BHSP
        return super().attend(q_BHTP, kv_2BHSP, span)


DECODING = mtp.LAYERS | {"M": DecodingMixer, "*": DecodingAttention}


class Decoder(HybridLM):
    """`HybridLM` whose layers go on after the tokens of a cache; its weights are the same.

    `trunk` and `mtp` are called with `Cache.admit`'s span. Source: ours.
    """

    def __init__(self, config: HybridConfig):
        super().__init__(config, partial(Block, layers=DECODING))


# ── 3 Generation ──────────────────────────────────────────────────────────────────────────────
#
# A pass of the trunk has a window: the tokens that it has not seen (the prompt in the first pass,
# one token in each later one), then the drafts. Its hidden states are the block's next input.
#
#     known          t₀ … t₃ t₄             the trunk has seen t₀ … t₃; its last law gave t₄
#     block, t₁…t₄   with h₀ … h₃           one pass over what is new; its last output drafts t₅?
#     block, t₅?     with its own g¹        drafts t₆?, and so on, beyond the depths of training
#     trunk          t₄ t₅? t₆?             accepts t₅, draws another t₆
#     block, t₅ t₆   with h₄ h₅             what it kept of t₅? came from a guess: it is replaced
#
# The block's own cache is rolled back to before the drafts each time, since its inputs were its own
# outputs and are now the trunk's. (In training depth 2 sees keys of depth 2 at earlier positions,
# here keys of depth 1. That costs some acceptance, and the law is right in any case.)


def next_laws(logits: Tensor, temperature: float) -> Tensor:
    """Laws (..., V) of the next token, in float64. temperature 0: 1 at the largest logit.

    Raises: FloatingPointError for a logit that is not finite. Source: the usual definition.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("a logit is not finite: the weights are, or the input was, not")
    logits = logits.to(torch.float64)
    if temperature == 0:
        best = logits.argmax(dim=-1)
        law = F.one_hot(best, logits.shape[-1])
        return law.to(torch.float64)
    logits = logits / temperature
    return logits.softmax(dim=-1)


@dataclass
class Speculation:
    """A text, and what it took to write it."""

    tokens_1T: Tensor  # prompt and new tokens
    passes: int  # of the trunk, the prompt's included
    offered: list[int]  # times that the k-th draft was reached, after those before it had passed
    accepted: list[int]  # times that it passed

    def count(self, drafts: int, accepted: int) -> None:
        self.passes += 1
        for k in range(drafts):
            self.offered[k] += accepted >= k
            self.accepted[k] += accepted > k

    def add(self, other: Speculation) -> None:
        """Adds the counts of another text with as many drafts."""
        self.passes += other.passes
        for k, offered in enumerate(other.offered):
            self.offered[k] += offered
            self.accepted[k] += other.accepted[k]


def check_generation(
    model: Decoder, tokens_1T: Tensor, new_tokens: int, draft_length: int, temperature: float
) -> None:
    """Raises ValueError for what `speculative_generate` cannot do."""
    shape = tuple(tokens_1T.shape)
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise ValueError(f"tokens of shape {shape}: give one prompt, (1, T)")
    if new_tokens < 0 or draft_length < 0:
        found = f"new_tokens={new_tokens}, draft_length={draft_length}"
        raise ValueError(f"{found}: neither can be negative")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be at least 0, and finite")
    if draft_length and len(model.mtp) != 1:
        found = f"{len(model.mtp)} blocks for multi-token prediction"
        raise ValueError(f"{found}: drafts need one that is repeated (mtp_use_repeated_layer)")


def random(count: int, probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniforms in [0, 1), (count), of the dtype and the device of `probs`. Source: torch.rand."""
    options = {"dtype": probs.dtype, "device": probs.device, "generator": generator}
    return torch.rand(count, **options)


@torch.no_grad()
def draft(
    model: Decoder,
    hidden_1TD: Tensor,
    next_1T: Tensor,
    cache: Cache,
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Drafts (n) and the laws (n, V) that they were drawn from, n = length > 0.

    Args: hidden_1TD: the trunk's states that the block has not seen. next_1T: the token after each.
        cache: the block's; it keeps these, and drafts until the next call.
    Source: Nemotron 3 Super.
    """
    cache.keep(0)
    drafts = []
    laws = []
    for k in range(length):
        embedded_1TD = model.embed(next_1T)
        span = cache.admit(next_1T.shape[1], int(k > 0))
        hidden_1TD = model.mtp[0](embedded_1TD, hidden_1TD, span)
        hidden_1TD = hidden_1TD[:, -1:]
        logits_1V = model.logits(hidden_1TD)[0]
        q_1V = next_laws(logits_1V, temperature)
        draft_1 = draw(q_1V, random(1, q_1V, generator))
        drafts.append(draft_1)
        laws.append(q_1V)
        next_1T = draft_1[None]
    return torch.cat(drafts), torch.cat(laws)


@torch.no_grad()
def speculative_generate(
    model: Decoder,
    tokens_1T: Tensor,
    new_tokens: int,
    draft_length: int = 0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    constrain: Callable | None = None,
) -> Speculation:
    """Writes `new_tokens` tokens after a prompt; each pass of the trunk verifies drafts.

    Args: draft_length: drafts of a pass; 0 is plain decoding. It may exceed the depths of training.
        temperature: 0 takes the best token. generator: of the tokens' device. constrain: gets the
        text with n drafts after it, (1, S), and the n + 1 laws (n + 1, V) of the drafts' places and
        of the next one; returns the laws to take, each with sum 1.
    The law of the text does not depend on draft_length, nor does a greedy text.
    Raises: ValueError for an empty prompt or several, for bad numbers, and for drafts without one
        block for all depths. Source: Leviathan et al., 2023; for hybrids vLLM's code.
    """
    check_generation(model, tokens_1T, new_tokens, draft_length, temperature)
    trunk = new_cache(model.layers)
    heads = new_cache([])
    if draft_length:
        heads = new_cache(model.mtp[0].layers)
    drafts_n = tokens_1T.new_empty(0)
    V = model.config.vocab_size
    q_nV = torch.empty(0, V, dtype=torch.float64, device=tokens_1T.device)
    end = tokens_1T.shape[1] + new_tokens
    result = Speculation(tokens_1T, 0, [0] * draft_length, [0] * draft_length)
    while tokens_1T.shape[1] < end:
        seen = trunk.tokens
        n = len(drafts_n)
        window_1T = torch.cat([tokens_1T[:, seen:], drafts_n[None]], dim=1)
        span = trunk.admit(window_1T.shape[1], n)
        hidden_1TD = model.trunk(window_1T, span)
        logits_NV = model.logits(hidden_1TD[:, -n - 1 :])[0]
        p_NV = next_laws(logits_NV, temperature)
        if constrain is not None:
            text_1S = torch.cat([tokens_1T, drafts_n[None]], dim=1)
            p_NV = constrain(text_1S, p_NV)
        uniforms_N = random(n + 1, p_NV, generator)
        accepted, token = speculative_sample(p_NV, q_nV, drafts_n, uniforms_N)
        accepted = int(accepted)  # the lengths of what follows depend on it
        trunk.keep(accepted)
        result.count(n, accepted)
        new_n = torch.cat([drafts_n[:accepted], token[None]])
        tokens_1T = torch.cat([tokens_1T, new_n[None]], dim=1)
        if draft_length:
            kept_1TD = hidden_1TD[:, : trunk.tokens - seen]
            next_1T = tokens_1T[:, seen + 1 :]
            options = (heads, draft_length, temperature, generator)
            drafts_n, q_nV = draft(model, kept_1TD, next_1T, *options)
    result.tokens_1T = tokens_1T[:, :end]
    return result


# ── 4 The demonstration ─────────────────────────────────────────────────────────────────────────

DRAFTS = (2, 5)  # of a pass; five is more than the depths of training


def law_of_speculation(p: Tensor, q: Tensor, grid: int) -> tuple[Tensor, float]:
    """The law (V) of the first token, and the probability that a draft passes: no draws, but every
    draft and every pair of uniforms of a grid. Args: p, q (V), target's and draft's laws.

    Exact where `grid` is a multiple of the denominators of p/q and of the normalised residual.
    """
    law_V = torch.zeros_like(p)
    passed = 0.0
    targets_2V = torch.stack([p, p])
    middles = (torch.arange(grid, dtype=p.dtype) + 0.5) / grid
    uniforms_M2 = torch.cartesian_prod(middles, middles)
    for x in range(len(p)):
        drafts_1 = torch.tensor([x])
        weight = q[x].item() / grid**2
        for uniforms_2 in uniforms_M2:
            accepted, token = speculative_sample(targets_2V, q[None], drafts_1, uniforms_2)
            first = token
            if accepted:
                first = x
                passed += weight
            law_V[first] += weight
    return law_V, passed


def rollback_errors(device: torch.device) -> dict[str, float]:
    """A hybrid's caches after keep(n) next to those of a pass without the other drafts: name to
    max|Δ| / max|reference|, float64."""
    config, (tokens_BT, *_) = mtp.check_case(2, device)
    model = Decoder(config).to(device, torch.float64)
    errors = {}
    for n in range(4):
        cache = new_cache(model.layers)
        fresh = new_cache(model.layers)
        with torch.no_grad():
            model.trunk(tokens_BT[:, :5], cache.admit(5, 0))
            model.trunk(tokens_BT[:, 5:9], cache.admit(4, 3))
            cache.keep(n)
            model.trunk(tokens_BT[:, : 6 + n], fresh.admit(6 + n, 0))
        reference = cache_tensors(fresh)
        errors |= mtp.relative_errors(f"keep({n})", cache_tensors(cache), reference)
    return errors


def cache_tensors(cache: Cache) -> dict[str, Tensor]:
    """Every tensor of a cache without drafts, by name."""
    tensors = {}
    for index, state in enumerate(cache.layers):
        if state.ssm:
            tensors[f"layer {index}: state"] = state.ssm[0]
            tensors[f"layer {index}: inputs of the convolution"] = state.conv_BTC
        if state.kv_2BHSP is not None:
            tensors[f"layer {index}: keys and values"] = state.kv_2BHSP
    return tensors


def statements(device: torch.device) -> list[tuple]:
    """Claims about the acceptance rule and about the rollback."""
    p_V = torch.tensor([2, 3, 1, 1, 1], dtype=torch.float64) / 8
    q_V = torch.tensor([1, 1, 2, 2, 2], dtype=torch.float64) / 8
    law_V, passed = law_of_speculation(p_V, q_V, 12)
    error = (law_V - p_V).abs().max().item()
    claim = "law of the text, by enumeration"
    claims = [(claim, "the target's", f"within {error:.0e}", error < 1e-12)]
    overlap = torch.minimum(p_V, q_V).sum().item()
    good = abs(passed - overlap) < 1e-12
    claims.append(("a draft passes with 1 − TV(p, q)", "exact", f"{passed:.4f}", good))
    error = mtp.worst(rollback_errors(device))
    claim = "every cache after keep(n) is a fresh one, float64"
    claims.append((claim, "–", f"worst {error:.1e} relative", error <= 1e-12))
    return claims


def write(
    args: argparse.Namespace, model: Decoder, device: torch.device
) -> dict[tuple[float, int], Speculation]:
    """Writes texts of every prompt with each temperature and number of drafts.

    Each rank has other prompts. Returns: counts summed over ranks, tokens_1T of all prompts.
    """
    _, tokens = mtp.read_text(args.data, args.prompt)
    found = {}
    for temperature, drafts in itertools.product((0.0, 1.0), (0, *DRAFTS)):
        mine = Speculation(torch.empty(0), 0, [0] * drafts, [0] * drafts)
        texts = []
        for number in range(mtp.group_rank(), args.texts, mtp.group_size()):
            begin = 997 * number % (len(tokens) - args.prompt)
            prompt_T = tokens[begin : begin + args.prompt]
            prompt_1T = prompt_T[None].to(device)
            rng = torch.Generator(device).manual_seed(args.seed + number)
            options = (args.new_tokens, drafts, temperature, rng)
            one = speculative_generate(model, prompt_1T, *options)
            texts.append(one.tokens_1T.tolist())
            mine.add(one)
        found[temperature, drafts] = summed_over_ranks(mine, texts)
    return found


def summed_over_ranks(mine: Speculation, texts: list) -> Speculation:
    """Counts of all ranks, and all texts, in order of rank. Collective."""
    everyone = [None] * mtp.group_size()
    dist.all_gather_object(everyone, (mine, texts))
    total, all_texts = everyone[0]
    for other, texts in everyone[1:]:
        total.add(other)
        all_texts = all_texts + texts
    total.tokens_1T = torch.tensor(all_texts)
    return total


def writing(args: argparse.Namespace, found: dict[tuple[float, int], Speculation]) -> list[tuple]:
    """Prints acceptance by draft and tokens a pass; returns the claims about them."""
    total = args.texts * args.new_tokens
    mtp.say(f"{args.texts} texts of {args.new_tokens} tokens, float64\n")
    mtp.say("temperature  drafts  passes  tokens a pass  acceptance of the 1st, 2nd … draft")
    for (temperature, drafts), one in found.items():
        pairs = zip(one.accepted, one.offered)
        rates = [f"{accepted / max(1, offered):.2f}" for accepted, offered in pairs]
        each = f"{total / one.passes:.2f}"
        line = f"{temperature:11}{drafts:8}{one.passes:8}{each:>15}  {' '.join(rates)}"
        mtp.say(line.rstrip())
    mtp.say()
    plain = found[0.0, 0].tokens_1T
    same = 0
    for drafts in DRAFTS:
        text = found[0.0, drafts].tokens_1T
        same += torch.equal(text, plain)
    here = f"{same} of {len(DRAFTS)} numbers of drafts, {args.texts} texts each"
    claim = "greedy text with drafts equals plain decoding's"
    claims = [(claim, "equal", here, same == len(DRAFTS))]
    figures = []
    for temperature in (0.0, 1.0):
        passes = found[temperature, DRAFTS[-1]].passes
        figures.append(f"{total / passes:.2f}")
    claim = f"tokens a pass with {DRAFTS[-1]} drafts: greedy, sampled"
    note = "a small model, a short run"
    claims.append((claim, "3.45 with 7 (Super)", ", ".join(figures), note))
    return claims


def measure(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    claims = statements(device)
    mesh = mtp.make_mesh(args.tp, args.cp, device, args.timeout)
    trained, _ = mtp.demonstrate(args, mesh, device)
    V = trained.config.vocab_size
    full = mtp.gather_state_dict(trained.state_dict(), V, mesh.tp_group)
    model = Decoder(trained.config).to(device, torch.float64)
    model.load_state_dict(full)
    return claims + writing(args, write(args, model, device))


def main(args: argparse.Namespace, device: torch.device) -> None:
    mtp.say_setting(args, f": tp {args.tp} × cp {args.cp}")
    claims = statements(device) if args.check else measure(args, device)
    if not mtp.print_claims(claims):
        raise SystemExit(1)


@dataclass
class WritingOptions:  # the flags of this script
    texts: int = flag(4, "prompts to write from", least=1)
    prompt: int = flag(64, "tokens of a prompt", least=1)
    new_tokens: int = flag(64, "tokens to write", least=1)


def check_writing_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where flags, ranks and text do not fit."""
    mtp.check_args(args)
    if not args.mtp_num_layers:
        raise ValueError("--mtp-num-layers 0 has no block to draft with: take 1 or more")
    mtp.read_text(args.data, args.prompt)


def flags() -> argparse.Namespace:
    configs = [WritingOptions, mtp.Options, HybridConfig]
    return mtp.parse_flags(__doc__, configs, check_writing_args, ranks=2, steps=200)


if __name__ == "__main__":
    mtp.launch(main, flags())
