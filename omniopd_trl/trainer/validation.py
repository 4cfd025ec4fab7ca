# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the inputs before a model is loaded, and the parts of a trainer."""

import re
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from omniopd_trl.accounting.usage import Ledger, Usage
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import AuditSettings
from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, check_step_is_filled, prompts_per_step
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.data.encoding import special_tokens_of_answers
from omniopd_trl.errors import ConfigError, DataError, NoRolloutError, find_extra, first_line
from omniopd_trl.journal.reader import merge, spent_by_journal
from omniopd_trl.method.similarity import Similarity
from omniopd_trl.models.loading import why_not_loaded
from omniopd_trl.teachers import Teacher, TeacherOptions, load_teacher
from omniopd_trl.teachers.context import NO_CONTEXT, TeacherContext
from omniopd_trl.teachers.instruct.judge import Passage, render_question
from omniopd_trl.teachers.load import is_service
from omniopd_trl.trainer.distributed import on_every_process, warn_about_lost_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig
from omniopd_trl.trainer.startup import check_student_config, check_tokenizer

logger = logging.get_logger(__name__)

# Prompts that the teacher is asked with at the start, when it returns nothing for the ones before.
PROBE_PROMPTS = 3


def check_inputs(
    model: Any,
    args: OmniOPDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
) -> PreTrainedTokenizerBase:
    """Check the settings, the data and the student's configuration before a model is loaded.

    Returns:
        The student's tokenizer, which is loaded when `processing_class` is `None`.

    Raises:
        ConfigError: when settings contradict each other, or do not fit the data or the student.
        DataError: when the data cannot be used.
        MissingExtraError: when an optional dependency is not installed.
    """
    warn_about_lost_processes(args.world_size)
    check_reporting(args)
    check_optimizer(args)
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_dataset(dataset, name)
        if dataset is train_dataset or args.audit_eval:
            args.teacher_context.check(dataset, name)
    config = config_of(model, args)
    processing_class = processing_class or load_tokenizer(model, args)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class is a {type(processing_class).__name__}, but only text is supported yet. Pass the "
            "tokenizer."
        )
    check_student_config(model, config, args)
    check_tokenizer(processing_class, config)
    warn_about_special_tokens(processing_class, args)
    check_vllm_can_follow(config, args, quantization_config)
    context_length = context_length_of(config)
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
            vocab_size=getattr(config.get_text_config(), "vocab_size", None),
        )
    if isinstance(train_dataset, IterableDataset) and args.data_seed is not None:
        raise ConfigError(
            f"data_seed={args.data_seed} has no effect on a streaming dataset, which is shuffled with `seed`. Leave "
            "it out."
        )
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    prompts_per_step(*sizes, args.num_generations)
    if isinstance(train_dataset, Dataset):
        check_step_is_filled(len(train_dataset), *sizes, args.num_generations)
    return processing_class


def make_auditor(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig, similarity: Similarity
) -> Auditor:
    """The auditor with the settings of the configuration; `similarity` is a result of `get_similarity`."""
    settings = AuditSettings(**{f.name: getattr(args, f.name) for f in fields(AuditSettings)})
    return Auditor(teacher, tokenizer, settings, similarity)


def repeated(dataset: Any, num_samples: int) -> Any:
    """The dataset, or each of a `dict` of datasets, with each example `num_samples` times in a row.

    The dataset is repeated and not the sampler, since accelerate computes from the length of the dataset how many
    samples of the last batch are padding.
    """
    if num_samples == 1 or dataset is None:
        return dataset
    if isinstance(dataset, dict):
        return {name: repeated(part, num_samples) for name, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        return repeat_iterable_dataset(dataset, mini_repeat_count=num_samples)
    return dataset.select([row for row in range(len(dataset)) for _ in range(num_samples)])


def check_reporting(args: OmniOPDConfig) -> None:
    """Create the integrations that `report_to` names once, as the base class does after it has loaded the student.

    Raises:
        ConfigError: when there is no such integration, or its package is not installed.
    """
    try:
        for integration in get_reporting_integration_callbacks(args.report_to):
            integration()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"report_to={args.report_to!r} cannot be used: {first_line(error)} Otherwise leave it out of `report_to`."
        ) from error


def check_optimizer(args: OmniOPDConfig) -> None:
    """Check the package of an optimizer of bitsandbytes, which is otherwise missed when training begins.

    Raises:
        MissingExtraError: when it is not installed.
    """
    if re.match(r"paged_|\w*bnb|(adamw|lion|ademamix)_(8|32)bit|ademamix", args.optim):
        find_extra("bitsandbytes", "bitsandbytes")


def load_tokenizer(model: Any, args: OmniOPDConfig) -> PreTrainedTokenizerBase:
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"No tokenizer can be loaded for the student {name!r}: {why_not_loaded(name, error)} Or pass "
            "`processing_class`."
        ) from error


def config_of(model: Any, args: OmniOPDConfig) -> PretrainedConfig:
    """Configuration of the student, without its weights.

    Raises:
        ConfigError: when the student is neither a name nor a model.
        DataError: when there is no model of this name.
    """
    if not isinstance(model, str):
        if not isinstance(getattr(model, "config", None), PretrainedConfig):
            raise ConfigError(
                f"model={model!r:.100} is a {type(model).__name__}; it must be the path of a model, an id on the Hub, "
                "or an instance of a `transformers` model. For a `Path`, pass `str(path)`."
            )
        return model.config
    try:
        return AutoConfig.from_pretrained(
            model,
            revision=(args.model_init_kwargs or {}).get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"The student {model!r} cannot be loaded: {why_not_loaded(model, error)}") from error


def context_length_of(config: PretrainedConfig) -> int | None:
    """Maximum number of positions of the student; `None` when its configuration does not state it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def warn_about_special_tokens(tokenizer: PreTrainedTokenizerBase, args: OmniOPDConfig) -> None:
    """Say that the teacher does not get special tokens that the student writes into its answers."""
    if args.keep_special_tokens or tokenizer.chat_template is None or args.process_index != 0:
        return
    tokens = special_tokens_of_answers(tokenizer, args.chat_template_kwargs)
    if tokens:
        logger.warning(
            f"The student's chat template puts the special tokens {', '.join(tokens)} into answers, and the teacher "
            "gets the student's text without them. Set keep_special_tokens=True if the teacher is of the same family "
            "and knows them."
        )


def check_vllm_can_follow(config: PretrainedConfig, args: OmniOPDConfig, quantization_config: Any) -> None:
    """Check that the student's weights can be sent to vLLM after each step.

    Raises:
        ConfigError: when the student is quantized. Merging adapters into 4-bit weights rounds most of an update away,
            and each transfer would change the base model, which is the reference.
    """
    if not args.use_vllm:
        return
    held = getattr(config, "quantization_config", None)
    if quantization_config is not None or held is not None:
        raise ConfigError(
            "use_vllm=True with a quantized student: its adapters would be merged into quantized weights for each "
            "transfer, which loses most of the update and changes the reference. Set use_vllm=False, or train LoRA on "
            "a student that is not quantized."
        )


def spent_before(teacher: str | PreTrainedModel | Teacher, args: OmniOPDConfig) -> tuple[Usage, float] | None:
    """What all processes of earlier runs have paid, also when machines share no folder.

    Every process has to call it at the same point.

    Returns:
        Tokens and US dollars; `None` when the teacher is not a service. Journals of an earlier run may be missing,
        on a machine that takes no part: a warning says so.

    Raises:
        JournalError: on every process, when the journal of one cannot be read.
    """
    if not is_service(teacher):
        return None
    paid = merge(on_every_process(lambda: spent_by_journal(args.output_dir), args.process_index))
    expected = max((one.num_processes for one in paid), default=0)
    missing = sorted(set(range(expected)) - {one.rank for one in paid})
    if missing and args.process_index == 0:
        logger.warning(
            f"An earlier run of {expected} processes has written to output_dir={str(args.output_dir)!r}, and the "
            f"journals of processes {', '.join(map(str, missing))} are not there: what these paid is not counted in a "
            "budget. Put `output_dir` on a file system that all machines share, or copy `_audits` from the other "
            "machines."
        )
    return sum((one.usage for one in paid), Usage()), sum(one.usd for one in paid)


def prepare_teacher(
    teacher: str | PreTrainedModel | Teacher,
    args: OmniOPDConfig,
    ledger: Ledger,
    paid: tuple[Usage, float] | None = None,
) -> Teacher:
    """Load the teacher of a run. Sends no request.

    Args:
        teacher: a name, a model or a teacher.
        args: the configuration; `omniopd_trl/teachers/options.py` lists the options that each kind of teacher reads.
        ledger: ledger of the requests, paid and in flight.
        paid: what earlier runs have paid, from [`spent_before`].

    Raises:
        ConfigError: when an option has no effect with this teacher.
        DataError: when a model cannot be loaded.
    """
    prepared = load_teacher(teacher, TeacherOptions.of(args), paid)
    if prepared.budget is not None:
        prepared.budget.ledger = ledger
    return prepared


def check_prompts(
    teacher: Teacher,
    datasets: Iterable[tuple[str, Any]],
    context: TeacherContext = NO_CONTEXT,
    *,
    signal: str = "rollouts",
) -> None:
    """Check that a teacher can render every prompt of the map-style datasets, without asking it.

    Args:
        teacher: the teacher.
        datasets: the datasets with their names.
        context: what only the teacher sees. An evaluation set need not have it.
        signal: what the teacher is asked for. A judge renders a question about a prompt, and has to have a chat
            template. All questions have the same two turns.

    Raises:
        DataError: when it cannot, with the row.
    """
    if type(teacher).check_prompt is Teacher.check_prompt:
        return
    if signal != "rollouts":
        teacher.check_prompt(render_question("", [Passage("", "", ("",))]))
    if signal == "judge":
        return
    for name, dataset in datasets:
        if isinstance(dataset, Dataset):
            seen = context if context.column in dataset.column_names else NO_CONTEXT
            columns = ["prompt"] if seen.column is None else ["prompt", seen.column]
            for index, row in enumerate(dataset.select_columns(columns)):
                try:
                    teacher.check_prompt(seen.prompt(row))
                except DataError as error:
                    raise DataError(f"Row {index} of `{name}`: {error}") from error


def probe_teacher(teacher: Teacher, datasets: Iterable[tuple[str, Any]], context: TeacherContext = NO_CONTEXT) -> None:
    """Send the teacher one question as a check: the first prompt of the first dataset.

    If the teacher returns nothing for a prompt, it is asked with the next one, `PROBE_PROMPTS` in all. `context` is
    what only the teacher sees.

    Raises:
        DataError: when the teacher cannot render the question.
        TeacherError: when the teacher does not answer.
    """
    for _, dataset in islice(datasets, 1):
        prompts = [context.prompt(row) for row in islice(dataset, PROBE_PROMPTS)]
        for index, prompt in enumerate(prompts, start=1):
            try:
                teacher.probe(prompt)
            except NoRolloutError as error:
                if index == len(prompts):
                    raise
                logger.warning(f"{error} It is asked again, with another prompt of the dataset.")
            else:
                break
