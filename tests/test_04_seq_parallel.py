# SPDX-License-Identifier: MIT-0
"""Chapter 4 equals the single device in its three modes, and chapter 2's tensor parallelism.

A test marked `ranks` runs on every rank of that world. References are the plain model of chapter 2,
which this chapter's own must equal, PyTorch, or a formula written out in the test. What a layer
keeps and sends is compared in six modes: `TensorParallelLayer` of the table file is tensor
parallelism alone.
"""

import contextlib
import copy
import functools
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import megatron_tp as tp
import numpy as np
import pytest
import ranks
import scripts
import seq_parallel as sp
import seq_parallel_tables as tables
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
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(sp.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)
EVERY_RECOMPUTE = pytest.mark.parametrize("recompute", sp.RECOMPUTE)
EVERY_MODE = pytest.mark.parametrize("mode", tables.MODES, ids=str)


# ── Helpers ─────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> sp.GPTConfig:
    sizes = {"vocab_size": 61, "seq_length": 16, "hidden_size": 32, "num_layers": 2}
    return sp.GPTConfig(**(sizes | {"num_heads": 4} | changes))


def on_device(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    return module.to(ranks.device, dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(ranks.device)


def batch_of(rows: int = 3, length: int = 12, vocab: int = 61, seed: int = 1):
    """Token ids and targets; 12 tokens divide over 1, 2 and 4 ranks, and are fewer than 16."""
    generator = torch.Generator().manual_seed(seed)
    both_2BS = torch.randint(vocab, (2, rows, length), generator=generator)
    tokens_BS, targets_BS = both_2BS.to(ranks.device)
    targets_BS[0, 3:] = -100
    return tokens_BS, targets_BS


def parallel_model(cfg: sp.GPTConfig, recompute: str = "none", **options) -> sp.SequenceParallelGPT:
    return on_device(sp.SequenceParallelGPT(cfg, None, recompute, **options))


def of_chapter_2(cfg: sp.GPTConfig) -> tp.GPTConfig:
    return tp.GPTConfig(**vars(cfg))


def plain_model(cfg: sp.GPTConfig) -> tp.GPT:
    """Chapter 2's, which shares no line with the layers of this chapter."""
    return on_device(tp.GPT(of_chapter_2(cfg)))


def plain_layer(cfg: sp.GPTConfig) -> tp.Block:
    torch.manual_seed(5)
    return on_device(tp.Block(of_chapter_2(cfg)))


def layer_of(cfg: sp.GPTConfig, mode: tables.Mode, **options) -> nn.Module:
    """A layer of a mode, with the weights that `Layer` draws from seed 5."""
    torch.manual_seed(5)
    layer = sp.SequenceParallelLayer(cfg, None, mode.recompute, **options)
    if not mode.sequence_parallel:
        weights = layer.state_dict()
        layer = tables.TensorParallelLayer(cfg, None, mode.recompute, **options)
        layer.load_state_dict(weights)
    return layer


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return sp.make_optimizer(model, lr)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def everywhere(x) -> list:
    """Every rank's x. Tensors travel as numpy's arrays, which are pickled faster."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, tree_map_only(Tensor, lambda t: t.detach().cpu().numpy(), x))
    return tree_map_only(np.ndarray, torch.from_numpy, found)


def on_cpu(tensors: dict) -> dict:
    return {name: x.detach().cpu() for name, x in tensors.items()}


def merged(tensors: dict, cfg: sp.GPTConfig) -> dict:
    """All ranks' shards, merged; replicated tensors must be equal on every rank, to the bit."""
    return tp.merge_state_dicts(everywhere(on_cpu(tensors)), cfg)


def rank_0s(tensors: dict, cfg: sp.GPTConfig) -> dict:
    """`merged` for planted bugs: of replicated tensors that differ, rank 0's."""
    shards = everywhere(on_cpu(tensors))
    for shard in shards[1:]:
        shard.update({name: shards[0][name] for name in shard if sp.shard_dim(name) is None})
    return tp.merge_state_dicts(shards, cfg)


@functools.cache
def plain_gradients() -> tuple:
    """Loss per token and gradients of the plain model of `config()`, once on these ranks."""
    plain = plain_model(config())
    loss = plain.loss(*batch_of())
    loss.sum().backward()
    return loss.detach(), grads_of(plain)


def step_gradients(parallel: nn.Module, batch: tuple) -> Tensor:
    """Loss per token; gradients are as a step makes them, summed where they must be."""
    loss = parallel.loss(*batch)
    loss.sum().backward()
    sp.reduce_sequence_parallel_grads(parallel)
    return loss


def seed(model: nn.Module, step: int = 0) -> None:
    sp.seed_dropout(model, 7, step, dist.get_rank())


# ── 1.1 The operators ───────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_operators_forward_and_backward():
    """Each operator against its row of the table, written out with the tensors of all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = random(8, 3, 5)
    per_rank = [random(8, 3, 5, seed=10 + r) for r in range(world)]
    mine = slice(8 // world * rank, 8 // world * (rank + 1))

    a = x[mine].clone().requires_grad_()
    y = sp.gather_from_sp(a)
    y.backward(per_rank[rank])
    assert torch.equal(y, x)
    assert_equal({"g": a.grad}, {"g": sum(per_rank)[mine]})

    a = x[mine].clone().requires_grad_()
    y = sp.gather_from_sp(a, backward="split")
    y.backward(per_rank[0])
    assert torch.equal(y, x)
    assert torch.equal(a.grad, per_rank[0][mine])

    a = per_rank[rank].clone().requires_grad_()
    y = sp.reduce_scatter_to_sp(a)
    y.backward(x[mine])
    assert_equal({"ḡ": y}, {"ḡ": sum(per_rank)[mine]})
    assert torch.equal(a.grad, x)
    assert torch.equal(a, per_rank[rank]), "the input was modified"

    a = x.clone().requires_grad_()
    y = sp.scatter_to_sp(a)
    y.backward(per_rank[0][mine])
    assert torch.equal(y, x[mine])
    assert torch.equal(a.grad, per_rank[0])


@pytest.mark.ranks(2)
def test_the_example_of_section_1_1():
    """Tokens 3 and 4, weights 2 and 5: rank 0 has (2, 2), rank 1 (5, 5), and each gets its 7."""
    rank = dist.get_rank()
    x = torch.tensor([[3.0], [4.0]][rank]).requires_grad_()
    (sp.gather_from_sp(x) * [2.0, 5.0][rank]).sum().backward()
    assert x.grad.tolist() == [7.0]
    x.grad = None
    (sp.gather_from_sp(x, backward="split") * [2.0, 5.0][rank]).sum().backward()
    assert x.grad.tolist() == [[2.0], [5.0]][rank]


@pytest.mark.ranks(2, 4)
def test_second_derivatives_of_the_operators():
    """y = g(x)³ summed over the ranks by ḡ: each rank computes the same, so dy/dx = 3·t·x²."""
    t = dist.get_world_size()
    x = random(2, 3).requires_grad_()
    y = sp.reduce_scatter_to_sp(sp.gather_from_sp(x) ** 3)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_equal({"1": first, "2": second}, {"1": 3 * t * x**2, "2": 6 * t * x})


def test_without_a_process_group_there_is_one_rank():
    """Every function works in a process without process groups."""
    assert not dist.is_initialized()
    x = random(8, 3, 5)
    for operator in (sp.gather_from_sp, sp.reduce_scatter_to_sp, sp.scatter_to_sp):
        assert operator(x) is x
    cfg = config(num_layers=1)
    plain = plain_model(cfg)
    steps = sp.train_alone(plain, adamw(plain), [batch_of()] * 2)
    alone = {step: loss for step, (loss, _) in enumerate(steps)}
    for recompute in sp.RECOMPUTE:
        model = parallel_model(cfg, recompute)
        steps = enumerate(sp.train(model, adamw(model), [batch_of()] * 2))
        assert_equal({step: loss for step, (loss, _) in steps}, alone)


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

    names = {"all_reduce", *Events.COLLECTIVES}
    with contextlib.ExitStack() as plants:
        for name in sorted(names & vars(dist).keys()):
            plants.enter_context(plant(dist, name, demanding(getattr(dist, name))))
        yield calls


@pytest.mark.ranks(2)
def test_operators_and_layers_send_contiguous_tensors():
    """With transposed inputs and gradients: gloo accepts them, NCCL does not."""

    def transposed(*shape: int, seed: int = 1) -> Tensor:
        *leading, a, b = shape
        return random(*leading, b, a, seed=seed).mT

    operators = [sp.gather_from_sp, sp.reduce_scatter_to_sp, sp.scatter_to_sp]
    operators.append(partial(sp.gather_from_sp, backward="split"))
    operators += [on_device(sp.SPColumnParallelLinear(8, 12))]
    operators += [on_device(sp.SPRowParallelLinear(16, 12))]
    for operator in operators:
        x = transposed(4, 6, 8).requires_grad_()
        with contiguous_collectives() as calls:
            y = operator(x)
            y.backward(transposed(*y.shape, seed=2))
        right = operator(x.detach().contiguous().requires_grad_())
        assert torch.equal(y, right)
        assert calls
    x = random(3, 8, 5).transpose(0, 1)  # a view with tokens first
    assert torch.equal(sp.gather_from_sp(x.chunk(2)[dist.get_rank()]), x)
    assert_equal({"x": sp.reduce_scatter_to_sp(x)}, {"x": 2 * x.chunk(2)[dist.get_rank()]})


@pytest.mark.ranks(2)
def test_a_training_step_sends_contiguous_tensors():
    model = parallel_model(config(), "full")
    with contiguous_collectives() as calls:
        list(sp.train(model, adamw(model), [batch_of()] * 2))
    assert {name.split("_")[0] for name in calls} == {"all", "reduce"}


# ── 1.2 Linear layers ───────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("shape", [(8, 3), (4, 1), (0, 2)], ids=str)
def test_linear_layers(sequence_parallel, shape):
    """Column- and row-parallel next to two of nn.Linear: output and every gradient."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    plain = on_device(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)))
    torch.manual_seed(3)
    column, row = sp.SPColumnParallelLinear, sp.SPRowParallelLinear
    if not sequence_parallel:
        column, row = tables.TPColumnParallelLinear, tables.TPRowParallelLinear
    parallel = on_device(nn.Sequential(column(8, 12), nn.Tanh(), row(12, 8)))
    x, upstream = random(*shape, 8).requires_grad_(), random(*shape, 8, seed=2)
    expected = plain(x)
    grad_x, *grads = torch.autograd.grad(expected, [x, *plain.parameters()], upstream)

    def shard(full: Tensor) -> Tensor:
        return full.chunk(world)[rank] if sequence_parallel and shape[0] else full

    mine = shard(x.detach()).clone().requires_grad_()
    y = parallel(mine)
    grad_mine, *grads_mine = torch.autograd.grad(y, [mine, *parallel.parameters()], shard(upstream))
    if sequence_parallel:
        dist.all_reduce(grads_mine[3])  # the row-parallel bias: a partial gradient
    shards = [g.chunk(world, dim)[rank] for g, dim in zip(grads, (0, 0, 1))]
    names = "y", "x", "weight 1", "bias 1", "weight 2", "bias 2"
    here = dict(zip(names, (y, grad_mine, *grads_mine)))
    there = dict(zip(names, (shard(expected), shard(grad_x), *shards, grads[3])))
    if not shape[0]:
        for name in names:
            assert here[name].shape == there[name].shape
            assert not here[name].any()
    else:
        assert_equal(here, there)


@pytest.mark.ranks(2)
def test_column_backward_overlaps_both_collectives():
    """Gather, GEMM, reduce-scatter, wait for the gather, GEMM, wait for the reduce-scatter."""
    layer = on_device(sp.SPColumnParallelLinear(8, 12))
    y = layer(random(4, 3, 8).requires_grad_())
    with Events() as events:
        y.sum().backward()
    assert events.order == ["all_gather", "product", "reduce_scatter", "wait", "product", "wait"]


@pytest.mark.ranks(2)
def test_nothing_is_sent_for_what_needs_no_gradient():
    """A frozen weight needs no second gather, an input without gradient no reduce-scatter."""
    layer = on_device(sp.SPColumnParallelLinear(8, 12))
    y = layer(random(4, 3, 8))
    with Events() as events:
        y.sum().backward()
    assert events.order == ["all_gather", "wait", "product"]
    layer.requires_grad_(False)
    y = layer(random(4, 3, 8).requires_grad_())
    with Events() as events:
        y.sum().backward()
    assert events.order == ["product", "reduce_scatter", "wait"]


@pytest.mark.ranks(2)
def test_a_frozen_weight_keeps_no_input():
    layer = on_device(sp.SPColumnParallelLinear(8, 12)).requires_grad_(False)
    with SavedStorages(layer) as saved:
        layer(random(4, 3, 8).requires_grad_())
    assert saved.bytes == 0


@pytest.mark.ranks(2)
def test_a_second_derivative_of_the_layer_is_refused():
    """It would pass on one rank's partial sum: it raises."""
    layer = on_device(sp.SPColumnParallelLinear(8, 12))
    x = random(4, 3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.ranks(2, 4)
def test_the_shard_is_kept():
    """A column-parallel layer keeps 1/t of its input; g and a GEMM of its own would keep all."""
    world = dist.get_world_size()
    layer = on_device(sp.SPColumnParallelLinear(8, 12))
    x = random(8 // world, 3, 8).requires_grad_()
    with SavedStorages(layer) as ours:
        layer(x)
    with SavedStorages(layer) as naive:
        F.linear(sp.gather_from_sp(x), layer.weight)
    assert ours.bytes == x.nbytes
    assert naive.bytes == world * x.nbytes


# ── 1.3 Partial gradients: the marks ────────────────────────────────────────────────────────────


class OddNames(nn.Module):
    """LayerNorm `up`, then two linear layers whose names no table knows."""

    def __init__(self, column: Callable = nn.Linear, row: Callable = nn.Linear):
        super().__init__()
        self.up = nn.LayerNorm(8)
        self.gate = column(8, 12)
        self.projection = row(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.gate(self.up(x)).tanh())


def odd_models() -> tuple[OddNames, OddNames]:
    torch.manual_seed(3)
    plain = on_device(OddNames())
    torch.manual_seed(3)
    parallel = on_device(OddNames(sp.SPColumnParallelLinear, sp.SPRowParallelLinear))
    return plain, parallel


def odd_gradients(plain: OddNames, parallel: OddNames) -> tuple[dict, dict]:
    """The parallel gradients and the plain model's, sharded as they are."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x_SBH, upstream_SBH = random(8, 3, 8), random(8, 3, 8, seed=2)
    plain(x_SBH).backward(upstream_SBH)
    parallel(x_SBH.chunk(world)[rank]).backward(upstream_SBH.chunk(world)[rank])
    sp.reduce_sequence_parallel_grads(parallel)
    dims = {"gate.weight": 0, "gate.bias": 0, "projection.weight": 1}
    reference = grads_of(plain)
    for name, dim in dims.items():
        reference[name] = reference[name].chunk(world, dim)[rank]
    return grads_of(parallel), reference


@EVERY_WORLD
def test_gradients_of_layers_with_other_names():
    """The marks decide, and no name does: LayerNorm is called `up`, which is a sharded matrix."""
    plain, parallel = odd_models()
    sp.mark(parallel.up.parameters(), True)
    assert_equal(*odd_gradients(plain, parallel))


@EVERY_WORLD
def test_a_parameter_without_a_mark_is_refused():
    """Also one that lost its mark to deepcopy; a frozen one needs none."""
    _, parallel = odd_models()
    with pytest.raises(ValueError, match=r"is the gradient of up.weight a partial sum\? Call mark"):
        sp.reduce_sequence_parallel_grads(parallel)
    parallel.up.requires_grad_(False)
    sp.reduce_sequence_parallel_grads(parallel)
    model = sp.SequenceParallelGPT(config())
    sp.reduce_sequence_parallel_grads(model)
    with pytest.raises(ValueError, match="gradient of embedding.weight"):
        sp.reduce_sequence_parallel_grads(copy.deepcopy(model))


@pytest.mark.ranks(1, 2)
def test_marks_of_the_model():
    """They survive a change of dtype and device; replicated is marked True, sharded False."""
    model = parallel_model(config()).to(ranks.device).bfloat16().double()
    for name, p in model.named_parameters():
        assert p.sequence_parallel == (sp.shard_dim(name) is None), name


@pytest.mark.ranks(2)
def test_a_gradient_that_one_rank_lacks():
    """It counts as zero: were it left out, two ranks would all-reduce buffers of unequal size."""
    norms = on_device(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)))
    sp.mark(norms.parameters(), True)
    norms[0](random(3, 4)).sum().backward()
    if dist.get_rank() == 0:
        norms[1](random(3, 4)).sum().backward()
    alone = norms[0].bias.grad.clone()
    sp.reduce_sequence_parallel_grads(norms)
    assert torch.equal(norms[0].bias.grad, 2 * alone)
    assert torch.equal(norms[1].bias.grad, alone)


@pytest.mark.ranks(2)
def test_gradients_of_two_dtypes():
    """fp32 LayerNorm next to bf16 matrices."""
    modules = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4).bfloat16()).to(ranks.device)
    sp.mark(modules.parameters(), True)
    for p in modules.parameters():
        p.grad = torch.full_like(p, dist.get_rank() + 1.0)
    sp.reduce_sequence_parallel_grads(modules)
    for p in modules.parameters():
        assert p.grad.dtype == p.dtype
        assert p.grad.eq(3).all()


FROZEN = ["none", "embedding", "positions", "norm", "qkv", "out.bias", "up", "down.weight"]


@pytest.mark.ranks(2)
@EVERY_RECOMPUTE
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, recompute):
    """A step with any of them frozen, and with all others frozen, equals the single device's."""
    cfg = config(num_layers=1)
    for inverted in (False, True):
        plain, parallel = plain_model(cfg), parallel_model(cfg, recompute)
        for model in (plain, parallel):
            for name, p in model.named_parameters():
                p.requires_grad_((frozen not in name) != inverted)
        if not any(p.requires_grad for p in plain.parameters()):
            continue
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, parallel)]
        ((expected, norm),) = sp.train_alone(plain, optimizers[0], [batch_of()])
        ((loss, norm_here),) = sp.train(parallel, optimizers[1], [batch_of()])
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
        assert_equal(merged(grads_of(parallel), cfg), grads_of(plain))


# ── 1.4 Core attention ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("core", [sp.unfused_attention, sp.fused_attention])
def test_core_attention(core):
    """Both forms against the plain model's, value and gradients."""
    qkv = random(3, 2, 4, 7, 5).requires_grad_()  # three, B, N, S, D
    expected = tp.core_attention(*qkv, tp.Dropout(0.0))
    (grad,) = torch.autograd.grad(expected, qkv, random(2, 4, 7, 5, seed=2))
    y = core(*qkv.flatten(1, 2), sp.Dropout(0.0))
    (grad_here,) = torch.autograd.grad(y, qkv, random(8, 7, 5, seed=2))
    assert_equal({"y": y.view(2, 4, 7, 5), "grad": grad_here}, {"y": expected, "grad": grad})


# ── Layer and model: float64 ────────────────────────────────────────────────────────────────────


def shard_of_tokens(x_SBH: Tensor, mode: tables.Mode) -> Tensor:
    world, rank = dist.get_world_size(), dist.get_rank()
    return x_SBH.chunk(world)[rank] if mode.sequence_parallel else x_SBH


def layer_gradients(layer: nn.Module, mode: tables.Mode, cfg: sp.GPTConfig) -> tuple[dict, dict]:
    """Output and every gradient of a layer; the second is sharded over the ranks."""
    x = shard_of_tokens(random(12, 3, 32), mode).clone().requires_grad_()
    y = layer(x)
    y.backward(shard_of_tokens(random(12, 3, 32, seed=2), mode))
    sp.reduce_sequence_parallel_grads(layer)
    grads = {f"x.{name}": grad for name, grad in grads_of(layer).items()}
    return {"y": y, "x": x.grad}, grads


@EVERY_WORLD
@EVERY_MODE
def test_layer(mode):
    """One layer in six modes: output, the input's gradient and every parameter's."""
    cfg = config()
    plain = plain_layer(cfg)
    a = random(12, 3, 32).transpose(0, 1).clone().requires_grad_()
    expected = plain(a)
    expected.backward(random(12, 3, 32, seed=2).transpose(0, 1))
    here, grads = layer_gradients(on_device(layer_of(cfg, mode)), mode, cfg)
    there = {"y": expected.transpose(0, 1), "x": a.grad.transpose(0, 1)}
    assert_equal(here, {name: shard_of_tokens(x, mode) for name, x in there.items()})
    reference = {f"x.{name}": grad for name, grad in grads_of(plain).items()}
    assert_equal(merged(grads, cfg), reference)


def test_the_plain_model_is_chapter_2s():
    """Initial weights to the bit, loss and gradients; the weights of a layer by itself."""
    cfg = config()
    plain = on_device(sp.GPT(cfg))
    reference = plain_model(cfg)
    weights = reference.state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in plain.state_dict().items())
    results = []
    for model in (plain, reference):
        loss = model.loss(*batch_of())
        loss.sum().backward()
        results.append({"loss": loss, **grads_of(model)})
    assert_equal(*results)
    torch.manual_seed(5)
    layer = sp.Layer(cfg)
    weights = plain_layer(cfg).state_dict()
    assert all(torch.equal(x.double(), weights[name]) for name, x in layer.state_dict().items())
    with pytest.raises(ValueError, match="20 tokens, but the model has 16 positions"):
        plain(torch.zeros(1, 20, dtype=torch.int64))


@EVERY_WORLD
@EVERY_RECOMPUTE
def test_model(recompute):
    """Loss and every gradient; an odd batch, vocabulary and length."""
    cfg = config()
    expected, reference = plain_gradients()
    parallel = parallel_model(cfg, recompute)
    loss = step_gradients(parallel, batch_of())
    assert_equal({"loss": loss}, {"loss": expected})
    assert_equal(merged(grads_of(parallel), cfg), reference)


@pytest.mark.ranks(2, 4)
@EVERY_RECOMPUTE
def test_model_equals_chapter_2(recompute):
    """Tensor parallelism alone, in its two modes: the same loss, shards and gradients."""
    cfg = config()
    parallel = parallel_model(cfg, recompute)
    loss = step_gradients(parallel, batch_of())
    for recomputed in (False, True):
        reference = on_device(tp.ParallelGPT(of_chapter_2(cfg), None, recomputed))
        expected = reference.loss(*batch_of())
        expected.sum().backward()
        assert_equal({"loss": loss}, {"loss": expected})
        assert_equal(grads_of(parallel), grads_of(reference))
        weights = reference.state_dict()
        for name, x in parallel.state_dict().items():
            assert torch.equal(x, weights[name])


@EVERY_WORLD
def test_model_with_the_fused_kernel():
    cfg = config()
    parallel = parallel_model(cfg, core=sp.fused_attention)
    step_gradients(parallel, batch_of())
    assert_equal(merged(grads_of(parallel), cfg), plain_gradients()[1])


@pytest.mark.ranks(4)
@EVERY_RECOMPUTE
def test_two_replicas_next_to_each_other(recompute):
    """Groups of two in a world of four, each with a batch of its own: nothing crosses over."""
    cfg, group = config(), sp.make_group([[0, 1], [2, 3]], ranks.device, 60)
    replica, rank = divmod(dist.get_rank(), 2)
    x = random(8, 3, 5, seed=replica)
    mine = sp.scatter_to_sp(x, group)
    assert torch.equal(mine, x.chunk(2)[rank])
    assert torch.equal(sp.gather_from_sp(mine, group), x)
    plain = plain_model(cfg)
    batches = [batch_of(seed=10 * replica + step) for step in range(2)]
    parallel = on_device(sp.SequenceParallelGPT(cfg, group, recompute))
    alone = sp.train_alone(plain, adamw(plain), batches)
    steps = sp.train(parallel, adamw(parallel), batches)
    for (expected, norm), (loss, norm_here) in zip(alone, steps):
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    shards = sp.shard_state_dict(plain.state_dict(), cfg, group)
    assert_equal(parallel.state_dict(), shards, floor=2e-3)
    losses = everywhere(loss.item())
    assert losses[0] == losses[1] != losses[2] == losses[3]
    full = tp.gather_state_dict(parallel.state_dict(), cfg, group)
    assert_equal(full, on_cpu(plain.state_dict()), floor=2e-3)


@EVERY_WORLD
def test_weights_are_the_plain_models_for_every_number_of_ranks():
    cfg = config()
    full = sp.GPT(cfg).state_dict()
    mine = sp.shard_state_dict(full, cfg)
    theirs = tp.shard_state_dict(full, cfg, dist.get_rank(), dist.get_world_size())
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    here = sp.SequenceParallelGPT(cfg).state_dict()
    assert here.keys() == mine.keys()
    assert all(torch.equal(x, mine[name]) for name, x in here.items())
    back = tp.gather_state_dict(here, cfg)
    assert all(torch.equal(back[name], x) for name, x in full.items())


# ── 1.5 Dropout and recomputation ───────────────────────────────────────────────────────────────


@contextmanager
def recorded_masks() -> Iterator[list]:
    """The masks that dropout draws inside."""
    masks = []

    def recorded(self, x):
        masks.append(original(self, x))
        return masks[-1]

    with plant(sp.Dropout, "keep_mask", recorded) as original:
        yield masks


@contextmanager
def replayed_masks(masks: list) -> Iterator[None]:
    """Dropout of the plain model uses these masks, and must use all of them."""
    left = iter(masks)
    with plant(tp.Dropout, "keep_mask", lambda self, x: next(left).to(x.device)):
        yield
    assert next(left, None) is None


def plain_masks(masks: list, cfg: sp.GPTConfig, sharded: bool = True, own: bool = True) -> list:
    """All ranks' masks of a forward, joined as the plain model draws them.

    Args: sharded: outer masks are (s, B, H), else replicated. own: they differ between ranks.
    """
    full = []
    for pieces in zip(*everywhere([mask.cpu() for mask in masks]), strict=True):
        attention = pieces[0].shape[1] == pieces[0].shape[2]  # (B·n, S, S)
        if attention:
            heads = cfg.num_heads // len(pieces)
            full.append(torch.cat([piece.unflatten(0, (-1, heads)) for piece in pieces], 1))
        elif sharded:
            full.append(torch.cat(pieces).transpose(0, 1))
        else:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces)
            full.append(pieces[0].transpose(0, 1))
        different = attention or (sharded and own)
        assert len(pieces) == 1 or torch.equal(pieces[0], pieces[1]) != different
    return full


SEEN = {}


def once(key: str, masks: list, compute: Callable):
    """compute(), or what it returned on these ranks for the key: then the masks must be the same.

    Modes of recomputation draw the same masks in forward, so one single device serves all.
    """
    before, result = SEEN.setdefault(key, (masks, None))
    assert len(before) == len(masks)
    assert all(map(torch.equal, before, masks))
    if result is None:
        SEEN[key] = masks, compute()
    return SEEN[key][1]


@EVERY_WORLD
@EVERY_MODE
def test_layer_with_dropout_equals_the_plain_one_under_the_joined_masks(mode):
    """In six modes: outer masks are equal on all ranks without sequence parallelism."""
    cfg = config(dropout=0.3)
    plain = plain_layer(cfg)
    layer = on_device(layer_of(cfg, mode))
    seed(layer)
    with recorded_masks() as masks:
        here, grads = layer_gradients(layer, mode, cfg)
    a = random(12, 3, 32).transpose(0, 1).clone().requires_grad_()
    with replayed_masks(plain_masks(masks[:3], cfg, mode.sequence_parallel)):
        expected = plain(a)
    expected.backward(random(12, 3, 32, seed=2).transpose(0, 1))
    there = {"y": expected.transpose(0, 1), "x": a.grad.transpose(0, 1)}
    assert_equal(here, {name: shard_of_tokens(x, mode) for name, x in there.items()})
    reference = {f"x.{name}": grad for name, grad in grads_of(plain).items()}
    assert_equal(merged(grads, cfg), reference)


@EVERY_WORLD
@EVERY_RECOMPUTE
def test_model_with_dropout_equals_the_plain_one_under_the_joined_masks(recompute):
    """Recomputation draws its masks again in backward: the same, or gradients would differ."""
    cfg = config(dropout=0.3)
    parallel = parallel_model(cfg, recompute)
    seed(parallel)
    with recorded_masks() as masks:
        loss = parallel.loss(*batch_of())
    assert len(masks) == 1 + 3 * cfg.num_layers
    seeds = [m.mask_seed for m in parallel.modules() if isinstance(m, sp.Dropout)]
    loss.sum().backward()
    sp.reduce_sequence_parallel_grads(parallel)
    assert seeds == [m.mask_seed for m in parallel.modules() if isinstance(m, sp.Dropout)]

    def alone():
        plain = plain_model(cfg)
        with replayed_masks(plain_masks(masks, cfg)):
            expected = plain.loss(*batch_of())
        expected.sum().backward()
        return {"loss": expected, **grads_of(plain)}

    reference = once("dropout", masks, alone)
    assert_equal({"loss": loss, **merged(grads_of(parallel), cfg)}, reference)


def rate(step: int) -> float:
    return 0.1 + 0.05 * step


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate(0), momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=rate(0) / 100, eps=1e-8)


def set_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    scale = 100 if isinstance(optimizer, torch.optim.AdamW) else 1
    for group in optimizer.param_groups:
        group["lr"] = rate(step) / scale


@EVERY_WORLD
@EVERY_RECOMPUTE
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_five_steps_with_dropout(recompute, optimizer):
    """Weights, and norms before clipping, against a loop written out here; rates change.

    (Five steps without dropout: test_five_steps_without_dropout, the script's own --check.)
    """
    cfg, drawn, numbers = config(dropout=0.3), [], {}
    parallel = parallel_model(cfg, recompute)
    max_norm = 1e9 if optimizer == "sgd" else 0.1
    batches = [batch_of(seed=step) for step in range(5)]

    def alone():
        plain, numbers = plain_model(cfg), {}
        theirs = optimizer_of(optimizer, plain)
        with replayed_masks(plain_masks(drawn, cfg)):
            for step, (tokens_BS, targets_BS) in enumerate(batches):
                set_rate(theirs, step)
                theirs.zero_grad()
                loss = plain.loss(tokens_BS, targets_BS).sum() / (targets_BS != -100).sum()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
                assert optimizer == "sgd" or norm > max_norm, "nothing was clipped"
                theirs.step()
                numbers |= {f"loss {step}": loss, f"norm {step}": norm}
        return numbers, grads_of(plain), plain.state_dict()

    ours = optimizer_of(optimizer, parallel)
    steps = sp.train(parallel, ours, batches, max_norm, seed=7)
    for step in range(5):
        set_rate(ours, step)
        with recorded_masks() as masks:
            loss, norm = next(steps)
        assert not loss.requires_grad
        assert not norm.requires_grad
        numbers |= {f"loss {step}": loss, f"norm {step}": norm}
        drawn += masks[: 1 + 3 * cfg.num_layers]  # recomputation draws again, later
    expected, grads, weights = once(optimizer, drawn, alone)
    assert_equal(numbers, expected)
    assert_equal(merged(grads_of(parallel), cfg), grads)
    floor = 5 * rate(4) / 100 if optimizer == "adamw" else 0.0
    assert_equal(merged(parallel.state_dict(), cfg), weights, floor=floor)


@pytest.mark.ranks(1, 2)
@EVERY_RECOMPUTE
def test_masks_of_training_differ_by_step_seed_and_rank(recompute):
    """And resumed at step 1, training draws the masks of step 1."""

    def masks_of(first: int, count: int, seed: int = 0) -> list:
        model = parallel_model(config(dropout=0.5, num_layers=1), recompute)
        found = []
        steps = sp.train(model, adamw(model), [batch_of()] * count, seed=seed, first_step=first)
        with recorded_masks() as masks:
            for _ in steps:
                found.append(masks[:4])
                masks.clear()
        return found

    both = masks_of(0, 2)
    assert all(map(torch.equal, both[1], masks_of(1, 1)[0]))
    others = [masks_of(0, 1, seed=1)[0], both[1]]
    if dist.get_world_size() == 2:
        others += everywhere([mask.cpu() for mask in both[0]])[1 - dist.get_rank() :][:1]
    for other in others:
        assert not any(map(torch.equal, both[0], [mask.to(ranks.device) for mask in other]))


def test_the_seed_of_a_mask_is_a_known_value():
    """Python's hash() would give each process another one, and replicated masks would differ. The
    test pool's ranks are forks of one process, in which it would be the same.
    """
    model = nn.Sequential(sp.Dropout(0.5, sharded=True), sp.Dropout(0.5))
    sp.seed_dropout(model, seed=7, step=3, tp_rank=1, dp_rank=2)
    assert [layer.mask_seed for layer in model] == [4136582485, 1211000488]


@pytest.mark.ranks(1, 2)
@EVERY_RECOMPUTE
def test_evaluation_drops_nothing(recompute):
    weights = parallel_model(config(dropout=0.5), recompute).eval()
    without = parallel_model(config(), recompute)
    assert torch.equal(weights.loss(*batch_of()), without.loss(*batch_of()))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(dropout):
    """Loss and gradients of two micro-batches, the second before the first's backward."""
    found = []
    for recompute in sp.RECOMPUTE:
        parallel = parallel_model(config(dropout=dropout), recompute)
        losses = []
        for step in range(2):
            seed(parallel, step)
            losses.append(parallel.loss(*batch_of(seed=step)).sum())
        for loss in losses:
            loss.backward()
        sp.reduce_sequence_parallel_grads(parallel)
        found.append({f"loss {i}": loss for i, loss in enumerate(losses)} | grads_of(parallel))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_backward_twice_through_recomputation(recompute):
    """With retain_graph: the seeds of forward are set, and put back, each time."""
    parallel = parallel_model(config(dropout=0.3), recompute)
    seed(parallel)
    loss = parallel.loss(*batch_of()).sum()
    seed(parallel, step=1)
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in grads_of(parallel).items()}
    loss.backward()
    assert_equal(grads_of(parallel), {name: 2 * grad for name, grad in once.items()})


def test_recomputation_without_seeds():
    """On one rank masks may come from the default generator, which checkpoint restores."""
    found = []
    for recompute in sp.RECOMPUTE:
        model = parallel_model(config(dropout=0.3), recompute)
        torch.manual_seed(0)
        model.loss(*batch_of()).sum().backward()
        found.append(grads_of(model))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def flops_of(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_operations_that_run_again(dropout):
    """Selective: one of core attention's two GEMMs, it stops early. Full: the layer, or, without a
    mask at its end, all but its last GEMM."""
    s, b, h = 16, 3, 32
    x, found = torch.randn(s, b, h, requires_grad=True), {}
    for recompute in sp.RECOMPUTE:
        layer = sp.SequenceParallelLayer(config(dropout=dropout), recompute=recompute)
        found[recompute] = flops_of(layer, x)
    forward = 24 * b * s * h**2 + 4 * b * s**2 * h
    assert found["none"] == 3 * forward
    assert math.isclose(3 * forward, tables.model_flops(b, s, h, 1, 0))
    again = found["selective"] - found["none"]
    assert again == tables.recomputed_flops(b, s, h, 1, gemms=1)
    assert found["full"] - found["none"] == forward - (0 if dropout else 2 * 4 * b * s * h**2)

    def both_gemms(function, *args, dropouts=()):
        return checkpoint(function, *args, use_reentrant=True)

    with plant(sp, "recompute", both_gemms):  # the older kind of checkpoint does not stop early
        selective = flops_of(sp.SequenceParallelLayer(config(), recompute="selective"), x)
    assert selective - found["none"] == tables.recomputed_flops(b, s, h, 1, gemms=2)


# ── 5.1 What autograd keeps ─────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@EVERY_MODE
def test_saved_bytes_are_the_papers(mode):
    """All rows of table 2, to the byte: the formula, and two statistics of two LayerNorms."""
    if ranks.device.type == "cuda":
        pytest.skip("kernels of GPUs keep statistics of another size")
    cfg, batch = config(seq_length=32, hidden_size=64, dropout=0.1), 3
    cost = tables.layer_cost(cfg, mode, batch)
    statistics = 0 if mode.recompute == "full" else 8 * cfg.seq_length * batch
    shards = dist.get_world_size() if mode.sequence_parallel else 1
    assert cost.formula == tables.kept_bytes(cfg, dist.get_world_size(), mode, batch)
    assert cost.kept == cost.formula + statistics / shards
    assert cost.kept / cost.formula < 1.01


@pytest.mark.ranks(4)
def test_saved_bytes_term_by_term():
    """The table of part 1, line by line: bytes in units of s·b·h, dtype and shape."""
    cfg, S, B, H, n, t = config(hidden_size=64, num_heads=8, dropout=0.1), 16, 2, 64, 2, 4
    shard, bf16, mask = (S // t, B, H), torch.bfloat16, torch.bool
    core = 8 * S / H / t
    expected = [
        (2 / t, bf16, shard),  # LayerNorm 1
        (2 / t, bf16, shard),  # qkv's input: the shard
        (6 / t, bf16, (B * n, S, H // 8)),  # q, k, v: one storage, of which q is a view
        (2 * core, bf16, (B * n, S, S)),  # softmax
        (1 * core, mask, (B * n, S, S)),
        (2 * core, bf16, (B * n, S, S)),  # after dropout
        (2 / t, bf16, (S, B, H // t)),  # out's input
        (1 / t, mask, shard),
        (2 / t, bf16, shard),  # LayerNorm 2
        (2 / t, bf16, shard),  # up's input: the shard
        (8 / t, bf16, (S, B, 4 * H // t)),  # gelu's input
        (8 / t, bf16, (S, B, 4 * H // t)),  # down's input
        (1 / t, mask, shard),
    ]
    layer = sp.SequenceParallelLayer(cfg).to(ranks.device, bf16)
    seed(layer)
    x_sBH = torch.randn(shard, dtype=bf16, device=ranks.device, requires_grad=True)
    kept = sp.saved_tensors(partial(layer, x_sBH), layer.parameters())
    here = []
    for x in kept:
        if x.shape[-1] != 1:
            shape = tuple(x.shape) if x.ndim == 3 else (S, B, x.shape[-1])
            here.append((x.untyped_storage().nbytes() / (S * B * H), x.dtype, shape))
    assert here == expected
    assert len(kept) - len(here) == 4  # LayerNorm's statistics
    cost = tables.layer_cost(cfg, tables.Mode(True, "none"), B)
    assert [size / (S * B * H) for size in cost.saved.values()] == [row[0] for row in expected]


@EVERY_WORLD
def test_saved_bytes_of_the_ends():
    """Of the model without layers: inputs of the final LayerNorm and of the output layer, fp32
    logits, a mask after the embedding; indices and the loss add a few bytes per token."""
    cfg, B, t = config(vocab_size=64, hidden_size=64, dropout=0.1), 3, dist.get_world_size()
    model = sp.SequenceParallelGPT(cfg).to(ranks.device)
    weights = {name: x.bfloat16() for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.layers = nn.ModuleList()
    seed(model)
    saved = sp.saved_bytes(partial(model.loss, *batch_of(B, 16, 64)), model.parameters())
    formula = 16 * B * ((1 + 4) * 64 / t + 4 * 64 / t)
    assert formula <= saved <= formula + 16 * B * 40


def test_the_fused_kernel_keeps_no_scores():
    """Without dropout: single operators keep 2·a·s²·b more; the kernel 4 bytes a query, no copy."""
    S, B, cfg = 16, 2, config(hidden_size=64)
    x, found = torch.randn(S, B, 64, dtype=torch.bfloat16, requires_grad=True), {}
    for core in (sp.unfused_attention, sp.fused_attention):
        layer = sp.SequenceParallelLayer(cfg, core=core).bfloat16()
        found[core] = sp.saved_bytes(partial(layer, x), layer.parameters())
    queries = 4 * S * B
    base = 32 * S * B * 64 + 8 * S * B  # 34 without two masks, and LayerNorm's statistics
    assert found[sp.unfused_attention] == base + 2 * queries * S
    assert found[sp.fused_attention] == base + 4 * queries


def test_the_plain_layer_keeps_an_fp32_softmax():
    """34 + 7·a·s/h: softmax in fp32 and not bf16, and one mask of the future."""
    S, B, N, cfg = 16, 3, 4, config(hidden_size=64, dropout=0.1)
    layer = tp.Block(of_chapter_2(cfg)).bfloat16()
    x = torch.randn(B, S, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = sp.saved_bytes(partial(layer, x), layer.parameters())
    statistics = 8 * S * B
    assert kept == 34 * S * B * 64 + 7 * N * S * S * B + S * S + statistics


def test_saved_tensors_counts_storages_once_and_no_parameters():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)

    def run():
        y = x @ weight
        return (y * y[:1]).sum() + (y.T @ x.detach()[:, :1]).sum()

    kept = sp.saved_tensors(run, [weight])
    assert [k.untyped_storage().nbytes() for k in kept] == [48, 48]  # x, y: several views of each
    assert sp.saved_bytes(run, [weight]) == 96


# ── Messages ────────────────────────────────────────────────────────────────────────────────────


def ops(messages: list) -> dict:
    names = [m.op.removesuffix("_base") for m in messages]
    return {name: names.count(name) for name in names}


@pytest.mark.ranks(2, 4)
@EVERY_MODE
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_messages_of_a_layer(mode, dropout):
    """TP: 2 + 2 all-reduces. SP: 2 + 4 gathers, two of them again, and 2 + 2 reduce-scatters. Each
    has s·b·h elements. Full recomputation sends forward's once more; without a mask at the layer's
    end it stops before the last of them."""
    t = dist.get_world_size()
    layer = on_device(layer_of(config(dropout=dropout), mode))
    seed(layer)
    x = random(16 // (t if mode.sequence_parallel else 1), 3, 32).requires_grad_()
    with sp.Counter() as forward:
        y = layer(x)
    with sp.Counter() as backward:
        y.sum().backward()
    again = 0 if mode.recompute != "full" else 2 if dropout else 1
    if mode.sequence_parallel:
        there, back = {"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2}
        back["all_gather"] += 2 * (mode.recompute == "full")
        back["reduce_scatter"] += again
    else:
        there, back = {"all_reduce": 2}, {"all_reduce": 2 + again}
    assert ops(forward.messages) == there
    assert ops(backward.messages) == back
    size = 16 * 3 * 32 * 8
    assert {m.bytes for m in forward.messages + backward.messages} == {size}
    if mode.recompute != "full":
        volume = tables.wire_bytes(forward.messages + backward.messages, t)
        assert volume == (10 if mode.sequence_parallel else 8) * size * (t - 1) / t


@pytest.mark.ranks(2, 4)
def test_messages_of_the_ends_and_of_a_step():
    """Embedding: a reduce-scatter, its gather back. Output layer: a gather, and its second one and
    a reduce-scatter back. Loss: two small all-reduces. A step: one message of all partial
    gradients, one scalar for the norm."""
    cfg = config()
    model = parallel_model(cfg)
    model.layers = nn.ModuleList()
    with sp.Counter() as forward:
        loss = model.loss(*batch_of())
    with sp.Counter() as backward:
        loss.sum().backward()
    with sp.Counter() as partial_grads:
        sp.reduce_sequence_parallel_grads(model)
    size = 12 * 3 * 32 * 8
    large = [m for m in forward.messages + backward.messages if m.bytes == size]
    assert ops(large[:2]) == {"reduce_scatter": 1, "all_gather": 1}
    assert ops(large[2:]) == {"all_gather": 2, "reduce_scatter": 1}
    small = [m.bytes for m in forward.messages + backward.messages if m.bytes != size]
    assert small == [12 * 3 * 8, 2 * 12 * 3 * 8]
    assert [m.bytes for m in partial_grads.messages] == [8 * (16 * 32 + 2 * 32)]

    model = parallel_model(cfg)
    with sp.Counter() as step:
        next(sp.train(model, adamw(model), [batch_of()]))
    assert step.messages[-1].bytes == 8
    assert ops(step.messages)["all_reduce"] == 2 + 1 + 1


@pytest.mark.ranks(4)
def test_no_rank_holds_all_tokens_between_the_regions():
    """Forward makes tensors of S × B × H elements only where a region begins and ends."""
    layer = sp.SequenceParallelLayer(config(num_layers=1, hidden_size=64)).to(ranks.device)
    x_sBH = torch.ones(4, 3, 64, device=ranks.device)
    with Shapes() as shapes:
        layer.norm1(x_sBH) + layer.norm2(x_sBH)
        assert (16, 3, 64) not in shapes.seen
    with sp.Counter() as counter, Shapes() as shapes:
        layer(x_sBH)
    assert (16, 3, 64) in shapes.seen
    assert len(counter.messages) == 4


# ── Compilers and dtypes ────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2, timeout=120)
@EVERY_RECOMPUTE
def test_compiled_model(recompute):
    """torch.compile may break the graph at our functions, and must not change a value."""
    cfg = config(num_layers=1)
    plain, parallel = plain_model(cfg), parallel_model(cfg, recompute)
    tokens_BS, targets_BS = batch_of()
    plain.loss(tokens_BS, targets_BS).sum().backward()
    logits_SBv = torch.compile(parallel, backend="aot_eager")(tokens_BS)
    tp.vocab_parallel_cross_entropy(logits_SBv, targets_BS.T, vocab_size=61).sum().backward()
    sp.reduce_sequence_parallel_grads(parallel)
    assert_equal(merged(grads_of(parallel), cfg), grads_of(plain))


@pytest.mark.ranks(2)
@EVERY_RECOMPUTE
def test_autocast(recompute):
    """bf16 GEMMs over fp32 weights: gradients stay fp32, near the plain model's under autocast."""
    cfg = config()
    plain = tp.GPT(of_chapter_2(cfg)).to(ranks.device)
    parallel = sp.SequenceParallelGPT(cfg, None, recompute).to(ranks.device)
    with torch.autocast(ranks.device.type, torch.bfloat16), sp.Counter() as counter:
        loss, expected = parallel.loss(*batch_of()), plain.loss(*batch_of())
    loss.sum().backward()
    expected.sum().backward()
    sp.reduce_sequence_parallel_grads(parallel)
    sizes = {m.bytes for m in counter.messages if m.op.startswith("all_gather")}
    assert sizes == {12 * 3 * 32 * 2}, "gathered in fp32"
    # bf16 has 8 bits: a GEMM is off by up to 0.4 %, and partial sums are rounded before they are
    # added, which the single device does not do.
    assert_equal(merged(grads_of(parallel), cfg), grads_of(plain), bound=0.05)


@pytest.mark.ranks(2)
def test_output_dtypes_under_autocast():
    """As nn.Linear's: a layer that adds an fp32 bias would return fp32."""
    x, y = torch.randn(4, 3, 8), torch.randn(8, 3, 6)
    with torch.autocast(ranks.device.type, torch.bfloat16):
        for layer, z in [(sp.SPColumnParallelLinear(8, 12), x), (sp.SPRowParallelLinear(12, 8), y)]:
            assert layer.to(ranks.device)(z.to(ranks.device)).dtype == torch.bfloat16


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
)
@settings(max_examples=30, deadline=None)
def test_properties_of_the_formulas(s, b, heads, size, t):
    """On one rank TP is TP + SP; more saving never keeps more; SP divides every term by t."""
    cfg = sp.GPTConfig(seq_length=s * t, hidden_size=heads * size * t, num_heads=heads * t)
    for recompute in sp.RECOMPUTE:
        full = sp.activation_bytes(cfg, 1, recompute, b)
        assert math.isclose(full, tables.tensor_parallel_bytes(cfg, 1, recompute, b))
        assert math.isclose(full, b * sp.activation_bytes(cfg, 1, recompute))
        assert math.isclose(sp.activation_bytes(cfg, t, recompute, b), full / t)
    kept = [tables.tensor_parallel_bytes(cfg, t, recompute, b) for recompute in sp.RECOMPUTE]
    assert kept[0] > kept[1] > kept[2]


# ── Planted bugs: what a missing safeguard looks like ───────────────────────────────────────────
#
# Each takes one safeguard away and looks as a user would: at the loss, then at the gradients.


def loss_and_grads(recompute: str = "none") -> tuple[float, dict, float, dict]:
    """Loss and gradients here and of the plain model; where replicated ones differ, rank 0's."""
    cfg = config()
    expected, reference = plain_gradients()
    parallel = parallel_model(cfg, recompute)
    loss = step_gradients(parallel, batch_of())
    return loss.sum().item(), rank_0s(grads_of(parallel), cfg), expected.sum().item(), reference


def shown(loss: float, grads: dict, expected: float, reference: dict) -> Shows:
    return Shows(loss=abs(loss / expected - 1), gradients=worst_of(grads, reference))


def assert_replicated_gradients_off_by(factor: float, grads: dict, reference: dict) -> None:
    """Those of replicated parameters, and no others."""
    factors = {name: factor if sp.shard_dim(name) is None else 1 for name in reference}
    assert_equal(grads, {name: factors[name] * grad for name, grad in reference.items()})


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="LayerNorm, positions and row biases get one rank's part, and their copies drift apart",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1446",
)
def test_partial_gradients_not_summed():
    with plant(sp, "reduce_sequence_parallel_grads", lambda module, group=None: None):
        cfg = config()
        loss, grads, expected, reference = loss_and_grads()
        parallel = parallel_model(cfg)
        next(sp.train(parallel, adamw(parallel), [batch_of()]))
    assert math.isclose(loss, expected, rel_tol=1e-12)
    wrong = assert_differs(grads, reference)
    assert set(wrong) == {name for name in reference if sp.shard_dim(name) is None}
    with pytest.raises(ValueError, match="should be replicated, but rank"):
        merged(parallel.state_dict(), cfg)
    return shown(loss, grads, expected, reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="a layer with names of its own: LayerNorm keeps one rank's part of its gradient",
    seen_in=None,
)
def test_names_decide_what_is_summed():
    def by_name(module, group=None):
        for name, p in module.named_parameters():
            if sp.shard_dim(name) is None and "gate" not in name:
                dist.all_reduce(p.grad)

    plain, parallel = odd_models()
    sp.mark(parallel.up.parameters(), True)
    with plant(sp, "reduce_sequence_parallel_grads", by_name):
        grads, reference = odd_gradients(plain, parallel)
    wrong = assert_differs(grads, reference)
    assert "up.weight" in wrong  # counts as a sharded matrix
    assert "projection.weight" in wrong  # counts as replicated: all shards are added up
    return Shows(loss=None, gradients=worst_of(grads, reference))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="without sequence parallelism: gradients come out t times too large; Adam hides it",
    seen_in=None,
)
def test_complete_gradients_summed():
    """The layer of tensor parallelism alone, with the marks of the other."""
    cfg, mode = config(), tables.TP_ONLY
    layer, right = (on_device(layer_of(cfg, mode)) for _ in range(2))
    names = {name for name, _ in layer.named_parameters() if sp.shard_dim(name) is None}
    sp.mark([layer.get_parameter(name) for name in names], True)
    here, grads = layer_gradients(layer, mode, cfg)
    there, reference = layer_gradients(right, mode, cfg)
    assert_equal(here, there)
    assert_replicated_gradients_off_by(dist.get_world_size(), grads, reference)
    return Shows(loss=worst_of(here, there), gradients=worst_of(grads, reference))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="norms and biases learn t times too slowly; with Adam nothing is to be seen",
    seen_in="https://github.com/EleutherAI/gpt-neox/issues/1259",
)
def test_partial_gradients_averaged():
    def averaged(module, group=None):
        original(module, group)
        for p in module.parameters():
            if p.sequence_parallel:
                p.grad /= dist.get_world_size()

    with plant(sp, "reduce_sequence_parallel_grads", averaged) as original:
        loss, grads, expected, reference = loss_and_grads()
    assert math.isclose(loss, expected, rel_tol=1e-12)
    assert_replicated_gradients_off_by(1 / dist.get_world_size(), grads, reference)
    return shown(loss, grads, expected, reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the norm is that of partial sums: every gradient is scaled by another factor",
    seen_in=None,
)
def test_gradients_clipped_before_they_are_summed():
    cfg = config()
    plain, parallel = plain_model(cfg), parallel_model(cfg)

    def clip_first(*args, **keywords):
        norm = clip(*args, **keywords)
        summed(parallel)
        return norm

    nothing = plant(sp, "reduce_sequence_parallel_grads", lambda module, group: None)
    with nothing as summed, plant(sp, "clip_grad_norm_", clip_first) as clip:
        ((loss, norm),) = sp.train(parallel, adamw(parallel), [batch_of()], max_norm=0.1)
    ((expected, full_norm),) = sp.train_alone(plain, adamw(plain), [batch_of()], max_norm=0.1)
    assert math.isclose(loss, expected, rel_tol=1e-12)
    assert all(abs(x / full_norm - 1) > 1e-3 for x in everywhere(norm.item()))
    grads = rank_0s(grads_of(parallel), cfg)
    assert_differs(grads, grads_of(plain))
    return shown(loss.item(), grads, expected.item(), grads_of(plain))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="every row bias counts t times: unseen at the start, where biases are zero",
    seen_in=None,
)
def test_bias_before_the_reduce_scatter():
    def forward(self, y_SBf):
        return sp.reduce_scatter_to_sp(F.linear(y_SBf, self.weight, self.bias), self.group)

    torch.manual_seed(3)
    layer, t = on_device(sp.SPRowParallelLinear(8, 12)), dist.get_world_size()
    x = random(4, 3, 8).chunk(t, -1)[dist.get_rank()]
    right = layer(x)
    with plant(sp.SPRowParallelLinear, "forward", forward):
        assert_equal({"y": layer(x) - right}, {"y": ((t - 1) * layer.bias).expand(4 // t, 3, 12)})
        loss, grads, expected, reference = loss_and_grads()
    assert math.isclose(loss, expected, rel_tol=1e-12)  # the first step sees nothing
    factors = {name: t if name.endswith(("out.bias", "down.bias")) else 1 for name in reference}
    assert_equal(grads, {name: factors[name] * grad for name, grad in reference.items()})
    return shown(loss, grads, expected, reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="token i + s is taken for token i: the model learns, and misses what depends on order",
    seen_in=None,
)
def test_every_rank_adds_the_first_positions():
    """A table that is shifted on each rank by the tokens before it: as if there were none."""
    cfg, (tokens_BS, targets_BS) = config(), batch_of()
    plain, parallel = plain_model(cfg), parallel_model(cfg)
    skipped = dist.get_rank() * tokens_BS.shape[1] // dist.get_world_size()
    with torch.no_grad():
        parallel.positions.weight.copy_(parallel.positions.weight.roll(skipped, 0))
    loss = step_gradients(parallel, (tokens_BS, targets_BS)).sum()
    expected = plain.loss(tokens_BS, targets_BS).sum()
    expected.backward()
    grads, reference = rank_0s(grads_of(parallel), cfg), grads_of(plain)
    assert_differs(grads, reference)
    assert abs(loss / expected - 1) > 1e-6
    return shown(loss.item(), grads, expected.item(), reference)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="tokens i and i + s lose the same features, always; only a look at masks shows it",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1256",
)
def test_one_mask_for_all_tokens():
    """Dropouts that are not `sharded`, as tensor parallelism has them: the mask repeats after s
    tokens. It is a mask all the same: under it the single device has the same gradients."""
    cfg = config(dropout=0.3)
    for repeats in (False, True):
        plain, parallel = plain_model(cfg), parallel_model(cfg)
        if repeats:
            for name, module in parallel.named_modules():
                if isinstance(module, sp.Dropout) and "attention" not in name:
                    module.sharded = False
        seed(parallel)
        with recorded_masks() as masks:
            loss = step_gradients(parallel, batch_of()).sum()
        assert torch.equal(*everywhere(masks[0].cpu())) == repeats
        with replayed_masks(plain_masks(masks, cfg, own=not repeats)):
            expected = plain.loss(*batch_of()).sum()
        expected.backward()
        here = {"loss": loss, **merged(grads_of(parallel), cfg)}
        assert_equal(here, {"loss": expected, **grads_of(plain)})
    return shown(loss.item(), merged(grads_of(parallel), cfg), expected.item(), grads_of(plain))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss falls; everything below a region gets one rank's partial sum of its gradient",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)
def test_slice_instead_of_reduce_scatter():
    """g's backward as if the work after it were repeated: operator, and all column layers."""
    t, rank = dist.get_world_size(), dist.get_rank()
    weight, x = random(6, 5).chunk(t if t == 2 else 1)[0], random(8, 3, 5)
    right, wrong = (x.chunk(t)[rank].clone().requires_grad_() for _ in range(2))
    (sp.gather_from_sp(right) @ weight.T * (rank + 1)).sum().backward()
    (sp.gather_from_sp(wrong, backward="split") @ weight.T * (rank + 1)).sum().backward()
    assert_equal({"x": right.grad * (rank + 1)}, {"x": wrong.grad * sum(range(1, t + 1))})

    def naive(x, weight, bias=None, group=None):
        return F.linear(sp.gather_from_sp(x, group, backward="split"), weight, bias)

    with plant(sp, "column_parallel", naive):
        loss, grads, expected, reference = loss_and_grads()
    assert math.isclose(loss, expected, rel_tol=1e-12)
    wrong = assert_differs(grads, reference, at_least=0.1)
    assert "final_norm.weight" in wrong
    assert "layers.1.mlp.up.weight" in wrong
    return shown(loss, grads, expected, reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="gradients below repeated work come out t times too large", seen_in=None
)
def test_reduce_scatter_instead_of_slice():
    """A classifier that every rank repeats, after a gather made for sharded work."""
    t, rank, x, weight = dist.get_world_size(), dist.get_rank(), random(8, 3, 5), random(5, 2)
    full = x.clone().requires_grad_()
    expected = (full @ weight).square().sum()
    expected.backward()
    reference = {"x": full.grad.chunk(t)[rank]}
    for backward, factor in (("split", 1), ("reduce_scatter", t)):
        mine = x.chunk(t)[rank].clone().requires_grad_()
        loss = (sp.gather_from_sp(mine, backward=backward) @ weight).square().sum()
        loss.backward()
        assert torch.equal(loss, expected)
        assert_equal({"x": mine.grad}, {"x": factor * reference["x"]})
    return shown(loss.item(), {"x": mine.grad}, expected.item(), reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="in the layout B S H ranks join sequences, not tokens: shapes fit, and the loss falls",
    seen_in=None,
)
def test_collective_over_the_wrong_dimension():
    """A rank's tokens in the layout B s H through g: the right size in the wrong order. With one
    sequence the two layouts are the same, and nothing is wrong."""
    original, t = sp._start_all_gather, dist.get_world_size()

    def of_batch_first(x_sBH, group):
        x_SBH, work = original(x_sBH.transpose(0, 1), group)  # (B, s, H) of each rank in turn
        s, B, H = x_sBH.shape
        return x_SBH.view(B, s * t, H).transpose(0, 1), work

    with plant(sp, "_start_all_gather", of_batch_first):
        models = plain_model(config()), parallel_model(config())
        one = [batch_of(rows=1)]
        ((expected, _),) = sp.train_alone(models[0], adamw(models[0], 1e-2), one)
        ((loss, _),) = sp.train(models[1], adamw(models[1], 1e-2), one)
        assert math.isclose(loss, expected, rel_tol=1e-12)
        model = parallel_model(config())
        steps = sp.train(model, adamw(model, 1e-2), [batch_of()] * 3)
        losses = [loss.item() for loss, _ in steps]
        assert losses[-1] < losses[0]
        loss, grads, expected, reference = loss_and_grads()
    assert not math.isclose(loss, expected, rel_tol=1e-6)
    assert_differs(grads, reference, at_least=0.1)
    return shown(loss, grads, expected, reference)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="nothing is wrong but the memory: 34/t becomes 34/t + 4·(1 − 1/t) units of s·b·h",
    seen_in=None,
)
def test_gathered_input_kept():
    def naive(x, weight, bias=None, group=None):
        return F.linear(sp.gather_from_sp(x, group), weight, bias)

    cfg, t = config(seq_length=32, hidden_size=64, dropout=0.1), dist.get_world_size()
    with plant(sp, "column_parallel", naive):
        cost = tables.layer_cost(cfg, tables.Mode(True, "none"), 2)
        loss, grads, expected, reference = loss_and_grads()
    excess = cost.kept - cost.formula - 8 * 32 * 2 / t
    assert excess == 32 * 2 * 64 * 4 * (1 - 1 / t)
    assert_equal(grads, reference)
    return shown(loss, grads, expected, reference)


@pytest.mark.parametrize("carelessness", ["masked_fill", "scaled queries", "fp32 softmax"])
@pytest.mark.planted_bug(
    symptom="only the memory is wrong: a mask, a second copy of q, or twice the softmax is kept",
    seen_in=None,
)
def test_core_attention_written_carelessly(carelessness):
    """The three details of section 1.4, each left out: the extra bytes, exactly."""
    cfg, S, B, N = config(hidden_size=64, dropout=0.1), 16, 2, 4

    def core(q_pSD, k_pSD, v_pSD, dropout):
        scale, dtype = 1 / math.sqrt(q_pSD.shape[-1]), q_pSD.dtype
        future_SS = torch.full((S, S), -torch.inf, dtype=q_pSD.dtype).triu(1)
        if carelessness == "fp32 softmax":
            dtype = torch.promote_types(dtype, torch.float32)
        if carelessness == "scaled queries":
            q_pSD, scale = q_pSD * scale, 1
        if carelessness == "masked_fill":
            scores_pSS = torch.baddbmm(torch.zeros_like(future_SS), q_pSD, k_pSD.mT, alpha=scale)
            scores_pSS = scores_pSS.masked_fill(future_SS < 0, -torch.inf)
        else:
            scores_pSS = torch.baddbmm(future_SS, q_pSD, k_pSD.mT, alpha=scale)
        return dropout(scores_pSS.softmax(-1, dtype=dtype).to(q_pSD.dtype)) @ v_pSD

    kept, found = [], []
    for function in (sp.unfused_attention, core):
        torch.manual_seed(0)
        layer = sp.SequenceParallelLayer(cfg, core=function)
        sp.seed_dropout(layer, seed=0, step=0)
        x = random(S, B, 64).requires_grad_()
        y = layer.double()(x)
        y.square().sum().backward()
        found.append(({"y": y}, {"x": x.grad, **grads_of(layer)}))
        layer, x = layer.bfloat16(), x.detach().bfloat16().requires_grad_()
        kept.append(sp.saved_bytes(partial(layer, x), layer.parameters()))
    extra = {
        "masked_fill": S * S,
        "scaled queries": 2 * S * B * 64,
        "fp32 softmax": 2 * N * S * S * B,
    }
    assert kept[1] - kept[0] == extra[carelessness]
    (right, right_grads), (careless, grads) = found
    assert_equal(careless, right)
    return Shows(loss=worst_of(careless, right), gradients=assert_equal(grads, right_grads))


class _MasksOfNow:
    """In place of `_MasksOfForward`: restores nothing."""

    def __init__(self, dropouts):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.planted_bug(
    symptom="the gradient is of another function: other masks than the loss had",
    seen_in="https://github.com/allenai/OLMo-core/issues/828",
)
def test_recomputed_with_other_masks(recompute):
    """The next micro-batch is seeded before this one's backward, as in a pipeline."""
    cfg, losses, grads = config(dropout=0.3), [], []
    for masks in (sp._MasksOfForward, _MasksOfNow):
        with plant(sp, "_MasksOfForward", masks):
            parallel = parallel_model(cfg, recompute)
            seed(parallel)
            loss = parallel.loss(*batch_of())
            seed(parallel, step=1)
            loss.sum().backward()
            sp.reduce_sequence_parallel_grads(parallel)
            losses.append(loss)
            grads.append(merged(grads_of(parallel), cfg))
    assert torch.equal(*losses)
    wrong = assert_differs(grads[1], grads[0], at_least=0.1)
    assert "layers.0.attention.qkv.weight" in wrong
    loss = worst_of({"": losses[1]}, {"": losses[0]})
    return Shows(loss=loss, gradients=worst_of(grads[1], grads[0]))


@pytest.mark.ranks(1, 2)
@pytest.mark.planted_bug(
    symptom="a micro-batch gets the masks of the one before; unseen without a run that keeps all",
    seen_in=None,
)
def test_masks_left_where_recomputation_ended():
    """Seeds of micro-batch 1, backward of 0, forward of 1: the order of a pipeline."""

    def second_micro_batch() -> tuple[list, dict, dict]:
        parallel = parallel_model(cfg, "selective")
        seed(parallel)
        first = parallel.loss(*batch_of(seed=0))
        seed(parallel, step=1)
        first.sum().backward()
        parallel.zero_grad()
        with recorded_masks() as masks:
            loss = step_gradients(parallel, batch_of(seed=1))
        return masks, {"loss": loss}, merged(grads_of(parallel), cfg)

    cfg = config(dropout=0.3)
    right, right_loss, right_grads = second_micro_batch()
    with plant(sp._MasksOfForward, "__exit__", lambda self, *error: None):
        masks, loss, grads = second_micro_batch()
    assert torch.equal(masks[0], right[0])  # the embedding's, which is not recomputed
    assert not torch.equal(masks[1], right[1])
    assert_differs(grads, right_grads)
    return Shows(loss=worst_of(loss, right_loss), gradients=worst_of(grads, right_grads))


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(4)
def test_sizes_that_do_not_divide_are_refused_on_every_rank():
    remedy = "a sequence of 10 tokens does not divide over 4 ranks: pad it to 12, and its targets"
    for operator in (sp.reduce_scatter_to_sp, sp.scatter_to_sp):
        with pytest.raises(ValueError, match=remedy):
            operator(torch.zeros(10, 2))
    model = sp.SequenceParallelGPT(config())
    with pytest.raises(ValueError, match=remedy):
        model(torch.zeros(2, 10, dtype=torch.int64))
    heads = r"num_heads=6 and ffn_hidden_size=144 .* tp must divide both"
    for make in (sp.SequenceParallelGPT, sp.SequenceParallelLayer):
        with pytest.raises(ValueError, match=heads):
            make(config(hidden_size=36, num_heads=6))
    for layer, size in ((sp.SPColumnParallelLinear, (4, 6)), (sp.SPRowParallelLinear, (6, 4))):
        with pytest.raises(ValueError, match="_features=6 does not divide over 4 ranks: choose"):
            layer(*size)
    with pytest.raises(ValueError, match="dropout on several ranks: call seed_dropout"):
        sp.SequenceParallelGPT(config(dropout=0.1))(batch_of()[0].cpu())
    layer = sp.SequenceParallelLayer(config(dropout=0.1))
    with pytest.raises(ValueError, match="dropout on several ranks: call seed_dropout"):
        layer(torch.zeros(4, 2, 32))
    assert layer.eval()(torch.zeros(4, 2, 32)).shape == (4, 2, 32)


@pytest.mark.ranks(1, 2)
def test_impossible_input_is_refused_on_every_rank():
    model, (tokens, targets) = sp.SequenceParallelGPT(config()), (x.cpu() for x in batch_of())
    for outside in (61, -1):
        with pytest.raises(ValueError, match=rf"token id {outside} is not in \[0, 61\)"):
            model(torch.full_like(tokens, outside))
    with pytest.raises(ValueError, match=r"token id 61 is not in \[0, 61\), and not ignore_index"):
        model.loss(tokens, torch.full_like(targets, 61))
    with pytest.raises(ValueError, match="20 tokens, but the model has 16 positions"):
        model(torch.zeros(1, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match="recompute='some': choose from none, selective, full"):
        sp.SequenceParallelLayer(config(), recompute="some")
    with pytest.raises(ValueError, match="backward='sum': choose from reduce_scatter, split"):
        sp.gather_from_sp(torch.zeros(2, 2), backward="sum")
    with pytest.raises(ValueError, match=r"dropout=0.1: fused_attention has none"):
        sp.fused_attention(*torch.zeros(3, 1, 2, 2), sp.Dropout(0.1))


@pytest.mark.ranks(1, 2)
def test_a_token_id_outside_the_vocabulary_is_nan_where_values_cannot_be_read():
    """As on a GPU, where reading them would stall the CPU."""
    tokens_SB = torch.tensor([[0, 61], [5, 60]], device=ranks.device)
    weight_vH = torch.ones(math.ceil(61 / dist.get_world_size()), 4, device=ranks.device)
    with plant(sp, "_has_values", lambda x: False):
        x_sBH = sp.vocab_parallel_embedding(tokens_SB, weight_vH, 61)
    x_SBH = torch.cat([x.cpu() for x in everywhere(x_sBH)]) if dist.get_world_size() > 1 else x_sBH
    assert x_SBH[..., 0].isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.ranks(1, 2)
def test_a_batch_in_which_no_target_counts():
    """A loss of 0 and no gradient, as on the single device; a mean over nothing would be NaN."""
    model, (tokens, targets) = parallel_model(config()), batch_of()
    batches = [(tokens, torch.full_like(targets, -100))]
    assert next(sp.train(model, adamw(model), batches)) == (0, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    plain = plain_model(config())
    assert next(sp.train_alone(plain, adamw(plain), batches)) == (0, 0)
    assert all(p.isfinite().all() for p in plain.parameters())


def test_the_optimizer_has_the_papers_settings():
    """Both models share it, so comparing them cannot see a change here."""
    optimizer = sp.make_optimizer(plain_model(config()), 0.5)
    matrices, vectors = optimizer.param_groups
    for group in (matrices, vectors):
        assert group["lr"] == 0.5 and group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8
    assert matrices["weight_decay"] == 0.01 and all(p.ndim > 1 for p in matrices["params"])
    assert vectors["weight_decay"] == 0 and all(p.ndim == 1 for p in vectors["params"])


def group_calls() -> dict[str, Callable]:
    """A call of every public function that takes a group, by name."""
    x = torch.ones(2, 1, 4)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    model = sp.SPRowParallelLinear(4, 4)
    weights = {"final_norm.weight": torch.ones(4)}
    return {
        "group_size": sp.group_size,
        "group_rank": sp.group_rank,
        "gather_from_sp": partial(sp.gather_from_sp, x),
        "reduce_scatter_to_sp": partial(sp.reduce_scatter_to_sp, x),
        "scatter_to_sp": partial(sp.scatter_to_sp, x),
        "column_parallel": partial(sp.column_parallel, x, torch.ones(3, 4)),
        "SPColumnParallelLinear": partial(sp.SPColumnParallelLinear, 4, 4),
        "SPRowParallelLinear": partial(sp.SPRowParallelLinear, 4, 4),
        "SequenceParallelLayer": partial(sp.SequenceParallelLayer, config()),
        "SequenceParallelGPT": partial(sp.SequenceParallelGPT, config()),
        "vocab_parallel_embedding": partial(sp.vocab_parallel_embedding, ids, torch.ones(3, 4), 3),
        "reduce_sequence_parallel_grads": partial(sp.reduce_sequence_parallel_grads, model),
        "shard_state_dict": partial(sp.shard_state_dict, weights, config()),
        "copy_to_tp": partial(tables.copy_to_tp, x),
        "reduce_from_tp": partial(tables.reduce_from_tp, x),
        "clip_grad_norm_": partial(sp.clip_grad_norm_, [nn.Parameter(x)], 1.0, sharded=[x]),
    }


@pytest.mark.ranks(2)
def test_a_rank_outside_the_group_is_refused():
    """torch answers −1 for its size there: local values would pass for sums over the group."""
    first_alone = dist.new_group([0])
    calls = group_calls()
    for name, value in vars(sp).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == sp.__name__:
            takes_group = "group" in inspect.signature(value).parameters
            assert takes_group == (name in calls) or name == "Message", name
    for name, call in calls.items():
        if dist.get_rank() == 0:
            call(group=first_alone)
            continue
        with pytest.raises(ValueError, match="rank 1 is not in the process group"):
            call(group=first_alone)
            pytest.fail(f"{name} accepts a group without this rank")


# ── Whole scripts ───────────────────────────────────────────────────────────────────────────────


def run(*flags: str, timeout: int = 120):
    return scripts.forked(SCRIPT, *flags, timeout=timeout)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seq-length", "30"], "--seq-length 30 does not divide over 4 ranks: try 32"),
        (["--num-heads", "2"], "num_heads=2 and ffn_hidden_size=512 do not divide over tp=4 ranks"),
        (["--batch", "0"], "argument --batch: '0' must be of type int, from 1"),
        (["--num-heads", "0"], "argument --num-heads: '0' must be of type int, from 1"),
        (["--hidden-size", "0"], "argument --hidden-size: '0' must be of type int, from 1"),
        (["--seq-length", "0"], "argument --seq-length: '0' must be of type int, from 1"),
        (["--hidden-size", "30"], "hidden_size=30, num_heads=4: the first must be a multiple"),
        (["--lr", "nan"], "argument --lr: 'nan' must be of type float"),
        (["--lr", "-1"], "argument --lr: '-1' must be of type float"),
        (["--lr", "inf"], "argument --lr: 'inf' must be of type float"),
        (["--dropout", "1"], "dropout=1.0: it must be at least 0 and less than 1"),
        (["--dropout", "nan"], "argument --dropout: 'nan' must be of type float"),
        (["--recompute", "some"], "invalid choice"),
    ],
)
def test_a_wrong_flag_is_one_line_before_any_rank_starts(flags, message, monkeypatch, capsys):
    """`flags` comes before `launch`."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", "4", *flags])
    with pytest.raises(SystemExit) as stopped:
        sp.flags()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("world", [*range(1, 10), 11, 12, 16])
def test_defaults_fit_any_number_of_ranks(world, monkeypatch):
    """128 tokens, 128 features and 4 heads, or the next sizes that the ranks divide."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", str(world)])
    args = sp.flags()
    sizes = args.seq_length, args.hidden_size, args.num_heads
    for size in (args.seq_length, args.num_heads, 4 * args.hidden_size):
        assert size % world == 0
    least = (128, 128, 4)
    assert all(size - world < at_least <= size for size, at_least in zip(sizes[::2], least[::2]))
    assert sizes == least or world not in (1, 2, 4)


def test_what_a_flag_says_is_honoured_or_refused(monkeypatch, capsys):
    argv = [str(SCRIPT), "--ranks", "3", "--num-heads", "3", "--hidden-size", "6"]
    monkeypatch.setattr(sys, "argv", argv)
    args = sp.flags()
    assert (args.num_heads, args.hidden_size, args.seq_length) == (3, 6, 129)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ranks", "3", "--num-heads", "4"])
    with pytest.raises(SystemExit):
        sp.flags()
    assert "tp must divide both" in capsys.readouterr().err


@pytest.mark.ranks(1, 2, 3)
@EVERY_RECOMPUTE
def test_the_cost_of_a_layer_on_any_number_of_ranks(recompute):
    kept, formula, messages = sp.layer_cost(recompute, ranks.device)
    assert abs(kept / formula - 1) < 0.01
    expected = {"none": "6, 4", "selective": "6, 4", "full": "8, 6"}[recompute]
    assert messages == (expected if dist.get_world_size() > 1 else "0, 0")


def test_a_terminal_that_is_not_utf8(monkeypatch):
    """Characters that it lacks are replaced; nothing raises after the training."""
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    sp.flags()
    sp.say("s·b·h")
    assert shown.buffer.getvalue() == b"s?b?h\n"


def test_without_docstrings(monkeypatch):
    """python -OO leaves none."""
    monkeypatch.setattr(sp, "__doc__", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert sp.flags().steps == 40


def printed(function: Callable, *flags: str) -> tuple:
    """What rank 0 prints when function(args, device) runs with these flags, and what it returns."""
    argv = [str(SCRIPT), "--ranks", str(dist.get_world_size()), *flags]
    with plant(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()) as out:
        result = function(sp.flags(), ranks.device)
    return everywhere(out.getvalue())[0], result


@EVERY_WORLD
def test_five_steps_without_dropout():
    """--check: gradients, losses, norms and the weights after five steps of AdamW, three modes."""
    errors = sp.equivalence(ranks.device, torch.float64)
    parameters = len(list(sp.GPT(config()).parameters()))
    assert len(errors) == 3 * (2 * parameters + 2 * 5)
    assert sp.worst(errors) < 1e-10
    for kind in ("gradient", "norm before clipping", "weight after AdamW", "loss"):
        for recompute in sp.RECOMPUTE:
            assert any(name.startswith(kind) and recompute in name for name in errors)


@pytest.mark.ranks(1, 2)
def test_training_with_full_recomputation_and_dropout():
    flags = "--recompute full --dropout 0.1 --steps 3 --num-layers 1 --batch 2".split()
    text, differences = printed(sp.demonstrate, *flags)
    assert "recompute full" in text
    assert differences == []  # nothing to compare with: masks differ


@pytest.mark.ranks(2)
def test_every_rank_compares_the_first_losses():
    """All ranks train the single device's model, so none waits longer than a message may take."""
    flags = "--steps 2 --num-layers 1 --hidden-size 32 --batch 2".split()
    _, differences = printed(sp.demonstrate, *flags)
    assert len(differences) == 2
    assert max(differences) < sp.BOUNDS["fp32"]
    assert everywhere(differences)[0] == differences


@pytest.mark.slow
def test_the_script_and_its_exit_code():
    """A short run ends in its claims, all ok."""
    result = run("--ranks", "2", "--steps", "6", "--num-layers", "1")
    assert result.returncode == 0, result.stderr
    assert "claim" in result.stdout
    assert "FAILED" not in result.stdout


@pytest.mark.ranks(1)
def test_the_check_of_one_rank():
    code, printed = scripts.on_ranks(sp, "--check", "--dtype", "fp64")
    assert code == 0 and printed.count(" bound 1e-10") == 1


@pytest.mark.ranks(3, detail=True, timeout=120)
def test_the_script_with_torchs_checks_of_every_collective():
    code, printed = scripts.on_ranks(sp, "--steps", "2", "--num-layers", "1")
    assert code == 0 and "3 ranks: tp 3" in printed
    assert "verdict" in printed and "FAILED" not in printed
