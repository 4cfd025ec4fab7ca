# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""GPU versions of tests that also run on the CPU. Without a GPU, they are skipped with a reason."""

import os
from itertools import groupby
from pathlib import Path

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


def pytest_collection_modifyitems(config, items):
    """In a dry run, a test runs with its first and its last parameters only: a CPU needs seconds for each."""
    if os.environ.get(VARIABLE) != "cpu":
        return
    here = Path(__file__).parent
    kept = [item for item in items if here not in item.path.parents]
    for _, group in groupby((item for item in items if here in item.path.parents), key=lambda item: item.function):
        first, *others = group
        kept += [first, *others[-1:]]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
