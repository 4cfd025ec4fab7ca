# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The place that reads an answer of a service.

An adapter names the fields of its format. The functions here check what they hold: whatever a service sends becomes
samples with clean text, a checked usage and the name of the served model, or a `MalformedResponseError`. They raise
nothing else, take linear time and return no more text than was asked for.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.teachers.base import Prefix, clean_text, common_prefix_length
from omniopd_trl.teachers.instruct.repair import declines, repair
from omniopd_trl.teachers.remote.failures import MalformedResponseError

T = TypeVar("T")

SampleOutcome = Literal["ok", "refused", "filtered", "empty", "restarted", "interrupted"]

# A longer text than this many characters per requested token is cut: the service ignores the limit. Tokenizers have
# longer tokens, but only for repeated characters such as spaces.
CHARACTERS_PER_TOKEN = 64

# Larger counts are not exact in JSON, which many services write from floating-point numbers.
MOST_TOKENS = 2**53

# Names of models, finish reasons and refusals are logged and kept, so they are cut to this many characters.
QUOTED_CHARACTERS = 200


class Sample(NamedTuple):
    """One sample of one request.

    Attributes:
        text: what the model wrote next, repaired where the continuation is instructed. The beginning of the refusal if
            the outcome is `"refused"`.
        finish_reason: `"stop"` or `"length"`. The service's own reason if the outcome is `"interrupted"`.
        outcome: `"ok"` and `"restarted"` are rollouts, the others are not. `"interrupted"`: the service broke off the
            sample, and the request may be repeated.
        reasoned: whether the model wrote reasoning in place of the sample or before it.
    """

    text: str
    finish_reason: str = "stop"
    outcome: SampleOutcome = "ok"
    reasoned: bool = False


class Response(NamedTuple):
    """The result of one request.

    Attributes:
        samples: the samples, in the service's order.
        usage: tokens of all samples together; `None` when the service does not report it correctly.
        model: name of the model that answered, as the service reports it; `None` when it reports none.
    """

    samples: tuple[Sample, ...]
    usage: Usage | None
    model: str | None = None


class Asked(NamedTuple):
    """The part of a request that is needed to read its answer.

    Attributes:
        prefix: the prefix to continue.
        num_samples: number of samples; more in an answer are not read.
        max_tokens: maximum length of a sample, in the teacher's tokens.
        instructed: whether the model was instructed to continue, so the answer needs a repair.
        unsent: white space at the end of the prefix that was not sent. It is removed from a sample that repeats it.
    """

    prefix: Prefix
    num_samples: int
    max_tokens: int
    instructed: bool = False
    unsent: str = ""


class Prepared(NamedTuple):
    """A request that is ready to be sent, alone or in a batch.

    Attributes:
        body: fields of the request.
        read: function that reads the body of its answer, and raises `MalformedResponseError` for another form.
    """

    body: dict[str, Any]
    read: Callable[[bytes | str], Response]


# ---- The body ----


def parse(body: bytes | str) -> dict[str, Any]:
    """The JSON object in the body of an answer.

    Raises:
        MalformedResponseError: when the body holds anything else.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError, too
        reason = "JSON that is nested too deeply" if isinstance(error, RecursionError) else f"no JSON: {error}"
        start = body[:1000]
        quoted = start.decode("utf-8", "replace") if isinstance(start, bytes) else start
        raise MalformedResponseError(reason, quoted) from None
    if not isinstance(answer, dict):
        raise MalformedResponseError(f"a JSON {type(answer).__name__} in place of an object", answer)
    return answer


def member(value: Any, name: str, kind: type[T]) -> T | None:
    """A member of a JSON object, `None` when it is missing or null.

    Raises:
        MalformedResponseError: when `value` is no object, or the member is not of the given kind.
    """
    if not isinstance(value, dict):
        raise MalformedResponseError(f"{type(value).__name__} in place of an object with {name!r}", value)
    found = value.get(name)
    if found is not None and not isinstance(found, kind):
        raise MalformedResponseError(f"{name!r} is of type {type(found).__name__}", value)
    return found


def members(value: Any, name: str) -> list[Any]:
    """A list in a JSON object.

    Raises:
        MalformedResponseError: when there is none.
    """
    found = member(value, name, list)
    if found is None:
        raise MalformedResponseError(f"no list of {name!r} in it", value)
    return found


# ---- Usage and model ----


def counts(usage: Any, *paths: str) -> list[int] | None:
    """Numbers of tokens in the usage that a service reports.

    Args:
        usage: JSON object, which may hold others.
        paths: path of each number, as in `"details.cached"`. A missing number is 0.

    Returns:
        The numbers, in the order of `paths`; `None` when one of them is not a whole number from 0 to 2^53 - 1. The
        service then does not say what it used.
    """
    found = []
    for path in paths:
        value = usage
        for name in path.split("."):
            if value is not None and not isinstance(value, Mapping):
                return None
            value = None if value is None else value.get(name)
        value = 0 if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_TOKENS:
            return None
        found.append(value)
    return found


def served_model(value: Any) -> str | None:
    """The name of the model that answered; `None` when the service reports no text."""
    return clean_text(value[:QUOTED_CHARACTERS]) if isinstance(value, str) and value else None


# ---- Samples ----

# The meaning of a finish reason, in lower case, over all services. All others end a complete sample.
_FINISH: dict[str, str] = {
    **dict.fromkeys(
        ("length", "max_tokens", "model_length", "model_context_window_exceeded", "continuation"), "length"
    ),
    **dict.fromkeys(
        (
            *("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii", "language"),
            *("model_armor", "escalation", "pup_limited_disabled", "sensitive"),
        ),
        "filtered",
    ),
    "refusal": "refused",
    **dict.fromkeys(
        (
            *("error", "insufficient_system_resource", "abort", "aborted", "cancelled", "canceled", "timeout"),
            *("internal_error", "server_error", "network_error", "failed", "incomplete", "malformed_response"),
        ),
        "interrupted",
    ),
}

# Marks around reasoning that a server has not separated from the answer.
_REASONING = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
}
_OPENS_REASONING = re.compile(r"\s*+(" + "|".join(map(re.escape, _REASONING)) + ")")


def read_sample(asked: Asked, content: Any, finish_reason: str | None, *, reasoned: bool = False) -> Sample:
    """Read one sample.

    Args:
        asked: what was asked for.
        content: text of the sample, or a list of its parts.
        finish_reason: the service's reason for the end of the sample; `None` for none.
        reasoned: whether the model has used tokens for reasoning outside of `content`.

    Raises:
        MalformedResponseError: when the content has another form.
    """
    meaning = _FINISH.get((finish_reason or "").lower(), "stop")
    if meaning == "interrupted":
        return Sample("", clean_text((finish_reason or "")[:QUOTED_CHARACTERS]), "interrupted")
    if meaning == "filtered":
        return Sample("", "stop", "filtered")
    text, hidden, refusal = _joined(content)
    if meaning == "refused" or refusal is not None:
        return refused_sample(refusal or text)
    most = CHARACTERS_PER_TOKEN * asked.max_tokens
    finish = "length" if meaning == "length" or len(text) > most else "stop"
    text = clean_text(text[:most])
    answer = _without_reasoning(asked, text)
    if not answer.strip() and (reasoned or hidden or answer != text):
        return Sample("", finish, "empty", reasoned=True)
    reasoned = answer != text
    # White space may continue a text. It answers no question, and services refuse it as a turn of a conversation.
    if not (answer.strip() if asked.prefix.is_question else answer):
        return Sample("", finish, "empty")
    if asked.instructed:
        repaired = repair(asked.prefix.completion, answer, asked.prefix.prompt)
        if repaired.outcome == "refused":
            return refused_sample(answer, reasoned)
        return Sample(repaired.text, finish, repaired.outcome, reasoned)
    # With nothing written yet, a refusal is how the model begins its answer, and the student may learn from it.
    if asked.prefix.completion.strip() and declines(answer):
        return refused_sample(answer, reasoned)
    answer = without_common_space(asked.unsent, answer)
    return Sample(answer, finish, "ok" if answer else "empty", reasoned)


def refused_sample(words: Any, reasoned: bool = False) -> Sample:
    """A sample that the model refused in these words, if it is a text."""
    text = clean_text(words[:QUOTED_CHARACTERS]) if isinstance(words, str) else ""
    return Sample(text, "stop", "refused", reasoned)


def _joined(content: Any) -> tuple[str, bool, Any]:
    """The text of a sample, whether it has hidden reasoning, and the refusal among its parts (`None` for none).

    Parts are joined without a separator. Parts of reasoning and of unknown types are left out.
    """
    if content is None or isinstance(content, str):
        return content or "", False, None
    if not isinstance(content, list):
        raise MalformedResponseError(f"a text of type {type(content).__name__}", content)
    texts, hidden = [], False
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = member(part, "type", str)
        if kind == "refusal":
            return "", False, part.get("refusal") or ""
        if part.get("thought") or (kind is not None and re.search("think|reason", kind)):
            hidden = True
        elif kind in (None, "text", "output_text"):
            texts.append(member(part, "text", str) or "")
    return "".join(texts), hidden, None


def _without_reasoning(asked: Asked, text: str) -> str:
    """Remove reasoning in marks at the beginning of a text.

    The student may write such marks itself. They are text where the prefix has them, and at the beginning of a raw
    continuation. In the answer to a question they are the teacher's.
    """
    opening = _OPENS_REASONING.match(text)
    if not opening or opening[1] in asked.prefix.completion:
        return text
    if not asked.instructed and not asked.prefix.is_question and not asked.prefix.completion.strip():
        return text
    return text[opening.end() :].partition(_REASONING[opening[1]])[2]


def without_common_space(unsent: str, text: str) -> str:
    """Remove from a continuation the white space that was not sent, where the model wrote it again.

    Args:
        unsent: white space at the end of the prefix.
        text: the continuation of the prefix without it.

    Example:
        >>> without_common_space("\\n", "\\n\\nwe add")
        '\\nwe add'
    """
    return text[common_prefix_length(unsent, text) :]


# ---- Kept answers ----


def to_kept(response: Response, num_samples: int) -> dict[str, Any]:
    """The first `num_samples` samples of a response and its model, as JSON."""
    return {"model": response.model, "samples": [list(sample) for sample in response.samples[:num_samples]]}


def from_kept(value: Any) -> Response | None:
    """The response that `to_kept` has written, without usage; `None` when the value has another form.

    The text is cleaned again, because an earlier version may have written it.
    """
    if isinstance(value, list):  # as earlier versions wrote it
        value = {"samples": value}
    try:
        samples = tuple(_kept_sample(sample) for sample in members(value, "samples"))
    except MalformedResponseError:
        return None
    return Response(samples, Usage(), served_model(value.get("model")))


def _kept_sample(value: Any) -> Sample:
    if not isinstance(value, list) or not 1 <= len(value) <= len(Sample._fields):
        raise MalformedResponseError("a sample of another form", value)
    sample = Sample(*value)
    if not isinstance(sample.text, str) or sample.outcome not in get_args(SampleOutcome):
        raise MalformedResponseError("a sample of another form", value)
    return sample._replace(text=clean_text(sample.text), finish_reason=str(sample.finish_reason))
