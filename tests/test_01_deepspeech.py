# SPDX-License-Identifier: MIT-0
"""Chapter 1 equals the single device: ring, BatchNorm, loss, network, the cut in time, training.

A test marked `ranks` is what every rank of that world executes. References are the plain model,
PyTorch's own functions, or a sum over everything that is possible.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import math
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import deepspeech as ds
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from torch import nn
from utterances import small_batch

SCRIPT = Path(ds.__file__)


EVERY_WORLD = pytest.mark.ranks(1, 2, 3, 4)


# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> ds.DeepSpeechConfig:
    convolutions = ((3, (5, 5), (2, 2)), (4, (3, 3), (1, 2)))
    sizes = dict(num_bins=12, convolutions=convolutions, num_layers=2, hidden_size=10)
    return ds.DeepSpeechConfig(**(sizes | changes))


def random(*shape, seed=1):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(ranks.device)


@lru_cache
def ring_group() -> dist.ProcessGroup:
    return ds.make_group([list(range(dist.get_world_size()))], ranks.device, 60.0)


def batch_of(utterances=7, cfg=None, seed=1) -> ds.Batch:
    return small_batch(utterances, cfg or config(), seed).to(ranks.device, torch.float64)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


def models(cfg=None, build=ds.DeepSpeech2, parallel=ds.parallel_model):
    """The plain model, and the one that shares its statistics with all ranks."""
    nets = build(cfg or config()), parallel(cfg or config())
    return tuple(net.to(ranks.device, torch.float64) for net in nets)


class NoNorm(nn.Module):
    """In place of a BatchNorm."""

    def __init__(self, size: int):
        super().__init__()

    def forward(self, x, valid):
        return torch.where(valid[..., None], x, 0)


def models_without_norm():
    return models(
        build=lambda cfg: ds.DeepSpeech2(cfg, NoNorm),
        parallel=lambda cfg: ds.DeepSpeech2(cfg, NoNorm, ds.clipped_recurrence),
    )


def trained(plain, parallel, batches, make=None, max_norm=1e9):
    """Steps on a single device and on these ranks."""
    make = make or partial(ds.make_optimizer, lr=0.01)
    alone = ds.train_alone(plain, make(plain), batches, max_norm)
    own = [mine(batch) for batch in batches]
    together = ds.train(parallel, make(parallel), own, None, ring_group(), max_norm)
    return zip(alone, together, strict=True)


def loss_of(model, batch, loss=ds.ctc_loss):
    log_probs, frames = model(batch.features_BTF, batch.frames_B)
    return loss(log_probs, batch.labels_BU, frames, batch.sizes_B)


def mine(batch: ds.Batch) -> ds.Batch:
    """This rank's utterances, dealt out in turn."""
    return batch.rows(range(dist.get_rank(), len(batch.frames_B), dist.get_world_size()))


# ── 1.2 The ring ──────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("K", [0, 1, 2, 3, 7, 1001])
def test_ring(K):
    """The sum in the documented order, to the bit, and the same on every rank; 2·K·(N − 1) elements
    in all."""
    N, r = dist.get_world_size(), dist.get_rank()
    every = [random(K, seed=10 + n) for n in range(N)]
    x = every[r].clone()
    with ds.Counter() as counter:
        assert ds.ring_all_reduce(x) is x
    expected = []
    for s, segments in enumerate(zip(*(y.tensor_split(N) for y in every))):
        total = segments[s].clone()
        for n in range(1, N):
            total += segments[(s + n) % N]
        expected.append(total)
    assert torch.equal(x, torch.cat(expected))
    copies = [None] * N
    dist.all_gather_object(copies, x.cpu())
    assert all(torch.equal(copy, copies[0]) for copy in copies)
    sent = torch.tensor(sum(m.bytes for m in counter.messages if m.op == "send") // 8)
    dist.all_reduce(sent)
    assert sent == 2 * K * (N - 1)
    assert {m.op for m in counter.messages} <= {"send", "recv_", "recv"}


@pytest.mark.ranks(3)
def test_ring_of_odd_tensors():
    """Not contiguous, whole numbers, a parameter, no dimension, a group of some ranks."""
    world = dist.get_world_size()
    x = torch.arange(12).reshape(3, 4).to(ranks.device)
    assert torch.equal(ds.ring_all_reduce(x.clone().T), world * x.T)
    y = nn.Parameter(x.double())
    ds.ring_all_reduce(y)
    assert torch.equal(y, world * x.double())
    assert ds.ring_all_reduce(torch.tensor(5.0, device=ranks.device)) == 15
    group = dist.new_group([0, 2])
    if dist.get_rank() != 1:
        assert torch.equal(ds.ring_all_reduce(x.clone(), group), 2 * x)


# ── 1.3 Data parallelism ──────────────────────────────────────────────────────────────────────────


OPTIMIZERS = {
    "nesterov": partial(ds.make_optimizer, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.99)),
}


def adamw_or_nesterov(kind: str):
    make = OPTIMIZERS[kind]
    return make if kind == "nesterov" else lambda model: make(model.parameters())


def five_steps(plain, parallel, kind: str, batches: list) -> None:
    """Losses, norms, gradients, weights and running averages; the rate changes every step."""
    steps = 0
    for (expected, norm), (loss, norm_here) in trained(
        plain, parallel, batches, adamw_or_nesterov(kind), max_norm=0.5
    ):
        assert norm > 0.5, "nothing was clipped"
        yielded = (expected, norm, loss, norm_here)
        assert not any(x.requires_grad for x in yielded)
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
        assert_equal(grads_of(parallel), grads_of(plain))
        steps += 1
    assert steps == 5
    state = {name: x for name, x in plain.state_dict().items() if x.is_floating_point()}
    here = {name: parallel.state_dict()[name] for name in state}
    assert_equal(here, state, floor=0.05 if kind == "adamw" else 0.0)  # 5 steps of 0.01
    ds.check_replicas(parallel)


@EVERY_WORLD
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("norm", [True, False])
def test_five_steps(kind, norm):
    """Seven utterances of unequal length over the ranks."""
    plain, parallel = models() if norm else models_without_norm()
    five_steps(plain, parallel, kind, [batch_of(7, seed=seed) for seed in range(5)])


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "frozen", ["out", "convolutions", "layers.0", "layers.1.weight", "norms", "full"]
)
def test_frozen_parameters(frozen):
    """What learns is a choice of the user: the rest as on a single device, frozen ones as
    before."""
    plain, parallel = models()
    for model in (plain, parallel):
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
    before = {name: p.clone() for name, p in parallel.named_parameters()}
    for (expected, norm), (loss, norm_here) in trained(plain, parallel, [batch_of(7)] * 2):
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    learned = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert 0 < len(learned) < len(before)
    assert_equal({name: parallel.get_parameter(name) for name in learned}, learned)
    for name in before.keys() - learned.keys():
        assert torch.equal(parallel.get_parameter(name), before[name])


def test_nesterov_written_out():
    """Three steps with a rate that changes: v = μ v + g, p −= lr (g + μ v), with clipped g."""
    model, reference = models(), models()[0]
    model, rates, velocity = model[0], [0.02, 0.01, 0.03], {}
    optimizer = ds.make_optimizer(model, lr=1.0)
    batches = [batch_of(5, seed=seed) for seed in range(3)]
    steps = ds.train_alone(model, optimizer, batches, max_norm=0.5)
    for rate, batch in zip(rates, batches):
        optimizer.param_groups[0]["lr"] = rate
        loss, norm = next(steps)
        reference.zero_grad()
        expected = loss_of(reference, batch, F.ctc_loss)
        expected.backward()
        total = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt()
        assert_equal({"loss": loss, "norm": norm}, {"loss": expected, "norm": total})
        with torch.no_grad():
            for name, p in reference.named_parameters():
                grad = p.grad * min(1.0, 0.5 / (total + 1e-6))
                velocity[name] = 0.9 * velocity.get(name, 0) + grad
                p -= rate * (grad + 0.9 * velocity[name])
    assert_equal(dict(model.named_parameters()), dict(reference.named_parameters()))


@pytest.mark.ranks(4)
def test_two_groups_next_to_each_other():
    """Each pair of ranks trains by itself: counts, statistics and gradients stay in the group."""
    rank = dist.get_rank()
    pairs = [[0, 1], [2, 3]]
    group, for_ring = (ds.make_group(pairs, ranks.device, 60.0) for _ in range(2))
    batch = batch_of(3 + 2 * (rank // 2), seed=rank // 2)
    plain, parallel = models(parallel=lambda cfg: ds.parallel_model(cfg, group))
    own = batch.rows(range(rank % 2, len(batch.frames_B), 2))
    make = partial(ds.make_optimizer, lr=0.01)
    ((expected, norm),) = ds.train_alone(plain, make(plain), [batch])
    ((loss, norm_here),) = ds.train(parallel, make(parallel), [own], group, for_ring)
    assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    assert_equal(grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(2)
def test_collectives_get_contiguous_tensors():
    """gloo accepts others, NCCL does not: transposed input, and a whole training step."""
    original, seen = dist.all_reduce, []

    def strict(x, *args, **options):
        assert x.is_contiguous(), "NCCL refuses it"
        seen.append(x.shape)
        return original(x, *args, **options)

    with plant(dist, "all_reduce", strict):
        x = random(3, 5).T.requires_grad_()
        y = ds.sum_over_ranks(x)
        y.backward(random(3, 5, seed=2).T)
        model = models()[1].to(memory_format=torch.channels_last)
        ring = ds.GradientRing(model.parameters(), ring_group())
        ds.parallel_gradients(model, mine(batch_of(7)), ring)
        ring.close()
        ds.check_replicas(model)
        time_parallel_case(8)
    assert_equal({"y": y}, {"y": 2 * random(3, 5).T})
    assert len(seen) > 30


def test_the_thread_of_a_ring_ends():
    """A training leaves neither a thread nor hooks."""
    model = models()[1]
    ring = ds.GradientRing(model.parameters())
    ring.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        ring.thread.submit(print)


def test_dropout_before_every_layer_and_not_in_evaluation():
    """Of each recurrent layer and the full one; evaluation at p = 0.5 is evaluation at p = 0."""
    model, without = models(config(dropout=0.5))[1], models()[1]
    batch, calls, original = batch_of(), [], F.dropout

    def counted(x, p=0.5, training=True, inplace=False):
        calls.append((p, training))
        return original(x, p, training, inplace)

    with plant(F, "dropout", counted):
        model(batch.features_BTF, batch.frames_B)
        assert calls == [(0.5, True)] * 3
    outputs = [net.eval()(batch.features_BTF, batch.frames_B)[0] for net in (model, without)]
    fresh = models(config(dropout=0.5))[1].eval()(batch.features_BTF, batch.frames_B)[0]
    assert_equal({"y": fresh}, {"y": models()[1].eval()(batch.features_BTF, batch.frames_B)[0]})
    assert outputs[0].shape == outputs[1].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [0, 1])
def test_a_network_in_half_precision(dtype, which):
    """It runs, forward and backward, with statistics in fp32: outputs and loss near fp32's."""
    model = models()[which].to(dtype)
    reference = models()[which].to(torch.float32)
    batch, losses = batch_of(), []
    for net, features in ((model, batch.features_BTF.to(dtype)), (reference, batch.features_BTF)):
        log_probs, frames = net(features.to(next(net.parameters()).dtype), batch.frames_B)
        assert log_probs.dtype == torch.float32
        loss = ds.ctc_loss(log_probs, batch.labels_BU, frames, batch.sizes_B)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.ranks(2, 4)
def test_a_rank_without_an_utterance():
    """A batch smaller than the ranks leaves some with nothing; they take part in every sum, and
    step alike."""
    plain, parallel = models()
    ((expected, norm), (loss, norm_here)), *_ = trained(plain, parallel, [batch_of(7).rows([5])])
    assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    assert_equal(grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(2)
def test_buckets_leave_while_backward_runs():
    """The first bucket is on its way before the first layer has its gradient; in a fixed order;
    nothing twice."""
    cfg = config()
    model = models(cfg)[1]
    ring = ds.GradientRing(model.parameters(), ring_group(), bucket_bytes=500)
    names = {id(p): name for name, p in model.named_parameters()}
    order, sent, expected = [], [], [[names[id(p)] for p in bucket] for bucket in ring.buckets]
    assert len(expected) > 4 and sorted(itertools.chain(*expected)) == sorted(names.values())
    original = ring._sum
    ring._sum = lambda bucket: (
        sent.append([names[id(p)] for p in bucket]),
        order.append("sent"),
        original(bucket),
    )
    ring_last = model.convolutions[0].weight.register_post_accumulate_grad_hook(
        lambda p: order.append("last gradient")
    )
    for _ in range(2):
        del order[:], sent[:]
        model.zero_grad()
        loss_of(model, mine(batch_of(7, cfg))).backward()
        deadline = time.monotonic() + 10
        while "sent" not in order and time.monotonic() < deadline:
            time.sleep(0.01)
        ring.finish()
        assert sent == expected and ring.jobs == []
        assert ring.thread._max_workers == 1
    assert order.index("sent") < order.index("last gradient") or order[0] == "sent"
    ring_last.remove()
    ring.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("failed", ["backward", "sum"])
def test_a_step_after_one_that_failed(failed):
    """finish() forgets the failed step, and the next one's gradients are all summed."""
    N, r = dist.get_world_size(), dist.get_rank()
    net = nn.ParameterDict({name: random(4, 4, seed=seed) for seed, name in enumerate("ab")})
    x = random(N, 3, 4, seed=5)
    ring = ds.GradientRing(net.values(), ring_group(), bucket_bytes=1)

    def fail(*args):
        raise RuntimeError("broken")

    hidden = x[r] @ net["a"]
    if failed == "backward":
        hidden.register_hook(fail)  # the gradient of "b" is there by then
    broken = fail if failed == "sum" else ds.GradientRing._sum
    with plant(ds.GradientRing, "_sum", broken):
        with pytest.raises(RuntimeError, match="broken"):
            (hidden @ net["b"]).square().sum().backward()
            ring.finish()
        if failed == "backward":
            ring.finish()
    for mine_alone in (True, False):
        net.zero_grad()
        rows = x[r] if mine_alone else x
        (rows @ net["a"] @ net["b"]).square().sum().backward()
        if mine_alone:
            ring.finish()
            ring.close()
            found = {name: p.grad.clone() for name, p in net.items()}
    assert_equal(found, grads_of(net))


@pytest.mark.ranks(2)
def test_a_parameter_that_is_listed_twice():
    """Its gradient is summed once."""
    p = nn.Parameter(torch.ones(3, device=ranks.device))
    ring = ds.GradientRing([p, p], ring_group(), bucket_bytes=1)
    p.sum().backward()
    ring.finish()
    ring.close()
    assert torch.equal(p.grad, 2 * torch.ones_like(p))


@pytest.mark.ranks(2)
def test_messages_of_a_step():
    """In the ring's group the gradients, 2·K·(N − 1)/N elements a rank; in the other BatchNorm's
    sums and scalars."""
    cfg = config()
    model = models(cfg)[1]
    ring = ds.GradientRing(model.parameters(), ring_group())
    sent, exchange = [], ds._exchange

    def watched(receives, sends, group):
        sent.extend((x.nbytes, group) for x, _ in sends)
        return exchange(receives, sends, group)

    with (
        plant(ds, "_exchange", watched),
        ds.Counter() as counter,
    ):  # the ring's thread is not this one: it is watched
        ds.parallel_gradients(model, mine(batch_of(7, cfg)), ring=ring)
    ring.close()
    K = sum(p.numel() for p in model.parameters())
    assert sum(size for size, _ in sent) == K * 8 and {group for _, group in sent} == {ring_group()}
    features = [
        3,
        4,
        10,
        10,
        10,
    ]  # of each BatchNorm: forward H + 1 and H numbers, backward the same in reverse
    forward = [8 * n for H in features for n in (H + 1, H)]
    assert [m.bytes for m in counter.messages if m.op == "all_reduce"] == [
        8,
        *forward,
        *forward[::-1],
        8,
    ]


# ── 1.4 BatchNorm over the frames of all ranks ────────────────────────────────────────────────────


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_padding_that_is_not_finite(value, training):
    """It reaches neither outputs nor gradients."""
    valid, norm = torch.tensor([[True, True, False]]), ds.SequenceBatchNorm(2).train(training)
    found = []
    for padding in (0.0, value):
        x = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [padding, padding]]], requires_grad=True)
        norm.zero_grad()
        y = norm(x, valid)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, norm.weight.grad, norm.bias.grad])
    assert all(map(torch.equal, *found))


@EVERY_WORLD
def test_sequence_batch_norm():
    """Compared with nn.BatchNorm1d on all valid frames of all ranks: outputs, every gradient,
    running averages, then eval."""
    N, r = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    plain, ours = nn.BatchNorm1d(5).double(), ds.SequenceBatchNorm(5).double()
    for p in plain.parameters():
        nn.init.normal_(p, 1.0)
    ours.load_state_dict(plain.state_dict())
    plain, ours = plain.to(ranks.device), ours.to(ranks.device)
    every = [(random(6, 3, 5, seed=n) + n) for n in range(N)]
    valid = [ds.valid_frames(torch.tensor([6, 2, n % 4], device=ranks.device), 6) for n in range(N)]
    for _ in range(2):
        rows = torch.cat([x[v] for x, v in zip(every, valid)]).requires_grad_()
        x = torch.where(valid[r][..., None], every[r], 1e6).requires_grad_()  # padding is garbage
        expected, y = plain(rows), ours(x, valid[r])
        upstream = random(*rows.shape, seed=9)
        expected.backward(upstream)
        counts = [int(v.sum()) for v in valid]
        own = slice(sum(counts[:r]), sum(counts[: r + 1]))
        full = torch.full_like(every[r], 3.0).index_put((valid[r],), upstream[own])
        y.backward(full)
        assert not y[~valid[r]].any() and not x.grad[~valid[r]].any()
        assert_equal(
            {"y": y[valid[r]], "x": x.grad[valid[r]]}, {"y": expected[own], "x": rows.grad[own]}
        )
        for p in ours.parameters():
            dist.all_reduce(p.grad)
        assert_equal(grads_of(ours), grads_of(plain))
        plain.zero_grad(), ours.zero_grad()
    for name, buffer in plain.named_buffers():
        assert_equal({name: ours.get_buffer(name)}, {name: buffer})
    here, there = ours.eval()(every[r], valid[r]), plain.eval()(every[r][valid[r]])
    assert_equal({"eval": here[valid[r]]}, {"eval": there})


@pytest.mark.ranks(1, 2, 4)
def test_the_second_derivative_of_the_sum_over_ranks():
    """L = Σ over ranks of Σ y³, y the sum of all x: its gradient 3 N y² and that one's own, 6 N² y,
    on every rank."""
    N, r = dist.get_world_size(), dist.get_rank()
    x, y = random(3, seed=r).requires_grad_(), sum(random(3, seed=n) for n in range(N))
    (grad,) = torch.autograd.grad(ds.sum_over_ranks(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert_equal({"first": grad, "second": second}, {"first": 3 * N * y**2, "second": 6 * N**2 * y})


# ── 1.5 The CTC loss ──────────────────────────────────────────────────────────────────────────────


def says(path: tuple[int, ...], blank: int = 0) -> tuple[int, ...]:
    """What a path says, by the two rules: merge repeats, drop blanks."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def loss_over_all_paths(
    log_probs_TV: torch.Tensor, labels: tuple[int, ...], blank: int = 0
) -> torch.Tensor:
    T, V = log_probs_TV.shape
    paths = [p for p in itertools.product(range(V), repeat=T) if says(p, blank) == labels]
    return -torch.logsumexp(torch.stack([log_probs_TV[range(T), list(p)].sum() for p in paths]), 0)


@pytest.mark.parametrize("labels", [(), (1,), (1, 1), (1, 2, 1), (2, 2, 2), (3, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("blank", [0, 3])
def test_ctc_is_the_sum_over_all_paths(labels, blank):
    """Value, and gradient at the log-probabilities, against all 4⁵ paths; T = 5 is exactly enough
    for (3, 1, 1, 2)."""
    labels = tuple((symbol + blank) % 4 if blank else symbol for symbol in labels)
    x = random(5, 4).log_softmax(-1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = loss_over_all_paths(a, labels, blank)
    loss = ds.ctc_loss(
        b[:, None], torch.tensor([labels], dtype=torch.int64), [5], [len(labels)], blank, "sum"
    )
    expected.backward()
    loss.backward()
    assert_equal({"loss": loss, "grad": b.grad}, {"loss": expected, "grad": a.grad}, bound=1e-12)


def ragged(T=30, B=6, V=9, seed=2):
    """Empty targets, T exactly labels + repeats, T one too few, repeats, full length; padding of
    labels is garbage."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, V, (B, 8), generator=generator)
    labels[1], labels[2], labels[3] = 4, torch.arange(1, 9), 5
    sizes = torch.tensor([0, 3, 8, 4, 8, 5])
    frames = torch.tensor([T, 5, 8, 7, 23, 17])  # utterance 3 would need 4 + 3 repeats = 7 frames
    return (
        random(T, B, V, seed=seed),
        labels.to(ranks.device),
        frames.to(ranks.device),
        sizes.to(ranks.device),
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("form", ["table", "one row", "lists"])
@pytest.mark.parametrize("blank", [0, 8])
def test_ctc_is_pytorchs(reduction, form, blank):
    """Compared at the logits, where both conventions of the gradient are one."""
    logits, labels, frames, sizes = ragged()
    labels = labels % 8 if blank else labels
    args = (labels, frames, sizes)
    if form == "one row":
        args = (torch.cat([row[:n] for row, n in zip(labels, sizes)]), frames, sizes)
    if form == "lists":
        args = (labels, tuple(frames.tolist()), tuple(sizes.tolist()))
    results = []
    for function in (ds.ctc_loss, F.ctc_loss):
        x = logits.clone().requires_grad_()
        loss = function(x.log_softmax(-1), *args, blank=blank, reduction=reduction)
        loss.backward(torch.arange(1.0, 7, dtype=torch.float64) if reduction == "none" else None)
        results.append({"loss": loss, "grad": x.grad})
    assert_equal(*results, bound=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("as_tensors", [True, False])
def test_ctc_of_one_utterance_without_a_batch(reduction, as_tensors):
    """(T, V) in, a scalar out, as torch.nn.functional.ctc_loss."""
    labels, results = torch.tensor([3, 1, 1, 2]), []
    lengths = (torch.tensor(9), torch.tensor(4)) if as_tensors else ([9], [4])
    for function in (ds.ctc_loss, F.ctc_loss):
        x = random(9, 5).requires_grad_()
        sizes = lengths if as_tensors else tuple(torch.tensor(n[0]) for n in lengths)
        given = lengths if function is ds.ctc_loss else sizes
        loss = function(x.log_softmax(-1), labels, *given, reduction=reduction)
        loss.backward()
        assert loss.shape == ()
        results.append({"loss": loss, "grad": x.grad})
    assert_equal(*results, bound=1e-12)


def test_an_impossible_text():
    """One frame too few for labels and repeats: ∞ and a gradient of NaN, or 0 and no gradient;
    neighbours unharmed."""
    logits, labels, frames, sizes = ragged()
    frames[3] = 6
    x = logits.clone().requires_grad_()
    loss = ds.ctc_loss(x.log_softmax(-1), labels, frames, sizes, reduction="none")
    assert loss[3] == torch.inf and torch.isfinite(loss[[0, 1, 2, 4, 5]]).all()
    loss.sum().backward()
    assert x.grad[:, 3].isnan().any() and torch.isfinite(x.grad[:, [0, 1, 2, 4, 5]]).all()
    results = []
    for function in (ds.ctc_loss, F.ctc_loss):
        x = logits.clone().requires_grad_()
        loss = function(x.log_softmax(-1), labels, frames, sizes, zero_infinity=True)
        loss.backward()
        assert not x.grad[:, 3].any()
        results.append({"loss": loss, "grad": x.grad})
    assert_equal(*results, bound=1e-12)


def test_ctc_of_no_utterance_no_frame_and_no_probability():
    empty = torch.zeros(4, 0, 5, dtype=torch.float64, requires_grad=True)
    loss = ds.ctc_loss(empty, torch.zeros(0, 3, dtype=torch.int64), [], [], reduction="sum")
    loss.backward()
    assert loss == 0 and empty.grad.shape == (4, 0, 5)
    x = random(4, 2, 5).log_softmax(-1)  # no frame says "" for certain, and nothing else
    loss = ds.ctc_loss(x, torch.tensor([[1], [2]]), [0, 0], [0, 1], reduction="none")
    assert loss.tolist() == [0, math.inf]
    x[1, :, 1] = -torch.inf  # a symbol of probability 0 in a frame
    a, b = x.clone().requires_grad_(), x[:, 0].clone().requires_grad_()
    loss, expected = (
        ds.ctc_loss(a, torch.tensor([[1, 2]] * 2), [4, 4], [2, 2], reduction="sum"),
        None,
    )
    expected = 2 * loss_over_all_paths(torch.where(b == -torch.inf, -1e4, b), (1, 2))
    other = loss_over_all_paths(torch.where(x[:, 1] == -torch.inf, -1e4, x[:, 1]), (1, 2))
    loss.backward()
    assert_equal({"loss": loss}, {"loss": expected / 2 + other})
    assert torch.isfinite(a.grad).all()


def test_ctc_of_long_and_narrow_input():
    """1,500 frames, where (1/29)^T is zero in any format; half precision is upcast."""
    x = (random(1500, 2, 29) * 3).log_softmax(-1)
    labels, lengths = torch.arange(1, 29).repeat(2, 4), ([1500, 1200], [112, 90])
    for y, bound in ((x, 1e-12), (x.float(), 1e-5)):  # fp32 adds up 1,500 roundings
        assert_equal(
            {"l": ds.ctc_loss(y, labels, *lengths)},
            {"l": F.ctc_loss(y, labels, *lengths)},
            bound=bound,
        )
    assert ds.ctc_loss(x.bfloat16(), labels, *lengths).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ctc_of_anything(data):
    """Any lengths and labels: value and gradient at the logits are the native function's."""
    B, T, V = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(2, 5)),
    )
    sizes = [data.draw(st.integers(0, 5)) for _ in range(B)]
    frames = [data.draw(st.integers(1, T)) for _ in range(B)]
    seed, results = data.draw(st.integers(0, 999)), []
    logits, labels = (
        random(T, B, V, seed=seed),
        torch.randint(1, V, (B, 5), generator=torch.Generator().manual_seed(seed)),
    )
    for function in (ds.ctc_loss, F.ctc_loss):
        x = logits.clone().requires_grad_()
        loss = function(
            x.log_softmax(-1),
            labels,
            tuple(frames),
            tuple(sizes),
            reduction="sum",
            zero_infinity=True,
        )
        loss.backward()
        results.append({"loss": loss, "grad": x.grad})
    for name, x in results[1].items():
        assert (results[0][name] - x).abs().max() <= 1e-10 * max(1.0, x.abs().max().item())


def test_second_derivatives_are_refused():
    """Of what computes its gradient by formula; autograd would take the gradient for a constant,
    and be wrong."""
    x = random(5, 2, 4).requires_grad_()
    loss = ds.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2], [3, 1]]), [5, 4], [2, 1])
    h, weight = random(5, 2, 3, 4).requires_grad_(), random(2, 4, 4).requires_grad_()
    whole, cut = ds.clipped_recurrence(h, weight), ds.time_parallel_birnn(h[:, 0], weight)
    for y, leaf in ((loss, x), (whole, h), (cut, weight)):
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


# ── 1.6 The recurrence, cut in time ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("B", [0, 3])
def test_clipped_recurrence(D, T, B):
    """Compared with the loop that autograd differentiates, with states that reach both ends of the
    clip."""
    x, weight = random(T, D, B, 6) * 8, random(D, 6, 6, seed=2)
    a, b = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    expected, y = ds.plain_recurrence(*a), ds.clipped_recurrence(*b)
    assert not B or T == 1 or ((y == 0).any() and (y == 20).any())
    expected.backward(random(T, D, B, 6, seed=3))
    y.backward(random(T, D, B, 6, seed=3))
    if B:
        zeros = {"weight": 0.0} if T == 1 else {}  # one step has no step before it
        pairs = zip(
            ("y", "x", "weight"), (y, b[0].grad, b[1].grad), (expected, a[0].grad, a[1].grad)
        )
        pairs = list(pairs)
        assert_equal({n: p for n, p, _ in pairs}, {n: q for n, _, q in pairs}, zeros=zeros)
    else:
        assert y.shape == expected.shape and not b[1].grad.any()


def test_the_recurrence_is_pytorchs():
    """Below the clip it is nn.RNN's."""
    x = random(9, 3, 6)
    theirs = nn.RNN(6, 6, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(6))
    weight = theirs.weight_hh_l0.detach().T[None]
    assert_equal({"h": ds.plain_recurrence(x[:, None], weight)[:, 0]}, {"h": theirs(x)[0]})


def bidirectional(x, weight):
    """The full layer on a single device, by the plain loop."""
    return ds.bidirectional(x, weight, ds.plain_recurrence)


def time_parallel_case(T: int, upstream_of=lambda y: y):
    """Output, gradient of this rank's frames, and of the weight: cut in time, and on a single
    device."""
    N, r = dist.get_world_size(), dist.get_rank()
    lengths = torch.tensor([T, max(1, T // 2), 1], device=ranks.device)
    x = random(T, 3, 5) * 3 * ds.valid_frames(lengths, T)[..., None]
    weight, upstream = random(2, 5, 5, seed=2) / 2, random(T, 3, 5, seed=3)
    a, b = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    expected, y = bidirectional(*a), ds.time_parallel_birnn(b[0].tensor_split(N)[r], b[1])
    expected.backward(upstream)
    y.backward(upstream.tensor_split(N)[r])

    def own(z):
        return z.tensor_split(N)[r]

    here = {"y": y, "x": own(b[0].grad), "weight": b[1].grad}
    there = {"y": own(expected), "x": own(a[0].grad), "weight": a[1].grad}
    return here, there


@EVERY_WORLD
@pytest.mark.parametrize("T", [2, 3, 8, 21])
def test_the_layer_cut_in_time(T):
    """Any number of ranks, frames that they do not divide, fewer frames than ranks, utterances that
    end anywhere."""
    here, there = time_parallel_case(T)
    nothing = [name for name, x in there.items() if not x.numel()]
    assert nothing == ([] if T >= dist.get_world_size() or dist.get_rank() < T else ["y", "x"])
    for name in nothing:
        assert here.pop(name).shape == there.pop(name).shape
    zeros = {name: 1e-12 for name, x in there.items() if x.numel() and not x.any()}
    assert_equal(here, there, zeros=zeros)


@pytest.mark.ranks(2, 3, 4)
def test_messages_of_the_layer_cut_in_time():
    """A boundary state for each neighbour and direction, forward and backward; the weight's
    gradient once."""
    N, r, state = dist.get_world_size(), dist.get_rank(), 3 * 5 * 8
    with ds.Counter() as counter:
        time_parallel_case(8)
    neighbours = (r > 0) + (r < N - 1)
    assert [m.bytes for m in counter.messages if m.op == "send"] == [state] * 2 * neighbours
    assert [m.bytes for m in counter.messages if m.op == "all_reduce"] == [2 * 5 * 5 * 8]


def blocking(operations):
    """Each batch's receives posted, then sends that wait for their receiver: shows every true
    deadlock."""
    works = [dist.irecv(op.tensor, op.peer, op.group) for op in operations if op.op is dist.irecv]
    for op in operations:
        if op.op is dist.isend:
            dist.send(op.tensor, op.peer, op.group)
    return works


@pytest.mark.ranks(2, 3, 4)
def test_no_deadlock_with_blocking_sends():
    with plant(dist, "batch_isend_irecv", blocking):
        assert_equal(*time_parallel_case(21))
        x = random(7)
        assert_equal({"sum": ds.ring_all_reduce(x.clone())}, {"sum": x * dist.get_world_size()})


def test_the_cut_in_time_takes_as_many_slots_as_ranks():
    """N slots of T / N frames for an even N. With an odd N the middle rank has two directions in
    one slot: N + 1 slots' time."""
    for N in (1, 2, 3, 4, 7, 8):
        work = [[0] * N for _ in range(N)]  # directions that a rank computes in a slot
        for r in range(N):
            ended = []

            def compute(direction, state, row=work[r], ended=ended):
                row[len(ended)] += 1
                return state

            with (
                plant(ds, "group_size", lambda group=None, N=N: N),
                plant(ds, "group_rank", lambda group=None, r=r: r),
                plant(ds, "_exchange", lambda *messages, ended=ended: ended.append(messages)),
            ):
                ds._waves(compute, torch.zeros(2, 1, 1), 0, None)
            assert len(ended) == N and sum(work[r]) == 2
            assert work[r][r] and work[r][N - 1 - r]
        time_needed = sum(max(row[slot] for row in work) for slot in range(N))
        assert time_needed == (N + 1 if N % 2 else N)


# ── 2 The model ───────────────────────────────────────────────────────────────────────────────────


def heard_alone(model, batch) -> None:
    """Each utterance's result is the one that it gets by itself."""
    with torch.no_grad():
        for _ in range(3):  # running averages that mean something
            model(batch.features_BTF, batch.frames_B)
        together, lengths = model.eval()(batch.features_BTF, batch.frames_B)
        for i, length in enumerate(lengths.tolist()):
            one = batch.rows([i])
            alone, (alone_length,) = model(one.features_BTF, one.frames_B)
            assert length == alone_length == len(alone)
            assert_equal({"y": alone[:, 0]}, {"y": together[:length, i]})


@pytest.mark.parametrize(
    "change",
    [{}, {"num_layers": 7, "hidden_size": 4}, {"convolutions": ((2, (11, 7), (3, 2)),)}],
    ids=str,
)
@pytest.mark.parametrize("which", [0, 1])
def test_an_utterance_is_heard_alone_as_in_a_batch(change, which):
    cfg = config(**change)
    heard_alone(models(cfg)[which], batch_of(6, cfg))


def test_the_two_recurrences_make_the_same_network():
    """Forward and backward of the whole network, by the loop and by the function."""
    plain, parallel = models()
    batch = batch_of()
    for model in (plain, parallel):
        loss_of(model, batch).backward()
    assert_equal(grads_of(parallel), grads_of(plain))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), kernel=st.sampled_from([1, 3, 5, 11]), stride=st.integers(1, 4))
def test_the_arithmetic_of_lengths(size, kernel, stride):
    """Every length comes out of a convolution as the one function says."""
    cfg = config(convolutions=((1, (kernel, 1), (stride, 1)),), hidden_size=2, num_layers=1)
    convolution = ds.DeepSpeech2(cfg).convolutions[0]
    assert convolution(torch.zeros(1, 1, size, 12)).shape[2] == cfg.after(size, 0)
    assert torch.equal(cfg.after(torch.tensor([size]), 0), torch.tensor([cfg.after(size, 0)]))


# ── 3 Weights, and groups ─────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2, 4)
def test_ranks_that_have_drifted_apart_are_found():
    model = ds.parallel_model(config())
    ds.check_replicas(model)
    if dist.get_rank() == 1:
        model.layers[1].norm.running_mean[3] += 1e-3
    with pytest.raises(
        ValueError,
        match=r"layers.1.norm.running_mean should be the same on .*, but \d of its bytes differ",
    ):
        ds.check_replicas(model)


@pytest.mark.ranks(2, 3, 4)
def test_a_nan_on_one_rank_is_found():
    """A minimum or maximum over ranks may drop it; on every rank it is no difference."""
    for bad in range(dist.get_world_size()):
        model = ds.parallel_model(config())
        with torch.no_grad():
            if dist.get_rank() == bad:
                model.out.bias[1] = math.nan
        with pytest.raises(ValueError, match="out.bias should be the same on every rank"):
            ds.check_replicas(model)
    with torch.no_grad():
        model.out.bias[1] = math.nan
    ds.check_replicas(model)


def one_utterance() -> ds.Batch:
    return batch_of().rows([3])


def a_time_parallel_layer(group):
    return ds.time_parallel_birnn(random(4, 1, 3), random(2, 3, 3), group)


def a_batch_norm(group):
    return ds.SequenceBatchNorm(3, group).double()(
        random(5, 2, 3), torch.ones(5, 2, dtype=torch.bool)
    )


def a_parallel_model(group):
    batch = one_utterance()
    model = ds.parallel_model(config(), group).to(ranks.device, torch.float64)
    return model(batch.features_BTF, batch.frames_B)


def a_gradient(group):
    model, ring = models()[0], argparse.Namespace(finish=lambda: None)
    return ds.parallel_gradients(model, one_utterance(), ring=ring, group=group)


def a_training_step(group, ring_group):
    model = models()[0]
    optimizer = ds.make_optimizer(model, 0.01)
    return next(ds.train(model, optimizer, [one_utterance()], group, ring_group))


TAKE_A_GROUP = {
    "group_size": ds.group_size,
    "group_rank": ds.group_rank,
    "ring_all_reduce": lambda group: ds.ring_all_reduce(torch.ones(5, device=ranks.device), group),
    "GradientRing": lambda group: ds.GradientRing([nn.Parameter(torch.ones(2))], group),
    "sum_over_ranks": lambda group: ds.sum_over_ranks(torch.ones(2, device=ranks.device), group),
    "SequenceBatchNorm": a_batch_norm,
    "time_parallel_birnn": a_time_parallel_layer,
    "parallel_model": a_parallel_model,
    "check_replicas": lambda group: ds.check_replicas(
        ds.parallel_model(config()).to(ranks.device), group
    ),
    "parallel_gradients": a_gradient,
    "train": lambda group: a_training_step(group, this_rank_alone()),
    "train, ring_group": lambda group: a_training_step(this_rank_alone(), group),
}


@lru_cache
def this_rank_alone() -> dist.ProcessGroup:
    return dist.new_subgroups_by_enumeration([[0], [1]])[0]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", TAKE_A_GROUP)
def test_a_rank_outside_the_group_is_refused(name):
    """torch says that its group has −1 ranks: what it holds would be taken for the sum. The rank
    inside is alone."""
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        TAKE_A_GROUP[name](group)
    else:
        with pytest.raises(ValueError, match="rank 1 is not in the process group"):
            TAKE_A_GROUP[name](group)


def test_every_function_that_takes_a_group_is_tried_from_outside():
    public = {
        name: thing
        for name, thing in vars(ds).items()
        if getattr(thing, "__module__", "") == "deepspeech"
    }
    public = {
        name: thing
        for name, thing in public.items()
        if callable(thing) and not name.startswith("_")
    }
    takers = {
        name for name, thing in public.items() if "group" in inspect.signature(thing).parameters
    }
    assert takers - {"Message"} == {name.partition(",")[0] for name in TAKE_A_GROUP}


# ── Planted bugs: what a missing safeguard looks like ─────────────────────────────────────────────


def off(here, reference) -> float:
    """A loss's relative error."""
    return abs(here / reference - 1).item()


def logits_gradient(loss_function, logits, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """A CTC loss of each utterance, and the gradient of their sum at the logits."""
    x = logits.clone().requires_grad_()
    loss = loss_function(x.log_softmax(-1), *args, reduction="none")
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.planted_bug(
    symptom="texts with double letters seem too probable; all others are right", seen_in=None
)
def test_a_skip_between_equal_letters():
    """A skip over the blank between equal labels lets "l" + "l" say "ll"."""
    original = ds._alpha

    def alpha(log_y, skip_cost, start):
        return original(log_y, torch.zeros_like(skip_cost), start)

    args = torch.tensor([[1, 2, 3], [1, 1, 2]]), [6, 6], [3, 3]
    right, grad = logits_gradient(F.ctc_loss, random(6, 2, 4), *args)
    with plant(ds, "_alpha", alpha):
        wrong, wrong_grad = logits_gradient(ds.ctc_loss, random(6, 2, 4), *args)
    assert math.isclose(wrong[0], right[0], rel_tol=1e-12) and wrong[1] < right[1] - 0.1
    assert_equal({"no repeat": wrong_grad[:, 0]}, {"no repeat": grad[:, 0]})
    return Shows(
        off(wrong[1], right[1]), worst_of({"repeat": wrong_grad[:, 1]}, {"repeat": grad[:, 1]})
    )


@pytest.mark.planted_bug(
    symptom="the loss is right; after the step every weight is NaN",
    seen_in="https://github.com/pytorch/pytorch/issues/14335",
)
def test_minus_infinity_for_the_impossible():
    """A letter of probability 0 in one frame: where alpha and beta are put together, ∞ − ∞ is
    NaN."""
    logits, args = random(4, 1, 4), (torch.tensor([[1, 2]]), [4], [2])
    logits[1, 0, 1] = -1e4  # as good as 0, and finite
    right, grad = logits_gradient(ds.ctc_loss, logits, *args)
    assert_equal(
        {"loss": right}, {"loss": loss_over_all_paths(logits[:, 0].log_softmax(-1), (1, 2))[None]}
    )
    logits[1, 0, 1] = -math.inf
    assert_equal({"grad": logits_gradient(ds.ctc_loss, logits, *args)[1]}, {"grad": grad})
    with plant(ds, "IMPOSSIBLE", -math.inf):
        loss, wrong = logits_gradient(ds.ctc_loss, logits, *args)
    assert_equal({"loss": loss}, {"loss": right})
    assert wrong[1].isnan().all()
    return Shows(off(loss, right), "NaN")


@pytest.mark.planted_bug(
    symptom="short utterances are right; from some 200 frames on the loss is infinite",
    seen_in="https://github.com/pytorch/pytorch/issues/14401",
)
def test_ctc_in_linear_space():
    def loss(log_probs_TV, labels):
        y, symbols = log_probs_TV.exp(), [0, *(s for label in labels for s in (label, 0))]
        alpha = F.one_hot(torch.tensor(0), len(symbols)).to(y.dtype)
        skip = torch.tensor(
            [s > 1 and symbols[s] not in (0, symbols[s - 2]) for s in range(len(symbols))]
        )
        for y_V in y:
            step, two = (F.pad(alpha, (n, 0))[: len(alpha)] for n in (1, 2))
            alpha = (alpha + step + two * skip) * y_V[symbols]
        return -alpha[-2:].sum().log()

    for T in (60, 300):
        a, b = (
            torch.full((T, 29), 1 / 29, dtype=torch.float64).log().requires_grad_()
            for _ in range(2)
        )
        right, wrong = (
            ds.ctc_loss(a[:, None], torch.tensor([[3, 3, 4]]), [T], [3], reduction="sum"),
            loss(b, (3, 3, 4)),
        )
        right.backward(), wrong.backward()
        assert torch.isfinite(right) and torch.isfinite(a.grad).all()
        if T == 60:
            assert_equal({"loss": wrong, "grad": b.grad}, {"loss": right, "grad": a.grad})
    assert wrong == torch.inf and b.grad.isnan().any()
    return Shows("infinite", "NaN")


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="an utterance's loss depends on how much padding its batch has",
    seen_in="https://github.com/SeanNaren/deepspeech.pytorch/issues/312",
)
def test_batch_norm_that_counts_padding():
    cfg = config()
    plain, parallel = models(cfg)
    batch, original = batch_of(7, cfg), ds.SequenceBatchNorm.forward

    def forward(self, x, valid):
        everything = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return torch.where(valid.expand(x.shape[:-1])[..., None], original(self, x, everything), 0)

    with plant(ds.SequenceBatchNorm, "forward", forward):
        losses, found = step_of(plain, parallel, batch)
    assert off(*losses) > 0.01 and torch.isfinite(losses[0])  # a loss like any other
    return Shows(off(*losses), worst_of(*found))


@pytest.mark.planted_bug(
    symptom="in bf16, running averages and outputs off by a percent", seen_in=None
)
def test_batch_norm_in_bf16():
    """Its squares and sums have 8 bits; the output need not have more, but what it is made of
    must."""
    x, valid = random(40, 5, 6) + 3, torch.ones(40, 5, dtype=torch.bool)
    layers = [
        ds.SequenceBatchNorm(6).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    rounded, results = x.bfloat16(), []
    for layer, planted in zip(layers, (False, False, True)):
        leaf = (
            (rounded if layer.weight.dtype != torch.float64 else rounded.double())
            .clone()
            .requires_grad_()
        )
        with plant(torch, "promote_types", (lambda a, b: a) if planted else torch.promote_types):
            y = layer(leaf, valid)
        (y.to(torch.float64) * random(40, 5, 6, seed=2)).sum().backward()
        results.append(
            ({"y": y.double(), "mean": layer.running_mean.double()}, {"x": leaf.grad.double()})
        )
    (right, grad), (wide, _), (narrow, wrong_grad) = results
    assert worst_of(wide, right) < 1e-5 and worst_of(narrow, right) > 3e-3
    return Shows(worst_of(narrow, right), worst_of(wrong_grad, grad))


def step_of(plain, parallel, batch) -> tuple[tuple, tuple]:
    """One step on these ranks and on a single device, nothing clipped: losses and gradients."""
    (((expected, _), (loss, _)),) = trained(plain, parallel, [batch])
    return (loss, expected), (grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is right to the last digit, gradients below every BatchNorm are not",
    seen_in=None,
)
def test_statistics_that_are_reduced_forward_only():
    plain, parallel = models()
    with plant(ds._SumOverRanks, "backward", staticmethod(lambda ctx, grad: (grad, None))):
        (loss, expected), found = step_of(plain, parallel, batch_of(8))
    assert_equal({"loss": loss}, {"loss": expected})
    wrong = assert_differs(*found)
    assert (
        "convolutions.0.weight" in wrong
        and "out.weight" not in wrong
        and "full_norm.weight" not in wrong
    )
    return Shows(off(loss, expected), worst_of(*found))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="nearly right: the utterances of a rank that has fewer count for more",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_the_average_of_unequal_shares():
    for utterances in (6, 7):  # with as many on each rank it would not show
        plain, parallel = models_without_norm()
        batch = batch_of(7).rows(range(utterances))
        expected, loss = loss_of(plain, batch, F.ctc_loss), loss_of(parallel, mine(batch))
        expected.backward(), loss.backward()
        for x in (loss.detach(), *(p.grad for p in parallel.parameters())):
            dist.all_reduce(x)
            x /= dist.get_world_size()
        if utterances == 6:
            assert_equal(grads_of(parallel) | {"loss": loss}, grads_of(plain) | {"loss": expected})
    assert_differs(grads_of(parallel), grads_of(plain))
    return Shows(off(loss, expected), worst_of(grads_of(parallel), grads_of(plain)))


@pytest.mark.planted_bug(
    symptom="short utterances get another text next to long ones; alone they are right",
    seen_in=None,
)
def test_a_backward_direction_that_starts_in_the_padding():
    """Padding that is not zero after the norm wakes the backward direction before the utterance's
    true end."""
    model, batch = models()[1].eval(), batch_of(6)
    for module in model.modules():
        if isinstance(module, ds.SequenceBatchNorm):
            nn.init.normal_(module.bias, 0.5)
    shortest = batch.frames_B.argmin().item()

    def heard(rows, place):
        """The loss of the shortest utterance in such a batch, and every gradient of that."""
        model.zero_grad()
        part = batch.rows(rows)
        log_probs, frames = model(part.features_BTF, part.frames_B)
        loss = ds.ctc_loss(log_probs, part.labels_BU, frames, part.sizes_B, reduction="none")[place]
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (loss, grads), (expected, right) = heard(range(6), shortest), heard([shortest], 0)
    assert_equal(grads | {"loss": loss}, right | {"loss": expected})
    original = ds.SequenceBatchNorm.forward
    with plant(
        ds.SequenceBatchNorm,
        "forward",
        lambda self, x, valid: original(self, x, torch.ones_like(valid)),
    ):
        (loss, grads), (expected, right) = heard(range(6), shortest), heard([shortest], 0)
    assert_differs(grads, right)
    return Shows(off(loss, expected), worst_of(grads, right))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="outputs are right; what should cross the cut is missing from every gradient",
    seen_in=None,
)
def test_an_exchange_outside_the_graph():
    original = ds._waves

    def wave(compute, state, up, group):
        if up == 0:
            return original(compute, state, up, group)
        for direction in (slice(0, 1), slice(1, 2)):
            compute(
                direction, state[direction]
            )  # nothing arrives, as if the state had been a constant

    with plant(ds, "_waves", wave):
        here, there = time_parallel_case(16)
    output, expected = ({"y": part.pop("y")} for part in (here, there))
    assert_equal(output, expected)
    assert "weight" in assert_differs(here, there, at_least=1e-2)
    return Shows(worst_of(output, expected), worst_of(here, there))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="nothing, for ever; then, on every rank, an error that names the send and the timeout",
    seen_in=None,
)
def test_a_ring_that_sends_before_it_receives():
    group = ds.make_group([[0, 1]], ranks.device, 1.0)  # a group of its own: what times out is lost

    def exchange(receives, sends, group):
        for way, messages in ((dist.send, sends), (dist.recv, receives)):
            for x, peer in messages:
                way(x, peer, group=group)

    begin = time.monotonic()
    with (
        plant(ds, "_exchange", exchange),
        pytest.raises(RuntimeError, match=r"(?i)timed out|timeout|closed by peer"),
    ):
        ds.ring_all_reduce(torch.ones(1000), group)
    assert 0.5 < time.monotonic() - begin < 20
    assert ds.ring_all_reduce(torch.ones(1000)).sum() == 2000
    return Shows("hangs, then times out", "hangs, then times out")


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the last, short batch of an epoch: a rank without an utterance goes on, others wait",
    seen_in=None,
)
def test_a_rank_that_skips_an_empty_batch():
    group = ds.make_group([[0, 1]], ranks.device, 1.0)
    model, batch = (
        ds.parallel_model(config(), group).to(ranks.device, torch.float64),
        mine(batch_of().rows([3])),
    )
    if len(batch.frames_B):  # the safeguard is not to ask
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout|closed by peer"):
            model(batch.features_BTF, batch.frames_B)
    return Shows("hangs, then times out", "hangs, then times out")


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="ranks learn, each something else; no error where sizes happen to fit", seen_in=None
)
def test_buckets_in_another_order_on_one_rank():
    """Rank 1 sends the gradient of `b` while rank 0 sends that of `a`, of the same size: both are
    summed."""
    N, r = dist.get_world_size(), dist.get_rank()
    net = nn.ParameterDict({name: random(4, 4, seed=seed) for seed, name in enumerate("ab")})
    x, results = random(N, 3, 4, seed=5), []
    for planted in (False, True):
        net.zero_grad()
        ring = ds.GradientRing(
            list(net.values())[:: -1 if planted and r == 1 else 1], ring_group(), bucket_bytes=1
        )
        partial_loss = (x[r] @ net["a"] @ net["b"]).square().sum()
        partial_loss.backward()
        ring.finish()
        ring.close()
        loss = partial_loss.detach().clone()
        dist.all_reduce(loss)
        results.append((loss, {name: p.grad.clone() for name, p in net.items()}))
    net.zero_grad()
    expected = (x @ net["a"] @ net["b"]).square().sum()
    expected.backward()
    assert_equal(results[0][1], grads_of(net))
    assert assert_differs(results[1][1], grads_of(net)) == ["a", "b"]
    return Shows(off(results[1][0], expected), worst_of(results[1][1], grads_of(net)))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="with two micro-batches a step, ranks drift apart: of one of them the sum is lost",
    seen_in="https://github.com/deepspeedai/DeepSpeed/issues/7985",
)
def test_two_backward_passes_before_finish():
    plain, parallel = models_without_norm()
    ring, halves = (
        ds.GradientRing(parallel.parameters(), ring_group()),
        [batch_of(4, seed=seed) for seed in (1, 2)],
    )
    loss, expected = (torch.zeros((), dtype=torch.float64, device=ranks.device) for _ in range(2))
    for half in halves:
        here, alone = (
            loss_of(parallel, mine(half)) / dist.get_world_size(),
            loss_of(plain, half, F.ctc_loss),
        )
        here.backward(), alone.backward()
        loss += here.detach()
        expected += alone.detach()
        [job.result() for job in ring.jobs]  # the first sum is on its way already
    dist.all_reduce(loss)
    ring.finish()
    ring.close()
    assert_differs(grads_of(parallel), grads_of(plain))
    return Shows(off(loss, expected), worst_of(grads_of(parallel), grads_of(plain)))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the sum points elsewhere; hidden wherever nothing is clipped", seen_in=None
)
def test_clipping_before_the_sum():
    plain, parallel = models()
    original = ds.GradientRing._sum

    def clipped_sum(self, bucket):  # the network fits into one bucket
        assert len(self.buckets) == 1
        nn.utils.clip_grad_norm_(bucket, 0.1)
        original(self, bucket)

    with plant(ds.GradientRing, "_sum", clipped_sum):
        steps = trained(plain, parallel, [batch_of(7)], max_norm=0.1)
        (((expected, norm), (loss, _)),) = steps
    assert norm > 0.1
    assert_differs(grads_of(parallel), grads_of(plain))
    return Shows(off(loss, expected), worst_of(grads_of(parallel), grads_of(plain)))


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"convolutions": ((3, (4, 5), (1, 1)),)}, "must be odd"),
        ({"convolutions": ((3, (5, 5), (0, 1)),)}, "at least 1"),
        ({"convolutions": ()}, "at least 1"),
        ({"num_bins": -1}, "num_bins=-1"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_ctc_refuses_what_does_not_fit():
    x = torch.zeros(5, 2, 4).log_softmax(-1)
    two = torch.tensor([[1, 2], [3, 1]])
    cases = [
        (
            (torch.tensor([[1, 4], [3, 1]]), [5, 5], [2, 2]),
            {},
            "target 4 is the blank 0 or none of 4 symbols",
        ),
        ((torch.tensor([[1, 0], [3, 1]]), [5, 5], [2, 2]), {}, "target 0 is the blank"),
        ((two, [5, 6], [2, 2]), {}, r"input_lengths \[5, 6\]: they must be from 0 to 5"),
        ((two, [5, 5], [2, 3]), {}, r"target_lengths \[2, 3\]: they must be from 0 to 2"),
        ((two, [5], [2, 2]), {}, "do not fit log_probs of 2 utterances"),
        ((two.flatten(), [5, 5], [2, 1]), {}, r"4 targets in one row, but target_lengths \[2, 1\]"),
        ((two, [5.7, 5], [2, 2]), {}, "input_lengths must be integers, not torch.float32"),
        ((two, [5, 5], torch.tensor([2.0, 2])), {}, "target_lengths must be integers"),
        ((two + 0.5, [5, 5], [2, 2]), {}, "targets must be integers"),
        ((two, [5, 5], [2, 2]), dict(reduction="max"), "reduction='max'"),
        ((two, [5, 5], [2, 2]), dict(blank=4), "blank=4"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ds.ctc_loss(x, *args, **options)
    assert (
        ds.ctc_loss(x, torch.tensor([[1, 0], [3, 9]]), [5, 5], [1, 1]) > 0
    )  # after the end any symbol is allowed


@pytest.mark.ranks(1, 2)
def test_the_network_and_the_ring_refuse_on_every_rank():
    with pytest.raises(ValueError, match="spectrograms of 11 bins for a network of 12"):
        ds.parallel_model(config())(torch.zeros(1, 20, 11), torch.tensor([20]))
    with pytest.raises(ValueError, match="0 valid frames on all ranks"):
        ds.SequenceBatchNorm(3)(torch.zeros(4, 0, 3), torch.zeros(4, 0, dtype=torch.bool))
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match="a group of its own"):
            ds.GradientRing(ds.parallel_model(config()).parameters())


# ── The script ────────────────────────────────────────────────────────────────────────────────────


def refused(flags: list[str], capsys, monkeypatch) -> str:
    """The one line with which flags are refused, after the usage."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit, match="2"):
        ds.flags()
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and line.startswith("deepspeech.py: error: ")
    return line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "0"], "--batch: '0' must be"),
        (["--lr", "nan"], "--lr: 'nan' must be"),
        (["--lr", "inf"], "--lr: 'inf' must be"),
        (["--lr", "-1"], "--lr: '-1' must be"),
        (["--max-norm", "0"], "--max-norm: '0' must be"),
        (["--num-layers", "0"], "--num-layers: '0' must be"),
        (["--hidden-size", "1.5"], "--hidden-size: '1.5' must be"),
        (["--seed", "-1"], "--seed: '-1' must be"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line_before_any_rank_starts(flags, message, capsys, monkeypatch):
    assert message in refused(flags, capsys, monkeypatch)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
def test_no_flag_is_needed_on_any_number_of_gpus(gpus, nodes, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if nodes == 2:
            size = gpus * nodes if name == "WORLD_SIZE" else gpus
            monkeypatch.setenv(name, str(size if "SIZE" in name else 0))
    args = ds.flags()
    assert (args.ranks, args.world_size, args.device, args.backend) == (
        gpus,
        gpus * nodes,
        "cuda",
        "nccl",
    )


def arguments(monkeypatch, *flags: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    return ds.flags()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_check(dtype):
    """What --check runs on every rank: every tensor's error, all within the bound."""
    args = argparse.Namespace(
        check=True,
        dtype=dtype,
        device=ranks.device.type,
        backend=ranks.backend,
        ranks=3,
        seed=0,
        timeout=60.0,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ds.main(args, ranks.device)
    text = printed.getvalue()
    assert dist.get_rank() > 0 or f"bound {ds.BOUNDS[dtype]:.0e}" in text
    assert dist.get_rank() > 0 or "every gradient of layers.0.weight" in text


@pytest.mark.ranks(2)
def test_the_check_fails_where_a_gradient_is_wrong():
    """The exit code is 1 then."""
    args = argparse.Namespace(
        check=True, dtype="fp64", device="cpu", backend="gloo", ranks=2, seed=0, timeout=60.0
    )
    broken = plant(ds._SumOverRanks, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    with broken, contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        ds.main(args, ranks.device)
    assert stop.value.code == 1


@pytest.mark.parametrize(
    "flags",
    [[], ["--seed", "3"], ["--steps", "1"], ["--batch", "8"], ["--num-layers", "2"]],
    ids=str,
)
def test_claims_about_training_are_judged_in_the_default_run_alone(flags, monkeypatch):
    """What to expect is known of the default run alone; it fails where texts are wrong."""
    args = arguments(monkeypatch, *flags)
    with (
        plant(ds, "equivalence", lambda *_: dict.fromkeys(KINDS_OF_ERRORS, 0.0)),
        plant(ds, "demonstrate", lambda *_: ([2.0, 1.9], 0.5)),
    ):
        verdicts = [verdict for *_, verdict in ds.claims(args, torch.device("cpu"), None)]
    is_default = flags == [] or flags[0] == "--seed"
    assert verdicts[:5] == [True] * 5
    assert verdicts[5:] == ([False, False] if is_default else ["needs the default run"] * 2)


KINDS_OF_ERRORS = (
    "every gradient",
    "every norm before clipping",
    "every weight after Nesterov",
    "every value of the layer cut in time",
)


def test_tones():
    """Unequal lengths, padding of zeros, labels that are symbols; a function of the seed."""
    cfg = ds.DeepSpeechConfig()
    a, b, c = (ds.tones(20, cfg, seed) for seed in (1, 1, 2))
    assert torch.equal(a.features_BTF, b.features_BTF)
    assert not torch.equal(a.labels_BU, c.labels_BU)
    assert len(set(a.sizes_B.tolist())) > 3 and len(set(a.frames_B.tolist())) > 10
    valid = ds.valid_frames(a.frames_B, a.features_BTF.shape[1]).T
    assert not a.features_BTF[~valid].any() and a.features_BTF[valid].any(1).all()
    for b, size in enumerate(a.sizes_B.tolist()):
        labels = a.labels_BU[b, :size]
        assert labels.min() >= 1 and labels.max() < len(cfg.alphabet)
        loudest = a.features_BTF[b].amax(0)
        assert loudest[labels].min() > 2.0
        repeats = int((labels[1:] == labels[:-1]).sum())
        assert cfg.after(int(a.frames_B[b]), 0) >= size + repeats  # CTC can write it


def test_greedy():
    x = torch.full((7, 4), -9.0)
    for t, symbol in enumerate([0, 1, 1, 0, 1, 3, 3]):
        x[t, symbol] = 0
    assert ds.greedy(x, "_abc") == "aac" and ds.greedy(torch.zeros(0, 4), "_abc") == ""


@pytest.mark.ranks(2)
def test_the_demonstration_stops_at_a_loss_that_is_not_finite():
    """On all ranks, naming the step."""
    args = argparse.Namespace(
        dtype="fp32", seed=0, steps=3, batch=4, lr=0.05, max_norm=3.0, num_layers=1, hidden_size=8
    )
    right = ds.tones

    def broken(utterances, config, seed, letters=8):
        batch = right(utterances, config, seed, letters)
        if seed == 1:
            batch.features_BTF[0, 0] = math.nan
        return batch

    with plant(ds, "tones", broken), contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(FloatingPointError, match="step 1: loss nan"):
            ds.demonstrate(args, ranks.device, ring_group())


@pytest.mark.slow
def test_the_default_run():
    result = scripts.forked(SCRIPT, timeout=180)
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stdout + result.stderr
