# SPDX-License-Identifier: MIT-0
"""Published Nemotron-H weights as chapter 5's model, and decoding: a text that it goes on with.

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
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from mamba_hybrid import (
    Attention,
    Documents,
    Group,
    HybridConfig,
    Mamba2Mixer,
    ParallelHybridLM,
    Span,
    SquaredReLUMLP,
    StateDict,
    local_config,
    parameter_shapes,
    shard_tensor,
    ssd,
    ssd_recurrent,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

# ── 1 Decoding ──────────────────────────────────────────────────────────────────────────────────
#
# Layers look back at earlier tokens. In decoding these have passed the model before, and a
# `LayerState` has what is left of them: for a Mamba layer the state and the last inputs of the
# convolution, of constant size; for attention all keys and values; for a feed-forward layer
# nothing. A prompt goes through `ssd` (prefill), each further token is one step of `ssd_recurrent`.


@dataclass
class LayerState:
    """What decoding keeps of earlier tokens in one layer; the layer fills in its own fields."""

    capacity: int  # tokens that kv_2BGSP has room for
    conv_BKC: Tensor | None = None  # last inputs of the convolution: K as published, K − 1 would do
    ssm_BHPN: Tensor | None = None  # the state, at least fp32: it sums small terms for long
    kv_2BGSP: Tensor | None = None  # keys and values


@dataclass(frozen=True)
class DecodingSpan(Span):
    """A `Span` of tokens that others came before."""

    first: int = 0  # tokens before them
    state: LayerState | None = None  # what this layer has kept of those


class DecodingMixer(Mamba2Mixer):
    """A Mamba-2 layer that goes on from `span.state`, and leaves its own there."""

    def with_earlier_inputs(self, u_BTC: Tensor, span: DecodingSpan) -> Tensor:
        K = self.config.conv_kernel
        earlier_BKC = span.state.conv_BKC
        if earlier_BKC is None:
            earlier_BKC = u_BTC.new_zeros(len(u_BTC), K, u_BTC.shape[2])
        u = torch.cat([earlier_BKC, u_BTC], 1)
        span.state.conv_BKC = u[:, -K:].clone()  # a view would keep the memory of all of u alive
        return u[:, 1:]

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        if X.shape[1] == 1:
            y_BTHP, state.ssm_BHPN = ssd_recurrent(X, a, B, C, state.ssm_BHPN)
        else:
            y_BTHP, state.ssm_BHPN = ssd(X, a, B, C, self.config.chunk, state.ssm_BHPN)
        return y_BTHP


class DecodingAttention(Attention):
    """An attention layer that sees the keys and values in `span.state`, and adds its own."""

    def attend(self, q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        B, G, T, P = k_BGSP.shape
        if state.kv_2BGSP is None:
            state.kv_2BGSP = k_BGSP.new_zeros(2, B, G, state.capacity, P)
        last = span.first + T
        state.kv_2BGSP[..., span.first : last, :] = torch.stack([k_BGSP, v_BGSP])
        k_BGSP, v_BGSP = state.kv_2BGSP[..., :last, :]
        if T > 1 or span.document_BS is not None:
            return super().attend(q_BHTP, k_BGSP, v_BGSP, span)
        # One token sees all: the heads of a group are queries of one head.
        q_BGRP = rearrange(q_BHTP, "B (G R) 1 P -> B G R P", G=G)
        y_BGRP = F.scaled_dot_product_attention(q_BGRP, k_BGSP, v_BGSP)
        return rearrange(y_BGRP, "B G R P -> B (G R) 1 P")


@dataclass
class Cache:
    """What decoding needs of the tokens so far. Make it with `Decoder.new_cache`."""

    capacity: int  # tokens of a sequence that it has room for
    layers: list[LayerState]
    tokens: int = 0  # of each sequence, so far
    sequences: int = 0  # B; known after the first tokens
    document_BS: Documents = None  # their document indices; None: one document

    def admit(self, tokens_BT: Tensor, starts_BT: Documents) -> int:
        """Counts these tokens in, and returns how many came before.

        Raises: ValueError where they do not fit, RuntimeError for starts_BT of another dtype than
        bool or of another shape; and changes nothing.
        """
        B, T = tokens_BT.shape
        first = self.tokens
        last = first + T
        if last > self.capacity:
            raise ValueError(f"{last} tokens, but the cache has room for {self.capacity}")
        if first and B != self.sequences:
            raise ValueError(f"{B} sequences, but the cache has tokens of {self.sequences}")
        if starts_BT is not None or self.document_BS is not None:
            starts = torch.zeros_like(tokens_BT)
            if starts_BT is not None:
                starts.masked_fill_(starts_BT, 1)  # which refuses other dtypes and shapes
            before_BS = self.document_BS
            if before_BS is None:
                before_BS = tokens_BT.new_zeros(B, first)
            before_B1 = before_BS[:, -1:] if first else 0
            self.document_BS = torch.cat([before_BS, before_B1 + starts.cumsum(1)], 1)
        self.sequences = B
        self.tokens = last  # after all that can fail
        return first


class Decoder(ParallelHybridLM):
    """`HybridLM` that goes on after the tokens of a cache, with its heads over `group`.

    Called with (tokens_BT, cache, starts_BT, last): starts_BT as `HybridLM`'s; last: logits of the
    last token alone, (B, 1, V). Its weights are those of HybridLM(config); no gradients.
    Raises: as `Cache.admit`; on the CPU IndexError for an id that is no vocabulary entry. The cache
    is then as it was. After any other exception make a new one: it may have counted the tokens.
    """

    def __init__(self, config: HybridConfig, group: Group = None):
        layers = {"M": DecodingMixer, "*": DecodingAttention, "-": SquaredReLUMLP}
        super().__init__(config, group, layers)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for sequences of up to `capacity` tokens."""
        return Cache(capacity, [LayerState(capacity) for _ in self.layers])

    @torch.no_grad()
    def forward(
        self, tokens_BT: Tensor, cache: Cache, starts_BT: Documents = None, last: bool = False
    ) -> Tensor:
        x_BTD = self.embedding(tokens_BT)  # before the cache counts them: an id may be wrong
        first = cache.admit(tokens_BT, starts_BT)
        for layer, state in zip(self.layers, cache.layers):
            span = DecodingSpan(cache.document_BS, first, state)
            x_BTD = self.run(layer, x_BTD, span)
        if last:
            x_BTD = x_BTD[:, -1:]
        return self.head(self.final_norm(x_BTD))


def pad_prompts(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length as one batch: tokens_BT and starts_BT for `generate`.

    Each is padded on the *left*, so that all end together, and begins as a document: its tokens
    do not see the padding. Args: prompts: token ids (int64), of shape (T) each. Raises: ValueError
    for an empty one, or none. Source: ours.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one")
    T = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.stack([F.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
    starts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: begin with at least one token")
        starts_BT[row, T - len(prompt)] = True
    return tokens_BT, starts_BT


def generate(
    model: Decoder,
    tokens_BT: Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    starts_BT: Documents = None,
) -> Tensor:
    """tokens_BT and `new_tokens` more, (B, T + new_tokens).

    Args: temperature: 0 takes the most probable token; else tokens are drawn with `generator`.
        starts_BT: as `HybridLM`'s, for prompts of `pad_prompts`.
    Collective over a tensor-parallel group: equal generators give the same text on every rank.
    Raises: ValueError for an empty prompt, or a temperature below 0.
    """
    if not tokens_BT.shape[1]:
        shape = tuple(tokens_BT.shape)
        raise ValueError(f"an empty prompt, {shape}: begin with at least one token")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be at least 0, and finite")
    cache = model.new_cache(tokens_BT.shape[1] + new_tokens)
    new_BT = tokens_BT
    for _ in range(new_tokens):
        logits_BV = model(new_BT, cache, starts_BT, last=True)[:, 0]
        starts_BT = None
        new_BT = logits_BV.argmax(-1, keepdim=True)
        if temperature:
            # At most 0, so that no temperature overflows: the largest logit stays 0.
            below_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True)
            p_BV = (below_BV / temperature).softmax(-1)
            new_BT = torch.multinomial(p_BV, 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, new_BT], 1)
    return tokens_BT


# ── 2 Published weights ─────────────────────────────────────────────────────────────────────────

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
    "M": "M",
    "*": "*",
    "-": "-",
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
    if limit is not None and bounds != [0.0, float("inf")]:
        raise ValueError(f"{file} has time_step_limit={limit}, and this model does not clamp dt")
    known = {*FIXED, "rms_norm_eps", *SIZES.values(), *HEAD_SIZES, *PATTERNS, *HARMLESS.split()}
    known |= {"layer_norm_epsilon", "time_step_limit"}
    fixed = {**FIXED, "rms_norm_eps": theirs.get("layer_norm_epsilon")}
    other = {key: x for key, x in theirs.items() if fixed.get(key, x) != x or key not in known}
    if other:
        raise ValueError(f"{file} has {other}, which this model does not compute")
    head_keys = [key for key in HEAD_SIZES if theirs.get(key) is not None]
    if any(theirs[key] != theirs[head_keys[0]] for key in head_keys):
        raise ValueError(f"{file} has two sizes of a head, {', '.join(head_keys)}: keep one")
    head_key = (head_keys or HEAD_SIZES)[0]
    sizes = {**SIZES, "attention_head_size": head_key}
    bad = [key for key in sizes.values() if type(theirs.get(key)) is not int]
    eps = theirs.get("layer_norm_epsilon")
    if type(eps) not in (int, float) or not 0 < eps < math.inf:
        bad.append("layer_norm_epsilon above 0")
    if bad:
        raise ValueError(f"{file} has no number for {', '.join(bad)}")
    values = {name: theirs[key] for name, key in sizes.items()}
    pattern = read_pattern(file, theirs)
    if theirs.get("num_hidden_layers", len(pattern)) != len(pattern):
        count = theirs["num_hidden_layers"]
        raise ValueError(f"{file} has num_hidden_layers={count}, and a pattern of {len(pattern)}")
    try:
        return HybridConfig(pattern=pattern, norm_eps=eps, **values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _bound(x: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}, Python's json as Infinity."""
    return math.inf if x == {"__float__": "Infinity"} else x


def read_pattern(file: Path, theirs: dict[str, Any]) -> str:
    """The pattern, from any of the keys that have it; all that are there must agree."""
    found = {}
    for key in PATTERNS:
        value = theirs.get(key)
        if value is not None:
            names = value if isinstance(value, (str, list)) else [value]
            found[key] = "".join(LETTERS.get(str(name), "?") for name in names)
    if not found or len(set(found.values())) > 1 or "?" in "".join(found.values()):
        raise ValueError(f"{file}: layers {found or 'missing'}; M, * and - are known, in one way")
    return next(iter(found.values()))


def open_tensors(folder: Path) -> dict[str, tuple[Any, str, Path]]:
    """Tensor name without its prefix to the opened file, the name in it, and the file's path."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{index} has no weight_map of file names: copy it again")
        files = sorted(set(names))
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
        model = Decoder(config)
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
    args = parser.parse_args()
    if args.new_tokens < 1:
        parser.error(f"--new-tokens {args.new_tokens}: it must be at least 1")
    return args


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    try:
        main(flags())
    except (OSError, ValueError) as error:
        sys.exit(f"load_nemotron_h.py: {error}")
