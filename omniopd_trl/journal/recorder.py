# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Records of a run on disk: trajectories, audits, and every paid request."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Ledger, Usage
from omniopd_trl.audits.types import Trajectory
from omniopd_trl.errors import WarnOnce
from omniopd_trl.journal.schema import JournalError, NotReplayed, ProcessCountError, Shown
from omniopd_trl.journal.store import Journal

logger = logging.getLogger(__name__)


class Recorder(Ledger):
    """Writes to a journal while one is open, and keeps usage in memory while none is.

    As a ledger it counts the requests outside the audits of training steps, and records the peak of the requests in
    flight. `AuditLedger` is the ledger of one audit.

    Args:
        step: returns the current optimizer step. Called for every record.
    """

    def __init__(self, step: Callable[[], int]):
        self.journal: Journal | None = None
        self._step = step
        # Usage and cost while no journal was open: the probe, an evaluation after training, a run without one.
        self._unrecorded: tuple[Usage, float | None] = Usage(), None
        self._begun = False
        self._replay = False
        self._warns = True
        self._warn_once = WarnOnce(__name__)

    @contextmanager
    def open(self, path: Path, budget: Budget | None, *, replay: bool, **settings: Any) -> Iterator[None]:
        """Write to the journal at `path` inside this block. After it, other processes may use the folder.

        Args:
            path: the journal of this process.
            budget: budget of the teacher, if it has one. Its requests in flight are recorded before they are sent.
            replay: whether earlier records are replayed.
            **settings: other keyword arguments of `Journal`.

        Raises:
            JournalError: as `Journal`.
        """
        try:
            journal = Journal(path, **settings, replay=replay)
        except ProcessCountError as error:
            logger.warning("%s What it holds is not replayed: the teacher is asked again.", error)
            journal = Journal(path, **settings, replay=False)
        with journal:
            self.journal = journal
            self._begun, self._replay, self._warn_once = False, replay, WarnOnce(__name__)
            self._warns = settings["rank"] == 0  # the journals of the others hold the same steps
            if self._unrecorded != (Usage(), None):
                self.paid(*self._unrecorded)
                self._unrecorded = Usage(), None
            if journal.lost is not None:
                _warn_about_lost_requests(*journal.lost)
            if budget is not None:
                budget.ledger = self
            try:
                yield
            finally:
                self.journal = None

    def show(self, shown: Iterable[Shown]) -> None:
        """Write what people want to see of the current step's audits, if a journal is open."""
        if self.journal is not None:
            self._write_for_people(lambda journal: journal.record_shown(self._step(), shown), self.journal)

    def log(self, logs: Mapping[str, Any]) -> None:
        """Write an entry of the trainer's log, if a journal is open."""
        if self.journal is not None:
            self._write_for_people(lambda journal: journal.record_log(logs), self.journal)

    def _write_for_people(self, write: Callable[[Journal], None], journal: Journal) -> None:
        """Write what no run reads again. If it cannot be written, the run continues: the next audit will tell."""
        try:
            write(journal)
        except JournalError as error:
            self._warn_once(f"`omniopd audits` and `omniopd report` will be incomplete: {error}", "for people")

    def paid(self, usage: Usage, usd: float | None) -> None:
        if self.journal is None:
            before, dollars = self._unrecorded
            self._unrecorded = before + usage, dollars if usd is None else (dollars or 0.0) + usd
        else:
            self.journal.record_usage(self._step(), None, usage, usd)

    def in_flight(self, tokens: int, usd: float | None) -> None:
        if self.journal is not None:
            self.journal.record_in_flight(self._step(), tokens, usd)

    def stored(self) -> list[Trajectory] | None:
        """The current step's trajectories, if the journal holds them; otherwise `None`."""
        if self.journal is None:
            return None
        self._begin(self.journal)
        return self.journal.trajectories(self._step())

    def warn_about_other_prompts(self) -> None:
        """Say once that the current step is not replayed, since it was recorded with other prompts."""
        self._warn_once(
            f"Step {self._step()} was recorded with other prompts, or other texts that only the teacher sees, or "
            "other columns for a verifier, and is not replayed, nor are the steps recorded after it: the teacher is "
            "asked again and paid again. Restore the dataset and its order, or continue.",
            "prompts",
        )

    def num_recorded(self) -> tuple[int, int]:
        """Steps that are replayed when training begins at the current step, and their finished audits."""
        if self.journal is None:
            return 0, 0
        self._begin(self.journal)
        return self.journal.num_recorded(self._step())

    def _begin(self, journal: Journal) -> None:
        """Say once what the first step of a run means for the records of earlier runs."""
        if self._begun:
            return
        self._begun = True
        step = self._step()
        not_replayed = journal.begin(step)
        if not self._warns:
            return
        if not_replayed is not None:
            _warn_about_steps_that_are_paid_for_again(not_replayed)
        if not self._replay and (earlier := journal.num_earlier_steps()):
            logger.warning(
                "This run starts over. %s of an earlier run in %s not replayed: the teacher is asked and paid again, "
                "and what was spent counts. To replay, stop this run now and start it with "
                "resume_from_checkpoint=True (`--resume_from_checkpoint true`).",
                "1 recorded step" if earlier == 1 else f"{earlier} recorded steps",
                f"{journal.path.parent} {'is' if earlier == 1 else 'are'}",
            )
        if self._replay and (last := journal.last_step) is not None and last < step - 1:
            logger.warning(
                "The checkpoint of step %s is not of the newest run in this folder, which has recorded steps up to "
                "%s. To continue that run, set resume_from_checkpoint to the path of its last checkpoint.",
                step,
                last,
            )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a fast tokenizer beside the journals, for the texts of single tokens in `omniopd report`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    path = folder / "tokenizer.json"
    if backend is not None and not path.exists():
        path.write_text(backend.to_str(), "utf-8")


def _warn_about_lost_requests(tokens: int, usd: float | None) -> None:
    cost = "" if usd is None else f" ({usd:.4f} dollars)"
    logger.warning(
        "The last run in this folder was killed while requests were in flight. Their cost is not known, so their "
        "worst case counts as spent: %s tokens%s.",
        tokens,
        cost,
    )


def _warn_about_steps_that_are_paid_for_again(what: NotReplayed) -> None:
    if what.other_settings:
        reason = "they were recorded by an earlier version of omniopd_trl"
        if what.differences:
            named = [f"{name} was {_short(was)} and is {_short(now)}" for name, (was, now) in what.differences.items()]
            more = [f"{len(named) - 8} more settings differ"] if len(named) > 8 else []
            reason = ", ".join([*named[:8], *more])
        logger.warning(
            "%s recorded %s not replayed, since %s: the teacher is asked again and paid again. Restore the settings, "
            "or continue.",
            what.other_settings,
            "step is" if what.other_settings == 1 else "steps are",
            reason,
        )
    if what.superseded:
        logger.warning(
            "%s recorded %s not replayed, since a run with other settings has trained in this folder after it was "
            "recorded, and the checkpoint may be from that run: the teacher is asked again and paid again. Without "
            "checkpoints in the folder, resume_from_checkpoint=True replays from step 0 what these settings recorded.",
            what.superseded,
            "step is" if what.superseded == 1 else "steps are",
        )


def _short(value: str | None) -> str:
    """The value of a setting, shortened for a message."""
    if value is None:
        return "not set"
    return value if len(value) <= 60 else f"{value[:57]}..."
