# SPDX-License-Identifier: MIT-0
"""Chapter 5's scan in chunks with a backward pass that is written out by hand, and faster.

    python 05_mamba_hybrid/fast_scan.py                   proves it, then times it: 15 s on one core
    python 05_mamba_hybrid/fast_scan.py --tokens 16384

The chapter's `ssd` checkpoints each chunk: backward computes the chunk again, and differentiates
it. That repeats GEMMs whose results backward does not need. `fast_ssd` has the same arguments, the
same results and the same memory, and its backward computes the masked matrices alone again.

It proves every gradient of every head against the loop over tokens, in float64, for heads that keep
all and for heads that forget within a token. The exit code is 1 where one is wrong. Then it prints
its time and the chapter's, of alternating rounds, forward and backward.

Paper: Transformers are SSMs (Mamba-2), Dao and Gu, 2024, arXiv 2405.21060; this backward is ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from mamba_hybrid import (
    Mamba2Mixer,
    Scanned,
    Span,
    _chunk,
    _kept,
    _scan,
    segsum,
    ssd,
    ssd_recurrent,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

BOUND = 1e-12  # of each head's largest gradient; right code is near 1e-15

# ── 1 The backward pass of a chunk ──────────────────────────────────────────────────────────────
#
# It is the chain rule. `_chunk` has four GEMMs, and each of their factors gets one GEMM of the
# incoming gradient with the other factor. The decays need thought. Each is the exponential of a
# difference of running sums s_i = a_0 + … + a_i: L_ij = exp(s_i − s_j). So of the gradient dL_ij,
# M_ij = dL_ij · L_ij is added to ds_i and subtracted from ds_j:
#
#     ds_i = Σ_j M_ij − Σ_j M_ji           row sums minus column sums
#     da_t = ds_t + ds_{t+1} + …           a_t is a term of every s_i from t on
#
# The diagonal M_ii cancels in exact arithmetic. In a head that forgets within a token it is all
# that M has: its rounding errors would be larger than the true gradient. So it is set to zero
# first. (With it dA was off by 3 % at dt·A = −50, in float64 too.) Off the diagonal much still
# cancels, hence the float64 sums. The same holds for end_j = exp(s_last − s_j): at the last token
# it is constant.


def _chunk_backward(
    state_BGRPN: Tensor,
    X_BGRQP: Tensor,
    a_BGRQ1: Tensor,
    B_BG1QN: Tensor,
    C_BG1QN: Tensor,
    dy_BGRQP: Tensor,
    dstate_BGRPN: Tensor,
) -> tuple[Tensor, ...]:
    L_BGRQQ = segsum(a_BGRQ1[..., 0]).exp()
    kept_BGRQ1 = _kept(a_BGRQ1)
    end_BGRQ1 = L_BGRQQ[..., -1, :, None]
    scores_BG1QQ = C_BG1QN @ B_BG1QN.mT
    # X, through y and through the new state.
    dX_BGRQP = (L_BGRQQ * scores_BG1QQ).mT @ dy_BGRQP
    dX_BGRQP += end_BGRQ1 * (B_BG1QN @ dstate_BGRPN.mT)
    # B and C are shared by the heads of a group: their gradients are sums over heads.
    by_head_BGRQQ = (dy_BGRQP @ X_BGRQP.mT) * L_BGRQQ
    dscores_BG1QQ = by_head_BGRQQ.sum(2, keepdim=True)
    read_BGRQP = kept_BGRQ1 * dy_BGRQP
    from_read_BGRQN = read_BGRQP @ state_BGRPN
    from_write_BGRQN = (end_BGRQ1 * X_BGRQP) @ dstate_BGRPN
    dB_BG1QN = dscores_BG1QQ.mT @ C_BG1QN + from_write_BGRQN.sum(2, keepdim=True)
    dC_BG1QN = dscores_BG1QQ @ B_BG1QN + from_read_BGRQN.sum(2, keepdim=True)
    # The decays, through L, through what is read of the old state and written into the new one.
    M_BGRQQ = by_head_BGRQQ.mul_(scores_BG1QQ)
    M_BGRQQ.diagonal(dim1=-2, dim2=-1).zero_()
    wrote_BGRQ = (from_write_BGRQN * B_BG1QN).sum(-1, dtype=torch.float64)
    wrote_BGRQ[..., -1] = 0
    faded_BGRPN = kept_BGRQ1[..., -1:, :] * dstate_BGRPN
    ds_BGRQ = M_BGRQQ.sum(-1, dtype=torch.float64)
    ds_BGRQ -= M_BGRQQ.sum(-2, dtype=torch.float64)
    ds_BGRQ += (from_read_BGRQN * C_BG1QN).sum(-1, dtype=torch.float64)
    ds_BGRQ -= wrote_BGRQ
    ds_BGRQ[..., -1] += wrote_BGRQ.sum(-1)
    ds_BGRQ[..., -1] += (faded_BGRPN * state_BGRPN).sum((-1, -2), dtype=torch.float64)
    da_BGRQ1 = ds_BGRQ.flip(-1).cumsum(-1).flip(-1)[..., None]
    dstate_BGRPN = faded_BGRPN + read_BGRQP.mT @ C_BG1QN
    return dstate_BGRPN, dX_BGRQP, da_BGRQ1, dB_BG1QN, dC_BG1QN


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk, state_BGRPN, *inputs):  # X, a, B and C, tokens second to last
        y_BGRTP = torch.empty_like(inputs[0])
        states = []  # before each chunk
        ctx.chunks = [slice(i, i + chunk) for i in range(0, y_BGRTP.shape[3], chunk)]
        for tokens in ctx.chunks:
            states.append(state_BGRPN)
            of_chunk = [x[..., tokens, :] for x in inputs]
            y_BGRTP[..., tokens, :], state_BGRPN = _chunk(state_BGRPN, *of_chunk)
        ctx.save_for_backward(*inputs, *states)
        return y_BGRTP, state_BGRPN if states else state_BGRPN.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BGRTP, dstate_BGRPN):
        inputs = ctx.saved_tensors[:4]
        states = ctx.saved_tensors[4:]
        grads = [torch.empty_like(x) for x in inputs]
        # Inside autocast a backward pass would downcast its GEMMs.
        with torch.autocast(dy_BGRTP.device.type, enabled=False):
            # From the last chunk to the first: the state's gradient is handed backwards.
            for tokens, state_BGRPN in zip(reversed(ctx.chunks), reversed(states)):
                of_chunk = [x[..., tokens, :] for x in (*inputs, dy_BGRTP)]
                dstate_BGRPN, *parts = _chunk_backward(state_BGRPN, *of_chunk, dstate_BGRPN)
                for grad, part in zip(grads, parts):
                    grad[..., tokens, :] = part
        return None, dstate_BGRPN, *grads


def fast_ssd(
    X: Tensor, a: Tensor, B: Tensor, C: Tensor, chunk: int, initial_state: Tensor | None = None
) -> Scanned:
    """`ssd` of chapter 5: same arguments, results and errors; differentiable once.

    Source: Mamba-2, section 6 of arXiv 2405.21060; backward: ours.
    """
    if X.shape[2] % B.shape[2] or chunk < 1:
        found = f"{X.shape[2]} heads in {B.shape[2]} groups, chunk={chunk}"
        raise ValueError(f"{found}: groups must divide heads, and chunk be at least 1")
    return _scan(partial(_ChunkedSSD.apply, chunk), X, a, B, C, initial_state)


class FastMamba2Mixer(Mamba2Mixer):
    """`Mamba2Mixer` with `fast_ssd`: HybridLM(config, {**LAYERS, "M": FastMamba2Mixer}) has it."""

    def scan(self, X: Tensor, a: Tensor, B: Tensor, C: Tensor, span: Span) -> Tensor:
        return fast_ssd(X, a, B, C, self.config.chunk)[0]


# ── 2 The proof, and the time ───────────────────────────────────────────────────────────────────

LOG_DECAYS = [-1e-6, -1.0, -10.0, -25.0, -40.0, -50.0, -200.0, -5e3]


def example(tokens: int, heads: int, size: int, groups: int, state: int) -> list[Tensor]:
    """X, a, B and C of one sequence, fp64, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    of_random = partial(torch.randn, generator=generator, dtype=torch.float64)
    X = of_random(1, tokens, heads, size)
    a = -0.1 * of_random(1, tokens, heads).sigmoid()
    B = of_random(1, tokens, groups, state)
    C = of_random(1, tokens, groups, state)
    return [X, a, B, C]


def outputs_and_gradients(form: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """y, the last state, and the gradients of all inputs under fixed weights of both."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = form(*leaves)
    upstream = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def error(log_decay: float) -> float:
    """The worst error of any tensor, compared with the loop: a is `log_decay` at every token."""
    inputs = example(tokens=40, heads=4, size=3, groups=2, state=5)
    inputs[1].fill_(log_decay)
    right = outputs_and_gradients(ssd_recurrent, inputs)
    found = outputs_and_gradients(partial(fast_ssd, chunk=16), inputs)
    worst = 0.0
    for x, y in zip(found, right):
        scale = y.abs().max() + 1e-280  # below the smallest normal number nothing is relative
        gap = (x - y).abs().max() / scale
        worst = max(worst, gap.nan_to_num(torch.inf).item())
    return worst


def seconds(form: Callable, inputs: list[Tensor]) -> float:
    """Of one forward and backward pass."""
    begin = time.perf_counter()
    outputs_and_gradients(form, inputs)
    return time.perf_counter() - begin


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print("a = dt·A    worst error of any gradient, float64")
    errors = {log_decay: error(log_decay) for log_decay in LOG_DECAYS}
    for log_decay, found in errors.items():
        print(f"{log_decay:8g}    {found:.1e}")
    if max(errors.values()) > BOUND:
        sys.exit(f"FAILED: allowed {BOUND:.0e}")
    inputs = [x.to(torch.float32) for x in example(args.tokens, 8, 64, 1, 128)]
    times = {"ssd": [], "fast_ssd": []}
    for _ in range(args.rounds + 1):
        times["ssd"].append(seconds(partial(ssd, chunk=args.chunk), inputs))
        times["fast_ssd"].append(seconds(partial(fast_ssd, chunk=args.chunk), inputs))
    print(f"\n{args.tokens:,} tokens, 8 heads of 64, N 128, Q {args.chunk}, fp32, one thread")
    for name, found in times.items():
        print(f"{name:9} {1e3 * statistics.median(found[1:]):7.0f} ms")  # the first round warms up
    ratios = [slow / fast for slow, fast in zip(*times.values())]
    print(f"ssd / fast_ssd {statistics.median(ratios[1:]):.2f}")


def flags() -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]  # python -OO strips docstrings
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if min(vars(args).values()) < 1:
        parser.error("--tokens, --chunk and --rounds must be at least 1")
    return args


if __name__ == "__main__":
    main(flags())
