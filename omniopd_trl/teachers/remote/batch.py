# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Batches: requests that a service answers within a day, for about half the price.

`Batches` takes the place of single requests in the engine. It gathers the requests that wait, submits them in batches,
looks at each batch every `POLL_SECONDS`, and reads the answers like those of single requests.

**Paid for once.** A record of a batch is stored before it is submitted, and the service's name of it right after. A
process that is killed at any moment leaves a record, from which the next one collects the answers. Without the
service's name, the next process looks for the batch in the service's list, and submits it again only if it is not
there.
"""

import asyncio
import hashlib
import json
import sys
import time
import uuid
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Protocol

from omniopd_trl.accounting.budget import Reservation
from omniopd_trl.accounting.pricing import batch_price
from omniopd_trl.errors import OmniOPDError, TeacherError
from omniopd_trl.teachers.base import Prefix, SamplingRequest
from omniopd_trl.teachers.remote.answers import Prepared, Response, parse
from omniopd_trl.teachers.remote.engine import RemoteTeacher
from omniopd_trl.teachers.remote.failures import Failure, MalformedResponseError, ServiceError
from omniopd_trl.teachers.remote.http import MAX_BODY
from omniopd_trl.teachers.remote.retries import RequestFailedError
from omniopd_trl.teachers.remote.settings import Capabilities

# Seconds between two looks at the batches of a service, and before a lost batch is looked for in its list.
POLL_SECONDS = 60.0

# Requests are submitted when none has come for this time, in seconds.
GATHER_SECONDS = 1.0

# Failures in a row, of submitting or of looking, after which the command stops.
MAX_FAILURES = 10

# A line says that batches are waited for, at most once in this many seconds.
SAID_EVERY = 600.0

# The clock of this machine may be this many seconds ahead of that of the service.
CLOCK_SECONDS = 3600.0

# Largest file of answers, in bytes. A batch asks for fewer tokens than this, with 8 bytes for each.
MAX_BATCH_BODY = 2**28
_BYTES_PER_TOKEN = 8

# What a service's SDK adds to a request of a batch, in bytes, and the part of the size limit that is used.
_ENVELOPE = 200
_FILLED = 0.95

# By the name of the request: the body of its answer, or its error.
Results = dict[str, "str | ServiceError"]


class BatchLimits(NamedTuple):
    """Limits of a service on one batch.

    Attributes:
        requests: number of requests.
        size: size of all requests together, in bytes.
    """

    requests: int
    size: int


class BatchTeacher(RemoteTeacher):
    """A teacher behind a service that takes batches.

    Attributes:
        batch_limits: limits of the service.
    """

    batch_limits: BatchLimits

    @abstractmethod
    def prepare(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Prepared:
        """The request that `request` sends, for a batch."""

    @abstractmethod
    def why_no_batches(self) -> str:
        """Why this teacher cannot be asked in batches; empty when it can."""

    @abstractmethod
    async def submit_batch(self, tag: str, requests: Mapping[str, Prepared]) -> str:
        """Submit a batch, and return the service's name of it.

        Args:
            tag: a name that no other batch has, for `find_batch`.
            requests: the requests, by their names in the batch.
        """

    @abstractmethod
    async def find_batch(
        self, tag: str, names: Collection[str], since: float, known: Collection[str]
    ) -> tuple[str | None, bool]:
        """Find a batch that may have been submitted by a process that was killed before it knew.

        Args:
            tag: as in `submit_batch`.
            names: the names of its requests.
            since: when it was submitted at the earliest, as `time.time` gives it.
            known: the service's names of other batches of the same folder.

        Returns:
            The service's name of it, or `None`; and whether that is certain. Otherwise ask again later.
        """

    @abstractmethod
    async def collect_batch(self, batch_id: str, names: Collection[str]) -> Results | ServiceError | None:
        """What has become of a batch.

        Args:
            batch_id: the service's name of it.
            names: the names of its requests, in order.

        Returns:
            `None` while it is processed. Afterwards the body of the answer or the error of each request, by its name;
            or the error of a batch that the service has not begun.
        """


class BatchStore(Protocol):
    """Keeps the records of batches, which are JSON objects."""

    def load(self) -> Mapping[int, dict[str, Any]]:
        """All records, by number."""

    def save(self, number: int, record: dict[str, Any]) -> None:
        """Keep a record in place of an earlier one of its number. It survives `kill -9` when this returns."""


@dataclass(eq=False)
class _Request:
    """A request that waits for its answer."""

    name: str
    prefix: Prefix
    num_samples: int
    request: SamplingRequest
    keep: Callable[..., None]
    worst: tuple[int, float]
    sent_with: Capabilities
    answer: "asyncio.Future[Response]"
    prepared: Prepared | None = None


@dataclass(eq=False)
class _Batch:
    """A batch that is submitted, or being submitted, and not collected yet."""

    number: int
    tag: str
    names: list[str]
    since: float
    reservation: Reservation
    id: str | None = None
    requests: list[_Request] = field(default_factory=list)


class Batches:
    """Sends the requests of a teacher in batches.

    Args:
        teacher: the teacher. From now on it is charged the price of batches.
        store: keeps the records of batches.
        report: called with a line for people when a batch is submitted, found again or has ended.
    """

    def __init__(self, teacher: BatchTeacher, store: BatchStore, report: Callable[[str], None] = lambda line: None):
        self._teacher, self._budget, self._limits = teacher, teacher.budget, teacher.batch_limits
        self._store, self._report = store, report
        teacher.answer_in_batch, teacher.max_body = self.answer, MAX_BATCH_BODY
        self._price = self._budget.price
        if self._price is not None:
            self._budget.price = batch_price(teacher.name.partition(":")[0], self._price)
        records = store.load()
        self._open: dict[int, _Batch] = {}
        for number, record in open_batches(records).items():
            # Otherwise the samples of a prompt would be divided over other requests than those that were sent.
            teacher.capabilities = replace(teacher.capabilities, samples_per_request=record["samples"])
            values = {name: record[name] for name in ("tag", "names", "since", "id")}
            self._open[number] = _Batch(number, reservation=self._budget.open_batch(), **values)
        self._known = {record["id"] for record in records.values()} - {None}
        self._numbers = count(max(records, default=-1) + 1)
        self._batch_of = {name: batch for batch in self._open.values() for name in batch.names}
        self._waiting: dict[str, _Request] = {}
        self._queue: deque[_Request] = deque()
        # Requests of a batch, and batches in process.
        self._most, self._at_once = self._limits.requests, sys.maxsize
        self._failures = Counter[str]()
        self._came_at = time.monotonic()
        self._came = asyncio.Event()

    @property
    def in_process(self) -> list[str]:
        """The batches that are not collected yet, by the service's names where they are known."""
        return [batch.id or batch.tag for batch in self._open.values()]

    async def answer(
        self, prefix: Prefix, num_samples: int, request: SamplingRequest, keep: Callable[..., None]
    ) -> Response:
        """The answer to one request, which is kept and counted, hours later.

        Args:
            prefix: the prefix.
            num_samples: samples of the request.
            request: how to sample.
            keep: keeps the answer, as for `RemoteTeacher.answered`.

        Raises:
            RequestFailedError: when it got none and may be asked again, or only it is affected.
            TeacherError: when the teacher cannot answer.
        """
        name = self._name(prefix, num_samples, request)
        worst = self._budget.worst_case(self._teacher.max_prompt_tokens(prefix), num_samples * request.max_tokens)
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        waiting = _Request(name, prefix, num_samples, request, keep, worst, self._teacher.capabilities, future)
        self._waiting[name] = waiting
        if (batch := self._batch_of.get(name)) is not None:  # of an earlier process
            batch.requests.append(waiting)
            self._budget.add_to_batch(batch.reservation, *worst, was_sent=True)
        else:
            self._queue.append(waiting)
        self._came_at = time.monotonic()
        self._came.set()
        try:
            return await future
        finally:
            del self._waiting[name]

    def _name(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> str:
        """The name of a request: the same in each process. Equal requests that wait together are numbered."""
        key = json.dumps([prefix.prompt, prefix.completion, num_samples, request.seed])
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return next(name for n in count() if (name := f"{digest}-{n}") not in self._waiting)

    async def run(self) -> None:
        """Submit and collect batches until it is cancelled.

        Raises:
            TeacherError: when the service cannot be used.
            BudgetError: when the next request might exceed the budget and nothing is in flight.
        """
        began = said = time.monotonic()
        while True:
            while not self._queue and not self._open:
                self._came.clear()
                await self._came.wait()
            while (left := self._came_at + GATHER_SECONDS - time.monotonic()) > 0:
                await asyncio.sleep(left)
            await self._submit()
            for batch in list(self._open.values()):
                await self._look(batch)
            if self._queue or self._open:
                if (now := time.monotonic()) - said > SAID_EVERY:
                    said = now
                    self._report(
                        f"{len(self._open)} batches are in process, after {(now - began) / 3600:.1f} h. They are "
                        f"looked at every {POLL_SECONDS:g} s."
                    )
                await asyncio.sleep(POLL_SECONDS)

    def finish(self) -> None:
        """Close what an earlier process has collected and could not close. Called when all requests have ended."""
        for batch in list(self._open.values()):
            self._close(batch)

    def close(self) -> None:
        """Give the teacher back as it was: it sends single requests at its standard price."""
        self._teacher.answer_in_batch, self._teacher.max_body, self._budget.price = None, MAX_BODY, self._price

    # ---- Submit ----

    async def _submit(self) -> None:
        """Submit what waits and fits into the budget."""
        while self._queue and len(self._open) < self._at_once and (batch := self._fill()) is not None:
            prepared = {request.name: request.prepared for request in batch.requests if request.prepared is not None}
            self._save(batch)
            try:
                batch.id = await self._teacher.submit_batch(batch.tag, prepared)
            except Exception as error:
                failure = self._teacher.failure(error)
                kind = None if failure is None else failure.kind
                if kind not in (None, "transient") or isinstance(error, OmniOPDError):
                    self._put_back(batch)  # otherwise it may have been submitted: `_look` finds out
                self._tolerate("submit", error, failure, "no batch can be submitted")
                # With nothing in process, a limit on the rate is one of this minute.
                if failure is not None and (kind == "rejected" or (kind == "rate_limited" and self._open)):
                    self._ask_for_less(batch, failure)
                return
            self._failures.pop("submit", None)
            self._submitted(batch)

    def _fill(self) -> _Batch | None:
        """The next batch, with its worst case reserved; `None` when it waits for the budget."""
        reservation = self._budget.open_batch()
        chosen: list[_Request] = []
        size, tokens = 0, 0
        try:
            while self._queue and len(chosen) < self._most:
                request = self._queue[0]
                request.sent_with = self._teacher.capabilities
                request.prepared = self._prepare(request)
                size += len(json.dumps(request.prepared.body)) + _ENVELOPE
                tokens += request.num_samples * request.request.max_tokens
                too_large = size > _FILLED * self._limits.size or _BYTES_PER_TOKEN * tokens > MAX_BATCH_BODY
                if (chosen and too_large) or not self._budget.add_to_batch(reservation, *request.worst):
                    break
                chosen.append(self._queue.popleft())
        finally:
            if not chosen:
                self._budget.release(reservation)
        if not chosen:
            return None
        names = [request.name for request in chosen]
        tag = f"omniopd-{uuid.uuid4().hex}"
        batch = _Batch(next(self._numbers), tag, names, time.time(), reservation, requests=chosen)
        self._open[batch.number] = batch
        return batch

    def _prepare(self, request: _Request) -> Prepared:
        return self._teacher.prepare(request.prefix, request.num_samples, request.request)

    def _submitted(self, batch: _Batch) -> None:
        assert batch.id is not None
        self._known.add(batch.id)
        self._save(batch)
        self._report(
            f"Batch {batch.id}: {len(batch.names):,} requests are submitted. The service has a day, and charges for "
            "them also when this command is stopped: the same command then continues and collects them."
        )

    def _save(self, batch: _Batch) -> None:
        values = {name: getattr(batch, name) for name in ("id", "tag", "names", "since")}
        samples = self._teacher.capabilities.samples_per_request
        self._store.save(batch.number, {"open": True, "samples": samples, **values})

    def _put_back(self, batch: _Batch) -> None:
        """Queue the requests of a batch that the service has not taken."""
        self._queue.extendleft(reversed(batch.requests))
        self._close(batch)

    def _ask_for_less(self, batch: _Batch, failure: Failure) -> None:
        """Submit less at once after a service refused a batch, which was put back, as too much."""
        others = len(self._open)
        if failure.kind == "rate_limited" and others:
            self._at_once = others  # the account has as much in process as it may have
        elif len(batch.names) > 1:
            self._most = len(batch.names) // 2
        else:
            self._queue.remove(batch.requests[0])
            batch.requests[0].answer.set_exception(RequestFailedError(failure))

    # ---- Collect ----

    async def _look(self, batch: _Batch) -> None:
        """Collect a batch if it has ended."""
        try:
            if batch.id is None:
                await self._find(batch)
                return
            results = await self._teacher.collect_batch(batch.id, batch.names)
        except Exception as error:
            failure = self._teacher.failure(error)
            self._tolerate("look", error, failure, f"batch {batch.id or batch.tag} cannot be looked at")
            return
        self._failures.pop("look", None)
        if isinstance(results, ServiceError):
            failure = self._teacher.failure(results)
            if failure is not None and failure.kind == "rate_limited":  # nothing of it was begun
                self._report(f"Batch {batch.id} is refused: {failure.message}. Less is submitted at once.")
                self._put_back(batch)
                self._ask_for_less(batch, failure)
                return
            results = dict.fromkeys(batch.names, results)
        if results is not None:
            self._deliver(batch, results)

    async def _find(self, batch: _Batch) -> None:
        """Find a batch again, of which it is not known whether the service got it."""
        if time.time() < batch.since + POLL_SECONDS:
            return  # it may be in the list a moment later
        found, is_certain = await self._teacher.find_batch(batch.tag, batch.names, batch.since, self._known)
        if found is not None:
            batch.id = found
            self._submitted(batch)
        elif is_certain:
            self._put_back(batch)

    def _deliver(self, batch: _Batch, results: Results) -> None:
        """Keep and count the answers of a batch. Without an `await`, so nothing comes between them."""
        failures: list[Exception] = []
        for request in batch.requests:
            try:
                request.answer.set_result(self._read(batch, request, results.get(request.name)))
            except (RequestFailedError, TeacherError) as error:  # the second one stops the run, after the others
                failures.append(error)
                request.answer.set_exception(error)
        self._close(batch)
        answered, asked = len(batch.requests) - len(failures), len(batch.requests)
        line = f"Batch {batch.id} has ended with {answered:,} of {asked:,} answers"
        self._report(line + (f". The others failed, for example: {failures[0]}" if failures else "."))

    def _read(self, batch: _Batch, request: _Request, result: "str | ServiceError | None") -> Response:
        worst = batch.reservation.take(*request.worst)
        try:
            if isinstance(result, ServiceError):
                raise result
            if result is None:
                raise MalformedResponseError("the batch has no answer to this request")
            prepared = request.prepared or self._prepare(request)
            response = prepared.read(result)
        except Exception as error:
            raise self._teacher.failed(
                error, request.sent_with, request.request, worst, time.monotonic(), arrived=True
            ) from None
        return self._teacher.answered(response, request.request, worst, request.keep)

    def _close(self, batch: _Batch) -> None:
        del self._open[batch.number]
        for name in batch.names:
            self._batch_of.pop(name, None)
        self._budget.release(batch.reservation)
        self._store.save(batch.number, {"open": False, "id": batch.id})

    # ---- Errors ----

    def _tolerate(self, what: str, error: Exception, failure: Failure | None, problem: str) -> None:
        """Report an error that may pass.

        Args:
            what: `"submit"` or `"look"`.
            error: the exception.
            failure: its meaning.
            problem: what cannot be done, for the message.

        Raises:
            TeacherError: when it will not pass, or has come too often.
        """
        if failure is None:
            raise error
        self._failures[what] += 1
        passes = failure.kind in ("transient", "rate_limited") or (failure.kind == "rejected" and what == "submit")
        if not passes or failure.unexplained or self._failures[what] > MAX_FAILURES:
            raise TeacherError(
                f"{self._teacher.name}: {problem}: {failure.message.rstrip('.')}. The same command continues; batches "
                "are collected with a key of the account that submitted them."
            ) from None
        self._report(f"{self._teacher.name}: {problem} ({failure.message}). Next try in {POLL_SECONDS:g} s.")


def open_batches(records: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records of batches that are not collected yet, by number."""
    return {number: record for number, record in records.items() if record["open"]}


def read_lines(content: bytes, read: Callable[[dict[str, Any]], "str | ServiceError"]) -> Results:
    """Read a file of results, with a JSON object in each line, whose `custom_id` is the name of the request.

    The lines may be in any order.

    Args:
        content: the file.
        read: reads the result in a line. A line that it cannot read is returned as it is: it is no answer either.
    """
    results: Results = {}
    for line in content.splitlines():
        try:
            parsed = parse(line)
            results[str(parsed.get("custom_id"))] = line.decode(errors="replace")
            results[str(parsed.get("custom_id"))] = read(parsed)
        except MalformedResponseError:
            continue  # also an empty line. Its request has no answer, or one that cannot be read
    return results
