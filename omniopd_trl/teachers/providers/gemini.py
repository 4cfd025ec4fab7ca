# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Gemini as a teacher, through the Gemini Developer API."""

from typing import Any

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.instruct.repair import repair
from omniopd_trl.teachers.remote.delivery import trace_delivery
from omniopd_trl.teachers.remote.engine import Capabilities, EngineSettings, RemoteTeacher, Response, Sample
from omniopd_trl.teachers.remote.failures import (
    Failure,
    FailureKind,
    MalformedResponseError,
    ServiceError,
    failure_of_malformed,
    out_of_range,
    quote,
)


class GeminiTeacher(RemoteTeacher):
    """A teacher behind `generateContent`.

    Models up to 2.5 continue a last turn of the role `model` (`prefill`); later ones refuse it and are instructed.

    Args:
        model: the service's name of the model, for example `"gemini-2.5-flash"`.
        capabilities: capabilities of the model.
        base_url: address of the service. Defaults to `GOOGLE_GEMINI_BASE_URL`, and then to Google itself.
        settings: limits of this process.
        budget: budget of the teacher. Defaults to no limit.
    """

    key_variables = ("GOOGLE_API_KEY", "GEMINI_API_KEY")

    def __init__(
        self,
        model: str,
        capabilities: Capabilities,
        *,
        base_url: str | None = None,
        settings: EngineSettings | None = None,
        budget: Budget | None = None,
    ):
        super().__init__(f"gemini:{model}", capabilities, settings, budget)
        self.model = model
        self.base_url = base_url

    def connect(self) -> Any:
        genai = import_extra("google.genai", "gemini")
        httpx2 = import_extra("httpx2", "gemini")
        key = self.key()
        most = self.settings.max_concurrency
        # With this client the SDK uses httpx even when aiohttp is installed, and the pool holds a connection for each
        # concurrent request. Without `retry_options` it does not retry.
        http = httpx2.AsyncClient(
            follow_redirects=True,
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
            event_hooks={"request": [trace_delivery]},
        )
        options: dict[str, Any] = {"timeout": round(1000 * self.settings.timeout), "httpx_async_client": http}
        if self.base_url is not None:
            options["base_url"] = self.base_url
        # `vertexai=False` overrides environment variables that switch the SDK to another product with other
        # credentials.
        client = genai.Client(api_key=key, vertexai=False, http_options=genai.types.HttpOptions(**options))
        return client, http

    async def disconnect(self, client: Any) -> None:
        genai_client, http = client
        await genai_client.aio.aclose()
        await http.aclose()
        genai_client.close()

    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        instructed = self.capabilities.continuation == "instruct"
        contents, system = self._contents(prefix)
        config: dict[str, Any] = {
            "max_output_tokens": request.max_tokens,
            "candidate_count": num_samples,
            "seed": request.seed,
            "system_instruction": system,
            # Each of these may turn one request into several.
            "automatic_continuation": False,
            "automatic_function_calling": {"disable": True},
            **self.capabilities.reasoning_off,
        }
        if self.capabilities.takes_temperature:
            config |= {"temperature": request.temperature, "top_p": request.top_p}
        answer = await self.client[0].aio.models.generate_content(model=self.model, contents=contents, config=config)
        if answer.candidates is None and answer.prompt_feedback is None and answer.usage_metadata is None:
            raise MalformedResponseError("neither candidates nor feedback on the prompt in it")
        if not answer.candidates:
            # All samples share the prompt that was blocked.
            blocked = answer.prompt_feedback is not None and answer.prompt_feedback.block_reason is not None
            samples = (Sample("", "stop", "filtered" if blocked else "empty"),) * num_samples
        else:
            samples = tuple(_sample(candidate, prefix, instructed) for candidate in answer.candidates)
        return Response(samples, _usage(answer.usage_metadata))

    # ---- Requests ----

    def _contents(self, prefix: Prefix) -> tuple[list[dict[str, Any]], str | None]:
        if self.capabilities.continuation == "instruct":
            messages = render_messages(prefix.prompt, prefix.completion)
        else:
            prompt = prefix.prompt
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if prefix.completion:
                messages.append({"role": "assistant", "content": prefix.completion})
        system = "\n\n".join(str(message["content"]) for message in messages if message["role"] == "system")
        contents = [
            {
                "role": "model" if message["role"] == "assistant" else "user",
                "parts": [{"text": str(message["content"])}],
            }
            for message in messages
            if message["role"] != "system"
        ]
        return contents, system or None

    # ---- Errors ----

    def classify(self, error: Exception) -> Failure | None:
        if isinstance(error, RecursionError | UnicodeDecodeError):  # the SDK reads the body of an error
            return failure_of_malformed(error)
        return super().classify(error)

    def unsupported(self, said: ServiceError) -> Failure | None:
        kind = _unsupported(said.message)
        return None if kind is None else Failure(kind, quote(said))


def _unsupported(detail: str) -> FailureKind | None:
    """The missing capability that a 400 reports, if any. The service has no code for it, only a message."""
    text = detail.lower()
    if "candidate" in text:
        return "one_sample"
    if "thinking" in text:
        return "always_reasons"
    if "temperature" in text or "top_p" in text or "topp" in text:
        return None if out_of_range(text) else "no_temperature"
    if "prefill" in text or ("role" in text and ("last" in text or "end with" in text or "ends with" in text)):
        return "no_prefill"
    return None


# Finish reasons of filtered samples.
_FILTERED = {
    "SAFETY",
    "RECITATION",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "LANGUAGE",
    "MODEL_ARMOR",
    "ESCALATION",
    "PUP_LIMITED_DISABLED",
}


def _sample(candidate: Any, prefix: Prefix, instructed: bool) -> Sample:
    reason = candidate.finish_reason.value if candidate.finish_reason is not None else "STOP"
    if reason in _FILTERED:
        return Sample("", "stop", "filtered")
    finish = "length" if reason in ("MAX_TOKENS", "CONTINUATION") else "stop"
    parts = (candidate.content.parts if candidate.content is not None else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    if not text:
        return Sample("", finish, "empty")
    if not instructed:
        return Sample(text, finish)
    repaired = repair(prefix.completion, text, prefix.prompt)
    return Sample(repaired.text, finish, repaired.outcome)


def _usage(usage: Any) -> Usage | None:
    if usage is None:
        return None
    thoughts = usage.thoughts_token_count or 0
    # A blocked prompt and an answer of thoughts only have no count of candidates.
    return Usage(
        prompt_tokens=usage.prompt_token_count or 0,
        cached_tokens=usage.cached_content_token_count or 0,
        completion_tokens=(usage.candidates_token_count or 0) + thoughts,
        reasoning_tokens=thoughts,
    )
