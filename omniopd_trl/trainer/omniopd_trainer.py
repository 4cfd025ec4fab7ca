# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's on-policy distillation loop with the audits and the loss of OmniOPD."""

import copy
import math
import textwrap
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

from omniopd_trl.audits.types import PolicyScores
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, import_extra
from omniopd_trl.evals.rewards import RewardFunc, reward_funcs_of
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.method import Similarity, WeightFunction, get_chunk_weights, get_similarity
from omniopd_trl.models.reference import Reference, needs_copy
from omniopd_trl.models.vllm_logprobs import SamplingLogprobs
from omniopd_trl.teachers import Teacher, TeacherReply, Usage
from omniopd_trl.trainer.batches import TOKEN_KEYS, group_by_length, has_ended, rows_by_length
from omniopd_trl.trainer.checkpoints import last_checkpoint, unmark
from omniopd_trl.trainer.distributed import Failure, raise_together, stop
from omniopd_trl.trainer.evaluation import student_scores, teacher_scores
from omniopd_trl.trainer.fingerprint import fingerprint, replay_key
from omniopd_trl.trainer.generation import on_policy
from omniopd_trl.trainer.metrics import Metrics, non_finite
from omniopd_trl.trainer.objective import Objective
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.samplers import EpochSampler
from omniopd_trl.trainer.step_audits import PendingAudit, StepAudits
from omniopd_trl.trainer.validation import check_inputs, make_auditor, prepare_teacher, repeated


class OmniOPDTrainer(DistillationTrainer):
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
    ...     model="Qwen/Qwen3-4B",
    ...     teacher_model="Qwen/Qwen3-32B",
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
            [`~omniopd_trl.teachers.Teacher`]. Its tokenizer and vocabulary may differ from the student's. Defaults to
            `args.teacher_model_name_or_path`.
        args ([`OmniOPDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to use for training. It must include a column `"prompt"`, plain text or conversational.
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
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Functions that score evaluation samples, with the signature of [`~trl.GRPOTrainer`]'s `reward_funcs`.
            Replace math-verify. The mean of a single function is logged as `pass@1`; with several functions, each mean
            is logged as `pass@1/<name>`.
    """  # noqa: E501

    _tag_names: ClassVar[list[str]] = ["trl", "omniopd"]
    _name = "OmniOPD"
    _paper: ClassVar[dict[str, str]] = {
        "title": "OmniOPD: Logit-Free On-Policy Distillation via Speculative Verification",
        "id": "2606.01476",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhou2026omniopd,
                title        = {{OmniOPD: Logit-Free On-Policy Distillation via Speculative Verification}},
                author       = {Yuhang Zhou and Lizhu Zhang and Yifan Wu and Mingyi Wang and Peng Bo and Jiayi Liu and Xiangjun Fan and Zhuokai Zhao},
                year         = 2026,
                eprint       = {arXiv:2606.01476},
            }"""),  # noqa: E501
    }

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
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OmniOPDConfig(f"{name.split('/')[-1]}-OmniOPD")
        if tools:
            raise ConfigError(f"tools={tools!r} were given, but tools are not supported yet. Leave them out.")

        processing_class = check_inputs(
            model, args, train_dataset, eval_dataset, processing_class, quantization_config
        )
        if isinstance(train_dataset, IterableDataset):
            # One endless epoch. transformers would restart the stream for each epoch, and a run that is resumed in a
            # later epoch would not find its position.
            train_dataset = train_dataset.repeat(None)
        phi = get_similarity(similarity if similarity is not None else args.similarity)
        # Raise an error of `chunk_weights` before models are loaded.
        get_chunk_weights(args.posterior_baseline if chunk_weights is None else chunk_weights)
        self._eval_reward_funcs = reward_funcs_of(eval_reward_funcs, eval_dataset)

        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise ConfigError(
                "There is no teacher. Pass `teacher_model`, or set `teacher_model_name_or_path` in the configuration."
            )
        if args.use_vllm:
            import_extra("vllm", "vllm")
        self._recorder = Recorder(lambda: self.state.global_step)
        error: Exception | None = None
        try:
            datasets = named_datasets(train_dataset, eval_dataset)
            self.teacher = prepare_teacher(teacher_model, args, self._recorder, datasets)
        except Exception as caught:  # a key may be missing on one machine only: the other processes must not wait
            error = caught
        raise_together(error, args.process_index)

        # The reference is the initial student, so copy an instance before the base class changes it.
        reference = copy.deepcopy(model) if needs_copy(model, args, peft_config) else None

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

        self.sampling_logprobs: SamplingLogprobs | None = None
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
        self.step_metrics = Metrics(self.accelerator, args, self._metrics, lambda: self.state.global_step)

    # ---- Generation batch: trajectories -> entropy -> audits -> weights ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self._reset_step(resume_from_checkpoint or None)
        try:
            with self._recording():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.step_audits.release()

    def _reset_step(self, checkpoint: str | None) -> None:
        """Reset the state within a step, since an earlier run in this process may have been interrupted."""
        self._step = 0
        self._buffered_inputs: Any = None
        self.step_audits.start()
        self._last_loaded_step = -1  # see `evaluate`
        self._whole_checkpoint = Path(checkpoint).resolve() if checkpoint else None

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint. The trainer's state is written last and marks it as complete: remove an old one first."""
        folder = self._checkpoint_folder()
        if self.args.should_save:
            unmark(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self._whole_checkpoint = folder.resolve()

    def _save_rng_state(self, output_dir):
        """Wait for all processes after the last file of each, before the trainer's state marks the checkpoint."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not self.shuffle_dataset:
            return sampler
        return EpochSampler(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Context with an open journal, if `save_audits` is set."""
        if not self.args.save_audits or self._recorder.journal is not None:
            yield
            return
        rank = self.accelerator.process_index
        decisive = replay_key(
            self.args,
            self.train_dataset,
            self.model,
            self.teacher,
            self.auditor.similarity,
            self.step_audits.custom_weights,
        )
        settings: dict[str, Any] = {
            "run": str(self.args.run_name or Path(self.args.output_dir).name),
            "teacher": self.teacher.name,
            "fingerprint": fingerprint(decisive),
            "settings": decisive,
            "rank": rank,
            "num_processes": self.accelerator.num_processes,
        }
        with self._recorder.open(journal_path(self.args.output_dir, rank), self.teacher.budget, **settings):
            try:
                yield
            finally:
                self.step_audits.cancel()  # audits write to the journal, so cancel them before it is closed

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        replayed = self.step_audits.replay(prompt_ids) if self.model.training else None
        if replayed is not None:
            if self.sampling_logprobs is not None:
                self.sampling_logprobs.take()  # discard those of an evaluation
            return replayed
        try:
            with on_policy(self.model, self.accelerator, self.args, self.state.global_step):
                completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" in str(error):  # torch.multinomial
                raise non_finite("the student's next-token probabilities", self.state.global_step) from error
            raise
        # An engine may return an empty completion, but the base class reads the last token of each.
        return [ids or [self._tokenizer.eos_token_id] for ids in completion_ids]

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        batch["weights"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
        batch["audited_mask"] = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        prompts = [example["prompt"] for example in inputs]
        if mode == "train":
            self.step_audits.record(self.step_audits.trajectories(prompts, batch, mode))
            if self.args.mask_truncated_completions:
                self._mask_truncated(batch)
        else:
            scores = student_scores(
                self._eval_reward_funcs, inputs, batch, self._tokenizer, self.accelerator, self.state
            )
            for name, total, count in scores:
                self.step_metrics.add_global(mode, name, total, count)
        if mode == "train" or self.args.audit_eval:
            batch["audits"] = self._start_audits(prompts, batch, mode)
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

    def _start_audits(self, prompts: list[Any], batch: dict[str, Any], mode: str) -> list[PendingAudit]:
        """Score the completions, and start the audit of each trajectory as soon as its chunks are known.

        Raises:
            NonFiniteError: when a log-probability or an entropy is not finite.
        """
        trajectories = self.step_audits.trajectories(prompts, batch, mode)
        lengths = [len(trajectory.completion_ids) for trajectory in trajectories]
        scores: dict[int, PolicyScores] = {}
        unsent: dict[int, PolicyScores] = {}
        pending: dict[int, PendingAudit] = {}
        for rows in rows_by_length(batch, self.args.per_device_train_batch_size):
            part = {key: batch[key][rows] for key in TOKEN_KEYS}
            scored = self.objective.score(self.model_wrapped, part)
            if not self.accelerator.gather(scored.is_finite()[None]).all():
                raise non_finite("the student's log-probabilities", self.state.global_step)
            unsent |= dict(zip(rows, scored.rows([lengths[b] for b in rows]), strict=True))
            scores |= unsent
            if self.step_audits.overlap:
                pending |= self.step_audits.submit(trajectories, unsent, mode)
                unsent = {}
        pending |= self.step_audits.submit(trajectories, unsent, mode)
        in_order = range(len(prompts))
        sampled = self.sampling_logprobs.take() if self.sampling_logprobs is not None else None
        if sampled is not None:
            self.step_metrics.add_sampling(mode, sampled, [scores[b].logprobs for b in in_order])
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
        collected = self.step_audits.collect(batch.pop("audits"), length, mode, is_last=is_last)
        if isinstance(collected, Failure):
            raise self._stop(collected)
        batch["weights"], batch["audited_mask"] = collected.weights.to(device), collected.audited.to(device)
        audits = collected.audits
        self.step_metrics.add_audits(mode, audits, collected.scores, collected.waited, self.teacher.is_remote)
        usage = sum((audit.usage for audit in audits), Usage())
        self.teacher_usage = sum(gather_object([usage]), self.teacher_usage)

    def _stop(self, failure: Failure) -> Exception:
        """Save a checkpoint and return the error to raise. Every process has to call it, or the others would wait."""
        self.step_audits.cancel()  # spend nothing more
        where = ""
        if self.is_in_train:
            # Do not overwrite a complete checkpoint of this step.
            if self._whole_checkpoint != self._checkpoint_folder().resolve():
                self._save_checkpoint(self.model, trial=None)
            # A launcher ends all processes as soon as one has ended, and another may still be writing.
            self.accelerator.wait_for_everyone()
            where = f" A checkpoint is in {self.args.output_dir}; fix the cause and resume from it."
        text = failure.text.rstrip()
        end = "" if text.endswith((".", "!", "?", "…")) else "."
        return stop(failure, f"Stopped at step {self.state.global_step}: {text}{end}{where}")

    # ---- Loss and metrics ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, sums = self.objective.loss(model, inputs)
        self.step_metrics.add_losses("train" if self.model.training else "eval", loss, sums)
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        # A finite loss may have a gradient that is not finite. Check it before the update. DeepSpeed has already
        # applied it here; the check then comes before a checkpoint of the result could replace a good one.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:  # the fp16 scaler skips such a step
            raise non_finite("the gradients", self.state.global_step)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update(self.step_metrics.take(mode))
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # With several evaluation sets, the base class calls this once per set, each with its own prefix. Without the
        # prefix below, the metrics recorded during evaluation would all be named `eval_...`.
        name = metric_key_prefix.removeprefix("eval").removeprefix("_")
        self.step_metrics.prefix = f"{name}_" if name else ""
        if not self.is_in_train:
            # The base class sends the weights to vLLM once per step. Outside of training, they may change without a
            # step: a user loads others, or `load_best_model_at_end` does after the last evaluation.
            self._last_loaded_step = -1
        # A name refers to a set that is already repeated. For a dictionary, this method is called again for each set.
        if not isinstance(eval_dataset, (str, dict)):
            eval_dataset = repeated(eval_dataset, self.args.num_eval_generations)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.step_metrics.prefix = ""

    def evaluate_teacher(self) -> dict[str, float]:
        """Evaluate pass@1 of the teacher on the evaluation set, with `num_eval_generations` samples per problem.

        Returns:
            The scores by name, including `"pass@1"`, the same on all processes.

        Raises:
            DataError: when there is nothing to score against.
        """

        def ask(coroutine: Coroutine[Any, Any, list[TeacherReply]]) -> list[TeacherReply]:
            try:
                with self._recording():
                    return self.step_audits.ask(coroutine)
            finally:
                if not self.is_in_train:
                    self.step_audits.release()

        scores, usage = teacher_scores(
            self._eval_reward_funcs,
            self.eval_dataset,
            self.teacher,
            ask,
            self._recorder,
            self.accelerator,
            self.args,
            self.state,
        )
        self.teacher_usage += usage
        return scores
