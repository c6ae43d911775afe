# SPDX-License-Identifier: MIT-0
"""Published Nemotron 3 weights as chapter 13's model, and text that it goes on with.

    python 13_nemotron3/load.py FOLDER                              checks the folder
    python 13_nemotron3/load.py FOLDER --text "Oslo is" --new-tokens 20
    python 13_nemotron3/load.py FOLDER --prompt 1 17 4 --drafts 3   with multi-token prediction
    python 13_nemotron3/load.py FOLDER --text "2+2?" --thinking-budget 64

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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nemotron3 import (
    Decoder,
    Mesh,
    NemotronConfig,
    Placement,
    StateDict,
    check_layout,
    placement,
    speculative_generate,
    state_shapes,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
# How the file came to be, token ids, initial weights and kernels.
HARMLESS = """
    _name_or_path architectures auto_map bos_token_id dtype eos_token_id expand id2label
    initializer_range label2id mamba_ssm_cache_dtype max_position_embeddings
    moe_shared_expert_overlap num_logits_to_keep output_attentions output_hidden_states
    output_router_logits pad_token_id rescale_prenorm_residual return_dict time_step_floor
    time_step_max time_step_min time_step_rank torch_dtype transformers_version use_cache
    use_mamba_kernels
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
    missing += [key for key in numbers if type(theirs.get(key)) not in (int, float)]
    if missing:
        raise ValueError(f"{file} has no number for {missing}: is it of a Nemotron 3 model?")
    known = {*FIXED, *SIZES.values(), *READ.split(), *HARMLESS.split()}
    other = {key: theirs[key] for key, only in FIXED.items() if theirs.get(key, only) != only}
    other |= {key: theirs[key] for key in sorted(theirs.keys() - known) if theirs[key]}
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
    blocks = theirs.get("num_nextn_predict_layers") or 0
    if blocks:
        sizes["mtp_pattern"] = read_pattern(file, theirs, MTP_PATTERNS)
    return NemotronConfig(
        pattern=pattern,
        mtp_num_layers=blocks,
        mtp_use_repeated_layer=blocks < 2,
        moe_latent_size=theirs.get("moe_latent_size") or 0,
        gate_scale=theirs["routed_scaling_factor"],
        norm_eps=theirs["layer_norm_epsilon"],
        **sizes,
    )


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
        if theirs.get(key):
            found[key] = "".join(LETTERS.get(name, "?") for name in theirs[key])
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


# ── 3 Text ────────────────────────────────────────────────────────────────────────────────────────


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
        start, end: token ids of the two tags, one or several each. They count as no thought.
        budget: so many tokens of thought in each row, or one number a row, int64 (B,). None: no
            limit. A thought begins anew, with a new count, after each start tag outside a thought.
        rows: B. device: of all tensors here; None: the CPU.

    Methods: `read`, `observe`, `forced`, and the call. State: is_thinking_B, thought_B (tokens
        since the start tag). A forced token is no sample: give it no loss. It is forced whatever
        the logits say, so call the controller after every other mask.
    No value is read on the host. Each row is by itself; on tensor-parallel ranks all rows agree.
    Raises: ValueError for an empty tag, a negative id, a negative budget, or other shapes.
    Source: Nemotron Nano 2 (2025), section 3.4; as a logits processor in vLLM and TensorRT-LLM.
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
        is_row_each = isinstance(budget, Tensor) and budget.shape == (rows,)
        if not is_tag or not (budget is None or is_number or is_row_each):
            found = f"start={start}, end={end}, budget={budget}, rows={rows}"
            raise ValueError(f"{found}: tags need ids >= 0, a budget is >= 0, or one for each row")
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


# endregion copy 56064f


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


# ── 4 The command ─────────────────────────────────────────────────────────────────────────────────


def main(args: argparse.Namespace) -> None:
    model = load_decoder(args.folder)
    config = model.config
    total = sum(x.numel() for x in model.state_dict().values())
    depths = f", MTP {config.mtp_pattern}" if config.mtp_num_layers else ""
    print(f"{config.pattern}{depths}, {total:,} parameters")
    tokenizer = None
    ids = args.prompt
    if args.text is not None:
        tokenizer = read_tokenizer(args.folder)
        ids = tokenizer.encode(args.text).ids
    if ids is None:
        return
    if not ids or min(ids) < 0 or max(ids) >= config.vocab_size:
        raise ValueError(f"the prompt is {ids}: give token ids from 0 to {config.vocab_size - 1}")
    constrain = None
    if args.thinking_budget is not None:
        if tokenizer is None:
            raise ValueError("--thinking-budget needs --text: its tags are in tokenizer.json")
        tags = [tokenizer.encode(tag, add_special_tokens=False).ids for tag in args.tags]
        constrain = ForcedTokens(BudgetController(*tags, args.thinking_budget, 1))
    generator = torch.Generator().manual_seed(args.seed)
    options = (args.new_tokens, args.drafts, args.temperature, generator, constrain)
    result = speculative_generate(model, torch.tensor([ids]), *options)
    new = result.tokens_1T[0, len(ids) :].tolist()
    print(*ids, "→", *new)
    if tokenizer is not None:
        print(tokenizer.decode(new, skip_special_tokens=False))
    print(f"{len(new)} tokens in {result.passes} passes")


def flags() -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]  # python -OO strips docstrings
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--text", help="a prompt; needs tokenizer.json")
    parser.add_argument("--prompt", type=int, nargs="+", help="a prompt as token ids")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--drafts", type=int, default=0, help="drafts of a pass")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--thinking-budget", type=int, help="tokens until the end tag is forced")
    tags = {"nargs": 2, "default": ["<think>", "</think>"], "metavar": ("START", "END")}
    parser.add_argument("--tags", help="of a thought", **tags)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.text is not None and args.prompt is not None:
        parser.error("--text and --prompt: give one of them")
    return args


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that are not UTF-8
    try:
        main(flags())
    except (OSError, ValueError) as error:
        sys.exit(f"load.py: {error}")
