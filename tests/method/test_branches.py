# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Branches of a fork: diversity, advantages, token weights, and the expected gradient by enumeration."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.errors import ConfigError
from omniopd_trl.method import branch_weights, chunk_prior, diversity, leave_one_out, most_diverse, posterior_mean

VOCABULARY, LENGTH = 3, 2
CHUNKS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", " a", "b", "c\n", "c"]), min_size=1, max_size=9))
def test_diversity_is_that_of_pairs(texts):
    """Share of the ordered pairs, with replacement, whose texts differ."""
    pairs = [(a.strip(), b.strip()) for a in texts for b in texts]
    assert diversity(texts) == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.1, 1.0])), max_size=8), st.data())
def test_the_most_diverse_forks_are_kept(forks, data):
    """No fork that is left out has more diversity, or as much with a higher entropy, or both at an earlier place."""
    count = data.draw(st.integers(1, 8))
    kept = most_diverse([d for d, _ in forks], [e for _, e in forks], count)
    assert kept == sorted(set(kept))
    assert len(kept) == min(count, len(forks))
    rank = lambda i: (*forks[i], -i)  # noqa: E731
    left_out = set(range(len(forks))) - set(kept)
    assert all(rank(i) > rank(j) for i in kept for j in left_out)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=9))
def test_advantages_equal_exact_fractions(tenths):
    """The mean of the others, branch by branch. Equal branches have no advantage, however it is scaled."""
    s = [Fraction(n, 10) for n in tenths]
    exact = [s[j] - sum(s[:j] + s[j + 1 :]) / (len(s) - 1) for j in range(len(s))]
    found = leave_one_out([float(value) for value in s])
    assert found == pytest.approx([float(value) for value in exact], abs=1e-12)
    assert sum(found) == pytest.approx(0, abs=1e-12)
    sigma = statistics.pstdev([float(value) for value in s])
    scaled = leave_one_out([float(value) for value in s], scale=True)
    expected = [float(a) / sigma if len(set(s)) > 1 else 0.0 for a in exact]
    assert scaled == pytest.approx(expected, abs=1e-9)


def test_rounding_is_no_advantage():
    """Ten thirds summed in another order differ in the last bit, which a division by the deviation would blow up."""
    nearly = [1 / 3, 1 / 3 + 1e-16, 1 / 3 - 1e-16]
    assert leave_one_out(nearly, scale=True) == [0.0, 0.0, 0.0]
    assert leave_one_out([0.4]) == [0.0]


@pytest.mark.parametrize("bad", [[0.1, math.nan], [math.inf, 0.2], [[0.1, 0.2]]])
def test_bad_similarities(bad):
    with pytest.raises(ConfigError, match="one finite number for each branch"):
        leave_one_out(bad)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_weights_give_the_loss_of_all_branches(data):
    """Shared beginnings, equal branches and branches that ended early, against the sum as it is written."""
    size = data.draw(st.integers(1, 4))
    own = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    others = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=size), min_size=1, max_size=6))
    branches = [own, *others]
    advantages = [data.draw(st.integers(-4, 4)) / 8 for _ in branches]
    # One number for each token after each prefix: an arbitrary policy.
    logp = lambda branch, t: -1.0 - hash((tuple(branch[: t + 1]), 7)) % 1000 / 250  # noqa: E731
    expected = -sum(
        advantage * sum(logp(branch, t) for t in range(len(branch)))
        for branch, advantage in zip(branches, advantages, strict=True)
    ) / len(branches)
    weights, suffixes = branch_weights(branches, advantages)
    assert len(weights) == len(own)
    total = -sum(w * logp(own, t) for t, w in enumerate(weights))
    for suffix in suffixes:
        branch = own[: suffix.start] + list(suffix.token_ids)
        assert len(own) <= suffix.start or branch[suffix.start] != own[suffix.start], "a shared token is packed"
        total -= suffix.weight * sum(logp(branch, t) for t in range(suffix.start, len(branch)))
    assert total == pytest.approx(expected, abs=1e-9)
    assert len({(s.start, s.token_ids) for s in suffixes}) == len(suffixes), "equal branches are not merged"


def test_sampling_logprobs_follow_their_branch():
    """Those of the shared beginning are the trajectory's own, and are left out."""
    _, [suffix] = branch_weights([[5, 6, 7], [5, 8, 9]], [0.5, -0.5], [(), (-1.0, -2.0, None)])
    assert suffix.sampling_logprobs == (-2.0, None)


# ---- The expected gradient, by enumeration of all branches ----


def logprobs_of(theta: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probability of each chunk of two tokens under a table of logits: a row for each prefix."""
    rows = theta.log_softmax(-1)
    return {chunk: rows[0, chunk[0]] + rows[1 + chunk[0], chunk[1]] for chunk in CHUNKS}


def expected_gradient(theta, similarity, num_branches, scale=False):
    """The mean over all draws of `K + 1` branches of the gradient of the loss that the weights describe."""
    theta = theta.clone().requires_grad_()
    logp = logprobs_of(theta)
    rows = theta.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(CHUNKS, repeat=num_branches + 1):
        probability = math.exp(sum(logp[branch].item() for branch in draw))
        advantages = leave_one_out([similarity(branch, j) for j, branch in enumerate(draw)], scale)
        weights, suffixes = branch_weights(draw, advantages)
        own = draw[0]
        loss = -weights[0] * rows[0, own[0]] - weights[1] * rows[1 + own[0], own[1]]
        for suffix in suffixes:
            branch = own[: suffix.start] + suffix.token_ids
            tokens = [rows[0, branch[0]], rows[1 + branch[0], branch[1]]][suffix.start :]
            loss = loss - suffix.weight * sum(tokens)
        total = total + probability * loss
    return torch.autograd.grad(total, theta)[0]


@pytest.fixture
def theta():
    return torch.randn(1 + VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("num_branches", [1, 2])
def test_expected_gradient_is_that_of_the_expected_similarity(theta, num_branches):
    """Unbiased: for any K, the mean update is the gradient of what a draw at this fork agrees with the teacher."""
    values = dict(zip(CHUNKS, torch.rand(9, generator=torch.Generator().manual_seed(5)).tolist(), strict=True))
    found = expected_gradient(theta, lambda branch, j: values[branch], num_branches)
    free = theta.clone().requires_grad_()
    value = sum(logp.exp() * values[chunk] for chunk, logp in logprobs_of(free).items())
    torch.testing.assert_close(found, -torch.autograd.grad(value, free)[0], rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("scale", [False, True])
def test_no_gradient_where_all_choices_agree_equally(theta, scale):
    """At every fork, easy or hard, when no choice agrees better: also when single similarities differ by chance.

    The paper's form has a gradient there: the prior of Eq. 5 pays for what the student finds likely.
    """
    equal = expected_gradient(theta, lambda branch, j: 0.9, 2, scale)
    assert torch.equal(equal, torch.zeros_like(theta))
    by_chance = expected_gradient(theta, lambda branch, j: (0.2, 0.9, 0.4)[j], 2, scale)
    assert by_chance.abs().max() < 1e-12

    free = theta.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for chunk, logp in logprobs_of(free).items():
        rows = free.detach().log_softmax(-1)
        prior = chunk_prior(torch.stack([rows[0, chunk[0]], rows[1 + chunk[0], chunk[1]]]))
        total = total - logp.exp().item() * posterior_mean(0.9 * 4, 4, prior).item() * logp
    assert torch.autograd.grad(total, free)[0].abs().max() > 1e-3
