# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Importance weights and sampling filters: constants, transformers' own filters, and what the correction removes."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from omniopd_trl.errors import ConfigError
from omniopd_trl.method import (
    SamplingFilters,
    chunk_loss,
    importance_weights,
    kept_log_mass,
    lowest_kept_logit,
    posterior_mean,
)

FILTERS = [
    SamplingFilters(top_p=0.9),
    SamplingFilters(top_p=0.3),
    SamplingFilters(top_k=5),
    SamplingFilters(min_p=0.1),
    SamplingFilters(top_k=20, top_p=0.7, min_p=0.05),
    SamplingFilters(top_k=500),
    SamplingFilters(),
]

pytestmark = pytest.mark.case("R16")


def test_weights_by_hand():
    """The ratio of the probabilities, truncated above; 1 where the sampler's is not known."""
    policy, sampler = torch.tensor([0.5, 0.2, 0.9, 0.4]).log(), torch.tensor([0.25, 0.4, 0.1, math.nan]).log()
    torch.testing.assert_close(importance_weights(policy, sampler, 3.0), torch.tensor([2.0, 0.5, 3.0, 1.0]))
    torch.testing.assert_close(importance_weights(policy, sampler)[2], torch.tensor(9.0))


def test_weights_have_no_gradient_and_one_shape():
    """They are constants, and are never broadcast."""
    assert not importance_weights(torch.zeros(2, requires_grad=True), torch.zeros(2)).requires_grad
    with pytest.raises(ConfigError, match=r"`logprobs` has shape \(2,\) and `sampling_logprobs` \(1,\)"):
        importance_weights(torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_tokens_that_transformers_keeps(filters):
    """For flat, peaked and tied distributions, alone and combined."""
    warpers = LogitsProcessorList()
    if filters.top_k:
        warpers.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        warpers.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p:
        warpers.append(MinPLogitsWarper(filters.min_p))
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 3.0, 30.0):
        logits = torch.randn(50, 100, generator=generator, dtype=torch.float64) * scale
        kept = logits >= lowest_kept_logit(logits, filters)[:, None]
        assert torch.equal(kept, warpers(None, logits) > -math.inf)
        mass = kept_log_mass(logits, lowest_kept_logit(logits, filters))
        torch.testing.assert_close(mass.exp(), (logits.softmax(-1) * kept).sum(-1))


class TestConstantSupport:
    """A teacher without information: the expected gradient over what a filtered sampler draws."""

    def expected_gradient(self, form: str, support: float = 0.5) -> torch.Tensor:
        """The exact expectation over all tokens that the filter keeps."""
        theta = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], dtype=torch.float64)
        lowest = lowest_kept_logit(theta, SamplingFilters(top_p=0.9))
        mass = kept_log_mass(theta, lowest)
        total = torch.zeros_like(theta)
        for token in (theta >= lowest).nonzero()[:, 0].tolist():
            logits = theta.clone().requires_grad_()
            scored = logits.log_softmax(-1)[token]
            weight = torch.tensor(support, dtype=torch.float64)
            if form != "plain":
                weight = weight * importance_weights(scored, scored.detach() - mass, 3.0)
            if form == "corrected":
                scored = scored - kept_log_mass(logits, lowest)
            chunk_loss(scored[None], weight[None]).backward()
            total += (theta.log_softmax(-1)[token] - mass).exp() * logits.grad
        return total

    def test_weights_alone_do_not_remove_the_drift(self):
        """Inside the nucleus every ratio is Z: the gradient shrinks by it, and still moves mass into the nucleus."""
        plain, weighted = self.expected_gradient("plain"), self.expected_gradient("weighted")
        assert plain.norm() > 0.01
        torch.testing.assert_close(weighted / plain, (weighted / plain)[0].expand(6))
        assert 0.9 < (weighted / plain)[0] < 1

    def test_the_filtered_score_removes_it(self):
        """Exactly: the expected score of the distribution that sampled is zero."""
        assert self.expected_gradient("corrected").abs().max() < 1e-7

    def test_the_expectation_is_that_of_the_policy_with_the_support_of_the_chunk_outside(self):
        """The same as sampling without the filter where the tokens outside have the support of those inside."""
        torch.testing.assert_close(
            self.expected_gradient("corrected", 0.9), torch.zeros(6, dtype=torch.float64), atol=1e-7, rtol=0
        )


SGD, ADAMW = partial(torch.optim.SGD, lr=26), partial(torch.optim.AdamW, lr=0.03, weight_decay=0)


def drift(
    form: str,
    filters: SamplingFilters,
    num_chunks: int = 85,
    seeds: int = 5,
    centered: bool = False,
    optimizer_of: Callable[..., torch.optim.Optimizer] = SGD,
) -> float:
    """KL(reference || policy) after 40 steps with a teacher without information, in nats per token.

    The policy is a table of 20 contexts and 20 tokens in float64. Each step samples chunks of 10 tokens. All
    similarities are 0.5, with 4 rollouts and a prior strength of 1.
    """
    reference = 2 * torch.randn(20, 20, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    distances = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        theta = reference.clone().requires_grad_()
        optimizer = optimizer_of([theta])
        for _ in range(40):
            lowest = lowest_kept_logit(theta.detach(), filters)
            sampler = theta.detach().masked_fill(theta.detach() < lowest[:, None], -math.inf).softmax(-1)
            contexts = torch.randint(20, (num_chunks, 10), generator=generator)
            tokens = torch.multinomial(sampler[contexts.flatten()], 1, generator=generator).view_as(contexts)
            scores = theta.log_softmax(-1)[contexts, tokens]
            prior = scores.detach().mean(-1).exp()
            posterior = posterior_mean(torch.full_like(prior, 4 * 0.5), 4, prior, 1.0)
            weights = (posterior - posterior.mean() if centered else posterior)[:, None].expand_as(scores)
            if form != "plain":
                log_mass = kept_log_mass(theta, lowest)[contexts]
                weights = weights * importance_weights(scores, scores.detach() - log_mass.detach(), 3.0)
                scores = scores - log_mass if form == "corrected" else scores
            optimizer.zero_grad()
            (chunk_loss(scores, weights) / scores.numel()).backward()
            optimizer.step()
        before, after = reference.log_softmax(-1), theta.detach().log_softmax(-1)
        distances.append((before.exp() * (before - after)).sum(-1).mean().item())
    return sum(distances) / seeds


def test_the_drift_of_a_run():
    """top_p=0.9: the distance from the reference falls by more than ten times, to that of a run without a filter."""
    filtered = SamplingFilters(top_p=0.9)
    plain, corrected, on_policy = drift("plain", filtered), drift("corrected", filtered), drift("plain", FILTERS[-1])
    assert plain == pytest.approx(0.18, rel=0.2)
    assert on_policy == pytest.approx(0.0165, rel=0.2)
    assert corrected < plain / 10
    assert corrected < 1.2 * on_policy
    assert drift("weighted", filtered, seeds=1) > plain / 2
    assert drift("plain", filtered, seeds=1, centered=True) < plain / 100

    plain, corrected, on_policy = (
        drift(form, filters, seeds=2, optimizer_of=ADAMW)
        for form, filters in (("plain", filtered), ("corrected", filtered), ("plain", FILTERS[-1]))
    )
    assert corrected < plain / 5
    assert corrected < 1.2 * on_policy
