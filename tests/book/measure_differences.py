# SPDX-License-Identifier: MIT-0
"""Is this difference normal? `make differences` measures how far right parallel runs lie from the
single device.

Each technique of the book, in each width of numbers, on 1, 2, 4 and 8 real ranks, from several
seeds: the first step's loss, norm and gradients, and the weights after five steps, beside the same
on one device. Two yardsticks say what the distance means: how far the single device itself is from
float64, and how far it moves when the rows of its batch are only put in another order. Planted bugs
are measured in the same way, for contrast.

Writes notebooks/results/00_differences.json; notebooks/00_is_this_difference_normal.ipynb draws and
explains it.
"""

import contextlib
import functools
import itertools
import json
import math
import random
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results" / "00_differences.json"
FOLDERS = [
    "tests",
    "tests/book",
    *sorted(path.parent.name for path in ROOT.glob("[0-9][0-9]_*/README.md")),
]
PATHS = [str(ROOT / folder) for folder in FOLDERS]
sys.path.extend(path for path in PATHS if path not in sys.path)

import ranks
from proof import plant

RANKS, SEEDS, STEPS = (1, 2, 4, 8), (0, 1, 2), 5
CPU = torch.device("cpu")

# What is compared. Of the first step: the loss, the gradient's norm, and each gradient; after five:
# each weight.
QUANTITIES = ("loss", "norm", "gradient", "SGD", "AdamW")

# How wide numbers are: the parameters, the products or None for the parameters' width, and half a
# step of the narrowest, relative to the number itself (the unit roundoff u).
Width = namedtuple("Width", "parameters autocast roundoff")
WIDTHS = {
    "fp64": Width(torch.float64, None, 2.0**-53),
    "fp32": Width(torch.float32, None, 2.0**-24),
    "bf16 autocast": Width(torch.float32, torch.bfloat16, 2.0**-8),
    "bf16": Width(torch.bfloat16, None, 2.0**-8),
    "fp8": Width(
        torch.float32, None, 2.0**-4
    ),  # E4M3; the experts' and the other products of the middle layers
}

OPTIMIZERS = {
    "SGD": lambda model, *_: torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    "AdamW": lambda model, *_: torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01
    ),
}
RATES = {"SGD": 0.01, "AdamW": 1e-3}


# ── One function a chapter: what of it is measured ────────────────────────────────────────────────


@dataclass
class Case:
    """A technique with a model and batches of one seed; parallel and together are for a rank, the
    rest for anybody."""

    chapter: object  # its module, in which the optimiser is exchanged
    batches: list
    plain: Callable[[], nn.Module]  # the single device's model
    alone: (
        Callable  # trains it: (model, batches, lr=, max_norm=, autocast=) yields (loss, norm, ...)
    )
    parallel: Callable[[], nn.Module]  # this rank's part
    together: Callable  # trains it, with the same arguments, from the same batches
    whole: Callable[[list[dict]], dict]  # all ranks' weights, or gradients, to the plain model's
    flip: Callable = lambda batch: tuple(x.flip(0) for x in batch)  # the same rows in reverse order
    cast: Callable = lambda batch, dtype: batch


@functools.cache
def grid_of(chapter, *arguments):
    """A chapter's grid, made once in a world: groups are never freed."""
    return chapter.make_grid(*arguments, CPU)


@functools.cache
def mesh_of(chapter, *arguments):
    """As `grid_of`."""
    return chapter.make_mesh(*arguments, CPU)


def optimizer_of(chapter, model, lr):
    optimizer = chapter.make_optimizer(model, lr(0))
    for group in optimizer.param_groups:  # those of OPTIMIZERS have a rate of 1
        group["lr"] = lr(0)
    return optimizer


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_first(shards: list[dict]) -> dict:
    """Replicas: all ranks hold all, and the same to the bit."""
    assert all(torch.equal(shard[name], x) for name, x in shards[0].items() for shard in shards), (
        "replicas differ"
    )
    return shards[0]


def rows_of_text(seed: int, rows: int, length: int, words: int = 61) -> list[tuple[Tensor, Tensor]]:
    """Batches of random words; some targets do not count, more in the first rows than in the
    last."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        tokens_BS, targets_BS = torch.randint(words, (2, rows, length), generator=generator)
        targets_BS[0, length // 2 :] = -100
        batches.append((tokens_BS, targets_BS))
    return batches


def data(seed: int) -> Case:
    """Chapter 1: each rank has some of 17 utterances, unequally many; BatchNorm over all of
    them."""
    import deepspeech as ds
    from utterances import small_batch

    rank, n = world()
    sizes = dict(num_layers=2, hidden_size=32, num_bins=12)
    convolutions = (3, (5, 5), (2, 2)), (4, (3, 3), (1, 2))
    config = ds.DeepSpeechConfig(**sizes, convolutions=convolutions, seed=seed)

    def optimizer_of(model, lr):
        optimizer = ds.make_optimizer(model, lr(0))
        for group in optimizer.param_groups:  # those of OPTIMIZERS have a rate of 1
            group["lr"] = lr(0)
        return optimizer

    def alone(model, batches, lr, **options):
        return ds.train_alone(model, optimizer_of(model, lr), batches, **options)

    def together(model, batches, lr, **options):
        group = _ring(ds) if n > 1 else None
        own = [batch.rows(range(rank, 17, n)) for batch in batches]
        return ds.train(model, optimizer_of(model, lr), own, None, group, **options)

    return Case(
        ds,
        [small_batch(17, config, STEPS * seed + step) for step in range(STEPS)],
        lambda: ds.DeepSpeech2(config),
        alone,
        lambda: ds.parallel_model(config),
        together,
        of_first,
        flip=lambda batch: batch.rows(range(16, -1, -1)),
        cast=lambda batch, dtype: batch.to(CPU, dtype),
    )


@functools.cache
def _ring(ds):
    return ds.make_group([list(range(dist.get_world_size()))], CPU, 60.0)


def tensor(seed: int, layers: int = 4, hidden: int = 64) -> Case:
    """Chapter 2: every layer sharded over the ranks; 61 vocabulary entries, which do not divide
    over them."""
    import megatron_tp as tp

    sizes = dict(vocab_size=61, seq_length=32, hidden_size=hidden, num_layers=layers, num_heads=8)
    config = tp.GPTConfig(**sizes, init_std=0.05, seed=seed)

    def alone(model, batches, lr, **options):
        return tp.train_alone(model, optimizer_of(tp, model, lr), batches, **options)

    def together(model, batches, lr, **options):
        mesh = mesh_of(tp, world()[1])
        return tp.train(model, optimizer_of(tp, model, lr), batches, mesh, **options)

    return Case(
        tp,
        rows_of_text(seed, 9, 32),
        lambda: tp.GPT(config),
        alone,
        lambda: tp.ParallelGPT(config),
        together,
        lambda shards: tp.merge_state_dicts(shards, config),
    )


def pipeline(seed: int) -> Case:
    """Chapter 3: a stage of the layers on each rank, 1F1B, eight micro-batches whatever the number
    of ranks."""
    import pipeline as pl

    rank, n = world()
    config = pl.GPTConfig(61, 8, 64, 8, 32, init_std=0.05, seed=seed)

    def optimizer_of(model, lr):
        optimizer = pl.make_optimizer(model, lr(0))
        for group in optimizer.param_groups:  # those of OPTIMIZERS have a rate of 1
            group["lr"] = lr(0)
        return optimizer

    def alone(model, batches, lr, **options):
        return pl.train_alone(model, optimizer_of(model, lr), batches, **options)

    def together(model, batches, lr, **options):
        table = pl.schedule("1f1b", n, 8)
        optimizer = optimizer_of(model, lr)
        return pl.train(model, optimizer, table, batches, mesh_of(pl, n), **options)

    return Case(
        pl,
        rows_of_text(seed, 9, 32),
        lambda: pl.GPT(config),
        alone,
        lambda: pl.PipelineStage(config, rank, n),
        together,
        lambda shards: pl.merge_state_dicts(shards, config),
    )


def sequence(seed: int) -> Case:
    """Chapter 4: tensor and sequence parallelism, attention computed once more in backward."""
    import megatron_tp as tp
    import seq_parallel as sp

    sizes = dict(vocab_size=61, seq_length=32, hidden_size=64, num_layers=4, num_heads=8)
    config = sp.GPTConfig(**sizes, init_std=0.05, seed=seed)

    def with_rate(train: Callable) -> Callable:
        def run(model, batches, lr, **options):
            optimizer = sp.make_optimizer(model, lr(0))
            for group in optimizer.param_groups:  # those of OPTIMIZERS have a rate of 1
                group["lr"] = lr(0)
            return train(model, optimizer, batches, **options)

        return run

    return Case(
        sp,
        rows_of_text(seed, 9, 32),
        lambda: sp.GPT(config),
        with_rate(sp.train_alone),
        lambda: sp.SequenceParallelGPT(config, recompute="selective"),
        with_rate(sp.train),
        lambda shards: tp.merge_state_dicts(shards, config),
    )


def hybrid(seed: int, heads: bool) -> Case:
    """Chapter 5: Mamba-2, attention and feed-forward layers; heads over the ranks, or tokens."""
    import context_parallel as cp
    import mamba_hybrid as mh

    sizes = dict(mamba_heads=8, mamba_head_size=8, mamba_groups=2, state_size=8, chunk=8)
    sizes |= dict(attention_heads=8, attention_groups=2, attention_head_size=8, ffn_hidden_size=128)
    config = mh.HybridConfig(61, 64, "M*M-", init_std=0.05, dt_init=(0.01, 0.2), seed=seed, **sizes)
    tp = world()[1] if heads else 1

    def optimizer_of(model, lr):
        optimizer = mh.make_optimizer(model, lr(0))
        for group in optimizer.param_groups:  # those of OPTIMIZERS have a rate of 1
            group["lr"] = lr(0)
        return optimizer

    def training(model, batches, lr, **options):
        return mh.train(model, optimizer_of(model, lr), batches, **options)

    return Case(
        mh,
        rows_of_text(seed, 5, 67),
        lambda: mh.HybridLM(config),
        training,
        lambda: cp.MeshHybridLM(config, mesh_of(cp, tp)),
        training,
        lambda shards: cp.merge_from_mesh(shards, config) if heads else of_first(shards),
    )


def experts(seed: int, fp8: bool = False) -> Case:
    """Chapter 6: eight experts over the ranks, and each rank has its own rows."""
    import moe_fp8 as mf
    from fp8 import HYBRID, to_fp8

    sizes = dict(num_experts=8, expert_size=32, shared_size=64, num_heads=8, init_std=0.05)
    config = mf.MoEConfig(61, 64, "*E*E*E", seed=seed, **sizes)

    def parallel():
        mesh = mesh_of(mf, world()[1])
        model = mf.ParallelMoELM(config, mesh.ep_group)
        return to_fp8(model, HYBRID, mesh) if fp8 else model

    def alone(model, batches, lr, **options):
        return mf.train_alone(model, optimizer_of(mf, model, lr), batches, **options)

    def together(model, batches, lr, **options):
        mesh = mesh_of(mf, world()[1])
        return mf.train(model, optimizer_of(mf, model, lr), batches, mesh, **options)

    return Case(
        mf,
        rows_of_text(seed, 17, 16),
        lambda: to_fp8(mf.MoELM(config), HYBRID) if fp8 else mf.MoELM(config),
        alone,
        parallel,
        together,
        mf.merge_state_dicts,
    )


def four_bits(seed: int) -> Case:
    """Chapter 8: two layers in NVFP4, sharded over the ranks; gradients to nearest, as ranks draw
    their own."""
    import nvfp4 as nf

    sizes = dict(num_layers=3, hidden_size=128, num_heads=8, ffn_hidden_size=128, seq_length=16)
    config = nf.GPTConfig(61, **sizes, init_std=0.05, seed=seed)

    def alone(model, batches, lr, **options):
        return nf.train_alone(model, optimizer_of(nf, model, lr), batches, **options)

    def together(model, batches, lr, **options):
        group = dist.group.WORLD if dist.is_initialized() else None
        return nf.train(model, optimizer_of(nf, model, lr), batches, group, **options)

    return Case(
        nf,
        rows_of_text(seed, 8, 16),
        lambda: nf.to_nvfp4(nf.GPT(config), nf.NEAREST),
        alone,
        lambda: nf.to_nvfp4(nf.GPT(config), nf.NEAREST, dist.group.WORLD),
        together,
        lambda shards: nf.merge_state_dicts(shards, nf.NEAREST.covered(3)),
    )


def sharded(seed: int) -> Case:
    """Chapter 7: tensor and data parallelism, and an optimizer that is sharded over the replicas.

    The chapter adds a rank's gradients in p.main_grad, of which only this rank's shard is complete
    after a step. The shards are gathered and put where the other chapters have them, in p.grad. Its
    plain model in bf16 has no fp32 masters, so 16 bits are not compared.
    """
    import zero_3d as z

    config = z.GPTConfig(61, 4, hidden_size=64, num_heads=8, init_std=0.05, seed=seed)
    layouts = {1: (1, 1, 1), 2: (1, 1, 2), 4: (2, 1, 2), 8: (2, 2, 2)}

    def alone(model, batches, lr, autocast=None, **options):
        return z.train_alone(model, optimizer_of(z, model, lr), batches, **options)

    def together(model, batches, lr, autocast=None, **options):
        def make(groups):  # all of them decay, as in OPTIMIZERS
            pieces = [piece for group in groups for piece in group["params"]]
            return optimizer_of(z, SimpleNamespace(parameters=lambda: pieces), lr)

        if not hasattr(model, "buffer"):  # once: it registers hooks
            named, tied = model.named_parameters(), ("embedding.weight",)
            model.buffer = z.ParamAndGradBuffer(named, model.mesh.dp_group, 10_000, tied)
        optimizer = z.DistributedOptimizer(model.buffer, make)
        for result in z.train(model, optimizer, batches, 1, **options):
            for bucket in model.buffer.buckets:
                bucket.start_all_gather(bucket.grad)
                bucket.wait()
                for p in bucket.params.values():
                    p.grad = p.main_grad.to(p.dtype)
            yield result
            model.zero_grad()

    return Case(
        z,
        rows_of_text(seed, 16, 32),
        lambda: z.GPT(config),
        alone,
        lambda: z.Stage(config, mesh_of(z, *layouts[world()[1]])),
        together,
        lambda shards: z.merge_state_dicts(shards, config, z.ParallelMesh(*layouts[len(shards)])),
    )


def fully_sharded(seed: int) -> Case:
    """Chapter 7's second script: as `sharded`, but the parameters are sharded too.

    They have no values between steps, so the ranks train a stage of their own. What a step has
    found is gathered and put where the other chapters have it.
    """
    import fsdp
    import zero_3d as z

    case = sharded(seed)

    def together(model, batches, lr, autocast=None, **options):
        def make(groups):  # all of them decay, as in OPTIMIZERS
            pieces = [piece for group in groups for piece in group["params"]]
            return optimizer_of(z, SimpleNamespace(parameters=lambda: pieces), lr)

        stage = z.Stage(model.config, model.mesh).to(next(model.parameters()).dtype)
        stage.load_state_dict(model.state_dict())
        layers = [stage.layers[i] for i in stage.mine]
        units = fsdp.FullySharded(stage, layers, model.mesh.dp_group, ("embedding.weight",))
        for result in z.train(stage, fsdp.FSDPOptimizer(units, make), batches, 1, **options):
            model.load_state_dict(units.state_dict())
            for unit in units.units:
                unit.data, unit.grad = unit.grad, unit.data
            gradients = units.state_dict()
            for unit in units.units:
                unit.data, unit.grad = unit.grad, unit.data
            for name, p in model.named_parameters():
                p.grad = gradients[name]
            yield result

    return replace(case, together=together)


def depths(seed: int) -> Case:
    """Chapter 9: a trunk and two depths of multi-token prediction, over heads, tokens and rows."""
    import mtp

    sizes = dict(ffn_hidden_size=128, mamba_heads=8, mamba_head_size=8, state_size=8)
    sizes |= dict(attention_heads=8, attention_head_size=8, init_std=0.05)
    config = mtp.HybridConfig(61, 64, "M-*-", "*-", **sizes, seed=seed)
    layouts = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (2, 2)}  # tp, cp

    def training(model, batches, lr, **options):
        for losses, norm in mtp.train(model, optimizer_of(mtp, model, lr), batches, **options):
            yield losses[0], norm  # the others are its parts

    def whole(shards: list[dict]) -> dict:
        tp, _ = layouts[len(shards)]
        copies = [shards[first : first + tp] for first in range(0, len(shards), tp)]
        return of_first([mtp.merge_state_dicts(copy, 61) for copy in copies])

    return Case(
        mtp,
        rows_of_text(seed, 8, 32),
        lambda: mtp.HybridLM(config),
        training,
        lambda: mtp.ParallelHybridLM(config, mesh_of(mtp, *layouts[world()[1]])),
        training,
        whole,
    )


def step_alone(model, optimizer, objective, batch, autocast, max_norm) -> tuple[Tensor, Tensor]:
    """A single device's step on an objective of chapter 11 or 12: loss and norm."""
    optimizer.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        total, count = objective(model, batch)
    loss = total / count
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.detach(), norm


def preferences(seed: int) -> Case:
    """Chapter 11: DPO on pairs, the policy and the reference sharded over two ranks."""
    import preference as pr

    config = pr.GPTConfig(num_heads=8, num_query_groups=4, seed=seed)
    another = pr.GPTConfig(num_heads=8, num_query_groups=4, seed=seed + len(SEEDS))
    objective = pr.PreferenceObjective("dpo", beta=0.3)

    def alone(model, batches, lr, autocast, max_norm):
        reference = pr.GPT(another).to(next(model.parameters()).dtype)
        optimizer = optimizer_of(pr, model, lr)
        for judged in batches:
            pairs = pr.pair_batch(judged, reference, CPU, autocast)
            yield step_alone(model, optimizer, objective, pairs, autocast, max_norm)

    def together(model, batches, lr, autocast, **options):
        mesh = mesh_of(pr, min(2, world()[1]))
        reference = pr.ParallelGPT(another, mesh.tp_group).to(next(model.parameters()).dtype)
        steps = []
        for judged in batches:
            mine = judged[mesh.dp_rank :: mesh.dp]
            steps.append([pr.pair_batch(mine, reference, CPU, autocast)])
        optimizer = optimizer_of(pr, model, lr)
        options |= dict(autocast=autocast, mesh=mesh)
        return pr.train(model, optimizer, steps, objective, **options)

    def whole(shards: list[dict]) -> dict:
        tp = min(2, len(shards))
        copies = [shards[first : first + tp] for first in range(0, len(shards), tp)]
        return of_first([pr.merge_state_dicts(copy, config) for copy in copies])

    return Case(
        pr,
        [pr.problems(9, seed, step) for step in range(STEPS)],
        lambda: pr.GPT(config),
        alone,
        lambda: pr.ParallelGPT(config, mesh_of(pr, min(2, world()[1])).tp_group),
        together,
        whole,
        flip=lambda judged: judged[::-1],
    )


def groups(seed: int) -> Case:
    """Chapter 12: GRPO's loss, weighted tokens and the penalty, from given responses; the policy
    and the reference are sharded over two ranks."""
    import grpo as gr

    config = gr.GPTConfig(17, num_heads=8, seed=seed)
    another = gr.GPTConfig(17, num_heads=8, seed=seed + len(SEEDS))
    objective = gr.GRPOObjective(weight_cap=5.0, kl_weight=0.1)
    # The group of this rank alone. All ranks make it here: `alone` runs on one of them.
    own_group = mesh_of(gr, 1).tp_group if world()[1] > 1 else None

    def judged(step: int) -> tuple[list, Tensor]:
        rng = random.Random(STEPS * seed + step)
        responses = []
        for _ in range(12):
            prompt = rng.choices(range(10), k=rng.randint(1, 5))
            tokens = rng.choices(range(17), k=rng.randint(1, 9))
            log_probs = [rng.uniform(-3.2, -2.5) for _ in tokens]
            responses.append(gr.Response(prompt, tokens, log_probs, [False] * len(tokens), True))
        rewards_R = torch.tensor([rng.random() for _ in responses], dtype=torch.float64)
        return responses, gr.grpo_advantages(rewards_R, 4)

    def alone(model, batches, lr, autocast, max_norm):
        dtype = next(model.parameters()).dtype
        reference = gr.GPT(another, own_group).to(dtype)
        optimizer = optimizer_of(gr, model, lr)
        for responses, advantage_R in batches:
            batch = gr.rollout_batch(responses, advantage_R.to(dtype), CPU, reference=reference)
            yield step_alone(model, optimizer, objective, batch, autocast, max_norm)

    def together(model, batches, lr, **options):
        mesh = mesh_of(gr, min(2, world()[1]))
        dtype = next(model.parameters()).dtype
        reference = gr.GPT(another, mesh.tp_group).to(dtype)
        mine = slice(mesh.dp_rank, None, mesh.dp)
        steps = []
        for responses, advantage_R in batches:
            part = (responses[mine], advantage_R[mine].to(dtype), CPU)
            steps.append([gr.rollout_batch(*part, reference=reference)])
        return gr.train(model, optimizer_of(gr, model, lr), steps, objective, mesh, **options)

    def merged(shards: list[dict]) -> dict:
        full = {}
        for name, x in shards[0].items():
            dim = gr.shard_dim(name)
            full[name] = x if dim is None else torch.cat([shard[name] for shard in shards], dim)
        full["output.weight"] = full["output.weight"][: config.vocab_size]
        return full

    def whole(shards: list[dict]) -> dict:
        tp = min(2, len(shards))
        copies = [shards[first : first + tp] for first in range(0, len(shards), tp)]
        return of_first([merged(copy) for copy in copies])

    return Case(
        gr,
        [judged(step) for step in range(STEPS)],
        lambda: gr.GPT(config, own_group),
        alone,
        lambda: gr.GPT(config, mesh_of(gr, min(2, world()[1])).tp_group),
        together,
        whole,
        flip=lambda batch: (batch[0][::-1], batch[1].flip(0)),
    )


def assembled(seed: int) -> Case:
    """Chapter 13: Mamba-2, attention, latent experts and two depths, over heads, tokens, experts
    and rows."""
    import nemotron3 as n3

    sizes = dict(mamba_heads=8, mamba_head_size=8, mamba_groups=2, state_size=8, chunk=8)
    sizes |= dict(attention_heads=8, attention_head_size=8, num_experts=8, top_k=2, expert_size=32)
    sizes |= dict(moe_latent_size=16, shared_size=64, init_std=0.05, dt_init=(0.01, 0.2))
    config = n3.NemotronConfig(61, 64, "ME*E", "*E", seed=seed, **sizes)
    layouts = {1: (1, 1), 2: (2, 2), 4: (2, 4), 8: (2, 4)}  # tp, ep

    def training(model, batches, lr, **options):
        for step in n3.train(model, optimizer_of(n3, model, lr), batches, **options):
            yield step.losses[0], step.norm  # the other losses are its parts

    def whole(shards: list[dict]) -> dict:
        tp, ep = layouts[len(shards)]
        mesh = n3.Mesh(tp, ep)
        merged = {}
        for name in shards[0]:
            merged[name] = n3.merge_tensor(name, [x[name] for x in shards], config, mesh)
        return merged

    return Case(
        n3,
        rows_of_text(seed, 9, 17),
        lambda: n3.NemotronLM(config),
        training,
        lambda: n3.ParallelNemotronLM(config, mesh_of(n3, *layouts[world()[1]])),
        training,
        whole,
    )


Technique = namedtuple("Technique", "title case widths")
WIDE, ALL = ("fp64", "fp32", "bf16 autocast"), ("fp64", "fp32", "bf16 autocast", "bf16")
TECHNIQUES = {
    "data": Technique("data parallelism (1)", data, WIDE),  # parameters of 16 bits are not measured
    "tensor": Technique("tensor parallelism (2)", tensor, ALL),
    "pipeline": Technique("pipeline (3)", pipeline, ALL),
    "sequence": Technique("sequence parallelism, recomputation (4)", sequence, ALL),
    "heads": Technique("Mamba hybrid, heads (5)", functools.partial(hybrid, heads=True), WIDE),
    "tokens": Technique("Mamba hybrid, tokens (5)", functools.partial(hybrid, heads=False), WIDE),
    "experts": Technique("experts (6)", experts, WIDE),  # whose routers refuse a bias of 16 bits
    "sharded": Technique("tensor × pipeline × data, ZeRO-1 (7)", sharded, ("fp64", "fp32")),
    "fully sharded": Technique("tensor × pipeline × FSDP (7)", fully_sharded, ("fp64", "fp32")),
    "depths": Technique("multi-token prediction (9)", depths, WIDE),
    "preferences": Technique("DPO (11)", preferences, WIDE),
    "groups": Technique("GRPO and its penalty (12)", groups, WIDE),
    "assembled": Technique("Nemotron 3, all of it (13)", assembled, WIDE),
    # In fp32 a value near a tie has another code in another order of sums: that is no yardstick.
    "four bits": Technique("layers in NVFP4 (8)", four_bits, ("fp64",)),
    "fp8 experts": Technique("experts in FP8 (6)", functools.partial(experts, fp8=True), ("fp8",)),
}

# ── Planted bugs ──────────────────────────────────────────────────────────────────────────────────


def without_copy():
    import megatron_tp as tp

    return plant(tp, "copy_to_tp", lambda x, group=None: x.view_as(x))


def padding_in_the_softmax():
    import megatron_tp as tp

    right = tp.vocab_parallel_cross_entropy
    return plant(
        tp,
        "vocab_parallel_cross_entropy",
        lambda logits, targets, group, vocab_size: right(logits, targets, group),
    )


def mean_of_means():
    import deepspeech as ds

    right = ds._all_reduce

    def all_reduce(x, group=None, *op):  # a count: each rank takes its own for everybody's
        return right(x, group, *op) if x.is_floating_point() else x * dist.get_world_size()

    return plant(ds, "_all_reduce", all_reduce)


def partial_gradients():
    import seq_parallel as sp

    return plant(sp, "reduce_sequence_parallel_grads", lambda *_: None)


def another_gelu():
    right = torch.nn.functional.gelu
    return plant(torch.nn.functional, "gelu", lambda x, approximate="none": right(x))


Bug = namedtuple("Bug", "technique ranks plant")
BUGS = {
    "an all-reduce of backward is missing": Bug("tensor", 2, without_copy),
    "gradients of norms are not summed": Bug("sequence", 2, partial_gradients),
    "a mean of the ranks' means": Bug("data", 2, mean_of_means),
    "padding words in the softmax": Bug("tensor", 4, padding_in_the_softmax),
    "gelu, where the reference approximates it": Bug("tensor", 2, another_gelu),
}

# ── Measuring ─────────────────────────────────────────────────────────────────────────────────────


def error(here: Tensor, reference: Tensor) -> float:
    """max|Δ| / max|reference| of one tensor; infinite where something is no number, or only the
    reference is zero."""
    gap, size = (
        (here.double() - reference.double()).abs().max().item(),
        reference.double().abs().max().item(),
    )
    return gap / size if size and math.isfinite(gap) else math.inf if gap else 0.0


def compare(here: dict, reference: dict) -> dict[str, float]:
    """Each quantity's error; of gradients and weights the worst tensor's."""
    found = [quantity for quantity in QUANTITIES if quantity in reference]
    return {q: max(error(here[q][name], x) for name, x in reference[q].items()) for q in found}


@contextlib.contextmanager
def other_order():
    """Inside, every linear layer has its inputs and its outputs in reverse order: all its three
    sums change theirs."""
    right = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return right(x.flip(-1), weight.flip(0, 1), bias if bias is None else bias.flip(0)).flip(-1)

    with plant(torch.nn.functional, "linear", linear):
        yield


def train(
    case: Case, model: nn.Module, run: Callable, width: Width, flipped: bool, optimizers, steps
) -> dict:
    """Trains from the model's weights with each optimizer; quantity to tensors of this rank, and
    all "losses"."""
    found, first = {}, {name: x.clone() for name, x in model.state_dict().items()}
    batches = [
        case.cast(batch, width.parameters)
        for batch in itertools.islice(itertools.cycle(case.batches), steps)
    ]
    batches = [case.flip(batch) for batch in batches] if flipped else batches
    for optimizer in optimizers:
        model.load_state_dict(first)
        options = dict(
            lr=lambda step, rate=RATES[optimizer]: rate, max_norm=1e9, autocast=width.autocast
        )
        with plant(case.chapter, "make_optimizer", OPTIMIZERS[optimizer]):
            for step, (loss, norm, *_) in enumerate(run(model, batches, **options)):
                found.setdefault("losses", {})[step] = loss.clone()
                if step == 0:
                    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
                    found |= dict(
                        loss={"loss": loss.clone()}, norm={"norm": norm.clone()}, gradient=gradient
                    )
        if steps > 1:
            found[optimizer] = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.zero_grad()
    return found


def alone(
    technique: str,
    seed: int,
    width: str,
    dtype=None,
    flipped=False,
    optimizers=OPTIMIZERS,
    steps=STEPS,
    **size,
):
    """The single device. dtype float64: from the weights and numbers that `width` has, computed in
    float64."""
    make = TECHNIQUES[technique].case
    case = make(seed, **size)
    if dtype is not None and width == "fp8":
        case = experts(seed)
    model = case.plain().to(WIDTHS[width].parameters)
    case.batches = [case.cast(batch, WIDTHS[width].parameters) for batch in case.batches]
    how = WIDTHS[width]
    if dtype is not None:
        model, how = model.to(dtype), Width(dtype, None, 0)
    with other_order() if flipped else contextlib.nullcontext():
        return train(case, model, case.alone, how, flipped, optimizers, steps)


def on_ranks(
    technique: str,
    seed: int,
    width: str,
    bug: str = "",
    optimizers=tuple(OPTIMIZERS),
    steps=STEPS,
    **size,
):
    """This rank's share of what `alone` finds; every rank must call it."""
    case = TECHNIQUES[technique].case(seed, **size)
    with BUGS[bug].plant() if bug else contextlib.nullcontext():
        model = case.parallel().to(WIDTHS[width].parameters)
        return train(case, model, case.together, WIDTHS[width], False, optimizers, steps)


def join(technique: str, shares: list[dict], broken: bool = False, **size) -> dict:
    """All ranks' shares of `on_ranks`. broken: what should be the same on each rank is taken from
    the first."""
    case, whole = TECHNIQUES[technique].case(0, **size), {}
    for quantity in shares[0]:
        parts = [share[quantity] for share in shares]
        if quantity in ("loss", "losses", "norm"):
            whole[quantity] = parts[0]
            continue
        if broken and hasattr(case.chapter, "shard_dim"):
            same = [name for name in parts[0] if case.chapter.shard_dim(name) is None]
            parts = [part | {name: parts[0][name] for name in same} for part in parts]
        elif (
            broken and case.chapter.__name__ == "pipeline"
        ):  # of a tied weight the first stage's copy
            parts = [
                *parts[:-1],
                {name: x for name, x in parts[-1].items() if name not in parts[0]},
            ]
        whole[quantity] = case.whole(parts)
    return whole


class Pools:
    """The ranks of each world; they start when they are first needed."""

    def __init__(self):
        ranks.PATHS[:] = PATHS
        self.of = {n: ranks.Pool(n) for n in RANKS}

    def run(self, n: int, technique: str, seed: int, width: str, bug: str = "", **options) -> dict:
        """What `n` ranks find, whole."""
        shares = self.of[n].run(
            "measure_differences",
            "on_ranks",
            dict(technique=technique, seed=seed, width=width, bug=bug, **options),
            600.0,
        )
        size = {name: options[name] for name in ("layers", "hidden") if name in options}
        return join(technique, shares, bool(bug), **size)

    def close(self) -> None:
        for pool in self.of.values():
            pool.close()


def add(cell: dict, found: dict[str, float]) -> None:
    """Another seed's errors."""
    for quantity, value in found.items():
        cell.setdefault(quantity, []).append(float(f"{value:.2g}"))


def measure_cells(pools: Pools, techniques=tuple(TECHNIQUES)) -> dict:
    """technique, width and what is compared with what, to each quantity's errors, one a seed.

    "single": the single device against float64; "reordered": against itself with all sums in
    another order; of each number of ranks, "apart": the ranks against the single device, "float64":
    the ranks against float64.
    """
    cells = {}
    for technique in techniques:
        for width in TECHNIQUES[technique].widths:
            cell = cells.setdefault(technique, {})[width] = dict(single={}, reordered={})
            cell |= {str(n): dict(apart={}, float64={}) for n in RANKS}
            for seed in SEEDS:
                single, wide = (
                    alone(technique, seed, width),
                    alone(technique, seed, width, torch.float64),
                )
                add(cell["single"], compare(single, wide))
                add(cell["reordered"], compare(alone(technique, seed, width, flipped=True), single))
                for n in RANKS:
                    here = pools.run(n, technique, seed, width)
                    add(cell[str(n)]["apart"], compare(here, single))
                    add(cell[str(n)]["float64"], compare(here, wide))
            print(f"{technique:12} {width:14} gradients apart on {RANKS} ranks: ", end="")
            print(*(f"{max(cell[str(n)]['apart']['gradient']):.0e}" for n in RANKS), flush=True)
    return cells


def measure_bugs(pools: Pools) -> dict:
    """bug and width to "apart" and "float64", as in `measure_cells`."""
    found = {}
    for name, bug in BUGS.items():
        for width in WIDE:
            cell = found.setdefault(name, {})[width] = dict(apart={}, float64={})
            for seed in SEEDS:
                here = pools.run(bug.ranks, bug.technique, seed, width, name)
                add(cell["apart"], compare(here, alone(bug.technique, seed, width)))
                add(
                    cell["float64"], compare(here, alone(bug.technique, seed, width, torch.float64))
                )
    return found


SWEEPS = {"layers": (1, 4, 16, 64), "hidden": (16, 64, 256)}


def measure_growth(pools: Pools) -> dict:
    """Tensor parallelism on two ranks, with more layers or wider ones: the first step's errors, one
    a seed."""
    found = {}
    for what, sizes in SWEEPS.items():
        for width in ("fp32", "bf16 autocast"):
            for size in sizes:
                options = {"steps": 1, "optimizers": ("SGD",), what: size}
                cell = found.setdefault(what, {}).setdefault(width, {})[str(size)] = dict(
                    single={}, apart={}
                )
                for seed in SEEDS:
                    single = alone("tensor", seed, width, **options)
                    add(
                        cell["single"],
                        compare(single, alone("tensor", seed, width, torch.float64, **options)),
                    )
                    add(
                        cell["apart"],
                        compare(pools.run(2, "tensor", seed, width, **options), single),
                    )
    return found


CURVES = {
    "two ranks": "",
    "another order": None,
    "an all-reduce of backward is missing": "an all-reduce of backward is missing",
    "gelu, where the reference approximates it": "gelu, where the reference approximates it",
}


def measure_curves(pools: Pools, steps: int = 60) -> dict:
    """Tensor parallelism with AdamW: how far the loss of each step is from the single device's, a
    list a seed."""
    found, options = {}, dict(steps=steps, optimizers=("AdamW",))
    for width, seed in itertools.product(("fp32", "bf16 autocast"), SEEDS):
        single = alone("tensor", seed, width, **options)
        for name, bug in CURVES.items():
            if bug is None:
                here = alone("tensor", seed, width, flipped=True, **options)
            else:
                here = pools.run(2, "tensor", seed, width, bug, **options)
            errors = [error(here["losses"][step], loss) for step, loss in single["losses"].items()]
            found.setdefault(width, {}).setdefault(name, []).append(
                [float(f"{x:.2g}") for x in errors]
            )
    return found


# ── What the numbers say ──────────────────────────────────────────────────────────────────────────

MARGIN = 5  # of a threshold, over the largest difference that a right run has shown
RESIDUAL = (
    "tensor",
    "pipeline",
    "sequence",
    "heads",
    "tokens",
    "experts",
)  # every layer beside a residual connection


def largest(results: dict, technique: str, width: str, quantity: str, what: str = "apart") -> float:
    """The largest error of any number of ranks and any seed; what: as in `measure_cells`."""
    cell = results["cells"][technique][width]
    places = [cell[str(n)][what] for n in RANKS] if what in ("apart", "float64") else [cell[what]]
    return max(max(place[quantity]) for place in places)


def threshold(results: dict, techniques, width: str, quantity: str) -> float:
    """MARGIN times the largest difference of these techniques, rounded up to 1, 2 or 5 times a
    power of ten."""
    found = MARGIN * max(largest(results, name, width, quantity) for name in techniques)
    power = 10.0 ** math.floor(math.log10(found))
    return float(
        f"{next(step for step in (1, 2, 5, 10) if step * power >= found * (1 - 1e-9)) * power:.0e}"
    )


def short(value: float) -> str:
    """One digit and a power of ten, as in 3e-7."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def markdown(results: dict) -> str:
    """The table of DIFFERENCES.md: per technique and precision the largest error over ranks and
    seeds."""
    title = "loss | gradient's norm | gradients | weights, SGD | weights, AdamW"
    yardsticks = "*one device from float64* | *in another order*"
    lines = [f"| technique (chapter) | precision | {title} | {yardsticks} |", "|" + "---|" * 9]
    for technique in TECHNIQUES:
        for width in ("fp32", "bf16 autocast", "fp8"):
            if width in results["cells"][technique]:
                found = [
                    short(largest(results, technique, width, quantity)) for quantity in QUANTITIES
                ]
                for what in ("single", "reordered"):
                    found.append(f"*{short(largest(results, technique, width, 'gradient', what))}*")
                lines.append(f"| {TECHNIQUES[technique].title} | {width} | {' | '.join(found)} |")
    return "\n".join(lines)


def dump(results: dict) -> str:
    """JSON with a line for each list's owner: short enough to read, and for a diff to say what
    changed."""

    def lines(value, depth: int) -> str:
        if not isinstance(value, dict) or set(value) <= set(QUANTITIES):
            return json.dumps(value)
        inner = (
            f"{' ' * (depth + 1)}{json.dumps(key)}: {lines(x, depth + 1)}"
            for key, x in value.items()
        )
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"

    return lines(results, 0) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    begin, pools = time.time(), Pools()
    result = dict(
        command="make differences", torch=torch.__version__, seeds=len(SEEDS), steps=STEPS
    )
    try:
        result |= dict(
            bugs=measure_bugs(pools), growth=measure_growth(pools), curves=measure_curves(pools)
        )
        result |= dict(cells=measure_cells(pools))
    finally:
        pools.close()
    RESULTS.write_text(dump(result), "utf-8")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
