# SPDX-License-Identifier: MIT-0
"""Chapter 7, second script. Sharded parameters: ZeRO's stage 3, which PyTorch calls FSDP.

Papers: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, Rajbhandari et al.,
        2020, arXiv 1910.02054, section 5.3
        PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, Zhao et al., 2023,
        arXiv 2304.11277

The problem. With zero_3d.py's optimizer each of the dp ranks still has all parameters, and fp32
gradients of all of them: in bf16 training 6 bytes a parameter, whatever dp is.

The idea. A rank needs a layer's parameters only while it computes that layer. Between uses it keeps
1/dp of them. Each layer is gathered before it is used, and freed afterwards:

    forward     gather 0   layer 0  free   layer 1  free   layer 2
                           gather 1        gather 2
    backward    layer 2  free              layer 1  free              layer 0  free
                gather 1                   gather 0
                         reduce-scatter 2           reduce-scatter 1           reduce-scatter 0

What stands below a layer is in flight while the layer computes. The optimizer then has all that it
needs: a shard of the masters, and the same shard of the gradients.

Run it (no flag is needed; --help lists them):

    python 07_zero_3d/fsdp.py                            4 local ranks: two meshes
    python 07_zero_3d/fsdp.py --no-reshard-after-forward     parameters stay until backward
    python 07_zero_3d/fsdp.py --recompute                    with recomputation of each layer
    python 07_zero_3d/fsdp.py --check                        equivalence alone
    torchrun --nproc-per-node=8 07_zero_3d/fsdp.py --tp 2 --dp 4

It checks in float64 that every gradient and every weight equal the single device's and ZeRO-1's. It
trains on text next to the plain model, and measures a rank's memory with ZeRO-1 and with FSDP.

Left out: gradients that are reduced once per several micro-batches (FSDP's no_sync); a model that
no rank can hold even once, while it is made; CPU offload; prefetching of more than one layer.
"""

# The suffixes of tensors are those of zero_3d.py, section 0. Flat tensors have no suffix.

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zero_3d as z
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from zero_3d import Group, Params, StateDict, flag

# ── 1 The idea ──────────────────────────────────────────────────────────────────────────────────
#
# ── 1.1 A unit: parameters whose memory comes and goes ──────────────────────────────────────────
#
# A unit is a bucket (zero_3d.py, section 1.2) with the parameters of one layer. Of its two flat
# tensors, `full` and `full_grad`, a rank has the memory only while it uses them. What stays is
# 1/dp of each, in at least fp32: `data`, the masters, and `grad`.
#
#     a layer with W (4), b (3), on dp = 2
#
#     rank 0     data  W W W W                 while in use:  full  W W W W b b b ·
#     rank 1     data  b b b ·                                full  W W W W b b b ·
#                grad, and Adam's moments, are cut alike
#
# Bytes a parameter in bf16 training:       parameters   gradients   masters and moments
#     replicated                             2            4           12
#     ZeRO-1 (zero_3d.py)                    2            4           12/dp
#     FSDP                                   –            4/dp        12/dp       16/dp in all
#
# The bf16 parameters are no state: each gather makes them anew from the masters. It sends them in
# bf16, which halves the bytes. Gradients are reduced in fp32, as in zero_3d.py.
#
# Freeing. Autograd keeps references to the parameters for backward (a linear layer's weight is
# needed for its input's gradient). So a tensor cannot be freed by dropping it. Its *storage* is
# resized to zero bytes: every view of it, also autograd's, stays as it is, and has values again
# once the storage has its size back and the gather has filled it.
#
# A read of a freed storage would be a read of no memory: on a CPU the process dies. So a freed
# parameter shows one NaN, expanded to its shape. Code that uses it at the wrong time gets NaN, and
# `read_step` stops the run. Shapes stay what they were.


def allocate(flat: Tensor) -> bool:
    """Gives flat (n,) its memory; the values are undefined. Returns: False where it had it.

    Source: torch.distributed.fsdp, which resizes storages as well.
    """
    storage = flat.untyped_storage()
    was_free = storage.nbytes() == 0
    if was_free:
        storage.resize_(flat.nbytes)
    return was_free


def free(flat: Tensor) -> None:
    """Takes the memory of flat (n,), also from all views of it. Source: as above."""
    flat.untyped_storage().resize_(0)


class Unit(z.Bucket):
    """The parameters of one layer, sharded. For the optimizer it is a bucket that has only a shard.

    Args: params: by name, of one dtype, frozen ones too. group: the ranks that shard them.
    Source: PyTorch FSDP's FlatParameter; ZeRO, section 5.3.
    """

    def __init__(self, params: Params, group: Group):
        super().__init__(params, group)
        self.full = self.data
        self.full_grad = self.grad  # each p.main_grad is a view of it
        self.views = {name: p.data for name, p in params.items()}
        self.missing = self.full.new_full((), math.nan)
        self.everything = params
        self.params = {name: p for name, p in params.items() if p.requires_grad}
        self.data = z.at_least_fp32(self.part(self.full)).clone()
        self.grad = torch.zeros_like(self.data)
        self.reducing: Any = None  # a reduce-scatter in flight; self.work is the all-gather
        self.in_backward = False
        free(self.full_grad)
        self.reshard()

    def part(self, flat: Tensor) -> Tensor:
        """This rank's part of flat (n,), which is `full` or `full_grad`: a view."""
        return super().shard(flat)

    def shard(self, flat: Tensor) -> Tensor:
        """For the optimizer. flat (n,), `data` or `grad`, is this rank's part already."""
        return flat

    # No rank may skip it: whether a unit is gathered depends on the order of calls alone.
    @torch.no_grad()
    def start_unshard(self) -> None:
        """Starts the all-gather, unless the parameters are there or in flight."""
        if not allocate(self.full):
            return
        shard = self.data.to(self.full.dtype)
        if z.group_size(self.group) > 1:
            self.work = z.start_all_gather(self.full, shard, self.group)
        else:
            self.full.copy_(shard)
        for name, p in self.everything.items():
            p.data = self.views[name]

    def unshard(self) -> None:
        """Returns with all parameters in their place. Collective over the group."""
        self.start_unshard()
        self.wait()

    def reshard(self) -> None:
        """Frees the parameters; this rank's masters stay."""
        self.wait()  # for a gather that was started and not used
        free(self.full)
        for name, p in self.everything.items():
            p.data = self.missing.expand(self.views[name].shape)

    # In fp32, of a gradient that autograd made in the parameter's dtype.
    def accumulate(self, p: nn.Parameter) -> None:
        if allocate(self.full_grad):
            self.full_grad.zero_()
        p.main_grad.add_(p.grad)
        p.grad = None

    # Collective, so also on a rank on which no parameter of the unit got a gradient.
    def start_reduce_scatter(self) -> None:
        if allocate(self.full_grad):
            self.full_grad.zero_()
        if z.group_size(self.group) > 1:
            shard = self.part(self.full_grad)
            self.reducing = z.start_reduce_scatter(shard, self.full_grad, self.group)

    def finish_reduce_scatter(self) -> None:
        """Adds this rank's part of the sum to `grad`, and frees the rest."""
        if self.reducing is not None:
            self.reducing.wait()
            self.reducing = None
        self.grad.add_(self.part(self.full_grad))
        free(self.full_grad)


# ── 1.2 When a layer is gathered and freed ──────────────────────────────────────────────────────
#
# Four moments of a layer. Modules have hooks for the first two, autograd for the others:
#
#     before forward     wait for this layer; start the gather of the next
#     after forward      free it
#     before backward    (the gradient of its output is there)
#                        wait for this layer; start the gather of the one before
#     after backward     (the gradient of its input is there)
#                        free it; start the reduce-scatter of its gradients
#
# The next gather starts before this layer's GEMMs, and runs next to them. The last layer is not
# freed after forward, because backward begins with it.
#
# What belongs to no layer, as embeddings and the last norm, is used at both ends of the model. Such
# parameters are the *root* units: gathered before the first layer, freed after the step.
#
# Elements that a rank's group gathers and reduces in a step, P of them in the model:
#
#                     forward    backward               gradients    in all
#     ZeRO-1             –          –                      P          2·P, with P after the step
#     FSDP               P       P − root − last layer     P          near 3·P
#     not resharded      P          0                      P          2·P
#
# So FSDP sends half as much again as data parallelism [ZeRO, section 7]. Each further micro-batch
# gathers again, and reduces again: no rank has the memory to accumulate full gradients. With the
# many micro-batches of a pipeline that costs more than it saves (zero_3d.py, "What remains").
#
# Why "after backward" is at the *input's* gradient, and not where all parameters have theirs. A
# frozen layer has no gradient of parameters and must be freed. And where one rank does not use a
# parameter (an expert without tokens), a reduce-scatter that waited for its gradient would start
# at another place than on the other ranks: one rank gathers, the others reduce, and both hang.
# Backward reaches the input on all of them.
#
# A layer that is called twice (shared weights) is gathered twice and reduced twice. Autograd adds
# the gradients of both uses before it hands over their sum. So the first reduce-scatter sends
# zeros, and the second the sum: both are added to `grad`.
#
# Recomputation runs a layer's forward inside its backward, with the same hooks. There the layer
# must not be freed after forward: `in_backward` says so.


SHAPE = "but a layer must be called with one tensor first, and return one tensor"


class _AfterBackward(torch.autograd.Function):
    """Identity; calls `then` once the gradient of x is complete."""

    @staticmethod
    def forward(ctx, x, then):
        ctx.then = then
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.then()
        return grad, None


class FullySharded:
    """A model whose parameters are sharded, layer by layer: ZeRO stage 3.

    It takes the place of zero_3d.py's ParamAndGradBuffer: `train`, the end of a step and the norm
    are that script's. Parameters have values only while their layer runs; see `state_dict`.

    Args: model: with its initial weights; what shall be frozen is frozen. layers: modules of the
        model in order of use, each from one tensor to one tensor, other arguments apart. group: the
        ranks that shard. alone: names that get a unit of their own. reshard_after_forward: False
        keeps the parameters until backward. Every rank must call the same layers in one order.
    Raises: ValueError for a parameter in two layers or in another FullySharded, and for a layer of
        several dtypes or without parameters.
    Source: ZeRO, section 5.3; PyTorch FSDP; torch's fully_shard.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        group: Group = None,
        alone: tuple = (),
        reshard_after_forward: bool = True,
    ):
        self.alone = set(alone)
        self.reshard_after_forward = reshard_after_forward
        layers = list(dict.fromkeys(layers))  # a layer that is called twice is one unit
        self.layers = [Unit(params, group) for params in split_by_layer(model, layers)]
        self.roots = [Unit(params, group) for params in split_roots(model, layers, alone)]
        self.units = [*self.roots, *self.layers]
        self.buckets = [unit for unit in self.units if unit.params]  # those that are trained
        self.zero = self.units[0].grad.new_zeros(())
        self.waiting: Unit | None = None  # whose reduce-scatter is in flight
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before_forward, i))
            layer.register_forward_hook(partial(self._after_forward, i))
        model.register_forward_pre_hook(self._before_model)
        model.register_forward_hook(self._after_model)
        for unit in self.buckets:
            for p in unit.params.values():
                p.register_post_accumulate_grad_hook(unit.accumulate)

    def _before_model(self, model: nn.Module, args: tuple) -> None:
        for unit in self.roots:
            unit.start_unshard()
        self._prefetch(0)
        for unit in self.roots:
            unit.wait()

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not torch.is_grad_enabled():  # no backward follows
            self.reshard()

    # Of layer i, where there is one.
    def _prefetch(self, i: int) -> None:
        if 0 <= i < len(self.layers):
            self.layers[i].start_unshard()

    def _before_forward(self, i: int, layer: nn.Module, args: tuple) -> tuple | None:
        if not (args and isinstance(args[0], Tensor)):
            raise TypeError(f"{type(layer).__name__}: its first argument is no tensor, {SHAPE}")
        unit = self.layers[i]
        unit.unshard()
        if unit.in_backward:  # recomputation
            return None
        self._prefetch(i + 1)
        x, *others = args
        return _AfterBackward.apply(x, partial(self._after_backward, i)), *others

    def _after_forward(self, i: int, layer: nn.Module, args: tuple, y: Tensor) -> None:
        unit = self.layers[i]
        if not isinstance(y, Tensor):
            raise TypeError(f"{type(layer).__name__} returns {type(y).__name__}, {SHAPE}")
        if unit.in_backward:
            return
        is_last = i + 1 == len(self.layers)
        if self.reshard_after_forward and not is_last:
            unit.reshard()
        if y.requires_grad:
            y.register_hook(partial(self._before_backward, i))

    def _before_backward(self, i: int, grad: Tensor) -> None:
        unit = self.layers[i]
        if self.waiting is unit:  # called twice, or alone on its stage: do not add to what is sent
            self._reduce(None)
        unit.in_backward = True
        unit.unshard()
        self._prefetch(i - 1)

    def _after_backward(self, i: int) -> None:
        unit = self.layers[i]
        unit.in_backward = False
        unit.reshard()
        if unit.params:
            self._reduce(unit)

    # One reduce-scatter is in flight at a time: full gradients of at most two layers are in memory.
    def _reduce(self, unit: Unit | None) -> None:
        if self.waiting is not None:
            self.waiting.finish_reduce_scatter()
        self.waiting = unit
        if unit is not None:
            unit.start_reduce_scatter()

    # The interface of zero_3d.py's buffer.

    def zero_grad(self) -> None:
        """Before the first micro-batch. Also ends what a step that failed has left."""
        self.is_last_microbatch = False  # run_1f1b sets it; here every micro-batch is reduced
        self._reduce(None)
        self.reshard()
        for unit in self.buckets:
            free(unit.full_grad)
            unit.grad.zero_()

    def finish_reduce_scatter(self) -> None:
        """Reduces the root units, and layers whose input has no gradient, and waits for all."""
        for unit in self.roots:
            if unit.params:
                self._reduce(unit)
        for unit in reversed(self.layers):
            if unit.in_backward and unit.params:  # backward has ended inside
                self._reduce(unit)
        self._reduce(None)
        self.reshard()

    def reshard(self) -> None:
        """Frees all parameters, also those that a layer without backward has left."""
        for unit in self.units:
            unit.in_backward = False
            unit.reshard()

    # Weights.

    @torch.no_grad()
    def state_dict(self) -> StateDict:
        """This rank's state dict as without sharding; copies on the CPU. Collective."""
        found = {}
        for unit in self.units:
            unit.unshard()
            for name, p in unit.everything.items():
                found[name] = p.to("cpu", copy=True)
            unit.reshard()
        return found

    @torch.no_grad()
    def load_state_dict(self, full: StateDict) -> None:
        """Sets this rank's masters from a state dict without sharding.

        Raises: ValueError that names what is missing, unknown or of another shape.
        """
        shapes = {name: x.shape for name, x in full.items()}
        mine = {name: x.shape for unit in self.units for name, x in unit.views.items()}
        wrong = shapes.items() ^ mine.items()
        if wrong:
            raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:6]}")
        self.reshard()
        for unit in self.units:
            flat = torch.zeros(len(unit.full), dtype=unit.data.dtype)
            for name, start in unit.starts.items():
                x = full[name].flatten()
                flat[start : start + len(x)] = x
            unit.data.copy_(unit.part(flat))


def split_by_layer(model: nn.Module, layers: list[nn.Module]) -> list[Params]:
    """The parameters of each layer, by the model's names.

    Raises: ValueError for a parameter in two layers, for a layer of several dtypes or without any.
    """
    names = {p: name for name, p in model.named_parameters()}
    owner: dict[nn.Parameter, int] = {}
    found = []
    for i, layer in enumerate(layers):
        params = {}
        for p in layer.parameters():
            if p in owner:
                raise ValueError(f"{names[p]} is in layers {owner[p]} and {i}: make them one layer")
            owner[p] = i
            params[names[p]] = p
        found.append(params)
    for i, params in enumerate(found):
        kinds = {p.dtype for p in params.values()}
        if len(kinds) != 1:
            some = f"layer {i} has {len(params)} parameters {sorted(params)[:4]}"
            raise ValueError(f"{some} of dtypes {kinds}: a unit has one dtype")
    return found


def split_roots(model: nn.Module, layers: list[nn.Module], alone: Iterable[str]) -> list[Params]:
    """The parameters of no layer: each name of `alone` by itself, and all others."""
    inside = {p for layer in layers for p in layer.parameters()}
    rest = {name: p for name, p in model.named_parameters() if p not in inside}
    parts = [{name: rest.pop(name)} for name in alone if name in rest]
    return [*parts, rest] if rest else parts


class FSDPOptimizer(z.DistributedOptimizer):
    """zero_3d.py's optimizer on the masters of a FullySharded. Source: as there."""

    def gather_parameters(self) -> None:
        """Sends nothing: the next forward gathers. What was gathered before the step is freed."""
        self.buffer.reshard()


# ── 2 Training ──────────────────────────────────────────────────────────────────────────────────
#
# `z.train` is unchanged: it calls the interface above. So the mesh may have tp and pp axes as well;
# dp is the group that shards. In the lines of zero_3d.py's section 1.4, line 1 has happened layer
# by layer, and line 7 ends without an all-gather. The norm needs no change either: each element is
# in one rank's shard.


def make_fsdp_training(
    stage: z.Stage, lr: float, reshard_after_forward: bool = True
) -> FSDPOptimizer:
    """Shards a stage over the replicas of its mesh; AdamW with the settings of zero_3d.py's.

    From here on the parameters have no values between steps.
    """
    alone = () if stage.config.untied else ("embedding.weight",)
    layers = [stage.layers[i] for i in stage.mine]
    group = stage.mesh.dp_group
    sharded = FullySharded(stage, layers, group, alone, reshard_after_forward)
    return FSDPOptimizer(sharded, partial(AdamW, lr=lr, betas=(0.9, 0.95)))


# ── 3 Memory ────────────────────────────────────────────────────────────────────────────────────
#
# With b bytes for a parameter and g for a gradient (2 and 4 in bf16), a layer of U parameters and
# root units of R in all, a step has in memory, next to the shards, at most
#
#     b · 2U + g · 2U     parameters of the layer in backward, and of the one that is gathered;
#                         gradients of that layer, and of the one that is being reduced
#     (b + g) · R
#
# and activations. The number of layers is not in it: that is the idea. ZeRO-1 has (b + g) · P.


def peak_bytes(sharded: FullySharded) -> int:
    """The formula above: parameters and full gradients that a step has in memory at a time."""
    layers = [unit.full.nbytes + unit.full_grad.nbytes for unit in sharded.layers]
    roots = [unit.full.nbytes + unit.full_grad.nbytes for unit in sharded.roots]
    return 2 * max(layers) + sum(roots)


def bytes_at_rest(optimizer: z.DistributedOptimizer) -> int:
    """Bytes that this rank keeps between steps: parameters, gradients, masters and moments."""
    tensors = [piece.master for piece in optimizer.pieces]
    for moments in optimizer.optimizer.state.values():
        tensors += [x for x in moments.values() if x.ndim]
    for bucket in optimizer.buffer.buckets:
        tensors += [bucket.data, bucket.grad]
        if isinstance(bucket, Unit):
            tensors += [bucket.full, bucket.full_grad]
    sizes = {}
    for x in tensors:  # pieces are views of one storage, which counts once
        storage = x.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


class InUse(TorchDispatchMode):
    """`with InUse(sharded) as seen:` has in seen.peak the most bytes of parameters and of full
    gradients that were allocated at a time, looked up at every operator."""

    def __init__(self, sharded: FullySharded):
        super().__init__()
        self.flats = [unit.full for unit in sharded.units]
        self.flats += [unit.full_grad for unit in sharded.units]
        self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        now = sum(flat.untyped_storage().nbytes() for flat in self.flats)
        self.peak = max(self.peak, now)
        return operator(*args, **(kwargs or {}))


# ── 4 The demonstration ─────────────────────────────────────────────────────────────────────────


def equivalence(
    args: argparse.Namespace, mesh: z.ParallelMesh, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Five AdamW steps on a single device, with ZeRO-1 and with FSDP: name to error."""
    heads = 2 * mesh.tp
    config = z.GPTConfig(61, 3, hidden_size=8 * heads, num_heads=heads)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4 * mesh.dp, 4 * mesh.tp)
    ids_2BS = torch.randint(61, shape, generator=generator)
    tokens_BS, targets_BS = ids_2BS.to(device)
    targets_BS[0, 3:] = -100  # replicas have unequal token counts
    batches = [(tokens_BS, targets_BS)] * 5
    plain = z.GPT(config).to(device, dtype)
    alone = z.train_alone(plain, z.make_optimizer(plain, 1e-3), batches, max_norm=0.1)
    zero_1 = z.Stage(config, mesh).to(device, dtype)
    list(z.train(zero_1, z.make_training(zero_1, 1e-3, elements=1000), batches, 2, max_norm=0.1))
    stage = z.Stage(config, mesh, args.recompute).to(device, dtype)
    optimizer = make_fsdp_training(stage, 1e-3, not args.no_reshard_after_forward)
    steps = z.train(stage, optimizer, batches, micro_batch=2, max_norm=0.1)
    errors = {}
    for step, (expected, found) in enumerate(zip(alone, steps)):
        loss, norm = (x / y - 1 for x, y in zip(found, expected))
        errors[f"loss {step}"] = abs(loss.item())
        errors[f"norm before clipping {step}"] = abs(norm.item())
        if step == 0:
            full = {name: p.grad for name, p in plain.named_parameters()}
            shards = z.shard_state_dict(full, config, mesh)
            here = {piece.name: piece.master.grad for piece in optimizer.pieces}
            parts = {piece.name: piece.part(shards[piece.name]) for piece in optimizer.pieces}
            errors |= z.relative_errors("gradient", here, parts, floor=1e-6)
    if dtype == torch.float64:  # in fp32 Adam divides rounding errors by each other
        weights = optimizer.buffer.state_dict()
        shards = z.shard_state_dict(plain.state_dict(), config, mesh)
        errors |= z.relative_errors("weight after AdamW", weights, shards, floor=5e-3)
        others = zero_1.state_dict()
        errors |= z.relative_errors("ZeRO-1's weight", weights, others, floor=5e-3)
    return z.over_all_ranks(errors)


def demonstrate(
    args: argparse.Namespace, mesh: z.ParallelMesh, device: torch.device
) -> dict[str, float]:
    """Trains on text, next to the plain model; returns the differences of the first losses."""
    dtype = z.DTYPES[args.dtype]
    config = z.config_from(args, z.GPTConfig, seed=args.seed)
    stage = z.Stage(config, mesh, args.recompute).to(device, dtype)
    optimizer = make_fsdp_training(stage, args.lr, not args.no_reshard_after_forward)
    plain = z.GPT(config).to(device, dtype)  # on every rank, so that none waits
    alone = z.train_alone(plain, z.make_optimizer(plain, args.lr), z.text_batches(args, device))
    steps = z.train(stage, optimizer, z.text_batches(args, device), args.micro_batch)
    found = {}
    z.say("step      loss  single device    norm")
    for step, ((loss, norm), (loss_alone, _)) in enumerate(zip(steps, alone)):
        loss, norm = z.read_step(step, loss, norm)
        if step < 5 or step % 10 == 9:
            expected = loss_alone.item()
            z.say(f"{step:4}  {loss:.6f}  {expected:13.6f}  {norm:6.3f}")
        if step < 5:
            found[f"difference {step}"] = abs(loss - expected)
    return found


def memory(
    args: argparse.Namespace, mesh: z.ParallelMesh, device: torch.device
) -> dict[str, float]:
    """Bytes of a rank in bf16, with four layers and with eight; returns ratios to the formulas."""
    found = {}
    z.say("\nbytes of rank 0, bf16   parameters    at rest   16·P/dp  in use, at most    formula")
    for layers, name in itertools.product((4, 8), ("ZeRO-1", "FSDP")):
        config = z.GPTConfig(num_layers=layers, num_heads=2 * mesh.tp)
        stage = z.Stage(config, mesh).to(device, torch.bfloat16)
        P = sum(p.numel() for p in stage.parameters())
        optimizer = (make_fsdp_training if name == "FSDP" else z.make_training)(stage, args.lr)
        buckets = optimizer.buffer.buckets
        steps = z.train(stage, optimizer, z.text_batches(args, device), args.micro_batch)
        next(steps)
        in_use = sum(bucket.data.nbytes + bucket.grad.nbytes for bucket in buckets)
        formula = 6 * P
        if name == "FSDP":
            with InUse(optimizer.buffer) as seen:
                next(steps)
            in_use = seen.peak
            formula = peak_bytes(optimizer.buffer)
            found[f"at rest {layers}"] = bytes_at_rest(optimizer) / (16 * P / mesh.dp)
            found[f"in use {layers}"] = in_use / formula
        row = f"{layers} layers  {name:6} {P:15,} {bytes_at_rest(optimizer):10,}"
        z.say(f"{row} {16 * P // mesh.dp:9,} {in_use:15,} {formula:10,}")
    z.say()
    return found


# What this run has measured: (claim, paper, here, verdict).
def claims(args: argparse.Namespace, found: dict[str, float]) -> list[tuple]:
    rows = []
    for kind in ("gradient", "norm before clipping", "weight after AdamW"):
        error = z.worst(found, kind)
        claim = f"FSDP: every {kind} equals the single device's, float64"
        rows.append((claim, "exact", f"worst {error:.1e} relative", error <= z.BOUNDS["fp64"]))
    error = z.worst(found, "ZeRO-1's weight")
    claim = "FSDP: every weight after AdamW equals ZeRO-1's, float64"
    rows.append((claim, "exact", f"worst {error:.1e} relative", error <= z.BOUNDS["fp64"]))
    within = z.worst(found, "difference")
    claim = f"FSDP: the first losses equal the single device's, {args.dtype}"
    rows.append((claim, "equal", f"within {within:.0e}", within <= z.BOUNDS[args.dtype]))
    rest = z.worst(found, "at rest")
    rows.append(("FSDP: bytes of a rank at rest / (16·P/dp)", "1", f"{rest:.3f}", rest <= 1.02))
    used = z.worst(found, "in use")
    claim = "FSDP: bytes in use / formula, in which there is no number of layers"
    rows.append((claim, "at most 1", f"{used:.3f}", used <= 1))
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    z.say_setting(args)
    found = {}
    for layout in args.layouts:
        name = f"(tp, pp, dp) = {layout}"
        mesh = z.make_mesh(*layout, device, args.timeout, not args.no_sp)
        dtype = z.DTYPES[args.dtype if args.check else "fp64"]
        here = equivalence(args, mesh, device, dtype)
        if not args.check:
            z.say(f"{args.dtype}, {name}")
            here |= demonstrate(args, mesh, device)
            here |= memory(args, mesh, device)
        found |= {f"{kind}, {name}": value for kind, value in here.items()}
    if args.check:
        good = z.print_errors(found, z.BOUNDS[args.dtype])
    else:
        good = z.print_claims(claims(args, z.over_all_ranks(found)))
    sys.exit(not good)


@dataclass
class FSDPOptions:  # the script's own flags
    no_reshard_after_forward: bool = flag(False, "parameters stay gathered until their backward")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where the flags do not fit each other."""
    world = args.world_size
    given = (args.tp, args.pp, args.dp)
    args.layouts = [(1, 1, 4), (2, 1, 2)] if world == 4 else [(1, 1, world)]
    if any(given):
        args.layouts = [tuple(size or 1 for size in given)]
    config = z.config_from(args, z.GPTConfig)
    args.batch = args.batch or 2 * args.micro_batch * world
    if not args.check and args.steps < 2:
        raise ValueError(f"--steps {args.steps}: memory is that of the second step, so take 2")
    for layout in args.layouts:
        if math.prod(layout) != world:
            raise ValueError(f"(tp, pp, dp) = {layout}: the product is not {world} ranks")
        mesh = z.ParallelMesh(*layout, sp=not args.no_sp)
        z.check_heads(config, mesh.tp)
        z.place_layers(config.num_layers, mesh.pp)
        z.check_batch((args.batch, args.seq_length), args.micro_batch, mesh)


def flags() -> argparse.Namespace:
    configs = [FSDPOptions, z.Options, z.GPTConfig]
    return z.parse_flags(__doc__, configs, check_args, ranks=4, steps=20)


if __name__ == "__main__":
    z.launch(main, flags())
