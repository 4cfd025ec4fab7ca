# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Add measured errors and their bounds to the test report."""

import math
from collections.abc import Callable

import torch


def hold(record_property: Callable[[str, object], None], name: str, error: float, bound: float) -> None:
    """Record an error and its bound as properties of the test, then check it."""
    record_property(f"error:{name}", error)
    record_property(f"bound:{name}", bound)
    assert math.isfinite(error), f"the error of {name} is {error}"
    assert error <= bound, f"the error of {name} is {error:.3g}, above its bound of {bound:.3g}"


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """`||value - expected|| / ||expected||`, on the device of `expected`."""
    value = value.detach().to(expected)
    return ((value - expected).norm() / expected.norm()).item()


def largest(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (value.detach().to(expected) - expected).abs().max().item()
