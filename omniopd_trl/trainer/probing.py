# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The generation batches of a run without its training: what `omniopd probe` measures."""

import random
from itertools import islice
from typing import Any, NamedTuple

from omniopd_trl.audits.types import Audit, Fork, PolicyScores, Trajectory
from omniopd_trl.errors import BudgetError
from omniopd_trl.journal.browse import AuditedTrajectory, list_audits, read_audits
from omniopd_trl.trainer.omniopd_trainer import OmniOPDTrainer
from omniopd_trl.trainer.step_audits import PendingAudit


class Probed(NamedTuple):
    """A trajectory of the initial student, its audit, and the record of it, which holds what the audit cost."""

    trajectory: Trajectory
    scores: PolicyScores
    audit: Audit
    record: AuditedTrajectory


class ProbingTrainer(OmniOPDTrainer):
    """A trainer that generates and audits as in training, and never trains.

    Generation, forks, budget and journal are those of [`OmniOPDTrainer`]. A probe that was interrupted continues from
    its journal, and pays for no answer twice.

    Args:
        forks_per_trajectory: forks of each trajectory, drawn at random from those that a run would have.
    """

    def __init__(self, *args: Any, forks_per_trajectory: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pending: list[tuple[int, PendingAudit]] = []
        keep = self.auditor.forks

        def some(trajectory: Trajectory, *sampled: Any) -> tuple[Fork, ...]:
            forks = keep(trajectory, *sampled)
            if len(forks) > forks_per_trajectory:
                kept = random.Random(trajectory.seed).sample(range(len(forks)), forks_per_trajectory)
                forks = tuple(forks[index] for index in sorted(kept))
            return forks

        self.auditor.forks = some  # type: ignore[assignment, method-assign]

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
        self._pending = []
        self._reset_step(None)
        self.model.train()  # records, branches and seeds are those of training steps; sampling is without dropout
        try:
            with self._recording(replay=True):
                accumulation = self.args.gradient_accumulation_steps
                batches = islice(self.get_train_dataloader(), num_batches * accumulation)
                for self._step, inputs in enumerate(batches):
                    self.state.global_step = self._step // accumulation
                    self._prepare_inputs(inputs)
        except BudgetError as error:
            stopped = str(error)
        finally:
            self.step_audits.release()
        places = list_audits(self.args.output_dir)
        records = {(r.step, r.index): r for r in read_audits(self.args.output_dir, places)}
        found = [
            Probed(row.trajectory, row.scores, row.future.result(), records[step, row.index])
            for step, row in self._pending
            if row.future.done() and not row.future.cancelled() and row.future.exception() is None
        ]
        return found, stopped
