# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Journals with made-up records."""

from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.store import Journal
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage

SETTINGS = {"run": "run", "teacher": "openai:gpt", "fingerprint": "M=10", "rank": 0, "num_processes": 2}


def journal(folder, **overrides) -> Journal:
    settings = {**SETTINGS, **overrides}
    return Journal(journal_path(folder, settings["rank"]), **settings)


def trajectory(seed=0) -> Trajectory:
    return Trajectory([{"role": "user", "content": "2 + 2 = ?"}], [1, 2, seed], [3, 4, 5], seed=seed)


def audit(text="four", tokens=7) -> Audit:
    chunk = ChunkAudit(Chunk(1, 3, 2), "It is ", text, ("4", "four"), (0.1, 1.0), 0.5, 1 / 3)
    return Audit((chunk,), num_rollouts=2, usage=Usage(tokens, 1, 2, 0), failures=("one was refused",))
