# SPDX-License-Identifier: MIT-0
"""Chapter 1's tool: networks, sound, language model and beam search, manifests, saved models."""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import deepspeech as ds
import numpy as np
import pytest
import ranks
import scripts
import speech
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import Shows, assert_differs, assert_equal, plant, worst_of
from test_01_deepspeech import heard_alone, loss_of, off, random, says
from torch import nn
from utterances import small_batch

SCRIPT = Path(speech.__file__)


def config(**changes) -> speech.SpeechConfig:
    convolutions = ((3, (5, 5), (2, 2)), (4, (3, 3), (1, 2)))
    sizes = dict(mel_bands=12, convolutions=convolutions, num_layers=2, hidden_size=10)
    return speech.SpeechConfig(**(sizes | changes))


def models(cfg):
    """The plain network, and the one that shares its statistics with all ranks."""
    nets = speech.build(cfg, is_plain=True), speech.build(cfg)
    return tuple(net.to(ranks.device, torch.float64) for net in nets)


@contextlib.contextmanager
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ── 1 Networks ────────────────────────────────────────────────────────────────────────────────────


LAYOUTS = [
    {},
    {"bidirectional": False},
    {"cell": "gru"},
    {"cell": "gru", "bidirectional": False, "num_layers": 1},
    {"batch_norm": False},
    {"dropout": 0.0, "num_layers": 3, "hidden_size": 4},
]


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
@pytest.mark.parametrize("change", LAYOUTS[1:5], ids=str)
def test_five_steps(kind, change):
    """Every kind of network, with each optimizer of this tool."""
    cfg = config(**change)
    plain, parallel = models(cfg)
    batches = [small_batch(7, cfg, seed).to(ranks.device, torch.float64) for seed in range(5)]
    alone = speech.scheduled(
        *(of := (speech.optimizer_for(plain, kind), lambda step: 0.01 / (step + 1))),
        ds.train_alone(plain, of[0], batches, 0.5),
    )
    optimizer = speech.optimizer_for(parallel, kind)
    own = [batch.rows(range(dist.get_rank(), 7, dist.get_world_size())) for batch in batches]
    ring_group = ds.make_group([list(range(dist.get_world_size()))], ranks.device, 60.0)
    together = ds.train(parallel, optimizer, own, None, ring_group, 0.5)
    together = speech.scheduled(optimizer, lambda step: 0.01 / (step + 1), together)
    for (expected, norm), (loss, norm_here) in zip(alone, together, strict=True):
        assert norm > 0.5, "nothing was clipped"
        assert_equal({"loss": loss, "norm": norm_here}, {"loss": expected, "norm": norm})
    state = {name: x for name, x in plain.state_dict().items() if x.is_floating_point()}
    here = {name: parallel.state_dict()[name] for name in state}
    assert_equal(here, state, floor=0.02 if kind == "adamw" else 0.0)  # Σ of the rates


def test_each_step_has_its_own_rate():
    """The schedule is asked for step 0, 1, 2 ..., and that rate is set when the step is taken."""
    asked, used = [], []
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)

    def rate(step):
        asked.append(step)
        return 0.1 * (step + 1)

    def steps():
        for _ in range(3):
            used.append(optimizer.param_groups[0]["lr"])
            yield "result"

    assert list(speech.scheduled(optimizer, rate, steps())) == ["result"] * 3
    assert asked[:3] == [0, 1, 2] and used == pytest.approx([0.1, 0.2, 0.3])


def test_optimizers():
    """Nesterov's momentum as in the chapter; AdamW's settings, which no comparison would notice."""
    model = nn.Linear(2, 2)
    sgd = speech.optimizer_for(model).defaults
    assert (sgd["momentum"], sgd["nesterov"], sgd["dampening"]) == (0.9, True, 0)
    adamw = speech.optimizer_for(model, "adamw").defaults
    assert (adamw["betas"], adamw["eps"], adamw["weight_decay"]) == ((0.9, 0.99), 1e-8, 0.01)


@pytest.mark.parametrize("change", LAYOUTS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_an_utterance_is_heard_alone_as_in_a_batch(change, which):
    cfg = config(**change)
    heard_alone(models(cfg)[which], small_batch(6, cfg).to(ranks.device, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", LAYOUTS[:5], ids=str)
def test_networks_in_half_precision(change, dtype):
    cfg = config(**change)
    for model in models(cfg):
        batch = small_batch(4, cfg).to(ranks.device, dtype)
        log_probs, frames = model.to(dtype)(batch.features_BTF, batch.frames_B)
        ds.ctc_loss(log_probs, batch.labels_BU, frames, batch.sizes_B).backward()
        assert log_probs.dtype == torch.float32 and log_probs.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_gated_recurrence_is_pytorchs():
    """With tanh in place of the clip, and z reversed, it is nn.GRU's."""
    theirs = nn.GRU(18, 6, bias=False).double()  # rows of its weights: r, z, n; its z keeps h
    x, order = random(9, 3, 18), torch.arange(18).view(3, 6)[[1, 0, 2]].flatten()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(18)[order])
        theirs.weight_ih_l0[6:12] *= -1
    weight = theirs.weight_hh_l0.detach()[order].T[None].clone()
    weight[..., :6] *= -1
    assert_equal({"h": speech.gru(x[:, None], weight, torch.tanh)[:, 0]}, {"h": theirs(x)[0]})
    h = speech.gru(50 * random(9, 1, 3, 18), weight)
    rounded = 20 * (1 + 1e-15)  # each h is z·c + (1 − z)·h, of values up to 20
    assert h.max() <= rounded and h.min() >= 0 and (h >= 20).any()


def test_the_papers_front_end():
    """161 bins become 81, 41 and 21; the shapes of the three convolutions."""
    cfg = speech.SpeechConfig(**speech.SIZES["paper"])
    assert [cfg.after(cfg.num_bins, 1, n) for n in range(4)] == [161, 81, 41, 21]
    assert cfg.after(1000, 0) == 500


def test_row_convolution():
    """The formula, feature by feature: frame t sees no frame after t + τ, and none before t."""
    layer = speech.RowConvolution(4, 3).double()
    nn.init.uniform_(layer.weight, 0.1, 1.0)
    x = random(9, 2, 4).abs().requires_grad_()
    padded = torch.cat([x, torch.zeros(3, 2, 4)])
    expected = torch.stack(
        [sum(layer.weight[:, j] * padded[t + j] for j in range(4)) for t in range(9)]
    )
    y = layer(x, torch.ones(9, 2, dtype=torch.bool))
    assert_equal({"y": y}, {"y": expected.clamp(0, 20)})
    (grad,) = torch.autograd.grad(y[4, 0, 1], x)
    assert grad.nonzero().tolist() == [[t, 0, 1] for t in range(4, 8)]


@pytest.mark.planted_bug(
    symptom="the net trains; but what it writes at t uses the past and not the future", seen_in=None
)
def test_a_row_convolution_padded_on_the_wrong_side():
    layer, original, results = speech.RowConvolution(3, 2).double(), F.pad, []
    nn.init.uniform_(layer.weight, 0.1, 1.0)
    for pad in (original, lambda y, sides: original(y, sides[::-1])):
        x = random(7, 1, 3).abs().requires_grad_()
        with plant(F, "pad", pad):
            y = layer(x, torch.ones(7, 1, dtype=torch.bool))
        (grad,) = torch.autograd.grad(y[4, 0, 0], x, retain_graph=True)
        layer.zero_grad()
        loss = y.square().mean()
        loss.backward()
        results.append(
            (
                grad[:, 0, 0].nonzero().flatten().tolist(),
                loss,
                {"weight": layer.weight.grad.clone()},
            )
        )
    (reach, expected, right), (wrong_reach, loss, wrong) = results
    assert reach == [4, 5, 6] and wrong_reach == [2, 3, 4]
    assert_differs(wrong, right)
    return Shows(off(loss, expected), worst_of(wrong, right))


# ── 2 Sound ───────────────────────────────────────────────────────────────────────────────────────


def test_spectrogram():
    """Sizes, a tone in its bin, loudness has no say; the paper's 161 bins at 16 kHz."""
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)
    tone = tone * (1 + torch.sin(2 * math.pi * 3 * torch.arange(16_000) / 16_000))
    x = speech.log_spectrogram(tone)
    assert x.shape == (1 + (16_000 - 320) // 160, 161)
    assert x.std(0).argmax() in (19, 20, 21)  # 1,000 Hz stands in bin 20; only it moves
    assert (
        torch.allclose(x, speech.log_spectrogram(100 * tone), atol=1e-4)
        and x.mean(0).abs().max() < 1e-4
    )
    assert speech.log_spectrogram(tone[:7], 8000, 40).shape == (1, 40)
    assert torch.isfinite(speech.log_spectrogram(torch.zeros(4000), 8000, 40)).all()
    assert speech.log_spectrogram(torch.rand(8000), 8000, 40).std(0).min() > 0  # no band is empty


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.0])
def test_noise_has_the_power_that_was_asked_for(snr):
    wave, noise = random(5000), random(700, seed=2) * 13
    added = speech.mix_noise(wave, noise, snr) - wave
    assert math.isclose(
        10 * math.log10(wave.square().mean() / added.square().mean()), snr, abs_tol=1e-12
    )
    with pytest.raises(ValueError, match="no power"):
        speech.mix_noise(wave, torch.zeros(5), 3.0)
    late = torch.cat([torch.zeros(5000), noise])  # silent as long as the wave lasts
    for useless in (late, torch.zeros(0)):
        with pytest.raises(ValueError, match="no power"):
            speech.mix_noise(wave, useless, 3.0)


def test_resampling_keeps_the_tone():
    for rate in (16_000, 11_025, 44_100, 8000):
        at, there = (
            torch.arange(rate, dtype=torch.float64) / rate,
            torch.arange(8000, dtype=torch.float64) / 8000,
        )
        wave = speech.resample(torch.sin(2 * math.pi * 500 * at), rate, 8000)
        assert_equal({"wave": wave}, {"wave": torch.sin(2 * math.pi * 500 * there)})


def test_speech_is_a_function_of_the_seed():
    a, b, c = (speech.Speech.synthetic(3, config(), seed) for seed in (1, 1, 2))
    assert (
        a.texts == b.texts
        and all(torch.equal(x, y) for x, y in zip(a.waves, b.waves))
        and a.texts != c.texts
    )
    first, again, other = (a.batch([1, 2], config(), key) for key in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(first.features_BTF, again.features_BTF)
    assert first.features_BTF.shape != other.features_BTF.shape or not torch.equal(
        first.features_BTF, other.features_BTF
    )
    swapped = a.batch(
        [2], config(), (0, 1)
    )  # distortion belongs to the utterance, whatever batch it is in
    assert torch.equal(swapped.features_BTF[0], first.features_BTF[1, : swapped.frames_B[0]])


# ── 3 Language model and beam search ──────────────────────────────────────────────────────────────


def texts_of_all_paths(log_probs_TV: torch.Tensor) -> dict[str, float]:
    """Every text's log-probability, by looking at every path."""
    T, V = log_probs_TV.shape
    found: dict[str, list] = {}
    for path in itertools.product(range(V), repeat=T):
        text = " ".join("".join(ds.ALPHABET[symbol] for symbol in says(path)).split())
        found.setdefault(text, []).append(log_probs_TV[range(T), list(path)].sum())
    return {text: torch.logsumexp(torch.stack(terms), 0).item() for text, terms in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_without_a_limit_is_exact(seed):
    """Symbols _, space, ', a in six frames: every text, with its probability, in order."""
    x = (random(6, 4, seed=seed) * 2).log_softmax(-1)
    found, expected = dict(speech.beam_search(x, beam=10**6, cutoff=1.0)), texts_of_all_paths(x)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[text], log_p, rel_tol=1e-10) for text, log_p in expected.items())
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("has_end", [True, False])
def test_beam_search_with_a_language_model_is_exact(has_end):
    """Q = log P + α (log P_lm, of the end of the sentence too) + β words of every text."""
    counted = speech.NGram(["a a' a", "a' a", "a"], order=2)
    lm = counted if has_end else types.SimpleNamespace(score=counted.score)
    x = (random(6, 4, seed=5) * 2).log_softmax(-1)
    options = dict(beam=10**6, lm=lm, alpha=0.7, beta=0.3, cutoff=1.0)
    found = dict(speech.beam_search(x, **options))
    expected = {}
    for text, log_p in texts_of_all_paths(x).items():
        words = text.split()
        scores = [counted.score(tuple(words[:i]), word) for i, word in enumerate(words)]
        if has_end:
            scores.append(counted.score(tuple(words), "</s>"))
        expected[text] = log_p + 0.7 * sum(scores) + 0.3 * len(words)
    assert found.keys() == expected.keys()
    for text, q in expected.items():
        assert math.isclose(found[text], q, rel_tol=1e-10), text
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_end_of_the_sentence_can_change_the_best_text():
    """The network hears "a a" and "a" alike; the language model has never seen a text end there."""
    x = torch.full((3, 4), -20.0)
    x[0, 3] = x[2, 3] = x[1, 1] = 0
    x[1, 3] = 0.1  # without a space: one word
    lm = speech.NGram(["a a"] * 20, order=3)
    without = types.SimpleNamespace(score=lm.score)
    found = [speech.beam_search(x.log_softmax(-1), lm=m, beta=0.0)[0][0] for m in (lm, without)]
    assert found == ["a a", "a"]


class Toolkit(types.ModuleType):
    """What the README's adapter uses of the package kenlm, on our counts: log10, states of words,
    and answers in the state that the caller has made."""

    def __init__(self, counted: speech.NGram):
        super().__init__("kenlm")
        self.counted = counted
        self.paths = []

    class State:
        words = None

    def Model(self, path):
        self.paths.append(path)
        return self

    def BeginSentenceWrite(self, state):
        state.words = ()

    def BaseScore(self, before, word, after):
        after.words = (*before.words, word)
        return self.counted.score(before.words, word) / math.log(10)


def test_the_adapter_of_the_readme_scores_as_the_model_that_it_adapts():
    """Its code, executed: every word, an unknown one and the end, and the beam's Q."""
    page = (SCRIPT.parent / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(class KenLM.*?)```", page, re.DOTALL)
    counted = speech.NGram(["a a' a", "a' a", "a"])
    names = {"kenlm": Toolkit(counted)}
    exec(code, names)
    lm = names["KenLM"]("words.arpa")
    assert names["kenlm"].paths == ["words.arpa"] and lm.end == counted.end
    for history in [(), ("a",), ("a", "a'"), ("a'", "a", "a", "b")]:
        for word in ("a", "a'", "never said", lm.end):
            expected = counted.score(history, word)
            assert math.isclose(lm.score(history, word), expected, rel_tol=1e-6), (history, word)
    x = (random(6, 4, seed=5) * 2).log_softmax(-1)
    expected = dict(speech.beam_search(x, lm=counted))
    found = dict(speech.beam_search(x, lm=lm))
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[text], q, rel_tol=1e-6) for text, q in expected.items())


def test_a_narrow_beam_prunes_with_the_language_model():
    """Four prefixes for a beam of two: "a", "a ", "d", "d ". The network alone would drop both d's,
    and the language model knows no other word."""
    x = torch.full((2, 29), -30.0)
    x[0, [ds.ALPHABET.index("a"), ds.ALPHABET.index("d")]] = torch.tensor([0.0, -0.3])
    x[1, [1, 0]] = torch.tensor([0.0, -0.1])  # a space, which completes the word, or a blank
    lm = speech.NGram(["d"] * 20)
    x = x.log_softmax(-1)
    assert {text for text, _ in speech.beam_search(x, beam=2)} == {"a"}
    assert speech.beam_search(x, beam=2, lm=lm)[0][0] == "d"


def test_scores_that_are_no_numbers():
    """α = 0 asks no model; −∞ is the worst, and sorts last; NaN is refused, wherever from."""
    x = (random(5, 4, seed=3) * 2).log_softmax(-1)

    def model(value):
        return types.SimpleNamespace(score=lambda history, word: value, end="</s>")

    asked = types.SimpleNamespace(score=lambda history, word: pytest.fail("it was asked"), end="x")
    plain = dict(speech.beam_search(x, beta=0.0))
    for lm in (model(-math.inf), model(math.nan), asked):
        assert dict(speech.beam_search(x, lm=lm, alpha=0.0, beta=0.0)) == plain
    found = speech.beam_search(x, lm=model(-math.inf))
    assert found and all(q == -math.inf for _, q in found)
    with pytest.raises(ValueError, match="language model's score of .* is NaN"):
        speech.beam_search(x, lm=model(math.nan))
    with pytest.raises(ValueError, match="log_probs contain NaN"):
        speech.beam_search(torch.full((3, 4), math.nan))
    with pytest.raises(ValueError, match="beam=0"):
        speech.beam_search(torch.zeros(3, 29), beam=0)
    with pytest.raises(ValueError, match="no word in it"):
        speech.NGram(["", " "])


def test_another_alphabet():
    """Blank first, and any letters after it."""
    x = torch.full((3, 3), -9.0)
    for t, symbol in enumerate([2, 0, 1]):
        x[t, symbol] = 0
    assert speech.beam_search(x.log_softmax(-1), "_öä")[0][0] == "äö" == ds.greedy(x, "_öä")


def test_beam_search_prefers_the_text_to_the_path():
    """The most probable path says nothing, yet "a" is more probable: 0.4 · 0.4 + 2 · 0.6 · 0.4."""
    p = torch.zeros(2, 29)
    p[:, 0], p[:, 3] = 0.6, 0.4
    assert ds.greedy(p.log()) == "" and speech.beam_search(p.log())[0][0] == "a"
    assert math.isclose(math.exp(speech.beam_search(p.log())[0][1]), 0.64, rel_tol=1e-6)
    assert ds.greedy(torch.zeros(0, 29)) == "" == speech.beam_search(torch.zeros(0, 29))[0][0]


def test_a_language_model_repairs_a_word():
    x = torch.full((9, 29), -12.0)
    for t, letter in enumerate("tvo _one_"):
        x[t, ds.ALPHABET.index(letter)] = 0
    x[1, ds.ALPHABET.index("w")] = -0.5
    lm = speech.NGram(["two one", "one two", "two"])
    assert (
        ds.greedy(x) == "tvo one"
        and speech.beam_search(x.log_softmax(-1), lm=lm)[0][0] == "two one"
    )


def test_the_n_gram_is_a_distribution():
    """After any history the words, the unknown one and the end add up to 1."""
    lm = speech.NGram(["one two three", "one two one", "three"], order=3)
    for history in ((), ("one",), ("one", "two"), ("never", "heard"), ("never", "two")):
        total = sum(math.exp(lm.score(history, word)) for word in [*lm.words, "unheard-of"])
        assert math.isclose(total, 1.0, rel_tol=1e-12)
    assert lm.words == {"one", "two", "three", "</s>"}
    scores = [lm.score(("one", "two"), word) for word in ("three", "two", "unheard-of")]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    assert lm.score(("one", "two", "three"), "</s>") > lm.score(("one", "two"), "</s>")
    assert lm.score((), "one") == lm.score(("<s>", "<s>"), "one")
    unigram = speech.NGram(["a a b"], order=1)  # a, a, b and the end; three kinds, and the unknown
    assert math.isclose(math.exp(unigram.score((), "a")), (1.5 + 0.5 * 3 / 4) / 4)


def test_word_errors():
    errors = speech.word_errors
    assert errors(["one two three"], ["one two three"]) == (0, 3)
    assert errors(["one two"], [""]) == (2, 2)
    assert errors(["one two three four"], ["one too three four five"]) == (2, 4)
    assert errors(["a b", "c"], ["b", "c"]) == (1, 3) and errors(["a"], ["a b c"]) == (2, 1)
    assert errors([""], ["one two"]) == (2, 0)  # insertions over an empty reference are a count
    with pytest.raises(ValueError):
        errors(["a", "b"], ["a"])


def test_an_evaluation_on_silence_is_reported(capsys):
    speech.report([("", "one two", ""), ("", "", "")])
    line = capsys.readouterr().out.splitlines()[-2]
    assert line == "word error rate 2 words in silence greedy, 0 words in silence with beam search"


# ── 4 Recordings ──────────────────────────────────────────────────────────────────────────────────


def write(folder, *lines, audio=None, rate=8000, name="a.wav"):
    import soundfile

    soundfile.write(
        folder / name, np.zeros(4000) if audio is None else audio, rate, subtype="FLOAT"
    )
    (folder / "m.jsonl").write_text("\n".join(lines), "utf-8")
    return str(folder / "m.jsonl")


def entry(audio="a.wav", text="one", **more) -> str:
    return json.dumps({"audio_filepath": audio, "duration": 0.5, "text": text} | more)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "m.jsonl holds no utterance"),
        (["", "  "], "holds no utterance"),
        ([entry(), "not json"], "line 2: JSONDecodeError.* a line looks like"),
        ([entry(), "[1]"], "line 2: TypeError"),
        ([json.dumps({"text": "one"})], "line 1: KeyError"),
        ([entry(text=5)], "line 1: AttributeError"),
        ([entry(), "", entry(text="naïve 3")], r"line 3: \['3', 'ï'\] not in the alphabet"),
        ([entry("b.wav")], "line 1: there is no file .*b.wav"),
        ([entry(), entry(offset=5)], "line 2: offset 5: files are read whole, so cut .*a.wav"),
        ([entry(offset="1.5")], "line 1: offset 1.5"),
        ([entry(duration="long")], "line 1: ValueError.* a line looks like"),
        ([entry(duration=[1])], "line 1: TypeError.* a line looks like"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        speech.read_manifest(write(tmp_path, *lines))


def test_manifests_that_can_be_used(tmp_path):
    """Upper case, many spaces, further keys, empty lines, an empty text; a path that is relative to
    the manifest; a byte order mark; separators that are no end of a line; decomposed letters."""
    path = write(tmp_path, entry(text="  One  TWO "), "", entry(text="", speaker="me", offset=0.0))
    audio = str(tmp_path / "a.wav")
    expected = [speech.Utterance(audio, "one two", 1), speech.Utterance(audio, "", 3)]
    assert speech.read_manifest(path) == expected
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert speech.read_manifest(path) == expected
    for separator in ("\u2028", "\u2029", "\x85"):
        line = json.dumps(
            json.loads(entry(text=f"one{separator}two", note=separator)), ensure_ascii=False
        )
        assert separator in line
        path = write(tmp_path, line, entry())
        assert [found.text for found in speech.read_manifest(path)] == ["one two", "one"]
    path = write(tmp_path, entry(text="scho\u0308n"))  # o and a combining mark
    assert speech.read_manifest(path, "_cshönö"[:-1])[0].text == "schön"
    with pytest.raises(FileNotFoundError):
        speech.read_manifest(str(tmp_path / "nowhere"))


def test_a_manifest_that_is_not_utf_8(tmp_path):
    """The error names the file."""
    (tmp_path / "m.jsonl").write_bytes("{naïve}".encode("latin-1"))
    with pytest.raises(ValueError, match="m.jsonl is not UTF-8 at byte 3"):
        speech.read_manifest(str(tmp_path / "m.jsonl"))


def test_a_pipe_is_refused(tmp_path):
    """It could be read only once: each rank reads the manifest, and what --load, --evaluate and
    --transcribe name is read for the check of the flags, and then for use."""
    os.mkfifo(tmp_path / "pipe")
    for read in (
        speech.read_manifest,
        speech.load_model,
        lambda path: speech.load_audio(path, 8000),
    ):
        for path in (tmp_path / "pipe", tmp_path):
            with pytest.raises(ValueError, match=f"{path} is no regular file"):
                read(str(path))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_audio_of_any_kind(tmp_path, rate, channels, name):
    import soundfile

    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / name, np.stack([tone] * channels, 1), rate)
    wave = speech.load_audio(str(tmp_path / name), 8000)
    assert wave.shape == (8000,) and wave.dtype == torch.float32
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(8000) / 8000)
    assert (wave - expected)[100:-100].abs().max() < 1e-2


def test_audio_that_cannot_be_used(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"this is no audio at all" * 50)
    for name, message in (
        ("noise.wav", "noise.wav cannot be read as audio"),
        ("gone.wav", "gone.wav cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            speech.load_audio(str(tmp_path / name), 8000)
    bad = np.zeros(4000)
    bad[7] = np.nan
    write(tmp_path, audio=bad)
    with pytest.raises(ValueError, match=r"a.wav: 4000 samples, of which 1 are not finite"):
        speech.load_audio(str(tmp_path / "a.wav"), 8000)
    write(tmp_path, audio=np.full(4000, 1e30))
    with pytest.raises(ValueError, match=r"4000 are not finite or above 1e\+09"):
        speech.load_audio(str(tmp_path / "a.wav"), 8000)
    write(tmp_path, audio=np.sin(np.arange(4000)) * 9e8)
    loud = speech.load_audio(str(tmp_path / "a.wav"), 8000)
    assert speech.log_spectrogram(loud, 8000, 40).isfinite().all()
    write(tmp_path, audio=np.zeros(0))
    with pytest.raises(ValueError, match="a.wav: 0 samples"):
        speech.load_audio(str(tmp_path / "a.wav"), 8000)
    for name, content in (("noise.wav", "cannot be read as audio"), ("a.wav", "a.wav: 0 samples")):
        path = write(tmp_path, entry("b.wav"), "", entry(name), audio=np.zeros(4000), name="b.wav")
        with pytest.raises(ValueError, match=f"m.jsonl, line 3: .*{content}"):
            speech.Speech.from_manifest(path, config(), print)


def test_a_file_of_another_length_than_its_line_says(tmp_path):
    """The text would be that of a part of it. Rounded durations, and none at all, are read."""
    for seconds in (0.41, 0.5, 0.59, None):
        path = write(tmp_path, entry(duration=seconds))
        recorded = speech.Speech.from_manifest(path, config(), print)
        assert [len(wave_W) for wave_W in recorded.waves] == [4000]
    for seconds in (0.39, 0.61, 0, math.nan):
        path = write(tmp_path, entry(), entry(duration=seconds))
        with pytest.raises(ValueError, match=f"line 2: .*a.wav is 0.50 s long, duration {seconds}"):
            speech.Speech.from_manifest(path, config(), print)


def test_texts_that_are_too_long_are_left_out_aloud(tmp_path):
    """0.5 s are 49 frames, 25 after the stride: 25 letters fit, 24 with a repeat, not 25 with
    one."""
    long, heard = "abcdefghijklmnopqrstuvwxyz"[:25], []
    path = write(
        tmp_path, entry(text=long), entry(text=long[:24] + "z"), entry(text="aa" + long[2:25])
    )
    recorded = speech.Speech.from_manifest(path, config(), heard.append)
    assert recorded.texts == [long, long[:24] + "z"]
    assert (
        len(heard) == 1
        and "left out 1 of 3 utterances" in heard[0]
        and heard[0].endswith("a.wav, line 3")
    )
    with pytest.raises(ValueError, match="no utterance that is long enough"):
        speech.Speech.from_manifest(write(tmp_path, entry(text="a" * 99)), config(), heard.append)


# ── 5 Saved models ────────────────────────────────────────────────────────────────────────────────


def test_a_saved_model_is_the_same_model(tmp_path):
    changes = dict(dropout=0.1, bidirectional=False, alphabet="_ abcö")
    cfg = config(**changes)
    model = speech.build(cfg)
    batch = small_batch(4, cfg)
    model(batch.features_BTF, batch.frames_B)
    speech.save_model(str(tmp_path / "m"), model, ["one two", "three"])
    loaded, texts = speech.load_model(str(tmp_path / "m"))
    assert texts == ["one two", "three"] and loaded.config == model.config and not loaded.training
    assert loaded.config.alphabet == "_ abcö"
    for name, x in model.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name])


def test_a_save_that_fails_leaves_the_older_file(tmp_path):
    """A full disk, Ctrl-C before the file is in its place: the message, the old bytes, no rest."""
    path, model = tmp_path / "m", speech.build(config())
    speech.save_model(str(path), model, ["one"])
    before = path.read_bytes()

    def interrupted(unfinished, path):
        assert unfinished.exists()
        raise KeyboardInterrupt

    def full(tensors, unfinished, metadata):
        unfinished.write_bytes(b"half")
        raise OSError("No space left on device")

    with plant(speech.os, "replace", interrupted), pytest.raises(KeyboardInterrupt):
        speech.save_model(str(path), model, ["two"])
    message = f"cannot write {path}: No space left.*an older one there is unchanged"
    with plant(speech, "save_file", full), pytest.raises(OSError, match=message):
        speech.save_model(str(path), model, ["two"])
    assert [file.name for file in tmp_path.iterdir()] == ["m"] and path.read_bytes() == before


def test_files_that_are_no_model(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="holds no model that --save has written"):
            speech.load_model(str(tmp_path / name))


# ── 6 Training ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
)
def test_sortagrad(lengths, batch, world):
    """Epoch 0 by length, then the same batches shuffled; each utterance once, on one rank."""
    first, *later = (speech.sortagrad_batches(lengths, batch, epoch, seed=3) for epoch in range(3))
    order = [lengths[i] for b in first for i in b]
    assert order == sorted(lengths) and sorted(i for b in first for i in b) == list(
        range(len(lengths))
    )
    for batches in [*later, speech.sortagrad_batches(lengths, batch, 0, seed=3, sort=False)]:
        assert sorted(map(tuple, batches)) == sorted(map(tuple, first))
    for b in first:
        shares = [speech.utterances_of(b, lengths, r, world) for r in range(world)]
        assert (
            sorted(itertools.chain(*shares)) == sorted(b)
            and max(map(len, shares)) - min(map(len, shares)) <= 1
        )


def test_learning_rates():
    rate = speech.Schedule("nesterov", 6e-4, epoch_steps=10, epochs=20)
    assert rate(0) == rate(9) == 6e-4 and math.isclose(rate(25), 6e-4 / 1.44)
    rate = speech.Schedule("adamw", 3e-3, epoch_steps=100, epochs=10)
    assert rate(0) == 3e-5 and math.isclose(rate(500), 1.5e-3) and rate(1000) < 1e-12


DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "digits"


@pytest.mark.skipif(
    not DIGITS.exists(), reason=f"needs recordings of people, {DIGITS}/train.jsonl and dev.jsonl"
)
def test_recordings_of_people():
    """Every utterance can be read, is long enough, and is distorted to one of a similar size."""
    cfg, heard = speech.SpeechConfig(**speech.SIZES["digits"]), []
    recorded = speech.Speech.from_manifest(str(DIGITS / "dev.jsonl"), cfg, heard.append)
    assert not heard and len(recorded.texts) == 100
    plain, other = (recorded.batch(list(range(100)), cfg, key) for key in (None, (0, 0)))
    assert (
        torch.isfinite(other.features_BTF).all()
        and 0.6 < other.frames_B.sum() / plain.frames_B.sum() < 1.5
    )
    loss = loss_of(speech.build(cfg), other)
    assert torch.isfinite(loss)


# ── 7 The command line ────────────────────────────────────────────────────────────────────────────


def refused(flags: list[str], capsys, monkeypatch) -> str:
    """The one line with which flags are refused, after the usage."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit, match="2"):
        speech.flags()
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and line.startswith("speech.py: error: ")
    return line


def arguments(monkeypatch, *flags: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    return speech.flags()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "--epochs: '0' must be"),
        (["--load", "x"], "--load goes with"),
        (["--dev", "x"], "--dev with --data"),
        (["--data", "/nowhere/at/all"], "No such file"),
        (["--beam", "0"], "--beam: '0' must be"),
        (["--lr", "nan"], "--lr: 'nan' must be"),
        (["--lr", "inf"], "--lr: 'inf' must be"),
        (["--lr", "-1"], "--lr: '-1' must be"),
        (["--max-norm", "0"], "--max-norm: '0' must be"),
        (["--beta", "inf"], "--beta: 'inf' must be"),
        (["--save", "/nowhere/at/all"], "its folder does not exist"),
        (["--evaluate", "x"], "--load goes with"),
        (["--load", "x", "--evaluate", "x", "--check"], "--check is deepspeech.py"),
        (["--load", "x", "--evaluate", "x", "--data", "x"], "leave --data and --save out"),
        (["--load", "x", "--evaluate", "x", "--save", "x"], "leave --data and --save out"),
        (["--load", "/nowhere/at/all", "--evaluate", "x"], "No such file"),
        (["--model", '{"num_layers": 0}'], "num_layers=0"),
        (["--model", '{"u": 3}'], "'u'"),
        (["--model", "{"], "--model {: "),
        (["--model", '{"num_layers": 1.5}'], "num_layers=1.5 must be of type int"),
        (["--model", "[1]"], "object is needed"),
        (["--model", "null"], "object is needed"),
        (["--model", '{"num_layers": true}'], "num_layers=True must be of type int"),
        (["--model", '{"dropout": NaN}'], "dropout in [0, 1)"),
        (["--model", '{"dropout": "0"}'], "must be of type float"),
        (["--model", '{"bidirectional": "no"}'], "must be of type bool"),
        (["--model", '{"cell": 3}'], "of type str"),
        (["--model", '{"convolutions": "ab"}'], "must be of type tuple"),
        (["--model", '{"lookahead": null}'], "type int"),
        (
            ["--model", '{"convolutions": [[8, 3, 2]]}'],
            "convolution [8, 3, 2]: it must be channels, [frames, bins]",
        ),
        (
            ["--model", '{"convolutions": [[8, [3.0, 3], [2, 2]]]}'],
            "convolution [8, [3.0, 3], [2, 2]]",
        ),
        (["--model", '{"hidden_size": 1e400}'], "hidden_size=inf"),
        (["--model", '{"sample_rate": 10}'], "sample_rate=10: it must be"),
        (["--model", '{"alphabet": "_aa"}'], "each once"),
        (["--model", '{"num_bins": 3}'], "num_bins"),
        (["--model", '{"seed": -1}'], "seed must not be negative"),
    ],
)
def test_a_wrong_flag_is_one_line_before_any_rank_starts(flags, message, capsys, monkeypatch):
    assert message in refused(flags, capsys, monkeypatch)


def test_a_model_that_does_not_fit_is_one_line_before_any_rank_starts(
    tmp_path, capsys, monkeypatch
):
    """Weights of another size than the file's configuration says; a configuration that is none."""
    path, wave = str(tmp_path / "model"), str(tmp_path / "a.wav")
    write(tmp_path)
    model = speech.build(config())
    use = ["--load", path, "--transcribe", wave]
    model.config = config(hidden_size=11)
    speech.save_model(path, model, ["one"])
    line = refused(use, capsys, monkeypatch)
    assert f"{path} holds no model" in line and "size mismatch" in line
    model.config = config()
    model.config.num_layers = 1.5
    speech.save_model(path, model, ["one"])
    assert "num_layers=1.5 must be of type int" in refused(use, capsys, monkeypatch)


def test_texts_without_a_word_are_found_before_training(tmp_path, capsys, monkeypatch):
    """The language model could not be counted, hours later."""
    path = write(tmp_path, entry(text=""), entry(text=" "))
    line = refused(["--data", path], capsys, monkeypatch)
    assert f"{path}: a language model needs text, but there is no word in it" in line


@pytest.mark.parametrize(
    "save, message", [([], "after step 2$"), (["--save", "m"], "2; nothing was saved in m$")]
)
def test_an_interrupted_run_says_after_which_step(save, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def two_steps(*args, **options):
        yield from [(torch.ones(()), torch.ones(()))] * 2
        raise KeyboardInterrupt

    with plant(ds, "train", two_steps), plant(ds, "wait_for_all", lambda: None), alone():
        with pytest.raises(KeyboardInterrupt, match=message):
            speech.main(arguments(monkeypatch, *save), torch.device("cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks(2)
def test_ranks_that_read_or_search_longer_than_others_are_waited_for():
    """Reading and searching have no time limit: each ends in wait_for_all, before a message."""
    called, original = [], speech.transcribe

    def transcribe(*args):
        called.append("search")
        return original(*args)

    def learn(*args, **options):
        called.append("train")
        yield from [(torch.ones(()), torch.ones(()))] * 2

    def gather(every, found):
        called.append("gather")
        return real_gather(every, found)

    real_gather, argv = dist.all_gather_object, [str(SCRIPT), "--beam", "1"]
    with (
        plant(sys, "argv", argv),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.ExitStack() as stack,
    ):
        args = speech.flags()
        for target, name, double in (
            (speech, "transcribe", transcribe),
            (ds, "train", learn),
            (ds, "wait_for_all", lambda: called.append("wait")),
            (dist, "all_gather_object", gather),
            (ds, "check_replicas", lambda model: called.append("check")),
        ):
            stack.enter_context(plant(target, name, double))
        speech.main(args, torch.device("cpu"))
    assert called == ["wait", "train", "check", "search", "wait", "gather"]


def on_these_ranks(flags: list[str]) -> tuple[int, str]:
    return scripts.on_ranks(speech, *flags)


@pytest.mark.slow
def test_train_save_evaluate_and_transcribe(tmp_path, capsys, monkeypatch):
    """Two ranks learn from files; one process reads the model, and prints rate and text."""
    import soundfile

    rng, lines = np.random.default_rng(3), []
    for i, words in enumerate(["one two", "three", "nine", "six"] * 4):
        wave = 0.5 * speech.synthesize(words.split(), 8000, rng)
        soundfile.write(tmp_path / f"{i}.wav", wave, 8000)
        row = dict(audio_filepath=f"{i}.wav", duration=len(wave) / 8000, text=words)
        lines.append(json.dumps(row))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest, model = str(tmp_path / "m.jsonl"), str(tmp_path / "model.safetensors")
    flags = ["--data", manifest, "--epochs", "2", "--distort", "--save", model]
    flags += ["--model", '{"hidden_size": 8}']
    pool = ranks.Pool(2)
    try:
        ((code, trained), _) = pool.run(__name__, "on_these_ranks", dict(flags=flags), 120)
    finally:
        pool.close()
    assert code == 0
    rate = next(line for line in trained.splitlines() if line.startswith("word error rate"))
    use = ["--load", model, "--evaluate", manifest, "--transcribe", str(tmp_path / "3.wav")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *use])
    speech.use_model(speech.flags())
    printed = capsys.readouterr().out
    assert rate in printed and "greedy  " in printed and "with beam search  " in printed
    (tmp_path / "0.wav").write_bytes(b"no audio")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", manifest])
    with pytest.raises(SystemExit, match="2"):
        speech.flags()
    message = capsys.readouterr().err.splitlines()[-1]
    assert "m.jsonl, line 1: " in message and "0.wav cannot be read as audio" in message


@pytest.mark.slow
def test_the_default_run():
    """Synthetic speakers of the eval split: below 5 % of the words are wrong."""
    result = scripts.forked(SCRIPT, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    rates = re.search(r"word error rate ([\d.]+)% greedy, ([\d.]+)% with beam", result.stdout)
    assert max(map(float, rates.groups())) < 5
