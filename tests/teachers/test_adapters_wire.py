# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What goes over the wire: the real SDKs against servers that speak the providers' formats."""

import asyncio
import json

import pytest

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.audits.event_loop import EventLoopThread, release
from omniopd_trl.errors import DataError, TeacherError
from omniopd_trl.teachers import ScriptedTeacher
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.remote.answers import without_common_space
from omniopd_trl.teachers.remote.settings import EngineSettings
from tests.support.loopback import Fault, Loopback, wire
from tests.support.loopback.teachers import KEYS, SERVICES, ask, counts_of, services, teacher_of  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("services")

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
PREFIX = Prefix(QUESTION, "First we add 3 and ")
VLLM, OPENAI, CLAUDE, GEMINI = SERVICES


def exchange(name, prefix=PREFIX, answer=None, path="/v1", **kwargs):
    """Ask a teacher once; returns its reply and what the server got."""
    options = {key: kwargs.pop(key) for key in ("continuation", "tokenizer", "chat_template_kwargs") if key in kwargs}
    with Loopback(answer or wire.openai) as server:
        teacher = remote_teacher(name, base_url=server.url + path, settings=EngineSettings(timeout=5), **options)
        (reply,) = ask(teacher, prefix, **kwargs)
    return reply, server.requests


PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "3 + 4?"}]},
]
JOINED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\n3 + 4?"}]


@pytest.mark.parametrize("continuation", [None, "instruct"])
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_content_parts(service, continuation, tiny_teacher_tokenizer):
    """Text in parts is sent as the same text in one piece would be, to every service in every form."""
    sent = []
    for messages in (PARTS, JOINED):
        with Loopback(service.answer) as server:
            options = {"tokenizer": tiny_teacher_tokenizer, "continuation": continuation}
            ask(teacher_of(service, server, **options), Prefix(messages, "It is"))
        sent.append(server.bodies)
    assert sent[0] == sent[1]
    assert "'type': 'text'" not in str(sent[0]) or service.name.startswith("anthropic")


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_other_keys_of_messages(service, tiny_teacher_tokenizer):
    """Services get roles and contents. Claude and Gemini have no developer: its message is one of the system."""
    role = "developer" if service in (CLAUDE, GEMINI) else "system"
    keyed = [{**QUESTION[0], "role": role, "name": None}, {**QUESTION[1], "name": "Tom", "id": 3}]
    sent = []
    for messages in (keyed, QUESTION):
        with Loopback(service.answer) as server:
            ask(teacher_of(service, server, tokenizer=tiny_teacher_tokenizer), Prefix(messages, "It is"))
        sent.append(server.bodies)
    assert sent[0] == sent[1]


@pytest.mark.parametrize("part", [{"type": "image", "image": "x.png"}, {"type": "text", "text": None}, "text", {}])
def test_parts_that_are_no_text(part):
    """Nothing is turned into the words of a Python object in silence."""
    with pytest.raises(DataError, match="teachers read text only"):
        Prefix([{"role": "user", "content": [part]}])


class TestVLLM:
    """`vllm:`, raw and through the chat."""

    def test_raw_body(self, tiny_teacher_tokenizer):
        """The template is applied here, nothing is added there, and every sampling field is set."""
        reply, (sent,) = exchange(
            "vllm:teacher", num_samples=10, tokenizer=tiny_teacher_tokenizer, temperature=0.7, top_p=0.9
        )
        assert sent.path == "/v1/completions"
        assert sent.body == {
            "model": "teacher",
            "prompt": "<s>[SYSTEM] Be brief. [END][USER] What is 3 + 4? [END][ASSISTANT] First we add 3 and ",
            "max_tokens": 70,
            "n": 10,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "add_special_tokens": False,
        }
        assert [r.text for r in reply.rollouts] == [wire.text_of(sent.body["prompt"], i) for i in range(10)]
        assert {r.finish_reason for r in reply.rollouts} == {"length"}
        assert reply.usage == Usage(20, 12, 30, 0)
        assert reply.failure is None
        assert sent.headers["authorization"] == f"Bearer {KEYS['VLLM_API_KEY']}"

    def test_plain_text_needs_no_tokenizer(self):
        """A plain-text prompt is sent as it is; the server begins it as it begins every text."""
        _, (sent,) = exchange("vllm:teacher", Prefix("3 + 4", " ="))
        assert sent.body["prompt"] == "3 + 4 ="
        assert "add_special_tokens" not in sent.body
        assert "n" not in sent.body

    def test_template_arguments(self, tiny_teacher_tokenizer):
        """Thinking is off unless the recipe says otherwise, here and on the server."""
        tiny_teacher_tokenizer.chat_template, before = "{{ enable_thinking }}:", tiny_teacher_tokenizer.chat_template
        try:
            _, (off,) = exchange("vllm:teacher", tokenizer=tiny_teacher_tokenizer)
            _, (on,) = exchange(
                "vllm:teacher", tokenizer=tiny_teacher_tokenizer, chat_template_kwargs={"enable_thinking": True}
            )
        finally:
            tiny_teacher_tokenizer.chat_template = before
        assert off.body["prompt"] == "False:First we add 3 and "
        assert on.body["prompt"] == "True:First we add 3 and "
        _, (sent,) = exchange("vllm:teacher", continuation="continue_final", chat_template_kwargs={"style": "terse"})
        assert sent.body["chat_template_kwargs"] == {"enable_thinking": False, "style": "terse"}

    def test_continue_final_body(self):
        """The assistant's turn stays open; with nothing to continue, a new one is opened."""
        _, (sent,) = exchange("vllm:teacher", continuation="continue_final", num_samples=3, seed=5)
        assert sent.path == "/v1/chat/completions"
        assert sent.body["messages"] == [*QUESTION, {"role": "assistant", "content": "First we add 3 and "}]
        assert (sent.body["add_generation_prompt"], sent.body["continue_final_message"]) == (False, True)
        assert (sent.body["n"], sent.body["max_tokens"], sent.body["top_k"]) == (3, 70, -1)
        assert isinstance(sent.body["seed"], int)
        _, (sent,) = exchange("vllm:teacher", Prefix(QUESTION), continuation="continue_final")
        assert sent.body["messages"] == QUESTION
        assert "continue_final_message" not in sent.body

    def test_more_than_64_samples(self):
        """N is split over requests of at most 64, which sample from different seeds."""
        reply, sent = exchange("vllm:teacher", Prefix("3 + 4"), num_samples=100, seed=1)
        assert sorted(r.body["n"] for r in sent) == [36, 64]
        assert len({r.body["seed"] for r in sent}) == 2
        assert len(reply.rollouts) == 100

    @pytest.mark.parametrize("continuation", ["raw", "continue_final", "instruct"])
    def test_greedy_samples_are_one(self, continuation):
        """vLLM refuses several samples without chance: one is asked for, stands for all, and is counted once."""
        refusal = {"message": "n must be 1 when using greedy sampling, got 3.", "type": "BadRequestError"}
        refusal = {"error": {**refusal, "param": None, "code": 400}}

        def as_vllm(_, body):
            return Fault(400, refusal) if body["temperature"] == 0 and body.get("n", 1) > 1 else None

        with Loopback(wire.openai, as_vllm) as server:
            teacher = remote_teacher("vllm:teacher", base_url=server.url + "/v1", continuation=continuation)
            (greedy,) = ask(teacher, Prefix("3 + 4", " ="), num_samples=3, temperature=0.0)
            (sampled,) = ask(teacher, Prefix("3 + 4", " ="), num_samples=3, temperature=0.1)
        first, second = server.bodies
        assert (first["temperature"], first.get("n", 1)) == (0.0, 1)
        assert (second["temperature"], second["n"]) == (0.1, 3)
        assert greedy.rollouts == sampled.rollouts[:1] * 3
        assert len(set(sampled.rollouts)) == 3
        assert (greedy.usage, sampled.usage) == (Usage(20, 12, 3, 0), Usage(20, 12, 9, 0))
        assert (greedy.outcomes["requests"], greedy.failure) == (1, None)

    def test_no_tokenizer(self, tmp_path):
        """A tokenizer that cannot be loaded names the option that sets it."""
        with pytest.raises(DataError, match="teacher_tokenizer_name_or_path"):
            exchange(f"vllm:{tmp_path}")

    def test_no_key_needed(self, monkeypatch):
        """A self-hosted server works without a key."""
        monkeypatch.delenv("VLLM_API_KEY")
        reply, _ = exchange("vllm:teacher", Prefix("3 + 4"))
        assert reply.rollouts


class TestOpenAI:
    """`openai:`, OpenAI itself and servers that speak its language."""

    @pytest.fixture
    def own(self, monkeypatch):
        """The loopback server taken for OpenAI itself."""
        monkeypatch.setattr("omniopd_trl.teachers.providers.openai._dialect", lambda *_: "openai")

    @pytest.mark.usefixtures("own")
    def test_instructed_body(self):
        """OpenAI's own fields and no others, reasoning off, and a repaired answer."""

        def answer(path, body):
            reply = wire.openai(path, body)
            reply["choices"][0]["message"]["content"] = "and 4, which is 7"
            return reply

        reply, (sent,) = exchange("openai:gpt-6-luna", answer=answer, num_samples=2)
        assert sent.path == "/v1/chat/completions"
        messages = sent.body.pop("messages")
        assert [message["role"] for message in messages] == ["system", "user"]
        assert "First we add 3 and " in messages[1]["content"]
        assert sent.body == {
            "model": "gpt-6-luna",
            "max_completion_tokens": 70,
            "n": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "reasoning_effort": "none",
        }
        assert len(reply.rollouts) == 2

    @pytest.mark.usefixtures("own")
    def test_reasoning_model(self):
        """A model that always reasons gets room for it, and no temperature."""
        _, (sent,) = exchange("openai:o3")
        assert "temperature" not in sent.body
        assert "top_p" not in sent.body
        assert sent.body["reasoning_effort"] == "low"
        assert sent.body["max_completion_tokens"] == 70 + 1024

    @pytest.mark.usefixtures("own")
    def test_greedy_samples_of_the_service_itself(self):
        """OpenAI takes several samples without chance, and they may differ there: it is asked for all of them."""
        reply, (sent,) = exchange("openai:gpt-6-luna", num_samples=3, temperature=0.0)
        assert (sent.body["temperature"], sent.body["n"]) == (0.0, 3)
        assert len(reply.rollouts) == 3

    @pytest.mark.usefixtures("own")
    def test_missing_key(self, monkeypatch):
        """Without a key nothing is sent, and the message names the variable."""
        monkeypatch.delenv("OPENAI_API_KEY")
        with Loopback(wire.openai) as server:
            with pytest.raises(TeacherError, match="OPENAI_API_KEY"):
                teacher_of(OPENAI, server).probe("3 + 4")
            assert server.requests == []

    def test_raw_leaves_the_first_token_to_the_server(self, tiny_teacher_tokenizer):
        """Servers other than vLLM add the first token themselves, where the tokenizer does."""
        _, (sent,) = exchange("openai:own", continuation="raw", tokenizer=tiny_teacher_tokenizer)
        assert sent.body["prompt"].startswith("<s>[SYSTEM]")  # this tokenizer adds none by itself
        assert "add_special_tokens" not in sent.body

        class Adding:
            bos_token, bos_token_id, chat_template = "<s>", 1, "x"
            apply_chat_template = staticmethod(tiny_teacher_tokenizer.apply_chat_template)

            def __call__(self, text):
                return {"input_ids": [1]}

        _, (sent,) = exchange("openai:own", continuation="raw", tokenizer=Adding())
        assert sent.body["prompt"].startswith("[SYSTEM]")

    def test_transformers_serve(self):
        """It refuses fields that it does not know; after that it gets its own form, and one sample per request."""

        def strict(path, body):
            answer = wire.openai(path, body)
            answer["choices"] = answer["choices"][:1]  # it ignores n
            return answer

        refusal = Fault(422, {"detail": "Unexpected fields in the request: {'top_k', 'min_p'}"})
        with Loopback(strict, lambda _, body: refusal if "top_k" in body else None, delay=0.3) as server:
            teacher = remote_teacher("openai:own", base_url=server.url + "/v1", continuation="raw")
            replies = ask(teacher, Prefix("3 + 4"), Prefix("5 + 6"), num_samples=3, temperature=0.5)
        assert [len(reply.rollouts) for reply in replies] == [3, 3]
        last = server.bodies[-1]
        assert json.loads(last["generation_config"]) == {
            "do_sample": True,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "temperature": 0.5,
            "top_p": 1.0,
        }
        assert not {"top_k", "min_p", "repetition_penalty"} & set(last)
        assert sorted(body.get("n", 1) for body in server.bodies) == [1] * 4 + [3] * 4

    @pytest.mark.parametrize(
        ("url", "model", "present", "absent"),
        [
            ("https://api.deepseek.com/beta", "deepseek-chat", {"max_tokens", "thinking"}, {"top_k", "seed", "n"}),
            ("https://api.mistral.ai/v1", "mistral-large-latest", {"max_tokens", "random_seed"}, {"top_k", "seed"}),
            ("https://openrouter.ai/api/v1", "qwen/qwen3-32b", {"max_tokens", "top_k", "seed"}, {"random_seed"}),
        ],
    )
    def test_dialects(self, url, model, present, absent, monkeypatch):
        """Services that refuse unknown fields get none."""
        teacher = remote_teacher(f"openai:{model}", base_url=url)
        with Loopback(wire.openai) as server:
            teacher.base_url = server.url + "/v1"
            ask(teacher, PREFIX, seed=3)
        (body,) = server.bodies
        assert present <= set(body)
        assert not absent & set(body)
        if teacher.capabilities.continuation == "prefix_flag":
            assert body["messages"][-1] == {"role": "assistant", "content": PREFIX.completion, "prefix": True}

    @pytest.mark.parametrize(
        ("choice", "outcome"),
        [
            ({"message": {"role": "assistant", "content": None, "refusal": "I cannot."}}, "refused"),
            ({"message": {"role": "assistant", "content": "so"}, "finish_reason": "content_filter"}, "filtered"),
            ({"message": {"role": "assistant", "content": ""}}, "empty"),
            ({"message": {"role": "assistant", "content": None, "reasoning_content": "Hm."}}, "empty"),
        ],
    )
    def test_outcomes(self, choice, outcome):
        """Refusals, filters and answers without text are counted, not raised, and not asked for again."""

        def answer(path, body):
            reply = wire.openai(path, body)
            reply["choices"][0] = {"index": 0, "finish_reason": "stop", **choice}
            return reply

        reply, sent = exchange("openai:gpt-6-luna", answer=answer, num_samples=2)
        assert len(sent) == 1
        assert len(reply.rollouts) == 1
        assert reply.outcomes[outcome] == 1
        assert outcome in reply.failure


class TestClaude:
    """`anthropic:`."""

    def test_prefill_body(self):
        """A last turn without trailing white space, the system apart, temperature beyond the SDK's arguments."""
        reply, (sent,) = exchange("anthropic:claude-haiku-4-5", answer=wire.anthropic, path="", temperature=0.7)
        assert sent.path == "/v1/messages"
        assert sent.body == {
            "model": "claude-haiku-4-5",
            "max_tokens": 70,
            "system": "Be brief.",
            "messages": [
                {"role": "user", "content": "What is 3 + 4?"},
                {"role": "assistant", "content": "First we add 3 and"},
            ],
            "temperature": 0.7,
        }
        # The server begins with the space that was left out, and the student's text holds it already.
        assert reply.rollouts[0].text == wire.text_of(sent.body["messages"], 0)[1:]
        assert reply.usage == Usage(45, 30, 7, 2, 10)
        assert sent.headers["authorization"] == f"Bearer {KEYS['ANTHROPIC_API_KEY']}"

    def test_one_of_temperature_and_top_p(self, caplog):
        """The service takes one of them."""
        _, (sent,) = exchange("anthropic:claude-haiku-4-5", answer=wire.anthropic, path="", top_p=0.9)
        assert "temperature" not in sent.body
        assert sent.body["top_p"] == 0.9

    def test_empty_prefix(self):
        """An empty turn is refused, so none is sent."""
        _, (sent,) = exchange("anthropic:claude-haiku-4-5", Prefix("3 + 4", "\n"), answer=wire.anthropic, path="")
        assert sent.body["messages"] == [{"role": "user", "content": "3 + 4"}]

    def test_instructed_body(self):
        """Newer models: no prefill, no temperature, thinking off."""
        _, (sent,) = exchange("anthropic:claude-sonnet-5", answer=wire.anthropic, path="")
        assert sent.body["messages"][-1]["role"] == "user"
        assert "First we add 3 and " in sent.body["messages"][-1]["content"]
        assert sent.body["thinking"] == {"type": "disabled"}
        assert "temperature" not in sent.body

    def test_one_sample_per_request(self):
        """N samples are N requests; a short prompt is not worth a cache."""
        reply, sent = exchange("anthropic:claude-haiku-4-5", answer=wire.anthropic, path="", num_samples=5)
        assert len(sent) == len(reply.rollouts) == 5
        assert reply.usage == Usage(225, 150, 35, 10, 50)
        assert "cache_control" not in json.dumps([r.body for r in sent])

    def test_cache(self):
        """A long prefix is marked, and its first request goes alone."""
        with Loopback(wire.anthropic, delay=0.3) as server:
            teacher = teacher_of(CLAUDE, server)
            ask(teacher, Prefix("3 + 4", "word " * 5000), num_samples=4)
        (block,) = server.bodies[0]["messages"][-1]["content"]
        assert block["cache_control"] == {"type": "ephemeral"}
        assert block["text"].endswith("word")
        times = [request.time for request in server.requests]
        assert times[1] - times[0] >= 0.3
        assert times[3] - times[1] < 0.3

    @pytest.mark.parametrize(
        ("change", "outcome"),
        [
            ({"stop_reason": "refusal", "content": []}, {"refused": 1}),
            ({"stop_reason": "end_turn", "content": []}, {"empty": 1, "reasoned": 1}),
            ({"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]}, {"empty": 1, "reasoned": 1}),
        ],
    )
    def test_outcomes(self, change, outcome):
        """Refusals and answers without text are counted; their tokens too."""
        reply, _ = exchange(
            "anthropic:claude-haiku-4-5", answer=lambda p, b: {**wire.anthropic(p, b), **change}, path=""
        )
        assert reply.rollouts == ()
        assert counts_of(reply) == {"requests": 1, "retries": 0, **outcome}
        assert reply.usage == Usage(45, 30, 7, 2, 10)

    @pytest.mark.parametrize(
        ("prefix", "text", "expected"),
        [
            ("a ", " b", "b"),
            ("a ", "b", "b"),
            ("a\n\n", "\nb", "b"),
            ("a\n", "\n\nb", "\nb"),
            ("a", " b", " b"),
            ("a \n", "\nb", "\nb"),
        ],
    )
    def test_space(self, prefix, text, expected):
        """What was not sent and is written again is taken off, once."""
        assert without_common_space(prefix[len(prefix.rstrip()) :], text) == expected


class TestGemini:
    """`gemini:`."""

    def test_prefill_body(self):
        """The last turn is the model's, thinking is off, and one request gives several candidates."""
        reply, (sent,) = exchange("gemini:gemini-2.5-flash-lite", answer=wire.gemini, path="", num_samples=3, seed=1)
        assert sent.path.endswith("/models/gemini-2.5-flash-lite:generateContent")
        assert sent.body["contents"] == [
            {"role": "user", "parts": [{"text": "What is 3 + 4?"}]},
            {"role": "model", "parts": [{"text": "First we add 3 and "}]},
        ]
        assert sent.body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        config = sent.body["generationConfig"]
        assert isinstance(config.pop("seed"), int)
        # How names inside are spelled is the SDK's choice; the service reads both spellings.
        assert list(config.pop("thinkingConfig").values()) == [0]
        assert config == {"maxOutputTokens": 70, "candidateCount": 3, "temperature": 1.0, "topP": 1.0}
        assert len(reply.rollouts) == 3
        assert reply.usage == Usage(20, 8, 13, 4)
        assert sent.headers["x-goog-api-key"] == KEYS["GOOGLE_API_KEY"]
        assert KEYS["GOOGLE_API_KEY"] not in sent.path

    def test_instructed_body(self):
        """Newer models: no prefill, the least thinking that there is, one candidate."""
        _, sent = exchange("gemini:gemini-3.5-flash-lite", answer=wire.gemini, path="", num_samples=2)
        assert len(sent) == 2
        body = sent[0].body
        assert [turn["role"] for turn in body["contents"]] == ["user"]
        assert next(iter(body["generationConfig"]["thinkingConfig"].values())) == "MINIMAL"

    @pytest.mark.parametrize(
        ("answer", "outcome"),
        [
            ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, "filtered"),
            ({"candidates": [{"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}] * 2}, "empty"),
            ({"candidates": [{"finishReason": "RECITATION"}] * 2}, "filtered"),
            ({"candidates": [{"content": {"parts": [{"text": "Hm.", "thought": True}]}}] * 2}, "empty"),
        ],
    )
    def test_outcomes(self, answer, outcome):
        """Blocked prompts and answers without text count once per sample, and are not asked for again."""
        usage = {"promptTokenCount": 20, "thoughtsTokenCount": 70}
        reply, sent = exchange(
            "gemini:gemini-2.5-flash-lite",
            answer=lambda p, b: {**answer, "usageMetadata": usage},
            path="",
            num_samples=2,
        )
        assert len(sent) == 1
        assert reply.rollouts == ()
        assert reply.outcomes[outcome] == 2
        assert reply.usage == Usage(20, 0, 70, 70)

    def test_second_key_variable(self, monkeypatch):
        """`GEMINI_API_KEY` serves where `GOOGLE_API_KEY` is not set."""
        monkeypatch.delenv("GOOGLE_API_KEY")
        monkeypatch.setenv("GEMINI_API_KEY", "AIzaOther1234567")
        _, (sent,) = exchange("gemini:gemini-2.5-flash-lite", answer=wire.gemini, path="")
        assert sent.headers["x-goog-api-key"] == "AIzaOther1234567"


@pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)
class TestEverywhere:
    """What holds for every provider."""

    def test_probe_then_sample(self, service):
        """The probe runs in a loop of its own; the teacher continues in another, and again after it was closed."""
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server, settings=EngineSettings(max_concurrency=1, timeout=5))
            teacher.probe("3 + 4")
            probed = len(server.requests)
            assert 1 <= probed <= 2
            for _ in range(2):
                (reply,) = ask(teacher, Prefix("3 + 4", " ="), num_samples=2)
                assert len(reply.rollouts) == 2

    @pytest.mark.parametrize(
        ("text", "outcome", "kept"),
        [
            ("Sure! Here is the continuation:\n\nof each bag, which is 12.", None, "of each bag, which is 12."),
            ("Each bag holds 4 apples.", "restarted", "Each bag holds 4 apples."),
            ("I'm sorry, but I can't help with that.", "refused", None),
            ("Sure, here is the continuation:\n", "empty", None),
        ],
        ids=["wrapped", "restarted", "refused", "empty"],
    )
    def test_instructed_answers(self, service, monkeypatch, text, outcome, kept):
        """They are repaired. A refusal in words and an answer of nothing else are counted, and are no rollouts."""
        monkeypatch.setattr(wire, "text_of", lambda prompt, index: text)
        problem = [{"role": "user", "content": "Each bag holds 4 apples. How many apples do 3 bags hold?"}]
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server, continuation="instruct")
            prefix = Prefix(problem, "First we count the bags, there are 3 of them. Then we count the apples")
            (reply,) = ask(teacher, prefix, num_samples=2)
        assert [rollout.text for rollout in reply.rollouts] == ([] if kept is None else [kept] * 2)
        counts = {name: n for name, n in counts_of(reply).items() if name not in ("requests", "retries")}
        assert counts == ({} if outcome is None else {outcome: 2})
        assert (f"a sample was {outcome}" in (reply.failure or "")) == (kept is None)

    def test_probe_inside_a_loop(self, service):
        """A notebook has a loop already."""

        async def cell():
            teacher.probe("3 + 4")

        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server)
            asyncio.run(cell())

    def test_missing_key_names_the_variable(self, service, monkeypatch):
        """A closed service without a key is an error before anything is sent."""
        monkeypatch.delenv(service.key)
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server)
            if service.name.startswith(("vllm:", "openai:")):
                teacher.probe("3 + 4")  # a self-hosted server needs none
            else:
                with pytest.raises(TeacherError, match=service.key):
                    teacher.probe("3 + 4")
                assert server.requests == []

    def test_order(self, service):
        """Replies come in the order of the prefixes, whichever answer comes first."""
        prefixes = [Prefix("3 + 4", " =" * i) for i in range(1, 9)]
        with Loopback(service.answer, lambda number, _: Fault(500) if number % 3 == 0 else None) as server:
            teacher = teacher_of(service, server)
            replies = ask(teacher, *prefixes)
            alone = [ask(teacher, prefix)[0] for prefix in prefixes]
        assert [r.rollouts for r in replies] == [r.rollouts for r in alone]
        assert len({r.rollouts for r in replies}) == 8

    def test_connections_are_released(self, service, recwarn):
        """A closed teacher leaves no open socket behind."""
        with Loopback(service.answer) as server:
            teacher = teacher_of(service, server)
            request = SamplingRequest(1, 8)

            async def run():
                await teacher.sample([Prefix("3 + 4")], request)
                await teacher.aclose()
                await teacher.aclose()

            asyncio.run(run())
        assert teacher._client is None
        assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


class TestClosing:
    """A teacher is closed after training, and may be asked again."""

    @pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
    def test_close_and_ask_again(self, service):
        """In the same loop: the old client is closed, and a new one answers."""
        loop, request = EventLoopThread(), SamplingRequest(1, 70)
        try:
            with Loopback(service.answer) as server:
                teacher = teacher_of(service, server, continuation="instruct")
                clients = []
                for _ in range(2):
                    (reply,) = loop.run(teacher.sample([PREFIX], request))
                    assert len(reply.rollouts) == 1
                    clients.append(teacher._client[1] if service is GEMINI else teacher._client)
                    assert not is_closed(clients[-1])
                    release(teacher, loop)
                    assert is_closed(clients[-1])
                release(teacher, loop)  # nothing is open
            assert clients[0] is not clients[1]
        finally:
            loop.close()

    def test_another_loop(self):
        """Closing in one loop leaves the client of another one alone."""
        loop = EventLoopThread()
        try:
            with Loopback(wire.openai) as server:
                teacher = teacher_of(OPENAI, server)
                loop.run(teacher.sample([PREFIX], SamplingRequest(1, 70)))
                client = teacher._client
                asyncio.run(teacher.aclose())
                assert not is_closed(client)
                assert teacher._client is client
                release(teacher, loop)
                assert is_closed(client)
        finally:
            loop.close()

    def test_failing(self, caplog):
        """A teacher that cannot be closed is named, and nothing else happens; what is in flight is cancelled."""

        class Stuck(ScriptedTeacher):
            async def sample(self, prefixes, request):
                await asyncio.sleep(60)

            async def aclose(self):
                raise OSError("no")

        loop = EventLoopThread()
        try:
            (in_flight,) = loop.submit(Stuck().sample([], SamplingRequest(1, 1)))
            release(Stuck(), loop)
            assert in_flight.cancelled()
        finally:
            loop.close()
        assert "The teacher scripted could not be closed (OSError: no)" in caplog.text


def is_closed(client):
    """Of httpx and of the SDKs: a property or a method."""
    return client.is_closed() if callable(client.is_closed) else client.is_closed
