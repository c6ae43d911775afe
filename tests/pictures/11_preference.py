# SPDX-License-Identifier: MIT-0
"""Draws 11_preference/likelihoods.png: the losses of a pair, and both likelihoods while it learns.

`make pictures CHAPTER=11`, some twenty seconds on one core.
"""

from pathlib import Path

import preference as pf
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


def reference_and_pairs() -> tuple[pf.ParallelGPT, pf.Pairs]:
    reference = pf.ParallelGPT(pf.GPTConfig())
    batches = []
    for step in range(120):
        judged = pf.problems(32, step)
        batches.append([pf.collate([right for right, _, _ in judged], pad=pf.PAD)])
    optimizer = pf.make_optimizer(reference, 3e-3)
    for _ in pf.train(reference, optimizer, batches, pf.sft_objective):
        pass
    pairs = pf.pair_batch(pf.problems(64, "pairs"), reference, torch.device("cpu"))
    return reference, pairs


def curves(reference: pf.ParallelGPT, pairs: pf.Pairs, objective) -> torch.Tensor:
    """How far both log π have moved, (steps, 2)."""
    policy = pf.ParallelGPT(reference.config)
    policy.load_state_dict(reference.state_dict())
    optimizer = pf.make_optimizer(policy, 3e-4)
    found = [torch.zeros(2)]
    for _ in pf.train(policy, optimizer, [[pairs]] * STEPS, objective):
        with torch.no_grad():
            moved_R = pf.sequence_log_probs(policy, pairs.sequences) - pairs.reference_R
        found.append(moved_R.view(2, -1).mean(dim=1))
    return torch.stack(found)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    h = torch.linspace(-5, 5, 201)
    axes[0].plot(h, pf.dpo_loss(h, 1.0), color="#c53030", label="DPO")
    for distance, style in (("backward_kl", "-"), ("forward_kl", "--"), ("squared", ":")):
        loss = pf.rpo_loss(h, torch.ones_like(h), 1.0, 1.0, distance)
        axes[0].plot(h, loss, color="#2b6cb0", linestyle=style, label=f"RPO, {distance}")
    axes[0].axvline(1, color="0.85", linewidth=1, zorder=0)
    axes[0].set(title="loss of a pair, g = 1", xlabel="h = β Δ", ylim=(0, 2.5))
    axes[0].legend(
        frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2)
    )
    reference, pairs = reference_and_pairs()
    objectives = {
        "DPO": pf.PreferenceObjective("dpo"),
        "DPO + SFT term": pf.PreferenceObjective("dpo", sft_weight=0.05),
        "RPO": pf.PreferenceObjective("rpo"),
    }
    for axis, (name, objective) in zip(axes[1:], objectives.items()):
        moved = curves(reference, pairs, objective)
        axis.plot(moved[:, 0], color="#2f855a", label="chosen")
        axis.plot(moved[:, 1], color="#c53030", label="rejected")
        axis.axhline(0, color="0.85", linewidth=1, zorder=0)
        axis.set(title=name, xlabel="step", ylim=(-20, 3))
    axes[1].set_ylabel("log π, moved by")
    axes[1].legend(frameon=False)
    figure.savefig(ROOT / "11_preference" / "likelihoods.png", dpi=110)


if __name__ == "__main__":
    main()
