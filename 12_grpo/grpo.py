# SPDX-License-Identifier: MIT-0
"""Chapter 12. Reinforcement learning with verifiers: GRPO, and a thinking budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


# region shared: thinking budget
class BudgetController:
    """Ends thinking at a budget: forces the ids of the end tag, one after another, in B rows.

        controller = BudgetController(start=(20,), end=(21,), budget=8, rows=B, device=device)
        controller.read(prompts_BQ)                  the prompts may open a thought, or close it
        for each new token:
            sampled_B = ... from the logits
            tokens_B, is_forced_B = controller(sampled_B)

    Args:
        start, end: token ids of the two tags, one or several each. They count as no thought.
        budget: so many tokens of thought in each row, or one number a row, int64 (B,). None: no
            limit. A thought begins anew, with a new count, after each start tag outside a thought.
        rows: B. device: of all tensors here; None: the CPU.

    Methods: `read`, `observe`, `forced`, and the call. State: is_thinking_B, thought_B (tokens
        since the start tag). A forced token is no sample: give it no loss. It is forced whatever
        the logits say, so call the controller after every other mask.
    No value is read on the host. Each row is by itself; on tensor-parallel ranks all rows agree.
    Raises: ValueError for an empty tag, a negative id, a negative budget, or other shapes.
    Source: Nemotron Nano 2 (2025), section 3.4; as a logits processor in vLLM and TensorRT-LLM.
    """

    def __init__(
        self,
        start: Sequence[int],
        end: Sequence[int],
        budget: int | Tensor | None,
        rows: int,
        device: torch.device | None = None,
    ):
        is_tag = bool(start) and bool(end) and min(*start, *end) >= 0
        is_number = isinstance(budget, int) and budget >= 0
        is_row_each = isinstance(budget, Tensor) and budget.shape == (rows,)
        if not is_tag or not (budget is None or is_number or is_row_each):
            found = f"start={start}, end={end}, budget={budget}, rows={rows}"
            raise ValueError(f"{found}: tags need ids >= 0, a budget is >= 0, or one for each row")
        self.start = torch.tensor(start, device=device)
        self.end = torch.tensor(end, device=device)
        self.budget = budget
        kept = max(len(start), len(end))
        self.recent_BK = torch.full((rows, kept), -1, device=device)  # the last K ids; -1: none
        self.is_thinking_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.thought_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def __call__(self, sampled_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled ids to the ids that the rows go on with, and which of them were forced."""
        forced_B = self.forced()
        is_forced_B = forced_B >= 0
        tokens_B = torch.where(is_forced_B, forced_B, sampled_B)
        self.observe(tokens_B)
        return tokens_B, is_forced_B

    def forced(self) -> Tensor:
        """The id that each row must go on with, int64 (B,); -1: any id. It changes no state."""
        if self.budget is None:
            return torch.full_like(self.thought_B, -1)
        is_over_B = self.is_thinking_B & (self.thought_B >= self.budget)
        next_B = self._matched(self.end).clamp(max=len(self.end) - 1)
        return torch.where(is_over_B, self.end[next_B], -1)

    def read(self, tokens_BS: Tensor) -> None:
        """Tokens that stand there already: a prompt. Padding belongs on its left."""
        for tokens_B in tokens_BS.unbind(dim=1):
            self.observe(tokens_B)

    def observe(self, tokens_B: Tensor) -> None:
        """One more token of each row, sampled or forced."""
        if tokens_B.shape != self.thought_B.shape:
            raise ValueError(f"{tuple(tokens_B.shape)} tokens for {len(self.thought_B)} rows")
        self.recent_BK = torch.cat([self.recent_BK[:, 1:], tokens_B[:, None]], dim=1)
        was_thinking_B = self.is_thinking_B
        closes_B = was_thinking_B & (self._matched(self.end) == len(self.end))
        opens_B = ~was_thinking_B & (self._matched(self.start) == len(self.start))
        self.is_thinking_B = (was_thinking_B | opens_B) & ~closes_B
        self.thought_B = torch.where(was_thinking_B & ~closes_B, self.thought_B + 1, 0)
        # Ids of one tag must not be taken for the beginning of the next one.
        self.recent_BK = torch.where((opens_B | closes_B)[:, None], -1, self.recent_BK)

    def _matched(self, tag: Tensor) -> Tensor:
        # With how many ids of the tag's beginning a row ends: the others are still to come, so a
        # tag that the model has begun is completed, and not begun a second time.
        size_B = torch.zeros_like(self.thought_B)
        for size in range(1, len(tag) + 1):
            is_equal_B = (self.recent_BK[:, -size:] == tag[:size]).all(dim=1)
            size_B = torch.where(is_equal_B, size, size_B)
        return size_B


# endregion
