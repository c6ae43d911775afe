# SPDX-License-Identifier: MIT-0
"""Chapter 2 equals the single device: every layer and the model, forward, backward and training.

A test marked `ranks` runs on every rank of that world. References are the plain model of the
chapter, PyTorch, or a formula written out in the test.
"""

import copy
import dataclasses
import importlib
import inspect
import math
import os
import runpy
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import megatron_tp as tp
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import (
    Events,
    SavedStorages,
    Shapes,
    Shows,
    assert_differs,
    assert_equal,
    plant,
    worst_of,
)
from torch import Tensor, nn

SCRIPT = Path(tp.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)
BF16 = torch.bfloat16


# ── Helpers ─────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> tp.GPTConfig:
    sizes = {"vocab_size": 61, "seq_length": 16, "hidden_size": 32, "num_layers": 2}
    return tp.GPTConfig(**(sizes | changes))


def on_device(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    return module.to(ranks.device, dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(ranks.device)


def batch_of(rows: int = 3, length: int = 13, vocab: int = 61, seed: int = 1):
    """Token ids and targets; most targets of the first row are −100."""
    generator = torch.Generator().manual_seed(seed)
    both_2BS = torch.randint(vocab, (2, rows, length), generator=generator)
    tokens_BS, targets_BS = both_2BS.to(ranks.device)
    targets_BS[0, 3:] = -100
    return tokens_BS, targets_BS


@lru_cache
def mesh_of(degree: int) -> tp.Mesh:
    """Made once in a world: process groups are never freed."""
    return tp.make_mesh(degree, ranks.device)


def all_ranks(value, group=None) -> list:
    """The value of every rank of the group, in order."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def on_cpu(tensors: dict) -> dict:
    return {name: x.detach().cpu() for name, x in tensors.items()}


def merged(tensors: dict, cfg: tp.GPTConfig, group=None) -> dict:
    """The shards of all ranks, merged to full tensors; as arrays, which pickle is quick with."""
    arrays = {name: x.numpy() for name, x in on_cpu(tensors).items()}
    shards = [
        {name: torch.from_numpy(x) for name, x in shard.items()}
        for shard in all_ranks(arrays, group)
    ]
    return tp.merge_state_dicts(shards, cfg)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def models(
    cfg: tp.GPTConfig, group=None, change: Callable | None = None
) -> tuple[tp.GPT, tp.ParallelGPT]:
    """Plain and parallel model; change(name, x) gives their weights in place of the initial x."""
    plain, parallel = on_device(tp.GPT(cfg)), on_device(tp.ParallelGPT(cfg, group))
    if change:
        full = {name: change(name, x) for name, x in plain.state_dict().items()}
        plain.load_state_dict(full)
        shards = tp.shard_state_dict(full, cfg, tp.group_rank(group), tp.group_size(group))
        parallel.load_state_dict(shards)
    return plain, parallel


def change_vectors(name: str, x: Tensor) -> Tensor:
    """Biases and norms start at 0 and 1, which hides mistakes."""
    return x + 0.1 * random(*x.shape, seed=len(name)) if x.ndim == 1 else x


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return tp.make_optimizer(model, lr)


@dataclasses.dataclass
class Comparison:
    """Loss and full gradients of a model, and those of the plain model; all on the CPU."""

    loss: Tensor
    grads: dict
    expected: Tensor
    reference: dict

    def __post_init__(self):
        self.loss = self.loss.detach().cpu()
        self.expected = self.expected.detach().cpu()
        self.reference = on_cpu(self.reference)

    def assert_equal(self) -> None:
        self.assert_equal_loss()
        assert_equal(self.grads, self.reference)

    def assert_equal_loss(self) -> None:
        assert_equal({"loss": self.loss}, {"loss": self.expected})

    def shows(self) -> Shows:
        loss = self.loss.sum() / self.expected.sum() - 1
        return Shows(loss=abs(loss.item()), gradients=worst_of(self.grads, self.reference))


def compare(
    cfg: tp.GPTConfig, batch: tuple | None = None, change: Callable | None = None
) -> Comparison:
    """Both models, forward and backward, on all ranks.

    Where replicated gradients differ between ranks, those of rank 0 are compared.
    Args: batch: what this rank's parallel model gets in place of the plain model's batch.
        change(name, x): of every weight.
    """
    plain, parallel = models(cfg, None, change)
    tokens_BS, targets_BS = batch_of(vocab=cfg.vocab_size)
    loss = parallel.loss(*(batch or (tokens_BS, targets_BS)))
    loss.sum().backward()
    expected = plain.loss(tokens_BS, targets_BS)
    expected.sum().backward()
    shards = all_ranks(on_cpu(grads_of(parallel)))
    for shard in shards[1:]:
        shard.update({name: x for name, x in shards[0].items() if tp.shard_dim(name) is None})
    return Comparison(loss, tp.merge_state_dicts(shards, cfg), expected, grads_of(plain))


# ── 1.1 The operators ───────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_copy_and_reduce_forward_and_backward():
    """f and g against their rows of the table, written out with the tensors of all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = random(3, 8)
    per_rank = [random(3, 8, seed=10 + r) for r in range(world)]

    a = x.clone().requires_grad_()
    y = tp.copy_to_tp(a)
    y.backward(per_rank[rank])
    assert torch.equal(y, x)
    assert_equal({"copy": a.grad}, {"copy": sum(per_rank)})

    a = per_rank[rank].clone().requires_grad_()
    y = tp.reduce_from_tp(a)
    y.backward(x)
    assert_equal({"reduce": y}, {"reduce": sum(per_rank)})
    assert torch.equal(a.grad, x)
    assert torch.equal(a, per_rank[rank]), "the input was modified"


@EVERY_WORLD
def test_scatter_and_gather_forward_and_backward():
    world, rank = dist.get_world_size(), dist.get_rank()
    x = random(3, 8)
    size = 8 // world
    shard = slice(size * rank, size * (rank + 1))

    a = x.clone().requires_grad_()
    y = tp.scatter_to_tp(a)
    y.backward(x[:, shard] * (rank + 1))
    factors = torch.arange(1, world + 1, device=x.device).repeat_interleave(size)
    assert torch.equal(y, x[:, shard])
    assert torch.equal(a.grad, x * factors)

    a = x[:, shard].clone().requires_grad_()
    upstream = random(3, 8, seed=2)
    y = tp.gather_from_tp(a)
    y.backward(upstream)
    assert torch.equal(y, x)
    assert torch.equal(a.grad, upstream[:, shard])


def test_without_a_process_group_there_is_one_rank():
    """Every public function works in a process without process groups."""
    assert not dist.is_initialized()
    x = random(2, 3, 8)
    for operator in (tp.copy_to_tp, tp.reduce_from_tp, tp.scatter_to_tp, tp.gather_from_tp):
        assert operator(x) is x
    plain, parallel = tp.GPT(config()), tp.ParallelGPT(config())
    batch = batch_of()
    assert torch.equal(plain(batch[0]), parallel(batch[0]))
    alone = [loss for loss, _ in tp.train_alone(plain, adamw(plain), [batch] * 3)]
    steps = tp.train(parallel, adamw(parallel), [batch] * 3, tp.Mesh())
    losses = [loss for loss, _ in steps]
    # fp32, and the two losses are different kernels
    assert_equal(dict(enumerate(losses)), dict(enumerate(alone)), bound=1e-6)


@pytest.mark.ranks(2, 4)
def test_second_derivatives_are_right_or_refused():
    """Right through the operators. Refused by the two Functions with a hidden collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = random(3, 8).requires_grad_()
    total = world * (world + 1) / 2  # 1 + 2 + ...: rank r multiplies its partial sum by r + 1
    cases = {
        "copy, reduce": (
            lambda x: tp.reduce_from_tp((rank + 1) * tp.copy_to_tp(x) ** 3),
            lambda x: total * x**3,
        ),
        "scatter, gather": (lambda x: tp.gather_from_tp(tp.scatter_to_tp(x) ** 3), lambda x: x**3),
    }
    found, reference = {}, {}
    for name, functions in cases.items():
        for function, grads in zip(functions, (found, reference)):
            (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
            (grads[name],) = torch.autograd.grad(first.pow(2).sum(), x)
    assert_equal(found, reference)

    layer = on_device(tp.ColumnParallelLinear(8, 12))
    targets_B = torch.zeros(3, dtype=torch.int64, device=x.device)
    outputs = layer(x), tp.vocab_parallel_cross_entropy(x, targets_B)
    for output in outputs:
        (first,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.pow(2).sum().backward()


# ── Process groups: misuse, and what NCCL demands ───────────────────────────────────────────────


def group_calls() -> dict[str, Callable]:
    """A call of every public function that takes a group, by name."""
    x = random(4, 8)
    ids = torch.zeros(4, dtype=torch.int64, device=ranks.device)
    p = nn.Parameter(random(4))
    p.grad = random(4)
    weights = {"final_norm.weight": random(4)}
    return {
        "group_size": tp.group_size,
        "group_rank": tp.group_rank,
        "copy_to_tp": partial(tp.copy_to_tp, x),
        "reduce_from_tp": partial(tp.reduce_from_tp, x),
        "scatter_to_tp": partial(tp.scatter_to_tp, x),
        "gather_from_tp": partial(tp.gather_from_tp, x),
        "ColumnParallelLinear": partial(tp.ColumnParallelLinear, 8, 8),
        "RowParallelLinear": partial(tp.RowParallelLinear, 8, 8),
        "VocabParallelEmbedding": partial(tp.VocabParallelEmbedding, 8, 8),
        "vocab_parallel_cross_entropy": partial(tp.vocab_parallel_cross_entropy, x, ids),
        "ParallelGPT": partial(tp.ParallelGPT, config()),
        "gather_state_dict": partial(tp.gather_state_dict, weights, config()),
        "sum_gradients": partial(tp.sum_gradients, [p]),
        "clip_grad_norm_": partial(tp.clip_grad_norm_, [p], 1.0, sharded=[p]),
    }


@pytest.mark.ranks(2)
def test_a_rank_outside_the_group_is_refused():
    """torch answers −1 for its size there: local values would pass for sums over the group."""
    first_alone = dist.new_group([0])
    alone = mesh_of(1).tp_group
    calls = group_calls()
    for name, value in vars(tp).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == tp.__name__:
            takes_group = "group" in inspect.signature(value).parameters
            assert takes_group == (name in calls) or name == "Message", name
    if dist.get_rank() == 1:
        for name, call in calls.items():
            with pytest.raises(ValueError, match="rank 1 is not in the process group"):
                call(group=first_alone)
                pytest.fail(f"{name} accepts a group without this rank")
        model = on_device(tp.ParallelGPT(config(), alone))
        for outside in ({"tp_group": first_alone}, {"dp_group": first_alone}):
            mesh = tp.Mesh(**({"tp_group": alone, "dp_group": alone} | outside))
            with pytest.raises(ValueError, match="rank 1 is not in the process group"):
                next(tp.train(model, adamw(model), [batch_of()], mesh))


@contextmanager
def contiguous_collectives() -> Iterator[list]:
    """Inside, collectives refuse what NCCL refuses: tensors that are not contiguous."""
    calls = []

    def demanding(collective: Callable) -> Callable:
        def call(*args, **keywords):
            calls.append(collective.__name__)
            for x in torch.utils._pytree.tree_leaves((args, keywords)):
                assert not isinstance(x, Tensor) or x.is_contiguous(), "Tensors must be contiguous"
            return collective(*args, **keywords)

        return call

    with plant(dist, "all_reduce", demanding(dist.all_reduce)):
        with plant(dist, "all_gather", demanding(dist.all_gather)):
            yield calls


def transposed(*shape: int, seed: int = 1) -> Tensor:
    """Of this shape, with the last two dimensions swapped in memory."""
    *leading, a, b = shape
    return random(*leading, b, a, seed=seed).mT


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "name", ["copy_to_tp", "reduce_from_tp", "scatter_to_tp", "gather_from_tp"]
)
def test_operators_send_contiguous_tensors(name):
    x = transposed(2, 4, 6).requires_grad_()
    operator = getattr(tp, name)
    with contiguous_collectives() as calls:
        y = operator(x)
        y.backward(transposed(*y.shape, seed=2))
    right = operator(x.detach().contiguous().requires_grad_())
    assert torch.equal(y, right)
    assert len(calls) == 1


@pytest.mark.ranks(2)
def test_layers_and_loss_send_contiguous_tensors():
    """With transposed inputs and gradients: gloo accepts them, NCCL does not."""
    shard = transposed(2, 4, 4).requires_grad_()
    tokens_BS = torch.arange(8, device=ranks.device).view(2, 4)
    targets_BS = tokens_BS.T.contiguous().T
    layers = {
        "column": (on_device(tp.ColumnParallelLinear(8, 12)), transposed(2, 4, 8)),
        "gathered": (on_device(tp.ColumnParallelLinear(8, 12, gather_output=True)), random(4, 8)),
        "row": (on_device(tp.RowParallelLinear(8, 12)), shard),
        "replicated": (on_device(tp.RowParallelLinear(8, 12, True, False)), transposed(2, 4, 8)),
        "embedding": (on_device(tp.VocabParallelEmbedding(8, 6)), tokens_BS),
    }
    logits = {
        "logits": transposed(2, 4, 8),
        "logits of (S, B)": random(4, 2, 8).transpose(0, 1),
        "logits of (v, B)": random(8, 2, 4).permute(1, 2, 0),
    }
    with contiguous_collectives() as calls:
        for layer, x in layers.values():
            if x.is_floating_point():
                x = x.detach().requires_grad_()
            y = layer(x)
            y.backward(transposed(*y.shape, seed=2))
        for x_BSv in logits.values():
            x_BSv.requires_grad_()
            loss_BS = tp.vocab_parallel_cross_entropy(x_BSv, targets_BS)
            loss_BS.backward(transposed(*loss_BS.shape, seed=2))
    assert {"all_reduce", "all_gather"} == set(calls)


@pytest.mark.ranks(4)
def test_a_training_step_sends_contiguous_tensors():
    mesh = mesh_of(2)
    model = on_device(tp.ParallelGPT(config(), mesh.tp_group))
    with contiguous_collectives() as calls:
        list(tp.train(model, adamw(model), [batch_of()] * 2, mesh))
    assert calls


# ── 1.2 Linear layers ───────────────────────────────────────────────────────────────────────────

LINEAR = {
    "column": tp.ColumnParallelLinear,
    "column, gathered": partial(tp.ColumnParallelLinear, gather_output=True),
    "row": tp.RowParallelLinear,
    "row, replicated input": partial(tp.RowParallelLinear, input_is_parallel=False),
}


@EVERY_WORLD
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 3)], ids=str)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers(kind, shape, bias):
    """From one seed equal to nn.Linear to the bit; then outputs and every gradient."""
    world, rank = dist.get_world_size(), dist.get_rank()

    def shard(x: Tensor, dim: int = -1) -> Tensor:
        return x.chunk(world, dim)[rank]

    torch.manual_seed(3)
    plain = nn.Linear(8, 12, bias)
    torch.manual_seed(3)
    parallel = LINEAR[kind](8, 12, bias)
    dim = 0 if kind.startswith("column") else 1
    assert torch.equal(parallel.weight, shard(plain.weight, dim))
    plain, parallel = on_device(plain), on_device(parallel)

    x = random(*shape, 8).requires_grad_()
    upstream = random(*shape, 12, seed=2)
    expected = plain(x)
    expected.backward(upstream)

    sharded_input, sharded_output = kind == "row", kind == "column"
    local = shard(x.detach()) if sharded_input else x.detach()
    local = local.clone().requires_grad_()
    y = parallel(local)
    y.backward(shard(upstream) if sharded_output else upstream)

    here = {"y": y, "x": local.grad, **grads_of(parallel)}
    there = {
        "y": shard(expected) if sharded_output else expected,
        "x": shard(x.grad) if sharded_input else x.grad,
        "weight": shard(plain.weight.grad, dim),
    }
    if bias:
        there["bias"] = shard(plain.bias.grad) if dim == 0 else plain.bias.grad
    assert here.keys() == there.keys()
    if 0 in shape:  # an empty batch: the shapes agree and the gradients of weights are zero
        assert all(here[name].shape == there[name].shape for name in there)
        assert not any(here[name].any() for name in there)
    else:
        assert_equal(here, there)


@pytest.mark.ranks(2)
def test_column_backward_overlaps_its_all_reduce():
    """The input's gradient, its all-reduce, the weight's gradient, and only then the wait."""
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    x = random(2, 3, 8).requires_grad_()
    y = layer(x)
    with Events() as events:
        y.sum().backward()
    assert events.order == ["product", "all_reduce", "product", "wait"]


@pytest.mark.ranks(2)
def test_nothing_is_computed_for_tensors_without_gradient():
    """A frozen weight costs no GEMM, and an input without gradient no all-reduce."""
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    with Events() as events:
        layer(random(2, 8)).sum().backward()
    assert "all_reduce" not in events.order
    layer.requires_grad_(False)
    x = random(2, 8).requires_grad_()
    y = layer(x)
    with Events() as events:
        y.sum().backward()
    assert events.order == ["product", "all_reduce", "wait"]
    with torch.no_grad(), Events() as events:
        layer(x)
    assert events.order == ["product"]


@pytest.mark.ranks(2)
def test_a_layer_keeps_only_its_shard():
    """Shards are copies: a view would keep the full weight in memory. Padding rows are zero."""
    column, row = tp.ColumnParallelLinear(8, 12), tp.RowParallelLinear(8, 12)
    embedding = tp.VocabParallelEmbedding(7, 6)
    for p in (column.weight, column.bias, row.weight, embedding.weight):
        assert p.untyped_storage().nbytes() == p.nbytes
    x = tp.scatter_to_tp(random(3, 8))
    assert x.untyped_storage().nbytes() == x.nbytes
    assert embedding.weight.shape == (4, 6)
    if dist.get_rank() == 1:
        assert not embedding.weight[3].any()


@pytest.mark.ranks(2)
def test_operators_on_a_transposed_tensor():
    x = transposed(4, 3)
    assert torch.equal(tp.gather_from_tp(x), torch.cat([x, x], -1))
    assert torch.equal(tp.reduce_from_tp(x), 2 * x)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LINEAR)
def test_dtypes_under_autocast(kind, bias):
    """Outputs and gradients have nn.Linear's dtypes; float64 is not downcast."""
    for dtype in (torch.float32, torch.float64):
        layer = on_device(LINEAR[kind](8, 12, bias), dtype)
        width = 8 // dist.get_world_size() if kind == "row" else 8
        x = random(3, width).to(dtype).requires_grad_()
        plain = on_device(nn.Linear(8, 12, bias), dtype)
        with torch.autocast(ranks.device.type, BF16):
            y = layer(x)
            expected = plain(random(3, 8).to(dtype))
        y.sum().backward()
        assert y.dtype == expected.dtype
        assert x.grad.dtype == dtype
        assert {p.grad.dtype for p in layer.parameters()} == {dtype}


# ── 1.3 Attention, feed-forward layer, block ────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
def test_layers(part):
    """Weights from one seed, output, and every gradient; an odd batch, an odd length."""

    def build(*matrices) -> nn.Module:
        torch.manual_seed(5)
        block = tp.Block(config(), *matrices)
        parts = {"attention": block.attention, "mlp": block.mlp, "block": block}
        return on_device(parts[part])

    plain = build()
    parallel = build(tp.ColumnParallelLinear, tp.RowParallelLinear)
    full = merged(parallel.state_dict(), config())
    assert all(torch.equal(full[name], x.cpu()) for name, x in plain.state_dict().items())

    upstream = random(3, 7, 32, seed=2)
    a, b = random(3, 7, 32).requires_grad_(), random(3, 7, 32).requires_grad_()
    expected, y = plain(a), parallel(b)
    expected.backward(upstream)
    y.backward(upstream)
    assert_equal({"y": y, "x": b.grad}, {"y": expected, "x": a.grad})
    assert_equal(merged(grads_of(parallel), config()), grads_of(plain))


def test_plain_attention_equals_pytorchs():
    """Against nn.MultiheadAttention, whose fused rows are ordered ({q, k, v}, head, D)."""
    cfg = config(hidden_size=12, num_heads=3)
    ours = tp.Attention(cfg).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    rows = torch.arange(36).view(3, 3, 4)  # (head, three, D)
    order = rows.transpose(0, 1).flatten()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight[order])
        theirs.in_proj_bias.copy_(ours.qkv.bias[order])
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = random(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True)
    assert_equal({"y": ours(x)}, {"y": expected})


def test_a_block_written_out():
    """x + f(LN(x)), twice."""
    block = tp.Block(config()).double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = random(2, 5, 32)
    y = x + block.attention(block.norm1(x))
    y = y + block.mlp(block.norm2(y))
    assert torch.equal(block(x), y)


def test_attention_written_out_equals_the_fused_kernel():
    """With a probability too small to drop an element, the two paths agree."""
    q, k, v = (random(2, 3, 7, 4, seed=seed) for seed in (1, 2, 3))
    written_out = tp.core_attention(q, k, v, tp.Dropout(1e-15))
    assert_equal({"y": written_out}, {"y": tp.core_attention(q, k, v, tp.Dropout(0.0))})


def test_attention_in_fp16_with_large_queries():
    """q · k is 160,000, above fp16's largest number, and its score 20,000 below it."""
    q = torch.full((1, 1, 3, 64), 50.0, dtype=torch.float16)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)[:, None].expand(q.shape)
    y = tp.core_attention(q, q, v, tp.Dropout(1e-15))
    assert y[0, 0, :, 0].tolist() == [1.0, 1.5, 2.0]


# ── 1.4 The embedding ───────────────────────────────────────────────────────────────────────────

# On 4 ranks: with 5 entries one rank holds padding alone, with 1 entry three ranks do.
VOCABULARIES = pytest.mark.parametrize("vocab", [1, 5, 6, 61, 64])


@EVERY_WORLD
@VOCABULARIES
def test_embedding(vocab):
    torch.manual_seed(3)
    plain = on_device(nn.Embedding(vocab, 6))
    torch.manual_seed(3)
    parallel = on_device(tp.VocabParallelEmbedding(vocab, 6))
    tokens_BS, _ = batch_of(vocab=vocab)
    upstream = random(3, 13, 6)
    y, expected = parallel(tokens_BS), plain(tokens_BS)
    y.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(y, expected)
    grads = merged({"embedding.weight": parallel.weight.grad}, config(vocab_size=vocab))
    assert_equal(grads, {"embedding.weight": plain.weight.grad})


@pytest.mark.ranks(2)
def test_rows_of_other_ranks_are_not_multiplied_by_zero():
    """0 · NaN is NaN: a NaN in a row that nothing looks up would enter every rank's sum."""
    embedding = on_device(tp.VocabParallelEmbedding(6, 4))
    with torch.no_grad():
        embedding.weight[0] = torch.nan if dist.get_rank() else 1.0
    x = embedding(torch.zeros(1, 2, dtype=torch.int64, device=ranks.device))
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.ranks(4)
def test_a_vocabulary_must_fit_its_group():
    """A group of two ranks of four holds 2·v columns, not 4·v."""
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="vocab_size=12, but the group holds 8 columns"):
        tp.vocab_parallel_cross_entropy(torch.zeros(2, 4), targets, mesh_of(2).tp_group, 12)


def test_padded_vocabulary():
    """50,257 entries on 8 ranks become 51,200, as in the paper's section 5.1."""
    assert tp.padded_vocab_size(50_257, 8, 128) == 51_200
    assert tp.padded_vocab_size(50_257, 1, 128) == 50_304
    assert tp.padded_vocab_size(51_200, 8, 128) == 51_200
    assert tp.padded_vocab_size(5, 4) == 8


# ── 1.5 Vocab-parallel cross entropy ────────────────────────────────────────────────────────────


def shard_logits(logits: Tensor) -> Tensor:
    """This rank's columns; padding columns hold 50, which must not be looked at."""
    world = dist.get_world_size()
    padding = tp.padded_vocab_size(logits.shape[-1], world) - logits.shape[-1]
    padded = F.pad(logits.detach(), (0, padding), value=50.0)
    return padded.chunk(world, -1)[dist.get_rank()].contiguous()


def plain_loss(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    logits = logits.transpose(1, 2)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


@EVERY_WORLD
@VOCABULARIES
@pytest.mark.parametrize("ignored", [-100, 0])
def test_loss(vocab, ignored):
    """Value and gradient of F.cross_entropy, also where ignore_index is a token id."""
    logits = random(3, 13, vocab).requires_grad_()
    _, targets = batch_of(vocab=vocab)
    targets = torch.where(targets == -100, ignored, targets)
    expected = plain_loss(logits, targets, ignored)
    upstream = random(3, 13, seed=2)
    expected.backward(upstream)

    local = shard_logits(logits)
    before = local.clone()
    local.requires_grad_()
    loss = tp.vocab_parallel_cross_entropy(local, targets, None, vocab, ignored)
    loss.backward(upstream)
    assert torch.equal(local, before), "the caller's logits were modified"
    full = torch.cat(all_ranks(local.grad.cpu()), -1)
    assert not full[..., vocab:].any(), "padding has a gradient"
    # One entry: its probability is 1, so loss and gradient are zero.
    zeros = {"loss": 1e-12, "grad": 1e-12} if vocab == 1 else {}
    found = {"loss": loss, "grad": full[..., :vocab]}
    assert_equal(found, {"loss": expected, "grad": logits.grad}, zeros=zeros)


@pytest.mark.ranks(2)
def test_loss_of_extreme_logits():
    """±10,000 stays finite, as in F.cross_entropy."""
    logits = random(2, 5, 8) * 1e4
    _, targets = batch_of(2, 5, vocab=8)
    loss = tp.vocab_parallel_cross_entropy(shard_logits(logits), targets)
    assert_equal({"loss": loss}, {"loss": plain_loss(logits, targets)})


@pytest.mark.ranks(2)
def test_loss_of_bf16_logits():
    """An fp32 loss and a bf16 gradient."""
    logits = random(2, 5, 8).to(BF16)
    _, targets = batch_of(2, 5, vocab=8)
    local = shard_logits(logits).requires_grad_()
    loss = tp.vocab_parallel_cross_entropy(local, targets)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert local.grad.dtype == BF16
    expected = plain_loss(logits.float(), targets)
    assert_equal({"loss": loss}, {"loss": expected}, bound=1e-6)  # fp32


@pytest.mark.ranks(1, 2)
def test_an_ignored_target_blocks_an_infinite_gradient():
    """Multiplied by zero it would become NaN."""
    world, rank = dist.get_world_size(), dist.get_rank()
    targets = torch.tensor([1, -100], device=ranks.device)
    upstream = torch.tensor([1.0, torch.inf], dtype=torch.float64, device=ranks.device)
    a = random(2, 8).requires_grad_()
    F.cross_entropy(a, targets, reduction="none").backward(upstream)
    b = random(2, 8).chunk(world, -1)[rank].clone().requires_grad_()
    tp.vocab_parallel_cross_entropy(b, targets).backward(upstream)
    assert_equal({"grad": b.grad}, {"grad": a.grad.chunk(world, -1)[rank]})


# ── 1.6 Dropout ─────────────────────────────────────────────────────────────────────────────────


def seeded(dropout: tp.Dropout, seed: int) -> tp.Dropout:
    dropout.mask_seed = seed
    return dropout


def test_dropout():
    """Kept elements are scaled, and the gradient has the same mask; one byte an element is kept."""
    x = random(50, 40).requires_grad_()
    dropout = seeded(tp.Dropout(0.25), 1)
    with SavedStorages() as saved:
        y = dropout(x)
    assert saved.bytes == x.numel()
    y.sum().backward()
    kept = y != 0
    assert torch.equal(y[kept], x[kept] * (1 / 0.75))
    assert torch.equal(x.grad, kept.double() * (1 / 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.03
    assert torch.equal(y, dropout(x))
    assert not torch.equal(y, seeded(dropout, 2)(x))
    assert tp.Dropout(0.0)(x) is x


def test_dropout_without_a_seed_uses_the_default_generator():
    dropout = tp.Dropout(0.5)
    x = torch.ones(100)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [tp.GPT, tp.ParallelGPT])
def test_evaluation_drops_nothing(kind):
    """At p = 0.5 the same logits as at p = 0, and other logits in training."""
    tokens_BS, _ = batch_of()
    expected = kind(config()).train()(tokens_BS)
    model = kind(config(dropout=0.5)).eval()
    assert torch.equal(model(tokens_BS), expected)
    assert not torch.equal(model.train()(tokens_BS), expected)


def dropouts(model: nn.Module) -> dict[str, tp.Dropout]:
    return {name: m for name, m in model.named_modules() if isinstance(m, tp.Dropout)}


@pytest.mark.parametrize("layers", [1, 3])
def test_the_model_has_all_its_dropout_modules(layers):
    """Attention weights are sharded; the embedding's output and every sublayer's replicated."""
    for kind in (tp.GPT, tp.ParallelGPT):
        found = dropouts(kind(config(dropout=0.1, num_layers=layers)))
        sharded = [name for name, module in found.items() if module.sharded]
        assert sharded == [f"layers.{i}.attention.dropout" for i in range(layers)]
        assert len(found) - len(sharded) == 1 + 2 * layers
        assert {module.p for module in found.values()} == {0.1}


def test_every_dropout_module_is_used():
    """Each module's own probability changes the logits."""
    cfg = config(dropout=0.5)
    for name in dropouts(tp.GPT(cfg)):
        model = tp.GPT(cfg)
        for other, module in dropouts(model).items():
            module.p = 0.5 if other == name else 0.0
        tokens_BS, _ = batch_of()
        assert not torch.equal(model(tokens_BS), tp.GPT(config())(tokens_BS)), name


def test_seeds_of_dropout_are_a_fixed_function():
    """Literal values: Python's hash() would differ between processes, and replicas would drift."""
    model = tp.GPT(config(dropout=0.1))
    tp.seed_dropout(model, seed=7, step=3, tp_rank=1, dp_rank=2)
    assert model.layers[1].attention.dropout.mask_seed == 11306670
    assert model.layers[1].dropout1.mask_seed == 907799215


def test_no_two_places_share_a_mask():
    """Seed, step, replica, module and, for sharded activations, tp rank: all seeds differ."""
    model = tp.GPT(config(dropout=0.1, num_layers=3))
    seen = []
    for seed, step, dp_rank in product((0, 1, 2**40), (0, 1), (0, 1)):
        tp.seed_dropout(model, seed, step, 0, dp_rank)
        first = {name: module.mask_seed for name, module in dropouts(model).items()}
        tp.seed_dropout(model, seed, step, 1, dp_rank)
        second = {name: module.mask_seed for name, module in dropouts(model).items()}
        for name, module in dropouts(model).items():
            assert (first[name] != second[name]) == module.sharded
        seen += [*first.values()]
        seen += [second[name] for name, module in dropouts(model).items() if module.sharded]
    assert len({value % 2**32 for value in seen}) == len(seen)


MASKS = """
import megatron_tp as tp, torch
model = tp.ParallelGPT(tp.GPTConfig(num_layers=1, hidden_size=8, dropout=0.5))
tp.seed_dropout(model, 3, 1)
modules = [m for m in model.modules() if isinstance(m, tp.Dropout)]
print([m(torch.ones(40)).tolist() for m in modules])
"""


@pytest.mark.slow
def test_processes_with_other_hash_seeds_draw_the_same_masks(capsys):
    """The test pool's ranks are forks of one process, so hash() would agree there."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", MASKS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    exec(MASKS)
    here = capsys.readouterr().out
    assert result.stdout == here and "2.0" in here


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_masks_on_a_mesh(degree):
    """Equal on the tp ranks where replicated, different where sharded, different in replicas."""
    mesh = mesh_of(degree)
    model = tp.ParallelGPT(config(dropout=0.5), mesh.tp_group).to(ranks.device)
    x = torch.ones(200, device=ranks.device)

    def masks(seed: int) -> tuple[Tensor, Tensor]:
        tp.seed_dropout(model, seed, 3, mesh.tp_rank, mesh.dp_rank)
        layer = model.layers[1]
        return layer.dropout1(x).cpu(), layer.attention.dropout(x).cpu()

    replicated, sharded = masks(0)
    again, other = masks(0), masks(1)
    assert torch.equal(replicated, again[0]) and torch.equal(sharded, again[1])
    assert not torch.equal(replicated, other[0]) and not torch.equal(sharded, other[1])
    assert not torch.equal(replicated, sharded)
    found = all_ranks((mesh.dp_rank, replicated, sharded))
    for i, (dp_rank, replicated, sharded) in enumerate(found):
        for other_dp_rank, other_replicated, other_sharded in found[:i]:
            assert torch.equal(replicated, other_replicated) == (dp_rank == other_dp_rank)
            assert not torch.equal(sharded, other_sharded)


def step_with_merged_masks(tp_rank: int) -> tuple[Comparison, list[tuple]]:
    """A step with dropout, compared with the plain model under the merged masks of all ranks.

    Args: tp_rank: the one that seed_dropout is told.
    Returns: the comparison, and of each mask in order of drawing every rank's shard.
    """
    cfg = config(dropout=0.3)
    plain, parallel = models(cfg)
    batch = batch_of()
    draw = tp.Dropout.forward
    masks = []

    def recorded(self: tp.Dropout, x: Tensor) -> Tensor:
        masks.append(draw(self, torch.ones_like(x)).detach().cpu() != 0)
        return draw(self, x)

    tp.seed_dropout(parallel, 7, 0, tp_rank)
    with plant(tp.Dropout, "forward", recorded):
        loss = parallel.loss(*batch)
    loss.sum().backward()
    shards = list(zip(*all_ranks(masks), strict=True))
    assert len(shards) == 1 + 3 * cfg.num_layers
    # Attention weights (B, n, S, S) are sharded by heads, all others are replicated.
    full = [torch.cat(each, 1) if each[0].ndim == 4 else each[0] for each in shards]
    replay = iter(full)

    def replayed(self: tp.Dropout, x: Tensor) -> Tensor:
        return x * next(replay).to(x.device) / (1 - self.p)

    with plant(tp.Dropout, "forward", replayed):
        expected = plain.loss(*batch)
    expected.sum().backward()
    grads = merged(grads_of(parallel), cfg)
    return Comparison(loss, grads, expected, grads_of(plain)), shards


@EVERY_WORLD
def test_model_with_dropout_equals_the_plain_one_under_the_merged_masks():
    found, masks = step_with_merged_masks(dist.get_rank())
    for first, *others in masks:
        sharded = first.ndim == 4
        assert not any(torch.equal(first, other) == sharded for other in others)
    found.assert_equal()


@pytest.mark.ranks(1, 2)
def test_recomputation_changes_no_bit():
    """With dropout: loss and every gradient are equal to the bit, and far less is kept."""
    found, kept = [], []
    for recompute in (False, True):
        model = on_device(tp.ParallelGPT(config(dropout=0.3, num_layers=3), None, recompute))
        tp.seed_dropout(model, 7, 0, dist.get_rank())
        with SavedStorages(model) as saved:
            loss = model.loss(*batch_of())
        kept.append(saved.bytes)
        loss.sum().backward()
        found.append({"loss": loss, **grads_of(model)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert kept[1] < kept[0] / 3


@pytest.mark.ranks(1, 2)
def test_recomputation_of_two_passes_before_their_backward():
    """The second pass seeds the masks again, and the first still recomputes with its own."""
    found = []
    for recompute in (False, True):
        model = on_device(tp.ParallelGPT(config(dropout=0.3), None, recompute))
        losses = []
        for step in range(2):
            tp.seed_dropout(model, 7, step, dist.get_rank())
            losses.append(model.loss(*batch_of(seed=step)).sum())
        sum(losses).backward()
        found.append({"first": losses[0], "second": losses[1], **grads_of(model)})
    assert_equal(found[1], found[0], bound=1e-14)


def test_recomputation_leaves_the_seeds_of_the_latest_pass():
    """A backward between a pass and its seeds: the pass draws its own masks, not the earlier's."""
    found = []
    for recompute in (False, True):
        model = on_device(tp.ParallelGPT(config(dropout=0.3), None, recompute))
        tp.seed_dropout(model, 7, 0)
        first = model.loss(*batch_of()).sum()
        tp.seed_dropout(model, 7, 1)
        first.backward()
        found.append(model.loss(*batch_of()))
    assert torch.equal(*found)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_replica_without_rows_trains(dropout):
    """One row for two replicas: the second has an empty batch, and the same weights afterwards."""
    mesh = mesh_of(2)
    model = on_device(tp.ParallelGPT(config(dropout=dropout), mesh.tp_group))
    batches = [batch_of(rows=1, seed=seed) for seed in range(2)]
    for loss, norm in tp.train(model, tp.make_optimizer(model, 1e-3), batches, mesh):
        assert torch.isfinite(loss) and torch.isfinite(norm) and loss > 1
    weights = tp.over_all_ranks({"same": model.final_norm.weight.sum().item()})
    assert weights["same"] == model.final_norm.weight.sum().item()


def test_first_step_reaches_seed_dropout():
    """A run that goes on at step 3 draws the masks of steps 3, 4, ..."""
    seen = []

    def recorded(model, *place):
        seen.append(place)

    model = tp.ParallelGPT(config())
    mesh = tp.Mesh(tp_rank=0, dp_rank=0)
    options = {"seed": 5}
    with plant(tp, "seed_dropout", recorded):
        list(tp.train(model, adamw(model), [batch_of()] * 2, mesh, **options))
        list(tp.train(model, adamw(model), [batch_of()] * 2, mesh, **options, first_step=3))
    assert seen == [(5, step, 0, 0) for step in (0, 1, 3, 4)]


@pytest.mark.ranks(4)
def test_the_place_on_the_mesh_reaches_seed_dropout():
    mesh = mesh_of(2)
    seen = []
    model = tp.ParallelGPT(config(), mesh.tp_group).to(ranks.device)
    with plant(tp, "seed_dropout", lambda model, *place: seen.append(place)):
        list(tp.train(model, adamw(model), [batch_of()], mesh))
    assert seen == [(0, 0, mesh.tp_rank, mesh.dp_rank)]
    assert seen[0][2:] == (dist.get_rank() % 2, dist.get_rank() // 2)


@pytest.mark.ranks(2)
def test_dropout_on_several_ranks_needs_seeds():
    """Without them every rank would draw from its own generator; evaluation needs none."""
    model = tp.ParallelGPT(config(dropout=0.1)).to(ranks.device)
    tokens_BS, _ = batch_of()
    with pytest.raises(ValueError, match="call seed_dropout before each step"):
        model(tokens_BS)
    model.eval()(tokens_BS)
    tp.seed_dropout(model.train(), 0, 0, dist.get_rank())
    model(tokens_BS)


# ── 2 The model ─────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("vocab", [61, 64])
@pytest.mark.parametrize("multiple", [1, 128])
def test_model_forward_and_backward(vocab, multiple):
    """Loss and every gradient, with an odd vocabulary and with ranks that hold padding alone."""
    compare(config(vocab_size=vocab, vocab_multiple=multiple)).assert_equal()


@EVERY_WORLD
def test_every_bias_and_norm_counts():
    """With biases that are not 0 and norms that are not 1."""
    compare(config(), change=change_vectors).assert_equal()


@pytest.mark.ranks(2, 4)
def test_collectives_of_a_layer():
    """Two all-reduces of B·S·H elements in forward, two in backward, and nothing else."""
    model = on_device(tp.ParallelGPT(config()))
    x = random(3, 7, 32).requires_grad_()
    for _ in range(2):
        with tp.Counter() as forward:
            y = model.layers[0](x)
        with tp.Counter() as backward:
            y.sum().backward()
        for counter in (forward, backward):
            found = [(message.op, message.bytes) for message in counter.messages]
            assert found == [("all_reduce", 3 * 7 * 32 * 8)] * 2


@pytest.mark.ranks(2, 4)
def test_collectives_of_embedding_output_layer_and_loss():
    """Embedding and output layer: B·S·H each. The loss: B·S for the maximum, then 2·B·S."""
    model = on_device(tp.ParallelGPT(config(num_layers=1)))
    model.layers = nn.ModuleList()
    tokens_BS, targets_BS = batch_of()
    with tp.Counter() as forward:
        logits_BSv = model(tokens_BS)
    with tp.Counter() as of_the_loss:
        loss_BS = tp.vocab_parallel_cross_entropy(logits_BSv, targets_BS, vocab_size=61)
    with tp.Counter() as backward:
        loss_BS.sum().backward()
    assert [m.bytes for m in forward.messages] == [3 * 13 * 32 * 8]
    assert [m.bytes for m in of_the_loss.messages] == [3 * 13 * 8, 2 * 3 * 13 * 8]
    assert [m.bytes for m in backward.messages] == [3 * 13 * 32 * 8]
    counters = forward, of_the_loss, backward
    assert {m.op for counter in counters for m in counter.messages} == {"all_reduce"}


@pytest.mark.ranks(4)
def test_collectives_of_a_step_and_their_groups():
    """Over dp: the token count, all gradients, the loss. Over tp: layers, ends, loss, the norm."""
    cfg, mesh = config(), mesh_of(2)
    model = on_device(tp.ParallelGPT(cfg, mesh.tp_group))
    with tp.Counter() as counter:
        list(tp.train(model, adamw(model), [batch_of()], mesh))

    def sizes(group) -> list[int]:
        return [m.bytes for m in counter.messages if m.group == group.group_name]

    over_dp, over_tp = sizes(mesh.dp_group), sizes(mesh.tp_group)
    assert over_dp == [8, 8 * sum(p.numel() for p in model.parameters()), 8]
    assert len(over_dp) + len(over_tp) == len(counter.messages)
    assert len(over_tp) == 4 * cfg.num_layers + 2 + 2 + 1
    assert over_tp[-1] == 8


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dropout, more", [(0.1, 2), (0.0, 1)])
def test_recomputation_repeats_the_all_reduces_of_forward(dropout, more):
    """Two a layer. Without dropout nothing after the second is kept, so PyTorch stops before it."""
    cfg = config(dropout=dropout)
    counts = []
    for recompute in (False, True):
        model = on_device(tp.ParallelGPT(cfg, None, recompute))
        tp.seed_dropout(model, 0, 0, dist.get_rank())
        with tp.Counter() as counter:
            model.loss(*batch_of()).sum().backward()
        counts.append(len(counter.messages))
    assert counts[1] - counts[0] == more * cfg.num_layers


@pytest.mark.ranks(2, 4)
def test_no_rank_holds_all_logits():
    """No operator makes a tensor whose last dimension is the vocabulary, padded or not."""
    model = on_device(tp.ParallelGPT(config()))
    world = dist.get_world_size()
    with Shapes() as shapes:
        model.loss(*batch_of()).sum().backward()
    padded = tp.padded_vocab_size(61, world)
    assert not [shape for shape in shapes.seen if shape and shape[-1] in (61, padded)]
    assert (3, 13, padded // world) in shapes.seen


@pytest.mark.ranks(2, timeout=120)
def test_compiled_model():
    """torch.compile may break the graph at our functions, and must not change a value."""
    cfg = config()
    plain, parallel = models(cfg)
    tokens_BS, targets_BS = batch_of()
    plain.loss(tokens_BS, targets_BS).sum().backward()
    compiled = torch.compile(parallel, backend="aot_eager")
    logits_BSv = compiled(tokens_BS)
    tp.vocab_parallel_cross_entropy(logits_BSv, targets_BS, vocab_size=61).sum().backward()
    assert_equal(merged(grads_of(parallel), cfg), grads_of(plain))


@pytest.mark.ranks(2)
def test_autocast():
    """bf16 GEMMs with fp32 weights: gradients are fp32, and the plain model's under autocast."""
    cfg = config()
    plain = on_device(tp.GPT(cfg), torch.float32)
    parallel = on_device(tp.ParallelGPT(cfg), torch.float32)
    batch = batch_of()
    with torch.autocast(ranks.device.type, BF16):
        logits_BSv = parallel(batch[0])
        loss_BS, expected_BS = parallel.loss(*batch), plain.loss(*batch)
    assert logits_BSv.dtype == BF16
    assert loss_BS.dtype == torch.float32
    loss_BS.sum().backward()
    expected_BS.sum().backward()
    # bf16 has 8 significant bits: each GEMM is off by up to 0.4 %, and the two partial sums of a
    # row-parallel layer are rounded before they are added, which the single device does not do.
    assert_equal(merged(grads_of(parallel), cfg), grads_of(plain), bound=0.05)


@pytest.mark.ranks(2)
def test_fp32_model():
    """The same in fp32, whose rounding errors are 1e-7 an operation."""
    cfg = config()
    plain = on_device(tp.GPT(cfg), torch.float32)
    parallel = on_device(tp.ParallelGPT(cfg), torch.float32)
    loss_BS, expected_BS = parallel.loss(*batch_of()), plain.loss(*batch_of())
    loss_BS.sum().backward()
    expected_BS.sum().backward()
    assert_equal({"loss": loss_BS}, {"loss": expected_BS}, bound=1e-5)
    assert_equal(merged(grads_of(parallel), cfg), grads_of(plain), bound=1e-5)


# ── 3 Weights ───────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_weights_are_the_plain_models_for_every_tp():
    cfg = config()
    full = tp.GPT(cfg).state_dict()
    expected = tp.shard_state_dict(full, cfg, dist.get_rank(), dist.get_world_size())
    torch.manual_seed(dist.get_rank())  # the default generator has no influence
    for name, x in tp.ParallelGPT(cfg).state_dict().items():
        assert torch.equal(x, expected[name]), name


def test_initial_weights_are_the_papers():
    """σ = 0.02, and 0.02/√(2L) for a sublayer's last matrix; biases 0, norms 1."""
    cfg = config(hidden_size=256, num_layers=8, seq_length=64, vocab_size=997)
    weights = dict(tp.initial_weights(cfg))
    for name, x in weights.items():
        if name.endswith(("out.weight", "down.weight")):
            assert abs(x.std() / (0.02 / 4) - 1) < 0.02, name
        elif x.ndim == 2:
            assert abs(x.std() / 0.02 - 1) < 0.02, name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(x, torch.full_like(x, value)), name
    other = dict(tp.initial_weights(dataclasses.replace(cfg, seed=1)))
    name = "layers.0.mlp.up.weight"
    assert not torch.equal(weights[name], other[name])


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 40),
    head_size=st.integers(1, 3),
    heads=st.sampled_from([4, 8]),
    layers=st.integers(1, 2),
    multiple=st.sampled_from([1, 3, 8]),
    first=st.sampled_from([1, 2, 4]),
    second=st.sampled_from([1, 2, 4]),
)
def test_weights_survive_any_resharding(vocab, head_size, heads, layers, multiple, first, second):
    """Plain → tp = a → plain → tp = b → plain, to the bit, for any sizes."""
    sizes = {"vocab_size": vocab, "num_layers": layers, "num_heads": heads, "seq_length": 3}
    cfg = config(**sizes, hidden_size=heads * head_size, vocab_multiple=multiple)
    full = {name: torch.randn(shape) for name, shape in tp.parameter_shapes(cfg).items()}
    state = full
    for world in (first, second):
        shards = [tp.shard_state_dict(state, cfg, rank, world) for rank in range(world)]
        state = tp.merge_state_dicts(shards, cfg)
    assert state.keys() == full.keys()
    assert all(torch.equal(state[name], x) for name, x in full.items())


def test_shards_and_merged_tensors_are_copies():
    """A change of a shard changes neither the full tensor nor a merged one."""
    cfg = config()
    for name, full in tp.initial_weights(cfg):
        before = full.clone()
        shards = [{name: tp.shard_tensor(name, full, cfg, rank, 2)} for rank in range(2)]
        merged_tensor = tp.merge_state_dicts(shards, cfg)[name]
        for shard in shards:
            shard[name].add_(1)
        assert torch.equal(full, before)
        assert torch.equal(merged_tensor, before)


def test_the_table_of_shards_agrees_with_the_layers():
    """Every parameter of a rank has the shape that SHARD_DIM says."""
    cfg = config()
    with plant(tp, "group_size", lambda group=None: 4):
        with plant(tp, "group_rank", lambda group=None: 3):
            model = tp.ParallelGPT(cfg)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for name, full in tp.parameter_shapes(cfg).items():
        expected = list(full)
        dim = tp.shard_dim(name)
        if dim is not None:
            expected[dim] = -(-expected[dim] // 4)
        assert shapes[name] == expected, name


def test_a_copied_model_still_knows_its_shards():
    """sharded_parameters goes by names, so it survives deepcopy (an attribute would not)."""
    model = tp.ParallelGPT(config())
    expected = 1 + 2 * 6
    assert len(model.sharded_parameters()) == expected
    assert len(copy.deepcopy(model).sharded_parameters()) == expected


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_gathered_weights_are_the_plain_models_on_every_rank(degree):
    cfg, mesh = config(), mesh_of(degree)
    model = tp.ParallelGPT(cfg, mesh.tp_group).to(ranks.device)
    full = tp.gather_state_dict(model.state_dict(), cfg, mesh.tp_group)
    expected = dict(tp.initial_weights(cfg))
    assert full.keys() == expected.keys()
    for name, x in full.items():
        assert x.device.type == "cpu"
        assert torch.equal(x, expected[name]), name


def all_shards(cfg: tp.GPTConfig, world: int = 4) -> list[dict]:
    full = dict(tp.initial_weights(cfg))
    return [tp.shard_state_dict(full, cfg, rank, world) for rank in range(world)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_replicated_tensor_that_differs_is_named(rank):
    shards = all_shards(config())
    shards[rank]["final_norm.bias"][3] += 1e-7
    message = f"final_norm.bias should be replicated, but rank {rank} differs from rank 0"
    with pytest.raises(ValueError, match=message):
        tp.merge_state_dicts(shards, config())


@pytest.mark.parametrize("kind", [torch.float32, BF16])
def test_nan_in_replicated_tensors(kind):
    """Equal NaN on every rank is no difference; NaN on one rank is."""
    shards = [{name: x.to(kind) for name, x in shard.items()} for shard in all_shards(config())]
    for shard in shards:
        shard["final_norm.bias"][3] = torch.nan
    assert tp.merge_state_dicts(shards, config())["final_norm.bias"].isnan().sum() == 1
    shards[2]["final_norm.bias"][3] = 0.0
    with pytest.raises(ValueError, match="final_norm.bias should be replicated, but rank 2"):
        tp.merge_state_dicts(shards, config())


# ── 4 Training: against the plain model ─────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_five_steps(kind):
    """Loss, norm before clipping and gradients of each step, then the weights.

    The reference is a loop of its own. AdamW and clipping hide a wrong scale of the gradients:
    SGD and the norm show it.
    """
    cfg, mesh = config(), mesh_of(dist.get_world_size())
    plain, parallel = models(cfg)
    make = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "adamw": partial(torch.optim.AdamW, lr=1e-3, eps=1e-8),
    }[kind]
    max_norm = 1e9 if kind == "sgd" else 0.1
    optimizer = make(plain.parameters())
    batches = [batch_of(seed=step) for step in range(5)]
    steps = tp.train(parallel, make(parallel.parameters()), batches, mesh, max_norm)
    for (tokens_BS, targets_BS), (loss, norm) in zip(batches, steps, strict=True):
        optimizer.zero_grad()
        expected = plain.loss(tokens_BS, targets_BS).sum() / (targets_BS != -100).sum()
        expected.backward()
        expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        optimizer.step()
        assert_equal({"loss": loss, "norm": norm}, {"loss": expected, "norm": expected_norm})
        assert kind == "sgd" or norm > max_norm, "nothing was clipped"
        assert_equal(merged(grads_of(parallel), cfg), grads_of(plain))
    floor = 5e-3 if kind == "adamw" else 0.0
    assert_equal(merged(parallel.state_dict(), cfg), plain.state_dict(), floor=floor)


RATES = [1e-3, 3e-4, 2e-3, 5e-4, 4e-3]


def with_rates(steps, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Sets another learning rate before each step, as the caller of `train` does."""
    steps = iter(steps)
    for rate in RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield next(steps)


def alone(plain: tp.GPT, batches: list, max_norm: float = 0.1) -> Iterator:
    optimizer = adamw(plain)
    return with_rates(tp.train_alone(plain, optimizer, batches, max_norm), optimizer)


@lru_cache
def five_steps_alone(rows: int) -> tuple[list, dict]:
    """The plain model's steps, whatever the mesh: results and gradients of each, and its weights.

    Computed once a process; no test changes them.
    """
    plain = on_device(tp.GPT(config()))
    steps = []
    for loss, norm in alone(plain, [batch_of(rows, seed=step) for step in range(5)]):
        grads = {name: grad.clone() for name, grad in grads_of(plain).items()}
        steps.append(({"loss": loss, "norm": norm}, grads))
    return steps, plain.state_dict()


def together(parallel: tp.ParallelGPT, batches: list, mesh: tp.Mesh) -> Iterator:
    optimizer = adamw(parallel)
    return with_rates(tp.train(parallel, optimizer, batches, mesh, 0.1), optimizer)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_tensor_and_data_parallel_training(degree, rows):
    """All meshes of four ranks, with a learning rate that changes every step.

    dp may not divide the rows, and with fewer rows than replicas some replicas have none.
    """
    cfg, mesh = config(), mesh_of(degree)
    parallel = on_device(tp.ParallelGPT(cfg, mesh.tp_group))
    batches = [batch_of(rows, seed=step) for step in range(5)]
    expected_steps, expected_weights = five_steps_alone(rows)
    steps = zip(expected_steps, together(parallel, batches, mesh), strict=True)
    for (expected, expected_grads), (loss, norm) in steps:
        assert_equal({"loss": loss, "norm": norm}, expected)
        assert_equal(merged(grads_of(parallel), cfg, mesh.tp_group), expected_grads)
    weights = merged(parallel.state_dict(), cfg, mesh.tp_group)
    assert_equal(weights, expected_weights, floor=sum(RATES))
    first, *others = all_ranks(torch.cat([x.flatten() for x in weights.values()]))
    assert all(torch.equal(first, other) for other in others)


@EVERY_WORLD
def test_a_batch_in_which_nothing_counts():
    """All targets −100: loss and norm are zero and every weight stays finite."""
    check_batch_without_targets(mesh_of(dist.get_world_size()))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2])
def test_a_batch_in_which_nothing_counts_on_replicas(degree):
    check_batch_without_targets(mesh_of(degree))


def check_batch_without_targets(mesh: tp.Mesh) -> None:
    tokens_BS, targets_BS = batch_of()
    batch = tokens_BS, torch.full_like(targets_BS, -100)
    plain, parallel = models(config(), mesh.tp_group)
    ((loss, norm),) = tp.train_alone(plain, adamw(plain), [batch])
    ((loss_here, norm_here),) = tp.train(parallel, adamw(parallel), [batch], mesh)
    assert loss == loss_here == norm == norm_here == 0
    for model in (plain, parallel):
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.ranks(1, 2)
def test_results_of_a_step_hold_no_graph():
    """A list of all losses would otherwise keep every step's activations."""
    plain, parallel = models(config())
    mesh = mesh_of(dist.get_world_size())
    alone = tp.train_alone(plain, adamw(plain), [batch_of()])
    steps = tp.train(parallel, adamw(parallel), [batch_of()], mesh)
    for loss, norm in (*alone, *steps):
        assert not loss.requires_grad and loss.grad_fn is None
        assert not norm.requires_grad and norm.grad_fn is None


@pytest.mark.ranks(2)
def test_padding_stays_zero_in_training():
    mesh = mesh_of(2)
    model = on_device(tp.ParallelGPT(config(), mesh.tp_group))
    batches = [batch_of(seed=step) for step in range(3)]
    list(tp.train(model, adamw(model, 1e-2), batches, mesh))
    if mesh.tp_rank == 1:
        assert not model.embedding.weight[30:].any()  # 61 entries: the last rank's last row


@pytest.mark.ranks(2)
def test_training_under_autocast():
    """The loss is autocast's to the bit, and not fp32's; so are the gradients of `train`."""
    cfg, mesh = config(), mesh_of(2)
    tokens_BS, targets_BS = batch_of()
    plain = on_device(tp.GPT(cfg), torch.float32)
    parallel = on_device(tp.ParallelGPT(cfg, mesh.tp_group), torch.float32)
    trained = {
        plain: partial(tp.train_alone, plain, adamw(plain)),
        parallel: partial(tp.train, parallel, adamw(parallel), mesh=mesh),
    }
    count = (targets_BS != -100).sum()
    for model, train in trained.items():
        with torch.no_grad():
            in_fp32 = model.loss(tokens_BS, targets_BS).sum() / count
            with torch.autocast(ranks.device.type, BF16):
                in_bf16 = model.loss(tokens_BS, targets_BS).sum() / count
        ((loss, _),) = train(batches=[(tokens_BS, targets_BS)], autocast=BF16)
        assert loss == in_bf16 != in_fp32


# ── Frozen parameters ───────────────────────────────────────────────────────────────────────────

KINDS = ["embedding", "positions", "norm", "qkv", "out", "up", "down", "bias", "layers.0"]


def freeze(model: nn.Module, kinds: tuple[str, ...]) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(not any(kind in name for kind in kinds))


def frozen_cases() -> list[tuple[str, ...]]:
    """Each kind frozen alone, the weights of each matrix or norm trained alone, random subsets."""
    weights = KINDS[:7]
    cases = [(kind,) for kind in KINDS]
    for trained in weights:
        cases.append(("bias", *(kind for kind in weights if kind != trained)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        is_frozen = torch.rand(len(KINDS), generator=generator) < 0.4
        cases.append(tuple(kind for kind, frozen in zip(KINDS, is_frozen) if frozen))
    return cases


@pytest.mark.ranks(4)
def test_frozen_parameters():
    """Any subset may be frozen: trained on 2×2 like the plain model with the same frozen."""
    mesh = mesh_of(2)
    cfg = config(hidden_size=16, num_layers=1)
    batches = [batch_of(seed=step) for step in range(2)]
    for kinds in frozen_cases():
        plain, parallel = models(cfg, mesh.tp_group, change_vectors)
        first = copy.deepcopy(plain.state_dict())
        for model in (plain, parallel):
            freeze(model, kinds)
        alone = tp.train_alone(plain, adamw(plain), batches)
        steps = tp.train(parallel, adamw(parallel), batches, mesh)
        for (expected, expected_norm), (loss, norm) in zip(alone, steps, strict=True):
            found = {"loss": loss, "norm": norm}
            assert_equal(found, {"loss": expected, "norm": expected_norm})
        weights = merged(parallel.state_dict(), cfg, mesh.tp_group)
        assert_equal(weights, plain.state_dict(), floor=2e-3)
        for name, p in plain.named_parameters():
            unchanged = torch.equal(weights[name], first[name].cpu())
            assert unchanged == (not p.requires_grad), (kinds, name)
        for model in (plain, parallel):
            has_grad = {name for name, p in model.named_parameters() if p.grad is not None}
            assert has_grad == {name for name, p in model.named_parameters() if p.requires_grad}


# ── 4 Training: the shared parts, against something independent ─────────────────────────────────


def adamw_by_hand(model: tp.GPT, batches: list, max_norm: float) -> Iterator:
    """AdamW as in its paper: β 0.9 and 0.95, ε 1e-8, decay 0.01 of matrices, RATES."""
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step, (tokens_BS, targets_BS) in enumerate(batches, 1):
        model.zero_grad()
        logits = model(tokens_BS).flatten(0, 1)
        loss = F.cross_entropy(logits, targets_BS.flatten())  # the mean over targets ≥ 0
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        rate = RATES[step - 1]
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = first[name], second[name]
                m.copy_(0.9 * m + 0.1 * p.grad)
                v.copy_(0.95 * v + 0.05 * p.grad**2)
                decay = 0.01 if p.ndim > 1 else 0.0
                update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
                p.sub_(rate * (update + decay * p))
        yield loss.detach(), norm


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2])
def test_training_equals_adamw_written_out(degree):
    """Plain and parallel share optimizer and loop, so their comparison cannot see a change there.

    This one can: betas, decay, clipping, the mean over targets, a learning rate one step late.
    """
    cfg, mesh = config(), mesh_of(degree)
    plain, parallel = models(cfg, mesh.tp_group)
    by_hand = on_device(tp.GPT(cfg))
    batches = [batch_of(4, seed=step) for step in range(5)]
    runs = (
        adamw_by_hand(by_hand, batches, 0.1),
        alone(plain, batches),
        together(parallel, batches, mesh),
    )
    for (expected, expected_norm), *others in zip(*runs, strict=True):
        assert expected_norm > 0.1, "nothing was clipped"
        for loss, norm in others:
            assert_equal({"loss": loss, "norm": norm}, {"loss": expected, "norm": expected_norm})
    weights = merged(parallel.state_dict(), cfg, mesh.tp_group)
    for found in (weights, on_cpu(plain.state_dict())):
        assert_equal(found, by_hand.state_dict(), floor=sum(RATES))


def test_settings_of_training():
    """Section 4.2: weight decay 0.01, a gradient norm of at most 1, no decay of vectors."""
    model = tp.GPT(config())
    matrices, vectors = tp.make_optimizer(model, 3e-4).param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    params = [*matrices["params"], *vectors["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)
    for group in (matrices, vectors):
        found = (group["lr"], group["betas"], group["eps"], group["amsgrad"], group["maximize"])
        assert found == (3e-4, (0.9, 0.95), 1e-8, False, False)
    assert tp.make_optimizer(model, 1e-3, 0.3).param_groups[0]["weight_decay"] == 0.3
    for train in (tp.train, tp.train_alone):
        assert inspect.signature(train).parameters["max_norm"].default == 1.0


# ── 4.1 and 4.2 Sums and norms of gradients ─────────────────────────────────────────────────────


@EVERY_WORLD
def test_gradients_that_some_ranks_do_not_have():
    """The other ranks add zero, and no rank waits for a collective that never starts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = [on_device(nn.Linear(3, 2)) for _ in range(4)]
    *trained, frozen = parts
    frozen.requires_grad_(False)
    for part in trained[: rank + 1]:
        for p in part.parameters():
            p.grad = torch.full_like(p, rank + 1.0)
    tp.sum_gradients([p for part in parts for p in part.parameters()])
    for index, part in enumerate(trained):
        total = sum(r + 1.0 for r in range(index, world))
        for p in part.parameters():
            if world == 1 and index > 0:
                assert p.grad is None
            else:
                assert torch.equal(p.grad, torch.full_like(p, total))
    assert all(p.grad is None for p in frozen.parameters())


def mixed_dtypes(cfg: tp.GPTConfig, group) -> tp.ParallelGPT:
    """bf16 matrices with fp32 norms, as mixed-precision recipes have them."""
    model = on_device(tp.ParallelGPT(cfg, group), BF16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.to(torch.float32)
    return model


@pytest.mark.ranks(2)
def test_gradients_of_mixed_dtypes_are_summed():
    """Over two replicas; the dtypes stay, and the sum is the float64 sum, rounded once."""
    mesh = mesh_of(1)
    model = mixed_dtypes(config(), mesh.tp_group)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, BF16}
    local = {}
    for index, (name, p) in enumerate(model.named_parameters()):
        p.grad = random(*p.shape, seed=100 * dist.get_rank() + index).to(p.dtype)
        local[name] = p.grad.double().cpu()
    tp.sum_gradients(model.parameters(), mesh.dp_group)
    first, second = all_ranks(local)
    for dtype, bound in ((BF16, 2.0**-8), (torch.float32, 2.0**-23)):
        names = [name for name in dtypes if dtypes[name] == dtype]
        expected = {name: (first[name] + second[name]).to(dtype) for name in names}
        assert_equal({name: grads_of(model)[name] for name in names}, expected, bound)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("degree", [1, 2])
def test_gradients_of_mixed_dtypes_are_clipped(degree):
    """The norm is the float64 norm of all gradients; every gradient is scaled by max_norm / it."""
    mesh = mesh_of(degree)
    model = mixed_dtypes(config(), mesh.tp_group)
    for index, (name, p) in enumerate(model.named_parameters()):
        rank = 0 if tp.shard_dim(name) is None else mesh.tp_rank
        p.grad = random(*p.shape, seed=100 * rank + index).to(p.dtype)
    before = {name: grad.double() for name, grad in grads_of(model).items()}
    full = merged(before, config(vocab_size=64), mesh.tp_group)
    expected = math.sqrt(sum(grad.square().sum() for grad in full.values()))
    shards = model.sharded_parameters()
    norm = tp.clip_grad_norm_(model.parameters(), 0.5, sharded=shards, group=mesh.tp_group)
    assert norm.dtype == torch.float32
    assert abs(norm.item() / expected - 1) < 1e-6
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype
        scaled = before[name] * (0.5 / expected)
        bound = 2.0**-7 if p.dtype == BF16 else 1e-6  # one rounding of factor and product
        assert_equal({name: p.grad.double()}, {name: scaled}, bound)


@pytest.mark.ranks(2)
def test_training_with_mixed_dtypes():
    """Two replicas train bf16 matrices with fp32 norms; dtypes stay and replicas stay equal."""
    mesh = mesh_of(1)
    model = mixed_dtypes(config(), mesh.tp_group)
    dtypes = [p.dtype for p in model.parameters()]
    for loss, norm in tp.train(model, adamw(model), [batch_of(4)] * 3, mesh):
        assert loss.isfinite() and norm.isfinite()
    assert [p.dtype for p in model.parameters()] == dtypes
    first, second = all_ranks(on_cpu(model.state_dict()))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
def test_norm_of_gradients_of_lower_precision(dtype):
    """The norm is computed in at least fp32, for every dtype of the gradients."""
    p = nn.Parameter(torch.zeros(3000, dtype=dtype))
    p.grad = random(3000).cpu().to(dtype)
    expected = p.grad.double().norm()
    norm = tp.clip_grad_norm_([p], 1.0)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert abs(norm.double() / expected - 1) < bound


@pytest.mark.parametrize("sharded", [True, False])
def test_clipping_is_pytorchs_on_one_rank(sharded):
    ours, theirs = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    for model in (ours, theirs):
        for p in model.parameters():
            p.grad = random(*p.shape, seed=p.ndim) * 10
    norm = tp.clip_grad_norm_(ours.parameters(), 1.0, sharded=[ours.weight] if sharded else [])
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    assert_equal({"norm": norm}, {"norm": expected})
    assert_equal(grads_of(ours), grads_of(theirs))
    assert tp.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0  # no gradient at all


# ── NaN ends the run ────────────────────────────────────────────────────────────────────────────


def train_until_nan(degree: int, spoil: Callable) -> str:
    """Trains, spoils the model of the last rank after step 1; what read_step raised here."""
    mesh = mesh_of(degree)
    model = on_device(tp.ParallelGPT(config(), mesh.tp_group))
    steps = tp.train(model, adamw(model), [batch_of(4)] * 5, mesh)
    with pytest.raises(FloatingPointError) as error:
        for step, (loss, norm) in enumerate(steps):
            tp.read_step(step, loss, norm)
            if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                spoil(model)
    return str(error.value)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", ["layers.0.mlp.up.weight", "layers.1.norm1.weight"])
def test_a_weight_that_is_nan_ends_the_run_on_all_ranks(degree, name):
    """In the same step, which the message names."""

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = torch.nan

    messages = all_ranks(train_until_nan(degree, spoil))
    assert all(message.startswith("step 2: loss nan, gradient norm nan") for message in messages)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks(degree, value):
    """The loss of that step is still finite: the norm shows it."""

    def spoil(model: nn.Module) -> None:
        model.layers[0].mlp.up.weight.register_hook(lambda grad: grad * value)

    messages = all_ranks(train_until_nan(degree, spoil))
    for message in messages:
        assert message.startswith("step 2: loss 3."), message
        assert "gradient norm nan" in message or "gradient norm inf" in message
    assert len(set(messages)) == 1


# ── Planted bugs: the symptoms of a missing safeguard ───────────────────────────────────────────
#
# Each takes one safeguard away and looks as a user would: at the loss, and at the gradients
# compared with the single device's.


def column_backward_without_all_reduce(ctx, grad_BSf):
    x_BSH, weight_fH = ctx.saved_tensors
    grad = grad_BSf.flatten(0, -2)
    return grad_BSf @ weight_fH, grad.mT @ x_BSH.flatten(0, -2), grad.sum(0), None


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss falls; every gradient below the output layer is one rank's partial sum",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)
def test_without_copy():
    """copy_to_tp without its backward all-reduce, by itself and before the output layer."""
    factor = dist.get_rank() + 1.0
    with plant(tp, "copy_to_tp", lambda x, group=None: x.view_as(x)):
        x = random(3, 8).requires_grad_()
        (tp.copy_to_tp(x) * factor).sum().backward()
        found = compare(config())
    assert torch.equal(x.grad, torch.full_like(x, factor))  # right is 1 + 2 on both
    found.assert_equal_loss()
    wrong = assert_differs(found.grads, found.reference)
    assert {"final_norm.weight", "layers.0.mlp.up.weight"} <= set(wrong)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="gradients of everything below such a layer are one rank's partial sums", seen_in=None
)
def test_without_the_column_layers_own_all_reduce():
    backward = staticmethod(column_backward_without_all_reduce)
    with plant(tp._ColumnParallelLinear, "backward", backward):
        found = compare(config())
    found.assert_equal_loss()
    wrong = set(assert_differs(found.grads, found.reference))
    assert {"layers.1.norm2.weight", "layers.0.mlp.down.weight"} <= wrong
    # Only the last MLP gets its gradient through no column-parallel layer.
    assert not {"layers.1.mlp.down.weight", "layers.1.mlp.up.weight", "final_norm.weight"} & wrong
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="gradients through a region are tp times too large, those of the residual are right",
    seen_in=None,
)
def test_copy_before_a_column_layer():
    """The all-reduce twice: copy_to_tp's and the layer's own."""
    right = tp.ColumnParallelLinear.forward
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    x = random(3, 8).requires_grad_()

    def twice(self, x):
        return right(self, tp.copy_to_tp(x, self.group))

    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    with plant(tp.ColumnParallelLinear, "forward", twice):
        found = compare(config())
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert_equal({"x": grad}, {"x": 2 * expected})
    found.assert_equal_loss()
    assert "layers.0.mlp.down.weight" in assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="another holder of that gradient finds the sum in it", seen_in=None
)
def test_a_gradient_summed_in_place():
    """A residual connection around a region: both branches get the same gradient tensor."""

    def in_place(partial_x, group):
        return tp._all_reduce(partial_x, group)

    def step() -> tuple[dict, dict]:
        x = random(3, 8).requires_grad_()
        y = x + tp.copy_to_tp(x)
        y.backward(random(3, 8, seed=2))
        return {"y": y.detach()}, {"x": x.grad}

    right_y, right_x = step()
    with plant(tp, "_sum", in_place):
        y, x = step()
    expected = 3 * random(3, 8, seed=2)  # 1 of the residual, 2 through the region
    assert_equal(right_x, {"x": expected})
    assert_differs(x, right_x)
    return Shows(worst_of(y, right_y), worst_of(x, right_x))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="nothing at the start, where biases are zero; then each row bias counts tp times",
    seen_in=None,
)
def test_row_bias_before_the_reduction():
    def forward(self, y_BSf):
        return tp.reduce_from_tp(F.linear(y_BSf, self.weight, self.bias), self.group)

    def change(name: str, x: Tensor) -> Tensor:
        return x + 0.1 * random(*x.shape) if name.endswith("bias") else x

    world = dist.get_world_size()
    layer = on_device(tp.RowParallelLinear(8, 12))
    x = random(3, 8).chunk(world, -1)[dist.get_rank()]
    right = layer(x)
    with plant(tp.RowParallelLinear, "forward", forward):
        excess = {"y": layer(x) - right}
        at_start = compare(config())
        later = compare(config(), change=change)
    assert_equal(excess, {"y": ((world - 1) * layer.bias).expand(3, 12)})
    at_start.assert_equal()
    assert_differs(later.grads, later.reference)
    return later.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="loss and training look right; both ranks hold the same features: half of the layer",
    seen_in=None,
)
def test_every_shard_from_the_same_seed():
    def same_on_every_rank(name, full, cfg, rank, world):
        rank = 0 if name.endswith(("up.weight", "up.bias")) else rank
        return original(name, full, cfg, rank, world)

    cfg = config()
    name = "layers.0.mlp.up.weight"
    with plant(tp, "shard_tensor", same_on_every_rank) as original:
        found = compare(cfg)
        up_FH = merged(tp.ParallelGPT(cfg).state_dict(), cfg)[name]
    assert torch.linalg.matrix_rank(up_FH.double()) == 32
    assert torch.equal(up_FH[:64], up_FH[64:])
    assert found.shows().loss < 0.05  # nothing to see
    assert name in assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="a rank has all queries and half of the keys; the initial loss is right", seen_in=None
)
def test_queries_keys_and_values_in_thirds():
    """A fused matrix in the order (three, head, D), as in GPT-2's files, sharded like ours."""

    def in_thirds(x, pattern, **sizes):
        return right(x, pattern.replace("(n three D)", "(three n D)"), **sizes)

    with plant(tp, "rearrange", in_thirds) as right:
        found = compare(config())
    assert found.shows().loss < 0.05
    wrong = assert_differs(found.grads, found.reference, at_least=0.1)
    assert "layers.0.attention.qkv.weight" in wrong
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="head i and head i + n always lose the same elements; no value looks wrong",
    seen_in=None,
)
def test_the_same_mask_for_sharded_activations():
    """Only the masks show it: under them the single device computes the same."""
    found, masks = step_with_merged_masks(tp_rank=0)  # on every rank
    assert all(torch.equal(*shards) for shards in masks)
    found.assert_equal()
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="replicated activations drift apart between the ranks of a replica, without an error",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/206",
)
def test_different_masks_for_replicated_activations():
    _, model = models(config(dropout=0.3))

    def step() -> tuple[list, list]:
        """Loss, and gradient of a replicated parameter, of both ranks."""
        model.zero_grad()
        tp.seed_dropout(model, 0, 0, dist.get_rank())
        loss_BS = model.loss(*batch_of())
        loss_BS.sum().backward()
        found = loss_BS.detach().cpu(), model.final_norm.weight.grad.cpu()
        return tuple(zip(*all_ranks(found)))

    losses, grads = step()
    assert torch.equal(*losses) and torch.equal(*grads)
    for dropout in dropouts(model).values():
        dropout.sharded = True
    losses, (first, second) = step()
    assert torch.equal(*losses)  # all-reduced, so it is the same value on both
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="should be replicated, but rank 1 differs"):
        merged(grads_of(model), config())
    error = worst_of({"norm": second}, {"norm": first})
    return Shows(loss="the same on both ranks", gradients=error)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss is right and falls; the gradients belong to other masks than the loss",
    seen_in="https://github.com/allenai/OLMo-core/issues/828",
)
def test_recomputation_with_new_masks():
    """A generator with a state: every call draws a new mask, the recomputed one as well."""
    draw = tp.Dropout.forward
    calls = []

    def stateful(self: tp.Dropout, x: Tensor) -> Tensor:
        calls.append(1)
        self.mask_seed = zlib.crc32(f"{self.mask_seed} {len(calls)}".encode())
        return draw(self, x)

    found = []
    for recompute in (False, True):
        calls.clear()
        model = on_device(tp.ParallelGPT(config(dropout=0.3), None, recompute))
        tp.seed_dropout(model, 7, 0, dist.get_rank())
        with plant(tp.Dropout, "forward", stateful):
            loss_BS = model.loss(*batch_of())
            loss_BS.sum().backward()
        found.append(({"loss": loss_BS.detach()}, grads_of(model)))
    (expected, reference), (loss, grads) = found
    assert_differs(grads, reference)
    return Shows(loss=worst_of(loss, expected), gradients=worst_of(grads, reference))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="each embedding mixes two tokens; the loss stays near log V", seen_in=None
)
def test_ranks_of_a_replica_with_other_tokens():
    """A data loader that counts all ranks, where it should count replicas."""
    found = compare(config(), batch=batch_of(seed=1 + dist.get_rank()))
    assert found.shows().loss < 0.1
    assert_differs(found.grads, found.reference, at_least=0.1)
    return found.shows()


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is too large by log((V + padding) / V), so it changes with tp",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1754",
)
def test_padding_in_the_softmax():
    right = tp.vocab_parallel_cross_entropy
    _, targets_BS = batch_of()
    padded = tp.padded_vocab_size(61, dist.get_world_size())
    logits_BSv = torch.zeros(3, 13, padded // dist.get_world_size(), device=ranks.device)
    counts = targets_BS != -100
    for vocab, columns in ((61, 61), (None, padded)):
        loss = right(logits_BSv.double(), targets_BS, None, vocab)[counts]
        assert_equal({"loss": loss}, {"loss": torch.full_like(loss, math.log(columns))})

    def without_vocab_size(logits_BSv, targets_BS, group, vocab_size):
        return right(logits_BSv, targets_BS, group)

    with plant(tp, "vocab_parallel_cross_entropy", without_vocab_size):
        found = compare(config())
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is too large by log(tp), and only the target's rank has its full gradient",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)
def test_gathered_logits_in_the_parallel_loss():
    right = tp.vocab_parallel_cross_entropy

    def gathered(logits_BSv, targets_BS, group, vocab_size):
        return right(tp.gather_from_tp(logits_BSv, group), targets_BS, group)

    with plant(tp, "vocab_parallel_cross_entropy", gathered):
        found = compare(config(vocab_size=64))
    excess = (found.loss - found.expected)[found.expected != 0]
    expected = torch.full_like(excess, math.log(dist.get_world_size()))
    assert_equal({"loss": excess}, {"loss": expected})
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="close to right, until logits grow and the ranks' maxima differ", seen_in=None
)
def test_each_rank_subtracts_its_own_maximum():
    def without_maximum(x, group=None, op=dist.ReduceOp.SUM):
        return x if op == dist.ReduceOp.MAX else right(x, group, op)

    with plant(tp, "_all_reduce", without_maximum) as right:
        found = compare(config())
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="NaN, but only where a rank holds nothing but padding", seen_in=None
)
def test_a_product_with_the_mask():
    """0 · −inf in place of where(): with 5 entries on 4 ranks the last rank holds padding alone.

    Backward uses the softmax only, and is right.
    """
    with plant(torch, "where", lambda mask, x, other: mask * x):
        found = compare(config(vocab_size=5))
        without_padding = compare(config(vocab_size=8))
    assert without_padding.loss.isfinite().all()
    assert found.loss.isnan().any()
    return Shows(loss="NaN", gradients=found.shows().gradients)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss moves in steps of a percent; fp32 runs of the same model differ", seen_in=None
)
def test_exponentials_of_bf16_logits():
    """bf16 logits without upcast, compared with the float64 loss of the same logits."""
    logits = random(3, 13, 64).to(BF16)
    _, targets = batch_of(vocab=64)
    full = logits.double().requires_grad_()
    expected = plain_loss(full, targets)
    expected.sum().backward()

    def errors() -> tuple[float, float]:
        local = shard_logits(logits).requires_grad_()
        loss = tp.vocab_parallel_cross_entropy(local, targets)
        loss.sum().backward()
        reference = full.grad.chunk(2, -1)[dist.get_rank()]
        loss_error = worst_of({"loss": loss.detach().double()}, {"loss": expected.detach()})
        return loss_error, worst_of({"grad": local.grad.double()}, {"grad": reference})

    assert errors()[0] < 1e-6
    with plant(torch, "promote_types", lambda a, b: a):
        loss, gradients = errors()
    assert loss > 1e-3
    return Shows(loss, gradients)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the norm is too large, so clipping acts too early; the loss still falls",
    seen_in="https://github.com/NVIDIA-NeMo/RL/issues/3788",
)
def test_norm_that_counts_replicated_parameters_tp_times():
    """The gradients shown are those after clipping to a hundredth of the norm."""
    cfg = config()
    plain, parallel = models(cfg)
    loss, expected = parallel.loss(*batch_of()).sum(), plain.loss(*batch_of()).sum()
    loss.backward()
    expected.backward()
    right = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    norm = tp.clip_grad_norm_(parallel.parameters(), 1e9, sharded=parallel.sharded_parameters())
    assert_equal({"norm": norm}, {"norm": right})
    grads = grads_of(plain)
    replicated = sum(grad.square().sum() for n, grad in grads.items() if tp.shard_dim(n) is None)

    max_norm = right.item() / 100
    nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    wrong = tp.clip_grad_norm_(parallel.parameters(), max_norm, sharded=parallel.parameters())
    excess = {"squares": wrong.square() - right.square()}
    expected_excess = {"squares": (dist.get_world_size() - 1) * replicated}
    assert_equal(excess, expected_excess, bound=1e-9)  # a difference of nearly equal squares
    assert wrong > 1.01 * right
    return Comparison(loss, merged(grads_of(parallel), cfg), expected, grads).shows()


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="tokens weigh more where their replica has few; close to right, and never exact",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_mean_of_means_over_replicas():
    cfg, mesh = config(), mesh_of(2)
    plain, parallel = models(cfg, mesh.tp_group)
    batch = batch_of(rows=4)
    expected = plain.loss(*batch).sum() / (batch[1] != -100).sum()
    expected.backward()
    tokens_BS, targets_BS = (x.tensor_split(2)[mesh.dp_rank] for x in batch)
    count = (targets_BS != -100).sum()  # of this replica alone
    loss = parallel.loss(tokens_BS, targets_BS).sum() / count / 2
    loss.backward()
    tp.sum_gradients(parallel.parameters(), mesh.dp_group)
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh.dp_group)
    grads = merged(grads_of(parallel), cfg, mesh.tp_group)
    found = Comparison(loss, grads, expected, grads_of(plain))
    assert found.shows().loss < 0.05  # looks right
    assert_differs(found.grads, found.reference, at_least=0.01)
    return found.shows()


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(4)
def test_sizes_that_do_not_divide_are_refused_on_every_rank():
    sizes = "num_heads=6 and ffn_hidden_size=144 do not divide over tp=4 ranks"
    with pytest.raises(ValueError, match=rf"{sizes}: tp must divide both"):
        tp.ParallelGPT(config(hidden_size=36, num_heads=6))
    with pytest.raises(ValueError, match="out_features=10 does not divide over 4 ranks"):
        tp.ColumnParallelLinear(4, 10)
    with pytest.raises(ValueError, match="in_features=10 does not divide over 4 ranks"):
        tp.RowParallelLinear(10, 4)
    with pytest.raises(ValueError, match="the last dimension=10 does not divide over 4 ranks"):
        tp.scatter_to_tp(torch.zeros(2, 10))
    with pytest.raises(ValueError, match="tp=3 does not divide the 4 ranks"):
        tp.make_mesh(3, ranks.device)


@pytest.mark.ranks(1, 2)
def test_token_ids_out_of_range_are_refused_on_every_rank():
    """On the CPU only: on a GPU the check would wait for the device."""
    if ranks.device.type != "cpu":
        pytest.skip("not checked on a GPU")
    model = tp.ParallelGPT(config())
    tokens_BS, targets_BS = batch_of()
    for wrong in (61, -1):
        with pytest.raises(ValueError, match=rf"token id {wrong} is not in \[0, 61\)"):
            model(torch.full_like(tokens_BS, wrong))
    logits_BSv = torch.zeros(3, 13, 64)
    message = r"token id 61 is not in \[0, 61\), and not ignore_index=-100"
    with pytest.raises(ValueError, match=message):
        wrong_BS = torch.full_like(targets_BS, 61)
        tp.vocab_parallel_cross_entropy(logits_BSv, wrong_BS, vocab_size=61)
    with pytest.raises(ValueError, match="vocab_size=999, but the group holds"):
        tp.vocab_parallel_cross_entropy(logits_BSv, targets_BS, vocab_size=999)
    with pytest.raises(ValueError, match="all dimensions but the last must agree"):
        tp.vocab_parallel_cross_entropy(logits_BSv, targets_BS[:, 1:])
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 30}, "hidden_size=30, num_heads=4: the first must be a multiple"),
        ({"num_layers": 0}, "num_layers=0: it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size=-1: it must be at least 1"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size=0: it must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0: it must be at least 0 and less than 1"),
        ({"dropout": math.nan}, "dropout=nan: it must be at least 0"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", ["final_norm.weight", "head.weight", "positions.weight"])
def test_state_dicts_that_do_not_fit_are_refused_by_name(name):
    """A tensor is missing, unknown, or of another shape."""
    full = dict(tp.initial_weights(config()))
    if name == "final_norm.weight":
        del full[name]
    else:
        full[name] = torch.zeros(4, 32)
    message = rf"missing, unknown or of another shape: \[\('{name}', \("
    with pytest.raises(ValueError, match=message):
        tp.shard_state_dict(full, config(), 0, 2)


# ── Text ────────────────────────────────────────────────────────────────────────────────────────


def write_bad_texts(folder: Path) -> dict[str, str]:
    """Files that cannot be used, each with its message."""
    (folder / "empty").write_text("")
    (folder / "short").write_text("x" * 200)
    (folder / "latin").write_bytes(b"caf\xe9")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    return {
        "empty": "empty has 0 tokens: a tenth of it must be longer than 128",
        "short": "short has 200 tokens: a tenth of it must be longer than 128",
        "latin": "latin is not UTF-8 at byte 3",
        "folder": "folder: No such file, or not a regular one",
        "pipe": "pipe: No such file, or not a regular one",
        "nowhere": "nowhere: No such file, or not a regular one",
    }


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    for name, message in write_bad_texts(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            tp.TextData(str(tmp_path / name), 128)


def test_the_last_tenth_of_a_text_is_the_eval_split(tmp_path):
    """Windows reach the end of their split; a text one token too short is refused."""
    (tmp_path / "text").write_text("a" * 900 + "b" * 100)
    data = tp.TextData(str(tmp_path / "text"), 99)
    train_2BS = torch.stack(data.batch(0, 50, 0))
    assert train_2BS.unique().tolist() == [ord("a")]
    # 100 tokens: one window of 99 with its last target
    eval_2BS = torch.stack(data.batch(0, 3, 0, evaluation=True))
    assert eval_2BS.unique().tolist() == [ord("b")]
    with pytest.raises(ValueError, match="longer than 100"):
        tp.TextData(str(tmp_path / "text"), 100)


def test_batches_are_a_function_of_seed_and_step():
    data = tp.TextData("", 16)
    tokens_BS, targets_BS = data.batch(3, 5, seed=1)
    assert tokens_BS.shape == targets_BS.shape == (5, 16)
    assert torch.equal(tokens_BS[:, 1:], targets_BS[:, :-1])
    assert torch.equal(tokens_BS, data.batch(3, 5, seed=1)[0])
    for other in (data.batch(4, 5, seed=1), data.batch(3, 5, seed=2)):
        assert not torch.equal(tokens_BS, other[0])


def test_the_byte_encoding():
    text = "ünïcode ✓ 1"
    encoding = tp.byte_encoding()
    assert encoding.encode(text) == list(text.encode())
    assert encoding.decode(encoding.encode(text)) == text
    assert encoding.n_vocab == 256


# ── Reports and the demonstration ───────────────────────────────────────────────────────────────


def test_a_failed_claim_is_printed_and_returned(capsys):
    good = [("a", "1", "1", True), ("b", "2", "–", "needs 8 GPUs")]
    assert tp.print_claims(good)
    assert not tp.print_claims([*good, ("c", "3", "4", False)])
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert "ok" in first and "needs 8 GPUs" in second
    assert third.split() == ["c", "3", "4", "FAILED"]


def test_an_error_that_is_nan_is_the_worst(capsys):
    errors = {"gradient a": 1e-12, "gradient b": 1e-11, "loss 0": 1e-3}
    assert tp.worst(errors) == 1e-3
    assert tp.worst(errors, "gradient") == 1e-11
    assert tp.worst(errors | {"gradient c": math.nan}, "gradient") == math.inf
    with pytest.raises(ValueError):
        tp.worst(errors, "weight")
    assert tp.print_errors({"loss 0": 1e-12}, 1e-10)
    assert not tp.print_errors({"loss 0": math.nan, "loss 1": 1e-12}, 1e-10)
    assert "worst inf relative, bound 1e-10" in capsys.readouterr().out


def test_relative_errors():
    """max|Δ| / max|reference|, by kind and name; a floor for references near zero."""
    reference = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([1e-3])}
    tensors = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2e-3])}
    found = tp.relative_errors("weight", tensors, reference)
    assert found == {"weight a": 0.25, "weight b": pytest.approx(1.0)}
    found = tp.relative_errors("weight", tensors, reference, floor=1.0)
    assert found == {"weight a": 0.25, "weight b": pytest.approx(1e-3)}
    wrong = {"a": torch.tensor([1.0, math.nan])}
    assert math.isnan(tp.relative_errors("weight", wrong, reference)["weight a"])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("on_rank_1, expected", [(2e-3, 2e-3), (1e-6, 1e-3), (math.nan, math.inf)])
def test_errors_over_all_ranks(on_rank_1, expected):
    error = on_rank_1 if dist.get_rank() else 1e-3
    assert tp.over_all_ranks({"loss 0": error}) == {"loss 0": expected}


@pytest.mark.ranks(2)
def test_the_counter():
    """Collectives and sends with bytes and group; a barrier carries nothing."""
    other, x = 1 - dist.get_rank(), torch.ones(4, device=ranks.device)
    with tp.Counter() as counter:
        dist.barrier()
        dist.all_reduce(x)
        dist.all_gather([torch.empty_like(x) for _ in range(2)], x)
        send = dist.P2POp(dist.isend, x, other)
        receive = dist.P2POp(dist.irecv, torch.empty_like(x), other)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
    found = [(message.op, message.bytes) for message in counter.messages]
    assert found[:2] == [("all_reduce", 16), ("all_gather", 32)]
    assert sorted(found[2:]) == [("recv", 16), ("send", 16)]
    assert {message.group for message in counter.messages} == {dist.group.WORLD.group_name}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_chapters_own_check(degree):
    """`equivalence` covers every tensor on every rank, and sees a planted bug."""
    mesh = mesh_of(degree)
    errors = tp.equivalence(mesh, ranks.device, torch.float64)
    names = tp.parameter_shapes(tp.GPTConfig(num_layers=2))
    kinds = ("gradient", "weight after AdamW")
    assert {f"{kind} {name}" for kind in kinds for name in names} < errors.keys()
    assert {f"{kind} {i}" for kind in ("loss", "norm before clipping") for i in range(5)} < set(
        errors
    )
    assert tp.worst(errors) <= 1e-10
    if degree > 1:
        right = tp.copy_to_tp
        with plant(tp, "copy_to_tp", lambda x, group=None: right(right(x, group), group)):
            errors = tp.equivalence(mesh, ranks.device, torch.float64)
        assert tp.worst(errors, "gradient") > 1e-3


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, None), (torch.float32, BF16)])
def test_the_bounds_of_fp32_and_bf16(dtype, autocast):
    """What --check compares in fp32 and bf16 stays within BOUNDS, and no weights are compared."""
    name = "fp32" if autocast is None else "bf16"
    errors = tp.equivalence(mesh_of(2), ranks.device, dtype, autocast)
    assert 1e-9 < tp.worst(errors) <= tp.BOUNDS[name]
    assert not [name for name in errors if name.startswith("weight")]


@pytest.mark.ranks(2, 4)
def test_the_chapters_own_count():
    model = on_device(tp.ParallelGPT(config(), mesh_of(2).tp_group))
    assert tp.count_all_reduces(model, batch_of()[0]) == [2, 2]
    with plant(tp, "copy_to_tp", lambda x, group=None: x):
        assert tp.count_all_reduces(model, batch_of()[0]) != [2, 2]


TINY = ["--steps", "3", "--num-layers", "1", "--hidden-size", "32", "--seq-length", "32"]


def parse(*flags: str, gpus: int = 0):
    """The script's flags in this process, as on a machine with so many GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(SCRIPT), *flags])
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(tp, "TextData", text_data)
        return tp.flags()


text_data = lru_cache(tp.TextData)  # the default text is read once


@pytest.mark.parametrize("flags, compared", [([], 3), (["--dropout", "0.1"], 0)])
def test_the_demonstration_compares_losses(flags, compared, capsys):
    """With dropout a single device draws other masks: the run goes on without a comparison."""
    differences = tp.demonstrate(parse(*TINY, "--ranks", "1", *flags), tp.Mesh(), ranks.device)
    assert len(differences) == compared
    assert all(difference < 1e-4 for difference in differences)
    rows = table_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all(len(row) == (6 if compared else 5) for row in rows)


def table_rows(text: str) -> list[list[str]]:
    """The printed rows: step, loss, single device, norm, tokens/s, peak GB."""
    lines = [line.split() for line in text.splitlines()]
    return [line for line in lines if line and line[0].isdigit() and len(line) in (5, 6)]


def test_a_failed_claim_ends_the_script_with_an_error(monkeypatch, capsys):
    """Also where every other claim holds; and so does an error above the bound in --check."""
    monkeypatch.setattr(tp, "make_mesh", lambda *_: tp.Mesh())
    claims = [("a", "1", "1", True)]
    monkeypatch.setattr(tp, "measure", lambda *_: claims)
    args = parse("--ranks", "1")
    tp.main(args, ranks.device)
    claims.append(("b", "1", "2", False))
    with pytest.raises(SystemExit) as end:
        tp.main(args, ranks.device)
    assert end.value.code == 1
    monkeypatch.setattr(tp, "equivalence", lambda *_: {"gradient x": 1e-9, "loss 0": 0.0})
    with pytest.raises(SystemExit) as end:
        tp.main(parse("--ranks", "1", "--check", "--dtype", "fp64"), ranks.device)
    assert end.value.code == 1


# ── Flags ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [*range(1, 10), 12])
def test_without_flags_any_number_of_ranks_works(count):
    """Of GPUs, too: the default of --tp fits them all, and none is idle."""
    for args in (parse("--ranks", str(count)), parse(gpus=count)):
        assert args.ranks == args.world_size == count
        assert args.tp == (1 if count % 2 else 2)
    assert args.device == "cuda" and args.backend == "nccl"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tp 3", "--tp 3 must divide the 4 ranks"),
        ("--tp 0", "argument --tp: '0' must be of type int, from 1"),
        ("--tp 4 --num-heads 2", "do not divide over tp=4 ranks: tp must divide both"),
        ("--ranks 1 --tp 4", "--tp 4 must divide the 1 ranks"),
        ("--ranks 0", "argument --ranks: '0' must be of type int, from 1"),
        ("--hidden-size 30", "hidden_size=30, num_heads=4: the first must be a multiple"),
        ("--dropout 1", "dropout=1.0: it must be at least 0 and less than 1"),
        ("--device cuda --ranks 2", "use --device cpu"),
        ("--backend nccl", "use --device cpu"),
        ("--steps -1", "argument --steps"),
        ("--batch 0", "argument --batch: '0'"),
        ("--lr nan", "argument --lr: 'nan' must be of type float"),
        ("--lr -1", "argument --lr"),
        ("--lr inf", "argument --lr: 'inf'"),
        ("--timeout nan", "argument --timeout: 'nan'"),
        (f"--seed {2**70}", "argument --seed"),
        ("--data /nowhere/at/all", "/nowhere/at/all: No such file, or not a regular one"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    assert message in refusal(flags.split(), capsys)


def refusal(flags: list[str], capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        parse(*flags)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage:")
    return error


def test_a_text_that_cannot_be_used_is_one_line(tmp_path, capsys):
    for name, message in write_bad_texts(tmp_path).items():
        assert message in refusal(["--data", str(tmp_path / name)], capsys)


# ── Whole scripts ───────────────────────────────────────────────────────────────────────────────


def run(*flags: str, **options):
    return scripts.run(SCRIPT, *flags, **options)


def test_a_wrong_flag_ends_the_script_before_any_rank_starts(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--tp", "3"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed, errors = capsys.readouterr()
    assert end.value.code == 2
    assert len(errors.splitlines()) == 2 and not printed


def changed_script(path: Path) -> Path:
    """A copy of the script with a bug: the all-reduce of the column-parallel backward twice."""
    text = SCRIPT.read_text("utf-8")
    right = "        if work is not None:\n            work.wait()\n"
    assert text.count(right) == 1
    wrong = right + "            dist.all_reduce(dx_BSH, group=ctx.group)\n"
    path.write_text(text.replace(right, wrong), "utf-8")
    return path


@pytest.mark.slow
def test_a_copy_with_a_bug_ends_with_an_error(tmp_path):
    """The exit code is not 0."""
    result = scripts.forked(changed_script(tmp_path / "bad.py"), "--ranks", "2", *TINY)
    assert result.returncode != 0
    assert "worst" in result.stdout and "FAILED" in result.stdout


@pytest.mark.ranks(2)
def test_the_check_of_a_copy_with_a_bug_ends_with_an_error(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        changed_script(tmp_path / f"bad_{dist.get_rank()}.py")
        bad = importlib.import_module(f"bad_{dist.get_rank()}")
    code, printed = scripts.on_ranks(bad, "--check", "--dtype", "fp64")
    assert code == 1 and "worst" in printed
    code, printed = scripts.on_ranks(tp, "--check", "--dtype", "fp64")
    assert code == 0 and "worst" in printed


CHECK = ["--check", "--dtype", "fp64", "--ranks", "2"]


@pytest.fixture(scope="module")
def checked():
    """`--check` on two ranks; the front door shows it without their number."""
    return run(*CHECK)


@pytest.mark.slow
def test_check_prints_every_error_and_the_bound(checked):
    assert checked.returncode == 0, checked.stderr
    assert "2 ranks: tp 2 × dp 1, fp64, seed 0" in checked.stdout
    assert checked.stdout.splitlines()[-1].endswith("relative, bound 1e-10")
    for name in tp.parameter_shapes(tp.GPTConfig(num_layers=2)):
        for kind in ("gradient", "weight after AdamW"):
            assert f"\n{kind} {name} " in checked.stdout


@pytest.mark.slow
def test_three_ways_to_start_give_the_same_values(checked):
    """python, torchrun, and two torchrun agents on the loopback as two nodes: digit for digit."""
    torchrun = ["-m", "torch.distributed.run"]
    check = CHECK[:-2]
    one_node = run(*check, launcher=(*torchrun, "--standalone", "--nproc-per-node=2"))
    with socket.socket() as probe:  # a free port for the rendezvous
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d", "--rdzv-id=1"]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *rendezvous]
    command = [*torchrun, *nodes, str(SCRIPT), *check]
    with scripts.started(*command) as first, scripts.started(*command) as second:
        outputs = [node.communicate(timeout=120) for node in (first, second)]
        assert [node.returncode for node in (first, second)] == [0, 0], outputs
    assert checked.stdout
    assert one_node.stdout == checked.stdout
    assert "".join(out for out, _ in outputs) == checked.stdout


@pytest.mark.ranks(2)
def test_a_run_with_a_text_dropout_and_recomputation(tmp_path):
    """--data with a non-ASCII name; with dropout nothing is compared with the single device."""
    text = tmp_path / "größe x.txt"
    if dist.get_rank() == 0:
        text.write_text("To be, or not to be, that is the question. " * 100, "utf-8")
    dist.barrier()
    options = ["--data", text, "--dropout", "0.1", "--recompute"]
    code, printed = scripts.on_ranks(tp, *TINY, *options)
    assert code == 0
    assert [len(row) for row in table_rows(printed)] == [5, 5, 5]
    assert "losses equal" not in printed
    assert "4,300 tokens of text" in printed
