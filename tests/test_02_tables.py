# SPDX-License-Identifier: MIT-0
"""Chapter 2's tables: formulas against counted models, dry runs, verdicts and the printed page."""

import dataclasses
import re

import front_door
import megatron_tp as tp
import megatron_tp_tables as tables
import pytest
import scripts
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import plant
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = tables.__file__
SMALL = tables.PaperModel("small", hidden=64, heads=4, layers=3, tp=4, gpus=256)


@pytest.fixture(scope="module")
def runs():
    return {model.name: tables.paper_scale(model) for model in tables.TABLE_1}


# ── Formulas ────────────────────────────────────────────────────────────────────────────────────


def test_parameters_of_the_papers_models():
    """Table 1 to the digit that it prints, table 2's 355M, and version 2.0's table (s = 1024)."""
    for model in tables.TABLE_1:
        billions = tables.parameter_count(model.layers, model.hidden) / 1e9
        assert f"{billions:.1f}B" == model.name
        assert model.hidden // model.heads == 96
    assert round(tables.parameter_count(24, 1024, 50_257) / 1e6) == 355
    printed = {(24, 1920): 1.16, (30, 2304): 2.03, (36, 3072): 4.24, (42, 4096): 8.67}
    for (layers, hidden), billions in printed.items():
        assert round(tables.parameter_count(layers, hidden) / 1e9, 2) == billions
    assert len(tables.LATER_MODELS) == 4
    for model in tables.LATER_MODELS:
        assert printed[model.layers, model.hidden] == model.billions


@settings(max_examples=30, deadline=None)
@given(
    vocab=st.integers(1, 50),
    seq=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.integers(1, 4),
    layers=st.integers(1, 3),
)
def test_the_formula_counts_the_plain_model(vocab, seq, heads, size, layers):
    hidden = heads * size
    config = tp.GPTConfig(vocab, layers, hidden, heads, seq)
    counted = sum(shape.numel() for shape in tp.parameter_shapes(config).values())
    assert counted == tables.parameter_count(layers, hidden, vocab, seq)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9), seq=st.integers(1, 9), layers=st.integers(1, 3), ranks=st.integers(1, 4)
)
def test_the_formula_counts_one_ranks_shards(rows, seq, layers, ranks):
    hidden = 4 * ranks
    config = tp.GPTConfig(rows * ranks, layers, hidden, ranks, seq)
    full = dict(tp.initial_weights(config))
    for rank in range(ranks):
        shards = tp.shard_state_dict(full, config, rank, ranks)
        counted = sum(shard.numel() for shard in shards.values())
        formula = tables.rank_parameter_count(layers, hidden, ranks, rows * ranks, seq)
        assert counted == formula


@pytest.mark.parametrize("layers, hidden", [(24, 1024), (24, 2048), (48, 2560)])
def test_the_formula_counts_berts(layers, hidden):
    """transformers' BERT with all heads; 30,522 entries and 512 positions are its default."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    with torch.device("meta"):
        bert = BertForPreTraining(config)
    counted = sum(p.numel() for p in bert.parameters())
    # Its output layer is tied, but on "meta" it may be a tensor of its own.
    decoder = bert.cls.predictions.decoder.weight
    if decoder is not bert.bert.embeddings.word_embeddings.weight:
        counted -= decoder.numel()
    assert counted == tables.bert_parameter_count(layers, hidden)


def test_the_formula_counts_flops():
    """Forward, recomputation and backward of the layers are four forwards, of the output three."""
    config = tp.GPTConfig(vocab_size=96, num_layers=3, hidden_size=32, num_heads=2, seq_length=24)
    with torch.device("meta"):
        model = tp.GPT(config)
        tokens_BS = torch.zeros(5, 24, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens_BS)
    output_layer = 2 * 5 * 24 * 32 * 96
    layers = counter.get_total_flops() - output_layer
    formula = tables.step_flops(3, 32, batch=5, vocab=96, seq=24)
    assert formula == pytest.approx(4 * layers + 3 * output_layer, rel=1e-12)


def test_padded_vocabulary():
    assert tp.padded_vocab_size(50_257, 8, 128) == 51_200
    assert tp.padded_vocab_size(50_257, 1, 128) == 50_304
    assert tp.padded_vocab_size(51_200, 8, 128) == 51_200
    assert tp.padded_vocab_size(5, 4) == 8


def test_the_papers_efficiencies():
    """15.1 PFLOP/s are 75.6 % of 512 V100s at 39 TFLOP/s: the abstract's 76 %, not the 74 %."""
    assert round(tables.share_of_linear(15.1e15, 512), 2) == 0.76


# ── Dry runs ────────────────────────────────────────────────────────────────────────────────────


def test_dry_runs_of_the_papers_models(runs):
    """Each model of table 1: parameters, those of one rank, and all-reduces a layer each way."""
    for model in tables.TABLE_1:
        run = runs[model.name]
        held = tables.rank_parameter_count(model.layers, model.hidden, model.tp)
        assert run.parameters == tables.parameter_count(model.layers, model.hidden)
        assert run.held == held
        expected = 2 * model.layers + 1 if model.tp > 1 else 0
        assert (run.forward, run.backward) == (expected, expected)
        assert run.loss_values == (3 if model.tp > 1 else 0)


def test_a_dry_run_counts_what_a_rank_sends():
    """Twice the all-reduces in forward, and one less in backward, show in the counts."""
    right = tables.paper_scale(SMALL)
    assert (right.forward, right.backward) == (7, 7)

    once = tp.reduce_from_tp
    with plant(tp, "reduce_from_tp", lambda x, group=None: once(once(x, group), group)):
        assert tables.paper_scale(SMALL).forward == 14
    with plant(tp, "copy_to_tp", lambda x, group=None: x):
        assert tables.paper_scale(SMALL).backward == 6


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_a_dry_run_leaves_nothing(level):
    """No process group, and torch's debug level as it was: with DETAIL a collective compares ranks.

    It also works a second time, and after one that failed.
    """
    before = dist.get_debug_level()
    wanted = getattr(dist.DebugLevel, level)
    dist.set_debug_level(wanted)
    try:
        first = tables.paper_scale(SMALL)
        with pytest.raises(ValueError, match="num_heads=4"):
            tables.paper_scale(dataclasses.replace(SMALL, tp=3))
        assert not dist.is_initialized()
        assert dist.get_debug_level() == wanted
        assert tables.paper_scale(SMALL) == first
    finally:
        dist.set_debug_level(before)


@pytest.mark.ranks(2)
def test_a_dry_run_refuses_a_process_with_a_group():
    """A process has one world: the error says so, and the world still works."""
    with pytest.raises(RuntimeError, match="a process group of 2 ranks.*a process of its own"):
        tables.paper_scale(SMALL)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2


# ── Verdicts ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row, verdict",
    [
        (tables.Row("agrees", "1", "1", "1"), "ok"),
        (tables.Row("agrees with the formula", "1", "1"), "ok"),
        (tables.Row("the formula is wrong", "1", "2", "1"), "FAILED"),
        (tables.Row("the code is wrong", "1", "1", "2"), "FAILED"),
        (tables.Row("not in the paper", "–", "1", "2"), "FAILED"),
        (tables.Row("disagrees, and says why", "1", "2", note="because"), "because"),
        (tables.Row("agrees, and says why not", "1", "1", note="because"), "FAILED"),
        (tables.Row("nothing to compare", "1"), "FAILED"),
        (tables.Row("needs a machine", "1", note="needs 8 GPUs"), "needs 8 GPUs"),
    ],
    ids=lambda value: value.claim if isinstance(value, tables.Row) else "",
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict


def test_a_wrong_formula_or_model_fails(runs):
    def verdicts():
        rows = [*tables.table_1(runs), *tables.one_rank(runs), *tables.trained_models()]
        return [row.verdict for row in [*rows, *tables.speed(), *tables.later_models()]]

    assert "FAILED" not in verdicts()
    right = tables.parameter_count
    with plant(tables, "parameter_count", lambda *args: right(*args) * 1.1):
        assert verdicts().count("FAILED") >= 9
    for field, factor in [("parameters", 1.1), ("held", 2), ("forward", 2), ("loss_values", 2)]:
        run = dataclasses.replace(runs["8.3B"], **{field: getattr(runs["8.3B"], field) * factor})
        with plant(tables, "TABLE_1", tables.TABLE_1[-1:]):
            rows = [*tables.table_1({"8.3B": run}), *tables.one_rank({"8.3B": run})]
        failed = [row.claim for row in rows if row.verdict == "FAILED"]
        assert failed, f"{field} times {factor} is not seen"
    # Where the paper disagrees with itself, a formula that agrees with both figures is wrong.
    with plant(tables, "share_of_linear", lambda flops, gpus: 0.74):
        assert [row.verdict for row in tables.speed()][:2] == ["FAILED", "FAILED"]


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
def test_the_whole_script(monkeypatch):
    """As a reader runs it, with the variable that people set when something hangs; ASCII output."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = scripts.forked(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    found = front_door.tables(done.stdout)
    assert len(found) == 5
    rows = [row for table in found for row in table["rows"]]
    assert ["parameters, 72 layers, H = 3072", "8.3B", "8.3B", "8.3B", "ok"] in rows
    assert [row[-1] for row in rows].count("ok") >= 24


def test_a_wrong_flag_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [SCRIPT, "--paper-scale", "8.3B"])
    with pytest.raises(SystemExit, match="2"):
        tables.flags()
    assert "unrecognized arguments" in capsys.readouterr().err.splitlines()[-1]


def test_one_chapters_numbers_are_measured_anew():
    """`make numbers CHAPTER=02`: claims of the run, tables of the table file, the rest is kept."""
    script = "step 0\n\nclaim  paper  here   verdict\na b    exact  1e-15  ok\n"
    table = "A title\n\nclaim  paper  formula  here  verdict\nc d    1      1        –     ok\n"
    printed = {"megatron_tp.py": (script, 7), "megatron_tp_tables.py": (table + "\n" + table, 8)}
    kept = {"chapters": {"01_deepspeech": "kept", "02_megatron_tp": "old"}, "notebooks": {"01": 3}}
    with (
        plant(front_door, "run", lambda path: printed[path.name]),
        plant(front_door, "measure_notebook", lambda path: 9),
    ):
        front_door.measure_one(kept, "02")
    title = {"title": "A title", "rows": [["c d", "1", "1", "–", "ok"]]}
    claims = [["a b", "exact", "1e-15", "ok"]]
    measured = {"seconds": 7, "claims": claims, "tables": [title, title]}
    assert kept["chapters"] == {"01_deepspeech": "kept", "02_megatron_tp": measured}
    assert kept["notebooks"] == {"01": 3, "02_megatron_tp": 9}
    page = front_door.ROOT / "CLAIMS.md"
    text = page.read_text("utf-8")
    changed = front_door.json.loads(front_door.KEPT.read_text("utf-8"))
    assert front_door.rendered(page, changed) == text
    changed["chapters"]["02_megatron_tp"]["tables"][0]["rows"][0][3] = "another number"
    assert front_door.rendered(page, changed).count("another number") == 1
