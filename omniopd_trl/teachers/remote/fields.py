# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The fields of a request's body: which a service refused, and which a user adds."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from omniopd_trl.errors import ConfigError
from omniopd_trl.teachers.remote.failures import OUT_OF_RANGE, Failure, ServiceError, is_about_request, quote

_OWN_PENALTY = "the service's own penalty applies, if it has one"
_OWN_LIMIT = "the service's own limit applies, if it has one: rollouts may lack unlikely tokens"

# Fields without which a request is answered as well, and what leaving one out means for the rollouts.
OPTIONAL = {
    "temperature": "the service samples at its own temperature, not at teacher_temperature",
    "top_p": _OWN_LIMIT,
    "top_k": _OWN_LIMIT,
    "min_p": _OWN_LIMIT,
    "repetition_penalty": _OWN_PENALTY,
    "presence_penalty": _OWN_PENALTY,
    "frequency_penalty": _OWN_PENALTY,
    "seed": "a repeated run gets other samples",
    "random_seed": "a repeated run gets other samples",
    "reasoning_effort": "a model that reasons does so at its own effort",
    "chat_template_kwargs": "the server's template decides whether the model reasons",
    "metadata": "a gateway may answer equal requests from a cache",
    "add_special_tokens": "the server begins the text with its own first token",
    "max_tokens": "max_completion_tokens is sent instead",
    "max_completion_tokens": "max_tokens is sent instead",
}
# The two names of the limit on a sample's tokens. One of them is always sent.
OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}

# Statuses of refused requests, and statuses with which some servers refuse a field, for example 500 for a value that
# their own types reject.
_REFUSALS = (400, 422)
_STATUSES = (*_REFUSALS, 404, 500, 501)
_UNKNOWN = re.compile(
    r"un(supported|recogni[sz]ed|expected|known)|n[o']t .{0,20}(support|permitted|allowed|recogni[sz]ed|accepted)"
    r"|extra(neous)?\b|deprecated|cannot find field|not (implemented|available|a valid)|incompatible"
)
_VALIDATION = re.compile(rf"{_UNKNOWN.pattern}|{OUT_OF_RANGE.pattern}|(must|should) be|validation error")
_REFUSED = re.compile(rf"{_VALIDATION.pattern}|invalid|must|should|cannot|only")
_SAMPLES = "(completion|choice|candidate|sample|sequence|generation)"
_ONE_SAMPLE = re.compile(
    rf"\bn_cmpl\b|candidate_?count|(multiple|several) {_SAMPLES}s?\b|(only|exactly) (one|1|a single) (\w+ )?{_SAMPLES}"
    # The field itself: in quotes, before a rule, or after the words that services put before a field.
    r"|[`'\"\[]n[`'\"\]]|(^|[\s.:])n ?([=<>]|is\b|must\b|should\b|cannot\b|can only\b)"
    r"|(argument|parameter|property|field|key|name)s?( supplied| not supported)?:? n\b"
)
_NO_PREFILL = re.compile(
    r"prefill|continue_final_message|must end with a user message|prefix.*assistant|assistant.*prefix"
    r"|role.*(\blast\b|ends? with)|(\blast\b|ends? with).*\brole"
)
_REASONING = re.compile(r"\bthinking|reasoning|\beffort")
_OTHER_EFFORT = re.compile(
    r"unsupported value|does not support ['\"`]?(none|minimal|low)|invalid (value|option)|one of|expected|input should"
)


def refusal(said: ServiceError) -> Failure | None:
    """What an error says about the request's form: a capability that the model lacks, or a field that is refused.

    Args:
        said: the error that the service reports.

    Returns:
        The failure, or `None` when the error is about something else.

    Example:
        >>> refusal(ServiceError(400, "Unrecognized request arguments supplied: min_p, top_k")).fields
        ('top_k', 'min_p')
        >>> refusal(ServiceError(500, "Only one completion choice is allowed")).kind
        'one_sample'
    """
    text, status, quoted = said.message.lower(), said.status, quote(said)
    if status not in _STATUSES or is_about_request(said):
        return None
    param = (said.param or "").rsplit(".", 1)[-1]
    refused = (_REFUSED if status in _REFUSALS else _VALIDATION).search(text) is not None
    if status in _REFUSALS and _NO_PREFILL.search(text):
        return Failure("no_prefill", quoted)
    if param == "n" or _ONE_SAMPLE.search(text):
        return Failure("one_sample", quoted)
    unknown, outside = (pattern.search(text) is not None for pattern in (_UNKNOWN, OUT_OF_RANGE))
    fields = tuple(name for name in OPTIONAL if _names(name, param, text))
    if limit := [name for name in fields if name in OTHER_LIMIT]:
        # The message usually names both: the one that is refused, and then the one to use.
        first = param if param in limit else min(limit, key=text.find)
        fields = tuple(name for name in fields if name not in OTHER_LIMIT or (name == first and unknown))
    if {"temperature", "top_p"} <= set(fields) and "both" in text:
        fields = ("top_p",)  # the service accepts one of them
    if status in _REFUSALS and "reasoning_effort" in fields and (_OTHER_EFFORT.search(text) or not unknown):
        return Failure("always_reasons", quoted)
    if fields and (param in fields or refused):
        return Failure("no_field", quoted, fields=fields, out_of_range=outside)
    if (
        status in _REFUSALS
        and _REASONING.search(f"{param} {text}")
        and (refused or param in ("reasoning", "thinking"))
    ):
        return Failure("always_reasons", quoted)
    return None


def _names(field: str, param: str, text: str) -> bool:
    """Whether an error names a field, in any spelling: `top_p`, `topP`, `body.top_p`."""
    pattern = field.replace("_", "_?")
    return re.fullmatch(pattern, param, re.IGNORECASE) is not None or (
        re.search(rf"(?<![a-z0-9_]){pattern}(?![a-z0-9_])", text) is not None
    )


def without(fields: Collection[str]) -> str:
    """What leaving out fields means, for a warning."""
    meanings = dict.fromkeys(OPTIONAL[name] for name in fields)
    return f"{', '.join(fields)} {'is' if len(fields) == 1 else 'are'} left out; {'; '.join(meanings)}"


def limit_field(default: str, refused: Collection[str]) -> str:
    """The name of the field that limits the tokens of a sample: `default`, or the other one if it was refused."""
    return OTHER_LIMIT[default] if default in refused else default


# ---- Fields and headers that a user adds ----

# Fields that the teacher writes, and the option that sets each; "" for none. `null` leaves out those in OPTIONAL.
_SET_ELSEWHERE = {
    "model": "teacher_model_name_or_path",
    "n": "num_rollouts",
    "temperature": "teacher_temperature",
    "top_p": "teacher_top_p",
    "seed": "seed",
    "max_tokens": "chunk_length",
    "max_completion_tokens": "chunk_length",
    **dict.fromkeys(("messages", "prompt", "contents", "system", "stream"), ""),
}


def check_extra(body: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> None:
    """Check `teacher_extra_body` and `teacher_extra_headers`.

    Raises:
        ConfigError: when a field is one that the teacher sets itself, or a header cannot be sent.
    """
    for option, extra in (("teacher_extra_body", body), ("teacher_extra_headers", headers)):
        if extra is not None and not isinstance(extra, Mapping):
            raise ConfigError(f"{option}={extra!r:.100} must be a dictionary.")
    for field, value in (body or {}).items():
        if field not in _SET_ELSEWHERE or (value is None and field in OPTIONAL and field not in OTHER_LIMIT):
            continue
        option = _SET_ELSEWHERE[field]
        advice = f"Set it with `{option}`" if option else "Leave it out: the teacher writes it"
        raise ConfigError(f"teacher_extra_body has the field {field!r}, which is sent by the teacher. {advice}.")
    for name, value in (headers or {}).items():
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e]*", value):
            raise ConfigError(
                f"teacher_extra_headers[{name!r}] must be a text of ASCII characters, in quotation marks in YAML, and "
                f"is a {type(value).__name__}."
            )
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ConfigError(f"teacher_extra_headers has {name!r}, which is not the name of a header. Correct it.")
