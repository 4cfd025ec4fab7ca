# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Time and size of `omniopd audits` and `omniopd report` on large runs.

    python -m benchmarks.report [--audits 50000] [--listed 10000] [--folder FOLDER]

Writes journals with the paper's settings (ten chunks of fifty tokens, ten rollouts) and solutions of about 800 tokens
in the language of the demo. It then runs `omniopd audits` on the smaller one, each time in a new process, and
`omniopd report` on the larger one, and opens the page in headless Chromium. Selenium, Chromium and its driver must be
installed. Seconds of a command are CPU time, and a click is the median of twenty, because other jobs on the machine
affect these less. The exit code is 1 when a bound is missed.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.journal import SETTINGS, timed
from omniopd_trl.audits.types import Audit, ChunkAudit, Trajectory
from omniopd_trl.demo import asset_path
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.recorder import save_tokenizer
from omniopd_trl.journal.schema import Shown
from omniopd_trl.journal.store import Journal
from omniopd_trl.method.chunks import Chunk
from omniopd_trl.teachers import Usage
from scripts.chromium import chromium, open_page

PER_STEP, DISTINCT, VISITS = 50, 200, 10
LIMITS = {"audits": 1.0, "written": 60.0, "megabytes": 30.0, "paint": 2000.0, "click": 100.0}


def sentence(numbers: random.Random) -> str:
    name, thing = numbers.choice(["Leo", "Ida", "Sam", "Zoe"]), numbers.choice(["stamps", "beads", "coins", "shells"])
    a, b = numbers.randint(10, 99), numbers.randint(10, 99)
    return f"{name} wins {b}: {a} + {b} = {a + b}, so {name} has {a + b} {thing}.\n"


class Solutions:
    """Made-up audits. Their tokens and texts fit together."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(asset_path("student"))
        self.numbers = random.Random(0)

    def make(self, seed: int) -> tuple[list[int], Audit, Shown]:
        """The tokens of a completion, its audit, and what people want to see of it."""
        numbers = self.numbers
        ids = self.tokenizer("".join(sentence(numbers) for _ in range(40)))["input_ids"]
        pieces = [self.tokenizer.decode([token]) for token in ids]
        ends = list(accumulate(map(len, pieces), initial=0))
        text = "".join(pieces)
        chunks = []
        for start in sorted(numbers.sample(range(0, len(ids) - 50, 50), 10)):
            student = text[ends[start] : ends[start + 50]]
            rollouts = tuple((sentence(numbers) + student)[: len(student)] for _ in range(10))
            similarities = tuple(round(numbers.random(), 4) for _ in rollouts)
            posterior = (0.5 + sum(similarities)) / 11
            span = Chunk(start, start + 50, start)
            chunks.append(ChunkAudit(span, text[: ends[start]], student, rollouts, similarities, 0.5, posterior))
        posteriors = [chunk.posterior for chunk in chunks]
        entropies = [numbers.expovariate(3) for _ in ids]
        shown = Shown(seed, min(posteriors), max(posteriors), entropies, posteriors)
        return ids, Audit(tuple(chunks), num_rollouts=100, models=("made-up-1",)), shown


def write(folder: Path, audits: int) -> None:
    """Write a journal with this many audits. Each prompt is visited ten times."""
    solutions = Solutions()
    made = [solutions.make(seed) for seed in range(DISTINCT)]
    prompts = [f"{sentence(solutions.numbers)}How many are there now? ({k})" for k in range(audits // VISITS)]
    with Journal(journal_path(folder, 0), **SETTINGS, settings={"num_rollouts": 10, "teacher": "made-up"}) as journal:
        for step in range(audits // PER_STEP):
            indices = range(step * PER_STEP, (step + 1) * PER_STEP)
            some = [made[index % DISTINCT] for index in indices]
            trajectories = [
                Trajectory(prompts[index % len(prompts)], [1] * 60, ids, seed=index)
                for index, (ids, *_) in zip(indices, some, strict=True)
            ]
            journal.record_trajectories(step, trajectories)
            for index, (_, audit, _) in enumerate(some):
                journal.record_usage(step, index, Usage(4000, 0, 7000), 0.01)
                journal.record(step, index, audit)
            shown = [
                Shown(index, one.low, one.high, one.entropies, one.weights) for index, (*_, one) in enumerate(some)
            ]
            journal.record_shown(step, shown)
            journal.record_log({"step": step, "chunk_loss": 1 / (step + 1), "audit/posterior": 0.5})
    save_tokenizer(solutions.tokenizer, journal_path(folder, 0).parent)


def existing(folder: Path, audits: int) -> Path:
    """The folder of a run with this many audits, written when it is not there."""
    run = folder / str(audits)
    if not run.exists():
        _, seconds = timed(lambda: write(run, audits))
        print(f"{audits:,} audits, {journal_path(run, 0).stat().st_size / 1e6:.0f} MB, written in {seconds:.0f} s")
    return run


def command(*arguments: object) -> float:
    """Seconds of CPU time that a command of `omniopd` takes in a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "omniopd_trl.cli.main", *map(str, arguments)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


CLICK = """
const [selector, done] = arguments;
const links = [...document.querySelectorAll(selector)].filter((link) => !link.hasAttribute("aria-current"));
const link = links[Math.floor(Math.random() * links.length)];
const start = performance.now();
new MutationObserver((_, observer) => {
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
}).observe(document.getElementById("details"), { childList: true });
link.click();
"""


def browse(page: Path) -> Iterator[tuple[str, float]]:
    """Milliseconds until the first paint, until the page can be used, and of the clicks."""
    with chromium() as driver:
        open_page(driver, page.as_uri())
        paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
        yield "first paint", driver.execute_script(paint)
        yield "filters ready", driver.execute_script("return performance.now()")
        for kind, selector in (("click on a trajectory", "#list a"), ("click on a chunk", "article .chunk")):
            times = [driver.execute_async_script(CLICK, selector) for _ in range(20)]
            yield kind, statistics.median(times)
            yield f"{kind}, the longest", max(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=50_000, help="audits of the run that is reported")
    parser.add_argument("--listed", type=int, default=10_000, help="audits of the run for `omniopd audits`")
    parser.add_argument("--folder", type=Path, help="keep the journals here; existing ones are measured again")
    options = parser.parse_args()
    missed = []

    def check(what: str, value: float, unit: str, limit: str | None = None) -> None:
        bound = "" if limit is None else f" (limit {LIMITS[limit]:g} {unit})"
        print(f"{what}: {value:.2f} {unit}{bound}", flush=True)
        if limit is not None and value >= LIMITS[limit]:
            missed.append(what)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run = existing(folder, options.listed)
        for selection in (("--worst", 3), ("--best", 3), ("--random", 3), ("--step", 7), ("--prompt", "(77)")):
            check(f"omniopd audits {selection[0]} {selection[1]}", command("audits", run, *selection), "s", "audits")
        run = existing(folder, options.audits)
        check("omniopd report", command("report", run), "s", "written")
        page = run / "report.html"
        check("its file", page.stat().st_size / 1e6, "MB", "megabytes")
        for what, value in browse(page):
            limits = {"first paint": "paint", "click on a trajectory": "click", "click on a chunk": "click"}
            check(what, value, "ms", limits.get(what))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
