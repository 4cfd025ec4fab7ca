# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Audits that are paid for once: replayed from the journal if recorded, otherwise requested."""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from omniopd_trl.accounting.usage import KeptAnswers, Ledger, Usage
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import Audit, PolicyScores, Trajectory
from omniopd_trl.errors import OmniOPDError
from omniopd_trl.journal.store import Journal

logger = logging.getLogger(__name__)


class AuditLedger(Ledger):
    """The ledger of one audit of a training step, in a journal.

    Args:
        journal: journal that holds the trajectories of `step`.
        step: the optimizer step that the trajectory belongs to.
        index: index of the trajectory in the generation batch of this process.

    Attributes:
        usage: usage counted so far.
        num_kept: number of requests whose answers the journal holds.
    """

    def __init__(self, journal: Journal, step: int, index: int):
        self.usage = Usage()
        self._journal = journal
        self._step = step
        self._index = index
        self._kept = journal.answers(step, index)
        self.num_kept = len(self._kept)
        self._times = Counter[str]()

    def paid(self, usage: Usage, usd: float | None) -> None:
        self.usage = self.usage + usage
        self._journal.record_usage(self._step, self._index, usage, usd)

    def in_flight(self, tokens: int, usd: float | None) -> None:
        self._journal.record_in_flight(self._step, tokens, usd)

    def answers(self, request: str) -> KeptAnswers:
        # Equal requests are numbered, because two chunks may have the same prefix and need two answers.
        self._times[request] += 1
        request = f"{request} {self._times[request]}"
        found = [(start, size, samples) for start, (size, samples) in self._kept.get(request, {}).items()]
        return KeptAnswers(found, partial(self._keep, request))

    def _keep(self, request: str, start: int, size: int, samples: Any, usage: Usage, usd: float | None) -> None:
        self.usage = self.usage + usage
        self._journal.record_answer(self._step, self._index, request, start, [size, samples], usage, usd)


async def audit_or_replay(
    auditor: Auditor, trajectory: Trajectory, scores: PolicyScores, journal: Journal | None, step: int, index: int
) -> Audit:
    """Audit a trajectory, unless the journal holds its audit.

    Each request is counted as soon as it is answered. A teacher behind a service records the answer together with its
    cost. The finished audit is recorded before it is returned, in place of its answers. When a run is killed, no
    answer is lost and none is paid for twice. Answers of an earlier run that raise an error when they are read are set
    aside.

    Args:
        auditor: auditor that sends requests to the teacher.
        trajectory: trajectory to audit, with a completion of `T` tokens.
        scores: scores of its tokens, `(T,)`.
        journal: journal that holds the trajectories of `step`; `None` records nothing.
        step: the optimizer step that the trajectory belongs to.
        index: index of the trajectory in the generation batch of this process.

    Returns:
        The audit. A replayed audit has no usage, no cost and no outcomes, because it costs nothing now. The count of
        malformed answers stays, as the answers do. Replayed answers have no usage either.

    Raises:
        TeacherError: as `Auditor.audit`.
        JournalError: when the journal cannot be read or written.
    """
    if journal is None:
        return await auditor.audit(trajectory, scores)
    stored = journal.audit(step, index)
    if stored is not None:
        malformed = {name: count for name, count in stored.outcomes.items() if name == "malformed"}
        return replace(stored, usage=Usage(), usd=None, outcomes=malformed)
    ledger = AuditLedger(journal, step, index)
    try:
        answered = await auditor.ask(trajectory, scores, ledger)
    except OmniOPDError:
        raise
    except Exception as error:
        if not ledger.num_kept:
            raise
        # Otherwise each resumed run would read the same answers and end here.
        logger.warning(
            "%s answers that the journal holds for trajectory %s of step %s cannot be used (%s: %s). They are set "
            "aside, and the teacher is asked again.",
            journal.set_aside(step, index),
            index,
            step,
            type(error).__name__,
            error,
        )
        ledger = AuditLedger(journal, step, index)
        answered = await auditor.ask(trajectory, scores, ledger)
    audit = await auditor.score_later(answered)
    if ledger.usage == Usage():  # a teacher that does not account for its requests
        ledger.paid(audit.usage, None)
    journal.record(step, index, audit)
    return audit
