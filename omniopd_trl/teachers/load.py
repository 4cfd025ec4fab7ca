# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""From the name of a teacher to the teacher."""

import difflib
import os
import re
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any, get_args

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers.base import Teacher
from omniopd_trl.teachers.providers.anthropic import AnthropicTeacher
from omniopd_trl.teachers.providers.capabilities import MODELS, capabilities_of, warn_shutdown
from omniopd_trl.teachers.providers.gemini import GeminiTeacher
from omniopd_trl.teachers.providers.openai import OpenAITeacher
from omniopd_trl.teachers.remote.engine import Continuation, EngineSettings, RemoteTeacher
from omniopd_trl.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIXES = tuple(f"{provider}:" for provider in MODELS)

_NAMES = f"{', '.join(f'{prefix}MODEL' for prefix in PREFIXES[:-1])} or {PREFIXES[-1]}MODEL"

# Other spellings of a model behind a service. OpenAI's open models (gpt-oss) are on the Hub under the name as it is.
_MEANT = (
    (r"(?:anthropic/)?(claude.+)", "anthropic"),
    (r"(?:google/|gemini/)?(gemini-.+)", "gemini"),
    (r"(?:openai/)?((?!gpt-oss)(?:gpt-\d|chatgpt-|o\d).*)", "openai"),
    (r"vllm/(.+)", "vllm"),
)

# What each provider's adapter can send; what a model behind it does with it is another question.
CONTINUATIONS: dict[str, tuple[Continuation, ...]] = {
    "vllm": ("raw", "continue_final", "instruct"),
    "openai": get_args(Continuation),
    "anthropic": ("prefill", "instruct"),
    "gemini": ("prefill", "instruct"),
}


def split_name(name: str) -> tuple[str, str] | None:
    """Provider and model of a teacher behind a service; `None` for a path, an id on the Hub, or `"scripted"`.

    Args:
        name: as it stands in a recipe. The provider may be written in capitals.

    Raises:
        ConfigError: when what stands before the colon is no provider, or nothing stands behind it.

    Example:
        >>> split_name("Anthropic:claude-haiku-4-5")
        ('anthropic', 'claude-haiku-4-5')
    """
    provider, colon, model = (part.strip() for part in name.partition(":"))
    if not colon:
        return None
    if provider.lower() in MODELS:
        if not model:
            raise ConfigError(f"teacher={name!r} names a provider and no model. Write it as {_NAMES}.")
        return provider.lower(), model
    # No id on the Hub has a colon. A path may have one, and a drive's letter is no provider.
    if "/" in provider or "\\" in provider or len(provider) < 2 or os.path.exists(name):
        return None
    similar = difflib.get_close_matches(provider.lower(), MODELS, n=1)
    hint = f" Did you mean '{similar[0]}:{model}'?" if similar else ""
    raise ConfigError(
        f"teacher={name!r}: there is no provider {provider!r}, and no folder of that name. A teacher behind a service "
        f"is named {_NAMES}.{hint}"
    )


def suggest_name(name: str) -> str | None:
    """The name of a service's model that somebody may have meant, who wrote what is none; `None` when nothing is near.

    Example:
        >>> suggest_name("claude-haiku-4-5"), suggest_name("openai/gpt-6-luna")
        ('anthropic:claude-haiku-4-5', 'openai:gpt-6-luna')
    """
    for pattern, provider in _MEANT:
        if found := re.fullmatch(pattern, name, re.IGNORECASE):
            return f"{provider}:{found[1]}"
    return None


def remote_teacher(
    name: str,
    *,
    base_url: str | None = None,
    tokenizer: Any = None,
    continuation: Continuation | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    settings: EngineSettings | None = None,
    budget: Budget | None = None,
    today: date | None = None,
) -> RemoteTeacher:
    """The teacher that a name such as `anthropic:claude-haiku-4-5` stands for. Nothing is sent yet.

    Args:
        name: provider and model, with a colon between them: `vllm:`, `openai:`, `anthropic:` or `gemini:`, in capitals
            or not.
        base_url: where the service is, when not where its SDK expects it.
        tokenizer: of a `vllm:` or `openai:` teacher, or its path or id; renders the prompts of a `raw` continuation.
            Defaults to the model's name.
        continuation: overrides what the model is known to take.
        chat_template_kwargs: for `vllm:` and `openai:`, arguments for the teacher's chat template.
        settings: limits of this process.
        budget: what may still be spent.
        today: the day that shutdown dates are compared with; defaults to the real one.

    Raises:
        ConfigError: when the name or the continuation is none that exists.
    """
    parts = split_name(name)
    if parts is None:
        raise ConfigError(f"teacher={name!r}: a teacher behind a service is named {_NAMES}.")
    provider, model = parts
    name = f"{provider}:{model}"
    capabilities = capabilities_of(provider, model)
    if continuation is not None:
        if continuation not in CONTINUATIONS[provider]:
            raise ConfigError(
                f"teacher_continuation={continuation!r} is none of those that teachers of {provider!r} know: "
                f"{', '.join(CONTINUATIONS[provider])}."
            )
        capabilities = replace(capabilities, continuation=continuation)
    warn_shutdown(name, capabilities, today or date.today())
    limits: dict[str, Any] = {"base_url": base_url, "settings": settings, "budget": budget}
    if provider == "anthropic":
        return AnthropicTeacher(model, capabilities, **limits)
    if provider == "gemini":
        return GeminiTeacher(model, capabilities, **limits)
    return OpenAITeacher(
        provider, model, capabilities, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs, **limits
    )


def load_teacher(
    teacher: "str | PreTrainedModel | Teacher",
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    device: "torch.device | str | None" = None,
) -> Teacher:
    """The teacher that a name, a model or a teacher stands for.

    Args:
        teacher: a `Teacher`, which is returned as it is; `"scripted"`; or a path, Hub id or instance of a causal
            language model, for which the other arguments are those of `LocalTeacher`.

    Raises:
        DataError: when a model cannot be loaded.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if teacher == "scripted":
        return ScriptedTeacher()
    from omniopd_trl.teachers.local import LocalTeacher

    return LocalTeacher(
        teacher,
        model_init_kwargs=model_init_kwargs,
        revision=revision,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=chat_template_kwargs,
        device=device,
    )
