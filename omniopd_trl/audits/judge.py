# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Ask the teacher to mark the chunks of a trajectory, in place of continuing them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from omniopd_trl.teachers.base import Prefix, Prompt, SamplingRequest, Teacher, TeacherReply, replies_of
from omniopd_trl.teachers.instruct.judge import (
    Passage,
    max_answer_tokens,
    num_marks,
    parse_marks,
    render_again,
    render_question,
)

# Answers of a judge to one question, the first one included, until one of them has the form that was asked for.
MAX_ANSWERS = 3

# Characters of an answer that a failure quotes.
_QUOTED = 200


class Judged(NamedTuple):
    """What the teacher wrote as a judge.

    Attributes:
        marks: for each passage, the mark of each candidate in [0, 1], by [`text_of_candidate`]. All are empty when no
            answer had the form that was asked for.
        answers: the answers as they were written, in order.
        replies: the teacher's replies, with their cost.
    """

    marks: list[Mapping[str, float]]
    answers: tuple[str, ...]
    replies: tuple[TeacherReply, ...]


def text_of_candidate(text: str) -> str:
    """A candidate without its outer white space. Candidates that differ by nothing else are one, with one mark."""
    return text.strip()


async def ask_marks(
    teacher: Teacher, prompt: Prompt, passages: Sequence[Passage], rest: str, request: SamplingRequest
) -> Judged:
    """Ask for the marks of all passages of one trajectory in one request.

    An answer of another form is asked for again, together with what was wrong, `MAX_ANSWERS` answers in all. Each
    answer is a request of its own for the ledger, so a resumed run reads the same ones.

    Args:
        teacher: the teacher, which answers a chat.
        prompt: the prompt of the trajectory.
        passages: the passages, at least one.
        rest: the student's text after the last one.
        request: how to sample. The number of samples and of tokens are set here.

    Raises:
        TeacherError: as [`~omniopd_trl.teachers.base.replies_of`].
    """
    count = num_marks(passages)
    request = replace(request, num_samples=1, max_tokens=max_answer_tokens(passages))
    messages = question = render_question(prompt, passages, rest)
    answers: list[str] = []
    replies: list[TeacherReply] = []
    marks: list[float] | None = None
    while marks is None and len(answers) < MAX_ANSWERS:
        (reply,) = await replies_of(teacher, [Prefix(messages, is_question=True)], request)
        replies.append(reply)
        if not reply.rollouts:  # refused, or given up after its retries
            break
        answers.append(reply.rollouts[0].text)
        marks = parse_marks(answers[-1], count)
        messages = render_again(question, answers[-1], count)
    num_malformed = len(answers) - (marks is not None)
    if num_malformed:
        outcomes = {**replies[-1].outcomes, "malformed": num_malformed}
        failure = replies[-1].failure
        if marks is None and failure is None:
            failure = (
                f"no marks: {len(answers)} answers of the judge are not the {count} lines `number: mark` that were "
                f"asked for. The last one is {answers[-1]!r:.{_QUOTED}}"
            )
        replies[-1] = replace(replies[-1], outcomes=outcomes, failure=failure)
    left = iter(marks or ())
    return Judged(
        [{text_of_candidate(text): next(left) for text in p.candidates} if marks else {} for p in passages],
        tuple(answers),
        tuple(replies),
    )
