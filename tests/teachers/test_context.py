# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt that only the teacher sees: templates, columns, and what counts as a quotation."""

import math

import pytest
from datasets import Dataset

from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.evals.copying import num_quotes
from omniopd_trl.teachers.context import TeacherContext, with_context

TEMPLATE = "{context} | {prompt}"


def test_the_context_goes_into_the_last_message_of_the_user():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "3 + 4?"}]},
    ]
    seen = with_context(prompt, "7", TEMPLATE)
    assert seen == [*prompt[:3], {"role": "user", "content": "7 | And\n3 + 4?"}]
    assert prompt[3]["content"][1]["text"] == "3 + 4?"  # unchanged
    assert with_context(prompt, None, TEMPLATE) is prompt
    with pytest.raises(DataError, match=r"no message of the user.*teacher_context_column"):
        with_context(prompt[:1], "7", TEMPLATE)


def test_fields_in_the_texts_are_not_replaced():
    assert with_context("say {context}", "{prompt}", TEMPLATE) == "{prompt} | say {context}"
    # By default a prompt of plain text still ends where its answer begins.
    assert with_context("3 + 4 =", "7").endswith("\n3 + 4 =")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{prompt}"}, r"must hold \{context\} exactly once \(found 0 times\)"),
        ({"template": "{context}"}, r"must hold \{prompt\} exactly once"),
        ({"template": "{context} {context} {prompt}"}, "found 2 times"),
        ({"template": "{context} {answer} {prompt}"}, r"unknown field \{answer\}"),
        ({"template": 3}, "must be a text"),
        ({"column": None, "template": TEMPLATE}, "has no effect without a context"),
        ({"column": "prompt"}, "is the student's prompt"),
        ({"column": "question"}, "is the student's prompt"),
        ({"column": " "}, "must be the name of a column"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        TeacherContext(**{"column": "answer", **settings})
    assert "\n" not in str(raised.value)


def test_latex_in_a_template_is_no_field():
    template = r"{prompt} Answer: \boxed{answer}, $\frac{a}{b}$, $x_{ij}$. {context}"
    assert with_context("p", "c", template).startswith(r"p Answer: \boxed{answer}, $\frac{a}{b}$")
    TeacherContext("answer", template)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "solution": "7"}], r"has no column 'answer' \(it has: prompt, solution\)"),
        ([{"prompt": "p", "answer": "7"}, {"prompt": "p", "answer": " "}], r"Row 1 of `train_dataset`.*not blank"),
        ([{"prompt": "p", "answer": "7"}, {"prompt": "p", "answer": None}], "Row 1 .*got None"),
        ([{"prompt": "p", "answer": [7]}], r"got \[7\]"),
        ([{"prompt": "p", "answer": 7.5}, {"prompt": "p", "answer": math.nan}], "Row 1 .*got nan"),
        ([{"prompt": "is it 7?", "answer": "7"}, {"prompt": "is it -8?", "answer": "-8"}], "2 of 2 prompts contain"),
    ],
)
def test_columns_are_checked(rows, message):
    with pytest.raises(DataError, match=message):
        TeacherContext("answer").check(Dataset.from_list(rows))


def test_numbers_are_written_as_a_rollout_would():
    """A column that holds 7 and 3.5 has floats only."""
    assert [TeacherContext("answer").of({"answer": n}) for n in (7.0, 3.5, -37, 1e20)] == ["7", "3.5", "-37", "1e+20"]


def test_prompts_that_hold_the_digits_of_an_answer_are_fine():
    rows = [{"prompt": f"{n}7 - 1{n}.5 or -{n}?", "answer": n} for n in (5, 6)]
    TeacherContext("answer").check(Dataset.from_list(rows))
    stream = Dataset.from_list([*rows, {"prompt": "p", "answer": None}]).to_iterable_dataset()
    TeacherContext("answer").check(stream)  # its first row


def test_a_dataset_with_the_prompts_of_the_teacher():
    data = Dataset.from_list([{"prompt": "p", "answer": 7}])
    context = TeacherContext("answer", TEMPLATE)
    for dataset in (data, data.to_iterable_dataset()):
        assert [row["prompt"] for row in context.rows(dataset)] == ["7 | p"]
    assert TeacherContext().rows(data) is data
    other = TeacherContext("answer").rows(data)
    assert len({data._fingerprint, context.rows(data)._fingerprint, other._fingerprint}) == 3
    assert context.rows(data)._fingerprint == context.rows(data)._fingerprint


@pytest.mark.parametrize(
    ("context", "rollouts", "seen", "quotes"),
    [
        ("First add both numbers. The sum is 12.", ["so add BOTH numbers", "add them", "the sum: is 12"], "", 2),
        ("Tom has 4 apples, and eats 1.", ["Tom has 4 apples"], "Tom has 4 apples. How many?", 0),  # the question's
        ("Tom has 4 apples, and eats 1.", ["apples and eats"], "Tom has 4 apples. How many?", 1),
        ("42", ["= 42.", "= 142", "= 42.5", "42", "4 2"], "6 * 7", 2),
        ("42", ["= 42"], "42 / 1", 0),  # the student has seen it
        ("-37", [r"\boxed{-37}", "53-37", "= -37", "37", "16 - 37"], "16 - 53", 2),
        ("the answer", ["answer the", "It is the answer"], "", 1),
        ("...", ["..."], "", 0),  # no word
        ("7", [], "", 0),
    ],
)
def test_quotations(context, rollouts, seen, quotes):
    assert num_quotes(context, rollouts, seen) == quotes
