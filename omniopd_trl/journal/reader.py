# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Read journals, also while a run writes them."""

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import NamedTuple

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.journal.file import (
    check_size,
    check_table,
    check_version,
    connect,
    explained,
    journal_path,
    journals_of,
)
from omniopd_trl.journal.schema import TOTALS


class Paid(NamedTuple):
    """What one process has paid over all runs in a folder.

    Attributes:
        usage: tokens. Requests in flight when a run was killed count with their worst case.
        usd: US dollars. Requests without a known price add none.
        rank: index of the process.
        num_processes: the largest number of processes of these runs.
    """

    usage: Usage
    usd: float
    rank: int
    num_processes: int


def spent(output_dir: str | os.PathLike[str]) -> tuple[Usage, float]:
    """Tokens and US dollars that all processes of all runs in a folder have paid so far.

    Raises:
        JournalError: as [`spent_by_journal`].
    """
    paid = spent_by_journal(output_dir).values()
    return sum((one.usage for one in paid), Usage()), sum(one.usd for one in paid)


def spent_by_journal(output_dir: str | os.PathLike[str]) -> dict[str, Paid]:
    """What each process of all runs in a folder has paid so far, by the journal's [`identity`].

    Files that a run is writing can be read, too.

    Raises:
        JournalError: when one of the journals is damaged or of another version.
    """
    journals: dict[str, Paid] = {}
    for path in journals_of(output_dir):
        with explained(path), closing(connect(path, "ro")) as db:
            check_size(path)
            check_version(db, path)
            for table in ("sessions", "usage", "under_way"):
                check_table(db, path, table)
            *tokens, usd = db.execute(TOTALS).fetchone()
            usage = Usage(*tokens)
            for _, _, lost, dollars, _ in db.execute("SELECT * FROM under_way"):
                usage, usd = usage + Usage(lost), usd + (dollars or 0.0)
            rank, processes = db.execute("SELECT rank, max(num_processes) FROM sessions").fetchone()
            if rank is not None:  # otherwise no run has written it yet
                journals[identity(db)] = Paid(usage, usd, rank, processes)
    return journals


def merge(machines: Iterable[Mapping[str, Paid]]) -> list[Paid]:
    """What the processes have paid, from the [`spent_by_journal`] of several machines.

    A journal that several machines see counts once. Of two copies, the later one counts.
    """
    journals: dict[str, Paid] = {}
    for machine in machines:
        for name, paid in machine.items():
            journals[name] = max(journals.get(name, paid), paid, key=_tokens)
    return list(journals.values())


def _tokens(paid: Paid) -> int:
    return paid.usage.prompt_tokens + paid.usage.completion_tokens


def identity(db: sqlite3.Connection) -> str:
    """A name of a journal that no other journal has: its process, and when it was first opened."""
    return str(db.execute("SELECT rank, started FROM sessions ORDER BY id LIMIT 1").fetchone())


def identity_of_first(output_dir: str | os.PathLike[str]) -> str | None:
    """The identity of the journal of process 0 in a folder; `None` when it is not there."""
    path = journal_path(output_dir, 0)
    if not path.exists():
        return None
    with explained(path), closing(connect(path, "ro")) as db:
        return identity(db)
