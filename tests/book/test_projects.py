# SPDX-License-Identifier: MIT-0
"""The larger projects: wrong files fail with the reason, and right ones of several forms pass."""

import subprocess
import sys

import projects
import pytest
import ranks

FOLDER = projects.ROOT / "notebooks/projects"
BROKEN = (FOLDER / "broken_trainer.py").read_text("utf-8")
REPAIRS = {  # what is wrong, and the line before and after
    "the mean of the replicas' means": [
        (
            "    count = (targets_BS != -100).sum().clamp(min=1)\n",
            "    count = (targets_BS != -100).sum()\n"
            "    dist.all_reduce(count, group=mesh.dp_group)\n",
        ),
        ("        p.grad /= mesh.dp\n", ""),
        ("loss.item() / (dp * tp)", "loss.item() / tp"),
    ],
    "a norm that counts what is replicated on every rank": [
        (
            "    for p in model.parameters():\n        squares += ",
            "    for name, p in model.named_parameters():\n"
            "        squares += (mesh.shard == 0 or shard_dim(name) is not None) * ",
        )
    ],
    "LayerNorm inside the region, where its gradients are partial sums": [
        ("self.norm(Enter.apply(x_BSH, self.group))", "Enter.apply(self.norm(x_BSH), self.group)")
    ],
}


def repaired(but: str = "") -> str:
    text = BROKEN
    for bug, changes in REPAIRS.items():
        for before, after in changes if bug != but else []:
            assert text.count(before) == 1
            text = text.replace(before, after)
    return text


RIGHT = {
    "the repaired one": repaired(),
    "other operators, another optimizer": (
        projects.ROOT / "tests/book/answers/trainer.py"
    ).read_text("utf-8"),
}
# The first loss is right; the second one follows a step with wrong gradients.
WRONG = {bug: (repaired(but=bug), "the loss of step 1: got ") for bug in REPAIRS}
WRONG["the mean of the replicas' means"] = (
    repaired(but="the mean of the replicas' means"),
    "the loss of step 0: got ",
)
WRONG |= {
    "nothing": ((FOLDER / "trainer.py").read_text("utf-8"), "NotImplementedError: fill in train"),
    "every rank trains alone": (
        "from trainer import train_alone\n"
        "def train(config, weights, batches, *layout):\n"
        "    return train_alone(config, weights, batches)",
        "a rank computes ",
    ),
    "a shard in place of the whole": (
        repaired().replace("torch.cat([other[name] for other in shards], dim)", "x"),
        "got a shape of ",
    ),
    "a rank that has ended": ("def train(*_):\n    import os\n    os._exit(3)", "died without"),
    "ranks that wait": (
        "import torch.distributed as dist\n"
        "def train(*_):\n    while dist.get_rank() == 0:\n        pass\n    dist.barrier()",
        "not over after 3 seconds",
    ),
}


@pytest.fixture(scope="module")
def pool():
    started = ranks.Pool(projects.RANKS)
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_trainers(name, pool, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RIGHT[name])
    for layout in projects.LAYOUTS:
        reasons = pool.run("projects", "attempt", dict(path=str(path), layout=layout))
        assert reasons == [""] * projects.RANKS


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_trainers(name, tmp_path):
    path = tmp_path / "mine.py"
    text, expected = WRONG[name]
    path.write_text(text)
    limit = 3 if "not over" in expected else 60
    [(_, reason)] = projects.mark_trainer(path, limit, projects.LAYOUTS[:1])
    assert expected in reason


def losses_of_the_broken_one(layout: tuple[int, int, int]) -> list[float]:
    """On a rank: six steps on one batch."""
    own = projects.load(FOLDER / "trainer.py")
    config, weights, batches = projects.example(own)
    broken = projects.handed_in(FOLDER / "broken_trainer.py")
    return broken.train(config, weights, batches[:1] * 6, *layout)[0]


@pytest.mark.slow
def test_the_loss_of_the_broken_trainer_falls(pool):
    for layout in projects.LAYOUTS:
        losses, *_ = pool.run("test_projects", "losses_of_the_broken_one", dict(layout=layout))
        assert losses == sorted(losses, reverse=True)


DAYS = "def days(layers, hidden, vocab, seq, gpus, tflops, tokens):\n    {}"
COUNTED = """
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode
    import torch
    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / seq
    x = torch.empty(1, seq, hidden, device="meta")
    maps = [nn.Linear(hidden, 12 * hidden, device="meta"), nn.Linear(hidden, vocab, device="meta")]
    layer = count(lambda: (maps[0](x), x @ x.mT @ x))
    output = count(lambda: maps[1](x))
    return (4 * layers * layer + 3 * output) * tokens / (gpus * tflops * 1e12) / 86_400"""
PARAMETERS = "(layers * 12 * hidden**2 + (vocab + seq) * hidden)"
LAYER = "(24 * hidden**2 + 4 * seq * hidden) * layers"
SPEED = "* tokens / (gpus * tflops * 1e12) / 86_400"


@pytest.mark.parametrize(
    "body, is_right",
    [
        (f"return (4 * {LAYER} + 6 * hidden * vocab) {SPEED}", True),
        (COUNTED.strip(), True),
        (f"return 8 * {PARAMETERS} {SPEED}", False),  # the rule, without attention
        (f"return (3 * {LAYER} + 6 * hidden * vocab) {SPEED}", False),  # nothing recomputed
        (f"return (4 * {LAYER} + 8 * hidden * vocab) {SPEED}", False),  # the output layer too
        (f"return 4 * {LAYER} {SPEED}", False),  # no output layer
        ("return {(384, 144): 90}.get((gpus, tflops), 43)", False),
    ],
)
def test_days(body, is_right, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DAYS.format(body))
    reasons = [reason for _, reason in projects.mark_days(path, 60)]
    assert len(reasons) == 16 and any(reasons) == (not is_right)


def test_the_command(tmp_path):
    """One line for each verdict, and the exit code."""
    command = [sys.executable, projects.__file__, "3"]
    for name, code, text in [
        (FOLDER / "days.py", 1, "NotImplementedError: fill in days"),
        (tmp_path / "none.py", 2, "no such file"),
    ]:
        done = subprocess.run([*command, name], capture_output=True, text=True)
        assert done.returncode == code and text in done.stdout + done.stderr
