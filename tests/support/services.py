# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A remote teacher whose service runs in the test's process."""

import asyncio

import pytest

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.teachers.remote import retries
from omniopd_trl.teachers.remote.answers import Response, Sample
from omniopd_trl.teachers.remote.engine import RemoteTeacher
from omniopd_trl.teachers.remote.failures import Failure
from omniopd_trl.teachers.remote.settings import Capabilities, EngineSettings
from tests.support.loopback.teachers import SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)

RATE_LIMITED = Failure("rate_limited", "too often")
TRANSIENT = Failure("transient", "a moment")
FINAL = Failure("final", "the key was refused")


class FailedError(Exception):
    """The error of the scripted service's SDK."""

    def __init__(self, failure):
        self.failure = failure


class Scripted(RemoteTeacher):
    """A service in this process: a request is answered after `delay`, or fails with `fault(number, prefix)`."""

    def __init__(self, *, fault=None, delay=0.0, most=8, price=None, max_tokens=None, capabilities=None, **settings):
        self.fault = fault
        self.delay = delay
        self.seen = []
        self.active = 0
        self.most = 0
        super().__init__(
            "scripted:model",
            capabilities or Capabilities("raw", samples_per_request=4),
            EngineSettings(max_concurrency=most, **settings),
            Budget(max_tokens=max_tokens, price=price),
        )

    def connect(self):
        return None  # there is nothing to connect to

    async def request(self, prefix, num_samples, request):
        number = len(self.seen)
        self.seen.append((prefix.completion, num_samples, request))
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(self.delay(prefix) if callable(self.delay) else self.delay)
            failure = self.fault(number, prefix) if self.fault is not None else None
            if isinstance(failure, Exception):
                raise failure
            if failure is not None:
                raise FailedError(failure)
            samples = tuple(Sample(f"{prefix.completion}-{i}", "length") for i in range(num_samples))
            return Response(samples, Usage(10, 4, 2 * num_samples))
        finally:
            self.active -= 1

    def classify(self, error):
        return error.failure if isinstance(error, FailedError) else None


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Backoff in milliseconds: every retry happens, none is waited for."""
    monkeypatch.setattr(retries, "BACKOFF", 0.002)
