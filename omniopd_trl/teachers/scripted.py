# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A deterministic teacher that needs no model and no key: for dry runs, examples and tests."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.teachers.base import Prefix, Rollout, SamplingRequest, Teacher, TeacherReply
from omniopd_trl.teachers.instruct.judge import HIGHEST, asked_marks

Script = Callable[[Prefix, int], str | None]


class ScriptedTeacher(Teacher):
    """A teacher that follows a script.

    Args:
        script: a function of the prefix and the sample's index that returns the continuation, or `None` for a refusal.
            A sequence of texts gives every prefix the same samples: sample `i` is text `i` modulo the number of texts.
            By default, words of the prompt, chosen by a hash of the prefix and the index: the same on every machine,
            different for different prefixes. A question of `signal: judge` gets marks, chosen in the same way.

    Usage counts words, since there is no tokenizer. `max_tokens` and the temperature are ignored.

    Example:
        >>> teacher = ScriptedTeacher(["so the sum is 4", "so the sum is 5"])
    """

    name = "scripted"

    def __init__(self, script: Script | Sequence[str] | None = None):
        if script is None:
            self.script: Script = _words_of_prompt
        elif callable(script):
            self.script = script
        else:
            texts = tuple(script)
            if not texts:
                raise ValueError("`script` is empty; give at least one text, or no script for the default one.")
            self.script = lambda prefix, index: texts[index % len(texts)]

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        return [self._reply(prefix, request.num_samples) for prefix in prefixes]

    def _reply(self, prefix: Prefix, num_samples: int) -> TeacherReply:
        texts = [self.script(prefix, index) for index in range(num_samples)]
        written = [text for text in texts if text is not None]
        refused = len(texts) - len(written)
        return TeacherReply(
            rollouts=tuple(Rollout(text) for text in written),
            usage=Usage(
                prompt_tokens=len(_prompt_text(prefix).split()) + len(prefix.completion.split()),
                completion_tokens=sum(len(text.split()) for text in written),
            ),
            failure=f"the script refused {refused} of {num_samples}" if refused else None,
        )


def _prompt_text(prefix: Prefix) -> str:
    if isinstance(prefix.prompt, str):
        return prefix.prompt
    return " ".join(str(message["content"]) for message in prefix.prompt)


def _words_of_prompt(prefix: Prefix, index: int) -> str:
    key = json.dumps([prefix.prompt, prefix.completion, index], sort_keys=True)
    if num_marks := asked_marks(prefix):
        marks = random.Random(key)
        numbers = range(1, num_marks + 1)
        return "\n".join(f"{number}: {marks.randint(0, HIGHEST)}" for number in numbers)
    words = re.findall(r"\w+", _prompt_text(prefix)) or ["nothing"]
    digest = hashlib.sha256(key.encode()).digest()
    return " ".join(words[byte % len(words)] for byte in digest)
