# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Serves the report on the loopback interface, and updates it while the run writes."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from omniopd_trl.errors import ConfigError, OmniOPDError
from omniopd_trl.report.page import write_page
from omniopd_trl.report.runs import open_runs

HOST = "127.0.0.1"


# A page is written again only after this many times the seconds that the last one took: the run needs the processor.
PAUSE = 10


class LiveReport:
    """The report of runs, written again when their folders have changed.

    Args:
        folders: the `output_dir` of each run.
        max_mib: as in `write_page`.

    Raises:
        DataError: when a folder holds no audits.
    """

    def __init__(self, folders: Sequence[str | Path], max_mib: float):
        open_runs(folders)
        self._folders = [Path(folder) for folder in folders]
        self._max_mib = max_mib
        self._lock = threading.Lock()
        self._written: tuple[str, bytes] | None = None
        self._next = 0.0

    def version(self) -> str:
        """Changes when a run has written something, and the page may be written again."""
        if self._written is not None and time.monotonic() < self._next:
            return self._written[0]
        return self._state()

    def page(self) -> bytes:
        """The page of the current version."""
        with self._lock:
            version = self.version()
            if self._written is None or self._written[0] != version:
                start = time.monotonic()
                page = write_page(open_runs(self._folders), max_mib=self._max_mib, live=True).encode()
                self._written = version, page
                self._next = time.monotonic() + PAUSE * (time.monotonic() - start)
            return self._written[1]

    def _state(self) -> str:
        """Times and sizes of the files that a run writes."""
        stats = []
        for folder in self._folders:
            for pattern in ("_audits/rank-*.sqlite*", "trainer_state.json", "checkpoint-*/trainer_state.json"):
                for path in sorted(folder.glob(pattern)):
                    # Readers change these two.
                    if not path.name.endswith(("-shm", ".lock")):
                        with suppress(FileNotFoundError):  # a run deletes old checkpoints
                            stat = path.stat()
                            stats.append(f"{stat.st_mtime_ns}.{stat.st_size}")
        return " ".join(stats)


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server for the report, on the loopback interface.

    Args:
        report: the report.
        port: port to listen on; 0 for any free one.

    Raises:
        ConfigError: when the port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the page was closed or loaded again before all of it was sent
                super().handle()

        def do_GET(self) -> None:
            # Another site's page could reach this server under its own name.
            if (self.headers.get("Host") or "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            try:
                if self.path == "/":
                    self._send(HTTPStatus.OK, "text/html", report.page())
                elif self.path == "/version":
                    self._send(HTTPStatus.OK, "text/plain", report.version().encode())
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)
            except (OmniOPDError, OSError) as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{type(error).__name__}: {error}".encode())

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"--port={port} cannot be used ({error}). Choose another one, or 0 for any free port."
        ) from error
