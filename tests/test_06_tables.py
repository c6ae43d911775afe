# SPDX-License-Identifier: MIT-0
"""Chapter 6's tables: counts, bytes, the schedule, verdicts."""

import math

import moe_fp8 as moe
import moe_fp8_tables as tables
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import plant


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.text("*E", max_size=4),
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    experts=st.integers(2, 6),
    shared=st.integers(0, 7),
    latent=st.integers(0, 9),
)
def test_the_formula_counts_this_chapters_model(
    pattern, groups, heads, size, experts, shared, latent
):
    cfg = moe.MoEConfig(
        vocab_size=13,
        hidden_size=12,
        pattern=pattern + "E",
        num_heads=groups * heads,
        num_kv_heads=groups,
        head_size=size,
        num_experts=experts,
        expert_size=5,
        shared_size=shared,
        moe_latent_size=latent,
    )
    count = tables.parameter_count(tables.published_of(cfg))
    assert count.total == sum(shape.numel() for shape in moe.state_shapes(cfg).values())
    layers = cfg.pattern.count("E")
    assert count.active == count.total - layers * (experts - cfg.top_k) * 2 * (latent or 12) * 5
    assert count.active_without_table == count.active - 13 * 12
    assert count.routers == layers * experts * 13


@pytest.mark.parametrize(
    "name, total, active, without_table",
    [
        ("Nano", 31.578, 3.580, 3.228),
        ("Super", 120.669, 12.770, 12.233),
        ("Ultra", 549.3, 56.1, 55.0),
    ],
)
def test_published_parameters(name, total, active, without_table):
    """To the digits of an independent count."""
    count = tables.parameter_count(tables.MODELS[name])
    here = [x / 1e9 for x in (count.total, count.active, count.active_without_table)]
    digits = 3 if name != "Ultra" else 1
    assert [round(x, digits) for x in here] == [total, active, without_table]


def test_supers_routers_explain_the_printed_counts():
    count = tables.parameter_count(tables.SUPER)
    less = [count.total, count.active, count.active_without_table]
    assert tables.billions(*(x - count.routers for x in less)) == "120.6B / 12.7B / 12.1B"
    assert tables.billions(*less) != "120.6B / 12.7B / 12.1B"


def test_published_layers():
    kinds = {n: [m.pattern.count(kind) for kind in "M*E"] for n, m in tables.MODELS.items()}
    assert kinds == {"Nano": [23, 6, 23], "Super": [40, 8, 40], "Ultra": [48, 12, 48]}


def test_all_to_all_bytes():
    """Elements of a token in one direction: 6 × 2688 in Nano, 22 × 1024 in Super."""
    assert tables.all_to_all_bytes(tables.SUPER, 2, 1) == 4 * 22 * 1024 / 2
    assert tables.all_to_all_bytes(tables.NANO, 8) == 4 * 6 * 2688 * 2 * 7 / 8
    assert tables.all_to_all_bytes(tables.published_of(moe.MoEConfig()), 1) == 0


def test_elements_sent():
    """The white paper's pair, 24,576 and 22,528 a token, from the layer that this chapter builds;
    and 512 experts in a quarter of the width have as many parameters as 128 in all of it.
    """
    sizes = dict(hidden_size=4096, num_experts=32, expert_size=2)
    assert tables.elements_sent(moe.MoEConfig(top_k=6, **sizes)) == 24_576
    latent = moe.MoEConfig(top_k=22, moe_latent_size=1024, **sizes)
    assert tables.elements_sent(latent) == 22_528
    assert tables.all_to_all_bytes(tables.SUPER, 2, 1) == 4 * 22_528 / 2
    with torch.device("meta"):
        wide, narrow = (
            moe.Experts(moe.MoEConfig(4096, 4096, num_experts=n, moe_latent_size=latent))
            for n, latent in ((128, 0), (512, 1024))
        )
    assert sum(p.numel() for p in wide.parameters()) == sum(p.numel() for p in narrow.parameters())


def test_the_schedules_floor_is_never_above_its_peak():
    small = [tables.learning_rate(step, 60, 1e-6) for step in range(60)]
    assert max(small) == small[-1] == 1e-6 and small[0] == pytest.approx(1e-7)
    usual = [tables.learning_rate(step, 60, 3e-3) for step in range(61)]
    assert max(usual) == 3e-3 and usual[60] == pytest.approx(1e-5)
    assert usual[54] == pytest.approx(1e-5 + (3e-3 - 1e-5) * (1 - math.sqrt(0.5)))


def test_the_verdict_needs_agreement_or_a_note():
    row = tables.Row
    assert row("c", "1", "1").verdict == "ok" and row("c", "1", "2").verdict == "FAILED"
    assert row("c", "1", "1", note="why").verdict == "FAILED"
    assert row("c", "1", "2", note="why").verdict == "why" and row("c", "1").verdict == "FAILED"


def test_the_page_and_its_exit_code(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moe_fp8_tables.py"])
    tables.main()
    page = capsys.readouterr().out
    assert page.count(" ok\n") == 6 and "FAILED" not in page
    with plant(tables, "TABLES", {"x": lambda: [tables.Row("c", "1", "2")]}):
        with pytest.raises(SystemExit) as end:
            tables.main()
    assert end.value.code == 1
