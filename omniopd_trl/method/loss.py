# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The two terms of the objective as sums, and their normalized combination (Eq. 8)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError

Normalization = Literal["tokens", "sum", "components"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


def chunk_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    r"""Negative log-likelihood of the audited tokens, each weighted by the support of its chunk.

    `L_chunk = - sum_c pi_hat_c sum_{t in c} log pi_theta(y_t | x, y_<t)`.

    Args:
        logprobs: `(B, T)` or any other shape, in nats, with gradient.
        weights: same shape as `logprobs`. Each audited token has the `pi_hat` of its chunk, minus the baseline if
            there is one. Other tokens have 0. No gradient flows through them.

    Returns:
        A scalar tensor, the sum over the batch, in float32 (float64 if an argument is float64).

    Raises:
        ConfigError: when the shapes differ.

    Example:
        >>> chunk_loss(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[0.5, 0.5, 0.0]]))
        tensor(1.5000)

    Reference: Eq. 8, first term.
    """
    if logprobs.shape != weights.shape:
        raise ConfigError(
            f"`logprobs` has shape {tuple(logprobs.shape)} and `weights` {tuple(weights.shape)}, but both hold one "
            "value for each completion token. Pass two tensors of one shape."
        )
    weights = weights.detach()
    # Log-probabilities at other positions may be -inf or NaN (padding), and 0 * -inf and 0 * nan would be NaN.
    audited = torch.where(weights != 0, logprobs, 0.0)
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, weights.dtype), torch.float32)
    return -(weights.to(dtype) * audited.to(dtype)).sum()


def anchor_kl(ref_logits: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    r"""Exact divergence of the student from the reference on the un-audited tokens, from dense logits.

    `sum_{t in U} KL(pi_ref(. | x, y_<t) || pi_theta(. | x, y_<t))`, over the full vocabulary.

    It needs all logits at once, so it is meant for tests and small models. Training computes the same sum from
    hidden states.

    Args:
        ref_logits: `(..., V)`, of the frozen reference. No gradient flows through them.
        logits: `(..., V)`, of the student, with gradient.
        mask: `(...)`, true on un-audited completion tokens. Other positions are not read.

    Returns:
        A scalar tensor, in nats, in float32 (float64 if an argument is float64). `inf` if the student gives
        probability 0 to a token that the reference can write.

    Raises:
        ConfigError: when the shapes do not match.

    Example:
        >>> anchor_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([True]))
        tensor(0.)

    Reference: Eq. 8, second term.
    """
    if ref_logits.shape != logits.shape or mask.shape != logits.shape[:-1]:
        raise ConfigError(
            f"`ref_logits` has shape {tuple(ref_logits.shape)}, `logits` {tuple(logits.shape)} and `mask` "
            f"{tuple(mask.shape)}, but they must be (..., V), (..., V) and (...). Pass the same tokens to all three."
        )
    dtype = torch.promote_types(torch.promote_types(ref_logits.dtype, logits.dtype), torch.float32)
    # Rows are dropped first: NaN in padding must reach neither the sum nor the gradient.
    mask = mask.bool()
    log_ref = torch.log_softmax(ref_logits[mask].detach().to(dtype), dim=-1)
    log_theta = torch.log_softmax(logits[mask].to(dtype), dim=-1)
    # A token that the reference cannot write adds 0, where 0 * (-inf - log_theta) would be NaN.
    possible = log_ref > float("-inf")
    log_ratio = torch.where(possible, log_ref, 0.0) - torch.where(possible, log_theta, 0.0)
    return (log_ref.exp() * log_ratio).sum()


def combine(
    chunk_sum: Tensor,
    kl_sum: Tensor | float,
    *,
    beta: float,
    normalization: str,
    num_tokens: Tensor | int,
    num_sequences: Tensor | int,
    num_audited: Tensor | int,
    num_unaudited: Tensor | int,
    reward_sum: Tensor | float = 0.0,
) -> Tensor:
    r"""The objective: chunk loss plus trust-region anchor, and the term of a verifier if there is one, normalized.

    - `"tokens"`: `(L_chunk + beta * KL + L_reward) / num_tokens`. Keeps the paper's ratio of the two terms.
    - `"sum"`: `(L_chunk + beta * KL + L_reward) / num_sequences`. Eq. 8 of each sequence, averaged over sequences.
    - `"components"`: `L_chunk / num_audited + beta * KL / num_unaudited + L_reward / num_tokens`. Each term averaged
      over its own tokens.

    Counts are those of the global batch: all micro-batches and processes of one optimizer step. The results of the
    micro-batches then add up to the result of one large batch, and gradient accumulation is exact.

    Args:
        chunk_sum: scalar, from `chunk_loss`.
        kl_sum: scalar, from `anchor_kl`. 0 without an anchor.
        beta: weight of the anchor.
        normalization: one of `NORMALIZATIONS`.
        num_tokens: completion tokens of the student, audited or not.
        num_sequences: trajectories.
        num_audited: tokens inside chunks.
        num_unaudited: completion tokens outside chunks.
        reward_sum: scalar, `L_reward = - reward_weight sum_i A_i sum_t log pi_theta(y_i,t | x, y_i,<t)` over all
            completion tokens, with the advantages of `group_advantages`. Not in the paper.

    Returns:
        A scalar tensor.

    Raises:
        ConfigError: when `normalization` is unknown.

    Example:
        >>> counts = dict(num_tokens=10, num_sequences=2, num_audited=4, num_unaudited=6)
        >>> combine(torch.tensor(2.0), torch.tensor(6.0), beta=0.5, normalization="tokens", **counts)
        tensor(0.5000)

    Reference: Eq. 8.
    """
    if normalization == "tokens":
        return (chunk_sum + beta * kl_sum + reward_sum) / _positive(num_tokens)
    if normalization == "sum":
        return (chunk_sum + beta * kl_sum + reward_sum) / _positive(num_sequences)
    if normalization == "components":
        eq8 = chunk_sum / _positive(num_audited) + beta * kl_sum / _positive(num_unaudited)
        return eq8 + reward_sum / _positive(num_tokens)
    raise ConfigError(
        f"`normalization` is {normalization!r}, but it must be one of {', '.join(NORMALIZATIONS)}. Choose one of them."
    )


def _positive(count: Tensor | int) -> Tensor | int:
    """At least 1: a sum over no tokens is 0, and 0 / 0 would be NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
