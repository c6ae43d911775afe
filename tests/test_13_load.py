# SPDX-License-Identifier: MIT-0
"""Chapter 13's loader: transformers' NemotronH in float64, shards, and what it refuses."""

import contextlib
import json
from functools import lru_cache
from pathlib import Path

import load
import nemotron3 as n3
import pytest
import scripts
import torch
from proof import Shows, assert_equal, plant, worst_of
from safetensors.torch import load_file, save_file

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def published_config(pattern: str, **changes) -> dict:
    sizes = dict(
        vocab_size=61,
        hidden_size=24,
        layers_block_type=[KINDS[letter] for letter in pattern],
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
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=16,
        routed_scaling_factor=2.5,
        layer_norm_epsilon=1e-4,
        tie_word_embeddings=False,
    )
    return sizes | changes


def publish(folder: Path, pattern="M*E-", shard_size="1GB", **changes):
    """A folder that transformers writes of a NemotronH with random weights, and the model, float64.
    No dt of it is near the 0.001 where it would clamp."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NemotronHConfig"):
        pytest.skip("this transformers has no NemotronH")
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**published_config(pattern, **changes))
    config._experts_implementation = "eager"
    model = transformers.NemotronHForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("dt_bias"):
                x.uniform_(-2, 1)
            elif name.endswith("norm.weight"):
                x.uniform_(0.5, 1.5)
            elif x.ndim > 1 or "bias" in name:
                x.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@contextlib.contextmanager
def in_float64():
    """transformers' own arithmetic with float64 wherever it says float32."""
    import transformers.models.nemotron_h.modeling_nemotron_h as modeling

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    with plant(modeling, "torch", Torch()):
        torch.Tensor.float = torch.Tensor.double  # over the base class's
        try:
            yield
        finally:
            del torch.Tensor.float


def theirs_by_our_names(model, config, values) -> dict:
    """Values by transformers' parameter names, to our names and shapes."""
    bare = {name.removeprefix("model."): x for name, x in values.items()}
    found = {}
    for name, shape in n3.state_shapes(config).items():
        if name.endswith("router.bias"):
            continue
        theirs = load.published_name(name, config).replace(".{}", "")
        if ".experts." in theirs:
            theirs = theirs.removesuffix(".weight")
        found[name] = bare[theirs].reshape(shape)
    return found


CASES = [("M", {}), ("M*", {}), ("*", {}), ("-", {}), ("E", {}), ("E", {"moe_latent_size": 8})]
CASES += [("MEM*E", {}), ("MEM*EME-", {"moe_latent_size": 8})]


@pytest.mark.parametrize("pattern, changes", CASES, ids=str)
def test_published_weights_against_transformers(tmp_path, pattern, changes):
    """Logits, loss, every gradient and cached decoding of transformers' NemotronH, to 1e-12."""
    theirs = publish(tmp_path, pattern, **changes)
    model = load.load_decoder(tmp_path)
    config = model.config
    plain = n3.NemotronLM(config).double()
    plain.load_state_dict(model.state_dict())
    plain.eval()
    tokens_BT = torch.randint(61, (2, 11))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, -1] = -100
    with in_float64():
        expected = theirs(tokens_BT, labels=tokens_BT, use_cache=False)
        expected.loss.backward()
        logits_BTV = plain(tokens_BT)
        losses = plain.loss(tokens_BT, targets_BT)
        losses[0].backward()
        found = {"logits": logits_BTV, "loss": losses[0]}
        reference = {"logits": expected.logits, "loss": expected.loss}
        found |= {f"gradient {name}": p.grad for name, p in plain.named_parameters()}
        grads = {name: p.grad for name, p in theirs.named_parameters()}
        for name, grad in theirs_by_our_names(theirs, config, grads).items():
            reference[f"gradient {name}"] = grad
        with torch.no_grad():
            cache = load.new_cache(model.layers)
            past = None
            spans = ((0, 6), (6, 7), (7, 8), (8, 9))
            for first, last in spans if "*" in pattern else ():  # it counts tokens in attention
                part = tokens_BT[:, first:last]
                out = theirs(part, cache=past, use_cache=True)
                past = out.cache
                hidden = model.trunk(part, cache.admit(last - first, 0))
                found[f"decoded {first}"] = model.logits(hidden)
                reference[f"decoded {first}"] = out.logits
    assert_equal(found, reference, bound=1e-12)


# ── Shards, multi-token prediction ────────────────────────────────────────────────────────────────


MTP = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}
MTP_NAMES = [
    "mtp.layers.0.eh_proj.weight",
    "mtp.layers.0.enorm.weight",
    "mtp.layers.0.hnorm.weight",
    "mtp.layers.0.mixer.k_proj.weight",
    "mtp.layers.0.mixer.o_proj.weight",
    "mtp.layers.0.mixer.q_proj.weight",
    "mtp.layers.0.mixer.v_proj.weight",
    "mtp.layers.0.norm.weight",
    *(f"mtp.layers.1.mixer.experts.{i}.{kind}_proj.weight" for i in range(8) for kind in "du"),
    "mtp.layers.1.final_layernorm.weight",
    "mtp.layers.1.mixer.fc1_latent_proj.weight",
    "mtp.layers.1.mixer.fc2_latent_proj.weight",
    "mtp.layers.1.mixer.gate.e_score_correction_bias",
    "mtp.layers.1.mixer.gate.weight",
    "mtp.layers.1.mixer.shared_experts.down_proj.weight",
    "mtp.layers.1.mixer.shared_experts.up_proj.weight",
    "mtp.layers.1.norm.weight",
]
MTP_NAMES = [name.replace(".d_", ".down_").replace(".u_", ".up_") for name in MTP_NAMES]


def with_mtp(folder: Path) -> dict[str, torch.Tensor]:
    """A small Super in several files, with a block for multi-token prediction of random weights, by
    published names. Returns: the block's tensors."""
    publish(folder, "MEM*E", shard_size="20KB", moe_latent_size=8, **MTP)
    config = load.read_config(folder)
    shapes = n3.state_shapes(config)
    tensors = {}
    for name, shape in shapes.items():
        if name.startswith("mtp."):
            x = torch.randn(shape, dtype=torch.float64) / 4
            theirs = load.published_name(name, config)
            parts = x.unbind() if "{}" in theirs else [x]
            tensors |= {theirs.format(i): part.contiguous() for i, part in enumerate(parts)}
    save_file(tensors, folder / "mtp.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
    index.write_text(json.dumps(content))
    return tensors


def test_a_folder_with_multi_token_prediction(tmp_path):
    """The names of the block's tensors; each rank's shards are those of the full state dict, and
    a rank reads its experts alone."""
    tensors = with_mtp(tmp_path)
    assert sorted(tensors) == sorted(MTP_NAMES)
    config = load.read_config(tmp_path)
    assert (config.pattern, config.mtp_pattern, config.mtp_num_layers) == ("MEM*E", "*E", 1)
    full = load.read_weights(tmp_path, config)
    assert torch.equal(full["mtp.0.eh_proj.weight"], tensors["mtp.layers.0.eh_proj.weight"])
    norm = tensors["mtp.layers.1.final_layernorm.weight"]
    assert torch.equal(full["mtp.0.final_layernorm.weight"], norm)
    read = []
    original = load.read_shard

    def watched(found, theirs, *args):
        read.append(theirs)
        return original(found, theirs, *args)

    for rank in range(4):
        mesh = n3.Mesh(2, 4, 2, rank % 2, rank, rank // 2)
        read.clear()
        with plant(load, "read_shard", watched):
            here = load.read_weights(tmp_path, config, mesh)
        assert sum(".experts." in name for name in read) == 3 * 2 * 2  # layers, matrices, experts
        assert here.keys() == full.keys()
        for name, x in full.items():
            assert torch.equal(here[name], n3.shard_tensor(name, x, config, mesh)), name


def test_more_ranks_than_groups_of_keys(tmp_path):
    """Each of four ranks reads both groups of keys and values, and its own heads' queries."""
    publish(tmp_path, "*E")
    config = load.read_config(tmp_path)
    full = load.read_weights(tmp_path, config)
    for rank in range(4):
        mesh = n3.Mesh(tp=4, tp_rank=rank)
        here = load.read_weights(tmp_path, config, mesh)
        for name, x in full.items():
            assert torch.equal(here[name], n3.shard_tensor(name, x, config, mesh)), name
        keys = here["layers.0.mixer.k_proj.weight"]
        assert torch.equal(keys, full["layers.0.mixer.k_proj.weight"])


def test_blocks_of_their_own_for_each_depth(tmp_path):
    config = n3.NemotronConfig(mtp_num_layers=2, mtp_use_repeated_layer=False)
    names = [load.published_name(name, config) for name in n3.state_shapes(config)]
    assert len(set(names)) == len(names)
    assert load.published_name("mtp.1.eh_proj.weight", config) == "mtp.layers.2.eh_proj.weight"
    last = load.published_name("mtp.1.final_layernorm.weight", config)
    assert last == "mtp.layers.3.final_layernorm.weight"


@pytest.mark.planted_bug(
    symptom="a rank reads the first experts whatever its place: all ranks compute the same ones",
    seen_in=None,
)
def test_experts_of_another_rank(tmp_path):
    publish(tmp_path, "ME")
    config = load.read_config(tmp_path)
    full = load.read_weights(tmp_path, config)
    wrong = load.read_weights(tmp_path, config, n3.Mesh(ep=4, ep_rank=0))
    right = load.read_weights(tmp_path, config, n3.Mesh(ep=4, ep_rank=2))
    name = "layers.1.mixer.experts.up"
    assert torch.equal(right[name], full[name][4:6])
    assert not torch.equal(wrong[name], right[name])
    return Shows(None, worst_of({name: wrong[name]}, {name: right[name]}))


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    with_mtp(path)
    return path


def test_drafts_and_rollback(folder):
    """Greedy text is the same with any number of drafts, and after keep(n) each cache is a fresh
    one. Mamba in groups and chunks, attention in groups, experts in latent width."""
    model = load.load_decoder(folder)
    prompt_1T = torch.tensor([[1, 17, 4, 9, 30]])
    plain = load.speculative_generate(model, prompt_1T, 12)
    for drafts in (1, 3, 5):
        found = load.speculative_generate(model, prompt_1T, 12, drafts)
        assert torch.equal(found.tokens_1T, plain.tokens_1T)
    tokens_BT = torch.randint(61, (2, 12))
    for n in range(4):
        cache = load.new_cache(model.layers)
        fresh = load.new_cache(model.layers)
        with torch.no_grad():
            model.trunk(tokens_BT[:, :5], cache.admit(5, 0))
            model.trunk(tokens_BT[:, 5:9], cache.admit(4, 3))
            cache.keep(n)
            model.trunk(tokens_BT[:, : 6 + n], fresh.admit(6 + n, 0))
        assert_equal(tensors_of(cache), tensors_of(fresh), 1e-12)


def tensors_of(cache) -> dict[str, torch.Tensor]:
    found = {}
    for index, state in enumerate(cache.layers):
        if state.ssm:
            assert len(state.ssm) == 1
            found |= {f"{index} state": state.ssm[0], f"{index} inputs": state.conv_BTC}
        if state.kv_2BHSP is not None:
            found[f"{index} keys and values"] = state.kv_2BHSP
    return found


@pytest.mark.planted_bug(
    symptom="Mamba's states keep rejected drafts: the text is not that of plain decoding",
    seen_in="https://github.com/vllm-project/vllm/issues/39273",
)
def test_no_rollback_of_states(folder):
    model = load.load_decoder(folder)
    tokens_BT = torch.randint(61, (2, 12))
    original = load.LayerState.keep

    def keep(self, n, drafts):
        if self.ssm:
            n = drafts
        original(self, n, drafts)

    cache = load.new_cache(model.layers)
    fresh = load.new_cache(model.layers)
    with torch.no_grad():
        with plant(load.LayerState, "keep", keep):
            model.trunk(tokens_BT[:, :8], cache.admit(8, 3))
            cache.keep(1)
        here = model.logits(model.trunk(tokens_BT[:, 6:7], cache.admit(1, 0)))
        right = model.logits(model.trunk(tokens_BT[:, :7], fresh.admit(7, 0)))[:, -1:]
    return Shows(worst_of({"logits": here}, {"logits": right}), None)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thinking_budget(folder, drafts, temperature):
    """The end tag stands where the budget ends, also where drafts cross it; greedy text does not
    depend on drafts."""
    model = load.load_decoder(folder)
    prompt_1T = torch.tensor([[1, 17, 58]])  # 58 begins a thought; 59 60 end one

    def text(drafts):
        controller = load.BudgetController((58,), (59, 60), budget=6, rows=1)
        options = (14, drafts, temperature, torch.Generator().manual_seed(5))
        constrain = load.ForcedTokens(controller)
        found = load.speculative_generate(model, prompt_1T, *options, constrain)
        return found.tokens_1T[0].tolist()

    tokens = text(drafts)
    free = tokens[3:9]
    if 59 not in free:  # the model has not ended the thought by itself
        assert tokens[9:11] == [59, 60]
    assert temperature or tokens == text(0)
    controller = load.BudgetController((58,), (59, 60), budget=6, rows=1)
    controller.read(torch.tensor([tokens[:3]]))
    for token in tokens[3:]:
        forced = controller.forced().item()
        assert forced in (-1, token)
        controller.observe(torch.tensor([token]))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of single characters and two tags."""
    tokenizers = pytest.importorskip("tokenizers")
    names = [chr(ord("a") + i) for i in range(26)] + [" ", "?"]
    vocabulary = {name: i for i, name in enumerate([*names, "<think>", "</think>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["load.py", *map(str, words)])
        args = load.flags()
        load.main(args, torch.device("cpu"))
        return capsys.readouterr().out

    return run


def test_the_command(folder, command):
    assert command("--folder", folder).startswith("MEM*E, MTP *E, ")
    lines = command("--folder", folder, "--prompt", "1 17 4", "--new-tokens", 5).splitlines()
    assert lines[1].startswith("1 17 4 → ") and "drafts each" in lines[2]
    write_tokenizer(folder)
    out = command("--folder", folder, "--text", "ab <think>", "--new-tokens", 6, "--drafts", 2)
    assert "0 1 26 28 → " in out
    words = ("--text", "a<think>", "--new-tokens", 6, "--thinking-budget", 2)
    assert "</think>" in command("--folder", folder, *words)
    with pytest.raises(ValueError, match="give token ids from 0 to 60"):
        command("--folder", folder, "--prompt", "61")
    with pytest.raises(ValueError, match="--thinking-budget 3: it needs --text"):
        command("--folder", folder, "--prompt", "1", "--thinking-budget", 3)
    with pytest.raises(SystemExit):
        command("--folder", folder, "--prompt", "1", "--text", "a")


def test_the_command_writes_on_its_device(folder, monkeypatch):
    """--device is the model's, the tokens', the generator's and the controller's."""
    write_tokenizer(folder)
    words = ("--folder", folder, "--text", "a<think>", "--thinking-budget", 2, "--new-tokens", 3)
    monkeypatch.setattr("sys.argv", ["load.py", *map(str, words)])
    seen = {}

    def watched(model, tokens_1T, new_tokens, drafts, temperature, generator, constrain):
        seen.update(model=model.head.weight, tokens=tokens_1T, thought=constrain.controller.start)
        return load.Speculation(torch.zeros(1, 5, dtype=torch.int64), 1, [], [])

    made = torch.Generator
    with (
        plant(load, "speculative_generate", watched),
        plant(torch, "Generator", lambda device="cpu": seen.update(generator=device) or made()),
    ):
        load.main(load.flags(), torch.device("meta"))
    found = {name: torch.device(getattr(x, "device", x)).type for name, x in seen.items()}
    assert found == dict.fromkeys(("model", "tokens", "thought", "generator"), "meta")


def test_settings_that_the_published_files_have_too(folder, tmp_path):
    """Rotary embeddings that no layer has, and the norms' ε once more: all else is as without."""
    more = dict(rope_theta=10000, partial_rotary_factor=1.0, norm_eps=1e-4, sliding_window=None)
    more |= dict(mamba_ssm_cache_dtype="float32", num_logits_to_keep=1, expand=2)
    assert load.read_config(changed(folder, tmp_path, **more)) == load.read_config(folder)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--text", "a"), "--text needs --folder"),
        (("--thinking-budget", 3), "--thinking-budget needs --folder"),
        (("--thinking-budget", 0), "--thinking-budget needs --folder"),
        (("--folder", "/nowhere"), "No such file"),
        (("--mtp-num-layers", 0, "--drafts", 2), "has no block for --drafts 2"),
    ],
)
def test_wrong_flags_are_one_line(command, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in lines[-1] and len(lines) <= 2


# ── What is refused ───────────────────────────────────────────────────────────────────────────────


def changed(folder: Path, to: Path, **changes) -> Path:
    """A copy of the folder with other settings; a None takes a key away."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    settings = json.loads((to / "config.json").read_text()) | changes
    kept = {key: x for key, x in settings.items() if x is not None}
    (to / "config.json").write_text(json.dumps(kept))
    return to


REFUSED = {
    r"'mlp_hidden_act': 'gelu'": dict(mlp_hidden_act="gelu"),
    r"'model_type': 'llama'": dict(model_type="llama"),
    r"'use_bias': True": dict(use_bias=True),
    r"'n_group': 2": dict(n_group=2),
    r"'norm_topk_prob': False": dict(norm_topk_prob=False),
    r"'tie_word_embeddings': True": dict(tie_word_embeddings=True),
    r"'num_experts_per_tok': 1": dict(num_experts_per_tok=1),
    r"'rope_scaling': \{'factor': 2\}": dict(rope_scaling={"factor": 2}),
    r"'norm_eps': 1e-05": dict(norm_eps=1e-5),
    r"'time_step_limit': \[0.0, 0.1\]": dict(time_step_limit=[0.0, 0.1]),
    r"'num_hidden_layers': 9": dict(num_hidden_layers=9),
    r"no number for \['mamba_num_heads'\]": dict(mamba_num_heads=None),
    r"no number for \['layer_norm_epsilon'\]": dict(layer_norm_epsilon=None),
    r"M, \*, E and - are known": dict(layers_block_type=["rnn"]),
    r"in one way": dict(hybrid_override_pattern="MEM*-"),
    r"lacks the tensor layers.5.": dict(layers_block_type=None, hybrid_override_pattern="MEM*EM"),
    r"has \['layers.4": dict(layers_block_type=None, hybrid_override_pattern="MEM*"),
    r"has \['mtp.layers.0": dict(num_nextn_predict_layers=0),
    r"lacks the tensor mtp.layers.2": dict(num_nextn_predict_layers=2),
    r"has shape \(61, 24\); config.json implies \(61, 32\)": dict(hidden_size=32),
    r"lacks the tensor .*experts.8": dict(n_routed_experts=9),
    r"config.json: top_k=9: choose": dict(num_experts_per_tok=9),
    r"config.json: mtp_num_layers=-1: it must be": dict(num_nextn_predict_layers=-1),
    r"no number for \['layer_norm_epsilon', 'routed_scaling_factor'\]": dict(
        layer_norm_epsilon=-1, routed_scaling_factor=float("nan")
    ),
    r"no number for \['moe_latent_size', 'num_nextn_predict_layers'\]": dict(
        moe_latent_size=8.5, num_nextn_predict_layers="x"
    ),
    r"config.json: layers .*'\?', .*in one way": dict(hybrid_override_pattern=5),
    r"config.json: layers .*'\?M'": dict(layers_block_type=[["moe"], "mamba"]),
    r"'is_causal': False": dict(is_causal=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_setting_or_tensor_that_does_not_fit_is_refused(message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        load.load_decoder(changed(folder, tmp_path, **REFUSED[message]))


def test_damaged_files_are_named(folder, tmp_path):
    changed(folder, tmp_path)
    for name in ("config.json", "model.safetensors.index.json"):
        for text in ("", "{", "[1]"):
            kept = (tmp_path / name).read_text()
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=f"{name} is (damaged|no JSON object)"):
                load.load_decoder(tmp_path)
            (tmp_path / name).write_text(kept)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        load.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="give token ids with --prompt"):
        load.read_tokenizer(tmp_path)
    file = tmp_path / "mtp.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"backbone.norm_f.weight": torch.ones(24)}, file)
    with pytest.raises(ValueError, match="norm_f.weight is there twice"):
        load.load_decoder(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="mtp.safetensors is damaged.*copy it again"):
        load.load_decoder(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        load.load_decoder(tmp_path)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=240)
def test_the_demonstration():
    with plant(n3, "TextData", lru_cache(n3.TextData)):
        code, printed = scripts.on_ranks(load, "--steps", 2, "--new-tokens", 4)
    assert code == 0 and "4 of 4 texts" in printed, printed


@pytest.mark.slow
def test_a_plain_start():
    done = scripts.forked(Path(load.__file__), "--ranks", "1", "--steps", "1", "--new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 texts" in done.stdout
