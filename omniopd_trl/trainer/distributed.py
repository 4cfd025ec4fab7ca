# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes: an error of one is raised on all, and a launch that starts fewer processes than asked warns.

Two launches silently start fewer processes:

- `accelerate launch --cpu --num_processes 2`, or an accelerate configuration for CPUs with several processes, starts
  one process.
- `torchrun --nproc_per_node 2`, without a GPU and without `use_cpu`, starts two processes that are not connected: each
  trains alone and overwrites the output of the other.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from accelerate.utils import gather_object

from omniopd_trl.errors import OmniOPDError, TeacherError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# ---- Errors ----


class Failure(NamedTuple):
    """An error in a form that can be sent between processes. Errors of other packages may not survive pickling."""

    kind: type[OmniOPDError]
    text: str
    is_ours: bool  # raised by this package: the message is enough. Other errors need their traceback
    error: Exception | None = None  # the error of this process itself; never sent

    @classmethod
    def of(cls, error: Exception, process: int) -> "Failure":
        """The failure that the other processes receive for an error of this one."""
        if isinstance(error, OmniOPDError):
            return cls(type(error), str(error), True)
        return cls(
            TeacherError,
            f"process {process} raised an unexpected {type(error).__name__} ({error}). See its traceback.",
            False,
        )


def first_failure(error: Exception | None, process: int) -> Failure | None:
    """The first failure of any process; `None` without one. Every process has to call it at the same point.

    Args:
        error: the error of this process, if any.
        process: index of this process.
    """
    gathered = gather_object([None if error is None else Failure.of(error, process)])
    failures = [failure for failure in gathered if failure is not None]
    return failures[0]._replace(is_ours=all(f.is_ours for f in failures), error=error) if failures else None


def stop(failure: Failure, message: str) -> Exception:
    """The exception to raise on this process for a failure that all processes know of.

    Args:
        failure: the failure, from [`first_failure`].
        message: message for the user.

    Returns:
        An error of this package with the message. If the error of this process is another one, that error itself with
        the message as a note, which keeps its traceback.
    """
    error = failure.error
    if error is not None and not isinstance(error, OmniOPDError):
        error.add_note(message)
        return error
    stopped = failure.kind(message)
    stopped.on_every_process = failure.is_ours
    stopped.__cause__ = error
    return stopped


def raise_together(error: Exception | None, process: int) -> None:
    """Raise the error of one process on every process. Every process has to call it at the same point.

    Args:
        error: the error of this process, if any.
        process: index of this process.
    """
    failure = first_failure(error, process)
    if failure is None:
        return
    if isinstance(error, OmniOPDError):
        error.on_every_process = failure.is_ours
    if error is not None:
        raise error
    raise stop(failure, failure.text)


def on_every_process(function: Callable[[], T], process: int) -> list[T]:
    """Call a function on every process. Every process has to call it at the same point.

    Args:
        function: function of this process, for example one that reads its files.
        process: index of this process.

    Returns:
        The results of all processes, in order. The error of one is raised on all.
    """
    result: list[T] = []
    error: Exception | None = None
    try:
        result = [function()]
    except Exception as caught:  # tell the other processes before raising, or they would wait for this one
        error = caught
    raise_together(error, process)
    return gather_object(result)


# ---- Launches ----

# Set only by the launcher of accelerate that starts a single process.
_ONE_PROCESS = "ACCELERATE_USE_CPU"
# Set by all launchers of accelerate, and by nothing else.
_BY_ACCELERATE = "ACCELERATE_DYNAMO_MODE"
# The rendezvous address of the processes. A single process gets it only if more were asked for.
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


class Started(NamedTuple):
    """How a process was started."""

    environment: Mapping[str, str]  # at the start of the process, without later changes
    command: Sequence[str]


def lineage() -> Iterator[Started]:
    """How this process and each of its ancestors was started, from the process itself upwards.

    Raises:
        psutil.Error: when the system does not give access to a process.
    """
    import psutil

    process: psutil.Process | None = psutil.Process()
    while process is not None:
        yield Started(process.environ(), process.cmdline())
        process = process.parent()


def lost_processes(started: Iterator[Started]) -> str | None:
    """Detect a process that trains alone although its launch asked for several.

    Args:
        started: the ancestors of the process, from [`lineage`].

    Returns:
        What happened and how to launch instead; `None` when there is no sign of more than one process.
    """
    environment = next(started).environment
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        return (
            f"{environment['WORLD_SIZE']} processes were started, and this one trains alone: without a GPU they "
            "connect only with `use_cpu: true` in the recipe, or `use_cpu=True` in `OmniOPDConfig`. Stop the run: "
            "each process overwrites the output of the others."
        )
    if not {_ONE_PROCESS, _BY_ACCELERATE, *_MEETING_POINT} <= environment.keys():
        return None
    # A shell or a wrapper between the launcher and this process has the variables as well.
    launcher = next((process for process in started if _BY_ACCELERATE not in process.environment), None)
    if launcher is None:
        return None
    asked = _option(launcher.command, "num_processes")
    # A user may set the rendezvous address for every run, as vLLM asks for, without asking for several processes.
    if launcher.environment.keys() >= set(_MEETING_POINT) and (asked is None or asked < 2):
        return None
    number = "more than one process" if asked is None else f"{asked} processes"
    return (
        f"`accelerate launch` was asked for {number} and has started one: with `--cpu`, or without a GPU for each "
        "process, it silently starts no more. This run trains alone. For two processes on the CPU, with `use_cpu: "
        "true`: `omniopd train --accelerate_config cpu_2 ...`, `accelerate launch --multi_gpu --num_processes 2 ...` "
        "(it does not need a GPU) or `torchrun --nproc_per_node 2 ...`. For one process: `--num_processes 1`."
    )


def _option(command: Sequence[str], name: str) -> int | None:
    """The value of the first `--name 2` or `--name=2` of a command line, in either spelling; `None` without one."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.replace("-", "_") == f"__{name}":
            number = value if equals else following
            return int(number) if number.isdecimal() else None
    return None


@cache
def warn_about_lost_processes(num_processes: int) -> None:
    """Warn once when this process trains alone although the launch asked for more. It never fails.

    Args:
        num_processes: number of processes that train together, `args.world_size`.
    """
    if num_processes > 1:
        return
    try:
        message = lost_processes(lineage())
    except Exception:  # A system or a container may hide its processes. A missing warning must not end a run.
        return
    if message is not None:
        logger.warning(message)
