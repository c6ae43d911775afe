# SPDX-License-Identifier: MIT-0
"""GRPO's loss and advantages compared with trl's, on one rank.

    make bench CHAPTER=12           one thread; trl is an extra

trl's loss is `GRPOTrainer._compute_loss`, called by hand with its settings and with given
log-probabilities, so that neither side runs a model. It also computes metrics. The values are equal
before they are timed. The candidates run in turn; a ratio is of two neighbouring rounds, and the
median of the ratios is printed. Without trl, or with one that needs more, a line says so.
"""

import argparse
import statistics
import time
from collections import defaultdict
from types import SimpleNamespace

import grpo as gr
import torch

ROWS = 256
TOKENS = 1024
GROUP = 16


def inputs() -> tuple[torch.Tensor, ...]:
    """log_prob, old_log_prob, mask (B, S), rewards (B)."""
    generator = torch.Generator().manual_seed(0)
    log_prob = -2 * torch.rand(ROWS, TOKENS, generator=generator)
    old = log_prob + 0.2 * torch.randn(ROWS, TOKENS, generator=generator)
    length = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(TOKENS) < length
    rewards = torch.rand(ROWS, generator=generator)
    return log_prob, old, mask, rewards


def ours(log_prob, old, mask, advantages):
    A_BS = advantages[:, None].expand_as(mask)
    return gr.grpo_loss(log_prob, old, A_BS, mask) / mask.sum()


def of_trl():
    """trl's loss as a function of the same four tensors; None without trl."""
    try:
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as error:
        print(f"trl is left out: {error}\n")
        return None
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    settings = SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        loss_type="dapo",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
    )

    def loss(log_prob, old, mask, advantages):
        settings._metrics = {"train": defaultdict(list)}
        entropies = torch.zeros_like(old)
        settings._get_per_token_logps_and_entropies = lambda *_, **__: (log_prob, entropies, None)
        no_prompt = torch.zeros(ROWS, 0, dtype=torch.int64)
        batch = {
            "prompt_ids": no_prompt,
            "prompt_mask": no_prompt,
            "completion_ids": mask.long(),
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "num_items_in_batch": mask.sum(),
        }
        return GRPOTrainer._compute_loss(settings, None, batch)

    return loss


def trl_advantages(rewards):
    """trl's formula for scale_rewards="group", from its source: the deviation is the sample's."""
    grouped = rewards.view(-1, GROUP)
    mean = grouped.mean(dim=1).repeat_interleave(GROUP)
    std = grouped.std(dim=1).repeat_interleave(GROUP)
    return (rewards - mean) / (std + 1e-4)


def timed(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, the ways in turn; the first round warms up."""
    found = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn:
                found[name].append(time.perf_counter() - begin)
    return found


def report(title: str, ways: dict, rounds: int) -> None:
    print(title)
    found = timed(ways, rounds)
    first = found[next(iter(ways))]
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, first))
        print(f"{name:24}{1e3 * statistics.median(times):9.2f} ms{ratio:8.2f} × this chapter's")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {ROWS} responses of up to {TOKENS} tokens\n")
    log_prob, old, mask, rewards = inputs()
    ways = {
        "this chapter's": lambda: gr.grpo_advantages(rewards, GROUP, False, "sample", 1e-4),
        "trl's formula": lambda: trl_advantages(rewards),
    }
    gap = (ways["this chapter's"]() - ways["trl's formula"]()).abs().max()
    assert gap < 1e-5, gap
    report("advantages, the group's mean and sample deviation", ways, args.rounds)
    advantages = gr.grpo_advantages(rewards, GROUP)

    def step(loss_of):
        leaf = log_prob.clone().requires_grad_()
        loss = loss_of(leaf, old, mask, advantages)
        loss.backward()
        return loss.item(), leaf.grad

    ways = {"this chapter's": lambda: step(ours)}
    other = of_trl()
    if other is not None:
        try:
            loss, grad = step(other)
        except (AttributeError, KeyError, TypeError) as error:
            print(f"trl's loss is left out, this version needs more: {error!r}\n")
        else:
            right, right_grad = step(ours)
            assert abs(loss - right) < 1e-4 * abs(advantages).mean(), (loss, right)
            assert (grad - right_grad).abs().max() < 1e-4 * right_grad.abs().max()
            ways["trl"] = lambda: step(other)
    report("loss, forward and backward", ways, args.rounds)


if __name__ == "__main__":
    main()
