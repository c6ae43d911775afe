# SPDX-License-Identifier: MIT-0
"""The planner: the paper's layouts, one server, the command's flags and ends."""

import dataclasses
import subprocess
import sys

import pipeline_tables as tables
import plan
import pytest

FLAGS_1T = "--layers 128 --hidden 25600 --heads 160 --gpus 3072 --batch 3072".split()


def model_of(row) -> plan.Model:
    return plan.Model(row.layers, row.hidden, row.heads, row.batch)


def place_in(layouts: list, row) -> int:
    return next(k for k, x in enumerate(layouts, 1) if (x.t, x.p) == (row.tp, row.pp))


each_row = pytest.mark.parametrize("row", tables.TABLE_1, ids=lambda row: f"{row.billions}B")


@each_row
def test_its_formulas_are_the_tables(row):
    model = model_of(row)
    sizes = (row.layers, row.hidden)
    assert plan.parameter_count(*sizes, 51_200, 2048) == tables.parameter_count(*sizes)
    assert plan.step_flops(model, row.batch) == tables.flops(*sizes, row.batch)


@pytest.mark.parametrize("overhead", [1e-3, 2e-3, 4e-3, 8e-3])
@each_row
def test_plan_finds_the_papers_layouts(row, overhead):
    """The paper's own (t, p) is among the best three, also where the overhead is another."""
    layouts = plan.plan(model_of(row), row.gpus, plan.Machine(overhead=overhead))
    assert place_in(layouts, row) <= 3
    for x in layouts:
        assert x.t * x.p * x.d == row.gpus
        assert x.m * x.d * x.b == row.batch
        assert x.memory <= 72
        assert row.heads % x.t == row.layers % (x.p * x.v) == 0
        assert x.v == 1 or x.m % x.p == 0


def test_what_the_plan_says_about_table_1():
    """Who is not first and by how much, what all-reduces cost, and how far throughput is off."""
    behind = {}
    off = []
    for row in tables.TABLE_1:
        model = model_of(row)
        d = row.gpus // (row.tp * row.pp)
        layouts = plan.plan(model, row.gpus)
        place = place_in(layouts, row)
        if place > 1:
            behind[row.billions] = layouts[place - 1].seconds / layouts[0].seconds - 1
            assert layouts[0].t < row.tp if row.billions < 300 else layouts[0].p < row.pp
        own = plan.Layout(row.tp, row.pp, d, row.v, row.b, row.batch // d // row.b)
        off.append(plan.predict(model, own, plan.Machine()).tflops / row.tflops - 1)
        if row.billions == 18.4:
            chosen = [x for x in layouts if (x.t, x.p) in ((8, 1), (4, 2))]
            assert {x.t: round(100 * x.tensor / x.seconds) for x in chosen} == {8: 13, 4: 6}
            careless = plan.plan(model, row.gpus, plan.Machine(overhead=1e-4))
            assert place_in(careless, row) == 5
    assert sorted(behind) == [18.4, 39.1, 145.6, 310.1, 529.6]
    assert max(behind.values()) < 0.035
    assert round(100 * min(off)) == -10 and round(100 * max(off)) == 22


def test_one_server_has_no_network_between_servers():
    """8 GPUs of one server: stages and replicas communicate inside it, at its speed."""
    model = plan.Model(36, 4096, 32, 64)
    slow = plan.Machine(network=1e9)
    inside = plan.plan(model, 8)
    assert [dataclasses.astuple(x) for x in plan.plan(model, 8, slow)] == [
        dataclasses.astuple(x) for x in inside
    ]
    outside = plan.plan(model, 16)
    assert plan.plan(model, 16, slow)[0].seconds > outside[0].seconds
    # In two servers of 4 GPUs the sums over replicas take 12 times as long: 300 and 25 GB/s.
    own = next(x for x in inside if (x.t, x.p, x.d) == (2, 1, 4))
    apart = plan.predict(model, own, plan.Machine(gpus_per_node=4))
    assert round(own.network / own.seconds, 4) == 0.0058 and plan.row(own).split()[9] == "0.6%"
    assert round(apart.network / apart.seconds, 4) == 0.0657
    apart = plan.predict(model, inside[0], plan.Machine(gpus_per_node=4))
    share = inside[0].network / inside[0].seconds
    assert apart.network / apart.seconds > 5 * share > 0


def test_a_plan_that_cannot_be():
    with pytest.raises(ValueError, match="heads=0"):
        plan.Model(4, 64, 0, 8)
    for gpus in (0, -8):
        with pytest.raises(ValueError, match=f"gpus={gpus}: it must be at least 1"):
            plan.plan(plan.Model(4, 64, 4, 8), gpus)
    with pytest.raises(ValueError, match="fit no layout of 8 GPUs of 80 GB"):
        plan.plan(plan.Model(128, 25_600, 160, 3072), 8)


def planned(flags: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    plan.main()
    return capsys.readouterr().out


def test_the_command(monkeypatch, capsys):
    """The layout of the 1T model, its schedule proven."""
    printed = planned([*FLAGS_1T, "--gpu-memory", "80"], monkeypatch, capsys)
    assert "1008.0 B parameters" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert rows[1][:6] == ["8", "64", "6", "2", "1", "512"]
    assert "131,072 operations: no deadlock, bubble 63/1024" in printed


def test_vocabulary_and_sequence_are_flags(monkeypatch, capsys):
    small = "--layers 8 --hidden 1024 --heads 16 --gpus 8 --batch 64".split()
    first = planned(small, monkeypatch, capsys)
    assert planned([*small, "--seq", "8192"], monkeypatch, capsys) != first
    larger = planned([*small, "--vocab", "256000"], monkeypatch, capsys)
    assert larger.split(" B")[0] != first.split(" B")[0]


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--help"])
    with pytest.raises(SystemExit):
        plan.main()
    text = capsys.readouterr().out
    for name in ("--seq", "--vocab", "--network", "--overhead", "--gpus-per-node", "--rows"):
        assert name in text


def test_a_reader_that_has_seen_enough():
    """As `plan.py ... | head -1`: no traceback."""
    command = [sys.executable, plan.__file__, *FLAGS_1T]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


SMALL = "--layers 8 --hidden 32 --heads 4 --gpus 8 --batch 8".split()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([*SMALL, "--hidden", "30"], "heads must divide"),
        ([*SMALL, "--network", "nan"], "network=nan: it must be finite and above 0"),
        ([*SMALL, "--gpu-memory", "0"], "gpu_memory=0.0: it must be finite and above 0"),
        ([*SMALL, "--seq", "0"], "seq=0: it must be at least 1"),
        ([*SMALL, "--gpus", "-8"], "gpus=-8: it must be at least 1"),
        (FLAGS_1T[:-4] + ["--gpus", "8", "--batch", "8"], "fit no layout of 8 GPUs"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
