# SPDX-License-Identifier: MIT-0
"""Scatter/gather: tensor-parallel ranks send a shard each of the tensor between two stages.

Paper: Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
       Narayanan et al., 2021, arXiv 2104.04473, section 4.1

    python 03_pipeline/wire_cut.py        2 stages × 2 ranks that hold the same

Chapter 7 trains with it, where tensor and pipeline parallelism run together. Here it is proven by
itself, for every schedule of chapter 3 and for sizes that do not divide.

With tensor parallelism inside the stages, all t ranks of a stage hold the same x_BSH at its end.
Sent as it is, the same tensor would pass t times over the slow network between servers. So each
rank sends 1/t of it, and the receivers all-gather inside their server, where the network is fast:

    rank 0 of 2   x ─► first half   ═══ network ═══►  rank 0  ─┐
    rank 1 of 2   x ─► second half  ═══ network ═══►  rank 1  ─┴─ all-gather ─►  x on both

It is right only where the tensor is replicated on all t ranks. Chapter 4's sequence parallelism
shards it beforehand.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pipeline as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def cut_for_wire(x: Tensor, group: pl.Group = None) -> Tensor:
    """This rank's part of x, flat, for its peer: (n,), n = x.numel() / t, rounded up.

    Args: x of any shape, replicated on the t ranks of `group`. The last parts are padded.
    Raises: ValueError on a rank that is not in `group`. Source: the paper's section 4.1.
    """
    t = pl.group_size(group)
    flat = x.detach().flatten()
    missing = -len(flat) % t
    parts = F.pad(flat, (0, missing)).view(t, -1)
    return parts[pl.group_rank(group)]


def join_from_wire(part: Tensor, shape: tuple[int, ...], group: pl.Group = None) -> Tensor:
    """The tensor of `shape` from the parts that the ranks of `group` received. Collective.

    Args: part: (n,), as `cut_for_wire` returns it.
    Raises: ValueError on a rank that is not in `group`. Source: the paper's section 4.1.
    """
    t = pl.group_size(group)
    full = part
    if t > 1:
        full = part.new_empty(t * len(part))
        dist.all_gather_into_tensor(full, part, group)
    return full[: math.prod(shape)].view(shape)


class WireCutMailbox(pl.Mailbox):
    """A mailbox whose messages are cut over `tp_group`. Source: the paper's section 4.1.

    Use: run_step(..., make_mailbox=partial(WireCutMailbox, tp_group)). Every rank of `tp_group`
    runs the same program.
    """

    def __init__(self, tp_group: pl.Group, *args: Any):
        super().__init__(*args)
        self.tp_group = tp_group

    def pack(self, x: Tensor) -> Tensor:
        return cut_for_wire(x, self.tp_group).to(self.wire)

    def unpack(self, received: Tensor, shape: tuple) -> Tensor:
        return join_from_wire(received, shape, self.tp_group).to(self.device)


def make_meshes(device: torch.device, timeout: float = 60.0) -> tuple[pl.Mesh, pl.Group]:
    """2 stages × t ranks that hold the same: this rank's mesh and its tensor-parallel group.

    What would be t replicas of a pipeline are one pipeline of tensor-parallel ranks.
    """
    replicas = pl.make_mesh(2, device, timeout)
    alone = pl.make_group([[r] for r in range(dist.get_world_size())], device, timeout)
    mesh = replace(replicas, dp=1, dp_rank=0, dp_group=alone)
    return mesh, replicas.dp_group


def gradients(mesh: pl.Mesh, batch: Tensor, make_mailbox: Any) -> pl.StateDict:
    """Of one step under 1F1B; batch: tokens and targets, (2, B, S)."""
    config = pl.GPTConfig(num_layers=3)
    stage = pl.PipelineStage(config, mesh.pp_rank, 2).to(batch.device, torch.float64)
    program = pl.programs(pl.schedule("1f1b", 2, 4))[mesh.pp_rank]
    pl.run_step(stage, program, *batch, mesh, make_mailbox=make_mailbox)
    return {name: p.grad for name, p in stage.named_parameters()}


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh, tp_group = make_meshes(device, args.timeout)
    generator = torch.Generator().manual_seed(args.seed)
    batch_2BS = torch.randint(256, (2, 9, 63), generator=generator).to(device)
    full = gradients(mesh, batch_2BS, pl.Mailbox)
    make_mailbox = partial(WireCutMailbox, tp_group)
    cut = gradients(mesh, batch_2BS, make_mailbox)
    equal = all(torch.equal(full[name], grad) for name, grad in cut.items())
    rows = [("gradients are those of full messages, to the bit", "equal", str(equal), equal)]
    if not pl.print_claims(rows):
        raise SystemExit(1)


def check_args(args: argparse.Namespace) -> None:
    if args.world_size % 2:
        raise ValueError(f"{args.world_size} ranks: two stages need an even number")


def flags() -> argparse.Namespace:
    return pl.parse_flags(__doc__, [], check_args, ranks=4, steps=1)


if __name__ == "__main__":
    pl.launch(main, flags())
