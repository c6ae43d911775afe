# SPDX-License-Identifier: MIT-0
"""Chapter 1's tables: formulas against counted models, verdicts and the printed page."""

import re

import deepspeech as ds
import deepspeech_tables as tables
import front_door
import pytest
import scripts
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import plant

SCRIPT = tables.__file__


def test_the_same_size_nets():
    """Four nets of "38 million": within 4 %. One term is checked against the built network."""
    counts = []
    for net in tables.SAME_SIZE:
        counts.append(tables.parameter_count(net.layers, net.recurrent, net.hidden) / 1e6)
    assert [round(count, 1) for count in counts] == [38.9, 38.7, 39.2, 38.3]
    layers = ds.DeepSpeech2(ds.DeepSpeechConfig(3, 8)).layers
    built = [p.numel() for layer in layers[1:] for p in (layer.input.weight, layer.weight)]
    assert sum(built) == 2 * tables.recurrent_parameters(8) == 2 * 3 * 8**2


def test_tables_that_must_agree_with_themselves():
    assert sum(tables.ENGLISH_HOURS.values()) == 11_940
    rows = tables.NOISY_SPEECH
    shares = [tables.noisy_share(row.clean, row.noisy, row.together) for row in rows]
    assert len(shares) == 5 and max(shares) - min(shares) < 5e-4 and abs(shares[0] - 0.423) < 5e-4
    # Switchboard and CallHome: their mean is the full test set's rate
    assert abs((12.6 + 19.3) / 2 - 16.0) < 0.051 and (20.0 + 31.8) / 2 == 25.9


@settings(max_examples=20, deadline=None)
@given(ranks=st.integers(2, 40))
def test_the_ring_sends_what_the_formula_says(ranks):
    """1 element per element on two ranks, and never 2."""
    assert tables.sent_by_one(ranks) == pytest.approx(tables.ring_share(ranks), rel=1e-12)
    assert 1 <= tables.ring_share(ranks) < 2
    assert tables.ring_share(2) == 1 and tables.ring_share(1024) == pytest.approx(1.998, abs=1e-3)


def test_messages_are_counted_under_torchs_debugging():
    """The fake group has no operation for it; the setting is afterwards as it was."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        assert tables.sent_by_one(4) == 1.5
        assert dist.get_debug_level() == dist.DebugLevel.DETAIL
    finally:
        dist.set_debug_level(level)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "row, verdict",
    [
        (tables.Row("agrees", "1", "1", "1"), "ok"),
        (tables.Row("the formula is wrong", "1", "2"), "FAILED"),
        (tables.Row("the code is wrong", "–", "1", "2"), "FAILED"),
        (tables.Row("disagrees, and says why", "1", "2", note="because"), "because"),
        (tables.Row("agrees, and says why not", "1", "1", note="because"), "FAILED"),
        (tables.Row("nothing to compare", "1"), "FAILED"),
        (tables.Row("needs a machine", "1", note="needs 16 GPUs"), "needs 16 GPUs"),
    ],
    ids=lambda value: value.claim if isinstance(value, tables.Row) else "",
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict


def test_a_wrong_formula_fails():
    def failed():
        rows = [row for table in tables.tables().values() for row in table]
        return [row.claim for row in rows if row.verdict == "FAILED"]

    assert failed() == []
    right = tables.parameter_count
    with plant(tables, "parameter_count", lambda *args: right(*args) * 1.1):
        assert len(failed()) == 4
    with plant(tables, "recurrent_parameters", lambda hidden: 4 * hidden**2):
        assert len(failed()) >= 4
    with plant(tables, "ring_share", lambda ranks: 2.0):
        assert len(failed()) == 3
    with plant(tables, "OWN_TEST_SET", (24.01, 14.59)):
        assert len(failed()) == 1
    with plant(tables, "ENGLISH_HOURS", {**tables.ENGLISH_HOURS, "WSJ": 81}):
        assert len(failed()) == 1


def test_a_failed_row_is_the_exit_code(capsys):
    rows = {"A table": [tables.Row("right", "1", "1")], "Another": [tables.Row("wrong", "1", "2")]}
    with plant(tables, "tables", lambda: rows), pytest.raises(SystemExit) as end:
        tables.main()
    assert end.value.code == 1
    assert re.search(r"^wrong +1 +2 +– +FAILED$", capsys.readouterr().out, re.MULTILINE)
    del rows["Another"]
    with plant(tables, "tables", lambda: rows):
        assert tables.main() is None


@pytest.mark.slow
def test_the_whole_script():
    done = scripts.forked(SCRIPT)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stderr
    found = front_door.tables(done.stdout)
    assert len(found) == 3
    rows = [row for table in found for row in table["rows"]]
    assert [row[-1] for row in rows].count("ok") >= 10


def test_a_wrong_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tables.__file__, "--what"])
    with pytest.raises(SystemExit, match="2"):
        tables.flags()
    assert "unrecognized arguments" in capsys.readouterr().err.splitlines()[-1]
