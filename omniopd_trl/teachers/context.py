# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What only the teacher sees: a context beside the prompt, such as a reference solution, a rubric or feedback."""

import math
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.teachers.base import Prompt, text_of_content

# The context comes first: a prompt of plain text then still ends where its answer begins.
CONTEXT_TEMPLATE = (
    "You are given a reference for the request below: a solution, an answer, a rubric or feedback. Let it guide your "
    "answer, but neither mention nor quote it. Write as if you had only seen the request.\n\nReference:\n{context}\n\n"
    "Request:\n{prompt}"
)

_FIELDS = ("{prompt}", "{context}")
# Columns that hold the student's prompt, or that it is made from.
_STUDENTS = ("prompt", "question", "problem", "messages")
_EITHER = re.compile("|".join(map(re.escape, _FIELDS)))
# A name in braces that is not the argument of a LaTeX command, as in \frac{a}{b} or x_{ij}.
_FIELD = re.compile(r"(?<![\\\w}^_{])\{[A-Za-z_]\w*\}(?!})")


def check_template(template: object) -> None:
    """Check the template of a context; `None` is the default.

    Raises:
        ConfigError: when it is no text that holds `{prompt}` and `{context}` once each, or it has another field. Other
            braces, as in LaTeX, are ordinary characters.
    """
    if template is None:
        return
    if not isinstance(template, str):
        raise ConfigError(f"teacher_context_template={template!r} must be a text with {{prompt}} and {{context}}.")
    for field in _FIELDS:
        if template.count(field) != 1:
            raise ConfigError(
                f"teacher_context_template={template!r:.200} must hold {field} exactly once (found "
                f"{template.count(field)} times). Add what is missing: {{context}} is replaced by the column, and "
                "{prompt} by the student's prompt."
            )
    unknown = [field for field in _FIELD.findall(template) if field not in _FIELDS]
    if unknown:
        raise ConfigError(
            f"teacher_context_template={template!r:.200} has the unknown field {unknown[0]}. Use {{prompt}} and "
            "{context}; put other columns into the context's column."
        )


def with_context(prompt: Prompt, context: str | None, template: str | None = None) -> Prompt:
    """The prompt that the teacher sees.

    Args:
        prompt: the student's prompt, plain text or a list of messages. It is not changed.
        context: what only the teacher sees; `None` returns the prompt itself.
        template: text with `{prompt}` and `{context}`. It replaces a prompt of plain text, and the content of the last
            message of the user in a conversation. `None` for `CONTEXT_TEMPLATE`.

    Raises:
        DataError: when a conversation has no message of the user.

    Example:
        >>> with_context("3 + 4 =", "7", "(The answer is {context}.) {prompt}")
        '(The answer is 7.) 3 + 4 ='
    """
    if context is None:
        return prompt
    if isinstance(prompt, str):
        # In one pass: the context or the prompt may hold a field's name.
        values = {"{prompt}": prompt, "{context}": context}
        return _EITHER.sub(lambda match: values[match.group()], template or CONTEXT_TEMPLATE)
    last = next((index for index in reversed(range(len(prompt))) if prompt[index].get("role") == "user"), None)
    if last is None:
        raise DataError(
            "the prompt has no message of the user, which would hold what only the teacher sees "
            "(`teacher_context_column`). Add one, or remove the row."
        )
    message = {**prompt[last], "content": with_context(text_of_content(prompt[last]["content"]), context, template)}
    return [*prompt[:last], message, *prompt[last + 1 :]]


@dataclass(frozen=True)
class TeacherContext:
    """Which column only the teacher sees, and how its prompt contains it.

    Attributes:
        column: name of the column; `None` when the teacher sees what the student sees.
        template: see [`with_context`].

    Raises:
        ConfigError: when the template is not valid, or the column is the student's prompt.
    """

    column: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.column in _STUDENTS:
            raise ConfigError(f"teacher_context_column={self.column!r} is the student's prompt. Name another column.")
        if self.column is not None and (not isinstance(self.column, str) or not self.column.strip()):
            raise ConfigError(f"teacher_context_column={self.column!r} must be the name of a column of the dataset.")
        if self.column is None and self.template is not None:
            raise ConfigError(
                "teacher_context_template has no effect without a context. Set teacher_context_column to a column of "
                "the dataset, or leave it out."
            )

    @property
    def identity(self) -> list[str]:
        """What determines the teacher's prompts, the text of the default template included; empty without a column."""
        return [] if self.column is None else [self.column, self.template or CONTEXT_TEMPLATE]

    def of(self, row: Mapping[str, Any]) -> str | None:
        """What only the teacher sees of a row; `None` without a column.

        A whole number is written without decimals: a column of 7 and 3.5 holds 7.0.

        Raises:
            DataError: when the row has no text and no finite number there. NaN is a missing number.
        """
        if self.column is None:
            return None
        value = row.get(self.column)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value).removesuffix(".0")
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"`{self.column}` (teacher_context_column) must be text that is not blank, or a number, got "
                f"{value!r:.200}. Fill it, or remove the row."
            )
        return value

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row as the teacher sees it.

        Raises:
            DataError: as [`of`] and [`with_context`].
        """
        prompt: Prompt = row["prompt"]
        return with_context(prompt, self.of(row), self.template)

    def rows(self, dataset: Any) -> Any:
        """The dataset, map-style or streaming, with the prompts as the teacher sees them."""
        if self.column is None:
            return dataset
        from omniopd_trl.data.prompts import map_prompts

        return map_prompts(dataset, self.prompt, ["teacher_context", *self.identity])

    def check(self, dataset: Any, name: str = "train_dataset") -> None:
        """Check the column of a dataset: all rows of a map-style one, and the first of a stream.

        Raises:
            DataError: when the dataset has no such column, a row has no context, or most prompts already contain
                their context.
        """
        if self.column is None:
            return
        from omniopd_trl.data.datasets import column_names

        columns = column_names(dataset)
        if self.column not in columns:
            raise DataError(
                f"`{name}` has no column {self.column!r} (it has: {', '.join(columns)}), which only the teacher would "
                "see. Set teacher_context_column to one of them, or leave it out."
            )
        count = seen = 0
        is_map_style = isinstance(dataset, Sized)
        for row in dataset.select_columns(["prompt", self.column]) if is_map_style else islice(dataset, 1):
            try:
                context = self.of(row)
                self.prompt(row)
            except DataError as error:
                raise DataError(f"Row {count} of `{name}`: {error}") from error
            count += 1
            seen += context is not None and _holds(row["prompt"], context)
        if is_map_style and seen > count / 2:
            raise DataError(
                f"`{name}`: {seen} of {count} prompts contain the text of {self.column!r}, so the student sees what "
                "only the teacher should see (teacher_context_column). Leave it out of the prompts, or name another "
                "column."
            )


NO_CONTEXT = TeacherContext()


def _holds(prompt: Prompt, text: str) -> bool:
    """Whether a prompt contains a text that is not a part of a longer word or number."""
    texts = [prompt] if isinstance(prompt, str) else [str(text_of_content(m.get("content"))) for m in prompt]
    pattern = re.compile(rf"(?<![\w.-]){re.escape(text.strip())}(?!\.?\w)")
    return any(pattern.search(one) for one in texts)
