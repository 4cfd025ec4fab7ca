# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Whole runs with a teacher behind a service: real SDKs over loopback, with faults, budgets and keys."""

import json
import logging as std_logging
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections import Counter

import pytest
import torch

from omniopd_trl.errors import OmniOPDError, TeacherError
from omniopd_trl.journal.reader import spent
from omniopd_trl.teachers import Usage
from tests.support import ROOT, run_until_killed
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, services
from tests.support.training import FOUR_MICRO_BATCHES, make_trainer, questions, trainable

__all__ = ["services"]  # a fixture

SETTINGS = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 0.05,
    "dataset": questions(16),
    **FOUR_MICRO_BATCHES,
}


def script(monkeypatch) -> None:
    """Rollouts that depend on the prompt alone: they are the same however requests are split and repeated."""

    def text_of(prompt, index):
        words = ["First we add", "Tom has 7", "apples. So", "Answer: 12", "3 and 4"]
        seed = zlib.crc32(str(prompt).encode())
        return " ".join(words[(seed >> k) % len(words)] for k in (0, 4, 8))

    monkeypatch.setattr(wire, "text_of", text_of)


def faults(seed: int, error):
    """30% of requests fail, each kind of failure in turn; the probe is spared."""
    rng = random.Random(seed)
    kinds = [
        lambda body: Fault(429, error(429, "slow down")),
        lambda body: Fault(429, error(429, "slow down"), {"retry-after": "0.01"}),
        lambda body: Fault(500, error(500, "broken")),
        lambda body: Fault(529, error(529, "overloaded")),
        lambda body: Fault(how="hang"),
        lambda body: Fault(how="drop"),
        lambda body: Fault(how="cut"),
        lambda body: Fault(body=_one_sample(body)) if (body.get("n") or 1) > 1 else None,
    ]
    order: list[int] = []

    def fault(number, body):
        if number == 0 or rng.random() >= 0.3:
            return None
        order[:] = order or rng.sample(range(len(kinds)), len(kinds))
        return kinds[order.pop()](body)

    return fault


def _one_sample(body):
    return wire.openai("/v1/chat/completions" if "messages" in body else "/v1/completions", {**body, "n": 1})


def run(path, model, service, server, resume=False, **overrides):
    settings = {**SETTINGS, "teacher_timeout": 1.0, "teacher_max_attempts": 8, "teacher_continuation": "instruct"}
    settings.update(overrides)
    url = server.url + service.path
    trainer = make_trainer(path, model, teacher=service.name, teacher_base_url=url, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_faults_change_nothing(tmp_path, tiny_model_dir, services, monkeypatch, service):
    """The same weights as without faults, nothing counted twice, and a bounded number of requests."""
    script(monkeypatch)
    with Loopback(service.answer) as server:
        clean = run(tmp_path / "clean", tiny_model_dir, service, server)
        assert clean.teacher._client is None, "connections are left open"
        num_clean, bodies = len(server.requests), server.bodies
    with Loopback(service.answer, fault=faults(1, service.error)) as server:
        faulty = run(tmp_path / "faulty", tiny_model_dir, service, server)
        num_faulty = len(server.requests)
    torch.testing.assert_close(trainable(faulty.model), trainable(clean.model), rtol=0, atol=1e-6)
    logs = clean.state.log_history[0], faulty.state.log_history[0]
    assert logs[0]["audit/posterior"] == pytest.approx(logs[1]["audit/posterior"], rel=1e-5)
    assert logs[1]["audit/dropped_chunks"] == 0
    retries = sum(log.get("teacher/retries", 0) for log in faulty.state.log_history)
    assert retries > 5, "no fault was met"
    # A service that returned too few samples is asked for one at a time from then on.
    most_per_request = max(body.get("n") or 1 for body in bodies)
    assert num_clean < num_faulty <= 2.5 * num_clean * most_per_request
    # Prompts are the same, so samples are: what was answered is counted once. A sample that was asked for in a
    # request of its own, after a service returned too few, has its prompt counted once more.
    assert faulty.teacher_usage.completion_tokens == clean.teacher_usage.completion_tokens


def test_no_key_in_anything_that_is_written(tmp_path, tiny_model_dir, services, caplog, capfd):
    """Checkpoints, pickles, journal, model card, logs and output of runs that succeed, and of one that is refused."""
    caplog.set_level(std_logging.DEBUG)
    for service in SERVICES:
        with Loopback(service.answer) as server:
            trainer = run(tmp_path / service.name.replace(":", "-"), tiny_model_dir, service, server, max_steps=1)
            trainer.save_model()
            trainer.create_model_card()
            sent = str([request.headers for request in server.requests])
        assert any(key in sent for key in KEYS.values()), "no key was used: the test shows nothing"
    key = KEYS["OPENAI_API_KEY"]
    service = SERVICES[1]
    refused = service.error(401, f"Incorrect API key provided: {key}.", "invalid_api_key")
    with Loopback(service.answer, fault=lambda number, body: Fault(401, refused)) as server:
        with pytest.raises(OmniOPDError) as caught:
            run(tmp_path / "refused", tiny_model_dir, service, server)
    output = capfd.readouterr()
    texts = [str(caught.value), repr(caught.value), caplog.text, output.out, output.err]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 40
    for secret in KEYS.values():
        for piece in (secret, secret[-8:]):
            assert not any(piece in text for text in texts)
            for path in files:
                assert piece.encode() not in path.read_bytes(), path


def test_a_final_error_in_the_middle_saves_and_names_the_next_step(tmp_path, tiny_model_dir, services):
    """The quota runs out in the second step: a checkpoint of the first is there, and the message says what to do."""
    service = SERVICES[1]
    empty = service.error(429, "You exceeded your current quota", "insufficient_quota")

    def fault(number, body):
        return Fault(429, empty) if number > 60 else None

    with Loopback(service.answer, fault=fault) as server:
        with pytest.raises(TeacherError, match=r"Stopped at step \d: .*quota.*resume from it") as caught:
            run(tmp_path, tiny_model_dir, service, server, max_steps=20, dataset=questions(160))
        before = len(server.requests)
        time.sleep(0.5)
        assert len(server.requests) == before, "requests continue after the run has stopped"
    step = str(caught.value).split("step ")[1].split(":")[0]
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    assert int(step) >= 1


@pytest.mark.case("T1")
def test_a_refused_prompt_costs_its_chunks(tmp_path, tiny_model_dir, services):
    """The run reaches its end, and the log counts what was dropped."""
    refused = Fault(400, wire.openai_error(400, "Content Exists Risk"))

    def fault(number, body):
        return refused if "Tom has 3 apples" in str(body) else None

    with Loopback(wire.openai, fault=fault) as server:
        trainer = run(tmp_path, tiny_model_dir, SERVICES[1], server, max_failed_chunks=0.9)
    logs = [log for log in trainer.state.log_history if "teacher/failed_requests" in log]
    assert trainer.state.global_step == 2
    # A request per chunk: the service returns several samples.
    failed = [log["teacher/failed_requests"] for log in logs]
    assert [log["audit/dropped_chunks"] * log["teacher/requests"] for log in logs] == failed
    assert sorted(failed)[0] == 0 < sum(failed)


@pytest.mark.case("T1", "U13")
@pytest.mark.parametrize(
    "answer",
    [
        lambda body: Fault(400, wire.openai_error(400, "No reason for this")),
        lambda body: Fault(200, refusal(body, "I will not do that")),
    ],
    ids=["error", "refusal"],
)
def test_refusals_of_most_prompts_stop_the_run(tmp_path, tiny_model_dir, services, answer):
    """By `max_failed_chunks`, with the service's own words, in whole sentences."""
    with Loopback(wire.openai, fault=lambda number, body: answer(body) if number else None) as server:
        with pytest.raises(TeacherError, match=r"max_failed_chunks=0\.2") as caught:
            run(tmp_path, tiny_model_dir, SERVICES[1], server)
    assert re.search(r"(No reason for this|I will not do that)\)+\. A checkpoint is in", str(caught.value))


def refusal(body, text):
    """An answer whose samples are refused with a text."""
    whole = wire.openai("/v1/chat/completions", body)
    for choice in whole["choices"]:
        choice["message"].update(content=None, refusal=text)
    return whole


def test_a_server_that_never_answers_ends_the_run_in_time(tmp_path, tiny_model_dir, services):
    """After the probe the server falls silent: the run ends within its limits, not in a hang."""
    service = SERVICES[1]

    def fault(number, body):
        return Fault(how="hang") if number > 3 else None

    start = time.monotonic()
    with Loopback(service.answer, fault=fault) as server, pytest.raises(TeacherError, match="max_failed_chunks"):
        run(tmp_path, tiny_model_dir, service, server, teacher_timeout=0.3, teacher_max_seconds=2.0)
    assert time.monotonic() - start < 60


def test_a_bad_key_is_refused_before_anything_is_generated(tmp_path, tiny_model_dir, services):
    """By the probe, at construction: one request."""
    service = SERVICES[1]
    with Loopback(service.answer, fault=lambda n, body: Fault(401, service.error(401, "bad key"))) as server:
        with pytest.raises(TeacherError, match="OPENAI_API_KEY"):
            run(tmp_path, tiny_model_dir, service, server)
        assert len(server.requests) == 1


def test_the_budget_holds_over_runs(tmp_path, tiny_model_dir, services):
    """Stopped by the budget, the ledger within it; a resumed run counts what was spent; a larger budget continues."""
    service = SERVICES[1]
    settings = {"max_steps": 4, "dataset": questions(32), "teacher_budget_tokens": 3300}
    with Loopback(service.answer) as server:
        with pytest.raises(TeacherError, match=r"teacher_budget_tokens=3300"):
            run(tmp_path, tiny_model_dir, service, server, **settings)
        used, _ = spent(tmp_path)
        assert 0 < used.prompt_tokens + used.completion_tokens <= 3300
        with pytest.raises(TeacherError, match=r"teacher_budget_tokens=3300"):
            run(tmp_path, tiny_model_dir, service, server, **settings)
        again, _ = spent(tmp_path)
        assert again.prompt_tokens + again.completion_tokens <= 3300
        rich = run(tmp_path, tiny_model_dir, service, server, **{**settings, "teacher_budget_tokens": 10**6})
    assert rich.state.global_step == 4
    total, _ = spent(tmp_path)
    assert total.completion_tokens > again.completion_tokens


def test_a_killed_run_counts_what_it_had_in_flight(tmp_path, tiny_model_dir, services, caplog):
    """kill -9 while four requests wait for their answers: the next run in the folder counts the most they can cost."""
    service = SERVICES[1]
    with Loopback(service.answer, fault=lambda number, body: Fault(how="hang") if number >= 5 else None) as server:
        url = server.url + service.path
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "support" / "run_until_killed.py"),
                str(tmp_path),
                str(tiny_model_dir),
                url,
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + 120
            while len(server.requests) < 9 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        answered, waiting = server.bodies[:5], server.bodies[5:]
    assert len(waiting) == 4
    usage, usd = spent(tmp_path)
    lost = usage.prompt_tokens + usage.completion_tokens - sum(map(tokens, answered))
    assert lost >= sum(20 + body["n"] * body["max_tokens"] for body in waiting)
    assert usd == pytest.approx((usage.prompt_tokens + usage.completion_tokens) / 1e6)
    prices = {"teacher_input_price": 1.0, "teacher_output_price": 1.0}
    with Loopback(service.answer) as server:
        # A busy machine may take a second to make the client, and a timeout counts.
        run(tmp_path, tiny_model_dir, service, server, teacher_timeout=30.0, **prices)
        again = sum(map(tokens, server.bodies))
    assert f"{lost} tokens ({lost / 1e6:.4f} dollars)" in caplog.text
    after, _ = spent(tmp_path)
    assert after.prompt_tokens + after.completion_tokens == sum(map(tokens, answered)) + lost + again


def tokens(body):
    """What the loopback server says that a request used."""
    return 20 + 3 * body["n"]


def counted(bodies):
    """How often each request was made; those of one prompt differ in their seed where the service takes one."""
    return Counter(json.dumps(body, sort_keys=True) for body in bodies)


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_credit_that_ends_in_the_middle_of_a_step(tmp_path, tiny_model_dir, services, monkeypatch, service, share):
    """The resumed run asks for what was not answered, and for nothing else; its student learns what it would have."""
    script(monkeypatch)
    settings = {"max_steps": 1, "save_strategy": "no", "teacher_max_concurrency": 8, "teacher_timeout": 30.0}
    with Loopback(service.answer) as server:
        clean = run(tmp_path / "clean", tiny_model_dir, service, server, **settings)
        expected = server.bodies
    last = int(share * len(expected))

    def fault(number, body):
        if number < last:
            return None
        time.sleep(0.5)  # what was sent before is answered first
        return Fault(402, service.error(402, "no credit left"))

    with Loopback(service.answer, fault=fault) as server:
        with pytest.raises(TeacherError, match=r"Stopped at step 0: .*credit"):
            run(tmp_path / "cut", tiny_model_dir, service, server, **settings)
        answered = server.bodies[:last]
    with Loopback(service.answer, port=server.port) as server:
        again = run(tmp_path / "cut", tiny_model_dir, service, server, resume=True, **settings)
        asked = server.bodies
    probe = expected[0]
    assert counted([*answered, *asked]) == counted([probe, *expected])
    logs = clean.state.log_history[0], again.state.log_history[0]
    assert logs[0]["audit/posterior"] == pytest.approx(logs[1]["audit/posterior"], rel=1e-6)
    torch.testing.assert_close(trainable(again.model), trainable(clean.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_answers_survive_kills(tmp_path, tiny_model_dir, services, kills):
    """kill -9 in the middle of a step, at random moments: only what was in flight then is asked for again."""
    service = SERVICES[2]
    dice = random.Random(kills)
    # Twenty requests for most trajectories, two at once: without their answers, ten would be lost with each kill.
    settings = json.dumps({"teacher": service.name, "teacher_max_concurrency": 2, "num_rollouts": 10})
    bodies, in_flight, port = [], 0, 0
    for _ in range(kills):
        until = dice.randint(10, 100 // (kills + 1))
        with Loopback(service.answer, delay=0.02, port=port) as server:
            port = server.port
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "tests" / "support" / "run_until_killed.py"),
                    tmp_path,
                    tiny_model_dir,
                    server.url,
                    settings,
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            try:
                deadline = time.monotonic() + 120
                while len(server.requests) < until and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(dice.uniform(0, 0.02))
            finally:
                process.kill()
                process.wait()
            assert len(server.requests) >= until
            bodies += server.bodies[1:]
            in_flight += 2
    with Loopback(service.answer, port=port) as server:
        run_until_killed.main(tmp_path, tiny_model_dir, server.url, settings)
        bodies += server.bodies[1:]
    with Loopback(service.answer) as server:
        run_until_killed.main(tmp_path / "clean", tiny_model_dir, server.url, settings)
        expected = counted(server.bodies[1:])
    assert not expected - counted(bodies)
    assert sum((counted(bodies) - expected).values()) <= in_flight
    assert sum(expected.values()) > 60


def test_prices_reach_the_ledger(tmp_path, tiny_model_dir, services):
    """Prices of the recipe, request by request."""
    service = SERVICES[1]
    prices = {"teacher_input_price": 2.0, "teacher_output_price": 10.0, "teacher_cached_price": 0.5}
    with Loopback(service.answer) as server:
        trainer = run(tmp_path, tiny_model_dir, service, server, **prices)
    usage, usd = spent(tmp_path)
    probe = Usage(20, 12, 9)  # the three samples of a chunk
    assert usage == trainer.teacher_usage + probe
    assert trainer.teacher_usage != Usage()
    uncached = usage.prompt_tokens - usage.cached_tokens
    assert usd == pytest.approx((2.0 * uncached + 0.5 * usage.cached_tokens + 10.0 * usage.completion_tokens) / 1e6)


def test_the_ledger_counts_what_no_audit_needed(tmp_path, tiny_model_dir, services):
    """The probe, audits of evaluation, and the teacher's own evaluation are paid for too."""
    service = SERVICES[1]
    settings = {"eval_dataset": questions(3), "audit_eval": True, "eval_strategy": "steps", "eval_steps": 1}
    with Loopback(service.answer) as server:
        trainer = run(tmp_path, tiny_model_dir, service, server, max_steps=1, **settings)
        trainer.evaluate_teacher()
        answered = len(server.requests)
        samples = sum(body.get("n") or 1 for body in server.bodies)
    usage, _ = spent(tmp_path)
    assert usage == Usage(20 * answered, 12 * answered, 3 * samples)
    assert usage.prompt_tokens > trainer.state.log_history[0]["teacher/prompt_tokens"]
