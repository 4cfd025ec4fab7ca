# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer: TRL's on-policy loop around the functions of this package."""

import copy
import math
import random
import textwrap
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

from omniopd_trl.accounting.usage import METER
from omniopd_trl.audits.auditor import TEACHER_TOKENS_PER_STUDENT_TOKEN, Auditor
from omniopd_trl.audits.event_loop import EventLoopThread
from omniopd_trl.audits.types import Audit, AuditSettings, PolicyScores, Trajectory
from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, check_step_is_filled
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, DataError, NonFiniteError, import_extra
from omniopd_trl.evals.rewards import RewardFunc, reward_funcs_of, score
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.resume import audit_or_replay, with_meter
from omniopd_trl.method.loss import chunk_loss, combine
from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.method.weights import centered_posteriors
from omniopd_trl.models.lm_head import LMHead, kl_to_reference, lm_head_of, logprobs_of
from omniopd_trl.models.reference import Reference, needs_copy
from omniopd_trl.models.vllm_logprobs import LARGE_DIFFERENCE, SamplingLogprobs, sampling_difference
from omniopd_trl.teachers import Prefix, SamplingRequest, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.base import replies_of
from omniopd_trl.teachers.local import without_generation_defaults
from omniopd_trl.trainer.batches import TOKEN_KEYS, PackedBatch, group_by_length, has_ended
from omniopd_trl.trainer.callbacks import PosteriorAverage
from omniopd_trl.trainer.checkpoints import last_checkpoint, unmark
from omniopd_trl.trainer.distributed import Failure, raise_together, stop, warn_about_lost_processes
from omniopd_trl.trainer.fingerprint import fingerprint, replay_key
from omniopd_trl.trainer.metrics import Ratios, audit_ratios, audit_warnings, metric_dtype, sum_over_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.samplers import EpochSampler
from omniopd_trl.trainer.step_audits import DroppedChunks, PendingAudit, first_finished, wait_for
from omniopd_trl.trainer.validation import (
    check_vllm_can_follow,
    context_length_of,
    load_tokenizer,
    make_teacher,
    release,
    repeated,
)

logger = logging.get_logger(__name__)

# In nats per token, of a student from itself: rounding in bfloat16 makes some 1e-4.
LARGE_FIRST_KL = 0.05


class OmniOPDTrainer(DistillationTrainer):
    """
    Trainer for OmniOPD, logit-free on-policy distillation. The student writes its own solution; at its most uncertain
    places a teacher that returns nothing but text writes what it would have said next; the similarity of the two
    weights the student's own tokens there, and a KL to the initial student holds everything else in place. The method
    was introduced in [OmniOPD: Logit-Free On-Policy Distillation via Speculative
    Verification](https://huggingface.co/papers/2606.01476).

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
            Who continues the student's text: a path or *model id* (loaded with `args.teacher_model_init_kwargs`), an
            instantiated model, `"vllm:MODEL"`, `"openai:MODEL"`, `"anthropic:MODEL"`, `"gemini:MODEL"`, `"scripted"`,
            or any [`~omniopd_trl.teachers.Teacher`]. Its tokenizer and vocabulary may differ from the student's. Defaults to `args.teacher_model_name_or_path`.
        args ([`OmniOPDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to use for training. It must include a column `"prompt"`, plain text or conversational.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            Dataset to use for evaluation. Where it has a `"solution"` or `"answer"` column, pass@1 is reported.
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
            A similarity of one's own in [0, 1], instead of `args.similarity`.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Functions that score evaluation samples, in the signature of [`~trl.GRPOTrainer`]'s `reward_funcs`, instead
            of math-verify. With one function its mean is `pass@1`; with several, each is `pass@1/<name>`.
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
        similarity: Callable[[str, str], float] | None = None,
        eval_reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OmniOPDConfig(f"{name.split('/')[-1]}-OmniOPD")
        if tools:
            raise ConfigError(f"tools={tools!r} were given, but tools are not supported yet. Leave them out.")

        warn_about_lost_processes(args.world_size)
        # Everything that can be wrong is looked at before a model is loaded.
        self._check_data(train_dataset, eval_dataset)
        processing_class = processing_class or load_tokenizer(model, args)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ConfigError(
                f"processing_class is a {type(processing_class).__name__}, but only text is supported yet. Pass the "
                "tokenizer."
            )
        check_vllm_can_follow(model, args, quantization_config)
        context_length = context_length_of(model, args)
        if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_max_model_length is not None:
            context_length = min(args.vllm_max_model_length, context_length or args.vllm_max_model_length)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_prompt_lengths(
                dataset,
                processing_class,
                name=name,
                chat_template_kwargs=args.chat_template_kwargs,
                context_length=context_length,
                max_completion_length=args.max_completion_length,
            )
        if isinstance(train_dataset, Dataset):
            check_step_is_filled(
                len(train_dataset),
                args.per_device_train_batch_size,
                args.gradient_accumulation_steps,
                args.world_size,
            )
        elif isinstance(train_dataset, IterableDataset):
            # One long pass: what transformers would begin anew, a run that is resumed in a later pass could not find.
            train_dataset = train_dataset.repeat(None)
        phi = get_similarity(similarity if similarity is not None else args.similarity)
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
            self.teacher = self._make_teacher(teacher_model, args, train_dataset, eval_dataset)
        except Exception as caught:  # a key may be missing on one machine only: the others must not wait for it
            error = caught
        raise_together(error, args.process_index)

        # The reference is the student before anything happens to it, so an instance is copied here.
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
            # On some CPUs, bitsandbytes repacks the weights of a layer that is evaluated into a form without a
            # gradient, for good: everything below it would never be trained again.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

        self._reference = Reference(self.model, reference, self.accelerator, args, quantization_config)
        self.ref_model = self._reference.model

        self._sampling_logprobs: SamplingLogprobs | None = None
        if self.use_vllm:
            self._sampling_logprobs = SamplingLogprobs(self.vllm_generation, self.eos_token_ids)
        if self.use_vllm and self.vllm_mode == "colocate":
            # The engine draws from this process's generators, and has seeded them with its own number alone: all runs
            # would draw alike, whatever their `seed`. The processes that share an engine have to draw alike.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)

        settings = AuditSettings(**{f.name: getattr(args, f.name) for f in fields(AuditSettings)})
        self.auditor = Auditor(self.teacher, processing_class, settings, phi)
        self.teacher_usage = Usage()
        self._loop = EventLoopThread()
        weakref.finalize(self, self._loop.close)
        if self.accelerator.device.type in ("cuda", "xpu"):
            # Each thread has a current device of its own, and the kernels of a teacher in this process go to it.
            # Without a launcher the accelerator's device has no index: it is the current one of this thread.
            index = self.accelerator.device.index
            self._loop.run(_compute_on(torch.accelerator.current_device_index() if index is None else index))
        self._ratios = Ratios(self.accelerator)
        self._dropped_chunks = DroppedChunks(self.accelerator, args)
        self._replays = False  # whether the current generation batch comes from it
        self._eval_name = ""
        self._warned: set[str] = set()
        if args.posterior_baseline == "moving_average":
            self.add_callback(PosteriorAverage())

    # ---- Construction ----

    @staticmethod
    def _check_data(train_dataset: Any, eval_dataset: Any) -> None:
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_dataset(dataset, name)

    def _make_teacher(self, teacher: Any, args: OmniOPDConfig, train_dataset: Any, eval_dataset: Any) -> Teacher:
        """The teacher, after it has answered one question."""
        made = make_teacher(teacher, args)
        for _, dataset in named_datasets(train_dataset, eval_dataset):
            token = METER.set(self._recorder.meter)
            try:
                made.probe(next(iter(dataset))["prompt"])
            finally:
                METER.reset(token)
            break
        return made

    # ---- Generation batch: trajectories -> entropy -> audits -> weights ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self._begin_anew(resume_from_checkpoint or None)
        try:
            with self._recording():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            release(self.teacher, self._loop)

    def _begin_anew(self, checkpoint: str | None) -> None:
        """Forget what a run that was interrupted in this process left in the middle of a step."""
        self._step = 0
        self._buffered_inputs: Any = None
        self._dropped_chunks.start()
        self._last_loaded_step = -1  # see `evaluate`
        self._whole_checkpoint = Path(checkpoint).resolve() if checkpoint else None

    def _save_checkpoint(self, model, trial):
        """The trainer's state is written last, and says that a checkpoint is whole: one of an earlier run must not."""
        folder = self._checkpoint_folder()
        if self.args.should_save:
            unmark(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self._whole_checkpoint = folder.resolve()

    def _save_rng_state(self, output_dir):
        """Of what each process writes this is the last; the state follows, and older checkpoints are deleted."""
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
        """Keep trajectories and audits in this block, where the configuration says so."""
        if not self.args.save_audits or self._recorder.journal is not None:
            yield
            return
        rank = self.accelerator.process_index
        decisive = replay_key(self.args, self.train_dataset, self.model, self.teacher, self.auditor.similarity)
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
                self._loop.cancel()  # before the journal that they write to is closed

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._recorder.journal is not None and self.model.training:
            stored = self._recorder.stored(prompt_ids)
            # Generation is collective: either every process replays its part of the step, or none does.
            self._replays = self._sum_over_processes(stored is not None)[0] == self.accelerator.num_processes
            if self._replays:
                return [t.completion_ids for t in stored or ()]
        try:
            with self._seeded_generation(), _evaluation_mode(self.model), without_generation_defaults(self.model):
                completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" in str(error):  # torch.multinomial
                raise self._non_finite("the student's next-token probabilities") from error
            raise
        # An engine may return no token at all, while the base class looks at each completion's last one.
        return [ids or [self._tokenizer.eos_token_id] for ids in completion_ids]

    @contextmanager
    def _seeded_generation(self) -> Iterator[None]:
        """Sample completions of training from a seed of this step and process, and leave the generator as it was.

        A step is then the same whether the steps before it were generated or replayed, so that a resumed run goes on
        like one that was never interrupted. A colocated vLLM draws from the generators of its process, and processes
        that share an engine have to draw alike; a server has generators of its own.
        """
        if not self.model.training or (self.use_vllm and self.vllm_mode == "server"):
            yield
            return
        engine = self.accelerator.process_index // (self.args.vllm_tensor_parallel_size if self.use_vllm else 1)
        seed = random.Random(repr((self.args.seed, "generation", self.state.global_step, engine))).getrandbits(31)
        device = self.accelerator.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(seed)
            yield

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        batch["weights"] = torch.zeros_like(batch["completion_mask"], dtype=torch.float32)
        batch["audited_mask"] = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        if mode == "eval":
            self._score_samples(inputs, batch)
        if mode == "train" and self._recorder.journal is not None and not self._replays:
            # Before any of them is audited: what is paid for is paid for these.
            stored = self._trajectories([example["prompt"] for example in inputs], batch, mode)
            self._recorder.journal.record_trajectories(self.state.global_step, stored)
        if mode == "train" and self.args.mask_truncated_completions:
            self._mask_truncated(batch)
        if mode == "train" or self.args.audit_eval:
            batch["audits"] = self._start_audits([example["prompt"] for example in inputs], batch, mode)
            if mode == "eval" or not self._overlaps:
                self._finish_audits(batch, mode, is_last=True)
        if mode == "train" and self.args.loss_normalization == "components":
            num_audited = batch["audited_mask"].sum()
            counts = torch.stack([num_audited, batch["completion_mask"].sum() - num_audited])
            batch["num_audited"], batch["num_unaudited"] = self.accelerator.gather(counts[None]).sum(0).unbind()
        return batch

    def _mask_truncated(self, batch: dict[str, Any]) -> None:
        """Take completions that did not come to their end out of the batch, and out of what it is divided by."""
        ended = has_ended(batch, [*self.eos_token_ids, self._tokenizer.pad_token_id])
        batch["completion_mask"] = batch["completion_mask"] * ended
        counts = torch.stack([batch["completion_mask"].sum(), ended.sum()])
        batch["num_items_in_batch"], batch["num_sequences"] = self.accelerator.gather(counts[None]).sum(0).unbind()

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:  # there is a new generation batch
            self._buffered_inputs = group_by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        if "audits" in inputs:
            position = self._step % self.args.gradient_accumulation_steps
            start = time.perf_counter()
            ready = first_finished([batch["audits"] for batch in self._buffered_inputs[position:]])
            waited = time.perf_counter() - start
            # They all add to one optimizer step, in any order.
            batches = self._buffered_inputs
            batches[position], batches[position + ready] = batches[position + ready], batches[position]
            inputs = batches[position]
            is_last = position == self.args.gradient_accumulation_steps - 1
            self._finish_audits(inputs, "train", is_last, waited)
        return inputs

    @property
    def _overlaps(self) -> bool:
        """Whether a micro-batch waits for its own audits only, while later ones are still under way."""
        needs_whole_batch = self.args.posterior_baseline == "batch" or self.args.loss_normalization == "components"
        return self.teacher.is_remote and not needs_whole_batch

    def _start_audits(self, prompts: list[Any], batch: dict[str, Any], mode: str) -> list[PendingAudit]:
        """Score the completions, and send each trajectory to the teacher as soon as its chunks are known.

        Raises:
            NonFiniteError: when a log-probability or an entropy is not a finite number.
        """
        lengths = batch["completion_mask"].sum(1)
        trajectories = self._trajectories(prompts, batch, mode)
        scored: dict[int, PolicyScores] = {}
        unsent: dict[int, PolicyScores] = {}
        futures: dict[int, Future[Audit]] = {}
        # Like with like, so that a micro-batch pays for little padding.
        order = (batch["prompt_mask"].sum(1) + lengths).argsort(descending=True)
        for rows in order.split(self.args.per_device_train_batch_size):
            scores = self._score_rows({key: batch[key][rows] for key in TOKEN_KEYS})
            if not self.accelerator.gather(scores.isfinite().all()[None]).all():
                raise self._non_finite("the student's log-probabilities")
            for b, row in zip(rows.tolist(), scores.cpu().unbind(1), strict=True):
                scored[b] = unsent[b] = PolicyScores(*row[:, : lengths[b]])
            if self._overlaps:
                futures |= self._submit(trajectories, unsent, mode)
                unsent = {}
        futures |= self._submit(trajectories, unsent, mode)
        self._record_sampling(mode, [scored[b].logprobs for b in range(len(prompts))])
        return [PendingAudit(scored[b], futures[b]) for b in range(len(prompts))]

    def _submit(
        self, trajectories: list[Trajectory], scores: dict[int, PolicyScores], mode: str
    ) -> "dict[int, Future[Audit]]":
        """Start the audits of the trajectories that have scores, in one turn of the loop, by index in the batch."""
        step, journal = self.state.global_step, self._recorder.journal
        if mode == "train":
            audits = [audit_or_replay(self.auditor, trajectories[b], s, journal, step, b) for b, s in scores.items()]
        else:
            meter = self._recorder.meter
            audits = [with_meter(meter, self.auditor.audit(trajectories[b], s)) for b, s in scores.items()]
        return dict(zip(scores, self._loop.submit(*audits), strict=True))

    def _trajectories(self, prompts: list[Any], batch: dict[str, Any], mode: str) -> list[Trajectory]:
        masks = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
        return [
            Trajectory(
                prompt=prompt,
                prompt_ids=batch["prompt_ids"][b][masks[0][b]].tolist(),
                completion_ids=batch["completion_ids"][b][masks[1][b]].tolist(),
                seed=self._trajectory_seed(mode, b),
            )
            for b, prompt in enumerate(prompts)
        ]

    def _finish_audits(self, batch: dict[str, Any], mode: str, is_last: bool, waited: float = 0.0) -> None:
        """Wait for the audits of a batch or micro-batch, and fill in `weights` and `audited_mask`, both `(B, T)`.

        Args:
            batch: holds its `audits`, which are taken out.
            mode: `"train"` or `"eval"`.
            is_last: whether this ends the generation batch.
            waited: seconds that these audits were waited for before.

        Raises:
            TeacherError: on every process, when one of them got a final error, or when too many chunks were dropped.
        """
        pending: list[PendingAudit] = batch.pop("audits")
        start = time.perf_counter()
        audits, error = wait_for(pending)
        waited += time.perf_counter() - start
        failure = self._dropped_chunks.count(audits, error, is_last)
        if failure is not None:
            raise self._stop(failure, error)

        posteriors = torch.tensor([chunk.posterior for audit in audits for chunk in audit.chunks])
        rows = torch.tensor([b for b, audit in enumerate(audits) for _ in audit.chunks], dtype=torch.long)
        weights = self._chunk_weights(posteriors, rows, mode, is_last)
        spans = [(b, chunk.chunk) for b, audit in enumerate(audits) for chunk in audit.chunks]
        for (b, chunk), weight in zip(spans, weights.tolist(), strict=True):
            batch["weights"][b, chunk.start : chunk.end] = weight
            batch["audited_mask"][b, chunk.start : chunk.end] = True
        self._record_audits(mode, audits, [audit.scored for audit in pending], waited)

    def _stop(self, failure: Failure, error: Exception | None) -> Exception:
        """What to raise when a process cannot go on: all come here, so that none waits for a dead one."""
        self._loop.cancel()  # nothing more is spent
        where = ""
        if self.is_in_train:
            # One that is there already is not put at risk.
            if self._whole_checkpoint != self._checkpoint_folder().resolve():
                self._save_checkpoint(self.model, trial=None)
            # As soon as one process has ended, a launcher ends the others: one of them may still be writing.
            self.accelerator.wait_for_everyone()
            where = f" A checkpoint is in {self.args.output_dir}; mend the cause and resume from it."
        return stop(failure, error, f"Stopped at step {self.state.global_step}: {failure.text}{where}")

    def _chunk_weights(self, posteriors: torch.Tensor, rows: torch.Tensor, mode: str, is_last: bool) -> torch.Tensor:
        """Posterior means, centred as `posterior_baseline` says; `(K,)` for the K chunks at hand."""
        baseline = self.args.posterior_baseline
        if baseline == "batch":
            total, count = self._sum_over_processes(posteriors.sum().item(), len(posteriors))
            return centered_posteriors(posteriors, rows, baseline, total / count if count else 0.0)
        if baseline != "moving_average":
            return centered_posteriors(posteriors, rows, baseline)
        # `Trainer` may replace the callback when it restores a checkpoint, so it is looked up each time.
        average = next(c for c in self.callback_handler.callbacks if isinstance(c, PosteriorAverage))
        weights = centered_posteriors(posteriors, rows, baseline, moving_average=average.value)
        # Counted after use, and for the whole generation batch at once: what a batch is measured against must not
        # depend on it. An evaluation changes nothing.
        if mode == "train":
            average.add(posteriors.sum().item(), len(posteriors))
            if is_last:
                average.update(*self._sum_over_processes(*average.take()))
        return weights

    def _sum_over_processes(self, *values: float) -> list[float]:
        return sum_over_processes(self.accelerator, *values)

    def _trajectory_seed(self, mode: str, index: int) -> int:
        key = (self.args.seed, mode, self.state.global_step, self.accelerator.process_index, index)
        return random.Random(repr(key)).getrandbits(31)

    # ---- Forward passes ----

    def _inside_forward(self, model: nn.Module, body: Callable[[PreTrainedModel], Any]) -> Any:
        """Run `body(unwrapped model)` inside the wrapper's forward, where sharded parameters are whole.

        Mixed precision has to be entered here: the redirection replaces the forward that accelerate wrapped. Tensors
        travel in and out through closures, since FSDP2 rounds every float that it sees as an argument or a result.
        """
        unwrapped = self.accelerator.unwrap_model(model)

        def run(_: None) -> Any:
            with self.accelerator.autocast():
                return body(unwrapped)

        # On a GPU, FSDP2 of torch before 2.13 fails when it is called without any argument.
        return self._forward_redirection(model, unwrapped, run, None)

    def _tokens(self, batch: dict[str, Any]) -> PackedBatch:
        return PackedBatch.of(batch, self._tokenizer.pad_token_id, self.pad_to_multiple_of)

    def _hidden_states(self, model: PreTrainedModel, tokens: PackedBatch) -> torch.Tensor:
        """States that predict `tokens.targets`, `(B, L - 1, H)`."""
        return self._get_last_hidden_state(
            model, tokens.input_ids, tokens.attention_mask, tokens.input_ids.size(1) - 1
        )

    def _run_reference(self, student: PreTrainedModel, body: Callable[[PreTrainedModel], None]) -> None:
        """Run `body(reference model)` without gradients. `student` is the unwrapped student, inside its forward."""
        with torch.no_grad():
            if self.ref_model is not None:
                offloaded = self._reference.offloaded
                with offloaded.on_device() if offloaded is not None else nullcontext():
                    self._inside_forward(self.ref_model, body)
                return
            with self._reference.lent_by(student), _evaluation_mode(student):
                body(student)

    @torch.no_grad()
    def _score_rows(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities and entropies of completions under the policy that wrote them.

        Returns:
            `(3, B, T)`, float32, 0 on padding: log-probabilities, entropies, and log-probabilities of the prior.
        """
        tokens = self._tokens(part)
        where = part["completion_mask"].bool()
        scores = torch.zeros(3, *where.shape, device=where.device)

        def project(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self._hidden_states(model, tokens)
            with lm_head_of(model) as head:
                logprobs, entropy = self._project(hidden, head, tokens, tokens.completion)
            return logprobs.to(scores), entropy.to(scores)

        def score_reference(reference: PreTrainedModel) -> None:
            scores[2, where], _ = project(reference)

        def body(student: PreTrainedModel) -> None:
            scores[0, where], scores[1, where] = project(student)
            scores[2] = scores[0]
            if self.args.prior == "reference" and self.args.prior_strength > 0:
                self._run_reference(student, score_reference)

        with _evaluation_mode(self.model):
            self._inside_forward(self.model_wrapped, body)
        return scores

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        sums: dict[str, torch.Tensor] = {}
        tokens = self._tokens(inputs)
        kept: list[torch.Tensor] = []

        def body(student: PreTrainedModel) -> torch.Tensor:
            loss = self._objective(student, tokens, inputs, mode, sums)
            kept.append(loss.detach())
            return loss

        loss = self._inside_forward(model, body)
        # FSDP2 has rounded the result to bf16. The gradient is that of the result, and the value the one before.
        loss = loss + (kept[0] - loss.detach())
        self._record_losses(mode, loss, sums)
        return (loss, None) if return_outputs else loss

    def _objective(
        self,
        student: PreTrainedModel,
        tokens: PackedBatch,
        inputs: dict[str, Any],
        mode: str,
        sums: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Eq. 8 of one micro-batch, scaled so that micro-batches and processes add up to that of the global batch."""
        hidden = self._hidden_states(student, tokens)
        with lm_head_of(student) as head:
            hidden = hidden.to(head.weight.device)
            logprobs, _ = self._project(hidden, head, tokens, tokens.audited)
            chunk_sum = chunk_loss(logprobs, tokens.weights[tokens.audited].to(hidden.device))
            kl_sum = torch.zeros_like(chunk_sum)
            if self.args.beta > 0:
                kl_sum = self._anchor(student, tokens, hidden, head, logprobs.detach(), sums)
            elif mode == "eval" and not self.args.audit_eval:
                _, entropy = self._project(hidden, head, tokens, tokens.completion)
                sums["entropy"] = _sum_and_count(entropy)
        # Generation hands out the micro-batches of one optimizer step; an evaluation batch stands for itself.
        is_train = mode == "train"
        num_processes = self.accelerator.num_processes if is_train else 1
        num_micro_batches = self.args.gradient_accumulation_steps if is_train else 1
        local = {"num_audited": tokens.audited.sum(), "num_unaudited": tokens.unaudited.sum()}
        counts = {key: inputs.get(key, value).to(hidden.device) for key, value in local.items()}
        num_sequences = tokens.input_ids.size(0) * num_processes * num_micro_batches
        loss = combine(
            chunk_sum,
            kl_sum,
            beta=self.args.beta,
            normalization=self.args.loss_normalization,
            num_tokens=(inputs["num_items_in_batch"] if is_train else tokens.completion.sum()).to(hidden.device),
            num_sequences=inputs.get("num_sequences", num_sequences),
            **counts,
        )
        # Gradients are averaged over processes, so that each one's share is scaled up by their number.
        return loss * num_processes

    def _project(
        self, hidden: torch.Tensor, head: LMHead, tokens: PackedBatch, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, `(N,)`, of the N targets at `where`; `hidden` holds the same rows."""
        return logprobs_of(
            hidden[where].to(head.weight.device),
            head,
            tokens.targets[where].to(head.weight.device),
            self.temperature,
        )

    def _anchor(
        self,
        student: PreTrainedModel,
        tokens: PackedBatch,
        hidden: torch.Tensor,
        head: LMHead,
        logprobs: torch.Tensor,
        sums: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Sum of the exact `KL(ref || theta)` on un-audited tokens; `logprobs` are the student's on audited ones."""
        unaudited = tokens.unaudited
        # A trajectory without un-audited tokens needs no reference. Sharded models run it all the same, since every
        # process has to take part.
        has_unaudited = unaudited.any(1)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            has_unaudited = torch.ones_like(has_unaudited)
        if not has_unaudited.any():
            return hidden.sum() * 0.0
        rows = tokens.select(has_unaudited)
        reference: dict[str, Any] = {}

        def run(model: PreTrainedModel) -> None:
            states = self._hidden_states(model, rows)
            with lm_head_of(model) as ref_head:
                reference["head"] = self._reference.kept(ref_head)
                reference["hidden"] = states[unaudited[has_unaudited]].to(hidden.device)
                reference["logprobs"], _ = self._project(states, ref_head, rows, rows.audited)

        self._run_reference(student, run)
        kl, entropy = kl_to_reference(
            hidden[unaudited], head, reference["hidden"], reference["head"], self.temperature
        )
        is_in_rows = has_unaudited[:, None].expand_as(tokens.audited)[tokens.audited]
        sums["kl/unaudited"] = _sum_and_count(kl.detach())
        sums["kl/audited"] = _sum_and_count(_sampled_kl(reference["logprobs"].to(logprobs) - logprobs[is_in_rows]))
        if not self.model.training and not self.args.audit_eval:
            sums["entropy"] = _sum_and_count(entropy)
        return kl.sum()

    # ---- Metrics ----

    def _add_ratios(self, mode: str, ratios: dict[str, tuple[float, float]], *others: float) -> list[float]:
        return self._ratios.add(mode, ratios, self._eval_name if mode == "eval" else "", others)

    def _record_losses(self, mode: str, loss: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
        names = ("kl/unaudited", "kl/audited", "entropy")
        ratios = {name: tuple(sums[name].tolist()) if name in sums else (0.0, 0.0) for name in names}
        (failed,) = self._add_ratios(mode, ratios, float(not loss.isfinite()))
        if failed:
            raise self._non_finite("the loss")
        kl, count = ratios["kl/unaudited"]
        if mode == "train" and self.state.global_step == 0 and count and kl / count > LARGE_FIRST_KL:
            self._warn_once(
                "first kl",
                f"Before the first update the student is {kl / count:.3g} nats per token away from its reference, "
                "which should be itself. Dropout does that (set disable_dropout=True; attention dropout is set in the "
                "model's configuration: model_init_kwargs={'attention_dropout': 0.0}), and so does a reference that "
                "`ref_model_init_kwargs` makes another model. The anchor then pulls towards what the student never "
                "was.",
            )

    def _get_grad_norm(self, model, grad_norm=None):
        # A finite loss may have a gradient that is not: it is seen before it is applied, or, where DeepSpeed has
        # applied it, before a checkpoint of the result takes the place of a good one.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:  # whose scaler skips such a step
            raise self._non_finite("the gradients")
        return norm

    def _record_audits(self, mode: str, audits: list[Audit], scored: list[PolicyScores], waited: float) -> None:
        num_processes = self.accelerator.num_processes
        per_step = len(audits)
        if mode == "train":
            per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        steps = len(audits) / per_step / num_processes
        self._add_ratios(mode, audit_ratios(audits, scored, waited, steps, num_processes, self.teacher.is_remote))
        usage = sum((audit.usage for audit in audits), Usage())
        self.teacher_usage = sum(gather_object([usage]), self.teacher_usage)
        for kind, message in audit_warnings(audits, self.state.global_step, self.args):
            self._warn_once(kind, message)

    def _record_sampling(self, mode: str, logprobs: list[torch.Tensor]) -> None:
        """How well vLLM's student is the one that is trained; `logprobs` are `(T,)` per completion, in nats."""
        sampled = self._sampling_logprobs.take() if self._sampling_logprobs is not None else None
        replays = mode == "train" and self._replays  # then they are those of an evaluation
        # A filter's probabilities are those of what it leaves: larger, and rightly so.
        if sampled is None or replays or self.args.sampling_filters:
            return
        difference = sampling_difference(sampled, logprobs)
        total, count = self._sum_over_processes(difference.sum().item(), len(difference))
        if not count:
            return
        largest = torch.tensor([max(difference.tolist(), default=0.0)], device=self.accelerator.device)
        mean = total / count
        name = f"{self._eval_name if mode == 'eval' else ''}sampling/sampling_logp_difference"
        self._metrics[mode][f"{name}/mean"].append(mean)
        self._metrics[mode][f"{name}/max"].append(self.accelerator.gather(largest).max().item())
        if not mean <= LARGE_DIFFERENCE:  # NaN too
            self._warn_once(
                "sampling",
                f"The log-probabilities that vLLM sampled with at step {self.state.global_step} differ from the "
                f"student's by {mean:.3g} nats per token on average, more than {LARGE_DIFFERENCE}: it does "
                "not run the student that is trained. Its weights were not updated, or its precision, its sampling "
                "settings (`generation_kwargs`) or, behind a server, `--logprobs-mode processed_logprobs` differ. "
                "See docs/generation.md.",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    def _non_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{what[0].upper()}{what[1:]} at step {self.state.global_step} hold NaN or infinity. Training stops here, "
            "since one more update would destroy the student. Go back to the last checkpoint with a lower "
            "`learning_rate` or a lower `max_grad_norm`, and check that the model is not run in float16."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._ratios.take(mode).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # With several evaluation sets, the base class calls this once for each with a prefix of its own, while metrics
        # that are recorded on the way would all be called `eval_...`.
        name = metric_key_prefix.removeprefix("eval").removeprefix("_")
        self._eval_name = f"{name}_" if name else ""
        if not self.is_in_train:
            # The base class gives vLLM the weights once per step. Outside of training they change without one: a user
            # loads others, or `load_best_model_at_end` does after the last evaluation.
            self._last_loaded_step = -1
        # A name stands for a set that is repeated already, and a dictionary comes back here one set at a time.
        if not isinstance(eval_dataset, (str, dict)):
            eval_dataset = repeated(eval_dataset, self.args.num_eval_generations)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_name = ""

    def _score_samples(self, inputs: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """pass@1 of evaluation samples."""
        if not self._eval_reward_funcs:
            return
        completion_ids = [
            ids[mask].tolist()
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
        ]
        texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        dtype = metric_dtype(self.accelerator.device)
        for name, rewards in score(self._eval_reward_funcs, inputs, texts, completion_ids, trainer_state=self.state):
            # Per sample, so that the samples that pad the last batch of several processes are not counted.
            gathered = self.accelerator.gather_for_metrics(rewards.to(self.accelerator.device, dtype))
            scored = gathered[~gathered.isnan()]
            self._ratios.add_global("eval", self._eval_name + name, scored.sum().item(), scored.numel())

    def evaluate_teacher(self) -> dict[str, float]:
        """pass@1 of the teacher on the trainer's evaluation set, from `num_eval_generations` samples per problem.

        Returns:
            The scores by name, `"pass@1"` among them, equal on all processes.

        Raises:
            DataError: when there is nothing to score against.
        """
        dataset = self.eval_dataset  # which holds each problem so many times:
        repeats = self.args.num_eval_generations
        if not isinstance(dataset, Dataset) or not self._eval_reward_funcs:
            raise DataError(
                "The teacher is evaluated on one map-style dataset with a `solution` or `answer` column, or with "
                f"`eval_reward_funcs`. Got {type(dataset).__name__}."
            )
        request = SamplingRequest(
            num_samples=repeats,
            max_tokens=int(TEACHER_TOKENS_PER_STUDENT_TOKEN * self.args.max_completion_length),
            temperature=self.args.teacher_temperature,
            top_p=self.args.teacher_top_p,
            seed=self.args.seed,
        )
        samples: list[tuple[str, float]] = []
        usage = Usage()
        replies: list[TeacherReply] = []
        error: Exception | None = None
        mine = range(self.accelerator.process_index, len(dataset) // repeats, self.accelerator.num_processes)
        if mine:
            examples = [dataset[problem * repeats] for problem in mine]
            prefixes = [Prefix(example["prompt"]) for example in examples]
            try:
                with self._recording():
                    asked = replies_of(self.teacher, prefixes, request)
                    replies = self._loop.run(with_meter(self._recorder.meter, asked))
            except Exception as caught:
                error = caught
            if not self.is_in_train:
                release(self.teacher, self._loop)
        raise_together(error, self.accelerator.process_index)
        if replies:
            usage = sum((reply.usage for reply in replies), usage)
            pairs = [(e, r.text) for e, reply in zip(examples, replies, strict=True) for r in reply.rollouts]
            if pairs:
                inputs, texts = (list(column) for column in zip(*pairs, strict=True))
                for name, rewards in score(self._eval_reward_funcs, inputs, texts, trainer_state=self.state):
                    samples.extend((name, reward) for reward in rewards.tolist())
        self.teacher_usage = sum(gather_object([usage]), self.teacher_usage)
        scores: dict[str, list[float]] = defaultdict(list)
        for name, reward in gather_object(samples):
            if reward == reward:  # not NaN
                scores[name].append(reward)
        return {name: sum(values) / len(values) for name, values in scores.items()}


async def _compute_on(device_index: int) -> None:
    torch.accelerator.set_device_index(device_index)


def _sum_and_count(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.sum(), values.new_tensor(values.numel())])


def _sampled_kl(log_ratio: torch.Tensor) -> torch.Tensor:
    """An estimate of `KL(ref || theta)` at each token that theta sampled, `(N,)`.

    With `r = ref / theta` at the sampled token, `E_theta[r log r - r + 1] = KL(ref || theta)`, and no term is
    negative. The exact value would project the student's audited tokens a second time.
    """
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off: the policy that samples, the one that is scored and the reference have none."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
