# SPDX-License-Identifier: MIT-0
"""Published Nemotron-H weights as chapter 5's model, and a text that it goes on with.

    python 05_mamba_hybrid/load_nemotron_h.py FOLDER                        checks the folder
    python 05_mamba_hybrid/load_nemotron_h.py FOLDER --prompt 1 17 4 --new-tokens 8
    python 05_mamba_hybrid/load_nemotron_h.py FOLDER --prompt 1 17 --prompt 5 8 9 1

FOLDER has config.json and safetensors, one file or several with an index. Prompts are token ids,
one --prompt for each sequence, of any lengths. Paper: Nemotron-H, NVIDIA, 2025, arXiv 2504.03624.

Every setting and every tensor of the folder is honoured, or refused by name. One difference from
the transformers library is left: it clamps dt at time_step_min = 0.001 from below when it reads a
prompt, but not when it decodes. Megatron-LM, which trained the models, does not clamp, nor do we.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from mamba_hybrid import (
    HybridConfig,
    HybridLM,
    StateDict,
    generate,
    local_config,
    pad_prompts,
    parameter_shapes,
    shard_tensor,
)
from safetensors import SafetensorError, safe_open

# Settings that change what the model computes, and the only value that this model has.
FIXED = {
    "model_type": "nemotron_h",
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_nextn_predict_layers": 0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    # The residual stream has the dtype of the parameters.
    "residual_in_fp32": False,
    # This model has no dropout.
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_size": "mamba_head_dim",
    "mamba_groups": "n_groups",
    "state_size": "ssm_state_size",
    "conv_kernel": "conv_kernel",
    "chunk": "chunk_size",
    "attention_heads": "num_attention_heads",
    "attention_groups": "num_key_value_heads",
}
HEAD_SIZES = ["head_dim", "attention_head_dim"]  # two versions of the format
PATTERNS = ["hybrid_override_pattern", "layers_block_type", "layer_types"]
LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
}
# How the file came to be, token ids, initial weights, kernels, and settings of experts, which a
# model without such layers does not read.
HARMLESS = """
    _name_or_path architectures auto_map bos_token_id dtype eos_token_id expand id2label
    initializer_range label2id mamba_ssm_cache_dtype max_position_embeddings moe_intermediate_size
    moe_latent_size moe_shared_expert_intermediate_size moe_shared_expert_overlap
    mtp_layers_block_type n_group n_routed_experts n_shared_experts norm_topk_prob
    num_experts_per_tok num_hidden_layers num_logits_to_keep output_attentions output_hidden_states
    output_router_logits pad_token_id rescale_prenorm_residual return_dict routed_scaling_factor
    time_step_floor time_step_max time_step_min time_step_rank topk_group torch_dtype
    transformers_version use_cache use_mamba_kernels
"""
RENAMED = {
    "conv_": "conv1d.",
    "head.": "lm_head.",
    "final_norm": "norm_f",
    "embedding": "embeddings",
}


def load_nemotron_h(
    folder: Path | str, rank: int = 0, tp: int = 1
) -> tuple[HybridConfig, StateDict]:
    """Configuration and state dict of a folder: the plain model's, or tensor-parallel rank `rank`'s
    of `tp`. One full tensor at a time is in memory.

    Raises: OSError; ValueError that names a damaged file, a missing tensor, a shape, or each tensor
        and setting that this model does not use.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    local_config(config, tp)  # for what it raises
    found = open_tensors(folder)
    names = {name: published_name(name) for name in parameter_shapes(config)}
    missing = sorted(set(names.values()) - found.keys())
    unused = sorted(found.keys() - set(names.values()))
    if missing:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}")
    if unused:
        raise ValueError(f"{folder} has {unused[:6]}, which config.json does not imply")
    full = {}
    for name, shape in parameter_shapes(config).items():
        opened, key, file = found[names[name]]
        try:
            x = opened.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}: copy it again") from error
        if name.endswith("conv_weight") and x.ndim == 3:
            x = x.squeeze(1)
        if x.shape != shape:
            text = f"{folder}: {names[name]} has shape {tuple(x.shape)}"
            raise ValueError(f"{text}; config.json implies {tuple(shape)}")
        full[name] = shard_tensor(name, x, config, rank, tp)
    return config, full


def published_name(name: str) -> str:
    for here, there in RENAMED.items():
        name = name.replace(here, there)
    return name


def read_config(file: Path) -> HybridConfig:
    """config.json as a HybridConfig. Raises: as `load_nemotron_h`."""
    theirs = read_json(file)
    limit = theirs.get("time_step_limit")
    bounds = [_bound(x) for x in limit] if isinstance(limit, list) else []
    if limit is not None and bounds not in ([0.0, float("inf")], []):
        raise ValueError(f"{file} has time_step_limit={limit}, and this model does not clamp dt")
    known = {*FIXED, "rms_norm_eps", *SIZES.values(), *HEAD_SIZES, *PATTERNS, *HARMLESS.split()}
    known |= {"layer_norm_epsilon", "time_step_limit"}
    fixed = {**FIXED, "rms_norm_eps": theirs.get("layer_norm_epsilon")}
    other = {key: x for key, x in theirs.items() if fixed.get(key, x) != x or key not in known}
    if other:
        raise ValueError(f"{file} has {other}, which this model does not compute")
    head_key = next((key for key in HEAD_SIZES if theirs.get(key) is not None), HEAD_SIZES[0])
    sizes = {**SIZES, "attention_head_size": head_key}
    bad = [key for key in sizes.values() if type(theirs.get(key)) is not int]
    if bad or type(theirs.get("layer_norm_epsilon")) not in (int, float):
        raise ValueError(f"{file} has no number for {', '.join(bad or ['layer_norm_epsilon'])}")
    values = {name: theirs[key] for name, key in sizes.items()}
    eps = theirs["layer_norm_epsilon"]
    pattern = read_pattern(file, theirs)
    if theirs.get("num_hidden_layers", len(pattern)) != len(pattern):
        count = theirs["num_hidden_layers"]
        raise ValueError(f"{file} has num_hidden_layers={count}, and a pattern of {len(pattern)}")
    return HybridConfig(pattern=pattern, norm_eps=eps, **values)


def _bound(x: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}, Python's json as Infinity."""
    return float(x["__float__"]) if isinstance(x, dict) and "__float__" in x else x


def read_pattern(file: Path, theirs: dict[str, Any]) -> str:
    """The pattern, from any of the keys that have it; all that are there must agree."""
    found = {}
    for key in PATTERNS:
        value = theirs.get(key)
        if value:
            names = value if isinstance(value, list) else list(value)
            found[key] = "".join(
                LETTERS.get(name, name if name in "M*-" else "?") for name in names
            )
    if not found or len(set(found.values())) > 1 or "?" in "".join(found.values()):
        raise ValueError(f"{file}: layers {found or 'missing'}; M, * and - are known, in one way")
    return next(iter(found.values()))


def open_tensors(folder: Path) -> dict[str, tuple[Any, str, Path]]:
    """Tensor name without its prefix to the opened file, the name in it, and the file's path."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: copy it again")
        files = sorted(set(weight_map.values()))
    found = {}
    for name in files:
        file = folder / name
        try:
            opened = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}: copy it again") from error
        for key in list(opened.keys()):
            short = key.removeprefix("backbone.").removeprefix("model.")
            if short in found:
                raise ValueError(f"{file}: {key} is there twice")
            found[short] = (opened, key, file)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Raises: OSError; ValueError where the file is damaged or not an object."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}: copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object: copy it again")
    return content


def main(args: argparse.Namespace) -> None:
    config, weights = load_nemotron_h(args.folder)
    total = sum(x.numel() for x in weights.values())
    print(f"{config.pattern}, {total:,} parameters")
    if not args.prompt:
        return
    with torch.device("meta"):
        model = HybridLM(config)
    model.load_state_dict(weights, assign=True)
    tokens_BT, starts_BT = pad_prompts([torch.tensor(prompt) for prompt in args.prompt])
    if tokens_BT.min() < 0 or tokens_BT.max() >= config.vocab_size:
        raise ValueError(f"--prompt: token ids are 0 to {config.vocab_size - 1}")
    text_BT = generate(model, tokens_BT, args.new_tokens, starts_BT=starts_BT)
    for row, prompt in zip(text_BT.tolist(), args.prompt):
        print(*prompt, "→", *row[tokens_BT.shape[1] :])


def flags() -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]  # python -OO strips docstrings
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--prompt", type=int, nargs="+", action="append", help="token ids")
    parser.add_argument("--new-tokens", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    try:
        main(flags())
    except (OSError, ValueError) as error:
        sys.exit(f"load_nemotron_h.py: {error}")
