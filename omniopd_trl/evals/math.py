# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Reward functions for mathematical answers, in TRL's signature."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

from omniopd_trl.errors import DataError, import_extra
from omniopd_trl.evals.numbers import PlainNumber, plain_number

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Parsing or comparing can be slow on hostile input: towers of powers, huge factorials, hundreds of brackets.
_TIMEOUT_SECONDS = 3.0
# Maximum number of characters that are searched for an answer, taken from the end if no mark precedes the answer.
# Otherwise a student that repeats itself for thousands of tokens would use up the time limit each time.
_MAX_CHARACTERS = 1000

_ANSWER_MARK = re.compile(r"answer\**\s*[::]\s*\**", re.IGNORECASE)
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_PLAIN_NUMBER = re.compile(r"[\d\s.,/%+-]*")


def math_accuracy(
    completions: Sequence[str | list[dict[str, Any]]],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    lenient: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    r"""Score whether each completion gives the right answer, with math-verify.

    The answer is the text after the last `Answer:`, the form that the paper's prompt requests, or else the whole
    completion. Numbers, fractions, LaTeX and `\boxed{}` are compared by value: `0.5` equals `\frac{1}{2}`.

    Where the right answer is a plain number, the answer must be one too. `Answer: 12 + 30 - 5` has the value 37 but
    repeats the question, and `Answer: 37 or 38` does not decide. Formatting does not count: thousands separators,
    trailing zeros, units, `\boxed{}`, scientific notation, a fraction in lowest terms, and what precedes an equals
    sign.

    Args:
        completions: plain texts, or conversational completions. The last message of a conversation is scored.
        solution: the dataset's column of worked solutions or answers. Used if `answer` is missing or not parsable.
        answer: the dataset's column of answers. Takes precedence, since a worked solution holds other numbers too.
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
    if solution is None and answer is None:
        raise DataError(
            "math_accuracy compares completions with a `solution` or an `answer` column, and the dataset has neither. "
            "Add one, or pass a custom reward function as `eval_reward_funcs`."
        )
    # Before the loop: a missing package is reported for an empty batch too.
    import_extra("math_verify", "eval")
    # Suppresses the warning that the time limit of math-verify is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    nothing: list[Any] = [None] * len(completions)
    rewards: list[float | None] = []
    for completion, *golds in zip(completions, answer or nothing, solution or nothing, strict=True):
        gold = next((parsed for text in golds if (parsed := _parse_gold(text))), None)
        if gold is None:
            _warn_unreadable(*map(repr, golds))
            rewards.append(None)
        else:
            rewards.append(float(_is_correct(_text_of(completion), gold, lenient)))
    return rewards


def _text_of(completion: str | list[dict[str, Any]]) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


@dataclass(frozen=True)
class _Gold:
    """A right answer: the expressions that math-verify finds, and the number if it is a plain one."""

    parsed: tuple[Any, ...]
    number: PlainNumber | None


def _is_correct(completion: str, gold: _Gold, lenient: bool) -> bool:
    if gold.number is not None and not lenient:
        number = _number_of(completion)
        return number is not None and gold.number.equals(number)
    parsed = _parse(completion)
    if not parsed:
        return False
    # Equal strings have equal values. Most right answers need no algebra.
    if {part for part in parsed if isinstance(part, str)} & {part for part in gold.parsed if isinstance(part, str)}:
        return True
    verify = partial(import_extra("math_verify", "eval").verify, timeout_seconds=None)
    return _limited(verify, list(gold.parsed), list(parsed), otherwise=False)


def _number_of(text: str) -> PlainNumber | None:
    """The plain number that a completion or a right answer gives; `None` if it gives anything else."""
    marked = _marked(text)
    if marked is not None:
        text = marked.split("\n", 1)[0]
    # A line that consists of one number. A line without a mark may hold other numbers, and a mark may be followed by a
    # displayed formula: what math-verify finds there must be a number.
    if len(text) <= _MAX_CHARACTERS and (number := plain_number(text)) is not None:
        # A letter beside a number is a unit or a variable: `37 m`, `37x`.
        return number if not number.has_words or _is_constant(_parse_marked(text)) else None
    if marked is not None and re.search(r"\d", text):
        return None
    source = next((part for part in _parse(text if marked is None else marked) if isinstance(part, str)), "")
    return plain_number(source)


def _is_constant(parsed: tuple[Any, ...]) -> bool:
    """Whether no expression has a variable, apart from the one that it defines (`x = 37`)."""
    sides = (getattr(part, "rhs", part) for part in parsed)
    return not any(getattr(side, "free_symbols", None) for side in sides)


# The same right answers are parsed at every evaluation and for every sample of a prompt.
@lru_cache(maxsize=65536)
def _parse_gold(text: Any) -> _Gold | None:
    parsed = () if text is None else _parse(str(text))
    return _Gold(parsed, _number_of(str(text))) if parsed else None


@lru_cache(maxsize=65536)
def _warn_unreadable(answer: str, solution: str) -> None:
    """Warn once for each pair."""
    logger.warning(
        "A row has no right answer that can be parsed as mathematics (answer %s, solution %s). It counts neither as "
        "right nor as wrong. Fix it, or pass a custom reward function as `eval_reward_funcs`.",
        answer,
        solution,
    )


def _parse(text: str) -> tuple[Any, ...]:
    """The expressions that math-verify finds in a text, each with its source string. Empty if there are none."""
    tail = _marked(text)
    if tail is None:
        # A right answer alone is short. A longer text is parsed as prose.
        return _parse_marked(text) if len(text) <= 100 else _parse_raw(text[-_MAX_CHARACTERS:])
    # The prompt requests the answer on one line, and later lines are ignored. A line that cannot be parsed alone (the
    # opening of a displayed formula) is parsed together with the rest.
    head = tail.split("\n", 1)[0]
    return _parse_marked(head) or _parse_marked(tail)


def _marked(text: str) -> str | None:
    """The text after the last mark of an answer; `None` without a mark."""
    marks = list(_ANSWER_MARK.finditer(text))
    return text[marks[-1].end() :].strip()[:_MAX_CHARACTERS] if marks else None


def _parse_marked(text: str) -> tuple[Any, ...]:
    """Parse a text that consists of an answer and little else."""
    # A single dollar sign is a currency, a pair delimits a formula.
    text = text.replace("\\$", "").strip()
    if text.count("$") % 2:
        text = text.replace("$", "")
    text = text.rstrip(".* ")
    readings = [text]
    if not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) and not _PLAIN_NUMBER.fullmatch(text):
        # math-verify parses LaTeX only between delimiters: outside of them `2^{10}` would be 2. Between them, a word
        # is a product of its letters, so a text with words is first (or only) parsed as text.
        words = _WORD.search(_LATEX_COMMAND.sub("", text))
        formula = f"${text}$"
        if not words:
            readings = [formula, text]
        elif "\\" in text:
            readings = [text, formula]
    for reading in readings:
        parsed = _parse_raw(reading)
        if parsed:
            return parsed
    return ()


def _parse_raw(text: str) -> tuple[Any, ...]:
    parse = partial(import_extra("math_verify", "eval").parse, parsing_timeout=None)
    return tuple(_limited(parse, text, otherwise=[]))


class _TooSlow(BaseException):
    """The time limit is exceeded. Not an `Exception`, since sympy catches those in many places."""


def _limited(function: Callable[..., T], *args: Any, otherwise: T) -> T:
    """Call a function of math-verify with a time limit. The caller switches off the limit of math-verify.

    The limit of math-verify sets a single alarm, which is lost in code that cannot raise (a callback of the garbage
    collector), and it cancels other alarms (of a watchdog or a test runner). Here the alarm repeats, and a previous
    alarm is restored. Only the main thread can set alarms: in other threads and on Windows there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return function(*args)
    armed = True

    def stop(*_: Any) -> None:
        if armed:
            raise _TooSlow

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, _TIMEOUT_SECONDS, 0.1)
    try:
        try:
            return function(*args)
        finally:
            armed = False
    except _TooSlow:
        return otherwise
    finally:
        if remaining:
            remaining = max(remaining - (time.monotonic() - start), 0.001)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
