# SPDX-License-Identifier: MIT-0
"""Reads published Nemotron 3 weights of attention and MoE layers into chapter 6's model.

    python 06_moe_fp8/load_nemotron3.py FOLDER        what the folder holds, and a forward pass

The folder has config.json and *.safetensors, as transformers' NemotronHForCausalLM writes them.
There, queries, keys and values are tensors of their own, and so is each expert.

    config, full = load_nemotron3(FOLDER)
    model = ParallelMoELM(config, group)
    model.load_state_dict(shard_state_dict(full, config, rank, ep))

The experts of Super and Ultra, in latent width, load too. Every setting and every tensor that this
model does not have is refused by name: Mamba layers (chapter 5), multi-token prediction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from moe_fp8 import MoEConfig, MoELM, StateDict, check_state, shard_dim, state_shapes

LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}
LETTERS |= {"moe": "E", "mlp": "-"} | {letter: letter for letter in "M*E-"}
PATTERNS = ("hybrid_override_pattern", "layers_block_type", "layer_types")
SIZES = {  # our field: the published key
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_size": "moe_shared_expert_intermediate_size",
    "gate_scale": "routed_scaling_factor",
    "norm_eps": "layer_norm_epsilon",
}
FRACTIONS = ("routed_scaling_factor", "layer_norm_epsilon")
FIXED = {  # settings with one value here; a missing key has it
    "model_type": "nemotron_h",
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_in_fp32": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
OTHER_KEYS = {  # known, and without a meaning for a model without Mamba layers and its logits
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size",
    "conv_kernel",
    "dtype",
    "eos_token_id",
    "expand",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "label2id",
    "mamba_head_dim",
    "mamba_hidden_act",
    "mamba_num_heads",
    "mamba_proj_bias",
    "mamba_ssm_cache_dtype",
    "max_position_embeddings",
    "moe_shared_expert_overlap",
    "mtp_layers_block_type",
    "n_groups",
    "num_hidden_layers",
    "num_logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "rescale_prenorm_residual",
    "return_dict",
    "ssm_state_size",
    "time_step_floor",
    "time_step_limit",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_conv_bias",
    "use_mamba_kernels",
}
NAMES = {  # a part of our name: of the published one
    "embedding": "embeddings",
    "final_norm": "norm_f",
    "head": "lm_head",
    "out": "o_proj",
    "up": "up_proj",
    "down": "down_proj",
    "shared": "shared_experts",
    "into_latent": "fc1_latent_proj",
    "out_of_latent": "fc2_latent_proj",
    "router": "gate",
    "bias": "e_score_correction_bias",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: FileNotFoundError; ValueError with the file's name and the remedy."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not settings")
    return found


def read_config(path: Path) -> MoEConfig:
    """The configuration of a published config.json.

    Raises: ValueError that names the file, and a missing key, a value that is no size, or each
        setting that this model does not have.
    """
    theirs = read_json(path)
    pattern = read_pattern(path, theirs)
    latent = theirs.get("moe_latent_size")
    latent = 0 if latent is None else latent  # null or missing: none
    missing = [key for key in SIZES.values() if not _fits(key, theirs.get(key))]
    if not _fits("moe_latent_size", latent):
        missing.append("moe_latent_size")
    if missing:
        need = f"integers, and above 0 {' and '.join(FRACTIONS)}"
        raise ValueError(f"{path} lacks {missing}, or has no number that fits there: {need}")
    other = {key: theirs[key] for key, only in FIXED.items() if theirs.get(key, only) != only}
    known = {*SIZES.values(), *FIXED, *OTHER_KEYS, *PATTERNS, "moe_latent_size"}
    unknown = sorted(theirs.keys() - known)
    other |= {key: theirs[key] for key in unknown if theirs[key] is not None}  # null: not set
    layers = theirs.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        other |= {"num_hidden_layers": layers, "layers_block_type": pattern}
    if theirs["num_experts_per_tok"] == 1:
        other |= {"num_experts_per_tok": 1}  # there its weight is divided by itself
    if other:
        raise ValueError(f"{path} has {other}, which this model does not have")
    sizes = {name: theirs[key] for name, key in SIZES.items()}
    try:
        return MoEConfig(pattern=pattern, moe_latent_size=latent, **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fits(key: str, value: Any) -> bool:
    """Whether a setting is an integer, or a number above 0 where it may have a fraction."""
    if key in FRACTIONS:
        return type(value) in (int, float) and 0 < value < math.inf  # NaN is not
    return type(value) is int


def read_pattern(path: Path, theirs: dict[str, Any]) -> str:
    """The pattern, from any of the keys that have it; all that are there must agree.

    Raises: ValueError for Mamba layers, for unknown ones, for several patterns, or none.
    """
    found = {}
    for key in PATTERNS:
        value = theirs.get(key)
        if value is not None:
            names = value if isinstance(value, (str, list)) else [value]
            found[key] = "".join(LETTERS.get(str(name), "?") for name in names)
    for pattern in found.values():
        if "M" in pattern:
            has = f"{path} has Mamba layers ({pattern})"
            raise ValueError(f"{has}: this chapter has none, see chapter 5, mamba_hybrid")
    if len(set(found.values())) != 1 or "?" in "".join(found.values()):
        raise ValueError(f"{path}: layers {found or 'missing'}; * and E are known, in one way")
    return found.popitem()[1]


def sources(name: str, num_experts: int) -> list[str]:
    """The published tensors that our tensor `name` is made of, in their order."""
    theirs = ".".join(NAMES.get(part, part) for part in name.split("."))
    if name != "head.weight":
        theirs = f"backbone.{theirs}"
    if shard_dim(name) is not None:
        places = [f".experts.{i}." for i in range(num_experts)]
        return [theirs.replace(".experts.", place) + ".weight" for place in places]
    if "qkv" in theirs:
        return [theirs.replace("qkv", f"{letter}_proj") for letter in "qkv"]
    return [theirs]


def read_tensors(folder: Path) -> StateDict:
    """Every tensor of the folder's safetensors files, by published name.

    Raises: ValueError that names a file which is empty, cut off or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    found = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download it again") from error
    return found


def load_nemotron3(folder: Path | str) -> tuple[MoEConfig, StateDict]:
    """Configuration and plain state dict, on the CPU, of a folder.

    Raises: FileNotFoundError; ValueError that names a missing tensor, an unknown one, one of
    another shape, a damaged file, or a setting that this model does not have.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    found = read_tensors(folder)
    made_of = {name: sources(name, config.num_experts) for name in state_shapes(config)}
    expected = list(itertools.chain(*made_of.values()))
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}")
    unknown = sorted(found.keys() - set(expected))
    if unknown:
        raise ValueError(f"{folder} has {unknown[:4]}, which this model does not know")
    full = {}
    for name, names in made_of.items():
        # Taken out of `found`, so that no tensor is in memory twice for long.
        tensors = [found.pop(source) for source in names]
        shapes = {tuple(x.shape[1:]) for x in tensors}
        if len(shapes) > 1:
            raise ValueError(f"{folder}: the tensors {names[0]} ... have unequal shapes {shapes}")
        full[name] = torch.cat(tensors) if shard_dim(name) is None else torch.stack(tensors)
    try:
        check_state(full, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return config, full


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with config.json and *.safetensors")
    return parser.parse_args()


def main() -> None:
    folder = flags().folder
    try:
        config, full = load_nemotron3(folder)
    except (ValueError, OSError) as error:
        print(f"load_nemotron3.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    model = MoELM(config)
    model.load_state_dict(full)
    with torch.no_grad():
        logits_BSV, _ = model.eval()(torch.arange(min(8, config.vocab_size))[None])
    count = sum(x.numel() for x in full.values())
    print(f"{folder}: layers {config.pattern}, {config.num_experts} experts, {count:,} parameters")
    print(
        f"the first 8 token ids give logits from {logits_BSV.min():.2f} to {logits_BSV.max():.2f}"
    )


if __name__ == "__main__":
    main()
