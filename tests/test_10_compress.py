# SPDX-License-Identifier: MIT-0
"""Chapter 10 equals the single device: scores, slices, depth, the divergence, distillation, search.

A test marked `ranks` is what every rank of that world executes. References: chapter 5's model,
loops written from the definitions, PyTorch's dense losses, brute force, and the single device.
"""

import itertools
import math
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import compress as c
import distill as d
import mamba_hybrid
import pytest
import ranks
import scripts
import search as s
import torch
import torch.distributed as dist
import torch.nn.functional as F
from proof import Shows, assert_differs, assert_equal, plant, worst_of

SCRIPT = Path(c.__file__)
DOUBLE = torch.float64
SIZES = {"hidden_size": 12, "ffn_hidden_size": 10, "mamba_num_heads": 4, "mamba_head_dim": 4}
SIZES |= {"num_attention_heads": 4}

# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> c.HybridConfig:
    sizes = dict(vocab_size=24, hidden_size=16, pattern="M-*M-", ffn_hidden_size=24, init_std=0.2)
    sizes |= dict(num_attention_heads=8, num_query_groups=4, attention_head_dim=4)
    sizes |= dict(mamba_num_heads=8, mamba_num_groups=4, mamba_head_dim=6, mamba_state_dim=5)
    return c.HybridConfig(**(sizes | changes))


def model(mesh=c.ALONE, **changes) -> c.HybridLM:
    return c.HybridLM(config(**changes), mesh).to(ranks.device, DOUBLE)


def batches_of(count=3, rows=4, length=9, seed=1):
    """Global batches with padding of unequal length at the end of the sequences."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens_BT, targets_BT = torch.randint(24, (2, rows, length), generator=generator)
        for row in range(rows):
            targets_BT[row, length - 2 * (row % 3) :] = -100
        found.append((tokens_BT.to(ranks.device), targets_BT.to(ranks.device)))
    return found


text_data = lru_cache(c.TextData)  # reads the text once


@lru_cache
def mesh_of(tp: int) -> c.Mesh:
    return c.make_mesh(tp, ranks.device)


def own(batches, mesh):
    return [c.of_replica(batch, mesh) for batch in batches]


def logits_of(net, tokens_BT):
    with torch.no_grad():
        return net(tokens_BT)


def dense_kl(student_BTV, teacher_BTV, temperature=1.0):
    """By PyTorch, per token."""
    q = F.log_softmax(student_BTV / temperature, -1)
    p = F.log_softmax(teacher_BTV / temperature, -1)
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=DOUBLE, generator=generator).to(ranks.device)


# ── The model ─────────────────────────────────────────────────────────────────────────────────────


def test_the_plain_model_is_chapter_5s():
    """Names, shapes, logits and every gradient."""
    here = model()
    names = {"mamba_heads": 8, "mamba_head_size": 6, "mamba_groups": 4, "state_size": 5}
    names |= {"attention_heads": 8, "attention_groups": 4, "attention_head_size": 4}
    sizes = dict(vocab_size=24, hidden_size=16, pattern="M-*M-", ffn_hidden_size=24, chunk=4)
    there = mamba_hybrid.HybridLM(mamba_hybrid.HybridConfig(**sizes, **names)).double()
    there.load_state_dict(here.state_dict())
    ((tokens_BT, targets_BT),) = batches_of(1)
    assert_equal({"logits": here(tokens_BT)}, {"logits": there(tokens_BT)}, 1e-12)
    c.cross_entropy(here, tokens_BT, targets_BT).sum().backward()
    there.loss(tokens_BT, targets_BT).sum().backward()
    reference = {name: p.grad for name, p in there.named_parameters()}
    assert_equal(c.gradients(here), reference, 1e-11)


def test_long_sums_keep_their_digits():
    """The recurrence in fp32 after 512 tokens, half of which decay fast, compared with float64."""
    T = 512
    a = torch.full((1, T, 1), -8.0, dtype=DOUBLE, device=ranks.device)
    a[:, 1::2] = -0.001
    X, B, C = random(1, T, 1, 2), random(1, T, 1, 3, seed=2), random(1, T, 1, 3, seed=3)
    right = c.ssd(X, a, B, C)
    found = c.ssd(*(x.float() for x in (X, a, B, C)))
    assert found.dtype == torch.float32
    assert (found - right).abs().max() < 1e-6 * right.abs().max()


def test_shapes_and_initial_weights():
    """The table of axes has the model's shapes; initial dt and A are in chapter 5's ranges."""
    weights = c.initial_weights(config(mamba_num_heads=400))
    for name, x in weights.items():
        assert x.shape == c.parameter_shapes(config(mamba_num_heads=400))[name]
    dt = F.softplus(weights["layers.0.mixer.dt_bias"])
    A = weights["layers.0.mixer.A_log"].exp()
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 + 1e-6
    assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16
    again = c.initial_weights(config(mamba_num_heads=400))
    assert all(torch.equal(x, again[name]) for name, x in weights.items())


# ── Slices ────────────────────────────────────────────────────────────────────────────────────────


def test_all_units_kept_is_the_identity_to_the_bit():
    large = model()
    scores = c.importance(large, batches_of())
    small = c.prune(large, {}, scores)
    ours = large.state_dict()
    assert small.config == large.config
    for name, x in small.state_dict().items():
        assert torch.equal(x, ours[name]) and x.data_ptr() != ours[name].data_ptr()
    before = {name: x.clone() for name, x in ours.items()}
    c.prune(large, SIZES, scores)
    assert all(torch.equal(x, before[name]) for name, x in large.state_dict().items())


def test_the_rows_of_section_1_1():
    """Heads 0 and 2 of 4 stay, and dimension 1 of 2: z 1, 5; x 9, 13; then B, C; dt."""
    sizes = dict(mamba_num_heads=4, mamba_head_dim=2, mamba_num_groups=1, mamba_state_dim=1)
    kept = {"mamba_num_heads": torch.tensor([0, 2]), "mamba_head_dim": torch.tensor([1])}
    rows = c.rows_of("layers.0.mixer.in_proj.weight", config(pattern="M", **sizes), kept)
    assert list(rows) == [0] and rows[0].tolist() == [1, 5, 9, 13, 16, 17, 18, 20]


def test_a_slice_by_hand():
    """Every tensor of a Mamba layer with head 1 of 2 kept, written out."""
    sizes = dict(mamba_num_heads=2, mamba_num_groups=1, mamba_head_dim=3, mamba_state_dim=2)
    net = model(pattern="M", **sizes)
    w = {k.removeprefix("layers.0.mixer."): x for k, x in net.state_dict().items()}
    kept = {"layers.0.mamba_num_heads": torch.tensor([1])}
    small = c.slice_state_dict(net.state_dict(), net.config, kept)
    z, x, B, C, dt = w["in_proj.weight"].split([6, 6, 2, 2, 2])
    expected = {
        "in_proj.weight": torch.cat([z[3:], x[3:], B, C, dt[1:]]),
        "conv_weight": w["conv_weight"][3:],
        "conv_bias": w["conv_bias"][3:],
        "dt_bias": w["dt_bias"][1:],
        "A_log": w["A_log"][1:],
        "D": w["D"][1:],
        "norm.weight": w["norm.weight"][3:],
        "out_proj.weight": w["out_proj.weight"][:, 3:],
    }
    for name, y in expected.items():
        assert torch.equal(small[f"layers.0.mixer.{name}"], y), name
    assert torch.equal(small["embedding.weight"], w["embedding.weight"])


def silent(net: c.HybridLM, kind: str, units: list[int]) -> dict[str, torch.Tensor]:
    """The state dict with the weights of these units at zero."""
    weights = {name: x.clone() for name, x in net.state_dict().items()}
    axis = {"hidden_size": c.HIDDEN, "ffn_hidden_size": c.FEATURES}.get(kind, None)
    for name, x in weights.items():
        others = [i for i in range(getattr(net.config, kind)) if i not in units]
        rows = c.rows_of(name, net.config, {kind: torch.tensor(others)})
        if "dt_bias" in name or "A_log" in name or ("norm" in name and axis is None):
            continue
        for dim, index in rows.items():
            mask = torch.zeros(x.shape[dim], dtype=DOUBLE, device=x.device)
            mask[index] = 1
            x.mul_(mask.view([-1 if i == dim else 1 for i in range(x.ndim)]))
    return weights


@pytest.mark.parametrize(
    "kind, units",
    [
        ("ffn_hidden_size", [0, 7, 20]),
        ("num_attention_heads", [1, 2, 5, 7]),
        ("mamba_num_heads", [0, 3, 4, 6]),
        ("mamba_head_dim", [0, 4]),
        ("hidden_size", [3, 4, 11]),
    ],
)
def test_units_of_zeros_rank_last_and_are_removed_exactly(kind, units):
    """Where a norm follows, its weight is rescaled: it divides by a smaller number of channels.

    A query head cannot be silent while its group's values are not: what makes its weights zeros is
    its columns of the output. So its activations do not rank it last, and it is chosen here.
    """
    net = model(norm_eps=1e-30)
    net.load_state_dict(silent(net, kind, units))
    total = getattr(net.config, kind)
    size = total - len(units)
    scores = c.importance(net, batches_of())
    if kind == "num_attention_heads":
        scores["layers.2.num_attention_heads"][units] = 0
    small = c.prune(net, {kind: size}, scores)
    others = [i for i in range(total) if i not in units]
    expected = c.slice_state_dict(net.state_dict(), net.config, {kind: torch.tensor(others)})
    for name, x in small.state_dict().items():
        assert torch.equal(x, expected[name]), name
    factor = math.sqrt(total / size)
    with torch.no_grad():
        for name, p in small.named_parameters():
            inner = name.endswith("mixer.norm.weight")
            if "norm.weight" in name and (
                (inner and "mamba" in kind) or (not inner and kind == "hidden_size")
            ):
                p *= factor
    tokens_BT = batches_of()[0][0]
    here = {"logits": logits_of(small, tokens_BT)}
    assert_equal(here, {"logits": logits_of(net, tokens_BT)}, 1e-12)


def test_heads_may_change_places_only_within_their_group():
    net = model()
    tokens_BT = batches_of()[0][0]
    reference = {"logits": logits_of(net, tokens_BT)}
    for kind in ("mamba_num_heads", "num_attention_heads"):
        for order, good in (([1, 0, 2, 3, 5, 4, 6, 7], True), ([2, 1, 0, 3, 4, 5, 6, 7], False)):
            kept = {kind: torch.tensor(order)}
            weights = c.slice_state_dict(net.state_dict(), net.config, kept)
            moved = {"logits": logits_of(c.HybridLM(net.config, weights=weights), tokens_BT)}
            if good:
                assert_equal(moved, reference, 1e-12)
            else:
                assert_differs(moved, reference)


# ── Importance ────────────────────────────────────────────────────────────────────────────────────


def by_definition(of_sequences) -> torch.Tensor:
    """√ Σ_b (mean_t |y|)², of one (T, C) per sequence."""
    return torch.stack([y.abs().mean(0) for y in of_sequences]).square().sum(0).sqrt()


def test_scores_by_their_definition():
    """Sequence by sequence, without padding, from activations that hooks of torch see."""
    net = model()
    seen = {}

    def watch(layer, axis, y_BTC):
        seen.setdefault((layer, axis), []).append(y_BTC[0])

    for tokens_BT, targets_BT in batches_of():
        for tokens_T, targets_T in zip(tokens_BT, targets_BT):
            with torch.no_grad():
                net.hidden(tokens_T[None, : int((targets_T != -100).sum())], probe=watch)
    scores = c.importance(net, batches_of())
    hidden = sum(by_definition(seen[layer, "hidden_size"]) for layer in range(5))
    assert_equal({"D": scores["hidden_size"][:, 0]}, {"D": hidden}, 1e-12)
    for layer, axis in ((0, "mamba_num_heads"), (1, "ffn_hidden_size"), (2, "num_attention_heads")):
        score = by_definition(seen[layer, axis])
        found = scores[f"layers.{layer}.{axis}"]
        assert len(found) == getattr(net.config, axis)
        assert_equal({axis: found.flatten()}, {axis: score}, 1e-12)


def test_what_is_watched():
    """The input of down_proj, x of in_proj's output and the heads' outputs, recomputed."""
    net = model(pattern="-")
    tokens_BT = batches_of()[0][0]
    seen = {}
    with torch.no_grad():
        net.hidden(tokens_BT, probe=lambda layer, axis, y: seen.setdefault(axis, y))
    w = net.state_dict()
    x = w["embedding.weight"][tokens_BT]
    normed = x / (x.square().mean(-1, keepdim=True) + net.config.norm_eps).sqrt()
    up = normed @ w["layers.0.mixer.up_proj.weight"].mT
    expected = {"hidden_size": normed, "ffn_hidden_size": up.clamp(min=0) ** 2}
    assert_equal(seen, expected, 1e-12)
    net = model(pattern="M")
    with torch.no_grad():
        net.hidden(tokens_BT, probe=lambda layer, axis, y: seen.update({axis: y}))
    rows = net.state_dict()["layers.0.mixer.in_proj.weight"][48:96]
    normed = seen["hidden_size"]
    assert_equal({"x": seen["mamba_num_heads"]}, {"x": normed @ rows.mT}, 1e-12)


def test_dimensions_are_chosen_first_and_heads_by_what_is_left():
    score_HP = torch.tensor([[9.0, 0, 0], [0, 5, 5], [0, 6, 6], [1, 4, 4]])
    scores = {"hidden_size": torch.ones(16, 1), "layers.0.mamba_num_heads": score_HP}
    sizes = dict(mamba_num_heads=4, mamba_num_groups=2, mamba_head_dim=3)
    changes = {"mamba_num_heads": 2, "mamba_head_dim": 1}
    _, kept = c.choose(scores, config(pattern="M", **sizes), changes)
    assert kept["layers.0.mamba_head_dim"].tolist() == [0]
    assert kept["layers.0.mamba_num_heads"].tolist() == [0, 3]
    small, kept = c.choose(scores, config(pattern="M", **sizes), changes | {"mamba_head_dim": 2})
    assert kept["layers.0.mamba_head_dim"].tolist() == [0, 1] and small.mamba_head_dim == 2


def test_ties_go_to_the_first():
    assert c.best(torch.tensor([1.0, 2, 2, 2]), 2).tolist() == [1, 2]
    assert c.best_in_groups(torch.tensor([9.0, 8, 7, 6, 5, 1, 1, 1]), 2, 4).tolist() == [0, 1, 4, 5]


@pytest.mark.ranks(2, 4)
def test_scores_and_their_order_on_every_mesh():
    """Replicas have unequally many sequences, tokens and batches; one may have none."""
    reference = c.importance(model(), batches_of())
    world = dist.get_world_size()
    for tp in (tp for tp in (1, 2, 4) if tp <= world):
        mesh = mesh_of(tp)
        net = model(mesh)
        batches = batches_of()
        mine = own(batches, mesh)
        if mesh.dp > 1:  # the last replica's sequences go to the first one
            last = mesh.dp - 1
            share = [c.of_replica(x, replace(mesh, dp_rank=last)) for x in batches]
            mine = {0: mine + share, last: []}.get(mesh.dp_rank, mine)
        scores = c.importance(net, mine)
        assert_equal(scores, reference, 1e-12)
        _, kept = c.choose(scores, net.config, SIZES)
        _, expected = c.choose(reference, net.config, SIZES)
        assert all(kept[name].tolist() == units.tolist() for name, units in expected.items())
        everyone = [None] * world
        dist.all_gather_object(everyone, {k: x.tolist() for k, x in scores.items()})
        assert all(other == everyone[0] for other in everyone)  # to the bit


@pytest.mark.ranks(2)
def test_all_ranks_take_one_ranks_scores_of_the_stream():
    """Rounding that differs between ranks of a tp group cannot make them keep other channels."""
    right = c._reduce_over

    def noisy(x, group, op=dist.ReduceOp.SUM):
        x = right(x, group, op)
        return x * (1 + 1e-15 * dist.get_rank()) if x.ndim == 1 else x

    with plant(c, "_reduce_over", noisy):
        scores = c.importance(model(mesh_of(2)), batches_of())
    everyone = [None] * 2
    dist.all_gather_object(everyone, scores["hidden_size"].tolist())
    assert everyone[0] == everyone[1]


# ── Weights on ranks ──────────────────────────────────────────────────────────────────────────────


def test_shards_merge_to_the_bit():
    full = model().state_dict()
    for tp in (1, 2, 4):
        shards = [c.shard_state_dict(full, config(), rank, tp) for rank in range(tp)]
        merged = c.merge_state_dicts(shards, config())
        assert merged.keys() == full.keys()
        assert all(torch.equal(x, merged[name]) for name, x in full.items())
        if tp > 1:
            for value in (1 + 1e-9, math.nan):  # on one rank alone
                shards[-1]["final_norm.weight"][0] = value
                message = f"final_norm.weight should be replicated, but rank {tp - 1}'s differs"
                with pytest.raises(ValueError, match=message):
                    c.merge_state_dicts(shards, config())
            for shard in shards:  # a model that has diverged is no disagreement of ranks
                shard["final_norm.weight"][0] = math.nan
            assert c.merge_state_dicts(shards, config())["final_norm.weight"][0].isnan()


def test_prune_then_shard_is_shard_then_prune_for_balanced_sets():
    """Heads in groups are balanced; features are made so. Each rank slices its own shard."""
    net = model()
    scores = c.importance(net, batches_of())
    small, kept = c.choose(scores, net.config, SIZES)
    for name in [name for name in kept if name.endswith("ffn_hidden_size")]:
        kept[name] = c.best_in_groups(scores[name][:, 0], 2, small.ffn_hidden_size)
    pruned = c.slice_state_dict(net.state_dict(), net.config, kept)
    for rank in range(2):
        first = c.shard_state_dict(pruned, small, rank, 2)
        mine = {}
        for name, units in kept.items():
            size = getattr(net.config, name.rpartition(".")[2])
            if name in ("hidden_size",) or name.endswith("mamba_head_dim"):
                mine[name] = units
                continue
            half = size // 2
            mine[name] = units[(units >= rank * half) & (units < (rank + 1) * half)] - rank * half
        shard = c.shard_state_dict(net.state_dict(), net.config, rank, 2)
        local = c.local_config(net.config, 2)
        for name, x in shard.items():
            assert torch.equal(c.slice_tensor(name, x, local, mine), first[name]), name


@pytest.mark.ranks(4)
def test_pruning_on_a_mesh_is_that_of_a_device_to_the_bit():
    """Features are removed unevenly between ranks."""
    scores = c.importance(model(), batches_of())
    for name in [name for name in scores if name.endswith("ffn_hidden_size")]:
        scores[name] = torch.arange(24.0)[:, None]  # all that stay are on the last ranks
    plain = c.prune(model(), SIZES | {"ffn_hidden_size": 8}, scores)
    for tp in (1, 2, 4):
        net = c.prune(model(mesh_of(tp)), SIZES | {"ffn_hidden_size": 8}, scores)
        expected = c.shard_state_dict(plain.state_dict(), plain.config, net.mesh.tp_rank, tp)
        for name, x in net.state_dict().items():
            assert torch.equal(x, expected[name]), name
        full = c.gathered(net.state_dict(), net)
        assert all(torch.equal(x, full[name]) for name, x in plain.state_dict().items())


@pytest.mark.ranks(2, 4)
def test_equivalence_on_every_mesh():
    """Scores, depth, training and distillation, five steps of AdamW with clipping."""
    world = dist.get_world_size()
    for tp in (tp for tp in (1, 2, 4) if tp <= world):
        for module in (c, d):
            errors = module.equivalence(mesh_of(tp), ranks.device, DOUBLE)
            assert max(errors.values()) <= 1e-10, max(errors, key=errors.get)
            kinds = {name.split()[0] for name in errors}
            assert {"gradient", "norm", "weight", "loss"} < kinds
            assert all(math.isfinite(error) for error in errors.values())


# ── Training against PyTorch ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["cross entropy", "KL"])
def test_five_steps_by_hand(kind):
    """AdamW and clipping by PyTorch; the dense losses; a mean over all tokens that count."""
    teacher, net, other = model(seed=5), model(), model()
    loss = d.divergence_from(teacher, 2.0) if kind == "KL" else c.cross_entropy
    batches = batches_of(5)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    steps = c.train(net, c.make_optimizer(net, 1e-2), batches, loss, max_norm=0.05)
    for (tokens_BT, targets_BT), (found, norm) in zip(batches, steps):
        counted = targets_BT != -100
        logits = other(tokens_BT)[counted]
        if kind == "KL":
            expected = dense_kl(logits, logits_of(teacher, tokens_BT)[counted], 2.0).mean()
        else:
            expected = F.cross_entropy(logits, targets_BT[counted])
        optimizer.zero_grad()
        expected.backward()
        right = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
        assert right > 0.05
        pair = {"loss": found, "norm": norm}
        assert_equal(pair, {"loss": expected.detach(), "norm": right}, 1e-10)
    assert_equal(net.state_dict(), other.state_dict(), 1e-10, floor=5e-2)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("frozen", ["embedding.weight", "layers.0.", "head.weight"])
def test_frozen_parameters(frozen):
    """They stay, and all others make the steps of a single device."""
    for tp in (1, dist.get_world_size()):
        nets = [model(), model(mesh_of(tp))]
        norms = []
        for net in nets:
            for name, p in net.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
            trained = [p for p in net.parameters() if p.requires_grad]
            steps = c.train(net, torch.optim.SGD(trained, 0.1), batches_of())
            norms.append([norm for _, norm in steps])
        before = model().state_dict()
        right, found = nets[0].state_dict(), c.gathered(nets[1].state_dict(), nets[1])
        assert_equal(found, right, 1e-10)
        assert_equal(dict(enumerate(norms[1])), dict(enumerate(norms[0])), 1e-10)
        for name, x in found.items():
            assert torch.equal(x, before[name]) == name.startswith(frozen)


def test_a_batch_in_which_nothing_counts():
    net = model()
    tokens_BT = torch.zeros(2, 4, dtype=torch.int64, device=ranks.device)
    ((loss, norm),) = c.train(net, c.make_optimizer(net, 1e-2), [(tokens_BT, tokens_BT - 100)])
    assert loss == 0 and norm == 0


# ── The divergence ────────────────────────────────────────────────────────────────────────────────

KL_CASES = [(1.0, 23, False), (2.5, 17, True), (0.5, 24, True)]  # τ, entries, −∞ in the teacher


@pytest.mark.ranks(1, 2, 4)
def test_value_and_gradient_of_the_divergence_are_the_dense_ones():
    """With padding columns, also ranks of padding alone; large logits; a masked teacher."""
    world = dist.get_world_size()
    rank = dist.get_rank()
    for temperature, entries, masked in KL_CASES:
        student, teacher = random(3, 5, 24, seed=2), random(3, 5, 24, seed=3)
        student[0] *= 300
        if masked:
            teacher[:, :, 2:9] = -torch.inf
        leaf = student[..., :entries].clone().requires_grad_()
        weight = random(3, 5, seed=4)
        expected = dense_kl(leaf, teacher[..., :entries], temperature)
        p = F.log_softmax(teacher[..., :entries] / temperature, -1)
        q = F.log_softmax(leaf / temperature, -1)
        terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0)  # kl_div has NaN there
        expected = temperature**2 * terms.sum(-1)
        expected.backward(weight)
        group = None if world == 1 else dist.group.WORLD
        mine = student.chunk(world, -1)[rank].clone().requires_grad_()
        kept = mine.detach().clone()
        shard = teacher.chunk(world, -1)[rank]
        found = d.vocab_parallel_kl(mine, shard, group, entries, temperature)
        found.backward(weight)
        reference = torch.zeros_like(student)
        reference[..., :entries] = leaf.grad
        grad = reference.chunk(world, -1)[rank]
        assert_equal({"kl": found}, {"kl": expected}, 1e-12)
        gap = (mine.grad - grad).abs().max()
        assert gap <= 1e-12 * reference.abs().max() and torch.equal(mine.detach(), kept)
        q_minus_p = q.exp() - p.exp()
        assert_equal({"q − p": leaf.grad}, {"q − p": temperature * weight[..., None] * q_minus_p})


@pytest.mark.ranks(2)
def test_five_scalars_a_token_are_sent():
    """Two all-reduces, of 2 and 3 scalars a token, and none in backward; no tensor of size V."""
    sent = []
    right = dist.all_reduce

    def counting(x, *args, **keywords):
        sent.append(x.numel())
        return right(x, *args, **keywords)

    mine = random(4, 7, 50).requires_grad_()
    with plant(dist, "all_reduce", counting):
        d.vocab_parallel_kl(mine, random(4, 7, 50, seed=2), dist.group.WORLD).sum().backward()
    assert sent == [2 * 28, 3 * 28]


def test_low_precision_logits_are_upcast():
    student = random(2, 3, 40).bfloat16().requires_grad_()
    teacher = random(2, 3, 40, seed=2).bfloat16()
    found = d.vocab_parallel_kl(student, teacher)
    found.sum().backward()
    assert found.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    expected = dense_kl(student.detach().double(), teacher.double())
    assert_equal({"kl": found.double()}, {"kl": expected}, 1e-5)


def test_a_student_that_equals_its_teacher():
    x = random(2, 3, 40).requires_grad_()
    kl = d.vocab_parallel_kl(x, x.detach().clone())
    kl.sum().backward()
    assert kl.abs().max() < 1e-14 and x.grad.abs().max() < 1e-15


# ── Depth ─────────────────────────────────────────────────────────────────────────────────────────


def without(net, gone, tokens_BT):
    """A model of the other layers, built anew."""
    pattern = "".join(x for i, x in enumerate(net.config.pattern) if i not in gone)
    stay = [i for i in range(len(net.config.pattern)) if i not in gone]
    weights = {}
    for name, x in net.state_dict().items():
        if not name.startswith("layers."):
            weights[name] = x
        elif int(name.split(".")[1]) in stay:
            _, old, rest = name.split(".", 2)
            weights[f"layers.{stay.index(int(old))}.{rest}"] = x
    return c.HybridLM(replace(net.config, pattern=pattern), weights=weights)


def error_of(net, gone, batches, by):
    gaps = []
    for tokens_BT, targets_BT in batches:
        small = without(net, gone, tokens_BT)
        outputs = [m(tokens_BT) if by == "logits" else m.hidden(tokens_BT) for m in (net, small)]
        gaps.append((outputs[0] - outputs[1])[targets_BT != -100])
    return torch.cat(gaps).square().mean().item()


@torch.no_grad()
def test_depth_by_brute_force():
    """Errors by models that are built without the layer; ranking anew after each removal."""
    batches = batches_of(2)
    for seed in range(3):
        net = model(seed=seed, init_std=0.5)
        for by in ("logits", "hidden"):
            expected = torch.tensor([error_of(net, {i}, batches, by) for i in range(5)])
            found = d.removal_errors(net, batches, by=by)
            assert_equal({by: found}, {by: expected.double()}, 1e-7)
        gone = []
        while len(gone) < 3:
            left = [i for i in range(5) if i not in gone]
            gone.append(min(left, key=lambda i: error_of(net, {*gone, i}, batches, "logits")))
        score_L = d.rank_layers(net, batches, 2)
        assert [int(i) for i in score_L.argsort()[:3]] == gone and score_L.isinf().sum() == 2
        small = d.prune_layers(net, 2, score_L)
        tokens_BT = batches[0][0]
        assert torch.equal(small(tokens_BT), without(net, set(gone), tokens_BT)(tokens_BT))
        one_shot = d.rank_layers(net, batches, 2, by="hidden")
        assert torch.equal(one_shot, d.removal_errors(net, batches, by="hidden"))


def test_where_the_criteria_disagree():
    """Errors of single layers do not add up: after a removal the order of the others changes."""
    batches = batches_of(2)
    found = {"one shot": 0, "hidden": 0}
    for seed in range(12):
        if min(found.values()) > 0:
            break
        net = model(seed=seed, init_std=0.5, pattern="M-*M--")
        ranked = d.rank_layers(net, batches, 3).argsort()[:3].tolist()
        one_shot = d.removal_errors(net, batches).argsort()[:3].tolist()
        hidden = d.rank_layers(net, batches, 3, by="hidden").argsort()[:3].tolist()
        assert ranked[0] == one_shot[0]
        found["one shot"] += ranked != one_shot
        found["hidden"] += ranked != hidden
    assert min(found.values()) > 0, found


# ── Search ────────────────────────────────────────────────────────────────────────────────────────


def brute_force(layers, budget):
    fitting = [x for x in itertools.product(*layers) if sum(o.cost for o in x) <= budget]
    return max((sum(o.score for o in x) for x in fitting), default=None)


def test_the_search_is_brute_force_for_every_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        layers = []
        for _ in range(4):
            costs = torch.randint(0, 9, (3,), generator=generator).tolist()
            scores = torch.randint(-4, 9, (3,), generator=generator).tolist()
            layers.append([s.Option(str(i), *x) for i, x in enumerate(zip(costs, scores))])
        last = -math.inf
        for budget in range(40):
            expected = brute_force(layers, budget)
            if expected is None:
                with pytest.raises(ValueError, match=f"budget={budget}, but the cheapest choice"):
                    s.search(layers, budget)
                continue
            chosen = s.search(layers, budget)
            found = sum(option.score for option in chosen)
            assert found == expected and sum(option.cost for option in chosen) <= budget
            assert all(option in options for option, options in zip(chosen, layers))
            assert found >= last
            last = found


def test_the_trade_off_of_section_3():
    layers = [
        [s.Option("a", 2, 5), s.Option("b", 1, 1)],
        [s.Option("c", 3, 4), s.Option("d", 1, 2)],
    ]
    found = [sum(option.score for option in s.search(layers, budget)) for budget in (2, 3, 4, 5)]
    assert found == [3, 7, 7, 9]


def test_memory_and_candidates():
    small = config()
    counted = sum(p.numel() for p in model().parameters())
    found = s.memory(small, 10)
    assert found.weights == 2 * counted and found.cache == 1 * 2 * 16 * 10 * 2
    assert found.state == 2 * 2 * (48 * 5 + (48 + 40) * 3) and found.total == sum(
        vars(found).values()
    )
    assert s.memory(small, 0).cache == 0 and s.memory(small, 10, 4, 8).weights == counted // 2
    choices = {"hidden_size": [8, 12, 16], "ffn_hidden_size": [8, 24]}
    every = s.candidates(small, choices, 1e9, 10)
    totals = [one.total for one, _ in every]
    assert len(every) == 6 and totals == sorted(totals, reverse=True)
    fitting = s.candidates(small, choices, totals[2], 10)
    assert [one.total for one, _ in fitting] == totals[2:]
    with pytest.raises(ValueError, match="nothing fits into 0.00 GiB: the smallest has"):
        s.candidates(small, choices, 1, 10)
    nano = s.memory(s.NANO_9B, 131_072)
    assert [round(x / s.GIB, 2) for x in (nano.weights, nano.cache, nano.state)] == [
        16.56,
        2.0,
        0.07,
    ]


def test_the_search_prints_nano_2s_shape(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search.py"])
    s.main()
    page = capsys.readouterr().out
    assert "of 414 shapes fit into 19.66 GiB" in page and "Nano-9B-v2, place" in page
    monkeypatch.setattr(sys, "argv", ["search.py", "--budget", "1"])
    with pytest.raises(SystemExit, match="nothing fits into 1.00 GiB"):
        s.main()


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def divergence_with(reduction: str):
    """KL of (B, T, V) logits by F.kl_div with one of its reductions: the loss, and the gradient."""
    student, teacher = random(3, 5, 24, seed=2).requires_grad_(), random(3, 5, 24, seed=3)
    q, p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    loss = F.kl_div(q, p, reduction=reduction, log_target=True)
    loss.backward()
    right = student.detach().clone().requires_grad_()
    expected = d.vocab_parallel_kl(right, teacher).mean()
    expected.backward()
    wrong = {"loss": loss.detach(), "gradient": student.grad}
    return wrong, {"loss": expected.detach(), "gradient": right.grad}


def shows(wrong, right) -> Shows:
    loss, gradient = (worst_of({k: wrong[k]}, {k: right[k]}) for k in ("loss", "gradient"))
    return Shows(loss, gradient)


@pytest.mark.planted_bug(
    symptom="the loss and the learning rate are V times too small; it falls all the same",
    seen_in="https://github.com/neuralmagic/sparseml/issues/592",
)
def test_kl_div_with_mean_divides_by_the_vocabulary():
    wrong, right = divergence_with("mean")
    assert torch.allclose(24 * wrong["gradient"], right["gradient"], rtol=1e-10)
    return shows(wrong, right)


@pytest.mark.planted_bug(
    symptom="the loss and the learning rate are T times too large, and change with the length",
    seen_in="https://github.com/neuralmagic/sparseml/issues/674",
)
def test_kl_div_with_batchmean_divides_by_sequences_alone():
    wrong, right = divergence_with("batchmean")
    assert torch.allclose(wrong["gradient"] / 5, right["gradient"], rtol=1e-10)
    return shows(wrong, right)


@pytest.mark.planted_bug(
    symptom="another temperature is another learning rate: with τ = 2 a quarter",
    seen_in="https://github.com/keras-team/keras-io/issues/869",
)
def test_a_temperature_without_its_square():
    student, teacher = random(3, 5, 24, seed=2), random(3, 5, 24, seed=3)
    found = {}
    for name, tau in (("right", 2.0), ("wrong", 1.0)):
        leaf = student.clone().requires_grad_()
        loss = d.vocab_parallel_kl(leaf * tau / 2, teacher * tau / 2, temperature=tau).mean()
        loss.backward()
        found[name] = {"loss": loss.detach(), "gradient": leaf.grad}
    assert torch.allclose(4 * found["wrong"]["gradient"], found["right"]["gradient"])
    return shows(found["wrong"], found["right"])


def pruned_with(planted: str, replacement, sizes=SIZES, net=None, batches=None):
    """Logits of a pruned model, with a function of the chapter replaced and as it is."""
    net = net or model()
    scores = c.importance(net, batches_of())
    right = c.prune(net, sizes, scores)
    with plant(c, planted, replacement):
        wrong = c.prune(net, sizes, scores)
    tokens_BT = batches_of()[0][0]
    pair = [{"logits": logits_of(m, tokens_BT)} for m in (wrong, right)]
    return wrong, right, pair


def loss_of(net) -> torch.Tensor:
    ((tokens_BT, targets_BT),) = batches_of(1)
    with torch.no_grad():
        return {"loss": c.partial_mean(net, (tokens_BT, targets_BT), c.cross_entropy)}


@pytest.mark.planted_bug(
    symptom="shapes are right and heads read another group's B and C: a worse start, no error",
    seen_in=None,
)
def test_mamba_heads_ranked_across_groups():
    net = model(pattern="M-M-")
    with torch.no_grad():  # group 0 is the largest
        for i in (0, 2):
            net.state_dict()[f"layers.{i}.mixer.in_proj.weight"][48:60] *= 3

    def globally(score_H, groups, count):
        return c.best(score_H, count)

    wrong, right, pair = pruned_with("best_in_groups", globally, {"mamba_num_heads": 4}, net)
    rows = c.parameter_shapes(wrong.config)
    assert rows == c.parameter_shapes(right.config)
    assert_differs(*pair)
    return Shows(worst_of(loss_of(wrong), loss_of(right)), worst_of(*pair))


@pytest.mark.planted_bug(
    symptom="query heads read other keys than they were trained with; nothing fails",
    seen_in="https://github.com/whittle-org/whittle/issues/320",
)
def test_query_heads_sliced_without_their_groups():
    net = model(pattern="*-")
    with torch.no_grad():
        net.state_dict()["layers.0.mixer.v_proj.weight"][:8] *= 3

    def globally(score_H, groups, count):
        return c.best(score_H, count)

    sizes = {"num_attention_heads": 4}
    wrong, right, pair = pruned_with("best_in_groups", globally, sizes, net)
    assert_differs(*pair)
    return Shows(worst_of(loss_of(wrong), loss_of(right)), worst_of(*pair))


@pytest.mark.planted_bug(
    symptom="heads get the time constants of other heads: shapes fit, the model is worse",
    seen_in=None,
)
def test_dt_bias_left_out_of_the_slice():
    """A slice by hand that takes the first heads' dt_bias."""
    net = model(mamba_num_heads=8)
    right_axes = c.parameter_axes

    def slice_wrongly(name, x, config, kept):
        if name.endswith("dt_bias"):
            count = len(kept.get(f"{c.place_of(name)}.mamba_num_heads", x))
            return x[:count].clone()
        return right_slice(name, x, config, kept)

    right_slice = c.slice_tensor
    with torch.no_grad():
        for i in (0, 3):
            net.state_dict()[f"layers.{i}.mixer.dt_bias"].copy_(torch.linspace(-4, 2, 8))
    wrong, right, pair = pruned_with("slice_tensor", slice_wrongly, SIZES, net)
    assert right_axes(wrong.config) == right_axes(right.config)
    assert_differs(*pair)
    return Shows(worst_of(loss_of(wrong), loss_of(right)), worst_of(*pair))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="which units are kept depends on the number of replicas",
    seen_in="https://github.com/NVIDIA/Model-Optimizer",
)
def test_roots_summed_over_replicas():
    reference = c.importance(model(), batches_of())
    mesh = mesh_of(1)
    right = c._reduce_over

    def roots(x, group, op=dist.ReduceOp.SUM):
        return right(x.sqrt(), group, op).square()

    with plant(c, "_reduce_over", roots):
        scores = c.importance(model(mesh), own(batches_of(), mesh))
    assert_differs(scores, reference, 1e-2)
    axis = "layers.1.ffn_hidden_size"
    orders = [x[axis][:, 0].argsort().tolist() for x in (scores, reference)]
    assert orders[0] != orders[1]
    return Shows(None, worst_of(scores, reference))


@pytest.mark.planted_bug(
    symptom="short sequences count less, and padding's activations choose the units", seen_in=None
)
def test_padding_in_the_statistics():
    net = model()
    right = c.importance(net, batches_of())
    wrong = c.importance(net, [(tokens, tokens) for tokens, _ in batches_of()])
    assert_differs(wrong, right, 1e-2)
    return Shows(None, worst_of(wrong, right))


@pytest.mark.planted_bug(
    symptom="the loss is 0 from the first step on, training runs and nothing is learned",
    seen_in="https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/66",
)
def test_a_teacher_that_is_the_student():
    net = model()
    optimizer = c.make_optimizer(net, 1e-2)
    with pytest.raises(ValueError, match="teacher and student share parameters"):
        next(c.train(net, optimizer, batches_of(1), d.divergence_from(net)))
    with plant(d, "check_teacher", lambda student, teacher: None):
        losses = [
            loss for loss, _ in c.train(net, optimizer, batches_of(3), d.divergence_from(net))
        ]
    assert max(abs(loss.item()) for loss in losses) < 1e-14
    return Shows("0 from the first step", "0")


@pytest.mark.planted_bug(
    symptom="the gradient gets noisier the better the student is",
    seen_in="https://github.com/vllm-project/speculators/issues/788",
)
def test_a_divergence_in_bf16():
    """Near the teacher the rounding of both distributions is as large as their difference."""
    teacher = random(4, 8, 64, seed=3)
    errors = []
    for distance in (1.0, 0.03):
        student = (teacher + distance * random(4, 8, 64, seed=2)).requires_grad_()
        d.vocab_parallel_kl(student, teacher).sum().backward()
        right = student.grad.clone()
        q = student.detach().bfloat16().softmax(-1)
        p = teacher.bfloat16().softmax(-1)
        wrong = (q - p).double()
        errors.append(((wrong - right).norm() / right.norm()).item())
    assert errors[1] > 5 * errors[0] and errors[1] > 0.1
    return Shows(None, errors[1])


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the gradient is tp times too large: a higher learning rate, no error", seen_in=None
)
def test_a_divergence_whose_sums_autograd_reduces_again():
    """log-sum-exp written with chapter 2's operators in the wrong pair: all-reduce both ways."""
    teacher, student = random(3, 5, 24, seed=3), random(3, 5, 24, seed=2)
    rank = dist.get_rank()
    mine, of_teacher = (x.chunk(2, -1)[rank] for x in (student, teacher))
    right, wrong = (mine.clone().requires_grad_() for _ in range(2))
    group = dist.group.WORLD
    expected = d.vocab_parallel_kl(right, of_teacher, group).mean()
    expected.backward()

    def both_ways(x):
        return c.reduce_from_tp(c.copy_to_tp(x, group), group)

    sum_s, sum_t = (both_ways(x.exp().sum(-1)) for x in (wrong, of_teacher))
    cross = both_ways((of_teacher.exp() * (of_teacher - wrong)).sum(-1))
    loss = (cross / sum_t - sum_t.log() + sum_s.log()).mean()
    loss.backward()
    assert torch.allclose(loss.detach(), expected.detach())
    assert torch.allclose(wrong.grad, 2 * right.grad)
    pair = [{"loss": x.detach(), "gradient": y.grad} for x, y in ((loss, wrong), (expected, right))]
    return shows(*pair)


@pytest.mark.planted_bug(
    symptom="channels of the stream no longer mean the same in all layers: the model is destroyed",
    seen_in=None,
)
def test_another_set_of_channels_in_one_layer():
    net = model()

    def of_layer(name, x, config, kept):
        if name.startswith("layers.2.") and len(kept.get("hidden_size", ())) == 12:
            kept = kept | {"hidden_size": torch.arange(12)}
        return right(name, x, config, kept)

    right = c.slice_tensor
    wrong, good, pair = pruned_with("slice_tensor", of_layer, {"hidden_size": 12}, net)
    assert_differs(*pair)
    return Shows(worst_of(loss_of(wrong), loss_of(good)), worst_of(*pair))


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_bad_configurations_and_sizes():
    for changes, message in (
        (dict(pattern="M?"), "pattern='M\\?': write M"),
        (dict(pattern=""), "pattern='': write M"),
        (dict(hidden_size=0), "hidden_size=0: it must be at least 1"),
        (dict(mamba_num_heads=6), "mamba_num_heads=6, mamba_num_groups=4: the first"),
        (dict(num_attention_heads=6), "num_attention_heads=6, num_query_groups=4"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
    net = model()
    scores = c.importance(net, batches_of())
    for sizes, message in (
        ({"num_layers": 3}, "'num_layers' is not one of hidden_size"),
        ({"hidden_size": 17}, "hidden_size=17: it must be from 1 to 16"),
        ({"hidden_size": 0}, "hidden_size=0: it must be from 1 to 16"),
        ({"mamba_num_heads": 6}, "mamba_num_heads=6, mamba_num_groups=4"),
    ):
        with pytest.raises(ValueError, match=message):
            c.prune(net, sizes, scores)
    with pytest.raises(ValueError, match="scores of layers.1.ffn_hidden_size are missing, or not"):
        c.prune(net, {}, {k: x for k, x in scores.items() if "1.ffn" not in k})
    with pytest.raises(ValueError, match="scores of hidden_size are missing, or not 16"):
        c.prune(net, {}, scores | {"hidden_size": torch.ones(8, 1)})
    with pytest.raises(ValueError, match=r"missing, unknown or of another shape.*head.weight"):
        c.slice_state_dict({}, net.config, {})
    for index, wrong in ((torch.tensor([16]), "[16]"), (torch.tensor([0, 0]), "[0, 0]")):
        with pytest.raises(ValueError, match=re.escape(f"hidden_size keeps {wrong}, but 16 are")):
            c.slice_state_dict(net.state_dict(), net.config, {"hidden_size": index})
    mask = torch.arange(16) < 12  # 16 elements, of which each would be index 0 or 1
    with pytest.raises(ValueError, match="hidden_size keeps .*, but 16 are there, each once"):
        c.slice_state_dict(net.state_dict(), net.config, {"hidden_size": mask})
    two = config(mamba_num_heads=2, mamba_num_groups=1)
    weights = c.initial_weights(two)
    for mask in (torch.tensor([True]), torch.tensor([False, True])):  # index 1; indices 0 and 1
        with pytest.raises(ValueError, match="mamba_num_heads keeps .*, but 2 are there"):
            c.slice_state_dict(weights, two, {"mamba_num_heads": mask})
    more = c.initial_weights(config())
    for pattern, name in (("M-*", "layers.3.mixer"), ("M-*M--", "layers.5.mixer.down_proj")):
        with pytest.raises(ValueError, match=f"missing or unknown for this config.*{name}"):
            c.HybridLM(config(pattern=pattern), weights=more)
    for key in ("hidden", "layers.9.ffn_hidden_size", "mixer.hidden_size"):
        with pytest.raises(ValueError, match=f"'{key}' is neither an axis nor a place"):
            c.slice_state_dict(net.state_dict(), net.config, {key: torch.arange(4)})


def test_bad_calibration_text():
    net = model()
    tokens_BT = torch.zeros(2, 4, dtype=torch.int64, device=ranks.device)
    for batches in ([], [(tokens_BT, tokens_BT - 100)]):
        with pytest.raises(ValueError, match="no token of the calibration batches counts"):
            c.importance(net, batches)
    with torch.no_grad():
        net.state_dict()["layers.1.mixer.up_proj.weight"][3] = torch.nan
    with pytest.raises(FloatingPointError, match="activations are not finite in"):
        c.importance(net, batches_of())
    with pytest.raises(ValueError, match="errors are NaN"):
        d.rank_layers(model(), [], 3)


def test_bad_depths():
    net = model()
    for keywords, message in (
        (dict(num_layers=0), "by='logits', num_layers=0: by is"),
        (dict(num_layers=6), "num_layers=6: by is 'logits' or 'hidden', num_layers from 1 to 5"),
        (dict(by="loss"), "by='loss'"),
    ):
        with pytest.raises(ValueError, match=message):
            d.rank_layers(net, batches_of(1), **keywords)
    with pytest.raises(ValueError, match="by='logit': by is 'logits' or 'hidden'"):
        d.removal_errors(net, batches_of(1), by="logit")
    score_L = d.rank_layers(net, batches_of(1), 4)
    for depth in (3, 6, 0):
        with pytest.raises(ValueError, match=f"num_layers={depth}, but there are 5 layers"):
            d.prune_layers(net, depth, score_L)
    with pytest.raises(ValueError, match="3 scores"):
        d.prune_layers(net, 3, torch.ones(3))


def test_bad_logits():
    x = random(2, 3, 8)
    for change, message in (
        (dict(teacher_BTv=x[:1]), r"student \(2, 3, 8\), teacher \(1, 3, 8\)"),
        (dict(vocab_size=9), "vocab_size=9, but the group holds 8 columns"),
        (dict(vocab_size=0), "vocab_size=0, but"),
        (dict(temperature=0.0), "temperature=0.0: it must be greater than 0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(teacher_BTv=x.clone().requires_grad_()), "the teacher's logits have a graph"),
    ):
        with pytest.raises(ValueError, match=message):
            d.vocab_parallel_kl(**(dict(student_BTv=x, teacher_BTv=x) | change))


def test_bad_searches():
    with pytest.raises(ValueError, match="layer 1 has no option"):
        s.search([[s.Option("a", 1, 1.0)], []], 3)
    with pytest.raises(ValueError, match="a score that is not finite"):
        s.search([[s.Option("a", 1, math.nan)]], 3)
    with pytest.raises(ValueError, match="no size to choose from for \\['hidden_size'\\]"):
        s.candidates(config(), {"hidden_size": []}, 1e9, 10)
    with pytest.raises(ValueError, match="tokens=-1"):
        s.memory(config(), -1)
    with pytest.raises(ValueError, match="2 scores for 5 layers"):
        s.layer_options(config(), [8], [1.0, 2.0])
    options = s.layer_options(config(), [12, 24], [1.0] * 5)
    assert [len(x) for x in options] == [2, 3, 2, 2, 3]


@pytest.mark.ranks(2)
def test_what_does_not_fit_the_ranks_is_refused_on_every_rank():
    mesh = mesh_of(2)
    with pytest.raises(ValueError, match="mamba_num_groups=1 does not divide over tp=2 ranks"):
        model(mesh, mamba_num_groups=1)
    with pytest.raises(ValueError, match="vocab_size=23 does not divide over tp=2"):
        model(mesh, vocab_size=23)
    net = model(mesh)
    scores = c.importance(net, batches_of())
    with pytest.raises(ValueError, match="ffn_hidden_size=9 does not divide over tp=2"):
        c.prune(net, {"ffn_hidden_size": 9}, scores)
    with pytest.raises(ValueError, match="tp=3 does not divide the 2 ranks"):
        c.make_mesh(3, ranks.device)
    with pytest.raises(ValueError, match="the teacher is on Mesh"):
        d.check_teacher(net, model())


# ── The scripts ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=280)
def test_the_demonstration_of_distillation():
    """With the script's own number of steps, so that all claims are judged."""
    with plant(c, "TextData", text_data):
        code, text = scripts.on_ranks(d, "--seq-length", 32)
    assert code == 0 and "FAILED" not in text and text.count(" ok\n") == 5, text
    assert len(text[text.index("\nclaim ") :].strip().splitlines()) == 7


@pytest.mark.ranks(2)
def test_the_scripts_on_two_ranks():
    """The demonstrations with few steps, whose losses are not judged."""
    with plant(c, "TextData", text_data):
        for module, rows in ((c, 5), (d, 6)):
            code, text = scripts.on_ranks(module, "--steps", 8, "--seq-length", 16)
            assert code == 0 and text.count(" ok\n") == 4, text
            assert len(text[text.index("\nclaim ") :].strip().splitlines()) == rows + 1
    assert " 300 steps\n" in text


@pytest.mark.ranks(1)
def test_check_in_low_precision():
    for dtype in ("fp32", "bf16"):
        code, text = scripts.on_ranks(c, "--check", "--dtype", dtype)
        assert code == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compress.py", "distill.py"])
def test_a_script(name):
    """In processes of its own, for --check; what the demonstrations show is tested above."""
    done = scripts.forked(SCRIPT.parent / name, "--check", timeout=280)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "2 ranks" in text and "fp64" in text and "worst" in text and "gradient layers.0" in text


def flags_of(*words: str, module=c):
    with plant(sys, "argv", [str(SCRIPT), *words]), plant(c, "TextData", text_data):
        return module.flags()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--tp", "3"), "--tp 3 does not divide the 2 ranks"),
        (("--tp", "1", "--batch", "1"), "--batch 1 is less than one sequence for 2 replicas"),
        (("--mamba-num-groups", "1"), "mamba_num_groups=1 does not divide over tp=2"),
        (("--pattern", "MX"), "pattern='MX': write M"),
        (("--mamba-num-heads", "2"), "mamba_num_heads=1, mamba_num_groups=2"),
        (("--lr", "nan"), "argument --lr: 'nan' must be of type float"),
        (("--data", "/nowhere"), "No such file"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    for module in (c, d):
        with pytest.raises(SystemExit) as stopped:
            flags_of(*flags, module=module)
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2


@pytest.mark.parametrize("ranks_here", [*range(1, 10), 12])
def test_any_number_of_ranks_needs_no_flag(ranks_here):
    args = flags_of("--ranks", str(ranks_here))
    assert args.world_size % args.tp == 0 and args.batch >= ranks_here // args.tp
    assert c.config_from(args, c.HybridConfig) == c.HybridConfig()
