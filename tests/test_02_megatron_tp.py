# SPDX-License-Identifier: MIT-0
"""Chapter 2 equals the single device: every layer and the model, forward, backward and after training.

A test marked `ranks` is what every rank of that world executes. References are part 1 of the chapter, or PyTorch.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import signal
import time
from functools import lru_cache
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
from proof import Events, SavedStorages, Shapes, Shows, assert_differs, assert_equal, plant, worst_of
from torch import nn

SCRIPT = Path(tp.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)


# ── Small helpers ───────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> tp.GPTConfig:
    sizes = dict(vocab_size=61, seq_length=16, hidden_size=32, num_layers=2, num_heads=4)
    return tp.GPTConfig(**(sizes | changes))


def on_device(module: nn.Module) -> nn.Module:
    return module.to(ranks.device, torch.float64)


def random(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(ranks.device)


def batch_of(rows=3, length=13, vocab=61, seed=1):
    """Tokens and targets of which rows count unequally: the first row's targets are mostly −100."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(vocab, (2, rows, length), generator=generator).to(ranks.device)
    targets_BS[0, 3:] = -100
    return tokens_BS, targets_BS


@lru_cache
def grid_of(degree: int) -> tp.Grid:
    return tp.make_grid(degree, ranks.device)


def same_weights(plain: nn.Module, parallel: nn.Module, rank: int, world: int) -> None:
    """Gives `parallel` its share of `plain`'s weights, by the chapter's table."""
    shares = {}
    for name, whole in plain.state_dict().items():
        dim = tp.shard_dim("x." + name)
        shares[name] = whole if dim is None else whole.chunk(world, dim)[rank]
    parallel.load_state_dict(shares)


def joined(tensors: dict, cfg: tp.GPTConfig, group=None) -> dict:
    """All ranks' shares, put together to whole tensors."""
    shards = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, {name: x.detach().cpu() for name, x in tensors.items()}, group)
    return tp.merge_state_dicts(shards, cfg)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


def models(cfg: tp.GPTConfig, group=None):
    return on_device(tp.GPT(cfg)), on_device(tp.ParallelGPT(cfg, group))


@dataclasses.dataclass
class Beside:
    """A model's loss and whole gradients here, and those of the plain model: all on the CPU."""

    loss: torch.Tensor
    grads: dict
    expected: torch.Tensor
    reference: dict

    def __post_init__(self):
        self.loss, self.expected = self.loss.detach().cpu(), self.expected.detach().cpu()
        self.reference = {name: grad.cpu() for name, grad in self.reference.items()}

    def shows(self) -> Shows:
        loss, expected = self.loss.sum().item(), self.expected.sum().item()
        return Shows(loss=abs(loss / expected - 1), gradients=worst_of(self.grads, self.reference))


def beside(cfg: tp.GPTConfig, group=None, streams=None, batch=None, change=None) -> Beside:
    """Both models, forward and backward; of what should be whole and differs between ranks, rank 0's counts.

    batch: this rank's tokens and targets, where they are not the plain model's. change: of every weight, by name.
    """
    plain, parallel = models(cfg, group)
    if change:
        full = {name: change(name, x) for name, x in plain.state_dict().items()}
        plain.load_state_dict(full)
        rank, world = tp.group_rank(group), tp.group_size(group)
        parallel.load_state_dict(tp.shard_state_dict(full, cfg, rank, world))
    tokens, targets = batch_of(vocab=cfg.vocab_size)
    loss, expected = parallel.loss(*(batch or (tokens, targets)), streams), plain.loss(tokens, targets)
    loss.sum().backward()
    expected.sum().backward()
    shards = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, {name: grad.cpu() for name, grad in grads_of(parallel).items()}, group)
    for shard in shards[1:]:
        shard.update({name: shards[0][name] for name in shard if tp.shard_dim(name) is None})
    return Beside(loss, tp.merge_state_dicts(shards, cfg), expected, grads_of(plain))


# ── 2.1 The operators ───────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_operators_forward_and_backward():
    """Each operator against the sentence in its table, written out with what all ranks hold."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, per_rank = random(3, 8), [random(3, 8, seed=10 + r) for r in range(world)]
    share = slice(8 // world * rank, 8 // world * (rank + 1))

    a = x.clone().requires_grad_()
    y = tp.copy_to_tp(a)
    y.backward(per_rank[rank])
    assert torch.equal(y, x)
    assert_equal({"copy": a.grad}, {"copy": sum(per_rank)})

    a = per_rank[rank].clone().requires_grad_()
    y = tp.reduce_from_tp(a)
    y.backward(x)
    assert_equal({"reduce": y}, {"reduce": sum(per_rank)})
    assert torch.equal(a.grad, x) and torch.equal(a, per_rank[rank])  # the input is as it was

    a = x.clone().requires_grad_()
    y = tp.scatter_to_tp(a)
    y.backward(x[:, share] * (rank + 1))
    weights = torch.arange(1, world + 1, device=x.device).repeat_interleave(8 // world)
    assert torch.equal(y, x[:, share]) and torch.equal(a.grad, x * weights)

    a = x[:, share].clone().requires_grad_()
    y = tp.gather_from_tp(a)
    y.backward(per_rank[0])
    assert torch.equal(y, x) and torch.equal(a.grad, per_rank[0][:, share])


def test_without_a_process_group_there_is_one_rank():
    """Every public function works in a process that knows no other."""
    assert not dist.is_initialized()
    x = random(2, 3, 8)
    for operator in (tp.copy_to_tp, tp.reduce_from_tp, tp.scatter_to_tp, tp.gather_from_tp):
        assert operator(x) is x
    cfg = config()
    plain, parallel = tp.GPT(cfg), tp.ParallelGPT(cfg)
    batch = batch_of()
    assert torch.equal(plain(batch[0]), parallel(batch[0]))
    alone = [loss for loss, _ in tp.train_alone(plain, [batch] * 3, lambda step: 1e-3)]
    together = [loss for loss, _ in tp.train(parallel, [batch] * 3, lambda step: 1e-3, tp.Grid())]
    assert_equal(
        dict(enumerate(together)), dict(enumerate(alone)), bound=1e-6
    )  # fp32: the two losses are other kernels
    assert tp.generate(parallel.eval(), batch[0][0, :4], 3).shape == (7,)


@pytest.mark.ranks(2, 4)
def test_second_derivatives_are_right_or_refused():
    """Right through the doors; refused by the two functions that communicate where autograd cannot see it."""
    world, rank, x = dist.get_world_size(), dist.get_rank(), random(3, 8).requires_grad_()
    whole = world * (world + 1) / 2  # 1 + 2 + ...: each rank weighs its summand with its number
    inside_the_region = {
        "copy, reduce": (lambda x: tp.reduce_from_tp((rank + 1) * tp.copy_to_tp(x) ** 3), lambda x: whole * x**3),
        "scatter, gather": (lambda x: tp.gather_from_tp(tp.scatter_to_tp(x) ** 3), lambda x: x**3),
    }
    found, reference = {}, {}
    for name, functions in inside_the_region.items():
        for function, grads in zip(functions, (found, reference)):
            (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
            (grads[name],) = torch.autograd.grad(first.pow(2).sum(), x)
    assert_equal(found, reference)
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    targets = torch.zeros(3, dtype=torch.int64, device=x.device)
    for loss in (layer(x).pow(2).sum(), tp.vocab_parallel_cross_entropy(x, targets).pow(2).sum()):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.pow(2).sum().backward()


# ── 2.2 Linear layers ───────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 3)], ids=str)
@pytest.mark.parametrize("layer", ["column", "column, gathered", "row", "row, whole input"])
def test_linear_layers(layer, shape, bias):
    """Started from one seed, equal to nn.Linear to the bit; then outputs and every gradient, any leading dimensions."""
    world, rank = dist.get_world_size(), dist.get_rank()
    kind = tp.ColumnParallelLinear if layer.startswith("column") else tp.RowParallelLinear
    torch.manual_seed(3)
    plain = nn.Linear(8, 12, bias)
    torch.manual_seed(3)
    options = {"column, gathered": dict(gather_output=True), "row, whole input": dict(input_is_parallel=False)}
    parallel = kind(8, 12, bias, **options.get(layer, {}))
    dim = 0 if kind is tp.ColumnParallelLinear else 1
    assert torch.equal(parallel.weight, plain.weight.chunk(world, dim)[rank])
    plain, parallel = on_device(plain), on_device(parallel)

    x, upstream = random(*shape, 8).requires_grad_(), random(*shape, 12, seed=2)
    expected = plain(x)
    (grad_x, *grads) = torch.autograd.grad(expected, [x, *plain.parameters()], upstream)

    cut_in, cut_out = layer == "row", layer == "column"
    mine = x.detach().chunk(world, -1)[rank] if cut_in else x.detach()
    mine = mine.clone().requires_grad_()
    y = parallel(mine)
    (grad_mine, *grads_mine) = torch.autograd.grad(
        y, [mine, *parallel.parameters()], upstream.chunk(world, -1)[rank] if cut_out else upstream
    )
    here = {"y": y, "x": grad_mine, "weight": grads_mine[0]}
    there = {
        "y": expected.chunk(world, -1)[rank] if cut_out else expected,
        "x": grad_x.chunk(world, -1)[rank] if cut_in else grad_x,
        "weight": grads[0].chunk(world, dim)[rank],
    }
    if bias:
        here["bias"], there["bias"] = grads_mine[1], grads[1].chunk(world)[rank] if dim == 0 else grads[1]
    if 0 in shape:  # an empty batch: shapes agree and gradients of weights are zero, on both sides
        assert all(here[name].shape == there[name].shape for name in there)
        assert not any(here[name].any() for name in there)
    else:
        assert_equal(here, there)


@pytest.mark.ranks(2)
def test_column_backward_sends_before_it_multiplies():
    """The order of events: the input's gradient, its all-reduce, the weight's gradient, and only then the wait."""
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    x = random(2, 3, 8).requires_grad_()
    y = layer(x)
    with Events() as events:
        y.sum().backward()
    assert events.order == ["product", "all_reduce", "product", "wait"]


@pytest.mark.ranks(2)
def test_nothing_is_computed_for_what_needs_no_gradient():
    """A frozen weight costs no product and an input without gradient no message, as in fine-tuning."""
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
def test_a_layer_keeps_no_more_than_its_share():
    """Shares are copies: a view would hold the whole weight in memory."""
    column, row, words = tp.ColumnParallelLinear(8, 12), tp.RowParallelLinear(8, 12), tp.VocabParallelEmbedding(7, 6)
    for p in (column.weight, column.bias, row.weight, words.weight):
        assert p.untyped_storage().nbytes() == p.nbytes
    assert words.weight.shape == (4, 6) and (dist.get_rank() == 0 or not words.weight[3].any())  # padding is zero


@pytest.mark.ranks(2)
def test_gather_of_a_transposed_tensor():
    x = random(3, 4).mT
    assert torch.equal(tp.gather_from_tp(x), torch.cat([x, x], -1))
    assert torch.equal(tp.reduce_from_tp(x), 2 * x)


@pytest.mark.ranks(2)
def test_autocast_leaves_float64_alone():
    layer = on_device(tp.ColumnParallelLinear(8, 12))
    with torch.autocast(ranks.device.type, torch.bfloat16):
        assert layer(random(3, 8)).dtype == torch.float64


# ── 2.3 Attention, feed-forward layer, block ────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
def test_layers(part, norm):
    world, rank, cfg = dist.get_world_size(), dist.get_rank(), config(norm=norm)

    def build(*matrices):
        block = tp.Block(cfg, tp.Attention(cfg, *matrices), tp.MLP(cfg, *matrices))
        return on_device({"attention": block.attention, "mlp": block.mlp, "block": block}[part])

    torch.manual_seed(5)
    plain, parallel = build(), build(*tp.parallel_matrices())
    same_weights(plain, parallel, rank, world)
    x, upstream = random(3, 7, 32), random(3, 7, 32, seed=2)  # an odd batch, an odd length
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = plain(a, tp.RandomStreams()), parallel(b, tp.RandomStreams())
    expected.backward(upstream)
    y.backward(upstream)
    assert_equal({"y": y, "x": b.grad}, {"y": expected, "x": a.grad})
    grads = {"x." + name: grad for name, grad in grads_of(parallel).items()}
    assert_equal(joined(grads, cfg), {"x." + name: grad for name, grad in grads_of(plain).items()})


def test_plain_attention_is_pytorchs():
    """Part 1 itself against nn.MultiheadAttention, whose fused rows are ordered (q, k, v): so ours are not."""
    cfg = config(hidden_size=12, num_heads=3)
    ours, theirs = tp.Attention(cfg).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    order = torch.arange(36).view(3, 3, 4).transpose(0, 1).flatten()  # (head, three, D) read as (three, head, D)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight[order])
        theirs.in_proj_bias.copy_(ours.qkv.bias[order])
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = random(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert_equal({"y": ours(x, tp.RandomStreams())}, {"y": theirs(x, x, x, attn_mask=mask, is_causal=True)[0]})


def test_block_in_both_orders():
    """x + f(LN(x)) and LN(x + f(x)), written out."""
    x, streams = random(2, 5, 32), tp.RandomStreams()
    for norm in ("pre", "post"):
        cfg = config(norm=norm)
        block = tp.Block(cfg, tp.Attention(cfg), tp.MLP(cfg)).double()
        for p in (block.norm1.weight, block.norm2.weight, block.norm1.bias, block.norm2.bias):
            nn.init.normal_(p)
        f, g = (lambda x, part=part: part(x, streams) for part in (block.attention, block.mlp))
        if norm == "pre":
            y = x + f(block.norm1(x))
            y = y + g(block.norm2(y))
        else:
            y = block.norm1(x + f(x))
            y = block.norm2(y + g(y))
        assert torch.equal(block(x, streams), y)


@pytest.mark.parametrize("kind", [tp.GPT, tp.ParallelGPT])
def test_nothing_is_dropped_in_eval_mode(kind):
    tokens = batch_of()[0]
    with_dropout, without = kind(config(dropout=0.5)).eval(), kind(config()).train()
    assert torch.equal(with_dropout(tokens), without(tokens))
    assert not torch.equal(with_dropout.train()(tokens), without(tokens))


def test_written_out_attention_equals_the_fused_kernel():
    """With a dropout too small to drop anything the written-out path must give what the kernel gives."""
    q, k, v = (random(2, 3, 7, 4, seed=s) for s in (1, 2, 3))
    with plant(tp, "keep_mask", lambda x, p, generator: torch.ones_like(x, dtype=torch.bool)):
        assert_equal({"y": tp.core_attention(q, k, v, p=1e-15)}, {"y": tp.core_attention(q, k, v)})


# ── 2.4 The embedding ───────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize(
    "words", [1, 5, 6, 61, 64]
)  # at 4 ranks: 5 words leave a rank with padding alone, 1 word three
def test_embedding(words):
    torch.manual_seed(3)
    plain = nn.Embedding(words, 6)
    torch.manual_seed(3)
    parallel = tp.VocabParallelEmbedding(words, 6)
    plain, parallel = on_device(plain), on_device(parallel)
    tokens, upstream = batch_of(vocab=words)[0], random(3, 13, 6)
    y, expected = parallel(tokens), plain(tokens)
    y.backward(upstream)
    expected.backward(upstream)
    cfg = config(vocab_size=words)
    assert torch.equal(y, expected)
    grads = joined({"embedding.weight": parallel.weight.grad}, cfg)
    assert_equal(grads, {"embedding.weight": plain.weight.grad})


@pytest.mark.ranks(2)
def test_embedding_drops_foreign_rows_and_does_not_multiply_them():
    """A product with zero would carry a NaN of an unused row into every rank's sum."""
    words = on_device(tp.VocabParallelEmbedding(6, 4))
    with torch.no_grad():
        words.weight[0] = torch.nan if dist.get_rank() else 1.0
    rows = words(torch.zeros(1, 2, dtype=torch.int64, device=ranks.device))
    assert torch.equal(rows, torch.ones_like(rows))


@pytest.mark.ranks(4)
def test_a_vocabulary_must_fit_its_group():
    """Two ranks of a world of four hold 2·v columns, not 4·v."""
    with pytest.raises(ValueError, match="a vocabulary of 12 words does not fit the 8 columns"):
        tp.vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), grid_of(2).tp_group, 12)


# ── 2.5 The loss ────────────────────────────────────────────────────────────────────────────────────────


def shard_logits(logits: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    """This rank's columns; what pads them is garbage that must not be looked at."""
    padded = tp.padded_vocab_size(logits.shape[-1], world)
    return F.pad(logits, (0, padded - logits.shape[-1]), value=50.0).chunk(world, -1)[rank].contiguous()


@EVERY_WORLD
@pytest.mark.parametrize("words", [1, 5, 6, 61, 64])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_loss(words, ignored):
    """Value and gradient of F.cross_entropy, with ignored targets, also where the ignored number is a word's."""
    world, rank = dist.get_world_size(), dist.get_rank()
    logits, (_, targets) = random(3, 13, words).requires_grad_(), batch_of(vocab=words)
    targets = torch.where(targets == -100, ignored, targets)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=ignored, reduction="none")
    upstream = random(3, 13, seed=2)
    expected.backward(upstream)

    mine = shard_logits(logits.detach(), world, rank).requires_grad_()
    before = mine.detach().clone()
    loss = tp.vocab_parallel_cross_entropy(mine, targets, vocab_size=words, ignore_index=ignored)
    loss.backward(upstream)
    assert torch.equal(mine, before), "the caller's logits were modified"
    grads = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(grads, mine.grad)
    whole = torch.cat(grads, -1)
    assert not whole[..., words:].any(), "padding got a gradient"
    zeros = {"loss": 1e-12, "grad": 1e-12} if words == 1 else {}  # one word: certain, so loss and gradient are zero
    assert_equal({"loss": loss, "grad": whole[..., :words]}, {"loss": expected, "grad": logits.grad}, zeros=zeros)


@pytest.mark.ranks(2)
def test_loss_of_extreme_and_narrow_logits():
    """±10,000 stays finite, as log_softmax does; bf16 logits give an fp32 loss and a bf16 gradient."""
    world, rank = dist.get_world_size(), dist.get_rank()
    logits, targets = random(2, 5, 8), batch_of(2, 5, vocab=8)[1]
    logits = logits * 1e4
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert_equal(
        {"loss": tp.vocab_parallel_cross_entropy(shard_logits(logits, world, rank), targets)}, {"loss": expected}
    )

    narrow = (logits / 1e4).bfloat16()
    mine = shard_logits(narrow, world, rank).requires_grad_()
    loss = tp.vocab_parallel_cross_entropy(mine, targets)
    loss.sum().backward()
    expected = F.cross_entropy(narrow.float().transpose(1, 2), targets, reduction="none")
    assert loss.dtype == torch.float32 and mine.grad.dtype == torch.bfloat16
    assert_equal({"loss": loss}, {"loss": expected}, bound=1e-6)  # fp32


# ── The model ───────────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("vocab", [61, 64])
@pytest.mark.parametrize("multiple", [1, 128])
def test_model_forward_and_backward(vocab, multiple):
    """Loss and every gradient; a vocabulary that tp does not divide, and one padded until ranks hold padding alone."""
    cfg = config(vocab_size=vocab, vocab_multiple=multiple)
    plain, parallel = models(cfg)
    tokens, targets = batch_of(vocab=vocab)
    expected, loss = plain.loss(tokens, targets), parallel.loss(tokens, targets)
    expected.sum().backward()
    loss.sum().backward()
    assert_equal({"loss": loss}, {"loss": expected})
    assert_equal(joined(grads_of(parallel), cfg), grads_of(plain))


@EVERY_WORLD
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_five_steps(optimizer):
    """Weights after five steps, and the norm before clipping, which AdamW and clipping would both hide."""
    cfg = config()
    plain, parallel = models(cfg)

    def make(model):
        if optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8)

    ours, theirs, rate = make(parallel), make(plain), 0.1 if optimizer == "sgd" else 1e-3
    max_norm, grid = (1e9, 0.1)[optimizer == "adamw"], grid_of(dist.get_world_size())
    batches = [batch_of(seed=step) for step in range(5)]
    together = tp.train(parallel, batches, lambda step: rate, grid, max_norm=max_norm, optimizer=ours)
    for (tokens, targets), (loss, norm_here) in zip(batches, together, strict=True):
        theirs.zero_grad()
        expected = plain.loss(tokens, targets).sum() / (targets != -100).sum()
        expected.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        theirs.step()
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
        assert optimizer == "sgd" or norm > max_norm, "nothing was clipped"
        assert_equal(joined(grads_of(parallel), cfg), grads_of(plain))
    floor = 5e-3 if optimizer == "adamw" else 0.0
    assert_equal(joined(parallel.state_dict(), cfg), plain.state_dict(), floor=floor)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("rows", [4, 5])
def test_tensor_and_data_parallel_training(degree, rows):
    """All grids of four ranks, with rows that dp does not divide and replicas with unequal numbers of tokens."""
    cfg, grid = config(), grid_of(degree)
    plain, parallel = models(cfg, grid.tp_group)
    batches = [batch_of(rows, seed=step) for step in range(5)]
    alone = tp.train_alone(plain, batches, lambda step: 1e-3 / (step + 1), max_norm=0.1)
    together = tp.train(parallel, batches, lambda step: 1e-3 / (step + 1), grid, max_norm=0.1)
    for (expected, norm), (loss, norm_here) in zip(alone, together, strict=True):
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
        assert_equal(joined(grads_of(parallel), cfg, grid.tp_group), grads_of(plain))
    weights = joined(parallel.state_dict(), cfg, grid.tp_group)
    assert_equal(weights, plain.state_dict(), floor=5e-3)
    every = [None] * 4
    dist.all_gather_object(every, {name: x.cpu() for name, x in weights.items()})
    assert all(torch.equal(every[0][name], other[name]) for other in every for name in weights), (
        "replicas drifted apart"
    )


@pytest.mark.ranks(4)
def test_a_replica_without_a_token_that_counts():
    """A batch smaller than dp leaves replicas with nothing, and they still take part."""
    cfg, grid = config(), grid_of(1)
    plain, parallel = models(cfg, grid.tp_group)
    batch = batch_of(rows=2)
    ((expected, norm),) = tp.train_alone(plain, [batch], lambda step: 1e-3)
    ((loss, norm_here),) = tp.train(parallel, [batch], lambda step: 1e-3, grid)
    assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    assert_equal(grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(1, 2, 4)
def test_gradients_that_some_ranks_do_not_have():
    """A parameter that only some ranks used: the others add zero, and nobody waits for a message that never comes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = [on_device(nn.Linear(3, 2)) for _ in range(4)]
    parts[3].requires_grad_(False)  # frozen: it stays without
    for part in parts[: rank + 1]:
        for p in part.parameters() if part is not parts[3] else ():
            p.grad = torch.full_like(p, rank + 1.0)
    tp.sum_gradients([p for part in parts for p in part.parameters()])
    for number, part in enumerate(parts[:3]):
        total = sum(r + 1.0 for r in range(number, world))
        for p in part.parameters():
            assert torch.equal(p.grad, torch.full_like(p, total)) if world > 1 or number == 0 else p.grad is None
    assert all(p.grad is None for p in parts[3].parameters())


@pytest.mark.ranks(1, 2, 4)
def test_a_batch_in_which_nothing_counts():
    """Loss and norm are zero, and every weight stays finite, here and on one device."""
    tokens, targets = batch_of()
    targets = torch.full_like(targets, -100)
    plain, parallel = models(config())
    ((loss, norm),) = tp.train_alone(plain, [(tokens, targets)], lambda step: 1e-3)
    grid = grid_of(dist.get_world_size())
    ((here, norm_here),) = tp.train(parallel, [(tokens, targets)], lambda step: 1e-3, grid)
    assert loss == here == norm == norm_here == 0
    assert all(torch.isfinite(p).all() for model in (plain, parallel) for p in model.parameters())


@pytest.mark.ranks(1, 2)
def test_an_ignored_target_lets_nothing_through():
    """Not even an infinite gradient, which a product with zero would turn into NaN."""
    logits, targets = random(2, 8), torch.tensor([1, -100], device=ranks.device)
    upstream = torch.tensor([1.0, torch.inf], dtype=torch.float64, device=ranks.device)
    a = logits.clone().requires_grad_()
    F.cross_entropy(a, targets, reduction="none").backward(upstream)
    world, rank = dist.get_world_size(), dist.get_rank()
    b = logits.chunk(world, -1)[rank].clone().requires_grad_()
    tp.vocab_parallel_cross_entropy(b, targets).backward(upstream)
    assert_equal({"grad": b.grad}, {"grad": a.grad.chunk(world, -1)[rank]})


def test_every_place_has_its_own_stream():
    """No two steps, layers, replicas or ranks draw the same masks, but the ranks of a replica outside the region."""
    seen = []
    for seed in (0, 1, 2**40):
        for step in (0, 1):
            for dp_rank in (0, 1):
                for layer in (-1, 0, 1):
                    both = [tp.random_streams(seed, step, rank, dp_rank)(layer) for rank in (0, 1)]
                    seen += [both[0].outside, both[0].inside, both[1].inside]
                    assert both[1].outside.initial_seed() == both[0].outside.initial_seed()
    assert len({stream.initial_seed() % 2**32 for stream in seen}) == len(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_clipping_of_narrow_gradients(dtype):
    """The norm is computed in at least fp32, whatever the gradients are."""
    p = nn.Parameter(torch.zeros(3000, dtype=dtype))
    p.grad = random(3000).cpu().to(dtype)
    wide = p.grad.double().norm()
    norm = tp.clip_grad_norm_([p], 1.0)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(norm.double() / wide - 1) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("who", [1, 2, 3])
def test_a_drift_is_found_on_whatever_rank(who):
    cfg = config()
    shards = [tp.shard_state_dict(dict(tp.initial_weights(cfg)), cfg, rank, 4) for rank in range(4)]
    shards[who]["final_norm.bias"][3] += 1e-7
    with pytest.raises(ValueError, match=f"final_norm.bias should be the same on every rank, but rank {who}'s differs"):
        tp.merge_state_dicts(shards, cfg)


def test_a_checkpoint_of_a_model_with_frozen_parameters(tmp_path):
    model = tp.ParallelGPT(config())
    model.embedding.weight.requires_grad_(False)
    optimizer = tp.make_optimizer(model)
    list(tp.train(model, [batch_of()], lambda step: 1e-3, tp.Grid(), optimizer=optimizer))
    tp.save_checkpoint(tmp_path / "run", 1, model, optimizer, tp.Grid())
    assert tp.load_checkpoint(tmp_path / "run", *small_run(config()), tp.Grid()) == 1


@pytest.mark.ranks(1, 2, 4)
def test_generation_is_the_plain_models():
    cfg = config(init_std=0.5)  # large weights, so that the most probable word is no tie
    plain, parallel = models(cfg)
    tokens = batch_of()[0][0]
    expected = tokens
    for _ in range(8):  # longer than the model's positions: the window moves
        logits = plain(expected[None, -cfg.seq_length :])[0, -1]
        expected = torch.cat([expected, logits.argmax()[None]])
    assert torch.equal(tp.generate(parallel, tokens, 8), expected)


# ── 3 Moving weights ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(1, 2, 4)
def test_weights_are_the_plain_models_whatever_tp_is():
    cfg = config()
    whole = tp.GPT(cfg).state_dict()
    mine = tp.shard_state_dict(whole, cfg, dist.get_rank(), dist.get_world_size())
    torch.manual_seed(dist.get_rank())  # the default generator has no say
    for name, x in tp.ParallelGPT(cfg).state_dict().items():
        assert torch.equal(x, mine[name]), name


def test_initial_weights_are_the_papers():
    """σ = 0.02, and 0.02/√(2L) for what writes onto the residual stream; biases 0, norms 1; the seed decides."""
    cfg = config(hidden_size=256, num_layers=8, seq_length=64, vocab_size=997)
    weights, other = (dict(tp.initial_weights(c)) for c in (cfg, dataclasses.replace(cfg, seed=1)))
    for name, x in weights.items():
        if name.endswith(("out.weight", "down.weight")):
            assert abs(x.std() / (0.02 / 4) - 1) < 0.02, name
        elif x.ndim == 2:
            assert abs(x.std() / 0.02 - 1) < 0.02, name
        else:
            assert torch.equal(x, torch.zeros_like(x) if name.endswith("bias") else torch.ones_like(x)), name
    assert not torch.equal(weights["layers.0.mlp.up.weight"], other["layers.0.mlp.up.weight"])


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 40), head_size=st.integers(1, 3), heads=st.sampled_from([4, 8]), layers=st.integers(1, 2),
    multiple=st.sampled_from([1, 3, 8]), first=st.sampled_from([1, 2, 4]), second=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_weights_survive_any_resharding(vocab, head_size, heads, layers, multiple, first, second):
    """Plain → tp = a → plain → tp = b → plain, to the bit, for any sizes."""
    cfg = tp.GPTConfig(vocab, 3, heads * head_size, layers, heads, vocab_multiple=multiple)
    whole = {name: torch.randn(shape) for name, shape in tp.parameter_shapes(cfg).items()}
    state = whole
    for world in (first, second):
        state = tp.merge_state_dicts([tp.shard_state_dict(state, cfg, r, world) for r in range(world)], cfg)
    assert state.keys() == whole.keys() and all(torch.equal(state[name], x) for name, x in whole.items())


def test_shares_are_copies():
    """What happens to a share does not happen to the whole, nor the other way round."""
    cfg = config()
    for name, whole in tp.initial_weights(cfg):
        before = whole.clone()
        share = tp.shard_tensor(name, whole, cfg, 0, 2)
        merged = tp.merge_state_dicts([{name: share}, {name: tp.shard_tensor(name, whole, cfg, 1, 2)}], cfg)[name]
        share.add_(1)
        assert torch.equal(whole, before) and torch.equal(merged, before)


def test_the_optimizer_decays_matrices_alone():
    model = tp.GPT(config())
    matrices, vectors = tp.make_optimizer(model, weight_decay=0.3).param_groups
    assert {p.ndim for p in matrices["params"]} == {2} and matrices["weight_decay"] == 0.3
    assert {p.ndim for p in vectors["params"]} == {1} and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


@pytest.mark.ranks(2)
def test_padding_stays_zero_while_training():
    cfg, grid = config(), grid_of(2)
    model = on_device(tp.ParallelGPT(cfg, grid.tp_group))
    list(tp.train(model, [batch_of(seed=step) for step in range(3)], lambda step: 1e-2, grid))
    assert grid.tp_rank == 0 or not model.embedding.weight[30:].any()  # 61 words: the last rank's last row


@pytest.mark.ranks(2)
def test_training_under_autocast():
    """Both trainers run their forward pass in bf16: the loss is autocast's, to the bit, and not fp32's."""
    cfg, grid = config(), grid_of(2)
    tokens, targets = batch_of()
    for train, kind in ((tp.train_alone, (cfg,)), (functools.partial(tp.train, grid=grid), (cfg, grid.tp_group))):
        model = (tp.GPT if len(kind) == 1 else tp.ParallelGPT)(*kind).to(ranks.device)
        with torch.no_grad():
            wide = model.loss(tokens, targets).sum() / (targets != -100).sum()
            with torch.autocast(ranks.device.type, torch.bfloat16):
                narrow = model.loss(tokens, targets).sum() / (targets != -100).sum()
        ((loss, _),) = train(model, [(tokens, targets)], lambda step: 1e-3, autocast=torch.bfloat16)
        assert loss == narrow and loss != wide


def test_a_copied_model_still_knows_its_shards():
    """Which parameters are shares is a matter of names, so it survives deepcopy (a parameter's attribute does not)."""
    model = tp.ParallelGPT(config())
    assert len(copy.deepcopy(model).sharded_parameters()) == len(model.sharded_parameters()) == 1 + 2 * 6


def test_the_table_of_shards_agrees_with_the_layers():
    """Every parameter of a rank has the shape that the table of section 3 says."""
    cfg = config()
    whole = tp.parameter_shapes(cfg)
    with plant(tp, "group_size", lambda group=None: 4), plant(tp, "group_rank", lambda group=None: 3):
        shares = {name: p.shape for name, p in tp.ParallelGPT(cfg).named_parameters()}
    for name, shape in whole.items():
        expected, dim = list(shape), tp.shard_dim(name)
        if dim is not None:
            expected[dim] = -(-expected[dim] // 4)
        assert list(shares[name]) == expected, name


# ── 2.6 Dropout ─────────────────────────────────────────────────────────────────────────────────────────


def test_dropout():
    """Kept elements are scaled, the gradient has the same mask, one byte an element is saved, the generator decides."""
    x = random(50, 40).requires_grad_()
    with SavedStorages() as saved:
        y = tp.dropout(x, 0.25, torch.Generator().manual_seed(1))
    assert saved.bytes == x.numel()
    y.sum().backward()
    kept = y != 0
    assert torch.equal(y[kept], x[kept] * (1 / 0.75)) and torch.equal(x.grad, kept.double() * (1 / 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.03
    assert torch.equal(y, tp.dropout(x, 0.25, torch.Generator().manual_seed(1)))
    assert tp.dropout(x, 0.0) is x


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_dropout_streams(degree):
    """Equal masks outside within a replica, others everywhere else; a seed gives the same masks again."""
    grid = grid_of(degree)
    drawn = []
    for seed in (0, 0, 1):
        streams = tp.random_streams(seed, 3, grid.tp_rank, grid.dp_rank, ranks.device)(1)
        drawn.append(
            [
                tp.keep_mask(torch.empty(200, device=ranks.device), 0.5, s).cpu()
                for s in (streams.outside, streams.inside)
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1]))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2]))
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (grid.dp_rank, *drawn[0]))
    for i, (replica, outside, inside) in enumerate(every):
        for other_replica, other_outside, other_inside in every[:i]:
            assert torch.equal(outside, other_outside) == (replica == other_replica)
            assert not torch.equal(inside, other_inside)
        assert not torch.equal(outside, inside)


def under_joined_masks(streams: tp.Streams) -> tuple[Beside, list[tuple]]:
    """A step with dropout, and the plain model's under the ranks' masks put together; each mask's pieces, by rank."""
    cfg = config(dropout=0.3)
    plain, parallel = models(cfg)
    tokens, targets = batch_of()
    original, masks = tp.keep_mask, []

    def recorded(x, p, generator):
        masks.append(original(x, p, generator))
        return masks[-1]

    with plant(tp, "keep_mask", recorded):
        loss = parallel.loss(tokens, targets, streams)
    loss.sum().backward()
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, [mask.cpu() for mask in masks])
    pieces = list(zip(*every, strict=True))
    assert len(pieces) == 1 + 3 * cfg.num_layers
    # attention weights have a mask for each head: the ranks' heads side by side; others are whole on every rank
    replay = iter([torch.cat(each, 1) if each[0].ndim == 4 else each[0] for each in pieces])
    with plant(tp, "keep_mask", lambda x, p, generator: next(replay).to(x.device)):
        expected = plain.loss(tokens, targets)
    expected.sum().backward()
    return Beside(loss, joined(grads_of(parallel), cfg), expected, grads_of(plain)), pieces


@pytest.mark.ranks(1, 2, 4)
def test_model_with_dropout_equals_the_plain_one_under_the_joined_masks():
    """The ranks' masks, put together, are a mask of the plain model; under it loss and gradients are equal."""
    found, masks = under_joined_masks(tp.random_streams(7, 0, dist.get_rank(), 0, ranks.device))
    for pieces in masks:
        if pieces[0].ndim == 4:
            assert not any(torch.equal(pieces[0], other) for other in pieces[1:])
        else:
            assert all(torch.equal(pieces[0], other) for other in pieces)
    assert_equal({"loss": found.loss}, {"loss": found.expected})
    assert_equal(found.grads, found.reference)


# ── 2.7 Recomputation ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(1, 2)
def test_recomputation_changes_no_bit():
    """With dropout on both sides of the doors: loss and every gradient are equal to the bit, and far less is kept."""
    cfg, rank = config(dropout=0.3, num_layers=3), dist.get_rank()
    found, kept = [], []
    for recompute in (False, True):
        model = on_device(tp.ParallelGPT(cfg, recompute=recompute))
        with SavedStorages(model) as saved:
            loss = model.loss(*batch_of(), tp.random_streams(7, 0, rank, 0, ranks.device))
        kept.append(saved.bytes)
        loss.sum().backward()
        found.append({"loss": loss, **grads_of(model)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert kept[1] < kept[0] / 3


# ── 3.1 Checkpoints ─────────────────────────────────────────────────────────────────────────────────────


def trained(file: Path, cfg: tp.GPTConfig, grid: tp.Grid, steps: int, save_after: int | None = None) -> dict:
    """Trains up to `steps`, going on from `file` where it exists; weights, moments, losses, as whole tensors."""
    model = on_device(tp.ParallelGPT(cfg, grid.tp_group))
    optimizer = tp.make_optimizer(model)
    first = tp.load_checkpoint(file, model, optimizer, grid) if file.exists() else 0
    batches = (batch_of(rows=4, seed=step) for step in range(first, steps))
    options = dict(optimizer=optimizer, first=first)
    options["streams"] = lambda step: tp.random_streams(0, step, grid.tp_rank, grid.dp_rank, ranks.device)
    losses = []
    for loss, _ in tp.train(model, batches, lambda step: 1e-3, grid, **options):
        losses.append(loss)
        if first + len(losses) == save_after:
            tp.save_checkpoint(file, save_after, model, optimizer, grid)
            dist.barrier()
    found = tp.gather_state_dict(dict(model.named_parameters()), cfg, grid.tp_group)
    moments = {name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in model.named_parameters()}
    moments = tp.gather_state_dict(moments, cfg, grid.tp_group)
    return (
        found | {"moment of " + name: x for name, x in moments.items()} | ({"loss": losses[-1].cpu()} if found else {})
    )


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dropout, then", [(0.2, 2), (0.0, 1), (0.0, 4)])
def test_a_run_that_goes_on_from_a_checkpoint(tmp_path, dropout, then):
    """On the same grid equal to the bit to the run that was not interrupted, dropout included; on others to 1e-10."""
    cfg, grid = config(dropout=dropout), grid_of(2)
    whole_run = trained(tmp_path / "none", cfg, grid, steps=6)
    trained(tmp_path / "run.safetensors", cfg, grid, steps=3, save_after=3)
    resumed = trained(tmp_path / "run.safetensors", cfg, grid_of(then), steps=6)
    if dist.get_rank() == 0:
        if then == 2:
            assert all(torch.equal(resumed[name], x) for name, x in whole_run.items())
        else:
            assert_equal(resumed, whole_run, floor=6e-3)


def small_run(cfg: tp.GPTConfig):
    model = tp.ParallelGPT(cfg)
    optimizer = tp.make_optimizer(model)
    list(tp.train(model, [batch_of()], lambda step: 1e-3, tp.Grid(), optimizer=optimizer))
    return model, optimizer


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    cfg, file = config(), tmp_path / "run.safetensors"
    model, optimizer = small_run(cfg)
    tp.save_checkpoint(file, 1, model, optimizer, tp.Grid())
    assert tp.load_checkpoint(file, *small_run(cfg), tp.Grid()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]  # nothing is left aside
    good = file.read_bytes()
    with pytest.raises(ValueError, match=r"of another configuration: it has {'num_layers': 2}"):
        tp.load_checkpoint(file, *small_run(config(num_layers=1)), tp.Grid())
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for bad, message in (
        (good[: len(good) // 2], "damaged, or no"),
        (flipped, "is not what was written"),
        (b"", "no check"),
    ):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            tp.load_checkpoint(file, *small_run(cfg), tp.Grid())
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, file)  # a safetensors file, but not ours
    with pytest.raises(ValueError, match="no checkpoint"):
        tp.load_checkpoint(file, *small_run(cfg), tp.Grid())


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    cfg, file = config(), tmp_path / "run"
    tp.save_checkpoint(file, 1, *small_run(cfg), tp.Grid())
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    model = tp.ParallelGPT(cfg)
    optimizer, before = tp.make_optimizer(model), {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="is not what was written"):
        tp.load_checkpoint(file, model, optimizer, tp.Grid())
    assert not optimizer.state and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The disk's limit is the process's own, RLIMIT_FSIZE."""
    resource = pytest.importorskip("resource")
    cfg, file = config(), tmp_path / "run.safetensors"
    model, optimizer = small_run(cfg)
    tp.save_checkpoint(file, 1, model, optimizer, tp.Grid())
    good, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*run.safetensors after step 2: .*older one there is untouched"
        ):
            tp.save_checkpoint(file, 2, model, optimizer, tp.Grid())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == good and [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_half_written_file_is_not_taken_for_a_checkpoint(tmp_path):
    """Killed in the middle of writing: what stands under the name is the old one."""
    cfg, file = config(), tmp_path / "run.safetensors"
    model, optimizer = small_run(cfg)
    tp.save_checkpoint(file, 1, model, optimizer, tp.Grid())

    def killed(*args):
        raise KeyboardInterrupt

    with plant(os, "replace", killed), pytest.raises(KeyboardInterrupt):
        tp.save_checkpoint(file, 2, model, optimizer, tp.Grid())
    assert tp.load_checkpoint(file, *small_run(cfg), tp.Grid()) == 1


# ── 3.2 Published weights ───────────────────────────────────────────────────────────────────────────────


def published(folder: Path, shard_size: str = "5GB", **changes):
    """A GPT-2 folder as transformers writes it, with random weights large enough that words differ."""
    import transformers

    sizes = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | changes))).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        torch.nn.init.normal_(p, mean=float(p.ndim == 1 and p.mean() == 1), std=0.3)
    theirs.save_pretrained(folder, max_shard_size=shard_size)  # on the first rank alone, when there are several
    return theirs


@pytest.mark.ranks(1, 2, 4, timeout=120)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_published_gpt2(tmp_path, shard_size):
    """transformers' own GPT-2 against ours at every tp: logits in fp32 and float64, gradients, greedy text."""
    world, rank = dist.get_world_size(), dist.get_rank()
    theirs = published(tmp_path, shard_size)
    dist.barrier()
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    cfg, full = tp.load_gpt2(tmp_path)
    parallel = tp.ParallelGPT(cfg).to(ranks.device).eval()
    parallel.load_state_dict(tp.shard_state_dict(full, cfg, rank, world))
    tokens = batch_of()[0]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):  # fp32 adds in another order
        parallel, theirs = parallel.to(dtype), theirs.to(ranks.device, dtype)
        logits, expected = tp.gather_from_tp(parallel(tokens))[..., :61], theirs(tokens).logits
        assert_equal({"logits": logits}, {"logits": expected}, bound=bound)
    tp.vocab_parallel_cross_entropy(parallel(tokens), tokens, vocab_size=61).sum().backward()
    F.cross_entropy(theirs(tokens).logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    embedding = joined({"embedding.weight": parallel.embedding.weight.grad}, cfg)["embedding.weight"]
    assert_equal({"embedding": embedding}, {"embedding": theirs.transformer.wte.weight.grad})
    expected = theirs.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert torch.equal(tp.generate(parallel, tokens[0, :8], 8), expected)


def test_gpt2_folders_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    published(tmp_path)
    weights, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({key: x for key, x in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc.weight is missing and should be \(32, 128\)"):
        tp.load_gpt2(tmp_path)
    save_file(weights | {name: torch.zeros(128, 32)}, file)
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc.weight is \(128, 32\) and should be \(32, 128\)"):
        tp.load_gpt2(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model-7.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-7.safetensors"):
        tp.load_gpt2(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="a file of weights is damaged"):
        tp.load_gpt2(tmp_path)
    settings_of = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings_of.items() if k != "n_head"}))
    with pytest.raises(ValueError, match="num_heads=0: it must be at least 1"):
        tp.load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings_of | {"activation_function": "relu"}))
    with pytest.raises(ValueError, match="{'activation_function': 'relu'}, which this model cannot be"):
        tp.load_gpt2(tmp_path)


@pytest.mark.ranks(1, 2, 4)
def test_sampled_text_is_the_same_whatever_tp_is():
    """Drawn from whole logits by a generator in the same state; the plain model's own draw, done by hand."""
    cfg = config(init_std=0.5)
    plain, parallel = models(cfg)
    tokens = expected = batch_of()[0][0]
    generator = torch.Generator(ranks.device).manual_seed(5)
    for _ in range(8):
        logits = plain(expected[None, -cfg.seq_length :])[0, -1]
        expected = torch.cat([expected, torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)])
    generator.manual_seed(5)
    assert torch.equal(tp.generate(parallel, tokens, 8, 0.7, generator), expected)


# ── Messages ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2, 4)
def test_messages_of_a_layer():
    """Two all-reduces of B·S·H numbers forward, two backward, and no other message."""
    cfg = config()
    model = on_device(tp.ParallelGPT(cfg))
    x = random(3, 7, 32).requires_grad_()
    for _ in range(2):
        with tp.Counter() as forward:
            y = model.layers[0](x, tp.RandomStreams())
        with tp.Counter() as backward:
            y.sum().backward()
        for counter in (forward, backward):
            assert [(m.op, m.bytes) for m in counter.messages] == [("all_reduce", 3 * 7 * 32 * 8)] * 2


@pytest.mark.ranks(2, 4)
def test_messages_of_the_ends():
    """Embedding and head: one B·S·H each. The loss: B·S for the maximum, 2·B·S for both sums, nothing backward."""
    cfg = config(num_layers=1)
    model = on_device(tp.ParallelGPT(cfg))
    model.layers = nn.ModuleList()
    tokens, targets = batch_of()
    with tp.Counter() as forward:
        logits = model(tokens)
    with tp.Counter() as of_the_loss:
        loss = tp.vocab_parallel_cross_entropy(logits, targets, vocab_size=61)
    with tp.Counter() as backward:
        loss.sum().backward()
    assert [m.bytes for m in forward.messages] == [3 * 13 * 32 * 8]
    assert [m.bytes for m in of_the_loss.messages] == [3 * 13 * 8, 2 * 3 * 13 * 8]
    assert [m.bytes for m in backward.messages] == [3 * 13 * 32 * 8]
    assert {m.op for c in (forward, of_the_loss, backward) for m in c.messages} == {"all_reduce"}


@pytest.mark.ranks(4)
def test_messages_of_a_step_and_their_groups():
    """Over replicas: the token count, one message of all gradients, the loss. Over tp: layers, ends, loss, the norm."""
    cfg, grid = config(), grid_of(2)
    model = on_device(tp.ParallelGPT(cfg, grid.tp_group))
    with tp.Counter() as counter:
        list(tp.train(model, [batch_of()], lambda step: 1e-3, grid))
    over_dp = [m.bytes for m in counter.messages if m.group == grid.dp_group.group_name]
    over_tp = [m.bytes for m in counter.messages if m.group == grid.tp_group.group_name]
    assert over_dp == [8, 8 * sum(p.numel() for p in model.parameters()), 8]
    assert len(over_dp) + len(over_tp) == len(counter.messages)
    assert len(over_tp) == 4 * cfg.num_layers + 2 + 2 + 1 and over_tp[-1] == 8


@pytest.mark.ranks(2, 4)
def test_no_rank_ever_holds_all_logits():
    """No operator makes a tensor whose last dimension is the vocabulary, padded or not."""
    cfg = config()
    model, world = on_device(tp.ParallelGPT(cfg)), dist.get_world_size()
    with Shapes() as shapes:
        model.loss(*batch_of()).sum().backward()
    vocabularies = {61, tp.padded_vocab_size(61, world)}
    assert not [shape for shape in shapes.seen if shape and shape[-1] in vocabularies]
    assert (3, 13, tp.padded_vocab_size(61, world) // world) in shapes.seen


# ── Compilers and narrow types ──────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2, timeout=120)
def test_compiled_model():
    """torch.compile may break the graph at our functions, and must not change a number."""
    cfg = config()
    plain, parallel = models(cfg)
    tokens, targets = batch_of()
    plain.loss(tokens, targets).sum().backward()
    compiled = torch.compile(parallel, backend="aot_eager")
    loss = tp.vocab_parallel_cross_entropy(compiled(tokens), targets, vocab_size=61)
    loss.sum().backward()
    assert_equal(joined(grads_of(parallel), cfg), grads_of(plain))


@pytest.mark.ranks(2)
def test_autocast():
    """bf16 products over fp32 weights: gradients stay fp32, and are the plain model's under the same autocast."""
    cfg = config()
    plain, parallel = tp.GPT(cfg).to(ranks.device), tp.ParallelGPT(cfg).to(ranks.device)
    tokens, targets = batch_of()
    with torch.autocast(ranks.device.type, torch.bfloat16):
        logits = parallel(tokens)
        loss, expected = parallel.loss(tokens, targets), plain.loss(tokens, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.sum().backward()
    expected.sum().backward()
    # bf16 keeps 8 bits: each product is off by up to 0.4 %, and the two summands of a row-parallel layer are rounded
    # before they are added, which the single device does not do.
    assert_equal(joined(grads_of(parallel), cfg), grads_of(plain), bound=0.05)


# ── 4 and 5: schedules and the paper's arithmetic ───────────────────────────────────────────────────────


def test_learning_rate():
    """The GPT-2 recipe: 3,000 steps up to 1.5e-4, a cosine over 297,000 down to 1e-5."""
    rate = lambda step: tp.learning_rate(step, 300_000, 1.5e-4, 3_000, 1e-5)  # noqa: E731
    assert rate(0) == 1.5e-4 / 3_000 and rate(2_999) == 1.5e-4 == rate(3_000)
    assert math.isclose(rate(3_000 + 148_500), (1.5e-4 + 1e-5) / 2) and rate(300_000) == rate(400_000) == 1e-5


@pytest.mark.parametrize("norm_of_shares", [True, False])
def test_clipping_is_pytorchs_on_one_rank(norm_of_shares):
    ours, theirs = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    for model in (ours, theirs):
        for p in model.parameters():
            p.grad = random(*p.shape, seed=p.ndim) * 10
    norm = tp.clip_grad_norm_(ours.parameters(), 1.0, sharded=[ours.weight] if norm_of_shares else [])
    assert_equal({"norm": norm}, {"norm": nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)})
    assert_equal(grads_of(ours), grads_of(theirs))
    assert tp.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0  # nothing has a gradient


def test_parameters_of_the_papers_models():
    """Table 1 to the digit that it prints, table 2's 355M, and the later table of the same team (v2.0, s = 1024)."""
    for name, (hidden, heads, layers, _) in tp.PAPER_MODELS.items():
        assert f"{tp.parameter_count(layers, hidden) / 1e9:.1f}B" == name and hidden // heads == 96
    assert round(tp.parameter_count(24, 1024, 50_257) / 1e6) == 355
    for layers, hidden, billions in ((24, 1920, 1.16), (30, 2304, 2.03), (36, 3072, 4.24), (42, 4096, 8.67)):
        assert round(tp.parameter_count(layers, hidden) / 1e9, 2) == billions


@settings(max_examples=30, deadline=None)
@given(
    vocab=st.integers(1, 50),
    seq=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.integers(1, 4),
    layers=st.integers(1, 3),
)
def test_the_formula_counts_the_plain_model(vocab, seq, heads, size, layers):
    cfg = tp.GPTConfig(vocab, seq, heads * size, layers, heads)
    assert sum(shape.numel() for shape in tp.parameter_shapes(cfg).values()) == tp.parameter_count(
        layers, heads * size, vocab, seq
    )


def test_padded_vocabulary():
    assert tp.padded_vocab_size(50_257, 8, 128) == 51_200 and tp.padded_vocab_size(50_257, 1, 128) == 50_304
    assert tp.padded_vocab_size(51_200, 8, 128) == 51_200 and tp.padded_vocab_size(5, 4) == 8


def test_the_papers_efficiencies():
    """The published 15.1 PFLOP/s is 75.6 % of 512 V100s at 39 TFLOP/s: the abstract's 76 %, not section 5.1's 74 %."""
    assert round(tp.share_of_linear(15.1e15, 512), 2) == 0.76


# ── Planted bugs: what a missing safeguard looks like ───────────────────────────────────────────────────
#
# Each takes one safeguard away and looks as a user would: at the loss, and at gradients beside the single device's.


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss falls; every gradient below the head is one rank's summand",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)
def test_without_copy():
    """copy_to_tp without its backward all-reduce, on the operator and on the tied head."""
    with plant(tp, "copy_to_tp", lambda x, group=None: x.view_as(x)):
        x = random(3, 8).requires_grad_()
        (tp.copy_to_tp(x) * (dist.get_rank() + 1)).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, dist.get_rank() + 1.0))  # should be 1 + 2 on both
        found = beside(config())
    assert_equal({"loss": found.loss}, {"loss": found.expected})
    wrong = assert_differs(found.grads, found.reference)
    assert "final_norm.weight" in wrong and "layers.0.mlp.up.weight" in wrong
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(symptom="gradients of all that lies below such a layer are one rank's summands", seen_in=None)
def test_without_the_column_layers_own_all_reduce():
    def backward(ctx, grad_BSf):
        x_BSH, weight_fH = ctx.saved_tensors
        grad_fH = grad_BSf.flatten(0, -2).mT @ x_BSH.flatten(0, -2)
        return grad_BSf @ weight_fH, grad_fH, grad_BSf.flatten(0, -2).sum(0), None

    with plant(tp._ColumnParallelLinear, "backward", staticmethod(backward)):
        found = beside(config())
    assert_equal({"loss": found.loss}, {"loss": found.expected})
    wrong = assert_differs(found.grads, found.reference)
    # The last layer's feed-forward layer is the only one whose gradient comes through no column-parallel layer.
    assert "layers.1.norm2.weight" in wrong and "layers.0.mlp.down.weight" in wrong
    assert not {"layers.1.mlp.down.weight", "layers.1.mlp.up.weight", "final_norm.weight"} & set(wrong)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="what comes back through a region is tp times too large, beside a residual that is right", seen_in=None
)
def test_copy_in_front_of_a_column_layer():
    """The all-reduce twice: copy_to_tp and the layer's own."""
    right = tp.ColumnParallelLinear.forward
    with plant(tp.ColumnParallelLinear, "forward", lambda self, x: right(self, tp.copy_to_tp(x, self.group))):
        found = beside(config())
        layer, x = on_device(tp.ColumnParallelLinear(8, 12)), random(3, 8).requires_grad_()
        layer(x).sum().backward()
    twice, x.grad = x.grad, None
    layer(x).sum().backward()
    assert_equal({"x": twice}, {"x": 2 * x.grad})
    assert_equal({"loss": found.loss}, {"loss": found.expected})
    assert "layers.0.mlp.down.weight" in assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(symptom="whoever else holds that gradient finds a sum in it", seen_in=None)
def test_a_gradient_summed_in_place():
    """A residual connection around a region: both its branches get the same tensor for a gradient."""

    def in_place(partial_x, group):
        return tp._all_reduce(partial_x, group)

    def gradient():
        x = random(3, 8).requires_grad_()
        y = x + tp.copy_to_tp(x)
        y.backward(random(3, 8, seed=2))
        return {"y": y.detach(), "x": x.grad}

    right = gradient()
    with plant(tp, "_sum", in_place):
        wrong = gradient()
    assert_equal({"x": right["x"]}, {"x": 3 * random(3, 8, seed=2)})  # 1 beside the region, 2 through it
    assert_differs({"x": wrong["x"]}, {"x": right["x"]})
    return Shows(worst_of({"y": wrong["y"]}, {"y": right["y"]}), worst_of({"x": wrong["x"]}, {"x": right["x"]}))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="nothing at the start, where biases are zero; then each row bias counts tp times", seen_in=None
)
def test_row_bias_before_the_reduction():
    def forward(self, x_BSf):
        return tp.reduce_from_tp(F.linear(x_BSf, self.weight, self.bias), self.group)

    torch.manual_seed(3)
    layer, world = on_device(tp.RowParallelLinear(8, 12)), dist.get_world_size()
    x = random(3, 8).chunk(world, -1)[dist.get_rank()]
    right = layer(x)
    with plant(tp.RowParallelLinear, "forward", forward):
        assert_equal({"y": layer(x) - right}, {"y": ((world - 1) * layer.bias).expand(3, 12)})
        at_start = beside(config())
        later = beside(config(), change=lambda name, x: x + 0.1 * random(*x.shape) if name.endswith("bias") else x)
    assert_equal({"loss": at_start.loss, **at_start.grads}, {"loss": at_start.expected, **at_start.reference})
    assert_differs(later.grads, later.reference)
    return later.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="loss and training look well; both ranks hold the same features, so half of the layer is lost", seen_in=None
)
def test_every_shard_from_the_same_seed():
    def same_on_every_rank(name, whole, cfg, rank, world_size):
        return original(name, whole, cfg, 0 if name.endswith(("up.weight", "up.bias")) else rank, world_size)

    cfg = config()
    with plant(tp, "shard_tensor", same_on_every_rank) as original:
        found = beside(cfg)
        up = joined(tp.ParallelGPT(cfg).state_dict(), cfg)["layers.0.mlp.up.weight"]
    assert torch.linalg.matrix_rank(up.double()) == 32 and torch.equal(up[:64], up[64:])
    assert found.shows().loss < 0.05  # nothing to see
    assert "layers.0.mlp.up.weight" in assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="a rank has all queries and half of the keys; the loss starts as it should", seen_in=None
)
def test_queries_keys_and_values_in_thirds():
    """A fused matrix in the order (three, head, D), as GPT-2's files have it, cut where ours is cut."""

    def in_thirds(x, pattern, **sizes):
        return right(x, pattern.replace("(N three D)", "(three N D)"), **sizes)

    with plant(tp, "rearrange", in_thirds) as right:
        found = beside(config())
    assert found.shows().loss < 0.05
    assert "layers.0.attention.qkv.weight" in assert_differs(found.grads, found.reference, at_least=0.1)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="head i and head i + n are dropped together, always; no number looks wrong", seen_in=None
)
def test_the_same_mask_inside_the_region():
    """Only a look at the masks shows it: under them the single device computes the same."""
    found, masks = under_joined_masks(tp.random_streams(7, tp_rank=0, device=ranks.device))  # all believe to be rank 0
    assert all(torch.equal(*pieces) for pieces in masks)
    assert_equal({"loss": found.loss, **found.grads}, {"loss": found.expected, **found.reference})
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="what is whole drifts apart between the ranks of a replica, without an error",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/206",
)
def test_different_masks_outside_the_region():
    cfg, parallel = config(dropout=0.3), models(config(dropout=0.3))[1]
    right = tp.random_streams(0, 0, dist.get_rank(), device=ranks.device)

    def wrong(layer):
        return tp.RandomStreams(outside=right(layer).inside, inside=right(layer).inside)

    for streams, agree in ((right, True), (wrong, False)):
        parallel.zero_grad()
        loss = parallel.loss(*batch_of(), streams)
        loss.sum().backward()
        losses_of, grads = ([torch.empty_like(x) for _ in range(2)] for x in (loss, parallel.final_norm.weight))
        dist.all_gather(losses_of, loss.detach())
        dist.all_gather(grads, parallel.final_norm.weight.grad)
        assert torch.equal(*losses_of)  # the loss is reduced over the ranks, so it is the same number on both
        assert torch.equal(*grads) == agree
    with pytest.raises(ValueError, match="should be the same on every rank, but rank 1's differs"):
        joined(grads_of(parallel), cfg)
    return Shows(loss="the same on both ranks", gradients=worst_of({"norm": grads[1]}, {"norm": grads[0]}))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss is right and falls; gradients belong to other masks than the loss does",
    seen_in="https://github.com/allenai/OLMo-core/issues/828",
)
def test_recomputation_with_fresh_random_numbers():
    found = []
    for recompute in (False, True):
        calls = iter(range(1000))

        def forgetful(layer, calls=calls):
            return tp.random_streams(next(calls), 0, dist.get_rank(), 0, ranks.device)(layer)

        model = on_device(tp.ParallelGPT(config(dropout=0.3), recompute=recompute))
        loss = model.loss(*batch_of(), forgetful)
        loss.sum().backward()
        found.append(({"loss": loss.detach()}, grads_of(model)))
    (expected, reference), (loss, grads) = found
    assert_differs(grads, reference)
    return Shows(loss=worst_of(loss, expected), gradients=worst_of(grads, reference))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="a token is half one rank's and half the other's; the loss stays near log V", seen_in=None
)
def test_ranks_of_a_replica_with_other_tokens():
    """A data loader that counts all ranks, where it should count replicas."""
    found = beside(config(), batch=batch_of(seed=1 + dist.get_rank()))
    assert found.shows().loss < 0.1
    assert_differs(found.grads, found.reference, at_least=0.1)
    return found.shows()


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is too large by log((V + padding) / V), so it changes with tp",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1754",
)
def test_padding_in_the_softmax():
    world, (_, targets), right = dist.get_world_size(), batch_of(), tp.vocab_parallel_cross_entropy
    logits = torch.zeros(3, 13, tp.padded_vocab_size(61, world) // world, dtype=torch.float64, device=ranks.device)
    counted = targets != -100
    for loss, words in ((right(logits, targets, None, 61), 61), (right(logits, targets), logits.shape[-1] * world)):
        assert_equal({"loss": loss[counted]}, {"loss": torch.full_like(loss[counted], math.log(words))})
    with plant(tp, "vocab_parallel_cross_entropy", lambda logits, targets, group, words: right(logits, targets, group)):
        found = beside(config())
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is too large by log(tp), and all ranks but the target's lose their part of the gradient",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)
def test_gathered_logits_in_the_parallel_loss():
    right = tp.vocab_parallel_cross_entropy

    def gathered(logits, targets, group, words):
        return right(tp.gather_from_tp(logits, group), targets, group)

    with plant(tp, "vocab_parallel_cross_entropy", gathered):
        found = beside(config(vocab_size=64))
    counted = found.expected != 0
    gap = (found.loss - found.expected)[counted]
    assert_equal({"loss": gap}, {"loss": torch.full_like(gap, math.log(dist.get_world_size()))})
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(symptom="close to right, until logits grow and their maxima part", seen_in=None)
def test_each_rank_subtracts_its_own_maximum():
    def without_maxima(x, group=None, op=dist.ReduceOp.SUM):
        return x if op == dist.ReduceOp.MAX else right(x, group, op)

    with plant(tp, "_all_reduce", without_maxima) as right:
        found = beside(config())
    assert_differs(found.grads, found.reference)
    return found.shows()


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(symptom="NaN, but only on layouts where a rank holds nothing but padding", seen_in=None)
def test_a_product_with_the_mask():
    """0 · −inf, in place of where(): five words on four ranks leave the last one with padding alone. Backward uses the
    softmax alone, and is right."""
    with plant(torch, "where", lambda mask, x, other: mask * x):
        found = beside(config(vocab_size=5))
        assert beside(config(vocab_size=8)).loss.isfinite().all()
    assert found.loss.isnan().any()
    return Shows(loss="NaN", gradients=found.shows().gradients)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the loss moves in steps of a percent; fp32 runs of the same model differ", seen_in=None
)
def test_exponentials_of_narrow_logits():
    """bf16 logits that are not widened, beside the float64 loss of the same logits."""
    logits, (_, targets) = random(3, 13, 64).bfloat16(), batch_of(vocab=64)
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole.transpose(1, 2), targets, reduction="none")
    expected.sum().backward()
    share = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)

    def found() -> tuple[float, float]:
        mine = logits[..., share].clone().requires_grad_()
        loss = tp.vocab_parallel_cross_entropy(mine, targets)
        loss.sum().backward()
        pairs = (loss.detach(), expected.detach()), (mine.grad, whole.grad[..., share])
        return tuple(worst_of({"x": x.double()}, {"x": y}) for x, y in pairs)

    assert found()[0] < 1e-6
    with plant(torch, "promote_types", lambda a, b: a):
        loss, gradients = found()
    assert loss > 1e-3
    return Shows(loss, gradients)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the norm is too large, so clipping bites too early and training is slower; the loss still falls",
    seen_in="https://github.com/NVIDIA-NeMo/RL/issues/3788",
)
def test_norm_that_counts_replicated_parameters_tp_times():
    """The gradients shown are those after clipping to a hundredth of the norm."""
    cfg, world = config(), dist.get_world_size()
    plain, parallel = models(cfg)
    loss, expected = (model.loss(*batch_of()).sum() for model in (parallel, plain))
    loss.backward()
    expected.backward()
    right = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    assert_equal({"n": tp.clip_grad_norm_(parallel.parameters(), 1e9, parallel.sharded_parameters())}, {"n": right})
    replicated = sum(p.grad.square().sum() for n, p in plain.named_parameters() if tp.shard_dim(n) is None)
    nn.utils.clip_grad_norm_(plain.parameters(), right.item() / 100)
    wrong = tp.clip_grad_norm_(parallel.parameters(), right.item() / 100, sharded=parallel.parameters())
    assert_equal(
        {"n": wrong.square() - right.square()}, {"n": (world - 1) * replicated}, bound=1e-9
    )  # a difference of squares
    assert wrong > 1.01 * right
    return Beside(loss, joined(grads_of(parallel), cfg), expected, grads_of(plain)).shows()


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="loss and gradients weigh tokens by how few their replica has; close to right, and never exact",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_mean_of_means_over_replicas():
    cfg, grid = config(), grid_of(2)
    plain, parallel = models(cfg, grid.tp_group)
    tokens, targets = batch_of(rows=4)
    expected = plain.loss(tokens, targets).sum() / (targets != -100).sum()
    expected.backward()
    mine = [whole.tensor_split(2)[grid.dp_rank] for whole in (tokens, targets)]
    loss = parallel.loss(*mine).sum() / (mine[1] != -100).sum() / 2  # the replica's own count
    loss.backward()
    tp.sum_gradients(parallel.parameters(), grid.dp_group)
    loss = loss.detach()
    dist.all_reduce(loss, group=grid.dp_group)
    found = Beside(loss, joined(grads_of(parallel), cfg, grid.tp_group), expected, grads_of(plain))
    assert found.shows().loss < 0.05  # looks well
    assert_differs(found.grads, found.reference, at_least=0.01)
    return found.shows()


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(4)
def test_sizes_that_do_not_divide_are_refused_on_every_rank():
    sizes = "num_heads=6 and ffn_hidden_size=144 do not both divide over tp=4 ranks"
    with pytest.raises(ValueError, match=rf"{sizes}: choose tp from \[1, 2, 3\]"):
        tp.ParallelGPT(config(hidden_size=36, num_heads=6))
    with pytest.raises(ValueError, match="out_features=10 does not divide over 4 ranks"):
        tp.ColumnParallelLinear(4, 10)
    with pytest.raises(ValueError, match="in_features=10 does not divide over 4 ranks"):
        tp.RowParallelLinear(10, 4)
    with pytest.raises(ValueError, match="the last dimension=10 does not divide over 4 ranks"):
        tp.scatter_to_tp(torch.zeros(2, 10))
    with pytest.raises(ValueError, match="needs streams=random_streams"):
        tp.ParallelGPT(config(dropout=0.1))(batch_of()[0].cpu())


@pytest.mark.ranks(1, 2)
def test_tokens_and_targets_outside_the_vocabulary_are_refused_on_every_rank():
    model = tp.ParallelGPT(config())
    tokens, targets = (x.cpu() for x in batch_of())
    for bad in (61, -1):
        with pytest.raises(ValueError, match=r"is no word in \[0, 61\)"):
            model(torch.full_like(tokens, bad))
    with pytest.raises(ValueError, match=r"target 61 is neither a word in \[0, 61\) nor ignore_index=-100"):
        tp.vocab_parallel_cross_entropy(torch.zeros(3, 13, 64), torch.full_like(targets, 61), vocab_size=61)
    with pytest.raises(ValueError, match="a sequence of 17 tokens, but the model has 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="all dimensions but the last must agree"):
        tp.vocab_parallel_cross_entropy(torch.zeros(2, 5, 8), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not fit"):
        tp.vocab_parallel_cross_entropy(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64), vocab_size=99)


def test_configurations_that_contradict_themselves_are_refused():
    with pytest.raises(
        ValueError, match="hidden_size=30 does not divide into num_heads=4: choose a multiple, such as 32"
    ):
        config(hidden_size=30)
    with pytest.raises(ValueError, match="num_layers=0"):
        config(num_layers=0)
    with pytest.raises(ValueError, match="norm='middle'"):
        config(norm="middle")
    with pytest.raises(ValueError, match="dropout=1.5"):
        config(dropout=1.5)
    with pytest.raises(ValueError, match="dropout probability 1"):
        tp.dropout(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="tied_head=False: the head of this model is its embedding table"):
        tp.ParallelGPT(config(tied_head=False))


def test_state_dicts_that_do_not_fit_are_refused_by_name():
    cfg = config()
    full = dict(tp.initial_weights(cfg))
    cases = {
        r"final_norm.weight is missing and should be \(32,\)": {
            n: x for n, x in full.items() if n != "final_norm.weight"
        },
        r"head.weight is \(1,\) and should be left out": full | {"head.weight": torch.zeros(1)},
        r"positions.weight is \(4, 32\) and should be \(16, 32\)": full | {"positions.weight": torch.zeros(4, 32)},
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            tp.shard_state_dict(state, cfg, 0, 2)


def test_a_tokenizer_that_cannot_be_downloaded(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no network")

    with pytest.raises(ValueError, match="tokenizer 'gpt5000' is unknown; use bytes or one of"):
        tp.tokenizer("gpt5000")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="'gpt2' is not on this machine and cannot be downloaded"):
        tp.tokenizer("gpt2")


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("x" * 200)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in (("empty", "has 0 tokens"), ("short", "has 200 tokens"), ("latin", "byte 3 is 0xe9")):
        with pytest.raises(ValueError, match=message):
            tp.TextData(str(tmp_path / name), "bytes", 128)
    with pytest.raises(FileNotFoundError):
        tp.TextData(str(tmp_path / "nowhere"), "bytes", 128)


def test_the_last_tenth_of_a_text_is_held_out(tmp_path):
    """Nine tenths to train on; windows reach the very end of their part, and a part one token too short is refused."""
    (tmp_path / "text").write_text("a" * 900 + "b" * 100)
    data = tp.TextData(str(tmp_path / "text"), "bytes", 99)
    trained, held_out = data.batch(0, 50, 0), data.batch(0, 3, 0, held_out=True)
    assert {int(x) for x in torch.cat(trained).unique()} == {ord("a")}
    assert {int(x) for x in torch.cat(held_out).unique()} == {ord("b")}  # 100 tokens: one window of 99 and its target
    with pytest.raises(ValueError, match="longer than a sequence of 100"):
        tp.TextData(str(tmp_path / "text"), "bytes", 100)
    seen = torch.cat([tp.TextData("", "bytes", 8).batch(0, 4, seed)[0] for seed in (0, 1)])
    assert not torch.equal(seen[:4], seen[4:])


def test_a_claim_that_fails_is_seen(capsys):
    """FAILED in the table, False to the caller; NaN is no success."""
    good = [("a", "1", "1", True), ("b", "2", "–", "needs 8 GPUs")]
    assert tp.print_claims(good) and not tp.print_claims([*good, ("c", "3", "4", False)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["c", "3", "4", "FAILED"] and "needs 8 GPUs" in lines[-2] and "ok" in lines[-3]
    assert tp.within([1e-12, 1e-11], 1e-10) == (1e-11, True) and not tp.within([1e-9, 1e-12], 1e-10)[1]
    worst, passed = tp.within([1e-12, math.nan, 1e-13], 1e-10)
    assert math.isnan(worst) and not passed


@pytest.mark.ranks(2)
def test_the_counter():
    """Collectives and messages from rank to rank, with bytes and group; a barrier carries nothing."""
    other, x = 1 - dist.get_rank(), torch.ones(4, device=ranks.device)
    with tp.Counter() as counter:
        dist.barrier()
        dist.all_reduce(x)
        dist.all_gather([torch.empty_like(x) for _ in range(2)], x)
        sends = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty_like(x), other)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
    found = [(message.op, message.bytes) for message in counter.messages]
    assert found[:2] == [("all_reduce", 16), ("all_gather", 32)]
    assert sorted(found[2:]) == [("recv", 16), ("send", 16)]
    assert {message.group for message in counter.messages} == {dist.group.WORLD.group_name}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_chapters_own_check(degree):
    """What the demonstration calls equivalence covers every tensor, and sees a bug."""
    grid = grid_of(degree)
    errors = tp.equivalence(grid, ranks.device, torch.float64)
    if grid.tp_rank == 0:  # where whole tensors are put together
        names = tp.parameter_shapes(tp.GPTConfig(num_layers=2))
        assert {f"{kind} {name}" for kind in ("gradient of", "after AdamW") for name in names} < errors.keys()
        assert all(error <= 1e-10 for error in errors.values())
    if degree > 1:
        once = tp.copy_to_tp
        with plant(tp, "copy_to_tp", lambda x, group=None: once(once(x, group), group)):
            errors = tp.equivalence(grid, ranks.device, torch.float64)
        assert grid.tp_rank or max(errors.values()) > 1e-3


def test_text_batches_are_a_function_of_seed_and_step():
    data = tp.TextData("", "bytes", 16)
    tokens, targets = data.batch(3, 5, seed=1)
    assert tokens.shape == targets.shape == (5, 16) and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, data.batch(3, 5, seed=1)[0]) and not torch.equal(tokens, data.batch(4, 5, seed=1)[0])
    text = "ünïcode ✓ 1"
    assert data.encoding.decode(data.encoding.encode(text)) == text and data.encoding.n_vocab == 256


# ── Whole scripts ───────────────────────────────────────────────────────────────────────────────────────


def run(*flags, **options):
    return scripts.run(SCRIPT, *flags, **options)


TINY = ["--steps", "3", "--num-layers", "1", "--hidden-size", "32", "--seq-length", "32"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tp", "3"], "--tp 3 must divide the 4 ranks"),
        (
            ["--tp", "4", "--num-heads", "2"],
            "num_heads=2 and ffn_hidden_size=512 do not both divide over tp=4 ranks: choose tp from [1, 2]",
        ),
        (["--ranks", "0"], "at least 1"),
        (["--hidden-size", "30"], "choose a multiple"),
        (["--tokenizer", "gpt5000"], "tokenizer 'gpt5000' is unknown"),
        (["--data", "/nowhere/at/all"], "No such file"),
        (["--device", "cuda", "--ranks", "2"], "use --device cpu"),
        (["--backend", "nccl"], "use --device cpu"),
        (["--steps", "-1"], "--steps -1"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--seed", str(2**70)], "the seed below 2**63"),
        (["--trace", "/nowhere/trace.json"], "its folder does not exist"),
        (["--checkpoint", "/nowhere/run"], "its folder does not exist"),
        (["--checkpoint", "."], "--checkpoint .: is a folder"),
        (["--batch", "0"], "--batch 0"),
        (["--lr", "nan"], "--lr nan above zero"),
        (["--ranks", "1", "--tp", "4"], "--tp 4 must divide the 1 ranks"),
        (["--gpt2", "folder", "--num-layers", "3"], "folder/config.json: leave out --num-layers"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, monkeypatch, capsys):
    refused(flags, message, monkeypatch, capsys)


def refused(flags, message, monkeypatch, capsys) -> None:
    """What the script calls first, in this process, as on a machine without GPUs."""
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")  # which the flags would set, and leave behind
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *flags])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        tp.flags()
    usage, error = capsys.readouterr().err.splitlines()
    assert message in error and usage.startswith("usage:")


def test_a_wrong_flag_ends_the_script_before_any_rank_starts():
    result = run("--tp", "3")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2 and not result.stdout


@pytest.mark.parametrize("limit, compared", [(10**6, 2), (10, 0)])
def test_a_large_model_is_not_trained_beside(limit, compared, monkeypatch, capsys):
    """The plain model is built up to a size that is said; above it the run goes on without, and says so."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *TINY, "--steps", "2", "--ranks", "1"])
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with plant(tp, "BESIDE", limit):
        differences = tp.demonstrate(tp.flags(), tp.Grid(), torch.device("cpu"))
    assert len(differences) == compared and all(gap < 1e-4 for gap in differences)
    assert ("trained beside it: too large, above 10" in capsys.readouterr().out) == (not compared)


def losses(text: str) -> list[str]:
    """The printed losses, digit for digit."""
    return [line.split()[1] for line in text.splitlines() if line[:4].strip().isdigit()]


CHECK = ["--check", "--dtype", "fp64", "--tp", "2"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """`--check` on two ranks, with a trace: started as the README does first."""
    trace = tmp_path_factory.mktemp("checked") / "trace.json"
    return run(*CHECK, "--ranks", "2", "--trace", str(trace)), trace


@pytest.mark.slow
def test_check_proves_and_says_so(checked):
    result, trace = checked
    assert result.returncode == 0 and "bound 1e-10; tp 2 × dp 1, fp64" in result.stdout, result.stderr
    names = tp.parameter_shapes(tp.GPTConfig(num_layers=2))
    assert all(f"{kind} {name} " in result.stdout for kind in ("gradient of", "after AdamW") for name in names)
    assert any(event["name"].startswith("gloo:all_reduce") for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.slow
def test_three_ways_to_start_give_the_same_numbers(checked):
    """python, torchrun, and two torchrun agents on the loopback as two nodes: every error, digit for digit."""
    torchrun = ["-m", "torch.distributed.run"]
    joined_world = run(*CHECK, launcher=[*torchrun, "--standalone", "--nproc-per-node=2"])
    with __import__("socket").socket() as probe:  # a free port for the rendezvous
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d", "--rdzv-id=1", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nnodes=2", "--nproc-per-node=1", *rendezvous, str(SCRIPT), *CHECK]
    with scripts.started(*command) as first, scripts.started(*command) as second:
        outputs = [node.communicate(timeout=120) for node in (first, second)]
        assert [node.returncode for node in (first, second)] == [0, 0], outputs
    expected = checked[0].stdout
    assert expected and joined_world.stdout == expected
    assert "".join(out for out, _ in outputs) == expected


@pytest.mark.slow
def test_a_run_with_dropout_and_its_checkpoint(tmp_path):
    """--data with odd letters in its name, --dropout, --recompute; the checkpoint on another number of ranks."""
    text = tmp_path / "größe x.txt"
    text.write_text("To be, or not to be, that is the question. " * 100, "utf-8")
    options = ["--data", str(text), "--dropout", "0.1", "--recompute", "--checkpoint", str(tmp_path / "run")]
    result = run(*TINY, *options, "--ranks", "2")
    assert result.returncode == 0, result.stderr
    again = run(*TINY, *options, "--ranks", "1")  # goes on from the end, at which nothing is left to do
    assert again.returncode == 0 and "1 ranks: tp 1 × dp 1" in again.stdout, again.stderr
    assert len(losses(result.stdout)) == 3 and not losses(again.stdout)
    first, second = (float(held_out(stdout)[0].split()[2]) for stdout in (result.stdout, again.stdout))
    assert abs(first - second) < 1e-3  # fp32, and its sums in another order
    assert "it would draw other masks" in result.stdout and "needs a single device beside" in result.stdout


def held_out(text: str) -> list[str]:
    """The held-out loss, and what the model writes."""
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("held-out"))
    return lines[begin : begin + 2]


@pytest.mark.slow
def test_published_weights_train_and_write(tmp_path):
    """--gpt2 on a folder as transformers writes it."""
    published(tmp_path, vocab_size=256, n_positions=32)
    result = run("--gpt2", str(tmp_path), "--steps", "2", "--ranks", "2", "--lr", "1e-4")
    assert result.returncode == 0 and len(losses(result.stdout)) == 2, result.stderr
    assert "no single-device model is trained beside it" in result.stdout


def test_a_tokenizer_with_more_words_than_the_published_model_is_refused(tmp_path, monkeypatch, capsys):
    published(tmp_path, vocab_size=61)
    capsys.readouterr()
    refused(["--gpt2", str(tmp_path)], "knows 61 words, --tokenizer bytes has 256", monkeypatch, capsys)


def ranks_of(parent: int) -> list[int]:
    """The process numbers of a torchrun's ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_rank_ends_the_run_and_is_named_last():
    with scripts.started(str(SCRIPT), *TINY, "--ranks", "2", "--steps", "100000") as process:
        for line in process.stdout:
            if line.startswith("   4"):  # it trains
                break
        victims = ranks_of(process.pid)
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    last = errors[errors.rindex("Root Cause") :]
    assert "rank      : 1" in last and "SIGKILL" in last
    assert not any(alive(pid) for pid in [process.pid, *victims])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_an_exception_in_one_rank_ends_the_run_and_is_shown_last(tmp_path):
    """A copy of the script in which rank 1 raises in a step of training, behind the five that equivalence takes."""
    bad, right = tmp_path / "bad.py", "        optimizer.zero_grad()\n"
    wrong = "        if dist.get_rank() == 1 and step == 8:\n"
    wrong += "            raise ArithmeticError('the ninth step of rank 1')\n"
    head, tail = SCRIPT.read_text("utf-8").split("def train(", 1)
    assert right in tail
    bad.write_text(head + "def train(" + tail.replace(right, wrong + right, 1), "utf-8")
    with scripts.started(str(bad), *TINY, "--ranks", "2", "--steps", "9") as process:
        seen = set()
        while process.poll() is None and len(seen) < 2:
            seen |= set(ranks_of(process.pid))
            time.sleep(0.2)
        _, errors = process.communicate(timeout=60)
    last = errors[errors.rindex("Root Cause") :]
    assert process.returncode != 0 and "rank      : 1" in last and "ArithmeticError: the ninth step of rank 1" in last
    assert not any(alive(pid) for pid in seen)
