# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From a loaded student to the first step: a run that cannot train must not pay for audits.

The order is from cheap to expensive: the student's parameters (`check_student`), one forward pass (`check_logits`),
and one question to the teacher. `validation` holds the checks before a model is loaded.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import PeftMixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import DistillationTrainer

from omniopd_trl.errors import ConfigError
from omniopd_trl.models.padding import why_not_padded
from omniopd_trl.models.tree_attention import sampling_attention
from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.callbacks import OnTrainBegin
from omniopd_trl.trainer.distributed import together
from omniopd_trl.trainer.objective import Objective, evaluation_mode
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.plan import print_plan
from omniopd_trl.trainer.trackers import unprofiled
from omniopd_trl.trainer.validation import probe_teacher

logger = logging.get_logger(__name__)

# The text of the forward pass, its maximum number of tokens, and the tokens that are compared at each of
# them. A text and not random ids, since some ids make a multimodal model look for an image.
_TEXT = "Tom has 12 apples and buys 30 more. How many apples does he have now? Answer: 42."
_NUM_TOKENS = 16
_NUM_RANKS = 8

# Largest difference of a log-probability from the model's own, as a share of the range between the log-probabilities
# of the most and the least likely token. Both come from the same hidden states, up to rounding. In 16 bits the model
# rounds its logits to 2^-9 of their size, and the objective does not: 0.003 at most over the architectures of
# transformers. In float32 the difference is 2e-6 on a CPU, and TF32 rounds to 2^-11.
_TOLERANCE_16_BIT = 0.02
_TOLERANCE = 0.002

# Sampled weights per parameter for `_share_that_moves`.
_SAMPLES = 1000


def check_student(
    model: nn.Module,
    args: OmniOPDConfig,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Check the student as loaded and wrapped by PEFT, without a forward pass.

    Args:
        model: the student.
        args: the configuration.
        accelerator: accelerator of the run.
        optimizer: optimizer of the caller; `None` for one that the trainer creates.

    Raises:
        ConfigError: when the student's adapters are not supported, nothing is trainable or in the optimizer, or the
            student has no backbone and LM head.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ConfigError(
            f"parallelism_config={parallelism!r}: tensor, context and sequence parallelism are not supported, since "
            "each process has trajectories of its own. Leave them out; ZeRO-3 and FSDP2 shard the student."
        )
    _check_adapters(model)
    _check_trainable(model, optimizer)
    _check_layout(model, accelerator)
    if accelerator.is_main_process:
        _warn_about_rounding(model, args, accelerator)
        if args.beta == 0:
            logger.warning(
                "beta=0 turns off the KL anchor: nothing keeps the un-audited tokens close to the initial student. "
                "`beta` is the weight of the anchor here, 0.1 by default, and not the interpolation coefficient of "
                "TRL's DistillationConfig."
            )


def check_logits(
    objective: Objective, model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig
) -> None:
    """Compare the log-probabilities that the objective computes with those of the model's own forward.

    The objective never calls the student's forward: it multiplies the last hidden states with the LM head, and applies
    a factor and a soft cap. A model that does anything else would sample from one policy and train another.

    Args:
        objective: the objective of the run.
        model: the student, wrapped by the back end. Every process has to call this, since sharded models are gathered.
        tokenizer: tokenizer of the student.
        args: the configuration.

    Raises:
        ConfigError: when the log-probabilities differ, or, without DeepSpeed and FSDP, no trainable parameter affects
            them or the student reads later tokens.
    """
    token_ids = tokenizer(_TEXT)["input_ids"][:_NUM_TOKENS]
    input_ids = torch.tensor([token_ids], device=args.device)
    tokens, own, ours = objective.compare_with_forward(model, input_ids, _NUM_RANKS)
    if not objective.is_sharded and not _depends_on_a_parameter(ours):
        raise ConfigError(
            "No trainable parameter affects the student's log-probabilities, so nothing would be trained. Trainable "
            f"are {_shown(name for name, p in model.named_parameters() if p.requires_grad)}. {_advice(model)}"
        )
    spread = (own[:, :1] - own[:, -1:]).clamp(min=torch.finfo(own.dtype).eps)
    difference = (ours.detach() - own).abs() / spread
    is_32_bit = args.mixed_precision == "no" and all(p.dtype == torch.float32 for p in model.parameters())
    tolerance = _TOLERANCE if is_32_bit else _TOLERANCE_16_BIT
    if not difference.max() <= tolerance:  # NaN too
        row, rank = divmod(int(difference.argmax()), _NUM_RANKS)
        raise ConfigError(
            "The student computes other logits than its LM head gives: after "
            f"{tokenizer.decode(token_ids[: row + 1])!r}, its own forward gives the token "
            f"{tokenizer.decode(tokens[row, rank])!r} a log-probability of {own[row, rank]:.4f} nats, and its last "
            f"hidden states and LM head, which the objective uses, {ours[row, rank]:.4f}. Training would follow "
            "another policy than the one that samples. Use a student whose logits are a multiple of "
            "`lm_head(hidden_states)`, with a soft cap or without."
        )
    if objective.is_sharded:  # DeepSpeed records the order in which the first forward passes gather
        return
    _, alone, _ = objective.compare_with_forward(model, input_ids[:, : len(token_ids) // 2], _NUM_RANKS)
    own, spread = own[: len(alone)], spread[: len(alone)]
    # The mean: in 16 bits, a row of another length may send single tokens to other experts.
    if not ((alone - own).abs() / spread).mean() <= tolerance:
        raise ConfigError(
            f"The student is not causal: what follows a token changes its log-probabilities, by "
            f"{(alone - own).abs().max():.4f} nats. It would be trained on tokens that it has read. Use a causal "
            "language model."
        )


def check_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the student generates for rows of different lengths as its forward computes each of them.

    Raises:
        ConfigError: when it does not: it would sample from another policy than the one that is trained.
    """
    with evaluation_mode(model), without_generation_defaults(model), sampling_attention(model):
        reason = why_not_padded(model, tokenizer(_TEXT)["input_ids"][:_NUM_TOKENS])
    if reason:
        raise ConfigError(
            f"The student does not generate what its forward computes: {reason}. Training would follow another policy "
            "than the one that samples. Set use_vllm=True, which does not pad, or use another student."
        )


def no_gradient(step: int) -> ConfigError:
    """The error to raise when a step has chunk weights, but no trainable parameter has a gradient."""
    error = ConfigError(
        f"The teacher has judged chunks at step {step}, but the gradient of every trainable parameter is zero: "
        "nothing is trained, and each further step would be paid. Check which parameters are trainable "
        "(`requires_grad`), that they affect the student's logits, and that the sampler has a choice (`top_k=1` has "
        "none)."
    )
    error.on_every_process = True
    return error


def _check_adapters(model: Any) -> None:
    if isinstance(model, PeftMixedModel):
        raise ConfigError(
            "The student is a PeftMixedModel, whose adapters of several types cannot be trained here. Use a PeftModel "
            "with one adapter."
        )
    if not is_peft_model(model):
        return
    active = model.active_adapters
    if len(active) > 1:
        raise ConfigError(
            f"The student has {len(active)} active adapters ({', '.join(map(repr, active))}), but only one can be "
            "trained: the reference is the student with a copy of its adapter, or without one. Merge the others into "
            "the base model, or activate one with `model.set_adapter(name)`."
        )
    if any(getattr(model.peft_config[name], "alora_invocation_tokens", None) for name in active):
        raise ConfigError(
            "The student has an activated LoRA (`alora_invocation_tokens`), which PEFT switches on in its own "
            "forward. The objective does not call it, and would train nothing. Use LoRA."
        )
    if any(model.peft_config[name].peft_type == "ADALORA" for name in active):
        raise ConfigError(
            "The student has an AdaLoRA adapter, whose ranks are never reallocated here, since nothing calls its "
            "`update_and_allocate` after a step. Use LoRA."
        )
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) < config.num_hidden_layers:
        raise ConfigError(
            f"The adapter repeats layers of the student (`layer_replication`), and PEFT leaves the {len(kinds)} "
            f"`layer_types` of its configuration as they are: a {config.model_type} cannot compute with "
            f"{config.num_hidden_layers} layers. Leave `layer_replication` out."
        )


def _check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError(
            f"The student has no trainable parameter: every audit would be paid, and nothing trained. {_advice(model)}"
        )
    if optimizer is not None and not any(
        id(p) in trainable for group in optimizer.param_groups for p in group["params"]
    ):
        raise ConfigError(
            "The optimizer of `optimizers` has no trainable parameter of the student: every audit would be paid, and "
            "nothing trained. Pass the student as the instance whose parameters it has, without `peft_config`, which "
            "adds others; or leave `optimizers` out."
        )


def _check_layout(model: Any, accelerator: Accelerator) -> None:
    plain: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    head = plain.get_output_embeddings()
    if head is None or plain.base_model is plain:
        missing = "no LM head" if head is None else "no backbone (`base_model` is the model itself)"
        raise ConfigError(
            f"The student, a {type(plain).__name__}, has {missing}, which the objective needs to compute "
            "log-probabilities. Use a causal language model of transformers."
        )
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            "The LM head has an adapter, which would not be trained: the objective reads the head's weight alone. "
            "Leave the LM head out of `target_modules`, or train it whole with `modules_to_save`."
        )
    is_sharded = is_deepspeed_zero3_enabled() or getattr(accelerator.state, "fsdp_plugin", None) is not None
    known = (head.weight, getattr(head, "bias", None))
    others = [name for name, p in head.named_parameters() if p.requires_grad and not any(p is one for one in known)]
    if others and not isinstance(head, TrainableTokensWrapper):
        raise ConfigError(
            f"The LM head of the student, a {type(plain).__name__}, has trainable parameters besides its weight and "
            f"bias, which would not be trained: {_shown(others)}. Freeze them (`requires_grad_(False)`), or use "
            "another student."
        )
    if isinstance(head, TrainableTokensWrapper) and is_sharded:
        raise ConfigError(
            "trainable_token_indices with tied embeddings does not work with ZeRO-3 or FSDP: PEFT replaces rows of a "
            "weight that is not gathered there. Use ZeRO-2 or DDP, or leave `trainable_token_indices` out."
        )


def _depends_on_a_parameter(output: torch.Tensor) -> bool:
    """Whether the graph of a tensor has a trainable parameter.

    `requires_grad` alone is also true with gradient checkpointing under PEFT, which makes the embedded inputs require
    gradients.
    """
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):  # the accumulation of a leaf's gradient
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _advice(model: nn.Module) -> str:
    if getattr(model, "peft_config", None):
        return "Load the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`, and leave it enabled."
    return "Set `requires_grad_(True)` on the parameters to train, or pass a `peft_config`."


def _shown(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first!r}" + (f" and {len(others)} more" if others else "")


def _warn_about_rounding(model: nn.Module, args: OmniOPDConfig, accelerator: Accelerator) -> None:
    """Warn if most of the weights would stay the same when `learning_rate` is added to them.

    The weights of an instance are left in the precision that the caller chose: float32 would double their memory, and
    some optimizers compensate for the rounding. DeepSpeed and FSDP with mixed precision keep weights in float32
    themselves.
    """
    deepspeed, fsdp = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("deepspeed", "fsdp"))
    if deepspeed is not None or (fsdp is not None and args.mixed_precision != "no") or args.learning_rate == 0:
        return
    share, dtype = _share_that_moves(model, args.learning_rate)
    if share < 0.5:
        logger.warning(
            f"The student's trainable weights are {dtype}: rounded to it, {share:.0%} of them change when "
            f"learning_rate={args.learning_rate:g}, about the step of Adam, is added, and the others stay the same. "
            "Load the student in float32 (pass its path, or dtype=torch.float32; bf16=True then still computes in "
            "bfloat16), train LoRA, or raise the learning rate."
        )


def _share_that_moves(model: nn.Module, rate: float) -> tuple[float, torch.dtype]:
    """The share of the trainable weights that change when `rate` is added or subtracted, and their lowest precision.

    A weight of a small precision does not change if `rate` is less than half of its distance to the next value.
    """
    moved, total, dtype = 0.0, 0, torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta:
            weights = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLES)]
            changes = torch.stack([weights + rate != weights, weights - rate != weights])
            moved += changes.double().mean().item() * parameter.numel()
            total += parameter.numel()
            dtype = min(dtype, parameter.dtype, key=lambda d: -torch.finfo(d).eps)
    return (moved / total if total else 1.0), dtype


class Starts(DistillationTrainer):
    """The hooks of [`OmniOPDTrainer`] from a loaded student to the first step. Every process calls each of them."""

    def _check_student(self) -> None:
        """Check the student as loaded, and make the layers of bitsandbytes pass a gradient on."""
        with together(self.args.process_index):
            check_student(self.model, self.args, self.accelerator, self.optimizer)
        for module in self.model.modules():
            # On some CPUs, bitsandbytes permanently repacks the weights of a layer in evaluation mode into a form
            # without a gradient. The layers below it would no longer be trained.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    def _check_start(self, datasets: list[tuple[str, Any]]) -> None:
        """Check one forward pass, then whether the teacher answers. See [`probe_teacher`] for the argument."""
        self.add_callback(OnTrainBegin(self._begin))
        if not self.objective.is_sharded:
            self._check_logits()
        with together(self.args.process_index):
            self.probe_teacher(datasets)

    def probe_teacher(self, datasets: list[tuple[str, Any]]) -> None:
        """Ask the teacher one question, the first request of a run. Called at the end of the checks.

        A subclass may override it, for example when recorded answers show that the teacher can be asked. No process
        may wait for others inside.

        Args:
            datasets: the datasets of the run with their names. The question is the first prompt of the first one.

        Raises:
            DataError: when the teacher cannot render the question.
            TeacherError: when the teacher does not answer.
        """
        probe_teacher(self.teacher, datasets, self.args.teacher_context, signal=self.args.signal)

    def _begin(self) -> None:
        """Called when training begins."""
        if self.objective.is_sharded:  # the back end has now wrapped the student
            self._check_logits()
        if self.accelerator.is_main_process:
            print_plan(self, self._recorder.num_recorded())

    def _check_logits(self) -> None:
        with together(self.args.process_index), unprofiled(self.args):
            check_logits(self.objective, self.model_wrapped, self._tokenizer, self.args)
            if not self.objective.is_sharded and not self.use_vllm:
                with self.accelerator.autocast():  # FlashAttention computes in 16 bits only
                    check_padding(self.accelerator.unwrap_model(self.model_wrapped), self._tokenizer)
