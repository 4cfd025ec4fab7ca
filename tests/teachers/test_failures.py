# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the errors of services mean: this request, this moment or the run, in the words of many services."""

import base64
import json
import random
import re
import time
from urllib.parse import quote as url_quote

import pytest

from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.failures import ServiceError, clean, failure_of, redact
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)

VLLM, OPENAI, ANTHROPIC, GEMINI = SERVICES

PREFIX, OTHER = Prefix("3 + 4", " ="), Prefix("the other prompt")

case = pytest.mark.case


def of(message, code=None, **more):
    """The body of an error in the form of OpenAI."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": None, **more}}


def meaning(status, body, *, has_answered=True, wait=None):
    """What a response with a status and a body means."""

    class Response:
        status_code, headers = status, {"location": "elsewhere"} | ({} if wait is None else {"retry-after": str(wait)})
        text = body if isinstance(body, str) else json.dumps(body)

    class SDKError(Exception):
        response = Response()

    return failure_of(ServiceError.of(SDKError()), model="m", key="K_API_KEY", has_answered=has_answered)


# ---- This request ----

TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4090 `inputs` tokens"
REJECTED = [
    ("T1", 400, of("Content Exists Risk", "invalid_request_error")),
    (
        "T1",
        400,
        {"error": {"message": "Input data may contain inappropriate content.", "code": "data_inspection_failed"}},
    ),
    (
        "T1",
        400,
        {
            "error": {
                "message": "The request was rejected because it was considered high risk",
                "type": "content_filter",
            }
        },
    ),
    (
        "T1",
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"},
        },
    ),
    (
        "T2",
        400,
        of("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "invalid_prompt"),
    ),
    (
        "T2",
        400,
        of("The response was filtered.", "content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}),
    ),
    ("T2", 400, of("litellm.ContentPolicyViolationError: AzureException - filtered by the content management policy")),
    ("T3", 403, of('m requires moderation. Your input was flagged for "violence". No credits were charged.', 403)),
    (
        "T3",
        403,
        {"code": "forbidden", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO"},
    ),
    # Too long
    (
        "T4",
        400,
        {
            "object": "error",
            "message": "max_tokens must be at least 1, got -17",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    ("T4", 400, of("This model's maximum context length is 1024 tokens. However, you requested 1100 tokens.")),
    (
        "T5",
        400,
        {
            "object": "error",
            "message": "Input length (40000 tokens) exceeds the maximum allowed length (32762 tokens).",
        },
    ),
    (
        "T5",
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size, try increasing it",
                "type": "exceed_context_size_error",
            }
        },
    ),
    (
        "T5",
        500,
        {"error": {"message": "Requested tokens (600) exceed context window of 512", "type": "internal_server_error"}},
    ),
    ("T5", 400, {"error": "Trying to keep the first 5000 tokens when context the overflows. The model has 4096."}),
    (
        "T6",
        422,
        {
            "error": "Input validation error: inputs tokens + max_new_tokens must be <= 4096",
            "error_type": "validation",
        },
    ),
    ("T6", 422, {"error": TGI, "error_type": "validation"}),
    ("T6", 422, {"error": "`inputs` must have less than 1024 tokens. Given: 2000", "error_type": "validation"}),
    (
        "T6",
        400,
        {
            "object": "error",
            "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model",
            "code": 3051,
        },
    ),
    ("T7", 400, wire.anthropic_error(400, "input length and `max_tokens` exceed context limit: 199990 + 70 > 200000")),
    ("T7", 400, wire.anthropic_error(400, "prompt is too long: 210000 tokens > 200000 maximum")),
    (
        "T7",
        400,
        of("litellm.ContextWindowExceededError: litellm.BadRequestError: AnthropicException - prompt is too long"),
    ),
    ("T8", 413, "<html><head><title>413 Request Entity Too Large</title></head></html>"),
    ("T8", 413, ""),
    ("T8", 413, wire.anthropic_error(413, "Request exceeds the maximum size", "request_too_large")),
    # Larger than a limit per minute
    (
        "A7",
        429,
        of("Request too large for m on tokens per min (TPM): Limit 30000, Requested 39456.", "rate_limit_exceeded"),
    ),
    ("A7", 429, of("Rate limit reached on tokens per min: Limit: 6,000, Used: 0, Requested: 7,120.")),
    (
        "A7",
        413,
        of(
            "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 7000",
            "rate_limit_exceeded",
        ),
    ),
]


@pytest.mark.parametrize("has_answered", [True, False])
@pytest.mark.parametrize(("status", "body"), [pytest.param(s, b, marks=case(i)) for i, s, b in REJECTED])
def test_this_request(status, body, has_answered):
    """A prompt that is too long or filtered says so, in the service's own words, whatever was answered before."""
    failure = meaning(status, body, has_answered=has_answered)
    assert failure.kind == "rejected"
    assert not failure.unexplained
    assert not failure.may_be_billed
    if body:
        assert ServiceError.inside(body) is None or ServiceError.inside(body).message[:80] in failure.message


@pytest.mark.case("T1", "T6", "T8")
@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, of("Something about this prompt"), "Something about this prompt"),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "wrong", "input": "the api key"}]}, "body.x: wrong"),
        (400, "<html>Bad Request</html>", "<html>Bad Request</html>"),
        (400, {"message": ["one", "two"], "error": "Bad Request", "statusCode": 400}, "one; two"),
        (400, of("Provider returned error", metadata={"raw": '{"message": "odd"}'}), "Provider returned error ({"),
        (400, {"Message": "Odd"}, "Odd"),
        (400, {"odd": {"form": 1}}, '{"odd": {"form": 1}}'),
        (400, [{"error": {"code": 400, "message": "Odd", "status": "INVALID_ARGUMENT"}}], "Odd"),
        (422, "[" * 100_000, "[["),
    ],
)
def test_unexplained(status, body, words):
    """An error of no known meaning is the run's before the first answer, and the request's after it; it is quoted."""
    before, after = (meaning(status, body, has_answered=answered) for answered in (False, True))
    assert (before.kind, after.kind, after.unexplained) == ("final", "rejected", True)
    assert f"{status}: {words}" in before.message
    assert f"{status}: {words}" in after.message


WIRE = [
    ("T1", VLLM, Fault(400, of("Content Exists Risk", "invalid_request_error")), "Content Exists Risk"),
    ("T2", OPENAI, Fault(400, of("Your prompt was flagged", "invalid_prompt")), "Your prompt was flagged"),
    ("T3", VLLM, Fault(403, of("m requires moderation. Your input was flagged", 403)), "requires moderation"),
    ("T4", VLLM, Fault(400, of("max_tokens must be at least 1, got -17")), "got -17"),
    ("T5", VLLM, Fault(400, {"object": "error", "message": "Input length (40) exceeds the maximum"}), "Input length"),
    (
        "T6",
        VLLM,
        Fault(422, {"error": "inputs tokens + max_new_tokens must be <= 4096", "error_type": "v"}),
        "must be",
    ),
    ("T7", ANTHROPIC, Fault(400, wire.anthropic_error(400, "`max_tokens` exceed context limit: 9 + 7 > 8")), "9 + 7"),
    ("T8", VLLM, Fault(413, "<html>Too Large</html>", {"content-type": "text/html"}), "<html>Too Large"),
    ("T8", ANTHROPIC, Fault(413, "<html>Too Large</html>", {"content-type": "text/html"}), "<html>Too Large"),
    ("T8", GEMINI, Fault(413, "<html>Too Large</html>", {"content-type": "text/html"}), "<html>Too Large"),
    ("T6", GEMINI, Fault(400, {"error": "not the form of this service"}), "not the form of this service"),
    ("T1", ANTHROPIC, Fault(400, {"detail": "of no known meaning"}), "of no known meaning"),
    ("A7", OPENAI, Fault(429, of("Request too large for m (TPM): Limit 1000, Requested 2000")), "Requested 2000"),
]


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("service", "fault", "words"), [pytest.param(*row, id=f"{i}-{row[0].name}", marks=case(i)) for i, *row in WIRE]
)
def test_one_prompt_is_dropped(service, fault, words):
    """The refused prompt has no rollouts, its reply quotes the service, and it is sent once."""
    with Loopback(service.answer, lambda _, body: fault if OTHER.prompt in str(body) else None) as server:
        teacher = teacher_of(service, server)
        teacher.probe("3 + 4")
        probed = len(server.requests)
        replies = ask(teacher, PREFIX, OTHER, PREFIX)
    assert [len(reply.rollouts) for reply in replies] == [1, 0, 1]
    assert words in replies[1].failure
    assert replies[1].outcomes["failed_requests"] == 1
    assert len(server.requests) == probed + 3
    assert teacher.budget.forfeited_tokens == 0


@pytest.mark.case("A7")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    "error",
    [
        of("Your account is not active.", "billing_not_active"),
        of("You exceeded your current quota", "exceeded_current_quota_error"),
        of("Rate limit exceeded: free-models-per-day", 429),
    ],
)
def test_a_spent_quota_is_not_waited_for(error):
    """The first answer ends the run."""
    with Loopback(OPENAI.answer, lambda *_: Fault(429, error)) as server:
        with pytest.raises(TeacherError, match="no quota or credit left"):
            ask(teacher_of(OPENAI, server), PREFIX)
    assert len(server.requests) == 1


@pytest.mark.usefixtures("services")
def test_unexplained_refusals_are_announced_once(caplog):
    """A warning quotes the first one and names the count and the limit."""
    with Loopback(wire.openai, lambda number, _: Fault(400, of("Odd")) if number > 1 else None) as server:
        teacher = teacher_of(VLLM, server)
        teacher.probe("3 + 4")
        ask(teacher, *[Prefix("3 + 4", " =" * n) for n in range(1, 4)])
    (line,) = [message for message in caplog.messages if "answers others" in message]
    assert "400: Odd" in line
    assert "teacher/failed_requests" in line
    assert "max_failed_chunks" in line


# ---- The run ----

FINAL = [
    # No quota
    (
        "A7",
        429,
        of("Your account is not active, please check your billing details.", "billing_not_active"),
        "no quota",
    ),
    ("A7", 429, of("You exceeded your current quota", "exceeded_current_quota_error"), "no quota"),
    ("A7", 429, of("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock more", 429), "no quota"),
    ("A7", 429, of("You exceeded your current quota, please check your plan and billing details."), "no quota"),
    ("A7", 429, of("Rate limit reached on requests per day (RPD): Limit 200, Used 200"), "no quota"),
    (
        "A7",
        403,
        {"error": "Your team has used all available credits or reached its monthly spending limit"},
        "no quota",
    ),
    ("A7", 403, of("用户额度不足", "insufficient_user_quota"), "no quota"),
    ("A7", 400, wire.anthropic_error(400, "You have reached your specified API usage limits."), "no quota"),
    (
        "A7",
        400,
        of("Budget has been exceeded! Current cost: 1.1, Max budget: 1.0", type="budget_exceeded"),
        "no quota",
    ),
    ("A7", 402, of("Insufficient Balance"), "no quota"),
    # Key, account, place and model
    (
        "A9",
        400,
        wire.gemini_error(400, "API key not valid.", "INVALID_ARGUMENT", {"reason": "API_KEY_INVALID"}),
        "K_API",
    ),
    (
        "A9",
        400,
        wire.gemini_error(400, "User location is not supported for the API use.", "FAILED_PRECONDITION"),
        "country",
    ),
    (
        "A9",
        400,
        wire.gemini_error(
            400, "The free tier is not available in your country. Please enable billing", "FAILED_PRECONDITION"
        ),
        "country",
    ),
    ("A9", 403, of("Country, region, or territory not supported", "unsupported_country_region_territory"), "country"),
    ("A9", 400, of("Model Not Exist"), "no model 'm'"),
    ("A9", 400, of("The model `llama2` has been decommissioned", "model_decommissioned"), "no model 'm'"),
    ("A9", 403, of("Your account has been flagged for abuse"), "K_API_KEY"),
    ("A9", 404, "404 page not found", "not that of the service"),
    ("A9", 405, {"detail": "Method Not Allowed"}, "not that of the service"),
    ("A9", 404, {"detail": "Not Found"}, "Check teacher_base_url"),
    ("A9", 403, "<html>Sorry, you have been blocked</html>", "not that of the service"),
    ("A9", 307, "", "redirects to elsewhere"),
    ("A9", 400, of("temperature must be in [0, 2], got 3.0"), "refuses the request"),
]


@pytest.mark.parametrize(("status", "body", "words"), [pytest.param(*row, marks=case(i)) for i, *row in FINAL])
def test_the_run(status, body, words):
    """A spent quota, a wrong key, model, place or address, and a setting of the run: named as such, and no retry."""
    before, after = (meaning(status, body, has_answered=answered) for answered in (False, True))
    assert before.kind == "final"
    assert after.kind == ("final" if words in ("no quota", "country", "refuses the request") else "denied")
    assert words in before.message


@pytest.mark.case("A7")
@pytest.mark.parametrize(
    ("status", "body", "wait"),
    [
        (429, of("Rate limit reached: Limit 30000, Used 29000, Requested 1200. Please try again in 400ms."), None),
        (429, of("You exceeded your current quota, please check your plan and billing details."), 30),
        (429, of("This request would exceed your organization's rate limit of 50,000 input tokens per minute"), None),
        (400, {"__type": "ThrottlingException", "message": "Too many requests, please wait"}, None),
        (403, {"error": {"code": 403, "message": "Slow down", "errors": [{"reason": "rateLimitExceeded"}]}}, None),
        (529, wire.anthropic_error(529, "Overloaded", "overloaded_error"), None),
    ],
)
def test_a_rate_limit_that_passes(status, body, wait):
    """Limits per minute are waited for, also in the words that others use for a spent quota."""
    failure = meaning(status, body, wait=wait)
    assert (failure.kind, failure.retry_after) == ("rate_limited", wait)


@pytest.mark.case("T13")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_another_status_of_success(service):
    """It is an answer, or one that cannot be read, whatever the SDK makes of it."""
    fault = Fault(206, service.answer("/completions", {"model": "m", "prompt": "", "messages": [], "contents": []}))
    with Loopback(service.answer, [fault]) as server:
        teacher = teacher_of(service, server, continuation={"vllm:teacher": "raw"}.get(service.name))
        (reply,) = ask(teacher, PREFIX)
    assert len(reply.rollouts) == 1


@pytest.mark.case("T13")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize(
    "body",
    ["[" * 100_000, '{"error": 7}', "null", '{"error": [1]}', '{"error": {"message": {"a": 1}}}', b"\xffHTML", ""],
)
def test_an_error_in_an_odd_form(service, body):
    """Whatever form it has, one request is dropped, and its text is quoted."""
    with Loopback(service.answer, lambda _, sent: Fault(400, body) if OTHER.prompt in str(sent) else None) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=30, max_attempts=1))
        ask(teacher, PREFIX)
        (reply,) = ask(teacher, OTHER)
    assert reply.rollouts == ()
    text = body if isinstance(body, str) else body.decode(errors="replace")
    assert f"400: {'no text' if text in ('', 'null') else text[:9]}" in reply.failure
    assert teacher.budget.forfeited_tokens == 0


@pytest.mark.case("A9")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_single_denial_between_answers(status):
    """It is tried once more; the second one in a row is final."""
    with Loopback(wire.openai, lambda number, _: Fault(status, of("odd")) if number == 1 else None) as server:
        replies = ask(teacher := teacher_of(VLLM, server), PREFIX)
        replies += ask(teacher, PREFIX)
    assert all(reply.rollouts for reply in replies)
    assert len(server.requests) == 3
    with Loopback(wire.openai, lambda number, _: Fault(status, of("odd")) if number else None) as server:
        ask(teacher := teacher_of(VLLM, server), PREFIX)
        with pytest.raises(TeacherError, match=f"{status}: odd"):
            ask(teacher, PREFIX)
    assert len(server.requests) == 3


# ---- Errors inside a 200 ----

INSIDE = [
    ("T12", {"error": {"code": 429, "message": "slow"}}, "rate_limited"),
    ("T12", {"error": {"code": "429", "message": "slow"}}, "rate_limited"),
    ("T12", {"error": {"message": "slow", "type": "rate_limit_error"}}, "rate_limited"),
    ("T12", {"error": {"code": 502, "message": "slow"}, "user_id": "u"}, "transient"),
    ("T12", {"type": "error", "error": {"type": "overloaded_error", "message": "slow"}}, "rate_limited"),
    ("T12", {"error": {"code": 503, "message": "slow", "status": "UNAVAILABLE"}}, "rate_limited"),
    ("T12", [{"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}], "rate_limited"),
    ("T12", {"object": "error", "message": "slow", "type": "InternalServerError", "code": 500}, "transient"),
    ("T12", {"error": {"message": "slow", "code": "insufficient_quota"}}, "final"),
    ("T12", {"error": {"message": "slow: invalid key", "type": "authentication_error"}}, "final"),
    ("T12", {"error": {"code": 400, "message": "slow: the prompt was flagged"}}, "rejected"),
    ("T13", {"error": "Unexpected endpoint or method slow"}, "transient"),
]


@pytest.mark.parametrize(("body", "kind"), [pytest.param(*row, marks=case(i)) for i, *row in INSIDE])
def test_error_inside_an_answer(body, kind):
    """The code inside counts; the words are quoted, and it is not charged."""
    failure = failure_of(ServiceError.inside(body), model="m", key="K")
    assert failure.kind == kind
    assert "slow" in failure.message
    assert not failure.may_be_billed


@pytest.mark.parametrize(
    "body", [{}, {"choices": []}, {"error": None, "choices": [1]}, [], "error", 7, None, {"error": {}}]
)
def test_an_answer_without_an_error(body):
    """Everything else is none."""
    assert ServiceError.inside(body) is None


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("service", "body"),
    [
        pytest.param(VLLM, {"error": {"code": 429, "message": "slow down"}}, marks=case("T12")),
        pytest.param(OPENAI, {"error": {"code": "server_error", "message": "slow down"}}, marks=case("T12")),
        pytest.param(ANTHROPIC, wire.anthropic_error(529, "slow down", "overloaded_error"), marks=case("T12")),
        pytest.param(VLLM, {"error": "slow down, Unexpected endpoint or method"}, marks=case("T13")),
    ],
)
def test_error_inside_an_answer_over_the_wire(service, body):
    """It is tried again and costs nothing; a rate limit halves the concurrency."""
    with Loopback(service.answer, [Fault(200, body)] * 2) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_concurrency=8))
        (reply,) = ask(teacher, PREFIX)
    assert len(reply.rollouts) == 1
    assert teacher.budget.forfeited_tokens == 0
    is_limit = any(word in str(body) for word in ("429", "overloaded"))
    assert (teacher._throttle.concurrency < 8) == is_limit


@pytest.mark.case("T13")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("service", "content", "kind"),
    [
        (VLLM, "<!DOCTYPE html><html>" + "a login page " * 99, "text/html"),
        (VLLM, {"status": "a login page"}, "application/json"),
        (ANTHROPIC, "<html>a login page</html>", "text/html"),
        (GEMINI, "<html>a login page</html>", "text/html"),
        (VLLM, {"error": "a login page: Unexpected endpoint or method"}, "application/json"),
    ],
)
def test_the_answer_of_another_server(service, content, kind):
    """The beginning of what came is quoted, with the setting to check; it is no matter of the prompt or the model."""
    with Loopback(service.answer, lambda *_: Fault(200, content, {"content-type": kind})) as server:
        with pytest.raises(TeacherError, match="a login page") as caught:
            teacher_of(service, server).probe("3 + 4")
    message = str(caught.value)
    assert "teacher_base_url" in message
    assert "another prompt" not in message
    assert len(message) < 700


# ---- What is shown ----

PIECES = [
    "a",
    "/",
    "://",
    "?key=",
    "&",
    "@",
    ":",
    "=",
    "%41",
    "\\u0041",
    "****",
    "...",
    "sk-",
    "bearer ",
    "limit 9",
    "model ",
]
PIECES += [
    "requested 8",
    "account",
    "flagged",
    "max_tokens",
    "got -",
    "inputs ",
    "\x1b",
    "\n",
    "\ud83d",
    "数",
    "{",
    "'",
    " ",
]
NAMES = [
    "error",
    "message",
    "code",
    "type",
    "status",
    "detail",
    "errors",
    "metadata",
    "raw",
    "details",
    "loc",
    "retryDelay",
]


def odd(dice, depth):
    """A random JSON value with the names of errors."""
    if depth and dice.random() < 0.5:
        return {dice.choice(NAMES): odd(dice, depth - 1) for _ in range(dice.randrange(6))}
    if depth and dice.random() < 0.4:
        return [odd(dice, depth - 1) for _ in range(dice.randrange(4))]
    return dice.choice(
        [None, 7, 429, 1e400, 2**70, "3.5s", "503", "".join(dice.choices(PIECES, k=dice.randrange(900)))]
    )


@pytest.mark.case("T17", "T20")
def test_odd_errors():
    """Every status and body has a meaning, found in a moment, in a line that can be shown."""
    dice, slowest = random.Random(7), 0.0
    for status in (*range(300, 600, 2), 200, 401, 403, 413, 429, 529):
        body = odd(dice, 5)
        start = time.process_time()
        failure = meaning(status, body) if status != 200 else None
        inside = ServiceError.inside(body)
        failures = [failure] if failure else []
        failures += [failure_of(inside, model="m", key="K", secrets=[SECRET])] if inside else []
        slowest = max(slowest, time.process_time() - start)
        for failure in failures:
            line = clean(failure.message, [SECRET])
            assert line.isprintable()
            assert line.encode()
            assert len(line) <= 2000
    assert slowest < 0.5


@pytest.mark.case("T17")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    "words", ["Unexpected fields ", "'", "://", "?a", "&key", "sk-", "****", "\\u0041%41", "inputs "]
)
def test_a_message_of_megabytes(words):
    """It is cut before it is searched."""
    body = of(words * (2**20 // len(words)))
    with Loopback(wire.openai, lambda *_: Fault(422, body)) as server:
        start = time.monotonic()
        with pytest.raises(TeacherError) as caught:
            ask(teacher_of(VLLM, server), PREFIX)
        assert time.monotonic() - start < 2
    assert len(str(caught.value)) < 2500


FORGED = "\x1b[2J\r\nTeacherError: fake\u2028\x9b1m\u202e"


@pytest.mark.case("T20")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize("status", [200, 400, 422, 429, 500])
def test_control_characters(service, status, caplog, capfd):
    """They reach neither an error, nor a log line, nor the reason of a reply."""
    body = f"<html>{FORGED}" if status == 200 else service.error(status, FORGED)
    texts = []
    with Loopback(service.answer, lambda *_: Fault(status, body)) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=5, max_attempts=6))
        try:
            texts += [reply.failure for reply in ask(teacher, PREFIX)]
        except TeacherError as error:
            texts += [str(error)]
    assert "TeacherError: fake" in texts[0]
    for text in [*texts, *caplog.messages, *capfd.readouterr()]:
        assert not set(text) & set(FORGED) - set(" []JTeacherError:fk2m1"), repr(text)


def test_clean_keeps_what_can_be_read():
    """Words of all languages, and spaces of all widths."""
    assert clean("Größe 数 ½\u00a0€\u3000☃ \\n") == "Größe 数 ½\u00a0€\u3000☃ \\n"
    assert clean("a\tb\x00") == "a\\tb\\x00"


SECRET = 'tok/en+"9dK2\\mQe=RtZ@é'


@pytest.mark.case("A5")
@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        url_quote(SECRET, safe=""),
        url_quote(SECRET),
        url_quote(url_quote(SECRET, safe=""), safe=""),
        re.sub("%..", lambda match: match[0].lower(), url_quote(SECRET, safe="")),
        json.dumps(SECRET)[1:-1],
        json.dumps(json.dumps(SECRET))[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1].replace("/", "\\/"),
        SECRET.replace('"', "&quot;"),
        base64.b64encode(SECRET.encode()).decode(),
        base64.b64encode(f"user:{SECRET}".encode()).decode(),
        base64.b64encode(f"{SECRET}:".encode()).decode(),
        base64.urlsafe_b64encode(f"a{SECRET}bc".encode()).decode(),
    ],
)
def test_keys_in_other_forms(form):
    """As a service or a proxy may echo them."""
    text = redact(f"refused <{form}> today", [SECRET])
    assert text.startswith("refused <")
    assert text.endswith("> today")
    assert "[key]" in text
    for piece in ("9dK2", "mQe", "RtZ", base64.b64encode(SECRET.encode()).decode()[4:12]):
        assert piece not in text


@pytest.mark.case("A5")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no connection to http://user:p@ss@host:1/v1", "no connection to http://[key]@host:1/v1"),
        ("http://user:p@s@s@host/v1?a=b", "http://[key]@host/v1?a=b"),
        ("http://user:p/s@host/v1", "http://[key]@host/v1"),
        ("http://host:8000/v1/a@b", "http://host:8000/v1/a@b"),
        ("no connection to https://h/v1?key=abc&n=2", "no connection to https://h/v1?key=[key]&n=2"),
        ("https://h/v1?api-version=1&subscription-key=abc#x", "https://h/v1?api-version=1&subscription-key=[key]#x"),
        ("https://h?access_token=abc", "https://h?access_token=[key]"),
        ("https://h/v1?api-version=2026-10-01", "https://h/v1?api-version=2026-10-01"),
    ],
)
def test_keys_in_addresses(text, expected):
    """Passwords and keys in an address go, whatever they hold; the address stays."""
    assert redact(text) == expected


@pytest.mark.case("A5")
@pytest.mark.usefixtures("services")
def test_echoed_parts_of_an_address(caplog):
    """A password and a key in the address are secrets wherever they appear."""
    with Loopback(wire.openai, lambda *_: Fault(401, of("user 'me' with p@ssw0rd! and 4Fz8Qm is unknown"))) as server:
        address = server.url.replace("://", "://me:p%40ssw0rd!@") + "/v1?key=4Fz8Qm"
        with pytest.raises(TeacherError) as caught:
            ask(remote_teacher(VLLM.name, base_url=address), PREFIX)
    for text in (str(caught.value), caplog.text):
        assert "ssw0rd" not in text
        assert "4Fz8Qm" not in text


@pytest.mark.case("A5")
@pytest.mark.usefixtures("services")
def test_echoed_keys_in_other_forms(caplog):
    """Over the wire: neither the error nor a log line shows the key."""
    key = KEYS["VLLM_API_KEY"]
    echo = f"refused {url_quote(key)} {base64.b64encode(f'user:{key}'.encode()).decode()}"
    with Loopback(wire.openai, lambda *_: Fault(401, of(echo))) as server:
        with pytest.raises(TeacherError) as caught:
            ask(teacher_of(VLLM, server), PREFIX)
    for text in (str(caught.value), caplog.text):
        assert key not in text
        assert base64.b64encode(f"user:{key}".encode()).decode()[8:] not in text
