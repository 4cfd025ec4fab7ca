# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A frozen model that stays on the CPU between uses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


class Offloaded:
    """Keeps the parameters of a frozen model in CPU memory, and copies them to a device for computation.

    The layers are copied one at a time, each while it computes, so the device never holds the whole model. Parameters
    outside of the layers (embeddings, the LM head) stay on the device during the whole use. Nothing is copied back,
    since parameters never change. Buffers stay on their device, since they are small.

    Args:
        model: a plain model, one that DeepSpeed wraps without sharding it, or one that FSDP2 shards. Its parameters
            move to CPU memory, pinned if there is an accelerator. The shards of FSDP2 are copied together, since
            FSDP2 gathers layer by layer itself.
        device: device of the computation.
        layers: modules whose parameters are copied one module at a time, as found by `layers_of`.
    """

    def __init__(self, model: nn.Module, device: torch.device, layers: Sequence[nn.Module] = ()):
        self.model = model
        self.device = device
        self._outside: _Group | None = None
        if isinstance(model, FSDPModule):
            model.to("cpu")
            return
        inside: set[nn.Parameter] = set()
        for layer in layers:
            group = _Group([p for p in layer.parameters() if p not in inside], device)
            inside.update(group.parameters)
            layer.register_forward_pre_hook(group.to_device)
            layer.register_forward_hook(group.to_host, always_call=True)
        self._outside = _Group([p for p in model.parameters() if p not in inside], device)

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The model on the device, until the block ends.

        A tensor that shares a parameter's memory on the device, such as `parameter.detach()`, stays valid afterwards.
        """
        if self._outside is None:
            # FSDP2 has to move its shards itself, or it loses track of their device.
            self.model.to(self.device)
            try:
                yield self.model
            finally:
                self.model.to("cpu")
            return
        self._outside.to_device()
        try:
            yield self.model
        finally:
            self._outside.to_host()


class _Group:
    """Parameters that are moved together."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device):
        self.parameters = parameters
        self.device = device
        self.host = []
        for parameter in parameters:
            host = parameter.data.to("cpu")
            # Copies from pinned memory are fast and asynchronous.
            parameter.data = host.pin_memory() if torch.accelerator.is_available() else host
            self.host.append(parameter.data)

    def to_device(self, *_: object) -> None:
        for parameter, host in zip(self.parameters, self.host, strict=True):
            parameter.data = _copy(host, self.device)

    def to_host(self, *_: object) -> None:
        for parameter, host in zip(self.parameters, self.host, strict=True):
            parameter.data = host


def _copy(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, non_blocking=True)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a transformers model: the modules listed in its `_no_split_modules`."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    # A layer inside another layer moves with the outer one.
    within = {inner for module in found for inner in module.modules() if inner is not module}
    return [module for module in found if module not in within]


@contextmanager
def zero3_on_cpu(accelerator: Accelerator) -> Iterator[None]:
    """Models that are loaded or prepared in this block keep their ZeRO-3 shards on the CPU, and gather from there.

    DeepSpeed moves the shards, layer by layer. It reads this setting when it creates a model, and all models of a
    process share one configuration. The setting therefore changes for this block only.
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
