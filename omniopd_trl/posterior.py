# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How strongly the teacher's rollouts support a chunk: a posterior mean, and what may be subtracted from it."""

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError, NonFiniteError

# What float32 arithmetic may add to a number that is 1 on paper.
_ROUNDING = 1e-5

BASELINES = ("none", "batch", "trajectory", "moving_average")


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
    r"""How much the teacher supports a chunk, after its rollouts: a Dirichlet-multinomial posterior mean.

    `pi_hat = (k_sem + alpha * pi_bar) / (n + alpha)`.

    A chunk without rollouts has no evidence: the formula would return the prior, or 0 / 0 with `prior_strength=0`.
    Such a chunk is dropped before it comes here, and its tokens count as un-audited.

    Args:
        similarity_sum: `k_sem`, any shape, in [0, n]: the similarities of the chunk to its rollouts, summed.
        num_rollouts: `n`, at least 1: the rollouts that really came back.
        prior: `pi_bar`, in [0, 1], from `chunk_prior`.
        prior_strength: `alpha`, at least 0; 0 is the plain mean of the similarities.

    Returns:
        A float32 tensor of the arguments' common shape, in [0, 1], without gradient.

    Raises:
        ConfigError: when an argument is out of range or NaN.

    Example:
        >>> posterior_mean(torch.tensor([0.0, 8.0]), 10, 0.5)
        tensor([0.0455, 0.7727])

    Reference: Eq. 5.
    """
    k_sem, n, pi_bar = _float(similarity_sum), _float(num_rollouts), _float(prior)
    # Written as "all are in range" rather than "none is out of range", so that NaN is refused too.
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


def centered_posteriors(
    posteriors: Tensor,
    trajectory_ids: Tensor,
    baseline: str,
    batch_mean: Tensor | float | None = None,
    moving_average: float | None = None,
) -> Tensor:
    r"""Posterior means minus a baseline: the weights of the chunk loss. Not in the paper.

    `w_c = pi_hat_c - b_c`.

    The gradient of Eq. 8 is a policy gradient with `pi_hat` as its reward, and `pi_hat` is never negative: most of it
    is a constant weight times the score of the chunk, which on on-policy samples is near zero on average (exactly zero
    if the selection of chunks did not depend on what follows them) and noise in any one batch. A baseline removes it.

    - `"none"`: `b = 0`, the paper. Theorem 4.1 (a) and (b) speaks of this form only: with a baseline a weight may be
      zero or negative.
    - `"batch"`: `b` is the mean of the global batch. Biased by the chunk's own share in that mean: with `K` chunks the
      weight is `(1 - 1/K)` times the distance to the mean of the others. The chunks of its own trajectory among those
      others bring the bias of `"trajectory"`, in proportion to their number.
    - `"trajectory"`: `b` is the mean of the *other* chunks of the trajectory. Biased because later chunks follow from
      earlier ones: what a chunk does for the chunks after it is subtracted from its own credit. A trajectory with one
      chunk has no others, and weight 0.
    - `"moving_average"`: `b` comes from earlier batches. It does not depend on the current samples and adds no bias.
      The first batch has nothing earlier and is centered by trajectory, which needs nothing from other processes
      either.

    Args:
        posteriors: `(K,)`, the posterior means of the chunks at hand.
        trajectory_ids: `(K,)`, integers; chunks of one trajectory share one.
        baseline: one of `BASELINES`.
        batch_mean: mean posterior of the global batch; needed by `"batch"`.
        moving_average: mean posterior of earlier batches; `None` while there is none.

    Returns:
        `(K,)`, float32, in [-1, 1], without gradient.

    Raises:
        ConfigError: when `baseline` is unknown, `"batch"` comes without `batch_mean`, or the shapes do not fit.

    Example:
        >>> centered_posteriors(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0, 0, 1]), "trajectory")
        tensor([-0.2000,  0.2000,  0.0000])
    """
    if posteriors.dim() != 1 or posteriors.shape != trajectory_ids.shape:
        raise ConfigError(
            f"`posteriors` has shape {tuple(posteriors.shape)} and `trajectory_ids` {tuple(trajectory_ids.shape)}, "
            "but both hold one value for each chunk. Pass two one-dimensional tensors of equal length."
        )
    pi_hat = _float(posteriors)
    if baseline == "none":
        return pi_hat.float()
    if baseline == "batch":
        if batch_mean is None:
            raise ConfigError("`batch_mean` is None, but the baseline 'batch' subtracts it. Pass the global mean.")
        return (pi_hat - batch_mean).detach().float()
    if baseline == "moving_average" and moving_average is not None:
        return (pi_hat - moving_average).float()
    if baseline in ("trajectory", "moving_average"):
        _, trajectory = torch.unique(trajectory_ids, return_inverse=True)
        count = torch.bincount(trajectory)[trajectory]
        total = torch.zeros_like(pi_hat).index_add(0, trajectory, pi_hat)[trajectory]
        # A chunk alone in its trajectory would divide 0 by 0.
        mean_of_others = (total - pi_hat) / (count - 1).clamp(min=1)
        return torch.where(count > 1, pi_hat - mean_of_others, 0.0).float()
    raise ConfigError(f"`baseline` is {baseline!r}, but it must be one of {', '.join(BASELINES)}. Choose one of them.")


def _float(value: Tensor | float) -> Tensor:
    """A constant in float32, or in float64 where it already is."""
    tensor = torch.as_tensor(value).detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _show(value: Tensor) -> str:
    return str(value.tolist() if value.numel() <= 8 else [*value.flatten()[:8].tolist(), "..."])
