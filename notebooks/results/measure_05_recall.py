# SPDX-License-Identifier: MIT-0
"""The study in small: which models can look up a number in a phonebook?

    python notebooks/results/measure_05_recall.py        ten CPU minutes, half with --processes 2

Writes 05_recall.json next to this file. A book is up to 32 entries, a token each: the sum of a
name's and a number's embedding. Then each name is asked for once, in another order: the name's
embedding and a blank. Names and numbers are drawn anew for each book, so that no weight can know
them: they go through the state, or attention looks them up. All models have about equally many
parameters: the feed-forward layers are as wide as what the others leave of the budget. One thread
a run, fp32.
"""

import argparse
import dataclasses
import importlib
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "05_mamba_hybrid"))

mh = importlib.import_module("mamba_hybrid")
tables = importlib.import_module("mamba_hybrid_tables")

NAMES = 64
NUMBERS = 64
ENTRIES = 32
TRAINING = dict(
    steps=600, batch=32, lr=3e-3, warm_up=50, decay_from=0.7, clip=1.0, parameters=120_000
)
SIZES = dict(
    vocab_size=NUMBERS,
    hidden_size=64,
    mamba_heads=2,
    mamba_head_size=64,
    mamba_groups=1,
    attention_heads=4,
    attention_groups=4,
    attention_head_size=16,
    chunk=64,
    init_std=0.05,
)
# Heads that keep from the start, so that the size of the state is compared and not how soon a model
# learns to keep; the published start, of which most heads forget within tens of tokens, is the
# control.
STARTS = {"slow": dict(A_init=(0.02, 0.02), dt_init=(0.1, 1.0)), "published": {}}
MODELS = {"Mamba-2": "M-M-", "hybrid": "M-*-", "Transformer": "*-*-"}
BOOKS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]


def rotate(x_BHTP: Tensor, first: int, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of tokens first, first + 1, …: element i is rotated with element i + P/2.

    Returns: x's shape and dtype. Source: RoFormer, arXiv 2104.09864.
    """
    T, P = x_BHTP.shape[-2:]
    frequency_P = base ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
    angle_TP = torch.arange(first, first + T, dtype=torch.float64)[:, None] * frequency_P
    cos_TP = angle_TP.cos().to(x_BHTP.dtype)
    sin_TP = angle_TP.sin().to(x_BHTP.dtype)
    left, right = x_BHTP.chunk(2, -1)
    return torch.cat([left * cos_TP - right * sin_TP, right * cos_TP + left * sin_TP], -1)


class RotaryAttention(mh.Attention):
    """Attention with positions, which a Transformer without Mamba layers needs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: mh.Span) -> Tensor:
        return super().attend(rotate(q, 0), rotate(k, 0), v, span)


LAYERS = {**mh.LAYERS, "*": RotaryAttention}


class Entry(nn.Module):
    """Token name · (NUMBERS + 1) + number to the sum of their embeddings; the last number is the
    blank."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.name, self.number = (
            nn.Embedding(n, SIZES["hidden_size"]) for n in (NAMES, NUMBERS + 1)
        )
        for table in (self.name, self.number):
            table.weight.data.normal_(generator=generator)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.name(tokens_BS // (NUMBERS + 1)) + self.number(tokens_BS % (NUMBERS + 1))


def books(batch: int, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens of the books and their queries, (batch, 2 · entries), and the numbers asked for,
    (batch, entries)."""
    names = torch.rand(batch, NAMES, generator=generator).argsort(-1)[:, :entries]
    numbers = torch.randint(NUMBERS, (batch, entries), generator=generator)
    order = torch.rand(batch, entries, generator=generator).argsort(-1)
    queries = names.gather(1, order) * (NUMBERS + 1) + NUMBERS
    return torch.cat([names * (NUMBERS + 1) + numbers, queries], 1), numbers.gather(1, order)


def build(pattern: str, state: int, seed: int, start: str) -> mh.HybridLM:
    """The model, with feed-forward layers such that it has about TRAINING["parameters"]."""
    narrow = mh.HybridConfig(
        **SIZES, **STARTS[start], pattern=pattern, state_size=state, seed=seed, ffn_hidden_size=1
    )
    without = mh.HybridLM(narrow, LAYERS)
    without.embedding = Entry(torch.Generator())
    rest = TRAINING["parameters"] - sum(p.numel() for p in without.parameters())
    width = 1 + round(rest / pattern.count("-") / 2 / SIZES["hidden_size"])
    model = mh.HybridLM(dataclasses.replace(narrow, ffn_hidden_size=width), LAYERS)
    model.embedding = Entry(torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def accuracy(model: mh.HybridLM, entries: int = ENTRIES) -> float:
    """The part of right answers on 256 books, the same for every model and in no training batch."""
    tokens, answers = books(256, entries, torch.Generator().manual_seed(99))
    is_right = model(tokens)[:, entries:].argmax(-1) == answers
    return round(is_right.to(torch.float64).mean().item(), 4)


def train(name: str, state: int, seed: int, start: str, steps: int) -> dict:
    """One run: the model's size, its accuracy on full books every 100 steps, and at the end on
    shorter ones."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.process_time()
    model = build(MODELS[name], state, seed, start)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), TRAINING["lr"], weight_decay=0.0)
    decay = TRAINING["decay_from"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / TRAINING["warm_up"], 1, (1 - step / steps) / (1 - decay)),
    )
    curve = [accuracy(model)]
    for step in range(1, steps + 1):
        # Books of all lengths: a state that is too small for the full book can still learn to look
        # up in short ones.
        entries = int(torch.randint(1, ENTRIES + 1, (), generator=generator))
        tokens, answers = books(TRAINING["batch"], entries, generator)
        loss = nn.functional.cross_entropy(
            model(tokens)[:, entries:].flatten(0, 1), answers.flatten()
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip"])
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            curve.append(accuracy(model))
    kept = tables.decode_memory(model.config, 2 * ENTRIES, 1, 1)
    return dict(
        model=name,
        pattern=MODELS[name],
        state=state,
        seed=seed,
        start=start,
        steps=steps,
        parameters=sum(p.numel() for p in model.parameters()),
        ffn=model.config.ffn_hidden_size,
        kept_numbers=kept.total,
        accuracy={entries: accuracy(model, entries) for entries in BOOKS},
        curve=curve,
        cpu_seconds=round(time.process_time() - began, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=TRAINING["steps"])
    args = parser.parse_args()
    jobs = []
    for seed in range(args.seeds):
        # The Transformer has no state, so neither its size nor its start.
        jobs += [("Transformer", 16, seed, "slow", args.steps)]
        jobs += [("Mamba-2", state, seed, "slow", args.steps) for state in (2, 4, 8, 16, 32, 64)]
        jobs += [("hybrid", state, seed, "slow", args.steps) for state in (2, 16)]
    jobs += [(name, 64, 0, "published", args.steps) for name in ("Mamba-2", "hybrid")]
    command = "python notebooks/results/measure_05_recall.py --processes 2"
    sizes = dict(
        SIZES,
        **TRAINING,
        rope=1.0,
        names=NAMES,
        numbers=NUMBERS,
        entries=ENTRIES,
        starts=STARTS,
        dtype="float32",
    )
    result = dict(command=command, torch=torch.__version__, sizes=sizes, runs=[])
    with ProcessPoolExecutor(args.processes) as pool:
        for future in as_completed([pool.submit(train, *job) for job in jobs]):
            run = future.result()
            result["runs"].append(run)
            found = [f"{run['accuracy'][entries]:.2f} of {entries}" for entries in (8, 16, 32)]
            name = f"{run['model']:12} N {run['state']:2}, seed {run['seed']}, {run['start']} start"
            print(f"{name}: {', '.join(found)}", flush=True)
            result["runs"].sort(
                key=lambda r: (r["start"] == "published", r["model"], r["state"], r["seed"])
            )
            (HERE / "05_recall.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
