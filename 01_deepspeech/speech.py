# SPDX-License-Identifier: MIT-0
"""Chapter 1's network on real speech: recordings, noise, language model, beam search, saved models.

`deepspeech.py` is the technique. This tool adds what a recogniser needs:

    python 01_deepspeech/speech.py                               2 ranks, synthetic number words
    python 01_deepspeech/speech.py --data train.jsonl --dev dev.jsonl --save model.safetensors
    python 01_deepspeech/speech.py --load model.safetensors --evaluate dev.jsonl
    python 01_deepspeech/speech.py --load model.safetensors --transcribe me.wav

It guarantees:

· Every recording and text is read and checked before any rank starts.
· A saved file is always complete, and has the alphabet, the configuration and the texts that its
  language model is counted from.
· A step whose loss or gradient norm is not finite ends the run on every rank; nothing is saved.
· Nothing that a flag or a file says is dropped in silence.

Left out: streaming, recordings that do not fit in memory, resuming a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import deepspeech as ds
from deepspeech import flag

# ── 1 The network ───────────────────────────────────────────────────────────────────────────────
#
# Deep Speech 2 has two kinds of recurrent layers, simple and gated, and networks with and without a
# backward direction. A recogniser that answers while the recording goes on cannot have one: a row
# convolution after the last layer sees a few frames of the future instead.


@dataclass
class SpeechConfig(ds.DeepSpeechConfig):
    """The network, and how it gets its spectrograms. Raises ValueError for impossible values."""

    sample_rate: int = 8000  # samples per second; other recordings are resampled to it
    mel_bands: int = 40  # 0: all frequencies, as in the paper (161 at 16 kHz)
    cell: str = "relu"  # clipped at 20; or "gru"
    bidirectional: bool = True
    lookahead: int = 10  # frames that the row convolution sees ahead, where there is one
    batch_norm: bool = True
    convolutions: tuple = ((8, (11, 11), (2, 2)),)
    num_bins: int = field(init=False)  # follows from the sample rate and the mel bands

    def __post_init__(self):
        _check_types(self)
        if not 1000 <= self.sample_rate <= 192_000:
            raise ValueError(f"sample_rate={self.sample_rate}: it must be 1000 to 192000")
        if self.cell not in ("relu", "gru"):
            raise ValueError(f"cell={self.cell!r}: relu or gru")
        if min(self.mel_bands, self.lookahead, self.seed) < 0:
            raise ValueError(f"{self}: mel_bands, lookahead and seed must not be negative")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed}: it must be below 2**63")
        self.alphabet = unicodedata.normalize("NFC", self.alphabet)
        if not len(set(self.alphabet)) == len(self.alphabet) > 1:
            raise ValueError(f"alphabet={self.alphabet!r}: two symbols or more, each once")
        self.convolutions = tuple(_convolution(sizes) for sizes in self.convolutions)
        self.num_bins = self.mel_bands or round(0.020 * self.sample_rate) // 2 + 1
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        """The arguments that make this configuration, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


def _check_types(config: SpeechConfig) -> None:
    """JSON may give 1.5 layers, or "no" for False."""
    allowed = {"float": ("float", "int"), "tuple": ("tuple", "list")}
    for f in fields(config):
        if f.init:
            value = getattr(config, f.name)
            if type(value).__name__ not in allowed.get(f.type, (f.type,)):
                raise ValueError(f"{f.name}={value!r} must be of type {f.type}")


def _convolution(sizes: Any) -> tuple:
    """One of SpeechConfig.convolutions, from what JSON makes of it."""
    try:
        channels, (frames, bins), (frame_step, bin_step) = sizes
        is_whole = all(type(n) is int for n in (channels, frames, bins, frame_step, bin_step))
    except (TypeError, ValueError):
        is_whole = False
    if not is_whole:
        need = "channels, [frames, bins] of the kernel, [frames, bins] of the stride"
        raise ValueError(f"convolution {sizes!r}: it must be {need}")
    return channels, (frames, bins), (frame_step, bin_step)


class Bias(nn.Module):
    """In place of a BatchNorm in a network without: x (..., H); zero where not valid."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        y = torch.where(valid[..., None], x + self.bias, 0)
        return y.to(self.bias.dtype)


def gru(x_TDBG: Tensor, weight_DHG: Tensor, activation: Callable = ds.clip) -> Tensor:
    """A gated recurrence: all states h_TDBH. The paper's clip is where others have tanh.

    G = 3H: x holds the inputs of gate z, gate r and the candidate, next to each other, and so does
    the weight. Source: Deep Speech 2, section 3.
    """
    H = weight_DHG.shape[1]
    h_DBH = x_TDBG.new_zeros(*x_TDBG.shape[1:3], H)
    states = []
    for x_DBG in x_TDBG:
        z_DBH, r_DBH, candidate_DBH = x_DBG.chunk(3, -1)
        hz_DBH, hr_DBH, hn_DBH = (h_DBH @ weight_DHG).chunk(3, -1)
        z_DBH = torch.sigmoid(z_DBH + hz_DBH)
        r_DBH = torch.sigmoid(r_DBH + hr_DBH)
        new_DBH = activation(candidate_DBH + r_DBH * hn_DBH)
        h_DBH = (1 - z_DBH) * h_DBH + z_DBH * new_DBH
        states.append(h_DBH)
    return torch.stack(states)


class SpeechLayer(nn.Module):
    """`ds.RecurrentLayer` for one or two directions, simple or gated; x_TBH to (T, B, H)."""

    def __init__(
        self, config: SpeechConfig, inputs: int, hidden_size: int, norm: Callable, simple: Callable
    ):
        super().__init__()
        H = hidden_size
        gates = 3 if config.cell == "gru" else 1
        self.recurrence = gru if config.cell == "gru" else simple
        self.input = nn.Linear(inputs, gates * H, bias=False)
        self.norm = norm(gates * H)
        directions = 2 if config.bidirectional else 1
        weight = torch.randn(directions, H, gates * H) * 0.3 / math.sqrt(H)
        weight[:, :, -H:] += 0.5 * torch.eye(H)  # a state that fades slowly
        self.weight = nn.Parameter(weight)

    def forward(self, x_TBH: Tensor, valid_TB: Tensor) -> Tensor:
        x_TBH = self.norm(self.input(x_TBH), valid_TB)
        if len(self.weight) == 2:
            y_TBH = ds.bidirectional(x_TBH, self.weight, self.recurrence)
        else:
            y_TBH = self.recurrence(x_TBH[:, None], self.weight)[:, 0]
        return torch.where(valid_TB[..., None], y_TBH, 0)


class RowConvolution(nn.Module):
    """y_t = clip(Σ_j weight_j ∘ x_{t+j}), j = 0 … lookahead, each feature by itself; x_TBH to its
    shape, zero after each end. Source: Deep Speech 2, section 3.7 (lookahead convolution)."""

    def __init__(self, hidden_size: int, lookahead: int):
        super().__init__()
        width = lookahead + 1
        self.weight = nn.Parameter(torch.full((hidden_size, width), 1 / width))

    def forward(self, x_TBH: Tensor, valid_TB: Tensor) -> Tensor:
        future = self.weight.shape[1] - 1
        x_BHT = rearrange(x_TBH, "T B H -> B H T")
        x_BHT = F.pad(x_BHT, (0, future))  # on the right: the future, not the past
        y_BHT = F.conv1d(x_BHT, self.weight[:, None], groups=len(self.weight))
        y_TBH = ds.clip(rearrange(y_BHT, "B H T -> T B H"))
        return torch.where(valid_TB[..., None], y_TBH, 0)


def build(config: SpeechConfig, group: ds.Group = None, is_plain: bool = False) -> ds.DeepSpeech2:
    """The network for data parallelism over `group`, or for a single device: the same weights."""
    norm = ds.PlainBatchNorm if is_plain else partial(ds.SequenceBatchNorm, group=group)
    recurrence = ds.plain_recurrence if is_plain else ds.clipped_recurrence
    if not config.batch_norm:
        norm = Bias
    model = ds.DeepSpeech2(config, norm, recurrence, partial(SpeechLayer, config))
    if not config.bidirectional:
        model.layers.append(RowConvolution(config.hidden_size, config.lookahead))
    return model


# ── 2 Sound ─────────────────────────────────────────────────────────────────────────────────────
#
# The network's input is the strength of each frequency in windows of 20 ms, one every 10 ms, as a
# logarithm. Two things are removed that say nothing about the text: the loudness of the recording,
# and (bin by bin) the sound of the microphone. The papers give all frequencies to the network. With
# little data, mel bands, which cover more hertz at high frequencies, leave less to learn.


def log_spectrogram(wave_W: Tensor, sample_rate: int = 16_000, mel_bands: int = 0) -> Tensor:
    """Log power of each frequency and frame, mean 0 in each bin: x_TF.

    Args: wave_W: samples, of any scale. mel_bands: 0 for all frequencies, 50 Hz apart.
    T = 1 + (W − window) // hop; a shorter recording is padded to one window.
    Source: Deep Speech 2, section 3 (power-normalised spectrograms).
    """
    window = round(0.020 * sample_rate)
    hop = round(0.010 * sample_rate)
    wave_W = F.pad(wave_W, (0, max(0, window - len(wave_W))))
    hann = torch.hann_window(window, dtype=wave_W.dtype)
    frames = wave_W.unfold(0, window, hop) * hann
    # Finer steps of frequency for bands, so that no low band falls between two of them.
    size = 4 * window if mel_bands else window
    power_TF = torch.fft.rfft(frames, size).abs().square()
    if mel_bands:
        hertz = torch.arange(power_TF.shape[1], dtype=wave_W.dtype) * sample_rate / size
        power_TF = power_TF @ _triangles(hertz, sample_rate, mel_bands)
    # 40 dB below the mean is silence.
    relative_TF = power_TF / power_TF.mean().clamp(min=1e-20)
    log_TF = (relative_TF + 1e-4).log()
    return (log_TF - log_TF.mean(0)) / 2


def _triangles(hertz: Tensor, sample_rate: int, bands: int) -> Tensor:
    """The weight of each frequency in each mel band."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mel = torch.linspace(0, top, bands + 2, dtype=hertz.dtype)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = hertz[:, None]
    gaps = edges.diff()
    rising = (hertz - edges[:-2]) / gaps[:-1]
    falling = (edges[2:] - hertz) / gaps[1:]
    return torch.minimum(rising, falling).clamp(min=0)


def mix_noise(wave_W: Tensor, noise_W: Tensor, snr_db: float) -> Tensor:
    """wave_W + noise, scaled so that the wave has snr_db decibels more power: (W,).

    Args: noise_W, of any length: it is repeated or cut. Raises: ValueError for noise without power
        in the part that is used.
    Source: Deep Speech, section 4.1 (superposition).
    """
    times = math.ceil(len(wave_W) / max(1, len(noise_W)))
    noise_W = noise_W.repeat(times)[: len(wave_W)]
    if not noise_W.square().mean() > 0:
        raise ValueError(f"{len(noise_W)} samples of noise have no power to be scaled")
    ratio = wave_W.square().mean() / noise_W.square().mean()
    wanted = 10 ** (snr_db / 10)
    return wave_W + noise_W * (ratio / wanted).sqrt()


def coloured_noise(length: int, rng: np.random.Generator, dtype: torch.dtype) -> Tensor:
    """noise_W with a spectrum that falls by a random power of the frequency, from 0 to −1."""
    white_W = torch.from_numpy(rng.standard_normal(length)).to(dtype)
    spectrum = torch.fft.rfft(white_W)
    frequency = torch.arange(1, len(spectrum) + 1, dtype=dtype)
    slope = frequency ** -rng.uniform(0, 1)
    return torch.fft.irfft(spectrum * slope, length)


def resample(wave_W: Tensor, rate: int, new_rate: int) -> Tensor:
    """The same sound at another sample rate, (W,) of another W, by its spectrum."""
    if rate == new_rate or not len(wave_W):
        return wave_W
    size = max(1, round(len(wave_W) * new_rate / rate))
    spectrum = torch.fft.rfft(wave_W)[: size // 2 + 1]
    return torch.fft.irfft(spectrum, size) * (size / len(wave_W))


def distort(wave_W: Tensor, config: SpeechConfig, rng: np.random.Generator) -> Tensor:
    """A spectrogram of the recording as another speaker could have made it: x_TF, of another T.

    Another pitch and vocal tract (played faster or slower), another tempo, coloured noise 5 to
    35 dB below, a band and a moment that are missing.
    """
    rate = config.sample_rate
    wave_W = resample(wave_W, rate, round(rate * rng.uniform(0.82, 1.18)))
    noise_W = coloured_noise(len(wave_W), rng, wave_W.dtype)
    if wave_W.any():
        wave_W = mix_noise(wave_W, noise_W, rng.uniform(5, 35))
    x_TF = log_spectrogram(wave_W, rate, config.mel_bands)
    T = max(1, round(len(x_TF) * rng.uniform(0.85, 1.15)))
    bins = x_TF.shape[1]
    stretched = F.interpolate(x_TF.T[None], T, mode="linear", align_corners=False)
    x_TF = stretched[0].T.contiguous()
    first = rng.integers(bins)
    moment = rng.integers(T)
    x_TF[:, first : first + rng.integers(bins // 6 + 1)] = 0
    x_TF[moment : moment + rng.integers(12)] = 0
    return x_TF


# ── 3 Language model and beam search ────────────────────────────────────────────────────────────
#
# Greedy decoding gives the text of the most probable path. But the probability of a text is a sum
# over paths, and the network does not know which words exist. So the papers search for the text
# that maximises
#
#     Q = log P(text | speech) + α · log P(text | language model) + β · (number of words)
#
# (β, because each word costs probability: without it the language model prefers few words.)
#
# The search goes through the frames with a set of prefixes, the beam. It keeps two probabilities of
# each: of its paths that end in a blank, and of those that do not. They are apart because the same
# symbol once more is a new letter after a blank, and a repeat without one: "l_l" says "ll", and
# "ll" says "l". The language model is asked when a space completes a word, and at the end: for the
# last word, and for the end of the sentence.


class NGram:
    """A language model of word n-grams, counted in texts: score(history, word) is log P.

    Absolute discounting: every n-gram that was seen gives up 0.5 of its count, which the shorter
    history distributes. At the end of that chain all words are equally probable, the unknown word
    and the end of the sentence included. Any object with `score` can replace it in `beam_search`;
    `end` is its name for the end of the sentence, None or missing if it has none.
    Raises: ValueError for texts without a word, or order < 1.
    """

    end = "</s>"

    def __init__(self, texts: Iterable[str], order: int = 3):
        if order < 1:
            raise ValueError(f"order={order}: at least 1")
        self.order = order
        self.counts = defaultdict(lambda: defaultdict(int))  # history to word to count
        for text in texts:
            words = ["<s>"] * (order - 1) + text.split() + [self.end]
            for position in range(order - 1, len(words)):
                for n in range(order):
                    history = tuple(words[position - n : position])
                    self.counts[history][words[position]] += 1
        self.totals = {}
        for history, found in self.counts.items():
            self.totals[history] = sum(found.values())
        self.words = set(self.counts[()])
        if not self.words - {self.end}:
            raise ValueError("a language model needs text, but there is no word in it")

    def probability(self, history: tuple[str, ...], word: str) -> float:
        """Of `word` after exactly these words, at most order − 1 of them."""
        if history:
            shorter = self.probability(history[1:], word)
        else:
            shorter = 1 / (len(self.words) + 1)
        total = self.totals.get(history)
        if not total:
            return shorter
        found = self.counts[history]
        given_up = 0.5 * len(found) * shorter
        return (max(found.get(word, 0) - 0.5, 0.0) + given_up) / total

    def score(self, history: tuple[str, ...], word: str) -> float:
        """log P(word | history) in nats. Args: history: all words of the text before this one."""
        padded = ("<s>",) * (self.order - 1) + tuple(history)
        last = padded[len(padded) - self.order + 1 :]
        return math.log(self.probability(last, word if word in self.words else "<unknown>"))


@dataclass
class Scorer:
    """α · log P + β per word, of a language model that may be None."""

    lm: Any
    alpha: float
    beta: float

    def __post_init__(self):
        self.word = cache(self.word)  # a prefix is asked about once a frame

    def word(self, prefix: str) -> float:
        """What the last word of a prefix adds, now that it is complete; 0 after a space."""
        *history, word = prefix.split(" ")
        if not word or self.lm is None:
            return 0.0
        return self._ask(tuple(filter(None, history)), word) + self.beta

    def end(self, prefix: str) -> float:
        """What the end of the sentence adds."""
        end = getattr(self.lm, "end", None)
        return self._ask(tuple(prefix.split()), end) if end else 0.0

    def _ask(self, history: tuple[str, ...], word: str) -> float:
        if self.alpha == 0:  # 0 · −∞ is NaN
            return 0.0
        score = self.lm.score(history, word)
        if math.isnan(score):
            raise ValueError(f"the language model's score of {word!r} after {history} is NaN")
        return self.alpha * score


def beam_search(
    log_probs_TV: Tensor,
    alphabet: str = ds.ALPHABET,
    beam: int = 32,
    lm: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    cutoff: float = 0.999,
    most: int = 40,
) -> list[tuple[str, float]]:
    """The best texts and their Q, the best first.

    Args:
        log_probs_TV: of one utterance.
        alphabet: the symbols; the first one is the blank.
        beam: prefixes that are kept after each frame (the papers: 500 to 8,000).
        lm: as `NGram`; None: no language model, and no β.
        cutoff, most: a frame's symbols are tried from the most probable on, until they add up to
            `cutoff`, at most `most` of them (Deep Speech 2, section 7.3). 1.0 tries `most`.
    With a beam that holds every prefix the sum over paths is exact. A smaller one may lose the best
    text, since it compares prefixes by the frames so far.
    Raises: ValueError for beam < 1, and for a probability or score that is NaN.
    Source: Deep Speech, section 2.2.
    """
    if beam < 1:
        raise ValueError(f"beam={beam}: at least 1")
    if log_probs_TV.isnan().any():
        raise ValueError("log_probs contain NaN")
    scorer = Scorer(lm, alpha, beta)
    heard = {"": (0.0, -math.inf)}  # prefix to log-probabilities: paths that end in a blank, others
    spoken = {"": 0.0}  # prefix to the scores of its complete words, those before a space
    falling_TV, order_TV = log_probs_TV.to(torch.float64).sort(-1, descending=True)
    mass_before_TV = falling_TV.exp().cumsum(-1) - falling_TV.exp()
    tried_T = (mass_before_TV < cutoff).sum(-1).clamp(1, most)
    for row, symbols, tried in zip(falling_TV.tolist(), order_TV.tolist(), tried_T.tolist()):
        arrived = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, pair in heard.items():
            for log_p, symbol in zip(row[:tried], symbols):
                letter = alphabet[symbol] if symbol else ""
                _extend(arrived, prefix, pair, letter, log_p)
                if letter:
                    complete = scorer.word(prefix) if letter == " " else 0.0
                    spoken[prefix + letter] = spoken[prefix] + complete
        totals = {}
        for prefix, pair in arrived.items():
            if max(pair) > -math.inf:
                totals[prefix] = _log_add(*pair) + spoken[prefix]
        best = sorted(totals, key=totals.get, reverse=True)[:beam]
        heard = {prefix: tuple(arrived[prefix]) for prefix in best}
    texts = defaultdict(lambda: -math.inf)  # prefixes that differ in spaces alone are one text
    for prefix, pair in heard.items():
        q = _log_add(*pair) + spoken[prefix]
        q += scorer.word(prefix) + scorer.end(prefix)
        text = " ".join(prefix.split())
        texts[text] = _log_add(texts[text], q)
    return sorted(texts.items(), key=lambda item: item[1], reverse=True)


def _extend(
    arrived: dict, prefix: str, pair: tuple[float, float], letter: str, log_p: float
) -> None:
    """Adds the paths of `prefix` that write one more symbol; letter "" is the blank."""
    blank, other = pair
    same = arrived[prefix]
    if not letter:
        same[0] = _log_add(same[0], _log_add(blank, other) + log_p)
        return
    is_repeat = prefix.endswith(letter)
    if is_repeat:  # without a blank between them it is still the same letter
        same[1] = _log_add(same[1], other + log_p)
    before = blank if is_repeat else _log_add(blank, other)
    longer = arrived[prefix + letter]
    longer[1] = _log_add(longer[1], before + log_p)


def _log_add(a: float, b: float) -> float:
    low, high = sorted((a, b))
    if low == -math.inf:
        return high
    return high + math.log1p(math.exp(low - high))


def word_errors(references: Iterable[str], texts: Iterable[str]) -> tuple[int, int]:
    """Words to insert, delete and replace, and the words of the references.

    For letters put spaces between them. Raises: ValueError for unequal numbers of texts.
    """
    errors = 0
    words = 0
    for reference, text in zip(references, texts, strict=True):
        written = text.split()
        row = list(range(len(written) + 1))
        for i, word in enumerate(reference.split(), 1):
            above = row
            row = [i]
            for j, other in enumerate(written, 1):
                deleted = above[j] + 1
                inserted = row[-1] + 1
                replaced = above[j - 1] + (word != other)
                row.append(min(deleted, inserted, replaced))
        errors += row[-1]
        words += len(reference.split())
    return errors, words


# ── 4 Recordings ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Utterance:
    """A line of a manifest."""

    path: str
    text: str
    line: int  # from 1
    duration: float | None = field(default=None, compare=False)  # seconds, as the line says


def _need_file(path: str) -> None:
    """Raises: ValueError for what can be read only once (a pipe), or is a folder."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no regular file: it is read again, so a pipe is not enough")


def read_manifest(path: str, alphabet: str = ds.ALPHABET) -> list[Utterance]:
    """The utterances of a manifest: JSON lines with audio_filepath, text, duration (or without),
    and keys without use.

    A relative audio_filepath is relative to the manifest's folder. Texts become lower case, NFC.
    Lines end at "\\n" alone: other line separators may stand in a text.
    Raises: OSError; ValueError that names file and line for a line that is not a JSON object, lacks
        a key, names no file, has an offset (an utterance is a whole file), or letters outside the
        alphabet; for a manifest without utterances, one that is not UTF-8, and one that can be
        read only once (a pipe).
    """
    _need_file(path)
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
    utterances = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                utterances.append(_utterance(line, Path(path).parent, number, alphabet))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not utterances:
        raise ValueError(f"{path} holds no utterance")
    return utterances


def _utterance(line: str, folder: Path, number: int, alphabet: str) -> Utterance:
    try:
        entry = json.loads(line)
        audio = folder / entry["audio_filepath"]
        text = unicodedata.normalize("NFC", entry["text"].lower())
        duration = entry.get("duration")
        duration = None if duration is None else float(duration)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        need = '{"audio_filepath": "a.wav", "duration": 1.9, "text": "three one four"}'
        raise ValueError(f"{error!r}; a line looks like {need}") from error
    text = " ".join(text.split())
    strange = sorted(set(text) - set(alphabet[1:]))
    if strange:
        raise ValueError(f"{strange} not in the alphabet {alphabet[1:]!r}; spell it out")
    if not audio.is_file():
        raise ValueError(f"there is no file {audio}")
    if entry.get("offset"):
        raise ValueError(f"offset {entry['offset']}: files are read whole, so cut {audio} first")
    return Utterance(str(audio), text, number, duration)


LOUDEST = 1e9  # of a sample; squares of larger ones do not fit fp32


def load_audio(path: str, sample_rate: int) -> Tensor:
    """An audio file as wave_W at `sample_rate`, its channels averaged.

    Raises: ValueError that names the file, where it is not audio, can be read only once, has no
        samples, or samples that are not finite or too large.
    """
    _need_file(path)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as audio: {error}") from error
    is_good = np.abs(samples) <= LOUDEST  # NaN is not below anything
    bad = int((~is_good).sum())
    if not len(samples) or bad:
        found = f"{len(samples)} samples, of which {bad} are not finite or above {LOUDEST:.0e}"
        raise ValueError(f"{path}: {found}")
    return resample(torch.from_numpy(samples.mean(1)), rate, sample_rate)


def frames_needed(text: str) -> int:
    """The frames that CTC needs: one per letter, and a blank between equal ones."""
    repeats = sum(a == b for a, b in itertools.pairwise(text))
    return len(text) + repeats


@dataclass
class Speech:
    """Recordings and their transcripts, all in memory."""

    waves: list[Tensor]  # (W,) each
    texts: list[str]

    @classmethod
    def synthetic(cls, count: int, config: SpeechConfig, seed: int) -> Speech:
        """Number words by invented speakers, a function of the seed."""
        rng = np.random.default_rng((seed, 7))
        texts = []
        for _ in range(count):
            words = rng.choice(list(WORDS), rng.integers(1, 5))
            texts.append(" ".join(words))
        waves = []
        for text in texts:
            wave = synthesize(text.split(), config.sample_rate, rng)
            waves.append(torch.from_numpy(wave).to(torch.float32))
        return cls(waves, texts)

    @classmethod
    def from_manifest(cls, path: str, config: SpeechConfig, tell: Callable[[str], None]) -> Speech:
        """Utterances with too few frames for their letters are left out; `tell` says so.

        Raises: what `read_manifest` does; ValueError that names manifest and line for bad audio,
            and for a file that is longer or shorter than its line says by more than 0.1 s.
        """
        speech = cls([], [])
        short = []
        utterances = read_manifest(path, config.alphabet)
        for utterance in utterances:
            try:
                wave_W = load_audio(utterance.path, config.sample_rate)
            except ValueError as error:
                raise ValueError(f"{path}, line {utterance.line}: {error}") from error
            seconds = len(wave_W) / config.sample_rate
            said = seconds if utterance.duration is None else utterance.duration
            if not abs(seconds - said) <= 0.1:
                found = f"{seconds:.2f} s long, duration {said}: cut the file, or correct the line"
                raise ValueError(f"{path}, line {utterance.line}: {utterance.path} is {found}")
            frames = len(log_spectrogram(wave_W, config.sample_rate))
            if config.after(frames, 0) < frames_needed(utterance.text):
                short.append(f"{utterance.path}, line {utterance.line}")
                continue
            speech.waves.append(wave_W)
            speech.texts.append(utterance.text)
        if short:
            tell(
                f"{path}: left out {len(short)} of {len(utterances)} utterances, whose text has "
                f"more letters than there are frames; the first is {short[0]}"
            )
        if not speech.texts:
            raise ValueError(f"{path} holds no utterance that is long enough for its text")
        return speech

    def batch(
        self, rows: Iterable[int], config: SpeechConfig, key: tuple[int, int] | None = None
    ) -> ds.Batch:
        """Some of the utterances. Args: key: (seed, epoch) of a distortion, or None."""
        features = [torch.zeros(1, config.num_bins)]  # so that it works for no rows, too
        labels = [torch.zeros(1, dtype=torch.int64)]
        for i in rows:
            x_TF = log_spectrogram(self.waves[i], config.sample_rate, config.mel_bands)
            if key is not None:
                rng = np.random.default_rng((*key, i))
                other_TF = distort(self.waves[i], config, rng)
                if config.after(len(other_TF), 0) >= frames_needed(self.texts[i]):
                    x_TF = other_TF
            features.append(x_TF)
            symbols = [config.alphabet.index(letter) for letter in self.texts[i]]
            labels.append(torch.tensor(symbols, dtype=torch.int64))
        return ds.padded_batch(features, labels).rows(range(1, len(features)))


# A phone is three resonances of the vocal tract (formants), driven by the pulses of a voice, by
# noise, or by both. A filter that moves smoothly from phone to phone makes neighbours flow into
# each other, as in a mouth. Speakers differ in pitch, vocal tract, tempo and noise.

# Phone, formants in Hz, share of voice (the rest is noise), loudness, seconds.
PHONES_TABLE = """
    iy  270 2290 3010  1   1    0.10    ih  390 1990 2550  1   1    0.08
    eh  530 1840 2480  1   1    0.09    ah  640 1190 2390  1   1    0.09
    ao  570  840 2410  1   1    0.10    ow  450  800 2300  1   1    0.12
    uw  300  870 2240  1   1    0.12    w   300  650 2200  1   0.5  0.06
    r   350 1100 1500  1   0.6  0.07    n   250 1400 2500  1   0.4  0.08
    v   250 1200 3000  0.6 0.3  0.06    f   900 1500 3300  0   0.15 0.09
    z   250 2500 3600  0.4 0.4  0.09    k  1500 1900 2400  0   0.3  0.04
    s  2800 3400 3900  0   0.5  0.1     th 1400 2400 3500  0   0.12 0.09
    t  2000 3000 3700  0   0.4  0.04    _   500 1500 2500  0   0    0.05
"""


def _phones() -> dict[str, list[float]]:
    cells = PHONES_TABLE.split()
    rows = [cells[first : first + 7] for first in range(0, len(cells), 7)]
    return {phone: [float(x) for x in values] for phone, *values in rows}


PHONES = _phones()
WORDS = {
    "zero": "z ih r ow",
    "one": "w ah n",
    "two": "_ t uw",
    "three": "th r iy",
    "four": "f ao r",
    "five": "f ah iy v",
    "six": "s ih _ k s",
    "seven": "s eh v ah n",
    "eight": "eh iy _ t",
    "nine": "n ah iy n",
}


def synthesize(words: list[str], rate: int, rng: np.random.Generator) -> np.ndarray:
    """A speaker whom `rng` invents says the words; floats, `rate` samples per second."""
    pitch = rng.uniform(90, 220)
    tract = rng.uniform(0.9, 1.12)
    tempo = rng.uniform(0.8, 1.2)
    spoken = " _ ".join(WORDS[word] for word in words)
    phones = f"_ _ {spoken} _ _".split()
    table = np.array([PHONES[phone] for phone in phones])
    seconds = table[:, 5] * tempo * [rng.uniform(0.85, 1.15) for _ in phones]
    # One value per 5 ms, on a straight line between the middles of the phones.
    middles = np.cumsum(seconds) - seconds / 2
    frames = int(seconds.sum() * 200)
    at = np.arange(frames) / 200
    shape = []
    for column in table[:, :5].T:
        varied = column * rng.normal(1, 0.02, len(phones))
        shape.append(np.interp(at, middles, varied))
    walk = np.cumsum(rng.normal(0, 0.1, frames))
    drift = 1 + 0.15 * walk / np.sqrt(frames)
    tone = pitch * drift * np.linspace(1.1, 0.9, frames)
    wave = _filtered(np.array(shape), tone, tract, rate, rng)
    hiss = rng.normal(0, 1, len(wave))
    level = 10 ** (-rng.uniform(25, 40) / 20)
    return wave / np.abs(wave).max() + 0.2 * level * hiss


def _filtered(
    shape: np.ndarray, tone: np.ndarray, tract: float, rate: int, rng: np.random.Generator
) -> np.ndarray:
    """Pulses and noise through the resonances, window by window."""
    hop = rate // 200
    frames = len(tone)
    cycles = np.cumsum(np.repeat(tone, hop)) / rate
    pulses = 1 - 2 * (cycles % 1)
    noise = rng.normal(0, 1, frames * hop)
    window = np.hanning(2 * hop + 1)[:-1]
    hertz = np.fft.rfftfreq(4 * hop, 1 / rate)
    formants = np.stack(shape[:3], 1)[..., None] / tract
    distance = (hertz - formants) / (60 + formants * 0.04)
    gain = (1 / (1 + distance**2)).sum(1)
    voice = shape[3]
    loudness = np.maximum(0.0, shape[4])
    wave = np.zeros((frames + 4) * hop)
    for i in range(frames - 1):
        span = slice(i * hop, (i + 2) * hop)
        source = voice[i] * pulses[span] + (1 - voice[i]) * noise[span]
        spectrum = np.fft.rfft(source * window, 4 * hop) * gain[i]
        sound = np.fft.irfft(spectrum) * loudness[i]
        wave[i * hop : (i + 4) * hop] += sound
    return wave


# ── 5 Saved models ──────────────────────────────────────────────────────────────────────────────


def save_model(path: str, model: ds.DeepSpeech2, texts: Iterable[str]) -> None:
    """Weights, configuration with alphabet, and the language model's texts: one safetensors file.

    Raises: OSError where it cannot be written completely; an older file is then unchanged.
    """
    metadata = {"config": json.dumps(model.config.settings()), "texts": "\n".join(texts)}
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    unfinished = Path(f"{path}.unfinished")
    try:
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)  # one step for the file system
    except Exception as error:  # safetensors has errors of its own
        raise OSError(f"cannot write {path}: {error}; an older one there is unchanged") from error
    finally:
        unfinished.unlink(missing_ok=True)  # also where Ctrl-C ends it


def load_model(path: str) -> tuple[ds.DeepSpeech2, list[str]]:
    """What `save_model` has written, in eval mode, with the texts. Raises: OSError; ValueError."""
    _need_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        model = build(SpeechConfig(**json.loads(metadata["config"])))
        model.load_state_dict(state)
        texts = metadata["texts"].split("\n")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = shorten(str(error), 300)  # one line of torch's many
        raise ValueError(f"{path} holds no model that --save has written: {reason}") from error
    return model.eval(), texts


# ── 6 Training ──────────────────────────────────────────────────────────────────────────────────
#
# A batch is made of utterances of about the same length, since all are padded to the longest.
# SortaGrad: in the first epoch the batches come in order of length, short ones first. Long
# utterances have small probabilities and large gradients while the network knows nothing, and the
# short ones teach it the letters. Later epochs shuffle the batches.


def sortagrad_batches(
    lengths: list[int], batch: int, epoch: int, seed: int = 0, sort: bool = True
) -> list[list[int]]:
    """Epoch `epoch`'s batches, as lists of utterance numbers; each utterance is in exactly one.

    Args: sort: False shuffles epoch 0, too. Source: Deep Speech 2, section 3.3.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    if epoch or not sort:
        random.Random(f"{seed} {epoch}").shuffle(batches)
    return batches


def utterances_of(batch: list[int], lengths: list[int], rank: int, ranks: int) -> list[int]:
    """This rank's utterances of a batch, dealt out in turn, longest first: no rank gets all of the
    long ones, which the others would wait for."""
    return sorted(batch, key=lambda i: -lengths[i])[rank::ranks]


@dataclass
class Schedule:
    """The learning rate of each step."""

    optimizer: str  # "nesterov", the papers', or "adamw"
    peak: float
    epoch_steps: int
    epochs: int

    def __call__(self, step: int) -> float:
        """Divided by 1.2 after each epoch, as in Deep Speech 2; for AdamW 100 steps up, then a
        cosine."""
        if self.optimizer == "nesterov":
            return self.peak / 1.2 ** (step // self.epoch_steps)
        warm_up = min(1.0, (step + 1) / 100)
        done = step / max(1, self.epoch_steps * self.epochs)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * warm_up * cosine


def optimizer_for(model: nn.Module, kind: str = "nesterov") -> torch.optim.Optimizer:
    """The papers' Nesterov momentum, or AdamW; a `Schedule` sets the learning rate."""
    if kind == "nesterov":
        return ds.make_optimizer(model, lr=1e-3)
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)


def scheduled(optimizer: torch.optim.Optimizer, rate: Callable, steps: ds.Steps) -> ds.Steps:
    """Sets rate(step) before each step of a training; yields what it yields."""
    for step in itertools.count():
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        result = next(steps, None)
        if result is None:
            return
        yield result


@torch.no_grad()
def transcribe(
    model: ds.DeepSpeech2, speech: Speech, rows: Iterable[int], lm: Any, args: argparse.Namespace
) -> list[tuple[str, str, str]]:
    """(reference, greedy text, text by beam search) of utterances. Call model.eval() before."""
    found = []
    weight = next(model.parameters())
    alphabet = model.config.alphabet
    for i in rows:
        batch = speech.batch([i], model.config).to(weight.device, weight.dtype)
        log_probs_TBV, _ = model(batch.features_BTF, batch.frames_B)
        log_probs_TV = log_probs_TBV[:, 0].cpu()
        plain = " ".join(ds.greedy(log_probs_TV, alphabet).split())
        best, *_ = beam_search(log_probs_TV, alphabet, args.beam, lm, args.alpha, args.beta)
        found.append((speech.texts[i], plain, best[0]))
    return found


def report(found: list[tuple[str, str, str]]) -> None:
    """Rank 0 prints the first texts, and the word error rates: greedy, and with beam search."""
    references, *written = zip(*found)
    ds.say(f"\n{'said':35}{'written, greedy':35}with the language model")
    for row in found[:6]:
        cells = [f"{text[:33]:35}" for text in row]
        ds.say("".join(cells).rstrip())
    rates = []
    for texts in written:
        errors, words = word_errors(references, texts)
        rates.append(f"{errors / words:.1%}" if words else f"{errors} words in silence")
    ds.say(f"\nword error rate {rates[0]} greedy, {rates[1]} with beam search\n")


def read_speech(
    args: argparse.Namespace, config: SpeechConfig, tell: Callable
) -> tuple[Speech, Speech]:
    """The train and the eval split. Raises: OSError, ValueError."""
    if not args.data:
        train = Speech.synthetic(320, config, args.seed)
        return train, Speech.synthetic(60, config, args.seed + 1)
    train = Speech.from_manifest(args.data, config, tell)
    try:
        NGram(train.texts)
    except ValueError as error:  # no text has a word
        raise ValueError(f"{args.data}: {error}") from error
    return train, Speech.from_manifest(args.dev or args.data, config, tell)


def train_on(
    args: argparse.Namespace,
    device: torch.device,
    ring_group: ds.Group,
    model: ds.DeepSpeech2,
    speech: Speech,
) -> int:
    """Trains; returns the number of steps."""
    dtype, autocast = ds.dtypes(args)
    config = model.config
    lengths = [len(wave_W) for wave_W in speech.waves]
    epoch_steps = math.ceil(len(lengths) / args.batch)
    total = min(args.steps or math.inf, args.epochs * epoch_steps, sys.maxsize)

    def batches() -> Iterator[ds.Batch]:
        for epoch in range(args.epochs):
            key = (args.seed, epoch) if args.distort else None
            sort = not args.no_sortagrad
            for rows in sortagrad_batches(lengths, args.batch, epoch, args.seed, sort):
                mine = utterances_of(rows, lengths, ds.group_rank(), ds.group_size())
                yield speech.batch(mine, config, key).to(device, dtype)

    ds.say("epoch   step     loss      norm")
    optimizer = optimizer_for(model, args.optimizer)
    rate = Schedule(args.optimizer, args.lr, epoch_steps, args.epochs)
    steps = itertools.islice(batches(), total)
    steps = ds.train(model, optimizer, steps, None, ring_group, args.max_norm, autocast)
    steps = scheduled(optimizer, rate, steps)
    hidden = ds.group_rank() > 0 or not sys.stderr.isatty()
    losses = []
    done = 0
    try:
        for step, results in enumerate(tqdm(steps, total=total, disable=hidden), 1):
            loss, norm = ds.read_step(step, *results)
            done = step
            losses.append(loss)
            if step % epoch_steps == 0 or step == total:
                mean = sum(losses) / len(losses)
                epoch = math.ceil(step / epoch_steps)
                ds.say(f"{epoch:5} {step:6} {mean:8.4f} {norm:9.2f}")
                losses = []
    except KeyboardInterrupt:
        unsaved = f"; nothing was saved in {args.save}" if args.save else ""
        raise KeyboardInterrupt(f"after step {done}{unsaved}") from None
    return done


def main(args: argparse.Namespace, device: torch.device) -> None:
    torch.set_flush_denormal(True)
    ring_group = ds.make_group([list(range(ds.group_size()))], device, args.timeout)
    ds.say_setting(args)
    config = config_of(args)
    train, evaluation = read_speech(args, config, ds.say)
    model = build(config).to(device, ds.dtypes(args)[0])
    ds.wait_for_all()  # one node's disk may be slower than the others'
    size = sum(p.numel() for p in model.parameters())
    minutes = sum(len(wave_W) for wave_W in train.waves) / config.sample_rate / 60
    sizes = f"{len(train.texts)} utterances to train on, {minutes:.1f} minutes"
    sizes += f", {len(evaluation.texts)} to evaluate on"
    ds.say(f"{size:,} parameters; {sizes}\n")
    torch.manual_seed(args.seed + ds.group_rank())  # dropout: each rank has its own utterances
    train_on(args, device, ring_group, model, train)
    ds.check_replicas(model)
    mine = range(ds.group_rank(), len(evaluation.texts), ds.group_size())
    found = transcribe(model.eval(), evaluation, mine, NGram(train.texts), args)
    ds.wait_for_all()  # a large beam takes minutes per utterance, and some ranks may have none
    everyone = [None] * ds.group_size()
    dist.all_gather_object(everyone, found)
    if args.save and ds.group_rank() == 0:
        save_model(args.save, model, train.texts)
    report(list(itertools.chain(*everyone)))


# ── 7 The command line ──────────────────────────────────────────────────────────────────────────

# The recipe for half an hour of real speech, and the largest English network of Deep Speech 2.
SIZES = {
    "small": {},
    "digits": {
        "convolutions": ((16, (11, 11), (2, 2)), (24, (5, 7), (1, 2))),
        "num_layers": 2,
        "hidden_size": 128,
        "dropout": 0.1,
    },
    "paper": {
        "sample_rate": 16_000,
        "mel_bands": 0,
        "num_layers": 7,
        "hidden_size": 1280,
        "convolutions": ((32, (11, 41), (2, 2)), (32, (11, 21), (1, 2)), (96, (11, 21), (1, 2))),
    },
}


@dataclass
class Options:
    """The flags of this tool."""

    data: str = flag("", "a manifest to train on", metavar="FILE")
    dev: str = flag("", "a manifest to evaluate on", metavar="FILE")
    size: str = flag("small", "of the network", choices=list(SIZES))
    model: str = flag("{}", 'change SpeechConfig, as {"num_layers": 3}', metavar="JSON")
    no_sortagrad: bool = flag(False, "the first epoch in random order")
    distort: bool = flag(False, "another pitch, tempo and noise in each epoch")
    epochs: int = flag(8, "passes over the data; --steps ends earlier", least=1)
    batch: int = flag(8, "utterances per step, over all ranks", least=1)
    optimizer: str = flag("nesterov", "or AdamW with a cosine", choices=["nesterov", "adamw"])
    lr: float = flag(0.04, "peak learning rate", least=1e-9)
    max_norm: float = flag(3.0, "of the gradient; Deep Speech 2 has 400", least=1e-9)
    beam: int = flag(32, "prefixes that beam search keeps", least=1)
    alpha: float = flag(1.0, "weight of the language model", least=-1e9)
    beta: float = flag(1.0, "bonus for each word", least=-1e9)
    save: str = flag("", "keep the trained model", metavar="FILE")
    load: str = flag("", "a saved model, for --evaluate or --transcribe", metavar="FILE")
    evaluate: str = flag("", "print the word error rate on a manifest", metavar="FILE")
    transcribe: str = flag("", "print the text of an audio file", metavar="FILE")


def config_of(args: argparse.Namespace) -> SpeechConfig:
    """Raises ValueError that names the flag."""
    try:
        changes = json.loads(args.model)
        if not isinstance(changes, dict):
            raise ValueError(f'a JSON object is needed, such as {{"num_layers": 3}}, not {changes}')
        return SpeechConfig(**(SIZES[args.size] | {"seed": args.seed} | changes))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--model {args.model}: {error}") from error


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where the flags, or the files that they name, do not fit."""
    if args.check:
        raise ValueError("--check is deepspeech.py's: this network is the same")
    uses = args.evaluate or args.transcribe
    if bool(args.load) != bool(uses) or (args.dev and not args.data):
        raise ValueError("--load goes with --evaluate or --transcribe, and --dev with --data")
    if args.load and (args.data or args.save):
        raise ValueError("--load does not train: leave --data and --save out")
    folder = os.path.dirname(args.save) or "."
    if args.save and (os.path.isdir(args.save) or not os.access(folder, os.W_OK)):
        raise ValueError(f"--save {args.save}: its folder does not exist or cannot be written")
    config = load_model(args.load)[0].config if args.load else config_of(args)
    if args.data:
        read_speech(args, config, lambda text: None)
    if args.evaluate:
        Speech.from_manifest(args.evaluate, config, lambda text: None)
    if args.transcribe:
        load_audio(args.transcribe, config.sample_rate)


def flags() -> argparse.Namespace:
    return ds.parse_flags(__doc__, [Options], check_args, ranks=2, steps=0)


def use_model(args: argparse.Namespace) -> None:
    """--evaluate and --transcribe: one process, no ranks."""
    torch.set_num_threads(1)
    model, texts = load_model(args.load)
    lm = NGram(texts)
    if args.evaluate:
        speech = Speech.from_manifest(args.evaluate, model.config, print)
        report(transcribe(model, speech, range(len(speech.texts)), lm, args))
    if args.transcribe:
        speech = Speech([load_audio(args.transcribe, model.config.sample_rate)], [""])
        ((_, plain, searched),) = transcribe(model, speech, [0], lm, args)
        print(f"greedy             {plain}\nwith beam search   {searched}")


if __name__ == "__main__":
    arguments = flags()
    if arguments.load:
        use_model(arguments)
    else:
        ds.launch(main, arguments)
