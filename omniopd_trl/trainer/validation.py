# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer is made of, and what is looked at before anything expensive starts."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from datasets import IterableDataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from omniopd_trl.accounting.usage import Ledger
from omniopd_trl.audits.event_loop import EventLoopThread
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.journal.reader import spent
from omniopd_trl.teachers import Teacher, TeacherOptions, load_teacher
from omniopd_trl.teachers.load import is_service
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)


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


def prepare_teacher(
    teacher: str | PreTrainedModel | Teacher, args: OmniOPDConfig, ledger: Ledger, datasets: Iterable[tuple[str, Any]]
) -> Teacher:
    """The teacher of a run, after it has answered one question.

    Args:
        teacher: a name, a model or a teacher.
        args: the configuration; `omniopd_trl/teachers/options.py` says which teacher reads which of its options.
        ledger: where the question is counted, and what is in flight.
        datasets: the first one has the question.

    Raises:
        ConfigError: when an option cannot be kept by this teacher.
        DataError: when a model cannot be loaded, or cannot render the question.
        JournalError: when it cannot be read what earlier runs have spent.
        TeacherError: when it does not answer.
    """
    paid = spent(args.output_dir) if is_service(teacher) else None
    prepared = load_teacher(teacher, TeacherOptions.of(args), paid)
    if prepared.budget is not None:
        prepared.budget.ledger = ledger
    for _, dataset in islice(datasets, 1):
        prepared.probe(next(iter(dataset))["prompt"])
    return prepared


def release(teacher: Teacher, loop: EventLoopThread) -> None:
    """Close a teacher's connections in the loop that they belong to. It can be asked again afterwards.

    What is in flight there is cancelled. A teacher that cannot be closed is no reason to lose what was trained.
    """
    loop.cancel()
    try:
        loop.run(teacher.aclose())
    except Exception as error:
        logger.warning(f"The teacher {teacher.name} could not be closed ({type(error).__name__}: {error}).")
