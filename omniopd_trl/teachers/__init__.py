# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Teachers: models that return text, behind one method."""

from importlib import import_module
from typing import TYPE_CHECKING

from omniopd_trl.accounting.usage import Usage
from omniopd_trl.teachers.base import OUTCOMES, Prefix, Rollout, SamplingRequest, Teacher, TeacherReply
from omniopd_trl.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    from omniopd_trl.teachers.load import load_teacher
    from omniopd_trl.teachers.local import LocalTeacher
    from omniopd_trl.teachers.options import TeacherOptions

__all__ = [
    "OUTCOMES",
    "LocalTeacher",
    "Prefix",
    "Rollout",
    "SamplingRequest",
    "ScriptedTeacher",
    "Teacher",
    "TeacherOptions",
    "TeacherReply",
    "Usage",
    "load_teacher",
]

# These bring torch and transformers along; the others need neither.
_LAZY = {
    "LocalTeacher": "omniopd_trl.teachers.local",
    "TeacherOptions": "omniopd_trl.teachers.options",
    "load_teacher": "omniopd_trl.teachers.load",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
