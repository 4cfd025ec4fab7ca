# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The engine: retries, limits, order, counts and the budget, with a service that follows a script."""

import asyncio
import random
import time
from collections import Counter

import pytest

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import BudgetError, DataError, TeacherError
from omniopd_trl.teachers.base import REQUEST_MILLISECONDS, Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.remote import retries
from omniopd_trl.teachers.remote.answers import Response
from omniopd_trl.teachers.remote.failures import (
    Failure,
    MalformedResponseError,
    ServiceError,
    failure_of,
    redact,
    retry_after,
)
from omniopd_trl.teachers.remote.settings import Capabilities, EngineSettings
from omniopd_trl.teachers.remote.throttle import Throttle
from tests.support.ledgers import MemoryLedger
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)
from tests.support.services import FINAL, RATE_LIMITED, TRANSIENT, Scripted, short_waits

__all__ = ["short_waits"]  # a fixture

REAL_SLEEP = asyncio.sleep


class Clock:
    """Sleeping is counted and takes no time: an outage lasts minutes."""

    def __init__(self, monkeypatch):
        self.now = 0.0

        async def sleep(seconds, yield_to_others=REAL_SLEEP):
            self.now += seconds
            await yield_to_others(0)

        monkeypatch.setattr(asyncio, "sleep", sleep)


def prefixes(count):
    return [Prefix("question", "word" * n) for n in range(count)]


class TestRetries:
    """One retry loop, bounded in attempts and in time."""

    def test_a_third_of_requests_fails(self):
        """The replies are those of a run without faults, nothing is counted twice, and requests are bounded."""
        rng = random.Random(0)
        kinds = [RATE_LIMITED, TRANSIENT, Failure("transient", "lost", may_be_billed=True), MalformedResponseError()]

        def fault(number, prefix):
            return rng.choice(kinds) if rng.random() < 0.3 else None

        faulty, plain = Scripted(fault=fault, max_attempts=20), Scripted()
        replies = ask(faulty, *prefixes(50), num_samples=10)
        expected = ask(plain, *prefixes(50), num_samples=10)
        assert [r.rollouts for r in replies] == [r.rollouts for r in expected]
        assert [r.usage for r in replies] == [r.usage for r in expected]
        assert faulty.budget.used == plain.budget.used
        counts = sum((Counter(r.outcomes) for r in replies), Counter())
        assert counts["requests"] == len(faulty.seen)
        assert counts["retries"] == len(faulty.seen) - 150
        assert 150 < len(faulty.seen) < 150 / 0.7 * 1.3

    def test_attempts(self):
        """No request is sent more often than it may be."""
        teacher = Scripted(fault=lambda *_: TRANSIENT, max_attempts=3)
        (reply,) = ask(teacher, Prefix("question"), num_samples=8)
        assert len(teacher.seen) == 2 * 3
        assert reply.outcomes["failed_requests"] == 2
        assert reply.failure == "0 of 8 rollouts: a request was given up (a moment)"

    def test_partial(self):
        """What came back is kept when another request of the same prefix is given up."""
        teacher = Scripted(fault=lambda number, _: TRANSIENT if number else None, max_attempts=2, most=1)
        (reply,) = ask(teacher, Prefix("question"), num_samples=8)
        assert len(reply.rollouts) == 4
        assert reply.usage == Usage(10, 4, 8)
        assert reply.failure.startswith("4 of 8 rollouts")

    def test_server_that_never_answers(self):
        """All attempts together end within `max_seconds`, the last one cut short."""
        teacher = Scripted(delay=60, timeout=0.3, max_attempts=100, max_seconds=1.0)
        start = time.monotonic()
        replies = ask(teacher, *prefixes(3))
        assert time.monotonic() - start < 3
        assert all("no answer within" in reply.failure for reply in replies)

    @pytest.mark.parametrize("outage", [100.0, 500.0])
    def test_time_is_the_limit(self, outage, monkeypatch, caplog):
        """By default an outage of minutes is sat out, whatever the number of attempts; time is the loop's own here."""
        monkeypatch.setattr(retries, "BACKOFF", 0.5)
        for seed in range(20):
            random.seed(seed)
            clock = Clock(monkeypatch)
            teacher = Scripted(fault=lambda *_, c=clock: TRANSIENT if c.now < outage else None)
            (reply,) = ask(teacher, Prefix("question"))
            assert len(reply.rollouts) == 1
            assert outage <= clock.now <= 600
            assert len(teacher.seen) < 60
        assert "requests fail and are repeated, each for up to teacher_max_seconds=600" in caplog.text

    def test_time_is_used_up_before_giving_up(self, monkeypatch):
        """A service that never comes back is waited for as long as the option says, neither shorter nor longer."""
        monkeypatch.setattr(retries, "BACKOFF", 0.5)
        for seed in range(20):
            random.seed(seed)
            clock = Clock(monkeypatch)
            teacher = Scripted(fault=lambda *_: TRANSIENT, max_seconds=300)
            (reply,) = ask(teacher, Prefix("question"))
            assert reply.outcomes["failed_requests"] == 1
            assert 290 <= clock.now <= 300
            assert len(teacher.seen) < 50

    def test_unreadable_answers(self, monkeypatch):
        """What may be charged for is not repeated for ten minutes; a custom limit wins."""
        broken = Failure("transient", "unreadable", may_be_billed=True)
        Clock(monkeypatch)
        teacher = Scripted(fault=lambda number, _: broken if number % 2 else TRANSIENT)
        ask(teacher, Prefix("question"))
        assert len(teacher.seen) == 2 * retries.MAX_PAID_ATTEMPTS
        teacher = Scripted(fault=lambda *_: broken, max_attempts=9)
        ask(teacher, Prefix("question"))
        assert len(teacher.seen) == 9

    def test_the_probe_is_less_patient(self, monkeypatch):
        """A wrong address is named before anybody waits for ten minutes; training keeps its patience."""
        Clock(monkeypatch)
        teacher = Scripted(fault=lambda *_: TRANSIENT)
        with pytest.raises(TeacherError, match="one short question 6 times and did not answer: a moment"):
            teacher.probe("question")
        assert len(teacher.seen) == retries.PROBE_ATTEMPTS
        assert teacher.settings == EngineSettings(max_concurrency=8)

    def test_waiting_for_its_turn_is_no_failure(self):
        """A request that fails once late in a long queue is still tried again."""
        failed = set()

        def fault(number, prefix):
            if prefix.completion in failed:
                return None
            failed.add(prefix.completion)
            return TRANSIENT

        teacher = Scripted(fault=fault, delay=0.02, most=1, max_seconds=0.3)
        replies = ask(teacher, *prefixes(20))
        assert all(reply.rollouts for reply in replies)

    def test_repeated_requests_go_first(self):
        """A request that failed does not wait behind those that were never sent."""
        teacher = Scripted(fault=lambda number, _: TRANSIENT if number == 0 else None, delay=0.02, most=1)
        ask(teacher, *prefixes(10))
        assert [completion for completion, _, _ in teacher.seen].index("", 1) <= 3

    def test_first_final_error_ends_the_rest(self):
        """Nothing more is spent once it is known that asking is in vain, and the error is raised as it is."""
        teacher = Scripted(fault=lambda number, _: FINAL if number == 5 else None, delay=0.01, most=2)
        with pytest.raises(TeacherError, match="scripted:model: the key was refused") as caught:
            ask(teacher, *prefixes(100))
        assert len(teacher.seen) < 12
        assert teacher.active == 0
        assert caught.value.__cause__ is None

    def test_mistakes_of_ours_are_raised_as_they_are(self):
        """A bug is not a failure of the service."""
        with pytest.raises(ZeroDivisionError):
            ask(Scripted(fault=lambda *_: ZeroDivisionError()), Prefix("question"))

    def test_mistakes_of_ours_are_paid_for(self):
        """A mistake over an answer, which the service charges for, is no reason to count the answer as free."""
        ledger = MemoryLedger()
        teacher = Scripted(fault=lambda *_: ZeroDivisionError(), price=Price(input=1.0, output=1.0))
        with pytest.raises(ZeroDivisionError):
            ask(teacher, Prefix("question"), max_tokens=50, ledger=ledger)
        worst = teacher.max_prompt_tokens(Prefix("question")) + 50
        assert teacher.budget.tokens_spent == worst
        assert ledger.payments == [(Usage(worst), pytest.approx(worst / 1e6))]

    def test_requests_that_never_went_out_are_free(self):
        """A prompt that cannot be rendered has cost nothing."""
        teacher = Scripted(fault=lambda *_: DataError("no chat template"))
        with pytest.raises(DataError):
            ask(teacher, Prefix("question"))
        assert teacher.budget.tokens_spent == 0

    def test_rejected(self):
        """A request that concerns itself alone is neither repeated nor the end."""
        teacher = Scripted(fault=lambda _, prefix: Failure("rejected", "too long") if prefix.completion else None)
        replies = ask(teacher, *prefixes(3))
        assert len(teacher.seen) == 3
        assert [len(reply.rollouts) for reply in replies] == [1, 0, 0]


class TestRates:
    """Concurrency, and how it backs off."""

    def test_concurrency(self):
        """Never more than allowed, and as many as allowed."""
        teacher = Scripted(delay=0.01, most=5)
        ask(teacher, *prefixes(40))
        assert teacher.most == 5

    def test_backs_off_and_recovers(self):
        """Refusals of one round halve the concurrency once; successes bring it back."""
        teacher = Scripted(fault=lambda number, _: RATE_LIMITED if number < 8 else None, delay=0.005, most=8)
        ask(teacher, *prefixes(9))
        assert teacher._throttle.concurrency == 6  # 8 -> 4, and full rounds of 4 and 5 successes
        ask(teacher, *prefixes(60))
        assert teacher._throttle.concurrency == 8

    def test_backed_off(self):
        """While it is slowed down, fewer run at once, idle places included."""
        throttle = Throttle(8)
        active = most = 0

        async def one():
            nonlocal active, most
            async with throttle.slot(1):
                active += 1
                most = max(most, active)
                await asyncio.sleep(0.005)
                active -= 1

        async def run():
            async with throttle.slot(1) as began:
                throttle.slow_down(0.0, began)
            await asyncio.gather(*(one() for _ in range(20)))

        asyncio.run(run())
        assert most == 4

    def test_cancelled_waiters_lose_no_place(self):
        """Requests that are cancelled while they wait, or just as they are let in, leave the throttle whole."""

        async def run():
            throttle = Throttle(2)

            async def hold(seconds):
                async with throttle.slot(1):
                    await asyncio.sleep(seconds)

            for seed in range(30):
                rng = random.Random(seed)
                tasks = [asyncio.create_task(hold(rng.choice([0, 0.001]))) for _ in range(8)]
                for task in rng.sample(tasks, 4):
                    for _ in range(rng.randrange(3)):
                        await asyncio.sleep(0)
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert throttle._active == 0
            await asyncio.wait_for(asyncio.gather(hold(0), hold(0), hold(0)), 1)

        asyncio.run(run())

    def test_retry_after_pauses_everyone(self):
        """Nobody is sent before the wait is over that the service asked for."""
        times = []

        def fault(number, _):
            times.append(time.monotonic())
            return Failure("rate_limited", "too often", 0.3) if number == 0 else None

        ask(Scripted(fault=fault, most=1), *prefixes(4))
        assert times[1] - times[0] >= 0.3

    def test_too_long_a_wait_is_final(self):
        """A service that wants to be left alone for an hour stops the run at once."""
        teacher = Scripted(fault=lambda *_: Failure("rate_limited", "too often", 3600.0))
        with pytest.raises(TeacherError, match="3600 s, more than teacher_max_retry_after=120"):
            ask(teacher, Prefix("question"))
        assert len(teacher.seen) == 1

    def test_requests_per_minute(self, monkeypatch):
        """A minute's worth goes out at once, and then one per interval."""
        monkeypatch.setattr("omniopd_trl.teachers.remote.throttle.MINUTE", 0.6)
        teacher = Scripted(most=64, requests_per_minute=6)
        start = time.monotonic()
        ask(teacher, *prefixes(9))
        assert time.monotonic() - start >= 0.25

    def test_tokens_per_minute(self, monkeypatch):
        """A request larger than a minute's worth is sent all the same, after as many minutes as it has tokens for."""
        monkeypatch.setattr("omniopd_trl.teachers.remote.throttle.MINUTE", 0.1)
        teacher = Scripted(tokens_per_minute=100)
        start = time.monotonic()
        ask(teacher, *prefixes(3), max_tokens=300)
        expected = sum(teacher.max_prompt_tokens(prefix) // 4 + 300 for prefix in prefixes(3)) / 100 * 0.1
        assert expected - 0.15 <= time.monotonic() - start < 3

    def test_less_than_one_per_minute(self, monkeypatch):
        """One request in several minutes is no more than that."""
        monkeypatch.setattr("omniopd_trl.teachers.remote.throttle.MINUTE", 0.1)
        teacher = Scripted(requests_per_minute=0.25)
        start = time.monotonic()
        ask(teacher, *prefixes(3))
        assert 0.75 <= time.monotonic() - start < 3

    def test_probe_leaves_nothing_behind(self, recwarn):
        """The probe has a loop of its own, and limiters that belong to it are not used in another."""
        capabilities = Capabilities("raw", samples_per_request=2)
        teacher = Scripted(most=1, capabilities=capabilities, requests_per_minute=1000, tokens_per_minute=1e6)
        teacher.probe("question")
        ask(teacher, *prefixes(5))
        assert teacher.most == 1
        assert not [str(warning.message) for warning in recwarn if "loop" in str(warning.message)]


class TestSamples:
    """N samples over requests."""

    @pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (64, [10])])
    def test_split(self, most, sizes):
        """As many per request as the service gives, from seeds that differ."""
        teacher = Scripted(capabilities=Capabilities("raw", samples_per_request=most))
        (reply,) = ask(teacher, Prefix("question"), num_samples=10, seed=7)
        assert [size for _, size, _ in teacher.seen] == sizes
        assert len({request.seed for _, _, request in teacher.seen}) == len(sizes)
        assert len(reply.rollouts) == 10

    def test_seeds_are_a_function_of_the_request(self):
        """The same call samples from the same seeds, another prefix from others, and faults change nothing."""

        def seeds(**kwargs):
            teacher = Scripted(**kwargs)
            ask(teacher, *prefixes(4), num_samples=8, seed=7)
            return {request.seed for _, _, request in teacher.seen}

        assert len(seeds()) == 8
        assert seeds() == seeds(fault=lambda number, _: TRANSIENT if number % 2 else None)

    @pytest.mark.parametrize(("gives", "requests"), [(1, 10), (3, 4), (9, 2)])
    def test_wrong_n(self, gives, requests):
        """A server that returns fewer samples is asked for the rest, and from then on for what it gives."""

        class Fewer(Scripted):
            async def request(self, prefix, num_samples, request):
                response = await super().request(prefix, num_samples, request)
                return Response(response.samples[:gives], response.usage)

        teacher = Fewer(capabilities=Capabilities("raw", samples_per_request=10))
        (reply,) = ask(teacher, Prefix("question"), num_samples=10)
        assert len(reply.rollouts) == 10
        assert len(teacher.seen) == requests
        assert teacher.capabilities.samples_per_request == gives

    def test_too_many(self):
        """A server that returns more samples than it was asked for adds none."""

        class More(Scripted):
            async def request(self, prefix, num_samples, request):
                return await super().request(prefix, num_samples + 2, request)

        (reply,) = ask(More(), Prefix("question"), num_samples=4)
        assert len(reply.rollouts) == 4

    def test_none(self):
        """A response without samples is an outcome."""

        class Nothing(Scripted):
            async def request(self, prefix, num_samples, request):
                return Response((), Usage(10))

        (reply,) = ask(Nothing(), Prefix("question"), num_samples=4)
        assert reply.failure == "0 of 4 rollouts: a response without samples"
        assert reply.usage == Usage(10)

    def test_order(self):
        """Replies come in the order of the prefixes, samples in the order of their requests."""
        teacher = Scripted(delay=lambda prefix: 0.02 / (1 + len(prefix.completion)), most=64)
        replies = ask(teacher, *prefixes(10), num_samples=4)
        assert [r.rollouts[2].text for r in replies] == ["word" * n + "-2" for n in range(10)]

    def test_prefixes_go_out_in_ascending_order(self):
        """A prompt cache serves a prefix from the one before it."""
        teacher = Scripted(most=1)
        ask(teacher, *prefixes(10))
        assert [completion for completion, _, _ in teacher.seen] == ["word" * n for n in range(10)]

    def test_one_request_warms_the_cache(self):
        """Where each sample is a request of its own, the others of a long prefix wait for the first."""
        one = Capabilities("raw", samples_per_request=1, min_cached_prefix=1000)
        teacher = Scripted(capabilities=one, delay=0.01, most=64)
        active = []
        teacher.fault = lambda number, prefix: active.append((len(prefix.completion), teacher.active))
        ask(teacher, Prefix("question", "x" * 8000), num_samples=5)
        assert [count for _, count in active] == [1, 4, 3, 2, 1]
        active.clear()
        ask(teacher, Prefix("question", "x" * 80), num_samples=5)
        assert active[0][1] == 5

    def test_reasoning_headroom(self):
        """Room for hidden reasoning is added to the limit, and to the worst case that the budget holds."""
        teacher = Scripted(capabilities=Capabilities("raw", reasoning_headroom=1000), max_tokens=1500)
        with pytest.raises(BudgetError):
            ask(teacher, Prefix("question"), max_tokens=70)
        teacher = Scripted(capabilities=Capabilities("raw", reasoning_headroom=1000))
        ask(teacher, Prefix("question"), max_tokens=70)
        assert teacher.seen[0][2].max_tokens == 1070


class TestBudget:
    """A request is sent only when its worst case still fits."""

    @pytest.mark.parametrize("seed", range(3))
    def test_tokens(self, seed):
        """Whatever fails and however much runs at once, the limit holds."""
        rng = random.Random(seed)
        kinds = [TRANSIENT, Failure("transient", "lost", may_be_billed=True)]
        teacher = Scripted(fault=lambda *_: rng.choice(kinds) if rng.random() < 0.3 else None, max_tokens=20_000)
        with pytest.raises(BudgetError, match="teacher_budget_tokens=20000"):
            ask(teacher, *prefixes(500), num_samples=4)
        assert 0 < teacher.budget.tokens_spent <= 20_000

    def test_dollars(self):
        """The same in dollars."""
        teacher = Scripted()
        teacher.budget = Budget(max_usd=0.01, price=Price(input=1.0, output=5.0))
        with pytest.raises(BudgetError, match=r"teacher_budget_usd=0\.01"):
            ask(teacher, *prefixes(500), num_samples=4)
        assert 0.005 < teacher.budget.usd_spent <= 0.01

    @pytest.mark.parametrize("prompt", ["3 + 4", "数" * 50, [{"role": "user", "content": "a\n" * 9}] * 30])
    @pytest.mark.parametrize("completion", ["", "so the angle", "= 4\n\n    ", "数" * 99])
    def test_bound_on_an_instructed_prompt(self, prompt, completion):
        """The worst case of a prompt is no smaller than what is sent."""
        teacher = Scripted(capabilities=Capabilities("instruct"))
        rendered = render_messages(prompt, completion)
        size = sum(len(message["content"].encode()) for message in rendered)
        assert size + 256 < teacher.max_prompt_tokens(Prefix(prompt, completion)) < 3 * size + 2048

    def test_cancelled_requests_count(self):
        """What was in flight when the run stopped may be charged for."""
        teacher = Scripted(fault=lambda number, _: FINAL if number == 0 else None, delay=lambda p: len(p.completion))
        with pytest.raises(TeacherError):
            ask(teacher, *prefixes(4), max_tokens=50)
        assert teacher.budget.forfeited_tokens >= 3 * 50


@pytest.mark.usefixtures("services")
class TestOverTheWire:
    """The same through the real SDKs."""

    @pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)
    def test_a_third_of_requests_fails(self, service):
        """All faults at once, over every SDK: the same rollouts, usage counted once, requests bounded."""

        def fault(number, body):
            rng = random.Random(number)
            if rng.random() >= 0.3:
                return None
            return rng.choice(
                [
                    Fault(429, service.error(429, "x"), {"retry-after": "0.05"}),
                    Fault(429, service.error(429, "x")),
                    Fault(500, service.error(500, "x")),
                    Fault(529, service.error(529, "x")),
                    Fault(how="drop"),
                    Fault(how="cut"),
                    Fault(how="hang"),
                ]
            )

        settings = EngineSettings(max_concurrency=8, timeout=0.5, max_attempts=20)
        with Loopback(service.answer, fault) as faulty, Loopback(service.answer) as plain:
            expected = ask(teacher_of(service, plain, settings=settings), *prefixes(12), num_samples=4)
            replies = ask(teacher_of(service, faulty, settings=settings), *prefixes(12), num_samples=4)
        assert [sorted(r.text for r in reply.rollouts) for reply in replies] == [
            sorted(r.text for r in reply.rollouts) for reply in expected
        ]
        assert [reply.usage for reply in replies] == [reply.usage for reply in expected]
        # No attempt arrives twice; one that ran out of time on a busy machine may not arrive at all.
        assert len(faulty.requests) <= sum(reply.outcomes["requests"] for reply in replies)
        assert len(plain.requests) < len(faulty.requests)
        assert faulty.most <= 8 + 8  # requests that timed out are still in flight on the server

    def test_concurrency(self):
        """As many at once as allowed, as the server sees it."""
        with Loopback(wire.openai, delay=0.2) as server:
            ask(teacher_of(SERVICES[0], server, settings=EngineSettings(max_concurrency=16)), *prefixes(64))
        assert server.most == 16

    def test_the_time_of_requests(self):
        """It begins when a request is sent: waiting for its turn is not a part of it."""
        with Loopback(wire.openai, delay=0.2) as server:
            start = time.monotonic()
            teacher = teacher_of(SERVICES[0], server, settings=EngineSettings(max_concurrency=1))
            times = [reply.outcomes[REQUEST_MILLISECONDS] for reply in ask(teacher, *prefixes(3))]
            assert min(times) >= 200
            assert sum(times) <= 1000 * (time.monotonic() - start)

    def test_wrong_n(self):
        """A server that ignores `n` silently costs requests, not rollouts."""

        def one(path, body):
            return wire.openai(path, {**body, "n": 1})

        with Loopback(one) as server:
            teacher = teacher_of(SERVICES[0], server)
            replies = ask(teacher, *prefixes(4), num_samples=5)
            first = len(server.requests)
            ask(teacher, Prefix("question"), num_samples=5)
        assert [len(reply.rollouts) for reply in replies] == [5] * 4
        assert first == 20
        assert [body.get("n", 1) for body in server.bodies[first:]] == [1] * 5


class TestWords:
    """What the adapters share."""

    @pytest.mark.parametrize(
        ("text", "secret", "expected"),
        [
            ("Incorrect API key provided: sk-proj-Ab***yz.", "sk-proj-Abcdefyz", "Incorrect API key provided: [key]"),
            ("key=s3cr3t-value!", "s3cr3t-value", "key=[key]!"),
            ("ends in 9xyz", "0123456789xyz", "ends in [key]"),
            ("begins with 0123: refused", "0123456789xyz", "begins with [key]: refused"),
            ("012***xyz was refused", "0123456789xyz", "[key] was refused"),
            ("Bearer abc.def is invalid", "", "Bearer [key] is invalid"),
            ("AIzaSyB8vN3kQ2rTxWm", "", "[key]"),
            ("no connection to http://user:pw@host:1/v1", "", "no connection to http://[key]@host:1/v1"),
            ("http://host/v1 refused a@b.example", "", "http://host/v1 refused a@b.example"),
            ("prompt is too long: 210 tokens", "sk-ant-api03-xyz", "prompt is too long: 210 tokens"),
            ("skeleton keys and risk-takers", "token-abc", "skeleton keys and risk-takers"),
        ],
    )
    def test_redact(self, text, secret, expected):
        """Keys go, whole or in part; other words stay."""
        assert redact(text, [secret] if secret else []) == expected

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "250"}, 0.25), ({"retry-after": "soon"}, None), ({}, None)],
    )
    def test_retry_after(self, headers, seconds):
        """Seconds, milliseconds, and what is neither."""
        assert retry_after(headers) == seconds

    def test_status(self):
        """Every status has a meaning, and a final one says what to do next."""
        for status in range(400, 600):
            failure = failure_of(ServiceError(status, "words"), model="m", key="K_API_KEY")
            assert failure.kind in (("rejected",) if status == 413 else ("final", "transient", "rate_limited"))
            if status in (401, 403):
                assert "K_API_KEY" in failure.message
        assert failure_of(ServiceError(429, "", "insufficient_quota"), model="m", key="K").kind == "final"

    def test_what_the_adapter_gets(self):
        """The adapter gets the request as it was asked for; only seed and room for reasoning may differ."""
        teacher = Scripted()
        request = SamplingRequest(2, 30, temperature=0.5, top_p=0.9)
        asyncio.run(teacher.sample([Prefix("question")], request))
        assert teacher.seen[0][2] == request

    def test_temperature_that_is_not_sent(self, caplog):
        """A model that takes no temperature says so once, when another than 1 was asked for."""
        teacher = Scripted(capabilities=Capabilities("raw", takes_temperature=False))
        messages = []
        teacher.warn_once = messages.append
        ask(teacher, Prefix("question"))
        assert messages == []
        ask(teacher, Prefix("question"), temperature=0.5)
        assert "teacher_temperature=0.5" in messages[0]
