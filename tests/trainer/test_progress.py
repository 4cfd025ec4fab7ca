# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A run prints one readable line per logging step."""

import pytest

from omniopd_trl.trainer.progress import describe

STEP = {
    "loss": 0.1,
    "epoch": 0.6,
    "chunk_loss": 0.2512,
    "audit/posterior": 0.8,
    "audit/posterior_std": 0.2,
    "audit/num_chunks": 4.0,
    "kl/unaudited": 0.00312,
    "teacher/prompt_tokens": 12345.0,
    "teacher/completion_tokens": 678.0,
    "teacher/usd_total": 1.234,
    "teacher/usd_left": 8.766,
    "teacher/wait_seconds": 2.5,
}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            STEP,
            "step 3 of 40 (epoch 0.6) | chunk loss 0.251 | posterior 0.800 ± 0.200 | KL 0.00312 | 4 chunks each | "
            "teacher read 12,345, wrote 678 | 1.23 dollars, 8.77 left | waited 2.5 s",
        ),
        ({"loss": 0.1, "kl/unaudited": 0.0}, "step 3 of 40 | KL 0"),  # a batch without chunks
        ({"loss": 0.1, "reward": 0.5, "kl": 0.0}, "step 3 of 40 | loss 0.1 | reward 0.500"),  # a baseline
        (
            {"eval_loss": 0.1, "eval_runtime": 3, "eval_pass@1": 0.414, "eval_completions/mean_length": 27.4},
            "evaluation at step 3 | pass@1 0.414 | 27 tokens",
        ),
        (
            {"eval_math_loss": 0.1, "eval_math_pass@1": 0.5, "eval_math_pass@1/format": 0.25, "eval_math_runtime": 3},
            "evaluation at step 3 | math pass@1 0.500 | math pass@1/format 0.250",
        ),
        ({"train_runtime": 12.0, "train_loss": 0.1}, None),
    ],
)
def test_describe(logs, line):
    assert describe(logs, 3, 40) == line
