# SPDX-License-Identifier: MIT-0
"""Which smaller model? Shapes that fit into a memory budget, and the best choice layer by layer.

Papers: Nemotron Nano 2 (a grid of widths, sorted by memory), NVIDIA, 2025, arXiv 2508.14444
        Puzzle (a choice for each layer), Bercovich et al., 2024, arXiv 2411.19146

    python 10_compress/search.py                        Nano 2's box under its budget, 19.66 GiB
    python 10_compress/search.py --budget 24            another one
    python 10_compress/search.py --tokens 32768

Two searches:

    candidates   all layers alike: the outer product of sizes per axis. What fits is sorted by
                 memory, largest first. The papers distill the first few for a short time, and take
                 the best.
    search       a choice for each layer: keep it, make it smaller, or remove it. Each option has a
                 cost and a score, measured alone. The best sum of scores within the budget is
                 exact, by dynamic programming.

Memory is that of generation: weights, keys and values per token, and Mamba's states, which do not
grow with the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from compress import INNER, KEYS, STATE, HybridConfig, Sizes, axis_size, parameter_shapes

GIB = 2**30

# ── 1 Memory ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Memory:
    """Bytes of a model that generates one sequence."""

    weights: int
    cache: int  # keys and values
    state: int  # Mamba's states, and the last inputs of its convolutions

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.state


def memory(
    config: HybridConfig,
    tokens: int,
    weight_bits: int = 16,
    cache_bits: int = 16,
    state_bits: int = 16,
) -> Memory:
    """Memory of generation at a context of `tokens`, for one sequence.

    Args: bits of a weight, of a key or value, and of an element of a state.
    Raises: ValueError for tokens below 0, or bits below 1. Source: the production tool's formula.
    """
    if tokens < 0 or min(weight_bits, cache_bits, state_bits) < 1:
        bits = f"weight_bits={weight_bits}, cache_bits={cache_bits}, state_bits={state_bits}"
        raise ValueError(f"tokens={tokens}, {bits}: tokens from 0, bits from 1")
    weights = sum(shape.numel() for shape in parameter_shapes(config).values())
    per_token = 2 * axis_size(KEYS, config)
    inner = axis_size(INNER, config)
    channels = inner + 2 * axis_size(STATE, config)
    state = inner * config.mamba_state_dim + channels * (config.conv_kernel - 1)
    attention = config.pattern.count("*")
    mamba = config.pattern.count("M")
    return Memory(
        weights * weight_bits // 8,
        attention * per_token * tokens * cache_bits // 8,
        mamba * state * state_bits // 8,
    )


# ── 2 All layers alike ──────────────────────────────────────────────────────────────────────────


def candidates(
    config: HybridConfig, choices: dict[str, list[int]], budget: float, tokens: int
) -> list[tuple[Memory, Sizes]]:
    """Every combination of sizes that fits into `budget` bytes, the largest first.

    Args: choices: axis to its sizes; the other axes stay as they are.
    Raises: ValueError where an axis has no size, or where nothing fits: it names the smallest.
    Source: Nemotron Nano 2; the production tool.
    """
    empty = [axis for axis, sizes in choices.items() if not sizes]
    if empty:
        raise ValueError(f"no size to choose from for {empty}")
    every = []
    for values in itertools.product(*choices.values()):
        sizes = dict(zip(choices, values))
        found = memory(replace(config, **sizes), tokens)
        every.append((found, sizes))
    every.sort(key=lambda one: one[0].total, reverse=True)
    fitting = [one for one in every if one[0].total <= budget]
    if not fitting:
        least, sizes = every[-1]
        found = f"{least.total / GIB:.2f} GiB, {sizes}"
        raise ValueError(f"nothing fits into {budget / GIB:.2f} GiB: the smallest has {found}")
    return fitting


# ── 3 A choice for each layer ───────────────────────────────────────────────────────────────────
#
# Layer by layer, the search keeps a list of partial choices: what they cost, and their scores. A
# partial choice is dropped if another one costs no more and scores no less, because whatever
# follows suits both. What is left is the whole trade-off, and its best entry within the budget is
# the answer.
#
#     two options a layer, (cost, score): (2, 5) or (1, 1);  then (3, 4) or (1, 2)
#     after layer 0      (1, 1) (2, 5)
#     after layer 1      (2, 3) (3, 7) (4, 5) (5, 9)        (4, 5) is worse than (3, 7): dropped
#
# That is exact for any costs, with no rounding of bytes to units. It is exact for a *sum* of
# scores. Real layers do not add up (distill.py), so the sum is a guide, and the papers distill
# several of the best choices.


@dataclass(frozen=True)
class Option:
    """What may become of a layer."""

    name: str
    cost: int
    score: float  # the larger, the better


def undominated(choices: list[tuple]) -> list[tuple]:
    """(cost, score, ...) that no other one beats in both, by cost. Source: ours."""
    best = -math.inf
    found = []
    for choice in sorted(choices, key=lambda choice: (choice[0], -choice[1])):
        if choice[1] > best:
            best = choice[1]
            found.append(choice)
    return found


def search(layers: list[list[Option]], budget: int) -> list[Option]:
    """One option for each layer: the largest sum of scores whose costs are at most `budget`.

    Exact, by dynamic programming. Of equal scores, the cheapest.
    Raises: ValueError where a layer has no option, a score is not finite, or nothing fits.
    Source: Puzzle has the problem, and solves it by integer programming.
    """
    for i, options in enumerate(layers):
        if not options or not all(math.isfinite(option.score) for option in options):
            raise ValueError(f"layer {i} has no option, or a score that is not finite: {options}")
    cheapest = [min(option.cost for option in options) for options in layers]
    left = sum(cheapest)
    if left > budget:
        raise ValueError(f"budget={budget}, but the cheapest choice costs {left}")
    frontier: list[tuple] = [(0, 0.0, ())]
    for options, least in zip(layers, cheapest):
        left -= least  # of the layers that follow
        longer = []
        for cost, score, chosen in frontier:
            for option in options:
                total = cost + option.cost
                if total + left <= budget:
                    longer.append((total, score + option.score, (*chosen, option)))
        frontier = undominated(longer)
    return list(frontier[-1][2])


def layer_options(
    config: HybridConfig, ffn_sizes: list[int], scores: list[float]
) -> list[list[Option]]:
    """Options of each layer: keep it, remove it, or keep a feed-forward layer with fewer features.

    Args: ffn_sizes: features to choose from, the present number among them where a layer may stay
        as it is. scores: of each layer; one that keeps a part of its features counts √ of that
        part, and one that is removed 0. A measured score takes that place in earnest.
    Costs are parameters. Raises: ValueError where scores and layers differ in number. Source: ours.
    """
    if len(scores) != len(config.pattern):
        raise ValueError(f"{len(scores)} scores for {len(config.pattern)} layers")
    layers = []
    for letter, score in zip(config.pattern, scores):
        options = [Option("remove", 0, 0.0)]
        for size in ffn_sizes if letter == "-" else [config.ffn_hidden_size]:
            small = replace(config, pattern=letter, ffn_hidden_size=size)
            shapes = parameter_shapes(small)
            cost = sum(x.numel() for name, x in shapes.items() if name.startswith("layers."))
            kept = math.sqrt(size / config.ffn_hidden_size)
            options.append(Option(f"{letter}{size if letter == '-' else ''}", cost, score * kept))
        layers.append(options)
    return layers


# ── 4 Nano 2's box ──────────────────────────────────────────────────────────────────────────────

NANO_9B = HybridConfig(
    vocab_size=131_072,
    hidden_size=4480,
    pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    ffn_hidden_size=15_680,
    num_attention_heads=40,
    num_query_groups=8,
    attention_head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    mamba_num_groups=8,
    mamba_state_dim=128,
)
BOX = {  # the paper's ranges; its steps are not published
    "hidden_size": list(range(4480, 5121, 128)),
    "ffn_hidden_size": list(range(13_440, 20_481, 320)),
    "mamba_num_heads": [112, 120, 128],
}
BUDGET = 22.06 * 0.95 - 1.3  # GiB: of an A10G, with a margin and a vision encoder


def report(budget: float, tokens: int) -> Iterator[str]:
    """What the two searches find."""
    fitting = candidates(NANO_9B, BOX, budget * GIB, tokens)
    total = math.prod(len(sizes) for sizes in BOX.values())
    yield f"{len(fitting)} of {total} shapes fit into {budget:.2f} GiB at {tokens:,} tokens"
    yield "\nhidden    ffn  Mamba heads    weights  cache  state  GiB"
    chosen = {axis: getattr(NANO_9B, axis) for axis in BOX}
    for i, (found, sizes) in enumerate(fitting):
        if i < 3 or sizes == chosen:
            parts = [found.weights, found.cache, found.state, found.total]
            gib = "  ".join(f"{part / GIB:.2f}" for part in parts)
            note = f"   Nano-9B-v2, place {i + 1}" if sizes == chosen else ""
            row = f"{sizes['hidden_size']:6} {sizes['ffn_hidden_size']:6}"
            yield f"{row} {sizes['mamba_num_heads']:12}      {gib}{note}"
    layers = layer_options(NANO_9B, [7_840, 15_680], [1.0 + i % 3 for i in range(56)])
    yield "\nA choice for each layer, with made-up scores of 1, 2 and 3:"
    full = sum(options[-1].cost for options in layers)
    for part in (0.9, 0.75, 0.5):
        names = [option.name for option in search(layers, int(part * full))]
        removed = names.count("remove")
        halved = names.count("-7840")
        yield f"{part:.0%} of the layers' parameters: {removed} removed, {halved} halved"


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help="GiB")
    parser.add_argument("--tokens", type=int, default=131_072, help="of the context")
    return parser.parse_args()


def main() -> None:
    args = flags()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    try:
        for line in report(args.budget, args.tokens):
            print(line)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
