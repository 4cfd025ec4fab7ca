# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Teachers: models that return text, behind one method."""

from typing import TYPE_CHECKING, Any

from omniopd_trl.teachers.base import METER, OUTCOMES, Prefix, Rollout, SamplingRequest, Teacher, TeacherReply, Usage
from omniopd_trl.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from omniopd_trl.teachers.local import LocalTeacher

__all__ = [
    "METER",
    "OUTCOMES",
    "LocalTeacher",
    "Prefix",
    "Rollout",
    "SamplingRequest",
    "ScriptedTeacher",
    "Teacher",
    "TeacherReply",
    "Usage",
    "load_teacher",
]


def load_teacher(
    teacher: "str | PreTrainedModel | Teacher",
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    device: "torch.device | str | None" = None,
) -> Teacher:
    """The teacher that a name, a model or a teacher stands for.

    Args:
        teacher: a `Teacher`, which is returned as it is; `"scripted"`; or a path, Hub id or instance of a causal
            language model, for which the other arguments are those of `LocalTeacher`.

    Raises:
        DataError: when a model cannot be loaded.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if teacher == "scripted":
        return ScriptedTeacher()
    from omniopd_trl.teachers.local import LocalTeacher

    return LocalTeacher(
        teacher,
        model_init_kwargs=model_init_kwargs,
        revision=revision,
        trust_remote_code=trust_remote_code,
        chat_template_kwargs=chat_template_kwargs,
        device=device,
    )


def __getattr__(name: str) -> object:
    # The local teacher brings torch and transformers along; the others need neither.
    if name == "LocalTeacher":
        from omniopd_trl.teachers.local import LocalTeacher

        return LocalTeacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
