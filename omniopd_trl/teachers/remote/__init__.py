# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of all teachers behind a service: concurrency, limits, retries, classification of errors."""

from omniopd_trl.teachers.remote.answers import Response, Sample
from omniopd_trl.teachers.remote.engine import RemoteTeacher
from omniopd_trl.teachers.remote.failures import Failure, MalformedResponseError, ServiceError
from omniopd_trl.teachers.remote.settings import Capabilities, Continuation, EngineSettings

__all__ = [
    "Capabilities",
    "Continuation",
    "EngineSettings",
    "Failure",
    "MalformedResponseError",
    "RemoteTeacher",
    "Response",
    "Sample",
    "ServiceError",
]
