# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The runs of `omniopd ablate`, each in processes of its own."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from omniopd_trl.cli import train
from omniopd_trl.cli.ablate.plan import FINISHED, LOG, RECIPE, SOLUTIONS, Job
from omniopd_trl.cli.tables import say
from omniopd_trl.journal.file import journals_of

# What a run imports, some eight seconds of a processor. Without a GPU, runs are forked from a process that has them.
_IMPORTED = ("omniopd_trl.cli.recipe", "omniopd_trl.trainer.omniopd_trainer", "omniopd_trl.baselines.make")

# The command `omniopd`: runs a command line, and returns its exit code.
Command = Callable[[Sequence[str]], int]


def run_all(
    jobs: Sequence[Job],
    number: int,
    devices: Sequence[str],
    env: Any,
    omniopd: Command,
    ended: Callable[[Job], None],
) -> list[Job]:
    """Run the jobs, `number` at a time, and return those that failed.

    Args:
        jobs: runs that are not finished.
        number: runs at a time.
        devices: GPUs; each run gets one of them.
        env: the environment variables of this process that recipes set.
        omniopd: what runs `omniopd solutions`. It can be pickled.
        ended: called after each run.

    Raises:
        KeyboardInterrupt: after Control-C, when the runs have ended as `omniopd train` does. No other is started.
    """
    methods = multiprocessing.get_all_start_methods()
    forks = "forkserver" if "forkserver" in methods else "spawn"
    multiprocessing.get_context(forks).set_forkserver_preload([*_IMPORTED])
    free = deque(devices[slot % len(devices)] if devices else None for slot in range(number))
    waiting = deque(jobs)
    running: list[_Run] = []
    # Control-C is blocked except in `_wait`, where each process that was started is known. A new process starts with
    # the signal blocked, and unblocks it when it can handle it.
    if forks == "forkserver":
        resource_tracker.ensure_running()  # unblocks the signal when it starts
    _mask_control_c(True)
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.popleft(), free.popleft()
                # CUDA allows no fork, and libraries read their variables when they are imported.
                fresh = device is not None or job.recipe.get("env") != env
                say(f"{job.folder}: started")
                running.append(_Run(job, device, "spawn" if fresh else forks, omniopd))
            _wait(running)
            for run in [run for run in running if run.has_ended()]:
                running.remove(run)
                free.append(run.device)
                say(f"{run.job.folder}: {'done' if run.job.is_finished else 'FAILED'} after {run.seconds:.0f} s")
                ended(run.job)
    except BaseException:
        for run in running:
            run.interrupt()
        _wait(running, all)
        raise
    finally:
        for run in running:  # after a second Control-C
            run.process.kill()
        _mask_control_c(False)
    return [job for job in jobs if not job.is_finished]


def _mask_control_c(blocked: bool) -> None:
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGINT})


def _wait(running: "Sequence[_Run]", enough: Callable[[Sequence[bool]], bool] = any) -> None:
    """Wait until the process of any run, or of all, has ended. Control-C interrupts it."""
    _mask_control_c(False)
    while not enough([run.process.exitcode is not None for run in running]):
        # A process may have ended since. Without any, `connection.wait` would wait forever.
        if sentinels := [run.process.sentinel for run in running if run.process.exitcode is None]:
            connection.wait(sentinels)
    _mask_control_c(True)


class _Run:
    """A job in processes of its own, one after the other, with their output in a file.

    A run that was interrupted is resumed: it replays its journal, and pays nothing twice.

    Args:
        job: the run.
        device: its GPU; `None` without one.
        start_method: start method of `multiprocessing`.
        omniopd: as for `run_all`.
    """

    def __init__(self, job: Job, device: str | None, start_method: str, omniopd: Command):
        import yaml

        self.job, self.device, self.start_method, self.omniopd = job, device, start_method, omniopd
        path = job.folder / RECIPE
        # `omniopd train` refuses to resume where there is nothing yet.
        resumes = journals_of(job.folder) or any(job.folder.glob("checkpoint-*/trainer_state.json"))
        job.folder.mkdir(parents=True, exist_ok=True)
        write(path, yaml.safe_dump(dict(job.recipe), sort_keys=False))
        self.commands = [["train", "--config", str(path), *(["--resume_from_checkpoint", "true"] if resumes else [])]]
        if job.solutions is not None:
            write(job.folder / SOLUTIONS, yaml.safe_dump({"solutions": dict(job.solutions)}))
            self.commands.insert(0, ["solutions", "--config", str(path), *words_of(job.solutions)])
        self.began = time.perf_counter()
        self.processor_seconds = 0.0
        self._start()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self.start_method)
        self.used, used = context.Pipe(duplex=False)
        arguments = (self.omniopd, self.commands.pop(0), str(self.job.folder / LOG), self.device, used)
        self.process = context.Process(target=_run_command, args=arguments)
        self.process.start()
        used.close()

    def has_ended(self) -> bool:
        """Whether the last command has ended, or one has failed. Starts the next one if there is one."""
        code = self.process.exitcode
        if code == 0:
            self.processor_seconds += self.used.recv()
            if self.commands:
                self._start()
                return False
            result = {"seconds": self.seconds, "processor_seconds": self.processor_seconds}
            write(self.job.folder / FINISHED, json.dumps(result) + "\n")
        return code is not None

    def interrupt(self) -> None:
        """Send Control-C. From a terminal, the process has it already, and treats both as one."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGINT)


def _run_command(
    omniopd: Command, command: Sequence[str], log: str, device: str | None, used: connection.Connection
) -> None:
    """Run `omniopd train` or another command in this process, which is one of its own, with its output in a file.

    Args:
        omniopd: runs any command but `train`, which would launch other processes.
        command: the words after `omniopd`.
        log: path of the file.
        device: the GPU to use; `None` without one.
        used: gets the seconds of a processor that this process and its children took.
    """
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
        os.dup2(stream, target)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with_parent, daemon=True).start()
    train.ControlC().install()
    try:
        _mask_control_c(False)
        code = train.run(command[1:]) if command[0] == "train" else omniopd(command)
    except KeyboardInterrupt:  # before the command has begun
        code = 128 + signal.SIGINT
    used.send(sum(os.times()[:4]))
    sys.exit(code)


def _end_with_parent() -> None:
    """End this process when the command that started it was killed: a run alone would continue to pay the teacher."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def write(path: Path, text: str) -> None:
    """Write a file, all or nothing: the command may be killed."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command. A switch is its name alone, and is left out when it is false.

    Example:
        >>> words_of({"num_prompts": 64, "verified": True, "dry_run": False})
        ['--num_prompts', '64', '--verified']
    """
    words: list[str] = []
    for name, value in options.items():
        words += [] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
