# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's on-policy distillation loop with the audits and the loss of OmniOPD."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.trainer.utils import get_config_model_id

from omniopd_trl.evals.rewards import RewardSource
from omniopd_trl.method import Similarity, WeightFunction
from omniopd_trl.models.loading import loading
from omniopd_trl.models.reference import Reference, needs_copy
from omniopd_trl.teachers import Teacher
from omniopd_trl.trainer.auditing import Audits
from omniopd_trl.trainer.evaluation import Evaluates, uncast
from omniopd_trl.trainer.generation import Generates
from omniopd_trl.trainer.hub import PushesToHub
from omniopd_trl.trainer.metrics import non_finite, sum_over_processes
from omniopd_trl.trainer.objective import Objective
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.preparation import prepare
from omniopd_trl.trainer.recording import Records
from omniopd_trl.trainer.startup import Starts, no_gradient


class OmniOPDTrainer(Starts, Records, PushesToHub, Generates, Audits, Evaluates):
    """
    Trainer for OmniOPD, a logit-free on-policy distillation method. The student samples its own solutions. At the
    tokens where the student is most uncertain, a teacher that returns only text samples continuations. The similarity
    between these and the student's text weights the student's tokens in the loss, and a KL penalty keeps all other
    tokens close to the initial student. The method was introduced in [OmniOPD: Logit-Free On-Policy Distillation via
    Speculative Verification](https://huggingface.co/papers/2606.01476).

    Example:

    ```python
    >>> from omniopd_trl import OmniOPDConfig, OmniOPDTrainer
    >>> from datasets import load_dataset

    >>> dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

    >>> trainer = OmniOPDTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     teacher_model="Qwen/Qwen3-8B",
    ...     args=OmniOPDConfig(max_completion_length=4096),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student to be trained, as in [`~trl.DistillationTrainer`]. The reference of the KL anchor is its initial
            state: a frozen copy, or, with LoRA, the base model with adapters off.
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~omniopd_trl.teachers.Teacher`], *optional*):
            Teacher that continues the student's text: a path or *model id* (loaded with
            `args.teacher_model_init_kwargs`), an instantiated model, the name of a model behind a service such as
            `"anthropic:MODEL"` (docs/teachers.md lists the providers), `"scripted"`, or any
            [`~omniopd_trl.teachers.Teacher`]. `"export:DIR"` trains on the trajectories and rollouts of an earlier run
            without a teacher (docs/export.md). Its tokenizer and vocabulary may differ from the student's. Defaults to
            `args.teacher_model_name_or_path`.
        args ([`OmniOPDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to use for training. It must include a column `"prompt"`, plain text or conversational. Not used
            with an export, which holds its prompts.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            Dataset to use for evaluation. If it has a column `"answer"`, `"solution"` or `"tests"`, pass@1 is reported.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. If `None`, it is loaded from the model's name, with padding on the left.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the student from a model identifier. Combine with
            `peft_config` for QLoRA training.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the student. If `None`, the student is not wrapped.
        tools (`None`):
            Tools are not supported yet.
        similarity (`Callable[[str, str], float]`, *optional*):
            Custom similarity of a chunk and a rollout, with values in [0, 1]. Replaces `args.similarity`.
        chunk_weights (`Callable[[StepChunks], torch.Tensor]`, *optional*):
            Custom function from the K audited chunks of a step to their weights in the loss, `(K,)`. Replaces
            `args.posterior_baseline`, which must be `"none"`. See [`~omniopd_trl.method.StepChunks`] for its argument.
        eval_reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`], or a list of them, *optional*):
            Functions that score evaluation samples, as [`~trl.GRPOTrainer`]'s `reward_funcs`: synchronous or
            asynchronous functions, or sequence classification models with one label, by path, *model id* or instance.
            A function may call its arguments `log_metric` and `log_extra`. Replace math-verify. The mean of a single
            function is logged as `pass@1`; with several functions, each mean is logged as `pass@1/<name>`.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`], or a list of them, *optional*):
            Functions that score the trajectories of training, as `eval_reward_funcs` and [`~trl.GRPOTrainer`]'s
            `reward_funcs`. Their rewards are logged, and used as `args.reward_weight` and `args.audit_trajectories`
            say. If these need rewards, defaults to the function for the columns of the training set: math-verify for
            `solution` or `answer`, programs for `tests`. Not used with an export, which holds its rewards. See
            docs/verifier.md.
    """  # noqa: E501

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: OmniOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
        tools: None = None,
        similarity: Similarity | None = None,
        chunk_weights: WeightFunction | None = None,
        eval_reward_funcs: RewardSource | list[RewardSource] | None = None,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
    ):
        if args is None:
            name = get_config_model_id(model.config) if hasattr(model, "config") else str(model)
            args = OmniOPDConfig(f"{name.split('/')[-1]}-OmniOPD")
        prepared = prepare(
            model,
            teacher_model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            step=lambda: self.state.global_step,
            quantization_config=quantization_config,
            tools=tools,
            similarity=similarity,
            chunk_weights=chunk_weights,
            eval_reward_funcs=eval_reward_funcs,
            reward_funcs=reward_funcs,
        )
        self.teacher, self._recorder, self._rewards = prepared.teacher, prepared.recorder, prepared.rewards

        # The reference is the initial student, so copy an instance before the base class changes it.
        reference = copy.deepcopy(model) if needs_copy(model, args, peft_config) else None

        with uncast(args), loading("student"):
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=prepared.train_dataset,
                eval_dataset=eval_dataset,
                processing_class=prepared.processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )

        self._check_student()
        self.objective = Objective(
            Reference(self.model, reference, self.accelerator, args, quantization_config),
            self.temperature,
            accelerator=self.accelerator,
            args=args,
            pad_token_id=self._tokenizer.pad_token_id,
            redirect=self._forward_redirection,
            hidden_states=self._get_last_hidden_state,
        )
        self.ref_model = self.objective.reference.model
        self._check_start(prepared.datasets)
        self._set_up_sampling()
        self._set_up_audits(prepared.similarity, chunk_weights, prepared.training_rewards)
        self._eval_samples: list[dict[str, Any]] = []  # the table of an evaluation, with `log_completions`

    def _reset_step(self, checkpoint: str | None) -> None:
        """Reset the state within a step, since an earlier run in this process may have been interrupted."""
        self._step = 0
        self._buffered_inputs: Any = None
        self._is_weighted = False  # whether a chunk of the run has had a weight other than 0
        self._has_gradient = False
        self._current_train_step_time = 0.0
        self.step_metrics.discard("train")
        self._audit_table.discard("train")
        self.step_audits.start()
        self._last_loaded_step = -1  # see `evaluation_loop`
        self._whole_checkpoint = Path(checkpoint).resolve() if checkpoint else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, sums = self.objective.loss(model, inputs)
        if self.model.training and not loss.requires_grad:
            raise no_gradient(self.state.global_step)
        self.step_metrics.add_losses("train" if self.model.training else "eval", loss, sums)
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        # A finite loss may have a gradient that is not finite. Check it before the update. DeepSpeed has already
        # applied it here; the check then comes before a checkpoint of the result could replace a good one.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or self.args.fp16:  # the fp16 scaler skips steps, and DeepSpeed then reports a norm of 0
            return norm
        if not math.isfinite(norm):
            raise non_finite("the gradients", self.state.global_step)
        if norm:
            self._has_gradient = True
        elif not self._has_gradient:
            # Without a chunk weight, as when no chunk could be audited, the gradient of the first step is 0: the
            # student still equals its reference.
            (num_weighted,) = sum_over_processes(self.accelerator, float(self._is_weighted))
            if num_weighted:
                raise no_gradient(self.state.global_step)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self.step_metrics.take("train"))
        super().log(logs, start_time)
        if self.accelerator.is_main_process and self.state.log_history:
            self._recorder.log(self.state.log_history[-1])
        if self.model.training:
            self._audit_table.show("train", self.state.global_step)
            if self.verifier is not None:
                self.verifier.show(self.state.global_step)
