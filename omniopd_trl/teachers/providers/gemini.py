# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Gemini as a teacher, through the Gemini Developer API and on Vertex AI."""

import os
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.errors import import_extra
from omniopd_trl.teachers.base import Prefix, SamplingRequest, split_system
from omniopd_trl.teachers.instruct.prompt import render_messages
from omniopd_trl.teachers.remote.answers import (
    Asked,
    Prepared,
    Response,
    Sample,
    counts,
    member,
    members,
    parse,
    read_sample,
    served_model,
)
from omniopd_trl.teachers.remote.batch import BatchLimits, BatchTeacher, Results
from omniopd_trl.teachers.remote.failures import NOT_REACHED, Failure, MalformedResponseError, ServiceError
from omniopd_trl.teachers.remote.http import check_address, http_client
from omniopd_trl.teachers.remote.settings import Capabilities

# HTTP statuses of the codes of gRPC, in which a batch reports the errors of its requests.
_STATUS_OF_GRPC = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 13: 500, 14: 503, 16: 401}


class GeminiTeacher(BatchTeacher):
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

    # https://ai.google.dev/gemini-api/docs/batch-api: the size of a batch without a file.
    batch_limits = BatchLimits(requests=50_000, size=20_000_000)

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
        variable = "GOOGLE_GEMINI_BASE_URL" if provider == "gemini" else "GOOGLE_VERTEX_BASE_URL"
        self.base_url = base_url or os.environ.get(variable) or None
        if self.base_url is not None:
            check_address(self.base_url, "teacher_base_url" if base_url else variable)

    def connect(self) -> Any:
        genai = import_extra("google.genai", self.provider)
        # `vertexai` overrides environment variables that switch the SDK to the other product with other credentials.
        identity = {"vertexai": False, "api_key": self.key()} if self.provider == "gemini" else self._vertex_identity()
        # With this client the SDK uses httpx even when aiohttp is installed. It has no `retry_options`: no retries.
        http = http_client(self.settings.max_concurrency, self.max_body)
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
        body, read = self.prepare(prefix, num_samples, request)
        # The body of the answer as it came: it is read here, as those of the other services.
        config = body["config"] | {"should_return_http_response": True}
        models = self.client[0].aio.models
        response = await models.generate_content(model=self.model, contents=body["contents"], config=config)
        return read(response.sdk_http_response.body or "")

    def prepare(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Prepared:
        asked = self._asked(prefix, num_samples, request)
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
        return Prepared({"contents": contents, "config": config}, partial(read_answer, asked=asked))

    # ---- Requests ----

    def _contents(self, prefix: Prefix) -> tuple[list[dict[str, Any]], str | None]:
        if self.is_instructed(prefix):
            messages = render_messages(prefix.prompt, prefix.completion)
        else:
            messages = prefix.messages
            if prefix.completion:
                messages.append({"role": "assistant", "content": prefix.completion})
        system, turns = split_system(messages)
        contents = [
            {
                "role": "model" if message["role"] == "assistant" else "user",
                "parts": [{"text": str(message["content"])}],
            }
            for message in turns
        ]
        return contents, system or None

    # ---- Batches ----

    def why_no_batches(self) -> str:
        if self.provider != "gemini":
            return "those of Vertex AI need a bucket of Cloud Storage"
        if self.body():
            return "its batches take no teacher_extra_body, which would be added to the batch and not to its requests"
        return ""

    async def submit_batch(self, tag: str, requests: Mapping[str, Prepared]) -> str:
        lines = [{**request.body, "metadata": {"key": name}} for name, request in requests.items()]
        job = await self.client[0].aio.batches.create(model=self.model, src=lines, config={"display_name": tag})
        return str(job.name)

    async def find_batch(
        self, tag: str, names: Collection[str], since: float, known: Collection[str]
    ) -> tuple[str | None, bool]:
        async for job in await self.client[0].aio.batches.list(config={"page_size": 100}):
            if job.display_name == tag:
                return str(job.name), True
        return None, True

    async def collect_batch(self, batch_id: str, names: Collection[str]) -> Results | ServiceError | None:
        job = await self.client[0].aio.batches.get(name=batch_id)
        state = job.state.name.removeprefix("JOB_STATE_").lower() if job.state is not None else "unknown"
        if state == "failed":
            return ServiceError(500, (job.error and job.error.message) or "the batch has failed, without a reason")
        results: Results = {}
        if state in ("cancelled", "expired"):
            results = dict.fromkeys(names, ServiceError(200, f"the batch is {state}", NOT_REACHED))
        elif state not in ("succeeded", "partially_succeeded"):
            return None
        answers = (job.dest and job.dest.inlined_responses) or []
        for place, answer in zip(names, answers, strict=False):  # in the order of the requests
            name = (answer.metadata or {}).get("key", place)
            if answer.response is not None:
                results[name] = answer.response.model_dump_json(by_alias=True, exclude_none=True)
            elif answer.error is not None:
                status = _STATUS_OF_GRPC.get(answer.error.code or 0, 500)
                results[name] = ServiceError(status, answer.error.message or "no reason")
        return results

    # ---- Errors ----

    def classify(self, error: Exception) -> Failure | None:
        if type(error).__module__.startswith("google.auth"):  # before a request is sent
            return Failure(
                "final",
                f"no credentials ({type(error).__name__}: {' '.join(str(error).split())[:500]}). Run `gcloud auth "
                "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
            )
        return super().classify(error)


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
