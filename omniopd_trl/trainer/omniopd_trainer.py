# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's on-policy distillation loop with the audits and the loss of OmniOPD."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from omniopd_trl.audits.types import PolicyScores
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, import_extra
from omniopd_trl.evals.rewards import Rewards, RewardSource
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.method import Similarity, WeightFunction, get_chunk_weights, get_similarity
from omniopd_trl.models.loading import loading
from omniopd_trl.models.reference import Reference, needs_copy
from omniopd_trl.models.vllm_logprobs import SamplingLogprobs, padded_logprobs
from omniopd_trl.teachers import Teacher, Usage
from omniopd_trl.teachers.load import is_export
from omniopd_trl.trainer.audit_table import AuditTable
from omniopd_trl.trainer.batches import TOKEN_KEYS, group_by_length, has_ended, rows_by_length
from omniopd_trl.trainer.callbacks import OnTrainBegin
from omniopd_trl.trainer.distributed import Failure, together
from omniopd_trl.trainer.evaluation import Evaluates, student_scores, uncast
from omniopd_trl.trainer.exported import Export, check_first_step, open_export
from omniopd_trl.trainer.generation import Generates
from omniopd_trl.trainer.hub import PushesToHub, open_repo
from omniopd_trl.trainer.metrics import Metrics, context_ratios, non_finite, sum_over_processes
from omniopd_trl.trainer.objective import Objective
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.plan import print_plan
from omniopd_trl.trainer.progress import use_readable_lines
from omniopd_trl.trainer.recording import Records
from omniopd_trl.trainer.samplers import EpochSampler
from omniopd_trl.trainer.startup import check_logits, check_student, no_gradient
from omniopd_trl.trainer.step_audits import PendingAudit, StepAudits
from omniopd_trl.trainer.trackers import unprofiled
from omniopd_trl.trainer.validation import (
    check_inputs,
    check_prompts,
    make_auditor,
    prepare_teacher,
    probe_teacher,
    repeated,
    spent_before,
)
from omniopd_trl.trainer.verifier import Verifier, training_rewards

logger = logging.get_logger(__name__)

# Chunk weights up to this size may have a gradient that underflows: differences of equal posteriors, for example.
NEGLIGIBLE_WEIGHT = 1e-6


class OmniOPDTrainer(Records, PushesToHub, Generates, Evaluates):
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
            Dataset to use for evaluation. If it has a `"solution"` or `"answer"` column, pass@1 is reported.
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
            `args.posterior_baseline`. See [`~omniopd_trl.method.StepChunks`] for its argument.
        eval_reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`], or a list of them, *optional*):
            Functions that score evaluation samples, as [`~trl.GRPOTrainer`]'s `reward_funcs`: synchronous or
            asynchronous functions, or sequence classification models with one label, by path, *model id* or instance.
            A function may call its arguments `log_metric` and `log_extra`. Replace math-verify. The mean of a single
            function is logged as `pass@1`; with several functions, each mean is logged as `pass@1/<name>`.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`], or a list of them, *optional*):
            Functions that score the trajectories of training, as `eval_reward_funcs` and [`~trl.GRPOTrainer`]'s
            `reward_funcs`. Their rewards are logged, and used as `args.reward_weight` and `args.audit_trajectories`
            say. If these need rewards, defaults to the function for the columns of the training set: math-verify for
            `solution` or `answer`. Not used with an export, which holds its rewards. See docs/verifier.md.
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
        if tools:
            raise ConfigError(f"tools={tools!r} were given, but tools are not supported yet. Leave them out.")

        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        export: Export | None = None
        if is_export(teacher_model):
            with together(args.process_index):
                export, train_dataset = open_export(teacher_model, args)
        processing_class = check_inputs(
            model, args, train_dataset, eval_dataset, processing_class, quantization_config
        )
        if export is not None:
            with together(args.process_index):
                check_first_step(export, processing_class, args)
        if isinstance(train_dataset, IterableDataset):
            # One endless epoch. transformers would restart the stream for each epoch, and a run that is resumed in a
            # later epoch would not find its position.
            train_dataset = train_dataset.repeat(None)
            if args.num_generations > 1:
                # Here and not by the base class, which would separate the trajectories of a group.
                train_dataset = train_dataset.shuffle(seed=args.seed) if args.shuffle_dataset else train_dataset
                train_dataset = repeated(train_dataset, args.num_generations)
        phi = get_similarity(similarity if similarity is not None else args.similarity)
        if chunk_weights is not None and args.num_branches:
            raise ConfigError(
                f"`chunk_weights` cannot be used with num_branches={args.num_branches}: the advantages of branches "
                "are the weights. Leave one of them out."
            )
        # Raise an error of `chunk_weights` before models are loaded.
        get_chunk_weights(args.posterior_baseline if chunk_weights is None else chunk_weights)
        self._rewards = Rewards(
            eval_reward_funcs,
            eval_dataset,
            device=args.device,
            lenient=args.eval_lenient_answers,
            trust_remote_code=args.trust_remote_code,
            chat_template_kwargs=args.chat_template_kwargs,
        )

        if reward_funcs is not None and export is not None:
            raise ConfigError("`reward_funcs` has no effect with an export, which holds its rewards. Leave it out.")
        rewards: Rewards | None = None
        if export is None and (reward_funcs is not None or args.uses_rewards):
            if reward_funcs is not None and reward_funcs is eval_reward_funcs:
                reward_funcs = self._rewards.functions  # a reward model is loaded once
            needed_by = f"reward_weight={args.reward_weight:g}, audit_trajectories={args.audit_trajectories!r}"
            rewards = training_rewards(reward_funcs, train_dataset, args, needed_by)

        if args.push_to_hub:
            with together(args.process_index):
                if args.process_index == 0:
                    open_repo(args)

        if teacher_model is None:
            raise ConfigError(
                "There is no teacher. Pass `teacher_model`, or set `teacher_model_name_or_path` in the configuration."
            )
        if args.use_vllm:
            import_extra("vllm", "vllm")
        self._recorder = Recorder(lambda: self.state.global_step)
        paid = spent_before(teacher_model, args)
        with together(args.process_index):  # a key may be missing on one machine only
            self.teacher = export or prepare_teacher(teacher_model, args, self._recorder, paid)
            check_prompts(
                self.teacher, named_datasets(train_dataset, eval_dataset), args.teacher_context, signal=args.signal
            )

        # The reference is the initial student, so copy an instance before the base class changes it.
        reference = copy.deepcopy(model) if needs_copy(model, args, peft_config) else None

        with uncast(args), loading("student"):
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=repeated(eval_dataset, args.num_eval_generations),
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )

        if export is not None:
            self.shuffle_dataset = False  # a step takes the trajectories of its own number
        if isinstance(self.train_dataset, IterableDataset) and args.num_generations > 1:
            self.shuffle_dataset = False  # it is shuffled already
        with together(args.process_index):
            check_student(self.model, args, self.accelerator)
        for module in self.model.modules():
            # On some CPUs, bitsandbytes permanently repacks the weights of a layer in evaluation mode into a form
            # without a gradient. The layers below it would no longer be trained.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

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
        self.add_callback(OnTrainBegin(self._begin))
        if not self.objective.is_sharded:
            self._check_logits()
        with together(args.process_index):
            probe_teacher(self.teacher, named_datasets(train_dataset, eval_dataset), args.teacher_context)

        self.sampling_logprobs: SamplingLogprobs | None = None
        # Log-probabilities that the last completions were sampled with, if another model than the policy sampled them.
        self._sampled: Any = None
        if self.use_vllm:
            self.sampling_logprobs = SamplingLogprobs(self.vllm_generation, self.eos_token_ids)
        if self.use_vllm and self.vllm_mode == "colocate":
            # The engine draws from this process's generators and has seeded them with a constant: all runs would draw
            # the same samples, whatever their `seed`. Processes that share an engine need the same seed.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)

        self.auditor = make_auditor(self.teacher, processing_class, args, phi)
        self.teacher_usage = Usage()
        self.step_audits = StepAudits(
            self.auditor,
            self._recorder,
            self.accelerator,
            args,
            callbacks=self.callback_handler,
            step=lambda: self.state.global_step,
            chunk_weights=chunk_weights,
        )
        self._eval_samples: list[dict[str, Any]] = []  # the table of an evaluation, with `log_completions`
        self._audit_table = AuditTable(
            self.accelerator, args, self._tokenizer, self.teacher.name, self.callback_handler
        )
        self._eval_batch = 0  # index of the next batch in an evaluation
        self.step_metrics = Metrics(
            self.accelerator,
            args,
            self._metrics,
            lambda: self.state.global_step,
            budget=self.teacher.budget,
            custom_weights=chunk_weights is not None,
        )
        self.verifier: Verifier | None = None
        if rewards is not None or args.uses_rewards:
            self.verifier = Verifier(rewards, self.accelerator, args, self._tokenizer, self.step_metrics)
        progress, budget = use_readable_lines(self), self.teacher.budget
        if progress is not None and budget is not None:
            self.step_audits.on_wait = lambda: progress.show_in_flight(budget.num_in_flight)

    def _begin(self) -> None:
        """Called when training begins."""
        if self.objective.is_sharded:  # the back end has now wrapped the student
            self._check_logits()
        if self.accelerator.is_main_process:
            print_plan(self, self._recorder.num_recorded())

    def _check_logits(self) -> None:
        with together(self.args.process_index), unprofiled(self.args):
            check_logits(self.objective, self.model_wrapped, self._tokenizer, self.args)

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

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(self.teacher, Export):  # which holds each trajectory of a group
            sampler.mini_repeat_count = self.args.num_generations
            sampler.batch_size //= self.args.num_generations
        if not self.shuffle_dataset:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    # ---- Generation batch: trajectories -> entropy -> audits -> weights ----

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        asks = mode == "train" or self.args.audit_eval
        # Prompts of map-style datasets were checked at the start. Those of streams are checked before the student
        # answers them.
        for row in inputs if asks else ():
            self.teacher.check_prompt(self.args.teacher_context.prompt(row))
        batch = super()._generate_and_score_completions(inputs)
        batch["weights"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
        batch["audited_mask"] = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        if mode == "train":
            if self.verifier is not None:
                batch["verified"] = self.verifier.verify(
                    inputs, batch, self.step_audits.known_verified, self.state, self.step_audits.ask
                )
            self.step_audits.record(self.step_audits.trajectories(inputs, batch, mode, self._sampled))
            if self.args.mask_truncated_completions:
                self._mask_truncated(batch)
        else:
            scores = student_scores(
                self._rewards,
                inputs,
                batch,
                self._tokenizer,
                self.accelerator,
                self.state,
                run=self.step_audits.ask,
                table=self._eval_samples if self.log_completions else None,
            )
            for name, total, count in scores:
                self.step_metrics.add_global(mode, name, total, count)
        if mode == "train" and self.verifier is not None and self.args.reward_weight > 0:
            advantages = torch.tensor([one.advantage for one in batch["verified"]], device=batch["weights"].device)
            batch["advantages"] = self.args.reward_weight * advantages[:, None] * batch["completion_mask"]
        if asks:
            batch["audits"] = self._start_audits(inputs, batch, mode)
            if "advantages" in batch and "importance" in batch:
                batch["advantages"] *= batch["importance"]
            if mode == "eval" or not self.step_audits.overlap:
                self._finish_audits(batch, mode)
        if mode == "train" and self.args.loss_normalization == "components":
            num_audited = batch["audited_mask"].sum()
            counts = torch.stack([num_audited, batch["completion_mask"].sum() - num_audited])
            batch["num_audited"], batch["num_unaudited"] = self.accelerator.gather(counts[None]).sum(0).unbind()
        return batch

    def _mask_truncated(self, batch: dict[str, Any]) -> None:
        """Exclude truncated completions from the loss and from the counts that normalize it."""
        ended = has_ended(batch, [*self.eos_token_ids, self._tokenizer.pad_token_id])
        batch["completion_mask"] = batch["completion_mask"] * ended
        counts = torch.stack([batch["completion_mask"].sum(), ended.sum()])
        batch["num_items_in_batch"], batch["num_sequences"] = self.accelerator.gather(counts[None]).sum(0).unbind()

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:  # a new generation batch
            self._buffered_inputs = group_by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        if "audits" in inputs:
            position = self._step % self.args.gradient_accumulation_steps
            ready = self.step_audits.first_ready([batch["audits"] for batch in self._buffered_inputs[position:]])
            # All micro-batches contribute to one optimizer step, so their order does not matter.
            batches = self._buffered_inputs
            batches[position], batches[position + ready] = batches[position + ready], batches[position]
            inputs = batches[position]
            self._finish_audits(inputs, "train", is_last=position == self.args.gradient_accumulation_steps - 1)
        return inputs

    def _start_audits(self, inputs: list[dict[str, Any]], batch: dict[str, Any], mode: str) -> list[PendingAudit]:
        """Score the completions, and start the audit of each trajectory as soon as its chunks are known.

        Raises:
            NonFiniteError: when a log-probability or an entropy is not finite.
        """
        trajectories = self.step_audits.trajectories(inputs, batch, mode)
        lengths = [len(trajectory.completion_ids) for trajectory in trajectories]
        scores: dict[int, PolicyScores] = {}
        unsent: dict[int, PolicyScores] = {}
        pending: dict[int, PendingAudit] = {}
        for part_index, rows in enumerate(rows_by_length(batch, self.args.per_device_train_batch_size)):
            part = {key: batch[key][rows] for key in TOKEN_KEYS}
            scored = self.objective.score(self.model_wrapped, part)
            if not self.accelerator.gather(scored.is_finite()[None]).all():
                raise non_finite("the student's log-probabilities", self.state.global_step)
            new = dict(zip(rows, scored.rows([lengths[b] for b in rows]), strict=True))
            if mode == "train" and self.args.num_branches:
                sample = partial(self._sample_branches, batch=batch, part=part_index)
                for index, trajectory in self.step_audits.fork(trajectories, new, sample).items():
                    trajectories[index] = trajectory
            unsent |= new
            scores |= unsent
            if self.step_audits.overlap:
                pending |= self.step_audits.submit(trajectories, unsent, mode)
                unsent = {}
        pending |= self.step_audits.submit(trajectories, unsent, mode)
        in_order = range(len(inputs))
        if self._sampled is not None:
            logprobs = padded_logprobs([scores[b].logprobs for b in in_order], lengths)
            self._add_importance(batch, padded_logprobs(self._sampled, lengths), logprobs, mode)
        return [pending[b] for b in in_order]

    def _finish_audits(self, batch: dict[str, Any], mode: str, is_last: bool = True) -> None:
        """Wait for the audits of a batch or micro-batch, and fill in `weights` and `audited_mask`, both `(B, T)`.

        Args:
            batch: batch with the key `audits`, which is removed.
            mode: `"train"` or `"eval"`.
            is_last: whether this is the end of the generation batch.

        Raises:
            TeacherError: on every process, when one of them got a permanent error or too many chunks were dropped.
        """
        device, length = batch["weights"].device, batch["weights"].size(1)
        rows = batch.pop("audits")
        collected = self.step_audits.collect(rows, length, mode, is_last=is_last)
        if isinstance(collected, Failure):
            raise self._stop(collected)
        if self.log_completions:
            self._audit_table.add(rows, collected, mode, self.state.global_step)
        batch["weights"], batch["audited_mask"] = collected.weights.to(device), collected.audited.to(device)
        if "importance" in batch:
            batch["weights"] *= batch["importance"]
        if mode == "train" and self.args.num_branches:
            batch["suffixes"] = collected.suffixes
        trained = [batch[name] for name in ("weights", "advantages") if name in batch]
        is_weighted = any(collected.suffixes) or any((w.abs() > NEGLIGIBLE_WEIGHT).any() for w in trained)
        if mode == "train" and is_weighted:
            self._is_weighted = True
        audits = collected.audits
        self.step_metrics.add_audits(
            mode, audits, collected.scores, collected.waited, self.teacher.is_remote, is_last=is_last
        )
        if self.args.teacher_context_column is not None:
            self.step_metrics.add(mode, context_ratios(audits, [row.trajectory for row in rows]))
        usage = sum((audit.usage for audit in audits), Usage())
        self.teacher_usage = sum(gather_object([usage]), self.teacher_usage)

    # ---- Loss and metrics ----

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
