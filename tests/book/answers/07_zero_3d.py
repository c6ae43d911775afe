# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 7: other right ones than its solutions, and wrong ones."""

RANKS = """
def rank_at(tp, pp, dp, tp_rank, pp_rank, dp_rank):
    return {rank}


def place_of(rank, tp, pp, dp):
    return {place}
"""
PIECES = """
def pieces_of_shard(sizes, dp, r):
    length = {length}
    found, offset = [], 0
    for name, size in sizes.items():
        start = max(r * length - offset, 0)
        stop = min((r + 1) * length - offset, size)
        if {kept}:
            found.append((name, start, stop))
        offset += size
    return found
"""
NORM = """
def global_norm(pieces, mesh):
    total = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        {add}
    {reduce}
    return total.sqrt()
"""
SENT = """
def elements_of_step(root, layers, m, reshard):
    again = {again}
    return {gathered}, {reduced}
"""

RIGHT = [
    (
        "1",
        "divmod",
        """
def rank_at(tp, pp, dp, tp_rank, pp_rank, dp_rank):
    return pp_rank * dp * tp + dp_rank * tp + tp_rank


def place_of(rank, tp, pp, dp):
    rest, tp_rank = divmod(rank, tp)
    pp_rank, dp_rank = divmod(rest, dp)
    return [tp_rank, pp_rank, dp_rank]
""",
    ),
    (
        "2",
        "every element is asked for its place",
        """
def pieces_of_shard(sizes, dp, r):
    length = (sum(sizes.values()) + dp - 1) // dp
    elements = [(name, i) for name, size in sizes.items() for i in range(size)]
    found = {}
    for name, i in elements[r * length : (r + 1) * length]:
        found.setdefault(name, []).append(i)
    return [(name, part[0], part[-1] + 1) for name, part in found.items()]
""",
    ),
    (
        "3",
        "replicated elements count a half on each of the two ranks",
        NORM.format(
            add="""copies = 2 if z.shard_dim(piece.name) is None else 1
        total += piece.master.grad.square().sum() / copies""",
            reduce="dist.all_reduce(total)",
        ),
    ),
    (
        "4",
        "layer by layer",
        """
def elements_of_step(root, layers, m, reshard):
    gathered = reduced = root
    for _ in range(m):
        for i, layer in enumerate(layers):
            gathered += 2 * layer if reshard and i + 1 < len(layers) else layer
            reduced += layer
    return gathered, reduced
""",
    ),
]

WRONG = [
    (
        "1",
        "replicas are outermost",
        RANKS.format(
            rank="(dp_rank * pp + pp_rank) * tp + tp_rank",
            place="(rank % tp, rank // tp % pp, rank // (tp * pp))",
        ),
    ),
    (
        "1",
        "stages are the fastest",
        RANKS.format(
            rank="(tp_rank * dp + dp_rank) * pp + pp_rank",
            place="(rank // (pp * dp), rank % pp, rank // pp % dp)",
        ),
    ),
    (
        "1",
        "one way alone",
        RANKS.format(
            rank="(pp_rank * dp + dp_rank) * tp + tp_rank",
            place="(rank % tp, rank // tp % dp, rank // (tp * dp))",
        ),
    ),
    (
        "2",
        "the padding is left out",
        PIECES.format(length="sum(sizes.values()) // dp", kept="start < stop"),
    ),
    (
        "2",
        "empty pieces are kept",
        PIECES.format(length="-(-sum(sizes.values()) // dp)", kept="True"),
    ),
    (
        "2",
        "each parameter is divided by itself",
        """
def pieces_of_shard(sizes, dp, r):
    found = []
    for name, size in sizes.items():
        length = -(-size // dp)
        if r * length < size:
            found.append((name, r * length, min((r + 1) * length, size)))
    return found
""",
    ),
    (
        "3",
        "replicated elements count twice",
        NORM.format(
            add="total += piece.master.grad.square().sum()", reduce="dist.all_reduce(total)"
        ),
    ),
    (
        "3",
        "this rank alone",
        NORM.format(
            add="""if z.shard_dim(piece.name) is not None or mesh.tp_rank == 0:
            total += piece.master.grad.square().sum()""",
            reduce="pass",
        ),
    ),
    (
        "3",
        "a sum of norms",
        NORM.format(
            add="""if z.shard_dim(piece.name) is not None or mesh.tp_rank == 0:
            total += piece.master.grad.norm()""",
            reduce="dist.all_reduce(total)",
        ),
    ),
    (
        "4",
        "the last layer is gathered twice",
        SENT.format(
            again="sum(layers) if reshard else 0",
            gathered="root + m * (sum(layers) + again)",
            reduced="root + m * sum(layers)",
        ),
    ),
    (
        "4",
        "micro-batches are reduced together",
        SENT.format(
            again="sum(layers[:-1]) if reshard else 0",
            gathered="root + m * (sum(layers) + again)",
            reduced="root + sum(layers)",
        ),
    ),
    (
        "4",
        "the root is gathered for each micro-batch",
        SENT.format(
            again="sum(layers[:-1]) if reshard else 0",
            gathered="m * (root + sum(layers) + again)",
            reduced="root + m * sum(layers)",
        ),
    ),
]
