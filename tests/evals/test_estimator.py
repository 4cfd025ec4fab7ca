# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The accuracy of the estimators, on numbers whose truth is known."""

import math

import numpy as np
import pytest

from omniopd_trl.cli.verify_estimator import compare
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.evals.estimator import accuracy, true_support
from omniopd_trl.journal.browse import AuditedTrajectory, ShownChunk


def test_both_statistics_equal_numpy():
    generator = np.random.default_rng(0)
    x, y = generator.random(60), generator.random(60)
    result = accuracy(x, y, range(60))
    assert result.mse == pytest.approx(np.mean((x - y) ** 2), rel=1e-12)
    assert result.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)


def test_the_interval_is_that_of_a_bootstrap_over_trajectories():
    """Against resamples that are drawn and concatenated one by one."""
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), generator.integers(1, 6, 20))
    x, y = generator.random(len(groups)), generator.random(len(groups)) + groups / 20
    result = accuracy(x, y, groups.tolist(), num_resamples=4000)
    slow = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in generator.integers(0, 20, 20)])
        slow.append((np.mean((x - y)[rows] ** 2), np.corrcoef(x[rows], y[rows])[0, 1]))
    low, high = np.quantile(slow, [0.025, 0.975], axis=0)
    for ours, k in ((result.mse_interval, 0), (result.correlation_interval, 1)):
        width = high[k] - low[k]
        assert ours == pytest.approx((low[k], high[k]), abs=width / 12)


def test_chunks_of_a_trajectory_count_as_one_observation():
    """Ten copies of each chunk give the interval of the chunks themselves, and not a narrower one."""
    generator = np.random.default_rng(2)
    x, y = generator.random(30), generator.random(30)
    once = accuracy(x, y, range(30))
    copied = accuracy(np.repeat(x, 10), np.repeat(y, 10), np.repeat(np.arange(30), 10).tolist())
    assert copied.mse_interval == pytest.approx(once.mse_interval, rel=1e-9)
    assert copied.correlation_interval == pytest.approx(once.correlation_interval, rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_a_constant_estimate_has_no_correlation(constant):
    result = accuracy([constant] * 7, np.linspace(0, 1, 7), range(7))
    assert math.isnan(result.correlation)
    assert math.isnan(result.correlation_interval.low)
    assert result.mse == pytest.approx(np.mean((constant - np.linspace(0, 1, 7)) ** 2))


def test_invalid_input_is_refused():
    with pytest.raises(DataError, match="one of each per chunk"):
        accuracy([0.1], [0.1, 0.2], [0])
    with pytest.raises(DataError, match="one of each per chunk"):
        accuracy([], [], [])
    with pytest.raises(ConfigError, match="without teacher tokens"):
        true_support([[-1.0], []], "total")
    with pytest.raises(ConfigError, match="geometric, total"):
        true_support([[-1.0]], "mean")


def test_the_truths():
    logprobs = [np.log([0.5, 0.5]), np.log([0.9, 0.1, 0.3])]
    np.testing.assert_allclose(true_support(logprobs, "total"), [0.25, 0.027])
    np.testing.assert_allclose(true_support(logprobs, "geometric"), [0.5, 0.3])


def test_the_estimates_converge_to_what_they_estimate():
    """Rollouts from a known distribution over texts: `exact` is unbiased for the probability of the chunk."""
    generator = np.random.default_rng(3)
    texts, probabilities = ["a", "b", "c"], [0.6, 0.3, 0.1]
    trajectories, logprobs = [], []
    for index in range(300):
        drawn = generator.choice(3, size=40, p=probabilities)
        chosen = int(generator.integers(3))
        rollouts = tuple(texts[k] for k in drawn)
        # The prior is wrong by far, as that of a student that knows nothing.
        chunk = ShownChunk(0, 1, 0, "", texts[chosen], rollouts, (0.0,) * 40, 0.95, 0.5)
        trajectories.append(AuditedTrajectory(0, 0, index, "t", "p", (1,), (chunk,)))
        logprobs.append([math.log(probabilities[chosen])])
    rows = compare(trajectories, logprobs, ["exact"], [4, 40], prior_strength=1.0)
    found = {(r["truth"], r["estimate"], r.get("num_rollouts")): r for r in rows}
    assert len(rows) == len(found) == 2 * (1 + 2 * 2)
    variance = np.mean([p * (1 - p) for p in probabilities])
    for count in (4, 40):
        # One token: both truths are the same.
        assert found["geometric", "frequentist", count] | {"truth": ""} == found["total", "frequentist", count] | {
            "truth": ""
        }
        assert found["total", "frequentist", count]["mse"] == pytest.approx(variance / count, rel=0.2)
        # Theorem 4.1 (c): variance N v / (N + 1)^2 and bias (0.95 - p) / (N + 1).
        bias = np.mean([((0.95 - p) / (count + 1)) ** 2 for p in probabilities])
        expected = variance * count / (count + 1) ** 2 + bias
        assert found["total", "bayesian", count]["mse"] == pytest.approx(expected, rel=0.2)
    assert found["total", "frequentist", 40]["correlation"] > found["total", "frequentist", 4]["correlation"]
    assert found["total", "prior", None]["correlation"] is None


def test_chunks_without_teacher_tokens_are_left_out():
    chunks = tuple(ShownChunk(k, k + 1, k, "", "ab"[k], ("a",), (0.0,), 0.5, 0.5) for k in range(2))
    trajectory = AuditedTrajectory(0, 0, 0, "t", "p", (1, 2), chunks)
    rows = compare([trajectory], [[math.log(0.5)], []], ["exact"], [1], 0.0)
    assert next(row for row in rows if row["estimate"] == "frequentist")["mse"] == pytest.approx(0.25)
