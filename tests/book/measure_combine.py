# SPDX-License-Identifier: MIT-0
"""Which techniques combine? `make combine` proves each pair of the book's techniques on real ranks.

A run is a chapter's own proof on one mesh: losses, norms and gradients, and where the chapter has
them the weights after five steps of AdamW, next to a single device. All is in float64. A run in FP8
or NVFP4 has the single device in FP8 or NVFP4 next to it, and one with autocast has it in autocast.

A pair's entry is the first run that has both techniques. Where no run has both, an attempt may show
the error that the code raises. Where there is no attempt either, no script has both techniques.

Writes notebooks/results/00_combine.json, and the matrix of COMBINE.md.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import measure_differences as measure
import ranks
import torch
from proof import plant

ROOT = measure.ROOT
RESULTS = ROOT / "notebooks" / "results" / "00_combine.json"
PAGE = ROOT / "COMBINE.md"
CPU = torch.device("cpu")
FP64 = (torch.float64, None)
AUTOCAST = (torch.float32, torch.bfloat16)
BOUND = 1e-10  # of what is proven
AUTOCAST_BOUND = 0.5  # the loosest of the chapters; DIFFERENCES.md says what it depends on

Errors = dict[str, float]

TECHNIQUES = {  # where each is written
    "tensor": ["02_megatron_tp", "04_seq_parallel", "07_zero_3d", "13_nemotron3"],
    "data": ["01_deepspeech", "02_megatron_tp", "03_pipeline", "07_zero_3d", "13_nemotron3"],
    "sequence": ["04_seq_parallel", "07_zero_3d", "08_nvfp4", "13_nemotron3"],
    "pipeline": ["03_pipeline", "07_zero_3d"],
    "context": ["05_mamba_hybrid/context_parallel.py", "09_mtp"],
    "expert": ["06_moe_fp8", "13_nemotron3"],
    "ZeRO-1": ["07_zero_3d"],
    "FSDP": ["07_zero_3d/fsdp.py"],
    "recompute": ["03_pipeline", "04_seq_parallel", "07_zero_3d"],
    "autocast": ["02_megatron_tp", "05_mamba_hybrid", "06_moe_fp8", "13_nemotron3"],
    "FP8": ["06_moe_fp8/fp8.py", "13_nemotron3/precision.py"],
    "NVFP4": ["08_nvfp4", "13_nemotron3/precision.py"],
    "Mamba-2": ["05_mamba_hybrid", "09_mtp", "10_compress", "13_nemotron3"],
    "latent": ["06_moe_fp8", "13_nemotron3"],
    "MTP": ["09_mtp", "13_nemotron3"],
    "distillation": ["10_compress/distill.py"],
    "DPO": ["11_preference"],
    "GRPO": ["12_grpo"],
}


# ── Runs: each is called on every rank, and returns the error of each tensor by name ──────────────


def tensor_parallel(how: tuple) -> Errors:
    import megatron_tp as tp

    return tp.equivalence(tp.make_mesh(2, CPU), CPU, *how)


def pipelined(how: tuple) -> Errors:
    import pipeline as pl

    return pl.equivalence(pl.make_mesh(2, CPU), CPU, *how)


def sequence_parallel(how: tuple) -> Errors:
    import seq_parallel as sp

    return sp.equivalence(CPU, *how)


def context_parallel(how: tuple) -> Errors:
    import context_parallel as cp

    mesh = cp.make_mesh(2, CPU)
    return cp.mesh_equivalence(mesh, 1, CPU, *how)


def expert_parallel(how: tuple) -> Errors:
    import moe_fp8 as mf

    return mf.equivalence(mf.make_mesh(2, CPU), CPU, *how)


def three_dimensions(recompute: bool) -> Errors:
    import zero_3d as z

    mesh = z.make_mesh(2, 2, 2, CPU, sp=True)
    with plant(z, "Stage", partial(z.Stage, recompute=recompute)):
        return z.equivalence(mesh, CPU, torch.float64)


def fully_sharded(recompute: bool) -> Errors:
    import fsdp
    import zero_3d as z

    args = argparse.Namespace(recompute=recompute, no_reshard_after_forward=False)
    mesh = z.make_mesh(2, 2, 2, CPU, sp=True)
    return fsdp.equivalence(args, mesh, CPU, torch.float64)


def four_bits(how: tuple) -> Errors:
    import nvfp4 as nf

    return nf.equivalence(CPU, *how)


def further_tokens(how: tuple) -> Errors:
    import mtp

    return mtp.equivalence(mtp.make_mesh(2, 2, CPU), CPU, *how)


def distilled(how: tuple) -> Errors:
    import distill

    return distill.equivalence(distill.make_mesh(2, CPU), CPU, *how)


def preferred(how: tuple) -> Errors:
    import preference as pr

    return pr.equivalence(pr.make_mesh(2, CPU), CPU, *how)


def reinforced(how: tuple) -> Errors:
    import grpo

    group = grpo.make_mesh(1, CPU).tp_group  # of this rank alone
    alone = grpo.Mesh(tp_group=group, dp_group=group)
    return grpo.equivalence(grpo.make_mesh(2, CPU), alone, CPU, *how)


def assembled(how: tuple) -> Errors:
    import nemotron3 as n3

    return n3.equivalence(n3.make_mesh(2, 4, CPU), CPU, *how)


def rounded(name: str, ep: int, how: tuple = FP64) -> Errors:
    """A step of chapter 13's model in FP8 or NVFP4, experts over `ep` ranks: loss and gradients."""
    dtype, autocast = how
    import nemotron3 as n3
    import precision

    recipe = precision.FP8Recipe(first=0, last=1)
    convert = partial(precision.to_fp8, recipe=recipe)
    if name == "NVFP4":
        recipe = precision.NVFP4Recipe(stochastic=False)
        convert = partial(precision.to_nvfp4, recipe=recipe)
    config = rounded_config()
    mesh = n3.make_mesh(1, ep, CPU)
    tokens_2BT = torch.randint(61, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (n3.NemotronLM(config), n3.ParallelNemotronLM(config, mesh)):
        convert(model.to(dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = next(n3.train(model, optimizer, [tuple(tokens_2BT)], autocast=autocast))
        found.append(n3.gradients(model) | {"loss": step.losses})
    there, here = found
    losses = {name: x.pop("loss") for name, x in (("here", here), ("there", there))}
    errors = n3.relative_errors("loss", {"": losses["here"]}, {"": losses["there"]})
    full = n3.gather_state_dict(here, model)
    return n3.over_all_ranks(errors | n3.relative_errors("gradient", full, there))


def rounded_config():
    import nemotron3 as n3

    sizes = dict(hidden_size=32, ffn_hidden_size=32, shared_size=32, expert_size=16, init_std=0.1)
    sizes |= dict(mamba_heads=16, mamba_head_size=4, mamba_groups=2, state_size=8, chunk=8)
    sizes |= dict(attention_heads=4, attention_head_size=8, num_experts=8, top_k=2)
    return n3.NemotronConfig(61, pattern="ME*-E", mtp_num_layers=1, moe_latent_size=16, **sizes)


@dataclass
class Run:
    ranks: int
    techniques: str  # their names, with spaces
    prove: Callable[[], Errors]

    @property
    def names(self) -> list[str]:
        return self.techniques.split()


MODEL = "tensor data sequence expert Mamba-2 latent MTP"
MESH = "tensor data sequence pipeline"
RUNS = {
    "chapter 2": Run(4, "tensor data", partial(tensor_parallel, FP64)),
    "chapter 3": Run(4, "pipeline data recompute", partial(pipelined, FP64)),
    "chapter 4": Run(2, "tensor sequence recompute", partial(sequence_parallel, FP64)),
    "chapter 5": Run(4, "tensor context Mamba-2", partial(context_parallel, FP64)),
    "chapter 6": Run(4, "expert data", partial(expert_parallel, FP64)),
    "chapter 7": Run(8, f"{MESH} ZeRO-1", partial(three_dimensions, False)),
    "chapter 7, recomputation": Run(8, f"{MESH} ZeRO-1 recompute", partial(three_dimensions, True)),
    "chapter 7, FSDP": Run(8, f"{MESH} FSDP", partial(fully_sharded, False)),
    "chapter 7, FSDP, recomputation": Run(
        8, f"{MESH} FSDP recompute", partial(fully_sharded, True)
    ),
    "chapter 8": Run(2, "NVFP4 tensor sequence", partial(four_bits, FP64)),
    "chapter 9": Run(8, "tensor data context Mamba-2 MTP", partial(further_tokens, FP64)),
    "chapter 10": Run(4, "distillation tensor data Mamba-2", partial(distilled, FP64)),
    "chapter 11": Run(4, "DPO tensor data", partial(preferred, FP64)),
    "chapter 12": Run(4, "GRPO tensor data", partial(reinforced, FP64)),
    "chapter 13": Run(4, MODEL, partial(assembled, FP64)),
    "chapter 13, FP8": Run(4, "FP8 data expert Mamba-2 latent MTP", partial(rounded, "FP8", ep=2)),
    "chapter 13, NVFP4": Run(1, "NVFP4 FP8 Mamba-2 latent MTP", partial(rounded, "NVFP4", ep=1)),
    "chapter 2, autocast": Run(4, "autocast tensor data", partial(tensor_parallel, AUTOCAST)),
    "chapter 3, autocast": Run(4, "autocast pipeline data recompute", partial(pipelined, AUTOCAST)),
    "chapter 4, autocast": Run(
        2, "autocast tensor sequence recompute", partial(sequence_parallel, AUTOCAST)
    ),
    "chapter 5, autocast": Run(
        4, "autocast tensor context Mamba-2", partial(context_parallel, AUTOCAST)
    ),
    "chapter 6, autocast": Run(4, "autocast expert data", partial(expert_parallel, AUTOCAST)),
    "chapter 8, autocast": Run(2, "autocast NVFP4", partial(four_bits, AUTOCAST)),
    "chapter 10, autocast": Run(4, "autocast distillation", partial(distilled, AUTOCAST)),
    "chapter 11, autocast": Run(4, "autocast DPO", partial(preferred, AUTOCAST)),
    "chapter 12, autocast": Run(4, "autocast GRPO", partial(reinforced, AUTOCAST)),
    "chapter 13, FP8, autocast": Run(
        4, "autocast FP8", partial(rounded, "FP8", ep=2, how=AUTOCAST)
    ),
    "chapter 13, autocast": Run(4, f"autocast {MODEL}", partial(assembled, AUTOCAST)),
}


def prove(name: str) -> Errors:
    """What a rank does for a run."""
    return RUNS[name].prove()


# ── Attempts: what the code says of a pair that it does not have ──────────────────────────────────


def fp8_with_tp() -> None:
    import nemotron3 as n3
    import precision

    with torch.device("meta"):
        model = n3.ParallelNemotronLM(rounded_config(), n3.Mesh(tp=2))
    precision.to_fp8(model, precision.FP8Recipe())


def experts_in_chapter_9() -> None:
    import mtp

    mtp.HybridConfig(pattern="ME", mtp_pattern="*")


def zero_with_autocast() -> None:
    import zero_3d as z

    next(z.train(None, None, [], autocast=torch.bfloat16))


def nvfp4_over_ranks() -> None:
    """It runs, and is not the single device's: that is an error here."""
    errors = rounded("NVFP4", ep=4)
    worst = max(errors.values())
    if worst > BOUND:
        raise ArithmeticError(
            f"the gradient differs by {worst:.0e}: each rank rounds its own tokens, with an amax of"
            " its own"
        )


@dataclass
class Attempt:
    where: str  # whose code it is
    pairs: list[tuple[str, str]]
    call: Callable[[], None]
    ranks: int = 1


ATTEMPTS = [
    Attempt("13_nemotron3/precision.py", [("FP8", "tensor"), ("FP8", "sequence")], fp8_with_tp),
    Attempt("09_mtp", [("context", "expert"), ("context", "latent")], experts_in_chapter_9),
    Attempt("07_zero_3d", [("ZeRO-1", "autocast"), ("FSDP", "autocast")], zero_with_autocast),
    Attempt(
        "13_nemotron3/precision.py",
        [("NVFP4", "expert"), ("NVFP4", "data")],
        nvfp4_over_ranks,
        ranks=4,
    ),
]


def attempt(index: int) -> str:
    """The error of an attempt, in one line; empty where there is none."""
    try:
        ATTEMPTS[index].call()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{ATTEMPTS[index].where}, {type(error).__name__}: {text}"
    return ""


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────────


def pairs() -> list[str]:
    return [key(*pair) for pair in itertools.combinations(TECHNIQUES, 2)]


def key(a: str, b: str) -> str:
    """The name of a pair, in the order of TECHNIQUES."""
    names = list(TECHNIQUES)
    return " × ".join(sorted((a, b), key=names.index))


def apart(a: str, b: str) -> str:
    """Why a pair without a run or an attempt has none."""
    return f"no script has both: {a} is in {', '.join(TECHNIQUES[a])}; {b} in " + ", ".join(
        TECHNIQUES[b]
    )


def entries(runs: dict[str, dict], errors: list[str]) -> dict[str, dict]:
    """Each pair to its run and error, or to why it has none."""
    found = {}
    for name, run in RUNS.items():
        for a, b in itertools.combinations(run.names, 2):
            found.setdefault(key(a, b), {"run": name, "error": runs[name]["error"]})
    for one, error in zip(ATTEMPTS, errors):
        for pair in one.pairs:
            if error:
                found.setdefault(key(*pair), {"refused": error})
    for pair in pairs():
        found.setdefault(pair, {"apart": apart(*pair.split(" × "))})
    return {pair: found[pair] for pair in pairs()}


def measured(pools: dict[int, ranks.Pool]) -> dict:
    runs = {}
    for name, run in RUNS.items():
        begin = time.monotonic()
        shares = pools[run.ranks].run("measure_combine", "prove", dict(name=name), 600.0)
        error = max(max(share.values()) for share in shares)
        count = max(map(len, shares))
        runs[name] = dict(ranks=run.ranks, techniques=run.names, error=float(f"{error:.1e}"))
        runs[name]["compared"] = count
        seconds = time.monotonic() - begin
        print(f"{name:32} {count:4} errors, worst {error:.1e}, {seconds:.0f} s", flush=True)
    errors = []
    for index, one in enumerate(ATTEMPTS):
        shares = pools[one.ranks].run("measure_combine", "attempt", dict(index=index), 600.0)
        errors.append(shares[0])
        print(f"{one.pairs[0]}: {shares[0]}", flush=True)
    result = dict(command="make combine", torch=torch.__version__, runs=runs)
    return result | dict(pairs=entries(runs, errors))


# ── The page ──────────────────────────────────────────────────────────────────────────────────────


def is_good(pair: str, entry: dict) -> bool:
    """Whether the run of a pair is within its bound."""
    return entry["error"] <= (AUTOCAST_BOUND if "autocast" in pair else BOUND)


def cell(pair: str, entry: dict, reasons: list[str]) -> str:
    if "error" in entry:
        text = f"{entry['error']:.0e}".replace("e-0", "e-")
        if not is_good(pair, entry):
            return f"**wrong: {text}**"
        return f"*{text}*" if RUNS[entry["run"]].ranks == 1 else text
    return f"({reasons.index(entry['refused']) + 1})" if "refused" in entry else "·"


def markdown(result: dict) -> str:
    """The matrix of COMBINE.md, what the numbers in it mean, and where each technique is."""
    names = list(TECHNIQUES)
    found = result["pairs"]
    reasons = list(dict.fromkeys(x["refused"] for x in found.values() if "refused" in x))
    lines = ["| | " + " | ".join(names[:-1]) + " |", "|" + "---|" * len(names)]
    for row, a in enumerate(names[1:], 1):
        cells = [cell(key(a, b), found[key(a, b)], reasons) for b in names[:row]]
        cells += [""] * (len(names) - 1 - row)
        lines.append(f"| **{a}** | " + " | ".join(cells) + " |")
    proven = sum("error" in entry for entry in found.values())
    lines += ["", f"{proven} of {len(found)} pairs were run and proven.", ""]
    for number, reason in enumerate(reasons, 1):
        lines.append(f"- ({number}) `{reason}`")
    lines += ["", "| technique | where it is written |", "|---|---|"]
    for name, places in TECHNIQUES.items():
        lines.append(f"| {name} | {', '.join(f'[{place}]({place})' for place in places)} |")
    return "\n".join(lines)


def rendered(text: str, result: dict) -> str:
    """The page with the matrix between its marks."""
    matrix = f"\n\n{markdown(result)}\n\n"
    return re.sub(
        r"(<!-- combine -->).*?(<!-- -->)", lambda m: m[1] + matrix + m[2], text, flags=re.S
    )


def main() -> None:
    torch.set_num_threads(1)
    ranks.PATHS[:] = measure.PATHS
    begin = time.monotonic()
    sizes = {run.ranks for run in RUNS.values()} | {one.ranks for one in ATTEMPTS}
    pools = {n: ranks.Pool(n) for n in sorted(sizes)}
    try:
        result = measured(pools)
    finally:
        for pool in pools.values():
            pool.close()
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(rendered(PAGE.read_text("utf-8"), result), "utf-8")
    print(f"{time.monotonic() - begin:.0f} s")
    wrong = [pair for pair, x in result["pairs"].items() if "error" in x and not is_good(pair, x)]
    if wrong:
        sys.exit(f"not equal to the single device: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
