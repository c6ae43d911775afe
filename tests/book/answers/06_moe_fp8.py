# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 6: other right ones than its solutions, and wrong ones."""

ALL_TO_ALL = """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
{backward}
"""
DELAYED = """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        amax = {amax}
        scale = torch.tensor(self.most / amax if amax else 1.0)
        scaled = x * scale
        codes = {codes}.to(fp8.FP8_FORMATS[self.format])
        if {finite}:
            self.history = [*self.history, new][-self.length :]
        return fp8.Quantized(codes, 1 / scale, None)
"""
CUT = "scaled.clamp(-self.most, self.most)"
HISTORY = "max(self.history, default=0.0)"

RIGHT = [
    (
        "1",
        "counts gathered as objects, compared with the mean",
        """
def move_bias(bias_E, experts_TK, gamma):
    everyone = [None] * 4
    dist.all_gather_object(everyone, experts_TK.flatten().tolist())
    counts = [sum(own.count(e) for own in everyone) for e in range(len(bias_E))]
    mean = sum(counts) / len(counts)
    sign = [(count > mean) - (count < mean) for count in counts]
    return bias_E - gamma * torch.tensor(sign, dtype=bias_E.dtype)
""",
    ),
    (
        "1",
        "bincount",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts = torch.bincount(experts_TK.flatten(), minlength=len(bias_E))
    dist.all_reduce(counts)
    return bias_E + gamma * torch.sign(counts.double().mean() - counts).to(bias_E.dtype)
""",
    ),
    (
        "2",
        "lists of tensors",
        ALL_TO_ALL.format(
            backward="""
        width = grad_rH.shape[1]
        there = [piece.contiguous() for piece in grad_rH.split(ctx.receive)]
        everyone = [None] * 4
        dist.all_gather_object(everyone, there)
        pieces = [everyone[j][rank] for j in range(4)]
        return torch.cat(pieces).view(-1, width), None, None
"""
        ),
    ),
    (
        "2",
        "a Function of its own with the splits exchanged",
        ALL_TO_ALL.format(
            backward="""
        return AllToAll.apply(grad_rH.contiguous(), ctx.receive, ctx.send), None, None
"""
        ),
    ),
    (
        "3",
        "written another way",
        DELAYED.format(amax=HISTORY, codes=CUT, finite="math.isfinite(new)").replace(
            "class", "import math\n\nclass", 1
        ),
    ),
]

WRONG = [
    (
        "1",
        "each rank moves by its own counts",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    return bias_E - gamma * (counts_E - counts_E.double().mean()).sign()
""",
    ),
    (
        "1",
        "in the wrong direction",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    dist.all_reduce(counts_E)
    return bias_E + gamma * (counts_E - counts_E.double().mean()).sign()
""",
    ),
    (
        "1",
        "by the difference itself",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    dist.all_reduce(counts_E)
    return bias_E - gamma * (counts_E - counts_E.double().mean())
""",
    ),
    (
        "2",
        "the splits are not exchanged",
        ALL_TO_ALL.format(
            backward="""
        grad_RH = grad_rH.new_zeros(sum(ctx.send), grad_rH.shape[1])
        count = min(len(grad_RH), len(grad_rH))
        grad_RH[:count] = grad_rH[:count]
        return grad_RH, None, None
"""
        ),
    ),
    (
        "2",
        "zeros",
        ALL_TO_ALL.format(
            backward="""
        return grad_rH.new_zeros(sum(ctx.send), grad_rH.shape[1]), None, None
"""
        ),
    ),
    (
        "3",
        "this tensor's own amax",
        DELAYED.format(amax="new", codes=CUT, finite="new < float('inf')"),
    ),
    (
        "3",
        "the last tensor's amax alone",
        DELAYED.format(amax="(self.history or [0.0])[-1]", codes=CUT, finite="new < float('inf')"),
    ),
    (
        "3",
        "what outgrows the history is not cut off",
        DELAYED.format(amax=HISTORY, codes="(scaled % self.most)", finite="new < float('inf')"),
    ),
    ("3", "an infinity enters the history", DELAYED.format(amax=HISTORY, codes=CUT, finite="True")),
    (
        "1",
        "local counts",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    return bias_E - gamma * (counts_E * len(counts_E) - counts_E.sum()).sign()
""",
    ),
    (
        "1",
        "the wrong direction",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    dist.all_reduce(counts_E)
    return bias_E + gamma * (counts_E * len(counts_E) - counts_E.sum()).sign()
""",
    ),
    (
        "1",
        "no sign",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    dist.all_reduce(counts_E)
    return bias_E - gamma * (counts_E * len(counts_E) - counts_E.sum())
""",
    ),
    (
        "1",
        "the mean of the ranks' steps",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    step_E = (counts_E * len(counts_E) - counts_E.sum()).sign().double()
    dist.all_reduce(step_E)
    return bias_E - gamma * step_E / 4
""",
    ),
    (
        "1",
        "the mean counts as overloaded",
        """
def move_bias(bias_E, experts_TK, gamma):
    counts_E = moe.count_rows(experts_TK, len(bias_E))
    dist.all_reduce(counts_E)
    return bias_E - gamma * (2 * ((counts_E * len(counts_E) - counts_E.sum()) >= 0) - 1)
""",
    ),
    (
        "2",
        "gradients stay",
        """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
        grad_RH = grad_rH.new_empty(sum(ctx.send), grad_rH.shape[1])
        grad_RH.zero_()
        return grad_RH, None, None
""",
    ),
    (
        "2",
        "splits not exchanged",
        """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
        grad_RH = grad_rH.new_empty(sum(ctx.send), grad_rH.shape[1])
        dist.all_to_all_single(grad_RH, grad_rH.contiguous(), ctx.receive, ctx.send)
        return grad_RH, None, None
""",
    ),
    (
        "2",
        "equal pieces",
        """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
        grad_RH = grad_rH.new_empty(sum(ctx.send), grad_rH.shape[1])
        dist.all_to_all_single(grad_RH, grad_rH.contiguous())
        return grad_RH, None, None
""",
    ),
    (
        "2",
        "the mean over the ranks",
        """
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, send, receive):
        ctx.send, ctx.receive = send, receive
        there_rH = rows_RH.new_empty(sum(receive), rows_RH.shape[1])
        dist.all_to_all_single(there_rH, rows_RH, receive, send)
        return there_rH

    @staticmethod
    def backward(ctx, grad_rH):
        grad_RH = grad_rH.new_empty(sum(ctx.send), grad_rH.shape[1])
        dist.all_to_all_single(grad_RH, grad_rH.contiguous(), ctx.send, ctx.receive)
        return grad_RH / 4, None, None
""",
    ),
    (
        "3",
        "current scaling",
        """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        if new < float('inf'): self.history = [*self.history, new][-self.length :]
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = (x * scale).clamp(-self.most, self.most)

        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
""",
    ),
    (
        "3",
        "the scale and its inverse exchanged",
        """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        pass
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = (x / scale).clamp(-self.most, self.most)
        if new < float('inf'): self.history = [*self.history, new][-self.length :]
        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
""",
    ),
    (
        "3",
        "infinity enters the history",
        """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        pass
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = (x * scale).clamp(-self.most, self.most)
        self.history = [*self.history, new][-self.length :]
        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
""",
    ),
    (
        "3",
        "the history never ends",
        """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        pass
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = (x * scale).clamp(-self.most, self.most)
        if new < float('inf'): self.history += [new]
        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
""",
    ),
    (
        "3",
        "the last amax alone",
        """
class DelayedScaling:
    def __init__(self, format="e4m3", length=4):
        self.format, self.length, self.history = format, length, []
        self.most = torch.finfo(fp8.FP8_FORMATS[format]).max

    def quantize(self, x):
        new = x.abs().max().item()
        pass
        amax = max(self.history, default=0.0)
        scale = torch.tensor(self.most / amax if amax else 1.0)
        codes = (x * scale).clamp(-self.most, self.most)
        if new < float('inf'): self.history = [new]
        return fp8.Quantized(codes.to(fp8.FP8_FORMATS[self.format]), 1 / scale, None)
""",
    ),
]
