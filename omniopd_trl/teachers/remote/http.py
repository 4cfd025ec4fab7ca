# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP client of all SDKs: answers of a limited size, no redirects, and errors that name the setting at fault."""

import json
import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.teachers.remote.delivery import trace_delivery
from omniopd_trl.teachers.remote.failures import MalformedResponseError, redact

# Largest answer after decompression, in bytes. A request for 64 samples of 1,000 tokens gets less than 1 MiB.
MAX_BODY = 16 * 2**20


def http_client(max_concurrency: int, max_body: int = MAX_BODY) -> httpx2.AsyncClient:
    """The client that is passed to an SDK. The caller closes it.

    Args:
        max_concurrency: connections that the pool holds, one per request in flight.
        max_body: largest answer after decompression, in bytes.

    Raises:
        TeacherError: when the environment's settings for connections cannot be used, for example `SSL_CERT_FILE`.
    """
    limits = httpx2.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
    try:
        client = _Client(limits=limits, event_hooks={"request": [trace_delivery]})
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
        raise TeacherError(
            f"The HTTP client cannot be created with the settings of the environment ({type(error).__name__}: "
            f"{redact(str(error))}). Check SSL_CERT_FILE, SSL_CERT_DIR, HTTP_PROXY, HTTPS_PROXY and ALL_PROXY."
        ) from error
    client.max_body = max_body
    return client


class _Client(httpx2.AsyncClient):
    max_body = MAX_BODY

    async def send(self, request: httpx2.Request, *, stream: bool = False, **kwargs: Any) -> httpx2.Response:
        """Send a request and read its answer, of at most `max_body` bytes.

        Raises:
            MalformedResponseError: when the body is larger, or its compression is damaged.
        """
        # A request holds the key, and the SDKs would send some of its headers to another host.
        kwargs["follow_redirects"] = False
        try:
            response = await super().send(request, stream=True, **kwargs)
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            if not (hint := _proxy_hint(request.url)):
                raise
            raise type(error)(f"{error}.{hint}", request=request) from None
        try:
            body = b"" if response.has_redirect_location else await _read(response, self.max_body)
        finally:
            await response.aclose()
        about_body = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in about_body]
        answer = _Response(
            response.status_code, headers=headers, content=body, request=request, extensions=response.extensions
        )
        answer.encoding = "utf-8"  # of JSON, whatever the headers say
        return answer


class _Response(httpx2.Response):
    def json(self, **kwargs: Any) -> Any:
        try:
            return super().json(**kwargs)
        except (UnicodeDecodeError, RecursionError) as error:  # the SDKs expect the error of a body that is no JSON
            raise json.JSONDecodeError(f"{type(error).__name__} in the body", "", 0) from error


async def _read(response: httpx2.Response, most: int) -> bytes:
    body = bytearray()
    try:
        async for part in response.aiter_bytes():  # decompresses 1 MiB at a time
            body += part
            if len(body) > most:
                raise MalformedResponseError(f"it is larger than {most:,} bytes")
    except httpx2.DecodingError as error:
        raise MalformedResponseError(f"it cannot be decompressed: {error}") from error
    return bytes(body)


# ---- Checks of addresses, keys and proxies ----


def check_address(address: str, source: str) -> str:
    """Check the address of a service and return it.

    Args:
        address: URL, for example `http://127.0.0.1:8000/v1`.
        source: option or environment variable that holds it, for the message.

    Raises:
        ConfigError: when no request can be sent to it.
    """
    problem = ""
    if re.search(r"\s|[\x00-\x1f\x7f]", address):
        problem = "it contains white space or a control character, which is often a line break at its end"
    elif not re.match(r"https?://", address, re.IGNORECASE):
        problem = "it does not begin with http:// or https://"
    else:
        problem = _url_problem(address)
    if problem:
        raise ConfigError(
            f"{source}={redact(address)!r} is not the address of a service: {problem}. Write it as in "
            "http://127.0.0.1:8000/v1."
        )
    return address


def _url_problem(url: str) -> str:
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            return "it names no host"
        if parts.port == 0:
            return "its port must be between 1 and 65535"
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        return str(error)
    return ""


def check_keys(variables: Iterable[str]) -> None:
    """Check that keys in the environment can be sent in a header. Variables that are not set are skipped.

    Raises:
        ConfigError: names the variable and the character, not the key.
    """
    for variable in variables:
        value = os.environ.get(variable, "").strip()
        if found := re.search(r"[^\x21-\x7e]|[\"']", value):
            raise ConfigError(
                f"The key in {variable} contains {found[0]!a} (character {found.start() + 1} of {len(value)}), which "
                "no key has. Copy the key again, without quotation marks and without other text."
            )


def check_proxies() -> None:
    """Check the proxies of the environment.

    Raises:
        ConfigError: when a proxy has a form or a scheme that is not supported.
    """
    for kind in ("http", "https", "all"):
        proxy = getproxies().get(kind)
        if not proxy:
            continue
        variable, proxy = _variable(kind), proxy if "://" in proxy else f"http://{proxy}"
        scheme = proxy.partition("://")[0].lower()
        problem, advice = _url_problem(proxy), f"Correct {variable}, or unset it."
        if scheme not in ("http", "https", "socks5", "socks5h"):
            problem = f"a proxy of the scheme {scheme!r} is not supported; use http, https or socks5"
        elif scheme.startswith("socks") and find_spec("socksio") is None:
            problem = "a SOCKS proxy needs the package socksio, which is not installed"
            advice = f"Run `pip install 'httpx2[socks]'`, or unset {variable}."
        if problem:
            raise ConfigError(f"{variable}={redact(proxy)!r}: {problem}. {advice}")


def _proxy_hint(url: httpx2.URL) -> str:
    """The proxy that a request to an address goes through; empty for none."""
    proxies = getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    if not proxies.get(kind) or proxy_bypass(url.host):
        return ""
    return (
        f" {_variable(kind)}={redact(proxies[kind])} sends requests to {url.host} through a proxy; if the service is "
        f"reached without one, run `export NO_PROXY={url.host}`"
    )


def _variable(kind: str) -> str:
    """The environment variable of a proxy, as it is written in the environment."""
    name = f"{kind}_proxy"
    return name if os.environ.get(name) else name.upper()
