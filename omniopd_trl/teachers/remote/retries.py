# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""When a request is sent again, after how long, and when no more."""

import random
import time

from tenacity import RetryCallState
from tenacity.stop import stop_base

from omniopd_trl.teachers.remote.failures import LEARNED, Failure

# The wait before attempt k + 1 is drawn from [0, min(MAX_BACKOFF, BACKOFF * 2^k)], in seconds.
BACKOFF = 0.5
MAX_BACKOFF = 60.0

# Where time alone bounds the attempts: those that the service may charge for. A server that always answers with
# something unreadable would otherwise be paid for it for ten minutes.
MAX_PAID_ATTEMPTS = 6

# Nothing has begun yet, and somebody may be waiting for the first line: a wrong address is named soon.
PROBE_ATTEMPTS = 6

# From this attempt on, the log says that requests are repeated; at most once in so many seconds.
SAID_FROM_ATTEMPT = 5
SAID_EVERY = 60.0


class RequestFailedError(Exception):
    """An attempt failed in a way that another one may mend, or that concerns this request alone."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


class PaidAttempts(stop_base):
    """Stops a request after so many failed attempts that the service may charge for."""

    def __init__(self, attempts: int):
        self.left = attempts

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        self.left -= isinstance(error, RequestFailedError) and error.failure.may_be_billed
        return self.left <= 0


class AttemptClock(stop_base):
    """Stops a request when its attempts and the waits between them have taken `seconds`; `with` times an attempt."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.busy = 0.0
        self._entered = 0.0

    def __call__(self, retry_state: RetryCallState) -> bool:
        return retry_state.upcoming_sleep >= self.left(retry_state)

    def left(self, retry_state: RetryCallState) -> float:
        return self.seconds - self.busy - retry_state.idle_for

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.busy += time.monotonic() - self._entered


def may_be_repeated(error: BaseException) -> bool:
    return isinstance(error, RequestFailedError) and error.failure.kind not in ("rejected", "one_sample")


def wait_before(state: RetryCallState, left: float) -> float:
    """Exponential backoff with full jitter, in seconds; what the service asked for is the least.

    A wait that would use up the time that is left becomes half of it, so that the time is used before giving up.
    """
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, RequestFailedError) or error.failure.kind in LEARNED:
        return 0.0
    longest = min(MAX_BACKOFF, BACKOFF * 2 ** min(state.attempt_number, 30))  # no float holds 2^1024
    least = error.failure.retry_after or 0.0
    wait = least + random.uniform(0, longest)
    return wait if wait < left or left < BACKOFF else max(least, left / 2)
