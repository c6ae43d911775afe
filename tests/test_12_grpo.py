# SPDX-License-Identifier: MIT-0
"""Chapter 12 equals REINFORCE, formulas written out by hand, and gradients that are enumerated.

A test marked `ranks` is what every rank of that world executes. References: Python's statistics,
loops, attention written out, every answer of a tiny vocabulary, and the single device.
"""

import inspect
import itertools
import math
import random
import statistics
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpo as gr
import grpo_tables as tables
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from thinking import BudgetController
from torch import nn

SCRIPT = Path(gr.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)

# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def normal(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(ranks.device)


def config(**changes) -> gr.GPTConfig:
    sizes = dict(vocab_size=17, num_layers=2, hidden_size=32, num_heads=4, init_std=0.1)
    return gr.GPTConfig(**(sizes | changes))


LAYOUTS = {}


def layout(tp: int) -> gr.Mesh:
    if tp not in LAYOUTS:
        LAYOUTS[tp] = gr.make_mesh(tp, ranks.device)
    return LAYOUTS[tp]


def alone():
    """The group of this rank; outside the ranks' pool there are no groups."""
    return layout(1).tp_group if dist.is_initialized() else None


def policy(group="alone", **changes) -> gr.GPT:
    group = alone() if group == "alone" else group
    return gr.GPT(config(**changes), group).to(ranks.device, torch.float64)


def made_up(count: int, seed=1, forced=True) -> list[gr.Response]:
    """Responses of unequal lengths; log-probabilities of no policy in particular."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = rng.choices(range(10), k=rng.randint(1, 5))
        tokens = rng.choices(range(17), k=rng.randint(1, 7))
        log_probs = [rng.uniform(-3.4, -2.4) for _ in tokens]
        is_forced = [forced and rng.random() < 0.2 for _ in tokens]
        found.append(gr.Response(prompt, tokens, log_probs, is_forced, rng.random() < 0.8))
    return found


def batch_of(responses, advantages=None, **options) -> gr.RolloutBatch:
    if advantages is None:
        advantages = normal(len(responses), seed=len(responses))
    return gr.rollout_batch(responses, advantages, ranks.device, **options)


def own_samples(net: gr.GPT, count: int = 3, group_size: int = 2) -> list[gr.Response]:
    """The policy's own responses to prompts of unequal lengths."""
    prompts = [[3, 1, 10], [7, 10], [5, 2, 8, 4, 10], [1, 10]][:count]
    generator = torch.Generator(ranks.device).manual_seed(5)
    return gr.rollout(net, prompts, group_size, 6, gr.END, generator)


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def cpu(tensors):
    return {name: x.detach().cpu().clone() for name, x in tensors.items()}


def losses_and_grads(net, batch, objective=None):
    net.zero_grad()
    total, count = (objective or gr.GRPOObjective())(net, batch)
    (total / count).backward()
    return {"loss": total.detach() / count}, cpu(grads_of(net))


def shows(found, expected):
    """What a user sees: the loss, and the worst gradient."""
    return Shows(worst_of(found[0], expected[0]), worst_of(found[1], expected[1]))


def edited(function, *changes: tuple[str, str], **names):
    """A function of the chapter with some of its text changed, for planted bugs; names for it."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in it"
        source = source.replace(old, new)
    namespace = vars(gr) | names
    exec(compile(source, f"<{function.__name__}, edited>", "exec"), namespace)
    return namespace[function.__name__]


# ── Advantages ────────────────────────────────────────────────────────────────────────────────────

CONVENTIONS = list(itertools.product((True, False), gr.DEVIATIONS))


def by_statistics(rewards: list[float], G: int, leave_one_out: bool, deviation: str) -> list[float]:
    """Python's statistics, response by response."""
    found = []
    for first in range(0, len(rewards), G):
        group = rewards[first : first + G]
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1 :]
            value = r - statistics.fmean(others if leave_one_out else group)
            compared = others if deviation == "leave_one_out" else group
            if len(set(group)) == 1:
                value = 0.0
            elif deviation != "none" and len(set(compared)) > 1:
                std = statistics.pstdev if deviation == "population" else statistics.stdev
                value /= std(compared) + 1e-6
            found.append(value)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 999), st.booleans())
def test_advantages_are_those_of_pythons_statistics(G, groups, seed, binary):
    """Every convention, groups without variance among them."""
    rng = random.Random(seed)
    values = [0.0, 1.0] if binary else [0.1, 0.35, 0.8]
    rewards = rng.choices(values, k=G * groups)
    for leave_one_out, deviation in CONVENTIONS:
        found = gr.grpo_advantages(
            torch.tensor(rewards, dtype=torch.float64), G, leave_one_out, deviation
        )
        right = by_statistics(rewards, G, leave_one_out, deviation)
        assert (found - torch.tensor(right, dtype=torch.float64)).abs().max() < 1e-10


def test_examples_of_section_1_2():
    """One success of 16 by every convention; 16/15; clips; two responses."""
    rewards = torch.zeros(16, dtype=torch.float64)
    rewards[5] = 1
    expected = {
        (False, "none"): (0.9375, -0.0625),
        (True, "none"): (1.0, -1 / 15),
        (False, "population"): (3.873, -0.258),
        (False, "sample"): (3.75, -0.25),
        (True, "leave_one_out"): (1.0, -0.2582),
    }
    for options, (success, failure) in expected.items():
        found = gr.grpo_advantages(rewards, 16, *options)
        assert abs(found[5] - success) < 1e-3 and abs(found[0] - failure) < 1e-3
    assert round(found.sum().item(), 3) == -2.873  # of the last one
    noise = normal(32)
    plain = noise.view(2, 16) - noise.view(2, 16).mean(dim=1, keepdim=True)
    found = gr.grpo_advantages(noise, 16, deviation="none")
    assert_equal({"": found}, {"": (16 / 15 * plain).flatten()}, 1e-14)
    assert gr.grpo_advantages(rewards, 16, clip=0.5).abs().max() == 0.5
    assert gr.grpo_advantages(torch.tensor([0.0, 1.0]), 2).tolist() == [-1.0, 1.0]
    assert gr.grpo_advantages(torch.zeros(0), 2).shape == (0,)  # a replica without prompts


def test_groups_without_variance_give_exactly_0():
    """By every convention, in both precisions, for values that binary fractions do not have."""
    for value, dtype in itertools.product((0.1, 0.3, 0.7), (torch.float32, torch.float64)):
        rewards = torch.full((15,), value, dtype=dtype)
        for options in CONVENTIONS:
            assert gr.grpo_advantages(rewards, 15, *options).eq(0).all()
    net = policy()
    batch = batch_of(own_samples(net), gr.grpo_advantages(torch.full((6,), 0.1), 2).double())
    _, grads = losses_and_grads(net, batch)
    assert all(grad.eq(0).all() for grad in grads.values())


# ── The loss ──────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_with_ratio_1_the_gradient_is_reinforces():
    """−Σ A ∇log π over the count of tokens, every parameter; the loss is −Σ A."""
    for tp in [tp for tp in (1, 2, 4) if dist.get_world_size() % tp == 0]:
        net = policy(layout(tp).tp_group)
        responses = own_samples(net)
        advantages = normal(len(responses))
        batch = batch_of(responses, advantages)
        loss, found = losses_and_grads(net, batch)
        net.zero_grad()
        lengths = torch.tensor([len(x.tokens) for x in responses], device=ranks.device)
        log_prob_BS = net.log_probs(batch.sequences)
        (-(log_prob_BS.sum(dim=1) * advantages).sum() / lengths.sum()).backward()
        assert_equal(found, cpu(grads_of(net)), 1e-12)
        mean = -(advantages * lengths).sum() / lengths.sum()
        assert_equal(loss, {"loss": mean}, 1e-12)


def test_the_clip_token_by_token():
    """Gradient of the loss in log π: −ratio · A, or 0 where the token has moved far enough."""
    ratios = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0]
    ratio_BS = torch.tensor([ratios, ratios], dtype=torch.float64)
    advantage_BS = torch.tensor([[2.0], [-2.0]], dtype=torch.float64).expand_as(ratio_BS)
    log_prob_BS = ratio_BS.log().requires_grad_()
    mask_BS = torch.ones_like(ratio_BS, dtype=torch.bool)
    loss = gr.grpo_loss(log_prob_BS, torch.zeros_like(ratio_BS), advantage_BS, mask_BS)
    loss.backward()
    expected = 0.0
    for row, column in itertools.product(range(2), range(len(ratios))):
        ratio, A = ratios[column], advantage_BS[row, column].item()
        is_clipped = ratio > 1.28 if A > 0 else ratio < 0.8
        slope = 0.0 if is_clipped else -ratio * A
        assert abs(log_prob_BS.grad[row, column] - slope) < 1e-12
        expected -= min(ratio * A, min(max(ratio, 0.8), 1.28) * A)
    assert abs(loss / expected - 1) < 1e-12


def test_weights_and_trust_by_loops():
    """Tokens, products, caps, and mean exp|Δ| of each response; packed as well."""
    responses = made_up(7)
    net = policy()
    for row_length in (None, 30):
        batch = batch_of(responses, row_length=row_length)
        sequences = batch.sequences
        log_prob_BS = net.log_probs(sequences).requires_grad_()
        args = (log_prob_BS, batch.sampler_log_prob_BS, sequences)
        found = {level: gr.importance_weights(*args, level) for level in ("token", "sequence")}
        capped = gr.importance_weights(*args, cap=1.05)
        assert not any(x.requires_grad for x in (*found.values(), capped))
        gap_BS = (log_prob_BS - batch.sampler_log_prob_BS).detach()
        trusted = gr.trusted_responses(*args, limit=2.0)
        kept = set()
        for index in range(7):
            here = (sequences.sequence_BS == index) & (sequences.targets_BS != -100)
            gaps = gap_BS[here]
            assert_equal({"": found["token"][here]}, {"": gaps.exp()}, 1e-13)
            assert_equal({"": capped[here]}, {"": gaps.exp().clamp(max=1.05)}, 1e-13)
            product = gaps.sum().exp()
            assert (found["sequence"][here] / product - 1).abs().max() < 1e-12
            is_trusted = gaps.abs().exp().mean() <= 2.0
            assert trusted[here].eq(is_trusted).all()
            kept.add(bool(is_trusted))
        assert kept == {True, False}


def test_kl_by_its_formula():
    log_prob, reference, sampler = (normal(2, 5, seed=seed) for seed in range(3))
    gap = reference - log_prob
    k3 = gap.exp() - gap - 1
    assert_equal({"": gr.kl_penalty(log_prob, reference)}, {"": k3}, 1e-14)
    off = gr.kl_penalty(log_prob, reference, sampler)
    assert_equal({"": off}, {"": k3 * (log_prob - sampler).exp()}, 1e-14)
    assert (k3 >= 0).all()


# ── Expected gradients, enumerated ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_expected_gradient_is_that_of_the_expected_reward(seed):
    """Exactly: leave-one-out, the group's mean, the deviation of the others, weights' products."""
    answers = tables.Answers()
    logits = answers.logits(seed)
    reward_Y = torch.rand(9, generator=torch.Generator().manual_seed(seed)).double()
    right = {"": tables.true_gradient(answers, logits, reward_Y)}

    def expected(**options):
        return {"": tables.expected_gradient(answers, logits, reward_Y, **options)}

    assert_equal(expected(deviation="none"), right, 1e-12)
    assert_equal(expected(deviation="none", group_size=2), right, 1e-12)
    mean = expected(deviation="none", leave_one_out=False)
    assert_equal(mean, {"": right[""] * 2 / 3}, 1e-12)
    c = tables.factor(answers, logits, reward_Y, 3)
    assert_equal(expected(), {"": right[""] * c}, 1e-12)
    sampler = logits + 0.7 * answers.logits(seed + 10)
    off = dict(sampler=sampler, deviation="none")
    assert_equal(expected(level="sequence", **off), right, 1e-12)
    biased = {
        "weights of tokens": expected(**off)[""],
        "no weights": expected(deviation="none")[""],
        "deviation of the group": expected(leave_one_out=False, deviation="population")[""],
    }
    distances = {name: tables.bias(x, right[""]) for name, x in biased.items()}
    assert distances.pop("no weights") < 1e-12 and min(distances.values()) > 0.01


def test_unequal_lengths():
    """The tokens of the batch are a random divisor, and bias; a constant one does not."""
    answers = tables.Answers(end=True)
    assert sorted(answers.lengths_Y.tolist()) == [1, 2, 2, 2, 2, 2, 2]
    logits = answers.logits(4)
    reward_Y = torch.linspace(0, 1, 7, dtype=torch.float64)
    right = tables.true_gradient(answers, logits, reward_Y)
    options = dict(deviation="none")
    found = tables.expected_gradient(answers, logits, reward_Y, normalizer="answers", **options)
    assert_equal({"": found}, {"": right}, 1e-12)
    found = tables.expected_gradient(answers, logits, reward_Y, **options)
    assert tables.bias(found, right) > 0.005


def test_expected_gradients_of_the_penalty():
    """k3 with its score term is KL(π ‖ ref), on-policy and off; alone it is the other one."""
    found = tables.kl_gradients()
    right, other = found["KL(π ‖ ref)"], found["KL(ref ‖ π)"]
    for name in ("k3 with its score term", "the same, off-policy"):
        assert_equal({"": found[name]}, {"": right}, 1e-12)
    assert_equal({"": found["k3"]}, {"": other}, 1e-12)
    assert (right - other).norm() > 0.1 * right.norm() and found["k1"].abs().max() < 1e-15


# ── The policy ────────────────────────────────────────────────────────────────────────────────────


def by_hand(weights, cfg: gr.GPTConfig, tokens: list[int]):
    """Logits of one sequence: every head, position and layer written out."""
    D = cfg.hidden_size // cfg.num_heads
    x = weights["embedding.weight"][tokens] + weights["positions.weight"][: len(tokens)]

    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for layer in range(cfg.num_layers):
        prefix = f"layers.{layer}"
        qkv = norm(x, f"{prefix}.norm1") @ weights[f"{prefix}.qkv.weight"].T
        heads = []
        for head in range(cfg.num_heads):
            q, k, v = qkv[:, 3 * D * head : 3 * D * (head + 1)].split(D, dim=1)
            scores = (q @ k.T / math.sqrt(D)).masked_fill(
                torch.ones(len(tokens), len(tokens), device=x.device).triu(1).bool(), -math.inf
            )
            heads.append(scores.softmax(dim=-1) @ v)
        x = x + torch.cat(heads, dim=1) @ weights[f"{prefix}.out.weight"].T
        up = norm(x, f"{prefix}.norm2") @ weights[f"{prefix}.up.weight"].T
        x = x + F.gelu(up) @ weights[f"{prefix}.down.weight"].T
    return norm(x, "final_norm") @ weights["output.weight"].T


@EVERY_WORLD
def test_the_policy_on_ranks_equals_attention_written_out():
    """Log-probabilities of responses of unequal lengths and every gradient, padded and packed."""
    responses = made_up(5, forced=False)
    for seed in (0, 1):
        plain = policy(seed=seed)
        weights = {name: p.detach().requires_grad_() for name, p in plain.named_parameters()}
        total = 0.0
        upstream = normal(5)
        expected = []
        for scale, x in zip(upstream, responses):
            log_p = by_hand(weights, plain.config, x.prompt + x.tokens).log_softmax(dim=-1)
            place = torch.arange(len(x.prompt) - 1, len(x.prompt) + len(x.tokens) - 1)
            log_probs = log_p[place.to(ranks.device), torch.tensor(x.tokens).to(ranks.device)]
            expected.append(log_probs.detach())
            total = total + scale * log_probs.sum()
        total.backward()
        right = {name: x.grad for name, x in weights.items()}
        for tp in [tp for tp in (1, 2, 4) if dist.get_world_size() % tp == 0]:
            for row_length in (None, 30):
                mesh = layout(tp)
                net = policy(mesh.tp_group, seed=seed)
                sequences = batch_of(responses, row_length=row_length).sequences
                log_prob_BS = net.log_probs(sequences)
                sums = log_prob_BS.new_zeros(6)
                sums = sums.index_add(0, sequences.sequence_BS.flatten(), log_prob_BS.flatten())
                (sums[:5] * upstream).sum().backward()
                values = log_prob_BS[sequences.targets_BS != -100]
                assert_equal({"": values}, {"": torch.cat(expected)}, 1e-12)
                rank = gr.group_rank(mesh.tp_group)
                shards = gr.shard_state_dict(right, net.config, rank, tp)
                assert_equal(grads_of(net), shards, 1e-11)


@EVERY_WORLD
def test_weights_are_those_of_one_device():
    """To the bit, vocabulary padding apart, and put together again from all ranks' shards."""
    world = dist.get_world_size()
    full = policy().state_dict()
    mine = policy(None).state_dict()
    for name, shard in gr.shard_state_dict(full, config(), dist.get_rank(), world).items():
        assert torch.equal(shard, mine[name])
    for tp in (1, 2, 4):
        shards = [gr.shard_state_dict(full, config(), rank, tp) for rank in range(tp)]
        for name, x in full.items():
            dim = gr.shard_dim(name)
            merged = shards[0][name] if dim is None else torch.cat([s[name] for s in shards], dim)
            assert torch.equal(merged[: len(x)], x) and merged[len(x) :].eq(0).all()
            assert tp == 1 or (shards[0][name].shape == x.shape) == (dim is None)
    assert len(gr.sharded_parameters(policy(None))) == 2 * 4 + 1


# ── Rollouts ──────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
def test_the_sampler_and_the_trainer_agree():
    """Log-probabilities kept while sampling are those of training; all tp draw the same tokens."""
    seen = []
    for tp in [tp for tp in (1, 2, 4) if dist.get_world_size() % tp == 0]:
        net = policy(layout(tp).tp_group)
        responses = own_samples(net, 4, 3)
        batch = batch_of(responses)
        log_prob_BS = net.log_probs(batch.sequences)
        assert_equal({"": batch.sampler_log_prob_BS}, {"": log_prob_BS}, 1e-12)
        seen.append([x.tokens for x in responses])
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, seen[-1])
        assert all(tokens == seen[0] for tokens in everyone)
    assert all(tokens == seen[0] for tokens in seen)


def test_rollouts():
    """Order, padding on the left, end tokens, length, the distribution of the first token."""
    net = policy(init_std=0.5)
    prompts = [[3, 1, 10], [7, 10], [5, 2, 8, 4, 10]]
    together = gr.rollout(net, prompts, 2, 6, gr.END, None)
    assert [x.prompt for x in together] == [p for p in prompts for _ in range(2)]
    for prompt, x in zip(prompts, together[::2]):
        (single,) = gr.rollout(net, [prompt], 1, 6, gr.END, None)
        assert single.tokens == x.tokens
        gaps = [abs(a - b) for a, b in zip(single.log_probs, x.log_probs)]
        assert max(gaps) < 1e-12
    responses = gr.rollout(net, prompts, 200, 6, gr.END, torch.Generator().manual_seed(0))
    complete = [x for x in responses if x.is_complete]
    assert 20 < len(complete) < len(responses)
    for x in responses:
        assert (x.tokens[-1] == gr.END) == x.is_complete and gr.END not in x.tokens[:-1]
        assert x.is_complete or len(x.tokens) == 6
        assert len(x.tokens) == len(x.log_probs) == len(x.is_forced) and not any(x.is_forced)
    count = 4000
    (first, *_) = prompts
    responses = gr.rollout(net, [first], count, 1, gr.END, torch.Generator().manual_seed(1))
    tokens = torch.tensor([first])
    ones = torch.ones_like(tokens)
    p = net.next_log_probs(tokens, ones, torch.arange(3)[None])[0].exp().tolist()
    for token in range(17):
        share = sum(x.tokens == [token] for x in responses) / count
        assert abs(share - p[token]) < 4 * math.sqrt(p[token] / count) + 1e-3


def test_a_batch_of_rollouts():
    """What has no loss: prompts, forced tokens, cut responses where they are filtered."""
    responses = made_up(6)
    assert any(not x.is_complete for x in responses)
    advantages = normal(6)
    for row_length, filtered in itertools.product((None, 25), (False, True)):
        batch = batch_of(responses, advantages, row_length=row_length, overlong_filter=filtered)
        sequences = batch.sequences
        counted = []
        for index, x in enumerate(responses):
            here = sequences.sequence_BS == index
            assert batch.advantage_BS[here].eq(advantages[index]).all()
            mask = here & (sequences.targets_BS != -100)
            has_loss = [not f and (x.is_complete or not filtered) for f in x.is_forced]
            kept = list(itertools.compress(x.tokens, has_loss))
            assert sequences.targets_BS[mask].tolist() == kept
            log_probs = list(itertools.compress(x.log_probs, has_loss))
            assert batch.sampler_log_prob_BS[mask].tolist() == log_probs
            counted += kept
        is_off_BS = sequences.targets_BS == -100
        assert batch.sampler_log_prob_BS[is_off_BS].eq(0).all()
        assert gr.GRPOObjective()(policy(), batch)[1] == len(counted)
    assert batch.old_log_prob_BS is None and batch.reference_log_prob_BS is None
    nets = dict(old_policy=policy(seed=3), reference=policy(seed=4))
    batch = batch_of(responses, advantages, **nets)
    found = {"old": batch.old_log_prob_BS, "reference": batch.reference_log_prob_BS}
    right = [net.log_probs(batch.sequences) for net in nets.values()]
    assert_equal(found, dict(zip(found, right)), 1e-14)
    assert not any(x.requires_grad for x in found.values())


def test_an_overlong_response_stays_in_the_baseline():
    """Its reward lowers the others' advantages no less than any failure's."""
    net = policy()
    responses = own_samples(net, 1, 4)
    responses = [replace(x, is_complete=index != 1) for index, x in enumerate(responses)]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    advantages = gr.grpo_advantages(rewards, 4)
    filtered = batch_of(responses, advantages, overlong_filter=True)
    _, found = losses_and_grads(net, filtered)
    rest = [0, 2, 3]
    _, right = losses_and_grads(net, batch_of([responses[i] for i in rest], advantages[rest]))
    assert_equal(found, right, 1e-12)


def test_sorting():
    environment = gr.SortDigits()
    prompt = environment.prompt(random.Random(0))
    assert len(prompt) == 5 and prompt[-1] == gr.EQUALS
    right = [*sorted(prompt[:-1]), gr.END]
    assert environment.reward(prompt, right) == 1
    assert environment.reward(prompt, right[:-1]) == 0.8
    assert environment.reward(prompt, [*right, 3]) == 5 / 6
    assert environment.reward([1, 2, 3, 4, gr.EQUALS], [9, 2, 9, 9, 9]) == 0.2
    with pytest.raises(NotImplementedError):
        gr.Environment().prompt(random.Random(0))
    with pytest.raises(NotImplementedError):
        gr.Environment().reward([], [])


def test_the_age_of_batches():
    """Each batch is used `age` updates after it was sampled, the first ones excepted."""
    for age, right in ((0, [0, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [0, 1, 2, 2])):
        updates = []
        ages = []
        batches = gr.batches_of_age(lambda step, done=updates: (step, len(done)), 4, age)
        for step, [(sampled, at)] in enumerate(batches):
            assert sampled == step
            ages.append(len(updates) - at)
            updates.append(step)
        assert ages == right


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda model: gr.make_optimizer(model, 1e-3),
}
EVERYTHING = gr.GRPOObjective(weight_cap=1.1, error_limit=1.8, kl_weight=0.2)


def others(group):
    return dict(old_policy=policy(group, seed=3), reference=policy(group, seed=4))


def single_device(optimizer: str, batches, max_norm: float):
    """Mean loss over all tokens, PyTorch's own clipping."""
    net = policy()
    opt = OPTIMIZERS[optimizer](net)
    scalars, grads = {}, {}
    for step, batch in enumerate(batches):
        opt.zero_grad()
        total, count = EVERYTHING(net, batch)
        loss = total / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        if step == 0:
            grads = cpu(grads_of(net))
        opt.step()
        scalars |= {f"loss {step}": loss.detach(), f"norm {step}": norm}
    return net, scalars, grads


@EVERY_WORLD
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_on_every_mesh(optimizer):
    """Loss, norm, every gradient and weight; unequal replicas and micro-batches, one has none."""
    world = dist.get_world_size()
    sets = [(made_up(world + 2, seed), normal(world + 2, seed=seed)) for seed in range(5)]
    options = others(alone()) | dict(overlong_filter=True)
    whole = [batch_of(*x, row_length=30, **options) for x in sets]
    plain, expected, grads = single_device(optimizer, whole, 0.5)
    for tp in [tp for tp in (1, 2, 4) if world % tp == 0]:
        mesh = layout(tp)
        options = others(mesh.tp_group) | dict(overlong_filter=True)
        batches = []
        for responses, advantages in sets:
            mine = range(len(responses))
            if mesh.dp > 1:  # the last replica has none
                mine = mine[mesh.dp_rank :: mesh.dp - 1] if mesh.dp_rank < mesh.dp - 1 else []
            micro = [list(mine[:1]), list(mine[1:])]
            parts = [([responses[i] for i in part], advantages[part]) for part in micro if part]
            batches.append([batch_of(*part, **options) for part in parts])
        net = policy(mesh.tp_group)
        opt = OPTIMIZERS[optimizer](net)
        found, shards = {}, {}
        for step, (loss, norm) in enumerate(gr.train(net, opt, batches, EVERYTHING, mesh, 0.5)):
            assert not loss.requires_grad and not norm.requires_grad
            found |= {f"loss {step}": loss, f"norm {step}": norm}
            if step == 0:  # after clipping on both sides
                shards = cpu(grads_of(net))
        assert_equal(found, expected)
        rank = gr.group_rank(mesh.tp_group)
        assert_equal(shards, gr.shard_state_dict(grads, net.config, rank, tp), 1e-12)
        for name in ("loss 0", "norm 0"):
            assert_equal({"": found[name]}, {"": expected[name]}, 1e-12)
        right = gr.shard_state_dict(plain.state_dict(), net.config, rank, tp)
        floor = 5e-3 if optimizer == "AdamW" else 0.0
        assert_equal(cpu(net.state_dict()), cpu(right), floor=floor)
        before = gr.shard_state_dict(policy().state_dict(), net.config, rank, tp)
        assert_differs(net.state_dict(), before, 1e-4)


def test_a_stale_sampler_is_corrected():
    """Weights π/μ of the policy that sampled: the gradient is Σ w A ∇log π, written out."""
    sampler, net = policy(seed=9), policy()
    responses = own_samples(sampler)
    advantages = normal(len(responses))
    batch = batch_of(responses, advantages)
    _, found = losses_and_grads(net, batch, gr.GRPOObjective(weight_cap=1.5))
    net.zero_grad()
    total = count = 0
    for x, A in zip(responses, advantages):
        single = batch_of([x]).sequences
        log_probs = net.log_probs(single)[single.targets_BS != -100]
        weights = [min(1.5, math.exp(p - q)) for p, q in zip(log_probs.tolist(), x.log_probs)]
        total = total - A * (torch.tensor(weights, dtype=torch.float64) * log_probs).sum()
        count += len(x.tokens)
    (total / count).backward()
    assert_equal(found, cpu(grads_of(net)), 1e-12)
    assert any(weight == 1.5 for weight in weights) or max(weights) > 1


def test_options_do_what_they_say():
    """Each option of the objective alone changes the result; a distrusted response leaves both
    the sum and the count."""
    net = policy()
    batch = batch_of(made_up(8), **others(None))
    base = gr.GRPOObjective(0.2, 0.28, kl_weight=0.0)
    _, grads = losses_and_grads(net, batch, base)
    for change in (
        dict(clip_low=0.9),
        dict(clip_high=0.01),
        dict(weight_level="sequence"),
        dict(weight_cap=0.9),
        dict(error_limit=2.0),
        dict(kl_weight=0.1),
    ):
        _, other = losses_and_grads(net, batch, replace(base, **change))
        assert_differs(other, grads, 1e-3)
    count = gr.GRPOObjective()(net, batch)[1]
    assert gr.GRPOObjective(error_limit=2.0)(net, batch)[1] < count
    nothing = gr.GRPOObjective(error_limit=1.0)(net, batch)
    assert [x.item() for x in nothing] == [0, 0]


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1000.0])
def test_without_a_limit_a_broken_sampler_is_seen(value):
    """Every response is trusted: none leaves the count, and the loss says that something is wrong.
    With a limit the response is dropped, and with a cap its tokens have the weight of the cap."""
    net = policy().float()
    batch = batch_of(made_up(4, forced=False))
    batch.sampler_log_prob_BS = batch.sampler_log_prob_BS.float()
    is_broken_BS = (batch.sequences.sequence_BS == 2) & (batch.sequences.targets_BS != -100)
    batch.sampler_log_prob_BS[is_broken_BS] = value
    tokens = (batch.sequences.targets_BS != -100).sum()
    loss, count = gr.GRPOObjective()(net, batch)
    assert count == tokens and not loss.isfinite()
    loss, count = gr.GRPOObjective(weight_cap=5.0)(net, batch)
    assert count == tokens and loss.isfinite() == (not math.isnan(value))
    loss, count = gr.GRPOObjective(error_limit=1e6)(net, batch)
    assert count == tokens - is_broken_BS.sum() and loss.isfinite()


def test_what_a_masked_token_has_is_never_read():
    """Its log-probabilities, advantage and weight may be NaN: loss and gradient are the same."""
    x_4BS = normal(4, 2, 5)
    mask_BS = normal(2, 5, seed=2) > 0
    losses, grads = [], []
    for others in (0.5, math.nan):
        log_prob_BS, *args = torch.where(mask_BS, x_4BS, others)
        log_prob_BS.requires_grad_()
        losses.append(gr.grpo_loss(log_prob_BS, *args[:2], mask_BS, args[2]))
        losses[-1].backward()
        grads.append(log_prob_BS.grad)
    assert losses[0] == losses[1] and torch.equal(*grads) and grads[0].any()


def test_a_dropped_response_leaves_no_nan():
    """Its sampler's log-probability is −inf, so its weight is infinite, and its reference is far
    off: loss and gradients are those of the other responses."""
    net = policy()
    responses = own_samples(net)
    broken = [-math.inf] * len(responses[2].tokens)
    batch = batch_of([*responses[:2], replace(responses[2], log_probs=broken), *responses[3:]])
    advantages = normal(len(responses), seed=len(responses))
    kept = [0, 1, 3, 4, 5]
    clean = batch_of([responses[i] for i in kept], advantages[kept])
    for batch_ in (batch, clean):
        batch_.reference_log_prob_BS = 0.9 * net.log_probs(batch_.sequences).detach()
    is_broken_BS = batch.sequences.sequence_BS == 2
    batch.reference_log_prob_BS[is_broken_BS] = 1e4
    objective = gr.GRPOObjective(error_limit=2.0, kl_weight=0.1)
    found, right = (losses_and_grads(net, x, objective) for x in (batch, clean))
    assert_equal(found[0], right[0], 1e-12)
    assert_equal(found[1], right[1], 1e-12)


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def rewarded(net, rewards=(1.0, 0.0, 0.5, 0.5, 0.0, 1.0)):
    """The policy's own responses with the advantages of these rewards."""
    responses = own_samples(net)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return responses, gr.grpo_advantages(rewards, 2, deviation="none")


def compared(found_batch, right_batch, objective=None, net=None):
    net = net or policy()
    expected = losses_and_grads(net, right_batch, objective)
    found = losses_and_grads(net, found_batch, objective)
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="a mean per micro-batch, and then over micro-batches: short ones weigh more",
    seen_in="https://github.com/huggingface/trl/issues/3021",
)
def test_a_mean_of_means_over_micro_batches():
    net = policy()
    responses, advantages = made_up(6), normal(6)
    expected = losses_and_grads(net, batch_of(responses, advantages))
    parts = [batch_of(responses[:1], advantages[:1]), batch_of(responses[1:], advantages[1:])]
    single = [losses_and_grads(net, part) for part in parts]
    found = tuple({k: (a[k] + b[k]) / 2 for k in a} for a, b in zip(*single))
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="divided by the count, and by the number of micro-batches again: small gradients",
    seen_in="https://github.com/modelscope/ms-swift/issues/10116",
)
@pytest.mark.ranks(2)
def test_divided_by_micro_batches_again():
    mesh = layout(1)
    results = []
    right = gr.average_gradients

    def bug(parameters, loss, count, group=None):
        return right(parameters, loss, 2 * count, group)

    for function in (right, bug):
        net = policy(mesh.tp_group)
        batches = [[batch_of(made_up(2, seed)) for seed in (1, 2)]]
        with plant(gr, "average_gradients", function):
            steps = gr.train(
                net, torch.optim.SGD(net.parameters(), 0), batches, gr.GRPOObjective(), mesh, 1e9
            )
            ((loss, _),) = steps
        results.append(({"loss": loss}, cpu(grads_of(net))))
    assert worst_of(results[1][1], results[0][1]) == 0.5
    return shows(*reversed(results))


@pytest.mark.planted_bug(
    symptom="mean and deviation of the batch: easy prompts are rewarded, hard ones punished",
    seen_in="https://github.com/THUDM/slime/issues/1414",
)
def test_statistics_of_the_batch():
    net = policy()
    responses, right = rewarded(net, (1.0, 0.9, 0.5, 0.4, 0.1, 0.0))
    rewards = torch.tensor([1.0, 0.9, 0.5, 0.4, 0.1, 0.0], dtype=torch.float64)
    wrong = gr.grpo_advantages(rewards, 6, deviation="none")
    assert (wrong[:2] > 0).all() and (wrong[-2:] < 0).all()
    assert right[::2].gt(0).all() and right[1::2].lt(0).all()
    return compared(batch_of(responses, wrong), batch_of(responses, right))


@pytest.mark.planted_bug(
    symptom="responses in the order of samples: a group has several prompts",
    seen_in="https://github.com/PeterGriffinJin/Search-R1/issues/88",
)
def test_groups_of_several_prompts():
    net = policy()
    responses, right = rewarded(net)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    order = [0, 2, 4, 1, 3, 5]  # the first sample of every prompt, then the second
    wrong = torch.empty_like(right)
    wrong[order] = gr.grpo_advantages(rewards[order], 2, deviation="none")
    return compared(batch_of(responses, wrong), batch_of(responses, right))


@pytest.mark.planted_bug(
    symptom="equal rewards leave a remainder, and that is divided by itself: advantages of 1",
    seen_in="https://github.com/inclusionAI/AReaL/issues/1673",
)
def test_a_remainder_divided_by_itself():
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    gap = rewards.view(2, 3) - rewards.view(2, 3).sum(dim=1, keepdim=True) / 3
    wrong = (gap / gap.square().mean(dim=1, keepdim=True).sqrt()).flatten()
    assert wrong.abs().min() == 1
    options = dict(leave_one_out=False, deviation="population", eps=0.0)
    assert gr.grpo_advantages(rewards, 3, **options).eq(0).all()
    net = policy()
    _, grads = losses_and_grads(net, batch_of(own_samples(net, 2, 3), wrong))
    assert grads["output.weight"].abs().max() > 1e-3
    return Shows(1.0, "infinite: the right one is 0")


@pytest.mark.planted_bug(
    symptom="the penalty without its score term pulls towards the other divergence",
    seen_in="https://github.com/NVIDIA-NeMo/RL/pull/2506",
)
def test_a_penalty_without_its_score_term():
    net = policy()
    batch = batch_of(own_samples(net), torch.zeros(6).double(), reference=policy(seed=4))
    objective = gr.GRPOObjective(kl_weight=1.0)
    expected = losses_and_grads(net, batch, objective)
    bug = edited(gr.kl_penalty, ("weight_BS if score_term else weight_BS.detach()", "1"))
    with plant(gr, "kl_penalty", bug):
        found = losses_and_grads(net, batch, objective)
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="the penalty is computed without gradient: it is printed, and does nothing",
    seen_in="https://github.com/allenai/open-instruct/pull/530",
)
def test_a_penalty_without_gradient():
    net = policy()
    responses, advantages = rewarded(net)
    batch = batch_of(responses, advantages, reference=policy(seed=4))
    objective = gr.GRPOObjective(kl_weight=1.0)
    expected = losses_and_grads(net, batch, objective)
    right = gr.kl_penalty
    with plant(gr, "kl_penalty", torch.no_grad()(right)):
        found = losses_and_grads(net, batch, objective)
    assert found[0] == expected[0]
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="the end token pads, and what equals padding is masked: stopping is never taught",
    seen_in="https://github.com/lsdefine/simple_GRPO",
)
def test_the_end_token_is_masked_as_padding():
    net = policy(init_std=0.5)
    generator = torch.Generator().manual_seed(1)
    responses = gr.rollout(net, [[3, 1, 10]], 40, 6, gr.END, generator)
    assert sum(x.is_complete for x in responses) > 2
    right = batch_of(responses)
    targets_BS = right.sequences.targets_BS
    sequences = right.sequences._replace(
        targets_BS=torch.where(targets_BS == gr.END, -100, targets_BS)
    )
    sampler_BS = torch.where(targets_BS == gr.END, 0, right.sampler_log_prob_BS)
    wrong = replace(right, sequences=sequences, sampler_log_prob_BS=sampler_BS)
    return compared(wrong, right, net=net)


@pytest.mark.planted_bug(
    symptom="dropped responses leave the sum and not the count: the learning rate falls with them",
    seen_in="https://github.com/huggingface/trl/issues/4976",
)
def test_sum_and_count_under_different_masks():
    bug = edited(
        gr.GRPOObjective.__call__,
        ("return loss, mask_BS.sum()", "return loss, (sequences.targets_BS != IGNORED).sum()"),
    )
    net = policy()
    objective = gr.GRPOObjective(error_limit=2.0)
    batch = batch_of(made_up(8))
    expected = losses_and_grads(net, batch, objective)
    with plant(gr.GRPOObjective, "__call__", bug):
        found = losses_and_grads(net, batch, objective)
    assert_differs(found[1], expected[1], 0.1)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="the sampler's log-probabilities are of another temperature: mean weight is not 1",
    seen_in="https://github.com/huggingface/trl/issues/6789",
)
def test_log_probabilities_of_another_temperature():
    net = policy(init_std=0.5)
    right = gr.GPT.next_log_probs

    def bug(self, *args):
        return (right(self, *args) / 0.5).log_softmax(dim=-1)

    with plant(gr.GPT, "next_log_probs", bug):
        responses = own_samples(net)
    wrong = batch_of(responses)
    log_prob_BS = net.log_probs(wrong.sequences).detach()
    weight_BS = gr.importance_weights(log_prob_BS, wrong.sampler_log_prob_BS, wrong.sequences)
    mean = weight_BS[wrong.sequences.targets_BS != -100].mean()
    assert abs(mean - 1) > 0.05
    return compared(wrong, replace(wrong, sampler_log_prob_BS=log_prob_BS), net=net)


@pytest.mark.planted_bug(
    symptom="the trainer computes the sampler's log-probabilities again: every weight is 1",
    seen_in=None,
)
def test_stale_tokens_without_their_weights():
    sampler, net = policy(seed=9), policy()
    right = batch_of(own_samples(sampler))
    again = replace(right, sampler_log_prob_BS=net.log_probs(right.sequences).detach())
    return compared(again, right, net=net)


@pytest.mark.planted_bug(
    symptom="the ratio is detached: the loss is right, and nothing learns", seen_in=None
)
def test_a_ratio_without_gradient():
    bug = edited(gr.grpo_loss, ("old_log_prob_BS, 0).exp()", "old_log_prob_BS, 0).exp().detach()"))
    net = policy()
    batch = batch_of(*rewarded(net))
    expected = losses_and_grads(net, batch)
    with plant(gr, "grpo_loss", bug):
        total, count = gr.GRPOObjective()(net, batch)
    assert total / count == expected[0]["loss"] and not total.requires_grad
    return Shows("right", "none")


@pytest.mark.planted_bug(
    symptom="the gradient flows through the weight as well: of every token it doubles", seen_in=None
)
def test_weights_with_a_gradient():
    weights = edited(
        gr.importance_weights,
        ("(log_prob_BS - sampler_log_prob_BS).detach()", "log_prob_BS - sampler_log_prob_BS"),
    )
    loss = edited(gr.grpo_loss, ("- old_log_prob_BS, 0)", "- old_log_prob_BS.detach(), 0)"))
    bug = edited(
        gr.GRPOObjective.__call__,
        ("old_BS = log_prob_BS.detach()", "old_BS = log_prob_BS"),
        importance_weights=weights,
        grpo_loss=loss,
    )
    net = policy()
    batch = batch_of(*rewarded(net))
    expected = losses_and_grads(net, batch)
    with plant(gr.GRPOObjective, "__call__", bug):
        found = losses_and_grads(net, batch)
    assert abs(worst_of(found[1], expected[1]) - 1) < 1e-9
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="forced tokens have a loss: the policy learns where the budget was", seen_in=None
)
def test_forced_tokens_with_a_loss():
    net = policy()
    controller = BudgetController((10,), (14,), 2, 6)
    prompts = [[3, 1, 10], [7, 10], [5, 2, 8, 4, 10]]
    generator = torch.Generator().manual_seed(5)
    responses = gr.rollout(net, prompts, 2, 6, gr.END, generator, controller)
    places = [x.is_forced.index(True) for x in responses if any(x.is_forced)]
    assert set(places) == {2} and len(places) > 2
    advantages = rewarded(net)[1]
    as_samples = [replace(x, is_forced=[False] * len(x.tokens)) for x in responses]
    wrong, right = batch_of(as_samples, advantages), batch_of(responses, advantages)
    return compared(wrong, right, net=net)


@pytest.mark.planted_bug(
    symptom="positions count the padding on the left: the trainer sees other log-probabilities",
    seen_in=None,
)
def test_positions_that_count_the_padding():
    net = policy()
    bug = edited(gr.rollout, ("(place_1S - padding_B1).clamp(min=0)", "place_1S + 0 * padding_B1"))
    prompts = [[3, 1, 10], [7, 10], [5, 2, 8, 4, 10]]
    responses = bug(net, prompts, 2, 6, gr.END, torch.Generator().manual_seed(5))
    wrong = batch_of(responses)
    log_prob_BS = net.log_probs(wrong.sequences).detach()
    assert (log_prob_BS - wrong.sampler_log_prob_BS).abs().max() > 0.01
    return compared(wrong, replace(wrong, sampler_log_prob_BS=log_prob_BS), net=net)


@pytest.mark.planted_bug(
    symptom="the tp ranks of a replica draw by themselves: each continues another response",
    seen_in=None,
)
@pytest.mark.ranks(2)
def test_generators_that_differ_between_tp_ranks():
    net = policy(None)
    generator = torch.Generator(ranks.device).manual_seed(dist.get_rank())
    responses = gr.rollout(net, [[3, 1, 10]], 4, 6, gr.END, generator)
    everyone = [None] * 2
    dist.all_gather_object(everyone, [x.tokens for x in responses])
    assert everyone[0] != everyone[1]
    apart = [abs(a - b) for x in responses for a, b in zip(x.log_probs, x.log_probs[1:])]
    generator = torch.Generator(ranks.device).manual_seed(0)
    right = gr.rollout(net, [[3, 1, 10]], 4, 6, gr.END, generator)
    dist.all_gather_object(everyone, [x.tokens for x in right])
    assert everyone[0] == everyone[1] and apart
    return Shows("each rank has another", "of tokens that no rank has in full")


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_bad_input():
    rewards = torch.zeros(6)
    for message, call in {
        "6 rewards, group_size=4": lambda: gr.grpo_advantages(rewards, 4),
        "6 rewards, group_size=1": lambda: gr.grpo_advantages(rewards, 1),
        "deviation='batch'": lambda: gr.grpo_advantages(rewards, 3, deviation="batch"),
        "level='word'": lambda: gr.importance_weights(rewards, rewards, None, "word"),
        "clip_low=-0.1": lambda: gr.GRPOObjective(clip_low=-0.1),
        "weight_cap=-1": lambda: gr.GRPOObjective(weight_cap=-1),
        "kl_weight=-1": lambda: gr.GRPOObjective(kl_weight=-1),
        "error_limit=0.5": lambda: gr.GRPOObjective(error_limit=0.5),
        "hidden_size must be a multiple of num_heads": lambda: config(hidden_size=30),
        "tp=3 must divide num_heads=4": lambda: gr.check_tp(config(), 3),
        "2 advantages for 3 responses": lambda: batch_of(made_up(3), torch.zeros(2)),
        "0 prompts of 0 to 0": lambda: gr.rollout(policy(), [], 2, 3, gr.END, None),
        "1 prompts of 9 to 9 tokens, and 60 more": lambda: gr.rollout(
            policy(), [[1] * 9], 2, 60, gr.END, None
        ),
        "2 prompts of 0 to 2 tokens": lambda: gr.rollout(
            policy(), [[], [1, 2]], 2, 3, gr.END, None
        ),
        "2 prompts of 1 to 2 tokens.* and ids from 0 on": lambda: gr.rollout(
            policy(), [[5], [3, -1]], 2, 3, gr.END, None
        ),
        "example 0 is": lambda: batch_of([gr.Response([], [1], [0.0], [False], True)]),
        "kl_weight=0.1 needs a reference": lambda: gr.GRPOObjective(kl_weight=0.1)(
            policy(), batch_of(made_up(3))
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.ranks(2)
def test_bad_input_on_ranks():
    with pytest.raises(ValueError, match="tp=2 must divide num_heads=1"):
        gr.GPT(gr.GPTConfig(num_heads=1), None)
    with pytest.raises(ValueError, match="tp=3 does not divide the 2 ranks"):
        gr.make_mesh(3, ranks.device)


# ── The script ────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_check_on_every_world(dtype):
    group = layout(1).tp_group
    single = gr.Mesh(tp_group=group, dp_group=group)
    for tp in [tp for tp in (1, 2, 4) if dist.get_world_size() % tp == 0]:
        precision = gr.dtypes(SimpleNamespace(dtype=dtype))
        errors = gr.equivalence(layout(tp), single, ranks.device, *precision)
        assert gr.print_errors(errors, gr.BOUNDS[dtype])
        assert any(name.startswith("gradient layers.0.qkv") for name in errors)


@pytest.mark.ranks(2)
def test_the_demonstration_on_two_ranks():
    """Few steps; both layouts, on-policy and one step off."""
    for tp, age in ((1, 0), (2, 1)):
        flags = ("--tp", tp, "--age", age, "--steps", 3, "--prompts", 4)
        code, printed = scripts.on_ranks(gr, *flags)
        assert code == 0 and "FAILED" not in printed
        assert printed.count(" ok\n") == 2 and printed.count("a short run") == 1


@EVERY_WORLD
def test_no_ranks_disagreement_is_lost():
    """0 for samples of this policy; a NaN of one rank, which gloo's MAX drops, is infinite."""
    net = policy(layout(1).tp_group)
    batch = batch_of(own_samples(net))
    assert gr.disagreement(net, batch, None) < 1e-12
    if dist.get_rank() == dist.get_world_size() - 1:
        batch.sampler_log_prob_BS[0, 0] = math.nan
    assert gr.disagreement(net, batch, None) > 1e300


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=240)
def test_the_script():
    """With its own number of steps."""
    code, printed = scripts.on_ranks(gr)
    assert code == 0 and "FAILED" not in printed and printed.count(" ok\n") == 3, printed


@pytest.mark.slow
def test_check_in_a_process_without_docstrings(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = scripts.forked(SCRIPT, "--check", "--ranks", "3", "--num-heads", "3")
    assert done.returncode == 2 and "hidden_size must be a multiple" in done.stderr
    done = scripts.forked(SCRIPT, "--check", "--ranks", "2")
    assert done.returncode == 0 and "gradient layers.0.qkv.weight, tp 2" in done.stdout, done.stderr


def flags_of(*words: str):
    with plant(sys, "argv", [str(SCRIPT), *words]):
        return gr.flags()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--lr", "nan"), "argument --lr: 'nan' must be of type float"),
        (("--group-size", "1"), "argument --group-size: '1' must be of type int"),
        (("--tp", "3"), "--tp 3 does not divide the 2 ranks"),
        (("--num-heads", "6"), "hidden_size must be a multiple of num_heads"),
        (("--tp", "2", "--num-heads", "1"), "tp=2 must divide num_heads=1"),
        (("--dropout", "0.1"), "unrecognized arguments: --dropout"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags_of(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2
