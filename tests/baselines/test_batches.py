# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd solutions --batch`: what is submitted, found again, collected and paid for, with the real SDKs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import BatchPrice, Price, batch_price, price_of
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.baselines.collect import SolutionSettings, collect_solutions
from omniopd_trl.cli.main import main
from omniopd_trl.errors import BudgetError, ConfigError, TeacherError
from omniopd_trl.journal.reader import spent
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.journal.store import Journal
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote import batch as batch_module
from omniopd_trl.teachers.remote.batch import BatchLimits
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.commands import ENVIRONMENT
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.batches import LOST, AnthropicBatches, GeminiBatches, OpenAIBatches
from tests.support.loopback.teachers import KEYS, ControlC, services
from tests.support.solutions import PROMPTS, question_of, recipe, rows_of, solutions, solve

__all__ = ["recipe", "services"]  # fixtures

OPENAI, ANTHROPIC, GEMINI = "openai:gpt-6-luna", "anthropic:claude-haiku-4-5", "gemini:gemini-2.5-flash-lite"
SERVICES = {OPENAI: OpenAIBatches, ANTHROPIC: AnthropicBatches, GEMINI: GeminiBatches}
SUBMITS = re.compile(r"/v1/batches$|/messages/batches$|:batchGenerateContent$")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Batches are looked at after milliseconds."""
    monkeypatch.setattr(batch_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(batch_module, "GATHER_SECONDS", 0.02)


def serve(teacher, **options):
    """The batches of a teacher's service, and its server."""
    service = SERVICES[teacher](solve, **options)
    server = Loopback(service)
    service.url = server.url
    return service, server


def collect(server, teacher, folder, *, prompts=4, batch=True, limits=None, budget=None, k=1, **options):
    """One call of `collect_solutions`, with the lines that it reports."""
    lines = options.get("lines", [])
    remote = remote_teacher(
        teacher,
        base_url=server.url + ("/v1" if teacher == OPENAI else ""),
        settings=EngineSettings(timeout=5.0),
        budget=budget or Budget(price=Price(1.0, 10.0)),
    )
    remote.batch_limits = limits or remote.batch_limits
    options.setdefault("dataset", Dataset.from_list([{"prompt": f"What is {i} + {i}?"} for i in range(prompts)]))
    collect_solutions(
        remote,
        options["dataset"],
        folder,
        SolutionSettings(k, max_tokens=50, max_failed=options.get("max_failed", 0.2)),
        Recorder(lambda: -1),
        in_batches=batch,
        report=lambda line: lines.append(str(line)),
    )
    assert remote.answer_in_batch is None  # the teacher is given back
    assert not isinstance(remote.budget.price, BatchPrice)
    return lines


def asked(service):
    """How often each question was asked in a batch."""
    return Counter(question_of(request) for batch in service.batches for request in batch.requests.values())


def without_cost(rows):
    return [{name: value for name, value in row.items() if name != "usd"} for row in rows]


@pytest.mark.parametrize("teacher", SERVICES)
def test_same_as_single_requests(services, tmp_path, teacher):
    """Batches send the same requests as without, and give the same rows at half the price."""
    service, server = serve(teacher)
    with server:
        collect(server, teacher, tmp_path / "single", prompts=PROMPTS, k=2, batch=False)
        collect(server, teacher, tmp_path / "batch", prompts=PROMPTS, k=2)
    single, batched = rows_of(tmp_path / "single"), rows_of(tmp_path / "batch")
    assert len(single) == 2 * (PROMPTS - 1)
    assert without_cost(batched) == without_cost(single)
    assert [row["usd"] for row in batched] == pytest.approx([row["usd"] / 2 for row in single])
    assert spent(tmp_path / "batch")[0] == spent(tmp_path / "single")[0]
    (batch,) = service.batches
    check, *sent, other_check = service.singles
    assert check == other_check
    shown = [json.dumps(body, sort_keys=True).replace("thinkingBudget", "thinking_budget") for body in sent]
    assert sorted(shown) == sorted(json.dumps(body, sort_keys=True) for body in batch.requests.values())


def test_command(recipe, capsys):
    """The command prints the price of batches, what it submits and collects; keys are in no file and no line."""
    service, server = serve(OPENAI)
    with server:
        path = recipe(server)
        assert solutions(path, "--batch", "--verified") == 0
        assert main(["cost", "--config", path, "--method", "sft"]) == 0
    output = capsys.readouterr()
    (batch,) = service.batches
    assert f"Batch {batch.id}: {PROMPTS} requests are submitted." in output.out
    assert f"Batch {batch.id} has ended with {PROMPTS} of {PROMPTS} answers." in output.out
    assert "8 solutions kept | 1 cut off | 3 not right" in output.out
    assert {row["usd"] for row in rows_of()} == {(20 + 30) / 2e6}
    forecast = float(re.search(r"dollars +at most ([\d.]+), at the price of batches", output.out)[1])
    prompts = int(re.search(r"prompt tokens +(\d+),", output.out)[1])
    assert forecast == pytest.approx((prompts + 10 * PROMPTS * 45) / 2e6, abs=1e-4)
    usd = float(re.search(r"dollars, no prompt cache +([\d.]+)", output.out)[1])
    assert float(re.search(r"`omniopd solutions --batch`\) it costs ([\d.]+)", output.out)[1]) == pytest.approx(
        usd / 2, abs=1e-4
    )
    written = b"".join(file.read_bytes() for file in Path("out").rglob("*") if file.is_file())
    assert all(key.encode() not in written and key not in output.out + output.err for key in KEYS.values())


# What each service reports for a request that it could not answer now, for one that it refuses, and for one that it
# did not come to.
PASSING, REFUSED, EXPIRED = "passing", "refused", "expired"
RESULTS = {
    OPENAI: {
        PASSING: {"response": {"status_code": 500, "body": wire.openai_error(500, "a moment")}},
        REFUSED: {"response": {"status_code": 400, "body": wire.openai_error(400, "prompt is too long")}},
        EXPIRED: {"error": {"code": "batch_expired", "message": "the window is over"}},
    },
    ANTHROPIC: {
        PASSING: {"type": "errored", "error": wire.anthropic_error(500, "a moment", "api_error")},
        REFUSED: {"type": "errored", "error": wire.anthropic_error(400, "prompt is too long")},
        EXPIRED: {"type": "expired"},
    },
    GEMINI: {
        PASSING: {"error": {"code": 14, "message": "a moment"}},
        REFUSED: {"error": {"code": 3, "message": "The input token count exceeds the maximum number of tokens"}},
        EXPIRED: {"error": {"code": 4, "message": "Deadline expired"}},
    },
}


@pytest.mark.parametrize("teacher", SERVICES)
def test_failed_requests(services, tmp_path, teacher):
    """What may pass is asked again, three times at most; what a service refuses is not, and its words are given."""

    def result(batch, name, request):
        number = int(re.search(r"\d+", question_of(request))[0])
        first = batch.id.endswith(("_0", "/0"))
        if number == 0:
            return RESULTS[teacher][REFUSED]
        if number == 1:
            return RESULTS[teacher][PASSING]
        return RESULTS[teacher][EXPIRED if number == 2 else PASSING] if first and number in (2, 3) else None

    service, server = serve(teacher, result=result)
    with server:
        lines = collect(server, teacher, tmp_path, prompts=6, max_failed=0.5)
        assert asked(service) == {f"What is {n} + {n}?": times for n, times in enumerate((1, 3, 2, 2, 1, 1))}
        assert [row["row"] for row in rows_of(tmp_path)] == [2, 3, 4, 5]
        assert "ended with 2 of 6 answers. The others failed, for example: " in "".join(lines)
        # Errors that a service does not charge for cost nothing: the check, and the answers.
        usage, _ = spent(tmp_path)
        billed = 1 if teacher == GEMINI else 0  # a deadline may have been charged
        answer = usage.completion_tokens // (5 + billed)
        assert 0 < answer < 100
        with pytest.raises(TeacherError, match=r"(?s)2 of \d prompts stayed without an answer.*(too long|exceeds)"):
            collect(server, teacher, tmp_path / "strict", prompts=3, max_failed=0.5)


def test_lost_answers(services, tmp_path):
    """A request that the results do not mention, and an answer without usage, count with their worst case."""
    lost = []

    def result(batch, name, request):
        lost.append(name)
        return LOST if len(lost) == 1 else None

    service, server = serve(OPENAI, result=result)
    with server:
        collect(server, OPENAI, tmp_path, prompts=2)
    usage, usd = spent(tmp_path)
    assert sum(asked(service).values()) == 3
    worst = usage.prompt_tokens - 3 * 20
    assert worst > 50
    assert usd > 0.5 * worst / 1e6


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


def kill_at(monkeypatch, write):
    """Let a journal fail from a write on, before it is committed."""
    writes = 0
    transaction = Journal._transaction

    def counted(journal, synchronous="NORMAL"):
        nonlocal writes
        writes += 1
        if writes > write:
            raise KilledError
        return transaction(journal, synchronous)

    monkeypatch.setattr(Journal, "_transaction", counted)


def test_killed_at_every_write(services, tmp_path):
    """Wherever a command is killed, the next one loses no answer and submits no request again."""
    write, finished = 0, False
    while not finished:
        folder = tmp_path / str(write)
        service, server = serve(ANTHROPIC)
        with server, pytest.MonkeyPatch.context() as patch:
            kill_at(patch, write)
            try:
                collect(server, ANTHROPIC, folder, prompts=2)
                finished = True
            except KilledError:
                patch.undo()
                patch.setattr(batch_module, "POLL_SECONDS", 0.02)
                patch.setattr(batch_module, "GATHER_SECONDS", 0.02)
                collect(server, ANTHROPIC, folder, prompts=2)
        assert asked(service) == {"What is 0 + 0?": 1, "What is 1 + 1?": 1}, write
        assert [row["completion_tokens"] for row in rows_of(folder)] == [7, 7], write  # counted once
        usage, _ = spent(folder)
        assert 14 <= usage.completion_tokens <= 14 + 7 * len(service.singles), write
        write += 1
    assert write > 8


@pytest.mark.parametrize("teacher", SERVICES)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "lost"])
def test_unknown_submission(services, tmp_path, teacher, kept):
    """A batch is looked for when no answer came to its submission. It is submitted again only if it is not there."""
    service, server = serve(teacher)

    def fault(number, body):
        request = server.requests[number]
        if body and SUBMITS.search(request.path) and not dropped:
            dropped.append(number)
            if kept:
                service(request.path, body)
            return Fault(how="drop")
        return None

    dropped = []
    server.fault = fault
    with server:
        if teacher == ANTHROPIC:  # another batch of the account, of the same size
            service.keep(None, {f"other-{n}": {"messages": f"What is {n} + {n}?"} for n in range(4)})
        lines = collect(server, teacher, tmp_path)
    own = [batch for batch in service.batches if not any(name.startswith("other") for name in batch.requests)]
    assert len(own) == len(dropped) == 1
    assert len(rows_of(tmp_path)) == 4
    assert any("no batch can be submitted" in line for line in lines)


def test_open_batches(services, tmp_path):
    """Open batches are collected before anything else is asked, and are not left behind."""
    service, server = serve(OPENAI, looks=10**9)
    with server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "MAX_FAILURES", 0)
        server.fault = lambda number, body: (
            Fault(503, wire.openai_error(503, "a moment")) if "/batch_0" in server.requests[number].path else None
        )
        lines = []
        with pytest.raises(TeacherError, match=r"batch batch_0 cannot be looked at: .*503: a moment.*same command"):
            collect(server, OPENAI, tmp_path, lines=lines)
        assert "Not collected yet: batch_0. " in "".join(lines)
        server.fault, service.looks, before = None, 1, len(server.requests)
        with pytest.raises(ConfigError, match=r"has 1 open batches, .* add --batch"):
            collect(server, OPENAI, tmp_path, batch=False)
        with pytest.raises(ConfigError, match=r"submitted for 4 prompts, and now there are 3\. .* --num_prompts 4"):
            collect(server, OPENAI, tmp_path, prompts=3)
        with pytest.raises(ConfigError, match="num_solutions was 1 and is 2"):
            collect(server, OPENAI, tmp_path, k=2)
        assert len(server.requests) == before
        # The worst case of the batch does not fit into this budget, but it is paid for.
        budget = Budget(max_tokens=100, price=Price(1.0, 10.0))
        with pytest.raises(BudgetError):
            collect(server, OPENAI, tmp_path, prompts=5, budget=budget)
        assert len(rows_of(tmp_path)) == 4
        assert asked(service) == {f"What is {n} + {n}?": 1 for n in range(4)}
        # Afterwards both ways continue.
        assert "4 of them by earlier runs" in collect(server, OPENAI, tmp_path, prompts=5, batch=False)[-1]
        assert len(rows_of(tmp_path)) == 5


def test_interrupted(services, tmp_path):
    """Control-C while a batch is processed ends the command at once and says how to continue."""
    service, server = serve(GEMINI)
    service.ends, lines = False, []
    with server:
        interrupt = ControlC(SimpleNamespace(requests=service.batches))
        with pytest.raises(KeyboardInterrupt):
            collect(server, GEMINI, tmp_path, lines=lines)
        assert time.monotonic() - interrupt.at < 10
        assert "Not collected yet: batches/0. The service answers and charges for what it has got: start the same" in (
            "".join(lines)
        )
        service.ends = True
        collect(server, GEMINI, tmp_path)
    assert len(service.batches) == 1
    assert len(rows_of(tmp_path)) == 4


def test_limits_of_a_batch(services, tmp_path):
    """Many requests are split into several batches, by number and by size."""
    service, server = serve(ANTHROPIC)
    with server:
        collect(server, ANTHROPIC, tmp_path / "number", prompts=7, limits=BatchLimits(3, 10**6))
        assert [len(batch.requests) for batch in service.batches] == [3, 3, 1]
        collect(server, ANTHROPIC, tmp_path / "size", prompts=4, limits=BatchLimits(100, 1000))
    assert [len(batch.requests) for batch in service.batches[3:]] == [2, 2]


def test_budget(services, tmp_path):
    """What is spent and in process never exceeds the budget. What fits is submitted first."""
    most, actual, worst = 2500, 52, 578  # tokens of all requests, and of one
    committed = []

    def count(number, body):
        ended = sum(len(batch.requests) for batch in service.batches if batch.results is not None)
        in_process = sum(len(batch.requests) for batch in service.batches) - ended
        committed.append(actual * (1 + ended) + worst * in_process)

    service, server = serve(ANTHROPIC)
    server.fault = count
    dataset = Dataset.from_list([{"prompt": f"What is {n} + {n}?"} for n in range(12, 72)])
    with server, pytest.raises(BudgetError, match="teacher_budget_tokens=2500"):
        collect(server, ANTHROPIC, tmp_path, dataset=dataset, budget=Budget(max_tokens=most, price=Price(1.0, 10.0)))
    assert most - worst < max(committed) <= most
    usage, _ = spent(tmp_path)
    assert most - worst < usage.prompt_tokens + usage.completion_tokens <= most
    assert len(service.batches) > 2
    assert len(rows_of(tmp_path)) == usage.prompt_tokens // 45 - 1


def test_too_much_in_process(services, tmp_path):
    """What is more than the account may have in process is submitted in parts, and when other batches have ended."""
    service, server = serve(OPENAI, capacity=4)
    with server:
        lines = collect(server, OPENAI, tmp_path / "size", prompts=6)
        assert [len(batch.requests) for batch in service.batches] == [6, 3, 3, 3]
        assert "Enqueued token limit reached" in "".join(lines)
    service, server = serve(OPENAI, capacity=4)
    with server:
        collect(server, OPENAI, tmp_path / "number", prompts=10, limits=BatchLimits(2, 10**6))
    assert Counter(batch.state for batch in service.batches) == {"completed": 5, "failed": 3}  # of five at once
    assert len(rows_of(tmp_path / "number")) == 10


def test_failed_batch(services, tmp_path):
    """A batch that the service does not begin, for a reason that will not pass, is not submitted again."""

    def result(batch, name, request):
        batch.state = "failed"
        return {"code": "mismatched_model", "message": "all requests must have the same model", "line": 2}

    service, server = serve(OPENAI, result=result)
    with server, pytest.raises(TeacherError, match=r"4 of 4 prompts .* answer.*all requests must have the same model"):
        collect(server, OPENAI, tmp_path)
    assert len(service.batches) == 1


def test_refused_batch(services, tmp_path):
    """A service that refuses a batch stops the command with its words, and leaves nothing to collect."""
    service, server = serve(ANTHROPIC)
    error = Fault(400, wire.anthropic_error(400, "no batches for this model"))
    server.fault = lambda number, body: error if "requests" in body else None
    with server:
        with pytest.raises(TeacherError, match=r"no batch can be submitted: .*no batches for this model"):
            collect(server, ANTHROPIC, tmp_path)
        # One that is too large is submitted in parts.
        error = Fault(413, wire.anthropic_error(413, "request too large", "request_too_large"))
        server.fault = lambda number, body: error if len(body.get("requests", ())) > 2 else None
        collect(server, ANTHROPIC, tmp_path)
        assert [len(batch.requests) for batch in service.batches] == [2, 2]
        collect(server, ANTHROPIC, tmp_path, prompts=5, batch=False)
    assert len(rows_of(tmp_path)) == 5


def test_who_has_batches(recipe, capsys):
    """Teachers without batches are refused before anything is asked."""
    _, server = serve(OPENAI)
    with server:
        assert solutions(recipe(server, "vllm:teacher"), "--batch", "--dry_run") == 2
        assert "no batches for the teacher 'vllm:teacher', only for openai:, anth" in capsys.readouterr().err
        path = recipe(server, GEMINI, teacher_extra_body={"labels": {"a": "b"}})
        assert solutions(path, "--batch") == 2
        assert "cannot be asked in batches: its batches take no teacher_extra_body" in capsys.readouterr().err
        path = recipe(server, "openai:deepseek-v4", teacher_base_url="https://api.deepseek.com")
        assert solutions(path, "--batch") == 2
        assert "cannot be asked in batches: deepseek has none" in capsys.readouterr().err
    assert not server.requests


def test_price():
    """Half of the standard price for prompts and completions; cached tokens never below what any service charges."""
    price = batch_price("gemini", Price(1.0, 10.0, 0.1, 1.25))
    usage = Usage(1_000_000, 400_000, 100_000, 0, 200_000)
    assert price.cost(usage) == pytest.approx(0.5 * 0.4 + 0.1 * 0.4 + 0.625 * 0.2 + 5.0 * 0.1)
    assert price.worst_cost(1000, 100) == pytest.approx((1000 * 0.625 + 100 * 5.0) / 1e6)
    table = price_of("gemini", "gemini-2.5-pro")  # with a tier for long prompts
    assert batch_price("gemini", table).at(300_000).output == table.at(300_000).output / 2 > table.output / 2


@pytest.mark.slow
def test_kill_9(recipe, tmp_path):
    """After `kill -9` while a batch is processed, the same command collects it."""
    service, server = serve(ANTHROPIC)
    service.ends = False
    with server:
        path = recipe(server, ANTHROPIC)
        command = [sys.executable, "-m", "omniopd_trl.cli.main", "solutions", "--batch", "--config", path]
        child = subprocess.Popen(command, cwd=tmp_path, env={**ENVIRONMENT, **KEYS}, start_new_session=True)
        try:
            deadline = time.monotonic() + 200
            while not any("/batch_0" in request.path for request in server.requests) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        assert len(service.batches) == 1
        assert solutions(path) == 2  # without --batch
        service.ends = True
        assert solutions(path, "--batch") == 0
    assert len(service.batches) == 1
    assert set(asked(service).values()) == {1}
    assert len(service.singles) == 1
    assert len(rows_of()) == PROMPTS - 1
