# SPDX-License-Identifier: MIT-0
"""Chapter 5's model on a mesh: its tokens over cp ranks as well, and more tp ranks than groups.

    python 05_mamba_hybrid/context_parallel.py                      4 local ranks, tp 2 × cp 2
    python 05_mamba_hybrid/context_parallel.py --ranks 3 --check    each tensor's error, each layout
    torchrun --nproc-per-node=8 05_mamba_hybrid/context_parallel.py --tp 4 --cp 2

The chapter scans a sequence that is sharded over ranks, and shards a model by heads. Here the whole
model has its tokens over ranks, in any lengths, and documents may begin anywhere. It proves every
layout of the ranks in float64, with a group for each tp rank and with one in all, trains on text
next to the plain model, and prints the claims that it has measured. Exit code 1 where one is wrong.

Left out: load balance of attention over cp (later ranks have more keys); attention without a mask
of t × S elements, and messages that are hidden under GEMMs, as ring attention has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mamba_hybrid as chapter
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mamba_hybrid import (
    ALL,
    Attention,
    Documents,
    Errors,
    Group,
    HybridConfig,
    Mamba2Mixer,
    ParallelHybridLM,
    RMSNorm,
    SquaredReLUMLP,
    StateDict,
    _all_reduce,
    at_least_fp32,
    components,
    copy_to_tp,
    from_earlier_ranks,
    group_rank,
    initial_weights,
    is_sharded,
    reduce_from_tp,
    ssd_context_parallel,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ── 1 The mesh ──────────────────────────────────────────────────────────────────────────────────
#
# The ranks are a device mesh of two dimensions. With tp 2 and cp 2:
#
#                        tp rank 0     tp rank 1
#     tokens 0 … 4999     rank 0        rank 1        ← a tp group: the same tokens, other heads
#     tokens 5000 …       rank 2        rank 3
#                           ↑ a cp group: the same weights, other tokens
#
# Context parallelism shards the sequence everywhere; chapter 4's sequence parallelism shards it
# only in the layers that tensor parallelism replicates. (The Mamba-2 paper calls the former by the
# name of the latter.) Every rank is given the full tokens_BT, which is small, and works on its own
# part.


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the device mesh. Make it with `make_mesh`."""

    tp: int  # ranks that share the weights, by heads
    cp: int  # ranks that share a sequence, by tokens
    tp_rank: int
    cp_rank: int
    tp_group: Group
    cp_group: Group
    # For each divisor of tp: the group of that many neighbouring tp ranks with this one.
    neighbours: dict[int, Group] = field(default_factory=dict)


def make_mesh(tp: int, device: torch.device, timeout: float = 60.0) -> Mesh:
    """Lays all ranks out as (cp, tp), with neighbours in a tp group. Collective over all ranks.

    Args: timeout in seconds. Raises: ValueError where tp does not divide the ranks.
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    if tp < 1 or world % tp:
        raise ValueError(f"tp={tp} does not divide the {world} ranks")
    neighbours = {}
    for size in range(1, tp + 1):
        if tp % size == 0:
            lists = [list(range(first, first + size)) for first in range(0, world, size)]
            neighbours[size] = chapter.make_group(lists, device, timeout)
    cp_lists = [list(range(first, world, tp)) for first in range(tp)]
    cp_group = chapter.make_group(cp_lists, device, timeout)
    return Mesh(tp, world // tp, rank % tp, rank // tp, neighbours[tp], cp_group, neighbours)


# ── 2 Tokens over ranks ─────────────────────────────────────────────────────────────────────────
#
# The convolution needs the last K − 1 inputs of the rank before (a halo), the recurrence a state,
# attention all earlier keys and values. All three come through `from_earlier_ranks`.


@dataclass(frozen=True)
class ShardedSpan(chapter.Span):
    """A `Span` of a sequence that is sharded over a cp group."""

    lengths: list[int] = field(default_factory=list)  # tokens of each rank
    group: Group = None


def shard_lengths(T: int, cp: int, taps: int) -> list[int]:
    """Tokens of each cp rank: the first ones have one more where cp does not divide T.

    Raises: ValueError where the convolution would look back further than to the rank before.
    """
    lengths = [T // cp + (rank < T % cp) for rank in range(cp)]
    if cp > 1 and lengths[-1] < taps - 1:
        found = f"{T} tokens over cp={cp} leave {lengths[-1]} to the last rank"
        need = f"a convolution of {taps} taps needs {taps - 1} on each"
        raise ValueError(f"{found}, but {need}: use fewer ranks, or longer sequences")
    return lengths


def halo(u_BtC: Tensor, width: int, group: Group = None) -> Tensor:
    """The last `width` tokens of the rank before, (B, width, C); zeros on the first. Collective.

    Raises: ValueError where this rank has fewer tokens; the others would wait, so check all lengths
        first. Source: ours.
    """
    t = u_BtC.shape[1]
    if t < width:
        raise ValueError(f"{t} tokens on this rank; the next one needs the last {width} of them")
    # Rank 0 takes index −1, the last rank's: always zeros.
    of_ranks = from_earlier_ranks(u_BtC[:, t - width :], group)
    return of_ranks[group_rank(group) - 1]


def keys_of_all_ranks(kv_BGtP: Tensor, lengths: list[int], group: Group = None) -> Tensor:
    """Keys and values (B, G, t, 2P) of this rank and all earlier ones, (B, G, S, 2P). Collective.

    Args: lengths: tokens of each rank; messages are padded to the longest. Source: ours.
    """
    padding = max(lengths) - kv_BGtP.shape[2]
    of_ranks = from_earlier_ranks(F.pad(kv_BGtP, (0, 0, 0, padding)), group)
    rank = group_rank(group)
    parts = []
    for kv, length in zip(of_ranks[:rank], lengths):
        parts.append(kv[:, :, :length])
    # The later ranks' zeros with length 0: so every rank's graph leads to the reduce-scatter.
    for kv in of_ranks[rank:]:
        parts.append(kv[:, :, :0])
    return torch.cat([*parts, kv_BGtP], 2)


class ShardedMixer(Mamba2Mixer):
    """`Mamba2Mixer` of this rank's tokens: x_BtD to (B, t, D). Args of `scan`: as `ssd`'s."""

    def with_earlier_inputs(self, u_BTC: Tensor, span: ShardedSpan) -> Tensor:
        before_BKC = halo(u_BTC, self.config.conv_kernel - 1, span.group)
        return torch.cat([before_BKC, u_BTC], 1)

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: ShardedSpan) -> Tensor:
        y_BtHP, _ = ssd_context_parallel(X, a, B, C, self.config.chunk, span.group)
        return y_BtHP


class ShardedAttention(Attention):
    """`Attention` of this rank's tokens: x_BtD to (B, t, D)."""

    def attend(self, q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, span: ShardedSpan) -> Tensor:
        kv_BGTP = torch.cat([k_BGSP, v_BGSP], -1)  # one message for both
        kv_BGSP = keys_of_all_ranks(kv_BGTP, span.lengths, span.group)
        k_BGSP, v_BGSP = kv_BGSP.chunk(2, -1)
        return super().attend(q_BHTP, k_BGSP, v_BGSP, span)


SHARDED = {"M": ShardedMixer, "*": ShardedAttention, "-": SquaredReLUMLP}

# ── 3 More ranks than groups ────────────────────────────────────────────────────────────────────
#
# With fewer groups than tp ranks, neighbouring ranks need the same B and C, and each has a copy of
# their weights (Megatron-LM refuses this). So a rank's layer is that of a model with more groups,
# in which each group stands there several times:
#
#     in_proj.weight of 4 heads, 2 groups:   z z z z │ x x x x │ B B     │ C C     │ dt dt dt dt
#     with copies, for 4 ranks:              z z z z │ x x x x │ B B B B │ C C C C │ dt dt dt dt
#
# Two things follow:
#
# · The channels of a group are on several ranks, and the norm needs one mean square over them: a
#   scalar per token is summed over these ranks, in forward and in backward.
# · Each copy gets the gradient of its own heads, a partial sum. It is all-reduced at the *weights*,
#   once per step. All-reduced at the activations B and C, each copy's contribution to dx would be
#   complete already, and copy_to_tp would sum it once more.


def with_copies(config: HybridConfig, tp: int) -> HybridConfig:
    """The configuration in which there are at least tp groups, some of them copies."""
    more = {}
    for kind in ("mamba", "attention"):
        groups = getattr(config, f"{kind}_groups")
        heads = getattr(config, f"{kind}_heads")
        if tp % groups == 0 and heads % tp == 0:
            more[f"{kind}_groups"] = tp
    return replace(config, **more)


def component_copies(name: str, config: HybridConfig, tp: int) -> list[tuple[int, int]]:
    """Of each component of a mixer's parameter: its size with copies, and how many of each."""
    _, sizes = components(name, config)
    _, larger_sizes = components(name, with_copies(config, tp))
    return [(larger, larger // size) for size, larger in zip(sizes, larger_sizes)]


def copy_groups(name: str, full: Tensor, config: HybridConfig, tp: int) -> Tensor:
    """The plain model's parameter `name` (...) as `with_copies`'s model has it."""
    if not is_sharded(name):
        return full
    dim, sizes = components(name, config)
    parts = []
    for part, (larger, copies) in zip(full.split(sizes, dim), component_copies(name, config, tp)):
        if copies > 1:
            groups = part.unflatten(dim, (-1, larger // tp))
            part = groups.repeat_interleave(copies, dim).flatten(dim, dim + 1)
        parts.append(part)
    return torch.cat(parts, dim)


def drop_copies(name: str, x: Tensor, config: HybridConfig, tp: int) -> Tensor:
    """Undoes `copy_groups`. Raises: ValueError where copies differ."""
    if not is_sharded(name):
        return x
    dim, _ = components(name, config)
    parts_and_copies = component_copies(name, config, tp)
    parts = []
    for part, (larger, copies) in zip(
        x.split([larger for larger, _ in parts_and_copies], dim), parts_and_copies
    ):
        if copies > 1:
            of_copies = part.unflatten(dim, (-1, copies, larger // tp))
            first = of_copies.narrow(dim + 1, 0, 1)
            if not torch.allclose(of_copies, first, 0, 0, equal_nan=True):
                same = "should be the same on all ranks that hold it"
                raise ValueError(f"{name} {same}, but copies differ")
            part = first.flatten(dim, dim + 2)
        parts.append(part)
    return torch.cat(parts, dim)


def shard_with_copies(name: str, full: Tensor, config: HybridConfig, rank: int, tp: int) -> Tensor:
    """The chapter's `shard_tensor`, with copies where there are fewer groups than ranks."""
    more = with_copies(config, tp)
    return chapter.shard_tensor(name, copy_groups(name, full, config, tp), more, rank, tp)


def shard_for_mesh(full: StateDict, config: HybridConfig, rank: int, tp: int) -> StateDict:
    """The plain model's state dict to that of tp rank `rank`. Raises: as the chapter's."""
    chapter.check_shapes(full, config)
    chapter.local_config(with_copies(config, tp), tp)  # for what it raises
    return {name: shard_with_copies(name, x, config, rank, tp) for name, x in full.items()}


def merge_from_mesh(shards: list[StateDict], config: HybridConfig) -> StateDict:
    """All tp ranks' state dicts, in order, to the plain model's: undoes `shard_for_mesh`.

    Gradients work as well. Raises: ValueError where copies differ between ranks.
    """
    tp = len(shards)
    merged = chapter.merge_state_dicts(shards, with_copies(config, tp))
    return {name: drop_copies(name, x, config, tp) for name, x in merged.items()}


class SharedNorm(RMSNorm):
    """`RMSNorm` over a group of channels that is sharded over `group`: x_BTC to (B, T, C)."""

    def __init__(self, size: int, eps: float, group: Group):
        super().__init__(size, eps)
        self.group = group

    def mean_square(self, x_BTGC: Tensor) -> Tensor:
        partial_BTG1 = super().mean_square(x_BTGC) / chapter.group_size(self.group)
        # Every rank's channels depend on this mean: its gradient is a partial sum, too.
        return copy_to_tp(reduce_from_tp(partial_BTG1, self.group), self.group)


# ── 4 The model ─────────────────────────────────────────────────────────────────────────────────


class MeshHybridLM(ParallelHybridLM):
    """`HybridLM` on a mesh: the full tokens_BT to this rank's logits_BtV; `loss` too is (B, t).

    Its weights are those of HybridLM(config), for every mesh; one full tensor at a time is in
    memory.
    Args: layers: what to build for each letter where cp > 1, or for every cp.
    Raises: ValueError where sizes do not divide, or a rank would get fewer than K − 1 tokens.
    """

    def __init__(self, config: HybridConfig, mesh: Mesh, layers: dict[str, Callable] | None = None):
        if layers is None:
            layers = SHARDED if mesh.cp > 1 else chapter.LAYERS
        with torch.device("meta"):  # shapes first, without memory
            super().__init__(with_copies(config, mesh.tp), mesh.tp_group, layers)
            self.share_norms(config, mesh)
        self.config = config
        self.mesh = mesh
        if torch.get_default_device().type == "meta":
            return
        shards = {}
        for name, full in initial_weights(config):
            shards[name] = shard_with_copies(name, full, config, mesh.tp_rank, mesh.tp)
        self.load_state_dict(shards, assign=True)

    def share_norms(self, config: HybridConfig, mesh: Mesh) -> None:
        """Gives the Mamba layers a norm over the ranks that share a group."""
        holders = mesh.tp // config.mamba_groups
        for layer in self.layers:
            mixer = layer["mixer"]
            if holders > 1 and isinstance(mixer, Mamba2Mixer):
                size = len(mixer.norm.weight)
                mixer.norm = SharedNorm(size, config.norm_eps, mesh.neighbours[holders])

    def lengths(self, x_BT: Tensor) -> list[int]:
        """Tokens of each cp rank."""
        return shard_lengths(x_BT.shape[1], self.mesh.cp, self.config.conv_kernel)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """Of a tensor for the full sequence, the part of this rank's tokens."""
        return x_BT.split(self.lengths(x_BT), 1)[self.mesh.cp_rank]

    def span(self, tokens_BT: Tensor, starts_BT: Documents = None) -> ShardedSpan:
        """What the layers are told of this rank's tokens."""
        lengths = self.lengths(tokens_BT)
        document_BS = None
        if starts_BT is not None:
            last = sum(lengths[: self.mesh.cp_rank + 1])
            starts = torch.zeros_like(tokens_BT).masked_fill_(starts_BT, 1)
            document_BS = starts.cumsum(1)[:, :last]
        return ShardedSpan(document_BS, lengths, self.mesh.cp_group)

    def forward(self, tokens_BT: Tensor, starts_BT: Documents = None) -> Tensor:
        span = self.span(tokens_BT, starts_BT)
        return self.logits(self.local_tokens(tokens_BT), span)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Documents = None) -> Tensor:
        return super().loss(tokens_BT, self.local_tokens(targets_BT), starts_BT)

    def after_backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """As `HybridLM`'s, of the full batch and model, the same on every rank. Collective."""
        reduce_gradients(self)
        loss = _all_reduce(loss.detach().clone(), self.mesh.cp_group)
        return loss, grad_norm(self)

    def gather(self, tensors: StateDict) -> StateDict:
        tp = self.mesh.tp
        more = with_copies(self.config, tp)
        full = chapter.gather_state_dict(tensors, more, self.mesh.tp_group)
        return {name: drop_copies(name, x, self.config, tp) for name, x in full.items()}


# ── 5 Training ──────────────────────────────────────────────────────────────────────────────────
#
# After backward, three kinds of gradients need three things:
#
#     all parameters              each cp rank has seen its own tokens: all-reduced over cp
#     copies of groups' weights   each holder has its own heads' part: all-reduced over the holders
#     everything else             complete, thanks to copy_to_tp
#
# Then the norm before clipping: squares are summed over tp, and of p copies each counts 1/p.
# Without the second all-reduce B and C are trained with a part of their gradient, the copies drift
# apart, and the loss falls all the same.
#
# Under cp the chapter's `train` divides the sum of a rank's losses by the count of *all* tokens
# that have a target. Such partial sums add up to the mean, and so do their gradients. A mean of the
# ranks' means would count a token on a rank with few targets more than others.


def gradient_parts(model: MeshHybridLM) -> list[tuple[str, Tensor, int]]:
    """Parameter name, a part of its gradient (a view of it), and the tp ranks that hold the part.

    A missing gradient becomes zero: were it left out, ranks could all-reduce unequal buffers.
    """
    tp = model.mesh.tp
    found = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if not is_sharded(name):
            found.append((name, p.grad, tp))
            continue
        dim, _ = components(name, model.config)
        parts = component_copies(name, model.config, tp)
        grads = p.grad.split([larger // tp for larger, _ in parts], dim)
        for grad, (_, copies) in zip(grads, parts):
            found.append((name, grad, copies))
    return found


def sum_over(parts: list[Tensor], group: Group) -> None:
    """All-reduces each tensor (...) in place, in one flat buffer for each dtype."""
    for dtype in sorted({part.dtype for part in parts}, key=str):
        same = [part for part in parts if part.dtype == dtype]
        flat = torch.cat([part.flatten() for part in same])
        _all_reduce(flat, group)
        totals = flat.split([part.numel() for part in same])
        for part, total in zip(same, totals):
            part.copy_(total.view_as(part))


def reduce_gradients(model: MeshHybridLM) -> None:
    """Both all-reduces above. Collective; once per step, after backward and before clipping."""
    parts = gradient_parts(model)
    if model.mesh.cp > 1:
        sum_over([part for _, part, _ in parts], model.mesh.cp_group)
    for holders, group in model.mesh.neighbours.items():
        # Replicated parameters have complete gradients already.
        copies = [x for name, x, held_by in parts if held_by == holders and is_sharded(name)]
        if holders > 1 and copies:
            sum_over(copies, group)


def grad_norm(model: MeshHybridLM) -> Tensor:
    """The norm of the full gradient before clipping, a scalar, the same on every rank. Collective
    over tp."""
    squares = []
    for _, part, copies in gradient_parts(model):
        squares.append(at_least_fp32(part).square().sum() / copies)
    total = torch.stack(squares).sum()
    return _all_reduce(total, model.mesh.tp_group).sqrt()


# ── 6 The demonstration ─────────────────────────────────────────────────────────────────────────


def mesh_equivalence(
    mesh: Mesh,
    groups: int,
    device: torch.device,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
) -> Errors:
    """The chapter's `equivalence` of a model on this mesh; tokens that cp does not divide."""
    T = 6 * mesh.cp + 1
    config, batch = chapter.check_case(device, mesh.tp, groups, T)
    model = MeshHybridLM(config, mesh).to(device, dtype)
    return chapter.equivalence(model, batch, autocast)


def check(
    device: torch.device, timeout: float, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> Errors:
    """`mesh_equivalence` for every layout of the ranks, with one group per tp rank and one in all.

    Returns: "tensor, layout" to error.
    """
    found = {}
    world = chapter.group_size()
    for tp in range(world, 0, -1):
        if world % tp:
            continue
        mesh = make_mesh(tp, device, timeout)
        for groups in sorted({tp, 1}, reverse=True):
            errors = mesh_equivalence(mesh, groups, device, dtype, autocast)
            layout = f"tp {tp} × cp {mesh.cp}, G {groups}"
            largest = chapter.worst(errors)
            chapter.say(f"{layout}: worst of {len(errors)} errors {largest:.1e}")
            found |= {f"{name}, {layout}": error for name, error in errors.items()}
    return found


class Sent(TorchDispatchMode):
    """`with Sent() as sent:` lists the bytes of this rank's collectives in sent.bytes: of the input
    or the output, the larger."""

    def __enter__(self) -> Sent:
        self.bytes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function.namespace == "c10d" and "barrier" not in function.name():
            sizes = []
            for arg in args:
                tensors = [x for x in tree_leaves(arg) if isinstance(x, Tensor)]
                sizes.append(sum(x.nbytes for x in tensors))
            self.bytes.append(max(sizes))
        return function(*args, **(kwargs or {}))


def layer_messages(mesh: Mesh, T: int, device: torch.device) -> tuple[list[int], list[int]]:
    """Bytes of each message of a Mamba layer on T tokens, in forward and in backward."""
    config = HybridConfig(pattern="M", mamba_heads=4 * mesh.tp, mamba_groups=mesh.tp)
    model = MeshHybridLM(config, mesh).to(device)
    tokens_BT = torch.zeros(1, T, dtype=torch.int64, device=device)
    span = model.span(tokens_BT) if mesh.cp > 1 else ALL
    x_BtD = model.embedding(model.local_tokens(tokens_BT))
    with Sent() as forward:
        y_BtD = model.run(model.layers[0], x_BtD, span)
    with Sent() as backward:
        y_BtD.sum().backward()
    return forward.bytes, backward.bytes


def message_claims(args: argparse.Namespace, device: torch.device) -> list[tuple]:
    """The claims about messages of one Mamba layer: (claim, paper, here, verdict)."""
    world = chapter.group_size()
    forward, backward = layer_messages(make_mesh(world, device, args.timeout), 64, device)
    here = f"{len(forward)} + {len(backward)}"
    claim = "all-reduces of a Mamba layer under tp, forward + backward"
    rows = [(claim, "1 + 1", here, here == "1 + 1")]
    sizes = []
    mesh = make_mesh(1, device, args.timeout)
    for T in (128 * world, 512 * world):
        forward, backward = layer_messages(mesh, T, device)
        sizes.append(sum(forward) + sum(backward))
    few, many = sizes
    claim = "bytes that a Mamba layer sends under cp, at 1 and 4 times the tokens"
    rows.append((claim, "equal", f"{few:,}, {many:,}", few == many))
    return rows


def measure(args: argparse.Namespace, mesh: Mesh, device: torch.device) -> list[tuple]:
    """Proof and demonstration: rows of (claim, paper, here, verdict)."""
    errors = check(device, args.timeout, torch.float64)
    kinds = ["gradient", "norm before clipping", "weight after AdamW"]
    differences = chapter.demonstrate(args, device, partial(MeshHybridLM, mesh=mesh))
    rows = []
    for claim, *rest in chapter.claims(args, kinds, errors, differences):
        rows.append((f"on a mesh, {claim}", *rest))
    if chapter.group_size() > 1:
        rows += message_claims(args, device)
    return rows


def main(args: argparse.Namespace, device: torch.device) -> None:
    chapter.say_setting(args, f": tp {args.tp} × cp {args.cp}")
    if args.check:
        errors = check(device, args.timeout, *chapter.dtypes(args))
        good = chapter.print_errors(errors, chapter.BOUNDS[args.dtype])
    else:
        mesh = make_mesh(args.tp, device, args.timeout)
        good = chapter.print_claims(measure(args, mesh, device))
    if not good:
        raise SystemExit(1)


@dataclass
class MeshOptions:  # the flags that mamba_hybrid.py does not have
    tp: int | None = chapter.flag(None, "ranks that share the heads; None: what fits", least=1)
    cp: int | None = chapter.flag(None, "ranks that share a sequence; None: all others", least=1)


def check_args(args: argparse.Namespace) -> None:
    """Resolves --tp and --cp. Raises ValueError where flags and ranks do not fit."""
    config = chapter.choose_sizes(args, 1)
    ranks = args.world_size
    if args.tp is None and args.cp is None:
        args.tp = largest_tp(config, ranks)
    if args.tp is None:
        args.tp = max(1, ranks // args.cp)
    if args.cp is None:
        args.cp = max(1, ranks // args.tp)
    if args.tp * args.cp != ranks:
        raise ValueError(f"--tp {args.tp} times --cp {args.cp} must be the {ranks} ranks")
    shard_lengths(args.seq_length, args.cp, config.conv_kernel)  # for what it raises
    if not args.check:
        chapter.local_config(with_copies(config, args.tp), args.tp)


def largest_tp(config: HybridConfig, ranks: int) -> int:
    """The most ranks that can share these heads and features, among the divisors of `ranks`; with
    4 ranks and more, at most half of them, so that tokens are sharded as well."""
    for tp in range(max(1, ranks // 2) if ranks >= 4 else ranks, 0, -1):
        try:
            chapter.local_config(with_copies(config, tp), tp)
        except ValueError:
            continue
        if ranks % tp == 0:
            return tp
    return 1


def flags() -> argparse.Namespace:
    return chapter.parse_flags(
        __doc__, [MeshOptions, chapter.Options], check_args, ranks=4, steps=60
    )


if __name__ == "__main__":
    chapter.launch(main, flags())
