# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd export` writes a run as a dataset, also while the run writes, and pushes it to the Hub."""

import json
import sys

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

import omniopd_trl
from omniopd_trl.audits.types import Trajectory
from omniopd_trl.cli.main import main
from omniopd_trl.journal.browse import list_audits, read_audits
from omniopd_trl.report import export as export_module
from omniopd_trl.trainer.fingerprint import SINCE_EARLIER_RECORDS
from tests.support import hub_stub
from tests.support.commands import run_process
from tests.support.journals import audit, journal, trajectory
from tests.support.recorded_runs import record_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two processes, of which the second one has more steps."""
    folder = tmp_path_factory.mktemp("run")
    for rank, steps in ((0, 2), (1, 3)):
        record_run(folder, steps, rank=rank)
    return folder


@pytest.fixture(scope="module")
def folder(run):
    assert main(["export", str(run)]) == 0
    return run / "_export"


def rows_of(folder):
    return load_dataset(str(folder), split="train")


def test_rows(run, folder, monkeypatch):
    """One row per trajectory, by step and process, with everything that the journals hold."""
    rows, audits = rows_of(folder), list(read_audits(run, list_audits(run)))
    assert len(rows) == len(audits) == 20
    places = list(zip(rows["step"], rows["process"], rows["index"], strict=True))
    assert places == sorted(places)
    assert places[-1] == (2, 1, 3)
    for row, there in zip(rows, audits, strict=True):
        assert row["prompt"][0]["content"].replace("\ufffd", "\ud83d") == there.prompt[0]["content"]
        assert (row["prompt_ids"], row["completion_ids"]) == (list(there.prompt_ids), list(there.completion_ids))
        assert (row["teacher"], row["usd"], row["usage"]["prompt_tokens"]) == ("openai:gpt", 0.001, 100)
        for chunk, recorded in zip(row["chunks"], there.chunks, strict=True):
            assert [chunk[name] for name in ("start", "end", "anchor", "text", "prior", "posterior")] == [
                getattr(recorded, name) for name in ("start", "end", "anchor", "text", "prior", "posterior")
            ]
            assert tuple(rollout["text"] for rollout in chunk["rollouts"]) == recorded.rollouts
            assert tuple(rollout["similarity"] for rollout in chunk["rollouts"]) == recorded.similarities
            assert row["completion"].startswith(chunk["text"], chunk["offset"])


def test_pieces(run, folder, tmp_path, monkeypatch):
    """Small pieces and files give the same rows."""
    monkeypatch.setattr(export_module, "_TOKENS", 30)
    monkeypatch.setattr(export_module, "_FILE_SIZE", 2**12)
    assert main(["export", str(run), "-o", str(tmp_path / "pieces")]) == 0
    assert len(list((tmp_path / "pieces" / "data").iterdir())) > 2
    assert rows_of(tmp_path / "pieces").to_list() == rows_of(folder).to_list()


def test_two_exports_of_one_name(folder, tmp_path):
    """Each is loaded as it is, although `datasets` caches what it has loaded."""
    other = record_run(tmp_path, steps=1)
    assert main(["export", str(other)]) == 0
    assert len(rows_of(other / "_export")) == 4
    assert len(rows_of(folder)) == 20


def test_while_the_run_writes(tmp_path):
    """Finished audits only, also of a run that was killed; plain prompts; a replaced export."""
    with journal(tmp_path, num_processes=1) as open_journal:
        open_journal.record_trajectories(0, [Trajectory("2 + 2 = ", [1], [3, 4, 5], seed=n) for n in range(2)])
        open_journal.record(0, 1, audit())
        assert main(["export", str(tmp_path)]) == 0
        (row,) = rows_of(tmp_path / "_export")
        assert (row["index"], row["prompt"], row["sampling_seed"]) == (1, "2 + 2 = ", 1)
        open_journal.record(0, 0, audit())
        assert main(["export", str(tmp_path)]) == 0
        assert len(rows_of(tmp_path / "_export")) == 2


def test_settings_of_several_runs_in_a_folder(tmp_path):
    """Those of the runs whose rows are exported, and what differs among these."""

    def exported(value, steps):
        settings = {"fingerprint": f"C={value}", "settings": {"chunk_length": value}, "num_processes": 1}
        with journal(tmp_path, **settings) as open_journal:
            for step in steps:
                open_journal.record_trajectories(step, [trajectory()])
                open_journal.record(step, 0, audit())
        assert main(["export", str(tmp_path)]) == 0
        about = json.loads((tmp_path / "_export" / "export.json").read_text())
        return about["settings"]["chunk_length"], about["mixed"]

    assert exported(10, (0, 1)) == (10, [])
    assert exported(12, ()) == (10, [])
    assert exported(12, (1,)) == (12, ["chunk_length"])
    assert exported(12, (0,)) == (12, [])


def test_settings_that_changed(tmp_path, capsys):
    """The card and the command name them. Other chunks cannot be trained from, another prompt of the teacher can."""

    def exported(step, **settings):
        values = {"num_chunks": 2, **settings}
        with journal(tmp_path, fingerprint=str(values), settings=values, num_processes=1) as open_journal:
            open_journal.record_trajectories(step, [trajectory()])
            open_journal.record(step, 0, audit())
        assert main(["export", str(tmp_path)]) == 0
        card = (tmp_path / "_export" / "README.md").read_text()
        return card, capsys.readouterr().out

    card, said = exported(0, teacher_context_template="{context}{prompt}")
    assert "changed between" not in card + said
    card, said = exported(1, teacher_context_template="{prompt}{context}")
    assert "| changed between steps | `teacher_context_template` |" in card
    assert "These settings changed between its steps: teacher_context_template.\nTrain from it with: " in said
    assert "{prompt}" not in card  # a text of the user
    card, said = exported(2, num_chunks=3)
    held = "steps with different num_chunks"
    assert f"No run can train from this dataset, since it holds {held}." in card
    assert f"It holds {held}, so no run can train from it." in said
    assert "omniopd train" not in card


def test_keys_of_messages(tmp_path, caplog):
    """The column holds roles and texts; what else a message holds is named."""
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": "2"}]
    with journal(tmp_path, num_processes=1) as open_journal:
        prompt = [{"role": "user", "content": parts, "name": "Leo"}]
        open_journal.record_trajectories(0, [Trajectory(prompt, [1], [3, 4, 5])])
        open_journal.record(0, 0, audit())
    assert main(["export", str(tmp_path)]) == 0
    assert rows_of(tmp_path / "_export")[0]["prompt"] == [{"role": "user", "content": "2 +\n2"}]
    assert "Messages of the prompts hold name, which the column `prompt` leaves out" in caplog.text


def test_card(folder):
    card = DatasetCard.load(folder / "README.md")
    assert {"omniopd", "trl"} <= set(card.data.tags)
    for part in (
        "| `num_chunks` | `2` |",
        "| teacher | openai:gpt |",
        "2,000 read, 600 written",
        "0.0200 US dollars",
    ):
        assert part in card.text, part
    assert "export:FOLDER" in card.text
    assert "terms of its provider" in card.text
    assert f"| omniopd_trl | {omniopd_trl.__version__} |" in card.text


def test_a_local_teacher_is_named_without_its_path(tmp_path):
    with journal(tmp_path, num_processes=1, teacher=str(tmp_path)) as open_journal:
        open_journal.record_trajectories(0, [trajectory()])
        open_journal.record(0, 0, audit())
    assert main(["export", str(tmp_path)]) == 0
    for path in (tmp_path / "_export").rglob("*"):
        assert path.is_dir() or str(tmp_path.parent).encode() not in path.read_bytes(), path
    assert rows_of(tmp_path / "_export")["teacher"][0] == tmp_path.name


def test_folders_that_hold_something_else(run, tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["export", str(run), "-o", str(tmp_path)]) == 2
    assert "is not an export, so it is not replaced" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 1
    assert "holds no audits" in capsys.readouterr().err
    assert main(["export", str(run), "--private"]) == 2
    assert "--private has no effect without --push" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def export_command(*options, hub_environment, cwd):
    command = (sys.executable, "-m", "omniopd_trl.cli.main", "export", *options)
    return run_process(*command, cwd=cwd, env=hub_environment)


def test_push(run, tmp_path):
    """Files arrive byte for byte and without a secret, and a run can train from the repository."""
    with hub_stub.serve() as hub:
        done = export_command(
            run, "-o", "out", "--push", "me/audits", "--private", hub_environment=hub.environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "me/audits" in done.stdout
        repo = hub.repos["me/audits"]
        files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*.*")}
        assert set(files) >= {"README.md", "export.json", "data/train-00000.parquet"}
        for name, path in files.items():
            assert repo.files[name] == path.read_bytes(), name
            assert hub_stub.TOKEN.encode() not in repo.files[name], name
        assert 'load_dataset("me/audits", split="train")' in repo.files["README.md"].decode()
        code = "from omniopd_trl.trainer.exported import Export; print(Export('me/audits').num_steps(8))"
        environment = {**hub.environment, "HF_HOME": str(tmp_path / "home")}
        read = run_process(sys.executable, "-c", code, cwd=tmp_path, env=environment)
        assert read.stdout.split() == ["2"], read.stderr


def test_a_push_that_fails(run, tmp_path):
    """The folder stays, and one line says how to retry."""
    with hub_stub.serve() as hub:
        environment = {**hub.environment, "HF_TOKEN": "hf_another-token"}
        done = export_command(run, "-o", "out", "--push", "me/audits", hub_environment=environment, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("PushError"))
    assert "401" in line
    assert line.endswith("Retry with: hf upload me/audits out . --repo-type dataset")
    assert "Traceback" not in done.stderr
    assert "hf_another-token" not in done.stderr
    assert json.loads((tmp_path / "out" / "export.json").read_text())["num_trajectories"] == 20


def test_the_options_of_all_methods_are_exported():
    """But the template of a context, which is a text of the user."""
    assert {*SINCE_EARLIER_RECORDS}.difference(export_module._SETTINGS) == {"teacher_context_template"}


def test_options_for_training_can_be_pasted():
    """A folder may have spaces in its name."""
    options = export_module.training_options({"settings": {}}, "my runs/_export")
    assert options == "--teacher_model_name_or_path export:'my runs/_export'"
