# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What each provider's failures mean: the real SDKs' exceptions, from servers that fail."""

import logging
import time
import traceback

import pytest

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.errors import BudgetError, TeacherError
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.ledgers import MemoryLedger
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, ask, counts_of, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.usefixtures("services"), pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)]

PREFIX = Prefix("3 + 4", " =")


@pytest.fixture
def lines():
    """What the package logs, at every level, as text."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(self.format(record))

    logger, handler = logging.getLogger("omniopd_trl"), Keep(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def failing(service, *faults, **kwargs):
    """A server whose first requests fail."""
    return Loopback(service.answer, list(faults), **kwargs)


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (400, "max_tokens: must be positive", "refuses the request"),
        (401, "invalid x-api-key", "was refused"),
        (403, "not allowed", "may not use"),
        (404, "no such model", "no model"),
        (422, "unprocessable", "refuses the request"),
    ],
)
def test_final(service, status, message, said):
    """A request that will never be answered is sent once, and the message names the cause and the next step."""
    with failing(service, *[Fault(status, service.error(status, message))] * 9) as server:
        with pytest.raises(TeacherError, match=said) as caught:
            ask(teacher_of(service, server), PREFIX)
    assert len(server.requests) == 1
    assert message in str(caught.value)
    assert service.name in str(caught.value)
    if status in (401, 403):
        assert service.key in str(caught.value)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_transient(service, status):
    """One failure of each transient kind, then an answer: one request more, nothing counted twice."""
    with failing(service, Fault(status, service.error(status, "try again"))) as server:
        (reply,) = ask(teacher_of(service, server), PREFIX)
        (plain,) = ask(teacher_of(service, server), PREFIX)
    assert len(server.requests) == 3
    assert reply.rollouts == plain.rollouts
    assert reply.usage == plain.usage
    assert (reply.outcomes["requests"], reply.outcomes["retries"]) == (2, 1)


@pytest.mark.parametrize("how", ["drop", "cut", "hang"])
def test_broken_answers(service, how):
    """A reset connection, JSON that ends in the middle, and no answer in time are tried again."""
    with failing(service, Fault(how=how)) as server:
        # The second request has to be answered in time on a busy machine, too.
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=1.5))
        (reply,) = ask(teacher, PREFIX, max_tokens=5)
    assert len(server.requests) == 2
    assert len(reply.rollouts) == 1
    # The service may have charged for the answer that did not arrive.
    assert teacher.budget.forfeited_tokens >= 5


@pytest.mark.parametrize("body", [{}, {"choices": None, "content": None}, "<html>busy</html>", []])
def test_answers_of_another_form(service, body):
    """An answer that is none is tried again, and ends in an outcome, not in a crash."""
    with Loopback(service.answer, lambda *_: Fault(200, body)) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=2))
        (reply,) = ask(teacher, PREFIX)
    assert len(server.requests) == 2
    assert reply.rollouts == ()
    assert reply.outcomes["failed_requests"] == 1
    assert "cannot be read" in reply.failure


def test_given_up(service):
    """A service that always fails ends after the attempts that are allowed, as an outcome that says why."""
    with Loopback(service.answer, lambda *_: Fault(500, service.error(500, "out of order"))) as server:
        (reply,) = ask(teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=4)), PREFIX)
    assert len(server.requests) == 4
    assert reply.rollouts == ()
    assert "out of order" in reply.failure
    assert counts_of(reply) == {"requests": 4, "retries": 3, "failed_requests": 1}
    assert reply.usage.prompt_tokens == 0


def test_nobody_there(service):
    """A wrong address is tried again, and then named."""
    with Loopback(service.answer) as server:
        pass
    teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=2))
    with pytest.raises(TeacherError, match="no connection"):
        teacher.probe("3 + 4")
    assert teacher.budget.forfeited_tokens == 0  # what was never sent is not charged


def test_retry_after(service):
    """The wait that the service names is kept, from its header or its body."""
    fault = Fault(429, service.error(429, "slow down"), {"retry-after": "0.4"})
    if service.name.startswith("gemini"):
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.4s"}
        fault = Fault(429, wire.gemini_error(429, "slow down", "RESOURCE_EXHAUSTED", info))
    with failing(service, fault) as server:
        ask(teacher_of(service, server), PREFIX)
    first, second = server.requests
    assert 0.4 <= second.time - first.time < 5


def test_retry_after_as_a_date(service):
    """HTTP allows a date."""
    moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    with failing(service, Fault(503, service.error(503, "x"), {"retry-after": moment})) as server:
        with pytest.raises(TeacherError, match=r"asks to wait (99\d|1000) s, more than teacher_max_retry_after=120"):
            ask(teacher_of(service, server), PREFIX)
    assert len(server.requests) == 1


def test_no_quota(service):
    """An empty account is final, although it is a 429 or a 400 like others."""
    fault = {
        "vllm": lambda: Fault(429, wire.openai_error(429, "You exceeded your quota", "insufficient_quota")),
        "openai": lambda: Fault(429, wire.openai_error(429, "You exceeded your quota", "insufficient_quota")),
        "anthropic": lambda: Fault(400, wire.anthropic_error(400, "Your credit balance is too low to use the API")),
        "gemini": lambda: Fault(
            429,
            wire.gemini_error(
                429, "Quota exceeded", "RESOURCE_EXHAUSTED", {"violations": [{"quotaId": "RequestsPerDayPerModel"}]}
            ),
        ),
    }[service.name.partition(":")[0]]()
    with failing(service, *[fault] * 5) as server:
        with pytest.raises(TeacherError, match="no quota or credit left"):
            ask(teacher_of(service, server), PREFIX)
    assert len(server.requests) == 1


def test_too_long(service):
    """A prompt beyond the model's context loses its chunk; the others continue."""
    message = {
        "vllm": "This model's maximum context length is 1024 tokens. However, you requested 1100 tokens.",
        "openai": "Input is too long: context_length_exceeded",
        "anthropic": "prompt is too long: 210000 tokens > 200000 maximum",
        "gemini": "The input token count (1100000) exceeds the maximum number of tokens allowed (1048576).",
    }[service.name.partition(":")[0]]

    def fault(_, body):
        return Fault(400, service.error(400, message)) if "endless" in str(body) else None

    with Loopback(service.answer, fault) as server:
        replies = ask(teacher_of(service, server), PREFIX, Prefix("an endless prompt"), PREFIX)
    assert [len(reply.rollouts) for reply in replies] == [1, 0, 1]
    assert "longer than the model's context" in replies[1].failure
    assert len(server.requests) == 3


def test_no_prefill(service, lines):
    """A model that refuses to continue is instructed from then on: one warning, however many requests were refused."""
    continuation = None
    if service.name.startswith(("vllm:", "openai:")):
        continuation = "continue_final" if service.name.startswith("vllm:") else "prefill"

    def prefilled(body):
        turns = body.get("messages") or body["contents"]
        return turns[-1]["role"] in ("assistant", "model")

    message = {
        "anthropic": "This model does not support assistant message prefill. The conversation must end with a user "
        "message.",
        "gemini": "Please ensure that the last turn has the role user.",
    }.get(service.name.partition(":")[0], "Assistant message prefill is not supported by this model.")

    def fault(_, body):
        return Fault(400, service.error(400, message)) if prefilled(body) else None

    with Loopback(service.answer, fault, delay=0.3) as server:
        teacher = teacher_of(service, server, continuation=continuation)
        replies = ask(teacher, *[Prefix("3 + 4", " =" * i) for i in range(1, 9)])
        more = ask(teacher, PREFIX)
    assert all(len(reply.rollouts) == 1 for reply in [*replies, *more])
    assert sum(map(prefilled, server.bodies)) == 8  # those that were in flight together, and none after
    assert len(server.requests) == 8 + 8 + 1
    assert teacher.capabilities.continuation == "instruct"
    assert sum("teacher_continuation" in line for line in lines) == 1


def test_one_sample(service, lines):
    """A service that refuses several samples in a request is asked for one at a time."""
    if service.name.startswith("anthropic"):
        pytest.skip("gives one sample per request")

    def several(body):
        return max(body.get("n", 1), body.get("generationConfig", {}).get("candidateCount", 1)) > 1

    def fault(_, body):
        if not several(body):
            return None
        if service.name.startswith("gemini"):
            return Fault(400, wire.gemini_error(400, "Multiple candidates is not enabled for this model"))
        return Fault(400, wire.openai_error(400, "Unsupported value: 'n'", "unsupported_value", "n"))

    with Loopback(service.answer, fault) as server:
        (reply,) = ask(teacher_of(service, server), PREFIX, num_samples=4)
    assert len(reply.rollouts) == 4
    assert sum(map(several, server.bodies)) == 1
    assert len(server.requests) == 5


def test_no_temperature(service):
    """A model that refuses a temperature gets none."""

    def fault(_, body):
        has = "temperature" in str(body)
        if service.name.startswith(("vllm", "openai")):
            error = wire.openai_error(400, "Unsupported value", "unsupported_value", "temperature")
        else:
            error = service.error(400, "`temperature` is deprecated for this model.")
        return Fault(400, error) if has else None

    with Loopback(service.answer, fault) as server:
        (reply,) = ask(teacher_of(service, server), PREFIX)
    assert len(reply.rollouts) == 1
    assert len(server.requests) == 2


def test_a_temperature_out_of_range(service):
    """It is refused in the service's words, once; to drop it would sample at the service's own, silently."""
    name = service.name.partition(":")[0]
    said = {
        "vllm": "temperature must be in [0, 2], got 3.0. (parameter=temperature, value=3.0)",
        "openai": "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead.",
        "anthropic": "temperature: range: 0..1",
        "gemini": "temperature must be in the range [0.0, 2.0]",
    }[name]
    fault = Fault(400, service.error(400, said))
    if name in ("vllm", "openai"):
        fault = Fault(400, wire.openai_error(400, said, "decimal_above_max_value", "temperature"))
    with failing(service, *[fault] * 9) as server:
        teacher = teacher_of(service, server)
        with pytest.raises(TeacherError, match="refuses the request") as caught:
            ask(teacher, PREFIX, temperature=3.0)
    assert len(server.requests) == 1
    assert said in str(caught.value)
    assert teacher.capabilities.takes_temperature


def test_keys_stay_inside(service, lines):
    """Services echo keys, whole and in part; no message, log, traceback or representation holds one."""
    key = KEYS[service.key]
    echo = f"Incorrect API key provided: {key}, {key[:8]}***{key[-4:]}, ending in {key[-4:]}. Bearer {key}"
    seen = []
    for status in (401, 400, 500, 429):
        with Loopback(service.answer, lambda *_, s=status: Fault(s, service.error(s, echo))) as server:
            teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=2))
            error = None
            try:
                seen += [str(ask(teacher, PREFIX))]
            except TeacherError as caught:
                error = caught
            assert (error is not None) == (status in (400, 401))
            if error is not None:
                assert error.__cause__ is None
                seen += [str(error), repr(error), *traceback.format_exception(error)]
            seen += [repr(teacher), str(vars(teacher))]
    for text in [*seen, *lines]:
        assert key not in text
        assert key[-4:] not in text
        assert key[:8] not in text


def without_usage(service, how):
    """A service's answers, with what they used left out, or with zeros in its place."""

    def answer(path, body):
        whole = service.answer(path, body)
        key = "usageMetadata" if "usageMetadata" in whole else "usage"
        usage = whole.pop(key)
        if how == "zeros":
            whole[key] = {name: 0 for name, value in usage.items() if isinstance(value, int)}
        return whole

    return answer


@pytest.mark.parametrize("how", ["nothing", "zeros"])
def test_answers_without_usage(service, how, caplog):
    """What nobody counted is counted as the worst case, in the budget and in the ledger: a budget always ends."""
    ledger = MemoryLedger()
    price = Price(input=100.0, output=100.0)
    budget = Budget(max_usd=1.0, max_tokens=10_000, price=price)
    with Loopback(without_usage(service, how)) as server:
        teacher = teacher_of(service, server, budget=budget, continuation="instruct")
        with pytest.raises(BudgetError):
            ask(teacher, *[Prefix("What is 3 + 4?", " 7" * n) for n in range(50)], ledger=ledger)
    assert 0 < len(server.requests) < 20
    assert 5_000 < budget.tokens_spent <= 10_000
    assert 0.5 < budget.usd_spent <= 1.0
    assert sum(usage.prompt_tokens + usage.completion_tokens for usage, _ in ledger.payments) == budget.tokens_spent
    assert sum(usd for _, usd in ledger.payments) == pytest.approx(budget.usd_spent)
    (message,) = [message for message in caplog.messages if "worst case" in message]
    assert message.startswith(f"{service.name}: the service does not report the usage of an answer")
