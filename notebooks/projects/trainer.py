# SPDX-License-Identifier: MIT-0
"""Project 1. A trainer for three kinds of parallelism at once. Fill in `train`.

    cp notebooks/projects/trainer.py mine.py
    make project PROJECT=1 FILE=mine.py

The model and its training on a single device stand below. `train` does the same on tp · pp · dp
ranks: tensor parallelism inside the blocks (chapter 2), blocks over pipeline stages (chapter 3),
rows of the batch over replicas (chapters 1 and 2). Take what you need from the chapters, by import
or by `make lift`.

`make project` calls it on 8 ranks in several layouts, and compares with the single device, in
float64: each loss, and all weights after the last step. It also counts what each rank computes. A
rank may do 1.2 times its share of the operations: a 1/(tp · pp · dp) part of the blocks, and of the
output layer 1/dp. Only a last stage needs the latter.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]

MAX_NORM = 1.0  # all gradients together are clipped to it, in every step


@dataclass(frozen=True)
class Config:
    vocab_size: int = 41
    hidden_size: int = 32
    ffn_hidden_size: int = 96
    num_layers: int = 4


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))), x of (B, S, H)."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return x_BSH + self.down(F.gelu(self.up(self.norm(x_BSH))))


class Model(nn.Module):
    """Predicts the next token from the last one alone: tokens (B, S) to logits (B, S, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return self.head(self.final_norm(x_BSH))


def summed_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy of all tokens; a target of −100 does not count."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def train_alone(config: Config, weights: State, batches: Batches) -> tuple[list[float], State]:
    """A step for each batch, on a single device: the mean loss of each, and the weights after all.

    The mean is over the tokens that count, of the whole batch.
    """
    model = Model(config).double()
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    losses = []
    for tokens_BS, targets_BS in batches:
        optimizer.zero_grad()
        loss = summed_loss(model(tokens_BS), targets_BS) / (targets_BS != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: x.detach().clone() for name, x in model.state_dict().items()}


def train(
    config: Config, weights: State, batches: Batches, tp: int, pp: int, dp: int
) -> tuple[list[float], State]:
    """As `train_alone`, on each of tp · pp · dp ranks, whose process group exists (gloo).

    tp divides the features of a block, pp the layers, and dp the rows of a batch. A replica may
    have no token that counts.

    Args: weights: the full model's, float64, the same on every rank. batches: whole ones.
    Returns: on every rank the loss of each whole batch, and the full model's weights.
    """
    raise NotImplementedError("fill in train")
