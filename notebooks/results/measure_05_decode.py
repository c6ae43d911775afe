# SPDX-License-Identifier: MIT-0
"""Time and memory of one more token, after 1K to 32K others.

    python notebooks/results/measure_05_decode.py        20 seconds

Writes 05_decode.json next to this file: times of `Decoder` and bytes of its cache, for three models
of 16 layers on one thread. Rounds alternate between the models; the median is kept.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "05_mamba_hybrid"))

mh = importlib.import_module("mamba_hybrid")
tables = importlib.import_module("mamba_hybrid_tables")
tool = importlib.import_module("load_nemotron_h")

CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]
ROUNDS = 5
SIZES = dict(
    hidden_size=256,
    ffn_hidden_size=1024,
    mamba_heads=8,
    mamba_head_size=64,
    mamba_groups=2,
    state_size=64,
    attention_heads=8,
    attention_groups=8,
    attention_head_size=32,
)
PATTERNS = {"Transformer": 8 * "*-", "hybrid": "M-M-M-*-M-M-M-M-", "Mamba-2": 8 * "M-"}


def decode_times(config: mh.HybridConfig, contexts: list[int], repeats: int = 15) -> list[float]:
    """Median milliseconds of one more token on a single device, after so many others.

    States, keys and values are random: their values do not change the time.
    """
    model = tool.Decoder(config)
    token_BT = torch.zeros(1, 1, dtype=torch.int64)
    medians = []
    for context in contexts:
        cache = model.new_cache(context + repeats + 3)
        model(token_BT, cache)  # makes the layers' tensors
        for layer in cache.layers:
            for x in vars(layer).values():
                if isinstance(x, torch.Tensor):
                    x.normal_()
        cache.tokens = context
        times = []
        for _ in range(repeats + 3):
            begin = time.perf_counter()
            model(token_BT, cache).argmax().item()
            times.append(1e3 * (time.perf_counter() - begin))
        medians.append(sorted(times[3:])[repeats // 2])
    return medians


def main() -> None:
    torch.set_num_threads(1)
    models = {}
    times = {name: [] for name in PATTERNS}
    for _ in range(ROUNDS):
        for name, pattern in PATTERNS.items():
            config = mh.HybridConfig(**SIZES, pattern=pattern)
            times[name].append(decode_times(config, CONTEXTS, repeats=7))
            kept = [tables.decode_memory(config, context, 4, 4).total for context in CONTEXTS]
            models[name] = dict(parameters=tables.parameters(config), bytes=kept)
    for name, row in models.items():
        medians = [statistics.median(of_context) for of_context in zip(*times[name])]
        row["milliseconds"] = [round(milliseconds, 3) for milliseconds in medians]
        print(f"{name:12}", *(f"{milliseconds:8.2f}" for milliseconds in medians), "ms a token")
    result = dict(
        command="python notebooks/results/measure_05_decode.py",
        torch=torch.__version__,
        sizes=dict(SIZES, patterns=PATTERNS, rounds=ROUNDS, dtype="float32", threads=1),
        contexts=CONTEXTS,
        models=models,
    )
    (HERE / "05_decode.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
