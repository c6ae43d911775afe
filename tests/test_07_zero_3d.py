# SPDX-License-Identifier: MIT-0
"""Chapter 7 equals the single device on every mesh, and its optimizer is torch's to the bit.

A test marked `ranks` runs on every rank of that world. References are the chapter's plain model,
which transformers' BLOOM holds, torch.optim, torch's device mesh, or formulas written out here.
"""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import zero_3d as z
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_tp import Counter
from proof import Events, Shows, assert_differs, assert_equal, plant, worst_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

SCRIPT = Path(z.__file__)
MESHES = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)]
EIGHT = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1)]
EIGHT += [(1, 4, 2), (1, 2, 4), (1, 1, 8)]
TIED = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
LR = 1e-2


# ── Helpers ─────────────────────────────────────────────────────────────────────────────────────


def config(**changes) -> z.GPTConfig:
    sizes = {"vocab_size": 61, "num_layers": 3, "hidden_size": 32, "num_heads": 4}
    return z.GPTConfig(**(sizes | changes))


@cache
def mesh_of(tp: int, pp: int, dp: int, sp: bool = True) -> z.ParallelMesh:
    return z.make_mesh(tp, pp, dp, ranks.device, sp=sp)


def batch_of(rows: int = 8, length: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Replicas with unequal numbers of targets that count."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(61, (2, rows, length), generator=generator)
    targets_BS[0, 3:] = -100
    return tokens_BS.to(ranks.device), targets_BS.to(ranks.device)


def sgd(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, LR, momentum=0.9, weight_decay=0.01)


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, LR, betas=(0.9, 0.95), weight_decay=0.01)


def build(cfg, mesh, make=adamw, dtype=torch.float64, elements: int = 500, **options):
    """A stage and its sharded optimizer, with several buckets."""
    stage = z.Stage(cfg, mesh, **options).to(ranks.device, dtype)
    alone = [] if cfg.untied else ["embedding.weight"]
    buffer = z.ParamAndGradBuffer(stage.named_parameters(), mesh.dp_group, elements, alone)
    return stage, z.DistributedOptimizer(buffer, make)


def plain_and_optimizer(cfg, make=adamw, dtype=torch.float64):
    plain = z.GPT(cfg).to(ranks.device, dtype)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    return plain, make([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])


def everyone(mine) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def shards_of(tensors: dict) -> list[dict]:
    """Every rank's tensors, on the CPU. Those of a rank have one dtype: they travel as one."""
    flat = torch.cat([x.detach().flatten() for x in tensors.values()])
    shapes = {name: x.shape for name, x in tensors.items()}
    shards = []
    for its_flat, its_shapes in everyone((flat.cpu(), shapes)):
        parts = its_flat.split([shape.numel() for shape in its_shapes.values()])
        pairs = zip(its_shapes.items(), parts)
        shards.append({name: x.view(shape) for (name, shape), x in pairs})
    return shards


def merged(tensors: dict, cfg, mesh) -> dict:
    return z.merge_state_dicts(shards_of(tensors), cfg, mesh)


def assert_merged(tensors: dict, expected: dict, cfg, mesh, floor: float = 0.0) -> None:
    """Merged and compared on rank 0."""
    shards = shards_of(tensors)
    if dist.get_rank() == 0:
        assert_equal(z.merge_state_dicts(shards, cfg, mesh), expected, floor=floor)


def full_grads(optimizer) -> dict:
    """Every element from the replica that owns it."""
    grads = {}
    for bucket in optimizer.buffer.buckets:
        bucket.start_all_gather(bucket.grad)
        bucket.wait()
        grads |= {name: p.main_grad for name, p in bucket.params.items()}
    return grads


def merged_grads(optimizer, cfg, mesh) -> dict:
    return merged(full_grads(optimizer), cfg, mesh)


def backward(stage, optimizer, batch, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Up to line 4 of a step: the loss, and the number of targets."""
    mesh = stage.mesh
    optimizer.buffer.zero_grad()
    tokens_BS, targets_BS = (x.chunk(mesh.dp)[mesh.dp_rank] for x in batch)
    loss = z.run_1f1b(stage, optimizer.buffer, tokens_BS, targets_BS, rows)
    count = z.finalize_model_grads(optimizer, mesh, (targets_BS != -100).sum())
    for group in (mesh.pp_group, mesh.dp_group):
        dist.all_reduce(loss, group=group)
    return loss / count, count


def reference(cfg, batch) -> tuple[Tensor, dict]:
    """Loss and gradients of the plain model."""
    plain = z.GPT(cfg).to(ranks.device, torch.float64)
    loss = plain.loss(*batch).sum() / (batch[1] != -100).sum().clamp(min=1)
    loss.backward()
    return loss.detach(), {name: p.grad.cpu() for name, p in plain.named_parameters()}


@cache
def five_steps_alone(sizes: tuple, make, rows: int, clip: float) -> tuple[Tensor, dict, dict]:
    """The plain model of config(**dict(sizes)), which rank 0 trains: loss and norm of each step.

    Also, on rank 0 and on the CPU, the gradients of the first step and the last weights.
    """
    numbers_52 = torch.empty(5, 2, dtype=torch.float64, device=ranks.device)
    grads = weights = {}
    if dist.get_rank() == 0:
        plain, optimizer = plain_and_optimizer(config(**dict(sizes)), make)
        steps = z.train_alone(plain, optimizer, five_batches(rows), max_norm=clip)
        for step, (loss, norm) in enumerate(steps):
            numbers_52[step] = torch.stack([loss, norm])
            if step == 0:
                grads = {name: p.grad.cpu().clone() for name, p in plain.named_parameters()}
        weights = {name: x.cpu() for name, x in plain.state_dict().items()}
    dist.broadcast(numbers_52, 0)
    return numbers_52, grads, weights


def five_batches(rows: int) -> list[tuple[Tensor, Tensor]]:
    return [batch_of(rows, 8, seed) for seed in range(5)]


def prove(layout, untied: bool = False, sp: bool = True, recompute: bool = False) -> None:
    """Loss, norm and every gradient; weights after five steps of SGD and of AdamW."""
    mesh = mesh_of(*layout, sp)
    layers = 2 if mesh.pp == 1 else max(3, mesh.pp - 2)
    sizes = {"untied": untied, "num_heads": max(4, mesh.tp), "num_layers": layers}
    cfg = config(**sizes)
    rows = 8 if mesh.dp < 8 else 16
    for make in (sgd, adamw):
        numbers_52, grads, weights = five_steps_alone(tuple(sizes.items()), make, rows, 0.5)
        stage, optimizer = build(cfg, mesh, make, recompute=recompute)
        micro_batch = max(1, rows // mesh.dp // max(2, mesh.pp))
        steps = z.train(stage, optimizer, five_batches(rows), micro_batch, max_norm=0.5)
        for step, (expected, found) in enumerate(zip(numbers_52, steps)):
            names = ("loss", "norm")
            assert_equal(dict(zip(names, found)), dict(zip(names, expected)))
            assert expected[1] > 0.5  # so that clipping matters
            if step == 0:
                assert_merged(full_grads(optimizer), grads, cfg, mesh)
        assert_merged(stage.state_dict(), weights, cfg, mesh, floor=5 * LR)


# ── Equality on every mesh ──────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(4)
@TIED
@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_of_four(layout, untied):
    prove(layout, untied)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 2, 1), (2, 1, 2)], ids=str)
def test_without_sequence_parallelism(layout):
    prove(layout, sp=False)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_with_recomputation(layout):
    prove(layout, recompute=True)


@pytest.mark.slow
@pytest.mark.ranks(8, timeout=240)
@pytest.mark.parametrize("layout", EIGHT, ids=str)
def test_every_mesh_of_eight(layout):
    """Tied and untied."""
    prove(layout)
    prove(layout, untied=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_a_batch_in_which_nothing_counts(layout):
    mesh = mesh_of(*layout)
    stage, optimizer = build(config(), mesh)
    tokens_BS, targets_BS = batch_of(4)
    batches = [(tokens_BS, targets_BS.fill_(-100))]
    ((loss, norm),) = z.train(stage, optimizer, batches, 2)
    assert loss == 0 and norm == 0
    assert all(torch.isfinite(p).all() for p in stage.parameters())


@pytest.mark.ranks(4)
def test_micro_batches_change_nothing():
    """Also fewer micro-batches than stages."""
    mesh = mesh_of(1, 4, 1)
    expected, grads = reference(config(), batch_of())
    for rows in (1, 2, 4, 8):
        stage, optimizer = build(config(), mesh)
        loss, _ = backward(stage, optimizer, batch_of(), rows)
        assert_equal({"loss": loss}, {"loss": expected})
        assert_equal(merged_grads(optimizer, config(), mesh), grads)


def test_the_plain_model_is_bloom():
    """transformers' BLOOM with the same weights has the same logits, also for 6 heads."""
    transformers = pytest.importorskip("transformers")
    cfg = config(hidden_size=48, num_heads=6)
    plain = z.GPT(cfg).double()
    sizes = dict(n_layer=3, n_head=6, hidden_size=48, vocab_size=61, attention_dropout=0.0)
    options = transformers.BloomConfig(**sizes, hidden_dropout=0.0, layer_norm_epsilon=1e-5)
    bloom = transformers.BloomForCausalLM(options).double().eval()
    names = {"embedding": "word_embeddings", "embedding_norm": "word_embeddings_layernorm"}
    names |= {"layers": "h", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {"qkv": "self_attention.query_key_value", "out": "self_attention.dense"}
    names |= {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "final_norm": "ln_f"}
    weights = {}
    for name, x in plain.state_dict().items():
        x = x + 0.1 * torch.randn(x.shape, dtype=x.dtype)  # biases and norms matter, too
        weights[name] = x
    plain.load_state_dict(weights)
    theirs = {}
    for name, x in weights.items():
        theirs[".".join(names.get(part, part) for part in name.split("."))] = x
    bloom.transformer.load_state_dict(theirs)
    bloom.tie_weights()
    tokens_BS, _ = batch_of(2, 11)
    logits_BSV = bloom(tokens_BS.cpu()).logits
    # transformers adds slope · j, rounded to the model's dtype from fp32 slopes.
    assert_equal({"logits": plain(tokens_BS.cpu()).transpose(0, 1)}, {"logits": logits_BSV}, 1e-6)


# ── The mesh ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_the_mesh_is_torchs(layout):
    tp, pp, dp = layout
    mesh = mesh_of(*layout)
    theirs = init_device_mesh(ranks.device.type, (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    for name in ("tp", "pp", "dp"):
        ours = dist.get_process_group_ranks(getattr(mesh, f"{name}_group"))
        assert ours == dist.get_process_group_ranks(theirs.get_group(name))
        assert getattr(mesh, f"{name}_rank") == theirs.get_local_rank(name)
    places = (mesh.tp_rank, mesh.pp_rank, mesh.dp_rank)
    assert z.rank_of(mesh, *places) == dist.get_rank()
    pipeline = dist.get_process_group_ranks(mesh.pp_group)
    ends = sorted({pipeline[0], pipeline[-1]})
    is_end = dist.get_rank() in ends
    tied = dist.get_process_group_ranks(mesh.tied_group)
    assert tied == (ends if is_end else [dist.get_rank()])


def test_the_tensor_axis_is_the_fastest():
    mesh = z.ParallelMesh(4, 12, 8)  # BLOOM's
    places = [(t, p, d) for p in range(12) for d in range(8) for t in range(4)]
    assert [z.rank_of(mesh, *place) for place in places] == list(range(384))


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="one rank makes its groups in another order: both wait until the timeout, no loss",
    seen_in=None,
)
def test_groups_made_in_another_order():
    """Two groups of the same ranks: an all-reduce on each, in the order in which they were made."""
    first, second = (dist.new_group([0, 1], use_local_synchronization=False) for _ in range(2))
    order = [first, second] if dist.get_rank() == 0 else [second, first]
    x = torch.full((1,), float(dist.get_rank() + 1), device=ranks.device)
    work = dist.all_reduce(x, group=order[0], async_op=True)
    dist.barrier()  # in a third group: both have started
    time.sleep(0.2)
    assert not work.is_completed()  # neither meets the other
    dist.barrier()
    y = torch.zeros(1, device=ranks.device)
    other = dist.all_reduce(y, group=order[1], async_op=True)
    for each in (work, other):
        each.wait()
    assert x == dist.get_rank() + 1  # and then each meets another tensor
    return Shows(loss="never comes: hangs", gradients=None)


def test_blooms_stages():
    """72 units on 12 stages: 5, 6, ... 6, 5 layers; every layer once, in order."""
    placement = z.place_layers(70, 12)
    assert [len(layers) for layers in placement] == [5, *[6] * 10, 5]
    for layers in range(1, 20):
        for stages in range(1, layers + 3):
            placed = [i for part in z.place_layers(layers, stages) for i in part]
            assert placed == list(range(layers))
    with pytest.raises(ValueError, match="pp=6, but 3 layers, embedding and head are fewer units"):
        z.place_layers(3, 6)


# ── Buckets ─────────────────────────────────────────────────────────────────────────────────────


def toy(*sizes: int, dtype=torch.float32) -> dict[str, nn.Parameter]:
    """Parameters a, b, c ... of these sizes; every second one is a matrix."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for i, size in enumerate(sizes):
        x = torch.randn(size, generator=generator).to(ranks.device, dtype)
        found["abcdefgh"[i]] = nn.Parameter(x[None] if i % 2 else x)
    return found


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    elements=st.integers(1, 90),
    alone=st.sets(st.sampled_from("abcdefgh")),
)
def test_every_parameter_is_in_one_bucket(sizes, elements, alone):
    params = toy(*sizes)
    buckets = z.split_into_buckets(params, elements, alone)
    assert [name for bucket in buckets for name in bucket] == list(reversed(params))
    for bucket in buckets[:-1]:
        filled = sum(p.numel() for p in bucket.values()) >= elements
        following = buckets[buckets.index(bucket) + 1]
        assert filled or alone & (bucket.keys() | following.keys())
    for bucket in buckets:
        assert len(bucket) == 1 or not alone & bucket.keys()


@settings(deadline=None, max_examples=60)
@given(elements=st.integers(1, 10_000), dp=st.integers(1, 64))
def test_padding_is_less_than_a_rank_each(elements, dp):
    length = z.padded_length(elements, dp)
    assert length % dp == 0 and 0 <= length - elements < dp


def test_parameters_are_views_of_their_bucket():
    params = toy(3, 4, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in params.items()}
    bucket = z.Bucket(params)
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    bucket.data.fill_(2)
    assert all((p == 2).all() for p in params.values())
    assert bucket.grad.dtype == torch.float32
    bucket.grad.fill_(3)
    assert all((p.main_grad == 3).all() and p.main_grad.shape == p.shape for p in params.values())


@pytest.mark.ranks(2)
def test_a_bucket_starts_while_backward_runs():
    """The order of events in the last backward: a reduce-scatter before the last GEMMs."""
    mesh = mesh_of(1, 1, 2)
    stage, optimizer = build(config(), mesh, elements=1)
    buffer = optimizer.buffer
    tokens_BS, targets_BS = batch_of(2)
    loss = stage(tokens_BS, targets_BS)
    with Events() as first:
        loss.backward()
    assert "reduce_scatter" not in first.order  # not the last micro-batch
    loss = stage(tokens_BS, targets_BS)
    buffer.is_last_microbatch = True
    with Events() as events:
        loss.backward()
        begun = len(events.order)
        buffer.finish_reduce_scatter()
    during = events.order[:begun]
    assert "wait" not in during
    assert during.count("reduce_scatter") == len(buffer.buckets)
    last_product = len(during) - 1 - during[::-1].index("product")
    assert during[:last_product].count("reduce_scatter") > len(buffer.buckets) // 2


@pytest.mark.ranks(2)
def test_buckets_start_in_one_order():
    """Gradients complete in another order on each rank, and one parameter gets none on rank 1."""
    params = toy(5, 4, 3)
    buffer = z.ParamAndGradBuffer(params.items(), dist.group.WORLD, elements=1)
    buffer.is_last_microbatch = True
    order = "abc" if dist.get_rank() == 0 else "ca"
    for name in order:
        (params[name].sum() * (dist.get_rank() + 1)).backward()
    buffer.finish_reduce_scatter()
    for bucket in buffer.buckets:
        (name,) = bucket.params
        expected = {"a": 3.0, "b": 1.0, "c": 3.0}[name]
        begin, end = dist.get_rank() * len(bucket.grad) // 2, params[name].numel()
        shard = bucket.shard(bucket.grad)[: max(0, end - begin)]
        assert (shard == expected).all()


def test_a_frozen_parameter_stays_out():
    params = toy(5, 4)
    params["a"].requires_grad_(False)
    buffer = z.ParamAndGradBuffer(params.items())
    assert [list(bucket.params) for bucket in buffer.buckets] == [["b"]]
    assert not hasattr(params["a"], "main_grad")


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("how", ["two backwards", "reentrant"])
def test_a_gradient_after_its_reduce_scatter_is_refused(how):
    """Nothing is added, and the next step is right."""
    params = toy(5, 4)
    buffer = z.ParamAndGradBuffer(params.items(), dist.group.WORLD, elements=1)

    def loss() -> Tensor:
        return params["a"].sum() + params["b"].sum()

    def twice() -> Tensor:
        x = torch.ones((), requires_grad=True, device=ranks.device)
        for _ in range(2):
            x = checkpoint(lambda x: x * loss(), x, use_reentrant=True)
        return x

    def wait() -> dict[str, Tensor]:
        for bucket in buffer.buckets:
            bucket.wait()
        return {name: p.main_grad.clone() for name, p in params.items()}

    buffer.is_last_microbatch = True
    if how == "two backwards":
        loss().backward()
    before = wait()
    late = "b got another gradient after its reduce-scatter .* before the last backward alone"
    with pytest.raises(RuntimeError, match=late):
        (loss if how == "two backwards" else twice)().backward()
    after = wait()
    assert how == "reentrant" or all(torch.equal(after[name], x) for name, x in before.items())
    buffer.zero_grad()
    loss().backward()
    assert all((p.main_grad == 1).all() and p.grad is None for p in params.values())


def test_a_gradient_from_before_is_of_no_step():
    """A warm-up backward, and only then the buffer."""
    params = toy(5, 4)
    (params["a"].sum() + params["b"].sum()).backward()
    buffer = z.ParamAndGradBuffer(params.items())
    buffer.is_last_microbatch = True
    (params["a"].sum() + params["b"].sum()).backward()
    buffer.finish_reduce_scatter()
    assert all((p.main_grad == 1).all() for p in params.values())


def test_a_name_or_a_parameter_that_is_there_twice_is_refused():
    a, b = toy(5, 4), toy(3)
    with pytest.raises(ValueError, match="two parameters have the name a: give each"):
        z.ParamAndGradBuffer([*a.items(), *b.items()])
    assert not hasattr(a["a"], "main_grad")  # nothing was changed
    with pytest.raises(ValueError, match="b is in a bucket already"):
        z.ParamAndGradBuffer([("b", b["a"]), ("c", b["a"])])
    z.ParamAndGradBuffer([("a", a["a"])])
    with pytest.raises(ValueError, match="a is in a bucket already"):
        z.ParamAndGradBuffer(a.items())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_stage(frozen):
    """Norm and weights of the other stage are the plain model's; frozen ones keep their values."""
    cfg, mesh = config(untied=True), mesh_of(1, 2, 1)
    plain = z.GPT(cfg).to(ranks.device, torch.float64)
    stage = z.Stage(cfg, mesh).to(ranks.device, torch.float64)
    for name, p in plain.named_parameters():
        p.requires_grad_(z.stages_of(name, cfg, 2) != [frozen])
    stage.requires_grad_(mesh.pp_rank != frozen)
    batches = five_batches(4)
    trained = [p for p in plain.parameters() if p.requires_grad]
    alone = z.train_alone(plain, torch.optim.SGD(trained, LR), batches)
    buffer = z.ParamAndGradBuffer(stage.named_parameters(), mesh.dp_group)
    optimizer = z.DistributedOptimizer(buffer, lambda groups: torch.optim.SGD(groups, LR))
    for here, there in zip(z.train(stage, optimizer, batches, 2), alone):
        torch.testing.assert_close(torch.stack(here), torch.stack(there), rtol=1e-12, atol=0)
    mine = z.shard_state_dict(plain.state_dict(), cfg, mesh)
    for name, p in stage.named_parameters():
        torch.testing.assert_close(p.detach(), mine[name], rtol=1e-9, atol=1e-12)


@pytest.mark.ranks(2)
def test_gradients_travel_in_fp32_and_parameters_in_bf16():
    mesh = mesh_of(1, 1, 2)
    stage, optimizer = build(config(), mesh, dtype=torch.bfloat16)
    list(z.train(stage, optimizer, [batch_of()], 2))
    with Counter() as counter:
        list(z.train(stage, optimizer, [batch_of()], 2))
    lengths = [len(bucket.data) for bucket in optimizer.buffer.buckets]
    scattered = [m.bytes for m in counter.messages if m.op.startswith("reduce_scatter")]
    gathered = [m.bytes for m in counter.messages if m.op.startswith("all_gather")]
    assert scattered == [4 * length for length in lengths]
    assert gathered == [2 * length for length in lengths]


def accumulated(dtype: torch.dtype, m: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of m bf16 gradients in `dtype`, the exact one, and the sum of absolute values."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    buffer = z.ParamAndGradBuffer([("p", p)])
    if dtype == torch.bfloat16:
        p.main_grad = p.main_grad.to(dtype)
    exact = torch.zeros(20_000, dtype=torch.float64)
    size = torch.zeros(20_000, dtype=torch.float64)
    for _ in range(m):
        g = (torch.randn(20_000, generator=generator) * 1e-3 + 2e-4).to(torch.bfloat16)
        (p * g).sum().backward()
        exact += g.double()
        size += g.double().abs()
    assert buffer.buckets[0].grad.dtype == torch.float32
    return p.main_grad.double(), exact, size


def test_fp32_accumulation():
    """Within (m − 1) · 2⁻²⁴ · Σ|gᵢ| of the exact sum, element by element."""
    found, exact, size = accumulated(torch.float32)
    assert ((found - exact).abs() <= 127 * 2.0**-24 * size).all()
    assert (found - exact).norm() / exact.norm() < 1e-7


@pytest.mark.planted_bug(
    symptom="the sum of 128 micro-batches is off by a per cent: it outgrows what is added to it",
    seen_in="https://github.com/microsoft/DeepSpeed/issues/2768",
)
def test_bf16_accumulation():
    found, exact, size = accumulated(torch.bfloat16)
    assert ((found - exact).abs() > 127 * 2.0**-24 * size).any()
    error = ((found - exact).norm() / exact.norm()).item()
    assert 5e-3 < error < 5e-2
    return Shows(loss="right to the bit", gradients=error)


# ── The sharded optimizer ───────────────────────────────────────────────────────────────────────


def stepped(sizes, dtype, make, steps: int = 3) -> None:
    """Given equal gradients: parameters, masters and torch's own optimizer are equal to the bit."""
    params = toy(*sizes, dtype=dtype)
    alone = toy(*sizes, dtype=dtype)
    masters = {name: z.at_least_fp32(p.detach()).clone() for name, p in alone.items()}
    matrices = [p for p in masters.values() if p.ndim > 1]
    vectors = [p for p in masters.values() if p.ndim == 1]
    theirs = make([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    buffer = z.ParamAndGradBuffer(params.items(), dist.group.WORLD, elements=10)
    ours = z.DistributedOptimizer(buffer, make)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["lr"] = LR / (step + 1)
        for name, p in params.items():
            grad = torch.randn(p.shape, generator=generator).to(p.main_grad)
            p.main_grad.copy_(grad)
            masters[name].grad = grad
        ours.step()
        theirs.step()
        for name, p in params.items():
            assert torch.equal(p, masters[name].to(dtype)), (name, step)
    for piece in ours.pieces:
        flat = masters[piece.name].flatten()[piece.start : piece.start + len(piece.master)]
        assert torch.equal(piece.master, flat)


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 5, 11, 3), (1,), (3,), (97, 2, 1, 1, 64)], ids=str)
def test_the_optimizer_is_torchs_to_the_bit(sizes, dtype, make):
    """No size divides; (1,) and (3,) leave shards of nothing but padding."""
    stepped(sizes, dtype, make)


@pytest.mark.ranks(4)
def test_pieces_cover_every_element_once():
    params = toy(7, 5, 11, 3)
    buffer = z.ParamAndGradBuffer(params.items(), dist.group.WORLD, elements=10)
    pieces = z.DistributedOptimizer(buffer, sgd).pieces
    mine = [(piece.name, piece.start + i) for piece in pieces for i in range(len(piece.master))]
    found = sorted(element for one in everyone(mine) for element in one)
    assert found == sorted((name, i) for name, p in params.items() for i in range(p.numel()))


@pytest.mark.ranks(4)
def test_bytes_of_a_rank():
    """Optimizer state of 12·P/dp bytes, with less than dp elements of padding a bucket."""
    mesh = mesh_of(1, 1, 4)
    stage, optimizer = build(config(), mesh, dtype=torch.bfloat16)
    optimizer.step()
    P = sum(p.numel() for p in stage.parameters())
    sizes = [z.state_bytes(optimizer)]
    assert sum(everyone(z.state_bytes(optimizer))) == 12 * P
    assert max(sizes) <= 1.02 * 12 * P / 4


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="a rank whose shard is all padding skips the all-gather; the others wait for it",
    seen_in="https://github.com/inclusionAI/AReaL/issues/512",
)
def test_a_rank_with_an_empty_shard_that_skips():
    """It is refused in time: the timeout of the group ends the wait."""
    mesh = z.make_mesh(1, 1, 2, ranks.device, timeout=2.0)
    buffer = z.ParamAndGradBuffer(toy(1).items(), mesh.dp_group)
    optimizer = z.DistributedOptimizer(buffer, sgd)
    assert len(optimizer.pieces) == (1 if dist.get_rank() == 0 else 0)
    optimizer.step()  # as it should be
    begin = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert time.monotonic() - begin < 20
    dist.barrier()
    return Shows(loss="never comes: hangs, then an error", gradients=None)


def test_the_settings_are_the_papers():
    stage = z.Stage(config(), z.ParallelMesh())
    optimizer = z.make_training(stage, 6e-5)
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    for group in (matrices, vectors):
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["lr"] == 6e-5
    assert matrices["weight_decay"] > 0 == vectors["weight_decay"]
    assert sum(x.numel() for x in vectors["params"]) == sum(
        p.numel() for p in stage.parameters() if p.ndim == 1
    )


@pytest.mark.planted_bug(
    symptom="in bf16 without masters every LayerNorm weight stays exactly 1.0; the loss falls",
    seen_in="https://github.com/NVIDIA/apex/issues/1728",
)
def test_no_fp32_masters():
    """300 steps at 1e-3; the loss is hardly higher than with masters."""
    cfg = config(vocab_size=256, num_layers=1, hidden_size=32)
    text = torch.tensor(list(SCRIPT.read_bytes()))
    found = {}
    for masters in (True, False):
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(300):
            start_B1 = torch.randint(len(text) - 40, (8, 1), generator=generator)
            window_BS = text[start_B1 + torch.arange(25)]
            batches.append((window_BS[:, :-1], window_BS[:, 1:]))
        if masters:
            model = z.Stage(cfg, z.ParallelMesh()).bfloat16()
            steps = z.train(model, z.make_training(model, 1e-3), batches, 8)
        else:
            model = z.GPT(cfg).bfloat16()
            steps = z.train_alone(model, z.make_optimizer(model, 1e-3), batches)
        at_start = z.ones(model)
        losses = torch.stack([loss for loss, _ in steps])
        found[masters] = losses[-30:].mean().item(), z.ones(model) / at_start, losses[0].item()
    (right, few, first), (loss, all_of_them, _) = found[True], found[False]
    assert all_of_them == 1.0 and few < 0.5
    assert loss < first - 1  # it falls, and looks fine
    assert abs(loss / right - 1) < 0.1
    return Shows(loss=loss / right - 1, gradients="norm weights frozen at 1.0")


# ── The end of a step ───────────────────────────────────────────────────────────────────────────


def errors_with(layout, cfg=None, sp: bool = True, **planted) -> tuple[float, float, float]:
    """Relative errors of loss, gradients and norm, where functions of the chapter are replaced."""
    cfg = cfg or config()
    mesh = mesh_of(*layout, sp)
    expected, grads = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    loss, _ = backward(stage, optimizer, batch_of())
    norm = z.clip_grad_norm_(optimizer, 1e9, mesh)
    found = merged_grads(optimizer, cfg, mesh)
    total = nn.utils.get_total_norm(list(grads.values()))
    gap = abs(norm.item() / total.item() - 1)
    return worst_of({"loss": loss}, {"loss": expected}), worst_of(found, grads), gap


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", [(2, 1, 2), (1, 2, 2), (2, 2, 1)], ids=str)
def test_without_a_planted_bug(layout):
    """What the tests below compare with."""
    assert max(errors_with(layout)) < 1e-12


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="the loss falls; the embeddings of first and last stage get wrong sums, and drift",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/844",
)
def test_tied_embedding_on_misaligned_shards():
    """All of main_grad is summed over the pair: right only if both own the same elements of it."""
    cfg = config(vocab_size=600, hidden_size=8, num_heads=2)  # the shard boundary lies inside of it
    mesh = mesh_of(1, 2, 2)
    expected, grads = reference(cfg, batch_of())

    def gradients(alone) -> tuple[Tensor, dict]:
        stage = z.Stage(cfg, mesh).double()
        buffer = z.ParamAndGradBuffer(stage.named_parameters(), mesh.dp_group, 10**6, alone)
        buffer.alone = set()  # the sum below takes the place of line 3
        optimizer = z.DistributedOptimizer(buffer, adamw)
        buffer.zero_grad()
        tokens_BS, targets_BS = (x.chunk(2)[mesh.dp_rank] for x in batch_of())
        loss = z.run_1f1b(stage, buffer, tokens_BS, targets_BS, 2)
        count = z.finalize_model_grads(optimizer, mesh, (targets_BS != -100).sum())
        dist.all_reduce(stage.embedding.weight.main_grad, group=mesh.tied_group)
        for bucket in buffer.buckets:
            bucket.start_all_gather(bucket.grad)
            bucket.wait()
        found = {name: p.main_grad for name, p in stage.named_parameters()}
        for group in (mesh.pp_group, mesh.dp_group):
            dist.all_reduce(loss, group=group)
        return loss / count, found

    right = gradients(["embedding.weight"])[1]
    assert_equal({"e": right["embedding.weight"]}, {"e": grads["embedding.weight"]})
    loss, wrong = gradients([])
    assert_equal({"loss": loss}, {"loss": expected})
    here = worst_of({"e": wrong["embedding.weight"]}, {"e": grads["embedding.weight"]})
    error = max(everyone(here))
    assert error > 0.1
    return Shows(loss=0.0, gradients=error)


@pytest.mark.ranks(2, 4)
@pytest.mark.planted_bug(
    symptom="the buffer is padded once at its end: a bucket that dp does not divide is refused",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/561",
)
def test_the_whole_buffer_is_padded():
    with plant(z, "padded_length", lambda elements, dp: elements):
        buffer = z.ParamAndGradBuffer(toy(7, 5).items(), dist.group.WORLD, elements=1)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        buffer.finish_reduce_scatter()
    dist.barrier()
    return Shows(loss="never comes: an error", gradients=None)


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="replicated parameters count tp times in the norm, so clipping bites too early",
    seen_in="https://github.com/NVIDIA-NeMo/RL/issues/3788",
)
def test_norm_that_counts_replicated_parameters_tp_times():
    mesh, cfg = mesh_of(4, 1, 1), config()
    _, grads = reference(cfg, batch_of())
    total = nn.utils.get_total_norm(list(grads.values())).item()
    stage, optimizer = build(cfg, mesh)
    backward(stage, optimizer, batch_of())
    right = z.clip_grad_norm_(optimizer, 1e9, mesh)
    with plant(z, "shard_dim", lambda name: 0):
        norm = z.clip_grad_norm_(optimizer, 1e9, mesh)
    assert abs(right / total - 1) < 1e-12 and norm / total - 1 > 1e-3
    return Shows(loss=0.0, gradients=norm.item() / total - 1)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the tied weight counts on both of its stages, so clipping bites too early",
    seen_in=None,
)
def test_norm_that_counts_the_tied_weight_twice():
    mesh, cfg = mesh_of(1, 2, 1), config()
    _, grads = reference(cfg, batch_of())
    total = nn.utils.get_total_norm(list(grads.values())).item()
    stage, optimizer = build(cfg, mesh)
    backward(stage, optimizer, batch_of())
    optimizer.buffer.alone = set()
    norm = z.clip_grad_norm_(optimizer, 1e9, mesh)
    assert norm / total - 1 > 1e-2
    return Shows(loss=0.0, gradients=norm.item() / total - 1)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the gradient is reduced at every backward: earlier micro-batches are overwritten",
    seen_in="https://github.com/microsoft/DeepSpeed/issues/1263",
)
def test_only_the_last_micro_batch_counts():
    def overwrite(self, bucket, name, p):
        p.main_grad.zero_()
        right(self, bucket, name, p)

    with plant(z.ParamAndGradBuffer, "_accumulate", overwrite) as right:
        loss, gradients, _ = errors_with((1, 1, 2))
    assert loss < 1e-12 and gradients > 0.1
    return Shows(loss=loss, gradients=gradients)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="buckets start at the first micro-batch: later ones are added to one shard's sum alone",
    seen_in="https://github.com/allenai/open-instruct/issues/1498",
)
def test_a_bucket_that_starts_too_early():
    def early(self, bucket, name, p):
        self.is_last_microbatch = True
        right(self, bucket, name, p)

    def unchecked(self, bucket, name, p):
        p.main_grad.add_(p.grad)
        p.grad = None
        bucket.missing.discard(name)
        while self.waiting and not self.waiting[0].missing:
            self.waiting.popleft().start_reduce_scatter()

    with plant(z.ParamAndGradBuffer, "_accumulate", early) as right:
        with pytest.raises(RuntimeError, match="got another gradient after its reduce-scatter"):
            errors_with((1, 1, 2))
    with plant(z.ParamAndGradBuffer, "_accumulate", unchecked):
        loss, gradients, _ = errors_with((1, 1, 2))
    assert loss < 1e-12 and gradients > 0.1
    return Shows(loss=loss, gradients=gradients)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="norm weights have one rank's gradient: copies drift apart from the first step on",
    seen_in="https://github.com/NVIDIA/Megatron-LM/issues/1446",
)
def test_partial_gradients_are_not_summed_over_tp():
    mesh, cfg = mesh_of(2, 1, 1), config()
    expected, grads = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    with plant(z, "shard_dim", lambda name: 0):  # no parameter is replicated
        loss, _ = backward(stage, optimizer, batch_of())
    with pytest.raises(ValueError, match="differ between ranks: is a sum missing"):
        merged_grads(optimizer, cfg, mesh)
    name = "final_norm.weight"
    error = worst_of({name: stage.final_norm.weight.main_grad}, {name: grads[name]})
    assert error > 0.1
    return Shows(loss=worst_of({"": loss}, {"": expected}), gradients=error)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="complete gradients are summed over tp: tp times too large, which AdamW hides",
    seen_in=None,
)
def test_complete_gradients_are_summed_over_tp():
    mesh, cfg = mesh_of(2, 1, 1, False), config()
    expected, grads = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    loss, _ = backward(stage, optimizer, batch_of())
    for piece in optimizer.pieces:
        if z.shard_dim(piece.name) is None:
            dist.all_reduce(piece.master.grad, group=mesh.tp_group)
    error = worst_of(merged_grads(optimizer, cfg, mesh), grads)
    assert abs(error - 1) < 1e-10
    return Shows(loss=worst_of({"": loss}, {"": expected}), gradients=error)


def clipped_norms(order: str) -> tuple[float, float]:
    """The norm before clipping, and that of the clipped gradient; lines 4 and 5 in some order."""
    mesh, cfg = mesh_of(2, 1, 1), config()
    stage, optimizer = build(cfg, mesh)
    optimizer.buffer.zero_grad()
    tokens_BS, targets_BS = batch_of()
    z.run_1f1b(stage, optimizer.buffer, tokens_BS, targets_BS, 2)
    count = (targets_BS != -100).sum()
    if order == "norm, sum, count":
        norm = z.clip_grad_norm_(optimizer, 0.5, mesh)
        z.finalize_model_grads(optimizer, mesh, count)
    elif order == "sum, norm, count":
        z.finalize_model_grads(optimizer, mesh, torch.ones_like(count))
        norm = z.clip_grad_norm_(optimizer, 0.5, mesh)
        for bucket in optimizer.buffer.buckets:
            bucket.grad.div_(count)
    else:
        z.finalize_model_grads(optimizer, mesh, count)
        norm = z.clip_grad_norm_(optimizer, 0.5, mesh)
    return norm.item(), z.clip_grad_norm_(optimizer, 1e9, mesh).item()


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="the norm is that of partial sums, or of a sum over tokens: steps are clipped wrongly",
    seen_in=None,
)
def test_lines_that_may_not_be_swapped():
    _, grads = reference(config(), batch_of())
    total = nn.utils.get_total_norm(list(grads.values())).item()
    norm, clipped = clipped_norms("sum, count, norm")
    assert abs(norm / total - 1) < 1e-12 and abs(clipped / 0.5 - 1) < 1e-5
    norm_of_sum, clipped = clipped_norms("sum, norm, count")
    assert norm_of_sum / total > 10 and clipped < 0.1  # as many times as there are tokens
    norm_of_parts, _ = clipped_norms("norm, sum, count")
    assert abs(norm_of_parts / norm_of_sum - 1) > 1e-6  # both of sums over tokens
    return Shows(loss=0.0, gradients=norm_of_sum / total - 1)


@pytest.mark.ranks(2)
def test_sums_may_be_swapped():
    """Lines 1 to 3 are linear: the tied sum before the reduce-scatter gives the same."""
    mesh, cfg = mesh_of(1, 2, 1), config()
    stage, optimizer = build(cfg, mesh)
    _, grads = reference(cfg, batch_of())
    buffer = optimizer.buffer
    buffer.zero_grad()
    tokens_BS, targets_BS = batch_of()
    z.run_1f1b(stage, buffer, tokens_BS, targets_BS, 2)
    dist.all_reduce(stage.embedding.weight.main_grad, group=mesh.tied_group)
    buffer.alone = set()
    z.finalize_model_grads(optimizer, mesh, (targets_BS != -100).sum())
    assert_equal(merged_grads(optimizer, cfg, mesh), grads)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="padding counts in the norm: harmless as long as it is zero, and nothing keeps it so",
    seen_in=None,
)
def test_padding_in_the_norm():
    """The chapter's norm sees no padding; that of whole shards does. In training it is zero."""
    mesh, cfg = mesh_of(1, 1, 2), config(vocab_size=61, hidden_size=20)
    stage, optimizer = build(cfg, mesh, elements=1)
    list(z.train(stage, optimizer, [batch_of()] * 2, 2))
    backward(stage, optimizer, batch_of())
    right = z.clip_grad_norm_(optimizer, 1e9, mesh)
    padded = 0
    for bucket in optimizer.buffer.buckets:
        end = sum(p.numel() for p in bucket.params.values())
        assert (bucket.data[end:] == 0).all() and (bucket.grad[end:] == 0).all()
        bucket.grad[end:] = 1.0
        padded += len(bucket.grad) - end
    if padded == 0:  # 20 · 61 is even: make an odd bucket
        extra = z.Bucket({"odd": nn.Parameter(torch.zeros(3, dtype=torch.float64))}, mesh.dp_group)
        extra.grad[3:] = 1.0
        optimizer.buffer.buckets.append(extra)
    assert z.clip_grad_norm_(optimizer, 1e9, mesh) == right
    total = torch.zeros((), dtype=torch.float64)
    for bucket in optimizer.buffer.buckets:
        total += bucket.shard(bucket.grad).square().sum()
    dist.all_reduce(total)
    assert total.sqrt() / right - 1 > 1e-3
    return Shows(loss=0.0, gradients=(total.sqrt() / right - 1).item())


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="a mean of means: tokens of the replica that has fewer of them weigh more",
    seen_in="https://github.com/huggingface/transformers/issues/34191",
)
def test_each_replica_divides_by_its_own_count():
    mesh, cfg = mesh_of(1, 1, 2), config()
    expected, grads = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    optimizer.buffer.zero_grad()
    tokens_BS, targets_BS = (x.chunk(2)[mesh.dp_rank] for x in batch_of())
    count = (targets_BS != -100).sum()
    loss = z.run_1f1b(stage, optimizer.buffer, tokens_BS, targets_BS, 4) / count / 2
    for bucket in optimizer.buffer.buckets:
        bucket.wait()
        bucket.grad.zero_()
    optimizer.buffer.zero_grad()
    (stage(tokens_BS, targets_BS) / count / 2).backward()
    z.finalize_model_grads(optimizer, mesh, torch.zeros_like(count))
    dist.all_reduce(loss, group=mesh.dp_group)
    found = merged_grads(optimizer, cfg, mesh)
    assert_differs(found, grads, 1e-3)
    return Shows(loss=worst_of({"": loss}, {"": expected}), gradients=worst_of(found, grads))


# ── The model on a mesh ─────────────────────────────────────────────────────────────────────────


def test_slopes_of_any_number_of_heads():
    """Exact, for 112 as in BLOOM; and the paper's 8."""
    assert torch.equal(z.alibi_slopes(8), 2.0 ** -torch.arange(1, 9, dtype=torch.float64))
    slopes = z.alibi_slopes(112)
    exponents = [i / 8 for i in range(1, 65)] + [i / 16 for i in range(1, 96, 2)]
    expected = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
    assert_equal({"slopes": slopes}, {"slopes": expected}, 1e-15)
    assert slopes[63] == 2.0**-8 and slopes[-1] == pytest.approx(2 ** (-95 / 16), rel=1e-15)
    for heads in range(1, 40):
        found = z.alibi_slopes(heads)
        assert len(found) == heads and (found > 0).all() and len(set(found.tolist())) == heads


def test_transformers_has_the_same_slopes():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 4, 6, 16, 112):
        mask_BS = torch.ones(1, 5, dtype=torch.int64)
        theirs = bloom.build_alibi_tensor(mask_BS, heads, torch.float32)[:, 0]  # slope · j
        ours = z.alibi_slopes(heads)[:, None] * torch.arange(5)
        torch.testing.assert_close(ours.to(torch.float32), theirs, rtol=1e-6, atol=0)


def test_slope_times_j_is_the_same_model():
    """Softmax ignores a constant in each row."""
    bias_nSS = z.alibi_bias(
        config(hidden_size=36, num_heads=6),
        z.ParallelMesh(),
        9,
        torch.zeros(1, dtype=torch.float64),
    )
    scores_nSS = torch.randn(6, 9, 9, dtype=torch.float64)
    other_nSS = z.alibi_slopes(6)[:, None, None] * torch.arange(9)
    is_later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    ours = (scores_nSS + bias_nSS).softmax(-1)
    theirs = (scores_nSS + other_nSS).masked_fill(is_later, -torch.inf).softmax(-1)
    assert_equal({"weights": ours}, {"weights": theirs}, 1e-12)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_bias_is_sharded_by_heads(tp):
    like = torch.zeros(1, dtype=torch.float64)
    cfg = config(hidden_size=112, num_heads=112)
    full_NSS = z.alibi_bias(cfg, z.ParallelMesh(), 5, like)
    meshes = [z.ParallelMesh(tp, tp_rank=rank) for rank in range(tp)]
    shards = [z.alibi_bias(cfg, mesh, 5, like) for mesh in meshes]
    assert torch.equal(torch.cat(shards), full_NSS)


@pytest.mark.ranks(2)
@pytest.mark.planted_bug(
    symptom="slopes of n heads in place of the model's N: another model, whose loss falls too",
    seen_in="https://github.com/flashinfer-ai/flashinfer/issues/1606",
)
def test_slopes_from_the_local_head_count():
    def local(cfg, mesh, S, like):
        few = replace(cfg, num_heads=cfg.num_heads // mesh.tp)
        return right(few, z.ParallelMesh(), S, like)

    mesh, cfg = mesh_of(2, 1, 1), config()
    expected, grads = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    with plant(z, "alibi_bias", local) as right:
        loss, _ = backward(stage, optimizer, batch_of())
    found = merged_grads(optimizer, cfg, mesh)
    assert_differs(found, grads, 1e-2)
    return Shows(loss=worst_of({"": loss}, {"": expected}), gradients=worst_of(found, grads))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.planted_bug(
    symptom="nothing at the start, where the bias is zero; then it is added tp times to each token",
    seen_in=None,
)
def test_embedding_norm_before_the_sum(sp):
    def too_early(self, tokens_SB):
        weight_vH = self.embedding.weight
        row_SB, is_local_SB = z.local_rows(tokens_SB, len(weight_vH), self.mesh)
        x_SBH = torch.where(is_local_SB[..., None], nn.functional.embedding(row_SB, weight_vH), 0)
        return z.leave_tp(self.embedding_norm(x_SBH), self.mesh)

    mesh, cfg = mesh_of(2, 1, 1, sp), config()
    plain = z.GPT(cfg).to(ranks.device, torch.float64)
    generator = torch.Generator().manual_seed(4)
    weights = dict(plain.state_dict())
    weights["embedding_norm.bias"] = torch.randn(32, generator=generator, dtype=torch.float64)
    plain.load_state_dict(weights)
    expected = plain.loss(*batch_of()).sum() / (batch_of()[1] != -100).sum()
    expected.backward()
    stage, optimizer = build(cfg, mesh)
    stage.load_state_dict(z.shard_state_dict(weights, cfg, mesh))
    right, _ = backward(stage, optimizer, batch_of())
    assert_equal({"loss": right}, {"loss": expected})
    with plant(z.Stage, "embed", too_early):
        loss, _ = backward(stage, optimizer, batch_of())
    error = worst_of({"": loss}, {"": expected})
    assert error > 1e-3
    return Shows(loss=error, gradients=None)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sp", [True, False])
def test_the_vocabulary_loss(sp):
    """61 entries on 2 ranks: one column is padding. Against torch's, with its gradient."""
    mesh = mesh_of(2, 1, 1, sp)
    generator = torch.Generator().manual_seed(2)
    logits_SBV = 30 * torch.randn(5, 3, 61, generator=generator, dtype=torch.float64)
    targets_SB = torch.randint(61, (5, 3), generator=generator)
    targets_SB[0, 0] = -100
    full = logits_SBV.clone().to(ranks.device).requires_grad_()
    padded = nn.functional.pad(logits_SBV, (0, 1), value=50.0)
    shard = padded.chunk(2, -1)[mesh.tp_rank].clone().to(ranks.device).requires_grad_()
    targets_SB = targets_SB.to(ranks.device)
    loss_SB = z.vocab_parallel_loss(shard, targets_SB, 61, mesh)
    expected = nn.functional.cross_entropy(
        full.flatten(0, 1), targets_SB.flatten(), reduction="none"
    )
    assert_equal({"loss": loss_SB.flatten()}, {"loss": expected})
    loss_SB.sum().backward()
    expected.sum().backward()
    grad = nn.functional.pad(full.grad, (0, 1)).chunk(2, -1)[mesh.tp_rank]
    assert_equal({"grad": shard.grad}, {"grad": grad})
    low = z.vocab_parallel_loss(shard.detach().bfloat16(), targets_SB, 61, mesh)
    assert low.dtype == torch.float32


@pytest.mark.ranks(4)
def test_a_stage_message_is_cut_over_tp():
    """With sp off each rank sends 1/tp of the replicated tensor; with sp its own tokens."""
    for sp in (False, True):
        mesh = mesh_of(2, 2, 1, sp)
        stage, optimizer = build(config(), mesh)
        with Counter() as counter:
            backward(stage, optimizer, batch_of())
        sent = [message.bytes for message in counter.messages if message.op == "send"]
        assert sent == [8 * 8 * 2 * 32 // 2] * 4  # of S · B · H float64 elements, half each


@pytest.mark.ranks(4)
@pytest.mark.planted_bug(
    symptom="messages are cut where sequence parallelism has sharded them: tokens are lost",
    seen_in=None,
)
def test_a_message_that_is_cut_twice():
    def cut_again(mesh, like, direction, send, receives):
        return right(replace(mesh, sp=False), like[: len(like) // 2], direction, send, receives)

    mesh, cfg = mesh_of(2, 2, 1), config()
    expected, _ = reference(cfg, batch_of())
    stage, optimizer = build(cfg, mesh)
    with plant(z, "exchange", cut_again) as right:
        loss, _ = backward(stage, optimizer, batch_of())
    error = worst_of({"": loss}, {"": expected})
    assert error > 1e-6
    return Shows(loss=error, gradients=None)


@pytest.mark.ranks(2)
def test_collectives_get_contiguous_tensors():
    """NCCL refuses others; gloo accepts them."""
    seen = []

    def demanding(name):
        original = getattr(z, name)

        def call(first, second, group):
            seen.append(name)
            assert first.is_contiguous() and second.is_contiguous(), name
            return original(first, second, group)

        return call

    for layout, sp in (((2, 1, 1), True), ((2, 1, 1), False), ((1, 1, 2), True)):
        stage, optimizer = build(config(), mesh_of(*layout, sp))
        with plant(z, "start_all_gather", demanding("start_all_gather")):
            with plant(z, "start_reduce_scatter", demanding("start_reduce_scatter")):
                list(z.train(stage, optimizer, [batch_of()], 2))
    assert len(set(seen)) == 2


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sp", [True, False])
def test_the_two_operators_are_conjugate(sp):
    """enter, then leave, is tp times the identity of replicated work; and so is its gradient."""
    mesh = mesh_of(2, 1, 1, sp)
    generator = torch.Generator().manual_seed(6)
    full = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64).to(ranks.device)
    x = (full.chunk(2)[mesh.tp_rank] if sp else full).clone().requires_grad_()
    inside = z.enter_tp(x, mesh)
    assert torch.equal(inside, full)
    factor = mesh.tp_rank + 1.0  # each rank does other work: partial sums
    y = z.leave_tp(inside * factor, mesh)
    assert_equal({"y": y}, {"y": 3 * x})
    y.square().sum().backward()
    assert_equal({"grad": x.grad}, {"grad": 2 * 9 * x})


@pytest.mark.slow
def test_a_block_compiles():
    """Under aot_eager, in one graph: output and gradients are eager's."""
    cfg = config()
    block = z.Block(cfg, z.ParallelMesh()).double()
    x_SBH = torch.randn(5, 3, 32, dtype=torch.float64)
    bias_nSS = z.alibi_bias(cfg, z.ParallelMesh(), 5, x_SBH)
    found = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        y_SBH = run(x_SBH, bias_nSS)
        y_SBH.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in block.named_parameters()}
        found.append({"y": y_SBH.detach()} | grads)
    assert_equal(found[1], found[0])


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", MESHES + EIGHT, ids=str)
@TIED
def test_shard_and_merge(layout, untied):
    """To the bit, for every rank of a mesh, without ranks."""
    cfg = config(untied=untied, num_heads=8, num_layers=6)
    full = {name: torch.randn(shape) for name, shape in z.parameter_shapes(cfg).items()}
    tp, pp, dp = layout
    shards = []
    for p in range(pp):
        for d in range(dp):
            for t in range(tp):
                mesh = z.ParallelMesh(tp, pp, dp, False, t, p, d)
                shards.append(z.shard_state_dict(full, cfg, mesh))
    back = z.merge_state_dicts(shards, cfg, z.ParallelMesh(*layout))
    assert back.keys() == full.keys()
    assert all(torch.equal(back[name], x) for name, x in full.items())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_initial_weights_do_not_depend_on_the_mesh(layout):
    mesh = mesh_of(*layout)
    stage = z.Stage(config(), mesh)
    full = merged(stage.state_dict(), config(), mesh)
    plain = z.GPT(config()).state_dict()
    assert all(torch.equal(full[name], x) for name, x in plain.items())


@pytest.mark.ranks(2)
def test_with_gloo_a_message_goes_through_the_memory_of_the_cpu():
    """gloo reads a GPU's address as its own process's. "meta" stands for the GPU's memory."""
    if ranks.backend != "gloo":
        pytest.skip("NCCL sends from GPU to GPU")
    mesh = mesh_of(1, 2, 1)
    if mesh.pp_rank == 0:
        x = torch.ones(3, device=ranks.device)
        z.exchange(mesh, x, +1, x, receives=False)
    else:
        device = ranks.device if ranks.device.type == "cuda" else "meta"
        like = torch.empty(3, device=device)
        assert z.exchange(mesh, like, -1, None, receives=True).device == like.device


def test_a_wrong_state_dict_is_refused():
    cfg = config()
    full = z.GPT(cfg).state_dict()
    missing = {name: x for name, x in full.items() if name != "final_norm.bias"}
    for wrong in (
        missing,
        full | {"extra": torch.ones(1)},
        full | {"final_norm.bias": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match="final_norm.bias|extra"):
            z.shard_state_dict(wrong, cfg, z.ParallelMesh())
    with pytest.raises(ValueError, match="2 state dicts, but the mesh has 1 ranks"):
        z.merge_state_dicts([full, full], cfg, z.ParallelMesh())
    other = {name: x + 1 for name, x in full.items()}
    with pytest.raises(ValueError, match="the copies of embedding.weight differ between ranks"):
        z.merge_state_dicts([full, other], cfg, z.ParallelMesh(dp=2))


def test_the_initial_weights_are_fixed():
    """Functions of the seed and the name, not of Python's hash."""
    x = z.initial_weight("layers.0.qkv.weight", torch.Size([2, 3]), config())
    generator = torch.Generator().manual_seed(zlib_crc("0 layers.0.qkv.weight"))
    assert torch.equal(x, 0.02 * torch.randn(2, 3, generator=generator))
    assert not torch.equal(
        x, z.initial_weight("layers.0.qkv.weight", torch.Size([2, 3]), config(seed=1))
    )


def zlib_crc(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ranks(2)
def test_a_mesh_that_does_not_multiply_to_the_ranks():
    with pytest.raises(ValueError, match="tp=2, pp=2, dp=1 do not multiply to the 2 ranks"):
        z.make_mesh(2, 2, 1, ranks.device)


@pytest.mark.ranks(2)
def test_what_does_not_divide_is_refused_before_any_message():
    mesh = mesh_of(2, 1, 1)
    with pytest.raises(ValueError, match="num_heads=3, tp=2"):
        z.Stage(config(hidden_size=33, num_heads=3), mesh)
    with pytest.raises(ValueError, match="hidden_size=33, num_heads=2"):
        z.Stage(config(hidden_size=33, num_heads=2), mesh)
    stage, optimizer = build(config(), mesh)
    for batch, message in (
        (batch_of(3), "a batch of 3: choose a multiple of micro_batch · dp = 2"),
        (batch_of(4, 7), "7 tokens do not divide over tp=2"),
    ):
        with Counter() as counter, pytest.raises(ValueError, match=message):
            list(z.train(stage, optimizer, [batch], 2))
        assert not counter.messages
    list(z.train(stage, optimizer, [batch_of(4)], 2))  # and it is as it was before


@pytest.mark.ranks(1)
def test_the_learning_rate_is_the_callers():
    """It is read at each step: the steps asked for are recorded."""
    mesh = mesh_of(1, 1, 1)
    stage, optimizer = build(config(), mesh)
    plain, optimizer_alone = plain_and_optimizer(config())
    batches = [batch_of(seed=seed) for seed in range(3)]
    alone = z.train_alone(plain, optimizer_alone, batches)
    steps = z.train(stage, optimizer, batches, 2)
    for lr in (1e-2, 3e-3, 1e-4):
        for group in [*optimizer.param_groups, *optimizer_alone.param_groups]:
            group["lr"] = lr
        next(alone), next(steps)
    assert_equal(stage.state_dict(), plain.state_dict(), floor=3e-2)


# ── The command ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=240)
def test_the_default_run():
    """All of it, with a small model, on the pool's ranks; the start of processes is below."""
    code, text = scripts.on_ranks(z, "--seq-length", 8, "--batch", 8, "--num-layers", 1)
    assert code == 0, text
    assert text.count("  ok") == 6 and "FAILED" not in text
    for layout in ("(2, 1, 2)", "(1, 2, 2)", "(2, 2, 1)"):
        assert layout in text


@pytest.mark.ranks(1)
@pytest.mark.parametrize("flags", [("--steps", 1), ("--lr", 1e-2, "--steps", 2)], ids=str)
def test_a_run_that_moves_no_weight_far_enough_does_not_fail(flags):
    """In bf16 a norm's weight leaves 1.0 after several steps of the default's size."""
    code, text = scripts.on_ranks(z, "--seq-length", 8, "--num-layers", 1, *flags)
    assert code == 0, text
    assert text.count("  ok") == 5 and text.count("needs the default run") == 1


def checked(*flags: str) -> None:
    code, text = scripts.on_ranks(z, "--check", "--dtype", "fp64", *flags)
    assert code == 0, text
    assert float(text.split("worst ")[1].split()[0]) < 1e-12


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=120)
def test_the_check_without_sequence_parallelism():
    checked("--no-sp")


@pytest.mark.slow
@pytest.mark.ranks(8, timeout=240)
def test_the_check_on_eight_ranks():
    checked()


@pytest.mark.slow
def test_the_check_starts_its_ranks():
    """Three processes of their own."""
    done = scripts.forked(SCRIPT, "--check", "--ranks", "3", timeout=240)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("worst ")[1].split()[0]) < 1e-12


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tp", "3"], "(tp, pp, dp) = (3, 1, 1): the product is not 4 ranks"),
        (["--tp", "4", "--num-heads", "2"], "num_heads=2, tp=4"),
        (["--pp", "4", "--num-layers", "1"], "pp=4, but 1 layers"),
        (["--dp", "4", "--batch", "6"], "a batch of 6: choose a multiple of micro_batch · dp = 8"),
        (["--tp", "4", "--seq-length", "6"], "6 tokens do not divide over tp=4"),
        (["--hidden-size", "30"], "hidden_size=30, num_heads=4"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zero_3d.py", "--ranks", "4", *flags])
    with pytest.raises(SystemExit) as stop:
        z.flags()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_failed_claim_fails_the_run():
    rows = [("a", "b", "c", True), ("a", "b", "c", False)]
    with plant(z, "claims", lambda args, found: rows), pytest.raises(SystemExit) as stop:
        with plant(z, "say_setting", print), plant(z, "over_all_ranks", dict):
            z.main(type("Args", (), {"check": False, "layouts": []})(), ranks.device)
    assert stop.value.code == 1
