# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Capabilities of each model, by name. When a model contradicts this table, later requests are adapted.

Sources: the SDKs (openai 3.57, anthropic 2.14, google-genai 3.6) and answers of the services, November 2026.
"""

import re
from dataclasses import replace
from datetime import date
from typing import Literal, get_args

from transformers.utils import logging

from omniopd_trl.teachers.remote.settings import Capabilities

logger = logging.get_logger(__name__)

Provider = Literal["vllm", "openai", "anthropic", "gemini", "azure", "bedrock", "vertex"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

# Whose model a name means, whatever is before it: a vendor at a router (`openai/gpt-6-luna`), or a region and a vendor
# on Bedrock. OpenAI's open models (gpt-oss) are ids on the Hub and must not match.
FAMILIES: tuple[tuple[str, Provider], ...] = (
    (r"(?:.*anthropic[/.]|(?:bedrock|vertex_ai)/)?(claude-.+)", "anthropic"),
    (r"(?:(?:google|gemini|vertex_ai)/)?(gemini-.+)", "gemini"),
    (r"(?:(?:openai|azure)/)?((?!gpt-oss)(?:gpt-\d|chatgpt-|o\d).*)", "openai"),
    (r"(?:deepseek/)(deepseek-.+)", "openai"),
    (r"(?:mistral/)((?:open-)?(?:mistral|ministral|mixtral|codestral|devstral|magistral)-.+)", "openai"),
)

# Providers with an OpenAI-compatible API.
OPENAI_STYLE: tuple[Provider, ...] = ("vllm", "openai")

# Samples per request. vLLM and SGLang draw them from one prompt; larger bursts stall a server.
VLLM_SAMPLES = 64

_VLLM = Capabilities(
    continuation="raw",
    samples_per_request=VLLM_SAMPLES,
    # Templates without this switch ignore it.
    reasoning_off={"chat_template_kwargs": {"enable_thinking": False}},
)

# ---- Models of OpenAI, and of OpenAI-compatible services ----
_OPENAI = Capabilities("instruct", samples_per_request=8, min_cached_prefix=1024)
_OPENAI_NONE = replace(_OPENAI, reasoning_off={"reasoning_effort": "none"})
_OPENAI_REASONS = replace(_OPENAI, takes_temperature=False, reasoning_headroom=1024)
_PREFIX_FLAG = Capabilities("prefix_flag")

# ---- Claude ----
_CLAUDE_PREFILL = Capabilities("prefill", min_cached_prefix=1024)
_CLAUDE_4_6 = Capabilities("instruct", min_cached_prefix=1024)
_CLAUDE_4_7 = replace(_CLAUDE_4_6, takes_temperature=False)
_CLAUDE_5 = replace(_CLAUDE_4_7, reasoning_off={"thinking": {"type": "disabled"}})
# Always reasons; an explicit `thinking` is refused.
_CLAUDE_REASONS = replace(_CLAUDE_4_7, reasoning_off={"output_config": {"effort": "low"}}, reasoning_headroom=1024)

# ---- Gemini ----
_GEMINI_2_5 = Capabilities(
    "prefill",
    samples_per_request=8,
    reasoning_off={"thinking_config": {"thinking_budget": 0}},
    min_cached_prefix=1024,
)
# The minimum that it accepts. Its thoughts count against the limit on the answer.
_GEMINI_2_5_PRO = replace(
    _GEMINI_2_5, reasoning_off={"thinking_config": {"thinking_budget": 128}}, reasoning_headroom=256
)
_GEMINI_3 = Capabilities(
    "instruct", reasoning_off={"thinking_config": {"thinking_level": "minimal"}}, min_cached_prefix=2048
)
# These do not support "minimal".
_GEMINI_3_PRO = replace(
    _GEMINI_3, reasoning_off={"thinking_config": {"thinking_level": "low"}}, reasoning_headroom=1024
)

# The first pattern that matches the whole name, in lower case, is used. The last one is the provider's default, the
# safest choice for an unknown model.
MODELS: dict[str, list[tuple[str, Capabilities]]] = {
    "vllm": [(r".*", _VLLM)],
    "openai": [
        (r"deepseek-(chat|v\d.*)", replace(_PREFIX_FLAG, reasoning_off={"thinking": {"type": "disabled"}})),
        (r"deepseek-reasoner.*", replace(_PREFIX_FLAG, takes_temperature=False, reasoning_headroom=1024)),
        (r"(magistral)-.*", replace(_PREFIX_FLAG, reasoning_headroom=1024)),
        (r"(open-)?(mistral|ministral|mixtral|codestral|devstral|pixtral)-.*", _PREFIX_FLAG),
        (r"o\d(-.*)?", replace(_OPENAI_REASONS, reasoning_off={"reasoning_effort": "low"})),
        (r"gpt-5(-(mini|nano))?(-\d{4}-.*)?", replace(_OPENAI_REASONS, reasoning_off={"reasoning_effort": "minimal"})),
        (r"gpt-[5-9].*-(pro|codex)(-.*)?", replace(_OPENAI_REASONS, reasoning_off={"reasoning_effort": "low"})),
        (r"gpt-[5-9].*-chat-latest", _OPENAI),
        (r"gpt-[5-9].*", _OPENAI_NONE),
        (r".*", _OPENAI),
    ],
    "anthropic": [
        (r"claude-haiku-4-5(-.*)?", replace(_CLAUDE_PREFILL, min_cached_prefix=4096)),
        (r"claude-opus-4-5(-.*)?", replace(_CLAUDE_PREFILL, min_cached_prefix=4096)),
        (r"claude-3-.*", _CLAUDE_PREFILL),
        (r"claude-(opus|sonnet|haiku)-4(-[0-5])?(-\d{8})?", _CLAUDE_PREFILL),
        (r"claude-opus-4-6(-.*)?", replace(_CLAUDE_4_6, min_cached_prefix=4096)),
        (r"claude-\w+-4-\d+(-.*)?", _CLAUDE_4_7),
        (r"claude-(fable|mythos)-.*|claude-opus-5-5.*", _CLAUDE_REASONS),
        (r".*", _CLAUDE_5),
    ],
    "gemini": [
        (r"gemini-2\.5-pro.*", _GEMINI_2_5_PRO),
        (r"gemini-2\.5-.*", _GEMINI_2_5),
        (r"gemini-[12]\..*", replace(_GEMINI_2_5, reasoning_off={})),
        (r"gemini-\d+(\.\d+)?-pro.*", _GEMINI_3_PRO),
        (r".*", _GEMINI_3),
    ],
}

# Dates announced by the providers. The SDKs list them for the models that they know.
SHUTDOWNS: dict[str, list[tuple[str, date]]] = {
    "vllm": [],
    "openai": [
        (r"gpt-5(-mini|-nano)?(-2025-08-07)?|o3(-2025-04-16)?", date(2026, 12, 11)),
        (r"gpt-4o-2024-05-13|gpt-4\.1-nano.*|o4-mini.*|o3-mini.*|o1(-2024-12-17)?", date(2026, 10, 23)),
        (r"gpt-4|gpt-4-0613|gpt-4-turbo.*|gpt-3\.5-turbo.*", date(2026, 10, 23)),
        (r"gpt-4\.1(-mini)?(-2025.*)?|gpt-4o(-mini)?(-2024.*)?", date(2027, 1, 14)),
        (r"gpt-5\.1(-2025-11-13)?|gpt-5\.4-nano.*", date(2027, 4, 1)),
        (r"gpt-5\.[23]-chat-latest", date(2026, 8, 10)),
        (r"gpt-5(\.1)?-chat-latest|gpt-5\.1-codex", date(2026, 7, 23)),
    ],
    "anthropic": [
        (r"claude-sonnet-4-5(-20250929)?", date(2026, 11, 30)),
        (r"claude-mythos-preview", date(2026, 6, 30)),
        (r"claude-(opus|sonnet)-4-0|claude-(opus|sonnet)-4-20250514", date(2026, 6, 15)),
        (r"claude-3-(7-sonnet|5-haiku)-.*", date(2026, 2, 19)),
        (r"claude-3-opus-.*", date(2026, 1, 5)),
    ],
    "gemini": [(r"gemini-2\.5-flash", date(2026, 12, 1))],
}


def family_of(model: str) -> tuple[Provider, str] | None:
    """Whose model a name means and its plain name, without vendor, region and version; `None` for an unknown one.

    Example:
        >>> family_of("openai/gpt-6-luna"), family_of("us.anthropic.claude-haiku-4-5-20251001-v1:0")
        (('openai', 'gpt-6-luna'), ('anthropic', 'claude-haiku-4-5-20251001'))
    """
    for pattern, family in FAMILIES:
        if found := re.fullmatch(pattern, model, re.IGNORECASE):
            return family, re.sub(r"-v\d+(:\d+)?$", "", found[1]).replace("@", "-")
    return None


def capabilities_of(provider: str, model: str) -> Capabilities:
    """The capabilities of a model.

    Args:
        provider: one of `PROVIDERS`.
        model: the service's name of the model.

    Returns:
        The entry of the first pattern that matches. The last pattern of a provider matches every model and is its
        safest choice: closed models are instructed. A model behind a router or on a cloud's platform has the entry of
        its vendor, as far as the platform's API can express it.

    Raises:
        KeyError: for an unknown provider.

    Example:
        >>> capabilities_of("anthropic", "claude-haiku-4-5").continuation
        'prefill'
    """
    table, name = {"azure": "openai", "bedrock": "anthropic", "vertex": "gemini"}.get(provider, provider), model
    if provider in ("azure", "bedrock", "vertex") or (provider == "openai" and "/" in model):
        table, name = family_of(model) or (table, model)
    name = name.lower()
    found = next(known for pattern, known in MODELS[table] if re.fullmatch(pattern, name))
    if provider in ("openai", "azure") and table != "openai":
        # The switches of another vendor's API do not exist there, and a prefill is not continued everywhere.
        return replace(found, continuation="instruct", reasoning_off={})
    if name != model.lower() and found.continuation == "prefix_flag":
        found = replace(found, continuation="instruct")  # not every router passes the flag on
    if table != provider:
        return found  # dates of the platform are not known
    dates = SHUTDOWNS[provider]
    return replace(found, shutdown=next((day for pattern, day in dates if re.fullmatch(pattern, name)), None))


def warn_shutdown(name: str, capabilities: Capabilities, today: date) -> None:
    """Log a warning when the provider retires a model within 30 days, or has retired it.

    Args:
        name: name of the teacher, as in `anthropic:claude-sonnet-4-5`.
        capabilities: capabilities of the teacher's model.
        today: date to compare with.
    """
    if capabilities.shutdown is None:
        return
    days = (capabilities.shutdown - today).days
    if days < 0:
        logger.warning(
            f"The provider announced the end of {name} for {capabilities.shutdown}. If it no longer answers, name "
            "another model."
        )
    elif days <= 30:
        logger.warning(
            f"The provider switches {name} off on {capabilities.shutdown}, in {days} days. A run that lasts longer, "
            "or is resumed later, needs another model."
        )
