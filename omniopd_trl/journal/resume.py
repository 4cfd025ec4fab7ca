# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""An audit that is paid for once: from the journal where it is there, from the teacher where it is not."""

from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from omniopd_trl.accounting.usage import ANSWERS, METER, KeptAnswers, Usage
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import Audit, PolicyScores, Trajectory
from omniopd_trl.journal.store import Journal

T = TypeVar("T")


async def with_meter(meter: Callable[[Usage, float | None], None], coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine while `meter` is told what each request used and cost."""
    token = METER.set(meter)
    try:
        return await coroutine
    finally:
        METER.reset(token)


async def audit_or_replay(
    auditor: Auditor, trajectory: Trajectory, scores: PolicyScores, journal: Journal | None, step: int, index: int
) -> Audit:
    """Audit a trajectory, unless the journal holds its audit.

    Requests are counted as soon as they are answered, and their answers are kept with that, where the teacher asks for
    it (those behind a service do). The audit is kept before it is returned, in place of its answers. Whatever is
    killed, nothing that was answered is lost, and nothing is paid for twice.

    Args:
        auditor: asks the teacher.
        trajectory: what to audit.
        scores: of its tokens.
        journal: holds the trajectories of `step`; `None` keeps nothing.
        step: the optimizer step that the trajectory belongs to.
        index: its place in the generation batch of this process.

    Returns:
        The audit. One from the journal has no usage and no outcomes, since it costs nothing now; nor have answers from
        the journal a usage.

    Raises:
        TeacherError: as `Auditor.audit`.
        JournalError: when the journal cannot be read or written.
    """
    if journal is None:
        return await auditor.audit(trajectory, scores)
    stored = journal.audit(step, index)
    if stored is not None:
        return replace(stored, usage=Usage(), outcomes={})
    kept, times, metered = journal.answers(step, index), Counter[str](), Usage()

    def meter(usage: Usage, usd: float | None) -> None:
        nonlocal metered
        metered = metered + usage
        journal.record_usage(step, index, usage, usd)

    def keep(request: str, start: int, size: int, samples: Any, usage: Usage, usd: float | None) -> None:
        nonlocal metered
        metered = metered + usage
        journal.record_answer(step, index, request, start, [size, samples], usage, usd)

    def answers(request: str) -> KeptAnswers:
        # Who asks for the same twice wants two answers: two chunks may have one prefix.
        times[request] += 1
        request = f"{request} {times[request]}"
        found = [(start, size, samples) for start, (size, samples) in kept.get(request, {}).items()]
        return KeptAnswers(found, partial(keep, request))

    token = ANSWERS.set(answers)
    try:
        audit = await with_meter(meter, auditor.audit(trajectory, scores))
    finally:
        ANSWERS.reset(token)
    if metered == Usage():  # a teacher that does not meter its requests
        journal.record_usage(step, index, audit.usage)
    journal.record(step, index, audit)
    return audit
