# SPDX-License-Identifier: MIT-0
"""Passes of the target with drafts and without, and next to transformers' assisted generation.

    make bench CHAPTER=09           one thread; needs transformers for its second table

First table: chapter 9's hybrid, trained for some steps, greedy and sampled. Second table: two GPT-2
models of attention layers, random weights; the drafts come from the larger one's first layer. The
same drafts go through `speculative_sample` here and through transformers' own loop there; text and
calls of the target must agree. Seconds are reported and not judged: on a CPU a pass over eight
tokens is not as cheap as one.
"""

import argparse
import time

import mtp as mt
import speculate as sp
import torch


def trained(steps: int) -> tuple[sp.Decoder, torch.Tensor]:
    """A small hybrid in float64, and the text to evaluate on."""
    sizes = dict(hidden_size=64, ffn_hidden_size=128, mamba_heads=2, attention_heads=2)
    config = mt.HybridConfig(pattern="M-*-", init_std=0.05, **sizes)
    train_text, eval_text = mt.read_text("", 200)
    windows = train_text.unfold(0, 97, 1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (8,), generator=generator)]
        batches.append((rows[:, :-1], rows[:, 1:]))
    plain = mt.HybridLM(config)
    for _ in mt.train(plain, mt.make_optimizer(plain, 5e-3), batches):
        pass
    model = sp.Decoder(config)
    model.load_state_dict(plain.state_dict())
    return model.double(), eval_text


def bench_hybrid(steps: int) -> None:
    model, text = trained(steps)
    print(f"the hybrid, {steps} steps of training, 3 texts of 48 tokens")
    print("temperature  drafts  passes  tokens a pass   seconds")
    for temperature in (0.0, 1.0):
        for drafts in (0, 2, 4, 7):
            passes = 0
            begin = time.perf_counter()
            for number in range(3):
                prompt = text[None, 900 * number : 900 * number + 48]
                rng = torch.Generator().manual_seed(number)
                one = sp.speculative_generate(model, prompt, 48, drafts, temperature, rng)
                passes += one.passes
            seconds = time.perf_counter() - begin
            print(f"{temperature:11}{drafts:8}{passes:8}{144 / passes:15.2f}{seconds:10.2f}")
    print()


def greedy_laws(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """1 at the best token of each place, (T, V), without a cache."""
    return sp.next_laws(model(tokens).logits[0], 0.0)


@torch.no_grad()
def through_our_rule(target, assistant, tokens: torch.Tensor, new: int, n: int) -> tuple:
    """The text, and how often the target was called."""
    end = tokens.shape[1] + new
    calls = 0
    while tokens.shape[1] < end:
        count = min(n, end - tokens.shape[1] - 1)  # as transformers: no draft beyond the end
        window = tokens
        for _ in range(count):
            best = greedy_laws(assistant, window)[-1:].argmax(-1, keepdim=True)
            window = torch.cat([window, best], 1)
        drafts = window[0, tokens.shape[1] :]
        q = greedy_laws(assistant, window)[tokens.shape[1] - 1 : -1]
        p = greedy_laws(target, window)[tokens.shape[1] - 1 :]
        calls += 1
        uniforms = torch.zeros(count + 1, dtype=p.dtype)
        accepted, token = sp.speculative_sample(p, q, drafts, uniforms)
        tokens = torch.cat([tokens, drafts[None, :accepted], token[None, None]], 1)
    return tokens, calls


def bench_assisted(new: int) -> None:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("transformers is not installed: its table is left out")
        return
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, n_positions=160, n_embd=32, n_head=2, bos_token_id=0)
    sizes |= dict(eos_token_id=None, initializer_range=0.4)
    target = GPT2LMHeadModel(GPT2Config(n_layer=3, **sizes)).double().eval()
    assistant = GPT2LMHeadModel(GPT2Config(n_layer=1, **sizes)).double().eval()
    # The assistant is the target without its last layers, which change little: they often agree.
    for layer in target.transformer.h[1:]:
        for p in layer.parameters():
            p.data *= 0.7
    mine = assistant.state_dict()
    assistant.load_state_dict({name: x for name, x in target.state_dict().items() if name in mine})
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    prompt = torch.randint(40, (1, 8))
    print(f"GPT-2 of 3 layers, drafts by one of 1 layer, {new} tokens: calls of the target")
    print("drafts    here  transformers   text")
    for n in (1, 3, 6):
        text, ours = through_our_rule(target, assistant, prompt, new, n)
        settings = assistant.generation_config
        settings.num_assistant_tokens = n
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0
        calls.clear()
        theirs = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            assistant_model=assistant,
            pad_token_id=0,
        )
        same = "equal" if torch.equal(text[:, : theirs.shape[1]], theirs) else "DIFFERS"
        print(f"{n:6}{ours:8}{len(calls):14}   {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--new", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread\n")
    bench_hybrid(args.steps)
    bench_assisted(args.new)


if __name__ == "__main__":
    main()
