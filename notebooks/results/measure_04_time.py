# SPDX-License-Identifier: MIT-0
"""Time and memory of a layer in the experiments of the benchmark, in a minute.

    python notebooks/results/measure_04_time.py

Writes 04_time.json next to this file: what tests/bench/04_seq_parallel.py measures, on two ranks of
one thread each, in units of tensor parallelism's time and memory.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDERS = ("tests", "tests/bench", "02_megatron_tp", "04_seq_parallel")
PATHS = [str(ROOT / folder) for folder in FOLDERS]
SIZES = {"hidden": 384, "heads": 4, "seq": 256, "batch": 2, "rounds": 15, "dtype": "float32"}


def measure() -> dict:
    """By experiment: time and bytes kept, relative to tensor parallelism's."""
    sys.path[:0] = PATHS
    import ranks

    ranks.PATHS[:] = PATHS
    pool = ranks.Pool(2)
    found = pool.run("04_seq_parallel", "measure", SIZES, timeout=300)[0]
    pool.close()
    totals = {}
    for name, run in found.items():
        totals[name] = [sum(pair) for pair in zip(run["forward"], run["backward"])]
    base = totals["tensor parallelism"]
    layers = {}
    for name, total in totals.items():
        # Ratios of neighbouring rounds: both have seen whatever else the machine does.
        ratio = statistics.median(here / of_base for here, of_base in zip(total, base))
        kept = found[name]["memory"] / found["tensor parallelism"]["memory"]
        layers[name] = {"time": round(ratio, 3), "kept": round(kept, 4)}
        print(f"{name:25}{ratio:8.2f} of the first's time, {kept:6.2f} of its memory")
    return layers


if __name__ == "__main__":
    result = {
        "command": "python notebooks/results/measure_04_time.py",
        "torch": torch.__version__,
        "sizes": SIZES,
        "layers": measure(),
    }
    (HERE / "04_time.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
