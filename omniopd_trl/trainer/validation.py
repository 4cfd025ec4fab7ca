# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the inputs before a model is loaded, and the parts of a trainer."""

from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from omniopd_trl.accounting.usage import Ledger
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import AuditSettings
from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, check_step_is_filled
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, DataError, NoRolloutError
from omniopd_trl.journal.reader import spent
from omniopd_trl.method.similarity import Similarity
from omniopd_trl.teachers import Teacher, TeacherOptions, load_teacher
from omniopd_trl.teachers.load import is_service
from omniopd_trl.trainer.distributed import warn_about_lost_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

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
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_dataset(dataset, name)
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
            f"No tokenizer can be loaded for the student {name!r}: it must be a folder with a saved model, or the id "
            f"of a model on the Hub. Check the path or the id, or pass `processing_class`. ({error})"
        ) from error


def _config_of(model: Any, args: OmniOPDConfig) -> PretrainedConfig:
    if not isinstance(model, str):
        return model.config
    return AutoConfig.from_pretrained(
        model,
        revision=(args.model_init_kwargs or {}).get("revision"),
        trust_remote_code=args.trust_remote_code,
    )


def context_length_of(model: Any, args: OmniOPDConfig) -> int | None:
    """Maximum number of positions of the student; `None` when its configuration does not state it."""
    return getattr(_config_of(model, args).get_text_config(), "max_position_embeddings", None)


def check_vllm_can_follow(model: Any, args: OmniOPDConfig, quantization_config: Any) -> None:
    """Check that the student's weights can be sent to vLLM after each step.

    Raises:
        ConfigError: when the student is quantized. Merging adapters into 4-bit weights rounds most of an update away,
            and each transfer would change the base model, which is the reference.
    """
    if not args.use_vllm:
        return
    held = getattr(_config_of(model, args), "quantization_config", None)
    if quantization_config is not None or held is not None:
        raise ConfigError(
            "use_vllm=True with a quantized student: its adapters would be merged into quantized weights for each "
            "transfer, which loses most of the update and changes the reference. Set use_vllm=False, or train LoRA on "
            "a student that is not quantized."
        )


def prepare_teacher(
    teacher: str | PreTrainedModel | Teacher, args: OmniOPDConfig, ledger: Ledger, datasets: Iterable[tuple[str, Any]]
) -> Teacher:
    """Load the teacher of a run and send it one question as a check.

    Args:
        teacher: a name, a model or a teacher.
        args: the configuration; `omniopd_trl/teachers/options.py` lists the options that each kind of teacher reads.
        ledger: ledger of the requests, paid and in flight.
        datasets: names and datasets; the question is the first prompt of the first dataset. The next prompts are tried
            if the teacher returns nothing for it.

    Raises:
        ConfigError: when an option has no effect with this teacher.
        DataError: when a model cannot be loaded, or cannot render the question.
        JournalError: when the spending of earlier runs cannot be read from the journal.
        TeacherError: when the teacher does not answer.
    """
    paid = spent(args.output_dir) if is_service(teacher) else None
    prepared = load_teacher(teacher, TeacherOptions.of(args), paid)
    if prepared.budget is not None:
        prepared.budget.ledger = ledger
    for _, dataset in islice(datasets, 1):
        _probe(prepared, [row["prompt"] for row in islice(dataset, PROBE_PROMPTS)])
    return prepared


def _probe(teacher: Teacher, prompts: list[Any]) -> None:
    """Ask the teacher one question. Where it refuses to continue a prompt, it is asked with the next one."""
    for index, prompt in enumerate(prompts, start=1):
        try:
            return teacher.probe(prompt)
        except NoRolloutError as error:
            if index == len(prompts):
                raise
            logger.warning(f"{error} It is asked again, with another prompt of the dataset.")
