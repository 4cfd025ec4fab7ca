# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The reference of the KL anchor: a frozen copy of the initial student."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from omniopd_trl.errors import ConfigError
from omniopd_trl.models.lm_head import LMHead
from omniopd_trl.models.loading import loading
from omniopd_trl.models.offloading import Offloaded, layers_of, zero3_on_cpu

if TYPE_CHECKING:
    from peft import PeftModel

    from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

REFERENCE_ADAPTER = "reference"  # not "ref", which TRL's GRPO adds
# The frozen copy of an adapter within a checkpoint. It is no adapter folder, which a push would publish.
REFERENCE_FILE = "reference.pt"


class Reference:
    """The frozen reference: a separate model, or under PEFT the student with another adapter or without one.

    Args:
        student: the model that is trained, as loaded.
        model: a copy of the initial student. `None` loads the reference from the student's path.
        accelerator: prepares the model for the back end.
        args: settings of the reference: how it is loaded, and whether it is offloaded between uses.
        quantization_config: quantization of the student.

    Attributes:
        model: the model as prepared for the back end. `None` without an anchor and under PEFT.
        adapter: under PEFT, name of the frozen copy of the initial adapter. `None` if the initial student equals the
            base model, as with a new LoRA adapter.
        offloaded: copies the model to the device during use. `None` without offloading, and under ZeRO-3, where
            DeepSpeed moves the shards.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        model: PreTrainedModel | None,
        accelerator: Accelerator,
        args: "OmniOPDConfig",
        quantization_config: BitsAndBytesConfig | None,
    ):
        self.model: nn.Module | None = None
        self.offloaded: Offloaded | None = None
        self.adapter: str | None = None
        self._fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
        # The frozen copy of the adapter in CPU memory, before the back end shards it, by parameter.
        self._copied: dict[str, torch.Tensor] = {}
        if args.beta == 0:
            return
        if is_peft_model(student):
            _check_bias(student)
            if not _adds_nothing(student):
                self.adapter, self._copied = _copied_adapter(student)
            return
        moves_shards = args.ref_model_offload and is_deepspeed_zero3_enabled()
        with zero3_on_cpu(accelerator) if moves_shards else nullcontext():
            if model is None:
                model = _load(student, args, quantization_config)
            self.model = _prepare(model.eval().requires_grad_(False), accelerator)
        if args.ref_model_offload and not moves_shards:
            layers = layers_of(accelerator.unwrap_model(self.model))
            self.offloaded = Offloaded(self.model, accelerator.device, layers)

    def kept(self, head: LMHead) -> LMHead:
        """The reference's head in a form that stays valid until the backward of the anchor."""
        bias = head.bias
        if self._fsdp:  # FSDP frees the memory of a gathered parameter
            return replace(head, weight=head.weight.clone(), bias=None if bias is None else bias.clone())
        if self.offloaded is not None:  # offloading points the parameter to other memory
            return replace(head, weight=head.weight.detach(), bias=None if bias is None else bias.detach())
        return head  # ZeRO-3 needs the parameter itself to gather it again

    @contextmanager
    def lent_by(self, student: PreTrainedModel) -> Iterator[None]:
        """Under PEFT: the student computes as the reference in this block."""
        frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
        try:
            with use_adapter(student, self.adapter):
                yield
        finally:
            # PEFT makes the whole adapter that it switches back to trainable.
            for parameter in frozen:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)

    @contextmanager
    def left_out(self, student: PreTrainedModel) -> Iterator[None]:
        """Under PEFT: saving the student in this block does not save the frozen copy of its adapter."""
        if self.adapter is None:
            yield
            return
        config = student.peft_config.pop(self.adapter)
        try:
            yield
        finally:
            student.peft_config[self.adapter] = config

    def save(self, checkpoint: Path) -> None:
        """Save the frozen copy of the adapter, since a new process may begin with another adapter."""
        if self._copied:
            checkpoint.mkdir(parents=True, exist_ok=True)
            torch.save(self._copied, checkpoint / REFERENCE_FILE)

    def load(self, checkpoint: Path, student: PreTrainedModel) -> None:
        """Continue with the frozen copy of the adapter that a checkpoint holds, if it holds one.

        Args:
            checkpoint: folder of the checkpoint.
            student: the student, before the back end shards it.
        """
        if not self._copied or not (checkpoint / REFERENCE_FILE).is_file():
            return
        saved = torch.load(checkpoint / REFERENCE_FILE, map_location="cpu", weights_only=True)
        parameters = dict(student.named_parameters())
        for name, value in saved.items():
            if not torch.equal(value, self._copied[name]):
                parameters[name].data.copy_(value)
        self._copied = saved


def needs_copy(student: str | PreTrainedModel, args: "OmniOPDConfig", peft_config: object) -> bool:
    """Whether the reference has to be copied from the student before the student is prepared.

    The weights of a model instance may differ from those at its path. Under ZeRO-3 there is no copy, since the
    parameters of the student are already empty.
    """
    if args.beta == 0 or peft_config is not None or isinstance(student, str) or is_peft_model(student):
        return False
    return args.ref_model_init_kwargs is None and not is_deepspeed_zero3_enabled()


def _check_bias(student: "PeftModel") -> None:
    bias = getattr(student.peft_config[student.active_adapter], "bias", "none")
    if bias != "none":
        raise ConfigError(
            f"The adapter has bias={bias!r}, which trains biases of the base model in place: the reference, which is "
            'the student without its adapter, would move with them. Set `bias="none"`, or `beta=0`.'
        )


def _adds_nothing(student: "PeftModel") -> bool:
    """Whether the adapter changes nothing yet, as a new LoRA adapter: its second factors are zero."""
    active = student.active_adapter
    if student.peft_config[active].peft_type != "LORA":
        return False
    seconds = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    # False for a trained adapter and for other initializations (`init_lora_weights="pissa"`, "olora", False).
    if any(p.any() for p in seconds):
        return False
    for module in student.modules():
        pairs: Any = ()
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            pairs = [(module.trainable_tokens_delta[active], module.trainable_tokens_original[active])]
        elif isinstance(module, ModulesToSaveWrapper):
            pairs = zip(module.modules_to_save[active].parameters(), module.original_module.parameters(), strict=True)
        if not all(torch.equal(trained, original) for trained, original in pairs):
            return False
    return True


def _copied_adapter(student: "PeftModel") -> tuple[str, dict[str, torch.Tensor]]:
    """Add a frozen copy of the student's adapter to the student.

    Returns:
        The name of the copy, and its parameters in CPU memory, by name.

    Raises:
        ConfigError: when PEFT cannot add a second adapter of this type.
    """
    active = student.active_adapter
    config = copy.copy(student.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some initializations would change the base model again
    name = REFERENCE_ADAPTER
    while name in student.peft_config:
        name += "_"
    try:
        student.add_adapter(name, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"The reference needs a frozen copy of the adapter {active!r}, and PEFT cannot add a second one of type "
            f"{config.peft_type.value}: {error} Merge the adapter into the base model, or set beta=0."
        ) from error
    parameters = dict(student.named_parameters())
    copied = {}
    for source, parameter in parameters.items():
        path = source.split(".")
        if active in path:  # whole parts only: an adapter's name may be a prefix of a module's
            target = ".".join(name if part == active else part for part in path)
            twin = parameters[target]
            twin.data = parameter.data.clone()  # in the precision of the trained adapter
            twin.requires_grad_(False)
            copied[target] = twin.data.to("cpu", copy=True)
    return name, copied


def _load(
    student: PreTrainedModel, args: "OmniOPDConfig", quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    kwargs: dict[str, Any] = {}
    for settings in (args.model_init_kwargs, args.ref_model_init_kwargs):
        kwargs |= cast("dict[str, Any] | None", settings) or {}
    if quantization_config is not None:
        kwargs.setdefault("quantization_config", quantization_config)
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs.setdefault("dtype", student.dtype)
    kwargs.setdefault("attn_implementation", student.config._attn_implementation)
    with loading("reference"):
        return create_model_from_path(get_config_model_id(student.config), **kwargs)


def _prepare(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(model, accelerator)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        if fsdp.fsdp_version == 2:
            # TRL shards a frozen model as one unit, and its forward would gather the whole model.
            mesh = getattr(accelerator, "torch_device_mesh", None)
            for layer in layers_of(model):
                fully_shard(
                    layer,
                    reshard_after_forward=fsdp.reshard_after_forward,
                    offload_policy=fsdp.cpu_offload,
                    mp_policy=fsdp.mixed_precision_policy or MixedPrecisionPolicy(),
                    mesh=mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
                )
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)
