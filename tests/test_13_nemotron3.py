# SPDX-License-Identifier: MIT-0
"""Chapter 13: the assembled model on every layout is the single device's; what each sum is for."""

import argparse
import math
from functools import lru_cache, partial
from pathlib import Path

import megatron_tp
import mtp
import nemotron3 as n3
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from proof import Shows, assert_differs, assert_equal, plant, worst_of

SCRIPT = Path(n3.__file__)
LAYOUTS = [(1, 1), (2, 2), (2, 4), (1, 4)]


def small(**changes) -> n3.NemotronConfig:
    sizes = dict(hidden_size=16, pattern="ME*", mtp_pattern="E-", ffn_hidden_size=8, shared_size=6)
    sizes |= dict(mamba_heads=4, mamba_head_size=4, mamba_groups=2, state_size=6, chunk=4)
    sizes |= dict(attention_heads=4, attention_groups=2, attention_head_size=4, init_std=0.1)
    sizes |= dict(num_experts=8, top_k=2, expert_size=12, moe_latent_size=8, dt_init=(0.05, 0.5))
    return n3.NemotronConfig(61, **(sizes | changes))


def batch(B: int = 3, T: int = 5) -> n3.Batch:
    """Two replicas have 10 and 5 tokens, which do not divide over two ranks."""
    rng = torch.Generator().manual_seed(2)
    tokens_BT, targets_BT = torch.randint(61, (2, B, T), generator=rng)
    targets_BT[0, :2] = -100
    document_BT = torch.zeros_like(tokens_BT)
    document_BT[0, 3:] = 1
    return tuple(x.to(ranks.device) for x in (tokens_BT, targets_BT, document_BT))


@lru_cache
def mesh_of(tp: int, ep: int) -> n3.Mesh:
    return n3.make_mesh(tp, ep, ranks.device)


def one_step(model: n3.NemotronLM) -> dict[str, torch.Tensor]:
    """Gradients, losses, norm, and the biases after one step that moves no weight."""
    model.to(ranks.device, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = next(n3.train(model, optimizer, [batch()], alpha=0.1, gamma=0.01, max_norm=1e9))
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {name: x for name, x in model.state_dict().items() if name.endswith("router.bias")}
    found |= {"losses": step.losses, "norm": step.norm}
    return found | ({"counts": step.counts.double()} if len(step.counts) else {})


@lru_cache
def reference() -> dict[str, torch.Tensor]:
    return one_step(n3.NemotronLM(small()))


def expected_on(mesh: n3.Mesh) -> dict[str, torch.Tensor]:
    """This rank's shards of the reference."""
    found = {}
    for name, x in reference().items():
        is_shard = "." in name
        found[name] = n3.shard_tensor(name, x, small(), mesh) if is_shard else x
    return found


def seen_on(tp: int, ep: int) -> tuple[dict, dict]:
    mesh = mesh_of(tp, ep)
    return one_step(n3.ParallelNemotronLM(small(), mesh)), expected_on(mesh)


def shows(here: dict, there: dict) -> Shows:
    """What a user sees of a bug on this rank."""
    assert_differs(here, there)
    gap = (here["losses"][0] / there["losses"][0] - 1).item()
    grads = [name for name in there if "." in name and "router.bias" not in name]
    return Shows(gap, worst_of({n: here[n] for n in grads}, {n: there[n] for n in grads}))


# ── Equivalence ───────────────────────────────────────────────────────────────────────────────────


@lru_cache
def errors_on_every_layout() -> dict[str, float]:
    return n3.check(argparse.Namespace(timeout=60.0), ranks.device, torch.float64)


@pytest.mark.ranks(1, 4, timeout=240)
def test_five_steps_on_every_layout():
    """Losses of all depths, counts, norms, every gradient, and weights and biases after AdamW."""
    errors = errors_on_every_layout()
    assert n3.worst(errors) <= 1e-10
    if dist.get_world_size() == 4:
        assert n3.layouts_of(4) == LAYOUTS
        kinds = ("loss", "norm before clipping", "count of rows", "gradient", "weight after AdamW")
        for kind in kinds:
            for tp, ep in LAYOUTS:
                assert any(name.startswith(f"{kind}, tp {tp} ep {ep},") for name in errors)


@pytest.mark.ranks(1, 4)
def test_only_tokens_of_the_step_move_the_bias():
    """A pass in training mode before it, as a validation without eval(), changes nothing."""
    tp = 2 if dist.get_world_size() == 4 else 1
    models = [n3.ParallelNemotronLM(small(), mesh_of(tp, tp)) for _ in range(2)]
    with torch.no_grad():
        models[1].to(ranks.device, torch.float64)(batch()[0].flip(1).repeat(5, 1))
    assert models[1].counts().any()
    right, found = map(one_step, models)
    assert_equal(found, right)
    assert not models[1].counts().any()


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=240)
def test_the_script():
    """Its proof is that of the test above, which these ranks have run."""
    errors = errors_on_every_layout()

    def check(args, device, dtype):
        assert device == ranks.device and dtype == torch.float64
        return errors

    with plant(n3, "check", check), plant(n3, "TextData", lru_cache(n3.TextData)):
        code, printed = scripts.on_ranks(n3, "--steps", 2)
    assert code == 0 and "FAILED" not in printed, printed
    assert "tp 2 × dp 2, ep 4" in printed and printed.count(" ok\n") == 7


@pytest.mark.ranks(4, timeout=120)
def test_bf16_is_within_its_bound():
    """Right code, of which rounding sends a token to another expert: losses hardly notice."""
    errors = n3.equivalence(mesh_of(2, 4), ranks.device, torch.float32, torch.bfloat16)
    assert n3.worst(errors) <= n3.BOUNDS["bf16"]
    assert n3.worst(errors, "loss") <= 1e-2


@pytest.mark.ranks(4, timeout=120)
def test_other_configurations():
    """A step of models without latent, shared expert, depths, or a block for all depths, and with
    one group of keys for two ranks."""
    cases = [
        {"attention_groups": 1, "mtp_pattern": "*E"},
        {"moe_latent_size": 0, "shared_size": 0},
        {"mtp_num_layers": 0, "pattern": "-E"},
        {"mtp_use_repeated_layer": False, "pattern": "*"},
        {"mtp_detach_heads": True, "pattern": "M", "mtp_pattern": "*"},
        {"norm_eps": 0.5, "pattern": "*", "mtp_num_layers": 1, "mtp_pattern": "-"},
    ]
    mesh = mesh_of(2, 4)
    for changes in cases:
        config = small(**changes)
        plain = one_step(n3.NemotronLM(config))
        here = one_step(n3.ParallelNemotronLM(config, mesh))
        for name, x in plain.items():
            if "." in name:
                plain[name] = n3.shard_tensor(name, x, config, mesh)
        assert_equal(here, plain, 1e-10)


KEYS = dict(pattern="*E", mtp_pattern="*", attention_heads=8, mamba_groups=4, shared_size=8)


@pytest.mark.ranks(4, timeout=120)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_more_ranks_than_groups_of_keys(groups):
    """tp 4: every gradient and the norm; shards are merged to the initial weights to the bit."""
    mesh = mesh_of(4, 2)
    config = small(**KEYS, attention_groups=groups)
    plain = one_step(n3.NemotronLM(config))
    model = n3.ParallelNemotronLM(config, mesh)
    for name, x in n3.initial_weights(config):
        assert torch.equal(model.state_dict()[name], n3.shard_tensor(name, x, config, mesh))
    here = one_step(model)
    for name, x in plain.items():
        if "." in name:
            plain[name] = n3.shard_tensor(name, x, config, mesh)
    assert_equal(here, plain, 1e-10)
    key = model.layers[0].mixer.k_proj.weight
    assert len(key) == 4 * (1 if groups == 4 else groups)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="replicated keys are summed over dp, as heads are: copies get parts of their gradient",
    seen_in=None,
)
def test_keys_summed_over_dp():
    mesh = mesh_of(4, 2)
    config = small(**KEYS, attention_groups=2)
    there = one_step(n3.NemotronLM(config))
    original = n3.reduce_gradients

    def wrong(model):
        kept = {}
        for name, p in model.named_parameters():
            if "k_proj" in name or "v_proj" in name:
                kept[p] = p.grad.clone()
        original(model)
        for p, grad in kept.items():
            p.grad = n3._all_reduce(grad, mesh.data_group)

    with plant(n3, "reduce_gradients", wrong):
        here = one_step(n3.ParallelNemotronLM(config, mesh))
    names = [name for name in there if "." in name]
    expected = there | {name: n3.shard_tensor(name, there[name], config, mesh) for name in names}
    wrong_names = assert_differs(here, expected)
    assert all(name == "norm" or "k_proj" in name or "v_proj" in name for name in wrong_names)
    return shows(here, expected)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="each rank takes the first group of keys: heads of the second group attend to others'",
    seen_in=None,
)
def test_the_first_group_for_all_ranks():
    mesh = mesh_of(4, 2)
    config = small(**KEYS, attention_groups=2)
    there = one_step(n3.NemotronLM(config))
    model = n3.ParallelNemotronLM(config, mesh)
    for module in model.modules():
        if isinstance(module, n3.AttentionOfGroup):
            module.group = 0
    gap = (one_step(model)["losses"][0] / there["losses"][0] - 1).item()
    assert abs(gap) > 1e-6
    return Shows(gap, None)


def test_a_shard_of_another_size_is_refused():
    """Only the vocabulary is padded, and nothing is cut off."""
    mesh = n3.Mesh(tp=2)
    names = ("layers.0.mixer.in_proj.weight", "layers.0.mixer.conv_bias", "head.weight")
    full = dict(n3.initial_weights(small()))
    for name in names:
        for x in (full[name][:-1], torch.cat([full[name], full[name][:1]])):
            with pytest.raises(RuntimeError, match="split_sizes"):
                n3.shard_tensor(name, x, small(), mesh)


def test_norm_eps_is_honoured_everywhere():
    model = n3.NemotronLM(small(norm_eps=0.25))
    norms = [module for module in model.modules() if isinstance(module, n3.RMSNorm)]
    assert len(norms) == 10 and {norm.eps for norm in norms} == {0.25}


@pytest.mark.ranks(4)
def test_weights_of_one_layout_are_those_of_another():
    """Shards merge to the initial weights to the bit, on every layout."""
    full = dict(n3.initial_weights(small()))
    for tp, ep in LAYOUTS:
        model = n3.ParallelNemotronLM(small(), mesh_of(tp, ep))
        merged = n3.gather_state_dict(model.state_dict(), model)
        assert merged.keys() == full.keys()
        for name, x in full.items():
            assert torch.equal(merged[name], x), name
    places = {name: n3.placement(name, small(), 2).over for name in full}
    assert {name for name, over in places.items() if over == "ep"} == {
        name for name in full if ".experts." in name
    }
    replicated = [name for name, over in places.items() if not over]
    kinds = ("norm", "router", "latent", "eh_proj")
    assert all(any(kind in name for kind in kinds) for name in replicated)


@pytest.mark.ranks(4)
def test_messages_of_a_layer():
    """What sections 1.1 and 2.2 say: in forward two messages for M, * and -; for E three
    all-to-alls, and over tp two gathers and a reduce-scatter."""
    mesh = mesh_of(2, 4)
    found = {}
    for letter in "M*-E":
        block = n3.ParallelBlock(letter, small(), mesh).to(ranks.device)
        span = n3.Span(None, (2, 4))
        with megatron_tp.Counter() as counter, torch.no_grad():
            block(torch.randn(4, 16, device=ranks.device), span)
        found[letter] = sorted(message.op.removesuffix("_base") for message in counter.messages)
    for letter in "M*-":
        assert found[letter] == ["all_gather", "reduce_scatter"]
    assert found["E"] == ["all_gather", "all_gather", *["alltoall"] * 3, "reduce_scatter"]


@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 6))
def test_rows_of_ranks(B, T, tp):
    """Each token is one rank's, in order, and no rank has more rows than another."""
    span = n3.Span(None, (B, T))
    rows = [n3.rows_of_rank(span, n3.Mesh(tp=tp, tp_rank=rank)) for rank in range(tp)]
    assert len({r for r, _ in rows}) == 1 and sum(u for _, u in rows) == B * T
    r = rows[0][0]
    assert all(0 <= u <= r for _, u in rows) and r * tp - B * T < tp
    assert sorted((u for _, u in rows), reverse=True) == [u for _, u in rows]


# ── The plain model, against others ───────────────────────────────────────────────────────────────


def test_the_losses_of_depths_by_hand():
    """Depth k reads t_{i+k} and predicts t_{i+k+1}, in one document."""
    model = n3.NemotronLM(small()).double()
    tokens_BT = torch.randint(61, (2, 9))
    hidden_BTD = model.trunk(tokens_BT[:, :-1], n3.Span(None, (2, 8)))
    expected = [F.cross_entropy(model.logits(hidden_BTD).mT, tokens_BT[:, 1:])]
    for k in (1, 2):
        read_BT = F.pad(tokens_BT[:, k:-1], (0, k))
        hidden_BTD = model.mtp[0](model.embed(read_BT), hidden_BTD, n3.Span(None, (2, 8)))
        logits_BTV = model.logits(hidden_BTD)[:, : 8 - k]
        expected.append(F.cross_entropy(logits_BTV.mT, tokens_BT[:, k + 1 :]))
    losses = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    total = expected[0] + 0.3 / 2 * (expected[1] + expected[2])
    assert_equal({"losses": losses}, {"losses": torch.stack([total, *expected])}, 1e-12)


def test_the_balancing_loss_is_that_of_each_layer():
    """Layers of the trunk count once, the shared block 1 / depths for each depth."""
    model = n3.NemotronLM(small(pattern="EE")).double()
    found = []
    original = n3.load_balancing_loss
    with plant(n3, "load_balancing_loss", lambda *a: found.append(original(*a)) or found[-1]):
        _, balance_B = model.loss_and_balance(*batch())
    assert len(found) == 4
    expected_B = found[0] + found[1] + (found[2] + found[3]) / 2
    assert_equal({"balance": balance_B}, {"balance": expected_B}, 1e-12)
    assert (expected_B >= 3 - 1e-9).all()


def test_a_model_without_experts_is_chapter_9s():
    """One group of Mamba heads, a key for each query head: the same losses from the same weights.
    Chapter 9's scan is one matrix, chapter 5's has chunks."""
    changes = dict(pattern="M*-", mtp_pattern="*-", mamba_groups=1, attention_groups=4)
    ours = n3.NemotronLM(small(**changes)).double()
    names = {f.name for f in n3.fields(mtp.HybridConfig)}
    shared = {name: x for name, x in vars(ours.config).items() if name in names}
    theirs = mtp.HybridLM(mtp.HybridConfig(**shared)).double()
    weights = dict(ours.state_dict())
    for name in list(weights):
        if name.endswith("q_proj.weight"):
            stem = name.removesuffix("q_proj.weight")
            parts = [weights.pop(f"{stem}{kind}_proj.weight") for kind in "qkv"]
            weights[f"{stem}qkv.weight"] = torch.cat(parts)
    theirs.load_state_dict(weights)
    assert_equal({"losses": ours.loss(*batch())}, {"losses": theirs.loss(*batch())}, 1e-12)


# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def reduce_wrongly(model, **groups) -> None:
    """`reduce_gradients` with other groups for some places."""
    right = {"ep": model.mesh.edp_group, "tp": model.mesh.data_group, "": None}
    for over, parameters in n3.parameters_by_place(model).items():
        n3.sum_gradients(parameters, (right | groups)[over])


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="norms and routers of a replica are summed over dp alone: their copies drift apart",
    seen_in=None,
)
def test_replicated_gradients_without_tp():
    mesh = mesh_of(2, 4)
    with plant(n3, "reduce_gradients", partial(reduce_wrongly, **{"": mesh.data_group})):
        return shows(*seen_on(2, 4))


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="heads are summed over all ranks: gradients of other heads are added, unseen by Adam",
    seen_in=None,
)
def test_heads_summed_over_all_ranks():
    with plant(n3, "reduce_gradients", partial(reduce_wrongly, tp=None)):
        return shows(*seen_on(2, 4))


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="experts are summed over dp, as all else: gradients of different experts are added",
    seen_in=None,
)
def test_experts_summed_over_dp():
    mesh = mesh_of(2, 4)
    with plant(n3, "reduce_gradients", partial(reduce_wrongly, ep=mesh.data_group)):
        return shows(*seen_on(2, 4))


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="counts are summed over dp: the ranks of a replica move the bias of one router apart",
    seen_in=None,
)
def test_counts_without_tp():
    mesh = mesh_of(2, 4)
    original = n3._all_reduce

    def over_dp(x, group=None, op=dist.ReduceOp.SUM):
        is_count = x.dtype == torch.int64 and x.ndim == 2
        return original(x, mesh.data_group if is_count else group, op)

    with plant(n3, "_all_reduce", over_dp):
        here, there = seen_on(2, 4)
    wrong = assert_differs(here, there)
    assert all(name == "counts" or name.endswith("router.bias") for name in wrong)
    return shows(here, there)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="rows of padding are routed: loss and gradients are right, and the bias moves",
    seen_in=None,
)
def test_padding_is_routed():
    def all_rows(span, mesh):
        r = math.ceil(math.prod(span.shape) / mesh.tp)
        return r, r

    with plant(n3, "rows_of_rank", all_rows):
        here, there = seen_on(2, 4)
    assert assert_differs(here, there)[0] == "counts"
    return shows(here, there)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="the balancing loss is taken for a partial sum: its gradient is tp times too large",
    seen_in=None,
)
def test_balance_is_no_partial_sum():
    original = n3.gather_from_sp
    with plant(n3, "gather_from_sp", lambda x, group, backward="": original(x, group)):
        return shows(*seen_on(2, 4))


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="the norm counts experts as if they were replicated as heads are: clipping takes more",
    seen_in=None,
)
def test_norm_of_experts_as_of_heads():
    original = n3.parameters_by_place

    def merged(model):
        found = original(model)
        return {"": found[""], "tp": found["tp"] + found["ep"], "ep": []}

    norm = n3.gradient_norm
    mesh = mesh_of(2, 4)

    def wrong(model):
        with plant(n3, "parameters_by_place", merged):
            return norm(model)

    with plant(n3, "gradient_norm", wrong):
        here, there = seen_on(2, 4)
    # Here experts are a small part of the norm; right code is near 1e-16.
    assert assert_differs(here, there, 1e-8) == ["norm"] and mesh.dp == 2
    return Shows((here["losses"][0] / there["losses"][0] - 1).item(), "right, but for the norm")


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="in_proj is cut as one block of rows: a rank's z, x, B, C and dt are of other heads",
    seen_in=None,
)
def test_in_proj_as_one_component():
    original = n3.components

    def one(name, config):
        dim, sizes = original(name, config)
        return dim, [sum(sizes)]

    mesh = mesh_of(2, 4)
    there = reference()
    with plant(n3, "components", one):
        here = one_step(n3.ParallelNemotronLM(small(), mesh))
    gap = (here["losses"][0] / there["losses"][0] - 1).item()
    assert abs(gap) > 1e-6
    return Shows(gap, None)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="each replica divides by its own count of targets: a mean of means",
    seen_in="https://github.com/NVIDIA/Megatron-LM/pull/3159",
)
def test_counts_of_targets_are_local():
    original = n3.process_mtp_loss

    def local(losses, targets, scaling_factor, group):
        return original(losses, targets, scaling_factor, None) / 2

    with plant(n3, "process_mtp_loss", local):
        return shows(*seen_on(2, 4))


@pytest.mark.planted_bug(
    symptom="the shared block's balancing loss is not divided by the depths", seen_in=None
)
def test_balance_of_the_block_counts_every_depth():
    there = reference()

    def undivided(self, *args):
        losses = self.loss(*args)
        return losses, sum(self.balance)

    with plant(n3.NemotronLM, "loss_and_balance", undivided):
        here = one_step(n3.NemotronLM(small()))
    return shows(here, there)


# ── Sizes, and what is refused ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pattern": "MX"}, "pattern='MX': the letters are ['M', '*', '-', 'E']"),
        ({"pattern": ""}, "pattern='': the letters"),
        ({"mtp_pattern": "?"}, "mtp_pattern"),
        ({"top_k": 9}, "top_k=9: choose at most num_experts=8"),
        ({"mamba_groups": 3}, "mamba_heads=4 do not divide into mamba_groups=3"),
        ({"attention_groups": 3}, "attention_heads=4 do not divide into attention_groups=3"),
        ({"hidden_size": 0}, "hidden_size=0: it must be at least 1"),
        ({"conv_kernel": 1}, "conv_kernel=1: it must be at least 2"),
        ({"shared_size": -1}, "shared_size=-1: it must be at least 0"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError) as raised:
        small(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "tp, ep, changes, message",
    [
        (4, 1, {"mamba_groups": 4, "attention_groups": 3, "attention_heads": 12}, "groups=3 does"),
        (4, 1, {"mamba_groups": 4, "attention_heads": 6}, "attention_heads=6 does not divide over"),
        (4, 1, {"shared_size": 0}, "mamba_groups=2 does not divide"),
        (1, 3, {}, "num_experts=8 does not divide over 3 ranks"),
        (2, 1, {"shared_size": 5}, "shared_size=5 does not divide over tp=2 ranks"),
        (2, 1, {"ffn_hidden_size": 5}, "ffn_hidden_size=5 does not divide over tp=2"),
    ],
)
def test_layouts_that_do_not_fit(tp, ep, changes, message):
    with pytest.raises(ValueError, match=message):
        n3.check_layout(small(**changes), tp, ep)


def test_a_block_that_is_not_built_divides_nothing():
    config = small(mtp_num_layers=0, pattern="M", mtp_pattern="-E", ffn_hidden_size=5)
    n3.check_layout(config, 2, 3)


@pytest.mark.ranks(4)
def test_refusals_on_every_rank():
    """A wrong mesh, a token outside the vocabulary, copies that differ."""
    with pytest.raises(ValueError, match="tp=3 and ep=1 must both divide the 4 ranks"):
        n3.make_mesh(3, 1, ranks.device)
    with pytest.raises(ValueError, match="tp=1 and ep=8 must both divide the 4 ranks"):
        n3.make_mesh(1, 8, ranks.device)
    model = n3.ParallelNemotronLM(small(), mesh_of(2, 4)).to(ranks.device)
    tokens_BT, *_ = batch()
    if ranks.device.type == "cpu":
        with pytest.raises(ValueError, match=r"token id 61 is not in \[0, 61\)"):
            model(torch.full_like(tokens_BT, 61))
        # In a batch of all replicas, in the rows of one: no rank may wait for the one that raises.
        for place, value in ((0, 61), (1, -5)):
            wrong = [x.clone() for x in batch(4)]
            wrong[place][-1, -1] = value
            with pytest.raises(ValueError, match=rf"token id {value} is not in \[0, 61\)"):
                next(n3.train(model, torch.optim.SGD(model.parameters(), 0.1), [wrong]))
            assert not model.counts().any()
    model.final_norm.weight.data += dist.get_rank() == 3
    with pytest.raises(ValueError, match="final_norm.weight: rank 3's differs from rank 0's"):
        n3.gather_state_dict(model.state_dict(), model)


def test_nan_on_one_rank_alone_is_a_difference():
    """On all ranks it is none: a model that has diverged can be gathered."""
    x, nan = torch.zeros(16), torch.full((16,), torch.nan)
    mesh = n3.Mesh(tp=2, ep=2)
    with pytest.raises(ValueError, match="final_norm.weight: rank 1's differs from rank 0's"):
        n3.merge_tensor("final_norm.weight", [x, nan], small(), mesh)
    assert n3.merge_tensor("final_norm.weight", [nan, nan], small(), mesh).isnan().all()


@pytest.fixture
def flags_of(monkeypatch, capsys):
    def read(*words):
        monkeypatch.setattr("sys.argv", ["nemotron3.py", *map(str, words)])
        return n3.flags()

    return read


def test_flags(flags_of):
    args = flags_of("--ranks", 4)
    assert (args.tp, args.ep, args.layouts) == (2, 4, [(2, 4)])
    args = flags_of("--ranks", 3, "--num-experts", 6)
    assert (args.tp, args.ep) == (1, 1)
    configs = n3.configs_of(args)
    assert [config.pattern for config in configs.values()] == ["MEM*E", "MEM*EME"]
    assert configs["Nano in small"].moe_latent_size == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (("--ranks", 4, "--tp", 3), "--tp 3 and --ep 4 must both divide the 4 ranks"),
        (("--ranks", 4, "--tp", 4), "does not divide over tp=4 ranks"),
        (("--ranks", 4, "--ep", 4, "--num-experts", 6), "num_experts=6 does not divide over 4"),
        (("--pattern", "MQ"), "pattern='MQ'"),
        (("--data", "/nowhere"), "No such file"),
    ],
)
def test_wrong_flags_are_one_line(flags_of, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        flags_of(*words)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2


@pytest.mark.slow
def test_a_plain_start():
    done = scripts.forked(SCRIPT, "--ranks", "1", "--check")
    assert done.returncode == 0, done.stderr
    assert "gradient, tp 1 ep 1, layers.0" in done.stdout
