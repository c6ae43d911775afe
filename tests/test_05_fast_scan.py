# SPDX-License-Identifier: MIT-0
"""Chapter 5's scan with the backward pass by hand: against the loop, and against the chapter's."""

import functools

import fast_scan as tool
import mamba_hybrid as mh
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import SavedStorages, Shows, assert_differs, assert_equal, plant, worst_of
from scripts import forked
from test_05_mamba_hybrid import (
    LOG_DECAYS,
    check_every_head,
    config,
    forgetful_inputs,
    of_tokens,
    random,
    scan_inputs,
    tokens_of,
    values_and_gradients,
)


@settings(max_examples=30, deadline=None)
@given(
    S=st.integers(1, 40),
    chunk=st.integers(1, 45),
    groups=st.sampled_from([1, 2, 4]),
    state=st.booleans(),
    documents=st.booleans(),
)
def test_it_is_the_chapters_scan(S, chunk, groups, state, documents):
    """Outputs to the bit, every gradient: it may differ from the chapter's in rounding alone."""
    inputs = scan_inputs(S, G=groups, state=state)
    starts = (random(2, S, seed=9) > 1) if documents else None
    expected = values_and_gradients(mh.ssd, inputs, starts=starts, chunk=chunk)
    here = values_and_gradients(tool.fast_ssd, inputs, starts=starts, chunk=chunk)
    assert torch.equal(here["y"], expected["y"]) and torch.equal(here["state"], expected["state"])
    small = ("grad of A", "grad of dt", "grad of initial_state")
    zeros = {
        name: 1e-12 for name in small if name in expected and expected[name].abs().max() < 1e-6
    }
    assert_equal(here, expected, zeros=zeros)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in scan_inputs(5, B=1, N=2, D=2, G=1, Z=2).values()]
    assert torch.autograd.gradcheck(functools.partial(of_tokens, tool.fast_ssd, chunk=2), inputs)


@pytest.mark.parametrize("chunk", [7, 24])
@pytest.mark.parametrize("log_decay", LOG_DECAYS)
def test_gradients_of_heads_that_forget_within_a_token(chunk, log_decay):
    inputs = forgetful_inputs(log_decay)
    check_every_head(values_and_gradients(tool.fast_ssd, inputs, chunk=chunk), inputs)


@pytest.mark.planted_bug(
    symptom="the loss is right, and A of heads that forget at once learns from rounding errors",
    seen_in=None,
)
def test_the_diagonal_kept_in_the_sums():
    """The diagonal of M cancels in exact arithmetic only."""
    dt = torch.full((2, 24, 4), 10.0, dtype=torch.float64)
    inputs = scan_inputs(24) | dict(A=torch.full((4,), -5.0, dtype=torch.float64), dt=dt)
    right = values_and_gradients(mh.ssd_recurrent, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "diagonal", lambda x, **dims: torch.zeros(1))
        wrong = values_and_gradients(tool.fast_ssd, inputs, chunk=8)
    assert_equal({"y": wrong["y"]}, {"y": right["y"]})
    assert "grad of A" in assert_differs(wrong, right, at_least=1e-5)
    return Shows(
        loss=worst_of({"y": wrong["y"]}, {"y": right["y"]}),
        gradients=worst_of(wrong, {"grad of A": right["grad of A"]}),
    )


def test_backward_inside_autocast():
    """It says itself that its GEMMs stay in fp32."""
    inputs = {name: x.to(torch.float32) for name, x in scan_inputs(20).items()}
    expected = values_and_gradients(tool.fast_ssd, inputs, chunk=8)
    with torch.autocast(ranks.device.type, torch.bfloat16):
        here = values_and_gradients(tool.fast_ssd, inputs, autocast=True, chunk=8)
    assert_equal(here, expected, bound=1e-6)  # fp32


def test_it_keeps_what_the_chapters_scan_keeps():
    """The inputs and a state for each chunk."""
    kept = {}
    for name, form in (("fast", tool.fast_ssd), ("plain", mh.ssd)):
        tensors = scan_inputs(64, skip=False)
        inputs = {n: x.requires_grad_() for n, x in tensors.items() if x is not None}
        with SavedStorages() as saved:
            of_tokens(form, **inputs, chunk=16)
        kept[name] = saved.bytes
    assert kept["fast"] == kept["plain"] > 0


def test_no_tokens_and_sizes_that_do_not_fit():
    inputs = scan_inputs(0)
    y, state = of_tokens(tool.fast_ssd, **inputs, chunk=4)
    assert y.shape == (2, 0, 4, 3) and torch.equal(state, inputs["initial_state"])
    with pytest.raises(ValueError, match="4 heads in 2 groups, chunk=0"):
        of_tokens(tool.fast_ssd, **scan_inputs(6), chunk=0)


def test_a_model_with_it():
    """Loss to the bit, every gradient; the cast of a layer for another changes no name."""
    tokens, targets = tokens_of()
    runs = []
    for mixer in (mh.Mamba2Mixer, tool.FastMamba2Mixer):
        model = mh.HybridLM(config(), {**mh.LAYERS, "M": mixer}).double()
        loss = model.loss(tokens, targets)
        loss.sum().backward()
        runs.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(runs[0]["loss"], runs[1]["loss"])
    assert_equal(runs[1], runs[0])


def test_a_wrong_gradient_ends_the_script(capsys):
    """The script's own proof notices the diagonal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "diagonal", lambda x, **dims: torch.zeros(1))
        assert tool.error(-50.0) > 1e-3
    assert all(tool.error(log_decay) < tool.BOUND for log_decay in (-1.0, -50.0))
    args = tool.argparse.Namespace(tokens=8, chunk=4, rounds=1)
    with plant(tool, "error", lambda log_decay: 1e-3), pytest.raises(SystemExit) as left:
        tool.main(args)
    assert "FAILED" in str(left.value.code)


@pytest.mark.slow
def test_the_script():
    result = forked(tool.__file__, "--tokens", "512", "--rounds", "1", timeout=120)
    assert result.returncode == 0 and "ssd / fast_ssd" in result.stdout, result.stderr
    assert forked(tool.__file__, "--chunk", "0").returncode == 2
