# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How the questions of a dataset become prompts."""

import warnings
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict
from datasets.fingerprint import Hasher

from omniopd_trl.data.datasets import AnyDataset, column_names
from omniopd_trl.errors import ConfigError, DataError

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

    if not isinstance(dataset, Dataset):
        return dataset.map(add_prompt, with_indices=True)
    # By what decides the result. `datasets` would hash the code of the function, its messages and its file's name, and
    # what was recorded with the same prompts would be paid for again after a change of a word.
    identity = Hasher.hash(["prompts", dataset._fingerprint, questions, text])
    return dataset.map(add_prompt, with_indices=True, new_fingerprint=identity)
