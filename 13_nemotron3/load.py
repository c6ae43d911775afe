# SPDX-License-Identifier: MIT-0
"""Chapter 13, second half. Published Nemotron 3 weights, and text with drafts and thinking budgets.

    python 13_nemotron3/load.py                                     trains nemotron3.py's models on
                                                                    4 local ranks, then writes
    python 13_nemotron3/load.py --folder FOLDER                     checks the folder
    python 13_nemotron3/load.py --folder FOLDER --text "Oslo is" --new-tokens 20
    python 13_nemotron3/load.py --folder FOLDER --prompt "1 17 4" --drafts 3
    python 13_nemotron3/load.py --folder FOLDER --text "2+2?" --thinking-budget 64

FOLDER has config.json, safetensors, one file or several with an index, and for --text the file
tokenizer.json. Papers: Nemotron 3 Nano, 2025, arXiv 2512.20848; Nemotron 3 Super, 2026, 2604.12374.

    config = read_config(FOLDER)
    with torch.device("meta"):
        model = ParallelNemotronLM(config, mesh)
    model.take(read_weights(FOLDER, config, mesh))         each rank reads its shards alone

Every setting and every tensor of the folder is honoured, or refused by name. One difference from
the transformers library is left: it clamps dt at time_step_min = 0.001 from below when it reads a
prompt, but not when it decodes. Megatron-LM, which trained the models, does not clamp, nor do we.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nemotron3 import (
    LAYERS,
    Attention,
    Block,
    Mamba2Mixer,
    Mesh,
    NemotronConfig,
    NemotronLM,
    Options,
    ParallelNemotronLM,
    Placement,
    Span,
    StateDict,
    TextData,
    _has_values,
    check_args,
    check_layout,
    flag,
    gather_state_dict,
    group_rank,
    launch,
    make_mesh,
    measure,
    parse_flags,
    placement,
    print_claims,
    say,
    say_setting,
    ssd,
    state_shapes,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

ALONE = Mesh()
REPLICATED = Placement()

# ── 1 Settings ────────────────────────────────────────────────────────────────────────────────────

SIZES = {  # our field: the published key
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
    "attention_head_size": "head_dim",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_size": "moe_shared_expert_intermediate_size",
}
FIXED = {  # settings with one value here; a missing key has it
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
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "residual_in_fp32": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
READ = """
    layer_norm_epsilon routed_scaling_factor moe_latent_size num_nextn_predict_layers
    hybrid_override_pattern layers_block_type layer_types num_hidden_layers time_step_limit
    mtp_hybrid_override_pattern mtp_layers_block_type
"""
# How the file came to be, token ids, initial weights and kernels. The published files also set
# rotary embeddings, which no layer of these models has.
HARMLESS = """
    _name_or_path architectures auto_map bos_token_id dtype eos_token_id expand id2label
    initializer_range label2id mamba_ssm_cache_dtype max_position_embeddings
    moe_shared_expert_overlap num_logits_to_keep output_attentions output_hidden_states
    output_router_logits pad_token_id partial_rotary_factor rescale_prenorm_residual return_dict
    rope_theta time_step_floor time_step_max time_step_min time_step_rank torch_dtype
    transformers_version use_cache use_mamba_kernels
"""
LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}
LETTERS |= {"moe": "E", "mlp": "-"} | {letter: letter for letter in "M*E-"}
PATTERNS = ("hybrid_override_pattern", "layers_block_type", "layer_types")
MTP_PATTERNS = ("mtp_hybrid_override_pattern", "mtp_layers_block_type")


def read_config(folder: Path | str) -> NemotronConfig:
    """config.json of a folder as a NemotronConfig.

    Raises: OSError; ValueError that names a damaged file, a missing key, or each setting that this
        model does not have.
    """
    file = Path(folder) / "config.json"
    theirs = read_json(file)
    missing = [key for key in SIZES.values() if type(theirs.get(key)) is not int]
    numbers = ("layer_norm_epsilon", "routed_scaling_factor")
    missing += [key for key in numbers if not _is_positive(theirs.get(key))]
    counts = {"moe_latent_size": 0, "num_nextn_predict_layers": 0}  # null or missing: none
    counts |= {key: theirs[key] for key in counts if theirs.get(key) is not None}
    missing += [key for key, x in counts.items() if type(x) is not int]
    if missing:
        raise ValueError(f"{file} has no number for {missing}: is it of a Nemotron 3 model?")
    fixed = FIXED | {"norm_eps": theirs["layer_norm_epsilon"]}  # Nano's file says it twice
    known = {*fixed, *SIZES.values(), *READ.split(), *HARMLESS.split()}
    other = {key: theirs[key] for key, only in fixed.items() if theirs.get(key, only) != only}
    unknown = sorted(theirs.keys() - known)
    other |= {key: theirs[key] for key in unknown if theirs[key] is not None}  # null: not set
    limit = theirs.get("time_step_limit")
    if limit is not None and not _is_no_limit(limit):
        other["time_step_limit"] = limit
    if theirs["num_experts_per_tok"] == 1:
        other["num_experts_per_tok"] = 1  # there its weight is divided by itself
    pattern = read_pattern(file, theirs, PATTERNS)
    if theirs.get("num_hidden_layers", len(pattern)) != len(pattern):
        other |= {"num_hidden_layers": theirs["num_hidden_layers"], "layers": pattern}
    if other:
        raise ValueError(f"{file} has {other}, which this model does not have")
    sizes = {name: theirs[key] for name, key in SIZES.items()}
    blocks = counts["num_nextn_predict_layers"]
    if blocks:
        sizes["mtp_pattern"] = read_pattern(file, theirs, MTP_PATTERNS)
    try:
        return NemotronConfig(
            pattern=pattern,
            mtp_num_layers=blocks,
            mtp_use_repeated_layer=blocks < 2,
            moe_latent_size=counts["moe_latent_size"],
            gate_scale=theirs["routed_scaling_factor"],
            norm_eps=theirs["layer_norm_epsilon"],
            **sizes,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _is_positive(x: Any) -> bool:
    """Whether it is a finite number above 0, which NaN is not."""
    return type(x) in (int, float) and 0 < x < math.inf


def _is_no_limit(limit: Any) -> bool:
    """Whether time_step_limit is 0 to infinity, which json writes in two ways."""
    if not isinstance(limit, list) or len(limit) != 2:
        return False
    bounds = [x.get("__float__") if isinstance(x, dict) else x for x in limit]
    return bounds[0] == 0 and bounds[1] in ("Infinity", float("inf"))


def read_pattern(file: Path, theirs: dict[str, Any], keys: Sequence[str]) -> str:
    """The pattern of letters, from any of the keys that have it; all that are there must agree.

    Raises: ValueError for an unknown layer, several patterns, or none.
    """
    found = {}
    for key in keys:
        value = theirs.get(key)
        if value is not None:
            names = value if isinstance(value, (str, list)) else [value]
            found[key] = "".join(LETTERS.get(str(name), "?") for name in names)
    if len(set(found.values())) != 1 or "?" in "".join(found.values()):
        raise ValueError(
            f"{file}: layers {found or 'missing'}; M, *, E and - are known, in one way"
        )
    return next(iter(found.values()))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises: OSError; ValueError where the file is damaged or not an object."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}: copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object: copy it again")
    return content


# ── 2 Tensors ─────────────────────────────────────────────────────────────────────────────────────

RENAMED = {
    "embedding": "embeddings",
    "final_norm": "norm_f",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "router": "gate",
    "bias": "e_score_correction_bias",
    "shared": "shared_experts",
    "up": "up_proj",
    "down": "down_proj",
    "into_latent": "fc1_latent_proj",
    "out_of_latent": "fc2_latent_proj",
    "head": "lm_head",
}


def published_name(name: str, config: NemotronConfig) -> str:
    """The published name of our tensor, without its prefix; of an expert's, with {} for its index.

    The layers of all blocks for multi-token prediction are numbered through, as mtp.layers. The
    first one of a block has its projection and norms, the last one its final norm.
    """
    parts = name.split(".")
    if parts[0] == "mtp":
        first = int(parts[1]) * len(config.mtp_pattern)
        if parts[2] == "layers":
            layer = first + int(parts[3])
            rest = parts[4:]
        else:
            last = parts[2] == "final_layernorm"
            layer = first + (len(config.mtp_pattern) - 1 if last else 0)
            rest = parts[2:]
        parts = ["mtp", "layers", str(layer), *rest]
    theirs = ".".join(RENAMED.get(part, part) for part in parts)
    if ".experts." in theirs:
        theirs = theirs.replace(".experts.", ".experts.{}.") + ".weight"
    return theirs


def open_tensors(folder: Path) -> dict[str, tuple[Any, str]]:
    """Tensor name without its prefix to the opened file and the name in it.

    Raises: OSError; ValueError that names a damaged file, or a tensor that is there twice.
    """
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
        try:
            opened = safe_open(folder / name, "pt")
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}: copy it again") from error
        for key in opened.keys():
            short = key.removeprefix("backbone.").removeprefix("model.")
            if short in found:
                raise ValueError(f"{folder / name}: {key} is there twice")
            found[short] = (opened, key)
    return found


def check_names(folder: Path, config: NemotronConfig, found: dict[str, Any]) -> None:
    """Raises ValueError for a tensor that the folder lacks, and for those that are unknown."""
    expected = set()
    for name in state_shapes(config):
        theirs = published_name(name, config)
        expected |= {theirs.format(index) for index in range(config.num_experts)}
    missing = sorted(expected - found.keys())
    unknown = sorted(found.keys() - expected)
    if missing:
        raise ValueError(f"{folder} lacks the tensor {missing[0]}, and {len(missing) - 1} others")
    if unknown:
        raise ValueError(f"{folder} has {unknown[:6]}, which config.json does not imply")


def read_weights(folder: Path | str, config: NemotronConfig, mesh: Mesh = ALONE) -> StateDict:
    """This rank's shards: the plain model's state dict where the mesh is of one rank.

    Of a sharded tensor only the shard is read, and only this rank's experts.
    Raises: OSError; ValueError that names a damaged file, a missing or unknown tensor, or a shape.
    """
    folder = Path(folder)
    check_layout(config, mesh.tp, mesh.ep)
    found = open_tensors(folder)
    check_names(folder, config, found)
    weights = {}
    for name, shape in state_shapes(config).items():
        theirs = published_name(name, config)
        place = placement(name, config, mesh.tp)
        if place.over == "ep":
            experts = range(config.num_experts // mesh.ep)
            first = mesh.ep_rank * len(experts)
            parts = [read_shard(found, theirs.format(first + i), shape[1:]) for i in experts]
            weights[name] = torch.stack(parts)
        else:
            weights[name] = read_shard(found, theirs, shape, place, mesh)
    return weights


def read_shard(
    found: dict[str, tuple[Any, str]],
    theirs: str,
    shape: torch.Size,
    place: Placement = REPLICATED,
    mesh: Mesh = ALONE,
) -> Tensor:
    """This rank's shard of a published tensor; the last rows of the vocabulary may be padding.

    Args: found: `open_tensors`'. shape: of the full tensor, in our model. place: its placement.
    Raises: ValueError for another shape.
    """
    opened, key = found[theirs]
    stored = opened.get_slice(key)
    shape_there = stored.get_shape()
    if theirs.endswith("conv1d.weight") and len(shape_there) == 3:
        shape_there = [shape_there[0], *shape_there[2:]]  # channels, 1, taps
    if shape_there != list(shape):
        text = f"{key} has shape {tuple(shape_there)}"
        raise ValueError(f"{text}; config.json implies {tuple(shape)}")
    if place.over != "tp":
        return stored[:]
    parts = []
    start = 0
    for size in place.sizes:
        shard = size // mesh.tp
        first = start + mesh.tp_rank * shard
        last = min(first + shard, shape[place.dim])
        part = stored[:, first:last] if place.dim else stored[first:last]
        padding = shard - part.shape[place.dim]  # of the vocabulary, which is sharded by rows
        parts.append(F.pad(part, (0, 0, 0, padding)) if padding else part)
        start += size
    x = torch.cat(parts, place.dim)
    return x.squeeze(1) if theirs.endswith("conv1d.weight") and x.ndim == 3 else x


# ── 3 Decoding ────────────────────────────────────────────────────────────────────────────────────
#
# Chapter 9's generation with drafts, on chapter 5's layers: groups of heads, chunks, and three
# projections in attention. The two layers that look back are new; all else is carried.


# region carried: draw, speculative_sample, LayerState, Cache, new_cache (home: 09_mtp/speculate)
def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens at `uniforms` (...) of cumulated probs (..., V), which may have any positive sum.

    Cumulated in float64: in fp32 rounding hides unlikely tokens of a large vocabulary.
    A token of probability 0 is never drawn. Source: inversion of the distribution function.
    """
    cumulated = probs.to(torch.float64).cumsum(dim=-1)
    total = cumulated[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u · total may be rounded up to total
    threshold = uniforms[..., None] * total
    threshold = torch.minimum(threshold, below)
    tokens = torch.searchsorted(cumulated, threshold, right=True)
    return tokens[..., 0]


def speculative_sample(
    target_probs: Tensor, draft_probs: Tensor, drafts: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """How many of n ≥ 0 drafts are accepted, and the token after them: two int64 scalars.

    Pure: the outcome is a function of the arguments, and the law of the tokens is the target's.

    Args:
        target_probs: (n + 1, V), the model's laws at the drafts' places and at the next one.
        draft_probs: (n, V), the laws that the drafts were drawn from. drafts: (n), int64.
        uniforms: (n + 1), independent, in [0, 1): one for each test and one for the draw.

    Raises: ValueError where shapes disagree, or floats are not fp32 or float64. On a CPU also for a
        draft that its own law excludes, and for laws that do not sum to 1; on a GPU those pass.
    Source: Leviathan et al., 2023, algorithm 1.
    """
    n = len(drafts)
    V = target_probs.shape[-1]
    shapes = [tuple(x.shape) for x in (target_probs, draft_probs, drafts, uniforms)]
    if shapes != [(n + 1, V), (n, V), (n,), (n + 1,)]:
        raise ValueError(f"shapes {shapes}: they must be (n + 1, V), (n, V), (n), (n + 1)")
    for x in (target_probs, draft_probs, uniforms):  # bf16 would round each law to another one
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{x.dtype}: upcast logits before the softmax, to fp32 or float64")
    drafts_n1 = drafts[:, None]
    p_n1 = target_probs[:n].gather(1, drafts_n1)
    q_n1 = draft_probs.gather(1, drafts_n1)
    if _has_values(q_n1) and not (q_n1 > 0).all():
        raise ValueError(f"a draft of {drafts.tolist()} has probability 0 in draft_probs")
    for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
        sum_N = probs.sum(dim=-1)
        if _has_values(sum_N) and not ((sum_N - 1).abs() < 1e-3).all():
            raise ValueError(f"{name} sum to {sum_N.tolist()}: they must be probabilities")
    u_n1 = uniforms[:n, None]
    passes_n1 = u_n1 * q_n1 < p_n1
    accepted = passes_n1.long().cumprod(dim=0).sum()
    # After the last draft there is no q: with zeros the residual is p itself.
    q_NV = F.pad(draft_probs, (0, 0, 0, 1))
    row_1 = accepted[None]  # a read of its value would stall a GPU
    p_1V = target_probs.index_select(0, row_1)
    q_1V = q_NV.index_select(0, row_1)
    residual_1V = (p_1V - q_1V).clamp(min=0)
    # Where p = q up to rounding, the residual can be 0 everywhere.
    residual_1V = torch.where(residual_1V.sum() > 0, residual_1V, p_1V)
    token_1 = draw(residual_1V, uniforms[n:])
    return accepted, token_1[0]


@dataclass
class LayerState:
    """What decoding keeps of earlier tokens in one layer; each kind of layer fills its own fields.

    Source: ours.
    """

    conv_BTC: Tensor | None = None  # the last K − 1 inputs before the drafts, then the drafts'
    ssm: list[Tensor] = field(default_factory=list)  # the state before the drafts, after each
    kv_2BHSP: Tensor | None = None  # keys and values of all tokens

    def keep(self, n: int, drafts: int) -> None:
        """Keeps `n` of the last `drafts` tokens."""
        dropped = drafts - n
        if self.ssm:
            self.ssm = [self.ssm[n]]
            last = self.conv_BTC.shape[1] - dropped
            self.conv_BTC = self.conv_BTC[:, n:last]
        if self.kv_2BHSP is not None:
            last = self.kv_2BHSP.shape[3] - dropped
            self.kv_2BHSP = self.kv_2BHSP[..., :last, :]


@dataclass
class Cache:
    """The states of several layers, and how many tokens have passed them. Source: ours."""

    layers: list[LayerState]
    tokens: int = 0  # that have passed, drafts too
    drafts: int = 0  # the last of them, which `keep` has not decided on yet

    def admit(self, tokens: int, drafts: int) -> DecodingSpan:
        """Counts a pass of `tokens` tokens, the last `drafts` of them not certain, and returns what
        its layers may look back at.

        Raises: ValueError for a certain token after one that is not, and changes nothing.
        """
        certain = tokens - drafts
        if certain < 0 or drafts < 0 or (certain and self.drafts):
            found = f"{certain} certain tokens and {drafts} drafts, after {self.drafts}"
            raise ValueError(f"{found} drafts: call keep() first")
        self.tokens += tokens
        self.drafts += drafts
        return DecodingSpan(states=self.layers, drafts=drafts)

    def keep(self, n: int) -> None:
        """Keeps `n` drafts, and rolls every layer back to the last of them.

        Afterwards the cache is what a pass without the other drafts would have left.
        Raises: ValueError where there are fewer drafts.
        """
        if not 0 <= n <= self.drafts:
            raise ValueError(f"keep({n}), but {self.drafts} drafts have passed since the last one")
        for state in self.layers:
            state.keep(n, self.drafts)
        self.tokens -= self.drafts - n
        self.drafts = 0


def new_cache(layers: Iterable[nn.Module]) -> Cache:
    """An empty cache for these layers. Source: ours."""
    return Cache([LayerState() for _ in layers])


# endregion copy 589391
# region carried: DecodingSpan, next_laws, Speculation, check_generation (home: 09_mtp/speculate)
@dataclass(frozen=True)
class DecodingSpan(Span):
    """A `Span` of tokens that others came before."""

    states: list[LayerState] = field(default_factory=list)  # of all layers, which update them
    drafts: int = 0  # how many of the new tokens, the last ones, may be dropped
    index: int = 0  # of the layer

    def layer(self, index: int) -> DecodingSpan:
        return replace(self, index=index)

    @property
    def state(self) -> LayerState:
        return self.states[self.index]


def next_laws(logits: Tensor, temperature: float) -> Tensor:
    """Laws (..., V) of the next token, in float64. temperature 0: 1 at the largest logit.

    Raises: FloatingPointError for a logit that is not finite. Source: the usual definition.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("a logit is not finite: the weights are, or the input was, not")
    logits = logits.to(torch.float64)
    if temperature == 0:
        best = logits.argmax(dim=-1)
        law = F.one_hot(best, logits.shape[-1])
        return law.to(torch.float64)
    logits = logits / temperature
    return logits.softmax(dim=-1)


@dataclass
class Speculation:
    """A text, and what it took to write it."""

    tokens_1T: Tensor  # prompt and new tokens
    passes: int  # of the trunk, the prompt's included
    offered: list[int]  # times that the k-th draft was reached, after those before it had passed
    accepted: list[int]  # times that it passed

    def count(self, drafts: int, accepted: int) -> None:
        self.passes += 1
        for k in range(drafts):
            self.offered[k] += accepted >= k
            self.accepted[k] += accepted > k

    def add(self, other: Speculation) -> None:
        """Adds the counts of another text with as many drafts."""
        self.passes += other.passes
        for k, offered in enumerate(other.offered):
            self.offered[k] += offered
            self.accepted[k] += other.accepted[k]


def check_generation(
    model: Decoder, tokens_1T: Tensor, new_tokens: int, draft_length: int, temperature: float
) -> None:
    """Raises ValueError for what `speculative_generate` cannot do."""
    shape = tuple(tokens_1T.shape)
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise ValueError(f"tokens of shape {shape}: give one prompt, (1, T)")
    if new_tokens < 0 or draft_length < 0:
        found = f"new_tokens={new_tokens}, draft_length={draft_length}"
        raise ValueError(f"{found}: neither can be negative")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be at least 0, and finite")
    if draft_length and len(model.mtp) != 1:
        found = f"{len(model.mtp)} blocks for multi-token prediction"
        raise ValueError(f"{found}: drafts need one that is repeated (mtp_use_repeated_layer)")


# endregion copy 64d218
# region carried: random, draft, speculative_generate (home: 09_mtp/speculate)
def random(count: int, probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniforms in [0, 1), (count), of the dtype and the device of `probs`. Source: torch.rand."""
    options = {"dtype": probs.dtype, "device": probs.device, "generator": generator}
    return torch.rand(count, **options)


@torch.no_grad()
def draft(
    model: Decoder,
    hidden_1TD: Tensor,
    next_1T: Tensor,
    cache: Cache,
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Drafts (n) and the laws (n, V) that they were drawn from, n = length > 0.

    Args: hidden_1TD: the trunk's states that the block has not seen. next_1T: the token after each.
        cache: the block's; it keeps these, and drafts until the next call.
    Source: Nemotron 3 Super.
    """
    cache.keep(0)
    drafts = []
    laws = []
    for k in range(length):
        embedded_1TD = model.embed(next_1T)
        span = cache.admit(next_1T.shape[1], int(k > 0))
        hidden_1TD = model.mtp[0](embedded_1TD, hidden_1TD, span)
        hidden_1TD = hidden_1TD[:, -1:]
        logits_1V = model.logits(hidden_1TD)[0]
        q_1V = next_laws(logits_1V, temperature)
        draft_1 = draw(q_1V, random(1, q_1V, generator))
        drafts.append(draft_1)
        laws.append(q_1V)
        next_1T = draft_1[None]
    return torch.cat(drafts), torch.cat(laws)


@torch.no_grad()
def speculative_generate(
    model: Decoder,
    tokens_1T: Tensor,
    new_tokens: int,
    draft_length: int = 0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    constrain: Callable | None = None,
) -> Speculation:
    """Writes `new_tokens` tokens after a prompt; each pass of the trunk verifies drafts.

    Args: draft_length: drafts of a pass; 0 is plain decoding. It may exceed the depths of training.
        temperature: 0 takes the best token. generator: of the tokens' device. constrain: gets the
        text with n drafts after it, (1, S), and the n + 1 laws (n + 1, V) of the drafts' places and
        of the next one; returns the laws to take, each with sum 1.
    The law of the text does not depend on draft_length, nor does a greedy text.
    Raises: ValueError for an empty prompt or several, for bad numbers, and for drafts without one
        block for all depths. Source: Leviathan et al., 2023; for hybrids vLLM's code.
    """
    check_generation(model, tokens_1T, new_tokens, draft_length, temperature)
    trunk = new_cache(model.layers)
    heads = new_cache([])
    if draft_length:
        heads = new_cache(model.mtp[0].layers)
    drafts_n = tokens_1T.new_empty(0)
    V = model.config.vocab_size
    q_nV = torch.empty(0, V, dtype=torch.float64, device=tokens_1T.device)
    end = tokens_1T.shape[1] + new_tokens
    result = Speculation(tokens_1T, 0, [0] * draft_length, [0] * draft_length)
    while tokens_1T.shape[1] < end:
        seen = trunk.tokens
        n = len(drafts_n)
        window_1T = torch.cat([tokens_1T[:, seen:], drafts_n[None]], dim=1)
        span = trunk.admit(window_1T.shape[1], n)
        hidden_1TD = model.trunk(window_1T, span)
        logits_NV = model.logits(hidden_1TD[:, -n - 1 :])[0]
        p_NV = next_laws(logits_NV, temperature)
        if constrain is not None:
            text_1S = torch.cat([tokens_1T, drafts_n[None]], dim=1)
            p_NV = constrain(text_1S, p_NV)
        uniforms_N = random(n + 1, p_NV, generator)
        accepted, token = speculative_sample(p_NV, q_nV, drafts_n, uniforms_N)
        accepted = int(accepted)  # the lengths of what follows depend on it
        trunk.keep(accepted)
        result.count(n, accepted)
        new_n = torch.cat([drafts_n[:accepted], token[None]])
        tokens_1T = torch.cat([tokens_1T, new_n[None]], dim=1)
        if draft_length:
            kept_1TD = hidden_1TD[:, : trunk.tokens - seen]
            next_1T = tokens_1T[:, seen + 1 :]
            options = (heads, draft_length, temperature, generator)
            drafts_n, q_nV = draft(model, kept_1TD, next_1T, *options)
    result.tokens_1T = tokens_1T[:, :end]
    return result


# endregion copy fd120d


class DecodingMixer(Mamba2Mixer):
    """A Mamba-2 layer that goes on from `span.state`. Args of scan: as `ssd`'s. Source: ours."""

    def with_earlier_inputs(self, u_BTC: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        taps = self.config.conv_kernel
        if state.conv_BTC is None:
            state.conv_BTC = u_BTC.new_zeros(len(u_BTC), taps - 1, u_BTC.shape[2])
        earlier = state.conv_BTC.shape[1]
        inputs_BTC = torch.cat([state.conv_BTC, u_BTC], dim=1)
        state.conv_BTC = inputs_BTC[:, inputs_BTC.shape[1] - earlier - span.drafts :]
        return inputs_BTC[:, earlier - taps + 1 :]

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: DecodingSpan) -> Tensor:
        state = span.state
        if not state.ssm:
            state.ssm = [X.new_zeros(len(X), *X.shape[2:], B.shape[3])]
        certain = X.shape[1] - span.drafts
        outputs = []
        if certain:  # of these no states are kept
            inputs = (x[:, :certain] for x in (X, a, B, C))
            y_BTHP, after_BHPN = ssd(*inputs, self.config.chunk, state.ssm[-1])
            state.ssm = [after_BHPN]
            outputs.append(y_BTHP)
        for token in range(certain, X.shape[1]):
            inputs = (x[:, token : token + 1] for x in (X, a, B, C))
            y_BTHP, after_BHPN = ssd(*inputs, 1, state.ssm[-1])
            state.ssm.append(after_BHPN)
            outputs.append(y_BTHP)
        return torch.cat(outputs, dim=1)


class DecodingAttention(Attention):
    """An attention layer that sees the keys and values in `span.state`, and adds its own."""

    def attend(self, q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, span: DecodingSpan) -> Tensor:
        kv_2BGSP = torch.stack([k_BGSP, v_BGSP])
        if span.state.kv_2BHSP is not None:
            kv_2BGSP = torch.cat([span.state.kv_2BHSP, kv_2BGSP], dim=3)
        span.state.kv_2BHSP = kv_2BGSP
        return super().attend(q_BHTP, *kv_2BGSP, span)


class Decoder(NemotronLM):
    """`NemotronLM` whose layers go on after the tokens of a cache; its weights are the same."""

    def __init__(self, config: NemotronConfig):
        layers = LAYERS | {"M": DecodingMixer, "*": DecodingAttention}
        super().__init__(config, partial(Block, layers=layers))
        self.eval()  # tokens of a text do not count for the bias


# ── 4 Text ────────────────────────────────────────────────────────────────────────────────────────


def load_decoder(folder: Path | str) -> Decoder:
    """The folder's model on one device, for `speculative_generate`. Raises: as `read_weights`."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    model.take(read_weights(folder, config))
    return model


def read_tokenizer(folder: Path | str) -> Any:
    """The folder's tokenizer.json, by the tokenizers library. Raises: OSError; ValueError."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: No such file; give token ids with --prompt")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("--text needs the tokenizers library: pip install tokenizers") from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is damaged: {error}: copy it again") from error


# region carried: thinking budget (home: 12_grpo)
class BudgetController:
    """Ends thinking at a budget: forces the ids of the end tag, one after another, in B rows.

        controller = BudgetController(start=(20,), end=(21,), budget=8, rows=B, device=device)
        controller.read(prompts_BQ)                  the prompts may open a thought, or close it
        for each new token:
            sampled_B = ... from the logits
            tokens_B, is_forced_B = controller(sampled_B)

    Args:
        start, end: token ids of the two tags, one or several each. They count as no thought. The
            first ids of an end tag do until it is complete, since they may be another word.
        budget: so many tokens of thought in each row, or one number a row, int64 (B,). None: no
            limit. A thought begins anew, with a new count, after each start tag outside a thought.
        rows: B. device: of all tensors here; None: the CPU.

    Methods: `read`, `observe`, `forced`, and the call. State: is_thinking_B, thought_B (tokens
        since the start tag). A forced token is no sample: give it no loss. It is forced whatever
        the logits say, so call the controller after every other mask.
    No value is read on the host. Each row is by itself; on tensor-parallel ranks all rows agree.
    Raises: ValueError for an empty tag, a negative id, a negative budget (in a tensor on a GPU it
        counts as 0), another shape or dtype.
    Source: Nemotron Nano 2 (2025), budget control; as a logits processor in vLLM and TensorRT-LLM.
    """

    def __init__(
        self,
        start: Sequence[int],
        end: Sequence[int],
        budget: int | Tensor | None,
        rows: int,
        device: torch.device | None = None,
    ):
        is_tag = bool(start) and bool(end) and min(*start, *end) >= 0
        is_number = isinstance(budget, int) and budget >= 0
        is_row_each = False
        if isinstance(budget, Tensor):
            is_row_each = budget.shape == (rows,) and budget.dtype == torch.int64
            if _has_values(budget):
                is_row_each &= not (budget < 0).any()
        if not is_tag or not (budget is None or is_number or is_row_each):
            found = f"start={start}, end={end}, budget={budget}, rows={rows}"
            raise ValueError(f"{found}: tags need ids >= 0, a budget is >= 0, or one int64 a row")
        self.start = torch.tensor(start, device=device)
        self.end = torch.tensor(end, device=device)
        self.budget = budget
        kept = max(len(start), len(end))
        self.recent_BK = torch.full((rows, kept), -1, device=device)  # the last K ids; -1: none
        self.is_thinking_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.thought_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def __call__(self, sampled_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled ids to the ids that the rows go on with, and which of them were forced."""
        forced_B = self.forced()
        is_forced_B = forced_B >= 0
        tokens_B = torch.where(is_forced_B, forced_B, sampled_B)
        self.observe(tokens_B)
        return tokens_B, is_forced_B

    def forced(self) -> Tensor:
        """The id that each row must go on with, int64 (B,); -1: any id. It changes no state."""
        if self.budget is None:
            return torch.full_like(self.thought_B, -1)
        is_over_B = self.is_thinking_B & (self.thought_B >= self.budget)
        next_B = self._matched(self.end).clamp(max=len(self.end) - 1)
        return torch.where(is_over_B, self.end[next_B], -1)

    def read(self, tokens_BS: Tensor) -> None:
        """Tokens that stand there already: a prompt. Padding belongs on its left."""
        for tokens_B in tokens_BS.unbind(dim=1):
            self.observe(tokens_B)

    def observe(self, tokens_B: Tensor) -> None:
        """One more token of each row, sampled or forced."""
        if tokens_B.shape != self.thought_B.shape:
            raise ValueError(f"{tuple(tokens_B.shape)} tokens for {len(self.thought_B)} rows")
        self.recent_BK = torch.cat([self.recent_BK[:, 1:], tokens_B[:, None]], dim=1)
        was_thinking_B = self.is_thinking_B
        closes_B = was_thinking_B & (self._matched(self.end) == len(self.end))
        opens_B = ~was_thinking_B & (self._matched(self.start) == len(self.start))
        self.is_thinking_B = (was_thinking_B | opens_B) & ~closes_B
        self.thought_B = torch.where(was_thinking_B & ~closes_B, self.thought_B + 1, 0)
        # Ids of one tag must not be taken for the beginning of the next one.
        self.recent_BK = torch.where((opens_B | closes_B)[:, None], -1, self.recent_BK)

    def _matched(self, tag: Tensor) -> Tensor:
        # With how many ids of the tag's beginning a row ends: the others are still to come, so a
        # tag that the model has begun is completed, and not begun a second time.
        size_B = torch.zeros_like(self.thought_B)
        for size in range(1, len(tag) + 1):
            is_equal_B = (self.recent_BK[:, -size:] == tag[:size]).all(dim=1)
            size_B = torch.where(is_equal_B, size, size_B)
        return size_B


# endregion copy 757ce9


class ForcedTokens:
    """A thinking budget as `speculative_generate`'s `constrain`: where chapter 12's controller
    forces a token, the law is 1 at that token.

    A draft's place is looked at as if all drafts before it were accepted, so the text has the law
    of plain decoding with the controller. Args: controller: of one row. Source: ours.
    """

    def __init__(self, controller: BudgetController):
        self.controller = controller
        self.tokens = 0  # that the controller has seen

    def __call__(self, text_1S: Tensor, p_NV: Tensor) -> Tensor:
        certain = text_1S.shape[1] - len(p_NV) + 1
        self.controller.read(text_1S[:, self.tokens : certain])
        self.tokens = certain
        ahead = copy.copy(self.controller)  # its state is replaced, and never changed in place
        forced = []
        for place in range(len(p_NV)):
            forced.append(ahead.forced())
            if certain + place < text_1S.shape[1]:
                ahead.observe(text_1S[:, certain + place])
        forced_N1 = torch.stack(forced)
        law_NV = F.one_hot(forced_N1[:, 0].clamp(min=0), p_NV.shape[1])
        return torch.where(forced_N1 >= 0, law_NV.to(p_NV.dtype), p_NV)


# ── 5 Commands ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class WritingOptions:  # the flags of this script
    folder: str = flag("", "a published model; by default a small one is trained")
    text: str = flag("", "a prompt; needs tokenizer.json in the folder")
    prompt: str = flag("", "a prompt as token ids, with spaces between them")
    new_tokens: int = flag(40, "tokens to write", least=1)
    drafts: int | None = flag(None, "drafts of a pass; None: 3 where the model has a block for it")
    temperature: float = flag(0.0, "0 takes the best token")
    thinking_budget: int | None = flag(None, "tokens of a thought until its end is forced")
    think_tags: str = flag("<think> </think>", "start and end of a thought")


def write_from_folder(args: argparse.Namespace, device: torch.device) -> None:
    """Prints what the folder holds and, with a prompt, a text. Numbers keep the folder's dtype.

    Raises: OSError; ValueError.
    """
    model = load_decoder(args.folder).to(device)
    config = model.config
    total = sum(x.numel() for x in model.state_dict().values())
    depths = f", MTP {config.mtp_pattern}" if config.mtp_num_layers else ""
    say(f"{config.pattern}{depths}, {total:,} parameters")
    tokenizer = read_tokenizer(args.folder) if args.text else None
    ids = tokenizer.encode(args.text).ids if tokenizer else [int(x) for x in args.prompt.split()]
    if not ids:
        return
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise ValueError(f"the prompt is {ids}: give token ids from 0 to {config.vocab_size - 1}")
    constrain = None
    if args.thinking_budget is not None:
        constrain = budget_of(args, tokenizer, device)
    drafts = args.drafts
    if drafts is None:
        drafts = 3 if len(model.mtp) == 1 else 0
    generator = torch.Generator(device).manual_seed(args.seed)
    options = (args.new_tokens, drafts, args.temperature, generator, constrain)
    prompt_1T = torch.tensor([ids], device=device)
    result = speculative_generate(model, prompt_1T, *options)
    new = result.tokens_1T[0, len(ids) :].tolist()
    say(" ".join(map(str, [*ids, "→", *new])))
    if tokenizer is not None:
        say(tokenizer.decode(new, skip_special_tokens=False))
    say(f"{len(new)} tokens in {result.passes} passes, {drafts} drafts each")


def budget_of(args: argparse.Namespace, tokenizer: Any, device: torch.device) -> ForcedTokens:
    """The thinking budget of the flags. Raises: ValueError without a tokenizer or two tags."""
    tags = args.think_tags.split()
    if tokenizer is None or len(tags) != 2:
        need = "it needs --text, for the tags are in tokenizer.json, and two --think-tags"
        raise ValueError(f"--thinking-budget {args.thinking_budget}: {need}")
    ids = [tokenizer.encode(tag, add_special_tokens=False).ids for tag in tags]
    return ForcedTokens(BudgetController(*ids, args.thinking_budget, rows=1, device=device))


def write(args: argparse.Namespace, model: ParallelNemotronLM) -> list[tuple]:
    """Each rank writes a text with drafts and without. Returns the claims. Collective."""
    device = model.head.weight.device
    decoder = Decoder(model.config)
    decoder.load_state_dict(gather_state_dict(model.state_dict(), model))
    decoder.to(device, torch.float64)
    data = TextData(args.data, args.seq_length)
    tokens_BT, _ = data.batch(group_rank(), 1, args.seed, evaluation=True)
    prompt_1T = tokens_BT[:, :32].to(device)
    plain = speculative_generate(decoder, prompt_1T, args.new_tokens)
    drafted = speculative_generate(decoder, prompt_1T, args.new_tokens, args.drafts)
    same = int(torch.equal(plain.tokens_1T, drafted.tokens_1T))
    totals = torch.tensor([1, same, args.new_tokens, drafted.passes], device=device)
    dist.all_reduce(totals)
    texts, same, tokens, passes = totals.tolist()
    claim = f"greedy text with {args.drafts} drafts equals plain decoding's"
    rows = [(claim, "equal", f"{same} of {texts} texts", same == texts)]
    here = f"{tokens / passes:.2f}"
    note = "a small model, a short run"
    return [*rows, ("tokens a pass", "3.45 with 7 drafts (Super)", here, note)]


def main(args: argparse.Namespace, device: torch.device) -> None:
    if args.folder:
        write_from_folder(args, device)
        return
    mesh = make_mesh(args.tp, args.ep, device, args.timeout)
    say_setting(args, f": tp {mesh.tp} × dp {mesh.dp}, ep {mesh.ep}")
    claims, model = measure(args, mesh, device)
    failed = [claim for claim in claims if claim[-1] is False]  # nemotron3.py prints all of them
    if not print_claims(failed + write(args, model)):
        sys.exit(1)


def check_writing_args(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where flags, ranks and folder do not fit."""
    if args.folder:
        if args.world_size > 1 and args.ranks != 1:
            args.ranks = args.world_size = 1  # one process writes
        read_config(args.folder)
        if args.text and args.prompt:
            raise ValueError("--text and --prompt are both prompts: give one")
        return
    for name in ("text", "prompt", "thinking_budget"):
        if getattr(args, name) not in ("", None):
            raise ValueError(f"--{name.replace('_', '-')} needs --folder")
    check_args(args)
    if args.drafts is None:
        args.drafts = 3 if args.mtp_num_layers else 0
    if args.drafts and not args.mtp_num_layers:
        raise ValueError(f"--mtp-num-layers 0 has no block for --drafts {args.drafts}")


def flags() -> argparse.Namespace:
    configs = [WritingOptions, Options, NemotronConfig]
    return parse_flags(__doc__, configs, check_writing_args, ranks=4, steps=40)


if __name__ == "__main__":
    launch(main, flags())
