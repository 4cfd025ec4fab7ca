# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""pass@k and intervals equal values computed by hand or by enumeration; tests keep their false-positive rate."""

from itertools import combinations, product

import numpy as np
import pytest

from omniopd_trl.errors import DataError
from omniopd_trl.evals.statistics import bootstrap_interval, majority_at_k, paired_test, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    correct = rng.integers(0, 2, (7, n))
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        expected = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(expected)


def test_pass_at_1_is_the_mean():
    assert pass_at_k([[1, 0], [1, 1], [0, 0]], 1) == 0.5


@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        ([[1, 0]], 3, "Draw at least 3"),
        ([[1, 0]], 0, "pass@0"),
        ([[0.5]], 1, "0 or 1"),
        ([], 1, "no results"),
        ([1], 1, "no results"),
    ],
)
def test_scores_that_cannot_be_used(correct, k, message):
    with pytest.raises(DataError, match=message):
        pass_at_k(correct, k)


def test_majority():
    answers = [["4", "5", "5", "4"], ["7", None, None, "8"], [None, None, None, None], ["1", "2", "2", "2"]]
    correct = [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert majority_at_k(answers, correct, 1) == 0.25  # 4, 7, none, 1
    assert majority_at_k(answers, correct, 3) == 0.25  # 5, 7, none, 2
    assert majority_at_k(answers, correct, 4) == 0.5  # 4 was first, 7 was first, none, 2


def test_bootstrap_over_problems():
    """With two problems, resamples have the means 0, 0.5 and 1 with probabilities 1/4, 1/2 and 1/4."""
    assert bootstrap_interval([[1, 1, 1, 1], [0, 0, 0, 0]], level=0.9) == (0.0, 1.0)
    assert bootstrap_interval([[1, 1, 1, 1], [0, 0, 0, 0]], level=0.4) == (0.5, 0.5)
    # More samples of the same problems do not narrow the interval.
    one = bootstrap_interval(np.eye(2)[[0] * 30 + [1] * 20][:, :1])
    many = bootstrap_interval(np.repeat(np.eye(2)[[0] * 30 + [1] * 20][:, :1], 16, 1))
    assert one == many
    assert one == pytest.approx((0.6 - 1.96 * 0.0693, 0.6 + 1.96 * 0.0693), abs=0.02)


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    truth, covered = 0.3, 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.random(80) < truth, num_resamples=400, seed=trial)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_paired_test_by_enumeration():
    first, second = np.array([1, 1, 0.5, 0, 1]), np.array([0, 0.25, 0.75, 0, 0])
    difference = first - second
    larger = [
        abs(sum(s * d for s, d in zip(signs, difference, strict=True))) >= abs(difference.sum()) - 1e-9
        for signs in product((1, -1), repeat=5)
    ]
    result = paired_test(first, second)
    assert result.difference == pytest.approx(difference.mean())
    assert result.p_value == pytest.approx(np.mean(larger))
    assert result.interval.low <= result.difference <= result.interval.high


def test_equal_results():
    assert paired_test([[1, 0], [0, 0]], [[0, 1], [0, 0]]) == (0.0, (0.0, 0.0), 1.0)


def test_false_positives_of_the_paired_test():
    """Two models of equal strength: a p-value below 0.05 in about 5% of the trials."""
    rng = np.random.default_rng(1)
    false = 0
    for trial in range(400):
        ability = rng.beta(1, 1, 40)
        first, second = (rng.binomial(4, ability) / 4 for _ in range(2))
        false += paired_test(first, second, num_resamples=500, seed=trial).p_value < 0.05
    assert 0.02 <= false / 400 <= 0.08


def test_the_paired_test_finds_a_difference():
    """It sees what two separate intervals would hide: most problems are equally hard for both models."""
    rng = np.random.default_rng(2)
    second = rng.binomial(16, rng.beta(0.3, 0.3, 200)) / 16
    first = np.clip(second + 0.05 * (rng.random(200) < 0.8), 0, 1)
    result = paired_test(first, second)
    assert result.p_value < 0.01
    assert bootstrap_interval(first).low < bootstrap_interval(second).high


def test_other_problems():
    with pytest.raises(DataError, match="same problems"):
        paired_test([1, 0], [1, 0, 1])
