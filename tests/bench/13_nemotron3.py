# SPDX-License-Identifier: MIT-0
"""A forward and backward pass, and decoding with a cache, next to transformers' NemotronH.

    make bench CHAPTER=13           one thread; needs transformers

Both models have the same sizes and fp32 weights of their own. Rounds alternate; the ratio is the
median of the rounds' ratios, here / there.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import load
import nemotron3 as n3
import torch

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def both(pattern: str):
    """This chapter's decoder, and transformers' model."""
    import transformers

    sizes = dict(hidden_size=256, mamba_heads=16, mamba_head_size=32, mamba_groups=4)
    sizes |= dict(attention_heads=8, attention_head_size=32, ffn_hidden_size=1024, chunk=64)
    config = n3.NemotronConfig(512, pattern=pattern, mtp_num_layers=0, expert_size=128, **sizes)
    theirs = transformers.NemotronHConfig(
        vocab_size=512,
        hidden_size=256,
        layers_block_type=[KINDS[letter] for letter in pattern],
        intermediate_size=1024,
        mamba_num_heads=16,
        mamba_head_dim=32,
        n_groups=4,
        ssm_state_size=16,
        chunk_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=128,
        moe_latent_size=32,
    )
    return load.Decoder(config), transformers.NemotronHForCausalLM(theirs).eval()


def seconds(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def compare(name: str, here: Callable, there: Callable, rounds: int) -> None:
    here()
    there()
    pairs = [(seconds(here), seconds(there)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    ours = statistics.median(a for a, _ in pairs)
    print(f"{name:44}{1000 * ours:9.1f} ms{ratio:10.2f} ×")


def bench(pattern: str, rounds: int) -> None:
    ours, theirs = both(pattern)
    plain = n3.NemotronLM(ours.config)
    tokens = torch.randint(512, (2, 256))

    def step_here():
        plain.loss(tokens, tokens)[0].backward()

    def step_there():
        theirs(tokens, labels=tokens, use_cache=False).loss.backward()

    compare(f"{pattern}: forward and backward, 512 tokens", step_here, step_there, rounds)
    prompt = tokens[:1, :32]

    def write_here():
        load.speculative_generate(ours, prompt, 16)

    def write_there():
        settings = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
        theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    compare(f"{pattern}: 16 tokens after 32", write_here, write_there, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread\n")
    print(f"{'':44}{'here':>12}{'here/there':>12}")
    for pattern in ("MEM*E", "M-M*-"):
        bench(pattern, args.rounds)


if __name__ == "__main__":
    main()
