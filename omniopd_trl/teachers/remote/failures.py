# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the errors of services and their SDKs mean."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

FailureKind = Literal[
    "final",
    "transient",
    "rate_limited",
    "rejected",
    "no_prefill",
    "no_temperature",
    "one_sample",
    "always_reasons",
]

# What is believed of a model after it refused a request for one of these reasons. Tables of capabilities age.
LEARNED: dict[str, dict[str, Any]] = {
    "no_prefill": {"continuation": "instruct"},
    "no_temperature": {"takes_temperature": False},
    "one_sample": {"samples_per_request": 1},
    "always_reasons": {"reasoning_off": {}, "reasoning_headroom": 1024},
}


@dataclass(frozen=True)
class Failure:
    """What an exception of an SDK means.

    Attributes:
        kind: `"final"` (no request will be answered), `"transient"`, `"rate_limited"`, `"rejected"` (this very request
            will not be answered, others may: it is longer than the model's context), or what the model turned out not
            to do: `"no_prefill"` (continue a given beginning), `"no_temperature"`, `"one_sample"` (several samples per
            request), `"always_reasons"` (reasoning off).
        message: cause and next step, in words, without secrets.
        retry_after: seconds to wait, when the service named them.
        may_be_billed: whether the service may have worked, and charge for it, all the same: no answer in time, a
            connection that broke. The budget then counts the worst case.
    """

    kind: FailureKind
    message: str
    retry_after: float | None = None
    may_be_billed: bool = False


class MalformedResponseError(Exception):
    """A response arrived that is not what the service's own format says."""


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Take out of a text what is, or looks like, a key or a part of one.

    Args:
        text: what a service said. Some echo the beginning or the end of the key that they refuse.
        secrets: the keys in use.
    """
    secrets = list(secrets)
    for secret in secrets:
        text = text.replace(secret, "[key]")
    text = re.sub(r"(?<=://)[^\s/@]+@", "[key]@", text)  # user and password in an address
    text = re.sub(r"(?i)\bbearer\s+\S+", "Bearer [key]", text)
    text = re.sub(r"\b(?:(?:sk|gsk|pk|rk)[-_]|AIza|AQ\.|ya29\.)[\w\-.*•…]{6,}", "[key]", text)

    def hide(match: re.Match[str]) -> str:
        # Part of a key, as it stands or with its middle starred out. Words that a key merely contains stay.
        word = match[0].rstrip(".,;:")
        pieces = [piece for piece in re.split(r"[*•…]+|\.{3,}", word) if piece]
        starred = "".join(pieces) != word
        for secret in secrets:
            for piece in pieces:
                ends = secret.startswith(piece) or secret.endswith(piece)
                if ends and len(piece) >= (1 if starred else 4):
                    return "[key]" + match[0][len(word) :]
        return match[0]

    return re.sub(r"[^\s'\"`,()\[\]{}]+", hide, text)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a response's headers: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) / scale)
        except ValueError:
            pass
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            continue
        return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    return None


def was_sent(error: BaseException) -> bool:
    """Whether a request that got no answer may have reached the service, which may then charge for it.

    The SDKs' transports name what happened before: no connection, in time or at all, and no free place in the pool.
    """
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout"):
            return False
        cause = cause.__cause__
    return True


TOO_LONG = re.compile(
    r"context.?length|context window|context size|maximum model length|prompt is too long|request_too_large"
    r"|exceeds the maximum number of tokens",
    re.IGNORECASE,
)

_OUT_OF_RANGE = re.compile(
    r"must be (in|between|at (least|most))|(above|below) (the )?(maximum|minimum)|"
    r"\brange\b|(less|greater) than or equal"
)


def out_of_range(detail: str) -> bool:
    """Whether a refusal is about a parameter's value, and so says that there is such a parameter.

    A request without it would be answered, and sampled as the service likes.
    """
    return _OUT_OF_RANGE.search(detail.lower()) is not None


def failure_of_status(
    status: int, detail: str, *, model: str, key: str, wait: float | None = None, code: str | None = None
) -> Failure:
    """What an HTTP status means with any provider.

    Args:
        status: of the response, 4xx or 5xx.
        detail: what the service said.
        model: as the service knows it.
        key: the environment variable that holds the key.
        wait: seconds that the service asked to wait.
        code: the service's own code of the error, where it has one.
    """
    said = f"{status}: {detail[:500]}"
    if code == "insufficient_quota" or status == 402:
        return Failure("final", f"the account has no quota or credit left ({said}). Top it up, then resume.")
    if status in (429, 503, 529):
        busy = "asked too often" if status == 429 else "overloaded"
        return Failure("rate_limited", f"the service says that it is {busy} ({said})", wait)
    if status in (408, 409, 425, 499) or (status >= 500 and status != 501):
        return Failure("transient", f"the service failed ({said})", wait, may_be_billed=status in (408, 499, 504))
    if status in (400, 413, 422) and TOO_LONG.search(f"{code} {detail}"):
        return Failure("rejected", f"the prompt is longer than the model takes ({said})")
    if code in ("content_filter", "content_policy_violation"):
        return Failure("rejected", f"the prompt was filtered ({said})")
    if status == 401:
        return Failure("final", f"the key in {key} was refused ({said}). Set a valid one and start again.")
    if status == 403:
        return Failure("final", f"the key in {key} may not use {model!r} ({said}). Ask for access, or name another.")
    if status == 404:
        return Failure("final", f"no model {model!r} at this address ({said}). Check teacher and base URL.")
    return Failure("final", f"the service refuses the request ({said}). Another attempt would be refused as well.")
