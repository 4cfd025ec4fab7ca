# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Fields of a request: what a service refuses is left out from then on, and what a user adds is sent."""

import json
import logging

import pytest

from omniopd_trl import OmniOPDConfig
from omniopd_trl.errors import ConfigError, TeacherError
from omniopd_trl.teachers import TeacherOptions, load_teacher
from omniopd_trl.teachers.base import Prefix
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.failures import ServiceError
from omniopd_trl.teachers.remote.fields import refusal
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import SERVICES, ask, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("services")

PREFIX = Prefix("3 + 4", " =")

LLAMA_CPP_PYTHON = (
    "[{'type': 'greater_than_equal', 'loc': ('body', 'top_k'), 'msg': 'Input should be greater than or equal to 0', "
    "'input': -1, 'ctx': {'ge': 0}}]"
)
VALIDATION = (
    "1 validation error for CreateCompletionRequest\ntop_k\n  Input should be greater than or equal to 0 "
    "[type=greater_than_equal, input_value=-1, input_type=int]\n    For further information visit the documentation"
)

# Wordings of services, and the fields that they refuse.
REFUSED_FIELDS = [
    (400, "Unrecognized request argument supplied: top_k", None, {"top_k"}),
    (
        400,
        "Unrecognized request arguments supplied: min_p, repetition_penalty, top_k",
        None,
        {"min_p", "repetition_penalty", "top_k"},
    ),
    (400, "property 'top_k' is unsupported", None, {"top_k"}),
    (400, "body.top_k: property 'body.top_k' is unsupported", "top_k", {"top_k"}),
    (422, "Input validation error: `top_p` must be > 0.0 and < 1.0", None, {"top_p"}),
    (500, LLAMA_CPP_PYTHON, None, {"top_k"}),
    (500, VALIDATION, None, {"top_k"}),
    (400, "Argument not supported on this model: presencePenalty", None, {"presence_penalty"}),
    (400, 'Invalid JSON payload received. Unknown name "repetition_penalty": Cannot find field.', None, None),
    (400, "extraneous key [min_p] is not permitted", None, {"min_p"}),
    (
        422,
        "[{'type': 'extra_forbidden', 'loc': ['body', 'seed'], 'msg': 'Extra inputs are not permitted'}]",
        None,
        {"seed"},
    ),
    (400, "litellm.UnsupportedParamsError: openai does not support parameters: ['top_k', 'min_p']", None, None),
    (400, "Unsupported parameter", "frequency_penalty", {"frequency_penalty"}),
    (400, "`temperature` and `top_p` cannot both be specified for this model.", None, {"top_p"}),
    (
        400,
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "max_tokens",
        {"max_tokens"},
    ),
    (400, "max_tokens is not supported, use max_completion_tokens", None, {"max_tokens"}),
    (400, "Unrecognized request argument supplied: max_completion_tokens", None, {"max_completion_tokens"}),
    (400, "Unrecognized request argument supplied: reasoning_effort", None, {"reasoning_effort"}),
    (400, "Unsupported parameter: 'temperature'", "temperature", {"temperature"}),
]


@pytest.mark.case("F1", "F2")
@pytest.mark.parametrize(("status", "message", "param", "fields"), REFUSED_FIELDS)
def test_refused_fields_are_recognized(status, message, param, fields):
    """In the wordings of many services, by name, whatever the spelling."""
    failure = refusal(ServiceError(status, message, param=param))
    assert failure is not None
    assert failure.kind == "no_field"
    if fields is not None:
        assert set(failure.fields) == fields


@pytest.mark.case("F3")
@pytest.mark.parametrize(
    ("status", "message", "param"),
    [
        (400, "Only one completion choice is allowed", None),
        (500, "Only one completion choice is allowed", None),
        (500, "n_cmpl cannot be greater than the number of slots, please increase it with `-np`", None),
        (400, "Unsupported value: 'n'", "n"),
        (400, "'n' : number must be at most 1", None),
        (400, "Unrecognized request argument supplied: n", None),
        (400, "property 'n' is unsupported", None),
        (400, "n must be 1 when using greedy sampling, got 3.", None),
        (400, "n > 1 is not supported", None),
        (422, "multiple choices are not supported", None),
        (400, "Multiple candidates is not enabled for this model", None),
        (400, "Only one candidate can be specified in the current model", None),
        (
            422,
            "[{'type': 'less_than_equal', 'loc': ('body', 'n'), 'msg': 'Input should be less than or equal to 1'}]",
            None,
        ),
    ],
)
def test_refused_samples_are_recognized(status, message, param):
    """A service that takes one sample per request says it in many ways."""
    assert refusal(ServiceError(status, message, param=param)).kind == "one_sample"


@pytest.mark.case("F1")
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 1024 tokens, with max_tokens=70 and n=10."),
        (400, "max_tokens must be at least 1, got -17"),
        (400, "max_tokens is too large: 70000. This model supports at most 16384 completion tokens."),
        (400, "Content Exists Risk"),
        (429, "Rate limit reached for top_k requests"),
        (401, "Unsupported parameter: 'top_k'"),
        (500, "Internal server error in the sampling of seed 7"),
        (500, "Invalid temperature: the probability tensor contains inf"),
        (500, "The prefill of the last role failed: out of memory"),
        (500, "Only the thinking budget of this worker is exhausted"),
        (400, "Invalid prompt: your prompt was flagged"),
        (400, "x" * 1_000_000 + " unsupported top_k"),
    ],
)
def test_other_errors_are_not_refusals(status, message):
    """What is not about a field is left to the classification of errors."""
    assert refusal(ServiceError(status, message)) is None


def strict(refused, status=400, words="Unrecognized request argument supplied: {}"):
    """Faults of a service that refuses fields, one at a time."""

    def fault(_, body):
        found = next((field for field in refused if field in body), None)
        return None if found is None else Fault(status, wire.openai_error(status, words.format(found)))

    return fault


@pytest.mark.case("F1")
@pytest.mark.parametrize("continuation", ["raw", "instruct"])
@pytest.mark.parametrize("max_attempts", [None, 1])
def test_refused_fields_are_left_out(continuation, max_attempts, caplog):
    """One at a time, with one warning each; refusals are not attempts, cost nothing and are not repeated."""
    refused = ["top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "top_p"]
    with Loopback(wire.openai, strict(refused)) as server:
        settings = EngineSettings(timeout=5, max_attempts=max_attempts)
        teacher = remote_teacher(
            "openai:own", base_url=server.url + "/v1", continuation=continuation, settings=settings
        )
        (first,) = ask(teacher, PREFIX, num_samples=2, seed=1)
        (second,) = ask(teacher, PREFIX, num_samples=2, seed=1)
    assert len(first.rollouts) == len(second.rollouts) == 2
    assert len(server.requests) == len(refused) + 2
    assert not set(refused) & set(server.bodies[-1])
    assert server.bodies[-1]["temperature"] == 1.0
    warnings = [message for message in caplog.messages if "left out" in message]
    assert len(warnings) == len(refused)
    assert "top_k is left out; the service's own limit applies" in warnings[0]
    assert teacher.budget.forfeited_tokens == 0


@pytest.mark.case("F1")
def test_several_fields_at_once(caplog):
    """A service that names all of them is asked twice, and warned about once, however many requests are in flight."""
    message = "Unrecognized request arguments supplied: frequency_penalty, min_p, presence_penalty, top_k"
    refusing = Fault(400, wire.openai_error(400, message))
    with Loopback(wire.openai, lambda _, body: refusing if "min_p" in body else None, delay=0.2) as server:
        teacher = remote_teacher("openai:own", base_url=server.url + "/v1")
        replies = ask(teacher, *[Prefix("3 + 4", " =" * n) for n in range(4)])
        ask(teacher, PREFIX)
    assert all(len(reply.rollouts) == 1 for reply in replies)
    assert len(server.requests) == 4 + 4 + 1
    assert sum("left out" in message for message in caplog.messages) == 1


@pytest.mark.case("F1")
@pytest.mark.parametrize("message", [LLAMA_CPP_PYTHON, VALIDATION])
@pytest.mark.parametrize("continuation", ["raw", "instruct"])
def test_llama_cpp_python(message, continuation, caplog):
    """A server that knows `top_k` from 0 on gets 0; as `vllm:`, whose -1 it answers with a 500, it gets none."""

    def fault(_, body):
        return Fault(500, wire.openai_error(500, message)) if body.get("top_k", 0) < 0 else None

    with Loopback(wire.openai, fault) as server:
        for name in ("openai:own", "vllm:own"):
            teacher = remote_teacher(name, base_url=server.url + "/v1", continuation=continuation)
            (reply,) = ask(teacher, PREFIX)
            assert len(reply.rollouts) == 1
    assert [body.get("top_k") for body in server.bodies] == [0, -1, None]


@pytest.mark.case("F1")
def test_values_that_the_user_chose_are_not_left_out():
    """`top_p: 1` has no effect and can be left out; 0.01 cannot, since the rollouts would not be as configured."""
    fault = Fault(
        422, {"error": "Input validation error: `top_p` must be > 0.02 and < 1.0", "error_type": "validation"}
    )

    def outside(_, body):
        return fault if not 0.02 < body.get("top_p", 0.5) < 1 else None

    with Loopback(wire.openai, outside) as server:
        teacher = remote_teacher("openai:own", base_url=server.url + "/v1")
        (reply,) = ask(teacher, PREFIX)
        other = remote_teacher("openai:own", base_url=server.url + "/v1")
        with pytest.raises(TeacherError, match=r"top_p` must be > 0\.02"):
            ask(other, PREFIX, top_p=0.01)
    assert len(reply.rollouts) == 1
    assert teacher.capabilities.refused == {"top_p"}
    assert other.capabilities.refused == frozenset()


@pytest.mark.case("F1")
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_every_provider_learns(service):
    """Each has a field that it may refuse, and is asked without it from then on."""
    spelled = {"gemini": "seed", "anthropic": "temperature"}.get(service.name.partition(":")[0], "seed")

    def fault(_, body):
        message = f"Unsupported parameter: '{spelled}' is not supported with this model."
        return Fault(400, service.error(400, message)) if f'"{spelled}"' in json.dumps(body) else None

    with Loopback(service.answer, fault) as server:
        teacher = teacher_of(service, server)
        for _ in range(2):
            (reply,) = ask(teacher, PREFIX, seed=3)
            assert len(reply.rollouts) == 1
    assert len(server.requests) == 3


@pytest.mark.case("F1")
def test_a_field_that_the_user_insists_on(caplog):
    """What `teacher_extra_body` sets is not left out: the service's words end the run."""
    with Loopback(wire.openai, strict(["top_k"])) as server:
        teacher = remote_teacher("openai:own", base_url=server.url + "/v1", extra_body={"top_k": 40})
        with pytest.raises(TeacherError, match="Unrecognized request argument supplied: top_k"):
            ask(teacher, PREFIX)
    assert [body["top_k"] for body in server.bodies] == [40, 40]


@pytest.mark.case("F2")
@pytest.mark.parametrize(
    ("refused", "words", "used"),
    [
        ("max_tokens", "Unsupported parameter: '{}' is not supported. Use 'max_completion_tokens' instead.", 1),
        ("max_completion_tokens", "Unrecognized request argument supplied: {}", 0),
        ("max_tokens", "{} is not supported, use max_completion_tokens", 1),
    ],
)
def test_the_other_limit(refused, words, used, monkeypatch, caplog):
    """`max_tokens` becomes `max_completion_tokens` where it is refused, and the reverse."""
    names = ("max_tokens", "max_completion_tokens")
    if refused == names[1]:
        monkeypatch.setattr("omniopd_trl.teachers.providers.openai._dialect", lambda *_: "openai")
    with Loopback(wire.openai, strict([refused], words=words)) as server:
        teacher = remote_teacher("openai:gpt-6-luna", base_url=server.url + "/v1")
        for _ in range(2):
            (reply,) = ask(teacher, PREFIX)
    assert len(reply.rollouts) == 1
    assert [[name for name in names if name in body] for body in server.bodies] == [
        [refused],
        [names[used]],
        [names[used]],
    ]
    assert server.bodies[-1][names[used]] == 70
    assert f"{names[used]} is sent instead" in caplog.text


@pytest.mark.case("F2")
def test_neither_limit():
    """A server that takes neither is an error in its words, not an endless exchange."""
    with Loopback(wire.openai, strict(["max_tokens", "max_completion_tokens"])) as server:
        with pytest.raises(TeacherError, match="Unrecognized request argument supplied: max_"):
            ask(remote_teacher("openai:own", base_url=server.url + "/v1"), PREFIX)
    assert len(server.requests) <= 3


@pytest.mark.case("F3")
@pytest.mark.parametrize(("status", "slots"), [(400, 1), (500, 1), (500, 4)])
def test_one_sample_is_learned_from_a_refusal(status, slots):
    """Of the first request; all of its samples arrive, each by a request of its own."""

    def fault(_, body):
        message = f"n_cmpl cannot be greater than the number of slots ({slots})"
        return Fault(status, wire.openai_error(status, message)) if body.get("n", 1) > slots else None

    with Loopback(wire.openai, fault) as server:
        teacher = remote_teacher("vllm:own", base_url=server.url + "/v1", continuation="raw")
        (reply,) = ask(teacher, PREFIX, num_samples=10)
    assert len(reply.rollouts) == 10
    assert [body.get("n", 1) for body in server.bodies] == [10] + [1] * 10


@pytest.mark.case("F3", "F4")
@pytest.mark.parametrize(
    ("status", "message", "slots"),
    [
        (400, "Only one completion choice is allowed", 1),
        (500, "Only one completion choice is allowed", 1),
        (500, "n_cmpl cannot be greater than the number of slots, please increase it with `-np`", 4),
    ],
)
def test_one_sample_is_learned_at_the_probe(status, message, slots):
    """The probe asks for the N of a chunk, so a limit on `n` is met before anything is generated."""

    def fault(_, body):
        return Fault(status, wire.openai_error(status, message)) if body.get("n", 1) > slots else None

    with Loopback(wire.openai, fault) as server:
        options = TeacherOptions(teacher_base_url=server.url + "/v1", teacher_continuation="raw", num_rollouts=10)
        teacher = load_teacher("vllm:own", options)
        teacher.probe("3 + 4")
        assert server.bodies[0]["n"] == 10
        assert teacher.capabilities.samples_per_request == 1
        probed = len(server.requests)
        (reply,) = ask(teacher, PREFIX, num_samples=10)
    assert len(reply.rollouts) == 10
    assert len(server.requests) == probed + 10


@pytest.mark.case("F4")
@pytest.mark.parametrize(
    ("name", "asked"), [("vllm:own", [100 - 36]), ("openai:own", [8]), ("openai:deepseek-chat", [None])]
)
def test_probe_stays_within_a_request(name, asked):
    """Of a large N the probe asks for what one request holds."""
    with Loopback(wire.openai) as server:
        load_teacher(name, TeacherOptions(teacher_base_url=server.url + "/v1", num_rollouts=100)).probe("3 + 4")
    assert [body.get("n") for body in server.bodies] == asked


class TestExtra:
    """`teacher_extra_body` and `teacher_extra_headers`."""

    @pytest.mark.case("F5")
    @pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
    def test_they_reach_every_provider(self, service):
        """In each request, beside the fields of the teacher."""
        extra = {"safetySettings": [{"category": "x"}], "generationConfig": {"topK": 7}}
        if not service.name.startswith("gemini"):
            extra = {"top_k": 7, "provider": {"order": ["a"]}}
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server, extra_body=extra, extra_headers={"X-Title": "distillation"})
            teacher.probe("3 + 4")
            ask(teacher, PREFIX)
        for request in server.requests:
            assert request.headers["x-title"] == "distillation"
            for name, value in extra.items():
                if isinstance(value, dict):
                    assert value.items() <= request.body[name].items()
                else:
                    assert request.body[name] == value
        assert len(server.requests) >= 2

    @pytest.mark.case("F5")
    def test_null_leaves_a_field_out(self):
        """From the first request on, and nothing is sent in its place."""
        with Loopback(wire.openai) as server:
            extra = {"top_k": None, "seed": None, "chat_template_kwargs": None}
            ask(remote_teacher("vllm:own", base_url=server.url + "/v1", extra_body=extra), PREFIX, seed=1)
        assert not set(extra) & set(server.bodies[0])
        assert server.bodies[0]["min_p"] == 0.0

    @pytest.mark.case("F5")
    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ({"extra_body": {"temperature": 0.5}}, "'temperature'.*Set it with `teacher_temperature`"),
            ({"extra_body": {"n": 4}}, "'n'.*`num_rollouts`"),
            ({"extra_body": {"max_tokens": None}}, "'max_tokens'.*`chunk_length`"),
            ({"extra_body": {"stream": True}}, "'stream'.*Leave it out"),
            ({"extra_body": "top_k=4"}, "must be a dictionary"),
            ({"extra_headers": {"X-Number": 7}}, "must be a text.*is a int"),
            ({"extra_headers": {"X-Title": "d\u2019accord"}}, "ASCII"),
            ({"extra_headers": {"X Title": "x"}}, "not the name of a header"),
            ({"extra_headers": {"X-Title": "a\r\nHost: b"}}, "must be a text"),
        ],
    )
    def test_refused(self, extra, words):
        """What the teacher sets itself, and what no request can hold, is one line when the teacher is created."""
        with pytest.raises(ConfigError, match=words) as caught:
            remote_teacher("openai:own", **extra)
        assert "\n" not in str(caught.value)

    @pytest.mark.case("F5")
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("teacher_extra_headers", {"Authorization": "Basic abc123"}),
            ("teacher_extra_headers", {"Ocp-Apim-Subscription-Key": "0a1b2c3d4e5f"}),
            ("teacher_extra_headers", {"Cookie": "session=1"}),
            ("teacher_extra_headers", {"X-Trace": "Bearer 4Fz8QmTnW2bLxVYc"}),
            ("teacher_extra_body", {"api_key": "4Fz8QmTnW2bLxVYc"}),
            ("teacher_extra_body", {"note": "sk-proj-4Fz8QmTnW2bLxVYc"}),
            ("teacher_extra_body", '{"metadata": {"user_token": "x", "access_token": "4Fz8QmTnW2bLxVYc"}}'),
        ],
    )
    def test_no_secrets(self, option, value, tmp_path):
        """They are written into every checkpoint: refused with the variable that takes a key, and not shown."""
        with pytest.raises(ConfigError, match=f"`{option}.*environment variable VLLM_API_KEY") as caught:
            OmniOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **{option: value})
        assert "4Fz8QmTnW2bLxVYc" not in str(caught.value)

    @pytest.mark.case("F5")
    def test_from_the_configuration(self, tmp_path):
        """As dictionaries or as JSON on the command line, through the trainer's options."""
        args = OmniOPDConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            teacher_extra_body='{"top_k": 40}',
            teacher_extra_headers={"X-Title": "distillation"},
        )
        teacher = load_teacher("openai:gpt-6-luna", TeacherOptions.of(args))
        assert (teacher.extra_body, teacher.extra_headers) == ({"top_k": 40}, {"X-Title": "distillation"})

    @pytest.mark.case("F5")
    def test_without_effect(self, caplog):
        """A local or scripted teacher reads neither, and says so."""
        logging.getLogger("omniopd_trl").propagate = True
        load_teacher("scripted", TeacherOptions(teacher_extra_body={"top_k": 40}))
        assert "teacher_extra_body: without effect" in caplog.text
