# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt templates, and the conversion of questions to prompts."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict
from datasets.fingerprint import Hasher

from omniopd_trl.data.datasets import AnyDataset, column_names
from omniopd_trl.data.encoding import is_blank
from omniopd_trl.errors import ConfigError, DataError

# Table 7 of the paper, used for training and evaluation alike. The backslashes are the paper's.
PROMPT_TEMPLATES: dict[str, str] = {
    "math": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: \\$Answer (without quotes) where \\$Answer is the answer to the problem.\n\n{question}"
    ),
}

# Columns that may hold the question, in order of precedence.
QUESTION_COLUMNS = ("question", "problem")

# Column with whole conversations, as for supervised training.
MESSAGES_COLUMN = "messages"

_PLACEHOLDER = "{question}"


def resolve_template(template: str) -> str:
    """The text of a prompt template.

    Args:
        template: a name from `PROMPT_TEMPLATES`, or a text that holds `{question}` exactly once. Other braces, as in
            LaTeX, are ordinary characters.

    Raises:
        ConfigError: when the template is neither.
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

    The question is read from the column `question`, or else from `problem`. A dataset with a `prompt` column is
    returned unchanged, unless its prompts are plain text and a template is given: the text is the question then. Of a
    dataset with nothing but `messages`, the prompt is the conversation without the answer that it ends with. A dataset
    without a question is returned unchanged too, and `check_dataset` reports it. All other columns are kept.

    Args:
        dataset: a dataset, or splits by name. Streaming datasets are supported.
        template: see [`resolve_template`]. `None` makes the question itself the prompt.

    Returns:
        A dataset of the same type.

    Raises:
        ConfigError: when the template is not valid.
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
    if not questions and MESSAGES_COLUMN in columns:
        if template is not None:
            warnings.warn(
                f"The column `{MESSAGES_COLUMN}` holds conversations, which are used as they are: `prompt_template` "
                "has no effect on them.",
                stacklevel=2,
            )
        return map_prompts(dataset, _without_answer, ["messages"])
    if not questions:
        return dataset

    def add_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        # In a mixture of datasets, some rows may have `question` and others `problem`. The other column is None.
        question = next((row[column] for column in questions if row[column] is not None), None)
        if not isinstance(question, str) or is_blank(question):
            raise DataError(
                f"Row {index} has no question: {' and '.join(f'`{c}`' for c in questions)} must be text that is not "
                f"blank, got {question!r}. Remove or fix the row."
            )
        # Not str.format: braces in the template or the question are usually LaTeX.
        return {"prompt": [{"role": "user", "content": text.replace(_PLACEHOLDER, question)}]}

    if not isinstance(dataset, Dataset):
        return dataset.map(add_prompt, with_indices=True)
    # The fingerprint covers only what determines the result. By default `datasets` hashes the function's code,
    # including its messages and file name, and any edit would invalidate the answers recorded for the same prompts.
    identity = Hasher.hash(["prompts", dataset._fingerprint, questions, text])
    return dataset.map(add_prompt, with_indices=True, new_fingerprint=identity)


def map_prompts(dataset: AnyDataset, function: Callable[[dict[str, Any]], Any], identity: Sequence[str]) -> AnyDataset:
    """The dataset with another `prompt` in each row. All other columns are kept.

    Args:
        dataset: a map-style or streaming dataset.
        function: function from a row to its prompt.
        identity: what determines the function's result, besides the row. With the dataset's own fingerprint, it
            identifies the prompts; see [`prepare_prompts`].
    """

    def add_prompt(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": function(row)}

    if not isinstance(dataset, Dataset):
        return dataset.map(add_prompt)
    return dataset.map(add_prompt, new_fingerprint=Hasher.hash([*identity, dataset._fingerprint]))


def _without_answer(row: dict[str, Any]) -> Any:
    messages = row[MESSAGES_COLUMN]
    if not isinstance(messages, list):
        return [messages]  # `check_dataset` refuses it, and names the row
    last = messages[-1] if messages else None
    return messages[:-1] if isinstance(last, dict) and last.get("role") == "assistant" else messages
