# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A driver that many times starts a training run, kills it at a random moment and resumes it.

    python tests/support/killed_runs.py FOLDER MODEL KILLS

Children are forked from a parent that has imported everything, so a run starts in a second. The parent itself never
trains and starts no thread. It prints the results as JSON.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

from omniopd_trl.journal.file import journal_path, journals_of
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers import Prefix, Rollout, Teacher, TeacherReply, Usage
from tests.support.training import make_trainer, questions, script

STEPS = 5


class Recording(Teacher):
    """A teacher that writes each request to a file before it answers, after a short delay."""

    name = "recording"
    is_remote = True

    def __init__(self, path: Path):
        self.log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def sample(self, prefixes, request):
        replies = []
        for prefix in prefixes:
            await asyncio.sleep(0.003)
            os.write(self.log, (json.dumps(key(prefix)) + "\n").encode())
            usage = Usage(3, 0, 4)
            request.ledger.paid(usage, 0.5)
            texts = [script(prefix, i) for i in range(request.num_samples)]
            replies.append(TeacherReply(tuple(map(Rollout, texts)), usage))
        return replies


def key(prefix: Prefix) -> list[str]:
    return [prefix.prompt[-1]["content"], prefix.completion]


def train(folder: Path, model: Path) -> None:
    """Train, and replay what an earlier run recorded."""
    out = folder / "out"
    trainer = make_trainer(
        out,
        model,
        teacher=Recording(folder / "requests.jsonl"),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        dataset=questions(8 * STEPS),
        learning_rate=0.02,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        chunk_length=6,
        num_chunks=3,
    )
    trainer.train(resume_from_checkpoint=bool(journals_of(out)))
    assert trainer.state.global_step == STEPS


def start(folder: Path, model: Path) -> int:
    """Fork a run and return the child's process id."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(folder / "output.txt", "a")
        train(folder, model)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def journaled(folder: Path) -> set[tuple[str, str]]:
    """The prefixes of the audits that a resumed run replays. The journal must open without an error."""
    path = journal_path(folder / "out", 0)
    if not path.exists():
        return set()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT fingerprint FROM sessions ORDER BY id DESC LIMIT 1").fetchone()
    if row is None:
        return set()
    keys = set()
    with Journal(path, run="look", teacher="look", fingerprint=row[0], rank=0, num_processes=1) as journal:
        for step in range(STEPS):
            for index, trajectory in enumerate(journal.trajectories(step) or []):
                audit = journal.audit(step, index)
                if audit is not None:
                    keys |= {(trajectory.prompt[-1]["content"], chunk.prefix) for chunk in audit.chunks}
    return keys


def requests(folder: Path) -> list[tuple[str, str]]:
    path = folder / "requests.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: Path, model: Path, kills: int) -> None:
    rng = random.Random(0)
    killed = 0
    for run in range(1000):
        here = folder / str(run)
        here.mkdir(parents=True)
        again: list[tuple[str, str]] = []
        kills_here = 0
        finished = False
        while not finished:
            known, asked = journaled(here), len(requests(here))
            child = start(here, model)
            if killed < kills:
                time.sleep(rng.uniform(0.0, 3.0))
                os.kill(child, signal.SIGKILL)  # has no effect on a finished process
            _, status = os.waitpid(child, 0)
            again += [request for request in requests(here)[asked:] if request in known]
            if os.WIFSIGNALED(status):
                killed += 1
                kills_here += 1
            elif os.WEXITSTATUS(status):
                sys.exit((here / "output.txt").read_text())
            else:
                finished = True
        replayable = journaled(here)
        path = journal_path(here / "out", 0)
        with Journal(path, run="x", teacher="x", fingerprint="x", rank=0, num_processes=1, replay=False) as journal:
            usage = journal.usage()
        print(  # noqa: T201 (its output is the result)
            json.dumps(
                {
                    "kills": kills_here,
                    "requests": len(requests(here)),
                    "distinct": len(set(requests(here))),
                    "journaled": len(replayable),
                    "asked_again": again,
                    "ledger_tokens": usage.prompt_tokens + usage.completion_tokens,
                }
            ),
            flush=True,
        )
        if killed >= kills:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
