# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Answers in the formats of the providers. Their text is a function of the prompt and the index of the sample."""

import zlib
from typing import Any


def text_of(prompt: Any, index: int) -> str:
    """The continuation that a server writes for a prompt."""
    return f" step {zlib.crc32(str(prompt).encode()) % 1000} of {index}"


def openai(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """`/v1/completions` and `/v1/chat/completions`: 20 prompt tokens, 12 of them cached, 3 per sample."""
    number = body.get("n") or 1
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 3 * number,
        "total_tokens": 20 + 3 * number,
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    if "/chat/completions" in path:  # Azure adds a query
        usage["completion_tokens_details"] = {"reasoning_tokens": 0}
        messages = [
            {"role": "assistant", "content": text_of(body["messages"], index), "refusal": None}
            for index in range(number)
        ]
        choices = [
            {"index": index, "message": message, "finish_reason": "length", "logprobs": None}
            for index, message in enumerate(messages)
        ]
        return _openai("chat.completion", body, choices, usage)
    choices = [
        {"index": index, "text": text_of(body["prompt"], index), "finish_reason": "length", "logprobs": None}
        for index in range(number)
    ]
    return _openai("text_completion", body, choices, usage)


def _openai(kind: str, body: dict[str, Any], choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "object": kind, "created": 1, "model": body["model"], "choices": choices, "usage": usage}


def openai_error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": "error", "code": code or str(status), "param": param}}


def anthropic(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """`/v1/messages`: 5 uncached prompt tokens, 10 written to the cache, 30 read, 7 written."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", "in the path"),  # of Bedrock and Vertex AI
        "content": [{"type": "text", "text": text_of(body["messages"], 0)}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 10,
            "cache_read_input_tokens": 30,
            "output_tokens": 7,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


def anthropic_error(status: int, message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an error."""
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def gemini(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """`generateContent`: 20 prompt tokens, 8 of them cached, 3 per candidate, 4 of thought."""
    number = body.get("generationConfig", {}).get("candidateCount", 1)
    candidates = [
        {
            "index": index,
            "content": {"role": "model", "parts": [{"text": text_of(body["contents"], index)}]},
            "finishReason": "MAX_TOKENS",
        }
        for index in range(number)
    ]
    usage = {
        "promptTokenCount": 20,
        "cachedContentTokenCount": 8,
        "candidatesTokenCount": 3 * number,
        "thoughtsTokenCount": 4,
        "totalTokenCount": 24 + 3 * number,
    }
    return {"candidates": candidates, "usageMetadata": usage, "modelVersion": "x", "responseId": "r"}


def gemini_error(status: int, message: str, reason: str = "INVALID_ARGUMENT", *details: Any) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"code": status, "message": message, "status": reason, "details": list(details)}}
