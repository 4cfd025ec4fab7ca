# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A judge that reads its question and marks each text by a hash, and what is in a question."""

import re
import zlib
from typing import Any

from omniopd_trl.teachers.base import Prefix
from tests.support.training import script


def mark_of(text: str) -> float:
    """The mark of a text, in [0, 1]."""
    return zlib.crc32(text.strip().encode()) % 11 / 10


def numbered(content: str, *tags: str) -> dict[int, str]:
    """The texts that a question asks to mark, by their numbers, between tags with these names."""
    names = "|".join(tags or ("passage", "candidate"))
    found = re.findall(rf'<({names}) number="(\d+)"(?: place="\d+")?>(.*?)</\1>', content, re.DOTALL)
    return {int(number): text for _, number, text in found}


def marks_for(content: str) -> str:
    """The answer to a question."""
    return "\n".join(f"{number}: {10 * mark_of(text):.0f}" for number, text in sorted(numbered(content).items()))


def judge(prefix: Prefix, index: int) -> str:
    """A script: marks for a question, and the tests' rollouts for anything else."""
    return marks_for(prefix.prompt[1]["content"]) if prefix.is_question else script(prefix, index)


def openai(answer: Any) -> Any:
    """An answer in the format of OpenAI, from a function of the messages to a text."""

    def respond(path: str, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer(body["messages"])}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 300, "completion_tokens": 10, "total_tokens": 310}
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}

    return respond
