# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a probe of some tens of trajectories says about a run: its numbers, and a verdict with recommended options.

[`measure`] computes the numbers from audits with rollouts at the student's branches, [`measure_marks`] from those with
marks, and [`judge`] the verdict from the numbers alone. None asks a teacher. [`costs`] has what the audits have cost.

A fork has the branches `b_0, ..., b_K` of the student and the rollouts `r_1, ..., r_n` of the teacher. With a
similarity phi, `s_j = mean_i phi(b_j, r_i)`. The floor of every number is `s'_j`, the same with the rollouts of
another fork: what phi gives to texts that have nothing to do with each other.

With a judge, `s_j` is the mean of two marks of `b_j`, in two questions. The floor is their noise.
"""

from omniopd_trl.evals.probe.measurement import Estimate, Measured, Signal, estimate, measure, measure_marks
from omniopd_trl.evals.probe.verdict import Advice, Form, Verdict, judge

__all__ = [
    "Advice",
    "Estimate",
    "Form",
    "Measured",
    "Signal",
    "Verdict",
    "estimate",
    "judge",
    "measure",
    "measure_marks",
]
