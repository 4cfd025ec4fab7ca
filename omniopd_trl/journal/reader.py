# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Read journals, also while a run writes them."""

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing

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


def spent(output_dir: str | os.PathLike[str]) -> tuple[Usage, float]:
    """Tokens and US dollars that all processes of all runs in a folder have paid so far; see [`spent_by_journal`].

    Raises:
        JournalError: when one of the journals is damaged or of another version.
    """
    return total(spent_by_journal(output_dir))


def total(*machines: Mapping[str, tuple[Usage, float]]) -> tuple[Usage, float]:
    """The sum of the results of [`spent_by_journal`] of several machines. A journal that several see counts once."""
    amounts: dict[str, tuple[Usage, float]] = {}
    for journals in machines:
        for name, amount in journals.items():
            amounts[name] = max(amounts.get(name, amount), amount, key=_size)  # one may be an older copy
    return sum((usage for usage, _ in amounts.values()), Usage()), sum(usd for _, usd in amounts.values())


def _size(amount: tuple[Usage, float]) -> int:
    return amount[0].prompt_tokens + amount[0].completion_tokens


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


def spent_by_journal(output_dir: str | os.PathLike[str]) -> dict[str, tuple[Usage, float]]:
    """Tokens and US dollars that each process has paid so far, over all runs in a folder, by the journal's identity.

    Requests without a known price add no dollars. Requests in flight when a run was killed count with their worst
    case. Files that a run is writing can be read, too.

    Raises:
        JournalError: when one of the journals is damaged or of another version.
    """
    journals: dict[str, tuple[Usage, float]] = {}
    for path in journals_of(output_dir):
        with explained(path), closing(connect(path, "ro")) as db:
            check_size(path)
            check_version(db, path)
            for table in ("usage", "under_way"):
                check_table(db, path, table)
            *tokens, usd = db.execute(TOTALS).fetchone()
            usage = Usage(*tokens)
            for _, _, lost, dollars, _ in db.execute("SELECT * FROM under_way"):
                usage, usd = usage + Usage(lost), usd + (dollars or 0.0)
            journals[identity(db)] = usage, usd
    return journals
