# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""`omniopd solutions`: what is asked, kept, written and paid for, with a service over loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.baselines.sft import load_solutions
from omniopd_trl.cli.train import run
from omniopd_trl.journal.browse import read_settings
from omniopd_trl.journal.reader import spent
from tests.support.commands import ENVIRONMENT
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, services
from tests.support.solutions import PROMPTS, question_of, recipe, rows_of, solutions, solve

__all__ = ["recipe", "services"]  # fixtures


def test_collects_and_trains(recipe, capsys):
    """Complete solutions are written with their origin and cost, and SFT trains on them and names the same cost."""
    with Loopback(solve) as server:
        path = recipe(server)
        assert solutions(path, "-k", "2") == 0
    assert Counter(question_of(r.body) for r in server.requests).most_common(1)[0][1] == 2  # the probe's
    assert len(server.requests) == PROMPTS + 1
    assert len({json.dumps(r.body.get("seed")) for r in server.requests}) > 2
    # The problem itself, although this model is instructed where it continues a text.
    assert all([turn["role"] for turn in r.body["messages"]] == ["user"] for r in server.requests)
    rows = rows_of()
    assert len(rows) == 2 * (PROMPTS - 1)  # one was cut off
    row = next(row for row in rows if row["prompt"][0]["content"] == "What is 3 + 3?" and row["sample"] == 1)
    assert row["completion"] == [{"role": "assistant", "content": "Sum 1. Answer: 6"}]
    assert (row["verified"], row["teacher"], row["model"]) == (True, "openai:gpt-6-luna", "gpt-6-luna")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (20, 6)  # of both samples
    assert row["usd"] == pytest.approx((20 + 60) / 1e6)
    assert {row["verified"] for row in rows} == {True, False}
    usage, usd = spent("out/solutions")
    assert usage.prompt_tokens == 20 * (PROMPTS + 1)
    assert load_solutions("out/solutions")[1:] == (usage, usd)
    assert "2 cut off" in capsys.readouterr().out
    assert run(["--config", path, "--method", "sft", "--teacher_model_name_or_path", "none"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^teacher tokens +{usage.prompt_tokens} read, {usage.completion_tokens} written$", output, re.M)
    assert re.search(rf"^teacher cost +\${usd:.4f}$", output, re.M)
    assert len(server.requests) == PROMPTS + 1
    used, dollars = spent("out")  # what the report shows
    assert (used.prompt_tokens, used.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert dollars == pytest.approx(usd)


def test_what_only_the_teacher_sees(recipe, capsys):
    """Every request holds it, and no row. Another template would be another answer."""
    context = {"teacher_context_column": "answer", "teacher_context_template": "{prompt} (= {context})"}
    with Loopback(solve) as server:
        path = recipe(server, **context)
        assert solutions(path) == 0
        assert solutions(path) == 0
        assert len(server.requests) == PROMPTS + 2  # two probes
        path = recipe(server, **context | {"teacher_context_template": "(= {context}) {prompt}"})
        assert solutions(path) == 2
    assert "teacher_context was" in capsys.readouterr().err
    for request in server.requests[: PROMPTS + 1]:
        number = int(re.search(r"\d+", question_of(request.body))[0])
        assert f"{question_of(request.body)} (= {2 * number})" in json.dumps(request.body)
    assert all("(=" not in json.dumps(row["prompt"]) for row in rows_of())


def test_only_verified(recipe, capsys):
    """Only right solutions are kept, and the others are counted."""
    with Loopback(solve) as server:
        assert solutions(recipe(server), "--verified") == 0
    assert sorted(row["prompt"][0]["content"] for row in rows_of()) == [f"What is {i} + {i}?" for i in range(8)]
    assert "8 solutions kept | 1 cut off | 3 not right" in capsys.readouterr().out


def test_nothing_to_verify_with(recipe, capsys):
    """Right answers that cannot be read are said before anything is asked, and not all solutions dropped after it."""
    with Loopback(solve) as server:
        path = recipe(server)
        sums = Path("sums.jsonl")
        sums.write_text(re.sub(r'"answer": "\d+"', '"answer": "a number"', sums.read_text()))
        assert solutions(path, "--verified") == 1
    assert not server.requests
    assert "nor an `answer` column that math-verify can read" in capsys.readouterr().err


def test_dry_run(recipe, capsys):
    """Requests, tokens and dollars, and nothing is asked or written."""
    with Loopback(solve) as server:
        path = recipe(server, teacher_budget_usd=1.0)
        assert solutions(path, "-k", "3", "--teacher_temperature", "0", "--dry_run") == 2
        assert "-k 3 with teacher_temperature=0: all solutions" in capsys.readouterr().err
        assert solutions(path, "-k", "3", "--solution_length", "10", "--dry_run") == 0
    assert not server.requests
    assert not os.path.exists("out")
    output = capsys.readouterr().out
    prompts = int(re.search(r"prompt tokens +(\d+),", output)[1])
    assert f"completion tokens   {PROMPTS * 3 * 10}\n" in output
    assert f"dollars             {(prompts + 10 * PROMPTS * 30) / 1e6:,.4f}\n" in output
    assert re.search(rf"requests +{PROMPTS}\n", output)


def test_more_prompts_and_other_settings(recipe, capsys):
    """A later command asks for what is missing only, and does not mix settings."""
    with Loopback(solve) as server:
        path = recipe(server)
        assert solutions(path, "--num_prompts", "5") == 0
        assert solutions(path) == 0
        # The probe of each command is asked again.
        assert len(server.requests) == PROMPTS + 2
        asked = Counter(question_of(r.body) for r in server.requests)
        assert sorted(asked.values()) == [1] * (PROMPTS - 1) + [3]
        assert "12 of 12 prompts answered (5 of them by earlier runs)" in capsys.readouterr().out
        assert read_settings("out/solutions")["teacher_base_url"] == f"{server.url}/v1"
        assert solutions(path, "-k", "2") == 2
        assert len(server.requests) == PROMPTS + 2  # refused before the probe
        assert "(num_solutions was 1 and is 2), which would be paid for again" in capsys.readouterr().err
        assert len(rows_of()) == PROMPTS - 1


def test_budget(recipe, capsys):
    """The command stops before the budget is exceeded, keeps what it has, and continues with a larger one."""
    with Loopback(solve) as server:
        path = recipe(server)
        assert solutions(path, "--teacher_budget_tokens", "100") == 1
        worst = int(re.search(r"the next request may use (\d+)", capsys.readouterr().err)[1])  # the probe's
        assert not server.requests
        limit = str(worst + 150)
        assert solutions(path, "--teacher_budget_tokens", limit, "--teacher_max_concurrency", "1") == 1
        assert "The budget is used up" in capsys.readouterr().err
        assert 0 < len(rows_of()) < PROMPTS - 1
        assert solutions(path) == 0
        assert len(server.requests) == PROMPTS + 2
    usage, _ = spent("out/solutions")
    assert usage == Usage(20 * len(server.requests), 12 * len(server.requests), 3 * len(server.requests))


def test_failing_service(recipe, capsys):
    """A service that fails stops the command with the reason; the next one asks for what is missing."""

    def fail(number, body):
        return Fault(400, wire.openai_error(400, "too odd")) if number > 6 else None

    with Loopback(solve, fault=fail) as server:
        path = recipe(server, max_failed_chunks=0.2)
        assert solutions(path) == 1
        error = capsys.readouterr().err
    assert "too odd" in error
    assert len(rows_of()) >= 5


@pytest.mark.slow
def test_killed(recipe, tmp_path):
    """After `kill -9`, what was answered is neither lost nor paid for again."""
    with Loopback(solve, delay=0.15) as server:
        path = recipe(server)
        command = [sys.executable, "-m", "omniopd_trl.cli.main", "solutions", "--config", path]
        child = subprocess.Popen(command, cwd=tmp_path, env={**ENVIRONMENT, **KEYS}, start_new_session=True)
        try:
            deadline = time.monotonic() + 200
            while len(server.requests) < 8 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        before = Counter(question_of(r.body) for r in server.requests)
        usage, _ = spent("out/solutions")
        assert sum(before.values()) >= 8
        server.delay = 0.0
        assert solutions(path) == 0
    after = Counter(question_of(r.body) for r in server.requests)
    twice = [question for question in before if after[question] > before[question]]
    assert len(twice) <= 3 + 1  # in flight at the kill, and the probe
    assert len(rows_of()) == PROMPTS - 1
    total, _ = spent("out/solutions")
    assert total.completion_tokens >= usage.completion_tokens
    assert len(after) == PROMPTS
