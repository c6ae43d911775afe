# SPDX-License-Identifier: MIT-0
"""Experts' load with and without balancing. Two minutes:

    python notebooks/results/measure_06_balance.py

Writes 06_balance.json next to this file. From a start that sends most tokens to the same two
experts: the largest load and the loss at each step, without balancing, with the auxiliary loss and
with the bias. Of the first seed also each expert's load, and the experts that the tokens of one
piece of the eval split chose.
"""

import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "06_moe_fp8"))
import moe_fp8 as mf

WAYS = {  # α of the auxiliary loss, γ of the bias
    "nothing": (0.0, 0.0),
    "loss, α 0.01": (0.01, 0.0),
    "loss, α 0.1": (0.1, 0.0),
    "bias, γ 0.001 (the paper's)": (0.0, 0.001),
    "bias, γ 0.01": (0.0, 0.01),
}
SEEDS, STEPS, SEQUENCES, LENGTH, SHOWN = (0, 1, 2), 150, 16, 64, 56


def rate(step: int) -> float:
    return 3e-3 * min(1, (step + 1) / 10)


def train(model: mf.MoELM, batches, **options):
    """`train_alone` with a warm-up: the rate is set when a batch is drawn."""
    optimizer = mf.make_optimizer(model, 0.0)

    def scheduled():
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            yield batch

    return mf.train_alone(model, optimizer, scheduled(), **options)


def chosen(model: mf.MoELM, tokens_S: torch.Tensor) -> list[list[int]]:
    """Which experts each token chose in the last layer of experts."""
    found, router = [], model.routers()[-1]
    handle = router.register_forward_hook(
        lambda router, args, routing: found.append(routing.experts_TK.tolist())
    )
    model.eval()
    with torch.no_grad():
        model(tokens_S[None])
    model.train()
    handle.remove()
    return found[0]


def run(alpha: float, gamma: float, seed: int) -> dict:
    config = mf.MoEConfig(init_std=0.06, seed=seed)  # as in the chapter's own run
    data, model = mf.TextData("", LENGTH), mf.overload(mf.MoELM(config))
    piece_S = data.batch(0, 1, seed=3, evaluation=True)[0][0, :SHOWN]
    before = chosen(model, piece_S)
    batches = (data.batch(step, SEQUENCES, seed) for step in range(STEPS))
    steps = list(train(model, batches, gamma=gamma, alpha=alpha))
    even = SEQUENCES * LENGTH * config.top_k / config.num_experts
    return dict(
        largest=[round(mf.largest_load(step.counts_LE), 3) for step in steps],
        loss=[round(step.loss.item(), 4) for step in steps],
        loads=[
            (step.counts_LE[-1] * 100 / even).round().int().tolist() for step in steps
        ],  # last layer, hundredths
        text=data.encoding.decode(piece_S.tolist()),
        before=before,
        after=chosen(model, piece_S),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin, curves, maps = time.time(), {}, {}
    for name, (alpha, gamma) in WAYS.items():
        runs = [run(alpha, gamma, seed) for seed in SEEDS]
        curves[name] = [{key: found[key] for key in ("largest", "loss")} for found in runs]
        maps[name] = {key: runs[0][key] for key in ("loads", "text", "before", "after")}
        below = [
            next((i for i, x in enumerate(found["largest"]) if x < 1.5), None) for found in runs
        ]
        last = [(found["largest"][-1], found["loss"][-1]) for found in runs]
        print(f"{name:30} below 1.5 at step {below}; at the end load and loss {last}", flush=True)
    result = dict(
        command="python notebooks/results/measure_06_balance.py",
        torch=torch.__version__,
        curves=curves,
        maps=maps,
    )
    lines = ",\n".join(
        f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in result.items()
    )
    (HERE / "06_balance.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")
    print(f"{time.time() - begin:.0f} s")
