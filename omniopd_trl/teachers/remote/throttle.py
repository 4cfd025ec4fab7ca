# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""How fast requests go out: concurrency that backs off and recovers, and requests and tokens per minute."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

MINUTE = 60.0  # seconds


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    """So many per minute; one in several minutes where it is less than one, as nobody can send a part of a request."""
    if per_minute is None:
        return None
    return AsyncLimiter(max(per_minute, 1.0), MINUTE / min(per_minute, 1.0))


class Throttle:
    """Lets requests through, first come, first served.

    Args:
        max_concurrency: requests in flight at once.
        requests_per_minute: `None` for no limit.
        tokens_per_minute: prompt and completion tokens, `None` for no limit.

    After `slow_down`, half as many requests run at once, and none starts before the wait that the service asked for
    is over. Each full round of successes lets one more run, until `max_concurrency` is reached again.

    A throttle serves one event loop.
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
        """Wait for a place, then hold it.

        Args:
            tokens: what the request is expected to use.
            again: a repeated request goes before those that have not been sent at all, so that the oldest work ends
                first.

        Yields:
            When the place was given, in seconds of the loop's clock; `slow_down` wants to know.
        """
        await self._enter(again)
        try:
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                async with self._turn():  # or the parts of all that wait would take turns, and all be late
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
        """A lock belongs to one loop, and a teacher may be asked in one after the other."""
        loop = asyncio.get_running_loop()
        if self._tokens_turn is None or self._tokens_turn[0] is not loop:
            self._tokens_turn = loop, asyncio.Lock()
        return self._tokens_turn[1]

    def slow_down(self, retry_after: float, began: float) -> None:
        """A service said that it is asked too much.

        Args:
            retry_after: seconds that it wants to be left alone; 0 when it named none.
            began: what `slot` yielded for the request. Refusals of requests that were in flight together say the same
                thing, and count as one.
        """
        now = asyncio.get_running_loop().time()
        if began >= self._slowed_at:
            self.concurrency = max(1, self.concurrency // 2)
            self._slowed_at = now
        self._successes = 0
        self._paused_until = max(self._paused_until, now + retry_after)

    def succeeded(self) -> None:
        """A request was answered."""
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
            if not future.cancelled():  # the place was given in the same turn of the loop
                self._leave()
            raise  # a cancelled future is passed over when its turn comes

    def _leave(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._active < self.concurrency:
            future = self._waiting.popleft()
            if not future.cancelled():
                self._active += 1
                future.set_result(None)
