# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd verify-estimator` on a recorded run with a local teacher."""

import json

import pytest
import torch

from omniopd_trl.cli.main import main
from omniopd_trl.journal.browse import read_audits
from omniopd_trl.report.runs import Run
from omniopd_trl.teachers.local import LocalTeacher
from tests.support.recorded_runs import record_run
from tests.support.training import make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_teacher_dir):
    folder = tmp_path_factory.mktemp("run")
    context = {"teacher_context_column": "answer", "teacher_context_template": "({context}) {prompt}"}
    options = {"save_audits": True, "num_rollouts": 3, "teacher_temperature": 0.7, **context}
    make_trainer(folder, tiny_model_dir, teacher=str(tiny_teacher_dir), **options).train()
    return folder


def test_the_table(run, tiny_teacher_dir, tmp_path, capsys):
    path = tmp_path / "table.json"
    command = ["verify-estimator", str(run), "--similarity", "edit", "exact", "--num_rollouts", "1", "3"]
    assert main([*command, "--teacher", str(tiny_teacher_dir), "-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Truth: probability per token" in text
    assert "Truth: probability of the chunk" in text
    written = json.loads(path.read_text())
    assert written["num_chunks"] > 5
    assert written["prior_strength"] == 1.0
    assert len(written["rows"]) == 2 * (1 + 2 * 2 * 2)
    assert all(0 <= row["mse"] <= 1 for row in written["rows"])
    # A tiny model with random weights never repeats a chunk: `exact` is 0 throughout.
    assert all(
        row["correlation"] is None
        for row in written["rows"]
        if row.get("similarity") == "exact" and row["estimate"] == "frequentist"
    )


def test_what_is_compared(run, tiny_teacher_dir, tmp_path, monkeypatch):
    """The first rollouts of each chunk, and what the teacher of the run would give to it in its place."""
    asked = []

    def logprobs(teacher, *arguments):
        asked.append(arguments)
        return [torch.tensor([0.25]).log()] * len(arguments[0])

    monkeypatch.setattr(LocalTeacher, "logprobs", logprobs)
    recorded, path = Run(run), tmp_path / "table.json"
    options = ["--similarity", recorded.settings["similarity"], "--num_rollouts", "1", "--max_trajectories", "2"]
    options += ["--teacher", str(tiny_teacher_dir), "-o", str(path)]
    assert main(["verify-estimator", str(run), *options]) == 0
    ((prefixes, texts, temperature),) = asked
    assert temperature == 0.7
    assert len(recorded.places) == 8
    pairs = [(t, chunk) for t in read_audits(run, [recorded.places[k] for k in (0, 4)]) for chunk in t.chunks]
    for (trajectory, chunk), prefix, text in zip(pairs, prefixes, texts, strict=True):
        question = trajectory.prompt[-1]["content"]
        n = int(question.split()[2])
        assert prefix.prompt[-1]["content"] == f"({n + n * n}) {question}"
        assert recorded.text(trajectory.completion_ids).startswith(prefix.completion + text)
        assert text == chunk.text
    assert any(prefix.completion for prefix in prefixes)
    rows = json.loads(path.read_text())["rows"]
    errors = [(chunk.similarities[0] - 0.25) ** 2 for _, chunk in pairs]
    assert rows[1]["mse"] == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_rollouts", "4"], "has only 3. Give at most 3, or record a run with `--num_rollouts 4`."),
        (["--similarity", "nothing"], "`similarity` is 'nothing'"),
        (["--prior_strength", "-1"], "`prior_strength` is -1"),
        (["--teacher", "scripted"], "it is not a local model"),
        (["--teacher", "demo:techer"], "Did you mean `demo:teacher`?"),
        (["-o", "nowhere/table.json"], "Name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, options, message, capsys):
    assert main(["verify-estimator", str(run), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_filtered_rollouts_are_refused(run, monkeypatch, capsys):
    """They are not drawn with the probabilities that they would be compared with."""
    settings = Run(run).settings
    assert settings["teacher_top_p"] == 1.0
    monkeypatch.setattr(Run, "settings", {**settings, "teacher_top_p": 0.9})
    assert main(["verify-estimator", str(run)]) == 1
    assert "Record a run with `--teacher_top_p 1`" in capsys.readouterr().err


def test_a_run_of_a_service_needs_a_local_teacher(tmp_path, capsys):
    record_run(tmp_path)
    assert main(["verify-estimator", str(tmp_path)]) == 1
    assert "--teacher MODEL" in capsys.readouterr().err


def test_the_module_loads_no_model(run, monkeypatch, capsys):
    """A wrong option is refused before the teacher is loaded."""
    monkeypatch.setattr(LocalTeacher, "__init__", None)
    for option in (("--num_rollouts", "9"), ("--prior_strength", "-1")):
        assert main(["verify-estimator", str(run), *option]) == 2
