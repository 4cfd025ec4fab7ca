# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Hostile answers: they cost a bounded time, count as wrong and are named, and no process remains."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from omniopd_trl.errors import OmniOPDError
from omniopd_trl.evals import math_accuracy, workers
from omniopd_trl.evals.workers import Reading, Worker, WorkerPool
from tests.support.commands import ENVIRONMENT

RIGHT = ("Answer: 7", ["7"], False)
# Its result has 10^10 digits, and the computation does not return to the interpreter.
ENDLESS = ("Answer: $2^{100000000000}$", [r"\sqrt{50}"], False)


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS", 1.0)
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize(
    "answer",
    [
        "$9^{9^{9^{9}}}$",
        "1000000000!",
        r"$\sum_{i=1}^{10^{10}} i!$",
        "(" * 5000 + "1" + ")" * 5000,
        "{" * 1000,
        "\\text{" * 500,
        "$" + "+".join(f"x^{{{i}}}" for i in range(300)) + "$",
        "1e999999999",
        "\\frac{" * 200 + "1",
    ],
    ids=lambda answer: answer[:20],
)
def test_a_hostile_answer_is_wrong_and_costs_its_limit(worker, answer):
    """At most the limit and the start of another worker, whatever the reading does."""
    assert worker.read(RIGHT) == Reading(1.0, "7")
    start = time.monotonic()
    assert worker.read((f"Answer: {answer}", [r"\sqrt{50}"], False)).score == 0.0
    assert time.monotonic() - start < 3.0
    assert worker.read(RIGHT) == Reading(1.0, "7")


def test_the_problem_is_named(worker, caplog):
    """In the reading, and in a warning with the number of such answers."""
    assert worker.read(ENDLESS) == Reading(0.0, problem="no result within 1 s")
    workers.close()  # it may run with the usual limit
    try:
        assert math_accuracy([ENDLESS[0], "Answer: 7"], answer=[r"\sqrt{50}", "7"]) == [0.0, 1.0]
    finally:
        workers.close()
    assert "1 of 2 answers could not be scored and count as wrong. The first: no result within 1 s." in caplog.text


def test_a_killed_worker_is_replaced(worker):
    """Between two answers and during one, without a loss. An answer that ends its process twice is wrong."""
    assert worker.read(RIGHT).score == 1.0
    worker._process.kill()
    assert worker.read(RIGHT).score == 1.0
    timer = threading.Timer(0.2, worker._process.kill)
    timer.start()
    assert worker.read(ENDLESS).problem == "no result within 1 s"
    timer.join()

    class Killed(Worker):
        def _exchange(self, process, line):
            process.kill()
            return super()._exchange(process, line)

    assert Killed().read(ENDLESS).problem == f"its process ended with exit code {-signal.SIGKILL}"


def test_control_c_of_the_terminal_does_not_reach_it(worker):
    """The terminal sends it to the process group. Within its imports, it would print a traceback."""
    assert worker.read(RIGHT).score == 1.0
    assert os.getpgid(worker._process.pid) != os.getpgrp()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_memory_is_limited(worker):
    """The limit is the process's own; an answer that would need more is wrong, and the process lives on."""
    assert worker.read(("Answer: $2^{1000000000}$", [r"\sqrt{50}"], False)).score == 0.0
    worker.read(RIGHT)
    process = psutil.Process(worker._process.pid)
    assert process.rlimit(psutil.RLIMIT_AS)[0] == workers.MAX_BYTES
    assert process.memory_info().rss < 150 * 2**20


def test_many_threads_share_a_pool():
    """Each gets the readings of its own answers, in order."""
    pool = WorkerPool(2)
    results = {}

    def use(n):
        tasks = [(f"Answer: {n + i % 2}", [str(n)], False) for i in range(40)]
        results[n] = [reading.score for reading in pool.read(tasks)]

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool._workers) == 2
    processes = [worker._process for worker in pool._workers]
    pool.close()
    assert results == {n: [1.0, 0.0] * 20 for n in range(4)}
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_a_worker_that_cannot_start(monkeypatch, capfd, tmp_path):
    """One line, and the reason on the standard error."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OmniOPDError, match="ended at its start, with exit code 1"):
        Worker().read(RIGHT)
    assert "a broken installation" in capfd.readouterr().err


SCRIPT = """
import os, sys
from omniopd_trl.evals import math_accuracy, workers
print("run", flush=True)  # once: a worker does not run the script again
math_accuracy(["Answer: 7"], answer=["7"])
print(workers._shared._workers[0]._process.pid, flush=True)
child = os.fork()
if not child:
    os._exit(int(math_accuracy(["Answer: 7"], answer=["7"])[0]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
assert not {"torch", "transformers", "math_verify"} & sys.modules.keys()
if sys.argv[1:]:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", [[], ["killed"]])
def test_no_process_remains(tmp_path, end):
    """After the interpreter's exit or its death; a forked child has workers of its own."""
    script = Path(tmp_path, "script.py")
    script.write_text(SCRIPT)
    start = time.monotonic()
    # Python 3.12 and later warn of any fork in a process with threads, which is what this test does.
    command = [sys.executable, "-W", "ignore::DeprecationWarning:__main__", script, *end]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if end else 0), done.stderr
    assert not done.stderr
    run, pid, child = done.stdout.split()
    assert (run, child) == ("run", "1")
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - start < 30
        time.sleep(0.02)
    assert os.getpid() != int(pid)
