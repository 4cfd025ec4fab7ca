# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes: an error of one is told to all, and a warning says when fewer train together than asked for.

There are two launches that start fewer without a word:

- `accelerate launch --cpu --num_processes 2`, or a configuration of accelerate for CPUs that names several processes,
  starts one process;
- `torchrun --nproc_per_node 2`, without a GPU and without `use_cpu`, starts two that do not know of each other: each
  trains alone, and writes over what the other has written.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from accelerate.utils import gather_object

from omniopd_trl.errors import OmniOPDError, TeacherError

logger = logging.getLogger(__name__)

# ---- Errors ----


class Failure(NamedTuple):
    """An error, in a form that travels between processes: errors of other packages need not survive pickling."""

    kind: type[OmniOPDError]
    text: str
    is_ours: bool  # the message says all that there is to say; of other errors the traceback is needed
    error: Exception | None = None  # what went wrong on this process itself; never sent

    @classmethod
    def of(cls, error: Exception, process: int) -> "Failure":
        """How the other processes learn of an error of this one."""
        if isinstance(error, OmniOPDError):
            return cls(type(error), str(error), True)
        return cls(
            TeacherError,
            f"process {process} met an unexpected {type(error).__name__} ({error}). Its traceback says where.",
            False,
        )


def first_failure(error: Exception | None, process: int) -> Failure | None:
    """What went wrong, on whichever process; `None` when all is well. Every process has to ask, at the same point.

    Args:
        error: what went wrong on this process.
        process: its index.
    """
    gathered = gather_object([None if error is None else Failure.of(error, process)])
    failures = [failure for failure in gathered if failure is not None]
    return failures[0]._replace(is_ours=all(f.is_ours for f in failures), error=error) if failures else None


def stop(failure: Failure, message: str) -> Exception:
    """What this process raises for a failure that all have learnt of.

    Args:
        failure: from [`first_failure`]. An error of this process that is not ours is raised as it is, for its
            traceback.
        message: for the user.
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
    """Raise on every process what went wrong on one of them. Every process has to come here.

    Args:
        error: what went wrong on this process, if anything.
        process: its index.
    """
    failure = first_failure(error, process)
    if failure is None:
        return
    if isinstance(error, OmniOPDError):
        error.on_every_process = failure.is_ours
    if error is not None:
        raise error
    raise stop(failure, failure.text)


# ---- Launches ----

# Set by that launcher of accelerate which starts a single process, and not by the others.
_ONE_PROCESS = "ACCELERATE_USE_CPU"
# Set by all of its launchers, and by nobody else.
_BY_ACCELERATE = "ACCELERATE_DYNAMO_MODE"
# Where the processes find each other: a single one is told it only if more were asked for.
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


class Started(NamedTuple):
    """How a process was started."""

    environment: Mapping[str, str]  # as it was then: not what the process has set since
    command: Sequence[str]


def lineage() -> Iterator[Started]:
    """How this process was started, its parent, that one's parent, and so on.

    Raises:
        psutil.Error: where the system does not say.
    """
    import psutil

    process: psutil.Process | None = psutil.Process()
    while process is not None:
        yield Started(process.environ(), process.cmdline())
        process = process.parent()


def lost_processes(started: Iterator[Started]) -> str | None:
    """What went wrong in the launch of a process that trains alone.

    Args:
        started: from [`lineage`].

    Returns:
        What happened and what to do instead; `None` when nothing says that there should be more than one process.
    """
    environment = next(started).environment
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        return (
            f"{environment['WORLD_SIZE']} processes were started, and this one trains alone: without a GPU they find "
            "each other only with `use_cpu: true` in the recipe, or `use_cpu=True` in `OmniOPDConfig`. Stop the run: "
            "each of them writes over the output of the others."
        )
    if not {_ONE_PROCESS, _BY_ACCELERATE, *_MEETING_POINT} <= environment.keys():
        return None
    # A shell or a wrapper in between has the variables as well.
    launcher = next((process for process in started if _BY_ACCELERATE not in process.environment), None)
    if launcher is None:
        return None
    asked = _option(launcher.command, "num_processes")
    # Whoever sets the meeting point for every run, as vLLM asks for, need not have asked for several processes.
    if launcher.environment.keys() >= set(_MEETING_POINT) and (asked is None or asked < 2):
        return None
    number = "more than one process" if asked is None else f"{asked} processes"
    return (
        f"`accelerate launch` was asked for {number} and has started one: with `--cpu`, or where there is no GPU for "
        "each, it starts no more, without a word. This run trains alone. For two processes on the CPU, with `use_cpu: "
        "true`: `omniopd train --accelerate_config cpu_2 ...`, `accelerate launch --multi_gpu --num_processes 2 ...` "
        "(it does not need a GPU) or `torchrun --nproc_per_node 2 ...`. If one is what you want: `--num_processes 1`."
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
    """Warn, once, when this process trains alone though the launch asked for more. It never fails.

    Args:
        num_processes: that train together, `args.world_size`.
    """
    if num_processes > 1:
        return
    try:
        message = lost_processes(lineage())
    except Exception:  # What a system or a container does not show stays unsaid: this must never end a run.
        return
    if message is not None:
        logger.warning(message)
