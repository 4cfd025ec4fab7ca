# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of small audits."""

from typing import Any

from omniopd_trl.audits.types import AuditSettings


def audit_settings(**settings: Any) -> AuditSettings:
    """The given settings, and for the others those of a small audit with the paper's selection of chunks."""
    small: dict[str, Any] = {
        "num_chunks": 2,
        "chunk_length": 4,
        "min_chunk_length": 2,
        "num_rollouts": 3,
        "min_rollouts": 1,
        "prior_strength": 1.0,
        "chunk_overlap": "resample",
        "chunk_placement": "start",
        "chunk_selection": "entropy",
        "teacher_temperature": 1.0,
        "teacher_top_p": 1.0,
    }
    return AuditSettings(**(small | settings))
