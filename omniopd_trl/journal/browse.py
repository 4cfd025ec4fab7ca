# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Browse the audits of a run, also while it writes. Without torch: a command that only reads starts in a moment."""

import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.journal.file import check_version, connect, damage_error, explained, journals_of
from omniopd_trl.journal.records import ENTROPY_UNIT, decode, decode_first, restore_chunks
from omniopd_trl.journal.schema import TOKENS

if TYPE_CHECKING:
    from omniopd_trl.audits.types import ChunkAudit


@dataclass(frozen=True)
class ShownBranch:
    """One continuation of the student at a fork.

    Attributes:
        text: its text.
        similarity: mean similarity to the rollouts, in [0, 1].
        advantage: advantage over the other branches.
        token_ids: its tokens.
    """

    text: str
    similarity: float
    advantage: float
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShownChunk:
    """One audited chunk, as a journal holds it; see `ChunkAudit` for most fields.

    Attributes:
        start: position of the first token in the completion.
        end: position after the last token.
        anchor: position of the token with the highest entropy.
        weight: weight of the chunk in the loss; `None` when the step was interrupted before it was known. With
            branches, it is that of the trajectory's own.
        branches: the branches of the fork, the trajectory's own chunk first; empty without branches.
        mark: mark of the judge, in [0, 1]; `None` without one.
        imitated: the part of each rollout that is imitated; `None` for one that is left out. Empty without imitation.
    """

    start: int
    end: int
    anchor: int
    prefix: str
    text: str
    rollouts: tuple[str, ...]
    similarities: tuple[float, ...]
    prior: float
    posterior: float
    weight: float | None = None
    branches: tuple[ShownBranch, ...] = ()
    mark: float | None = None
    imitated: tuple[str | None, ...] = ()

    def distinct_branches(self) -> list[tuple[ShownBranch, int]]:
        """Each distinct text of the branches with its count, the trajectory's own first."""
        counts = Counter(branch.text for branch in self.branches)
        return [(branch, counts.pop(branch.text)) for branch in self.branches if branch.text in counts]

    def fork(self, pieces: Sequence[str]) -> int:
        """Characters of the chunk before its anchor, from the text of each token; 0 when the texts are not known."""
        return len("".join(pieces[self.start : self.anchor]))

    def distinct_rollouts(self) -> list[tuple[str, int, float]]:
        """Text, count and similarity of each distinct rollout, the most frequent first; empty with a mark alone."""
        if not self.rollouts:
            return []
        counts = Counter(zip(self.rollouts, self.similarities, strict=True))
        return [(text, count, similarity) for (text, similarity), count in counts.most_common()]

    def imitated_of(self, rollout: str) -> str | None:
        """What is imitated of a rollout; `None` for nothing. Equal rollouts of a chunk have equal parts."""
        return dict(zip(self.rollouts, self.imitated, strict=False)).get(rollout)


def preference_of(chunk: "ShownChunk | ChunkAudit") -> float:
    """What chunks are ordered by: the posterior, and with branches the advantage of the trajectory's own chunk.

    With branches the posterior weights nothing, and the similarity is low at some forks whatever the student writes.
    """
    return chunk.branches[0].advantage if chunk.branches else chunk.posterior


@dataclass(frozen=True)
class AuditedTrajectory:
    """A trajectory and its audit, as a journal holds them.

    Attributes:
        step: optimizer step.
        rank: index of the process.
        index: index of the trajectory in the step's batch of that process.
        teacher: name of the teacher.
        prompt: prompt, as in the dataset.
        completion_ids: the student's completion, `T` tokens.
        chunks: audited chunks in ascending order.
        entropies: entropy of each token in nats, rounded; empty when they were not recorded.
        usage: tokens of all requests of the audit.
        usd: their cost in US dollars; `None` without a price.
        num_dropped: chunks with too few rollouts.
        num_short: rollouts that were cut before they filled their chunk.
        num_set_aside: rollouts that could not be encoded or scored.
        failures: reasons for missing rollouts.
        outcomes: counts of the teacher.
        prompt_ids: the rendered prompt.
        seed: seed of the trajectory.
        sampling_logprobs: as in `Trajectory`; `None` if the policy itself sampled.
        logprobs: log-probability of each token under the policy of the step, in nats; empty when they were not
            recorded.
        models: names of the models that answered, as the service reports them.
        teacher_context: what only the teacher saw beside the prompt; `None` for nothing.
        answers: what the judge wrote, in order; empty without a judge.
        verified: the fields of `Verified`, by name; `None` without a verifier.
    """

    step: int
    rank: int
    index: int
    teacher: str
    prompt: Any
    completion_ids: tuple[int, ...]
    chunks: tuple[ShownChunk, ...]
    entropies: tuple[float, ...] = ()
    usage: Usage = field(default_factory=Usage)
    usd: float | None = None
    num_dropped: int = 0
    num_short: int = 0
    num_set_aside: int = 0
    failures: tuple[str, ...] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    seed: int = 0
    sampling_logprobs: tuple[float | None, ...] | None = None
    logprobs: tuple[float, ...] = ()
    models: tuple[str, ...] = ()
    teacher_context: str | None = None
    answers: tuple[str, ...] = ()
    verified: Mapping[str, Any] | None = None


@dataclass(frozen=True, order=True)
class AuditPlace:
    """Where an audit is recorded.

    Attributes:
        step: optimizer step.
        rank: index of the process.
        attempt: number of the attempt at the step, in the journal of the process.
        index: index of the trajectory in the step's batch of the process.
        size: size of its records in bytes.
        low: lowest `preference_of` of the chunks; `None` without chunks, or when it is not recorded.
        high: highest one.
        is_empty: whether the audit is known to have no chunks.
    """

    step: int
    rank: int
    attempt: int
    index: int
    size: int = field(compare=False)
    low: float | None = field(default=None, compare=False)
    high: float | None = field(default=None, compare=False)
    is_empty: bool = field(default=False, compare=False)


def list_audits(output_dir: str | os.PathLike[str], step: int | None = None) -> list[AuditPlace]:
    """The finished audits by step, process and index. Those of superseded attempts are left out.

    Args:
        output_dir: folder of the run.
        step: only this step; `None` for all.

    Raises:
        JournalError: when a journal cannot be read.
    """
    # The newest attempt at a step counts, and supersedes all earlier ones at later steps.
    query = """
        SELECT a.step, audits.attempt, audits.idx, length(audits.payload) + coalesce(length(t.payload), 0){columns}
        FROM audits JOIN (
            SELECT id, step, min(step) OVER later AS later FROM attempts
            WINDOW later AS (ORDER BY id DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
        ) AS a ON a.id = audits.attempt
        LEFT JOIN trajectories AS t ON t.attempt = audits.attempt AND t.idx = audits.idx{join}
        WHERE a.later IS NULL OR a.step < a.later
    """
    join = " LEFT JOIN shown ON shown.attempt = audits.attempt AND shown.idx = audits.idx"
    columns = ", low, high, shown.idx IS NOT NULL AND low IS NULL"
    places = []
    with _opened(output_dir) as journals:
        for rank, (path, db) in journals.items():
            with explained(path):
                with_shown = {"columns": columns, "join": join} if _has(db, "shown") else {"columns": "", "join": ""}
                for at, attempt, index, size, *ends in db.execute(query.format(**with_shown)):
                    if step is None or at == step:
                        low, high, empty = ends or (None, None, 0)
                        places.append(AuditPlace(at, rank, attempt, index, size, low, high, bool(empty)))
    return sorted(places)


def read_audits(output_dir: str | os.PathLike[str], places: Collection[AuditPlace]) -> Iterator[AuditedTrajectory]:
    """Read the audits at these places, in their order.

    Raises:
        JournalError: when a journal cannot be read, or a record is damaged.
    """
    with _opened(output_dir) as journals:
        for place in places:
            path, db = journals[place.rank]
            with explained(path):
                yield _read(path, db, place)


def read_prompts(output_dir: str | os.PathLike[str], places: Iterable[AuditPlace]) -> Iterator[Any]:
    """The prompts of the audits at these places, in their order, much faster than the audits.

    Raises:
        JournalError: as `read_audits`.
    """
    with _opened(output_dir) as journals:
        for place in places:
            path, db = journals[place.rank]
            with explained(path):
                yield decode_first(path, _row_of(db, "trajectories", place))


def read_spent(output_dir: str | os.PathLike[str]) -> list[tuple[int, Usage, float | None]]:
    """What each optimizer step cost, over all processes and runs in a folder, superseded attempts included.

    Returns:
        Step, tokens and US dollars, by step. Dollars are `None` without a price.

    Raises:
        JournalError: when a journal cannot be read.
    """
    query = f"SELECT step, {', '.join(f'sum({name})' for name in TOKENS)}, sum(usd) FROM usage GROUP BY step"
    steps: dict[int, tuple[Usage, float | None]] = {}
    with _opened(output_dir) as journals:
        for path, db in journals.values():
            with explained(path):
                for step, *tokens, usd in db.execute(query):
                    usage, before = steps.get(step, (Usage(), None))
                    steps[step] = usage + Usage(*tokens), before if usd is None else (before or 0.0) + usd
    return [(step, *steps[step]) for step in sorted(steps)]


def read_settings(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that the last run in a folder recorded, by name; empty when there are none."""
    with _opened(output_dir) as journals:
        for path, db in journals.values():
            with explained(path):
                if not _has(db, "settings"):
                    continue
                row = db.execute("SELECT * FROM settings ORDER BY session DESC LIMIT 1").fetchone()
                if row is not None:
                    return dict(decode(path, row))
    return {}


def settings_of(output_dir: str | os.PathLike[str], places: Collection[AuditPlace]) -> list[dict[str, Any]]:
    """The settings under which the trajectories at these places were recorded, by name, in order of their runs."""
    query = "SELECT * FROM settings WHERE session = ?"
    with _opened(output_dir) as journals:
        for rank, (path, db) in journals.items():
            attempts = {place.attempt for place in places if place.rank == rank}
            with explained(path):
                found = db.execute("SELECT id, session FROM attempts")
                sessions = sorted({session for attempt, session in found if attempt in attempts})
                rows = [db.execute(query, (session,)).fetchone() for session in sessions]
                settings = [dict(decode(path, row)) for row in rows if row is not None]
            if settings:
                return settings
    return []


def read_logs(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The metrics that the runs in a folder logged, in order. Those of superseded steps are left out.

    The first training step that a run logs supersedes what earlier runs logged at this step and at later ones.
    """
    kept: list[tuple[int, dict[str, Any]]] = []
    newest = None
    with _opened(output_dir) as journals:
        if 0 not in journals:
            return []
        path, db = journals[0]
        with explained(path):
            for row in db.execute("SELECT * FROM logs ORDER BY id") if _has(db, "logs") else ():
                # The names of all entries are equal: one text for each takes half of the memory.
                entry, session = {sys.intern(name): value for name, value in decode(path, row).items()}, row[1]
                if session != newest and "loss" in entry:
                    kept = [one for one in kept if one[0] == session or one[1].get("step", 0) < entry["step"]]
                    newest = session
                kept.append((session, entry))
    return [entry for _, entry in kept]


def _row_of(db: sqlite3.Connection, table: str, place: AuditPlace) -> Any:
    """The row of an audit in a table; `None` when there is none."""
    query = f"SELECT * FROM {table} WHERE attempt = ? AND idx = ?"
    return db.execute(query, (place.attempt, place.index)).fetchone()


def _read(path: Path, db: sqlite3.Connection, place: AuditPlace) -> AuditedTrajectory:
    row = _row_of(db, "audits", place)
    values = decode(path, row)
    recorded = decode(path, _row_of(db, "trajectories", place))
    # The forks are in the audit as well.
    prompt, prompt_ids, completion_ids, seed, sampled, _, context, verified = [*recorded, *[None] * 4][:8]
    # A resumed run finishes the audits of an earlier session: both have paid.
    paid = f"SELECT {', '.join(f'sum({name})' for name in TOKENS)}, sum(usd) FROM usage"
    # By single sessions, since a range of them would read all that they paid. For `+` see `COUNTS` in schema.py.
    sums = db.execute(
        f"SELECT teacher, sums.* FROM sessions, ({paid} WHERE step = ? AND idx = ? AND session IN (SELECT +id "
        "FROM sessions WHERE id BETWEEN (SELECT session FROM attempts WHERE id = ?) AND ?)) AS sums WHERE id = ?",
        (place.step, place.index, place.attempt, row[2], row[2]),
    ).fetchone()
    if sums is None:
        raise damage_error(path, "a record is missing")
    teacher, *tokens, usd = sums
    entropies: list[float] = []
    logprobs: list[float] = []
    weights: list[float | None] = [None] * len(values["chunks"])
    imitated: list[list[str | None]] = [[] for _ in weights]
    shown = _has(db, "shown") and _row_of(db, "shown", place)
    if shown:
        steps, weights, *recorded = decode(path, shown)
        logprobs = recorded[0] if recorded else []
        imitated = recorded[1] if len(recorded) > 1 else imitated
        entropies = [step * ENTROPY_UNIT for step in steps]
    chunks = [
        ShownChunk(
            *span,
            *[*rest, None, tuple(ShownBranch(text, s, a, tuple(ids)) for ids, text, _, s, a in branches)],
        )
        for span, *rest, branches in restore_chunks(values["chunks"])
    ]
    return AuditedTrajectory(
        place.step,
        place.rank,
        place.index,
        teacher,
        prompt,
        tuple(completion_ids),
        tuple(
            replace(chunk, weight=weight, mark=mark, imitated=tuple(texts))
            for chunk, weight, mark, texts in zip(
                chunks, weights, values.get("marks", [None] * len(chunks)), imitated, strict=True
            )
        ),
        tuple(entropies),
        usage=Usage(*(count or 0 for count in tokens)),
        usd=usd,
        num_dropped=values["num_dropped"],
        num_short=values.get("num_short", 0),  # as the two others with a default: not in every earlier record
        num_set_aside=values.get("num_set_aside", 0),
        failures=tuple(values["failures"]),
        outcomes=values["outcomes"],
        prompt_ids=tuple(prompt_ids),
        seed=seed,
        sampling_logprobs=None if sampled is None else tuple(sampled),
        logprobs=tuple(logprobs),
        models=tuple(values.get("models", ())),
        teacher_context=context,
        answers=tuple(values.get("answers", ())),
        verified=verified,
    )


def _has(db: sqlite3.Connection, table: str) -> bool:
    """Whether a journal has this table, which earlier versions do not have."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


@contextmanager
def _opened(output_dir: str | os.PathLike[str]) -> Iterator[dict[int, tuple[Path, sqlite3.Connection]]]:
    """Path and connection of each process's journal, by its rank and in its order.

    The caller reads each one inside of `explained`.
    """
    with ExitStack() as stack:
        journals = {}
        for path in journals_of(output_dir):
            with explained(path):
                db = stack.enter_context(closing(connect(path, "ro")))
                check_version(db, path)
            journals[int(path.stem.removeprefix("rank-"))] = path, db
        yield dict(sorted(journals.items()))
