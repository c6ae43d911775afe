# SPDX-License-Identifier: MIT-0
"""Chapter 1 equals the single device: the loss, the ring, the norm, the network, the layer cut in time, the training.

A test marked `ranks` is what every rank of that world executes. References are part 1 of the chapter, PyTorch's own
functions, or a sum over everything that is possible.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import json
import math
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import deepspeech as ds
import numpy as np
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

SCRIPT = Path(ds.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 3, 4)


# ── Small helpers ───────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> ds.SpeechConfig:
    convolutions = ((3, (5, 5), (2, 2)), (4, (3, 3), (1, 2)))
    return ds.SpeechConfig(
        **(dict(bins=12, convolutions=convolutions, layers=2, hidden_size=10) | changes)
    )


def random(*shape, seed=1):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(ranks.device)


@lru_cache
def ring_group() -> dist.ProcessGroup:
    return ds.make_group([list(range(dist.get_world_size()))], ranks.device, 60.0)


def batch_of(utterances=7, cfg=None, seed=1) -> ds.Batch:
    return ds.small_batch(utterances, cfg or config(), seed).to(ranks.device, torch.float64)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


def models(cfg):
    """The plain model, and the one that shares its statistics with all ranks."""
    return tuple(
        m.to(ranks.device, torch.float64) for m in (ds.DeepSpeech2(cfg), ds.parallel_model(cfg))
    )


def loss_of(model, batch, loss=ds.ctc_loss):
    log_probs, frames = model(batch.features_BTF, batch.frames_B)
    return loss(log_probs, batch.labels_BU, frames, batch.sizes_B)


def mine(batch: ds.Batch) -> ds.Batch:
    """This rank's utterances, dealt out in turn."""
    return batch.rows(range(dist.get_rank(), len(batch.frames_B), dist.get_world_size()))


# ── 2.1 The CTC loss ────────────────────────────────────────────────────────────────────────────────────


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
    """Value, and gradient at the log-probabilities, beside all 4⁵ paths; T = 5 is exactly enough for (3, 1, 1, 2)."""
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
    """Empty targets, T exactly labels + repeats, T one too few, repeats, full length; padding of labels is garbage."""
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


def test_an_impossible_text():
    """One frame too few for labels and repeats: ∞ and a gradient of NaN, or 0 and no gradient; neighbours unharmed."""
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
    assert_equal({"loss": loss}, {"loss": expected / 2 + other}) and torch.isfinite(a.grad).all()


def test_ctc_of_long_and_narrow_input():
    """1,500 frames, where (1/29)^T is zero in any format; half precision is widened."""
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
    """Of what computes its gradient by formula; autograd would take the gradient for a constant, and be wrong."""
    x = random(5, 2, 4).requires_grad_()
    loss = ds.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2], [3, 1]]), [5, 4], [2, 1])
    h, weight = random(5, 2, 3, 4).requires_grad_(), random(2, 4, 4).requires_grad_()
    whole, cut = ds.clipped_recurrence(h, weight), ds.time_parallel_birnn(h[:, 0], weight)
    for y, leaf in ((loss, x), (whole, h), (cut, weight)):
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


@pytest.mark.ranks(1, 2, 4)
def test_the_second_derivative_of_the_sum_over_ranks():
    """L = Σ over ranks of Σ y³, y the sum of all x: its gradient 3 N y² and that one's own, 6 N² y, on every rank."""
    N, r = dist.get_world_size(), dist.get_rank()
    x, y = random(3, seed=r).requires_grad_(), sum(random(3, seed=n) for n in range(N))
    (grad,) = torch.autograd.grad(ds.sum_over_ranks(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert_equal({"first": grad, "second": second}, {"first": 3 * N * y**2, "second": 6 * N**2 * y})


# ── 2.2 The ring ────────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("K", [0, 1, 2, 3, 7, 1001])
def test_ring(K):
    """The sum in the documented order, to the bit, and the same on every rank; 2·K·(N − 1) elements in all."""
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
    assert sent == ds.ring_elements(K, N) == 2 * K * (N - 1)
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


# ── 2.3 Data parallelism ────────────────────────────────────────────────────────────────────────────────

KINDS = pytest.mark.parametrize("kind", ["nesterov", "adamw"])


@EVERY_WORLD
@KINDS
@pytest.mark.parametrize(
    "change",
    [{}, {"cell": "gru", "bidirectional": False, "layers": 1}, {"batch_norm": False}],
    ids=str,
)
def test_five_steps(kind, change):
    """Seven utterances of unequal length over the ranks: losses, norms, gradients, weights, running averages."""
    cfg = config(**change)
    plain, parallel = models(cfg)
    batches, steps = [batch_of(7, cfg, seed) for seed in range(5)], 0
    options = dict(lr=lambda step: 0.01 / (step + 1), max_norm=0.5, kind=kind)
    alone = ds.train_alone(plain, batches, **options)
    together = ds.train(parallel, map(mine, batches), ring_group=ring_group(), **options)
    for (expected, norm), (loss, norm_here) in zip(alone, together, strict=True):
        assert norm > 0.5, "nothing was clipped"
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
        assert_equal(grads_of(parallel), grads_of(plain))
        steps += 1
    assert steps == 5
    state = {name: x for name, x in plain.state_dict().items() if x.is_floating_point()}
    assert_equal(
        {name: parallel.state_dict()[name] for name in state},
        state,
        floor=0.05 if kind == "adamw" else 0.0,
    )
    ds.check_replicas(parallel)


@pytest.mark.ranks(2, 4)
def test_a_rank_without_an_utterance():
    """A batch smaller than the ranks leaves some with nothing; they take part in every sum, and step alike."""
    cfg = config()
    plain, parallel = models(cfg)
    batch = batch_of(7, cfg).rows([5])
    ((expected, norm),) = ds.train_alone(plain, [batch], lambda step: 0.01)
    ((loss, norm_here),) = ds.train(
        parallel, [mine(batch)], lambda step: 0.01, ring_group=ring_group()
    )
    assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    assert_equal(grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(2)
def test_buckets_leave_while_backward_runs():
    """The first bucket is on its way before the first layer has its gradient; in a fixed order; nothing twice."""
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
def test_messages_of_a_step():
    """In the ring's group the gradients, 2·K·(N − 1)/N elements a rank; in the other BatchNorm's sums and scalars."""
    cfg = config()
    model = models(cfg)[1]
    ring = ds.GradientRing(model.parameters(), ring_group())
    sent, exchange = [], ds._exchange

    def watched(messages, group):
        sent.extend((x.nbytes, group) for way, x, _ in messages if way is dist.isend)
        return exchange(messages, group)

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


# ── 2.4 BatchNorm over all frames of all ranks ──────────────────────────────────────────────────────────


@EVERY_WORLD
def test_sequence_batch_norm():
    """Beside nn.BatchNorm1d on all valid frames of all ranks: outputs, every gradient, running averages, then eval."""
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


# ── 2.5 Recurrence ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("B", [0, 3])
def test_clipped_recurrence(D, T, B):
    """Beside the loop that autograd differentiates, with states that reach both ends of the clip."""
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


def test_the_recurrences_are_pytorchs():
    """Below the clip the simple one is nn.RNN's; with tanh for the clip and z turned, the gated one nn.GRU's."""
    x = random(9, 3, 6)
    theirs = nn.RNN(6, 6, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(6))
    weight = theirs.weight_hh_l0.detach().T[None]
    assert_equal({"h": ds.plain_recurrence(x[:, None], weight)[:, 0]}, {"h": theirs(x)[0]})
    theirs = nn.GRU(
        18, 6, bias=False
    ).double()  # rows of its weights: r, z, n; its z keeps the old state
    x, order = random(9, 3, 18), torch.arange(18).view(3, 6)[[1, 0, 2]].flatten()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(18)[order])
        theirs.weight_ih_l0[6:12] *= -1
    weight = theirs.weight_hh_l0.detach()[order].T[None].clone()
    weight[..., :6] *= -1
    assert_equal({"h": ds.gru(x[:, None], weight, torch.tanh)[:, 0]}, {"h": theirs(x)[0]})
    h = ds.gru(50 * random(9, 1, 3, 18), weight)
    assert h.max() <= 20 and h.min() >= 0 and (h == 20).any()


LAYOUTS = [
    {}, {"bidirectional": False}, {"cell": "gru"}, {"cell": "gru", "bidirectional": False}, {"batch_norm": False},
    {"layers": 7, "hidden_size": 4}, {"convolutions": ((2, (11, 7), (3, 2)),)},
]  # fmt: skip


@pytest.mark.parametrize("change", LAYOUTS, ids=str)
@pytest.mark.parametrize("build", ["plain", "parallel"])
def test_an_utterance_is_heard_alone_as_in_a_batch(change, build):
    cfg = config(**change)
    model = models(cfg)[build == "parallel"]
    batch = batch_of(6, cfg)
    with torch.no_grad():
        for _ in range(3):  # running averages that mean something
            model(batch.features_BTF, batch.frames_B)
        together, lengths = model.eval()(batch.features_BTF, batch.frames_B)
        for i, length in enumerate(lengths.tolist()):
            one = batch.rows([i])
            alone, (alone_length,) = model(one.features_BTF, one.frames_B)
            assert length == alone_length == len(alone)
            assert_equal({"y": alone[:, 0]}, {"y": together[:length, i]})


def test_the_two_recurrences_make_the_same_network():
    """Forward and backward of the whole network, by the loop and by the function."""
    plain, parallel = models(config())
    batch = batch_of()
    for model in (plain, parallel):
        loss_of(model, batch).backward()
    assert_equal(grads_of(parallel), grads_of(plain))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), kernel=st.sampled_from([1, 3, 5, 11]), stride=st.integers(1, 4))
def test_the_arithmetic_of_lengths(size, kernel, stride):
    """Every length comes out of a convolution as the one function says."""
    cfg = config(convolutions=((1, (kernel, 1), (stride, 1)),), hidden_size=2, layers=1)
    convolution = ds.DeepSpeech2(cfg).convolutions[0]
    assert convolution(torch.zeros(1, 1, size, 12)).shape[2] == cfg.after(size, 0)
    assert torch.equal(cfg.after(torch.tensor([size]), 0), torch.tensor([cfg.after(size, 0)]))


def test_the_papers_front_end():
    """161 bins become 81, 41 and 21; the shapes of the three convolutions."""
    cfg = ds.SpeechConfig(**ds.SIZES["paper"])
    assert [cfg.after(cfg.features, 1, n) for n in range(4)] == [161, 81, 41, 21]
    assert cfg.after(1000, 0) == 500


def test_row_convolution():
    """The formula, feature by feature; frame t knows nothing of what comes after t + τ, nor of what came before t."""
    layer = ds.RowConvolution(4, 3).double()
    nn.init.normal_(layer.weight)
    x = random(9, 2, 4).requires_grad_()
    padded = torch.cat([x, torch.zeros(3, 2, 4)])
    expected = torch.stack(
        [sum(layer.weight[:, j] * padded[t + j] for j in range(4)) for t in range(9)]
    )
    y = layer(x)
    assert_equal({"y": y}, {"y": expected})
    (grad,) = torch.autograd.grad(y[4, 0, 1], x)
    assert grad.nonzero().tolist() == [[t, 0, 1] for t in range(4, 8)]


def bidirectional(x, weight):
    """The whole layer on a single device, by the plain loop."""
    h = ds.plain_recurrence(torch.stack([x, x.flip(0)], 1), weight)
    return h[:, 0] + h[:, 1].flip(0)


def time_parallel_case(T: int, upstream_of=lambda y: y):
    """Output, gradient of this rank's frames, and of the weight: cut in time, and on a single device."""
    N, r = dist.get_world_size(), dist.get_rank()
    lengths = torch.tensor([T, max(1, T // 2), 1], device=ranks.device)
    x = random(T, 3, 5) * 3 * ds.valid_frames(lengths, T)[..., None]
    weight, upstream = random(2, 5, 5, seed=2) / 2, random(T, 3, 5, seed=3)
    a, b = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    expected, y = bidirectional(*a), ds.time_parallel_birnn(b[0].tensor_split(N)[r], b[1])
    expected.backward(upstream)
    y.backward(upstream.tensor_split(N)[r])
    own = lambda z: z.tensor_split(N)[r]  # noqa: E731
    here = {"y": y, "x": own(b[0].grad), "weight": b[1].grad}
    there = {"y": own(expected), "x": own(a[0].grad), "weight": a[1].grad}
    return here, there


@EVERY_WORLD
@pytest.mark.parametrize("T", [2, 3, 8, 21])
def test_the_layer_cut_in_time(T):
    """Any number of ranks, frames that they do not divide, fewer frames than ranks, utterances that end anywhere."""
    here, there = time_parallel_case(T)
    nothing = [name for name, x in there.items() if not x.numel()]
    assert nothing == ([] if T >= dist.get_world_size() or dist.get_rank() < T else ["y", "x"])
    for name in nothing:
        assert here.pop(name).shape == there.pop(name).shape
    zeros = {name: 1e-12 for name, x in there.items() if x.numel() and not x.any()}
    assert_equal(here, there, zeros=zeros)


@pytest.mark.ranks(2, 3, 4)
def test_messages_of_the_layer_cut_in_time():
    """A boundary state for each neighbour and direction, forward and backward; the weight's gradient once."""
    N, r, state = dist.get_world_size(), dist.get_rank(), 3 * 5 * 8
    with ds.Counter() as counter:
        time_parallel_case(8)
    neighbours = (r > 0) + (r < N - 1)
    assert [m.bytes for m in counter.messages if m.op == "send"] == [state] * 2 * neighbours
    assert [m.bytes for m in counter.messages if m.op == "all_reduce"] == [2 * 5 * 5 * 8]


def blocking(operations):
    """Each batch's receives posted, then sends that wait for their receiver: shows every true deadlock."""
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


# ── 2.6 Decoding ────────────────────────────────────────────────────────────────────────────────────────


def texts_of_all_paths(log_probs_TV: torch.Tensor) -> dict[str, float]:
    """Every text's log-probability, by looking at every path."""
    T, V = log_probs_TV.shape
    found: dict[str, list] = {}
    for path in itertools.product(range(V), repeat=T):
        text = " ".join("".join(ds.ALPHABET[symbol] for symbol in says(path)).split())
        found.setdefault(text, []).append(log_probs_TV[range(T), list(path)].sum())
    return {text: torch.logsumexp(torch.stack(terms), 0).item() for text, terms in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_without_a_limit_is_exact(seed):
    """Symbols _, space, ', a in six frames: every text, with its probability, in order."""
    x = (random(6, 4, seed=seed) * 2).log_softmax(-1)
    found, expected = dict(ds.beam_search(x, beam=10**6, cutoff=1.0)), texts_of_all_paths(x)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[text], log_p, rel_tol=1e-10) for text, log_p in expected.items())
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_beam_search_with_a_language_model_is_exact():
    """Q = log P + α log P_lm + β words of every text, the language model's part computed from the words at once."""
    lm = ds.NGram(["a a' a", "a' a", "a"], order=2)
    x = (random(6, 4, seed=5) * 2).log_softmax(-1)
    found = dict(ds.beam_search(x, beam=10**6, lm=lm, alpha=0.7, beta=0.3, cutoff=1.0))
    for text, log_p in texts_of_all_paths(x).items():
        words = text.split()
        q = log_p + sum(
            0.7 * lm.score(tuple(words[:i]), word) + 0.3 for i, word in enumerate(words)
        )
        assert math.isclose(found[text], q, rel_tol=1e-10), text
    assert found.keys() == texts_of_all_paths(x).keys()


def test_beam_search_prefers_the_text_to_the_path():
    """The most probable path says nothing, yet "a" is the more probable text: 0.4 · 0.4 + 2 · 0.6 · 0.4 = 0.64."""
    p = torch.zeros(2, 29)
    p[:, 0], p[:, 3] = 0.6, 0.4
    assert ds.greedy(p.log()) == "" and ds.beam_search(p.log())[0][0] == "a"
    assert math.isclose(math.exp(ds.beam_search(p.log())[0][1]), 0.64, rel_tol=1e-6)
    assert ds.greedy(torch.zeros(0, 29)) == "" == ds.beam_search(torch.zeros(0, 29))[0][0]


def test_a_language_model_repairs_a_word():
    x = torch.full((9, 29), -12.0)
    for t, letter in enumerate("tvo _one_"):
        x[t, ds.ALPHABET.index(letter)] = 0
    x[1, ds.ALPHABET.index("w")] = -0.5
    lm = ds.NGram(["two one", "one two", "two"])
    assert ds.greedy(x) == "tvo one" and ds.beam_search(x.log_softmax(-1), lm=lm)[0][0] == "two one"


def test_the_n_gram_is_a_distribution():
    """For any history the words and the unknown one add up to 1; what was seen is more probable than what was not."""
    lm = ds.NGram(["one two three", "one two one", "three"], order=3)
    for history in ((), ("one",), ("one", "two"), ("never", "heard"), ("never", "two")):
        assert math.isclose(
            sum(math.exp(lm.score(history, w)) for w in [*lm.words, "unheard-of"]),
            1.0,
            rel_tol=1e-12,
        )
    assert (
        lm.score(("one", "two"), "three")
        > lm.score(("one", "two"), "two")
        > lm.score(("one", "two"), "unheard-of")
    )
    assert lm.score((), "one") == lm.score(("<s>", "<s>"), "one")
    assert math.isclose(
        math.exp(ds.NGram(["a a b"], order=1).score((), "a")), (1.5 + 0.5 * 2 / 3) / 3
    )


def test_word_error_rate():
    rate = ds.word_error_rate
    assert rate(["one two three"], ["one two three"]) == 0 and rate(["one two"], [""]) == 1
    assert rate(["one two three four"], ["one too three four five"]) == 0.5
    assert rate(["a b", "c"], ["b", "c"]) == 1 / 3 and rate(["a"], ["a b c"]) == 2
    with pytest.raises(ValueError, match="no word"):
        rate([""], ["one"])


# ── 3 and 4: weights, sound, order ──────────────────────────────────────────────────────────────────────


def test_a_saved_model_is_the_same_model(tmp_path):
    model = ds.parallel_model(config(dropout=0.1, bidirectional=False))
    batch = ds.small_batch(4, config())
    model(batch.features_BTF, batch.frames_B)
    ds.save_model(str(tmp_path / "m"), model, ["one two", "three"])
    loaded, texts = ds.load_model(str(tmp_path / "m"))
    assert texts == ["one two", "three"] and loaded.config == model.config and not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.ranks(2, 4)
def test_ranks_that_have_drifted_apart_are_found():
    model = ds.parallel_model(config())
    ds.check_replicas(model)
    if dist.get_rank() == 1:
        model.layers[1].norm.running_mean[3] += 1e-3
    with pytest.raises(
        ValueError,
        match=r"layers.1.norm.running_mean should be the same on every rank, but differs by 1.0e-03",
    ):
        ds.check_replicas(model)


def test_a_model_that_was_interrupted_as_it_was_written(tmp_path):
    """Ctrl-C between the file and its place: the older one stands there, and nothing beside it."""
    path, model = tmp_path / "m", ds.parallel_model(config())
    ds.save_model(str(path), model, ["one"])
    before = path.read_bytes()

    def interrupted(aside, path):
        assert aside.exists()
        raise KeyboardInterrupt

    with plant(ds.os, "replace", interrupted), pytest.raises(KeyboardInterrupt):
        ds.save_model(str(path), model, ["two"])
    assert [file.name for file in tmp_path.iterdir()] == ["m"] and path.read_bytes() == before


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
    model, ring = models(config())[0], argparse.Namespace(finish=lambda: None)
    return ds.parallel_gradients(model, one_utterance(), ring=ring, group=group)


def a_training_step(group, ring_group):
    return next(
        ds.train(models(config())[0], [one_utterance()], lambda step: 0.01, group, ring_group)
    )


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
    """torch says that its group has −1 ranks: what it holds would be taken for the sum. The rank inside is alone."""
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


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
)
def test_sortagrad(lengths, batch, world):
    """Epoch 0 by length, later ones the same batches shuffled; each utterance once; shares are a batch again."""
    first, *later = (ds.sortagrad_batches(lengths, batch, epoch, seed=3) for epoch in range(3))
    order = [lengths[i] for b in first for i in b]
    assert order == sorted(lengths) and sorted(i for b in first for i in b) == list(
        range(len(lengths))
    )
    for batches in [*later, ds.sortagrad_batches(lengths, batch, 0, seed=3, sort=False)]:
        assert sorted(map(tuple, batches)) == sorted(map(tuple, first))
    for b in first:
        shares = [ds.share_of(b, lengths, r, world) for r in range(world)]
        assert (
            sorted(itertools.chain(*shares)) == sorted(b)
            and max(map(len, shares)) - min(map(len, shares)) <= 1
        )


def test_learning_rates():
    assert ds.learning_rate(0, 10, 20, 6e-4) == ds.learning_rate(9, 10, 20, 6e-4) == 6e-4
    assert math.isclose(ds.learning_rate(25, 10, 20, 6e-4), 6e-4 / 1.44)
    rate = partial(ds.learning_rate, epoch_steps=100, epochs=10, peak=3e-3, kind="adamw")
    assert rate(0) == 3e-5 and math.isclose(rate(500), 1.5e-3) and rate(1000) < 1e-12


def test_spectrogram():
    """Sizes, a tone in its bin, loudness has no say; the paper's 161 bins at 16 kHz."""
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)
    tone = tone * (1 + torch.sin(2 * math.pi * 3 * torch.arange(16_000) / 16_000))
    x = ds.log_spectrogram(tone)
    assert x.shape == (1 + (16_000 - 320) // 160, 161)
    assert x.std(0).argmax() in (19, 20, 21)  # 1,000 Hz stands in bin 20; only it moves
    assert (
        torch.allclose(x, ds.log_spectrogram(100 * tone), atol=1e-4)
        and x.mean(0).abs().max() < 1e-4
    )
    assert ds.log_spectrogram(tone[:7], 8000, 40).shape == (1, 40)
    assert torch.isfinite(ds.log_spectrogram(torch.zeros(4000), 8000, 40)).all()
    assert ds.log_spectrogram(torch.rand(8000), 8000, 40).std(0).min() > 0  # no band is empty


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.0])
def test_noise_has_the_power_that_was_asked_for(snr):
    wave, noise = random(5000), random(700, seed=2) * 13
    added = ds.mix_noise(wave, noise, snr) - wave
    assert math.isclose(
        10 * math.log10(wave.square().mean() / added.square().mean()), snr, abs_tol=1e-9
    )
    with pytest.raises(ValueError, match="no power"):
        ds.mix_noise(wave, torch.zeros(5), 3.0)


def test_resampling_keeps_the_tone():
    for rate in (16_000, 11_025, 44_100, 8000):
        at, there = (
            torch.arange(rate, dtype=torch.float64) / rate,
            torch.arange(8000, dtype=torch.float64) / 8000,
        )
        wave = ds.resample(torch.sin(2 * math.pi * 500 * at), rate, 8000)
        assert_equal({"wave": wave}, {"wave": torch.sin(2 * math.pi * 500 * there)})


def test_speech_is_a_function_of_the_seed():
    a, b, c = (ds.Speech.synthetic(3, config(), seed) for seed in (1, 1, 2))
    assert (
        a.texts == b.texts
        and all(torch.equal(x, y) for x, y in zip(a.waves, b.waves))
        and a.texts != c.texts
    )
    first, again, other = (a.batch([1, 2], config(), key) for key in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(first.features_BTF, again.features_BTF)
    assert first.features_BTF.shape != other.features_BTF.shape or not torch.equal(
        first.features_BTF, other.features_BTF
    )
    swapped = a.batch(
        [2], config(), (0, 1)
    )  # distortion belongs to the utterance, whatever batch it is in
    assert torch.equal(swapped.features_BTF[0], first.features_BTF[1, : swapped.frames_B[0]])


# ── 5 The papers' arithmetic ────────────────────────────────────────────────────────────────────────────


def test_the_same_size_nets():
    """Four nets of "38 million": within 4 %. One number is checked against the built network."""
    counts = [ds.parameter_count(*net) / 1e6 for net in ds.SAME_SIZE]
    assert [round(count, 1) for count in counts] == [38.9, 38.7, 39.2, 38.3]
    cfg = config(layers=3, hidden_size=8)
    layers = ds.DeepSpeech2(cfg).layers
    assert (
        sum(p.numel() for layer in layers[1:] for p in (layer.input.weight, layer.weight))
        == 2 * 3 * 8**2
    )


def test_tables_that_must_agree_with_themselves():
    assert sum(ds.ENGLISH_HOURS.values()) == 11_940
    shares = [ds.noisy_share(*rates) for rates in ds.NOISY_SPEECH.values()]
    assert len(shares) == 5 and max(shares) - min(shares) < 5e-4 and abs(shares[0] - 0.423) < 5e-4
    assert (
        abs((12.6 + 19.3) / 2 - 16.0) < 0.051 and (20.0 + 31.8) / 2 == 25.9
    )  # Switchboard and CallHome: full


def test_the_cut_in_time_takes_as_many_slots_as_ranks():
    """N slots of T / N steps: T steps, where one rank has 2T to do. A slot ends with an exchange."""
    for N, r in ((world, rank) for world in (1, 2, 3, 4, 7) for rank in range(world)):
        slots, ended = {}, []

        def compute(direction, state, slots=slots, ended=ended):
            slots[direction.start] = len(ended)
            return state

        with (
            plant(ds, "group_size", lambda group=None, N=N: N),
            plant(ds, "group_rank", lambda group=None, r=r: r),
            plant(ds, "_exchange", lambda messages, group, ended=ended: ended.append(messages)),
        ):
            ds._wave(compute, torch.zeros(2, 1, 1), 0, None)
        assert slots == {0: r, 1: N - 1 - r} and len(ended) == N


# ── Planted bugs: what a missing safeguard looks like ───────────────────────────────────────────────────


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
    original = ds._lattice

    def lattice(log_y, skip_SP, first):
        skip = torch.zeros_like(skip_SP)
        skip[1:-1] = True
        return original(log_y, skip, first)

    args = torch.tensor([[1, 2, 3], [1, 1, 2]]), [6, 6], [3, 3]
    right, grad = logits_gradient(F.ctc_loss, random(6, 2, 4), *args)
    with plant(ds, "_lattice", lattice):
        wrong, wrong_grad = logits_gradient(ds.ctc_loss, random(6, 2, 4), *args)
    assert math.isclose(wrong[0], right[0], rel_tol=1e-12) and wrong[1] < right[1] - 0.1
    assert_equal({"no repeat": wrong_grad[:, 0]}, {"no repeat": grad[:, 0]})
    return Shows(
        off(wrong[1], right[1]), worst_of({"repeat": wrong_grad[:, 1]}, {"repeat": grad[:, 1]})
    )


@pytest.mark.planted_bug(
    symptom="the loss is right; after the step every weight is NaN", seen_in="https://github.com/pytorch/pytorch/issues/14335"
)  # fmt: skip
def test_minus_infinity_for_the_impossible():
    """A letter of probability 0 in one frame: where alpha and beta are put together, ∞ − ∞ is NaN."""
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
    symptom="short utterances are right; from some 200 frames on the loss is infinite", seen_in="https://github.com/pytorch/pytorch/issues/14401"
)  # fmt: skip
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
    symptom="an utterance's loss depends on how much padding its batch has", seen_in="https://github.com/SeanNaren/deepspeech.pytorch/issues/312"
)  # fmt: skip
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
    """Its squares and sums have 8 bits; the output need not have more, but what it is made of must."""
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
    """One step on these ranks and on a single device, nothing clipped: the two losses and the two sets of gradients."""
    options = dict(lr=lambda step: 0.01, max_norm=1e9)
    ((loss, _),) = ds.train(parallel, [mine(batch)], ring_group=ring_group(), **options)
    ((expected, _),) = ds.train_alone(plain, [batch], **options)
    return (loss, expected), (grads_of(parallel), grads_of(plain))


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the loss is right to the last digit, gradients below every BatchNorm are not",
    seen_in=None,
)
def test_statistics_that_are_reduced_forward_only():
    plain, parallel = models(config())
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
    symptom="nearly right: the utterances of a rank that has fewer count for more", seen_in="https://github.com/huggingface/transformers/issues/34191"
)  # fmt: skip
def test_the_average_of_unequal_shares():
    cfg = config(batch_norm=False)
    for utterances in (6, 7):  # with equal shares nobody would notice
        plain, parallel = models(cfg)
        batch = batch_of(7, cfg).rows(range(utterances))
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
    symptom="short utterances are heard differently in the company of long ones; alone they are right",
    seen_in=None,
)
def test_a_backward_direction_that_starts_in_the_padding():
    """Padding that is not zero behind the norm wakes the backward direction before the utterance's true end."""
    model, batch = models(config())[1].eval(), batch_of(6)
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
    symptom="outputs are right; what should cross the cut in backward is missing from every gradient",
    seen_in=None,
)
def test_an_exchange_outside_the_graph():
    original = ds._wave

    def wave(compute, state, up, group):
        if up == 0:
            return original(compute, state, up, group)
        for direction in (slice(0, 1), slice(1, 2)):
            compute(
                direction, state[direction]
            )  # nothing arrives, as if the state had been a constant

    with plant(ds, "_wave", wave):
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

    def exchange(messages, group):
        for way, x, peer in sorted(messages, key=lambda message: message[0] is dist.irecv):
            (dist.send if way is dist.isend else dist.recv)(x, peer, group=group)

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
    symptom="the last, short batch of an epoch: who has no utterance goes on, and the others wait for it",
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
    """Rank 1 sends the gradient of `b` while rank 0 sends that of `a`, of the same size: both are summed."""
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
    plain, parallel = models(config(batch_norm=False))
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


@pytest.mark.planted_bug(
    symptom="the net trains; but what it writes at t uses the past and not the future", seen_in=None
)
def test_a_row_convolution_padded_on_the_wrong_side():
    layer, original, results = ds.RowConvolution(3, 2).double(), F.pad, []
    nn.init.normal_(layer.weight)
    for pad in (original, lambda y, sides: original(y, sides[::-1])):
        x = random(7, 1, 3).requires_grad_()
        with plant(F, "pad", pad):
            y = layer(x)
        (grad,) = torch.autograd.grad(y[4, 0, 0], x, retain_graph=True)
        layer.zero_grad()
        loss = y.square().mean()
        loss.backward()
        results.append(
            (
                grad[:, 0, 0].nonzero().flatten().tolist(),
                loss,
                {"weight": layer.weight.grad.clone()},
            )
        )
    (reach, expected, right), (wrong_reach, loss, wrong) = results
    assert reach == [4, 5, 6] and wrong_reach == [2, 3, 4]
    assert_differs(wrong, right)
    return Shows(off(loss, expected), worst_of(wrong, right))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the sum points elsewhere; hidden wherever nothing is clipped", seen_in=None
)
def test_clipping_before_the_sum():
    plain, parallel = models(config())
    batch, options, original = (
        batch_of(7),
        dict(lr=lambda step: 0.01, max_norm=0.1),
        ds.GradientRing._sum,
    )

    def clipped_sum(self, bucket):  # the network fits into one bucket
        assert len(self.buckets) == 1
        nn.utils.clip_grad_norm_(bucket, 0.1)
        original(self, bucket)

    ((expected, norm),) = ds.train_alone(plain, [batch], **options)
    with plant(ds.GradientRing, "_sum", clipped_sum):
        ((loss, _),) = ds.train(parallel, [mine(batch)], ring_group=ring_group(), **options)
    assert norm > 0.1
    assert_differs(grads_of(parallel), grads_of(plain))
    return Shows(off(loss, expected), worst_of(grads_of(parallel), grads_of(plain)))


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change, message", [
    (dict(layers=0), "layers=0"), (dict(cell="lstm"), "cell='lstm'"), (dict(dropout=1.0), "dropout=1.0"),
    (dict(convolutions=((3, (4, 5), (1, 1)),)), "odd sizes"), (dict(convolutions=((3, (5, 5), (0, 1)),)), "at least 1"),
    (dict(convolutions=()), "one convolution or more"), (dict(bins=-1), "bins=-1"),
])  # fmt: skip
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
            "target 4 is the blank 0 or no symbol",
        ),
        ((torch.tensor([[1, 0], [3, 1]]), [5, 5], [2, 2]), {}, "target 0 is the blank"),
        (
            (two, [5, 6], [2, 2]),
            {},
            r"input_lengths \[5, 6\], target_lengths \[2, 2\]: there are 5 frames",
        ),
        ((two, [5, 5], [2, 3]), {}, "targets have 2 columns"),
        ((two, [5], [2, 2]), {}, "do not fit log_probs of 2 utterances"),
        ((two.flatten(), [5, 5], [2, 1]), {}, "4 targets in one row, but target_lengths sum to 3"),
        ((two, [5, 5], [2, 2]), dict(reduction="max"), "reduction='max'"),
        ((two, [5, 5], [2, 2]), dict(blank=4), "blank=4"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ds.ctc_loss(x, *args, **options)
    assert (
        ds.ctc_loss(x, torch.tensor([[1, 0], [3, 9]]), [5, 5], [1, 1]) > 0
    )  # behind the end anything goes


@pytest.mark.ranks(1, 2)
def test_the_network_and_the_ring_refuse_on_every_rank():
    with pytest.raises(ValueError, match="spectrograms of 11 bins for a network of 12"):
        ds.parallel_model(config())(torch.zeros(1, 20, 11), torch.tensor([20]))
    with pytest.raises(ValueError, match="0 valid frames on all ranks"):
        ds.SequenceBatchNorm(3)(torch.zeros(4, 0, 3), torch.zeros(4, 0, dtype=torch.bool))
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match="a group of its own"):
            ds.GradientRing(ds.parallel_model(config()).parameters())
    with pytest.raises(ValueError, match="beam=0"):
        ds.beam_search(torch.zeros(3, 29), beam=0)
    with pytest.raises(ValueError, match="no word in it"):
        ds.NGram(["", " "])


def write(folder, *lines, audio=None, rate=8000, name="a.wav"):
    import soundfile

    soundfile.write(
        folder / name, np.zeros(4000) if audio is None else audio, rate, subtype="FLOAT"
    )
    (folder / "m.jsonl").write_text("\n".join(lines), "utf-8")
    return str(folder / "m.jsonl")


def entry(audio="a.wav", text="one", **more) -> str:
    return json.dumps({"audio_filepath": audio, "duration": 0.5, "text": text} | more)


@pytest.mark.parametrize("lines, message", [
    ([], "m.jsonl holds no utterance"), (["", "  "], "holds no utterance"),
    ([entry(), "not json"], "line 2: JSONDecodeError.* a line looks like"), ([entry(), "[1]"], "line 2: TypeError"),
    ([json.dumps({"text": "one"})], "line 1: KeyError"), ([entry(text=5)], "line 1: AttributeError"),
    ([entry(), "", entry(text="naïve 3")], r"line 3: \['3', 'ï'\] not in the alphabet"),
    ([entry("b.wav")], "line 1: there is no file .*b.wav"),
])  # fmt: skip
def test_manifests_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        ds.read_manifest(write(tmp_path, *lines))


def test_manifests_that_can_be_used(tmp_path):
    """Large letters, many spaces, further keys, empty lines and an empty text; the path is relative to the manifest."""
    path = write(tmp_path, entry(text="  One  TWO "), "", entry(text="", speaker="me"))
    assert ds.read_manifest(path) == [
        (str(tmp_path / "a.wav"), "one two", 1),
        (str(tmp_path / "a.wav"), "", 3),
    ]
    with pytest.raises(FileNotFoundError):
        ds.read_manifest(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_audio_of_any_kind(tmp_path, rate, channels, name):
    import soundfile

    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / name, np.stack([tone] * channels, 1), rate)
    wave = ds.load_audio(str(tmp_path / name), 8000)
    assert wave.shape == (8000,) and wave.dtype == torch.float32
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(8000) / 8000)
    assert (wave - expected)[100:-100].abs().max() < 1e-2


def test_audio_that_cannot_be_used(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"this is no audio at all" * 50)
    for name, message in (
        ("noise.wav", "noise.wav cannot be read as audio"),
        ("gone.wav", "gone.wav cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            ds.load_audio(str(tmp_path / name), 8000)
    bad = np.zeros(4000)
    bad[7] = np.nan
    write(tmp_path, audio=bad)
    with pytest.raises(ValueError, match=r"a.wav: 4000 samples, of which 1 are not finite"):
        ds.load_audio(str(tmp_path / "a.wav"), 8000)
    write(tmp_path, audio=np.zeros(0))
    with pytest.raises(ValueError, match="a.wav: 0 samples"):
        ds.load_audio(str(tmp_path / "a.wav"), 8000)
    for name, content in (("noise.wav", "cannot be read as audio"), ("a.wav", "a.wav: 0 samples")):
        path = write(tmp_path, entry("b.wav"), "", entry(name), audio=np.zeros(4000), name="b.wav")
        with pytest.raises(ValueError, match=f"m.jsonl, line 3: .*{content}"):
            ds.Speech.from_manifest(path, config(), print)


def test_texts_that_are_too_long_are_left_out_aloud(tmp_path):
    """0.5 s are 49 frames, 25 behind the stride: 25 letters fit, 24 with a repeat, not 25 with one."""
    long, heard = "abcdefghijklmnopqrstuvwxyz"[:25], []
    path = write(
        tmp_path, entry(text=long), entry(text=long[:24] + "z"), entry(text="aa" + long[2:25])
    )
    speech = ds.Speech.from_manifest(path, config(), heard.append)
    assert speech.texts == [long, long[:24] + "z"]
    assert (
        len(heard) == 1
        and "left out 1 of 3 utterances" in heard[0]
        and heard[0].endswith("a.wav, line 3")
    )
    with pytest.raises(ValueError, match="no utterance that is long enough"):
        ds.Speech.from_manifest(write(tmp_path, entry(text="a" * 99)), config(), heard.append)


def test_files_that_are_no_model(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="holds no model that --save has written"):
            ds.load_model(str(tmp_path / name))


# ── Real speech, where it is ────────────────────────────────────────────────────────────────────────────

DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "digits"


@pytest.mark.skipif(
    not DIGITS.exists(), reason=f"needs recordings of people, {DIGITS}/train.jsonl and dev.jsonl"
)
def test_recordings_of_people():
    """Every utterance can be read, is long enough for its text, and is distorted to something of a similar size."""
    cfg, heard = ds.SpeechConfig(**ds.SIZES["digits"]), []
    speech = ds.Speech.from_manifest(str(DIGITS / "dev.jsonl"), cfg, heard.append)
    assert not heard and len(speech.texts) == 100
    plain, other = (speech.batch(list(range(100)), cfg, key) for key in (None, (0, 0)))
    assert (
        torch.isfinite(other.features_BTF).all()
        and 0.6 < other.frames_B.sum() / plain.frames_B.sum() < 1.5
    )
    loss = loss_of(ds.parallel_model(cfg), other)
    assert torch.isfinite(loss)


# ── Whole scripts ───────────────────────────────────────────────────────────────────────────────────────


def refused(flags: list[str], capsys, monkeypatch) -> str:
    """The one line with which flags are refused, behind the usage."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit, match="2"):
        ds.flags()
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and line.startswith("deepspeech.py: error: ")
    return line


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs: '0' must be"), (["--load", "x"], "--load goes with"),
    (["--dev", "x"], "--dev with --data"), (["--data", "/nowhere/at/all"], "No such file"),
    (["--beam", "0"], "--beam: '0' must be"), (["--lr", "nan"], "--lr: 'nan' must be"),
    (["--lr", "inf"], "--lr: 'inf' must be"), (["--lr", "-1"], "--lr: '-1' must be"),
    (["--max-norm", "0"], "--max-norm: '0' must be"), (["--beta", "inf"], "--beta: 'inf' must be"),
    (["--save", "/nowhere/at/all"], "its folder does not exist"), (["--evaluate", "x"], "--load goes with"),
    (["--load", "x", "--evaluate", "x", "--check"], "leave --data, --save and --check out"),
    (["--load", "x", "--evaluate", "x", "--data", "x"], "leave --data, --save and --check out"),
    (["--load", "x", "--evaluate", "x", "--save", "x"], "leave --data, --save and --check out"),
    (["--load", "/nowhere/at/all", "--evaluate", "x"], "No such file"),
    (["--model", '{"layers": 0}'], "layers=0"), (["--model", '{"u": 3}'], "'u'"), (["--model", "{"], "--model {: "),
    (["--model", '{"layers": 1.5}'], "layers=1.5 must be of type int"), (["--model", "[1]"], "object is needed"),
    (["--model", "null"], "object is needed"), (["--model", '{"layers": true}'], "layers=True must be of type int"),
    (["--model", '{"dropout": NaN}'], "dropout at least 0"), (["--model", '{"dropout": "0"}'], "must be of type float"),
    (["--model", '{"bidirectional": "no"}'], "must be of type bool"), (["--model", '{"cell": 3}'], "of type str"),
    (["--model", '{"convolutions": "ab"}'], "must be of type tuple"), (["--model", '{"lookahead": null}'], "type int"),
    (["--model", '{"convolutions": [[8, 3, 2]]}'], "convolution [8, 3, 2]: it must be channels, [frames, bins]"),
    (["--model", '{"convolutions": [[8, [3.0, 3], [2, 2]]]}'], "convolution [8, [3.0, 3], [2, 2]]"),
    (["--model", '{"hidden_size": 1e400}'], "hidden_size=inf"), (["--model", '{"sample_rate": 10}'], "a sample rate"),
    (["--model", '{"seed": -1}'], "a seed from 0"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line_before_any_rank_starts(flags, message, capsys, monkeypatch):
    assert message in refused(flags, capsys, monkeypatch)


def test_a_model_that_does_not_fit_is_one_line_before_any_rank_starts(
    tmp_path, capsys, monkeypatch
):
    """Weights of another size than the file's configuration says, or of another alphabet."""
    path, wave = str(tmp_path / "model"), str(tmp_path / "a.wav")
    write(tmp_path)
    model = ds.parallel_model(config())
    use = ["--load", path, "--transcribe", wave]
    model.config = config(hidden_size=11)
    ds.save_model(path, model, ["one"])
    line = refused(use, capsys, monkeypatch)
    assert f"{path} holds no model" in line and "size mismatch" in line
    model.config = config()
    with plant(ds, "ALPHABET", ds.ALPHABET.replace("ab", "ba")):
        ds.save_model(path, model, ["one"])
    line = refused(use, capsys, monkeypatch)
    assert (
        f"{path} holds no model" in line
        and "its alphabet is \"_ 'bac" in line
        and "it is \"_ 'abc" in line
    )
    model.config.layers = 1.5
    ds.save_model(path, model, ["one"])
    assert "layers=1.5 must be of type int" in refused(use, capsys, monkeypatch)


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


@pytest.mark.parametrize(
    "save, message", [([], "after step 2$"), (["--save", "m"], "2; nothing was saved in m$")]
)
def test_an_interrupted_run_says_after_which_step(save, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def two_steps(*args, **options):
        yield from [(torch.ones(()), torch.ones(()))] * 2
        raise KeyboardInterrupt

    with plant(ds, "train", two_steps), plant(ds, "wait_for_all", lambda: None):
        with pytest.raises(KeyboardInterrupt, match=message):
            ds.demonstrate(arguments(monkeypatch, *save), torch.device("cpu"), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks(2)
def test_ranks_that_read_or_search_longer_than_others_are_waited_for():
    """Reading and searching have no messages, so no time limit: each ends in wait_for_all, before the next message."""
    called, original = [], ds.transcribe

    def transcribe(*args):
        called.append("search")
        return original(*args)

    def learn(*args, **options):
        called.append("train")
        yield from [(torch.ones(()), torch.ones(()))] * 2

    def gather(every, found):
        called.append("gather")
        return real_gather(every, found)

    real_gather, argv = dist.all_gather_object, [str(SCRIPT), "--beam", "1"]
    with (
        plant(sys, "argv", argv),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.ExitStack() as stack,
    ):
        args = ds.flags()
        for target, name, double in (
            (ds, "transcribe", transcribe), (ds, "train", learn), (ds, "wait_for_all", lambda: called.append("wait")),
            (dist, "all_gather_object", gather), (ds, "check_replicas", lambda model: called.append("check")),
        ):  # fmt: skip
            stack.enter_context(plant(target, name, double))
        ds.demonstrate(args, torch.device("cpu"), None)
    assert called == ["wait", "train", "check", "search", "wait", "gather"]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_check(dtype):
    """What --check runs on every rank: every tensor's error, and an exit code of 0 where all are within the bound."""
    args = dict(
        check=True,
        dtype=dtype,
        device=ranks.device.type,
        backend=dist.get_backend(),
        seed=0,
        timeout=60.0,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        ds.main(argparse.Namespace(**args), ranks.device)
    assert stop.value.code == 0, printed.getvalue()
    assert (
        dist.get_rank() > 0
        or f"bound {ds.BOUNDS[dtype]:.0e}; 3 ranks, {dtype}" in printed.getvalue()
    )


@pytest.mark.parametrize("flags", [[], ["--save", "m"], ["--seed", "3"], ["--epochs", "1"], ["--size", "digits"],
    ["--beam", "1"], ["--steps", "1"], ["--model", '{"layers": 2}']], ids=str)  # fmt: skip
def test_words_that_are_wrong_are_judged_in_the_default_run_alone(flags, monkeypatch, tmp_path):
    """Of another run nobody knows what to expect; where half of the words are wrong, the default one has failed."""
    monkeypatch.chdir(tmp_path)
    errors = dict.fromkeys(("gradient", "norm", "after", "CTC", "cut"), 0.0)
    rows = ds.claims(arguments(monkeypatch, *flags), errors, 0, [2.0, 1.0], 0.5, 0.5)
    verdicts = [
        verdict
        for claim, _, _, verdict in rows
        if "words wrong in speech" in claim or "the same with" in claim
    ]
    is_default = flags == [] or flags[0] in ("--save", "--seed")
    assert verdicts == ([False, False] if is_default else ["–", "–"])


@pytest.mark.slow
def test_train_save_evaluate_and_transcribe(tmp_path, capsys, monkeypatch):
    """Two ranks learn from files; one process reads the model, names its error rate, and writes what it hears."""
    import soundfile

    rng, lines = np.random.default_rng(3), []
    for i, words in enumerate(["one two", "three", "nine", "six"] * 4):
        soundfile.write(tmp_path / f"{i}.wav", 0.5 * ds.synthesize(words.split(), 8000, rng), 8000)
        lines.append(json.dumps(dict(audio_filepath=f"{i}.wav", duration=1.0, text=words)))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest, model = str(tmp_path / "m.jsonl"), str(tmp_path / "model.safetensors")
    small = '{"hidden_size": 8}'
    trained = scripts.run(
        SCRIPT, "--data", manifest, "--epochs", "2", "--distort", "--model", small, "--save", model
    )
    assert trained.returncode == 0, trained.stderr
    rate = next(line for line in trained.stdout.splitlines() if line.startswith("word error rate"))
    use = ["--load", model, "--evaluate", manifest, "--transcribe", str(tmp_path / "3.wav")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *use])
    ds.use_model(ds.flags())
    printed = capsys.readouterr().out
    assert rate in printed and "greedy  " in printed and "with beam search  " in printed
    (tmp_path / "0.wav").write_bytes(b"no audio")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", manifest])
    with pytest.raises(SystemExit, match="2"):
        ds.flags()
    message = capsys.readouterr().err.splitlines()[-1]
    assert "m.jsonl, line 1: " in message and "0.wav cannot be read as audio" in message


@pytest.mark.slow
def test_the_default_run():
    result = scripts.run(SCRIPT, timeout=180)
    assert result.returncode == 0 and "FAILED" not in result.stdout, result.stdout + result.stderr
