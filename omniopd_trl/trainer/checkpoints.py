# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from."""

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from omniopd_trl.errors import DataError

logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest checkpoint in a folder that was written to its end.

    A run that is killed while it saves leaves a folder without a model, an optimizer or the trainer's state, which is
    written last. Such a folder is passed over, with a warning; the run that goes on writes it again.

    Args:
        output_dir: the run's `output_dir`.

    Returns:
        The checkpoint's path.

    Raises:
        DataError: when there is none.
    """
    folder = Path(output_dir)
    numbers = [path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    checkpoints = [
        folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        for step in sorted((int(number) for number in numbers if number.isdigit()), reverse=True)
    ]
    if not checkpoints:
        raise DataError(
            f"`resume_from_checkpoint` is true, and there is no checkpoint in {str(folder)!r}. Leave it out to start "
            "from the beginning, or set `output_dir` to that of the run that goes on."
        )
    for checkpoint in checkpoints:
        if _is_whole(checkpoint):
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


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
