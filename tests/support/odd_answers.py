# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Damaged and odd answers of services, from a seed."""

import copy
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from tests.support.loopback.server import Fault

LONE = "\ud83d"

# Statuses of a service that may be charged although it does not answer.
CHARGED = (200, 201, 202, 203, 206, 408, 499, 504)
TRANSIENT = (408, 409, 425, 429, 499, 500, 502, 503, 504, 520, 529, 599)
FINAL = (400, 401, 402, 403, 404, 405, 410, 413, 418, 422, 451, 501)

TEXTS = [
    *("", " ", "\n\n", "7", "\0", "\u202e7", "\r\n7", LONE, f"7{LONE}7", "\ufffd" * 50, "a\u0301" * 300, "🎉" * 500),
    *("..." * 1000, "…" * 300, "和" * 200, '"' * 999, "\\" * 999, "{" * 999, "```\n" * 500, "x" * 1_000_000),
    *("<think>", "<think>Hm.</think> 7", "I'm sorry, but I can't assist with that.", "<partial_solution>"),
    "Sure! Here is the continuation:\n",
]
# Numbers of tokens that are none, or that are far below the worst case of a request.
NUMBERS = [0, 1, 3, -1, 2**53, 2**63, 10**400, 10.5, float("nan"), float("inf"), float("-inf"), 1e308, True]
VALUES = [
    *(None, ..., {}, [], [None], [[]], "boo", "10", 7, "null", {"text": 7}, [7], {"type": "text"}, False),
    *([{"type": "text", "text": " 7"}], [{"type": "thinking", "thinking": "Hm."}], {"error": {}}, " " * 1000),
]
REASONS = [
    *("error", "abort", "insufficient_system_resource", "content_filter", "SAFETY", "OTHER", "refusal", "max_tokens"),
    *("length", "stop", "", "tool_calls", "MALFORMED_RESPONSE", LONE, "x" * 5000, "pause_turn", "FINISH_REASON_99"),
]
HEADERS = [
    *(
        {"retry-after": value}
        for value in ("0", "0.01", "-1", "nan", "soon", "", "1e-9", "9" * 400, "Mon, 01 Jan 2024")
    ),
    *({"retry-after-ms": value} for value in ("1", "-5", "x")),
    {"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"content-type": "text/html"},
    {"content-type": "application/json; charset=latin-1"},
    {"content-type": "application/json; charset=no-such-charset"},
    {"x-request-id": "y" * 5000, "x-should-retry": "true"},
    {"set-cookie": "a=b; path=/"},
]
# Codecs of Python that do not decode JSON, and some that do not decode text.
CHARSETS = [f"application/json; charset={name}" for name in ("hex", "rot13", "idna", "utf-16", "utf-7", "punycode")]


@dataclass(frozen=True)
class Odd:
    """One odd answer.

    Attributes:
        kind: which generator made it.
        fault: the answer.
    """

    kind: str
    fault: Fault

    @property
    def is_charged(self) -> bool:
        """Whether the service may charge for it, so it has to be counted, once."""
        return self.fault.how in ("drop", "cut") or self.fault.status in CHARGED


def _paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*before, key), *_paths(inner, (*before, key)))]


def _put(answer: Any, path: tuple[Any, ...], value: Any) -> None:
    holder = reduce(lambda inner, key: inner[key], path[:-1], answer)
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value


def _change(source: random.Random, answer: Any, wanted: Callable[[Any, Any], bool], values: list[Any]) -> Any:
    """Put odd values into up to three members of a copy of an answer."""
    answer = copy.deepcopy(answer)
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        paths = _paths(answer)
        paths = [path for path in paths if wanted(path[-1], reduce(lambda v, key: v[key], path, answer))]
        if paths:
            _put(answer, source.choice(paths), copy.deepcopy(source.choice(values)))
    return answer


def _is_text(key: Any, value: Any) -> bool:
    return key in ("text", "content") and isinstance(value, str)


def _is_number(key: Any, value: Any) -> bool:
    return isinstance(value, int) and "oken" in str(key)


def _is_reason(key: Any, value: Any) -> bool:
    return key in ("finish_reason", "finishReason", "stop_reason")


def _is_any(key: Any, value: Any) -> bool:
    # A larger plain number would be a true usage above the worst case, which no budget can prevent.
    return not _is_number(key, value)


def _status(source: random.Random, statuses: tuple[int, ...], error: Callable[..., Any]) -> Fault:
    status = source.choice(statuses)
    bodies = [
        *("", "<html>busy</html>", "[" * 5000, [], {}, None, "x" * 100_000, {"error": "busy"}, {"error": None}),
        *({"error": ["busy"]}, {"message": 7}, {"detail": [{"msg": "busy"}]}, {"error": {"message": {"a": 1}}}, [[]]),
        *({"object": "error", "message": "busy"}, error(status, "busy"), error(status, LONE), {"error": {"code": 7}}),
    ]
    return Fault(status, source.choice(bodies), source.choice([{}, *HEADERS]))


def _several(answer: Any, number: int) -> Any:
    """The answer with another number of samples."""
    answer = copy.deepcopy(answer)
    for key in ("choices", "candidates"):
        if key in answer:
            answer[key] = (answer[key] * 50)[:number]
    return answer


# Each kind of odd answer: its share, and a function from the source of chance, the right answer and a function that
# returns the body of an error.
KINDS: dict[str, tuple[float, Callable[[random.Random, Any, Any], Fault]]] = {
    "right": (3, lambda source, answer, error: Fault(200, answer)),
    "text": (2, lambda source, answer, error: Fault(200, _change(source, answer, _is_text, TEXTS))),
    "usage": (2, lambda source, answer, error: Fault(200, _change(source, answer, _is_number, NUMBERS))),
    "reason": (1, lambda source, answer, error: Fault(200, _change(source, answer, _is_reason, REASONS))),
    "field": (4, lambda source, answer, error: Fault(200, _change(source, answer, _is_any, VALUES))),
    "number of samples": (0.5, lambda source, answer, error: Fault(200, _several(answer, source.randrange(80)))),
    "header": (0.5, lambda source, answer, error: Fault(200, answer, source.choice(HEADERS))),
    "other success": (0.2, lambda source, answer, error: Fault(source.choice([201, 202, 203, 206]), answer)),
    "body": (
        1,
        lambda source, answer, error: Fault(
            200,
            source.choice(
                [
                    *(b"\xff\xfe{}", b"[" * 100_000, b"", b"null", b"7", b'"x"', b"{" * 999, b"<html>busy</html>"),
                    *(b"\xef\xbb\xbf" + json.dumps(answer).encode(), json.dumps(answer).encode("utf-16")),
                    *(json.dumps(answer).encode()[:-9], json.dumps(answer).encode() + b"x", b'{"a":' * 50_000),
                    *(json.dumps(answer).replace(" ", " " * 50).encode(), b"data: {}\n\ndata: [DONE]\n\n"),
                ]
            ),
        ),
    ),
    "error in an answer": (
        0.3,
        lambda source, answer, error: Fault(
            200,
            source.choice([error(429, "slow down"), error(500, "busy"), {"error": "busy"}, {"error": {"code": "x"}}]),
        ),
    ),
    "transient status": (1, lambda source, answer, error: _status(source, TRANSIENT, error)),
    "final status": (0.15, lambda source, answer, error: _status(source, FINAL, error)),
    "connection": (0.4, lambda source, answer, error: Fault(how=source.choice(["drop", "cut"]))),
    "encoding": (
        0.3,
        lambda source, answer, error: Fault(
            200, json.dumps(answer), {"content-encoding": source.choice(["gzip", "deflate", "br", "x", "gzip, gzip"])}
        ),
    ),
    "charset": (
        0.3,
        lambda source, answer, error: Fault(200, json.dumps(answer), {"content-type": source.choice(CHARSETS)}),
    ),
    "charset of an error": (
        0.1,
        lambda source, answer, error: Fault(
            source.choice(TRANSIENT), error(500, "busy"), {"content-type": source.choice(CHARSETS)}
        ),
    ),
    "redirect": (
        0.2,
        lambda source, answer, error: Fault(
            source.choice([301, 302, 303, 307, 308]),
            "",
            {"location": source.choice(["/", "", "//[", "ftp://x"])},
        ),
    ),
    "control characters": (
        0.2,
        lambda source, answer, error: Fault(
            source.choice([400, 500, 429]), error(400, "\x1b[2J\r\nTeacherError: fake\u2028" + "y" * 3000)
        ),
    ),
    "body bomb": (
        0.1,
        lambda source, answer, error: Fault(200, _bomb(), {"content-encoding": "gzip"}),
    ),
}


@cache
def _bomb() -> bytes:
    """200 MB of white space, compressed."""
    packer = zlib.compressobj(wbits=31)
    return b"".join([*(packer.compress(b" " * 1_000_000) for _ in range(200)), packer.flush()])


def odd_answer(source: random.Random, answer: Any, error: Callable[..., Any]) -> Odd:
    """An odd answer in place of a right one.

    Args:
        source: source of chance.
        answer: the right answer.
        error: function from status and message to the JSON of an error.
    """
    (kind,) = source.choices(list(KINDS), [share for share, _ in KINDS.values()])
    return Odd(kind, KINDS[kind][1](source, answer, error))
