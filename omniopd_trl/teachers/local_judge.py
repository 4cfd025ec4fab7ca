# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A local model with a function that judges in its place."""

from collections.abc import Callable, Sequence
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.teachers.base import Messages, Prefix, SamplingRequest, TeacherReply
from omniopd_trl.teachers.instruct.judge import asked_marks
from omniopd_trl.teachers.local import LocalTeacher


class LocalJudge(LocalTeacher):
    """A teacher for `signal: judge` and `signal: cascade` whose model is too small to judge.

    Its function reads the messages that ask for marks and returns a text, as a model would. The text is cut to the
    tokens of the request, and its tokens and those of the messages are counted with the model's tokenizer and chat
    template. The temperature does not matter: all samples are equal, and counted once. The model continues texts, and
    answers other questions.

    Args:
        name: name of the teacher.
        answer: the function.
        model: as [`LocalTeacher`], like all further arguments.
    """

    def __init__(self, name: str, answer: Callable[[Messages], str], model: str, **options: Any):
        super().__init__(model, **options)
        self.name, self.answer = name, answer

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        others = [prefix for prefix in prefixes if not asked_marks(prefix)]
        written = iter(await super().sample(others, request) if others else ())
        return [self._judge(prefix, request) if asked_marks(prefix) else next(written) for prefix in prefixes]

    def _judge(self, prefix: Prefix, request: SamplingRequest) -> TeacherReply:
        assert not isinstance(prefix.prompt, str)  # it asks for marks
        # Not verbose: a question that is longer than the model's context is no problem, since no model reads it.
        read, written = (
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (self._render(prefix.prompt), self.answer(prefix.prompt))
        )
        rollout, num_written = self._rollout([*written, self.eos_token_ids[0]][: request.max_tokens])
        return TeacherReply((rollout,) * request.num_samples, Usage(len(read), completion_tokens=num_written))
