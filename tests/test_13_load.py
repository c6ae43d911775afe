# SPDX-License-Identifier: MIT-0
"""Chapter 13's loader: transformers' NemotronH in float64, shards, and what it refuses."""

import contextlib
from pathlib import Path

import load
import nemotron3 as n3
import pytest
import torch
from proof import assert_equal, plant

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
        expected = theirs(tokens_BT, labels=tokens_BT)
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
            cache = n3.new_cache(model.layers)
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
