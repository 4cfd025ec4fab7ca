# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the estimators of the teacher's support for a chunk, where its true probability is known (Table 3)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.evals.statistics import Interval

# What a chunk's support is compared with: the teacher's probability per token, or of the whole chunk.
Truth = Literal["geometric", "total"]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one estimator over all chunks.

    Attributes:
        mse: mean squared error.
        mse_interval: its 95% confidence interval, by bootstrap over trajectories.
        correlation: Pearson correlation with the truth; NaN if one of both is constant.
        correlation_interval: its confidence interval.
    """

    mse: float
    mse_interval: Interval
    correlation: float
    correlation_interval: Interval


def true_support(logprobs: Sequence[ArrayLike], truth: Truth) -> NDArray[np.float64]:
    r"""The teacher's probability of each chunk.

    `"geometric"` is the probability per token, `exp(1/n sum_t log pi*(y_t))`, the form of the prior (Eq. 4). `"total"`
    is the probability of the whole text, `exp(sum_t log pi*(y_t))`, which `k_sem / N` with `exact` estimates.

    Args:
        logprobs: the teacher's log-probabilities of the tokens of each chunk, in nats. They are the teacher's tokens,
            so their number may differ from the chunk's length.
        truth: which of both.

    Returns:
        `(K,)`, float64, in [0, 1].

    Raises:
        ConfigError: when a chunk has no token, or `truth` is unknown.

    Example:
        >>> true_support([[-0.5, -1.5]], "geometric").round(4).tolist()
        [0.3679]
    """
    if truth not in ("geometric", "total"):
        raise ConfigError(f"`truth` is {truth!r}, but it must be one of geometric, total. Choose one of these.")
    tokens = [np.asarray(values, dtype=np.float64) for values in logprobs]
    if not all(values.size for values in tokens):
        raise ConfigError("A chunk without teacher tokens has no probability. Leave it out.")
    reduce = np.mean if truth == "geometric" else np.sum
    return np.exp([reduce(values) for values in tokens])


def accuracy(
    estimates: ArrayLike,
    truth: ArrayLike,
    groups: Sequence[Hashable],
    *,
    num_resamples: int = 2000,
) -> Accuracy:
    """Mean squared error and Pearson correlation of estimates.

    Chunks of one trajectory depend on each other, so the bootstrap resamples whole trajectories.

    Args:
        estimates: `(K,)`, an estimate for each chunk.
        truth: `(K,)`, from [`true_support`].
        groups: the trajectory of each chunk.
        num_resamples: number of resamples.

    Raises:
        DataError: when there are no chunks, or the lengths differ.
    """
    x, y = np.asarray(estimates, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) != len(groups) or not x.size:
        raise DataError(
            f"There are {x.size} estimates, {y.size} true values and {len(groups)} groups. Pass one of each per chunk."
        )
    # Both statistics are functions of these sums, and the sums of a resample are sums over its trajectories.
    of_chunk = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, (x - y) ** 2], axis=1)
    index = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(index), of_chunk.shape[1]))
    np.add.at(sums, [index[group] for group in groups], of_chunk)
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(index), np.full(len(index), 1 / len(index)), size=num_resamples)
    mse, correlation = _statistics(sums.sum(0))
    resampled_mse, resampled_correlation = _statistics(drawn @ sums)
    tails = (0.025, 0.975)
    return Accuracy(
        float(mse),
        Interval(*np.quantile(resampled_mse, tails).tolist()),
        float(correlation),
        Interval(*np.nanquantile(resampled_correlation, tails).tolist())
        if np.isfinite(resampled_correlation).any()
        else Interval(np.nan, np.nan),
    )


def _statistics(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MSE and Pearson correlation from the sums along the last dimension."""
    n, x, y, xx, yy, xy, squares = np.moveaxis(sums, -1, 0)
    # A variance below the rounding of its sums is 0.
    spread_x, spread_y = (n * xx - x * x, n * yy - y * y)
    constant = (spread_x <= 1e-12 * n * xx) | (spread_y <= 1e-12 * n * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (n * xy - x * y) / np.sqrt(spread_x * spread_y)
    return squares / n, np.where(constant, np.nan, correlation)
