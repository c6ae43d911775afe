# SPDX-License-Identifier: MIT-0
"""Chapter 11 equals transformers' Nemotron, PyTorch's log_softmax and enumerated divergences.

A test marked `ranks` is what every rank of that world executes. References: transformers, formulas
written out by hand, and the single device.
"""

import inspect
import itertools
import math
import random
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import preference as pf
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
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = Path(pf.__file__)
EVERY_WORLD = pytest.mark.ranks(1, 2, 4)

# ── Small helpers ─────────────────────────────────────────────────────────────────────────────────


def normal(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator).to(ranks.device)


def ids(*shape, vocab=13, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, shape, generator=generator).to(ranks.device)


def config(**changes) -> pf.GPTConfig:
    sizes = dict(vocab_size=13, num_layers=2, hidden_size=64, num_heads=8, num_query_groups=2)
    return pf.GPTConfig(**(sizes | dict(init_std=0.2) | changes))


def gpt(**changes) -> pf.GPT:
    return pf.GPT(config(**changes)).to(ranks.device, torch.float64)


def parallel_gpt(group=None, **changes) -> pf.ParallelGPT:
    return pf.ParallelGPT(config(**changes), group).to(ranks.device, torch.float64)


def examples(count: int, seed=1) -> list[pf.Example]:
    """Prompts and responses of unequal lengths."""
    rng = random.Random(seed)
    return [
        tuple(rng.choices(range(13), k=rng.randint(1, 7)) for _ in range(2)) for _ in range(count)
    ]


def judged(count: int, seed=1) -> list[pf.Judged]:
    rng = random.Random(seed)
    found = []
    for prompt, chosen in examples(count, seed):
        rejected = rng.choices(range(13), k=rng.randint(1, 7))
        found.append(((prompt, chosen), (prompt, rejected), rng.random()))
    return found


def cpu(tensors):
    return {name: x.detach().cpu() for name, x in tensors.items()}


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def edited(function, *changes: tuple[str, str], **names):
    """A function of the chapter with some of its text changed, for planted bugs; names for it."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in it"
        source = source.replace(old, new)
    namespace = vars(pf) | names
    exec(compile(source, f"<{function.__name__}, edited>", "exec"), namespace)
    return namespace[function.__name__]


# ── The block: transformers' Nemotron ─────────────────────────────────────────────────────────────


def published(config: pf.GPTConfig, weights: dict[str, torch.Tensor]):
    """transformers' model with these weights, in float64.

    That library computes the angles in fp32; both models get the chapter's. Its core attention is
    PyTorch's kernel, since its own code takes the softmax in fp32.
    """
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_query_groups,
        partial_rotary_factor=config.rotary_percent,
        head_dim=config.head_size,
        attn_implementation="sdpa",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.NemotronForCausalLM(transformers.NemotronConfig(**sizes)).double()
    assert model.config.norm_eps == 1e-5 and model.config.hidden_act == "relu2"
    assert not model.config.tie_word_embeddings

    def angles(x, position_ids):
        cos, sin = pf.rotary_cos_sin(position_ids, config, torch.float64)
        return cos, sin

    model.model.rotary_emb.forward = angles
    model.load_state_dict(to_published(config, weights))
    return model.to(ranks.device)


def to_published(config, weights):
    """The chapter's names and fused keys and values to that library's."""
    found = {}
    names = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
    names |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {"q": "self_attn.q_proj", "out": "self_attn.o_proj"}
    names |= {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    for name, x in weights.items():
        *layer, module, kind = name.split(".")
        prefix = ".".join(["model", *layer, ""]) if layer else ""
        if module == "kv":
            groups = x.view(config.num_query_groups, 2, config.head_size, -1)
            for index, letter in enumerate("kv"):
                found[f"{prefix}self_attn.{letter}_proj.weight"] = groups[:, index].flatten(0, 1)
        else:
            found[f"{prefix}{names[module]}.{kind}"] = x
    return found


def random_weights(config) -> dict[str, torch.Tensor]:
    """Of all parameters, norms included."""
    named = pf.GPT(config).state_dict()
    return {name: 0.2 * normal(*x.shape, seed=i) for i, (name, x) in enumerate(named.items())}


SHAPES = pytest.mark.parametrize("groups, percent", [(2, 0.5), (4, 0.25), (8, 1.0)])


@SHAPES
def test_the_plain_model_equals_transformers(groups, percent):
    """Logits and every gradient, to 1e-12."""
    cfg = config(num_query_groups=groups, rotary_percent=percent)
    full = random_weights(cfg)
    reference = published(cfg, full)
    tokens_BS, targets_BS = ids(2, 3, 11)
    expected = reference(tokens_BS).logits
    F.cross_entropy(expected.flatten(0, 1), targets_BS.flatten(), reduction="sum").backward()
    model = pf.GPT(cfg).double()
    model.load_state_dict(full)
    found = model(tokens_BS)
    assert_equal({"logits": found}, {"logits": expected}, 1e-12)
    (-pf.vocab_parallel_log_probs(found, targets_BS)).sum().backward()
    assert_equal(to_published(cfg, cpu(grads_of(model))), cpu(grads_of(reference)), 1e-12)


@EVERY_WORLD
@SHAPES
def test_the_model_on_ranks_equals_the_plain_one(groups, percent):
    """Logits and every gradient, to 1e-12; on 4 ranks two of them share a group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    cfg = config(num_query_groups=groups, rotary_percent=percent)
    full = random_weights(cfg)
    tokens_BS, targets_BS = ids(2, 3, 11)
    plain = pf.GPT(cfg).double().to(ranks.device)
    plain.load_state_dict(full)
    expected = plain(tokens_BS)
    F.cross_entropy(expected.flatten(0, 1), targets_BS.flatten(), reduction="sum").backward()
    model = pf.ParallelGPT(cfg).double().to(ranks.device)
    model.load_state_dict(pf.shard_state_dict(full, cfg, rank, world))
    logits_BSv = model(tokens_BS)
    found = pf._all_gather(logits_BSv, None)[..., :13]
    assert_equal({"logits": found}, {"logits": expected}, 1e-12)
    (-pf.vocab_parallel_log_probs(logits_BSv, targets_BS, None, 13)).sum().backward()
    merged = pf.gather_state_dict(grads_of(model), cfg)
    assert_equal(merged, cpu(grads_of(plain)), 1e-12)


def test_the_plain_model():
    """It sees no future; weights are a function of the configuration; rotation by hand."""
    model = gpt()
    tokens_BS = ids(2, 9)
    changed = tokens_BS.clone()
    changed[:, 6:] = 5
    assert torch.equal(model(changed)[:, :6], model(tokens_BS)[:, :6])
    again = gpt().state_dict()
    assert all(torch.equal(again[name], x) for name, x in model.state_dict().items())
    cfg = config()
    cos_sin = pf.rotary_cos_sin(torch.arange(4)[None], cfg, torch.float64)
    x = normal(1, 1, 4, 8)
    y = pf.apply_rotary(x, cos_sin)
    assert torch.equal(y[..., 4:], x[..., 4:])  # C = 4 of D = 8
    for position, j in itertools.product(range(4), range(2)):
        angle = position * 1e4 ** (-2 * j / 4)
        a, b = x[0, 0, position, j], x[0, 0, position, j + 2]
        expected = (
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        )
        for channel, value in zip((j, j + 2), expected):
            assert abs(y[0, 0, position, channel] - value) < 1e-14


def test_layer_norm_1p():
    norm = pf.LayerNorm1p(6).double()
    x = normal(3, 6)
    assert torch.equal(norm(x), F.layer_norm(x, (6,)))
    norm.weight.data = normal(6, seed=4)
    expected = F.layer_norm(x, (6,), norm.weight + 1)
    assert_equal({"": norm(x)}, {"": expected}, 1e-15)


# ── Log-probabilities ─────────────────────────────────────────────────────────────────────────────


def own(x, dim=-1):
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def logits_and_targets(vocab=13, tokens=23, scale=1.0):
    world = dist.get_world_size()
    full = scale * normal(tokens, math.ceil(vocab / world) * world)
    return full, ids(tokens, vocab=vocab)


@EVERY_WORLD
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("vocab", [13, 5])
def test_log_probs_are_those_of_log_softmax(scale, vocab):
    """Values and gradients; in chunks to the bit; −100 gives 0; padding columns do not count."""
    full, targets = logits_and_targets(vocab, scale=scale)
    targets[3] = -100
    upstream = normal(len(full), seed=5)
    leaf = full[:, :vocab].clone().requires_grad_()
    expected = leaf.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    expected = torch.where(targets != -100, expected, 0)
    expected.backward(upstream)
    grad = F.pad(leaf.grad, (0, full.shape[1] - vocab))
    results = []
    for chunk in (1, 4, 23, 1000):
        shard = own(full).requires_grad_()
        found = pf.vocab_parallel_log_probs(shard, targets, None, vocab, chunk)
        found.backward(upstream)
        results.append((found.detach(), shard.grad))
    assert_equal({"": found}, {"": expected}, 1e-12)
    assert found[3] == 0 and grad[3].eq(0).all()
    gap = (results[0][1] - own(grad)).abs().max()
    assert gap <= 1e-12 * grad.abs().max()
    for values, grads in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(grads, results[0][1])


@EVERY_WORLD
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_logits_that_overflow_where_no_target_is(value):
    """Tokens with −100 give 0 and no gradient whatever their logits are; the others keep theirs."""
    full, targets = logits_and_targets()
    targets[[3, 7]] = -100
    right = own(full).requires_grad_()
    pf.vocab_parallel_log_probs(right, targets, None, 13, 4).sum().backward()
    full[3] = value
    full[7, :5] = value
    shard = own(full).requires_grad_()
    found = pf.vocab_parallel_log_probs(shard, targets, None, 13, 4)
    found.sum().backward()
    assert found[[3, 7]].eq(0).all() and found.isfinite().all()
    assert torch.equal(shard.grad, right.grad)


@pytest.mark.ranks(2)
def test_the_example_of_section_1_1():
    shard = own(torch.tensor([[1.0, 3.0, 0.0, 2.0]], dtype=torch.float64, device=ranks.device))
    found = pf.vocab_parallel_log_probs(shard, torch.tensor([3], device=ranks.device))
    assert round(found.item(), 3) == -1.440


class Upcast(TorchDispatchMode):
    """The largest fp32 tensor that an operator makes."""

    def __enter__(self):
        self.elements = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.ranks(1, 2)
def test_full_logits_are_never_in_fp32():
    """bf16 logits of 512 tokens: at most a chunk of 32 is upcast at once, also in backward."""
    shard = own(normal(512, 128, dtype=torch.bfloat16)).requires_grad_()
    targets = ids(512, vocab=128)
    with Upcast() as upcast:
        found = pf.vocab_parallel_log_probs(shard, targets, chunk=32)
        found.sum().backward()
    assert found.dtype == torch.float32 and shard.grad.dtype == torch.bfloat16
    assert upcast.elements <= max(32 * shard.shape[1], 2 * 512)
    with Upcast() as upcast:
        pf.vocab_parallel_log_probs(shard, targets, chunk=512)
    assert upcast.elements == shard.numel()  # the hook sees it


@EVERY_WORLD
def test_messages_of_log_probs():
    """Two all-reduces in forward, of 1 and 2 values per token, and none in backward."""
    calls = []
    right = dist.all_reduce

    def watched(x, *args, **kwargs):
        calls.append(x.numel())
        assert x.is_contiguous()
        return right(x, *args, **kwargs)

    full, targets = logits_and_targets()
    with plant(dist, "all_reduce", watched):
        pf.vocab_parallel_log_probs(
            own(full).requires_grad_(), targets, None, 13, 4
        ).sum().backward()
    assert calls == ([23, 46] if dist.get_world_size() > 1 else [])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 30), st.integers(1, 12), st.integers(0, 5))
def test_any_sizes_of_log_probs(tokens, vocab, chunk, padding):
    logits = normal(tokens, vocab + padding)
    targets = ids(tokens, vocab=vocab)
    found = pf.vocab_parallel_log_probs(logits, targets, None, vocab, chunk)
    expected = logits[:, :vocab].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert_equal({"": found}, {"": expected}, 1e-13)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def test_the_batch_of_section_1_2():
    batch = pf.collate([([7, 3, 10], [3, 7, 11]), ([5], [11])], pad=12)
    assert batch.tokens_BS.tolist() == [[7, 3, 10, 3, 7, 11], [5, 11, 12, 12, 12, 12]]
    assert batch.targets_BS.tolist() == [[-100, -100, 3, 7, 11, -100], [11, *[-100] * 5]]
    assert batch.sequence_BS.tolist() == [[0] * 6, [1, 1, 2, 2, 2, 2]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]]
    assert batch.end_R.tolist() == [5, 7]
    packed = pf.collate([([7, 3, 10], [3, 7, 11]), ([5], [11]), ([1], [2, 3])], 8)
    assert packed.sequence_BS.tolist() == [[0] * 6 + [1] * 2, [2] * 3 + [3] * 5]
    assert packed.end_R.tolist() == [5, 7, 10]


@EVERY_WORLD
def test_packed_equals_padded():
    """Sums of log-probabilities and every gradient; and each sequence alone, without a mask."""
    found = examples(9)
    upstream = normal(9, seed=7)
    results = []
    for row_length in (None, 14, 40):
        model = parallel_gpt()
        log_prob_R = pf.sequence_log_probs(model, pf.collate(found, row_length).to(ranks.device))
        (log_prob_R * upstream).sum().backward()
        results.append({"log π": log_prob_R.detach()} | grads_of(model))
    for other in results[1:]:
        assert_equal(other, results[0], 1e-12)
    plain = gpt()
    for (prompt, response), value in zip(found, results[0]["log π"]):
        tokens_1S = torch.tensor([prompt + response], device=ranks.device)
        log_p = plain(tokens_1S)[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        alone = sum(log_p[i, token] for i, token in zip(places, response))
        assert abs(value / alone - 1) < 1e-12


# ── DPO and RPO ───────────────────────────────────────────────────────────────────────────────────


def test_dpo_at_the_reference_is_log_2_with_the_exact_gradient():
    beta = 0.3
    pairs = pf.pair_batch(judged(5), gpt(), ranks.device)
    policy = gpt()
    loss, count = pf.PreferenceObjective("dpo", beta)(policy, pairs)
    loss.backward()
    assert count == 5 and abs(loss / 5 - math.log(2)) < 1e-15
    other = gpt()
    chosen_P, rejected_P = pf.sequence_log_probs(other, pairs.sequences).chunk(2)
    (-beta / 2 * (chosen_P - rejected_P)).sum().backward()
    assert_equal(grads_of(policy), grads_of(other), 1e-12)


def test_dpo_by_hand():
    delta = normal(50) * 30
    beta = 0.2
    expected = torch.tensor([math.log1p(math.exp(-beta * d)) for d in delta.tolist()])
    assert_equal({"": pf.dpo_loss(delta, beta)}, {"": expected.double()}, 1e-6)
    found = pf.dpo_loss(delta.requires_grad_(), beta)
    found.sum().backward()
    slope = -beta * (1 - (beta * delta.detach()).sigmoid())
    assert_equal({"": delta.grad}, {"": slope}, 1e-13)
    huge = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    assert pf.dpo_loss(huge, 1.0).tolist() == [1e6, 0.0]


def test_dpo_against_trl():
    """The loss function of that library, where it is installed and has one (trl 0.16 does)."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl.DPOTrainer, "dpo_loss"):
        pytest.skip("this trl has no dpo_loss to be called alone")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        f_divergence_type="reverse_kl",
        beta=0.2,
        reference_free=False,
        label_smoothing=0.0,
        loss_type="sigmoid",
        use_weighting=False,
    )
    four = normal(4, 6)
    expected, *_ = trl.DPOTrainer.dpo_loss(trainer, *four)
    delta = (four[0] - four[2]) - (four[1] - four[3])
    assert_equal({"": pf.dpo_loss(delta, 0.2)}, {"": expected}, 1e-12)


def enumerated_kl(a: float, b: float) -> float:
    """Over both outcomes of a coin, by their probabilities."""
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl", "squared"])
def test_rpo_by_hand(distance):
    """Values of enumerated divergences, the slopes of section 1.4, and the common minimum."""
    beta, eta = 0.25, 1.5
    delta, gap = normal(40) * 6, normal(40, seed=3).abs()
    leaf = delta.clone().requires_grad_()
    found = pf.rpo_loss(leaf, gap, beta, eta, distance)
    found.sum().backward()
    h, g = beta * delta, eta * gap
    if distance == "squared":
        expected, slope = (h - g) ** 2, 2 * (h - g)
    else:
        order = (g, h) if distance == "backward_kl" else (h, g)
        values = [enumerated_kl(a, b) for a, b in zip(*(x.tolist() for x in order))]
        expected = torch.tensor(values, dtype=torch.float64)
        slope = h.sigmoid() - g.sigmoid()
        if distance == "forward_kl":
            slope = h.sigmoid() * (-h).sigmoid() * (h - g)
    assert_equal({"": found}, {"": expected}, 1e-12)
    assert_equal({"": leaf.grad}, {"": beta * slope}, 1e-12)
    learned_gap = gap.clone().requires_grad_()  # a reward model gets no gradient
    assert not pf.rpo_loss(delta, learned_gap, beta, eta, distance).requires_grad
    at_minimum = pf.rpo_loss(g / beta, gap, beta, eta, distance)
    assert at_minimum.abs().max() < 1e-14 and (found > 0).all()


def test_limits_of_the_distances():
    """A large target makes the first DPO; far from it only that one still has a slope."""
    delta = normal(20) * 3
    far = torch.full_like(delta, 60.0)
    found = pf.rpo_loss(delta, far, 1.0, 1.0)
    assert_equal({"": found}, {"": pf.dpo_loss(delta, 1.0)}, 1e-12)
    slopes = {}
    for distance in ("backward_kl", "forward_kl", "squared"):
        leaf = torch.tensor([-40.0], dtype=torch.float64, requires_grad=True)
        pf.rpo_loss(leaf, torch.ones(1, dtype=torch.float64), 1.0, 1.0, distance).backward()
        slopes[distance] = leaf.grad.item()
    assert abs(slopes["backward_kl"] + 1 / (1 + math.exp(-1))) < 1e-12
    assert abs(slopes["forward_kl"]) < 1e-15 and slopes["squared"] == -82
    zero = torch.zeros(1, dtype=torch.float64)
    equal = pf.rpo_loss(zero, zero)
    assert equal.item() == 0
    assert abs(0.5 - torch.tensor(1.0).sigmoid() + 0.2311) < 1e-4  # section 1.4: −0.23


def test_the_sft_term_is_a_sum_over_tokens():
    pairs = pf.pair_batch(judged(4), gpt(seed=5), ranks.device)
    losses = [pf.PreferenceObjective("rpo", sft_weight=w)(gpt(), pairs)[0] for w in (0.0, 0.5)]
    chosen_P, _ = pf.sequence_log_probs(gpt(), pairs.sequences).chunk(2)
    assert_equal({"": losses[1] - losses[0]}, {"": -0.5 * chosen_P.sum()}, 1e-12)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

GROUPS = {}


def layout(tp):
    if tp not in GROUPS:
        GROUPS[tp] = pf.make_mesh(tp, ranks.device)
    return GROUPS[tp]


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda model: pf.make_optimizer(model, 1e-3),
}


def alone(optimizer: str, batches, objective, max_norm):
    """The plain model: mean loss of all pairs, PyTorch's own clipping."""
    plain = gpt()
    opt = OPTIMIZERS[optimizer](plain)
    scalars, grads = {}, {}
    for step, pairs in enumerate(batches):
        opt.zero_grad()
        total, count = objective(plain, pairs)
        loss = total / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        if step == 0:
            grads = {name: p.grad.clone() for name, p in plain.named_parameters()}
        opt.step()
        scalars |= {f"loss {step}": loss.detach(), f"norm {step}": norm}
    return plain, scalars, grads


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_on_every_mesh(optimizer):
    """Loss, norm, every gradient and weight; replicas have unequally many pairs, one has none."""
    world = dist.get_world_size()
    reference = gpt(seed=9)
    sets = [judged(world + 1, seed) for seed in range(5)]
    objective = pf.PreferenceObjective("rpo", 0.3, sft_weight=0.2)
    whole = [pf.pair_batch(x, reference, ranks.device, row_length=30) for x in sets]
    plain, expected, grads = alone(optimizer, whole, objective, 0.5)
    for tp in [tp for tp in (1, 2, 4) if world % tp == 0]:
        mesh = layout(tp)
        batches = []
        for x in sets:
            mine = x if mesh.dp == 1 else [*(x[i :: mesh.dp - 1] for i in range(mesh.dp - 1)), []]
            if mesh.dp > 1:
                mine = mine[mesh.dp_rank]  # the last replica has none
            micro = [mine[:1], mine[1:]]
            batches.append([pf.pair_batch(p, reference, ranks.device) for p in micro if p])
        model = parallel_gpt(mesh.tp_group)
        opt = OPTIMIZERS[optimizer](model)
        found, shards = {}, {}
        steps = pf.train(model, opt, batches, objective, mesh, 0.5)
        for step, (loss, norm) in enumerate(steps):
            assert not loss.requires_grad and not norm.requires_grad
            found |= {f"loss {step}": loss, f"norm {step}": norm}
            if step == 0:  # after clipping on both sides
                shards = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_equal(found, expected)
        assert_equal(pf.gather_state_dict(shards, config(), mesh.tp_group), cpu(grads))
        after = pf.gather_state_dict(model.state_dict(), config(), mesh.tp_group)
        floor = 5e-3 if optimizer == "AdamW" else 0.0
        assert_equal(after, cpu(plain.state_dict()), floor=floor)
        before = cpu(gpt().state_dict())
        matrices = {name: x for name, x in before.items() if x.ndim > 1}
        assert_differs({name: after[name] for name in matrices}, matrices, 1e-4)


@pytest.mark.ranks(1, 2, 4)
def test_sft_counts_tokens():
    """Replicas with unequally many tokens: the mean over all tokens, and its gradient."""
    world = dist.get_world_size()
    found = examples(2 * world + 1)
    batch = pf.collate(found).to(ranks.device)
    plain = gpt()
    log_p = plain.log_probs(batch)
    count = (batch.targets_BS != -100).sum()
    expected = -log_p.sum() / count
    expected.backward()
    assert count == sum(len(response) for _, response in found)
    mesh = layout(1)
    model = parallel_gpt(mesh.tp_group)
    mine = found[mesh.dp_rank :: mesh.dp]
    micro = [pf.collate(x).to(ranks.device) for x in (mine[:1], mine[1:])]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    ((loss, _),) = pf.train(model, optimizer, [micro], pf.sft_objective, mesh, 1e9)
    assert_equal({"": loss}, {"": expected}, 1e-12)
    assert_equal(
        pf.gather_state_dict(grads_of(model), config(), mesh.tp_group), cpu(grads_of(plain))
    )


@pytest.mark.ranks(2)
def test_subgroups_and_no_pair_at_all():
    """Each rank alone in a group: no message. Without any pair the gradient is zero."""
    mesh = layout(1)
    model = parallel_gpt(mesh.tp_group)
    calls = []
    batch = pf.collate(examples(2)).to(ranks.device)
    with plant(dist, "all_reduce", lambda *args, **kwargs: calls.append(args)):
        pf.sequence_log_probs(model, batch).sum().backward()
    assert not calls
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for loss, norm in pf.train(model, optimizer, [[]], pf.sft_objective, mesh):
        assert loss == 0 and norm == 0
    model.requires_grad_(False)  # nothing is trained: losses and counts alone are summed
    loss, count = torch.tensor([3.0, 2.0], dtype=torch.float64, device=ranks.device)
    mean = pf.average_gradients(model.parameters(), loss + dist.get_rank(), count, mesh.dp_group)
    assert mean == 7 / 4
    for loss, norm in pf.train(model, optimizer, [[]], pf.sft_objective, mesh):
        assert loss == 0 and norm == 0


@pytest.mark.ranks(2, 4)
def test_frozen_parameters():
    for frozen in ("layers.0.kv", "output", "embedding"):
        plain, model = gpt(), parallel_gpt()
        for net in (plain, model):
            for name, p in net.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
            pf.sequence_log_probs(net, pf.collate(examples(3)).to(ranks.device)).sum().backward()
        right = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_equal(pf.gather_state_dict(found, config()), cpu(right))


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("there, back", list(itertools.product((1, 2, 4, 8), repeat=2)))
def test_weights_move_between_numbers_of_ranks_to_the_bit(there, back):
    cfg = config(vocab_multiple=3)
    full = random_weights(cfg)
    for tp in (there, back):
        shards = [pf.shard_state_dict(full, cfg, rank, tp) for rank in range(tp)]
        merged = pf.merge_state_dicts(shards, cfg)
        assert merged.keys() == full.keys()
        assert all(torch.equal(merged[name], x) for name, x in full.items())
        sharded = [name for name, x in full.items() if shards[0][name].shape != x.shape]
        assert tp == 1 or len(sharded) == 2 + 2 * 5


@EVERY_WORLD
def test_a_models_shards_are_those_of_the_plain_models_weights():
    cfg = config()
    model = pf.ParallelGPT(cfg)
    full = pf.GPT(cfg).state_dict()
    shards = pf.shard_state_dict(full, cfg, dist.get_rank(), dist.get_world_size())
    assert all(torch.equal(model.state_dict()[name], x) for name, x in shards.items())
    assert len(pf.sharded_parameters(model)) == 12


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def losses_and_grads(policy, pairs, objective=None):
    policy.zero_grad()
    total, count = (objective or pf.PreferenceObjective("dpo", 0.3))(policy, pairs)
    (total / count).backward()
    return {"loss": total.detach() / count}, {
        n: p.grad.clone() for n, p in policy.named_parameters()
    }


def shows(found, expected):
    """What a user sees: the loss, and the worst gradient."""
    return Shows(worst_of(found[0], expected[0]), worst_of(found[1], expected[1]))


def with_bug(name, bug, policy=None, reference=None, objective=None):
    """The right result, and the one with the bug."""
    reference = reference or gpt(seed=9)
    pairs = pf.pair_batch(judged(6), reference, ranks.device)
    expected = losses_and_grads(policy or gpt(), pairs, objective)
    with plant(pf, name, bug):
        pairs = pf.pair_batch(judged(6), reference, ranks.device)
        found = losses_and_grads(policy or gpt(), pairs, objective)
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="targets are shifted, and then the mask once more: the end token does not count",
    seen_in="https://github.com/Goekdeniz-Guelmez/mlx-lm-lora/pull/80",
)
def test_the_mask_is_shifted_with_the_inputs():
    right = pf.collate

    def bug(examples, row_length=None, pad=0):
        """The mask of each row one place to the left: what it lets through are the next tokens."""
        batch = right(examples, row_length, pad)
        next_BS = batch.tokens_BS.roll(-1, 1)
        counts_BS = (batch.targets_BS != -100).roll(-1, 1)
        counts_BS[:, -1] = False
        return batch._replace(targets_BS=torch.where(counts_BS, next_BS, -100))

    batch = bug([([7, 3, 10], [3, 7, 11])])
    assert batch.targets_BS.tolist() == [[-100, 10, 3, 7, -100, -100]]  # the end does not count
    return with_bug("collate", bug)


@pytest.mark.planted_bug(
    symptom="prompt tokens count: the policy learns to write prompts",
    seen_in="https://github.com/OpenRLHF/OpenRLHF/issues/235",
)
def test_the_prompt_counts():
    bug = edited(
        pf.collate,
        (
            "[IGNORED] * (len(prompt) - 1) + response + [IGNORED]",
            "prompt[1:] + response + [IGNORED]",
        ),
    )
    objective = pf.PreferenceObjective("dpo", 0.3, sft_weight=0.1)
    return with_bug("collate", bug, objective=objective)


@pytest.mark.planted_bug(
    symptom="a mean over tokens: β means another thing for each length", seen_in=None
)
def test_the_mean_over_tokens_in_place_of_the_sum():
    right = pf.sequence_log_probs

    def bug(model, batch):
        ones = (batch.targets_BS != -100).double().flatten()
        count = ones.new_zeros(len(batch.end_R) + 1)
        count = count.index_add(0, batch.sequence_BS.flatten(), ones)
        return right(model, batch) / count[:-1]

    return with_bug("sequence_log_probs", bug)


@pytest.mark.planted_bug(
    symptom="the reference has another dtype: the first loss is not log 2",
    seen_in="https://github.com/eric-mitchell/direct-preference-optimization/issues/34",
)
def test_a_reference_in_another_dtype():
    pairs = pf.pair_batch(judged(6), gpt(), ranks.device)
    expected = losses_and_grads(gpt(), pairs)
    low = pf.pair_batch(judged(6), gpt().to(torch.bfloat16), ranks.device)
    low = low._replace(reference_R=low.reference_R.double())
    found = losses_and_grads(gpt(), low)
    assert abs(expected[0]["loss"] - math.log(2)) < 1e-15
    assert abs(found[0]["loss"] - math.log(2)) > 1e-4
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="the logarithm of a softmax: −inf for unlikely responses, and NaN gradients",
    seen_in="https://github.com/NVIDIA/NeMo-Aligner",
)
def test_the_logarithm_of_a_softmax():
    logits = torch.zeros(2, 5, dtype=torch.float64)
    logits[0, 2] = 800.0
    targets = torch.tensor([1, 1])
    leaf = logits.clone().requires_grad_()
    wrong = leaf.softmax(-1).log().gather(-1, targets[:, None])[:, 0]
    wrong.sum().backward()
    assert wrong[0] == -math.inf and leaf.grad.isnan().any()
    leaf = logits.clone().requires_grad_()
    found = pf.vocab_parallel_log_probs(leaf, targets)
    found.sum().backward()
    assert found[0] == -800 and leaf.grad.isfinite().all()
    return Shows("infinite", "NaN")


@pytest.mark.planted_bug(
    symptom="the target is masked after the all-reduce: ranks disagree on every log π", seen_in=None
)
@pytest.mark.ranks(2, 4)
def test_the_target_is_masked_after_the_all_reduce():
    full, targets = logits_and_targets()
    expected = full[:, :13].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    bug = edited(
        pf._VocabParallelLogProbs,
        ("torch.where(is_local_T, logit_T - max_T, 0)", "logit_T - max_T"),
        (
            "logit_T, sum_T = _all_reduce(partial_2T, group)",
            "logit_T, sum_T = _all_reduce(partial_2T, group)\n"
            "        logit_T = torch.where(is_local_T, logit_T, 0)",
        ),
    )
    with plant(pf, "_VocabParallelLogProbs", bug):
        found = pf.vocab_parallel_log_probs(own(full), targets, None, 13)
    assert_differs({"": found}, {"": expected}, 0.1)
    return Shows(worst_of({"": found}, {"": expected}), "right: no gradient flows through it")


@pytest.mark.planted_bug(
    symptom="RPO with its arguments exchanged: badly wrong pairs learn nothing", seen_in=None
)
def test_rpo_with_its_arguments_exchanged():
    right = pf._bernoulli_kl
    objective = pf.PreferenceObjective("rpo", 5.0)
    return with_bug("_bernoulli_kl", lambda a, b: right(b, a), objective=objective)


@pytest.mark.planted_bug(
    symptom="LayerNorm without the 1: a fresh model is zero everywhere", seen_in=None
)
def test_layer_norm_without_the_1():
    bug = edited(pf.LayerNorm1p.forward, ("1 + self.weight", "self.weight"))
    with plant(pf.LayerNorm1p, "forward", bug):
        wrong = gpt()(ids(2, 7))
    expected = gpt()(ids(2, 7))
    assert wrong.eq(0).all() and expected.abs().max() > 0.1
    return Shows("log V, for ever", "zero, but for the last bias")


@pytest.mark.planted_bug(
    symptom="all channels of a head are rotated: published weights give other logits", seen_in=None
)
def test_rotary_on_the_complete_head():
    cfg = config()
    weights = random_weights(cfg)
    plain, wrong = gpt(), gpt(rotary_percent=1.0)
    for model in (plain, wrong):
        model.load_state_dict(weights)
    pairs = pf.pair_batch(judged(6), gpt(seed=9), ranks.device)
    expected, found = losses_and_grads(plain, pairs), losses_and_grads(wrong, pairs)
    assert_differs(found[1], expected[1], 1e-2)
    return shows(found, expected)


@pytest.mark.planted_bug(
    symptom="a mean of means: a replica with one pair weighs as much as one with three",
    seen_in="https://github.com/huggingface/trl/issues/3021",
)
@pytest.mark.ranks(2)
def test_a_mean_of_means_over_replicas():
    found = judged(4)
    reference = gpt(seed=9)
    mesh = layout(1)
    whole = pf.pair_batch(found, reference, ranks.device)
    expected = losses_and_grads(gpt(), whole)
    mine = found[:3] if mesh.dp_rank == 0 else found[3:]
    own_pairs = pf.pair_batch(mine, reference, ranks.device)
    results = []
    right = pf.average_gradients

    def bug(parameters, loss, count, group=None):
        parameters = list(parameters)
        for p in parameters:
            p.grad /= count
        return right(parameters, loss / count, torch.ones_like(count), group)

    for function in (right, bug):
        model = parallel_gpt(mesh.tp_group)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        objective = pf.PreferenceObjective("dpo", 0.3)
        with plant(pf, "average_gradients", function):
            ((loss, _),) = pf.train(model, optimizer, [[own_pairs]], objective, mesh, 1e9)
        results.append(({"loss": loss}, grads_of(model)))
    assert_equal(results[0][1], expected[1])
    assert_differs(results[1][1], expected[1], 1e-2)
    return shows(results[1], expected)


@pytest.mark.planted_bug(
    symptom="gathered keys lose the other ranks' gradients, where ranks share a group", seen_in=None
)
@pytest.mark.ranks(4)
def test_gathered_keys_without_a_sum():
    plain, model = gpt(), parallel_gpt()
    batch = pf.collate(examples(3)).to(ranks.device)
    pf.sequence_log_probs(plain, batch).sum().backward()
    with plant(pf, "_sum_and_take", pf._take_shard):
        loss = pf.sequence_log_probs(model, batch).sum()
        loss.backward()
    found = pf.gather_state_dict(grads_of(model), config())
    right = cpu(grads_of(plain))
    keys = {name: x for name, x in right.items() if "kv" in name}
    assert_differs({name: found[name] for name in keys}, keys, 0.1)
    return Shows("right", worst_of(found, right))


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


def test_bad_configurations():
    cases = {
        "hidden_size must be a multiple of num_heads": dict(hidden_size=60),
        "num_heads must be a multiple of num_query_groups": dict(num_query_groups=3),
        "rotary_percent=0.1 of 8 channels is 0: it must be even": dict(rotary_percent=0.1),
        "rotary_percent=1.5 of 8 channels is 12": dict(rotary_percent=1.5),
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            config(**changes)
    for tp in (3, 16):
        with pytest.raises(ValueError, match=f"tp={tp}: it must divide heads"):
            pf.check_tp(config(), tp)
    for tp in (1, 2, 4, 8):
        pf.check_tp(config(), tp)
    with pytest.raises(ValueError, match="tp=4: it must divide"):  # neither divides the other
        pf.check_tp(config(num_heads=12, num_query_groups=6, hidden_size=96), 4)


def test_bad_losses():
    delta = torch.zeros(2)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"beta={beta}"):
            pf.dpo_loss(delta, beta)
        with pytest.raises(ValueError, match=f"beta={beta}"):
            pf.rpo_loss(delta, delta, beta)
    with pytest.raises(ValueError, match="distance='reverse'"):
        pf.rpo_loss(delta, delta, distance="reverse")
    for distance in ("backward_kl", "forward_kl", "squared"):  # the last would make 2 × 2 losses
        with pytest.raises(ValueError, match=r"delta_P \(2,\) and reward_gap_P \(2, 1\)"):
            pf.rpo_loss(delta, delta[:, None], distance=distance)
    with pytest.raises(ValueError, match="method='ipo': dpo or rpo"):
        pf.PreferenceObjective("ipo")
    odd = pf.Pairs(pf.collate(examples(3)), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="3 responses are no pairs"):  # 2 − 1 would broadcast
        pf.PreferenceObjective()(gpt(), odd)


def test_bad_batches():
    for bad in (([], [1]), ([1], []), ([1] * 5, [2] * 4)):
        with pytest.raises(ValueError, match="example 1 is"):
            pf.collate([([1], [2]), bad], 8)


@pytest.mark.ranks(2)
def test_bad_log_probs():
    logits = torch.zeros(3, 5, device=ranks.device)
    targets = torch.tensor([1, 2, 9], device=ranks.device)
    cases = {
        r"logits \(3, 5\) and targets \(2,\)": (logits, targets[:2]),
        "vocab_size=11, chunk=256": (logits, targets, None, 11),
        "vocab_size=9, chunk=0": (logits, targets, None, 9, 0),
        "token id 9 is not in": (logits, targets, None, 9),
    }
    for message, args in cases.items():
        with pytest.raises(ValueError, match=message):
            pf.vocab_parallel_log_probs(*args)
    with pytest.raises(ValueError, match="token id 13 is not in"):
        parallel_gpt()(torch.tensor([[13]], device=ranks.device))
    for tp in (3, 0, -1):
        with pytest.raises(ValueError, match=f"tp={tp} does not divide the 2 ranks"):
            pf.make_mesh(tp, ranks.device)
    shards = [{"final_norm.weight": torch.zeros(2)}, {"final_norm.weight": torch.ones(2)}]
    with pytest.raises(ValueError, match="final_norm.weight should be replicated, but rank 1"):
        pf.merge_state_dicts(shards, config())


# ── The script ────────────────────────────────────────────────────────────────────────────────────


@EVERY_WORLD
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_check_on_every_world(dtype):
    for tp in [tp for tp in (1, 2, 4) if dist.get_world_size() % tp == 0]:
        precision = pf.dtypes(SimpleNamespace(dtype=dtype))
        errors = pf.equivalence(layout(tp), ranks.device, *precision)
        assert pf.print_errors(errors, pf.BOUNDS[dtype])
        assert any(name.startswith("gradient layers.0.kv") for name in errors)


@pytest.mark.ranks(2)
def test_the_demonstration_on_two_ranks():
    """Few steps; both layouts. DPO's first loss is log 2; learning needs more steps."""
    for tp in (1, 2):
        code, printed = scripts.on_ranks(pf, "--tp", tp, "--steps", 3, "--pair-steps", 2)
        assert code == 0 and "FAILED" not in printed
        assert printed.count(" ok\n") == 2 and printed.count("a short run") == 3
        assert "DPO + SFT term" in printed


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=240)
def test_the_script():
    """With its own number of steps."""
    code, printed = scripts.on_ranks(pf)
    assert code == 0 and "FAILED" not in printed and printed.count(" ok\n") == 5, printed


@pytest.mark.slow
def test_check_in_a_process_without_docstrings(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = scripts.forked(SCRIPT, "--check", "--ranks", "3")
    assert done.returncode == 0 and "gradient layers.0.kv.weight, tp 3" in done.stdout, done.stderr


def flags_of(*words: str):
    with plant(sys, "argv", [str(SCRIPT), *words]):
        return pf.flags()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--lr", "nan"), "argument --lr: 'nan' must be of type float"),
        (("--beta", "0"), "argument --beta: '0' must be of type float"),
        (("--tp", "3"), "--tp 3 does not divide the 2 ranks"),
        (("--num-heads", "6"), "hidden_size must be a multiple of num_heads"),
        (
            ("--tp", "2", "--num-heads", "1", "--num-query-groups", "1"),
            "tp=2: it must divide heads",
        ),
        (("--dropout", "0.1"), "unrecognized arguments: --dropout"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags_of(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2
