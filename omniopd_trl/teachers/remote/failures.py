# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Classification of the errors of services and their SDKs."""

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
    "no_field",
    "one_sample",
    "always_reasons",
]

# The capabilities of a model after it refused a request for one of these reasons. The table may be outdated.
LEARNED: dict[str, dict[str, Any]] = {
    "no_prefill": {"continuation": "instruct"},
    "no_field": {},  # the failure's `fields` are added to `refused`
    "one_sample": {"samples_per_request": 1},
    "always_reasons": {"reasoning_off": {}, "reasoning_headroom": 1024},
}


@dataclass(frozen=True)
class Failure:
    """Classification of an SDK's exception.

    Attributes:
        kind: `"final"` (no request will be answered), `"transient"`, `"rate_limited"`, or `"rejected"` (only this
            request will not be answered, for example because it is longer than the model's context). The others name a
            missing capability: `"no_prefill"`, `"no_field"` (optional fields are refused),
            `"one_sample"` (one sample per request), `"always_reasons"` (reasoning cannot be disabled).
        message: cause and next step, without secrets.
        retry_after: wait that the service asked for, in seconds; `None` for none.
        may_be_billed: whether the service may charge for the request although no answer arrived, for example after a
            timeout. The budget then counts the worst case.
        fields: the refused fields of a `"no_field"`.
        out_of_range: whether the values of `fields` are refused, and not the fields.
        otherwise: what a missing capability means when the request did not use it.
    """

    kind: FailureKind
    message: str
    retry_after: float | None = None
    may_be_billed: bool = False
    fields: tuple[str, ...] = ()
    out_of_range: bool = False
    otherwise: "Failure | None" = None


class MalformedResponseError(Exception):
    """A response does not follow the service's own format."""


def malformed_in(error: Exception) -> Exception:
    """The `MalformedResponseError` of our HTTP client, which the SDKs wrap in their own; else the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MalformedResponseError):
        cause = cause.__cause__
    return cause or error


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Remove from a text what is, or looks like, a key or a part of one.

    Args:
        text: message of a service. Some services echo the beginning or the end of a refused key.
        secrets: keys in use.
    """
    secrets = list(secrets)
    for secret in secrets:
        text = text.replace(secret, "[key]")
    text = re.sub(r"(?<=://)[^\s/@]+@", "[key]@", text)  # user and password in an address
    text = re.sub(r"(?i)\bbearer\s+\S+", "Bearer [key]", text)
    text = re.sub(r"\b(?:(?:sk|gsk|pk|rk)[-_]|AIza|AQ\.|ya29\.)[\w\-.*•…]{6,}", "[key]", text)

    def hide(match: re.Match[str]) -> str:
        # Part of a key, verbatim or with a masked middle. Words from inside a key are kept.
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
    """Whether a request without an answer may have reached the service, and may be charged.

    The SDKs' transports name the errors before sending: no connection, or no free connection in the pool.
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


def failure_of_status(
    status: int, detail: str, *, model: str, key: str, wait: float | None = None, code: str | None = None
) -> Failure:
    """Classify an HTTP status, for any provider.

    Args:
        status: status of the response, 4xx or 5xx.
        detail: message of the service.
        model: the service's name of the model.
        key: the environment variable that holds the key.
        wait: seconds that the service asked to wait.
        code: the service's own error code; `None` when there is none.
    """
    said = f"{status}: {detail[:500]}"
    if code == "insufficient_quota" or status == 402:
        return Failure("final", f"the account has no quota or credit left ({said}). Top it up, then resume.")
    if status in (429, 503, 529):
        busy = "limits the rate of requests" if status == 429 else "is overloaded"
        return Failure("rate_limited", f"the service {busy} ({said})", wait)
    if status in (408, 409, 425, 499) or (status >= 500 and status != 501):
        return Failure("transient", f"the service failed ({said})", wait, may_be_billed=status in (408, 499, 504))
    if status in (400, 413, 422) and TOO_LONG.search(f"{code} {detail}"):
        return Failure("rejected", f"the prompt is longer than the model's context ({said})")
    if code in ("content_filter", "content_policy_violation"):
        return Failure("rejected", f"the prompt was filtered ({said})")
    if status == 401:
        return Failure("final", f"the key in {key} was refused ({said}). Set a valid one and start again.")
    if status == 403:
        return Failure("final", f"the key in {key} may not use {model!r} ({said}). Request access, or name another.")
    if status == 404:
        return Failure("final", f"no model {model!r} at this address ({said}). Check teacher and base URL.")
    return Failure("final", f"the service refuses the request ({said}). Another attempt would be refused as well.")
