# SPDX-License-Identifier: MIT-0
"""Another right answer to project 1: chapter 2's operators, messages as autograd's, and a full
optimizer on every rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron_tp import copy_to_tp, reduce_from_tp
from trainer import MAX_NORM, make_optimizer, summed_loss

DIMS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def dim_of(name):
    return DIMS.get(".".join(name.split(".")[-2:]))


class Move(torch.autograd.Function):
    """From this rank to the next one, or from the one before; gradients go the other way."""

    @staticmethod
    def forward(ctx, x, source, target):
        ctx.source, ctx.target = source, target
        if source is not None:
            x = torch.empty_like(x)
            dist.recv(x, source)
        if target is not None:
            dist.send(x.contiguous(), target)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.target is not None:
            grad = torch.empty_like(grad)
            dist.recv(grad, ctx.target)
        if ctx.source is not None:
            dist.send(grad.contiguous(), ctx.source)
        return grad, None, None


def train(config, weights, batches, tp, pp, dp):
    ranks = torch.arange(tp * pp * dp).view(dp, tp, pp)
    replica, shard, stage = (ranks == dist.get_rank()).nonzero()[0].tolist()
    groups = {(i, j): dist.new_group(ranks[i, :, j].tolist()) for i in range(dp) for j in range(pp)}
    group = groups[replica, stage]
    source = dist.get_rank() - 1 if stage > 0 else None
    target = dist.get_rank() + 1 if stage < pp - 1 else None
    mine = range(stage * config.num_layers // pp, (stage + 1) * config.num_layers // pp)
    full = {name: x.clone().requires_grad_() for name, x in weights.items()}
    optimizer = make_optimizer(list(full.values()))
    losses = []
    for tokens, targets in batches:
        tokens, targets_here = tokens.chunk(dp)[replica], targets.chunk(dp)[replica]
        w = {}
        for name, x in full.items():
            part = x if dim_of(name) is None else x.chunk(tp, dim_of(name))[shard]
            w[name] = part.detach().clone().requires_grad_()
        x = torch.zeros(*tokens.shape, config.hidden_size, dtype=torch.float64, requires_grad=True)
        x = Move.apply(x, source, None) if stage else F.embedding(tokens, w["embedding.weight"])
        for i in mine:
            own = {name: w[f"layers.{i}.{name}"] for name in ("norm.weight", "norm.bias")}
            y = copy_to_tp(F.layer_norm(x, x.shape[-1:], *own.values()), group)
            y = F.gelu(F.linear(y, w[f"layers.{i}.up.weight"], w[f"layers.{i}.up.bias"]))
            z = reduce_from_tp(F.linear(y, w[f"layers.{i}.down.weight"]), group)
            x = x + z + w[f"layers.{i}.down.bias"]
        if target is not None:
            loss = Move.apply(x, None, target).sum()  # its gradient comes from the next stage
        else:
            y = F.layer_norm(x, x.shape[-1:], w["final_norm.weight"], w["final_norm.bias"])
            loss = summed_loss(F.linear(y, w["head.weight"]), targets_here)
            loss = loss / (targets != -100).sum()
        loss.backward()
        grads = {name: x.grad for name, x in w.items() if x.grad is not None}
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (loss.item() if target is None else 0.0, grads))
        losses.append(sum(found for found, _ in everyone) / tp)
        for name, p in full.items():
            total = 0
            for i in range(dp):
                holders = [everyone[rank][1] for rank in ranks[i].flatten().tolist()]
                parts = [grads[name] for grads in holders if name in grads]
                total = total + (
                    parts[0] if dim_of(name) is None else torch.cat(parts, dim_of(name))
                )
            p.grad = total
        torch.nn.utils.clip_grad_norm_(list(full.values()), MAX_NORM)
        optimizer.step()
    return losses, {name: x.detach() for name, x in full.items()}
