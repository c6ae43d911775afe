# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 8: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "the nearest of a table, ties to the even code",
        """
def to_e2m1(x):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    gap = (x.double().abs()[..., None] - table).abs()
    odd = torch.arange(8) % 2
    code = (gap + odd * 1e-12).argmin(-1)
    return (table[code] * x.sign()).float()
""",
    ),
    (
        "2",
        "amax and scales in a loop over rows",
        """
def block_scales(x):
    amax = float(x.abs().max())
    s_enc = torch.tensor(1.0) if amax == 0 else torch.tensor(2688.0) / torch.tensor(amax)
    factor = s_enc * torch.tensor(1 / 6)
    rows = [row.view(-1, 16).abs().max(dim=1).values * factor for row in x]
    return torch.stack(rows).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "3",
        "amax by hand, and a shard of the global draw",
        """
def round_shard(x_rC, seed):
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand((4 * len(x_rC), x_rC.shape[1]), generator=generator).chunk(4)[rank]
    return nf.nvfp4_quantize(x_rC.contiguous(), False, uniforms, dist.group.WORLD)
""",
    ),
]

WRONG = [
    (
        "1",
        "half steps everywhere",
        """
def to_e2m1(x):
    m = x.abs()
    return (2 * m).round() / 2 * x.sign()
""",
    ),
    (
        "1",
        "no sign",
        """
def to_e2m1(x):
    m = x.abs()
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    return (m / step).round() * step
""",
    ),
    (
        "1",
        "down",
        """
def to_e2m1(x):
    m = x.abs()
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    return (m / step).floor() * step * x.sign()
""",
    ),
    (
        "1",
        "ties away",
        """
def to_e2m1(x):
    m = x.abs()
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    return (m / step + 0.5).floor() * step * x.sign()
""",
    ),
    (
        "2",
        "amax without abs",
        """
def block_scales(x):
    amax = x.max()
    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)
    b = x.view(len(x), -1, 16).abs().amax(-1)
    return (b * (s * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "2",
        "block without abs",
        """
def block_scales(x):
    amax = x.abs().max()
    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)
    b = x.view(len(x), -1, 16).amax(-1)
    return (b * (s * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "2",
        "a mean",
        """
def block_scales(x):
    amax = x.abs().max()
    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)
    b = x.view(len(x), -1, 16).abs().mean(-1)
    return (b * (s * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "2",
        "not folded by 6",
        """
def block_scales(x):
    amax = x.abs().max()
    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)
    b = x.view(len(x), -1, 16).abs().amax(-1)
    return (b * s).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "2",
        "all blocks alike",
        """
def block_scales(x):
    amax = x.abs().max()
    s = torch.where(amax == 0, 1.0, torch.full_like(amax, 2688) / amax)
    b = x.view(len(x), -1, 16).abs().amax(-1) * 0 + amax
    return (b * (s * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
""",
    ),
    (
        "3",
        "its own amax",
        """
def round_shard(x, seed):
    n = len(x)
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(4 * n, 32, generator=g)[rank * n : rank * n + n]
    return nf.nvfp4_quantize(x, uniforms=u, amax_group=None)
""",
    ),
    (
        "3",
        "the same draw on each rank",
        """
def round_shard(x, seed):
    n = len(x)
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 32, generator=g)
    return nf.nvfp4_quantize(x, uniforms=u, amax_group=dist.group.WORLD)
""",
    ),
    (
        "3",
        "the first rank's rows",
        """
def round_shard(x, seed):
    n = len(x)
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(4 * n, 32, generator=g)[:n]
    return nf.nvfp4_quantize(x, uniforms=u, amax_group=dist.group.WORLD)
""",
    ),
    (
        "3",
        "nearest",
        """
def round_shard(x, seed):
    n = len(x)
    g = torch.Generator().manual_seed(seed)
    u = None
    return nf.nvfp4_quantize(x, uniforms=u, amax_group=dist.group.WORLD)
""",
    ),
]
