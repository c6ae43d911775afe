# SPDX-License-Identifier: MIT-0
"""Chapter 13 in FP8 and NVFP4: which layers, equality on ranks, and what is refused."""

import nemotron3 as n3
import precision
import pytest
import ranks
import torch
from proof import assert_equal

SIZES = dict(hidden_size=32, ffn_hidden_size=32, shared_size=32, expert_size=16, init_std=0.1)
SIZES |= dict(mamba_heads=16, mamba_head_size=4, mamba_groups=2, state_size=8, chunk=8)
SIZES |= dict(attention_heads=4, attention_head_size=8, num_experts=8, top_k=2)


def config(**changes) -> n3.NemotronConfig:
    sizes = SIZES | {"pattern": "ME*-E", "mtp_num_layers": 1, "moe_latent_size": 16}
    return n3.NemotronConfig(61, **(sizes | changes))


def batch(B: int = 3) -> n3.Batch:
    ids_2BT = torch.randint(61, (2, B, 16), generator=torch.Generator().manual_seed(0))
    return tuple(ids_2BT.to(ranks.device))


def step(model: n3.NemotronLM) -> dict[str, torch.Tensor]:
    model.to(ranks.device, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    done = next(n3.train(model, optimizer, [batch()], max_norm=1e9))
    return {n: p.grad for n, p in model.named_parameters()} | {"losses": done.losses}


@pytest.mark.ranks(4, timeout=120)
def test_fp8_on_ranks_is_the_single_devices():
    """Losses and every gradient of a step, experts over 4 and over 2 ranks; one replica has no
    sequence. Codes are equal to the bit, so in float64 only sums differ."""
    recipe = precision.FP8Recipe(first=0, last=1)
    there = step(precision.to_fp8(n3.NemotronLM(config()), recipe))
    exact = step(n3.NemotronLM(config()))
    assert (there["losses"] - exact["losses"]).abs().max() > 1e-6  # it is in FP8
    for ep in (4, 2):
        mesh = n3.make_mesh(1, ep, ranks.device)
        here = step(precision.to_fp8(n3.ParallelNemotronLM(config(), mesh), recipe))
        expected = {}
        for name, x in there.items():
            expected[name] = n3.shard_tensor(name, x, config(), mesh) if "." in name else x
        assert_equal(here, expected, 1e-10)


def test_which_layers_are_in_nvfp4():
    """Super's table: Mamba's output in MXFP8; attention, latent and MTP untouched."""
    model = precision.to_nvfp4(n3.NemotronLM(config()), precision.NVFP4Recipe(last=1))
    kinds = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", ".up", ".down", "_latent")) and ".experts" not in name:
            kinds[name] = type(module).__name__
    in_four_bits = {name for name, kind in kinds.items() if kind == "NVFP4Linear"}
    assert in_four_bits == {
        "layers.0.mixer.in_proj",
        "layers.1.mixer.shared.up",
        "layers.1.mixer.shared.down",
        "layers.3.mixer.up_proj",
        "layers.3.mixer.down_proj",
    }
    assert kinds["layers.0.mixer.out_proj"] == "FP8Linear"
    assert model.layers[0].mixer.out_proj.recipe == precision.MXFP8
    assert isinstance(model.layers[1].mixer.experts.gemm, precision.partial)
    for layer in (model.layers[4], model.mtp[0].layers[1]):
        assert layer.mixer.experts.gemm is n3.grouped_gemm
    losses, _ = model.loss_and_balance(*batch(2))
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    plain = n3.NemotronLM(config()).loss(*batch(2))
    gap = (losses - plain).abs().max()
    assert 1e-6 < gap < 0.1 * plain.max()


def test_experts_in_nvfp4_by_hand():
    """Each expert's GEMM is that of its rounded rows and weight; rows are padded, one has none."""
    rounding = precision.ExpertRounding(precision.NVFP4Recipe(stochastic=False))
    x_RH = torch.randn(21, 32, dtype=torch.float64, requires_grad=True)
    weight_EFH = torch.randn(3, 16, 32, dtype=torch.float64, requires_grad=True)
    counts = [5, 0, 16]
    y_RF = precision.nvfp4_grouped_gemm(x_RH, weight_EFH, counts, rounding)
    expected = []
    for rows, weight in zip(x_RH.detach().split(counts), weight_EFH.detach()):
        if len(rows):
            a = precision.nvfp4_dequantize(precision.nvfp4_quantize(rows), torch.float64)
            b = precision.nvfp4_dequantize(precision.nvfp4_quantize(weight, True), torch.float64)
            expected.append(a @ b.mT)
    assert_equal({"y": y_RF}, {"y": torch.cat(expected)}, 1e-12)
    y_RF.sum().backward()
    assert x_RH.grad.isfinite().all() and not weight_EFH.grad[1].any()
    for wrong in ([5, 0, 15], [5, 16]):
        with pytest.raises(ValueError, match="are not 21 rows for 3 experts"):
            precision.nvfp4_grouped_gemm(x_RH, weight_EFH, wrong, rounding)


def test_what_is_refused():
    """Before anything is changed."""
    model = n3.NemotronLM(config())
    model.mesh = n3.Mesh(tp=2)
    for convert, recipe in (
        (precision.to_fp8, precision.FP8Recipe()),
        (precision.to_nvfp4, precision.NVFP4Recipe()),
    ):
        with pytest.raises(ValueError, match="with tp=2: not written; use tp=1"):
            convert(model, recipe)
    model = n3.NemotronLM(config(expert_size=12))
    with pytest.raises(ValueError, match=r"experts of \(8, 12, 16\): NVFP4 needs multiples of 16"):
        precision.to_nvfp4(model, precision.NVFP4Recipe())
    assert not any(isinstance(x, precision.NVFP4Linear) for x in model.modules())
    with pytest.raises(ValueError, match="covers none"):
        precision.to_nvfp4(n3.NemotronLM(config()), precision.NVFP4Recipe(last=5))
