# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTP server for all wire formats that records its requests, answers with a function and injects failures."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

Answer = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Fault:
    """How one request fails.

    Attributes:
        status: status of the response. 200 with a `body` is a custom answer.
        body: body of the response: JSON, text or bytes.
        headers: headers of the response.
        how: `"answer"`, `"drop"` (the connection is reset), `"hang"` (no answer until the server closes), `"cut"` (a
            complete response with truncated JSON), or `"endless"` (the body is repeated until the client leaves).
    """

    status: int = 200
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    how: str = "answer"


@dataclass(frozen=True)
class Recorded:
    """One received request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float


class Loopback:
    """A server bound to 127.0.0.1.

    Args:
        answer: function of path and body that returns the JSON of an answer.
        fault: function of the request's number (from 0, in order of arrival) and its body that returns a fault or
            `None`; or a list of faults for the first requests.
        delay: time that an answer takes, in seconds.
        port: port to listen at; 0 for a free one. A resumed run finds its records only at the same address.

    Attributes:
        requests: received requests, in order.
        active: number of requests in flight.
        most: peak of `active`.
    """

    def __init__(self, answer: Answer, fault: Any = None, delay: float = 0.0, port: int = 0):
        self.answer = answer
        self.fault = fault
        self.delay = delay
        self.requests: list[Recorded] = []
        self.most = 0
        self.active = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                loopback._serve(self)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: Any) -> None:
                pass  # some tests have clients that do not wait for an answer

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "Loopback":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all requests, in order of arrival."""
        return [request.body for request in self.requests]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["content-length"] or 0)
        sent = handler.rfile.read(length)
        if len(sent) < length:  # the client left, e.g. because its request was cancelled: nothing was asked
            handler.close_connection = True
            return
        kind = handler.headers["content-type"] or ""
        if kind == "application/x-www-form-urlencoded":  # a request for a token
            body = dict(parse_qsl(sent.decode()))
        else:
            body = {"file": sent} if kind.startswith("multipart/") else json.loads(sent or b"{}")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            number = len(self.requests)
            self.requests.append(Recorded(handler.path, headers, body, time.monotonic()))
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            if callable(self.fault):
                fault = self.fault(number, body)
            else:
                fault = self.fault[number] if self.fault and number < len(self.fault) else None
            time.sleep(self.delay)
            self._reply(handler, body, fault)
        finally:
            with self._lock:
                self.active -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], fault: Fault | None) -> None:
        how = "answer" if fault is None else fault.how
        if how == "hang":
            self._closing.wait(30)
            how = "drop"
        if how == "drop":
            # A reset, not an orderly end.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if fault is None or how == "cut":
            status, headers, content = 200, {}, self.answer(handler.path, body)
        else:
            status, headers, content = fault.status, fault.headers, fault.body
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        data = content
        if how == "cut":
            data = data[: len(data) // 2]
        handler.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            handler.send_header(name, value)
        if how == "endless":
            handler.close_connection = True
            handler.end_headers()
            while not self._closing.is_set():
                handler.wfile.write(data)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
