# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`log_completions` shows audits: in the terminal, in Parquet, and in the trackers of `report_to`."""

import json
import logging
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest

from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.journal.browse import AuditedTrajectory, ShownChunk, list_audits, read_audits
from omniopd_trl.journal.schema import Shown
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.report.terminal import AuditedChunk, chunks_of
from omniopd_trl.teachers import Usage
from omniopd_trl.trainer import audit_table
from omniopd_trl.trainer.audit_table import data_frame, spread, table_row, trace_of
from tests.support import ROOT
from tests.support.commands import run_process, succeeded
from tests.support.ranks import Ranks
from tests.support.training import make_trainer, questions

# Installed by `make test-slow`. TRL imports installed trackers at its start, so they are in a folder of their own.
TRACKERS = ROOT / "build" / "trackers"

CHUNK = ShownChunk(2, 5, 3, "Leo has ", "51 stickers", ("61", "51", "61"), (0.5, 1.0, 0.5), 0.5, 0.25, weight=-0.125)
TRAJECTORY = AuditedTrajectory(
    *(4, 1, 7, "vllm:model", [{"role": "user", "content": "How many?"}], (1, 2, 3, 4, 5), (CHUNK,)),
    usage=Usage(100, 20, 30),
    usd=0.5,
)
ROW = {
    **{"step": 4, "rank": 1, "index": 7, "prompt": "user: How many?", "context": "Leo has ", "chunk": "51▏ stickers"},
    "rollouts": [{"text": "61", "count": 2, "similarity": 0.5}, {"text": "51", "count": 1, "similarity": 1.0}],
    **{"k_sem": 2.0, "num_rollouts": 3, "prior": 0.5, "posterior": 0.25, "weight": -0.125},
    **{"trajectory_tokens": 130, "trajectory_usd": 0.5},
}


def test_row():
    """A chunk with its fork, its distinct rollouts and the numbers; a tracker gets the rollouts as text."""
    row = table_row(AuditedChunk(TRAJECTORY, 0), lambda trajectory: ["Leo", " has ", "51", " stick", "ers"])
    assert row == ROW
    assert data_frame([row])["rollouts"].tolist() == ["2 x 0.500: 61\n1 x 1.000: 51"]


def test_trace():
    """Trackio's trace: prompt and solution as messages, each distinct rollout as a span."""
    trace = trace_of(AuditedChunk(TRAJECTORY, 0))
    assert [message["content"] for message in trace["messages"]] == ["How many?", "Leo has ▏51 stickers"]
    assert [(span["output"], span["metadata"]) for span in trace["spans"]] == [
        ("61", {"count": 2, "similarity": 0.5}),
        ("51", {"count": 1, "similarity": 1.0}),
    ]
    assert trace["metadata"]["posterior"] == 0.25
    assert trace["metadata"]["cost_usd"] == 0.5


@pytest.mark.parametrize(
    ("number", "chosen"), [(0, []), (1, [2]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_spread(number, chosen):
    """Evenly spaced, with the lowest and the highest posterior."""
    chunks = tuple(
        ShownChunk(i, i + 1, i, "", "", ("x",), (0.0,), 0.5, posterior) for i, posterior in enumerate([4, 2, 3, 0, 1])
    )
    trajectory = AuditedTrajectory(0, 0, 0, "teacher", "", (), chunks)
    picked = spread([AuditedChunk(trajectory, number) for number in range(5)], number)
    assert [audited.chunk.posterior for audited in picked] == chosen


def test_training_and_evaluation(tmp_path, tiny_model_dir, capsys, caplog, monkeypatch):
    """The table of a step equals what the journal holds of it. An evaluation has its own. One output may fail."""
    trainer = make_trainer(
        tmp_path,
        tiny_model_dir,
        eval_dataset=questions(3).remove_columns("answer"),
        eval_strategy="steps",
        eval_steps=2,
        audit_eval=True,
        log_completions=True,
        num_completions_to_print=2,
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        logging_steps=2,
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "completions").glob("*audits*")} == {
        "audits_00002.parquet",
        "eval_audits_00002.parquet",
    }
    # Only the last step that was logged: both micro-batches of it.
    table, evaluation = (
        pq.read_table(tmp_path / "completions" / f"{name}_00002.parquet").to_pylist()
        for name in ("audits", "eval_audits")
    )
    recorded = [*read_audits(tmp_path, list_audits(tmp_path, step=1))]
    expected = [table_row(chunk, trainer._audit_table.pieces) for chunk in chunks_of(recorded)]
    assert len(expected) > 4
    assert sorted(table, key=itemgetter("index")) == expected
    assert {row["step"] for row in evaluation} == {2}
    assert {row["prompt"] for row in evaluation} == {f"user: {row['prompt'][0]['content']}" for row in questions(3)}
    assert f"audits, step 2: 2 of {len(table)} chunks" in printed
    assert f"eval_audits, step 2: 2 of {len(evaluation)} chunks" in printed
    assert printed.count("the teacher wrote") == 4

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    trainer._audit_table._audited["train"] = recorded
    with caplog.at_level(logging.WARNING):
        trainer._audit_table.show("train", 2)
    assert "do not reach the Parquet file (OSError: the disk is full). The run continues." in caplog.text
    assert "2 of" in capsys.readouterr().out


def test_processes(monkeypatch, tmp_path):
    """The main process has the rows of all processes, and those of the newest step only."""
    ranks = Ranks()
    monkeypatch.setattr(audit_table, "gather_object", ranks.gather_object)
    args = SimpleNamespace(
        num_completions_to_print=1,
        output_dir=str(tmp_path),
        report_to=[],
        posterior_baseline="shuffled",
        num_branches=3,
    )
    (tmp_path / "completions").mkdir()

    def process(rank):
        ranks.local.rank = rank
        accelerator = SimpleNamespace(process_index=rank, is_main_process=rank == 0)
        table = audit_table.AuditTable(accelerator, args, None, "teacher", None)
        for step in range(2):
            for index in range(2):  # micro-batches
                chunk = ChunkAudit(Chunk(0, 1, 0), "", f"{step} {rank} {index}", ("x",), (0.5,), 0.5, 0.5)
                row = SimpleNamespace(index=index, trajectory=Trajectory("prompt", [1], [2]))
                shown = Shown(index, 0.5, 0.5, [0.1], [0.5])
                table.add([row], SimpleNamespace(audits=[Audit((chunk,))], shown=[shown]), "train", step)
        table.show("train", 2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    (path,) = (tmp_path / "completions").iterdir()
    assert [row["chunk"] for row in pq.read_table(path).to_pylist()] == [
        f"▏1 {rank} {index}" for index in range(2) for rank in range(2)
    ]


SCRIPT = """
import sys
from pathlib import Path
from tests.support.training import make_trainer, questions

out = Path(sys.argv[1])
trainer = make_trainer(
    out, sys.argv[2], eval_dataset=questions(2), report_to=["tensorboard", "trackio", "wandb"], project="audits",
    run_name="run", log_completions=True, num_completions_to_print=2, audit_eval=True, max_steps=1,
)
trainer.train()
trainer.evaluate()  # Trackio's run of the training has ended
trainer.end()

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

for folder in (out / "runs").iterdir():
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            print("TENSORBOARD", tag, event.step, event.tensor_proto.string_val[0].decode())
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRACKERS.exists(), reason="the trackers are not installed: `make test-slow` installs them")
def test_trackers(tmp_path, tiny_model_dir):
    """What is in the files of TensorBoard, Trackio and W&B (offline) is the table in Parquet."""
    environment = {
        "PYTHONPATH": f"{ROOT}:{TRACKERS}",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }
    process = succeeded(
        run_process(sys.executable, "-c", SCRIPT, tmp_path / "out", tiny_model_dir, cwd=tmp_path, env=environment)
    )
    tables = {
        key: pd.read_parquet(tmp_path / "out" / "completions" / f"{name}_00001.parquet")
        for key, name in (("audits", "audits"), ("eval/audits", "eval_audits"))
    }
    for key, table in tables.items():
        posteriors = table["posterior"].tolist()
        (path,) = tmp_path.glob(f"wandb/offline-run-*/files/media/table/{key}_*.table.json")
        wandb_table = json.loads(path.read_text())
        assert [row[wandb_table["columns"].index("posterior")] for row in wandb_table["data"]] == posteriors
        assert wandb_table["columns"] == table.columns.tolist()
        text = process.stdout.partition(f"TENSORBOARD {key}/text_summary 1 ")[2]
        assert text.startswith(f"    {key.replace('/', '_')}, step 1: 2 of {len(table)} chunks")
        assert f"posterior {max(posteriors):.3f}" in text
        logged = [row for row in trackio_rows(tmp_path / "trackio") if key in row]
        assert [row["posterior"] for row in logged[0][key]["_value"]] == posteriors
        traces = sorted((tmp_path / "trackio" / "traces").rglob(f"*{key.replace('/', '-')}-traces-*.jsonl"))
        assert len(traces) >= 2


def trackio_rows(folder: Path) -> list[dict]:
    """The metrics in Trackio's database."""
    with closing(sqlite3.connect(folder / "audits.db")) as db:
        return [json.loads(metrics) for (metrics,) in db.execute("SELECT metrics FROM metrics")]
