# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens that requests used, and where they are counted and kept."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used, as the teacher counts them.

    Attributes:
        prompt_tokens: tokens of the prompts, cached ones included.
        cached_tokens: how many of `prompt_tokens` were served from a cache.
        completion_tokens: tokens written, over all samples.
        reasoning_tokens: how many of `completion_tokens` were hidden reasoning.
        cache_write_tokens: how many of `prompt_tokens` were written to a cache, where a service charges for that.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
        )


# Called with what each request used and what it cost in US dollars (`None` without a price), as soon as it is known. A
# context variable, so that whoever starts an audit meters it, through however many tasks it is split.
METER: ContextVar[Callable[[Usage, float | None], None]] = ContextVar("meter")


@dataclass(frozen=True)
class KeptAnswers:
    """What was answered so far of all samples of one prefix, and where more is kept.

    Attributes:
        found: of each answer of an earlier run, the first sample that it was asked for, how many samples it settles,
            and those that it has, as JSON gives back what was kept. They are paid for and counted.
        keep: takes the same of a new answer, as something that JSON can hold, with what its request used and cost in
            US dollars (`None` without a price). It keeps the answer and tells the meter, both or neither.
    """

    found: Sequence[tuple[int, int, Any]]
    keep: Callable[[int, int, Any, Usage, float | None], None]


# Called with a name for all that decides the samples of a prefix. Set where answers are kept one by one until their
# audit is finished; who does not ask it is metered as above, and loses the answers of an audit that is cut off.
ANSWERS: ContextVar[Callable[[str], KeptAnswers]] = ContextVar("answers")
