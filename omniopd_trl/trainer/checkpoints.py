# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a folder, and the one that a run resumes from."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from omniopd_trl.errors import DataError

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


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest complete checkpoint in a folder.

    A run that is killed while it saves leaves an incomplete folder. The trainer's state is written last, so a folder
    without it is skipped, with a warning. The resumed run writes it again.

    Args:
        output_dir: the run's `output_dir`.

    Returns:
        The checkpoint's path.

    Raises:
        DataError: when there is none.
    """
    folder = Path(output_dir)
    checkpoints = checkpoints_of(folder)
    if not checkpoints:
        raise DataError(
            f"`resume_from_checkpoint` is true, and there is no checkpoint in {str(folder)!r}. Leave it out to start "
            "from the beginning, or set `output_dir` to that of the run to resume."
        )
    for checkpoint in checkpoints:
        if state_of(checkpoint) is not None:
            if checkpoint is not checkpoints[0]:
                logger.warning(f"{checkpoints[0]} is incomplete: the run resumes from {checkpoint}.")
            return str(checkpoint)
    raise DataError(
        f"`resume_from_checkpoint` is true, and no checkpoint in {str(folder)!r} is complete. Leave it out "
        "to start from the beginning: steps that the journal holds are not paid for again."
    )


def unmark(checkpoint: Path) -> None:
    """Mark a checkpoint as incomplete before it is overwritten, by removing the trainer's state."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
