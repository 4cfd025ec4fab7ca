# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a model behind a service can do, and the limits of one process."""

from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

Continuation = Literal["raw", "continue_final", "prefill", "prefix_flag", "instruct"]


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of a model behind a service. `teachers/providers/capabilities.py` lists them by model name.

    Attributes:
        continuation: how the student's text becomes the beginning of the teacher's answer.
        samples_per_request: maximum number of samples per request.
        takes_temperature: whether the service accepts and honours a temperature and `top_p`.
        refused: optional fields that the service refused. They are left out.
        reasoning_off: fields of the request's body that disable hidden reasoning, or minimize it.
        reasoning_headroom: additional tokens per sample, for reasoning that cannot be disabled and counts against the
            limit.
        min_cached_prefix: shortest prompt that the service caches, in tokens; `None` when it caches none.
        shutdown: date on which the provider retires the model; `None` when unknown.
    """

    continuation: Continuation
    samples_per_request: int = 1
    takes_temperature: bool = True
    refused: frozenset[str] = frozenset()
    reasoning_off: dict[str, Any] = field(default_factory=dict)
    reasoning_headroom: int = 0
    min_cached_prefix: int | None = None
    shutdown: date | None = None


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one process; see `OmniOPDConfig` for the meaning of each field.

    Attributes:
        max_concurrency: requests in flight at once.
        requests_per_minute: `None` for no limit.
        tokens_per_minute: `None` for no limit.
        timeout: limit of one attempt, in seconds.
        max_attempts: attempts per request, the first one included. With `None`, `max_seconds` is the limit, and
            `MAX_PAID_ATTEMPTS` limits the attempts that may be charged.
        max_seconds: limit of all attempts of a request and the waits between them, in seconds. Time in the queue does
            not count.
        max_retry_after: the longest wait, in seconds, that a service may ask for.
        probe_samples: samples that the probe asks for: those of a chunk, so it fails where the run would.
        probe_continues: whether the probe asks for a continuation. A run that only asks questions needs none.
    """

    max_concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    max_attempts: int | None = None
    max_seconds: float = 600.0
    max_retry_after: float = 120.0
    probe_samples: int = 2
    probe_continues: bool = True
