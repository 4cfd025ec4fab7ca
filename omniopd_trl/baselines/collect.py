# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Collect complete solutions from a teacher, each paid for once."""

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.event_loop import EventLoopThread, release
from omniopd_trl.audits.types import Trajectory
from omniopd_trl.baselines.sft import SOLUTIONS_FILE
from omniopd_trl.errors import ConfigError, DataError, TeacherError
from omniopd_trl.evals.rewards import Rewards
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.resume import AuditLedger
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers import Prefix, Rollout, SamplingRequest, Teacher, TeacherReply
from omniopd_trl.teachers.base import replies_of
from omniopd_trl.teachers.context import NO_CONTEXT, TeacherContext
from omniopd_trl.teachers.remote.batch import Batches, BatchTeacher, open_batches
from omniopd_trl.trainer.fingerprint import fingerprint, teacher_key
from omniopd_trl.trainer.validation import probe_teacher

# Prompts that a model in this process answers in one call. A service is asked for one prompt at a time.
LOCAL_BATCH = 64
# Key of a complete reply in the journal, beside the answers to single requests.
_REPLY = "reply"
# Key of the records of batches, which the journal keeps with the first prompt. An open one counts as paid.
_BATCH = "batch"
# Replies before which a share of failures means nothing yet.
_ENOUGH = 20
_SECONDS_BETWEEN_REPORTS = 5.0


@dataclass(frozen=True)
class SolutionSettings:
    """How to sample solutions.

    Attributes:
        num_solutions: solutions per prompt.
        max_tokens: maximum length of a solution, in the teacher's tokens. Longer ones are cut and not kept.
        temperature: sampling temperature of the teacher.
        top_p: nucleus sampling mass of the teacher.
        seed: seed of the run. Each prompt has its own, derived from it.
        max_failed: fraction of the prompts that may stay without an answer before the command stops.
    """

    num_solutions: int = 1
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_failed: float = 0.2


@dataclass
class Progress:
    """Counts of a collection so far.

    Attributes:
        num_prompts: prompts to ask with.
        num_asked: prompts that have a complete reply.
        num_replayed: those of them whose reply the journal held.
        num_kept: solutions that are kept.
        dropped: numbers of other solutions, by reason.
        usage: tokens paid in the folder, by all runs.
        usd: their cost in US dollars; 0 without a price.
    """

    num_prompts: int
    num_asked: int = 0
    num_replayed: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.num_asked:,} of {self.num_prompts:,} prompts answered"]
        if self.num_replayed:
            parts[0] += f" ({self.num_replayed:,} of them by earlier runs)"
        if self.num_kept or self.dropped:  # at the end
            parts.append(f"{self.num_kept:,} solutions kept")
        parts += [f"{count:,} {reason}" for reason, count in sorted(self.dropped.items())]
        parts.append(f"teacher read {self.usage.prompt_tokens:,}, wrote {self.usage.completion_tokens:,} tokens")
        if self.usd:
            parts.append(f"{self.usd:,.4f} dollars")
        return " | ".join(parts)


class _Block(NamedTuple):
    """Prompts that are asked for in one call. The journal holds them as a step."""

    step: int
    rows: range
    seed: int


def collect_solutions(
    teacher: Teacher,
    dataset: Dataset,
    folder: str | Path,
    settings: SolutionSettings,
    recorder: Recorder,
    *,
    identity: str | None = None,
    rewards: Rewards | None = None,
    only_verified: bool = False,
    context: TeacherContext = NO_CONTEXT,
    in_batches: bool = False,
    report: Callable[[Progress | str], None] = lambda progress: None,
) -> Progress:
    """Ask a teacher for complete solutions, and write those that are complete to `solutions.jsonl` in `folder`.

    The teacher is asked one short question first as a check, after the folder has been checked and unless batches of
    an earlier call are open.

    Each answer is recorded in a journal in `folder` as soon as it arrives, together with its cost. A run that was
    killed continues with the same call: no answer is lost, and none is paid for twice. The file is written when the
    collection ends, also by an error or an interruption, and holds one row per solution: `prompt`, `completion`,
    `row` (of `dataset`), `sample`, `teacher`, `model` (the service's name of it), `finish_reason`, `verified`
    (`null` without a reference answer), `seed`, and `prompt_tokens`, `completion_tokens` and `usd` of all solutions of
    the prompt together.

    Args:
        teacher: the teacher.
        dataset: dataset with a column `prompt`. Reward functions get the other columns.
        folder: folder of the solutions and of the journal.
        settings: how to sample.
        recorder: ledger of the teacher's budget. It may hold what was paid before, such as a probe.
        identity: identifies the dataset, so other prompts are not mixed up with recorded ones. More rows may be
            appended to it later.
        rewards: functions that verify solutions.
        only_verified: whether to keep only solutions that a reward function gives 1. Without it they are marked.
        context: what only the teacher sees. The rows hold the student's prompt.
        in_batches: whether to send the requests in batches, which a service answers within a day for half the price.
        report: called with the counts at most every few seconds and at the end, and with a line on each batch.

    Returns:
        The counts.

    Raises:
        ConfigError: when the folder holds solutions of other settings, or open batches without `in_batches`; when the
            teacher cannot be asked in batches.
        DataError: when solutions shall be verified and the dataset has no answers.
        TeacherError: when the teacher cannot answer, or too many prompts stay without an answer.
        BudgetError: when the budget is used up. What was answered is written.
    """
    if only_verified and (not rewards or rewards.reads_nothing):
        raise DataError(
            "Solutions cannot be verified: the dataset has neither a `solution` nor an `answer` column"
            f"{' that math-verify can read' * bool(rewards)}. Add one, set `reward_funcs`, or leave out --verified."
        )
    reason = "it is no service that takes them"
    if in_batches and (not isinstance(teacher, BatchTeacher) or (reason := teacher.why_no_batches())):
        raise ConfigError(f"{teacher.name} cannot be asked in batches: {reason}. Leave out --batch.")
    size = 1 if teacher.is_remote else LOCAL_BATCH
    key = {
        "method": "solutions",
        **teacher_key(teacher),
        "dataset": identity,
        "prompts_per_request": size,
        **{name: value for name, value in asdict(settings).items() if name != "max_failed"},
    }
    if context.identity:
        key["teacher_context"] = context.identity
    path = journal_path(folder, 0)
    run = {"run": Path(folder).name, "teacher": teacher.name, "fingerprint": fingerprint(key), "settings": key}
    with recorder.open(path, teacher.budget, replay=True, rank=0, num_processes=1, **run):
        assert recorder.journal is not None
        journal = recorder.journal
        collection = _Collection(teacher, dataset, settings, journal, size, context, report)
        other = journal.begin(0)
        if other is not None and other.differences:
            differences = ", ".join(f"{name} was {was} and is {now}" for name, (was, now) in other.differences.items())
            raise ConfigError(
                f"{str(folder)!r} holds solutions of other settings ({differences}), which would be paid for again. "
                "Restore the settings, or set `solutions` to another folder."
            )
        store = _BatchRecords(journal, len(dataset))
        if not store.are_open(str(folder), in_batches):  # the check may not fit into what their worst case leaves
            probe_teacher(teacher, [("train_dataset", dataset)], context)
        batches = Batches(teacher, store, report) if in_batches and isinstance(teacher, BatchTeacher) else None
        loop = EventLoopThread()
        try:
            loop.run(collection.run(batches))
        finally:
            release(teacher, loop)
            if batches is not None:
                batches.close()
                if names := batches.in_process:
                    report(
                        f"Not collected yet: {', '.join(names)}. The service answers and charges for what it has got: "
                        "start the same command again to collect it."
                    )
            _write(Path(folder) / SOLUTIONS_FILE, collection.rows(rewards, only_verified, loop))
            loop.close()
            report(collection.progress)
    return collection.progress


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(new, path)


class _BatchRecords:
    """The records of batches in a journal. A `BatchStore`."""

    def __init__(self, journal: Journal, num_prompts: int):
        self._journal = journal
        self._num_prompts = num_prompts

    def load(self) -> dict[int, dict[str, Any]]:
        return self._journal.answers(0, 0).get(_BATCH, {})

    def save(self, number: int, record: dict[str, Any]) -> None:
        record = {**record, "num_prompts": self._num_prompts}
        self._journal.record_answer(0, 0, _BATCH, number, record, Usage())

    def are_open(self, folder: str, in_batches: bool) -> bool:
        """Whether an earlier command has left batches to collect.

        Raises:
            ConfigError: without batches, or with fewer prompts than they were submitted for.
        """
        records = open_batches(self.load()).values()
        if not records:
            return False
        have = f"{folder!r} has {len(records)} open batches, which the service charges for"
        if not in_batches:
            raise ConfigError(f"{have}. Collect them first: add --batch.")
        asked = max(record["num_prompts"] for record in records)
        if self._num_prompts < asked:
            raise ConfigError(
                f"{have}. They were submitted for {asked:,} prompts, and now there are {self._num_prompts:,}. Collect "
                f"them first: --num_prompts {asked}."
            )
        return True


class _Collection:
    """One call of [`collect_solutions`]."""

    def __init__(
        self,
        teacher: Teacher,
        dataset: Dataset,
        settings: SolutionSettings,
        journal: Journal,
        size: int,
        context: TeacherContext,
        report: Callable[[Progress | str], None],
    ):
        self.progress = Progress(len(dataset))
        self._teacher = teacher
        self._dataset = dataset
        self._settings = settings
        self._journal = journal
        self._report = report
        self._reported = time.monotonic()
        self._partial: dict[int, TeacherReply] = {}  # by row: replies that miss samples of failed requests
        self._failed: list[str] = []
        self._size = size
        self._context = context

    def _blocks(self) -> Iterator[_Block]:
        for step, first in enumerate(range(0, len(self._dataset), self._size)):
            rows = range(first, min(first + self._size, len(self._dataset)))
            yield _Block(step, rows, random.Random(repr((self._settings.seed, "solutions", first))).getrandbits(31))

    async def run(self, batches: Batches | None = None) -> None:
        """Ask with all prompts, those of a service concurrently, and all at once in batches."""
        blocks = self._blocks()

        async def work() -> None:
            for block in blocks:  # workers share the iterator, so blocks begin in order
                await self._answer(block)

        settings = getattr(self._teacher, "settings", None)
        workers = settings.max_concurrency if settings is not None and self._teacher.is_remote else 1
        if batches is not None:
            workers = len(self._dataset)  # all requests wait together
        try:
            async with asyncio.TaskGroup() as group:
                driver = None if batches is None else group.create_task(batches.run())
                tasks = [group.create_task(work()) for _ in range(workers)]
                if driver is not None:
                    for task in tasks:
                        await asyncio.wait([task])
                    driver.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        if batches is not None:
            batches.finish()

    async def _answer(self, block: _Block) -> None:
        examples = [self._dataset[row] for row in block.rows]
        prompts = [example["prompt"] for example in examples]
        stored = self._journal.trajectories(block.step)
        if stored is None or [trajectory.prompt for trajectory in stored] != prompts:
            trajectories = [
                Trajectory(one["prompt"], [], [], seed=block.seed, teacher_context=self._context.of(one))
                for one in examples
            ]
            self._journal.record_trajectories(block.step, trajectories)
        if all(self._kept(block, row) for row in block.rows):
            self.progress.num_replayed += len(block.rows)
            self.progress.num_asked += len(block.rows)
        else:
            theirs = [self._context.prompt(example) for example in examples]
            for row, reply in zip(block.rows, await self._ask(block, theirs), strict=True):
                if not reply.outcomes.get("failed_requests"):
                    self._journal.record_answer(block.step, row - block.rows[0], _REPLY, 0, _to_json(reply), Usage())
                    self.progress.num_asked += 1
                elif reply.rollouts:
                    self._partial[row] = reply
                else:
                    self._failed.append(str(reply.failure))
        seen = self.progress.num_asked + len(self._partial) + len(self._failed)
        if seen >= min(_ENOUGH, len(self._dataset)) and len(self._failed) > self._settings.max_failed * seen:
            raise TeacherError(
                f"{len(self._failed)} of {seen} prompts stayed without an answer, more than max_failed_chunks="
                f"{self._settings.max_failed:g} of them. One of the causes: {self._failed[0]}. The same command asks "
                "for these again."
            )
        if time.monotonic() - self._reported > _SECONDS_BETWEEN_REPORTS:
            self._reported = time.monotonic()
            self._count_cost()
            self._report(self.progress)

    async def _ask(self, block: _Block, prompts: list[Any]) -> list[TeacherReply]:
        settings, ledger = self._settings, AuditLedger(self._journal, block.step, 0)
        request = SamplingRequest(
            settings.num_solutions, settings.max_tokens, settings.temperature, settings.top_p, block.seed, ledger
        )
        replies = await replies_of(self._teacher, [Prefix(prompt, is_question=True) for prompt in prompts], request)
        if ledger.usage == Usage():  # a teacher that does not account for its requests
            ledger.paid(sum((reply.usage for reply in replies), Usage()), None)
        return replies

    def _kept(self, block: _Block, row: int) -> TeacherReply | None:
        """The reply that the journal holds for a row; `None` when it has no complete one."""
        value = self._journal.answers(block.step, row - block.rows[0]).get(_REPLY, {}).get(0)
        return None if value is None else _from_json(value)

    def _count_cost(self) -> dict[int, tuple[Usage, float | None]]:
        """What each block has cost, over all runs. The total goes into the counts."""
        costs: dict[int, tuple[Usage, float | None]] = {}
        for row in self._journal.ledger():
            usage, usd = costs.get(row.step, (Usage(), None))
            costs[row.step] = usage + row.usage, usd if row.usd is None else (usd or 0.0) + row.usd
        self.progress.usage = sum((usage for usage, _ in costs.values()), Usage())
        self.progress.usd = sum(usd or 0.0 for _, usd in costs.values())
        return costs

    def rows(self, rewards: Rewards | None, only_verified: bool, loop: EventLoopThread) -> Iterator[dict[str, Any]]:
        """The rows of the solutions that are kept. The others are counted."""
        costs, progress = self._count_cost(), self.progress
        for block in self._blocks():
            for row in block.rows:
                reply = self._kept(block, row) or self._partial.get(row)
                if reply is None:
                    continue
                example = self._dataset[row]
                missing = self._settings.num_solutions - len(reply.rollouts)
                if missing:
                    progress.dropped["refused or empty"] += missing
                verdicts = _verify(rewards, example, reply.rollouts, loop)
                usage, usd = costs.get(block.step, (Usage(), None)) if self._size == 1 else (reply.usage, None)
                for sample, (rollout, verified) in enumerate(zip(reply.rollouts, verdicts, strict=True)):
                    reason = _reason_to_drop(rollout, verified, only_verified)
                    if reason is not None:
                        progress.dropped[reason] += 1
                        continue
                    progress.num_kept += 1
                    is_text = isinstance(example["prompt"], str)
                    yield {
                        "prompt": example["prompt"],
                        "completion": rollout.text if is_text else [{"role": "assistant", "content": rollout.text}],
                        "row": row,
                        "sample": sample,
                        "teacher": self._teacher.name,
                        "model": ", ".join(reply.models) or None,
                        "finish_reason": rollout.finish_reason,
                        "verified": verified,
                        "seed": block.seed,
                        "prompt_tokens": usage.prompt_tokens,
                        "completion_tokens": usage.completion_tokens,
                        "usd": usd,
                    }


def _reason_to_drop(rollout: Rollout, verified: bool | None, only_verified: bool) -> str | None:
    if rollout.finish_reason != "stop":
        return "cut off"
    if not rollout.text.strip():
        return "refused or empty"
    return "not right" if only_verified and not verified else None


def _verify(
    rewards: Rewards | None, example: dict[str, Any], rollouts: Sequence[Rollout], loop: EventLoopThread
) -> list[bool | None]:
    """Whether each solution is right: all functions give it 1. `None` where a function declines to score."""
    if not rewards or not rollouts:
        return [None] * len(rollouts)
    texts = [rollout.text for rollout in rollouts]
    columns = [values.tolist() for _, values in rewards.score([example] * len(texts), texts, run=loop.run)]
    return [
        None if any(score != score for score in scores) else all(score >= 1 for score in scores)
        for scores in zip(*columns, strict=True)
    ]


def _to_json(reply: TeacherReply) -> dict[str, Any]:
    rollouts = [[rollout.text, rollout.finish_reason] for rollout in reply.rollouts]
    values = {"failure": reply.failure, "outcomes": dict(reply.outcomes), "models": list(reply.models)}
    return {"rollouts": rollouts, "usage": list(astuple(reply.usage)), **values}


def _from_json(value: dict[str, Any]) -> TeacherReply:
    rollouts = tuple(itertools.starmap(Rollout, value["rollouts"]))
    return TeacherReply(rollouts, Usage(*value["usage"]), value["failure"], value["outcomes"], tuple(value["models"]))
