# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 2: other right ones than its solutions, and wrong ones."""

COPY = """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return {forward}

    @staticmethod
    def backward(ctx, grad):
{backward}
"""

RIGHT = [
    (
        "1",
        "gradients are gathered as objects",
        COPY.format(
            forward="x.clone()",
            backward="""
        everyone = [None] * 4
        dist.all_gather_object(everyone, grad)
        return sum(everyone)
""",
        ),
    ),
    (
        "1",
        "reduce and broadcast",
        COPY.format(
            forward="x.view_as(x)",
            backward="""
        total = grad.clone()
        dist.reduce(total, 0)
        dist.broadcast(total, 0)
        return total
""",
        ),
    ),
    (
        "2",
        "value and token id are gathered as objects",
        """
def most_probable_token(logits_v):
    best = [None] * 4
    token = rank * len(logits_v) + int(logits_v.argmax())
    dist.all_gather_object(best, (logits_v.max().item(), token))
    return max(best)[1]
""",
    ),
    (
        "2",
        "both in one tensor",
        """
def most_probable_token(logits_v):
    mine = torch.stack([logits_v.max(), (rank * len(logits_v) + logits_v.argmax()).double()])
    everyone = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(everyone, mine)
    return int(max(everyone, key=lambda pair: pair[0])[1])
""",
    ),
    (
        "3",
        "replicated squares count a quarter on each rank",
        """
def global_norm(shards, replicated):
    total = shards.square().sum() + replicated.square().sum() / 4
    dist.all_reduce(total)
    return total.sqrt()
""",
    ),
    (
        "3",
        "rank 0 alone adds the replicated elements",
        """
def global_norm(shards, replicated):
    total = shards.norm() ** 2
    if rank == 0:
        total = total + replicated.norm() ** 2
    dist.all_reduce(total)
    return total.sqrt()
""",
    ),
]
WRONG = [
    (
        "1",
        "no all-reduce",
        """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad
""",
    ),
    (
        "1",
        "the caller's gradient is modified",
        """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad); return grad
""",
    ),
    (
        "1",
        "the mean over ranks",
        """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(); dist.all_reduce(total); return total / 4
""",
    ),
    (
        "1",
        "an all-reduce in forward",
        """
class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clone(); dist.all_reduce(y); return y

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(); dist.all_reduce(total); return total
""",
    ),
    ("2", "nothing", """def most_probable_token(logits_v): return None"""),
    ("2", "a row of the shard", """def most_probable_token(logits_v): return logits_v.argmax()"""),
    (
        "2",
        "the local token",
        """def most_probable_token(logits_v): return logits_v.argmax() + rank * len(logits_v)""",
    ),
    (
        "2",
        "the last rank's token",
        """
def most_probable_token(logits_v):
    token = logits_v.argmax() + rank * len(logits_v)
    dist.all_reduce(token, dist.ReduceOp.MAX)
    return token
""",
    ),
    (
        "2",
        "all logits gathered",
        """
def most_probable_token(logits_v):
    pieces = [torch.empty_like(logits_v) for _ in range(4)]
    dist.all_gather(pieces, logits_v)
    return torch.cat(pieces).argmax()
""",
    ),
    (
        "3",
        "replicated elements count four times",
        """
def global_norm(shards, replicated):
    total = shards.square().sum() + replicated.square().sum()
    dist.all_reduce(total)
    return total.sqrt()
""",
    ),
    (
        "3",
        "the local norm",
        """
def global_norm(shards, replicated):
    return (shards.square().sum() + replicated.square().sum()).sqrt()
""",
    ),
    (
        "3",
        "a sum of norms",
        """
def global_norm(shards, replicated):
    total = shards.norm()
    dist.all_reduce(total)
    return total + replicated.norm()
""",
    ),
    (
        "3",
        "rank 0 alone has the sum",
        """
def global_norm(shards, replicated):
    total = shards.square().sum()
    dist.reduce(total, 0)
    return (total + replicated.square().sum()).sqrt()
""",
    ),
    (
        "3",
        "a missing import",
        """
def global_norm(shards, replicated):
    return itertools.accumulate(shards)
""",
    ),
]
