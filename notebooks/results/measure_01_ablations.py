# SPDX-License-Identifier: MIT-0
"""What the papers' ideas gain on synthetic speech. `python
notebooks/results/measure_01_ablations.py`, 4 to 5 minutes.

Writes 01_ablations.json next to this file: losses of each epoch and words wrong, with and without
BatchNorm, SortaGrad, and noise in training; greedy and beam search; one version of the recording
and three that are shifted a little. Every list in the file has one entry for each seed.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "01_deepspeech"))
import deepspeech as ds
import speech as sp

HEARD, UNHEARD = (
    sp.Speech.synthetic(count, sp.SpeechConfig(), seed) for count, seed in ((320, 0), (100, 1))
)
LENGTHS, BATCH = [len(wave_W) for wave_W in HEARD.waves], 8
LOUDNESS = (
    "clean",
    "15",
    "10",
    "5",
    "0",
)  # of the test's noise: decibels by which speech is louder
SEEDS = (0, 1, 2)


def noisy(speech: sp.Speech, low: float, high: float, fraction: float, key: tuple) -> sp.Speech:
    """A fraction of the utterances with coloured noise, `low` to `high` decibels below."""
    rng = np.random.default_rng(key)
    waves = []
    for wave_W in speech.waves:
        if rng.random() < fraction:
            noise_W = sp.coloured_noise(len(wave_W), rng, wave_W.dtype)
            wave_W = sp.mix_noise(wave_W, noise_W, rng.uniform(low, high))
        waves.append(wave_W)
    return sp.Speech(waves, speech.texts)


def words_wrong(found: list[tuple[str, str]]) -> float:
    errors, words = sp.word_errors(*zip(*found))
    return round(errors / words, 4)


@torch.no_grad()
def heard_by(
    model: ds.DeepSpeech2, speech: sp.Speech, shifts: tuple[int, ...] = (0,)
) -> list[torch.Tensor]:
    """Each utterance's log-probabilities; with shifts, the mean over the versions."""
    found = []
    for wave_W in speech.waves:
        versions = [torch.nn.functional.pad(wave_W, (shift, -shift)) for shift in shifts]
        batch = sp.Speech(versions, [""] * len(shifts)).batch(range(len(shifts)), model.config)
        log_probs_TBV, _ = model(batch.features_BTF, batch.frames_B)
        found.append(log_probs_TBV.exp().mean(1).log())
    return found


def learn(
    config: sp.SpeechConfig, epochs=8, lr=0.04, sort=True, noise=False
) -> tuple[ds.DeepSpeech2, dict]:
    """A network, trained as by default but for the arguments; losses, and greedy words wrong."""
    model, test = sp.build(config), UNHEARD.batch(range(len(UNHEARD.texts)), config)
    record, sums = dict(train=[], held_out=[]), []

    def batches():
        for epoch in range(epochs):
            speech = noisy(HEARD, 0, 20, 0.4, (config.seed, epoch)) if noise else HEARD
            for rows in sp.sortagrad_batches(LENGTHS, BATCH, epoch, config.seed, sort):
                yield speech.batch(rows, config)

    epoch_steps = len(LENGTHS) // BATCH
    rate = sp.Schedule("nesterov", lr, epoch_steps, epochs)
    optimizer = sp.optimizer_for(model)
    steps = ds.train(model, optimizer, batches(), max_norm=3.0)
    for loss, _ in sp.scheduled(optimizer, rate, steps):
        sums.append(loss.item())
        if len(sums) == epoch_steps:
            with torch.no_grad():
                log_probs_TBV, frames_B = model.eval()(test.features_BTF, test.frames_B)
                held_out = ds.ctc_loss(log_probs_TBV, test.labels_BU, frames_B, test.sizes_B).item()
            record["train"].append(round(sum(sums) / epoch_steps, 4))
            record["held_out"].append(round(held_out, 4))
            sums = []
            model.train()
    texts = [ds.greedy(log_probs_TV) for log_probs_TV in heard_by(model.eval(), UNHEARD)]
    return model, record | dict(words_wrong=words_wrong(list(zip(UNHEARD.texts, texts))))


def compare(name: str, **options) -> dict:
    """One entry for each seed of every number that `learn` records."""
    config = options.pop("config", {})
    runs = [learn(sp.SpeechConfig(seed=seed, **config), **options)[1] for seed in SEEDS]
    print(
        f"{name:50} held-out loss {[run['held_out'][-1] for run in runs]}, "
        f"words wrong {[run['words_wrong'] for run in runs]}",
        flush=True,
    )
    return {key: [run[key] for run in runs] for key in runs[0]}


def of_noise_and_search() -> tuple[dict, dict, dict]:
    """Words wrong by training, test noise and decoder; by beam; by averaged versions."""
    lm, decoders, beams, jitter = sp.NGram(HEARD.texts), {}, {}, {}
    for training in ("clean", "noisy"):
        for seed in SEEDS:
            model, _ = learn(sp.SpeechConfig(seed=seed), noise=training == "noisy")
            for test in LOUDNESS:
                speech = (
                    UNHEARD
                    if test == "clean"
                    else noisy(UNHEARD, float(test), float(test), 1, (99,))
                )
                heard = heard_by(model, speech)

                def count(decode, into, *keys, heard=heard):
                    texts = [decode(log_probs_TV) for log_probs_TV in heard]
                    for key in keys[:-1]:
                        into = into.setdefault(key, {})
                    into.setdefault(keys[-1], []).append(
                        words_wrong(list(zip(UNHEARD.texts, texts)))
                    )

                count(ds.greedy, decoders, training, test, "greedy")
                count(lambda x: sp.beam_search(x)[0][0], decoders, training, test, "beam")
                count(
                    lambda x: sp.beam_search(x, lm=lm)[0][0],
                    decoders,
                    training,
                    test,
                    "beam + language model",
                )
                count(ds.greedy, jitter, training, test, "as it is")
                step = model.config.sample_rate // 200  # 5 ms
                shifted = heard_by(model, speech, (-step, 0, step))
                count(ds.greedy, jitter, training, test, "mean of three", heard=shifted)
                if (training, test) == ("noisy", "5"):
                    for beam in (1, 2, 4, 8, 16, 32, 64):
                        count(
                            lambda x, beam=beam: sp.beam_search(x, beam=beam, lm=lm)[0][0],
                            beams,
                            beam,
                        )
            print(f"trained on {training} speech, seed {seed}: done", flush=True)
    return decoders, beams, jitter


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    begin, batch_norm, sortagrad = time.process_time(), {}, {}
    for layers in (1, 5):
        for norm in (True, False):
            for lr in (0.04, 0.02):
                name = f"{layers} recurrent, {'with' if norm else 'without'} BatchNorm, lr {lr}"
                sizes = dict(num_layers=layers, hidden_size=48, batch_norm=norm)
                batch_norm[name] = compare(name, config=sizes, epochs=6, lr=lr)
    for norm in (True, False):
        for sort in (True, False):
            name = (
                f"{'sorted' if sort else 'not sorted'}, {'with' if norm else 'without'} BatchNorm"
            )
            sortagrad[name] = compare(
                name,
                config=dict(num_layers=3, hidden_size=48, batch_norm=norm),
                epochs=6,
                sort=sort,
            )
    decoders, beams, jitter = of_noise_and_search()
    seconds = round(time.process_time() - begin)
    result = dict(
        command="python notebooks/results/measure_01_ablations.py",
        torch=torch.__version__,
        cpu_seconds=seconds,
        seeds=SEEDS,
        batch_norm=batch_norm,
        sortagrad=sortagrad,
        decoders=decoders,
        beams=beams,
        jitter=jitter,
    )
    (HERE / "01_ablations.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    print(f"{seconds} s of CPU time")
