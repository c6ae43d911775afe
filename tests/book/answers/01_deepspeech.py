# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 1: other right ones than its solutions, and wrong ones."""

GATHER = """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine.clone()
    for step in range(3):
        arriving, leaving = (rank - step - 1) % 4, (rank - step) % 4
{body}
    return pieces
"""

RIGHT = [
    (
        "1",
        "all frames are gathered",
        """
def statistics(frames):
    everyone = [None] * 4
    dist.all_gather_object(everyone, frames)
    every = torch.cat(everyone)
    return every.mean(), every.var(unbiased=False)
""",
    ),
    (
        "2",
        "every path is tried",
        """
def paths(text, T):
    import itertools

    def says(path):
        merged = [x for i, x in enumerate(path) if i == 0 or x != path[i - 1]]
        return "".join(x for x in merged if x != "_") == text

    return sum(says(path) for path in itertools.product({*text, "_"}, repeat=T))
""",
    ),
    (
        "2",
        "a recursion over the frames that are left",
        """
def paths(text, T):
    import functools

    @functools.cache
    def ways(place, last, left):
        if left == 0:
            return int(place == len(text))
        found = ways(place, "_", left - 1)
        if last != "_":
            found += ways(place, last, left - 1)
        if place < len(text) and text[place] != last:
            found += ways(place + 1, text[place], left - 1)
        return found

    return ways(0, "_", T)
""",
    ),
    (
        "3",
        "batch_isend_irecv",
        GATHER.format(
            body="""
        operations = [dist.P2POp(dist.irecv, pieces[arriving], left)]
        operations.append(dist.P2POp(dist.isend, pieces[leaving], right))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
"""
        ),
    ),
    (
        "3",
        "isend, then recv",
        GATHER.format(
            body="""
        work = dist.isend(pieces[leaving], right)
        dist.recv(pieces[arriving], left)
        work.wait()
"""
        ),
    ),
]

WRONG = [
    (
        "1",
        "a mean of means",
        """
def statistics(frames):
    mean = frames.mean().nan_to_num()
    dist.all_reduce(mean)
    variance = frames.var(unbiased=False).nan_to_num()
    dist.all_reduce(variance)
    return mean / 4, variance / 4
""",
    ),
    (
        "1",
        "squares around this rank's own mean",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), (frames - frames.mean()).square().sum(),
                        frames.new_tensor(len(frames))])
    dist.all_reduce(sums)
    return sums[0] / sums[2], sums[1] / sums[2]
""",
    ),
    (
        "2",
        "no blank is needed between equal letters",
        """
def paths(text, T):
    import itertools

    def says(path):
        merged = [x for i, x in enumerate(path) if x != "_" and (i == 0 or x != path[i - 1])]
        return "".join(merged) == text or "".join(dict.fromkeys(merged)) == text

    return sum(says(path) for path in itertools.product({*text, "_"}, repeat=T))
""",
    ),
    ("2", "without blanks", "def paths(text, T):\n    return math.comb(T - 1, len(text) - 1)\n"),
    (
        "3",
        "every piece to every rank",
        """
def ring_all_gather(mine):
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    works = [dist.isend(mine, r) for r in range(4) if r != rank]
    for r in range(4):
        if r != rank:
            dist.recv(pieces[r], r)
    pieces[rank] = mine
    for work in works:
        work.wait()
    return pieces
""",
    ),
    (
        "3",
        "torch's own all-gather",
        """
def ring_all_gather(mine):
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    dist.all_gather(pieces, mine)
    return pieces
""",
    ),
    (
        "3",
        "its own piece three times",
        GATHER.format(
            body="""
        receive = dist.irecv(pieces[arriving], left)
        dist.isend(mine, right).wait()
        receive.wait()
"""
        ),
    ),
    (
        "1",
        "means of means, without the empty rank",
        """
def statistics(frames):
    mean = frames.mean() if len(frames) else torch.zeros((), dtype=frames.dtype)
    variance = (frames - mean).square().mean() if len(frames) else torch.zeros_like(mean)
    dist.all_reduce(mean)
    dist.all_reduce(variance)
    return mean / 3, variance / 3
""",
    ),
    (
        "1",
        "the variance around the rank's own mean",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    dist.all_reduce(sums)
    mean = sums[0] / sums[1]
    squares = (frames - frames.mean()).square().sum() if len(frames) else torch.zeros_like(mean)
    dist.all_reduce(squares)
    return mean, squares / sums[1]
""",
    ),
    (
        "1",
        "the mean of squares less the square of the mean",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    dist.all_reduce(sums)
    mean = sums[0] / sums[1]
    squares = frames.square().sum()
    dist.all_reduce(squares)
    return mean, squares / sums[1] - mean**2
""",
    ),
    (
        "1",
        "the unbiased variance",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    dist.all_reduce(sums)
    mean = sums[0] / sums[1]
    squares = (frames - mean).square().sum(); dist.all_reduce(squares); return mean, squares / 13
""",
    ),
    (
        "1",
        "the squares of one rank",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    dist.all_reduce(sums)
    mean = sums[0] / sums[1]
    return mean, (frames - mean).square().sum() / sums[1]
""",
    ),
    (
        "1",
        "no sum",
        """
def statistics(frames):
    sums = torch.stack([frames.sum(), torch.tensor(float(len(frames)), dtype=frames.dtype)])
    pass
    mean = sums[0] / sums[1]
    return mean, (frames - mean).square().mean()
""",
    ),
    (
        "2",
        "no start in a letter",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 0] + [0] * (len(symbols) - 2)
    for _ in range(T - 1):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (symbols[s] != '_' and symbols[s] != symbols[s - 2])
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1] + ways[-2]
""",
    ),
    (
        "2",
        "blanks between all letters",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 1] + [0] * (len(symbols) - 2)
    for _ in range(T - 1):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (False)
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1] + ways[-2]
""",
    ),
    (
        "2",
        "a skip between equal letters",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 1] + [0] * (len(symbols) - 2)
    for _ in range(T - 1):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (symbols[s] != '_')
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1] + ways[-2]
""",
    ),
    (
        "2",
        "a skip of letters",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 1] + [0] * (len(symbols) - 2)
    for _ in range(T - 1):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (symbols[s] != symbols[s - 2] or symbols[s] == '_')
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1] + ways[-2]
""",
    ),
    (
        "2",
        "no end in a letter",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 1] + [0] * (len(symbols) - 2)
    for _ in range(T - 1):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (symbols[s] != '_' and symbols[s] != symbols[s - 2])
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1]
""",
    ),
    (
        "2",
        "one frame more",
        """
def paths(text, T):
    symbols = ["_", *(x for letter in text for x in (letter, "_"))]
    ways = [1, 1] + [0] * (len(symbols) - 2)
    for _ in range(T):
        before, ways = ways, []
        for s in range(len(symbols)):
            skip = s > 1 and (symbols[s] != '_' and symbols[s] != symbols[s - 2])
            step = before[s - 1] if s else 0
            ways.append(before[s] + step + (before[s - 2] if skip else 0))
    return ways[-1] + ways[-2]
""",
    ),
    (
        "2",
        "a choice of frames",
        """
import math
def paths(text, T): return math.comb(T, len(text))
""",
    ),
    (
        "3",
        "two steps",
        """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range(2):
        receive = dist.irecv(pieces[(rank - step - 1) % 4], left)
        send = dist.isend(pieces[(rank - step) % 4], right)
        receive.wait()
        send.wait()
    return pieces
""",
    ),
    (
        "3",
        "the other way",
        """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range(3):
        receive = dist.irecv(pieces[(rank - step - 1) % 4], right)
        send = dist.isend(pieces[(rank - step) % 4], left)
        receive.wait()
        send.wait()
    return pieces
""",
    ),
    (
        "3",
        "always its own",
        """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range(3):
        receive = dist.irecv(pieces[(rank - step - 1) % 4], left)
        send = dist.isend(pieces[rank], right)
        receive.wait()
        send.wait()
    return pieces
""",
    ),
    (
        "3",
        "stored one place further",
        """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range(3):
        receive = dist.irecv(pieces[(rank - step - 2) % 4], left)
        send = dist.isend(pieces[(rank - step) % 4], right)
        receive.wait()
        send.wait()
    return pieces
""",
    ),
    (
        "3",
        "to each rank directly",
        """
def ring_all_gather(mine):
    left, right = (rank - 1) % 4, (rank + 1) % 4
    pieces = [torch.zeros_like(mine) for _ in range(4)]
    pieces[rank] = mine
    for step in range(3):
        receive = dist.irecv(pieces[(rank - step - 1) % 4], (rank - step - 1) % 4)
        send = dist.isend(pieces[rank], (rank + step + 1) % 4)
        receive.wait()
        send.wait()
    return pieces
""",
    ),
    (
        "3",
        "another collective",
        """
def ring_all_gather(mine):
    pieces = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(pieces, mine)
    return pieces
""",
    ),
]
