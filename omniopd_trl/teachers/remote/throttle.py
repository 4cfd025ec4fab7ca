# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Rate limits: a concurrency that backs off and recovers, requests per minute, tokens per minute."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

MINUTE = 60.0  # seconds


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    """A limit per minute. Below 1, one request is admitted every `1 / per_minute` minutes."""
    if per_minute is None:
        return None
    return AsyncLimiter(max(per_minute, 1.0), MINUTE / min(per_minute, 1.0))


class Throttle:
    """Admits requests, first come, first served.

    Args:
        max_concurrency: requests in flight at once.
        requests_per_minute: `None` for no limit.
        tokens_per_minute: prompt and completion tokens, `None` for no limit.

    `slow_down` halves the concurrency, and no request starts before the wait that the service asked for is over. Each
    full round of successes raises the concurrency by one, up to `max_concurrency`.

    A throttle serves one event loop at a time.
    """

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ):
        self.max_concurrency = max_concurrency
        self.concurrency = max_concurrency
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._successes = 0
        self._slowed_at = float("-inf")
        self._paused_until = float("-inf")
        self._requests = _limiter(requests_per_minute)
        self._tokens = _limiter(tokens_per_minute)
        self._tokens_turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @asynccontextmanager
    async def slot(self, tokens: int, again: bool = False) -> AsyncIterator[float]:
        """Wait for a slot, then hold it.

        Args:
            tokens: expected tokens of the request.
            again: whether the request is a retry. Retries are admitted before new requests, so the oldest work ends
                first.

        Yields:
            Time at which the slot was given, in seconds of the loop's clock, as `slow_down` takes it.
        """
        await self._enter(again)
        try:
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                async with self._turn():  # interleaved parts would delay all waiting requests
                    rest = float(tokens)
                    while rest > 0:  # a request larger than a minute's worth takes several minutes
                        part = min(rest, self._tokens.max_rate)
                        await self._tokens.acquire(part)
                        rest -= part
            loop = asyncio.get_running_loop()
            while (pause := self._paused_until - loop.time()) > 0:
                await asyncio.sleep(pause)
            yield loop.time()
        finally:
            self._leave()

    def _turn(self) -> asyncio.Lock:
        """The lock of the current event loop. A teacher may be used in several loops, one after the other."""
        loop = asyncio.get_running_loop()
        if self._tokens_turn is None or self._tokens_turn[0] is not loop:
            self._tokens_turn = loop, asyncio.Lock()
        return self._tokens_turn[1]

    def slow_down(self, retry_after: float, began: float) -> None:
        """Halve the concurrency after a rate limit, and delay new requests.

        Args:
            retry_after: wait that the service asked for, in seconds; 0 for none.
            began: what `slot` yielded for the request. Rate limits of requests that were in flight together count as
                one.
        """
        now = asyncio.get_running_loop().time()
        if began >= self._slowed_at:
            self.concurrency = max(1, self.concurrency // 2)
            self._slowed_at = now
        self._successes = 0
        self._paused_until = max(self._paused_until, now + retry_after)

    def succeeded(self) -> None:
        """Count a successful request."""
        if self.concurrency == self.max_concurrency:
            return
        self._successes += 1
        if self._successes >= self.concurrency:
            self._successes = 0
            self.concurrency += 1
            self._admit()

    async def _enter(self, again: bool) -> None:
        if self._active < self.concurrency and not self._waiting:
            self._active += 1
            return
        future = asyncio.get_running_loop().create_future()
        if again:
            self._waiting.appendleft(future)
        else:
            self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the slot was given in the same iteration of the loop
                self._leave()
            raise  # `_admit` skips a cancelled future

    def _leave(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._active < self.concurrency:
            future = self._waiting.popleft()
            if not future.cancelled():
                self._active += 1
                future.set_result(None)
