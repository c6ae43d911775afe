# SPDX-License-Identifier: MIT-0
"""The hunt's bugs can be found: each shows in float64 beside the single device, and where its
notebook says it does."""

import hunt
import pytest
import ranks

FORWARD, BACKWARD, LATER = (
    "the first loss is off",
    "its gradients are off",
    "the second step is off",
)
SEEN = {  # what of the first step is seen, and a tensor that is right (None: no gradient is)
    None: (None, "final_norm.weight"),
    0: (BACKWARD, None),
    1: (FORWARD, None),
    2: ("the norm alone is off", "final_norm.weight"),
    3: (LATER, "final_norm.weight"),
    4: (BACKWARD, "out.weight"),
    5: (BACKWARD, "final_norm.weight"),
    6: (BACKWARD, "embedding.weight"),
    7: (FORWARD, None),
    8: (BACKWARD, "embedding.weight"),
}


@pytest.fixture(scope="module")
def pool():
    pool = ranks.Pool(hunt.RANKS)
    yield pool
    pool.close()


@pytest.mark.parametrize("number", hunt.BUGS)
def test_a_bug_shows_where_the_notebook_says(number, pool, capsys):
    errors = hunt.report(number, pool.run("hunt", "on_ranks", dict(number=number)))
    assert "bug" in capsys.readouterr().out
    off = {name for name, error in errors.items() if not error < hunt.SAME}
    gradients = {name.removeprefix("gradient ") for name in errors if name.startswith("gradient ")}
    wrong = {name for name in gradients if f"gradient {name}" in off}
    seen, right = SEEN[number]
    if seen is None:
        assert not off
    else:
        assert ("loss 0" in off) == (seen == FORWARD)
        assert bool(wrong) == (seen in (FORWARD, BACKWARD)) and ("norm" in off) == (seen != LATER)
        assert ("loss 1" in off) == (seen != "the norm alone is off")
        assert max(errors.values()) > 1e-3  # far above what float64 could do by itself
    assert wrong == gradients if right is None else right in gradients - wrong


def test_answers_are_judged():
    for number, bug in hunt.BUGS.items():
        assert all(hunt.right(number, name) for name in bug.guilty)
        assert (
            not hunt.right(number, "")
            and not hunt.right(number, "print")
            and not hunt.right(number, None)
        )


def test_nothing_stays_planted():
    import megatron_tp as tp

    before = tp.copy_to_tp
    with hunt.planted(0):
        assert tp.copy_to_tp is not before
    assert tp.copy_to_tp is before
