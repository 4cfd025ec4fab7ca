# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Claude as a teacher, through Anthropic's Messages interface."""

import os
from typing import Any

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest, common_prefix_length
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.instruct.repair import repair
from omniopd_trl.teachers.remote.delivery import trace_delivery
from omniopd_trl.teachers.remote.engine import Capabilities, EngineSettings, RemoteTeacher, Response, Sample
from omniopd_trl.teachers.remote.failures import (
    Failure,
    FailureKind,
    MalformedResponseError,
    ServiceError,
    out_of_range,
    quote,
)


class AnthropicTeacher(RemoteTeacher):
    """A teacher behind `/v1/messages`, with one sample per request.

    Older models continue a last message of the assistant (`prefill`). It must not end in white space: trailing white
    space is not sent, and is removed from the continuation when the model writes it again. Newer models are
    instructed.

    Args:
        model: Anthropic's name of the model, for example `"claude-haiku-4-5"`.
        capabilities: capabilities of the model.
        base_url: address of the service. Defaults to `ANTHROPIC_BASE_URL`, and then to Anthropic itself.
        settings: limits of this process.
        budget: budget of the teacher. Defaults to no limit.
    """

    key_variables = ("ANTHROPIC_API_KEY",)

    def __init__(
        self,
        model: str,
        capabilities: Capabilities,
        *,
        base_url: str | None = None,
        settings: EngineSettings | None = None,
        budget: Budget | None = None,
    ):
        super().__init__(f"anthropic:{model}", capabilities, settings, budget)
        self.model = model
        self.base_url = base_url or os.environ.get("ANTHROPIC_BASE_URL") or None

    def connect(self) -> Any:
        anthropic = import_extra("anthropic", "anthropic")
        client = anthropic.AsyncAnthropic(
            api_key=self.key(), base_url=self.base_url, timeout=self.settings.timeout, max_retries=0
        )
        client._client.event_hooks["request"].append(trace_delivery)
        return client

    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        instructed = self.capabilities.continuation == "instruct"
        # The cache pays off from the second sample on: a write costs 1.25 times the prompt, a read a tenth of it.
        cached = request.num_samples > 1 and self._fills_cache(prefix)
        answer = await self.client.messages.create(
            model=self.model,
            max_tokens=request.max_tokens,
            **self._prompt(prefix, cached),
            extra_body={**self.capabilities.reasoning_off, **self._sampling(request)},
        )
        if not isinstance(getattr(answer, "content", None), list):
            body = getattr(answer, "to_dict", lambda: answer)()
            raise MalformedResponseError("no list of content blocks in it", body)
        return Response((_sample(answer, prefix, instructed),), _usage(getattr(answer, "usage", None)))

    # ---- Requests ----

    def _sampling(self, request: SamplingRequest) -> dict[str, float]:
        """Temperature or `top_p`: the service accepts one of them, and its SDK has an argument for neither."""
        if not self.capabilities.takes_temperature:
            return {}
        if request.top_p == 1.0:
            return {"temperature": request.temperature}
        if request.temperature == 1.0:
            return {"top_p": request.top_p}
        self.warn_once(
            f"the service accepts a temperature or a top_p, not both, so teacher_top_p={request.top_p:g} is not sent."
        )
        return {"temperature": request.temperature}

    def _prompt(self, prefix: Prefix, cached: bool) -> dict[str, Any]:
        if self.capabilities.continuation == "instruct":
            messages = render_messages(prefix.prompt, prefix.completion)
        else:
            prompt = prefix.prompt
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if beginning := prefix.completion.rstrip():  # an empty turn is refused
                messages.append({"role": "assistant", "content": beginning})
        system = "\n\n".join(str(message["content"]) for message in messages if message["role"] == "system")
        turns: list[dict[str, Any]] = [dict(message) for message in messages if message["role"] != "system"]
        if cached and turns and isinstance(turns[-1]["content"], str):
            block = {"type": "text", "text": turns[-1]["content"], "cache_control": {"type": "ephemeral"}}
            turns[-1]["content"] = [block]
        return {"messages": turns, **({"system": system} if system else {})}

    # ---- Errors ----

    def unsupported(self, said: ServiceError) -> Failure | None:
        kind = _unsupported(said.message)
        return None if kind is None else Failure(kind, quote(said))


def _unsupported(detail: str) -> FailureKind | None:
    """The missing capability that a 400 reports, if any. The service has no code for it, only a message."""
    text = detail.lower()
    if "prefill" in text or "must end with a user message" in text:
        return "no_prefill"
    if "temperature" in text or "top_p" in text:
        return None if out_of_range(text) else "no_temperature"
    if "thinking" in text or "effort" in text:
        return "always_reasons"
    return None


def _sample(answer: Any, prefix: Prefix, instructed: bool) -> Sample:
    if answer.stop_reason == "refusal":
        return Sample("", "stop", "refused")
    finish = "length" if answer.stop_reason == "max_tokens" else "stop"
    text = "".join(block.text for block in answer.content if block.type == "text")
    if not text:
        return Sample("", finish, "empty")
    if instructed:
        repaired = repair(prefix.completion, text, prefix.prompt)
        return Sample(repaired.text, finish, repaired.outcome)
    text = without_common_space(prefix.completion, text)
    return Sample(text, finish) if text else Sample("", finish, "empty")


def without_common_space(prefix: str, text: str) -> str:
    """Remove from a continuation the trailing white space of the prefix, where the model wrote it again.

    Args:
        prefix: the student's text.
        text: the continuation of the prefix that was sent, without its trailing white space.

    Example:
        >>> without_common_space("First,\\n", "\\n\\nwe add")
        '\\nwe add'
    """
    space = prefix[len(prefix.rstrip()) :]
    return text[common_prefix_length(space, text) :]


def _usage(usage: Any) -> Usage | None:
    """The service's `input_tokens` exclude cache reads and cache writes."""
    # A compatible proxy may leave any of them out.
    if getattr(usage, "input_tokens", None) is None or getattr(usage, "output_tokens", None) is None:
        return None
    read = usage.cache_read_input_tokens or 0
    written = usage.cache_creation_input_tokens or 0
    details = usage.output_tokens_details
    return Usage(
        prompt_tokens=usage.input_tokens + read + written,
        cached_tokens=read,
        completion_tokens=usage.output_tokens,
        reasoning_tokens=details.thinking_tokens if details is not None else 0,
        cache_write_tokens=written,
    )
