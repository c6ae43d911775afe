# SPDX-License-Identifier: MIT-0
"""Time and memory of one more token. `python notebooks/results/measure_05_decode.py`, two minutes.

Writes 05_decode.json beside this file: what the chapter's `decode_times` and `decode_memory` find behind 1K to 32K
tokens, for three models of 16 layers on one thread. Rounds alternate between the models; the median is kept.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent / "05_mamba_hybrid")]
import mamba_hybrid as mh  # noqa: E402
import mamba_hybrid_tables as tables  # noqa: E402

CONTEXTS, ROUNDS = [1024, 2048, 4096, 8192, 16384, 32768], 5
SIZES = dict(
    hidden_size=256, ffn_hidden_size=1024, mamba_heads=8, mamba_head_size=64, mamba_groups=2, state_size=64,
    attention_heads=8, attention_groups=8, attention_head_size=32,
)  # fmt: skip
PATTERNS = {"Transformer": 8 * "*-", "hybrid": "M-M-M-*-M-M-M-M-", "Mamba-2": 8 * "M-"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    models, times = {}, {name: [] for name in PATTERNS}
    for _ in range(ROUNDS):
        for name, pattern in PATTERNS.items():
            config = mh.HybridConfig(
                **SIZES, pattern=pattern, rope=1.0 if name == "Transformer" else 0.0
            )
            times[name].append(
                tables.decode_times(config, CONTEXTS, torch.device("cpu"), repeats=7)
            )
            kept = [tables.decode_memory(config, context, 4, 4).total for context in CONTEXTS]
            models[name] = dict(parameters=tables.parameters(config), bytes=kept)
    for name, row in models.items():
        row["milliseconds"] = [
            round(statistics.median(of_context), 3) for of_context in zip(*times[name])
        ]
        print(
            f"{name:12}",
            "".join(f"{milliseconds:9.2f}" for milliseconds in row["milliseconds"]),
            "ms a token",
        )
    sizes = dict(SIZES, patterns=PATTERNS, rounds=ROUNDS, dtype="float32", threads=1)
    command = "python notebooks/results/measure_05_decode.py"
    result = dict(
        command=command, torch=torch.__version__, sizes=sizes, contexts=CONTEXTS, models=models
    )
    (HERE / "05_decode.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
