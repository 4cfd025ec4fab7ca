# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about the teacher reaches it, is refused, or is named: nothing is ignored in silence."""

import shutil
from dataclasses import fields

import pytest
from transformers.utils import logging

from omniopd_trl import OmniOPDConfig
from omniopd_trl.errors import ConfigError, DataError
from omniopd_trl.teachers import Prefix, Rollout, Teacher, TeacherOptions, TeacherReply, load_teacher
from omniopd_trl.teachers.load import remote_teacher
from omniopd_trl.teachers.options import LIMITS, READ_BY
from tests.support.loopback import Loopback, wire
from tests.support.loopback.teachers import ask, services  # noqa: F401 (a fixture)

STUDENTS = {"enable_thinking": False}


class Own(Teacher):
    """A custom teacher."""

    name = "my-paid-api"

    async def sample(self, prefixes, request):
        return [TeacherReply((Rollout("x"),) * request.num_samples) for _ in prefixes]


def make_teacher(teacher, args):
    """As the trainer makes it."""
    return load_teacher(teacher, TeacherOptions.of(args))


@pytest.fixture
def config(tmp_path):
    """A configuration with other settings than the defaults."""

    def make(**overrides):
        return OmniOPDConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **overrides})

    return make


class TestUnreadOptions:
    """Options that a kind of teacher has no use for."""

    def test_every_option_is_in_the_table(self):
        """An option that is added without a reader fails here."""
        assert set(READ_BY) == {f.name for f in fields(OmniOPDConfig) if f.name.startswith("teacher_")}

    def test_defaults_are_those_of_the_configuration(self, config):
        """Of a field in both, the default is written twice."""
        shared = {f.name for f in fields(TeacherOptions)} & {f.name for f in fields(OmniOPDConfig)}
        assert len(shared) == len(fields(TeacherOptions)) - 3  # device, world_size and process_index are properties
        options = TeacherOptions.of(config())
        assert {name: getattr(options, name) for name in shared} == {
            name: getattr(TeacherOptions(), name) for name in shared
        }

    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize("teacher", [Own(), remote_teacher("vllm:model")], ids=["own", "remote"])
    def test_limits_on_an_instance_are_refused(self, config, teacher, limit):
        """A limit that an instance would not keep stops the run at once, and says where it belongs."""
        with pytest.raises(
            ConfigError, match=f"{limit}=7 cannot be enforced: .*{teacher.name}.*Budget.*the teacher's name"
        ):
            make_teacher(teacher, config(**{limit: 7}))

    def test_other_options_of_an_instance_are_named(self, config, caplog):
        """They change nothing, and continue."""
        logging.enable_propagation()
        own = Own()
        assert make_teacher(own, config(teacher_max_concurrency=2, teacher_base_url="http://x/v1")) is own
        (message,) = caplog.messages
        assert message.startswith("teacher_base_url, teacher_max_concurrency: without effect")
        assert "my-paid-api" in message

    def test_a_recipe_for_a_service_can_be_tried_with_the_scripted_teacher(self, config, caplog):
        """Limits included: what costs nothing keeps them all."""
        logging.enable_propagation()
        args = config(
            teacher_budget_usd=20, teacher_requests_per_minute=1, teacher_max_concurrency=32, teacher_temperature=0.7
        )
        assert make_teacher("scripted", args).name == "scripted"
        (message,) = caplog.messages
        assert message.startswith("teacher_max_concurrency, teacher_requests_per_minute, teacher_budget_usd: without")

    def test_local(self, config, caplog, tiny_model_dir):
        """A model in this process reads how to load it, and no limit."""
        logging.enable_propagation()
        args = config(teacher_budget_tokens=10, teacher_model_init_kwargs={"dtype": "float32"})
        make_teacher(str(tiny_model_dir), args)
        (message,) = [message for message in caplog.messages if "without effect" in message]
        assert message.startswith("teacher_budget_tokens: without effect")

    def test_a_service_reads_its_own(self, config, caplog):
        """What only another service, or a local model, has a use for is named."""
        logging.enable_propagation()
        args = config(
            teacher_max_concurrency=2, teacher_tokenizer_name_or_path="x", teacher_model_init_kwargs={"dtype": "auto"}
        )
        make_teacher("anthropic:claude-haiku-4-5", args)
        (message,) = caplog.messages
        assert message.startswith("teacher_model_init_kwargs, teacher_tokenizer_name_or_path: without effect")

    def test_defaults_are_silent(self, config, caplog):
        """There is no warning about an option that is not set, also where the command filled in what it holds."""
        logging.enable_propagation()
        filled_in = config(teacher_model_init_kwargs={"attn_implementation": None})
        make_teacher("gemini:gemini-3.5-flash-lite", filled_in)
        make_teacher("scripted", config())
        make_teacher(Own(), config())
        make_teacher("gemini:gemini-3.5-flash-lite", config(teacher_budget_tokens=10))
        assert caplog.messages == []


class TestTemplateArguments:
    """Arguments for the teacher's chat template."""

    @pytest.mark.parametrize(
        ("name", "settings", "inherited"),
        [
            ("vllm:model", {}, True),
            ("openai:model", {"teacher_base_url": "http://127.0.0.1:8000/v1"}, True),
            ("openai:gpt-6-luna", {}, False),
            ("openai:gpt-6-luna", {"teacher_base_url": "https://api.openai.com/v1"}, False),
            ("openai:mistral-large", {"teacher_base_url": "https://api.mistral.ai/v1"}, False),
        ],
    )
    def test_the_students(self, config, monkeypatch, name, settings, inherited):
        """They are for self-hosted servers: OpenAI and its like would be sent a field that they do not know."""
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        teacher = make_teacher(name, config(chat_template_kwargs=STUDENTS, **settings))
        assert teacher.chat_template_kwargs == (STUDENTS if inherited else {})

    def test_openai_over_the_wire(self, config, services):  # noqa: F811
        """What a paid service gets holds nothing of the student's template."""
        with Loopback(wire.openai) as server:
            args = config(chat_template_kwargs=STUDENTS)
            teacher = make_teacher("openai:gpt-6-luna", args)
            teacher.base_url = server.url + "/v1"
            ask(teacher, Prefix("3 + 4"))
        assert "chat_template_kwargs" not in server.bodies[0]

    @pytest.mark.parametrize("own", [{}, {"enable_thinking": True}])
    def test_custom_ones_win(self, config, own):
        """No arguments at all is a choice as well."""
        args = config(chat_template_kwargs=STUDENTS, teacher_chat_template_kwargs=own)
        assert make_teacher("vllm:model", args).chat_template_kwargs == own

    def test_local(self, config, tiny_model_dir):
        """A local model has the student's, unless it has none of its own."""
        local = make_teacher(str(tiny_model_dir), config(chat_template_kwargs=STUDENTS))
        assert local.chat_template_kwargs == STUDENTS
        none = config(chat_template_kwargs=STUDENTS, teacher_chat_template_kwargs={})
        assert make_teacher(str(tiny_model_dir), none).chat_template_kwargs == {}


class TestSharedLimits:
    """Limits are the job's, and its processes share them."""

    @pytest.mark.parametrize(
        ("option", "value"),
        [("teacher_max_concurrency", 3), ("teacher_requests_per_minute", 3.5), ("teacher_tokens_per_minute", 1)],
    )
    def test_too_few_for_the_processes(self, config, monkeypatch, option, value):
        """Rounded up to one for each process they would be exceeded."""
        args = config(**{option: value})
        monkeypatch.setattr(OmniOPDConfig, "world_size", 4)
        with pytest.raises(
            ConfigError, match=rf"{option}={value} cannot be enforced: .* the 4 processes .*Raise it to 4"
        ):
            make_teacher("vllm:model", args)

    def test_shares(self, config, monkeypatch):
        """Together no more than the job may have."""
        args = config(teacher_max_concurrency=11, teacher_requests_per_minute=5, teacher_tokens_per_minute=1000)
        monkeypatch.setattr(OmniOPDConfig, "world_size", 4)
        settings = make_teacher("vllm:model", args).settings
        assert settings.max_concurrency == 2
        assert (settings.requests_per_minute, settings.tokens_per_minute) == (1.25, 250)
        assert make_teacher("scripted", args).name == "scripted"


class TestNames:
    """What a recipe may call a teacher, and what it is told when it calls it otherwise."""

    @pytest.mark.parametrize("name", ["Anthropic:claude-haiku-4-5", "ANTHROPIC: claude-haiku-4-5"])
    def test_capitals(self, config, name):
        """A provider is found however it is written, and has one name in everything that is kept."""
        assert make_teacher(name, config()).name == "anthropic:claude-haiku-4-5"
        assert remote_teacher(name).name == "anthropic:claude-haiku-4-5"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("antropic:claude-haiku-4-5", "Did you mean `anthropic:claude-haiku-4-5`?"),
            ("claude:claude-haiku-4-5", "no provider 'claude'"),
            ("http://127.0.0.1:8000/v1", "no provider 'http'"),
            ("openai:", "no model"),
        ],
    )
    def test_unknown_providers(self, config, name, words):
        """They are no ids on the Hub, where nobody should look for them."""
        with pytest.raises(ConfigError) as caught:
            make_teacher(name, config())
        assert words in str(caught.value)
        assert "vllm:MODEL, openai:MODEL, anthropic:MODEL, gemini:MODEL, azure:MODEL" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("claude-haiku-4-5", "anthropic:claude-haiku-4-5"),
            ("anthropic/claude-haiku-4-5", "anthropic:claude-haiku-4-5"),
            ("openai/gpt-6-luna", "openai:gpt-6-luna"),
            ("gpt-6-luna", "openai:gpt-6-luna"),
            ("google/gemini-3.5-flash-lite", "gemini:gemini-3.5-flash-lite"),
            ("vllm/Qwen/Qwen3-32B", "vllm:Qwen/Qwen3-32B"),
        ],
    )
    def test_without_a_colon(self, config, name, meant):
        """What cannot be loaded, and looks like a service's model, has the right name in the message."""
        with pytest.raises(DataError, match=f"did you mean '{meant}'"):
            make_teacher(name, config())

    def test_open_models_are_no_service(self, config, tmp_path, tiny_model_dir):
        """Nor is a folder with a colon in its name."""
        with pytest.raises(DataError) as caught:
            make_teacher("openai/gpt-oss-20b", config())
        assert "did you mean" not in str(caught.value)
        folder = tmp_path / "run:3"
        shutil.copytree(tiny_model_dir, folder)
        assert make_teacher(str(folder), config()).name == str(folder)
