# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a folder, the one that a run resumes from, and where it ends."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from omniopd_trl.errors import DataError
from omniopd_trl.journal.file import journals_of

logger = logging.get_logger(__name__)


def checkpoints_of(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, complete or not, later steps first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {int(step): path for path in found if (step := path.name.rpartition("-")[2]).isdigit()}
    return [path for _, path in sorted(steps.items(), reverse=True)]


def state_of(checkpoint: Path) -> dict[str, Any] | None:
    """The saved trainer state; `None` for a checkpoint that is incomplete."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in a folder, by step; `None` without one.

    A run that is killed while it saves leaves an incomplete folder. The trainer's state is written last, so a folder
    without it is skipped, with a warning. The resumed run writes it again.

    Args:
        output_dir: the run's `output_dir`.
    """
    checkpoints = checkpoints_of(output_dir)
    complete = next((checkpoint for checkpoint in checkpoints if state_of(checkpoint) is not None), None)
    if checkpoints and complete is not checkpoints[0]:
        logger.warning(f"{checkpoints[0]} is incomplete: the run resumes from {complete or 'step 0'}.")
    return None if complete is None else str(complete)


def resume_point(resume_from_checkpoint: str | bool, output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint that a run resumes from.

    Args:
        resume_from_checkpoint: `True` for the newest complete checkpoint in `output_dir`, or the path of a checkpoint.
        output_dir: the run's `output_dir`.

    Returns:
        The path of the checkpoint; `None` for step 0, from which the journal is replayed.

    Raises:
        DataError: when there is no such complete checkpoint, and for `True`, when there is no journal either.
    """
    if resume_from_checkpoint is not True:
        there = os.path.isdir(resume_from_checkpoint)
        if not there or state_of(Path(str(resume_from_checkpoint))) is None:
            problem = "which holds no complete checkpoint" if there else "and there is no such folder"
            raise DataError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, {problem}. Give the path of a checkpoint-N "
                "folder, or `true` for the last one in `output_dir`."
            )
        return str(resume_from_checkpoint)
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None and not journals_of(output_dir):
        raise DataError(
            f"`resume_from_checkpoint` is true, and {str(output_dir)!r} holds neither a complete checkpoint nor a "
            "journal. Leave it out to start from the beginning, or set `output_dir` to that of the run to resume."
        )
    return checkpoint


def unmark(checkpoint: Path) -> None:
    """Mark a checkpoint as incomplete before it is overwritten, by removing the trainer's state."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)


def check_adapters(checkpoint: Path, model: Any) -> None:
    """Check that a checkpoint and the student that resumes from it both have adapters, or neither.

    Raises:
        DataError: when one of them is a whole model.
    """
    saved, has_adapters = (checkpoint / "adapter_config.json").exists(), is_peft_model(model)
    is_whole = not saved and (checkpoint / "config.json").exists()
    if has_adapters and is_whole:
        what = "a whole model, and the student has adapters (`peft_config`, in a recipe `use_peft`)"
    elif saved and not has_adapters:
        what = "adapters, and the student has none (`peft_config`, in a recipe `use_peft`)"
    else:
        return
    raise DataError(
        f"The checkpoint {checkpoint} holds {what}. Resume with the settings that it was saved with, or start a run "
        "in another output_dir."
    )


class EndsAtLastStep:
    """Mixin for a trainer. transformers takes one more step when it resumes a run that ended within an epoch."""

    def _run_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
