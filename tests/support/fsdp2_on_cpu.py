# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Make accelerate use FSDP2 on a machine without a GPU. Import it before accelerate creates its state.

On a CPU, accelerate silently falls back to DDP, although torch's FSDP2 works there with gloo. For tests only.
"""

from typing import Any

import torch
import transformers.training_args
import transformers.utils
from accelerate import state
from accelerate.utils import DistributedType


def _gloo(self: state.PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _cpu(self: state.PartialState) -> None:
    self.device = torch.device("cpu")


state.PartialState._prepare_backend = _gloo
state.PartialState.set_device = _cpu
for module in (transformers.training_args, transformers.utils):
    module.is_torch_bf16_gpu_available = lambda: True
