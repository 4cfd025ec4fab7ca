# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Which `teacher_*` option is read by which kind of teacher.

An option that nobody reads would be a promise that nobody keeps, most of all where it is a limit on money.
"""

from typing import Any

from transformers.utils import logging

from omniopd_trl.errors import ConfigError

logger = logging.get_logger(__name__)

_SERVICES = ("vllm", "openai", "anthropic", "gemini")
_ALL = (*_SERVICES, "local", "scripted", "own")

# What a kind of teacher is, as messages say it. The services are named by their prefix.
_WORDS = {
    "local": "a model in this process, which costs nothing",
    "scripted": "the scripted one, which costs nothing",
    "own": "one of your own",
}

READ_BY: dict[str, tuple[str, ...]] = {
    "teacher_model_name_or_path": _ALL,
    "teacher_model_revision": ("local",),
    "teacher_model_init_kwargs": ("local",),
    # Every teacher is told how to sample; what it does with that is its own affair.
    "teacher_temperature": _ALL,
    "teacher_top_p": _ALL,
    "teacher_chat_template_kwargs": ("vllm", "openai", "local"),
    "teacher_base_url": _SERVICES,
    "teacher_tokenizer_name_or_path": ("vllm", "openai"),
    "teacher_continuation": _SERVICES,
    "teacher_max_concurrency": _SERVICES,
    "teacher_requests_per_minute": _SERVICES,
    "teacher_tokens_per_minute": _SERVICES,
    "teacher_timeout": _SERVICES,
    "teacher_max_attempts": _SERVICES,
    "teacher_max_seconds": _SERVICES,
    "teacher_max_retry_after": _SERVICES,
    "teacher_budget_usd": _SERVICES,
    "teacher_budget_tokens": _SERVICES,
    "teacher_input_price": _SERVICES,
    "teacher_output_price": _SERVICES,
    "teacher_cached_price": _SERVICES,
}

# Whoever sets one of these relies on it.
LIMITS = ("teacher_budget_usd", "teacher_budget_tokens", "teacher_requests_per_minute", "teacher_tokens_per_minute")


def check_options(kind: str, name: str, args: Any) -> None:
    """Refuse limits that a teacher of one's own would not keep, and name other options that have no effect.

    A recipe for a service is often tried with the scripted teacher, or with a small model: these cost nothing, so that
    its limits are kept and one warning is enough.

    Args:
        kind: a prefix of a service, `"local"`, `"scripted"` or `"own"`.
        name: of the teacher, for the messages.
        args: the configuration.

    Raises:
        ConfigError: when a limit is set, and the teacher is an instance that keeps its own accounts.
    """
    unread = [option for option, kinds in READ_BY.items() if kind not in kinds and _is_set(args, option)]
    limits = [f"{option}={getattr(args, option):g}" for option in unread if option in LIMITS]
    if kind == "own" and limits:
        raise ConfigError(
            f"{', '.join(limits)} cannot be kept: the teacher {name!r} is an instance, which keeps limits of its "
            "own or none. Set them on the teacher itself, for a service as in `remote_teacher(name, "
            "budget=Budget(max_usd=20), settings=EngineSettings(requests_per_minute=60))`, and leave them out of the "
            "configuration; or name the teacher by a text such as 'anthropic:claude-haiku-4-5'."
        )
    # Each process makes the same teacher from the same settings.
    if unread and args.process_index == 0:
        logger.warning(
            f"{', '.join(unread)}: without effect, since the teacher {name!r} is "
            f"{_WORDS.get(kind, 'a service that has no use for that')}."
        )


def _is_set(args: Any, option: str) -> bool:
    return bool(getattr(args, option) != type(args).__dataclass_fields__[option].default)
