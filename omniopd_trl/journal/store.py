# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What was generated, audited and paid for, in one SQLite file per process, so that nothing is paid for twice.

Five kinds of record. *Trajectories* of a generation batch are written before their audits are sent, all or none. An
*audit* is written as soon as it is finished, and until then each *answer* that it needs, as it arrives. *Usage* is
written for each request as soon as it is answered, in one transaction with the answer where that is kept, and the
ledger is made of nothing else: an audit's own `usage` is for display. A request counts once, whether or not its audit
was ever finished, and a replayed audit counts nothing. What is *in flight* is written before it is sent, as the most
that it can cost (table `under_way`): a process that is killed cannot say what it was charged for, so the next one to
open the file counts that as used.

**Attempts.** Each set of trajectories is an attempt at its step. A new attempt at step `s` supersedes every earlier
attempt at `s` and at later steps, which came from a student that this one is not. What is superseded stays in the file
and in the ledger and is not replayed. Neither is what was written under another fingerprint or number of processes.
The settings behind a fingerprint are kept, so that it can be said what differs. An attempt of another fingerprint
supersedes once all its audits are there: before that, no student has learned from it. And it supersedes nothing for a
run that begins at step 0, with the student that its fingerprint stands for: who puts settings back gets records back.

**Durability.** A method that has returned has committed: the record survives `kill -9`. Against a power failure the
file is synchronized once per generation batch; what was written since then may be lost, and the file stays intact.
"""

import json
import math
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.journal.file import (
    check,
    check_log,
    check_num_processes,
    checksum_of,
    connect,
    create,
    damage_error,
    explained,
    hold_lock,
    upgrade,
)
from omniopd_trl.journal.schema import ATTEMPTS, LEDGER, TOTALS, JournalError, LedgerRow, NotReplayed
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers.base import common_prefix_length


class Journal:
    """The journal of one process. Its methods may be called from any thread.

    Args:
        path: see `journal_path`. The folder and the file are made where they do not exist.
        run: name of the run, for the ledger.
        teacher: name of the teacher, for the ledger.
        fingerprint: stands for everything that a replayed record depends on besides the checkpoint: models, data,
            seed, sampling, chunks, similarity, prior. Records of another fingerprint are counted but not replayed.
        settings: what the fingerprint is made of, by name, for whoever wonders why nothing is replayed. It is written
            down as it is, so that it must hold no secret.
        rank: which process this is, of
        num_processes: so many. The records of another number belong to other prompts.
        replay: false opens a journal of any number of processes, for the ledger and for new records; earlier ones are
            not replayed.

    Raises:
        JournalError: when the file is damaged, in use by another process, or of another version.
        ProcessCountError: when it was last written by another number of processes.

    In each case the file is left as it is.

    Attributes:
        lost: tokens, and dollars where there was a price, that count as used since requests were in flight when the
            last process that wrote the file was killed. `None` when it was not, or had none.
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
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # whatever goes wrong, nothing stays open
            stack.enter_context(closing(hold_lock(path)))
            with explained(path):
                if not path.exists():
                    create(path)
                check_log(path)
                with closing(connect(path, "ro")) as db:  # a damaged file is not written to
                    check(db, path)
                    if replay:
                        check_num_processes(db, path, num_processes)
                self._db = stack.enter_context(closing(connect(path, "rw")))
                # What `check_log` relies on: a log of this process alone, to which whole transactions are appended.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._db.execute("PRAGMA cache_spill = OFF")
            with self._transaction() as db:
                values = (run, teacher, fingerprint, rank, num_processes, time.time())
                upgrade(db)
                self._session = _insert_numbered(db, "sessions", *values)
                if settings is not None:
                    _insert(db, "settings", self._session, _encode(settings))
                self.lost = _count_lost(db)
            self._attempts = _current(self._valid(self._db))
            self._stack = stack.pop_all()

    # ---- Trajectories and audits ----

    def begin(self, step: int) -> NotReplayed | None:
        """Say at which step the run begins, before anything is replayed.

        Args:
            step: 0 for a student as the fingerprint knows it; the step of the checkpoint that it was loaded from.

        Returns:
            What was recorded from there on, in part at least, and is asked for again; `None` when that is nothing.
        """
        with self._reading() as db:
            everything = list(self._all(db))
            ours = [attempt for attempt in everything if attempt.ours]
            self._attempts = _current(ours if step == 0 else self._valid(db))
            if not self._replay:
                return None  # another number of processes, of which nothing is comparable
            lost = [
                attempt
                for attempt in {*_current(everything).values(), *_current(ours).values()}
                if attempt.step >= step
                and (attempt.num_audits or attempt.has_answers)
                and self._attempt(attempt.step) is None
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
                for name, value in _decode(self.path, row).items()
            }
            for row in rows
        )
        return {
            name: (was.get(name), now.get(name)) for name in sorted({*was, *now}) if was.get(name) != now.get(name)
        }

    def record_trajectories(self, step: int, trajectories: list[Trajectory]) -> None:
        """Begin a new attempt at a step: all its trajectories, or none of them.

        Raises:
            JournalError: when they cannot be written.
        """
        payloads = [_encode([t.prompt, t.prompt_ids, t.completion_ids, t.seed]) for t in trajectories]
        # One commit per generation batch waits for the disk, and takes everything before it along.
        with self._transaction(synchronous="FULL") as db:
            number = _insert_numbered(db, "attempts", self._session, step)
            for index, payload in enumerate(payloads):
                _insert(db, "trajectories", number, index, payload)
        attempt = _Attempt(number, step, self._session, True, len(payloads), 0, False)
        self._attempts = _current([*self._attempts.values(), attempt])

    def trajectories(self, step: int) -> list[Trajectory] | None:
        """The trajectories of the current attempt at a step; `None` when there is none to be replayed.

        Processes have to agree before any of them replays: one may have been killed just before it wrote.
        """
        with self._reading() as db:
            attempt = self._attempt(step)
            if attempt is None:
                return None
            rows = db.execute("SELECT * FROM trajectories WHERE attempt = ? ORDER BY idx", (attempt,)).fetchall()
        # In the order in which `record_trajectories` writes them.
        names = ("prompt", "prompt_ids", "completion_ids", "seed")
        return [Trajectory(**dict(zip(names, _decode(self.path, row), strict=True))) for row in rows]

    def record(self, step: int, index: int, audit: Audit) -> None:
        """Keep a finished audit of the current attempt. It adds nothing to the ledger: see `record_usage`.

        Raises:
            JournalError: when it cannot be written, holds NaN or infinity, or has no recorded trajectories.
        """
        payload = _encode(_audit_to_json(audit))
        with self._transaction() as db:
            attempt = self._attempt_to_add_to(step)
            _insert(db, "audits", attempt, index, self._session, payload)
            db.execute("DELETE FROM answers WHERE attempt = ? AND idx = ?", (attempt, index))

    def audit(self, step: int, index: int) -> Audit | None:
        """The audit of a trajectory of the current attempt; `None` when it was not finished."""
        with self._reading() as db:
            row = db.execute(
                "SELECT * FROM audits WHERE attempt = ? AND idx = ?", (self._attempt(step), index)
            ).fetchone()
        return None if row is None else _audit_from_json(_decode(self.path, row))

    def record_answer(
        self, step: int, index: int, request: str, start: int, answer: Any, usage: Usage, usd: float | None = None
    ) -> None:
        """Keep an answer for an audit that is not finished, and count its request: both or neither.

        Args:
            step: the step that it was asked in.
            index: the trajectory that it was asked for.
            request: a name for what was asked.
            start: the first sample that the answer holds.
            answer: what JSON can hold.
            usage: as in `record_usage`.
            usd: as in `record_usage`.

        Raises:
            JournalError: as `record` and `record_usage`.
        """
        payload = _encode(answer)
        _check_amount(step, usd)
        with self._transaction() as db:
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
            answers.setdefault(row[2], {})[row[3]] = _decode(self.path, row)
        return answers

    def _attempt_to_add_to(self, step: int) -> int:
        attempt = self._attempt(step)
        if attempt is None:
            raise JournalError(
                f"An audit of step {step} was to be kept in {self.path}, which holds no trajectories for it. "
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
            step: the step that it was made in.
            index: the trajectory that it was made for; `None` for a request of no audit, a probe for example.
            usage: tokens used. For a request that may have been charged for without an answer, what the budget counts.
            usd: what it cost; `None` when there is no price.

        Raises:
            JournalError: when it cannot be written, or the cost is no number.
        """
        _check_amount(step, usd)
        with self._transaction() as db:
            _add_usage(db, self._session, step, -1 if index is None else index, usage, usd)

    def record_in_flight(self, step: int, tokens: int, usd: float | None = None) -> None:
        """Keep the most that the requests in flight can cost, before they are sent; 0 tokens when there are none.

        Args:
            step: the step that they are made in.
            tokens: prompt and completion tokens, of all of them together.
            usd: what they cost at most; `None` when there is no price.

        Raises:
            JournalError: when it cannot be written.
        """
        with self._transaction() as db:
            if tokens:
                _insert(db, "under_way", self._session, step, tokens, usd)
            else:
                db.execute("DELETE FROM under_way")

    def usage(self) -> Usage:
        """All that was ever used, superseded attempts included."""
        with self._reading() as db:
            *tokens, _ = db.execute(TOTALS).fetchone()
        return Usage(*tokens)

    def ledger(self) -> list[LedgerRow]:
        """The same by run, step and teacher, in the order in which they first appeared."""
        with self._reading() as db:
            rows = db.execute(LEDGER).fetchall()
        return [
            LedgerRow(run, step, teacher, Usage(*tokens), usd, num_audits)
            for run, step, teacher, *tokens, usd, num_audits in rows
        ]

    # ---- The file ----

    def close(self) -> None:
        """Close the file and let other processes have it. A second time does nothing."""
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
    def _transaction(self, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        with self._mutex, explained(self.path):
            self._db.execute(f"PRAGMA synchronous = {synchronous}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@dataclass(frozen=True)
class _Attempt:
    """One set of trajectories, as it was when the file was opened."""

    id: int
    step: int
    session: int
    ours: bool  # of this fingerprint and number of processes
    num_trajectories: int
    num_audits: int
    has_answers: bool  # for audits that are not finished


def _current(attempts: Iterable[_Attempt]) -> dict[int, _Attempt]:
    """The attempt that counts for each step. Each one supersedes those before it at its step and at later ones."""
    current: dict[int, _Attempt] = {}
    for attempt in attempts:
        while current and next(reversed(current)) >= attempt.step:  # steps are in order
            current.popitem()
        current[attempt.step] = attempt
    return current


# ---- Values ----


def _insert(db: sqlite3.Connection, table: str, *values: Any) -> None:
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*values, checksum_of(values)))


def _check_amount(step: int, usd: float | None) -> None:
    if usd is not None and not math.isfinite(usd):
        raise JournalError(f"A request of step {step} cost usd={usd}, which is no amount. Check the price.")


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
    """What an earlier session had in flight when it was killed becomes usage of that session."""
    row = db.execute("SELECT * FROM under_way").fetchone()
    if row is None:
        return None
    session, step, tokens, usd, _ = row
    _add_usage(db, session, step, -1, Usage(tokens), usd)
    db.execute("DELETE FROM under_way")
    return tokens, usd


def _insert_numbered(db: sqlite3.Connection, table: str, *values: Any) -> int:
    """Insert under the next number, and return it."""
    number: int
    (number,) = db.execute(f"SELECT coalesce(max(id), 0) + 1 FROM {table}").fetchone()
    _insert(db, table, number, *values)
    return number


def _encode(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise JournalError(f"A record cannot be kept: {error}. It may hold text and finite numbers only.") from error
    # A teacher may be cut off in the middle of a surrogate pair, which plain UTF-8 has no place for.
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 1)


def _decode(path: Path, row: tuple[Any, ...]) -> Any:
    *values, checksum = row
    if checksum != checksum_of(values):
        raise damage_error(path, "the checksum of a record does not match")
    return json.loads(zlib.decompress(values[-1]).decode("utf-8", "surrogatepass"))


def _audit_to_json(audit: Audit) -> dict[str, Any]:
    # A prefix begins with the one before it and that chunk's text, as far as decoding allows. It is written as the
    # number of characters that it shares with them, and the rest: restored without the tokenizer, whatever that did,
    # and a trajectory's text is written once instead of once per chunk.
    chunks, before = [], ""
    for chunk in audit.chunks:
        shared = common_prefix_length(before, chunk.prefix)
        before = chunk.prefix + chunk.text
        span = [chunk.chunk.start, chunk.chunk.end, chunk.chunk.anchor]
        rest = [chunk.text, chunk.rollouts, chunk.similarities, chunk.prior, chunk.posterior]
        chunks.append([*span, shared, chunk.prefix[shared:], *rest])
    values = {field.name: getattr(audit, field.name) for field in fields(audit)}
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return {**values, "chunks": chunks, "usage": astuple(audit.usage)}


def _audit_from_json(values: dict[str, Any]) -> Audit:
    chunks, before = [], ""
    for start, end, anchor, shared, added, text, rollouts, similarities, prior, posterior in values.pop("chunks"):
        prefix = before[:shared] + added
        before = prefix + text
        span = Chunk(start, end, anchor)
        chunks.append(ChunkAudit(span, prefix, text, tuple(rollouts), tuple(similarities), prior, posterior))
    usage = Usage(*values.pop("usage"))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Audit(chunks=tuple(chunks), usage=usage, **values)
