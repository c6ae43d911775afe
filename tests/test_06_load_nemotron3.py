# SPDX-License-Identifier: MIT-0
"""Chapter 6's loader: transformers' logits from its folders; and folders it refuses."""

import json
import math
from pathlib import Path

import load_nemotron3 as load
import moe_fp8 as moe
import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(load.__file__)


def published_config(**changes) -> dict:
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=8,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        layers_block_type=["full_attention", "moe", "moe", "full_attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
    )
    return sizes | changes


def publish(folder: Path, **changes):
    """A folder in the published layout, written by transformers, with random weights and biases."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NemotronHConfig"):
        pytest.skip("this transformers has no NemotronH")
    torch.manual_seed(0)
    model = transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(**published_config(**changes))
    )
    for name, x in model.state_dict().items():
        if "bias" in name or "gate.weight" in name:
            x.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("latent", [None, 20])
def test_published_weights_give_transformers_logits(latent, tmp_path):
    """With a latent width, as Super and Ultra have one, and without, as Nano."""
    theirs = publish(tmp_path, moe_latent_size=latent)
    cfg, full = load.load_nemotron3(tmp_path)
    assert cfg.pattern == "*EE*E" and cfg.top_k == 3 and cfg.gate_scale == 2.5
    assert cfg.moe_latent_size == (latent or 0)
    assert sum("_latent" in name for name in full) == (6 if latent else 0)
    ours = moe.MoELM(cfg)
    ours.load_state_dict(full)
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, here = theirs(tokens).logits, ours(tokens)[0]
    assert expected.abs().max() > 0.05
    assert (here - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    publish(path)
    return path


def changed(folder: Path, to: Path, **changes) -> Path:
    """A copy of the folder, with other settings."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(settings))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


def test_published_weights_are_sharded_and_merged_to_the_bit(folder):
    cfg, full = load.load_nemotron3(folder)
    shards = [moe.shard_state_dict(full, cfg, rank, 4) for rank in range(4)]
    back = moe.merge_state_dicts(shards)
    assert all(torch.equal(back[name], full[name]) for name in full)


REFUSED = {
    r"has Mamba layers \(M\*E\): this chapter has none, see chapter 5, mamba_hybrid": dict(
        layers_block_type=["linear_attention", "full_attention", "moe"]
    ),
    r"has Mamba layers \(MEM\*E\)": dict(hybrid_override_pattern="MEM*E"),
    r"lacks the tensor backbone.layers.1.mixer.fc1_latent_proj.weight": dict(moe_latent_size=16),
    r"has \{'num_nextn_predict_layers': 1\}, which this model": dict(num_nextn_predict_layers=1),
    r"has \{'n_group': 2\}": dict(n_group=2),
    r"'num_experts_per_tok': 1": dict(num_experts_per_tok=1),
    r"has \{'rope_theta': 10000.0\}": dict(rope_theta=10000.0),
    r"has \{'sliding_window': 8\}": dict(sliding_window=8),
    r"has \{'attention_bias': True\}": dict(attention_bias=True),
    r"'num_hidden_layers': 9": dict(num_hidden_layers=9),
    r"lacks the tensor backbone.layers.5.norm.weight": dict(
        layers_block_type=["full_attention", "moe", "moe"] * 2, num_hidden_layers=6
    ),
    r"which this model does not know": dict(
        layers_block_type=["full_attention", "moe", "moe", "full_attention"], num_hidden_layers=4
    ),
    r"another shape.*'embedding.weight', torch.Size\(\[61, 32\]\)": dict(hidden_size=48),
    r"config.json: top_k=9: choose at most num_experts=8": dict(num_experts_per_tok=9),
    r"config.json: pattern='\*-EE\*'": dict(
        hybrid_override_pattern="*-EE*", layers_block_type=None
    ),
    r"config.json: moe_latent_size=-4: it must be at least 0": dict(moe_latent_size=-4),
    r"config.json: layers .*'\*EEE', .*'\*EE\*E'.*in one way": dict(hybrid_override_pattern="*EEE"),
    r"config.json: layers .*'layer_types': 'E\*'.*in one way": dict(
        layer_types=["moe", "attention"]
    ),
    r"config.json: layers .*'\?', .*known, in one way": dict(hybrid_override_pattern=5),
    r"config.json: layers .*'\?\*'": dict(layers_block_type=[["moe"], "attention"]),
    r"config.json: layers missing": dict(layers_block_type=None),
    r"has \{'is_causal': False, 'logits_scaling': 0\}": dict(is_causal=False, logits_scaling=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_setting_that_this_model_does_not_have_is_refused(message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        load.load_nemotron3(changed(folder, tmp_path, **REFUSED[message]))


def test_a_latent_that_config_json_denies_is_refused(tmp_path):
    """Its projections are in the file, and no setting says so."""
    publish(tmp_path, moe_latent_size=20)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("moe_latent_size") == 20
    for without in (settings, settings | {"moe_latent_size": 0}):
        (tmp_path / "config.json").write_text(json.dumps(without))
        with pytest.raises(ValueError, match="fc1_latent_proj.weight.*which this model does not"):
            load.load_nemotron3(tmp_path)


@pytest.mark.parametrize("key", load.SIZES.values())
def test_a_config_without_a_number_names_its_key(key, folder, tmp_path):
    settings = json.loads((folder / "config.json").read_text())
    unfit = (0, -1, math.nan, math.inf) if key in load.FRACTIONS else (8.0, 4.5, math.nan)
    for value in (None, "64", [64], True, *unfit):
        (tmp_path / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json lacks \['{key}'\], or has no number"):
            load.load_nemotron3(tmp_path)
    del settings[key]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config.json lacks \['{key}'\]"):
        load.load_nemotron3(tmp_path)


@pytest.mark.parametrize("width", ["x", 8.5, 8.0, False, [8], ""])
def test_a_latent_width_that_is_no_integer(width, folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.json lacks \['moe_latent_size'\], or has no num"):
        load.load_nemotron3(changed(folder, tmp_path, moe_latent_size=width))


def test_settings_that_say_the_same_or_nothing_are_read(folder, tmp_path):
    """The pattern a second time, defaults of transformers, an integer scale, an unknown null."""
    more = dict(hybrid_override_pattern="*EE*E", is_encoder_decoder=False, return_dict=True)
    more |= dict(routed_scaling_factor=2, rope_scaling=None, output_attentions=False)
    config = load.load_nemotron3(changed(folder, tmp_path, **more))[0]
    assert (config.pattern, config.gate_scale) == ("*EE*E", 2)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x80"], ids=str)
def test_a_broken_config_names_the_file(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json (is not JSON.*download it again|holds a)"):
        load.load_nemotron3(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_cut_off_weights_name_the_file(size, folder, tmp_path):
    changed(folder, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(ValueError, match="model.safetensors is damaged.*download it again"):
        load.load_nemotron3(tmp_path)


def test_experts_of_unequal_shapes_and_folders_without_files(folder, tmp_path):
    changed(folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    tensors[name] = tensors[name][:, :8].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="experts.0.up_proj.weight ... have unequal"):
        load.load_nemotron3(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        load.load_nemotron3(tmp_path)
    with pytest.raises(FileNotFoundError):
        load.load_nemotron3(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    done = scripts.forked(SCRIPT, str(folder))
    assert done.returncode == 0 and "layers *EE*E, 8 experts" in done.stdout, done.stderr
    done = scripts.forked(SCRIPT, str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) <= 2
