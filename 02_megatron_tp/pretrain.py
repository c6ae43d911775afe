# SPDX-License-Identifier: MIT-0
"""A long run of chapter 2's model: checkpoints, published GPT-2 weights, and sampling.

`megatron_tp.py` is the technique. This tool adds what a run of hours or days needs:

    python 02_megatron_tp/pretrain.py --steps 200 --checkpoint run.safetensors
    torchrun --nproc-per-node=8 02_megatron_tp/pretrain.py --tp 4 --gpt2 FOLDER --data my.txt \\
        --lr 1e-4 --steps 2000 --checkpoint run.safetensors --prompt "In the beginning"

Interrupt it and start the same command again: it goes on from the last checkpoint. It guarantees:

· A resumed run on the same mesh equals an uninterrupted one to the bit, dropout included. On
  another mesh (--tp, --ranks) it equals it up to rounding, except that dropout draws other masks.
· The checkpoint file is always complete. A step whose loss or gradient norm is not finite ends the
  run on every rank, and is never saved.
· Nothing that a flag or a file says is dropped in silence. What this run cannot follow is refused,
  with the file, the name and the remedy, before any rank starts where that is possible.

Left out: checkpoints that several ranks write at once, key-value caches, other model families.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import megatron_tp as mtp

# ── 1 Checkpoints ───────────────────────────────────────────────────────────────────────────────
#
# A checkpoint is one safetensors file of full tensors, so it does not depend on tp, and its weights
# have the plain model's names. A run also needs Adam's two moments and the number of steps done.
# That number is its place in the data, in the learning-rate schedule and in the dropout masks: all
# three are functions of the step.
#
# A run is killed at the worst moment. So the file is written under another name, flushed to the
# disk and renamed, which is one step for the file system: under its name stands either the old
# checkpoint or the new one. And disks fail: each tensor and the metadata have a checksum.

MOMENTS = ("exp_avg", "exp_avg_sq")
MAY_CHANGE = ("dtype", "vocab_multiple")  # rounding and padding: the run says what they were


def run_state(model: mtp.ParallelGPT, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """This rank's live tensors: parameters by NAME, moments as exp_avg.NAME and exp_avg_sq.NAME.

    A parameter that has made no step yet gets moments of zero, which the optimizer does not keep.
    Raises: ValueError for AdamW(amsgrad=True), which has a third moment.
    """
    if any(param_group.get("amsgrad") for param_group in optimizer.param_groups):
        raise ValueError("amsgrad=True: its largest moments have no place in a checkpoint")
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p.detach()
        state = optimizer.state.get(p)
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(p)
    return tensors


def save_checkpoint(
    file: Path | str,
    step: int,
    model: mtp.ParallelGPT,
    optimizer: torch.optim.AdamW,
    mesh: mtp.Mesh,
    settings: dict[str, Any],
) -> None:
    """Writes the run's state after `step` steps. Collective: all ranks return when it is written.

    Args: settings (JSON): what a run that goes on must agree with, by name. Rank 0 holds all
        tensors in host memory.
    Raises: OSError where rank 0 cannot write; ValueError where replicated tensors differ between
        ranks, and for what `run_state` refuses. All on every rank; an older file is unchanged.
    """
    state = run_state(model, optimizer)
    tensors = {}
    errors = [None]
    if mesh.dp_rank == 0:  # the other replicas have the same
        for name, x in state.items():
            try:
                tensors |= _gather_to_first({name: x.cpu()}, model.config, mesh.tp_group)
            except ValueError as error:  # the others go on to send the next tensor
                errors = [error]
    if mesh.dp_rank == 0 and mesh.tp_rank == 0 and errors == [None]:
        run = {"step": step, "settings": settings, "mesh": f"tp {mesh.tp} × dp {mesh.dp}"}
        run["checksums"] = {name: _checksum(x) for name, x in tensors.items()}
        try:
            _write(Path(file), tensors, run)
        except OSError as error:
            errors = [error]
    if dist.is_initialized():
        mtp.wait_for_all()  # not a collective with a time limit: the disk may be slow
        dist.broadcast_object_list(errors)  # an error of rank 0 alone would leave the others
    if errors[0] is not None:
        raise errors[0]


def _gather_to_first(
    shard: dict[str, Tensor], config: mtp.GPTConfig, group: mtp.Group
) -> dict[str, Tensor]:
    """Every rank's shard of one tensor to the full one, on the first rank; {} on the others."""
    is_first = mtp.group_rank(group) == 0
    shards = [shard] * mtp.group_size(group) if is_first else None
    if dist.is_initialized():
        dist.gather_object(shard, shards, group=group, group_dst=0)
    return mtp.merge_state_dicts(shards, config) if is_first else {}


def _checksum(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of all tensors, one after another."""
    value = 0
    for x in tensors:
        value = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def _write(file: Path, tensors: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Replaces `file` in one step, or leaves it as it is and raises OSError."""
    text = json.dumps(run)
    unfinished = Path(f"{file}.unfinished")
    try:
        save_file(tensors, unfinished, {"run": f"{zlib.crc32(text.encode())} {text}"})
        with open(unfinished, "rb+") as written:
            os.fsync(written.fileno())  # the data before the name, also in a power cut
        os.replace(unfinished, file)
    except Exception as error:  # safetensors has errors of its own
        after = f"cannot write {file} after step {run['step'] - 1}: {error}"
        raise OSError(f"{after}; an older checkpoint there is unchanged") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_run(file: Path | str) -> dict[str, Any]:
    """A checkpoint's metadata: step, settings, mesh, checksums; and `id`, another for each file.

    Raises: OSError, ValueError for a file that is damaged or not written by `save_checkpoint`.
    """
    try:
        with safe_open(file, "pt") as data:
            checksum, text = data.metadata()["run"].split(" ", 1)
        if str(zlib.crc32(text.encode())) != checksum:
            raise ValueError("its metadata is not what was written")
        return {**json.loads(text), "id": checksum}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        remedy = "restore a copy, or delete it and start anew"
        raise ValueError(f"{file} is damaged, or no checkpoint: {error}: {remedy}") from error


def check_settings(file: Path | str, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError that names each setting in which the checkpoint and this run differ."""
    changed = []
    for name in sorted((saved.keys() | settings.keys()).difference(MAY_CHANGE)):
        if saved.get(name) != settings.get(name):
            changed.append(f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}")
    if changed:
        remedy = "keep the old values, or name a new file"
        raise ValueError(f"{file} is from another run: {', '.join(changed)}: {remedy}")


def load_checkpoint(
    file: Path | str,
    model: mtp.ParallelGPT,
    optimizer: torch.optim.AdamW,
    mesh: mtp.Mesh,
    settings: dict[str, Any],
) -> int:
    """Reads what `save_checkpoint` wrote, at any tp and dp, each rank for itself.

    Returns: the number of steps done.
    Raises: OSError; ValueError for a file that is damaged, of other settings or of other shapes.
        Model and optimizer are then unchanged. ValueError for what `run_state` refuses.
    """
    run = read_run(file)
    check_settings(file, run["settings"], settings)
    expected = {}
    for name, shape in mtp.parameter_shapes(model.config).items():
        expected |= dict.fromkeys([name, *(f"{moment}.{name}" for moment in MOMENTS)], shape)
    with safe_open(file, "pt") as data:
        found = {name: data.get_slice(name).get_shape() for name in data.keys()}
        check_shapes(file, found, expected)
        for name in expected:  # all of them, before anything is changed
            if _checksum(data.get_tensor(name)) != run["checksums"].get(name):
                raise ValueError(f"{file} is damaged: {name} is not what was written")
        tensors = run_state(model, optimizer)
        for name, x in tensors.items():
            full = data.get_tensor(name)
            x.copy_(mtp.shard_tensor(name, full, model.config, mesh.tp_rank, mesh.tp))
    for name, p in model.named_parameters():
        moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        if p.requires_grad or any(x.any() for x in moments.values()):
            optimizer.state[p] = {"step": torch.tensor(0.0), **optimizer.state[p], **moments}
    for state in optimizer.state.values():
        state["step"].fill_(run["step"])
    return run["step"]


def check_shapes(where: Path | str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError that names each tensor which is missing, unknown or of another shape."""
    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        is_shape = tuple(found[name]) if name in found else "missing"
        should_be = tuple(expected[name]) if name in expected else "left out"
        if is_shape != should_be:
            wrong.append(f"{name} is {is_shape} and should be {should_be}")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


def check_same_files(found: Any) -> None:
    """Collective. Raises ValueError, on every rank, where one rank has read something else."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            differ = f"rank 0 has read {everyone[0]}, rank {rank} {other}"
            raise ValueError(f"{differ}: put data and checkpoints on a disk that all nodes share")


# ── 2 Published GPT-2 weights ───────────────────────────────────────────────────────────────────
#
# The published files have the plain model under other names, with two differences. The matrices of
# the layers are stored transposed, (in, out). The rows of the fused query-key-value matrix are
# ordered ({q, k, v}, head, D).

# Other values of these change what the model computes. A key that is missing has this value.
GPT2_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
}
GPT2_SIZES = ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions")  # as in GPTConfig
GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# These do not: how the file came to be, token ids, and heads that a language model does not use.
GPT2_HARMLESS = """
    _attn_implementation_autoset _name_or_path _num_labels architectures bos_token_id dtype
    chunk_size_feed_forward eos_token_id gradient_checkpointing id2label initializer_range label2id
    n_special output_attentions output_hidden_states output_past pad_token_id problem_type
    predict_special_tokens return_dict summary_activation summary_first_dropout summary_type
    summary_proj_to_labels summary_use_proj task_specific_params tokenizer_class torch_dtype
    transformers_version use_cache
"""
GPT2_NAMES = {"embedding": "wte", "positions": "wpe", "layers": "h", "final_norm": "ln_f"}
GPT2_NAMES |= {"norm1": "ln_1", "attention": "attn", "qkv": "c_attn", "out": "c_proj"}
GPT2_NAMES |= {"norm2": "ln_2", "up": "c_fc", "down": "c_proj"}


def load_gpt2(folder: Path | str) -> tuple[mtp.GPTConfig, dict[str, Tensor]]:
    """A GPT-2 folder (config.json, safetensors) to a configuration and the plain state dict.

    Raises: OSError; ValueError that names a file that is damaged, a tensor or a setting that is
        missing, and each one that this model does not use.
    """
    folder = Path(folder)
    config = _gpt2_config(folder / "config.json")
    found = _gpt2_tensors(folder)
    head = found.pop("lm_head.weight", None)  # tied: a copy of the embedding table, or absent
    if head is not None and not torch.equal(head, found.get("wte.weight", head.new_empty(0))):
        raise ValueError(f"{folder}: lm_head.weight is not wte.weight, and must be")
    for layer in range(config.num_layers):  # the causal mask, and what it fills in
        found.pop(f"h.{layer}.attn.bias", None)
        found.pop(f"h.{layer}.attn.masked_bias", None)

    published = {}
    expected = {}
    for name, shape in mtp.parameter_shapes(config).items():
        published[name] = ".".join(GPT2_NAMES.get(part, part) for part in name.split("."))
        is_matrix = name.startswith("layers") and len(shape) == 2
        expected[published[name]] = shape[::-1] if is_matrix else shape
    check_shapes(folder, {name: x.shape for name, x in found.items()}, expected)
    full = {}
    for name, theirs in published.items():
        x = found[theirs]
        if name.startswith("layers") and x.ndim == 2:
            x = x.mT
        if "qkv" in name:
            order = "(three N D) ... -> (N three D) ..."
            x = rearrange(x, order, three=3, N=config.num_heads)
        full[name] = x.contiguous()
    return config, full


def _gpt2_config(file: Path) -> mtp.GPTConfig:
    """config.json as a GPTConfig; ValueError names what is missing, and what is not honoured."""
    theirs = _read_json(file)
    ffn = theirs.get("n_inner")
    dropouts = {key: theirs.get(key, 0.1) for key in GPT2_DROPOUTS}
    bad = [key for key in GPT2_SIZES if type(theirs.get(key)) is not int]
    bad += [key for key, value in dropouts.items() if type(value) not in (int, float)]
    if bad or type(ffn) not in (int, type(None)):
        raise ValueError(f"{file} has no number for {', '.join(bad or ['n_inner'])}: restore it")
    fixed = {**GPT2_FIXED, "n_ctx": theirs["n_positions"]}
    known = {*fixed, *GPT2_SIZES, *GPT2_DROPOUTS, *GPT2_HARMLESS.split(), "n_inner"}
    other = {key: value for key, value in theirs.items() if fixed.get(key, value) != value}
    other |= {key: value for key, value in theirs.items() if key not in known}
    if other:
        raise ValueError(f"{file} has {other}, which this model does not compute")
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"{file} has {dropouts}, and this model has one dropout: make them equal")
    sizes = [theirs[key] for key in GPT2_SIZES]
    return mtp.GPTConfig(*sizes, ffn_hidden_size=ffn, dropout=dropouts["resid_pdrop"])


def _gpt2_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not weight_map:
            raise ValueError(f"{index} has no weight_map: restore it")
        files = sorted(set(weight_map.values()))
    found = {}
    for file in files:
        try:
            tensors = load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged: {error}: copy it again") from error
        for name, x in tensors.items():
            name = name.removeprefix("transformer.")
            if name in found:
                raise ValueError(f"{folder / file}: {name} is there twice")
            found[name] = x
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """Raises: OSError; ValueError where the file is damaged or not an object."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}: copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object: copy it again")
    return content


# ── 3 Tokenizers ────────────────────────────────────────────────────────────────────────────────
#
# A GPT-2 folder has its byte-pair encoding as tokenizer.json, or as vocab.json and merges.txt. Each
# byte is written as one printable letter: a space is Ġ. tiktoken takes a token's id for its merge
# priority. So ids must grow in the order of merges, as they do in every trained encoding.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer(name: str) -> tiktoken.Encoding:
    """One token per byte for "bytes"; any other name is tiktoken's, which may download it.

    Raises: ValueError for an unknown name, and where the download fails.
    """
    if name == "bytes":
        return mtp.byte_encoding()
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"tokenizer {name!r} is unknown: use bytes or one of {names}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # of any network library
        why = f"not on this machine, and cannot be downloaded ({type(error).__name__})"
        raise ValueError(f"tokenizer {name!r} is {why}: use bytes, or copy its files") from error


def folder_tokenizer(folder: Path | str) -> tiktoken.Encoding:
    """The byte-pair encoding of a GPT-2 folder.

    Raises: OSError where the folder has none; ValueError where tiktoken cannot express it.
    """
    folder = Path(folder)
    vocab, merges, added = _tokenizer_files(folder)
    # GPT-2's alphabet: printable bytes stand for themselves, the others for letters from 256 on.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    letters = {chr(byte): byte for byte in printable}
    for byte in sorted(set(range(256)) - set(printable)):
        letters[chr(256 + len(letters) - len(printable))] = byte
    tokens = [*letters, *merges]
    try:
        ranks = {bytes(letters[c] for c in token): vocab[token] for token in tokens}
    except KeyError as error:
        raise ValueError(f"{folder}: no {error} in the vocabulary: copy its files") from error
    order = [vocab[token] for token in merges]
    if order != sorted(set(order)):
        raise ValueError(f"{folder}: its ids are not in the order of merges: give --tokenizer NAME")
    others = {token: number for token, number in vocab.items() if token not in set(tokens)}
    name = f"merges {zlib.crc32(repr(ranks).encode()):08x}"
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=others | added
    )


def _tokenizer_files(folder: Path) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Token to id, merged tokens by priority, and the ids of added tokens."""
    file = folder / "tokenizer.json"
    if not file.exists():
        vocab = _read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return vocab, ["".join(pair) for pair in pairs], {}
    content = _read_json(file)
    model = content.get("model") or {}
    split = content.get("pre_tokenizer") or {}
    known = {"type", "vocab", "merges", "unk_token", "fuse_unk"}
    other = {key: value for key, value in model.items() if value and key not in known}
    is_gpt2 = model.get("type") == "BPE" and split.get("type") == "ByteLevel"
    splits_else = split.get("add_prefix_space") or not split.get("use_regex", True)
    if not is_gpt2 or other or splits_else or content.get("normalizer"):
        raise ValueError(f"{file} is not GPT-2's kind of encoding: give --tokenizer NAME")
    pairs = [pair.split(" ") if type(pair) is str else pair for pair in model.get("merges", [])]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model.get("vocab", {}), ["".join(pair) for pair in pairs], added


# ── 4 Sampling ──────────────────────────────────────────────────────────────────────────────────
#
# Each rank has the logits of its own vocabulary entries. For one position they are few, so they are
# all-gathered, and every rank chooses the same token: by argmax, or with generators in one state.
# The logits are shifted by their maximum before the division, as a temperature near 0 would make
# infinities of them, and a softmax of infinities is NaN.


@torch.no_grad()
def generate(
    model: mtp.ParallelGPT,
    tokens_S: Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`tokens_S` and `new_tokens` more. Collective over the model's group; the same on every rank.

    The model sees the last seq_length tokens, and computes all of them for each new one. Call
    model.eval() before.
    Args: tokens_S: int64, replicated. temperature: 0 takes the most probable token; above, tokens
        are drawn with `generator`, which must be in one state on every rank.
    Raises: ValueError for an empty prompt, and for a temperature that is negative or not finite.
    """
    if tokens_S.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if not 0 <= temperature < math.inf:  # NaN is in no range
        raise ValueError(f"temperature={temperature}: it must be at least 0, and finite")
    for _ in range(new_tokens):
        logits_v = model(tokens_S[None, -model.config.seq_length :])[0, -1]
        # Without the columns that pad the vocabulary: they are no tokens.
        logits_V = mtp.gather_from_tp(logits_v, model.group)[: model.config.vocab_size].double()
        next_1 = logits_V.argmax(dim=-1, keepdim=True)
        if temperature:
            scaled_V = (logits_V - logits_V.max()) / temperature
            next_1 = torch.multinomial(scaled_V.softmax(dim=-1), 1, generator=generator)
        tokens_S = torch.cat([tokens_S, next_1])
    return tokens_S


# ── 5 The run ───────────────────────────────────────────────────────────────────────────────────
#
# A step is read before it is saved: loss and norm are equal on all ranks, so all of them raise in
# the same step when one value is not finite, and the file keeps the last good state.
#
# Ctrl-C sends a signal to every rank, each at another place in its step. A rank that stopped there
# would leave the others waiting in a collective, and a half-written file. So the signal sets a
# flag, and after each step one scalar is all-reduced: all ranks stop after the same step.


def learning_rate(
    step: int, steps: int, peak: float = 1e-3, warmup: int = 10, floor: float = 1e-5
) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to the floor at step `steps`.

    Args: step counts from 0. floor: at most the peak, whatever it is given as.
    Source: section 4.2 of the paper (GPT-2: peak 1.5e-4, 3,000 of 300,000 steps, floor 1e-5).
    """
    floor = min(floor, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train_and_save(
    args: argparse.Namespace,
    model: mtp.ParallelGPT,
    optimizer: torch.optim.AdamW,
    mesh: mtp.Mesh,
    first_step: int,
) -> None:
    """Trains from `first_step` to args.steps; prints, saves, and stops on Ctrl-C after a step.

    Raises: FloatingPointError where loss or norm is not finite; OSError where saving fails;
        KeyboardInterrupt that says where the same command goes on.
    """
    device = model.final_norm.weight.device
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def batches() -> mtp.Batches:
        for step in range(first_step, args.steps):
            tokens_BS, targets_BS = args.text.batch(step, args.batch, args.seed)
            yield tokens_BS.to(device), targets_BS.to(device)

    _, autocast = mtp.dtypes(args)
    options = {"autocast": autocast, "seed": args.seed, "first_step": first_step}
    trained = mtp.train(model, optimizer, batches(), mesh, **options)
    hidden = mtp.group_rank() > 0 or not sys.stderr.isatty()
    saved = first_step
    begin = time.perf_counter()
    mtp.say("step      loss    norm  learning rate  tokens/s  peak GB")
    bar = {"initial": first_step, "total": args.steps, "disable": hidden}
    for step in tqdm(range(first_step, args.steps), **bar):
        rate = learning_rate(step, args.decay_steps, args.lr, args.warmup)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        loss, norm = mtp.read_step(step, *next(trained))
        done = step + 1
        if done - first_step <= 5 or done % args.print_every == 0 or done == args.steps:
            tokens = (done - first_step) * args.batch * model.config.seq_length
            speed = tokens / (time.perf_counter() - begin)
            row = f"{step:4}  {loss:.6f}  {norm:6.3f}  {rate:13.3e}  {speed:8,.0f}"
            with tqdm.external_write_mode():
                mtp.say(f"{row}  {mtp.peak_memory(device):7.2f}")
        if args.checkpoint and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.checkpoint, done, model, optimizer, mesh, args.settings)
            saved = done
        _stop_together(stop, step, saved if args.checkpoint else None, device)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop_together(
    stop: threading.Event, step: int, saved: int | None, device: torch.device
) -> None:
    """All ranks stop after the same step: none is left waiting for another in a collective."""
    asked = torch.tensor(float(stop.is_set()), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    if asked:
        then = "nothing is kept: give --checkpoint FILE"
        if saved is not None:
            then = f"the same command goes on from step {saved}"
        raise KeyboardInterrupt(f"after step {step}; {then}")


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: mtp.ParallelGPT) -> None:
    """Prints the loss on the eval split, and what the model writes after the prompt."""
    device = model.final_norm.weight.device
    encoding = args.text.encoding
    tokens_BS, targets_BS = args.text.batch(0, args.batch, args.seed, evaluation=True)
    prompt_S = tokens_BS[0, :32]
    if args.prompt is not None:
        prompt_S = torch.tensor(encoding.encode_ordinary(args.prompt))
    generator = torch.Generator(device).manual_seed(args.seed)
    _, autocast = mtp.dtypes(args)
    model.eval()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss_BS = model.loss(tokens_BS.to(device), targets_BS.to(device))
        options = (args.new_tokens, args.temperature, generator)
        tokens_S = generate(model, prompt_S.to(device), *options)
    prompt, text = (
        encoding.decode(part.tolist(), errors="replace")
        for part in tokens_S.tensor_split([len(prompt_S)])
    )
    mtp.say(f"\nloss on the eval split: {loss_BS.mean():.4f} nats per token")
    mtp.say(f"after {prompt!r} the model writes\n{text!r}")


def pretrain(args: argparse.Namespace, device: torch.device) -> None:
    """What each rank runs, after `check_args` has read all files."""
    if args.check:
        mtp.main(args, device)  # the proof of megatron_tp.py, on these ranks
        return
    mesh = mtp.make_mesh(args.tp, device, args.timeout)
    mtp.say_setting(args, f": tp {mesh.tp} × dp {mesh.dp}")
    check_same_files({**args.settings, "checkpoint": args.saved and args.saved["id"]})
    model = mtp.ParallelGPT(args.config, mesh.tp_group, args.recompute)
    if args.weights:
        shards = mtp.shard_state_dict(args.weights, args.config, mesh.tp_rank, mesh.tp)
        model.load_state_dict(shards)
        args.weights = None
    model.to(device, mtp.dtypes(args)[0])
    optimizer = mtp.make_optimizer(model, args.lr)
    held = sum(p.numel() for p in model.parameters())
    total = sum(shape.numel() for shape in mtp.parameter_shapes(args.config).values())
    mtp.say(f"{total:,} parameters, {held:,} on this rank; {len(args.text.tokens):,} tokens")
    first_step = 0
    if args.saved:
        first_step = load_checkpoint(args.checkpoint, model, optimizer, mesh, args.settings)
        dtype = args.saved["settings"]["dtype"]
        place = f"step {first_step}, written on {args.saved['mesh']} in {dtype}"
        mtp.say(f"{args.checkpoint} goes on from {place}")
    mtp.wait_for_all()  # files are read at the speed of each rank's disk
    mtp.say()
    train_and_save(args, model, optimizer, mesh, first_step)
    evaluate(args, model)


# ── 6 The command line ──────────────────────────────────────────────────────────────────────────
#
# All files are read before any rank starts, so that a wrong flag or file is one line. The launcher
# and each rank read them for themselves, and the ranks compare what they have read.
#
# `settings` decides whether a checkpoint and a command belong together: the model, the batches and
# the schedule. A change there would be another run, so it is refused. The mesh, the dtype and
# --recompute change rounding only; the run says what they were. --steps may grow where
# --decay-steps, the length of the schedule, stays the same.


@dataclass
class Options:
    """The flags of a long run; sizes that are None are GPTConfig's, or those of --gpt2."""

    tp: int | None = mtp.flag(None, "ranks per replica; None: 2 where that divides", least=1)
    num_layers: int | None = mtp.flag(None, "layers, L", least=1)
    hidden_size: int | None = mtp.flag(None, "hidden size, H", least=1)
    num_heads: int | None = mtp.flag(None, "attention heads, N", least=1)
    seq_length: int | None = mtp.flag(None, "tokens of a sequence, S", least=1)
    dropout: float | None = mtp.flag(None, "dropout probability")
    gpt2: str = mtp.flag("", "begin with the weights of this folder", metavar="FOLDER")
    data: str = mtp.flag("", "a UTF-8 text; by default Python's own sources", metavar="FILE")
    tokenizer: str = mtp.flag("", "bytes, or a name of tiktoken's; by default --gpt2's, or bytes")
    batch: int = mtp.flag(16, "sequences per step, over all replicas", least=1)
    lr: float = mtp.flag(1e-3, "peak learning rate", least=1e-9)
    warmup: int = mtp.flag(10, "steps of linear warm-up")
    decay_steps: int | None = mtp.flag(None, "where the cosine ends; None: --steps", least=1)
    recompute: bool = mtp.flag(False, "keep each layer's input only, recompute the rest")
    checkpoint: str = mtp.flag("", "save there; where it exists, go on from it", metavar="FILE")
    save_every: int = mtp.flag(20, "steps between two checkpoints", least=1)
    print_every: int = mtp.flag(20, "steps between two rows", least=1)
    prompt: str | None = mtp.flag(None, "the model continues it at the end; None: of the text")
    new_tokens: int = mtp.flag(64, "tokens that the model writes at the end")
    temperature: float = mtp.flag(0.7, "0: the most probable token")


SIZES = ("num_layers", "hidden_size", "num_heads", "seq_length", "dropout")


def check_args(args: argparse.Namespace) -> None:
    """Reads all files, and adds what they say: config, weights, text, settings and saved.

    Raises: ValueError, OSError where the flags and the files do not fit each other.
    """
    if args.tp is None:
        args.tp = 1 if args.world_size % 2 else 2
    if args.world_size % args.tp:
        raise ValueError(f"--tp {args.tp} must divide the {args.world_size} ranks")
    encoding = _encoding(args)
    args.config, args.weights = _config(args, encoding)
    mtp.check_tp(args.config, args.tp)
    mtp.parameter_shapes(args.config)  # builds the model without memory: its errors come here
    if args.prompt is not None and not encoding.encode_ordinary(args.prompt):
        raise ValueError("--prompt is empty: give it a text, or leave it out")
    args.text = mtp.TextData(args.data, args.config.seq_length, encoding)
    if args.decay_steps is None:
        args.decay_steps = args.steps
    args.settings = {
        **asdict(args.config),
        "dtype": args.dtype,
        "batch": args.batch,
        "lr": args.lr,
        "warmup": args.warmup,
        "decay_steps": args.decay_steps,
        "tokenizer": encoding.name,
        "text": _checksum(args.text.tokens),
        "gpt2": _checksum(*args.weights.values()) if args.weights else None,
    }
    args.saved = _check_checkpoint(args) if args.checkpoint else None


def _encoding(args: argparse.Namespace) -> tiktoken.Encoding:
    """--tokenizer, or else the one of --gpt2: bytes are no token ids of a published model."""
    if args.tokenizer or not args.gpt2:
        return tokenizer(args.tokenizer or "bytes")
    folder = Path(args.gpt2)
    if any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        return folder_tokenizer(folder)
    raise ValueError(f"{folder} has no tokenizer.json, nor vocab.json: give --tokenizer gpt2")


def _config(
    args: argparse.Namespace, encoding: tiktoken.Encoding
) -> tuple[mtp.GPTConfig, dict[str, Tensor] | None]:
    """The model's configuration, and the published weights that it begins with."""
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if not args.gpt2:
        return mtp.GPTConfig(vocab_size=encoding.n_vocab, seed=args.seed, **sizes), None
    if sizes:
        flags = " ".join("--" + name.replace("_", "-") for name in sizes)
        raise ValueError(f"the sizes are those of {args.gpt2}/config.json: leave out {flags}")
    config, weights = load_gpt2(args.gpt2)
    if encoding.n_vocab != config.vocab_size:
        have = f"{args.gpt2} has {config.vocab_size} tokens, the tokenizer {encoding.name}"
        raise ValueError(f"{have} has {encoding.n_vocab}: give its own with --tokenizer NAME")
    return replace(config, seed=args.seed), weights


def _check_checkpoint(args: argparse.Namespace) -> dict[str, Any] | None:
    """The metadata of --checkpoint, or None where there is no such file yet.

    Raises: ValueError where it is damaged or of another run, and where its folder is not writable.
    """
    file = Path(args.checkpoint)
    if file.is_dir():
        raise ValueError(f"--checkpoint {file} is a folder: name a file in it")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()  # permissions alone do not tell
    except OSError as error:
        raise ValueError(f"--checkpoint {file}: cannot write there: {error.strerror}") from error
    if not file.exists():
        return None
    run = read_run(file)
    check_settings(file, run["settings"], args.settings)
    if run["step"] > args.steps:
        raise ValueError(f"{file} has done {run['step']} steps, --steps is {args.steps}: raise it")
    return run


def flags() -> argparse.Namespace:
    return mtp.parse_flags(__doc__, [Options], check_args, ranks=4, steps=100)


if __name__ == "__main__":
    mtp.launch(pretrain, flags())
