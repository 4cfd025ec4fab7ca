# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the paper's section 4 promises, checked on the functions that compute it."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd_trl.method.loss import anchor_kl, chunk_loss, combine
from omniopd_trl.method.posterior import chunk_prior, posterior_mean
from omniopd_trl.method.similarity import get_similarity, similarity_matrix
from omniopd_trl.method.weights import StepChunks, get_chunk_weights

SEEDS = st.integers(0, 10_000)
# What float32 may add to a posterior mean.
ROUNDING = 1e-6


class Policy:
    """A softmax policy of six tokens: `logits = features @ theta`, with parameters shared between positions."""

    def __init__(self, seed: int, length: int, width: int = 3, vocab: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(length, width, generator=generator, dtype=torch.float64)
        self.theta = torch.randn(width, vocab, generator=generator, dtype=torch.float64).requires_grad_()
        self.tokens = torch.randint(vocab, (length, 1), generator=generator)

    def logits(self) -> Tensor:
        return self.features @ self.theta

    def logprobs(self) -> Tensor:
        return self.logits().log_softmax(-1).gather(-1, self.tokens).squeeze(-1)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]


def chunk_gradient(policy: Policy, pi_hat: Tensor) -> Tensor:
    """Gradient of the chunk loss of a trajectory that is one chunk."""
    logprobs = policy.logprobs()[None]
    return policy.gradient(chunk_loss(logprobs, pi_hat.expand_as(logprobs)))


# ---- Theorem 4.1 ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(SEEDS, st.integers(1, 20), st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 10))
def test_4_1a_gradient_is_bounded_by_the_scores(
    seed: int, length: int, similarities: list[float], prior_strength: float
) -> None:
    """Eq. 11: whatever the rollouts say, the norm stays below the sum of the norms of the scores."""
    policy = Policy(seed, length)
    prior = chunk_prior(policy.logprobs())
    pi_hat = posterior_mean(sum(similarities), len(similarities), prior, prior_strength)
    bound = sum(policy.gradient(logprob).norm() for logprob in policy.logprobs())
    assert chunk_gradient(policy, pi_hat).norm() <= bound * (1 + ROUNDING)


def test_4_1a_reverse_kl_has_no_such_bound() -> None:
    """The contrast: the gradient of KL(theta || teacher) grows without end as the teacher denies a token."""
    policy = Policy(0, 1)
    norms = []
    for nats in (100.0, 1000.0, 10_000.0):
        teacher = torch.zeros(6, dtype=torch.float64)
        teacher[policy.logits().argmax()] = -nats
        log_p, log_q = policy.logits().log_softmax(-1), teacher.log_softmax(-1)
        norms.append(policy.gradient((log_p.exp() * (log_p - log_q)).sum()).norm())
    assert norms[1] > 9 * norms[0]
    assert norms[2] > 9 * norms[1]


@settings(deadline=None, max_examples=100)
@given(SEEDS, st.integers(1, 20), st.integers(1, 40), st.floats(0.01, 10), st.floats(0, 1))
def test_4_1b_the_prior_keeps_the_gradient_alive(
    seed: int, length: int, num_rollouts: int, prior_strength: float, mean: float
) -> None:
    """Eq. 12: never below alpha * prior / (N + alpha), so without any match there is still a gradient."""
    policy = Policy(seed, length)
    prior = chunk_prior(policy.logprobs())
    floor = prior_strength * prior / (num_rollouts + prior_strength)
    assert floor > 0
    assert posterior_mean(mean * num_rollouts, num_rollouts, prior, prior_strength) >= floor * (1 - ROUNDING)
    at_worst = posterior_mean(0.0, num_rollouts, prior, prior_strength)
    torch.testing.assert_close(at_worst, floor)
    assert chunk_gradient(policy, at_worst).norm() > 0


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 20), st.integers(1, 40))
def test_4_1b_without_a_prior_the_gradient_dies(seed: int, length: int, num_rollouts: int) -> None:
    """The contrast: with alpha = 0 and no match, the chunk teaches nothing."""
    policy = Policy(seed, length)
    pi_hat = posterior_mean(0.0, num_rollouts, chunk_prior(policy.logprobs()), prior_strength=0.0)
    assert pi_hat == 0
    assert chunk_gradient(policy, pi_hat).norm() == 0


def test_4_1_speaks_of_no_baseline() -> None:
    """With a baseline of ours the weight may be negative or zero: 4.1(b) is a promise of `"none"` alone."""
    chunks = StepChunks(torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0, 0, 1]), moving_average=0.5)
    assert (get_chunk_weights("none")(chunks) > 0).all()
    for baseline in ("batch", "trajectory", "moving_average"):
        weights = get_chunk_weights(baseline)(chunks)
        assert weights.min() < 0
        assert (weights == 0).any()


@st.composite
def rollout_laws(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """A law of the similarity of one rollout: a few values and their probabilities."""
    values = draw(st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True))
    weights = draw(st.lists(st.floats(0.05, 1), min_size=len(values), max_size=len(values)))
    return values, [weight / sum(weights) for weight in weights]


@settings(deadline=None, max_examples=100)
@given(rollout_laws(), st.integers(1, 5), st.floats(0, 1), st.floats(0, 5))
def test_4_1c_bias_and_variance(
    law: tuple[list[float], list[float]], num_rollouts: int, prior: float, prior_strength: float
) -> None:
    """Eq. 13, exactly: the mean over every possible draw of rollouts, not a simulation."""
    values, probabilities = law
    mu = sum(v * p for v, p in zip(values, probabilities, strict=True))
    variance = sum(p * (v - mu) ** 2 for v, p in zip(values, probabilities, strict=True))
    draws = list(itertools.product(range(len(values)), repeat=num_rollouts))
    chance = torch.tensor([math.prod(probabilities[i] for i in draw) for draw in draws], dtype=torch.float64)
    sums = torch.tensor([sum(values[i] for i in draw) for draw in draws], dtype=torch.float64)

    pi_hat = posterior_mean(sums, num_rollouts, prior, prior_strength).double()
    frequentist = posterior_mean(sums, num_rollouts, prior, prior_strength=0.0).double()
    mse = (chance * (pi_hat - mu) ** 2).sum()
    total = num_rollouts + prior_strength
    expected = num_rollouts * variance / total**2 + prior_strength**2 * (prior - mu) ** 2 / total**2
    assert mse.item() == pytest.approx(expected, abs=ROUNDING)

    def spread(estimate: Tensor) -> float:
        return (chance * (estimate - (chance * estimate).sum()) ** 2).sum().item()

    assert spread(frequentist) == pytest.approx(variance / num_rollouts, abs=ROUNDING)
    assert spread(pi_hat) == pytest.approx((num_rollouts / total) ** 2 * spread(frequentist), abs=ROUNDING)


# ---- Theorem 4.2 ----------------------------------------------------------------------------------------------------


def hoeffding(num_rollouts: int, prior_strength: float, epsilon: float) -> float:
    """The right-hand side of Eq. 14."""
    return 2 * math.exp(-2 * (num_rollouts + prior_strength) ** 2 * epsilon**2 / num_rollouts)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.floats(0, 5), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.6))
def test_4_2_concentration(num_rollouts: int, prior_strength: float, mu: float, prior: float, epsilon: float) -> None:
    """Eq. 14, with the exact tail of rollouts that match or do not, the widest law there is."""
    matches = torch.arange(num_rollouts + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(num_rollouts, torch.tensor(mu, dtype=torch.float64)).log_prob(matches).exp()
    pi_hat = posterior_mean(matches, num_rollouts, prior, prior_strength).double()
    total = num_rollouts + prior_strength
    target = num_rollouts / total * mu + prior_strength / total * prior
    # A little above epsilon: a deviation of exactly epsilon may round to either side, and the bound is continuous.
    tail = chance[(pi_hat - target).abs() >= epsilon + ROUNDING].sum()
    assert tail <= hoeffding(num_rollouts, prior_strength, epsilon) + 1e-9


def test_4_2_empirically() -> None:
    """40,000 audits of the paper's size, with similarities of a skewed law: the bound holds, and N = 40 is tighter."""
    generator = torch.Generator().manual_seed(0)
    tails = {}
    for num_rollouts in (10, 40):
        similarities = torch.rand(40_000, num_rollouts, generator=generator) ** 2  # mean 1/3
        pi_hat = posterior_mean(similarities.sum(-1), num_rollouts, 0.6)
        target = num_rollouts / (num_rollouts + 1) / 3 + 0.6 / (num_rollouts + 1)
        for epsilon in (0.05, 0.1, 0.2, 0.3):
            tail = ((pi_hat - target).abs() >= epsilon).float().mean().item()
            assert tail <= hoeffding(num_rollouts, 1.0, epsilon)
            tails[num_rollouts, epsilon] = tail
    assert tails[10, 0.1] > 0.1 > 3 * tails[40, 0.1]


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 20), st.integers(1, 30), st.floats(0, 5), st.floats(0, 1))
def test_4_2_variance_of_the_gradient(
    seed: int, length: int, num_rollouts: int, prior_strength: float, mu: float
) -> None:
    """Eq. 15: what the rollouts add to the variance of the gradient, over all outcomes."""
    policy = Policy(seed, length)
    matches = torch.arange(num_rollouts + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(num_rollouts, torch.tensor(mu, dtype=torch.float64)).log_prob(matches).exp()
    estimates = posterior_mean(matches, num_rollouts, chunk_prior(policy.logprobs()), prior_strength)
    gradients = torch.stack([chunk_gradient(policy, pi_hat).flatten() for pi_hat in estimates])
    mean = chance @ gradients
    variance = chance @ (gradients - mean).square().sum(-1)
    score = policy.gradient(policy.logprobs().sum()).square().sum()
    assert variance <= num_rollouts / (4 * (num_rollouts + prior_strength) ** 2) * score * (1 + 1e-4)


# ---- Theorem 4.3 ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(SEEDS, st.integers(2, 12), st.floats(0.01, 10))
def test_4_3_pinsker(seed: int, vocab: int, scale: float) -> None:
    """Eq. 16: total variation is bounded by the anchor of that position."""
    generator = torch.Generator().manual_seed(seed)
    ref, theta = torch.randn(2, 1, vocab, generator=generator, dtype=torch.float64) * scale
    total_variation = (ref.softmax(-1) - theta.softmax(-1)).abs().sum() / 2
    kl = anchor_kl(ref, theta, torch.tensor([True]))
    assert total_variation <= math.sqrt(max(kl.item(), 0.0) / 2) + 1e-12


def minimize(policy: Policy, audited: Tensor, weights: Tensor, beta: float) -> tuple[float, float]:
    """The improvement of the chunk loss and the summed anchor at the minimizer of Eq. 8, found by optimization."""
    ref_logits = policy.logits().detach()

    def terms() -> tuple[Tensor, Tensor]:
        logprobs = policy.logprobs()
        return chunk_loss(logprobs[None], weights[None]), anchor_kl(ref_logits, policy.logits(), ~audited)

    def objective() -> Tensor:
        counts = {"num_tokens": 1, "num_sequences": 1, "num_audited": 1, "num_unaudited": 1}
        return combine(*terms(), beta=beta, normalization="sum", **counts)

    at_reference = terms()[0].item()
    solver = torch.optim.LBFGS(
        [policy.theta], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    solver.step(closure)
    # The objective is convex in theta, so a point without gradient is a minimizer.
    assert policy.gradient(objective()).norm() < 1e-6 * max(1.0, beta)
    chunk, kl = terms()
    return at_reference - chunk.item(), kl.item()


@pytest.mark.parametrize("seed", range(6))
def test_4_3_drift_has_a_budget(seed: int) -> None:
    """Eq. 17 at real minimizers: within the budget, never vacuous, and vanishing as beta grows."""
    audited = torch.tensor([True, True, True, False, False, False, False, False])
    weights = posterior_mean(torch.tensor([6.0, 6.0, 6.0]), 10, 0.5).double()
    weights = torch.cat([weights, torch.zeros(5, dtype=torch.float64)])
    drifts = []
    for beta in (0.1, 1.0, 10.0, 100.0, 1000.0):
        improvement, kl = minimize(Policy(seed, length=8), audited, weights, beta)
        assert improvement > 0
        assert 0 < kl <= improvement / beta + 1e-9
        drifts.append(kl)
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < 1e-3 * drifts[0]


# ---- Theorem 4.4 ----------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["we", "add", "three", "and", "four", "so", "seven"]), min_size=1, max_size=10)


def shuffled(words: list[str]) -> str:
    return " ".join(sorted(words))


def loud(words: list[str]) -> str:
    return "  " + "!  ".join(words).upper() + "..."


def repeated(words: list[str]) -> str:
    return " ".join(words + words[::-1])


def padded(words: list[str]) -> str:
    return "\n " + " ".join(words) + "\t"


def upper(words: list[str]) -> str:
    return "\n".join(words).upper()


def length_only(chunk: str, rollout: str) -> float:
    """A function of a user's own, for which all rollouts of one length are the same."""
    return min(len(chunk), len(rollout)) / max(len(chunk), len(rollout))


@pytest.mark.parametrize(
    ("similarity", "rewrite"),
    [
        ("edit", padded),
        ("exact", padded),
        ("rouge1", shuffled),
        ("rouge1", loud),
        ("rougeL", loud),
        ("jaccard", shuffled),
        ("jaccard", repeated),
        ("bleu1", upper),
        ("bleu1", shuffled),
        ("bleu2", upper),
        (length_only, shuffled),
    ],
)
@settings(deadline=None, max_examples=40)
@given(chunks=st.lists(WORDS, min_size=2, max_size=2), rollouts=st.lists(WORDS, min_size=1, max_size=5), seed=SEEDS)
def test_4_4_what_phi_cannot_see_changes_nothing(
    similarity: object, rewrite: object, chunks: list[list[str]], rollouts: list[list[str]], seed: int
) -> None:
    """Eq. 18: rollouts that phi cannot tell apart give the same estimator, the same loss and the same gradient."""
    # Four tokens for each of the two chunks.
    policy = Policy(seed, length=8)
    texts = [" ".join(chunk) for chunk in chunks]

    def audit(written: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        scores = similarity_matrix(texts, [written, written], similarity)  # type: ignore[arg-type]
        logprobs = policy.logprobs()
        priors = torch.stack([chunk_prior(logprobs[:4]), chunk_prior(logprobs[4:])])
        pi_hat = posterior_mean(torch.tensor(scores).sum(-1), len(written), priors)
        loss = chunk_loss(logprobs[None], pi_hat.repeat_interleave(4)[None])
        return pi_hat, loss, policy.gradient(loss)

    plain = audit([" ".join(words) for words in rollouts])
    rewritten = audit([rewrite(words) for words in rollouts])  # type: ignore[operator]
    for before, after in zip(plain, rewritten, strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(WORDS, WORDS)
def test_4_4_is_a_statement_about_phi(chunk: list[str], rollout: list[str]) -> None:
    """The contrast: a function that sees the order of words does tell a shuffled rollout from the original."""
    assume(rollout != sorted(rollout))
    assert get_similarity("edit")(" ".join(rollout), shuffled(rollout)) < 1
    assert get_similarity("rougeL")(" ".join(rollout), shuffled(rollout)) < 1
    assert get_similarity("rouge1")(" ".join(chunk), shuffled(rollout)) == get_similarity("rouge1")(
        " ".join(chunk), " ".join(rollout)
    )
