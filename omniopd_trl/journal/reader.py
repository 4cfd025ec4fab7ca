# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Read journals, also while a run writes them."""

import os
from contextlib import closing

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.journal.file import check_values, check_version, connect, explained, journal_path
from omniopd_trl.journal.schema import TOTALS


def spent(output_dir: str | os.PathLike[str]) -> tuple[Usage, float]:
    """Tokens and US dollars that all processes of all runs in a folder have paid so far.

    Requests without a known price add no dollars. Requests in flight when a run was killed count with their worst
    case. Files that a run is writing can be read, too.

    Raises:
        JournalError: when one of the journals is damaged or of another version.
    """
    usage, usd = Usage(), 0.0
    for path in sorted(journal_path(output_dir, 0).parent.glob("rank-*.sqlite")):
        with explained(path), closing(connect(path, "ro")) as db:
            check_version(db, path)
            for table in ("usage", "under_way"):
                check_values(db, path, table)
            *tokens, dollars = db.execute(TOTALS).fetchone()
            usage, usd = usage + Usage(*tokens), usd + dollars
            for _, _, lost, dollars, _ in db.execute("SELECT * FROM under_way"):
                usage, usd = usage + Usage(lost), usd + (dollars or 0.0)
    return usage, usd
