# SPDX-License-Identifier: MIT-0
"""Where LayerNorm stands: a deep model with a small hidden size, in both orders.

    python notebooks/results/measure_02_norm.py        3 minutes

Writes 02_norm.json next to this file: the loss of each order on the eval split, at a setting in
which only one order trains, and, as a control, at one in which both train.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "02_megatron_tp"))
tp = importlib.import_module("megatron_tp")

SETTINGS = {"lr 3e-3, std 1/√64": (3e-3, 64**-0.5), "control: lr 1e-3, std 0.07": (1e-3, 0.07)}
STEPS = 200
EVERY = 20


class PostNormBlock(tp.Block):
    """The order of the first Transformer: LayerNorm after each residual connection."""

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = self.norm1(x_BSH + self.dropout1(self.attention(x_BSH)))
        return self.norm2(x_BSH + self.dropout2(self.mlp(x_BSH)))


def build(block: type[tp.Block], config: tp.GPTConfig) -> tp.GPT:
    """The plain model with layers of another class, and the same initial weights."""
    model = tp.GPT(config)
    model.layers = nn.ModuleList([block(config) for _ in range(config.num_layers)])
    model.load_state_dict(dict(tp.initial_weights(config)))
    return model


def run(block: type[tp.Block], lr: float, std: float, seed: int) -> list[float]:
    """Loss on the eval split after 0, EVERY, ... steps of a 12-layer model, without warm-up."""
    config = tp.GPTConfig(num_layers=12, hidden_size=64, seq_length=64, init_std=std, seed=seed)
    data = tp.TextData("", config.seq_length)
    model = build(block, config)
    eval_batch = data.batch(0, 32, seed=0, evaluation=True)
    batches = (data.batch(step, 8, seed) for step in range(STEPS))
    steps = tp.train_alone(model, tp.make_optimizer(model, lr), batches)
    losses = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(round(model.loss(*eval_batch).mean().item(), 4))
        next(steps, None)
    return losses


def main() -> None:
    torch.set_num_threads(1)
    begin = time.time()
    curves = {}
    for name, (lr, std) in SETTINGS.items():
        for norm, block in [("pre", tp.Block), ("post", PostNormBlock)]:
            key = f"{norm}-norm, {name}"
            curves[key] = [run(block, lr, std, seed) for seed in (0, 1)]
            print(key, [curve[-1] for curve in curves[key]], flush=True)
    result = {
        "command": "python notebooks/results/measure_02_norm.py",
        "torch": torch.__version__,
        "every": EVERY,
        "curves": curves,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (HERE / "02_norm.json").write_text(text + "\n", "utf-8")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
