# SPDX-License-Identifier: MIT-0
"""Chapter 13's tables: counts against other formulas, sizes of a rank, bytes that were counted."""

import nemotron3_tables as tables
import pytest
import torch.distributed as dist
from proof import plant


@pytest.fixture(autouse=True)
def without_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_models_are_the_published_ones():
    """Layers of each kind, and the sizes of the reports; experts cost what the papers say."""
    layers = {"Nano": (23, 6, 23), "Super": (40, 8, 40), "Ultra": (48, 12, 48)}
    for name, config in tables.MODELS.items():
        assert tuple(config.pattern.count(letter) for letter in "M*E") == layers[name]
    assert round(tables.counted(tables.NANO) / 1e9, 1) == 31.6
    assert round(tables.active(tables.NANO) / 1e9, 1) == 3.6
    assert round(tables.block_parameters(tables.SUPER) / 1e9, 2) == 2.94


def test_elements_of_a_rank():
    """Built on a simulated group they are the formula's, and all ranks together hold the model."""
    config = tables.NemotronConfig(61, 32, "ME*-", mamba_groups=4, attention_groups=4)
    for tp, ep in ((1, 1), (1, 8), (2, 4), (4, 8), (4, 2)):
        mesh = tables.simulated_mesh(8, tp, ep)
        assert tables.held(config, mesh) >= tables.held_by_formula(config, tp, ep) > 0
    config = tables.replace(config, vocab_size=64)  # no padding
    mesh = tables.simulated_mesh(8, 4, 8)
    assert tables.held(config, mesh) == tables.held_by_formula(config, 4, 8)
    assert tables.held_by_formula(config, 1, 1) == tables.counted(config)
    config = tables.replace(config, attention_groups=2)  # keys and values are replicated
    assert tables.held(config, mesh) == tables.held_by_formula(config, 4, 8)


def test_every_row_agrees_or_says_why():
    for rows in (tables.parameters, tables.messages):
        found = list(rows())
        assert found and all(row.verdict != "FAILED" for row in found)


def test_a_wrong_formula_fails():
    right = tables.layer_bytes
    with plant(tables, "layer_bytes", lambda *args: right(*args) + 1):
        verdicts = [row.verdict for row in tables.messages()]
    assert verdicts.count("FAILED") == 12
    assert tables.Row("claim", "1", here="1", note="why").verdict == "FAILED"
    assert tables.Row("claim", "1", here="2").verdict == "FAILED"
