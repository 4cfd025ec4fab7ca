# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What an answer becomes: samples, usage and model, or a malformed answer, whatever the service sends."""

import json
import logging
import math
import time
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.pricing import Price
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import BudgetError, TeacherError
from omniopd_trl.journal.resume import AuditLedger
from omniopd_trl.teachers import Rollout
from omniopd_trl.teachers.base import Prefix, SamplingRequest, clean_text
from omniopd_trl.teachers.providers import anthropic, gemini, openai
from omniopd_trl.teachers.remote import answers
from omniopd_trl.teachers.remote.answers import Asked, Response, Sample, counts, from_kept, read_sample, to_kept
from omniopd_trl.teachers.remote.failures import MalformedResponseError
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.journals import journal, trajectory
from tests.support.ledgers import MemoryLedger
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import SERVICES, ask, counts_of, services, teacher_of  # noqa: F401 (a fixture)

PREFIX = Prefix("What is 3 + 4?", "We add 3 and 4, so the sum")
ASKED = Asked(PREFIX, 2, 70)
LONE = "\ud83d"

# For each wire format: its reader, and an answer with all the fields that are read.
RAW = wire.openai("/v1/completions", {"model": "m", "prompt": "p", "n": 2})
CHAT = wire.openai("/v1/chat/completions", {"model": "m", "messages": [], "n": 2})
CHAT["choices"][1]["message"] = {
    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": " 7"}],
    "reasoning_content": "Hm.",
}
CLAUDE = wire.anthropic("/v1/messages", {"model": "m", "messages": []})
GEMINI = {**wire.gemini("", {"contents": [], "generationConfig": {"candidateCount": 2}}), "promptFeedback": {}}
FORMATS = {
    "completions": (openai.read_answer, RAW),
    "chat": (openai.read_answer, CHAT),
    "messages": (anthropic.read_answer, CLAUDE),
    "generateContent": (gemini.read_answer, GEMINI),
}


def paths(value, before=()):
    """The path of each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from paths(inner, (*before, key))


def changed(answer, path, value):
    """A copy of an answer with another value at a path. `...` removes the member."""
    answer = json.loads(json.dumps(answer))
    holder = reduce(lambda inner, key: inner[key], path[:-1], answer)
    if value is ... and isinstance(holder, dict):
        del holder[path[-1]]
    else:
        holder[path[-1]] = None if value is ... else value
    return answer


def assert_checked(response):
    """Everything in a response has been checked."""
    assert isinstance(response, Response)
    for sample in response.samples:
        sample.text.encode()
        sample.finish_reason.encode()
        assert len(sample.text) <= 70 * answers.CHARACTERS_PER_TOKEN
        assert sample.outcome in ("ok", "refused", "filtered", "empty", "restarted", "interrupted")
    if response.usage is not None:
        total = response.usage.prompt_tokens + response.usage.completion_tokens
        assert type(total) is int
        assert 0 <= total < 2**56
    assert response.model is None or len(response.model.encode()) <= 1000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=30)
    | st.sampled_from(["abort", "<think>x", "text", 2**53, 2**63, -1, "10", "length", "I'm sorry, but I can't help."]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "content", "message", "parts", "thought"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.mark.case("T9", "T10", "T11", "T15", "T18")
@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=300)
@given(st.data(), JSON | st.just(...), st.booleans())
def test_any_json_in_any_field(name, data, value, instructed):
    """It gives checked samples or a malformed answer, never another exception."""
    read, answer = FORMATS[name]
    path = data.draw(st.sampled_from(list(paths(answer))))
    body = json.dumps(changed(answer, path, value))
    try:
        assert_checked(read(body, ASKED._replace(instructed=instructed, unsent="\n")))
    except MalformedResponseError:
        pass


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_answer(name):
    """The answers that the property test damages are read whole."""
    read, answer = FORMATS[name]
    response = read(json.dumps(answer).encode(), ASKED)
    assert_checked(response)
    assert len(response.samples) == (1 if name == "messages" else 2)
    assert all(sample.outcome == "ok" and sample.text for sample in response.samples)
    assert response.usage.prompt_tokens in (20, 45)
    assert response.model == ("x" if name == "generateContent" else "m")


MALFORMED = {
    "invalid UTF-8": b'{"choices": [{"text": "\xff\xfe"}], "content": [], "candidates": []}',
    "deep": b"[" * 100_000,
    "deep inside": b'{"choices": ' + b'[{"a":' * 100_000,
    "empty": b"",
    "a list": b"[]",
    "a huge number": b'{"choices": ' + b"9" * 10_000 + b"}",
    "HTML": b"<html>busy</html>",
    "choices: [null]": b'{"choices": [null], "content": [null], "candidates": [null]}',
    "choices: {}": b'{"choices": {"0": 1}, "content": {"0": 1}, "candidates": {"0": 1}}',
    "text: 7": b'{"choices": [{"text": 7}], "content": [{"type": "text", "text": 7}], '
    b'"candidates": [{"content": {"parts": [{"text": 7}]}}]}',
    "text in a list": b'{"choices": [{"text": [7]}], "content": [7], "candidates": [{"content": {"parts": [7]}}]}',
    "no text": b'{"choices": [{}], "content": "boo", "candidates": ["boo"]}',
    'message: "boo"': b'{"choices": [{"message": "boo"}], "content": "boo", "candidates": [{"content": "boo"}]}',
    "finish: 7": b'{"choices": [{"text": "x", "finish_reason": 7}], "content": [], "stop_reason": 7, '
    b'"candidates": [{"finishReason": 7}]}',
}


@pytest.mark.case("T11")
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("read", [openai.read_answer, anthropic.read_answer, gemini.read_answer])
def test_malformed(read, body):
    """An answer of another form is malformed, with a message of one line."""
    with pytest.raises(MalformedResponseError) as caught:
        read(body, ASKED)
    assert 0 < len(str(caught.value)) < 300
    assert not isinstance(caught.value.answer, bytes)
    assert "\n" not in str(caught.value)


@pytest.mark.case("T11")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize("what", ["deep", "choices: [null]", 'message: "boo"'])
def test_malformed_over_the_wire(service, what):
    """Through the SDK, it is requested again within the limits and then given up, in one line."""
    body = MALFORMED[what].decode()
    with Loopback(service.answer, lambda *_: Fault(200, body)) as server:
        teacher = teacher_of(service, server, settings=EngineSettings(timeout=30, max_attempts=2))
        (reply,) = ask(teacher, PREFIX)
    assert len(server.requests) == 2
    assert reply.outcomes["failed_requests"] == 1
    assert "cannot be read" in reply.failure
    assert "\n" not in reply.failure


# ---- Text ----


@pytest.mark.case("T9")
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (LONE, "\ufffd"),
        (f" 7{LONE} apples", " 7\ufffd apples"),
        ("\ude00 7", "\ufffd 7"),
        (LONE + LONE + "\ude00", "\ufffd😀"),
        ("7 😀\0", "7 😀\0"),
    ],
)
def test_lone_surrogates(text, clean, tiny_tokenizer):
    """They are replaced in every sample, kept or new, and in the rollouts of a custom teacher."""
    assert clean_text(text) == clean
    answer = json.dumps({**RAW, "choices": [{"text": text}]})
    assert openai.read_answer(answer, ASKED).samples == (Sample(clean),)
    parts = json.dumps({**CLAUDE, "content": [{"type": "text", "text": piece} for piece in text]})
    assert anthropic.read_answer(parts, ASKED).samples[0].text == clean
    assert from_kept(json.loads(json.dumps([[text, "stop", "ok"]]))).samples == (Sample(clean),)
    assert Rollout(text).text == clean
    tiny_tokenizer([Rollout(text).text])


@pytest.mark.case("T9")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    "kept",
    [[[f" 7{LONE}", "length", "ok"]], {"samples": [[f" 7{LONE}", "length", "ok", False]], "model": LONE}],
    ids=["of an earlier version", "of this version"],
)
def test_kept_answers_are_cleaned(tmp_path, kept):
    """A lone surrogate in a journal is replaced when the answer is read from it."""
    request = {"max_tokens": 70, "num_samples": 1, "seed": 3}
    with Loopback(wire.openai) as server, journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        teacher = teacher_of(SERVICES[0], server)
        key = teacher_key(teacher, **request)
        j.record_answer(0, 0, f"{key} 1", 0, [1, kept], Usage(1, 0, 1))
        (reply,) = ask(teacher, PREFIX, ledger=AuditLedger(j, 0, 0), **request)
    assert server.requests == []
    assert reply.rollouts == (Rollout(" 7\ufffd", "length"),)


@pytest.mark.case("T9")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("kept", [None, {}, [], [None], [[7]], [["7", "stop", "lost"]], {"samples": 7}], ids=str)
def test_kept_answers_of_another_form(tmp_path, kept, caplog):
    """They are requested again, with a warning; an answer without samples is one."""
    request = {"max_tokens": 70, "num_samples": 1, "seed": 3}
    with Loopback(wire.openai) as server, journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        teacher = teacher_of(SERVICES[0], server)
        j.record_answer(0, 0, f"{teacher_key(teacher, **request)} 1", 0, [1, kept], Usage(1, 0, 1))
        (reply,) = ask(teacher, PREFIX, ledger=AuditLedger(j, 0, 0), **request)
    assert len(server.requests) == len(reply.rollouts) == (kept != [])
    assert ("cannot be read and is requested again" in caplog.text) == (kept != [])


def teacher_key(teacher, **request):
    """The key under which a journal keeps the answers to a request."""
    keys = []

    class Keys(MemoryLedger):
        def answers(self, request):
            keys.append(request)
            return super().answers(request)

    teacher._kept(PREFIX, SamplingRequest(**request, ledger=Keys()))
    return keys[0]


@pytest.mark.parametrize("samples", [(), (Sample("7"), Sample("", "stop", "empty", True))], ids=["none", "two"])
def test_kept_answers_come_back(samples):
    """What is kept of a response comes back, without its usage."""
    kept = json.loads(json.dumps(to_kept(Response(samples, Usage(1), "m"), 10)))
    assert from_kept(kept) == Response(samples, Usage(), "m")


@pytest.mark.case("T10")
@pytest.mark.parametrize(
    ("content", "sample"),
    [
        ([{"type": "thinking", "thinking": "..."}, {"type": "text", "text": " 7"}], Sample(" 7")),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}], Sample("", "stop", "empty", True)),
        ([{"type": "text", "text": " 7"}, {"type": "output_text", "text": " apples"}], Sample(" 7 apples")),
        ([" 7", {"text": " apples"}], Sample(" 7 apples")),
        ([{"type": "reasoning", "text": "Hm."}, {"type": "image_url", "image_url": {}}, " 7"], Sample(" 7")),
        ([{"type": "refusal", "refusal": "No."}], Sample("No.", "stop", "refused")),
        ([{"type": "text"}, {"type": "text", "text": None}], Sample("", "stop", "empty")),
        ([], Sample("", "stop", "empty")),
    ],
)
def test_content_in_parts(content, sample):
    """The text parts are joined. Parts of reasoning are left out, and count when nothing else is there."""
    body = json.dumps({**CHAT, "choices": [{"message": {"content": content}}]})
    assert openai.read_answer(body, ASKED).samples == (sample,)


@pytest.mark.case("T10", "T19")
@pytest.mark.usefixtures("services")
def test_content_over_the_wire():
    """Through the SDK: parts are joined, and a megabyte is cut."""
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": " 7"}]
    contents = [parts, " 7 apples" * 100_000]

    def answer(number, _):
        message = {"role": "assistant", "content": contents[number]}
        return Fault(200, {**CHAT, "choices": [{"index": 0, "message": message, "finish_reason": "length"}]})

    with Loopback(SERVICES[1].answer, answer) as server:
        teacher = teacher_of(SERVICES[1], server)
        texts = [ask(teacher, PREFIX)[0].rollouts[0].text for _ in contents]
    assert texts == [" 7", contents[1][: 70 * 64]]


@pytest.mark.parametrize(
    ("reason", "sample"),
    [
        ("model_length", Sample(" 7", "length")),  # of Mistral
        ("sensitive", Sample("", "stop", "filtered")),  # this one and the next of Z.ai
        ("network_error", Sample("", "network_error", "interrupted")),
    ],
)
def test_finish_reasons(reason, sample):
    """Reasons of single services that do not end a complete sample."""
    assert read_sample(ASKED, " 7", reason) == sample


@pytest.mark.case("T14")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource", "abort", "ABORT", "cancelled"])
def test_an_answer_that_was_broken_off(reason):
    """It is requested again. Both answers are paid, each once, and only the whole one is kept."""
    broken = wire.openai("/v1/completions", {"model": "m", "prompt": "p", "n": 2})
    broken["choices"][1]["finish_reason"] = reason
    ledger = MemoryLedger()
    with Loopback(wire.openai, [Fault(200, broken)]) as server:
        teacher = teacher_of(SERVICES[0], server)
        (reply,) = ask(teacher, PREFIX, num_samples=2, ledger=ledger)
    assert len(server.requests) == 2
    assert len(reply.rollouts) == 2
    assert counts_of(reply) == {"requests": 2, "retries": 1}
    assert [usage for usage, _ in ledger.payments] == [Usage(20, 12, 6)] * 2
    assert teacher.budget.used == Usage(40, 24, 12)
    assert teacher.budget.forfeited_tokens == 0


@pytest.mark.case("T14")
@pytest.mark.usefixtures("services")
def test_answers_that_are_always_broken_off(tmp_path):
    """They end after the attempts that may be charged, and nothing of them is kept."""
    service = SERVICES[3]

    def answer(path, body):
        whole = service.answer(path, body)
        whole["candidates"][0]["finishReason"] = "MALFORMED_RESPONSE"
        return whole

    with Loopback(answer) as server, journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        (reply,) = ask(teacher_of(service, server), PREFIX, ledger=AuditLedger(j, 0, 0))
        assert j.answers(0, 0) == {}
        assert j.usage().prompt_tokens == 20 * len(server.requests)
    assert len(server.requests) == 6
    assert "broke off its answer, with the finish reason 'MALFORMED_RESPONSE'" in reply.failure


@pytest.mark.case("T19")
@pytest.mark.parametrize("instructed", [False, True])
def test_a_megabyte_of_text(instructed):
    """It is cut to a multiple of what was asked for, in milliseconds."""
    text = "x = 7, " * 150_000
    start = time.process_time()
    sample = read_sample(ASKED._replace(instructed=instructed), text, "stop")
    assert time.process_time() - start < 0.2
    assert sample == Sample(text[: 70 * 64], "length")
    many = {"choices": [{"text": " 7"}] * 100_000}
    assert openai.read_answer(json.dumps(many), ASKED).samples == (Sample(" 7"),) * 2


# ---- Usage ----

WRONG = [math.nan, math.inf, -math.inf, 2**63, 2**53, 10**400, "10", [1], 10.5, 10.0, -1, True, {}, ""]


@pytest.mark.case("T15")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_wrong_usage(name, value):
    """If a number of tokens is none, the service does not say what it used; the samples are read all the same."""
    read, answer = FORMATS[name]
    key = "usageMetadata" if name == "generateContent" else "usage"
    numbers = [path for path in paths(answer) if path[0] == key and path[-1] != "totalTokenCount"]
    assert len(numbers) >= 4
    for path in numbers:
        response = read(json.dumps(changed(answer, path, value)), ASKED)
        is_empty_group = value == {} and isinstance(reduce(lambda inner, key: inner[key], path, answer), dict)
        assert response.usage is None or is_empty_group
        assert len(response.samples) >= 1


@pytest.mark.parametrize(("total", "completion"), [(135, 103), (41, 9), (32, 9), (None, 9)])
def test_reasoning_in_the_total_only(total, completion):
    """The answer of xAI's documentation: 9 tokens of text and 94 of reasoning, which are charged."""
    details = {"completion_tokens_details": {"reasoning_tokens": 94}}
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": total, **details}
    assert openai.read_answer(json.dumps({**CHAT, "usage": usage}), ASKED).usage == Usage(32, 0, completion, 94)


@pytest.mark.case("T15")
def test_counts():
    """The largest number that is exact in every JSON, and missing numbers."""
    usage = {"a": 2**53 - 1, "b": None, "c": {"d": 0, "e": 5}}
    assert counts(usage, "a", "b", "c.d", "c.e", "c.f", "f", "g.h") == [2**53 - 1, 0, 0, 5, 0, 0, 0]
    assert counts(usage, "a.b") is None
    assert counts(None, "a") == [0]
    assert counts([], "a") is None


@pytest.mark.case("T15")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize("value", [math.nan, 2**63], ids=str)
def test_a_budget_with_wrong_usage(service, value, tmp_path):
    """The worst case counts, the budget ends the run, and the journal opens afterwards."""

    def answer(path, body):
        whole = service.answer(path, body)
        usage = whole["usageMetadata" if "usageMetadata" in whole else "usage"]
        usage.update({name: value for name, number in usage.items() if isinstance(number, int)})
        return whole

    budget = Budget(max_usd=1.0, max_tokens=9_000, price=Price(1.0, 2.0))
    with Loopback(answer) as server:
        with journal(tmp_path) as j:
            j.record_trajectories(0, [trajectory()])
            teacher = teacher_of(service, server, budget=budget)
            with pytest.raises(BudgetError):
                ask(teacher, *[Prefix("3 + 4", " 7" * n) for n in range(40)], ledger=AuditLedger(j, 0, 0), seed=1)
        with journal(tmp_path) as j:
            used = j.usage()
    assert 2 <= len(server.requests) < 20
    assert used.prompt_tokens + used.completion_tokens == budget.tokens_spent == budget.forfeited_tokens <= 9_000


@pytest.mark.case("T15")
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 10.5, "10", None, 2**63])
def test_wrong_usage_of_a_custom_teacher(value):
    """It is refused where it is made, in one line: neither budget nor journal can hold it."""
    with pytest.raises(TeacherError, match=r"completion_tokens=.*not a whole number"):
        Usage(10, 0, value)


def test_integers_of_other_libraries():
    """They are counts, too, and become Python's."""
    import numpy as np

    usage = Usage(np.int64(10), completion_tokens=np.int32(3))
    assert usage == Usage(10, 0, 3)
    assert type(usage.prompt_tokens) is int


# ---- Poor answers ----

THOUGHT = "<think>\nLet me see. 3 + 4 = 7.\n</think>"


@pytest.mark.case("P1")
@pytest.mark.parametrize("instructed", [False, True])
@pytest.mark.parametrize(
    ("text", "sample"),
    [
        (THOUGHT + " is 7", Sample(" is 7", reasoned=True)),
        ("\n" + THOUGHT, Sample("", "stop", "empty", True)),
        ("<think>Let me", Sample("", "stop", "empty", True)),
        ("<thinking>Hm.</thinking> is 7", Sample(" is 7", reasoned=True)),
        ("[THINK]Hm.[/THINK] is 7", Sample(" is 7", reasoned=True)),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|> is 7", Sample(" is 7", reasoned=True)),
        (" is 7, I <think>", Sample(" is 7, I <think>")),
    ],
)
def test_reasoning_in_the_text(text, sample, instructed):
    """Reasoning in front of a continuation is removed and counted."""
    assert read_sample(ASKED._replace(instructed=instructed), text, "stop") == sample


@pytest.mark.case("P1")
@pytest.mark.parametrize("prefix", ["", "\n", "<think>\nWe add. </think> Now I <think> again:\n"])
def test_reasoning_that_the_student_writes(prefix):
    """A student that reasons is continued by a teacher that does."""
    asked = ASKED._replace(prefix=Prefix("3 + 4", prefix))
    assert read_sample(asked, THOUGHT, "stop") == Sample(THOUGHT)


def chat(**message):
    """A function that answers a chat with a message."""

    def answer(path, body):
        whole = wire.openai(path, body)
        for choice in whole["choices"]:
            choice["message"] = {"role": "assistant", "content": None, **message}
        return whole

    return answer


@pytest.mark.case("P1")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("message", "outcomes", "rollouts"),
    [
        ({"content": THOUGHT + " is 7"}, {"reasoned": 3}, 3),
        ({"content": "", "reasoning_content": "Hm."}, {"reasoned": 3, "empty": 3}, 0),
        ({"reasoning": "Hm."}, {"reasoned": 3, "empty": 3}, 0),
        ({"content": " is 7", "reasoning_content": "Hm."}, {}, 3),
        ({"content": ""}, {"empty": 3}, 0),
    ],
)
def test_reasoning_is_counted_and_warned_about_once(message, outcomes, rollouts, caplog):
    """The warning names the switch."""
    with Loopback(chat(**message)) as server:
        teacher = teacher_of(SERVICES[0], server, continuation="continue_final")
        replies = ask(teacher, PREFIX, PREFIX, num_samples=3)
    for reply in replies:
        assert counts_of(reply) == {"requests": 1, "retries": 0, **outcomes}
        assert len(reply.rollouts) == rollouts
    warnings = [message for message in caplog.messages if "the model reasons before it answers" in message]
    assert len(warnings) == ("reasoned" in outcomes)
    assert all("teacher_chat_template_kwargs" in warning for warning in warnings)


SORRY = "I'm sorry, but I can't assist with that."


@pytest.mark.case("P2")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("continuation", ["raw", "continue_final", "instruct"])
def test_a_refusal_in_words(continuation):
    """It is no rollout in any continuation, and its words are quoted."""

    def answer(path, body):
        whole = wire.openai(path, body)
        whole["choices"][0] |= {"text": SORRY} if "text" in whole["choices"][0] else {"message": {"content": SORRY}}
        return whole

    with Loopback(answer) as server:
        (reply,) = ask(teacher_of(SERVICES[0], server, continuation=continuation), PREFIX)
    assert reply.rollouts == ()
    assert reply.outcomes["refused"] == 1
    assert SORRY in reply.failure


@pytest.mark.case("P2")
@pytest.mark.parametrize(
    ("prefix", "text", "outcome"),
    [
        ("We add 3 and 4.", "\n\nI am sorry, I cannot help with this request.", "refused"),
        ("We add 3 and 4.", " Sorry, but I'm not able to comply.", "refused"),
        ("We add 3 and 4.", " I apologize, but I won't assist you.", "refused"),
        ("We add 3 and 4.", " I'm sorry, I can't divide by 0.", "ok"),
        ("He said:", " \"I'm sorry, but I can't help.\"", "ok"),
        ("We add 3 and 4.", " I can't help thinking of 7.", "ok"),
        ("", SORRY, "ok"),
    ],
)
def test_refusals_that_are_safe_to_recognize(prefix, text, outcome):
    """Only a whole refusal within an answer counts: the student may learn to refuse at the beginning of one."""
    sample = read_sample(ASKED._replace(prefix=Prefix("3 + 4", prefix)), text, "stop")
    assert sample.outcome == outcome


# ---- The served model, and prompts that are cut ----


@pytest.mark.case("P4")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_the_served_model(service, caplog, tmp_path):
    """It is logged once, warned about when it changes, and kept."""
    caplog.set_level(logging.INFO)
    names = iter(["model-1", "model-1", "model-2\n", "model-1", "model-3"])

    def answer(path, body):
        return {**service.answer(path, body), "model": (name := next(names)), "modelVersion": name}

    with Loopback(answer) as server, journal(tmp_path) as j:
        j.record_trajectories(0, [trajectory()])
        teacher = teacher_of(service, server, settings=EngineSettings(max_concurrency=1))
        ledger = AuditLedger(j, 0, 0)
        replies = ask(teacher, *[Prefix("3 + 4", " 7" * n) for n in range(4)], ledger=ledger, seed=1)
        kept = [answer[0][1]["model"] for answer in j.answers(0, 0).values()]
    assert sorted(kept) == ["model-1", "model-1", "model-1", "model-2\n"]
    assert [reply.models for reply in replies] == [("model-1",), ("model-1",), ("model-2\n",), ("model-1",)]
    lines = [message for message in caplog.messages if "model-" in message]
    assert len(lines) == 2
    assert "answers with the model 'model-1'" in lines[0]
    assert r"has changed from 'model-1' to 'model-2\n'" in lines[1]


@pytest.mark.case("P5")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("tokens", "warns"),
    [
        (lambda characters: min(characters // 4, 100), True),
        (lambda characters: max(100 - characters // 4, 20), True),
        (lambda characters: 20 + characters // 1000, False),
        (lambda characters: 20 + characters // 4, False),
    ],
    ids=["a limit", "a shift", "few tokens", "all"],
)
def test_prompts_that_are_cut(tokens, warns, caplog):
    """A server whose prompt tokens stop growing with the prefix is named, once."""

    def answer(path, body):
        whole = wire.openai(path, body)
        whole["usage"]["prompt_tokens"] = tokens(len(body["prompt"]))
        return whole

    prefixes = [Prefix("3 + 4", "word" * 250 * n) for n in range(5)]
    with Loopback(answer) as server:
        teacher = teacher_of(SERVICES[0], server)
        ask(teacher, *prefixes, num_samples=2)
        ask(teacher, *prefixes, num_samples=2)
    assert sum("cuts long prompts silently" in message for message in caplog.messages) == warns


@pytest.mark.case("P5")
@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("completions", [["7", "7" * 200], ["7" * 600, "8" * 1200], ["7", "7" + " " * 600]])
def test_prompts_that_need_not_grow(completions, caplog):
    """A few more characters, another text and white space at the end say nothing."""
    with Loopback(wire.openai) as server:
        ask(teacher_of(SERVICES[0], server), *[Prefix("3 + 4", text) for text in completions])
    assert "cuts long prompts" not in caplog.text


@pytest.mark.case("P3")
@pytest.mark.usefixtures("services")
def test_requests_to_claude_differ():
    """N requests for one prefix have N bodies, and the same prompt: a cache of prompts serves them."""
    with Loopback(wire.anthropic) as server:
        ask(teacher_of(SERVICES[2], server), PREFIX, num_samples=5, seed=7)
    assert len({json.dumps(body, sort_keys=True) for body in server.bodies}) == 5
    for body in server.bodies:
        assert list(body.pop("metadata")) == ["user_id"]
    assert len({json.dumps(body, sort_keys=True) for body in server.bodies}) == 1
