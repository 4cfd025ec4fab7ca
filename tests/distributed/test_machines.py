# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Two machines, each with its own launch, whose folders are not shared."""

import json
import os
import subprocess
import sys

import pytest

from omniopd_trl.errors import DataError
from omniopd_trl.journal.reader import spent, spent_by_journal
from tests.support import ROOT
from tests.support.back_ends import SCRIPTS, finish, free_port
from tests.support.loopback import Loopback
from tests.support.loopback.teachers import SERVICES, services
from tests.support.training import make_trainer

__all__ = ["services"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.case("R20")]

SECONDS = 240


def launch(folder, model, url) -> list[dict]:
    """`accelerate launch --num_machines 2` for each machine; what each has found."""
    port, processes = free_port(), []
    for machine in range(2):
        disk = folder / str(machine)
        disk.mkdir()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        processes.append(
            subprocess.Popen(
                [*command, str(SCRIPTS / "machine.py"), str(disk), str(model), url],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    outputs = [finish(process, SECONDS)[1] for process in processes]
    results = [folder / str(machine) / "result.json" for machine in range(2)]
    assert all(path.exists() for path in results), "\n".join(output[-4000:] for output in outputs)
    return [json.loads(path.read_text()) for path in results]


def test_two_machines_without_a_shared_folder(tmp_path, tiny_model_dir, services, caplog):
    """Budget, ledger and replay hold; for checkpoints, one line asks for a shared folder or a copy, which works."""
    service = SERVICES[1]
    with Loopback(service.answer) as server:
        here, there = launch(tmp_path, tiny_model_dir, server.url + service.path)
        num_requests = len(server.requests)
    folders = [tmp_path / str(machine) / "out" for machine in range(2)]

    # With a copied checkpoint, a resumed run replays the second step on both, and nothing of it is asked again.
    assert here["first"][:2] == pytest.approx(there["first"][:2])
    assert here["again"] == [2, pytest.approx(here["first"][1]), 0]
    assert there["again"] == [2, pytest.approx(here["first"][1]), 0]
    assert [line for line in here["said"] if "from the journal" in line] == [
        "step 1: 16 of 16 audits from the journal"
    ]
    assert [list(map(str, sorted(folder.glob("_audits/*.sqlite")))) for folder in folders] == [
        [str(folder / "_audits" / f"rank-{rank}.sqlite")] for rank, folder in enumerate(folders)
    ]

    # Both machines count what both have spent, and share what is left.
    assert here["spent before"] == there["spent before"]
    probe = 20 + 3 * 3  # the rollouts of a chunk
    before = here["spent before"] - probe  # its own
    assert here["limit"] == there["limit"] == before + (10**6 - before) // 2
    ledger = [spent(folder)[0] for folder in folders]
    assert sum(usage.prompt_tokens + usage.completion_tokens for usage in ledger) == before + 2 * probe
    assert ledger[0].completion_tokens + ledger[1].completion_tokens == here["first"][2] + 2 * 2 * 9

    # The first machine alone has the checkpoints.
    (line,) = [line for line in here["said at start"] if "does not see" in line]
    assert line.startswith("Process 1 does not see the files of process 0 in output_dir=")
    assert not any("does not see" in line for line in there["said at start"])
    for machine in (here, there):
        assert machine["refused"].startswith("resume_from_checkpoint=True: process 0 finds checkpoint-2 in its ")
        assert (
            "process 1 finds step 0. Put `output_dir` on a file system that all machines share" in machine["refused"]
        )

    # Another number of processes, on the first machine: it says what it does not replay, and what it cannot count.
    with Loopback(service.answer, port=server.port) as server:
        settings = {"teacher": service.name, "teacher_base_url": server.url + service.path, "teacher_timeout": 30.0}
        alone = make_trainer(folders[0], tiny_model_dir, max_steps=1, **settings)
        assert "the journals of processes 1 are not there" in caplog.text
        alone.train(resume_from_checkpoint=str(folders[0] / "checkpoint-1"))
        alone = make_trainer(folders[0], tiny_model_dir, max_steps=3, **settings)
        alone.train(resume_from_checkpoint=True)
    assert "was written by 2 process(es) and this run has 1" in caplog.text
    assert alone.state.global_step == 3
    assert num_requests > 0
    for rank, paid in ((0, spent_by_journal(folders[0])), (1, spent_by_journal(folders[1]))):
        assert [(one.rank, one.num_processes) for one in paid.values()] == [(rank, 2)]
    with pytest.raises(DataError, match="neither a complete checkpoint nor a journal"):
        make_trainer(tmp_path / "elsewhere", tiny_model_dir).train(resume_from_checkpoint=True)
