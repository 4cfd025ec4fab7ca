# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of a dataset before training."""

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from omniopd_trl.data.datasets import column_names
from omniopd_trl.data.prompts import QUESTION_COLUMNS
from omniopd_trl.errors import DataError

_UNSUPPORTED_COLUMNS = ("image", "images", "tools")


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Refuse a dataset that the trainer cannot use.

    Every prompt of a map-style dataset is checked, and only the first one of a streaming dataset.

    Args:
        dataset: a dataset, or a mapping of them (the evaluation sets).
        name: name of the dataset in messages.

    Raises:
        DataError: when the dataset is empty, has no `prompt` column, holds images or tools, or a prompt is neither
            text nor a list of messages that a model can answer.
    """
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            check_dataset(part, f"{name}[{split!r}]")
        return

    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise DataError(f"`{name}` is empty. Training and evaluation need at least one row with a `prompt`.")
    if "prompt" not in columns:
        questions = [column for column in QUESTION_COLUMNS if column in columns]
        if questions:
            advice = (
                f"It has `{questions[0]}`: turn it into prompts with `omniopd_trl.data.prepare_prompts(dataset, "
                "'math')`."
            )
        else:
            advice = "Rename the column that holds the question to `prompt` (text, or a list of messages)."
        raise DataError(f"`{name}` has no `prompt` column (it has: {', '.join(columns)}). {advice}")
    for column in _UNSUPPORTED_COLUMNS:
        if column in columns:
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
        problem = _prompt_problem(row["prompt"])
        if problem is not None:
            raise DataError(f"Row {index} of `{name}`: {problem}")


def check_step_is_filled(rows: int, batch_size: int, accumulation_steps: int, num_processes: int) -> None:
    """Refuse a training set that is too small for one optimizer step. Incomplete steps are dropped.

    Args:
        rows: rows of the training set.
        batch_size: `per_device_train_batch_size`.
        accumulation_steps: `gradient_accumulation_steps`.
        num_processes: processes of the run.

    Raises:
        DataError: when the training set has fewer rows than one step.
    """
    prompts = batch_size * accumulation_steps * num_processes
    if rows < prompts:
        raise DataError(
            f"Nothing would be trained: the training set has {rows:,} rows, and a step takes {prompts:,} "
            f"(per_device_train_batch_size={batch_size} x gradient_accumulation_steps={accumulation_steps} x "
            f"{num_processes} processes). Lower one of them, or add rows."
        )


def check_prompt_lengths(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
    context_length: int | None,
    max_completion_length: int | None,
    name: str = "train_dataset",
) -> None:
    """Refuse prompts that do not fit the student's context, and chats that its tokenizer cannot render.

    Prompts are tokenized as the trainer tokenizes them. Streaming datasets are not read through: only their first
    prompt is checked for a missing chat template.

    Args:
        dataset: a dataset that passed [`check_dataset`], or a mapping of them.
        tokenizer: tokenizer of the student.
        chat_template_kwargs: arguments that the trainer passes to the chat template.
        context_length: positions of the student. `None` if unknown: no length is checked then.
        max_completion_length: maximum tokens of a completion. `None` for no limit.
        name: name of the dataset in messages.

    Raises:
        DataError: when a prompt leaves no room for a completion token, or is conversational and the tokenizer has no
            chat template.

    Warns:
        UserWarning: when a prompt and a completion of full length do not fit together.
    """
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            check_prompt_lengths(
                part,
                tokenizer,
                chat_template_kwargs,
                context_length,
                max_completion_length,
                f"{name}[{split!r}]",
            )
        return

    if not isinstance(dataset, Dataset) or context_length is None:
        for row in islice(dataset, 1):
            _check_template(row["prompt"], tokenizer, name)
        return

    longest, over = 0, 0
    for index, length in enumerate(prompt_lengths(dataset, tokenizer, chat_template_kwargs, name)):
        if length >= context_length:
            raise DataError(
                f"Row {index} of `{name}`: the prompt has {length} tokens, and the student's context holds "
                f"{context_length}, the completion included. Remove or shorten the row, or use a student with a "
                "longer context."
            )
        longest = max(longest, length)
        over += max_completion_length is not None and length + max_completion_length > context_length
    if over:
        warnings.warn(
            f"`{name}`: {over} of {len(dataset)} prompts (the longest has {longest} tokens) do not fit the student's "
            f"context of {context_length} tokens together with a completion of `max_completion_length="
            f"{max_completion_length}`. Lower `max_completion_length` to {context_length - longest} or less, or "
            "remove these rows.",
            stacklevel=2,
        )


def prompt_lengths(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
    name: str = "train_dataset",
) -> Iterator[int]:
    """Tokens of each prompt, as the trainer tokenizes it.

    Args:
        dataset: a map-style or streaming dataset that passed [`check_dataset`].
        tokenizer: tokenizer of the student.
        chat_template_kwargs: arguments that the trainer passes to the chat template.
        name: name of the dataset in messages.

    Raises:
        DataError: when the prompts are conversational and the tokenizer has no chat template.
    """
    for batch in dataset.select_columns("prompt").iter(batch_size=1000):
        prompts = list(batch["prompt"])
        _check_template(prompts[0], tokenizer, name)
        if isinstance(prompts[0], list):
            encoded = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
            )
        else:
            encoded = tokenizer(text=prompts)
        yield from map(len, encoded["input_ids"])


def _check_template(prompt: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if isinstance(prompt, list) and tokenizer.chat_template is None:
        raise DataError(
            f"`{name}` is conversational (its prompts are lists of messages), but the student's tokenizer has no chat "
            "template. Set `tokenizer.chat_template`, use a chat model, or make the prompts plain text."
        )


def _prompt_problem(prompt: Any) -> str | None:
    """A message about the problem of one prompt, or `None`."""
    if isinstance(prompt, str):
        return None if prompt else "the prompt is empty. Remove the row."
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return f"`prompt` must be text or a list of messages, got {prompt!r}. Fix or remove the row."
    if not prompt:
        return "the prompt has no message. Remove the row."
    for message in prompt:
        if "role" not in message or "content" not in message:
            return f"a message needs `role` and `content`, got {message!r}."
        if message["role"] == "tool" or message.get("tool_calls"):
            return "a message calls or answers a tool: tools are not supported yet. Remove the row."
        content = message["content"]
        if isinstance(content, list):
            kinds = sorted({str(part.get("type")) if isinstance(part, dict) else repr(part) for part in content})
            if kinds != ["text"]:
                return f"a message holds parts of type {', '.join(kinds)}: only text is supported yet. Remove the row."
            if not all(isinstance(part.get("text"), str) for part in content):
                return f"a part of a message has no text, got {content!r:.200}. Fix or remove the row."
        elif not isinstance(content, str):
            return f"the content of a message must be text, got {content!r}."
    if prompt[-1]["role"] == "assistant":
        return "the last message is the assistant's, so nothing is left to answer. End the prompt with a user message."
    return None
