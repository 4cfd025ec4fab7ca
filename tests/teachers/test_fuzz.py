# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged and odd answers in each wire format, through the real SDKs, the engine and a real journal."""

import asyncio
import collections
import random
import resource
import time

import pytest
import torch

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.auditor import Auditor
from omniopd_trl.audits.types import PolicyScores, Trajectory
from omniopd_trl.errors import BudgetError, OmniOPDError
from omniopd_trl.journal import resume
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.resume import audit_or_replay
from omniopd_trl.method.similarity import get_similarity
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.audits import audit_settings
from tests.support.journals import SETTINGS as JOURNAL
from tests.support.journals import journal
from tests.support.loopback import Loopback
from tests.support.loopback.teachers import SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)
from tests.support.odd_answers import odd_answer

VLLM, OPENAI, CLAUDE, GEMINI = SERVICES
FORMATS = {
    "completions": (VLLM, {"continuation": "raw"}),
    "chat": (OPENAI, {"continuation": "instruct"}),
    "messages": (CLAUDE, {}),
    "generateContent": (GEMINI, {}),
}
SETTINGS = audit_settings(num_chunks=4, chunk_length=20, num_rollouts=2)
TEXT = "First we add the apples of Tom to the pears of Ann, and then we divide the sum by two. "
# What a run may spend before its budget is raised: some hundred answers at their worst case.
ALLOWANCE = 200_000


class Fuzz:
    """A service that answers oddly, and the books of what has to be counted.

    Attributes:
        budget: the budget of the run that asks.
        kinds: number of answers of each kind.
        charged: number of answers that may be charged, so each has to be counted once.
        counted: number of payments in the ledger.
        reset: number of requests without an answer that count only on a new connection.
    """

    def __init__(self, name, seed):
        self.service, self.options = FORMATS[name]
        self.path = "/chat/completions" if name == "chat" else "/completions"
        self.source = random.Random(seed)
        self.kinds = collections.Counter()
        self.charged = self.counted = self.reset = 0
        self.budget = None

    def fault(self, number, body):
        assert self.budget.tokens_spent <= self.budget.max_tokens
        odd = odd_answer(self.source, self.service.answer(self.path, body), self.service.error)
        self.kinds[odd.kind] += 1
        # A connection that is reset at once may have been idle for too long, if it was used before.
        is_reset = odd.fault.how == "drop"
        self.reset += is_reset
        self.charged += odd.is_charged and not is_reset and odd.kind != "error in an answer"
        return odd.fault

    @property
    def answered(self):
        return self.kinds.total()


class CountingLedger(resume.AuditLedger):
    """The ledger of an audit, which counts its payments."""

    fuzz: Fuzz

    def paid(self, usage, usd):
        self.fuzz.counted += usage != Usage()  # an audit without any answer counts none
        super().paid(usage, usd)

    def _keep(self, *args):
        self.fuzz.counted += 1
        super()._keep(*args)


async def without_blocking(coroutine):
    """Run a coroutine, and check that it never blocks the event loop for a second of CPU time."""
    longest, last = 0.0, time.thread_time()

    async def beat():
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.thread_time() - last), time.thread_time()

    task = asyncio.create_task(beat())
    try:
        await coroutine
    finally:
        task.cancel()
    assert longest < 1.0


async def train(auditor, j, steps, is_enough):
    """Audit one trajectory per step. `steps` holds the number of finished steps."""
    try:
        while not is_enough():
            step = steps[0]
            tokens = auditor.alignment.tokenizer(f"{TEXT} {step} ", add_special_tokens=False)["input_ids"]
            entropy = torch.rand(len(tokens), generator=torch.Generator().manual_seed(step))
            scores = PolicyScores(-entropy, entropy, -entropy)
            if j.trajectories(step) is None:
                j.record_trajectories(step, [Trajectory("What is it?", [], tokens, seed=step)])
            await audit_or_replay(auditor, *j.trajectories(step), scores, j, step, 0)
            steps[0] += 1
    finally:
        await auditor.teacher.aclose()


def run_all(fuzz, tokenizer, folder, count):
    """Train until there were `count` answers. A run that ends is resumed, with a larger budget if it was used up.

    Returns:
        The number of finished audits, and the errors.
    """
    with Loopback(fuzz.service.answer) as server:
        # The first request imports the SDK, which blocks the event loop.
        ask(teacher_of(fuzz.service, server, **fuzz.options), Prefix("3 + 4", " ="))
    limit, steps, ends = ALLOWANCE, [0], []
    with Loopback(fuzz.service.answer, fuzz.fault) as server:
        while fuzz.answered < count:
            fuzz.budget = Budget(max_tokens=limit, price=Price(1.0, 2.0), spent=spent(folder))
            recorder = Recorder(lambda: steps[0])
            # One request at a time: those in flight beside an answer that ends the run would count, too.
            settings = EngineSettings(max_concurrency=1, timeout=30.0)
            teacher = teacher_of(fuzz.service, server, budget=fuzz.budget, settings=settings, **fuzz.options)
            auditor = Auditor(teacher, tokenizer, SETTINGS, get_similarity("edit"))
            with recorder.open(journal_path(folder, 0), fuzz.budget, replay=True, **JOURNAL):
                before = fuzz.answered
                coroutine = train(auditor, recorder.journal, steps, lambda: fuzz.answered >= count)
                try:
                    asyncio.run(without_blocking(coroutine))
                except OmniOPDError as error:
                    ends.append(error)
                    limit += ALLOWANCE * isinstance(error, BudgetError)
                    assert fuzz.answered > before or isinstance(error, BudgetError), error  # noqa: PT017
                # When an answer ends a run, the next request of its prefix and that of another one may just have been
                # admitted. They are cancelled, and their worst case counts.
                assert 0 <= fuzz.counted - fuzz.charged <= fuzz.reset + 2 * len(ends)
                assert total(recorder.journal.usage()) == fuzz.budget.tokens_spent <= fuzz.budget.max_tokens
    return steps[0], ends


def spent(folder):
    """Usage of all runs so far."""
    if not journal_path(folder, 0).exists():
        return Usage()
    with journal(folder) as j:
        return j.usage()


def total(usage):
    return usage.prompt_tokens + usage.completion_tokens


@pytest.mark.case("T9", "T10", "T11", "T14", "T15", "T18", "T19")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_odd_answers(name, count, tiny_tokenizer, tmp_path, monkeypatch):
    """The run ends well or in one line, within its budget, and every answer that may be charged is counted once."""
    fuzz = Fuzz(name, seed=0)
    CountingLedger.fuzz = fuzz
    monkeypatch.setattr(resume, "AuditLedger", CountingLedger)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    steps, ends = run_all(fuzz, tiny_tokenizer, tmp_path, count)
    assert steps > count / 40
    for end in map(str, ends):
        assert len(end.splitlines()) == 1
        assert len(end) < 2000
    assert time.process_time() - start < 10 + count / 20  # seconds; a tenth of it on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024  # KiB
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20 * 2**20
    assert total(spent(tmp_path)) == fuzz.budget.tokens_spent
