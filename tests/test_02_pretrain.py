# SPDX-License-Identifier: MIT-0
"""Long runs of chapter 2: checkpoints, published GPT-2 weights, tokenizers, sampling, the flags.

A test marked `ranks` is what every rank of that world executes. References are the run that was not
interrupted, transformers, and the plain model.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import types
import zlib
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import lift
import megatron_tp as tp
import pretrain
import pytest
import ranks
import scripts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from examples import EXAMPLES
from proof import assert_equal, plant
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

SCRIPT = Path(pretrain.__file__)
WORLDS = pytest.mark.ranks(1, 2, 4)


def config(**changes) -> tp.GPTConfig:
    sizes = {"vocab_size": 61, "seq_length": 16, "hidden_size": 32, "num_layers": 2}
    return tp.GPTConfig(**(sizes | changes))


def on_device(module: nn.Module) -> nn.Module:
    return module.to(ranks.device, torch.float64)


def batch_of(rows=3, length=13, seed=1):
    """Tokens and targets; most targets of the first row do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS, targets_BS = torch.randint(61, (2, rows, length), generator=generator)
    targets_BS[0, 3:] = -100
    return tokens_BS.to(ranks.device), targets_BS.to(ranks.device)


@lru_cache
def mesh_of(degree: int) -> tp.Mesh:
    return tp.make_mesh(degree, ranks.device)


# ── 1 Checkpoints ───────────────────────────────────────────────────────────────────────────────


def trained(
    file: Path, cfg: tp.GPTConfig, mesh: tp.Mesh, steps: int, save_after: int | None = None
) -> dict[str, torch.Tensor]:
    """Trains up to `steps`, from `file` where it exists: weights, moments and the last loss."""
    settings = dataclasses.asdict(cfg)
    model = on_device(tp.ParallelGPT(cfg, mesh.tp_group))
    optimizer = tp.make_optimizer(model, 1e-3)
    first = 0
    if file.exists():
        first = pretrain.load_checkpoint(file, model, optimizer, mesh, settings)
    batches = (batch_of(rows=4, seed=step) for step in range(first, steps))
    found = {}
    for loss, _ in tp.train(model, optimizer, batches, mesh, first_step=first):
        found["loss"] = loss.cpu()
        first += 1
        if first == save_after:
            pretrain.save_checkpoint(file, first, model, optimizer, mesh, settings)
            assert file.exists()  # on every rank: nobody returns before it is there
    full = tp.gather_state_dict(model.state_dict(), cfg, mesh.tp_group)
    moments = {
        name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in model.named_parameters()
    }
    moments = tp.gather_state_dict(moments, cfg, mesh.tp_group)
    return full | found | {"moment of " + name: x for name, x in moments.items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("dropout, then", [(0.2, 2), (0.0, 1), (0.0, 4)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, dropout, then):
    """To the bit on the same mesh, dropout included; to 1e-10 on others."""
    cfg = config(dropout=dropout)
    expected = trained(tmp_path / "none", cfg, mesh_of(2), steps=6)
    trained(tmp_path / "run", cfg, mesh_of(2), steps=3, save_after=3)
    resumed = trained(tmp_path / "run", cfg, mesh_of(then), steps=6)
    if then == 2:
        assert all(torch.equal(resumed[name], x) for name, x in expected.items())
    else:
        assert_equal(resumed, expected, floor=6e-3)


def small_run(cfg: tp.GPTConfig):
    model = tp.ParallelGPT(cfg)
    optimizer = tp.make_optimizer(model, 1e-3)
    list(tp.train(model, optimizer, [batch_of()], tp.Mesh()))
    return model, optimizer


def save(file: Path, cfg: tp.GPTConfig, step: int = 1, run=None) -> None:
    run = run or small_run(cfg)
    pretrain.save_checkpoint(file, step, *run, tp.Mesh(), dataclasses.asdict(cfg))


def load(file: Path, cfg: tp.GPTConfig, run=None) -> int:
    run = run or small_run(cfg)
    return pretrain.load_checkpoint(file, *run, tp.Mesh(), dataclasses.asdict(cfg))


def test_a_checkpoint_of_a_model_with_frozen_parameters(tmp_path):
    model = tp.ParallelGPT(config())
    model.embedding.weight.requires_grad_(False)
    optimizer = tp.make_optimizer(model, 1e-3)
    list(tp.train(model, optimizer, [batch_of()], tp.Mesh()))
    save(tmp_path / "run", config(), run=(model, optimizer))
    assert load(tmp_path / "run", config()) == 1
    assert load(tmp_path / "run", config(), run=(model, optimizer)) == 1
    assert model.embedding.weight not in optimizer.state  # neither of them has added moments
    moments = [x for name, x in load_file(tmp_path / "run").items() if "exp_avg" in name]
    frozen = [x for x in moments if x.shape == (61, 32)]
    assert len(frozen) == 2 and not any(x.any() for x in frozen)


def test_moments_that_a_checkpoint_cannot_hold(tmp_path):
    model = tp.ParallelGPT(config())
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        save(tmp_path / "run", config(), run=(model, optimizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("tp_degree", [1, 2])
def test_a_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(tmp_path, tp_degree):
    """A folder that does not exist; replicated weights that differ."""
    mesh = mesh_of(tp_degree)
    model = on_device(tp.ParallelGPT(config(), mesh.tp_group))
    run = (model, tp.make_optimizer(model, 1e-3), mesh, {})
    with pytest.raises(OSError, match="cannot write .*nowhere.* after step 0: .*unchanged"):
        pretrain.save_checkpoint(tmp_path / "nowhere" / "run", 1, *run)
    if tp_degree == 2:
        nn.init.constant_(model.layers[0].norm1.bias, dist.get_rank())
        with pytest.raises(ValueError, match="layers.0.norm1.bias should be replicated"):
            pretrain.save_checkpoint(tmp_path / "run", 1, *run)
        assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    cfg, file = config(), tmp_path / "run.safetensors"
    save(file, cfg)
    assert load(file, cfg) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    good = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"is from another run: num_layers was 2 and is 1: keep the old"
    ):
        load(file, config(num_layers=1))
    flipped = bytearray(good)
    flipped[-5] ^= 1
    assert good.count(rb"{\"step\": 1,") == 1
    other_step = good.replace(rb"{\"step\": 1,", rb"{\"step\": 3,")
    half = good[: len(good) // 2]
    cases = {
        half: "damaged, or no checkpoint: .*: restore a copy",
        bytes(flipped): "damaged: .* is not what was written",
        b"": "damaged, or no checkpoint",
        other_step: "damaged, or no checkpoint: its metadata is not what was written",
    }
    for bad, message in cases.items():
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=f"run.safetensors is {message}"):
            load(file, cfg)
    save_file({"x": torch.ones(2)}, file)  # a safetensors file, but no checkpoint
    with pytest.raises(ValueError, match="no checkpoint"):
        load(file, cfg)
    save_file({"x": torch.ones(2)}, file, {"run": f"{zlib.crc32(b'{')} {{"})
    with pytest.raises(ValueError, match="no checkpoint"):
        load(file, cfg)


def test_tensors_of_other_shapes_are_refused_by_name(tmp_path):
    """The settings agree, but the tensors do not."""
    cfg, file = config(), tmp_path / "run"
    save(file, cfg)
    with safe_open(file, "pt") as data:
        metadata = data.metadata()
    tensors = load_file(file)
    del tensors["exp_avg.final_norm.bias"]
    tensors |= {"final_norm.weight": torch.ones(4), "extra": torch.ones(1)}
    save_file(tensors, file, metadata)
    messages = [
        r"exp_avg.final_norm.bias is missing and should be \(32,\)",
        r"extra is \(1,\) and should be left out",
        r"final_norm.weight is \(4,\) and should be \(32,\)",
    ]
    with pytest.raises(ValueError, match="; ".join(messages)):
        load(file, cfg)


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    cfg, file = config(), tmp_path / "run"
    save(file, cfg)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    model = tp.ParallelGPT(cfg)
    optimizer = tp.make_optimizer(model, 1e-3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="is not what was written"):
        load(file, cfg, run=(model, optimizer))
    assert not optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The disk's limit is the process's own, RLIMIT_FSIZE."""
    resource = pytest.importorskip("resource")
    cfg, file = config(), tmp_path / "run.safetensors"
    run = small_run(cfg)
    save(file, cfg, run=run)
    good = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*run.safetensors after step 1: .*unchanged"
        ):
            save(file, cfg, step=2, run=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_half_written_file_is_not_taken_for_a_checkpoint(tmp_path):
    """Stopped while it writes: under the name stands the old one, and nothing else is left."""
    cfg, file = config(), tmp_path / "run.safetensors"
    run = small_run(cfg)
    save(file, cfg, run=run)

    def killed(*args):
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):
        with plant(os, function, killed), pytest.raises(KeyboardInterrupt):
            save(file, cfg, step=2, run=run)
        assert load(file, cfg) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_the_data_is_on_the_disk_before_the_name(tmp_path):
    events = []

    def noted(function):
        return lambda *args: (events.append(function.__name__), function(*args))

    with plant(os, "fsync", noted(os.fsync)), plant(os, "replace", noted(os.replace)):
        save(tmp_path / "run", config())
    assert events == ["fsync", "replace"]


@pytest.mark.ranks(2)
def test_ranks_that_have_read_other_files_are_refused_on_every_rank():
    pretrain.check_same_files({"text": 1, "checkpoint": None})
    with pytest.raises(
        ValueError, match="rank 0 has read {'checkpoint': 7}, rank 1 {'checkpoint': 8}"
    ):
        pretrain.check_same_files({"checkpoint": 7 + dist.get_rank()})


# ── 2 Published GPT-2 weights ───────────────────────────────────────────────────────────────────


def published(folder: Path, shard_size: str = "5GB", **changes):
    """A GPT-2 folder as transformers writes it, with random weights so large that tokens differ."""
    import transformers

    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    settings = {**sizes, "bos_token_id": None, "eos_token_id": None, **changes}
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        nn.init.normal_(p, mean=float(p.ndim == 1 and p.mean() == 1), std=0.3)
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    return theirs


@pytest.fixture(params=["5GB", "20KB"])
def transformers_says(request, tmp_path):
    """A published folder, and a file of what transformers' GPT-2 computes, which no rank imports.

    Logits in fp32 and float64, the gradient of the embedding, and greedy text.
    """
    theirs = published(tmp_path, request.param)
    tokens = batch_of()[0].cpu()
    found = {}
    for dtype in (torch.float32, torch.float64):
        found[dtype] = theirs.to(dtype)(tokens).logits
    F.cross_entropy(found[dtype].flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found["text"] = theirs.generate(tokens[:1, :8], **options)[0]
    found["gradient"] = theirs.transformer.wte.weight.grad
    torch.save(tree_map(torch.Tensor.detach, found), tmp_path / "transformers.pt")
    return request.param, tmp_path


@pytest.mark.ranks(1, 2, 4, timeout=120)
def test_published_gpt2(transformers_says):
    """transformers' GPT-2 at every tp: logits in fp32 and float64, a gradient, greedy text."""
    shard_size, folder = transformers_says
    theirs = torch.load(folder / "transformers.pt")
    assert (folder / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    cfg, full = pretrain.load_gpt2(folder)
    parallel = tp.ParallelGPT(cfg).to(ranks.device).eval()
    shards = tp.shard_state_dict(full, cfg, dist.get_rank(), dist.get_world_size())
    parallel.load_state_dict(shards)
    tokens = batch_of()[0]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):  # fp32: another order
        logits = tp.gather_from_tp(parallel.to(dtype)(tokens))[..., :61]
        assert_equal({"logits": logits}, {"logits": theirs[dtype]}, bound=bound)
    tp.vocab_parallel_cross_entropy(parallel(tokens), tokens, vocab_size=61).sum().backward()
    gradient = {"embedding.weight": parallel.embedding.weight.grad}
    expected = {"embedding.weight": theirs["gradient"]}
    assert_equal(tp.gather_state_dict(gradient, cfg), expected)
    assert torch.equal(pretrain.generate(parallel, tokens[0, :8], 8).cpu(), theirs["text"])


@pytest.fixture
def gpt2(tmp_path):
    """A published folder, and functions that write it with changed tensors or settings."""
    published(tmp_path)
    weights = tmp_path / "model.safetensors"
    settings = tmp_path / "config.json"
    tensors = load_file(weights)
    keys = json.loads(settings.read_text())

    def with_tensors(**changes):
        changed = {name.replace("__", "."): x for name, x in changes.items()}
        full = {name: x for name, x in {**tensors, **changed}.items() if x is not None}
        save_file(full, weights)
        return tmp_path

    def with_settings(**changes):
        settings.write_text(json.dumps({**keys, **changes}))
        return tmp_path

    return with_tensors, with_settings, tmp_path


def refused_folder(folder: Path, message: str, error=ValueError) -> None:
    with pytest.raises(error, match=message):
        pretrain.load_gpt2(folder)


C_FC = "transformer__h__1__mlp__c_fc__weight"


def test_tensors_that_do_not_fit_are_refused_by_name(gpt2):
    with_tensors, _, _ = gpt2
    name = "h.1.mlp.c_fc.weight is"
    refused_folder(with_tensors(**{C_FC: None}), rf"{name} missing and should be \(32, 128\)")
    turned = torch.zeros(128, 32)
    refused_folder(with_tensors(**{C_FC: turned}), rf"{name} \(128, 32\) and should be \(32, 128\)")
    norm = torch.ones(32)
    refused_folder(with_tensors(h__2__ln_1__weight=norm), r"h.2.ln_1.weight is .* left out")
    refused_folder(with_tensors(score__weight=norm), r"score.weight is .* left out")
    refused_folder(
        with_tensors(h__0__crossattention__c_attn__bias=norm), "crossattention.* left out"
    )
    refused_folder(with_tensors(ln_f__bias=norm), "ln_f.bias is there twice")
    refused_folder(with_tensors(h__7__attn__bias=norm), "h.7.attn.bias is .* left out")


def test_known_buffers_and_the_tied_head_are_allowed(gpt2):
    with_tensors, _, folder = gpt2
    wte = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    mask = torch.ones(1, 1, 16, 16).tril()
    buffers = {"h__0__attn__bias": mask, "h__1__attn__masked_bias": torch.tensor(-1e4)}
    full = pretrain.load_gpt2(with_tensors(lm_head__weight=wte.clone(), **buffers))[1]
    assert torch.equal(full["embedding.weight"], wte)
    other = wte.clone()
    other[3, 5] += 1e-3
    refused_folder(with_tensors(lm_head__weight=other), "lm_head.weight is not wte.weight")
    refused_folder(
        with_tensors(lm_head__weight=wte[:9].clone()), "lm_head.weight is not wte.weight"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation_function": "relu"}, "{'activation_function': 'relu'}, which this model"),
        ({"add_cross_attention": True}, "{'add_cross_attention': True}, which this model"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_ctx": 8}, "{'n_ctx': 8}"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_theta": 1e4}, "{'rope_theta': 10000.0}, which this model does not compute"),
        (
            {"resid_pdrop": 0.2},
            "'resid_pdrop': 0.2, 'embd_pdrop': 0.1.*one dropout: make them equal",
        ),
        ({"embd_pdrop": 0.0}, "one dropout"),
        ({"attn_pdrop": "0.1"}, "has no number for attn_pdrop"),
        ({"n_layer": 1}, "h.1.attn.c_attn.bias is .* left out"),
        (
            {"n_layer": "2", "n_head": None},
            "config.json has no number for n_layer, n_head: restore",
        ),
        ({"n_head": 0}, "num_heads=0: it must be at least 1"),
        ({"n_inner": 64}, r"mlp.c_fc.bias is \(128,\) and should be \(64,\)"),
        ({"n_inner": 1.5}, "has no number for n_inner"),
        ({"resid_pdrop": 1, "embd_pdrop": 1, "attn_pdrop": 1}, "dropout=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(gpt2, changes, message):
    _, with_settings, folder = gpt2
    pretrain.load_gpt2(folder)
    refused_folder(with_settings(**changes), message)


def test_harmless_settings_are_allowed(gpt2):
    """Those of the published gpt2, gpt2-medium, gpt2-xl and distilgpt2."""
    _, with_settings, _ = gpt2
    old = {"n_ctx": 16, "n_special": 0, "output_past": True, "predict_special_tokens": True}
    old |= {"_num_labels": 1, "task_specific_params": {}, "summary_type": "cls_index"}
    assert pretrain.load_gpt2(with_settings(**old))[0] == config(dropout=0.1)


def test_folders_that_are_damaged_are_refused_with_the_file(gpt2):
    _, _, folder = gpt2
    weights, settings = folder / "model.safetensors", folder / "config.json"
    index = folder / "model.safetensors.index.json"
    good = weights.read_bytes()
    for bad in (b"", b"half a file", good[: len(good) // 2], good[:-1]):
        weights.write_bytes(bad)
        refused_folder(folder, "model.safetensors is damaged: .*: copy it again")
    index.write_text(json.dumps({"weight_map": {"wte.weight": "model-7.safetensors"}}))
    refused_folder(folder, "model-7.safetensors", FileNotFoundError)
    index.write_text("{}")
    refused_folder(folder, "index.json has no weight_map: restore it")
    index.unlink()
    weights.unlink()
    refused_folder(folder, "model.safetensors", FileNotFoundError)
    weights.write_bytes(good)
    for bad in ('{"n_layer": 2', "", "[]"):
        settings.write_text(bad)
        refused_folder(folder, "config.json is .*copy it again")
    settings.unlink()
    refused_folder(folder, "config.json", FileNotFoundError)


# ── 3 Tokenizers ────────────────────────────────────────────────────────────────────────────────

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n  It's 1984! "
ODD = TEXT + "größe\tΩ…🙂 <|endoftext|> x  \n\n y'll don't  a1b22 \u2028end   "


@pytest.fixture(scope="module")
def trained_encoding():
    """A byte-pair encoding of 300 tokens, trained by the tokenizers library."""
    from tokenizers import ByteLevelBPETokenizer

    encoding = ByteLevelBPETokenizer()
    special = ["<|endoftext|>"]
    encoding.train_from_iterator([TEXT * 3], 300, show_progress=False, special_tokens=special)
    return encoding


@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "tokenizer.json"])
def test_a_folders_tokenizer_equals_transformers(trained_encoding, tmp_path, files):
    import transformers

    if files == "tokenizer.json":
        trained_encoding.save(str(tmp_path / files))
    else:
        trained_encoding.save_model(str(tmp_path))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = pretrain.folder_tokenizer(tmp_path)
    assert ours.n_vocab == 300 and ours.name.startswith("merges ")
    for text in (TEXT, ODD.replace("<|endoftext|>", "")):
        ids = ours.encode_ordinary(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert len(ids) < len(text.encode()) and ours.decode(ids) == text
    assert ours.encode("<|endoftext|>", allowed_special="all") == [0]


def test_tokenizer_files_that_do_not_fit_are_refused(trained_encoding, tmp_path):
    trained_encoding.save(str(tmp_path / "good"))
    good = json.loads((tmp_path / "good").read_text())
    file = tmp_path / "tokenizer.json"

    def refused_with(message, **changes):
        file.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=message):
            pretrain.folder_tokenizer(tmp_path)

    model = good["model"]
    refused_with("is not GPT-2's kind", model={**model, "type": "Unigram"})
    refused_with("is not GPT-2's kind", model={**model, "dropout": 0.1})
    refused_with("is not GPT-2's kind", normalizer={"type": "NFC"})
    split = good["pre_tokenizer"]
    refused_with("is not GPT-2's kind", pre_tokenizer={**split, "add_prefix_space": True})
    refused_with("is not GPT-2's kind", pre_tokenizer={"type": "Whitespace"})
    refused_with(
        "ids are not in the order of merges", model={**model, "merges": model["merges"][::-1]}
    )
    refused_with(
        "no 'Ġ?t?h?.*' in the vocab", model={**model, "vocab": {"a": 0}, "merges": [["t", "h"]]}
    )
    file.write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        pretrain.folder_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_downloaded(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no network")

    with pytest.raises(ValueError, match="tokenizer 'gpt5000' is unknown: use bytes or one of"):
        pretrain.tokenizer("gpt5000")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="'gpt2' is not on this machine, and cannot be downloaded"):
        pretrain.tokenizer("gpt2")


# ── 4 Sampling, and the schedule ────────────────────────────────────────────────────────────────


@WORLDS
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-310])
def test_text_is_the_same_at_every_tp(temperature):
    """The plain model's own choice, longer than its positions, greedy and drawn."""
    cfg = config(init_std=0.5)  # large weights, so that the most probable token is no tie
    plain, parallel = on_device(tp.GPT(cfg)), on_device(tp.ParallelGPT(cfg))
    tokens = expected = batch_of()[0][0]
    generator = torch.Generator(ranks.device).manual_seed(5)
    for _ in range(8):
        logits = plain(expected[None, -cfg.seq_length :])[0, -1]
        token = logits.argmax()[None]
        if temperature == 0.7:
            token = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        expected = torch.cat([expected, token])
    generator.manual_seed(5)
    assert torch.equal(pretrain.generate(parallel, tokens, 8, temperature, generator), expected)


def test_prompts_and_temperatures_that_mean_nothing_are_refused():
    model = tp.ParallelGPT(config()).eval()
    with pytest.raises(ValueError, match="the prompt is empty: give at least one token"):
        pretrain.generate(model, torch.empty(0, dtype=torch.int64), 3)
    for temperature in (-1.0, -1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature={temperature}: it must be at least 0"):
            pretrain.generate(model, torch.tensor([1]), 3, temperature)


def test_learning_rate():
    """The GPT-2 recipe: 3,000 steps up to 1.5e-4, a cosine over 297,000 down to 1e-5."""

    def rate(step):
        return pretrain.learning_rate(step, 300_000, 1.5e-4, 3_000, 1e-5)

    assert rate(0) == 1.5e-4 / 3_000 and rate(2_999) == 1.5e-4 == rate(3_000)
    assert math.isclose(rate(3_000 + 148_500), (1.5e-4 + 1e-5) / 2)
    assert rate(300_000) == rate(400_000) == 1e-5


def test_the_learning_rate_never_exceeds_its_peak():
    rates = [pretrain.learning_rate(step, 30, peak=1e-6) for step in range(40)]
    assert max(rates) == 1e-6 == rates[-1] and rates[0] == 1e-7
    assert pretrain.learning_rate(0, 10, warmup=0) == 1e-3


@pytest.mark.ranks(1)
@pytest.mark.parametrize("first_step", [0, 3])
def test_a_step_has_its_own_batch_and_learning_rate(first_step):
    """Those of its number in the full run, also where a checkpoint goes on."""
    model = on_device(tp.ParallelGPT(config()))
    optimizer = tp.make_optimizer(model, 1e-3)
    asked, drawn, used = [], [], []

    def rate(*args):
        asked.append(args)
        return 1e-3 / (1 + args[0])

    def batch(step, rows, seed):
        drawn.append((step, rows, seed))
        return batch_of(rows, seed=step)

    def note(*_):
        used.append([param_group["lr"] for param_group in optimizer.param_groups])

    args = types.SimpleNamespace(steps=5, lr=1e-3, warmup=2, decay_steps=50, batch=3, seed=7)
    vars(args).update(dtype="fp64", print_every=1, checkpoint=None)
    args.text = types.SimpleNamespace(batch=batch)
    optimizer.register_step_pre_hook(note)
    with plant(pretrain, "learning_rate", rate):
        pretrain.train_and_save(args, model, optimizer, tp.Mesh(), first_step)
    steps = range(first_step, 5)
    assert asked == [(step, 50, 1e-3, 2) for step in steps]
    assert drawn == [(step, 3, 7) for step in steps]
    assert used == [[1e-3 / (1 + step)] * 2 for step in steps]


# ── 5 The command line, in this process ─────────────────────────────────────────────────────────


def parsed(flags, monkeypatch):
    """What the script does first, as on a machine without GPUs."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, flags)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return pretrain.flags()


def refused(flags, message, monkeypatch, capsys) -> None:
    """One line after the usage, before any rank starts."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        parsed(flags, monkeypatch)
    usage, error = capsys.readouterr().err.splitlines()
    assert message in error and usage.startswith("usage:"), error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tp", "3"], "--tp 3 must divide the 4 ranks"),
        (["--tp", "4", "--num-heads", "2"], "do not divide over tp=4 ranks: tp must divide both"),
        (["--hidden-size", "30"], "must be a multiple of the second"),
        (["--dropout", "1"], "dropout=1.0: it must be at least 0 and less than 1"),
        (["--tokenizer", "gpt5000"], "tokenizer 'gpt5000' is unknown"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all: No such file"),
        (
            ["--checkpoint", "/nowhere/run"],
            "--checkpoint /nowhere/run: cannot write there: No such",
        ),
        (["--checkpoint", "/proc/run"], "--checkpoint /proc/run: cannot write there"),
        (["--checkpoint", "."], "--checkpoint . is a folder"),
        (["--batch", "0"], "--batch"),
        (["--save-every", "0"], "--save-every"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--ranks", "1", "--tp", "4"], "--tp 4 must divide the 1 ranks"),
        (["--gpt2", "/nowhere", "--tokenizer", "bytes"], "/nowhere/config.json"),
        (["--gpt2", "/nowhere"], "/nowhere has no tokenizer.json, nor vocab.json"),
        (
            ["--gpt2", "x", "--tokenizer", "bytes", "--num-layers", "4"],
            "the sizes are those of x/config.json: leave out --num-layers",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, monkeypatch, capsys):
    refused(flags, message, monkeypatch, capsys)


def test_published_weights_want_their_own_tokenizer(
    trained_encoding, tmp_path, monkeypatch, capsys
):
    """The folder's files are used; a tokenizer of another size, or none, is refused."""
    published(tmp_path, vocab_size=300)
    folder = ["--gpt2", tmp_path]
    message = "has no tokenizer.json, nor vocab.json: give --tokenizer gpt2"
    refused(folder, message, monkeypatch, capsys)
    message = "has 300 tokens, the tokenizer bytes has 256: give its own"
    refused([*folder, "--tokenizer", "bytes"], message, monkeypatch, capsys)
    trained_encoding.save_model(str(tmp_path))
    args = parsed(folder, monkeypatch)
    assert args.text.encoding.n_vocab == args.config.vocab_size == 300
    assert torch.equal(
        args.weights["final_norm.bias"], pretrain.load_gpt2(tmp_path)[1]["final_norm.bias"]
    )


def begun(file: Path, args, step: int = 4) -> None:
    """A checkpoint as a run with these flags writes it."""
    optimizer = tp.make_optimizer(model := tp.ParallelGPT(args.config), args.lr)
    pretrain.save_checkpoint(file, step, model, optimizer, tp.Mesh(), args.settings)


TINY = ["--num-layers", "1", "--hidden-size", "32", "--seq-length", "32", "--batch", "4"]


def test_a_changed_run_is_refused_and_says_what_changed(tmp_path, monkeypatch, capsys):
    file, text = tmp_path / "run", tmp_path / "text"
    text.write_text("a b c " * 200)
    flags = [*TINY, "--checkpoint", file, "--data", text, "--steps", "6"]
    begun(file, parsed(flags, monkeypatch))
    # These do not change what is computed, or go on where the run stands.
    for same in (["--ranks", "1"], ["--tp", "1"], ["--recompute"], ["--save-every", "1"]):
        assert parsed([*flags, *same], monkeypatch).saved["step"] == 4
    assert parsed([*flags[:-1], "9", "--decay-steps", "6"], monkeypatch).saved["step"] == 4
    changes = {
        "batch was 4 and is 8": ["--batch", "8"],
        "lr was 0.001 and is 0.002": ["--lr", "2e-3"],
        "warmup was 10 and is 3": ["--warmup", "3"],
        "seed was 0 and is 1": ["--seed", "1"],
        "num_layers was 1 and is 2": ["--num-layers", "2"],
        "dropout was 0.0 and is 0.1": ["--dropout", "0.1"],
        "decay_steps was 6 and is 9": ["--steps", "9"],
        "has done 4 steps, --steps is 3": ["--steps", "3", "--decay-steps", "6"],
    }
    for message, change in changes.items():
        refused([*flags, *change], message, monkeypatch, capsys)
    text.write_text("a b c " * 199 + "a b d ")
    refused(flags, f"{file} is from another run: text was", monkeypatch, capsys)
    file.write_bytes(file.read_bytes()[:100])
    refused(flags, f"{file} is damaged, or no checkpoint", monkeypatch, capsys)


def test_a_run_from_other_published_weights_is_refused(
    trained_encoding, tmp_path, monkeypatch, capsys
):
    published(tmp_path, vocab_size=300, n_positions=32)
    trained_encoding.save_model(str(tmp_path))
    (tmp_path / "text").write_text(TEXT * 30)
    flags = ["--gpt2", tmp_path, "--data", tmp_path / "text", "--checkpoint", tmp_path / "run"]
    begun(tmp_path / "run", parsed(flags, monkeypatch))
    assert parsed(flags, monkeypatch).saved["step"] == 4
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.ln_1.bias"][7] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(flags, "is from another run: gpt2 was", monkeypatch, capsys)


# ── 6 Real starts ───────────────────────────────────────────────────────────────────────────────


TEXT_NAME = "größe x.txt"


def small_text(folder: Path) -> list:
    """A text that is read in no time."""
    (folder / TEXT_NAME).write_text(TEXT * 30, "utf-8")
    return ["--data", folder / TEXT_NAME]


def losses(text: str) -> list[str]:
    """The printed losses, digit for digit."""
    return [line.split()[1] for line in text.splitlines() if line[:4].strip().isdigit()]


def written(text: str) -> list[str]:
    """The loss on the eval split, the prompt, and what the model writes."""
    return text[text.index("loss on the eval split") :].splitlines()


def on_these_ranks(*flags) -> tuple[int, str]:
    """`pretrain` with these flags on the ranks of a test: exit code, and what rank 0 printed."""
    return scripts.on_ranks(pretrain, *flags, main=pretrain.pretrain)


def on_ranks_of_its_own(*runs: list) -> list[str]:
    """What rank 0 prints of each run on two ranks, for a test that is none of their bodies."""
    pool = ranks.Pool(2)
    try:
        results = [pool.run(__name__, "on_these_ranks_of", dict(flags=flags)) for flags in runs]
    finally:
        pool.close()
    assert all(code == 0 for result in results for code, _ in result)
    return [printed for ((_, printed), _) in results]


def on_these_ranks_of(flags: list) -> tuple[int, str]:
    return on_these_ranks(*flags)


def text_of_all(folder: Path) -> list:
    """`small_text`, written by rank 0 for all of them."""
    if dist.get_rank() == 0:
        small_text(folder)
    dist.barrier()
    return ["--data", folder / TEXT_NAME]


@pytest.mark.slow
def test_a_run_from_start_to_end(tmp_path):
    flags = [*TINY, *small_text(tmp_path), "--steps", "3", "--ranks", "2"]
    done = scripts.forked(SCRIPT, *flags, "--checkpoint", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(losses(done.stdout)) == 3 and (tmp_path / "run").is_file()


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(tmp_path, monkeypatch):
    """One line and exit code 130; then the file is that of an uninterrupted run, to the bit.

    Where Python does not import from the script's folder.
    """
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    flags = [*TINY, *small_text(tmp_path), "--steps", "60", "--save-every", "3"]
    flags += ["--dropout", "0.1"]
    file = tmp_path / "run"
    command = [str(SCRIPT), *map(str, flags), "--ranks", "2", "--checkpoint", str(file)]
    with scripts.started(*command, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("   4"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = errors.split("\n")[1:-1]
    after, then = (int(part.split()[-1]) for part in line.removeprefix("interrupted ").split("; "))
    assert line == f"interrupted after step {after}; the same command goes on from step {then}"
    assert 4 <= after and after - 2 <= then <= after + 1 and then % 3 == 0
    assert pretrain.read_run(file)["step"] == then
    whole = tmp_path / "whole"
    runs = [[*flags, "--checkpoint", each] for each in (file, whole)]
    resumed, expected = on_ranks_of_its_own(*runs)
    assert f"{file} goes on from step {then}, written on tp 2 × dp 1 in fp32" in resumed
    assert written(resumed) == written(expected)
    assert file.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([TEXT_NAME, "run", "whole"])


@pytest.mark.slow
def test_ctrl_c_without_a_checkpoint():
    command = [str(SCRIPT), *TINY, "--steps", "100000", "--ranks", "1"]
    with scripts.started(*command) as process:
        for line in process.stdout:
            if line.startswith("   4"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    (line,) = errors.split("\n")[1:-1]
    assert process.returncode == 130
    assert line.startswith("interrupted after step ")
    assert line.endswith("; nothing is kept: give --checkpoint FILE")


MESHES = [*TINY, "--dtype", "fp64", "--decay-steps", "9", "--prompt", "To be"]


@pytest.mark.ranks(4)
def test_every_mesh_gives_the_same_losses(tmp_path):
    """float64 at tp 1, 2 and 4, recomputed or not; resumed."""
    flags = [*MESHES, *text_of_all(tmp_path)]
    run = ["--checkpoint", tmp_path / "run"]
    _, first = on_these_ranks(*flags, *run, "--tp", "4", "--steps", "3")
    _, second = on_these_ranks(*flags, *run, "--tp", "2", "--steps", "6")
    _, third = on_these_ranks(*flags, "--tp", "1", "--steps", "6", "--recompute")
    assert "run goes on from step 3, written on tp 4 × dp 1 in fp64" in second
    expected = losses(third)
    assert len(expected) == 6 and losses(first) + losses(second) == expected
    assert written(second) == written(third)
    assert "after 'To be' the model writes" in third


@pytest.mark.ranks(2, detail=True)
def test_a_run_under_torchs_checks_of_every_collective(tmp_path):
    flags = [*MESHES, *text_of_all(tmp_path), "--steps", "3", "--checkpoint", tmp_path / "run"]
    code, printed = on_these_ranks(*flags)
    assert code == 0 and len(losses(printed)) == 3
    assert "after 'To be' the model writes" in printed


@pytest.mark.ranks(2)
def test_a_finished_run_only_writes(tmp_path):
    flags = [*TINY, *text_of_all(tmp_path), "--steps", "3", "--checkpoint", tmp_path / "run"]
    (first_code, first), (code, again) = on_these_ranks(*flags), on_these_ranks(*flags)
    assert first_code == code == 0
    assert len(losses(first)) == 3 and not losses(again)
    assert written(first) == written(again)


@pytest.fixture
def published_folder(trained_encoding, tmp_path):
    published(tmp_path, vocab_size=300, n_positions=32)
    trained_encoding.save_model(str(tmp_path))
    return tmp_path


@pytest.mark.ranks(2)
def test_published_weights_train_and_write(published_folder):
    flags = ["--gpt2", published_folder, "--steps", "2", "--lr", "1e-4"]
    code, printed = on_these_ranks(*flags, "--prompt", "It was", "--temperature", "0")
    assert code == 0 and len(losses(printed)) == 2
    assert "after 'It was' the model writes" in printed


@pytest.mark.ranks(2)
def test_a_disk_that_is_slower_than_the_timeout(tmp_path):
    """fsync takes 7 s, a collective of all ranks or of the mesh 5 s at most.

    The other rank's wait is no message that was lost.
    """
    flags = [*TINY, *text_of_all(tmp_path), "--steps", "3", "--timeout", "5"]
    (tmp_path / "out").mkdir(exist_ok=True)
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(7)
        fsync(file)

    limit_of_all_ranks(5)
    with plant(os, "fsync", slow):
        code, _ = on_these_ranks(*flags, "--checkpoint", tmp_path / "out/run")
    limit_of_all_ranks(60)
    assert code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]


def limit_of_all_ranks(seconds: float) -> None:
    """--timeout of the group of all ranks, which the script sets where it makes it."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


@pytest.mark.ranks(2)
def test_a_step_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    """NaN on rank 1 of 2 in step 7: both ranks end there; the checkpoint after step 5 stays."""
    flags, file = [*TINY, *text_of_all(tmp_path), "--steps", "20"], tmp_path / "run"
    right = pretrain.mtp.seed_dropout

    def poisoned(model, seed, step, *place):
        if step == 7 and dist.get_rank() == 1:
            model.final_norm.weight.data[0] = math.nan
        right(model, seed, step, *place)

    with plant(pretrain.mtp, "seed_dropout", poisoned):
        with pytest.raises(FloatingPointError, match="step 7: loss nan"):
            on_these_ranks(*flags, "--save-every", "2", "--checkpoint", file)
    assert pretrain.read_run(file)["step"] == 6
    assert all(x.isfinite().all() for x in load_file(file).values())


@pytest.mark.ranks(2)
def test_ranks_on_unshared_disks_are_refused(tmp_path):
    """Two ranks whose --checkpoint is another file: rank 1's run stands elsewhere."""
    flags = [*TINY, *text_of_all(tmp_path), "--steps", "3"]
    on_these_ranks(*flags, "--checkpoint", tmp_path / "run")
    own = tmp_path / str(dist.get_rank())
    own.mkdir()
    if dist.get_rank() == 0:
        shutil.copy(tmp_path / "run", own)
    with pytest.raises(ValueError, match="put data and checkpoints on a disk that all nodes share"):
        on_these_ranks(*flags, "--checkpoint", own / "run")


# ── 7 Lifted functions ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", EXAMPLES["pretrain"])
def test_lifted_functions_work_in_a_file_of_their_own(tmp_path, name):
    """`make lift FROM=02/pretrain`: what the copy computes is what the tool computes."""
    copied = sys.modules["copied"] = types.ModuleType("copied")
    exec(compile(lift.lift(SCRIPT, name), f"<{name}, lifted>", "exec"), copied.__dict__)
    results = []
    for module in (copied, pretrain):
        torch.manual_seed(0)
        results.append(tree_leaves(EXAMPLES["pretrain"][name](module, tmp_path)))
    assert len(results[0]) == len(results[1]) > 0
    for here, there in zip(*results):
        assert torch.equal(here, there) if isinstance(there, torch.Tensor) else here == there
