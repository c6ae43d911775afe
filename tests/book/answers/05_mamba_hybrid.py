# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 5: other right ones than its solutions, and wrong ones."""

SEGSUM = """
def my_segsum(a):
    T = a.shape[-1]
    sums = a.double().cumsum(-1)
    difference = sums[..., :, None] - sums[..., None, :]
    future = torch.ones(T, T, dtype=torch.bool).triu({diagonal})
    return difference.masked_fill(future, {fill}).to(a.dtype)
"""

RIGHT = [
    (
        "1",
        "a masked copy of a, summed down its columns",
        """
def my_segsum(a):
    T = a.shape[-1]
    copies = a[..., :, None].expand(*a.shape, T)
    below = torch.ones(T, T, dtype=torch.bool).tril(-1)
    sums = copies.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
""",
    ),
    (
        "1",
        "torch.where",
        """
def my_segsum(a):
    T = a.shape[-1]
    sums = torch.cumsum(a, -1, dtype=torch.float64)
    past = torch.arange(T)[:, None] >= torch.arange(T)
    difference = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return torch.where(past, difference, -torch.inf).to(a.dtype)
""",
    ),
    (
        "2",
        "states and decays gathered as objects",
        """
def entering_state(decay, state):
    everyone = [None] * 4
    dist.all_gather_object(everyone, (decay, state))
    entering = torch.zeros_like(state)
    for decays, states in everyone[:rank]:
        entering = decays.view(-1, 1, 1) * entering + states
    return entering
""",
    ),
    (
        "2",
        "from rank to rank",
        """
def entering_state(decay, state):
    entering = torch.zeros_like(state)
    if rank > 0:
        dist.recv(entering, rank - 1)
    if rank < 3:
        dist.send((decay[:, None, None] * entering + state).contiguous(), rank + 1)
    return entering
""",
    ),
    (
        "3",
        "one layer's bytes in a dictionary of counts",
        """
def break_even(config):
    heads = config.mamba_heads * config.mamba_head_size
    layer = {
        "state": heads * config.state_size,
        "x": heads * config.conv_kernel,
        "B and C": 2 * config.mamba_groups * config.state_size * config.conv_kernel,
    }
    key_and_value = 2 * config.attention_groups * config.attention_head_size
    kinds = [sum(kind == letter for kind in config.pattern) for letter in "M*"]
    return kinds[0] * sum(layer.values()) / (kinds[1] * key_and_value)
""",
    ),
]

WRONG = [
    ("1", "no mask", SEGSUM.format(diagonal="T", fill="-torch.inf")),
    ("1", "the diagonal is masked too", SEGSUM.format(diagonal="0", fill="-torch.inf")),
    ("1", "zeros in place of −∞", SEGSUM.format(diagonal="1", fill="0.0")),
    (
        "1",
        "differences of fp32 sums",
        """
def my_segsum(a):
    T = a.shape[-1]
    sums = a.cumsum(-1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(future, -torch.inf)
""",
    ),
    (
        "2",
        "older states do not fade",
        """
def entering_state(decay, state):
    states = [torch.empty_like(state) for _ in range(4)]
    dist.all_gather(states, state.contiguous())
    return sum(states[:rank], torch.zeros_like(state))
""",
    ),
    (
        "2",
        "this rank's own state is in it",
        """
def entering_state(decay, state):
    everyone = [None] * 4
    dist.all_gather_object(everyone, (decay, state))
    entering = torch.zeros_like(state)
    for decays, states in everyone[: rank + 1]:
        entering = decays.view(-1, 1, 1) * entering + states
    return entering
""",
    ),
    (
        "2",
        "the answer of an earlier cell",
        "def entering_state(decay, state):\n    return entering[0].expand_as(state)\n",
    ),
    (
        "3",
        "without the convolution",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    token = 2 * config.attention_groups * config.attention_head_size
    layers, attention = config.pattern.count("M"), config.pattern.count("*")
    return layers * inner * config.state_size / (attention * token)
""",
    ),
    (
        "3",
        "a key and a value for each head",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    layer = inner * config.state_size + config.conv_kernel * channels
    token = config.attention_groups * config.attention_head_size
    return config.pattern.count("M") * layer / (config.pattern.count("*") * token)
""",
    ),
    (
        "1",
        "sums in fp32",
        """
def my_segsum(a):
    sums = a.cumsum(-1)
    future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(future, -torch.inf)
""",
    ),
    (
        "1",
        "zeros above the diagonal",
        """
def my_segsum(a):
    sums = a.double().cumsum(-1)
    future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).to(a.dtype).tril()
""",
    ),
    (
        "1",
        "no mask",
        """
def my_segsum(a):
    sums = a.double().cumsum(-1)
    future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).to(a.dtype)
""",
    ),
    (
        "1",
        "the mask by multiplication",
        """
def my_segsum(a):
    sums = a.double().cumsum(-1)
    future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).to(a.dtype) - torch.inf * future
""",
    ),
    (
        "1",
        "token j counts as well",
        """
def my_segsum(a):
    sums = a.double().cumsum(-1)
    future = torch.ones(2 * a.shape[-1:], dtype=torch.bool).triu(1)
    sums = sums[..., :, None] - sums[..., None, :] + a[..., None, :]
    return sums.to(a.dtype).masked_fill(future, -torch.inf)
""",
    ),
    (
        "2",
        "no decay",
        """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range(rank):
        entering = entering + states[earlier]
    return entering
""",
    ),
    (
        "2",
        "this rank's decay",
        """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range(rank):
        entering = decay[:, None, None] * entering + states[earlier]
    return entering
""",
    ),
    (
        "2",
        "the older state does not fade",
        """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range(rank):
        entering = entering + decays[earlier][:, None, None] * states[earlier]
    return entering
""",
    ),
    (
        "2",
        "this rank counts as well",
        """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range(rank + 1):
        entering = decays[earlier][:, None, None] * entering + states[earlier]
    return entering
""",
    ),
    (
        "2",
        "the rank before alone",
        """
def entering_state(decay, state):
    decays, states = ([torch.empty_like(t) for _ in range(4)] for t in (decay, state))
    dist.all_gather(decays, decay.contiguous())
    dist.all_gather(states, state.contiguous())
    entering = torch.zeros_like(state)
    for earlier in range(rank):
        entering = states[earlier]
    return entering
""",
    ),
    (
        "3",
        "without the convolution",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    key = config.attention_groups * config.attention_head_size
    ratio = config.pattern.count('M') / config.pattern.count('*')
    return ratio * inner * config.state_size / (2 * key)
""",
    ),
    (
        "3",
        "keys without values",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    key = config.attention_groups * config.attention_head_size
    ratio = config.pattern.count('M') / config.pattern.count('*')
    return ratio * (inner * config.state_size + config.conv_kernel * channels) / key
""",
    ),
    (
        "3",
        "x alone is convolved",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    key = config.attention_groups * config.attention_head_size
    ratio = config.pattern.count('M') / config.pattern.count('*')
    return ratio * (inner * config.state_size + config.conv_kernel * inner) / (2 * key)
""",
    ),
    (
        "3",
        "one input less",
        """
def break_even(config):
    inner = config.mamba_heads * config.mamba_head_size
    channels = inner + 2 * config.mamba_groups * config.state_size
    key = config.attention_groups * config.attention_head_size
    ratio = config.pattern.count('M') / config.pattern.count('*')
    return ratio * (inner * config.state_size + (config.conv_kernel - 1) * channels) / (2 * key)
""",
    ),
]
