# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A frozen model that stays on the CPU between uses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Offloaded:
    """Keeps the parameters of a frozen module in the CPU's memory, and lends them to a device.

    Nothing is copied back: they never change. Buffers stay where they are, since they are small.

    Args:
        module: a plain module, one that DeepSpeed wraps without sharding it, or one that FSDP2 shards. Its parameters
            move to the CPU's memory, pinned where there is an accelerator.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module
        self.device = device
        self._host: list[torch.Tensor] = []
        if isinstance(module, FSDPModule):
            module.to("cpu")
            return
        for parameter in module.parameters():
            host = parameter.data.to("cpu")
            # Copies from pinned memory are fast, and do not wait for each other.
            parameter.data = host.pin_memory() if torch.accelerator.is_available() else host
            self._host.append(parameter.data)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module with its parameters on the device, until the block is left.

        A tensor that shares a parameter's memory there, `parameter.detach()`, stays valid after it.
        """
        if isinstance(self.module, FSDPModule):
            # FSDP2 moves its shards by itself, and knows where they are only if it does.
            self.module.to(self.device)
            try:
                yield self.module
            finally:
                self.module.to("cpu")
            return
        for parameter, host in zip(self.module.parameters(), self._host, strict=True):
            parameter.data = _lend(host, self.device)
        try:
            yield self.module
        finally:
            for parameter, host in zip(self.module.parameters(), self._host, strict=True):
                parameter.data = host


def _lend(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, non_blocking=True)


@contextmanager
def zero3_on_cpu(accelerator: Accelerator) -> Iterator[None]:
    """Models that are loaded or prepared in this block keep their ZeRO-3 shards on the CPU, and gather from there.

    DeepSpeed does the moving, layer by layer. It reads this from its configuration when a model is made, and there is
    one configuration for all models of a process.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    before = settings.get("offload_param")
    settings["offload_param"] = {"device": "cpu", "pin_memory": accelerator.device.type != "cpu"}
    try:
        yield
    finally:
        if before is None:
            del settings["offload_param"]
        else:
            settings["offload_param"] = before
