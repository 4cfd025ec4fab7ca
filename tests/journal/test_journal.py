# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is in the journal is there after a crash, comes back equal, counts once, and is never silently lost."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.audits.types import Audit, Branch, ChunkAudit, Trajectory
from omniopd_trl.errors import OmniOPDError
from omniopd_trl.journal import file, store
from omniopd_trl.journal.file import journal_path, lock_path
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.schema import (
    ADDED,
    SCHEMA_VERSION,
    JournalError,
    LedgerRow,
    NotReplayed,
    ProcessCountError,
)
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage
from tests.support.journals import SETTINGS, audit, journal, trajectory


def fill(folder, steps=8) -> None:
    """A closed journal with two trajectories, audits and requests for each step."""
    with journal(folder) as j:
        for step in range(steps):
            j.record_trajectories(step, [trajectory(step), trajectory(step + 1)])
            for index in range(2):
                j.record_usage(step, index, Usage(10, 1, 2, 0), 0.5)
                j.record(step, index, audit(f"{step} {os.urandom(2000).hex()}"))


def main_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.sqlite")}


# ---- Values ----

# Lone surrogates included: a teacher may be cut off in the middle of a pair.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)


@st.composite
def audits(draw):
    chunks = []
    before = ""
    for _ in range(draw(st.integers(0, 4))):
        # Usually the prefix continues where the last chunk ended. It need not.
        prefix = draw(st.sampled_from([before, before[:-1], before[1:]])) + draw(texts)
        text = draw(texts)
        before = prefix + text
        span = Chunk(*draw(st.tuples(counts, counts, counts)))
        rollouts = draw(st.lists(texts, max_size=3).map(tuple))
        similarities = draw(st.lists(numbers, max_size=3).map(tuple))
        chunks.append(ChunkAudit(span, prefix, text, rollouts, similarities, draw(numbers), draw(numbers)))
    values = {name: draw(counts) for name in ("num_dropped", "num_rollouts", "num_short")}
    usage = Usage(*draw(st.tuples(counts, counts, counts, counts)))
    failures = tuple(draw(st.lists(texts, max_size=2)))
    if "outcomes" in {field.name for field in fields(Audit)}:
        values["outcomes"] = draw(st.dictionaries(texts, counts, max_size=2))
    return Audit(chunks=tuple(chunks), usage=usage, failures=failures, **values)


@pytest.fixture(scope="module")
def shared_journal(tmp_path_factory):
    with journal(tmp_path_factory.mktemp("shared")) as j:
        yield j


@settings(max_examples=200, deadline=None)
@given(audit=audits(), prompt=texts, ids=st.lists(counts, max_size=9))
def test_round_trip(shared_journal, audit, prompt, ids):
    """What comes back equals what was written, to the last bit and the strangest character."""
    stored = [Trajectory(prompt, ids, ids[::-1], seed=3), Trajectory([{"content": prompt}], [], ids, seed=2**31)]
    shared_journal.record_trajectories(3, stored)
    assert shared_journal.trajectories(3) == stored
    assert shared_journal.audit(3, 1) is None
    shared_journal.record(3, 1, audit)
    assert shared_journal.audit(3, 1) == audit
    assert shared_journal.audit(3, 0) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(shared_journal, value):
    """NaN has no place in JSON, and an audit that holds it is an error and not a record."""
    shared_journal.record_trajectories(9, [trajectory()])
    chunk = replace(audit().chunks[0], posterior=value)
    with pytest.raises(JournalError, match="finite"):
        shared_journal.record(9, 0, replace(audit(), chunks=(chunk,)))
    assert shared_journal.audit(9, 0) is None


def test_prefixes_are_not_repeated(tmp_path):
    """A hundred nested prefixes take about the room of the longest."""
    text = "".join(random.Random(0).choices("abcdefghijklmnop", k=100_000))  # which no compression halves twice
    chunks = [
        ChunkAudit(Chunk(i, i + 1, i), text[: 1000 * i], text[1000 * i], ("",), (0.0,), 0.0, 0.0) for i in range(99)
    ]
    with journal(tmp_path):
        pass
    empty = journal_path(tmp_path, 0).stat().st_size
    with journal(tmp_path) as j:
        j.record_trajectories(0, [])
        j.record(0, 0, Audit(tuple(chunks)))
        assert j.audit(0, 0) == Audit(tuple(chunks))
    assert journal_path(tmp_path, 0).stat().st_size - empty < 2 * len(text)


# ---- What is replayed ----


def test_reopened(tmp_path):
    """A later process finds trajectories and finished audits, and nothing else."""
    stored = [trajectory(0), trajectory(1)]
    branches = (Branch((4, 5), "four", (), 1.0, 0.5), Branch((4,), "4", (-0.5,), 0.1, -0.5))
    marked = replace(audit().chunks[0], branches=branches, mark=0.5)
    finished = replace(audit(), chunks=(marked,), agreed=(Chunk(4, 6, 5),), answers=("no", "1: 5"))
    with journal(tmp_path) as j:
        assert j.trajectories(5) is None
        j.record_trajectories(5, stored)
        j.record(5, 1, finished)
    with journal(tmp_path, run="resumed") as j:
        assert j.trajectories(5) == stored
        assert j.audit(5, 0) is None
        assert j.audit(5, 1) == finished
        assert j.trajectories(4) is None
        assert j.trajectories(6) is None
        j.record(5, 0, audit("what was missing"))
    with journal(tmp_path) as j:
        assert j.audit(5, 0) == audit("what was missing")


def test_new_attempt_supersedes(tmp_path):
    """A step that is generated again hides its earlier audits and all later steps, which followed from another one."""
    with journal(tmp_path) as j:
        for step in (1, 2, 3):
            j.record_trajectories(step, [trajectory(step)])
            j.record_usage(step, 0, Usage(10, 0, 1, 0), 0.25)
            j.record(step, 0, audit())
    with journal(tmp_path) as j:
        j.record_trajectories(2, [trajectory(22)])
        assert j.trajectories(2) == [trajectory(22)]
        assert j.audit(2, 0) is None
        assert j.trajectories(3) is None
        assert j.audit(3, 0) is None
        assert j.trajectories(1) == [trajectory(1)]
        assert j.audit(1, 0) == audit()
        j.record_usage(2, 0, Usage(10, 0, 1, 0), 0.25)
        j.record(2, 0, audit("anew"))
        assert j.audit(2, 0) == audit("anew")
        assert j.usage() == Usage(40, 0, 4, 0)
        assert [(row.step, row.usage.prompt_tokens, row.num_audits) for row in j.ledger()] == [
            (1, 10, 1),
            (2, 20, 2),
            (3, 10, 1),
        ]
    assert spent(tmp_path) == (Usage(40, 0, 4, 0), 1.0)


def test_other_fingerprint(tmp_path):
    """Records of other settings are paid for all the same, and are not replayed."""
    fill(tmp_path, steps=2)
    with journal(tmp_path, fingerprint="M=5") as j:
        assert j.trajectories(0) is None
        assert j.audit(0, 0) is None
        assert j.usage() == Usage(40, 4, 8, 0)
        with pytest.raises(JournalError, match=r"step 1 .* no trajectories"):
            j.record(1, 0, audit())
        j.record_trajectories(1, [trajectory(1)])
    with journal(tmp_path) as j:
        assert len(j.trajectories(0)) == 2
        assert len(j.trajectories(1)) == 2  # no student has learned from the other attempt
    with journal(tmp_path, fingerprint="M=5") as j:
        j.record(1, 0, audit())
    with journal(tmp_path) as j:
        assert len(j.trajectories(0)) == 2
        assert j.trajectories(1) is None  # the newest attempt decides, no matter who made it


def test_what_is_not_replayed(tmp_path):
    """How many steps, from where the run begins, and which settings differ from those of the newest of them."""
    with journal(tmp_path, settings={"M": 10, "N": 3, "gone": None}) as j:
        assert j.begin(0) is None
        for step in range(4):
            j.record_trajectories(step, [trajectory()])
            if step < 3:  # of the last one, nothing was paid for
                j.record(step, 0, audit())
    with journal(tmp_path) as j:
        assert j.begin(0) is None
    other = {"fingerprint": "M=5", "settings": {"M": 5, "N": 3, "new": "x"}}
    differences = {"M": ("10", "5"), "gone": ("null", None), "new": (None, '"x"')}
    for step in (0, 2):
        with journal(tmp_path, **other) as j:
            assert j.begin(step) == NotReplayed(3 - step, differences, 0)
    with journal(tmp_path, **other) as j:
        assert j.begin(3) is None
        assert j.begin(1).other_settings == 2
        j.record_trajectories(1, [trajectory()])
    with journal(tmp_path, fingerprint="M=7") as j:  # it does not say which settings it has
        assert j.begin(0) == NotReplayed(1, {}, 0)
    with journal(tmp_path, num_processes=3, replay=False) as j:  # which was said before
        assert j.begin(0) is None


def test_settings_that_are_put_back(tmp_path):
    """Another run in between supersedes what a run from the start recorded only where the student may be another."""
    with journal(tmp_path) as j:
        for step in range(4):
            j.record_trajectories(step, [trajectory(step)])
            j.record(step, 0, audit())
    with journal(tmp_path, fingerprint="M=5") as j:
        j.record_trajectories(1, [trajectory()])
    for step in (0, 2):  # it was stopped at once
        with journal(tmp_path) as j:
            assert j.begin(step) is None
            assert j.trajectories(3) == [trajectory(3)]
            assert j.audit(3, 0) == audit()
    with journal(tmp_path, fingerprint="M=5") as j:
        j.record(1, 0, audit())
    with journal(tmp_path) as j:  # the checkpoint may be that of the other run
        assert j.begin(2) == NotReplayed(0, {}, 2)
        assert j.trajectories(2) is None
    with journal(tmp_path) as j:
        assert j.begin(0) is None
        assert j.trajectories(0) == [trajectory(0)]
        assert j.audit(3, 0) == audit()
        j.record_trajectories(2, [trajectory(9)])
        assert j.trajectories(3) is None


def test_other_number_of_processes(tmp_path):
    """Another number of processes is told so; without replay it may continue, and is then the one to replay."""
    fill(tmp_path, steps=1)
    before = main_files(tmp_path)
    with pytest.raises(ProcessCountError, match=r"rank-0\.sqlite was written by 2 process\(es\) and this run has 3"):
        journal(tmp_path, num_processes=3)
    assert main_files(tmp_path) == before
    with journal(tmp_path, num_processes=3, replay=False) as j:
        assert j.trajectories(0) is None
        assert j.usage() == Usage(20, 2, 4, 0)
        j.record_trajectories(0, [trajectory(3)])
        assert j.trajectories(0) == [trajectory(3)]  # its own
    with journal(tmp_path, num_processes=3) as j:
        assert j.trajectories(0) == [trajectory(3)]


# ---- The ledger ----


def test_ledger(tmp_path):
    """Requests add up by run, step and teacher, over sessions and over ranks; audits and replays add nothing."""
    for run in ("first", "first", "second"):
        with journal(tmp_path, run=run) as j:
            if j.trajectories(7) is None:
                j.record_trajectories(7, [trajectory()])
                j.record(7, 0, audit())
            for _ in range(3):
                j.record_usage(7, 0, Usage(100, 10, 5, 1), 0.125)
            j.record_usage(8, None, Usage(1, 0, 0, 0))
    with journal(tmp_path, run="second", teacher="anthropic:claude") as j:
        j.record_usage(7, 0, Usage(1000, 0, 0, 0))
        j.record_usage(7, 0, Usage(1000, 0, 0, 0), 2)
        j.record_usage(7, 0, Usage(1000, 0, 0, 0))
        assert j.ledger() == [
            LedgerRow("first", 7, "openai:gpt", Usage(600, 60, 30, 6), 0.75, 1),
            LedgerRow("first", 8, "openai:gpt", Usage(2, 0, 0, 0), None, 0),
            LedgerRow("second", 7, "openai:gpt", Usage(300, 30, 15, 3), 0.375, 0),
            LedgerRow("second", 8, "openai:gpt", Usage(1, 0, 0, 0), None, 0),
            LedgerRow("second", 7, "anthropic:claude", Usage(3000, 0, 0, 0), 2.0, 0),
        ]
        assert j.usage() == Usage(3903, 90, 45, 9)
        with journal(tmp_path, rank=1) as other:
            other.record_usage(0, 0, Usage(7, 0, 0, 0), 1.0)
            assert spent(tmp_path) == (Usage(3910, 90, 45, 9), 4.125)  # while both are being written


def test_what_was_in_flight_counts(tmp_path):
    """A file that was left with requests in flight: the most that they can have cost is used, once, and is said."""
    with journal(tmp_path) as j:
        assert j.lost is None
        j.record_usage(3, None, Usage(10, 0, 5, 0), 1.0)
        j.record_in_flight(3, 200, 4.0)
        j.record_in_flight(3, 300, 6.0)
        assert j.usage() == Usage(10, 0, 5, 0)  # as long as someone is there to count them
        assert spent(tmp_path) == (Usage(310, 0, 5, 0), 7.0)
    with journal(tmp_path, run="second") as j:
        assert j.lost == (300, 6.0)
        assert j.ledger() == [LedgerRow("run", 3, "openai:gpt", Usage(310, 0, 5, 0), 7.0, 0)]
        j.record_in_flight(4, 50)  # no price
        j.record_in_flight(4, 0)
    with journal(tmp_path) as j:
        assert j.lost is None
        assert spent(tmp_path) == (Usage(310, 0, 5, 0), 7.0)
        j.record_in_flight(5, 50)
    assert spent(tmp_path) == (Usage(360, 0, 5, 0), 7.0)
    with journal(tmp_path) as j:
        assert j.lost == (50, None)
        assert j.usage() == Usage(360, 0, 5, 0)


def test_answers(tmp_path):
    """Until the audit is finished, they are there with what they cost, by trajectory and request."""
    with journal(tmp_path) as j:
        with pytest.raises(JournalError, match="no trajectories"):
            j.record_answer(0, 0, "a", 0, ["x"], Usage(1, 0, 1))
        assert j.usage() == Usage()  # both or neither
        j.record_trajectories(0, [trajectory(), trajectory()])
        with pytest.raises(JournalError, match="usd=nan"):
            j.record_answer(0, 0, "a", 0, ["x"], Usage(1, 0, 1), float("nan"))
        assert (j.answers(0, 0), j.usage()) == ({}, Usage())
        j.record_answer(0, 0, "a", 0, ["x\ud800", 1], Usage(1, 0, 1), 0.5)
        j.record_answer(0, 0, "a", 2, ["y"], Usage(1, 0, 1), 0.5)
        j.record_answer(0, 0, "b", 0, ["z"], Usage(1, 0, 1))
        j.record_answer(0, 1, "a", 0, ["other"], Usage(1, 0, 1))
    expected = {"a": {0: ["x\ud800", 1], 2: ["y"]}, "b": {0: ["z"]}}
    with journal(tmp_path, fingerprint="M=5", settings={}) as j:
        assert j.begin(0) == NotReplayed(1, {}, 0)  # there is no audit, but there is something that was paid for
        assert j.answers(0, 0) == {}
    with journal(tmp_path) as j:
        assert j.begin(0) is None
        assert j.answers(0, 0) == expected
        assert spent(tmp_path) == (Usage(4, 0, 4), 1.0)
        j.record(0, 0, audit())
        assert j.answers(0, 0) == {}
        assert j.answers(0, 1) == {"a": {0: ["other"]}}
        j.record_trajectories(0, [trajectory()])
        assert j.answers(0, 1) == {}
    assert spent(tmp_path) == (Usage(4, 0, 4), 1.0)


def test_answers_that_are_set_aside(tmp_path):
    """They stay in the file, are never replayed, and new ones take their place."""
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(), trajectory()])
        for index in (0, 1):
            j.record_answer(0, index, "a", 0, ["x"], Usage(1, 0, 1))
    for number in range(2):
        with journal(tmp_path) as j:
            assert j.set_aside(0, 0) == 1
            assert j.answers(0, 0) == {}
            assert j.answers(0, 1) == {"a": {0: ["x"]}}
            j.record_answer(0, 0, "a", 0, [f"y{number}"], Usage(1, 0, 1))
    with journal(tmp_path) as j:
        assert j.answers(0, 0) == {"a": {0: ["y1"]}}
    assert spent(tmp_path)[0] == Usage(4, 0, 4)


def test_cost_must_be_finite(tmp_path):
    """A cost that is no number would make every sum of the ledger none."""
    with journal(tmp_path) as j:
        with pytest.raises(JournalError, match="usd=nan"):
            j.record_usage(0, 0, Usage(1, 0, 0, 0), float("nan"))
        assert j.ledger() == []


def test_nothing_spent(tmp_path):
    """A folder without journals has cost nothing, and looking makes none."""
    assert spent(tmp_path) == (Usage(), 0.0)
    assert not list(tmp_path.iterdir())


# ---- Damage ----


def write(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def read_all(folder, steps):
    with journal(folder) as j:
        return [(j.trajectories(step), j.audit(step, 0), j.audit(step, 1)) for step in range(steps)], j.ledger()


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_garbage(tmp_path, where):
    """Garbage anywhere is an error that names the file and the remedy, at the latest when the record is read."""
    fill(tmp_path)
    path = journal_path(tmp_path, 0)
    size = path.stat().st_size
    write(path, {"first": 0, "middle": size // 2, "last": size - 9000}[where], os.urandom(8192))
    before = main_files(tmp_path)
    with pytest.raises(JournalError, match=r"rank-0\.sqlite is damaged: .* Restore it from a copy"):
        read_all(tmp_path, 8)
    if where == "first":  # found at the start: nothing was written
        assert main_files(tmp_path) == before


def test_single_bytes(tmp_path):
    """One wrong byte is an error, or it stands where nothing is stored; nothing else is ever read."""
    fill(tmp_path, steps=12)
    path = journal_path(tmp_path, 0)
    good = path.read_bytes()
    expected = read_all(tmp_path, 12)
    dice = random.Random(0)
    errors = 0
    page = 16384
    # Most bytes belong to texts. The first bytes of a page say where its records are, and which pages follow.
    starts = [number * page + dice.randrange(200) for number in range(len(good) // page) for _ in range(6)]
    for offset in [*starts, *(dice.randrange(len(good)) for _ in range(100))]:
        path.write_bytes(good)
        write(path, offset, bytes([good[offset] ^ (1 << dice.randrange(8))]))
        try:
            assert read_all(tmp_path, 12) == expected
        except JournalError:
            errors += 1
    assert errors > 20


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_truncated(tmp_path, share):
    """A file that was cut off is an error, down to the empty file, which SQLite would take for a new one."""
    fill(tmp_path)
    path = journal_path(tmp_path, 0)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(JournalError, match="damaged"):
        journal(tmp_path)
    with pytest.raises(JournalError, match="damaged"):
        spent(tmp_path)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE usage SET prompt_tokens = 0 WHERE step = 3", "row of 'usage'"),
        ("UPDATE audits SET payload = zeroblob(9) WHERE attempt = 2 AND idx = 1", "row of 'audits'"),
        ("UPDATE trajectories SET attempt = 77 WHERE attempt = 2", "0 of 2 rows of 'trajectories'"),
        ("DELETE FROM audits WHERE attempt = 2 AND idx = 1", "1 of 2 rows of 'audits'"),
        ("UPDATE audits SET idx = 5 WHERE attempt = 2 AND idx = 1", "row of 'audits'"),
        ("UPDATE progress SET num_audits = 1 WHERE attempt = 2", "row of 'progress'"),
        ("UPDATE attempts SET step = 77 WHERE step = 1", "row of 'attempts'"),
        ("UPDATE sessions SET fingerprint = 'other'", "row of 'sessions'"),
        ("ALTER TABLE usage RENAME usd TO eur", "tables are not those"),
        ("DROP TABLE audits", "tables are not those"),
    ],
)
def test_changed_values(tmp_path, statement, message):
    """What SQLite itself cannot see, such as a wrong number in the ledger, is an error before it is used, too."""
    fill(tmp_path)
    with closing(sqlite3.connect(journal_path(tmp_path, 0))) as db, db:
        db.execute(statement)
    with pytest.raises(JournalError, match=message):
        read_all(tmp_path, 8)


def test_not_a_journal(tmp_path):
    """Neither a text nor the database of another program is taken for a journal."""
    path = journal_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text("No database.\n" * 100)
    with pytest.raises(JournalError, match="damaged"):
        journal(tmp_path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(JournalError, match="does not begin like a journal"):
        journal(tmp_path)


def test_other_version(tmp_path):
    """A journal of another version of the package is not guessed at."""
    fill(tmp_path, steps=1)
    with closing(sqlite3.connect(journal_path(tmp_path, 0))) as db:
        db.execute("PRAGMA user_version = 99")
    for use in (journal, spent):
        with pytest.raises(JournalError, match="schema version 99"):
            use(tmp_path)


def become(path, version) -> None:
    """Make the file one of an earlier version."""
    with closing(sqlite3.connect(path)) as db:
        for since, tables in ADDED.items():
            for table in tables if since > version else ():
                db.execute(f"DROP TABLE {table}")
        db.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize("version", [2, 3])
def test_the_version_before(tmp_path, version):
    """What was spent is read, what was recorded is replayed, and the file becomes one of this version."""
    fill(tmp_path, steps=1)
    path = journal_path(tmp_path, 0)
    become(path, version)
    before = main_files(tmp_path)
    assert spent(tmp_path) == (Usage(20, 2, 4, 0), 1.0)
    assert main_files(tmp_path) == before
    with journal(tmp_path, settings={"M": 10}) as j:
        assert j.trajectories(0) == [trajectory(0), trajectory(1)]
        assert j.num_audits(0) == 2
        assert j.usage() == Usage(20, 2, 4, 0)
    with journal(tmp_path, fingerprint="M=5", settings={"M": 5}) as j:
        assert j.begin(0) == NotReplayed(1, {}, 0)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_an_earlier_version_is_checked_as_a_whole(tmp_path):
    """It has no counts, which would show later that a record is missing."""
    fill(tmp_path, steps=1)
    become(journal_path(tmp_path, 0), 3)
    with closing(sqlite3.connect(journal_path(tmp_path, 0))) as db, db:
        db.execute("UPDATE audits SET payload = zeroblob(9)")
    with pytest.raises(JournalError, match="row of 'audits'"):
        journal(tmp_path)


def test_lost_file(tmp_path):
    """Where records of a lost file are left, no empty one takes its place."""
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        journal_path(tmp_path, 0).unlink()
        with pytest.raises(JournalError, match="in use"):
            journal(tmp_path)
        log = journal_path(tmp_path, 0).with_name("rank-0.sqlite-wal").read_bytes()
    journal_path(tmp_path, 0).with_name("rank-0.sqlite-wal").write_bytes(log)
    with pytest.raises(JournalError, match="is missing"):
        journal(tmp_path)
    assert not journal_path(tmp_path, 0).exists()


def test_cannot_write(tmp_path):
    """A folder that cannot be made, and a journal that was closed, are errors of ours."""
    (tmp_path / "_audits").write_text("a file")
    with pytest.raises(JournalError, match="cannot be used"):
        journal(tmp_path)
    (tmp_path / "_audits").unlink()
    with journal(tmp_path) as j:
        pass
    j.close()
    with pytest.raises(JournalError, match="cannot be used"):
        j.record_usage(0, 0, Usage())


def test_a_request_that_cannot_be_counted(tmp_path):
    """On a full disk, what was in flight stays recorded for the next process to count, and nothing more is sent."""
    with journal(tmp_path) as j:
        j.record_in_flight(0, 90, 0.5)
        (pages,) = j._db.execute("PRAGMA page_count").fetchone()
        j._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(JournalError, match="full"):
            for index in range(1000):
                j.record_usage(0, index, Usage(1))
        j.record_in_flight(0, 0)
        with pytest.raises(JournalError, match="full"):
            j.record_in_flight(0, 10, 0.1)
    with journal(tmp_path) as j:
        assert j.lost == (90, 0.5)


def test_error_types():
    """One root, and a type of the standard library."""
    assert issubclass(JournalError, OmniOPDError)
    assert issubclass(JournalError, RuntimeError)
    assert issubclass(ProcessCountError, JournalError)


@pytest.mark.case("U11")
@pytest.mark.parametrize("deleted", ["_audits", "_audits/rank-0.sqlite", "."])
def test_deleted_while_it_is_open(tmp_path, caplog, deleted):
    """It comes back with all records, old and new, and with its lock; the log says so, once."""
    folder = tmp_path / "out"
    with journal(folder) as j:
        j.record_trajectories(0, [trajectory(), trajectory(1)])
        j.record_usage(0, 0, Usage(10, 0, 5), 1.0)
        j.record(0, 0, audit())
        target = folder / deleted
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        j.record_usage(0, 1, Usage(10, 0, 5), 1.0)
        j.record(0, 1, audit("after"))
        assert caplog.text.count("It is restored with all its records") == 1
        with pytest.raises(JournalError, match="in use by another process"):
            journal(folder)
    with journal(folder) as j:
        assert [j.audit(0, 0), j.audit(0, 1)] == [audit(), audit("after")]
        assert j.trajectories(0) == [trajectory(), trajectory(1)]
    assert spent(folder) == (Usage(20, 0, 10), 2.0)


@pytest.mark.case("U11")
def test_replaced_while_it_is_open(tmp_path):
    """Another run that started after the folder was deleted is not overwritten."""
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        shutil.rmtree(tmp_path / "_audits")
        with journal(tmp_path) as other:
            other.record_trajectories(0, [trajectory(5)])
            with pytest.raises(JournalError, match="was replaced by another file while this run was writing it"):
                j.record(0, 0, audit())
            assert other.trajectories(0) == [trajectory(5)]


@pytest.mark.case("U11")
@pytest.mark.parametrize("what", ["no room", "no files", "a folder"])
def test_a_lock_that_cannot_be_written(tmp_path, what):
    """A full disk is not "another process": the message says what to check."""
    path = journal_path(tmp_path, 0)
    path.parent.mkdir()
    limit = {"no room": resource.RLIMIT_FSIZE, "no files": resource.RLIMIT_NOFILE}.get(what)
    if limit is None:
        lock_path(path).mkdir()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    else:  # as on a full disk, no byte can be written; or no file can be opened
        limits = resource.getrlimit(limit)
        resource.setrlimit(limit, (0, limits[1]))
    try:
        with pytest.raises(JournalError) as caught:
            journal(tmp_path)
    finally:
        resource.setrlimit(limit or resource.RLIMIT_FSIZE, limits)
    said = str(caught.value)
    assert said.startswith(f"The journal {path} cannot be used: "), said
    assert "Check that the disk has room" in said
    assert "another process" not in said


# ---- Size ----


def bytes_read(action) -> int:
    """Bytes that this process reads from files while it does something."""

    def so_far() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = so_far()
    action()
    return so_far() - before


@pytest.mark.case("U12")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_reads_no_audits(tmp_path, monkeypatch):
    """What is read does not grow with the audits; a step that is replayed costs the same in a large journal."""
    checked = []
    monkeypatch.setattr(store, "checksum_of", lambda values: checked.append(values) or file.checksum_of(values))

    def opened(folder, per_step):
        with journal(folder) as j:
            for step in range(6):
                j.record_trajectories(step, [trajectory(i) for i in range(per_step)])
                for index in range(per_step):
                    j.record(step, index, audit(os.urandom(20_000).hex()))
        size = journal_path(folder, 0).stat().st_size
        read = bytes_read(lambda: journal(folder).close())
        with journal(folder) as j:
            j.begin(5)
            checked.clear()
            replayed = bytes_read(lambda: (j.trajectories(5), [j.audit(5, index) for index in range(per_step)]))
        return size, read, replayed, len(checked)

    small, large = opened(tmp_path / "small", 2), opened(tmp_path / "large", 40)
    assert large[0] > 10 * small[0]
    assert large[1] < small[1] + 100_000
    assert large[1] < large[0] / 20
    assert large[2] < large[0] / 2  # one of six steps, read twice at most
    assert large[3] <= 40 * 6


# ---- Other processes and threads ----

# Importing takes seconds and writing milliseconds, so one process imports and forks those that are killed.
NURSERY = f"""
import itertools, json, os, sys, time
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers import Usage
from tests.support.journals import audit, trajectory

def say(*what):  # one write, whole or not at all
    sys.stdout.write(json.dumps(what) + "\\n")
    sys.stdout.flush()

def write(folder, first):
    with Journal(journal_path(folder, 0), **{SETTINGS!r}) as journal:
        say("open", os.getpid())
        for step in itertools.count(first):
            journal.record_trajectories(step, [trajectory(step) for _ in range(8)])
            say("trajectories", step)
            for index in range(8):
                journal.record_usage(step, index, Usage(step, 0, index, 0), 0.5)
                say("usage", step, index)
                journal.record(step, index, audit(f"{{step}} {{index}}"))
                say("audit", step, index)

def send(folder, first):
    with Journal(journal_path(folder, 0), **{SETTINGS!r}) as journal:
        say("open", os.getpid())
        for number in itertools.count(first):
            journal.record_in_flight(0, 100, 1.0)
            say("sent", number)
            journal.record_usage(0, None, Usage(60, 0, 10, 0), 0.5)
            journal.record_in_flight(0, 0)

def answer(folder, first):
    with Journal(journal_path(folder, 0), **{SETTINGS!r}) as journal:
        if journal.trajectories(0) is None:
            journal.record_trajectories(0, [trajectory()])
        say("open", os.getpid())
        for number in itertools.count(first):
            journal.record_answer(0, 0, f"{{number % 7}}", number, [1, "x" * 300], Usage(3, 0, 4), 0.5)
            say("answered", number)

def leave_worker(folder, first):
    journal = Journal(journal_path(folder, 0), **{SETTINGS!r})
    say("open", os.getpid())
    worker = os.fork()
    if worker:
        say("worker", worker)
    time.sleep(600)

for line in sys.stdin:
    what, *arguments = json.loads(line)
    process = os.fork()
    if process == 0:
        dict(write=write, send=send, answer=answer, leave_worker=leave_worker)[what](*arguments)
    os.waitpid(process, 0)
    say("killed")
"""


class Child:
    """A process that says what it has committed. Only one lives at a time."""

    def __init__(self, nursery, what, folder, first=0):
        self.nursery = nursery
        self.nursery.stdin.write(json.dumps([what, str(folder), first]) + "\n")
        self.nursery.stdin.flush()
        said, self.pid = self.read()
        assert said == "open"

    def read(self) -> list:
        return json.loads(self.nursery.stdout.readline())

    def kill(self) -> list[list]:
        """Kill it, and return what it had said and nobody had read."""
        os.kill(self.pid, signal.SIGKILL)
        said = []
        while (line := self.read()) != ["killed"]:
            said.append(line)
        return said


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate()  # ends with its input


def test_kill(tmp_path, nursery):
    """Killed at 20 random moments, one after another: all that was committed is there, batches whole, money exact."""
    dice = random.Random(0)
    committed: list[list] = []
    first = 0

    def check(j, said):
        for kind, step, *index in said:
            if kind == "trajectories":
                assert j.trajectories(step) == [trajectory(step)] * 8
            elif kind == "audit":
                assert j.audit(step, *index) == audit(f"{step} {index[0]}")
        paid = {row.step: row.usage for row in j.ledger()}
        for step in {step for kind, step, *_ in said if kind == "usage"}:
            requests = sum(what[:2] == ["usage", step] for what in said)
            # They are made in order, and one more may have been committed before the child could say so.
            assert paid[step] in [Usage(n * step, 0, sum(range(n)), 0) for n in (requests, requests + 1)]

    for _ in range(20):
        child = Child(nursery, "write", tmp_path, first)
        time.sleep(dice.uniform(0, 0.1))
        said = child.kill()
        committed += said
        first = max([first, *(step + 1 for _, step, *_ in said)])
        unrecovered = spent(tmp_path)[0]
        with journal(tmp_path) as j:
            assert j.usage() == unrecovered
            check(j, said)
            # The next batch may have been committed before the child could say so. Then it is there as a whole.
            assert j.trajectories(first) in (None, [trajectory(first)] * 8)
            first += j.trajectories(first) is not None
    with journal(tmp_path) as j:
        check(j, committed)
    assert len(committed) > 50


def test_kill_while_requests_are_in_flight(tmp_path, nursery):
    """Killed at 20 random moments: never is less counted than what was sent can have cost, and little more."""
    dice = random.Random(0)
    sent = lost = 0
    for _ in range(20):
        child = Child(nursery, "send", tmp_path)
        time.sleep(dice.uniform(0, 0.02))
        sent += len(child.kill())
        usage, usd = spent(tmp_path)
        with journal(tmp_path) as j:
            lost += j.lost is not None
            assert (j.usage(), spent(tmp_path)) == (usage, (usage, usd))
    # One that was in flight when it was killed counts with its worst case, and may have been counted before; one may
    # have been written down before the child could say so.
    assert 70 * sent <= usage.prompt_tokens + usage.completion_tokens <= 70 * sent + 100 * lost
    assert 0.5 * sent <= usd <= 0.5 * sent + lost
    assert sent > 20
    assert lost > 0


def test_kill_between_answers(tmp_path, nursery):
    """Killed at 10 random moments: an answer is kept if and only if it is counted, and none that was kept is lost."""
    dice = random.Random(0)
    first = 0
    for _ in range(10):
        child = Child(nursery, "answer", tmp_path, first)
        time.sleep(dice.uniform(0, 0.05))
        said = [number for _, number in child.kill()]
        with journal(tmp_path) as j:
            kept = {start for answers in j.answers(0, 0).values() for start in answers}
            assert kept >= set(said)
            assert kept == set(range(len(kept)))
            assert j.usage() == Usage(3 * len(kept), 0, 4 * len(kept))
            first = len(kept)
    assert first > 20


def test_locked(tmp_path, nursery):
    """Who comes second is turned away at once, in the same process too; a killed process leaves no lock behind."""
    child = Child(nursery, "write", tmp_path)
    try:
        start = time.monotonic()
        with pytest.raises(JournalError, match=r"rank-0\.sqlite is in use by another process"):
            journal(tmp_path)
        assert time.monotonic() - start < 1
        assert spent(tmp_path)[1] >= 0  # readers are welcome
    finally:
        child.kill()
    with journal(tmp_path):
        with pytest.raises(JournalError, match="in use"):
            journal(tmp_path)
        with journal(tmp_path, rank=1):
            pass
    with journal(tmp_path):
        pass


def test_lock_is_not_inherited(tmp_path, nursery):
    """A worker that outlives its killed parent does not keep the journal from the next run."""
    child = Child(nursery, "leave_worker", tmp_path)
    _, worker = child.read()
    child.kill()
    try:
        os.kill(worker, 0)  # it is still there
        with journal(tmp_path) as j:
            j.record_trajectories(0, [trajectory()])
    finally:
        os.kill(worker, signal.SIGKILL)


def killed(folder, nursery) -> list[list]:
    """A journal that a killed process left behind, its log included; what it held."""
    child = Child(nursery, "write", folder)
    said = [child.read() for _ in range(200)]
    return said + child.kill()


def test_damaged_log(tmp_path, nursery):
    """A wrong byte in the log, after which SQLite would drop all records, is an error; what it says to do works."""
    killed(tmp_path, nursery)
    path = journal_path(tmp_path, 0)
    log = path.with_name("rank-0.sqlite-wal")
    good = log.read_bytes()
    for offset in (4, 10, 17, 25, 32 + 9, 32 + 20, 1000, len(good) // 3, len(good) // 2):
        log.write_bytes(good)
        write(log, offset, bytes([good[offset] ^ 1]))
        damaged = log.read_bytes()
        with pytest.raises(JournalError, match=r"log rank-0\.sqlite-wal holds records") as error:
            journal(tmp_path)
        assert log.read_bytes() == damaged
    _, statement = str(error.value).split(f"sqlite3 {path} ")
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement.strip("'"))
    with journal(tmp_path) as j:
        assert j.trajectories(0) is not None  # what was before the damage


def test_damage_is_left_alone(tmp_path):
    """A damaged journal is looked at and not written to; nor is the log removed, which closing a database does."""
    fill(tmp_path)
    path = journal_path(tmp_path, 0)
    log = path.with_name("rank-0.sqlite-wal")
    write(path, path.stat().st_size // 2, os.urandom(20_000))
    log.write_bytes(b"the beginning of a log")
    before = path.read_bytes()
    with pytest.raises(JournalError, match="damaged"):
        journal(tmp_path)
    assert path.read_bytes() == before
    assert log.read_bytes() == b"the beginning of a log"


def live_copy(source, target) -> None:
    """What a kill at this moment would leave behind."""
    target.mkdir(parents=True)
    for path in source.glob("rank-0.sqlite*"):
        if path.suffix in (".sqlite", ".sqlite-wal"):
            (target / path.name).write_bytes(path.read_bytes())


def test_torn_twice(tmp_path):
    """What is left of a transaction that was cut off is not taken for damage after the next crash."""
    first, second, third = (tmp_path / name / "_audits" for name in ("first", "second", "third"))
    dice = random.Random(0)
    ids = [dice.getrandbits(40) for _ in range(50_000)]
    with journal(first.parent) as j:
        j.record_trajectories(0, [trajectory()])
        j.record_trajectories(1, [Trajectory("", [], ids)])  # many frames
        live_copy(first, second)
    log = second / "rank-0.sqlite-wal"
    os.truncate(log, log.stat().st_size - 5000)
    with journal(second.parent) as j:
        assert j.trajectories(0) == [trajectory()]
        assert j.trajectories(1) is None
        live_copy(second, third)
    with journal(third.parent) as j:
        assert j.trajectories(0) == [trajectory()]


def test_torn_log(tmp_path, nursery):
    """Where the last write was cut off, the journal opens with all records before it."""
    killed(tmp_path, nursery)
    log = journal_path(tmp_path, 0).with_name("rank-0.sqlite-wal")
    os.truncate(log, log.stat().st_size - 5000)
    with journal(tmp_path) as j:
        assert j.trajectories(0) == [trajectory(0)] * 8
        assert j.audit(0, 7) == audit("0 7")


def test_foreign_writer(tmp_path):
    """Another program that holds the file makes an error after a while, not a hang, and nothing is half written."""
    with journal(tmp_path) as j:
        other = sqlite3.connect(journal_path(tmp_path, 0), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match=r"cannot be used: database is locked"):
            j.record_trajectories(0, [trajectory()])
        other.close()
        assert j.trajectories(0) is None
        j.record_trajectories(0, [trajectory()])
        assert j.trajectories(0) == [trajectory()]


@pytest.fixture
def hasty_threads():
    """Threads take turns all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_threads(tmp_path):
    """Two threads write while another reads: nothing is torn, nothing is lost."""
    problems = []
    done = threading.Event()

    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])

        def read():
            try:
                while not done.is_set():
                    prompt_tokens = j.usage().prompt_tokens
                    assert prompt_tokens % 3 == 0
                    for index in range(100):
                        assert j.audit(0, index) in (None, audit(f"{index}"))
                    assert j.trajectories(0) == [trajectory()]
            except Exception as error:
                problems.append(error)

        def write(start):
            try:
                for index in range(start, start + 50):
                    j.record_usage(0, 0, Usage(3, 0, 0, 0), 1.0)
                    j.record(0, index, audit(f"{index}"))
            except Exception as error:
                problems.append(error)

        reader = threading.Thread(target=read)
        writers = [threading.Thread(target=write, args=(start,)) for start in (0, 50)]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
        assert not problems
        assert j.usage() == Usage(300, 0, 0, 0)
        assert [j.audit(0, index) for index in range(100)] == [audit(f"{index}") for index in range(100)]
