# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Both commands on journals of any kind: empty, of an earlier version, being written, damaged."""

import json
import shutil
import sqlite3
from contextlib import closing
from random import Random

import pytest
from tokenizers import Tokenizer

from omniopd_trl.audits.types import Trajectory
from omniopd_trl.cli.main import main
from omniopd_trl.demo import asset_path
from omniopd_trl.journal import browse, store
from omniopd_trl.journal.browse import list_audits, read_audits, read_prompts, read_spent
from omniopd_trl.journal.file import connect, journal_path
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.schema import ADDED, COUNTS
from omniopd_trl.report.page import write_page
from omniopd_trl.report.runs import Run, open_runs, token_texts
from omniopd_trl.teachers import Usage
from tests.support.journals import SETTINGS, audit, journal, trajectory
from tests.support.recorded_runs import record_run


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("good"), 3)


@pytest.fixture
def run(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


def change(run, *statements):
    with closing(sqlite3.connect(journal_path(run, 0))) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def truncated(run):
    path = journal_path(run, 0)
    path.write_bytes(path.read_bytes()[:20000])


def overwritten(run):
    path = journal_path(run, 0)
    data = bytearray(path.read_bytes())
    data[16384:] = bytes(len(data) - 16384)
    path.write_bytes(data)


def another_file(run):
    journal_path(run, 0).write_bytes(b"not a database, but some other text" * 99)


def without_records(run):
    change(run, "DELETE FROM trajectories")


def of_another_teacher(run):
    change(run, "UPDATE audits SET payload = (SELECT payload FROM trajectories LIMIT 1)")


def newer(run):
    change(run, "PRAGMA user_version = 99")


@pytest.mark.parametrize("command", ["audits", "report"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is damaged"),
        (overwritten, "is damaged"),
        (another_file, "is damaged"),
        (without_records, "is damaged: a record is missing"),
        (of_another_teacher, "is damaged: the checksum of a record does not match"),
        (newer, "has schema version 99"),
    ],
)
def test_a_damaged_journal(run, damage, said, command, capsys):
    """One line says what is wrong, and nothing is written over an earlier report."""
    (run / "report.html").write_text("an earlier report")
    damage(run)
    assert main([command, str(run)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("JournalError: ")
    assert said in error
    assert (run / "report.html").read_text() == "an earlier report"


@pytest.mark.parametrize("version", [2, 3])
def test_a_journal_of_an_earlier_version(run, version, capsys):
    tables = [table for since, added in ADDED.items() if since > version for table in added]
    change(run, *(f"DROP TABLE {table}" for table in tables), f"PRAGMA user_version = {version}")
    assert main(["audits", str(run), "--worst", "2", "--json"]) == 0
    assert [chunk["posterior"] for chunk in json.loads(capsys.readouterr().out)] == [0.18, 0.18]
    assert main(["report", str(run)]) == 0


def test_a_run_that_has_audited_nothing(tmp_path, capsys):
    with journal(tmp_path):
        assert main(["report", str(tmp_path)]) == 0
        assert "Nothing has been audited yet." in (tmp_path / "report.html").read_text()
        assert main(["audits", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"DataError: {tmp_path} holds no finished audit yet.\n"


def test_shares_of_samples(run):
    """Of all samples that were asked for: 4 rollouts of 2 chunks, and as many dropped ones, of 4 trajectories."""
    logs = [
        {"step": 1, "audit/num_chunks": 2, "audit/dropped_chunks": 0.5, "teacher/refused": 16, "teacher/empty": 0},
        {"step": 2, "audit/num_chunks": 0, "audit/dropped_chunks": 1.0, "teacher/refused": 64},
        {"step": 3, "audit/num_chunks": 2, "audit/num_rollouts": 2.5, "teacher/refused": 2},  # `first_rollouts`
    ]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert Run(run).series("share/refused") == [(1, 16 / 64), (3, 2 / 20)]
    assert Run(run).series("share/empty") == [(1, 0)]
    assert Run(run).series("share/restarted") == []


def test_long_prompts_count_in_the_limit(tmp_path):
    """The page holds them as well."""
    with journal(tmp_path, num_processes=1) as j:
        prompts = [Random(number).randbytes(20_000).hex() for number in range(20)]
        j.record_trajectories(0, [Trajectory(prompt, [1], [2, 3]) for prompt in prompts])
        for index in range(20):
            j.record(0, index, audit())
    sizes = [len(write_page([Run(tmp_path)], max_mib=limit)) for limit in (0.2, 20)]
    assert sizes[0] < 0.3 * 2**20 < 0.5 * 2**20 < sizes[1]


def test_runs_whose_folders_have_one_name(good, tmp_path):
    folders = [shutil.copytree(good, tmp_path / name / "out") for name in ("a", "b")]
    assert [run.name for run in open_runs(folders)] == ["a/out", "b/out"]
    assert [run.name for run in open_runs(folders[:1] * 2)] == ["out", "out"]


def test_damaged_metrics(run, capsys):
    (run / "trainer_state.json").write_text('{"log_history": [')
    assert main(["report", str(run)]) == 1
    assert "cannot be read from trainer_state.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "{run}"], "cannot be written"),
        (["-o", "{run}/trainer_state.json/report.html"], "cannot be written"),
        (["--live", "--figures", "figures"], "--live writes no file"),
    ],
)
def test_places_that_cannot_be_written(run, options, said, capsys):
    (run / "trainer_state.json").write_text("{}")
    assert main(["report", str(run), *(option.format(run=run) for option in options)]) == 2
    assert said in capsys.readouterr().err


def test_an_audit_that_two_sessions_paid(tmp_path):
    """What a resumed run finished counts with what the killed one had paid; a superseded attempt does not."""
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(1)])
        j.record_usage(0, 0, Usage(5), 0.5)
    with journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory(2)])
        j.record_usage(0, 0, Usage(10), 1.0)
    with journal(tmp_path) as j:
        j.begin(0)
        j.record_usage(0, 0, Usage(20), 2.0)
        j.record(0, 0, audit())
    (place,) = list_audits(tmp_path)
    (trajectory_,) = read_audits(tmp_path, [place])
    assert (trajectory_.usage, trajectory_.usd) == (Usage(30), 3.0)
    assert read_spent(tmp_path) == [(0, Usage(35), 3.5)]


@pytest.mark.parametrize("length", [1, 4094, 4095, 4096, 100_000])
def test_prompts_alone(tmp_path, length):
    """They are read without the rest of the record, wherever a piece of it ends."""
    prompt = [{"role": "user", "content": "é" * length + "\ud83d"}]
    with journal(tmp_path) as j:
        one = trajectory()
        j.record_trajectories(0, [type(one)(prompt, one.prompt_ids, one.completion_ids)])
        j.record(0, 0, audit())
    assert list(read_prompts(tmp_path, list_audits(tmp_path))) == [prompt]


def test_reading_a_journal_is_linear_in_its_steps(tmp_path, monkeypatch):
    """SQLite's work for the audits of a run, and for opening its journal, doubles with the number of steps."""
    work = [0]

    def count():
        work[0] += 1

    def counted(*arguments):
        db = connect(*arguments)
        db.set_progress_handler(count, 10)  # once per ten instructions of SQLite
        return db

    def measured(steps):
        folder = tmp_path / str(steps)
        with journal(folder) as one:
            for step in range(steps):
                one.record_trajectories(step, [trajectory()])
                one.record_answer(step, 0, "request", 0, [], Usage(1))
                one.record_usage(step, 0, Usage(1), 0.1)
                if step % 2:
                    one.record(step, 0, audit())
        with monkeypatch.context() as patch:
            patch.setattr(browse, "connect", counted)
            patch.setattr(store, "connect", counted)
            work[0] = 0
            read = list(read_audits(folder, list_audits(folder)))
            assert (len(read), read[-1].usd) == (steps // 2, 0.1)
            reading, work[0] = work[0], 0
            with journal(folder, replay=True) as one:
                assert one.num_recorded(0) == (steps, steps // 2)
                one._db.execute(COUNTS).fetchall()  # an upgrade of an earlier version
            return reading, work[0]

    for small, large in zip(measured(40), measured(160), strict=True):
        assert large < 6 * small


def test_what_many_records_share_is_held_once(tmp_path):
    """The names of metrics in a long log, the texts of tokens, and what was paid while no journal was open."""
    with journal(tmp_path) as one:
        for step in range(2):
            one.record_log({"step": step, "metric/of many": 0.5})
    first, second = (list(entry)[1] for entry in browse.read_logs(tmp_path))
    assert first is second

    class Known(dict):
        def __iter__(self):
            raise AssertionError("all known texts are read for each trajectory")

        keys = __iter__

    tokenizer = Tokenizer.from_file(str(asset_path("student") / "tokenizer.json"))
    ids = tokenizer.encode("Leo has 7 beads.").ids
    assert "".join(token_texts(tokenizer, ids, Known())) == "Leo has 7 beads."

    recorder = Recorder(lambda: 0)
    for usd in (None, 0.5, None, 0.25):
        recorder.paid(Usage(1, 0, 2), usd)
    with recorder.open(journal_path(tmp_path / "new", 0), None, replay=False, **SETTINGS):
        (row,) = recorder.journal.ledger()
        assert (row.usage, row.usd) == (Usage(4, 0, 8), 0.75)
    assert recorder._unrecorded == (Usage(), None)
