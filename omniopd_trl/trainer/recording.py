# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run records and resumes from, the same on all processes: its journal and its checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from omniopd_trl.errors import DataError
from omniopd_trl.journal.file import journal_path
from omniopd_trl.journal.reader import identity_of_first
from omniopd_trl.journal.recorder import Recorder
from omniopd_trl.teachers import Teacher
from omniopd_trl.trainer.checkpoints import resume_point, state_of
from omniopd_trl.trainer.distributed import on_every_process, raise_together
from omniopd_trl.trainer.fingerprint import fingerprint
from omniopd_trl.trainer.omniopd_config import OmniOPDConfig

logger = logging.get_logger(__name__)


@contextmanager
def recording(
    recorder: Recorder,
    key: Mapping[str, Any],
    teacher: Teacher,
    args: OmniOPDConfig,
    accelerator: Accelerator,
    *,
    replay: bool,
) -> Iterator[None]:
    """Context in which a recorder writes to the journal of this process. Every process has to enter it together.

    Args:
        recorder: the recorder of this process.
        key: result of [`replay_key`].
        teacher: the teacher.
        args: configuration of the run.
        accelerator: accelerator of the run.
        replay: whether records of earlier runs are replayed.

    Raises:
        JournalError: on every process, when the journal of one cannot be used.
    """
    rank = accelerator.process_index
    opened = recorder.open(
        journal_path(args.output_dir, rank),
        teacher.budget,
        replay=replay,
        run=str(args.run_name or Path(args.output_dir).name),
        teacher=teacher.name,
        fingerprint=fingerprint(key),
        settings=key,
        rank=rank,
        num_processes=accelerator.num_processes,
    )
    with ExitStack() as stack:
        on_every_process(lambda: stack.enter_context(opened), rank)
        yield


def checkpoint_to_resume(value: str | bool, output_dir: str, accelerator: Accelerator) -> str | None:
    """The checkpoint to resume from; `None` for step 0. Every process has to call it, and finds the same.

    Args:
        value: `True` for the newest complete checkpoint in `output_dir`, or the path of a checkpoint.
        output_dir: the run's `output_dir`.
        accelerator: accelerator of the run.

    Raises:
        DataError: when there is nothing to resume, or when processes find different checkpoints.
    """
    process = accelerator.process_index
    error: DataError | None = None
    checkpoint = None
    try:
        checkpoint = resume_point(value, output_dir)
    except DataError as caught:
        error = caught
    found = "nothing" if error is not None else "step 0"
    if checkpoint is not None:
        found = Path(checkpoint).name + (" (incomplete)" if state_of(Path(checkpoint)) is None else "")
    everywhere = gather_object([found])
    if len(set(everywhere)) > 1:
        other = next(index for index, there in enumerate(everywhere) if there != everywhere[0])
        different = DataError(
            f"resume_from_checkpoint={value!r}: process 0 finds {everywhere[0]} in its output_dir, and process "
            f"{other} finds {everywhere[other]}. Put `output_dir` on a file system that all machines share, or "
            "copy the checkpoint of process 0 to each of them."
        )
        different.on_every_process = True
        raise different
    raise_together(error, process)
    if checkpoint is not None and accelerator.num_processes > 1:
        own = gather_object([(Path(checkpoint) / f"rng_state_{process}.pth").exists()])
        if 0 < sum(own) < len(own) and process == 0:
            logger.warning(
                f"{checkpoint} holds the random state of {sum(own)} of {len(own)} processes: files of it are "
                "missing, or it was saved by another number of processes. The run continues, but not exactly."
            )
    return checkpoint


def warn_about_separate_folders(args: OmniOPDConfig, accelerator: Accelerator) -> None:
    """Warn when machines do not share `output_dir`: process 0 alone has the checkpoints.

    `save_on_each_node` does not help: `save_pretrained` of transformers writes the weights on process 0 only.
    """
    if args.save_strategy == "no":
        return
    first = on_every_process(lambda: identity_of_first(args.output_dir), accelerator.process_index)
    other = next((process for process, seen in enumerate(first) if seen != first[0]), None)
    if other is not None and accelerator.is_main_process:
        logger.warning(
            f"Process {other} does not see the files of process 0 in output_dir={str(args.output_dir)!r}: "
            "checkpoints are whole on the machine of process 0 only. Put `output_dir` on a file system that all "
            "machines share, or copy a checkpoint of process 0 to each of them before you resume."
        )
