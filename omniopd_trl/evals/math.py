# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Reward functions for mathematical answers, in TRL's signature."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, islice
from numbers import Number
from typing import Any

from omniopd_trl.errors import DataError, find_extra
from omniopd_trl.evals import workers

logger = logging.getLogger(__name__)

# A number as `read_answers` writes it.
_NUMBER = re.compile(r"-?\d+(?:/\d+)?")


def math_accuracy(
    completions: Sequence[str | list[dict[str, Any]]],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    lenient: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    r"""Score whether each completion gives the right answer, with math-verify.

    The answer is the text after the last `Answer:`, the form that the paper's prompt requests, or else that in the
    last 1,000 characters. What precedes the last `</think>` does not count. Numbers, fractions, LaTeX and `\boxed{}`
    are compared by value: `0.5` equals `\frac{1}{2}`.

    Where the right answer is a plain number, the answer must be one too. `Answer: 12 + 30 - 5` has the value 37 but
    repeats the question, `Answer: 37 or 38` does not decide, `Answer: not 37` and `Answer: 37 is wrong` deny it.
    Formatting does not count: thousands separators, trailing zeros, units, `\boxed{}`, scientific notation, words such
    as `million`, a fraction in lowest terms, and what precedes an equals sign.

    Answers are read in other processes, and one that takes more than 3 seconds or 2 GiB is wrong: see [`workers`]. The
    time limit holds in any thread.

    Args:
        completions: plain texts, or conversational completions. The last message of a conversation is scored.
        solution: the dataset's column of worked solutions or answers. Used if `answer` is missing or not parsable.
        answer: the dataset's column of answers. Takes precedence, since a worked solution holds other numbers too. Of
            a list, an answer needs all.
        lenient: whether anything with the value of the right answer is right, calculations included.
        **kwargs: other columns that TRL passes. Not used.

    Returns:
        1.0 or 0.0 per completion, and `None` if the right answer itself cannot be parsed. Such rows are named once in
        a warning.

    Raises:
        MissingExtraError: when math-verify is not installed.
        DataError: when there is neither a `solution` nor an `answer` column.

    Example:
        ```python
        math_accuracy(["3 + 4 = 7, so Answer: 7", "Answer: 8"], answer=["7", "7"])  # [1.0, 0.0]
        ```
    """
    readings = read_answers(completions, solution, answer, lenient=lenient)
    return [reading.score for reading in readings]


def read_answers(
    completions: Sequence[str | list[dict[str, Any]]],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    lenient: bool = False,
) -> list[workers.Reading]:
    """What [`math_accuracy`] reads from each completion: its score, the answer, and why it could not be read.

    The arguments and errors are those of [`math_accuracy`].
    """
    if solution is None and answer is None:
        raise DataError(
            "math_accuracy compares completions with a `solution` or an `answer` column, and the dataset has neither. "
            "Add one, or pass a custom reward function as `eval_reward_funcs`."
        )
    find_extra("math_verify", "eval")
    nothing: list[Any] = [None] * len(completions)
    rows = list(zip(completions, answer or nothing, solution or nothing, strict=True))
    tasks = [
        (text_of_completion(completion), [_text_of_gold(gold) for gold in golds], lenient)
        for completion, *golds in rows
    ]
    readings = workers.read(tasks)
    for reading, (_, *golds) in zip(readings, rows, strict=True):
        if reading.score is None:
            _warn_unreadable(*map(repr, golds))
    stopped = [
        (reading.problem, text) for reading, (text, _, _) in zip(readings, tasks, strict=True) if reading.problem
    ]
    if stopped:
        problem, text = stopped[0]
        logger.warning(
            "%s of %s answers could not be scored and count as wrong. The first: %s. It ends with %r.",
            len(stopped),
            len(readings),
            problem,
            text[-100:],
        )
    return readings


def has_right_answer(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any row has an `answer` or a `solution` that can be parsed. No row is named in a warning."""
    rest = iter(rows)
    while some := [*islice(rest, 32)]:  # nearly always one of the first
        golds = [[_text_of_gold(row.get(name)) for name in ("answer", "solution")] for row in some]
        if any(reading.score is not None for reading in workers.read([("", texts, False) for texts in golds])):
            return True
    return False


def as_votes(
    answers: Sequence[Sequence[str | None]], scores: Sequence[Sequence[float | None]], *, lenient: bool = False
) -> list[list[str | None]]:
    """Answers with one text for those that are equal, as votes of a majority.

    Right answers are equal, and wrong ones if one would be right where the other is. Two formulas may take seconds, so
    wrong answers are compared only where this can change the majority: a right answer is the most frequent one, and
    all wrong ones together are not fewer.

    Args:
        answers: the answers that [`read_answers`] reads from the samples of each problem.
        scores: their scores.
        lenient: argument of [`math_accuracy`].
    """
    votes: list[list[str | None]] = []
    pairs: list[tuple[int, str, str]] = []
    for row, marks in zip(answers, scores, strict=True):
        right = next((answer for answer, mark in zip(row, marks, strict=True) if mark == 1), None)
        numbers: dict[Fraction, str] = {}
        texts = [right if mark == 1 else answer for answer, mark in zip(row, marks, strict=True)]
        for index, text in enumerate(texts):
            if text is not None and _NUMBER.fullmatch(text):
                texts[index] = numbers.setdefault(round(Fraction(text), 6), text)
        counts = Counter(text for text in texts if text is not None)
        if right is not None and max(counts.values()) == counts[right] <= counts.total() / 2:
            wrong = combinations((text for text in counts if text != right), 2)
            pairs += [(len(votes), *pair) for pair in wrong if not all(map(_NUMBER.fullmatch, pair))]
        votes.append(texts)
    readings = workers.read([(f"Answer: {second}", [first], lenient) for _, first, second in pairs])
    for (problem, first, second), reading in zip(pairs, readings, strict=True):
        if reading.score == 1:
            votes[problem] = [first if text == second else text for text in votes[problem]]
    return votes


def _text_of_gold(gold: Any) -> str | None:
    parts = gold if isinstance(gold, list) else [gold]
    # A number in the text of anything else is not the answer.
    return ", ".join(map(str, parts)) if all(isinstance(part, str | Number) for part in parts) else None


def text_of_completion(completion: str | list[dict[str, Any]]) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


@lru_cache(maxsize=65536)
def _warn_unreadable(answer: str, solution: str) -> None:
    """Warn once for each pair."""
    logger.warning(
        "A row has no right answer that can be parsed as mathematics (answer %s, solution %s). It counts neither as "
        "right nor as wrong. Fix it, or pass a custom reward function as `eval_reward_funcs`.",
        answer,
        solution,
    )
