# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 12: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "the factor G / (G − 1)",
        """
def advantages_of(rewards):
    size = len(rewards)
    return (rewards - rewards.mean()) * size / (size - 1)
""",
    ),
    (
        "1",
        "a loop",
        """
def advantages_of(rewards):
    found = []
    for i in range(len(rewards)):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        found.append(rewards[i] - others.mean())
    return torch.stack(found)
""",
    ),
    (
        "2",
        "the larger loss",
        """
def clipped_loss(log_prob, old, A):
    ratio = torch.exp(log_prob - old)
    return torch.max(-ratio * A, -ratio.clamp(1 - 0.2, 1 + 0.28) * A)
""",
    ),
    (
        "2",
        "by the sign of A",
        """
def clipped_loss(log_prob, old, A):
    ratio = (log_prob - old).exp()
    return -torch.where(A > 0, ratio.clamp(max=1.28), ratio.clamp(min=0.8)) * A
""",
    ),
    (
        "3",
        "a tensor of two",
        """
def global_mean(loss_sum, count):
    totals = torch.zeros(2, dtype=torch.float64)
    totals[0], totals[1] = loss_sum, count
    dist.all_reduce(totals)
    return totals[0] / max(1.0, totals[1].item())
""",
    ),
]

WRONG = [
    (
        "1",
        "divided by the deviation",
        """
def advantages_of(rewards):
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return (rewards - others) / rewards.std()
""",
    ),
    (
        "1",
        "the mean of the others, and of itself",
        """
def advantages_of(rewards):
    return rewards - (rewards.sum() - rewards) / len(rewards)
""",
    ),
    (
        "2",
        "clipped on both sides",
        """
def clipped_loss(log_prob, old, A):
    return -(log_prob - old).exp().clamp(0.8, 1.28) * A
""",
    ),
    (
        "2",
        "symmetric",
        """
def clipped_loss(log_prob, old, A):
    ratio = (log_prob - old).exp()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
""",
    ),
    (
        "2",
        "the ratio without gradient",
        """
def clipped_loss(log_prob, old, A):
    ratio = (log_prob - old).exp().detach()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A) + 0 * log_prob
""",
    ),
    (
        "2",
        "the larger gain",
        """
def clipped_loss(log_prob, old, A):
    ratio = (log_prob - old).exp()
    return -torch.maximum(ratio * A, ratio.clamp(0.8, 1.28) * A)
""",
    ),
    (
        "3",
        "a mean of means",
        """
def global_mean(loss_sum, count):
    mean = loss_sum / count.clamp(min=1)
    dist.all_reduce(mean)
    return mean / 2
""",
    ),
    (
        "3",
        "two messages",
        """
def global_mean(loss_sum, count):
    total = loss_sum.clone()
    tokens = count.clone()
    dist.all_reduce(total)
    dist.all_reduce(tokens)
    return total / tokens.clamp(min=1)
""",
    ),
    (
        "3",
        "divided by zero",
        """
def global_mean(loss_sum, count):
    both = torch.stack([loss_sum, count.to(loss_sum.dtype)])
    dist.all_reduce(both)
    return both[0] / both[1]
""",
    ),
]
