# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights of chunks from the posteriors of a step: the paper's form, baselines, and controls."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError
from omniopd_trl.method.custom import why_not_called
from omniopd_trl.method.posterior import as_float

Baseline = Literal["none", "batch", "trajectory", "moving_average", "shuffled", "constant"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


@dataclass(frozen=True, eq=False)
class StepChunks:
    """The audited chunks of one optimizer step on all processes, or of one evaluation batch.

    A function that compares only chunks of the same trajectory may receive the step in parts. Tensors are on the CPU
    and have one value for each of the `K` chunks. The trainer fills in all fields. In your own calls, set only the
    fields that the function reads.

    Args:
        posteriors: `(K,)`, float32, posterior means (Eq. 5), in [0, 1].
        trajectories: `(K,)`, integers. Chunks of one trajectory have the same number.
        similarities: `(K,)`, mean similarity of the chunk and its rollouts, in [0, 1].
        priors: `(K,)`, geometric mean probability of the chunk's tokens (Eq. 4).
        entropies: `(K,)`, nats, at the chunk's anchor (Eq. 6).
        lengths: `(K,)`, tokens of the chunk.
        step: the optimizer step.
        seed: seed for random numbers. It changes with each step and is the same on all processes.
        moving_average: mean posterior of earlier steps. `None` if there is none yet.

    Raises:
        ConfigError: when the shapes of `posteriors` and `trajectories` do not match.
    """

    posteriors: Tensor
    trajectories: Tensor
    similarities: Tensor = field(default_factory=lambda: torch.empty(0))
    priors: Tensor = field(default_factory=lambda: torch.empty(0))
    entropies: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    step: int = 0
    seed: int = 0
    moving_average: float | None = None

    def __post_init__(self) -> None:
        if self.posteriors.dim() != 1 or self.posteriors.shape != self.trajectories.shape:
            raise ConfigError(
                f"`posteriors` has shape {tuple(self.posteriors.shape)} and `trajectories` "
                f"{tuple(self.trajectories.shape)}, but both hold one value for each chunk. Pass two one-dimensional "
                "tensors of equal length."
            )


WeightFunction = Callable[[StepChunks], Tensor]


@dataclass(frozen=True)
class ChunkWeights:
    """A weight function whose result is checked.

    Args:
        function: a function of this module, or a custom one.
        needs_whole_step: whether it needs all chunks of the step at once. Audits then cannot overlap with training.
        needs_average: whether it reads `moving_average`.
    """

    function: WeightFunction
    needs_whole_step: bool = True
    needs_average: bool = True

    def __call__(self, chunks: StepChunks) -> Tensor:
        """The weights, `(K,)`, float32, without gradient.

        Raises:
            ConfigError: when the function returns anything but one finite number for each chunk.
        """
        returned: Any = self.function(chunks)
        try:
            weights = torch.as_tensor(returned, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError):
            weights = None
        if weights is None or weights.shape != chunks.posteriors.shape or not weights.isfinite().all():
            shown = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else repr(returned)
            if weights is not None and weights.shape == chunks.posteriors.shape:
                shown += f" that holds {weights[~weights.isfinite()][0].item()}"
            raise ConfigError(
                f"The weight function {self.function!r} returned {shown} for {len(chunks.posteriors)} chunks, but it "
                "must return one finite number for each. Return a tensor of the shape of `posteriors`."
            )
        return weights


def get_chunk_weights(name_or_callable: str | WeightFunction) -> ChunkWeights:
    r"""Return the weight function of the given name, or wrap a custom function with checks.

    Only `"none"` is in the paper.

    `w: StepChunks -> (K,)`, the factor of each chunk's negative log-likelihood in Eq. 8.

    The gradient of Eq. 8 is a policy gradient with `pi_hat` as its reward, and `pi_hat` is never negative. Most of the
    gradient is therefore a constant times the score of the chunk. On on-policy samples this part is near zero on
    average (exactly zero if the selection of chunks did not depend on later tokens), but it is noise in a single
    batch. A baseline `b` removes it: `w_c = pi_hat_c - b_c`.

    - `"none"`: `w_c = pi_hat_c`, the paper. Theorem 4.1 (a) and (b) holds for this form only: with a baseline, a
      weight may be zero or negative.
    - `"batch"`: `b` is the mean of the step. It is biased by the chunk's own share in that mean: with `K` chunks the
      weight is `(1 - 1/K)` times the distance to the mean of the other chunks. Other chunks of the same trajectory add
      the bias of `"trajectory"`, in proportion to their number.
    - `"trajectory"`: `b` is the mean of the *other* chunks of the trajectory. It is biased because later chunks depend
      on earlier ones: the effect of a chunk on later chunks is subtracted from its own credit. The chunk of a
      trajectory with one chunk has weight 0.
    - `"moving_average"`: `b` comes from earlier steps. It does not depend on the current samples and adds no bias.
      The first step has no average yet and is centered by trajectory, which also needs no values of other processes.

    Two are controls. They show how much of a run's gain comes from the posteriors:

    - `"shuffled"`: the posteriors of the step, randomly permuted among all its chunks. `seed` seeds the permutation.
      The values stay the same, but no longer belong to their chunks.
    - `"constant"`: the step's mean posterior for every chunk.

    Args:
        name_or_callable: one of `BASELINES`, or a function of [`StepChunks`] that returns `(K,)` finite numbers.

    Returns:
        The function, with a check of its result.

    Raises:
        ConfigError: when the name is unknown, or the argument is neither a name nor a function of one argument.

    Example:
        >>> chunks = StepChunks(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0, 0, 1]))
        >>> get_chunk_weights("trajectory")(chunks)
        tensor([-0.2000,  0.2000,  0.0000])

    Reference: Eq. 8, the weight in its first term.
    """
    if isinstance(name_or_callable, ChunkWeights):
        return name_or_callable
    if isinstance(name_or_callable, str):
        if name_or_callable not in _NAMED:
            raise ConfigError(
                f"`baseline` is {name_or_callable!r}, but it must be one of {', '.join(BASELINES)}. Choose one of "
                "them."
            )
        return _NAMED[name_or_callable]
    if not callable(name_or_callable):
        raise ConfigError(
            f"`chunk_weights` is {name_or_callable!r}, which is neither a name nor a function. Use one of "
            f"{', '.join(BASELINES)}, or pass a function of `StepChunks`."
        )
    if why := why_not_called(name_or_callable, 1):
        raise ConfigError(
            f"The weight function {name_or_callable!r} cannot be called with the chunks of a step: {why}. Pass a "
            "function `f(chunks)` that returns a tensor of the shape of `chunks.posteriors`."
        )
    return ChunkWeights(name_or_callable)


def _mean(posteriors: Tensor) -> float:
    return posteriors.sum().item() / max(len(posteriors), 1)


def _batch(chunks: StepChunks) -> Tensor:
    pi_hat = as_float(chunks.posteriors)
    return pi_hat - _mean(pi_hat)


def _trajectory(chunks: StepChunks) -> Tensor:
    pi_hat = as_float(chunks.posteriors)
    _, trajectory = torch.unique(chunks.trajectories, return_inverse=True)
    count = torch.bincount(trajectory)[trajectory]
    total = torch.zeros_like(pi_hat).index_add(0, trajectory, pi_hat)[trajectory]
    # A chunk alone in its trajectory would divide 0 by 0.
    mean_of_others = (total - pi_hat) / (count - 1).clamp(min=1)
    return torch.where(count > 1, pi_hat - mean_of_others, 0.0)


def _moving_average(chunks: StepChunks) -> Tensor:
    if chunks.moving_average is None:
        return _trajectory(chunks)
    return as_float(chunks.posteriors) - chunks.moving_average


def _shuffled(chunks: StepChunks) -> Tensor:
    generator = torch.Generator().manual_seed(chunks.seed)
    return chunks.posteriors[torch.randperm(len(chunks.posteriors), generator=generator)]


def _constant(chunks: StepChunks) -> Tensor:
    return torch.full_like(as_float(chunks.posteriors), _mean(chunks.posteriors))


_NAMED: dict[str, ChunkWeights] = {
    "none": ChunkWeights(lambda chunks: chunks.posteriors, needs_whole_step=False, needs_average=False),
    "batch": ChunkWeights(_batch, needs_average=False),
    "trajectory": ChunkWeights(_trajectory, needs_whole_step=False, needs_average=False),
    "moving_average": ChunkWeights(_moving_average, needs_whole_step=False),
    "shuffled": ChunkWeights(_shuffled, needs_average=False),
    "constant": ChunkWeights(_constant, needs_average=False),
}
