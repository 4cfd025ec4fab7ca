# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A judge of the demo's student, for `signal: judge`: it reads a question and writes an answer, as a model would.

The demo's models are too small to judge. This judge knows the rules of the world instead. In the student's style the
wording is fixed by the problem, so only one text is right after what stands before a passage; results that were
written before are kept, correct or not. A passage is right if that text begins with it.

Like a model, the judge is not always right, and does not always keep the form. When it is not follows from the text:
the same question gets the same answer.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd_trl.demo.world import Problem, finished_solution, read_problem

# Shares of the marks that are the opposite of the right one, and that say that the judge cannot decide.
WRONG, UNDECIDED = 0.1, 0.1
# Share of the questions whose first answer has an introduction, which is not the form that was asked for.
INTRODUCED = 0.05

_RIGHT, _MIDDLE, _FALSE = 10, 5, 0


def _between(tag: str) -> re.Pattern[str]:
    """What is between tags, with a number and a place if they have them. A tag may have a suffix, as `<passage-2>`."""
    return re.compile(
        rf'<(?P<tag>{tag}(-\d+)?)( number="(?P<number>\d+)")?( place="(?P<place>\d+)")?>(?P<text>.*?)</(?P=tag)>',
        re.DOTALL,
    )


_PROBLEM, _SOLUTION, _PASSAGE, _CANDIDATE = map(_between, ("problem", "solution", "passage", "candidate"))


def write_marks(messages: Sequence[Mapping[str, Any]]) -> str:
    """The answer to a question of `signal: judge`.

    Args:
        messages: the question. Its second message holds the problem and the solution; later ones are an earlier answer
            and its correction.

    Returns:
        One line `number: mark` for each text to mark, perhaps after an introduction. A sentence without marks if the
        problem is not one of the demo's.
    """
    question = messages[1]["content"]
    found, solved = _PROBLEM.search(question), _SOLUTION.search(question)
    problem = read_problem(found["text"].strip()) if found else None
    if problem is None or solved is None:
        return "I can judge nothing but solutions of the demo's problems."
    before, end, solution = "", 0, solved["text"]
    marks: dict[int, int] = {}
    places: dict[str, str] = {}
    for passage in _PASSAGE.finditer(solution):
        before += solution[end : passage.start()]
        end = passage.end()
        if passage["number"]:
            marks[int(passage["number"])] = _mark(problem, before, passage["text"], is_end=end == len(solution))
        else:
            places[passage["place"]] = before
        before += passage["text"]
    for candidate in _CANDIDATE.finditer(question, solved.end()):
        marks[int(candidate["number"])] = _mark(problem, places[candidate["place"]], candidate["text"])
    answer = "\n".join(f"{number}: {mark}" for number, mark in sorted(marks.items()))
    is_introduced = len(messages) == 2 and random.Random(question).random() < INTRODUCED
    return f"Here are the marks:\n{answer}" if is_introduced else answer


def is_right(problem: Problem, before: str, text: str, is_end: bool = False) -> bool:
    """Whether a text is right as the next part of a solution in the student's style.

    Args:
        problem: the problem.
        before: the solution up to the text. Its results are kept. Lines before the one that the text begins in are not
            judged.
        text: the text. It is not right if it is only white space.
        is_end: whether the solution ends with the text. It is then right only if nothing is missing.
    """
    first = before.count("\n")
    # A number at the end of what stands before is whole if the text does not begin with another digit.
    finished = finished_solution(problem, before + text[:1])
    written, right = ("\n".join(whole.split("\n")[first:]) for whole in (before + text, finished))
    return bool(text.strip()) and (written == right if is_end else right.startswith(written))


def _mark(problem: Problem, before: str, text: str, is_end: bool = False) -> int:
    right, other = (_RIGHT, _FALSE) if is_right(problem, before, text, is_end) else (_FALSE, _RIGHT)
    draw = random.Random(f"{problem.question}\n{before}\n{text}").random()
    return other if draw < WRONG else _MIDDLE if draw < WRONG + UNDECIDED else right
