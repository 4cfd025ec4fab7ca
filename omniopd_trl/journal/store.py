# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what was generated, audited and paid for, in one SQLite file per process.

There are five kinds of records:

- *Trajectories* of a generation batch are written before their audits are requested, all or none. Their branches are
  added to them before that as well.
- An *audit* is written as soon as it is finished.
- An *answer* is written as it arrives, until the audit that needs it is finished.
- *Usage* is written for each request as soon as it is answered, in one transaction with the answer if that is kept.
  The ledger is computed from usage only; an audit's own `usage` is for display. A request counts once, whether or not
  its audit is finished, and a replayed audit counts nothing.
- The worst case of all requests *in flight* is written before they are sent (table `under_way`). What a killed process
  was charged for them is not known, so the next process that opens the file counts the worst case as used.

**Attempts.** Each set of trajectories is an attempt at its step. A new attempt at step `s` supersedes all earlier
attempts at `s` and at later steps, because those came from another student. Superseded attempts stay in the file and
in the ledger, but are not replayed. Attempts of another fingerprint or number of processes are not replayed either.
The settings of a fingerprint are stored to report differences. An attempt of another fingerprint supersedes others
only when all its audits are finished: before that, no student has learned from it. It supersedes nothing for a run
that begins at step 0 with the fingerprint's initial student, so restoring the settings restores the records. An
attempt for which nothing was paid does not supersede one of the same fingerprint for which something was.

A run that starts over (`replay=False`) replays nothing, and its attempts supersede those of earlier runs like any
others. A run that resumes it replays its records.

**Damage.** Opening a journal checks its small tables. The records of a step are checked against their checksums and
their number when the step is replayed, and usage when it is summed. So no damaged record is used, and the time that a
resumed run needs depends on the steps that it replays, not on the size of the file.

**A lost file.** When the file is deleted while it is open, the next record restores it: the process still holds its
contents.

**Durability.** When a method returns, its transaction is committed: the record survives `kill -9`. Against a power
failure, the file is synchronized once per generation batch. Records written since then may be lost, but the file stays
intact.
"""

import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from itertools import chain, repeat, takewhile
from pathlib import Path
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Fork, Trajectory, Verified
from omniopd_trl.journal.file import (
    check,
    check_log,
    check_num_processes,
    check_size,
    check_table,
    checksum_of,
    connect,
    create,
    damage_error,
    explained,
    hold_lock,
    lock_path,
    upgrade,
)
from omniopd_trl.journal.records import ENTROPY_UNIT, decode, encode, restore_chunks
from omniopd_trl.journal.schema import ATTEMPTS, LEDGER, TOTALS, JournalError, LedgerRow, NotReplayed, Shown
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import common_prefix_length

logger = logging.getLogger(__name__)


# The values of a recorded trajectory, in order. The last ones are left out when they are `None`.
_TRAJECTORY = (
    *("prompt", "prompt_ids", "completion_ids", "seed", "sampling_logprobs", "forks", "teacher_context", "verified"),
    "row",
)


class Journal:
    """The journal of one process. Its methods may be called from any thread.

    Args:
        path: see `journal_path`. Folder and file are created when they do not exist.
        run: name of the run, for the ledger.
        teacher: name of the teacher, for the ledger.
        fingerprint: hash of everything that a replayed record depends on besides the checkpoint: models, data, seed,
            sampling, chunks, similarity, prior. Records of another fingerprint are counted but not replayed.
        settings: settings from which the fingerprint is computed, by name. They explain why records are not replayed.
            They are stored in plain text and must hold no secret.
        rank: index of this process.
        num_processes: number of processes. The records of another number belong to other prompts.
        replay: whether earlier records are replayed. `False` starts over: it opens a journal of any number of
            processes, for the ledger and for new records.

    Raises:
        JournalError: when the file is damaged, in use by another process, or of another version.
        ProcessCountError: when it was last written by another number of processes.

    In each case the file is left unchanged.

    Attributes:
        lost: worst case of the requests that were in flight when the last process that wrote the file was killed, in
            tokens and US dollars (`None` without a price). It counts as used. `None` when there were no such requests.
    """

    def __init__(
        self,
        path: Path,
        *,
        run: str,
        teacher: str,
        fingerprint: str,
        rank: int,
        num_processes: int,
        settings: Mapping[str, Any] | None = None,
        replay: bool = True,
    ):
        self.path = path
        self._replay = replay
        self._key = (fingerprint, num_processes)
        self._mutex = threading.Lock()
        self._checked: set[int] = set()  # attempts whose records are known to be whole
        self._not_counted: JournalError | None = None
        with ExitStack() as stack:  # closes everything after an error
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = hold_lock(path)
                stack.callback(lambda: self._lock.close())
                if not path.exists():
                    create(path)
                check_log(path)
                check_size(path)
                with closing(connect(path, "ro")) as db:  # a damaged file is not written to
                    check(db, path)
                    if replay:
                        check_num_processes(db, path, num_processes)
                self._connect()
                stack.callback(lambda: self._db.close())
            with self._transaction() as db:
                values = (run, teacher, fingerprint, rank, num_processes, time.time())
                upgrade(db)
                self._session = _insert_numbered(db, "sessions", *values)
                if settings is not None:
                    _insert(db, "settings", self._session, encode(settings))
                self.lost = _count_lost(db)
            with explained(path):
                self._attempts = _current(self._valid(self._db))
            self._stack = stack.pop_all()

    def _connect(self) -> None:
        self._db = connect(self.path, "rw")
        self._file = self.path.stat()
        # `check_log` relies on a log of this process alone, to which whole transactions are appended.
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("PRAGMA cache_spill = OFF")

    # ---- Trajectories and audits ----

    def begin(self, step: int) -> NotReplayed | None:
        """Set the step at which the run begins. Call it before anything is replayed.

        Args:
            step: 0 for the initial student, otherwise the step of the checkpoint that was loaded.

        Returns:
            The recorded steps from there on that are requested again, at least in part; `None` when there are none.
        """
        with self._reading() as db:
            everything = list(self._all(db))
            ours = [attempt for attempt in everything if attempt.ours]
            self._attempts = _current(ours if step == 0 else self._valid(db))
            if not self._replay:
                return None  # records of another number of processes are not comparable
            lost = [
                attempt
                for attempt in {*_current(everything).values(), *_current(ours).values()}
                if attempt.step >= step and attempt.is_paid and self._attempt(attempt.step) is None
            ]
            others = [attempt for attempt in lost if not attempt.ours]
            superseded = [attempt for attempt in lost if attempt.ours]
            if not others and not superseded:
                return None
            differences = self._differences(db, max(a.session for a in others)) if others else {}
        return NotReplayed(len(others), differences, len(superseded))

    def _differences(self, db: sqlite3.Connection, session: int) -> dict[str, tuple[str | None, str | None]]:
        rows = [
            db.execute("SELECT * FROM settings WHERE session = ?", (s,)).fetchone() for s in (session, self._session)
        ]
        if None in rows:
            return {}
        was, now = (
            {
                name: json.dumps(value, ensure_ascii=False, sort_keys=True)
                for name, value in decode(self.path, row).items()
            }
            for row in rows
        )
        return {
            name: (was.get(name), now.get(name)) for name in sorted({*was, *now}) if was.get(name) != now.get(name)
        }

    def record_trajectories(self, step: int, trajectories: list[Trajectory]) -> None:
        """Begin a new attempt at a step. All its trajectories are written, or none.

        Raises:
            JournalError: when they cannot be written.
        """
        payloads = []
        for t in trajectories:
            verified = None if t.verified is None else asdict(t.verified)
            # Forks follow: see `record_forks`.
            optional = [t.sampling_logprobs, None, t.teacher_context, verified, t.row]
            while optional and optional[-1] is None:
                optional.pop()
            payloads.append(encode([t.prompt, t.prompt_ids, t.completion_ids, t.seed, *optional]))
        # One commit per generation batch waits for the disk, and makes everything before it durable.
        with self._transaction(synchronous="FULL") as db:
            number = _insert_numbered(db, "attempts", self._session, step)
            _insert(db, "progress", number, len(payloads), 0, 0)
            for index, payload in enumerate(payloads):
                _insert(db, "trajectories", number, index, payload)
        self._checked.add(number)
        _supersede(self._attempts, _Attempt(number, step, self._session, True, len(payloads), 0, False))

    def record_forks(self, step: int, forks: Mapping[int, tuple[Fork, ...]]) -> None:
        """Add the forks of trajectories of the current attempt to their records, all or none.

        Args:
            step: optimizer step of the trajectories.
            forks: forks by the index of the trajectory.

        Raises:
            JournalError: when they cannot be written, or there are no recorded trajectories.
        """
        with self._transaction() as db:
            attempt = self._attempt_to_add_to(step)
            for index, of_trajectory in forks.items():
                key = (attempt, index)
                row = db.execute("SELECT * FROM trajectories WHERE attempt = ? AND idx = ?", key).fetchone()
                recorded = decode(self.path, row)
                recorded += [None] * (len(_TRAJECTORY) - len(recorded))
                forks_of = [(astuple(fork.chunk), list(map(astuple, fork.branches))) for fork in of_trajectory]
                recorded[_TRAJECTORY.index("forks")] = forks_of
                _insert(db, "trajectories", *key, encode(recorded))

    def trajectories(self, step: int) -> list[Trajectory] | None:
        """The trajectories of the current attempt at a step; `None` when there is none to replay.

        All processes must agree before any of them replays: one may have been killed just before it wrote.
        """
        with self._reading() as db:
            attempt = self._attempt(step)
            if attempt is None:
                return None
            self._check_records(db, attempt)
            rows = db.execute("SELECT * FROM trajectories WHERE attempt = ? ORDER BY idx", (attempt,)).fetchall()
        return [_trajectory_from_json(decode(self.path, row)) for row in rows]

    def record(self, step: int, index: int, audit: Audit) -> None:
        """Write a finished audit of the current attempt. It adds nothing to the ledger: see `record_usage`.

        Raises:
            JournalError: when it cannot be written, holds NaN or infinity, or has no recorded trajectories.
        """
        payload = encode(_audit_to_json(audit))
        with self._transaction() as db:
            attempt = self._attempt_to_add_to(step)
            if not db.execute("SELECT 1 FROM audits WHERE attempt = ? AND idx = ?", (attempt, index)).fetchone():
                trajectories, audits, asked = self._progress(db, attempt)
                was_asked = bool(audit.chunks or audit.num_dropped)
                _insert(db, "progress", attempt, trajectories, audits + 1, asked + was_asked)
            _insert(db, "audits", attempt, index, self._session, payload)
            db.execute("DELETE FROM answers WHERE attempt = ? AND idx = ?", (attempt, index))

    def audit(self, step: int, index: int) -> Audit | None:
        """The audit of a trajectory of the current attempt; `None` when it was not finished."""
        with self._reading() as db:
            attempt = self._attempt(step)
            if attempt is None:
                return None
            self._check_records(db, attempt)
            row = db.execute("SELECT * FROM audits WHERE attempt = ? AND idx = ?", (attempt, index)).fetchone()
        return None if row is None else _audit_from_json(decode(self.path, row))

    def record_shown(self, step: int, shown: Iterable[Shown]) -> None:
        """Write what people want to see of audits of the current attempt, besides the audits themselves.

        Raises:
            JournalError: as `record`.
        """
        with self._transaction() as db:
            attempt = self._attempt_to_add_to(step)
            for one in shown:
                entropies = [round(entropy / ENTROPY_UNIT) for entropy in one.entropies]
                logprobs = [float(f"{logprob:.9g}") for logprob in one.logprobs]  # exact for float32
                payload = encode([entropies, one.weights, logprobs, *([one.imitated] if one.imitated else [])])
                _insert(db, "shown", attempt, one.index, one.low, one.high, payload)

    def record_log(self, logs: Mapping[str, Any]) -> None:
        """Write an entry of the trainer's log. Values that are no finite numbers are left out."""
        finite = {
            name: value for name, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        with self._transaction() as db:
            _insert_numbered(db, "logs", self._session, encode(finite))

    def num_audits(self, step: int) -> int:
        """The number of finished audits of the current attempt at a step."""
        with self._reading() as db:
            attempt = self._attempt(step)
            return 0 if attempt is None else self._progress(db, attempt)[1]

    def num_recorded(self, step: int) -> tuple[int, int]:
        """Steps from `step` on that are replayed, and their finished audits, as they were when the file was opened."""
        attempts = [attempt for attempt in self._attempts.values() if attempt.ours and attempt.step >= step]
        return len(attempts), sum(attempt.num_audits for attempt in attempts)

    @property
    def last_step(self) -> int | None:
        """The last step with a current attempt, of any fingerprint; `None` when there is none."""
        return next(reversed(self._attempts), None)

    def num_earlier_steps(self) -> int:
        """The number of steps for which an earlier process that wrote the file has paid."""
        with self._reading() as db:
            return len({a.step for a in self._all(db) if a.is_paid and a.session != self._session})

    def _progress(self, db: sqlite3.Connection, attempt: int) -> tuple[int, int, int]:
        """The numbers of trajectories, of finished audits, and of those for which the teacher was asked."""
        row = db.execute("SELECT * FROM progress WHERE attempt = ?", (attempt,)).fetchone()
        if row is None or row[-1] != checksum_of(row[:-1]):
            raise damage_error(self.path, "the number of records of a step is not known")
        return row[1], row[2], row[3]

    def _check_records(self, db: sqlite3.Connection, attempt: int) -> None:
        """Check the records of an attempt before the first one is replayed: each checksum, and that none is missing.

        Damage to an index may hide a record, and its audit would silently be paid for again.
        """
        if attempt in self._checked:
            return
        for table, count in zip(("trajectories", "audits"), self._progress(db, attempt), strict=False):
            there = set()
            for *values, checksum in db.execute(f"SELECT * FROM {table} WHERE attempt = ?", (attempt,)):
                if checksum != checksum_of(values) or values[0] != attempt:
                    raise damage_error(self.path, f"the checksum of a row of {table!r} does not match")
                there.add(values[1])
            if len(there) != count or (table == "trajectories" and there != set(range(count))):
                raise damage_error(self.path, f"{len(there)} of {count} rows of {table!r} of a step can be read")
        self._checked.add(attempt)

    def record_answer(
        self, step: int, index: int, request: str, start: int, answer: Any, usage: Usage, usd: float | None = None
    ) -> None:
        """Write an answer of an unfinished audit and count its request, in one transaction.

        Args:
            step: optimizer step of the request.
            index: index of the trajectory.
            request: key of the request.
            start: index of the first sample in the answer.
            answer: the answer, serializable as JSON.
            usage: as in `record_usage`.
            usd: as in `record_usage`.

        Raises:
            JournalError: as `record` and `record_usage`.
        """
        payload = encode(answer)
        _check_amount(step, usd)
        with self._counting() as db:
            _insert(db, "answers", self._attempt_to_add_to(step), index, request, start, payload)
            _add_usage(db, self._session, step, index, usage, usd)

    def answers(self, step: int, index: int) -> dict[str, dict[int, Any]]:
        """The answers for the unfinished audit of a trajectory of the current attempt, by request and first sample."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT * FROM answers WHERE attempt = ? AND idx = ?", (self._attempt(step), index)
            ).fetchall()
        answers: dict[str, dict[int, Any]] = {}
        for row in rows:
            answers.setdefault(row[2], {})[row[3]] = decode(self.path, row)
        return answers

    def set_aside(self, step: int, index: int) -> int:
        """Keep the answers for the unfinished audit of a trajectory in the file, but never replay them.

        Returns:
            The number of answers.
        """
        with self._transaction() as db:
            key = (self._attempt(step), index)
            rows = db.execute("SELECT * FROM answers WHERE attempt = ? AND idx = ?", key).fetchall()
            for attempt, _, *values, _ in rows:
                _insert(db, "answers", attempt, ~index, *values)
            db.execute("DELETE FROM answers WHERE attempt = ? AND idx = ?", key)
        return len(rows)

    def _attempt_to_add_to(self, step: int) -> int:
        attempt = self._attempt(step)
        if attempt is None:
            raise JournalError(
                f"An audit of step {step} cannot be recorded in {self.path}, which holds no trajectories for it. "
                "Record the trajectories of a step before its audits."
            )
        return attempt

    def _attempt(self, step: int) -> int | None:
        """The attempt that counts for a step, if it may be replayed."""
        attempt = self._attempts.get(step)
        return attempt.id if attempt is not None and attempt.ours else None

    def _valid(self, db: sqlite3.Connection) -> Iterator["_Attempt"]:
        """Attempts of this fingerprint, and those of others that a student has learned from."""
        return (a for a in self._all(db) if a.ours or a.num_audits >= a.num_trajectories)

    def _all(self, db: sqlite3.Connection) -> Iterator["_Attempt"]:
        for attempt, step, session, fingerprint, processes, *counts in db.execute(ATTEMPTS):
            ours = session == self._session or (self._replay and (fingerprint, processes) == self._key)
            yield _Attempt(attempt, step, session, ours, *counts)

    # ---- The ledger ----

    def record_usage(self, step: int, index: int | None, usage: Usage, usd: float | None = None) -> None:
        """Count one request, as soon as its cost is known.

        Args:
            step: optimizer step of the request.
            index: index of the trajectory; `None` for a request outside audits, for example a probe.
            usage: tokens used. For a request without an answer that may be charged, the worst case.
            usd: cost in US dollars; `None` without a price.

        Raises:
            JournalError: when it cannot be written, or the cost is not finite.
        """
        _check_amount(step, usd)
        with self._counting() as db:
            _add_usage(db, self._session, step, -1 if index is None else index, usage, usd)

    def record_in_flight(self, step: int, tokens: int, usd: float | None = None) -> None:
        """Write the worst case of all requests in flight, before they are sent. 0 tokens removes it.

        Args:
            step: optimizer step of the requests.
            tokens: prompt and completion tokens of all of them together.
            usd: maximum cost in US dollars; `None` without a price.

        Raises:
            JournalError: when it cannot be written, or a request was not counted: nothing more may be sent.
        """
        if self._not_counted is not None:
            if tokens:
                raise JournalError(str(self._not_counted))
            return
        with self._transaction() as db:
            if tokens:
                _insert(db, "under_way", self._session, step, tokens, usd)
            else:
                db.execute("DELETE FROM under_way")

    def usage(self) -> Usage:
        """Total usage, superseded attempts included."""
        with self._reading() as db:
            check_table(db, self.path, "usage")
            *tokens, _ = db.execute(TOTALS).fetchone()
        return Usage(*tokens)

    def ledger(self) -> list[LedgerRow]:
        """Usage and cost by run, step and teacher, in the order of their first appearance."""
        with self._reading() as db:
            check_table(db, self.path, "usage")
            rows = db.execute(LEDGER).fetchall()
        return [
            LedgerRow(run, step, teacher, Usage(*tokens), usd, num_audits)
            for run, step, teacher, *tokens, usd, num_audits in rows
        ]

    # ---- The file ----

    def close(self) -> None:
        """Close the file and release it for other processes. A second call does nothing."""
        with self._mutex:
            self._stack.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, explained(self.path):
            yield self._db

    @contextmanager
    def _counting(self) -> Iterator[sqlite3.Connection]:
        """A transaction that counts a request. If it fails, the record of the requests in flight stays.

        The next process counts their worst case.
        """
        try:
            with self._transaction() as db:
                yield db
        except JournalError as error:
            self._not_counted = error
            raise

    @contextmanager
    def _transaction(self, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        with self._mutex, explained(self.path):
            self._restore_if_lost()
            self._db.execute(f"PRAGMA synchronous = {synchronous}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _restore_if_lost(self) -> None:
        """Write the file again if it was deleted. The open connection still reads all of it."""
        try:
            there = os.path.samestat(self.path.stat(), self._file)
        except FileNotFoundError:
            pass
        else:
            if there:
                return
            raise JournalError(
                f"The journal {self.path} was replaced by another file while this run was writing it, and is left as "
                "it is. Two runs cannot share a folder: stop the other one, or choose another output folder."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not lock_path(self.path).exists():
            self._lock.close()
            self._lock = hold_lock(self.path)
        copy = self.path.with_suffix(".new")
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(copy)) as target:
            self._db.backup(target)
            target.execute("PRAGMA journal_mode = WAL")
        self._db.close()  # before there is a new file: it deletes the log by its name
        copy.replace(self.path)
        self._connect()
        logger.warning(
            f"The journal {self.path} was deleted while this run was writing it. It is restored with all its records."
        )


@dataclass(frozen=True)
class _Attempt:
    """One set of trajectories, as it was when the file was opened."""

    id: int
    step: int
    session: int
    ours: bool  # of this fingerprint and number of processes
    num_trajectories: int
    num_audits: int
    was_answered: bool  # at least in part

    @property
    def is_paid(self) -> bool:
        """Whether it cost something, or a student has learned from it. An audit without chunks costs nothing."""
        return bool(self.was_answered or self.num_audits >= self.num_trajectories)


def _current(attempts: Iterable[_Attempt]) -> dict[int, _Attempt]:
    """The attempt that counts for each step. Each one supersedes earlier ones at its step and at later steps."""
    current: dict[int, _Attempt] = {}
    for attempt in attempts:
        later = [current[step] for step in takewhile(attempt.step.__le__, reversed(current))]
        # A run that starts over by mistake and is stopped at once leaves trajectories that cost nothing.
        if attempt.is_paid or not any(other.is_paid and other.ours and attempt.ours for other in later):
            _supersede(current, attempt)
    return current


def _supersede(current: dict[int, _Attempt], attempt: _Attempt) -> None:
    """Replace the attempts at the step and at later steps. The steps in `current` are in order."""
    while current and next(reversed(current)) >= attempt.step:
        current.popitem()
    current[attempt.step] = attempt


# ---- Values ----


def _insert(db: sqlite3.Connection, table: str, *values: Any) -> None:
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*values, checksum_of(values)))


def _check_amount(step: int, usd: float | None) -> None:
    if usd is not None and not math.isfinite(usd):
        raise JournalError(f"A request of step {step} cost usd={usd}, which is not a finite number. Check the price.")


def _add_usage(db: sqlite3.Connection, session: int, step: int, index: int, usage: Usage, usd: float | None) -> None:
    key = (session, step, index)
    row = db.execute("SELECT * FROM usage WHERE session = ? AND step = ? AND idx = ?", key).fetchone()
    if row is not None:
        *tokens, before, _ = row[3:]
        usage = Usage(*tokens) + usage
        if before is not None:
            usd = before + (usd or 0.0)
    _insert(db, "usage", *key, *astuple(usage), None if usd is None else float(usd))


def _count_lost(db: sqlite3.Connection) -> tuple[int, float | None] | None:
    """Count the requests in flight of a killed session as usage of that session."""
    row = db.execute("SELECT * FROM under_way").fetchone()
    if row is None:
        return None
    session, step, tokens, usd, _ = row
    _add_usage(db, session, step, -1, Usage(tokens), usd)
    db.execute("DELETE FROM under_way")
    return tokens, usd


def _insert_numbered(db: sqlite3.Connection, table: str, *values: Any) -> int:
    """Insert a row with the next id, and return the id."""
    number: int
    (number,) = db.execute(f"SELECT coalesce(max(id), 0) + 1 FROM {table}").fetchone()
    _insert(db, table, number, *values)
    return number


def _audit_to_json(audit: Audit) -> dict[str, Any]:
    # A prefix usually begins with the prefix and the text of the chunk before it. It is written as the number of
    # characters that it shares with them, and the rest. So the text of a trajectory is written once, not once per
    # chunk, and is restored without the tokenizer.
    chunks, before = [], ""
    for chunk in audit.chunks:
        shared = common_prefix_length(before, chunk.prefix)
        before = chunk.prefix + chunk.text
        span = [chunk.chunk.start, chunk.chunk.end, chunk.chunk.anchor]
        rest = [chunk.text, chunk.rollouts, chunk.similarities, chunk.prior, chunk.posterior]
        chunks.append([*span, shared, chunk.prefix[shared:], *rest, *map(astuple, chunk.branches)])
    values = {field.name: getattr(audit, field.name) for field in fields(audit)}
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    if not audit.agreed:
        del values["agreed"]  # as before there were branches
    else:
        values["agreed"] = [*map(astuple, audit.agreed)]
    if not audit.answers:
        del values["answers"]
    else:
        values["marks"] = [chunk.mark for chunk in audit.chunks]
    return {**values, "chunks": chunks, "usage": astuple(audit.usage)}


def _audit_from_json(values: dict[str, Any]) -> Audit:
    chunks = [
        ChunkAudit(Chunk(*span), *[*rest, _branches_from_json(branches), mark])
        for (span, *rest, branches), mark in zip(
            restore_chunks(values.pop("chunks")), chain(values.pop("marks", ()), repeat(None)), strict=False
        )
    ]
    agreed = tuple(Chunk(*span) for span in values.pop("agreed", ()))
    usage = Usage(*values.pop("usage"))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Audit(chunks=tuple(chunks), usage=usage, agreed=agreed, **values)


def _trajectory_from_json(stored: list[Any]) -> Trajectory:
    values = dict(zip(_TRAJECTORY, stored, strict=False))
    if values.get("forks") is not None:
        values["forks"] = _forks_from_json(values["forks"])
    if values.get("verified") is not None:
        values["verified"] = Verified(**values["verified"])
    return Trajectory(**values)


def _forks_from_json(stored: Iterable[Any]) -> tuple[Fork, ...]:
    return tuple(Fork(Chunk(*span), _branches_from_json(branches)) for span, branches in stored)


def _branches_from_json(stored: Iterable[Any]) -> tuple[Branch, ...]:
    return tuple(Branch(tuple(ids), text, tuple(logprobs), *judged) for ids, text, logprobs, *judged in stored)
