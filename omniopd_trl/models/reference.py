# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The reference of the KL anchor: a frozen copy of the initial student."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from accelerate.utils import is_peft_model
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

REFERENCE_ADAPTER = "ref"


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
        if args.beta == 0:
            return
        if is_peft_model(student):
            _check_bias(student)
            if not _adds_nothing(student):
                self.adapter = _copied_adapter(student)
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
    """Whether the adapter changes nothing yet: LoRA whose second factors are zero, its default initialization."""
    if student.peft_config[student.active_adapter].peft_type != "LORA":
        return False
    seconds = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    # False for a trained adapter and for other initializations (`init_lora_weights="pissa"`, "olora", False).
    return not any(p.any() for p in seconds)


def _copied_adapter(student: "PeftModel") -> str:
    """Add a frozen copy of the student's adapter to the student, and return the name of the copy."""
    active = student.active_adapter
    config = copy.copy(student.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some initializations would change the base model again
    student.add_adapter(REFERENCE_ADAPTER, config)
    parameters = dict(student.named_parameters())
    for name, parameter in parameters.items():
        path = name.split(".")
        if active in path:  # whole parts only: an adapter's name may be a prefix of a module's
            twin = parameters[".".join(REFERENCE_ADAPTER if part == active else part for part in path)]
            twin.data = parameter.data.clone()  # in the precision of the trained adapter
            twin.requires_grad_(False)
    return REFERENCE_ADAPTER


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
