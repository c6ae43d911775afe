# SPDX-License-Identifier: MIT-0
"""Chapter 10, second half. Depth by the logits, and distillation over a sharded vocabulary.

Papers: as in compress.py; and Distilling the Knowledge in a Neural Network, Hinton et al., 2015,
        arXiv 1503.02531

A layer that is left out changes the logits, and the layer that changes them least is removed. The
pruned model is then trained to reproduce the logits of the large one. Both compare two outputs of
size V per token, and V is sharded over tp ranks: a few scalars per token are sent, and no logits.

    python 10_compress/distill.py               2 local ranks that share each layer
    python 10_compress/distill.py --check       equivalence alone, the error of each tensor

It trains a large model, removes a layer and about half of the width, distills three students on
the same tokens, and prints the claims that it measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from compress import (
    BOUNDS,
    STEPS,
    Args,
    Autocast,
    Batches,
    Group,
    HybridConfig,
    HybridLM,
    Loss,
    Mesh,
    Options,
    _reduce_over,
    at_least_fp32,
    best,
    check_args,
    check_case,
    cross_entropy,
    demonstrate,
    dtypes,
    evaluate,
    gathered,
    gradients,
    group_rank,
    group_size,
    launch,
    make_mesh,
    make_optimizer,
    of_replica,
    over_all_ranks,
    parameter_shapes,
    parse_flags,
    place_of,
    print_claims,
    print_errors,
    prune,
    read_step,
    relative_errors,
    say,
    say_setting,
    scores_of,
    smaller_sizes,
    text_batches,
    train,
    worst,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

# ── 1 Depth: which layer is missed least ──────────────────────────────────────────────────────────
#
# A layer is x + f(norm(x)), so leaving it out leaves a model that still works. Two criteria:
#
#     logits   mean squared error of the logits without the layer. The least one is removed, and
#              the others are *ranked anew*, until the depth is reached.       (Nano 2, 12B to 9B)
#     hidden   that of the last hidden state, each layer by itself, one pass.  (MiniPuzzle)
#
# Errors of single layers do not add up. Two layers may do the same thing: then neither is missed
# alone, because the other one does it. One-shot ranking removes both of them, and ranking anew
# sees the error of the second one rise as soon as the first is gone. The price is one forward pass
# for each layer that is left, in each round.
#
# Every letter of the pattern is a layer of its own here, so an attention layer may go and leave its
# feed-forward layer. The published patterns have such places: MM, and three feed-forward layers in
# a row.


@torch.no_grad()
def removal_errors(
    model: HybridLM, batches: Batches, gone: frozenset[int] = frozenset(), by: str = "logits"
) -> Tensor:
    """Mean squared error of the outputs without each layer, (L), on the CPU; ∞ for those `gone`.

    Args: batches: as `importance`'s. gone: layers that are removed already. by: "logits", or
        "hidden" for the last hidden state. The full model's outputs are the reference.
    Raises: ValueError for another `by`. Collective over the model's mesh.
    Source: Nemotron Nano 2 (logits), Nemotron-H (hidden).
    """
    if by not in ("logits", "hidden"):
        raise ValueError(f"by={by!r}: by is 'logits' or 'hidden'")
    mesh = model.mesh
    run = model.forward if by == "logits" else model.hidden
    candidates = [i for i in range(len(model.config.pattern)) if i not in gone]
    device = model.head.weight.device
    squares_L = torch.zeros(len(model.config.pattern), dtype=torch.float64, device=device)
    elements = torch.zeros(1, dtype=torch.float64, device=device)
    for tokens_BT, targets_BT in batches:
        counted_BT1 = (targets_BT != -100)[..., None]
        right_BTC = at_least_fp32(run(tokens_BT))
        elements += counted_BT1.sum() * right_BTC.shape[2]
        for i in candidates:
            gap_BTC = at_least_fp32(run(tokens_BT, gone | {i})) - right_BTC
            gap_BTC = torch.where(counted_BT1, gap_BTC, 0)
            squares_L[i] += gap_BTC.square().sum()
    sums = torch.cat([squares_L, elements])
    if by == "logits":  # sharded by vocabulary entries
        _reduce_over(sums, mesh.tp_group)
    _reduce_over(sums, mesh.dp_group)
    if mesh.tp > 1:  # one choice for all ranks, as in `importance`
        dist.broadcast(sums, group=mesh.tp_group, group_src=0)
    errors_L = (sums[:-1] / sums[-1]).cpu()
    errors_L[list(gone)] = torch.inf
    return errors_L


def rank_layers(
    model: HybridLM, batches: Batches, num_layers: int = 1, by: str = "logits"
) -> Tensor:
    """Scores of the layers (L), for `prune_layers`: the larger, the later a layer is removed.

    Args: batches: a list, read once per round. num_layers: "logits" ranks anew down to so many, and
        what is left then has ∞. by: "logits", or "hidden": one shot, the error itself.
    Raises: ValueError for another `by`, for num_layers that is not from 1 to L, or where no token
        counts. Collective. Source: Nemotron Nano 2, Nemotron-H.
    """
    L = len(model.config.pattern)
    if by not in ("logits", "hidden") or not 1 <= num_layers <= L:
        need = f"by is 'logits' or 'hidden', num_layers from 1 to {L}"
        raise ValueError(f"by={by!r}, num_layers={num_layers}: {need}")
    gone: list[int] = []
    score_L = torch.full((L,), torch.inf, dtype=torch.float64)
    while len(gone) < L - num_layers:
        errors_L = removal_errors(model, batches, frozenset(gone), by)
        if errors_L.isnan().any():
            raise ValueError("errors are NaN: no token of the batches counts, or weights are NaN")
        if by == "hidden":
            return errors_L
        least = int(errors_L.argmin())
        score_L[least] = len(gone)
        gone.append(least)
    return score_L


def prune_layers(model: HybridLM, num_layers: int, score_L: Tensor) -> HybridLM:
    """A model with the best layers of `model`, on its mesh; copies. Nothing is sent.

    Args: score_L: of `rank_layers`.
    Raises: ValueError where num_layers is not from 1 to L, or `rank_layers` has not ranked as far.
    Source: Minitron, section 2.
    """
    L = len(model.config.pattern)
    unranked = int(score_L.isinf().sum())
    if len(score_L) != L or not max(1, unranked) <= num_layers <= L:
        found = f"{L} layers, {len(score_L)} scores, {unranked} layers that were not ranked"
        raise ValueError(f"num_layers={num_layers}, but there are {found}")
    layers = best(score_L, num_layers).tolist()
    weights = {}
    for name, x in model.state_dict().items():
        place = place_of(name)
        if place.startswith("layers."):
            old = int(place.removeprefix("layers."))
            if old not in layers:
                continue
            name = name.replace(place, f"layers.{layers.index(old)}", 1)
        weights[name] = x
    pattern = "".join(model.config.pattern[i] for i in layers)
    return HybridLM(replace(model.config, pattern=pattern), model.mesh, weights)


# ── 2 Distillation: forward KL over a sharded vocabulary ──────────────────────────────────────────
#
# The student learns the teacher's distribution p at each token, not one token id: V values of
# information in place of one. The loss is the forward KL divergence, and nothing is added to it:
#
#     KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)         p: teacher, q: student;  d/d logit = q − p
#
# With a temperature τ both logits are divided by τ. The gradient then shrinks by about τ², so the
# loss is multiplied by τ² (Hinton's convention; some tools leave it out, and with τ = 2 their
# gradient is a quarter of this): d/d logit = τ (q − p). The papers have τ = 1.
#
# Both output layers are column-parallel: a rank has v = V / tp logits of each. As in chapter 2's
# cross entropy, nothing of size V is gathered. With maxima m_t, m_s of teacher and student:
#
#     2 scalars a token   max                 m_t, m_s
#     3 scalars a token   sum   Z_t = Σ exp(t − m_t)    Z_s = Σ exp(s − m_s)
#                               A   = Σ exp(t − m_t) · ((t − m_t) − (s − m_s))
#
#     KL = A / Z_t − log Z_t + log Z_s
#
# 131,072 vocabulary entries for both models are 1 MB a token in fp32; 5 scalars are 20 bytes. The
# backward is local: each rank has p and q of its own columns. Written with differentiable
# all-reduces, autograd would run them in backward again, and the gradient would be tp times too
# large. So forward and backward are one Function.
#
# Four mistakes are silent. F.kl_div's "mean" divides by V as well, and "batchmean" by B alone: the
# gradient is then V times too small, or T times too large. Padding columns must be −∞ in both,
# and 0 · (−∞ − −∞) is NaN: their products are replaced. And in bf16 two nearly equal distributions
# have a difference of rounding errors, so that the gradient gets worse the better the student is.


class _VocabParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_BTv, teacher_BTv, vocab_size, temperature, group):
        dtype = torch.promote_types(student_BTv.dtype, torch.float32)
        rank = 0 if group is None else group_rank(group)
        columns = max(0, vocab_size - rank * student_BTv.shape[-1])
        s_BTv = student_BTv.to(dtype) / temperature
        t_BTv = teacher_BTv.to(dtype) / temperature
        s_BTv[..., columns:] = -torch.inf  # padding
        t_BTv[..., columns:] = -torch.inf
        max_2BT = torch.stack([s_BTv.amax(dim=-1), t_BTv.amax(dim=-1)])
        _reduce_over(max_2BT, group, dist.ReduceOp.MAX)
        s_BTv -= max_2BT[0][..., None]
        t_BTv -= max_2BT[1][..., None]
        gap_BTv = t_BTv - s_BTv
        p_BTv = t_BTv.exp_()
        gap_BTv.mul_(p_BTv).masked_fill_(p_BTv == 0, 0)  # 0 · (−∞ − x) is NaN
        q_BTv = s_BTv.exp_()
        sums = [q_BTv.sum(dim=-1), p_BTv.sum(dim=-1), gap_BTv.sum(dim=-1)]
        sum_q_BT, sum_p_BT, sum_gap_BT = _reduce_over(torch.stack(sums), group)
        ctx.temperature = temperature
        if ctx.needs_input_grad[0]:
            p_BTv /= sum_p_BT[..., None]
            q_BTv /= sum_q_BT[..., None]
            ctx.save_for_backward(q_BTv.sub_(p_BTv))
        kl_BT = sum_gap_BT / sum_p_BT - sum_p_BT.log() + sum_q_BT.log()
        return temperature**2 * kl_BT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BT):
        (difference_BTv,) = ctx.saved_tensors
        return ctx.temperature * grad_BT[..., None] * difference_BTv, None, None, None, None


def vocab_parallel_kl(
    student_BTv: Tensor,
    teacher_BTv: Tensor,
    group: Group = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """τ² · KL(teacher ‖ student) per token, from logits whose vocabulary is sharded over `group`.

    Args:
        student_BTv: this rank's shard; rank r holds token ids [r·v, (r + 1)·v). Not modified.
        teacher_BTv: the teacher's, sharded alike; no gradient. −∞ is allowed.
        group: the tensor-parallel group; None: the vocabulary is not sharded.
        vocab_size: number of vocabulary entries; columns from there on are padding. None: none is.
        temperature: τ; both logits are divided by it.

    Returns: kl_BT in nats, replicated, at least fp32.
    Memory: backward keeps one difference of probabilities, 4 bytes per logit.
    Raises: ValueError where shapes disagree, vocab_size does not fit, τ is not positive, or the
        teacher's logits have a graph: it would be trained, too.
    Source: Hinton et al., 2015, for τ²; the papers' forward KL; over a sharded vocabulary: ours.
    """
    columns = student_BTv.shape[-1] * (1 if group is None else group_size(group))
    vocab_size = columns if vocab_size is None else vocab_size
    if student_BTv.shape != teacher_BTv.shape:
        shapes = f"student {tuple(student_BTv.shape)}, teacher {tuple(teacher_BTv.shape)}"
        raise ValueError(f"{shapes}: logits must have one shape, sharded alike")
    if not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size}, but the group holds {columns} columns")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it must be greater than 0")
    if teacher_BTv.requires_grad:
        raise ValueError("the teacher's logits have a graph: compute them under torch.no_grad()")
    return _VocabParallelKL.apply(student_BTv, teacher_BTv, vocab_size, temperature, group)


# The teacher runs without a graph, on the same mesh and the same rows. Were teacher and student one
# object, or did they share a parameter, each step would move the teacher too. At worst the loss is
# 0 from the first step on, and nothing is learned. So that is refused.


def check_teacher(student: HybridLM, teacher: HybridLM) -> None:
    """Raises ValueError where a teacher cannot teach this student."""
    own = {id(p) for p in student.parameters()}
    if any(id(p) in own for p in teacher.parameters()):
        raise ValueError("teacher and student share parameters: prune() makes a student of its own")
    if teacher.mesh != student.mesh:
        raise ValueError(f"the teacher is on {teacher.mesh}, the student on {student.mesh}")


def divergence_from(teacher: HybridLM, temperature: float = 1.0) -> Loss:
    """The loss of distillation for `train`: loss(student, tokens_bT, targets_bT) is kl_bT, (b, T).

    Targets only say which tokens count. The loss raises ValueError as `check_teacher` and
    `vocab_parallel_kl`. Source: the papers: forward KL alone, temperature 1.
    """

    def loss(student: HybridLM, tokens_bT: Tensor, targets_bT: Tensor) -> Tensor:
        check_teacher(student, teacher)
        with torch.no_grad():
            teacher_bTv = teacher(tokens_bT)
        group = student.mesh.tp_group
        return vocab_parallel_kl(student(tokens_bT), teacher_bTv, group, None, temperature)

    return loss


# ── 3 The demonstration ─────────────────────────────────────────────────────────────────────────
#
# Three students have the same shape and train on the same tokens, a quarter of the teacher's: one
# pruned by scores, one of random units, and one of new weights, with cross entropy. What counts
# most is to inherit weights at all. KL in place of cross entropy comes second. The scores come
# last: they show right after pruning, and at this size hardly after distillation.


def equivalence(
    mesh: Mesh, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """Depth and five steps of distillation on a mesh and on a single device: name to error."""
    config, smaller, batches = check_case(mesh, device)
    large = HybridLM(config).to(device, dtype)
    large_sharded = HybridLM(config, mesh).to(device, dtype)
    own = [of_replica(batch, mesh) for batch in batches]
    errors = {}
    for by in ("logits", "hidden"):
        expected = {f"without a layer, by {by}": removal_errors(large, batches, by=by)}
        found = {f"without a layer, by {by}": removal_errors(large_sharded, own, by=by)}
        errors |= relative_errors("error", found, expected)
    score_L = rank_layers(large, batches, 4)
    scores = scores_of(large, batches)
    plain = prune_layers(prune(large, smaller, scores), 4, score_L)
    model = prune_layers(prune(large_sharded, smaller, scores), 4, score_L)
    runs = []
    for student, teacher in ((plain, large), (model, large_sharded)):
        loss = divergence_from(teacher, temperature=2.0)
        optimizer = make_optimizer(student, 1e-3)
        runs.append(train(student, optimizer, batches[:1] * 5, loss, 0.1, autocast))
    for step, (expected, found) in enumerate(zip(*runs)):
        for name, x, y in zip(("loss", "norm before clipping"), found, expected):
            errors[f"{name} {step}"] = abs(x / y - 1).item()
        if step == 0:
            grads = gathered(gradients(model), model)
            errors |= relative_errors("gradient", grads, gradients(plain))
    if dtype == torch.float64:
        full = gathered(model.state_dict(), model)
        errors |= relative_errors("weight after AdamW", full, plain.state_dict(), 5e-3)
    return over_all_ranks(errors)


def check(
    args: Args, device: torch.device, dtype: torch.dtype, autocast: Autocast = None
) -> dict[str, float]:
    """`equivalence` on every mesh of the ranks."""
    errors = {}
    world = group_size()
    for tp in range(1, world + 1):
        if world % tp == 0:
            mesh = make_mesh(tp, device, args.timeout)
            found = equivalence(mesh, device, dtype, autocast)
            errors |= {f"{name}, tp {tp}": error for name, error in found.items()}
    return errors


def train_student(
    args: Args, student: HybridLM, loss: Callable, device: torch.device, name: str
) -> None:
    """A quarter of the teacher's steps, on tokens that it has not seen."""
    batches = text_batches(args, device, range(args.steps, args.steps + args.steps // 4))
    optimizer = make_optimizer(student, args.lr)
    autocast = dtypes(args)[1]
    steps = train(student, optimizer, batches, loss, autocast=autocast)
    say(f"step    loss    norm    {name}")
    for step, (mean, norm) in enumerate(steps):
        mean, norm = read_step(step, mean, norm)
        if step < 2 or step % 25 == 24:
            say(f"{step:4}  {mean:.4f}  {norm:6.3f}")
    say()


def print_depth(model: HybridLM, batches: Batches) -> None:
    """Both errors of leaving one layer out."""
    for by in ("logits", "hidden"):
        errors = removal_errors(model, batches, by=by).tolist()
        cells = [f"{letter} {error:.2f}" for letter, error in zip(model.config.pattern, errors)]
        say(f"mean squared error of {by} without a layer:  {'   '.join(cells)}")
    say()


def distill(args: Args, mesh: Mesh, device: torch.device) -> dict[str, tuple[float, float]]:
    """Trains a teacher, prunes it and trains three students. Returns: loss on the eval split of
    each, before and after."""
    teacher = demonstrate(args, mesh, device)
    calibration = list(text_batches(args, device, range(4)))
    held_out = list(text_batches(args, device, range(4), evaluation=True))
    own = [of_replica(batch, mesh) for batch in calibration]
    print_depth(teacher, own)
    depth = len(teacher.config.pattern) - 1
    score_L = rank_layers(teacher, own, depth)
    shorter = prune_layers(teacher, depth, score_L)
    scores = scores_of(shorter, calibration)
    rng = torch.Generator().manual_seed(args.seed)
    chance = {name: torch.rand(score.shape, generator=rng) for name, score in scores.items()}
    sizes = smaller_sizes(teacher.config)
    pruned = prune(shorter, sizes, scores)
    new_config = replace(pruned.config, seed=args.seed + 1)
    new = HybridLM(new_config, mesh).to(device, dtypes(args)[0])
    loss = divergence_from(teacher)
    students = {"scores, KL": (pruned, loss)}
    students["random units, KL"] = (prune(shorter, sizes, chance), loss)
    students["new weights, cross entropy"] = (new, cross_entropy)
    teachers = evaluate(teacher, held_out)
    losses = {"teacher": (teachers, teachers)}
    for name, (student, loss) in students.items():
        before = evaluate(student, held_out)
        train_student(args, student, loss, device, name)
        losses[name] = (before, evaluate(student, held_out))
    print_students(losses, teacher.config, pruned.config)
    return losses


def print_students(
    losses: dict[str, tuple[float, float]], large: HybridConfig, small: HybridConfig
) -> None:
    say("loss on the eval split          before     after")
    for name, (before, after) in losses.items():
        say(f"{name:30}  {before:.4f}    {after:.4f}")
    for name, config in (("teacher", large), ("students", small)):
        count = sum(shape.numel() for shape in parameter_shapes(config).values())
        say(f"{name}: {config.pattern}, {count:,} parameters")
    say()


def measure(args: Args, device: torch.device) -> list[tuple]:
    """The claims that this run has measured: (claim, paper, here, verdict)."""
    errors = check(args, device, torch.float64)
    claims = []
    for kind in ("error", "gradient", "norm before clipping", "weight after AdamW"):
        error = worst(errors, kind)
        claim = f"distillation: every {kind} equals the single device's, float64"
        here = f"worst {error:.1e} relative"
        claims.append((claim, "exact", here, error <= BOUNDS["fp64"]))
    losses = distill(args, make_mesh(args.tp, device, args.timeout), device)
    teacher, scored, chance, new = (after for _, after in losses.values())
    verdict = scored < new if args.steps >= STEPS else f"{STEPS} steps"
    here = f"{scored:.3f}; {new:.3f}; {teacher:.3f}"
    claim = "loss: pruned and distilled; new weights, equal tokens; teacher"
    claims.append((claim, "40× fewer tokens", here, verdict))
    here = f"{losses['random units, KL'][0] - losses['scores, KL'][0]:+.3f}; {chance - scored:+.3f}"
    claim = "random units over scores: before, after distillation"
    return [*claims, (claim, "scores are better", here, "one seed, a small model")]


def main(args: Args, device: torch.device) -> None:
    say_setting(args, f": tp {args.tp} × dp {args.world_size // args.tp}")
    if args.check:
        good = print_errors(check(args, device, *dtypes(args)), BOUNDS[args.dtype])
    else:
        good = print_claims(measure(args, device))
    if not good:
        sys.exit(1)


def flags() -> Args:
    return parse_flags(__doc__, [Options, HybridConfig], check_args, ranks=2, steps=STEPS)


if __name__ == "__main__":
    launch(main, flags())
