# SPDX-License-Identifier: MIT-0
"""Draws 09_mtp/drafts.png: the acceptance rule, tokens of a pass, and what each depth predicts.

`make pictures CHAPTER=09`, some seconds on one core.
"""

from pathlib import Path

import mtp as mt
import mtp_tables as tables
import torch

ROOT = Path(__file__).resolve().parents[2]
BLUE, ORANGE = "#2b6cb0", "#dd6b20"


def letters(text: str, lengths: tuple[int, ...], depths: int) -> list[list[str]]:
    """Rows of letters: what the trunk and each depth predict in documents of these lengths."""
    tokens = torch.tensor([[ord(letter) for letter in text]])
    indices = [torch.full((length,), i) for i, length in enumerate(lengths)]
    is_last = mt.last_of_documents(torch.cat(indices)[None])
    rows = [list(text)]
    for _ in range(depths + 1):
        tokens = mt.roll_tensor(tokens, is_last, ord("–"))
        rows.append([chr(i) for i in tokens[0].tolist()])
    return rows


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(13, 3.3), width_ratios=(1.1, 1, 1.1), layout="constrained"
    )
    rows = letters("abcdexyz", (5, 3), 2)
    names = ["token", "trunk predicts", "depth 1 predicts", "depth 2 predicts"]
    for y, (name, row) in enumerate(zip(names, rows)):
        axes[0].text(-0.8, -y, name, ha="right", va="center")
        for x, letter in enumerate(row):
            color = "0.7" if letter == "–" else (BLUE if x < 5 else ORANGE)
            axes[0].text(x, -y, letter, ha="center", va="center", color=color, size=13)
    axes[0].axvline(4.5, color="0.7", lw=1)
    axes[0].set(xlim=(-4.5, 7.7), ylim=(-3.6, 0.6), title="two documents in one sequence")
    axes[0].axis("off")
    p = torch.tensor([2, 3, 1, 1, 1]) / 8
    q = torch.tensor([1, 1, 2, 2, 2]) / 8
    kept = torch.minimum(p, q)
    axes[1].bar(range(5), q, color="0.87", label="q: rejected")
    axes[1].bar(range(5), kept, color=BLUE, label="min(p, q): accepted")
    axes[1].bar(range(5), p - kept, bottom=kept, color=ORANGE, label="p − q: drawn instead")
    axes[1].set(title="one draft", xlabel="token", ylim=(0, 0.55))
    axes[1].legend(frameon=False, fontsize=8)
    drafts = range(0, 13)
    for a, shade in ((0.5, "0.7"), (0.735, BLUE), (0.9, "0.4")):
        axes[2].plot(drafts, [tables.expected_tokens(a, n) for n in drafts], color=shade)
        last = tables.expected_tokens(a, 12)
        axes[2].text(12.2, last, f"a = {a:g}", va="center", color=shade)
    axes[2].plot([7], [3.45], "o", color=ORANGE)
    axes[2].text(6.6, 3.75, "Super", ha="right", color=ORANGE)
    axes[2].set(title="tokens of a pass", xlabel="drafts", xlim=(0, 15.4))
    figure.savefig(ROOT / "09_mtp" / "drafts.png", dpi=110)


if __name__ == "__main__":
    main()
