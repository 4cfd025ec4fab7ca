# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Token usage of requests, and the ledger that records it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Protocol

from omniopd_trl.errors import TeacherError

# The journal stores 64-bit integers.
_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used, as the teacher counts them.

    Attributes:
        prompt_tokens: tokens of the prompts, cached ones included.
        cached_tokens: how many of `prompt_tokens` were served from a cache.
        completion_tokens: generated tokens, over all samples.
        reasoning_tokens: how many of `completion_tokens` were hidden reasoning.
        cache_write_tokens: how many of `prompt_tokens` were written to a cache. 0 if the service does not charge for
            it.

    Raises:
        TeacherError: when a number is not a whole number of at least 0. NaN would disable a budget for good.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:  # the integers of numpy and torch are counts, too
                try:
                    value = index(value)
                except TypeError:
                    value = -1
                else:
                    object.__setattr__(self, field.name, value)
            if not 0 <= value < _LIMIT:
                raise TeacherError(
                    f"A teacher used {field.name}={getattr(self, field.name)!r:.80}, which is not a whole number from "
                    "0 to 2^63 - 1. Count tokens as integers, and 0 where they are not known."
                )

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
    """The stored answers for one prefix, and a function that stores new ones.

    Attributes:
        found: answers of an earlier run, already paid and counted. Each is a tuple: index of the first requested
            sample, number of samples that the answer covers, and the returned samples as decoded from JSON.
        keep: called with the same three values of a new answer, whose samples must be JSON-serializable, and with the
            usage and the US dollars (`None` without a price) of its request. Stores the answer and counts the request
            in one transaction.
    """

    found: Sequence[tuple[int, int, Any]]
    keep: Callable[[int, int, Any, Usage, float | None], None]


class Ledger(Protocol):
    """Records the requests of a teacher: what was paid, what is in flight, and which answers are stored.

    Its methods are called in the event loop of the teacher. An error that a method raises fails the request.
    """

    def paid(self, usage: Usage, usd: float | None) -> None:
        """Count one request, as soon as its usage is known.

        Args:
            usage: tokens used. The worst case for a request without an answer that may have been charged.
            usd: US dollars. `None` without a price.
        """

    def in_flight(self, tokens: int, usd: float | None) -> None:
        """Record the most that the requests in flight can cost, before they are sent.

        Called with the peak in-flight cost since the queue was last empty, before a request is admitted. Called with 0
        tokens when the last request has ended. This bounds the in-flight cost of a killed process.

        Args:
            tokens: prompt and completion tokens, summed over all requests in flight.
            usd: US dollars. `None` without a price.
        """

    def answers(self, request: str) -> KeptAnswers:
        """The stored answers for one prefix. The default stores none and only counts each request.

        Args:
            request: key of everything that determines the samples of the prefix. A second call with the same key
                refers to another, equal prefix.
        """
        return KeptAnswers((), lambda start, size, samples, usage, usd: self.paid(usage, usd))


class Tally(Ledger):
    """Adds up what requests cost, and passes each on to another ledger.

    Args:
        ledger: the other ledger.

    Attributes:
        usd: US dollars of the requests so far; `None` when none of them has had a price.
    """

    def __init__(self, ledger: Ledger):
        self.usd: float | None = None
        self._ledger = ledger

    def paid(self, usage: Usage, usd: float | None) -> None:
        self._ledger.paid(usage, usd)
        self._add(usd)

    def in_flight(self, tokens: int, usd: float | None) -> None:
        self._ledger.in_flight(tokens, usd)

    def answers(self, request: str) -> KeptAnswers:
        kept = self._ledger.answers(request)

        def keep(start: int, size: int, samples: Any, usage: Usage, usd: float | None) -> None:
            kept.keep(start, size, samples, usage, usd)
            self._add(usd)

        return KeptAnswers(kept.found, keep)

    def _add(self, usd: float | None) -> None:
        if usd is not None:
            self.usd = (self.usd or 0.0) + usd


class NoLedger(Ledger):
    """Records nothing."""

    def paid(self, usage: Usage, usd: float | None) -> None:
        return

    def in_flight(self, tokens: int, usd: float | None) -> None:
        return


NO_LEDGER: Ledger = NoLedger()
