# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of a dataset before training."""

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, Image, IterableDataset
from transformers import PreTrainedTokenizerBase

from omniopd_trl.data.datasets import column_names
from omniopd_trl.data.encoding import PromptError, encode_prompts, prompt_problem
from omniopd_trl.data.prompts import MESSAGES_COLUMN, QUESTION_COLUMNS
from omniopd_trl.errors import ConfigError, DataError

_UNSUPPORTED_COLUMNS = ("image", "images", "tools")


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Refuse a dataset that the trainer cannot use.

    Every prompt of a map-style dataset is checked, and only the first one of a streaming dataset.

    Args:
        dataset: a dataset.
        name: name of the dataset in messages.

    Raises:
        DataError: when it is no dataset or several, is empty, has no `prompt` column, holds images or tools, or a
            prompt is neither text nor a list of messages that a model can answer.
    """
    if isinstance(dataset, Mapping):
        split = next(iter(dataset), "train")
        raise DataError(
            f"`{name}` holds several datasets ({', '.join(map(repr, dataset))}), and one is needed. Pass one of them: "
            f"`{name}=splits[{split!r}]`."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"`{name}` is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`. "
            f"Make one from a list of rows: `{name}=datasets.Dataset.from_list(rows)`."
        )

    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise DataError(f"`{name}` is empty. Training and evaluation need at least one row with a `prompt`.")
    if "prompt" not in columns:
        usable = [column for column in (*QUESTION_COLUMNS, MESSAGES_COLUMN) if column in columns]
        if usable:
            template = "" if usable[0] == MESSAGES_COLUMN else ", 'math'"
            call = f"omniopd_trl.data.prepare_prompts(dataset{template})"
            advice = f"It has `{usable[0]}`: turn it into prompts with `{call}`."
        else:
            advice = "Rename the column that holds the question to `prompt` (text, or a list of messages)."
        raise DataError(f"`{name}` has no `prompt` column (it has: {', '.join(columns)}). {advice}")
    features = dataset.features or {}
    for column in columns:
        if column in _UNSUPPORTED_COLUMNS or isinstance(features.get(column), Image):
            raise DataError(
                f"`{name}` has a column `{column}`: images and tools are not supported yet, prompts are text only. "
                f"Remove it with `dataset.remove_columns({column!r})` if the text alone is enough."
            )

    rows: Iterator[dict[str, Any]]
    if isinstance(dataset, Dataset):
        rows = iter(dataset.select_columns("prompt"))
    else:
        rows = islice(dataset, 1)
    for index, row in enumerate(rows):
        problem = prompt_problem(row["prompt"])
        if problem is not None:
            raise DataError(f"Row {index} of `{name}`: {problem}")


def prompts_per_step(batch_size: int, accumulation_steps: int, num_processes: int, num_generations: int) -> int:
    """Prompts of one optimizer step.

    Args:
        batch_size: `per_device_train_batch_size`.
        accumulation_steps: `gradient_accumulation_steps`.
        num_processes: processes of the run.
        num_generations: trajectories per prompt.

    Raises:
        ConfigError: when the trajectories of a step do not fill whole groups.
    """
    trajectories = batch_size * accumulation_steps * num_processes
    if trajectories % num_generations:
        raise ConfigError(
            f"num_generations={num_generations} does not divide the {trajectories:,} trajectories of a step "
            f"(per_device_train_batch_size={batch_size} x gradient_accumulation_steps={accumulation_steps} x "
            f"{num_processes} processes), and a group must be whole. Change one of them."
        )
    return trajectories // num_generations


def check_step_is_filled(
    rows: int, batch_size: int, accumulation_steps: int, num_processes: int, num_generations: int = 1
) -> None:
    """Refuse a training set that is too small for one optimizer step. Incomplete steps are dropped.

    Args:
        rows: rows of the training set.
        batch_size: as in [`prompts_per_step`].
        accumulation_steps: as in [`prompts_per_step`].
        num_processes: as in [`prompts_per_step`].
        num_generations: as in [`prompts_per_step`].

    Raises:
        ConfigError: as [`prompts_per_step`].
        DataError: when the training set has fewer rows than one step.
    """
    prompts = prompts_per_step(batch_size, accumulation_steps, num_processes, num_generations)
    if rows < prompts:
        each = "" if num_generations == 1 else f", divided by num_generations={num_generations}"
        raise DataError(
            f"Nothing would be trained: the training set has {rows:,} rows, and a step takes {prompts:,} "
            f"(per_device_train_batch_size={batch_size} x gradient_accumulation_steps={accumulation_steps} x "
            f"{num_processes} processes{each}). Lower one of them, or add rows."
        )


def check_prompt_lengths(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
    context_length: int | None,
    max_completion_length: int | None,
    name: str = "train_dataset",
    vocab_size: int | None = None,
) -> None:
    """Refuse prompts that the student cannot read: its template cannot render them, they do not fit its context, or
    they hold tokens beyond its embedding.

    Prompts are tokenized as the trainer tokenizes them. Of a streaming dataset, only the first prompt is checked here.

    Args:
        dataset: a dataset that passed [`check_dataset`].
        tokenizer: tokenizer of the student.
        chat_template_kwargs: arguments that the trainer passes to the chat template.
        context_length: positions of the student. `None` if unknown: no length is checked then.
        max_completion_length: maximum tokens of a completion. `None` for no limit.
        name: name of the dataset in messages.
        vocab_size: rows of the student's embedding. `None` if unknown: no token is checked then.

    Raises:
        DataError: when a prompt leaves no room for a completion token, cannot be rendered, or holds a token beyond the
            embedding.

    Warns:
        UserWarning: when a prompt and a completion of full length do not fit together.
    """
    longest, over, count = 0, 0, 0
    for index, ids in enumerate(prompt_ids(dataset, tokenizer, chat_template_kwargs, name)):
        length, count = len(ids), index + 1
        if vocab_size is not None and length and max(ids) >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"Row {index} of `{name}`: the prompt holds the token {token!r} ({max(ids)}), and the student's "
                f"embedding has {vocab_size} rows. Resize it with `model.resize_token_embeddings(len(tokenizer))`, or "
                "use the model's own tokenizer and template."
            )
        if context_length is not None and length >= context_length:
            raise DataError(
                f"Row {index} of `{name}`: the prompt has {length} tokens, and the student's context holds "
                f"{context_length}, the completion included. Remove or shorten the row, or use a student with a "
                "longer context."
            )
        longest = max(longest, length)
        if context_length is not None and max_completion_length is not None:
            over += length + max_completion_length > context_length
        if not isinstance(dataset, Dataset):
            return  # a stream may be endless
    if over and context_length is not None:
        warnings.warn(
            f"`{name}`: {over} of {count} prompts (the longest has {longest} tokens) do not fit the student's "
            f"context of {context_length} tokens together with a completion of `max_completion_length="
            f"{max_completion_length}`. Lower `max_completion_length` to {context_length - longest} or less, or "
            "remove these rows.",
            stacklevel=2,
        )


def prompt_ids(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
    name: str = "train_dataset",
) -> Iterator[list[int]]:
    """Token ids of each prompt, as the trainer tokenizes it.

    Args:
        dataset: a map-style or streaming dataset that passed [`check_dataset`].
        tokenizer: tokenizer of the student.
        chat_template_kwargs: arguments that the trainer passes to the chat template.
        name: name of the dataset in messages.

    Raises:
        DataError: when the chat template of the student cannot render a prompt. The message names the row.
    """
    rows = 0
    # The first rows of a stream may be all that is read.
    for batch in dataset.select_columns("prompt").iter(batch_size=1000 if isinstance(dataset, Dataset) else 1):
        try:
            yield from encode_prompts(list(batch["prompt"]), tokenizer, chat_template_kwargs)
        except PromptError as error:
            raise DataError(f"Row {rows + error.index} of `{name}`: {error}") from error
        rows += len(batch["prompt"])
