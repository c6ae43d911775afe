# SPDX-License-Identifier: MIT-0
"""Decoding with chapter 5's models: caches, prompts of unequal length, text; alone and over tp."""

import functools

import load_nemotron_h as tool
import mamba_hybrid as mh
import mamba_hybrid_tables as tables
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from proof import Shows, assert_differs, assert_equal, plant
from test_05_mamba_hybrid import config, tokens_of

TOKENS = tokens_of(2, 14)[0]


def decoder(cfg: mh.HybridConfig | None = None, group: mh.Group = None) -> tool.Decoder:
    """In float64; its weights are those of `HybridLM` with this configuration."""
    return tool.Decoder(cfg or config(), group).to(ranks.device, torch.float64)


def plain(cfg: mh.HybridConfig | None = None) -> mh.HybridLM:
    return mh.HybridLM(cfg or config()).to(ranks.device, torch.float64)


@functools.cache
def alone() -> dist.ProcessGroup:
    """A group of this rank alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_prefill_and_steps_equal_the_full_forward(prompt):
    """Prompts shorter and longer than the convolution, and a prompt that comes in two pieces."""
    expected, model = plain()(TOKENS), decoder()
    for pieces in ([prompt], [1, prompt], [prompt, 3]):
        cache, logits, first = model.new_cache(14), [], 0
        for length in pieces + [1] * (14 - sum(pieces)):
            logits.append(model(TOKENS[:, first : first + length], cache))
            first += length
        assert_equal({"logits": torch.cat(logits, 1)}, {"logits": expected})


def test_generation_equals_the_full_forward_each_time():
    model, tokens = decoder(), TOKENS[:, :5]
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, plain()(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tool.generate(model, tokens, 6), expected)
    drawn = [
        tool.generate(model, tokens, 6, 1.0, torch.Generator(ranks.device).manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for smallest in (1e-300, 1e-320):  # the quotients of the logits would overflow
        assert torch.equal(tool.generate(model, tokens, 6, smallest), expected)


def kept_tensors(state: tool.LayerState) -> list:
    return [x for x in vars(state).values() if isinstance(x, torch.Tensor)]


def kept_bytes(model: tool.Decoder, tokens_BT: torch.Tensor, capacity: int) -> int:
    """What a cache holds after these tokens: memory, also that of which a tensor is a view."""
    cache = model.new_cache(capacity)
    model(tokens_BT, cache)
    kept = [t for layer in cache.layers for t in kept_tensors(layer)]
    return sum(t.untyped_storage().nbytes() for t in kept)


def test_the_state_does_not_grow():
    """After 10 tokens and after 500, and with room for a million."""
    model = decoder(config(pattern="M-M"))
    sizes = {
        kept_bytes(model, tokens_of(1, n)[0], room)
        for n, room in ((10, 10), (500, 500), (10, 1_000_000))
    }
    assert len(sizes) == 1 and min(sizes) > 0


def test_a_cache_holds_what_the_tables_count():
    """States, inputs of the convolution, keys and values; in fp32, and with a model in bf16."""
    cfg, tokens = config(), tokens_of(1, 9)[0]
    here = kept_bytes(decoder(cfg).to(torch.float32), tokens, 20)
    assert here == tables.decode_memory(cfg, 20, 4, 4).total
    here = kept_bytes(decoder(cfg).to(torch.bfloat16), tokens, 100)
    assert here == tables.decode_memory(cfg, 100, 2, 4).total


def test_prompts_of_unequal_length_are_as_if_alone():
    """Padded on the left, with a document start each: the logits of each prompt and of each further
    token, and the text, equal those of the prompt alone. Shorter and longer than the convolution
    and than a chunk."""
    model, rows = decoder(), [tokens_of(1, n, seed=n)[0][0] for n in (1, 9, 3, 14)]
    tokens, starts = tool.pad_prompts(rows)
    texts = tool.generate(model, tokens, 6, starts_BT=starts)
    cache = model.new_cache(20)
    found = [model(tokens, cache, starts, last=True)]
    found += [model(texts[:, at : at + 1], cache) for at in range(14, 20)]
    for row, prompt in enumerate(rows):
        alone = tool.generate(model, prompt[None], 6)
        assert torch.equal(texts[row, 14:], alone[0, len(prompt) :])
        text = torch.cat([prompt, texts[row, 14:]])
        expected = plain()(text[None])[:, len(prompt) - 1 :]
        assert_equal({"logits": torch.cat(found, 1)[row : row + 1]}, {"logits": expected})
    assert tokens.shape == starts.shape == (4, 14) and starts.sum() == 4
    with pytest.raises(ValueError, match="prompt 1 is empty: begin with at least one token"):
        tool.pad_prompts([rows[0], rows[0][:0]])
    with pytest.raises(ValueError, match="no prompt: give at least one"):
        tool.pad_prompts([])


def test_documents_may_begin_while_decoding():
    """With a cache, in pieces: the logits are those of the packed sequence at once."""
    model, starts = decoder(), torch.zeros(2, 14, dtype=torch.bool)
    starts[0, [5, 9]] = starts[1, 11] = True
    cache, found = model.new_cache(14), []
    for first, last in ((0, 4), (4, 8), (8, 9), (9, 10), (10, 14)):
        documents = starts[:, first:last] if starts[:, first:last].any() else None
        found.append(model(TOKENS[:, first:last], cache, documents))
    assert_equal({"logits": torch.cat(found, 1)}, {"logits": plain()(TOKENS, starts)})


@pytest.mark.ranks(2, 4)
def test_generation_under_tensor_parallelism():
    """The same text on every rank as on one device, drawn and most probable; a rank's states are
    its shard. (test_05_context_parallel.py has fewer groups than ranks.)"""
    cfg, world = config(mamba_groups=4, attention_groups=4), dist.get_world_size()
    models = [decoder(cfg, alone()), decoder(cfg)]
    tokens = TOKENS[:, :5]
    for temperature in (0.0, 1.0):
        texts = []
        for model in models:
            generator = torch.Generator(ranks.device).manual_seed(0)
            texts.append(tool.generate(model, tokens, 8, temperature, generator))
        assert torch.equal(*texts)
    sizes = []
    for model in models:
        cache = model.new_cache(10)
        model(tokens, cache)
        sizes.append(cache.layers[0].ssm_BHPN.nbytes)
    assert sizes[0] == world * sizes[1]


def test_a_cache_refuses_what_it_cannot_take_and_stays_as_it_was():
    model, tokens = decoder(), TOKENS[:, :6]
    cache = model.new_cache(8)
    model(tokens, cache)
    with pytest.raises(ValueError, match="12 tokens, but the cache has room for 8"):
        model(tokens, cache)
    assert cache.tokens == 6
    assert all(x.shape[-2] <= 8 for x in kept_tensors(cache.layers[1]))


def test_a_cache_goes_on_rightly_after_a_call_that_failed():
    """Ids out of range, starts of another shape or dtype, another batch: nothing is counted."""
    model, expected = decoder(), plain()(TOKENS)
    cache = model.new_cache(14)
    model(TOKENS[:, :6], cache)
    step = TOKENS[:, 6:9]
    wrong_starts = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(IndexError):
        model(step + 61, cache)
    with pytest.raises(RuntimeError):
        model(step, cache, wrong_starts)
    with pytest.raises(RuntimeError, match="only supports boolean masks"):
        model(step, cache, torch.ones_like(step))
    with pytest.raises(ValueError, match="1 sequences, but the cache has tokens of 2"):
        model(step[:1], cache)
    assert cache.tokens == 6 and cache.document_BS is None
    assert_equal({"logits": model(step, cache)}, {"logits": expected[:, 6:9]})


def test_prompts_that_do_not_fit():
    model, one = decoder(), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"an empty prompt, \(2, 0\): begin with at least one"):
        tool.generate(model, one[:, :0], 3)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature=.*: it must be at least 0, and finite"):
            tool.generate(model, one, 3, temperature)
    with pytest.raises(ValueError, match="9 tokens, but the cache has room for 8"):
        model(torch.zeros(1, 9, dtype=torch.int64), model.new_cache(8))


def test_on_meta_there_are_shapes_alone():
    """So that published weights take the place of initial ones that were never drawn."""
    with torch.device("meta"):
        model = tool.Decoder(config())
    assert all(p.is_meta for p in model.parameters())
    weights = plain().state_dict()
    model.load_state_dict(weights, assign=True)
    logits = model(TOKENS, model.new_cache(14))
    assert torch.equal(logits, decoder()(TOKENS, decoder().new_cache(14)))


@pytest.mark.planted_bug(
    symptom="generation begins well and goes astray with the first new token", seen_in=None
)
def test_cache_keeps_what_came_out_of_the_convolution():
    """Forward alone: gradients never see a cache. The loss is that of one token after a prompt."""

    def activated(self, u, span, original=tool.DecodingMixer.with_earlier_inputs):
        before = original(self, u, span)
        span.state.conv_BKC = torch.cat([before[:, :3], F.silu(u)], 1)[:, -4:]
        return before

    model, expected = decoder(), plain()(TOKENS)
    with plant(tool.DecodingMixer, "with_earlier_inputs", activated):
        cache = model.new_cache(14)
        prompt, step = model(TOKENS[:, :9], cache), model(TOKENS[:, 9:10], cache)
    assert_equal({"prompt": prompt}, {"prompt": expected[:, :9]})
    assert_differs({"step": step}, {"step": expected[:, 9:10]})
    wrong, right = (
        F.cross_entropy(logits, TOKENS[:, 10]) for logits in (step[:, 0], expected[:, 9])
    )
    return Shows(loss=abs(wrong / right - 1).item(), gradients=None)
