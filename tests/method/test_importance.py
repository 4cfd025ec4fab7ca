# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Importance weights and sampling filters: constants, transformers' own filters, and what the correction removes."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from omniopd_trl.errors import ConfigError
from omniopd_trl.method import SamplingFilters, chunk_loss, importance_weights, kept_log_mass, lowest_kept_logit

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
