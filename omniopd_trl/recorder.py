# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a run keeps on disk while it is under way: trajectories, audits, and every request that was paid for."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omniopd_trl.journal import Journal, ProcessCountError, StoredTrajectory
from omniopd_trl.teachers.base import Usage
from omniopd_trl.teachers.budget import Budget

logger = logging.getLogger(__name__)


class Recorder:
    """A journal while one is open, and a short memory of what was used while none was.

    Args:
        step: the current optimizer step, asked for as something is written.
    """

    def __init__(self, step: Callable[[], int]):
        self.journal: Journal | None = None
        self._step = step
        # What was used while no journal was open, and what it cost: the probe, and evaluation after the training.
        self._unrecorded: list[tuple[Usage, float | None]] = []

    @contextmanager
    def open(self, path: Path, budget: Budget | None, **settings: Any) -> Iterator[None]:
        """Keep what happens in this block in the journal at `path`, and no longer: others may use the folder then.

        Args:
            path: the journal of this process.
            budget: the teacher's, if it has one; what it has under way is written before it is sent.
            **settings: of `Journal`.

        Raises:
            JournalError: as `Journal`.
        """
        try:
            journal = Journal(path, **settings)
        except ProcessCountError as error:
            logger.warning("%s What it holds is not replayed: the teacher is asked again.", error)
            journal = Journal(path, **settings, replay=False)
        with journal:
            self.journal = journal
            while self._unrecorded:
                self.meter(*self._unrecorded.pop())
            if journal.lost is not None:
                _warn_about_lost_requests(*journal.lost)
            if budget is not None:
                budget.on_under_way = self._meter_under_way
            try:
                yield
            finally:
                self.journal = None

    def meter(self, usage: Usage, usd: float | None) -> None:
        """Count a request that belongs to no audit of a training step."""
        if self.journal is None:
            self._unrecorded.append((usage, usd))
        else:
            self.journal.record_usage(self._step(), None, usage, usd)

    def _meter_under_way(self, tokens: int, usd: float | None) -> None:
        """Keep what the requests under way can cost, in case that nobody lives to count them."""
        if self.journal is not None:
            self.journal.record_under_way(self._step(), tokens, usd)

    def stored(self, prompt_ids: list[list[int]]) -> list[StoredTrajectory] | None:
        """The current step's trajectories, where the journal holds some of these very prompts."""
        trajectories = self.journal.trajectories(self._step()) if self.journal is not None else None
        if trajectories is None or [t.prompt_ids for t in trajectories] != [list(ids) for ids in prompt_ids]:
            return None
        return trajectories


def _warn_about_lost_requests(tokens: int, usd: float | None) -> None:
    cost = "" if usd is None else f" ({usd:.4f} dollars)"
    logger.warning(
        "The last run in this folder was killed while requests were under way. Nobody knows what was charged for "
        "them, so the most that it can be counts as spent: %s tokens%s.",
        tokens,
        cost,
    )
