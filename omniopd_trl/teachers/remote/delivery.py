# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The time limit of an attempt, and whether a request without an answer reached the service, which may charge it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from omniopd_trl.teachers.remote.failures import causes

# A connection that the service closed while it was idle fails this soon after it is used again, in seconds.
STALE_SECONDS = 1.0

# Errors of the transports before the whole request was sent, for clients without `trace_delivery`.
_BEFORE = {"ConnectError", "ConnectTimeout", "PoolTimeout", "WriteError", "WriteTimeout", "ProxyError"}
_BEFORE |= {"LocalProtocolError", "UnsupportedProtocol"}

_CURRENT: ContextVar["Delivery | None"] = ContextVar("delivery", default=None)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, with more time after this process was stopped, for example by Control-Z or a scheduler.

    When it continues, the limits are over, and answers that have arrived since are not read yet. They are paid for.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    async with asyncio.timeout(None) as limit:

        def end() -> None:
            now = loop.time()
            limit.reschedule(now + min(now - deadline, seconds))

        timer = loop.call_at(deadline, end)
        try:
            yield
        finally:
            timer.cancel()


class Delivery:
    """How far one attempt got. It is created in the task that sends the request."""

    def __init__(self) -> None:
        self._traced = False
        self._on_new_connection = False
        self._to_service = False
        self._sent_at: float | None = None
        self._answered = False
        _CURRENT.set(self)

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """Note an event of the HTTP client; the `trace` extension of a request."""
        self._traced = True
        name = event.partition(".")[2]
        if name.startswith("connect_"):
            self._on_new_connection = True
        elif name == "send_request_headers.started":
            self._to_service = info["request"].method != b"CONNECT"  # otherwise it asks a proxy for a tunnel
        elif name.startswith("send_request_body.") and self._to_service:
            # A time limit may cancel the request right after its last byte is written, which is reported as a failure.
            is_cancelled = isinstance(info.get("exception"), asyncio.CancelledError)
            if name.endswith(".complete") or is_cancelled:
                self._sent_at = time.monotonic()
        elif name == "receive_response_headers.complete" and self._to_service:
            self._answered = True

    def may_have_arrived(self, error: BaseException) -> bool:
        """Whether the service may have received the whole request, and may charge for it.

        Args:
            error: the exception that the attempt ended with.
        """
        if not self._traced:
            return not _names(error) & _BEFORE
        if self._sent_at is None:
            return False
        # An answer whose headers cannot be parsed is an answer.
        answered = self._answered or any(type(e.__context__).__module__.startswith("h11.") for e in causes(error))
        # A service closes connections that are idle. If one is used in this moment, nobody reads the request.
        stale = not (self._on_new_connection or answered) and _names(error) & {"ReadError", "RemoteProtocolError"}
        return not (stale and time.monotonic() - self._sent_at < STALE_SECONDS)


def _names(error: BaseException) -> set[str]:
    """The types of an error and of its causes, by name: no HTTP client is imported for them."""
    return {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}


async def trace_delivery(request: Any) -> None:
    """A hook for the requests of an `httpx2.AsyncClient`: note how far the current attempt gets.

    An attempt has a `time_limit`, and the client needs no limits of its own.
    """
    delivery = _CURRENT.get()
    if delivery is not None:
        request.extensions = {**request.extensions, "trace": delivery.trace, "timeout": {}}
