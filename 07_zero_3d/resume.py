# SPDX-License-Identifier: MIT-0
"""A run that is stopped and goes on, on the same mesh or on another: batch ramp, schedule, state.

Papers: MT-NLG 530B (arXiv 2201.11990) and BLOOM 176B (arXiv 2211.05100): their ramps and schedules
count samples. The layout of the state is that of Megatron-LM's distributed checkpoints.

    python 07_zero_3d/resume.py --checkpoint /tmp/run                           4 ranks: 2 × 1 × 2
    python 07_zero_3d/resume.py --checkpoint /tmp/run --steps 20 --pp 4         goes on as 1 × 4 × 1
    torchrun --nproc-per-node=8 07_zero_3d/resume.py --checkpoint DIR --tp 2 --pp 2 --dp 2

It trains zero_3d.py's model in the dtype of --dtype (on the CPU fp32; --dtype bf16 has masters). On
the same mesh a resumed run equals the one that was never stopped, to the bit. On several machines
DIR must be on a disk that all of them share.

Left out: loading without merging on every rank, asynchronous saving, the data loader's state.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zero_3d as z
from torch import Tensor
from zero_3d import flag

# ── 1 Batch size and learning rate, counted in samples ──────────────────────────────────────────
#
# Both runs began with small batches: early gradients agree, and a small batch wastes fewer samples.
# MT-NLG went from 32 to 1,920 sequences in steps of 32 over 12 billion tokens, BLOOM from 192 to
# 2,048 in steps of 16 over 9,765,625 samples. A step then has no fixed size, so every schedule
# counts samples. Counted in steps, the ramp would end at another time, and the learning rate with
# it. Every size on the way must divide by micro-batch · dp, so the increment must.


@dataclass(frozen=True)
class RampupBatchSize:
    """The batch size after so many samples. Source: both papers; Megatron-LM's rampup.

    Raises: ValueError where the increments miss the final size.
    """

    start: int
    increment: int
    samples: int  # over which it grows
    final: int

    def __post_init__(self):
        if self.increment < 1 or (self.final - self.start) % self.increment:
            sizes = f"from {self.start} to {self.final} in steps of {self.increment}"
            raise ValueError(f"{sizes}: the last step must reach the final size")

    def __call__(self, consumed: int) -> int:
        if consumed >= self.samples:
            return self.final
        increments = (self.final - self.start) // self.increment
        reached = consumed * increments // self.samples
        return self.start + reached * self.increment

    def check(self, micro_batch: int, dp: int) -> None:
        """Raises ValueError where a batch size on the way does not divide."""
        rows = micro_batch * dp
        for name in ("start", "increment"):
            size = getattr(self, name)
            if size % rows:
                found = f"{name}={size} with micro_batch={micro_batch} on dp={dp} replicas"
                raise ValueError(f"{found}: choose a multiple of {rows}")


def learning_rate(consumed: int, peak: float, least: float, warmup: int, decay: int) -> float:
    """Linear warm-up over `warmup` samples, then a cosine to `least` at `decay` samples.

    Source: both papers; Megatron-LM's schedule.
    """
    if consumed < warmup:
        return peak * consumed / warmup
    progress = (consumed - warmup) / (decay - warmup)
    angle = math.pi * min(1.0, progress)
    share = (1 + math.cos(angle)) / 2
    return least + share * (peak - least)


# ── 2 Optimizer state, by name and offset ───────────────────────────────────────────────────────
#
# A rank's shard of a bucket means nothing to another mesh: with other dp, tp or pp the boundaries
# move, and the padding with them. (Saved as flat buckets, padding included, a checkpoint loads at
# equal dp only.) So a rank saves pieces: the parameter's name, and where the piece begins in this
# tp rank's shard of it. Merged, they are tensors of the plain model's shapes, by key: "master",
# "exp_avg", "exp_avg_sq". Any mesh cuts its own pieces from those.
#
# Masters are saved and loaded. Rebuilt from bf16 parameters they would lose 16 bits. The loss does
# not show it, but small steps that had added up are gone, and the run is another run.

RankState = dict[str, dict[str, Any]]  # name to {"start": offset, "master": (n,), ...}
FullState = dict[str, z.StateDict]  # key to {name: tensor of the plain model's shape}


def optimizer_state_dict(optimizer: z.DistributedOptimizer) -> RankState:
    """This rank's state, copied to the CPU: name to offset, master and the optimizer's keys."""
    state = {}
    for piece in optimizer.pieces:
        moments = optimizer.optimizer.state.get(piece.master, {})
        found = {"start": piece.start, "master": piece.master.cpu().clone()}
        for key, x in moments.items():
            if x is not None:
                found[key] = x.cpu().clone()
        state[piece.name] = found
    return state


def merge_optimizer_states(
    states: list[RankState], config: z.GPTConfig, mesh: z.ParallelMesh
) -> FullState:
    """All ranks' states, in order of rank, to {key: {name: tensor of the plain model's shape}}.

    Raises: ValueError for a missing rank, and for an element that is in no piece or in two.
    """
    if len(states) != mesh.tp * mesh.pp * mesh.dp:
        sizes = f"{mesh.tp} × {mesh.pp} × {mesh.dp}"
        raise ValueError(f"{len(states)} states of ranks, but the mesh is {sizes}")
    shards: dict[str, list[z.StateDict]] = {}  # key to the tensors of each rank of one replica
    steps: z.StateDict = {}
    for pp_rank, tp_rank in itertools.product(range(mesh.pp), range(mesh.tp)):
        ranks = [z.rank_of(mesh, tp_rank, pp_rank, dp_rank) for dp_rank in range(mesh.dp)]
        place = z.ParallelMesh(mesh.tp, mesh.pp, tp_rank=tp_rank, pp_rank=pp_rank)
        joined: FullState = {}
        for name, shape in shard_shapes(config, place).items():
            here = [states[rank] for rank in ranks]
            pieces = [state[name] for state in here if name in state]
            for key, x in join_pieces(name, pieces, shape).items():
                if x.ndim == 0:
                    steps[name] = x  # "step", one for each parameter
                else:
                    joined.setdefault(key, {})[name] = x
        for key, tensors in joined.items():
            shards.setdefault(key, []).append(tensors)
    one = z.ParallelMesh(mesh.tp, mesh.pp)
    full = {}
    for key, tensors in shards.items():
        full[key] = z.merge_state_dicts(tensors, config, one)
    if steps:
        full["step"] = steps
    return full


def shard_shapes(config: z.GPTConfig, mesh: z.ParallelMesh) -> dict[str, torch.Size]:
    """Name to shape of each parameter on this rank, without memory."""
    full = {}
    for name, shape in z.parameter_shapes(config).items():
        full[name] = torch.empty(shape, device="meta")
    shards = z.shard_state_dict(full, config, mesh)
    return {name: x.shape for name, x in shards.items()}


def join_pieces(name: str, pieces: list[dict[str, Any]], shape: torch.Size) -> z.StateDict:
    """The pieces of one parameter, of all replicas, to tensors of `shape`, by key.

    Raises: ValueError where an element is in no piece, or in two.
    """
    pieces = sorted(pieces, key=lambda piece: piece["start"])
    end = 0
    for piece in pieces:
        if piece["start"] < end:
            raise ValueError(f"{name}: element {piece['start']} is in two pieces: one shard twice?")
        if piece["start"] == end:
            end += len(piece["master"])
    if end != shape.numel():
        raise ValueError(f"{name}: element {end} of {shape.numel()} is in no piece: lost a shard?")
    joined = {}
    for key, x in pieces[0].items():
        if key != "start":
            if x.ndim:
                parts = [piece[key] for piece in pieces]
                x = torch.cat(parts).view(shape)
            joined[key] = x
    return joined


@torch.no_grad()
def load_optimizer_state(
    optimizer: z.DistributedOptimizer, full: FullState, config: z.GPTConfig, mesh: z.ParallelMesh
) -> None:
    """Cuts this rank's pieces from a merged state; parameters follow from the masters. Collective.

    Nothing of the optimizer's own state remains, also where the merged one is of step 0.
    Raises: ValueError for the state of another model, before anything is changed.
    """
    shards = {}
    for key, tensors in full.items():
        if key != "step":
            shards[key] = z.shard_state_dict(tensors, config, mesh)
    for piece in optimizer.pieces:
        state = optimizer.optimizer.state[piece.master]
        state.clear()
        for key, tensors in shards.items():
            x = piece.part(tensors[piece.name])
            if key == "master":
                piece.master.copy_(x)
            else:
                state[key] = x.to(piece.master, copy=True)
        if "step" in full:
            state["step"] = full["step"][piece.name].clone()
    optimizer.gather_parameters()


# ── 3 Files ─────────────────────────────────────────────────────────────────────────────────────
#
# One folder for each saved step, one file for each rank. The folder gets its name when every file
# is in it: a run that is killed while it saves leaves a folder that no loader looks at.


def save(folder: Path, step: int, optimizer: z.DistributedOptimizer, run: dict[str, Any]) -> None:
    """Writes folder/step-N. Collective. run: what else to keep; `load` needs "mesh" and "config".

    Raises: ValueError on every rank, before anything is written, where folder/step-N exists, and
        where a parameter is frozen: it has no piece, so no loader would find it.
    """
    rank = z.group_rank()
    partial = folder / f"unfinished-{step}"
    complete = folder / f"step-{step}"
    names = {name for bucket in optimizer.buffer.buckets for name in bucket.params}
    exists, trained = zip(*_everyone((complete.exists(), names)))
    if any(exists):
        raise ValueError(f"{complete} exists: move it away, or save in another folder")
    config = z.GPTConfig(**run["config"])
    frozen = z.parameter_shapes(config).keys() - set().union(*trained)
    if frozen:
        raise ValueError(f"a checkpoint has trained parameters only, frozen: {sorted(frozen)[:4]}")
    partial.mkdir(parents=True, exist_ok=True)  # on every rank: where it fails, none waits
    kept = {"state": optimizer_state_dict(optimizer), **run}
    torch.save(kept, partial / f"rank-{rank}.pt")
    _barrier()
    if rank == 0:
        os.replace(partial, complete)
    _barrier()


def _barrier() -> None:
    if z.group_size() > 1:
        dist.barrier()


def _everyone(mine: Any) -> list:
    found = [mine] * z.group_size()
    if len(found) > 1:
        dist.all_gather_object(found, mine)
    return found


def newest(folder: Path) -> int | None:
    """The last step that was saved completely; None: no such. Other names do not count."""
    steps = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdecimal() and number == str(int(number)):
            steps.append(int(number))
    return max(steps, default=None)


def load(folder: Path, step: int, config: z.GPTConfig) -> tuple[FullState, dict]:
    """The merged state of a step, and what else `save` kept.

    Raises: ValueError for a checkpoint of another model, and for a missing or broken file.
    """
    path = folder / f"step-{step}"
    first = _read(path / "rank-0.pt")
    if first["config"] != asdict(config):
        raise ValueError(f"{path} is of another model: {first['config']}")
    mesh = z.ParallelMesh(*first["mesh"])
    states = []
    for rank in range(mesh.tp * mesh.pp * mesh.dp):
        kept = _read(path / f"rank-{rank}.pt")
        states.append(kept["state"])
    return merge_optimizer_states(states, config, mesh), first


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing: its shard is nowhere else")
    try:
        return torch.load(file, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is cut or damaged: its shard is nowhere else") from error


# ── 4 The run ───────────────────────────────────────────────────────────────────────────────────


def batch_at(consumed: int, rows: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The global batch after so many samples, of zero_3d.py's own text."""
    text = torch.tensor(list(Path(z.__file__).read_bytes()))
    windows = text.unfold(0, args.seq_length + 1, 1)
    chosen = []
    for sample in range(consumed, consumed + rows):
        key = 1_000_003 * args.seed + sample
        generator = torch.Generator().manual_seed(key)
        row = torch.randint(len(windows), (), generator=generator)
        chosen.append(int(row))
    window_BS = windows[chosen]
    return window_BS[:, :-1], window_BS[:, 1:]


def main(args: argparse.Namespace, device: torch.device) -> None:
    mesh = z.make_mesh(*args.layout, device, args.timeout)
    z.say_setting(args, f": tp {mesh.tp} × pp {mesh.pp} × dp {mesh.dp}")
    config = z.config_from(args, z.GPTConfig, seed=args.seed)
    stage = z.Stage(config, mesh).to(device, z.DTYPES[args.dtype])
    optimizer = z.make_training(stage, args.lr)
    folder = Path(args.checkpoint)
    step = newest(folder) or 0
    consumed = 0
    if step:
        state, run = load(folder, step, config)
        load_optimizer_state(optimizer, state, config, mesh)
        consumed = run["consumed"]
        z.say(f"goes on from step {step}, saved on the mesh {run['mesh']}")
    z.say("step  samples  batch        lr      loss    norm")
    while step < args.steps:
        rows = args.ramp(consumed)
        lr = learning_rate(consumed, args.lr, args.lr / 10, args.warmup, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [x_BS.to(device) for x_BS in batch_at(consumed, rows, args)]
        (results,) = z.train(stage, optimizer, [batch], args.micro_batch)
        loss, norm = z.read_step(step, *results)
        z.say(f"{step:4} {consumed:8} {rows:6}  {lr:.2e}  {loss:.6f}  {norm:6.3f}")
        consumed += rows
        step += 1
        if step % args.save_every == 0 or step == args.steps:
            keep = {"mesh": args.layout, "config": asdict(config), "consumed": consumed}
            save(folder, step, optimizer, keep)


@dataclass
class Options:  # the tool's own flags
    checkpoint: str = flag("", "the folder to go on from, and to save in", metavar="DIR")
    tp: int | None = flag(None, "ranks that share each layer; None: 1", least=1)
    pp: int | None = flag(None, "stages; None: 1", least=1)
    dp: int | None = flag(None, "replicas; where all three are None: tp 2", least=1)
    micro_batch: int = flag(1, "sequences that pass through the stages together", least=1)
    seq_length: int = flag(32, "tokens of a sequence, S", least=1)
    save_every: int = flag(5, "steps between two checkpoints", least=1)
    ramp_start: int = flag(4, "sequences of the first batch", least=1)
    ramp_increment: int = flag(4, "sequences that a batch grows by", least=1)
    ramp_samples: int = flag(64, "samples over which it grows", least=1)
    ramp_final: int = flag(16, "sequences of the last batch", least=1)
    warmup: int = flag(16, "samples of linear warm-up", least=1)
    decay: int = flag(1000, "samples at which the cosine ends", least=2)
    lr: float = flag(3e-3, "the highest learning rate", least=1e-9)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where the flags do not fit each other or the checkpoint."""
    world = args.world_size
    given = (args.tp, args.pp, args.dp)
    args.layout = [size or 1 for size in given]
    if not any(given):
        args.layout = [2, 1, world // 2] if world % 2 == 0 else [1, 1, world]
    if math.prod(args.layout) != world:
        raise ValueError(f"a mesh of {args.layout} on {world} ranks: the product must be equal")
    if not args.checkpoint:
        raise ValueError("--checkpoint DIR: where should the run go on, and be saved?")
    if args.decay <= args.warmup:
        raise ValueError(f"--decay {args.decay} must be more than --warmup {args.warmup}")
    sizes = (args.ramp_start, args.ramp_increment, args.ramp_samples, args.ramp_final)
    args.ramp = RampupBatchSize(*sizes)
    args.ramp.check(args.micro_batch, args.layout[2])
    config = z.config_from(args, z.GPTConfig, seed=args.seed)
    z.check_heads(config, args.layout[0])
    z.place_layers(config.num_layers, args.layout[1])
    mesh = z.ParallelMesh(*args.layout)
    z.check_batch((args.ramp_start, args.seq_length), args.micro_batch, mesh)
    folder = Path(args.checkpoint)
    if newest(folder):
        load(folder, newest(folder), config)


def flags() -> argparse.Namespace:
    return z.parse_flags(__doc__, [Options, z.GPTConfig], check_args, ranks=4, steps=10)


if __name__ == "__main__":
    z.launch(main, flags())
