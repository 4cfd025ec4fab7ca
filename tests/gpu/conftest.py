# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""GPU versions of tests that also run on the CPU. Without a GPU, they are skipped with a reason."""

import os

import pytest
import torch

VARIABLE = "OMNIOPD_GPU_TESTS_DEVICE"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or, for a dry run on small sizes, the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get(VARIABLE) == "cpu":
        return torch.device("cpu")
    pytest.skip(f"needs a CUDA GPU; set {VARIABLE}=cpu for a dry run of small sizes on the CPU")
