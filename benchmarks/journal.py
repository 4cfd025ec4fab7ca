# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time to open a large journal and to replay its last steps.

    python -m benchmarks.journal [--audits 200000] [--per-step 16] [--replayed 5] [--folder FOLDER]

Writes a journal of audits of about 10 kB each, as the paper's settings give them (ten chunks, ten rollouts), and then
measures what a resumed run does: sum what was spent, open the file, and read the trajectories and audits of its last
steps. 200,000 audits take 2 GB and some minutes to write. The exit code is 1 when opening takes 3 s or more.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.store import Journal
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage

T = TypeVar("T")

LIMIT = 3.0  # seconds to open the journal
SETTINGS = {"run": "benchmark", "teacher": "scripted", "fingerprint": "benchmark", "rank": 0, "num_processes": 1}


def audit(random_numbers: random.Random) -> Audit:
    """An audit of ten chunks with ten rollouts each, whose record is about 10 kB."""
    text = random_numbers.randbytes(2500).hex()  # zlib halves it
    chunks = []
    for number in range(10):
        begin = number * 500
        rollouts = tuple(random_numbers.randbytes(75).hex() for _ in range(10))
        span = Chunk(number * 50, number * 50 + 50, number * 50)
        chunks.append(ChunkAudit(span, text[:begin], text[begin : begin + 500], rollouts, (0.5,) * 10, 0.4, 0.5))
    return Audit(tuple(chunks), num_rollouts=100, usage=Usage(4000, 0, 7000))


def write(folder: Path, audits: int, per_step: int) -> None:
    """Write a journal with this many audits, `per_step` of them in each step."""
    numbers = random.Random(0)
    some = [audit(numbers) for _ in range(200)]
    trajectories = [Trajectory("question", [1] * 200, [2] * 2000, seed=i) for i in range(per_step)]
    with Journal(journal_path(folder, 0), **SETTINGS) as journal:
        for step in range(audits // per_step):
            journal.record_trajectories(step, trajectories)
            for index in range(per_step):
                one = some[(step * per_step + index) % len(some)]
                journal.record_usage(step, index, one.usage, 0.01)
                journal.record(step, index, one)


def timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def replay(journal: Journal, steps: range, per_step: int) -> None:
    for step in steps:
        assert journal.trajectories(step) is not None
        assert all(journal.audit(step, index) for index in range(per_step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=200_000)
    parser.add_argument("--per-step", type=int, default=16)
    parser.add_argument("--replayed", type=int, default=5, help="steps to replay")
    parser.add_argument("--folder", type=Path, help="keep the journal here; an existing one is measured again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        path = journal_path(folder, 0)
        if not path.exists():
            _, seconds = timed(lambda: write(folder, options.audits, options.per_step))
            print(f"written in {seconds:.0f} s")
        print(f"{options.audits} audits, {path.stat().st_size / 1e6:.0f} MB")
        (usage, usd), seconds = timed(lambda: spent(folder))
        print(f"sum what was spent ({usage.completion_tokens} tokens, {usd:.0f} dollars): {seconds:.2f} s")
        journal, opened = timed(lambda: Journal(path, **SETTINGS))
        last = options.audits // options.per_step
        steps = range(last - options.replayed, last)
        with journal:
            _, seconds = timed(lambda: journal.begin(steps[0]))
            opened += seconds
            print(f"open: {opened:.2f} s (limit {LIMIT:g} s)")
            _, seconds = timed(lambda: replay(journal, steps, options.per_step))
        print(f"replay {options.replayed} steps: {seconds:.2f} s, {1000 * seconds / options.replayed:.0f} ms a step")
    return int(opened >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
