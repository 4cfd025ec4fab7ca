# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Datasets: where they come from, how questions become prompts, and what is refused before training starts."""

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from omniopd_trl.errors import ConfigError, DataError

AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)

# Table 7 of the paper, used for training and evaluation alike. The backslashes are the paper's.
PROMPT_TEMPLATES: dict[str, str] = {
    "math": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: \\$Answer (without quotes) where \\$Answer is the answer to the problem.\n\n{question}"
    ),
}

# The columns that hold a question, in the order in which they are looked for.
QUESTION_COLUMNS = ("question", "problem")

_PLACEHOLDER = "{question}"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_UNSUPPORTED_COLUMNS = ("image", "images", "tools")


def local_builder(name: str) -> str | None:
    """The builder of `datasets.load_dataset` that reads the local file `name`.

    Args:
        name: a path or the id of a dataset.

    Returns:
        `"json"` or `"parquet"` when `name` is a file of that kind, `None` when it is no local file.

    Raises:
        DataError: when `name` is meant as a file (by its ending) and there is none, or is a file of another kind.
    """
    path = Path(name).expanduser()
    builder = _BUILDERS.get(path.suffix.lower())
    if path.is_file() and builder is None:
        raise DataError(
            f"The dataset file {name!r} ends in {path.suffix or 'nothing'!r}; only {', '.join(_BUILDERS)} files are "
            "read. Convert it, for example with `datasets.Dataset.to_parquet`."
        )
    if builder is not None and not path.is_file():
        raise DataError(
            f"There is no dataset file {name!r} (looked in {Path.cwd()}). Check the path; a dataset of the Hub is "
            "named without a file ending."
        )
    return builder


def load_dataset_or_files(
    name: str, config: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Load a dataset of the Hub, a local file, or a local folder of files.

    Args:
        name: id of a dataset on the Hub; or a `.json`, `.jsonl` or `.parquet` file, which becomes the split
            `"train"`; or a folder of such files, whose names tell their splits (`train.jsonl`, `test.jsonl`,
            `train-00000-of-00002.parquet`, ...), as in a dataset repository on the Hub.
        config: name of the dataset's configuration.
        streaming: read rows as they are needed instead of preparing all of them first.

    Returns:
        The splits by name.

    Raises:
        DataError: when nothing is there, or it cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists() and name.startswith(("/", "./", "../", "~")):
        raise DataError(f"There is no dataset file or folder {name!r} (looked in {Path.cwd()}). Check the path.")
    builder = local_builder(name)
    if builder is not None and config is not None:
        raise DataError(
            f"The configuration {config!r} of the dataset is set, and the local file {name!r} has none. Leave it out."
        )
    try:
        if builder is not None:
            return datasets.load_dataset(builder, data_files={"train": str(path)}, streaming=streaming)
        return datasets.load_dataset(str(path) if path.is_dir() else name, name=config, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        # `datasets` wraps what went wrong ("An error occurred while generating the dataset"); the reason is beneath.
        reason = error.__cause__ or error
        if builder is not None:
            advice = "Check that every line is one JSON object and that all have the same fields."
            if builder == "parquet":
                advice = "Check that the file is complete."
        elif path.is_dir():
            advice = "The folder must hold .json, .jsonl or .parquet files such as train.jsonl and test.jsonl."
        else:
            advice = (
                "It is neither a local file nor a local folder, so it was looked up on the Hub: check the name, the "
                "configuration and, without a network, whether it is in the cache."
            )
        raise DataError(f"The dataset {name!r} could not be loaded ({reason}). {advice}") from error


def get_split(splits: Mapping[str, Any], split: str, option: str) -> Any:
    """One split of a dataset.

    Args:
        splits: the splits by name.
        split: the split that is wanted.
        option: the option that names it, for the message.

    Raises:
        DataError: when there is no such split; the message lists those that are there.
    """
    if split not in splits:
        raise DataError(
            f"The dataset has no split {split!r} (it has: {', '.join(map(repr, splits))}). Set `{option}` to one of "
            "these."
        )
    return splits[split]


def resolve_template(template: str) -> str:
    """The text of a prompt template.

    Args:
        template: a name from `PROMPT_TEMPLATES`, or a text that holds `{question}` exactly once. Other braces, as in
            LaTeX, are ordinary characters.

    Raises:
        ConfigError: when it is neither.
    """
    if template in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[template]
    if template.count(_PLACEHOLDER) != 1:
        raise ConfigError(
            f"`prompt_template` is {template!r}. It must be a built-in name ({', '.join(PROMPT_TEMPLATES)}) or a text "
            f"that holds {_PLACEHOLDER} exactly once (found {template.count(_PLACEHOLDER)} times)."
        )
    return template


def prepare_prompts(dataset: AnyDataset, template: str | None = None) -> AnyDataset:
    """Give a dataset of questions a `prompt` column, one user message per row.

    The question is looked for in `question`, then in `problem`. A dataset that has a `prompt` column is returned as it
    is, unless its prompts are plain text and there is a template: then the text is the question. A dataset without any
    question is returned as it is, too: `check_dataset` says what is wrong with that. All other columns stay.

    Args:
        dataset: a dataset, or splits by name; streaming ones too.
        template: see [`resolve_template`]; `None` makes the question itself the prompt.

    Returns:
        The same kind of dataset.

    Raises:
        ConfigError: when the template is no template.
        DataError: when a row has no question (streaming datasets: when that row is read).
    """
    text = _PLACEHOLDER if template is None else resolve_template(template)
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        return type(dataset)({name: prepare_prompts(split, template) for name, split in dataset.items()})

    columns = column_names(dataset)
    questions = [column for column in QUESTION_COLUMNS if column in columns]
    if "prompt" in columns:
        if template is None:
            return dataset
        if not isinstance(next(iter(dataset), {"prompt": None})["prompt"], str):
            warnings.warn(
                "The prompts of the dataset are conversations, which are used as they are: `prompt_template` has no "
                "effect on them.",
                stacklevel=2,
            )
            return dataset
        questions = ["prompt"]
    if not questions:
        return dataset

    def add_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        # In a mixture of datasets one part may say `question` and the other `problem`; the other one is then None.
        question = next((row[column] for column in questions if row[column] is not None), None)
        if not isinstance(question, str):
            raise DataError(
                f"Row {index} has no question: {' and '.join(f'`{c}`' for c in questions)} must be text, got "
                f"{question!r}. Remove the row or mend it."
            )
        # Not str.format: braces in the template or in the question are LaTeX more often than placeholders.
        return {"prompt": [{"role": "user", "content": text.replace(_PLACEHOLDER, question)}]}

    return dataset.map(add_prompt, with_indices=True)


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Refuse a dataset that the trainer cannot use.

    Of a map-style dataset every prompt is looked at, of a streaming one the first.

    Args:
        dataset: a dataset, or a mapping of them (the evaluation sets).
        name: what the messages call it.

    Raises:
        DataError: when it is empty, has no `prompt` column, holds images or tools, or a prompt is neither text nor a
            list of messages that a model can answer.
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
    """Refuse a training set that is too small for one optimizer step: steps that are not filled are left out.

    Args:
        rows: rows of the training set.
        batch_size: `per_device_train_batch_size`.
        accumulation_steps: `gradient_accumulation_steps`.
        num_processes: processes of the run.

    Raises:
        DataError: when nothing would be trained.
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
        tokenizer: the student's.
        chat_template_kwargs: what the trainer passes to the chat template.
        context_length: positions that the student has; `None` when it is not known, and then no length is checked.
        max_completion_length: tokens that a completion may have; `None` when there is no limit.
        name: what the messages call the dataset.

    Raises:
        DataError: when a prompt leaves no room for a single token of a completion, or is conversational and the
            tokenizer has no chat template.

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

    streaming = not isinstance(dataset, Dataset)
    first = next(iter(dataset), None)
    conversational = first is not None and isinstance(first["prompt"], list)
    if conversational and tokenizer.chat_template is None:
        raise DataError(
            f"`{name}` is conversational (its prompts are lists of messages), but the student's tokenizer has no chat "
            "template. Set `tokenizer.chat_template`, use a chat model, or make the prompts plain text."
        )
    if streaming or context_length is None:
        return

    longest, over = 0, 0
    for offset in range(0, len(dataset), 1000):
        prompts = list(dataset[offset : offset + 1000]["prompt"])
        if conversational:
            encoded = tokenizer.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )
        else:
            encoded = tokenizer(text=prompts)
        for index, ids in enumerate(encoded["input_ids"], start=offset):
            if len(ids) >= context_length:
                raise DataError(
                    f"Row {index} of `{name}`: the prompt has {len(ids)} tokens, and the student's context holds "
                    f"{context_length}, the completion included. Remove or shorten the row, or use a student with a "
                    "longer context."
                )
            longest = max(longest, len(ids))
            over += max_completion_length is not None and len(ids) + max_completion_length > context_length
    if over:
        warnings.warn(
            f"`{name}`: {over} of {len(dataset)} prompts (the longest has {longest} tokens) do not fit the student's "
            f"context of {context_length} tokens together with a completion of `max_completion_length="
            f"{max_completion_length}`. Lower `max_completion_length` to {context_length - longest} or less, or "
            "remove these rows.",
            stacklevel=2,
        )


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns, also of a stream that declares none; an empty list when such a stream is empty."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def _prompt_problem(prompt: Any) -> str | None:
    """What is wrong with one prompt, in words; `None` when nothing is."""
    if isinstance(prompt, str):
        return None if prompt else "the prompt is empty. Remove the row."
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return f"`prompt` must be text or a list of messages, got {prompt!r}. Mend or remove the row."
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
                return f"a part of a message has no text, got {content!r:.200}. Mend or remove the row."
        elif not isinstance(content, str):
            return f"the content of a message must be text, got {content!r}."
    if prompt[-1]["role"] == "assistant":
        return "the last message is the assistant's, so nothing is left to answer. End the prompt with a user message."
    return None
