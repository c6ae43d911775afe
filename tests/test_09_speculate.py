# SPDX-License-Identifier: MIT-0
"""Speculative decoding of chapter 9's models: the law by enumeration, caches after keep(n), texts.

References: fractions for the law; the full forward pass, without any cache, for greedy text; a
fresh cache for the rollback.
"""

import inspect
import itertools
import math
import textwrap
from fractions import Fraction
from pathlib import Path

import mtp as mt
import pytest
import scripts
import speculate as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Shows, assert_equal, plant

SCRIPT = Path(sp.__file__)
P = [Fraction(x, 8) for x in (2, 3, 1, 1, 1)]
Q = [Fraction(x, 8) for x in (1, 1, 2, 2, 2)]
R = [Fraction(x, 8) for x in (4, 1, 1, 2, 0)]


def tensor(law: list) -> torch.Tensor:
    return torch.tensor([float(x) for x in law], dtype=torch.float64)


def edited(function, *changes: tuple[str, str]):
    """A function of the script with some of its text changed, for planted bugs."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in it"
        source = source.replace(old, new)
    namespace = dict(vars(sp))
    exec(compile(source, f"<{function.__name__}, edited>", "exec"), namespace)
    return namespace[function.__name__]


def decoder(pattern="M*-M", seed=0, **changes) -> sp.Decoder:
    """Random weights, large enough that laws are far from uniform."""
    sizes = dict(hidden_size=16, ffn_hidden_size=24, state_size=6, mamba_heads=2)
    sizes |= dict(mamba_head_size=4, attention_heads=2, attention_head_size=4, init_std=0.35)
    sizes |= dict(vocab_size=13, pattern=pattern, seed=seed)
    config = mt.HybridConfig(**(sizes | changes))
    model = sp.Decoder(config).double()
    with torch.no_grad():
        model.head.weight.mul_(3)
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p.add_(6)  # states that matter
            if name.endswith("A_log"):
                p.sub_(3)  # and last
    return model


def prompt(length=7, seed=0) -> torch.Tensor:
    return torch.randint(13, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_greedy(model: sp.Decoder, tokens_1T: torch.Tensor, count: int) -> torch.Tensor:
    """The full forward pass for each token."""
    plain = mt.HybridLM(model.config).double()
    plain.load_state_dict(model.state_dict())
    for _ in range(count):
        best = plain(tokens_1T)[:, -1].argmax(-1, keepdim=True)
        tokens_1T = torch.cat([tokens_1T, best], 1)
    return tokens_1T


# ── The law ───────────────────────────────────────────────────────────────────────────────────────


def law_by_enumeration(sample, p: list, q: list, grid: int) -> tuple[list, Fraction]:
    """In fractions: over every draft and every pair of uniforms of the grid."""
    law = [Fraction(0)] * len(p)
    passed = Fraction(0)
    target = torch.stack([tensor(p)] * 2)
    middles = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for x, u, w in itertools.product(range(len(p)), middles, middles):
        if q[x]:
            accepted, token = sample(
                target, tensor(q)[None], torch.tensor([x]), torch.stack([u, w])
            )
            weight = q[x] / grid**2
            law[x if accepted else int(token)] += weight
            passed += weight * int(accepted)
    return law, passed


@pytest.mark.parametrize("p, q, grid", [(P, Q, 12), (R, P, 24), (P, R, 24), (P, P, 8)])
def test_the_law_of_speculative_sample_is_the_targets(p, q, grid):
    """Exactly, in fractions; and a draft passes with 1 − TV exactly."""
    law, passed = law_by_enumeration(sp.speculative_sample, p, q, grid)
    assert law == p
    assert passed == sum(map(min, p, q)) == 1 - sum(abs(a - b) for a, b in zip(p, q)) / 2


def test_two_drafts_and_the_token_after_them():
    """The joint law of all tokens, when the laws do not depend on the tokens before."""
    grid = 4
    targets = [[Fraction(1, 2), Fraction(1, 2)], [Fraction(1, 4), Fraction(3, 4)]]
    targets.append([Fraction(3, 4), Fraction(1, 4)])
    q = [Fraction(1, 4), Fraction(3, 4)]
    p_3V = torch.stack([tensor(law) for law in targets])
    q_2V = torch.stack([tensor(q)] * 2)
    middles = (torch.arange(3 * grid, dtype=torch.float64) + 0.5) / (3 * grid)
    found = {}
    for drafts in itertools.product(range(2), repeat=2):
        for uniforms in itertools.product(middles, repeat=3):
            accepted, token = sp.speculative_sample(
                p_3V, q_2V, torch.tensor(drafts), torch.stack(uniforms)
            )
            text = (*drafts[: int(accepted)], int(token))
            weight = q[drafts[0]] * q[drafts[1]] / (3 * grid) ** 3
            found[text] = found.get(text, 0) + weight
    for length in (1, 2, 3):  # of texts that are so long, the last token has its own law
        for first in itertools.product(range(2), repeat=length - 1):
            longer = sum(w for text, w in found.items() if text[: length - 1] == first)
            longer -= sum(w for text, w in found.items() if text == first)
            for x in range(2):
                here = sum(w for t, w in found.items() if t[:length] == (*first, x))
                assert here == longer * targets[length - 1][x]


def test_greedy_is_the_limit():
    p = torch.eye(4, dtype=torch.float64)[[2, 1, 3]]
    q = torch.eye(4, dtype=torch.float64)[[2, 0]]
    for u in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((3,), u, dtype=torch.float64)
        accepted, token = sp.speculative_sample(p, q, torch.tensor([2, 0]), uniforms)
        assert (int(accepted), int(token)) == (1, 1)
    same = torch.eye(4, dtype=torch.float64)[[2, 1]]
    accepted, token = sp.speculative_sample(p, same, torch.tensor([2, 1]), uniforms)
    assert (int(accepted), int(token)) == (2, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.booleans())
def test_no_token_of_probability_zero(seed, n, extreme):
    """Any laws with zeros, uniforms at both ends of [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, n + 1, 6, generator=generator, dtype=torch.float64).sub(0.5).clamp(min=0)
    p[:, 0] += 0.1
    q[:, 5] += 0.1
    p /= p.sum(-1, keepdim=True)
    q /= q.sum(-1, keepdim=True)
    uniforms = torch.rand(n + 1, generator=generator, dtype=torch.float64)
    if extreme:
        uniforms = torch.where(uniforms < 0.5, 0.0, 1 - 2**-53).double()
    drafts = sp.draw(q[:n], torch.rand(n, generator=generator, dtype=torch.float64))
    accepted, token = sp.speculative_sample(p, q[:n], drafts, uniforms)
    assert 0 <= accepted <= n and p[accepted, token] > 0
    assert all(p[k, drafts[k]] > 0 for k in range(int(accepted)))


def test_a_residual_of_zero_and_uniforms_at_the_end():
    p = torch.tensor([[0.5, 0.5, 0.0]] * 2, dtype=torch.float64)
    q = p[:1] * (1 + 2**-52)  # rounded up everywhere: the residual is 0
    last = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    accepted, token = sp.speculative_sample(p, q, torch.tensor([0]), last)
    assert accepted == 0 and token == 1
    assert sp.draw(torch.tensor([0.1, 0.2, 0.0]), torch.tensor(1 - 2**-24)) == 1


def test_bad_arguments_of_the_rule():
    p = torch.full((2, 4), 0.25, dtype=torch.float64)
    u = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 4\), \(2, 4\), \(1,\), \(2,\)\]"):
        sp.speculative_sample(p, p, torch.tensor([0]), u)
    never = torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a draft of \[2\] has probability 0"):
        sp.speculative_sample(p, never, torch.tensor([2]), u)
    for bad in (p * 0, p * math.nan, p * math.inf):  # the token would be V, outside the vocabulary
        with pytest.raises(ValueError, match="target_probs sum to"):
            sp.speculative_sample(bad, p[:1], torch.tensor([0]), u)
    for index, name in enumerate(("target_probs", "draft_probs")):
        laws = [p, p[:1]]
        laws[index] = laws[index] / 2  # as after a mask that is not normalised again
        with pytest.raises(ValueError, match=f"{name} sum to"):
            sp.speculative_sample(*laws, torch.tensor([0]), u)
    for low in (torch.bfloat16, torch.float16):
        for index in (0, 1, 3):
            arguments = [p, p[:1], torch.tensor([0]), u]
            arguments[index] = arguments[index].to(low)
            with pytest.raises(ValueError, match=f"{low}: upcast logits"):
                sp.speculative_sample(*arguments)


def test_unlikely_tokens_in_fp32():
    """Each has its own share; cumulated in fp32, the last would have its neighbours', too."""
    probs = torch.tensor([1.0, 3e-8, 3e-8])
    found = [
        sp.draw(probs, torch.tensor(1 - x, dtype=torch.float64)).item() for x in (1e-7, 4e-8, 1e-8)
    ]
    assert found == [0, 1, 2]


# ── Caches ────────────────────────────────────────────────────────────────────────────────────────

PATTERNS = {"Mamba": "M-M", "attention": "*-*", "hybrid": "M*-M"}


@torch.no_grad()
def rolled_back(model: sp.Decoder, first: int, drafts: int, n: int) -> tuple[dict, dict]:
    """Caches after keep(n), and after a pass of what is kept; with the next hidden states."""
    tokens_1T = prompt(first + drafts + 3)
    found = []
    for kept in (True, False):
        cache = sp.new_cache(model.layers)
        if kept:
            model.trunk(tokens_1T[:, : first - 1], cache.admit(first - 1, 0))
            model.trunk(tokens_1T[:, first - 1 : first + drafts], cache.admit(drafts + 1, drafts))
            cache.keep(n)
        else:
            model.trunk(tokens_1T[:, : first + n], cache.admit(first + n, 0))
        assert cache.tokens == first + n and cache.drafts == 0
        tensors = dict(sp.cache_tensors(cache))
        tensors["next"] = model.trunk(tokens_1T[:, -3:], cache.admit(3, 0))
        found.append(tensors)
    return tuple(found)


@pytest.mark.parametrize("kind", PATTERNS)
def test_after_keep_a_cache_is_a_fresh_one(kind):
    """Prompts shorter and longer than the convolution, every number of drafts and of kept ones."""
    model = decoder(PATTERNS[kind])
    for first, drafts in ((2, 1), (2, 4), (3, 3), (9, 5)):
        for n in range(drafts + 1):
            here, there = rolled_back(model, first, drafts, n)
            assert_equal(here, there, 1e-12)


def test_drafts_one_by_one_and_kept_drafts_go_on():
    """As the block's cache is used: several passes of one draft before keep()."""
    model = decoder()
    tokens_1T = prompt(9)
    with torch.no_grad():
        expected = model.trunk(tokens_1T, sp.new_cache(model.layers).admit(9, 0))
        cache = sp.new_cache(model.layers)
        parts = [model.trunk(tokens_1T[:, :4], cache.admit(4, 0))]
        for t in range(4, 8):
            parts.append(model.trunk(tokens_1T[:, t : t + 1], cache.admit(1, 1)))
        cache.keep(4)
        parts.append(model.trunk(tokens_1T[:, 8:], cache.admit(1, 0)))
    assert_equal({"hidden": torch.cat(parts, 1)}, {"hidden": expected}, 1e-12)


def test_a_cached_pass_is_the_full_forward():
    model = decoder()
    plain = mt.HybridLM(model.config).double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        here = model.trunk(prompt(9), sp.new_cache(model.layers).admit(9, 0))
        there = plain.trunk(prompt(9), mt.Span())
    assert_equal({"hidden": here}, {"hidden": there}, 1e-13)


def test_what_a_cache_refuses():
    cache = sp.new_cache([1, 2])
    cache.admit(3, 2)
    for tokens, drafts in ((1, 0), (2, 1), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match=r"call keep\(\) first"):
            cache.admit(tokens, drafts)
    for n in (3, -1):
        with pytest.raises(ValueError, match=rf"keep\({n}\), but 2 drafts have passed"):
            cache.keep(n)
    assert (cache.tokens, cache.drafts) == (3, 2)


# ── Texts ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", PATTERNS)
def test_greedy_text_does_not_depend_on_the_drafts(kind):
    """Token for token that of the full forward pass, for every number of drafts."""
    for seed in range(2):
        model = decoder(PATTERNS[kind], seed)
        expected = plain_greedy(model, prompt(seed=seed), 20)
        assert len(expected.unique()) > 3  # no text of one token
        for drafts in (0, 1, 2, 3, 6):
            found = sp.speculative_generate(model, prompt(seed=seed), 20, drafts)
            assert torch.equal(found.tokens_1T, expected)
            assert found.passes >= 20 / (drafts + 1) and len(found.offered) == drafts


def test_a_block_with_a_state():
    """Mamba layers in the block: its cache rolls back as well, and drafts do not depend on it."""
    model = decoder(mtp_pattern="M*-")
    expected = plain_greedy(model, prompt(), 16)
    one = sp.speculative_generate(model, prompt(), 16, 3)
    assert torch.equal(one.tokens_1T, expected)
    assert all(state.ssm == [] for state in sp.new_cache(model.mtp[0].layers).layers)


def test_a_block_that_knows_all_is_always_accepted():
    """A trunk whose law depends on the last token alone, and a block that computes the same."""
    model = decoder("-", mtp_pattern="-")
    with torch.no_grad():
        for layer in (*model.layers, *model.mtp[0].layers):
            layer.mixer.down_proj.weight.zero_()
        model.mtp[0].eh_proj.weight.zero_()
        model.mtp[0].eh_proj.weight[:, :16] = torch.eye(16)  # the embedding alone
        model.embedding.weight.mul_(10)  # so that eps does not matter
    one = sp.speculative_generate(model, prompt(), 21, 4)
    assert one.accepted == one.offered and one.passes == 1 + math.ceil(20 / 5)
    for temperature in (0.7, 1.3):
        generator = torch.Generator().manual_seed(0)
        drawn = sp.speculative_generate(model, prompt(), 41, 4, temperature, generator)
        assert sum(drawn.accepted) >= 0.99 * sum(drawn.offered)


def test_the_law_of_the_text():
    """Sampled texts of three tokens: frequencies are those of the full forward pass, for every
    number of drafts. (The rule itself is exact above; this is for what surrounds it.)"""
    model = decoder("M*", vocab_size=2)
    plain = mt.HybridLM(model.config).double()
    plain.load_state_dict(model.state_dict())
    start = torch.tensor([[0, 1, 1]])
    law = {}
    with torch.no_grad():
        for text in itertools.product(range(2), repeat=3):
            tokens = torch.cat([start, torch.tensor([text])], 1)
            log_p = plain(tokens).log_softmax(-1)
            law[text] = math.exp(sum(log_p[0, 2 + k, text[k]].item() for k in range(3)))
    for drafts in (0, 1, 3):
        generator = torch.Generator().manual_seed(drafts)
        counts = dict.fromkeys(law, 0)
        for _ in range(200):
            one = sp.speculative_generate(model, start, 3, drafts, 1.0, generator)
            counts[tuple(one.tokens_1T[0, 3:].tolist())] += 1
        chi = sum((counts[t] - 200 * law[t]) ** 2 / (200 * law[t]) for t in law)
        assert chi < 25  # 7 degrees of freedom: 7 expected, 24.3 in one of a thousand


def test_texts_are_reproducible_and_as_long_as_asked():
    model = decoder()
    for count in (0, 1, 5):
        texts = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(3)
            one = sp.speculative_generate(model, prompt(), count, 4, 0.8, generator)
            assert one.tokens_1T.shape == (1, 7 + count)
            texts.append(one.tokens_1T)
        assert torch.equal(*texts) and torch.equal(texts[0][:, :7], prompt())


def test_what_generation_refuses():
    model = decoder()
    two = decoder(mtp_use_repeated_layer=False)
    none = decoder(mtp_num_layers=0)
    cases = [
        (model, prompt(0), 3, 1, 0.0, r"tokens of shape \(1, 0\): give one prompt"),
        (model, prompt().expand(2, -1), 3, 1, 0.0, r"tokens of shape \(2, 7\)"),
        (model, prompt(), -1, 1, 0.0, "new_tokens=-1"),
        (model, prompt(), 3, -2, 0.0, "draft_length=-2"),
        (model, prompt(), 3, 1, -0.1, "temperature=-0.1"),
        (model, prompt(), 3, 1, math.nan, "temperature=nan"),
        (two, prompt(), 3, 1, 0.0, "2 blocks for multi-token prediction: drafts need one"),
        (none, prompt(), 3, 1, 0.0, "0 blocks for multi-token prediction"),
    ]
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            sp.speculative_generate(*arguments)
    for other in (two, none):
        one = sp.speculative_generate(other, prompt(), 3)
        assert torch.equal(one.tokens_1T, plain_greedy(other, prompt(), 3))
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="a logit is not finite"):
        sp.speculative_generate(model, prompt(), 3)


@pytest.mark.ranks(2)
def test_the_demonstration():
    flags = ["--steps", "3", "--seq-length", "32", "--batch", "4", "--hidden-size", "32"]
    flags += ["--texts", "3", "--new-tokens", "8", "--prompt", "12"]
    code, text = scripts.on_ranks(sp, *flags)
    assert code == 0
    if mt.group_rank() == 0:
        assert "2 of 2 numbers of drafts, 3 texts each" in text and "FAILED" not in text


def test_the_script():
    run = scripts.forked(SCRIPT, "--ranks", "1", "--check")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count(" ok") == 3


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def texts_with(model: sp.Decoder, drafts: int = 3) -> tuple[float, bool]:
    """Acceptance, and whether greedy texts are those of plain decoding, of two prompts."""
    same = True
    accepted = offered = 0
    for seed in range(2):
        found = sp.speculative_generate(model, prompt(seed=seed), 20, drafts)
        same &= torch.equal(found.tokens_1T, plain_greedy(model, prompt(seed=seed), 20))
        accepted += sum(found.accepted)
        offered += sum(found.offered)
    return accepted / offered, same


@pytest.mark.planted_bug(
    symptom="the text differs from plain decoding and still reads well",
    seen_in="https://github.com/vllm-project/vllm/issues/39273",
)
@pytest.mark.parametrize("what", ["state", "convolution", "keys"])
def test_a_cache_that_is_not_rolled_back(what):
    changes = {
        "state": ("self.ssm = [self.ssm[n]]", "self.ssm = [self.ssm[-1]]"),
        "convolution": (
            "self.conv_BTC = self.conv_BTC[:, n:last]",
            "self.conv_BTC = self.conv_BTC[:, drafts:]",
        ),
        "keys": ("self.kv_2BHSP = self.kv_2BHSP[..., :last, :]", "pass"),
    }
    model = decoder()
    assert texts_with(model)[1]
    changed = edited(sp.LayerState.keep, changes[what])
    with plant(sp.LayerState, "keep", changed):
        _, same = texts_with(model)
        here, there = rolled_back(model, 6, 4, 1)
    assert not same
    gaps = [
        (here[name] - there[name]).abs().max() if here[name].shape == there[name].shape else 1.0
        for name in there
    ]
    assert max(gaps) > 1e-3
    return Shows("another text", "states differ")


def law_with(bug, p=P, q=Q, grid=12) -> tuple[Fraction, Fraction]:
    """Total variation between the law and the target's, and the acceptance, with a bug."""
    law, passed = law_by_enumeration(bug, p, q, grid)
    return sum(abs(a - b) for a, b in zip(law, p)) / 2, passed


@pytest.mark.planted_bug(
    symptom="tokens that the block likes are too frequent in the text", seen_in=None
)
def test_after_a_rejection_a_draw_from_the_target():
    bug = edited(
        sp.speculative_sample, ("residual_1V = (p_1V - q_1V).clamp(min=0)", "residual_1V = p_1V")
    )
    distance, passed = law_with(bug)
    assert distance > Fraction(1, 10) and passed == Fraction(5, 8)
    return Shows(f"law off by {float(distance):.2f}", None)


@pytest.mark.planted_bug(
    symptom="the residual sums to less than 1: the last token is drawn too often", seen_in=None
)
def test_a_residual_that_is_not_normalised():
    changed = edited(sp.draw, ("uniforms[..., None] * total", "uniforms[..., None]"))
    with plant(sp, "draw", changed):
        law = law_with(edited(sp.speculative_sample))[0]
    assert law > Fraction(1, 20)
    return Shows(f"law off by {float(law):.2f}", None)


@pytest.mark.planted_bug(
    symptom="the text has another law, at another temperature than asked for",
    seen_in="https://github.com/jaymody/speculative-sampling/issues/3",
)
def test_a_ratio_with_another_law_than_the_drafts():
    """The best token is the draft, but the ratio has the softmax."""
    best = Q.index(max(Q))

    def bug(target, q_1V, drafts, uniforms):
        return sp.speculative_sample(target, tensor(Q)[None], torch.tensor([best]), uniforms)

    law = [Fraction(0)] * 5
    target = torch.stack([tensor(P)] * 2)
    middles = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    for u, w in itertools.product(middles, middles):
        accepted, token = bug(target, None, None, torch.stack([u, w]))
        law[best if accepted else int(token)] += Fraction(1, 144)
    distance = sum(abs(a - b) for a, b in zip(law, P)) / 2
    assert distance > Fraction(1, 4)
    return Shows(f"law off by {float(distance):.2f}", None)


@pytest.mark.planted_bug(
    symptom="the right text, and fewer drafts are accepted than could be",
    seen_in="https://github.com/ml-explore/mlx-swift-lm/issues/459",
)
def test_accept_where_the_draft_equals_a_sample_of_the_target():
    def bug(target, q_1V, drafts, uniforms):
        token = sp.draw(target[0], uniforms[0])
        return (token == drafts[0]).long(), token

    distance, passed = law_with(bug, grid=8)
    assert distance == 0 and passed == sum(p * q for p, q in zip(P, Q)) < Fraction(5, 8)
    return Shows("right, slower", None)


@pytest.mark.planted_bug(
    symptom="the draw after a rejection is not free: it depends on the test that failed",
    seen_in="https://github.com/feifeibear/LLMSpeculativeSampling",
)
def test_one_uniform_for_the_test_and_the_draw():
    bug = edited(sp.speculative_sample, ("uniforms[n:]", "uniforms[:1]"))
    distance, _ = law_with(bug)
    assert distance > Fraction(1, 16)
    return Shows(f"law off by {float(distance):.2f}", None)


@pytest.mark.planted_bug(
    symptom="drafts are worse than they could be; the text is right", seen_in=None
)
def test_a_block_whose_cache_keeps_its_own_drafts():
    """Its next pass then attends to states of a guess: other laws of drafts, the same text."""
    model = decoder(mtp_pattern="*-")
    laws = []

    def recorded(target_probs, draft_probs, *others):
        laws.append(draft_probs)
        return sample(target_probs, draft_probs, *others)

    def keeps_all(self, n):
        keep(self, self.drafts if len(self.layers) == 2 else n)

    def text(temperature: float):
        laws.clear()
        generator = torch.Generator().manual_seed(0)
        one = sp.speculative_generate(model, prompt(), 9, 3, temperature, generator)
        return one.tokens_1T, laws[2]

    with plant(sp, "speculative_sample", recorded) as sample:
        right = [text(0.0), text(1.0)]
        with plant(sp.Cache, "keep", keeps_all) as keep:
            wrong = [text(0.0), text(1.0)]
    assert torch.equal(right[0][0], wrong[0][0])
    assert (right[1][1] - wrong[1][1]).abs().max() > 1e-3
    return Shows("right, slower", None)
