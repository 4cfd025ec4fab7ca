# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Teachers behind an OpenAI-compatible API: vLLM, OpenAI itself, Azure, and other servers."""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.data.encoding import render_chat
from omniopd_trl.errors import DataError, import_extra
from omniopd_trl.teachers.base import Prefix, Prompt, SamplingRequest
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
    refused_sample,
    served_model,
)
from omniopd_trl.teachers.remote.batch import BatchLimits, BatchTeacher, Results, read_lines
from omniopd_trl.teachers.remote.failures import NOT_REACHED, Failure, MalformedResponseError, ServiceError
from omniopd_trl.teachers.remote.fields import limit_field
from omniopd_trl.teachers.remote.http import check_address, http_client
from omniopd_trl.teachers.remote.settings import Capabilities

VLLM_URL = "http://localhost:8000/v1"
OPENAI_URL = "https://api.openai.com/v1"

KEYS = {
    "vllm": ("VLLM_API_KEY",),
    "openai": ("OPENAI_API_KEY",),
    "azure": ("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"),
}


class OpenAITeacher(BatchTeacher):
    """A teacher behind `/v1/completions` (`raw`) or `/v1/chat/completions` (all other continuations).

    Args:
        provider: `"vllm"`, `"openai"` or `"azure"`.
        model: the server's name of the model; the name of the deployment for `azure`.
        capabilities: capabilities of the model.
        base_url: address of the server, with its `/v1`. Defaults to this machine for `vllm`, to `OPENAI_BASE_URL` and
            then OpenAI itself for `openai`, and to `AZURE_OPENAI_ENDPOINT` for `azure`.
        tokenizer: tokenizer of the teacher, or its path or id. Its chat template renders the prompts of a `raw`
            continuation. Defaults to `model`. Plain-text prompts need none.
        chat_template_kwargs: arguments for the chat template, here or on the server.
        options: `settings`, `budget`, `extra_body` and `extra_headers`, as in `RemoteTeacher`.
    """

    # https://developers.openai.com/api/docs/guides/batch
    batch_limits = BatchLimits(requests=50_000, size=200_000_000)

    def __init__(
        self,
        provider: str,
        model: str,
        capabilities: Capabilities,
        *,
        base_url: str | None = None,
        tokenizer: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.key_variables = KEYS[provider]
        super().__init__(f"{provider}:{model}", capabilities, **options)
        self.provider = provider
        self.model = model
        self.base_url = _address(provider, base_url)
        self.dialect = _dialect(provider, self.base_url)
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._tokenizer = tokenizer if tokenizer is not None else model

    @property
    def reasoning_switch(self) -> str:  # type: ignore[override]
        if self.dialect in ("vllm", "transformers"):
            return (
                "set the switch of its chat template in teacher_chat_template_kwargs, which is {'enable_thinking': "
                "False} for many models and {'thinking': False} for others, or name a model that does not reason"
            )
        return super().reasoning_switch

    def connect(self) -> Any:
        openai = import_extra("openai", "openai")
        options: dict[str, Any] = {
            "timeout": self.settings.timeout,
            "max_retries": 0,
            "default_headers": self.extra_headers,
        }
        if self.provider == "azure":
            self.key()  # the SDK reads it, and tells it from a token of Entra ID by its variable
            endpoint = self.base_url or self.variable("teacher_base_url", "AZURE_OPENAI_ENDPOINT")
            version = self.variable("version of the API", "OPENAI_API_VERSION")
            http = http_client(self.settings.max_concurrency, self.max_body)
            return openai.AsyncAzureOpenAI(azure_endpoint=endpoint, api_version=version, http_client=http, **options)
        # Self-hosted servers usually require no key, but the SDK does.
        key = self.key(None if self.dialect == "openai" else "none")
        http = http_client(self.settings.max_concurrency, self.max_body)
        return openai.AsyncOpenAI(api_key=key, base_url=self.base_url, http_client=http, **options)

    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        body, read = self.prepare(prefix, num_samples, request)
        if self.capabilities.continuation == "raw":
            create, names = self.client.completions.with_raw_response.create, ("model", "prompt")
        else:
            create, names = self.client.chat.completions.with_raw_response.create, ("model", "messages")
        required = {name: body.pop(name) for name in names}
        response = await create(**required, extra_body=body)
        return read(response.http_response.content)

    def prepare(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Prepared:
        # vLLM refuses to draw several samples greedily. They would all be equal, so one is drawn and copied.
        copies = num_samples if request.temperature == 0 and self.dialect in ("vllm", "transformers") else 1
        asked = self._asked(prefix, num_samples // copies, request)
        sampling = self._sampling(num_samples // copies, request)
        if self.capabilities.continuation == "raw":
            text, extra_tokens = self._render(prefix)
            body = {"model": self.model, "prompt": text} | self.body(sampling, extra_tokens)
        else:
            messages, continuing = self._messages(prefix)
            payload = {**self.capabilities.reasoning_off}
            if self.chat_template_kwargs:
                payload["chat_template_kwargs"] = {
                    **payload.get("chat_template_kwargs", {}),
                    **self.chat_template_kwargs,
                }
            body = {"model": self.model, "messages": messages} | self.body(sampling, payload, continuing)

        def read(answer: bytes | str) -> Response:
            response = read_answer(answer, asked)
            return response._replace(samples=response.samples * copies)

        return Prepared(body, read)

    # ---- Requests ----

    def _sampling(self, num_samples: int, request: SamplingRequest) -> dict[str, Any]:
        """Servers replace missing fields by their own defaults, so every one that they may know is set."""
        fields: dict[str, Any] = {}
        raw = self.capabilities.continuation == "raw"
        limit = "max_completion_tokens" if self.dialect == "openai" and not raw else "max_tokens"
        fields[limit_field(limit, self.capabilities.refused)] = request.max_tokens
        if self.capabilities.takes_temperature:
            fields["temperature"] = request.temperature
            fields["top_p"] = request.top_p
        if num_samples > 1:
            fields["n"] = num_samples
        if request.seed is not None and self.dialect not in ("deepseek", "mistral"):
            fields["seed"] = request.seed
        if self.dialect == "mistral":
            if request.seed is not None:
                fields["random_seed"] = request.seed
        elif self.dialect == "openrouter":
            fields |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        elif self.dialect == "transformers":
            # It refuses unknown fields, and samples only with `do_sample`.
            config = {"do_sample": request.temperature > 0, "top_k": 0, "repetition_penalty": 1.0}
            if request.temperature > 0:
                config |= {"temperature": request.temperature, "top_p": request.top_p}
            fields["generation_config"] = json.dumps(config)
        elif self.dialect == "vllm":
            # Both mean all tokens to vLLM. SGLang knows only -1; llama.cpp and its Python server know only 0.
            fields["top_k"] = -1 if self.provider == "vllm" else 0
            fields |= {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return fields

    def _messages(self, prefix: Prefix) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if self.is_instructed(prefix):
            return render_messages(prefix.prompt, prefix.completion), {}
        messages = prefix.messages
        if not prefix.completion:  # nothing to continue, and an empty turn is refused or closed
            return messages, {}
        turn: dict[str, Any] = {"role": "assistant", "content": prefix.completion}
        if self.capabilities.continuation == "continue_final":
            return [*messages, turn], {"add_generation_prompt": False, "continue_final_message": True}
        if self.capabilities.continuation == "prefix_flag":
            turn["prefix"] = True
        return [*messages, turn], {}

    def check_prompt(self, prompt: Prompt) -> None:
        if self.capabilities.continuation == "raw" and not isinstance(prompt, str):
            self._render(Prefix(prompt))

    def _render(self, prefix: Prefix) -> tuple[str, dict[str, Any]]:
        """The text of a raw continuation, and the field that keeps the server from adding special tokens to it."""
        knows_field = self.provider == "vllm" and "add_special_tokens" not in self.capabilities.refused
        adds_none = {"add_special_tokens": False} if knows_field else {}
        if isinstance(prefix.prompt, str):
            return prefix.prompt + prefix.completion, {}
        tokenizer = self._load_tokenizer()
        kwargs = {**self.capabilities.reasoning_off.get("chat_template_kwargs", {}), **self.chat_template_kwargs}
        text = render_chat(tokenizer, prefix.prompt, kwargs, f"the teacher {self.name}")
        bos = tokenizer.bos_token
        if (
            not adds_none
            and bos
            and text.startswith(bos)
            and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        ):
            # Other servers have no such field and begin every text with this token themselves.
            text = text.removeprefix(bos)
        return text + prefix.completion, adds_none

    def _load_tokenizer(self) -> Any:
        if isinstance(self._tokenizer, str):
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"No tokenizer can be loaded from {self._tokenizer!r}, which renders the prompts of {self.name}. "
                    "Set `teacher_tokenizer_name_or_path` to the teacher's path or id, or "
                    f"`teacher_continuation: continue_final` to let the server render them. ({error})"
                ) from error
        return self._tokenizer

    # ---- Batches ----

    def why_no_batches(self) -> str:
        if self.provider == "azure":
            return "a deployment of Azure for batches answers no single request, and the first check is one"
        if self.provider == "vllm" or self.dialect in ("deepseek", "mistral", "openrouter"):
            return f"{'a server' if self.provider == 'vllm' else self.dialect} has none in the interface of OpenAI"
        return ""

    @property
    def _endpoint(self) -> str:
        return "/v1/completions" if self.capabilities.continuation == "raw" else "/v1/chat/completions"

    async def submit_batch(self, tag: str, requests: Mapping[str, Prepared]) -> str:
        lines = [
            json.dumps({"custom_id": name, "method": "POST", "url": self._endpoint, "body": request.body})
            for name, request in requests.items()
        ]
        content = "".join(f"{line}\n" for line in lines).encode()
        file = await self.client.files.create(file=(f"{tag}.jsonl", content), purpose="batch")
        batch = await self.client.batches.create(
            input_file_id=file.id, endpoint=self._endpoint, completion_window="24h", metadata={"omniopd": tag}
        )
        return str(batch.id)

    async def find_batch(
        self, tag: str, names: Collection[str], since: float, known: Collection[str]
    ) -> tuple[str | None, bool]:
        async for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).get("omniopd") == tag:
                return str(batch.id), True
        return None, True

    async def collect_batch(self, batch_id: str, names: Collection[str]) -> Results | ServiceError | None:
        batch = await self.client.batches.retrieve(batch_id)
        if batch.status == "failed":
            errors = (batch.errors and batch.errors.data) or []
            said = ServiceError.inside({"error": [error.model_dump() for error in errors] or "no reason"})
            return ServiceError(400, said.message, said.code) if said is not None and said.status == 200 else said
        if batch.status not in ("completed", "expired", "cancelled"):
            return None
        results: Results = {}
        if batch.status != "completed":
            said = ServiceError(200, f"the batch is {batch.status}", NOT_REACHED)
            results = dict.fromkeys(names, said)
        for file in (batch.error_file_id, batch.output_file_id):
            if file is not None:
                content = await self.client.files.content(file)
                results |= read_lines(content.content, _result)
        return results

    # ---- Errors ----

    def unsupported(self, said: ServiceError) -> Failure | None:
        if said.status == 422 and "Unexpected fields" in said.message and "top_k" in said.message:
            self.dialect = "transformers"  # once for all the requests in flight together
            return Failure("transient", "the server is `transformers serve`, which takes its sampling in another form")
        return super().unsupported(said)


def is_self_hosted(provider: str, base_url: str | None) -> bool:
    """Whether a `vllm:` or `openai:` teacher is on a self-hosted server, not on a service with different fields.

    Args:
        provider: `"vllm"`, `"openai"` or `"azure"`.
        base_url: as in `OpenAITeacher`.
    """
    return _dialect(provider, _address(provider, base_url)) == "vllm"


def _address(provider: str, base_url: str | None) -> str:
    variables = {"openai": "OPENAI_BASE_URL", "azure": "AZURE_OPENAI_ENDPOINT"}
    if base_url is None and (variable := variables.get(provider)) and (address := os.environ.get(variable)):
        return check_address(address, variable)
    if base_url is None:
        return {"vllm": VLLM_URL, "openai": OPENAI_URL}.get(provider, "")
    return check_address(base_url, "teacher_base_url")


def _dialect(provider: str, base_url: str) -> str:
    """The fields that a server accepts. Services that refuse unknown fields are recognized by their address."""
    if provider == "azure":
        return "openai"
    host = urlsplit(base_url).hostname or ""
    for known, dialect in (
        ("api.openai.com", "openai"),
        ("api.deepseek.com", "deepseek"),
        ("api.mistral.ai", "mistral"),
        ("openrouter.ai", "openrouter"),
    ):
        if provider == "openai" and (host == known or host.endswith("." + known)):
            return dialect
    return "vllm"


def read_answer(body: bytes | str, asked: Asked) -> Response:
    """Read the body of an answer of `/v1/completions` or `/v1/chat/completions`.

    Raises:
        MalformedResponseError: when it has another form.
    """
    answer = parse(body)
    usage = _usage(answer.get("usage"))
    reasoned = usage is not None and usage.reasoning_tokens > 0
    choices = members(answer, "choices")[: asked.num_samples]
    samples = tuple(_sample(choice, asked, reasoned) for choice in choices)
    return Response(samples, usage, served_model(answer.get("model")))


def _result(line: dict[str, Any]) -> str | ServiceError:
    """The body of an answer in a line of a batch's files, or its error."""
    response = member(line, "response", dict)
    if response is None:
        error = ServiceError.inside(line)
        if error is None:
            raise MalformedResponseError("neither a response nor an error in it", line)
        return error
    status = member(response, "status_code", int) or 200
    if status >= 300:
        return ServiceError.reported(status, response.get("body"))
    return json.dumps(response.get("body"))


def _sample(choice: Any, asked: Asked, reasoned: bool) -> Sample:
    finish = member(choice, "finish_reason", str)
    message = member(choice, "message", dict)
    if message is None:
        if "text" not in choice:
            raise MalformedResponseError("a choice without a text or a message", choice)
        return read_sample(asked, choice["text"], finish, reasoned=reasoned)
    if refusal := message.get("refusal"):
        return refused_sample(refusal)
    reasoned = reasoned or bool(message.get("reasoning_content") or message.get("reasoning"))
    return read_sample(asked, message.get("content"), finish, reasoned=reasoned)


def _usage(usage: Any) -> Usage | None:
    found = counts(
        usage,
        "prompt_tokens",
        "prompt_tokens_details.cached_tokens",
        "completion_tokens",
        "completion_tokens_details.reasoning_tokens",
        "prompt_tokens_details.cache_write_tokens",
        "total_tokens",
    )
    if found is None:
        return None
    prompt, cached, completion, reasoning, written, total = found
    # Some services, such as xAI, count reasoning in the total only.
    return Usage(prompt, cached, max(completion, total - prompt), reasoning, written)
