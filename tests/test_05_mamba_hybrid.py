# SPDX-License-Identifier: MIT-0
"""Chapter 5: three forms of one recurrence agree; divided by heads, by tokens and by both they equal one device.

A test marked `ranks` is what every rank of that world executes. References are the loop of part 1, PyTorch, or
transformers.
"""

from pathlib import Path

import mamba_hybrid as mh
import pytest
import ranks
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import SavedStorages, assert_equal
from torch import nn

SCRIPT = Path(mh.__file__)


# ── Small helpers ───────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> mh.HybridConfig:
    sizes = dict(vocab_size=61, hidden_size=24, pattern="M*-M", ffn_hidden_size=16, chunk=4)
    sizes |= dict(mamba_heads=4, mamba_head_size=6, mamba_groups=2, state_size=5)
    sizes |= dict(attention_heads=4, attention_groups=2, attention_head_size=4)
    return mh.HybridConfig(**(sizes | changes))


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(ranks.device)


def scan_inputs(S, B=2, N=4, D=3, G=2, Z=5, seed=1, state=True, skip=True) -> dict:
    """Arguments of the three forms; dt and A reach from hardly any decay to forgetting within a token."""
    tensors = dict(x=random(B, S, N, D, seed=seed), dt=random(B, S, N, seed=seed + 1).exp())
    tensors |= dict(A=-random(N, seed=seed + 2).exp(), B=random(B, S, G, Z, seed=seed + 3))
    tensors |= dict(C=random(B, S, G, Z, seed=seed + 4), D=random(N, seed=seed + 5) if skip else None)
    return tensors | dict(initial_state=random(B, N, D, Z, seed=seed + 6) if state else None)


def values_and_gradients(form, inputs: dict, **options) -> dict:
    """y, the final state, and the gradients of all inputs under random weights of both outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x is not None}
    y, state = form(**leaves, **options)
    upstream = [random(*out.shape, seed=50).to(out.dtype) for out in (y, state)]
    grads = torch.autograd.grad((y, state), list(leaves.values()), upstream)
    return {"y": y, "state": state} | dict(zip(("grad of " + name for name in leaves), grads))


def tokens_of(rows=2, length=14, vocab=61, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(vocab, (2, rows, length), generator=generator).to(ranks.device)
    targets_BS[0, 3:6] = -100
    return tokens_BS, targets_BS


# ── 1.1 One recurrence, seen three ways ─────────────────────────────────────────────────────────────────


def test_segsum_is_the_sum_over_the_stretch():
    a = -random(2, 3, 9).abs()
    here = mh.segsum(a)
    for i in range(9):
        for j in range(9):
            expected = a[..., j + 1 : i + 1].sum(-1) if j <= i else torch.full((2, 3), -torch.inf, dtype=a.dtype)
            assert torch.allclose(here[..., i, j], expected, rtol=0, atol=1e-13)
    assert torch.equal(here.diagonal(dim1=-2, dim2=-1), torch.zeros_like(a))


def test_segsum_keeps_its_digits_behind_a_long_past():
    """fp32: behind 5,000 of decay a difference of running sums would be off by 3e-4; a sum over the stretch is not."""
    a = -random(300, dtype=torch.float32).abs() * 20
    here, exact = mh.segsum(a), mh.segsum(a.double())
    low = torch.ones(300, 300).tril().bool()
    assert a.sum() < -4000
    assert ((here.double() - exact)[low].abs() <= 1e-6 * exact[low].abs().clamp(min=1)).all()


@settings(max_examples=40, deadline=None)
@given(
    S=st.integers(1, 40),
    chunk=st.integers(1, 45),
    groups=st.sampled_from([1, 2, 4]),
    state=st.booleans(),
    skip=st.booleans(),
    documents=st.booleans(),
)
def test_three_forms_agree(S, chunk, groups, state, skip, documents):
    """Loop, masked matrix and chunks: y, final state and every gradient, at any length and any chunk."""
    inputs = scan_inputs(S, G=groups, state=state, skip=skip)
    starts = (random(2, S, seed=9) > 1) if documents else None
    loop = values_and_gradients(mh.ssd_recurrent, inputs, starts=starts)
    zeros = {name: 1e-12 for name in ("grad of A", "grad of dt") if loop[name].abs().max() < 1e-6}
    if documents and state and loop["grad of initial_state"].abs().max() < 1e-6:
        zeros["grad of initial_state"] = 1e-12  # a document begins at once in both sequences
    assert_equal(values_and_gradients(mh.ssd_quadratic, inputs, starts=starts), loop, zeros=zeros)
    assert_equal(values_and_gradients(mh.ssd, inputs, starts=starts, chunk=chunk), loop, zeros=zeros)


def test_against_the_sum_written_out():
    """y_i = Σ_j exp(a_{j+1} + … + a_i) (C_i·B_j) dt_j x_j + D x_i, one number at a time."""
    x, dt, A, B, C, D, _ = scan_inputs(5, B=1, N=4, G=2, state=False).values()
    y, final = torch.zeros_like(x), torch.zeros(1, 4, 3, 5, dtype=x.dtype)
    for n in range(4):
        g = n // 2  # heads 0 and 1 are group 0
        for i in range(5):
            for j in range(i + 1):
                decay = (dt[0, j + 1 : i + 1, n].sum() * A[n]).exp()
                y[0, i, n] += decay * (C[0, i, g] @ B[0, j, g]) * dt[0, j, n] * x[0, j, n]
                if i == 4:
                    final[0, n] += decay * dt[0, j, n] * torch.outer(x[0, j, n], B[0, j, g])
            y[0, i, n] += D[n] * x[0, i, n]
    here = mh.ssd(x, dt, A, B, C, 2, D)
    assert_equal({"y": here[0], "state": here[1]}, {"y": y, "state": final})


def test_gradcheck():
    inputs = [t.requires_grad_() for t in scan_inputs(5, B=1, N=2, D=2, G=1, Z=2).values()]
    scan = lambda x, dt, A, B, C, D, state: mh.ssd(x, dt, A, B, C, 2, D, state)  # noqa: E731
    assert torch.autograd.gradcheck(scan, inputs)


def test_a_sequence_in_two_halves():
    """The state of the first half is the initial state of the second."""
    inputs = scan_inputs(20)
    x, dt, A, B, C, D, state = inputs.values()
    y, final = mh.ssd(x, dt, A, B, C, 8, D, state)
    halves = []
    for part in (slice(0, 9), slice(9, 20)):
        y_half, state = mh.ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], 8, D, state)
        halves.append(y_half)
    assert_equal({"y": torch.cat(halves, 1), "state": state}, {"y": y, "state": final})


def test_no_tokens_change_nothing():
    inputs = scan_inputs(0)
    y, state = mh.ssd(**inputs, chunk=4)
    assert y.shape == (2, 0, 4, 3) and torch.equal(state, inputs["initial_state"])


def test_causality():
    """A token changes nothing before it, to the bit."""
    inputs = scan_inputs(20)
    later = {name: x.clone() for name, x in inputs.items()}
    for name in ("x", "dt", "B", "C"):
        later[name][:, 13] += 1
    y, changed = mh.ssd(**inputs, chunk=8)[0], mh.ssd(**later, chunk=8)[0]
    assert torch.equal(y[:, :13], changed[:, :13]) and not torch.equal(y[:, 13:], changed[:, 13:])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_stable_over_65536_tokens(dtype, bound):
    """From steps that keep everything to steps that forget everything: no inf, no NaN, value and gradients near
    float64's. (bf16: y and the gradients are rounded to 8 bits, 0.4 %; inside all is fp32.)"""
    S, N = 65_536, 4
    inputs = scan_inputs(S, B=1, N=N, D=4, G=1, Z=4, state=False)
    inputs["dt"] = torch.logspace(-4, 1, N, dtype=torch.float64) * inputs["dt"].clamp(max=4)
    inputs["A"] = -torch.tensor([0.01, 1.0, 16.0, 100.0], dtype=torch.float64)
    narrow = {name: x.to(torch.float32 if name in ("A", "D") else dtype) for name, x in inputs.items() if x is not None}
    here = values_and_gradients(mh.ssd, narrow, chunk=256)
    exact = values_and_gradients(mh.ssd, {name: x.double() for name, x in narrow.items()}, chunk=256)
    assert here["state"].dtype == torch.float32 and here["y"].dtype == dtype
    for name, x in exact.items():
        assert here[name].isfinite().all(), name
        assert (here[name].double() - x).abs().max() <= bound * x.abs().max(), name


def test_extreme_decays_give_no_nan():
    inputs = scan_inputs(40, N=4, seed=3)
    inputs["dt"] = torch.tensor([1e-6, 1.0, 30.0, 1e3], dtype=torch.float64).expand(2, 40, 4)
    narrow = {name: x.to(torch.float32) for name, x in inputs.items()}
    loop = values_and_gradients(mh.ssd_recurrent, {n: x.double() for n, x in narrow.items()})
    for name, x in values_and_gradients(mh.ssd, narrow, chunk=16).items():
        assert x.isfinite().all() and (x.double() - loop[name]).abs().max() <= 1e-4 * loop[name].abs().max(), name


def test_autocast_does_not_narrow_the_scan():
    """Under autocast products become bf16 unless one says no: forward, and, called inside, ssd's own backward too."""
    inputs = {name: x.to(torch.float32) for name, x in scan_inputs(20).items()}
    expected = values_and_gradients(mh.ssd, inputs, chunk=8)
    with torch.autocast(ranks.device.type, torch.bfloat16):
        here = values_and_gradients(mh.ssd, inputs, chunk=8)
        assert_equal(here, expected, bound=1e-6)  # fp32
        for form in (mh.ssd_quadratic, mh.ssd_recurrent):
            y, state = form(**inputs)
            assert_equal({"y": y, "state": state}, {"y": here["y"], "state": here["state"]}, bound=1e-5)  # fp32


def test_the_scan_keeps_its_inputs_and_a_state_for_each_chunk():
    """x, dt and A; B and C as they are; dt·x and dt·A, of which the products are made; S / Q states."""
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(64, skip=False).items() if x is not None}
    with SavedStorages() as saved:
        mh.ssd(**inputs, chunk=16)
    size = {name: x.nbytes for name, x in inputs.items()}
    assert (
        saved.bytes
        == 2 * size["x"] + 2 * size["dt"] + size["A"] + size["B"] + size["C"] + 4 * size["initial_state"] + 128
    )
    with SavedStorages() as naive:
        mh.ssd_quadratic(**inputs)
    assert naive.bytes > 2 * saved.bytes


# ── 1.2 The convolution ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("S", [1, 2, 3, 9])
@pytest.mark.parametrize("K", [2, 4])
def test_convolution_is_pytorchs(S, K):
    """F.conv1d of the padded input; with the inputs before as well. Value and gradients; also shorter than the taps."""
    u, weight, bias, before = random(2, S, 6), random(6, K, seed=2), random(6, seed=3), random(2, K + 1, 6, seed=4)
    for previous in (None, before):
        leaves = [t.clone().requires_grad_() for t in (u, weight, bias)]
        y = mh.causal_conv1d(*leaves, previous)
        padded = F.pad(leaves[0], (0, 0, K - 1, 0)) if previous is None else torch.cat([before[:, 2:], leaves[0]], 1)
        expected = F.conv1d(padded.mT, leaves[1][:, None], leaves[2], groups=6).mT
        here, there = (torch.autograd.grad(out, leaves, random(2, S, 6, seed=5)) for out in (y, expected))
        names = "u", "weight", "bias"
        assert_equal({"y": y} | dict(zip(names, here)), {"y": expected} | dict(zip(names, there)))


def test_the_last_tap_is_the_newest_token():
    weight = torch.zeros(1, 4, dtype=torch.float64)
    weight[0, 3] = 1
    u = random(1, 6, 1)
    assert torch.equal(mh.causal_conv1d(u, weight, torch.zeros(1, dtype=torch.float64)), u)


# ── 1.3 and 1.4 Layers and model ────────────────────────────────────────────────────────────────────────


def test_rms_norm_is_pytorchs_group_by_group():
    norm = mh.RMSNorm(12, groups=3).double()
    nn.init.normal_(norm.weight)
    x = random(2, 5, 12)
    expected = torch.cat([F.rms_norm(part, (4,), None, 1e-5) for part in x.split(4, -1)], -1) * norm.weight
    assert_equal({"y": norm(x)}, {"y": expected})
    assert torch.equal(norm.to(torch.bfloat16)(x.bfloat16()), norm.float()(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("rope", [0.0, 0.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_written_out(rope, groups):
    """Softmax attention with each group's keys repeated, and rotated pairs (i, i + R/2)."""
    cfg, S = config(attention_groups=groups, rope=rope), 7
    layer, x = mh.Attention(cfg).double(), random(2, S, 24)
    heads = [(proj(x)).view(2, S, -1, 4) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)]
    if rope:
        angle = torch.arange(S, dtype=torch.float64)[:, None]  # R = 2: one pair, which turns by a radian a token
        for t in heads[:2]:
            a, b = t[..., 0].clone(), t[..., 1].clone()
            t[..., 0], t[..., 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    q, k, v = (t.repeat_interleave(4 // t.shape[2], 2).transpose(1, 2) for t in heads)
    weights = (q @ k.mT / 2 + torch.full((S, S), -torch.inf).triu(1)).softmax(-1)
    expected = layer.o_proj((weights @ v).transpose(1, 2).reshape(2, S, -1))
    assert_equal({"y": layer(x)}, {"y": expected})


def test_rotation_depends_on_distance_alone():
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=2)
    scores = [mh.rotate(q, first + 3, 0.5) @ mh.rotate(k, first, 0.5).mT for first in (0, 5, 1000)]
    assert_equal({"5": scores[1], "1000": scores[2]}, {"5": scores[0], "1000": scores[0]})
    assert torch.equal(mh.rotate(q, 9, 0.5)[..., 4:], q[..., 4:]) and mh.rotate(q, 9, 0.0) is q


def test_without_positions_attention_is_blind_to_order():
    """A hybrid's attention layer alone: swap two earlier tokens, and a later one sees the same."""
    layer, x = mh.Attention(config()).double(), random(1, 6, 24)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert_equal({"y": layer(swapped)[:, 2:]}, {"y": layer(x)[:, 2:]})


def test_squared_relu():
    layer, x = mh.SquaredReLUMLP(config()).double(), random(2, 3, 24)
    up = x @ layer.up_proj.weight.T
    assert_equal({"y": layer(x)}, {"y": torch.where(up > 0, up**2, 0) @ layer.down_proj.weight.T})


def test_first_weights():
    """What the published models start from, and a function of the configuration alone."""
    cfg = config(mamba_heads=512, mamba_groups=2, pattern="MM-*")
    weights = dict(mh.initial_weights(cfg))
    model = mh.HybridLM(cfg)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    A, dt = weights["layers.0.mixer.A_log"].exp(), F.softplus(weights["layers.0.mixer.dt_bias"])
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16
    assert (
        0.99e-3 < dt.min() < 1.2e-3
        and 0.08 < dt.max() < 0.101
        and abs(dt.log().mean() - dt.new_tensor(0.01).log()) < 0.2
    )
    conv = weights["layers.0.mixer.conv_weight"]
    assert 0.45 < conv.abs().max() <= 0.5 and abs(conv.std() - 0.5 / 3**0.5) < 0.01
    assert (weights["layers.0.mixer.D"] == 1).all() and (weights["layers.0.norm.weight"] == 1).all()
    for name, std in (("in_proj", 0.02), ("out_proj", 0.01)):  # 1/√4 of it for what writes onto the residual stream
        assert abs(weights[f"layers.0.mixer.{name}.weight"].std() - std) < 0.05 * std
    assert not torch.equal(weights["layers.0.mixer.A_log"], weights["layers.1.mixer.A_log"])
    assert torch.isfinite(mh.Mamba2Mixer(cfg)(torch.randn(1, 5, 24))).all()


# ── Documents that share a sequence ─────────────────────────────────────────────────────────────────────


def test_packed_documents_are_as_if_alone():
    """Logits and gradients of three documents in one sequence equal those of the three by themselves."""
    model, (tokens, targets) = mh.HybridLM(config()).double(), tokens_of(1, 20)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 7, 9]] = True
    parts = [slice(0, 7), slice(7, 9), slice(9, 20)]
    packed = model.loss(tokens, targets, starts)
    grads = torch.autograd.grad(packed.sum(), list(model.parameters()))
    alone = torch.cat([model.loss(tokens[:, part], targets[:, part]) for part in parts], 1)
    expected = torch.autograd.grad(alone.sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert_equal({"loss": packed} | dict(zip(names, grads)), {"loss": alone} | dict(zip(names, expected)))
    assert (model.loss(tokens, targets) - alone).abs().max() > 1e-3


# ── 1.6 Decoding ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompt", [1, 2, 9])
@pytest.mark.parametrize("rope", [0.0, 0.5])
def test_prefill_and_steps_equal_the_full_forward(prompt, rope):
    """Prompts shorter and longer than the convolution, and a prompt that comes in two pieces."""
    model, (tokens, _) = mh.HybridLM(config(rope=rope)).double(), tokens_of(2, 14)
    expected = model(tokens)
    with torch.no_grad():
        for pieces in ([prompt], [1, prompt], [prompt, 3]):
            cache, logits, first = model.new_cache(2, 14), [], 0
            for length in pieces + [1] * (14 - sum(pieces)):
                logits.append(model(tokens[:, first : first + length], cache=cache))
                first += length
            assert_equal({"logits": torch.cat(logits, 1)}, {"logits": expected})


def test_generation_equals_the_full_forward_each_time():
    model, (tokens, _) = mh.HybridLM(config()).double(), tokens_of(2, 5)
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(mh.generate(model, tokens, 6), expected)
    drawn = [mh.generate(model, tokens, 6, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_state_does_not_grow():
    model = mh.HybridLM(config(pattern="M-M"))
    sizes = [sum(t.nbytes for layer in model.new_cache(1, n).layers for t in layer.values()) for n in (1, 1_000_000)]
    assert sizes[0] == sizes[1] > 0


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pattern="M*-E"), r"pattern='M\*-E': write M, \* or - for each layer, and nothing else"),
        (dict(pattern=""), r"pattern='': write M, \* or - for each layer"),
        (dict(mamba_heads=6, mamba_groups=4), "mamba_heads=6 do not divide into mamba_groups=4: choose a multiple"),
        (dict(attention_heads=4, attention_groups=3), "attention_heads=4 do not divide into attention_groups=3"),
        (dict(state_size=0), "state_size=0: it must be at least 1"),
        (dict(conv_kernel=1), "conv_kernel=1: it must be at least 2"),
        (dict(rope=0.25), "rope=0.25 of 4: an even number"),
    ],
)
def test_sizes_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_scan_refuses_groups_that_do_not_divide():
    inputs = scan_inputs(6)
    with pytest.raises(ValueError, match="4 heads in 3 groups, chunk=4: groups divide heads, chunk > 0"):
        mh.ssd(**(inputs | {name: random(2, 6, 3, 5) for name in "BC"}), chunk=4)
    with pytest.raises(ValueError, match="4 heads in 2 groups, chunk=0"):
        mh.ssd(**inputs, chunk=0)


def test_prompts_that_do_not_fit():
    model = mh.HybridLM(config())
    with pytest.raises(ValueError, match=r"an empty prompt, \(2, 0\): begin with at least one token"):
        mh.generate(model, torch.zeros(2, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="9 tokens, but the cache has room for 8"):
        model(torch.zeros(1, 9, dtype=torch.int64), cache=model.new_cache(1, 8))
