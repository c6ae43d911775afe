# SPDX-License-Identifier: MIT-0
"""Chapter 2's notebook: the post-norm block that it shows."""

import importlib.util
from functools import partial
from pathlib import Path

import megatron_tp as tp
import pytest
import ranks
import torch
import torch.distributed as dist
from proof import assert_equal
from torch import nn

SCRIPT = Path(__file__).resolve().parents[1] / "notebooks/results/measure_02_norm.py"
CONFIG = tp.GPTConfig(vocab_size=61, seq_length=16, hidden_size=32, num_layers=2, num_heads=4)


def measurement():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(ranks.device)


def randomize_norms(block):
    for name, p in block.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)


def test_block_in_post_norm_order():
    """LN(x + f(x)), written out."""
    block = measurement().PostNormBlock(CONFIG).double()
    randomize_norms(block)
    x_BSH = random(2, 5, 32)
    y_BSH = block.norm1(x_BSH + block.attention(x_BSH))
    y_BSH = block.norm2(y_BSH + block.mlp(y_BSH))
    assert torch.equal(block(x_BSH), y_BSH)
    assert not torch.equal(block(x_BSH), tp.Block.forward(block, x_BSH))


def test_both_orders_start_from_the_same_weights():
    measure = measurement()
    models = [measure.build(block, CONFIG) for block in (tp.Block, measure.PostNormBlock)]
    for model in models:
        assert_equal(model.state_dict(), tp.GPT(CONFIG).state_dict(), bound=0.0, zeros=ZEROS)
    assert isinstance(models[1].layers[1], measure.PostNormBlock)


ZEROS = {name: 1e-30 for name in tp.parameter_shapes(CONFIG) if name.endswith("bias")}


@pytest.mark.ranks(1, 2, 4)
def test_a_post_norm_block_is_sharded_like_the_other():
    """Forward, the input's gradient and every parameter's, on an odd batch of an odd length."""
    block = measurement().PostNormBlock
    torch.manual_seed(5)
    plain = block(CONFIG).to(ranks.device, torch.float64)
    randomize_norms(plain)
    parallel = block(CONFIG, partial(tp.ColumnParallelLinear), partial(tp.RowParallelLinear))
    parallel.to(ranks.device, torch.float64)
    world, rank = dist.get_world_size(), dist.get_rank()
    full = {"x." + name: p for name, p in plain.state_dict().items()}
    shards = {name: tp.shard_tensor(name, p, CONFIG, rank, world) for name, p in full.items()}
    parallel.load_state_dict({name[2:]: shard for name, shard in shards.items()})

    x_BSH, upstream_BSH = random(3, 7, 32), random(3, 7, 32, seed=2)
    inputs = [x_BSH.clone().requires_grad_() for _ in range(2)]
    expected_BSH, y_BSH = plain(inputs[0]), parallel(inputs[1])
    expected_BSH.backward(upstream_BSH)
    y_BSH.backward(upstream_BSH)
    assert_equal({"y": y_BSH, "x": inputs[1].grad}, {"y": expected_BSH, "x": inputs[0].grad})
    grads = [
        {"x." + name: p.grad for name, p in layer.named_parameters()} for layer in (plain, parallel)
    ]
    assert_equal(tp.gather_state_dict(grads[1], CONFIG), grads[0])
