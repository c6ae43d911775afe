# SPDX-License-Identifier: MIT-0
"""Marks the larger projects of notebooks/projects.

    make project PROJECT=1 FILE=mine.py

This executes the file, with your rights and without a sandbox. Projects 1 and 2 run on 8 ranks,
new ones for each layout, with a time limit; afterwards the ranks are ended.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.parent for path in ROOT.glob("[0-9][0-9]_*/README.md"))
PATHS = [str(path) for path in (ROOT / "tests", ROOT / "tests/book", *CHAPTERS)]
sys.path.extend(path for path in PATHS if path not in sys.path)

import pipeline_tables
import ranks
import torch
from torch.utils.flop_counter import FlopCounterMode

RANKS = 8
LAYOUTS = [(2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 1, 4)]  # tp, pp, dp
SHARE = 1.2  # times what is a rank's part of the operations
WITHIN = 1e-9  # max|Δ| / max|reference|
Layouts = list[tuple[int, int, int]]
Verdicts = Iterator[tuple[str, str]]  # what was tried, and why it is wrong, or ""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("handed_in", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(own: ModuleType) -> tuple:
    """A configuration, weights without symmetries, and three batches. Rows have unequal numbers of
    tokens that count, and the last half of the last batch has none."""
    config = own.Config()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, x in own.Model(config).double().state_dict().items():
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        weights[name] = noise * 0.3 + name.endswith("norm.weight")
    batches = []
    for _ in range(3):
        shape = (2, 8, 6)
        tokens_BS, targets_BS = torch.randint(config.vocab_size, shape, generator=generator)
        targets_BS[torch.arange(6) > torch.arange(8)[:, None]] = -100
        batches.append((tokens_BS, targets_BS))
    targets_BS[4:] = -100
    return config, weights, batches


def share_of_operations(own: ModuleType, batches: list, tp: int, pp: int, dp: int) -> float:
    """What one rank may compute in all these batches: forward, and twice as much backward."""
    c = own.Config()
    tokens = sum(tokens_BS.numel() for tokens_BS, _ in batches)
    blocks = 6 * tokens * 2 * c.hidden_size * c.ffn_hidden_size * c.num_layers
    head = 6 * tokens * c.hidden_size * c.vocab_size
    return SHARE * (blocks / (tp * pp * dp) + head / dp)


def handed_in(path: Path) -> ModuleType:
    """A student's file, which may import trainer.py."""
    sys.path.append(str(ROOT / "notebooks/projects"))
    return load(path)


def attempt(path: str, layout: tuple[int, int, int]) -> str:
    """On a rank: what is wrong with this file's `train` in a layout, or ""."""
    own = load(ROOT / "notebooks/projects/trainer.py")
    config, weights, batches = example(own)
    losses, expected = own.train_alone(config, weights, batches)
    copies = {name: x.clone() for name, x in weights.items()}
    theirs = handed_in(Path(path))
    with FlopCounterMode(display=False) as counter:
        found, weights_found = theirs.train(config, copies, batches, *layout)
    share = share_of_operations(own, batches, *layout)
    if counter.get_total_flops() > share:
        return f"a rank computes {counter.get_total_flops():,} operations of at most {share:,.0f}"
    if len(found) != len(losses):
        return f"losses: got {len(found)}, expected {len(losses)}"
    for step, (here, there) in enumerate(zip(found, losses)):
        if not abs(here - there) <= WITHIN * abs(there):
            return f"the loss of step {step}: got {here:.12g}, expected {there:.12g}"
    if set(weights_found) != set(expected):
        return f"weights: missing or unknown are {sorted(set(weights_found) ^ set(expected))[:4]}"
    for name, there in expected.items():
        here = weights_found[name]
        if here.shape != there.shape:
            return f"{name}: got a shape of {tuple(here.shape)}, expected {tuple(there.shape)}"
        error = ((here - there).abs().max() / there.abs().max()).item()
        if not error <= WITHIN:
            return f"{name} after {len(losses)} steps: off by {error:.1e} of its largest value"
    return ""


def mark_trainer(path: Path, limit: float, layouts: Layouts = LAYOUTS) -> Verdicts:
    """Each layout with ranks of its own."""
    ranks.PATHS[:] = PATHS
    pool = ranks.Pool(RANKS)
    for tp, pp, dp in layouts:
        name = f"tp {tp} × pp {pp} × dp {dp}"
        try:
            kwargs = dict(path=str(path), layout=(tp, pp, dp))
            reasons = pool.run("projects", "attempt", kwargs, limit)
            yield name, next(filter(None, reasons), "")
        except TimeoutError:
            seconds = f"not over after {limit:g} seconds"
            yield name, f"{seconds}: an endless loop, or ranks wait for each other"
        except ranks.RankFailed as error:
            yield name, str(error).strip().splitlines()[-1]
        finally:
            pool.close()


def mark_days(path: Path, limit: float) -> Verdicts:
    """The paper's figures, then models of no table."""
    days = load(path).days
    for row in pipeline_tables.TABLE_2:
        sizes = (row.layers, row.hidden, 51_200, 2048, row.gpus)
        fewest, most = (days(*sizes, row.tflops + off, 300e9) for off in (0.5, -0.5))
        is_near = round(fewest) <= row.days <= round(most)
        reason = f"from {fewest:.2f} to {most:.2f} days, the paper has {row.days}"
        yield f"{row.scheme} on {row.gpus} GPUs", "" if is_near else reason
    for layers, hidden, vocab, seq in itertools.product((4, 40), (1024,), (2000, 300_000), (9000,)):
        operations = pipeline_tables.flops(layers, hidden, 1, vocab, seq) / seq
        expected = operations * 1e9 / (8 * 1e14) / 86_400
        found = days(layers, hidden, vocab, seq, 8, 100, 1e9)
        is_near = abs(found - expected) <= 0.005 * expected
        reason = f"got {found:.4f} days, expected {expected:.4f}"
        name = f"{layers} layers of {hidden}, {vocab:,} words, {seq:,} tokens"
        yield name, "" if is_near else reason


PROJECTS = {1: mark_trainer, 2: mark_trainer, 3: mark_days}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, choices=PROJECTS, help="of the project")
    parser.add_argument("file", type=Path, help="what was handed in")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a layout")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"no such file: {args.file}")
    print(f"executing {args.file}\n")
    all_right = True
    try:
        for name, reason in PROJECTS[args.number](args.file.resolve(), args.limit):
            all_right = all_right and not reason
            print(f"{name:45} {reason or 'ok'}", flush=True)
    except Exception as error:
        all_right = False
        print(f"{type(error).__name__}: {error}")
    sys.exit(0 if all_right else 1)


if __name__ == "__main__":
    main()
