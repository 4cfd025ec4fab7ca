# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a request without an answer reached the service: what did not is not charged."""

import asyncio
import socket
import time

import httpx2
import pytest

from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.remote import delivery, retries
from omniopd_trl.teachers.remote.delivery import Delivery, time_limit, trace_delivery
from omniopd_trl.teachers.remote.retries import AttemptClock
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.case("A8"), pytest.mark.usefixtures("services")]

ONE_AT_A_TIME = EngineSettings(timeout=5.0, max_concurrency=1)
PREFIXES = [Prefix("3 + 4", " ="), Prefix("3 + 4", " = 7")]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_kept_alive_connection(service):
    """A connection that the service closes as it is used again: the request is repeated, and is not charged."""
    with Loopback(service.answer, lambda number, _: Fault(how="drop") if number == 1 else None) as server:
        teacher = teacher_of(service, server, settings=ONE_AT_A_TIME)
        replies = ask(teacher, *PREFIXES)
    assert [len(reply.rollouts) for reply in replies] == [1, 1]
    assert len(server.requests) == 3
    assert teacher.budget.forfeited_tokens == 0


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_dropped_while_it_is_computed(service, monkeypatch):
    """A connection that breaks later may have been charged for, used again or not."""
    monkeypatch.setattr(delivery, "STALE_SECONDS", 0.05)
    fault = Fault(how="drop")
    with Loopback(service.answer, lambda number, _: fault if number == 1 else None, delay=0.1) as server:
        teacher = teacher_of(service, server, settings=ONE_AT_A_TIME)
        ask(teacher, *PREFIXES)
    assert teacher.budget.forfeited_tokens > 0


def test_stopped_while_an_answer_arrives():
    """A process that is stopped past a limit, as by Control-Z, reads what has arrived: it is not paid for again."""

    async def receive():
        loop = asyncio.get_running_loop()

        def stop():
            service.send(b"answer")
            time.sleep(0.3)  # nothing of this process runs

        loop.call_soon(stop)
        async with time_limit(0.1):
            return await loop.sock_recv(client, 10)

    service, client = socket.socketpair()
    client.setblocking(False)
    with service, client:
        assert asyncio.run(receive()) == b"answer"


def test_the_client_has_no_limits_of_its_own():
    """They would end an attempt after a stop, too."""

    async def send(url):
        async with httpx2.AsyncClient(event_hooks={"request": [trace_delivery]}, timeout=0.01) as client:
            Delivery()
            return await client.post(url, json={"model": "m", "prompt": ""})

    with Loopback(wire.openai, delay=0.2) as server:
        assert asyncio.run(send(f"{server.url}/v1/completions")).status_code == 200


def test_a_stop_uses_up_one_attempt(monkeypatch):
    """An attempt counts at most its limit, so a request is repeated after a stop that is longer than all of them."""
    monkeypatch.setattr(retries.time, "monotonic", iter([0.0, 5000.0]).__next__)
    clock = AttemptClock(600.0, timeout=120.0)
    with clock:
        pass
    assert clock.busy == 120.0


def arrived(url, *, before=0, timeout=5.0, headers=None, **kwargs):
    """Whether the last of `before + 1` requests of one client may have arrived, which has to fail."""

    async def send():
        async with httpx2.AsyncClient(event_hooks={"request": [trace_delivery]}, **kwargs) as client:
            for _ in range(before):
                await client.post(url, json={"model": "m", "prompt": ""})
            attempt = Delivery()
            try:
                async with time_limit(timeout):
                    await client.post(url, json={"model": "m", "prompt": ""}, headers=headers)
            except (httpx2.HTTPError, TimeoutError) as error:
                return attempt.may_have_arrived(error)
            raise AssertionError("answered")

    return asyncio.run(send())


def test_never_sent():
    """No connection, a header that cannot be sent, no free connection, a proxy that opens no tunnel."""
    with Loopback(wire.openai) as server:
        url = f"{server.url}/v1/completions"
        assert not arrived(url, headers={"x": "a\nb"})
        assert not arrived("ftp://127.0.0.1")
        assert not arrived("https://service.invalid/v1", proxy=server.url)
    assert not arrived(url)
    assert server.requests == []


@pytest.mark.parametrize(
    ("fault", "before", "expected"),
    [("drop", 0, True), ("drop", 1, False), ("hang", 0, True), ("hang", 1, True)],
)
def test_sent(fault, before, expected):
    """A new connection that is dropped, and an answer that does not come, may be charged for."""
    with Loopback(wire.openai, lambda number, _: Fault(how=fault) if number == before else None) as server:
        assert arrived(f"{server.url}/v1/completions", before=before, timeout=0.3) is expected


def test_cancelled_as_it_is_sent():
    """A time limit that ends between the last byte and the client's report of it: the service has the request."""

    async def send(url):
        attempt, task = Delivery(), asyncio.current_task()
        note = attempt.trace

        async def trace(event, info):
            if event.endswith("send_request_body.started"):
                asyncio.get_running_loop().call_soon(task.cancel)
            await note(event, info)

        attempt.trace = trace
        async with httpx2.AsyncClient(event_hooks={"request": [trace_delivery]}) as client:
            with pytest.raises(asyncio.CancelledError) as caught:
                await client.post(url, json={"model": "m", "prompt": ""})
        while not server.requests:  # it has all of it
            await asyncio.sleep(0.01)
        return attempt.may_have_arrived(caught.value)

    with Loopback(wire.openai) as server:
        assert asyncio.run(asyncio.wait_for(send(f"{server.url}/v1/completions"), 5.0))


@pytest.mark.parametrize("answer", [b"content-length: 2\r\n\r\n{", b"content-length: -5\r\n\r\n{}"])
def test_answer_that_breaks_off(answer):
    """The answer had begun, so it was computed, also on a connection that was used again."""

    async def serve(reader, writer):
        for part in (b"content-length: 2\r\n\r\n{}", answer):
            await reader.readuntil(b"}")
            writer.write(b"HTTP/1.1 200 OK\r\n" + part)
        await writer.drain()
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await asyncio.to_thread(arrived, url, before=1)

    assert asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "expected"), [("WriteError", False), ("PoolTimeout", False), ("ReadError", True), ("Bug", True)]
)
def test_a_client_without_the_hook(kind, expected):
    """The name of the transport's error decides."""
    attempt, error = Delivery(), RuntimeError()
    error.__cause__ = type(kind, (Exception,), {})()
    assert attempt.may_have_arrived(error) is expected
