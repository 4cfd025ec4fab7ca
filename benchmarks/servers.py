# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Real servers in separate processes, on free ports. They are ended with all their children."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# vLLM takes 20 to 60 s on two cores.
START_SECONDS = 180
STOP_SECONDS = 15

# The tokens of one block of vLLM's prefix cache. 16 fails on the CPU, and its default of 128 caches no short prompt.
BLOCK = 32

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

# Servers are on this machine and need no proxy.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> str:
    """The answer of a server to a GET request."""
    with _opener.open(url, timeout=5) as answer:
        return answer.read().decode()


def metric(url: str, name: str, *labels: str) -> float:
    """The sum of a Prometheus metric over all series that have these labels.

    Args:
        url: address of the server, with its `/v1`.
        name: name of the metric.
        labels: labels in Prometheus notation, for example `method="POST"`.
    """
    lines = get(url.removesuffix("/v1") + "/metrics").splitlines()
    series = [line for line in lines if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in series if all(label in line for label in labels))


def command(name: str) -> str:
    """The path of a program of this environment."""
    return str(Path(sys.executable).parent / name)


def vllm_serve(model: str | Path, *arguments: str, max_model_len: int = 512) -> list[str]:
    """The command line of a vLLM server on the CPU that serves the model as `teacher`.

    Chunked prefill is disabled. With a seed in the request, vLLM 0.30 would rewind the seed's generator after each
    part but the last. CPU generators do not support this, and the engine would crash ("CPU Generator does not use
    offset").
    """
    return [
        *(command("vllm"), "serve", str(model), "--served-model-name", "teacher", "--dtype", "float32"),
        *("--max-model-len", str(max_model_len), "--block-size", str(BLOCK), "--enforce-eager"),
        *("--no-enable-chunked-prefill", "--enable-prompt-tokens-details", *arguments),
    ]


def free_port() -> int:
    """A free port of 127.0.0.1 for a process that binds it seconds later.

    It is below the ports that Linux gives to sockets that ask for any (from 32,768), so none of those takes it in the
    meantime.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", secrets.choice(range(20_000, 32_768))))
            return int(probe.getsockname()[1])


class Server:
    """A server process. `with` starts and stops it.

    Args:
        arguments: the command line. `--host` and `--port` are added.
        log: file for the output.
        environment: variables in addition to `ENVIRONMENT`.

    Attributes:
        address: address of the server, without the `/v1`.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self.arguments = list(arguments)
        self.log = log
        self.environment = {**ENVIRONMENT, **(environment or {})}
        self.process: subprocess.Popen | None = None
        self.address = ""

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The value for `teacher_base_url`."""
        return f"{self.address}/v1"

    def start(self) -> None:
        """Start the server, and return when it answers.

        Raises:
            RuntimeError: when the server ends or does not answer in time. The message holds the end of its log.
        """
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as output:
            # A new session, hence a process group: killing only the server would leave its workers running.
            self.process = subprocess.Popen(
                [*self.arguments, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        what = "ended" if self.process.poll() is not None else f"did not answer within {START_SECONDS} s"
        self.kill()
        raise RuntimeError(f"{self.arguments[0]} {what}. The end of its log:\n{self.tail()}")

    @property
    def is_alive(self) -> bool:
        """Whether the main process is running."""
        return self.process is not None and self.process.poll() is None

    def get(self, path: str) -> str:
        """The answer to a GET request."""
        return get(self.address + path)

    def metric(self, name: str, *labels: str) -> float:
        """See [`metric`]."""
        return metric(self.url, name, *labels)

    def tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and its children, with SIGTERM first and SIGKILL after a timeout."""
        if self.is_alive:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while self.is_alive and time.monotonic() < deadline:
                time.sleep(0.1)
        self.kill()

    def kill(self) -> None:
        """Kill the server and its children immediately, like a failing machine."""
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)  # the session leader's pid is the group's id
            except ProcessLookupError:
                pass
