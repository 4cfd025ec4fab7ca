# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The file of a journal: its lock, its creation, and the checks for damage before it is used."""

import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from omniopd_trl.journal.schema import (
    APPLICATION_ID,
    COUNTS,
    READ_IN_PART,
    SCHEMA_VERSION,
    SCHEMAS,
    JournalError,
    ProcessCountError,
)


def journal_path(output_dir: str | os.PathLike[str], rank: int) -> Path:
    """The journal of a process. A push to the Hub skips names that begin with an underscore."""
    return Path(output_dir) / "_audits" / f"rank-{rank}.sqlite"


def journals_of(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The journals of all processes in a folder."""
    return sorted(journal_path(output_dir, 0).parent.glob("rank-*.sqlite"))


def lock_path(path: Path) -> Path:
    return Path(f"{path}.lock")


def hold_lock(path: Path) -> sqlite3.Connection:
    """Exclude other processes as long as the returned connection is open.

    The lock is on a second file, because a lock on the journal itself would exclude readers. SQLite's locks end with
    their process and are not inherited by its children: a data loader's worker that outlives a killed run does not
    hold them.
    """
    lock = sqlite3.connect(lock_path(path), timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # such as a full disk
            raise
        raise JournalError(
            f"The journal {path} is in use by another process ({error}), and two runs cannot share one. Wait for it "
            "to end or stop it, or choose another output folder."
        ) from error
    return lock


def connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=2, isolation_level=None, check_same_thread=False)
    # Damaged text must not break the message that reports the damage.
    db.text_factory = lambda text: text.decode("utf-8", "replace")
    return db


def create(path: Path) -> None:
    """Create an empty journal. A file with the final name is always complete."""
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        raise JournalError(
            f"The journal {path} is missing, but {log.name} beside it still holds records of it. Restore the file, or "
            "delete the log as well to start with an empty journal."
        )
    new = path.with_suffix(".new")
    for leftover in path.parent.glob(f"{new.name}*"):
        leftover.unlink()
    with closing(connect(new, "rwc")) as db:
        db.execute("PRAGMA page_size = 16384")  # a record is several kilobytes
        for statement in SCHEMAS[SCHEMA_VERSION].values():
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("PRAGMA journal_mode = WAL")
    new.replace(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as `JournalError`."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
        raise JournalError(
            f"The journal {path} cannot be used: {error}. Check that the disk has room, that the folder can be "
            "written to, and that no other program holds the file."
        ) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's message may quote damaged text
        raise damage_error(path, error) from error


def damage_error(path: Path, what: object) -> JournalError:
    return JournalError(
        f"The journal {path} is damaged: {what}. Restore it from a copy. Or move it and its `-wal` file away and "
        "start with an empty one: what it holds is then paid for again, and the budget does not count what it cost."
    )


def upgrade(db: sqlite3.Connection) -> None:
    """Add the missing tables to a journal of an earlier version."""
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, statement in SCHEMAS[SCHEMA_VERSION].items():
        if table not in there:
            db.execute(statement)
    if "progress" not in there:
        for row in db.execute(COUNTS).fetchall():
            db.execute("INSERT INTO progress VALUES (?, ?, ?, ?, ?)", (*row, checksum_of(row)))
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def check(db: sqlite3.Connection, path: Path) -> None:
    """Check a journal for damage before it is used, in a time that does not depend on the number of audits.

    The small tables are checked here. `Journal` checks the records of a step before the step is replayed, and usage
    before it is summed. A file of an earlier version has no counts to compare with, so all of it is checked once.
    """
    version = check_version(db, path)
    if dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")) != SCHEMAS[version]:
        raise damage_error(path, "its tables are not those of a journal")
    for table in SCHEMAS[version]:
        if table not in READ_IN_PART or version < SCHEMA_VERSION:
            check_table(db, path, table)


def check_table(db: sqlite3.Connection, path: Path, table: str) -> None:
    """Check the pages, the index and the checksums of one table."""
    # Not `quick_check`: it does not check that an index covers every row.
    (result,) = db.execute(f"PRAGMA integrity_check('{table}')").fetchone()
    if result != "ok":
        raise damage_error(path, " ".join(result.split()))
    for *values, checksum in db.execute(f"SELECT * FROM {table}"):
        if checksum != checksum_of(values):
            raise damage_error(path, f"the checksum of a row of {table!r} does not match")


def check_size(path: Path) -> None:
    """Check that the end of the file is there. With a log, it may be shorter: its last pages are in the log."""
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        return
    with open(path, "rb") as file:
        header = file.read(32).ljust(32, b"\0")
    page_size, pages = struct.unpack(">16xH10xI", header)
    if path.stat().st_size < max(page_size, 1) * pages:
        raise damage_error(path, "its end is missing")


def check_version(db: sqlite3.Connection, path: Path) -> int:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise damage_error(path, "it does not begin like a journal")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in SCHEMAS:
        raise JournalError(
            f"The journal {path} has schema version {version}, and this version of omniopd_trl reads "
            f"{' and '.join(map(str, SCHEMAS))}. Use the version that wrote it, or choose another output folder."
        )
    return int(version)


def check_log(path: Path) -> None:
    """Check the write-ahead log of a killed process for damage.

    SQLite reads the log up to the first frame with a wrong checksum and silently drops the rest. A killed process
    leaves at most one incomplete frame, the last one. When other frames of the same log (with its two salts) follow,
    records would be lost.

    Reference: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
    """
    log = Path(f"{path}-wal")
    if not log.exists() or log.stat().st_size <= 32:
        return
    data = log.read_bytes()
    magic, _, page_size, _, *salts = struct.unpack(">6I", data[:24])
    order = "<" if magic == 0x377F0682 else ">"
    sums = _log_checksum(data[:24], order, (0, 0))
    intact = sums == struct.unpack(">2I", data[24:32])
    damaged = not intact  # a damaged header invalidates every frame
    for start in range(32, len(data) - page_size - 23, page_size + 24):
        if damaged:
            break
        head, page = data[start : start + 24], data[start + 24 : start + 24 + page_size]
        if head[8:16] != struct.pack(">2I", *salts):
            intact = False
            continue
        damaged = not intact
        sums = _log_checksum(page, order, _log_checksum(head[:8], order, sums))
        intact = sums == struct.unpack(">2I", head[16:])
    if damaged:
        raise JournalError(
            f"The journal {path} is damaged: its log {log.name} holds records that cannot be read any more. Restore "
            "both files from a copy. Or continue without these records and pay for them again: "
            f"sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'"
        )


def _log_checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for a, b in struct.iter_unpack(f"{order}2I", data):
        first = (first + a + second) & 0xFFFFFFFF
        second = (second + b + first) & 0xFFFFFFFF
    return first, second


def check_num_processes(db: sqlite3.Connection, path: Path, num_processes: int) -> None:
    row = db.execute("SELECT num_processes FROM sessions ORDER BY id DESC LIMIT 1").fetchone()
    if row is not None and row[0] != num_processes:
        raise ProcessCountError(
            f"The journal {path} was written by {row[0]} process(es) and this run has {num_processes}, which get "
            f"different prompts. Resume with {row[0]} to replay it."
        )


def checksum_of(values: Sequence[Any]) -> int:
    *key, last = values  # the payload, if there is one, is last
    return zlib.crc32(last if isinstance(last, bytes) else repr(last).encode(), zlib.crc32(repr(key).encode()))
