# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Eqs. 4 and 5: the prior, the posterior mean, and the baselines that may be subtracted."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.errors import ConfigError, NonFiniteError
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.weights import BASELINES, StepChunks, get_chunk_weights

PROBABILITY = st.floats(0, 1)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [([0.25, 1.0], 0.5), ([0.5, 0.5, 0.5], 0.5), ([1.0], 1.0), ([0.1, 0.2, 0.4], 0.2), ([0.5, 0.0], 0.0)],
)
def test_prior_constants(probabilities: list[float], expected: float) -> None:
    """Geometric means computed by hand; a token of probability 0 makes it 0."""
    torch.testing.assert_close(chunk_prior(torch.tensor(probabilities).log()), torch.tensor(expected))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-30, 0), min_size=1, max_size=60))
def test_prior_matches_float64(logprobs: list[float]) -> None:
    """The C-th root of the product, in float64 and as the paper writes it."""
    product = math.prod(math.exp(logprob / len(logprobs)) for logprob in logprobs)
    torch.testing.assert_close(chunk_prior(torch.tensor(logprobs)), torch.tensor(product), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prior_is_a_constant_in_float32(dtype: torch.dtype) -> None:
    """Detached, a scalar, float32, and never above 1 however the log-probabilities were rounded."""
    logprobs = torch.tensor([-0.5, -1.5], dtype=dtype, requires_grad=True)
    prior = chunk_prior(logprobs)
    assert (prior.dtype, prior.shape, prior.requires_grad) == (torch.float32, (), False)
    torch.testing.assert_close(prior, torch.tensor(math.exp(-1)))
    assert chunk_prior(torch.tensor([1e-6, 2e-6])) == 1.0


def test_prior_of_nonsense() -> None:
    """Nothing to average, probabilities instead of their logarithms, NaN: each is named."""
    for shape in ((0,), (), (2, 3)):
        with pytest.raises(ConfigError, match="one log-probability for each token"):
            chunk_prior(torch.zeros(shape))
    with pytest.raises(ConfigError, match="at most 0"):
        chunk_prior(torch.tensor([0.25, -1.0]))
    with pytest.raises(NonFiniteError, match="nan"):
        chunk_prior(torch.tensor([-1.0, float("nan")]))


@pytest.mark.parametrize(
    ("similarity_sum", "num_rollouts", "prior", "prior_strength", "expected"),
    [
        (3.0, 10, 0.5, 1.0, 3.5 / 11),
        (0.0, 10, 0.5, 1.0, 0.5 / 11),
        (0.0, 10, 0.5, 0.0, 0.0),
        (3.0, 10, 0.5, 0.0, 0.3),
        (10.0, 10, 1.0, 1.0, 1.0),
        (2.0, 4, 0.0, 4.0, 0.25),
        (1.0, 1, 0.0, 1.0, 0.5),
        (0.0, 1, 1.0, 1e6, 1.0),
    ],
)
def test_posterior_constants(
    similarity_sum: float, num_rollouts: int, prior: float, prior_strength: float, expected: float
) -> None:
    """Eq. 5 computed by hand, from plain numbers."""
    result = posterior_mean(similarity_sum, num_rollouts, prior, prior_strength)
    torch.testing.assert_close(result, torch.tensor(expected), atol=2e-6, rtol=1e-6)


def test_prior_strength_is_one_by_default() -> None:
    """The paper's alpha."""
    assert posterior_mean(3.0, 10, 0.5) == posterior_mean(3.0, 10, 0.5, 1.0)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(PROBABILITY, st.integers(1, 40), PROBABILITY), min_size=1, max_size=8), st.floats(0, 10))
def test_posterior_is_vectorized(cases: list[tuple[float, int, float]], prior_strength: float) -> None:
    """Each chunk with its own number of rollouts gives what it gives alone, and lies between evidence and prior."""
    mean, num_rollouts, prior = (torch.tensor(column) for column in zip(*cases, strict=True))
    result = posterior_mean(mean * num_rollouts, num_rollouts, prior, prior_strength)
    assert (result.dtype, result.shape) == (torch.float32, mean.shape)
    for i, (m, n, p) in enumerate(cases):
        expected = n / (n + prior_strength) * m + prior_strength / (n + prior_strength) * p  # Eq. 10
        assert result[i] == pytest.approx(expected, abs=1e-6)
        assert min(m, p) - 1e-6 <= result[i] <= max(m, p) + 1e-6


def test_posterior_is_a_constant_in_0_1() -> None:
    """Detached, and rounding in the sum of similarities does not leave [0, 1]."""
    sums = torch.tensor([10.00001, -0.000001], requires_grad=True)
    result = posterior_mean(sums, 10, torch.tensor([1.0, 0.0], requires_grad=True))
    assert not result.requires_grad
    assert result.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("prior_strength", [0.0, 1.0])
def test_a_chunk_without_rollouts_is_refused(prior_strength: float) -> None:
    """0 / 0 would be NaN, and the bare prior is no evidence: the message says to drop the chunk."""
    with pytest.raises(ConfigError, match="Drop the chunk"):
        posterior_mean(torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), 0.5, prior_strength)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11.0, 10, 0.5, 1.0), "`similarity_sum` is 11.0 for 10.0 rollouts"),
        ((-1.0, 10, 0.5, 1.0), "`similarity_sum` is -1.0"),
        ((float("nan"), 10, 0.5, 1.0), "`similarity_sum` is nan"),
        ((1.0, -1, 0.5, 1.0), "`num_rollouts` is -1"),
        ((1.0, 10, 1.5, 1.0), "`prior` is 1.5"),
        ((1.0, 10, -0.1, 1.0), "`prior` is -0.1"),
        ((1.0, 10, float("nan"), 1.0), "`prior` is nan"),
        ((1.0, 10, 0.5, -1.0), "`prior_strength` is -1.0"),
        ((1.0, 10, 0.5, float("nan")), "`prior_strength` is nan"),
        ((1.0, 10, 0.5, float("inf")), "`prior_strength` is inf"),
        ((torch.full((9,), 3.0), 2, 0.5, 1.0), r"3.0, '...'\] for 2.0"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    """Each message names the value; NaN never passes."""
    with pytest.raises(ConfigError, match=message):
        posterior_mean(*arguments)


# ---- baselines ------------------------------------------------------------------------------------------------------

POSTERIORS = torch.tensor([0.2, 0.8, 0.5, 0.4, 0.9])
TRAJECTORIES = torch.tensor([7, 3, 7, 7, 5])


def weights(posteriors: torch.Tensor, trajectories: torch.Tensor, name: str, **more: Any) -> torch.Tensor:
    return get_chunk_weights(name)(StepChunks(posteriors, trajectories, **more))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "none"}, [0.2, 0.8, 0.5, 0.4, 0.9]),
        ({"name": "none", "moving_average": 0.5}, [0.2, 0.8, 0.5, 0.4, 0.9]),
        ({"name": "batch"}, [-0.36, 0.24, -0.06, -0.16, 0.34]),
        # 0.2 - (0.5 + 0.4) / 2, and so on; trajectories 3 and 5 have one chunk each.
        ({"name": "trajectory"}, [-0.25, 0.0, 0.2, 0.05, 0.0]),
        ({"name": "moving_average", "moving_average": 0.6}, [-0.4, 0.2, -0.1, -0.2, 0.3]),
        ({"name": "moving_average", "moving_average": 0.0}, [0.2, 0.8, 0.5, 0.4, 0.9]),
        ({"name": "moving_average"}, [-0.25, 0.0, 0.2, 0.05, 0.0]),
        ({"name": "constant"}, [0.56] * 5),
    ],
)
def test_baseline_constants(options: dict[str, Any], expected: list[float]) -> None:
    """Each baseline on five chunks of three trajectories, worked out by hand."""
    torch.testing.assert_close(weights(POSTERIORS, TRAJECTORIES, **options), torch.tensor(expected))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(PROBABILITY, st.integers(-3, 3)), max_size=12))
def test_trajectory_baseline_matches_a_loop(chunks: list[tuple[float, int]]) -> None:
    """Any grouping, in any order, agrees with the mean of the others written as a loop."""
    expected = []
    for i, (posterior, trajectory) in enumerate(chunks):
        others = [p for j, (p, t) in enumerate(chunks) if t == trajectory and j != i]
        expected.append(posterior - sum(others) / len(others) if others else 0.0)
    posteriors = torch.tensor([posterior for posterior, _ in chunks])
    ids = torch.tensor([trajectory for _, trajectory in chunks], dtype=torch.long)
    result = weights(posteriors, ids, "trajectory")
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_own_share_in_the_batch_mean() -> None:
    """The bias that the documentation states: (1 - 1/K) times the distance to the mean of the others."""
    others = (POSTERIORS.sum() - POSTERIORS) / 4
    torch.testing.assert_close(weights(POSTERIORS, TRAJECTORIES, "batch"), (1 - 1 / 5) * (POSTERIORS - others))


@settings(deadline=None, max_examples=50)
@given(st.lists(PROBABILITY, max_size=20), st.integers(0, 2**31))
def test_shuffled_weights_are_the_posteriors_in_another_order(posteriors: list[float], seed: int) -> None:
    """The same numbers, in an order that the seed alone decides; any chunk may get any of them."""
    given_posteriors = torch.tensor(posteriors)
    ids = torch.zeros(len(posteriors), dtype=torch.long)
    shuffled = weights(given_posteriors, ids, "shuffled", seed=seed)
    assert torch.equal(shuffled.sort().values, given_posteriors.sort().values)
    assert torch.equal(shuffled, weights(given_posteriors, ids, "shuffled", seed=seed))


def test_shuffles_of_other_seeds_are_others() -> None:
    """Over many seeds each posterior comes to each chunk equally often, and across trajectories."""
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        shuffled = weights(POSTERIORS, TRAJECTORIES, "shuffled", seed=seed)
        counts += shuffled[:, None] == POSTERIORS[None]
    assert (counts / 2000 - 1 / 5).abs().max() < 0.05


@pytest.mark.parametrize("baseline", BASELINES)
def test_weights_are_constants_in_float32(baseline: str) -> None:
    """Detached and float32, also when there is no chunk at all."""
    for posteriors in (POSTERIORS.double().requires_grad_(), torch.zeros(0)):
        ids = torch.zeros(len(posteriors), dtype=torch.long)
        result = weights(posteriors, ids, baseline, moving_average=0.5)
        assert (result.dtype, result.shape, result.requires_grad) == (torch.float32, posteriors.shape, False)


def test_a_function_of_the_callers() -> None:
    """It gets the chunks, and may read all that is there; what it returns becomes float32."""

    def squared(chunks: StepChunks) -> torch.Tensor:
        return chunks.posteriors.double() ** 2 * chunks.similarities

    chunks = StepChunks(POSTERIORS, TRAJECTORIES, similarities=torch.full((5,), 0.5))
    made = get_chunk_weights(squared)
    assert made.needs_whole_step
    torch.testing.assert_close(made(chunks), POSTERIORS**2 / 2)
    assert get_chunk_weights(made) is made


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.zeros(4), r"a tensor of shape \(4,\) for 5 chunks"),
        (torch.zeros(5, 1), r"a tensor of shape \(5, 1\) for 5 chunks"),
        (torch.tensor([0.0, 1.0, float("nan"), 0.0, 0.0]), r"a tensor of shape \(5,\) that holds nan"),
        (torch.tensor([0.0, 1.0, float("inf"), 0.0, 0.0]), r"a tensor of shape \(5,\) that holds inf"),
        (0.5, "returned 0.5 for 5 chunks"),
        (None, "returned None for 5 chunks"),
        ("none", "returned 'none' for 5 chunks"),
    ],
)
def test_what_a_function_returns_is_checked(returned: Any, words: str) -> None:
    """One finite number for each chunk, or an error that says what came instead."""
    with pytest.raises(ConfigError, match=words):
        get_chunk_weights(lambda chunks: returned)(StepChunks(POSTERIORS, TRAJECTORIES))


def test_bad_baseline() -> None:
    """An unknown name, what is no function, and shapes that do not fit are named."""
    with pytest.raises(ConfigError, match="`baseline` is 'mean', but it must be one of none, batch, trajectory"):
        get_chunk_weights("mean")
    with pytest.raises(ConfigError, match="`chunk_weights` is 3, which is neither a name nor a function"):
        get_chunk_weights(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cannot be called with the chunks of a step: too many.*f\(chunks\)"):
        get_chunk_weights(lambda: 1.0)  # type: ignore[arg-type, misc]
    for ids in (TRAJECTORIES[:3], TRAJECTORIES[None]):
        with pytest.raises(ConfigError, match="one value for each chunk"):
            StepChunks(POSTERIORS, ids)
