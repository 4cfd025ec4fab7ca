# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of all teachers behind a service.

An adapter sends one request and classifies its SDK's exceptions. The engine splits N samples over requests and handles
order, concurrency, rate limits, retries, time limits, the budget and the counts.
"""

import asyncio
import hashlib
import json
import os
import time
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from operator import itemgetter
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from transformers.utils import logging

from omniopd_trl.accounting.budget import Budget, Reservation
from omniopd_trl.accounting.usage import KeptAnswers, Usage
from omniopd_trl.errors import RESUME, NoRolloutError, OmniOPDError, TeacherError, WarnOnce
from omniopd_trl.teachers.base import (
    REQUEST_MILLISECONDS,
    Prefix,
    Prompt,
    Rollout,
    SamplingRequest,
    Teacher,
    TeacherReply,
)
from omniopd_trl.teachers.instruct.prompt import INSTRUCTION
from omniopd_trl.teachers.remote.answers import Asked, Response, from_kept, to_kept
from omniopd_trl.teachers.remote.delivery import Delivery, time_limit
from omniopd_trl.teachers.remote.failures import (
    LEARNED,
    MAX_QUOTED,
    Failure,
    MalformedResponseError,
    ServiceError,
    clean,
    failure_of,
    failure_of_malformed,
    failure_without_answer,
    malformed_in,
    redact,
    secrets_in,
)
from omniopd_trl.teachers.remote.fields import OTHER_LIMIT, check_extra, refusal, without
from omniopd_trl.teachers.remote.http import MAX_BODY, check_keys, check_proxies
from omniopd_trl.teachers.remote.retries import (
    BATCH_ATTEMPTS,
    PROBE_ATTEMPTS,
    PROBE_SECONDS,
    PROBE_TIMEOUT,
    SAID_EVERY,
    SAID_FROM_ATTEMPT,
    AttemptClock,
    RequestFailedError,
    failure_in,
    may_be_repeated,
    stop_after,
    wait_before,
)
from omniopd_trl.teachers.remote.settings import Capabilities, EngineSettings
from omniopd_trl.teachers.remote.tasks import gather_or_cancel, run_in_thread
from omniopd_trl.teachers.remote.throttle import Throttle

logger = logging.get_logger(__name__)

# A prefix that is longer by this many characters has more tokens, whatever they are.
GROWN_CHARACTERS = 256

# Keeps an answer, and counts its usage and its cost in US dollars; see `KeptAnswers`.
_Keep = Callable[[Response, Usage, float | None], None]


@dataclass
class _Tally:
    """Counts and problems of one prefix, and the failures of requests that were given up."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    # Prompt tokens of a request, by its number of samples: some services count the prompt once per sample.
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    given_up: list[Failure] = field(default_factory=list)


class RemoteTeacher(Teacher):
    """Base class of teachers behind a service.

    Args:
        name: provider and model, as in `anthropic:claude-haiku-4-5`.
        capabilities: capabilities of the model.
        settings: limits of this process.
        budget: budget of the teacher; `None` for no limit.
        extra_body: fields that are added to the body of each request. `None` as a value leaves a field out.
        extra_headers: headers that are added to each request.

    Raises:
        ConfigError: when a key, a proxy, or an extra field or header cannot be sent.

    A subclass implements `request`, and `connect` when it uses a client. It extends `unsupported` when its service has
    other words for what it does not take, and `classify` when its SDK has more exceptions. A service that takes
    batches has a subclass of [`~omniopd_trl.teachers.remote.batch.BatchTeacher`].

    Attributes:
        model: the service's name of the model.
        base_url: address of the service; `None` for the default of its SDK.
        key_variables: environment variables that may hold the key. The first one that is set is used.
        served_model: name of the model that answered last, as the service reports it; `None` when it reports none.
    """

    is_remote = True
    model: str = ""
    base_url: str | None = None
    key_variables: tuple[str, ...] = ()

    # Tokens that a template may add to a prompt.
    prompt_overhead = 512

    # How to disable the reasoning of a model that reasons, for a warning.
    reasoning_switch = "name a teacher that does not reason, or whose reasoning can be disabled"

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        settings: EngineSettings | None = None,
        budget: Budget | None = None,
        extra_body: Mapping[str, Any] | None = None,
        extra_headers: Mapping[str, str] | None = None,
    ):
        check_keys(self.key_variables)
        check_proxies()
        check_extra(extra_body, extra_headers)
        self.name = name
        self.extra_body = dict(extra_body or {})
        self.extra_headers = dict(extra_headers or {})
        self.capabilities = capabilities
        self.settings = settings or EngineSettings()
        self.budget: Budget = budget or Budget()
        self._throttle = Throttle(
            self.settings.max_concurrency, self.settings.requests_per_minute, self.settings.tokens_per_minute
        )
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warn_once = WarnOnce(__name__)
        self._said_repeated_at = float("-inf")
        self.served_model: str | None = None
        self._has_answered = False
        self._probes = False
        # Set while requests are sent in batches.
        self.answer_in_batch: Callable[[Prefix, int, SamplingRequest, _Keep], Awaitable[Response]] | None = None
        self.max_body = MAX_BODY

    @abstractmethod
    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        """Send one request for `num_samples` continuations of `prefix`, without retries.

        Each call reads `self.capabilities`, because they may have changed. The SDK's own retries are disabled.
        The answer is read with the functions of `answers`. Refused, filtered and empty samples are returned with their
        outcome. Any other error raises the SDK's exception.
        """

    def unsupported(self, said: ServiceError) -> Failure | None:
        """The capability or field that a request used and the service refused; `None` for any other reason."""
        return refusal(said)

    def classify(self, error: Exception) -> Failure | None:
        """Classify an exception that `request` raised; `None` for a bug, which is raised unchanged."""
        said = ServiceError.of(error)
        if said is None:
            return failure_without_answer(error, address=self.base_url, limit=self._limit_of_attempt())
        return self._meaning(said)

    def _meaning(self, said: ServiceError) -> Failure:
        """What it means that a service reports an error."""
        failure = failure_of(
            said,
            model=self.model,
            key=" or ".join(self.key_variables) or "the environment",
            address=self.base_url,
            has_answered=self._has_answered,
            secrets=self._secrets(),
        )
        missing = self.unsupported(said)
        return failure if missing is None else replace(missing, otherwise=failure)

    def is_instructed(self, prefix: Prefix) -> bool:
        """Whether the model is instructed to continue this prefix. A question holds its own instruction."""
        return self.capabilities.continuation == "instruct" and not prefix.is_question

    def max_prompt_tokens(self, prefix: Prefix) -> int:
        """An upper bound on the prompt's tokens, for limits and budget. A token holds at least one byte of text."""
        size = len(str(prefix.prompt).encode()) + len(prefix.completion.encode()) + self.prompt_overhead
        if self.is_instructed(prefix):
            # The instruction, the sentence on where the text stops, and tags around every turn. Rendering them for
            # each request would cost more than the rest of the engine.
            size += len(INSTRUCTION.encode()) + 1024 + 64 * len(prefix.prompt) * (not isinstance(prefix.prompt, str))
        return size

    # ---- Client and key ----

    def connect(self) -> Any:
        """Create the SDK's client, with its own retries disabled. Called in the event loop that uses the client.

        Raises:
            TeacherError: when the key is missing.
            MissingExtraError: when the SDK is not installed.
        """
        raise NotImplementedError

    async def disconnect(self, client: Any) -> None:
        """Close the client that `connect` returned."""
        await client.close()

    @property
    def client(self) -> Any:
        """The SDK's client. It belongs to one event loop; another loop gets a new one."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            try:
                self._client, self._loop = self.connect(), loop
            except OmniOPDError:
                raise
            except Exception as error:  # SDKs raise several types, for example when a region is not set
                said = redact(" ".join(str(error).split()), self._secrets())
                raise TeacherError(
                    f"{self.name}: its client cannot be created ({type(error).__name__}: {said}). Set what is missing "
                    "in the environment; docs/teachers.md lists the variables of each provider."
                ) from None
        return self._client

    def accepted(self, *parts: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `parts` that neither the service refused nor `extra_body` leaves out."""
        nulls = {name for name, value in self.extra_body.items() if value is None}
        left_out = (nulls | self.capabilities.refused) - OTHER_LIMIT.keys()  # no request is without a limit
        return {name: value for part in parts for name, value in part.items() if name not in left_out}

    def body(self, *parts: Mapping[str, Any]) -> dict[str, Any]:
        """The fields to send: the accepted ones of `parts`, and those of `extra_body`, which replace them."""
        return self.accepted(*parts) | {name: value for name, value in self.extra_body.items() if value is not None}

    async def aclose(self) -> None:
        """Release connections. The next request opens new ones."""
        if self._client is None or self._loop is not asyncio.get_running_loop():
            return  # the client belongs to another loop, which may still use it
        client, self._client = self._client, None
        await self.disconnect(client)

    def key(self, placeholder: str | None = None) -> str:
        """The key, from the environment. It is passed to the SDK and stored nowhere else.

        Args:
            placeholder: value to use when no key is set; `None` when a key is required.

        Raises:
            TeacherError: when a key is required and no variable holds one.
        """
        return self.variable("key", *self.key_variables, default=placeholder)

    def variable(self, what: str, *names: str, default: str | None = None) -> str:
        """The first of some environment variables that is set, without white space around its value.

        Args:
            what: what the variables hold, for the message.
            names: names of the variables.
            default: value to use when none is set; `None` when one is required.

        Raises:
            TeacherError: when one is required and none is set.
        """
        value = next((value for name in names if (value := os.environ.get(name, "").strip())), default)
        if value is None:
            raise TeacherError(
                f"{self.name} needs a {what}, and the environment holds none under {' or '.join(names)}. Run `export "
                f"{names[0]}=...` in the shell that starts the run."
            )
        return value

    def warn_once(self, message: str, kind: str | None = None) -> None:
        """Log a warning the first time that it is given, or that one of its kind is."""
        self._warn_once(f"{self.name}: {message}", kind)

    # ---- Many prefixes ----

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        if not self.capabilities.takes_temperature and (request.temperature, request.top_p) != (1.0, 1.0):
            self.warn_once(
                f"this model takes no temperature and no top_p, so teacher_temperature={request.temperature:g} and "
                f"teacher_top_p={request.top_p:g} are not sent."
            )
        # Tasks start in order and get their slots in order. A prefix is sent before the longer one that begins with
        # it, so a prompt cache can serve the longer one.
        kept = [self._kept(prefix, request) for prefix in prefixes]
        tallies = [_Tally() for _ in prefixes]
        replies = await gather_or_cancel(
            self._continue(prefix, found, request, tally)
            for prefix, found, tally in zip(prefixes, kept, tallies, strict=True)
        )
        self._compare_prompts(prefixes, tallies)
        return replies

    def probe(self, prompt: Prompt) -> None:
        """Check key, model, continuation and samples per request with one tiny request, before any generation.

        Raises:
            TeacherError: when the service cannot be used.
            NoRolloutError: when it was reached, and returned no rollout for this prompt.
        """
        wanted = min(self.settings.probe_samples, self.capabilities.samples_per_request)
        request = SamplingRequest(num_samples=wanted, max_tokens=16, ledger=self.budget.ledger)
        tally = _Tally()
        # In a separate event loop. Client and throttle must not outlive it.
        continues = self.settings.probe_continues
        prefix = Prefix(prompt, "Let us think." if continues else "", is_question=not continues)
        reply = run_in_thread(self._probe(prefix, request, tally))
        if not reply.rollouts:
            asked = f"The teacher {self.name} was asked one short question"
            failed = [failure for failure in tally.given_up if failure.kind != "rejected"]
            if failed:
                message, advice = failed[0].message.rstrip("."), "Nothing has been generated yet."
                if "teacher_base_url" not in message:
                    advice = f"Check that the service runs and that teacher_base_url is right. {advice}"
                times = "once" if tally.counts["requests"] == 1 else f"{tally.counts['requests']} times"
                raise TeacherError(f"{asked} {times} and did not answer: {message}. {advice}")
            raise NoRolloutError(
                f"{asked} and returned nothing: {str(reply.failure).rstrip('.')}. Try another model or other prompts. "
                "Nothing has been generated yet."
            )
        logger.info(
            f"Teacher {self.name}: continuation {self.capabilities.continuation}, up to "
            f"{self.capabilities.samples_per_request} samples per request; the probe used {reply.usage}."
        )

    async def _probe(self, prefix: Prefix, request: SamplingRequest, tally: _Tally) -> TeacherReply:
        throttle, self._throttle = self._throttle, Throttle(1)
        self._probes = True
        settings, most = self.settings, self.settings.max_attempts or PROBE_ATTEMPTS
        self.settings = replace(
            settings,
            max_attempts=min(most, PROBE_ATTEMPTS),
            timeout=min(settings.timeout, PROBE_TIMEOUT),
            max_seconds=min(settings.max_seconds, PROBE_SECONDS),
        )
        try:
            return await self._continue(prefix, self._kept(prefix, request), request, tally)
        finally:
            self._throttle, self.settings, self._probes = throttle, settings, False
            await self.aclose()

    # ---- One prefix ----

    async def _continue(
        self, prefix: Prefix, kept: KeptAnswers, request: SamplingRequest, tally: _Tally
    ) -> TeacherReply:
        # By first sample. Answers of an earlier run cost nothing and are not counted again.
        answers: dict[int, tuple[int, list[Response]]] = {}
        for start, size, answer in kept.found:
            if (response := from_kept(answer)) is not None:
                answers[start] = size, [response]
            else:
                self.warn_once("an answer of an earlier run cannot be read and is requested again.", "kept")

        async def ask(start: int, num_samples: int) -> list[Response]:
            try:
                keep = partial(_keep, kept, start, num_samples)
                response = await self._ask(prefix, num_samples, _part(request, prefix, start), tally, keep)
            except RequestFailedError:  # several samples are refused: each request asks for one from now on
                return await ask_all(self._split(start, num_samples))
            if response is None:
                return []
            returned = len(response.samples)
            if not 0 < returned < num_samples:
                return [response._replace(samples=response.samples[:num_samples])]
            # Some servers silently return fewer samples than requested. The others are requested.
            self._returns_fewer(num_samples, returned)
            sizes = self._split(start + returned, num_samples - returned)
            return [response, *await ask_all(sizes)]

        async def ask_all(sizes: list[tuple[int, int]]) -> list[Response]:
            answers = await gather_or_cancel(ask(start, size) for start, size in sizes)
            return [response for answer in answers for response in answer]

        sizes, end = [], 0
        for start, size in [*sorted((start, size) for start, (size, _) in answers.items()), (request.num_samples, 0)]:
            sizes += self._split(end, start - end)
            end = start + size
        if len(sizes) > 1 and self._fills_cache(prefix):
            start, size = sizes.pop(0)  # the cache can be read once the first answer has begun
            answers[start] = size, await ask(start, size)
        asked = await gather_or_cancel(ask(start, size) for start, size in sizes)
        answers |= {start: (size, parts) for (start, size), parts in zip(sizes, asked, strict=True)}
        responses = [response for _, (_, parts) in sorted(answers.items(), key=itemgetter(0)) for response in parts]
        return self._reply(responses, request.num_samples, tally)

    def _reply(self, responses: Sequence[Response], num_samples: int, tally: _Tally) -> TeacherReply:
        """The reply to a prefix, from the answers to its requests. Counts what has become of the samples."""
        if not all(response.samples for response in responses):
            tally.problems.append("a response without samples")
        samples = [sample for response in responses for sample in response.samples]
        for sample in samples:
            if sample.reasoned:
                tally.counts["reasoned"] += 1
            if sample.outcome != "ok":
                tally.counts[sample.outcome] += 1
                if sample.outcome != "restarted":
                    words = clean(sample.text, self._secrets(), MAX_QUOTED)
                    if sample.outcome == "empty" and sample.reasoned:
                        words = "reasoning only"
                    tally.problems.append(f"a sample was {sample.outcome}{f' ({words})' if words else ''}")
        rollouts = tuple(Rollout(s.text, s.finish_reason) for s in samples if s.outcome in ("ok", "restarted"))
        usage = sum((response.usage for response in responses if response.usage is not None), Usage())
        failure = None
        if len(rollouts) < num_samples:
            reason = tally.problems[0] if tally.problems else "no reason"
            failure = f"{len(rollouts)} of {num_samples} rollouts: {reason}"
        if tally.counts["reasoned"]:
            self.warn_once(
                f"the model reasons before it answers, in {tally.counts['reasoned']} of {len(samples)} samples of a "
                "prefix. The reasoning is removed, and a sample of reasoning only is not a rollout: "
                f"{self.reasoning_switch}.",
                "reasoned",
            )
        models = tuple(sorted({response.model for response in responses if response.model is not None}))
        return TeacherReply(rollouts, usage, failure, dict(tally.counts), models)

    def _asked(self, prefix: Prefix, num_samples: int, request: SamplingRequest, unsent: str = "") -> Asked:
        """What the answer to a request is read with; `unsent` as in `Asked`."""
        instructed = self.is_instructed(prefix)
        return Asked(prefix, num_samples, request.max_tokens, instructed, "" if instructed else unsent)

    def _compare_prompts(self, prefixes: Sequence[Prefix], tallies: Sequence[_Tally]) -> None:
        """Warn once when a much longer prefix of the same text has no more prompt tokens."""
        for (short, few), (long, many) in combinations(zip(prefixes, tallies, strict=True), 2):
            grown = len(long.completion.rstrip()) - len(short.completion.rstrip())
            if grown < GROWN_CHARACTERS or not long.completion.startswith(short.completion.rstrip()):
                continue
            for num_samples in few.prompt_tokens.keys() & many.prompt_tokens.keys():
                before, after = few.prompt_tokens[num_samples], many.prompt_tokens[num_samples]
                if after <= before and short.prompt == long.prompt:
                    self.warn_once(
                        f"the service counts {after} prompt tokens for a prefix of {len(long.completion)} characters "
                        f"and {before} for its first {len(short.completion)}: it cuts long prompts silently, so the "
                        "teacher does not read the student's text. Raise the server's context length (`num_ctx`, "
                        "`--max-model-len`), or choose a `raw` continuation if its template drops text.",
                        "cut prompts",
                    )
                    return

    def _kept(self, prefix: Prefix, request: SamplingRequest) -> KeptAnswers:
        """Answers of earlier runs to the same request. Capabilities are not compared: they may change during a run."""
        how = (request.num_samples, request.max_tokens, request.temperature, request.top_p, request.seed)
        extra = [self.extra_body, self.extra_headers] if self.extra_body or self.extra_headers else []
        kind = ["question"] if prefix.is_question else []
        key = json.dumps([self.name, prefix.prompt, prefix.completion, *how, *extra, *kind], default=str)
        return request.ledger.answers(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32])

    def _split(self, start: int, num_samples: int) -> list[tuple[int, int]]:
        """Split samples `start` to `start + num_samples` into requests: first sample and size of each."""
        most, end = self.capabilities.samples_per_request, start + num_samples
        return [(begin, min(most, end - begin)) for begin in range(start, end, most)]

    def _fills_cache(self, prefix: Prefix) -> bool:
        if self.answer_in_batch is not None:
            return False  # the requests of a batch are answered in any order, up to a day apart
        least = self.capabilities.min_cached_prefix
        # The bound is in bytes, and a token of prose has about four.
        return least is not None and self.max_prompt_tokens(prefix) / 4 >= least

    def _returns_fewer(self, asked: int, returned: int) -> None:
        if self.capabilities.samples_per_request > 1:
            self.capabilities = replace(self.capabilities, samples_per_request=max(1, returned))
            logger.warning(
                f"{self.name} was asked for {asked} samples in a request and returned {returned}. From now on a "
                f"request asks for {max(1, returned)}; prompts are paid for more often."
            )

    # ---- One request ----

    async def _ask(
        self, prefix: Prefix, num_samples: int, request: SamplingRequest, tally: _Tally, keep: _Keep
    ) -> Response | None:
        """One request with its retries; `None` when it was given up.

        Raises:
            TeacherError: on a final failure.
            BudgetError: when the request might exceed the budget.
            RequestFailedError: when the service refuses several samples per request.
        """
        clock = AttemptClock(self.settings.max_seconds, self.settings.timeout)
        most = self.settings.max_attempts or (None if self.answer_in_batch is None else BATCH_ATTEMPTS)
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(may_be_repeated),
                stop=stop_after(most) | clock,
                wait=lambda state: wait_before(state, clock.left(state)),
                before_sleep=self._log_repeated,
                reraise=True,
            ):
                with attempt:
                    again = attempt.retry_state.attempt_number > 1
                    # In each attempt: another request may have changed the capabilities.
                    headroom = self.capabilities.reasoning_headroom
                    part = replace(request, max_tokens=request.max_tokens + headroom) if headroom else request
                    if self.answer_in_batch is not None:
                        tally.counts["requests"] += 1
                        tally.counts["retries"] += again
                        return await self.answer_in_batch(prefix, num_samples, part, keep)
                    prompt_tokens, completion_tokens = self.max_prompt_tokens(prefix), num_samples * part.max_tokens
                    async with (
                        self._throttle.slot(prompt_tokens // 4 + completion_tokens, again) as began,
                        self.budget.reserve(prompt_tokens, completion_tokens, request.ledger) as reservation,
                    ):
                        tally.counts["requests"] += 1
                        tally.counts["retries"] += again
                        with clock:
                            left = clock.left(attempt.retry_state)
                            response = await self._attempt(prefix, num_samples, part, reservation, began, left, keep)
                        if response.usage is not None:
                            tally.prompt_tokens[num_samples] = response.usage.prompt_tokens
                        return response
        except RequestFailedError as error:
            if error.failure.kind == "one_sample":
                raise
            if error.failure.kind == "denied":
                raise TeacherError(f"{self.name}: {error.failure.message}") from None
            tally.given_up.append(error.failure)
            tally.counts["failed_requests"] += 1
            tally.problems.append(f"a request was given up ({error})")
        finally:
            tally.counts[REQUEST_MILLISECONDS] += round(1000 * clock.busy)
        return None

    def _log_repeated(self, state: RetryCallState) -> None:
        """Log why requests are repeated, at most once every `SAID_EVERY` seconds."""
        now, failure = time.monotonic(), failure_in(state)
        if failure is None:
            return
        if self._probes:
            if failure.kind not in LEARNED:
                logger.warning(
                    f"{self.name}: the first question has no answer ({failure.message}). It is asked again."
                )
            return
        if state.attempt_number < SAID_FROM_ATTEMPT or now - self._said_repeated_at < SAID_EVERY:
            return
        self._said_repeated_at = now
        logger.warning(
            f"{self.name}: requests fail and are repeated, each for up to teacher_max_seconds="
            f"{self.settings.max_seconds:g}. The last one failed {state.attempt_number} times: {failure.message}"
        )

    async def _attempt(
        self,
        prefix: Prefix,
        num_samples: int,
        request: SamplingRequest,
        reservation: Reservation,
        began: float,
        seconds: float,
        keep: _Keep,
    ) -> Response:
        capabilities, delivery = self.capabilities, Delivery()
        try:
            _ = self.client  # before the limit begins: importing an SDK takes seconds on a busy machine
            async with time_limit(min(self.settings.timeout, seconds)):
                response = await self.request(prefix, num_samples, request)
        except Exception as error:
            arrived = delivery.may_have_arrived(error)
            verdict = self.failed(error, capabilities, request, reservation, began, arrived=arrived)
            if verdict is error:
                raise
            # The SDK's exception is not chained: its text may hold a part of the key, and its request the whole.
            raise verdict from None
        return self.answered(response, request, reservation, keep)

    def failed(
        self,
        error: Exception,
        sent_with: Capabilities,
        request: SamplingRequest,
        reservation: Reservation,
        began: float,
        *,
        arrived: bool,
    ) -> Exception:
        """What a request that got no answer means: the exception to raise. Counts what it may cost.

        Args:
            error: the exception of `request`.
            sent_with: capabilities when the request was sent.
            request: how to sample.
            reservation: the worst case of the request.
            began: when the request began, as `time.monotonic` gives it.
            arrived: whether the service may have received all of the request.
        """
        failure = self.failure(error)
        # A bug may come before the request was sent, or from reading an answer that is charged.
        may_be_billed = not isinstance(error, OmniOPDError) if failure is None else failure.may_be_billed
        if may_be_billed and arrived:
            self._forfeit(reservation, request.ledger.paid)
        return error if failure is None else self._verdict(failure, sent_with, request, began)

    def answered(
        self, response: Response, request: SamplingRequest, reservation: Reservation, keep: _Keep
    ) -> Response:
        """Keep the answer to a request and count what it cost.

        Raises:
            RequestFailedError: when the service broke the answer off.
        """
        # A sample that the service broke off is not kept, since it may be complete the next time.
        broken = next((sample for sample in response.samples if sample.outcome == "interrupted"), None)
        paid = partial(keep, response) if broken is None else request.ledger.paid
        if response.usage is None or not _is_counted(response):
            # An answer that counted as free would never use up a budget.
            self.warn_once(
                "the service does not report the usage of an answer, so the worst case of each request counts against "
                "the budget, and the tokens in the log exclude such answers. Configure the server to report `usage`; "
                "otherwise the budget ends early."
            )
            self._forfeit(reservation, paid)
            response = response._replace(usage=None)
        else:
            usd = None if self.budget.price is None else self.budget.price.cost(response.usage)
            paid(response.usage, usd)
            reservation.settle(response.usage)
        if broken is not None:
            message = f"the service broke off its answer, with the finish reason {broken.finish_reason!r}"
            raise RequestFailedError(Failure("transient", message, may_be_billed=True))
        self._note_model(response.model)
        self._throttle.succeeded()
        self._has_answered = True
        return response

    def _note_model(self, model: str | None) -> None:
        """Log which model answers, and warn when it changes."""
        if model is None or model == self.served_model:
            return
        if self.served_model is None:
            logger.info(f"{self.name}: the service answers with the model {model!r}.")
        else:
            self.warn_once(
                f"the model that answers has changed from {self.served_model!r} to {model!r}, so rollouts of one run "
                "come from several models. Name a fixed version of the model, or fix the route at a router.",
                "served model",
            )
        self.served_model = model

    def _forfeit(self, reservation: Reservation, paid: Callable[[Usage, float | None], None]) -> None:
        """Count the worst case of a request as spent, because its cost is unknown."""
        paid(Usage(reservation.tokens), None if self.budget.price is None else reservation.usd)
        reservation.forfeit()

    def _verdict(self, failure: Failure, sent_with: Capabilities, request: SamplingRequest, began: float) -> Exception:
        """The exception to raise for a failure. Adapts capabilities and throttle for later requests."""
        learned = LEARNED.get(failure.kind)
        if learned is not None:
            if failure.fields:
                learned = {"refused": self.capabilities.refused.union(failure.fields)}
            # Without a value that the user chose, the rollouts would not be those of the configuration.
            options = {"temperature": request.temperature, "top_p": request.top_p}
            chosen = failure.out_of_range and any(options.get(name, 1.0) != 1.0 for name in failure.fields)
            if replace(sent_with, **learned) != sent_with and not chosen:
                # Requests in flight together are all refused. The first refusal adapts the capabilities for all.
                if replace(self.capabilities, **learned) != self.capabilities:
                    self._learn(failure, learned)
                return RequestFailedError(failure)
            failure = failure.otherwise or replace(failure, kind="final")
        if failure.kind == "final":
            return TeacherError(f"{self.name}: {failure.message}")
        if (failure.retry_after or 0) > self.settings.max_retry_after:
            return TeacherError(
                f"{self.name} asks to wait {failure.retry_after:.0f} s, more than "
                f"teacher_max_retry_after={self.settings.max_retry_after:g}: {failure.message}. Raise that limit, or "
                f"later {RESUME}."
            )
        if failure.kind == "rate_limited":
            self._throttle.slow_down(failure.retry_after or 0.0, began)
        if failure.unexplained:
            self._warn_once(
                f"{self.name}: {failure.message}. The rollouts of such requests are dropped, and "
                "teacher/failed_requests counts them; max_failed_chunks limits them.",
                "unexplained",
            )
        return RequestFailedError(failure)

    def failure(self, error: Exception) -> Failure | None:
        """What an exception means, without secrets; `None` for a bug and for an error of this package."""
        if isinstance(error, OmniOPDError):
            return None
        failure: Failure | None
        if isinstance(error, TimeoutError):
            failure = Failure("transient", f"no answer within {self._limit_of_attempt()}", may_be_billed=True)
        elif isinstance(error := malformed_in(error), MalformedResponseError | json.JSONDecodeError):
            said = ServiceError.inside(getattr(error, "answer", None))
            failure = failure_of_malformed(error, self._secrets()) if said is None else self._meaning(said)
        else:
            failure = self.classify(error)
        if failure is None:
            return None
        hidden = partial(clean, secrets=self._secrets())
        if failure.otherwise is not None:
            failure = replace(failure, otherwise=replace(failure.otherwise, message=hidden(failure.otherwise.message)))
        return replace(failure, message=hidden(failure.message))

    def _limit_of_attempt(self) -> str:
        """Value and name of the limit of an attempt, for messages."""
        seconds = self.settings.timeout
        return f"{seconds:g} s, the probe's own limit" if self._probes else f"teacher_timeout={seconds:g} s"

    def _secrets(self) -> list[str]:
        keys = [value for name in self.key_variables if (value := os.environ.get(name, "").strip())]
        return keys + secrets_in(self.base_url or "")

    def _learn(self, failure: Failure, learned: dict[str, Any]) -> None:
        self.capabilities = replace(self.capabilities, **learned)
        if failure.fields:
            logger.warning(
                f"{self.name} refused a request ({failure.message}). From now on {without(failure.fields)}. To send "
                "another value, set it in teacher_extra_body; a value of null leaves a field out from the start."
            )
            return
        what = {
            "no_prefill": "it does not continue a prefill, and is instructed to write what comes next; set "
            'teacher_continuation="instruct" to skip this attempt',
            "one_sample": "it returns one sample per request, and prompts are paid for more often",
            "always_reasons": "its reasoning cannot be disabled, and is paid for",
        }[failure.kind]
        logger.warning(f"{self.name} refused a request ({failure.message}). From now on: {what}.")


def _is_counted(response: Response) -> bool:
    """Whether the service reported the usage of an answer. Some services that do not count report zeros."""
    usage = response.usage
    if usage is None or not usage.prompt_tokens:
        return False
    return usage.completion_tokens > 0 or not any(sample.text for sample in response.samples)


def _keep(
    kept: KeptAnswers, start: int, num_samples: int, response: Response, usage: Usage, usd: float | None
) -> None:
    """Keep the answer to a request for `num_samples` samples from `start` on. An empty one counts for all."""
    size = min(len(response.samples), num_samples) or num_samples
    kept.keep(start, size, to_kept(response, num_samples), usage, usd)


def _part(request: SamplingRequest, prefix: Prefix, start: int) -> SamplingRequest:
    """The request for the samples from `start` on. Its seed differs: equal seeds would return equal samples."""
    if request.seed is None:
        return request
    seed = (request.seed + zlib.crc32(prefix.completion.encode()) + start) % 2**31
    return replace(request, seed=seed)
