# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Read a mathematical answer and compare it with the right one.

    python -m omniopd_trl.evals.reading SECONDS BYTES

reads answers from its standard input, one JSON line each. Hostile answers (towers of powers, huge factorials, hundreds
of brackets) take any time and memory, also inside code that no exception can stop. The process therefore limits
itself: the kernel ends it after SECONDS for one answer, and it cannot hold more than BYTES. [`workers`] starts it.
"""

import json
import logging
import os
import re
import signal
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import math_verify

from omniopd_trl.evals.numbers import PlainNumber, number_in, plain_number
from omniopd_trl.evals.workers import Reading

# Maximum number of characters that are searched for an answer, taken from the end if no mark precedes the answer.
# Otherwise a student that repeats itself for thousands of tokens would use up the time limit each time.
_MAX_CHARACTERS = 1000

_ANSWER_MARK = re.compile(r"answer\**\s*:\s*\**", re.IGNORECASE)
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+")
_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{2,}")
_PLAIN_NUMBER = re.compile(r"[\d\s.,/%+-]*")
# Between the solutions of an equation, and one of them.
_SEPARATOR = re.compile(r"\s*(?:[,;]\s*)?(?:\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b)\s*|\s*(?:;|,(?!\d{3}\b))\s*")
_SOLUTION = re.compile(r"(?:([^\W\d_])(?:_\{?\w\}?)?\s*=)?([^=]*)")
_FOREIGN = re.compile(r"[^\W\D0-9]|[\u066b\u066c\uff01-\uff5e]")


@dataclass(frozen=True)
class _Gold:
    """A right answer: the expressions that math-verify finds, and the number if it is a plain one."""

    parsed: tuple[Any, ...]
    number: PlainNumber | None


def read(completion: str, golds: list[str | None], lenient: bool) -> Reading:
    """Read the answer of a completion, and compare it with the first right answer that can be parsed.

    Args:
        completion: the text.
        golds: texts with the right answer, in order of precedence.
        lenient: see [`math_accuracy`].
    """
    # A draft inside of a model's thoughts is no answer.
    completion = _FOREIGN.sub(_ascii, completion.rpartition("</think>")[2])
    gold = next((gold for text in golds if text is not None and (gold := _parse_gold(text))), None)
    if gold is None:
        return Reading(None)
    if gold.number is not None:
        number = _number_of(completion)
        if number is not None and gold.number.equals(number, lenient):
            # In one form, in which right answers are equal texts: `50%` is 50 or 0.5.
            return Reading(1.0, str(min(gold.number.values)))
        if number is not None and (lenient or number.is_reduced or gold.number.is_fraction):
            return Reading(0.0, str(min(number.values)))
        if not lenient:
            return Reading(0.0)  # `74/2` is a calculation
    parsed: tuple[Any, ...] = ()
    for lists in (False, True) if lenient else (True,):
        found = _parse(completion, lists)
        if found and _equals(gold, found):
            return Reading(1.0, _comparable(found))
        parsed = parsed or found
    return Reading(0.0, _comparable(parsed)) if parsed else Reading(0.0)


def _equals(gold: _Gold, parsed: tuple[Any, ...]) -> bool:
    # Equal strings have equal values. Most right answers need no algebra.
    if {part for part in parsed if isinstance(part, str)} & {part for part in gold.parsed if isinstance(part, str)}:
        return True
    return bool(math_verify.verify(list(gold.parsed), list(parsed), timeout_seconds=None))


def _comparable(parsed: tuple[Any, ...]) -> str:
    """Expressions as a text: a number by its value, and anything else as it was written."""
    source = next((part for part in parsed if isinstance(part, str)), "")
    number = plain_number(source)
    return source if number is None or number.has_words else str(min(number.values))


def _number_of(text: str) -> PlainNumber | None:
    """The plain number that a completion or a right answer gives; `None` if it gives anything else."""
    marked = _marked(text)
    if marked is not None:
        text = marked.split("\n", 1)[0]
    # A line that consists of one number. A line without a mark may hold other numbers, and a mark may be followed by a
    # displayed formula: what math-verify finds there must be a number.
    if len(text) <= _MAX_CHARACTERS and (number := plain_number(text)) is not None:
        # A letter beside a number is a unit or a variable: `37 m`, `37x`.
        return number if not number.has_words or _is_constant(_parse_marked(_TEXT.sub(r"\1", text))) else None
    if marked is not None and re.search(r"\d", text):
        return None
    text = text if marked is None else marked
    source = next((part for part in _parse(text, lists=True) if isinstance(part, str)), "")
    places = [*re.finditer(rf"(?<!\d)(?<!\d[.,]){re.escape(source)}(?!\d)", text)] if source else []
    return number_in(source, text[: places[-1].start()], text[places[-1].end() :]) if places else plain_number(source)


def _is_constant(parsed: tuple[Any, ...]) -> bool:
    """Whether no expression has a variable, apart from the one that it defines (`x = 37`)."""
    sides = (getattr(part, "rhs", part) for part in parsed)
    return not any(getattr(side, "free_symbols", None) for side in sides)


# The same right answers are parsed at every evaluation and for every sample of a prompt.
@lru_cache(maxsize=65536)
def _parse_gold(text: str) -> _Gold | None:
    text = _FOREIGN.sub(_ascii, text)
    parsed = _parse(text, lists=True)
    return _Gold(parsed, _number_of(text)) if parsed else None


def _parse(text: str, lists: bool = False) -> tuple[Any, ...]:
    """The expressions that math-verify finds in a text, each with its source string. Empty if there are none.

    Args:
        text: a completion or a right answer.
        lists: whether `x = 1 or x = 2` is a list. math-verify reads one of its numbers.
    """
    tail = _marked(text)
    if tail is None:
        # A right answer alone is short. A longer text is parsed as prose.
        return _parse_marked(text, lists) if len(text) <= 100 else _parse_raw(text[-_MAX_CHARACTERS:])
    # The prompt requests the answer on one line, and later lines are ignored. A line that cannot be parsed alone (the
    # opening of a displayed formula) is parsed together with the rest.
    head = tail.split("\n", 1)[0]
    return _parse_marked(head, lists) or _parse_marked(tail, lists)


def _marked(text: str) -> str | None:
    """The text after the last mark of an answer; `None` without a mark."""
    marks = list(_ANSWER_MARK.finditer(text))
    return text[marks[-1].end() :].strip()[:_MAX_CHARACTERS] if marks else None


def _parse_marked(text: str, lists: bool = False) -> tuple[Any, ...]:
    """Parse a text that consists of an answer and little else."""
    if lists:
        text = _solutions(text)
    # A single dollar sign is a currency, a pair delimits a formula.
    text = text.replace("\\$", "").strip()
    if text.count("$") % 2:
        text = text.replace("$", "")
    text = text.rstrip(".* ")
    readings = [text]
    if not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) and not _is_one_number(text):
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


def _solutions(text: str) -> str:
    """`x = 1 or x = 2` as `1, 2`, the form of a list that math-verify reads. Other texts as they are."""
    boxed = (
        text.strip().rstrip(".").removeprefix("\\boxed{").removesuffix("}") if text.startswith("\\boxed{") else text
    )
    parts = _SEPARATOR.split(boxed.replace("$", "").strip().rstrip(". "))
    found = [_SOLUTION.fullmatch(part) for part in parts]
    names = {one[1] for one in found if one and one[1]}
    is_list = len(parts) > 1 and all(one and one[2].strip() for one in found) and len(names) <= 1
    if not is_list or not (names or re.search(r"\b(?:or|and)\b", boxed)):
        return text
    values = [one[2].strip() for one in found if one]
    has_words = any(_WORD.search(_LATEX_COMMAND.sub("", value)) for value in values)
    return text if has_words else ", ".join(values)


def _is_one_number(text: str) -> bool:
    """Whether a text without letters is no list, of which math-verify would read one number: `1,234`, not `1, 2`."""
    return bool(_PLAIN_NUMBER.fullmatch(text)) and ("," not in text or plain_number(text) is not None)


def _ascii(found: re.Match[str]) -> str:
    """A digit of another script, an Arabic separator of decimals or thousands, or a full-width form of ASCII."""
    if "\uff01" <= found[0] <= "\uff5e":
        return chr(ord(found[0]) - 0xFEE0)
    return {"\u066b": ".", "\u066c": ","}.get(found[0]) or str(int(found[0]))


def _parse_raw(text: str) -> tuple[Any, ...]:
    return tuple(math_verify.parse(text, parsing_timeout=None))


def _serve(seconds: float, most_bytes: int) -> None:
    """Answer each line of the standard input with a line, until its end."""
    timer = partial(signal.setitimer, signal.ITIMER_REAL) if os.name == "posix" else lambda _: None
    if os.name == "posix":
        # The default action of the alarm ends the process. Another action and a mask may be inherited.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    _parse("$1$")  # builds the parsers
    answers = os.fdopen(os.dup(1), "w")
    answers.write("ready\n")
    answers.flush()
    # What a parser prints must not get between the answers, nor into the caller's terminal.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        completion, golds, lenient = json.loads(line)
        timer(seconds)
        try:
            reading = read(completion, golds, lenient)
        except Exception as error:  # the text of a model may be anything; the caller names it
            reading = Reading(0.0, problem=f"{type(error).__name__}: {error!s:.200}")
        timer(0)
        answers.write(json.dumps(reading) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
