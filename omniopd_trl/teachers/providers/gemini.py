# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Gemini as a teacher, through the Gemini Developer API and on Vertex AI."""

import json
import os
import re
from dataclasses import replace
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.instruct.repair import repair
from omniopd_trl.teachers.remote.engine import Capabilities, RemoteTeacher, Response, Sample
from omniopd_trl.teachers.remote.failures import (
    Failure,
    MalformedResponseError,
    failure_of_status,
    retry_after,
    was_sent,
)
from omniopd_trl.teachers.remote.fields import refusal
from omniopd_trl.teachers.remote.http import check_address, http_client


class GeminiTeacher(RemoteTeacher):
    """A teacher behind `generateContent`.

    Models up to 2.5 continue a last turn of the role `model` (`prefill`); later ones refuse it and are instructed.

    Args:
        model: the service's name of the model, for example `"gemini-2.5-flash"`.
        capabilities: capabilities of the model.
        provider: `"gemini"` or `"vertex"`.
        base_url: address of the service. Defaults to `GOOGLE_GEMINI_BASE_URL` (`GOOGLE_VERTEX_BASE_URL` for Vertex
            AI), and then to Google itself.
        options: `settings`, `budget`, `extra_body` and `extra_headers`, as in `RemoteTeacher`.
    """

    key_variables: tuple[str, ...] = ("GOOGLE_API_KEY", "GEMINI_API_KEY")

    def __init__(
        self,
        model: str,
        capabilities: Capabilities,
        *,
        provider: str = "gemini",
        base_url: str | None = None,
        **options: Any,
    ):
        # On Vertex AI a key is used only where there is no project.
        if provider == "vertex":
            self.key_variables = () if os.environ.get("GOOGLE_CLOUD_PROJECT") else ("GOOGLE_API_KEY",)
        super().__init__(f"{provider}:{model}", capabilities, **options)
        self.provider = provider
        self.model = model
        self.base_url = base_url
        variable = "GOOGLE_GEMINI_BASE_URL" if provider == "gemini" else "GOOGLE_VERTEX_BASE_URL"
        if address := base_url or os.environ.get(variable):
            check_address(address, "teacher_base_url" if base_url else variable)

    def connect(self) -> Any:
        genai = import_extra("google.genai", self.provider)
        # `vertexai` overrides environment variables that switch the SDK to the other product with other credentials.
        identity = {"vertexai": False, "api_key": self.key()} if self.provider == "gemini" else self._vertex_identity()
        # With this client the SDK uses httpx even when aiohttp is installed. It has no `retry_options`: no retries.
        http = http_client(self.settings.max_concurrency)
        options: dict[str, Any] = {
            "timeout": round(1000 * self.settings.timeout),
            "httpx_async_client": http,
            "headers": self.extra_headers,
        }
        if self.base_url is not None:
            options["base_url"] = self.base_url
        if extra := self.body():
            options["extra_body"] = extra
        return genai.Client(**identity, http_options=genai.types.HttpOptions(**options)), http

    def _vertex_identity(self) -> dict[str, Any]:
        """Project and location, or a key of Vertex AI in express mode.

        Raises:
            TeacherError: when neither is set. The SDK would look for a project on the network.
        """
        if key := self.variable("key", *self.key_variables, default=""):
            return {"vertexai": True, "api_key": key}
        # Passed as arguments: with another address the SDK forgets those of the environment.
        return {
            "vertexai": True,
            "project": self.variable("project", "GOOGLE_CLOUD_PROJECT"),
            "location": self.variable("location", "GOOGLE_CLOUD_LOCATION", default="global"),
        }

    async def disconnect(self, client: Any) -> None:
        genai_client, http = client
        await genai_client.aio.aclose()
        await http.aclose()
        genai_client.close()

    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        instructed = self.capabilities.continuation == "instruct"
        contents, system = self._contents(prefix)
        sampling: dict[str, Any] = {"seed": request.seed}
        if self.capabilities.takes_temperature:
            sampling |= {"temperature": request.temperature, "top_p": request.top_p}
        config = {
            "max_output_tokens": request.max_tokens,
            "candidate_count": num_samples,
            "system_instruction": system,
            # Each of these may turn one request into several.
            "automatic_continuation": False,
            "automatic_function_calling": {"disable": True},
            **self.capabilities.reasoning_off,
            **self.accepted(sampling),
        }
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
        errors = import_extra("google.genai.errors", "gemini")
        httpx2 = import_extra("httpx2", "gemini")
        pydantic = import_extra("pydantic", "gemini")
        if isinstance(error, httpx2.TimeoutException):
            return Failure("transient", f"no answer within {self.settings.timeout:g} s", None, was_sent(error))
        if isinstance(error, httpx2.TransportError):
            return Failure("transient", f"no connection ({type(error).__name__}: {error})", None, was_sent(error))
        if isinstance(error, errors.UnknownApiResponseError | pydantic.ValidationError):
            return Failure("transient", f"the response cannot be read ({error})", may_be_billed=True)
        if type(error).__module__.startswith("google.auth"):  # before a request is sent
            return Failure(
                "final",
                f"no credentials ({type(error).__name__}: {' '.join(str(error).split())[:500]}). Run `gcloud auth "
                "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
            )
        if not isinstance(error, errors.APIError):
            return None
        detail = str(error.message or error.status)
        facts = json.dumps(error.details, default=str)
        code: str | None = error.status
        status: int = error.code
        if "API_KEY_INVALID" in facts:
            status = 401  # the service answers 400
        elif status == 429 and "PerDay" in facts:
            code = "insufficient_quota"  # although the response names a shorter wait
        failure = failure_of_status(
            status,
            detail,
            model=self.model,
            key=self.key_names,
            wait=_retry_delay(error.details) or retry_after(getattr(error.response, "headers", None) or {}),
            code=code,
        )
        refused = refusal(status, detail)
        return failure if refused is None else replace(refused, otherwise=failure)


def _retry_delay(details: Any) -> float | None:
    """Seconds of `RetryInfo.retryDelay`, as in `"34.07s"`."""
    error = details.get("error", details) if isinstance(details, dict) else {}
    entries = error.get("details") if isinstance(error, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        found = re.fullmatch(r"([\d.]+)s", str(entry.get("retryDelay", "")) if isinstance(entry, dict) else "")
        if found:
            return float(found[1])
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
