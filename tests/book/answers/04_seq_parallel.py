# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 4: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "torch's own collectives",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        y = torch.empty(2)
        dist.reduce_scatter_tensor(y, partial_x.contiguous())
        return y

    @staticmethod
    def backward(ctx, grad):
        whole = torch.empty(8)
        dist.all_gather_into_tensor(whole, grad.contiguous())
        return whole
""",
    ),
    (
        "1",
        "partial sums are gathered as objects",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        everyone = [None] * 4
        dist.all_gather_object(everyone, partial_x)
        return sum(everyone).chunk(4)[rank].clone()

    @staticmethod
    def backward(ctx, grad):
        everyone = [None] * 4
        dist.all_gather_object(everyone, grad)
        return torch.cat(everyone)
""",
    ),
    (
        "2",
        "all partial gradients in one message",
        """
def sum_partial_gradients(model):
    partial = [p for p in model.parameters() if p.sequence_parallel]
    flat = torch.cat([p.grad.flatten() for p in partial])
    dist.all_reduce(flat)
    for p, total in zip(partial, flat.split([p.numel() for p in partial])):
        p.grad = total.view_as(p)
""",
    ),
    (
        "2",
        "gathered as objects",
        """
def sum_partial_gradients(model):
    partial = {name: p for name, p in model.named_parameters() if p.sequence_parallel}
    everyone = [None] * 4
    dist.all_gather_object(everyone, {name: p.grad for name, p in partial.items()})
    for name, p in partial.items():
        p.grad = sum(grads[name] for grads in everyone)
""",
    ),
    (
        "3",
        "added up",
        """
def bytes_without_dropout(s, b, h, a, t):
    activations = 32 * s * b * h
    probabilities = 2 * a * s * s * b
    return (activations + probabilities) / t
""",
    ),
    (
        "3",
        "as one product",
        "def bytes_without_dropout(s, b, h, a, t):\n    return 2 * s * b * (16 * h + a * s) / t\n",
    ),
]
WRONG = [
    (
        "1",
        "no sum",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        return partial_x.chunk(4)[rank].clone()

    @staticmethod
    def backward(ctx, grad):
        pieces = [torch.empty_like(grad) for _ in range(4)]
        dist.all_gather(pieces, grad)
        return torch.cat(pieces)
""",
    ),
    (
        "1",
        "no gather",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        total = partial_x.clone(); dist.all_reduce(total); return total.chunk(4)[rank].clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.repeat(4)
""",
    ),
    (
        "1",
        "the input is modified",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        total = partial_x; dist.all_reduce(total); return total.chunk(4)[rank].clone()

    @staticmethod
    def backward(ctx, grad):
        pieces = [torch.empty_like(grad) for _ in range(4)]
        dist.all_gather(pieces, grad)
        return torch.cat(pieces)
""",
    ),
    (
        "1",
        "the first rank's tokens",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        total = partial_x.clone(); dist.all_reduce(total); return total.chunk(4)[0].clone()

    @staticmethod
    def backward(ctx, grad):
        pieces = [torch.empty_like(grad) for _ in range(4)]
        dist.all_gather(pieces, grad)
        return torch.cat(pieces)
""",
    ),
    (
        "1",
        "the mean in backward",
        """
class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial_x):
        total = partial_x.clone(); dist.all_reduce(total); return total.chunk(4)[rank].clone()

    @staticmethod
    def backward(ctx, grad):
        pieces = [torch.empty_like(grad) for _ in range(4)]
        dist.all_gather(pieces, grad)
        return torch.cat(pieces) / 4
""",
    ),
    (
        "2",
        "all gradients",
        """def sum_partial_gradients(model):
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)""",
    ),
    (
        "2",
        "none",
        """def sum_partial_gradients(model):
    for name, p in model.named_parameters():
        pass""",
    ),
    (
        "2",
        "the others",
        """def sum_partial_gradients(model):
    for name, p in model.named_parameters():
        if not p.sequence_parallel: dist.all_reduce(p.grad)""",
    ),
    (
        "2",
        "a mean",
        """def sum_partial_gradients(model):
    for name, p in model.named_parameters():
        if p.sequence_parallel: dist.all_reduce(p.grad); p.grad /= 4""",
    ),
    (
        "2",
        "biases alone",
        """def sum_partial_gradients(model):
    for name, p in model.named_parameters():
        if name.endswith('bias'): dist.all_reduce(p.grad)""",
    ),
    (
        "3",
        "with dropout",
        """def bytes_without_dropout(s, b, h, a, t): return s * b * h * (34 + 5 * a * s / h) / t""",
    ),
    (
        "3",
        "two masks less",
        """def bytes_without_dropout(s, b, h, a, t): return s * b * h * (32 + 5 * a * s / h) / t""",
    ),
    (
        "3",
        "softmax twice",
        """def bytes_without_dropout(s, b, h, a, t): return s * b * h * (32 + 4 * a * s / h) / t""",
    ),
    (
        "3",
        "on one rank",
        """def bytes_without_dropout(s, b, h, a, t): return s * b * h * (32 + 2 * a * s / h)""",
    ),
]
