# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Train under one back end in a single process, with the arguments of `train_under`."""

import sys
from types import ModuleType

import torch

if torch.cuda.is_available():
    # `train_under` imports it to shard on a CPU; accelerate shards on a GPU by itself.
    sys.modules["tests.support.fsdp2_on_cpu"] = ModuleType("fsdp2_on_cpu")

from tests.distributed import train_under  # after the module that it would import
from tests.support.back_ends import train_each

if __name__ == "__main__":
    train_each(train_under.train)
