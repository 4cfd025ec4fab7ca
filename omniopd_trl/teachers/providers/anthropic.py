# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Claude as a teacher, through Anthropic's Messages interface."""

import os
from typing import Any

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.remote.answers import (
    Asked,
    Response,
    counts,
    member,
    members,
    parse,
    read_sample,
    served_model,
)
from omniopd_trl.teachers.remote.delivery import trace_delivery
from omniopd_trl.teachers.remote.engine import Capabilities, EngineSettings, RemoteTeacher
from omniopd_trl.teachers.remote.failures import (
    Failure,
    FailureKind,
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
        # The cache pays off from the second sample on: a write costs 1.25 times the prompt, a read a tenth of it.
        cached = request.num_samples > 1 and self._fills_cache(prefix)
        space = prefix.completion[len(prefix.completion.rstrip()) :]
        asked = self._asked(prefix, 1, request, unsent=space)
        response = await self.client.messages.with_raw_response.create(
            model=self.model,
            max_tokens=request.max_tokens,
            **self._prompt(prefix, cached),
            **_distinct(request),
            extra_body={**self.capabilities.reasoning_off, **self._sampling(request)},
        )
        return read_answer(response.http_response.content, asked)

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


def _distinct(request: SamplingRequest) -> dict[str, Any]:
    """A field that differs between the requests for one prefix, which a gateway that caches answers would equate.

    The service takes no seed. This field is not part of the prompt, so the prompt cache is not affected.
    """
    return {} if request.seed is None else {"metadata": {"user_id": f"omniopd-{request.seed}"}}


def read_answer(body: bytes | str, asked: Asked) -> Response:
    """Read the body of an answer of `/v1/messages`.

    Raises:
        MalformedResponseError: when it has another form.
    """
    answer = parse(body)
    usage = _usage(answer.get("usage"))
    reasoned = usage is not None and usage.reasoning_tokens > 0
    sample = read_sample(asked, members(answer, "content"), member(answer, "stop_reason", str), reasoned=reasoned)
    return Response((sample,), usage, served_model(answer.get("model")))


def _usage(usage: Any) -> Usage | None:
    """The service's `input_tokens` exclude cache reads and cache writes."""
    # A compatible proxy may leave any of them out.
    if not isinstance(usage, dict) or usage.get("input_tokens") is None or usage.get("output_tokens") is None:
        return None
    found = counts(
        usage,
        "input_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "output_tokens",
        "output_tokens_details.thinking_tokens",
    )
    if found is None:
        return None
    plain, read, written, output, thinking = found
    return Usage(plain + read + written, read, output, thinking, written)
