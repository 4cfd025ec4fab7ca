# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP client under the SDKs: limited bodies, no redirects, and settings that cannot work, in one line."""

import gzip
import tracemalloc
import zlib

import pytest

from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.http import MAX_BODY
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("services")

PREFIX = Prefix("3 + 4", " =")
every_service = pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)

BOMB = gzip.compress(b" " * (8 * MAX_BODY), 1)
BOMBS = {
    "gzip": Fault(200, BOMB, {"content-encoding": "gzip"}),
    "deflate": Fault(200, zlib.compress(b"[" * (2 * MAX_BODY)), {"content-encoding": "deflate"}),
    "gzip twice": Fault(200, gzip.compress(BOMB), {"content-encoding": "gzip, gzip"}),
    "an error": Fault(500, BOMB, {"content-encoding": "gzip"}),
    "plain": Fault(200, "x" * (MAX_BODY + 1)),
    "endless": Fault(200, b"[" * 65536, how="endless"),
}


@pytest.mark.case("T16")
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("service", [SERVICES[1], SERVICES[3]], ids=lambda service: service.name)
def test_bodies_are_limited(service, kind):
    """A body is read up to a limit, decompressed; beyond it the answer is malformed and charged at its worst case."""
    with Loopback(service.answer, lambda *_: BOMBS[kind]) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=10, max_attempts=1))
        (reply,) = ask(teacher, PREFIX)
    assert reply.rollouts == ()
    assert "cannot be read" in reply.failure
    assert "it is larger than 16,777,216 bytes" in reply.failure
    assert teacher.budget.forfeited_tokens >= 70


@pytest.mark.case("T16")
def test_memory_of_a_bomb():
    """Decompression stops at the limit: 128 MiB behind 0.6 MB take little more memory than the limit."""
    with Loopback(wire.openai, lambda *_: BOMBS["gzip"]) as server:
        teacher = remote_teacher("vllm:own", base_url=server.url + "/v1", settings=EngineSettings(max_attempts=1))
        ask(teacher, PREFIX)
        tracemalloc.start()
        try:
            ask(teacher, PREFIX)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2.5 * MAX_BODY


@pytest.mark.case("T16")
@every_service
def test_damaged_compression(service):
    """It is malformed as well, and the next answer counts."""
    damaged = Fault(200, b"\x1f\x8b" + b"0" * 100, {"content-encoding": "gzip"})
    with Loopback(service.answer, [damaged]) as server:
        teacher = teacher_of(service, server)
        (reply,) = ask(teacher, PREFIX)
    assert len(reply.rollouts) == 1
    assert teacher.budget.forfeited_tokens > 0


def test_compressed_answers():
    """An ordinary compressed answer is read as any other."""
    with Loopback(wire.openai) as server:
        answer = gzip.compress(b'{"choices": [{"index": 0, "text": " 7", "finish_reason": "stop"}]}')
        server.fault = [Fault(200, answer, {"content-encoding": "gzip"})]
        (reply,) = ask(remote_teacher("vllm:own", base_url=server.url + "/v1"), PREFIX)
    assert reply.rollouts[0].text == " 7"


@pytest.mark.case("T21")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@every_service
def test_redirects_are_refused(service, status):
    """Nothing goes to another host, neither the key nor the prompt, and the message names that host."""
    with Loopback(service.answer) as other, Loopback(service.answer) as server:
        server.fault = lambda *_: Fault(status, "", {"location": other.url + "/v1"})
        with pytest.raises(TeacherError, match=f"redirects to {other.url}/v1.*teacher_base_url") as caught:
            ask(teacher_of(service, server), PREFIX)
    assert other.requests == []
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.case("T21")
def test_redirects_on_the_same_host():
    """They are refused as well: the final address is the one to set."""
    with Loopback(wire.openai) as server:
        server.fault = lambda *_: Fault(308, "", {"location": "/v2/completions"})
        with pytest.raises(TeacherError, match="redirects to /v2/completions"):
            ask(remote_teacher("vllm:own", base_url=server.url + "/v1"), PREFIX)
    assert len(server.requests) == 1


class TestAddresses:
    """Of services, in options and in the environment."""

    @pytest.mark.case("A6")
    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("http://127.0.0.1:8000/v1\n", "line break"),
            (" http://127.0.0.1:8000/v1", "white space"),
            ("http://127.0.0.1:8000/v1\x00", "control character"),
            ("http://127.0.0.1:80000/v1", "(?i)port"),
            ("http://127.0.0.1:port/v1", "(?i)port"),
            ("http://127.0.0.1:0/v1", "port"),
            ("127.0.0.1:8000/v1", "does not begin with http"),
            ("\u201chttp://127.0.0.1/v1\u201d", "does not begin with http"),
            ("http:///v1", "no host"),
            ("http://[::1/v1", "(?i)ipv6|invalid"),
        ],
    )
    @every_service
    def test_unusable(self, service, address, words):
        """One line when the teacher is created, with the option and the value."""
        with pytest.raises(ConfigError, match=words) as caught:
            remote_teacher(service.name, base_url=address)
        assert str(caught.value).startswith("teacher_base_url=")
        assert "\n" not in str(caught.value)

    @pytest.mark.case("A6")
    @pytest.mark.parametrize(
        ("name", "variable"),
        [
            ("openai:gpt-6-luna", "OPENAI_BASE_URL"),
            ("anthropic:claude-haiku-4-5", "ANTHROPIC_BASE_URL"),
            ("gemini:gemini-3.5-flash-lite", "GOOGLE_GEMINI_BASE_URL"),
        ],
    )
    def test_from_the_environment(self, name, variable, monkeypatch):
        """The message names the variable."""
        monkeypatch.setenv(variable, "http://127.0.0.1:8000/v1\r\n")
        with pytest.raises(ConfigError, match=f"^{variable}="):
            remote_teacher(name)

    @pytest.mark.parametrize(
        "address", ["http://[::1]:8000/v1", "https://m\u00fcller.example/v1", "HTTP://host/v1?a=b"]
    )
    def test_usable(self, address):
        """IPv6, international names and queries are addresses."""
        assert remote_teacher("vllm:own", base_url=address).base_url == address


class TestKeys:
    """In the environment."""

    @pytest.mark.case("A6")
    @pytest.mark.parametrize("value", ["\u201c{}\u201d", "{}\u2019", "{}\u200b", "export {}", '"{}"', "{}\nOTHER=1"])
    @every_service
    def test_unusable(self, service, value, monkeypatch):
        """A typographic quote, an invisible or a blank character: one line that does not show the key."""
        monkeypatch.setenv(service.key, value.format(KEYS[service.key]))
        with pytest.raises(ConfigError, match=f"The key in {service.key} contains .* Copy the key again") as caught:
            remote_teacher(service.name)
        assert KEYS[service.key] not in str(caught.value)
        assert str(caught.value).isascii()
        assert "\n" not in str(caught.value)

    def test_surrounding_white_space(self, monkeypatch):
        """It is no part of a key."""
        monkeypatch.setenv("VLLM_API_KEY", f" {KEYS['VLLM_API_KEY']}\n")
        with Loopback(wire.openai) as server:
            ask(remote_teacher("vllm:own", base_url=server.url + "/v1"), PREFIX)
        assert server.requests[0].headers["authorization"] == f"Bearer {KEYS['VLLM_API_KEY']}"


class TestProxies:
    """Of the environment."""

    @pytest.fixture(autouse=True)
    def no_exceptions(self, monkeypatch):
        """No address is reached without the proxy."""
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)

    @pytest.mark.case("A6")
    @pytest.mark.parametrize(
        ("variable", "value", "words"),
        [
            ("ALL_PROXY", "socks5://127.0.0.1:1080", r"pip install 'httpx2\[socks\]'"),
            ("https_proxy", "socks5h://127.0.0.1:1080", "socksio"),
            ("HTTPS_PROXY", "socks4://127.0.0.1:1080", "'socks4' is not supported"),
            ("HTTP_PROXY", "http://127.0.0.1:99999", "(?i)port"),
            ("HTTP_PROXY", "http://user:hunter2secret@", "names no host"),
        ],
    )
    @every_service
    def test_unusable(self, service, variable, value, words, monkeypatch):
        """One line when the teacher is created, with the variable and without a password."""
        monkeypatch.setattr("omniopd_trl.teachers.remote.http.find_spec", lambda name: None)
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=words) as caught:
            remote_teacher(service.name)
        assert str(caught.value).startswith(f"{variable}=")
        assert "hunter2secret" not in str(caught.value)

    @pytest.mark.case("A6")
    @pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
    @every_service
    def test_a_proxy_before_a_loopback_server(self, service, variable, monkeypatch):
        """The error names the proxy and the way around it, and the server gets nothing."""
        with Loopback(wire.openai) as proxy:
            pass  # nothing listens there
        monkeypatch.setenv(variable, proxy.url.replace("//", "//me:hunter2secret@"))
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=1))
            with pytest.raises(TeacherError, match="no connection") as caught:
                teacher.probe("3 + 4")
            assert server.requests == []
            assert f"{variable}=http://[key]@127.0.0.1" in str(caught.value)
            assert "export NO_PROXY=127.0.0.1" in str(caught.value)
            assert teacher.budget.forfeited_tokens == 0
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            teacher.probe("3 + 4")

    @pytest.mark.case("A6")
    def test_certificates_that_are_not_there(self, monkeypatch, tmp_path):
        """Another setting of the environment that no client can be created with."""
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(TeacherError, match="Check SSL_CERT_FILE"):
            remote_teacher("vllm:own").probe("3 + 4")
