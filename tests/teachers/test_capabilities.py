# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What is believed of each model, and how a name becomes a teacher."""

import logging
import re
import subprocess
import sys
from datetime import date

import pytest

from omniopd_trl.errors import ConfigError, MissingExtraError
from omniopd_trl.teachers.load import CONTINUATIONS, remote_teacher
from omniopd_trl.teachers.providers.anthropic import AnthropicTeacher
from omniopd_trl.teachers.providers.capabilities import MODELS, SHUTDOWNS, capabilities_of, warn_shutdown
from omniopd_trl.teachers.providers.gemini import GeminiTeacher
from omniopd_trl.teachers.providers.openai import OpenAITeacher

OFF = {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize(
    ("provider", "model", "continuation", "samples", "temperature", "reasoning"),
    [
        ("vllm", "Qwen/Qwen3-32B", "raw", 64, True, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("anthropic", "claude-3-5-haiku-20241022", "prefill", 1, True, {}),
        ("anthropic", "claude-sonnet-4-20250514", "prefill", 1, True, {}),
        ("anthropic", "claude-opus-4-1-20250805", "prefill", 1, True, {}),
        ("anthropic", "claude-haiku-4-5", "prefill", 1, True, {}),
        ("anthropic", "claude-sonnet-4-5-20250929", "prefill", 1, True, {}),
        ("anthropic", "claude-opus-4-6", "instruct", 1, True, {}),
        ("anthropic", "claude-sonnet-4-6", "instruct", 1, False, {}),
        ("anthropic", "claude-opus-4-8", "instruct", 1, False, {}),
        ("anthropic", "claude-sonnet-5", "instruct", 1, False, OFF),
        ("anthropic", "claude-opus-5", "instruct", 1, False, OFF),
        ("anthropic", "claude-opus-5-5", "instruct", 1, False, {"output_config": {"effort": "low"}}),
        ("anthropic", "claude-fable-5-2", "instruct", 1, False, {"output_config": {"effort": "low"}}),
        ("anthropic", "claude-of-tomorrow", "instruct", 1, False, OFF),
        ("gemini", "gemini-2.5-flash", "prefill", 8, True, {"thinking_config": {"thinking_budget": 0}}),
        ("gemini", "gemini-2.5-pro", "prefill", 8, True, {"thinking_config": {"thinking_budget": 128}}),
        ("gemini", "gemini-3.5-flash-lite", "instruct", 1, True, {"thinking_config": {"thinking_level": "minimal"}}),
        ("gemini", "gemini-3-pro-preview", "instruct", 1, True, {"thinking_config": {"thinking_level": "low"}}),
        ("gemini", "of-tomorrow", "instruct", 1, True, {"thinking_config": {"thinking_level": "minimal"}}),
        ("openai", "gpt-6-luna", "instruct", 8, True, {"reasoning_effort": "none"}),
        ("openai", "gpt-5.4-mini", "instruct", 8, True, {"reasoning_effort": "none"}),
        ("openai", "gpt-5-mini", "instruct", 8, False, {"reasoning_effort": "minimal"}),
        ("openai", "gpt-5.2-pro", "instruct", 8, False, {"reasoning_effort": "low"}),
        ("openai", "o4-mini", "instruct", 8, False, {"reasoning_effort": "low"}),
        ("openai", "gpt-4.1", "instruct", 8, True, {}),
        ("openai", "deepseek-chat", "prefix_flag", 1, True, OFF),
        ("openai", "mistral-large-latest", "prefix_flag", 1, True, {}),
        ("openai", "deepseek-ai/DeepSeek-V3", "instruct", 8, True, {}),
        ("openai", "of-tomorrow", "instruct", 8, True, {}),
    ],
)
def test_table(provider, model, continuation, samples, temperature, reasoning):
    """The models of today, and one of tomorrow for each provider."""
    known = capabilities_of(provider, model)
    assert known.continuation == continuation
    assert known.samples_per_request == samples
    assert known.takes_temperature == temperature
    assert known.reasoning_off == reasoning


def test_models_that_always_reason_get_room():
    """A model whose reasoning cannot be switched off would spend all of a short answer on it."""
    for provider, model in (("openai", "o3"), ("anthropic", "claude-fable-5"), ("gemini", "gemini-3-pro-preview")):
        assert capabilities_of(provider, model).reasoning_headroom >= 1024
    assert capabilities_of("anthropic", "claude-haiku-4-5").reasoning_headroom == 0


def test_every_default_can_be_sent():
    """No table promises a continuation that its provider's adapter cannot send, and each ends in a default."""
    for provider, table in MODELS.items():
        assert table[-1][0] == ".*"
        assert all(known.continuation in CONTINUATIONS[provider] for _, known in table)
        assert all(re.compile(pattern) for pattern, _ in [*table, *SHUTDOWNS[provider]])


def test_dates_are_those_of_the_sdk():
    """Anthropic's SDK carries the dates of its models; ours agree with it where it knows one."""
    messages = pytest.importorskip("anthropic.resources.messages.messages")
    for model, text in messages.DEPRECATED_MODELS.items():
        month, day, year = re.fullmatch(r"(\w+) (\d+)\w\w, (\d+)", text).groups()
        months = "January February March April May June July August September October November December".split()
        known = capabilities_of("anthropic", model).shutdown
        if known is not None:
            assert known == date(int(year), months.index(month) + 1, int(day)), model
    assert capabilities_of("anthropic", "claude-sonnet-4-5").shutdown == date(2026, 11, 30)


@pytest.mark.parametrize(
    ("day", "words"),
    [
        (date(2026, 10, 31), None),
        (date(2026, 11, 1), "in 30 days"),
        (date(2026, 11, 21), "in 10 days"),
        (date(2026, 12, 1), "in 0 days"),
        (date(2026, 12, 2), "announced the end"),
    ],
)
def test_shutdown(day, words):
    """Within thirty days of its end a teacher is named with the date, and after it too."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("omniopd_trl.teachers.providers.capabilities")
    logger.addHandler(handler)
    try:
        warn_shutdown("gemini:gemini-2.5-flash", capabilities_of("gemini", "gemini-2.5-flash"), day)
        warn_shutdown("gemini:other", capabilities_of("gemini", "gemini-3-flash"), day)
    finally:
        logger.removeHandler(handler)
    assert len(lines) == (words is not None)
    if words is not None:
        assert words in lines[0]
        assert "gemini:gemini-2.5-flash" in lines[0]


class TestNames:
    """`provider:model`."""

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("vllm:Qwen/Qwen3-32B", OpenAITeacher),
            ("vllm:/models/with:colon", OpenAITeacher),
            ("openai:gpt-6-luna", OpenAITeacher),
            ("anthropic:claude-haiku-4-5", AnthropicTeacher),
            ("gemini:gemini-3.5-flash-lite", GeminiTeacher),
        ],
    )
    def test_teacher(self, name, kind):
        """The prefix decides; everything after the first colon is the model. No key and no network is needed."""
        teacher = remote_teacher(name)
        assert type(teacher) is kind
        assert teacher.name == name
        assert teacher.model == name.partition(":")[2]
        assert teacher.is_remote

    @pytest.mark.parametrize("name", ["watsonx:granite", "Qwen/Qwen3-32B", "openai:", ""])
    def test_unknown(self, name):
        """A name of no provider is an error that lists them."""
        with pytest.raises(
            ConfigError, match=r"vllm:MODEL, openai:MODEL, anthropic:MODEL, gemini:MODEL, .* or vertex:MODEL"
        ):
            remote_teacher(name)

    def test_continuation(self):
        """The recipe overrides what is known of a model, within what can be sent."""
        assert (
            remote_teacher("gemini:gemini-2.5-flash", continuation="instruct").capabilities.continuation == "instruct"
        )
        with pytest.raises(ConfigError, match=r"'raw' is not supported .* prefill, instruct"):
            remote_teacher("anthropic:claude-haiku-4-5", continuation="raw")

    def test_base_url(self, monkeypatch):
        """The address in the recipe, else the SDK's variable, else the provider's own."""
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        assert remote_teacher("openai:x").base_url == "https://api.openai.com/v1"
        assert remote_teacher("vllm:x").base_url == "http://localhost:8000/v1"
        monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
        assert remote_teacher("openai:x").base_url == "http://elsewhere/v1"
        assert remote_teacher("openai:x", base_url="http://here/v1").base_url == "http://here/v1"
        assert remote_teacher("vllm:x").base_url == "http://localhost:8000/v1"

    def test_missing_sdk(self, monkeypatch):
        """Without the SDK the message holds the pip command."""
        monkeypatch.setitem(sys.modules, "anthropic", None)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
        with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[anthropic\]'"):
            remote_teacher("anthropic:claude-haiku-4-5").probe("3 + 4")


def test_sdks_are_imported_late():
    """Naming a teacher loads no SDK."""
    code = (
        "import sys; from omniopd_trl.teachers.load import remote_teacher; remote_teacher('gemini:x'); "
        "print(*sorted({'openai', 'anthropic', 'google.genai'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.split() == []
