# SPDX-License-Identifier: MIT-0
"""Each chapter's training step on a simulated accelerator: no device mismatch, and the stated
host synchronisations.

`rehearsal.py` says how. A process has one world and one simulated device: a process a chapter.
"""

import importlib
import math
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest
import ranks
import rehearsal
import scripts
import torch
import torch.distributed as dist

ROOT = rehearsal.ROOT
SCRIPT = Path(rehearsal.__file__)
MODULES = {folder: folder[3:] for folder in rehearsal.CHAPTERS}

# Host synchronisations of a step, by part. Chapter 6: one for each MoE layer (section 1.6 there
# says why), and the rehearsed model has two.
EXPECTED = {folder: {} for folder in rehearsal.CHAPTERS}
EXPECTED["06_moe_fp8"] = {"forward": 2}
EXPECTED["13_nemotron3"] = {"forward": 2}

VARIANTS = {  # at least so many ways to train are rehearsed
    "01_deepspeech": 3,  # two networks; the layer that is cut in time
    "02_megatron_tp": 6,  # three grids, with recomputation and without
    "03_pipeline": 6,  # three schedules on two grids
    "04_seq_parallel": 6,  # three modes, two kinds of core attention
    "05_mamba_hybrid": 4,  # the chapter's model, three layouts of the tool
    "06_moe_fp8": 8,  # two grids, in FP8 and not, with a latent width and without
    "07_zero_3d": 14,  # five meshes, with sequence parallelism and without; three with FSDP, twice
    "08_nvfp4": 4,  # sharded and not, both kinds of rounding
    "09_mtp": 4,  # three layouts, and detached heads
    "10_compress": 6,  # three meshes, cross entropy and distillation
    "11_preference": 6,  # three meshes, two losses
    "12_grpo": 6,  # three meshes, with a penalty and without
    "13_nemotron3": 4,  # three layouts, with a depth and without
}
HAVE_NO_LOG = set()  # chapters whose loop does not use `read_step`


SUBJECTS = [*rehearsal.CHAPTERS, "plants"]


@lru_cache
def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, ranks.context(), max_tasks_per_child=1)


def rehearsed(subject: str) -> dict[str, dict]:
    """The subject's results; the next subject is started as well, on the second core."""
    number = SUBJECTS.index(subject)
    futures = [started(name) for name in SUBJECTS[number : number + 2]]
    return futures[0].result(timeout=120)


@lru_cache
def started(subject: str) -> Future:
    return pool().submit(rehearsal.results, subject)


@pytest.mark.parametrize("folder", rehearsal.CHAPTERS)
def test_a_step_on_the_simulated_accelerator(folder):
    variants = rehearsed(folder)["variants"]
    assert len(variants) >= VARIANTS[folder]
    for name, result in variants.items():
        assert result["mismatch"] is None, f"{name}: {result['mismatch']}"
        assert len(result["steps"]) == rehearsal.STEPS
        for waits in result["steps"]:
            in_loop = [wait for wait in waits if wait["part"] == "loop"]
            in_step = Counter(wait["part"] for wait in waits if wait["part"] != "loop")
            assert in_step == EXPECTED[folder], f"{name}: {waits}"
            assert len(in_loop) == result["loop"], f"{name}: {waits}"  # True is 1


def test_chapter_6_says_where_it_waits():
    source = (ROOT / "06_moe_fp8" / "moe_fp8.py").read_text("utf-8").splitlines()
    for result in rehearsed("06_moe_fp8")["variants"].values():
        for wait in result["steps"][0]:
            if wait["part"] == "forward":
                file, line = wait["place"].split(":")
                assert file == "moe_fp8.py"
                assert "on_host = " in source[int(line) - 1]


def test_every_loop_but_these_reads_by_one_function():
    without = set()
    for folder, module in MODULES.items():
        text = (ROOT / folder / f"{module}.py").read_text("utf-8")
        if "read_step(step, " not in text:
            without.add(folder)
    assert without == HAVE_NO_LOG


@pytest.mark.parametrize("folder", sorted(set(MODULES) - HAVE_NO_LOG))
def test_the_loop_of_the_demonstration_reads_once_a_step(folder):
    """Besides, a batch is copied to the device, one copy a tensor; chapters 5 and 9 copy the window
    that both tensors are views of. Chapter 12 samples its batch: prompts and their padding are
    copied before, and all sampled tokens are read once."""
    tensors = {"01_deepspeech": 4, "05_mamba_hybrid": 1, "09_mtp": 1, "11_preference": 5}
    tensors["12_grpo"] = 9
    sampled = {"12_grpo": {"forward": 1}}.get(folder, {})
    steps = rehearsed(folder)["loop"]
    assert len(steps) == 3
    for waits in steps:
        copies = [wait for wait in waits if wait["what"] == "copy to the device"]
        others = Counter(wait["part"] for wait in waits if wait not in copies)
        assert others == {"loop": 1, **EXPECTED[folder], **sampled}, waits
        assert len(copies) == tensors.get(folder, 2), waits


# ── The machinery can fail ──────────────────────────────────────────────────────────────────────

PLANTED = {  # what is found of each planted mistake, and in which part of the step
    "plant_item": ("read of a value", "forward"),
    "plant_tolist": ("read of values", "forward"),
    "plant_bool": ("read of a value", "forward"),
    "plant_float": ("read of a value", "forward"),
    "plant_int": ("read of a value", "forward"),
    "plant_length": ("read of a value", "forward"),
    "plant_mask": ("mask as an index", "forward"),
    "plant_mask_put": ("mask as an index", "forward"),
    "plant_nonzero": ("nonzero", "forward"),
    "plant_masked_select": ("masked_select", "forward"),
    "plant_equal": ("equal", "forward"),
    "plant_cpu": ("copy to the CPU", "forward"),
    "plant_to_device": ("copy to the device", "forward"),
    "plant_copy": ("copy to the device", "forward"),
    "plant_tensor": ("copy to the device", "forward"),
    "plant_as_tensor": ("copy to the device", "forward"),
    "plant_new_tensor": ("copy to the device", "forward"),
    "plant_item_in_backward": ("read of a value", "backward"),
    "plant_item_in_optimizer": ("read of a value", "optimizer"),
    "plant_item_in_clipping": ("read of a value", "clipping"),
    "plant_item_in_thread": ("read of a value", "forward"),
}
MISMATCHES = {"plant_cpu_tensor", "plant_cpu_tensor_in_backward"}


def test_every_plant_is_expected():
    assert set(rehearsed("plants")) == {*PLANTED, *MISMATCHES, "plant_nothing"}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_synchronisation_is_found_and_its_place_named(name):
    result = rehearsed("plants")[name]
    (waits,) = result["steps"]
    (wait,) = waits
    assert (wait["what"], wait["part"]) == PLANTED[name]
    assert_is_the_last_line(wait["place"], result["lines"])


@pytest.mark.parametrize("name", sorted(MISMATCHES))
def test_a_planted_cpu_tensor_is_found_and_its_place_named(name):
    result = rehearsed("plants")[name]
    assert result["steps"] == []
    place, _, message = result["mismatch"].partition(": ")
    assert "gpu:0 and cpu" in message
    assert_is_the_last_line(place, result["lines"])


def test_what_only_looks_like_a_synchronisation_is_not_counted():
    result = rehearsed("plants")["plant_nothing"]
    assert result["mismatch"] is None
    assert result["steps"] == [[]]


def assert_is_the_last_line(place: str, lines: list[int]) -> None:
    file, line = place.split(":")
    assert file == SCRIPT.name
    assert lines[0] < int(line) < lines[1]


# ── A step whose loss is not a number ends the run ──────────────────────────────────────────────


@pytest.mark.parametrize("folder", sorted(set(MODULES) - HAVE_NO_LOG))
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0)])
def test_a_step_that_is_not_finite_raises_and_is_named(folder, loss, norm):
    chapter = importlib.import_module(MODULES[folder])
    with pytest.raises(FloatingPointError, match=rf"step 7: loss {loss}, gradient norm {norm}"):
        chapter.read_step(7, torch.tensor(loss), torch.tensor(norm, dtype=torch.float64))
    assert chapter.read_step(7, torch.tensor(1.5), torch.tensor(2.0)) == (1.5, 2.0)


@pytest.mark.ranks(2)
def test_a_nan_weight_on_one_rank_ends_the_run_on_all_in_that_step():
    chapter = importlib.import_module("pipeline")
    train, yielded = chapter.train, []

    def broken(stage, *args, **options):
        for step, result in enumerate(train(stage, *args, **options)):
            yielded.append(step)
            yield result
            if step == 2 and dist.get_rank() == 1:
                with torch.no_grad():
                    next(stage.parameters()).view(-1)[0] = torch.nan

    with (
        mock.patch.object(chapter, "train", broken),
        mock.patch.object(chapter, "equivalence", lambda *args: {}),
        pytest.raises(FloatingPointError, match="^step 3: loss nan"),
    ):
        scripts.on_ranks(chapter, "--steps", 6)
    assert yielded == [0, 1, 2, 3]
