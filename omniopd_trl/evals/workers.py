# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that read the answers of models and may be killed.

An answer may take any time and any memory. `multiprocessing` does not fit: a fork of a process with threads may hang,
and its other methods run the user's script again. A worker is a new interpreter that imports [`reading`] and nothing
else. It starts with the first answer, takes half a second and 60 MB, and ends with this process, even when that is
killed.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from omniopd_trl.errors import OmniOPDError

# Limits of one answer: wall-clock time, and address space of the worker. A usual answer takes some milliseconds.
SECONDS = 3.0
MAX_BYTES = 2 * 2**30

# A worker serves this many answers of a call. Small calls need one worker.
_ANSWERS_PER_WORKER = 16
_MAX_WORKERS = 4

# A completion, texts with the right answer, and whether the reading is lenient: the arguments of `reading.read`.
Task = tuple[str, Sequence[str | None], bool]


class Reading(NamedTuple):
    """What was read from a completion.

    Attributes:
        score: 1.0 for a right answer and 0.0 for a wrong one; `None` if the right answer itself cannot be parsed.
        answer: the answer: a number by its value, anything else as it was written. `None` without a readable answer:
            nothing is there, or something else than a number where one is expected.
        problem: why the completion could not be read to its end, and counts as wrong; `None` if it could.
    """

    score: float | None
    answer: str | None = None
    problem: str | None = None


class Worker:
    """One process. It is used by one thread at a time, and starts again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def read(self, task: Task) -> Reading:
        """The reading of one answer.

        Raises:
            OmniOPDError: when the process cannot start.
        """
        line = json.dumps(task) + "\n"
        for _ in range(2):  # something else may have ended it, such as the kernel for lack of memory
            try:
                process = self._running()
                answer = self._exchange(process, line)
            except BaseException:  # such as a Control-C: what it answers then must not count for the next task
                self.close()
                raise
            if answer:
                return Reading(*json.loads(answer))
            self.close()
            if process.returncode == -signal.SIGALRM:
                return Reading(0.0, problem=f"no result within {SECONDS:g} s")
        return Reading(0.0, problem=f"its process ended with exit code {process.returncode}")

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str) -> str:
        """The answer to a line; empty if the process has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = process = subprocess.Popen(
            # -P: a file of the working folder must not replace a module.
            [sys.executable, "-P", "-m", "omniopd_trl.evals.reading", str(SECONDS), str(MAX_BYTES)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            process_group=0,  # Control-C of the terminal must not reach it while it imports. It ends with its input
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise OmniOPDError(
                f"The process that scores mathematical answers ended at its start, with exit code {process.wait()}: "
                "its standard error says why. Check the installation of math-verify."
            )
        return process

    def close(self) -> None:
        """End the process and wait for it. The next answer starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stdin):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:  # the rest of an interrupted task
                    pass


class WorkerPool:
    """Some workers. Any number of threads may use them at once.

    Args:
        size: maximum number of workers. They start when they are needed.
    """

    def __init__(self, size: int):
        self._threads = ThreadPoolExecutor(size, "omniopd-answers")
        self._own = threading.local()
        self._workers: list[Worker] = []

    def read(self, tasks: Sequence[Task]) -> list[Reading]:
        """The readings of answers, in order.

        Raises:
            OmniOPDError: when a process cannot start.
        """
        interrupted = threading.Event()

        def read_part(start: int) -> list[Reading]:
            worker = self._worker()
            part = tasks[start : start + _ANSWERS_PER_WORKER]
            return [worker.read(task) for task in part if not interrupted.is_set()]

        try:
            parts = self._threads.map(read_part, range(0, len(tasks), _ANSWERS_PER_WORKER))
            return [reading for part in parts for reading in part]
        except BaseException:
            interrupted.set()
            raise

    def _worker(self) -> Worker:
        """The worker of this thread."""
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker()
            self._workers.append(self._own.worker)
        worker: Worker = self._own.worker
        return worker

    def close(self) -> None:
        """End all workers, after the answers that they read."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


_lock = threading.Lock()
_shared: WorkerPool | None = None


def read(tasks: Sequence[Task]) -> list[Reading]:
    """The readings of answers, in order, by workers that this process shares.

    Raises:
        OmniOPDError: when a process cannot start.
    """
    global _shared
    if not tasks:
        return []
    with _lock:
        if _shared is None:
            _shared = WorkerPool(min(_MAX_WORKERS, os.cpu_count() or 1))
        pool = _shared
    return pool.read(tasks)


def close() -> None:
    """End the shared workers. The next answer starts others."""
    global _shared
    with _lock:
        pool, _shared = _shared, None
    if pool is not None:
        pool.close()


def _forget() -> None:
    """In a forked child: neither the threads nor the processes are its own."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
