# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 11: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "cross entropy with a sign",
        """
def response_log_prob(logits, tokens, prompt_length):
    targets = tokens[prompt_length:]
    return -F.cross_entropy(logits[prompt_length - 1 : -1], targets, reduction="sum")
""",
    ),
    (
        "2",
        "cross entropies of coins",
        """
def backward_kl(g, h):
    p = g.sigmoid()
    return p * (F.softplus(-h) - F.softplus(-g)) + (1 - p) * (F.softplus(h) - F.softplus(g))
""",
    ),
    (
        "3",
        "three all-reduces",
        """
def log_probs(logits_Tv, targets_T):
    largest = logits_Tv.max(-1).values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (logits_Tv - largest[:, None]).exp().sum(-1)
    dist.all_reduce(total)
    found = torch.zeros_like(total)
    for t, target in enumerate(targets_T.tolist()):
        if target // 5 == rank:
            found[t] = logits_Tv[t, target % 5] - largest[t]
    dist.all_reduce(found)
    return found - total.log()
""",
    ),
]

WRONG = [
    (
        "1",
        "the prompt counts",
        """
def response_log_prob(logits, tokens, prompt_length):
    return logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).sum()
""",
    ),
    (
        "1",
        "not shifted",
        """
def response_log_prob(logits, tokens, prompt_length):
    log_p = logits.log_softmax(-1)[prompt_length:]
    return log_p.gather(-1, tokens[prompt_length:, None]).sum()
""",
    ),
    (
        "1",
        "a mean",
        """
def response_log_prob(logits, tokens, prompt_length):
    log_p = logits.log_softmax(-1)[prompt_length - 1 : -1]
    return log_p.gather(-1, tokens[prompt_length:, None]).mean()
""",
    ),
    (
        "1",
        "the logarithm of a softmax",
        """
def response_log_prob(logits, tokens, prompt_length):
    log_p = logits.softmax(-1).log()[prompt_length - 1 : -1]
    return log_p.gather(-1, tokens[prompt_length:, None]).sum()
""",
    ),
    (
        "1",
        "without the end token",
        """
def response_log_prob(logits, tokens, prompt_length):
    log_p = logits.log_softmax(-1)[prompt_length - 1 : -2]
    return log_p.gather(-1, tokens[prompt_length:-1, None]).sum()
""",
    ),
    (
        "2",
        "arguments exchanged",
        """
def backward_kl(g, h):
    yes = h.sigmoid() * (F.logsigmoid(h) - F.logsigmoid(g))
    return yes + (-h).sigmoid() * (F.logsigmoid(-h) - F.logsigmoid(-g))
""",
    ),
    (
        "2",
        "one outcome alone",
        """
def backward_kl(g, h):
    return g.sigmoid() * (F.logsigmoid(g) - F.logsigmoid(h))
""",
    ),
    (
        "2",
        "log(1 - σ)",
        """
def backward_kl(g, h):
    p = g.sigmoid()
    yes = p * (F.logsigmoid(g) - F.logsigmoid(h))
    return yes + (1 - p) * ((1 - p).log() - (1 - h.sigmoid()).log())
""",
    ),
    (
        "3",
        "its own maximum",
        """
def log_probs(logits_Tv, targets_T):
    x = logits_Tv - logits_Tv.amax(-1)[:, None]
    row = targets_T - 5 * rank
    own = (row >= 0) & (row < 5)
    logit = torch.where(own, x.gather(-1, row.clamp(0, 4)[:, None])[:, 0], 0)
    both = torch.stack([logit, x.exp().sum(-1)])
    dist.all_reduce(both)
    return both[0] - both[1].log()
""",
    ),
    (
        "3",
        "masked after the all-reduce",
        """
def log_probs(logits_Tv, targets_T):
    largest = logits_Tv.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    x = logits_Tv - largest[:, None]
    row = targets_T - 5 * rank
    own = (row >= 0) & (row < 5)
    both = torch.stack([x.gather(-1, row.clamp(0, 4)[:, None])[:, 0], x.exp().sum(-1)])
    dist.all_reduce(both)
    return torch.where(own, both[0], 0) - both[1].log()
""",
    ),
    (
        "3",
        "a gather of the logits",
        """
def log_probs(logits_Tv, targets_T):
    full = torch.zeros(len(targets_T), 10, dtype=logits_Tv.dtype)
    full[:, 5 * rank : 5 * rank + 5] = logits_Tv
    dist.all_reduce(full)
    return full.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
""",
    ),
    (
        "3",
        "without a maximum",
        """
def log_probs(logits_Tv, targets_T):
    row = targets_T - 5 * rank
    own = (row >= 0) & (row < 5)
    logit = torch.where(own, logits_Tv.gather(-1, row.clamp(0, 4)[:, None])[:, 0], 0)
    both = torch.stack([logit, logits_Tv.exp().sum(-1)])
    dist.all_reduce(both)
    return both[0] - both[1].log()
""",
    ),
]
