# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The question at the start: it names a wrong address, has short time limits, and ends with Control-C."""

import time

import pytest

from omniopd_trl.errors import NoRolloutError, TeacherError
from omniopd_trl.teachers.remote import engine, retries
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import SERVICES, ControlC, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("services")

VLLM = SERVICES[0]


@pytest.mark.case("A9")
@pytest.mark.parametrize("how", ["nobody", "404", "405", "html"])
def test_a_wrong_address(how):
    """It says so and names the address or the setting; another prompt or model would not help."""
    faults = {
        "404": Fault(404, {"detail": "Not Found"}),
        "405": Fault(405, {"detail": "Method Not Allowed"}),
        "html": Fault(200, "<html>welcome</html>", {"content-type": "text/html"}),
    }
    with Loopback(wire.openai, lambda *_: faults.get(how)) as server:
        if how != "nobody":
            with pytest.raises(TeacherError, match="teacher_base_url") as caught:
                teacher_of(VLLM, server).probe("3 + 4")
    if how == "nobody":
        with pytest.raises(TeacherError, match=f"no connection to {server.url}/v1.*teacher_base_url") as caught:
            teacher_of(VLLM, server).probe("3 + 4")
    assert "another" not in str(caught.value)
    assert not isinstance(caught.value, NoRolloutError)


@pytest.mark.case("A3")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_control_c(service):
    """It ends the question at once where the server never answers."""
    with Loopback(service.answer, lambda *_: Fault(how="hang")) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=60))
        interruption = ControlC(server)
        with pytest.raises(KeyboardInterrupt):
            teacher.probe("3 + 4")
        assert time.monotonic() - interruption.at < 1
    assert len(server.requests) == 1
    assert teacher.settings.timeout == 60


@pytest.mark.case("A3")
def test_control_c_while_it_waits(monkeypatch):
    """The same between two attempts."""
    monkeypatch.setattr(retries, "BACKOFF", 100.0)
    with Loopback(wire.openai, lambda *_: Fault(500)) as server:
        teacher = teacher_of(VLLM, server)
        interruption = ControlC(server)
        with pytest.raises(KeyboardInterrupt):
            teacher.probe("3 + 4")
        assert time.monotonic() - interruption.at < 1


@pytest.mark.case("A3")
def test_its_own_time_limits(monkeypatch):
    """An attempt ends before teacher_timeout, and all attempts together before teacher_max_seconds."""
    with Loopback(wire.openai) as server:
        teacher_of(VLLM, server).probe("3 + 4")  # imports the SDK, which takes longer than these limits
    monkeypatch.setattr(engine, "PROBE_TIMEOUT", 0.2)
    monkeypatch.setattr(engine, "PROBE_SECONDS", 0.7)
    with Loopback(wire.openai, lambda *_: Fault(how="hang")) as server:
        teacher = teacher_of(VLLM, server, settings=EngineSettings(timeout=60))
        began = time.monotonic()
        with pytest.raises(TeacherError, match=r"did not answer: no answer within 0\.2 s, the probe's own limit"):
            teacher.probe("3 + 4")
        assert time.monotonic() - began < 3
    assert 2 <= len(server.requests) <= 4
    assert (teacher.settings.timeout, teacher.settings.max_seconds) == (60, 600)
