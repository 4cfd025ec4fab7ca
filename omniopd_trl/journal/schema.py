# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables, records and errors of a journal."""

from dataclasses import dataclass, field, fields

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import OmniOPDError

APPLICATION_ID = 0x4F4D4E49  # "OMNI", in the header of the file
SCHEMA_VERSION = 4

TOKENS = [field.name for field in fields(Usage)]

# The last column of each table is the checksum of the others: SQLite detects damage to its own structure, but not to
# the values.
TABLES = {
    # One row for each time that the file is opened.
    "sessions": "id INTEGER PRIMARY KEY, run, teacher, fingerprint, rank, num_processes, started, checksum",
    "attempts": "id INTEGER PRIMARY KEY, session, step, checksum",
    "trajectories": "attempt, idx, payload, checksum, PRIMARY KEY (attempt, idx)",
    "audits": "attempt, idx, session, payload, checksum, PRIMARY KEY (attempt, idx)",
    # All requests of one audit in one session. `idx` is -1 for requests outside audits.
    "usage": f"session, step, idx, {', '.join(TOKENS)}, usd, checksum, PRIMARY KEY (session, step, idx)",
    # At most one row: of the session that writes, while it has requests in flight.
    "under_way": "session INTEGER PRIMARY KEY, step, tokens, usd, checksum",
}
# Tables that each later version added. A file of an earlier version gets them when it is opened.
ADDED = {
    3: {
        # The settings from which the fingerprint of a session is computed.
        "settings": "session INTEGER PRIMARY KEY, payload, checksum",
        # Answers for audits that are not finished. The `idx` of an answer that was set aside is negative.
        "answers": "attempt, idx, request, start, payload, checksum, PRIMARY KEY (attempt, idx, request, start)",
    },
    4: {
        # How many trajectories and audits an attempt has, and for how many audits the teacher was asked, since a
        # trajectory may have no chunk. A record that damage hides is missed when it is replayed.
        "progress": "attempt INTEGER PRIMARY KEY, num_trajectories, num_audits, num_asked, checksum",
        # For people, never replayed: the lowest and the highest posterior of an audit; entropies and chunk weights.
        "shown": "attempt, idx, low, high, payload, checksum, PRIMARY KEY (attempt, idx)",
        "logs": "id INTEGER PRIMARY KEY, session, payload, checksum",
    },
}
SCHEMAS = {
    version: {
        table: f"CREATE TABLE {table} ({columns})"
        for tables in (TABLES, *(added for since, added in ADDED.items() if since <= version))
        for table, columns in tables.items()
    }
    for version in range(2, SCHEMA_VERSION + 1)
}
# The largest tables: they grow with each audit and hold the texts. They are verified when they are read.
READ_IN_PART = ("trajectories", "audits", "usage", "shown", "logs")


class JournalError(OmniOPDError, RuntimeError):
    """The journal is damaged, in use, or does not fit the run."""


class ProcessCountError(JournalError):
    """The journal was written by another number of processes."""


@dataclass(frozen=True)
class LedgerRow:
    """What one step of one run cost with one teacher.

    Attributes:
        run: name of the run.
        step: optimizer step of the requests.
        teacher: name of the teacher.
        usage: tokens of all requests, superseded ones included.
        usd: US dollars of the requests with a price; `None` when there are none.
        num_audits: number of finished audits.
    """

    run: str
    step: int
    teacher: str
    usage: Usage
    usd: float | None
    num_audits: int


@dataclass(frozen=True)
class Shown:
    """What people want to see of an audit, besides the audit itself.

    Attributes:
        index: index of the trajectory in the generation batch of the process.
        low: lowest `preference_of` of its chunks; `None` without chunks.
        high: highest one.
        entropies: entropy of each token of the completion, in nats.
        weights: weight of each chunk in the loss.
        logprobs: log-probability of each token under the policy of the step, in nats. A run that trains from an export
            then knows how far its student is from the one that sampled.
        imitated: what is imitated of each rollout of each chunk; `None` for a rollout that is left out. Empty without
            imitation.
    """

    index: int
    low: float | None
    high: float | None
    entropies: list[float]
    weights: list[float]
    logprobs: list[float] = field(default_factory=list)
    imitated: list[list[str | None]] = field(default_factory=list)


@dataclass(frozen=True)
class NotReplayed:
    """Recorded steps that a run requests again.

    Attributes:
        other_settings: number of steps that were recorded under another fingerprint.
        differences: recorded value and current value of each setting that differs, as JSON, for the newest of these
            steps. `None` for a missing setting. Empty when the steps were recorded by an earlier version of the
            package.
        superseded: number of steps that were recorded under this run's fingerprint and then superseded by a run with
            another one.
    """

    other_settings: int
    differences: dict[str, tuple[str | None, str | None]]
    superseded: int


TOTALS = f"SELECT {', '.join(f'coalesce(sum({name}), 0)' for name in TOKENS)}, coalesce(sum(usd), 0.0) FROM usage"
LEDGER = f"""
    SELECT run, step, teacher, {", ".join(f"sum({name})" for name in TOKENS)}, sum(usd), sum(num_audits)
    FROM (
        SELECT session, step, {", ".join(TOKENS)}, usd, 0 AS num_audits FROM usage
        UNION ALL
        SELECT audits.session, step, {", ".join("0" for _ in TOKENS)}, NULL, 1
        FROM audits JOIN attempts ON attempts.id = attempt
    ) JOIN sessions ON sessions.id = session
    GROUP BY run, step, teacher ORDER BY min(session), step
"""
# `+` makes an id a plain number, as the column that it is compared with: otherwise SQLite uses no index, and the time
# grows with the square of the number of steps.
COUNTS = """
    SELECT id, (SELECT count(*) FROM trajectories WHERE attempt = +attempts.id),
        (SELECT count(*) FROM audits WHERE attempt = +attempts.id),
        (SELECT count(*) FROM audits WHERE attempt = +attempts.id)
    FROM attempts
"""
ATTEMPTS = """
    SELECT attempts.id, step, session, fingerprint, num_processes,
        num_trajectories, num_audits, num_asked OR EXISTS (SELECT * FROM answers WHERE attempt = +attempts.id)
    FROM attempts JOIN sessions ON sessions.id = session JOIN progress ON attempt = attempts.id ORDER BY attempts.id
"""
