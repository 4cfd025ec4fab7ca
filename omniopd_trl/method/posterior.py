# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Support of a chunk by the teacher's rollouts: the prior (Eq. 4) and the posterior mean (Eq. 5)."""

from typing import Literal

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError, NonFiniteError

# The model whose log-probabilities `chunk_prior` gets. The paper's equations use the policy, its prose the reference.
Prior = Literal["policy", "reference"]

# Tolerance for float32 rounding of values that are exactly 1 in theory.
_ROUNDING = 1e-5


def chunk_prior(logprobs: Tensor) -> Tensor:
    r"""The student's own confidence in a chunk: the geometric mean of its token probabilities.

    `pi_bar = (prod_{t in c} pi(y_t | x, y_<t))^(1 / C) = exp(1/C sum_{t in c} log pi(y_t | x, y_<t))`.

    Args:
        logprobs: `(C,)`, in nats, the log-probabilities of the tokens of one chunk.

    Returns:
        A scalar tensor, float32, in [0, 1], without gradient.

    Raises:
        ConfigError: when `logprobs` is not a one-dimensional tensor of at least one value, or a value is above 0.
        NonFiniteError: when a value is NaN.

    Example:
        >>> chunk_prior(torch.tensor([0.25, 1.0]).log())
        tensor(0.5000)

    Reference: Eq. 4.
    """
    if logprobs.dim() != 1 or logprobs.numel() == 0:
        raise ConfigError(
            f"`logprobs` has shape {tuple(logprobs.shape)}, but it holds one log-probability for each token of one "
            "chunk. Pass a one-dimensional tensor with at least one value."
        )
    logprobs = logprobs.detach().to(torch.promote_types(logprobs.dtype, torch.float32))
    if logprobs.isnan().any():
        raise NonFiniteError("`logprobs` holds nan, so the chunk has no prior. Check the logits that it came from.")
    if (logprobs > _ROUNDING).any():
        raise ConfigError(
            f"`logprobs` holds {logprobs.max().item()}, but the logarithm of a probability is at most 0. "
            "Pass log-probabilities in nats."
        )
    # The clamp undoes rounding: a log-probability of 1e-8 would give a prior above 1.
    return logprobs.mean().clamp(max=0.0).exp().float()


def posterior_mean(
    similarity_sum: Tensor | float,
    num_rollouts: Tensor | int,
    prior: Tensor | float,
    prior_strength: float = 1.0,
) -> Tensor:
    r"""Posterior mean of the teacher's support for a chunk, in the Dirichlet-multinomial model.

    `pi_hat = (k_sem + alpha * pi_bar) / (n + alpha)`.

    A chunk without rollouts has no evidence: the formula would return the prior, or 0 / 0 with `prior_strength=0`.
    The caller drops such a chunk and counts its tokens as un-audited.

    Args:
        similarity_sum: `k_sem`, any shape, in [0, n]: the similarities of the chunk to its rollouts, summed.
        num_rollouts: `n`, at least 1: the rollouts that the teacher returned.
        prior: `pi_bar`, in [0, 1], from `chunk_prior`.
        prior_strength: `alpha`, at least 0. 0 gives the plain mean of the similarities.

    Returns:
        A float32 tensor of the arguments' common shape, in [0, 1], without gradient.

    Raises:
        ConfigError: when an argument is out of range or NaN.

    Example:
        >>> posterior_mean(torch.tensor([0.0, 8.0]), 10, 0.5)
        tensor([0.0455, 0.7727])

    Reference: Eq. 5.
    """
    k_sem, n, pi_bar = as_float(similarity_sum), as_float(num_rollouts), as_float(prior)
    # Written as "all are in range" rather than "none is out of range" to refuse NaN too.
    if not (n >= 1).all():
        raise ConfigError(
            f"`num_rollouts` is {_show(n)}, but a chunk without rollouts has no evidence to average. "
            "Drop the chunk and count its tokens as un-audited."
        )
    if not ((k_sem >= -_ROUNDING) & (k_sem <= n * (1 + _ROUNDING))).all():
        raise ConfigError(
            f"`similarity_sum` is {_show(k_sem)} for {_show(n)} rollouts, but it sums one similarity in [0, 1] for "
            "each. Check the similarity function."
        )
    if not ((pi_bar >= 0) & (pi_bar <= 1 + _ROUNDING)).all():
        raise ConfigError(f"`prior` is {_show(pi_bar)}, but it must lie in [0, 1]. Compute it with `chunk_prior`.")
    if not 0 <= prior_strength < float("inf"):
        raise ConfigError(
            f"`prior_strength` is {prior_strength}, but it must be a finite number of at least 0. "
            "Use 1.0, or 0 for no prior."
        )
    pi_hat = (k_sem + prior_strength * pi_bar) / (n + prior_strength)
    # The clamp undoes rounding: ten similarities of 1 may sum to a little more than 10.
    return pi_hat.clamp(0.0, 1.0).float()


def as_float(value: Tensor | float) -> Tensor:
    """Detach and convert to float32. Float64 is kept."""
    tensor = torch.as_tensor(value).detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _show(value: Tensor) -> str:
    return str(value.tolist() if value.numel() <= 8 else [*value.flatten()[:8].tolist(), "..."])
