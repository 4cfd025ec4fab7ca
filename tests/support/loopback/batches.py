# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The batch interfaces of the providers: batches are kept in memory and answered when a test says so."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Answer = Callable[[str, dict[str, Any]], Any]

# A request that the results do not mention.
LOST: Any = {"lost": True}


@dataclass
class Batch:
    """One submitted batch.

    Attributes:
        id: the service's name of it.
        tag: name of the client, where the service has one.
        requests: the requests, by name.
        results: what the service reports, by name; `None` while it is processed.
        state: `"completed"`, `"expired"` or `"failed"` once it has ended.
    """

    id: str
    tag: str | None
    requests: dict[str, dict[str, Any]]
    results: dict[str, Any] | None = None
    state: str = "completed"
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


class BatchService:
    """The answers of a service with batches, for `Loopback`. Single requests are answered as well.

    Args:
        answer: function of path and body that answers single requests.
        result: function of the batch, the name and the body of a request that returns `None` (it is answered), or
            what the service reports in place of an answer, in its own form.
        looks: how often a batch is looked at before it has ended.
        capacity: requests that the account may have in process; `None` for no limit.

    Attributes:
        batches: the batches, in the order of their submission.
        singles: bodies of single requests.
        ends: whether batches end.
        url: address of the server, for results that are at an address of their own.
    """

    def __init__(
        self,
        answer: Answer,
        result: Callable[..., Any] = lambda batch, name, body: None,
        looks: int = 1,
        capacity: int | None = None,
    ):
        self.prefix = "batches/" if isinstance(self, GeminiBatches) else "batch_"
        self.answer, self.result, self.looks = answer, result, looks
        self.batches: list[Batch] = []
        self.singles: list[dict[str, Any]] = []
        self.capacity = capacity
        self.files: dict[str, bytes] = {}
        self.url = ""
        self.ends = True
        self._looked: dict[str, int] = {}

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        path = path.partition("?")[0]
        for pattern, serve in self.routes():
            if match := re.fullmatch(pattern, path):
                return serve(body, *match.groups())
        self.singles.append(body)
        return self.answer(path, body)

    def routes(self) -> list[tuple[str, Callable[..., Any]]]:
        raise NotImplementedError

    def keep(self, tag: str | None, requests: dict[str, dict[str, Any]]) -> Batch:
        batch = Batch(f"{self.prefix}{len(self.batches)}", tag, requests)
        in_process = sum(len(other.requests) for other in self.batches if other.results is None)
        if self.capacity is not None and in_process + len(requests) > self.capacity:
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}
            batch.state, batch.results = "failed", dict.fromkeys(requests, error)
        self.batches.append(batch)
        return batch

    def look(self, batch_id: str) -> Batch:
        """A batch, which ends when it has been looked at often enough."""
        batch = next(batch for batch in self.batches if batch.id == batch_id)
        self._looked[batch_id] = self._looked.get(batch_id, 0) + 1
        if batch.results is None and self.ends and self._looked[batch_id] > self.looks:
            # In another order than the requests.
            batch.results = {
                name: self.result(batch, name, request) or self.succeeded(request)
                for name, request in reversed(batch.requests.items())
            }
        return batch

    def succeeded(self, request: dict[str, Any]) -> Any:
        """What the service reports for a request that is answered."""
        raise NotImplementedError


class OpenAIBatches(BatchService):
    """`/v1/files` and `/v1/batches`."""

    def routes(self):
        return [
            ("/v1/files", self._upload),
            ("/v1/files/([^/]+)/content", self._content),
            ("/v1/batches", lambda body: self._create(body) if body else self._list()),
            ("/v1/batches/([^/]+)", lambda body, batch_id: self._shown(self.look(batch_id))),
        ]

    def _upload(self, body):
        name = f"file-{len(self.files)}"
        lines = [line for line in body["file"].split(b"\n") if line.startswith(b'{"custom_id"')]
        self.files[name] = b"\n".join(lines)
        return {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch"}

    def _create(self, body):
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert {line["url"] for line in lines} == {body["endpoint"]}
        batch = self.keep(body["metadata"]["omniopd"], {line["custom_id"]: line["body"] for line in lines})
        return self._shown(batch)

    def _list(self):
        return {"object": "list", "data": [self._shown(batch) for batch in reversed(self.batches)], "has_more": False}

    def _shown(self, batch):
        shown = {
            "id": batch.id,
            "object": "batch",
            "completion_window": "24h",
            "created_at": int(batch.created.timestamp()),
            "endpoint": "/v1/chat/completions",
            "input_file_id": "file-0",
            "status": "in_progress" if batch.results is None else batch.state,
            "metadata": {"omniopd": batch.tag},
        }
        if batch.results is not None and batch.state == "failed":
            shown["errors"] = {"object": "list", "data": [batch.results[next(iter(batch.results))]]}
        elif batch.results is not None:
            shown |= {"output_file_id": f"{batch.id}-out", "error_file_id": f"{batch.id}-err"}
        return shown

    def _content(self, body, file):
        batch_id, _, kind = file.rpartition("-")
        batch = next(batch for batch in self.batches if batch.id == batch_id)
        lines = [
            json.dumps({"id": "r", "custom_id": name, "response": None, "error": None} | result)
            for name, result in batch.results.items()
            if result is not LOST and ((result.get("response") or {}).get("status_code") == 200) == (kind == "out")
        ]
        return "\n".join(lines)

    def succeeded(self, request):
        answer = self.answer("/v1/chat/completions", request)
        return {"response": {"status_code": 200, "request_id": "x", "body": answer}}


class AnthropicBatches(BatchService):
    """`/v1/messages/batches`."""

    def routes(self):
        return [
            ("/v1/messages/batches", lambda body: self._create(body) if body else self._list()),
            ("/v1/messages/batches/([^/]+)", lambda body, batch_id: self._shown(self.look(batch_id))),
            ("/v1/messages/batches/([^/]+)/results", self._results),
        ]

    def _create(self, body):
        assert all(re.fullmatch(r"[\w-]{1,64}", request["custom_id"]) for request in body["requests"])
        requests = {request["custom_id"]: request["params"] for request in body["requests"]}
        assert len(requests) == len(body["requests"])
        return self._shown(self.keep(None, requests))

    def _list(self):
        shown = [self._shown(batch) for batch in reversed(self.batches)]
        return {"data": shown, "has_more": False, "first_id": None, "last_id": None}

    def _shown(self, batch):
        ended = batch.results is not None
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        return {
            "id": batch.id,
            "type": "message_batch",
            "created_at": batch.created.isoformat(),
            "expires_at": batch.created.isoformat(),
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts | {"succeeded" if ended else "processing": len(batch.requests)},
            "results_url": f"{self.url}/v1/messages/batches/{batch.id}/results" if ended else None,
        }

    def _results(self, body, batch_id):
        batch = next(batch for batch in self.batches if batch.id == batch_id)
        lines = [{"custom_id": name, "result": result} for name, result in batch.results.items() if result is not LOST]
        return "\n".join(map(json.dumps, lines))

    def succeeded(self, request):
        return {"type": "succeeded", "message": self.answer("/v1/messages", request)}


class GeminiBatches(BatchService):
    """`batchGenerateContent` and `/batches`."""

    def routes(self):
        return [
            ("/v1.*/models/.*:batchGenerateContent", self._create),
            ("/v1[^/]*/batches", lambda body: {"operations": [self._shown(batch) for batch in self.batches]}),
            ("/v1[^/]*/(batches/[^/]+)", lambda body, batch_id: self._shown(self.look(batch_id))),
        ]

    def _create(self, body):
        lines = body["batch"]["inputConfig"]["requests"]["requests"]
        requests = {line["metadata"]["key"]: line["request"] for line in lines}
        return self._shown(self.keep(body["batch"]["displayName"], requests))

    def _shown(self, batch):
        state = "RUNNING" if batch.results is None else batch.state.replace("completed", "succeeded").upper()
        metadata = {"displayName": batch.tag, "state": f"BATCH_STATE_{state}"}
        if batch.results is not None and state == "SUCCEEDED":
            answers = [{"metadata": {"key": name}, **result} for name, result in batch.results.items()]
            metadata["output"] = {"inlinedResponses": {"inlinedResponses": answers}}
        return {"name": batch.id, "metadata": metadata, "done": batch.results is not None}

    def succeeded(self, request):
        return {"response": self.answer(":generateContent", request)}
