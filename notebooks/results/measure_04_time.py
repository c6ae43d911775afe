# SPDX-License-Identifier: MIT-0
"""Time and memory of a layer in the benchmark's experiments. `python notebooks/results/measure_04_time.py`, a minute.

Writes 04_time.json beside this file: what tests/bench/04_seq_parallel.py measures, on two ranks of one thread each, in
units of tensor parallelism's time and memory.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE.parent.parent / folder) for folder in ("tests", "tests/bench", "04_seq_parallel")]
sys.path[:0] = PATHS
import ranks  # noqa: E402

SIZES = dict(hidden=384, heads=4, seq=256, batch=2, rounds=15, dtype="float32")

if __name__ == "__main__":
    ranks.PATHS[:] = PATHS
    pool = ranks.Pool(2)
    found = pool.run("04_seq_parallel", "measure", SIZES, timeout=300)[0]
    pool.close()
    totals = {
        name: [sum(pair) for pair in zip(run["forward"], run["backward"])]
        for name, run in found.items()
    }
    layers, base = {}, totals["tensor parallelism"]
    for (
        name,
        total,
    ) in (
        totals.items()
    ):  # ratios of neighbouring rounds: whatever else the machine does, both have seen it
        ratio, kept = (
            statistics.median(here / of_base for here, of_base in zip(total, base)),
            found[name]["memory"],
        )
        layers[name] = dict(
            time=round(ratio, 3), kept=round(kept / found["tensor parallelism"]["memory"], 4)
        )
        print(
            f"{name:25}{ratio:8.2f} of the first's time, {layers[name]['kept']:6.2f} of its memory"
        )
    result = dict(
        command="python notebooks/results/measure_04_time.py",
        torch=torch.__version__,
        sizes=SIZES,
        layers=layers,
    )
    (HERE / "04_time.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
