# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Claude as a teacher: Anthropic's Messages interface, at Anthropic, on Amazon Bedrock and on Vertex AI."""

import json
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
    counts,
    member,
    members,
    parse,
    read_sample,
    served_model,
)
from omniopd_trl.teachers.remote.batch import CLOCK_SECONDS, BatchLimits, BatchTeacher, Results, read_lines
from omniopd_trl.teachers.remote.failures import NOT_REACHED, Failure, MalformedResponseError, ServiceError
from omniopd_trl.teachers.remote.http import check_address, http_client
from omniopd_trl.teachers.remote.settings import Capabilities

# Where each provider's key and address are, besides the credentials that the cloud's own package reads.
KEYS = {
    "anthropic": ("ANTHROPIC_API_KEY",),
    "bedrock": ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_BEARER_TOKEN_BEDROCK"),
    "vertex": (),
}
_ADDRESSES = {
    "anthropic": "ANTHROPIC_BASE_URL",
    "bedrock": "ANTHROPIC_BEDROCK_BASE_URL",
    "vertex": "ANTHROPIC_VERTEX_BASE_URL",
}
_NO_CREDENTIALS = {
    "bedrock": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or AWS_BEARER_TOKEN_BEDROCK",
    "vertex": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}


class AnthropicTeacher(BatchTeacher):
    """A teacher behind `/v1/messages`, with one sample per request.

    Older models continue a last message of the assistant (`prefill`). It must not end in white space: trailing white
    space is not sent, and is removed from the continuation when the model writes it again. Newer models are
    instructed.

    Args:
        model: the provider's name of the model, for example `"claude-haiku-4-5"`.
        capabilities: capabilities of the model.
        provider: `"anthropic"`, `"bedrock"` or `"vertex"`.
        base_url: address of the service. Defaults to `ANTHROPIC_BASE_URL` (with `_BEDROCK` or `_VERTEX` before
            `_BASE_URL` for the others), and then to the service itself.
        options: `settings`, `budget`, `extra_body` and `extra_headers`, as in `RemoteTeacher`.
    """

    # https://platform.claude.com/docs/en/build-with-claude/batch-processing
    batch_limits = BatchLimits(requests=100_000, size=256_000_000)

    def __init__(
        self,
        model: str,
        capabilities: Capabilities,
        *,
        provider: str = "anthropic",
        base_url: str | None = None,
        **options: Any,
    ):
        self.key_variables = KEYS[provider]
        super().__init__(f"{provider}:{model}", capabilities, **options)
        self.provider = provider
        self.model = model
        self.base_url = base_url
        if base_url is not None:
            check_address(base_url, "teacher_base_url")
        elif address := os.environ.get(_ADDRESSES[provider]):
            self.base_url = check_address(address, _ADDRESSES[provider])

    def connect(self) -> Any:
        anthropic = import_extra("anthropic", self.provider)
        options: dict[str, Any] = {
            "base_url": self.base_url,
            "timeout": self.settings.timeout,
            "max_retries": 0,
            "default_headers": self.extra_headers,
        }
        if self.provider == "bedrock":
            import_extra("boto3", "bedrock")
            client, identity = anthropic.AsyncAnthropicBedrock, {}
        elif self.provider == "vertex":
            import_extra("google.auth", "vertex")
            client = anthropic.AsyncAnthropicVertex
            identity = {
                "project_id": self.variable("project", "ANTHROPIC_VERTEX_PROJECT_ID", "GOOGLE_CLOUD_PROJECT"),
                "region": self.variable("region", "CLOUD_ML_REGION", "GOOGLE_CLOUD_LOCATION"),
            }
        else:
            client, identity = anthropic.AsyncAnthropic, {"api_key": self.key()}
        return client(**identity, http_client=http_client(self.settings.max_concurrency, self.max_body), **options)

    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        body, read = self.prepare(prefix, num_samples, request)
        required = {name: body.pop(name) for name in ("model", "max_tokens", "messages", "system") if name in body}
        response = await self.client.messages.with_raw_response.create(**required, extra_body=body)
        return read(response.http_response.content)

    def prepare(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Prepared:
        # The cache pays off from the second sample on: a write costs 1.25 times the prompt, a read a tenth of it.
        cached = request.num_samples > 1 and self._fills_cache(prefix)
        space = prefix.completion[len(prefix.completion.rstrip()) :]
        asked = self._asked(prefix, 1, request, unsent=space)
        body = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            **self._prompt(prefix, cached),
            **self.body(self.capabilities.reasoning_off, self._sampling(request), self._distinct(request)),
        }
        return Prepared(body, partial(read_answer, asked=asked))

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

    def _distinct(self, request: SamplingRequest) -> dict[str, Any]:
        """A field that differs between the requests for one prefix, which a gateway that caches answers would equate.

        The service takes no seed. This field is not part of the prompt, so the prompt cache is not affected. Bedrock
        and Vertex AI do not have it.
        """
        if request.seed is None or self.provider != "anthropic":
            return {}
        return {"metadata": {"user_id": f"omniopd-{request.seed}"}}

    def _prompt(self, prefix: Prefix, cached: bool) -> dict[str, Any]:
        if self.is_instructed(prefix):
            messages = render_messages(prefix.prompt, prefix.completion)
        else:
            messages = prefix.messages
            if beginning := prefix.completion.rstrip():  # an empty turn is refused
                messages.append({"role": "assistant", "content": beginning})
        system, turns = split_system(messages)
        if cached and turns and isinstance(turns[-1]["content"], str):
            block = {"type": "text", "text": turns[-1]["content"], "cache_control": {"type": "ephemeral"}}
            turns[-1] = {**turns[-1], "content": [block]}
        return {"messages": turns, **({"system": system} if system else {})}

    # ---- Batches ----

    def why_no_batches(self) -> str:
        return "" if self.provider == "anthropic" else f"its SDK has none at {self.provider}"

    async def submit_batch(self, tag: str, requests: Mapping[str, Prepared]) -> str:
        lines = [{"custom_id": name, "params": request.body} for name, request in requests.items()]
        return str((await self.client.messages.batches.create(requests=lines)).id)

    async def find_batch(
        self, tag: str, names: Collection[str], since: float, known: Collection[str]
    ) -> tuple[str | None, bool]:
        # The service keeps no name of a batch. Its requests have names, which can be read when it has ended.
        certain = True
        async for batch in self.client.messages.batches.list(limit=100):
            if batch.created_at.timestamp() < since - CLOCK_SECONDS:
                break  # the list begins with the newest
            tallied = batch.request_counts.model_dump().values()
            if batch.id in known or sum(n for n in tallied if isinstance(n, int)) != len(names):
                continue
            results = await self.collect_batch(batch.id, names)
            if results is None:
                certain = False
            elif results.keys() & set(names):
                return str(batch.id), True
        return None, certain

    async def collect_batch(self, batch_id: str, names: Collection[str]) -> Results | None:
        batch = await self.client.messages.batches.retrieve(batch_id)
        if batch.processing_status != "ended":
            return None
        if batch.results_url is None:
            return {}  # the service keeps results for 29 days
        response = await self.client.messages.batches.with_raw_response.results(batch_id)
        return read_lines(response.http_response.content, _result)

    # ---- Errors ----

    def classify(self, error: Exception) -> Failure | None:
        return self._no_credentials(error) or super().classify(error)

    def _no_credentials(self, error: Exception) -> Failure | None:
        """The failure of a cloud's package to find, read or renew credentials before a request is sent."""
        package = type(error).__module__.partition(".")[0]
        if self.provider == "anthropic" or not (package in ("botocore", "google") or isinstance(error, RuntimeError)):
            return None
        said = " ".join(str(error).split())[:500]
        return Failure("final", f"no credentials ({type(error).__name__}: {said}). {_NO_CREDENTIALS[self.provider]}.")


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


def _result(line: dict[str, Any]) -> str | ServiceError:
    """The body of an answer in a line of a batch's results, or its error."""
    result = member(line, "result", dict) or {}
    kind = result.get("type")
    if kind == "succeeded":
        return json.dumps(result.get("message"))
    if kind in ("expired", "canceled"):
        return ServiceError(200, f"the request is {kind}", NOT_REACHED)
    error = ServiceError.inside(result.get("error"))
    if error is None:
        raise MalformedResponseError("neither a message nor an error in it", line)
    return error


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
