# SPDX-License-Identifier: MIT-0
"""How long a recogniser takes for several streams at once. `python
notebooks/results/measure_01_dispatch.py`, a minute.

Writes 01_dispatch.json next to this file: processor time on one thread for the next 0.2 s of 1,
2, 4 … streams, of a network that has forward directions only, as one that answers during the
recording. The notebook simulates the rest.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "01_deepspeech"))
import speech as sp

CONFIG = sp.SpeechConfig(num_layers=3, hidden_size=1024, bidirectional=False)
FRAMES, STREAMS, ROUNDS = 20, (1, 2, 4, 8, 16, 32), 15  # 20 frames are 0.2 s of sound

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, milliseconds = sp.build(CONFIG).eval(), {}
    with torch.no_grad():
        for streams in STREAMS:
            x_BTF, lengths_B, times = (
                torch.randn(streams, FRAMES, CONFIG.num_bins),
                torch.full((streams,), FRAMES),
                [],
            )
            for _ in range(ROUNDS):
                begin = time.process_time()
                model(x_BTF, lengths_B)
                times.append((time.process_time() - begin) * 1e3)
            milliseconds[streams] = round(statistics.median(times), 2)
            print(f"{streams:3} streams {milliseconds[streams]:8.2f} ms", flush=True)
    result = dict(
        command="python notebooks/results/measure_01_dispatch.py",
        torch=torch.__version__,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds_of_sound=FRAMES / 100,
        milliseconds=milliseconds,
    )
    (HERE / "01_dispatch.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
