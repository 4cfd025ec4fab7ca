# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""pass@k, majority@k, confidence intervals, and the comparison of two models on the same problems.

A result is a matrix of scores with one row per problem and one column per sample. Samples of one problem are not
independent of each other, so intervals and tests resample problems.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from omniopd_trl.errors import DataError


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """The comparison of two results on the same problems.

    Attributes:
        difference: mean score of the first result, minus that of the second.
        interval: confidence interval of the difference, by bootstrap over problems.
        p_value: probability of a difference at least as large, in either direction, if neither model were better.
    """

    difference: float
    interval: Interval
    p_value: float


def pass_at_k(correct: ArrayLike, k: int) -> float:
    r"""Probability that at least one of `k` samples is correct, averaged over problems, without bias.

    `mean over problems of 1 - C(n - c, k) / C(n, k)`, with `c` of `n` samples correct (Chen et al., 2021, Eq. 1). For
    `k = 1` this is the mean of `correct`.

    Args:
        correct: `(P, n)`, 0 or 1: whether each sample of each problem is correct.
        k: number of samples, at most `n`.

    Raises:
        DataError: when the matrix is empty, holds other values, or has fewer than `k` samples.

    Example:
        >>> pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 2)
        0.25
    """
    matrix = _matrix(correct)
    if not np.isin(matrix, (0, 1)).all():
        raise DataError("pass@k needs scores of 0 or 1. Use the mean for graded scores.")
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise DataError(f"pass@{k} cannot be computed from {n} samples per problem. Draw at least {k}.")
    wrong = n - matrix.sum(1).astype(int)
    return float(np.mean([1 - math.comb(int(w), k) / math.comb(n, k) for w in wrong]))


def majority_at_k(answers: Sequence[Sequence[Hashable | None]], correct: ArrayLike, k: int) -> float:
    """Share of problems whose most frequent answer among the first `k` samples is correct.

    Of several most frequent answers, the one that was given first counts. Samples without a readable answer have no
    vote.

    Args:
        answers: the `n` answers of each problem, in a comparable form; `None` without a readable answer.
        correct: `(P, n)`, 0 or 1: whether each answer is correct.
        k: number of samples, at most `n`.

    Raises:
        DataError: as `pass_at_k`.
    """
    matrix = _matrix(correct)
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise DataError(f"majority@{k} cannot be computed from {n} samples per problem. Draw at least {k}.")
    won = 0.0
    for row, scores in zip(answers, matrix, strict=True):
        votes = Counter(answer for answer in row[:k] if answer is not None)
        if votes:
            won += scores[list(row).index(votes.most_common(1)[0][0])]
    return won / len(matrix)


def bootstrap_interval(
    scores: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean score, over problems.

    Args:
        scores: `(P, n)`, or `(P,)` with the mean score of each problem.
        level: confidence level.
        num_resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        DataError: when there are no scores, or one is not finite.
    """
    means = _means(scores)
    return _percentiles(_resampled_means(means, num_resamples, seed), level)


def paired_test(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compare two results on the same problems, in the same order.

    The p-value is that of a sign-flip permutation test: if neither model is better, the difference of each problem is
    as likely to be positive as negative. All `2^P` sign patterns are used for up to 13 problems that differ, random
    ones for more.

    Args:
        first: `(P, n)` scores, or `(P,)` mean scores.
        second: the same for the other model. Its number of samples may differ.
        level: confidence level of the interval.
        num_resamples: number of resamples, and of random sign patterns.
        seed: seed of both.

    Raises:
        DataError: when the numbers of problems differ.
    """
    a, b = _means(first), _means(second)
    if len(a) != len(b):
        raise DataError(
            f"The first result has {len(a)} problems and the second {len(b)}. A paired test needs the same problems."
        )
    differences = a - b
    interval = _percentiles(_resampled_means(differences, num_resamples, seed), level)
    changed = differences[differences != 0]
    if len(changed) <= 13:
        bits = np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed)) & 1
        sums = np.abs((2 * bits - 1) @ changed)
        extra = 0
    else:
        generator = np.random.default_rng(seed)
        sums = np.concatenate(
            [
                np.abs((2 * generator.integers(0, 2, (rows, len(changed))) - 1) @ changed)
                for rows in _rows(num_resamples, len(changed))
            ]
        )
        extra = 1  # the observed pattern is one of the possible ones
    # A sum that is equal up to rounding counts as equal.
    as_large = np.count_nonzero(sums >= abs(changed.sum()) - 1e-9)
    return PairedTest(float(differences.mean()), interval, float((as_large + extra) / (len(sums) + extra)))


def _matrix(scores: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(
            f"Scores of shape {matrix.shape} are no results: they need one row per problem and one column per sample."
        )
    return matrix


def _means(scores: ArrayLike) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    if means.ndim != 1:
        means = _matrix(scores).mean(1)
    if not means.size or not np.isfinite(means).all():
        raise DataError("There are no scores, or some are not finite numbers. Score at least one problem.")
    return means


def _rows(num_resamples: int, num_problems: int) -> list[int]:
    """Numbers of resamples that are drawn together: at most 8 million values at a time."""
    most = max(1, 8_000_000 // max(num_problems, 1))
    return [min(most, num_resamples - start) for start in range(0, num_resamples, most)]


def _resampled_means(means: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [
            means[generator.integers(0, len(means), (rows, len(means)))].mean(1)
            for rows in _rows(num_resamples, len(means))
        ]
    )


def _percentiles(values: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
