# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the baselines share: TRL's trainer of a method, evaluated and recorded as a run of OmniOPD is."""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl import DistillationConfig

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.models.growing_cache import growing_cache
from omniopd_trl.teachers import Prefix, SamplingRequest, Teacher, TeacherReply
from omniopd_trl.teachers.options import READ_BY
from omniopd_trl.trainer.callbacks import OnTrainBegin
from omniopd_trl.trainer.checkpoints import EndsAtLastStep, resume_point
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer
from omniopd_trl.trainer.progress import use_readable_lines
from omniopd_trl.trainer.recording import publishable

logger = logging.get_logger(__name__)

# Options of OmniOPD that a baseline uses too: they control the evaluation and the journal.
_OF_THE_EVALUATION = (
    *("ref_model_init_kwargs", "ref_model_offload", "save_audits", "num_eval_generations", "eval_lenient_answers"),
)
_OF_THE_VERIFIER = ("num_generations", "reward_weight", "reward_weights", "audit_trajectories")
# When and on what an evaluation runs. TRL's trainers would ask for an evaluation set of their own.
_SCHEDULE = ("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
# What completes DeepSpeed's configuration, by the first trainer of a process for all of them.
_OF_DEEPSPEED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "learning_rate"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "fp16", "bf16", "save_on_each_node"),
)


class NoTeacher(Teacher):
    """Stands for the teacher of a run that asks none."""

    name = "none"

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        raise TeacherError("This run has no teacher to ask: its method needs none, and evaluate_teacher is off.")


class Evaluator(OmniOPDTrainer):
    """Evaluates the student of another trainer: the same code, sampling and metrics as in a run of OmniOPD.

    Args:
        method: name of the method that trains the student.
        teacher: name of the teacher; `None` for a run that asks none.
        args: configuration of the run. It is not changed.
        training: configuration of the other trainer, a [`Baseline`], which has to be made after this one. Its
            DeepSpeed configuration is that of the process.
        own_engine: whether to create a vLLM engine for `use_vllm`. Otherwise that of the other trainer is used.
        **kwargs: other arguments of [`OmniOPDTrainer`].
    """

    def __init__(
        self,
        method: str,
        teacher: str | None,
        args: OmniOPDConfig,
        training: TrainingArguments,
        *,
        own_engine: bool,
        **kwargs: Any,
    ):
        args = copy.copy(args)
        if training.deepspeed_plugin is not None:
            for name in _OF_DEEPSPEED:
                setattr(args, name, getattr(training, name))
            args.deepspeed_plugin = training.deepspeed_plugin
            if training.deepspeed:  # from the recipe, and not from the launcher: already completed
                args.hf_deepspeed_config = training.hf_deepspeed_config
        args.audit_eval = False
        args.similarity = OmniOPDConfig.similarity  # another one may load a model
        args.use_vllm = args.use_vllm and own_engine
        for name in _OF_THE_VERIFIER:  # they control training
            setattr(args, name, default_of(name))
        if teacher is None:
            for name in READ_BY:  # limits of a teacher that is not there cannot be kept
                setattr(args, name, default_of(name))
        self._settings: dict[str, Any] = {"method": method}
        super().__init__(args=args, teacher_model=NoTeacher() if teacher is None else teacher, **kwargs)
        training._n_gpu = args.n_gpu  # one at most

    def _replay_key(self) -> dict[str, Any]:
        return self._settings

    def follow(self, trainer: Trainer) -> None:
        """Take over the state of the other trainer: step, callbacks, and the student as its back end wraps it."""
        self.state, self.control, self.callback_handler = trainer.state, trainer.control, trainer.callback_handler
        self.accelerator, self.deepspeed = trainer.accelerator, trainer.deepspeed
        self.model, self.model_wrapped = trainer.model, trainer.model_wrapped
        self.is_in_train = trainer.is_in_train
        self._total_train_tokens = trainer._total_train_tokens
        if getattr(trainer, "use_vllm", False):
            self.use_vllm, self.vllm_mode, self.vllm_generation = True, trainer.vllm_mode, trainer.vllm_generation
            self._last_loaded_step = -1

    def recording(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Context with an open journal, if `save_audits` is set, for settings and logs of the other trainer."""
        self._settings |= {"student": self.model.config._name_or_path, "teacher": self.teacher.name}
        self._settings |= trainer.args.to_sanitized_dict()
        return self._recording()

    def record(self, logs: Mapping[str, Any], usage: Usage, usd: float) -> None:
        """Write an entry of the other trainer's log to the journal, and what its teacher has used since the last one.

        Args:
            logs: the entry.
            usage: tokens, over all processes.
            usd: their cost in US dollars; 0 without a price.
        """
        if self.accelerator.is_main_process:
            self._recorder.log(logs)
            if usage != Usage():
                self._recorder.paid(usage, usd or None)


class Baseline(EndsAtLastStep):
    """Mixin for a trainer of TRL: evaluation and records are those of an [`Evaluator`] with the same student.

    `train`, `evaluate`, `evaluate_teacher` and `log` work as those of [`OmniOPDTrainer`].

    Attributes:
        method: name of the method.
        evaluator: evaluates the student, after [`adopt`].
        teacher_usage: tokens of the teacher that the method has used so far, over all processes.
        teacher_dollars: their cost in US dollars, of this run and with earlier ones; `None` without a price.
    """

    method: ClassVar[str]
    evaluator: Evaluator
    teacher_usage = Usage()
    teacher_dollars: tuple[float, float] | None = None

    def adopt(self: Any, evaluator: Evaluator) -> None:
        """Evaluate with `evaluator`, at the times that its configuration sets."""
        self.evaluator = evaluator
        self.eval_dataset = evaluator.eval_dataset
        for name in _SCHEDULE:
            setattr(self.args, name, getattr(evaluator.args, name))
        self.add_callback(OnTrainBegin(self._begin))
        use_readable_lines(self)

    def _build_accelerator_args(self: Any, **kwargs: Any) -> dict[str, Any]:
        # Accelerate takes DeepSpeed's plugin once in a process, from the evaluator.
        return {**super()._build_accelerator_args(**kwargs), "deepspeed_plugin": None}  # type: ignore[misc]

    def _begin(self: Any) -> None:
        step = self.state.global_step  # of the checkpoint of a resumed run
        self._logged = (step, *self.cost_until(step))  # of the last entry of the log

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the student, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint: `True` continues from the last checkpoint in `output_dir`, or from step 0 if there
                is none yet; a path continues from that checkpoint. Otherwise the run starts over.

        Raises:
            DataError: for `True`, when `output_dir` holds neither a checkpoint nor a journal.
        """
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = resume_point(resume_from_checkpoint, str(self.args.output_dir))
        with self.evaluator.recording(self):
            return super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Evaluate the student, as [`OmniOPDTrainer`] does.

        Raises:
            ConfigError: before `train` under DeepSpeed and FSDP.
        """
        if self.evaluator.objective.is_sharded and self.optimizer is None:
            raise ConfigError(
                "evaluate() was called before train(), and DeepSpeed and FSDP prepare the student when training "
                "begins. Set eval_on_start=True."
            )
        self.evaluator.follow(self)
        metrics = self.evaluator.evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.control = self.evaluator.control
        return metrics

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        student = self.accelerator.unwrap_model(self.model)
        with publishable(self.args, self.evaluator.objective.reference, student):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def evaluate_teacher(self: Any) -> dict[str, float]:
        """Evaluate pass@1 of the teacher, as [`OmniOPDTrainer.evaluate_teacher`] does."""
        self.evaluator.follow(self)
        return self.evaluator.evaluate_teacher()

    @growing_cache()
    def _generate(self: Any, prompts: list[Any]) -> Any:
        return super()._generate(prompts)  # type: ignore[misc]

    def cost_until(self, step: int) -> tuple[Usage, float]:
        """Tokens and US dollars of the teacher for the first `step` steps."""
        return self.teacher_usage, 0.0

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, with the teacher's under the names that a run of OmniOPD has."""
        (before, used, spent), step = self._logged, self.state.global_step
        new, usd = Usage(), 0.0
        if step > before:
            usage, total = self.cost_until(step)
            self._logged = (step, usage, total)
            new = Usage(
                prompt_tokens=usage.prompt_tokens - used.prompt_tokens,
                completion_tokens=usage.completion_tokens - used.completion_tokens,
            )
            usd = total - spent
            logs["teacher/prompt_tokens"] = new.prompt_tokens / (step - before)
            logs["teacher/completion_tokens"] = new.completion_tokens / (step - before)
            if total:
                logs["teacher/usd"], logs["teacher/usd_total"] = usd / (step - before), total
        super().log(logs, start_time)  # type: ignore[misc]
        if self.state.log_history:
            self.evaluator.record(self.state.log_history[-1], new, usd)


def default_of(name: str) -> Any:
    """The default of a field of `OmniOPDConfig`."""
    field = OmniOPDConfig.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def config_of(
    kind: type[TrainingArguments],
    args: OmniOPDConfig,
    section: Mapping[str, Any],
    *,
    unlike: Collection[str] = (),
    **defaults: Any,
) -> Any:
    """The configuration of TRL's trainer of a method.

    Args:
        kind: class of the configuration.
        args: configuration of the run. Fields of the same name are taken over.
        section: options of the method, which override the others.
        unlike: fields that have the same name in `args` and another meaning.
        **defaults: values that differ from TRL's or from those of `args`.
    """
    names = {field.name for field in fields(kind) if field.init}
    shared = {name: getattr(args, name) for name in names & OmniOPDConfig.__dataclass_fields__.keys() - set(unlike)}
    # The student is passed as an instance. When to evaluate is set later: see `adopt`.
    theirs = {"model_init_kwargs": None, "eval_strategy": "no"}
    off = {"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}
    return kind(**{**shared, **theirs, **off, **defaults, **section})


def unused_options(kind: type[TrainingArguments], args: OmniOPDConfig, *, asks: bool) -> list[str]:
    """The options that are set and have no effect on a method: those of OmniOPD alone, and those of its teacher.

    Args:
        kind: class of TRL's configuration of the method.
        args: configuration of the run.
        asks: whether a teacher is used.
    """
    known = {field.name for field in fields(kind)} | set(_OF_THE_EVALUATION)
    own = OmniOPDConfig.__dataclass_fields__.keys() - DistillationConfig.__dataclass_fields__.keys() - known
    teachers = {name for name in OmniOPDConfig.__dataclass_fields__ if name.startswith("teacher_")}
    names = own - teachers if asks else own | teachers
    return sorted(name for name in names | {"beta"} if _is_set(getattr(args, name), default_of(name)))


def _is_set(value: Any, default: Any) -> bool:
    if isinstance(value, dict) and all(entry is None for entry in value.values()):
        return False  # entries that the command leaves at `None`
    return bool(value != default)
