# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Retries: which errors are retried, after which wait, and when a request is given up."""

import random
import time
from collections.abc import Callable

from tenacity import RetryCallState
from tenacity.stop import stop_base

from omniopd_trl.teachers.remote.failures import LEARNED, Failure

# The wait before attempt k + 1 is drawn from [0, min(MAX_BACKOFF, BACKOFF * 2^k)], in seconds.
BACKOFF = 0.5
MAX_BACKOFF = 60.0

# Limit on attempts that may be charged, when `max_attempts` is not set. Without it, a server whose answers cannot be
# read would be paid for ten minutes.
MAX_PAID_ATTEMPTS = 6

# Attempts of a request in batches, when `max_attempts` is not set. Each may take a day.
BATCH_ATTEMPTS = 3

# Attempts of the probe, and the limits of one attempt and of all of them, in seconds. A wrong address is reported
# within half a minute, and a server that never answers within two minutes.
PROBE_ATTEMPTS = 6
PROBE_TIMEOUT = 30.0
PROBE_SECONDS = 120.0

# Retries are logged from this attempt on, at most once in this many seconds.
SAID_FROM_ATTEMPT = 5
SAID_EVERY = 60.0


class RequestFailedError(Exception):
    """An attempt failed, and either another one may succeed or only this request is affected."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


def failure_in(state: RetryCallState) -> Failure | None:
    """The failure of an attempt; `None` if it ended otherwise."""
    error = state.outcome.exception() if state.outcome is not None else None
    return error.failure if isinstance(error, RequestFailedError) else None


class Attempts(stop_base):
    """Stops a request after some failed attempts.

    Args:
        most: number of failed attempts.
        counts: whether an attempt with this failure is one of them.
    """

    def __init__(self, most: int, counts: Callable[[Failure], bool]):
        self.left = most
        self.counts = counts

    def __call__(self, retry_state: RetryCallState) -> bool:
        failure = failure_in(retry_state)
        self.left -= failure is not None and self.counts(failure)
        return self.left <= 0


def stop_after(most: int | None) -> stop_base:
    """Stops a request after two denials, and after its failed attempts.

    Args:
        most: number of failed attempts. A refused field does not count: the next attempt differs. `None` for
            `MAX_PAID_ATTEMPTS` that may be charged.
    """
    limit = (
        Attempts(MAX_PAID_ATTEMPTS, lambda failure: failure.may_be_billed)
        if most is None
        else Attempts(most, lambda failure: failure.kind not in LEARNED)
    )
    return Attempts(2, lambda failure: failure.kind == "denied") | limit


class AttemptClock(stop_base):
    """Stops a request when its attempts and the waits between them have taken `seconds`; `with` times an attempt.

    An attempt counts at most its `timeout`: it takes longer only when this process was stopped.
    """

    def __init__(self, seconds: float, timeout: float):
        self.seconds = seconds
        self.timeout = timeout
        self.busy = 0.0
        self._entered = 0.0

    def __call__(self, retry_state: RetryCallState) -> bool:
        return retry_state.upcoming_sleep >= self.left(retry_state)

    def left(self, retry_state: RetryCallState) -> float:
        return self.seconds - self.busy - retry_state.idle_for

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.busy += min(time.monotonic() - self._entered, self.timeout)


def may_be_repeated(error: BaseException) -> bool:
    return isinstance(error, RequestFailedError) and error.failure.kind not in ("rejected", "one_sample")


def wait_before(state: RetryCallState, left: float) -> float:
    """Exponential backoff with full jitter, in seconds, added to the wait that the service asked for.

    A wait that would use up the remaining time is reduced to half of it, so there is time for another attempt.
    """
    failure = failure_in(state)
    if failure is None or failure.kind in LEARNED:
        return 0.0
    longest = min(MAX_BACKOFF, BACKOFF * 2 ** min(state.attempt_number, 30))  # 2^1024 overflows a float
    least = failure.retry_after or 0.0
    wait = least + random.uniform(0, longest)
    return wait if wait < left or left < BACKOFF else max(least, left / 2)
