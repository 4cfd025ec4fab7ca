# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: reward functions and their scores."""

from omniopd_trl.evals.math import math_accuracy

__all__ = ["math_accuracy"]
