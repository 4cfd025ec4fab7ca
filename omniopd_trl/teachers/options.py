# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The options of a teacher, and which kind of teacher reads which option.

An option without effect is reported. A limit on money without effect is an error.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from omniopd_trl.accounting.pricing import Price, price_of
from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers.instruct.judge import Signal
from omniopd_trl.teachers.providers.capabilities import OPENAI_STYLE, PROVIDERS
from omniopd_trl.teachers.remote.settings import Continuation

if TYPE_CHECKING:
    import torch

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TeacherOptions:
    """The part of the configuration that a teacher is created from; see `OmniOPDConfig` for the meaning of each field.

    Attributes:
        device: device of a local teacher.
        world_size: number of processes that share the limits of a teacher behind a service.
        process_index: index of this process. The first one logs the warnings.
    """

    teacher_model_revision: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | None = None
    teacher_chat_template_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    teacher_base_url: str | None = None
    teacher_tokenizer_name_or_path: str | None = None
    teacher_continuation: Continuation | None = None
    teacher_extra_body: dict[str, Any] | None = None
    teacher_extra_headers: dict[str, str] | None = None
    teacher_max_concurrency: int = 64
    teacher_requests_per_minute: float | None = None
    teacher_tokens_per_minute: float | None = None
    teacher_timeout: float = 120.0
    teacher_max_attempts: int | None = None
    teacher_max_seconds: float = 600.0
    teacher_max_retry_after: float = 120.0
    teacher_budget_usd: float | None = None
    teacher_budget_tokens: int | None = None
    teacher_input_price: float | None = None
    teacher_output_price: float | None = None
    teacher_cached_price: float | None = None
    num_rollouts: int = 10
    signal: Signal = "rollouts"
    device: "torch.device | str | None" = None
    world_size: int = 1
    process_index: int = 0

    @classmethod
    def of(cls, config: Any) -> "TeacherOptions":
        """The options of an `OmniOPDConfig`, by the names of the fields."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def price(self, provider: str, model: str) -> Price | None:
        """The price of a model: these options, or the table; see `price_of`."""
        return price_of(
            provider,
            model,
            input_price=self.teacher_input_price,
            output_price=self.teacher_output_price,
            cached_price=self.teacher_cached_price,
            base_url=self.teacher_base_url,
        )


_ALL = (*PROVIDERS, "local", "scripted", "own", "export")

# Kinds of teachers in messages. Services are named by their prefix.
_WORDS = {
    "local": "a model in this process, which costs nothing",
    "scripted": "the scripted one, which costs nothing",
    "own": "a custom teacher",
    "export": "an export, of which nothing is asked",
}

READ_BY: dict[str, tuple[str, ...]] = {
    "teacher_model_name_or_path": _ALL,
    "teacher_model_revision": ("local",),
    "teacher_model_init_kwargs": ("local",),
    # Every teacher receives these, whether or not it uses them.
    "teacher_temperature": _ALL,
    "teacher_top_p": _ALL,
    "teacher_chat_template_kwargs": (*OPENAI_STYLE, "local"),
    "teacher_base_url": PROVIDERS,
    "teacher_tokenizer_name_or_path": OPENAI_STYLE,
    "teacher_continuation": PROVIDERS,
    "teacher_extra_body": PROVIDERS,
    "teacher_extra_headers": PROVIDERS,
    "teacher_max_concurrency": PROVIDERS,
    "teacher_requests_per_minute": PROVIDERS,
    "teacher_tokens_per_minute": PROVIDERS,
    "teacher_timeout": PROVIDERS,
    "teacher_max_attempts": PROVIDERS,
    "teacher_max_seconds": PROVIDERS,
    "teacher_max_retry_after": PROVIDERS,
    "teacher_budget_usd": PROVIDERS,
    "teacher_budget_tokens": PROVIDERS,
    "teacher_input_price": PROVIDERS,
    "teacher_output_price": PROVIDERS,
    "teacher_cached_price": PROVIDERS,
    # The prompts that every teacher receives are made with these.
    "teacher_context_column": _ALL,
    "teacher_context_template": _ALL,
}

# A run relies on these limits: they are refused, not ignored, when nothing enforces them.
LIMITS = ("teacher_budget_usd", "teacher_budget_tokens", "teacher_requests_per_minute", "teacher_tokens_per_minute")


def check_options(kind: str, name: str, options: TeacherOptions, role: str = "teacher") -> None:
    """Refuse limits that a custom teacher would not enforce, and warn about other options without effect.

    A recipe for a service is often tried with the scripted teacher or with a small model. They cost nothing and stay
    within its limits, so one warning is enough.

    Args:
        kind: a provider, `"local"`, `"scripted"`, `"own"` or `"export"`.
        name: name of the teacher, for the messages.
        options: options to check.
        role: what the teacher is called in the warning.

    Raises:
        ConfigError: when a limit is set and the teacher is an instance, which has its own limits.
    """
    unread = [option for option, kinds in READ_BY.items() if kind not in kinds and _is_set(options, option)]
    limits = [f"{option}={getattr(options, option):g}" for option in unread if option in LIMITS]
    if kind == "own" and limits:
        raise ConfigError(
            f"{', '.join(limits)} cannot be enforced: the teacher {name!r} is an instance, which has its own limits "
            "or none. Set them on the teacher itself, for a service as in `remote_teacher(name, "
            "budget=Budget(max_usd=20), settings=EngineSettings(requests_per_minute=60))`, and leave them out of the "
            "configuration; or pass the teacher's name, such as 'anthropic:claude-haiku-4-5'."
        )
    # Each process makes the same teacher from the same settings.
    if unread and options.process_index == 0:
        logger.warning(
            f"{', '.join(unread)}: without effect, since the {role} {name!r} is "
            f"{_WORDS.get(kind, 'a service that does not use it')}."
        )


def _is_set(options: TeacherOptions, option: str) -> bool:
    value = getattr(options, option)
    if isinstance(value, dict) and value and all(entry is None for entry in value.values()):
        return False  # entries that the command leaves at `None`
    return bool(value != getattr(TeacherOptions, option))
