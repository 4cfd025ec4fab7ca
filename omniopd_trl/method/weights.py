# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From the posteriors of a step to the weights of its chunks: what is subtracted before the loss."""

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError
from omniopd_trl.method.posterior import as_float

BASELINES = ("none", "batch", "trajectory", "moving_average")


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
    pi_hat = as_float(posteriors)
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
