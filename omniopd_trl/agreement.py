# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on one process, told to all of them: none waits for one that has stopped."""

from typing import NamedTuple

from accelerate.utils import gather_object

from omniopd_trl.errors import OmniOPDError, TeacherError


class Failure(NamedTuple):
    """An error, in a form that travels between processes: errors of other packages need not survive pickling."""

    kind: type[OmniOPDError]
    text: str
    is_ours: bool  # the message says all that there is to say; of other errors the traceback is needed

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
    return failures[0]._replace(is_ours=all(failure.is_ours for failure in failures)) if failures else None


def stop(failure: Failure, error: Exception | None, message: str) -> Exception:
    """What this process raises for a failure that all have learnt of.

    Args:
        failure: from [`first_failure`].
        error: what went wrong on this process itself. An error that is not ours is raised as it is, for its traceback.
        message: for the user.
    """
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
    raise stop(failure, None, failure.text)
