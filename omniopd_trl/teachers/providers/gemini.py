# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Gemini as a teacher, through the Gemini Developer API."""

from typing import Any

from omniopd_trl.accounting.budget import Budget
from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.remote.answers import (
    Asked,
    Response,
    Sample,
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
        http.event_hooks["response"].append(_read_as_utf8)
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
        asked = self._asked(prefix, num_samples, request)
        contents, system = self._contents(prefix)
        config: dict[str, Any] = {
            "max_output_tokens": request.max_tokens,
            "candidate_count": num_samples,
            "seed": request.seed,
            "system_instruction": system,
            # Each of these may turn one request into several.
            "automatic_continuation": False,
            "automatic_function_calling": {"disable": True},
            # The body as it came: it is read here, as those of the other services.
            "should_return_http_response": True,
            **self.capabilities.reasoning_off,
        }
        if self.capabilities.takes_temperature:
            config |= {"temperature": request.temperature, "top_p": request.top_p}
        models, httpx2 = self.client[0].aio.models, import_extra("httpx2", "gemini")
        try:
            response = await models.generate_content(model=self.model, contents=contents, config=config)
        except (httpx2.DecodingError, UnicodeDecodeError, RecursionError) as error:  # the SDK parses bodies of errors
            raise MalformedResponseError(f"a damaged body, {type(error).__name__}") from error
        return read_answer(response.sdk_http_response.body or "", asked)

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


async def _read_as_utf8(response: Any) -> None:
    """Ignore the encoding in a response's headers, by which the SDK would decode it. JSON is in UTF-8."""
    response.encoding = "utf-8"


def read_answer(body: bytes | str, asked: Asked) -> Response:
    """Read the body of an answer of `generateContent`.

    Raises:
        MalformedResponseError: when it has another form.
    """
    answer = parse(body)
    usage = _usage(answer.get("usageMetadata"))
    feedback = member(answer, "promptFeedback", dict)
    if answer.get("candidates"):
        reasoned = usage is not None and usage.reasoning_tokens > 0
        candidates = members(answer, "candidates")[: asked.num_samples]
        samples = tuple(_sample(candidate, asked, reasoned) for candidate in candidates)
    elif feedback is not None or answer.get("usageMetadata") is not None:
        # All samples share the prompt that was blocked.
        blocked = feedback is not None and feedback.get("blockReason") is not None
        samples = (Sample("", "stop", "filtered" if blocked else "empty"),) * asked.num_samples
    else:
        raise MalformedResponseError("neither candidates nor feedback on the prompt in it", answer)
    return Response(samples, usage, served_model(answer.get("modelVersion")))


def _sample(candidate: Any, asked: Asked, reasoned: bool) -> Sample:
    content = member(candidate, "content", dict)
    parts = member(content, "parts", list) if content is not None else None
    return read_sample(asked, parts, member(candidate, "finishReason", str), reasoned=reasoned)


def _usage(usage: Any) -> Usage | None:
    # A blocked prompt and an answer of thoughts only have no count of candidates.
    found = counts(usage, "promptTokenCount", "cachedContentTokenCount", "candidatesTokenCount", "thoughtsTokenCount")
    if found is None:
        return None
    prompt, cached, candidates, thoughts = found
    return Usage(prompt, cached, candidates + thoughts, thoughts)
