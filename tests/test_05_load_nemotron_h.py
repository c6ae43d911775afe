# SPDX-License-Identifier: MIT-0
"""Chapter 5's tool for published weights: against transformers, sharded, and what it refuses."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import context_parallel
import load_nemotron_h as tool
import mamba_hybrid as mh
import pytest
import torch
import torch.nn.functional as F
from load_nemotron_h import load_nemotron_h
from proof import assert_equal, plant
from safetensors.torch import load_file, save_file
from scripts import forked
from test_05_mamba_hybrid import random, tokens_of


def published_folder(folder: Path, sharded: bool, pattern="M*-M"):
    """A folder that `transformers` writes of a NemotronH with random weights, and the model. No
    dt of it is near the 0.001 where it would clamp."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NemotronHConfig"):
        pytest.skip("this transformers has no NemotronH")
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config = transformers.NemotronHConfig(
        vocab_size=61,
        hidden_size=24,
        layers_block_type=[kinds[kind] for kind in pattern],
        intermediate_size=16,
        mamba_num_heads=4,
        mamba_head_dim=6,
        n_groups=2,
        ssm_state_size=5,
        conv_kernel=4,
        chunk_size=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.NemotronHForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p.uniform_(-2, 1)  # softplus of it is above 0.1
            elif name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            elif p.ndim > 1:
                p.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="10KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return model


@functools.cache
def published_once(sharded: bool) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    published_folder(Path(folder.name), sharded)
    return folder


def copy_of_published(folder: Path, sharded: bool) -> None:
    """The files of `published_folder`, for tests that do not need its model."""
    shutil.copytree(published_once(sharded).name, folder, dirs_exist_ok=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_published_weights_against_transformers(tmp_path, sharded):
    """Logits and every gradient of transformers' own NemotronH, in fp32 and to 1e-5 of each
    maximum: two orders of fp32 sums. Its clamp of dt does not act on these weights."""
    theirs = published_folder(tmp_path, sharded)
    cfg, weights = load_nemotron_h(tmp_path)
    assert cfg.pattern == "M*-M" and sum(x.numel() for x in weights.values()) == sum(
        p.numel() for p in theirs.parameters()
    )
    ours, (tokens, _) = mh.HybridLM(cfg), tokens_of(2, 14)
    ours.load_state_dict(weights)
    smallest = []
    with plant(
        F,
        "softplus",
        lambda x, softplus=F.softplus: smallest.append(softplus(x).min()) or softplus(x),
    ):
        logits, expected = ours(tokens), theirs(tokens).logits
    assert min(smallest) > 0.01
    upstream = random(2, 14, 61, dtype=torch.float32)
    logits.backward(upstream)
    expected.backward(upstream)
    published = {name: p.grad for name, p in theirs.named_parameters()}
    names = {
        "conv_": "conv1d.",
        "head.": "lm_head.",
        "final_norm": "model.norm_f",
        "embedding": "model.embeddings",
    }
    here = {"logits": logits}
    for name, p in ours.named_parameters():
        for ours_, theirs_ in names.items():
            name = name.replace(ours_, theirs_)
        name = "model." + name if name.startswith("layers") else name
        here[name] = p.grad.view_as(published[name])
    assert_equal(here, {"logits": expected} | published, bound=1e-5)


def test_published_weights_cut_for_ranks(tmp_path):
    """Each rank reads what `shard_state_dict` gives it. Where two ranks hold one group, it is
    refused, and context_parallel.py shards what was loaded."""
    copy_of_published(tmp_path, sharded=True)
    cfg, whole = load_nemotron_h(tmp_path)
    for tp in (1, 2):
        for rank in range(tp):
            here, expected = (
                load_nemotron_h(tmp_path, rank, tp)[1],
                mh.shard_state_dict(whole, cfg, rank, tp),
            )
            assert here.keys() == expected.keys() and all(
                torch.equal(here[name], x) for name, x in expected.items()
            )
    with pytest.raises(
        ValueError, match="mamba_heads=4 does not divide over tp=3 ranks|attention_heads|ffn_hidden"
    ):
        load_nemotron_h(tmp_path, 0, 3)
    with pytest.raises(ValueError, match="groups=2 does not divide over tp=4 ranks"):
        load_nemotron_h(tmp_path, 0, 4)
    shards = [context_parallel.shard_for_mesh(whole, cfg, rank, 4) for rank in range(4)]
    merged = context_parallel.merge_from_mesh(shards, cfg)
    assert all(torch.equal(merged[name], x) for name, x in whole.items())


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_the_older_published_layout(tmp_path, prefix):
    """Names below "backbone", and the pattern as a string."""
    copy_of_published(tmp_path, sharded=False)
    _, expected = load_nemotron_h(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model.").removeprefix("backbone."): x for name, x in tensors.items()}
    save_file(
        {name if "lm_head" in name else prefix + name: x for name, x in bare.items()},
        tmp_path / "model.safetensors",
    )
    published = json.loads((tmp_path / "config.json").read_text())
    for name in ("layers_block_type", "layer_types"):
        published.pop(name, None)
    (tmp_path / "config.json").write_text(
        json.dumps(published | dict(hybrid_override_pattern="M*-M"))
    )
    cfg, weights = load_nemotron_h(tmp_path)
    assert cfg.pattern == "M*-M" and all(
        torch.equal(weights[name], x) for name, x in expected.items()
    )


def test_checkpoints_that_do_not_fit(tmp_path):
    copy_of_published(tmp_path, sharded=False)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mixer.A_log"))
    save_file({n: x for n, x in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match=r"lacks the tensor layers.0.mixer.A_log"):
        load_nemotron_h(tmp_path)
    save_file(tensors | {name: torch.zeros(5)}, file)
    with pytest.raises(
        ValueError, match=r"layers.0.mixer.A_log has shape \(5,\); config.json implies \(4,\)"
    ):
        load_nemotron_h(tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        (dict(mlp_hidden_act="gelu"), "mlp_hidden_act"),
        (dict(model_type="llama"), "model_type"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(published | changes))
        with pytest.raises(
            ValueError, match=rf"config.json has {{'{message}'.*which this model does not compute"
        ):
            load_nemotron_h(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_nemotron_h(tmp_path)


def test_the_mixer_equals_transformers(tmp_path):
    """One Mamba-2 layer by itself: output, the input's gradient, every parameter's."""
    theirs = published_folder(tmp_path, sharded=False, pattern="M*")
    cfg, weights = load_nemotron_h(tmp_path)
    ours = mh.HybridLM(cfg)
    ours.load_state_dict(weights)
    a, b = (random(2, 11, 24, dtype=torch.float32).requires_grad_() for _ in range(2))
    upstream = random(2, 11, 24, seed=2, dtype=torch.float32)
    y, expected = ours.layers[0]["mixer"](a), theirs.model.layers[0].mixer(b)
    y.backward(upstream)
    expected.backward(upstream)
    assert_equal(
        {"y": y, "x": a.grad}, {"y": expected, "x": b.grad}, bound=1e-5
    )  # two orders of fp32 sums


# ── What the model cannot be is refused by name ─────────────────────────────────────────────────


def changed(folder: Path, **changes) -> None:
    """config.json with other values; a None takes the key away."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in settings.items() if x is not None}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers_block_type": ["linear_attention", "full_attention"]}, r"has \['layers.2"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias': True"),
        ({"sliding_window": 128}, "sliding_window': 128"),
        ({"use_bias": True}, "use_bias': True"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit=\[0.0, 0.1\]"),
        ({"time_step_limit": [0.01, {"__float__": "Infinity"}]}, "does not clamp dt"),
        ({"time_step_limit": [0.0, {"__float__": "wide"}]}, "config.json has time_step_limit"),
        ({"time_step_limit": [0.0, {"__float__": [1]}]}, "config.json has time_step_limit"),
        ({"time_step_limit": 0.1}, "time_step_limit=0.1"),
        ({"time_step_limit": "0.1"}, "time_step_limit=0.1"),
        ({"time_step_limit": []}, r"time_step_limit=\[\]"),
        ({"attention_head_dim": 8}, "two sizes of a head, head_dim, attention_head_dim"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_dropout": 0.1}, "hidden_dropout"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, and a pattern of 4"),
        ({"hybrid_override_pattern": "M*-M-"}, "in one way"),
        ({"layers_block_type": ["moe"]}, "M, \\* and - are known"),
        ({"mamba_num_heads": None}, "has no number for mamba_num_heads"),
        ({"mamba_num_heads": "4"}, "has no number for mamba_num_heads"),
        ({"layer_norm_epsilon": None}, "has no number for layer_norm_epsilon"),
        ({"layer_norm_epsilon": -1}, "has no number for layer_norm_epsilon above 0"),
        ({"layer_norm_epsilon": float("nan")}, "config.json has {.layer_norm_epsilon.: nan}"),
        ({"layer_norm_epsilon": float("inf")}, "has no number for layer_norm_epsilon above 0"),
        ({"layers_block_type": [1]}, r"config.json: layers .*'\?'.*M, \* and - are known"),
        ({"layers_block_type": [["mlp"]]}, r"config.json: layers .*'\?'.*M, \* and - are known"),
        ({"layer_types": 5}, r"config.json: layers .*'layer_types': '\?'"),
        ({"layer_types": False}, r"config.json: layers .*'layer_types': '\?'"),
        ({"hidden_size": 0}, "config.json: hidden_size=0: it must be at least 1"),
        ({"mamba_num_heads": 3}, "config.json: mamba_heads=3 do not divide"),
    ],
)
def test_a_setting_is_honoured_or_refused(tmp_path, changes, message):
    copy_of_published(tmp_path, sharded=False)
    load_nemotron_h(tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_nemotron_h(tmp_path)


@pytest.mark.parametrize("value", [[0.0, float("inf")], None])
def test_an_infinite_time_step_limit_is_the_models(tmp_path, value):
    copy_of_published(tmp_path, sharded=False)
    changed(tmp_path, time_step_limit=value, rms_norm_eps=1e-5, num_hidden_layers=4)
    assert load_nemotron_h(tmp_path)[0].pattern == "M*-M"


def test_a_tensor_that_the_settings_deny_is_refused(tmp_path):
    """A bias in the file, while config.json says that there is none."""
    copy_of_published(tmp_path, sharded=False)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mixer.in_proj.bias": torch.zeros(9)}, file)
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj.bias'\], which config.json"):
        load_nemotron_h(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [0, 5, 200, -8])
def test_a_cut_off_file_is_named(tmp_path, sharded, size):
    copy_of_published(tmp_path, sharded)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{file.name} is damaged.*copy it again"):
        load_nemotron_h(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_broken_json_is_named(tmp_path, name, text):
    copy_of_published(tmp_path, sharded=True)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is (damaged|no JSON object).*copy it again"):
        load_nemotron_h(tmp_path)


def test_an_index_without_its_map_or_a_file(tmp_path):
    copy_of_published(tmp_path, sharded=True)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for broken in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="has no weight_map of file names: copy it again"):
            load_nemotron_h(tmp_path)
    index.write_text(text)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError):
        load_nemotron_h(tmp_path)


# ── The command line ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def flags_of(monkeypatch):
    def read(*words):
        monkeypatch.setattr("sys.argv", ["load_nemotron_h.py", *map(str, words)])
        return tool.flags()

    return read


def test_prompts_of_unequal_length(tmp_path, flags_of, capsys):
    """Each goes on as it does alone."""
    copy_of_published(tmp_path, sharded=False)
    prompts = ["1 17 4 9 30", "5"]
    lines = []
    for words in (prompts, prompts[:1], prompts[1:]):
        flags = [word for prompt in words for word in ("--prompt", *prompt.split())]
        tool.main(flags_of(tmp_path, *flags, "--new-tokens", 6))
        header, *found = capsys.readouterr().out.splitlines()
        assert header.startswith("M*-M, ") and header.endswith(" parameters")
        lines.append(found)
    assert lines[0] == lines[1] + lines[2]
    assert [line.partition(" → ")[0] for line in lines[0]] == prompts
    with pytest.raises(ValueError, match="token ids are 0 to 60"):
        tool.main(flags_of(tmp_path, "--prompt", 61))
    for count in (0, -3):
        with pytest.raises(SystemExit) as left:
            flags_of(tmp_path, "--prompt", 1, "--new-tokens", count)
        assert left.value.code == 2


@pytest.mark.slow
def test_a_bad_folder_is_one_line(tmp_path):
    result = forked(Path(tool.__file__), tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "config.json" in result.stderr
