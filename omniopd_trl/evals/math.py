# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Is the answer right? Reward functions for evaluation, in TRL's signature."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

from omniopd_trl.errors import DataError, import_extra

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Reading or comparing can be slow on hostile input: towers of powers, huge factorials, hundreds of brackets.
_TIMEOUT_SECONDS = 3.0
# Characters of a text that are searched for an answer, from its end where nothing marks the answer. A student that
# repeats itself for thousands of tokens would otherwise take the whole time limit each time.
_MAX_CHARACTERS = 1000

_ANSWER_MARK = re.compile(r"answer\**\s*[::]\s*\**", re.IGNORECASE)
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_PLAIN_NUMBER = re.compile(r"[\d\s.,/%+-]*")


def math_accuracy(
    completions: Sequence[str | list[dict[str, Any]]],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Whether each completion gives the right answer, judged by math-verify.

    A completion is judged by what follows its last `Answer:`, the form that the paper's prompt asks for, or as a whole
    where it has none. Numbers, fractions, LaTeX and `\boxed{}` are compared by value: `0.5` equals `\frac{1}{2}`.

    Args:
        completions: plain texts, or conversational completions, of which the last message counts.
        solution: the dataset's column of worked solutions or answers.
        answer: the dataset's column of answers. Where a row has both, `answer` is taken, since a worked solution holds
            other numbers too; `solution` is used where `answer` is missing or cannot be read.
        **kwargs: other columns, which TRL passes along; not used.

    Returns:
        1.0 or 0.0 per completion, and `None` where the right answer itself cannot be read as mathematics; such rows
        are named once in a warning.

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
            "Add one, or pass a reward function of your own as `eval_reward_funcs`."
        )
    # Before the loop, so that a missing package is reported for an empty batch too.
    import_extra("math_verify", "eval")
    # It warns that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    nothing: list[Any] = [None] * len(completions)
    rewards: list[float | None] = []
    for completion, *golds in zip(completions, answer or nothing, solution or nothing, strict=True):
        gold = next((parsed for text in golds if (parsed := _parse_gold(text))), None)
        if gold is None:
            _warn_unreadable(*map(repr, golds))
            rewards.append(None)
        else:
            rewards.append(float(_is_correct(_text_of(completion), gold)))
    return rewards


def _text_of(completion: str | list[dict[str, Any]]) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


def _is_correct(completion: str, gold: tuple[Any, ...]) -> bool:
    parsed = _parse(completion)
    if not parsed:
        return False
    # What was read from equal strings is equal; most right answers need no algebra.
    if {part for part in parsed if isinstance(part, str)} & {part for part in gold if isinstance(part, str)}:
        return True
    verify = partial(import_extra("math_verify", "eval").verify, timeout_seconds=None)
    return _limited(verify, list(gold), list(parsed), otherwise=False)


# An evaluation asks for the same right answers again at every evaluation and for every sample of a prompt.
@lru_cache(maxsize=65536)
def _parse_gold(text: Any) -> tuple[Any, ...]:
    return () if text is None else _parse(str(text))


@lru_cache(maxsize=65536)
def _warn_unreadable(answer: str, solution: str) -> None:
    """Warn, once for each pair."""
    logger.warning(
        "A row has no right answer that can be read as mathematics (answer %s, solution %s); it counts neither as "
        "right nor as wrong. Mend it, or pass a reward function of your own as `eval_reward_funcs`.",
        answer,
        solution,
    )


def _parse(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text: expressions, with the string that each was read from; empty for nothing."""
    marks = list(_ANSWER_MARK.finditer(text))
    if not marks:
        # A right answer by itself is short; a whole completion is read as the prose that it is.
        return _parse_marked(text) if len(text) <= 100 else _parse_raw(text[-_MAX_CHARACTERS:])
    tail = text[marks[-1].end() :].strip()[:_MAX_CHARACTERS]
    # The answer is on one line, as the prompt asks; what comes after it is ignored. A line that cannot be read alone
    # (the opening of a displayed formula) is read together with the rest.
    head = tail.split("\n", 1)[0]
    return _parse_marked(head) or _parse_marked(tail)


def _parse_marked(text: str) -> tuple[Any, ...]:
    """Parse a text that is an answer and little else."""
    # A dollar sign of its own is money; two of them, a formula.
    text = text.replace("\\$", "").strip()
    if text.count("$") % 2:
        text = text.replace("$", "")
    text = text.rstrip(".* ")
    readings = [text]
    if not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) and not _PLAIN_NUMBER.fullmatch(text):
        # math-verify reads LaTeX only between delimiters: outside of them `2^{10}` would be 2. Between them, though,
        # a word is a product of its letters, so a text with words is read as text first, or only.
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
    """The time limit is over. Not an `Exception`, which sympy catches in many places."""


def _limited(function: Callable[..., T], *args: Any, otherwise: T) -> T:
    """Call a function of math-verify within the time limit, its own being switched off by the caller.

    Its own gives one alarm only, which is lost where an exception cannot be raised (a callback of the garbage
    collector), and cancels the alarms of others (a watchdog's, a test runner's). Here the alarm is repeated, and a
    previous one is set again. Only the main thread can set one: elsewhere, and on Windows, there is no limit.
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
