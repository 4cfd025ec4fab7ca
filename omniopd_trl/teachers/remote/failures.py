# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What the errors of services and of their SDKs mean.

`failure_of` gives the verdict on everything that a service reports: it concerns this request, this moment, or the run.
Adapters only add which capabilities a model turns out to lack.
"""

import base64
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import unquote

FailureKind = Literal[
    "final",
    "denied",
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

# Characters of a service's message that are searched, and that are quoted. A message may have megabytes.
MAX_SEARCHED = 2000
MAX_QUOTED = 500


@dataclass(frozen=True)
class Failure:
    """The meaning of an error.

    Attributes:
        kind: `"final"` (this run: no request will be answered), `"denied"` (final if the next attempt ends like this
            one), `"transient"` and `"rate_limited"` (this moment), or `"rejected"` (this request will not be answered,
            for example because it is longer than the model's context). The others name a missing capability:
            `"no_prefill"`, `"no_field"` (optional fields are refused), `"one_sample"` (one sample per request),
            `"always_reasons"` (reasoning cannot be disabled).
        message: cause and next step, without secrets.
        retry_after: wait that the service asked for, in seconds; `None` for none.
        may_be_billed: whether the service may charge for the request although no answer arrived, for example after a
            timeout. The budget then counts the worst case.
        unexplained: whether nothing in the service's words says what the error is about.
        fields: the refused fields of a `"no_field"`.
        out_of_range: whether the values of `fields` are refused, and not the fields.
        otherwise: what a missing capability means when the request did not use it.
    """

    kind: FailureKind
    message: str
    retry_after: float | None = None
    may_be_billed: bool = False
    unexplained: bool = False
    fields: tuple[str, ...] = ()
    out_of_range: bool = False
    otherwise: "Failure | None" = None


class MalformedResponseError(Exception):
    """A response does not follow the service's own format.

    Attributes:
        answer: what was received: JSON as Python objects, or the beginning of a body that is no JSON.
    """

    def __init__(self, problem: str = "", answer: Any = ""):
        super().__init__(problem)
        self.answer = answer


# ---- What a service says ----


class ServiceError(Exception):
    """An error that a service reports: in a response with its status, or in the body of a response with status 200.

    Args:
        status: the status of the response. For an error inside a 200, the status that its code stands for, and 200
            when it has no such code.
        message: the service's own words. `MAX_SEARCHED` characters are kept.
        code: the service's own codes, with spaces between them.
        param: the parameter that the service names as the cause.
        wait: wait that the service asks for, in seconds.
    """

    def __init__(
        self, status: int, message: str, code: str = "", *, param: str | None = None, wait: float | None = None
    ):
        self.status = status
        self.message = message[:MAX_SEARCHED]
        self.code = code[:MAX_SEARCHED]
        self.param = param
        self.wait = wait
        super().__init__(f"{status}: {self.message}")

    @property
    def text(self) -> str:
        """Codes and message, to be searched."""
        return f"{self.code} {self.message}"

    @classmethod
    def of(cls, error: BaseException) -> "ServiceError | None":
        """The error that an SDK's exception carries; `None` when it carries no response with an error status.

        All SDKs keep the response. Their own reading of it loses text that is not in the form of their service.
        """
        if isinstance(error, cls):
            return error
        response: Any = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if not isinstance(status, int) or status < 300:
            return None
        try:
            body: Any = response.text.strip()
        except Exception as unread:  # an SDK may close a response before it has read it
            body = f"no text ({type(unread).__name__})"
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            pass  # HTML or plain text
        headers = response.headers
        if 300 <= status < 400:
            body = f"redirects to {headers.get('location') or 'an unnamed address'}"
        return cls.reported(status, body, retry_after(headers))

    @classmethod
    def reported(cls, status: int, body: Any, wait: float | None = None) -> "ServiceError":
        """The error in the decoded body of a response, with the wait that its headers ask for, in seconds."""
        message, codes, param, delay = _read(body)
        return cls(status, message, " ".join(codes), param=param, wait=delay or wait)

    @classmethod
    def inside(cls, body: Any) -> "ServiceError | None":
        """The error in the decoded body of a 200; `None` when the body reports none."""
        node = body[0] if isinstance(body, list) and len(body) == 1 else body
        if not isinstance(node, Mapping):
            return None
        if not node.get("error") and "error" not in (node.get("type"), node.get("object")):
            return None
        message, codes, param, delay = _read(node)
        numbers = [int(code) for code in codes if re.fullmatch(r"[45]\d\d", code)]
        text = " ".join(codes)
        meant = next((status for pattern, status in _STATUS_OF_CODE if re.search(pattern, text, re.IGNORECASE)), 200)
        return cls(numbers[0] if numbers else meant, message, text, param=param, wait=delay)


# Codes of errors inside a 200, and the statuses of the same errors.
_STATUS_OF_CODE = (
    (r"rate.?limit|too.?many.?requests|resource_exhausted|throttl|quota|token_limit_exceeded", 429),
    (r"overloaded|unavailable|busy", 503),
    (r"authenticat|invalid_api_key|unauthorized", 401),
    (r"permission|forbidden", 403),
    (r"not_?found", 404),
    (r"too_large", 413),
    (r"timeout|deadline", 504),
    (r"server_error|internal|api_error", 500),
    (r"invalid|bad_?request", 400),
)

_CODE_NAMES = frozenset(("code", "type", "status", "reason", "error_type", "error_code", "quotaId", "retryDelay"))
_MESSAGE_NAMES = ("message", "detail", "Message", "msg", "errors", "description", "title")


def _read(body: Any) -> tuple[str, list[str], str | None, float | None]:
    """Message, codes, parameter and requested wait of the body of an error, in any of the services' forms."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]  # Google's interface in the style of OpenAI
    if not isinstance(body, Mapping):
        return (body if isinstance(body, str) else _dump(body)) or "no text", [], None, None
    error = body.get("error")
    inner = error if isinstance(error, Mapping) else body
    message, metadata, param = _text(body) or _dump(body), inner.get("metadata"), inner.get("param")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    if isinstance(raw, str) and raw:  # a router quotes the service behind it
        message = f"{message[: MAX_SEARCHED // 2]} ({raw})"
    codes = list(_codes(body))
    wait = next((float(code[:-1]) for code in codes if re.fullmatch(r"\d+(\.\d+)?s", code)), None)
    return message, codes, param if isinstance(param, str) else None, wait


def _text(value: Any, depth: int = 4) -> str:
    """The message in the body of an error, or in a part of it."""
    if isinstance(value, str):
        return value
    if not depth:
        return ""
    if isinstance(value, list):
        return "; ".join(text for entry in value[:20] if (text := _text(entry, depth - 1)))
    if not isinstance(value, Mapping):
        return ""
    error = value.get("error")
    parts = [*([] if isinstance(error, str) else [error]), *(value.get(name) for name in _MESSAGE_NAMES), error]
    text = next((text for part in parts if (text := _text(part, depth - 1))), "")
    where = value.get("loc")  # web frameworks list the fields that they refuse
    return f"{'.'.join(map(str, where))}: {text}" if isinstance(where, list) else text


def _dump(body: Any) -> str:
    return "no text" if body is None else json.dumps(body, default=str, ensure_ascii=False)


def _codes(node: Any, depth: int = 8) -> Iterator[str]:
    if isinstance(node, Mapping) and depth:
        for name, value in node.items():
            if name in _CODE_NAMES and isinstance(value, str | int):
                yield str(value)[:100]
            elif name != "input":  # the refused request
                yield from _codes(value, depth - 1)
    elif isinstance(node, list) and depth:
        for entry in node[:20]:
            yield from _codes(entry, depth - 1)


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
            moment = parsedate_to_datetime(value).astimezone(UTC)
        except (ValueError, OverflowError):
            continue
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return None


# ---- What it means ----


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


# The prompt is too long, alone or with the completion.
TOO_LONG = _words(
    r"context.?(length|limit|window|size)|model token limit|max(imum)? (model|prompt|input|allowed) length",
    r"prompt is too long|input is too (long|large)|prompt exceeds|prompt contains \d+ tokens|request_too_large",
    r"too many (input )?tokens|exceeds the maximum number of tokens|(payload|request) size exceeds",
    r"input length (should|must|exceeds)|inputs`? (tokens|must have)|input token count|reduce the length",
    r"max_(completion_|new_)?tokens.{0,40} got [-0]|tokens to keep from the initial prompt|context the overflows",
)

# A filter refuses the prompt, or what the model wrote.
_FILTERED = _words(
    r"moderation|content.?(filter|polic|management|exists risk|violates)|flagged|invalid_prompt",
    r"inappropriate content|data_?inspection|sensitive.?(word|content|info)|usage (polic|guidelines)|high risk",
    r"prohibited.?content|responsibleai|guardrail|harmful|safety.?(system|filter|check|polic|reason|setting)",
    r"(output|prompt|input) (was )?blocked|敏感|不安全|违规",
)

# No quota or credit is left, and waiting does not help.
_NO_QUOTA = _words(
    r"insufficient.?(user.?)?(quota|balance|credit|fund)|billing.?(not.?active|hard.?limit)|exceeded_current_quota",
    r"credit balance|balance is (too low|insufficient|not enough)|free.models.per.day|perday|arrearage",
    r"(have any|add( \d+)?|more|buy|out of|all available) credits|budget.?(has been )?exceeded|exceeded.{0,9}budget",
    r"(specified|monthly) (api )?(usage|spend(ing)?) limit|account is not active|enable billing",
    r"daily.?limit.?exceeded|余额不足|欠费",
)
# The same words may stand for a limit per minute. The service then names a wait.
_MAYBE_NO_QUOTA = _words(r"exceeded your (current )?quota|per.day|daily")

_RATE = _words(r"rate.?limit|too many requests|throttl")
# A rate limit that is smaller than this request.
_OVER_LIMIT = _words(r"(request|prompt|message) (is )?too large")
_LIMIT_AND_REQUESTED = re.compile(r"limit:? ([\d,]+)\b.{0,60}requested:? ([\d,]+)", re.IGNORECASE)

_ACCOUNT = _words(r"account.{0,30}(flagged|suspended|disabled|deactivated|terminated|restricted|banned)")
_KEY = _words(
    r"api.?key|unauthori[sz]ed|authenticat|credential|(invalid|expired|missing) (\w+ )?token|permission|access denied",
    _ACCOUNT.pattern,
)
_MODEL = _words(
    r"model.?not.?found|(unknown|invalid|no such|unsupported|deprecated) model|not a valid model|decommissioned",
    r"model\b.{0,80}(not found|not exist|not supported|not available|deprecated|retired|no longer)",
)
# The code of a request that a batch did not come to. Services charge nothing for it.
NOT_REACHED = "batch_ended_early"
_NOT_REACHED = _words(NOT_REACHED, r"batch_(expired|cancell?ed)")
_PLACE = _words(r"failed_precondition|location is not supported|(country|region)\b.{0,40} not |unsupported_country")

# Settings that all requests of a run share.
_SETTINGS = _words(r"\b(temperature|top_?[pk]|min_p|seed|\w+_penalty)\b")
# The value of a parameter is refused, so the service has this parameter.
OUT_OF_RANGE = _words(
    r"must be (in|between|at (least|most)|[<>]|positive|strictly)|(above|below) (the )?(maximum|minimum)",
    r"\brange\b|(less|greater) than\b",
)


def _is_too_long(said: ServiceError) -> bool:
    """Whether a request is larger than the service or the model takes."""
    # Some servers report a long prompt with a 500. A 413 says it all.
    return said.status == 413 or (said.status in (200, 400, 422, 500) and TOO_LONG.search(said.text) is not None)


def _is_filtered(said: ServiceError) -> bool:
    """Whether a filter refuses the content of a request, and not the account."""
    return said.status in (200, 400, 403, 422) and bool(_FILTERED.search(said.text) and not _ACCOUNT.search(said.text))


def is_about_request(said: ServiceError) -> bool:
    """Whether a service refuses what is in a request: it is too long, too large, or filtered."""
    return _is_too_long(said) or _is_filtered(said)


def _number(digits: str) -> int:
    return int(digits.replace(",", "") or 0)


def failure_of(
    said: ServiceError,
    *,
    model: str,
    key: str,
    address: str | None = None,
    has_answered: bool = False,
    secrets: Iterable[str] = (),
) -> Failure:
    """The meaning of an error that a service reports, for any service.

    Args:
        said: status, codes and words of the service.
        model: the service's name of the model.
        key: the environment variable that holds the key.
        address: address of the service; `None` for the default of its SDK.
        has_answered: whether this teacher has answered requests. A refusal that nothing explains then concerns the
            refused request only.
        secrets: keys in use, which the service may echo.
    """
    status, text = said.status, said.text
    quoted = quote(said, secrets)
    wait = said.wait
    if status == 200 and _NOT_REACHED.search(said.code):
        return Failure("transient", f"the batch ended before this request was answered ({quoted})")
    if status in (400, 403, 451) and _PLACE.search(text):
        return Failure("final", f"the service does not serve this account or country ({quoted}). Use another one.")
    too_long, limit = _is_too_long(said), _LIMIT_AND_REQUESTED.search(text)
    if status == 429 and (_OVER_LIMIT.search(text) or (limit and _number(limit[2]) > _number(limit[1]))):
        return Failure("rejected", f"the request is larger than the service's limit ({quoted})")
    no_quota = _NO_QUOTA.search(text) or (status == 429 and wait is None and _MAYBE_NO_QUOTA.search(text))
    if status == 402 or (no_quota and status < 500 and not too_long):
        return Failure("final", f"the account has no quota or credit left ({quoted}). Top it up, then resume.")
    if status == 413:
        return Failure("rejected", f"the request is larger than the service's limit ({quoted})")
    if too_long:
        return Failure("rejected", f"the prompt is longer than the model's context ({quoted})")
    if _is_filtered(said):
        return Failure("rejected", f"the prompt was filtered ({quoted})")
    if status in (429, 503, 529) or (status in (400, 403) and _RATE.search(text)):
        busy = "is overloaded" if status in (503, 529) else "limits the rate of requests"
        return Failure("rate_limited", f"the service {busy} ({quoted})", wait)
    if status in (408, 409, 424, 425, 499) or (status >= 500 and status != 501):
        return Failure("transient", f"the service failed ({quoted})", wait, may_be_billed=status in (408, 499, 504))
    if status == 200:
        return Failure("transient", f"the response is no completion ({quoted}). Check teacher_base_url.", wait)
    # One refusal between many answers may be a fault of a gateway.
    denied: FailureKind = "denied" if has_answered else "final"
    is_refused, is_page = status in (400, 422), said.message.startswith("<")
    if status == 401 or (is_refused and _KEY.search(text)):
        return Failure(denied, f"the key in {key} was refused ({quoted}). Set a valid one and start again.")
    if status == 403 and not is_page:
        return Failure(denied, f"the key in {key} may not use {model!r} ({quoted}). Request access, or name another.")
    if (status == 404 and "model" in text.lower()) or (is_refused and _MODEL.search(text)):
        return Failure(denied, f"no model {model!r} at this address ({quoted}). Check teacher and base URL.")
    where = f"the address {address}" if address else "this address"
    if 300 <= status < 400:
        return Failure(
            denied,
            f"{where} is not the final one ({quoted}). Redirects are not followed, since each request holds the key. "
            "Set teacher_base_url to the final address.",
        )
    if status in (403, 404, 405) or (is_page and is_refused and not has_answered):
        return Failure(
            denied,
            f"{where} is not that of the service, or it has no model {model!r} ({quoted}). Check teacher_base_url.",
        )
    if is_refused and has_answered and not (_SETTINGS.search(text) and OUT_OF_RANGE.search(text)):
        return Failure("rejected", f"the service refuses this request and answers others ({quoted})", unexplained=True)
    return Failure("final", f"the service refuses the request ({quoted}). Another attempt would be refused as well.")


# Exceptions of the SDKs and of their HTTP client, by the names that they share. No SDK is imported for them.
_TIMEOUTS = {"APITimeoutError", "TimeoutException"}
_CONNECTIONS = {"APIConnectionError", "TransportError"}
_UNREADABLE = {"APIResponseValidationError", "UnknownApiResponseError", "ValidationError", "DecodingError"}


def failure_without_answer(error: BaseException, *, address: str | None, limit: str) -> Failure | None:
    """The meaning of an SDK's exception without an answer, or with an unreadable one; `None` for any other exception.

    Args:
        error: the exception. Whether its request may be billed is not decided here.
        address: address of the service; `None` for the default of its SDK.
        limit: name and value of the limit of an attempt, for the message.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _TIMEOUTS:
        return Failure("transient", f"no answer within {limit}", may_be_billed=True)
    cause = error.__cause__ or error if "APIError" in names else error  # an SDK wraps the error of its client
    if names & _CONNECTIONS and type(cause).__name__ not in _UNREADABLE:
        where = f"no connection to {address}" if address else "no connection"
        return Failure("transient", f"{where} ({type(cause).__name__}: {cause})", may_be_billed=True)
    # For the SDK of Gemini, 206 and other statuses of success are errors.
    if names & _UNREADABLE or "APIError" in names:
        return Failure("transient", f"the response cannot be read ({error})", may_be_billed=True)
    return None


def failure_of_malformed(error: Exception, secrets: Iterable[str] = ()) -> Failure:
    """The meaning of an answer that cannot be read. The service may charge for it."""
    answer = error.doc if isinstance(error, json.JSONDecodeError) else getattr(error, "answer", "")
    if isinstance(answer, bytes):
        answer = answer.decode(errors="replace")
    text = answer if isinstance(answer, str) else _dump(answer)
    received = f"; it begins with {clean(text, secrets, 200)}" if text else ""
    message = f"the response cannot be read ({type(error).__name__}: {error}{received}). Check teacher_base_url"
    return Failure("transient", message, may_be_billed=True)


# ---- What may be shown ----


def quote(said: ServiceError, secrets: Iterable[str] = ()) -> str:
    """Status and words of a service, as they may be shown."""
    return f"{said.status}: {clean(said.message, secrets, MAX_QUOTED)}"


def clean(text: str, secrets: Iterable[str] = (), limit: int = MAX_SEARCHED) -> str:
    """A text of a service for a message or a log line: short, on one line, without keys and control characters."""
    # Cut first: a search in megabytes would stop the event loop. Cut again, since escapes are longer.
    text = escape_controls(redact(text[: max(limit, MAX_SEARCHED)], secrets))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def escape_controls(text: str) -> str:
    """The text with its control and format characters escaped. They would reach the terminal, and forge lines."""
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


# A parameter in the query of an address that holds a secret.
_QUERY_KEY = r"(?i:[?&][\w.-]*(?:key|token|secret|passw\w*|auth\w*|sig\w*|code)=)"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes. The SDKs wrap those of the HTTP client in their own."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def malformed_in(error: Exception) -> Exception:
    """The `MalformedResponseError` of our HTTP client, which the SDKs wrap in their own; else the error itself."""
    return next((cause for cause in causes(error) if isinstance(cause, MalformedResponseError)), error)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Remove from a text what is, or looks like, a key or a part of one.

    Args:
        text: message of a service. Some services echo the beginning or the end of a refused key.
        secrets: keys in use.
    """
    secrets = [secret for secret in secrets if secret]
    for secret in secrets:
        text = _forms(secret).sub("[key]", text)
    # User and password in an address. A password may hold an @, and a / that should be escaped; a port is no password.
    text = re.sub(r"(?<=://)(?:[^\s/@:]+:(?!\d+[/?#])\S*|[^\s/]+)@", "[key]@", text)
    text = re.sub(rf"({_QUERY_KEY})[^\s&#'\"()]+", r"\1[key]", text)
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


def secrets_in(address: str) -> list[str]:
    """The password and the keys in an address, as they are and decoded."""
    found = re.findall(r"://[^\s/@:]+:(\S+)@", address) + re.findall(rf"{_QUERY_KEY}([^\s&#]+)", address)
    return [secret for text in found for secret in {text, unquote(text)} if len(secret) >= 4]


@lru_cache(maxsize=32)
def _forms(secret: str) -> re.Pattern[str]:
    """Matches a secret as it is, with characters escaped as in URLs, JSON and HTML, or inside base64."""
    characters = []
    for c in secret:
        in_url = "".join(f"%(?:25)*{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
        forms = [re.escape(c), rf"(?i:{in_url}|\\+u{ord(c):04X}|&#x0*{ord(c):X};)", f"&#0*{ord(c)};"]
        if not c.isalnum():
            forms += [rf"\\+{re.escape(c)}", re.escape(html.escape(c))]
        characters.append(f"(?:{'|'.join(forms)})")
    encoded = []
    for before in range(3):  # the text before the secret decides at which of three bits it begins
        data = b"\0" * before + secret.encode("utf-8", "surrogatepass")
        # The first and the last characters depend on what is around the secret as well.
        first, last = -(-8 * before // 6), 8 * len(data) // 6
        text = base64.b64encode(data).decode()[first:last]
        if len(text) >= 8:
            encoded += [re.escape(text), re.escape(text.translate(_URL_SAFE))]
    word = r"[\w+/=-]"
    return re.compile("|".join(["".join(characters), *(f"(?<!{word}){word}*{text}{word}*" for text in encoded)]))


_URL_SAFE = str.maketrans("+/", "-_")
