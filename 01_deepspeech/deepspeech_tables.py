# SPDX-License-Identifier: MIT-0
"""Chapter 1's tables: what the two Deep Speech papers printed, and formulas that connect it.

Papers: Deep Speech: Scaling up end-to-end speech recognition, Hannun et al., 2014, arXiv 1412.5567
        Deep Speech 2: End-to-End Speech Recognition in English and Mandarin,
        Amodei et al., 2015, arXiv 1512.02595

    python 01_deepspeech/deepspeech_tables.py        2 s on two CPU cores

Column "paper" has the printed figure, "formula" a computed one, and "here" what this chapter's own
code has. The exit code is 1 where figures that should agree do not.

Left out: error rates, which need the recordings and weeks of GPU time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeech import Counter, DeepSpeech2, DeepSpeechConfig, ring_all_reduce
from torch.testing._internal.distributed.fake_pg import FakeStore

# ── 1 Formulas ──────────────────────────────────────────────────────────────────────────────────


def recurrent_parameters(hidden: int) -> int:
    """Of one bidirectional layer: H² for W, which both directions share, and H² for each U."""
    return 3 * hidden**2


def parameter_count(layers: int, recurrent: int, hidden: int) -> int:
    """Parameters of the nets in Deep Speech 2's comparison of depths.

    A 1-D convolution over 161 frequencies and 11 frames, recurrent layers, fully connected ones,
    29 symbols. With a W for each direction the four nets would have 45 to 51 million, not the 38
    that the paper gives to all. Source: section 3.2 (sizes of its table; the formula is ours).
    """
    convolution = 161 * 11 * hidden
    full = (layers - recurrent - 1) * hidden**2
    return convolution + recurrent * recurrent_parameters(hidden) + full + 29 * hidden


def noisy_share(clean: float, noisy: float, together: float) -> float:
    """The fraction of words that are in the noisy recordings, from three error rates.

    It must be the same for all systems. Source: ours, for Deep Speech's section 5.2.
    """
    return (together - clean) / (noisy - clean)


def ring_share(ranks: int) -> float:
    """Elements that each rank sends in a ring all-reduce, for each element of the vector.

    Source: ours, for Deep Speech 2, section 4.1.
    """
    return 2 * (ranks - 1) / ranks


def sent_by_one(ranks: int) -> float:
    """`ring_share`, counted in the messages that `ring_all_reduce` sends on rank 0.

    The other ranks are simulated: nothing arrives from PyTorch's fake process group.
    """
    vector = torch.zeros(1000 * ranks)
    # TORCH_DISTRIBUTED_DEBUG=DETAIL needs an operation that the fake group does not have.
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with Counter() as counter:
            ring_all_reduce(vector)
    finally:
        dist.destroy_process_group()
        dist.set_debug_level(level)
    sent = sum(message.bytes for message in counter.messages if message.op == "send")
    return sent / vector.nbytes


# ── 2 What the papers printed ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Net:
    """A row of Deep Speech 2's table of depths: all have "38 million" parameters."""

    layers: int
    recurrent: int
    hidden: int


SAME_SIZE = [Net(5, 1, 2400), Net(5, 3, 1880), Net(7, 5, 1510), Net(9, 7, 1280)]


@dataclass(frozen=True)
class NoisySpeech:
    """Error rates in percent on Deep Speech's own recordings, section 5.2."""

    system: str
    clean: float
    noisy: float
    together: float


NOISY_SPEECH = [
    NoisySpeech("Apple", 14.24, 43.76, 26.73),
    NoisySpeech("Bing", 11.73, 36.12, 22.05),
    NoisySpeech("Google", 6.64, 30.47, 16.72),
    NoisySpeech("wit.ai", 7.94, 35.06, 19.41),
    NoisySpeech("Deep Speech", 6.56, 19.06, 11.85),
]
ENGLISH_HOURS = {
    "WSJ": 80,
    "Switchboard": 300,
    "Fisher": 2000,
    "LibriSpeech": 960,
    "Baidu, read": 5000,
    "Baidu, mixed": 3600,
}
OWN_TEST_SET = (24.01, 13.59)  # error rates in percent: Deep Speech, Deep Speech 2
# The convolutions of Deep Speech 2's largest English network: channels, kernel, stride.
FRONT_END = ((32, (11, 41), (2, 2)), (32, (11, 21), (1, 2)), (96, (11, 21), (1, 2)))

# ── 3 The tables ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """A claim; figures are printed as they are compared, and "–" is none.

    note: why figures do not agree, or what a comparison needs. A figure without another one is a
    failure, and so are figures that disagree without a note.
    """

    claim: str
    paper: str
    formula: str = "–"
    here: str = "–"
    note: str = ""

    @property
    def verdict(self) -> str:
        figures = [x for x in (self.paper, self.formula, self.here) if x != "–"]
        agree = len(figures) > 1 and len(set(figures)) == 1
        if agree:
            return "FAILED" if self.note else "ok"
        return self.note or "FAILED"


def models() -> Iterator[Row]:
    """Sizes of networks."""
    for net in SAME_SIZE:
        count = parameter_count(net.layers, net.recurrent, net.hidden) / 1e6
        note = "within 4 %" if abs(count / 38 - 1) < 0.04 else ""
        claim = f"parameters, {net.layers} layers, {net.recurrent} recurrent, H = {net.hidden}"
        yield Row(claim, "38M", f"{count:.1f}M", note=note)
    with torch.device("meta"):
        config = DeepSpeechConfig(2, 1280)
        layer = DeepSpeech2(config).layers[1]
    held = layer.input.weight.numel() + layer.weight.numel()
    formula = f"{recurrent_parameters(1280):,}"
    yield Row("parameters, a recurrent layer, H = 1280", "–", formula, f"{held:,}")
    config = DeepSpeechConfig(num_bins=161, convolutions=FRONT_END)
    sizes = [str(config.after(161, 1, n)) for n in range(4)]
    yield Row("frequency bins after 0 to 3 convolutions", "161 / 81 / 41 / 21", " / ".join(sizes))


def error_rates() -> Iterator[Row]:
    """Printed figures that one formula connects."""
    shares = []
    for row in NOISY_SPEECH:
        shares.append(f"{noisy_share(row.clean, row.noisy, row.together):.3f}")
    for row, share in zip(NOISY_SPEECH[1:], shares[1:]):
        claim = f"fraction of words in noise: {row.system}, {NOISY_SPEECH[0].system}"
        yield Row(claim, "–", share, shares[0])
    full = f"{(20.0 + 31.8) / 2:.1f}%"
    yield Row("mean of Switchboard and CallHome, 300 hours", "25.9%", full)
    mean = (12.6 + 19.3) / 2
    note = "rounded up" if abs(mean - 16.0) < 0.051 else ""
    yield Row("mean of Switchboard and CallHome, 2,300 hours", "16.0%", f"{mean:.2f}%", note=note)
    first, second = OWN_TEST_SET
    fewer = f"{1 - second / first:.1%}"
    yield Row("errors of Deep Speech 2, fewer than Deep Speech's by", "43.4%", fewer)


def data_and_speed() -> Iterator[Row]:
    """Hours of recordings, and messages."""
    hours = f"{sum(ENGLISH_HOURS.values()):,}"
    yield Row("hours of English recordings, over all sources", "11,940", hours)
    for ranks in (2, 8, 64):
        claim = f"elements that each of {ranks} ranks sends, per element of the vector"
        yield Row(claim, "–", f"{ring_share(ranks):.3f}", f"{sent_by_one(ranks):.3f}")
    yield Row("epoch time halves when 8 GPUs become 16", "yes", note="needs 16 GPUs")


def tables() -> dict[str, list[Row]]:
    """Title to rows."""
    return {
        "Deep Speech 2, sections 3.2 and 3.5: networks": list(models()),
        "Deep Speech, section 5, and Deep Speech 2, section 6: error rates": list(error_rates()),
        "Deep Speech 2, sections 4.1 and 5.1: data and messages": list(data_and_speed()),
    }


def print_table(title: str, rows: list[Row]) -> bool:
    """Prints a table. Returns: False where a verdict is FAILED."""
    cells = [("claim", "paper", "formula", "here", "verdict")]
    for row in rows:
        cells.append((row.claim, row.paper, row.formula, row.here, row.verdict))
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    print(f"{title}\n")
    for line in cells:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    return all(row.verdict != "FAILED" for row in rows)


def flags() -> argparse.Namespace:
    """There are none but --help; any other is refused."""
    return argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    good = [print_table(title, rows) for title, rows in tables().items()]
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    flags()
    main()
