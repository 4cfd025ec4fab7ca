# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Remote teachers with loopback servers as services, and their keys."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from omniopd_trl.teachers.base import REQUEST_MILLISECONDS, Prefix, SamplingRequest, TeacherReply
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote import retries
from omniopd_trl.teachers.remote.engine import RemoteTeacher
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import wire
from tests.support.loopback.server import Loopback

KEYS = {
    "OPENAI_API_KEY": "sk-proj-4Fz8QmTnW2bLxVYc",
    "VLLM_API_KEY": "token-9dK2mQeRtZ",
    "ANTHROPIC_API_KEY": "sk-ant-api03-Hq7LpXw5Ns",
    "GOOGLE_API_KEY": "AIzaSyB8vN3kQ2rTxWm",
}


@dataclass(frozen=True)
class Service:
    """One provider, for tests of all providers.

    Attributes:
        name: name of the teacher.
        answer: function that returns the answers of the service.
        error: function from status and message to the JSON of an error.
        path: path that is appended to the server's URL.
        key: environment variable of the key.
    """

    name: str
    answer: Callable[[str, dict[str, Any]], dict[str, Any]]
    error: Callable[..., dict[str, Any]]
    path: str
    key: str


SERVICES = [
    Service("vllm:teacher", wire.openai, wire.openai_error, "/v1", "VLLM_API_KEY"),
    Service("openai:gpt-6-luna", wire.openai, wire.openai_error, "/v1", "OPENAI_API_KEY"),
    Service("anthropic:claude-haiku-4-5", wire.anthropic, wire.anthropic_error, "", "ANTHROPIC_API_KEY"),
    Service("gemini:gemini-2.5-flash-lite", wire.gemini, wire.gemini_error, "", "GOOGLE_API_KEY"),
]


@pytest.fixture
def services(monkeypatch) -> None:
    """Set invalid keys, no proxy, and a backoff in milliseconds: retries happen without long waits."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "BACKOFF", 0.002)


class ControlC(threading.Thread):
    """Control-C in the main thread, once a server has received a request.

    Attributes:
        at: its time, as `time.monotonic` gives it.
    """

    def __init__(self, server: Loopback):
        super().__init__(daemon=True)
        self.server = server
        self.at = float("inf")
        self.start()

    def run(self) -> None:
        while not self.server.requests:
            time.sleep(0.02)
        time.sleep(0.1)
        self.at = time.monotonic()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def teacher_of(service: Service, server: Loopback, **kwargs: Any) -> RemoteTeacher:
    """The teacher of a service, connected to a loopback server."""
    kwargs.setdefault("settings", EngineSettings(timeout=5.0))
    return remote_teacher(service.name, base_url=server.url + service.path, **kwargs)


def ask(
    teacher: RemoteTeacher, *prefixes: Prefix, num_samples: int = 1, max_tokens: int = 70, **kwargs: Any
) -> list[TeacherReply]:
    """Sample in a new event loop, and close the teacher."""
    request = SamplingRequest(num_samples, max_tokens, **kwargs)

    async def run() -> list[TeacherReply]:
        try:
            return await teacher.sample(prefixes, request)
        finally:
            await teacher.aclose()

    return asyncio.run(run())


def counts_of(reply):
    """The outcomes of a reply without their time, which differs from run to run."""
    assert reply.outcomes[REQUEST_MILLISECONDS] >= 0
    return {name: count for name, count in reply.outcomes.items() if name != REQUEST_MILLISECONDS}
