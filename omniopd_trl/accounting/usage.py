# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens that requests used, and where they are counted and kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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


@dataclass(frozen=True)
class KeptAnswers:
    """The answers that are kept for one prefix, and where new ones are kept.

    Attributes:
        found: the answers of an earlier run, which are paid for and counted. Each is the first sample that it was
            asked for, how many samples it settles, and those that it has, as JSON gives them back.
        keep: takes the same three values of a new answer, with samples that JSON can hold, and then the usage and the
            US dollars (`None` without a price) of its request. It keeps the answer and counts the request, both or
            neither.
    """

    found: Sequence[tuple[int, int, Any]]
    keep: Callable[[int, int, Any, Usage, float | None], None]


class Ledger(Protocol):
    """Where a teacher accounts for its requests: what was paid, what is in flight, which answers are kept.

    Its methods are called in the event loop of the teacher, and an error that one raises is the request's.
    """

    def paid(self, usage: Usage, usd: float | None) -> None:
        """Count one request, as soon as it is known what it used.

        Args:
            usage: tokens used; for a request that may have been charged for without an answer, its worst case.
            usd: US dollars; `None` without a price.
        """

    def in_flight(self, tokens: int, usd: float | None) -> None:
        """Note the most that requests in flight can cost, before they are sent.

        Called with the peak in-flight cost since the queue was last empty, before a request is admitted; and with 0
        tokens when the last request has ended. What a killed process had in flight is never more.

        Args:
            tokens: prompt and completion tokens, of all requests in flight together.
            usd: US dollars; `None` without a price.
        """

    def answers(self, request: str) -> KeptAnswers:
        """The answers that are kept for one prefix. Keeps none, and counts each request, unless overridden.

        Args:
            request: a name for all that decides the samples of the prefix. A second call with the same name asks for
                the answers of another prefix that is equal.
        """
        return KeptAnswers((), lambda start, size, samples, usage, usd: self.paid(usage, usd))


class NoLedger(Ledger):
    """Records nothing."""

    def paid(self, usage: Usage, usd: float | None) -> None:
        return

    def in_flight(self, tokens: int, usd: float | None) -> None:
        return


NO_LEDGER: Ledger = NoLedger()
