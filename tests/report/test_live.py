# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd report --live` serves the current state of a run on this machine only."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from omniopd_trl.cli.main import main
from omniopd_trl.report.live import make_server
from scripts.chromium import open_page, until
from tests.support.journals import audit, journal, trajectory
from tests.support.pages import put, texts
from tests.support.recorded_runs import record_run


@contextmanager
def served(folder):
    """The address of the server, while it runs."""
    command = [sys.executable, "-m", "omniopd_trl.cli.main", "report", "--live", "--port", "0", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        finally:
            os.kill(process.pid, signal.SIGINT)
            assert (process.wait(10), process.stderr.read()) == (130, "Interrupted.\n")


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return answer.read().decode()


def test_the_page_follows_the_run(tmp_path):
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(), trajectory()])
        with served(tmp_path) as address:
            first = get(address)
            version = get(f"{address}version")
            assert "Nothing has been audited yet" in first
            assert "connect-src 'self'" in first
            assert get(f"{address}version") == version
            j.record(0, 0, audit())
            # The page is written again after a pause that depends on how long it takes to write.
            until(lambda: get(f"{address}version") != version)
            assert "Nothing has been audited yet" not in get(address)


def test_an_open_page_follows_the_run(tmp_path, browser):
    """It keeps its filters and the trajectory that is open."""
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(), trajectory()])
        j.record(0, 0, audit("first"))
        with served(tmp_path) as address:
            open_page(browser, f"{address}#t=0.0.0.0")
            put(browser, "prompt", "2 + 2")
            until(lambda: texts(browser, "#live") == ["● follows the run"])
            j.record(0, 1, audit("second"))
            until(lambda: texts(browser, "#count") == ["2 of 2 trajectories."])
            assert texts(browser, "#summary dd")[0] == "2"
            assert browser.execute_script("return document.getElementById('prompt').value") == "2 + 2"
            assert texts(browser, ".chunk") == ["first"]
        until(lambda: texts(browser, "#live")[0].startswith("○ not updated"))


def test_other_sites_and_paths_are_refused(tmp_path):
    with served(record_run(tmp_path, 1)) as address:
        for path, headers, status in (("", {"Host": "evil.example"}, 403), ("../training_args.bin", {}, 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(address + path, **headers)
            assert refused.value.code == status
            refused.value.close()


def test_a_page_that_is_closed_before_it_is_sent(capsys):
    """It leaves no traceback in the terminal."""
    asked, closed = threading.Event(), threading.Event()

    def page():
        asked.set()
        return b"late" * closed.wait(10)

    with make_server(SimpleNamespace(page=page), 0) as server:
        server.daemon_threads = False  # `server_close` waits for them
        threading.Thread(target=server.serve_forever).start()
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
            assert asked.wait(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no further byte
        closed.set()
        server.shutdown()
    assert capsys.readouterr().err == ""


def test_a_folder_without_audits(tmp_path, capsys):
    assert main(["report", "--live", str(tmp_path)]) == 1
    assert "holds no audits" in capsys.readouterr().err
