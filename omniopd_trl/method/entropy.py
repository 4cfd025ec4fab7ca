# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Entropy of the student's next-token distribution (Eq. 6)."""

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError

# Rows are converted to float32 in blocks of at most this many logits (64 MiB). Converting all rows at once would
# double the memory of a long trajectory with a large vocabulary.
_BLOCK_LOGITS = 2**24


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Entropy of the distribution that each token was sampled from.

    `H_t = - sum_v pi(v | x, y_<t) log pi(v | x, y_<t)`, with `pi = softmax(logits / temperature)`.

    A token that cannot be sampled (logit `-inf`) adds nothing. A row that holds NaN or `+inf`, or only `-inf`, is
    not a distribution. Its entropy is NaN, which the caller has to check for.

    Args:
        logits: `(..., V)`, any dtype, over the full vocabulary.
        temperature: the sampling temperature, above 0. The entropy is that of the sampling policy.

    Returns:
        `(...)`, float32, in nats, between 0 and `log V`.

    Raises:
        ConfigError: when `temperature` is not a finite number above 0, or `logits` has no vocabulary dimension.

    Example:
        >>> token_entropy(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
        tensor([0.6931, 0.0000])

    Reference: Eq. 6.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(
            f"`temperature` is {temperature}, but it divides the logits and must be a finite number above 0. "
            "Pass the temperature that the tokens were sampled with."
        )
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ConfigError(
            f"`logits` has shape {tuple(logits.shape)}, but its last dimension must be the vocabulary. "
            "Pass a tensor of shape (..., V)."
        )
    rows = logits.reshape(-1, logits.size(-1))
    blocks = torch.split(rows, max(1, _BLOCK_LOGITS // rows.size(-1)))
    return torch.cat([_entropy(block, temperature) for block in blocks]).reshape(logits.shape[:-1])


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    # Float64 stays float64 until the end; everything else is computed in float32.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum is subtracted before the division, which would otherwise overflow to inf - inf = NaN at a tiny
    # temperature.
    log_p = torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    # 0 * log 0 is 0 here, where 0 * -inf would be NaN.
    surprise = (-log_p).masked_fill(log_p == float("-inf"), 0.0)
    return (log_p.exp() * surprise).sum(-1).float()
