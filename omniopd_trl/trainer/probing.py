# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The generation batches of a run without its training: what `omniopd probe` measures."""

import asyncio
import random
from collections.abc import Coroutine
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import Audit, Fork, PolicyScores, Trajectory
from omniopd_trl.errors import BudgetError
from omniopd_trl.journal.browse import AuditedTrajectory, list_audits, read_audits
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.resume import audit_or_replay
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers.instruct.judge import Passage
from omniopd_trl.trainer.fingerprint import fingerprint
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer
from omniopd_trl.trainer.step_audits import PendingAudit

# The folder, in that of a probe, of what a judge said when it was asked again.
AGAIN = "again"


class Probed(NamedTuple):
    """A trajectory of the initial student, its audit, and the record of it, which holds what the audit cost.

    `again` is the second audit of a judge; `None` where it was not asked again.
    """

    trajectory: Trajectory
    scores: PolicyScores
    audit: Audit
    record: AuditedTrajectory
    again: Audit | None = None


class ReversedAuditor(Auditor):
    """An auditor that shows the candidates of each fork to a judge in reverse order."""

    def passages(self, *args: Any) -> tuple[list[Passage], str]:
        passages, rest = super().passages(*args)
        return [replace(passage, candidates=passage.candidates[::-1]) for passage in passages], rest


class ProbingTrainer(OmniOPDTrainer):
    """A trainer that generates and audits as in training, and never trains.

    Generation, forks, budget and journal are those of [`OmniOPDTrainer`]. A probe that was interrupted continues from
    its journal, and pays for no answer twice.

    With `signal: judge`, a judge is asked twice about each trajectory, the second time with the candidates of each
    fork in reverse order. A judge whose marks follow from the order, or from chance, does not repeat them. The second
    answers are in a journal of their own, in the folder `AGAIN`. The budget counts both, but not what an earlier start
    spent there: subtract it from the limits.

    Args:
        forks_per_trajectory: forks of each trajectory, drawn at random from those that a run would have.
    """

    def __init__(self, *args: Any, forks_per_trajectory: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pending: list[tuple[int, PendingAudit]] = []
        self._again: dict[tuple[int, int], Audit] = {}
        first = self.auditor
        self._reversed = ReversedAuditor(self.teacher, self._tokenizer, first.settings, first.similarity)
        keep = first.forks

        def some(trajectory: Trajectory, *sampled: Any) -> tuple[Fork, ...]:
            forks = keep(trajectory, *sampled)
            if len(forks) > forks_per_trajectory:
                kept = random.Random(trajectory.seed).sample(range(len(forks)), forks_per_trajectory)
                forks = tuple(forks[index] for index in sorted(kept))
            return forks

        first.forks = some  # type: ignore[assignment, method-assign]

    def probe_teacher(self, datasets: list[tuple[str, Any]]) -> None:
        if not list_audits(self.args.output_dir):  # recorded answers show that the teacher can be asked
            super().probe_teacher(datasets)

    def start_audits(self, inputs: list[dict[str, Any]], batch: dict[str, Any], mode: str) -> list[PendingAudit]:
        pending = super().start_audits(inputs, batch, mode)
        self._pending += [(self.state.global_step, row) for row in pending]
        return pending

    def probe(self, num_batches: int) -> tuple[list[Probed], str | None]:
        """Audit generation batches of the initial student.

        Args:
            num_batches: number of batches. `max_steps` has no effect: it belongs to the settings of the records, and
                more batches must replay those that are recorded.

        Returns:
            The finished audits in order, and why the budget stopped the probe; `None` when it did not.

        Raises:
            TeacherError: when the teacher cannot answer, for another reason than the budget.
        """
        stopped: str | None = None
        self._pending, self._again = [], {}
        accumulation = self.args.gradient_accumulation_steps
        self._reset_step(None)
        self.model.train()  # records, branches and seeds are those of training steps; sampling is without dropout
        try:
            # Audits end before the journal of the second ones is closed.
            with self._second_journal() as second, self._recording(replay=True):
                batches = islice(self.get_train_dataloader(), num_batches * accumulation)
                for self._step, inputs in enumerate(batches):
                    self.state.global_step = self._step // accumulation
                    self._prepare_inputs(inputs)
                    if second is not None and self._step % accumulation == accumulation - 1:
                        self._ask_again(second)
        except BudgetError as error:
            stopped = str(error)
        finally:
            self.step_audits.release()
        places = list_audits(self.args.output_dir)
        records = {(r.step, r.index): r for r in read_audits(self.args.output_dir, places)}
        found = [
            Probed(
                row.trajectory,
                row.scores,
                row.future.result(),
                records[step, row.index],
                self._again.get((step, row.index)),
            )
            for step, row in self._pending
            if row.future.done() and not row.future.cancelled() and row.future.exception() is None
        ]
        return found, stopped

    def _second_journal(self) -> "Journal | nullcontext[None]":
        if self.args.signal != "judge":
            return nullcontext()
        key = self._replay_key()
        journal = Journal(
            journal_path(Path(self.args.output_dir) / AGAIN, 0),
            run=AGAIN,
            teacher=self.teacher.name,
            fingerprint=fingerprint(key),
            settings=key,
            rank=0,
            num_processes=1,
        )
        journal.begin(0)
        return journal

    def _ask_again(self, journal: Journal) -> None:
        """Ask a judge again about the trajectories of the current step, of which it has marked some."""
        step = self.state.global_step
        rows = [row for of_step, row in self._pending if of_step == step]
        trajectories = [row.trajectory for row in rows]
        if journal.trajectories(step) != trajectories:
            journal.record_trajectories(step, trajectories)
            journal.record_forks(step, {i: t.forks for i, t in enumerate(trajectories) if t.forks is not None})
        marked = [index for index, row in enumerate(rows) if row.future.result().chunks]

        def audit(i: int) -> Coroutine[Any, Any, Audit]:
            return audit_or_replay(self._reversed, trajectories[i], rows[i].scores, journal, step, i)

        async def ask() -> list[Audit | BaseException]:
            # All of them, also after an error: what is in flight is paid for.
            return await asyncio.gather(*map(audit, marked), return_exceptions=True)

        answers = self.step_audits.ask(ask())
        self._again |= {(step, rows[i].index): a for i, a in zip(marked, answers, strict=True) if isinstance(a, Audit)}
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
