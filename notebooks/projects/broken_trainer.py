# SPDX-License-Identifier: MIT-0
"""Project 2. A trainer for three kinds of parallelism, with three bugs. Find them.

    cp notebooks/projects/broken_trainer.py mine.py
    make project PROJECT=2 FILE=mine.py

What it should do is written in trainer.py, whose model it trains. It runs in every layout, and its
loss falls. The mark is that of project 1: the repaired file equals the single device.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from trainer import MAX_NORM, Batches, Config, Model, State, make_optimizer, summed_loss


class Mesh:
    """Ranks as pp × dp × tp: neighbours share a replica's stage."""

    def __init__(self, tp: int, pp: int, dp: int):
        self.tp, self.pp, self.dp = tp, pp, dp
        rank = dist.get_rank()
        self.stage, self.replica, self.shard = rank // (dp * tp), rank // tp % dp, rank % tp
        ranks = torch.arange(tp * pp * dp).view(pp, dp, tp)
        for members in ranks.flatten(0, 1).tolist():  # every rank makes every group
            group = dist.new_group(members)
            self.tp_group = group if rank in members else self.__dict__.get("tp_group")
        for members in ranks.mT.flatten(0, 1).tolist():
            group = dist.new_group(members)
            self.dp_group = group if rank in members else self.__dict__.get("dp_group")

    @property
    def before(self) -> int:
        return dist.get_rank() - self.dp * self.tp

    @property
    def after(self) -> int:
        return dist.get_rank() + self.dp * self.tp


class Enter(torch.autograd.Function):
    """Forward the identity, backward a sum over the ranks of `group`."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Leave(torch.autograd.Function):
    """Forward a sum over the ranks of `group`, backward the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# The dimension of a parameter that tp divides; all others are replicated in their stage.
SHARDED = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def shard_dim(name: str) -> int | None:
    return SHARDED.get(".".join(name.split(".")[-2:]))


class Block(nn.Module):
    """A block with its features divided over tp ranks."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__()
        self.group = mesh.tp_group
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size // mesh.tp)
        self.down = nn.Linear(config.ffn_hidden_size // mesh.tp, config.hidden_size)

    def forward(self, x_BSH: Tensor) -> Tensor:
        y_BSf = F.gelu(self.up(self.norm(Enter.apply(x_BSH, self.group))))
        partial_BSH = F.linear(y_BSf, self.down.weight)
        return x_BSH + Leave.apply(partial_BSH, self.group) + self.down.bias


class Stage(nn.Module):
    """Consecutive blocks; the first stage has the embedding, the last one the output layer."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__()
        full = Model(config)
        count = config.num_layers // mesh.pp
        first = mesh.stage * count
        mine = range(first, first + count)
        self.layers = nn.ModuleDict({str(i): Block(config, mesh) for i in mine})
        self.embedding = full.embedding if mesh.stage == 0 else None
        is_last = mesh.stage == mesh.pp - 1
        self.final_norm = full.final_norm if is_last else None
        self.head = full.head if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) if self.embedding else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.final_norm(x)) if self.head else x


def shard(name: str, full: Tensor, mesh: Mesh) -> Tensor:
    dim = shard_dim(name)
    return full if dim is None else full.chunk(mesh.tp, dim)[mesh.shard]


def gather(model: Stage, mesh: Mesh) -> State:
    """The full model's weights, on every rank."""
    mine = {name: x.detach() for name, x in model.state_dict().items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    full = {}
    for stage in range(mesh.pp):
        first = stage * mesh.dp * mesh.tp
        shards = everyone[first : first + mesh.tp]  # of the first replica
        for name, x in shards[0].items():
            dim = shard_dim(name)
            full[name] = x if dim is None else torch.cat([other[name] for other in shards], dim)
    return full


def forward_and_backward(
    model: Stage, tokens_BS: Tensor, targets_BS: Tensor, hidden: int, mesh: Mesh
) -> Tensor:
    """Adds gradients of this replica's rows, a micro-batch each; returns the loss, 0 but on the
    last stage."""
    B, S = tokens_BS.shape
    inputs, outputs = [], []
    loss = torch.zeros((), dtype=torch.float64)
    count = (targets_BS != -100).sum().clamp(min=1)
    for b in range(B):
        x = tokens_BS[b : b + 1]
        if mesh.stage > 0:
            x = torch.empty(1, S, hidden, dtype=torch.float64)
            dist.recv(x, mesh.before)
            x.requires_grad_()
        y = model(x)
        if mesh.stage < mesh.pp - 1:
            dist.send(y.detach(), mesh.after)
        else:
            y = summed_loss(y, targets_BS[b : b + 1]) / count
            loss += y.detach()
        inputs.append(x)
        outputs.append(y)
    for x, y in zip(reversed(inputs), reversed(outputs)):
        grad = None
        if mesh.stage < mesh.pp - 1:
            grad = torch.empty_like(y)
            dist.recv(grad, mesh.after)
        y.backward(grad)
        if mesh.stage > 0:
            dist.send(x.grad, mesh.before)
    return loss


def sum_gradients(model: Stage, mesh: Mesh) -> None:
    for p in model.parameters():
        dist.all_reduce(p.grad, group=mesh.dp_group)
        p.grad /= mesh.dp


def clip_gradients(model: Stage, mesh: Mesh) -> None:
    squares = torch.zeros((), dtype=torch.float64)
    for p in model.parameters():
        squares += p.grad.square().sum()
    dist.all_reduce(squares)
    norm = (squares / mesh.dp).sqrt()  # replicas hold the same
    for p in model.parameters():
        p.grad *= (MAX_NORM / (norm + 1e-6)).clamp(max=1)


def train(
    config: Config, weights: State, batches: Batches, tp: int, pp: int, dp: int
) -> tuple[list[float], State]:
    """On each of tp · pp · dp ranks: the losses, and the full weights after all steps."""
    mesh = Mesh(tp, pp, dp)
    model = Stage(config, mesh).double()
    model.load_state_dict({name: shard(name, weights[name], mesh) for name in model.state_dict()})
    optimizer = make_optimizer(list(model.parameters()))
    losses = []
    for tokens_BS, targets_BS in batches:
        optimizer.zero_grad()
        tokens_bS, targets_bS = (x.chunk(dp)[mesh.replica] for x in (tokens_BS, targets_BS))
        loss = forward_and_backward(model, tokens_bS, targets_bS, config.hidden_size, mesh)
        sum_gradients(model, mesh)
        clip_gradients(model, mesh)
        optimizer.step()
        dist.all_reduce(loss)  # 0 on all stages but the last
        losses.append(loss.item() / (dp * tp))
    return losses, gather(model, mesh)
