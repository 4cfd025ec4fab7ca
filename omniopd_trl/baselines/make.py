# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer of a baseline, from the options of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from omniopd_trl.baselines.base import Baseline, Evaluator, config_of, unused_options
from omniopd_trl.baselines.grpo import GRPO, with_same_prompts
from omniopd_trl.baselines.opd import OPD, check_teacher
from omniopd_trl.baselines.sft import SFT, load_solutions
from omniopd_trl.errors import ConfigError, OmniOPDError, first_line
from omniopd_trl.evals.rewards import RewardSource
from omniopd_trl.teachers.local import LocalTeacher
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.verifier import training_rewards

logger = logging.get_logger(__name__)

TRAINERS: dict[str, Any] = {trainer.method: trainer for trainer in (SFT, OPD, GRPO)}


def make_baseline(
    method: str,
    *,
    model: str,
    args: OmniOPDConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    section: Mapping[str, Any] | None = None,
    solutions: str | None = None,
    reward_funcs: list[RewardSource] | None = None,
    evaluate_teacher: bool = False,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> Baseline:
    """The trainer of a baseline.

    Data and settings are checked before a model is loaded.

    Args:
        method: `"sft"`, `"opd"` or `"grpo"`.
        model: path or id of the student.
        args: configuration of the run. The method takes over the options that TRL's configuration has under the same
            name, with the same meaning.
        train_dataset: prompts of the run. GRPO's rewards get its other columns.
        eval_dataset: evaluation set of the run.
        section: options of TRL's configuration of the method, which override those of `args`.
        solutions: see [`load_solutions`]. Defaults to `solutions` in `args.output_dir`.
        reward_funcs: functions that score answers, in the evaluation and in GRPO. `None` for math-verify.
        evaluate_teacher: whether the teacher will be evaluated. Otherwise SFT and GRPO load and ask none.
        quantization_config: quantization of the student.
        peft_config: adapter of the student.

    Raises:
        ConfigError: when the method cannot be used with these settings.
        DataError: when there are no solutions for SFT.
    """
    section = section or {}
    is_sharded = is_deepspeed_zero3_enabled() or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    trainer_class, teacher = TRAINERS[method], args.teacher_model_name_or_path
    special: dict[str, Any] = {"train_dataset": train_dataset}
    defaults: dict[str, Any] = {}
    data = None
    if method == "sft":
        data = load_solutions(solutions or Path(args.output_dir, "solutions"), args.chat_template_kwargs)
        special["train_dataset"] = data.dataset
        defaults = {"max_length": None}  # TRL would cut solutions at 1,024 tokens
    elif method == "opd":
        if evaluate_teacher and is_sharded:
            raise ConfigError(
                "method='opd' splits its teacher over the processes under ZeRO-3 and FSDP, and evaluate_teacher "
                "samples from a teacher in each of them. Set evaluate_teacher=False, and use `omniopd eval`."
            )
        check_teacher(model, teacher, args)
        defaults = {"beta": 0.5}
    else:
        special["reward_funcs"] = training_rewards(reward_funcs, train_dataset, args, "method='grpo'").functions
        defaults = with_same_prompts(args, section)
    asks = method == "opd" or evaluate_teacher
    if args.process_index == 0:
        _log_unused(method, unused_options(trainer_class.config, args, asks=asks))
    with _Explained(method):
        config = config_of(trainer_class.config, args, section, unlike=trainer_class.unlike, **defaults)
    evaluator = Evaluator(
        method,
        teacher if asks else None,
        args,
        config,
        own_engine=method == "sft",
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config,
        peft_config=peft_config,
        eval_reward_funcs=reward_funcs,
    )
    if method == "opd":
        assert isinstance(evaluator.teacher, LocalTeacher)
        special["teacher_model"] = evaluator.teacher.model
    with _Explained(method):
        trainer = trainer_class(
            model=evaluator.model, args=config, processing_class=evaluator.processing_class, **special
        )
    if data is not None:
        trainer.teacher_usage = data.usage
        trainer.teacher_dollars = (data.usd, data.usd) if data.usd else None
    trainer.adopt(evaluator)
    return trainer


def _log_unused(method: str, names: list[str]) -> None:
    if names:
        logger.warning(f"method={method!r}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} without effect.")


class _Explained:
    """Context in which errors of TRL's checks are raised as `ConfigError`."""

    def __init__(self, method: str):
        self._method = method

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and not isinstance(error, OmniOPDError):
            raise ConfigError(
                f"method={self._method!r} cannot be used with these settings: {first_line(error)}"
            ) from error
