# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How fast requests go out: concurrency that backs off and recovers, and requests and tokens per minute."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter


class Throttle:
    """Lets requests through, first come, first served.

    Args:
        max_concurrency: requests under way at once.
        requests_per_minute: `None` for no limit.
        tokens_per_minute: prompt and completion tokens, `None` for no limit.

    After `slow_down`, half as many requests run at once, and none starts before the wait that the service asked for
    is over. Each full round of successes lets one more run, until `max_concurrency` is reached again.
    """

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ):
        self.max_concurrency = max_concurrency
        self.concurrency = max_concurrency
        self._permits = asyncio.Semaphore(max_concurrency)
        self._owed = 0  # permits to be withheld when they are given back
        self._successes = 0
        self._paused_until = 0.0
        self._requests = None if requests_per_minute is None else AsyncLimiter(max(requests_per_minute, 1.0), 60)
        self._tokens = None if tokens_per_minute is None else AsyncLimiter(tokens_per_minute, 60)

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[None]:
        """Wait for a place, then hold it; `tokens` is what the request is expected to use."""
        await self._permits.acquire()
        try:
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                # A request larger than a minute's worth would wait forever; it takes all of it.
                await self._tokens.acquire(min(tokens, self._tokens.max_rate))
            while (pause := self._paused_until - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(pause)
            yield
        finally:
            if self._owed:
                self._owed -= 1
            else:
                self._permits.release()

    def slow_down(self, retry_after: float) -> None:
        """A service said that it is asked too much; `retry_after` in seconds, 0 when it named no wait."""
        now = asyncio.get_running_loop().time()
        if now >= self._paused_until:  # answers to requests that were under way together count as one
            withheld = self.concurrency - max(1, self.concurrency // 2)
            self.concurrency -= withheld
            self._owed += withheld
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
            if self._owed:
                self._owed -= 1
            else:
                self._permits.release()
