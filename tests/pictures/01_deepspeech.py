# SPDX-License-Identifier: MIT-0
"""Draws 01_deepspeech/letters.png: what the network writes. `make pictures CHAPTER=01`."""

from pathlib import Path

import deepspeech as ds
import speech
import torch

ROOT = Path(__file__).resolve().parents[2]


def trained(config: speech.SpeechConfig, epochs: int = 8) -> ds.DeepSpeech2:
    """The network of speech.py's default run, on one rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recordings = speech.Speech.synthetic(320, config, 0)
    lengths = [len(wave_W) for wave_W in recordings.waves]
    batches = []
    for epoch in range(epochs):
        batches += speech.sortagrad_batches(lengths, 8, epoch)
    model = speech.build(config)
    optimizer = speech.optimizer_for(model)
    rate = speech.Schedule("nesterov", 0.04, epoch_steps=40, epochs=epochs)
    steps = (recordings.batch(rows, config) for rows in batches)
    steps = ds.train(model, optimizer, steps, max_norm=3.0)
    for _ in speech.scheduled(optimizer, rate, steps):
        pass
    return model.eval()


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = speech.SpeechConfig()
    model, unheard = trained(config), speech.Speech.synthetic(60, config, 1)
    index = next(
        i for i, text in enumerate(unheard.texts) if text.split()[1:] and len(text) in range(12, 17)
    )
    batch = unheard.batch([index], config)
    with torch.no_grad():
        before, after = (
            net(batch.features_BTF, batch.frames_B)[0] for net in (speech.build(config), model)
        )
    leaf = before.requires_grad_()
    ds.ctc_loss(leaf, batch.labels_BU, before.shape[:1], batch.sizes_B, reduction="sum").backward()
    probs_TV, share_TV = after[:, 0].exp(), -leaf.grad[:, 0]

    figure, (top, middle, low) = plt.subplots(
        3, 1, figsize=(10.5, 6.2), sharex=True, layout="constrained"
    )
    seconds, T = len(unheard.waves[index]) / config.sample_rate, len(probs_TV)
    extent = (0, seconds, 0, config.mel_bands)
    top.imshow(batch.features_BTF[0].T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    top.set(title=f"“{unheard.texts[index]}”, by a speaker of the eval split", ylabel="mel band")
    at = (torch.arange(T) + 0.5) * seconds / T
    for axes, share, title in (
        (
            middle,
            share_TV,
            "untrained: the fraction of all alignments that have the letter there; grey: blank",
        ),
        (low, probs_TV, "after eight epochs: the probability that the network gives each letter"),
    ):
        axes.fill_between(at, share[:, 0], color="0.88")
        for symbol in sorted(set(batch.labels_BU[0].tolist())):
            (line,) = axes.plot(at, share[:, symbol], linewidth=1.6)
            for t in range(T):
                here = share[max(0, t - 2) : t + 3, symbol]
                if share[t, symbol] > 0.15 and share[t, symbol] == here.max():
                    letter = ds.ALPHABET[symbol].replace(" ", "␣")
                    axes.annotate(
                        letter,
                        (at[t], share[t, symbol] + 0.04),
                        ha="center",
                        color=line.get_color(),
                        fontsize=12,
                    )
        axes.set(ylim=(0, 1.2), title=title)
    low.set(xlabel="seconds", xlim=(0, seconds))
    figure.savefig(ROOT / "01_deepspeech" / "letters.png", dpi=100)


if __name__ == "__main__":
    main()
