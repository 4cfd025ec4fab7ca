# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A verifier beside the teacher: advantages within groups of trajectories, and which of them are audited.

Not in the paper. The rewards are those of functions that score whole completions, as in GRPO.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from omniopd_trl.errors import ConfigError

AuditTrajectories = Literal["all", "wrong", "mixed"]
AUDIT_TRAJECTORIES: tuple[AuditTrajectories, ...] = get_args(AuditTrajectories)


def total_reward(rewards: Tensor, reward_weights: Tensor) -> Tensor:
    """The reward of each trajectory: the weighted sum over the functions that scored it.

    Args:
        rewards: `(N, F)`, the score of each of F functions. NaN where a function declines to score.
        reward_weights: `(F,)`, the weight of each function.

    Returns:
        `(N,)`, float64. NaN where no function scored.

    Example:
        >>> total_reward(torch.tensor([[1.0, 0.5], [0.0, math.nan]]), torch.tensor([1.0, 0.2]))
        tensor([1.1000, 0.0000], dtype=torch.float64)
    """
    rewards = rewards.double()
    total = (rewards * reward_weights.double()).nansum(1)
    return torch.where(rewards.isnan().all(1), math.nan, total)


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    r"""Advantage of each trajectory over the mean of its group, `A_i = r_i - 1/G sum_j r_j`.

    A group is the `G` trajectories of one prompt. As [`~trl.GRPOConfig`] with `scale_rewards="none"`: nothing is
    divided by a standard deviation, so the advantages keep the unit of the rewards. The mean holds the trajectory's
    own reward, so the expected gradient is `1 - 1/G` times that of the expected reward.

    Args:
        rewards: `(N,)`. The trajectories of a group follow each other. NaN without a reward.
        num_generations: trajectories per group, `G`.

    Returns:
        `(N,)`, float64. 0 without a reward, which does not count in the mean, and exactly 0 for equal rewards.

    Raises:
        ConfigError: when the trajectories do not fill whole groups.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3)
        tensor([ 0.6667, -0.3333, -0.3333,  0.0000,  0.0000,  0.0000], dtype=torch.float64)
    """
    groups = _groups(rewards, num_generations)
    # The mean of equal numbers may differ from them by rounding.
    has_advantage = _differ(groups)[:, None] & ~groups.isnan()
    return torch.where(has_advantage, groups - groups.nanmean(1, keepdim=True), 0.0).flatten()


def is_right(rewards: Tensor, reward_weights: Tensor) -> Tensor:
    """Which trajectories are right: every function with a positive weight that scored them gives at least 1.

    Args:
        rewards: as in [`total_reward`], `(N, F)`.
        reward_weights: as in [`total_reward`], `(F,)`.

    Returns:
        `(N,)`, booleans. False where no such function scored: it is not known.

    Example:
        >>> is_right(torch.tensor([[1.0, 0.5], [0.9, 0.5], [math.nan, 0.5]]), torch.tensor([1.0, 0.0]))
        tensor([ True, False, False])
    """
    counted = rewards[:, reward_weights > 0]
    scored = ~counted.isnan()
    return ((counted >= 1) | ~scored).all(1) & scored.any(1)


def chosen_for_audits(rewards: Tensor, right: Tensor, num_generations: int, audit_trajectories: str) -> Tensor:
    """Which trajectories the teacher is asked about.

    - `"all"`: every trajectory.
    - `"wrong"`: those that are not right. The verifier says of the others that they need no teacher.
    - `"mixed"`: those of groups whose rewards differ. The student solves the other prompts always, or never.

    Args:
        rewards: `(N,)`, as in [`group_advantages`].
        right: `(N,)`, from [`is_right`].
        num_generations: trajectories per group, `G`.
        audit_trajectories: one of `AUDIT_TRAJECTORIES`.

    Returns:
        `(N,)`, booleans.

    Example:
        >>> right = torch.tensor([True, False, False, False])
        >>> chosen_for_audits(right.double(), right, 2, "mixed")
        tensor([ True,  True, False, False])
    """
    if audit_trajectories == "wrong":
        return ~right
    if audit_trajectories == "mixed":
        return _differ(_groups(rewards, num_generations)).repeat_interleave(num_generations)
    return torch.ones_like(right)


def share_of_equal_groups(rewards: Tensor, num_generations: int) -> float:
    """Share of the groups whose rewards are all equal: their trajectories have no advantage."""
    return 1.0 - _differ(_groups(rewards, num_generations)).double().mean().item()


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    """The rewards as `(N / G, G)`, float64."""
    if rewards.dim() != 1 or len(rewards) % num_generations:
        raise ConfigError(
            f"`rewards` has shape {tuple(rewards.shape)}, and num_generations={num_generations}: it holds one number "
            "for each trajectory of whole groups. Pass all trajectories of the step."
        )
    return rewards.double().view(-1, num_generations)


def _differ(groups: Tensor) -> Tensor:
    """Whether the known rewards of each group differ, `(N / G,)`."""
    highest = groups.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1)
    lowest = groups.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(1)
    return highest > lowest
