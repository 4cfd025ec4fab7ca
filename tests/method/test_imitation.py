# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Imitated rollouts as weights of tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.method import add_imitation, branch_weights

TOKENS = st.integers(0, 1)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_weights_give_the_loss_of_all_rollouts(data):
    """Beginnings shared with the trajectory, with branches and with each other, against the sum as it is written."""
    size = data.draw(st.integers(1, 4))
    own = data.draw(st.lists(TOKENS, min_size=size, max_size=size))
    branches = [own, *data.draw(st.lists(st.lists(TOKENS, min_size=1, max_size=size), max_size=4))]
    advantages = [data.draw(st.integers(-4, 4)) / 8 for _ in branches]
    rollouts = data.draw(st.lists(st.none() | st.lists(TOKENS, max_size=size), min_size=1, max_size=5))
    # One number for each token after each prefix: an arbitrary policy.
    logp = lambda tokens: -1.0 - hash((*tokens, 7)) % 1000 / 250  # noqa: E731
    expected = -0.5 / len(rollouts) * sum(logp(r[: t + 1]) for r in rollouts if r for t in range(len(r)))
    _, suffixes = branch_weights(branches, advantages)

    weights, added = add_imitation(own, suffixes, rollouts, 0.5)
    assert len(weights) == size
    terms = {tuple(own[: t + 1]): w for t, w in enumerate(weights) if w}
    for suffix in added:
        path = (*own[: suffix.start], *suffix.token_ids)
        for t, w in enumerate(suffix.imitation or [0.0] * len(suffix.token_ids), start=suffix.start + 1):
            assert not (w and path[:t] in terms), "equal beginnings are not merged"
            terms |= {path[:t]: w} if w else {}
    assert -sum(w * logp(path) for path, w in terms.items()) == pytest.approx(expected, abs=1e-9)
    assert len(terms) == len({tuple(r[: t + 1]) for r in rollouts if r for t in range(len(r))})
    # What is trained of the branches is unchanged, and nothing is packed that the row holds.
    unchanged = [(s.start, s.token_ids, s.weight) for s in added[: len(suffixes)]]
    assert unchanged == [(s.start, s.token_ids, s.weight) for s in suffixes]
    for index, suffix in enumerate(added[len(suffixes) :], start=len(suffixes)):
        assert suffix.weight == 0
        assert len(own) <= suffix.start or own[suffix.start] != suffix.token_ids[0]
        others = [s for i, s in enumerate(added) if i != index and s.start == suffix.start]
        assert not any(s.token_ids[: len(suffix.token_ids)] == suffix.token_ids for s in others)


def test_nothing_is_imitated():
    """Rollouts that are left out, and rollouts that ended at once."""
    assert add_imitation([5, 6], [], [None, ()], 0.5) == ([0.0, 0.0], [])
