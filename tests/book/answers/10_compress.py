# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 10: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "sequence by sequence",
        """
def score_of(y_BTC, counted_BT):
    means = [y[m].abs().mean(0) for y, m in zip(y_BTC, counted_BT) if m.any()]
    return torch.stack(means).norm(dim=0)
""",
    ),
    (
        "2",
        "a loop over groups",
        """
def heads_that_stay(score_H, groups, count):
    R = len(score_H) // groups
    found = []
    for g in range(groups):
        heads = sorted(range(g * R, (g + 1) * R), key=lambda h: -score_H[h].item())
        found += sorted(heads[: count // groups])
    return torch.tensor(found)
""",
    ),
    (
        "3",
        "two log-sum-exps and one expectation",
        """
def lse(x):
    m = x.amax(-1)
    dist.all_reduce(m, dist.ReduceOp.MAX)
    total = (x - m[..., None]).exp().sum(-1)
    dist.all_reduce(total)
    return m + total.log()


def kl(student_BTv, teacher_BTv):
    q = student_BTv - lse(student_BTv)[..., None]
    p = teacher_BTv - lse(teacher_BTv)[..., None]
    found = (p.exp() * (p - q)).sum(-1)
    dist.all_reduce(found)
    return found
""",
    ),
]

WRONG = [
    (
        "1",
        "padding counts",
        """
def score_of(y_BTC, counted_BT):
    return y_BTC.abs().mean(1).norm(dim=0)
""",
    ),
    (
        "1",
        "padding is zero, and divides",
        """
def score_of(y_BTC, counted_BT):
    return (y_BTC.abs() * counted_BT[..., None]).mean(1).norm(dim=0)
""",
    ),
    (
        "1",
        "squares of tokens",
        """
def score_of(y_BTC, counted_BT):
    total = (y_BTC.square() * counted_BT[..., None]).sum(1)
    return (total / counted_BT.sum(1)[:, None].clamp(min=1)).sum(0).sqrt()
""",
    ),
    (
        "1",
        "without abs",
        """
def score_of(y_BTC, counted_BT):
    total = (y_BTC * counted_BT[..., None]).sum(1)
    return (total / counted_BT.sum(1)[:, None].clamp(min=1)).norm(dim=0)
""",
    ),
    (
        "2",
        "by score, not ascending",
        """
def heads_that_stay(score_H, groups, count):
    best = score_H.view(groups, -1).topk(count // groups, dim=1).indices
    return (best + torch.arange(groups)[:, None] * (len(score_H) // groups)).flatten()
""",
    ),
    (
        "2",
        "places within the group",
        """
def heads_that_stay(score_H, groups, count):
    best = score_H.view(groups, -1).topk(count // groups, dim=1).indices
    return best.sort(dim=1).values.flatten()
""",
    ),
    (
        "2",
        "the same places in each group",
        """
def heads_that_stay(score_H, groups, count):
    score_GR = score_H.view(groups, -1)
    best = score_GR.sum(0).topk(count // groups).indices.sort().values
    return (best + torch.arange(groups)[:, None] * score_GR.shape[1]).flatten()
""",
    ),
    (
        "3",
        "no maximum",
        """
def kl(student_BTv, teacher_BTv):
    p = teacher_BTv.exp()
    cross = (p * (teacher_BTv - student_BTv)).sum(-1)
    sums = torch.stack([student_BTv.exp().sum(-1), p.sum(-1), cross])
    dist.all_reduce(sums)
    return sums[2] / sums[1] - sums[1].log() + sums[0].log()
""",
    ),
    (
        "3",
        "each rank's own maximum",
        """
def kl(student_BTv, teacher_BTv):
    s = student_BTv - student_BTv.amax(-1, keepdim=True)
    t = teacher_BTv - teacher_BTv.amax(-1, keepdim=True)
    p = t.exp()
    sums = torch.stack([s.exp().sum(-1), p.sum(-1), (p * (t - s)).sum(-1)])
    dist.all_reduce(sums)
    return sums[2] / sums[1] - sums[1].log() + sums[0].log()
""",
    ),
    (
        "3",
        "KL(student ‖ teacher)",
        """
def kl(teacher_BTv, student_BTv):
    m = torch.stack([student_BTv.amax(-1), teacher_BTv.amax(-1)])
    dist.all_reduce(m, dist.ReduceOp.MAX)
    s, t = student_BTv - m[0][..., None], teacher_BTv - m[1][..., None]
    p = t.exp()
    sums = torch.stack([s.exp().sum(-1), p.sum(-1), (p * (t - s)).sum(-1)])
    dist.all_reduce(sums)
    return sums[2] / sums[1] - sums[1].log() + sums[0].log()
""",
    ),
]
