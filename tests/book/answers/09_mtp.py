# SPDX-License-Identifier: MIT-0
"""Answers to the exercises of notebook 9: other right ones than its solutions, and wrong ones."""

RIGHT = [
    (
        "1",
        "a loop over tokens",
        """
def roll(x, document, fill):
    result = []
    for i in range(len(x)):
        inside = i + 1 < len(x) and document[i + 1] == document[i]
        result.append(int(x[i + 1]) if inside else fill)
    return torch.tensor(result)
""",
    ),
    (
        "2",
        "the ratio, and a draw with searchsorted",
        """
def accept(p, q, x, u, w):
    if q[x] > 0 and u < min(1.0, float(p[x] / q[x])):
        return True, x
    rest = torch.maximum(p - q, torch.zeros(()))
    rest = rest / rest.sum()
    return False, torch.searchsorted(rest.cumsum(0), torch.tensor(w, dtype=p.dtype), right=True)
""",
    ),
    (
        "3",
        "from the end",
        """
def keep(states, inputs, keys, n):
    taps = len(inputs) - (len(states) - 1) + 1
    gone = len(states) - 1 - n
    if gone:
        inputs, keys = inputs[:-gone], keys[:-gone]
    return states[n : n + 1], inputs[len(inputs) - taps + 1 :], keys
""",
    ),
]

WRONG = [
    (
        "1",
        "to the right",
        """
def roll(x, document, fill):
    rolled = torch.cat([torch.tensor([fill]), x[:-1]])
    before = torch.cat([torch.tensor([-1]), document[:-1]])
    return torch.where(document == before, rolled, fill)
""",
    ),
    (
        "1",
        "fills the first place of the next document",
        """
def roll(x, document, fill):
    rolled = torch.cat([x[1:], torch.tensor([fill])])
    before = torch.cat([torch.tensor([-1]), document[:-1]])
    return torch.where(document == before, rolled, fill)
""",
    ),
    (
        "1",
        "around the end",
        """
def roll(x, document, fill):
    rolled = x.roll(-1)
    return torch.where(document == document.roll(-1), rolled, fill)
""",
    ),
    (
        "2",
        "a draw from p after a rejection",
        """
def accept(p, q, x, u, w):
    if u * q[x] < p[x]:
        return True, x
    return False, int((p.cumsum(0) <= w).sum())
""",
    ),
    (
        "2",
        "a residual that is not normalised",
        """
def accept(p, q, x, u, w):
    if u * q[x] < p[x]:
        return True, x
    return False, min(4, int(((p - q).clamp(min=0).cumsum(0) <= w).sum()))
""",
    ),
    (
        "2",
        "accept where the draft equals a sample of p",
        """
def accept(p, q, x, u, w):
    token = int((p.cumsum(0) <= u).sum())
    return token == x, token
""",
    ),
    (
        "2",
        "one uniform for both",
        """
def accept(p, q, x, u, w):
    if u * q[x] < p[x]:
        return True, x
    cumulated = (p - q).clamp(min=0).cumsum(0)
    return False, int((cumulated <= u * cumulated[-1]).sum())
""",
    ),
    (
        "3",
        "the state is not rolled back",
        """
def keep(states, inputs, keys, n):
    dropped = len(states) - 1 - n
    last = len(inputs) - dropped
    return [states[-1]], inputs[n:last], keys[: len(keys) - dropped]
""",
    ),
    (
        "3",
        "the inputs are not rolled back",
        """
def keep(states, inputs, keys, n):
    dropped = len(states) - 1 - n
    return [states[n]], inputs[len(states) - 1 :], keys[: len(keys) - dropped]
""",
    ),
    (
        "3",
        "one draft too few",
        """
def keep(states, inputs, keys, n):
    n = max(0, n - 1)
    dropped = len(states) - 1 - n
    last = len(inputs) - dropped
    return [states[n]], inputs[n:last], keys[: len(keys) - dropped]
""",
    ),
]
