# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Create a teacher from its name."""

import os
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any, TypeGuard, get_args

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.demo import JUDGE, asset_path
from omniopd_trl.errors import ConfigError, DataError, did_you_mean
from omniopd_trl.teachers.base import Teacher
from omniopd_trl.teachers.options import TeacherOptions, check_options
from omniopd_trl.teachers.providers.anthropic import AnthropicTeacher
from omniopd_trl.teachers.providers.capabilities import (
    OPENAI_STYLE,
    PROVIDERS,
    capabilities_of,
    family_of,
    warn_shutdown,
)
from omniopd_trl.teachers.providers.gemini import GeminiTeacher
from omniopd_trl.teachers.providers.openai import OpenAITeacher, is_self_hosted
from omniopd_trl.teachers.remote.engine import RemoteTeacher
from omniopd_trl.teachers.remote.settings import Capabilities, Continuation, EngineSettings
from omniopd_trl.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORT_PREFIX = "export:"
PREFIXES = tuple(f"{provider}:" for provider in PROVIDERS)

_NAMES = f"{', '.join(f'{prefix}MODEL' for prefix in PREFIXES[:-1])} or {PREFIXES[-1]}MODEL"

# Continuations that each provider's adapter can send. A model may support fewer.
CONTINUATIONS: dict[str, tuple[Continuation, ...]] = {
    "vllm": ("raw", "continue_final", "instruct"),
    "openai": get_args(Continuation),
    "anthropic": ("prefill", "instruct"),
    "gemini": ("prefill", "instruct"),
    "azure": get_args(Continuation),
    "bedrock": ("prefill", "instruct"),
    "vertex": ("prefill", "instruct"),
}


def split_name(name: str) -> tuple[str, str] | None:
    """Provider and model of a teacher behind a service; `None` for a path, a Hub id, or a name that is no service's.

    Args:
        name: name of the teacher, as in a recipe. The provider is case-insensitive.

    Raises:
        ConfigError: when the part before the colon is not a provider, or nothing follows the colon.

    Example:
        >>> split_name("Anthropic:claude-haiku-4-5")
        ('anthropic', 'claude-haiku-4-5')
    """
    provider, colon, model = (part.strip() for part in name.partition(":"))
    if not colon or is_export(name) or name == JUDGE:
        return None
    if provider.lower() in PROVIDERS:
        if not model:
            raise ConfigError(f"teacher={name!r} names a provider but no model. Write it as {_NAMES}.")
        return provider.lower(), model
    # No id on the Hub has a colon. A path may have one, and a drive letter is not a provider.
    if "/" in provider or "\\" in provider or len(provider) < 2 or os.path.exists(name):
        return None
    hint = did_you_mean(provider.lower(), PROVIDERS, otherwise="", written=lambda known: f"{known}:{model}")
    raise ConfigError(
        f"teacher={name!r}: there is no provider {provider!r} and no folder of this name. A teacher behind a service "
        f"is named {_NAMES}. {hint}".rstrip()
    )


def is_export(teacher: "str | PreTrainedModel | Teacher | None") -> TypeGuard[str]:
    """Whether a teacher names the export of an earlier run, as in `"export:runs/demo/_export"`."""
    return isinstance(teacher, str) and teacher.startswith(EXPORT_PREFIX)


def capabilities_by_name(teacher: str) -> Capabilities | None:
    """What a model behind a service can do; `None` for any other teacher.

    Args:
        teacher: name of the teacher, as in [`split_name`].

    Raises:
        ConfigError: as [`split_name`].
    """
    named = split_name(teacher)
    return None if named is None else capabilities_of(*named)


def suggest_name(name: str) -> str | None:
    """The service's model that a misspelled name probably means, with its provider; `None` when none is similar.

    Example:
        >>> suggest_name("claude-haiku-4-5"), suggest_name("openai/gpt-6-luna")
        ('anthropic:claude-haiku-4-5', 'openai:gpt-6-luna')
    """
    prefix, slash, model = name.partition("/")
    if slash and prefix.lower() in PROVIDERS and (prefix.lower() not in ("openai", "gemini") or family_of(name)):
        return f"{prefix.lower()}:{model}"
    meant = family_of(name)
    return f"{meant[0]}:{meant[1]}" if meant else None


def remote_teacher(
    name: str,
    *,
    base_url: str | None = None,
    tokenizer: Any = None,
    continuation: Continuation | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    settings: EngineSettings | None = None,
    budget: Budget | None = None,
    extra_body: dict[str, Any] | None = None,
    extra_headers: dict[str, str] | None = None,
) -> RemoteTeacher:
    """Create the teacher behind a service from a name such as `anthropic:claude-haiku-4-5`. Sends no request.

    Args:
        name: provider and model, with a colon between them. The provider (`vllm`, `openai`, `anthropic`, `gemini`,
            `azure`, `bedrock` or `vertex`) is case-insensitive.
        base_url: address of the service. Defaults to that of the adapter.
        tokenizer: tokenizer of a `vllm:` or `openai:` teacher, or its path or id. It renders the prompts of a `raw`
            continuation. Defaults to the model's name.
        continuation: overrides the model's default continuation.
        chat_template_kwargs: arguments for the teacher's chat template, for `vllm:` and `openai:`.
        settings: limits of this process.
        budget: budget of the teacher. Defaults to no limit.
        extra_body: fields that are added to the body of each request. `None` as a value leaves a field out.
        extra_headers: headers that are added to each request.

    Raises:
        ConfigError: when the provider does not exist, or does not support the continuation; when the address, a key, a
            proxy, or an extra field or header cannot be used.
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
                f"teacher_continuation={continuation!r} is not supported by teachers of {provider!r}. Choose one of: "
                f"{', '.join(CONTINUATIONS[provider])}."
            )
        capabilities = replace(capabilities, continuation=continuation)
    warn_shutdown(name, capabilities, date.today())
    options: dict[str, Any] = {
        "base_url": base_url,
        "settings": settings,
        "budget": budget,
        "extra_body": extra_body,
        "extra_headers": extra_headers,
    }
    is_claude = (family_of(model) or ("",))[0] == "anthropic"
    if provider == "bedrock" and not (is_claude or model.startswith("arn:")):
        raise ConfigError(
            f"teacher={name!r}: `bedrock:` reaches Claude only. Name a Claude model or the ARN of its inference "
            "profile; for other models, use `openai:` with the address of Bedrock's OpenAI-style API."
        )
    if provider in ("anthropic", "bedrock") or (provider == "vertex" and is_claude):
        return AnthropicTeacher(model, capabilities, provider=provider, **options)
    if provider in ("gemini", "vertex"):
        return GeminiTeacher(model, capabilities, provider=provider, **options)
    return OpenAITeacher(
        provider, model, capabilities, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs, **options
    )


def is_service(teacher: "str | PreTrainedModel | Teacher") -> bool:
    """Whether a teacher is the name of a service's model. Earlier runs count against the budget of such a teacher.

    Raises:
        ConfigError: as `split_name`.
    """
    return isinstance(teacher, str) and split_name(teacher) is not None


def is_local(teacher: "str | PreTrainedModel | Teacher") -> bool:
    """Whether a teacher is a language model in this process, by its name or as an instance.

    Raises:
        ConfigError: as `split_name`.
    """
    return _kind_of(teacher)[0] == "local"


def load_teacher(
    teacher: "str | PreTrainedModel | Teacher",
    options: TeacherOptions | None = None,
    spent: tuple[Usage, float] | None = None,
    tokenizer: Any = None,
    role: str = "teacher",
) -> Teacher:
    """Create a teacher from a name or a model. Sends no request.

    Args:
        teacher: a `Teacher`, which is returned unchanged; `"scripted"`; `"demo:judge"`; a service's model such as
            `"anthropic:claude-haiku-4-5"`; or a path, Hub id or instance of a causal language model.
        options: options of the teacher. Defaults to those of an empty configuration. Limits are for the whole job, and
            this process gets its share of them.
        spent: tokens and dollars that earlier runs of the same job paid. They count against the budget of a teacher
            behind a service. Defaults to zero.
        tokenizer: tokenizer of a model in this process. Loaded from the model's path or id when it is not given.
        role: what a model in this process is called in messages.

    Raises:
        ConfigError: when there is no such teacher, or it cannot enforce an option, or has no name.
        DataError: when a model cannot be loaded.
    """
    options = options or TeacherOptions()
    kind, name = _kind_of(teacher)
    if kind == "export":
        raise ConfigError(
            f"teacher={name!r}: an export answers only the audits of a run that trains from it, and cannot be asked "
            "anything else. Name a teacher."
        )
    check_options(kind, name, options, role)
    if isinstance(teacher, Teacher):
        own_name = getattr(teacher, "name", None)
        if not isinstance(own_name, str) or not own_name:
            raise ConfigError(
                f"The teacher, a {type(teacher).__name__}, has name={own_name!r}, but it needs a text, which names it "
                'in logs and identifies its recorded answers. Give the class a `name = "..."`.'
            )
        return teacher
    if kind == "scripted":
        return _demo_judge(options) if name == JUDGE else ScriptedTeacher()
    template = options.teacher_chat_template_kwargs
    # The student's arguments are for a chat template. A closed service has none: it may refuse the whole request.
    if template is None and (
        kind == "local" or (kind in OPENAI_STYLE and is_self_hosted(kind, options.teacher_base_url))
    ):
        template = options.chat_template_kwargs
    if kind == "local":
        return _local_teacher(teacher, tokenizer, options, template, role)
    used, usd = spent or (Usage(), 0.0)
    return remote_teacher(
        name,
        base_url=options.teacher_base_url,
        tokenizer=options.teacher_tokenizer_name_or_path,
        continuation=options.teacher_continuation,
        chat_template_kwargs=template,
        settings=_settings(options),
        budget=Budget(
            options.teacher_budget_usd,
            options.teacher_budget_tokens,
            options.price(*name.split(":", 1)),
            used,
            usd,
            num_processes=options.world_size,
        ),
        extra_body=options.teacher_extra_body,
        extra_headers=options.teacher_extra_headers,
    )


def _demo_judge(options: TeacherOptions) -> Teacher:
    from omniopd_trl.demo.judge import write_marks
    from omniopd_trl.teachers.local_judge import LocalJudge

    return LocalJudge(JUDGE, write_marks, str(asset_path("teacher")), device=options.device)


def _local_teacher(
    teacher: "str | PreTrainedModel",
    tokenizer: Any,
    options: TeacherOptions,
    chat_template_kwargs: dict[str, Any] | None,
    role: str,
) -> Teacher:
    from omniopd_trl.teachers.local import LocalTeacher

    try:
        return LocalTeacher(
            teacher,
            tokenizer,
            model_init_kwargs=options.teacher_model_init_kwargs,
            revision=options.teacher_model_revision,
            trust_remote_code=options.trust_remote_code,
            chat_template_kwargs=chat_template_kwargs,
            device=options.device,
            role=role,
        )
    except DataError as error:
        meant = suggest_name(teacher) if isinstance(teacher, str) else None
        if meant is None:
            raise
        hint = f"The name of a service's model begins with its provider: did you mean {meant!r}?"
        raise DataError(f"{error} {hint}") from error


def _settings(options: TeacherOptions) -> EngineSettings:
    """This process's share of the job's limits.

    Raises:
        ConfigError: when a share is less than one. Each process would send one, and all of them together more than the
            limit.
    """
    processes = options.world_size
    for option in ("teacher_max_concurrency", "teacher_requests_per_minute", "teacher_tokens_per_minute"):
        limit, default = getattr(options, option), getattr(TeacherOptions, option)
        if limit != default and limit < processes > 1:
            raise ConfigError(
                f"{option}={limit:g} cannot be enforced: it is divided over the {processes} processes of the job, and "
                f"each needs at least 1. Raise it to {processes} or more, or train with fewer processes."
            )

    def share(limit: float | None) -> float | None:
        return None if limit is None else limit / processes

    return EngineSettings(
        max_concurrency=max(1, options.teacher_max_concurrency // processes),
        requests_per_minute=share(options.teacher_requests_per_minute),
        tokens_per_minute=share(options.teacher_tokens_per_minute),
        timeout=options.teacher_timeout,
        max_attempts=options.teacher_max_attempts,
        max_seconds=options.teacher_max_seconds,
        max_retry_after=options.teacher_max_retry_after,
        probe_samples=1 if options.signal == "judge" else options.num_rollouts,
        probe_continues=options.signal != "judge",
    )


def _kind_of(teacher: "str | PreTrainedModel | Teacher") -> tuple[str, str]:
    """The kind of a teacher, as `check_options` knows it, and its name."""
    if isinstance(teacher, Teacher):
        return "own", getattr(teacher, "name", type(teacher).__name__)
    if not isinstance(teacher, str):
        if not callable(getattr(teacher, "generate", None)) or not hasattr(teacher, "config"):
            raise ConfigError(
                f"teacher_model={teacher!r:.100} ({type(teacher).__name__}) is no teacher. Pass a name such as "
                "'anthropic:claude-haiku-4-5', the path of a model as a string, a `transformers` model, or an "
                "instance of a subclass of `omniopd_trl.teachers.Teacher` (docs/customize.md)."
            )
        return "local", getattr(teacher.config, "_name_or_path", "")
    if is_export(teacher):
        return "export", teacher
    parts = split_name(teacher)
    if parts is not None:
        return parts[0], ":".join(parts)
    return ("scripted" if teacher in ("scripted", JUDGE) else "local"), teacher
