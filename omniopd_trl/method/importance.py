# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections for a sampler that is not the policy: truncated importance weights, and filters of the sampler."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError


@dataclass(frozen=True)
class SamplingFilters:
    """What removes unlikely tokens before sampling, in the order of transformers.

    Attributes:
        top_k: number of tokens that are kept. 0 keeps all.
        top_p: the most likely tokens are kept until their probabilities add up to this. 1 keeps all.
        min_p: tokens are kept if their probability is at least this share of the highest. 0 keeps all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def importance_weights(logprobs: Tensor, sampling_logprobs: Tensor, clip_max: float = math.inf) -> Tensor:
    r"""Truncated importance weight of each token, `w_t = min(pi(y_t) / mu(y_t), clip_max)`.

    `mu` is the distribution that sampled the token. The truncation bounds the variance.

    Args:
        logprobs: `(...)`, log-probabilities of the policy, in nats.
        sampling_logprobs: `(...)`, log-probabilities of the sampler, in nats. NaN where they are not known.
        clip_max: upper bound of the weights.

    Returns:
        `(...)`, float32, without gradient. 1 where `sampling_logprobs` is NaN.

    Raises:
        ConfigError: when the shapes differ.

    Example:
        >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -9.0]), clip_max=3.0)
        tensor([1., 3.])
    """
    if logprobs.shape != sampling_logprobs.shape:
        raise ConfigError(
            f"`logprobs` has shape {tuple(logprobs.shape)} and `sampling_logprobs` {tuple(sampling_logprobs.shape)}, "
            "but both hold one value for each token. Pass two tensors of one shape."
        )
    log_ratio = torch.nan_to_num(logprobs.detach().double() - sampling_logprobs.double(), nan=0.0)
    return log_ratio.clamp(max=math.log(clip_max)).exp().float()


def lowest_kept_logit(logits: Tensor, filters: SamplingFilters) -> Tensor:
    """The threshold of the sampling filters: a token is kept if its logit is at least this.

    Args:
        logits: `(..., V)`, at the sampling temperature.
        filters: the filters.

    Returns:
        `(...)`. Tokens with equal logits are kept together.

    Example:
        >>> lowest_kept_logit(torch.tensor([0.6, 0.3, 0.1]).log(), SamplingFilters(top_p=0.8)).exp()
        tensor(0.3000)
    """
    lowest = torch.full_like(logits[..., 0], -math.inf)
    if filters.top_k > 0:
        lowest = logits.topk(min(filters.top_k, logits.size(-1)), dim=-1).values[..., -1]
    if filters.top_p < 1:
        ascending = logits.masked_fill(logits < lowest[..., None], -math.inf).sort(dim=-1).values
        kept = ascending.softmax(-1).cumsum(-1) > 1 - filters.top_p
        kept[..., -1] = True
        lowest = ascending.masked_fill(~kept, math.inf).amin(-1)
    if filters.min_p > 0:
        lowest = torch.maximum(lowest, logits.amax(-1) + math.log(filters.min_p))
    return lowest


def kept_log_mass(logits: Tensor, lowest: Tensor) -> Tensor:
    r"""Logarithm of the probability that the filters keep, `log Z = log sum_{v in S} pi(v)`.

    A filtered sampler draws from `mu(v) = pi(v) / Z` on the kept tokens `S`, so `log mu(y) = log pi(y) - log Z`.

    Args:
        logits: `(..., V)`, at the sampling temperature, with gradient.
        lowest: `(...)`, from `lowest_kept_logit`. `S` is a constant for the gradient.

    Returns:
        `(...)`, in nats, at most 0.

    Example:
        >>> kept_log_mass(torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor(0.2).log()).exp()
        tensor(0.9000)
    """
    kept = logits.masked_fill(logits < lowest[..., None], -math.inf)
    return kept.logsumexp(-1) - logits.logsumexp(-1)
