# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer is made of, and what is looked at before anything expensive starts."""

from dataclasses import fields
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import price_of
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import AuditSettings
from omniopd_trl.data.checks import check_dataset, check_prompt_lengths, check_step_is_filled
from omniopd_trl.data.datasets import named_datasets
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.reader import spent
from omniopd_trl.method.similarity import Similarity
from omniopd_trl.teachers import Teacher, load_teacher
from omniopd_trl.teachers.load import remote_teacher, split_name, suggest_name
from omniopd_trl.teachers.options import check_options
from omniopd_trl.teachers.providers.capabilities import MODELS
from omniopd_trl.teachers.providers.openai import is_ones_own
from omniopd_trl.teachers.remote.engine import Continuation, EngineSettings
from omniopd_trl.trainer.distributed import warn_about_lost_processes
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


def check_inputs(
    model: Any,
    args: OmniOPDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
) -> PreTrainedTokenizerBase:
    """Look at everything that can be wrong before a model is loaded.

    Returns:
        The student's tokenizer, loaded when it is `None`.

    Raises:
        ConfigError: when settings contradict each other, the data or the student.
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
    """The auditor that the configuration asks for; `similarity` is what `get_similarity` returns."""
    settings = AuditSettings(**{f.name: getattr(args, f.name) for f in fields(AuditSettings)})
    return Auditor(teacher, tokenizer, settings, similarity)


def repeated(dataset: Any, num_samples: int) -> Any:
    """Each example `num_samples` times in a row.

    The dataset is repeated and not the sampler: how many samples of the last batch are padding, with several
    processes, is reckoned from the length of the dataset.
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
    """Positions that the student was made for; `None` when its configuration does not say."""
    return getattr(_config_of(model, args).get_text_config(), "max_position_embeddings", None)


def check_vllm_can_follow(model: Any, args: OmniOPDConfig, quantization_config: Any) -> None:
    """Whether vLLM can be given the weights of the student after each step.

    Raises:
        ConfigError: when the student is quantized. Merged into 4 bits, most of what a step changes is rounded away,
            and the base model, which is the reference, moves with each transfer.
    """
    if not args.use_vllm:
        return
    held = getattr(_config_of(model, args), "quantization_config", None)
    if quantization_config is not None or held is not None:
        raise ConfigError(
            "use_vllm=True with a quantized student: its adapters would be merged into quantized weights for each "
            "transfer, which loses what was learnt and moves the reference. Set use_vllm=False, or train LoRA on a "
            "student that is not quantized."
        )


def make_teacher(teacher: str | PreTrainedModel | Teacher, args: OmniOPDConfig) -> Teacher:
    """The teacher that the configuration asks for.

    Args:
        teacher: a name, a model or a teacher.
        args: the configuration; which of its options a teacher reads stands in `omniopd_trl/teachers/options.py`.

    Raises:
        ConfigError: when an option cannot be kept by this teacher.
        DataError: when a model cannot be loaded.
    """
    kind, name = _kind_of(teacher)
    check_options(kind, name, args)
    template = args.teacher_chat_template_kwargs
    # The student's are for a template. A closed service has none that takes them: it may refuse the whole request.
    ours = kind == "local" or (kind in ("vllm", "openai") and is_ones_own(kind, args.teacher_base_url))
    if template is None and ours:
        template = args.chat_template_kwargs
    # `__post_init__` has parsed what the command line gives as JSON.
    template = cast("dict[str, Any] | None", template)
    if not isinstance(teacher, str) or kind not in MODELS:
        try:
            return load_teacher(
                teacher,
                model_init_kwargs=args.teacher_model_init_kwargs,
                revision=args.teacher_model_revision,
                trust_remote_code=args.trust_remote_code,
                chat_template_kwargs=template,
                device=args.device,
            )
        except DataError as error:
            meant = suggest_name(teacher) if isinstance(teacher, str) else None
            if meant is None:
                raise
            hint = f"A model behind a service has its provider first: did you mean {meant!r}?"
            raise DataError(f"{error} {hint}") from error
    provider, _, model = name.partition(":")
    price = price_of(
        provider,
        model,
        input_price=args.teacher_input_price,
        output_price=args.teacher_output_price,
        cached_price=args.teacher_cached_price,
        base_url=args.teacher_base_url,
    )
    used, usd = spent(args.output_dir)
    # Limits are for the whole job, and every process keeps its share of them. No share lets a part of a request
    # through: each process would send one, and all of them together more than the limit.
    for option in ("teacher_max_concurrency", "teacher_requests_per_minute", "teacher_tokens_per_minute"):
        limit, default = getattr(args, option), type(args).__dataclass_fields__[option].default
        if limit != default and limit < args.world_size > 1:
            raise ConfigError(
                f"{option}={limit:g} cannot be kept: it is divided over the {args.world_size} processes of the job, "
                f"and each needs at least 1. Raise it to {args.world_size} or more, or train with fewer processes."
            )
    share = 1 / args.world_size
    return remote_teacher(
        name,
        base_url=args.teacher_base_url,
        tokenizer=args.teacher_tokenizer_name_or_path,
        continuation=cast("Continuation | None", args.teacher_continuation),
        chat_template_kwargs=template,
        settings=EngineSettings(
            max_concurrency=max(1, args.teacher_max_concurrency // args.world_size),
            requests_per_minute=args.teacher_requests_per_minute and args.teacher_requests_per_minute * share,
            tokens_per_minute=args.teacher_tokens_per_minute and args.teacher_tokens_per_minute * share,
            timeout=args.teacher_timeout,
            max_attempts=args.teacher_max_attempts,
            max_seconds=args.teacher_max_seconds,
            max_retry_after=args.teacher_max_retry_after,
        ),
        budget=Budget(
            args.teacher_budget_usd,
            args.teacher_budget_tokens,
            price,
            used,
            usd,
            num_processes=args.world_size,
        ),
    )


def _kind_of(teacher: str | PreTrainedModel | Teacher) -> tuple[str, str]:
    """The kind of a teacher, as `check_options` knows it, and its name."""
    if isinstance(teacher, Teacher):
        return "own", getattr(teacher, "name", type(teacher).__name__)
    if not isinstance(teacher, str):
        return "local", get_config_model_id(teacher.config)
    parts = split_name(teacher)
    if parts is not None:
        return parts[0], ":".join(parts)
    return ("scripted" if teacher == "scripted" else "local"), teacher
