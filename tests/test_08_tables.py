# SPDX-License-Identifier: MIT-0
"""Chapter 8's tables: bits, layers, parameters, flushed blocks, verdicts."""

import math

import nvfp4 as nf
import nvfp4_tables as tables
import pytest
import torch
from proof import plant


def test_bits_are_those_of_storage():
    x = torch.ones(32, 64)
    assert tables.bits_per_value(x) == tables.format_bits(4, 8, 16) == 4.5
    assert tables.bits_per_value(x, two_d=True) == tables.format_bits(4, 8, 256) == 4.03125


def test_layers_that_stay():
    assert tables.share_kept(nf.STUDY_12B, 62) == pytest.approx(10 / 62)
    assert tables.share_kept(nf.SUPER, 88) == pytest.approx(14 / 88)
    assert tables.share_kept(nf.NVFP4Recipe(first=0, last=0), 5) == 0


def test_published_parameters():
    """To the digits of an independent count."""

    def billions(count):
        return round(count / 1e9, 3)

    assert billions(tables.trunk_parameters(tables.SUPER_120B)) == 120.669
    assert round(tables.trunk_parameters(tables.ULTRA_550B) / 1e9, 1) == 549.3
    assert billions(tables.mtp_parameters(tables.SUPER_120B, 512)) == 2.942
    assert billions(tables.mtp_parameters(tables.SUPER_120B, 22)) == 0.245


def test_the_multi_token_block_written_out():
    H, latent = 4096, 1024
    attention = 2 * H * 32 * 128 + 2 * H * 2 * 128
    experts = 512 * 2 * latent * 2688 + 2 * H * 5376 + 2 * H * latent + 512 * H + 512
    expected = attention + experts + H * 2 * H
    assert tables.mtp_parameters(tables.SUPER_120B, 512) == expected


def test_flushed_blocks_follow_the_formula():
    """A block dies below 2^−10 / 448 of the tensor's amax; a zero block is not flushed."""
    edge = 2.0**-10 / 448
    for factor, share in ((1.01, 0), (0.99, 0.5)):
        x = torch.ones(2, 16)
        x[1] = edge * factor
        assert tables.flushed(x) == share
    assert tables.flushed(torch.tensor([[1.0] * 16, [0.0] * 16])) == 0
    assert tables.flushed(tables.ladder()) == tables.flushed_of_ladder()
    assert tables.flushed_of_ladder() == 1 - (math.floor(32 * 18.8074) + 1) / 1024


def test_errors():
    gauss = tables.distributions()["Gaussian"]
    heavy = tables.distributions()["Student t3"]
    assert round(tables.error(gauss), 3) == 0.095
    assert tables.error(gauss) < tables.error(gauss, two_d=True) < tables.error(heavy, two_d=True)
    assert tables.error(gauss, stochastic=True) > 1.3 * tables.error(gauss)
    assert tables.zeroed(heavy, two_d=True) > 2 * tables.zeroed(heavy) > 0.2


def test_tricks():
    assert tables.error_of_hadamard(False) < 1e-14 and tables.error_of_hadamard(True) > 1
    assert tables.error_of_mean(True) <= 1 / 256 and tables.error_of_mean(False) > 0.49


def test_a_biased_draw_is_seen():
    """With uniforms that never reach the upper half, the mean is off."""
    right = nf.nvfp4_quantize

    def half(x, uniforms):
        return right(x, uniforms=uniforms / 2)

    with plant(tables, "nvfp4_quantize", half):
        assert tables.error_of_mean(True) > 0.4


def test_the_verdict_needs_agreement_or_a_note():
    row = tables.Row
    assert row("c", "1", "1").verdict == "ok" and row("c", "1", "2").verdict == "FAILED"
    assert row("c", "1", "1", note="why").verdict == "FAILED"
    assert row("c", "1", "2", note="why").verdict == "why" and row("c", "1").verdict == "FAILED"


def test_the_page_and_its_exit_code(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nvfp4_tables.py"])
    tables.main()
    page = capsys.readouterr().out
    assert page.count(" ok\n") == 7 and "FAILED" not in page
    with plant(tables, "TABLES", {"x": lambda: [tables.Row("c", "1", "2")]}):
        with pytest.raises(SystemExit) as end:
            tables.main()
    assert end.value.code == 1
