# SPDX-License-Identifier: MIT-0
"""Chapter 6 equals the single device: routing, experts on many ranks, the model after training.

A test marked `ranks` is what every rank of that world executes. The references are the plain model
and sums over all experts, written out. FP8 has its own file, test_06_fp8.py.
"""

import contextlib
import io
import math
import sys
import time
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import moe_fp8 as moe
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron_tp import Counter
from proof import Events, Shows, assert_differs, assert_equal, plant, worst_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SCRIPT = Path(moe.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)
LAYOUTS = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}  # world to ep
STEP = dict(alpha=0.05, gamma=0.02)  # large enough to be seen in five steps

# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> moe.MoEConfig:
    sizes = dict(
        vocab_size=61,
        hidden_size=16,
        num_heads=4,
        num_experts=8,
        expert_size=12,
        shared_size=20,
        init_std=0.05,
    )
    return moe.MoEConfig(**(sizes | changes))


def random(*shape, seed=1):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(ranks.device)


def grads_of(module: nn.Module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


def layer_of(cfg: moe.MoEConfig, kind=moe.MoELayer, *group) -> nn.Module:
    """A layer in float64, the same weights whatever its kind; scores that are far from equal."""
    torch.manual_seed(5)
    layer = kind(cfg, *group).to(ranks.device, torch.float64)
    with torch.no_grad():
        layer.router.weight.mul_(10)
        layer.router.bias.copy_(torch.linspace(-0.2, 0.2, cfg.num_experts))
    return layer


@lru_cache
def mesh_of(ep: int) -> moe.Mesh:
    return moe.make_mesh(ep, ranks.device)


def batch_of(rows: int, length: int = 7, seed: int = 1):
    """Tokens and targets of which rows count unequally: the first row's targets are mostly −100."""
    tokens, targets = torch.randint(
        61, (2, rows, length), generator=torch.Generator().manual_seed(seed)
    ).to(ranks.device)
    targets[0, 2:] = -100
    return tokens, targets


def joined(tensors: dict, group=None) -> dict:
    """All ranks' shares of one ep group, put together to whole tensors."""
    found = [None] * dist.get_world_size(group)
    # As NumPy's arrays: pickle takes far longer for tensors.
    arrays = {name: x.detach().cpu().numpy() for name, x in tensors.items()}
    dist.all_gather_object(found, arrays, group)
    shards = [{name: torch.from_numpy(x) for name, x in shard.items()} for shard in found]
    return moe.merge_state_dicts(shards)


def summed(x: torch.Tensor, group=None) -> torch.Tensor:
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def share_of(whole: torch.Tensor, how: str) -> torch.Tensor:
    """This rank's part of dimension 0: even, or a rank with nothing between ranks with much."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if how == "even":
        return whole.tensor_split(world)[rank]
    if how == "one rank has all":
        return whole if rank == world - 1 else whole[:0]
    first = len(whole) // 3  # rank 0 a third, rank 1 nothing, the others the rest
    cuts = {
        1: [0, len(whole)],
        2: [0, first, len(whole)],
        4: [0, first, first, len(whole) - 1, len(whole)],
    }[world]
    return whole[cuts[rank] : cuts[rank + 1]]


# ── What the chapter works through on the blackboard ──────────────────────────────────────────────


def test_the_token_of_section_1_1():
    router = moe.Router(config(hidden_size=4, num_experts=4, num_heads=2, top_k=2)).double()
    router.weight.data, router.bias[0] = (
        torch.diag(torch.tensor([2.0, 1.0, 0.5, -1.0], dtype=torch.float64)),
        -0.3,
    )
    experts, weights, scores = router(torch.ones(1, 4, dtype=torch.float64))
    assert experts.tolist() == [[1, 2]]
    assert [round(s, 2) for s in scores[0].exp().tolist()] == [0.88, 0.73, 0.62, 0.27]
    assert [round(w, 2) for w in weights[0].tolist()] == [1.35, 1.15]
    router.bias[0] = -0.25  # 0.26 was needed
    assert router(torch.ones(1, 4, dtype=torch.float64)).experts_TK.tolist() == [[1, 0]]


@pytest.mark.ranks(2)
def test_the_rows_of_section_1_6():
    """Tokens a b on rank 0, c d on rank 1: every line of the table."""
    rank = dist.get_rank()
    experts = torch.tensor([[[0, 2], [0, 1]], [[2, 3], [0, 3]]][rank], device=ranks.device)
    plan = moe.plan_dispatch(experts, 4)
    assert plan.order_R.tolist() == [[0, 2, 3, 1], [2, 0, 1, 3]][rank]
    assert plan.send == plan.receive == [[3, 1], [1, 3]][rank]
    assert (
        plan.order_r.tolist() == [[0, 1, 3, 2], [0, 1, 2, 3]][rank]
        and plan.counts == [[3, 1], [2, 2]][rank]
    )
    tokens = torch.tensor([ord(name) for name in ("ab", "cd")[rank]], device=ranks.device)
    assert (
        "".join(map(chr, moe.dispatch(tokens[:, None], plan)().flatten())) == ("abdb", "accd")[rank]
    )


# ── 1.1 The router ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_router_token_by_token(gate, top_k):
    """Every score, choice and weight, from Python's own numbers."""
    cfg = config(gate=gate, top_k=top_k, gate_scale=2.5)
    router, x = layer_of(cfg).router, random(7, 16)
    experts, weights, scores = router(x)
    for t in range(7):
        logits = [sum(a * b for a, b in zip(row, x[t].tolist())) for row in router.weight.tolist()]
        s = [1 / (1 + math.exp(-u)) for u in logits]
        if gate == "softmax":
            s = [math.exp(u) / sum(math.exp(v) for v in logits) for u in logits]
        chosen = sorted(range(8), key=lambda i: -(s[i] + router.bias[i].item()))[:top_k]
        assert experts[t].tolist() == chosen
        total = sum(s[i] for i in chosen) if top_k > 1 else 1
        expected = torch.tensor([2.5 * s[i] / total for i in chosen], dtype=torch.float64)
        assert_equal(
            {"weights": weights[t], "scores": scores[t].exp()},
            {"weights": expected, "scores": torch.tensor(s, dtype=torch.float64)},
        )
    assert router.counts.tolist() == [(experts == i).sum() for i in range(8)]
    router.eval()(x)
    assert router.counts.sum() == 7 * top_k  # evaluation does not count


def test_the_routers_gradient_is_the_formula():
    """dw_i/du_j = λ (δ_ij S − s_i)/S² · s_j (1 − s_j) for chosen i and j, and nothing for the
    others.
    """
    cfg = config(top_k=3)
    router, x = layer_of(cfg).router, random(1, 16)
    experts, weights, scores = router(x)
    chosen, s = experts[0], scores[0].detach().exp()
    total = s[chosen].sum()
    for place, i in enumerate(chosen):
        (grad,) = torch.autograd.grad(weights[0, place], router.weight, retain_graph=True)
        expected = torch.zeros_like(grad)
        for j in chosen:
            expected[j] = 2.5 * ((i == j) * total - s[i]) / total**2 * s[j] * (1 - s[j]) * x[0]
        assert_equal({"grad": grad}, {"grad": expected})


def test_one_expert_a_token_still_teaches_the_router():
    layer, x = layer_of(config(top_k=1)), random(1, 9, 16)
    layer(x)[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_is_wide_whatever_the_model_is(dtype):
    """In bf16 and under autocast: the choice and the weights of an fp32 router on the same x."""
    cfg = config(num_experts=64, top_k=6, hidden_size=64)
    torch.manual_seed(0)
    narrow, x = moe.Router(cfg).to(dtype), torch.randn(50, 64).to(dtype)
    wide = moe.Router(cfg)
    wide.load_state_dict(
        {name: value.to(torch.float32) for name, value in narrow.state_dict().items()}
    )
    expected = wide(x.to(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(narrow(x), expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(wide(x.to(torch.float32)), expected))


# ── 1.2 An even load ──────────────────────────────────────────────────────────────────────────────


def test_the_balancing_loss_written_out():
    scores = random(3, 5, 8).sigmoid()
    losses = moe.load_balancing_loss(scores.log(), 2)
    for b in range(3):
        f, p = [0.0] * 8, [0.0] * 8
        for t in range(5):
            s = scores[b, t].tolist()
            for i in sorted(range(8), key=lambda i: -s[i])[:2]:
                f[i] += 8 / (2 * 5)
            p = [old + value / sum(s) / 5 for old, value in zip(p, s)]
        assert abs(losses[b].item() - sum(a * b for a, b in zip(f, p))) < 1e-12


def test_the_balancing_loss_of_balanced_and_of_lopsided_scores():
    """1 where each token prefers another expert; E / K times their scores where all prefer two."""
    balanced = 0.1 + torch.eye(8, dtype=torch.float64)[None]
    one = torch.ones(1, dtype=torch.float64)
    assert_equal({"": moe.load_balancing_loss(balanced.log(), 1)}, {"": one})
    lopsided = torch.full((1, 8, 8), 1e-9, dtype=torch.float64)
    lopsided[..., :2] = 0.9
    expected = 4 * 1.8 / (1.8 + 6e-9) * one
    assert_equal({"": moe.load_balancing_loss(lopsided.log(), 2)}, {"": expected})


def test_the_balancing_losss_gradient_goes_through_the_shares_alone():
    """The counts are constants: the gradient is f_i · d share_i, by differences that leave the
    counts as they are.
    """
    scores = random(2, 5, 8).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: moe.load_balancing_loss(s.log(), 2), scores)


def test_the_bias_moves_against_the_load():
    router = moe.Router(config(num_experts=4))
    router.bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.25]))
    router.counts.copy_(torch.tensor([2, 0, 0, 1]))  # this rank's
    moe.update_expert_bias(
        [router], torch.tensor([[6, 3, 0, 3]]), gamma=0.125
    )  # of all ranks: the mean is 3
    assert router.bias.tolist() == [0.375, 0.0, -0.375, 0.25]
    assert not router.counts.any()


def test_every_bias_moves_by_the_sign_of_mean_minus_count():
    """In fractions, layer by layer, also where the mean is no whole number; an even load moves
    nothing.
    """
    counts = torch.randint(0, 9, (20, 7), generator=torch.Generator().manual_seed(0))
    counts[3:5] = 4
    routers = [moe.Router(config(num_experts=7)).double() for _ in counts]
    moe.update_expert_bias(routers, counts, gamma=0.5)
    for router, row in zip(routers, counts.tolist()):
        gaps = [Fraction(sum(row), 7) - count for count in row]
        assert router.bias.tolist() == [0.5 * ((gap > 0) - (gap < 0)) for gap in gaps]
    with pytest.raises(ValueError, match="shorter"):
        moe.update_expert_bias(routers, counts[:-1])  # a layer's counts are missing


def test_a_bias_in_which_steps_vanish_is_refused():
    router = moe.Router(config()).to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"torch.bfloat16 bias: steps of 0.001 vanish; keep it in fp32"
    ):
        moe.update_expert_bias([router], router.counts[None])


# ── 1.3 Experts ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "counts", [[3, 0, 5, 0], [0, 0, 0, 0], [0, 0, 0, 7], [1, 1, 1, 1]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_grouped_gemm(dtype, counts):
    """One kernel where there is one, one product for each expert where not: the same, with empty
    experts and none.
    """
    torch.manual_seed(0)
    x, w = (
        torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True),
        torch.randn(4, 24, 16, dtype=dtype),
    )
    w.requires_grad_()
    assert moe._has_grouped_mm(x, w) == (dtype != torch.float64 and hasattr(moe.F, "grouped_mm"))
    y = moe.grouped_gemm(x, w, counts)
    upstream = torch.randn(y.shape, dtype=dtype)
    here = torch.autograd.grad(y, [x, w], upstream)
    owner = torch.arange(4).repeat_interleave(torch.tensor(counts))
    x64, w64 = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    expected = torch.einsum("rh,rfh->rf", x64, w64[owner])
    there = torch.autograd.grad(expected, [x64, w64], upstream.double())
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[
        dtype
    ]  # rounding of each dtype
    for a, b in zip([y, *here], [expected, *there]):
        assert a.shape == b.shape
        assert not b.numel() or (a.double() - b).abs().max() <= bound * max(1.0, b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_may_be_a_view(dtype):
    """Transposed, or columns of a wider tensor: rows do not begin at multiples of 16 bytes."""
    torch.manual_seed(0)
    w = torch.randn(2, 24, 16, dtype=dtype, requires_grad=True)
    for x in (torch.randn(16, 5, dtype=dtype).T, torch.randn(5, 32, dtype=dtype)[:, 1:17]):
        upstream = torch.randn(5, 24, dtype=dtype)
        found = []
        for leaf in (x.detach(), x.contiguous()):
            y = moe.grouped_gemm(leaf.requires_grad_(), w, [2, 3])
            found.append([y, *torch.autograd.grad(y, [leaf, w], upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*found))


def test_sizes_that_the_kernel_does_not_take():
    x, w = torch.randn(5, 15), torch.randn(2, 7, 15)
    assert not moe._has_grouped_mm(x, w)
    assert torch.equal(moe.grouped_gemm(x, w, [2, 3])[2:], x[2:] @ w[1].mT)
    with pytest.raises(ValueError, match=r"counts \[2, 2\] are not 5 rows for 2 experts"):
        moe.grouped_gemm(x, w, [2, 2])


@pytest.mark.parametrize("latent", [0, 6, 24])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_the_plain_layer_is_a_sum_over_all_experts(top_k, gate, latent):
    """Against the formula with every expert on every token, and a weight of 0 where it was not
    chosen. In a latent width, shorter than a token or longer, each expert's part is projected.
    """
    cfg = config(top_k=top_k, gate=gate, moe_latent_size=latent)
    layer, x = layer_of(cfg), random(3, 5, 16).requires_grad_()
    upstream = random(3, 5, 16, seed=2)
    y, _ = layer(x)
    y.backward(upstream)
    here = {"y": y.detach(), "x": x.grad, **grads_of(layer)}
    layer.zero_grad()
    again = x.detach().clone().requires_grad_()
    experts, weights, _ = layer.router(again.view(15, 16))
    dense = torch.zeros(15, 8, dtype=torch.float64).scatter(1, experts, weights).view(3, 5, 8)
    z = again @ layer.into_latent.weight.T if latent else again
    hidden = torch.einsum("bsh,efh->bsef", z, layer.experts.up).relu() ** 2
    parts = torch.einsum("bsef,ehf->bseh", hidden, layer.experts.down)
    parts = parts @ layer.out_of_latent.weight.T if latent else parts
    y = torch.einsum("bseh,bse->bsh", parts, dense)
    y = y + (again @ layer.shared.up.weight.T).relu() ** 2 @ layer.shared.down.weight.T
    y.backward(upstream)
    assert_equal(here, {"y": y.detach(), "x": again.grad, **grads_of(layer)})


# ── 1.4 The model ─────────────────────────────────────────────────────────────────────────────────


def test_attention_with_groups_is_attention_with_repeated_keys():
    cfg, x = config(), random(2, 7, 16)
    torch.manual_seed(0)
    attention = moe.Attention(cfg).double()
    q, k, v = attention.qkv(x).split([16, 8, 8], -1)
    y = torch.zeros(2, 7, 16, dtype=torch.float64)
    for head in range(4):
        q_h, (k_h, v_h) = (
            q[..., 4 * head : 4 * head + 4],
            (t[..., 4 * (head // 2) : 4 * (head // 2) + 4] for t in (k, v)),
        )
        scores = (q_h @ k_h.mT / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        y[..., 4 * head : 4 * head + 4] = scores.softmax(-1) @ v_h
    assert_equal({"y": attention(x)[0]}, {"y": attention.out(y)})


def test_the_model_sees_no_future_and_learns():
    cfg = config()
    model, tokens = (
        moe.MoELM(cfg).double(),
        torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0)),
    )
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 61
    gap = (model(tokens)[0] - model(changed)[0]).abs().amax((0, 2))
    assert (
        gap[:8].max() < 1e-14 and gap[8:].min() > 1e-6
    )  # other rows in a product round it otherwise
    model = moe.MoELM(cfg)
    steps = moe.train_alone(model, moe.make_optimizer(model, 1e-2), [(tokens, tokens)] * 30)
    losses = [step.loss.item() for step in steps]
    assert losses[0] > 4 and losses[-1] < 2


def test_weights_are_a_function_of_the_configuration():
    a, b = moe.MoELM(config(seed=3)).state_dict(), moe.MoELM(config(seed=3)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == moe.state_shapes(config()).keys() and "layers.1.mixer.router.bias" in a
    assert not torch.equal(a["head.weight"], moe.MoELM(config(seed=4)).state_dict()["head.weight"])


def test_parameters_are_contiguous():
    """safetensors refuses others, and NCCL does."""
    for build in (moe.MoELM, moe.ParallelMoELM, moe.MoELayer, moe.ExpertParallelMoELayer):
        for name, x in build(config()).state_dict().items():
            assert x.is_contiguous(), f"{build.__name__}: {name}"


# ── 2.1 Rows that change ranks ────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("width", [(), (3,), (2, 3)], ids=str)
def test_all_to_all_against_what_everybody_sent(width):
    """Uneven pieces, empty ones among them, rank 0 sending nothing at all: every row and every
    gradient by name.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    pieces = [
        [(3 * i + 2 * j) % 4 * (i > 0 or world == 1) for j in range(world)] for i in range(world)
    ]  # i to j
    send, receive = pieces[rank], [pieces[i][rank] for i in range(world)]

    def name(i: int, j: int, n: int) -> torch.Tensor:
        numbers = torch.full((n, *width), 100.0 * i + j, dtype=torch.float64)
        return numbers + torch.arange(n).view(-1, *(1 for _ in width))

    rows = torch.cat([name(rank, j, n) for j, n in enumerate(send)]).requires_grad_()
    there = moe.all_to_all(rows, send, receive)
    assert torch.equal(there, torch.cat([name(i, rank, n) for i, n in enumerate(receive)]))
    (there**2).sum().backward()  # the gradient of each row is its own name, twice
    assert torch.equal(rows.grad, 2 * rows)
    again = rows.detach().clone().requires_grad_()
    later = moe.start_all_to_all(again, send, receive)()
    assert torch.equal(later, there)
    (later**2).sum().backward()
    assert torch.equal(again.grad, 2 * again)


@pytest.mark.ranks(2)
def test_all_to_all_refuses_lists_that_do_not_fit():
    for send, receive in (([1], [1, 2]), ([2, 2], [1, 2]), ([1, 2], [3])):
        with pytest.raises(ValueError, match="both lists need an entry per rank, and all rows"):
            moe.all_to_all(torch.ones(3, 2), send, receive)
        with pytest.raises(ValueError, match="both lists need an entry per rank"):
            moe.start_all_to_all(torch.ones(3, 2), send, receive)


# ── 2.2 Dispatch and combine ──────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("how", ["even", "uneven", "one rank has all"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_rows_arrive_in_the_order_of_the_whole_batch(top_k, how):
    """Each expert finds the rows that it has on one device, in the same order, to the bit; and all
    come home.
    """
    x = random(13, 5)
    orders = (torch.randperm(8, generator=torch.Generator().manual_seed(t)) for t in range(13))
    experts = torch.stack([order[order != 3][:top_k] for order in orders])  # nobody wants expert 3
    experts = experts.to(ranks.device)
    here, mine = share_of(x, how), share_of(experts, how)
    plan = moe.plan_dispatch(mine, 8)
    rows = moe.dispatch(here, plan)()
    e = 8 // dist.get_world_size()
    expected = [
        x[(experts == i).nonzero()[:, 0]]
        for i in range(e * dist.get_rank(), e * (dist.get_rank() + 1))
    ]
    assert torch.equal(rows, torch.cat(expected)) and plan.counts == [
        len(part) for part in expected
    ]
    weights = here.new_ones(len(here), top_k)
    assert_equal_or_empty(moe.combine(rows, weights, plan), top_k * here)


def assert_equal_or_empty(here, expected):
    assert here.shape == expected.shape
    if len(expected):
        assert_equal({"": here}, {"": expected})


def test_sorting_and_its_gradient():
    """Rows by expert and back, K copies of each token: values, and gradients by differences."""
    x, order = random(6, 2).requires_grad_(), torch.tensor([3, 1, 5, 0, 2, 4])
    plan = moe.Plan(order, order, [6], [6], [6], 3, None)
    assert torch.equal(moe._unsorted_by(order, x[order]), x)
    assert torch.equal(moe.dispatch(x[:2], plan)(), x[order // 3])
    assert torch.autograd.gradcheck(lambda x: moe._unsorted_by(order, x), x)
    assert torch.autograd.gradcheck(lambda x: moe.dispatch(x[:2], plan)(), x)


def test_no_gradient_adds_into_one_address_from_several_rows():
    """On a GPU such additions have no fixed order: every index of a scatter occurs once."""
    seen = []

    class Scatters(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "index_add" in function.name() or "index_put" in function.name():
                index = args[2] if "index_add" in function.name() else args[1][0]
                seen.append(index.unique().numel() == index.numel())
            return function(*args, **(kwargs or {}))

    layer, x = layer_of(config(), moe.ExpertParallelMoELayer), random(2, 5, 16).requires_grad_()
    with Scatters():
        layer(x)[0].sum().backward()
    assert seen and all(seen)


@pytest.mark.ranks(2)
def test_no_second_derivative_by_mistake():
    """The overlapped pair is differentiable once, and says so; the plain all-to-all twice."""
    layer, x = layer_of(config(), moe.ExpertParallelMoELayer), random(1, 5, 16).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    rows = random(4, 3).requires_grad_()
    (grad,) = torch.autograd.grad(
        (moe.all_to_all(rows, [2, 2], [2, 2]) ** 3).sum(), rows, create_graph=True
    )
    grad.sum().backward()
    assert_equal({"": rows.grad}, {"": 6 * rows})


# ── 2.3 The layer ─────────────────────────────────────────────────────────────────────────────────


def lopsided(layer: nn.Module, router: str) -> None:
    """Routers that leave experts, or ranks, without a token."""
    with torch.no_grad():
        if router == "two experts get nothing":
            layer.router.bias[2:4] = -10
        if router == "only the first experts work":
            layer.router.bias[: layer.config.top_k] = 10


@EVERY_WORLD
@pytest.mark.parametrize("how", ["even", "uneven", "one rank has all"])
@pytest.mark.parametrize(
    "router", ["as it is", "two experts get nothing", "only the first experts work"]
)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_layer(top_k, router, how):
    """Output, balancing loss and every gradient equal the plain layer's, whoever has tokens and
    whoever works.
    """
    compare_layers(config(top_k=top_k), router, how)


@EVERY_WORLD
@pytest.mark.parametrize("how", ["uneven", "one rank has all"])
@pytest.mark.parametrize("latent", [6, 16])
def test_the_latent_layer(latent, how):
    """The same with rows of another width than a token's, and with rows as wide as a token."""
    for router in ("as it is", "two experts get nothing"):
        compare_layers(config(moe_latent_size=latent), router, how)


@EVERY_WORLD
@pytest.mark.parametrize("kind", [moe.MoELayer, moe.ExpertParallelMoELayer])
def test_a_latent_layer_of_identities_is_the_layer_without(kind):
    """To the bit: output, balancing loss, and every gradient of the parameters that both have."""
    without = layer_of(config(), kind)
    latent = layer_of(config(moe_latent_size=16), kind)
    identity = torch.eye(16, dtype=torch.float64, device=ranks.device)
    projections = {f"{name}_latent.weight": identity for name in ("into", "out_of")}
    assert latent.state_dict().keys() - without.state_dict().keys() == projections.keys()
    latent.load_state_dict(without.state_dict() | projections)
    x, upstream = random(3, 5, 16), random(3, 5, 16, seed=2)
    results = []
    for layer in (without, latent):
        y, balance = layer(x)
        torch.autograd.backward([y, balance], [upstream, torch.ones_like(balance)])
        grads = {name: grads_of(layer)[name] for name in grads_of(without)}
        results.append({"y": y.detach(), "balance": balance.detach(), **grads})
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
    assert results[0]["y"].abs().max() > 0.1 and grads_of(latent)["into_latent.weight"].any()


def compare_layers(cfg: moe.MoEConfig, router: str, how: str) -> None:
    """Both layers of `cfg`, with one of `lopsided`'s routers and one of `share_of`'s batches."""
    top_k = cfg.top_k
    plain, parallel = layer_of(cfg), layer_of(cfg, moe.ExpertParallelMoELayer)
    for layer in (plain, parallel):
        lopsided(layer, router)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert all(
        torch.equal(x, moe.shard_tensor(n, plain.state_dict()[n], rank, world))
        for n, x in parallel.state_dict().items()
    )
    x, upstream, of_balance = random(6, 5, 16), random(6, 5, 16, seed=2), random(6, seed=3)
    a = x.clone().requires_grad_()
    y, balance = plain(a)
    torch.autograd.backward([y, balance], [upstream, of_balance])
    b = share_of(x, how).clone().requires_grad_()
    y_here, balance_here = parallel(b)
    torch.autograd.backward(
        [y_here, balance_here], [share_of(upstream, how), share_of(of_balance, how)]
    )
    for here, whole in ((y_here, y), (balance_here, balance), (b.grad, a.grad)):
        assert_equal_or_empty(here, share_of(whole.detach(), how))
    grads = {
        n: g if moe.shard_dim(n) is not None else summed(g) for n, g in grads_of(parallel).items()
    }
    expected = {n: g for n, g in grads_of(plain).items()}
    unused = router == "only the first experts work" and top_k < 8
    zero = [n for n, g in expected.items() if unused and moe.shard_dim(n) is not None]
    assert_equal(joined(grads), expected)
    for name in zero:
        assert not grads_of(plain)[name][top_k:].any()


@pytest.mark.ranks(2, 4)
def test_the_shared_expert_works_while_rows_travel():
    """Forward: rows leave, two products of the shared expert, then the wait. Backward: the same,
    from behind.
    """
    layer, x = layer_of(config(), moe.ExpertParallelMoELayer), random(1, 5, 16).requires_grad_()
    with plant(Events, "COLLECTIVES", {"all_to_all_single": "all_to_all"}), Events() as events:
        y, _ = layer(x)
    e = 8 // dist.get_world_size()
    counts = ["all_to_all"]  # of numbers, before anything else
    first, rest = (
        ["all_to_all", "product", "product", "wait"],
        ["product"] * 2 * e + ["all_to_all", "product"],
    )
    assert events.order[1:] == counts + first + rest, (
        events.order
    )  # the first product is the router's
    with plant(Events, "COLLECTIVES", {"all_to_all_single": "all_to_all"}), Events() as events:
        y.sum().backward()
    order = events.order
    back = [i for i, event in enumerate(order) if event == "all_to_all"]
    waits = [i for i, event in enumerate(order) if event == "wait"]
    assert len(back) == 2 and len(waits) == 1  # combine's rows return at once
    # and dispatch's while the shared expert's backward runs
    assert order[back[1] + 1 : waits[0]] == ["product"] * 4


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("latent", [0, 6])
def test_the_bytes_of_a_layer(latent):
    """Every row travels there and back, forward and backward, and nothing else but one message of
    counts. With a latent width a row has so many elements, and without one as many as a token.
    """
    cfg = config(moe_latent_size=latent)
    layer, x = (
        layer_of(cfg, moe.ExpertParallelMoELayer),
        random(3, 5, 16, seed=dist.get_rank()).requires_grad_(),
    )
    with Counter() as counter:
        layer(x)[0].sum().backward()
    sizes = [m.bytes for m in counter.messages if m.op.startswith("alltoall")]
    assert len(counter.messages) == len(sizes) == 5
    assert sizes[0] == 8 * 8
    experts = layer.router(x.view(15, 16)).experts_TK
    arrived = moe.plan_dispatch(experts, 8).receive
    assert sizes[1:] == [8 * (latent or 16) * max(2 * 15, sum(arrived))] * 4


def test_without_a_process_group_there_is_one_rank():
    """Every public function works in a process by itself; the layer equals the plain one."""
    assert not dist.is_initialized()
    cfg = config()
    plain, parallel = layer_of(cfg), layer_of(cfg, moe.ExpertParallelMoELayer)
    x = random(3, 5, 16)
    assert_equal({"y": parallel(x)[0]}, {"y": plain(x)[0]})
    assert moe.all_to_all(x, [3], [3]) is x
    batch = batch_of(3)
    plain, parallel = moe.MoELM(cfg).double(), moe.ParallelMoELM(cfg).double()
    alone = list(moe.train_alone(plain, moe.make_optimizer(plain, 1e-3), [batch] * 3))
    optimizer = moe.make_optimizer(parallel, 1e-3)
    together = list(moe.train(parallel, optimizer, [batch] * 3, moe.Mesh()))
    assert_equal(
        {i: s.loss for i, s in enumerate(together)}, {i: s.loss for i, s in enumerate(alone)}
    )
    assert all(torch.equal(a.counts_LE, b.counts_LE) for a, b in zip(alone, together))


def test_the_layer_under_autocast_and_compiled():
    """bf16 products: near fp32's. torch.compile (aot_eager): the same numbers as eager."""
    torch.manual_seed(0)
    cfg = config(expert_size=16, shared_size=16)
    layer, x = moe.ExpertParallelMoELayer(cfg), torch.randn(2, 5, 16)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(5)
    y = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)[0]
    assert narrow.dtype == torch.bfloat16 and 1e-4 < ((narrow - y).norm() / y.norm()).item() < 2e-2
    narrow.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    single = torch.compile(layer, backend="aot_eager")(x)[0]  # the kernel's shapes: bf16 alone
    assert_equal({"y": single}, {"y": y}, bound=1e-5)
    torch.compiler.reset()
    layer, x = layer.double(), x.double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=False)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    here, there = compiled(a)[0], layer(b)[0]
    grads = [
        torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        for y, leaf in ((here, a), (there, b))
    ]
    assert_equal(
        {"y": here, **dict(enumerate(grads[0]))}, {"y": there, **dict(enumerate(grads[1]))}
    )


@pytest.mark.ranks(2)
def test_a_layer_that_is_recomputed_moves_the_bias_the_same_way():
    """It counts its tokens twice, all of them, and computes the same gradients, with a second
    journey in backward.
    """
    layers, x = (
        [layer_of(config(), moe.ExpertParallelMoELayer) for _ in range(2)],
        random(2, 5, 16, seed=dist.get_rank()),
    )
    layers[0](x)[0].square().sum().backward()
    checkpoint(layers[1], x, use_reentrant=False)[0].square().sum().backward()
    assert torch.equal(2 * layers[0].router.counts, layers[1].router.counts)
    assert_equal(grads_of(layers[1]), grads_of(layers[0]))
    for layer in layers:
        moe.update_expert_bias([layer.router], summed(layer.router.counts[None]))
    assert torch.equal(layers[0].router.bias, layers[1].router.bias)


# ── 3 Moving weights ──────────────────────────────────────────────────────────────────────────────


def test_weights_move_from_any_ep_to_any_other_to_the_bit():
    cfg = config()
    full = moe.MoELM(cfg).state_dict()
    full["layers.1.mixer.router.bias"].normal_()
    for ep in (1, 2, 4, 8):
        shards = [moe.shard_state_dict(full, cfg, rank, ep) for rank in range(ep)]
        assert shards[0]["layers.1.mixer.experts.up"].shape[0] == 8 // ep
        back = moe.merge_state_dicts(shards)
        assert back.keys() == full.keys() and all(
            torch.equal(back[name], full[name]) for name in full
        )


@EVERY_WORLD
def test_first_weights_do_not_depend_on_the_layout():
    cfg = config()
    full = moe.MoELM(cfg).state_dict()
    for ep in LAYOUTS[dist.get_world_size()]:
        model = moe.ParallelMoELM(cfg, mesh_of(ep).ep_group)
        here = joined(model.state_dict(), mesh_of(ep).ep_group)
        assert all(torch.equal(here[name], full[name]) for name in full)
        for p in model.parameters():
            assert p.untyped_storage().nbytes() == p.nbytes


def test_bad_state_dicts():
    cfg = config()
    full = moe.MoELM(cfg).state_dict()
    for change, message in (
        (lambda d: d.pop("head.weight"), r"missing.*\('head.weight', .*61, 16"),
        (lambda d: d.update(other=torch.ones(1)), r"unknown.*\('other', .*\[1\]"),
        (lambda d: d.update({"head.weight": torch.ones(2, 2)}), r"'head.weight', .*2, 2"),
    ):
        bad = dict(full)
        change(bad)
        with pytest.raises(ValueError, match=message):
            moe.shard_state_dict(bad, cfg, 0, 2)
    shards = [moe.shard_state_dict(full, cfg, rank, 2) for rank in range(2)]
    shards[1]["layers.1.mixer.router.weight"] += 1
    with pytest.raises(
        ValueError,
        match="layers.1.mixer.router.weight should be replicated, but rank 1 differs from rank 0",
    ):
        moe.merge_state_dicts(shards)


# ── 4 Training ────────────────────────────────────────────────────────────────────────────────────


def one_step(model, optimizer, batch, mesh=None, how="even", **options) -> moe.Step:
    """One step of `train_alone`, or of `train` with the rows that share_of(…, how) gives."""
    if mesh is None:
        return next(moe.train_alone(model, optimizer, [batch], **options))
    with plant(moe, "rank_rows", lambda full: share_of(full, how)):
        return next(moe.train(model, optimizer, [batch], mesh, **options))


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
}


def trained(model, steps, optimizer, **options):
    """Trains a model; yields each Step."""
    made = OPTIMIZERS[optimizer](model)
    for step in range(steps):
        made.param_groups[0]["lr"] = made.defaults["lr"] * (1 + step) / 5  # the caller's schedule
        yield one_step(model, made, batch_of(9, seed=step), **STEP, **options)


@cache
def trained_alone(steps, optimizer, max_norm, **changes) -> list[SimpleNamespace]:
    """Of the plain model after each step: the Step, its gradients and its state dict."""
    plain = moe.MoELM(config(**changes)).to(ranks.device, torch.float64)
    found = []
    for step in trained(plain, steps, optimizer, max_norm=max_norm):
        grads = {name: x.clone() for name, x in grads_of(plain).items()}
        state = {name: x.clone() for name, x in plain.state_dict().items()}
        found.append(SimpleNamespace(step=step, grads=grads, state=state))
    return found


def compared(mesh, how, steps, optimizer="sgd", max_norm=1e9, **changes):
    """Trains the parallel model; yields for each step its Step, the model, and what the plain model
    has then."""
    model = moe.ParallelMoELM(config(**changes), mesh.ep_group).to(ranks.device, torch.float64)
    run = trained(model, steps, optimizer, max_norm=max_norm, mesh=mesh, how=how)
    for here, there in zip(run, trained_alone(steps, optimizer, max_norm, **changes), strict=True):
        yield here, model, there


def assert_the_same_step(here: moe.Step, there: moe.Step) -> None:
    assert_equal({"loss": here.loss, "norm": here.norm}, {"loss": there.loss, "norm": there.norm})


def assert_the_same_state(here: dict, there: dict, floor: float) -> None:
    """Weights; and biases, which move in steps of γ and may be back at 0."""
    biases = {name for name in there if name.endswith("router.bias")}
    assert biases and all((here[name] - there[name].cpu()).abs().max() < 1e-12 for name in biases)
    here, there = ({n: x for n, x in state.items() if n not in biases} for state in (here, there))
    assert_equal(here, there, floor=floor)


@pytest.mark.ranks(1, 2, 4, timeout=120)
@pytest.mark.parametrize("how", ["even", "uneven", "one rank has all"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_every_gradient_of_the_model(top_k, how):
    """Loss, norm, counts and every parameter's gradient, at every ep, whoever has tokens."""
    for ep in LAYOUTS[dist.get_world_size()]:
        for here, model, there in compared(mesh_of(ep), how, steps=1, top_k=top_k):
            assert_equal(joined(grads_of(model), mesh_of(ep).ep_group), there.grads)
            assert_the_same_step(here, there.step)
            assert torch.equal(here.counts_LE, there.step.counts_LE)


@pytest.mark.ranks(1, 2, 4, timeout=120)
@pytest.mark.parametrize("how", ["even", "uneven"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_five_steps(optimizer, how):
    """SGD with momentum, and AdamW with clipping: losses, norms before clipping, weights and biases
    after each step.
    """
    for ep in LAYOUTS[dist.get_world_size()]:
        max_norm, floor = (1e9, 0.0) if optimizer == "sgd" else (0.05, 5 * 1e-3)
        for here, model, there in compared(mesh_of(ep), how, 5, optimizer, max_norm):
            assert there.step.norm > 0.05 or optimizer == "sgd"  # clipped
            assert_the_same_step(here, there.step)
            state = joined(model.state_dict(), mesh_of(ep).ep_group)
            assert_the_same_state(state, there.state, floor)
        biases = [x for name, x in there.state.items() if name.endswith("router.bias")]
        assert all(bias.abs().max() > 0.01 for bias in biases)


@pytest.mark.ranks(1, 2, 4, timeout=120)
def test_five_steps_in_latent_width():
    """AdamW with clipping: the projections are replicated, and their gradients are sums over all
    ranks. Losses, norms and every gradient of each step; then weights and biases.
    """
    for ep in LAYOUTS[dist.get_world_size()][-2:]:
        run = compared(mesh_of(ep), "uneven", 5, "adamw", 0.05, moe_latent_size=6)
        for here, model, there in run:
            assert_the_same_step(here, there.step)
            assert torch.equal(here.counts_LE, there.step.counts_LE)
            assert_equal(joined(grads_of(model), mesh_of(ep).ep_group), there.grads)
        assert sum("_latent" in name for name in there.state) == 4
        state = joined(model.state_dict(), mesh_of(ep).ep_group)
        assert_the_same_state(state, there.state, floor=5 * 1e-3)


@pytest.mark.ranks(2, 4)
def test_copies_stay_equal_to_the_bit():
    """What is whole on every rank, and what the ranks of an edp group share, after three steps."""
    mesh, cfg = mesh_of(2), config(moe_latent_size=6)
    model = moe.ParallelMoELM(cfg, mesh.ep_group).to(ranks.device)
    batches = [[x.to(ranks.device) for x in batch_of(8, seed=i)] for i in range(3)]
    list(moe.train(model, moe.make_optimizer(model, 1e-2), batches, mesh, **STEP))
    for group in (None, mesh.edp_group):
        states = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, {n: x.cpu() for n, x in model.state_dict().items()}, group)
        names = [n for n in states[0] if group is not None or moe.shard_dim(n) is None]
        assert all(torch.equal(state[n], states[0][n]) for state in states for n in names)


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────
#
# Each takes one safeguard away and shows what a user would see: mostly a loss as good as ever, and
# wrong gradients.


def gradients(mesh, prepare=lambda model: model, steps=1, cfg=None, **options):
    """Steps from the same weights: the last one's Step, full gradients, and the model; for planted
    bugs to change.
    """
    model = prepare(moe.ParallelMoELM(cfg or config(), mesh.ep_group))
    model = model.to(ranks.device, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        step = one_step(
            model, optimizer, batch_of(9), mesh, "uneven", max_norm=1e9, **(STEP | options)
        )
    return step, joined(grads_of(model), mesh.ep_group), model


def alone(prepare=lambda model: None):
    """The same on one device, from large weights, so that what experts say shows in the loss: loss
    and gradients.
    """
    model = moe.MoELM(config(init_std=0.3)).double()
    for router in model.routers():
        router.bias.copy_(torch.linspace(-0.1, 0.1, 8))
    prepare(model)
    loss_BS, balance_B = model.loss(*batch_of(9))
    loss = loss_BS.sum() / (batch_of(9)[1] != -100).sum() + STEP["alpha"] * balance_B.mean()
    loss.backward()
    return SimpleNamespace(loss=loss.detach()), grads_of(model)


def shown(wrong, right) -> Shows:
    """What two results of `gradients` or of `alone` differ by."""
    return Shows(
        worst_of({"loss": wrong[0].loss}, {"loss": right[0].loss}), worst_of(wrong[1], right[1])
    )


def test_the_bias_decides_who_works_and_not_what_they_say():
    """Moving β without changing the choice changes no output: what the planted bug below breaks."""
    layer, x = layer_of(config()), random(2, 5, 16)
    y, _ = layer(x)
    layer.router.bias += 0.125
    assert_equal({"y": layer(x)[0]}, {"y": y})


@pytest.mark.planted_bug(
    symptom="what balances the load also changes what experts say: every step of γ moves the "
    "loss a little",
    seen_in=None,
)
def test_bias_used_in_the_weights():
    layer, x = layer_of(config()), random(2, 5, 16)
    y, _ = layer(x)
    original = moe.Router.forward

    def buggy(router, x_TH):
        routing = original(router, x_TH)
        weights = (routing.log_scores_TE.exp() + router.bias).gather(-1, routing.experts_TK)
        return routing._replace(weights_TK=2.5 * weights / weights.sum(-1, keepdim=True))

    right = alone()
    with plant(moe.Router, "forward", buggy):
        assert_differs({"y": layer(x)[0]}, {"y": y})
        return shown(alone(), right)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the copies of one router drift apart and choose other experts for the same token; "
    "nothing fails",
    seen_in=None,
)
def test_bias_updated_from_local_counts():
    mesh = mesh_of(1)

    def buggy(x, *args):
        return x if x.dtype == torch.int64 and x.ndim == 2 else original(x, *args)

    right = gradients(mesh, steps=4)
    with plant(moe, "_all_reduce", buggy) as original:
        wrong = gradients(mesh, steps=4)
    biases = [
        torch.stack([router.bias for router in model.routers()]) for *_, model in (right, wrong)
    ]
    first = [b.clone() for b in biases]
    for b in first:
        dist.broadcast(b, 0)
    unequal = [
        summed(torch.tensor(float(not torch.equal(b, f)))).item() for b, f in zip(biases, first)
    ]
    assert unequal[0] == 0 and unequal[1] > 0
    return shown(wrong, right)


def latent_bug(buggy):
    """A layer whose latent is as wide as a token, so that any tensor fits anywhere, without and
    with the bug, which replaces the parallel layer's `mix`; and what a shorter latent says to it.
    """
    mesh = mesh_of(2)
    cfg = config(moe_latent_size=16, init_std=0.3)
    right = gradients(mesh, cfg=cfg)
    with plant(moe.ExpertParallelMoELayer, "mix", buggy):
        wrong = gradients(mesh, cfg=cfg)
        try:
            shorter = gradients(mesh, cfg=config(moe_latent_size=6))
        except RuntimeError as error:
            shorter = str(error)
    assert_differs(wrong[1], right[1], at_least=0.1)
    return shown(wrong, right), shorter


def latent_rows(layer, z_TW, routing):
    """z_TW through the experts and back, weighted and summed."""
    plan = moe.plan_dispatch(routing.experts_TK, layer.config.num_experts, layer.group)
    rows_rW = layer.experts(moe.dispatch(z_TW, plan)(), plan.counts)
    return moe.combine(rows_rW, routing.weights_TK, plan)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="experts are chosen by what is left of a token in latent width; an error about shapes "
    "where that is shorter",
    seen_in="https://github.com/vllm-project/vllm/pull/46077",
)
def test_the_router_reads_the_latent():
    def buggy(layer, x_TH, routing):
        z_TW = layer.into_latent(x_TH)
        sum_TW = latent_rows(layer, z_TW, layer.router(z_TW))
        return layer.out_of_latent(sum_TW) + layer.shared(x_TH)

    shows, shorter = latent_bug(buggy)
    assert "shapes cannot be multiplied" in shorter
    return shows


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the shared expert reads and writes in latent width; an error about shapes where that "
    "is shorter",
    seen_in="https://github.com/PaddlePaddle/PaddleFleet/pull/868",
)
def test_the_shared_expert_in_latent_width():
    def buggy(layer, x_TH, routing):
        z_TW = layer.into_latent(x_TH)
        return layer.out_of_latent(latent_rows(layer, z_TW, routing) + layer.shared(z_TW))

    shows, shorter = latent_bug(buggy)
    assert "shapes cannot be multiplied" in shorter
    return shows


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the experts' part of the output is gate_scale times too large; training goes on",
    seen_in=None,
)
def test_the_gate_applied_again_after_the_latent():
    def buggy(layer, x_TH, routing):
        y_TH = layer.out_of_latent(latent_rows(layer, layer.into_latent(x_TH), routing))
        return y_TH * routing.weights_TK.sum(-1, keepdim=True) + layer.shared(x_TH)

    shows, shorter = latent_bug(buggy)
    assert shorter[0].loss.isfinite()  # no shape objects
    return shows


@pytest.mark.planted_bug(
    symptom="with 3 micro-batches the bias moves by up to 3γ a step, so the layout of memory "
    "changes the training",
    seen_in=None,
)
def test_bias_updated_per_micro_batch():
    """`counts` adds up over forwards, so that one update sees all micro-batches of a step."""

    def trained(per_micro_batch: bool):
        model = moe.overload(moe.ParallelMoELM(config())).to(ranks.device, torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            total = 0
            for part in zip(*(whole.tensor_split(3) for whole in batch_of(9))):
                loss_BS, balance_B = model.loss(*part)
                loss = loss_BS.sum() / 51 + STEP["alpha"] * balance_B.sum() / 9
                loss.backward()
                total += loss.detach()
                if per_micro_batch:
                    moe.update_expert_bias(model.routers(), model.counts(), STEP["gamma"])
            if not per_micro_batch:
                moe.update_expert_bias(model.routers(), model.counts(), STEP["gamma"])
            if step == 0:
                moved = max(router.bias.abs().max().item() for router in model.routers())
            if step < 3:
                optimizer.step()
        return (SimpleNamespace(loss=total), grads_of(model)), moved / STEP["gamma"]

    (right, moved), (wrong, moved_wrong) = trained(False), trained(True)
    assert moved < 1.001 and moved_wrong > 1.999
    return shown(wrong, right)


@pytest.mark.planted_bug(
    symptom="the balancing loss has the right value and pulls the scores of the chosen the wrong "
    "way as well",
    seen_in=None,
)
def test_gradient_through_the_balancing_counts():
    scores = random(2, 5, 8).sigmoid().requires_grad_()

    def buggy(log_scores_BSE, top_k):
        scores_BSE = log_scores_BSE.exp()
        kept = scores_BSE * torch.zeros_like(scores_BSE).scatter(
            -1, scores_BSE.topk(top_k, -1).indices, 1.0
        )
        f_BE = (
            (kept / kept.detach().clamp(min=1e-9)).sum(1)
            / (top_k * scores_BSE.shape[1])
            * scores_BSE.shape[2]
        )
        return (f_BE * (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)).sum(-1)

    right, wrong = moe.load_balancing_loss(scores.log(), 2), buggy(scores.log(), 2)
    assert_equal({"loss": wrong}, {"loss": right})
    grads = [torch.autograd.grad(loss.sum(), scores)[0] for loss in (wrong, right)]
    assert_differs({"scores": grads[0]}, {"scores": grads[1]}, at_least=0.1)
    right = alone()
    with plant(moe, "load_balancing_loss", buggy):
        return shown(alone(), right)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the balancing loss is printed and added, and no router learns from it: the load is "
    "as with α = 0",
    seen_in="https://github.com/NVIDIA-NeMo/Automodel/issues/1408",
)
def test_an_auxiliary_gradient_that_never_flows():
    mesh = mesh_of(2)
    right, (_, none, _) = gradients(mesh), gradients(mesh, alpha=0.0)
    original = moe.load_balancing_loss
    with plant(moe, "load_balancing_loss", lambda scores, k: original(scores.detach(), k)):
        wrong = gradients(mesh)
    assert_equal({"loss": wrong[0].loss}, {"loss": right[0].loss})
    assert_equal(wrong[1], none)
    assert any("router" in name for name in assert_differs(wrong[1], right[1]))
    return shown(wrong, right)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="experts' gradients are ep times too large; the loss of the step is the same, and "
    "Adam hides it",
    seen_in="https://github.com/microsoft/DeepSpeed/pull/5259",
)
def test_expert_gradients_that_grow_with_ep():
    """Means in place of sums: dense gradients over all ranks, experts' over the ranks that hold the
    same.
    """

    def buggy(model, mesh):
        experts = {id(p) for p in model.sharded_parameters()}
        for p in model.parameters():
            p.grad.mul_(moe.group_size())  # each rank's own mean, as such a library has it
            group = mesh.edp_group if id(p) in experts else None
            dist.all_reduce(p.grad, group=group)
            p.grad.div_(moe.group_size(group))

    for ep in (1, 2, 4):
        right = gradients(mesh_of(ep))
        with plant(moe, "reduce_gradients", buggy):
            wrong = gradients(mesh_of(ep))
        assert_equal({"loss": wrong[0].loss}, {"loss": right[0].loss})
        for name, grad in right[1].items():
            factor = 1 if moe.shard_dim(name) is None else ep
            assert_equal({name: wrong[1][name]}, {name: factor * grad})
    return shown(wrong, right)  # at ep = 4, three times too much on top


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="each expert learns from what its neighbour on the other rank was asked; the load "
    "looks healthy",
    seen_in=None,
)
def test_experts_gradients_summed_over_all_ranks():
    """One group for everything, as data parallelism has it: the sum is of different experts'
    gradients.
    """
    mesh = mesh_of(2)

    def buggy(model, mesh):
        for p in model.parameters():
            dist.all_reduce(p.grad)

    right = gradients(mesh)
    with plant(moe, "reduce_gradients", buggy):
        wrong = gradients(mesh)
    assert all("experts" in name for name in assert_differs(wrong[1], right[1]))
    return shown(wrong, right)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="tokens of ranks with short texts count more; with equal shares, as in most tests, "
    "nothing is wrong",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_a_mean_of_the_ranks_means():
    mesh = mesh_of(2)

    def buggy(x, *args):
        return (
            x * moe.group_size()
            if x.dtype == torch.int64 and x.shape == (2,)
            else original(x, *args)
        )

    right = gradients(mesh)
    with plant(moe, "_all_reduce", buggy) as original:
        wrong = gradients(mesh)
    assert_differs(wrong[1], right[1], at_least=0.1)
    return shown(wrong, right)


@pytest.mark.planted_bug(
    symptom="nearly equal experts tie, so other ones are chosen; the loss moves in its fourth "
    "digit",
    seen_in=None,
)
def test_a_router_in_bf16():
    original, linear = moe.Router.forward, F.linear

    def buggy(router, x_TH):
        logits_TE = linear(x_TH.to(torch.bfloat16), router.weight.to(torch.bfloat16))
        with plant(F, "linear", lambda x, w: logits_TE):
            return original(router, x_TH)

    cfg = config(num_experts=64, top_k=6, hidden_size=64)
    router, x = moe.Router(cfg), torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    other = (
        router(x).experts_TK.sort(-1).values != buggy(router, x).experts_TK.sort(-1).values
    ).any(-1)
    assert other.double().mean() > 0.02  # of the tokens
    right = alone()
    with plant(moe.Router, "forward", buggy):
        return shown(alone(), right)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="an error about sizes; or, with as many rows in as out, gradients that go to other "
    "tokens in silence",
    seen_in=None,
)
def test_splits_not_swapped_in_backward():
    rank = dist.get_rank()

    def buggy(ctx, grad_rH):
        ctx.transfer.start(grad_rH, ctx.transfer.send, ctx.transfer.receive)
        return grad_rH, None

    def buggy_plain(ctx, grad_rH):
        receive, send, group = ctx.exchanged
        return moe._AllToAll.apply(grad_rH, send, receive, group), None, None, None

    def gradient(pieces, call=lambda *args: moe.start_all_to_all(*args)()):
        send, receive = pieces[rank], [pieces[i][rank] for i in range(4)]
        rows = random(sum(send), 3, seed=rank).requires_grad_()
        loss = (call(rows, send, receive) ** 2).sum()
        loss.backward()
        return (SimpleNamespace(loss=summed(loss)), {"rows": rows.grad}), (
            rows.grad / 2 - rows.detach()
        ).abs().max()

    even = [
        [(1, 2, 0, 3)[(j - i) % 4] for j in range(4)] for i in range(4)
    ]  # everybody sends 6 and receives 6
    odd = [
        [1, 1, 1, 1],
        [2, 2, 2, 2],
        [2, 2, 2, 2],
        [4, 4, 4, 4],
    ]  # nobody receives as many as it sends
    (right, gap), (_, odd_gap) = gradient(even), gradient(odd)
    assert gap == odd_gap == 0
    assert gradient(even, moe.all_to_all)[1] == gradient(odd, moe.all_to_all)[1] == 0
    with plant(moe._AllToAllWait, "backward", staticmethod(buggy)):
        wrong, gap = gradient(even)
        assert gap > 0.1
        with pytest.raises(RuntimeError, match="Split sizes"):
            gradient(odd)
    with plant(moe._AllToAll, "backward", staticmethod(buggy_plain)):
        assert gradient(even, moe.all_to_all)[1] > 0.1
        with pytest.raises(RuntimeError):
            gradient(odd, moe.all_to_all)
    return shown(wrong, right)


def skips_where_there_are_no_rows(transfer, rows, send, receive):
    transfer.received = rows.new_empty(sum(receive), *rows.shape[1:])
    if not sum(send) and not sum(receive):  # "nothing to do here"
        transfer.work = SimpleNamespace(wait=lambda: None)
        return transfer.received
    transfer.work = dist.all_to_all_single(
        transfer.received, rows.contiguous(), receive, send, group=transfer.group, async_op=True
    )
    return transfer.received


def one_rank_has_nothing(bug: bool) -> None:
    """All rows go from rank 0 to itself and to rank 1: rank 2, last of three in a world of four,
    stays out.
    """
    rank = dist.get_rank()
    send = [2, 1, 0, 0] if rank == 0 else [0] * 4
    receive = [[2, 1, 0, 0][rank], 0, 0, 0]
    start = skips_where_there_are_no_rows if bug else moe._Transfer.start
    with plant(moe._Transfer, "start", start):
        moe.start_all_to_all(torch.ones(sum(send), 2), send, receive)()
    dist.barrier()


@pytest.mark.planted_bug(
    symptom="a hang: ranks with rows wait for one that has none and went on, until the timeout "
    "names them",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1877",
)
def test_a_rank_without_tokens_that_skips_the_collective():
    pool = ranks.Pool(4)
    try:
        pool.run(__name__, "one_rank_has_nothing", dict(bug=False), timeout=30)
        with pytest.raises(
            (TimeoutError, ranks.RankFailed), match="silent after 2 s|one_rank_has_nothing"
        ):
            pool.run(__name__, "one_rank_has_nothing", dict(bug=True), timeout=2)
    finally:
        pool.close()
    return Shows("never comes: a hang", "never comes: a hang")


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(top_k=9), "top_k=9: choose at most num_experts=8"),
        (dict(top_k=0), "top_k=0: it must be at least 1"),
        (
            dict(num_heads=3),
            "num_heads=3, num_kv_heads=2: the first must be a multiple of the second",
        ),
        (dict(pattern="**"), r"pattern='\*\*': one letter of '\*E' per layer, at least one E"),
        (dict(pattern="*Ex"), r"pattern='\*Ex'"),
        (dict(gate="tanh"), "gate='tanh': sigmoid or softmax"),
        (dict(head_size=0), "head_size=0: it must be at least 1"),
        (dict(shared_size=-1), "shared_size=-1: it must be at least 0"),
        (dict(moe_latent_size=-1), "moe_latent_size=-1: it must be at least 0"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_model_with_layers_of_other_chapters_is_refused():
    with pytest.raises(ValueError, match=r"pattern='M\*E'.*Mamba is chapter 5's"):
        config(pattern="M*E")
    with pytest.raises(TypeError, match="latent_size"):  # by another name than its own
        config(latent_size=8)


@pytest.mark.ranks(2, 4)
def test_bad_groups():
    world = dist.get_world_size()
    with pytest.raises(
        ValueError, match=rf"num_experts=7 does not divide over {world} ranks: ep must divide"
    ):
        moe.ExpertParallelMoELayer(config(num_experts=7))
    with pytest.raises(ValueError, match=rf"num_experts=7 does not divide over {world} ranks"):
        moe.ParallelMoELM(config(num_experts=7))
    for ep in (3, 0, -1):
        with pytest.raises(ValueError, match=rf"ep={ep} does not divide the {world} ranks"):
            moe.make_mesh(ep, ranks.device)
    with pytest.raises(ValueError, match=rf"num_experts=7 does not divide over {world} ranks"):
        moe.plan_dispatch(torch.zeros(2, 1, dtype=torch.int64), 7)


# A group that this rank is not in: torch answers −1 for its size, and −1 is not above 1.

GROUP_USERS = {
    "all_to_all": lambda group: moe.all_to_all(random(3, 4), [3], [3], group),
    "start_all_to_all": lambda group: moe.start_all_to_all(random(3, 4), [3], [3], group),
    "plan_dispatch": lambda group: moe.plan_dispatch(
        torch.zeros(2, 1, dtype=torch.int64), 8, group
    ),
    "dispatch": lambda group: moe.dispatch(random(2, 4), foreign_plan(group)),
    "combine": lambda group: moe.combine(random(2, 4), torch.ones(2, 1), foreign_plan(group)),
    "ExpertParallelMoELayer": lambda group: moe.ExpertParallelMoELayer(config(), group),
    "ParallelMoELM": lambda group: moe.ParallelMoELM(config(), group),
    "reduce_gradients": lambda group: moe.reduce_gradients(
        with_gradients(), moe.Mesh(2, 1, group, group)
    ),
}


def foreign_plan(group) -> moe.Plan:
    """What `plan_dispatch` would make for two tokens and one expert, if it let such a group
    through.
    """
    order = torch.arange(2)
    return moe.Plan(order, order, [2], [2], [2], 1, group)


def with_gradients() -> moe.ParallelMoELM:
    model = moe.ParallelMoELM(config())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


@lru_cache
def group_of_rank_0():
    return dist.new_group([0])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", GROUP_USERS)
def test_a_group_without_this_rank_is_refused(name):
    group = group_of_rank_0()
    if dist.get_rank() == 1:
        with pytest.raises(
            ValueError, match="rank 1 is not in the process group that it was given"
        ):
            GROUP_USERS[name](group)


# ── The script ────────────────────────────────────────────────────────────────────────────────────


def run(*flags: str, timeout: float = 240):
    return scripts.forked(SCRIPT, *flags, timeout=timeout)


@pytest.mark.slow
def test_the_script():
    done = run()
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count(" ok\n") == 6


@pytest.mark.ranks(1, 2)
def test_check():
    code, printed = scripts.on_ranks(moe, "--check", "--ep", "1", "--dtype", "fp64")
    assert code == 0
    assert "worst" in printed and "gradient layers.1.mixer.router.weight" in printed


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dtype, ep", [("fp64", 4), ("fp32", 1), ("bf16", 2)])
def test_check_on_other_layouts(dtype, ep):
    errors = moe.equivalence(mesh_of(ep), ranks.device, *moe.dtypes(SimpleNamespace(dtype=dtype)))
    assert moe.print_errors(errors, moe.BOUNDS[dtype])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--ep", "3"), "--ep 3 must divide the 4 ranks"),
        (("--ranks", "1", "--ep", "2"), "--ep 2 must divide the 1 ranks"),
        (("--ep", "0"), "argument --ep: '0' must be of type int, from 1"),
        (("--lr", "nan"), "argument --lr: 'nan' must be of type float, from 1e-09 to 1e+09"),
        (("--lr", "-1"), "argument --lr: '-1' must be of type float"),
        (("--lr", "inf"), "argument --lr: 'inf' must be of type float"),
        (("--lr", "0"), "argument --lr: '0' must be of type float"),
        (("--alpha", "nan"), "argument --alpha: 'nan' must be of type float, from 0"),
        (("--gamma", "-1"), "argument --gamma: '-1' must be of type float, from 0"),
        (("--seq-length", "0"), "argument --seq-length: '0' must be of type int, from 1"),
        (("--batch", "0"), "argument --batch: '0' must be of type int, from 1"),
        (("--gate", "tanh"), "argument --gate: invalid choice: 'tanh'"),
        (
            ("--num-experts", "7", "--ep", "2"),
            "num_experts=7 does not divide over 2 ranks: ep must divide the number of experts",
        ),
        (("--top-k", "9"), "top_k=9: choose at most num_experts=8"),
        (("--pattern", "M*E"), "Mamba is chapter 5's"),
        (("--data", "/nowhere"), "No such file"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    """They are read before any rank starts; the next test sees a script that does so."""
    with pytest.raises(SystemExit) as stopped:
        flags_of(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2


def flags_of(*words: str):
    """What the script reads from these words; inside of a rank, too."""
    with plant(sys, "argv", [str(SCRIPT), *words]):
        return moe.flags()


@pytest.mark.parametrize("ranks_here", [*range(1, 10), 12])
def test_any_number_of_ranks_needs_no_flag(ranks_here, monkeypatch):
    args = flags_of("--ranks", str(ranks_here))
    assert args.ep == (1 if ranks_here % 2 else 2) and args.world_size == ranks_here
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=ranks_here, WORLD_SIZE=2 * ranks_here
    ).items():
        monkeypatch.setenv(name, str(value))  # as torchrun does on two servers
    args = flags_of()
    assert args.ep == 2 and args.world_size == 2 * ranks_here


def test_the_default_layout_follows_the_number_of_experts():
    assert flags_of("--num-experts", "7").ep == 1 and flags_of("--num-experts", "6").ep == 2


def test_the_flags_are_the_configurations_fields():
    args = flags_of("--hidden-size", "32", "--seed", "3", "--gate", "softmax")
    expected = moe.MoEConfig(hidden_size=32, seed=3, gate="softmax", init_std=0.06)
    assert moe.model_config(args) == expected


def test_the_flags_without_docstrings_and_on_a_narrow_terminal(monkeypatch):
    """python -OO strips docstrings; an encoding without × would end a run of hours in its last
    line.
    """
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(moe, "__doc__", None)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as left:
        flags_of("--help")
    moe.say("ep 2 × dp 1")
    terminal.flush()
    assert left.value.code == 0 and terminal.buffer.getvalue().endswith(b"ep 2 ? dp 1\n")


@pytest.mark.parametrize(
    "flags, verdict",
    [
        ("", False),
        ("--ep 1", False),
        ("--lr 1e-6", "needs the default run"),
        ("--gamma 0.02", "needs the default run"),
        ("--num-experts 16", "needs the default run"),
        ("--moe-latent-size 16", "needs the default run"),
        ("--batch 8", "needs the default run"),
        ("--steps 79", "needs the default run"),
    ],
)
def test_the_load_is_judged_in_the_default_run_alone(flags, verdict):
    """Loads that stay uneven: a failed claim of the default run, and none of another."""
    errors = {
        f"{kind} x": 0.0
        for kind in ("gradient", "norm before clipping", "weight after AdamW", "count of rows")
    }
    with (
        plant(moe, "equivalence", lambda *args: errors),
        plant(moe, "single_device_losses", lambda *args: [1.0]),
        plant(moe, "demonstrate", lambda *args, **options: ([1.0] * 80, [4.0] * 80)),
    ):
        rows = moe.measure(flags_of(*flags.split()), moe.Mesh(), torch.device("cpu"))
    (found,) = [row[3] for row in rows if row[0].startswith("largest load, γ")]
    assert found == verdict


SMALL = (
    "--hidden-size",
    "32",
    "--pattern",
    "E*E",
    "--expert-size",
    "16",
    "--shared-size",
    "16",
    "--batch",
    "4",
)


@pytest.mark.ranks(2)
def test_the_single_device_may_take_longer_than_a_collective():
    """Every rank trains it: a rank that went on alone would time out in its next collective."""
    slept = []

    def slow(self, *batch, original=moe.MoELM.loss):
        if type(self) is moe.MoELM and not slept and self.config.vocab_size == 256:
            slept.append(time.sleep(5))
        return original(self, *batch)

    args = flags_of("--ranks", "2", "--steps", "2", "--timeout", "3", *SMALL)
    mesh = moe.make_mesh(args.ep, ranks.device, args.timeout)
    with plant(moe.MoELM, "loss", slow):
        rows = moe.measure(args, mesh, ranks.device)
    assert slept and [row[3] for row in rows if "first 2 losses" in row[0]] == [True]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", [0, 1])
def test_an_error_that_is_not_a_number_is_the_worst_on_every_rank(where):
    """Also where another rank prints the table: each rank compares the experts that it has."""

    def broken(self, *batch, original=moe.MoELM.loss):
        loss_BS, balance_B = original(self, *batch)
        alone = type(self) is moe.MoELM and dist.get_rank() == where
        return loss_BS * (torch.nan if alone else 1), balance_B

    with plant(moe.MoELM, "loss", broken):
        errors = moe.equivalence(mesh_of(1), ranks.device, torch.float64)
    assert moe.worst(errors, "loss") == moe.worst(errors, "gradient") == math.inf
    with pytest.raises(ValueError):
        moe.worst(errors, "what nobody has")


@pytest.mark.ranks(3, detail=True, timeout=120)
def test_the_script_with_torchs_checks_of_every_collective():
    code, printed = scripts.on_ranks(moe, "--steps", "2", *SMALL)
    assert code == 0 and "3 ranks: ep 1 × dp 3" in printed and "claim " in printed


# ── Extreme values, choices of the user, and what comparisons cannot see ──────────────────────────


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("logit", [-40.0, -50.0, -80.0, -100.0, 40.0])
def test_the_weights_of_extreme_logits_add_up(gate, logit):
    """In fp32 an epsilon of 1e-20 would outweigh the scores; weights, loss and gradients stay
    finite.
    """
    router = moe.Router(config(gate=gate, hidden_size=8, num_experts=8, top_k=3))
    router.weight.data = torch.diag(logit - torch.arange(8.0))
    _, weights_TK, log_scores_TE = router(torch.ones(5, 8))
    assert torch.allclose(weights_TK.sum(-1), torch.tensor(2.5), rtol=1e-6)
    ratio = torch.tensor([1.0, math.exp(-1), math.exp(-2)])
    expected = (
        2.5 * ratio / ratio.sum() if logit < 0 or gate == "softmax" else torch.full((3,), 2.5 / 3)
    )
    if logit > -100:  # there sigmoid is 0 in fp32, and the choice is any
        assert torch.allclose(weights_TK, expected.expand(5, 3), rtol=1e-4)
    balance_B = moe.load_balancing_loss(log_scores_TE[None], 3)
    (balance_B.sum() + weights_TK.square().sum()).backward()
    assert balance_B.isfinite().all() and router.weight.grad.isfinite().all()


FROZEN = {
    "router": ("router.weight",),
    "experts": ("experts.",),
    "one expert matrix": ("experts.down",),
    "shared expert": ("shared.",),
    "embedding": ("embedding.",),
    "all but the last layer": ("embedding.", "layers.0", "layers.1", "layers.2"),
    "all but the output layer": ("embedding.", "layers.", "final_norm"),
}


def frozen_step(frozen, cfg, convert=lambda model, mesh=None: None):
    """One step of both models with the same parameters frozen: their Steps and their gradients."""
    mesh = mesh_of(LAYOUTS[dist.get_world_size()][-1])
    plain, parallel = moe.MoELM(cfg).double(), moe.ParallelMoELM(cfg, mesh.ep_group).double()
    convert(plain)
    convert(parallel, mesh)
    steps = []
    for model, place in ((plain, None), (parallel, mesh)):
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in FROZEN[frozen]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps.append(one_step(model, optimizer, batch_of(9), place, "uneven", **STEP))
    grads = {n: g for n, g in grads_of(parallel).items() if g is not None}
    expected = {n: g for n, g in grads_of(plain).items() if g is not None}
    assert expected and len(expected) < len(grads_of(plain)) and grads.keys() == expected.keys()
    return steps, joined(grads, mesh.ep_group), expected


@pytest.mark.ranks(1, 2, 4, timeout=120)
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen):
    """Any of them: the other gradients and the norm equal the single device's; they have none."""
    (there, here), grads, expected = frozen_step(frozen, config())
    assert_equal(grads, expected)
    assert_equal({"norm": here.norm}, {"norm": there.norm})


@pytest.mark.ranks(2)
def test_a_gradient_that_one_rank_lacks():
    """It counts as zero: were it left out, two ranks would all-reduce buffers of unequal size."""
    first, second = (nn.Parameter(torch.ones(3, device=ranks.device)) for _ in range(2))
    first.grad = torch.ones_like(first)
    if dist.get_rank() == 0:
        second.grad = torch.ones_like(second)
    moe.sum_gradients([first, second])
    assert torch.equal(first.grad, torch.full_like(first, 2))
    assert torch.equal(second.grad, torch.ones_like(second))


@pytest.mark.ranks(2)
def test_a_batch_in_which_no_target_counts():
    """Its loss is 0 and its gradients are those of the balancing loss, not NaN."""
    tokens = batch_of(4)[0]
    batch = tokens, torch.full_like(tokens, -100)
    plain = moe.MoELM(config()).to(ranks.device, torch.float64)
    parallel = moe.ParallelMoELM(config()).to(ranks.device, torch.float64)
    for model, place in ((plain, None), (parallel, mesh_of(2))):
        step = one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, place, **STEP)
        assert step.loss == 0 and 0 < step.norm < math.inf
        assert not step.loss.requires_grad and not step.norm.requires_grad


def test_the_optimizer_has_the_papers_settings():
    optimizer = moe.make_optimizer(moe.MoELM(config()), 0.5)
    assert all(
        g["lr"] == 0.5 and g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8
        for g in optimizer.param_groups
    )
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.ndim > 1 for p in matrices["params"])
    assert vectors["weight_decay"] == 0 and all(p.ndim == 1 for p in vectors["params"])


class OnlyContiguous:
    """`with OnlyContiguous():` collectives refuse what NCCL refuses and gloo accepts."""

    NAMES = ("all_reduce", "all_to_all_single")

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        for name in self.NAMES:
            self.undo.enter_context(plant(dist, name, self.checked(dist.__dict__[name])))

    def checked(self, collective):
        def call(*args, **kwargs):
            tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
            assert all(x.is_contiguous() for x in tensors), collective.__name__
            return collective(*args, **kwargs)

        return call

    def __exit__(self, *error):
        self.undo.close()


@pytest.mark.ranks(2)
def test_every_collective_gets_contiguous_tensors():
    rows = random(3, 4).T.contiguous().T.requires_grad_()
    assert not rows.is_contiguous()
    with OnlyContiguous():
        for call in (moe.all_to_all, lambda *args: moe.start_all_to_all(*args)()):
            there = call(rows, [2, 1], [[2, 2], [1, 1]][dist.get_rank()])
            there.backward(there.detach().T.contiguous().T)
        model = moe.ParallelMoELM(config(), mesh_of(2).ep_group)
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch_of(4), mesh_of(2))
