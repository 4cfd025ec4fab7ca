# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Sampling with a seed per row: the distribution is right, and a row does not depend on the others."""

import pytest
import torch

from omniopd_trl.errors import NonFiniteError
from omniopd_trl.method import SamplingFilters
from omniopd_trl.models.sampling import SeededSampling

LOGITS = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5])


def chosen(sampling, rows, width=3):
    scores = sampling(torch.zeros(rows, width, dtype=torch.long), LOGITS.expand(rows, -1).clone())
    assert (scores.isfinite().sum(1) == 1).all()
    return scores.argmax(1)


@pytest.mark.parametrize(
    ("temperature", "filters", "kept"),
    [
        (1.0, {}, [0, 1, 2, 3, 5]),
        (0.5, {}, [0, 1, 2, 3, 5]),
        (2.0, {"top_p": 0.8}, [0, 1, 3, 5]),  # 0.39, 0.24, 0.18, 0.14, 0.09 by size
        (1.0, {"top_k": 2}, [0, 3]),
        (1.0, {"min_p": 0.2}, [0, 3, 5]),  # 0.53, 0.20, 0.12, 0.07, 0.03 by size
        (2.0, {"top_k": 4, "min_p": 0.4}, [0, 3, 5]),
    ],
)
def test_the_distribution(temperature, filters, kept):
    """Frequencies over many seeds are the probabilities, without the tail that the filters remove."""
    rows = 20_000
    tokens = chosen(SeededSampling(range(rows), 1, temperature, SamplingFilters(**filters)), rows)
    expected = torch.zeros(6)
    expected[kept] = (LOGITS[kept] / temperature).softmax(-1)
    frequency = torch.bincount(tokens, minlength=6) / rows
    assert (frequency - expected).abs().max() < 0.015
    assert (frequency[expected == 0] == 0).all()


def test_a_row_has_its_own_numbers():
    """The same seed chooses the same tokens in any batch, and a row uses one number per token."""
    many, alone = SeededSampling([5, 6, 7], 20), SeededSampling([6], 20)
    steps = [(chosen(many, 3, 9 + n)[1].item(), chosen(alone, 1, 30 + n)[0].item()) for n in range(20)]
    assert all(first == second for first, second in steps)
    assert len({first for first, _ in steps}) > 1


def test_numbers_that_are_no_distribution():
    with pytest.raises(NonFiniteError, match="not finite"):
        SeededSampling([0], 1)(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.0, float("nan")]]))
