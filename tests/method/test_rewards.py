# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Advantages within groups, and the choice of the trajectories that are audited."""

import itertools
import math

import pytest
import torch

from omniopd_trl.errors import ConfigError
from omniopd_trl.method import chosen_for_audits, group_advantages, is_right, total_reward
from omniopd_trl.method.rewards import share_of_equal_groups

NAN = math.nan


def test_rewards_that_are_missing_count_in_nothing():
    """Sums, means, verdicts and choices by hand, with functions that decline to score."""
    rewards = torch.tensor([[1.0, 0.5], [NAN, 0.5], [0.0, NAN], [NAN, NAN], [1.0, NAN], [1.0, 1.0]])
    weights = torch.tensor([1.0, 2.0])
    total = total_reward(rewards, weights)
    torch.testing.assert_close(total, torch.tensor([2.0, 1.0, 0.0, NAN, 1.0, 3.0]).double(), equal_nan=True)
    # The first group has the mean 1, the second the mean of 1 and 3.
    torch.testing.assert_close(group_advantages(total, 3), torch.tensor([1.0, 0.0, -1.0, 0.0, -1.0, 1.0]).double())
    assert is_right(rewards, weights).tolist() == [False, False, False, False, True, True]
    # A function without a positive weight decides nothing.
    assert is_right(rewards, torch.tensor([1.0, -1.0])).tolist() == [True, False, False, False, True, True]
    assert not is_right(rewards, torch.tensor([0.0, 0.0])).any()


def test_equal_rewards_give_no_advantage_at_all():
    """The mean of three times 0.1 is not 0.1 in floating point."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, NAN, 0.1, NAN, NAN, NAN, 0.1, 0.2, NAN], dtype=torch.float64)
    assert (rewards[:3] - rewards[:3].mean()).any()
    advantages = group_advantages(rewards, 3)
    assert not advantages[:9].any()
    assert advantages[9:].tolist() == pytest.approx([-0.05, 0.05, 0.0])
    assert share_of_equal_groups(rewards, 3) == 3 / 4


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """By enumeration of all groups of three draws, up to the factor 1 - 1/G."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    rewards, size = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64), 3
    logp = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logp.exp() * rewards).sum(), logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for draws in itertools.product(range(4), repeat=size):
        scored = logp[list(draws)]
        advantages = group_advantages(rewards[list(draws)], size)
        surrogate = surrogate + scored.sum().exp().detach() * (advantages * scored).sum() / size
    (gradient,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(gradient, (1 - 1 / size) * expected)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("all", [1, 1, 1, 1, 1, 1]), ("wrong", [0, 1, 0, 0, 1, 1]), ("mixed", [1, 1, 0, 0, 0, 0])],
)
def test_the_choice_of_the_audits(choice, expected):
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, NAN])
    right = is_right(rewards[:, None], torch.ones(1))
    assert chosen_for_audits(rewards, right, 2, choice).int().tolist() == expected


def test_groups_must_be_whole():
    with pytest.raises(ConfigError, match=r"shape \(3,\), and num_generations=2"):
        group_advantages(torch.zeros(3), 2)
