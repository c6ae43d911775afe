# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 3: other right ones than its solutions, and wrong ones."""

STEP = """
def one_micro_batch(stage, tokens, targets):
    x = tokens
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        {leaf}
    y = stage(rank, x)
    if rank == 3:
        pl.token_losses(y, targets).mean().backward()
    else:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        {backward}
    if rank > 0:
        dist.send(x.grad, rank - 1)
"""

RIGHT = [
    (
        "1",
        "as two queues",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        lead = 2 * (p - 1 - rank)
        forwards = [pl.Op("F", i, rank) for i in range(m)]
        ops, forwards = forwards[:lead], forwards[lead:]
        for i in range(m):
            ops += forwards[:1] + [pl.Op("B", i, rank)]
            forwards = forwards[1:]
            if i >= 2 * rank:
                ops.append(pl.Op("W", i - 2 * rank, rank))
        ops += [pl.Op("W", i, rank) for i in range(max(0, m - 2 * rank), m)]
        table.append(ops)
    return table
""",
    ),
    (
        "2",
        "torch.autograd.backward on a clone that needs a gradient",
        STEP.format(
            leaf="x = x.clone().requires_grad_(True)",
            backward="torch.autograd.backward([y], [grad])",
        ),
    ),
    (
        "2",
        "a product with the gradient that arrives",
        STEP.format(leaf="x.requires_grad_()", backward="(y * grad).sum().backward()"),
    ),
    (
        "3",
        "a power",
        "def best_b(n, p, fixed, each):\n    return (n / (p - 1) * fixed / each) ** 0.5\n",
    ),
    (
        "3",
        "a search",
        """
def best_b(n, p, fixed, each):
    low, high = 1e-3, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        slope = (p - 1) * each - n * fixed / middle**2
        low, high = (middle, high) if slope < 0 else (low, middle)
    return low
""",
    ),
]

WRONG = [
    (
        "1",
        "the lead of zb-h1",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = p - rank - 1, 2 * rank
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "1",
        "no W may wait",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = 2 * (p - rank - 1), 0
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "1",
        "all forwards first",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = m, m
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "1",
        "the W that wait are lost",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = 2 * (p - rank - 1), 2 * rank
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + [])
    return table
""",
    ),
    (
        "2",
        "the gradient that arrives is not used",
        """
def one_micro_batch(stage, tokens, targets):
    x = tokens
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    y = stage(rank, x)
    if rank == 3:
        pl.token_losses(y, targets).mean().backward()
    else:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.sum().backward()
    if rank > 0:
        dist.send(x.grad, rank - 1)
""",
    ),
    (
        "2",
        "the gradient is halved",
        """
def one_micro_batch(stage, tokens, targets):
    x = tokens
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    y = stage(rank, x)
    if rank == 3:
        pl.token_losses(y, targets).mean().backward()
    else:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.backward(grad / 2)
    if rank > 0:
        dist.send(x.grad, rank - 1)
""",
    ),
    (
        "3",
        "p in place of p - 1",
        """
def best_b(n, p, fixed, each):
    return math.sqrt(n * fixed / (p * each))
""",
    ),
    (
        "3",
        "upside down",
        """
def best_b(n, p, fixed, each):
    return math.sqrt((p - 1) * each / (n * fixed))
""",
    ),
    (
        "3",
        "without the root",
        """
def best_b(n, p, fixed, each):
    return n * fixed / ((p - 1) * each)
""",
    ),
    (
        "1",
        "more forwards alone",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = 2 * (p - rank - 1), rank
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "1",
        "all forwards first",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = m, 2 * rank
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "1",
        "W's are left out",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = 2 * (p - rank - 1), 2 * rank
        ops, waiting = [pl.Op("F", i, rank) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, rank))
            ops.append(pl.Op("B", i, rank))
            waiting.append(pl.Op("W", i, rank))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops)
    return table
""",
    ),
    (
        "1",
        "all on the first stage",
        """
def zb_h2(p, m):
    table = []
    for rank in range(p):
        ahead, may_wait = 2 * (p - rank - 1), 2 * rank
        ops, waiting = [pl.Op("F", i, 0) for i in range(min(ahead, m))], []
        for i in range(m):
            if ahead + i < m:
                ops.append(pl.Op("F", ahead + i, 0))
            ops.append(pl.Op("B", i, 0))
            waiting.append(pl.Op("W", i, 0))
            if len(waiting) > may_wait:
                ops.append(waiting.pop(0))
        table.append(ops + waiting)
    return table
""",
    ),
    (
        "2",
        "the sum of losses",
        """
def one_micro_batch(stage, tokens, targets):
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    else:
        x = tokens
    y = stage(rank, x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.backward(grad)
    else:
        pl.token_losses(y, targets).sum().backward()
    if rank > 0:
        dist.send(x.grad, rank - 1)
""",
    ),
    (
        "2",
        "the gradient is not used",
        """
def one_micro_batch(stage, tokens, targets):
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    else:
        x = tokens
    y = stage(rank, x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.sum().backward()
    else:
        pl.token_losses(y, targets).mean().backward()
    if rank > 0:
        dist.send(x.grad, rank - 1)
""",
    ),
    (
        "2",
        "zeros are sent back",
        """
def one_micro_batch(stage, tokens, targets):
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        pass
    else:
        x = tokens
    y = stage(rank, x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.backward(grad)
    else:
        pl.token_losses(y, targets).mean().backward()
    if rank > 0:
        dist.send(torch.zeros_like(x), rank - 1)
""",
    ),
    (
        "2",
        "the gradient is passed on",
        """
def one_micro_batch(stage, tokens, targets):
    if rank > 0:
        x = torch.empty(*tokens.shape, 16, dtype=torch.float64)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    else:
        x = tokens
    y = stage(rank, x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        grad = torch.empty_like(y)
        dist.recv(grad, rank + 1)
        y.backward(grad)
    else:
        pl.token_losses(y, targets).mean().backward()
    if rank > 0:
        dist.send(grad if rank < 3 else x.grad, rank - 1)
""",
    ),
    (
        "3",
        "the root is left out",
        """
def best_b(n, p, fixed, each): return n * fixed / ((p - 1) * each)
""",
    ),
    (
        "3",
        "p for p - 1",
        """
def best_b(n, p, fixed, each): return math.sqrt(n * fixed / (p * each))
""",
    ),
    (
        "3",
        "upside down",
        """
def best_b(n, p, fixed, each): return math.sqrt((p - 1) * each / (n * fixed))
""",
    ),
    (
        "3",
        "one micro-batch",
        """
def best_b(n, p, fixed, each): return n
""",
    ),
]
