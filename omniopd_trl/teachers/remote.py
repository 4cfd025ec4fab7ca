# Copyright 2026 The omniopd_trl Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The one engine that every teacher behind a service goes through.

An adapter knows how to make one request and what its SDK's exceptions mean. Splitting N samples over requests, order,
concurrency, rate limits, retries, time limits, the budget and the counts are here, once.
"""

import asyncio
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, stop_after_delay
from transformers.utils import logging

from omniopd_trl.errors import TeacherError
from omniopd_trl.teachers.base import Prefix, Prompt, Rollout, SamplingRequest, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.budget import Budget
from omniopd_trl.teachers.throttle import Throttle

logger = logging.get_logger(__name__)

T = TypeVar("T")

Continuation = Literal["raw", "continue_final", "prefill", "prefix_flag", "instruct"]


@dataclass(frozen=True)
class Capabilities:
    """What a model behind a service can do. Data, by model name; see `capabilities.py`.

    Attributes:
        continuation: how the student's text becomes the beginning of the teacher's answer.
        samples_per_request: samples that one request may ask for.
        takes_temperature: whether the service accepts and honours a temperature and `top_p`.
        reasoning_off: payload that switches hidden reasoning off, merged into the request's body.
        min_cached_prefix: shortest prompt that the service caches, in tokens; `None` when it caches none.
        shutdown: when the provider switches the model off, where that is known.
    """

    continuation: Continuation
    samples_per_request: int = 1
    takes_temperature: bool = True
    reasoning_off: dict[str, Any] = field(default_factory=dict)
    min_cached_prefix: int | None = None
    shutdown: date | None = None


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one process; see `OmniOPDConfig` for the meaning of each field.

    Attributes:
        max_concurrency: requests under way at once.
        requests_per_minute: `None` for no limit.
        tokens_per_minute: `None` for no limit.
        timeout: seconds that one attempt may take.
        max_attempts: attempts per request, the first one included.
        max_seconds: seconds that all attempts of a request may take together.
        max_retry_after: the longest wait, in seconds, that a service may ask for.
    """

    max_concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    max_attempts: int = 6
    max_seconds: float = 600.0
    max_retry_after: float = 120.0


SampleOutcome = Literal["ok", "refused", "filtered", "empty", "restarted"]


@dataclass(frozen=True)
class Sample:
    """One sample of one request, as the adapter reads it from the response.

    Attributes:
        text: what the model wrote next, repaired where the continuation is instructed.
        finish_reason: `"stop"` or `"length"`.
        outcome: `"ok"` and `"restarted"` are rollouts, the others are not.
    """

    text: str
    finish_reason: str = "stop"
    outcome: SampleOutcome = "ok"


@dataclass(frozen=True)
class Response:
    """What one request returned: samples in the service's order, and its usage over all of them."""

    samples: tuple[Sample, ...]
    usage: Usage


FailureKind = Literal["final", "transient", "rate_limited", "no_prefill"]


@dataclass(frozen=True)
class Failure:
    """What an exception of an SDK means.

    Attributes:
        kind: `"final"` (asking again will not help), `"transient"`, `"rate_limited"`, or `"no_prefill"` (this model
            refuses to continue a given beginning).
        message: cause and next step, in words, without secrets.
        retry_after: seconds to wait, when the service named them.
        may_be_billed: whether the service may have worked, and charge for it, all the same: no answer in time, a
            connection that broke. The budget then counts the worst case.
    """

    kind: FailureKind
    message: str
    retry_after: float | None = None
    may_be_billed: bool = False


class _TryAgain(Exception):
    """An attempt failed in a way that another one may mend."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


class RemoteTeacher(Teacher):
    """Base of the teachers behind a service.

    Args:
        name: provider and model, as in `anthropic:claude-haiku-4-5`.
        capabilities: what the model can do.
        settings: limits of this process.
        budget: what may still be spent; `None` for no limit.

    A subclass writes `request` and `classify`, and `aclose` when it holds a client. Clients are made in the first
    request, so that they belong to the event loop that uses them.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        settings: EngineSettings | None = None,
        budget: Budget | None = None,
    ):
        self.name = name
        self.capabilities = capabilities
        self.settings = settings or EngineSettings()
        self.budget = budget or Budget()
        self._throttle = Throttle(
            self.settings.max_concurrency, self.settings.requests_per_minute, self.settings.tokens_per_minute
        )
        self._warned: set[str] = set()

    @abstractmethod
    async def request(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        """Make one request, once, for `num_samples` continuations of `prefix`.

        It reads `self.capabilities` anew each time. The SDK's own retries are off. Refused, filtered and empty samples
        are returned as such; everything else that goes wrong raises what the SDK raises.
        """

    @abstractmethod
    def classify(self, error: Exception) -> Failure | None:
        """What an exception that `request` raised means; `None` for a mistake of our own, which is raised as it is."""

    def max_prompt_tokens(self, prefix: Prefix) -> int:
        """An upper bound on the prompt's tokens, for limits and budget. A token holds at least one byte of text."""
        prompt = prefix.prompt if isinstance(prefix.prompt, str) else str(prefix.prompt)
        return len(prompt.encode()) + len(prefix.completion.encode()) + self.prompt_overhead

    # Tokens that templates and instructions may add.
    prompt_overhead = 512

    async def sample(self, prefixes: Sequence[Prefix], request: SamplingRequest) -> list[TeacherReply]:
        # Tasks start in order, and places are given in order: a prefix goes out before the longer one that begins with
        # it, so that a prompt cache can serve the latter.
        return await _all(self._continue(prefix, request) for prefix in prefixes)

    def probe(self, prompt: Prompt) -> None:
        """One tiny request: key, model, continuation and samples per request are looked at before any generation."""
        text = "" if self.capabilities.continuation == "instruct" else "Let us think."
        wanted = min(2, self.capabilities.samples_per_request)
        request = SamplingRequest(num_samples=wanted, max_tokens=16)
        # In a loop of its own, which the clients must not outlive.
        reply = _run(self._probe(Prefix(prompt, text), request))
        if not reply.rollouts:
            raise TeacherError(
                f"The teacher {self.name} was asked one short question and returned nothing: {reply.failure}. "
                "Try another prompt or model; nothing has been generated yet."
            )
        logger.info(
            f"Teacher {self.name}: continuation {self.capabilities.continuation}, up to "
            f"{self.capabilities.samples_per_request} samples per request; the probe used {reply.usage}."
        )

    async def _probe(self, prefix: Prefix, request: SamplingRequest) -> TeacherReply:
        try:
            return await self._continue(prefix, request)
        finally:
            await self.aclose()

    # ---- One prefix ----

    async def _continue(self, prefix: Prefix, request: SamplingRequest) -> TeacherReply:
        counts: Counter[str] = Counter()
        problems: list[str] = []

        async def ask(num_samples: int) -> list[Response]:
            # Some servers return fewer samples than they were asked for, without a word: the rest is asked for.
            responses: list[Response] = []
            while num_samples > 0:
                response = await self._ask(prefix, num_samples, request, counts, problems)
                if response is None:
                    break
                responses.append(replace(response, samples=response.samples[:num_samples]))
                missing = num_samples - len(response.samples)
                if missing > 0:
                    self._returns_fewer(num_samples, len(response.samples))
                    if not response.samples:
                        problems.append("a response without samples")
                        break
                num_samples = missing
            return responses

        sizes = self._split(request.num_samples)
        first: list[Response] = []
        if len(sizes) > 1 and self._fills_cache(prefix):
            first = await ask(sizes.pop(0))  # the cache can be read once the first answer has begun
        answers = await _all(ask(size) for size in sizes)
        responses = [response for answer in (first, *answers) for response in answer]
        samples = [sample for response in responses for sample in response.samples]
        for sample in samples:
            if sample.outcome != "ok":
                counts[sample.outcome] += 1
                if sample.outcome != "restarted":
                    problems.append(f"a sample was {sample.outcome}")
        rollouts = tuple(Rollout(s.text, s.finish_reason) for s in samples if s.outcome in ("ok", "restarted"))
        usage = sum((response.usage for response in responses), Usage())
        failure = None
        if len(rollouts) < request.num_samples:
            failure = f"{len(rollouts)} of {request.num_samples} rollouts: {problems[0] if problems else 'no reason'}"
        return TeacherReply(rollouts, usage, failure, dict(counts))

    def _split(self, num_samples: int) -> list[int]:
        most = self.capabilities.samples_per_request
        return [min(most, num_samples - start) for start in range(0, num_samples, most)]

    def _fills_cache(self, prefix: Prefix) -> bool:
        least = self.capabilities.min_cached_prefix
        # The bound counts bytes, of which a token of prose has about four.
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
        self, prefix: Prefix, num_samples: int, request: SamplingRequest, counts: Counter[str], problems: list[str]
    ) -> Response | None:
        """One request with its retries; `None` when it was given up.

        Raises:
            TeacherError: on a final failure.
            BudgetError: when it might exceed the budget.
        """
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_TryAgain),
                stop=stop_after_attempt(self.settings.max_attempts) | stop_after_delay(self.settings.max_seconds),
                wait=_wait,
                reraise=True,
            ):
                with attempt:
                    counts["requests"] += 1
                    counts["retries"] += attempt.retry_state.attempt_number > 1
                    return await self._attempt(prefix, num_samples, request)
        except _TryAgain as error:
            counts["failed_requests"] += 1
            problems.append(f"a request was given up ({error})")
        return None

    async def _attempt(self, prefix: Prefix, num_samples: int, request: SamplingRequest) -> Response:
        prompt_tokens, completion_tokens = self.max_prompt_tokens(prefix), num_samples * request.max_tokens
        async with (
            self._throttle.slot(prompt_tokens // 4 + completion_tokens),
            self.budget.reserve(prompt_tokens, completion_tokens) as reservation,
        ):
            try:
                async with asyncio.timeout(self.settings.timeout):
                    response = await self.request(prefix, num_samples, request)
            except Exception as error:
                failure = self._failure(error)
                if failure is None:
                    raise
                if failure.may_be_billed:
                    reservation.forfeit()
                if failure.kind == "no_prefill" and self.capabilities.continuation != "instruct":
                    self._instruct_instead(failure)
                elif failure.kind in ("final", "no_prefill"):
                    raise TeacherError(f"{self.name}: {failure.message}") from error
                elif (failure.retry_after or 0) > self.settings.max_retry_after:
                    raise TeacherError(
                        f"{self.name} asks to wait {failure.retry_after:.0f} s, more than "
                        f"teacher_max_retry_after={self.settings.max_retry_after:.0f}: {failure.message}"
                    ) from error
                if failure.kind == "rate_limited":
                    self._throttle.slow_down(failure.retry_after or 0.0)
                raise _TryAgain(failure) from error
            reservation.settle(response.usage)
            self._throttle.succeeded()
            return response

    def _failure(self, error: Exception) -> Failure | None:
        if isinstance(error, TimeoutError):
            message = f"no answer within teacher_timeout={self.settings.timeout:g} s"
            return Failure("transient", message, may_be_billed=True)
        return self.classify(error)

    def _instruct_instead(self, failure: Failure) -> None:
        logger.warning(
            f"{self.name} does not continue a given beginning ({failure.message}). From now on it is instructed to "
            'write what comes next; set teacher_continuation="instruct" to skip this attempt.'
        )
        self.capabilities = replace(self.capabilities, continuation="instruct")


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first error ends the others, so that nothing more is spent, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]


def _wait(state: RetryCallState) -> float:
    """Exponential backoff with full jitter, in seconds; what the service asked for is the least."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, _TryAgain)
    if error.failure.kind == "no_prefill":
        return 0.0
    return (error.failure.retry_after or 0.0) + random.uniform(0, min(30.0, 0.5 * 2**state.attempt_number))


def _run(coroutine: Any) -> Any:
    """Run a coroutine to its end, also when the caller is inside an event loop (a notebook)."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
