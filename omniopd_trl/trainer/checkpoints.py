# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a folder, and which one a run resumes from."""

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
    """The checkpoints in a folder, those of later steps first; whole or not."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {int(step): path for path in found if (step := path.name.rpartition("-")[2]).isdigit()}
    return [path for _, path in sorted(steps.items(), reverse=True)]


def state_of(checkpoint: Path) -> dict[str, Any] | None:
    """What the trainer has saved of its state; `None` for a checkpoint that was not written to its end."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest checkpoint in a folder that was written to its end.

    A run that is killed while it saves leaves a folder without a model, an optimizer or the trainer's state, which is
    written last. Such a folder is passed over, with a warning; the resumed run writes it again.

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
            "from the beginning, or set `output_dir` to that of the run that goes on."
        )
    for checkpoint in checkpoints:
        if state_of(checkpoint) is not None:
            if checkpoint is not checkpoints[0]:
                logger.warning(f"{checkpoints[0]} was not written to its end: the run goes on from {checkpoint}.")
            return str(checkpoint)
    raise DataError(
        f"`resume_from_checkpoint` is true, and no checkpoint in {str(folder)!r} was written to its end. Leave it out "
        "to start from the beginning: steps that the journal holds are not paid for again."
    )


def unmark(checkpoint: Path) -> None:
    """Take away what says that a checkpoint is whole, before another is written over it."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
