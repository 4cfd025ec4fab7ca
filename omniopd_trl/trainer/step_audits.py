# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Audits that are under way: waiting for them, and seeing that not too much of what they should bring is missing."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from omniopd_trl.audits.types import Audit, PolicyScores
from omniopd_trl.errors import TeacherError
from omniopd_trl.trainer.distributed import Failure, first_failure
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig


@dataclass(frozen=True)
class PendingAudit:
    """A trajectory whose audit was started."""

    scored: PolicyScores
    future: "Future[Audit]"


def first_finished(batches: Sequence[list[PendingAudit]]) -> int:
    """Index of the first batch whose audits have all come back; waits until there is one."""
    while True:
        for index, audits in enumerate(batches):
            if all(audit.future.done() for audit in audits):
                return index
        open_futures = [a.future for audits in batches for a in audits if not a.future.done()]
        wait(open_futures, return_when=FIRST_COMPLETED)


def wait_for(pending: list[PendingAudit]) -> tuple[list[Audit], Exception | None]:
    """The audits, in order; up to the first that failed, and its error."""
    audits: list[Audit] = []
    for audit in pending:
        try:
            audits.append(audit.future.result())
        except Exception as error:  # the others learn of it first, whatever it is: none may wait for this one
            return audits, error
    return audits, None


class DroppedChunks:
    """Counts the chunks of a generation batch that got too few rollouts, on all processes.

    Args:
        accelerator: knows the other processes.
        args: `min_rollouts`, below which a chunk is dropped, and `max_failed_chunks`, the fraction of dropped ones
            above which a run must not go on.
    """

    def __init__(self, accelerator: Accelerator, args: OmniOPDConfig):
        self._accelerator = accelerator
        self._args = args
        self.start()

    def start(self) -> None:
        """Begin a generation batch."""
        self._asked = self._dropped = 0
        self._failures: list[str] = []

    def count(self, audits: list[Audit], error: Exception | None, is_last: bool) -> Failure | None:
        """Count some audits of this process. Every process comes here, at the same point.

        Args:
            audits: of a batch or micro-batch.
            error: what this process met while it waited for them.
            is_last: whether they end the generation batch, which is then judged as a whole.

        Returns:
            Why the run cannot go on, the same on every process; `None` when it can.
        """
        self._dropped += sum(audit.num_dropped for audit in audits)
        self._asked += sum(audit.num_dropped + len(audit.chunks) for audit in audits)
        self._failures += [failure for audit in audits for failure in audit.failures]
        accelerator, args = self._accelerator, self._args
        state = torch.tensor([[error is not None, self._dropped, self._asked]], device=accelerator.device)
        failed, dropped, asked = accelerator.gather(state).sum(0).tolist()
        if failed:
            return first_failure(error, accelerator.process_index)
        if not is_last:
            return None
        failures = self._failures
        self.start()
        if dropped <= args.max_failed_chunks * asked:
            return None
        why = next(iter(gather_object(failures)), "no reason given")
        reason = (
            f"{dropped} of {asked} chunks got fewer than min_rollouts={args.min_rollouts} rollouts, more than "
            f"max_failed_chunks={args.max_failed_chunks:g} of the batch. One of the causes: {why}"
        )
        return Failure(TeacherError, reason, is_ours=True)
