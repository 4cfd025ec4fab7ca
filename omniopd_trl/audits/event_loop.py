# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The event loop that teachers run on."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from omniopd_trl.teachers.base import Teacher

logger = logging.getLogger(__name__)

# How long a cancelled task may take to end before it is cancelled again.
CANCEL_AGAIN_SECONDS = 5.0

T = TypeVar("T")


class EventLoopThread:
    """An event loop in a separate thread.

    The trainer is synchronous and may itself run inside an event loop, for example in a notebook. The clients of
    remote teachers need one loop for the whole run.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._cancelled = threading.Event()  # `cancel` sets it and creates a new one
        self._thread = threading.Thread(target=self._loop.run_forever, name="omniopd-teacher", daemon=True)
        self._thread.start()

    def submit(self, *coroutines: Coroutine[Any, Any, T]) -> "list[Future[T]]":
        """Start coroutines in the same iteration of the loop.

        Returns:
            One future per coroutine. Its `result()` waits for the coroutine and raises its exception.
        """
        futures: list[Future[T]] = [Future() for _ in coroutines]
        cancelled = self._cancelled

        async def begin(coroutine: Coroutine[Any, Any, T]) -> T:
            # A teacher that computes in this thread blocks the loop. A coroutine that waited must not start after
            # `cancel`.
            if cancelled.is_set():
                coroutine.close()
                raise asyncio.CancelledError
            return await _contained(coroutine)

        def start() -> None:
            for coroutine, future in zip(coroutines, futures, strict=True):
                task = self._loop.create_task(begin(coroutine))
                task.add_done_callback(partial(_copy_result, future))

        self._loop.call_soon_threadsafe(start)
        return futures

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Start one coroutine and wait for it."""
        return self.submit(coroutine)[0].result()

    def cancel(self) -> None:
        """Cancel everything that was submitted and is not finished, and wait until it has ended."""

        async def cancel_others() -> None:
            others = pending = asyncio.all_tasks() - {asyncio.current_task()}
            while pending:
                for task in pending:
                    task.cancel()
                # A library may swallow a cancellation, and its caller would continue.
                _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECONDS)
            await asyncio.gather(*others, return_exceptions=True)

        self._cancelled.set()
        self._cancelled = threading.Event()
        self.run(cancel_others())

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _contained(coroutine: Coroutine[Any, Any, T]) -> T:
    """Turn an exception that ends a process into an error that the trainer can report to the other processes.

    `SystemExit` would end the loop instead, and the trainer would wait forever for everything in flight.
    """
    try:
        return await coroutine
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise RuntimeError(f"a teacher raised {type(error).__name__}({error}), which ends a process") from error


def _copy_result(future: "Future[T]", task: "asyncio.Task[T]") -> None:
    if task.cancelled():
        future.cancel()
        future.set_running_or_notify_cancel()  # `cancel` alone does not wake a thread that waits
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


def release(teacher: Teacher, loop: EventLoopThread) -> None:
    """Close a teacher's connections in the loop that they belong to. It can be asked again afterwards.

    What is in flight is cancelled. A teacher that cannot be closed is no reason to lose what was trained.

    Args:
        teacher: the teacher.
        loop: the loop that asked it.
    """
    loop.cancel()
    try:
        loop.run(teacher.aclose())
    except Exception as error:
        logger.warning(f"The teacher {teacher.name} could not be closed ({type(error).__name__}: {error}).")
