# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How much of a completion repeats its prompt, and which rollouts repeat what only the teacher saw."""

import re
from collections.abc import Sequence

RUN = 3  # words

# A number with its sign, unless something is subtracted, or a word. A number in LaTeX is one as well: \boxed{-37}.
_WORD = re.compile(r"(?:(?<![\w)\]}])-)?\d+(?:[.,]\d+)*|\w+")


def copied_share(prompt: str, completion: str) -> float:
    """Share of a completion's words that are in a run of three or more words of the prompt.

    A student that is rewarded for agreement may learn to repeat the question, on which every teacher agrees. pass@1
    alone does not show it.

    Args:
        prompt: the prompt.
        completion: the completion.

    Returns:
        A number in [0, 1]; 0 for a completion without words. Words are separated by white space, and case is ignored.

    Example:
        >>> copied_share("What is 16 - 53 ?", "16 - 53 = -37")
        0.6
    """
    words = completion.lower().split()
    runs = _runs(prompt.lower().split(), RUN)
    copied = bytearray(len(words))
    for start in range(len(words) - RUN + 1):
        if tuple(words[start : start + RUN]) in runs:
            copied[start : start + RUN] = b"\x01" * RUN
    return sum(copied) / len(words) if words else 0.0


def num_quotes(context: str, rollouts: Sequence[str], seen: str) -> int:
    """How many rollouts quote the context that only the teacher saw.

    A rollout quotes it if it has a run of three or more words of the context that the student has not seen. A context
    of fewer words, such as a number, is quoted if the rollout has all of it.

    Args:
        context: what only the teacher saw.
        rollouts: what the teacher wrote.
        seen: the prompt and the student's text so far. What it holds is no quotation.

    Returns:
        A number from 0 to `len(rollouts)`. Words are letters and digits, numbers have a sign, and case is ignored.

    Example:
        >>> num_quotes("-37", ["16 - 53 = -37", "= 37", "= -37.5"], "What is 16 - 53?")
        1
    """
    words = _WORD.findall(context.lower())
    size = min(RUN, len(words))
    runs = _runs(words, size) - _runs(_WORD.findall(seen.lower()), size)
    return sum(not runs.isdisjoint(_runs(_WORD.findall(text.lower()), size)) for text in rollouts)


def _runs(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
