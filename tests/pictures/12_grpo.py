# SPDX-License-Identifier: MIT-0
"""Draws 12_grpo/groups.png: advantages by convention, the clip, and a policy that learns to sort.

`make pictures CHAPTER=12`, some forty seconds on one core.
"""

from pathlib import Path
from types import SimpleNamespace

import grpo as gr
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
CONVENTIONS = {
    "population std (GRPO)": dict(leave_one_out=False, deviation="population"),
    "std of the others (NeMo-RL)": dict(),
    "leave-one-out, no std": dict(deviation="none"),
}


def advantages(**options) -> list[float]:
    """Of one success among 16 with k of them, k from 1 to 15."""
    found = []
    for successes in range(1, 16):
        rewards = torch.zeros(16, dtype=torch.float64)
        rewards[:successes] = 1
        found.append(gr.grpo_advantages(rewards, 16, **options)[0].item())
    return found


def learned(lr: float) -> list[float]:
    """The mean reward of all responses, step by step."""
    args = SimpleNamespace(seed=0, dtype="fp32", prompts=32, group_size=8)
    policy = gr.GPT(gr.GPTConfig())
    learner = gr.Learner(args, gr.Mesh(), torch.device("cpu"), policy, gr.SortDigits())
    optimizer = gr.make_optimizer(policy, lr)
    batches = gr.batches_of_age(learner.batch, STEPS, 0)
    found = []
    for _ in gr.train(policy, optimizer, batches, gr.GRPOObjective()):
        found.append(sum(learner.rewards) / len(learner.rewards))
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    styles = ("-", "--", ":")
    for (name, options), style in zip(CONVENTIONS.items(), styles):
        axes[0].plot(range(1, 16), advantages(**options), style, label=name)
    axes[0].set(title="advantage of a success", xlabel="successes among 16 responses")
    axes[0].legend(frameon=False, fontsize=8)
    ratio = torch.linspace(0.5, 1.6, 221)
    for A, color in ((1.0, "#2f855a"), (-1.0, "#c53030")):
        losses = []
        for x in ratio.log():
            mask_BS = torch.ones(1, 1, dtype=torch.bool)
            A_BS = torch.tensor([[A]])
            losses.append(gr.grpo_loss(x.view(1, 1), torch.zeros(1, 1), A_BS, mask_BS).item())
        axes[1].plot(ratio, losses, color=color, label=f"A = {A:+.0f}")
    for edge in (0.8, 1.28):
        axes[1].axvline(edge, color="0.85", linewidth=1, zorder=0)
    axes[1].set(title="loss of a token", xlabel="ratio π / π_old")
    axes[1].legend(frameon=False, fontsize=8)
    for lr, style in ((1e-3, "-"), (4e-3, "--")):
        axes[2].plot(learned(lr), style, label=f"learning rate {lr:g}")
    axes[2].set(title="sorting four digits, from nothing", xlabel="step", ylabel="mean reward")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "12_grpo" / "groups.png", dpi=110)


if __name__ == "__main__":
    main()
